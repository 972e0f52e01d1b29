"""The recipe at a tiny setting: its story runs, resumes, and its claims are measured numbers."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from pantarhei import runs
from pantarhei.papers import load_recipe, rbqe

TINY = {"steps": 4, "batch": 2, "crop": 32, "width": 4, "levels": 3, "test_crop": 64}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> runs.Result:
    folder = tmp_path_factory.mktemp("runs") / "rbqe"
    changes = {**TINY, "baselines": True, "weight_seeds": 2, "weight_steps": 2}
    recipe = load_recipe("rbqe")
    with runs.start(recipe, out=folder, device="cpu", changes=changes, quiet=True) as run:
        return runs.execute(run)


def rows(result: runs.Result, name: str) -> list[dict[str, str]]:
    with (result.dir / name).open() as file:
        return list(csv.DictReader(file))


def test_bounds_are_those_of_the_fact_sheet():
    bounds = {spec.id: (spec.direction, spec.bound_at("cpu")) for spec in rbqe.CLAIMS}
    assert bounds == {
        "gains-everywhere": (">=", 0.001),
        "average-gain": (">=", 0.3),
        "against-dncnn": (">=", -0.05),
        "fewer-macs-than-dncnn": (">=", 4.0),
        "harder-costs-more": (">=", 1.2),
        "as-good-as-the-last-exit": ("<=", 0.03),
        "saves-macs": (">=", 0.10),
        "beats-chance": (">=", 0.01),
        "score-orders-quality": (">=", 0.001),
        "score-ranks-each-image": (">=", 0.93),
        "weights-keep-the-shallow-exit": (">=", -0.01),
        "weights-keep-the-deep-exit": (">=", -0.01),
        "weights-help": (">=", 0.001),
    }
    gpu = {spec.id: spec.bound_at("gpu") for spec in rbqe.CLAIMS}
    assert gpu == {**{name: bound for name, (_, bound) in bounds.items()}, "average-gain": 0.7}


def test_every_claim_of_the_scale_is_measured(finished: runs.Result):
    made = {spec.id for spec in rbqe.CLAIMS if spec.bound_at("quick") is not None}
    assert {claim.id for claim in finished.claims} == made
    assert all(math.isfinite(claim.measured) for claim in finished.claims)
    assert all((finished.dir / claim.evidence).exists() for claim in finished.claims)
    document = json.loads((finished.dir / "claims.json").read_text())
    assert document["paper"] == "rbqe" and len(document["claims"]) == len(made)


def test_methods_are_compared_on_the_same_images(finished: runs.Result):
    methods = {row["method"]: row for row in rows(finished, "methods.csv")}
    assert set(methods) == {
        *(f"exit {k}" for k in (1, 2)), "dynamic", "random", "oracle",
        "single exit", "DCAD", "DnCNN",
    }  # fmt: skip
    assert float(methods["exit 1"]["gmacs"]) < float(methods["exit 2"]["gmacs"])
    assert float(methods["DnCNN"]["gmacs"]) == pytest.approx(665_280 * 64 * 64 / 1e9, rel=0.001)
    for row in methods.values():
        mean = sum(float(row[f"dpsnr_{q}"]) for q in rbqe.QUALITIES) / 5
        assert float(row["dpsnr"]) == pytest.approx(mean, abs=1e-6)


def test_the_claims_are_the_arithmetic_of_the_tables(finished: runs.Result):
    measured = {claim.id: claim.measured for claim in finished.claims}
    methods = {row["method"]: row for row in rows(finished, "methods.csv")}
    dynamic, last = methods["dynamic"], methods["exit 2"]
    smallest = min(float(dynamic[f"dpsnr_{q}"]) for q in rbqe.QUALITIES)
    assert measured["gains-everywhere"] == pytest.approx(smallest)
    lost = float(last["dpsnr"]) - float(dynamic["dpsnr"])
    assert measured["as-good-as-the-last-exit"] == pytest.approx(lost)
    saved = 1 - float(dynamic["gmacs"]) / float(last["gmacs"])
    assert measured["saves-macs"] == pytest.approx(saved)
    by_quality = {int(row["quality"]): row for row in rows(finished, "qualities.csv")}
    ratio = float(by_quality[10]["macs"]) / float(by_quality[50]["macs"])
    assert measured["harder-costs-more"] == pytest.approx(ratio, rel=1e-6)
    gains = [float(r["psnr_out"]) - float(r["psnr_in"]) for r in by_quality.values()]
    assert sum(gains) / 5 == pytest.approx(float(dynamic["dpsnr"]), abs=1e-4)


def test_everything_named_in_the_story_is_there(finished: runs.Result):
    for name in ("curve", "exits", "side_by_side"):
        for suffix in ("png", "svg"):
            assert (finished.dir / f"{name}.{suffix}").stat().st_size > 1000
    assert len(rows(finished, "exits.csv")) == 15
    assert len(rows(finished, "weights.csv")) == 2
    assert [row["exit"] for row in rows(finished, "wall_clock.csv")] == ["1", "2"]
    assert len(rows(finished, "training/DnCNN.csv")) > 0


def test_train_calibration_and_test_images_are_disjoint(tmp_path: Path):
    recipe = load_recipe("rbqe")
    with runs.start(recipe, out=tmp_path / "r", device="cpu", quiet=True) as run:
        parts = rbqe._pictures(run)
    seen = [plane.numpy().tobytes() for part in parts for plane in part]
    assert len(set(seen)) == len(seen)
    assert [len(part) for part in parts][1:] == [2, 3] and len(parts[0]) >= 6


def test_a_resumed_run_measures_the_same(finished: runs.Result, tmp_path: Path):
    recipe = load_recipe("rbqe")

    def run_it(resume: bool) -> runs.Result:
        with runs.start(
            recipe, out=tmp_path / "r", device="cpu", changes=None if resume else TINY, quiet=True,
            resume=resume,
        ) as run:  # fmt: skip
            return runs.execute(run)

    first = run_it(False)
    (tmp_path / "r" / "claims.json").unlink()
    again = run_it(True)
    assert [c.measured for c in first.claims] == [c.measured for c in again.claims]
