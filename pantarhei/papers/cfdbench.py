"""CFDBench (arXiv 2310.05963): does a neural flow solver work for conditions it has not seen?

The story: flows are simulated by this library's own solver (the paper's came from ANSYS Fluent),
varying boundary values, fluid and geometry apart. Models that map frame to frame, models that step
from point to point and models that answer for a time are trained on all subsets, then tested for
one step and for twenty from the first frame. Two of them are also trained on single subsets. NMSE
is of u on the fluid's cells, per frame, then averaged: the paper's test without its faults.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec
from pantarhei.runs import Run

if TYPE_CHECKING:
    from pantarhei.data.simulate.flow import Problem
    from pantarhei.data.trajectories import Trajectories
    from pantarhei.systems.flow.benchmark import Parts

# The bounds are the fact sheet's. quick trains for seconds: that its models do not win is a matter
# of its size, and is measured and reported all the same.
CLAIMS = (
    ClaimSpec(
        "image-models-win-one-step",
        "one step ahead, the better of U-Net and FNO has at most half the error of the best "
        "DeepONet-type model",
        "one-step NMSE of u, best image model over best DeepONet-type model, worst of the problems",
        "<=",
        0.5,
        "0.40 cavity, 0.05 tube, 0.001 cylinder (read off bars)",
    ),
    ClaimSpec(
        "image-models-beat-identity",
        "one step ahead, the better of U-Net and FNO has at most half the error of no change",
        "one-step NMSE of u, best image model over identity, worst of the problems",
        "<=",
        0.5,
        "0.29 cavity, 0.03 tube, 0.001 cylinder (read off bars)",
    ),
    ClaimSpec(
        "error-accumulates",
        "the winner of one step is ten times worse after twenty, on two problems or more",
        "NMSE at step 20 over step 1 of the one-step winner, second largest of the problems",
        ">=",
        {"cpu": 10.0, "gpu": 10.0},
        "cavity, U-Net: 4e-4 to 1 (read off a logarithmic axis)",
    ),
    ClaimSpec(
        "point-query-does-not-drift",
        "models that answer for a time are as good late as early",
        "NMSE at step 20 over step 2, largest of FFN and DeepONet on cavity and cylinder",
        "<=",
        {"cpu": 3.0, "gpu": 3.0},
        "0.8 to 0.9 cavity, 0.5 cylinder (read off)",
    ),
    ClaimSpec(
        "ranking-changes",
        "the order of the models at step 20 is another than at step 1",
        "problems on which the two orders differ",
        ">=",
        1.0,
    ),
    ClaimSpec(
        "unseen-geometry-is-harder",
        "trained and tested on geometry the error is far larger than on fluid properties",
        "NMSE on GEO over NMSE on PROP, smaller one of FFN and DeepONet on the cavity",
        ">=",
        {"cpu": 3.0, "gpu": 3.0},
        "63 (FFN), 20 (DeepONet)",
    ),
)

# Cases are (bc, prop, geo). Frames and cells are those stored; the cavity's own grid is
# cavity_resolution (0: cells); ``fields``: "velocity" scales each case by its own speed.
SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "problems": ("cavity",),
        "cavity_cases": (4, 4, 4),
        "cylinder_cases": (3, 3, 3),
        "tube_cases": (3, 3, 3),
        "dam_cases": (3, 3, 3),
        "cells": 32,
        "frames": 30,
        "cavity_resolution": 0,
        "highest_reynolds": 1500.0,
        "models": ("unet", "auto-deeponet"),
        "mixes": (),
        "mix_models": (),
        "epochs": 40,
        "batch_size": 16,
        "lr": 1e-3,
        "schedule": "cosine",
        "develop": False,
        "fields": "constant",
        "queries": 128,
        "steps": 20,
        "time_solvers": False,
    },
    "cpu": {
        "problems": ("cavity", "cylinder"),
        "cavity_cases": (24, 24, 9),
        "cylinder_cases": (20, 20, 8),
        "tube_cases": (20, 20, 8),
        "dam_cases": (20, 20, 8),
        "cells": 32,
        "frames": 40,
        "cavity_resolution": 48,
        "highest_reynolds": 2000.0,
        "models": ("unet", "fno", "auto-deeponet", "ffn", "deeponet"),
        "mixes": ("prop", "geo"),
        "mix_models": ("ffn", "deeponet"),
        "epochs": 20,
        "batch_size": 16,
        "lr": 1e-3,
        "schedule": "cosine",
        "develop": False,
        "fields": "constant",
        "queries": 128,
        "steps": 20,
        "time_solvers": True,
    },
    "gpu": {
        "problems": ("cavity", "cylinder", "tube", "dam"),
        "cavity_cases": (50, 44, 25),
        "cylinder_cases": (50, 23, 17),
        "tube_cases": (50, 72, 15),
        "dam_cases": (50, 50, 50),
        "cells": 64,
        "frames": 100,
        "cavity_resolution": 0,
        "highest_reynolds": 2000.0,
        "models": (
            "unet", "fno", "resnet", "auto-ffn", "auto-deeponet", "auto-edeeponet",
            "auto-deeponet-cnn", "ffn", "deeponet",
        ),
        "mixes": ("bc", "prop", "geo", "bc+prop", "prop+geo", "bc+geo"),
        "mix_models": ("ffn", "deeponet"),
        "epochs": 100,
        "batch_size": 128,
        "lr": 1e-3,
        "schedule": "published",
        "develop": True,
        "fields": "constant",
        "queries": 1000,
        "steps": 20,
        "time_solvers": True,
    },
}  # fmt: skip

IMAGE = ("unet", "fno")
DEEPONETS = ("auto-deeponet", "auto-edeeponet", "auto-deeponet-cnn")
NON_AUTO = ("ffn", "deeponet")
CLOSED = {"cavity": ("bottom", "top", "left", "right")}  # the others: bottom and top


def recipe(run: Run) -> Iterator[Claim]:
    """Simulate, train, test, and compare."""
    found = [Study.of(run, name).measure() for name in run.settings.problems]
    measured = judge(found, run.settings.steps)
    run.metrics("claims.csv", [{"claim": name, "measured": v} for name, v in measured.items()])
    for spec in CLAIMS:
        if spec.bound_at(run.scale) is not None:
            yield run.claim(spec.id, measured[spec.id], "claims.csv")


@dataclass
class Findings:
    """One problem's results: one-step NMSE and curves over the horizon by model, NMSE by mix."""

    problem: str
    one_step: dict[str, float] = field(default_factory=dict)
    horizon: dict[str, list[float]] = field(default_factory=dict)
    own_subset: dict[tuple[str, str], float] = field(default_factory=dict)  # (model, mix)


