"""What each sub-network is worth and what it costs, measured: search-free selection."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pantarhei import files
from pantarhei.cost import Cost
from pantarhei.elastic import samplers
from pantarhei.elastic.space import Choice, Space
from pantarhei.errors import RequestError
from pantarhei.progress import progress as show_progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pantarhei.elastic.net import ElasticNet

Metric = Callable[[Any, Any], "tuple[float | torch.Tensor, int]"]
FORMAT = 1
LARGE = 10_000
"""A space with more choices than this is never measured whole without being asked to."""


@dataclass(frozen=True)
class Point:
    """One measured sub-network: its quality (NaN where that was not finite) and its cost."""

    choice: Choice
    quality: float
    cost: Cost


@dataclass(frozen=True)
class Sorting:
    """How well the sub-networks are sorted: see :meth:`Frontier.inversions`.

    ``pairs``: (smaller, larger, loss) for each nested pair whose smaller network is better, worst
    first; ``compared``: nested pairs looked at; ``spearman``: rank correlation of quality and MACs.
    """

    pairs: tuple[tuple[Choice, Choice, float], ...]
    compared: int
    spearman: float

    @property
    def share(self) -> float:
        """The share of the nested pairs that are inverted."""
        return len(self.pairs) / self.compared if self.compared else 0.0

    def __str__(self) -> str:
        worst = ""
        if self.pairs:
            small, large, loss = self.pairs[0]
            worst = f"; worst: [{small}] beats [{large}] by {loss:.4g}"
        return (
            f"{len(self.pairs)} of {self.compared} nested pairs inverted ({self.share:.1%}), "
            f"Spearman of quality and MACs {self.spearman:.3f}{worst}"
        )


@dataclass
class Frontier:
    """Measured sub-networks, and the selection among them.

    >>> cheap = Point(Choice(width=0.5), 0.90, Cost(macs=25, params=5, bytes=20))
    >>> poor = Point(Choice(width=0.75), 0.85, Cost(macs=60, params=8, bytes=32))
    >>> full = Point(Choice(width=1.0), 0.95, Cost(macs=100, params=10, bytes=40))
    >>> front = Frontier((cheap, poor, full))
    >>> [str(p.choice) for p in front.pareto]
    ['width=0.5', 'width=1']
    >>> str(front.under(macs=80)), str(front.under(metric_at_least=0.92))
    ('width=0.5', 'width=1')
    """

    points: tuple[Point, ...]
    higher_is_better: bool = True
    metric: str = "quality"
    latencies: dict[str, float] = field(default_factory=dict)
    """Measured milliseconds by ``"device | choice"``."""
    measure: Callable[[Choice], float] | None = field(default=None, repr=False, compare=False)
    """How to measure the latency of a choice on this device; ``net.latency`` when made by
    :func:`frontier`."""
    device: str = field(default_factory=lambda: machine())

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, choice: Choice) -> Point:
        for point in self.points:
            if point.choice == choice:
                return point
        raise RequestError(f"The choice '{choice}' was not measured: pass it in `choices`.")

    def _worth(self, point: Point) -> float:
        """Quality with larger always better, NaN worst."""
        if math.isnan(point.quality):
            return -math.inf
        return point.quality if self.higher_is_better else -point.quality

    @property
    def full(self) -> Point:
        """The measured point with the most MACs."""
        return max(self.points, key=lambda p: (p.cost.macs, p.cost.params))

    @property
    def pareto(self) -> tuple[Point, ...]:
        """The points that no other beats in both quality and MACs, from cheap to expensive."""
        kept: list[Point] = []
        for point in sorted(self.points, key=lambda p: (p.cost.macs, -self._worth(p))):
            if self._worth(point) > (self._worth(kept[-1]) if kept else -math.inf):
                kept.append(point)
        return tuple(kept)

    def latency(self, choice: Choice) -> float:
        """Return the milliseconds of one call on this device, measured once and kept."""
        key = f"{self.device} | {choice}"
        if key not in self.latencies:
            if self.measure is None:
                raise RequestError(
                    f"The latency of '{choice}' on this device ({self.device}) is not known: "
                    "set `front.measure = net.latency` so that it can be measured."
                )
            self.latencies[key] = float(self.measure(choice))
        return self.latencies[key]

    def under(
        self,
        *,
        macs: float | None = None,
        params: float | None = None,
        bytes: float | None = None,
        latency_ms: float | None = None,
        metric_at_least: float | None = None,
        pick: str = "best",
    ) -> Choice:
        """Select a sub-network for a budget; nothing is trained and nothing is searched.

        With caps alone: the best quality that fits (``pick="best"``) or the largest network that
        fits (``pick="largest"``, SortedNet's rule, which needs no quality at all). With
        ``metric_at_least``: the cheapest network of at least this quality (``<=`` when lower is
        better), within the caps. Latency is measured on this device, only for candidates, from the
        most wanted on, and kept.

        Raises :class:`RequestError` when nothing fits; the sentence says what is on offer.
        """
        if pick not in ("best", "largest"):
            raise RequestError(f"pick={pick!r} is not known: use 'best' or 'largest'.")
        fitting = self._fitting({"macs": macs, "params": params, "bytes": bytes})
        if metric_at_least is not None:
            fitting = self._reaching(metric_at_least, fitting)
            fitting.sort(key=lambda p: (p.cost.macs, -self._worth(p)))
        elif pick == "largest":
            fitting.sort(key=lambda p: (-p.cost.macs, -p.cost.params))
        else:
            fitting.sort(key=lambda p: (-self._worth(p), p.cost.macs))
        if latency_ms is None:
            return fitting[0].choice
        for point in fitting:
            if self.latency(point.choice) <= latency_ms:
                return point.choice
        fastest = min(fitting, key=lambda p: self.latency(p.choice)).choice
        raise RequestError(
            f"No sub-network within the other limits runs in {latency_ms:g} ms on this device: "
            f"the fastest takes {self.latency(fastest):.3g} ms (choice '{fastest}')."
        )

    def _fitting(self, limits: Mapping[str, float | None]) -> list[Point]:
        caps = {name: cap for name, cap in limits.items() if cap is not None}
        found = [p for p in self.points if all(getattr(p.cost, k) <= v for k, v in caps.items())]
        if not found:
            asked = ", ".join(f"{name} <= {cap:g}" for name, cap in caps.items())
            offered = ", ".join(
                f"{name} {min(getattr(p.cost, name) for p in self.points):,}" for name in caps
            )
            raise RequestError(
                f"No sub-network fits {asked}: the smallest available are {offered}."
            )
        finite = [p for p in found if not math.isnan(p.quality)]
        if not finite:
            raise RequestError(
                f"Each of the {len(found)} sub-networks within the budget has a {self.metric} that "
                "is not a number: look at the training or the metric."
            )
        return finite

    def _reaching(self, quality: float, points: Sequence[Point]) -> list[Point]:
        wanted = quality if self.higher_is_better else -quality
        good = [p for p in points if self._worth(p) >= wanted]
        if not good:
            best = max(points, key=self._worth)
            raise RequestError(
                f"No sub-network within the budget reaches {self.metric} {quality:g}: "
                f"the best is {best.quality:.4g} (choice '{best.choice}')."
            )
        return good

    def inversions(self, tolerance: float = 0.0) -> Sorting:
        """Report where the sort fails: nested pairs a < b with a better than b by ``tolerance``.

        A network whose units are sorted by importance has none beyond noise.
        """
        axes = list(self.points[0].choice)
        values = np.array([[p.choice[axis] for axis in axes] for p in self.points], dtype=float)
        worth = np.array([self._worth(p) for p in self.points])
        finite = np.isfinite(worth)
        nested = (values[:, None] <= values[None]).all(-1) & finite[:, None] & finite[None]
        np.fill_diagonal(nested, False)
        with np.errstate(invalid="ignore"):
            loss = np.where(nested, worth[:, None] - worth[None], -np.inf)
        found = [
            (self.points[i].choice, self.points[j].choice, float(loss[i, j]))
            for i, j in zip(*np.nonzero(loss > tolerance), strict=True)
        ]
        return Sorting(
            tuple(sorted(found, key=lambda pair: -pair[2])), int(nested.sum()), self.spearman()
        )

    def spearman(self) -> float:
        """Return the rank correlation of quality and MACs over the finite points (NaN under 3)."""
        from scipy.stats import spearmanr

        finite = [(p.cost.macs, self._worth(p)) for p in self.points]
        finite = [pair for pair in finite if math.isfinite(pair[1])]
        if len(finite) < 3 or any(len(set(side)) < 2 for side in zip(*finite, strict=True)):
            return math.nan
        return float(spearmanr(*zip(*finite, strict=True)).statistic)

    def plot(
        self,
        path: str | Path | None = None,
        *,
        named: Mapping[str, Choice] | None = None,
        against: Mapping[str, Frontier] | None = None,
        label: str = "Pareto set",
    ) -> Figure:
        """Draw quality against MACs with the Pareto set; write PNG and SVG when ``path`` is given.

        ``named`` marks choices; ``against`` draws the Pareto sets of other frontiers beside this
        one, which is called ``label``.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        shown = [p for p in self.points if not math.isnan(p.quality)]
        axes.scatter(
            [p.cost.macs for p in shown], [p.quality for p in shown], s=14, alpha=0.5, label="all"
        )
        for name, front in {label: self, **(against or {})}.items():
            best = front.pareto
            axes.plot([p.cost.macs for p in best], [p.quality for p in best], ".-", label=name)
        for name, choice in (named or {}).items():
            point = self[choice]
            axes.annotate(
                name,
                (point.cost.macs, point.quality),
                xytext=(12, -18),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-"},
            )
        axes.set(xlabel="MACs per example", ylabel=self.metric, xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        if path is not None:
            files.write_figure(path, figure)
        return figure

    def heatmap(
        self,
        axis1: str,
        axis2: str,
        path: str | Path | None = None,
        *,
        relative: bool = False,
        fixed: Choice | None = None,
    ) -> Figure:
        """Draw quality over two axes (rows ``axis1``, columns ``axis2``).

        Other axes are held at ``fixed`` (default: their largest measured value); ``relative``
        divides by the quality of the largest network. A hole is a choice that was not measured.
        """
        from matplotlib.figure import Figure

        rows, columns, table = self.table(axis1, axis2, fixed=fixed)
        if relative:
            table = table / self.full.quality
        figure = Figure(
            figsize=(2.2 + 0.45 * len(columns), 1.8 + 0.35 * len(rows)), layout="constrained"
        )
        axes = figure.subplots()
        image = axes.imshow(table, aspect="auto", origin="lower", cmap="viridis")
        axes.set_xticks(range(len(columns)), [f"{v:g}" for v in columns], rotation=60)
        axes.set_yticks(range(len(rows)), [f"{v:g}" for v in rows])
        axes.set(xlabel=axis2, ylabel=axis1)
        figure.colorbar(image, label=f"relative {self.metric}" if relative else self.metric)
        if path is not None:
            files.write_figure(path, figure)
        return figure

    def table(
        self, axis1: str, axis2: str, *, fixed: Choice | None = None
    ) -> tuple[list[float], list[float], np.ndarray]:
        """Return the values of two axes and the quality over them (NaN where not measured)."""
        known = set(self.points[0].choice)
        for axis in (axis1, axis2):
            if axis not in known:
                raise RequestError(
                    f"The axis '{axis}' was not measured (measured: {', '.join(sorted(known))})."
                )
        held = dict(fixed or {})
        for axis in known - {axis1, axis2}:
            held.setdefault(axis, max(p.choice[axis] for p in self.points))
        held = {axis: value for axis, value in held.items() if axis not in (axis1, axis2)}
        shown = [p for p in self.points if all(p.choice[a] == v for a, v in held.items())]
        rows = sorted({p.choice[axis1] for p in shown})
        columns = sorted({p.choice[axis2] for p in shown})
        table = np.full((len(rows), len(columns)), math.nan)
        for p in shown:
            table[rows.index(p.choice[axis1]), columns.index(p.choice[axis2])] = p.quality
        return rows, columns, table

    def rows(self) -> list[dict[str, float | int | None]]:
        """Return one flat mapping a point: its axes, quality, MACs, parameters, bytes, latency."""
        return [
            {
                **p.choice,
                self.metric: p.quality,
                "macs": p.cost.macs,
                "params": p.cost.params,
                "bytes": p.cost.bytes,
                "latency_ms": self.latencies.get(f"{self.device} | {p.choice}"),
            }
            for p in self.points
        ]

    def to_csv(self, path: str | Path) -> None:
        """Write :meth:`rows` as CSV, atomically."""
        files.write_csv(path, self.rows())

    def to_json(self, path: str | Path) -> None:
        """Write everything measured (not the network) as JSON, atomically."""
        files.write_json(
            path,
            {
                "format": FORMAT,
                "metric": self.metric,
                "higher_is_better": self.higher_is_better,
                "points": [_encode(p) for p in self.points],
                "latencies": self.latencies,
            },
        )

    @classmethod
    def from_json(
        cls, path: str | Path, measure: Callable[[Choice], float] | None = None
    ) -> Frontier:
        """Read what :meth:`to_json` wrote; ``measure`` (say ``net.latency``) allows latencies."""
        content = files.read_json(path)
        try:
            return cls(
                tuple(_decode(entry) for entry in content["points"]),
                bool(content["higher_is_better"]),
                str(content["metric"]),
                {str(k): float(v) for k, v in content["latencies"].items()},
                measure,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"'{path}' does not hold a frontier ({type(error).__name__}: {error}): "
                "measure it again."
            ) from error


def accuracy(outputs: Any, batch: Any) -> tuple[torch.Tensor, int]:
    """Count the correct arg-max predictions: the default metric.

    Batches are ``(inputs, labels)`` or a mapping with ``labels``; scores have classes last. Scores
    that are not finite are not a prediction and make the whole quality NaN.
    """
    scores, target = samplers.logits(outputs), samplers.labels(batch)
    right = (scores.argmax(-1) == target).float()
    broken = ~torch.isfinite(scores).all(-1)
    return right.masked_fill(broken, math.nan).sum(), target.numel()


def frontier(
    net: ElasticNet,
    data: Iterable[Any],
    metric: Metric = accuracy,
    choices: int | Iterable[Choice] | None = None,
    *,
    recalibrate: Iterable[Any] | None = None,
    batches: int | None = None,
    group: int = 16,
    higher_is_better: bool = True,
    name: str | None = None,
    run: samplers.Forward = samplers.forward,
    checkpoint: str | Path | None = None,
    progress: bool | str = False,
    seed: int = 0,
) -> Frontier:
    """Measure the quality and the cost of the sub-networks of an elastic network.

    Search-free selection of SortedNet (arXiv 2309.00255): every grid point is evaluated once,
    forward only; :meth:`Frontier.under` then picks by budget.

    Parameters
    ----------
    net: an :class:`~pantarhei.elastic.ElasticNet`, or anything with ``space``, ``cost(choice)``
        and ``net(inputs, choice=choice)``.
    data: batches, iterated once for each ``group`` of choices; each batch is fetched (and moved to
        the network's device) once for all choices of a group. ``batches`` caps how many are used.
    metric: ``metric(outputs, batch) -> (sum, count)``; the quality is sum / count over all batches.
    choices: the choices to measure, or how many to draw (seeded, without repetition, the smallest
        and the largest included); ``None`` measures the whole space.
    recalibrate: batches for ``net.recalibrate(choice, batches)`` before a choice is evaluated
        (BatchNorm statistics collected under mixed widths belong to no sub-network).
    run: ``run(net, batch, choice) -> outputs``, for instance under autocast.
    checkpoint: a JSON file written atomically after every group; a later call with the same
        metric name goes on from it (what was measured before is not recalibrated again).
    progress: show a bar on a terminal, plain lines elsewhere; a text is its label.

    Raises :class:`RequestError` for empty data, an empty or very large space, choices outside the
    space, a metric that counts nothing, or a checkpoint of another measurement.
    """
    label = name or str(getattr(metric, "__name__", "quality"))
    wanted = _wanted(net.space, choices, seed)
    before = _resume(checkpoint, label)
    done = {p.choice: p for p in before.points}
    left = [choice for choice in wanted if choice not in done]
    calibration = None if recalibrate is None else list(recalibrate)
    measured = Frontier(
        (),
        higher_is_better,
        label,
        before.latencies,
        measure=getattr(net, "latency", None),
        device=machine(net),
    )
    shown = progress if isinstance(progress, str) else "sub-networks"
    began = len(wanted) - len(left)
    with (
        _evaluating(net),
        show_progress(len(wanted), shown, quiet=not progress, start=began) as bar,
    ):
        for start in range(0, len(left), group):
            part = left[start : start + group]
            if calibration is not None:
                for choice in part:
                    net.recalibrate(choice, calibration)
            for choice, quality in _evaluate(net, data, metric, part, batches, run).items():
                done[choice] = Point(choice, quality, net.cost(choice))
            measured = replace(measured, points=tuple(done[c] for c in wanted if c in done))
            if checkpoint is not None:
                # points of an earlier, wider measurement are kept in the file
                replace(measured, points=tuple(done.values())).to_json(checkpoint)
            bar.advance(len(part))
    return replace(measured, points=tuple(done[c] for c in wanted))


def _wanted(space: Space, choices: int | Iterable[Choice] | None, seed: int) -> list[Choice]:
    size = math.prod(len(values) for values in space.axes.values())
    if isinstance(choices, int):
        if choices < 1:
            raise RequestError(f"choices={choices} asks for no sub-network: ask for at least one.")
        if choices >= size:
            return list(space)
        # smallest and largest anchor every later comparison
        drawn = dict.fromkeys([space.largest, space.smallest][:choices])
        sampler = samplers.Uniform(space, seed)
        for n in range(100 * choices):
            if len(drawn) == choices:
                break
            drawn[sampler(n)] = None
        return list(drawn)
    if choices is None:
        if size > LARGE:
            raise RequestError(
                f"The space has {size:,} choices: pass choices=200 for a sample, or use "
                "pantarhei.elastic.search."
            )
        return list(space)
    listed = list(dict.fromkeys(space.complete(choice) for choice in choices))
    if not listed:
        raise RequestError("`choices` is empty: name at least one sub-network, or leave it out.")
    return listed


def _evaluate(
    net: Any,
    data: Iterable[Any],
    metric: Metric,
    choices: Sequence[Choice],
    batches: int | None,
    run: samplers.Forward,
) -> dict[Choice, float]:
    """Evaluate ``choices`` in one pass over the data."""
    totals: dict[Choice, Any] = dict.fromkeys(choices, 0.0)
    counts = dict.fromkeys(choices, 0)
    device = _device(net)
    seen = 0
    with torch.inference_mode():
        for batch in islice(iter(data), batches):
            seen += 1
            batch = to_device(batch, device)
            for choice in choices:
                total, count = metric(run(net, batch, choice), batch)
                # sums stay on the device: no synchronisation for each choice and batch
                totals[choice] = totals[choice] + total
                counts[choice] += int(count)
    if not seen:
        raise RequestError(
            "The evaluation data gave no batch: pass a list or a loader that can be iterated again."
        )
    if not all(counts.values()):
        raise RequestError("The metric counted no example: it must return (sum, count), count > 0.")
    qualities = {choice: float(totals[choice]) / counts[choice] for choice in choices}
    return {c: q if math.isfinite(q) else math.nan for c, q in qualities.items()}


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors in a batch (nested tuples, lists, mappings) to ``device``."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [to_device(value, device) for value in batch]
    return batch


def machine(net: Any = None) -> str:
    """Name the device whose latencies are comparable: processor or GPU, and threads."""
    device = _device(net) if net is not None else torch.device("cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _device(net: Any) -> torch.device:
    parameters = getattr(net, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if first is None else first.device


def _resume(checkpoint: str | Path | None, label: str) -> Frontier:
    if checkpoint is None or not Path(checkpoint).exists():
        return Frontier((), metric=label)
    before = Frontier.from_json(checkpoint)
    if before.metric != label:
        raise RequestError(
            f"'{checkpoint}' holds measurements of '{before.metric}', not of '{label}': "
            "choose another file or remove it."
        )
    return before


@contextmanager
def _evaluating(net: Any) -> Iterator[None]:
    """Evaluation mode for the block, the previous mode of every module afterwards."""
    modes = {m: m.training for m in net.modules()} if isinstance(net, torch.nn.Module) else {}
    if modes:
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _encode(point: Point) -> dict[str, Any]:
    quality = None if math.isnan(point.quality) else point.quality
    cost = point.cost
    return {
        "choice": dict(point.choice),
        "quality": quality,
        "macs": cost.macs,
        "params": cost.params,
        "bytes": cost.bytes,
    }


def _decode(entry: Mapping[str, Any]) -> Point:
    quality = math.nan if entry["quality"] is None else float(entry["quality"])
    cost = Cost(int(entry["macs"]), int(entry["params"]), int(entry["bytes"]))
    return Point(Choice(entry["choice"]), quality, cost)
