r"""The strength of one mode over time, in closed form wherever one exists.

A deep linear network with n weight matrices that starts decoupled learns every singular mode of the
input-output correlation by itself. With the strengths :math:`a_1, \ldots, a_n` that the layers give
to a mode, :math:`u = \prod_l a_l` their product and s the singular value, gradient flow on
:math:`\tfrac12 (s - u)^2` is

.. math:: \tau\, \dot a_l = (s - u) \prod_{j \ne l} a_j .

Equations are those of "Exact solutions to the nonlinear dynamics of learning in deep linear neural
networks" (arXiv 1312.6120). Layers are counted as **weight matrices**, n; the paper also counts
layers of neurons, which are n + 1. Time has the unit of tau; see
:meth:`~pantarhei.learning.deep_linear.correlations.Correlations.tau` for tau in steps of descent.

Shapes: strengths (``s``, ``u0``, ``a0``, ``b0``, ``tau``) broadcast against each other to the shape
of the modes; a curve over times ``t`` has shape ``t.shape + modes``. Everything is float64, and for
every curve there is its inverse: the time at which a strength is reached, negative where it lies
before the start and infinite where it is never reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.special import expit, exprel

from pantarhei.errors import RequestError

Array = NDArray[np.float64]

_TINY = 1e-150  # its square is still a normal number


def logistic(t: ArrayLike, s: ArrayLike, u0: ArrayLike, tau: ArrayLike = 1.0) -> Array:
    r"""Return u(t) of two layers that start with equal strengths, a = b (or a = -b for u0 < 0).

    .. math:: \tau \dot u = 2 |u| (s - u), \qquad
              u(t) = \frac{s}{1 + (s/u_0 - 1)\, e^{-2st/\tau}} \quad (u_0 > 0),

    written so that nothing overflows and s = 0 is no exception. A negative start approaches 0 and
    never passes it: a = -b is the one start from which the mode is not learned.

    >>> logistic([0.0, 1.0, 1000.0], [2.0, 1.0], 1e-3).round(4).tolist()
    [[0.001, 0.001], [0.0532, 0.0073], [2.0, 1.0]]
    """
    t, (s, u0, tau) = _outer(t, s, u0, tau)
    x = -np.sign(u0) * 2 * s * t / tau
    with np.errstate(over="ignore"):
        return u0 / (np.exp(x) + np.abs(u0) * (2 * t / tau) * exprel(x))


def logistic_time(u: ArrayLike, s: ArrayLike, u0: ArrayLike, tau: ArrayLike = 1.0) -> Array:
    r"""Return the time at which :func:`logistic` reaches ``u``.

    .. math:: t = \frac{\tau}{2s} \ln \frac{u (s - u_0)}{u_0 (s - u)}

    From u0 = eps to s - eps it is (tau/s) ln(s/eps) to leading order: strong modes first.

    >>> float(logistic_time(1.0, 2.0, 1e-3).round(4)), float(logistic_time(2.5, 2.0, 1e-3))
    (1.9001, inf)
    """
    u, s, u0, tau = _broadcast(u, s, u0, tau)
    root = np.sqrt(np.abs(u0))
    return hyperbolic_time(u, s, root, np.sign(u0) * root, tau)


def hyperbolic_layers(
    t: ArrayLike, s: ArrayLike, a0: ArrayLike, b0: ArrayLike, tau: ArrayLike = 1.0
) -> tuple[Array, Array]:
    r"""Return a(t), b(t) of two layers with any initial strengths, of any signs.

    :math:`c_0 = a^2 - b^2` is conserved. The paper parametrises the hyperbola,
    :math:`u = (c_0/2) \sinh\theta`, :math:`\tau\dot\theta = 2s - c_0 \sinh\theta`. The same
    solution without its cases: :math:`P = (a+b)^2` and :math:`M = (a-b)^2` obey

    .. math:: 2\tau\dot P = -(P - P_+)(P - P_-), \quad P_\pm = 2s \pm D, \quad
              D = \sqrt{4s^2 + c_0^2},

    and the same with -s for M; a + b and a - b keep their signs. With e = exp(-Dt/tau) all terms
    of

    .. math:: P = \frac{P_0 (P_+ + |P_-| e) + c_0^2 (1 - e)}{P_0 (1 - e) + |P_-| + P_+ e}

    are positive, so that neither cancellation nor overflow occurs.

    >>> a, b = hyperbolic_layers([0.0, 100.0], 2.0, 0.5, -0.1)
    >>> a.round(3).tolist(), b.round(3).tolist(), (a * b).round(3).tolist()
    ([0.5, 1.457], [-0.1, 1.372], [-0.05, 2.0])
    """
    t, (s, a0, b0, tau) = _outer(t, s, a0, b0, tau)
    p0, m0 = a0 + b0, a0 - b0
    c0 = p0 * m0
    rate, plus, minus = _fixed_points(s, c0)
    e, one_less_e = np.exp(-rate * t / tau), -np.expm1(-rate * t / tau)

    def square(start: Array, up: Array, down: Array) -> Array:
        top = start * (up + down * e) + c0**2 * one_less_e
        return top / np.maximum(start * one_less_e + down + up * e, np.finfo(float).tiny)

    p = np.sign(p0) * np.sqrt(square(p0**2, plus, minus))
    m = np.sign(m0) * np.sqrt(square(m0**2, minus, plus))
    return (p + m) / 2, (p - m) / 2


def hyperbolic(
    t: ArrayLike, s: ArrayLike, a0: ArrayLike, b0: ArrayLike, tau: ArrayLike = 1.0
) -> Array:
    """Return u(t) = a(t) b(t) of two layers with any initial strengths; ``hyperbolic_layers``.

    >>> float(hyperbolic(1.0, 2.0, 0.1, 0.1) - logistic(1.0, 2.0, 0.01)) < 1e-15
    True
    """
    a, b = hyperbolic_layers(t, s, a0, b0, tau)
    return a * b


def hyperbolic_time(
    u: ArrayLike, s: ArrayLike, a0: ArrayLike, b0: ArrayLike, tau: ArrayLike = 1.0
) -> Array:
    r"""Return the time at which :func:`hyperbolic` reaches ``u``.

    .. math:: t = \frac{\tau}{D} \ln \frac{(P - P_-)(P_+ - P_0)}{(P_+ - P)(P_0 - P_-)}, \qquad
              P = 2u + \sqrt{4u^2 + c_0^2}

    Infinite where ``u`` lies beyond the limit s or where the start is a = -b.

    >>> float(hyperbolic_time(hyperbolic(0.7, 2.0, 0.5, -0.1), 2.0, 0.5, -0.1).round(12))
    0.7
    """
    u, s, a0, b0, tau = _broadcast(u, s, a0, b0, tau)
    p0, m0 = a0 + b0, a0 - b0
    c0 = p0 * m0
    rate, plus, minus = _fixed_points(s, c0)
    # P and M determine each other unless one of them is 0; the larger at the start is exact.
    forwards = np.abs(p0) >= np.abs(m0)
    square = _larger_root(np.where(forwards, u, -u), c0)
    start = np.where(forwards, p0, m0) ** 2
    up, down = np.where(forwards, plus, minus), np.where(forwards, minus, plus)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (square + down) / (start + down) * ((up - start) / (up - square))
        time = tau / rate * np.log(ratio)
        # s = 0 = c0: the two fixed points meet, and P obeys 2 tau dP/dt = -P^2
        flat = tau * 2 * (1 / square - 1 / start)
    time = np.where(rate <= _TINY, flat, time)
    time = np.where(square == start, 0.0, time)
    return np.where(np.isnan(time), np.inf, time)


def depth_curve(t: ArrayLike, s: ArrayLike, u0: ArrayLike, n: int, tau: ArrayLike = 1.0) -> Array:
    r"""Return u(t) of n layers of equal initial strength, :math:`a_l = u_0^{1/n}`.

    .. math:: \tau \dot u = n\, u^{2 - 2/n} (s - u)

    n = 1 and n = 2 (:func:`logistic`) are closed forms. Deeper networks are integrated in
    :math:`y = \ln\frac{u}{|s-u|}`, where :math:`\dot y = \kappa\,(u/s)^{1-2/n}` with
    :math:`\kappa = n s^{2-2/n}/\tau` is bounded: neither the plateau nor the approach to s is
    stiff. Errors: s < 0 or, for n > 2, u0 < 0.

    >>> depth_curve([0.0, 5.0], [3.0, 1.0], 0.5, 4).round(4).tolist()
    [[0.5, 0.5], [3.0, 1.0]]
    """
    _check_depth(n)
    if n == 2:
        return logistic(t, s, u0, tau)
    t, (s, u0, tau) = _outer(t, s, u0, tau)
    if n == 1:
        return s + (u0 - s) * np.exp(-t / tau)
    return _power_curve(t, s, u0, n / tau, 2 - 2 / n)


def depth_time(u: ArrayLike, s: ArrayLike, u0: ArrayLike, n: int, tau: ArrayLike = 1.0) -> Array:
    r"""Return the time at which :func:`depth_curve` reaches ``u``, by quadrature.

    .. math:: t = \int_{u_0}^{u} \frac{\tau\,du}{n\,u^{2-2/n}(s-u)}

    n = 1 and n = 2 are closed forms.

    >>> t = depth_time([1.0, 2.9, 3.0], 3.0, 0.5, 5)
    >>> t.round(6).tolist(), depth_curve(t[:2], 3.0, 0.5, 5).round(8).tolist()
    ([0.075176, 0.250444, inf], [1.0, 2.9])
    """
    _check_depth(n)
    if n == 2:
        return logistic_time(u, s, u0, tau)
    u, s, u0, tau = _broadcast(u, s, u0, tau)
    if n == 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            time = tau * np.log((s - u0) / (s - u))
        return np.where(u == u0, 0.0, np.where(np.isnan(time), np.inf, time))
    return _power_time(u, s, u0, n / tau, 2 - 2 / n)


def infinite_depth_curve(
    t: ArrayLike, s: ArrayLike, u0: ArrayLike, layers: int, tau: ArrayLike = 1.0
) -> Array:
    r"""Return u(t) in the limit of many layers, :math:`\tau\dot u = N_l u^2 (s-u)`.

    ``layers`` is N_l, layers of *neurons* as the paper counts: weight matrices + 1.
    """
    t, (s, u0, tau) = _outer(t, s, u0, tau)
    return _power_curve(t, s, u0, layers / tau, 2.0)


def infinite_depth_time(
    u: ArrayLike, s: ArrayLike, u0: ArrayLike, layers: int, tau: ArrayLike = 1.0
) -> Array:
    r"""Return the time to reach ``u`` in the limit of many layers.

    .. math:: t = \frac{\tau}{N_l}\Bigl\{\frac1{s^2}\ln\frac{u(u_0-s)}{u_0(u-s)}
                  + \frac1{s u_0} - \frac1{s u}\Bigr\}

    ``layers`` is N_l, layers of *neurons* as the paper counts: weight matrices + 1. The best
    learning rate falls as 1/N_l, so in steps the time is finite however deep the network is.

    >>> float(infinite_depth_time(2.9, 3.0, 0.5, 1000).round(7))
    0.0011047
    """
    u, s, u0, tau = _broadcast(u, s, u0, tau)
    _check_powers(s, u0)
    with np.errstate(divide="ignore", invalid="ignore"):
        time = (np.log(u / u0 * ((u0 - s) / (u - s))) / s + 1 / u0 - 1 / u) / s
        flat = (u0**-2 - u**-2) / 2  # s = 0: du/dt = -u^3
    time = tau / layers * np.where(s == 0, flat, time)
    return np.where(u == u0, 0.0, np.where(np.isnan(time), np.inf, time))


def chain(t: ArrayLike, s: ArrayLike, a0: ArrayLike, tau: ArrayLike = 1.0) -> Array:
    r"""Return u(t) of a decoupled network of any depth whose layers start unequal.

    ``a0`` is (n,) + modes: the strength of each layer in each mode, of any sign. Integrates
    :math:`\tau\dot a_l = (s-u)\prod_{j\ne l} a_j` to a relative 1e-11; two layers have the closed
    form :func:`hyperbolic`. The differences :math:`a_l^2 - a_j^2` are conserved.

    >>> chain([0.0, 2.0], 1.5, [0.9, 0.5, 0.7]).round(4).tolist()
    [0.315, 1.4997]
    """
    a0 = np.asarray(a0, dtype=np.float64)
    if len(a0) == 1:
        return depth_curve(t, s, a0[0], 1, tau)
    if len(a0) == 2:
        return hyperbolic(t, s, a0[0], a0[1], tau)
    s, tau, _ = _broadcast(s, tau, a0[0])
    a0 = np.broadcast_to(a0, (len(a0), *s.shape))
    t = np.asarray(t, dtype=np.float64)

    def derivative(_: float, flat: Array) -> Array:
        a = flat.reshape(a0.shape)
        others = np.ones_like(a)  # products of the strengths before and after, without dividing
        others[1:] = np.cumprod(a[:-1], 0)
        others[:-1] *= np.cumprod(a[:0:-1], 0)[::-1]
        return ((s - a[0] * others[0]) / tau * others).ravel()

    out = _integrate(derivative, a0.ravel(), t)
    return out.reshape(t.shape + a0.shape).prod(t.ndim)


def best_rate(n: ArrayLike, s: ArrayLike) -> Array:
    r"""Return the learning rate :math:`1/(n s^{2-2/n})`: 1 over the largest curvature on the path.

    Of gradient descent on :math:`\tfrac12(s - \prod_l a_l)^2` with equal :math:`a_l`; s is the
    strongest mode. It falls as 1/n.

    >>> best_rate([1, 2, 10], 2.0).round(4).tolist()
    [1.0, 0.25, 0.0287]
    """
    n, s = _broadcast(n, s)
    return 1 / (n * s ** (2 - 2 / n))


def stability_bound(n: ArrayLike, s: ArrayLike) -> Array:
    r"""Return the rate :math:`2/(n s^{2-2/n})` at and above which descent does not settle at s."""
    return 2 * best_rate(n, s)


def hessian_eigenvalues(n: int, s: ArrayLike, u: ArrayLike) -> tuple[Array, Array]:
    r"""Return the curvatures of :math:`\tfrac12(s - \prod_l a_l)^2` at n equal strengths.

    :math:`n a^{2n-2} - (n-1)(s-u) a^{n-2}` in the direction common to all layers, and
    :math:`(s-u) a^{n-2}` in the n - 1 others; :math:`a = u^{1/n}`.

    >>> [float(x) for x in hessian_eigenvalues(3, 1.0, 1.0)]
    [3.0, 0.0]
    """
    s, u = _broadcast(s, u)
    a = u ** (1 / n)
    other = (s - u) * a ** (n - 2)
    return n * a ** (2 * n - 2) - (n - 1) * other, other


def _outer(t: ArrayLike, *strengths: ArrayLike) -> tuple[Array, tuple[Array, ...]]:
    """Return times with an axis for every axis of the broadcast strengths, and those."""
    modes = _broadcast(*strengths)
    t = np.asarray(t, dtype=np.float64)
    return t.reshape(t.shape + (1,) * modes[0].ndim), modes


def _broadcast(*arrays: ArrayLike) -> tuple[Array, ...]:
    return tuple(np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in arrays)))


def _fixed_points(s: Array, c0: Array) -> tuple[Array, Array, Array]:
    """Return D and the sizes of the two roots 2s + D and 2s - D."""
    rate = np.maximum(np.hypot(2 * s, c0), _TINY)
    large = rate + 2 * np.abs(s)
    small = np.where(np.abs(c0) < np.abs(2 * s), c0**2 / large, rate - 2 * np.abs(s))
    return rate, np.where(s >= 0, large, small), np.where(s >= 0, small, large)


def _larger_root(u: Array, c0: Array) -> Array:
    """Return 2u + sqrt(4u^2 + c0^2) without cancellation."""
    root = np.hypot(2 * u, c0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(u >= 0, 2 * u + root, np.where(c0 == 0, 0.0, c0**2 / (root - 2 * u)))


def _check_depth(n: int) -> None:
    if n != int(n) or n < 1:
        raise RequestError(f"A network has 1 or more weight matrices, not n={n}: give an integer.")


def _check_powers(s: Array, u0: Array) -> None:
    if (s < 0).any() or (u0 < 0).any():
        raise RequestError(
            "Equal strengths of more than two layers need s >= 0 and u0 >= 0: turn the sign of the "
            "mode's left singular vector, or give the layers' own strengths to chain()."
        )


def _power_curve(t: Array, s: Array, u0: Array, rate: Array, power: float) -> Array:
    r"""Solve :math:`\dot u = rate\,u^{power}(s-u)`; ``t`` has the modes' axes appended."""
    _check_powers(s, u0)
    rate = np.broadcast_to(rate, s.shape)
    out = np.broadcast_to(u0, t.shape[: t.ndim - s.ndim] + s.shape).copy()
    with np.errstate(divide="ignore", over="ignore"):
        flat = (u0**-power + power * rate * t) ** (-1 / power)
    out = np.where(s == 0, flat, out)
    moving = (s > 0) & (u0 > 0) & (u0 != s)
    if not moving.any():
        return out
    v0 = (u0 / np.where(s > 0, s, 1))[moving]
    speed = (rate * s**power)[moving]
    sign = np.where(v0 < 1, 1.0, -1.0)

    def derivative(_: float, y: Array) -> Array:
        return speed * _from_logit(y, sign) ** (power - 1)

    y = _integrate(derivative, np.log(v0 / np.abs(1 - v0)), t.reshape(-1))
    out.reshape(-1, *s.shape)[:, moving] = s[moving] * _from_logit(y, sign)
    return out


