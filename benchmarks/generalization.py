"""When to stop, by theory against by watching: stopping_time, validation, RidgeCV, quadrature.

python benchmarks/generalization.py [--examples 600] [--inputs 400] [--rounds 5]

All methods get the same data in the same run, and take turns; times are the processor's, medians
over the rounds. Risks are the squared distance to the teacher's weights, over the smallest on the
run's own path (1.00 is the oracle).

- validation: gradient descent at half the stability limit on three quarters of the data, stopped
  when the error on the rest has not fallen for a tenth of the steps so far (at least 200);
- RidgeCV: scikit-learn's generalised cross-validation over 60 penalties;
- quadrature: the theory's best time for alpha and SNR by scipy's adaptive integrals and minimiser,
  against ours for one pair and for a whole grid of them;
- a random-feature student followed to a late time by its singular values, against stepping.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from sklearn.linear_model import RidgeCV

from pantarhei.learning.generalization import (
    flow,
    marchenko_pastur_density,
    optimal_time,
    stopping_time,
)


def timed(call: Callable) -> tuple[float, object]:
    began = time.process_time()
    result = call()
    return time.process_time() - began, result


def by_validation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    held = len(x) // 4
    fitted, target, watch, truth = x[held:], y[held:], x[:held], y[:held]
    lr = 1 / np.linalg.norm(fitted, 2) ** 2
    w = best = np.zeros(x.shape[1])
    smallest, at, step = np.inf, 0, 0
    while step - at < max(200, step // 10):
        w = w + lr * fitted.T @ (target - fitted @ w)
        step += 1
        error = ((watch @ w - truth) ** 2).mean()
        if error < smallest:
            smallest, at, best = error, step, w
    return best


def by_quadrature(alpha: float, snr: float) -> float:
    low, high = (np.sqrt(alpha) - 1) ** 2, (np.sqrt(alpha) + 1) ** 2

    def error(log_t: float) -> float:
        t = np.exp(log_t)

        def integrand(rate: float) -> float:
            fitted = np.expm1(-rate * t) ** 2 / (rate * snr)
            return marchenko_pastur_density(rate, alpha) * (np.exp(-2 * rate * t) + fitted)

        return quad(integrand, low, high, limit=200)[0]

    found = minimize_scalar(error, bounds=(-4, np.log(snr)), method="bounded")
    return float(np.exp(found.x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=600)
    parser.add_argument("--inputs", type=int, default=400)
    parser.add_argument("--snr", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    risks: dict[str, list[float]] = {}
    for number in range(options.rounds):
        rng = np.random.default_rng(number)
        x = rng.normal(size=(options.examples, options.inputs)) / np.sqrt(options.inputs)
        teacher = rng.normal(size=options.inputs)
        y = x @ teacher + rng.normal(size=options.examples) / np.sqrt(options.snr)
        path = flow(x, y, np.geomspace(1e-2, 1e4, 400))
        oracle = ((path - teacher) ** 2).sum(1).min()
        methods = {
            "stopping_time": lambda x=x, y=y: stopping_time(x, y, intercept=False).coef,
            "validation": lambda x=x, y=y: by_validation(x, y),
            "RidgeCV": lambda x=x, y=y: RidgeCV(
                np.geomspace(1e-4, 1e3, 60), fit_intercept=False
            ).fit(x, y).coef_,
        }  # fmt: skip
        for name, method in methods.items():
            took, w = timed(method)
            seconds.setdefault(name, []).append(took)
            risks.setdefault(name, []).append(((w - teacher) ** 2).sum() / oracle)
    print(f"{options.examples} examples, {options.inputs} inputs, SNR {options.snr:g}")
    ours = statistics.median(seconds["stopping_time"])
    for name, values in seconds.items():
        took, risk = statistics.median(values), statistics.median(risks[name])
        print(
            f"{name:14s} {1e3 * took:9.1f} ms, {took / ours:6.2f} times stopping_time; risk "
            f"{risk:.3f} of the oracle's"
        )

    grid = np.linspace(0.2, 3, 30)[:, None], np.geomspace(0.5, 50, 30)
    one, slow, many = [], [], []
    for _ in range(options.rounds):
        took, fast = timed(lambda: float(optimal_time(1.5, 5.0)))
        one.append(took)
        took, other = timed(lambda: by_quadrature(1.5, 5.0))
        slow.append(took)
        assert abs(fast / other - 1) < 1e-3
        many.append(timed(lambda: optimal_time(*grid))[0] / 900)
    single, peer, each = map(statistics.median, (one, slow, many))
    print(f"best time of one (alpha, SNR): ours {1e3 * single:.2f} ms, scipy {1e3 * peer:.1f} ms,")
    print(f"ratio scipy/ours {peer / single:.0f}; in a grid of 900 {1e3 * each:.3f} ms each,")
    print(f"ratio {peer / each:.0f}")

    rng = np.random.default_rng(0)
    h = np.maximum(rng.normal(size=(300, 600)), 0) / np.sqrt(600)
    y = rng.normal(size=300)
    lr, t = 1 / np.linalg.norm(h, 2) ** 2, 100.0

    def stepped() -> np.ndarray:
        w = np.zeros(600)
        for _ in range(round(t / lr)):
            w += lr * h.T @ (y - h @ w)
        return w

    exact, w = timed(lambda: flow(h, y, [t])[0])
    steps, approximate = timed(stepped)
    off = np.linalg.norm(w - approximate) / np.linalg.norm(w)
    print(f"300 examples, 600 features to t = 100: exact {1e3 * exact:.0f} ms, stepping")
    print(
        f"{1e3 * steps:.0f} ms ({round(t / lr)} steps, {off:.1e} off): ratio {steps / exact:.1f};"
    )
    print("to t = 1e5 exact flow takes the same, stepping a thousand times as long")


if __name__ == "__main__":
    main()
