r"""One snapshot of a changing graph, as tensors.

A snapshot touches few of a graph's nodes (of Bitcoin OTC's 5,881 a median of 126). Every node that
it does not touch has itself as its only neighbour, and with degree features the same input as all
the others, hence the same embedding: a :class:`Graph` has one row for each node that is touched (or
has features of its own), and a last one for all others. Layers and all-pairs scores are computed on
those rows; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.data.events import Edges, NodeValues, Snapshots, degree_features
from pantarhei.errors import RequestError


@dataclass(frozen=True, eq=False)
class Graph:
    """One snapshot with R = K + 1 rows: K nodes by ascending number, then all others.

    ``adjacency`` (R, R), sparse, normalised with self-loops (:func:`normalized_adjacency`);
    ``features`` (R, d) float, or (R,) int64: the hot places of one-hot vectors; ``active`` (R,)
    tells which rows have an edge; ``nodes`` (K,) are the numbers of the nodes.
    """

    adjacency: Tensor
    features: Tensor
    active: Tensor
    nodes: Tensor

    def rows(self, nodes: Tensor) -> Tensor:
        """Return the row of each node, of any shape."""
        return rows_of(self.nodes, nodes)

    def to(self, device: torch.device | str) -> Graph:
        """Return the graph on another device."""
        moved = (t.to(device) for t in (self.adjacency, self.features, self.active, self.nodes))
        return Graph(*moved)


class Embedded(NamedTuple):
    """Embeddings ``values`` (K + 1, h) of ``nodes`` (K,), and, last, of all other nodes."""

    values: Tensor
    nodes: Tensor

    def rows(self, nodes: Tensor) -> Tensor:
        """Return the row of each node, of any shape."""
        return rows_of(self.nodes, nodes)


def rows_of(listed: Tensor, nodes: Tensor) -> Tensor:
    """Return where each of ``nodes`` stands in the ascending ``listed``, else ``len(listed)``.

    >>> rows_of(torch.tensor([2, 5, 9]), torch.tensor([5, 6, 9, 99]))
    tensor([1, 3, 2, 3])
    """
    if not len(listed):
        return torch.zeros_like(nodes)
    place = torch.searchsorted(listed, nodes.contiguous()).clamp(max=len(listed) - 1)
    return torch.where(listed[place] == nodes, place, len(listed))


def normalized_adjacency(source: Tensor, target: Tensor, weight: Tensor, rows: int) -> Tensor:
    r"""Return :math:`\hat A = D^{-1/2} (A + I) D^{-1/2}`, sparse; D are the row sums of A + I.

    ``A[source, target] = weight``; a row without an edge becomes that of the identity.

    >>> ends = torch.tensor([0, 1]), torch.tensor([1, 0])
    >>> normalized_adjacency(*ends, torch.ones(2), 3).to_dense()
    tensor([[0.5000, 0.5000, 0.0000],
            [0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000]])
    """
    own = torch.arange(rows, device=source.device)
    index = torch.stack([torch.cat([source, own]), torch.cat([target, own])])
    values = torch.cat([weight, weight.new_ones(rows)])
    scale = weight.new_zeros(rows).index_add(0, index[0], values).rsqrt()
    values = values * scale[index[0]] * scale[index[1]]
    return torch.sparse_coo_tensor(index, values, (rows, rows), check_invariants=False).coalesce()


def graph_of(
    edges: Edges,
    features: NodeValues | None = None,
    *,
    degree_width: int | None = None,
    weighted: bool = True,
) -> Graph:
    """Make a :class:`Graph` of one snapshot's edges.

    Without ``features`` it has the one-hot out-degree with ``degree_width`` places, the last for
    all larger degrees. ``weighted=False`` counts every edge once.

    Raises :class:`RequestError` for a negative weight.
    """
    active = edges.active
    nodes = active if features is None else np.union1d(active, features.nodes)
    place = np.searchsorted(nodes, active)
    rows = len(nodes) + 1
    if len(edges) and edges.weight.min() < 0:
        raise RequestError(
            "An edge has a negative weight, which the normalised adjacency does not know: use "
            "counts, or labels for signs."
        )
    if features is None:
        if degree_width is None:
            raise RequestError("Say how many places the degrees have: degree_width=.")
        values = np.zeros(rows, np.int64)
        values[place] = degree_features(edges, degree_width)
    else:
        values = np.zeros((rows, *features.values.shape[1:]), np.float32)
        values[np.searchsorted(nodes, features.nodes)] = features.values
    touched = np.zeros(rows, bool)
    touched[place] = True
    weight = torch.from_numpy(edges.weight).float()
    source, target = (
        torch.from_numpy(np.searchsorted(nodes, end)) for end in (edges.source, edges.target)
    )
    return Graph(
        normalized_adjacency(source, target, weight if weighted else torch.ones_like(weight), rows),
        torch.from_numpy(values),
        torch.from_numpy(touched),
        torch.from_numpy(nodes),
    )


def graphs_of(
    snapshots: Snapshots,
    *,
    degree_width: int | None = None,
    weighted: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[Graph, ...]:
    """Make the :class:`Graph` of every snapshot; see :func:`graph_of`."""
    given: Sequence[NodeValues | None] = snapshots.features or (None,) * len(snapshots)
    return tuple(
        graph_of(edges, features, degree_width=degree_width, weighted=weighted).to(device)
        for edges, features in zip(snapshots.edges, given, strict=True)
    )


def project(features: Tensor, weight: Tensor) -> Tensor:
    """Return features @ weight, where one-hot features pick rows of the weight."""
    return features @ weight if features.is_floating_point() else F.embedding(features, weight)


def pick(features: Tensor, rows: Tensor, width: int) -> Tensor:
    """Return some rows of the features as floats, one-hot ones written out."""
    chosen = features[rows]
    return chosen if features.is_floating_point() else F.one_hot(chosen, width).float()
