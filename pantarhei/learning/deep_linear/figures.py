"""The pictures of the deep linear theory: mode curves, depth, gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

from pantarhei.learning.deep_linear.prediction import Prediction

Array = NDArray[np.float64]

_SHOWN = 12  # curves that can be told apart


def mode_curves(
    prediction: Prediction,
    simulated: tuple[Array, Array] | None = None,
    *,
    title: str = "",
    unit: str = "time",
    losses: Mapping[str, Array] | None = None,
) -> Figure:
    """Draw predicted strengths over time with their error bars, simulated ones as points on them.

    ``simulated`` is (times, strengths (T, K)). ``losses`` (by default the prediction's own) are
    drawn below.
    """
    figure = Figure(figsize=(8, 6.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    low, middle, high = prediction.band()
    count = max(1, int((prediction.modes.s > 0).sum()))
    shown = np.unique(np.linspace(0, count - 1, min(count, _SHOWN)).round().astype(int))
    for k in shown:
        color = _color(k, count)
        above.plot(prediction.times, middle[:, k], color=color, label=f"mode {k + 1}")
        above.fill_between(prediction.times, low[:, k], high[:, k], color=color, alpha=0.2, lw=0)
        if simulated is not None:
            times, u = simulated
            every = slice(None, None, max(1, len(times) // 40))
            above.plot(times[every], u[every, k], ".", color=color, ms=4)
    _legend(above, "lines: predicted\npoints: simulated" if simulated else "predicted", count)
    for (name, loss), style in zip(
        (losses or {"loss": np.median(prediction.loss(), 1)}).items(), cycle(("-", "--", ":"))
    ):
        below.plot(prediction.times, loss, style, color="0.2", label=name)
    for start, end in prediction.plateaus():
        below.axvspan(start, min(end, prediction.times[-1]), color="0.92", zorder=0)
    below.set(xlabel=unit, ylabel="loss (plateaus shaded)", xlim=prediction.times[[0, -1]])
    below.legend(frameon=False)
    above.set(ylabel="strength of the mode in the network", title=title)
    return figure


def depth_curves(rows: Sequence[Mapping[str, Any]], max_steps: int, error: float) -> Figure:
    """Draw steps to an error and the best rate against depth, one line for each start."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    steps, rates = figure.subplots(1, 2)
    for color, (start, own) in zip(cycle(_cycle()), _grouped(rows, "start").items()):
        depths = sorted({row["n"] for row in own})
        by_depth = [[row for row in own if row["n"] == n] for n in depths]
        times = np.array([np.median([r["steps"] for r in rs]) for rs in by_depth])
        steps.plot(depths, np.minimum(times, max_steps), "o-", color=color, label=start, ms=4)
        late = ~np.isfinite(times)
        steps.plot(np.array(depths)[late], np.full(late.sum(), max_steps), "^", color=color, ms=9)
        best = [
            np.nan if never else np.exp(np.nanmean(np.log([r["rate"] for r in rs])))
            for rs, never in zip(by_depth, late, strict=True)
        ]
        rates.plot(depths, best, "o-", color=color, label=start, ms=4)
    ticks = np.array(sorted({row["n"] for row in rows}), dtype=float)
    known = [row for row in rows if np.isfinite(row["rate"]) and row["n"] == ticks[0]]
    if known:
        level = np.exp(np.mean(np.log([row["rate"] for row in known]))) * ticks[0]
        rates.plot(ticks, level / ticks, "k:", label="1/n")
    steps.set(xscale="log", yscale="log", xlabel="weight matrices n", ylabel="steps, best rate")
    steps.set_title(f"Steps to {error:.0%} of the loss (triangle: more than {max_steps})")
    rates.set(xscale="log", yscale="log", xlabel="weight matrices n", ylabel="best learning rate")
    rates.set_title("Best learning rate")
    for axes in (steps, rates):
        axes.set_xticks(ticks, [f"{n:g}" for n in ticks])
        axes.tick_params("x", which="minor", bottom=False)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both", axis="y")
        axes.legend(frameon=False)
    return figure


def gain_shares(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the share of Jacobian singular values in [0.1, 10] against the gain."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for color, (start, own) in zip(cycle(_cycle()), _grouped(rows, "start").items()):
        gains = sorted({row["gain"] for row in own})
        share = [np.mean([r["share"] for r in own if r["gain"] == g]) for g in gains]
        axes.plot(gains, share, "o-", color=color, ms=4, label=start)
    axes.set(xlabel="gain g", ylabel="share of singular values in [0.1, 10]", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def gain_spectra(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the distribution of Jacobian singular values, a panel for each gain."""
    starts, gains = _grouped(rows, "start"), sorted({row["gain"] for row in rows})
    columns = min(len(gains), 5)
    lines = -(-len(gains) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.2 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    bins = np.linspace(-16, 3, 58)
    for axes, gain in zip(panels.ravel(), gains, strict=False):
        for color, (start, own) in zip(cycle(_cycle()), starts.items()):
            values = np.concatenate([row["values"] for row in own if row["gain"] == gain])
            logs = np.log10(np.clip(values, 1e-16, 1e3))
            axes.hist(logs, bins, color=color, alpha=0.6, label=start, density=True)
        axes.axvspan(-1, 1, color="0.93", zorder=0)
        axes.set_title(f"g = {gain:g}", fontsize="medium")
    for axes in panels.ravel()[len(gains) :]:
        axes.set_axis_off()
    panels[0, 0].legend(frameon=False, fontsize="small")
    panels[0, 0].set_yticks([])
    figure.supxlabel("log10 of the Jacobian's singular values (band [0.1, 10] shaded)")
    return figure


def _color(k: int, count: int) -> Any:
    return matplotlib.colormaps["viridis"](0.9 * k / max(count - 1, 1))


def _cycle() -> list[str]:
    return [f"C{i}" for i in range(10)]


def _legend(axes: Axes, what: str, count: int) -> None:
    title = what if count <= _SHOWN else f"{what}\n{_SHOWN} of {count} modes"
    axes.legend(
        frameon=False, fontsize="small", title=title, title_fontsize="small",
        ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip


def _grouped(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[Mapping[str, Any]]]:
    out: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        out.setdefault(str(row[key]), []).append(row)
    return out
