"""Routers on tables whose right answers are known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.quality import TchebichefQuality
from pantarhei.compute.enhancement.routing import (
    Calibration,
    ExitTable,
    calibrate,
    dynamic_routing,
    measure_exits,
    oracle_routing,
    random_routing,
    static_routing,
)
from pantarhei.data.simulate.codecs import jpeg_luma
from pantarhei.errors import RequestError


def table(images: int = 40, exits: int = 4, seed: int = 0) -> ExitTable:
    draw = torch.Generator().manual_seed(seed)
    quality = torch.tensor([50, 10]).repeat(images // 2)
    gain = torch.rand(images, exits, generator=draw).cumsum(1).double() / exits
    macs = (torch.arange(1, exits + 1) * 100).expand(images, -1)
    scores = torch.rand(images, exits - 1, generator=draw).double()
    return ExitTable(
        quality, torch.full((images,), 30.0).double(), 30 + gain, scores, macs, macs + 5
    )


def slow_exit(scores: Tensor, threshold: float) -> int:
    for k, score in enumerate(scores.tolist(), 1):
        if score >= threshold:
            return k
    return len(scores) + 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), threshold=st.floats(0, 1.01))
def test_routes_are_the_first_good_exit(seed: int, threshold: float):
    t = table(seed=seed)
    routed = t.route(torch.tensor([threshold, threshold], dtype=torch.float64))
    assert routed.tolist() == [[slow_exit(s, threshold) for s in t.scores]] * 2


def test_the_sweep_is_what_each_threshold_gives():
    t = table()
    calibration = calibrate(t)
    assert len(calibration.thresholds) == 202
    assert calibration.thresholds[1] - calibration.thresholds[0] == pytest.approx(0.005)
    for index in (0, 70, 140, 201):
        outcome = dynamic_routing(t, calibration.thresholds[index])
        assert calibration.gain[index] == pytest.approx(float(outcome.gain.mean()))
        share = (outcome.macs / t.macs[:, -1]).mean()
        assert calibration.share[index] == pytest.approx(float(share))
    assert calibration.share[0] == pytest.approx(105 / 400)
    assert calibration.gain[-1] == pytest.approx(calibration.last_gain)


def curve(**changes: object) -> Calibration:
    values = {
        "thresholds": (0.0, 0.5, 0.9, 1.005),
        "gain": (0.4, 0.9, 0.98, 1.0),
        "share": (0.4, 0.5, 0.8, 1.02),
        "last_gain": 1.0,
        "chosen": 0.9,
    }
    return Calibration(**{**values, **changes})  # type: ignore[arg-type]


def test_three_ways_to_choose_a_threshold():
    sweep = curve()
    assert sweep.turning_point() == 0.5
    assert sweep.under(0.8) == 0.9
    assert sweep.under(0.79) == 0.5
    assert sweep.within_loss(0.05) == 0.9
    assert sweep.within_loss(0.0) == 1.005
    assert sweep.within_loss(1.0) == 0.0
    with pytest.raises(RequestError, match="raise the budget"):
        sweep.under(0.3)


def test_a_threshold_better_than_the_last_exit_is_taken_and_a_flat_curve_has_a_corner():
    falling = curve(gain=(1.1, 1.05, 1.0, 1.0))
    assert falling.within_loss(0.02) == 0.0
    assert curve(gain=(1.0, 1.1, 1.0, 1.0)).within_loss(0.02) == 0.5
    assert falling.turning_point() == 0.0
    assert curve(last_gain=2.0).within_loss(0.1) == 1.005


def test_a_calibration_survives_json_and_refuses_what_it_is_not():
    sweep = calibrate(table())
    import json

    assert Calibration.from_json(json.loads(json.dumps(sweep.to_json()))) == sweep
    good = curve().to_json()
    for bad in (
        {},
        {**good, "gain": None},
        {**good, "gain": ["x"]},
        {**good, "share": [1.0]},
        {**good, "chosen": "high"},
        {**good, "thresholds": [], "gain": [], "share": []},
    ):
        with pytest.raises(RequestError, match="calibrate again"):
            Calibration.from_json(bad)


def test_the_oracle_takes_the_exit_of_the_label():
    t = table()
    outcome = oracle_routing(t, easiest=50, hardest=10)
    assert outcome.exit[t.quality == 50].unique().tolist() == [1]
    assert outcome.exit[t.quality == 10].unique().tolist() == [4]
    assert outcome.macs.double().mean() == 250


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), threshold=st.floats(0.2, 0.95))
def test_random_routing_spends_the_same_and_knows_nothing(seed: int, threshold: float):
    t = table(seed=seed)
    dynamic = dynamic_routing(t, threshold)
    chance = random_routing(t, dynamic)
    if float(dynamic.macs.double().mean()) <= 400:
        assert float(chance.macs.mean()) == pytest.approx(float(dynamic.macs.double().mean()))
    low, high = t.gain.mean(0).min(), t.gain.mean(0).max()
    assert low <= chance.gain.mean() <= high


def test_an_informed_router_beats_chance_and_an_uninformed_does_not():
    t = table(400)
    gain = torch.tensor([0.2, 0.5, 0.7, 0.8]).double().expand(400, -1).clone()
    gain[::2] = 1.0  # every other image is as good at once
    scores = torch.zeros(400, 3).double()
    scores[::2] = 1.0
    informed = ExitTable(t.quality, t.psnr_in, 30 + gain, scores, t.macs, t.macs)
    clever = dynamic_routing(informed, 0.5)
    assert clever.gain.mean() == pytest.approx(0.9)
    assert clever.gain.mean() > random_routing(informed, clever).gain.mean() + 0.05
    same = static_routing(informed, 2)
    assert random_routing(informed, same).gain.mean() == pytest.approx(float(same.gain.mean()))


def test_the_histogram_counts_every_image():
    t = table()
    outcome = dynamic_routing(t, 0.6)
    histogram = outcome.histogram(t.quality, 4)
    assert set(histogram) == {10, 50}
    assert sum(map(sum, histogram.values())) == 40
    assert histogram[50][0] == int(((outcome.exit == 1) & (t.quality == 50)).sum())


def test_measured_exits_are_what_a_dynamic_run_does():
    torch.manual_seed(0)
    net, quality = NestedUNet(levels=4, width=6), TchebichefQuality()
    for head in net.heads:
        torch.nn.init.normal_(head.residual[-1].weight, std=0.1)
    images = [torch.rand(1, 33, 40), torch.nn.functional.avg_pool2d(torch.rand(1, 64, 48), 5, 1)]
    measured = measure_exits(net, images, (10, 50), quality)
    assert net.training
    assert measured.quality.tolist() == [10, 50, 10, 50]
    threshold = float(measured.scores.median())
    outcome = dynamic_routing(measured, threshold)
    row = 0
    for image in images:
        compressed = jpeg_luma(image.expand(2, 1, -1, -1), torch.tensor([10, 50]))
        routed = net.eval().dynamic(compressed, threshold, quality)
        assert routed.exit.tolist() == outcome.exit[row : row + 2].tolist()
        assert routed.macs.tolist() == outcome.macs[row : row + 2].tolist()
        row += 2
    assert len(measured.rows()) == 4 and measured.rows()[1]["quality"] == 50
    with pytest.raises(RequestError, match="no image"):
        measure_exits(net, [], (10,))
