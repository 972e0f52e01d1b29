"""The bodies of ``pantarhei generalization curve | stop | width-sweep | bound``.

Each works on a table of the user's (CSV with a header, or an ``.npz`` with X and y), or without one
on the theory's own setting. A job returns an :class:`Outcome`, which :func:`deliver` prints, and
writes where ``--out`` says; a file that is there is never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pantarhei.data.table import read_table as read_columns
from pantarhei.errors import RequestError
from pantarhei.learning.generalization.estimate import Loss, Stopping, stopping_time
from pantarhei.learning.generalization.spectrum import Array
from pantarhei.learning.generalization.theory import (
    optimal_time,
    ridge_error,
    test_error,
    train_error,
)
from pantarhei.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A user's data: inputs (P, N), targets (P,), and their names."""

    inputs: Array
    targets: Array
    names: tuple[str, ...]
    target: str


def read_table(path: str, target: str | None = None, standardise: bool = True) -> Table:
    """Read a table with one target (``target`` names a CSV's column, the last by default).

    A target of two words counts as -1 and 1. ``standardise`` scales each input to mean 0 and
    variance 1; one that does not vary is left out.
    """
    read = read_columns(path, () if target is None else (target,))
    name = read.target_names[0].partition("=")[0]
    if read.targets.shape[1] == 2 and read.target_names[0] != name:
        targets = read.targets[:, 1] - read.targets[:, 0]
    elif read.targets.shape[1] == 1:
        targets = read.targets[:, 0]
    else:
        raise RequestError(
            f"'{path}' has {read.targets.shape[1]} targets or classes: give one number, or two "
            "words, a row."
        )
    inputs, names = read.inputs, read.input_names
    if standardise:
        spread = inputs.std(0)
        kept = spread > 0
        if not kept.any():
            raise RequestError(f"no input of '{path}' varies: there is nothing to learn from.")
        inputs = (inputs[:, kept] - inputs[:, kept].mean(0)) / spread[kept]
        names = tuple(name for name, keep in zip(names, kept, strict=True) if keep)
    return Table(inputs, targets, names, name)


def curve(
    table: Table | None,
    alpha: Sequence[float],
    snr: float | None,
    inr: float,
    until: float,
    points: int,
) -> Outcome:
    """Return train and test error over time, of the theory or as predicted for data."""
    if points < 2 or not 1e-2 < until < np.inf:
        raise RequestError("--points is at least 2 and --until a time above 0.01.")
    times, fine = (np.geomspace(1e-2, until, count) for count in (points, 200))
    if table is not None:
        return _data_curve(table, snr, inr, times, fine)
    return _theory_curve(alpha, 5.0 if snr is None else snr, inr, times, fine)


def _data_curve(table: Table, snr: float | None, inr: float, times: Array, fine: Array) -> Outcome:
    from pantarhei.learning.generalization.figures import error_curves

    found = stopping_time(table.inputs, table.targets, snr=snr, inr=inr)
    rows = [
        {"t": t, "train": train, "test": test}
        for t, train, test in zip(times, *found.errors(times), strict=True)
    ]
    name = f"{table.target}, {len(table.targets)} examples"
    best = {name: (found.time, float(found.errors(found.time)[1]))}
    return Outcome(
        f"Expected errors of a linear model of {name}",
        rows,
        _stop_facts(found),
        figures={"curve": lambda: error_curves(fine, {name: found.errors(fine)}, best, unit="")},
    )


def _theory_curve(
    alpha: Sequence[float], snr: float, inr: float, times: Array, fine: Array
) -> Outcome:
    from pantarhei.learning.generalization.figures import error_curves

    names = {f"P/N = {a:g}": a for a in alpha}
    columns = {
        f"{kind}, {name}": error(times, a, snr, inr)
        for kind, error in (("train", train_error), ("test", test_error))
        for name, a in names.items()
    }
    rows = [
        {"t": t, **{name: values[i] for name, values in columns.items()}}
        for i, t in enumerate(times)
    ]
    best = {name: float(optimal_time(a, snr, inr)) for name, a in names.items()}

    def draw() -> Figure:
        curves = {
            name: (train_error(fine, a, snr, inr), test_error(fine, a, snr, inr))
            for name, a in names.items()
        }
        stops = {n: (t, float(test_error(t, names[n], snr, inr))) for n, t in best.items()}
        return error_curves(fine, curves, stops)

    return Outcome(
        f"Errors over the teacher's variance, SNR {snr:g}, INR {inr:g}",
        rows,
        {f"best time, {name}": t for name, t in best.items()},
        figures={"curve": draw},
    )


