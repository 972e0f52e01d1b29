"""The plots people expect of these quantities; shared by the commands and the paper's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pantarhei.learning.generalization.random_features import WidthSweep


def error_curves(
    times: ArrayLike,
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    stops: Mapping[str, tuple[float, float]] | None = None,
    points: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]] | None = None,
    unit: str = "teacher's variance",
) -> Figure:
    """Draw (training, test) errors over time, a panel a name.

    ``stops`` are predicted best (time, error)s; ``points`` simulated (times, training, test).
    """
    figure, axes = _panels(len(curves))
    for axis, (name, (train, test)) in zip(axes, curves.items(), strict=True):
        axis.plot(times, test, "C3", label="test, theory")
        axis.plot(times, train, "C0", label="training, theory")
        if points and name in points:
            t, simulated_train, simulated_test = points[name]
            axis.plot(t, simulated_test, "C3o", ms=4, label="test, simulated")
            axis.plot(t, simulated_train, "C0o", ms=4, label="training, simulated")
        if stops and name in stops and np.isfinite(stops[name][0]):
            at, error = stops[name]
            axis.axvline(at, color="0.5", ls=":", label=f"predicted stop, t = {at:.3g}")
            axis.plot([at], [error], "k*", ms=9)
        axis.set(xscale="log", xlabel="time t / τ", title=name)
        if unit:
            axis.set_ylim(0, None)
        axis.legend(fontsize=8)
    axes[0].set_ylabel(f"error / {unit}" if unit else "mean squared error")
    return figure


def overtraining(sweep: WidthSweep, title: str = "") -> Figure:
    """Draw errors at the best and at the last time, and their difference, over width."""
    figure, (left, right) = _panels(2)
    for values, label, color in ((sweep.final, "final", "C3"), (sweep.best, "best", "C2")):
        _median(left, sweep.widths, values, label, color)
    _median(right, sweep.widths, sweep.overtraining, "final − best", "C1")
    for axis in (left, right):
        axis.axvline(sweep.examples, color="0.5", ls=":", label=f"width = P = {sweep.examples}")
        axis.set(xscale="log", yscale="log", xlabel="hidden units")
        axis.legend(fontsize=8)
    left.set_ylabel("test error")
    right.set_ylabel("overtraining")
    figure.suptitle(title)
    return figure


def spectra(
    panels: Mapping[str, ArrayLike],
    laws: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    log: bool = False,
) -> Figure:
    """Draw histograms of eigenvalues, and laws: (eigenvalues, density) of the continuous part.

    ``log`` takes bins and densities by the eigenvalue's logarithm: a bulk and its outliers.
    """
    figure, axes = _panels(len(panels))
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        found = np.asarray(values, dtype=np.float64).reshape(-1)
        moving = found[found > found.max() * 1e-12]
        shown = np.log10(moving) if log else moving
        axis.hist(shown, bins=60, density=True, color="C0", alpha=0.6)
        if laws and name in laws:
            axis.plot(*laws[name], "k", lw=1.2, label="Marchenko-Pastur")
            axis.legend(fontsize=8)
        zero = 1 - len(moving) / len(found)
        axis.set_title(f"{name}\nat zero: {zero:.0%}, smallest other: {moving.min():.2g}", size=9)
        axis.set(xlabel="log10 of the eigenvalue" if log else "eigenvalue", ylim=(0, None))
    axes[0].set_ylabel("density of those above zero")
    return figure


def bounds(sweep: WidthSweep, title: str = "") -> Figure:
    """Draw the complexity terms beside the true gap, over width."""
    figure, (axis,) = _panels(1)
    _median(axis, sweep.widths, sweep.gap, "true gap", "k")
    for (name, values), color in zip(sweep.bounds().items(), ("C0", "C3", "C1"), strict=True):
        _median(axis, sweep.widths, values, f"{name} bound", color)
    axis.axvline(sweep.examples, color="0.5", ls=":", label=f"width = P = {sweep.examples}")
    axis.set(xscale="log", yscale="log", xlabel="hidden units", ylabel="gap, complexity term")
    axis.set_title(title)
    axis.legend(fontsize=8)
    return figure


def lines(
    x: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    log: Sequence[str] = ("x",),
    marker: str = "",
    **labels: Any,
) -> Figure:
    """Draw curves over a common axis."""
    figure, (axis,) = _panels(1)
    for name, values in curves.items():
        axis.plot(x, np.asarray(values), label=name, marker=marker, ms=3)
    axis.set(**{f"{name}scale": "log" for name in log}, **labels)
    axis.legend(fontsize=8)
    return figure


def _median(axis: Any, widths: Sequence[int], values: Any, label: str, color: str) -> None:
    """Draw the median over seeds and the band of the middle half."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=1)
    axis.plot(widths, middle, f"{color}", marker="o", ms=3, label=label)
    axis.fill_between(widths, low, high, color=color, alpha=0.2, lw=0)


def _panels(count: int) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, count, figsize=(max(5.5, 4.2 * count), 3.8), layout="constrained", squeeze=False
    )
    return figure, axes[0]
