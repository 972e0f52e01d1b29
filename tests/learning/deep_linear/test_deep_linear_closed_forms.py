"""Closed forms against the differential equations they solve, limits, inverses and pitfalls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.special import lambertw

from pantarhei.errors import RequestError
from pantarhei.learning import deep_linear as dl
from pantarhei.learning.deep_linear import closed_forms

S = np.array([3.0, 1.0, 0.3])
T = np.linspace(0, 6, 25)


def integrated(derivative, start, times, **options):
    """The slow obvious computation: the equation as it stands, in its own variables."""
    done = solve_ivp(
        derivative, (0, times[-1]), np.atleast_1d(start), "LSODA", times, rtol=1e-11, atol=1e-13
    )
    assert done.success
    return done.y


def two_layers(s, tau):
    def derivative(_, y):
        a, b = y
        return [b * (s - a * b) / tau, a * (s - a * b) / tau]

    return derivative


@pytest.mark.parametrize("u0", [1e-3, 0.2, 5.0])
def test_logistic_solves_its_equation(u0):
    u = dl.logistic(T, S, u0, tau=1.7)
    assert u.shape == (25, 3)
    for k, s in enumerate(S):
        true = integrated(lambda _, y, s=s: 2 * y * (s - y) / 1.7, u0, T)[0]
        np.testing.assert_allclose(u[:, k], true, rtol=1e-6)


@pytest.mark.parametrize(
    ("a0", "b0"),
    [(0.5, 0.1), (0.1, 0.5), (0.5, -0.1), (-0.5, 0.1), (-0.4, -0.3), (1e-3, -5e-3), (2.0, 2.5),
     (0.3, 0.0), (0.0, -0.3)],
)  # fmt: skip
def test_hyperbolic_solves_its_equations_for_any_signs(a0, b0):
    a, b = dl.hyperbolic_layers(T, S, a0, b0, tau=1.3)
    for k, s in enumerate(S):
        true = integrated(two_layers(s, 1.3), [a0, b0], T)
        np.testing.assert_allclose(a[:, k], true[0], atol=1e-6)
        np.testing.assert_allclose(b[:, k], true[1], atol=1e-6)
    np.testing.assert_allclose(a**2 - b**2, a0**2 - b0**2, atol=1e-12)
    np.testing.assert_allclose(dl.hyperbolic(T, S, a0, b0, 1.3), a * b)


@pytest.mark.parametrize(("a0", "b0"), [(0.5, 0.1), (0.5, -0.1), (2.0, 0.3)])
def test_hyperbolic_is_the_papers_parametrisation(a0, b0):
    """The fact sheet's formula in x = tanh(theta/2), literally, where it does not overflow."""
    s, tau = 1.2, 0.8
    c0, x0, t = a0**2 - b0**2, b0 / a0, np.linspace(0, 3, 10)
    d = np.sqrt(c0**2 + 4 * s**2)
    r = (d + c0 + 2 * s * x0) / (d - c0 - 2 * s * x0) * np.exp(d * t / tau)
    x = ((d - c0) * r - (d + c0)) / (2 * s * (1 + r))
    u = c0 / 2 * np.sinh(2 * np.arctanh(x))
    np.testing.assert_allclose(dl.hyperbolic(t, s, a0, b0, tau), u, atol=1e-9)
    ends = np.array([x0, x[4]])
    logs = np.log((d + c0 + 2 * s * ends) / (d - c0 - 2 * s * ends))
    time = tau / d * (logs[1] - logs[0])
    assert dl.hyperbolic_time(u[4], s, a0, b0, tau) == pytest.approx(time, rel=1e-9)


def test_hyperbolic_goes_to_logistic_as_the_layers_become_equal():
    gaps = []
    for c0 in (1e-2, 1e-4, 1e-8):
        a0, b0 = np.sqrt(0.01 + c0), 0.1
        gaps.append(np.abs(dl.hyperbolic(T, S, a0, b0) - dl.logistic(T, S, a0 * b0)).max())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-7
    np.testing.assert_allclose(dl.hyperbolic(T, S, 0.1, 0.1), dl.logistic(T, S, 0.01), rtol=1e-12)
    np.testing.assert_allclose(dl.hyperbolic(T, S, 0.1, -0.1), dl.logistic(T, S, -0.01), rtol=1e-12)


