"""The training loss as a function of one flat vector of weights, for every instrument to build on.

Nothing of the model is changed by a measurement: weights, buffers, training mode, ``.grad`` and the
random number generators are afterwards what they were.
"""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from pantarhei._fit_loss import Loss as Loss
from pantarhei._fit_loss import scalar
from pantarhei._fit_random import own_randomness, seed_all
from pantarhei.cost import without_fast_path
from pantarhei.errors import RequestError

Weights = Mapping[str, Tensor]


class Objective:
    r"""The mean training loss over some batches, as a function of the model's weights.

    .. math:: L(\theta) = \frac1B \sum_{b=1}^{B} \mathrm{loss}(\mathrm{model}_\theta, b)

    Every batch counts the same, so give batches of one size. The weights are copied: an objective
    stays at the point where it was made while the training of the model goes on.

    The model is measured in evaluation mode, where dropout is off and batch normalisation uses its
    running statistics: only then is the loss a function of the weights alone, the same one at every
    call. ``train=True`` measures in training mode: batch normalisation with the statistics of the
    batch (its running ones stay as they are), dropout with the same random numbers at every call.

    A ``torch.compile``\ d model is run without the compiled code, through which a second derivative
    does not pass; attention runs in plain operations for the same reason. Autocast is off.

    Args:
        model: Any module; its device is where everything is computed.
        loss: ``loss(model, batch)`` returns a scalar, or a scalar and a dict, as for ``fit``.
        batches: One or more batches; their tensors are moved to the model's device.
        parameters: ``parameters(name, parameter)`` says which trainable ones make the vector;
            default all. The others are constants.
        dtype: Work on a copy of the weights, buffers and batches in this precision. ``None``: the
            model's own, or float32 where that has fewer bits.
        train: Measure in training mode.

    Attributes:
        size: Number of weights in the vector.
        names: Their parameters' names, in the vector's order; tied ones once.
        params: The weights by name.
        parameters: The model's own parameters by name, to look up an optimizer's state.
        device, dtype: Of the vector.

    Raises:
        RequestError: Without a batch or a trainable parameter, for sharded parameters (FSDP), for
            parameters on several devices, and for a loss that is not one finite number.

    >>> net = nn.Linear(2, 1, bias=False)
    >>> x, y = torch.eye(2), torch.zeros(2, 1)
    >>> objective = Objective(net, lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(), (x, y))
    >>> objective.size, objective.names
    (2, ('weight',))
    >>> torch.allclose(objective.gradient(), objective.vector())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *batches: Any,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        dtype: torch.dtype | None = None,
        train: bool = False,
    ):
        if not batches:
            raise RequestError("the objective needs at least one batch: give one after the loss.")
        self.model, self.loss, self.train = bare(model), loss, train
        named = dict(self.model.named_parameters())
        _refuse_what_cannot_be_measured(self.model, named)
        self.parameters = {
            name: p
            for name, p in named.items()
            if p.requires_grad and (parameters is None or parameters(name, p))
        }
        if not self.parameters:
            raise RequestError(
                "no trainable parameter is left to measure: call requires_grad_(True) on what to "
                "measure, or let parameters= accept some."
            )
        self.names = tuple(self.parameters)
        self.device = next(iter(self.parameters.values())).device
        own = [p.dtype for p in self.parameters.values()]
        low = any(torch.finfo(d).bits < 32 for d in own)
        cast = dtype or (torch.float32 if low else None)
        self.dtype = cast or max(own, key=lambda d: torch.finfo(d).bits)
        self.params: dict[str, Tensor] = {
            name: moved(p.detach().clone(), self.device, cast)
            for name, p in self.parameters.items()
        }
        self._shapes = [p.shape for p in self.params.values()]
        self._sizes = [p.numel() for p in self.params.values()]
        self.size = sum(self._sizes)
        constant = {n: p.detach().clone() for n, p in named.items() if n not in self.params}
        self._constants: dict[str, Tensor] = moved(constant, None, cast)
        buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}
        self._buffers: dict[str, Tensor] = moved(buffers, None, cast)
        self.batches = tuple(moved(batch, self.device, cast) for batch in batches)

    def vector(self) -> Tensor:
        """Return the weights, flat: (size,)."""
        return self.flatten(self.params)

    def flatten(self, tensors: Weights) -> Tensor:
        """Join tensors that are named and shaped like the weights to one vector: (size,)."""
        return torch.cat([tensors[name].reshape(-1).to(self.dtype) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a vector (size,) into tensors named and shaped like the weights."""
        if vector.shape != (self.size,):
            raise RequestError(
                f"a vector of shape {tuple(vector.shape)} does not fit the {self.size} weights: "
                f"give one of shape ({self.size},)."
            )
        parts = vector.split(self._sizes)
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self._shapes, strict=True)
        }

    def evaluate(self, weights: Weights, batch: Any) -> Tensor:
        """Return the loss of one batch at these weights, differentiable in them, ().

        ``torch.func`` transforms go through it.
        """
        module = _Loss(self.model, self.loss)
        named = {f"model.{name}": tensor for name, tensor in self._tensors(weights).items()}
        with self._measuring():
            return scalar(functional_call(module, named, (batch,)))

    def value(self) -> float:
        """Return the mean loss."""
        with torch.no_grad():
            values = [self.evaluate(self.params, batch) for batch in self.batches]
        return finite(torch.stack(values).mean())

    def gradient(self, at: Tensor | None = None) -> Tensor:
        """Return the gradient of the mean loss, here or at other weights (size,): (size,)."""
        weights = self.params if at is None else self.unflatten(at)
        total = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for batch in self.batches:
            leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
            value = self.evaluate(leaves, batch)
            finite(value)
            total += self.join(differentiate(value, leaves.values()))
        return total / len(self.batches)

    def split(self, batch: Any) -> tuple[Callable[[Weights], Tensor], Callable[[Tensor], Tensor]]:
        """Take the loss of a batch apart: ``loss = criterion(outputs(weights))``.

        The loss is called with a stand-in for the model that records its one call; the criterion
        calls it with one that replays a given output. Where the model returns a structure
        (a ``ModelOutput``, a tuple), the output is the tensor in it that the loss uses, or the flat
        concatenation of those that it uses.

        Raises :class:`RequestError` for a loss that calls the model not exactly once, and for a
        model that computes the loss itself.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            output = functional_call(self.model, self._tensors(self.params), args, kwargs)
            calls.append((args, kwargs, output))
            return output

        with torch.no_grad(), self._measuring():
            self.loss(_StandIn(self.model, run), batch)
        if len(calls) != 1:
            raise RequestError(
                f"the loss calls the model {len(calls)} times, and the split into outputs and "
                "criterion needs exactly one call model(...): write a loss that makes one."
            )
        args, kwargs, recorded = calls[0]
        parts, structure = pytree.tree_flatten(recorded)
        parts = [p.detach() if isinstance(p, Tensor) else p for p in parts]

        def replay(replaced: Mapping[int, Tensor]) -> Tensor:
            filled = [replaced.get(i, part) for i, part in enumerate(parts)]
            output = pytree.tree_unflatten(filled, structure)
            with self._measuring():
                return scalar(self.loss(_StandIn(self.model, lambda *a, **k: output), batch))

        used = _used(parts, replay)
        shapes = [parts[i].shape for i in used]

        def outputs(weights: Weights) -> Tensor:
            with self._measuring():
                result = functional_call(self.model, self._tensors(weights), args, kwargs)
            found = pytree.tree_flatten(result)[0]
            chosen = [found[i] for i in used]
            return chosen[0] if len(chosen) == 1 else torch.cat([c.reshape(-1) for c in chosen])

        def criterion(output: Tensor) -> Tensor:
            if len(used) == 1:
                return replay({used[0]: output})
            cut = output.split([shape.numel() for shape in shapes])
            return replay({i: c.view(s) for i, c, s in zip(used, cut, shapes, strict=True)})

        return outputs, criterion

    def leaves(self) -> dict[str, Tensor]:
        """Return the weights as tensors that a graph can begin with; the storage is shared."""
        return {name: p.detach().requires_grad_() for name, p in self.params.items()}

    def join(self, tensors: tuple[Tensor, ...], batched: bool = False) -> Tensor:
        """Join tensors in the weights' order: (size,), or (k, size) from (k, *shape) each."""
        if batched:
            return torch.cat([t.reshape(len(t), -1).to(self.dtype) for t in tensors], 1)
        return torch.cat([t.reshape(-1).to(self.dtype) for t in tensors])

    def cut(self, vectors: Tensor) -> list[Tensor]:
        """Cut (size,) into the weights' shapes, or (k, size) into (k, *shape) each."""
        lead = vectors.shape[:-1]
        parts = vectors.split(self._sizes, -1)
        return [
            part.reshape(*lead, *p.shape).to(p.dtype)
            for part, p in zip(parts, self.params.values(), strict=True)
        ]

    def _tensors(self, weights: Weights) -> dict[str, Tensor]:
        # Buffers are cloned at each call: whatever the model writes to them is thrown away.
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return {**self._constants, **buffers, **weights}

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Run in the chosen mode and in operations that have a second derivative."""
        modes = {module: module.training for module in self.model.modules()}
        with ExitStack() as stack:
            stack.enter_context(own_randomness(self.device))
            if self.train:
                seed_all(0, self.device)
            stack.enter_context(without_fast_path())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if any(isinstance(module, nn.RNNBase) for module in modes):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self.model.train(self.train)
            try:
                yield
            finally:
                for module, mode in modes.items():
                    module.training = mode


def bare(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile`` and of data parallelism."""
    inside: Any = model
    while True:
        if hasattr(inside, "_orig_mod"):
            inside = inside._orig_mod
        elif isinstance(inside, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inside = inside.module
        else:
            return inside


def moved(thing: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Move the tensors of a batch to a device, its floating-point ones to a precision."""
    if isinstance(thing, Tensor):
        return thing.to(device, dtype if thing.is_floating_point() else None)
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(moved(part, device, dtype) for part in thing))
    if type(thing) in (tuple, list):
        return type(thing)(moved(part, device, dtype) for part in thing)
    if type(thing) is dict:
        return {name: moved(part, device, dtype) for name, part in thing.items()}
    if isinstance(thing, UserDict):  # a tokenizer's BatchEncoding
        kind: Any = type(thing)
        return kind({name: moved(part, device, dtype) for name, part in thing.items()})
    return thing.to(device) if hasattr(thing, "to") else thing


def finite(value: Tensor) -> float:
    """Return a number, or refuse one that is not finite."""
    number = float(value.detach())
    if number != number or number in (float("inf"), float("-inf")):
        raise RequestError(
            f"the loss is {number}, and has no curvature there: measure before training diverges, "
            "or check the batch for such values."
        )
    return number


def differentiate(
    of: Tensor | tuple[Tensor, ...],
    by: Any,
    along: Any = None,
    *,
    graph: bool = False,
    keep: bool = False,
    batched: bool = False,
) -> tuple[Tensor, ...]:
    """Call ``torch.autograd.grad``; what does not depend on an input has derivative zero."""
    inputs = tuple(by)
    try:
        found = torch.autograd.grad(
            of,
            inputs,
            along,
            create_graph=graph,
            retain_graph=keep or graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    except (RuntimeError, NotImplementedError) as error:
        if "derivative for" in str(error) or "once_differentiable" in str(error):
            raise RequestError(
                f"an operation of the model has no second derivative ({error}): use one that has."
            ) from error
        raise
    lead = (along[0] if isinstance(along, tuple) else along).shape[:1] if batched else ()
    return tuple(
        torch.zeros(*lead, *i.shape, dtype=i.dtype, device=i.device) if f is None else f
        for f, i in zip(found, inputs, strict=True)
    )


class _Loss(nn.Module):
    """``loss(model, batch)`` as a module, so that a functional call replaces the model's weights.

    The loss may call the model several times and read its attributes.
    """

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Any:
        return self.loss(self.model, batch)


class _StandIn:
    """What a loss is given for the model: it answers calls itself, and is the model otherwise."""

    def __init__(self, model: nn.Module, answer: Callable[..., Any]):
        self._model, self._answer = model, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _used(parts: list[Any], replay: Callable[[Mapping[int, Tensor]], Tensor]) -> list[int]:
    """Return which of the model's output tensors the loss depends on."""
    floating = {
        i: p.requires_grad_()
        for i, p in enumerate(parts)
        if isinstance(p, Tensor) and p.is_floating_point()
    }
    with torch.enable_grad():
        value = replay(floating)
    if not value.requires_grad:
        raise RequestError(
            "the loss does not depend on the model's output: use it, without detach() or no_grad()."
        )
    slopes = torch.autograd.grad(value, list(floating.values()), allow_unused=True)
    used = [i for i, slope in zip(floating, slopes, strict=True) if slope is not None]
    for part in floating.values():
        part.requires_grad_(False)
    if all(parts[i].dim() == 0 for i in used):
        raise RequestError(
            "the model returns its loss itself, so that its outputs cannot be told from the "
            "criterion: compute the loss in loss(model, batch) from the model's outputs, for "
            "example cross_entropy(model(x).logits, y)."
        )
    return used


def _refuse_what_cannot_be_measured(model: nn.Module, named: Mapping[str, nn.Parameter]) -> None:
    if any(
        getattr(p, "_fsdp_flattened", False) or hasattr(p, "placements") for p in named.values()
    ):
        raise RequestError(
            "the model's parameters are sharded (FSDP), and the probes need them whole: load a "
            "checkpoint into an unsharded model and measure that."
        )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in named.values()):
        raise RequestError("the model has lazy layers without weights: run it once on a batch.")
    if any(p.requires_grad and not p.is_floating_point() for p in named.values()):
        raise RequestError("the model has complex parameters: the probes measure real ones only.")
    if len(devices := {p.device for p in named.values()}) > 1:
        raise RequestError(
            f"the parameters lie on several devices ({', '.join(sorted(map(str, devices)))}): "
            "move the model to one."
        )
