"""SortedNet (arXiv 2309.00255): one ordinary training run makes every prefix a network.

    min_theta  E_{b ~ P_B} [ L(y, f(x; theta(b))) ]

Each draw takes a sub-network b from the grid B and a mini-batch; ``g_acc`` draws are averaged into
one update ("random"), or every update takes the mean over all of B ("sum"). Because sub-networks
are nested, unit u of an axis with d values is trained in (d - u + 1) / d of the draws, which sorts
the units by importance: any prefix is a working network, and choosing one for a budget needs no
search and no further training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pantarhei.elastic.frontier import to_device
from pantarhei.elastic.net import ElasticNet, elastic
from pantarhei.elastic.samplers import (
    Criterion,
    DistilledLoss,
    Drawn,
    Every,
    SampledLoss,
    Sampler,
    Uniform,
    cross_entropy,
)
from pantarhei.errors import RequestError
from pantarhei.fit import Fit, fit

LARGEST_SUM = 64
"""Summation runs every choice in every update: more choices than this are refused."""


class Sorted(NamedTuple):
    """What :func:`sorted_fit` returns: the elastic network, and how its training went."""

    net: ElasticNet
    fit: Fit


def sorted_fit(
    model: nn.Module,
    batches: Callable[[int], Any],
    loss: Criterion | SampledLoss | DistilledLoss = cross_entropy,
    *,
    steps: int,
    # the sub-networks
    example_inputs: Any = None,
    width: Any = None,
    depth: Any = None,
    heads: Any = None,
    mlp: Any = None,
    exits: Any = None,
    norm: str = "shared",
    rescale: Literal["sqrt"] | None = None,
    # which of them a draw trains
    mode: Literal["random", "sum"] = "random",
    sampler: Sampler | None = None,
    g_acc: int = 1,
    # the update, and what follows the last one
    touched: bool = True,
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    recalibrate: int = 20,
    seed: int = 0,
    **options: Any,
) -> Sorted:
    r"""Train all sub-networks of a network together.

    Works from scratch and on a pre-trained checkpoint alike; ``model`` is trained in place.

    Args:
        model: A plain module, made elastic along ``width``, ``depth``, ``heads``, ``mlp`` and
            ``exits`` as by :func:`pantarhei.elastic.elastic`; or an ElasticNet, taken as it is.
        batches: ``batches(n)`` is the batch of draw n (:class:`pantarhei.fit.Batches`, say): a
            tuple whose first element is the model's input, or a dict of the model's keywords.
        loss: ``criterion(outputs, batch)``, or a
            :class:`~pantarhei.elastic.samplers.DistilledLoss` for in-place distillation.
        steps: Number of updates.
        example_inputs: What the model is traced on; the first example of ``batches(0)`` by default.
        norm: What BatchNorm does: ``"shared"`` statistics, measured anew for what is evaluated, or
            ``"switchable"`` ones, for small grids.
        rescale: ``"sqrt"`` multiplies weights that see k of n inputs by sqrt(n / k), as DyLoRA does
            with ranks; SortedNet does not.
        mode: ``"random"``: one sub-network a draw, uniform over the grid; ``"sum"``: all of a small
            grid on the same batch, :math:`\frac{1}{|B|} \sum_{b \in B} L_b`.
        sampler: Any other sampler (:mod:`pantarhei.elastic.samplers`) in place of the mode's.
        g_acc: Draws averaged into one update, each of its own sub-network on its own batch:
            :math:`g = \frac{1}{g_{acc}} \sum_i \nabla L_{b_i}`.
        touched: Leave alone what the sub-networks of an update did not use: :func:`touched_only`.
        optimizer: As in :func:`pantarhei.fit.fit`; AdamW by default.
        recalibrate: After training, batches from which the full network's BatchNorm statistics are
            measured (:func:`~pantarhei.elastic.frontier.frontier` does it for the others); 0: none.
        seed: Decides the draws and all random numbers of the training.
        options: Everything else that :func:`pantarhei.fit.fit` takes (lr, schedule, checkpoint...).

    Raises:
        RequestError: Where :func:`~pantarhei.elastic.elastic` and :func:`~pantarhei.fit.fit` do,
            and for a summation over more than 64 choices.

    >>> from pantarhei.fit import Batches
    >>> x = torch.randn(64, 4)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> batches = Batches(x, (x.sum(1) > 0).long(), batch_size=16)
    >>> net, _ = sorted_fit(model, batches, width=(0.5, 1.0), g_acc=2, steps=3, quiet=True)
    >>> net(x, net.space.smallest).shape
    torch.Size([64, 2])
    """
    axes = {"width": width, "depth": depth, "heads": heads, "mlp": mlp, "exits": exits}
    if not isinstance(model, ElasticNet):
        example = first_example(batches(0)) if example_inputs is None else example_inputs
        model = elastic(model, example, norm=norm, rescale=rescale, **axes)
    elif any(axis is not None for axis in axes.values()):
        raise RequestError("The network is elastic already: leave its axes out of sorted_fit().")
    make = optimizer or torch.optim.AdamW
    result = fit(
        model,
        Drawn(batches, sampler or _sampler(model, mode, seed)),
        loss if isinstance(loss, SampledLoss | DistilledLoss) else SampledLoss(loss),
        steps=steps,
        accumulate=g_acc,
        optimizer=(lambda parameters: touched_only(make(parameters))) if touched else make,
        seed=seed,
        **options,
    )
    if recalibrate:
        device = next(model.parameters()).device
        data = (to_device(batches(n), device) for n in range(recalibrate))
        model.recalibrate(None, data, limit=recalibrate)
    return Sorted(model, result)


def first_example(batch: Any) -> Any:
    """Return the model's inputs of a batch (as :meth:`ElasticNet.recalibrate` reads them), one row.

    >>> first_example((torch.ones(8, 3), torch.zeros(8))).shape
    torch.Size([1, 3])
    """
    if isinstance(batch, dict):
        return {k: v[:1] if isinstance(v, Tensor) else v for k, v in batch.items() if k != "labels"}
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return inputs[:1]


def _sampler(net: ElasticNet, mode: str, seed: int) -> Sampler:
    if mode == "random":
        return Uniform(net.space, seed)
    if mode != "sum":
        raise RequestError(f"mode={mode!r} is unknown: use 'random' or 'sum'.")
    size = math.prod(len(values) for values in net.space.axes.values())
    if size > LARGEST_SUM:
        raise RequestError(
            f"mode='sum' would run all {size} sub-networks in every update: use mode='random', "
            "fewer values, or a sampler such as Sandwich."
        )
    return Every(net.space)


def touched_only(optimizer: Optimizer) -> Optimizer:
    """Make ``optimizer`` update only the units that were used since the last step; returns it.

    A sub-network is a set of views, so the gradient of a weight outside of it is not missing but
    exactly zero, and an ordinary step would still move that weight: momentum keeps pushing it,
    weight decay shrinks it at every step though it learns rarely, and its moments fade. Here a row
    or column of a parameter whose gradient is zero throughout is taken out of the step together
    with its optimizer state: the step is the one of an optimizer that holds the used slice alone.

    It works with every optimizer whose state has the shape of the parameter (SGD, AdamW, ...): for
    the duration of a step, parameter, gradient and state are replaced by views of the used slice.
    Finding that slice reads the gradients once more (1 to 4 ms a step for 0.9 to 1.7 million
    parameters, against 30 to 250 ms of forward and backward pass). Step counts stay those of whole
    parameters. Sharded (FSDP) parameters have no rows; do not use it on them.

    >>> weight = nn.Parameter(torch.ones(4))
    >>> optimizer = touched_only(torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5))
    >>> weight.grad = torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> optimizer.step()
    >>> weight.data
    tensor([0.8500, 0.8500, 1.0000, 1.0000])
    """
    shrunk: list[_Shrunk] = []

    def before(opt: Optimizer, args: Any, kwargs: Any) -> None:
        parameters = [p for group in opt.param_groups for p in group["params"]]
        parameters = [p for p in parameters if p.grad is not None and p.dim() > 0]
        for parameter, slices in zip(parameters, _used_slices(parameters), strict=True):
            if slices is not None:
                shrunk.append(_Shrunk(parameter, opt.state, slices))

    def after(opt: Optimizer, args: Any, kwargs: Any) -> None:
        while shrunk:
            shrunk.pop().grow(opt.state)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


Slices = tuple[slice | Tensor, ...]


def _used_slices(parameters: list[nn.Parameter]) -> list[Slices | None]:
    """Return which rows and columns of each parameter have a gradient; None where all have."""
    used: list[Tensor] = []
    for p in parameters:
        assert p.grad is not None
        nonzero = p.grad != 0
        used += [nonzero.flatten(1).any(1) if p.dim() > 1 else nonzero]
        used += [nonzero.any(0).flatten(1).any(1)] if p.dim() > 2 else []
        used += [nonzero.any(0)] if p.dim() == 2 else []
    # one transfer for all parameters: on a GPU a single synchronisation
    flat = iter(np.split(torch.cat(used).cpu().numpy(), np.cumsum([len(u) for u in used])[:-1]))
    found: list[Slices | None] = []
    for p in parameters:
        masks = [next(flat) for _ in range(min(2, p.dim()))]
        found.append(None if all(m.all() for m in masks) else _slices(masks, p.device))
    return found


def _slices(masks: list[np.ndarray], device: torch.device) -> Slices:
    """Return a range where the used units are a prefix (a view), else their positions."""
    slices: list[slice | Tensor] = []
    for mask in masks:
        count = int(mask.sum())
        prefix = bool(mask[:count].all())
        index = np.flatnonzero(mask)
        slices.append(slice(0, count) if prefix else torch.from_numpy(index).to(device))
    return tuple(slices)


@dataclass
class _Shrunk:
    """A parameter, its gradient and its optimizer state, cut to a slice for one step."""

    parameter: nn.Parameter
    state: dict[Any, Any]
    slices: Slices
    data: Tensor = field(init=False)
    grad: Tensor = field(init=False)
    whole: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        p = self.parameter
        assert p.grad is not None
        self.data, self.grad = p.data, p.grad
        p.grad = None
        p.data = self._cut(self.data)
        # an unused parameter has no gradient at all, so that the optimizer passes it by
        p.grad = self._cut(self.grad) if p.data.numel() else None
        own = self.state.get(p, {})
        for name, value in own.items():
            if isinstance(value, Tensor) and value.shape == self.data.shape:
                self.whole[name], own[name] = value, self._cut(value)

    def grow(self, state: dict[Any, Any]) -> None:
        """Put everything back, with what the step changed."""
        p, small = self.parameter, self.parameter.data
        self._put(self.data, small)
        own = state.get(p, {})
        for name, value in own.items():
            if isinstance(value, Tensor) and value.dim() and value.shape == small.shape:
                whole = self.whole.get(name)
                own[name] = torch.zeros_like(self.data) if whole is None else whole
                self._put(own[name], value)
        p.grad = None
        p.data, p.grad = self.data, self.grad

    def _cut(self, tensor: Tensor) -> Tensor:
        for axis, kept in enumerate(self.slices):
            tensor = (
                tensor.narrow(axis, 0, kept.stop)
                if isinstance(kept, slice)
                else tensor.index_select(axis, kept)
            )
        return tensor

    def _put(self, whole: Tensor, part: Tensor) -> None:
        if part.data_ptr() == whole.data_ptr():
            return  # a view: the optimizer changed it in place
        rows, *columns = self.slices
        if columns and isinstance(rows, Tensor):
            rows = rows[:, None] if isinstance(columns[0], Tensor) else rows
        whole[(rows, *columns)] = part.to(whole.dtype)
