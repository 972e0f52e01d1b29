"""Recordings of many rates: features against sums by hand, and no leak."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pantarhei.data.series import (
    Amplitude,
    Frames,
    Last,
    Layout,
    Mean,
    Product,
    Raw,
    Recording,
    Scaler,
    Signal,
    Spectrum,
    Windows,
    split_runs,
)
from pantarhei.errors import RequestError


def recording(seed=0, seconds=4.0):
    rng = np.random.default_rng(seed)
    n = int(1000 * seconds)
    return Recording(
        f"r{seed}",
        {
            "fast": Signal(rng.normal(size=n), rate=1000.0),
            "light": Signal(rng.normal(size=n), rate=1000.0),
            "slow": Signal(rng.normal(size=int(7 * seconds) + 1), rate=7.0),
            "odd": Signal(rng.normal(size=9), times=np.sort(rng.uniform(0, seconds, 9))),
            "plan": Signal(rng.normal(size=int(seconds) + 1), rate=1.0),
        },
    )


LAYOUT = Layout(
    0.1,
    inputs=(
        Amplitude("fast"),
        Spectrum("fast", 200.0, bins=6, width=15.0, window=0.25),
        Product("fast", "light"),
        Mean("slow"),
        Last("odd", hold=0.5),
    ),
    controls=(Last("plan"),),
    targets=(Amplitude("fast"),),
)


def test_features_are_sums_over_the_samples_of_a_frame():
    run = recording()
    frames = LAYOUT.frames(run)
    assert LAYOUT.names()[:2] == ("log amplitude of fast", "log power of fast at 162.5 Hz")
    columns = LAYOUT.groups
    assert Mean("slow", sensor="mine").group == "mine"
    assert columns == {
        "fast": (0, 1, 2, 3, 4, 5, 6),
        "fast x light": (7,),
        "slow": (8,),
        "odd": (9,),
    }
    assert np.isnan(frames.inputs[0, [1, 9]]).all()  # nothing to look back on yet
    for k in (12, 17, 30):
        end = 0.1 * (k + 1)
        assert frames.times[k] == pytest.approx(end)
        own = {
            name: s.values[(s.time_of(np.arange(len(s.values))) > end - 0.1)
                           & (s.time_of(np.arange(len(s.values))) <= end)]
            for name, s in run.signals.items()
        }  # fmt: skip
        assert frames.inputs[k, 0] == pytest.approx(0.5 * math.log(2 * (own["fast"] ** 2).mean()))
        assert frames.inputs[k, 7] == pytest.approx((own["fast"] * own["light"]).mean(), abs=1e-6)
        if len(own["slow"]):
            assert frames.inputs[k, 8] == pytest.approx(own["slow"].mean(), rel=1e-5)
        else:
            assert np.isnan(frames.inputs[k, 8])
        before = np.flatnonzero(run["odd"].times <= end)[-1]
        old = end - run["odd"].times[before] > 0.5
        expected = math.nan if old else run["odd"].values[before]
        assert frames.inputs[k, 9] == pytest.approx(expected, nan_ok=True)
        assert frames.controls[k, 0] == pytest.approx(run["plan"].values[math.floor(end)])


def test_the_spectrum_finds_a_sine_and_a_dead_sensor_reads_its_floor():
    t = np.arange(2000) / 1000.0
    wave = Recording("w", {"p": Signal(3 * np.sin(2 * np.pi * 203.0 * t), rate=1000.0)})
    spectrum = Spectrum("p", 200.0, bins=6, width=20.0, window=0.5)
    found = spectrum(wave, np.array([0.3, 1.0, 1.9]), 0.1)
    assert np.isnan(found[0]).all() and np.isfinite(found[1:]).all()
    assert found[1].argmax() == 3 and math.exp(found[1, 3]) == pytest.approx(4.5, rel=0.02)
    assert Amplitude("p")(wave, np.array([1.0]), 0.5)[0, 0] == pytest.approx(math.log(3), abs=0.02)
    band = Amplitude("p", band=(250.0, 300.0))(wave, np.array([1.9]), 0.5)[0, 0]
    assert band < math.log(0.3)  # the sine is outside
    dead = Recording("d", {"p": Signal(np.zeros(2000), rate=1000.0)})
    assert Amplitude("p")(dead, np.array([1.0]), 0.5)[0, 0] == pytest.approx(math.log(0.01))
    assert spectrum(dead, np.array([1.9]), 0.1) == pytest.approx(math.log(0.5e-4))
    for bad in (Spectrum("p", 30.0), Spectrum("p", 480.0), Spectrum("p", 200.0, width=0.5)):
        with pytest.raises(RequestError, match="do not fit"):
            bad(wave, np.array([1.9]), 0.1)
    uneven = Recording("u", {"p": Signal(np.ones(3), times=np.array([0.0, 1.0, 5.0]))})
    with pytest.raises(RequestError, match="not sampled evenly"):
        spectrum(uneven, np.array([1.9]), 0.1)
    with pytest.raises(RequestError, match="stay below half"):
        Amplitude("p", band=(1.0, 600.0))(wave, np.array([1.9]), 0.1)


def test_raw_samples_are_the_last_ones():
    run = Recording("r", {"p": Signal(np.arange(20.0), rate=10.0)})
    found = Raw("p", 4)(run, np.array([0.2, 0.3, 1.05]), 0.1)
    assert np.isnan(found[0]).all() and found[1:].tolist() == [[0, 1, 2, 3], [7, 8, 9, 10]]
    assert Raw("p", 2).names == ("p[-2]", "p[-1]")


@pytest.mark.parametrize("cut", [1.234, 2.7])
def test_no_frame_sees_the_future(cut):
    run = recording(3)
    changed = {}
    for name, s in run.signals.items():
        values = s.values.copy()
        values[s.time_of(np.arange(len(values))) > cut] += 100.0
        changed[name] = Signal(values, s.rate, s.times)
    one, two = LAYOUT.frames(run), LAYOUT.frames(Recording("x", changed))
    before = one.times <= cut
    assert 5 < before.sum() < len(one.times) - 5
    assert np.array_equal(one.inputs[before], two.inputs[before], equal_nan=True)
    after = one.times > cut + 0.1
    assert (one.inputs[after] != two.inputs[after]).any(1).all()
    # and a window takes nothing from later frames but controls and targets
    windows = Windows([one], history=4, horizon=3)
    past, future, target = windows.tensors()
    for i in (0, 5):
        k = int(windows.origin[i])
        assert torch.equal(
            past[i].nan_to_num(), torch.from_numpy(one.inputs[k - 3 : k + 1]).nan_to_num()
        )
        assert torch.equal(future[i], torch.from_numpy(one.controls[k + 1 : k + 4]))
        assert torch.equal(target[i], torch.from_numpy(one.targets[k + 1 : k + 4]))


def test_windows_leave_missing_targets_out_and_read_from_maps(tmp_path):
    runs = [recording(s) for s in range(3)]
    plain = LAYOUT.all_frames(runs)
    mapped = LAYOUT.all_frames(iter(runs), cache=tmp_path / "frames")
    assert isinstance(mapped[0].inputs, np.memmap)
    one, two = (Windows(f, history=4, horizon=3, stride=2) for f in (plain, mapped))
    index = torch.randperm(len(one), generator=torch.Generator().manual_seed(0))[:20]
    for a, b in zip(one.batch(index), two.batch(index), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert len(set(one.run.tolist())) == 3 and one.dropped == 0
    assert one.times[0].item() == plain[0].times[3]

    x = np.arange(10, dtype=np.float32)[:, None]
    holes = x.copy()
    holes[6] = np.nan
    windows = Windows([Frames("a", x[:, 0].astype(float), x, x[:, :0], holes)], 2, 2)
    assert windows.dropped == 2 and windows.origin.tolist() == [1, 2, 3, 6, 7]
    with pytest.raises(RequestError, match="No window of 9 frames back"):
        Windows([Frames("a", x[:, 0].astype(float), x, x, x)], 9, 5)
    with pytest.raises(RequestError, match="1 or more"):
        Windows([], 0, 1)


def test_scales_are_of_the_training_runs_alone():
    generator = np.random.default_rng(0)
    a, b = (generator.normal(5, 2, (50, 3)).astype(np.float32) for _ in range(2))
    a[:, 2], b[:, 2] = 7.0, 7.0
    a[3, 0] = np.nan
    scaler = Scaler.of([a, b])
    both = np.concatenate([a, b]).astype(np.float64)
    assert scaler.mean == pytest.approx(np.nanmean(both, 0), rel=1e-5)
    assert scaler.sd[:2] == pytest.approx(np.nanstd(both, 0)[:2], rel=1e-4)
    assert scaler.sd[2] == 1.0 and scaler.apply(torch.from_numpy(b))[0, 2] == 0.0
    with pytest.raises(RequestError, match="no run"):
        Scaler.of([])
    late = Layout(0.1, LAYOUT.inputs, warmup=0.3).frames(recording())
    assert late.times[0] == pytest.approx(0.4)
    assert np.array_equal(late.inputs, LAYOUT.frames(recording()).inputs[3:], equal_nan=True)


def test_runs_are_split_whole():
    names = [f"run{i}" for i in range(12)]
    train, test = split_runs(names, 0.25, seed=1)
    assert len(test) == 3 and not set(train) & set(test) and set(train) | set(test) == set(names)
    assert split_runs(names, 0.25, seed=1) == (train, test) != split_runs(names, 0.25, seed=2)
    for bad, reason in (
        ((["a", "a"],), "one name"), ((["a"],), "two or more"), ((["a", "b"], ["c"]), "no run 'c'"),
        ((["a", "b"], ["a", "b"]), "two or more"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=reason):
            split_runs(*bad)


def test_bad_signals_are_one_sentence():
    for make, reason in (
        (lambda: Signal(np.ones((2, 2)), 1.0), "one row"),
        (lambda: Signal(np.ones(2)), "a rate, or a time"),
        (lambda: Signal(np.ones(2), rate=0.0), "above 0 Hz"),
        (lambda: Signal(np.ones(2), times=np.ones(3)), "2 samples and 3 times"),
        (lambda: recording()["fats"], "Did you mean 'fast'"),
        (lambda: Layout(9.0, ()).frames(recording()), "too short"),
        (lambda: Product("fast", "slow")(recording(), np.ones(1), 0.1), "not sampled together"),
    ):
        with pytest.raises(RequestError, match=reason):
            make()
