"""Training and testing of flow models on known dynamics, and on a user's own arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.rollout import nmse
from pantarhei.systems.flow import ImageModel, model
from pantarhei.systems.flow.evaluation import (
    Persistence,
    case_mean,
    distances,
    divergence,
    floored_nmse,
    mean,
    multi_step,
    one_step,
    physics,
    wall_violation,
)
from pantarhei.systems.flow.surrogate import Surrogate, inputs_of
from pantarhei.systems.flow.training import batch_nmse, train
from pantarhei.systems.parameters import ParameterScale


def decays(cases=5, frames=9, cells=16, seed=0, mask=True):
    """u and v of smooth patterns that shrink by a factor of its own in each case."""
    rng = np.random.default_rng(seed)
    factor = rng.uniform(0.7, 0.95, cases)
    x = (np.arange(cells) + 0.5) / cells
    wave = 1 + np.sin(3 * x)[:, None] * np.cos(2 * x)
    pattern = rng.uniform(1, 2, (cases, 1, 2, 1, 1)) * np.stack([wave, wave.T])
    states = pattern * factor[:, None, None, None, None] ** np.arange(frames)[:, None, None, None]
    fluid = np.ones((cases, cells, cells), bool)
    fluid[:, 4:7, 5:9] = False
    spacing = np.full(cases, 0.1)
    return Trajectories.of(
        (states * fluid[:, None, None]).astype(np.float32),
        channels=("u", "v"),
        parameters=np.stack([factor, 10 * factor**2, spacing, spacing], 1),
        parameter_names=("factor", "square", "dx", "dy"),
        mask=fluid if mask else None,
        name="decays",
    )


class Exact(nn.Module):
    """The true dynamics as a model: it multiplies by the first parameter."""

    channels = 2

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain = gain

    def step(self, field, omega, mask):
        return self.gain * field * omega[:, :1, None, None]


def exact(data, gain=1.0):
    return Surrogate(Exact(gain), [0], ParameterScale(torch.zeros(1), torch.ones(1)))


def test_nmse_is_one_for_nothing_and_scale_invariant():
    p, y = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    torch.testing.assert_close(nmse(torch.zeros_like(y), y), torch.ones(3))
    torch.testing.assert_close(nmse(7 * p, 7 * y), nmse(p, y))
    torch.testing.assert_close(batch_nmse(7 * p, 7 * y), batch_nmse(p, y))
    assert float(batch_nmse(torch.zeros_like(y), y)) == pytest.approx(1.0)
    still = torch.zeros(1, 1, 4, 4)
    assert (
        math.isinf(float(nmse(still + 1, still)))
        and float(floored_nmse(still + 1, still, 2)) == 0.5
    )


def test_the_true_dynamics_have_no_error_at_any_step():
    data = decays()
    found = multi_step(exact(data), data, range(5), steps=8)
    assert found.blown == 0 and float(found.nmse_u.max()) < 1e-9
    for row in one_step(exact(data), data, range(5)):
        assert row["nmse_u"] < 1e-9 and row["nmse_v"] < 1e-9 and row["frames"] == 8


def test_persistence_has_the_error_that_the_factor_gives():
    data = decays()
    f = data.parameters[:, 0]
    rows = one_step(Persistence(), data, range(5))
    np.testing.assert_allclose([r["nmse_u"] for r in rows], (1 / f - 1) ** 2, rtol=1e-4)
    curve = multi_step(Persistence(), data, range(5), steps=3, start=2).nmse_u
    for k in (1, 2, 3):
        np.testing.assert_allclose(curve[:, k - 1], (f**-k - 1) ** 2, rtol=1e-4)
    rows = multi_step(Persistence(), data, [4, 1], steps=2).by_case(data, [4, 1])
    assert [(r["case"], r["step"]) for r in rows] == [(4, 1), (4, 2), (1, 1), (1, 2)]
    assert rows[3]["nmse_u"] == pytest.approx((f[1] ** -2 - 1) ** 2, rel=1e-4)
    late = multi_step(Persistence(), data, range(5), steps=20).nmse_u  # the last frame repeated
    np.testing.assert_allclose(late[:, -1], (f**-8 - 1) ** 2, rtol=1e-3)


def test_the_published_test_compares_with_the_frame_before():
    data = decays()
    found = multi_step(Persistence(), data, range(5), steps=4, off_by_one=True)
    assert float(found.nmse_u[:, 0].max()) == 0.0
    right = multi_step(Persistence(), data, range(5), steps=4)
    torch.testing.assert_close(found.nmse_u[:, 1:], right.nmse_u[:, :-1])


def test_case_mean_is_the_best_constant_frame():
    data = decays()
    f, t = data.parameters[:, 0:1], np.arange(1, 9)
    level = (f**t).mean(1, keepdims=True)
    wanted = ((level / f**t - 1) ** 2).mean(1)
    np.testing.assert_allclose([r["nmse_u"] for r in case_mean(data, range(5))], wanted, rtol=1e-4)


def test_what_blows_up_is_counted_and_stops():
    data = decays()
    found = multi_step(exact(data, gain=1e8), data, range(5), steps=12)
    assert found.blown == 5 and len(found.rows()) == 12
    assert found.rows()[-1]["blown"] == 5 and math.isinf(float(found.curve[-1]))
    assert found.rows()[0]["blown"] == 0 and math.isfinite(float(found.curve[0]))
    limited = multi_step(exact(data, gain=2.0), data, range(5), steps=12, limit=100.0)
    assert limited.rows()[-1]["blown"] > 0 and int(limited.blown_at.max()) > 1


def test_a_model_left_in_training_mode_is_tested_with_its_statistics():
    data = decays()
    net = Surrogate.of(model("unet", 2), data, [0, 1])
    calm = multi_step(net.eval(), data, range(5), steps=2).nmse_u, one_step(net, data, [0])
    net.train()
    torch.testing.assert_close(multi_step(net, data, range(5), steps=2).nmse_u, calm[0])
    assert one_step(net, data, [0])[0]["nmse"] == pytest.approx(calm[1][0]["nmse"])
    assert net.training and net.net.down[0].training


def test_divergence_and_walls_are_those_of_known_flows():
    n = 32
    x = (torch.arange(n) + 0.5) / n
    psi = lambda a, b: torch.sin(math.pi * a) * torch.cos(math.pi * b)  # noqa: E731
    cell = psi(x, x[:, None]), -psi(x[:, None], x)
    vortex = torch.stack(cell)[None]
    ones, h = torch.ones(1, 1, n, n), torch.ones(1) / n
    assert float(divergence(vortex, ones, h, h)) < 1e-6
    assert float(wall_violation(vortex, ones)) < 5e-3
    source = torch.stack([x.expand(n, n), x[:, None].expand(n, n)])[None]
    rms = float(source.square().sum(1).mean().sqrt())
    assert float(divergence(source, ones, h, h)) == pytest.approx(2 / n / rms, rel=1e-4)
    assert float(wall_violation(source, ones)) == pytest.approx(math.sqrt(0.5) / rms, rel=1e-3)
    assert float(wall_violation(source, ones, ("left", "bottom"))) < 1e-4
    solid = ones.clone()
    solid[..., 8:16, 8:16] = 0
    assert (
        float(wall_violation(vortex * solid, solid)) < 6e-3 < float(wall_violation(vortex, solid))
    )


def test_distances_are_to_the_nearest_training_case():
    known = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    sd = known[:, 0].std()
    found = distances(known, [[2.0, 1.0], [5.0, 1.0], [-2.0, 1.0]])
    np.testing.assert_allclose(found, [0, 1 / sd, 2 / sd], atol=1e-12)


def test_scales_are_of_the_training_cases_alone_and_travel_with_the_weights(tmp_path):
    data = decays()
    net = Surrogate.of(model("unet", 2, channels=2), data, [0, 1])
    assert inputs_of(data) == ("factor", "square")
    standardised = net.scale(torch.from_numpy(data.parameters[[0, 1]][:, :2]).float())
    torch.testing.assert_close(standardised.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    first = data.frames(0), data.frames(1)
    assert float(net.unit) == pytest.approx(np.sqrt(np.mean(np.square(first))), rel=1e-4)
    other = Surrogate.of(model("unet", 2, channels=2), data, [3, 4])
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.scale.mean, net.scale.mean)
    published = ParameterScale.published(("velocity", "density", "viscosity", "height"))
    values = published(torch.tensor([[25.0, 9.0, 0.00738, 0.01]]))
    torch.testing.assert_close(values, torch.tensor([[0.0, 1.0, 1.0, 0.01]]))


def test_velocity_scaling_makes_a_case_independent_of_its_speed():
    data = Trajectories.of(
        np.ones((1, 3, 2, 16, 16)), channels=("u", "v"), parameters=[[2.0, 5.0]],
        parameter_names=("velocity", "reynolds"),
    )  # fmt: skip
    net = Surrogate.of(model("unet", 1), data, [0], inputs=("reynolds",), fields="velocity").eval()
    field, slow = torch.randn(1, 2, 16, 16), torch.tensor([[1.0, 5.0]])
    fast = net.step(3 * field, slow * torch.tensor([[3.0, 1.0]]))
    torch.testing.assert_close(fast, 3 * net.step(field, slow), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {"epochs": 10}),
        ("unet", {"epochs": 10, "pushforward": 1}),
        ("unet", {"epochs": 8, "horizon": 2, "noise": 0.01}),
        ("auto-deeponet", {"epochs": 20}),
        ("auto-ffn", {"epochs": 20, "queries": 30}),
        ("ffn", {"epochs": 20, "queries": 30}),
        ("deeponet", {"epochs": 20, "queries": 30}),
    ],
)
def test_training_lowers_the_error_on_the_training_cases(name, options):
    data = decays(cases=3)
    torch.manual_seed(0)
    net = Surrogate.of(model(name, 2, (16, 16)), data, [0, 1])
    before = mean(one_step(net, data, [0, 1]), "nmse_u")
    done = train(
        net, data, [0, 1], batch_size=8, lr=3e-3, schedule="cosine", device="cpu", quiet=True,
        **options,
    )  # fmt: skip
    assert done.stopped == "steps"
    assert mean(one_step(net, data, [0, 1]), "nmse_u") < 0.9 * before


def test_training_on_u_alone_leaves_v_alone_and_development_chooses():
    data = decays(cases=4)
    net = Surrogate.of(model("auto-edeeponet", 2, (16, 16), channels=1), data, [0, 1])
    done = train(
        net, data, [0, 1], epochs=4, batch_size=8, development=[2], evaluate_every=2, quiet=True,
        device="cpu", schedule="published",
    )  # fmt: skip
    assert done.best == pytest.approx(mean(one_step(net, data, [2]), "nmse_u"), rel=1e-4)
    field = torch.randn(1, 2, 16, 16)
    out = net.step(field, torch.from_numpy(data.parameters[:1]).float())
    assert torch.equal(out[:, 1], field[:, 1]) and not torch.equal(out[:, 0], field[:, 0])
    assert math.isnan(one_step(net, data, [3])[0]["nmse_v"])
    with pytest.raises(RequestError, match="need u and v"):
        physics(net, data, [3], ("top",))


def test_published_schedule_falls_by_a_tenth_every_twenty_epochs():
    from pantarhei.systems.flow.training import _Staircase

    factor = _Staircase(100)
    assert [round(factor(e / 100), 6) for e in (0, 19, 20, 99)] == [1, 1, 0.9, 0.6561]


def test_physics_stands_beside_the_truth():
    data = decays()
    rows = physics(exact(data), data, [0, 1], ("bottom", "top"))
    for row in rows:
        assert row["divergence_forecast"] == pytest.approx(row["divergence_truth"], rel=1e-4)
        assert row["wall_forecast"] == pytest.approx(row["wall_truth"], rel=1e-4)


def test_a_users_own_arrays_are_enough(tmp_path):
    """Arrays as people have them: no mask, one parameter, an odd grid, written and read again."""
    rng = np.random.default_rng(3)
    states = rng.normal(size=(6, 8, 2, 18, 21)).cumsum(1)
    mine = Trajectories.of(states, parameters=rng.uniform(1, 2, 6), parameter_names=("speed",))
    mine.save(tmp_path / "mine.npz")
    from pantarhei.data.trajectories import open_trajectories

    data = open_trajectories(tmp_path / "mine.npz")
    net = Surrogate.of(model("fno", 1), data, [0, 1, 2, 3])
    train(net, data, [0, 1, 2, 3], epochs=1, batch_size=8, quiet=True, device="cpu")
    rows = one_step(net, data, [4, 5])
    assert len(rows) == 2 and all(math.isfinite(r["nmse"]) and r["subset"] == "" for r in rows)
    assert multi_step(net, data, [4, 5], steps=3).nmse_u.shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda d, s: multi_step(s, d, range(2), steps=0), "cannot be compared"),
        (lambda d, s: multi_step(s, d, [], steps=1), "no case to test"),
        (lambda d, s: Surrogate.of(model("unet", 1), d, [0], inputs=("factr",)), "Did you mean"),
        (lambda d, s: Surrogate.of(model("unet", 1), d, [0], inputs=()), "one operating"),
        (lambda d, s: ParameterScale.of(np.zeros((0, 2))), "cannot be standardised"),
        (lambda d, s: train(s, d, [0], queries=5, pushforward=1), "queries go with one step"),
        (lambda d, s: train(s, d, [0], schedule="linear"), "choose published"),
        (
            lambda d, s: train(Surrogate.of(model("ffn", 2, (16, 16)), d, [0]), d, [0], noise=0.1),
            "takes no step",
        ),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    data = decays(cases=2)
    with pytest.raises(RequestError, match=sentence):
        call(data, Surrogate.of(model("unet", 2), data, [0]))


@pytest.mark.parametrize(
    ("name", "options", "of"),
    [
        ("unet", {"width": 4}, {}),
        ("fno", {"width": 4, "modes": 3, "sees_mask": False}, {"constants": "published"}),
        ("resnet", {"dropout": 0.1}, {"fields": "velocity"}),
        ("auto-deeponet", {"grid": (16, 16)}, {"fields": "none"}),
        ("auto-deeponet-cnn", {"grid": (16, 16), "channels": 1}, {}),
        ("ffn", {"grid": (16, 16), "frames": 9}, {}),
        ("deeponet", {"grid": (16, 16), "published": True}, {}),
    ],
)
def test_a_saved_surrogate_answers_as_it_did(tmp_path, name, options, of):
    data = decays()
    data = Trajectories.of(data.tensor().numpy(), parameters=data.parameters, mask=data.mask,
                           parameter_names=("velocity", "square", "dx", "dy"))  # fmt: skip
    net = Surrogate.of(model(name, 2, **options), data, [0, 1, 2], **of)
    train(net, data, [0, 1, 2], epochs=1, batch_size=8, quiet=True, device="cpu")
    net.save(tmp_path / "net")
    again = Surrogate.load(tmp_path / "net")
    table = torch.from_numpy(data.parameters).float()
    if net.steps_forward:
        asked = (data.tensor()[:, 0], table, torch.from_numpy(data.mask).float())
    else:
        asked = (torch.arange(5.0), table)
    call = "step" if net.steps_forward else "frame"
    with torch.no_grad():
        wanted = getattr(net.eval(), call)(*asked)
        assert torch.equal(getattr(again, call)(*asked), wanted)
        assert not torch.equal(getattr(again, call)(asked[0], 2 * table, *asked[2:]), wanted)
    assert {path.name for path in (tmp_path / "net").iterdir()} == {
        "surrogate.json", "weights.safetensors",
    }  # fmt: skip
    with pytest.raises(RequestError, match="there already"):
        net.save(tmp_path / "net")


def test_a_saved_surrogate_of_ones_own_and_damaged_ones(tmp_path):
    data = decays(cases=2)
    mine = ImageModel(nn.Conv2d(2 + 1 + 2, 2, 3, padding=1), parameters=2)
    net = Surrogate.of(mine, data, [0, 1])
    net.save(tmp_path / "mine")
    with pytest.raises(RequestError, match="give it as net="):
        Surrogate.load(tmp_path / "mine")
    other = ImageModel(nn.Conv2d(2 + 1 + 2, 2, 3, padding=1), parameters=2)
    again = Surrogate.load(tmp_path / "mine", net=other)
    field, table = data.tensor()[:, 0], torch.from_numpy(data.parameters).float()
    with torch.no_grad():
        assert torch.equal(again.step(field, table), net.step(field, table))
    with pytest.raises(RequestError, match="not a saved surrogate"):
        Surrogate.load(tmp_path / "mine", net=model("unet", 2))
    with pytest.raises(RequestError, match="does not exist"):
        Surrogate.load(tmp_path / "none")
    Surrogate.of(model("unet", 2, width=4), data, [0]).save(tmp_path / "net")
    about = tmp_path / "net" / "surrogate.json"
    text = about.read_text()
    for damage in ("[]", "{}", text.replace('"unet"', '"unett"'), text.replace(": 4", ": 8"),
                   text.replace('"columns": [', '"columns": [7, ')):  # fmt: skip
        about.write_text(damage)
        with pytest.raises(RequestError, match=r"not a saved surrogate|Did you mean 'unet'"):
            Surrogate.load(tmp_path / "net")
    about.write_text(text)
    (tmp_path / "net" / "weights.safetensors").write_bytes(b"cut")
    with pytest.raises(RequestError, match="not a saved surrogate"):
        Surrogate.load(tmp_path / "net")
