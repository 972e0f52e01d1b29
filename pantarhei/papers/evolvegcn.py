"""EvolveGCN (arXiv 1902.10191): does it help to evolve the weights of a graph convolution?

The story: every model forecasts the next snapshot's edges (Bitcoin Alpha and OTC, UCI messages) or
tells the labels of a snapshot's edges, with a learning rate chosen on the validation part from the
same grid, the same updates and several seeds; beside them rules that learn nothing, and the same
with negatives drawn uniformly, for the released way of drawing them misleads models that remember
who was there. Then the drift
generator, where the classes can be told apart only by who knows the phase. Last, what must hold of
any EvolveGCN: it is the same whoever the nodes are, and windowed -O is a static GCN.

RReLU follows every layer and -O has a GRU, as in the released code; models are put in evaluation
mode, which it forgets. Ties count as a random order of the tied (``metrics``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec
from pantarhei.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from pantarhei.systems.evolving_graphs import Forecaster, Problem
    from pantarhei.systems.evolving_graphs.metrics import Scores

_REAL = ("cpu", "gpu")  # the scales at which the sets of the sheet's claims are read

CLAIMS = (
    ClaimSpec(
        "links",
        "on the bitcoin sets EvolveGCN forecasts links better than GCN and GCN-GRU",
        "MRR as coded, best of -H and -O over best of the two, worse of the sets",
        ">=",
        dict.fromkeys(_REAL, 1.2),
        "39 on BC-OTC (.0968 over .0025), 38 on BC-Alpha (.1185 over .0031)",
    ),
    ClaimSpec(
        "edges-over-gcn",
        "on the bitcoin sets EvolveGCN labels edges better than GCN",
        "micro F1 of the best of -H and -O minus GCN's, points, worse of the sets",
        ">=",
        dict.fromkeys(_REAL, 0.5),
        "above, in bars without figures",
    ),
    ClaimSpec(
        "edges-over-gcn-gru",
        "on the bitcoin sets EvolveGCN labels edges as well as GCN-GRU or better",
        "micro F1 of the best of -H and -O minus GCN-GRU's, points, worse of the sets",
        ">=",
        dict.fromkeys(_REAL, 0.0),
        "above, in bars without figures",
    ),
    ClaimSpec(
        "drift-h",
        "where the meaning of features turns, -H follows and GCN does not",
        "balanced accuracy of -H minus GCN's",
        ">=",
        0.15,
    ),
    ClaimSpec(
        "drift-o-is-static",
        "windowed -O is no better and no worse there than the static GCN that it is",
        "distance of the balanced accuracies of windowed -O and GCN",
        "<=",
        0.03,
    ),
    ClaimSpec(
        "windowed-o-is-gcn",
        "trained windowed -O equals a GCN with its last weights, whatever the window",
        "largest difference of the embeddings over the test",
        "<=",
        1e-6,
    ),
    ClaimSpec(
        "any-nodes",
        "renaming the nodes renames the output and changes nothing else",
        "largest difference of the embeddings after a permutation, both variants",
        "<=",
        1e-6,
    ),
    ClaimSpec(
        "any-length",
        "the number of parameters depends neither on the number of steps nor on the nodes",
        "difference of the numbers of parameters for 30 and 60 steps of 40 and 400 nodes",
        "<=",
        0.0,
    ),
)

# Rates are chosen on the validation part with the first seed. An epoch is one update for each step
# of the training part (75 to 85). On one thread an epoch of links takes 1 (GCN) to 4 s (GCN-GRU).
# ROLAND's model takes 7 s and is left out at cpu. "uniform" stands for other negatives than the
# released ones.
# On the drift windowed -O learns late: after 12 epochs it is behind GCN on the training part too.
SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "studies": ("sbm link",),
        "models": ("evolvegcn-h", "evolvegcn-o", "gcn", "gcn-gru", "roland", "mlp"),
        "rates": (0.01,),
        "seeds": 1,
        "epochs": 3,
        "edge_epochs": 3,
        "patience": 100,
        "hidden": 16,
        "head_hidden": 32,
        "negatives": 5.0,
        "degree_cap": 0,
        "released": False,
        "drift_models": ("evolvegcn-h", "evolvegcn-o", "gcn", "evolvegcn-o carry"),
        "drift_seeds": 1,
        "drift_epochs": 20,
        "drift_nodes": 500,
    },
    "cpu": {
        "studies": (
            "bitcoin_alpha link",
            "bitcoin_otc link",
            "uci link",
            "bitcoin_alpha link uniform",
            "bitcoin_alpha edge",
            "bitcoin_otc edge",
        ),
        "models": ("evolvegcn-h", "evolvegcn-o", "gcn", "gcn-gru", "mlp"),
        "rates": (0.002, 0.01),
        "seeds": 3,
        "epochs": 4,
        "edge_epochs": 8,
        "patience": 100,
        "hidden": 50,
        "head_hidden": 100,
        "negatives": 20.0,
        "degree_cap": 64,
        "released": False,
        "drift_models": (
            "evolvegcn-h",
            "evolvegcn-o",
            "gcn",
            "gcn-gru",
            "mlp",
            "evolvegcn-o carry",
            "evolvegcn-h carry",
        ),
        "drift_seeds": 3,
        "drift_epochs": 20,
        "drift_nodes": 500,
    },
    "gpu": {
        "studies": (
            "bitcoin_alpha link",
            "bitcoin_otc link",
            "uci link",
            "sbm link",
            "bitcoin_alpha link uniform",
            "bitcoin_otc link uniform",
            "bitcoin_alpha edge",
            "bitcoin_otc edge",
        ),
        "models": ("evolvegcn-h", "evolvegcn-o", "gcn", "gcn-gru", "roland", "mlp"),
        "rates": (0.001, 0.005, 0.02),
        "seeds": 5,
        "epochs": 200,
        "edge_epochs": 200,
        "patience": 50,
        "hidden": 100,
        "head_hidden": 100,
        "negatives": 100.0,
        "degree_cap": 0,
        "released": True,
        "drift_models": (
            "evolvegcn-h",
            "evolvegcn-o",
            "gcn",
            "gcn-gru",
            "mlp",
            "evolvegcn-o carry",
            "evolvegcn-h carry",
        ),
        "drift_seeds": 5,
        "drift_epochs": 40,
        "drift_nodes": 500,
    },
}

# Of the released code, by study: snapshots seen before the last, class weights, negatives per edge,
# and for -H and -O: rate, width of the layers, width of the head. Used where ``released``.
RELEASED: dict[str, dict[str, Any]] = {
    "sbm link": {
        "window": 5,
        "weights": (0.1, 0.9),
        "negatives": 50,
        "evolvegcn-h": (0.01, 50, 100),
        "evolvegcn-o": (0.005, 51, 565),
    },
    "bitcoin_otc link": {
        "window": 10,
        "weights": (0.05, 0.95),
        "negatives": 100,
        "evolvegcn-h": (0.005, 33, 400),
        "evolvegcn-o": (0.01, 100, 400),
    },
    "bitcoin_alpha link": {
        "window": 10,
        "weights": (0.1, 0.9),
        "negatives": 100,
        "evolvegcn-h": (0.005, 50, 100),
        "evolvegcn-o": (0.005, 100, 400),
    },
    "uci link": {
        "window": 10,
        "weights": (0.1, 0.9),
        "negatives": 50,
        "evolvegcn-h": (0.001, 100, 100),
        "evolvegcn-o": (0.001, 100, 100),
    },
    "bitcoin_otc edge": {
        "window": 10,
        "weights": (0.8, 0.2),
        "negatives": 0,
        "evolvegcn-h": (0.001, 50, 100),
        "evolvegcn-o": (0.001, 32, 316),
    },
    "bitcoin_alpha edge": {
        "window": 10,
        "weights": (0.8, 0.2),
        "negatives": 0,
        "evolvegcn-h": (0.001, 100, 200),
        "evolvegcn-o": (0.001, 122, 77),
    },
}
_BIN = {"bitcoin_otc": 1_200_000, "bitcoin_alpha": 1_200_000, "uci": 190_080}  # seconds


def recipe(run: Run) -> Iterator[Claim]:
    """Links and labels of edges, then drift, then what must hold exactly."""
    rows: list[dict[str, Any]] = []
    for name in run.settings.studies:
        rows += study(run, name, rows)
    yield from compare(run, rows)
    yield from drifting(run)
    yield from exactly(run)


def problem_of(run: Run, name: str) -> Problem:
    """Read or simulate the snapshots of a study and split them as the released code does."""
    from pantarhei.data import load
    from pantarhei.data.events import snapshots
    from pantarhei.data.simulate.graphs import sbm
    from pantarhei.systems.evolving_graphs import Problem

    window = _released(name)["window"]
    data, task = name.split()[:2]
    if data == "sbm":
        full = run.scale == "gpu"
        graph = sbm(seed=run.seed) if full else sbm(nodes=200, steps=30, moves=4, seed=run.seed)
    else:
        events = load("uci_messages" if data == "uci" else data)  # type: ignore[call-overload]
        graph = snapshots(events, _BIN[data], symmetric=data != "uci")
    return Problem.of(
        graph,
        task,  # type: ignore[arg-type]
        window=window,
        train=0.71 if data == "uci" else 0.7,
        degree_cap=run.settings.degree_cap or None,
        device=run.device,
    )


def _released(name: str) -> dict[str, Any]:
    """Return the released settings of a study, whatever its negatives."""
    from pantarhei.errors import RequestError, nearest

    known = " ".join(name.split()[:2])
    if known not in RELEASED:
        raise RequestError(
            f"'{name}' is not a study: choose {', '.join(RELEASED)}.{nearest(name, RELEASED)}"
        )
    return RELEASED[known]


def study(run: Run, name: str, before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measure every rule and model of one study; write ``studies.csv`` as it grows."""
    from pantarhei.systems.evolving_graphs import evaluate

    problem = problem_of(run, name)
    rows = [{"study": name, **row} for row in rules(problem)]
    run.metrics("studies", [*before, *rows])
    for model in run.settings.models:
        rates = run.settings.rates
        if run.settings.released and model in _released(name):
            rates = (_released(name)[model][0],)
        tried = {rate: trained(run, name, problem, model, rate, 0) for rate in rates}
        best = max(rates, key=lambda rate: _validated(tried[rate]))
        for seed in range(run.settings.seeds):
            found = tried[best] if seed == 0 else trained(run, name, problem, model, best, seed)
            measures = evaluate(found.forecaster, problem, problem.split.test)
            parameters = sum(p.numel() for p in found.forecaster.parameters())
            rows.append(
                {"study": name, "model": model, "seed": seed, "rate": best}
                | {"best_epoch": found.fit.best_step / (found.fit.step / len(found.epochs))}
                | {"parameters": parameters, "validated": found.fit.best, **measures}
            )
            run.metrics("studies", [*before, *rows])
    return rows


