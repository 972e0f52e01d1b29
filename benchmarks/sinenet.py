"""SineNet's training step and rollout against a U-Net and FNOs, and memory over long rollouts.

python benchmarks/sinenet.py [--size 64] [--width 12] [--batch 8] [--rounds 3] [--device cpu|cuda]
python benchmarks/sinenet.py memory [--steps 10000]

The first prints, for networks of as nearly equal parameters as each allows, the seconds of one
training step (forward, relative L2, backward, AdamW) and of one step of a rollout, and their ratios
over the plain U-Net. The contenders take turns; on the CPU the seconds are the processor's.
``neuraloperator``'s FNO stands beside ours where it is installed (it needs tensorly and
tensorly-torch), with as many modes and channels. The second rolls a small SineNet out over many
steps, keeping nothing, and prints the memory of the process (of the device) along the way.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from pantarhei.rollout import forecast_loss, rollout, stream
from pantarhei.systems.fno import FNO
from pantarhei.systems.sinenet import SineNet, unet

HISTORY, FIELDS = 4, 3


def networks(width: int) -> dict[str, Callable[[], nn.Module]]:
    """Return builders of the contenders; the FNOs' width comes nearest to the same parameters."""
    ends = HISTORY * FIELDS, FIELDS
    budget = sum(p.numel() for p in SineNet(*ends, waves=1, width=width).parameters())
    modes = 12
    channels = round((budget / (4 * 2 * modes**2)) ** 0.5)
    found: dict[str, Callable[[], nn.Module]] = {
        "U-Net": lambda: unet(*ends, width=width, param_budget=budget),
        **{
            f"SineNet-{k}": lambda k=k: SineNet(*ends, k, width, param_budget=budget)
            for k in (1, 2, 4, 8)
        },
        "FNO": lambda: FNO(*ends, width=channels, modes=modes),
    }
    try:
        from neuralop.models import FNO as TheirFNO
    except ImportError as error:
        print(f"neuraloperator is not here ({error}): its FNO is left out.")
    else:
        # theirs counts modes of both signs
        found["neuraloperator's FNO"] = lambda: TheirFNO(
            n_modes=(2 * modes, 2 * modes), in_channels=ends[0], out_channels=ends[1],
            hidden_channels=channels, n_layers=4, positional_embedding=None,
        )  # fmt: skip
    return found


def compare(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    shape = (options.batch, HISTORY, FIELDS, options.size, options.size)
    past = torch.randn(shape, device=device)
    batch = past, past[:, :1] + 0.1
    low = torch.autocast(device.type, torch.bfloat16) if options.bf16 else nullcontext()
    nets, seconds, error = {}, {}, forecast_loss()
    for name, build in networks(options.width).items():
        net = build().to(device)
        if options.channels_last:
            net = net.to(memory_format=torch.channels_last)
        nets[name] = net, torch.optim.AdamW(net.parameters())
        seconds[name] = ([], [])

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for turn, (name, (net, optimizer)) in itertools.product(
        range(options.rounds + 1), nets.items()
    ):
        began = clock()
        with low:
            loss = error(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait()
        trained = clock() - began
        with low:
            began = clock()
            rollout(net, past, 5, keep="none")
            wait()
        if turn:  # the first is for caches and plans
            seconds[name][0].append(trained)
            seconds[name][1].append((clock() - began) / 5)
    base = [statistics.median(s) for s in seconds["U-Net"]]
    kind = "bf16" if options.bf16 else "float32"
    print(f"batch {options.batch}, {options.size} x {options.size}, {device}, {kind}, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    for name, (training, stepping) in seconds.items():
        a, b = statistics.median(training), statistics.median(stepping)
        count = sum(p.numel() for p in nets[name][0].parameters())
        print(
            f"{name:22} {count / 1e6:7.3f} M parameters   training step {a:7.3f} s "
            f"({a / base[0]:5.2f} x U-Net)   rollout step {b:7.4f} s ({b / base[1]:5.2f} x U-Net)"
        )


def memory(options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    net = SineNet(HISTORY * FIELDS, FIELDS, waves=2, width=4, levels=2, mult=1.5).to(device).eval()
    start = torch.randn(4, HISTORY, FIELDS, 32, 32, device=device)

    def resident() -> float:
        if device.type == "cuda":
            return torch.cuda.memory_allocated(device) / 2**20
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    marks = {round(options.steps * share) for share in (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)}
    for frame in stream(net, start, options.steps):
        if frame.step in marks:
            print(f"step {frame.step:6d}: {resident():8.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="compare", choices=("compare", "memory"))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--width", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    (memory if options.what == "memory" else compare)(options)


if __name__ == "__main__":
    main()
