"""Elastic networks against what users would pick instead; every ratio comes from one run.

    python benchmarks/elastic.py [views] [exits] [sorted] [switch] [memory]

(a) views: forward and training step on views, over the really extracted network and over layers
    that slice their weights one by one, as Once-for-All's dynamic layers do (a faithful stand-in:
    ``weight[:out, :in].contiguous()`` in every layer, one Python branch per layer).
(b) exits: realised speed-up of per-input exits over the saving in MACs, and over a loop written by
    hand for this very network: stage, head, slice of the batch, next stage.
(c) sorted: one sorted training of N sub-networks over N trainings.
(d) switch: milliseconds to switch between sub-networks, the first time and later, and that no
    weight is copied.
(e) memory: peak resident memory of serving all sub-networks, over one extracted copy of each.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pantarhei as pr
from pantarhei.elastic import Choice

BATCH = 64
WIDTHS = (0.25, 0.5, 0.75, 1.0)


class Block(nn.Module):
    """A basic residual block (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + f(x))."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


class ResNet(nn.Module):
    """Three stages of basic blocks for 32 x 32 images."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        sizes = [width, width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(Block(i if k == 0 else o, o, s if k == 0 else 1) for k in range(blocks))
            )
            for i, o, s in zip(sizes, sizes[1:], (1, 2, 2), strict=False)
        )
        self.head = nn.Linear(sizes[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, 10)."""
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


class _Dynamic:
    """What a Once-for-All layer does in each forward pass: slice its weight by an active size."""

    @staticmethod
    def install(model: nn.Module, sizes: dict[str, tuple[int, int]]) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                out, inputs = sizes[name]

                def conv(x: Tensor, m: nn.Conv2d = module, o: int = out, i: int = inputs) -> Tensor:
                    weight = m.weight[:o, :i, :, :].contiguous()
                    return F.conv2d(x, weight, None, m.stride, m.padding)

                module.forward = conv  # type: ignore[method-assign]
            elif isinstance(module, nn.BatchNorm2d):
                out, _ = sizes[name]

                def norm(x: Tensor, m: nn.BatchNorm2d = module, o: int = out) -> Tensor:
                    assert m.running_mean is not None and m.running_var is not None
                    return F.batch_norm(
                        x, m.running_mean[:o], m.running_var[:o], m.weight[:o], m.bias[:o],
                        m.training, 0.1, m.eps,
                    )  # fmt: skip

                module.forward = norm  # type: ignore[method-assign]
            elif isinstance(module, nn.Linear):
                out, inputs = sizes[name]

                def linear(
                    x: Tensor, m: nn.Linear = module, o: int = out, i: int = inputs
                ) -> Tensor:
                    return F.linear(x, m.weight[:o, :i].contiguous(), m.bias[:o])

                module.forward = linear  # type: ignore[method-assign]
        return model


def race(*calls: Callable[[], object], repeats: int = 15) -> list[float]:
    """Return the median milliseconds of each call, in turns so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(3):
        for call in calls:
            call()
    for _ in range(repeats):
        for call, record in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            record.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(t) for t in times]


def views() -> None:
    """(a) Forward pass and training step."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    model = ResNet()
    net = pr.elastic(model, x[:2], width=WIDTHS)
    print(f"(a) views, batch {BATCH}, {torch.get_num_threads()} threads, float32")
    for width in WIDTHS:
        choice = Choice(width=width)
        plain = net.extract(choice)
        sizes = {
            n: (m.weight.shape[0], m.weight.shape[1] if m.weight.dim() > 1 else 0)
            for n, m in plain.named_modules()
            if getattr(m, "weight", None) is not None
        }
        dynamic = _Dynamic.install(ResNet(), sizes)
        dynamic.load_state_dict(model.state_dict())

        def step(run: Callable[[Tensor], Tensor], owner: nn.Module) -> Callable[[], None]:
            optimizer = torch.optim.SGD(owner.parameters(), 1e-3, momentum=0.9)

            def once() -> None:
                optimizer.zero_grad()
                F.cross_entropy(run(x), y).backward()
                optimizer.step()

            return once

        def ours(v: Tensor, choice: Choice = choice) -> Tensor:
            return net(v, choice)

        for m in (net, plain, dynamic):
            m.eval()
        with torch.no_grad():
            torch.testing.assert_close(ours(x), dynamic(x), rtol=1e-3, atol=1e-4)
            a, b, c = race(lambda: ours(x), lambda: plain(x), lambda: dynamic(x))  # noqa: B023
        for m in (net, plain, dynamic):
            m.train()
        d, e, f = race(step(ours, net), step(plain, plain), step(dynamic, dynamic), repeats=9)
        print(
            f"  width {width:4}: forward {a:7.2f} ms = {a / b:.3f} x extracted, {a / c:.3f} x "
            f"sliced layers; training step {d:7.2f} ms = {d / e:.3f} x extracted, "
            f"{d / f:.3f} x sliced layers"
        )