def stop(
    table: Table | None,
    alpha: Sequence[float],
    snr: Sequence[float],
    inr: float,
    lr: float | None,
    loss: Loss,
    batch_size: int | None,
) -> Outcome:
    """Return when to stop, of the theory for every alpha and SNR or as predicted for data."""
    if table is not None:
        if len(snr) > 1:
            raise RequestError("data have one SNR: give --snr once, or leave it to be estimated.")
        found = stopping_time(
            table.inputs,
            table.targets,
            snr=snr[0] if snr else None,
            inr=inr,
            lr=lr,
            loss=loss,
            batch_size=batch_size,
        )
        facts = _stop_facts(found)
        return Outcome(
            f"A linear model of {table.target}: {len(table.targets)} examples of "
            f"{table.inputs.shape[1]} inputs",
            [{"quantity": name, "value": value} for name, value in facts.items()],
        )
    if lr is not None:
        raise RequestError("--lr turns the time into steps for data: name a table as well.")
    grid = [(a, r) for a in alpha for r in snr or (1.0, 5.0, 50.0)]
    ratios, signal = np.array(grid).T
    times = optimal_time(ratios, signal, inr)
    columns = {
        "P/N": ratios,
        "SNR": signal,
        "best time": times,
        "error there": test_error(times, ratios, signal, inr),
        "best ridge": ridge_error(ratios, signal),
        "error at the end": test_error(np.inf, ratios, signal, inr),
    }
    rows = [
        dict(zip(columns, map(float, row), strict=True)) for row in np.stack([*columns.values()], 1)
    ]
    return Outcome(f"Best stopping times, INR {inr:g}; errors over the teacher's variance", rows)


def _stop_facts(found: Stopping) -> dict[str, Any]:
    train, test = found.errors([found.time, np.inf])
    facts: dict[str, Any] = {
        "examples / inputs": found.alpha,
        "SNR": found.snr,
        "noise variance": found.noise,
        "best time t / tau": found.time,
        "best time, inputs as they came": found.raw_time,
        "equivalent ridge penalty": found.penalty,
        "expected test error there": float(test[0]),
        "expected training error there": float(train[0]),
        "expected test error at the end": float(test[1]),
    }
    return facts if found.steps is None else {"best step": round(found.steps), **facts}


def sweep(
    table: Table | None,
    widths: Sequence[int],
    *,
    bounds: bool = False,
    examples: int = 300,
    snr: float = 10.0,
    seeds: int = 10,
    until: float = 1e5,
    start: float = 0.0,
    center: bool = False,
    test_share: float = 0.25,
    seed: int = 0,
    quiet: bool = False,
) -> Outcome:
    """Return errors, or complexity terms beside the true gap, of random ReLU students by width."""
    from pantarhei.learning.generalization import figures
    from pantarhei.learning.generalization.random_features import relu_teacher, width_sweep
    from pantarhei.progress import progress

    if seeds < 1 or not 1e-3 < until < np.inf:
        raise RequestError("--seeds is at least 1 and --until a time above 0.001.")
    if table is None:
        if examples < 2:
            raise RequestError("--examples is at least 2.")
        task, name = relu_teacher(seeds, examples, snr, seed=seed), "a ReLU teacher"
    else:
        task, name = _split(table, test_share, seed), table.target
    many = task.x.shape[-2]
    chosen = list(widths) or [
        max(1, round(many * share)) for share in (0.1, 0.25, 0.5, 0.9, 1, 1.1, 2, 5)
    ]
    with progress(len(chosen), "widths", quiet=quiet) as bar:
        found = width_sweep(
            task,
            sorted(set(chosen)),
            np.geomspace(1e-3, until, 60),
            seeds=None if table is None else seeds,
            start=start,
            center=center,
            seed=seed,
            progress=bar,
        )
    shown = ("width", "train", "best", "final", "overtraining", "smallest eigenvalue", "rank")
    if bounds:
        shown = ("width", "gap", "plain bound", "conditioned bound", "capped bound", "norm", "rank")
    rows = [{key: row[key] for key in shown} for row in found.rows()]
    title = (
        f"Random ReLU features of {name}: {many} examples, medians of {seeds} seeds, t to {until:g}"
    )
    draw = figures.bounds if bounds else figures.overtraining
    return Outcome(title, rows, figures={"widths": lambda: draw(found, name)})


def _split(table: Table, test_share: float, seed: int) -> Any:
    """Return a task of the table's rows, its test rows at random; inputs and targets centred."""
    from torch import from_numpy

    from pantarhei.learning.generalization.random_features import Task

    count = len(table.targets)
    tests = round(test_share * count)
    if not 1 <= tests <= count - 2:
        raise RequestError(
            f"--test-share {test_share:g} leaves {count - tests} of {count} rows for training: "
            "choose another."
        )
    order = np.random.default_rng(seed).permutation(count)
    test, train = order[:tests], order[tests:]
    y = (table.targets - table.targets[train].mean())[:, None]
    parts = (table.inputs[train], y[train], table.inputs[test], y[test])
    return Task(*(from_numpy(np.ascontiguousarray(part)) for part in parts))  # type: ignore[arg-type]
