"""What ``pantarhei graph-forecast`` does: train on a user's events, judge, and predict edges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pantarhei.data.events import Events, Snapshots, Split, snapshots
from pantarhei.devices import chosen_device
from pantarhei.errors import RequestError, nearest
from pantarhei.outcome import Outcome
from pantarhei.systems import _saved
from pantarhei.systems.evolving_graphs import (
    MODELS,
    BlockScores,
    Forecaster,
    PairHead,
    Problem,
    Trained,
    build,
    edge_bank,
    evaluate,
    evaluate_rule,
    majority,
    preferential_attachment,
    train,
)
from pantarhei.systems.evolving_graphs.graphs import rows_of

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_BINS = 50  # that the time is cut into unless a width is given
_WEIGHTS = "forecaster.safetensors"


@dataclass(frozen=True)
class Settings:
    """What has to be known to run a saved forecaster on other events."""

    model: str
    task: str
    bin: float
    symmetric: bool
    window: int
    width: int
    hidden: int
    head_hidden: int
    classes: tuple[str, ...]
    policy: str
    adjacency_window: int = 1


def seconds(text: str) -> float:
    """Read a width of time: a number, or one with s, m, h, d or w after it (of seconds).

    >>> seconds("36h"), seconds("0.5")
    (129600.0, 0.5)
    """
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _SECONDS else (text, "s")
    try:
        value = float(number) * _SECONDS[unit]
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise RequestError(f"--bin {text}: give a positive number, or one such as 12h, 7d or 2w.")
    return value


@dataclass(frozen=True, eq=False)
class Learned:
    """What :func:`learn` found, and the forecaster that :func:`save` keeps."""

    outcome: Outcome
    forecaster: Forecaster
    settings: Settings


def learn(
    events: Events,
    *,
    task: str = "link",
    model: str = "evolvegcn-h",
    against: Sequence[str] = MODELS,
    bin: str | None = None,
    symmetric: bool = False,
    window: int = 5,
    adjacency_window: int = 1,
    policy: str = "restart",
    hidden: int = 32,
    head_hidden: int = 64,
    degree_cap: int = 64,
    top: int = 100,
    device: str = "auto",
    seed: int = 0,
    **training: Any,
) -> Learned:
    """Train a model and its rivals alike, measure all on the last fifth of time, predict edges.

    ``training`` are further arguments of :func:`pantarhei.systems.evolving_graphs.train`.
    """
    if task == "node":
        raise RequestError("An event list has no labels of nodes: the tasks are link and edge.")
    for name in (model, *against):
        if name not in MODELS:
            raise RequestError(
                f"'{name}' is not a model: choose {', '.join(MODELS)}.{nearest(name, MODELS)}"
            )
    where = chosen_device(device)
    span = float(events.time[-1] - events.time[0])
    width = seconds(bin) if bin else (span / _BINS or 1.0)
    graph = snapshots(events, width, symmetric=symmetric)
    told: Any = task
    problem = Problem.of(
        graph,
        told,
        window=window,
        adjacency_window=adjacency_window,
        degree_cap=degree_cap or None,
        device=where,
    )
    found: dict[str, Trained] = {}
    for name in dict.fromkeys((model, *against)):
        found[name] = train(
            problem,
            build(name, problem.width, hidden, seed=seed),
            policy=policy if name == model else "restart",  # type: ignore[arg-type]
            head_hidden=head_hidden,
            seed=seed,
            label=name,
            **training,
        )
    settings = Settings(
        model, task, width, symmetric, window, problem.width, hidden, head_hidden,
        graph.classes, policy, adjacency_window,
    )  # fmt: skip
    return Learned(_told(found, model, problem, top), found[model].forecaster, settings)


def _told(found: Mapping[str, Trained], model: str, problem: Problem, top: int) -> Outcome:
    """Measure what was trained beside the rules, and predict what comes."""
    test, graph = problem.split.test, problem.snapshots
    rows = [{"model": n, **evaluate(t.forecaster, problem, test)} for n, t in found.items()]
    rows += _rules(problem, test)
    facts = _facts(problem) | _verdict(rows, model, problem.task)
    curves = {
        "training": [{"model": n, **row} for n, t in found.items() for row in t.epochs],
        "snapshots": _sizes(graph),
    }
    if problem.task == "link":
        curves["next"] = next_edges(found[model].forecaster, problem, top)
        facts["predicted_edges"] = len(curves["next"])
    return Outcome(f"{problem.task} on {graph.name}, {len(test)} test steps", rows, facts, curves)


def judge(events: Events, folder: str, device: str = "auto") -> Outcome:
    """Measure a saved forecaster on events, over every snapshot with a full window before it."""
    forecaster, settings = _load(folder)
    problem = _prepared(events, settings, forecaster, device)
    graph = problem.snapshots
    steps = range(settings.window, len(graph))
    if not problem.told(steps):
        raise RequestError(
            f"'{events.name}' has too few snapshots ({len(graph)}) to judge on: a window of "
            f"{settings.window} must lie before."
        )
    rows = [{"model": settings.model, **evaluate(forecaster, problem, steps)}]
    rows += _rules(problem, steps)
    facts = {
        "snapshots": len(graph),
        "nodes": graph.nodes,
        "judged_steps": len(problem.told(steps)),
    }
    facts |= _verdict(rows, settings.model, settings.task)
    return Outcome(f"{settings.task} on {events.name}", rows, facts, {"snapshots": _sizes(graph)})


def predict(events: Events, folder: str, top: int = 100, device: str = "auto") -> Outcome:
    """Predict the edges of the snapshot that follows the events, best first."""
    forecaster, settings = _load(folder)
    if settings.task != "link":
        raise RequestError(
            f"'{folder}' holds a forecaster of {settings.task} labels, not of links."
        )
    problem = _prepared(events, settings, forecaster, device)
    graph = problem.snapshots
    rows = next_edges(forecaster, problem, top)
    begin = graph.start + len(graph) * graph.width
    facts = {"from": begin, "to": begin + graph.width, "nodes": graph.nodes}
    return Outcome(f"Edges that follow {events.name}", rows, facts)


def next_edges(forecaster: Forecaster, problem: Problem, top: int) -> list[dict[str, Any]]:
    """Return the ``top`` ordered pairs of different nodes for the next snapshot, best first.

    Only pairs of nodes that the last window touches are listed: all others share one score. The
    score is the log-odds against the negatives of the training, so good for order only; ``seen``
    tells whether the pair was an edge before.
    """
    if top < 1:
        raise RequestError(f"--top {top}: ask for one edge or more.")
    graph = problem.snapshots
    with torch.no_grad():
        ((_, embedded),) = forecaster.follow(problem, [len(graph) - 1])
        head: Any = forecaster.head
        best, source, target = _best_pairs(head.scores(embedded, graph.nodes), top)
    names: Any = graph.names
    key = torch.unique(torch.cat([e[0] * graph.nodes + e[1] for e in problem.edges]))
    source, target = embedded.nodes[source], embedded.nodes[target]
    seen = rows_of(key, source * graph.nodes + target) < len(key)
    found = zip(source.tolist(), target.tolist(), best.tolist(), seen.tolist(), strict=True)
    return [
        {"source": str(names[u]), "target": str(names[v]), "score": round(score, 5), "seen": old}
        for u, v, score, old in found
    ]


def _best_pairs(scores: BlockScores, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best scores between different listed nodes, and the rows of both ends."""
    count = len(scores.counts) - 1  # without the row of all others
    device = scores.counts.device
    best = torch.zeros(0, device=device)
    place = torch.zeros(0, dtype=torch.int64, device=device)
    step = max(1, 2**22 // (count + 1))
    for start in range(0, count, step):
        block = scores.block(start, min(start + step, count))[:, :count].clone()
        line = torch.arange(len(block), device=device)
        block[line, line + start] = -math.inf
        both = torch.cat([best, block.flatten()])
        where = torch.cat([place, torch.arange(block.numel(), device=device) + start * count])
        best, chosen = both.topk(min(top, len(both)))
        place = where[chosen]
    kept = torch.isfinite(best)
    return best[kept], place[kept] // max(count, 1), place[kept] % max(count, 1)


def _rules(problem: Problem, steps: Sequence[int]) -> list[dict[str, Any]]:
    if problem.task == "edge":
        return [{"model": "majority", **majority(problem, steps)}]
    return [
        {"model": "edgebank", **evaluate_rule(edge_bank, problem, steps)},
        {
            "model": "last snapshot",
            **evaluate_rule(lambda seen, nodes: edge_bank(seen, nodes, 1), problem, steps),
        },
        {
            "model": "preferential attachment",
            **evaluate_rule(preferential_attachment, problem, steps),
        },
    ]


def _verdict(rows: Sequence[Mapping[str, Any]], model: str, task: str) -> dict[str, Any]:
    """Say, in the usual measure of the task, what was best and by how much it beats the model."""
    measure = "mrr_filtered" if task == "link" else "balanced_accuracy"
    best = max(rows, key=lambda row: row[measure])
    own = next(row[measure] for row in rows if row["model"] == model)
    return {"measure": measure, "best": best["model"], f"{model}_over_best": own / best[measure]}


def _facts(problem: Problem) -> dict[str, Any]:
    parts, graph = problem.split, problem.snapshots
    return {
        "nodes": graph.nodes,
        "snapshots": len(graph),
        "bin": graph.width,
        "train_steps": [parts.train.start, parts.train.stop - 1],
        "validation_steps": [parts.validation.start, parts.validation.stop - 1],
        "test_steps": [parts.test.start, parts.test.stop - 1],
    }


def _sizes(graph: Snapshots) -> list[dict[str, Any]]:
    return [
        {
            "step": t,
            "from": graph.start + t * graph.width,
            "active_nodes": len(edges.active),
            "edges": len(edges),
            "events": float(edges.weight.sum()),
        }
        for t, edges in enumerate(graph.edges)
    ]


def _prepared(events: Events, settings: Settings, forecaster: Forecaster, device: str) -> Problem:
    """Cut events as they were cut for the training, and bring the forecaster to the device."""
    where = chosen_device(device)
    forecaster.to(where)
    graph = snapshots(events, settings.bin, symmetric=settings.symmetric)
    if settings.task == "edge" and graph.classes != settings.classes:
        raise RequestError(
            f"'{events.name}' has the labels {', '.join(graph.classes) or 'none'}, and the "
            f"forecaster was trained on {', '.join(settings.classes)}."
        )
    return Problem.of(
        graph,
        settings.task,  # type: ignore[arg-type]
        window=settings.window,
        adjacency_window=settings.adjacency_window,
        parts=Split(range(0), range(0), range(0)),
        width=settings.width,
        device=where,
    )


def save(learned: Learned, folder: str | Path) -> None:
    """Keep a forecaster in a folder, for :func:`judge` and :func:`predict`."""
    about = asdict(learned.settings)
    tensors = learned.forecaster.state_dict()
    _saved.save(Path(folder), "forecaster", tensors, about, _WEIGHTS)


def _load(folder: str) -> tuple[Forecaster, Settings]:
    def restore(about: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Forecaster, Settings]:
        settings = Settings(**{**about, "classes": tuple(about["classes"])})
        return _restored(settings, tensors), settings

    return _saved.load(folder, "forecaster", restore, _WEIGHTS)


def _restored(settings: Settings, tensors: Mapping[str, Tensor]) -> Forecaster:
    model = build(settings.model, settings.width, settings.hidden)
    classes = 2 if settings.task == "link" else max(2, len(settings.classes))
    head = PairHead(settings.hidden, settings.head_hidden, classes)
    forecaster = Forecaster(model, head, settings.policy)  # type: ignore[arg-type]
    forecaster.load_state_dict(dict(tensors))
    return forecaster.eval()
