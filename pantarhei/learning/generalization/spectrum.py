r"""Spectra of the input correlation, and the errors along gradient flow that follow from them.

The setting: :math:`y = \bar w \cdot x + \epsilon` with :math:`N` inputs of variance :math:`1/N`,
teacher weights of variance :math:`\sigma_w^2`, noise of variance :math:`\sigma_\epsilon^2` and
:math:`P = \alpha N` examples. A linear student starts at weights of variance :math:`\sigma_0^2` and
follows :math:`\dot w = y X^T - w X X^T` (:math:`\tau = 1`). In the eigenbasis of :math:`X X^T` the
modes are independent, and every error is a sum of three terms,

.. math:: E(t) = \sigma_w^2\, a(t) + \sigma_0^2\, b(t) + \sigma_\epsilon^2\, c(t),

which is what the two laws here return: :class:`Spectrum` (average over teacher, start and noise,
for inputs that are alike in all directions: the Marchenko-Pastur law, or the eigenvalues of data)
and :class:`FixedInputs` (given inputs, any covariance of the test inputs, any teacher).

Advani and Saxe, arXiv 1710.03667; the formulas were derived again for this library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pantarhei.errors import RequestError

Array = NDArray[np.float64]

_CHUNK = 2**22  # numbers that an integrand may hold at once
_MOST_NODES = 2**24


class Terms(NamedTuple):
    """What teacher, initial weights and noise of unit variance contribute to an error."""

    signal: Array
    start: Array
    noise: Array

    def total(self, snr: ArrayLike, inr: ArrayLike = 0.0) -> Array:
        """Return the error over the teacher's variance; ``snr`` may be infinite, not 0."""
        snr, inr = _positive("snr", snr, infinite=True), _not_negative("inr", inr)
        # 0 times infinity (no noise, an interpolating student at P = N) is 0 here.
        fitted = np.where(np.isinf(snr), 0.0, self.noise) / snr
        return np.asarray(self.signal + inr * self.start + fitted)


class Law(Protocol):
    """Errors as a function of time, before signal, start and noise have a size."""

    def test(self, t: ArrayLike) -> Terms:
        """Return the terms of the test error, the noise of the test targets included."""

    def train(self, t: ArrayLike) -> Terms:
        """Return the terms of the training error."""

    def slope(self, t: ArrayLike) -> Terms:
        """Return the time derivative of the test error's terms."""

    def ridge(self, penalty: ArrayLike) -> Terms:
        """Return the terms of the test error of ridge regression."""

    def bracket(self, gain: Array) -> tuple[Array, Array]:
        """Return times between which the best one lies, for ``gain`` = SNR (1 + INR)."""


