"""The Principles of Deep Learning Theory (arXiv 2106.10165): what depth over width does.

The story: random networks are drawn by the ten thousand and their finite-width vertices compared
with the recursions; V/(n G^2) is shown to be a function of depth over width alone; forty-layer
networks are trained at and off their critical initialisation and from what people use; and how far
training moves the tangent kernel is measured over a grid of depths and widths.

L/n is (L - 1)/n where random networks are compared: the first layer is exactly Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec
from pantarhei.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from pantarhei.papers._pdlt_parts import Networks

CLAIMS = (
    ClaimSpec(
        "relu-vertices",
        "V, D, F, B and A of random ReLU networks, layers 2 to 4, are those of the recursion",
        "worst relative error over (3 standard errors + 1.5 nu L/n)",
        "<=",
        1.0,
        "leading order in 1/n, chapters 4, 5 and 8",
    ),
    ClaimSpec(
        "tanh-vertices",
        "K, Theta, V, P and Q of random tanh networks of width 30, layer 3, are the recursion's",
        "worst relative error over (3 standard errors + 1.5 nu L/n)",
        "<=",
        1.0,
        "leading order in 1/n, chapters 4, 5 and 11",
    ),
    ClaimSpec(
        "relu-slope",
        "V/(n K^2) of ReLU networks grows with (L-1)/n as nu = 5, extrapolated to infinite width",
        "relative error of the slope",
        "<=",
        0.08,
        "nu = 5",
    ),
    ClaimSpec(
        "linear-slope",
        "V/(n K^2) of linear networks grows with (L-1)/n as nu = 2, extrapolated",
        "relative error of the slope",
        "<=",
        0.08,
        "nu = 2",
    ),
    ClaimSpec(
        "tanh-slope",
        "V/(n K^2) of tanh networks of 50 layers and more grows with (L-1)/n as nu = 2/3",
        "relative error of the slope, extrapolated to infinite width",
        "<=",
        {"cpu": 0.10, "gpu": 0.10},
        "nu = 2/3",
    ),
    ClaimSpec(
        "collapse",
        "networks of equal L/n have equal V/(n G^2)",
        "largest over smallest minus 1 over widths, worst of ReLU, linear and tanh",
        "<=",
        0.10,
        "a function of L/n",
    ),
    ClaimSpec(
        "critical-trains",
        "40-layer ReLU, tanh and GELU networks train from their critical initialisation",
        "train accuracy, best of five rates, worst of the activations",
        ">=",
        {"cpu": 0.90, "gpu": 0.90},
    ),
    ClaimSpec(
        "small-weights-do-not-train",
        "with 0.6 of the critical C_W none of them does",
        "train accuracy, best of five rates and of the activations",
        "<=",
        {"cpu": 0.30, "gpu": 0.30},
    ),
    ClaimSpec(
        "large-weights-do-not-train",
        "with 1.6 of the critical C_W ReLU and GELU diverge or do not train",
        "train accuracy, best of five rates and of the two",
        "<=",
        {"cpu": 0.30, "gpu": 0.30},
    ),
    ClaimSpec(
        "large-weights-cost-tanh",
        "with 1.6 of the critical C_W tanh trains worse",
        "train accuracy at criticality minus that at 1.6, points",
        ">=",
        {"cpu": 10.0, "gpu": 10.0},
    ),
    ClaimSpec(
        "gradients-even-at-criticality",
        "first and last layer have gradients of like size at criticality",
        "ratio of the norms by preactivations, or its inverse, worst of the activations",
        "<=",
        {"cpu": 10.0, "gpu": 10.0},
    ),
    ClaimSpec(
        "gradients-uneven-off-it",
        "off criticality they have not",
        "ratio of the norms, or its inverse, smallest of the activations at 0.6 and 1.6",
        ">=",
        {"cpu": 10.0, "gpu": 10.0},
    ),
    ClaimSpec(
        "feature-learning",
        "training to a fixed loss changes the tangent kernel in proportion to L/n",
        "distance of the log-log slope from 1, worse of ReLU and tanh",
        "<=",
        0.3,
        "O(L/n), chapter 11",
    ),
)

# At cpu, on one thread: vertices 1 minute, sweeps 2, criticality 5, kernels 1.
SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "networks": 1500,  # with their tangent kernel
        "differentials": 1000,  # with its differential, too
        "chains": 120_000,  # preactivations alone, to layer 5
        "deep_chains": 30_000,  # to the deepest layer of the sweep
        "widths": (50, 100, 200),
        "depth": 33,
        "ratios": (0.08, 0.16),
        "train_depth": 40,
        "train_width": 100,
        "steps": 0,
        "batch": 64,
        "rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "kernel_widths": (64, 128, 256),
        "kernel_depths": (4, 8),
        "kernel_networks": 8,
        "kernel_inputs": 32,
    },
    "cpu": {
        "networks": 20_000,
        "differentials": 20_000,
        "chains": 200_000,
        "deep_chains": 60_000,
        "widths": (50, 100, 200),
        "depth": 65,
        "ratios": (0.08, 0.16, 0.32),
        "train_depth": 40,
        "train_width": 100,
        "steps": 1500,
        "batch": 64,
        "rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "kernel_widths": (64, 128, 256, 512),
        "kernel_depths": (4, 8, 16),
        "kernel_networks": 16,
        "kernel_inputs": 32,
    },
    "gpu": {
        "networks": 100_000,
        "differentials": 100_000,
        "chains": 1_000_000,
        "deep_chains": 400_000,
        "widths": (128, 256, 512),
        "depth": 64,
        "ratios": (0.03125, 0.0625, 0.109375),
        "train_depth": 40,
        "train_width": 100,
        "steps": 5000,
        "batch": 64,
        "rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "kernel_widths": (64, 128, 256, 512, 1024),
        "kernel_depths": (4, 8, 16, 32),
        "kernel_networks": 32,
        "kernel_inputs": 64,
    },
}

RATES: dict[str, Any] = {"lambda_b": 0.7, "lambda_W": 1.3}
TANH_X2 = 0.5  # the input whose growth of V/K^2 is the nearest to its limit at moderate depth


def recipe(run: Run) -> Iterator[Claim]:
    """Measure the claims."""
    yield from vertices_of_random_networks(run)
    yield from growth_with_depth(run)
    if run.settings.steps:
        yield from criticality(run)
    if run.settings.kernel_networks:
        yield from feature_learning(run)


def vertices_of_random_networks(run: Run) -> Iterator[Claim]:
    """Claim 1: the vertices of ReLU at n = 100 and of tanh at n = 30."""
    from pantarhei.learning.effective_theory.monte_carlo import measure
    from pantarhei.learning.effective_theory.recursions import vertices

    for name, widths, x2, nu, wanted, layers in (
        ("relu", (100,) * 4, 1.0, 5.0, "VDFBA", (2, 3, 4)),
        ("tanh", (30,) * 3, 0.8, 2 / 3, ("K", "Theta", "V", "P", "Q"), (3,)),
    ):
        depth = len(widths)
        theory = vertices(name, depth, x2, **RATES)
        found = measure(
            name,
            widths,
            x2,
            networks=run.settings.networks if name == "relu" else run.settings.differentials,
            ntk=True,
            dntk=name == "tanh",
            seed=run.seed,
            device=run.device,
            quiet=run.quiet,
            **RATES,
        )
        rows: list[dict[str, Any]] = []
        for vertex in wanted:
            measured = "G" if vertex == "K" else vertex
            for layer in range(2, depth + 1):
                expected = float(getattr(theory, vertex)[layer - 1])
                value = float(found[measured][layer - 1])
                error = float(found.errors[measured][layer - 1])
                allowed = 3 * error / abs(expected) + 1.5 * nu * layer / widths[0]
                rows.append(
                    {
                        "vertex": vertex,
                        "layer": layer,
                        "theory": expected,
                        "measured": value,
                        "error": error,
                        "relative": value / expected - 1,
                        "allowed": allowed,
                        "share": abs(value / expected - 1) / allowed,
                    }
                )
        run.metrics(f"vertices-{name}.csv", rows)
        draw_vertices(run, name, rows)
        worst = max(row["share"] for row in rows if row["layer"] in layers)
        yield run.claim(f"{name}-vertices", worst, evidence=f"vertices-{name}.csv")


def growth_with_depth(run: Run) -> Iterator[Claim]:
    """Claims 1 and 2: the slope of V/(n K^2) in depth over width, and its collapse."""
    from pantarhei.learning.effective_theory.advice import sweep

    settings = run.settings
    common: dict[str, Any] = {"seed": run.seed, "device": run.device, "quiet": run.quiet}
    shallow: dict[str, list[dict[str, float]]] = {}
    deep: dict[str, list[dict[str, float]]] = {}
    for name in ("relu", "linear", "tanh"):
        x2 = TANH_X2 if name == "tanh" else 1.0
        if name != "tanh":
            shallow[name] = sweep(name, settings.widths, 5, networks=settings.chains, **common)
            run.metrics(f"growth-{name}.csv", shallow[name])
        deep[name] = sweep(
            name, settings.widths, settings.depth, networks=settings.deep_chains, x2=x2, **common
        )
        run.metrics(f"collapse-{name}.csv", deep[name])
    for name, nu in (("relu", 5.0), ("linear", 2.0)):
        slope = extrapolated_slope(shallow[name], 1)
        run.log(f"{name}: slope {slope:.4f} of V/(n K^2), theory {nu}.")
        yield run.claim(f"{name}-slope", abs(slope / nu - 1), evidence=f"growth-{name}.csv")
    if settings.depth > 50:
        slope = extrapolated_slope(deep["tanh"], 50)
        run.log(f"tanh: slope {slope:.4f} of V/(n K^2) from 50 layers on, theory {2 / 3:.4f}.")
        yield run.claim("tanh-slope", abs(slope * 1.5 - 1), evidence="collapse-tanh.csv")
    rows = [
        {"activation": name, "ratio": ratio, "spread": spread(deep[name], ratio)}
        for name in deep
        for ratio in settings.ratios
    ]
    run.metrics("collapse.csv", rows)
    draw_collapse(run, deep)
    yield run.claim("collapse", max(row["spread"] for row in rows), evidence="collapse.csv")


def extrapolated_slope(rows: list[dict[str, float]], first: int) -> float:
    """Return the slope of V/(n K^2) in (l - 1)/n through 0 over l - 1 >= first, at 1/n = 0.

    The slopes at the widths are continued to infinite width by the polynomial in 1/n through them.
    """
    import numpy as np

    widths = sorted({row["width"] for row in rows})
    slopes = []
    for width in widths:
        chosen = [r for r in rows if r["width"] == width and r["layer"] - 1 >= first]
        x = np.array([r["ratio"] for r in chosen])
        y = np.array([r["V"] / (width * r["K"] ** 2) for r in chosen])
        slopes.append((x @ y) / (x @ x))
    inverse = 1 / np.array(widths)
    return float(np.polyfit(inverse, slopes, len(widths) - 1)[-1])


def spread(rows: list[dict[str, float]], ratio: float) -> float:
    """Return largest over smallest minus 1 of V/(n G^2) at one (l - 1)/n."""
    found = [row["measured"] for row in rows if abs(row["ratio"] - ratio) < 1e-9]
    if len(found) < 2:
        from pantarhei.errors import RequestError

        raise RequestError(
            f"ratio {ratio} is (l-1)/n at fewer than two of the widths: choose another."
        )
    return max(found) / min(found) - 1


def criticality(run: Run) -> Iterator[Claim]:
    """Claim 3: forty layers, three activations, three C_W, five rates; and two usual starts."""
    import torch

    x, y = digits(run)
    generator = torch.Generator().manual_seed(run.seed)
    rows: list[dict[str, Any]] = []
    for name in ("relu", "tanh", "gelu"):
        rows += train_around_criticality(run, name, x, y, generator)
        run.metrics("criticality.csv", rows)
    draw_criticality(run, rows)

    def best(name: str, scale: float) -> float:
        return max(r["accuracy"] for r in rows if r["activation"] == name and r["scale"] == scale)

    def uneven(name: str, scale: float) -> float:
        return next(r["uneven"] for r in rows if r["activation"] == name and r["scale"] == scale)

    names, evidence = ("relu", "tanh", "gelu"), "criticality.csv"
    yield run.claim("critical-trains", min(best(n, 1.0) for n in names), evidence)
    yield run.claim("small-weights-do-not-train", max(best(n, 0.6) for n in names), evidence)
    large = max(best("relu", 1.6), best("gelu", 1.6))
    yield run.claim("large-weights-do-not-train", large, evidence)
    lost = 100 * (best("tanh", 1.0) - best("tanh", 1.6))
    yield run.claim("large-weights-cost-tanh", lost, evidence)
    yield run.claim("gradients-even-at-criticality", max(uneven(n, 1.0) for n in names), evidence)
    off = min(uneven(n, scale) for n in names for scale in (0.6, 1.6))
    yield run.claim("gradients-uneven-off-it", off, evidence)


def train_around_criticality(
    run: Run, name: str, x: Tensor, y: Tensor, generator: Any
) -> list[dict[str, Any]]:
    """Train one activation's networks at and off the critical C_W, and from what people use."""
    from functools import partial

    import torch

    from pantarhei.papers import _pdlt_parts as parts
    from pantarhei.probes.mean_field import Activation, critical_point

    rates = run.settings.rates
    act = Activation(name)
    scales = torch.tensor([0.6, 1.0, 1.6])
    widths = (x.shape[1], *[run.settings.train_width] * (run.settings.train_depth - 1), 10)
    factors = scales.repeat_interleave(len(rates))
    nets = parts.Networks.critical(act, critical_point(act), widths, factors, generator)
    starts = [(f"{scale:g} x critical C_W", scale) for scale in scales.tolist()]
    rows = train(run, name, nets, starts, x, y)
    for label, init in (
        ("PyTorch's default", lambda layer: None),
        ("Kaiming", partial(parts.kaiming_, nonlinearity=name)),
    ):
        nets = parts.Networks.initialised(act, init, widths, len(rates), run.seed)
        rows += train(run, name, nets, [(label, math.nan)], x, y)
    return rows


