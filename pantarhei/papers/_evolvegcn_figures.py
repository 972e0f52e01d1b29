"""The plots of the EvolveGCN recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

_NAMES = {"mrr_as_coded": "MRR (as coded)", "micro_f1": "micro F1"}


def bars(means: Sequence[Mapping[str, Any]], measure: str) -> Figure:
    """Draw a measure by model, a panel for each study, with the standard deviation over seeds."""
    studies = list(dict.fromkeys(row["study"] for row in means))
    figure = Figure(figsize=(3.2 * len(studies) + 1.5, 3.8))
    for place, study in enumerate(studies, 1):
        axes = figure.add_subplot(1, len(studies), place)
        rows = [row for row in means if row["study"] == study]
        colors = ["C0" if "evolvegcn" in row["model"] else "0.6" for row in rows]
        axes.barh(
            [row["model"] for row in rows],
            [row[measure] for row in rows],
            xerr=[row[f"{measure}_sd"] for row in rows],
            color=colors,
        )
        axes.invert_yaxis()
        axes.set(title=study, xlabel=_NAMES[measure])
        if measure == "micro_f1":
            axes.set_xlim(left=min(row[measure] for row in rows) - 0.05)
    figure.tight_layout()
    return figure


def over_time(curves: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the balanced accuracy at every test step of the drift, a line for each model."""
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for model in dict.fromkeys(row["model"] for row in curves):
        rows = [row for row in curves if row["model"] == model]
        axes.plot(
            [row["step"] for row in rows],
            [row["balanced_accuracy"] for row in rows],
            ".-",
            label=model,
        )
    axes.axhline(0.5, color="0.8", lw=1, zorder=0)
    axes.set(
        xlabel="time step (the direction turns once in 40)",
        ylabel="balanced accuracy",
        ylim=(0, 1),
        title="Drift: one seed, test steps",
    )
    axes.legend(fontsize=8)
    return figure
