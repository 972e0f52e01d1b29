r"""Training and judging forecasters of changing graphs, on whatever snapshots one has.

    problem = Problem.of(snapshots(read_events("calls.csv"), 86400), "link", window=10)
    trained = train(problem, build("evolvegcn-h", problem.width, hidden=50), epochs=20)
    evaluate(trained.forecaster, problem, problem.split.test)

At step t a forecaster sees the snapshots t - window to t. Tasks: ``"link"``, the edges of snapshot
t + 1; ``"edge"``, the labels of the edges of t (that an edge exists is seen, its label is not);
``"node"``, the labels of nodes at t.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pantarhei._fit_random import mix
from pantarhei.data.events import Snapshots, Split, degree_width, split, summed
from pantarhei.errors import RequestError, nearest
from pantarhei.fit import Batches, Fit, fit
from pantarhei.systems.evolving_graphs.baselines import GCN, GCNGRU, Roland, StaticMLP
from pantarhei.systems.evolving_graphs.graphs import Embedded, Graph, graphs_of
from pantarhei.systems.evolving_graphs.heads import NodeHead, PairHead, class_weighted_loss
from pantarhei.systems.evolving_graphs.metrics import Scores, average, classification, ranking
from pantarhei.systems.evolving_graphs.model import EvolveGCN
from pantarhei.systems.evolving_graphs.negatives import Sampling, negatives

Task = Literal["link", "edge", "node"]
Policy = Literal["restart", "carry"]
MODELS = ("evolvegcn-h", "evolvegcn-o", "gcn", "gcn-gru", "roland", "mlp")
_MEASURE = {"link": "map_as_coded", "edge": "f1_class_0", "node": "f1_class_1"}


class Target(NamedTuple):
    """What is to be told at step t: pairs (2, P) or nodes (P,), and their labels (P,)."""

    step: int
    of: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """A changing graph, what is to be told of it, and the parts of time that it is split into.

    ``graphs`` are the snapshots as tensors, ``edges`` their edges (2, m); ``width`` is that of the
    nodes' features, ``classes`` how many there are; ``window`` snapshots are seen before the last.
    Made by :meth:`of`.
    """

    task: Task
    snapshots: Snapshots
    graphs: tuple[Graph, ...]
    edges: tuple[Tensor, ...]
    split: Split
    window: int
    width: int
    classes: int

    @classmethod
    def of(
        cls,
        snapshots: Snapshots,
        task: Task = "link",
        *,
        window: int = 10,
        adjacency_window: int = 1,
        train: float = 0.7,
        validation: float = 0.1,
        parts: Split | None = None,
        degree_cap: int | None = None,
        width: int | None = None,
        weighted: bool = True,
        device: torch.device | str = "cpu",
    ) -> Problem:
        """Prepare snapshots for a task, split by shares of time or into the ``parts`` given.

        Without features of one's own a node has its one-hot out-degree, as wide as the training
        steps need (later larger degrees share the last place), or ``degree_cap`` if that is less: a
        gate of EvolveGCN costs the square of it. ``width`` gives it instead, to run a model that
        was trained elsewhere.

        ``adjacency_window``: each graph that is seen is the sum of the last so many snapshots
        (:func:`pantarhei.data.events.summed`); what is to be told stays that of one.

        Raises :class:`RequestError` for an unknown task, for labels that are not there, and where a
        part of the split has nothing to tell.
        """
        if task not in _MEASURE:
            raise RequestError(f"'{task}' is not a task: choose {', '.join(_MEASURE)}.")
        if task == "edge" and any(edges.label is None for edges in snapshots.edges):
            raise RequestError(f"The edges of '{snapshots.name}' have no labels to tell.")
        if task == "node" and snapshots.labels is None:
            raise RequestError(f"The nodes of '{snapshots.name}' have no labels to tell.")
        if window < 0:
            raise RequestError(f"window={window}: see 0 or more snapshots before the last.")
        parts = parts or split(len(snapshots), train, validation, first=window)
        visible = summed(snapshots, adjacency_window)
        if snapshots.features is not None:
            width = snapshots.features[0].values.shape[1]
        elif width is None:
            seen = degree_width(visible, range(parts.train.stop))
            width = max(2, seen if degree_cap is None else min(seen, degree_cap))
        problem = cls(
            task,
            snapshots,
            graphs_of(visible, degree_width=width, weighted=weighted, device=device),
            tuple(
                torch.stack([torch.from_numpy(e.source), torch.from_numpy(e.target)]).to(device)
                for e in snapshots.edges
            ),
            parts,
            window,
            width,
            2 if task == "link" else max(2, len(snapshots.classes)),
        )
        for name in ("train", "validation", "test"):
            part = getattr(parts, name)
            if part and not problem.told(part):
                raise RequestError(
                    f"'{snapshots.name}' has nothing to tell in its {name} part: use wider bins or "
                    "other shares."
                )
        return problem

    @property
    def device(self) -> torch.device:
        """Where the graphs lie."""
        return self.edges[0].device

    def told(self, part: Sequence[int]) -> list[int]:
        """Return the steps of a part at which there is something to tell."""
        if self.task == "node":
            labels = self.snapshots.labels or ()
            return [t for t in part if len(labels[t].nodes)]
        ahead = 1 if self.task == "link" else 0
        count = len(self.graphs)
        return [t for t in part if t + ahead < count and self.edges[t + ahead].shape[1]]

    def seen(self, step: int) -> tuple[Graph, ...]:
        """Return the window of a step."""
        return self.graphs[max(0, step - self.window) : step + 1]

    def target(self, step: int) -> Target:
        """Return what is to be told at a step; of links, only the edges that come."""
        if self.task == "link":
            edges = self.edges[step + 1]
            return Target(step, edges, torch.ones_like(edges[0]))
        device = self.edges[step].device
        if self.task == "edge":
            labels = torch.as_tensor(self.snapshots.edges[step].label)
            return Target(step, self.edges[step], labels.to(device))
        assert self.snapshots.labels is not None  # checked when it was made
        told = self.snapshots.labels[step]
        nodes, labels = torch.from_numpy(told.nodes), torch.as_tensor(told.values)
        return Target(step, nodes.to(device), labels.to(device))

    def with_negatives(
        self, target: Target, sampling: Sampling, per_edge: float, generator: torch.Generator
    ) -> Target:
        """Add pairs that are not edges of the next snapshot, labelled 0, to those that are."""
        step, edges, labels = target
        window = range(max(0, step - self.window), step + 1)
        none = negatives(
            sampling,
            edges,
            max(1, round(per_edge * edges.shape[1])),
            self.snapshots.nodes,
            active=torch.cat([self.graphs[t].nodes[self.graphs[t].active[:-1]] for t in window]),
            past=torch.cat(self.edges[: step + 1], 1),
            generator=generator,
        )
        both = torch.cat([edges, none], 1)
        return Target(step, both, torch.cat([labels, torch.zeros_like(none[0])]))


class Forecaster(nn.Module):
    """A model of snapshots, and a head that reads its embeddings.

    ``policy``: ``"restart"`` begins every window from the model's start (as the released code);
    ``"carry"`` keeps the recurrent state from the first snapshot on, which only models with
    ``step`` and ``initial_state`` can. The carried state lies in buffers, hence in ``state_dict``.
    """

    def __init__(self, model: nn.Module, head: PairHead | NodeHead, policy: Policy = "restart"):
        super().__init__()
        self.model, self.head, self.policy = model, head, policy
        self._keys: tuple[str, ...] = ()
        if policy not in ("restart", "carry"):
            raise RequestError(f"'{policy}' is not a state policy: choose restart or carry.")
        if policy == "carry":
            if not hasattr(model, "step"):
                raise RequestError(
                    f"{type(model).__name__} has no state to carry: use policy='restart'."
                )
            start: Mapping[str, Tensor] = model.initial_state()  # type: ignore[operator]
            self._keys = tuple(start)
            for key, value in start.items():
                self.register_buffer(self._buffer(key), value.detach().clone())

    @staticmethod
    def _buffer(key: str) -> str:
        return "carried_" + key.replace(".", "_")

    @property
    def carried(self) -> dict[str, Tensor]:
        """The state that training has come to; :meth:`follow` starts from the first snapshot."""
        return {key: getattr(self, self._buffer(key)) for key in self._keys}

    @carried.setter
    def carried(self, state: Mapping[str, Tensor]) -> None:
        for key, value in state.items():
            getattr(self, self._buffer(key)).copy_(value.detach())

    def logits(self, embedded: Embedded, of: Tensor) -> Tensor:
        """Return class scores (P, classes) of pairs (2, P) or nodes (P,)."""
        if isinstance(self.head, NodeHead):
            return self.head(embedded, of)
        return self.head(embedded, of[0], of[1])

    def loss(self, embedded: Embedded, target: Target, weights: Tensor) -> Tensor:
        """Return the class-weighted cross-entropy, a mean over what is to be told.

        Of links, pairs of the same two rows and label (there are many: a row can stand for all
        untouched nodes) are computed once and counted.
        """
        if isinstance(self.head, NodeHead):
            return class_weighted_loss(self.logits(embedded, target.of), target.labels, weights)
        size = len(embedded.values)
        rows = embedded.rows(target.of)
        key = (rows[0] * size + rows[1]) * len(weights) + target.labels
        key, counts = torch.unique(key, return_counts=True)
        pair, labels = key // len(weights), key % len(weights)
        logits = self.head.of_rows(embedded.values, pair // size, pair % size)
        return class_weighted_loss(logits, labels, weights, counts)

    def follow(self, problem: Problem, steps: Sequence[int]) -> Iterator[tuple[int, Embedded]]:
        """Yield the embeddings after each of some ascending steps, under the policy."""
        if self.policy == "restart":
            for step in steps:
                yield step, self.model(problem.seen(step))
            return
        state, wanted = self.model.initial_state(), set(steps)  # type: ignore[operator]
        for step in range(max(steps, default=-1) + 1):
            embedded, state = self.model.step(problem.graphs[step], state)  # type: ignore[operator]
            if step in wanted:
                yield step, embedded


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained forecaster, in evaluation mode, and how its training went."""

    forecaster: Forecaster
    fit: Fit
    measure: str

    @property
    def epochs(self) -> list[dict[str, float]]:
        """The rows of the history at which it was validated."""
        return [row for row in self.fit.history if f"validation_{self.measure}" in row]


