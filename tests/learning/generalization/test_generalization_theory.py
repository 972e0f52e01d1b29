"""Spectra, error curves, stopping times: closed forms, limits, the fact sheet's tables."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from pantarhei.errors import RequestError
from pantarhei.learning.generalization import (
    FixedInputs,
    Spectrum,
    decompose,
    flow,
    marchenko_pastur_density,
    mode_errors,
    mode_time,
    optimal_time,
    ridge_error,
    train_error,
)
from pantarhei.learning.generalization import (
    test_error as generalization_error,  # pytest would collect it by its own name
)

ALPHAS = np.array([0.05, 0.5, 0.95, 0.9999, 1.0, 1.0001, 1.05, 2.0, 20.0])


def edges(alpha):
    return (np.sqrt(alpha) - 1) ** 2, (np.sqrt(alpha) + 1) ** 2


def slow(alpha, integrand):
    """Integrate over the continuous part by Legendre panels, graded towards the lower edge."""
    low, high = edges(alpha)
    x, w = np.polynomial.legendre.leggauss(200)
    total, ends = 0.0, np.array([0.0, *np.geomspace(1e-4, 1, 9) * np.pi])
    for a, b in itertools.pairwise(ends):
        angle = (b - a) / 2 * x + (a + b) / 2
        rate = low + (high - low) * np.sin(angle / 2) ** 2
        density = ((high - low) / 2 * np.sin(angle)) ** 2 / (2 * np.pi * rate)
        total += ((b - a) / 2 * w * density * integrand(rate)).sum()
    return total


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("t", [0.0, 0.3, 7.0, 300.0, 1e4])
def test_quadrature_is_exact_to_1e_12(alpha, t):
    law = Spectrum.marchenko_pastur(alpha, t)
    test, train = law.test(t), law.train(t)
    left = 1 + slow(alpha, lambda rate: np.expm1(-2 * rate * t))
    fitted = 1 + slow(alpha, lambda rate: np.expm1(-rate * t) ** 2 / rate)
    seen = slow(alpha, lambda rate: rate * np.exp(-2 * rate * t)) / alpha
    lost = 1 + slow(alpha, lambda rate: np.expm1(-2 * rate * t)) / alpha
    assert test.signal == pytest.approx(left, abs=1e-12, rel=1e-12)
    assert test.noise == pytest.approx(fitted, abs=1e-12, rel=1e-12)
    assert train.signal == pytest.approx(seen, abs=1e-12, rel=1e-12)
    assert train.noise == pytest.approx(lost, abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
def test_the_density_has_the_mass_of_the_law(alpha):
    low, high = edges(alpha)
    # l = low + (high - low) sin^2 takes the square-root singularities away
    mass = quad(
        lambda a: (
            marchenko_pastur_density(low + (high - low) * np.sin(a) ** 2, alpha)
            * (high - low)
            * np.sin(2 * a)
        ),
        0,
        np.pi / 2,
        epsabs=1e-12,
    )[0]
    assert mass == pytest.approx(min(1, alpha), abs=1e-9)
    assert not marchenko_pastur_density([low - 1e-9, high + 1e-9], alpha).any()


def test_masses_and_inverse_moments():
    law = Spectrum.marchenko_pastur(ALPHAS, 1e-9)
    np.testing.assert_array_equal(law.mass, np.minimum(1, ALPHAS))
    away, a = ALPHAS != 1, ALPHAS[ALPHAS != 1]
    expected = np.where(a > 1, 1 / (a - 1), a / (1 - a))
    np.testing.assert_allclose(law.inverse[away], expected, rtol=1e-12)
    assert np.isinf(law.inverse[~away]).all()
    wide = Spectrum.marchenko_pastur(np.array([0.3, 3.0]), 1e9)  # nodes that resolve 1/l itself
    np.testing.assert_allclose((wide.weights / wide.eigenvalues).sum(-1), wide.inverse, rtol=1e-12)
    np.testing.assert_allclose(wide.weights.sum(-1), wide.mass, rtol=1e-12)


@pytest.mark.parametrize(("snr", "inr"), [(5.0, 0.0), (0.5, 2.0)])
def test_start_and_end(snr, inr):
    begin = 1 + inr + 1 / snr
    np.testing.assert_allclose(generalization_error(0, ALPHAS, snr, inr), begin, rtol=1e-12)
    np.testing.assert_allclose(train_error(0, ALPHAS, snr, inr), begin, rtol=1e-12)
    a = np.array([1.5, 2.0, 20.0])
    over = a / (a - 1) / snr  # also the ridgeless limit of Hastie et al. for alpha > 1
    np.testing.assert_allclose(generalization_error(np.inf, a, snr, inr), over, rtol=1e-12)
    np.testing.assert_allclose(train_error(np.inf, a, snr, inr), (1 - 1 / a) / snr, rtol=1e-12)
    a = np.array([0.05, 0.5, 0.9])
    under = (1 - a) * (1 + inr) + 1 / (1 - a) / snr
    np.testing.assert_allclose(generalization_error(np.inf, a, snr, inr), under, rtol=1e-12)
    np.testing.assert_allclose(train_error(np.inf, a, snr, inr), 0, atol=1e-12)
    assert np.isinf(generalization_error(np.inf, 1.0, snr, inr))
    # a long finite time is the limit already
    np.testing.assert_allclose(generalization_error(1e6, a, snr, inr), under, rtol=1e-11)


def test_ridgeless_limit_of_ridge_is_the_end_of_training():
    # Hastie, Montanari, Rosset, Tibshirani (2019), isotropic features: gamma = N/P, signal r^2 = 1
    snr, gamma = 4.0, np.array([0.25, 0.5, 2.0, 5.0])
    risk = np.where(gamma < 1, gamma / (1 - gamma) / snr, 1 - 1 / gamma + 1 / (gamma - 1) / snr)
    np.testing.assert_allclose(generalization_error(np.inf, 1 / gamma, snr) - 1 / snr, risk)
    np.testing.assert_allclose(ridge_error(1 / gamma, snr, 0.0) - 1 / snr, risk)
    np.testing.assert_allclose(ridge_error(1 / gamma, snr, 1e-9) - 1 / snr, risk, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_training_error_only_falls(alpha):
    t = np.concatenate([[0], np.geomspace(1e-4, 1e5, 200)])
    assert (np.diff(train_error(t, alpha, 3.0, 0.5)) <= 1e-14).all()


def test_square_root_law_at_p_equal_n():
    t, snr = np.array([100.0, 1000.0, 1e6]), 2.0
    grown = generalization_error(t, 1.0, snr) - 1 / snr
    law = 4 / np.sqrt(np.pi) * (1 - 1 / np.sqrt(2)) * np.sqrt(t) / snr
    assert 4 / np.sqrt(np.pi) * (1 - 1 / np.sqrt(2)) == pytest.approx(0.661, abs=1e-3)
    assert (np.abs(grown / law - 1) <= [0.07, 0.03, 0.001]).all()


# SNR, alpha, t_opt, E_g there, best ridge, E_g at 1e5: the fact sheet's table. Its last digits at
# alpha = 1 are those of a coarser quadrature (the exact best ridge of the second row is the golden
# ratio), so errors are compared to 4e-4.
TABLE = [
    (1, 0.5, 0.697, 1.7836, 1.7808, 2.5),
    (1, 1, 0.681, 1.6243, 1.6178, 209.5),
    (5, 1, 3.067, 0.5673, 0.5580, 41.9),
    (5, 2, 2.394, 0.3541, 0.3483, 0.400),
    (50, 1, 30.22, 0.1553, 0.1515, 4.19),
]


def test_the_sheets_table_of_stopping_times():
    snr, alpha, time, error, ridge, end = np.array(TABLE).T
    found = optimal_time(alpha, snr)
    np.testing.assert_allclose(found, time, rtol=2.5e-4, atol=5e-4)
    np.testing.assert_allclose(generalization_error(found, alpha, snr), error, atol=4e-4)
    np.testing.assert_allclose(ridge_error(alpha, snr), ridge, atol=4e-4)
    np.testing.assert_allclose(generalization_error(1e5, alpha, snr), end, rtol=1.5e-3)
    assert ridge_error(1.0, 1.0) == pytest.approx((1 + np.sqrt(5)) / 2, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.floats(0.05, 20),
    snr=st.floats(0.01, 1000),
    inr=st.floats(0, 5),
    factor=st.floats(0.2, 5),
)
def test_no_time_beats_the_best_and_it_never_beats_ridge(alpha, snr, inr, factor):
    best = optimal_time(alpha, snr, inr)
    there = generalization_error(best, alpha, snr, inr)
    assert there <= generalization_error(best * factor, alpha, snr, inr) * (1 + 1e-12)
    assert there >= ridge_error(alpha, snr) * (1 - 1e-12)
    assert best <= snr * (1 + inr) * (1 + 1e-9)


@settings(max_examples=80, deadline=None)
@given(alpha=st.floats(0.05, 20), snr=st.floats(0.01, 1000), log_t=st.floats(-4, 5))
def test_gradient_flow_risks_at_most_1_69_times_that_of_ridge(alpha, snr, log_t):
    # Ali, Kolter, Tibshirani (2019): flow at t against ridge with penalty 1/t, estimation risk
    t = 10**log_t
    floor = 1 / snr
    risk = generalization_error(t, alpha, snr) - floor
    assert risk <= 1.6862 * (ridge_error(alpha, snr, 1 / t) - floor) * (1 + 1e-9)


def test_ridge_is_best_at_one_over_snr():
    alpha, snr = np.array([0.5, 1.0, 2.0]), 3.0
    step = 1e-5
    above, at, below = (ridge_error(alpha, snr, (1 + d) / snr) for d in (step, 0, -step))
    np.testing.assert_allclose((above - below) / (2 * step), 0, atol=1e-6)  # the derivative
    assert (above + below - 2 * at > 0).all()
    np.testing.assert_array_equal(ridge_error(alpha, snr), ridge_error(alpha, snr, 1 / snr))


def test_one_mode():
    rate, snr, inr = np.array([0.0, 0.2, 3.0]), 7.0, 0.5
    best = mode_time(rate, snr, inr)
    np.testing.assert_allclose(best[1:], np.log1p(rate[1:] * snr * (1 + inr)) / rate[1:])
    total = [sum(mode_errors(best * f, rate, snr, inr)) for f in (0.99, 1.0, 1.01)]
    assert (total[1][1:] < total[0][1:]).all() and (total[1][1:] < total[2][1:]).all()
    np.testing.assert_array_equal(total[0][0], 1 + inr)  # never moves
    law = Spectrum.marchenko_pastur(0.5, 2.0)
    signal, noise = mode_errors(2.0, law.eigenvalues, snr, inr)
    modes = (law.weights * (signal + noise)).sum() + 0.5 * (1 + inr) + 1 / snr
    assert modes == pytest.approx(generalization_error(2.0, 0.5, snr, inr), rel=1e-12)


def test_parts_add_up_and_are_what_they_say():
    t = np.array([0.0, 1.0, 50.0, np.inf])
    parts = decompose(t, 0.5, 4.0, 0.3)
    whole = parts.floor + parts.unlearned + parts.frozen + parts.overfitted
    np.testing.assert_allclose(whole, generalization_error(t, 0.5, 4.0, 0.3), rtol=1e-12)
    assert parts.frozen == pytest.approx(0.5 * 1.3)
    assert parts.floor == 0.25
    assert parts.overfitted[0] == 0 and (np.diff(parts.overfitted) > 0).all()
    np.testing.assert_allclose(parts.unlearned[[0, 3]], [0.5 * 1.3, 0], atol=1e-12)


def test_everything_broadcasts():
    t = np.geomspace(0.1, 10, 3)[:, None, None]
    alpha, snr = np.array([0.5, 1.0])[:, None], np.array([1.0, 5.0, 25.0, 125.0])
    whole = generalization_error(t, alpha, snr, 0.5)
    assert whole.shape == (3, 2, 4)
    assert whole[2, 1, 3] == pytest.approx(generalization_error(10.0, 1.0, 125.0, 0.5), rel=1e-12)
    best = optimal_time(alpha, snr)
    assert best.shape == (2, 4)
    assert best[0, 2] == pytest.approx(optimal_time(0.5, 25.0), rel=1e-9)


def test_without_noise_training_never_stops():
    assert np.isinf(optimal_time(2.0, np.inf))
    assert generalization_error(np.inf, 1.0, np.inf) == 0
    np.testing.assert_allclose(generalization_error(np.inf, 0.5, np.inf, 1.0), 1.0)


def test_long_times_fit_in_memory_and_longer_ones_are_refused():
    assert generalization_error(1e10, 1.0, 1.0) == pytest.approx(0.6609 * 1e5, rel=1e-3)
    with pytest.raises(RequestError, match="quadrature nodes"):
        generalization_error(1e30, 1.0, 1.0)


@pytest.mark.parametrize("shape", [(30, 60), (60, 60), (90, 60)])
def test_eigenvalues_of_data_give_the_exact_average(shape):
    """The mean over teachers, starts and noises is a trace: no simulation is needed."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) / np.sqrt(shape[1])
    snr, inr, t = 3.0, 0.4, np.array([0.5, 20.0])
    law = Spectrum.of(x)
    for k, time in enumerate(t):
        # w(t) is linear in teacher, start and noise: its matrices come from unit vectors
        kept = flow(x, np.zeros((shape[0], shape[1])), [time], np.eye(shape[1]))[0]
        learnt = flow(x, np.eye(shape[0]), [time])[0]
        bias = (kept**2).sum() / shape[1]
        test = (1 + inr) * bias + (learnt**2).sum() / shape[1] / snr + 1 / snr
        residual = (x @ kept, x @ learnt - np.eye(shape[0]))
        train = ((1 + inr) * (residual[0] ** 2).sum() + (residual[1] ** 2).sum() / snr) / shape[0]
        assert generalization_error(t, law, snr, inr)[k] == pytest.approx(test, rel=1e-9)
        assert train_error(t, law, snr, inr)[k] == pytest.approx(train, rel=1e-9)


