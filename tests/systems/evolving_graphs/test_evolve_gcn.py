"""EvolveGCN against closed forms, limits and slow obvious computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pantarhei.data.events import Edges, NodeValues
from pantarhei.data.simulate.graphs import drift
from pantarhei.errors import RequestError
from pantarhei.systems.evolving_graphs import (
    GCN,
    GCNGRU,
    EvolveGCN,
    Graph,
    MatrixGRU,
    MatrixLSTM,
    Roland,
    StaticMLP,
    Summary,
    graph_of,
    graphs_of,
    normalized_adjacency,
)

KINDS = [("h", "gru"), ("h", "lstm"), ("o", "gru"), ("o", "lstm")]


def edges(pairs, weight=None):
    u, v = np.array(pairs, np.int64).reshape(-1, 2).T
    order = np.lexsort((v, u))
    w = np.ones(len(u)) if weight is None else np.asarray(weight, float)
    return Edges(u[order], v[order], w[order])


def random_edges(seed, nodes=30, count=60):
    rng = np.random.default_rng(seed)
    pairs = np.unique(rng.integers(0, nodes, (count, 2)), axis=0)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return edges(pairs, rng.integers(1, 4, len(pairs)))


def degree_graphs(seeds, width=6):
    return [graph_of(random_edges(seed), degree_width=width) for seed in seeds]


def dense(graph: Graph, width=6):
    x = graph.features
    x = x if x.is_floating_point() else nn.functional.one_hot(x, width).float()
    return graph.adjacency.to_dense(), x


# The normalised adjacency


def test_a_regular_graph_has_row_sums_of_one_and_a_lone_node_its_own_row():
    ring = [(i, (i + s) % 12) for i in range(12) for s in (1, -1, 2, -2)]
    graph = graph_of(edges(ring), degree_width=5)
    matrix = graph.adjacency.to_dense()
    torch.testing.assert_close(matrix.sum(1), torch.ones(13))
    assert torch.equal(matrix[12], torch.eye(13)[12])
    assert graph.active.tolist() == [True] * 12 + [False]


def test_weights_and_directions_are_those_of_the_formula():
    e = edges([(0, 1), (1, 2), (2, 0), (0, 2)], [3, 1, 2, 1])
    a = np.zeros((4, 4))
    a[e.source, e.target] = e.weight
    a += np.eye(4)
    scale = np.diag(a.sum(1) ** -0.5)
    found = graph_of(e, degree_width=3).adjacency.to_dense()
    np.testing.assert_allclose(found, scale @ a @ scale, rtol=1e-6)
    ones = graph_of(Edges(e.source, e.target, np.ones(4)), degree_width=3).adjacency.to_dense()
    assert torch.equal(graph_of(e, degree_width=3, weighted=False).adjacency.to_dense(), ones)
    assert not torch.allclose(found, ones)
    with pytest.raises(RequestError, match="negative weight"):
        graph_of(edges([(0, 1)], [-1.0]), degree_width=2)
    with pytest.raises(RequestError, match="degree_width"):
        graph_of(e)


def test_rows_of_untouched_nodes_are_one_and_nothing_is_approximated():
    """The compact graph embeds every node as the graph with a row for each does."""
    torch.manual_seed(0)
    e = random_edges(3, nodes=40, count=25)
    compact = graph_of(e, degree_width=5)
    everyone = np.zeros((40, 5), np.float32)
    everyone[np.arange(40), 0] = 1
    everyone[e.active] = np.eye(5, dtype=np.float32)[np.minimum(e.degrees(), 4)]
    full = graph_of(e, NodeValues(np.arange(40), everyone))
    assert len(compact.nodes) < len(full.nodes) == 40
    nodes = torch.arange(40)
    for variant in ("h", "o"):
        model = EvolveGCN((5, 4, 3), variant)
        a, b = model([compact]), model([full])
        torch.testing.assert_close(a.values[a.rows(nodes)], b.values[b.rows(nodes)])


# The cells


def test_the_matrix_lstm_is_torchs_cell_on_the_columns():
    torch.manual_seed(0)
    d, k = 5, 3
    ours, theirs = MatrixLSTM(d, k).double(), nn.LSTMCell(d, d).double()
    gate = {"forget": 1, "input": 0, "output": 3, "cell": 2}  # torch's order
    with torch.no_grad():
        for place, name in enumerate(("forget", "input", "output", "cell")):
            rows = slice(gate[name] * d, (gate[name] + 1) * d)
            ours.from_input[place] = theirs.weight_ih[rows]
            ours.from_state[place] = theirs.weight_hh[rows]
            bias = theirs.bias_ih[rows] + theirs.bias_hh[rows]
            ours.bias[place] = bias[:, None].expand(d, k)  # equal columns
    x, h, c = torch.randn(3, d, k, dtype=torch.float64)
    after = ours(x, {"weight": h, "memory": c})
    h1, c1 = theirs(x.T, (h.T, c.T))
    torch.testing.assert_close(after["weight"], h1.T)
    torch.testing.assert_close(after["memory"], c1.T)


def test_the_matrix_gru_is_chos_form_and_not_torchs():
    torch.manual_seed(0)
    d, k = 5, 3
    cell = MatrixGRU(d, k).double()
    with torch.no_grad():
        cell.bias.copy_(torch.randn(3, d, 1, dtype=torch.float64).expand(3, d, k))
    x, h = torch.randn(2, d, k, dtype=torch.float64)
    (wz, wr, wh), (uz, ur, uh), (bz, br, bh) = cell.from_input, cell.from_state, cell.bias
    z = torch.sigmoid(wz @ x + uz @ h + bz)
    r = torch.sigmoid(wr @ x + ur @ h + br)
    expected = (1 - z) * h + z * torch.tanh(wh @ x + uh @ (r * h) + bh)
    found = cell(x, {"weight": h})["weight"]
    torch.testing.assert_close(found, expected)
    torchs = nn.GRUCell(d, d).double()  # reset, update (of the old state), new
    with torch.no_grad():
        torchs.weight_ih.copy_(torch.cat([wr, -wz, wh]))
        torchs.weight_hh.copy_(torch.cat([ur, -uz, uh]))
        torchs.bias_ih.copy_(torch.cat([br[:, 0], -bz[:, 0], bh[:, 0]]))
        torchs.bias_hh.zero_()
    theirs = torchs(x.T, h.T).T
    assert (theirs - found).abs().max() > 0.01  # it resets after U_H
    with torch.no_grad():  # the rest agrees: without a recurrent candidate they are one
        cell.from_state[2] = 0
        torchs.weight_hh[2 * d :] = 0
    torch.testing.assert_close(torchs(x.T, h.T).T, cell(x, {"weight": h})["weight"])


@pytest.mark.parametrize("kind", [MatrixGRU, MatrixLSTM])
def test_gradients_of_the_cells_are_right(kind):
    torch.manual_seed(0)
    cell = kind(3, 2).double()
    x, h, c = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(x, h, c, *parameters):
        named = dict(zip(dict(cell.named_parameters()), parameters, strict=True))
        state = {"weight": h, "memory": c}
        return torch.func.functional_call(cell, named, (x, state))["weight"]

    assert torch.autograd.gradcheck(run, (x, h, c, *cell.parameters()))


# The summary


def test_the_summary_takes_the_best_active_rows_and_repeats_the_last():
    torch.manual_seed(0)
    summary = Summary(4).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    active = torch.tensor([1, 1, 0, 1, 0, 1, 0]).bool()
    y = x @ summary.direction / summary.direction.norm()
    order = sorted(torch.nonzero(active)[:, 0].tolist(), key=lambda i: -y[i])
    for k in (2, 4, 6, 9):  # of 4 active rows, of 7 rows
        chosen = (order + [order[-1]] * k)[:k]
        expected = (x[chosen] * torch.tanh(y[chosen])[:, None]).T
        torch.testing.assert_close(summary(x, active, k), expected)
    assert (summary(x, torch.zeros(7).bool(), 3) == 0).all()
    one_hot = torch.tensor([0, 3, 3, 1, 2, 0, 1])
    torch.testing.assert_close(
        summary.float()(one_hot, active, 3),
        summary(torch.eye(4)[one_hot], active, 3),
    )


def test_the_gradient_reaches_the_direction_through_tanh():
    torch.manual_seed(0)
    summary = Summary(3).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    active = torch.tensor([1, 1, 1, 1, 0, 1]).bool()

    def run(x, direction):
        return torch.func.functional_call(summary, {"direction": direction}, (x, active, 4))

    assert torch.autograd.gradcheck(run, (x, summary.direction))
    run(x, summary.direction).sum().backward()
    assert summary.direction.grad.abs().max() > 0
    assert (x.grad[4] == 0).all() and (x.grad[active].abs().sum(1) > 0).sum() == 4


# The model


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_windowed_o_is_a_static_gcn(cell):
    """The sheet's finding: its last weights are constants, whatever the window holds."""
    torch.manual_seed(0)
    model = EvolveGCN((6, 5, 4), "o", cell)
    state = model.initial_state()
    for _ in range(4):
        _, state = model.step(degree_graphs([0])[0], state)
    gcn = GCN((6, 5, 4))
    with torch.no_grad():
        for i, weight in enumerate(gcn.weights):
            weight.copy_(state[f"{i}.weight"])
    for window in (degree_graphs(range(4)), degree_graphs(range(10, 14))):
        torch.testing.assert_close(
            model(window).values, gcn(window).values, atol=1e-6, rtol=0, check_stride=False
        )
    h = EvolveGCN((6, 5, 4), "h", cell)
    weights = []
    for seeds in (range(4), range(10, 14)):
        state = h.initial_state()
        for graph in degree_graphs(seeds):
            _, state = h.step(graph, state)
        weights.append(state["1.weight"])
    assert not torch.allclose(*weights)  # -H depends on what it saw


