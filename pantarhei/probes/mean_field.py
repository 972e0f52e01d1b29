r"""Gaussian averages of an activation, and what they decide: when a deep network is critical.

In a wide multilayer perceptron with Gaussian weights, Var b = C_b and Var W = C_W / fan-in, the
preactivations of one input are Gaussian with a variance K that the layers map by

.. math:: K' = C_b + C_W \langle\sigma^2\rangle_K, \qquad
          \langle f\rangle_K = \int \frac{dz}{\sqrt{2\pi K}}\, e^{-z^2/2K} f(z).

How a small difference between two inputs fares is in the two susceptibilities,

.. math:: \chi_\parallel = C_W \frac{d\langle\sigma^2\rangle_K}{dK}
                         = \frac{C_W}{K}\langle z\,\sigma\,\sigma'\rangle_K
          \ \text{(its length)}, \qquad
          \chi_\perp = C_W\langle\sigma'^2\rangle_K \ \text{(its direction)},

and a network is critical, trainable however deep it is, where both are 1 at a fixed point K*. The
equations are those of "The Principles of Deep Learning Theory" (arXiv 2106.10165), chapter 5.

Everything takes any elementwise torch function, is computed in float64 on the processor, and is
vectorised over K.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.errors import RequestError, nearest

Universality = Literal["scale-invariant", "K*=0", "half-stable", "none"]
Function = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Function] = {
    "linear": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "erf": torch.erf,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
}

_REACH = 12.0  # standard deviations: the density beyond is 1e-32
_NODES = 20  # Gauss-Legendre nodes a panel
_SEARCHED = 64.0  # kinks are looked for in [-64, 64]
_AT_ONCE = 2**21  # quadrature nodes held at a time


class Activation:
    r"""An activation as the theory sees it: derivatives, kinks and Gaussian averages.

    Args:
        function: An elementwise torch function, an ``nn.Module`` (a copy in float64 is used), a
            name among :data:`ACTIVATIONS`, or ``"package.module:function"``.

    Attributes: ``name``; ``kinks``, the points where the function or one of its first two
    derivatives jumps (by more than 2 % of its size), found by bisection on [-64, 64]; ``slopes``,
    (a_-, a_+) where :math:`\sigma(z) = a_\pm z`, otherwise None.

    Raises :class:`RequestError` for what is not elementwise or cannot be differentiated twice.

    >>> Activation("hardtanh").kinks.tolist()
    [-1.0, 1.0]
    >>> gelu = Activation("gelu")
    >>> round(float(gelu.average(lambda z: gelu.derivative(z) ** 2, 1.0)), 6)
    0.455851
    """

    def __init__(self, function: Function | str | Activation) -> None:
        if isinstance(function, Activation):
            self.__dict__.update(function.__dict__)
            return
        given = function
        if isinstance(function, str):
            function = _named(function)
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to("cpu", torch.float64).eval()
            function.requires_grad_(False)
        self._function = function
        self.name = given if isinstance(given, str) else _name(function)
        self._check()

    def __call__(self, z: Tensor) -> Tensor:
        """Return the activation of every element."""
        return self._function(z)

    def __repr__(self) -> str:
        return f"Activation({self.name!r})"

    def derivative(self, z: Tensor, order: int = 1) -> Tensor:
        """Return the derivative of this order at ``z`` (at a kink: the one torch takes there)."""
        function = self._function
        for _ in range(order):
            function = _derived(function)
        return function(z)

    @functools.cached_property
    def kinks(self) -> Tensor:
        """Where the function or one of its first two derivatives jumps, in order."""
        if self.slopes is not None:
            return torch.zeros(int(self.slopes[0] != self.slopes[1]), dtype=torch.float64)
        return _find_kinks([functools.partial(self.derivative, order=n) for n in range(3)])

    @functools.cached_property
    def slopes(self) -> tuple[float, float] | None:
        """The slopes left and right of 0 of a scale-invariant activation."""
        z = torch.logspace(-3, 3, 61, dtype=torch.float64)
        ratios = self(torch.stack([-z, z])) / torch.stack([-z, z])
        if not bool(((ratios - ratios[:, :1]).abs() <= 1e-9 * (1 + ratios[:, :1].abs())).all()):
            return None
        return float(ratios[0, 0]), float(ratios[1, 0])

    def average(self, f: Function, K: Tensor | float) -> Tensor:
        r"""Return :math:`\langle f\rangle_K` for every K, ``f`` being made from this activation.

        ``f`` maps z (..., nodes) to its values, of the same shape or with leading axes (several
        functions stacked), which the result keeps: (leading..., K.shape).

        The rule is Gauss-Legendre on panels of :math:`z/\sqrt K` that end at the kinks and are
        no wider than the function's own scale asks for. Gauss-Hermite nodes are what one would
        take for a smooth function, and are for several inputs (:func:`joint_average`), but they
        converge slowly where :math:`\sqrt K` exceeds that scale: 128 of them leave an error of
        1e-13 in :math:`\langle\tanh^2\rangle` at K = 1 and 1e-3 at K = 14.
        """
        K = _variances(K)
        found = self._mean(f, K)
        if not bool(torch.isfinite(found).all()):
            raise RequestError(
                f"A Gaussian average of '{self.name}' does not exist at K={float(K.max()):.3g}: "
                "use a smaller kernel or an activation that grows more slowly."
            )
        return found

    def _mean(self, f: Function, K: Tensor) -> Tensor:
        """Average, with NaN where the integrand has not decayed at the ends."""
        z, weights = _panels(K, self.kinks)
        terms = f(z) * weights
        far = terms.abs() * (z.abs() > (_REACH - 1) * K.sqrt()[..., None])
        lost = far.sum(-1) > 1e-10 * terms.abs().sum(-1)
        return torch.where(lost, math.nan, terms.sum(-1))

    def pairs(self, K: Tensor, rows: Tensor, columns: Tensor, order: int = 0) -> Tensor:
        r"""Return :math:`\langle\sigma^{(n)}_a \sigma^{(n)}_b\rangle` for every pair of inputs.

        Args:
            K: Covariances (N, M) of N inputs with M others.
            rows, columns: The inputs' own variances, (N,) and (M,).
            order: n, which derivative; 0 or 1.

        Smooth activations: Mehler's series :math:`\sum_k a_k(K_{aa}) a_k(K_{bb}) \rho^k` over the
        Hermite coefficients a_k of each input, so that the cost of a pair is that of a polynomial.
        Scale-invariant ones: the closed form (Cho and Saul 2009). Others: quadrature in two
        dimensions split at the kinks, 14,400 nodes a pair with one of them.
        """
        if order not in (0, 1):
            raise ValueError(f"order is 0 or 1, not {order}")
        K, rows, columns = (t.to("cpu", torch.float64) for t in (K, rows, columns))
        scale = (rows[:, None] * columns[None]).clamp(min=0).sqrt()
        rho = torch.where(scale > 0, K / scale, torch.zeros_like(K)).clamp(-1, 1)
        if self.slopes is not None:
            return _scale_invariant_pairs(self.slopes, rho, scale, order)
        if len(self.kinks) == 0:
            return self._series(rho, rows, columns, order)
        left, right = rows[:, None].expand_as(K), columns[None].expand_as(K)
        covariance = torch.stack(
            [torch.stack([left, rho * scale], -1), torch.stack([rho * scale, right], -1)], -1
        )
        return self.joint_average(lambda z: self.derivative(z, order).prod(-1), covariance)

    def joint_average(self, f: Function, K: Tensor) -> Tensor:
        r"""Return :math:`\langle f(z_1, \ldots, z_d)\rangle_K` over d jointly Gaussian variables.

        ``f`` maps (..., nodes, d) to (..., nodes), ``K`` is (..., d, d) and may be singular; d is
        at most 4. Smooth activations: products of Gauss-Hermite rules. With kinks each variable is
        integrated, given those before it, by Gauss-Legendre panels that end at them; that is exact
        to 1e-5 of its size unless two inputs are nearly, but not quite, parallel.
        """
        batch, d = K.shape[:-2], K.shape[-1]
        nodes = {1: 64, 2: 40, 3: 20, 4: 14}[d]
        flat = K.to(torch.float64).reshape(-1, d, d)
        panels = 2 + len(self.kinks) if len(self.kinks) else 1
        size = (nodes * panels) ** d
        chunks = flat.split(max(1, _AT_ONCE // size))
        out = []
        for chunk in chunks:
            z, weights = _joint_nodes(chunk, self.kinks, nodes)
            out.append((f(z) * weights).sum(-1))
        return torch.cat(out).reshape(batch)

    def _series(self, rho: Tensor, rows: Tensor, columns: Tensor, order: int) -> Tensor:
        a, b = self._hermite(rows, order), self._hermite(columns, order)
        terms = max(a.shape[1], b.shape[1])
        a, b = (F.pad(c, (0, terms - c.shape[1])) for c in (a, b))
        out = torch.zeros_like(rho)
        # Horner's rule, on as many rows at a time as a processor's cache holds.
        size = max(1, 2**16 // max(1, rho.shape[1]))
        for part, ratio, left in zip(out.split(size), rho.split(size), a.split(size), strict=True):
            for k in reversed(range(terms)):
                part.mul_(ratio).addcmul_(left[:, k, None], b[None, :, k])
        return out

    def _hermite(self, K: Tensor, order: int) -> Tensor:
        """Return the coefficients (N, terms) in orthonormal Hermite polynomials of z / sqrt(K)."""
        z, weights = _panels(K, self.kinks)
        values = self.derivative(z, order)
        u = z / K.sqrt().clamp(min=1e-150)[:, None]
        total = (values.square() * weights).sum(-1)
        weighted, polynomial, before = values * weights, torch.ones_like(u), torch.zeros_like(u)
        found, sum_ = [], torch.zeros_like(total)
        for k in range(600):
            found.append((weighted * polynomial).sum(-1))
            sum_ = sum_ + found[-1].square()
            # Parseval; an odd or even function has every other coefficient 0.
            if k % 8 == 7 and bool((total - sum_ <= 1e-14 * total).all()):
                break
            polynomial, before = (
                (u * polynomial - math.sqrt(k) * before) / math.sqrt(k + 1),
                polynomial,
            )
        return torch.stack(found, -1)

    def _check(self) -> None:
        z = torch.linspace(-2, 2, 7, dtype=torch.float64)
        try:
            value = self(z)
            alone = torch.stack([self(x[None])[0] for x in z])
            self.derivative(z, 2)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(
                f"Activation '{self.name}' cannot be evaluated and differentiated twice on a "
                f"float64 tensor ({str(error).splitlines()[0]}): write it with differentiable "
                "torch functions."
            ) from error
        if value.shape != z.shape or not torch.allclose(value, alone):
            raise RequestError(
                f"Activation '{self.name}' is not elementwise: the theory needs a function of one "
                "number."
            )


def susceptibilities(
    activation: Activation | Function | str,
    K: Tensor | float,
    C_W: float,
    gamma: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return :math:`\chi_\parallel, \chi_\perp` and h at every K, residual branch included.

    .. math:: \chi_\parallel = \gamma^2 + \frac{C_W}{K}\langle z\sigma\sigma'\rangle, \quad
              \chi_\perp = \gamma^2 + C_W\langle\sigma'^2\rangle, \quad
              h = \tfrac12\frac{d\chi_\perp}{dK}
                = \frac{C_W}{4K^2}\langle\sigma'^2 (z^2-K)\rangle

    for :math:`z' = \gamma z + b + W\sigma(z)`. At K = 0 the limits of a function smooth there:
    :math:`C_W(\sigma_1^2+\sigma_0\sigma_2)`, :math:`C_W\sigma_1^2` and
    :math:`\tfrac12 C_W(\sigma_2^2+\sigma_1\sigma_3)`.

    >>> [round(float(x), 6) for x in susceptibilities("relu", 7.0, 2.0)]
    [1.0, 1.0, 0.0]
    """
    act, K = Activation(activation), _variances(K)
    small = K < _TINY
    K = torch.where(small, 1.0, K)

    def integrands(z: Tensor) -> Tensor:
        s, d, k = act(z), act.derivative(z), K[..., None]
        return torch.stack([z * s * d / k, d * d, d * d * (z * z - k) / (4 * k * k)])

    parallel, perpendicular, h = act.average(integrands, K)
    if bool(small.any()):
        s = [float(act.derivative(torch.zeros(1, dtype=torch.float64), n)) for n in range(4)]
        parallel = torch.where(small, s[1] ** 2 + s[0] * s[2], parallel)
        perpendicular = torch.where(small, s[1] ** 2, perpendicular)
        h = torch.where(small, (s[2] ** 2 + s[1] * s[3]) / 2, h)
    return gamma**2 + C_W * parallel, gamma**2 + C_W * perpendicular, C_W * h


