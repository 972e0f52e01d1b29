"""Predicted curves against simulation, and what is read off them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pantarhei.errors import RequestError
from pantarhei.learning import deep_linear as dl
from pantarhei.learning.initializers import balanced

rng = np.random.default_rng(0)
MODES = (2.0, 1.8, 1.2, 1.0, 0.6)
DATA = dl.Correlations.of_map(np.linalg.qr(rng.normal(size=(5, 5)))[0] * MODES)


def small(hidden, draws=10, std=1e-3, seed=0):
    own = np.random.default_rng(seed)
    return [std * own.normal(size=(draws, *shape)) for shape in ((hidden, 5), (5, hidden))]


@pytest.mark.parametrize("hidden", [5, 8, 32])
def test_projection_predicts_dense_small_starts(hidden):
    """Half times of simulation and prediction; orders of magnitude better than no projection."""
    weights = small(hidden)
    predicted = dl.predict(DATA, weights, np.linspace(0, 25, 600))
    assert predicted.kind == "projected"
    simulated = dl.gradient_flow(weights, DATA, predicted.times)
    true = dl.time_to(simulated.times, simulated.u, predicted.modes.target, 0.5)
    half = predicted.time_to(0.5)
    known = np.isfinite(true)
    assert known.mean() > 0.9
    assert np.median(np.abs(half - true)[known]) < 0.03
    naive = dl.logistic_time(0.5 * predicted.modes.s, predicted.modes.s, 1e-6)
    wrong = np.median(np.abs(naive - true)[known])
    assert wrong > 10 * np.median(np.abs(half - true)[known])


def test_competition_matters_and_brackets_the_truth():
    weights = small(6, draws=30)
    predicted = dl.predict(DATA, weights, np.linspace(0, 25, 600))
    simulated = dl.gradient_flow(weights, DATA, predicted.times)
    target = predicted.modes.target
    true = dl.time_to(simulated.times, simulated.u, target, 0.5)[:, -1]
    alone = dl.time_to(predicted.times, predicted.u_alone, target, 0.5)[:, -1]
    together = predicted.time_to(0.5)[:, -1]
    known = np.isfinite(true) & np.isfinite(together)
    assert (alone <= together + 1e-9).all()
    assert np.median(np.abs(together - true)[known]) < 0.2 * np.median(np.abs(alone - true)[known])
    one = dl.predict(DATA, [w[0] for w in weights], predicted.times)
    low, middle, high = one.band()
    assert (low <= middle).all() and (middle <= high).all() and (high - low).max() > 0.1


def test_projection_keeps_what_the_flow_conserves_and_the_decoupled_start():
    weights = small(7, draws=4, std=0.1)
    modes = DATA.modes()
    a, b = dl.project(weights, modes, competition=False)
    w1, w2 = weights
    norms = ((w1 @ modes.V) ** 2).sum(1) - ((w2.swapaxes(1, 2) @ modes.U) ** 2).sum(1)
    np.testing.assert_allclose(a**2 - b**2, norms, atol=1e-12)
    start = balanced((5, 9, 5), modes.U, modes.V, strengths=np.array([[0.3], [-0.1]]))
    for competition in (True, False):
        a, b = dl.project(start, modes, competition)
        np.testing.assert_allclose(np.abs(a), 0.3, atol=1e-9)
        np.testing.assert_allclose(a * b, -0.03, atol=1e-9)
    narrow = dl.project(small(3), modes)
    assert (narrow[:, :, 3:] == 0).all() and (narrow[0, :, :3] != 0).all()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_decoupled_starts_are_recognised_with_the_strengths_they_have(n):
    modes = DATA.modes()
    strengths = 0.3 + 0.5 * np.random.default_rng(n).random((n, 5))
    strengths[-1] *= np.array([1, -1, 1, 1, -1])
    weights = balanced((5, *(7,) * (n - 1), 5), modes.U, modes.V, strengths=strengths)
    t = np.linspace(0, 6, 13)
    predicted = dl.predict(DATA, weights, t)
    assert predicted.kind == "exact"
    done = dl.gradient_flow(weights, DATA, t)
    np.testing.assert_allclose(predicted.u[:, 0], done.u, atol=1e-6)
    np.testing.assert_allclose(predicted.loss()[:, 0], done.loss, atol=1e-6)
    np.testing.assert_array_equal(predicted.band()[0], predicted.band()[2])


def test_nearly_decoupled_is_not_taken_for_decoupled():
    wide = dl.Correlations.of_map(DATA.sigma31[:2])
    modes = wide.modes()
    w1, w2 = balanced((5, 6, 2), modes.U, modes.V, 0.1)
    outside = np.linalg.svd(wide.sigma31)[2][-1]
    leak = w1 + 0.2 * w1 @ torch.from_numpy(modes.V[:, :1]) @ torch.from_numpy(outside[None])
    assert dl.predict(wide, [w1, w2]).kind == "exact"
    assert dl.predict(wide, [leak, w2]).kind == "projected"
    turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert dl.predict(wide, [turned @ w1, w2]).kind == "projected"
    assert dl.predict(wide, [turned @ w1, w2 @ turned.T]).kind == "exact"


def test_deep_dense_starts_are_simulated():
    weights = [0.3 * rng.normal(size=s) for s in ((6, 5), (6, 6), (5, 6))]
    predicted = dl.predict(DATA, weights)
    assert predicted.kind == "simulated"
    done = dl.gradient_flow(weights, DATA, predicted.times)
    np.testing.assert_allclose(predicted.u[:, 0], done.u)
    np.testing.assert_allclose(predicted.loss()[:, 0], done.loss)
    forced = dl.predict(DATA, small(8), simulate=True)
    assert forced.kind == "simulated"


def test_one_layer_is_exact_for_any_inputs():
    x = rng.normal(size=(30, 4)) * [3.0, 1.0, 0.3, 0.0]
    y = rng.normal(size=(30, 2)) + x[:, :2]
    data, w = dl.Correlations.of(x, y), rng.normal(size=(3, 2, 4))
    t = np.linspace(0, 5, 9)
    predicted = dl.predict(data, [w], t, tau=2.0)
    done = dl.gradient_flow([w], data, t, tau=2.0)
    assert predicted.kind == "exact" and len(predicted.modes.s) == 4
    np.testing.assert_allclose(predicted.loss(), done.loss, atol=1e-7)
    zero = dl.predict(data, [np.zeros((2, 4))])
    assert np.isinf(zero.time_to(0.5)[0, -1])  # the input without power
    np.testing.assert_allclose(zero.loss()[-1, 0], data.floor, rtol=0.05)


def test_validation_loss_along_the_way_is_that_of_the_maps():
    x, y = rng.normal(size=(60, 5)), rng.normal(size=(60, 3))
    white, transform = dl.whiten(x[:40])
    data = dl.Correlations.of(white, y[:40])
    other = dl.Correlations.of(x[40:] @ transform, y[40:])
    modes = data.modes()
    weights = balanced((5, 6, 3), modes.U, modes.V, 1e-3)
    predicted = dl.predict(data, weights)
    done = dl.gradient_flow(weights, data, predicted.times, keep_products=True)
    np.testing.assert_allclose(predicted.loss_on(other)[:, 0], other.loss(done.products), atol=1e-6)
    best = predicted.stopping_time(other)
    assert best == predicted.times[np.argmin(other.loss(done.products))]


def test_what_is_read_off_the_curves():
    data = dl.Correlations.of_map(np.diag([4.0, 1.0]))
    weights = balanced((2, 2, 2), np.eye(2), np.eye(2), 1e-3)
    predicted = dl.predict(data, weights, np.linspace(0, 8, 4001))
    expected = dl.logistic_time([2.0, 0.5], [4.0, 1.0], 1e-3)
    np.testing.assert_allclose(predicted.time_to(0.5)[0], expected, atol=1e-4)
    assert predicted.order.tolist() == [0, 1]
    (first, second) = predicted.plateaus()
    assert first[0] == 0 and first[1] == pytest.approx(dl.logistic_time(0.4, 4.0, 1e-3), abs=2e-3)
    expected = dl.logistic_time([3.6, 0.1], [4.0, 1.0], 1e-3)
    np.testing.assert_allclose(second, expected, atol=2e-3)
    stop = predicted.stopping_time(share=0.01)
    left = predicted.loss()[:, 0] / predicted.loss()[0, 0]
    assert (
        left[predicted.times < stop].min() > 0.0099 and left[predicted.times >= stop].max() < 0.011
    )
    rows = list(predicted.rows())
    assert rows[0]["u_1"] == pytest.approx(1e-3) and {"t", "loss", "u_2_high"} <= rows[0].keys()


def test_half_times_are_guarded():
    t = np.array([0.0, 1.0, 2.0])
    u = np.array([[-0.5, 0.6, 0.0, 0.0], [0.25, 0.7, 0.2, 0.0], [0.75, 1.0, 0.3, 0.0]])
    times = dl.time_to(t, u, np.array([1.0, 1.0, 1.0, 0.0]), 0.5)
    # a negative start counts; what is there at the start is there; never; nothing to learn
    assert times.tolist() == [1.5, 0.0, np.inf, np.inf]


def test_bad_requests():
    x = rng.normal(size=(30, 4)) * [3.0, 1.0, 0.3, 0.1]
    mixed = dl.Correlations.of(x, x @ rng.normal(size=(4, 2)))
    weights = [np.ones((3, 4)), np.ones((2, 3))]
    with pytest.raises(RequestError, match="not white"):
        dl.predict(mixed, weights)
    with pytest.warns(UserWarning, match="not white"):
        dl.predict(mixed, weights, approximate=True)
    with pytest.raises(RequestError, match="map 5 inputs"):
        dl.predict(mixed, small(4))
    with pytest.raises(RequestError, match="increasing"):
        dl.predict(DATA, small(4), [1.0, 0.5])
    with pytest.raises(RequestError, match="same inputs"):
        dl.predict(DATA, small(4)).loss_on(mixed)
