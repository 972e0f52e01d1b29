"""Curvature against PyHessian and curvlinops, in one run: time, products and agreement.

python benchmarks/probes.py [--tol 1e-3] [--rounds 3] [--train 100]

The peers are ``pip install pyhessian curvlinops-for-pytorch``. A multilayer perceptron and a
convolutional network with batch normalisation are trained for some steps on scikit-learn's digits;
then each library looks for the largest Hessian eigenvalue of 512 examples, from building its
operator to the answer, on one thread, taking turns. Each has its own meaning of a tolerance
(PyHessian: change between two iterations; scipy, behind curvlinops, and ours: residual), so two
comparisons are printed: all with the same number as tolerance, and each with the loosest tolerance
of a list at which its answer, for all of three random starts, is within ``--tol`` of the reference
in float64. A ratio of 3 means that ours takes a third of the time. Then the trace, from the same
number of products for each.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from curvlinops import HessianLinearOperator, hutchinson_trace, hutchpp_trace
from pyhessian import hessian as pyhessian
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from pantarhei.fit import Batches, fit
from pantarhei.probes import Hessian, hutch_pp, hutchinson, lanczos, power_iteration

EXAMPLES = 512
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 1e-4, 1e-5)
STARTS = range(3)
Find = Callable[[nn.Module, tuple, float, int], tuple[float, int]]


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def convnet() -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the calls of autograd through which PyHessian multiplies."""
    calls, original = [0], torch.autograd.grad

    def grad(*args, **kwargs):
        calls[0] += 1
        return original(*args, **kwargs)

    torch.autograd.grad = grad
    try:
        yield calls
    finally:
        torch.autograd.grad = original


def ours(model: nn.Module, batch: tuple, tol: float, seed: int) -> tuple[float, int]:
    found = lanczos(Hessian(model, loss, batch), tol=tol, max_products=2000, seed=seed)
    return found.top, found.products


def our_power(model: nn.Module, batch: tuple, tol: float, seed: int) -> tuple[float, int]:
    hessian = Hessian(model, loss, batch)
    found = power_iteration(hessian, tol=tol, max_products=2000, seed=seed)
    return found.top, found.products


def pyhessian_top(model: nn.Module, batch: tuple, tol: float, seed: int) -> tuple[float, int]:
    torch.manual_seed(seed)
    with counted() as calls:
        computer = pyhessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False)
        values, _ = computer.eigenvalues(maxIter=2000, tol=tol)
    model.zero_grad()
    return values[0], calls[0]