def train(
    run: Run, name: str, nets: Networks, starts: list[tuple[str, float]], x: Tensor, y: Tensor
) -> list[dict[str, Any]]:
    """Train networks with plain SGD: for each start, one for every rate. Return what they reach."""
    import torch

    from pantarhei.fit import Batches
    from pantarhei.papers import _pdlt_parts as parts

    settings = run.settings
    nets.to(run.device, torch.float32)
    gradients = nets.errors(x[:256], y[:256])
    by_weights = nets.weight_gradients(x[:256], y[:256])
    batches = Batches(x, y, batch_size=settings.batch, seed=run.seed)
    depth = len(nets.weights)
    rates = torch.tensor(settings.rates).repeat(len(starts)).to(run.device)
    with run.progress(settings.steps, f"{name}, {', '.join(label for label, _ in starts)}") as bar:
        for step in range(settings.steps):
            inputs, labels = batches(step)
            losses = parts.cross_entropy(nets.preactivations(inputs)[-1], labels)
            nets.step(losses.sum(), [rates] * depth, [rates] * depth)
            bar.advance()
    reached = parts.accuracy(nets, x, y)
    rows = []
    for group, (label, scale) in enumerate(starts):
        # Networks of one start differ in nothing but their draw.
        same = slice(group * len(settings.rates), (group + 1) * len(settings.rates))
        ratio = float((gradients[0] / gradients[-1])[same].log().mean().exp())
        weights = float((by_weights[0] / by_weights[-1])[same].log().mean().exp())
        rows += [
            {
                "activation": name,
                "start": label,
                "scale": round(scale, 3),
                "rate": rate,
                "accuracy": accuracy,
                "gradient_ratio": ratio,
                # in float32 the error signal of a start far below criticality is zero in the end
                "uneven": max(ratio, 1 / ratio) if ratio else math.inf,
                "weight_gradient_ratio": weights,
            }
            for rate, accuracy in zip(settings.rates, reached[same].tolist(), strict=True)
        ]
    return rows


