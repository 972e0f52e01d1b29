"""Pictures of forecasts: a run with its bands, error over the lead time, calibration, bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pantarhei.bayes import Predictive
from pantarhei.bayes.scores import calibration_curve


def run_figure(
    times: Tensor,
    came: Tensor,
    told: Predictive,
    *,
    label: str,
    title: str = "",
    limit: float | None = None,
) -> Figure:
    """Draw one target over a run (N,) and its forecast: 95 % bands, aleatoric alone and in total.

    ``times`` are those at which the forecast is for, in seconds.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    t, mean = times.numpy(), told.mean.numpy()
    for variance, name, alpha in (
        (told.variance, "95 %, with the doubt of the ensemble", 0.2),
        (told.aleatoric, "95 %, noise alone", 0.35),
    ):
        half = 1.96 * variance.sqrt().numpy()
        axes.fill_between(t, mean - half, mean + half, color="C0", alpha=alpha, lw=0, label=name)
    axes.plot(t, mean, color="C0", lw=1.2, label="forecast")
    axes.plot(t, came.numpy(), color="0.1", lw=0.9, label="what came")
    if limit is not None:
        axes.axhline(limit, color="C3", lw=0.8, ls="--", label="limit")
    axes.set(xlabel="time in s", ylabel=label, title=title, xlim=(t[0], t[-1]))
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    return figure


def lead_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], label: str = "target", title: str = ""
) -> Figure:
    """Draw root mean square error, NLL and coverage over the lead time, a line for each method."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = (
        ("rmse", f"RMSE of {label}"),
        ("nll", "NLL in nats"),
        ("coverage", "coverage of the 95 % interval"),
    )
    for axes, (key, name) in zip(figure.subplots(1, 3), panels, strict=True):
        for method, rows in curves.items():
            axes.plot(
                [r["seconds"] for r in rows], [r[key] for r in rows], "o-", ms=3, label=method
            )
        if key == "coverage":
            axes.axhline(0.95, color="0.5", lw=0.8, ls="--")
        axes.set(xlabel="lead time in s", ylabel=name)
    lines, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", frameon=False, fontsize=8, ncols=5)
    figure.suptitle(title)
    return figure


def calibration_figure(pits: Mapping[str, Tensor], title: str = "") -> Figure:
    """Draw the share of observations below each forecast quantile; the diagonal is calibrated."""
    figure = Figure(figsize=(4.2, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", lw=0.8)
    for name, pit in pits.items():
        wanted, found = calibration_curve(pit)
        axes.plot(wanted.numpy(), found.numpy(), "o-", ms=3, label=name)
    axes.set(xlabel="forecast probability", ylabel="share of observations below", title=title)
    axes.legend(frameon=False, fontsize=8)
    return figure


def bar_figure(
    rows: Sequence[Mapping[str, Any]], name: str, keys: Mapping[str, str], title: str = ""
) -> Figure:
    """Draw horizontal bars: a panel for each of ``keys`` (with its label), a bar for each row."""
    figure = Figure(figsize=(4.5 * len(keys), 0.9 + 0.28 * len(rows)), layout="constrained")
    places = np.arange(len(rows))[::-1]
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, (key, label) in zip(panels, keys.items(), strict=True):
        axes.barh(places, [row[key] for row in rows], color="C0")
        axes.set(xlabel=label)
    panels[0].set_yticks(places, [str(row[name]) for row in rows])
    figure.suptitle(title)
    return figure