def curvlinops_top(model: nn.Module, batch: tuple, tol: float, seed: int) -> tuple[float, int]:
    operator = curvlinops_operator(model, batch).to_scipy()
    products = [0]

    def product(vector: np.ndarray) -> np.ndarray:
        products[0] += 1
        return operator @ vector

    size = operator.shape[0]
    start = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    counting = LinearOperator((size, size), matvec=product, dtype=np.float32)
    value = eigsh(counting, k=1, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    return float(value[0]), products[0]


def curvlinops_operator(model: nn.Module, batch: tuple) -> HessianLinearOperator:
    weights = [p for p in model.parameters() if p.requires_grad]
    return HessianLinearOperator(
        model, nn.CrossEntropyLoss(), weights, [batch], check_deterministic=False
    )


FINDERS: dict[str, Find] = {
    "ours (Lanczos)": ours,
    "ours (power)": our_power,
    "PyHessian": pyhessian_top,
    "curvlinops + eigsh": curvlinops_top,
}


def seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def loosest(find: Find, model: nn.Module, batch: tuple, exact: float, tol: float) -> float | None:
    """Return the largest tolerance at which every start's answer is within ``tol``."""
    for tried in TOLERANCES:
        answers = (find(model, batch, tried, seed)[0] for seed in STARTS)
        if all(abs(answer / exact - 1) <= tol for answer in answers):
            return tried
    return None


def compare_top(model: nn.Module, batch: tuple, tol: float, rounds: int) -> None:
    double = Hessian(model, loss, batch, dtype=torch.float64)
    exact = lanczos(double, tol=1e-9, max_products=2000).top
    print(f"  largest eigenvalue {exact:.6g}")
    needed = {name: loosest(find, model, batch, exact, tol) for name, find in FINDERS.items()}
    same = dict.fromkeys(FINDERS, tol)
    for title, tolerances in (
        (f"every tolerance {tol:g}", same),
        (f"error at most {tol:g}", needed),
    ):
        print(f"  {title}")
        run = {name: t for name, t in tolerances.items() if t is not None}
        times: dict[str, list[float]] = {name: [] for name in run}
        for turn in range(rounds):
            for name, t in run.items():
                times[name].append(
                    seconds(lambda n=name, t=t, s=turn: FINDERS[n](model, batch, t, s))
                )
        base = statistics.median(times["ours (Lanczos)"])
        for name, t in tolerances.items():
            if t is None:
                print(f"    {name:20s} not reached at {TOLERANCES[-1]:g}")
                continue
            answers = [FINDERS[name](model, batch, t, seed) for seed in STARTS]
            worst = max(abs(value / exact - 1) for value, _ in answers)
            products = statistics.median(count for _, count in answers)
            took = statistics.median(times[name])
            print(
                f"    {name:20s} tol {t:7.0e}  worst error {worst:7.1e}  {products:5.0f} products  "
                f"{1e3 * took:7.1f} ms  ratio {took / base:5.2f}"
            )


def compare_trace(model: nn.Module, batch: tuple, products: int, rounds: int) -> None:
    exact_matrix = Hessian(model, loss, batch, dtype=torch.float64)
    exact = hutch_pp(exact_matrix, 300)
    print(f"  trace {exact.value:.5g} (standard error {exact.error:.1g}), {products} products each")

    def theirs(seed: int) -> float:
        torch.manual_seed(seed)
        computer = pyhessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False)
        estimate = np.mean(computer.trace(maxIter=products, tol=0.0))
        model.zero_grad()
        return float(estimate)

    def linops(estimator: Callable, seed: int) -> float:
        torch.manual_seed(seed)
        return float(estimator(curvlinops_operator(model, batch), num_matvecs=products))

    methods: dict[str, Callable[[int], float]] = {
        "ours Hutchinson": lambda s: (
            hutchinson(Hessian(model, loss, batch), products, seed=s).value
        ),
        "ours Hutch++": lambda s: hutch_pp(Hessian(model, loss, batch), products, seed=s).value,
        "PyHessian": theirs,
        "curvlinops Hutchinson": lambda s: linops(hutchinson_trace, s),
        "curvlinops Hutch++": lambda s: linops(hutchpp_trace, s),
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(max(rounds, 6)):
        for name, method in methods.items():
            began = time.process_time()
            value = method(turn)
            times[name].append(time.process_time() - began)
            errors[name].append((value / exact.value - 1) ** 2)
    base = statistics.median(times["ours Hutchinson"])
    for name in methods:
        took = statistics.median(times[name])
        print(
            f"    {name:22s} rms error {np.sqrt(np.mean(errors[name])):7.1e}  "
            f"{1e3 * took:7.1f} ms  ratio {took / base:5.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tol", type=float, default=1e-3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--products", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(digits.target)
    for make in (mlp, convnet):
        torch.manual_seed(0)
        model = make()
        fit(
            model,
            Batches(x, y, batch_size=128),
            loss,
            steps=options.train,
            optimizer=lambda weights: torch.optim.SGD(weights, lr=0.05),
            quiet=True,
            device="cpu",
        )
        batch = (x[:EXAMPLES], y[:EXAMPLES])
        size = sum(p.numel() for p in model.parameters())
        print(f"{make.__name__}: {size:,} weights, {EXAMPLES} examples")
        compare_top(model, batch, options.tol, options.rounds)
        compare_trace(model, batch, options.products, options.rounds)


if __name__ == "__main__":
    main()