@dataclass(frozen=True)
class Study:
    """One problem: its data, its split, and how a model of it is trained."""

    run: Run
    problem: Problem
    data: Trajectories
    parts: Mapping[str, Parts]

    @classmethod
    def of(cls, run: Run, name: str) -> Study:
        """Simulate the cases of a problem, or read what this run simulated before."""
        from pantarhei.data.simulate.flow import generate
        from pantarhei.data.trajectories import open_trajectories
        from pantarhei.systems.flow.benchmark import split_by_subset

        problem, options = flow_of(run, name)
        kept = run.path(f"data/{name}.npz")
        if not kept.exists():
            bc, prop, geo = run.settings[f"{name}_cases"]
            cases = problem.cases(bc=bc, prop=prop, geo=geo)
            run.log(f"Simulating {len(cases)} cases of {name}.")
            data = generate(
                problem, cases, cells=run.settings.cells, frames=run.settings.frames,
                device=run.device, **options,
            )  # fmt: skip
            if run.leads:
                data.save(kept)
        data = open_trajectories(kept)
        return cls(run, problem, data, split_by_subset(data, run.seed))

    def measure(self) -> Findings:
        """Train every model on all subsets, and some on single ones; write the tables."""
        from pantarhei.systems.flow.benchmark import across_subsets, against_distance, mixed
        from pantarhei.systems.flow.evaluation import (
            Persistence,
            case_mean,
            mean,
            multi_step,
            one_step,
        )

        run, name = self.run, self.problem.name
        test, known = mixed(self.parts, "all").test, self.training("all")
        found, models = Findings(name), {"identity": Persistence()}
        models |= {model: self.train(model, "all") for model in run.settings.models}
        steps: list[dict[str, Any]] = []
        curves: list[dict[str, Any]] = []
        cases: list[dict[str, Any]] = []
        far: list[dict[str, Any]] = []
        for label, model in models.items():
            rows = one_step(model, self.data, test)
            found.one_step[label] = mean(rows, "nmse_u")
            steps += [{"model": label, **row} for row in rows]
            ahead = multi_step(model, self.data, test, run.settings.steps)
            found.horizon[label] = ahead.curve.tolist()
            curves += [{"model": label, **row} for row in ahead.rows()]
            cases += [{"model": label, **row} for row in ahead.by_case(self.data, test)]
            far += [
                {"model": label, **row} for row in against_distance(model, self.data, known, test)
            ]
        steps += [{"model": "mean of the case", **row} for row in case_mean(self.data, test)]
        run.metrics(f"{name}-one-step", steps)
        run.metrics(f"{name}-horizon", curves)
        run.metrics(f"{name}-horizon-by-case", cases)
        run.metrics(f"{name}-distance", far)
        self.write_physics(models, test)
        table: list[dict[str, Any]] = []
        for model in run.settings.mix_models:
            trained = {mix: self.train(model, mix) for mix in run.settings.mixes}
            if model in models:
                trained["all"] = models[model]
            rows = across_subsets(trained, self.data, self.parts)
            table += [{"model": model, **row} for row in rows]
            for row in rows:
                if row["trained_on"] == row["tested_on"]:
                    found.own_subset[model, row["trained_on"]] = row["nmse_u"]
        run.metrics(f"{name}-subsets", table)
        run.figure(f"{name}-horizon", horizon_figure(found))
        run.figure(f"{name}-distance", distance_figure(name, far))
        if run.settings.time_solvers:
            self.time(models[best_of(found, IMAGE)], test)
        return found

    def training(self, mix: str) -> tuple[int, ...]:
        """Return the cases trained on: those for development too, where none are held back."""
        from pantarhei.systems.flow.benchmark import mixed

        parts = mixed(self.parts, mix)
        return parts.train if self.run.settings.develop else parts.train + parts.development

    def train(self, name: str, mix: str) -> Any:
        """Train a model on a mix of subsets."""
        import torch

        from pantarhei.systems.flow import IMAGE_MODELS, STEP_AT_POINTS, model
        from pantarhei.systems.flow.benchmark import mixed
        from pantarhei.systems.flow.surrogate import Surrogate, inputs_of
        from pantarhei.systems.flow.training import train

        settings, grid = self.run.settings, self.data.shape[-2:]
        cases = self.training(mix)
        options: dict[str, Any] = {}
        if name not in IMAGE_MODELS and name not in STEP_AT_POINTS:
            options["frames"] = self.data.shape[1]
        with torch.random.fork_rng():
            torch.manual_seed(self.run.seed)
            net = model(name, len(inputs_of(self.data)), (grid[0], grid[1]), **options)
        surrogate = Surrogate.of(net, self.data, cases, fields=settings.fields)
        dear = name in (*NON_AUTO, "auto-ffn", "auto-deeponet-cnn")  # a query costs as a pixel
        train(
            surrogate, self.data, cases,
            epochs=settings.epochs, batch_size=settings.batch_size, lr=settings.lr,
            schedule=settings.schedule, queries=settings.queries if dear else None,
            development=mixed(self.parts, mix).development if settings.develop else (),
            checkpoint=self.run.checkpoint(f"{self.problem.name}-{name}-{mix}"),
            seed=self.run.seed, device=self.run.device, quiet=self.run.quiet,
            label=f"{self.problem.name}: {name} on {mix}",
        )  # fmt: skip
        return surrogate

    def write_physics(self, models: Mapping[str, Any], test: tuple[int, ...]) -> None:
        """Write divergence and wall violation of each model's forecasts beside the truth's."""
        from pantarhei.systems.flow.evaluation import physics

        closed = CLOSED.get(self.problem.name, ("bottom", "top"))
        rows = [
            {"model": label, **row}
            for label, model in models.items()
            if label != "identity"
            for row in physics(model, self.data, test, closed)
        ]
        self.run.metrics(f"{self.problem.name}-physics", rows)

    def time(self, model: Any, test: tuple[int, ...]) -> None:
        """Write the time of a model and of coarser and coarser solvers, each with its error."""
        from pantarhei.data.simulate.flow import Case
        from pantarhei.systems.flow.benchmark import speed_at_equal_error

        names = self.problem.parameters
        assert self.data.parameters is not None
        cases = [
            Case(self.problem.name, "test", i, dict(zip(names, row, strict=False)))
            for i, row in enumerate(self.data.parameters[list(test)].tolist())
        ]
        key, sizes = {
            "cavity": ("resolution", (8, 12, 16, 24)),
            "cylinder": ("per_diameter", (2, 4, 6)),
            "tube": ("across", (4, 8, 12)),
            "dam": ("across", (8, 16, 24)),
        }[self.problem.name]
        coarser = [{"cells": self.data.shape[-1], key: size} for size in sizes]
        rows = speed_at_equal_error(
            model, self.problem, cases, self.data, test, coarser,
            self.run.settings.steps, self.run.device,
        )  # fmt: skip
        self.run.metrics(f"{self.problem.name}-speed", rows)


