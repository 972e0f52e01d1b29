"""Scores, alarms, failures, ablations and attributions on small cases worked by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pantarhei.bayes import Predictive
from pantarhei.data.series import Frames, Last, Layout, Recording, Signal, Windows
from pantarhei.errors import RequestError
from pantarhei.systems.series import (
    ablate,
    alarm_table,
    attribute,
    bootstrap_by_run,
    break_sensor,
    event_leads,
    onset_auc,
    onsets,
    score,
    train_forecaster,
)


def windows_of(*series, history=1, horizon=3):
    frames = []
    for i, values in enumerate(series):
        y = np.array(values, np.float32)[:, None]
        frames.append(Frames(f"r{i}", np.arange(len(y), dtype=float), y, y[:, :0], y))
    return Windows(frames, history, horizon)


def test_scores_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(3, 2000, 1, generator=generator) * 0.2
    told = Predictive(means, torch.full((3, 2000, 1), 0.49))
    y = told.mean + told.variance.sqrt() * torch.randn(2000, 1, generator=generator)
    found = score(told, y)
    assert found["rmse"] == pytest.approx(float((y - told.mean).square().mean().sqrt()))
    assert found["coverage"] == pytest.approx(0.95, abs=0.02)
    assert found["z_sd"] == pytest.approx(1, abs=0.04) and found["calibration_error"] < 0.03
    assert found["aleatoric"] == pytest.approx(0.7) and 0.05 < found["epistemic"] < 0.25
    assert found["nll"] == pytest.approx(float(told.nll(y).mean()))
    where = torch.arange(2000) < 10
    assert score(told, y, where)["windows"] == 10
    assert math.isnan(score(told, y, torch.zeros(2000).bool())["rmse"])
    with pytest.raises(RequestError, match="shape"):
        score(told, y[:, 0])


def test_the_bootstrap_draws_whole_runs():
    run = torch.arange(12).repeat_interleave(50)
    values = run.float() + 0.01 * torch.randn(600, generator=torch.Generator().manual_seed(0))
    low, high = bootstrap_by_run(lambda i: values[i].mean(), run)
    # the mean of 12 run means has sd 3.45 / sqrt(12) = 1.0; single windows would say 0.14
    assert 2.8 < high - low < 5.0 and low < 5.5 < high
    with pytest.raises(RequestError, match="two runs"):
        bootstrap_by_run(lambda i: 0.0, torch.zeros(5))


def test_onsets_alarms_and_leads_by_hand():
    #      origin:        0  1  2  3  4  5  6
    windows = windows_of([0, 0, 0, 0, 9, 9, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 9, 9, 9])
    quiet, onset = onsets(windows, 5.0, 2)
    assert windows.origin.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]
    assert quiet.tolist() == [True] * 4 + [False] * 2 + [True] * 7
    assert onset.tolist() == [False] * 2 + [True] * 2 + [False] * 7 + [True] * 2
    p = torch.tensor([0.9, 0, 0.6, 0.8, 1, 1, 0.7, 0.6, 0.6, 0, 0, 0, 0.1])
    # the first onset comes after two frames of alarm, the second unannounced
    assert event_leads(p, windows, 5.0, 0.5).tolist() == [2, 0]
    assert event_leads(p, windows, 5.0, 0.05).tolist() == [2, 1]
    (row,) = alarm_table(p, windows, 5.0, step=0.1, within=2, levels=[0.5], miss_cost=10)
    assert row["caught"] == 0.5 and row["false_rate"] == pytest.approx(4 / 7)
    # spells in vain: origin 0 of the first run, its 6, and 0-1 of the second, in 1.1 s of quiet
    assert row["false_alarms"] == pytest.approx(100 * 3 / 1.1)
    assert row["announced"] == 0.5 and row["lead"] == pytest.approx(0.1)
    assert row["cost"] == pytest.approx(100 * (3 + 10) / 1.1)
    assert onset_auc(p, quiet, onset) == pytest.approx(roc_auc_score(onset[quiet], p[quiet]))
    assert math.isnan(onset_auc(p, quiet, torch.zeros(13).bool()))
    rows = alarm_table(p, windows, 5.0, step=0.1, within=2)
    assert all(a["caught"] >= b["caught"] for a, b in itertools.pairwise(rows))
    with pytest.raises(RequestError, match="nothing to warn of"):
        alarm_table(p, windows, -1.0, step=0.1, within=2)
    with pytest.raises(RequestError, match="horizon of as many"):
        onsets(windows, 5.0, 4)


def test_sensors_fail_in_five_ways():
    values = np.array([1.0, -3.0, 2.0, np.nan, 5.0, 6.0])
    run = Recording("r", {"p": Signal(values, rate=2.0), "q": Signal(values, rate=2.0)})

    def broken(kind, **options):
        found = break_sensor(run, "p", kind, at=1.0, **options)
        assert found["q"] is run["q"] and found["p"].values[:3].tolist() == [1, -3, 2]
        return found["p"].values[3:].tolist()

    assert broken("dead") == [0, 0, 0] and broken("dead", value=4.0) == [4, 4, 4]
    assert broken("stuck") == [2, 2, 2] and broken("saturated") == [3, 3, 3]
    assert np.isnan(broken("dropped")).all()
    noise = broken("noisy", value=100.0, seed=1)
    assert noise == broken("noisy", value=100.0, seed=1) != broken("noisy", value=100.0, seed=2)
    assert np.abs(noise).max() > 10
    assert np.array_equal(run["p"].values, values, equal_nan=True)
    assert (break_sensor(run, "p", "dead")["p"].values == 0).all()
    with pytest.raises(RequestError, match="Did you mean 'stuck'"):
        break_sensor(run, "p", "stick")


@pytest.fixture(scope="module")
def study():
    """y follows z with a delay of one frame; w is noise; u, the plan, adds to what comes next."""
    layout = Layout(
        1.0, inputs=(Last("y"), Last("z"), Last("w")), controls=(Last("u"),), targets=(Last("y"),)
    )
    rng = np.random.default_rng(0)
    frames = []
    for r in range(5):
        z, w, u = rng.normal(size=(3, 200))
        y = np.r_[0, z[:-1]] + 0.5 * u + 0.05 * rng.normal(size=200)
        signals = {"y": y, "z": z, "w": w, "u": u}
        frames.append(
            layout.frames(Recording(f"{r}", {k: Signal(v, rate=1.0) for k, v in signals.items()}))
        )
    return layout, Windows(frames[:4], 2, 2), Windows(frames[4:], 2, 2)


FAST = {"epochs": 25, "members": 3, "hidden": (8,), "lr": 0.02, "quiet": True, "device": "cpu"}


def test_the_ablation_finds_the_sensor_that_matters(study):
    layout, train, test = study
    sets = {"plan": ["u"], "plan and w": ["u", "w"], "plan and z": ["u", "z"]}
    rows = {row["inputs"]: row for row in ablate(layout, train, test, sets, lead=1, **FAST)}
    assert rows["plan and z"]["rmse"] < 0.3 * rows["plan"]["rmse"]
    assert abs(rows["plan and w"]["rmse"] / rows["plan"]["rmse"] - 1) < 0.1


def test_attributions_name_sensor_and_frame_and_are_complete(study):
    layout, train, test = study
    forecaster = train_forecaster(layout, train, leads=(1, 2), **FAST)
    index = torch.arange(0, 60, 3)
    rows = attribute(forecaster, test, index, lead=1)
    top = sorted(rows, key=lambda row: -row["magnitude"])
    assert [(row["group"], row["frame"]) for row in top[:2]] == [("z", 0), ("u", 1)]
    x = forecaster.encoder(*test.batch(index)[:2])
    sd = float(forecaster.targets.sd[0])
    moved = (
        forecaster.predict_encoded(x).mean[:, 0] - forecaster.predict_encoded(0 * x[:1]).mean[:, 0]
    )
    assert sum(row["share"] for row in rows) == pytest.approx(sd * moved.mean().item(), abs=1e-3)
    calm = test.batch(torch.arange(60))
    rows = attribute(forecaster, test, index, lead=2, of="log variance", start=calm)
    start = forecaster.encoder(*calm[:2]).mean(0, keepdim=True)
    log = [forecaster.predict_encoded(v).variance[:, 1].log().mean().item() for v in (x, start)]
    assert sum(row["share"] for row in rows) == pytest.approx(log[0] - log[1], abs=1e-3)
    with pytest.raises(RequestError, match="lead 7"):
        attribute(forecaster, test, index, lead=7)


def test_a_sensor_that_drops_out_raises_the_doubt(study):
    layout, train, test = study
    forecaster = train_forecaster(layout, train, leads=(1,), **FAST)
    frames = test.frames[0]
    gone = frames.inputs.copy()
    gone[:, 1] = np.nan
    dropped = Windows([Frames("x", frames.times, gone, frames.controls, frames.targets)], 2, 2)
    before, after = (forecaster.forecast(w).epistemic.mean() for w in (test, dropped))
    assert torch.isfinite(after) and after > 2 * before


def test_a_network_that_has_seen_sensors_drop_goes_on_without_them(study):
    layout, train, test = study
    y, frames = test.tensors()[2][:, 0], test.frames[0]
    gone = frames.inputs.copy()
    gone[:, 1] = np.nan
    dropped = Windows([Frames("x", frames.times, gone, frames.controls, frames.targets)], 2, 2)
    found = {}
    for drop in (0.0, 0.3):
        forecaster = train_forecaster(layout, train, leads=(1,), drop=drop, **FAST)
        found[drop] = [score(forecaster.forecast(w)[:, 0], y) for w in (test, dropped)]
    # without z the best there is has the spread of z, and must say so
    assert 0.8 < found[0.3][1]["z_sd"] < min(1.6, 0.6 * found[0.0][1]["z_sd"])
    assert found[0.3][1]["nll"] < found[0.0][1]["nll"] - 0.5
    assert found[0.3][0]["rmse"] < 0.6 * found[0.3][1]["rmse"]
    with pytest.raises(RequestError, match="chance"):
        train_forecaster(layout, train, drop=1.0, **FAST)
