r"""Event lists (source, target, time, ...) and the snapshots of a graph that they make.

``read_events`` and ``Events.of`` take what a user has; ``snapshots`` cuts time into bins; ``split``
divides the bins without letting a training step see what lies behind them.

What becomes of untidy input: events are sorted by time (stably); several events of one pair in a
bin are one edge with their number as its weight; self-loops are left out and counted; bins without
an event are graphs without an edge; a node is known by its number from the start, but has edges and
degrees only where it has events, so one that appears in the test period gives nothing away before.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pantarhei.data import _read
from pantarhei.errors import RequestError, nearest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_HEADERS = {
    "source": ("source", "src", "from", "sender", "rater", "u", "i", "source_node"),
    "target": ("target", "dst", "to", "receiver", "ratee", "v", "j", "destination", "target_node"),
    "time": ("time", "timestamp", "unixtime", "ts", "t", "date", "datetime"),
    "weight": ("weight", "rating", "feature", "value", "w", "amount"),
    "label": ("label", "class", "y", "sign"),
}
_PLACES = {"source": 0, "target": 1, "time": 2}  # without a header


@dataclass(frozen=True, eq=False)
class Events:
    """Directed events in order of time, E of them, between N nodes that are numbered 0 to N - 1.

    ``source``, ``target`` (E,) int64; ``time`` (E,) in the unit of the data (seconds for dates);
    ``weight`` (E,) or None; ``label`` (E,) int64, an index of ``classes``, or None; ``names`` (N,)
    are the nodes as the user calls them; ``self_loops`` counts those that were left out.
    """

    source: Ints
    target: Ints
    time: Floats
    names: NDArray[Any]
    weight: Floats | None = None
    label: Ints | None = None
    classes: tuple[str, ...] = ()
    name: str = "events"
    self_loops: int = 0

    def __len__(self) -> int:
        return len(self.time)

    @property
    def nodes(self) -> int:
        """How many nodes there are, N."""
        return len(self.names)

    @classmethod
    def of(
        cls,
        source: ArrayLike,
        target: ArrayLike,
        time: ArrayLike,
        weight: ArrayLike | None = None,
        label: ArrayLike | None = None,
        name: str = "events",
    ) -> Events:
        """Make events of arrays (E,): nodes and labels of any kind, times numbers or dates.

        Raises :class:`RequestError` for columns of different lengths, no event between two nodes,
        and times or weights that are not finite numbers, naming the first such row.

        >>> e = Events.of(["a", "b", "b"], ["b", "c", "b"], [3, 1, 2], label=["no", "yes", "no"])
        >>> e.names.tolist(), e.source.tolist(), e.time.tolist(), e.label.tolist(), e.self_loops
        (['a', 'b', 'c'], [1, 0], [1.0, 3.0], [1, 0], 1)
        """
        given = {"source": source, "target": target, "time": time, "weight": weight, "label": label}
        columns = {key: np.asarray(value) for key, value in given.items() if value is not None}
        lengths = {key: value.shape for key, value in columns.items()}
        if len(set(lengths.values())) > 1 or len(lengths["time"]) != 1:
            raise RequestError(
                f"'{name}' has columns of shapes {lengths}: give vectors of one length."
            )
        columns["time"] = _times(columns["time"], name)
        if "weight" in columns:
            columns["weight"] = _numbers(columns["weight"], "weight", name)
        classes: tuple[str, ...] = ()
        if "label" in columns:
            kinds, columns["label"] = np.unique(columns["label"], return_inverse=True)
            classes = tuple(str(kind) for kind in kinds.tolist())
        ends = np.concatenate([columns["source"], columns["target"]])
        names, numbers = np.unique(ends, return_inverse=True)
        columns["source"], columns["target"] = np.split(numbers.astype(np.int64), 2)
        kept = np.flatnonzero(columns["source"] != columns["target"])
        if not len(kept):
            raise RequestError(f"'{name}' has no event between two different nodes: give some.")
        order = kept[np.argsort(columns["time"][kept], kind="stable")]
        loops = len(numbers) // 2 - len(kept)
        columns = {key: value[order] for key, value in columns.items()}
        return cls(**columns, names=names, classes=classes, name=name, self_loops=loops)


def read_events(
    path: str | Path,
    *,
    source: str | int | None = None,
    target: str | int | None = None,
    time: str | int | None = None,
    weight: str | int | None = None,
    label: str | int | None = None,
) -> Events:
    """Read an event list: CSV, tab, semicolon or blank separated text, or the same as ``.gz``.

    A first row without a number in the column of the time is a header; columns are then found by
    their usual names (source/src/from, target/dst/to, time/timestamp, weight/rating, label), else
    the first three are source, target and time. Name others by header or by number from 0. Times
    are numbers or ISO 8601 dates. Lines that begin with # or % are comments.

    Raises :class:`RequestError` for a file that is not there or not a table, a column that is not
    there, and whatever :meth:`Events.of` refuses.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "calls.csv"
    >>> _ = path.write_text("from,to,time\\nann,bob,2024-01-01\\nbob,eve,2024-01-02T12:00\\n")
    >>> e = read_events(path)
    >>> e.names.tolist(), (e.time - e.time[0]).tolist()
    (['ann', 'bob', 'eve'], [0.0, 129600.0])
    """
    file = Path(path)
    if not file.is_file():
        raise RequestError(f"'{path}' is not a file: name a table of events, one a row.")
    table = _table(file)
    asked = {"source": source, "target": target, "time": time, "weight": weight, "label": label}
    if any(isinstance(column, str) for column in asked.values()):
        header = True
    else:
        at = 2 if time is None else int(time)
        header = at < table.shape[1] and not _is_time(table[0, at])
    names = [str(word).strip() for word in table[0]] if header else []
    columns = {}
    for key, column in asked.items():
        number = _column(key, column, names, table.shape[1], file)
        if number is not None:
            columns[key] = table[int(header) :, number]
    if len(columns["time"]) == 0:
        raise RequestError(f"'{path}' has a header and no events: give some.")
    whole = {key: _integers(columns[key]) for key in ("source", "target")}
    if all(value.dtype.kind == "i" for value in whole.values()):
        columns |= whole
    return Events.of(**columns, name=file.name)


def _table(file: Path) -> NDArray[np.str_]:
    with _read.guarded(file):
        text = _read.text(file)
        lines = [line for line in text.splitlines() if line.strip() and line[0] not in "#%"]
        if not lines:
            raise ValueError("no rows")
        delimiter = next((mark for mark in (",", "\t", ";") if mark in lines[0]), None)
        table = np.loadtxt(
            io.StringIO("\n".join(lines)),
            dtype=str,
            delimiter=delimiter,
            comments=None,
            quotechar='"',
            ndmin=2,
        )
    if table.shape[1] < 3:
        raise RequestError(
            f"'{file}' has {table.shape[1]} columns: an event has a source, a target and a time."
        )
    return table


def _column(
    key: str, asked: str | int | None, names: Sequence[str], width: int, file: Path
) -> int | None:
    """Return the number of the column that holds ``key``, None where there is none."""
    if isinstance(asked, int):
        if not 0 <= asked < width:
            raise RequestError(f"'{file}' has columns 0 to {width - 1}, and no {asked} for {key}.")
        return asked
    if asked is not None:
        if asked not in names:
            raise RequestError(
                f"'{file}' has no column '{asked}' for {key}: it has {', '.join(names)}."
                f"{nearest(asked, names)}"
            )
        return names.index(asked)
    lowered = [name.casefold() for name in names]
    known = (lowered.index(word) for word in _HEADERS[key] if word in lowered)
    return next(known, _PLACES.get(key))


def _integers(column: NDArray[Any]) -> NDArray[Any]:
    """Return whole numbers as such, so that node 10 comes after node 9; else the words."""
    words = np.char.strip(column)
    try:
        return words.astype(np.int64)
    except (ValueError, OverflowError):
        return words


def _is_time(word: str) -> bool:
    try:
        _time(np.array([word]))
    except ValueError:
        return False
    return True


def _time(column: NDArray[Any]) -> Floats:
    try:
        return column.astype(np.float64)
    except ValueError:
        moments = column.astype("datetime64[us]")
        seconds = moments.astype(np.int64) / 1e6
        return np.where(np.isnat(moments), np.nan, seconds)


def _times(column: NDArray[Any], name: str) -> Floats:
    if column.dtype.kind == "M":
        column = column.astype(str)
    if column.dtype.kind != "U":
        return _numbers(column, "time", name)
    try:
        return _numbers(_time(np.char.strip(column)), "time", name)
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        row = next(i for i, word in enumerate(column, 1) if not _is_time(word.strip()))
        raise RequestError(
            f"Event {row} of '{name}' has the time '{column[row - 1][:40]}': give a number or an "
            "ISO date such as 2024-01-31."
        ) from None


def _numbers(column: NDArray[Any], key: str, name: str) -> Floats:
    try:
        numbers = column.astype(np.float64)
    except (ValueError, TypeError):
        raise RequestError(f"The {key} of '{name}' is not made of numbers: encode it.") from None
    if not np.isfinite(numbers).all():
        row = int(np.argmin(np.isfinite(numbers))) + 1
        raise RequestError(
            f"The {key} of event {row} of '{name}' is missing or not finite: fill or drop it."
        )
    return numbers


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges of one snapshot, M of them, each once, in order of source and target.

    ``source``, ``target`` (M,) int64; ``weight`` (M,); ``label`` (M,) int64 or None.
    """

    source: Ints
    target: Ints
    weight: Floats
    label: Ints | None = None

    def __len__(self) -> int:
        return len(self.source)

    @property
    def active(self) -> Ints:
        """The nodes that have an edge, in order."""
        return np.unique(np.concatenate([self.source, self.target]))

    def degrees(self) -> Ints:
        """Return the number of distinct out-neighbours of each of the ``active`` nodes."""
        active = self.active
        return np.bincount(np.searchsorted(active, self.source), minlength=len(active))