def test_spectra_of_many_data_sets_at_once():
    x = np.random.default_rng(1).normal(size=(4, 10, 20))
    x[2, 5:] = 0  # half of one has no data
    law = Spectrum.of(x)
    np.testing.assert_allclose(law.mass, [0.5, 0.5, 0.25, 0.5])
    for i in range(4):
        alone = generalization_error(0.3, Spectrum.of(x[i]), 2.0)
        assert generalization_error(0.3, law, 2.0)[i] == pytest.approx(alone, rel=1e-12)


def test_large_random_inputs_follow_the_law():
    x = np.random.default_rng(2).normal(size=(1600, 800)) / np.sqrt(800)
    t = np.array([0.3, 1.0, 5.0])
    np.testing.assert_allclose(
        generalization_error(t, Spectrum.of(x), 5.0), generalization_error(t, 2.0, 5.0), rtol=5e-3
    )


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("shape", [(20, 40), (60, 40)])
def test_any_covariance_and_teacher_against_dense_algebra(shape, teacher):
    rng = np.random.default_rng(3)
    root = rng.normal(size=(40, 40)) * np.geomspace(1, 0.05, 40)
    covariance = root @ root.T / 40
    x = rng.multivariate_normal(np.zeros(40), covariance, size=shape[0])
    weights = rng.normal(size=40) if teacher else None
    law = FixedInputs(x, covariance, weights)
    snr, inr, t = 4.0, 0.2, 1.7
    kept = flow(x, np.zeros((shape[0], 40)), [t], np.eye(40))[0]
    learnt = flow(x, np.eye(shape[0]), [t])[0]
    start = np.trace(kept.T @ covariance @ kept)
    signal = start
    if teacher:
        left = kept @ weights / np.sqrt((weights**2).mean())
        signal = left @ covariance @ left
    noise = 1 + np.trace(learnt.T @ covariance @ learnt)
    expected = signal + inr * start + noise / snr
    assert generalization_error(t, law, snr, inr) == pytest.approx(expected, rel=1e-9)
    penalty = 0.3
    ridge = np.linalg.solve(x.T @ x + penalty * np.eye(40), x.T)
    bias = np.eye(40) - ridge @ x
    if teacher:
        left = bias @ weights / np.sqrt((weights**2).mean())
        signal = left @ covariance @ left
    else:
        signal = np.trace(bias.T @ covariance @ bias)
    expected = signal + (1 + np.trace(ridge.T @ covariance @ ridge)) / snr
    assert ridge_error(law, snr, penalty) == pytest.approx(expected, rel=1e-9)
    # the slope is the derivative, and the best time its root
    near = [generalization_error(t + d, law, snr, inr) for d in (-1e-5, 1e-5)]
    assert law.slope(t).total(snr, inr) == pytest.approx((near[1] - near[0]) / 2e-5, rel=1e-6)
    best = optimal_time(law, snr, inr)
    errors = generalization_error(np.geomspace(best / 30, best * 30, 400), law, snr, inr)
    assert generalization_error(best, law, snr, inr) <= errors.min()


