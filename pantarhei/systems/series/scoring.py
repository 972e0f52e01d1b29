"""Scores of forecasts over windows: at one lead, over the lead times, and with runs as the unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pantarhei.bayes import Predictive
from pantarhei.bayes import scores as proper
from pantarhei.errors import RequestError

_SCORES = (
    "rmse", "mae", "nll", "nll_mixture", "crps", "coverage", "width", "z_sd", "calibration_error",
    "epistemic", "aleatoric",
)  # fmt: skip


def score(told: Predictive, y: Tensor, where: Tensor | None = None) -> dict[str, float]:
    """Return the scores of a forecast of ``y`` (N, ...), over the windows ``where`` (N,) is true.

    ``rmse`` and ``mae`` in the targets' units; ``nll`` (nats, of the Gaussian with the mixture's
    mean and variance), ``nll_mixture`` and ``crps``; ``coverage`` of the central 95 % interval and
    its mean ``width``; ``z_sd``, the standard deviation of (y - m)/sqrt(V), and the
    ``calibration_error``; the means of the standard deviations ``epistemic`` and ``aleatoric``.
    NaN throughout where no window is left.

    >>> told = Predictive(torch.zeros(2, 5, 1), torch.ones(2, 5, 1))
    >>> score(told, torch.full((5, 1), 2.0))["rmse"]
    2.0
    """
    if told.mean.shape != y.shape:
        raise RequestError(
            f"The forecast has shape {tuple(told.mean.shape)} and what came {tuple(y.shape)}."
        )
    if where is not None:
        told, y = told[where], y[where]
    if not len(y):
        return {"windows": 0, **dict.fromkeys(_SCORES, float("nan"))}
    error, variance, pit = y - told.mean, told.variance, told.pit(y)
    found = {
        "rmse": float((error**2).mean().sqrt()),
        "mae": float(error.abs().mean()),
        "nll": float(told.nll(y).mean()),
        "nll_mixture": float(told.nll(y, mixture=True).mean()),
        "crps": float(told.crps(y).mean()),
        "coverage": float(proper.coverage(pit)),
        "width": float(proper.sharpness(variance)),
        "z_sd": float((error / variance.sqrt()).std()) if len(y) > 1 else float("nan"),
        "calibration_error": float(proper.calibration_error(pit)),
        "epistemic": float(told.epistemic.sqrt().mean()),
        "aleatoric": float(told.aleatoric.sqrt().mean()),
    }
    return {"windows": len(y), **found}


def lead_curve(
    told: Predictive, y: Tensor, leads: Sequence[int], step: float = 1.0
) -> list[dict[str, Any]]:
    """Return a row of scores for each lead time; ``told`` is of (N, leads, G), ``step`` in s."""
    return [
        {"lead": lead, "seconds": lead * step, **score(told[:, i], y[:, i])}
        for i, lead in enumerate(leads)
    ]


def bootstrap_by_run(
    statistic: Callable[[Tensor], Any],
    run: Tensor,
    *,
    draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return an interval of ``statistic(index)`` over runs drawn again with replacement.

    ``run`` (N,) says which run a window is of. Windows of a run are far from independent, so whole
    runs are drawn, and ``index`` are the windows of the draw.
    """
    members = [torch.nonzero(run == r)[:, 0] for r in run.unique()]
    if len(members) < 2:
        raise RequestError("A bootstrap over runs needs two runs or more.")
    rng = np.random.default_rng(seed)
    drawn = [
        float(
            statistic(
                torch.cat([members[i] for i in rng.integers(len(members), size=len(members))])
            )
        )
        for _ in range(draws)
    ]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