def feature_learning(run: Run) -> Iterator[Claim]:
    """Claim 4: the change of the tangent kernel over depths and widths."""
    import numpy as np
    import torch

    from pantarhei.papers import _pdlt_parts as parts
    from pantarhei.probes.mean_field import Activation, critical_point

    settings = run.settings
    images, labels = digits(run)
    chosen = torch.isin(labels, torch.tensor([3, 8], device=labels.device)).nonzero()[:, 0]
    chosen = chosen[: settings.kernel_inputs]
    x, y = images[chosen], (labels[chosen] == 3).to(images.dtype) * 2 - 1
    rows: list[dict[str, Any]] = []
    grid = [(d, w) for d in settings.kernel_depths for w in settings.kernel_widths]
    generator = torch.Generator().manual_seed(run.seed)
    with run.progress(2 * len(grid), "depths and widths") as bar:
        for name in ("relu", "tanh"):
            act = Activation(name)
            for depth, width in grid:
                change, reached = parts.kernel_change(
                    act, critical_point(act), width, depth, x, y,
                    networks=settings.kernel_networks, target=0.1, steps=2000,
                    generator=generator,
                )  # fmt: skip
                rows.append(
                    {
                        "activation": name,
                        "depth": depth,
                        "width": width,
                        "ratio": depth / width,
                        "change": float(change[reached].log().mean().exp()),
                        "deviation": float(change[reached].log().std()),
                        "reached": int(reached.sum()),
                    }
                )
                bar.advance()
    run.metrics("kernel-change.csv", rows)
    slopes = {}
    for name in ("relu", "tanh"):
        own = [r for r in rows if r["activation"] == name]
        logs = np.log([[r["ratio"], r["change"]] for r in own])
        slopes[name] = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
        run.log(f"{name}: log-log slope {slopes[name]:.3f} of the kernel's change in L/n.")
    draw_kernels(run, rows, slopes)
    worst = max(abs(slope - 1) for slope in slopes.values())
    yield run.claim("feature-learning", worst, evidence="kernel-change.csv")