strength = st.floats(0.05, 5)


@settings(max_examples=60, deadline=None)
@given(s=strength, a0=st.floats(-2, 2), b0=st.floats(-2, 2), t=st.floats(0.01, 3))
def test_times_invert_curves(s, a0, b0, t):
    if abs(a0 + b0) < 1e-3:
        return
    u = dl.hyperbolic(t, s, a0, b0)
    if abs(u - s) > 1e-6 * s:  # at the limit the time is no longer in the strength
        assert dl.hyperbolic_time(u, s, a0, b0) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("u0", [1e-4, 0.5, 4.0])
def test_times_invert_curves_at_any_depth(n, u0):
    t = np.array([0.0, 0.2, 0.7])
    u = dl.depth_curve(t, S, u0, n)
    keep = np.abs(u - S) > 1e-5 * S
    back = dl.depth_time(u, S, u0, n)
    np.testing.assert_allclose(back[keep], np.broadcast_to(t[:, None], u.shape)[keep], atol=1e-6)


@pytest.mark.parametrize("n", [3, 4, 10, 40])
@pytest.mark.parametrize("u0", [1e-3, 0.3, 4.0])
def test_depth_curve_solves_its_equation(n, u0):
    t = np.linspace(0, float(np.max(dl.depth_time(0.9 * S, S, 1e-3, n))), 20)
    u = dl.depth_curve(t, S, u0, n, tau=1.0)
    for k, s in enumerate(S):
        true = integrated(lambda _, y, s=s: n * y ** (2 - 2 / n) * (s - y), u0, t)[0]
        np.testing.assert_allclose(u[:, k], true, atol=1e-6)


def test_depth_times_are_the_integral():
    for n, u0, u in ((3, 0.01, 0.7), (10, 0.3, 0.95), (6, 3.0, 1.2)):
        integral = quad(lambda v, n=n: 1 / (n * v ** (2 - 2 / n) * (1 - v)), u0, u, epsabs=1e-13)[0]
        assert dl.depth_time(u, 1.0, u0, n) == pytest.approx(integral, rel=1e-9)


def test_one_and_two_layers_are_special_cases_of_depth():
    t = np.linspace(0, 4, 9)
    one, two = S + (0.1 - S) * np.exp(-t[:, None]), dl.logistic(t, S, 0.1)
    np.testing.assert_allclose(dl.depth_curve(t, S, 0.1, 1), one, rtol=1e-12)
    np.testing.assert_allclose(dl.depth_curve(t, S, 0.1, 2), two, rtol=1e-12)
    modes = np.broadcast_arrays(S, 0.1)
    for n, special in ((1 + 1e-9, one), (2.0, two)):  # the general equation, which n = 3 has too
        general = closed_forms._power_curve(t[:, None], *modes, n, 2 - 2 / n)
        np.testing.assert_allclose(general, special, rtol=1e-7)
        times = closed_forms._power_time(0.9 * S, *modes, n, 2 - 2 / n)
        np.testing.assert_allclose(times, dl.depth_time(0.9 * S, S, 0.1, round(n)), rtol=1e-7)


def test_infinite_depth_against_a_thousand_layers():
    limit = dl.infinite_depth_time(2.9, 3.0, 0.5, 1000)
    finite = dl.depth_time(2.9, 3.0, 0.5, 999)
    assert limit == pytest.approx(1.1046e-3, rel=2e-4)
    assert finite == pytest.approx(1.1064e-3, rel=2e-4)
    errors = [
        abs(dl.depth_time(2.9, 3.0, 0.5, n) * (n + 1) - 1000 * limit) for n in (99, 999, 9999)
    ]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]
    t = np.array([0.0, 0.2, 0.5])
    u = dl.infinite_depth_curve(t, S, 0.1, 5)
    np.testing.assert_allclose(
        dl.infinite_depth_time(u, S, 0.1, 5), t[:, None] * np.ones(3), atol=1e-7
    )


