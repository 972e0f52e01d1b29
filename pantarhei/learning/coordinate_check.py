r"""The coordinate check: is this parametrisation right?

A network is trained for a few steps at several sizes. In a parametrisation whose learning rate
transfers, the entries of every activation, and their changes by training, are of the same order at
all sizes: slope 0 in a plot of log size against log width or depth. A positive slope means that
something blows up, a negative one of a change that a layer stops learning features, as all hidden
layers do under NTP, with slope -1/2 (Yang et al., arXiv 2203.03466, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from pantarhei._fit_loss import scalar
from pantarhei._fit_random import own_randomness
from pantarhei.errors import RequestError
from pantarhei.fit import Loss
from pantarhei.learning.lr_transfer import Size, power_law, sizes_of, start_of
from pantarhei.learning.parametrization import Kind, OptimizerName, Role

OUTPUT = "output"


@dataclass(frozen=True)
class Layer:
    r"""How the input of one layer (or the network's output) scales.

    ``initial``, ``trained`` and ``change`` are the slopes p of :math:`x \sim \mathrm{size}^p` for
    the root mean square of :math:`h_0`, :math:`h_T` and :math:`h_T - h_0`, with standard errors.
    """

    name: str
    initial: tuple[float, float]
    trained: tuple[float, float]
    change: tuple[float, float]


@dataclass(frozen=True)
class CoordCheck:
    """What :func:`coord_check` measured.

    Attributes:
        axis: ``"width"`` or ``"depth"``.
        layers: The slopes, by layer in the order of the forward pass, the output last.
        problems: One sentence for each layer that does not pass.
        rows: ``width``, ``depth``, ``seed``, ``step``, ``layer``, ``size`` and ``change``.
    """

    axis: str
    layers: tuple[Layer, ...]
    problems: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def passes(self) -> bool:
        """Whether every layer passes."""
        return not self.problems

    def layer(self, name: str) -> Layer:
        """Return the slopes of a layer."""
        return next(layer for layer in self.layers if layer.name == name)


def coord_check(
    factory: Callable[..., nn.Module],
    batches: Callable[[int], Any],
    loss: Loss,
    *,
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    lr: float,
    steps: int = 3,
    seeds: int = 5,
    kind: Kind = "mup",
    optimizer: OptimizerName = "sgd",
    roles: Mapping[str, Role] | None = None,
    branches: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    tolerance: float = 0.2,
) -> CoordCheck:
    """Measure how activations and their changes scale with width, or with depth.

    Watched are the inputs of every layer that has weights and the network's output, on the first
    batch, in evaluation mode; in networks of several depths those layers that all of them have, and
    the last block as ``blocks.-1``. Changes of the network's input are left out.

    It passes when no slope of an activation or a change is above ``tolerance`` and no slope of a
    change is below minus it. (The output itself may start small: under muP it is of the order
    N^-1/2, and its initial slope is not judged from below.)

    Args:
        factory, batches, loss, kind, optimizer, roles, branches, options: As for
            :func:`pantarhei.learning.lr_transfer.lr_sweep`.
        widths, depths: Three sizes or more along one of the two.
        lr: The rate to train with: one at which the smallest network learns.
        steps: Training steps before the changes are taken.
        seeds: Initial weights to average over.
        tolerance: On slopes; the standard errors are those of a fit through few points.

    >>> from pantarhei.learning.families import Networks
    >>> generator = torch.Generator().manual_seed(0)
    >>> x, y = torch.randn(64, 5, generator=generator), torch.arange(64) % 3
    >>> def check(kind):
    ...     return coord_check(
    ...         Networks(inputs=5, outputs=3), lambda n: (x, y),
    ...         lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    ...         widths=(64, 256, 1024), lr=0.5, kind=kind)
    >>> check("mup").passes, check("sp").passes
    (True, False)
    """
    sizes = sizes_of(widths, depths)
    axis = "width" if len(widths) > 1 else "depth"
    if min(len(widths), len(depths)) > 1:
        raise RequestError("a coordinate check goes along one axis: fix the width or the depth.")
    if len(sizes) < 3:
        raise RequestError("a slope needs three sizes or more: name more widths or depths.")
    arguments = {"kind": kind, "optimizer": optimizer, "roles": roles, "branches": tuple(branches)}
    arguments["branches"] = arguments["branches"] or tuple(getattr(factory, "branches", ()))
    rows: list[dict[str, Any]] = []
    for size in sizes:
        for seed in range(seeds):
            start = start_of(factory, sizes, size, seed, None, **arguments, **(options or {}))
            found = _train(start.model, start.optimizer(lr), batches, loss, steps)
            rows += [{**asdict(size), "seed": seed, **row} for row in found]
    _align(rows, axis)
    layers = _slopes(rows, axis, sizes, steps)
    return CoordCheck(axis, layers, _problems(layers, tolerance), tuple(rows))


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Any],
    loss: Loss,
    steps: int,
) -> list[dict[str, Any]]:
    """Train some steps; return the size and the change of what was watched, after each."""
    with own_randomness(next(model.parameters()).device):
        before = _watch(model, batches(0), loss)
        rows = _compare(0, before, before)
        for step in range(steps):
            model.train()
            optimizer.zero_grad()
            scalar(loss(model, batches(step))).backward()
            optimizer.step()
            rows += _compare(step + 1, before, _watch(model, batches(0), loss))
    return rows


@torch.no_grad()
def _watch(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor]:
    """Return the inputs of all layers with weights in one evaluation, and the output."""
    seen: dict[str, Tensor] = {}
    handles = [
        # first of all hooks: before a multiplier of the input
        module.register_forward_pre_hook(_keep(seen, name), prepend=True)
        for name, module in model.named_modules()
        if name and (module._parameters or torch_parametrize.is_parametrized(module))
    ]

    def output(module: nn.Module, args: Any, result: Any) -> None:
        seen[OUTPUT] = _first(getattr(result, "logits", result)).detach().double().clone()

    handles.append(model.register_forward_hook(output))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return seen


def _keep(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        given = _first(args)
        if given is not None and given.is_floating_point():
            seen[name] = given.detach().double().clone()

    return hook


def _first(thing: Any) -> Any:
    if isinstance(thing, tuple | list):
        return next((t for t in thing if isinstance(t, Tensor)), None)
    return thing


def _compare(step: int, before: dict[str, Tensor], now: dict[str, Tensor]) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "layer": name,
            "size": float(now[name].square().mean().sqrt()),
            "change": float((now[name] - h).square().mean().sqrt()),
        }
        for name, h in before.items()
    ]


def _align(rows: list[dict[str, Any]], axis: str) -> None:
    """In lists of blocks whose length depends on the size, call the last block -1."""
    lengths: dict[str, dict[int, int]] = {}
    for row in rows:
        for lead, index in _indices(row["layer"]):
            by_size = lengths.setdefault(lead, {})
            by_size[row[axis]] = max(by_size.get(row[axis], 0), index)
    grows = {lead for lead, by_size in lengths.items() if len(set(by_size.values())) > 1}
    for row in rows:
        parts = row["layer"].split(".")
        for lead, index in _indices(row["layer"]):
            if lead in grows and index == lengths[lead][row[axis]]:
                parts[lead.count(".") + 1 if lead else 0] = "-1"
        row["layer"] = ".".join(parts)


def _indices(name: str) -> list[tuple[str, int]]:
    """Return the numbers in a name, each with what stands before it."""
    parts = name.split(".")
    return [(".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdigit()]


def _slopes(
    rows: list[dict[str, Any]], axis: str, sizes: Sequence[Size], steps: int
) -> tuple[Layer, ...]:
    values = [getattr(size, axis) for size in sizes]
    named: dict[str, set[int]] = {}
    for row in rows:
        named.setdefault(row["layer"], set()).add(row[axis])
    found = []
    for name in (name for name, where in named.items() if where == set(values)):

        def slope(step: int, key: str, name: str = name) -> tuple[float, float]:
            means = []
            for value in values:
                seen = [
                    r[key] for r in rows if (r[axis], r["layer"], r["step"]) == (value, name, step)
                ]
                means.append(sum(seen) / len(seen))
            return power_law(values, means)[1:]

        change = slope(steps, "change")
        if not math.isnan(change[0]):  # the network's own input does not change
            found.append(Layer(name, slope(0, "size"), slope(steps, "size"), change))
    return tuple(found)


def _problems(layers: Sequence[Layer], tolerance: float) -> tuple[str, ...]:
    problems = []
    for layer in layers:
        what = "the output" if layer.name == OUTPUT else f"the input of '{layer.name}'"
        for (slope, _), when in (
            (layer.initial, "at the start"),
            (layer.trained, "after training"),
        ):
            if slope > tolerance:
                problems.append(f"{what} grows as size^{slope:.2f} {when}.")
        if layer.change[0] > tolerance:
            problems.append(f"the change of {what} grows as size^{layer.change[0]:.2f}.")
        if layer.change[0] < -tolerance:
            problems.append(
                f"the change of {what} vanishes as size^{layer.change[0]:.2f}: no feature learning."
            )
    return tuple(problems)
