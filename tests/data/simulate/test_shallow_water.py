from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pantarhei.data.simulate.shallow_water import ShallowWater
from pantarhei.errors import RequestError
from pantarhei.rollout import relative_l2

F64 = torch.float64


def run(sea, states, steps):
    spectra = torch.fft.rfft2(states)
    for _ in range(steps):
        spectra = sea.step(spectra)
    return torch.fft.irfft2(spectra, s=states.shape[-2:])


def test_mass_is_exact_and_energy_nearly():
    sea = ShallowWater(size=64, dt=0.1)
    start = sea.initial([0])
    speed = (start[:, 1:] ** 2).sum(1).mean((1, 2)).sqrt()
    torch.testing.assert_close(speed, torch.full((1,), 0.3, dtype=F64))
    end = run(sea, start, 400)  # to t = 40
    assert end[:, 0].mean((1, 2)).abs().max() < 1e-14
    drift = sea.energy(end) / sea.energy(start) - 1
    assert (drift.abs() < 0.05).all() and (drift < 0).all()


def test_a_zonal_jet_in_balance_stays():
    sea = ShallowWater(size=32)
    y = torch.arange(32, dtype=F64) / 32 * 2 * math.pi
    k = 2 * math.pi / 16
    h = 0.2 * torch.cos(2 * y)
    u = 0.2 * 2 * k * torch.sin(2 * y)  # f u = -g dh/dy
    jet = torch.stack([h, u, torch.zeros_like(h)])[None, :, :, None].expand(1, 3, 32, 32)
    torch.testing.assert_close(run(sea, jet.contiguous(), 200), jet, atol=1e-9, rtol=0)


@pytest.mark.parametrize("waves", [1, 2, 4])
def test_a_small_wave_has_the_frequency_of_the_linear_theory(waves):
    """h = a cos(k x - w t): u = (w/k) h/H, v = (f/k) (h shifted), w^2 = f^2 + g H k^2."""
    sea = ShallowWater(size=32, dt=0.02)
    k = 2 * math.pi * waves / 16
    w = math.hypot(1, k)
    x = torch.arange(32, dtype=F64) / 2
    a = 1e-6
    h, u, v = a * torch.cos(k * x), a * w / k * torch.cos(k * x), a / k * torch.sin(k * x)
    wave = torch.stack([h, u, v])[None, :, None].expand(1, 3, 32, 32).contiguous()
    spectra, phase = torch.fft.rfft2(wave), []
    for _ in range(100):
        spectra = sea.step(spectra)
        phase.append(torch.angle(spectra[0, 0, 0, waves]).item())
    measured = -np.polyfit(0.02 * np.arange(100), np.unwrap(phase), 1)[0]
    assert measured == pytest.approx(w, rel=1e-3)


def smooth(n):
    """Waves that the filter does not reach, so that what is left is the scheme's own error."""
    sea = ShallowWater(size=n, waves=1, speed=0.1)
    coarse = torch.fft.rfft2(ShallowWater(size=96, waves=1, speed=0.1).initial([0]))
    my = torch.fft.fftfreq(96, 1 / 96, dtype=F64)[:, None].abs()
    kept = torch.fft.irfft2(coarse * (torch.maximum(my, torch.arange(49.0)) < 3), s=(96, 96))
    return sea, kept[..., :: 96 // n, :: 96 // n].contiguous()


def test_fourth_order_in_time():
    found = []
    for dt in (0.16, 0.08, 0.04):
        _, start = smooth(96)
        start = start[..., ::2, ::2] / 2
        found.append(run(ShallowWater(size=48, dt=dt), start, round(1.6 / dt)))
    gaps = [(a - b).abs().max().item() for a, b in itertools.pairwise(found)]
    assert math.log2(gaps[0] / gaps[1]) > 3.7


def test_finer_grids_converge_faster_than_any_order():
    ends = {n: run(*smooth(n), 40)[..., :: n // 16, :: n // 16] for n in (16, 48, 96)}
    coarse, fine = ((ends[n] - ends[96]).abs().max().item() for n in (16, 48))
    assert math.log(coarse / fine, 3) > 6


def test_a_trajectory_is_worth_forecasting():
    found = ShallowWater(size=32, dt=0.1, every=20, frames=6).simulate([0, 1])
    states = found.tensor()
    assert found.dt == 2.0 and found.channels == ("h", "vx", "vy")
    stays = relative_l2(states[:, :-1].flatten(0, 1), states[:, 1:].flatten(0, 1)).mean()
    assert 0.15 < stays < 0.6  # the sheet: about .3 at 2 time units
    one = ShallowWater(size=32, dt=0.1, every=20, frames=6).simulate([1])
    np.testing.assert_allclose(one.frames(0), found.frames(1), atol=1e-6)


@pytest.mark.parametrize("wrong", [{"size": 9}, {"speed": -1.0}, {"dt": 0.5}])
def test_wrong_settings_of_water(wrong):
    with pytest.raises(RequestError, match=r"even number|positive numbers|too long"):
        ShallowWater(**wrong)
