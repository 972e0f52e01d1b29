"""Watch your own network learn: sharpness, tangent kernel and signals while it trains.

    python examples/watch_a_network.py [--model FILE.py:FACTORY] [--data FILE.npz]
                                       [--start critical] [--lr 0.1] [--optimizer sgd]
                                       [--steps 300] [--out DIR]

FACTORY(shape, outputs) returns a module for inputs of that shape (without the batch) and that many
outputs; without it a small convnet is built (below). FILE.npz holds arrays x (N, ...) and y: whole
numbers (N,) are classes, anything else (N, ...) are targets; without it scikit-learn's digits.

DIR gets probes.csv and watch.png; what to make of them is printed, and told at length in
docs/watch-a-network-learn.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pantarhei as pr
from pantarhei.errors import RequestError
from pantarhei.files import atomic
from pantarhei.fit import Batches, fit
from pantarhei.learning.effective_theory.training import critical_init_
from pantarhei.probes import (
    KernelDrift,
    Propagation,
    Sharpness,
    Watch,
    edge_of_stability,
    subset,
)


def small_convnet(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """Build the network that is watched when you give none of your own."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(shape[0], 16, 3, padding=1),
            act1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, stride=2, padding=1),
            act2=nn.ReLU(),
            conv3=nn.Conv2d(32, 32, 3, padding=1),
            act3=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(2),
            flat=nn.Flatten(),
            head=nn.Linear(128, outputs),
        )
    )


