r"""What EvolveGCN has to beat: learnt models of the same shape, and rules that learn nothing.

Learnt: ``model(graphs) -> Embedded``, as :class:`~pantarhei.systems.evolving_graphs.EvolveGCN`.
Rules: ``rule(seen, nodes) -> Scores``, from the edges of the snapshots so far, (2, m) each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pantarhei.systems.evolving_graphs.graphs import Embedded, Graph, pick, project, rows_of
from pantarhei.systems.evolving_graphs.metrics import BlockScores, SparseScores


class GCN(nn.Module):
    r"""Static graph convolution of the last snapshot: :math:`\sigma(\hat A H W)` in each layer.

    Weights start uniform within 2/sqrt(rows), as in the released code of EvolveGCN.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        activate_last: bool = False,
    ) -> None:
        super().__init__()
        self.dims = tuple(dims)
        shapes = list(pairwise(dims))
        self.weights = nn.ParameterList(
            torch.empty(a, b).uniform_(-2, 2) / math.sqrt(a) for a, b in shapes
        )
        last = activation() if activate_last else nn.Identity()
        self.activations = nn.ModuleList([*(activation() for _ in shapes[1:]), last])

    def embed(self, graph: Graph) -> Tensor:
        """Return the embeddings (R, h) of one snapshot's rows."""
        hidden = graph.features
        for weight, activation in zip(self.weights, self.activations, strict=True):
            hidden = activation(graph.adjacency @ project(hidden, weight))
        return hidden

    def forward(self, graphs: Sequence[Graph]) -> Embedded:
        """Return the embeddings of the last of some snapshots."""
        return Embedded(self.embed(graphs[-1]), graphs[-1].nodes)


class GCNGRU(nn.Module):
    """A GCN for every snapshot, and a GRU along each node's own sequence of embeddings.

    Every node has a state, so this is the kind of model that EvolveGCN does without. Nodes that no
    snapshot of the window touches share one sequence.
    """

    def __init__(
        self, dims: Sequence[int], *, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.gcn = GCN(dims, activation=activation, activate_last=True)
        self.gru = nn.GRU(dims[-1], dims[-1])

    def forward(self, graphs: Sequence[Graph]) -> Embedded:
        """Return the GRU's last state of every node that any of the snapshots has."""
        nodes = torch.unique(torch.cat([graph.nodes for graph in graphs]))
        everyone = torch.cat([nodes, nodes.new_tensor([-1])])  # -1: whom no snapshot has
        sequence = [self.gcn.embed(graph)[graph.rows(everyone)] for graph in graphs]
        return Embedded(self.gru(torch.stack(sequence))[1][0], nodes)


class Roland(nn.Module):
    r"""ROLAND's model (2022): every node has a state in every layer, which a GRU updates.

    .. math:: S_t^{(l)} = \mathrm{GRU}(\sigma(\hat A_t S_t^{(l-1)} W^{(l)}),\ S_{t-1}^{(l)}),
              \qquad S_t^{(0)} = X_t

    The model alone, trained like the others; ``evaluate(..., live=)`` has its live updates (of any
    model). Its meta-learning is not here.
    """

    def __init__(
        self, dims: Sequence[int], *, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.gcn = GCN(dims, activation=activation, activate_last=True)
        self.updates = nn.ModuleList(nn.GRUCell(width, width) for width in dims[1:])

    def forward(self, graphs: Sequence[Graph]) -> Embedded:
        """Return the last layer's states of every node that any of the snapshots has."""
        nodes = torch.unique(torch.cat([graph.nodes for graph in graphs]))
        everyone = torch.cat([nodes, nodes.new_tensor([-1])])  # -1: whom no snapshot has
        widths = [weight.shape[1] for weight in self.gcn.weights]
        states = [self.gcn.weights[0].new_zeros(len(everyone), width) for width in widths]
        for graph in graphs:
            adjacency = _widened(graph, nodes)
            hidden = graph.features[graph.rows(everyone)]
            layers = zip(self.gcn.weights, self.gcn.activations, self.updates, strict=True)
            for i, (weight, activation, update) in enumerate(layers):
                new = activation(adjacency @ project(hidden, weight))
                hidden = states[i] = update(new, states[i])
        return Embedded(states[-1], nodes)


def _widened(graph: Graph, nodes: Tensor) -> Tensor:
    """Return a snapshot's normalised adjacency among more nodes, and all others."""
    index, values = graph.adjacency.indices(), graph.adjacency.values()
    inside = index[0] < len(graph.nodes)  # without the row of all others
    place = rows_of(nodes, graph.nodes)
    alone = torch.ones(len(nodes) + 1, dtype=torch.bool, device=nodes.device)
    alone[place] = False
    own = torch.nonzero(alone)[:, 0]
    index = torch.cat([place[index[:, inside]], torch.stack([own, own])], 1)
    values = torch.cat([values[inside], values.new_ones(len(own))])
    size = (len(alone), len(alone))
    return torch.sparse_coo_tensor(index, values, size, check_invariants=False).coalesce()


class StaticMLP(nn.Module):
    """A multilayer perceptron on the features of the last snapshot: no edge is looked at."""

    def __init__(
        self,
        dims: Sequence[int],
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        shapes = list(pairwise(dims))
        self.width = dims[0]
        layers = [layer for a, b in shapes for layer in (nn.Linear(a, b), activation())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, graphs: Sequence[Graph]) -> Embedded:
        """Return the embeddings of the last of some snapshots."""
        features = graphs[-1].features
        rows = torch.arange(len(features), device=features.device)
        return Embedded(self.layers(pick(features, rows, self.width)), graphs[-1].nodes)


def edge_bank(seen: Sequence[Tensor], nodes: int, memory: int | None = None) -> SparseScores:
    """Return 1 for every pair that was an edge before, 0 for all others (EdgeBank).

    ``memory``: only the last so many snapshots count; 1 is persistence, the last snapshot again.
    """
    kept = torch.cat(list(seen[-memory:] if memory else seen), 1)
    key = torch.unique(kept[0] * nodes + kept[1])
    return SparseScores(nodes, key // nodes, key % nodes, torch.ones(len(key), device=key.device))


def preferential_attachment(seen: Sequence[Tensor], nodes: int) -> BlockScores:
    """Return (edges of u so far as a source) times (edges of v so far as a target)."""
    kept = torch.cat(list(seen), 1)
    out, into = (torch.bincount(ends, minlength=nodes) for ends in kept)
    # Nodes of the same two degrees are one class.
    degrees, which, counts = torch.unique(
        torch.stack([out, into], 1), dim=0, return_inverse=True, return_counts=True
    )
    out, into = degrees.float().T
    return BlockScores(counts, lambda n: which[n], lambda a, b: out[a:b, None] * into)
