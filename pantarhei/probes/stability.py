r"""The edge of stability: the curvature at which an optimizer's steps begin to grow.

Gradient descent with rate :math:`\eta` on a quadratic with curvature :math:`\lambda` multiplies the
distance from the minimum by :math:`1 - \eta\lambda` in each step: it diverges where
:math:`\lambda > 2/\eta`. In full-batch training the sharpness rises to this threshold and stays
there (Cohen et al. 2021, arXiv 2103.00065); with small batches it settles below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from pantarhei.errors import RequestError
from pantarhei.probes.curvature import (
    Hessian,
    Operator,
    Preconditioned,
    learning_rates,
    preconditioner,
)


def threshold(optimizer: Optimizer, lr: float | None = None) -> float:
    r"""Return the largest curvature at which the optimizer is stable, at its learning rate now.

    =================================  ================================================
    SGD                                :math:`2/\eta`
    with momentum, dampening d         :math:`2(1+\beta)/((1-d)\,\eta)`
    with Nesterov's momentum           :math:`2(1+\beta)/((1+2\beta)\,\eta)`
    Adam, AdamW, Adamax                :math:`2(1+\beta_1)/((1-\beta_1)\,\eta)`, 38/η for 0.9
    NAdam                              :math:`2(1+\beta_1)/((1-\beta_1)(1+2\beta_1)\,\eta)`
    RMSprop, Adagrad                   :math:`2(1+\mu)/\eta`, :math:`\mu` = 0 for Adagrad
    =================================  ================================================

    It is the modulus at which the slowest root of the update's recursion on a quadratic leaves the
    unit circle, at -1 (Cohen et al. 2021, 2022, arXiv 2207.14484). For all but SGD it is about the
    preconditioned curvature, :func:`step_curvature`; the correction of Adam's first
    :math:`1/(1-\beta_1)` steps is left out. Weight decay adds its coefficient to every eigenvalue,
    which is nothing beside a threshold of :math:`2/\eta`, and is left out too.

    ``lr`` replaces the optimizer's; where groups differ in it, theirs is the largest one.

    Raises :class:`RequestError` for other optimizers, a rate of zero, and groups that differ in
    their momentum.

    >>> weights = [torch.nn.Parameter(torch.zeros(2))]
    >>> threshold(torch.optim.SGD(weights, lr=0.1)), threshold(torch.optim.SGD(weights, 0.1, 0.5))
    (20.0, 30.0)
    >>> round(threshold(torch.optim.Adam(weights, lr=0.1)), 9)
    380.0
    """
    kind = type(optimizer)
    if kind not in _FACTORS:
        raise RequestError(
            f"the stability threshold of {kind.__name__} is not known here: choose "
            f"{', '.join(sorted(k.__name__ for k in _FACTORS))}, or compare with your own."
        )
    factors = {_FACTORS[kind](group) for group in optimizer.param_groups}
    if len(factors) > 1:
        raise RequestError(
            "the optimizer's groups differ in their momentum, and have no common threshold: "
            "measure them one at a time with parameters=."
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise RequestError("the optimizer maximises the loss: there is no stability threshold.")
    rate = max(_rate(group) for group in optimizer.param_groups) if lr is None else lr
    if not rate > 0:
        raise RequestError(f"the learning rate is {rate}: no step, and so no threshold.")
    return factors.pop() / rate


def step_curvature(hessian: Hessian, optimizer: Optimizer) -> tuple[Operator, float]:
    r"""Return the matrix on which the optimizer's stability depends, and its threshold.

    It is the Hessian for SGD with one learning rate, and otherwise :class:`Preconditioned` with
    :math:`D = (\eta_i / \eta_{\max}) / P_i` : stable where its largest eigenvalue is below
    :func:`threshold`.

    >>> net = torch.nn.Linear(2, 1)
    >>> hessian = Hessian(net, lambda m, b: m(b).square().mean(), torch.ones(1, 2))
    >>> matrix, limit = step_curvature(hessian, torch.optim.SGD(net.parameters(), lr=0.1))
    >>> matrix is hessian, limit
    (True, 20.0)
    """
    limit = threshold(optimizer)
    rates = learning_rates(hessian.objective, optimizer)
    even = bool((rates == rates.max()).all())
    if type(optimizer) is torch.optim.SGD and even:
        return hessian, limit
    divisor = preconditioner(hessian.objective, optimizer)
    largest = max(_rate(group) for group in optimizer.param_groups)
    return Preconditioned(hessian, divisor, rates=rates / largest), limit


@dataclass(frozen=True)
class Edge:
    """What :func:`edge_of_stability` found, in steps of training.

    ``reached``: the first recorded step at which the sharpness was within the tolerance of the
    threshold or above, ``None`` if never. From then on: ``inside``, the share of records within the
    tolerance, ``ratio``, the mean of sharpness / threshold, and ``stretch``, first and last step of
    the longest time without a record outside; ``stayed`` is its length.
    """

    reached: int | None
    inside: float
    ratio: float
    stretch: tuple[int, int] | None

    @property
    def stayed(self) -> int:
        """Steps in the longest stretch within the tolerance; 0 for a single record."""
        return self.stretch[1] - self.stretch[0] if self.stretch else 0


def edge_of_stability(
    steps: Sequence[float],
    sharpness: Sequence[float],
    threshold: float | Sequence[float],
    *,
    tolerance: float = 0.1,
) -> Edge:
    r"""Find when a recorded sharpness reached the threshold, and how long it stayed there.

    A record is inside where :math:`|\lambda / \lambda_{\max} - 1| \le` ``tolerance``. Records that
    are not finite are left out. ``threshold`` is one number, or one for each record (schedules).

    Raises :class:`RequestError` for series of different lengths and steps that do not rise.

    >>> edge_of_stability([0, 10, 20, 30, 40], [5.0, 12.0, 19.0, 21.0, 20.5], 20.0)
    Edge(reached=20, inside=1.0, ratio=1.0083333333333333, stretch=(20, 40))
    """
    when, value = np.asarray(steps, float), np.asarray(sharpness, float)
    limit = np.asarray(threshold, float)
    if when.ndim != 1 or when.shape != value.shape or limit.shape not in ((), when.shape):
        raise RequestError(
            f"steps, sharpness and threshold have the shapes {when.shape}, {value.shape} and "
            f"{limit.shape}: give one number for each record."
        )
    if not 0 < tolerance < 1:
        raise RequestError(f"tolerance={tolerance}: choose a fraction between 0 and 1.")
    if (np.diff(when) <= 0).any():
        raise RequestError("steps do not rise from record to record: sort them.")
    ratio = value / limit
    known = np.isfinite(ratio)
    when, ratio = when[known], ratio[known]
    above = np.flatnonzero(ratio >= 1 - tolerance)
    if not len(above):
        return Edge(None, 0.0, math.nan, None)
    when, ratio = when[above[0] :], ratio[above[0] :]
    inside = np.abs(ratio - 1) <= tolerance
    return Edge(int(when[0]), float(inside.mean()), float(ratio.mean()), _longest(when, inside))


def _longest(when: np.ndarray, inside: np.ndarray) -> tuple[int, int] | None:
    flips = np.flatnonzero(np.diff(np.concatenate([[False], inside, [False]]).astype(int)))
    runs = [(when[a], when[b - 1]) for a, b in flips.reshape(-1, 2)]
    if not runs:
        return None
    first, last = max(runs, key=lambda run: run[1] - run[0])
    return int(first), int(last)


def _rate(group: dict[str, Any]) -> float:
    return float(group["lr"])


def _sgd(group: dict[str, Any]) -> float:
    beta = group["momentum"]
    if not beta:
        return 2.0
    if group["nesterov"]:
        return 2 * (1 + beta) / (1 + 2 * beta)
    return 2 * (1 + beta) / (1 - group["dampening"])


def _adam(group: dict[str, Any]) -> float:
    beta = group["betas"][0]
    return 2 * (1 + beta) / (1 - beta)


def _nadam(group: dict[str, Any]) -> float:
    return _adam(group) / (1 + 2 * group["betas"][0])


_FACTORS: dict[type, Callable[[dict[str, Any]], float]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adamax: _adam,
    torch.optim.NAdam: _nadam,
    torch.optim.RMSprop: lambda group: 2 * (1 + group["momentum"]),
    torch.optim.Adagrad: lambda group: 2.0,
}
