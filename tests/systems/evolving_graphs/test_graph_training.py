"""Training on a user's own events, the two state policies, resuming, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.data.events import Events, Split, read_events, snapshots, with_features
from pantarhei.data.simulate.graphs import drift, sbm
from pantarhei.errors import RequestError
from pantarhei.systems.evolving_graphs import (
    MODELS,
    Embedded,
    EvolveGCN,
    Forecaster,
    PairHead,
    Problem,
    build,
    edge_bank,
    evaluate,
    evaluate_rule,
    majority,
    train,
)


def write_events(path, seed=0, count=2000, nodes=200):
    """Two groups of people write to each other daily; group 0's messages are short."""
    rng = np.random.default_rng(seed)
    source = rng.integers(0, nodes, count)
    within = rng.random(count) < 0.95
    target = (rng.integers(0, nodes // 2, count) * 2 + (source + ~within) % 2) % nodes
    time = rng.uniform(0, 24 * 86400, count)
    kind = np.where(source % 2, "long", "short")
    lines = ["who,whom,when,kind"]
    lines += [f"p{u},p{v},{t},{k}" for u, v, t, k in zip(source, target, time, kind, strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    path = write_events(tmp_path_factory.mktemp("events") / "mail.csv")
    return read_events(path, source="who", target="whom", time="when", label="kind")


def test_a_users_own_csv_is_forecast_better_than_by_memory(events):
    """Who is in which group shows in features of one's own; few pairs write twice."""
    graph = snapshots(events, 86400)
    number = np.array([int(name[1:]) for name in graph.names])
    group = np.eye(2)[number % 2]
    problem = Problem.of(with_features(graph, group), "link", window=3)
    trained = train(problem, build("evolvegcn-h", problem.width, 8), epochs=6, lr=0.005, quiet=True)
    ours = evaluate(trained.forecaster, problem, problem.split.test)
    memory = evaluate_rule(edge_bank, problem, problem.split.test)
    assert ours["map_as_coded"] > 1.3 * memory["map_as_coded"]
    assert trained.fit.best == max(row["validation_map_as_coded"] for row in trained.epochs)
    assert len(trained.epochs) == 6 and not trained.forecaster.training


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_on_every_task(name, events):
    graph = snapshots(events, 86400)
    link = Problem.of(graph, "link", window=2, degree_cap=4)
    edge = Problem.of(graph, "edge", window=2)
    node = Problem.of(drift(steps=14, nodes=30), "node", window=2)
    assert link.width == 4 < edge.width and node.width == 16 and edge.classes == 2
    for problem in (link, edge, node):
        model = build(name, problem.width, 6)
        before = [p.detach().clone() for p in model.parameters()]
        trained = train(problem, model, epochs=1, quiet=True, head_hidden=8)
        found = evaluate(trained.forecaster, problem, problem.split.test)
        assert all(np.isfinite(list(found.values())))
        assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_labels_of_edges_are_learnt_and_beat_the_majority(events):
    graph = snapshots(events, 86400)
    number = np.array([int(name[1:]) for name in graph.names])
    problem = Problem.of(with_features(graph, np.eye(2)[number % 2]), "edge", window=1)
    trained = train(problem, build("mlp", problem.width, 8), epochs=5, lr=0.05, quiet=True)
    found = evaluate(trained.forecaster, problem, problem.split.test)
    assert found["micro_f1"] > 0.95 > majority(problem, problem.split.test)["micro_f1"]


def test_the_carried_state_sees_what_a_window_cannot():
    """Carried from the first snapshot on, the embeddings depend on all of the past."""
    torch.manual_seed(0)
    graph = drift(steps=20, nodes=30)
    problem = Problem.of(
        graph, "node", window=1, parts=Split(range(1, 10), range(10, 14), range(14, 20))
    )
    model = EvolveGCN((16, 6), "h")
    head = train(problem, model, epochs=1, quiet=True).forecaster.head
    carried = dict(Forecaster(model, head, "carry").follow(problem, [3, 7]))
    state = model.initial_state()
    for t in range(8):
        embedded, state = model.step(problem.graphs[t], state)
        if t in carried:
            assert torch.equal(carried[t].values, embedded.values)
    window = dict(Forecaster(model, head).follow(problem, [7]))
    assert torch.equal(window[7].values, model(problem.graphs[6:8]).values)
    assert not torch.allclose(window[7].values, carried[7].values)


@pytest.mark.parametrize("policy", ["restart", "carry"])
def test_a_killed_training_goes_on_to_the_same_weights(policy, tmp_path):
    problem = Problem.of(sbm(nodes=30, steps=20, moves=2), "link", window=2)

    def run(epochs, folder):
        model = build("evolvegcn-o", problem.width, 5, seed=1)
        return train(
            problem, model, policy=policy, truncation=4, epochs=epochs, checkpoint=folder,
            quiet=True, seed=1, negatives_per_edge=2,
        )  # fmt: skip

    whole = run(3, tmp_path / "whole")
    run(1, tmp_path / "parts")
    again = run(3, tmp_path / "parts")
    pairs = zip(
        whole.forecaster.state_dict().items(), again.forecaster.state_dict().items(), strict=True
    )
    for (name, a), (_, b) in pairs:
        assert torch.equal(a, b), name
    if policy == "carry":
        assert any(name.startswith("carried_") for name in whole.forecaster.state_dict())
        assert not torch.equal(
            whole.forecaster.carried["0.weight"], whole.forecaster.model.start[0]
        )


def test_gradients_run_through_a_stretch_and_stop_at_its_end():
    problem = Problem.of(drift(steps=20, nodes=30), "node", window=1)
    from pantarhei.systems.evolving_graphs import training

    model = build("evolvegcn-o", problem.width, 5)
    trained = train(problem, model, policy="carry", truncation=4, epochs=1, quiet=True)
    forecaster = trained.forecaster
    weights = torch.ones(2)
    updates, batch, loss = training._stretches(
        problem, lambda n, steps: [problem.target(t) for t in steps], weights, 4
    )
    assert updates == 4 and [batch(n)[0] for n in range(5)] == [0, 4, 8, 12, 0]
    for n, begins in ((0, True), (1, False)):
        forecaster.zero_grad()
        loss(forecaster, batch(n)).backward()
        assert (model.start[0].grad is not None) == begins  # the start is used in the first alone


class Own(nn.Module):
    """A user's model: the one-hot degree, through one matrix."""

    def __init__(self, width):
        super().__init__()
        self.table = nn.Embedding(width, 4)

    def forward(self, graphs):
        return Embedded(self.table(graphs[-1].features), graphs[-1].nodes)


def test_a_users_own_model_and_head_are_trained(events):
    problem = Problem.of(snapshots(events, 86400), "link", window=2)
    trained = train(
        problem, Own(problem.width), head=PairHead(4, 3), epochs=2, quiet=True,
        sampling="historical", measure="mrr_filtered", patience=1, class_weights=(1, 1),
    )  # fmt: skip
    assert trained.measure == "mrr_filtered" and trained.forecaster.head.last.in_features == 3


def test_equal_pairs_are_counted_and_not_computed_again():
    torch.manual_seed(0)
    problem = Problem.of(sbm(nodes=60, steps=20, p_in=0.02, moves=2), "link", window=2)
    forecaster = Forecaster(build("gcn", problem.width, 5), PairHead(5, 7))
    generator = torch.Generator().manual_seed(0)
    target = problem.with_negatives(problem.target(9), "uniform", 5, generator)
    embedded = forecaster.model(problem.seen(9))
    weights = torch.tensor([0.1, 0.9])
    each = nn.functional.cross_entropy(
        forecaster.logits(embedded, target.of), target.labels, reduction="none"
    )
    expected = (weights[target.labels] * each).mean()
    torch.testing.assert_close(forecaster.loss(embedded, target, weights), expected)


def test_no_window_sees_the_snapshot_that_it_forecasts(events):
    problem = Problem.of(snapshots(events, 86400), "link", window=3)
    for t in problem.told(problem.split.train):
        assert problem.seen(t)[-1] is problem.graphs[t] and len(problem.seen(t)) == 4
        assert torch.equal(problem.target(t).of, problem.edges[t + 1])
    assert max(problem.told(problem.split.train)) + 1 <= problem.split.validation.start
    assert max(problem.told(range(len(problem.graphs)))) == len(problem.graphs) - 2


def test_what_is_seen_is_summed_and_what_is_told_is_not(events):
    graph = snapshots(events, 86400)
    plain, wide = (Problem.of(graph, "edge", window=2, adjacency_window=w) for w in (1, 4))
    assert wide.width > plain.width  # degrees over four days
    for t in (0, 2, 9):
        own = np.zeros((graph.nodes, graph.nodes))
        for edges in graph.edges[max(0, t - 3) : t + 1]:
            own[edges.source, edges.target] += edges.weight
        own += np.eye(len(own))
        scale = own.sum(1) ** -0.5
        expected = (scale[:, None] * own * scale)[
            np.ix_(wide.graphs[t].nodes, wide.graphs[t].nodes)
        ]
        found = wide.graphs[t].adjacency.to_dense()[:-1, :-1]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert torch.equal(wide.target(t).of, plain.target(t).of)
        assert torch.equal(wide.target(t).labels, plain.target(t).labels)


@pytest.mark.parametrize("task", ["link", "edge"])
def test_a_live_update_is_a_training_on_the_step_that_came(task, events):
    problem = Problem.of(snapshots(events, 86400), task, window=2, degree_cap=8)
    start = train(problem, build("roland", problem.width, 6), epochs=1, quiet=True, head_hidden=8)
    test = problem.told(problem.split.test)[:3]
    plain = evaluate(start.forecaster, problem, test)
    before = {key: value.clone() for key, value in start.forecaster.state_dict().items()}
    assert evaluate(start.forecaster, problem, test, live={"epochs": 0}) == plain
    live = {"epochs": 3, "lr": 0.02, "seed": 4}
    found = evaluate(start.forecaster, problem, test, live=live)
    assert found != plain
    for key, value in start.forecaster.state_dict().items():
        assert torch.equal(value, before[key])

    own, rows = copy.deepcopy(start.forecaster), []
    for t in test:
        rows.append(evaluate(own, problem, [t]))
        only = replace(problem, split=Split(range(t, t + 1), range(0), range(0)))
        own = train(only, own.model, head=own.head, quiet=True, **live).forecaster
    if task == "link":
        assert found["mrr_filtered"] == pytest.approx(np.mean([r["mrr_filtered"] for r in rows]))
    else:
        sizes = [len(problem.target(t).labels) for t in test]
        share = np.average([row["micro_f1"] for row in rows], weights=sizes)
        assert found["micro_f1"] == pytest.approx(share)


def unlabelled():
    return snapshots(Events.of([0, 1] * 20, [1, 2] * 20, np.arange(40)), 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda: Problem.of(unlabelled(), "edges"), "is not a task"),
        (lambda: Problem.of(unlabelled(), "edge"), "have no labels"),
        (lambda: Problem.of(unlabelled(), "node"), "have no labels"),
        (lambda: Problem.of(unlabelled(), window=-1), "window=-1"),
        (lambda: Problem.of(unlabelled(), window=2, adjacency_window=0), "adjacency_window=0"),
        (lambda: Problem.of(unlabelled(), window=18), "cannot be split"),
        (
            lambda: Problem.of(snapshots(Events.of([0, 1], [1, 2], [0, 30]), 1), window=2),
            "nothing to tell",
        ),
        (lambda: build("gat", 4), "is not a model"),
        (lambda: trained_with(policy="keep"), "not a state policy"),
        (lambda: trained_with("gcn", policy="carry"), "no state to carry"),
        (lambda: trained_with(policy="carry", truncation=0), "truncation=0"),
        (lambda: live_with(policy="carry"), "Live updates begin every window anew"),
        (lambda: trained_with(class_weights=(1, 0)), "class_weights"),
        (lambda: trained_with(measure="f1"), "is not measured here"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(change, sentence):
    with pytest.raises(RequestError, match=sentence):
        change()


def trained_with(name="evolvegcn-h", **options):
    problem = Problem.of(unlabelled(), window=2)
    return train(problem, build(name, problem.width, 3), epochs=1, quiet=True, **options)


def live_with(**options):
    problem = Problem.of(unlabelled(), window=2)
    forecaster = trained_with(**options).forecaster
    return evaluate(forecaster, problem, problem.split.test, live={"epochs": 1})