@pytest.mark.parametrize("variant", ["h", "o"])
def test_closed_update_gates_leave_the_start_a_static_gcn(variant):
    torch.manual_seed(0)
    model, window = EvolveGCN((6, 5, 4), variant, "gru"), degree_graphs(range(3))
    with torch.no_grad():
        for cell in model.cells:
            cell.bias[0] = -1e4  # Z = 0
    gcn = GCN((6, 5, 4))
    gcn.weights = model.start
    torch.testing.assert_close(model(window).values, gcn(window).values)


@pytest.mark.parametrize(("variant", "cell"), KINDS)
def test_one_layer_by_hand(variant, cell):
    torch.manual_seed(0)
    model, (graph,) = EvolveGCN((6, 4, 3), variant, cell), degree_graphs([2])
    adjacency, hidden = dense(graph)
    for i in range(2):
        start = model.start[i]
        x = start if variant == "o" else model.summaries[i](hidden, graph.active, start.shape[1])
        state = {"weight": start, "memory": torch.zeros_like(start)}
        hidden = adjacency @ hidden @ model.cells[i](x, state)["weight"]
        hidden = torch.relu(hidden) if i == 0 else hidden
    torch.testing.assert_close(model([graph]).values, hidden)


@pytest.mark.parametrize(("variant", "cell"), KINDS)
def test_permuting_the_nodes_permutes_the_output(variant, cell):
    torch.manual_seed(0)
    model = EvolveGCN((6, 5, 4), variant, cell).double()
    renamed = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    windows = []
    for name in (torch.arange(30), renamed):
        window = []
        for seed in range(4):
            e = random_edges(seed)
            pairs = np.stack([name.numpy()[e.source], name.numpy()[e.target]], 1)
            graph = graph_of(edges(pairs, e.weight), degree_width=6)
            window.append(Graph(graph.adjacency.double(), *list(vars(graph).values())[1:]))
        windows.append(model(window))
    plain, permuted = windows
    nodes = torch.arange(30)
    torch.testing.assert_close(
        plain.values[plain.rows(nodes)], permuted.values[permuted.rows(renamed)]
    )


