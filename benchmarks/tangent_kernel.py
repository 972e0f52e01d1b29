"""The tangent kernel: ours against the functorch tutorial's, in one run, time and peak memory.

python benchmarks/tangent_kernel.py [--rounds 3] [--case mlp] [--kind full]

The peer is the implementation of PyTorch's tutorial "Neural Tangent Kernels": the Jacobian of every
input by vmap(jacrev), then an einsum over each parameter; and the tutorial's second way, products
of the kernel with unit vectors by vmap(jvp of vjp). Every measurement is a process of its own, on
one thread; ours and theirs take turns. The time is that of the processor (medians), the memory what
the process took at most beyond what it had before the first kernel. Kernels must agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap

from pantarhei.probes.tangent_kernel import ntk

EQUATIONS = {
    "full": "Naf,Mbf->NMab",
    "trace": "Naf,Maf->NM",
    "diagonal": "Naf,Maf->NMa",
}


class Encoder(nn.Module):
    """A small Transformer on tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(200, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(64, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return scores, (n, 10)."""
        return self.head(self.layers(self.embed(tokens)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def tutorial_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3),
        nn.Flatten(), nn.Linear(21632, 10),
    )  # fmt: skip


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(128, 64)),
    "tutorial-cnn": (tutorial_cnn, lambda: torch.randn(24, 3, 32, 32)),
    "small-cnn": (small_cnn, lambda: torch.randn(256, 1, 8, 8)),
    "transformer": (Encoder, lambda: torch.randint(200, (48, 16))),
}


def contraction(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def single(weights, x):
        return functional_call(model, weights, (x[None],))[0]

    jacobian = vmap(jacrev(single), (None, 0))(weights, x)
    rows = [j.flatten(2) for j in jacobian.values()]
    kernel = torch.stack([torch.einsum(EQUATIONS[kind], j, j) for j in rows]).sum(0)
    return kernel / rows[0].shape[1] if kind == "trace" else kernel


def products(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def entry(x1, x2):
        def at(x):
            return lambda weights: functional_call(model, weights, (x[None],))[0]

        output, pull = vjp(at(x1), weights)

        def product(v):
            return jvp(at(x2), (weights,), pull(v))[1]

        return vmap(product)(torch.eye(len(output)))

    kernel = vmap(vmap(entry, (None, 0)), (0, None))(x, x).mT
    if kind == "full":
        return kernel
    diagonal = kernel.diagonal(dim1=2, dim2=3)
    return diagonal if kind == "diagonal" else diagonal.mean(2)


METHODS: dict[str, Callable[[nn.Module, Tensor, str], Tensor]] = {
    "ours": lambda model, x, kind: ntk(model, x, kind=kind),
    "ours, contraction": lambda model, x, kind: ntk(model, x, kind=kind, method="contraction"),
    "ours, products": lambda model, x, kind: ntk(model, x, kind=kind, method="products"),
    "tutorial, contraction": contraction,
    "tutorial, products": products,
}


def measure(case: str, kind: str, method: str) -> dict[str, float]:
    """Measure once, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, inputs = CASES[case]
    model, x = make().eval(), inputs()
    METHODS[method](model, x[:2], kind)  # what the first call alone pays
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    kernel = METHODS[method](model, x, kind)
    return {
        "seconds": time.process_time() - began,
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "norm": float(kernel.norm()),
        "corner": float(kernel.flatten()[-1]),
    }


def in_a_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def compare(case: str, kind: str, methods: list[str], rounds: int) -> None:
    found: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            found[method].append(in_a_process(case, kind, method))
    reference = found["ours"][0]
    seconds = {m: statistics.median(r["seconds"] for r in rows) for m, rows in found.items()}
    for method, rows in found.items():
        megabytes = statistics.median(r["megabytes"] for r in rows)
        agreed = all(
            abs(rows[0][key] - reference[key]) <= 1e-3 * abs(reference["norm"])
            for key in ("norm", "corner")
        )
        print(
            f"{case:13} {kind:9} {method:22} {seconds[method]:8.3f} s "
            f"{seconds[method] / seconds['ours']:7.2f} times ours {megabytes:8.0f} MB"
            f"{'' if agreed else '   DIFFERS'}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--kind", choices=EQUATIONS)
    parser.add_argument("--slow", action="store_true", help="the products of both too")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    methods = [m for m in METHODS if options.slow or "products" not in m]
    for case in [options.case] if options.case else CASES:
        for kind in [options.kind] if options.kind else ("full", "trace"):
            compare(case, kind, methods, options.rounds)


if __name__ == "__main__":
    main()
