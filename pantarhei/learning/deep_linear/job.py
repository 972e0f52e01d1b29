"""The bodies of ``pantarhei deep-linear predict | depth-sweep | gain-sweep``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pantarhei.data.table import Table
from pantarhei.errors import RequestError, nearest
from pantarhei.learning.deep_linear.closed_forms import stability_bound
from pantarhei.learning.deep_linear.correlations import Correlations, whiten
from pantarhei.learning.deep_linear.flow import gradient_descent
from pantarhei.learning.deep_linear.prediction import Prediction, predict, time_to
from pantarhei.outcome import Outcome

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

Array = NDArray[np.float64]


def learning_curve(
    table: Table,
    *,
    hidden: Sequence[int],
    start: str,
    std: float,
    u0: float,
    lr: float,
    loss: str,
    steps: int | None,
    draws: int,
    validation: float,
    raw: bool,
    approximate: bool,
    check: bool,
    seed: int,
) -> Outcome:
    """Predict the training of a linear or deep linear network on a table, in steps of descent."""
    if not 0 <= validation < 1:
        raise RequestError(f"--validation is a share from 0 to below 1, not {validation}.")
    if draws < 1 or (steps is not None and steps < 1) or std <= 0 or u0 <= 0:
        raise RequestError("--draws and --steps are 1 or more, --std and --u0 above 0.")
    data, held, note = _prepare(table, validation, raw or not hidden, seed)
    n3, n1 = data.sigma31.shape
    if hidden and raw and not (approximate or data.whitened or data.commuting):
        raise RequestError(
            "The inputs are not white, and a deep network mixes its modes: leave --raw away, or "
            "add --approximate."
        )
    weights = _starts((n1, *hidden, n3), start, std, u0, draws, data, seed)
    tau = data.tau(lr, loss)  # type: ignore[arg-type]
    times = None if steps is None else np.unique(np.linspace(0, steps, 401).round())
    predicted = predict(data, weights, times, tau=tau, approximate=approximate)
    rows = _mode_rows(predicted, hidden, start)
    largest = float(np.linalg.norm(data.least_squares, 2))
    bound = float(
        stability_bound(len(hidden) + 1, largest)
        if hidden
        else 2 / float(np.linalg.norm(data.sigma11, 2))
    )
    best = [float(x) for x in (predicted.stopping_time(), predicted.times[-1])]
    summary: dict[str, Any] = {
        "samples": data.samples,
        "inputs": n1,
        "outputs": n3,
        "widths": [n1, *hidden, n3],
        "prediction": predicted.kind,
        "note": note,
        "tau": tau,
        "rate_over_stability_bound": (1 / tau) / bound,
        "loss_at_start": float(np.median(predicted.loss()[0])),
        "loss_floor": data.floor,
        "steps_to_1_percent_of_the_learnable_loss": best[0],
        "plateaus": predicted.plateaus(),
        "order_learned": [int(k) + 1 for k in predicted.order if predicted.modes.s[k] > 0],
    }
    losses = {"training": np.median(predicted.loss(), 1)}
    curve = [{**row} for row in predicted.rows()]
    if held is not None:
        losses["validation"] = np.median(predicted.loss_on(held), 1)
        i = int(np.argmin(losses["validation"]))
        summary["stop_at_step"] = float(predicted.times[i])
        summary["validation_loss_there"] = float(losses["validation"][i])
        summary["still_falling_at_the_end"] = i == len(predicted.times) - 1
        for row, value in zip(curve, losses["validation"], strict=True):
            row["validation"] = float(value)
    simulated = None
    if check:
        simulated = _check(weights, data, tau, predicted, rows, summary)
    curve = [{"step": row.pop("t"), **row} for row in curve]

    def draw() -> Figure:
        from pantarhei.learning.deep_linear.figures import mode_curves

        title = f"A linear network of widths {', '.join(map(str, summary['widths']))}"
        return mode_curves(predicted, simulated, title=title, unit="step", losses=losses)

    return Outcome("Modes, in steps of descent", rows, summary, {"curves": curve}, {"curves": draw})


def _prepare(
    table: Table, validation: float, raw: bool, seed: int
) -> tuple[Correlations, Correlations | None, str]:
    """Split, centre and whiten: everything is estimated on the training rows alone."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(table.inputs))
    held = round(validation * len(order))
    if validation and not 1 <= held <= len(order) - 2:
        raise RequestError(
            f"{len(order)} rows are too few to hold back a share of {validation}: leave that away."
        )
    train, rest = np.sort(order[held:]), np.sort(order[:held])
    centre, target = table.inputs[train].mean(0), table.targets[train].mean(0)
    x, y = table.inputs - centre, table.targets - target
    if not np.any(x[train]) or not np.any(y[train]):
        raise RequestError(
            "No input, or no target, varies over the rows: there is nothing to learn."
        )
    note = "inputs and targets centred"
    if raw:
        spread = x[train].std(0)
        x = x[:, spread > 0] / spread[spread > 0]
        note += ", inputs divided by their standard deviations"
    else:
        inputs = x
        if len(train) - 1 <= np.linalg.matrix_rank(x[train]):
            raise RequestError(
                f"{len(train)} rows are too few to whiten {x.shape[1]} inputs: a linear map fits "
                "them all exactly; give more rows or fewer inputs."
            )
        _, transform = whiten(inputs[train])
        x = inputs @ transform
        note += f", inputs whitened ({x.shape[1]} of {inputs.shape[1]} directions vary)"
    data = Correlations.of(x[train], y[train])
    return data, Correlations.of(x[rest], y[rest]) if held else None, note