_TINY = 1e-12  # below it z^2 - K loses every digit


@dataclass(frozen=True)
class CriticalPoint:
    r"""Where, if anywhere, deep networks with an activation are critical.

    Attributes:
        universality: ``"scale-invariant"`` (any K stays as it is), ``"K*=0"`` (K falls as 1/l),
            ``"half-stable"`` (a fixed point K* that is stable from one side) or ``"none"``.
        C_b, C_W: The critical variances of biases and of weights times fan-in; None without.
        K: The fixed point K*; None where any is one, or none.
        a1, b1: Coefficients of the K*=0 class:
            :math:`a_1 = \sigma_3/\sigma_1 + \tfrac34(\sigma_2/\sigma_1)^2`,
            :math:`b_1 = \sigma_3/\sigma_1 + (\sigma_2/\sigma_1)^2`; K ~ 1/(-a1 l), and p = b1/a1
            sets the learning rates. None in other classes, and where the second derivative jumps
            at 0.
        nu: V/(n K^2) grows as nu l/n: how fast depth makes a network of width n non-Gaussian.
        reason: One sentence that says why.
    """

    universality: Universality
    C_b: float | None
    C_W: float | None
    K: float | None
    a1: float | None
    b1: float | None
    nu: float | None
    reason: str


def critical_point(
    activation: Activation | Function | str, gamma: float = 0.0, *, cubic: bool = True
) -> CriticalPoint:
    r"""Find the critical initialisation of networks with this activation, or say there is none.

    Solves :math:`K^* = \gamma^2 K^* + C_b + C_W\langle\sigma^2\rangle_{K^*}`,
    :math:`\chi_\parallel = \chi_\perp = 1`. C_W drops out of
    :math:`\langle z\sigma\sigma'\rangle_K = K\langle\sigma'^2\rangle_K`, whose roots K* are looked
    for on [1e-3, 1e4]; then :math:`C_W = (1-\gamma^2)/\langle\sigma'^2\rangle` and
    :math:`C_b = (1-\gamma^2) K^* - C_W\langle\sigma^2\rangle`, which must not be negative.

    Args:
        activation: Any elementwise torch function, or a name.
        gamma: Strength of the residual branch, in [0, 1).
        cubic: Whether nu counts the cubic vertex that a residual branch makes for an activation
            that is not odd (this library's addition; the book's formula is without it).

    >>> relu, tanh = critical_point("relu"), critical_point("tanh")
    >>> relu.universality, relu.C_b, relu.C_W, relu.nu
    ('scale-invariant', 0.0, 2.0, 5.0)
    >>> tanh.universality, tanh.C_W, tanh.a1, tanh.b1
    ('K*=0', 1.0, -2.0, -2.0)
    >>> gelu = critical_point("gelu")
    >>> gelu.universality, round(gelu.C_b, 8), round(gelu.C_W, 8), round(gelu.K, 8)
    ('half-stable', 0.17292239, 1.98305826, 3.56155281)
    >>> critical_point("softplus").universality, critical_point("softplus").C_b
    ('none', None)
    """
    if not 0 <= gamma < 1:
        raise RequestError(
            f"gamma={gamma} is out of range: a residual branch takes 0 <= gamma < 1."
        )
    act, left = Activation(activation), 1 - gamma**2
    if act.slopes is not None:
        return _scale_invariant(act, gamma, cubic)
    at_zero = _at_zero(act)
    if at_zero is not None:
        s1, a1, b1, stable = at_zero
        if stable:
            nu = 2 / 3 * (1 - gamma**4)
            reason = "sigma(0) = 0, and the kernel falls to its fixed point K* = 0 as a power"
            return CriticalPoint("K*=0", 0.0, left / s1**2, 0.0, a1, b1, nu, reason)
    found = _fixed_points(act)
    for K, C_b, C_W in found:
        if C_b >= 0:
            nu = _nu(act, K, left * C_W, gamma, cubic)
            reason = "a fixed point K* > 0 that is stable from one side only: start near it"
            return CriticalPoint("half-stable", left * C_b, left * C_W, K, None, None, nu, reason)
    reason = (
        f"chi_par = chi_perp = 1 would take a negative variance of the biases ({found[0][1]:.3g})"
        if found
        else "chi_par and chi_perp are never 1 together at a fixed point"
    )
    if at_zero is not None:
        reason = "K = 0 is unstable, and " + reason
    return CriticalPoint("none", None, None, None, None, None, None, reason)