def test_shrunk_covariance_is_the_matrix_it_says():
    x = np.random.default_rng(4).normal(size=(15, 30))
    moment = x.T @ x / 15
    shrunk = 0.7 * moment + 0.3 * np.trace(moment) / 30 * np.eye(30)
    t, teacher = [0.01, 0.2], np.arange(1.0, 31)
    for w in (None, teacher):
        for short, long in zip(
            FixedInputs(x, 0.3, w).test(t), FixedInputs(x, shrunk, w).test(t), strict=True
        ):
            np.testing.assert_allclose(short, long, rtol=1e-9)
    np.testing.assert_allclose(FixedInputs(x, teacher=teacher).train(0.0).noise, 1.0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: generalization_error(1.0, 0.0, 1.0), "alpha must be positive"),
        (lambda: generalization_error(1.0, 1.0, 0.0), "snr must be positive"),
        (lambda: generalization_error(-1.0, 1.0, 1.0), "t must not be negative"),
        (lambda: generalization_error(np.nan, 1.0, 1.0), "NaN"),
        (lambda: generalization_error(1.0, 1.0, 1.0, -1.0), "inr must not be negative"),
        (lambda: generalization_error(1.0, "one", 1.0), "must be a number"),
        (lambda: Spectrum.of([1.0, 2.0]), "give a matrix"),
        (lambda: FixedInputs(np.zeros((3, 2))), "all zero"),
        (lambda: FixedInputs(np.eye(3), np.eye(2)), "need \\(3, 3\\)"),
        (lambda: FixedInputs(np.eye(2), [[1, 2], [3, 4]]), "not symmetric"),
        (lambda: FixedInputs(np.eye(2), 1.5), "between 0 and 1"),
        (lambda: FixedInputs(np.eye(2), None, [1.0]), "2 finite weights"),
        (lambda: FixedInputs([[np.inf, 1.0]]), "not finite"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