def build(name: str, width: int, hidden: int = 50, layers: int = 2, seed: int = 0) -> nn.Module:
    """Return a model by name for ``width`` features, drawn with ``seed``.

    The names are evolvegcn-h, evolvegcn-o, gcn, gcn-gru, roland and mlp.

    As in the released code, EvolveGCN has a GRU in both variants, and RReLU follows every layer of
    every model: a ReLU of a small EvolveGCN can die, and with it all that comes before. Build one
    yourself for anything else.
    """
    dims = (width, *(hidden,) * layers)
    each: dict[str, Any] = {"activation": nn.RReLU, "activate_last": True}
    makers: dict[str, Callable[[], nn.Module]] = {
        "evolvegcn-h": lambda: EvolveGCN(dims, "h", "gru", **each),
        "evolvegcn-o": lambda: EvolveGCN(dims, "o", "gru", **each),
        "gcn": lambda: GCN(dims, **each),
        "gcn-gru": lambda: GCNGRU(dims, activation=nn.RReLU),
        "roland": lambda: Roland(dims, activation=nn.RReLU),
        "mlp": lambda: StaticMLP(dims, activation=nn.RReLU),
    }
    if name not in makers:
        raise RequestError(
            f"'{name}' is not a model: choose {', '.join(MODELS)}.{nearest(name, MODELS)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return makers[name]()


def train(
    problem: Problem,
    model: nn.Module,
    *,
    policy: Policy = "restart",
    truncation: int = 8,
    head: PairHead | NodeHead | None = None,
    head_hidden: int = 100,
    epochs: int = 20,
    lr: float = 0.005,
    class_weights: Sequence[float] | None = None,
    sampling: Sampling = "uniform",
    negatives_per_edge: float = 20,
    measure: str | None = None,
    keep: Literal["best", "last"] = "best",
    patience: int | None = None,
    schedule: Literal["constant", "cosine"] = "constant",
    clip: float | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    label: str = "training",
    quiet: bool = False,
) -> Trained:
    r"""Train ``model`` (any module ``model(graphs) -> Embedded``) and a head for a problem.

    One update is one step of time, in an order drawn anew for each epoch (one Adam over model and
    head; the released code's two Adams of equal rate are the same, as Adam treats every weight by
    itself). With ``policy="carry"`` an update is ``truncation`` consecutive steps, through which
    gradients run; the state goes on to the next update and returns to the start with each epoch.

    Args:
        problem: What to tell.
        model: Trained in place. Its output's width decides the head's.
        policy: See :class:`Forecaster`.
        truncation: Steps of time in an update of ``"carry"``.
        head: Made anew from ``head_hidden`` and ``seed`` unless given.
        head_hidden: Width of the head's hidden layer.
        epochs: At most so many times through the training steps; validated after each.
        lr: Adam's rate.
        class_weights: Of the loss, by class; default (0.1, 0.9) for links, equal otherwise.
        sampling: Which pairs are not edges (:func:`negatives`), for links. The released code's
            ``"smart"`` teaches models that remember the window's nodes to rank all others first.
        negatives_per_edge: How many of them.
        measure: What is validated; default ``map_as_coded`` for links, ``f1_class_0`` for edges,
            ``f1_class_1`` for nodes, as in the released code.
        keep: The weights of the epoch with the best ``measure``, or the last ones: better where the
            validation part is not like the test, as within a cycle longer than it is. Without a
            validation part the last.
        patience: Stop after so many epochs without a new best.
        schedule: Of the rate, as in :func:`pantarhei.fit.fit`.
        clip: Largest norm of the gradient.
        seed: Decides everything drawn.
        checkpoint: A folder from which a killed training goes on.
        label: For the progress display.
        quiet: Show none.

    Raises:
        RequestError: For what contradicts itself, and where the loss is no longer finite.

    >>> from pantarhei.data.simulate.graphs import drift
    >>> problem = Problem.of(drift(steps=12, nodes=40), "node", window=2, train=0.5, validation=0.2)
    >>> trained = train(problem, build("gcn", problem.width, 8), epochs=2, quiet=True)
    >>> sorted(evaluate(trained.forecaster, problem, problem.split.test))
    ['balanced_accuracy', 'f1_class_0', 'f1_class_1', 'micro_f1']
    """
    measure = measure or _MEASURE[problem.task]
    weights = torch.tensor(_class_weights(problem, class_weights), device=problem.device)
    forecaster = Forecaster(model, head or _head(problem, model, head_hidden, seed), policy)

    def draw(n: int, steps: Sequence[int]) -> list[Target]:
        generator = torch.Generator(problem.device).manual_seed(mix(seed, "pairs", n))
        targets = [problem.target(t) for t in steps]
        if problem.task != "link":
            return targets
        return [
            problem.with_negatives(target, sampling, negatives_per_edge, generator)
            for target in targets
        ]

    if policy == "restart":
        updates, batch, loss = _windows(problem, draw, weights, seed)
    else:
        updates, batch, loss = _stretches(problem, draw, weights, truncation)
    held = problem.told(problem.split.validation)
    best: Any = "max" if keep == "best" and held else None

    def validate(forecaster: Any) -> dict[str, float]:
        found = evaluate(forecaster, problem, held)
        if measure not in found:
            raise RequestError(
                f"'{measure}' is not measured here: choose {', '.join(found)}."
                f"{nearest(measure, found)}"
            )
        return {measure: found[measure], **found}

    done = fit(
        forecaster,
        batch,
        loss,
        steps=epochs * updates,
        optimizer=torch.optim.Adam,
        lr=lr,
        clip=clip,
        validate=validate if held else None,
        validate_every=updates if held else None,
        best=best,
        patience=patience,
        schedule=schedule,
        checkpoint=checkpoint,
        checkpoint_every=updates,
        log_every=updates,
        seed=seed,
        precision="32",
        device=problem.device,
        label=label,
        quiet=quiet,
    )
    return Trained(forecaster, done, measure)


_Draw = Callable[[int, Sequence[int]], list[Target]]
_Update = tuple[int, Callable[[int], Any], Callable[[Any, Any], Tensor]]


def _windows(problem: Problem, draw: _Draw, weights: Tensor, seed: int) -> _Update:
    """Return the updates of an epoch: one window each, from the model's start."""
    steps = problem.told(problem.split.train)
    order = Batches(torch.tensor(steps), batch_size=1, seed=seed)

    def batch(n: int) -> Any:
        step = int(order(n)[0])
        return problem.seen(step), draw(n, [step])[0]

    def loss(forecaster: Forecaster, drawn: Any) -> Tensor:
        graphs, target = drawn
        return forecaster.loss(forecaster.model(graphs), target, weights)

    return len(steps), batch, loss


def _stretches(problem: Problem, draw: _Draw, weights: Tensor, truncation: int) -> _Update:
    """Return the updates of an epoch: stretches of time one after the other, the state goes on."""
    if truncation < 1:
        raise RequestError(f"truncation={truncation}: let gradients run through 1 step or more.")
    steps = problem.told(range(problem.split.train.stop))
    groups = [steps[i : i + truncation] for i in range(0, len(steps), truncation)]
    begins = [0, *(group[-1] + 1 for group in groups)]

    def batch(n: int) -> Any:
        place = n % len(groups)
        graphs = problem.graphs[begins[place] : begins[place + 1]]
        return begins[place], graphs, draw(n, groups[place])

    def loss(forecaster: Forecaster, drawn: Any) -> Tensor:
        begin, graphs, targets = drawn
        model: Any = forecaster.model
        # The buffers are written to before the backward pass: what it needs is a copy of them.
        carried = {key: value.clone() for key, value in forecaster.carried.items()}
        state = model.initial_state() if begin == 0 else carried
        due = {target.step: target for target in targets}
        losses = []
        for step, graph in enumerate(graphs, begin):
            embedded, state = model.step(graph, state)
            if step in due:
                losses.append(forecaster.loss(embedded, due[step], weights))
        forecaster.carried = state
        return torch.stack(losses).mean()

    return len(groups), batch, loss


def evaluate(
    forecaster: Forecaster,
    problem: Problem,
    steps: Sequence[int],
    live: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Return the measures over some steps: of links all four of :func:`ranking`, else of classes.

    Links are ranked among all ordered pairs of nodes, and averaged over the steps (each has as many
    pairs). Classes are counted over all steps together.

    ``live``: ROLAND's live updates. Once a step has been judged, what it had to tell is known, and
    the forecaster, a copy of the one given, is trained on it before the next: ``live`` has the
    arguments of :func:`train`, where an epoch is one update.
    """
    steps = problem.told(steps)
    if live is not None:
        forecaster = copy.deepcopy(forecaster)
    with torch.no_grad():
        followed = (
            forecaster.follow(problem, steps)
            if live is None
            else _updated(forecaster, problem, steps, live)
        )
        if problem.task == "link":
            head: Any = forecaster.head
            return average(
                (
                    ranking(head.scores(embedded, problem.snapshots.nodes), *problem.edges[t + 1])
                    for t, embedded in followed
                ),
                [1.0] * len(steps),
            )
        labels, predicted = [], []
        for t, embedded in followed:
            target = problem.target(t)
            labels.append(target.labels)
            predicted.append(forecaster.logits(embedded, target.of).argmax(-1))
    return classification(torch.cat(labels), torch.cat(predicted), problem.classes)


def _updated(
    forecaster: Forecaster, problem: Problem, steps: Sequence[int], live: Mapping[str, Any]
) -> Iterator[tuple[int, Embedded]]:
    """Yield the embeddings after each step, and train on the step before the next one."""
    if forecaster.policy != "restart":
        raise RequestError("Live updates begin every window anew: use policy='restart'.")
    for step in steps:
        yield from forecaster.follow(problem, [step])
        if step == steps[-1] or live.get("epochs") == 0:
            continue
        own = replace(problem, split=Split(range(step, step + 1), range(0), range(0)))
        with torch.enable_grad():
            train(own, forecaster.model, head=forecaster.head, **{"quiet": True, **live})


def evaluate_rule(
    rule: Callable[[Sequence[Tensor], int], Scores], problem: Problem, steps: Sequence[int]
) -> dict[str, float]:
    """Return the measures of links for a rule that learns nothing, such as ``edge_bank``.

    At step t it is given the edges of the snapshots 0 to t.
    """
    chosen = problem.told(steps)
    nodes = problem.snapshots.nodes
    found = (ranking(rule(problem.edges[: t + 1], nodes), *problem.edges[t + 1]) for t in chosen)
    return average(found, [1.0] * len(chosen))


def majority(problem: Problem, steps: Sequence[int]) -> dict[str, float]:
    """Return the measures of naming one class, the most frequent in training, for all.

    A problem without a training part has the most frequent of the steps that are judged.
    """
    judged = torch.cat([problem.target(t).labels for t in problem.told(steps)])
    known = problem.told(range(problem.split.train.stop))
    labels = torch.cat([problem.target(t).labels for t in known]) if known else judged
    common = int(torch.bincount(labels).argmax())
    return classification(judged, torch.full_like(judged, common), problem.classes)


def _class_weights(problem: Problem, given: Sequence[float] | None) -> list[float]:
    weights = list(given or ((0.1, 0.9) if problem.task == "link" else (1.0,) * problem.classes))
    if len(weights) != problem.classes or min(weights) <= 0:
        raise RequestError(
            f"class_weights={tuple(weights)}: give a positive one for each of {problem.classes} "
            "classes."
        )
    return weights


def _head(problem: Problem, model: nn.Module, hidden: int, seed: int) -> PairHead | NodeHead:
    """Return a new head as wide as what the model makes of the first snapshot."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(mix(seed, "head"))
        width = model.to(problem.device)(problem.graphs[:1]).values.shape[1]
        kind = NodeHead if problem.task == "node" else PairHead
        return kind(width, hidden, problem.classes)
