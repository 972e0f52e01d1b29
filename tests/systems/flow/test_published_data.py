"""The faults of the published loaders, as switches."""

from __future__ import annotations

import numpy as np

from pantarhei.data.simulate.flow import cavity, cylinder, dam, generate
from pantarhei.data.trajectories import Trajectories
from pantarhei.systems.flow.evaluation import multi_step, one_step
from pantarhei.systems.flow.published import as_published, until_steady
from pantarhei.systems.flow.surrogate import columns_of
from pantarhei.systems.parameters import ParameterScale


def test_the_dams_obstacle_is_invisible():
    data = generate(dam(), dam().cases(geo=2), cells=16, frames=2, across=8, interval=0.005)
    seen = as_published(data)
    assert data.mask.mean() < 1 and seen.mask.all()
    columns = columns_of(data, ["height", "width"])
    assert len(np.unique(data.parameters[:, columns])) == 4
    assert len(np.unique(seen.parameters[:, columns], axis=0)) == 1
    assert np.array_equal(seen.frames(1), data.frames(1))


def test_the_cylinder_is_masked_in_the_wrong_place():
    problem = cylinder()
    data = generate(problem, problem.cases(bc=1), cells=32, frames=2, discard=0.1, per_diameter=3)
    seen = as_published(data)
    solid = [np.argwhere(~m[0]).mean(0) for m in (data.mask, seen.mask)]
    # centre (.06, .06) of a box of .22 x .12: the published circle is at (.12, .12), half outside
    np.testing.assert_allclose(solid[0], [15.5, 0.06 / 0.22 * 32 - 0.5], atol=0.6)
    assert abs(solid[1][1] - (0.12 / 0.22 * 32 - 0.5)) < 0.6 and solid[1][0] > 28


def test_other_problems_are_left_alone():
    data = generate(cavity(300), cavity(300).cases(bc=1), cells=8, frames=3)
    assert as_published(data) is data


def test_a_case_ends_when_it_is_steady_in_its_units():
    levels = 1 - 0.5 ** np.arange(12)
    states = np.broadcast_to(levels[:, None, None, None], (12, 2, 4, 4))
    data = Trajectories.of(
        np.stack([states, 100 * states]), channels=("u", "v"), parameters=[[1.0], [100.0]]
    )
    cut = until_steady(data)
    # changes of sqrt(2) 2^-t fall below 1e-3 m/s at frame 11, those a hundred times as fast never
    assert [cut.length(i) for i in (0, 1)] == [11, 12]


def test_published_constants_know_the_loaders_names():
    scale = ParameterScale.published(("vel_top", "vel_in", "density"))
    assert scale.mean.tolist() == [25.0, 25.0, 5.0]


def test_the_original_folders_can_be_tested_on(tmp_path):
    import json

    rng = np.random.default_rng(0)
    for i in range(2):
        case = tmp_path / "cavity" / "bc" / f"case{i:04d}"
        case.mkdir(parents=True)
        for name in "uv":
            np.save(case / f"{name}.npy", rng.normal(size=(4, 64, 64)).astype(np.float32))
        facts = {"vel_top": 1.0 + i, "density": 1.0, "viscosity": 1e-5}
        (case / "case.json").write_text(json.dumps(facts))
    from pantarhei.data.trajectories import open_trajectories
    from pantarhei.systems.flow import model
    from pantarhei.systems.flow.surrogate import Surrogate

    data = open_trajectories(tmp_path / "cavity")
    net = Surrogate.of(model("auto-deeponet", 3), data, [0], constants="published")
    assert len(one_step(net, data, [0, 1])) == 2
    assert multi_step(net, data, [0, 1], steps=5).nmse_u.shape == (2, 5)