def flow_of(run: Run, name: str) -> tuple[Problem, dict[str, Any]]:
    """Return a problem and its solver's options at this run's settings."""
    from pantarhei.data.simulate.flow import cavity, cylinder, dam, tube
    from pantarhei.errors import RequestError, nearest

    problems = {"cylinder": cylinder, "tube": tube, "dam": dam}
    if name == "cavity":
        options = {"resolution": run.settings.cavity_resolution}
        return cavity(run.settings.highest_reynolds), options
    if name not in problems:
        known = ("cavity", *problems)
        raise RequestError(
            f"'{name}' is not a problem: choose among {', '.join(known)}.{nearest(name, known)}"
        )
    return problems[name](), {}


def judge(found: list[Findings], steps: int) -> dict[str, float]:
    """Return what each claim measures; NaN where the models it needs were not trained."""
    against: dict[str, list[float]] = {"deeponet": [], "identity": []}
    growth, drift = [], []
    for one in found:
        image = one.one_step[best_of(one, IMAGE)]
        against["deeponet"].append(image / one.one_step[best_of(one, DEEPONETS)])
        against["identity"].append(image / one.one_step["identity"])
        stepping = tuple(m for m in one.one_step if m not in ("identity", *NON_AUTO))
        winner = one.horizon[best_of(one, stepping)]
        growth.append(winner[steps - 1] / winner[0])
        if one.problem in ("cavity", "cylinder"):
            curves = [one.horizon[model] for model in NON_AUTO if model in one.horizon]
            drift += [curve[steps - 1] / curve[1] for curve in curves]
    harder = [
        one.own_subset[model, "geo"] / one.own_subset[model, "prop"]
        for one in found
        for model in NON_AUTO
        if one.problem == "cavity" and {(model, "geo"), (model, "prop")} <= set(one.own_subset)
    ]
    return {
        "image-models-win-one-step": max(against["deeponet"]),
        "image-models-beat-identity": max(against["identity"]),
        "error-accumulates": sorted(growth)[-2] if len(growth) > 1 else math.nan,
        "point-query-does-not-drift": max(drift, default=math.nan),
        "ranking-changes": float(sum(ranking(one, 1) != ranking(one, steps) for one in found)),
        "unseen-geometry-is-harder": min(harder, default=math.nan),
    }


