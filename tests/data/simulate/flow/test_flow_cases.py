"""Cases and the two flows of one fluid: grids, scaling, shedding, and a user's own problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pantarhei.data.simulate.flow import Case, Problem, Solution, cavity, cylinder, generate
from pantarhei.data.simulate.flow.single_phase import solve_cavity, solve_cylinder
from pantarhei.data.simulate.write import simulator, write
from pantarhei.data.trajectories import open_trajectories
from pantarhei.errors import RequestError
from pantarhei.systems.flow.evaluation import subset_of


def wake(**changes):
    return {**cylinder().grids["bc"][0], "velocity": 1.0, **changes}


def test_every_case_has_its_reynolds_number_in_range_and_one_thing_varies():
    for problem, low, high in (
        (cavity(), 50, 2000),
        (cylinder(), 40, 400),
        (cavity(1000), 50, 1000),
    ):
        varying = {"bc": {"velocity"}, "prop": {"density", "viscosity"}}
        for subset, grid in problem.grids.items():
            assert len(grid) >= 17
            numbers = [problem.derived["reynolds"](values) for values in grid]
            assert low * 0.98 <= min(numbers) and max(numbers) <= high * 1.02
            differ = {name for name in problem.parameters if len({v[name] for v in grid}) > 1}
            if subset in varying:
                assert differ == varying[subset]
            else:
                assert differ <= {"height", "width", "radius", "center_x", "center_y"}


def test_cases_are_spread_evenly_and_named():
    chosen = cavity().cases(bc=3, geo=1)
    assert [c.name for c in chosen] == ["bc/0000", "bc/0024", "bc/0049", "geo/0000"]
    assert len(cavity().cases()) == 50 + 44 + 25


def test_cylinder_sheds_at_100_with_its_strouhal_number_and_not_at_30():
    """St .16 to .22 is the literature's at Re 100 to 200, walls included."""
    cases = [Case("cylinder", "x", i, wake(viscosity=0.2 / re)) for i, re in enumerate((100, 30))]
    found = solve_cylinder(cases, frames=75, discard=40.0)
    v = found.states[:, :, 1, 32, 29].numpy()  # two diameters behind the centre, on the axis
    swing = v - v.mean(1, keepdims=True)
    up = np.flatnonzero((swing[0, :-1] < 0) & (swing[0, 1:] >= 0))
    at = up - swing[0, up] / (swing[0, up + 1] - swing[0, up])
    assert len(up) >= 2 and 0.16 < 1 / (0.2 * np.diff(at).mean()) < 0.22
    assert np.abs(swing[0]).max() > 0.5 and np.abs(swing[1]).max() < 1e-2
    assert not found.mask[:, 32, 17].any() and found.mask[:, 0, 0].all()
    assert not found.states[:, :, :, ~found.mask[0]].any()