@dataclass(frozen=True, eq=False)
class NodeValues:
    """Values of some nodes: ``nodes`` (n,) in ascending order, ``values`` (n, ...)."""

    nodes: Ints
    values: NDArray[Any]


@dataclass(frozen=True, eq=False)
class Snapshots:
    """A changing graph: T snapshots over the nodes 0 to ``nodes`` - 1.

    ``features`` and ``labels`` of nodes, where there are any, have one :class:`NodeValues` for each
    snapshot; ``classes`` names the labels of edges or nodes. Snapshot k holds the events of
    ``start + k width <= time < start + (k+1) width``.
    """

    nodes: int
    edges: tuple[Edges, ...]
    name: str = "graph"
    classes: tuple[str, ...] = ()
    features: tuple[NodeValues, ...] | None = None
    labels: tuple[NodeValues, ...] | None = None
    names: NDArray[Any] | None = None
    start: float = 0.0
    width: float = 1.0

    def __len__(self) -> int:
        return len(self.edges)


def snapshots(
    events: Events,
    width: float,
    *,
    symmetric: bool = False,
    weight: Literal["count", "sum", "one"] = "count",
    start: float | None = None,
) -> Snapshots:
    r"""Cut events into bins of ``width`` (in the unit of their time), counted from ``start``.

    ``symmetric`` adds each event in both directions. An edge's ``weight`` is the number of its
    events in the bin (the released EvolveGCN code's choice), the sum of their weights, or one. Its
    label is the class with most votes among them; a tie goes to the first of the tied classes.

    Raises :class:`RequestError` for a width that is not positive or makes more than 100,000 bins.

    >>> e = Events.of([0, 0, 1], [1, 1, 2], [0, 1, 9], label=[1, 0, 1])
    >>> s = snapshots(e, 3)
    >>> [len(one) for one in s.edges], s.edges[0].weight.tolist(), s.edges[0].label.tolist()
    ([1, 0, 0, 1], [2.0], [0])
    """
    first = float(events.time[0]) if start is None else start
    span = float(events.time[-1]) - first
    if not (math.isfinite(width) and width > 0) or span / width > 1e5 or events.time[0] < first:
        raise RequestError(
            f"Bins of {width:g} from {first:g} do not fit '{events.name}', whose times are "
            f"{events.time[0]:g} to {events.time[-1]:g}: choose a positive width of at least "
            f"{span / 1e5:g} and a start not after the first."
        )
    if weight == "sum" and events.weight is None:
        raise RequestError(f"'{events.name}' has no weights to sum: choose count or one.")
    bins = np.floor((events.time - first) / width).astype(np.int64)
    source, target = events.source, events.target
    votes = np.ones(len(events)) if weight != "sum" else np.asarray(events.weight)
    label = events.label
    if symmetric:
        source, target = np.concatenate([source, target]), np.concatenate([target, source])
        bins, votes = np.tile(bins, 2), np.tile(votes, 2)
        label = None if label is None else np.tile(label, 2)
    key, weights, edge, order = _merged(bins, source, target, votes)
    if weight == "one":
        weights = np.ones_like(weights)
    kinds = None
    if label is not None:
        table = np.zeros((len(weights), len(events.classes)), np.int64)
        np.add.at(table, (edge, label[order]), 1)
        kinds = table.argmax(1)
    edges = _cut(key, weights, kinds, int(key[0, -1]) + 1)
    return Snapshots(
        events.nodes, edges, events.name, events.classes, names=events.names, start=first,
        width=width,
    )  # fmt: skip


