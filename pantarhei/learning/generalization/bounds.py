r"""Complexity terms: the plain norm bound, and the one that knows which directions training moved.

For readout weights :math:`v` over :math:`N_h` features :math:`h(x)`, the empirical Rademacher
complexity of :math:`\{v \cdot h(x) : |v| \le C\}` on P examples is at most
:math:`\frac{C}{P}\sqrt{\mathrm{tr}\, H^T H}`. A loss that is K-Lipschitz in the prediction has,
in expectation, a gap between test and training error of at most 2 K times that. The question is
which C. Both answers are derived from the paper's argument (Advani and Saxe, arXiv 1710.03667); its
own theorem and constants were not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pantarhei.errors import RequestError
from pantarhei.learning.generalization.flow import pair
from pantarhei.learning.generalization.spectrum import Array, _not_negative, _numbers, _positive

# max over l of (1 - exp(-l t))^2 / l is this times t, at l t = 1.2564.
_CAP = 0.40726


@dataclass(frozen=True)
class Bounds:
    r"""Complexity terms of a readout trained by gradient flow for a time (...).

    Attributes:
        plain: :math:`\frac{c\sqrt{N_h}}{P}\sqrt{\mathrm{tr} H^T H}`: every weight may be as large
            as ``weight_scale`` c. It grows with the width, whatever training does.
        conditioned: :math:`\frac{|v(t)|}{P}\sqrt{\mathrm{tr} H^T H}` with the exact norm that
            training reaches from its start. Directions without data stay where they began, so from
            0 it involves ``rank`` directions at most: largest where the smallest non-zero
            eigenvalue is, at P features; small early in training.
        capped: The same with the bound on the norm that needs no targets but their size,
            :math:`|v(t)|^2 \le |y|^2 \min(1/l_{\min},\, 0.407\,t)`, plus what was there at the
            start.
        norm: :math:`|v(t)|`.
        smallest: The smallest non-zero eigenvalue of :math:`H H^T`.
        rank: Effective dimension: how many directions have data.
    """

    plain: Array
    conditioned: Array
    capped: Array
    norm: Array
    smallest: float
    rank: int


def complexity(norm: ArrayLike, trace: ArrayLike, examples: int) -> Array:
    """Return the Rademacher complexity of readouts of at most ``norm``: C sqrt(tr H^T H) / P.

    >>> complexity(2.0, trace=25.0, examples=10)
    array(1.)
    """
    return np.asarray(_not_negative("norm", norm) * np.sqrt(_numbers("trace", trace)) / examples)


def norm_cap(t: ArrayLike, targets_norm: ArrayLike, smallest: ArrayLike) -> Array:
    """Return the largest norm that a readout can have after time ``t`` from 0.

    >>> norm_cap([1.0, np.inf], targets_norm=3.0, smallest=0.01).round(2)
    array([ 1.91, 30.  ])
    """
    t = _not_negative("t", t, infinite=True)
    cap = np.minimum(1 / _positive("smallest", smallest), _CAP * t)
    return np.asarray(_not_negative("targets_norm", targets_norm) * np.sqrt(cap))


def generalization_bounds(
    features: ArrayLike,
    targets: ArrayLike,
    t: ArrayLike,
    *,
    weight_scale: float = 1.0,
    start: ArrayLike | None = None,
) -> Bounds:
    r"""Return both complexity terms for a readout of ``features`` (P, N_h) after times ``t`` (T,).

    ``targets`` (P,) are fitted by gradient flow on half the summed squared error from ``start``
    (N_h,), default 0. In eigenvectors :math:`u_i` of the features' correlation,

    .. math:: |v(t)|^2 = \sum_{l_i > 0} \Big(\frac{(1 - e^{-l_i t})\, u_i \cdot y}{\sqrt{l_i}}
              + e^{-l_i t} v_i(0)\Big)^2 + |(1 - \Pi)\, v(0)|^2.

    >>> h = np.random.default_rng(0).normal(size=(30, 60)) / np.sqrt(60)
    >>> found = generalization_bounds(h, h[:, 0], [0.1, np.inf])
    >>> found.rank, bool((found.conditioned <= found.capped).all())
    (30, True)
    """
    h, y = pair(features, targets)
    if y.ndim != 1:
        raise RequestError("targets must be one number an example: call this for each output.")
    t = _not_negative("t", t, infinite=True).reshape(-1)
    left, singular, right = np.linalg.svd(h, full_matrices=False)
    there = singular > singular.max() * max(h.shape) * np.finfo(np.float64).eps
    left, singular, right = left[:, there], singular[there], right[there]
    decay = np.exp(-(singular**2) * t[:, None])
    v0 = np.zeros(h.shape[1]) if start is None else _numbers("start", start)
    moving = right @ v0
    frozen = float(((v0 - right.T @ moving) ** 2).sum())
    modes = (1 - decay) * (left.T @ y) / singular + decay * moving
    norm = np.sqrt((modes**2).sum(1) + frozen)
    trace, smallest = float((h**2).sum()), float(singular.min() ** 2)
    cap = norm_cap(t, float(np.linalg.norm(y)), smallest)
    return Bounds(
        plain=complexity(weight_scale * np.sqrt(h.shape[1]), trace, len(h)),
        conditioned=complexity(norm, trace, len(h)),
        capped=complexity(cap + np.linalg.norm(v0), trace, len(h)),
        norm=norm,
        smallest=smallest,
        rank=len(singular),
    )
