r"""Progressive sharpening where it can be solved: a two-layer linear network.

.. math:: f(x) = \frac{a^\top B x}{\gamma\sqrt{ND}}, \qquad a \in R^N,\; B \in R^{N\times D},\;
          \text{entries } N(0, 1)

with whitened inputs, :math:`L = \tfrac12\lVert w - w_*\rVert^2` for
:math:`w = B^\top a / (\gamma\sqrt{ND})`, and the learning rate :math:`\eta_0\gamma^2`. The
sharpness that :math:`2/\eta_0` is compared with is the top eigenvalue of :math:`\gamma^2\Theta`,

.. math:: \lambda = \frac{\lVert a\rVert^2 + \sigma_{max}(B)^2}{ND}.

For :math:`N\to\infty` it starts at 2/D. Since :math:`a a^\top - B B^\top` is conserved, the vectors
a and :math:`B w_*/\lVert w_*\rVert` rotate hyperbolically by an angle :math:`\theta`,

.. math:: \lambda = \frac{2\cosh 2\theta}{D}, \qquad
          \sinh 2\theta = \gamma\sqrt{D/N}\; \frac{w\cdot w_*}{\lVert w_*\rVert}.

Features are learnt, and the sharpness rises, as far as :math:`\gamma^2/N` is not zero: it is 1
under muP and 1/N under NTP. Derived here (the paper, arXiv 2402.17457, studies such a network by
simulation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from pantarhei.errors import RequestError


@dataclass(frozen=True)
class Descent:
    """A simulated training: sharpness and loss at the recorded times (rate times steps)."""

    times: NDArray[np.float64]
    sharpness: NDArray[np.float64]
    loss: NDArray[np.float64]
    imbalance: NDArray[np.float64]  # relative change of a a^T - B B^T, Frobenius


def final_sharpness(
    dimension: ArrayLike, target_norm: ArrayLike = 1.0, features: ArrayLike = 1.0
) -> NDArray[np.float64]:
    r"""Return the sharpness at the end of training, for :math:`N \to \infty`.

    .. math:: \lambda_\infty = \frac2D \sqrt{1 + \frac{\gamma^2}{N} D \lVert w_*\rVert^2}

    Args:
        dimension: D.
        target_norm: :math:`\lVert w_*\rVert`.
        features: :math:`\gamma^2/N`: 1 under muP, 1/N under NTP.

    >>> float(final_sharpness(16).round(4)), float(final_sharpness(16, features=0.0))
    (0.5154, 0.125)
    """
    d, norm = np.asarray(dimension, float), np.asarray(target_norm, float)
    _check(dimension=d)
    return np.asarray(2 / d * np.sqrt(1 + np.asarray(features, float) * d * norm**2))


def sharpness_curve(
    times: ArrayLike, dimension: float, target_norm: float = 1.0, features: float = 1.0
) -> NDArray[np.float64]:
    r"""Return the sharpness under gradient flow at ``times`` (:math:`\eta_0` times steps).

    With :math:`u = e^{2\theta}`, :math:`W = \lVert w_*\rVert` and :math:`c = \sqrt{N/D}/\gamma`,

    .. math:: \dot u = \frac{\gamma}{\sqrt{ND}} (2 W u - c u^2 + c), \qquad u(0) = 1,

    a Riccati equation with the roots :math:`u_\pm = (W \pm \sqrt{W^2 + c^2})/c`.

    ``features`` is :math:`\gamma^2/N` as in :func:`final_sharpness`, and not zero here.

    >>> sharpness_curve([0.0, 1e3], 16).round(4).tolist()
    [0.125, 0.5154]
    """
    _check(dimension=dimension, features=features)
    c = (features * dimension) ** -0.5
    pace = (features / dimension) ** 0.5
    root = np.hypot(target_norm, c)
    high, low = (target_norm + root) / c, (target_norm - root) / c
    faded = (1 - high) / (1 - low) * np.exp(-pace * c * (high - low) * np.asarray(times, float))
    u = (high - faded * low) / (1 - faded)
    return np.asarray((u + 1 / u) / dimension)


def descend(
    width: int,
    dimension: int,
    *,
    target_norm: float = 1.0,
    features: float = 1.0,
    lr: float = 0.05,
    steps: int = 4000,
    seed: int = 0,
    record: int = 100,
) -> Descent:
    r"""Train one network of finite width by gradient descent, in float64.

    Args:
        width, dimension: N and D.
        target_norm: :math:`\lVert w_*\rVert`; its direction does not matter.
        features: :math:`\gamma^2/N`: 1 under muP, 1/N under NTP.
        lr: :math:`\eta_0`; the step on the weights is :math:`\eta_0\gamma^2`.
        steps: Number of steps.
        seed: Of the initial weights.
        record: Steps between two records.

    >>> run = descend(256, 16, features=1 / 256, steps=200)
    >>> bool(abs(run.sharpness[-1] / run.sharpness[0] - 1) < 0.1)
    True
    """
    _check(width=width, dimension=dimension, features=features, lr=lr, record=record)
    generator = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((width,), (width, dimension))
    )
    gamma = (features * width) ** 0.5
    scale = 1 / (gamma * (width * dimension) ** 0.5)
    target = torch.zeros(dimension, dtype=torch.float64)
    target[0] = target_norm
    start, rows = (a.clone(), b.clone()), []
    for step in range(steps + 1):
        error = scale * (a @ b) - target
        if step % record == 0 or step == steps:
            top = torch.linalg.eigvalsh(b.T @ b)[-1]
            sharpness = float(a @ a + top) / (width * dimension)
            half = 0.5 * float(error @ error)
            rows.append((lr * step, sharpness, half, _imbalance(start, (a, b))))
        force = lr * gamma**2 * scale * error
        a, b = a - b @ force, b - torch.outer(a, force)
    return Descent(*np.array(rows).T)


def _imbalance(
    start: tuple[torch.Tensor, torch.Tensor], now: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Return the Frobenius norm of the change of a a^T - B B^T over that of its start."""
    both = torch.cat([start[0][:, None], start[1], now[0][:, None], now[1]], 1)
    signs = torch.ones(both.shape[1], dtype=both.dtype)
    d = start[1].shape[1]
    signs[1 : d + 1], signs[d + 1] = -1, -1  # start: + a a^T - B B^T; now: - a a^T + B B^T
    gram = both.T @ both
    first = gram[: d + 1, : d + 1] * signs[: d + 1]
    whole = gram * signs
    return float(torch.trace(whole @ whole).clamp(min=0).sqrt() / torch.trace(first @ first).sqrt())


def _check(**positive: Any) -> None:
    for name, value in positive.items():
        if not np.all(np.asarray(value, float) > 0):
            raise RequestError(f"{name}={value!s}: choose a positive number.")
