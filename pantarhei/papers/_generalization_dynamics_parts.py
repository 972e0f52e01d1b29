"""Parts of the generalisation-dynamics recipe: deep students, both layers trained, real data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from pantarhei.files import read_json, write_json
from pantarhei.learning.generalization import deep_flow, figures, flow, stopping_time
from pantarhei.learning.generalization.frozen import DataSubspace
from pantarhei.learning.generalization.random_features import (
    Course,
    Task,
    relu_teacher,
    train_both_layers,
)
from pantarhei.runs import Run

Array = NDArray[np.float64]

_LABEL_NOISE = 0.2
_RANK_ROWS = 300


def deep_students(run: Run, size: int = 100, repeats: int = 4, snr: float = 5.0) -> None:
    """Follow linear students of depth 1, 2 and 3 from one small start at P = N."""
    times = np.geomspace(1e-4, 30, 160)
    errors: dict[str, Array] = {}
    for depth in (1, 2, 3):
        seen = []
        for repeat in range(repeats):
            rng = np.random.default_rng([run.seed, repeat])
            x = rng.normal(size=(size, size)) / np.sqrt(size)
            teacher, start = rng.normal(size=size), 0.01 * rng.normal(size=size)
            y = x @ teacher + rng.normal(size=size) / np.sqrt(snr)
            w = deep_flow(x, y, times, start, depth, tolerance=1e-8)
            seen.append(((w - teacher) ** 2).mean(1) + 1 / snr)
        errors[f"depth {depth}"] = np.mean(seen, 0)
    rows = [
        {"student": name, "best error": e.min(), "at t": times[e.argmin()], "final": e[-1]}
        for name, e in errors.items()
    ]
    run.metrics("deep.csv", rows)
    labels = {"xlabel": "time t / τ", "ylabel": "test error / teacher's variance"}
    run.figure("deep", figures.lines(times, errors, **labels))


def both_layers_teacher(run: Run) -> None:
    """Train both layers on the ReLU teacher's data, and count the directions that data reach."""
    s = run.settings
    task = relu_teacher(1, s.examples, s.width_snr, tests=s.tests, seed=run.seed).one(0)
    _train_widths(run, "teacher", task, s.teacher_widths, s.teacher_steps)


def both_layers_images(run: Run) -> float:
    """Train both layers on images with noisy labels; return widest over best narrower, at the end.

    Targets are one-hot, centred; test labels are clean.
    """
    from pantarhei.data import load

    s = run.settings
    data = load(s.images)
    rng = np.random.default_rng([run.seed, 1])
    chosen = rng.permutation(len(data.train_labels))[: s.image_examples]
    labels = data.train_labels[chosen]
    wrong = rng.random(len(labels)) < _LABEL_NOISE
    labels = np.where(wrong, rng.integers(0, 10, len(labels)), labels)
    images, tests = (
        part.reshape(len(part), -1).astype(np.float32)
        for part in (data.train_images[chosen], data.test_images[: s.tests])
    )
    mean, spread = images.mean(0), images.std()
    task = Task(
        torch.from_numpy((images - mean) / spread),
        torch.from_numpy(np.eye(10, dtype=np.float32)[labels] - 0.1),
        torch.from_numpy((tests - mean) / spread),
        torch.from_numpy(np.eye(10, dtype=np.float32)[data.test_labels[: s.tests]] - 0.1),
    )
    final = _train_widths(run, "images", task, s.image_widths, s.image_steps)
    return final[-1] / min(final[:-1], default=float("nan"))


def _train_widths(
    run: Run, name: str, task: Task, widths: tuple[int, ...], steps: int
) -> list[float]:
    """Train a student of each width, keep its errors, draw them; return the final test errors."""
    rows, curves = [], {}
    for width in widths:
        kept = run.checkpoint(f"{name}-{width}.json")
        if not kept.exists():
            course = train_both_layers(
                task, width, steps, seed=run.seed, device=run.device, quiet=run.quiet
            )
            write_json(
                kept,
                {
                    "steps": course.steps.tolist(),
                    "train": course.train.tolist(),
                    "test": course.test.tolist(),
                    "rank": _rank(course, task),
                },
            )
        found = read_json(kept)
        test = np.array(found["test"])
        curves[width] = (found["steps"], test)
        rows.append(
            {
                "width": width,
                "parameters": width * (task.x.shape[1] + (task.y.shape[1])),
                "train": found["train"][-1],
                "best": test.min(),
                "final": test[-1],
                "overtraining": test[-1] - test.min(),
                f"rank of {_RANK_ROWS} outputs": found["rank"],
            }
        )
    run.metrics(f"{name}.csv", rows)
    labels = {"xlabel": "hidden units, both layers trained", "ylabel": "test error"}
    columns = {key: [row[key] for row in rows] for key in ("final", "best")}
    run.figure(f"{name}-widths", figures.lines(widths, columns, marker="o", **labels))
    return [row["final"] for row in rows]


