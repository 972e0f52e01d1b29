r"""Changing graphs: communities that nodes leave, and a feature direction that turns.

Both return :class:`pantarhei.data.events.Snapshots`. The graphs are drawn, not solved for: each
docstring gives the distribution.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pantarhei.data.events import Edges, NodeValues, Snapshots
from pantarhei.errors import RequestError


def sbm(
    nodes: int = 1000,
    steps: int = 50,
    p_in: float = 0.2,
    p_out: float = 0.01,
    moves: int = 10,
    seed: int = 0,
) -> Snapshots:
    r"""Return a stochastic block model of two communities that nodes leave for the other.

    Every node starts in either community with equal chance. An undirected edge between u and v
    exists with ``p_in`` within a community and ``p_out`` across; both directions are stored. At
    every step ``moves`` random nodes change sides and only their edges are drawn anew (the
    construction of DynamicGEM's generator, from which EvolveGCN's SBM set was made). ``labels`` of
    the nodes are their communities.

    >>> graph = sbm(nodes=100, steps=3, seed=1)
    >>> len(graph), graph.nodes, 900 < len(graph.edges[0]) < 1200
    (3, 100, True)
    """
    _probabilities(p_in=p_in, p_out=p_out)
    if nodes < 2 or steps < 1 or not 0 <= moves <= nodes:
        raise RequestError(
            f"{nodes} nodes, {steps} steps and {moves} moves a step make no block model: take two "
            "nodes, one step or more, and at most as many moves as nodes."
        )
    rng = np.random.default_rng(seed)
    side = rng.integers(0, 2, nodes)

    def drawn(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        chance = np.where(side[rows, None] == side[None, :], p_in, p_out)
        return rng.random((len(rows), nodes)) < chance

    upper = np.triu(drawn(np.arange(nodes)), 1)
    linked = upper | upper.T
    edges, labels = [_edges(linked)], [NodeValues(np.arange(nodes), side.copy())]
    for _ in range(steps - 1):
        moved = rng.choice(nodes, moves, replace=False)
        side[moved] = 1 - side[moved]
        fresh = drawn(moved)
        # A pair of moved nodes has one edge, not two draws: the later of the two counts.
        fresh[:, moved] = np.triu(fresh[:, moved], 1)
        fresh[:, moved] |= fresh[:, moved].T
        linked[moved] = fresh
        linked[:, moved] = fresh.T
        edges.append(_edges(linked))
        labels.append(NodeValues(np.arange(nodes), side.copy()))
    return Snapshots(nodes, tuple(edges), "sbm (simulated)", ("0", "1"), labels=tuple(labels))


def drift(
    steps: int = 120,
    nodes: int = 500,
    minority: float = 0.25,
    degree: float = 4.0,
    same: float = 0.95,
    amplitude: float = 1.5,
    width: int = 16,
    period: float = 40.0,
    seed: int = 0,
) -> Snapshots:
    r"""Return graphs of ever new nodes whose classes are told apart by a direction that turns.

    At step t there are ``nodes`` nodes that no other step has, with labels :math:`y \in \{0, 1\}`,
    :math:`P(y = 1)` = ``minority``, and features

    .. math:: x = R(\omega t)\,(2y - 1)\,a\,e_1 + \varepsilon, \qquad
              \varepsilon \sim N(0, I_{\mathrm{width}}), \quad \omega = 2\pi/\mathrm{period},

    R a rotation in the plane of the first two features. No node shows its class without the phase
    :math:`\omega t`; the set of nodes does, for the classes are of unequal size. Edges follow a
    block model in which a node of either class has ``degree`` neighbours on average and the share
    ``same`` of the edges stays within a class: degrees tell nothing about the class.

    >>> graph = drift(steps=2, nodes=50)
    >>> graph.features[1].values.shape, graph.labels[1].nodes[:2].tolist(), graph.nodes
    ((50, 16), [50, 51], 100)
    """
    _probabilities(minority=minority, same=same)
    if steps < 1 or nodes < 4 or width < 2 or not 0 < degree < nodes / 4:
        raise RequestError(
            f"{steps} steps, {nodes} nodes, {width} features and degree {degree:g} make no drift: "
            "take a step, four nodes, two features or more, and a degree below a quarter of them."
        )
    rng = np.random.default_rng(seed)
    edges, features, labels = [], [], []
    for step in range(steps):
        label = (rng.random(nodes) < minority).astype(np.int64)
        label[:2] = 0, 1  # both classes, even in a small graph
        angle = 2 * np.pi * step / period
        values = rng.normal(size=(nodes, width))
        along = np.array([np.cos(angle), np.sin(angle)])
        values[:, :2] += amplitude * (2 * label - 1)[:, None] * along
        ids = np.arange(step * nodes, (step + 1) * nodes)
        chance = _class_chances(np.bincount(label, minlength=2), degree, same)
        upper = np.triu(rng.random((nodes, nodes)) < chance[label[:, None], label], 1)
        edges.append(_edges(upper | upper.T, step * nodes))
        features.append(NodeValues(ids, values.astype(np.float32)))
        labels.append(NodeValues(ids, label))
    return Snapshots(
        steps * nodes,
        tuple(edges),
        "drift (simulated)",
        ("0", "1"),
        tuple(features),
        tuple(labels),
    )


def _class_chances(sizes: NDArray[np.int64], degree: float, same: float) -> NDArray[np.float64]:
    """Return the chances of an edge by class, (2, 2), that give every class the same degree."""
    across = (1 - same) * degree * sizes.sum() / 2
    within = np.maximum(sizes * degree - across, 0) / np.maximum(sizes * (sizes - 1), 1)
    between = across / sizes.prod()
    return np.minimum(np.array([[within[0], between], [between, within[1]]]), 1)


def _edges(linked: NDArray[np.bool_], first: int = 0) -> Edges:
    source, target = np.nonzero(linked)
    return Edges(source + first, target + first, np.ones(len(source)))


def _probabilities(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise RequestError(f"{name}={value:g}: a probability is between 0 and 1.")
