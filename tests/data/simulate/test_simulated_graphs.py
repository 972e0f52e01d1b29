"""The generators of changing graphs have the distributions that they state."""

from __future__ import annotations

import numpy as np
import pytest

from pantarhei.data.simulate.graphs import drift, sbm
from pantarhei.errors import RequestError


def dense(edges, nodes):
    matrix = np.zeros((nodes, nodes), bool)
    matrix[edges.source, edges.target] = True
    return matrix


def test_the_block_model_has_its_densities_and_moves_a_few_nodes_a_step():
    graph = sbm(nodes=400, steps=6, moves=8, seed=3)
    before, side_before = None, None
    for edges, labels in zip(graph.edges, graph.labels, strict=True):
        linked, side = dense(edges, 400), labels.values
        assert (linked == linked.T).all() and not linked.diagonal().any()
        same = side[:, None] == side
        off = ~np.eye(400, dtype=bool)
        assert linked[same & off].mean() == pytest.approx(0.2, abs=0.01)
        assert linked[~same].mean() == pytest.approx(0.01, abs=0.003)
        if before is not None:
            moved = side != side_before
            assert moved.sum() == 8
            kept = ~moved[:, None] & ~moved
            assert (linked == before)[kept].all() and (linked != before)[moved].any(1).all()
        before, side_before = linked, side
    assert (sbm(50, 2, seed=1).edges[1].source == sbm(50, 2, seed=1).edges[1].source).all()


def test_the_papers_size_of_the_block_model():
    assert len(sbm(steps=1).edges[0]) == pytest.approx(97_417, rel=0.1)


def test_drift_turns_mixes_classes_unevenly_and_hides_them_from_the_degrees():
    graph = drift(steps=41, nodes=500, seed=0)
    degree, same, share = {0: [], 1: []}, [], []
    for step, (edges, x, y) in enumerate(
        zip(graph.edges, graph.features, graph.labels, strict=True)
    ):
        label = y.values
        assert (x.nodes == y.nodes).all() and x.nodes[0] == 500 * step
        centre = x.values[label == 1].mean(0) - x.values[label == 0].mean(0)
        angle = 2 * np.pi * step / 40
        expected = np.zeros(16)
        expected[:2] = 3.0 * np.cos(angle), 3.0 * np.sin(angle)
        assert np.abs(centre - expected).max() < 0.6
        u, v = edges.source - 500 * step, edges.target - 500 * step
        assert u.min() >= 0 and v.max() < 500
        counts = np.bincount(u, minlength=500)
        for kind in (0, 1):
            degree[kind].append(counts[label == kind].mean())
        same.append((label[u] == label[v]).mean())
        share.append(label.mean())
    assert np.mean(share) == pytest.approx(0.25, abs=0.01)
    assert np.mean(same) == pytest.approx(0.95, abs=0.01)
    assert np.mean(degree[0]) == pytest.approx(4, abs=0.1)
    assert np.mean(degree[1]) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sbm(p_in=1.5),
        lambda: sbm(nodes=1),
        lambda: sbm(nodes=10, moves=11),
        lambda: drift(minority=-0.1),
        lambda: drift(degree=400),
        lambda: drift(width=1),
    ],
)
def test_senseless_settings_are_refused(make):
    with pytest.raises(RequestError):
        make()
