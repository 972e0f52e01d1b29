"""What a model returns on some inputs, as a function of its weights and of the inputs.

The tangent kernel and signal propagation look at outputs, not at a loss: they are called on what
the model is called with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from pantarhei.errors import RequestError
from pantarhei.probes._objective import Loss, Objective, Weights, _StandIn, bare

Read = Callable[[Any], Tensor]  # from what the model returns to the outputs to use, (n, ...)


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Outputs:
    r"""The outputs :math:`f(x_i; \theta)` of a model on n inputs, an (n, o) function of weights.

    The weights, buffers and inputs are copies, evaluation mode holds while the model runs, and the
    model is left as it was: see :class:`Objective`, which does that.

    Args:
        model: Any module.
        inputs: What the model is called with: a tensor, a tuple of arguments or a dict of keyword
            arguments. Every tensor has one row for each of the n inputs.
        read: Picks the outputs, (n, ...), from what the model returns; they are flattened to
            (n, o). Default: the tensor it returns, or its ``logits``.
        parameters: ``parameters(name, parameter)`` says which trainable weights count; default all.
        dtype: Work on copies in this precision.
        weights: Whether the weights count at all; if not, a model without any will do.

    Raises:
        RequestError: For inputs that the model does not take, and outputs without a row for each.

    >>> outputs = Outputs(nn.Linear(3, 2), torch.ones(5, 3))
    >>> outputs.n, outputs.o, outputs(outputs.objective.params).shape
    (5, 2, torch.Size([5, 2]))
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        read: Read | None = None,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        dtype: torch.dtype | None = None,
        weights: bool = True,
    ):
        call = _as_call(inputs)
        if not weights:
            like = next((p for p in model.parameters() if p.is_floating_point()), None)
            model = _Held(bare(model), _first_floating(call) if like is None else like)
            parameters = _unit
        self.objective = Objective(model, _no_loss, call, parameters=parameters, dtype=dtype)
        self.model = self.objective.model
        self.args, self.kwargs = self.objective.batches[0]
        self.n = _rows(self.args, self.kwargs)
        self._read = read or _default_read
        self.o = self._try().shape[1]

    def _try(self) -> Tensor:
        try:
            with torch.no_grad():
                return self(self.objective.params, slice(0, 1))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise RequestError(
                f"the model does not take these inputs ({reason}): give what it is called with, a "
                "tensor, a tuple of arguments or a dict of keyword arguments."
            ) from error

    def __call__(self, weights: Weights, rows: slice | None = None) -> Tensor:
        """Return the outputs on a slice of the inputs, (rows, o)."""
        return self.of(weights, *self.take(rows))

    def take(self, rows: slice | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a slice of the inputs, as positional and keyword arguments."""
        if rows is None:
            return self.args, self.kwargs
        return cast(
            "tuple[tuple[Any, ...], dict[str, Any]]",
            pytree.tree_map_only(Tensor, lambda t: t[rows], (self.args, self.kwargs)),
        )

    def first_two(self) -> Outputs:
        """Return the same model on the first two inputs alone; a single one twice."""
        pair = copy.copy(self)
        rows = torch.arange(2) % self.n
        pair.args, pair.kwargs = pytree.tree_map_only(
            Tensor, lambda t: t[rows.to(t.device)], (self.args, self.kwargs)
        )
        pair.n = 2
        return pair

    def of(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the outputs on these arguments, (rows, o)."""
        objective = self.objective
        with objective._measuring():
            result = functional_call(self.model, objective._tensors(weights), args, kwargs)
        value = self._read(result)
        rows = _rows(args, kwargs)
        if not isinstance(value, Tensor) or value.shape[:1] != (rows,):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise RequestError(
                f"{rows} inputs gave outputs of shape {shape}: pick with read= a tensor that has "
                "a row for each input."
            )
        return value.reshape(rows, -1)

    def one(self, weights: Weights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the outputs on a single input given without its row axis, (o,)."""
        call = pytree.tree_map_only(Tensor, lambda t: t[None], (args, kwargs))
        return self.of(weights, *call)[0]


class _Held(nn.Module):
    """A model beside one parameter of its own that it does not use."""

    def __init__(self, model: nn.Module, like: Tensor):
        super().__init__()
        self.model = model
        self.unit = nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def _unit(name: str, parameter: nn.Parameter) -> bool:
    return name == "unit"


def _no_loss(model: Any, batch: Any) -> Tensor:
    raise AssertionError("outputs have no loss")


def calls(model: nn.Module, loss: Loss, *batches: Any) -> Call:
    """Return what the loss calls the model with, once for each batch, joined along the rows.

    Raises :class:`RequestError` for a loss that does not call the model exactly once.
    """
    objective = Objective(model, loss, *batches)
    found: list[Call] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        found.append(Call(args, kwargs))
        return functional_call(objective.model, objective._tensors(objective.params), args, kwargs)

    for number, batch in enumerate(objective.batches, 1):
        with torch.no_grad(), objective._measuring():
            loss(_StandIn(objective.model, run), batch)
        if len(found) != number:
            raise RequestError(
                "the loss does not call the model once, and what to measure on cannot be told from "
                "it: give inputs=."
            )
    if len(found) == 1:
        return found[0]
    parts, structures = zip(*map(pytree.tree_flatten, found), strict=True)
    if any(structure != structures[0] for structure in structures):
        raise RequestError("the batches call the model in different ways: measure on one of them.")
    joined = [
        torch.cat(ts) if isinstance(ts[0], Tensor) else ts[0] for ts in zip(*parts, strict=True)
    ]
    return cast(Call, pytree.tree_unflatten(joined, structures[0]))


def _as_call(inputs: Any) -> Call:
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):  # a tokenizer's BatchEncoding too
        return Call((), dict(inputs))
    return Call(tuple(inputs) if type(inputs) in (tuple, list) else (inputs,), {})


def _first_floating(call: Any) -> Tensor:
    leaves = pytree.tree_leaves(call)
    found = (t for t in leaves if isinstance(t, Tensor) and t.is_floating_point())
    return next(found, torch.zeros(()))


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    lengths = {len(t) if t.dim() else 0 for t in tensors}
    if len(lengths) != 1 or lengths == {0}:
        raise RequestError(
            f"the inputs hold tensors with {sorted(lengths)} rows: give the same number, at least "
            "one, in each of them (wrap the model where an argument is not per input)."
        )
    return lengths.pop()


def _default_read(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    if isinstance(found := getattr(result, "logits", None), Tensor):
        return found
    raise RequestError(
        f"the model returns a {type(result).__name__}: pick the tensor of outputs with read=, for "
        "example read=lambda result: result[0]."
    )
