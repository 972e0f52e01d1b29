"""Measures of link prediction by hand, by sklearn, by drawing, and the rules that learn nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from pantarhei.data.events import Edges
from pantarhei.errors import RequestError
from pantarhei.systems.evolving_graphs import (
    BlockScores,
    Embedded,
    PairHead,
    SparseScores,
    average,
    class_weighted_loss,
    dense_scores,
    edge_bank,
    graph_of,
    metrics,
    negatives,
    preferential_attachment,
    ranking,
)


def random_truth(seed=0, nodes=30, density=0.1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(nodes, nodes, generator=generator) < density


def test_four_nodes_by_hand():
    s = torch.tensor(
        [[0.0, 0.9, 0.5, 0.1], [0.8, 0.0, 0.2, 0.3], [0.4, 0.6, 0.0, 0.7], [0.0, 0.0, 0.0, 0.0]]
    )
    found = ranking(dense_scores(s), torch.tensor([0, 0, 2]), torch.tensor([1, 3, 3]))
    # All pairs: 0.9 (true), 0.8, 0.7 (true), 0.6, 0.5, 0.4, 0.3, 0.2, 0.1 (true), ...
    assert found["map_as_coded"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 9) / 3)
    # Row 0: ranks 1 and 3 of 0.9, 0.5, 0.1, 0; row 2: rank 1
    assert found["mrr_as_coded"] == pytest.approx(((1 + 1 / 3) / 2 + 1) / 2)
    assert found["mrr_filtered"] == pytest.approx(((1 + 1 / 2) / 2 + 1) / 2)
    assert found["map_per_node"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


@pytest.mark.parametrize("levels", [5, 10**6])
def test_ties_and_all_agree_with_sklearn_and_with_drawing_the_order(levels):
    truth = random_truth()
    scores = torch.randint(0, levels, truth.shape, generator=torch.Generator().manual_seed(2))
    scores = scores.float()
    found = ranking(dense_scores(scores), *truth.nonzero().T)
    rows = [i for i in range(len(truth)) if truth[i].any()]
    assert found["map_as_coded"] == pytest.approx(
        average_precision_score(truth.flatten(), scores.flatten())
    )
    assert found["map_per_node"] == pytest.approx(
        np.mean([average_precision_score(truth[i], scores[i]) for i in rows])
    )
    plain, filtered = [], []
    rng = np.random.default_rng(0)
    for _ in range(300):
        for i in rows:
            order = np.lexsort((rng.random(30), -scores[i].numpy()))
            rank = np.flatnonzero(truth[i].numpy()[order])
            plain.append((1 / (rank + 1)).mean())
            filtered.append((1 / (rank - np.arange(len(rank)) + 1)).mean())
    assert found["mrr_as_coded"] == pytest.approx(np.mean(plain), rel=0.02)
    assert found["mrr_filtered"] == pytest.approx(np.mean(filtered), rel=0.02)


def test_a_perfect_scorer_is_one_but_for_the_unfiltered_rank():
    truth = random_truth()
    found = ranking(dense_scores(truth.float()), *truth.nonzero().T)
    sizes = [int(m) for m in truth.sum(1) if m]
    ceiling = np.mean([sum(1 / i for i in range(1, m + 1)) / m for m in sizes])
    for name in ("map_as_coded", "map_per_node", "mrr_filtered"):
        assert found[name] == pytest.approx(1.0, abs=1e-12)
    assert found["mrr_as_coded"] == pytest.approx(ceiling) and ceiling < 1


def test_a_constant_scorer_finds_the_density():
    truth = random_truth()
    found = ranking(dense_scores(torch.zeros(30, 30)), *truth.nonzero().T)
    assert found["map_as_coded"] == pytest.approx(float(truth.float().mean()))
    assert found["mrr_as_coded"] == pytest.approx(sum(1 / r for r in range(1, 31)) / 30)


def test_classes_of_equal_nodes_and_blocks_change_nothing(monkeypatch):
    """Twelve nodes of four kinds, by class and written out, in one block and in many."""
    kind = torch.tensor([0, 1, 1, 2, 3, 3, 3, 3, 0, 2, 2, 2])
    between = torch.randint(0, 6, (4, 4), generator=torch.Generator().manual_seed(1)).float()
    classes = BlockScores(torch.bincount(kind), lambda n: kind[n], lambda a, b: between[a:b])
    full = dense_scores(between[kind][:, kind])
    edges = random_truth(4, 12, 0.3).nonzero().T
    expected = ranking(full, *edges)
    assert ranking(classes, *edges) == pytest.approx(expected)
    monkeypatch.setattr(metrics, "_AT_ONCE", 9)
    assert ranking(classes, *edges) == pytest.approx(expected)
    assert ranking(full, *edges) == pytest.approx(expected)


def test_sparse_scores_are_dense_ones_with_zeros():
    generator = torch.Generator().manual_seed(3)
    stored = torch.randint(0, 4, (20, 20), generator=generator).float()
    stored *= torch.rand(20, 20, generator=generator) < 0.3
    u, v = stored.nonzero().T
    sparse = SparseScores(20, u, v, stored[u, v])
    edges = random_truth(5, 20, 0.15).nonzero().T
    assert ranking(sparse, *edges) == pytest.approx(ranking(dense_scores(stored), *edges))
    with pytest.raises(RequestError, match="positive"):
        SparseScores(20, u, v, -stored[u, v])


def test_bad_truth_and_bad_scores_are_refused():
    zero = torch.zeros(3, 3)
    none = torch.zeros(0, dtype=torch.int64)
    assert all(math.isnan(v) for v in ranking(dense_scores(zero), none, none).values())
    with pytest.raises(RequestError, match="twice"):
        ranking(dense_scores(zero), torch.tensor([0, 0]), torch.tensor([1, 1]))
    with pytest.raises(RequestError, match="not all finite"):
        ranking(dense_scores(zero * math.nan), torch.tensor([0]), torch.tensor([1]))
    steps = [{"a": 0.0, "b": 1.0}, {"a": 1.0, "b": math.nan}]
    assert average(steps, [1, 3]) == {"a": 0.75, "b": 1.0}


# The head


def graph_and_head():
    torch.manual_seed(0)
    e = Edges(np.array([1, 4, 6, 6]), np.array([4, 6, 1, 4]), np.ones(4))
    graph = graph_of(e, degree_width=4)
    return Embedded(torch.randn(4, 5), graph.nodes), PairHead(5, 7)


def test_the_split_first_layer_is_the_perceptron_on_the_pair():
    embedded, head = graph_and_head()
    u, v = torch.cartesian_prod(torch.arange(9), torch.arange(9)).T
    h = embedded.values[torch.tensor([3, 0, 3, 3, 1, 3, 2, 3, 3])]  # 1, 4 and 6 have rows
    joint = torch.cat([head.source.weight, head.target.weight], 1)
    hidden = torch.relu(torch.cat([h[u], h[v]], 1) @ joint.T + head.source.bias)
    expected = hidden @ head.last.weight.T + head.last.bias
    torch.testing.assert_close(head(embedded, u, v), expected)
    score = (expected[:, 1] - expected[:, 0]).reshape(9, 9)
    edges = random_truth(1, 9, 0.2).nonzero().T
    expected = ranking(dense_scores(score.mul(1e4).round()), *edges)  # equal nodes stay tied
    assert ranking(head.scores(embedded, 9), *edges) == pytest.approx(expected)


def test_the_loss_is_a_mean_over_pairs_and_not_over_weights():
    logits = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    labels, weights = torch.tensor([0, 0, 1, 0, 1, 0]), torch.tensor([0.1, 0.9])
    each = -torch.log_softmax(logits, 1)[torch.arange(6), labels] * weights[labels]
    torch.testing.assert_close(class_weighted_loss(logits, labels, weights), each.mean())
    counts = torch.tensor([1, 2, 1, 1, 3, 1])
    again = class_weighted_loss(
        logits.repeat_interleave(counts, 0), labels.repeat_interleave(counts), weights
    )
    torch.testing.assert_close(class_weighted_loss(logits, labels, weights, counts), again)


# Rules


def test_edge_bank_remembers_and_persistence_remembers_one_snapshot():
    seen = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[3], [0]])]
    full, last = torch.zeros(4, 4), torch.zeros(4, 4)
    full[[0, 1, 3], [1, 2, 0]] = 1
    last[3, 0] = 1
    edges = torch.tensor([[0, 3, 2], [1, 0, 2]])
    for bank, table in ((edge_bank(seen, 4), full), (edge_bank(seen, 4, 1), last)):
        assert ranking(bank, *edges) == pytest.approx(ranking(dense_scores(table), *edges))


def test_preferential_attachment_multiplies_degrees():
    seen = [torch.tensor([[0, 0, 1], [1, 2, 2]]), torch.tensor([[0], [2]])]
    table = torch.tensor([3.0, 1, 0, 0])[:, None] * torch.tensor([0.0, 1, 3, 0])
    edges = random_truth(2, 4, 0.4).nonzero().T
    found = ranking(preferential_attachment(seen, 4), *edges)
    assert found == pytest.approx(ranking(dense_scores(table), *edges))


# Negatives


def pairs(found):
    return list(map(tuple, found.T.tolist()))


def test_smart_negatives_follow_the_degrees_and_the_window():
    edges = torch.stack([torch.tensor([5] * 30 + [6] * 10), torch.arange(40) + 100])
    active = torch.tensor([7] * 3 + list(range(200, 1000)))
    generator = torch.Generator().manual_seed(0)
    drawn = [
        pair
        for _ in range(20)
        for pair in pairs(negatives("smart", edges, 200, 2000, active=active, generator=generator))
    ]
    assert np.mean([u == 5 for u, _ in drawn]) == pytest.approx(0.75, abs=0.03)
    assert {v for _, v in drawn} <= set(active.tolist())


@pytest.mark.parametrize("kind", ["smart", "uniform", "historical", "all"])
def test_no_negative_is_an_edge_a_loop_or_a_repeat(kind):
    edges = random_truth(0, 20, 0.2).nonzero().T
    past = random_truth(1, 20, 0.4).nonzero().T
    found = negatives(
        kind, edges, 100, 20, active=torch.arange(20), past=past,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    made = pairs(found)
    assert len(set(made)) == len(made) and all(u != v for u, v in made)
    assert not set(made) & set(pairs(edges))
    if kind == "all":
        loops = sum(u == v for u, v in pairs(edges))
        assert len(made) == 20 * 19 - (edges.shape[1] - loops)
    else:
        assert 50 < len(made) <= 100
    if kind == "historical":
        assert set(made) <= set(pairs(past))


def test_sampling_needs_what_it_draws_from():
    edges = torch.tensor([[0], [1]])
    for kind in ("smart", "historical", "other"):
        with pytest.raises(RequestError):
            negatives(kind, edges, 5, 10)