@dataclass(frozen=True)
class Spectrum:
    r"""Eigenvalues of :math:`X X^T` with their weights, for inputs alike in all directions.

    .. math::
        E_g(t) &= (\sigma_w^2 + \sigma_0^2) \int \rho(l)\, e^{-2lt}
                  + \sigma_\epsilon^2 \Big(1 + \int \rho(l)\, \frac{(1 - e^{-lt})^2}{l}\Big) \\
        E_t(t) &= \frac{\sigma_w^2 + \sigma_0^2}{\alpha} \int_{l>0} \rho(l)\, l\, e^{-2lt}
                  + \sigma_\epsilon^2 \Big(1 - \frac1\alpha\int_{l>0}\rho(l)(1-e^{-2lt})\Big)

    ``eigenvalues`` (..., M) are positive, ``weights`` (..., M) their shares of the N directions;
    ``mass`` (...) is the weights' exact sum and ``inverse`` the exact :math:`\int_{l>0}\rho/l`;
    the share ``1 - mass`` of the directions has no data. Leading axes are an ensemble, and
    broadcast with the times. Make one with :meth:`marchenko_pastur` or :meth:`of`.

    >>> law = Spectrum.marchenko_pastur([0.5, 1.0, 2.0])
    >>> law.mass, law.inverse
    (array([0.5, 1. , 1. ]), array([ 1., inf,  1.]))
    >>> law.test(np.inf).noise  # of an interpolating student: worst where P = N
    array([ 2., inf,  2.])
    """

    alpha: Array
    eigenvalues: Array
    weights: Array
    mass: Array
    inverse: Array

    @classmethod
    def marchenko_pastur(cls, alpha: ArrayLike, time: float = 1e4) -> Spectrum:
        r"""Return the law of large random inputs, exact to rounding for times up to ``time``.

        .. math:: \rho(l) = \frac{\sqrt{(l_+ - l)(l - l_-)}}{2\pi l} + (1 - \alpha)_+\,\delta(l),
                  \qquad l_\pm = (\sqrt\alpha \pm 1)^2

        Gauss-Chebyshev quadrature of the second kind takes the square root into its weights. What
        is left is entire in :math:`l` when :math:`e^{-2lt}` is integrated as
        :math:`1 + (e^{-2lt} - 1)`, so the rule converges for every alpha, 1 included, as soon as
        its nodes resolve :math:`l \sim 1/t` (or the gap below :math:`l_-`, if that is coarser).

        ``alpha`` (...) is examples over inputs.
        """
        alpha = _positive("alpha", alpha)
        half, lowest = 2 * np.sqrt(alpha), (np.sqrt(alpha) - 1) ** 2
        with np.errstate(divide="ignore"):
            enough = np.minimum(6.5 * np.sqrt(half * time), 50 / np.abs(np.log(alpha)))
        wanted = float(enough.max()) + 48
        if not wanted <= _MOST_NODES:
            raise RequestError(
                f"time {time:.3g} at alpha near 1 needs {wanted:.2g} quadrature nodes: ask for "
                "times up to 1e12, or for infinity itself."
            )
        nodes = math.ceil(wanted)
        angle = np.arange(1, nodes + 1) * (np.pi / (nodes + 1))
        # From the lower edge up, which keeps the relative accuracy of the smallest.
        eigenvalues = lowest[..., None] + 2 * half[..., None] * np.sin(angle / 2) ** 2
        weights = half[..., None] ** 2 * np.sin(angle) ** 2 / (2 * (nodes + 1) * eigenvalues)
        mass = np.minimum(alpha, 1.0)
        with np.errstate(divide="ignore"):
            inverse = mass / np.abs(alpha - 1)
        return cls(alpha, eigenvalues, weights, mass, inverse)

    @classmethod
    def of(cls, inputs: ArrayLike) -> Spectrum:
        """Return the spectrum of data: ``inputs`` (..., P, N), an example a row.

        With it the errors are exact averages over teacher, start and noise at these very inputs,
        for test inputs of variance 1/N in every direction.

        >>> x = np.random.default_rng(0).normal(size=(7, 40, 80)) / np.sqrt(80)
        >>> Spectrum.of(x).mass[0]
        np.float64(0.5)
        """
        x = _matrix("inputs", inputs)
        examples, size = x.shape[-2:]
        eigenvalues = np.linalg.svd(x, compute_uv=False) ** 2
        there = eigenvalues > _zero(eigenvalues, x)
        weights: Array = (there / size).astype(np.float64)
        eigenvalues = np.where(there, eigenvalues, 1.0).astype(np.float64)  # those without weight
        return cls(
            np.asarray(examples / size),
            np.asarray(eigenvalues),
            weights,
            weights.sum(-1),
            (weights / eigenvalues).sum(-1),
        )

    def test(self, t: ArrayLike) -> Terms:
        """Return the terms of the test error at times ``t``; infinity is the end of training."""
        t, ended = _times(t)
        left = 1 + self._integral(t, lambda rate, t: np.expm1(-2 * rate * t))
        fitted = self._integral(t, lambda rate, t: np.expm1(-rate * t) ** 2 / rate)
        signal = np.where(ended, 1 - self.mass, left)
        return Terms(signal, signal, 1 + np.where(ended, self.inverse, fitted))

    def train(self, t: ArrayLike) -> Terms:
        """Return the terms of the training error; directions without data have no part in it."""
        t, ended = _times(t)
        signal = self._integral(t, lambda rate, t: rate * np.exp(-2 * rate * t)) / self.alpha
        gone = self._integral(t, lambda rate, t: -np.expm1(-2 * rate * t))
        signal = np.where(ended, 0.0, signal)
        return Terms(signal, signal, 1 - np.where(ended, self.mass, gone) / self.alpha)

    def slope(self, t: ArrayLike) -> Terms:
        """Return the time derivative of :meth:`test`."""
        t, _ = _times(t)
        signal = self._integral(t, lambda rate, t: -2 * rate * np.exp(-2 * rate * t))
        noise = self._integral(t, lambda rate, t: -2 * np.expm1(-rate * t) * np.exp(-rate * t))
        return Terms(signal, signal, noise)

    def ridge(self, penalty: ArrayLike) -> Terms:
        r"""Return the terms of the test error of :math:`w = yX^T(XX^T + g)^{-1}`, g = ``penalty``.

        .. math:: \int \rho \Big[\sigma_w^2 \frac{g^2}{(l+g)^2}
                  + \sigma_\epsilon^2 \frac{l}{(l+g)^2}\Big] + \sigma_\epsilon^2
        """
        g = _not_negative("penalty", penalty)
        bare, g = g == 0, np.where(g == 0, 1.0, g)
        signal = 1 - self._integral(g, lambda rate, g: rate * (rate + 2 * g) / (rate + g) ** 2)
        noise = self._integral(g, lambda rate, g: rate / (rate + g) ** 2)
        signal = np.where(bare, 1 - self.mass, signal)
        return Terms(signal, 0 * signal, 1 + np.where(bare, self.inverse, noise))

    def bracket(self, gain: Array) -> tuple[Array, Array]:
        """Return the best times of the modes with the largest and the smallest eigenvalue."""
        there = self.weights > 0
        largest = np.where(there, self.eigenvalues, 0.0).max(-1)
        smallest = np.where(there, self.eigenvalues, np.inf).min(-1)
        return np.log1p(largest * gain) / largest, np.log1p(smallest * gain) / smallest

    def _integral(self, t: Array, integrand: Callable[[Array, Array], Array]) -> Array:
        """Integrate over the eigenvalues above 0, a chunk of them at a time."""
        shape = np.broadcast_shapes(t.shape, self.mass.shape)
        total = np.zeros(shape)
        step = max(1, _CHUNK // max(1, math.prod(shape)))
        for first in range(0, self.eigenvalues.shape[-1], step):
            part = slice(first, first + step)
            values = integrand(self.eigenvalues[..., part], t[..., None])
            total += (self.weights[..., part] * values).sum(-1)
        return total


class FixedInputs:
    r"""The exact average over noise (and start) for given training inputs, of any covariance.

    With :math:`X X^T = V \Lambda V^T`, test inputs of covariance :math:`C` and a teacher
    :math:`\bar w`, the error of the student that started at 0 is

    .. math:: E_g(t) = b^T C\, b + \sigma_\epsilon^2
              \Big(1 + \sum_i (V^T C V)_{ii} \frac{(1 - e^{-l_i t})^2}{l_i}\Big),
              \qquad b = V e^{-\Lambda t} V^T \bar w \;(+\,\text{what no input reaches}).

    Args:
        inputs: Training inputs (P, N), an example a row.
        covariance: Of the test inputs: an (N, N) matrix; or a number s in [0, 1] for the training
            inputs' own second moment shrunk towards a multiple of the identity,
            :math:`(1-s)\,XX^T/P + s\,\mathrm{tr}(XX^T)/(PN)`; by default :math:`1/N` in every
            direction, as in :class:`Spectrum`.
        teacher: Weights (N,); its "variance" is :math:`|\bar w|^2/N`. By default the average over
            teachers alike in all directions.

    >>> x = np.random.default_rng(0).normal(size=(40, 20)) / np.sqrt(20)
    >>> law = FixedInputs(x, covariance=np.eye(20) / 20)
    >>> bool(np.allclose(law.test([0.5, 3.0]).noise, Spectrum.of(x).test([0.5, 3.0]).noise))
    True
    """

    def __init__(
        self,
        inputs: ArrayLike,
        covariance: ArrayLike | float | None = None,
        teacher: ArrayLike | None = None,
    ) -> None:
        x = _matrix("inputs", inputs)
        if x.ndim != 2:
            raise RequestError(f"inputs have shape {x.shape}: give one matrix, an example a row.")
        self.examples, self.size = x.shape
        self.alpha = np.asarray(self.examples / self.size)
        _, singular, rows = np.linalg.svd(x, full_matrices=False)
        there = singular**2 > _zero(singular**2, x)
        self.eigenvalues: Array = singular[there] ** 2
        self.basis: Array = rows[there].T
        if not len(self.eigenvalues):
            raise RequestError("inputs are all zero: there is nothing to learn from.")
        self._set_covariance(covariance)
        self._set_teacher(teacher)

    def _set_covariance(self, covariance: ArrayLike | float | None) -> None:
        """Keep C in the inputs' eigenbasis: its diagonal, and the matrix where it has one."""
        rate, self._matrix = self.eigenvalues, None
        self._covariance: Array | None = None
        if covariance is None or np.ndim(covariance) == 0:
            shrinkage = 1.0 if covariance is None else float(np.asarray(covariance))
            if not 0 <= shrinkage <= 1:
                raise RequestError(f"covariance {shrinkage} as a shrinkage lies between 0 and 1.")
            per_direction = (
                1 / self.size if covariance is None else rate.sum() / (self.examples * self.size)
            )
            self._metric = (1 - shrinkage) * rate / self.examples + shrinkage * per_direction
            self._unreached = shrinkage * per_direction * (self.size - len(rate))
            return
        self._covariance = np.asarray(covariance, dtype=np.float64)
        if self._covariance.shape != (self.size, self.size):
            raise RequestError(
                f"covariance has shape {self._covariance.shape}: {self.size} inputs need "
                f"({self.size}, {self.size})."
            )
        if not np.allclose(self._covariance, self._covariance.T):
            raise RequestError("covariance is not symmetric: give the test inputs' second moments.")
        self._matrix = self.basis.T @ self._covariance @ self.basis
        self._metric = np.diagonal(self._matrix)
        self._unreached = float(np.trace(self._covariance) - self._metric.sum())

    def _set_teacher(self, teacher: ArrayLike | None) -> None:
        self._modes: Array | None = None
        if teacher is None:
            return
        w = np.asarray(teacher, dtype=np.float64)
        if w.shape != (self.size,) or not np.isfinite(w).all() or not w.any():
            raise RequestError(
                f"teacher has shape {w.shape}: give {self.size} finite weights, not all zero."
            )
        w = w / np.sqrt((w**2).mean())
        self._modes = self.basis.T @ w
        hidden = w - self.basis @ self._modes
        if self._covariance is None:
            per_direction = self._unreached / max(1, self.size - len(self.eigenvalues))
            self._hidden, self._crossed = per_direction * float(hidden @ hidden), None
        else:
            seen = self._covariance @ hidden
            self._hidden, self._crossed = float(hidden @ seen), self.basis.T @ seen

    def test(self, t: ArrayLike) -> Terms:
        """Return the terms of the test error at times ``t`` (...)."""
        decay = self._decay(t)
        noise = 1 + (1 - decay) ** 2 @ (self._metric / self.eigenvalues)
        start = self._unreached + decay**2 @ self._metric
        return Terms(start if self._modes is None else self._bias(decay, decay), start, noise)

    def train(self, t: ArrayLike) -> Terms:
        """Return the terms of the training error at times ``t`` (...)."""
        decay = self._decay(t)
        start = decay**2 @ self.eigenvalues / self.examples
        signal = start
        if self._modes is not None:
            signal = decay**2 @ (self.eigenvalues * self._modes**2) / self.examples
        return Terms(signal, start, 1 + (decay**2 - 1).sum(-1) / self.examples)

    def slope(self, t: ArrayLike) -> Terms:
        """Return the time derivative of :meth:`test`."""
        rate, decay = self.eigenvalues, self._decay(t)
        noise = 2 * ((1 - decay) * decay) @ self._metric
        start = -2 * decay**2 @ (rate * self._metric)
        if self._modes is None:
            return Terms(start, start, noise)
        falling = -rate * decay
        signal = 2 * self._quadratic(falling, decay)
        if self._crossed is not None:
            signal = signal + 2 * falling @ (self._modes * self._crossed)
        return Terms(signal, start, noise)

    def ridge(self, penalty: ArrayLike) -> Terms:
        """Return the terms of the test error of ridge regression with ``penalty`` (...)."""
        g = _not_negative("penalty", penalty)[..., None]
        kept = g / (self.eigenvalues + g)
        noise = 1 + (self.eigenvalues / (self.eigenvalues + g) ** 2) @ self._metric
        signal = self._unreached + kept**2 @ self._metric
        return Terms(signal if self._modes is None else self._bias(kept, kept), 0 * signal, noise)

    def bracket(self, gain: Array) -> tuple[Array, Array]:
        """Return times between which the best one lies."""
        largest, smallest = self.eigenvalues.max(), self.eigenvalues.min()
        if self._modes is None:
            return np.log1p(largest * gain) / largest, np.log1p(smallest * gain) / smallest
        # A given teacher may have next to nothing, or all it has, along one direction.
        all_in_one = np.log1p(smallest * self.size * gain) / smallest
        return np.log1p(1e-4 * largest * gain) / largest, 4 * all_in_one

    def _decay(self, t: ArrayLike) -> Array:
        t, ended = _times(t)
        decay = np.exp(-self.eigenvalues * t[..., None])
        return np.where(ended[..., None], 0.0, decay)

    def _bias(self, left: Array, right: Array) -> Array:
        """Return b^T C b for a given teacher whose modes are left over to these shares."""
        assert self._modes is not None
        total = self._hidden + self._quadratic(left, right)
        if self._crossed is not None:
            total = total + 2 * left @ (self._modes * self._crossed)
        return np.asarray(total)

    def _quadratic(self, left: Array, right: Array) -> Array:
        assert self._modes is not None
        left, right = left * self._modes, right * self._modes
        if self._matrix is None:
            return np.asarray((left * right) @ self._metric)
        return np.asarray(((left @ self._matrix) * right).sum(-1))


def marchenko_pastur_density(eigenvalue: ArrayLike, alpha: ArrayLike) -> Array:
    r"""Return the continuous part of the law's density; its mass is min(1, alpha).

    The rest, :math:`(1-\alpha)_+`, is a spike at 0.

    >>> marchenko_pastur_density([0.5, 5.0], 1.0).round(4)
    array([0.4211, 0.    ])
    """
    rate, alpha = np.asarray(eigenvalue, dtype=np.float64), _positive("alpha", alpha)
    below, above = rate - (np.sqrt(alpha) - 1) ** 2, (np.sqrt(alpha) + 1) ** 2 - rate
    inside = (below > 0) & (above > 0)
    root = np.sqrt(np.where(inside, below * above, 0.0))
    return np.asarray(root / (2 * np.pi * np.where(inside, rate, 1.0)))


def as_law(law: Law | ArrayLike, time: float) -> Law:
    """Return ``law``, or for a number (or array) alpha the Marchenko-Pastur law up to ``time``."""
    if isinstance(law, Spectrum | FixedInputs):
        return law
    return Spectrum.marchenko_pastur(law, time)  # type: ignore[arg-type]


def _zero(eigenvalues: NDArray[Any], x: Array) -> Array:
    """Return the size below which an eigenvalue of ``x`` is rounding."""
    relative = (max(x.shape[-2:]) * np.finfo(np.float64).eps) ** 2
    return np.asarray(eigenvalues.max(-1, keepdims=True) * relative)


def _times(t: ArrayLike) -> tuple[Array, Any]:
    """Return finite times, and where infinity was asked for."""
    t = _not_negative("t", t, infinite=True)
    ended = np.isinf(t)
    return np.where(ended, 0.0, t), ended


def _positive(name: str, value: ArrayLike, *, infinite: bool = False) -> Array:
    array = _numbers(name, value)
    if not (array > 0).all() or (not infinite and np.isinf(array).any()):
        raise RequestError(f"{name} must be positive{'' if infinite else ' and finite'}.")
    return array


def _not_negative(name: str, value: ArrayLike, *, infinite: bool = False) -> Array:
    array = _numbers(name, value)
    if not (array >= 0).all() or (not infinite and np.isinf(array).any()):
        raise RequestError(f"{name} must not be negative{'' if infinite else ' or infinite'}.")
    return array


def _numbers(name: str, value: ArrayLike) -> Array:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{name} must be a number or an array of numbers.") from error
    if np.isnan(array).any():
        raise RequestError(f"{name} holds values that are not numbers (NaN): remove them.")
    return array


def _matrix(name: str, value: ArrayLike) -> Array:
    array = _numbers(name, value)
    if array.ndim < 2 or 0 in array.shape[-2:]:
        raise RequestError(f"{name} have shape {array.shape}: give a matrix, an example a row.")
    if not np.isfinite(array).all():
        raise RequestError(f"{name} hold values that are not finite: remove or replace them.")
    return array
