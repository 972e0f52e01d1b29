"""The plots of the RBQE recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from pantarhei.compute.enhancement.metrics import psnr
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.routing import Calibration
from pantarhei.data.simulate.codecs import jpeg_luma


def curve(sweep: Calibration, methods: Sequence[Mapping[str, Any]], chosen: float) -> Figure:
    """Draw dPSNR against MACs: the dynamic network over all thresholds, and every method."""
    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_subplot()
    full = next(row["gmacs"] for row in reversed(methods) if row["method"].startswith("exit"))
    share = np.array(sweep.share) * full
    axes.plot(share, sweep.gain, ".-", ms=3, label="dynamic, every threshold")
    named: dict[str, dict[str, Any]] = {
        "exit": {"marker": "s", "color": "0.4", "label": "one exit for all"},
        "dynamic": {"marker": "*", "s": 140, "color": "C3", "label": f"calibrated ({chosen:.3f})"},
        "random": {"marker": "x", "color": "C1", "label": "random, equal MACs"},
        "oracle": {"marker": "^", "color": "C2", "label": "exit by the true quality"},
    }
    labelled = set()
    for row in methods:
        kind = row["method"].split()[0]
        style = dict(named.get(kind, {"marker": "o", "color": "C4", "label": "static networks"}))
        if style["label"] in labelled:
            style.pop("label")
        else:
            labelled.add(style["label"])
        axes.scatter(row["gmacs"], row["dpsnr"], zorder=3, **style)
        if kind not in ("dynamic", "random", "oracle"):
            axes.annotate(
                row["method"],
                (row["gmacs"], row["dpsnr"]),
                xytext=(4, -10),
                textcoords="offset points",
                fontsize=7,
            )
    if max(row["gmacs"] for row in methods) > 4 * full:
        axes.set_xscale("log")
    axes.set_xlabel("GMACs per image (true, assessments included)")
    axes.set_ylabel("mean dPSNR over five qualities, dB")
    axes.legend(fontsize=8)
    return figure


def exits(histogram: Mapping[int, Sequence[int]]) -> Figure:
    """Draw which share of the images took which exit, for each quality."""
    figure = Figure(figsize=(6, 3.5))
    axes = figure.add_subplot()
    names = [f"QF{q}" for q in histogram]
    counts = np.array(list(histogram.values()), dtype=float)
    shares = counts / counts.sum(1, keepdims=True)
    below = np.zeros(len(names))
    for k in range(shares.shape[1]):
        axes.bar(names, shares[:, k], bottom=below, label=f"exit {k + 1}", color=f"C{k}")
        below += shares[:, k]
    axes.set_ylabel("share of images")
    axes.legend(fontsize=8, bbox_to_anchor=(1.01, 1), loc="upper left")
    return figure


@torch.no_grad()
def side_by_side(net: NestedUNet, image: Tensor, calibration: Calibration) -> Figure:
    """Show original, compressed and enhanced at QF10 and QF40, with PSNR, exit and MACs."""
    figure = Figure(figsize=(10.5, 7.4))
    raw = image[None]
    height, width = image.shape[-2:]
    for line, q in enumerate((10, 40)):
        compressed = jpeg_luma(raw, q)
        routed = net.dynamic(compressed, calibration.chosen)
        share = int(routed.macs) / net.macs(height, width, net.exits)
        gained = float(psnr(routed.output, raw) - psnr(compressed, raw))
        titles = (
            "original",
            f"JPEG quality {q}: {float(psnr(compressed, raw)):.2f} dB",
            f"enhanced: {gained:+.2f} dB, exit {int(routed.exit)}, {share:.0%} of the MACs",
        )
        for place, (picture, title) in enumerate(
            zip((raw, compressed, routed.output), titles, strict=True)
        ):
            axes = figure.add_subplot(2, 3, 3 * line + place + 1)
            axes.imshow(picture[0, 0].clamp(0, 1).cpu(), cmap="gray", vmin=0, vmax=1)
            axes.set_title(title, fontsize=9)
            axes.set_axis_off()
    figure.tight_layout()
    return figure