@pytest.mark.parametrize(("variant", "cell"), KINDS)
def test_the_number_of_parameters_is_the_sheets(variant, cell):
    model, gates = EvolveGCN((7, 5, 3), variant, cell), 3 if cell == "gru" else 4
    expected = sum(
        gates * (2 * a * a + a * b) + a * b + (a if variant == "h" else 0)
        for a, b in ((7, 5), (5, 3))
    )
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("variant", "cell"), KINDS)
def test_disjoint_node_sets_of_any_size_run_and_the_state_is_kept(variant, cell, tmp_path):
    torch.manual_seed(0)
    model = EvolveGCN((16, 4, 3), variant, cell)
    graphs = [
        *graphs_of(drift(steps=2, nodes=20)),
        *graphs_of(drift(steps=2, nodes=9, degree=2)),
        graph_of(edges([]), NodeValues(np.arange(3), np.ones((3, 16), np.float32))),
    ]
    state = model.initial_state()
    for graph in graphs[:3]:
        _, state = model.step(graph, state)
    save_file({k: v.detach() for k, v in state.items()}, tmp_path / "state.safetensors")
    loaded = load_file(tmp_path / "state.safetensors")
    again = EvolveGCN((16, 4, 3), variant, cell)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(graphs[3:], loaded).values, model(graphs).values)
    assert torch.isfinite(model(graphs).values).all()