class CriticalGain(NamedTuple):
    """A gain, and the variance q* of the preactivations there (None where any is a fixed point)."""

    gain: float
    variance: float | None


def critical_gain(activation: Activation | Function | str) -> CriticalGain:
    r"""Return the largest gain g at which :math:`x' = g\,W\varphi(x)` is at the edge of chaos.

    With Gaussian W of variance 1/n the variance of a layer maps by
    :math:`q' = g^2\,E\,\varphi(\sqrt q z)^2`, and perturbations grow by
    :math:`\chi = g^2\,E\,\varphi'(\sqrt q z)^2`. On the branch of fixed points g is a function of
    q*, and :math:`\chi = 1` where :math:`q\,E\varphi'^2 = E\varphi^2`. That holds in the limit
    q* = 0 of an activation with phi(0) = 0, where :math:`g = 1/|\varphi'(0)|`; other roots q* are
    looked for on [1e-3, 1e4].

    Raises :class:`RequestError` where there is no such gain.

    >>> critical_gain("tanh"), round(critical_gain("relu").gain, 6)
    (CriticalGain(gain=1.0, variance=0.0), 1.414214)
    """
    act = Activation(activation)
    if act.slopes is not None:
        return CriticalGain(math.sqrt(2 / (act.slopes[0] ** 2 + act.slopes[1] ** 2)), None)
    zero = torch.zeros(1, dtype=torch.float64)
    found = []
    if abs(float(act(zero))) < 1e-12 and abs(slope := float(act.derivative(zero))) > 1e-12:
        found.append(CriticalGain(1 / abs(slope), 0.0))

    def excess(q: Tensor) -> Tensor:
        square, slope = act._mean(lambda z: torch.stack([act(z), act.derivative(z)]) ** 2, q)
        return q * slope / square - 1

    for q in _roots(excess):
        slope = float(act.average(lambda z: act.derivative(z) ** 2, q))
        found.append(CriticalGain(slope**-0.5, q))
    if not found:
        raise RequestError(
            f"'{act.name}' has no critical gain: chi = 1 nowhere on its fixed points; use an "
            "activation with phi(0) = 0."
        )
    return max(found)


