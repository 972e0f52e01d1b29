from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from pantarhei.data.simulate.smoke import Smoke, divergence
from pantarhei.errors import RequestError

F64 = torch.float64


def at_rest(smoke):
    b, n, _ = smoke.shape
    return smoke, smoke.new_zeros(b, n, n + 1), smoke.new_zeros(b, n + 1, n)


def test_the_flow_has_no_divergence_and_the_walls_hold():
    box = Smoke(size=64)
    smoke, b = box.initial([0, 1])
    state = at_rest(smoke.float())
    for _ in range(64):
        state = box.step(state, b.float())
    _, u, v = state
    assert divergence(u, v, box.dx).abs().max() < 1e-4
    assert u[:, :, [0, -1]].abs().max() == 0 == v[:, [0, -1]].abs().max()
    assert u.abs().max() > 0.1


def test_without_buoyancy_it_stays_at_rest():
    found = Smoke(size=16, buoyancy_low=0, buoyancy_high=0, frames=3).simulate([0, 1])
    states = found.tensor()
    assert states[:, :, 1:].abs().max() == 0
    smoke = Smoke(size=16).initial([0, 1])[0]
    torch.testing.assert_close(states[:, 2, 0].double(), smoke, atol=1e-5, rtol=1e-5)


def test_mirror_images_stay_mirror_images():
    box = Smoke(size=32)
    smoke, b = box.initial([3])
    one, two = at_rest(smoke), at_rest(smoke.flip(2))
    for _ in range(20):
        one, two = box.step(one, b), box.step(two, b)
    torch.testing.assert_close(one[0], two[0].flip(2), atol=1e-9, rtol=0)
    torch.testing.assert_close(one[1], -two[1].flip(2), atol=1e-9, rtol=0)
    torch.testing.assert_close(one[2], two[2].flip(2), atol=1e-9, rtol=0)


def faces(n):
    h = torch.arange(n, dtype=F64) / n * 32 + 16 / n
    f = torch.arange(n + 1, dtype=F64) / n * 32
    return h, f


def test_the_projection_finds_the_part_without_divergence_to_second_order():
    """Manufactured: curl of psi plus gradient of phi, both of which respect the walls."""
    k, errors = math.pi / 32, []
    for n in (16, 32, 64):
        h, f = faces(n)
        # psi = sin(k x) sin(2 k y), phi = cos(k x) cos(k y)
        u = 2 * k * torch.sin(k * f) * torch.cos(2 * k * h)[:, None]
        v = -k * torch.cos(k * h) * torch.sin(2 * k * f)[:, None]
        gx = -k * torch.sin(k * f) * torch.cos(k * h)[:, None]
        gy = -k * torch.cos(k * h) * torch.sin(k * f)[:, None]
        found = Smoke(size=n).projected((u + gx)[None], (v + gy)[None])
        errors.append(max((found[0][0] - u).abs().max(), (found[1][0] - v).abs().max()).item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > 1.9).all()


def test_diffusion_damps_a_mode_as_the_heat_equation_does():
    """sin(k x) sin(k y) vanishes at the walls, as zero beyond them asks: exp(-2 nu k^2 t)."""
    k, errors = math.pi / 32, []
    for n in (16, 32, 64):
        box = Smoke(size=n, viscosity=1.0, dt=12.0 * (16 / n) ** 2)
        _, f = faces(n)
        inner = (torch.sin(k * f) * torch.sin(k * f)[:, None])[None, 1:-1, 1:-1]
        q = inner
        for _ in range((n // 16) ** 2):
            q = box.diffused(q)
        errors.append((q - inner * math.exp(-2 * k**2 * 12)).abs().max().item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > 1.8).all()


def test_the_solver_converges_in_first_order():
    """Smoke and velocity on ever finer grids and steps come together as the step itself."""
    found = []
    for n in (16, 32, 64, 128):
        box = Smoke(size=n, dt=1.5 * 16 / n)
        h, _ = faces(n)
        k = math.pi / 32
        smoke = (1 - 0.5 * torch.cos(2 * k * h) * torch.cos(k * h)[:, None])[None]
        state = at_rest(smoke)
        for _ in range(4 * n // 16):
            state = box.step(state, torch.tensor([0.5], dtype=F64))
        s, u, v = state
        both = torch.stack([s, (u[:, :, 1:] + u[:, :, :-1]) / 2, (v[:, 1:] + v[:, :-1]) / 2])
        found.append(torch.nn.functional.avg_pool2d(both, n // 16))
    gaps = [(a - b).square().mean().sqrt().item() for a, b in itertools.pairwise(found)]
    orders = np.log2(np.array(gaps[:-1]) / gaps[1:])
    assert (orders > 0.7).all() and orders[-1] > 0.8


def test_the_sets_own_statistics():
    """The sheet's build at n = 64: mean smoke .727, sd .409, .424, .466."""
    found = Smoke(size=64, spin_up=8, frames=14).simulate(range(16)).tensor()
    # interpolation does not conserve smoke; over the stored frames its total stays within 10 %
    total = found[:, :, 0].mean((0, 2, 3))
    assert (total / total[0] - 1).abs().max() < 0.1
    assert found[:, :, 0].mean() == pytest.approx(0.727, rel=0.05)
    sd = found.transpose(1, 2).transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(sd, torch.tensor([0.409, 0.424, 0.466]), rtol=0.12, atol=0)


def test_a_case_is_itself_in_any_company_and_carries_its_buoyancy():
    box = Smoke(size=16, buoyancy_low=0.2, buoyancy_high=0.5, frames=2)
    pair, alone = box.simulate([3, 7], seed=1), box.simulate([7], seed=1)
    np.testing.assert_allclose(pair.frames(1), alone.frames(0), atol=1e-5)
    assert pair.parameter_names == ("buoyancy",) and pair.dt == 6.0
    assert 0.2 <= pair.parameters.min() < pair.parameters.max() <= 0.5
    assert pair.settings["simulator"] == "smoke" and pair.settings["viscosity"] == 0.01


@pytest.mark.parametrize("wrong", [{"size": 4}, {"dt": 0.0}, {"buoyancy_low": 1.0}])
def test_wrong_settings_of_smoke(wrong):
    with pytest.raises(RequestError, match=r"at least 8 cells|a positive step"):
        Smoke(**wrong)
