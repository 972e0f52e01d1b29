r"""How well scores of all ordered pairs find the edges of the next snapshot.

Two families, under names kept apart:

- ``map_as_coded``, ``mrr_as_coded``: what EvolveGCN's released code computes, over all n^2 ordered
  pairs, (i, i) included. MAP is the average precision of *one* ranking of all pairs and is
  dominated by the edge density. MRR ranks each row's true edges among all n columns, other true
  edges not removed, so that a perfect scorer stays below 1 where a row has several.
- ``map_per_node``, ``mrr_filtered``: the usual ones of later papers. Average precision in each
  source's own row; rank of each true edge among the pairs that are not true.

Ties: a tied rank counts as the mean of 1/rank over a random order of the tied pairs, which is exact
and needs no drawing; precision counts tied pairs together. (The released code's sort leaves their
order to chance.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pantarhei.errors import RequestError
from pantarhei.systems.evolving_graphs.graphs import rows_of

MEASURES = ("map_as_coded", "mrr_as_coded", "map_per_node", "mrr_filtered")
_AT_ONCE = 2**24  # numbers in a block of scores


class Scores(Protocol):
    """One number for every ordered pair of nodes, asked for where true edges stand among them."""

    def place(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores of pairs (P,), and how many of the source's pairs score more, as much.

        A pair is tied with itself: the third is at least 1.
        """

    def reaching(self, levels: Tensor) -> Tensor:
        """Return how many of all ordered pairs score at least each of the ascending levels."""