def _scale_invariant(act: Activation, gamma: float, cubic: bool) -> CriticalPoint:
    assert act.slopes is not None
    A2 = sum(a**2 for a in act.slopes) / 2
    if A2 == 0:
        return CriticalPoint("none", None, None, None, None, None, None, "the activation is zero")
    C_W = (1 - gamma**2) / A2
    nu = _nu(act, 1.0, C_W, gamma, cubic)
    reason = "sigma(z) is proportional to z on either side of 0: every K stays as it is"
    return CriticalPoint("scale-invariant", 0.0, C_W, None, None, None, nu, reason)


def _at_zero(act: Activation) -> tuple[float, float | None, float | None, bool] | None:
    """Return sigma'(0), a1, b1 and whether K = 0 is stable; None where it is no fixed point."""
    zero = torch.zeros(1, dtype=torch.float64)
    s0, s1, s2, s3 = (float(act.derivative(zero, n)) for n in range(4))
    if abs(s0) > 1e-12 or abs(s1) < 1e-12:
        return None
    if bool((act.kinks.abs() < 1e-9).any()):
        # No Taylor series: a jump of the slope has no critical point here; one of the second
        # derivative (ELU) has, with another power of l in K.
        side = torch.tensor([-1e-8, 1e-8], dtype=torch.float64)
        if float(act.derivative(side).diff().abs()) > 1e-6:
            return None
        K = 1e-4
        return s1, None, None, float(act.average(lambda z: act(z) ** 2, K)) < s1**2 * K
    a1, b1 = s3 / s1 + 0.75 * (s2 / s1) ** 2, s3 / s1 + (s2 / s1) ** 2
    if abs(a1) < 1e-12:  # higher orders decide (hardtanh: exponentially small ones)
        return s1, None, None, float(act.average(lambda z: act(z) ** 2, 0.1)) < s1**2 * 0.1
    return s1, a1, b1, a1 < 0


