"""Deep linear networks (arXiv 1312.6120): curves from the data alone, and what depth costs.

The story: networks of two layers learn the digits, from a decoupled and from small random starts,
and are held against the closed form. Then deep linear networks are trained from orthogonal and
Gaussian weights at the best of several rates, for more and more layers. Last, the Jacobians of deep
tanh networks are measured around the critical gain. The sheet names the digits and modes 0.5 to 2;
where there are two tasks, the worse one decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec
from pantarhei.runs import Run

if TYPE_CHECKING:
    from pantarhei.learning.deep_linear import Correlations

# The paper prints curves, not numbers: the bounds are the fact sheet's.
CLAIMS = (
    ClaimSpec(
        "closed-form",
        "gradient descent from a decoupled start follows the closed form",
        "largest |u - u_theory| / s over modes and steps",
        "<=",
        0.02,
        "curves that coincide",
    ),
    ClaimSpec(
        "strong-modes-first",
        "from small random weights the modes are learned in the order of their strength",
        "Spearman correlation of 1/t_half and s, lowest of the random starts",
        ">=",
        1.0,
        "learning time of the order 1/s",
    ),
    ClaimSpec(
        "time-is-one-over-strength",
        "the half-learning times are inversely proportional to the strength",
        "largest deviation of s t_half from its mean over modes, worst of the random starts",
        "<=",
        0.20,
        "learning time of the order 1/s",
    ),
    ClaimSpec(
        "depth-costs-little",
        "from orthogonal weights the learning time saturates with depth",
        "steps at 40 layers over steps at 5, each at its best rate",
        "<=",
        3.0,
        "a finite delay",
    ),
    ClaimSpec(
        "gaussian-slows-down",
        "from scaled Gaussian weights deep networks are far slower",
        "steps at 20 layers over those from orthogonal weights, each at its best rate",
        ">=",
        5.0,
        "time grows with depth",
    ),
    ClaimSpec(
        "best-rate-falls",
        "the best learning rate falls about as one over depth: fast enough",
        "log-log slope of the best rate against depth",
        "<=",
        -0.7,
        "-1",
    ),
    ClaimSpec(
        "best-rate-not-faster",
        "the best learning rate falls about as one over depth: not faster",
        "log-log slope of the best rate against depth",
        ">=",
        -1.4,
        "-1",
    ),
    ClaimSpec(
        "isometry-above-one",
        "the Jacobian of deep orthogonal tanh networks is best conditioned above g = 1",
        "gain with the largest share of singular values in [0.1, 10]",
        ">=",
        1.03,
        "just above 1",
    ),
    ClaimSpec(
        "isometry-near-one",
        "the Jacobian of deep orthogonal tanh networks is best conditioned near g = 1",
        "gain with the largest share of singular values in [0.1, 10]",
        "<=",
        1.12,
        "just above 1",
    ),
    ClaimSpec(
        "isometry",
        "just above g = 1 a large share of the singular values is of order 1",
        "share in [0.1, 10], least of the gains in [1.03, 1.12]",
        ">=",
        0.4,
    ),
    ClaimSpec(
        "gaussian-is-not-isometric",
        "with Gaussian weights the singular values spread at the same gains",
        "share in [0.1, 10], largest of the gains in [1.03, 1.12]",
        "<=",
        0.15,
    ),
)

SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "curve_tasks": ("digits", "graded"),
        "dense_task": "digits",
        "hidden": 64,
        "u0": 1e-3,
        "rate_times_s": 0.02,
        "std": 1e-3,
        "random_starts": 4,
        "depth_tasks": ("graded",),
        "depths": (2, 5, 10, 20, 40),
        "depth_width": 0,  # as many as inputs
        "lowest_rate": 0.005,
        "highest_rate": 1.28,
        "rates": 9,
        "depth_seeds": 3,
        "max_steps": 600,
        "gains": (0.9, 1.0, 1.05, 1.1, 1.3),
        "gain_width": 200,
        "gain_depth": 100,
        "gain_seeds": 1,
    },
    "cpu": {
        "curve_tasks": ("digits", "graded"),
        "dense_task": "digits",
        "hidden": 64,
        "u0": 1e-3,
        "rate_times_s": 0.02,
        "std": 1e-3,
        "random_starts": 20,
        "depth_tasks": ("graded", "digits"),
        "depths": (2, 5, 10, 20, 40),
        "depth_width": 0,
        "lowest_rate": 0.005,
        "highest_rate": 1.28,
        "rates": 9,
        "depth_seeds": 3,
        "max_steps": 1000,
        "gains": (0.8, 0.9, 1.0, 1.03, 1.05, 1.07, 1.1, 1.12, 1.2, 1.3),
        "gain_width": 200,
        "gain_depth": 100,
        "gain_seeds": 3,
    },
    "gpu": {
        "curve_tasks": ("mnist",),
        "dense_task": "mnist",
        "hidden": 1000,
        "u0": 1e-3,
        "rate_times_s": 0.02,
        "std": 1e-3,
        "random_starts": 20,
        "depth_tasks": ("mnist",),
        "depths": (2, 5, 10, 20, 40, 100),
        "depth_width": 1000,
        "lowest_rate": 0.001,
        "highest_rate": 1.0,
        "rates": 13,
        "depth_seeds": 3,
        "max_steps": 1000,
        "gains": (0.8, 0.9, 1.0, 1.03, 1.05, 1.07, 1.1, 1.12, 1.2, 1.3),
        "gain_width": 200,
        "gain_depth": 100,
        "gain_seeds": 10,
    },
}


def recipe(run: Run) -> Iterator[Claim]:
    """Curves over simulation, then depth, then gain."""
    yield from decoupled_curves(run)
    yield from random_starts(run)
    staged_learning(run)
    yield from depth(run)
    yield from gain(run)


def task(run: Run, name: str, of_order_one: bool = False) -> Correlations:
    """Return the whitened correlations of a task.

    ``of_order_one`` scales the targets so that the modes' geometric mean is 1, the size of what
    orthogonal layers start from.
    """
    import numpy as np
    import torch

    from pantarhei.data import load
    from pantarhei.errors import RequestError
    from pantarhei.learning.deep_linear import Correlations, whiten
    from pantarhei.learning.deep_linear.sweeps import graded

    if name == "graded":
        return graded(32, 0.5, 2.0, torch.Generator().manual_seed(run.seed))
    if name not in ("digits", "mnist"):
        raise RequestError(f"'{name}' is not a task: choose graded, digits or mnist.")
    data = load("digits") if name == "digits" else load("mnist")
    digits = name == "digits"  # the sheet takes MNIST's test split
    images, labels = (
        (data.train_images, data.train_labels) if digits else (data.test_images, data.test_labels)
    )
    inputs, _ = whiten(images.reshape(len(images), -1) / 255.0)
    found = Correlations.of(inputs, np.eye(10)[labels])
    if of_order_one:
        scale = float(np.exp(-np.log(found.modes().s).mean()))
        found = Correlations.of(inputs, scale * np.eye(10)[labels])
    return found


def decoupled_curves(run: Run) -> Iterator[Claim]:
    """Follow two layers from a decoupled start and compare every step with the closed form."""
    import numpy as np
    import torch

    from pantarhei.learning import deep_linear as dl
    from pantarhei.learning.deep_linear.figures import mode_curves
    from pantarhei.learning.initializers import balanced

    worst, rows = 0.0, []
    for name in run.settings.curve_tasks:
        data = task(run, name)
        modes = data.modes()
        n3, n1 = data.sigma31.shape
        width = max(run.settings.hidden, len(modes.s))
        generator = torch.Generator().manual_seed(run.seed)
        start = balanced((n1, width, n3), modes.U, modes.V, run.settings.u0, generator=generator)
        rate = run.settings.rate_times_s / modes.s[0]
        until = dl.logistic_time(0.999 * modes.s[-1], modes.s[-1], run.settings.u0, 1 / rate)
        done = dl.gradient_descent([w.to(run.device) for w in start], data, rate, math.ceil(until))
        predicted = dl.predict(data, start, done.times, tau=1 / rate)
        error = np.abs(done.u - predicted.u[:, 0]) / modes.s
        worst = max(worst, float(error.max()))
        for k, s in enumerate(modes.s):
            rows.append({"task": name, "mode": k + 1, "s": s, "largest_error": error[:, k].max()})
        title = f"{name}: two layers from a decoupled start, u0 = {run.settings.u0:g}"
        figure = mode_curves(predicted, (done.times, done.u), title=title, unit="step")
        run.figure(f"mode-curves-{name}", figure)
        run.metrics(
            f"mode-curves-{name}", list(predicted.rows())[:: max(1, len(done.times) // 200)]
        )
    run.metrics("closed-form", rows)
    yield run.claim("closed-form", worst, "closed-form.csv")


def random_starts(run: Run) -> Iterator[Claim]:
    """Train two layers from small dense weights, many starts at once, and time the modes."""
    import numpy as np
    import torch
    from scipy.stats import spearmanr

    from pantarhei.learning import deep_linear as dl
    from pantarhei.learning.deep_linear.figures import mode_curves

    data = task(run, run.settings.dense_task)
    s = data.modes().s
    n3, n1 = data.sigma31.shape
    generator = torch.Generator().manual_seed(run.seed + 1)
    std, hidden, starts = run.settings.std, run.settings.hidden, run.settings.random_starts
    weights = [
        std * torch.randn(starts, *shape, dtype=torch.float64, generator=generator)
        for shape in ((hidden, n1), (n3, hidden))
    ]
    rate = run.settings.rate_times_s / s[0]
    # twice the time that the weakest mode needs from the mean of its random start
    expected = hidden * std**2 / 2
    steps = math.ceil(2 * dl.logistic_time(0.5 * s[-1], s[-1], expected, 1 / rate))
    done = dl.gradient_descent([w.to(run.device) for w in weights], data, rate, steps)
    half = rate * dl.time_to(done.times, done.u, s, 0.5)
    predicted = dl.predict(data, weights, rate * np.unique(np.linspace(0, steps, 400).round()))
    foretold = predicted.time_to(0.5)

    product = s * half
    off = np.abs(product / product.mean(1, keepdims=True) - 1)
    orders = np.array([spearmanr(s, -t).statistic for t in half]).round(12)
    rows = [
        {
            "start": i, "mode": k + 1, "s": s[k], "t_half": half[i, k],
            "t_half_predicted": foretold[i, k], "s_t_half": product[i, k],
            "deviation": off[i, k], "spearman": orders[i],
        }
        for i in range(starts) for k in range(len(s))
    ]  # fmt: skip
    run.metrics("random-starts", rows)
    median = spearmanr(s, -np.median(half, 0)).statistic
    error = np.abs(foretold / half - 1)
    run.log(
        f"Spearman of single starts {orders.min():.4f} to {orders.max():.4f}, of the median times "
        f"{median:.4f}; predicted half times are off by {np.median(error):.2%} (median), "
        f"{error.max():.2%} (largest)."
    )
    one = dl.predict(data, [w[0] for w in weights], predicted.times)
    title = f"{run.settings.dense_task}: one random start of std {std:g}"
    simulated = (rate * done.times, done.u[:, 0])
    run.figure("random-start", mode_curves(one, simulated, title=title))
    yield run.claim("strong-modes-first", orders.min(), "random-starts.csv")
    yield run.claim("time-is-one-over-strength", off.max(), "random-starts.csv")


def staged_learning(run: Run) -> None:
    """Learn the features of a binary tree's leaves: broad distinctions first. No claim."""
    import torch

    from pantarhei.data.simulate.hierarchy import hierarchy
    from pantarhei.learning import deep_linear as dl
    from pantarhei.learning.deep_linear.figures import mode_curves

    data = dl.Correlations.of(*hierarchy(2, 3, 0.1, 100, run.seed))
    generator = torch.Generator().manual_seed(run.seed)
    weights = [
        run.settings.std * torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((32, 8), (100, 32))
    ]
    predicted = dl.predict(data, weights)
    done = dl.gradient_flow(weights, data, predicted.times)
    title = "Eight leaves of a binary tree, 100 features, flips 0.1"
    run.figure("staged", mode_curves(predicted, (done.times, done.u), title=title))
    run.metrics("staged", list(predicted.rows()))


