"""Random features, both layers, frozen directions, bounds: against dense or slow computations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.fit import fit
from pantarhei.learning.generalization import stopping_time
from pantarhei.learning.generalization.bounds import complexity, generalization_bounds, norm_cap
from pantarhei.learning.generalization.frozen import DataSubspace
from pantarhei.learning.generalization.random_features import (
    Task,
    TwoLayer,
    _exact_flow,
    relu_teacher,
    train_both_layers,
    width_sweep,
)


def squared(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()


# ---- random features -------------------------------------------------------------------------


def test_the_teacher_is_standardised_and_noisy_only_in_training():
    task = relu_teacher(3, 500, snr=4.0, tests=4000, seed=1)
    torch.testing.assert_close(task.y_test.mean(1), torch.zeros(3, 1).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(task.y_test.std(1), torch.ones(3, 1).double())
    assert task.noise == 0.25
    assert task.y.var().item() == pytest.approx(1.25, rel=0.1)
    assert not torch.equal(task.x[0], task.x[1])


@pytest.mark.parametrize("width", [5, 12, 30])
@pytest.mark.parametrize("outputs", [1, 2])
def test_exact_flow_is_what_stepping_does(width, outputs):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    h, y, h_test, y_test = normal(2, 12, width), normal(2, 12, outputs), normal(2, 9, width), 0
    h, h_test = h / width**0.5, h_test / width**0.5
    y_test, v0 = normal(2, 9, outputs), normal(2, width, outputs)
    t = torch.tensor([0.0, 0.5, 4.0]).double()
    found = _exact_flow(h, y, h_test, y_test, t, v0, 0.3)
    # matrix exponential of the linear equation dv/dt = H^T y - H^T H v
    gram, drive = h.mT @ h, h.mT @ y
    system = torch.zeros(2, width + 1, width + 1).double()
    for output in range(outputs):
        system[:, :width, :width], system[:, :width, width] = -gram, drive[..., output]
        begin = torch.cat([v0[..., output], torch.ones(2, 1).double()], 1)[..., None]
        v = [(torch.matrix_exp(system * time) @ begin)[:, :width] for time in t]
        stepped = torch.cat(v, 2)
        if outputs == 1:
            errors = ((h @ stepped - y) ** 2).mean(1), ((h_test @ stepped - y_test) ** 2).mean(1)
            torch.testing.assert_close(found["train"], errors[0])
            torch.testing.assert_close(found["test"], errors[1] + 0.3)
            torch.testing.assert_close(found["norm"], stepped.norm(dim=1))
        else:
            expected = ((h_test @ stepped - y_test[..., output : output + 1]) ** 2).mean(1) / 2
            found["test"] = found["test"] - expected
    if outputs == 2:
        torch.testing.assert_close(found["test"], torch.full((2, 3), 0.3).double())


def test_a_sweep_is_the_same_however_many_seeds_go_together(monkeypatch):
    from pantarhei.learning.generalization import random_features

    task = relu_teacher(4, 20, tests=30)
    times = [0.1, 1e3]
    whole = width_sweep(task, [8, 40], times)
    monkeypatch.setattr(random_features, "_NUMBERS", 1)
    single = width_sweep(task, [8, 40], times)
    np.testing.assert_allclose(whole.test, single.test, rtol=1e-9)
    np.testing.assert_allclose(whole.smallest, single.smallest, rtol=1e-6)


def test_overtraining_peaks_where_features_meet_examples():
    sweep = width_sweep(relu_teacher(8, 60, tests=400), [30, 60, 120], np.geomspace(1e-2, 1e5, 40))
    low, peak, high = np.median(sweep.overtraining, 1)
    assert peak > 5 * max(low, high)
    assert (sweep.rank == [[30], [60], [60]]).all()
    assert (sweep.smallest[1] < sweep.smallest[[0, 2]]).all()  # no gap at N_h = P
    bounds = {name: np.median(values, 1) for name, values in sweep.bounds().items()}
    assert (np.diff(bounds["plain"]) > 0).all()
    assert bounds["conditioned"].argmax() == 1
    assert (sweep.bounds()["conditioned"] <= sweep.bounds()["capped"] * (1 + 1e-9)).all()


def test_starting_weights_stay_in_the_frozen_directions():
    task = relu_teacher(1, 20, snr=1e6, tests=200)
    cold, warm = (width_sweep(task, [80], [0.0, 1e8], start=s) for s in (0.0, 1.0))
    assert cold.norm[0, 0, 0] == 0
    assert warm.final[0, 0] > cold.final[0, 0]
    assert warm.norm[0, 0, 1] > np.sqrt(0.5 * 60)  # 60 of 80 directions are never reached


def test_centring_takes_the_outlier_away():
    task = relu_teacher(2, 200, tests=10)
    raw, centred = (width_sweep(task, [100], [1.0], center=c).spectra[0] for c in (False, True))
    outlier = 200 / (2 * np.pi)  # P times the squared mean of a ReLU of a normal variable
    np.testing.assert_allclose(raw[:, 0], outlier, rtol=0.25)
    assert (centred[:, 0] < outlier / 4).all()


def test_the_users_own_data():
    rng = np.random.default_rng(0)
    x, y = torch.from_numpy(rng.normal(size=(40, 5))), torch.from_numpy(rng.normal(size=40))
    sweep = width_sweep(Task(x[:30], y[:30], x[30:], y[30:]), [10, 20], [0.1, 10], seeds=3)
    assert sweep.test.shape == (2, 3, 2)
    assert len(set(sweep.test[0, :, 1].tolist())) == 3  # each seed a first layer of its own
    assert [row["width"] for row in sweep.rows()] == [10, 20]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda t: width_sweep(t, [], [1.0]), "at least one"),
        (lambda t: width_sweep(t, [0], [1.0]), "positive"),
        (lambda t: width_sweep(t, [3], [2.0, 1.0]), "sorted"),
        (lambda t: width_sweep(t, [3], [1.0], seeds=5), "contradicts"),
        (lambda t: width_sweep(t._replace(y=t.y[:, :3]), [3], [1.0]), "target for each example"),
        (lambda t: width_sweep(t._replace(y=t.y * np.nan), [3], [1.0]), "not finite"),
        (lambda t: train_both_layers(t, 3, 5), "without an axis"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call(relu_teacher(2, 10, tests=10))


# ---- both layers -----------------------------------------------------------------------------


def test_both_layers_learn_and_the_course_is_measured():
    task = relu_teacher(1, 60, tests=100).one(0)
    course = train_both_layers(task, 20, steps=300, points=20)
    again = train_both_layers(task, 20, steps=300, points=20)
    np.testing.assert_array_equal(course.test, again.test)
    assert course.steps[0] == 0 and course.steps[-1] == 300
    assert course.train[-1] < 0.5 * course.train[0]
    assert course.overtraining >= 0
    with torch.no_grad():
        error = squared(course.model, (task.x.float(), task.y.float())).item()
    assert course.train[-1] == pytest.approx(error, rel=1e-5)
    moved = course.model.first.weight - TwoLayer(50, 20).first.weight
    assert moved.abs().max() > 1e-3  # the first layer, too


# ---- frozen directions -----------------------------------------------------------------------


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def dense_jacobian(model, x):
    rows = []
    for value in model(x).reshape(-1):
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([g.reshape(-1) for g in gradients]))
    return torch.stack(rows)


@pytest.mark.parametrize("memory", [1, 2**30])
def test_the_subspace_against_the_dense_jacobian(memory):
    model = small_network()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    space = DataSubspace(model, squared, (x[:3], y[:3]), (x[3:], y[3:]), memory=memory)
    jacobian = dense_jacobian(model, x)
    singular = torch.linalg.svdvals(jacobian)
    assert (space.size, space.rank) == (44, 10)
    torch.testing.assert_close(space.eigenvalues, singular**2)
    assert space.smallest == pytest.approx(float(singular[-1] ** 2))
    v = torch.randn(44).double()
    projector = torch.linalg.pinv(jacobian) @ jacobian
    torch.testing.assert_close(space.inside(v), projector @ v)
    torch.testing.assert_close(space.outside(v), v - projector @ v)
    features = space.features()
    torch.testing.assert_close(features @ features.T, jacobian @ jacobian.T)


def test_a_network_linear_in_its_weights_moves_inside_alone():
    torch.manual_seed(0)
    model = nn.Linear(30, 2)
    x, y = torch.randn(8, 30), torch.randn(8, 2)
    space = DataSubspace(model, squared, (x, y))
    assert space.movement(model).share_outside == 0
    fit(model, lambda n: (x, y), squared, steps=50, optimizer=torch.optim.SGD, lr=0.1, quiet=True)
    moved = space.movement(model)
    assert moved.inside > 0.1
    assert moved.share_outside < 1e-10  # float32 training


def test_a_nonlinear_network_leaves_the_linear_regime():
    model = small_network().float()
    x, y = torch.randn(3, 4), 3 * torch.randn(3, 2)
    space = DataSubspace(model, squared, (x, y))
    fit(model, lambda n: (x, y), squared, steps=300, optimizer=torch.optim.SGD, lr=0.1, quiet=True)
    assert space.movement(model).share_outside > 1e-3


def test_weights_of_a_dead_input_are_frozen_bit_for_bit():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))
    x, y = torch.randn(20, 6), torch.randn(20, 1)
    x[:, 2] = 0
    before = model[0].weight.detach().clone()
    space = DataSubspace(model, squared, (x, y), parameters=lambda name, _: name == "0.weight")
    assert space.rank <= 25 and space.size == 30
    fit(model, lambda n: (x, y), squared, steps=30, optimizer=torch.optim.SGD, lr=0.1, quiet=True)
    assert torch.equal(model[0].weight[:, 2], before[:, 2])
    assert not torch.equal(model[0].weight[:, 1], before[:, 1])


def test_only_chosen_parameters():
    model = small_network()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    readout = DataSubspace(model, squared, (x, y), parameters=lambda n, _: n == "2.weight")
    h = torch.tanh(model[0](x))
    expected = torch.linalg.svdvals(h) ** 2
    torch.testing.assert_close(readout.eigenvalues[::2], expected)  # once for each output
    assert readout.rank == 10 and readout.size == 12


def test_jacobian_features_predict_a_stop():
    model = nn.Linear(10, 1).double()
    x, y = torch.randn(60, 10).double(), torch.randn(60, 1).double()
    space = DataSubspace(model, squared, (x, y), parameters=lambda n, _: n == "weight")
    targets = (y + 2 * x @ torch.randn(10, 1).double())[:, 0]
    linear = stopping_time(x.numpy(), targets.numpy(), intercept=False)
    features = stopping_time(space.features().numpy(), targets.numpy(), intercept=False)
    assert features.raw_time == pytest.approx(linear.raw_time, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, b: DataSubspace(m, squared, b).inside(torch.ones(3)), "does not fit"),
        (lambda m, b: DataSubspace(m, squared, b).movement(nn.Linear(2, 2)), "no parameter"),
        (lambda m, b: DataSubspace(m, squared), "at least one batch"),
    ],
)
def test_bad_networks_are_one_sentence(call, sentence):
    model = small_network()
    with pytest.raises(RequestError, match=sentence):
        call(model, (torch.randn(5, 4).double(), torch.randn(5, 2).double()))


# ---- bounds ----------------------------------------------------------------------------------


def test_the_complexity_term_bounds_random_signs():
    """The empirical Rademacher complexity itself, over all signs, is below its bound and near."""
    h = np.random.default_rng(0).normal(size=(10, 8))
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=10)))
    true = 3.0 * np.linalg.norm(signs @ h, axis=1).mean() / 10
    bound = complexity(3.0, (h**2).sum(), 10)
    assert 0.8 * bound < true <= bound


@pytest.mark.parametrize("width", [10, 20, 45])
def test_bounds_of_a_readout(width):
    rng = np.random.default_rng(1)
    h, y = rng.normal(size=(20, width)) / np.sqrt(width), rng.normal(size=20)
    t = np.array([0.1, 3.0, 1e6])
    start = rng.normal(size=width)
    found = generalization_bounds(h, y, t, weight_scale=0.5, start=start)
    from pantarhei.learning.generalization import flow

    expected = np.linalg.norm(flow(h, y, t, start), axis=1)
    np.testing.assert_allclose(found.norm, expected, rtol=1e-9)
    assert found.rank == min(20, width)
    trace = np.sqrt((h**2).sum())
    assert found.plain == pytest.approx(0.5 * np.sqrt(width) * trace / 20)
    np.testing.assert_allclose(found.conditioned, found.norm * trace / 20)
    assert (found.conditioned <= found.capped).all()
    cold = generalization_bounds(h, y, t)
    assert (np.diff(cold.norm) > 0).all()  # small early in training
    assert (cold.norm <= norm_cap(t, np.linalg.norm(y), cold.smallest)).all()


def test_the_cap_is_attained_by_the_worst_eigenvalue():
    rates, t = np.geomspace(1e-3, 1e3, 200_001), 2.0
    worst = (np.expm1(-rates * t) ** 2 / rates).max()
    assert norm_cap(t, 1.0, 1e-9) == pytest.approx(np.sqrt(worst), rel=1e-5)
