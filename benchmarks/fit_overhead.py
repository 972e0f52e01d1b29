"""What the training loop costs: ``fit`` against the bare PyTorch loop, in one run.

python benchmarks/fit_overhead.py [--milliseconds 10] [--steps 200] [--rounds 5]

Both train the same network on the same batches with AdamW for the same number of steps; the size of
the batch is chosen so that a bare step takes about the wanted time. They take turns, and the median
ratio is printed, for the plain loop and with clipping and averaged weights switched on (against the
same done by hand). A ratio of 1.03 means 3 % more time per step. The time is that of one processor,
so that other work on the machine does not count; what the loop adds to a step in microseconds is
measured on a network too small to matter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pantarhei.fit import Batches, fit


def network() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1)]
    for _ in range(6):
        layers += [nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def bare(model: nn.Module, batches: Batches, steps: int, extras: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99)) if extras else None
    for n in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(model, batches(n)).backward()
        if extras:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if average:
            average.update_parameters(model)


def ours(model: nn.Module, batches: Batches, steps: int, extras: bool) -> None:
    options = {"clip": 1.0, "ema": 0.99} if extras else {}
    fit(model, batches, loss, steps=steps, lr=1e-3, quiet=True, device="cpu", **options)


def seconds(run: Callable, batches: Batches, steps: int, extras: bool) -> float:
    model = network() if batches.tensors[0].dim() == 4 else nn.Linear(4, 10)
    began = time.process_time()
    run(model, batches, steps, extras)
    return (time.process_time() - began) / steps


def compare(batches: Batches, steps: int, rounds: int, extras: bool) -> tuple[float, float, float]:
    """Return the medians of seconds a bare step takes, of what fit adds, and of their ratio."""
    pairs = [
        (seconds(bare, batches, steps, extras), seconds(ours, batches, steps, extras))
        for _ in range(rounds)
    ]
    return (
        statistics.median(b for b, _ in pairs),
        statistics.median(f - b for b, f in pairs),
        statistics.median(f / b for b, f in pairs),
    )


def calibrated(wanted: float) -> Batches:
    size = 1
    while True:
        x, y = torch.randn(4 * size, 3, 16, 16), torch.randint(10, (4 * size,))
        batches = Batches(x, y, batch_size=size)
        seconds(bare, batches, 5, False)
        if (took := seconds(bare, batches, 20, False)) >= 0.9 * wanted:
            return batches
        size = max(size + 1, int(size * min(2.0, wanted / took)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--milliseconds", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = calibrated(options.milliseconds / 1000)
    print(f"batch {batches.batch_size}, {options.steps} steps, {options.rounds} rounds")
    tiny = Batches(torch.randn(8, 4), torch.randint(10, (8,)), batch_size=4)
    for name, extras in (("plain", False), ("with clip and ema", True)):
        step, _, ratio = compare(batches, options.steps, options.rounds, extras)
        _, added, _ = compare(tiny, 10 * options.steps, options.rounds, extras)
        print(
            f"{name}: bare step {1e3 * step:.2f} ms, ratio fit/bare {ratio:.3f}; "
            f"on a tiny network fit adds {1e6 * added:.0f} microseconds a step"
        )


if __name__ == "__main__":
    main()
