"""Alarms on a forecast: will the target cross a limit soon, how early is it said, at what price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pantarhei.data.series import Windows
from pantarhei.errors import RequestError

Array = NDArray[np.float64]


def onsets(windows: Windows, limit: float, within: int) -> tuple[Tensor, Tensor]:
    """Tell which windows are quiet (N,), and which of them see an onset (N,).

    Quiet: the (only) target is below ``limit`` at present. Onset: it exceeds it in one of the next
    ``within`` frames.
    """
    if not 1 <= within <= windows.horizon:
        raise RequestError(f"Onsets within {within} frames need a horizon of as many.")
    _, _, target = windows.tensors()
    if target.shape[2] != 1:
        raise RequestError(f"An alarm watches one target, not {target.shape[2]}.")
    quiet = windows.present[:, 0] < limit
    return quiet, quiet & (target[:, :within, 0] > limit).any(1)


def onset_auc(probability: Tensor, quiet: Tensor, onset: Tensor) -> float:
    """Return the chance that an onset is given a higher probability than no onset; ties half.

    NaN where there is none of either.

    >>> yes = torch.tensor([True, True, True])
    >>> onset_auc(torch.tensor([0.9, 0.2, 0.1]), yes, torch.tensor([True, False, False]))
    1.0
    """
    from scipy.stats import rankdata

    ranks = rankdata(probability[quiet].numpy())
    hit = onset[quiet].numpy()
    pairs = int(hit.sum()) * int((~hit).sum())
    if not pairs:
        return float("nan")
    return float((ranks[hit].sum() - hit.sum() * (hit.sum() + 1) / 2) / pairs)


def event_leads(probability: Tensor, windows: Windows, limit: float, level: float) -> Array:
    """Return for every onset how many frames ahead it has been announced without a break.

    An onset is a frame above ``limit`` after one below; the alarm is on in windows in which
    ``probability`` exceeds ``level``. 0: not announced. At most the windows' horizon is counted.
    """
    quiet, onset = onsets(windows, limit, 1)
    return _streak((probability > level) & quiet, windows)[onset.numpy()].clip(max=windows.horizon)


def alarm_table(
    probability: Tensor,
    windows: Windows,
    limit: float,
    *,
    step: float,
    within: int,
    levels: Sequence[float] | None = None,
    false_cost: float = 1.0,
    miss_cost: float = 100.0,
) -> list[dict[str, Any]]:
    """Return a row for each alarm level: what is caught, how early, how often in vain, the cost.

    ``caught`` is the share of onset windows that alarm (the ROC's ordinate), ``false_rate`` that of
    the other quiet windows that do (its abscissa). ``false_alarms`` counts spells of alarm that no
    onset within ``within`` frames justifies, for each 100 s of quiet time. ``announced`` is the
    share of onsets that were announced in their last quiet frame, and ``lead`` the mean of the
    seconds by which onsets were, 0 for those that were not. ``cost``, for each 100 s of quiet time,
    is ``false_cost`` for a false alarm and ``miss_cost`` for an onset not announced.
    """
    quiet, onset = onsets(windows, limit, within)
    if not quiet.any():
        raise RequestError(
            f"No window is below the limit of {limit:g}: there is nothing to warn of."
        )
    seconds = float(quiet.sum()) * step
    spread = np.quantile(probability[quiet].numpy(), np.linspace(0, 0.999, 60))
    rows = []
    for level in np.unique(spread).tolist() if levels is None else levels:
        alarm = (probability > level) & quiet
        vain = alarm & ~onset
        spells = int((_streak(vain, windows) == 1).sum())
        leads = event_leads(probability, windows, limit, level)
        missed = int((leads == 0).sum())
        rows.append(
            {
                "level": level,
                "caught": float(alarm[onset].float().mean()),
                "false_rate": float(vain[quiet & ~onset].float().mean()),
                "false_alarms": 100 * spells / seconds,
                "announced": 1 - missed / len(leads) if len(leads) else float("nan"),
                "lead": step * float(leads.mean()) if len(leads) else float("nan"),
                "cost": 100 * (false_cost * spells + miss_cost * missed) / seconds,
            }
        )
    return rows


def _streak(on: Tensor, windows: Windows) -> NDArray[np.int64]:
    """Count for each window the frames on end, up to it and in its run, in which ``on`` is true."""
    place = np.arange(len(on))
    joined = np.zeros(len(on), bool)
    run, origin = windows.run.numpy(), windows.origin.numpy()
    joined[1:] = (run[1:] == run[:-1]) & (origin[1:] == origin[:-1] + windows.stride)
    off = np.where(on.numpy(), -1, place)  # where a streak cannot reach back past
    off = np.maximum(off, np.where(joined, -1, place - 1))
    counted: NDArray[np.int64] = place - np.maximum.accumulate(off)
    return counted


def probability_above(told: Any, limit: float) -> Tensor:
    """Return the largest probability over the leads (N,) that the only target exceeds ``limit``."""
    return torch.as_tensor(told.exceeds(limit)[..., 0]).amax(1)