def digits(run: Run) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's training digits, every image centred and with x.x / n_0 = 1."""
    import torch

    from pantarhei.data import load

    data = load("digits")
    x = torch.from_numpy(data.train_images).flatten(1).to(torch.float32)
    x = x - x.mean(0)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    y = torch.from_numpy(data.train_labels).long()
    return x.to(run.device), y.to(run.device)


def draw_vertices(run: Run, name: str, rows: list[dict[str, Any]]) -> None:
    """Plot each vertex over the layers, theory and Monte Carlo."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["vertex"] for row in rows))
    figure = Figure(figsize=(2.4 * len(names), 2.6), layout="constrained")
    for axes, vertex in zip(figure.subplots(1, len(names)), names, strict=True):
        own = [row for row in rows if row["vertex"] == vertex]
        layers = [row["layer"] for row in own]
        axes.plot(layers, [row["theory"] for row in own], "k-", label="recursion")
        axes.errorbar(
            layers,
            [row["measured"] for row in own],
            [3 * row["error"] for row in own],
            fmt="o",
            ms=4,
            capsize=3,
            label="networks",
        )
        axes.set(title=vertex, xlabel="layer", xticks=layers)
    figure.axes[0].legend(frameon=False, fontsize=8)
    run.figure(f"vertices-{name}", figure)


def draw_collapse(run: Run, deep: dict[str, list[dict[str, float]]]) -> None:
    """Plot V/(n G^2) over depth over width: one curve for all widths."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, 3), deep.items(), strict=True):
        last = min(max(r["ratio"] for r in rows if r["width"] == w) for w in run.settings.widths)
        for width in run.settings.widths:
            own = [r for r in rows if r["width"] == width and 0 < r["ratio"] <= last]
            axes.errorbar(
                [r["ratio"] for r in own],
                [r["measured"] for r in own],
                [r["error"] for r in own],
                fmt=".",
                ms=4,
                label=f"n = {width}",
            )
        own = [r for r in rows if r["width"] == max(run.settings.widths) and r["ratio"] <= last]
        x = [r["ratio"] for r in own]
        axes.plot(x, [r["theory"] for r in own], "k--", lw=1, label="leading order")
        if name != "tanh":
            axes.plot(x, [r["resummed"] for r in own], "k-", lw=1, label="resummed")
        axes.set(title=name, xlabel="(L - 1) / n")
    figure.axes[0].set_ylabel("V / (n G²)")
    figure.axes[0].legend(frameon=False, fontsize=8)
    run.figure("collapse", figure)


