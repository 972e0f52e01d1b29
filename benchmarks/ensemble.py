"""Training an ensemble: all members in one vectorised pass, against one after the other.

python benchmarks/ensemble.py [--members 4,10,50] [--widths 32,128,512] [--steps 60] [--rounds 3]

The same members (two tanh layers and a mean-variance head, 114 inputs, batch 256, Adam, anchored)
are trained three ways that take turns: stacked (``fit_ensemble``), in a bare loop of plain PyTorch
over members, and one by one through ``fit`` (``together=False``). The time is that of one
processor; ratios above 1 are in favour of the stack. The weights that come out are compared.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import torch

from pantarhei.bayes import Ensemble, Prior, fit_ensemble, gaussian_loss
from pantarhei.fit import Batches
from pantarhei.systems.series.forecaster import Perceptron

INPUTS, ROWS, BATCH, LR = 114, 4096, 256, 1e-3


def start(width: int, members: int) -> tuple[Ensemble, Prior]:
    factory = functools.partial(Perceptron, INPUTS, 1, (width, width))
    prior = Perceptron.prior(factory())
    return Ensemble.of(factory, members, seed=0, prior=prior), prior


def through(width: int, members: int, batches: Batches, steps: int, together: bool) -> Ensemble:
    ensemble, prior = start(width, members)
    fit_ensemble(
        ensemble, batches, steps=steps, prior=prior, examples=ROWS, lr=LR, together=together,
        optimizer=torch.optim.Adam, device="cpu", quiet=True,
    )  # fmt: skip
    return ensemble


def bare(width: int, members: int, batches: Batches, steps: int) -> Ensemble:
    ensemble, prior = start(width, members)
    loss, trained = gaussian_loss(), []
    for j in range(members):
        model = ensemble.member(j)
        anchors = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.Adam(model.parameters(), LR)
        for n in range(steps):
            optimizer.zero_grad()
            held = sum(
                (((p - anchors[name]) / prior.sd[name]) ** 2).sum()
                for name, p in model.named_parameters()
            )
            (loss(model, batches(n)) + held / (2 * ROWS)).backward()
            optimizer.step()
        trained.append(model)
    return Ensemble(trained)


def weights(ensemble: Ensemble) -> torch.Tensor:
    return torch.cat([p.detach().flatten(1) for p in ensemble.parameters()], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", default="4,10,50")
    parser.add_argument("--widths", default="32,128,512")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, INPUTS, generator=generator)
    y = torch.tanh(x[:, :1]) + 0.3 * torch.randn(ROWS, 1, generator=generator)
    batches = Batches(x, y, batch_size=BATCH)
    ways = {
        "together": functools.partial(through, together=True),
        "bare loop": bare,
        "through fit": functools.partial(through, together=False),
    }
    for way in ways.values():  # imports and first allocations
        way(8, 2, batches=batches, steps=3)
    print(f"{options.steps} steps of a batch of {BATCH}, medians of {options.rounds} rounds")
    for members in map(int, options.members.split(",")):
        for width in map(int, options.widths.split(",")):
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            ends = {}
            for _ in range(options.rounds):
                for name, way in ways.items():
                    began = time.process_time()
                    ends[name] = weights(way(width, members, batches=batches, steps=options.steps))
                    seconds[name].append(time.process_time() - began)
            ours = seconds["together"]
            ratios = {
                name: statistics.median(a / b for a, b in zip(held, ours, strict=True))
                for name, held in seconds.items()
            }
            apart = max(float((ends["together"] - other).abs().max()) for other in ends.values())
            print(
                f"{members} members, width {width}: together {statistics.median(ours):.2f} s, "
                f"bare loop {ratios['bare loop']:.2f} times, through fit "
                f"{ratios['through fit']:.2f} times as long; weights differ by at most {apart:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