def _starts(
    widths: Sequence[int],
    start: str,
    std: float,
    u0: float,
    draws: int,
    data: Correlations,
    seed: int,
) -> list[torch.Tensor]:
    import torch

    from pantarhei.learning.deep_linear.sweeps import start_weights

    if min(widths) < 1:
        raise RequestError("A hidden layer has one unit or more.")
    generator = torch.Generator().manual_seed(seed)
    pairs = list(zip(widths[1:], widths, strict=False))
    if start == "zero":
        if len(widths) > 2:
            raise RequestError("A deep network never leaves zero: start it from small weights.")
        return [torch.zeros(1, *pairs[0], dtype=torch.float64)]
    if start == "small":
        return [
            std * torch.randn(draws, *pair, dtype=torch.float64, generator=generator)
            for pair in pairs
        ]
    drawn = [
        start_weights(start, widths, data, generator, u0=u0)
        for _ in range(1 if start == "decoupled" else draws)
    ]
    return [torch.stack(layers) for layers in zip(*drawn, strict=True)]


def _mode_rows(predicted: Prediction, hidden: Sequence[int], start: str) -> list[dict[str, Any]]:
    early, half, late = (predicted.time_to(share) for share in (0.1, 0.5, 0.9))
    if half.shape[0] > 1:
        low, high = (np.quantile(half, q, axis=0, method="nearest") for q in (0.1, 0.9))
    else:
        alone = time_to(predicted.times, predicted.u_alone, predicted.modes.target, 0.5)
        low, high = np.minimum(half, alone)[0], np.maximum(half, alone)[0]
    return [
        {
            "mode": int(k) + 1,
            "s": float(predicted.modes.s[k]),
            "target": float(predicted.modes.target[k]),
            "t_10": float(np.median(early[:, k])),
            "t_half": float(np.median(half[:, k])),
            "t_half_low": float(low[k]),
            "t_half_high": float(high[k]),
            "t_90": float(np.median(late[:, k])),
        }
        for k in np.flatnonzero(predicted.modes.s)
    ]


