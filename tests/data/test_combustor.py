"""The combustor against the statistics of its Fokker-Planck equation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pantarhei.data.series import Decay, Recording, Signal
from pantarhei.data.simulate.combustor import combustor, limit_cycle, mode, stationary_moment
from pantarhei.errors import RequestError

RATES = (-40.0, -10.0, 20.0, 60.0)


@pytest.fixture(scope="module")
def stationary():
    """500 runs of 2.4 s at each of four constant growth rates, the start left out."""
    nu = np.repeat(RATES, [200, 600, 300, 100])
    start = np.where(nu > 0, np.sqrt(np.maximum(nu, 0) * 8 / 4.8), 0.0)
    p = mode(np.repeat(nu[:, None], 12, 1), np.random.default_rng(0), every=0.2, start=start)
    return {rate: p[nu == rate][:, 4000:].astype(np.float64) for rate in RATES}


@pytest.mark.parametrize("rate", RATES)
def test_the_mean_square_amplitude_is_that_of_the_fokker_planck_equation(stationary, rate):
    found = 2 * (stationary[rate] ** 2).mean()
    assert found == pytest.approx(stationary_moment(rate), rel=0.03)


def test_the_sheets_figures_and_the_limits_of_the_density():
    assert [round(stationary_moment(nu), 3) for nu in (-40.0, -10.0)] == [0.493, 1.682]
    assert [round(stationary_moment(nu), 1) for nu in (20.0, 60.0)] == [33.3, 100.0]
    assert stationary_moment(-4000.0) == pytest.approx(40 / (2 * 4000), rel=1e-3)  # linear
    assert stationary_moment(500.0, 1) == pytest.approx(limit_cycle(500.0), rel=1e-3)
    assert limit_cycle(-3.0) == 0.0


def test_the_quiet_mode_forgets_within_one_over_its_damping(stationary):
    """The autocorrelation after whole periods falls as exp(-|nu| t)."""
    p = stationary[-40.0]
    for periods in (10, 20):
        lag = 10 * periods
        found = (p[:, lag:] * p[:, :-lag]).mean() / (p**2).mean()
        assert found == pytest.approx(math.exp(-40 * periods / 1000), abs=0.03)


@pytest.mark.parametrize("rate", [-40.0, -10.0])
def test_the_envelope_tells_the_damping_of_a_quiet_mode(stationary, rate):
    runs = [Recording("x", {"p": Signal(p, rate=10_000.0)}) for p in stationary[rate][:100]]
    decay = Decay("p", 1000.0, window=1.5)
    found = np.concatenate([decay(run, np.array([1.0, 1.55, 1.9]), 0.05) for run in runs])
    assert np.isnan(found[::3]).all()
    # a window of T seconds tells nu with a spread of about sqrt(2 nu / T), and nonlinear damping
    # adds to it where the mode is louder
    assert np.nanmean(found) == pytest.approx(-rate, rel=0.2)
    with pytest.raises(RequestError, match="do not fit"):
        Decay("p", 1000.0, lag=0.5)(runs[0], np.array([1.0]), 0.05)


def test_without_noise_it_runs_into_the_limit_cycle_and_grows_exponentially_before():
    p = mode([[30.0] * 20], np.random.default_rng(0), gamma=0.0, every=0.05, start=0.01)[0]
    assert np.abs(p[-1000:]).max() == pytest.approx(limit_cycle(30.0), rel=0.03)
    assert 2 * (p[-1000:].astype(float) ** 2).mean() == pytest.approx(
        limit_cycle(30.0) ** 2, rel=0.01
    )
    one, two = (np.abs(p[k : k + 100]).max() for k in (0, 1000))
    assert math.log(two / one) == pytest.approx(30.0 * 0.1, rel=0.02)


def test_frequency_does_not_change_the_slow_statistics():
    nu = np.full((300, 4), -40.0)
    for f0 in (500.0, 2000.0):
        p = mode(nu, np.random.default_rng(1), f0=f0, every=0.1)
        assert p.shape == (300, 4 * f0)
        tail = p[:, p.shape[1] // 2 :].astype(float)
        assert 2 * (tail**2).mean() == pytest.approx(stationary_moment(-40.0), rel=0.05)


def test_a_run_depends_on_its_number_alone():
    three = combustor(3, seconds=0.3, seed=7)
    one = combustor(1, seconds=0.3, seed=7, first=2)
    assert [r.name for r in three.recordings] == ["run000", "run001", "run002"]
    for name, signal in three.recordings[2].signals.items():
        assert np.array_equal(signal.values, one.recordings[0].signals[name].values), name
    assert np.array_equal(three.growth[2], one.growth[0])
    other = combustor(1, seconds=0.3, seed=8)
    assert not np.array_equal(other.growth[0], three.growth[0])


def test_the_stand_follows_its_commands_and_the_sensors_are_what_they_say():
    made = combustor(20, seconds=12.0, seed=1, f0=100.0)
    signals = made.recordings[0].signals
    assert signals["p"].rate == 1000.0 and signals["pressure_set"].rate == 100.0
    for name, low, high, noise in (("pressure", 50, 80, 0.1), ("mixture", 3, 6, 0.03)):
        found = np.stack([r.signals[name].values for r in made.recordings])
        wanted = np.stack([r.signals[f"{name}_set"].values for r in made.recordings])
        assert (low <= wanted).all() and (wanted <= high).all()
        assert all(len(np.unique(row)) == 3 for row in wanted)  # new ones every 5 s
        # a second after a step 1 - 1/e of it is done
        done = (found[:, 600] - wanted[:, 499]) / (wanted[:, 600] - wanted[:, 499])
        assert np.median(done) == pytest.approx(1 - math.exp(-1), abs=0.03)
        assert np.std(np.diff(found[:, :400]) / math.sqrt(2)) == pytest.approx(noise, rel=0.1)
    p, light = (signals[name].values.astype(float) for name in ("p", "light"))
    rest = light[3:] - 0.3 * p[:-3]
    assert rest.std() == pytest.approx(0.8, rel=0.05)
    growth = combustor(200, seconds=0.1, seed=2, f0=100.0).growth[:, 0]
    # sd of 26 ph + 18 rh + 12 ph rh - 10 th + delta + w at the start, from those of its parts
    third = 1 / math.sqrt(3)
    sd = math.sqrt((26**2 + 18**2 + 10**2) * third**2 + (12 / 3) ** 2 + 12**2 + 4**2 + 5.6)
    assert growth.mean() == pytest.approx(-22, abs=4.5) and growth.std() == pytest.approx(
        sd, rel=0.15
    )


def test_too_little_is_refused():
    with pytest.raises(RequestError, match="too little"):
        combustor(0)
    with pytest.raises(RequestError, match="whole number of samples"):
        mode([[1.0]], np.random.default_rng(0), every=0.00015)
