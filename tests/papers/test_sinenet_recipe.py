"""The SineNet recipe at a tiny setting, and its arithmetic."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from pantarhei.errors import RequestError
from pantarhei.papers import load_recipe, sinenet
from pantarhei.runs import execute, start
from pantarhei.systems.neuralop_fno import neuralop
from pantarhei.systems.sizes import weight_count

TINY = {
    "size": 16,
    "train": 4,
    "valid": 2,
    "test": 3,
    "width": 2,
    "budget": 6000,
    "updates": 2,
    "checks": 1,
    "batch_size": 4,
    "seeds": 1,
}


def tiny(folder, **changes):
    recipe = load_recipe("sinenet")
    return start(recipe, out=folder, device="cpu", quiet=True, changes={**TINY, **changes})


def test_a_tiny_run_measures_its_claims_and_leaves_its_evidence(tmp_path):
    changes = {"translation": (), "smoke": ("1", "2", "2 entangled", "wide"),
               "water": ("1 circular", "1 zeros")}  # fmt: skip
    with tiny(tmp_path / "run", **changes) as run:
        result = execute(run)
    names = {path.name for path in result.dir.iterdir()}
    stems = ("horizon", "spectrum", "states", "misalignment")
    assert {f"smoke-{s}.{e}" for s in stems for e in ("png", "svg")} <= names
    assert {"models.csv", "smoke-horizon.csv", "smoke-misalignment.csv"} <= names
    rows = list(csv.DictReader((result.dir / "models.csv").open()))
    assert [r["model"] for r in rows if r["study"] == "smoke"] == [*changes["smoke"], "persistence"]
    by_name = {(r["study"], r["model"]): r for r in rows}
    measured = {claim.id: claim for claim in result.claims}
    assert {claim.id for claim in result.claims if claim.made} == {"more-waves"}

    def error(study, model):
        return float(by_name[study, model]["rollout"])

    assert measured["more-waves"].measured == pytest.approx(
        error("smoke", "2") / error("smoke", "1")
    )
    for model in ("1", "2"):
        assert int(by_name["smoke", model]["parameters"]) == pytest.approx(6000, rel=0.1)
    horizon = list(csv.DictReader((result.dir / "smoke-horizon.csv").open()))
    own = [float(r["relative_l2"]) for r in horizon if r["model"] == "2"]
    assert len(own) == 10 and sum(own) / 10 == pytest.approx(error("smoke", "2"), rel=1e-5)


def test_a_run_that_was_interrupted_gives_the_same(tmp_path, monkeypatch):
    changes = {"translation": ("1", "2"), "smoke": ()}

    def rollouts(folder):
        rows = csv.DictReader((folder / "models.csv").open())
        return [(row["model"], row["rollout"], row["one_step"]) for row in rows]

    with tiny(tmp_path / "whole", **changes) as run:
        execute(run)
    trained = sinenet.Study.train

    def interrupted(self, model, seed):
        if model == "2":
            raise KeyboardInterrupt
        return trained(self, model, seed)

    monkeypatch.setattr(sinenet.Study, "train", interrupted)
    with tiny(tmp_path / "run", **changes) as run, pytest.raises(KeyboardInterrupt):
        execute(run)
    monkeypatch.undo()
    recipe, options = load_recipe("sinenet"), {"device": "cpu", "quiet": True, "resume": True}
    with start(recipe, out=tmp_path / "run", **options) as run:
        execute(run)
    assert rollouts(tmp_path / "run") == rollouts(tmp_path / "whole")


def test_other_networks_and_flows_are_built_and_run(tmp_path):
    others = ("1", "deeper", "unet", "dil-resnet", "fno", "ffno", "auto-deeponet")
    with tiny(tmp_path / "run", smoke=others, translation=("1 longer", "2")) as run:
        study = sinenet.Study.of(run, "smoke")
        for model in others:
            assert study.network(model)(torch.zeros(1, 12, 16, 16)).shape == (1, 3, 16, 16)
        assert sinenet.Study.of(run, "translation").updates("1 longer") > 2
        run.settings["budget"] = 40_000
        assert study.network("unet-mod")(torch.zeros(1, 12, 16, 16)).shape == (1, 3, 16, 16)
        gas = sinenet.Study.of(run, "gas")
        assert gas.data.shape == (9, 21, 4, 16, 16)
    with (
        tiny(tmp_path / "wrong", smoke=("many",)) as run,
        pytest.raises(RequestError, match="no model"),
    ):
        list(sinenet.recipe(run))


def test_every_baseline_has_the_budgets_weights_at_every_scale():
    for scale in ("cpu", "gpu"):
        settings = SimpleNamespace(**sinenet.SETTINGS[scale])
        size = settings.size
        data = SimpleNamespace(channels=("smoke", "vx", "vy"), shape=(1, 14, 3, size, size))
        study = sinenet.Study(SimpleNamespace(settings=settings), "smoke", data, ())
        coarse = {"unet-mod"} if scale == "cpu" else set()  # from 5 to 6 channels it grows by 44 %
        others = {"wide", "neuralop-fno", "1 longer"} | coarse
        for model in {*settings.smoke, *sinenet.KINDS} - others:
            with torch.device("meta"):
                weights = weight_count(study.network(model))
            assert weights == pytest.approx(settings.budget, rel=0.021), (scale, model)


def test_baselines_are_trained_beside_the_chains_and_no_claim_is_made_of_them(tmp_path):
    others = ("dil-resnet", "fno", "auto-deeponet", "auto-deeponet-cnn")
    changes = {"water": (), "translation": (), "budget": 300_000, "precision": "bf16"}
    with tiny(tmp_path / "run", smoke=others, **changes) as run:
        result = execute(run)
    rows = list(csv.DictReader((result.dir / "models.csv").open()))
    assert [r["model"] for r in rows] == [*others, "persistence"]
    for r in rows[:-1]:
        assert int(r["parameters"]) == pytest.approx(300_000, rel=0.03)
        assert int(r["updates"]) == 2 and math.isfinite(float(r["rollout"]))
    assert all(math.isnan(claim.measured) for claim in result.claims)


def test_a_missing_library_is_said_before_anything_is_simulated(tmp_path, monkeypatch):
    neuralop.cache_clear()
    monkeypatch.setitem(sys.modules, "neuralop.models", None)
    monkeypatch.setattr(sinenet.Study, "of", lambda *_: pytest.fail("simulated first"))
    with (
        tiny(tmp_path / "run", smoke=("1", "neuralop-fno")) as run,
        pytest.raises(RequestError, match="pip install"),
    ):
        list(sinenet.recipe(run))
    neuralop.cache_clear()


def row(study, model, *rollouts):
    return [{"study": study, "model": model, "rollout": r} for r in rollouts]


def test_the_claims_arithmetic():
    rows = [
        *row("smoke", "1", 0.3, 0.5),
        *row("smoke", "2", 0.38, 0.38),
        *row("smoke", "4", 0.39),
        *row("smoke", "8", 0.2),
        *row("smoke", "8 entangled", 0.25),
        *row("smoke", "wide", 0.25),
        *row("water", "4 circular", 0.02),
        *row("water", "4 zeros", math.inf),
        *row("smoke", "persistence", 0.9),
    ]
    found = sinenet.compare(rows, {"water": ("4 circular", "4 zeros")})
    assert found == pytest.approx(
        {"more-waves": 0.5, "no-doubling-hurts": 0.39 / 0.38, "beats-wider-unet": 0.8,
         "circular-padding": 0.0, "disentangle": 0.8}
    )  # fmt: skip
    both = [*row("smoke", "1", math.inf), *row("smoke", "4", math.inf)]
    assert math.isnan(sinenet.compare(both, {"water": ()})["more-waves"])
    assert "no-doubling-hurts" not in sinenet.compare(both, {"water": ()})


def test_the_sheets_bounds_stand():
    bounds = {spec.id: (spec.direction, spec.bound_at("gpu")) for spec in sinenet.CLAIMS}
    assert bounds == {
        "more-waves": ("<=", 0.93),
        "no-doubling-hurts": ("<=", 1.02),
        "beats-wider-unet": ("<=", 0.95),
        "circular-padding": ("<=", 0.7),
        "disentangle": ("<=", 1.0),
    }


def test_the_recipe_is_read_without_torch_too():
    code = "import sys, pantarhei.papers.sinenet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