def _merged(bins: Ints, source: Ints, target: Ints, weight: Floats) -> tuple[Any, ...]:
    """Return the distinct (bin, source, target) in order (3, M), and the sums of their weights.

    Then, for what was given, in the order that is returned last: the number of its edge.
    """
    order = np.lexsort((target, source, bins))
    key = np.stack([bins, source, target])[:, order]
    fresh = np.concatenate([[True], (np.diff(key) != 0).any(0)])
    edge = np.cumsum(fresh) - 1
    return key[:, fresh], np.bincount(edge, weight[order]).astype(np.float64), edge, order


def _cut(key: Ints, weight: Floats, label: Ints | None, steps: int) -> tuple[Edges, ...]:
    """Return the edges of each of so many bins."""
    bins, source, target = key
    cuts = np.searchsorted(bins, np.arange(steps + 1))
    return tuple(
        Edges(source[a:b], target[a:b], weight[a:b], None if label is None else label[a:b])
        for a, b in pairwise(cuts)
    )


def summed(graph: Snapshots, window: int) -> Snapshots:
    r"""Return snapshots with the sum of the last ``window`` adjacencies, fewer at the beginning.

    .. math:: A'_t = \sum_{s = \max(0, t - w + 1)}^{t} A_s

    The released EvolveGCN code sees Reddit so (w = 10). An edge has a weight and no label, for its
    labels may differ; features and labels of nodes stay. A window of 1 changes nothing.

    >>> graph = snapshots(Events.of([0, 1, 0], [1, 2, 1], [0, 1, 2]), 1)
    >>> [(e.source.tolist(), e.weight.tolist()) for e in summed(graph, 3).edges]
    [([0], [1.0]), ([0, 1], [1.0, 1.0]), ([0, 1], [2.0, 1.0])]
    """
    if window < 1:
        raise RequestError(f"adjacency_window={window}: sum 1 snapshot (only the last) or more.")
    if window == 1:
        return graph
    if not any(map(len, graph.edges)):
        return graph
    # an edge of snapshot s is in the sums s to s + window - 1
    repeats = min(window, len(graph))
    bins = np.repeat(np.arange(len(graph)), [len(edges) for edges in graph.edges])
    late = (bins + np.arange(repeats)[:, None]).ravel()
    inside = late < len(graph)
    source, target, weight = (
        np.tile(np.concatenate([getattr(edges, name) for edges in graph.edges]), repeats)[inside]
        for name in ("source", "target", "weight")
    )
    key, weight, *_ = _merged(late[inside], source, target, weight)
    return replace(graph, edges=_cut(key, weight, None, len(graph)))


