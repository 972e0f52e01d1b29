"""What predicting a learning curve costs against training for it, in one run.

python benchmarks/deep_linear.py [--hidden 64] [--draws 20] [--rounds 3]

The question is a user's: how will a two-layer linear network with small random weights learn the
digits, over several random starts, at a small learning rate? Three ways to the same curves:

train      what one does without the library: torch modules, full-batch SGD on the samples, step by
           step, the modes' strengths read off every tenth step
descent    the same steps, all starts together, on the correlations alone
closed     the closed form from the projected start, at the same times

All are float64 on one thread. Printed are the seconds of the processor, their ratios, and by how
much the curves differ (of the mode's strength; half-learning times in per cent).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from pantarhei.data import load
from pantarhei.learning import deep_linear as dl

LR = 0.1  # of torch's MSELoss, whose mean is over the 10 outputs too: rate 0.02
EVERY = 10


def train(x: np.ndarray, y: np.ndarray, starts: list, steps: int, modes: dl.Modes) -> np.ndarray:
    """Train every start by itself; return the strengths (T, draws, K)."""
    inputs, targets, loss = torch.from_numpy(x), torch.from_numpy(y), nn.MSELoss()
    curves = []
    for w1, w2 in zip(*starts, strict=True):
        net = dl.DeepLinearNet(w1.shape[1], w1.shape[0], w2.shape[0])
        with torch.no_grad():
            for parameter, start in zip(net.parameters(), (w1, w2), strict=True):
                parameter.copy_(start)
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        rows = []
        for step in range(steps + 1):
            if step % EVERY == 0:
                rows.append(modes.strengths(net.product().detach().numpy()))
            optimizer.zero_grad(set_to_none=True)
            loss(net(inputs), targets).backward()
            optimizer.step()
        curves.append(rows)
    return np.swapaxes(np.array(curves), 0, 1)


def timed(run: Callable[[], np.ndarray], rounds: int) -> tuple[float, np.ndarray]:
    """Return the median processor time of some rounds, and the last result."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        out = run()
        times.append(time.process_time() - began)
    return statistics.median(times), out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)

    digits = load("digits")
    x, _ = dl.whiten(digits.train_images.reshape(len(digits.train_images), -1) / 255.0)
    y = np.eye(10)[digits.train_labels]
    data = dl.Correlations.of(x, y)
    modes, tau = data.modes(), data.tau(LR, "mse")
    generator = torch.Generator().manual_seed(0)
    starts = [
        1e-3 * torch.randn(options.draws, *shape, dtype=torch.float64, generator=generator)
        for shape in ((options.hidden, x.shape[1]), (10, options.hidden))
    ]
    steps = EVERY * int(45 * tau / EVERY)
    times = np.arange(0, steps + 1, EVERY)

    def descent() -> np.ndarray:
        again = dl.Correlations.of(x, y)  # the data have to be read once: that counts
        return dl.gradient_descent(starts, again, 1 / tau, steps, every=EVERY).u

    def closed() -> np.ndarray:
        again = dl.Correlations.of(x, y)
        return dl.predict(again, starts, times, tau=tau).u

    trained_s, trained = timed(lambda: train(x, y, starts, steps, modes), 1)
    descent_s, descended = timed(descent, options.rounds)
    closed_s, predicted = timed(closed, options.rounds)
    print(f"digits {x.shape}, {options.hidden} hidden units, {options.draws} starts, {steps} steps")
    half = dl.time_to(times, trained, modes.target, 0.5)
    for name, seconds, u in (
        ("train", trained_s, trained),
        ("descent", descent_s, descended),
        ("closed", closed_s, predicted),
    ):
        gap = np.abs(u - trained).max() / modes.s[0]
        late = np.abs(dl.time_to(times, u, modes.target, 0.5) / half - 1)
        print(
            f"{name:8} {seconds:9.3f} s   train/{name} = {trained_s / seconds:8.1f}   largest gap "
            f"{gap:.1e}   half times off by {np.median(late):.2%} (median), {late.max():.2%} (most)"
        )


if __name__ == "__main__":
    main()
