"""The simulators against autograd, closed forms and conservation laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.learning import deep_linear as dl
from pantarhei.learning.initializers import balanced
from pantarhei.probes.signal import conserved

rng = np.random.default_rng(0)
X = rng.normal(size=(30, 5)) @ np.diag([2.0, 1.0, 1.0, 0.5, 0.2])
Y = X @ rng.normal(size=(5, 3)) + 0.1 * rng.normal(size=(30, 3))
DATA = dl.Correlations.of(X, Y)


def start(*widths, scale=0.4, batch=(), seed=1):
    own = np.random.default_rng(seed)
    pairs = zip(widths[1:], widths, strict=False)
    return [scale * own.normal(size=(*batch, o, i)) for o, i in pairs]


@pytest.mark.parametrize("widths", [(5, 3), (5, 4, 3), (5, 7, 2, 6, 3)])
def test_the_direction_is_minus_the_gradient(widths):
    net = dl.DeepLinearNet(*widths)
    loss = (net(torch.from_numpy(X)) - torch.from_numpy(Y)).square().sum(1).mean() / 2
    loss.backward()
    assert DATA.loss(net.product().detach().numpy()) == pytest.approx(loss.item())
    stepped = dl.gradient_descent(net, DATA, 0.1, 1).weights
    for p, w in zip(net.parameters(), stepped, strict=True):
        np.testing.assert_allclose(w, (p - 0.1 * p.grad).detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("solver", ["DOP853", "RK45"])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_flow_from_a_decoupled_start_is_the_closed_form(n, solver):
    data = dl.Correlations.of_map(rng.normal(size=(3, 5)))
    modes = data.modes()
    weights = balanced((5, *(6,) * (n - 1), 3), modes.U, modes.V, 0.05)
    t = np.linspace(0, 3, 7)
    done = dl.gradient_flow(weights, data, t, tau=1.5, solver=solver)
    np.testing.assert_allclose(done.u, dl.depth_curve(t, modes.s, 0.05, n, 1.5), atol=1e-6)
    whole = (modes.s - done.u) ** 2
    np.testing.assert_allclose(done.loss, whole.sum(1) / 2 + data.floor, atol=1e-8)


@pytest.mark.parametrize(("a0", "b0"), [(0.4, 0.1), (0.3, -0.1), (-0.1, 0.2)])
def test_flow_from_unequal_layers_is_the_hyperbola(a0, b0):
    data = dl.Correlations.of_map(rng.normal(size=(3, 4)))
    modes = data.modes()
    strengths = np.array([[a0], [b0]])
    weights = balanced((4, 5, 3), modes.U, modes.V, strengths=strengths)
    t = np.linspace(0, 4, 9)
    done = dl.gradient_flow(weights, data, t)
    np.testing.assert_allclose(done.u, dl.hyperbolic(t, modes.s, a0, b0), atol=1e-6)


def test_flow_with_commuting_inputs_is_the_rescaled_closed_form():
    q, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    u, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    power = np.array([3.0, 1.0, 0.5, 2.0])
    data = dl.Correlations(u * [2.0, 1.0, 0.7] @ q[:, :3].T, q * power @ q.T, 10.0)
    modes = data.modes()
    weights = balanced((4, 5, 3), modes.U, modes.V, 0.02)
    t = np.linspace(0, 6, 9)
    done = dl.gradient_flow(weights, data, t)
    predicted = dl.logistic(t, modes.target, 0.02, 1 / modes.power)
    np.testing.assert_allclose(done.u, predicted, atol=1e-6)
    foretold = dl.predict(data, weights, t)
    assert foretold.kind == "exact"
    np.testing.assert_allclose(foretold.u[:, 0], predicted, atol=1e-9)
    np.testing.assert_allclose(foretold.loss()[:, 0], done.loss, atol=1e-8)


def test_the_flow_conserves_and_descent_drifts_with_the_rate():
    weights = start(5, 6, 4, 3)
    before = conserved([torch.from_numpy(w) for w in weights])

    def drift(after):
        now = conserved([torch.from_numpy(w) for w in after])
        return max((a - b).abs().max().item() for a, b in zip(before, now, strict=True))

    flow = dl.gradient_flow(weights, DATA, [0, 5.0], rtol=1e-12)
    assert drift(flow.weights) < 1e-10
    assert abs(flow.loss[1] - flow.loss[0]) > 0.1  # it did move
    drifts = [
        drift(dl.gradient_descent(weights, DATA, r, round(2 / r), every=10**6).weights)
        for r in (0.01, 0.005, 0.0025)
    ]
    assert drifts[0] / drifts[1] == pytest.approx(2, rel=0.1)
    assert drifts[1] / drifts[2] == pytest.approx(2, rel=0.05)


def test_a_batch_is_its_trainings_one_by_one():
    weights = start(5, 4, 3, batch=(3, 1))
    rates = np.array([0.01, 0.05])
    done = dl.gradient_descent(weights, DATA, rates, 20, every=7)
    assert done.times.tolist() == [0, 7, 14, 20] and done.loss.shape == (4, 3, 2)
    for i in range(3):
        for j in range(2):
            one = dl.gradient_descent([w[i, 0] for w in weights], DATA, rates[j], 20, every=7)
            np.testing.assert_allclose(done.u[:, i, j], one.u, atol=1e-12)
            np.testing.assert_allclose(done.weights[0][i, j], one.weights[0], atol=1e-12)
    flows = dl.gradient_flow(weights, DATA, [0, 1, 2.0])
    one = dl.gradient_flow([w[2, 0] for w in weights], DATA, [0, 1, 2.0], keep_products=True)
    np.testing.assert_allclose(flows.u[:, 2, 0], one.u, atol=1e-7)
    np.testing.assert_allclose(DATA.loss(one.products), one.loss)


def test_descent_follows_the_flow_as_the_rate_falls():
    weights = start(5, 4, 3)
    flow = dl.gradient_flow(weights, DATA, [0, 1.0])
    gaps = [
        abs(dl.gradient_descent(weights, DATA, r, round(1 / r)).loss[-1] - flow.loss[-1])
        for r in (0.02, 0.01, 0.005)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.2)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.1)


def test_steps_to_counts_what_a_plain_loop_counts():
    weights = start(5, 4, 3, batch=(2, 1))
    rates = np.array([0.01, 0.1, 50.0])
    counted = dl.steps_to(weights, DATA, rates, error=0.3, max_steps=400)
    needed = DATA.floor + 0.3 * (DATA.power / 2 - DATA.floor)
    for i in range(2):
        for j, rate in enumerate(rates[:2]):
            loss = dl.gradient_descent([w[i, 0] for w in weights], DATA, rate, 400).loss
            assert counted[i, j] == np.flatnonzero(loss <= needed)[0]
    assert np.isinf(counted[:, 2]).all()  # diverged
    first = dl.steps_to(weights, DATA, rates, error=0.3, max_steps=400, first=1)
    np.testing.assert_array_equal(first.min(1), counted.min(1))
    assert np.isinf(first).sum(1).tolist() == [2, 2]
    assert dl.steps_to([np.asarray(DATA.least_squares)], DATA, 0.1) == 0
    assert np.isinf(dl.steps_to(start(5, 4, 3), DATA, 1e-6, max_steps=3))


def test_any_module_of_linear_layers_will_do():
    net = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False))
    before = [p.detach().clone() for p in net.parameters()]
    done = dl.gradient_flow(net, DATA, [0, 0.5])
    assert done.weights[0].dtype == np.float64
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dl.DeepLinearNet(4), "no layer"),
        (lambda: dl.gradient_flow(nn.Linear(5, 3), DATA, [0, 1]), "'bias' is no weight"),
        (lambda: dl.gradient_flow(start(5, 4), DATA, [0, 1]), "weights that fit"),
        (lambda: dl.gradient_flow([np.ones((4, 5)), np.ones((3, 3))], DATA, [0]), "do not follow"),
        (lambda: dl.gradient_flow([], DATA, [0, 1]), "one or more"),
        (lambda: dl.gradient_flow(start(5, 3), DATA, [1, 0]), "increasing"),
        (lambda: dl.gradient_descent(start(5, 4, 3), DATA, 50.0, 100), "diverged by step"),
    ],
)
def test_bad_requests(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
