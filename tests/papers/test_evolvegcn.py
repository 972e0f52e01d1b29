"""The EvolveGCN recipe at a tiny setting, its arithmetic, and its settings."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pantarhei.errors import RequestError
from pantarhei.papers import _evolvegcn_parts as parts
from pantarhei.papers import evolvegcn, load_recipe
from pantarhei.runs import execute, start

SHARED = os.environ.get("PANTARHEI_DATA") or str(Path(__file__).parents[3] / "shared" / "data")
needs_shared = pytest.mark.skipif(
    not Path(SHARED, "dynamic_graphs").is_dir(), reason="PANTARHEI_DATA names no data sets"
)
TINY = {"epochs": 1, "drift_epochs": 1, "drift_nodes": 30, "hidden": 6, "head_hidden": 8}


def tiny(folder, **changes):
    recipe = load_recipe("evolvegcn")
    return start(recipe, out=folder, device="cpu", quiet=True, changes={**TINY, **changes})


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_tiny_run_measures_every_claim_of_its_scale_and_leaves_its_evidence(tmp_path):
    with tiny(tmp_path / "run") as run:
        result = execute(run)
    made = {spec.id for spec in evolvegcn.CLAIMS if spec.bound_at("quick") is not None}
    assert {claim.id for claim in result.claims} == made and len(made) == 5
    studies = rows_of(result.dir / "studies.csv")
    models = [row["model"] for row in studies]
    assert models[:4] == [
        "edgebank", "edgebank, 10 snapshots", "last snapshot", "preferential attachment",
    ]  # fmt: skip
    assert set(models[4:]) == set(evolvegcn.SETTINGS["quick"]["models"])
    assert all(0 <= float(row["mrr_as_coded"]) <= 1 for row in studies)
    by = {row["model"]: row for row in rows_of(result.dir / "drift.csv")}
    claims = {claim.id: claim for claim in result.claims}
    gap = float(by["evolvegcn-h"]["balanced_accuracy"]) - float(by["gcn"]["balanced_accuracy"])
    assert claims["drift-h"].measured == pytest.approx(gap)
    for id in ("windowed-o-is-gcn", "any-nodes", "any-length"):
        assert claims[id].holds
    names = {path.name for path in result.dir.iterdir()}
    assert {"links.png", "drift.svg", "exactly.csv", "summary.csv"} <= names


def test_a_finished_training_is_found_again(tmp_path):
    with tiny(tmp_path / "run", models=("gcn",)) as run:
        problem = evolvegcn.problem_of(run, "sbm link")
        first = evolvegcn.trained(run, "sbm link", problem, "gcn", 0.01, 0)
        again = evolvegcn.trained(run, "sbm link", problem, "gcn", 0.01, 0)
        other = evolvegcn.trained(run, "sbm link", problem, "gcn", 0.01, 1)
    for a, b in zip(first.forecaster.parameters(), again.forecaster.parameters(), strict=True):
        assert a.equal(b)
    assert first.fit.best == again.fit.best
    assert not next(first.forecaster.parameters()).equal(next(other.forecaster.parameters()))


def test_the_claims_arithmetic():
    def row(study, model, value):
        measure = "mrr_as_coded" if " link" in study else "micro_f1"
        return {"study": study, "model": model, "seed": 0, measure: value}

    values = {
        "bitcoin_alpha link": (0.10, 0.12, 0.08, 0.05, 0.9),
        "bitcoin_otc link": (0.11, 0.10, 0.10, 0.02, 0.9),
        "bitcoin_alpha edge": (0.90, 0.91, 0.90, 0.89, 0.99),
        "bitcoin_otc edge": (0.88, 0.87, 0.90, 0.85, 0.99),
        "uci link": (0.0, 0.0, 1.0, 1.0, 1.0),
        "bitcoin_alpha link uniform": (0.0, 0.0, 1.0, 1.0, 1.0),
    }
    models = ("evolvegcn-h", "evolvegcn-o", "gcn", "gcn-gru", "edgebank")
    means = [row(s, m, v) for s, vs in values.items() for m, v in zip(models, vs, strict=True)]
    found = evolvegcn.claimed(means)
    assert found["links"] == pytest.approx(1.1)
    assert found["edges-over-gcn"] == pytest.approx(-2.0)
    assert found["edges-over-gcn-gru"] == pytest.approx(2.0)
    assert evolvegcn.claimed([]) == {}


def test_seeds_are_averaged_by_study_and_model():
    rows = [
        {"study": "a link", "model": m, "seed": s, "mrr_as_coded": v}
        for m, s, v in (("x", 0, 1.0), ("x", 1, 3.0), ("y", 0, 5.0))
    ]
    x, y = evolvegcn.averages(rows)
    assert (x["mrr_as_coded"], x["seeds"]) == (2.0, 2)
    assert x["mrr_as_coded_sd"] == pytest.approx(2**0.5)
    assert y["mrr_as_coded"] == 5.0 and math.isnan(y["mrr_as_coded_sd"])


def test_the_best_rate_is_chosen_on_the_validation_part(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from pantarhei.systems import evolving_graphs

    asked = []

    def trained(run, name, problem, model, rate, seed):
        asked.append((rate, seed))
        fit = SimpleNamespace(best={0.1: 0.2, 0.2: 0.7, 0.3: math.nan}[rate], best_step=1, step=1)
        forecaster = SimpleNamespace(parameters=list)
        return SimpleNamespace(fit=fit, forecaster=forecaster, epochs=[{}])

    monkeypatch.setattr(evolvegcn, "trained", trained)
    monkeypatch.setattr(evolving_graphs, "evaluate", lambda *_: {"mrr_as_coded": 1.0})
    with tiny(tmp_path / "run", models=("gcn",), rates=(0.1, 0.2, 0.3), seeds=3) as run:
        rows = evolvegcn.study(run, "sbm link", [])
    assert asked == [(0.1, 0), (0.2, 0), (0.3, 0), (0.2, 1), (0.2, 2)]
    assert [row["rate"] for row in rows if row["model"] == "gcn"] == [0.2] * 3


def test_the_released_settings_are_used_where_asked(tmp_path, monkeypatch):
    from pantarhei.systems import evolving_graphs

    asked = {}
    monkeypatch.setattr(evolving_graphs, "train", lambda problem, model, **k: asked.update(k))
    with tiny(tmp_path / "run", released=True) as run:
        problem = evolvegcn.problem_of(run, "sbm link")
        evolvegcn.trained(run, "sbm link", problem, "evolvegcn-o", 0.005, 0)
        assert asked["sampling"] == "smart"
        evolvegcn.trained(run, "sbm link uniform", problem, "evolvegcn-o", 0.005, 0)
    assert asked["head_hidden"] == 565 and asked["negatives_per_edge"] == 50
    assert asked["sampling"] == "uniform" and asked["class_weights"] == (0.1, 0.9)
    with tiny(tmp_path / "other") as run:
        for name in ("reddit edge", "sbm"):
            with pytest.raises(RequestError, match="not a study"):
                evolvegcn.problem_of(run, name)


@needs_shared
@pytest.mark.parametrize(
    ("name", "parts_"), [("bitcoin_otc link", (85, 14, 28)), ("uci link", (52, 9, 17))]
)
def test_the_real_studies_have_the_papers_parts(tmp_path, monkeypatch, name, parts_):
    monkeypatch.setenv("PANTARHEI_DATA", SHARED)
    with tiny(tmp_path / "run") as run:
        problem = evolvegcn.problem_of(run, name)
    split = problem.split
    found = tuple(len(problem.told(p)) for p in (split.train, split.validation, split.test))
    # the paper counts 95 and 62 training steps: those before the first full window too
    assert found == parts_


def test_what_must_hold_exactly_does():
    for variant in "ho":
        assert parts.permuted(variant, 3) < 1e-6 and parts.parameter_spread(variant) == 0


def test_the_recipe_is_read_without_torch():
    code = "import sys, pantarhei.papers.evolvegcn; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
