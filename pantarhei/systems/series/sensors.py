"""What each sensor is worth, what a forecast owes to it, and what its failure does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pantarhei.bayes import integrated_gradients
from pantarhei.data.series import Layout, Recording, Signal, Windows
from pantarhei.errors import RequestError, nearest
from pantarhei.systems.series.forecaster import Forecaster, train_forecaster
from pantarhei.systems.series.scoring import score

FAILURES = ("dead", "stuck", "saturated", "noisy", "dropped")


def ablate(
    layout: Layout,
    train: Windows,
    test: Windows,
    sets: Mapping[str, Sequence[str]],
    *,
    lead: int,
    **options: Any,
) -> list[dict[str, Any]]:
    """Train a direct forecaster on each set of sensors, and score it at one lead time.

    ``sets`` names the groups of each; ``options`` go to :func:`train_forecaster`.
    """
    rows = []
    for name, groups in sets.items():
        found = train_forecaster(
            layout, train, groups=groups, leads=(lead,), label=f"sensors: {name}", **options
        )
        _, _, target = test.tensors()
        rows.append({"inputs": name, **score(found.forecast(test)[:, 0], target[:, lead - 1])})
    return rows


def break_sensor(
    recording: Recording,
    channel: str,
    kind: Literal["dead", "stuck", "saturated", "noisy", "dropped"] = "dead",
    *,
    at: float = 0.0,
    value: float | None = None,
    seed: int = 0,
) -> Recording:
    """Return the run with a sensor that fails ``at`` seconds after its first sample.

    ``dead`` reads ``value``, 0 unless given; ``stuck`` holds its last good sample; ``saturated``
    reads the largest magnitude it had before (or ``value``); ``noisy`` reads white noise of
    standard deviation ``value``, that of the sensor unless given; ``dropped`` reads nothing.
    """
    if kind not in FAILURES:
        raise RequestError(
            f"Unknown failure '{kind}': choose {', '.join(FAILURES)}.{nearest(kind, FAILURES)}"
        )
    signal = recording[channel]
    first = int(signal.count(np.array([signal.span[0] + at]))[0]) if at > 0 else 0
    values = np.array(signal.values, np.float64)
    good = values[:first] if first else values
    if kind == "dead":
        values[first:] = 0.0 if value is None else value
    elif kind == "stuck":
        values[first:] = good[~np.isnan(good)][-1 if first else 0] if value is None else value
    elif kind == "saturated":
        values[first:] = np.nanmax(np.abs(good)) if value is None else value
    elif kind == "noisy":
        sd = float(np.nanstd(good)) if value is None else value
        values[first:] = sd * np.random.default_rng(seed).standard_normal(len(values) - first)
    else:
        values[first:] = np.nan
    changed = Signal(values.astype(signal.values.dtype), signal.rate, signal.times, signal.start)
    return replace(recording, signals={**recording.signals, channel: changed})


def attribute(
    forecaster: Forecaster,
    windows: Windows,
    index: Tensor,
    *,
    lead: int,
    of: Literal["mean", "log variance"] = "mean",
    start: tuple[Tensor, Tensor, Tensor] | None = None,
    target: int = 0,
    points: int = 64,
) -> list[dict[str, Any]]:
    """Return what each sensor and frame contributes to forecasts, by integrated gradients.

    For the windows ``index``: rows of ``group`` and ``frame`` (0 the last seen, +1 the first to
    come) with the mean ``share`` and mean ``magnitude`` of the contribution, in the target's units
    for the mean (nats for the logarithm of the total variance). Over all rows the shares add up to
    the mean difference from the forecast at the baseline: the mean input of the windows ``start``
    (past, future, target), a stable operating point, or the mean of training unless given.
    """
    if forecaster.mode != "direct" or lead not in forecaster.leads:
        raise RequestError(f"A direct forecaster of lead {lead} can be asked, not this one.")
    encoder, ensemble = forecaster.encoder, forecaster.ensemble
    x = encoder(*windows.batch(index)[:2])
    baseline = torch.zeros(x.shape[1])
    if start is not None:
        baseline = encoder(*start[:2]).mean(0)
    column = forecaster.leads.index(lead) * len(forecaster.targets.mean) + target
    device = next(ensemble.parameters()).device
    ensemble.eval()

    def output(x: Tensor) -> Tensor:
        means, variances = ensemble(x)
        means, variances = means[..., column], variances[..., column]
        if of == "mean":
            return torch.as_tensor(means.mean(0))
        return torch.log(variances.mean(0) + means.var(0, correction=0))

    shares = integrated_gradients(output, x.to(device), baseline.to(device), points=points).cpu()
    if of == "mean":
        shares = shares * float(forecaster.targets.sd[target])
    return [
        {
            "group": group,
            "frame": frame,
            "share": float(shares[:, i].mean()),
            "magnitude": float(shares[:, i].abs().mean()),
        }
        for i, (group, frame) in enumerate(encoder.owners)
    ]