def draw_criticality(run: Run, rows: list[dict[str, Any]]) -> None:
    """Plot accuracy over C_W, a line for each rate; beside it the usual starts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    names = ("relu", "tanh", "gelu")
    for axes, name in zip(figure.subplots(1, 3, sharey=True), names, strict=True):
        for rate in dict.fromkeys(row["rate"] for row in rows):
            own = [r for r in rows if r["activation"] == name and r["rate"] == rate]
            scaled = [r for r in own if not math.isnan(r["scale"])]
            (line,) = axes.plot(
                [r["scale"] for r in scaled],
                [r["accuracy"] for r in scaled],
                "o-",
                label=f"rate {rate:.3g}",
            )
            usual = [r["accuracy"] for r in own if math.isnan(r["scale"])]
            axes.plot([2.0, 2.3], usual, "s", color=line.get_color())
        axes.axhline(0.1, color="0.7", lw=1, zorder=0)
        axes.set(title=name, xlabel="C_W / critical C_W", ylim=(0, 1.03))
        axes.set_xticks([0.6, 1.0, 1.6, 2.0, 2.3], ["0.6", "1.0", "1.6", "PyTorch", "Kaiming"])
        axes.tick_params("x", rotation=30)
    figure.axes[0].set_ylabel("train accuracy")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="center right")
    run.figure("criticality", figure)


def draw_kernels(run: Run, rows: list[dict[str, Any]], slopes: dict[str, float]) -> None:
    """Plot the relative change of the tangent kernel over depth over width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2, sharey=True), slopes, strict=True):
        for depth in run.settings.kernel_depths:
            own = [r for r in rows if r["activation"] == name and r["depth"] == depth]
            axes.loglog(
                [r["ratio"] for r in own], [r["change"] for r in own], "o-", label=f"L = {depth}"
            )
        axes.set(title=f"{name}: slope {slopes[name]:.2f}", xlabel="L / n")
    figure.axes[0].set_ylabel("relative change of the tangent kernel")
    figure.axes[0].legend(frameon=False, fontsize=8)
    run.figure("kernel-change", figure)
