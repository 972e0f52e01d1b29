"""What a network costs: multiply-accumulates, parameters, bytes, measured latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What running one example through a network takes.

    ``macs``: multiply-accumulates of convolutions and matrix products; ``params`` and ``bytes``:
    parameters, and the memory of parameters and buffers; ``latency_ms``: measured milliseconds of
    one call, where it was measured.
    """

    macs: int
    params: int
    bytes: int
    latency_ms: float | None = None

    def __str__(self) -> str:
        latency = "" if self.latency_ms is None else f", {self.latency_ms:.2f} ms"
        return (
            f"{self.macs / 1e6:,.2f} M MACs, {self.params / 1e6:,.3f} M parameters, "
            f"{self.bytes / 2**20:,.2f} MiB{latency}"
        )


def storage(module: nn.Module) -> tuple[int, int]:
    """Return the number of parameters and the bytes of parameters and buffers; shared ones once."""
    parameters = list(module.parameters())
    tensors = [*parameters, *dict.fromkeys(module.buffers())]
    return sum(p.numel() for p in parameters), sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` and its encoder layers in operations that can be watched."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def profile(module: nn.Module, *args: Any, **kwargs: Any) -> Cost:
    """Count one call of ``module`` as torch's own profiler does; ``macs`` is for the whole call.

    ``FlopCounterMode`` counts two operations for each multiply-accumulate.

    >>> profile(nn.Linear(3, 4), torch.ones(2, 3))
    Cost(macs=24, params=16, bytes=64, latency_ms=None)
    """
    # The counter knows nothing of attention that runs in one fused CPU kernel.
    counter = FlopCounterMode(display=False)
    with without_fast_path(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        module(*args, **kwargs)
    return Cost(counter.get_total_flops() // 2, *storage(module))


def latency_ms(
    call: Callable[..., Any], *args: Any, warmup: int = 3, repeats: int = 10, **kwargs: Any
) -> float:
    """Return the median milliseconds of ``call(*args, **kwargs)`` after ``warmup`` unmeasured ones.

    Work queued on a CUDA device is waited for.
    """

    def once() -> float:
        start = time.perf_counter()
        call(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for _ in range(warmup):
        once()
    return statistics.median(once() for _ in range(max(1, repeats)))
