"""Rolling a model forward: every way of feeding it, what blows up, the losses and the metrics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from pantarhei import rollout as ro
from pantarhei.errors import RequestError
from pantarhei.fit import Batches, fit


def series(b=3, t=8, c=2, space=(6, 5)):
    return torch.randn(b, t, c, *space, generator=torch.Generator().manual_seed(0))


class Linear(nn.Module):
    """next = a u_t + b u_{t-1}, on (B, 2 C, ...)."""

    def __init__(self, a, b):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([a, b]))

    def forward(self, past):
        older, newer = past.chunk(2, 1)
        return self.w[0] * newer + self.w[1] * older


def test_an_oracle_has_no_error_and_the_history_is_the_last_h():
    start = series(t=2)
    true = [start[:, 0], start[:, 1]]
    for _ in range(6):
        true.append(0.7 * true[-1] - 0.5 * true[-2])
    truth = torch.stack(true[2:], 1)
    found = ro.rollout(
        Linear(0.7, -0.5), start, 6, truth=truth, metrics={"l2": ro.relative_l2, "nmse": ro.nmse}
    )
    torch.testing.assert_close(found.kept, truth)
    assert found.scores["l2"].shape == (3, 6, 2) and found.scores["l2"].max() < 1e-6
    assert found.scores["nmse"].shape == (3, 6)
    assert found.steps == (1, 2, 3, 4, 5, 6) and found.blown == 0
    seen = ro.rollout(lambda past: past[:, 0], start, 3, layout="window").kept
    torch.testing.assert_close(seen, torch.stack([start[:, 0], start[:, 1], start[:, 0]], 1))


def test_teacher_forcing_feeds_the_truth():
    data = series(t=6)
    model = Linear(0.9, 0.3)
    forced = ro.rollout(model, data[:, :2], 4, truth=data[:, 2:], forced=4).kept
    expected = 0.9 * data[:, 1:5] + 0.3 * data[:, :4]
    torch.testing.assert_close(forced, expected)
    partly = ro.rollout(model, data[:, :2], 4, truth=data[:, 2:], forced=2).kept
    torch.testing.assert_close(partly[:, :3], expected[:, :3])
    torch.testing.assert_close(partly[:, 3], 0.9 * partly[:, 2] + 0.3 * data[:, 3])


@pytest.mark.parametrize("as_function", [False, True])
def test_controls_and_given_reach_every_step(as_function):
    controls = torch.arange(12.0).view(3, 4)

    def model(past, control, gain):
        return past + gain * control[:, None]

    known = (lambda t: controls[:, t - 1]) if as_function else controls
    found = ro.rollout(model, torch.zeros(3, 1, 1), 4, controls=known, given=(2.0,)).kept
    torch.testing.assert_close(found[:, :, 0], 2 * controls.cumsum(1))


def test_a_recurrent_model_carries_its_memory():
    def model(past, count):
        return past + count, count + 1

    found = ro.rollout(model, torch.zeros(2, 1, 1), 4, memory=torch.tensor(1.0)).kept
    assert found[0, :, 0].tolist() == [1, 3, 6, 10]


def test_an_ensemble_goes_on_from_its_own_states_or_from_the_mean():
    models = [lambda x: 2 * x, lambda x: 4 * x]
    own = ro.rollout(models, torch.ones(1, 1, 1), 2)
    assert own.members.shape == (2, 1, 2, 1)
    assert own.members[:, 0, :, 0].tolist() == [
        [2, 4],
        [4, 16],
    ] and own.kept.flatten().tolist() == [
        3,
        10,
    ]
    mean = ro.rollout(models, torch.ones(1, 1, 1), 2, feedback="mean")
    assert mean.members[:, 0, :, 0].tolist() == [[2, 6], [4, 12]]
    memories = ro.rollout([lambda x, m: (m, m)] * 2, torch.ones(1, 1, 1), 1,
                          memory=[torch.ones(1, 1), 3 * torch.ones(1, 1)])  # fmt: skip
    assert memories.kept.item() == 2


def test_a_batch_equals_single_runs_and_one_that_blows_up_disturbs_no_other():
    start = torch.tensor([1.0, 3.0, 0.5]).view(3, 1, 1)
    found = ro.rollout(lambda x: x**2, start, 12, limit=1e6)
    alone = [ro.rollout(lambda x: x**2, one[None], 12, limit=1e6) for one in start]
    assert found.blown_at.tolist() == [0, 4, 0] and found.blown == 1
    assert found.blown_at.tolist() == [int(a.blown_at) for a in alone]
    torch.testing.assert_close(found.kept[0], alone[0].kept[0])
    assert found.kept[1, :3, 0].tolist() == [9, 81, 6561] and found.kept[1, 3:].isnan().all()
    assert alone[1].steps == (1, 2, 3, 4)  # nothing is left to run
    ended = list(ro.stream(lambda x: x * math.inf, torch.ones(2, 1, 1)))
    assert len(ended) == 1 and ended[0].blown_at.tolist() == [1, 1]


def test_rows_leave_out_what_blew_up_and_count_it():
    start, truth = torch.tensor([1.0, 3.0]).view(2, 1, 1), torch.ones(2, 5, 1)
    found = ro.rollout(
        lambda x: x**2, start, 5, truth=truth, limit=1e3, metrics={"nmse": ro.nmse}, keep="none"
    )
    rows = found.rows(dt=0.5)
    assert [row["blown"] for row in rows] == [0, 0, 1, 1, 1] and found.kept is None
    assert rows[-1]["time"] == 2.5 and rows[-1]["nmse"] == 0 and rows[0]["nmse"] == 32
    assert found.mean("nmse") == math.inf


def test_what_is_kept_is_the_callers_choice():
    start = torch.ones(2, 1, 1)
    step = lambda x: x + 1  # noqa: E731
    assert ro.rollout(step, start, 7, keep=3).steps == (3, 6)
    assert ro.rollout(step, start, 7, keep="last").kept[0].tolist() == [[8.0]]
    odd = ro.rollout(step, start, 5, keep=lambda f: f.step if f.step % 2 else None)
    assert odd.kept == [1, 3, 5] == list(odd.steps)
    decoded = ro.rollout(step, start, 2, decode=lambda x: 10 * x, monitors={"m": lambda x: x[:, 0]})
    assert decoded.kept[0, :, 0].tolist() == [20, 30] == decoded.scores["m"][0].tolist()


def test_a_stream_holds_no_more_than_its_window():
    model = Linear(0.5, 0.5)
    frames = ro.stream(model, series(t=2))
    for frame in itertools.islice(frames, 300):
        assert frame.state.grad_fn is None
    assert frame.step == 300
    one = next(ro.stream(model, series(t=2), 1, grad=True))
    assert one.state.grad_fn is not None


def test_modules_are_evaluated_and_put_back():
    model = nn.Sequential(nn.Dropout(0.5), nn.Identity())
    model[1].eval()
    found = ro.rollout(model, torch.ones(1, 1, 9), 1).kept
    assert torch.equal(found, torch.ones(1, 1, 9))
    assert model[0].training and not model[1].training


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"start": torch.full((1, 1, 1), math.nan)}, "trajectory 0 is not finite"),
        ({"start": torch.ones(1, 1)}, "has shape"),
        ({"steps": 0}, "at least one"),
        ({"forced": 2}, "give them as truth"),
        ({"forced": 2, "truth": torch.ones(1, 1, 1)}, "truth has 1 steps"),
        ({"truth": torch.ones(1, 4, 2)}, "does not fit"),
        ({"controls": torch.ones(1, 2)}, "controls has 2 steps"),
        ({"metrics": {"nmse": ro.nmse}}, "need the true states"),
        ({"layout": "rows"}, "layout is"),
        ({"model": lambda x: x[:, :0]}, "next state is"),
        ({"model": []}, "at least one member"),
        ({"keep": 0}, "k of at least 1"),
    ],
)
def test_a_wrong_request_is_one_sentence(change, sentence):
    asked = {"model": lambda x: x, "start": torch.ones(1, 1, 1), "steps": 3} | change
    with pytest.raises(RequestError, match=sentence) as caught:
        ro.rollout(asked.pop("model"), asked.pop("start"), asked.pop("steps"), **asked)
    assert "\n" not in str(caught.value)


def test_losses_one_step_multi_step_pushforward_and_noise():
    past, targets = series(t=2), series(t=4) + 1
    model = Linear(0.6, 0.2)
    error = lambda p, y: (p - y).square()  # noqa: E731
    one = 0.6 * past[:, 1] + 0.2 * past[:, 0]
    two = 0.6 * one + 0.2 * past[:, 1]
    three = 0.6 * two + 0.2 * one

    def loss(**options):
        return ro.forecast_loss(error, **options)(model, (past, targets))

    torch.testing.assert_close(loss(), error(one, targets[:, 0]).mean())
    both = torch.stack([error(one, targets[:, 0]), error(two, targets[:, 1])]).mean()
    torch.testing.assert_close(loss(steps=2), both)
    pushed = loss(pushforward=2)
    torch.testing.assert_close(pushed, error(three, targets[:, 2]).mean())
    (gradient,) = torch.autograd.grad(pushed, model.w)
    expected = 2 * (three - targets[:, 2])  # the first two steps carry no gradient
    by_hand = torch.stack([(expected * two).mean(), (expected * one).mean()])
    torch.testing.assert_close(gradient, by_hand)
    (through,) = torch.autograd.grad(loss(steps=3), model.w)
    eps = 1e-3
    for i in range(2):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                model.w[i] += sign * eps
                values.append(loss(steps=3))
                model.w[i] -= sign * eps
        torch.testing.assert_close(through[i], (values[0] - values[1]) / (2 * eps), rtol=1e-2,
                                   atol=1e-3)  # fmt: skip
    torch.manual_seed(0)
    noisy = loss(noise=0.1)
    torch.manual_seed(0)
    assert noisy == loss(noise=0.1) and noisy != loss()
    with pytest.raises(RequestError, match="horizon of 5"):
        loss(steps=5)
    with pytest.raises(RequestError, match="steps=0"):
        ro.forecast_loss(steps=0)


def test_a_loss_with_controls_and_window_layout():
    past, targets, controls = series(t=1), series(t=2), torch.ones(3, 2, 1, 1, 1)
    model = lambda window, control, gain: window[:, -1] + gain * control  # noqa: E731
    loss = ro.forecast_loss(lambda p, y: p - y, steps=2, controlled=True, layout="window")
    found = loss(model, (past, targets, controls, 3.0))
    expected = torch.stack([past[:, 0] + 3, past[:, 0] + 6], 1) - targets
    torch.testing.assert_close(found, expected.mean())


def test_the_loss_plugs_into_fit():
    data = [series(b=64, t=2, c=1, space=(4,))]
    for _ in range(3):
        data[0] = torch.cat([data[0], (0.7 * data[0][:, -1] - 0.5 * data[0][:, -2])[:, None]], 1)
    model = Linear(0.0, 0.0)
    batches = Batches(data[0][:, :2], data[0][:, 2:], batch_size=16)
    options = {"lr": 0.05, "schedule": "cosine", "weight_decay": 0.0, "quiet": True}
    fit(model, batches, ro.forecast_loss(steps=3), steps=200, **options)
    torch.testing.assert_close(model.w.data, torch.tensor([0.7, -0.5]), atol=1e-2, rtol=0)


def test_errors_are_scale_invariant_and_masked():
    p, y = series(t=1)[:, 0], series(t=2)[:, 1]
    for error in (ro.relative_l2, ro.nmse):
        torch.testing.assert_close(error(5 * p, 5 * y), error(p, y))
        assert torch.equal(error(torch.zeros_like(y), y), torch.ones_like(error(p, y)))
        mask = torch.zeros(6, 5)
        mask[:3] = 1
        torch.testing.assert_close(error(p, y, mask=mask), error(p[:, :, :3], y[:, :, :3]))
    by_hand = ((p - y).square().sum((2, 3)) / y.square().sum((2, 3))).sqrt()
    torch.testing.assert_close(ro.relative_l2(p, y), by_hand)


def test_correlation_time_interpolates():
    values = torch.tensor(
        [[0.9, 0.7, 0.95], [0.4, 0.4, 0.4], [0.99, 0.9, 0.85], [0.9, math.nan, 1]]
    )
    found = ro.correlation_time(values, dt=2.0, threshold=0.8)
    torch.testing.assert_close(found[:3], torch.tensor([3.0, 2 * 0.2 / 0.6, 6.0]))
    assert 2 < found[3] < 4


@pytest.mark.parametrize("space", [(12,), (8, 12), (4, 6, 5)])
def test_the_spectrum_sums_to_the_mean_square(space):
    states = torch.randn(2, 3, *space, dtype=torch.float64)
    energy = ro.radial_spectrum(states)
    torch.testing.assert_close(energy.sum(2), states.square().flatten(2).mean(2))


def test_a_wave_lies_in_its_shell():
    n = torch.arange(16) / 16 * 2 * math.pi
    wave = torch.cos(3 * n[:, None] + 4 * n[None])[None, None].double()
    energy = ro.radial_spectrum(wave)[0, 0]
    assert energy[5] == pytest.approx(0.5) and energy.sum() == pytest.approx(0.5)


def test_conservation_of_a_quantity_of_the_callers():
    start = torch.rand(2, 1, 4) + 1
    energy = lambda x: x.square().flatten(1).sum(1)  # noqa: E731
    torch.testing.assert_close(
        ro.conservation_error(2 * start, start, energy), torch.full((2,), 3.0)
    )