def factory(text: str | None) -> Callable[[tuple[int, ...], int], nn.Module]:
    """Return the function that makes the network."""
    if text is None:
        return small_convnet
    path, _, name = text.rpartition(":")
    if not Path(path).is_file():
        raise RequestError(f"'{text}' names no file: give FILE.py:FACTORY.")
    spec = importlib.util.spec_from_file_location("watched", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(found := getattr(module, name, None)):
        raise RequestError(f"'{path}' has no function '{name}': give FILE.py:FACTORY.")
    return found


def read_data(path: Path | None) -> tuple[Tensor, Tensor]:
    """Return inputs, scaled to mean 0 and variance 1, and labels or targets."""
    if path is None:
        digits = pr.data.load("digits")
        x, y = digits.train_images[:, None].astype(np.float32), digits.train_labels
    else:
        try:
            with np.load(path) as file:
                x, y = file["x"], file["y"]
        except (OSError, KeyError, ValueError) as error:
            raise RequestError(
                f"'{path}' is not an .npz file with arrays x and y ({error})."
            ) from error
    if len(x) != len(y) or len(x) < 2:
        raise RequestError(f"x has {len(x)} examples and y {len(y)}: give as many, two at least.")
    inputs = torch.from_numpy(np.ascontiguousarray(x)).float()
    inputs = (inputs - inputs.mean()) / (inputs.std() + 1e-6)
    classes = y.ndim == 1 and np.issubdtype(y.dtype, np.integer)
    return inputs, torch.from_numpy(y).long() if classes else torch.from_numpy(y).float()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return cross-entropy and error rate for classes, half the mean squared error for targets."""
    x, y = batch
    output = model(x)
    if y.is_floating_point():
        return F.mse_loss(output.flatten(1), y.flatten(1)) / 2, {}
    return F.cross_entropy(output, y), {"error": (output.argmax(1) != y).float().mean()}


def watch_training(
    model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace
) -> tuple[Watch, list[dict[str, float]]]:
    """Train the model with three probes attached, and return what they saw."""
    measured = subset((x, y), min(options.examples, len(x)))  # always the same examples
    watch = Watch(
        loss,
        measured,
        every=options.every,
        probes=[
            Sharpness(parts=("gauss_newton",)),
            KernelDrift(labels=lambda batch: batch[1]),
            Propagation(inputs=16),
        ],
        path=options.out / "probes.csv",
    )
    watch.record(model, 0)  # before the first step: what drifts is measured from here
    made = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[options.optimizer]
    result = fit(
        model,
        Batches(x, y, batch_size=min(options.batch, len(x))),
        loss,
        steps=options.steps,
        optimizer=lambda weights: made(weights, lr=options.lr),
        log_every=max(1, options.steps // 100),
        device="cpu",
        label="watched training",
        on_step=watch,
    )
    return watch, result.history


def reading(watch: Watch) -> list[str]:
    """Return what the numbers say, a sentence each; the limits are rules of thumb."""
    rows, found = watch.rows, []
    last = rows[-1]
    steps, sharp = watch.series("step_sharpness")
    _, limit = watch.series("threshold")
    edge = edge_of_stability(steps, sharp, limit, tolerance=0.2)
    ratios = [s / t for s, t in zip(sharp, limit, strict=True)]
    late = float(np.mean(ratios[-max(1, len(ratios) // 3) :]))
    if edge.reached is None:
        found.append(
            f"sharpness: at most {max(ratios):.0%} of the threshold: by this measure a learning "
            f"rate up to {1 / max(ratios):.1f} times as large is stable; try a few on the way."
        )
    elif late >= 0.6:
        found.append(
            f"sharpness: at the edge of stability from step {edge.reached} on ({late:.0%} of the "
            "threshold in the last third): the learning rate sets the curvature here; let it "
            "fall for the last part of the training, or try a larger one, which finds a flatter "
            "place or diverges."
        )
    else:
        found.append(
            f"sharpness: past the edge of stability at step {edge.reached}, {late:.0%} of the "
            "threshold in the last third: the large steps went on to a flatter place. Warm up if "
            "the loss jumps too far before that."
        )
    moved = last["kernel_drift"]
    kind = (
        "features are being learned" if moved >= 0.5
        else "half way between learning features and staying with the first ones" if moved >= 0.1
        else "the network is nearly linear in its weights: for feature learning make the last "
        "layer's start smaller, or use muP (pantarhei.learning.parametrization)"
    )  # fmt: skip
    told = ""
    if "kernel_alignment" in rows[0] and "kernel_alignment" in last:  # it tells inputs apart
        told = (
            f", its shape by {last['kernel_distance']:.2f}, alignment with the labels "
            f"{rows[0]['kernel_alignment']:.2f} -> {last['kernel_alignment']:.2f}"
        )
    found.append(f"kernel: moved by {moved:.2f} of its size{told}: {kind}.")
    for name in [c.removeprefix("zeros_") for c in last if c.startswith("zeros_")]:
        if last[f"zeros_{name}"] > 0.95:
            found.append(
                f"layer '{name}': {last[f'zeros_{name}']:.0%} of its outputs are zero: units are "
                "dead; lower the learning rate or use a leaky activation."
            )
    back = [rows[0][c] for c in rows[0] if c.startswith("backward_")]
    ratio = back[0] / back[-2 if len(back) > 2 else -1]  # the last layer has a size of its own
    state = (
        "within what trains" if 0.03 <= ratio <= 30
        else f"the gradient {'vanishes' if ratio < 1 else 'explodes'} on its way to the first "
        "layer; start from the critical variance (--start critical)"
    )  # fmt: skip
    found.append(
        "signal: at the start the gradient's second moment at the first layer is "
        f"{ratio:.1e} of that before the last: {state}."
    )
    return found


def plot(watch: Watch, history: list[dict[str, float]], path: Path) -> None:
    """Draw four panels: loss, sharpness, kernel, signals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    steps = [row["step"] for row in history]
    a.plot(steps, [row["loss"] for row in history], color="tab:gray", label="training batches")
    a.plot(*watch.series("loss"), "o-", ms=3, label="measured examples")
    a.set(title="Loss", yscale="log")

    b.plot(*watch.series("sharpness"), "o-", ms=3, label="sharpness, Hessian")
    b.plot(*watch.series("gauss_newton"), "s-", ms=3, label="Gauss-Newton part")
    if watch.rows[-1]["step_sharpness"] != watch.rows[-1]["sharpness"]:
        b.plot(*watch.series("step_sharpness"), "^-", ms=3, label="preconditioned")
    b.plot(*watch.series("threshold"), "k--", lw=1, label="stability threshold")
    b.set(title="Sharpness", yscale="log")

    when, drift = watch.series("kernel_drift")
    c.plot(when[1:], drift[1:], "o-", ms=3, label="drift from the start")
    c.set_title("Tangent kernel", pad=24)
    c.set(yscale="log", ylabel="drift")
    shape = c.twinx()
    for name, style, colour in (("distance", "s-", "tab:orange"), ("alignment", "^-", "tab:green")):
        if any(f"kernel_{name}" in row for row in watch.rows):
            shape.plot(*watch.series(f"kernel_{name}"), style, ms=3, color=colour, label=name)
    shape.set(ylim=(0, 1), ylabel="distance in shape, alignment with labels")

    names = [n.removeprefix("forward_") for n in watch.rows[0] if n.startswith("forward_")]
    for row, style in ((watch.rows[0], ":"), (watch.rows[-1], "-")):
        for kind, colour in (("forward", "tab:blue"), ("backward", "tab:red")):
            values = [row[f"{kind}_{name}"] for name in names]
            when = "start" if row is watch.rows[0] else "end"
            d.plot(names, values, style, marker="o", ms=3, color=colour, label=f"{kind}, {when}")
    d.set(title="Second moments by layer", yscale="log")
    d.tick_params("x", rotation=60 if len(names) > 4 else 0)
    for axis in (a, b, c):
        axis.set_xlabel("step")
    for axis in (a, b, c, d):
        axis.grid(alpha=0.3)
        if axis is not c:
            axis.legend(fontsize=8)
    lines = [*c.get_lines(), *shape.get_lines()]
    c.legend(handles=lines, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=80)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="your network: FILE.py:FACTORY")
    parser.add_argument("--data", type=Path, help="your data: FILE.npz with x and y")
    parser.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--batch", type=int, default=256, help="examples in a batch")
    parser.add_argument("--steps", type=int, default=300, help="updates")
    parser.add_argument("--every", type=int, default=20, help="updates between measurements")
    parser.add_argument("--examples", type=int, default=128, help="how many to measure on")
    parser.add_argument(
        "--start", choices=("given", "critical"), default="given",
        help="the weights as your factory leaves them, or of the activation's critical variance",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("watched"))
    return parser.parse_args()


def main() -> None:
    """Run the example."""
    options = arguments()
    if (options.out / "probes.csv").exists():
        raise RequestError(f"'{options.out}' holds a watched training: choose another --out.")
    torch.manual_seed(options.seed)
    x, y = read_data(options.data)
    outputs = y[0].numel() if y.is_floating_point() else int(y.max()) + 1
    model = factory(options.model)(tuple(x.shape[1:]), outputs)
    if options.start == "critical":
        critical_init_(model)
    watch, history = watch_training(model, x, y, options)
    plot(watch, history, options.out / "watch.png")
    for sentence in reading(watch):
        print(sentence)
    final = ", ".join(f"{k} {history[-1][k]:.4f}" for k in ("loss", "error") if k in history[-1])
    products = sum(int(row["products"]) for row in watch.rows)
    print(f"{final} after {options.steps} steps; {products} Hessian products; see '{options.out}'")


if __name__ == "__main__":
    try:
        main()
    except RequestError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
