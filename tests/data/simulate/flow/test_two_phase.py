"""Two fluids: rest stays rest, volumes add up, fronts stay sharp, Poiseuille's limit."""

from __future__ import annotations

import math

import pytest
import torch

from pantarhei.data.simulate.flow import dam, generate, tube
from pantarhei.data.simulate.flow.liquid import solve_dam, solve_tube
from pantarhei.data.simulate.flow.two_phase import Fluids, TwoPhase, _thinc
from pantarhei.errors import RequestError

ONE = torch.ones(1, dtype=torch.float64)
WATER = Fluids(100 * ONE, 0.1 * ONE)


def test_a_hydrostatic_column_stays_at_rest():
    box = TwoPhase((12, 8), ONE / 40, ONE / 40, WATER, 0 * ONE, closed=True, gravity=9.81)
    liquid = torch.zeros(1, 12, 8)
    liquid[:, :5], liquid[:, 5] = 1.0, 0.4
    state = box.start(liquid)
    for _ in range(60):
        state = box.step(state, 5e-4 * ONE)
    assert float(state.u.abs().max()) < 1e-6 and float(state.v.abs().max()) < 1e-6  # m/s
    torch.testing.assert_close(state.a, liquid.double(), rtol=0, atol=1e-4)
    drop = state.p[0, 0, 0] - state.p[0, 1, 0]
    assert float(drop) == pytest.approx(100 * 9.81 / 40, rel=1e-5)


def test_a_tube_holds_what_has_flowed_in():
    box = TwoPhase((8, 24), ONE / 80, ONE / 80, WATER, ONE)
    state = box.start(torch.zeros(1, 8, 24))
    dt = box.stable_step(ONE)
    for _ in range(100):
        state = box.step(state, dt)
    assert float(state.a.mean()) * 0.3 == pytest.approx(float(state.t), rel=1e-3)
    assert float(state.a.min()) >= 0 and float(state.a.max()) <= 1
    assert float(box.divergence(state).abs().max()) < 1e-3  # 1/s, where u/dx is 80
    mixed = ((state.a > 0.05) & (state.a < 0.95)).sum()
    assert int(mixed) <= 2.5 * 8  # the front is one or two cells wide


def test_thinc_moves_a_front_by_its_speed_without_smearing_it():
    n, courant = 40, 0.2
    x = torch.arange(n, dtype=torch.float64)
    a = ((x >= 5) & (x < 15)).double()[None, :, None]
    flow = torch.full((1, n + 1, 1), courant, dtype=torch.float64)
    full = torch.ones(1, n + 2, 1, dtype=torch.float64)
    for _ in range(50):
        wide = torch.nn.functional.pad(a, (0, 0, 1, 1))
        a = a - _thinc(wide, flow, full).diff(dim=1)
        assert float(a.min()) > -1e-12 and float(a.max()) < 1 + 1e-12
    assert float(a.sum()) == pytest.approx(10)
    assert float((a[0, :, 0] * x).sum() / a.sum()) == pytest.approx(9.5 + 10, abs=0.15)
    assert int(((a > 0.02) & (a < 0.98)).sum()) <= 6


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_thinc_empties_a_cell_that_is_swept_whole(direction):
    share = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)[None, :, None]
    flux = _thinc(share, torch.full((1, 3, 1), direction).double(), torch.ones(1, 4, 1).double())
    upstream = share[:, :3] if direction > 0 else share[:, 1:]
    torch.testing.assert_close(flux, direction * upstream, rtol=1e-6, atol=1e-9)


def test_one_fluid_alone_becomes_poiseuille_flow():
    one_fluid = Fluids(ONE, ONE / 20, gas_density=1.0, gas_viscosity=0.05)
    box = TwoPhase((8, 20), ONE / 8, ONE / 8, one_fluid, ONE)
    state = box.start(torch.ones(1, 8, 20))
    dt = box.stable_step(ONE)
    for _ in range(math.ceil(3 / float(dt))):
        state = box.step(state, dt)
    y = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    torch.testing.assert_close(state.u[0, :, 14], 6 * y * (1 - y), rtol=0.02, atol=0.03)


def test_a_dam_holds_what_was_there_and_what_flowed_in():
    dx, solid = ONE * 0.05, torch.zeros(1, 8, 30, dtype=torch.bool)
    solid[:, :2, 10:12] = True
    box = TwoPhase(
        (8, 30), dx, dx, WATER, ONE, inlet=torch.arange(8) < 2, gravity=9.81, solid=solid
    )
    water = torch.zeros(1, 8, 30)
    water[:, :2, :10] = 1
    state = box.start(water, torch.nn.functional.pad(water, (1, 0)))
    for _ in range(60):
        state = box.step(state, ONE * 1e-3)
    assert float(state.a.sum()) * 0.05**2 == pytest.approx(0.05 + 1.0 * 0.1 * 0.06, rel=1e-3)
    assert not state.u[0, :2, 10:13].any() and not state.a[0, :2, 10:12].any()
    heap = state.a[0, 2, :10]
    assert float(heap[-1]) > 0.5 > float(heap[5])  # it piles up in front of the obstacle


def test_tube_and_dam_give_frames_with_their_masks():
    wet = solve_tube(tube().cases(bc=1, geo=1), cells=16, frames=4, across=6, passages=0.3)
    assert wet.states.shape == (2, 4, 2, 16, 16) and not wet.states[:, 0].any()
    speed = torch.tensor([c.parameters["velocity"] for c in tube().cases(bc=1, geo=1)])
    # what flows in flows through every column
    mean = wet.states[:, -1, 0].mean(1)
    torch.testing.assert_close(mean, speed.float()[:, None].expand(2, 16), rtol=0.02, atol=0.02)
    cases = dam().cases(bc=1, geo=2)
    poured = solve_dam(cases, cells=32, frames=2, across=8, interval=0.01)
    assert torch.isfinite(poured.states).all() and poured.states[:, 0].any()
    blocked = (~poured.mask).sum((1, 2))
    assert (blocked > 0).all() and blocked[2] > blocked[1]  # .15 x .10 against .11 x .01
    assert not poured.states.permute(0, 3, 4, 1, 2)[~poured.mask].any()


def test_cases_stay_within_reynolds_numbers_and_become_trajectories():
    for problem in (tube(), dam()):
        for grid in problem.grids.values():
            numbers = [problem.derived["reynolds"](values) for values in grid]
            assert len(grid) >= 10 and min(numbers) >= 19 and max(numbers) <= 400
    data = generate(tube(), tube().cases(prop=1), cells=8, frames=2, across=4, passages=0.05)
    assert data.parameter_names[5:7] == ("reynolds", "aspect")
    with pytest.raises(RequestError, match="one number for each case"):
        TwoPhase((8, 8), ONE, ONE.expand(2), WATER, ONE)
