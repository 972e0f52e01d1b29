r"""Recurrent cells whose state is a matrix, and the summary of a node set that feeds them.

``Cell(input, state) -> state``: the state is a dict of (d, k) matrices, ``"weight"`` among them.
Every column is treated alike; the gates mix rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pantarhei.systems.evolving_graphs.graphs import pick, project

CellState = dict[str, Tensor]


class MatrixGRU(nn.Module):
    r"""Gated recurrent unit on matrices (EvolveGCN, arXiv 1902.10191).

    With input X and state H, both (d, k); W, U (d, d) and biases B (d, k):

    .. math::

        Z = \sigma(W_Z X + U_Z H + B_Z), \quad R = \sigma(W_R X + U_R H + B_R), \\
        \tilde H = \tanh(W_H X + U_H (R \circ H) + B_H), \quad
        H \leftarrow (1 - Z) \circ H + Z \circ \tilde H

    The reset gate acts before U_H (Cho's form); :class:`torch.nn.GRUCell` lets it act afterwards
    and has one bias for all columns: another model.

    >>> cell = MatrixGRU(3, 2)
    >>> cell(torch.zeros(3, 2), {"weight": torch.ones(3, 2)})["weight"].shape
    torch.Size([3, 2])
    """

    gates = 3

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.from_input, self.from_state = _square(self.gates, rows), _square(self.gates, rows)
        self.bias = nn.Parameter(torch.zeros(self.gates, rows, columns))

    def forward(self, x: Tensor, state: CellState) -> CellState:
        """Return the next state."""
        h = state["weight"]
        inputs = self.from_input @ x + self.bias
        update, reset = torch.sigmoid(inputs[:2] + self.from_state[:2] @ h)
        new = torch.tanh(inputs[2] + self.from_state[2] @ (reset * h))
        return {"weight": torch.lerp(h, new, update)}


class MatrixLSTM(nn.Module):
    r"""Long short-term memory on matrices (EvolveGCN, arXiv 1902.10191).

    .. math::

        F, I, O = \sigma(W_* X + U_* H + B_*), \quad \tilde C = \tanh(W_C X + U_C H + B_C), \\
        C \leftarrow F \circ C + I \circ \tilde C, \quad H \leftarrow O \circ \tanh(C)

    It equals :class:`torch.nn.LSTMCell` on the columns where all columns of each B are equal.

    >>> cell = MatrixLSTM(3, 2)
    >>> start = {"weight": torch.ones(3, 2), "memory": torch.zeros(3, 2)}
    >>> sorted(cell(torch.ones(3, 2), start))
    ['memory', 'weight']
    """

    gates = 4

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.from_input, self.from_state = _square(self.gates, rows), _square(self.gates, rows)
        self.bias = nn.Parameter(torch.zeros(self.gates, rows, columns))

    def forward(self, x: Tensor, state: CellState) -> CellState:
        """Return the next state."""
        sums = self.from_input @ x + self.from_state @ state["weight"] + self.bias
        forget, take, out = torch.sigmoid(sums[:3])
        memory = forget * state["memory"] + take * torch.tanh(sums[3])
        return {"weight": out * torch.tanh(memory), "memory": memory}


class Summary(nn.Module):
    r"""The k nodes that score highest along a learnt direction, as a (d, k) matrix.

    .. math:: y = X p / \lVert p \rVert, \quad i = \mathrm{top}_k(y), \quad
              (X_i \circ \tanh(y_i))^T

    Only active rows are eligible. Where there are fewer than k of them, the last chosen one is
    repeated; where there is none, the summary is zero. The gradient reaches p through tanh(y).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(width).uniform_(-1, 1) / math.sqrt(width))

    def forward(self, features: Tensor, active: Tensor, k: int) -> Tensor:
        """Return the summary (d, k) of features (R, d) float or (R,) one-hot places."""
        direction = self.direction / self.direction.norm()
        score = project(features, direction[:, None])[:, 0]
        eligible = score.masked_fill(~active, -math.inf)
        best = eligible.topk(min(k, len(score))).indices
        count = active.sum()
        last = (count.clamp(max=len(best)) - 1).clamp(min=0)
        order = torch.minimum(torch.arange(k, device=best.device), last)
        chosen = best[order]
        found = pick(features, chosen, len(direction)) * torch.tanh(score[chosen])[:, None]
        return (found * (count > 0)).T


def _square(gates: int, rows: int) -> nn.Parameter:
    """Return matrices (gates, rows, rows), uniform within 1/sqrt(columns) as released."""
    return nn.Parameter(torch.empty(gates, rows, rows).uniform_(-1, 1) / math.sqrt(rows))
