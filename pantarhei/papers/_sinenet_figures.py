"""Pictures of the SineNet recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def over_the_horizon(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the error of each model against the step; rows have model, step and relative_l2."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(_styles())
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        style: dict[str, Any] = (
            {"color": "black", "linestyle": ":"} if model == "persistence" else {}
        )
        axes.plot([r["step"] for r in own], [r["relative_l2"] for r in own], label=model, **style)
    axes.set(xlabel="step", ylabel="relative L2, mean over channels", title=title, yscale="log")
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def _styles() -> Any:
    """Return one style for each of up to twenty models."""
    from cycler import cycler
    from matplotlib import colormaps

    return cycler(linestyle=["-", "--"]) * cycler(color=map(colormaps["tab10"], range(10)))


def side_by_side(
    truth: NDArray[Any], forecasts: Mapping[str, NDArray[Any]], steps: Sequence[int], title: str
) -> Figure:
    """Draw truth, and each forecast with its error below, at some steps; arrays (T, H, W)."""
    from matplotlib.figure import Figure

    rows = [("truth", truth, False)]
    for name, forecast in forecasts.items():
        rows += [(name, forecast, False), (f"error of {name}", forecast - truth, True)]
    size = (1.7 * len(steps) + 0.8, 1.7 * len(rows) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), len(steps), squeeze=False)
    low, high = float(truth.min()), float(truth.max())
    spread = (high - low) / 2
    for line, (name, states, error) in zip(grid, rows, strict=True):
        limits = {"vmin": -spread, "vmax": spread} if error else {"vmin": low, "vmax": high}
        for axes, step in zip(line, steps, strict=True):
            axes.imshow(
                states[step - 1], origin="lower", cmap="RdBu_r" if error else "viridis", **limits
            )
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=8)
    for axes, step in zip(grid[0], steps, strict=True):
        axes.set_title(f"step {step}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def spectra(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the energy of the truth and of each model's error by wavenumber."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(_styles())
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and row["wavenumber"] > 0]
        style: dict[str, Any] = {"color": "black"} if model == "truth" else {}
        axes.loglog([r["wavenumber"] for r in own], [r["energy"] for r in own],
                    label=model, **style)  # fmt: skip
    axes.set(xlabel="waves per domain", ylabel="energy of the error", title=title)
    figure.legend(fontsize=7, loc="outside right upper")
    return figure


def shifts(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Draw the displacement between skip and upsampled feature at full resolution by wave."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5))
    axes = figure.subplots()
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model and row["level"] == 0]
        axes.plot(
            [r["wave"] + 1 for r in own], [r["distance"] for r in own], "o-", label=f"{model} waves"
        )
    axes.set(xlabel="wave", ylabel="displacement, cells", title=title)
    axes.legend(fontsize=7)
    return figure