@dataclass(frozen=True)
class Split:
    """Time steps for training, validation and test, in this order."""

    train: range
    validation: range
    test: range


def split(steps: int, train: float = 0.7, validation: float = 0.1, *, first: int = 0) -> Split:
    """Divide the time steps ``first`` to ``steps`` - 1 in order of time.

    With L = steps - 1, training ends before floor(L train), validation before floor(L (train +
    validation)), as the released EvolveGCN code has it; the test is the rest. ``first`` leaves room
    for a window of history. Raises :class:`RequestError` where a part would be empty.

    >>> s = split(138, first=10)
    >>> s.train, s.validation, s.test
    (range(10, 95), range(95, 109), range(109, 138))
    """
    last = steps - 1
    cuts = [math.floor(last * share + 1e-9) for share in (train, train + validation)]
    parts = (range(first, cuts[0]), range(max(first, cuts[0]), cuts[1]), range(cuts[1], steps))
    if not all(parts) or min(train, validation) <= 0:
        raise RequestError(
            f"{steps} time steps cannot be split into {train:g} for training after the first "
            f"{first}, {validation:g} for validation and the rest for the test: use narrower bins, "
            "a shorter window or other shares."
        )
    return Split(*parts)


def degree_width(graph: Snapshots, steps: range) -> int:
    """Return the one-hot width that holds every out-degree of these steps: the largest plus one.

    Take it from the steps of training; larger degrees of later ones share the last place, the
    overflow bucket (see :func:`degree_features`).
    """
    return 1 + max((int(graph.edges[t].degrees().max(initial=0)) for t in steps), default=0)