def _fixed_points(act: Activation) -> list[tuple[float, float, float]]:
    """Return (K*, C_b, C_W) with chi_par = chi_perp = 1, largest C_b first."""

    def difference(K: Tensor) -> Tensor:
        def integrand(z: Tensor) -> Tensor:
            s, d = act(z), act.derivative(z)
            return torch.stack([z * s * d / K[..., None], d * d])

        parallel, perpendicular = act._mean(integrand, K)
        return (parallel - perpendicular) / perpendicular.clamp(min=1e-300)

    found = []
    for K in _roots(difference):
        square, slope = (
            float(x)
            for x in act.average(lambda z: torch.stack([act(z), act.derivative(z)]) ** 2, K)
        )
        found.append((K, K - square / slope, 1 / slope))
    return sorted(found, key=lambda row: -row[1])


def _roots(f: Callable[[Tensor], Tensor]) -> list[float]:
    """Return the simple roots of a function of K on [1e-3, 1e4]."""
    grid = torch.logspace(-3, 4, 141, dtype=torch.float64)
    values = torch.cat([f(part) for part in grid.split(40)])
    roots = []
    for low, high, a, b in zip(grid, grid[1:], values, values[1:], strict=False):
        # Values at the level of rounding change sign without a root: a linear function is flat 0.
        if a * b < 0 and max(abs(a), abs(b)) > 1e-10:
            at = brentq(lambda x: float(f(torch.tensor(x, dtype=torch.float64))), low, high,
                        xtol=1e-13, rtol=1e-14)  # fmt: skip
            roots.append(float(at))
    return roots