def _power_time(u: Array, s: Array, u0: Array, rate: Array, power: float) -> Array:
    """Invert ``_power_curve`` by Gauss-Legendre panels of width at most 1 in the logit of u/s."""
    _check_powers(s, u0)
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = (u**-power - u0**-power) / (power * rate)
        v0, v = u0 / s, u / s
        lower, upper = (np.log(x / np.abs(1 - x)) for x in (v0, v))
    time = np.where(u > u0, np.inf, np.where(s == 0, flat, np.inf))
    within = (s > 0) & (u0 > 0) & (u > 0) & np.isfinite(upper) & np.isfinite(lower)
    within &= (v0 < 1) == (v < 1)
    sign = np.where(v0 < 1, 1.0, -1.0)[within]
    first, last = lower[within], upper[within]
    panels = max(1, math.ceil(float(np.max(np.abs(last - first), initial=0.0))))
    nodes, weights = np.polynomial.legendre.leggauss(16)
    places = (np.arange(panels)[:, None] + (nodes + 1) / 2).ravel() / panels
    y = first[:, None] + (last - first)[:, None] * places
    integrand = _from_logit(y, sign[:, None]) ** (1 - power)
    integral = integrand @ np.tile(weights / (2 * panels), panels) * (last - first)
    time[within] = integral / (rate * np.ones_like(s) * s**power)[within]
    return np.where(u == u0, 0.0, time)


def _from_logit(y: Array, sign: Array) -> Array:
    """Return v from y = log(v / |1 - v|) below (sign 1) or above (sign -1) the fixed point."""
    return np.where(sign > 0, expit(y), -1 / np.expm1(-np.maximum(y, _TINY)))


def _integrate(derivative: Callable[[float, Array], Array], start: Array, t: Array) -> Array:
    """Integrate from 0 and return the states at the times ``t`` (any shape, any order)."""
    if (t < 0).any():
        raise RequestError("Times are counted from the start: give none below 0.")
    times, place = np.unique(t, return_inverse=True)
    states = np.broadcast_to(start, (len(times), len(start))).copy()
    later = times > 0
    if later.any():
        done = solve_ivp(
            derivative, (0, times[-1]), start, "DOP853", times[later], rtol=1e-12, atol=1e-13
        )
        if not done.success:
            raise RequestError(
                f"The equations could not be integrated to t={times[-1]:g} ({done.message}): "
                "start from finite strengths, or ask for earlier times."
            )
        states[later] = done.y.T
    return states[place.reshape(t.shape)]