def degree_features(edges: Edges, width: int) -> Ints:
    """Return min(out-degree, width - 1) of the active nodes: the hot place of a one-hot vector.

    >>> degree_features(snapshots(Events.of([0, 0, 0, 1], [1, 2, 3, 2], [0] * 4), 1).edges[0], 3)
    array([2, 1, 0, 0])
    """
    return np.minimum(edges.degrees(), width - 1)


def with_features(graph: Snapshots, values: ArrayLike | Sequence[NodeValues]) -> Snapshots:
    """Give nodes features of the user's own: (N, d), (T, N, d), or one NodeValues a snapshot.

    Raises :class:`RequestError` for other shapes and for features that are not finite.
    """
    steps, nodes = len(graph), np.arange(graph.nodes)
    if isinstance(values, Sequence) and values and isinstance(values[0], NodeValues):
        given = tuple(values)
    else:
        array = np.asarray(values, dtype=np.float32)
        given_shape = array.shape
        if array.ndim == 2:
            array = np.broadcast_to(array, (steps, *array.shape))
        if array.ndim != 3 or array.shape[:2] != (steps, graph.nodes):
            raise RequestError(
                f"Features of shape {given_shape} do not fit {steps} snapshots of "
                f"{graph.nodes} nodes: give (N, d) or (T, N, d)."
            )
        given = tuple(NodeValues(nodes, one) for one in array)
    if len(given) != steps or len({one.values.shape[1:] for one in given}) != 1:
        raise RequestError(f"Give features of one width for each of the {steps} snapshots.")
    for step, one in enumerate(given):
        if not np.isfinite(one.values).all():
            raise RequestError(f"The features of snapshot {step} are not all finite: fill them.")
    return replace(graph, features=given)