def test_infinite_depth_from_above_is_lambert():
    # du/dt = u^2 (s - u): with w = s/u - 1, w + log w = -s^2 t + const
    s, u0, t = 1.0, 2.0, np.array([0.3, 1.0])
    w0 = s / u0 - 1
    w = lambertw(w0 * np.exp(w0) * np.exp(-(s**2) * t)).real
    np.testing.assert_allclose(dl.infinite_depth_curve(t, s, u0, 1), s / (1 + w), rtol=1e-9)


def test_escape_takes_one_over_strength():
    for s in (0.5, 2.0):
        times = dl.logistic_time(s - 1e-8, s, 1e-8)
        assert times == pytest.approx(np.log(s / 1e-8) / s, rel=1e-7)


def test_chain_of_unequal_layers():
    a0 = np.array([[0.9, -0.4], [0.5, 0.8], [0.7, -0.3]])
    u = dl.chain(T, [1.5, 0.8], a0, tau=2.0)
    for k, s in enumerate((1.5, 0.8)):

        def derivative(_, a, s=s):
            return (s - a.prod()) / 2.0 * np.array([a[1] * a[2], a[0] * a[2], a[0] * a[1]])

        true = integrated(derivative, a0[:, k], T).prod(0)
        np.testing.assert_allclose(u[:, k], true, atol=1e-6)
    equal = dl.chain(T, S, np.full((4, 1), 0.6))
    np.testing.assert_allclose(equal, dl.depth_curve(T, S, 0.6**4, 4), atol=1e-8)
    np.testing.assert_allclose(
        dl.chain(T, S, np.array([[0.5], [-0.1]])), dl.hyperbolic(T, S, 0.5, -0.1)
    )


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("u", [0.2, 1.5])
def test_hessian_eigenvalues_are_those_of_autograd(n, u):
    s = 1.5
    a = torch.full((n,), u ** (1 / n), dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda a: (s - a.prod()) ** 2 / 2, a)
    common, other = dl.hessian_eigenvalues(n, s, u)
    expected = np.sort([common, *[other] * (n - 1)])
    np.testing.assert_allclose(torch.linalg.eigvalsh(hessian).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_best_rate_is_one_over_the_largest_curvature_on_the_path(n):
    s = 1.7
    path = np.linspace(0.01, s, 2000)
    largest = np.maximum(*dl.hessian_eigenvalues(n, s, path))
    assert dl.best_rate(n, s) == pytest.approx(1 / largest.max(), rel=1e-9)
    assert largest.argmax() == 1999  # at the solution


@pytest.mark.parametrize("n", [2, 4, 9])
def test_descent_settles_below_the_stability_bound_and_not_above(n):
    def end(rate):
        a = np.full(n, (0.99 * 1.3) ** (1 / n))
        for _ in range(3000):
            a = a + rate * (1.3 - a.prod()) * a[0] ** (n - 1)
        return abs(a.prod() - 1.3)

    bound = dl.stability_bound(n, 1.3)
    assert end(0.97 * bound) < 1e-6
    assert end(1.03 * bound) > 1e-2


def test_nothing_overflows_and_plateaus_end_where_they_should():
    t = np.array([0.0, 1e3, 1e6, 1e300])
    for u0 in (1e-300, 1e-12, 1.0, 1e6):
        u = dl.logistic(t, [1e3, 1.0, 1e-3], u0)
        assert np.isfinite(u).all()
        np.testing.assert_allclose(u[-1], [1e3, 1.0, 1e-3])
        root = np.sqrt(u0)
        np.testing.assert_allclose(dl.hyperbolic(t, [1e3, 1.0, 1e-3], root, root), u, rtol=1e-9)
    # artanh(x -> 1): equal layers to the last digit
    u = dl.hyperbolic(t[:3], 1.0, 1e-8 * (1 + 1e-15), 1e-8)
    assert np.isfinite(u).all() and u[1] == pytest.approx(1.0)
    assert dl.logistic_time(0.5, 1.0, 1e-300) == pytest.approx(150 * np.log(10), rel=1e-9)


def test_modes_without_strength_decay_and_never_learn():
    np.testing.assert_allclose(dl.logistic(2.0, 0.0, 0.5), 0.5 / (1 + 2 * 0.5 * 2))
    assert dl.logistic_time(0.5 / 3, 0.0, 0.5) == pytest.approx(2.0)
    for n in (3, 5):
        p = 2 - 2 / n
        u = dl.depth_curve(2.0, 0.0, 0.5, n)
        assert u == pytest.approx((0.5**-p + n * p * 2) ** (-1 / p))
        assert dl.depth_time(u, 0.0, 0.5, n) == pytest.approx(2.0)
        assert dl.depth_curve(5.0, 2.0, 0.0, n) == 0.0
        assert dl.depth_curve(5.0, 2.0, 2.0, n) == 2.0
    assert dl.logistic(5.0, 2.0, 0.0) == 0.0


def test_what_is_never_reached_takes_for_ever_and_what_is_past_was_before():
    assert dl.logistic_time(2.0, 1.0, 0.1) == np.inf
    assert dl.logistic_time(0.05, 1.0, 0.1) < 0
    assert dl.logistic_time(0.1, 1.0, 0.1) == 0
    assert dl.logistic_time(0.5, 1.0, -0.1) == np.inf  # a = -b never turns
    assert dl.hyperbolic_time(0.5, 1.0, 0.2, -0.1) > 0  # a != -b does
    assert dl.depth_time(1.0, 1.0, 0.1, 5) == np.inf
    assert dl.depth_time(0.1, 1.0, 0.1, 5) == 0
    assert dl.depth_time(0.01, 1.0, 0.1, 5) < 0
    assert dl.infinite_depth_time(1.5, 1.0, 0.1, 5) == np.inf


def test_negative_singular_values_only_turn_the_sign():
    a, b = dl.hyperbolic_layers(T, S, 0.5, 0.2)
    c, d = dl.hyperbolic_layers(T, -S, 0.5, -0.2)
    np.testing.assert_allclose(a, c, atol=1e-12)
    np.testing.assert_allclose(b, -d, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: dl.depth_curve(1.0, 1.0, -0.1, 3), "s >= 0 and u0 >= 0"),
        (lambda: dl.depth_time(0.5, -1.0, 0.1, 4), "s >= 0 and u0 >= 0"),
        (lambda: dl.depth_curve(1.0, 1.0, 0.1, 0), "1 or more weight matrices"),
        (lambda: dl.depth_curve([-1.0], 1.0, 0.1, 3), "below 0"),
    ],
)
def test_bad_requests(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()


def test_depth_costs_a_finite_delay_at_the_best_rate_unless_layers_start_alike():
    def steps(n, s, u0):
        return float(dl.depth_time(0.99 * s, s, u0, n, 1 / dl.best_rate(n, s)))

    s = 1.5
    deep = [steps(n, s, 1e-3) for n in (2, 10, 100, 1000, 10_000)]
    assert deep == sorted(deep)
    limit = float(dl.infinite_depth_time(0.99 * s, s, 1e-3, 1, s**2))
    assert deep[-1] == pytest.approx(limit, rel=0.01) and deep[3] == pytest.approx(limit, rel=0.05)
    # the delay is of the order s / eps
    delays = [steps(10**5, s, eps) - steps(2, s, eps) for eps in (1e-2, 1e-3)]
    assert delays[1] / delays[0] == pytest.approx(10, rel=0.15)
    # the same strength a0 < 1 in every layer, not the same end-to-end strength: explodes
    alike = [steps(n, s, 0.8**n) for n in (5, 20, 40)]
    assert alike[1] > 10 * alike[0] and alike[2] > 10 * alike[1]