def exits() -> None:
    """(b) Realised speed-up over MAC saving."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, 32, 32)
    model = ResNet()
    net = pr.elastic(model, x[:2], exits=("stages.0", "stages.1")).eval()
    macs = net.exit_macs()
    print("(b) exits: share of the batch that leaves early, MACs saved, time saved")
    full = net.extract(Choice(exit=3))
    for shares in ((0.25, 0.25), (0.5, 0.0), (0.5, 0.25), (0.0, 0.75)):
        leave = [round(s * BATCH) for s in shares]

        def policy(answers: list[Tensor], leave: list[int] = leave) -> Tensor:
            return torch.arange(len(answers[-1])) < leave[len(answers) - 1]

        def dynamic(policy: Callable[[list[Tensor]], Tensor] = policy) -> object:
            return net.adaptive(x, policy=policy)

        def by_hand(leave: list[int] = leave) -> None:
            y = F.relu(model.stem(x))
            for stage, head, gone in zip(
                model.stages, [*net.heads, None], [*leave, 0], strict=True
            ):
                y = stage(y)
                if head is not None:
                    head(y)
                y = y[gone:]
            model.head(y.mean((2, 3)))

        ran = net.adaptive(x, policy=policy).macs.double().mean().item()
        with torch.no_grad():
            static, adaptive, hand = race(lambda: full(x), dynamic, by_hand)
        mac_ratio, speed = macs[-1] / ran, static / adaptive
        print(
            f"  {shares}: {mac_ratio:.2f} x fewer MACs, {speed:.2f} x faster: "
            f"{speed / mac_ratio:.3f} of it realised (by hand {static / hand / mac_ratio:.3f})"
        )


def sorted_training() -> None:
    """(c) One sorted training of N sub-networks over N trainings, at equal updates each."""
    from pantarhei.elastic.samplers import Uniform

    torch.manual_seed(0)
    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    net = pr.elastic(ResNet(32), x[:2], width=WIDTHS, depth=(1, 2))
    draw = Uniform(net.space, seed=0)
    steps = 12

    def train(owner: nn.Module, run: Callable[[int], Tensor]) -> float:
        optimizer = torch.optim.SGD(owner.parameters(), 1e-3, momentum=0.9)
        start = 0.0
        for n in range(-3, steps):
            if n == 0:
                start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(run(max(n, 0)), y).backward()
            optimizer.step()
        return (time.perf_counter() - start) / steps * 1e3

    shared = train(net, lambda n: net(x, draw(n)))
    alone = 0.0
    for choice in net.space:
        plain = net.extract(choice)
        alone += train(plain, lambda n, plain=plain: plain(x))  # type: ignore[misc]
    print(
        f"(c) one sorted step {shared:.1f} ms; one step of each of {len(net.space)} networks alone "
        f"{alone:.1f} ms: {alone / shared:.1f} x cheaper at equal updates each"
    )


def switch() -> None:
    """(d) Switching a sub-network."""
    x = torch.randn(1, 3, 32, 32)
    net = pr.elastic(ResNet(), x.repeat(2, 1, 1, 1), width=WIDTHS, depth=(1, 2)).eval()
    choices = list(net.space)
    order = itertools.cycle(choices)

    def bind() -> None:
        choice = next(order)
        with net.body(net.plan(choice)):
            pass

    first = []
    with torch.no_grad():
        bind()  # makes the copy of the module tree
        for _ in choices[1:]:
            start = time.perf_counter()
            bind()
            first.append((time.perf_counter() - start) * 1e3)
        for _ in choices:
            bind()
        (binding,) = race(bind, repeats=200)
    held = {p.untyped_storage().data_ptr() for p in net.model.parameters()}
    shared = 0
    for choice in choices:
        with torch.no_grad(), net.body(net.plan(choice)) as body:
            shared += all(
                p.untyped_storage().data_ptr() in held for p in body.model.parameters(recurse=True)
            )
    print(
        f"(d) switch: {binding:.3f} ms ({statistics.median(first):.3f} ms the first time) for "
        f"{sum(1 for _ in net.model.parameters())} tensors; "
        f"{shared} of {len(choices)} choices use the full weights' own storage throughout"
    )


_MEMORY = """
import resource, sys, torch
sys.path.insert(0, {here!r})
from elastic import ResNet, WIDTHS
import pantarhei as pr
torch.manual_seed(0)
net = pr.elastic(ResNet(256), torch.randn(2, 3, 32, 32), width=WIDTHS, depth=(1, 2)).eval()
x = torch.randn(1, 3, 32, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    if {mode!r} == "views":
        [net(x, c) for c in net.space]
    else:
        copies = [net.extract(c) for c in net.space]
        [m(x) for m in copies]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def memory() -> None:
    """(e) Peak memory, in a process each."""
    here = __file__.rpartition("/")[0] or "."
    grown = [
        int(
            subprocess.run(
                [sys.executable, "-c", _MEMORY.format(here=here, mode=mode)],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        / 1024
        for mode in ("views", "copies")
    ]  # fmt: skip
    print(
        f"(e) memory: all 8 sub-networks on views {grown[0]:.0f} MiB above the network itself, "
        f"as extracted copies {grown[1]:.0f} MiB: {grown[0] / max(grown[1], 1):.2f} x"
    )


PARTS = {"views": views, "exits": exits, "sorted": sorted_training, "switch": switch,
         "memory": memory}  # fmt: skip

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
