"""What the vertices cost: forward equations over batches against a loop over torch modules.

python benchmarks/effective_theory.py [--width 100] [--layers 4] [--networks 2000] [--rounds 3]

The peer builds one ``nn.Sequential`` after the other, initialises it, runs it, and for the tangent
kernel of its n outputs differentiates each output by automatic differentiation (``torch.func``, all
outputs in one vectorised pass). Ours carries batches of networks forward by the exact equations and
returns every layer's vertices, theirs the last layer's only; both in float64 on one thread. They
take turns; the time is that of one processor a network, and its median over the rounds is printed.
The recursion, which needs no network at all, is timed beside them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from pantarhei.learning.effective_theory.monte_carlo import Layer, measure, pair_means
from pantarhei.learning.effective_theory.recursions import vertices


def network(width: int, layers: int) -> nn.Module:
    modules: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(width, width, dtype=torch.float64)
        nn.init.normal_(linear.weight, std=(2 / width) ** 0.5)
        nn.init.zeros_(linear.bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def loop(width: int, layers: int, networks: int, ntk: bool) -> None:
    x = torch.ones(1, width, dtype=torch.float64)
    for _ in range(networks):
        model = network(width, layers)
        with torch.no_grad():
            z = model(x)
        H = None
        if ntk:
            weights = dict(model.named_parameters())
            rows = torch.func.jacrev(lambda w, m=model: torch.func.functional_call(m, w, x)[0])(
                weights
            )
            H = torch.zeros(width, width, dtype=torch.float64)
            for row in rows.values():
                flat = row.detach().flatten(1)
                H += flat @ flat.T / (width if row.ndim == 3 else 1)
        pair_means(Layer(z, None if H is None else H[None]))


def seconds(work: Callable[[], object], networks: int) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) / networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("width", 100), ("layers", 4), ("networks", 2000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, L = options.width, options.layers
    print(f"ReLU, width {n}, {L} layers, {options.networks} networks, {options.rounds} rounds")
    vertices("relu", 2)  # what a first call loads
    began = time.process_time()
    vertices("relu", L)
    print(f"recursion, every vertex of every layer: {1e3 * (time.process_time() - began):.1f} ms")
    for name, ntk, few in (("V", False, options.networks), ("V, D, F, A, B", True, 20)):
        pairs = []
        for _ in range(options.rounds):
            theirs = seconds(lambda c=few, k=ntk: loop(n, L, c, k), few)
            ours = seconds(
                lambda k=ntk: measure("relu", (n,) * L, networks=options.networks, ntk=k),
                options.networks,
            )
            pairs.append((theirs, ours))
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"{name}: loop over modules {1e6 * theirs:.0f} microseconds a network, batches "
            f"{1e6 * ours:.1f}, ratio {ratio:.0f}"
        )


if __name__ == "__main__":
    main()
