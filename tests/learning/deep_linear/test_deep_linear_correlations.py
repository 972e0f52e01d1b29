"""Correlations, modes, whitening and the clock."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.data.simulate.hierarchy import hierarchy, hierarchy_strengths
from pantarhei.errors import RequestError
from pantarhei.learning import deep_linear as dl

rng = np.random.default_rng(0)
X = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
Y = X @ rng.normal(size=(5, 3)) + 0.3 * rng.normal(size=(40, 3))


def test_losses_are_those_of_the_samples():
    data, w = dl.Correlations.of(X, Y), rng.normal(size=(4, 3, 5))
    direct = ((Y - X @ w.swapaxes(1, 2)) ** 2).sum((1, 2)) / (2 * len(X))
    np.testing.assert_allclose(data.loss(w), direct, rtol=1e-12)
    best = np.linalg.lstsq(X, Y, rcond=None)[0]
    np.testing.assert_allclose(data.least_squares, best.T, atol=1e-9)
    assert data.floor == pytest.approx(((Y - X @ best) ** 2).sum() / 80)


def test_whitened_inputs_are_white_and_give_the_same_map():
    white, transform = dl.whiten(X)
    data = dl.Correlations.of(white, Y)
    assert data.whitened and not dl.Correlations.of(X, Y).whitened
    back = data.least_squares @ transform.T
    np.testing.assert_allclose(back, dl.Correlations.of(X, Y).least_squares, atol=1e-9)
    few, _ = dl.whiten(np.hstack([X, X[:, :2]]))
    assert few.shape == (40, 5)  # the copies bring no direction of their own


def test_modes_refuse_what_mixes_and_warn_where_told_to_go_on():
    data = dl.Correlations.of(X, Y)
    with pytest.raises(RequestError, match=r"not white.*whiten"):
        data.modes()
    with pytest.warns(UserWarning, match="not white"):
        modes = data.modes(approximate=True)
    v, s = np.linalg.svd(data.sigma31)[2], np.linalg.svd(data.sigma31)[1]
    np.testing.assert_allclose(modes.s, s)
    np.testing.assert_allclose(modes.power, np.diag(v @ data.sigma11 @ v.T)[:3])


def test_commuting_inputs_have_modes_even_of_equal_strength():
    q, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    u, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    s, power = np.array([2.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.5, 2.0])
    data = dl.Correlations(u * s @ q[:, :3].T, q * power @ q.T, 10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        modes = data.modes()
    np.testing.assert_allclose(modes.U * modes.s @ modes.V.T, data.sigma31, atol=1e-10)
    rotated = modes.V.T @ data.sigma11 @ modes.V
    np.testing.assert_allclose(rotated, np.diag(modes.power), atol=1e-10)
    assert sorted(modes.target.round(6)) == pytest.approx([2 / 3, 1.0, 2.0])


def test_modes_that_are_not_in_the_data_have_no_strength():
    targets = np.outer(X[:, 0], [1.0, 2.0, 3.0])
    white, _ = dl.whiten(X)
    assert (dl.Correlations.of(white, targets).modes().s > 0).sum() == 1


@pytest.mark.parametrize("loss", ["half-mean", "half-sum", "mse", "mse-sum"])
def test_tau_maps_the_step_of_every_loss(loss):
    """One step of torch's own SGD on each loss is one step of the flow's right-hand side."""
    losses = {
        "half-mean": lambda out, y: (out - y).square().sum(1).mean() / 2,
        "half-sum": lambda out, y: (out - y).square().sum() / 2,
        "mse": nn.MSELoss(),
        "mse-sum": nn.MSELoss(reduction="sum"),
    }
    data, lr = dl.Correlations.of(X, Y), 1e-3
    net = dl.DeepLinearNet(5, 4, 3)
    before = [w.detach().clone() for w in net.parameters()]
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    losses[loss](net(x), y).backward()
    optimizer.step()
    ours = dl.gradient_descent(before, data, 1 / data.tau(lr, loss), 1).weights
    for a, b in zip(net.parameters(), ours, strict=True):
        np.testing.assert_allclose(a.detach().numpy(), b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dl.Correlations.of(X, Y[:-1]), "not samples of one data set"),
        (lambda: dl.Correlations.of(X[:0], Y[:0]), "not samples of one data set"),
        (lambda: dl.Correlations.of(np.full((2, 2), np.nan), np.ones(2)), "inputs hold nan in row"),
        (lambda: dl.whiten(np.zeros((3, 2))), "all zero"),
        (lambda: dl.Correlations.of(X, Y).tau(0.0), "positive"),
        (lambda: dl.Correlations.of(X, Y).tau(0.1, "mae"), "not a loss"),
    ],
)
def test_bad_requests(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()


@pytest.mark.parametrize(("branching", "depth"), [(2, 3), (3, 2)])
def test_the_tree_has_the_strengths_of_its_levels(branching, depth):
    data = dl.Correlations.of(*hierarchy(branching, depth, 0.1, 20_000, seed=1))
    assert data.whitened
    found = data.modes().s / np.sqrt(20_000)
    levels = hierarchy_strengths(branching, depth, 0.1, 1)
    counts = [1, *((branching - 1) * branching**level for level in range(depth))]
    np.testing.assert_allclose(found, np.repeat(levels, counts), rtol=0.03)


def test_a_tree_flips_as_often_as_it_says_and_refuses_nonsense():
    _, y = hierarchy(2, 1, 0.2, 100_000, seed=2)
    assert (y[0] != y[1]).mean() == pytest.approx(2 * 0.2 * 0.8, abs=0.01)
    for bad in ((1, 3, 0.1), (2, 0, 0.1), (2, 3, 0.7), (2, 40, 0.1)):
        with pytest.raises(RequestError):
            hierarchy(*bad)
    with pytest.raises(RequestError, match="one feature"):
        hierarchy(features=0)
