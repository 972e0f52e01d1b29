"""The CFDBench recipe at a tiny setting, its arithmetic, and a killed run that goes on."""

from __future__ import annotations

import csv
import functools
import math
import subprocess
import sys

import pytest

from pantarhei.data.simulate.flow import liquid, single_phase
from pantarhei.errors import RequestError
from pantarhei.papers import cfdbench, load_recipe
from pantarhei.papers.cfdbench import Findings, judge
from pantarhei.runs import execute, start

TINY = {
    "cavity_cases": (3, 3, 3),
    "cells": 16,
    "frames": 8,
    "highest_reynolds": 300.0,
    "epochs": 1,
    "steps": 5,
    "queries": 8,
}


def tiny(folder, **changes):
    recipe = load_recipe("cfdbench")
    return start(recipe, out=folder, device="cpu", quiet=True, changes={**TINY, **changes})


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_tiny_run_measures_every_claim_and_leaves_its_evidence(tmp_path):
    with tiny(
        tmp_path / "run",
        models=("unet", "auto-deeponet", "ffn"),
        mixes=("prop", "geo"),
        mix_models=("ffn",),
        time_solvers=True,
    ) as run:
        result = execute(run)
    made = {spec.id for spec in cfdbench.CLAIMS if spec.bound_at("quick") is not None}
    assert {claim.id for claim in result.claims} == made and len(made) == 3
    measured = {row["claim"]: float(row["measured"]) for row in rows_of(result.dir / "claims.csv")}
    for claim in result.claims:
        assert claim.evidence == "claims.csv" and claim.measured == measured[claim.id]
    steps = rows_of(result.dir / "cavity-one-step.csv")
    models = ["identity", "unet", "auto-deeponet", "ffn", "mean of the case"]
    assert list(dict.fromkeys(row["model"] for row in steps)) == models

    def one_step(model):
        found = [float(row["nmse_u"]) for row in steps if row["model"] == model]
        assert len(found) == 3  # one test case of each subset
        return sum(found) / 3

    assert measured["image-models-win-one-step"] == pytest.approx(
        one_step("unet") / one_step("auto-deeponet")
    )
    curves = rows_of(result.dir / "cavity-horizon.csv")
    assert len(curves) == 4 * 5 and all(row["blown"] == "0" for row in curves)
    assert len(rows_of(result.dir / "cavity-horizon-by-case.csv")) == 4 * 5 * 3
    first = next(row for row in curves if row["model"] == "identity")
    assert float(first["nmse_u"]) == 1.0  # nothing moves in the first frame
    table = rows_of(result.dir / "cavity-subsets.csv")
    assert len(table) == 3 * 3 and {row["trained_on"] for row in table} == {"prop", "geo", "all"}
    own = {row["trained_on"]: float(row["nmse_u"]) for row in table
           if row["trained_on"] == row["tested_on"]}  # fmt: skip
    assert measured["unseen-geometry-is-harder"] == pytest.approx(own["geo"] / own["prop"])
    assert rows_of(result.dir / "cavity-speed.csv")[0]["who"] == "model"
    assert len(rows_of(result.dir / "cavity-physics.csv")) == 3 * 3
    assert (result.dir / "cavity-horizon.png").exists()


@pytest.mark.parametrize(
    ("name", "module", "options"),
    [
        ("cylinder", single_phase, {"discard": 0.5, "per_diameter": 3}),
        ("tube", liquid, {"across": 4, "passages": 0.1}),
        ("dam", liquid, {"across": 8, "interval": 0.01}),
    ],
)
def test_the_other_problems_run_too(tmp_path, monkeypatch, name, module, options):
    short = functools.partial(getattr(module, f"solve_{name}"), **options)
    monkeypatch.setattr(module, f"solve_{name}", short)
    models = ("fno", "auto-deeponet")
    with tiny(tmp_path / "run", problems=(name,), frames=3, models=models, steps=2) as run:
        result = execute(run)
    assert all(math.isfinite(claim.measured) for claim in result.claims)
    assert len(rows_of(result.dir / f"{name}-one-step.csv")) == 4 * 3


def test_simulated_cases_are_kept_when_a_run_goes_on(tmp_path):
    with tiny(tmp_path / "run", models=("unet", "auto-deeponet")) as run:
        first = cfdbench.Study.of(run, "cavity")
        kept = run.path("data/cavity.npz")
        stamp = kept.stat().st_mtime_ns
        again = cfdbench.Study.of(run, "cavity")
        assert kept.stat().st_mtime_ns == stamp and first.parts == again.parts
        assert (first.data.frames(4) == again.data.frames(4)).all()


def test_the_claims_arithmetic():
    cavity = Findings(
        "cavity",
        {"identity": 1.0, "unet": 0.2, "fno": 0.1, "auto-deeponet": 0.5, "auto-edeeponet": 0.4},
        {
            "identity": [1.0, 1.0, 1.0],
            "unet": [0.2, 0.3, 0.4],
            "fno": [0.1, 0.2, 5.0],
            "ffn": [0.3, 0.2, 0.1],
        },
        {("ffn", "geo"): 0.8, ("ffn", "prop"): 0.1, ("ffn", "all"): 9.0},
    )
    cylinder = Findings(
        "cylinder",
        {"identity": 1.0, "unet": 0.3, "auto-deeponet": 0.5},
        {"unet": [0.2, 0.3, 0.4], "deeponet": [0.3, 0.5, 0.6]},
    )
    found = judge([cavity, cylinder], 3)
    assert found["image-models-win-one-step"] == pytest.approx(0.6)  # the cylinder's
    assert found["image-models-beat-identity"] == pytest.approx(0.3)
    assert found["error-accumulates"] == pytest.approx(2.0)  # 50 and 2: the second
    assert found["point-query-does-not-drift"] == pytest.approx(1.2)
    assert found["ranking-changes"] == 1.0
    assert found["unseen-geometry-is-harder"] == pytest.approx(8.0)
    alone = judge([cylinder], 3)
    assert math.isnan(alone["error-accumulates"]) and math.isnan(alone["unseen-geometry-is-harder"])
    with pytest.raises(RequestError, match="name it in models"):
        judge([Findings("cavity", {"identity": 1.0, "ffn": 1.0}, {})], 3)


def test_an_unknown_problem_is_refused(tmp_path):
    with (
        tiny(tmp_path / "run", problems=("lake",)) as run,
        pytest.raises(RequestError, match="not a problem: choose among cavity"),
    ):
        list(cfdbench.recipe(run))


def test_the_recipe_is_read_without_torch():
    code = "import sys, pantarhei.papers.cfdbench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
