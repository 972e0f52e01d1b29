"""Pictures of learning-rate transfer: sweeps that line up or do not, curves against a threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from pantarhei.learning.lr_transfer import Size, Sweep


def sweeps(panels: Mapping[str, Sweep], *, share: bool = True) -> Figure:
    """Draw loss against learning rate, a line per size and a panel per parametrisation.

    A point marks each size's best rate, a cross at the top edge the rates that diverged; the band
    is that of the seeds, lowest to highest.
    """
    figure, axes = _panels(len(panels), share)
    for axis, (title, sweep) in zip(axes, panels.items(), strict=True):
        sweep_on(axis, sweep)
        axis.set_title(title)
    axes[0].set_ylabel("final training loss")
    return figure


def sweep_on(axis: Axes, sweep: Sweep) -> None:
    """Draw one sweep."""
    losses, table = sweep.losses(), sweep.table()
    exponents = np.log2(sweep.grid)
    for i, (size, optimum) in enumerate(zip(sweep.sizes, sweep.optima(), strict=True)):
        colour = _colour(i, len(sweep.sizes))
        axis.plot(exponents, table[i], color=colour, label=_name(size, sweep.sizes))
        good = ~np.isnan(table[i])
        low, high = (np.where(good, f(losses[i], axis=1), np.nan) for f in (np.min, np.max))
        axis.fill_between(exponents, low, high, color=colour, alpha=0.12, lw=0)
        if optimum.index is not None:
            axis.plot(exponents[optimum.index], optimum.loss, "o", color=colour, ms=7)
        height = np.full(int((~good).sum()), 0.98 - 0.025 * i)
        place = axis.get_xaxis_transform()
        axis.plot(exponents[~good], height, "x", color=colour, ms=4, transform=place)
    axis.plot([], [], "x", color="0.3", ms=4, label="diverged")
    axis.set_xlabel(r"$\log_2$ learning rate $\eta_0$")
    axis.legend(fontsize=8, frameon=False)
    axis.margins(y=0.12)


def curves(
    panels: Mapping[str, tuple[Sequence[Size], ArrayLike, ArrayLike, float | None]],
    *,
    ylabel: str = r"sharpness $\lambda_{max}(\gamma^2 H)$",
    share: bool = False,
    log: bool = False,
) -> Figure:
    """Draw curves over training, a line per size; a panel is (sizes, steps, values, threshold).

    ``values`` are (sizes, seeds, steps): the line is the mean, the band lowest to highest. The
    dashed line is the threshold of stability.
    """
    figure, axes = _panels(len(panels), share)
    for axis, (title, (sizes, steps, values, limit)) in zip(axes, panels.items(), strict=True):
        times, found = np.asarray(steps, float), np.asarray(values, float)
        for i, size in enumerate(sizes):
            colour = _colour(i, len(sizes))
            axis.plot(times, found[i].mean(0), color=colour, label=_name(size, sizes), marker=".")
            low, high = found[i].min(0), found[i].max(0)
            axis.fill_between(times, low, high, color=colour, alpha=0.15, lw=0)
        if limit is not None:
            axis.axhline(limit, color="0.3", ls="--", lw=1, label=r"$2/\eta_0$")
        if log:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=8, frameon=False)
    axes[0].set_ylabel(ylabel)
    return figure


def _panels(count: int, share: bool) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(1 + 3.8 * count, 3.8), layout="constrained")
    found: Any = figure.subplots(1, count, sharey=share, squeeze=False)
    return figure, list(found[0])


def _colour(i: int, count: int) -> Any:
    return colormaps["viridis"](0.9 * i / max(1, count - 1))


def _name(size: Size, sizes: Sequence[Size]) -> str:
    """Name a size by what differs among the sizes."""
    parts = [
        f"{axis} {getattr(size, axis)}"
        for axis in ("width", "depth")
        if len({getattr(s, axis) for s in sizes}) > 1
    ]
    return ", ".join(parts) or str(size)
