"""Signal, noise and stopping time from data, and steps against time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from pantarhei.errors import RequestError
from pantarhei.learning.generalization import (
    FixedInputs,
    flow,
    optimal_time,
    signal_to_noise,
    signal_to_noise_from_errors,
    steps_of_time,
    stopping_time,
    time_of_steps,
    train_error,
)
from pantarhei.learning.generalization import test_error as generalization_error


def data(examples, size, snr, seed=0, outputs=None):
    rng = np.random.default_rng(seed)
    shape = (size,) if outputs is None else (size, outputs)
    x = rng.normal(size=(examples, size)) / np.sqrt(size)
    clean = x @ rng.normal(size=shape)
    return x, clean + rng.normal(size=clean.shape) / np.sqrt(snr)


@pytest.mark.parametrize("shape", [(20, 8), (12, 12), (10, 25)])
def test_the_estimate_maximises_the_dense_likelihood(shape):
    x, y = data(*shape, snr=4.0, seed=3)
    scale = np.sqrt((x**2).sum(1).mean())

    def likelihood(signal, noise):
        covariance = signal * x @ x.T / scale**2 + noise * np.eye(len(y))
        return multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)

    found = signal_to_noise(x, y, intercept=False)
    top = likelihood(found.signal, found.noise)
    for factor in (0.97, 1.03):
        assert likelihood(found.signal * factor, found.noise) < top
        assert likelihood(found.signal, found.noise * factor) < top


def test_the_intercept_takes_one_mode():
    x, y = data(20, 30, snr=4.0, seed=1)
    q = np.linalg.qr(np.c_[np.ones(20), np.eye(20)[:, :19]])[0][:, 1:]  # contrasts
    inside = signal_to_noise(x, y + 7)
    scale = np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    covariance = inside.signal * x @ x.T / scale**2 + inside.noise * np.eye(20)
    top = multivariate_normal(np.zeros(19), q.T @ covariance @ q).logpdf(q.T @ y)
    for factor in (0.97, 1.03):
        other = inside.signal * factor * x @ x.T / scale**2 + inside.noise * np.eye(20)
        assert multivariate_normal(np.zeros(19), q.T @ other @ q).logpdf(q.T @ y) < top


@pytest.mark.parametrize("snr", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("shape", [(600, 300), (300, 600)])
def test_the_estimate_finds_the_truth(snr, shape):
    found = [signal_to_noise(*data(*shape, snr, seed, outputs=4)) for seed in range(3)]
    assert np.median([f.snr for f in found]) == pytest.approx(snr, rel=0.25)
    assert np.median([f.noise for f in found]) == pytest.approx(1 / snr, rel=0.25)
    assert np.median([f.signal for f in found]) == pytest.approx(1.0, rel=0.25)


def test_nothing_to_explain_and_nothing_left_over():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    away = rng.normal(size=200)
    basis = np.c_[np.ones(200), x]
    away = away - basis @ np.linalg.lstsq(basis, away)[0]
    assert signal_to_noise(x, away).signal == 0
    stop = stopping_time(x, away, lr=0.01)
    assert (stop.time, stop.steps, stop.snr) == (0, 0, 0)
    np.testing.assert_allclose(stop.predict(x), 0, atol=1e-12)
    exact = stopping_time(x, x @ np.arange(5.0))
    assert exact.snr > 1e6
    np.testing.assert_allclose(exact.predict(x), x @ np.arange(5.0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_signal_and_noise_from_error_curves(alpha):
    t = np.array([0.2, 1.0, 4.0, 30.0])
    signal, noise, inr = 3.0, 0.7, 0.5
    train = signal * train_error(t, alpha, signal / noise, inr)
    test = signal * generalization_error(t, alpha, signal / noise, inr)
    for curves in ({"train": train}, {"test": test}, {"train": train, "test": test}):
        found = signal_to_noise_from_errors(t, alpha, **curves)
        assert found.signal == pytest.approx(signal * (1 + inr), rel=1e-6)
        assert found.noise == pytest.approx(noise, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "make"),
    [
        ("mean", lambda e: (e**2).mean()),
        ("sum", lambda e: (e**2).sum()),
        ("half_mean", lambda e: (e**2).sum() / 2 / len(e)),
        ("half_sum", lambda e: (e**2).sum() / 2),
    ],
)
@pytest.mark.parametrize("outputs", [1, 3])
def test_time_is_what_torch_has_done(loss, make, outputs):
    x, y = data(20, 6, 5.0, outputs=outputs)
    w = torch.zeros(6, outputs, dtype=torch.float64, requires_grad=True)
    steps = 400
    lr = 0.02 / {"mean": 2 / (20 * outputs), "sum": 2, "half_mean": 1 / 20, "half_sum": 1}[loss]
    optimizer = torch.optim.SGD([w], lr=lr / 10)
    for _ in range(steps):
        optimizer.zero_grad()
        make(torch.from_numpy(x) @ w - torch.from_numpy(y)).backward()
        optimizer.step()
    t = time_of_steps(steps, lr / 10, 20, loss, outputs=outputs)
    assert t == pytest.approx(0.8)
    np.testing.assert_allclose(w.detach().numpy(), flow(x, y, [t])[0], atol=3e-3)
    assert steps_of_time(t, lr / 10, 20, loss, outputs=outputs) == pytest.approx(steps)


def test_epochs_and_batches():
    assert time_of_steps(3, 0.1, 60, batch_size=20, epochs=True) == pytest.approx(
        time_of_steps(9, 0.1, 60)
    )
    # a summed loss sums the batch alone, so an epoch takes as far as one full-batch step
    assert time_of_steps(1, 0.1, 60, "sum", batch_size=20, epochs=True) == pytest.approx(0.2)


@pytest.mark.parametrize("covariance", ["shrunk", 0.0, 1.0])
def test_stopping_time_is_the_best_of_its_own_curve(covariance):
    x, y = data(60, 40, 4.0)
    stop = stopping_time(3 * x + 1, y + 2, covariance=covariance, lr=1e-3)
    train, test = stop.errors(np.geomspace(stop.time / 20, stop.time * 20, 300))
    assert stop.errors(stop.time)[1] <= test.min() * (1 + 1e-12)
    assert (np.diff(train) <= 1e-14).all()
    assert stop.steps == pytest.approx(steps_of_time(stop.raw_time, 1e-3, 60))
    centred = 3 * (x - x.mean(0))
    np.testing.assert_allclose(stop.coef, flow(centred, y - y.mean(), [stop.raw_time])[0])
    np.testing.assert_allclose(stop.predict(3 * x + 1).mean(), y.mean() + 2, atol=1e-10)


def test_the_units_of_inputs_and_targets_do_not_matter():
    x, y = data(60, 40, 4.0)
    one, other = stopping_time(x, y), stopping_time(100 * x, 5 * y)
    assert other.time == pytest.approx(one.time, rel=1e-6)
    assert other.raw_time == pytest.approx(one.raw_time / 1e4, rel=1e-6)
    np.testing.assert_allclose(other.predict(100 * x), 5 * one.predict(x), rtol=1e-6)
    assert other.penalty == pytest.approx(1e4 * one.penalty, rel=1e-6)


def test_known_snr_and_covariance_are_used():
    x, y = data(50, 30, 4.0)
    stop = stopping_time(x, y, snr=9.0, covariance=np.eye(30) / 30, intercept=False)
    scale = np.sqrt((x**2).sum(1).mean())
    law = FixedInputs(x / scale, np.eye(30) / 30 / scale**2)
    assert stop.snr == pytest.approx(9.0)
    assert stop.time == pytest.approx(optimal_time(law, 9.0), rel=1e-9)


def test_stopping_at_the_prediction_is_nearly_the_oracle():
    """On the theory's own ground, without a validation set; the end is far worse."""
    lost, ended = [], []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 200))
        w = rng.normal(size=200)
        y = x @ w + rng.normal(size=200) * np.sqrt(200 / 5)
        stop = stopping_time(x, y)
        path = flow(x - x.mean(0), y - y.mean(), np.geomspace(1e-5, 10, 300))
        risk = ((path - w) ** 2).sum(1)
        lost.append(((stop.coef - w) ** 2).sum() / risk.min() - 1)
        ended.append(risk[-1] / risk.min() - 1)
    assert np.median(lost) < 0.1 < 1 < np.median(ended)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x, y: stopping_time(x, y[:5]), "a target for each example"),
        (lambda x, y: stopping_time(x, np.ones(20)), "do not vary"),
        (lambda x, y: stopping_time(np.ones((20, 3)), y), "inputs do not vary"),
        (lambda x, y: stopping_time(x[:2], y[:2]), "at least 3"),
        (lambda x, y: stopping_time(x, y, lr=1e3), "diverges"),
        (lambda x, y: stopping_time(x, y, covariance="own"), "'shrunk', a number or a matrix"),
        (lambda x, y: time_of_steps(1, 0.1, 10, "mse"), "Unknown loss"),
        (lambda x, y: time_of_steps(1, 0.1, 10, batch_size=20), "does not fit"),
        (lambda x, y: signal_to_noise_from_errors([1.0], 1.0), "two measured errors"),
        (lambda x, y: signal_to_noise_from_errors([1.0], 1.0, test=[1, 2]), "2 errors for 1"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call(*data(20, 5, 3.0))