def _check(
    weights: Sequence[torch.Tensor],
    data: Correlations,
    tau: float,
    predicted: Prediction,
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
) -> tuple[Array, Array]:
    """Descend step by step on the correlations, and set what happens beside what was predicted."""
    steps = math.ceil(predicted.times[-1])
    every = max(1, steps // 2000)
    done = gradient_descent(weights, data, 1 / tau, steps, every=every, keep_products=True)
    assert done.products is not None
    u = predicted.modes.strengths(done.products)
    u = u.reshape(len(done.times), -1, u.shape[-1])
    half = time_to(done.times, u, predicted.modes.target, 0.5)
    for row in rows:
        row["t_half_simulated"] = float(np.median(half[:, row["mode"] - 1]))
    loss = np.median(done.loss.reshape(len(done.times), -1), 1)
    there = np.interp(predicted.times, done.times, loss)
    gap = np.abs(np.median(predicted.loss(), 1) - there).max()
    summary["largest_error_of_the_predicted_loss"] = float(gap / max(loss[0] - data.floor, 1e-300))
    return done.times, np.median(u, 1)


def depths(
    table: Table | None,
    *,
    size: int,
    low: float,
    high: float,
    depth: Sequence[int],
    starts: Sequence[str],
    rates: Sequence[float],
    width: int | None,
    seeds: int,
    error: float,
    max_steps: int,
    seed: int,
) -> Outcome:
    """Measure learning time and best rate against depth, of data or of graded modes."""
    import torch

    from pantarhei.learning.deep_linear.sweeps import STARTS, depth_sweep, graded

    if unknown := set(starts) - set(STARTS):
        name = min(unknown)
        raise RequestError(
            f"'{name}' is not a start: choose {', '.join(STARTS)}.{nearest(name, STARTS)}"
        )
    if min(depth) < 1 or seeds < 1 or max_steps < 1 or not 0 < error < 1 or min(rates) <= 0:
        raise RequestError(
            "Depths, --seeds and --max-steps are 1 or more, rates positive, and --error between 0 "
            "and 1."
        )
    if table is None:
        data = graded(size, low, high, torch.Generator().manual_seed(seed))
        what = f"{size} modes from {low:g} to {high:g}"
    else:
        data, _, _ = _prepare(table, 0.0, False, seed)
        # Orthogonal layers start from singular values of 1: bring the task to that size.
        scale = float(np.exp(-np.log(data.modes().s[data.modes().s > 0]).mean()))
        data = Correlations(scale * data.sigma31, data.sigma11, scale**2 * data.power, data.samples)
        what = "the table, whitened, targets scaled to modes of order 1"
    rows = depth_sweep(
        data, depth, starts, rates,
        width=width, seeds=seeds, error=error, max_steps=max_steps, seed=seed,
    )  # fmt: skip
    table_rows = []
    for start in starts:
        for n in depth:
            own = [row for row in rows if (row["start"], row["n"]) == (start, n)]
            rate = [row["rate"] for row in own if not math.isnan(row["rate"])]
            table_rows.append(
                {
                    "start": start,
                    "n": n,
                    "steps": float(np.median([row["steps"] for row in own])),
                    "best_rate": float(np.exp(np.mean(np.log(rate)))) if rate else math.nan,
                }
            )

    def draw() -> Figure:
        from pantarhei.learning.deep_linear.figures import depth_curves

        return depth_curves(rows, max_steps, error)

    summary = {"task": what, "error": error, "max_steps": max_steps, "rates": list(rates)}
    title = f"Steps to {error:.0%} of the learnable loss, at the best rate"
    return Outcome(title, table_rows, summary, {"depth": rows}, {"depth": draw})


def gains(
    activation: str,
    *,
    gain: Sequence[float] | None,
    starts: Sequence[str],
    width: int,
    depth: int,
    seeds: int,
    seed: int,
) -> Outcome:
    """Measure the Jacobian of deep networks against the gain, beside the critical gain.

    Without gains: 0.9, 1, 1.05, 1.1 and 1.3 times the critical one.
    """
    from pantarhei.learning.deep_linear.sweeps import gain_sweep
    from pantarhei.probes.mean_field import critical_gain

    if unknown := set(starts) - {"orthogonal", "gaussian"}:
        raise RequestError(f"'{min(unknown)}' is not a start here: choose orthogonal or gaussian.")
    if seeds < 1 or min(gain or (1.0,)) <= 0:
        raise RequestError("--seeds is 1 or more and every gain positive.")
    summary: dict[str, Any] = {"activation": activation, "width": width, "depth": depth}
    try:
        critical = critical_gain(activation)
        summary |= {"critical_gain": critical.gain, "variance_there": critical.variance}
    except RequestError as error:
        if gain is None:
            raise
        summary["critical_gain"] = f"none ({error})"
    else:
        gain = gain or [round(x * critical.gain, 4) for x in (0.9, 1.0, 1.05, 1.1, 1.3)]
    rows = gain_sweep(activation, gain, starts, width=width, depth=depth, seeds=seeds, seed=seed)
    keys = ("share", "median", "smallest", "largest", "variance")
    table = []
    for start in starts:
        for g in gain:
            own = [row for row in rows if (row["start"], row["gain"]) == (start, g)]
            means = {key: float(np.median([row[key] for row in own])) for key in keys}
            table.append({"start": start, "gain": g, **means})

    def shares() -> Figure:
        from pantarhei.learning.deep_linear.figures import gain_shares

        return gain_shares(rows)

    def spectra() -> Figure:
        from pantarhei.learning.deep_linear.figures import gain_spectra

        return gain_spectra(rows)

    flat = [
        {"start": r["start"], "gain": r["gain"], "seed": r["seed"], "singular_value": value}
        for r in rows
        for value in r["values"]
    ]
    return Outcome(
        "Jacobian of the whole network: share of singular values in [0.1, 10], and their range",
        table,
        summary,
        {"spectra": flat},
        {"share": shares, "spectra": spectra},
    )
