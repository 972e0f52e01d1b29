from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from pantarhei.data.simulate.compressible import (
    GAMMA,
    Compressible,
    advance,
    to_conserved,
    to_primitive,
)
from pantarhei.errors import RequestError

F64 = torch.float64


def test_mass_momentum_and_energy_are_conserved():
    start = to_conserved(Compressible(size=32).initial([0, 1, 2, 3]))
    end = advance(start, 0.2, 1 / 32)
    before, after = start.sum((2, 3)), end.sum((2, 3))
    scale = start.abs().sum((2, 3))
    assert ((after - before).abs() / scale).max() < 1e-10
    assert not torch.allclose(start, end, rtol=1e-2)


@pytest.mark.parametrize("velocity", [(0.0, 0.0), (0.7, -0.3)])
def test_a_uniform_flow_stays_uniform(velocity):
    state = torch.tensor([1.3, *velocity, 2.0], dtype=F64).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    end = to_primitive(advance(to_conserved(state), 0.5, 1 / 8))
    torch.testing.assert_close(end, state.contiguous(), atol=1e-12, rtol=0)


def exact_riemann(left, right, s):
    """Sample the exact solution at x/t = s (Toro's book, chapter 4), by bisection for p*."""
    g = GAMMA

    def branch(p, rho, pk):
        c = math.sqrt(g * pk / rho)
        if p > pk:
            return (p - pk) * math.sqrt(2 / ((g + 1) * rho) / (p + (g - 1) / (g + 1) * pk))
        return 2 * c / (g - 1) * ((p / pk) ** ((g - 1) / (2 * g)) - 1)

    (rl, ul, pl), (rr, ur, pr) = left, right
    p = brentq(lambda q: branch(q, rl, pl) + branch(q, rr, pr) + ur - ul, 1e-8, 10)
    u = (ul + ur) / 2 + (branch(p, rr, pr) - branch(p, rl, pl)) / 2
    out = []
    for x in s:
        sign, (rho, uk, pk) = (1, left) if x < u else (-1, right)
        c = math.sqrt(g * pk / rho)
        x, uk, us = sign * x, sign * uk, sign * u
        ratio = p / pk
        if ratio > 1:
            speed = uk - c * math.sqrt((g + 1) / (2 * g) * ratio + (g - 1) / (2 * g))
            star = rho * (ratio + (g - 1) / (g + 1)) / ((g - 1) / (g + 1) * ratio + 1)
            out.append(rho if x < speed else star)
            continue
        cs = c * ratio ** ((g - 1) / (2 * g))
        if x < uk - c:
            out.append(rho)
        elif x > us - cs:
            out.append(rho * ratio ** (1 / g))
        else:
            fan = 2 / (g + 1) + (g - 1) / ((g + 1) * c) * (uk - x)
            out.append(rho * fan ** (2 / (g - 1)))
    return np.array(out)


@pytest.mark.parametrize("axis", [2, 3])
def test_sods_tube_against_the_exact_solution(axis):
    """Two tubes, mirror images of each other, make the problem periodic: 200 cells each."""
    n, t = 200, 0.2
    x = (np.arange(2 * n) + 0.5) / n
    inside = torch.from_numpy((x > 0.5) & (x < 1.5))
    state = torch.zeros(1, 4, 2 * n, dtype=F64)
    state[0, 0], state[0, 3] = torch.where(inside, 1.0, 0.125), torch.where(inside, 1.0, 0.1)
    shape = (1, 4, 4, 2 * n) if axis == 3 else (1, 4, 2 * n, 4)
    state = state.unsqueeze(5 - axis).expand(shape)
    end = to_primitive(advance(to_conserved(state), t, 1 / n)).select(5 - axis, 0)[0]
    exact = exact_riemann((1.0, 0.0, 1.0), (0.125, 0.0, 0.1), (x[n:] - 1.5) / t)
    assert np.abs(end[0, n:].numpy() - exact).mean() < 0.02
    torch.testing.assert_close(end[0], end[0].flip(0), atol=1e-10, rtol=0)


def test_second_order_on_a_wave_that_is_carried_along():
    """rho = 1 + .2 sin(2 pi (x + y)), u = v = 1, p = 1 only moves: the exact answer is known."""
    errors = []
    for n in (32, 64, 128):
        x = (torch.arange(n, dtype=F64) + 0.5) / n
        mean = math.sin(math.pi / n) / (math.pi / n)  # of a cell, over the value at its centre

        def wave(t, x=x, mean=mean):
            return 1 + 0.2 * mean**2 * torch.sin(2 * math.pi * (x[:, None] + x - 2 * t))

        ones = torch.ones(n, n, dtype=F64)
        state = torch.stack([wave(0), ones, ones, ones])[None]
        end = to_primitive(advance(to_conserved(state), 0.1, 1 / n))[0, 0]
        errors.append((end - wave(0.1)).abs().mean().item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > 1.7).all()


def test_the_initial_fields_are_those_of_the_sheet():
    start = Compressible(size=64, mach=0.1).initial(range(24))
    assert (start[:, [0, 3]] > 0).all()
    temperature = start[:, 3].mean((1, 2)) / start[:, 0].mean((1, 2))
    assert temperature.min() > 0.09 and temperature.max() < 11
    speed = torch.hypot(start[:, 1], start[:, 2]).mean((1, 2)) / torch.sqrt(GAMMA * temperature)
    corner = start[:, 1, 0, 0].abs() < 1e-6  # beyond the window nothing moves
    assert 5 <= corner.sum() <= 19
    torch.testing.assert_close(speed[~corner], torch.full_like(speed[~corner], 0.1), rtol=0.02,
                               atol=0)  # fmt: skip


def test_a_case_is_itself_in_any_company():
    gas = Compressible(size=16, stride=2, frames=3)
    pair, alone = gas.simulate([3, 7], seed=1), gas.simulate([7], seed=1)
    np.testing.assert_allclose(pair.frames(1), alone.frames(0), rtol=1e-6)
    assert pair.channels == ("density", "pressure", "vx", "vy") and pair.shape[3:] == (8, 8)
    assert pair.spacing == (0.125, 0.125)


@pytest.mark.parametrize("wrong", [{"size": 4}, {"stride": 3}, {"mach": -1.0}])
def test_wrong_settings_of_gas(wrong):
    with pytest.raises(RequestError, match=r"at least 8 cells|no negative Mach"):
        Compressible(**wrong)
