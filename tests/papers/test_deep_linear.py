"""The deep-linear recipe at a tiny setting, and its arithmetic."""

from __future__ import annotations

import csv
import math
import subprocess
import sys

import numpy as np
import pytest

from pantarhei.errors import RequestError
from pantarhei.papers import deep_linear, load_recipe
from pantarhei.runs import execute, start

TINY = {
    "curve_tasks": ("graded",),
    "hidden": 16,
    "random_starts": 2,
    "depths": (2, 4),
    "depth_seeds": 1,
    "max_steps": 60,
    "gains": (1.0, 1.05),
    "gain_width": 10,
    "gain_depth": 6,
}


def tiny(folder, **changes):
    recipe = load_recipe("deep-linear")
    return start(recipe, out=folder, device="cpu", quiet=True, changes={**TINY, **changes})


def test_a_tiny_run_measures_every_claim_and_leaves_its_evidence(tmp_path):
    with tiny(tmp_path / "run") as run:
        result = execute(run)
    assert [claim.id for claim in result.claims] == [spec.id for spec in deep_linear.CLAIMS]
    names = {path.name for path in result.dir.iterdir()}
    stems = ("mode-curves-graded", "random-start", "staged", "depth-graded", "gain-share")
    assert {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")} <= names
    assert {claim.evidence for claim in result.claims} <= names
    measured = {claim.id: claim for claim in result.claims}
    # of the full size: these two do not depend on what was made tiny
    assert measured["closed-form"].holds and measured["closed-form"].measured > 0
    rows = list(csv.DictReader((result.dir / "closed-form.csv").open()))
    assert len(rows) == 32
    worst = max(float(row["largest_error"]) for row in rows)
    assert measured["closed-form"].measured == pytest.approx(worst)
    dense = list(csv.DictReader((result.dir / "random-starts.csv").open()))
    assert len(dense) == 20
    errors = [float(r["t_half_predicted"]) / float(r["t_half"]) - 1 for r in dense]
    assert np.median(np.abs(errors)) < 0.05
    # no depth of 5, 20 or 40: what cannot be measured does not hold
    assert math.isnan(measured["depth-costs-little"].measured)
    assert not measured["depth-costs-little"].holds


def rows(times, rates, gaussian=100.0):
    out = [
        {"start": "orthogonal", "n": n, "seed": i, "steps": t, "rate": r}
        for (n, t), r in zip(times.items(), rates, strict=True)
        for i in range(3)
    ]
    return out + [
        {"start": "gaussian", "n": 20, "seed": i, "steps": gaussian, "rate": 0.01} for i in range(3)
    ]


def test_the_claims_arithmetic():
    times = {5: 10.0, 20: 20.0, 40: 25.0}
    found = deep_linear.compare_depths(rows(times, (1 / 5, 1 / 20, 1 / 40)), 600)
    assert found == pytest.approx({"saturates": 2.5, "slower": 5.0, "slope": -1.0})
    late = deep_linear.compare_depths(rows(times, (0.1, 0.1, 0.1), gaussian=math.inf), 600)
    assert late == pytest.approx({"saturates": 2.5, "slower": 30.0, "slope": 0.0})
    never = deep_linear.compare_depths(
        rows({5: 10.0, 20: 20.0, 40: math.inf}, (0.1, 0.1, math.nan)), 600
    )
    assert never["saturates"] == math.inf and math.isnan(never["slope"])


def test_tasks(tmp_path):
    with tiny(tmp_path / "run") as run:
        digits = deep_linear.task(run, "digits")
        assert digits.whitened and digits.sigma31.shape[0] == 10
        scaled = deep_linear.task(run, "digits", of_order_one=True).modes().s
        assert np.log(scaled).mean() == pytest.approx(0)
        np.testing.assert_allclose(scaled / scaled[0], digits.modes().s / digits.modes().s[0])
        graded = deep_linear.task(run, "graded")
        np.testing.assert_allclose(graded.modes().s, np.linspace(2.0, 0.5, 32))
        with pytest.raises(RequestError, match="not a task"):
            deep_linear.task(run, "cifar")


def test_the_recipe_is_read_without_torch():
    code = "import sys, pantarhei.papers.deep_linear; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