def depth(run: Run) -> Iterator[Claim]:
    """Train deep linear networks at their best rates, from three kinds of start."""
    import numpy as np

    from pantarhei.learning.deep_linear.figures import depth_curves
    from pantarhei.learning.deep_linear.sweeps import depth_sweep

    settings = run.settings
    starts = ("orthogonal", "decoupled", "gaussian")
    rates = np.geomspace(settings.lowest_rate, settings.highest_rate, settings.rates)
    kept: list[dict[str, Any]] = []
    found: dict[str, list[float]] = {"saturates": [], "slower": [], "slope": []}
    total = len(settings.depth_tasks) * len(starts) * len(settings.depths) * settings.depth_seeds
    with run.progress(total, "depth") as bar:
        for name in settings.depth_tasks:
            rows = depth_sweep(
                task(run, name, of_order_one=name != "graded"),
                settings.depths,
                starts,
                rates.tolist(),
                width=settings.depth_width or None,
                seeds=settings.depth_seeds,
                max_steps=settings.max_steps,
                seed=run.seed,
                device=run.device,
                done=lambda row: bar.advance(),
            )
            kept += [{"task": name, **row} for row in rows]
            run.metrics("depth", kept)
            run.figure(f"depth-{name}", depth_curves(rows, settings.max_steps, 0.02))
            for key, value in compare_depths(rows, settings.max_steps).items():
                found[key].append(value)
    yield run.claim("depth-costs-little", max(found["saturates"]), "depth.csv")
    yield run.claim("gaussian-slows-down", min(found["slower"]), "depth.csv")
    yield run.claim("best-rate-falls", max(found["slope"]), "depth.csv")
    yield run.claim("best-rate-not-faster", min(found["slope"]), "depth.csv")


