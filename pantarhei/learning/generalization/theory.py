r"""Errors, stopping times and their parts, over a grid of times, alpha, SNR and INR at once.

Every function takes a *law*: a number or array alpha = P/N (the Marchenko-Pastur law of large
random inputs), a :class:`~.spectrum.Spectrum`, or a :class:`~.spectrum.FixedInputs`. All arguments
broadcast against each other. Errors are over the teacher's variance and hold the noise floor 1/SNR;
time is in units of :math:`\tau`; SNR is the teacher's variance over the noise's, INR the initial
weights' over the teacher's. Equations: Advani and Saxe, arXiv 1710.03667.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pantarhei.learning.generalization.spectrum import (
    Array,
    Law,
    _not_negative,
    _positive,
    as_law,
)

_GRID = 48  # times among which the basin of the minimum is looked for


def test_error(t: ArrayLike, law: Law | ArrayLike, snr: ArrayLike, inr: ArrayLike = 0.0) -> Array:
    r"""Return the test error after time ``t`` (infinity: the end of training).

    .. math:: \frac{E_g(t)}{\sigma_w^2} = \int \rho(l) \Big[(1 + \mathrm{INR})\, e^{-2lt}
              + \frac{(1 - e^{-lt})^2}{l\,\mathrm{SNR}}\Big] dl + \frac{1}{\mathrm{SNR}}

    >>> test_error([[0.0], [np.inf]], [0.5, 1.0, 2.0], snr=5.0).round(6)
    array([[1.2, 1.2, 1.2],
           [0.9, inf, 0.4]])
    """
    return as_law(law, _longest(t)).test(t).total(snr, inr)


def train_error(t: ArrayLike, law: Law | ArrayLike, snr: ArrayLike, inr: ArrayLike = 0.0) -> Array:
    r"""Return the training error after time ``t``; it never grows.

    .. math:: \frac{E_t(t)}{\sigma_w^2} = \frac1\alpha \int_{l>0} \rho(l)
              \Big[l (1 + \mathrm{INR}) + \frac{1}{\mathrm{SNR}}\Big] e^{-2lt}\, dl
              + \frac{(1 - 1/\alpha)_+}{\mathrm{SNR}}

    >>> train_error([0.0, np.inf], 2.0, snr=5.0).round(6)
    array([1.2, 0.1])
    """
    return as_law(law, _longest(t)).train(t).total(snr, inr)


def optimal_time(law: Law | ArrayLike, snr: ArrayLike, inr: ArrayLike = 0.0) -> Array:
    r"""Return the time of the smallest test error; infinity without noise.

    Each mode alone would stop at :func:`mode_time`; the best time of all lies between those of the
    largest and the smallest eigenvalue, so at most at SNR (1 + INR). The root of the derivative
    there is bisected to rounding, for all settings at once.

    >>> optimal_time([0.5, 1.0], snr=1.0).round(3)
    array([0.697, 0.681])
    """
    snr, inr = _positive("snr", snr, infinite=True), _not_negative("inr", inr)
    noiseless = np.isinf(snr)
    snr = np.where(noiseless, 1.0, snr)
    gain = snr * (1 + inr)
    law = as_law(law, float(gain.max()))
    low, high = (np.log(np.broadcast_to(t, np.shape(t))) for t in law.bracket(gain))
    share = np.linspace(0, 1, _GRID).reshape(-1, *[1] * low.ndim)
    grid = low + share * (high - low)
    error = law.test(np.exp(grid)).total(snr, inr)
    best = error.argmin(0)
    grid = np.broadcast_to(grid, error.shape)
    low, high = (
        np.take_along_axis(grid, np.clip(best + side, 0, _GRID - 1)[None], 0)[0] for side in (-1, 1)
    )
    for _ in range(60):
        middle = (low + high) / 2
        rising = law.slope(np.exp(middle)).total(snr, inr) > 0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    return np.asarray(np.where(noiseless, np.inf, np.exp((low + high) / 2)))


def ridge_error(law: Law | ArrayLike, snr: ArrayLike, penalty: ArrayLike | None = None) -> Array:
    r"""Return the test error of ridge regression :math:`w = yX^T(XX^T + g)^{-1}`.

    ``penalty`` is :math:`g`; by default the best one, :math:`g = 1/\mathrm{SNR}` (the posterior
    mean), below which no linear estimator comes on average.

    >>> ridge_error(0.5, snr=1.0).round(4), ridge_error(0.5, snr=1.0, penalty=0.1).round(4)
    (np.float64(1.7808), np.float64(2.0863))
    """
    snr = _positive("snr", snr, infinite=True)
    g = 1 / snr if penalty is None else _not_negative("penalty", penalty)
    smallest = g[g > 0].min(initial=1.0)
    return as_law(law, float(5 / smallest)).ridge(g).total(snr)


@dataclass(frozen=True)
class Parts:
    """What the test error is made of; the four add up to it.

    ``floor`` is the noise of the test targets, ``unlearned`` the part of the teacher (and of the
    initial weights) that training will still remove, ``frozen`` that in directions without data,
    which it never will, ``overfitted`` the noise of the training targets that was learnt.
    """

    floor: Array
    unlearned: Array
    frozen: Array
    overfitted: Array


def decompose(t: ArrayLike, law: Law | ArrayLike, snr: ArrayLike, inr: ArrayLike = 0.0) -> Parts:
    """Return the parts of :func:`test_error`.

    >>> parts = decompose(2.0, 0.5, snr=5.0)
    >>> sum(vars(parts).values()).round(6) == test_error(2.0, 0.5, snr=5.0).round(6)
    np.True_
    """
    law = as_law(law, _longest(t))
    now, end = law.test(t), law.test(np.inf)
    frozen = end._replace(noise=np.zeros(())).total(snr, inr)
    signal = now._replace(noise=np.zeros(())).total(snr, inr)
    floor = np.asarray(1 / np.asarray(snr, dtype=np.float64))
    fitted = now._replace(signal=np.zeros(()), start=np.zeros(())).total(snr, inr)
    return Parts(floor, signal - frozen, frozen, fitted - floor)


def mode_errors(
    t: ArrayLike, eigenvalue: ArrayLike, snr: ArrayLike, inr: ArrayLike = 0.0
) -> tuple[Array, Array]:
    r"""Return what one mode adds to the test error, as (unlearned, overfitted).

    :math:`(1 + \mathrm{INR})\,e^{-2lt}` and :math:`(1 - e^{-lt})^2 / (l\,\mathrm{SNR})`; a mode
    with :math:`l = 0` never moves.

    >>> mode_errors(1.0, [0.0, 1.0], snr=2.0)[0].round(4)
    array([1.    , 0.1353])
    """
    t = _not_negative("t", t)
    rate, snr = _not_negative("eigenvalue", eigenvalue), _positive("snr", snr, infinite=True)
    moving = np.where(rate > 0, rate, 1.0)
    noise = np.where(rate > 0, np.expm1(-rate * t) ** 2 / moving, 0.0) / snr
    return np.asarray((1 + _not_negative("inr", inr)) * np.exp(-2 * rate * t)), np.asarray(noise)


def mode_time(eigenvalue: ArrayLike, snr: ArrayLike, inr: ArrayLike = 0.0) -> Array:
    r"""Return the best time to stop one mode, :math:`\ln(1 + l\,\mathrm{SNR}(1+\mathrm{INR}))/l`.

    >>> mode_time([0.0, 1.0], snr=5.0).round(4)
    array([5.    , 1.7918])
    """
    rate = _not_negative("eigenvalue", eigenvalue)
    gain = _positive("snr", snr) * (1 + _not_negative("inr", inr))
    moving = np.where(rate > 0, rate, 1.0)
    return np.asarray(np.where(rate > 0, np.log1p(rate * gain) / moving, gain))


# pytest would take the quantity's name for that of a test.
test_error.__test__ = False  # type: ignore[attr-defined]


def _longest(t: ArrayLike) -> float:
    """Return the longest finite time."""
    t = _not_negative("t", t, infinite=True)
    return float(np.where(np.isinf(t), 0.0, t).max(initial=0.0))
