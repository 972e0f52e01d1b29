"""Search under a budget against random search at the same number of evaluations.

    python benchmarks/search.py [--seeds N]

(a) an analytic landscape: 8 axes of 6 values (1.7 million choices), concave gains, random
    interactions between axes, linear prices; a new landscape for every seed.
(b) a measured one: a digits MLP, elastic in each of its 4 hidden layers (6 ** 4 = 1,296 choices),
    trained sorted, every choice evaluated once; quality is the negative test loss. A new search
    for every seed, on the same table.

Regret is the best quality within the budget minus the quality found. Printed: the mean regret, its
ratio to random search's, the share of seeds that beat random search, and how many random
evaluations would be as good on average (inf: the best choice of all was found).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pantarhei.compute.sorted_training import sorted_fit
from pantarhei.data import load
from pantarhei.elastic import Choice, Sized, Space, elastic, frontier
from pantarhei.elastic.search import evolutionary, predictor_guided, random_search
from pantarhei.fit import Batches

METHODS = (random_search, evolutionary, predictor_guided)


@dataclass
class Landscape:
    """A space whose best choice within the budget is known."""

    space: Space
    quality: Callable[[Choice], float]
    cost: Callable[[Choice], float]
    budget: float
    within: np.ndarray  # the qualities of all choices within the budget

    def random_equivalent(self, quality: float) -> float:
        """Return how many random evaluations find at least ``quality`` on average."""
        if quality >= self.within.max() - 1e-12:
            return math.inf  # the best there is
        values = np.sort(self.within)
        share = np.arange(len(values) + 1) / len(values)
        n = 1.0
        while values @ np.diff(share**n) < quality:
            n *= 1.1
        return n


def analytic(seed: int, axes: int = 8, values: int = 6) -> Landscape:
    """Return a landscape with concave gains and interactions, in closed form."""
    rng = np.random.default_rng(seed)
    gain, price = rng.uniform(0.2, 1, axes), rng.uniform(0.3, 1, axes)
    together = rng.normal(0, 0.15, (axes, axes))
    space = Space({f"axis{i}": tuple(range(1, values + 1)) for i in range(axes)})

    def qualities(points: np.ndarray) -> np.ndarray:
        u = np.log1p(3 * points / values) / math.log(4)
        return u @ gain + ((u @ together) * u).sum(1)

    def row(choice: Choice) -> np.ndarray:
        return np.array([[choice[a] for a in space.axes]], dtype=float)

    every = np.stack(np.meshgrid(*[np.arange(1.0, values + 1)] * axes, indexing="ij"), -1)
    every = every.reshape(-1, axes)
    budget = 0.5 * price.sum()
    return Landscape(
        space,
        lambda c: float(qualities(row(c))[0]),
        lambda c: float((row(c) / values @ price)[0]),
        budget,
        qualities(every[every / values @ price <= budget]),
    )


def measured(budget: float = 0.4) -> Landscape:
    """Train an elastic MLP on digits and measure every sub-network."""
    torch.manual_seed(0)
    digits = load("digits")
    x, x_test = (
        torch.from_numpy(i).float().flatten(1) / 255
        for i in (digits.train_images, digits.test_images)
    )
    y, y_test = (torch.from_numpy(t) for t in (digits.train_labels, digits.test_labels))
    layers: list[nn.Module] = [nn.Linear(64, 48), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(48, 48), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(48, 10))
    ratios = tuple((k + 1) / 6 for k in range(6))
    net = elastic(model, x[:1], width=Sized(ratios, per_group=True))
    sorted_fit(
        net, Batches(x, y, batch_size=64), g_acc=4, steps=500, lr=5e-3, schedule="cosine",
        label="sorted training of the digits MLP",
    )  # fmt: skip

    def negative_loss(outputs: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> tuple[float, int]:
        return -nn.functional.cross_entropy(outputs, batch[1], reduction="sum").item(), len(
            batch[1]
        )

    table = frontier(net, [(x_test, y_test)], negative_loss, progress=True)
    quality = {p.choice: p.quality for p in table.points}
    macs = {p.choice: p.cost.macs for p in table.points}
    limit = budget * table.full.cost.macs
    within = np.array([q for c, q in quality.items() if macs[c] <= limit])
    return Landscape(net.space, quality.__getitem__, macs.__getitem__, limit, within)


def compare(name: str, landscapes: list[Landscape], evaluations: int) -> None:
    """Run every method on every landscape and print the ratios."""
    found = {
        method.__name__: [
            method(at.space, at.quality, at.cost, at.budget, evaluations, seed).quality
            for seed, at in enumerate(landscapes)
        ]
        for method in METHODS
    }
    best = [at.within.max() for at in landscapes]
    random = found["random_search"]
    random_regret = statistics.fmean(b - q for b, q in zip(best, random, strict=True))
    print(f"{name}, {evaluations} evaluations, {len(landscapes)} seeds")
    for method, qualities in found.items():
        regret = statistics.fmean(b - q for b, q in zip(best, qualities, strict=True))
        wins = statistics.fmean(q > r for q, r in zip(qualities, random, strict=True))
        equivalent = statistics.median(
            at.random_equivalent(q) for at, q in zip(landscapes, qualities, strict=True)
        )
        print(
            f"  {method:17} regret {regret:8.4f}   {regret / random_regret:5.2f} of random's   "
            f"beats it for {wins:4.0%} of seeds   worth {equivalent:,.0f} random evaluations"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    landscapes = [analytic(seed) for seed in range(seeds)]
    table = measured()
    for evaluations in (40, 100):
        compare("(a) analytic", landscapes, evaluations)
        compare("(b) measured", [table] * seeds, evaluations)
