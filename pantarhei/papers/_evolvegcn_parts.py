"""What the EvolveGCN recipe measures exactly: static weights, renamed nodes, parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pantarhei.data.events import Edges, NodeValues, Snapshots
from pantarhei.data.simulate.graphs import drift
from pantarhei.systems.evolving_graphs import GCN, EvolveGCN, Forecaster, Problem, build, graphs_of


def static_difference(windowed: Forecaster, problem: Problem) -> float:
    """Return the largest difference of a windowed -O to a GCN with the weights it ends in.

    The weights come from a window of the training part, the embeddings compared from the test.
    """
    model: Any = windowed.model
    gcn = GCN(model.dims).to(problem.device).eval()
    gcn.activations = model.activations
    with torch.no_grad():
        state = model.initial_state()
        for graph in problem.seen(problem.split.train.start):
            _, state = model.step(graph, state)
        for i, weight in enumerate(gcn.weights):
            weight.copy_(state[f"{i}.weight"])
        return max(
            float((model(seen).values - gcn(seen).values).abs().max())
            for seen in map(problem.seen, problem.split.test)
        )


def permuted(variant: str, seed: int) -> float:
    """Return the largest difference of the embeddings when the nodes get other numbers."""
    graph = drift(steps=4, nodes=60, seed=seed)
    rng = np.random.default_rng(seed)
    name = rng.permutation(graph.nodes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = EvolveGCN((16, 12, 8), variant)  # type: ignore[arg-type]
    nodes = torch.arange(graph.nodes - 60, graph.nodes)  # those of the last step
    with torch.no_grad():
        plain, renamed = model(graphs_of(graph)), model(graphs_of(_renamed(graph, name)))
    others = torch.from_numpy(name)[nodes]
    gap = plain.values[plain.rows(nodes)] - renamed.values[renamed.rows(others)]
    return float(gap.abs().max())


def parameter_spread(variant: str) -> int:
    """Return by how much the number of parameters differs between graphs of several sizes."""
    counts = []
    for steps, nodes in ((30, 40), (30, 400), (60, 40)):
        problem = Problem.of(drift(steps=steps, nodes=nodes), "node", window=2)
        model = build(f"evolvegcn-{variant}", problem.width, 8)
        model(problem.seen(9))
        counts.append(sum(p.numel() for p in model.parameters()))
    return max(counts) - min(counts)


def _renamed(graph: Snapshots, name: np.ndarray[Any, np.dtype[np.int64]]) -> Snapshots:
    edges, features = [], []
    for one, values in zip(graph.edges, graph.features or (), strict=True):
        source, target = name[one.source], name[one.target]
        order = np.lexsort((target, source))
        edges.append(Edges(source[order], target[order], one.weight[order]))
        order = np.argsort(name[values.nodes])
        features.append(NodeValues(name[values.nodes][order], values.values[order]))
    return Snapshots(graph.nodes, tuple(edges), features=tuple(features))