def test_train_and_evaluation_modes_are_heeded():
    """The released code never leaves training mode, so that RReLU stays random."""
    torch.manual_seed(0)
    model = EvolveGCN((6, 5, 4), "o", activation=nn.RReLU, activate_last=True)
    window = degree_graphs(range(2))
    assert not torch.equal(model(window).values, model(window).values)
    model.eval()
    assert torch.equal(model(window).values, model(window).values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EvolveGCN((6, 5), "x"),
        lambda: EvolveGCN((6, 5), "h", "rnn"),
        lambda: EvolveGCN((6,)),
        lambda: EvolveGCN((6, 5))([]),
    ],
)
def test_what_is_not_a_model_is_refused(make):
    with pytest.raises(RequestError):
        make()


# The learnt baselines


def test_gcn_gru_follows_each_node():
    torch.manual_seed(0)
    model, window = GCNGRU((6, 5, 4)), degree_graphs(range(3))
    out = model(window)
    for node in (0, 7, 29, 77):
        sequence = [model.gcn.embed(g)[g.rows(torch.tensor(node))] for g in window]
        expected = model.gru(torch.stack(sequence)[:, None])[1][0, 0]
        torch.testing.assert_close(out.values[out.rows(torch.tensor(node))], expected)


def test_roland_keeps_a_state_for_every_node_in_every_layer():
    """On the rows of touched nodes it equals the run in which every node has a row."""
    torch.manual_seed(0)
    model = Roland((6, 5, 4))
    seeds = (0, 1, 2)
    compact = [graph_of(random_edges(s, 40, 25), degree_width=6) for s in seeds]
    full = []
    for seed in seeds:
        e = random_edges(seed, 40, 25)
        degree = np.zeros(40, np.int64)
        degree[e.active] = np.minimum(e.degrees(), 5)
        full.append(graph_of(e, NodeValues(np.arange(40), np.eye(6, dtype=np.float32)[degree])))
    states = [torch.zeros(41, 5), torch.zeros(41, 4)]
    for graph in full:
        adjacency, hidden = dense(graph)
        for i in range(2):
            new = torch.relu(adjacency @ hidden @ model.gcn.weights[i])
            hidden = states[i] = model.updates[i](new, states[i])
    a, nodes = model(compact), torch.arange(40)
    torch.testing.assert_close(a.values[a.rows(nodes)], hidden[:40])
    assert len(a.nodes) < 40


def test_the_static_mlp_sees_no_edge():
    torch.manual_seed(0)
    model = StaticMLP((6, 5, 4))
    (graph,) = degree_graphs([0])
    other = normalized_adjacency(torch.tensor([0]), torch.tensor([1]), torch.ones(1), 31)
    moved = Graph(other, graph.features, graph.active, graph.nodes)
    assert torch.equal(model([graph]).values, model([moved]).values)
    assert [type(layer) for layer in model.layers] == [nn.Linear, nn.ReLU, nn.Linear]
