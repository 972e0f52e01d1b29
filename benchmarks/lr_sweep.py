"""Sweeps of learning rates: all trainings of a size together, against one after the other.

python benchmarks/lr_sweep.py [--steps 30] [--rounds 3] [--widths 32,64,128,256,512]

The same 33 trainings (11 rates, 3 initial weights; ReLU MLP with two hidden layers, 256 inputs,
batch 128, SGD) are made three ways in the same run: stacked under torch.func.vmap (``lr_sweep``),
one by one in a bare loop of plain PyTorch, and one by one through ``fit`` (``together=False``). The
rates are small, so that none diverges and all ways do the same work; the final losses are compared
as well. The time is that of one processor; ratios above 1 are in favour of the stack.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.fit import Batches
from pantarhei.learning.families import Networks
from pantarhei.learning.lr_transfer import Size, lr_sweep, start_of

GRID = tuple(2.0**k for k in range(-14, -3))
SEEDS = 3
FAMILY = Networks(inputs=256, outputs=10)


def loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def sweep(width: int, batches: Batches, steps: int, together: bool) -> np.ndarray:
    found = lr_sweep(
        FAMILY, batches, loss, widths=(width,), grid=GRID, steps=steps, seeds=SEEDS,
        roles=FAMILY.roles, quiet=True, together=together,
    )  # fmt: skip
    return found.losses()[0].T


def bare(width: int, batches: Batches, steps: int) -> np.ndarray:
    losses = []
    for seed in range(SEEDS):
        for lr in GRID:
            start = start_of(
                FAMILY, [Size(width, None)], Size(width, None), seed, None, kind="mup",
                optimizer="sgd", roles=FAMILY.roles, branches=(),
            )  # fmt: skip
            optimizer, seen = start.optimizer(lr), []
            for n in range(steps):
                optimizer.zero_grad(set_to_none=True)
                value = loss(start.model, batches(n))
                value.backward()
                optimizer.step()
                seen.append(value.detach())
            losses.append(float(torch.stack(seen[-max(1, steps // 10) :]).mean()))
    return np.array(losses).reshape(SEEDS, len(GRID))


def timed(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    began = time.process_time()
    result = run()
    return time.process_time() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", default="32,64,128,256,512")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 256, generator=generator)
    y = torch.randint(10, (1024,), generator=generator)
    batches = Batches(x, y, batch_size=128)
    for way in (True, False):  # imports, thread pools, first allocations
        sweep(8, batches, 3, way)
    bare(8, batches, 3)
    members = SEEDS * len(GRID)
    print(f"{members} trainings of {options.steps} steps, medians of {options.rounds} rounds")
    for width in map(int, options.widths.split(",")):
        rounds = []
        for _ in range(options.rounds):
            (ours, a), (loop, b), (alone, c) = (
                timed(lambda w=width: sweep(w, batches, options.steps, True)),
                timed(lambda w=width: bare(w, batches, options.steps)),
                timed(lambda w=width: sweep(w, batches, options.steps, False)),
            )
            rounds.append((ours, loop / ours, alone / ours))
            apart = max(np.abs(a - b).max(), np.abs(a - c).max())
        ours, loop, alone = (statistics.median(column) for column in zip(*rounds, strict=True))
        per = 1e3 * ours / members / options.steps
        print(
            f"width {width}: together {ours:.2f} s ({per:.3f} ms a step of one training), "
            f"bare loop {loop:.2f} times, through fit {alone:.2f} times as long; "
            f"final losses differ by at most {apart:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