def compare_depths(rows: list[dict[str, Any]], max_steps: int) -> dict[str, float]:
    """Work the claims' quantities out of a sweep: medians over seeds.

    A Gaussian training that did not arrive counts as ``max_steps``, which makes it too fast; an
    orthogonal one counts as infinite.
    """
    import numpy as np

    def median(start: str, n: int) -> float:
        steps = [r["steps"] for r in rows if (r["start"], r["n"]) == (start, n)]
        return float(np.median(steps)) if steps else math.nan

    depths = sorted({row["n"] for row in rows})
    rates = [
        np.mean([math.log(r["rate"]) for r in rows if r["start"] == "orthogonal" and r["n"] == n])
        for n in depths
    ]
    orthogonal = {n: median("orthogonal", n) for n in depths}
    return {
        "saturates": orthogonal.get(40, math.nan) / orthogonal.get(5, math.nan),
        "slower": min(median("gaussian", 20), max_steps) / orthogonal.get(20, math.nan),
        "slope": float(np.polyfit(np.log(depths), rates, 1)[0]),
    }


def gain(run: Run) -> Iterator[Claim]:
    """Measure the Jacobians of deep tanh networks around the critical gain."""
    import numpy as np

    from pantarhei.learning.deep_linear.figures import gain_shares, gain_spectra
    from pantarhei.learning.deep_linear.sweeps import gain_sweep

    settings = run.settings
    with run.progress(2 * len(settings.gains) * settings.gain_seeds, "gain") as bar:
        rows = gain_sweep(
            "tanh",
            settings.gains,
            width=settings.gain_width,
            depth=settings.gain_depth,
            seeds=settings.gain_seeds,
            seed=run.seed,
            device=run.device,
            done=lambda row: bar.advance(),
        )
    run.metrics("gain", [{k: v for k, v in row.items() if k != "values"} for row in rows])
    run.figure("gain-share", gain_shares(rows))
    run.figure("gain-spectra", gain_spectra(rows))

    def share(start: str, g: float) -> float:
        return float(np.mean([r["share"] for r in rows if (r["start"], r["gain"]) == (start, g)]))

    best = max(settings.gains, key=lambda g: share("orthogonal", g))
    band = [g for g in settings.gains if 1.03 <= g <= 1.12]
    yield run.claim("isometry-above-one", best, "gain.csv")
    yield run.claim("isometry-near-one", best, "gain.csv")
    yield run.claim(
        "isometry", min((share("orthogonal", g) for g in band), default=math.nan), "gain.csv"
    )
    yield run.claim(
        "gaussian-is-not-isometric", max(share("gaussian", g) for g in band), "gain.csv"
    )
