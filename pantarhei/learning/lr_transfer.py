r"""Learning-rate transfer: tune a small model, train a large one at the same rate.

Under muP and Depth-muP the best rate hardly depends on width and depth, because the sharpness
:math:`\lambda_{max}(\gamma^2 H)`, which limits the rate, follows the same curve over training at
all sizes (arXiv 2402.17457). :func:`lr_sweep` measures where the best rate lies, :class:`Transfer`
says whether it moves, and :func:`consistency` whether a curve (sharpness, loss) depends on size.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from pantarhei._stacked import UNSTACKABLE
from pantarhei.devices import chosen_device
from pantarhei.errors import RequestError
from pantarhei.files import read_json, write_json
from pantarhei.fit import Loss
from pantarhei.learning._together import Outcome, Plan, train_alone, train_together
from pantarhei.learning.parametrization import Kind, OptimizerName, Parametrized, Role, parametrize
from pantarhei.progress import progress

Array = NDArray[np.float64]


@dataclass(frozen=True, order=True)
class Size:
    """A width and a depth; None where the factory is not asked for it.

    >>> str(Size(64, None)), str(Size(64, 8))
    ('width 64', 'width 64, depth 8')
    """

    width: int | None
    depth: int | None

    def __str__(self) -> str:
        parts = (("width", self.width), ("depth", self.depth))
        return ", ".join(f"{name} {value}" for name, value in parts if value is not None)

    def arguments(self) -> dict[str, int]:
        """Return what the factory is called with."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one size.

    ``index`` is its place in the grid and ``lr`` its value; both None where every rate diverged.
    ``vertex`` is the base-2 logarithm of the rate where the parabola through the lowest point and
    its two neighbours (loss against log rate) is lowest, the grid's own rate where a neighbour is
    missing. ``at_edge`` tells that the lowest point is the grid's first or last: the optimum may
    lie beyond.
    """

    size: Size
    index: int | None
    lr: float | None
    loss: float
    vertex: float
    at_edge: bool


@dataclass(frozen=True)
class Transfer:
    """Whether the rate of the smallest size serves the others.

    Attributes:
        verdict: ``"transfers"``, ``"does not transfer"`` or ``"cannot tell"``.
        reason: The verdict in a sentence.
        optima: Of every size.
        shift: Base-2 logarithm of each size's best rate over the smallest size's.
        regret: What the smallest size's best rate costs each size, relative to its own best loss;
            infinite where it diverges.
        exponent: p of the power law rate ~ size^p through the vertices, and its standard error.
    """

    verdict: Literal["transfers", "does not transfer", "cannot tell"]
    reason: str
    optima: tuple[Optimum, ...]
    shift: tuple[float, ...]
    regret: tuple[float, ...]
    exponent: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; what is not finite becomes null."""
        return _plain(asdict(self))


