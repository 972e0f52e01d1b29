"""Pictures of forecasts of fields: errors over the horizon, frames, an animation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pantarhei.data.trajectories import Trajectories
from pantarhei.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float32]
_PANEL = 160  # pixels of a panel of the animation, at least


def error_figure(
    curves: Sequence[Mapping[str, float]], names: Sequence[str], coverage: float
) -> Figure:
    """Draw the error of each forecast, and the coverage of the intervals, over the horizon."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    times = [row["time"] for row in curves]
    for name in names:
        dashed = "--" if name in ("persistence", "training mean") else "-"
        left.plot(times, [row[name] for row in curves], dashed, marker=".", label=name)
    left.set(xlabel="time ahead", ylabel="RMSE / deviation", ylim=(0, None))
    left.legend(frameon=False, fontsize=8)
    right.plot(times, [row["coverage"] for row in curves], ".-")
    right.axhline(coverage, color="0.4", ls="--", lw=1)
    right.set(xlabel="time ahead", ylabel="share of cells in the interval", ylim=(0, 1.02))
    return figure


def frames_figure(truth: Array, shown: Array, data: Trajectories) -> Figure:
    """Draw the first channel of one case: truth, forecast and error at some steps.

    The grid's first axis points up, the second to the right.
    """
    from matplotlib.figure import Figure

    picked = np.unique(np.linspace(0, len(truth) - 1, min(4, len(truth))).round().astype(int))
    figure = Figure(figsize=(2.1 * len(picked) + 1, 6), layout="constrained")
    grid = figure.subplots(3, len(picked), squeeze=False)
    panels = [_plane(x) for x in (truth[:, 0], shown[:, 0])]
    panels.append(panels[1] - panels[0])
    low, high = float(panels[0].min()), float(panels[0].max())
    for row, (name, panel) in enumerate(zip(("truth", "forecast", "error"), panels, strict=True)):
        for axes, t in zip(grid[row], picked, strict=True):
            if panel.ndim == 2:
                axes.plot(panel[t])
            else:
                top = max(high - low, 1e-12)
                limits = (-top / 2, top / 2) if name == "error" else (low, high)
                kind = "RdBu_r" if name == "error" else "viridis"
                axes.imshow(panel[t], origin="lower", cmap=kind, vmin=limits[0], vmax=limits[1])
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(f"t = {(t + 1) * data.dt:g}", fontsize=9)
        grid[row][0].set_ylabel(f"{name} of {data.channels[0]}", fontsize=9)
    return figure


def _plane(states: Array) -> Array:
    """Return (T, X) or (T, X, Y): of three axes the middle plane of the last."""
    return states[..., states.shape[-1] // 2] if states.ndim == 4 else states


def animate(path: Path, truth: Array, shown: Array, dt: float) -> None:
    """Write truth, forecast and error of the first channel side by side, a frame a step."""
    from matplotlib import colormaps
    from PIL import Image, ImageDraw

    panels = [_plane(x) for x in (truth[:, 0], shown[:, 0])]
    if panels[0].ndim == 2:  # a line: its history becomes the picture's other axis
        panels = [np.repeat(panel[:, :, None], 8, 2) for panel in panels]
    low, span = float(panels[0].min()), float(np.ptp(panels[0])) or 1.0
    levels = [(panel - low) / span for panel in panels]
    levels.append((panels[1] - panels[0]) / span + 0.5)
    zoom = max(1, -(-_PANEL // max(panels[0].shape[1:])))
    frames = []
    for t in range(len(truth)):
        pictures = []
        for level, kind in zip(levels, ("viridis", "viridis", "RdBu_r"), strict=True):
            colours = colormaps[kind](np.nan_to_num(level[t][::-1], nan=0.0))[..., :3]
            large = np.repeat(np.repeat(colours, zoom, 0), zoom, 1)
            pictures.append(np.pad(large, ((18, 2), (2, 2), (0, 0)), constant_values=1.0))
        image = Image.fromarray((255 * np.concatenate(pictures, 1)).astype(np.uint8))
        pen = ImageDraw.Draw(image)
        for k, name in enumerate(("truth", "forecast", "error")):
            pen.text((4 + k * image.width // 3, 3), f"{name}, t = {(t + 1) * dt:g}", fill=(0, 0, 0))
        frames.append(image)
    with atomic(path) as temporary:
        frames[0].save(
            temporary, format="GIF", save_all=True, append_images=frames[1:], duration=200, loop=0
        )