def test_doubled_lengths_at_one_reynolds_number_leave_the_frames_unchanged():
    small = wake(viscosity=2e-3)
    lengths = ("height", "width", "radius", "center_x", "center_y")
    large = {k: 2 * v if k in lengths else v for k, v in small.items()} | {"viscosity": 4e-3}
    fast = {**small, "velocity": 2.0, "viscosity": 4e-3}
    cases = [Case("cylinder", "x", i, p) for i, p in enumerate((small, large, fast))]
    found = solve_cylinder(cases, frames=4, discard=2.0, per_diameter=4, dtype=torch.float64)
    torch.testing.assert_close(found.states[0], found.states[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(2 * found.states[0], found.states[2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.interval * torch.tensor([1, 0.5, 2]).double(),
                               found.interval[:1].expand(3))  # fmt: skip


def test_cavity_starts_at_rest_and_follows_its_lid():
    cases = cavity(500).cases(bc=2, geo=2)
    found = solve_cavity(cases, cells=16, frames=5)
    assert not found.states[:, 0].any()
    assert (found.states[:, 1:, 0, -1].mean(2) > 0).all()
    speed = torch.tensor([c.parameters["velocity"] for c in cases])
    assert (found.states[:, -1].flatten(1).amax(1) < speed).all()
    wide = cases[-1].parameters
    assert float(found.dx[-1]) == pytest.approx(wide["width"] / 16)
    alone = solve_cavity(cases[1:2], cells=16, frames=5)  # its own number of steps
    torch.testing.assert_close(alone.states[0], found.states[1], rtol=2e-2, atol=1e-2)


def test_trajectories_carry_the_cases_and_can_be_read_again(tmp_path):
    problem = cylinder()
    data = generate(
        problem, problem.cases(bc=1, geo=1), cells=16, frames=2, discard=0.4, per_diameter=4
    )
    assert data.shape == (2, 2, 2, 16, 16)
    assert data.parameter_names[8] == "reynolds"
    assert data.parameter_names[-4:] == ("dx", "dy", "interval", "subset")
    assert data.parameters[0, 0] == pytest.approx(0.3) and data.mask.mean() < 1
    data.save(tmp_path / "wake.npz")
    again = open_trajectories(tmp_path / "wake.npz")
    assert [subset_of(again, i) for i in (0, 1)] == ["bc", "geo"]
    assert np.array_equal(again.frames(1), data.frames(1))


def decaying(rate_of):
    def solve(cases, *, cells, frames, device):
        rates = torch.tensor([rate_of(c.parameters) for c in cases])
        t = torch.arange(frames)
        states = torch.exp(-rates[:, None] * t)[:, :, None, None, None].expand(
            -1, -1, 1, cells, cells
        )
        ones = torch.ones(len(cases))
        return Solution(states, torch.ones(len(cases), cells, cells), ones, ones, ones)

    return solve


def test_a_users_own_problem_is_a_solver_and_a_grid():
    grid = {"slow": [{"rate": 0.1}, {"rate": 0.2}], "fast": [{"rate": 1.0}]}
    mine = Problem("decay", ("rate",), grid, decaying(lambda p: p["rate"]), channels=("heat",))
    data = generate(mine, mine.cases(), cells=8, frames=4)
    assert data.channels == ("heat",) and subset_of(data, 2) == "fast"
    np.testing.assert_allclose(data.frames(2)[:, 0, 0, 0], np.exp(-np.arange(4.0)), rtol=1e-5)
    with pytest.raises(RequestError, match=r"became infinite in slow/0000"):
        solver = decaying(lambda p: -1e9 * p["rate"])
        broken = Problem("decay", ("rate",), grid, solver, channels=("heat",))
        generate(broken, broken.cases(slow=1), cells=8, frames=4)
    with pytest.raises(RequestError, match=r"returned states of shape \(3, 4, 1, 8, 8\)"):
        two = Problem("decay", ("rate",), grid, mine.solve)  # u and v, where the solver has heat
        generate(two, two.cases(), cells=8, frames=4)


def test_sets_are_written_in_shards_and_opened_as_one(tmp_path):
    small = simulator("cavity", {"cells": "8", "frames": "3", "subset": "geo"})
    write(small, tmp_path / "set", 3, shard=2, quiet=True)
    data = open_trajectories(tmp_path / "set")
    assert data.shape == (3, 3, 2, 8, 8) and {subset_of(data, i) for i in range(3)} == {"geo"}
    alone = small.simulate([2])
    assert np.array_equal(alone.parameters[0], data.parameters[2])
    assert np.array_equal(alone.frames(0), data.frames(2))
    with pytest.raises(RequestError, match="has 25 cases"):
        small.simulate([25])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: cavity().cases(geometry=1), "Did you mean"),
        (lambda: cavity().cases(bc=51), "has 50 cases, not 51"),
        (lambda: generate(cavity(), []), "no case"),
        (lambda: Problem("x", ("a",), {"bc": [{"b": 1.0}]}, solve_cavity), "are needed"),
        (lambda: Problem("x", ("a",), {"bc": [{"a": np.nan}]}, solve_cavity), "not finite"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