def _rank(course: Course, task: Task) -> int:
    """Return how many directions of the trained network's weights the first outputs reach."""
    count = max(1, _RANK_ROWS // task.y.shape[1])
    batch = (task.x[:count].float(), task.y[:count].float())
    space = DataSubspace(course.model, lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(), batch)
    return space.rank


def real_data(run: Run) -> None:
    """Predict the stop on real data, beside validation, ridge and the run's own best time."""
    rows = []
    for name, (x, y) in _tables().items():
        for alpha in run.settings.alphas:
            ratios = [_split(x, y, alpha, [run.seed, n]) for n in range(run.settings.splits)]
            rows += [
                {
                    "data": name,
                    "alpha": alpha,
                    "method": method,
                    "median test error over the oracle's": float(
                        np.median([split[method] for split in ratios])
                    ),
                    "worst": max(split[method] for split in ratios),
                }
                for method in ratios[0]
            ]
    run.metrics("real-data.csv", rows)


def _tables() -> dict[str, tuple[Array, Array]]:
    """Return real regression problems: inputs, and targets of variance 1."""
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
    from sklearn.preprocessing import PolynomialFeatures

    diabetes, cancer, digits = load_diabetes(), load_breast_cancer(), load_digits()
    products = PolynomialFeatures(2, include_bias=False).fit_transform(diabetes.data)
    raw = {
        "diabetes (products of inputs)": (products, diabetes.target),
        "breast cancer": (cancer.data, cancer.target),
        "digits (above 4)": (digits.data, digits.target > 4),
    }
    return {
        name: (np.asarray(x, dtype=np.float64), (y - y.mean()) / y.std())
        for name, (x, y) in raw.items()
    }


def _split(x: Array, y: Array, alpha: float, seed: list[int]) -> dict[str, float]:
    """Return each method's test error over that of the best time, on one random split."""
    from sklearn.linear_model import Ridge, RidgeCV

    rng = np.random.default_rng(seed)
    order = rng.permutation(len(y))
    count = max(8, round(alpha * x.shape[1]))
    train, test = order[:count], order[count:]
    mean, spread = x[train].mean(0), x[train].std(0)
    # An input constant in these examples teaches nothing; a nearly constant one must not explode.
    spread = np.where(spread > 1e-2 * x.std(0), spread, np.inf)
    z = (x - mean) / spread

    def error(predict: Callable[[Array], Array]) -> float:
        return float(((predict(z[test]) - y[test]) ** 2).mean())

    stop = stopping_time(z[train], y[train])
    penalties = stop.scale**2 * np.geomspace(1e-5, 1e3, 60)
    times = np.append(np.geomspace(1e-3, 1e5, 120) / stop.scale**2, np.inf)
    offset = y[train].mean()
    path = flow(z[train], y[train] - offset, times) @ z[test].T + offset
    errors = ((path - y[test]) ** 2).mean(1)
    held = max(2, count // 4)
    fitted, held_out = train[held:], train[:held]
    center = z[fitted].mean(0)
    trained = flow(z[fitted] - center, y[fitted] - y[fitted].mean(), times)
    validated = ((trained @ (z[held_out] - center).T + y[fitted].mean() - y[held_out]) ** 2).mean(1)
    chosen = trained[validated.argmin()]
    ridge = Ridge(min(stop.penalty, 1e12)).fit(z[train], y[train])
    found = {
        "predicted stop": error(stop.predict),
        "validation (a quarter held out)": error(
            lambda inputs: (inputs - center) @ chosen + y[fitted].mean()
        ),
        "ridge, 1/SNR": error(ridge.predict),
        "RidgeCV": error(RidgeCV(penalties).fit(z[train], y[train]).predict),
        "to the end": float(errors[-1]),
    }
    return {name: value / float(errors.min()) for name, value in found.items()}