@dataclass(frozen=True, eq=False)
class BlockScores:
    """Scores that are computed a block of rows at a time, between classes of equal nodes.

    ``counts`` (R,): how many nodes a class has; ``rows(nodes)``: the class of each node;
    ``block(a, b)``: the scores (b - a, R) of the classes a to b - 1 against all.
    """

    counts: Tensor
    rows: Callable[[Tensor], Tensor]
    block: Callable[[int, int], Tensor]

    def place(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare each pair with its row."""
        row, column = self.rows(source), self.rows(target)
        value = torch.empty(len(row), device=row.device)
        above, tied = (torch.empty_like(value, dtype=torch.float64) for _ in range(2))
        counts = self.counts.double()
        for start, block in self._blocks():
            inside = torch.nonzero((row >= start) & (row < start + len(block)))[:, 0]
            for part in inside.split(max(1, _AT_ONCE // block.shape[1])):
                lines = block[row[part] - start]
                own = lines.gather(1, column[part, None])
                value[part] = own[:, 0]
                above[part] = (lines > own).double() @ counts
                tied[part] = (lines == own).double() @ counts
        return value, above, tied

    def reaching(self, levels: Tensor) -> Tensor:
        """Count the pairs between consecutive levels, block by block."""
        counts, size = self.counts.double(), len(levels) + 1
        found = torch.zeros(size, dtype=torch.float64, device=levels.device)
        for start, block in self._blocks():
            level = torch.bucketize(block, levels, right=True)  # how many levels it reaches
            weight = counts[start : start + len(block), None] * counts
            found += torch.bincount(level.flatten(), weight.flatten(), size)
        return _from_above(found)[1:]

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        size = len(self.counts)
        step = max(1, _AT_ONCE // size)
        for start in range(0, size, step):
            block = self.block(start, min(start + step, size))
            if not torch.isfinite(block).all():
                raise RequestError("The scores are not all finite: has the training diverged?")
            yield start, block


def dense_scores(values: Tensor) -> BlockScores:
    """Return scores of one's own making, (N, N)."""
    own = torch.ones(len(values), dtype=torch.int64, device=values.device)
    return BlockScores(own, lambda nodes: nodes, lambda a, b: values[a:b])


class SparseScores:
    """Scores that are zero but for some pairs, each given once with a positive value."""

    def __init__(self, nodes: int, source: Tensor, target: Tensor, value: Tensor) -> None:
        if len(value) and float(value.min()) <= 0:
            raise RequestError("Sparse scores are positive: leave the others out.")
        self.nodes = nodes
        order = torch.argsort(source * nodes + target)
        self._pairs, self._value = (source * nodes + target)[order], value[order]
        self._levels, level = torch.unique(value, return_inverse=True)
        self._keys = torch.sort(source * (len(self._levels) + 1) + level + 1).values

    def place(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Look the pairs up, and count what is stored in their rows."""
        stored = rows_of(self._pairs, source * self.nodes + target)
        value = torch.cat([self._value, self._value.new_zeros(1)])[stored]
        level = torch.searchsorted(self._levels, value, right=True)  # 0: not stored
        key = source * (len(self._levels) + 1) + level
        end = torch.searchsorted(self._keys, (source + 1) * (len(self._levels) + 1))
        above = end - torch.searchsorted(self._keys, key, right=True)
        same = end - above - torch.searchsorted(self._keys, key)
        tied = torch.where(level > 0, same, self.nodes - above)
        return value, above.double(), tied.double()

    def reaching(self, levels: Tensor) -> Tensor:
        """Count what is stored, and all pairs for a level of zero."""
        ordered = torch.sort(self._value).values
        found = (len(ordered) - torch.searchsorted(ordered, levels)).double()
        return torch.where(levels > 0, found, float(self.nodes) ** 2)


def ranking(scores: Scores, source: Tensor, target: Tensor) -> dict[str, float]:
    """Return all four measures (module docstring) for the true edges ``source -> target`` (P,).

    With P = 0 all are NaN. Raises :class:`RequestError` for a true edge given twice, and for scores
    that are not finite.

    >>> scores = dense_scores(torch.tensor([[0.0, 0.9, 0.8], [0.1, 0.0, 0.2], [0.0, 0.0, 0.0]]))
    >>> found = ranking(scores, torch.tensor([0, 1]), torch.tensor([2, 2]))
    >>> {name: round(value, 3) for name, value in found.items()}
    {'map_as_coded': 0.583, 'mrr_as_coded': 0.75, 'map_per_node': 0.75, 'mrr_filtered': 0.75}
    """
    if not len(source):
        return dict.fromkeys(MEASURES, math.nan)
    if len(torch.unique(torch.stack([source, target]), dim=1)[0]) < len(source):
        raise RequestError("A true edge is given twice: merge multi-edges first.")
    value, above, tied = scores.place(source, target)
    true_above, true_tied = _place_among_true(source, value)
    levels, level, trues = torch.unique(value, return_inverse=True, return_counts=True)
    precision = _from_above(trues.double()) / scores.reaching(levels)
    per_edge = {
        "mrr_as_coded": _mean_inverse_rank(above, tied),
        "map_per_node": (true_above + true_tied) / (above + tied),
        "mrr_filtered": _mean_inverse_rank(above - true_above, tied - true_tied + 1),
    }
    _, owner, sizes = torch.unique(source, return_inverse=True, return_counts=True)
    share = 1 / (
        len(sizes) * sizes[owner].double()
    )  # the mean over sources of the means over their edges
    found = {"map_as_coded": float(precision[level].mean())}
    return found | {name: float((share * values).sum()) for name, values in per_edge.items()}


def average(results: Iterable[dict[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """Average over steps, weighted (the released code: by the number of pairs); NaN steps left out.

    >>> average([{"a": 1.0}, {"a": 3.0}, {"a": math.nan}], [1, 3, 9])
    {'a': 2.5}
    """
    rows = list(results)
    out = {}
    for name in rows[0] if rows else ():
        kept = [
            (row[name], weight)
            for row, weight in zip(rows, weights, strict=True)
            if math.isfinite(row[name])
        ]
        total = sum(weight for _, weight in kept)
        out[name] = sum(value * weight for value, weight in kept) / total if total else math.nan
    return out


def _place_among_true(source: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many true edges of the same source score more, and how many the same."""
    order = torch.argsort(value, descending=True, stable=True)
    order = order[torch.argsort(source[order], stable=True)]
    new_source = _fresh(source[order])
    new_group = new_source | _fresh(value[order])
    first_of_source, _ = _first_and_size(new_source)
    first_of_group, size = _first_and_size(new_group)
    above, tied = torch.empty_like(order), torch.empty_like(order)
    above[order], tied[order] = first_of_group - first_of_source, size
    return above.double(), tied.double()


def _first_and_size(fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place of the first member of each one's group, and the size of the group."""
    group = fresh.cumsum(0) - 1
    return torch.nonzero(fresh)[:, 0][group], torch.bincount(group)[group]


def _mean_inverse_rank(above: Tensor, tied: Tensor) -> Tensor:
    """Return the mean of 1/rank over ranks above + 1 to above + tied: harmonic numbers."""
    return (torch.special.digamma(above + tied + 1) - torch.special.digamma(above + 1)) / tied


def _fresh(values: Tensor) -> Tensor:
    """Tell where a value differs from the one before."""
    first = torch.ones(1, dtype=torch.bool, device=values.device)
    return torch.cat([first, values[1:] != values[:-1]])


def _from_above(counts: Tensor) -> Tensor:
    """Return the sums from each place to the end."""
    return counts.flip(0).cumsum(0).flip(0)


def classification(labels: Tensor, predicted: Tensor, classes: int) -> dict[str, float]:
    """Return the measures of class predictions (n,): means over examples, classes, and each class.

    ``micro_f1`` is the share of right ones (what the micro average comes to when every example has
    one class); ``balanced_accuracy`` the mean of the classes' recalls, over classes that occur;
    ``f1_class_k`` the F1 of each class.

    >>> found = classification(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1]), 2)
    >>> {name: round(value, 3) for name, value in found.items()}
    {'micro_f1': 0.75, 'balanced_accuracy': 0.833, 'f1_class_0': 0.8, 'f1_class_1': 0.667}
    """
    table = torch.bincount(labels * classes + predicted, minlength=classes**2)
    table = table.reshape(classes, classes).double()
    right, true, called = table.diag(), table.sum(1), table.sum(0)
    f1 = 2 * right / (true + called)
    found = {
        "micro_f1": float(right.sum() / table.sum()),
        "balanced_accuracy": float((right / true)[true > 0].mean()),
    }
    return found | {f"f1_class_{k}": float(value) for k, value in enumerate(f1.nan_to_num())}