@dataclass
class Sweep:
    """What :func:`lr_sweep` measured: a row per size, rate and seed.

    A row has ``width``, ``depth``, ``lr``, ``seed``, ``loss`` (None: diverged), ``steps`` and the
    ``curve`` of the training loss.
    """

    sizes: tuple[Size, ...]
    grid: tuple[float, ...]
    seeds: int
    settings: Mapping[str, Any]
    rows: list[dict[str, Any]]

    def losses(self) -> Array:
        """Return the final losses (sizes, rates, seeds); NaN is a training that diverged."""
        found = np.full((len(self.sizes), len(self.grid), self.seeds), np.nan)
        for row in self.rows:
            size = self.sizes.index(Size(row["width"], row["depth"]))
            loss = math.nan if row["loss"] is None else row["loss"]
            found[size, self.grid.index(row["lr"]), row["seed"]] = loss
        return found

    def table(self) -> Array:
        """Return the mean over seeds (sizes, rates); NaN where any seed diverged."""
        return self.losses().mean(2)

    def optima(self) -> tuple[Optimum, ...]:
        """Return the best rate of every size."""
        rows = zip(self.sizes, self.table(), strict=True)
        return tuple(best_rate(size, self.grid, losses) for size, losses in rows)

    def regret(self, index: int | None) -> tuple[float, ...]:
        """Return what the rate at ``index`` of the grid costs each size, relative to its best."""
        table = self.table()
        best = [_lowest(row) for row in table]
        if index is None:
            return (math.inf,) * len(table)
        costs = [row[index] / low - 1 for row, low in zip(table, best, strict=True)]
        return tuple(math.inf if math.isnan(cost) else float(cost) for cost in costs)

    def transfer(self, steps: float = 1.0, regret: float = 0.03) -> Transfer:
        """Judge by a largest shift (in factors of two) and a largest regret, both at every size.

        >>> Sweep((Size(8, None), Size(16, None)), (0.5, 1.0, 2.0), 1, {}, [
        ...     {"width": n, "depth": None, "lr": lr, "seed": 0, "loss": loss}
        ...     for n in (8, 16) for lr, loss in ((0.5, 0.3), (1.0, 0.2), (2.0, None))
        ... ]).transfer().verdict
        'transfers'
        """
        optima = self.optima()
        shift = tuple(_octaves(o.lr, optima[0].lr) for o in optima)
        costs = self.regret(optima[0].index)
        verdict, reason = _judge(optima, shift, costs, steps, regret)
        return Transfer(verdict, reason, optima, shift, costs, self._exponent(optima))

    def _exponent(self, optima: Sequence[Optimum]) -> tuple[float, float]:
        axis = "width" if len({size.width for size in self.sizes}) > 1 else "depth"
        found = [(getattr(o.size, axis), o.vertex) for o in optima if o.lr is not None]
        if len(found) < 2:
            return math.nan, math.nan
        sizes, vertices = zip(*found, strict=True)
        return power_law(np.array(sizes, float), 2.0 ** np.array(vertices))[1:]

    def to_json(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {
            "sizes": [asdict(size) for size in self.sizes],
            "grid": list(self.grid),
            "seeds": self.seeds,
            "settings": dict(self.settings),
            "rows": self.rows,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Sweep:
        """Rebuild a sweep from its JSON."""
        try:
            sizes = tuple(Size(**size) for size in found["sizes"])
            return cls(
                sizes, tuple(found["grid"]), found["seeds"], found["settings"], found["rows"]
            )
        except (KeyError, TypeError) as error:
            raise RequestError(f"this is not a sweep of learning rates ({error!r}).") from error


def lr_sweep(
    factory: Callable[..., nn.Module],
    batches: Callable[[int], Any],
    loss: Loss,
    *,
    widths: Sequence[int] = (),
    depths: Sequence[int] = (),
    grid: Sequence[float],
    steps: int,
    # the parametrisation
    kind: Kind = "mup",
    optimizer: OptimizerName = "sgd",
    roles: Mapping[str, Role] | None = None,
    branches: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    control: Callable[[Parametrized], Parametrized] | None = None,
    # the training
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    evaluate: Sequence[Any] = (),
    limit: float = 10.0,
    seeds: int = 3,
    seed: int = 0,
    precision: Literal["32", "bf16"] = "32",
    device: str | torch.device = "cpu",
    # how it runs
    together: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    label: str = "sweep",
) -> Sweep:
    r"""Train a model at every size, learning rate and seed, and return the final losses.

    A seed decides the initial weights; the batches are the same for all. The base of the
    parametrisation is the smallest size, where every kind is the model as it was written, unless
    ``roles`` are given (see :func:`parametrize`). Trainings that diverge end early and are missing
    in the result, never a large loss: the loss is not finite, rises to ``limit`` times the first
    one, or ends more than 5 % above it.

    Args:
        factory: Called with ``width=`` and ``depth=``, whichever are swept; returns a fresh model.
            Its attributes ``branches`` (and nothing else) are used where the argument is not given.
        batches, loss: As for :func:`pantarhei.fit.fit`; the batches as a function of the step.
        widths, depths: The sizes; both: every pair.
        grid: Learning rates :math:`\eta_0`, ascending; usually powers of two.
        steps: Updates per training.
        kind, optimizer, roles, branches: As for :func:`parametrize`.
        options: Further arguments of :func:`parametrize` (``init``, ``gain``, ...).
        control: Changes the parametrised model: ``random_features``, or ``lazy`` with a scale.
        weight_decay, momentum, betas: Of the optimizer.
        evaluate: Batches of which the mean loss at the end is taken; none: the mean training loss
            of the last tenth of the steps.
        limit: A loss of so many times the first one has diverged.
        seeds, seed: Number of initial weights, and the first of their seeds.
        precision: ``"bf16"`` runs the loss under bfloat16 autocast.
        together: All rates and seeds of a size in one vectorised training; ``False``: one by one,
            through ``fit``. ``None``: together where the model can run under ``torch.func.vmap``.
        checkpoint: JSON file that is written after every size, and continued from.
        quiet: Show no progress.
        label: Name for the progress display.

    Raises:
        RequestError: For a grid, sizes or settings that make no sense, a factory that does not take
            the sizes, and a checkpoint of other settings.

    >>> from pantarhei.learning.families import Networks
    >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
    >>> sweep = lr_sweep(
    ...     Networks(inputs=5, outputs=3), lambda n: (x, y),
    ...     lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
    ...     widths=(8, 16), depths=(1,), grid=(0.1, 1.0), steps=5, seeds=2, quiet=True)
    >>> sweep.losses().shape
    (2, 2, 2)
    """
    sizes = sizes_of(widths, depths)
    grid = _checked_grid(grid)
    for name, count in (("steps", steps), ("seeds", seeds)):
        if count < 1:
            raise RequestError(f"{name}={count}: choose a whole number of at least 1.")
    branches = tuple(branches or getattr(factory, "branches", ()))
    plan = Plan(
        batches, loss, steps, tuple(evaluate), limit, weight_decay, momentum, betas, precision,
        chosen_device(device), seed,
    )  # fmt: skip
    settings = {
        "steps": steps, "kind": kind, "optimizer": optimizer, "roles": dict(roles or {}) or None,
        "branches": list(branches), "options": {k: str(v) for k, v in (options or {}).items()},
        "weight_decay": weight_decay, "momentum": momentum, "betas": list(betas),
        "evaluated": len(evaluate), "limit": limit, "seed": seed, "precision": precision,
    }  # fmt: skip
    how = {"kind": kind, "optimizer": optimizer, "roles": roles, "branches": branches}
    how |= dict(options or {})
    sweep = _continued(Sweep(sizes, grid, seeds, settings, []), checkpoint)
    done = {Size(row["width"], row["depth"]) for row in sweep.rows}
    total = len(grid) * seeds
    with progress(len(sizes) * total, label, quiet, start=len(done) * total) as bar:
        for size in sizes:
            if size in done:
                continue
            starts = [
                start_of(factory, sizes, size, seed + s, control, **how) for s in range(seeds)
            ]
            outcomes = _train(starts, grid, plan, together)
            sweep.rows += _rows(size, grid, outcomes)
            if checkpoint:
                write_json(checkpoint, sweep.to_json())
            bar.advance(total, note=str(size))
    return sweep


def best_rate(size: Size, grid: Sequence[float], losses: ArrayLike) -> Optimum:
    """Find the lowest of the losses over a grid; NaN ones have diverged and are passed over.

    >>> best = best_rate(Size(8, None), (0.5, 1.0, 2.0, 4.0), [0.3, 0.1, 0.2, math.nan])
    >>> best.lr, round(best.vertex, 3), best.at_edge
    (1.0, 0.167, False)
    """
    losses = np.asarray(losses, float)
    if np.isnan(losses).all():
        return Optimum(size, None, None, math.nan, math.nan, False)
    index = int(np.nanargmin(losses))
    logs = np.log2(np.asarray(grid, float))
    vertex, around = float(logs[index]), losses[max(0, index - 1) : index + 2]
    inside = 0 < index < len(grid) - 1
    if inside and np.isfinite(around).all():
        # Newton's divided differences of the parabola through three points.
        x, y = logs[index - 1 : index + 2], around
        slope = (y[1] - y[0]) / (x[1] - x[0])
        bend = ((y[2] - y[1]) / (x[2] - x[1]) - slope) / (x[2] - x[0])
        vertex = float((x[0] + x[1]) / 2 - slope / (2 * bend)) if bend > 0 else vertex
    return Optimum(size, index, float(grid[index]), float(losses[index]), vertex, not inside)


def power_law(x: ArrayLike, y: ArrayLike) -> tuple[float, float, float]:
    r"""Fit :math:`y = a x^p` by least squares in logarithms; return a, p and p's standard error.

    Pairs that are not positive and finite are left out; without two different x all is NaN, and the
    error is NaN with two points.

    >>> a, p, error = power_law([1, 2, 4, 8], [3, 6, 12, 24])
    >>> round(a, 6), round(p, 6), round(error, 6)
    (3.0, 1.0, 0.0)
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = (x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)
    u, v = np.log(x[good]), np.log(y[good])
    if len(set(u)) < 2:
        return math.nan, math.nan, math.nan
    spread = ((u - u.mean()) ** 2).sum()
    p = float(((u - u.mean()) * v).sum() / spread)
    left = v - v.mean() - p * (u - u.mean())
    error = math.sqrt((left**2).sum() / (len(u) - 2) / spread) if len(u) > 2 else math.nan
    return float(np.exp(v.mean() - p * u.mean())), p, error


@dataclass(frozen=True)
class Consistency:
    r"""How much a curve depends on the size, over training.

    Attributes:
        sizes, times: Of the curves.
        cv: Standard deviation over sizes divided by the mean, at each time.
        spread: Largest value over smallest, at each time.
        error: :math:`|S_N(t) - S_{N_{max}}(t)| / |S_{N_{max}}(t)|` (sizes - 1, times).
        in_size: a, p, error of p in :math:`\bar e_N \sim a N^p`, the error's mean over time.
        in_time: a, p, error of p in :math:`\bar e(t) \sim a t^p`, the error's mean over sizes.
        super_consistent: Whether the error does not grow with training time: p in time is not
            above zero by more than two of its standard errors.
    """

    sizes: Array
    times: Array
    cv: Array
    spread: Array
    error: Array
    in_size: tuple[float, float, float]
    in_time: tuple[float, float, float]
    super_consistent: bool

    def to_json(self) -> dict[str, Any]:
        """Return it for JSON; what is not finite becomes null."""
        return _plain(asdict(self))


def consistency(sizes: ArrayLike, times: ArrayLike, curves: ArrayLike) -> Consistency:
    """Compare the curves of several sizes, (sizes, times) or (sizes, seeds, times).

    Curves of several seeds are averaged first. The largest size is the reference.

    Raises :class:`RequestError` for shapes that disagree, and for values that are not finite (a
    training that diverged has no curve: leave its size out).

    >>> curves = [[1.1, 2.2, 4.4], [1.05, 2.1, 4.2], [1, 2, 4]]
    >>> found = consistency([64, 128, 256], [1, 2, 4], curves)
    >>> found.error.round(3).tolist(), found.super_consistent, round(found.in_size[1], 3)
    ([[0.1, 0.1, 0.1], [0.05, 0.05, 0.05]], True, -1.0)
    """
    n, t, s = (np.asarray(v, float) for v in (sizes, times, curves))
    s = s.mean(1) if s.ndim == 3 else s
    if s.shape != (len(n), len(t)) or len(n) < 2:
        raise RequestError(
            f"curves of shape {s.shape} do not fit {len(n)} sizes and {len(t)} times: give "
            "(sizes, times) or (sizes, seeds, times), of two sizes or more."
        )
    if not np.isfinite(s).all():
        raise RequestError("a curve holds values that are not finite: leave that size out.")
    order = np.argsort(n)
    n, s = n[order], s[order]
    error = np.abs(s[:-1] - s[-1]) / np.abs(s[-1])
    in_time = power_law(t, error.mean(0))
    return Consistency(
        n,
        t,
        s.std(0) / np.abs(s.mean(0)),
        s.max(0) / s.min(0),
        error,
        power_law(n[:-1], error.mean(1)),
        in_time,
        not in_time[1] > 2 * (in_time[2] if math.isfinite(in_time[2]) else 0.0),
    )


def start_of(
    factory: Callable[..., nn.Module],
    sizes: Sequence[Size],
    size: Size,
    seed: int,
    control: Callable[[Parametrized], Parametrized] | None,
    **arguments: Any,
) -> Parametrized:
    """Return a fresh model of a size, parametrised against the smallest one."""
    model = build(factory, size, seed)
    if arguments["roles"] is None:
        # Only Depth-muP compares depths; elsewhere the base is as deep as the model.
        least = min(sizes)
        deep = arguments["kind"] == "depth-mup"
        depth = min((s.depth for s in sizes if s.depth is not None), default=None)
        base = Size(least.width, depth if deep else size.depth)
        arguments["base"] = build(factory, base, seed)
        others = [s.width for s in sizes if s.width not in (None, base.width)]
        if others and size.width == base.width:
            arguments["delta"] = build(factory, Size(others[0], base.depth), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = parametrize(model, **arguments)
    return control(found) if control else found


def build(factory: Callable[..., nn.Module], size: Size, seed: int) -> nn.Module:
    """Call the factory for a size with the seed set, the global generators left as they were."""
    asked = ", ".join(f"{name}={value}" for name, value in size.arguments().items())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = factory(**size.arguments())
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise RequestError(f"the factory cannot be called with {asked}: {error}.") from error
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"the factory returned {type(model).__name__} for {asked}: return an nn.Module."
        )
    return model


def _train(
    starts: Sequence[Parametrized], grid: Sequence[float], plan: Plan, together: bool | None
) -> list[list[Outcome]]:
    """Train together, or one by one where that is asked for or the model asks for it."""
    pairs = [(start, lr) for start in starts for lr in grid]
    flat: list[Outcome] = []
    if together is not False:
        try:
            return train_together(starts, grid, plan)
        except RequestError:
            raise
        except UNSTACKABLE as error:
            if together:
                raise RequestError(
                    f"the model cannot train under torch.func.vmap ({error}): leave together out."
                ) from error
            flat.append(train_alone(*pairs[0], plan))  # a model that fails here too says why
            first = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"trainings run one by one, not together: {first}", stacklevel=3)
    flat += [train_alone(start, lr, plan) for start, lr in pairs[len(flat) :]]
    return [flat[i : i + len(grid)] for i in range(0, len(flat), len(grid))]


def _rows(
    size: Size, grid: Sequence[float], outcomes: Sequence[Sequence[Outcome]]
) -> list[dict[str, Any]]:
    return [
        {**asdict(size), "lr": lr, "seed": seed, **asdict(outcome)}
        for seed, found in enumerate(outcomes)
        for lr, outcome in zip(grid, found, strict=True)
    ]


def _continued(sweep: Sweep, checkpoint: str | os.PathLike[str] | None) -> Sweep:
    """Return the sweep in the checkpoint where it is this one; refuse another one."""
    if checkpoint is None or not Path(checkpoint).exists():
        return sweep
    found = Sweep.from_json(read_json(checkpoint))
    wanted = {k: v for k, v in sweep.to_json().items() if k != "rows"}
    there = {k: v for k, v in found.to_json().items() if k != "rows"}
    different = [k for k in wanted if json.dumps(wanted[k]) != json.dumps(there[k])]
    if different:
        raise RequestError(
            f"'{checkpoint}' holds a sweep with another {' and '.join(different)}: name another "
            "file, or remove it."
        )
    return found


def sizes_of(widths: Sequence[int], depths: Sequence[int]) -> tuple[Size, ...]:
    """Return every pair of a width and a depth, ascending."""
    if not widths and not depths:
        raise RequestError("no size is named: give widths= or depths=, ascending.")
    for name, values in (("widths", widths), ("depths", depths)):
        if list(values) != sorted(set(values)) or any(v < 1 for v in values):
            raise RequestError(f"{name}={list(values)}: name ascending positive whole numbers.")
    return tuple(Size(w, d) for w in (widths or (None,)) for d in (depths or (None,)))


def _checked_grid(grid: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(lr) for lr in grid)
    if len(values) < 2 or list(values) != sorted(set(values)) or not values[0] > 0:
        raise RequestError(f"grid={list(values)}: give two or more ascending positive rates.")
    return values


def _octaves(lr: float | None, first: float | None) -> float:
    return math.nan if lr is None or first is None else math.log2(lr / first)


def _lowest(losses: Array) -> float:
    return float(np.nanmin(losses)) if np.isfinite(losses).any() else math.nan


def _judge(
    optima: Sequence[Optimum],
    shift: Sequence[float],
    costs: Sequence[float],
    steps: float,
    regret: float,
) -> tuple[Literal["transfers", "does not transfer", "cannot tell"], str]:
    """Say whether the first size's rate serves the others, and why."""
    proxy = optima[0]
    if proxy.lr is None:
        return "cannot tell", f"every rate diverged at {proxy.size}: extend the grid downwards."
    if proxy.at_edge:
        return "cannot tell", f"the best rate of {proxy.size} is the grid's last: extend it there."
    for optimum, moved, cost in zip(optima, shift, costs, strict=True):
        if optimum.lr is None:
            return "does not transfer", f"every rate of the grid diverged at {optimum.size}."
        if math.isinf(cost):
            return "does not transfer", f"the rate {proxy.lr:g} diverged at {optimum.size}."
        if abs(moved) > steps:
            reason = f"the best rate moved by a factor of 2^{moved:g} at {optimum.size}."
            return "does not transfer", reason
        if cost > regret:
            reason = (
                f"the rate {proxy.lr:g} costs {100 * cost:.1f} % at {optimum.size}, whose best "
                f"rate is {optimum.lr:g}."
            )
            return "does not transfer", reason
    for optimum in optima:
        if optimum.at_edge:
            return "cannot tell", f"the best rate at {optimum.size} is the grid's last: extend it."
    if len(optima) == 1:
        return "cannot tell", "one size says nothing about others: name a larger one as well."
    largest = max(costs)
    return "transfers", f"the rate {proxy.lr:g} costs at most {100 * largest:.1f} % at any size."


def _plain(value: Any) -> Any:
    """Turn arrays into lists and numbers that are not finite into None."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