def _nu(act: Activation, K: float, C_W: float, gamma: float, cubic: bool) -> float:
    r"""Return the growth of V/K^2 a layer at a fixed point with :math:`\chi_\parallel = 1`."""

    def integrand(z: Tensor) -> Tensor:
        s = act(z)
        return torch.stack([s**2, s**4, s**2 * (z**2 - K), z * s**2, 2 * s * act.derivative(z)])

    square, fourth, coupling, third, slope = act.average(integrand, K).tolist()
    growth = C_W**2 * (fourth - square**2) + 2 * gamma**2 * C_W * coupling
    if cubic and gamma:
        growth += 2 * C_W * slope * gamma * C_W * third / (1 - gamma)
    return growth / K**2


def _variances(K: Tensor | float) -> Tensor:
    K = torch.as_tensor(K, dtype=torch.float64)
    if not bool((K >= 0).all()) or not bool(torch.isfinite(K).all()):
        raise RequestError("The kernel K is a variance: it must be finite and not negative.")
    return K


def _panels(K: Tensor, kinks: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes z and weights (K.shape, nodes) of the Gaussian average at each K."""
    s = K.sqrt()[..., None]
    widest = float(s.max()) if s.numel() else 0.0
    if widest > 1e4:
        raise RequestError(f"The kernel K={widest**2:.3g} is too large to integrate: rescale it.")
    count = int(2 * _REACH * max(1.0, widest / 4))
    edges = torch.linspace(-_REACH, _REACH, count + 1, dtype=torch.float64)
    edges = edges.expand(*K.shape, -1)
    if len(kinks):
        at = (kinks / s.clamp(min=1e-150)).clamp(-_REACH, _REACH)
        edges = torch.cat([edges, at], -1).sort(-1).values
    u, weights = _legendre(edges, _NODES)
    return s * u, weights


def _legendre(edges: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, times the normal density, of the panels between ``edges``."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    half = edges.diff(dim=-1)[..., None] / 2
    u = (edges[..., :-1, None] + half + half * x).flatten(-2)
    return u, (half * w).flatten(-2) * torch.exp(-u * u / 2) / math.sqrt(2 * math.pi)


def _joint_nodes(K: Tensor, kinks: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
    """Return z (batch, N, d) and weights (batch, N) of the average over covariances (batch, d, d).

    Variable j is Gaussian given those before it, with the mean and deviation that a Cholesky
    factor gives; a variable that those before it determine has deviation 0.
    """
    root = _semidefinite_cholesky(K)
    batch, d = K.shape[:2]
    u = torch.zeros(batch, 1, 0, dtype=torch.float64)
    weights = torch.ones(batch, 1, dtype=torch.float64)
    if len(kinks) == 0:
        x, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
        w = w / w.sum()
    for j in range(d):
        if len(kinks) == 0:
            new, factor = (t.expand(batch, u.shape[1], -1) for t in (x, w))
        else:
            mean = torch.einsum("bnj,bj->bn", u, root[:, j, :j])[..., None]
            at = (kinks - mean) / root[:, j, j].clamp(min=1e-150)[:, None, None]
            ends = at.new_tensor([-8.0, 0.0, 8.0]).expand(*at.shape[:-1], 3)
            edges = torch.cat([ends, at.clamp(-8.0, 8.0)], -1).sort(-1).values
            new, factor = _legendre(edges, nodes)
        old = u[:, :, None].expand(-1, -1, new.shape[-1], -1)
        u = torch.cat([old, new[..., None]], -1).flatten(1, 2)
        weights = (weights[..., None] * factor).flatten(1)
    return torch.einsum("bnj,bij->bni", u, root), weights


def _semidefinite_cholesky(K: Tensor) -> Tensor:
    root = torch.zeros_like(K)
    for j in range(K.shape[-1]):
        done = root[:, :, :j]
        rest = K[:, :, j] - (done * done[:, j, None]).sum(-1)
        pivot = rest[:, j]
        fine = pivot > 1e-12 * K[:, j, j]
        column = torch.where(fine[:, None], rest / pivot.clamp(min=1e-300).sqrt()[:, None], 0.0)
        root[:, j:, j] = column[:, j:]
    return root


def _scale_invariant_pairs(
    slopes: tuple[float, float], rho: Tensor, scale: Tensor, order: int
) -> Tensor:
    r"""Return the pair averages of :math:`\sigma = a_\pm z`.

    With :math:`\rho = \cos\theta`, <s s> is sqrt(K_aa K_bb) times
    a_+ a_- rho + (a_+ - a_-)^2 (sin + (pi - theta) cos) / 2 pi.
    """
    minus, plus = slopes
    # atan2 keeps the digits that arccos loses where the inputs are nearly parallel.
    theta = torch.atan2(((1 - rho) * (1 + rho)).sqrt(), rho)
    if order == 1:
        return plus * minus + (plus - minus) ** 2 * (math.pi - theta) / (2 * math.pi)
    bend = (torch.sin(theta) + (math.pi - theta) * rho) / (2 * math.pi)
    return scale * (plus * minus * rho + (plus - minus) ** 2 * bend)


def _find_kinks(functions: list[Function]) -> Tensor:
    """Return where one of ``functions`` jumps: intervals whose ends differ too much, bisected.

    Between the ends of an interval of width w a smooth function changes by w times its slope, which
    falls below the tolerance, sqrt(w) times the function's size there; a jump does not.
    """
    found = []
    for function in functions:
        # An odd number of cells and no round width: halving never lands on a round kink.
        low = torch.linspace(-_SEARCHED, _SEARCHED, 20001, dtype=torch.float64)[:-1] - 1e-3 / 3
        width = 2 * _SEARCHED / 20000
        means = (float(function(low[low.abs() < reach]).abs().mean()) for reach in (2, 8, 64))
        size = next((mean for mean in means if mean > 0), 0.0)
        if size == 0:
            continue
        while width > 1e-12 and len(low):
            width /= 2
            low = torch.cat([low, low + width])
            left, right = function(low), function(low + width)
            local = torch.maximum(left.abs(), right.abs()).clamp(min=size)
            low = low[(right - left).abs() > 0.3 * math.sqrt(width) * local]
            if len(low) > 10**6:
                raise RequestError(
                    "The activation has too many jumps to integrate: use one that is smooth but "
                    "for a few points."
                )
        found += low.sort().values.tolist()
    kinks: list[float] = []
    for point in sorted(round(x, 10) + 0.0 for x in found):
        if not kinks or point - kinks[-1] > 1e-8:
            kinks.append(point)
    return torch.tensor(kinks, dtype=torch.float64)


def _derived(function: Function) -> Function:
    # An elementwise function's derivative is the gradient of its sum.
    return torch.func.grad(lambda z: function(z).sum())


def _name(function: object) -> str:
    return getattr(function, "__name__", type(function).__name__).lower()


def _named(text: str) -> Function:
    if text in ACTIVATIONS:
        return ACTIVATIONS[text]
    module, colon, attribute = text.partition(":")
    if not colon:
        raise RequestError(
            f"Unknown activation '{text}': choose {', '.join(ACTIVATIONS)}, or name your own as "
            f"'module:function'.{nearest(text, ACTIVATIONS)}"
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"Activation '{text}' cannot be imported: {error}.") from error