def ranking(found: Findings, step: int) -> list[str]:
    """Return the models, without the baseline, from the smallest NMSE at a step to the largest."""
    models = [model for model in found.horizon if model != "identity"]
    return sorted(models, key=lambda model: found.horizon[model][step - 1])


def best_of(found: Findings, among: tuple[str, ...]) -> str:
    """Return the model with the smallest one-step NMSE of those that were trained."""
    from pantarhei.errors import RequestError

    trained = [model for model in among if model in found.one_step]
    if not trained:
        raise RequestError(f"The claims compare one of {', '.join(among)}: name it in models.")
    return min(trained, key=lambda model: found.one_step[model])


def horizon_figure(found: Findings) -> Any:
    """Draw the NMSE of every model over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for model, curve in found.horizon.items():
        style = "k--" if model == "identity" else "-"
        axes.plot(range(1, len(curve) + 1), curve, style, label=model)
    axes.set(yscale="log", xlabel="step", ylabel="NMSE of u", title=found.problem)
    axes.legend(fontsize=8)
    return figure


def distance_figure(problem: str, rows: list[dict[str, Any]]) -> Any:
    """Draw the one-step NMSE of every model against the distance from the training cases."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for model in dict.fromkeys(row["model"] for row in rows):
        found = [row for row in rows if row["model"] == model]
        errors = [row["nmse_u"] for row in found]
        axes.plot([row["distance"] for row in found], errors, ".", label=model)
    distance = "distance from the nearest training case, standard deviations"
    axes.set(yscale="log", xlabel=distance, ylabel="NMSE of u", title=problem)
    axes.legend(fontsize=8)
    return figure
