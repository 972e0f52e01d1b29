r"""What reads embeddings: classes of pairs and of nodes, and the scores of all pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.systems.evolving_graphs.graphs import Embedded
from pantarhei.systems.evolving_graphs.metrics import BlockScores

_AT_ONCE = 2**20  # hidden units of a block of pairs: as much as stays in a processor's cache


class PairHead(nn.Module):
    r"""Class scores of an ordered pair: a perceptron with one hidden layer on [h_u; h_v].

    The first layer is computed per node, not per pair, :math:`W [h_u; h_v] = W_u h_u + W_v h_v`:
    what is left for each pair is a sum, a ReLU and the last layer.

    >>> embedded = Embedded(torch.randn(4, 8), torch.tensor([2, 5, 7]))
    >>> PairHead(8, 16)(embedded, torch.tensor([2, 99]), torch.tensor([7, 5])).shape
    torch.Size([2, 2])
    """

    def __init__(self, width: int, hidden: int, classes: int = 2) -> None:
        super().__init__()
        self.source = nn.Linear(width, hidden)
        self.target = nn.Linear(width, hidden, bias=False)
        self.last = nn.Linear(hidden, classes)
        for parameter in (*self.source.parameters(), *self.target.parameters()):
            nn.init.uniform_(parameter, -1 / math.sqrt(2 * width), 1 / math.sqrt(2 * width))

    def forward(self, embedded: Embedded, source: Tensor, target: Tensor) -> Tensor:
        """Return class scores (P, classes) of pairs of node numbers (P,)."""
        return self.of_rows(embedded.values, embedded.rows(source), embedded.rows(target))

    def of_rows(self, values: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Return class scores (P, classes) of pairs of rows (P,)."""
        first = F.embedding(source, self.source(values)) + F.embedding(target, self.target(values))
        return self.last(F.relu(first))

    def scores(self, embedded: Embedded, nodes: int) -> BlockScores:
        """Return class 1's score minus class 0's for every ordered pair of ``nodes`` nodes."""
        of_source, of_target = self.source(embedded.values), self.target(embedded.values)
        weight = self.last.weight[1] - self.last.weight[0]
        bias = self.last.bias[1] - self.last.bias[0]

        def block(start: int, stop: int) -> Tensor:
            lines = max(1, _AT_ONCE // of_target.numel())
            parts = of_source[start:stop, None].split(lines)
            return torch.cat([F.relu(part + of_target) @ weight + bias for part in parts])

        counts = torch.ones(len(embedded.values), dtype=torch.int64, device=weight.device)
        counts[-1] = nodes - len(embedded.nodes)
        return BlockScores(counts, embedded.rows, block)


class NodeHead(nn.Module):
    """Class scores of a node: a perceptron with one hidden layer on its embedding."""

    def __init__(self, width: int, hidden: int, classes: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))

    def forward(self, embedded: Embedded, nodes: Tensor) -> Tensor:
        """Return class scores (n, classes) of node numbers (n,)."""
        return self.layers(embedded.values[embedded.rows(nodes)])


def class_weighted_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, counts: Tensor | None = None
) -> Tensor:
    r"""Return :math:`\frac1n \sum_i w_{y_i} (-\log \mathrm{softmax}(s_i)_{y_i})`.

    The mean is over examples and not over their weights, as in the released code of EvolveGCN.
    ``counts``: how many examples a row stands for.
    """
    each = weights[labels] * F.cross_entropy(logits, labels, reduction="none")
    return each.mean() if counts is None else (each * counts).sum() / counts.sum()
