"""The solver of incompressible flow against what is known exactly, and its order of convergence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pantarhei.data.simulate.flow import Flow, Side
from pantarhei.errors import RequestError

ONE = torch.ones(1, dtype=torch.float64)
SLIP = {side: Side("slip") for side in ("left", "right", "bottom", "top")}


def advance(flow, state, seconds, steps):
    for _ in range(steps):
        state = flow.step(state, seconds * ONE.expand(len(state.t)) / steps)
    return state


def taylor_green(n, nu=0.05, seconds=0.5):
    """Largest error in a box of slip walls: u = sin x cos y exp(-2 nu t), v = -cos x sin y ..."""
    flow = Flow((n, n), ONE * math.pi / n, ONE * math.pi / n, ONE * nu, **SLIP)
    (xu, yu), (xv, yv) = flow.faces_u(), flow.faces_v()
    u, v = torch.sin(xu) * torch.cos(yu), -torch.cos(xv) * torch.sin(yv)
    state = advance(flow, flow.start(u, v), seconds, 12 * n)
    decay = math.exp(-2 * nu * seconds)
    return max(float((state.u - u * decay).abs().max()), float((state.v - v * decay).abs().max()))


def test_taylor_green_decays_as_it_should_at_second_order_or_better():
    errors = [taylor_green(n) for n in (8, 16, 32)]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 1e-4 and min(orders) > 1.9


def test_the_lid_driven_cavity_meets_ghia():
    n = 32  # the published minimum is of a 129 x 129 grid
    flow = Flow((n, n), ONE / n, ONE / n, ONE / 100, top=Side("wall", 1.0))
    state = flow.start()
    dt = flow.stable_step(ONE)
    while float(state.t) < 14:
        state = flow.step(state, dt)
    assert float(flow.divergence(state).abs().max()) < 1e-10
    line = state.u[0, :, n // 2]  # the x-faces of the middle
    low = int(line.argmin())
    a, b, c = line[low - 1 : low + 2].tolist()
    shift = 0.5 * (a - c) / (a - 2 * b + c)
    assert b - 0.25 * (a - c) * shift == pytest.approx(-0.2109, rel=0.03)
    assert (low + 0.5 + shift) / n == pytest.approx(0.4531, abs=0.01)


def test_a_uniform_inflow_becomes_plane_poiseuille_flow():
    ny, nx = 16, 48
    flow = Flow(
        (ny, nx), ONE / ny, ONE / ny, ONE / 20, left=Side("inlet", 1.0), right=Side("outlet")
    )
    state = flow.start()
    state = advance(flow, state, 6.0, math.ceil(6.0 / float(flow.stable_step(ONE))))
    profile = state.u[0, :, nx - 8]
    y = (torch.arange(ny) + 0.5) / ny
    torch.testing.assert_close(profile, (6 * y * (1 - y)).double(), rtol=0.01, atol=0.015)
    assert float(profile.max() / profile.mean()) == pytest.approx(1.5, rel=0.01)
    assert float(flow.divergence(state).abs().max()) < 1e-10
    assert float(state.u[0, :, -1].sum()) == pytest.approx(float(state.u[0, :, 0].sum()))


def test_a_moving_wall_draws_a_linear_profile():
    """Couette: the flux of a wall of speed 1 is 1/2, so that no pressure gradient is needed."""
    n = 8
    flow = Flow(
        (n, 3 * n), ONE / n, ONE / n, ONE, left=Side("inlet", 0.5), right=Side("outlet"),
        top=Side("wall", 1.0),
    )  # fmt: skip
    state = advance(flow, flow.start(), 1.0, 1000)
    y = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    torch.testing.assert_close(state.u[0, :, 2 * n], y, rtol=0, atol=1e-3)


def test_cases_of_a_batch_do_not_see_each_other():
    dx, nu = torch.tensor([0.1, 0.2]).double(), torch.tensor([0.01, 0.05]).double()
    lid = torch.tensor([1.0, 2.0]).double()
    both = Flow((8, 8), dx, dx, nu, top=Side("wall", lid))
    together = both.start()
    for _ in range(20):
        together = both.step(together, torch.tensor([0.01, 0.02]).double())
    for i, dt in enumerate((0.01, 0.02)):
        one = slice(i, i + 1)
        alone = Flow((8, 8), dx[one], dx[one], nu[one], top=Side("wall", lid[one]))
        state = alone.start()
        for _ in range(20):
            state = alone.step(state, ONE * dt)
        torch.testing.assert_close(together.u[one], state.u)
        torch.testing.assert_close(together.v[one], state.v)


def test_the_box_turned_by_a_quarter_gives_the_same_flow():
    up = Flow((10, 10), ONE / 10, ONE / 10, ONE / 50, top=Side("wall", 1.0))
    right = Flow((10, 10), ONE / 10, ONE / 10, ONE / 50, right=Side("wall", 1.0))
    a, b = advance(up, up.start(), 0.5, 50), advance(right, right.start(), 0.5, 50)
    torch.testing.assert_close(a.u, b.v.mT)
    torch.testing.assert_close(a.v, b.u.mT)


def test_an_obstacle_stops_the_fluid():
    def square(x, y):
        return torch.maximum((x - 1).abs() - 0.25, (y - 0.5).abs() - 0.25)

    n = 16
    flow = Flow(
        (n, 2 * n), ONE / n, ONE / n, ONE / 20, left=Side("inlet", 1.0), right=Side("outlet"),
        obstacle=square,
    )  # fmt: skip
    inside = []
    for steps in (300, 600):
        speed = flow.centres(advance(flow, flow.start(), 0.5, steps))[0].norm(dim=0)
        inside.append(float(speed[6:10, 14:18].max()) / float(speed.max()))
    # what the projection pushes through within a step vanishes with the step
    assert inside[1] < 0.05 and inside[1] < 0.6 * inside[0]


def test_adams_bashforth_is_second_order_in_time():
    def at(steps):
        flow = Flow((8, 8), ONE / 8, ONE / 8, ONE / 10, **SLIP, force=lambda t: (0, torch.cos(t)))
        x, y = flow.faces_u()
        u = torch.sin(math.pi * x) * torch.cos(math.pi * y)
        return advance(flow, flow.start(u), 0.2, steps).u

    reference = at(1600)
    errors = [float((at(n) - reference).abs().max()) for n in (50, 100, 200)]
    assert math.log2(errors[0] / errors[1]) > 1.8


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Flow((8, 8), ONE, ONE.expand(2), ONE), "one number for each case"),
        (lambda: Flow((8, 8), -ONE, ONE, ONE), "positive"),
        (lambda: Flow((3, 8), ONE, ONE, ONE), "too small"),
        (lambda: Flow((8, 8), ONE, ONE, ONE, left=Side("inlet", 1.0)), "out at the right"),
        (lambda: Flow((8, 8), ONE, ONE, ONE, top=Side("outlet")), "wall, wall, wall, outlet"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
