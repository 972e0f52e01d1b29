"""An epoch of EvolveGCN-H on Bitcoin OTC against the released algorithm written down plainly.

python benchmarks/evolving_graphs.py [--updates 5] [--validated 1] [--full] [--threads 1]

Both have the released settings (window 10, 33 units, head of 400, 100 negatives an edge, one-hot
degrees of the full range) and the same weights. An epoch is one update for each of the 85 training
steps and the scoring of all 34.6 million ordered pairs in each of the 14 validation steps.

plain   every node has a row; gates one by one; negatives drawn in a loop over a set; the head reads
        the concatenated embeddings of every pair, 100,000 pairs at a time; average precision by
        scikit-learn over all pairs; ranks by sorting every row that has an edge
ours    the library: rows for touched nodes alone, the head's first layer split, ranks counted

The plain one is slow: unless --full, a few updates and validations of it are timed and multiplied.
Printed are processor seconds, their ratios, and by how much the two differ in embeddings, MAP and
MRR. Ties, which the plain one leaves to the sort, are broken at random in it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from pantarhei.data import load
from pantarhei.data.events import snapshots
from pantarhei.systems.evolving_graphs import (
    EvolveGCN,
    Forecaster,
    PairHead,
    Problem,
    evaluate,
    train,
)

HIDDEN, HEAD, WINDOW, NEGATIVES, WEIGHTS, LR = 33, 400, 10, 100, (0.05, 0.95), 0.005
CHUNK = 100_000


class PlainGRU(nn.Module):
    """The matrix GRU, gate by gate."""

    def __init__(self, ours: nn.Module) -> None:
        super().__init__()
        self.w = nn.ParameterList(w.clone() for w in ours.from_input.detach())
        self.u = nn.ParameterList(u.clone() for u in ours.from_state.detach())
        self.b = nn.ParameterList(b.clone() for b in ours.bias.detach())

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Return the next state."""
        z = torch.sigmoid(self.w[0].matmul(x) + self.u[0].matmul(h) + self.b[0])
        r = torch.sigmoid(self.w[1].matmul(x) + self.u[1].matmul(h) + self.b[1])
        new = torch.tanh(self.w[2].matmul(x) + self.u[2].matmul(r * h) + self.b[2])
        return (1 - z) * h + z * new