def _validated(found: Any) -> float:
    return -math.inf if math.isnan(found.fit.best) else float(found.fit.best)


def rules(problem: Problem) -> list[dict[str, Any]]:
    """Measure what learns nothing on the test."""
    from pantarhei.systems.evolving_graphs import (
        edge_bank,
        evaluate_rule,
        majority,
        preferential_attachment,
    )

    test = problem.split.test
    if problem.task != "link":
        return [{"model": "majority", "seed": 0, **majority(problem, test)}]
    named: dict[str, Callable[[Sequence[Tensor], int], Scores]] = {
        "edgebank": edge_bank,
        "edgebank, 10 snapshots": lambda seen, nodes: edge_bank(seen, nodes, 10),
        "last snapshot": lambda seen, nodes: edge_bank(seen, nodes, 1),
        "preferential attachment": preferential_attachment,
    }
    return [
        {"model": model, "seed": 0, **evaluate_rule(rule, problem, test)}
        for model, rule in named.items()
    ]


def trained(run: Run, name: str, problem: Problem, model: str, rate: float, seed: int) -> Any:
    """Train one model at one rate from one seed; a resumed run finds the finished ones again."""
    from pantarhei.systems.evolving_graphs import build, train

    settings, released = run.settings, _released(name)
    hidden, head, negatives = settings.hidden, settings.head_hidden, settings.negatives
    if settings.released:
        negatives = released["negatives"]
        if model in released:
            _, hidden, head = released[model]
    number = 1000 * run.seed + seed
    label = f"{name} {model} {rate:g} {seed}"
    return train(
        problem,
        build(model, problem.width, hidden, seed=number),
        head_hidden=head,
        epochs=settings.epochs if problem.task == "link" else settings.edge_epochs,
        patience=settings.patience,
        lr=rate,
        class_weights=released["weights"],
        sampling=(name.split()[2:] or ["smart"])[0],  # type: ignore[arg-type]
        negatives_per_edge=negatives,
        seed=number,
        checkpoint=run.checkpoint(label.replace(" ", "-")),
        label=label,
        quiet=run.quiet,
    )


