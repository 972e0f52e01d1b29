r"""EvolveGCN: a graph convolution whose weights are carried from snapshot to snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.systems.evolving_graphs.cells import MatrixGRU, MatrixLSTM, Summary
from pantarhei.systems.evolving_graphs.graphs import Embedded, Graph, project

State = dict[str, Tensor]


class EvolveGCN(nn.Module):
    r"""Graph convolutions with evolving weights (arXiv 1902.10191).

    At every snapshot t and layer l, bottom up, the weight is evolved first and then used:

    .. math:: W_t^{(l)} = \mathrm{cell}(x_t, W_{t-1}^{(l)}), \qquad
              H_t^{(l+1)} = \sigma(\hat A_t H_t^{(l)} W_t^{(l)})

    Variant ``"h"``: :math:`x_t` is a summary of the embeddings :math:`H_t^{(l)}`
    (:class:`~pantarhei.systems.evolving_graphs.cells.Summary`), the weight is the cell's hidden
    state. Variant ``"o"``: :math:`x_t = W_{t-1}^{(l)}`, the cell never looks at the nodes.

    Neither the number of parameters nor the output depends on the number of steps or on who the
    nodes are. Run from the learnt start on a window of fixed length, variant ``"o"`` ends in the
    same weights for every window: it is then a static GCN in another parametrisation. Only a state
    that is carried on (:meth:`step`) makes it depend on time.

    Args:
        dims: Widths: features, each layer's output. Cost of a gate is (width of the input)^2.
        variant: ``"h"`` or ``"o"``.
        cell: ``"gru"`` or ``"lstm"``; default as in the paper's text, GRU for "h" and LSTM for
            "o". The released code has a GRU for both.
        activation: Between layers; the released code has :class:`torch.nn.RReLU`.
        activate_last: Also after the last layer, as in the released code.

    Raises:
        RequestError: For an unknown variant or cell, and dims of fewer than two widths.

    >>> from pantarhei.data.simulate.graphs import drift
    >>> from pantarhei.systems.evolving_graphs import graphs_of
    >>> model = EvolveGCN((16, 8, 4), variant="h")
    >>> graphs = graphs_of(drift(steps=3, nodes=30))
    >>> model(graphs).values.shape  # 30 nodes, and one row for all others
    torch.Size([31, 4])
    >>> state = model.initial_state()
    >>> for graph in graphs:  # the same, as the snapshots come in
    ...     embedded, state = model.step(graph, state)
    >>> torch.allclose(embedded.values, model(graphs).values)
    True
    """

    def __init__(
        self,
        dims: Sequence[int],
        variant: Literal["h", "o"] = "h",
        cell: Literal["gru", "lstm"] | None = None,
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        activate_last: bool = False,
    ) -> None:
        super().__init__()
        cell = cell or ("gru" if variant == "h" else "lstm")
        if variant not in ("h", "o") or cell not in ("gru", "lstm"):
            raise RequestError(
                f"EvolveGCN has variants h and o and cells gru and lstm, not '{variant}', '{cell}'."
            )
        if len(dims) < 2 or min(dims) < 1:
            raise RequestError(f"dims={tuple(dims)}: give the features' width and each layer's.")
        shapes = list(pairwise(dims))
        kind = MatrixGRU if cell == "gru" else MatrixLSTM
        self.dims, self.variant = tuple(dims), variant
        self.start = nn.ParameterList(
            torch.empty(a, b).uniform_(-1, 1) / math.sqrt(b) for a, b in shapes
        )
        self.cells = nn.ModuleList(kind(a, b) for a, b in shapes)
        self.summaries = nn.ModuleList(Summary(a) for a, _ in shapes) if variant == "h" else None
        last = activation() if activate_last else nn.Identity()
        self.activations = nn.ModuleList([*(activation() for _ in shapes[1:]), last])

    def initial_state(self) -> State:
        """Return the learnt state before the first snapshot: W_0, and an LSTM's empty memory.

        A state is a dict of tensors: kept and loaded like a ``state_dict``.
        """
        state = {f"{i}.weight": start for i, start in enumerate(self.start)}
        if isinstance(self.cells[0], MatrixLSTM):
            memories = {f"{i}.memory": torch.zeros_like(w) for i, w in enumerate(self.start)}
            state = {**state, **memories}
        return state

    def step(self, graph: Graph, state: Mapping[str, Tensor]) -> tuple[Embedded, State]:
        """Take in one snapshot: return the embeddings of its nodes, and the next state."""
        hidden, after = self._advance(graph, state, read=True)
        return Embedded(hidden, graph.nodes), after

    def _advance(
        self, graph: Graph, state: Mapping[str, Tensor], read: bool
    ) -> tuple[Tensor, State]:
        """Evolve every layer's weight; convolve where the next weight, or a reader, needs it."""
        after: State = {}
        hidden = graph.features
        for i, (cell, activation) in enumerate(zip(self.cells, self.activations, strict=True)):
            own = {key.partition(".")[2]: v for key, v in state.items() if key.startswith(f"{i}.")}
            new = cell(self._input(i, hidden, graph.active, own["weight"]), own)
            after |= {f"{i}.{key}": value for key, value in new.items()}
            if read or (self.variant == "h" and i < len(self.cells) - 1):
                hidden = activation(graph.adjacency @ project(hidden, new["weight"]))
        return hidden, after

    def forward(
        self, graphs: Sequence[Graph], state: Mapping[str, Tensor] | None = None
    ) -> Embedded:
        """Return the embeddings after the last of some snapshots, from ``state`` or the start."""
        if not graphs:
            raise RequestError("There is no snapshot to embed: give one or more.")
        state = self.initial_state() if state is None else state
        for graph in graphs[:-1]:
            _, state = self._advance(graph, state, read=False)
        return self.step(graphs[-1], state)[0]

    def _input(self, layer: int, hidden: Tensor, active: Tensor, weight: Tensor) -> Tensor:
        if self.summaries is None:
            return weight
        return self.summaries[layer](hidden, active, weight.shape[1])