class PlainEvolveGCN(nn.Module):
    """EvolveGCN-H with a row for every node, a layer over the whole window before the next."""

    def __init__(self, ours: EvolveGCN) -> None:
        super().__init__()
        self.start = nn.ParameterList(w.detach().clone() for w in ours.start)
        self.cells = nn.ModuleList(PlainGRU(cell) for cell in ours.cells)
        self.direction = nn.ParameterList(s.direction.detach().clone() for s in ours.summaries)

    def forward(self, window: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Return the embeddings of all nodes after the window."""
        hidden = [x for _, x, _ in window]
        for start, cell, p in zip(self.start, self.cells, self.direction, strict=True):
            weight, out = start, []
            for (adjacency, _, mask), x in zip(window, hidden, strict=True):
                score = x.matmul(p) / p.norm() + mask
                best = score.topk(weight.shape[1]).indices
                best = best[score[best] > -np.inf]
                if len(best) < weight.shape[1]:
                    fill = best[-1:].repeat(weight.shape[1] - len(best))
                    best = torch.cat([best, fill])
                picked = x.to_dense()[best] if x.is_sparse else x[best]
                weight = cell((picked * torch.tanh(score[best])[:, None]).t(), weight)
                out.append(torch.relu(adjacency.matmul(x.matmul(weight))))
            hidden = out
        return hidden[-1]


class PlainHead(nn.Module):
    """The perceptron on the concatenation of two embeddings."""

    def __init__(self, ours: PairHead) -> None:
        super().__init__()
        joint = torch.cat([ours.source.weight, ours.target.weight], 1)
        self.first = nn.Linear(joint.shape[1], joint.shape[0])
        self.last = nn.Linear(joint.shape[0], 2)
        with torch.no_grad():
            self.first.weight.copy_(joint)
            self.first.bias.copy_(ours.source.bias)
            self.last.weight.copy_(ours.last.weight)
            self.last.bias.copy_(ours.last.bias)

    def forward(self, nodes: Tensor, pairs: Tensor) -> Tensor:
        """Return the class scores of pairs (2, P)."""
        parts = pairs.split(CHUNK, 1)
        return torch.cat(
            [
                self.last(torch.relu(self.first(torch.cat([nodes[u], nodes[v]], 1))))
                for u, v in parts
            ]
        )


def plain_snapshots(problem: Problem) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return adjacency, one-hot degrees and mask with a row for each node."""
    nodes, made = problem.snapshots.nodes, []
    eye = torch.arange(nodes)
    for edges in problem.snapshots.edges:
        u = torch.cat([torch.from_numpy(edges.source), eye])
        v = torch.cat([torch.from_numpy(edges.target), eye])
        w = torch.cat([torch.from_numpy(edges.weight).float(), torch.ones(nodes)])
        scale = torch.zeros(nodes).index_add(0, u, w).rsqrt()
        adjacency = torch.sparse_coo_tensor(
            torch.stack([u, v]), w * scale[u] * scale[v], check_invariants=False
        )
        degree = torch.bincount(torch.from_numpy(edges.source), minlength=nodes)
        place = torch.stack([eye, degree.clamp(max=problem.width - 1)])
        one_hot = torch.sparse_coo_tensor(
            place, torch.ones(nodes), (nodes, problem.width), check_invariants=False
        )
        mask = torch.full((nodes,), -torch.inf)
        mask[torch.from_numpy(edges.active)] = 0
        made.append((adjacency.coalesce(), one_hot.coalesce(), mask))
    return made


def plain_negatives(edges: Tensor, active: Tensor, nodes: int, rng: np.random.Generator) -> Tensor:
    """Draw smart negatives one by one."""
    wanted = NEGATIVES * edges.shape[1]
    true = {int(u) * nodes + int(v) for u, v in edges.t()}
    sources = rng.choice(edges[0].numpy(), 4 * wanted)
    targets = rng.choice(active.numpy(), 4 * wanted)
    taken: set[int] = set()
    chosen = []
    for u, v in zip(sources, targets, strict=True):
        key = int(u) * nodes + int(v)
        if u == v or key in true or key in taken:
            continue
        taken.add(key)
        chosen.append((u, v))
        if len(chosen) == wanted:
            break
    return torch.from_numpy(np.array(chosen).T.copy())


def plain_update(model, head, optimizers, problem, graphs, step, rng) -> None:
    edges = problem.edges[step + 1]
    window = range(step - WINDOW, step + 1)
    active = torch.cat([torch.from_numpy(problem.snapshots.edges[t].active) for t in window])
    none = plain_negatives(edges, active, problem.snapshots.nodes, rng)
    pairs = torch.cat([edges, none], 1)
    labels = torch.cat([torch.ones_like(edges[0]), torch.zeros_like(none[0])])
    logits = head(model([graphs[t] for t in window]), pairs)
    each = nn.functional.cross_entropy(logits, labels, reduction="none")
    loss = (torch.tensor(WEIGHTS)[labels] * each).mean()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def plain_validation(model, head, problem, graphs, step, rng) -> tuple[float, float]:
    """Score every ordered pair of nodes, and return MAP and MRR of one step."""
    nodes = problem.snapshots.nodes
    with torch.no_grad():
        embedded = model([graphs[t] for t in range(step - WINDOW, step + 1)])
        every = torch.arange(nodes)
        scores = []
        for u in every.split(CHUNK // nodes):
            logits = head(embedded, torch.cartesian_prod(u, every).t())
            scores.append(logits[:, 1] - logits[:, 0])
        score = torch.cat(scores).numpy()
    truth = np.zeros((nodes, nodes), np.int8)
    truth[tuple(problem.edges[step + 1].numpy())] = 1
    average_precision = average_precision_score(truth.ravel(), score)
    table, ranks = score.reshape(nodes, nodes), []
    for row in range(nodes):
        if truth[row].any():
            order = np.lexsort((rng.random(nodes), -table[row]))
            ranks.append((1 / (1 + np.flatnonzero(truth[row][order]))).mean())
    return float(average_precision), float(np.mean(ranks))


def clocked(run, repeats) -> tuple[float, list]:
    began, out = time.process_time(), []
    for item in repeats:
        out.append(run(item))
    return time.process_time() - began, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--validated", type=int, default=1)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    graph = snapshots(load("bitcoin_otc"), 1_200_000, symmetric=True)
    problem = Problem.of(graph, "link", window=WINDOW)
    ours = EvolveGCN((problem.width, HIDDEN, HIDDEN), "h", "gru", activate_last=True)
    head = PairHead(HIDDEN, HEAD)
    graphs = plain_snapshots(problem)
    steps, held = problem.told(problem.split.train), problem.told(problem.split.validation)
    print(
        f"{graph.nodes} nodes, {problem.width} degrees, {len(steps)} updates, {len(held)} validated"
    )

    def epoch(_: int) -> Forecaster:
        return train(
            problem, ours, head=head, epochs=1, lr=LR, class_weights=WEIGHTS,
            negatives_per_edge=NEGATIVES, sampling="smart", quiet=True,
        ).forecaster  # fmt: skip

    epoch_s, (forecaster,) = clocked(epoch, range(1))
    our_validation_s, _ = clocked(lambda _: evaluate(forecaster, problem, held), range(1))

    # The plain one goes on from the weights that this epoch came to: scores can be compared.
    plain, plain_head = PlainEvolveGCN(ours), PlainHead(head)
    some = held if options.full else held[: options.validated]
    validation_s, theirs = clocked(
        lambda t: plain_validation(plain, plain_head, problem, graphs, t, rng), some
    )
    validation_s *= len(held) / len(some)
    found = [evaluate(forecaster, problem, [t]) for t in some]
    window = range(held[0] - WINDOW, held[0] + 1)
    with torch.no_grad():
        a, b = plain([graphs[t] for t in window]), ours(problem.seen(held[0]))
        gap = (a - b.values[b.rows(torch.arange(graph.nodes))]).abs().max() / a.abs().max()

    optimizers = [torch.optim.Adam(m.parameters(), lr=LR) for m in (plain, plain_head)]
    some_steps = steps if options.full else [int(t) for t in rng.choice(steps, options.updates)]
    update_s, _ = clocked(
        lambda t: plain_update(plain, plain_head, optimizers, problem, graphs, t, rng), some_steps
    )
    update_s *= len(steps) / len(some_steps)

    rest_s = epoch_s - our_validation_s
    for name, plain_s, our_s in (
        ("training", update_s, rest_s),
        ("validation", validation_s, our_validation_s),
        ("epoch", update_s + validation_s, epoch_s),
    ):
        print(f"{name:11} plain {plain_s:9.1f} s   ours {our_s:7.2f} s   {plain_s / our_s:8.1f} x")
    if not options.full:
        print(f"plain: {len(some_steps)} updates and {len(some)} validated, multiplied to an epoch")
    print(f"embeddings differ by {gap:.1e} of the largest")
    for (their_map, their_mrr), our in zip(theirs, found, strict=True):
        print(
            f"MAP {their_map:.6f} and {our['map_as_coded']:.6f}, "
            f"MRR {their_mrr:.5f} and {our['mrr_as_coded']:.5f}"
        )


if __name__ == "__main__":
    main()