def compare(run: Run, rows: Sequence[Mapping[str, Any]]) -> Iterator[Claim]:
    """Average over seeds and judge the claims on the two bitcoin sets."""
    from pantarhei.papers._evolvegcn_figures import bars

    means = averages(rows)
    run.metrics("summary", means)
    for measure, task in (("mrr_as_coded", "link"), ("micro_f1", "edge")):
        chosen = [row for row in means if f" {task}" in row["study"]]
        if chosen:
            run.figure(f"{task}s", bars(chosen, measure))
    found = claimed(means)
    for id, value in found.items():
        yield run.claim(id, value, "summary.csv")


def averages(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean of every measure over seeds by study and model, and the spread."""
    from statistics import stdev

    out = []
    for study, model in dict.fromkeys((row["study"], row["model"]) for row in rows):
        group = [row for row in rows if (row["study"], row["model"]) == (study, model)]
        keys = [key for key in group[0] if key not in ("study", "model", "seed")]
        mean = {key: fmean(row[key] for row in group) for key in keys}
        main = "mrr_as_coded" if " link" in study else "micro_f1"
        spread = stdev(row[main] for row in group) if len(group) > 1 else math.nan
        out.append(
            {"study": study, "model": model, "seeds": len(group), **mean, f"{main}_sd": spread}
        )
    return out


def claimed(means: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Work the claims' quantities out of the means; the worse of the two bitcoin sets decides."""

    def value(study: str, measure: str, *models: str) -> float:
        chosen = (r[measure] for r in means if r["study"] == study and r["model"] in models)
        return max(chosen, default=math.nan)

    ours = ("evolvegcn-h", "evolvegcn-o")
    studies = {row["study"] for row in means} & set(RELEASED)  # the released negatives
    found: dict[str, list[float]] = {}
    for study in sorted(s for s in studies if s.startswith("bitcoin")):
        if study.endswith("link"):
            best = value(study, "mrr_as_coded", *ours)
            rivals = value(study, "mrr_as_coded", "gcn", "gcn-gru")
            found.setdefault("links", []).append(best / rivals)
        else:
            best = value(study, "micro_f1", *ours)
            for rival in ("gcn", "gcn-gru"):
                points = 100 * (best - value(study, "micro_f1", rival))
                found.setdefault(f"edges-over-{rival}", []).append(points)
    return {id: min(values) for id, values in found.items()}


def drifting(run: Run) -> Iterator[Claim]:
    """Tell classes of nodes while the direction that separates them turns.

    The validation part is a quarter of the period, so that the best epoch there says nothing of the
    rest: the last weights are kept, after a rate that fell to zero.
    """
    from pantarhei.papers._evolvegcn_figures import over_time
    from pantarhei.systems.evolving_graphs import evaluate

    rows, curves = [], []
    for seed in range(run.settings.drift_seeds):
        problem = drift_problem(run, seed)
        for name in run.settings.drift_models:
            forecaster = drift_trained(run, problem, name, seed)
            found = {
                part: evaluate(forecaster, problem, getattr(problem.split, part))
                for part in ("train", "test")
            }
            on_train = found["train"]["balanced_accuracy"]
            rows.append({"model": name, "seed": seed, "train": on_train, **found["test"]})
            if seed == 0:
                curves += [
                    {"model": name, "step": t} | {"balanced_accuracy": accuracy}
                    for t, accuracy in drift_curve(forecaster, problem)
                ]
            run.metrics("drift", rows)
    run.metrics("drift-over-time", curves)
    run.figure("drift", over_time(curves))
    mean = {
        name: fmean(row["balanced_accuracy"] for row in rows if row["model"] == name)
        for name in run.settings.drift_models
    }
    told = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
    run.log(f"Drift, balanced accuracy: {told}.")
    yield run.claim("drift-h", mean["evolvegcn-h"] - mean["gcn"], "drift.csv")
    yield run.claim("drift-o-is-static", abs(mean["evolvegcn-o"] - mean["gcn"]), "drift.csv")


def drift_problem(run: Run, seed: int) -> Problem:
    """Return the sheet's 80, 10 and 30 steps."""
    from pantarhei.data.events import Split
    from pantarhei.data.simulate.graphs import drift
    from pantarhei.systems.evolving_graphs import Problem

    graph = drift(nodes=run.settings.drift_nodes, seed=1000 * run.seed + seed)
    parts = Split(range(5, 80), range(80, 90), range(90, 120))
    return Problem.of(graph, "node", window=5, parts=parts, device=run.device)


def drift_trained(run: Run, problem: Problem, name: str, seed: int) -> Forecaster:
    """Train one model on the drift; ``carry`` after its name keeps the state from step 0 on."""
    from pantarhei.systems.evolving_graphs import build, train

    model, _, policy = name.partition(" ")
    number = 1000 * run.seed + seed
    return train(
        problem,
        build(model, problem.width, 32, seed=number),
        policy=policy or "restart",  # type: ignore[arg-type]
        truncation=8,
        head_hidden=32,
        # An epoch of the carried state is 10 updates, one of windows 75: as many updates for both.
        epochs=run.settings.drift_epochs * (7 if policy else 1),
        lr=0.005,
        schedule="cosine",
        keep="last",
        clip=1.0,
        class_weights=(0.25, 0.75),
        measure="balanced_accuracy",
        seed=number,
        checkpoint=run.checkpoint(f"drift-{name.replace(' ', '-')}-{seed}"),
        label=f"drift {name} {seed}",
        quiet=run.quiet,
    ).forecaster


def drift_curve(forecaster: Forecaster, problem: Problem) -> list[tuple[int, float]]:
    """Return the balanced accuracy at every test step."""
    import torch

    from pantarhei.systems.evolving_graphs import classification

    out = []
    with torch.no_grad():
        for t, embedded in forecaster.follow(problem, problem.split.test):
            target = problem.target(t)
            predicted = forecaster.logits(embedded, target.of).argmax(-1)
            found = classification(target.labels, predicted, problem.classes)
            out.append((t, found["balanced_accuracy"]))
    return out


def exactly(run: Run) -> Iterator[Claim]:
    """Measure what holds of every EvolveGCN: on the trained drift models, and on new graphs."""
    from pantarhei.papers import _evolvegcn_parts as parts

    problem = drift_problem(run, 0)
    windowed = drift_trained(run, problem, "evolvegcn-o", 0)
    static = parts.static_difference(windowed, problem)
    moved = {v: parts.permuted(v, run.seed) for v in "ho"}
    spread = {v: parts.parameter_spread(v) for v in "ho"}
    rows: list[dict[str, Any]] = [{"what": "windowed -O minus GCN", "value": static}]
    rows += [{"what": f"renamed nodes, {v}", "value": value} for v, value in moved.items()]
    rows += [{"what": f"parameters, {v}", "value": value} for v, value in spread.items()]
    run.metrics("exactly", rows)
    yield run.claim("windowed-o-is-gcn", static, "exactly.csv")
    yield run.claim("any-nodes", max(moved.values()), "exactly.csv")
    yield run.claim("any-length", max(spread.values()), "exactly.csv")
