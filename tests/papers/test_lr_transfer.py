"""The recipe at a tiny setting, its arithmetic, and its resuming."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from pantarhei.learning.lr_transfer import Size, Sweep
from pantarhei.papers import load_recipe, lr_transfer
from pantarhei.runs import Run, execute, start

TINY = {
    "images": 128,
    "batch_size": 32,
    "seeds": 2,
    "steps": 3,
    "widths": (4, 8),
    "sp_widths": (4,),
    "mup_grid": (-1, 1),
    "ntp_grid": (0, 2),
    "sp_grid": (-3, -2),
    "depth_width": 4,
    "depths": (1, 3),
    "depth_steps": 4,
    "depth_grid": (-1, 0),
    "sharpness_images": 32,
    "sharpness_widths": (4, 8),
    "sharpness_steps": 4,
    "sharpness_every": 2,
    "sharpness_at": 3,
    "edge_widths": (4, 8),
    "edge_images": 32,
    "edge_steps": 6,
    "edge_every": 2,
    "linear_widths": (8, 16),
    "linear_steps": 50,
}


def tiny(folder, resume=False, **changes):
    recipe = load_recipe("lr-transfer")
    changes = {**TINY, **changes}
    return start(recipe, out=folder, device="cpu", quiet=True, changes=changes, resume=resume)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        save = Figure.savefig
        patch.setattr(Figure, "savefig", lambda self, path, **_: save(self, path, dpi=30))
        with tiny(tmp_path_factory.mktemp("lr-transfer") / "run") as run:
            return execute(run)


def test_a_tiny_run_measures_every_claim_and_leaves_its_evidence(finished):
    made = {spec.id for spec in lr_transfer.CLAIMS if spec.bound_at("quick") is not None}
    assert {claim.id for claim in finished.claims} == made and len(made) >= 4
    names = {path.name for path in finished.dir.iterdir()}
    for claim in finished.claims:
        assert math.isfinite(claim.measured) and claim.evidence in names
    for stem in ("linear", "width-sweeps", "depth-sweeps", "width-sharpness", "depth-sharpness"):
        assert {f"{stem}.csv", f"{stem}.png", f"{stem}.svg"} <= names
    linear = list(csv.DictReader((finished.dir / "linear.csv").open()))
    oracle = next(c for c in finished.claims if c.id == "sharpening-is-predicted")
    assert oracle.measured == pytest.approx(float(linear[1]["error"]))
    assert [row["width"] for row in linear] == ["8", "16"] * 2


def test_the_tables_hold_every_training_and_every_curve(finished):
    sweeps = list(csv.DictReader((finished.dir / "width-sweeps.csv").open()))
    assert len(sweeps) == 2 * 3 * 2 + 2 * 3 * 2 + 1 * 2 * 1
    depths = list(csv.DictReader((finished.dir / "depth-sweeps.csv").open()))
    assert {row["parametrisation"] for row in depths} == {"Depth-muP", "muP without 1/sqrt(L)"}
    assert {row["depth"] for row in depths} == {"1", "3"} and len(depths) == 2 * 2 * 2 * 2
    curves = list(csv.DictReader((finished.dir / "width-sharpness.csv").open()))
    assert {row["step"] for row in curves} == {"0", "2", "4"} and len(curves) == 2 * 2 * 2 * 3
    reports = json.loads((finished.dir / "width-sharpness-consistency.json").read_text())
    at = [
        float(r["sharpness"]) for r in curves if (r["parametrisation"], r["step"]) == ("muP", "2")
    ]
    small, large = sum(at[:2]) / 2, sum(at[2:]) / 2
    assert reports["muP"]["ratio"] == pytest.approx(max(small, large) / min(small, large))
    assert reports["muP"]["cv"] == pytest.approx(abs(small - large) / (small + large))
    peers = list(csv.DictReader((finished.dir / "width-sweeps-transfer.csv").open()))
    assert [row["parametrisation"] for row in peers] == ["muP", "muP", "NTP", "NTP", "SP"]


def test_sharpness_is_in_the_units_of_the_tuned_rate(finished):
    """gamma^2 H is measured, so that the threshold is 2/eta_0 at every width."""
    curves = list(csv.DictReader((finished.dir / "width-sharpness.csv").open()))
    limits = {(row["parametrisation"], row["width"]): float(row["threshold"]) for row in curves
              if row["threshold"]}  # fmt: skip
    assert limits == {
        ("muP", "4"): pytest.approx(4.0),
        ("muP", "8"): pytest.approx(4.0),
        ("NTP", "4"): pytest.approx(0.125),
        ("NTP", "8"): pytest.approx(0.125),
    }


def test_an_interrupted_run_continues_to_the_same_tables(tmp_path, finished, monkeypatch):
    class Stop(Exception):
        pass

    def stop(self):
        raise Stop

    monkeypatch.setattr(Run, "figure", lambda *_: None)
    with monkeypatch.context() as patch, tiny(tmp_path / "run") as run:
        patch.setattr(lr_transfer.Study, "edge", stop)
        with pytest.raises(Stop):
            execute(run)
    with tiny(tmp_path / "run", resume=True) as run:
        again = execute(run)
    assert [c.measured for c in again.claims] == [c.measured for c in finished.claims]
    for name in ("width-sweeps.csv", "depth-sharpness.csv", "edge.csv"):
        assert (again.dir / name).read_text() == (finished.dir / name).read_text()


def test_the_largest_shift_counts_a_depth_where_all_diverge_as_the_whole_grid():
    def made(losses):
        rows = [
            {"width": 8, "depth": d, "lr": lr, "seed": 0, "loss": loss}
            for d, row in zip((2, 4), losses, strict=True)
            for lr, loss in zip((1.0, 2.0, 4.0), row, strict=True)
        ]
        return Sweep((Size(8, 2), Size(8, 4)), (1.0, 2.0, 4.0), 1, {}, rows)

    assert lr_transfer.largest_shift(made([[3, 2, 1], [1, 2, 3]])) == 2.0
    assert lr_transfer.largest_shift(made([[3, 2, 1], [None] * 3])) == 3.0
    assert lr_transfer.largest_shift(made([[3, 1, 2], [3, 1, None]])) == 0.0


def test_the_recipe_is_read_without_torch():
    code = "import sys, pantarhei.papers.lr_transfer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
