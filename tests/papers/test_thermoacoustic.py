"""The recipe at a tiny setting: every claim with its evidence, its arithmetic, its resuming."""

from __future__ import annotations

import csv
import math
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from pantarhei.papers import load_recipe, thermoacoustic
from pantarhei.runs import Run, execute, start

TINY = {
    "train_runs": 3,
    "test_runs": 2,
    "run_seconds": 6.0,
    "f0": 200.0,
    "history": 3,
    "members": 2,
    "hidden": (4,),
    "epochs": 2,
    "seeds": 2,
    "leads": (1, 2, 10),
    "paths": 2,
    "sizes": (2, 9),
    "limit": 1.5,  # bar: some frames of a short run are above
    "gradient_windows": 5,
}


def tiny(folder, resume=False, **changes):
    recipe = load_recipe("thermoacoustic")
    changes = {**TINY, **changes}
    return start(recipe, out=folder, device="cpu", quiet=True, changes=changes, resume=resume)


def rows_of(folder, name):
    return list(csv.DictReader((folder / f"{name}.csv").open()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda self, path, **_: save(self, path, dpi=30))
        with tiny(tmp_path_factory.mktemp("thermoacoustic") / "run") as run:
            return execute(run)


def test_a_tiny_run_measures_every_claim_and_leaves_its_evidence(finished):
    assert [c.id for c in finished.claims] == [spec.id for spec in thermoacoustic.CLAIMS]
    names = {path.name for path in finished.dir.iterdir()}
    for claim in finished.claims:
        assert math.isfinite(claim.measured) and claim.evidence in names
    stems = ("forecast", "calibration", "sensors", "failures", "lead-times")
    assert {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")} <= names


def test_claims_are_means_over_the_seeds(finished):
    measured = {claim.id: claim.measured for claim in finished.claims}
    table = rows_of(finished.dir, "sensors")

    def mean(name, key):
        held = [float(row[key]) for row in table if row["inputs"] == name]
        assert len(held) == (1 if name == "persistence" else 2)
        return sum(held) / len(held)

    full, slow = mean("all", "rmse"), mean("commands + slow", "rmse")
    assert measured["beats-persistence"] == pytest.approx(full / mean("persistence", "rmse"))
    assert measured["beats-slow-sensors"] == pytest.approx(full / slow)
    by_p = mean("commands + slow", "nll") - mean("commands + slow + p", "nll")
    by_light = mean("commands + slow", "nll") - mean("commands + slow + OH*", "nll")
    assert measured["dynamic-pressure-informative"] == pytest.approx(by_p)
    assert measured["dynamic-pressure-over-light"] == pytest.approx(by_p - by_light)
    assert measured["covers-enough"] == measured["covers-not-too-much"] == mean("all", "coverage")
    assert measured["spread-not-too-wide"] == mean("all", "z_sd")
    dead = [row for row in rows_of(finished.dir, "failures") if row["failure"] == "p dead"]
    assert [row["seed"] for row in dead] == ["0", "1"]
    ratios = [float(row["epistemic_ratio"]) for row in dead]
    assert measured["failure-raises-doubt"] == pytest.approx(sum(ratios) / 2)
    change = [abs(float(row["aleatoric_ratio"]) - 1) for row in dead]
    assert measured["failure-leaves-noise"] == pytest.approx(sum(change) / 2)


def test_the_tables_beside_the_claims_are_whole(finished):
    leads = rows_of(finished.dir, "lead-times")
    assert len(leads) == 5 * 3 and {row["lead"] for row in leads} == {"1", "2", "10"}
    assert {row["method"] for row in rows_of(finished.dir, "alarms-one-false-in-100s")} == {
        row["method"] for row in leads
    }
    few = rows_of(finished.dir, "few-runs")
    assert len(few) == 4 and {row["runs"] for row in few} == {"2"}  # 9 are more than there are
    parts = [row for row in rows_of(finished.dir, "gradients") if row["of"] == "mean"]
    assert {row["lead"] for row in parts} == {"1", "10"}
    total = sum(float(row["part"]) for row in parts if row["lead"] == "1")
    assert total == pytest.approx(1, abs=1e-6)
    assert len(rows_of(finished.dir, "failures")) == 12 + 1


def test_an_interrupted_run_continues_to_the_same_tables(tmp_path, finished, monkeypatch):
    class Stop(Exception):
        pass

    def stop(self):
        raise Stop

    monkeypatch.setattr(Run, "figure", lambda *_: None)
    with monkeypatch.context() as patch, tiny(tmp_path / "run") as run:
        patch.setattr(thermoacoustic.Study, "lead_times", stop)
        with pytest.raises(Stop):
            execute(run)
    with tiny(tmp_path / "run", resume=True) as run:
        again = execute(run)
    assert [c.measured for c in again.claims] == [c.measured for c in finished.claims]
    for name in ("sensors.csv", "failures.csv", "lead-times.csv", "few-runs.csv"):
        assert (again.dir / name).read_text() == (finished.dir / name).read_text()


def test_the_full_network_can_read_the_raw_pressure(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "figure", lambda *_: None)
    with tiny(tmp_path / "run", raw_samples=64, seeds=1, sizes=(2,)) as run:
        found = execute(run)
    assert all(math.isfinite(claim.measured) for claim in found.claims)
    read = [r for r in rows_of(found.dir, "gradients") if r["group"] == thermoacoustic.RAW]
    assert len(read) == 2 * 2 and all(float(row["magnitude"]) > 0 for row in read)


def test_the_recipe_is_read_without_torch():
    code = "import sys, pantarhei.papers.thermoacoustic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
