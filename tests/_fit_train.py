"""Trainings that tests/test_fit.py runs as processes of their own, to kill them or to share them.

python tests/_fit_train.py CHECKPOINT OUT [SECONDS_PER_STEP]     one training, to be killed
torchrun tests/_fit_train.py --shared OUT                        every check of several processes
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from pantarhei.files import write_json
from pantarhei.fit import Batches, Fit, fit


class Net(nn.Module):
    """A network with all that makes resuming hard: dropout, running statistics, a skipped part."""

    def __init__(self, dropout: float, norm: bool):
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16) if norm else nn.LayerNorm(16)
        self.middle = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor, deep: bool) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        if deep:
            h = h + torch.relu(self.middle(h))
        return self.last(self.dropout(h))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(96, 6, generator=generator)
    return x, (x[:, :3].argmax(1))


def jitter(generator: torch.Generator, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x + 0.1 * torch.randn(x.shape, generator=generator), y


def train(folder: Path | None, steps: int = 40, pause: float = 0.0) -> Fit:
    """Train with everything on whose state has to survive: Adam, EMA, best, accumulation."""
    torch.manual_seed(0)
    model = Net(dropout=0.3, norm=True)
    x, y = data()
    batches = Batches(x, y, batch_size=16, seed=3, transform=jitter)

    def loss(model: nn.Module, batch: tuple) -> tuple[Tensor, dict]:
        time.sleep(pause)
        x, y, deep = batch
        out = model(x, deep)
        return F.cross_entropy(out, y), {"accuracy": (out.argmax(1) == y).float().mean()}

    return fit(
        model,
        lambda n: (*batches(n), n % 3 > 0),
        loss,
        steps=steps,
        lr=0.01,
        schedule="cosine",
        warmup=5,
        accumulate=2,
        clip=1.0,
        ema=0.9,
        validate=lambda m: {"accuracy": (m(x, True).argmax(1) == y).double().mean()},
        validate_every=7,
        best="max",
        checkpoint=folder,
        checkpoint_every=5 if folder else None,
        log_every=1,
        seed=11,
        quiet=True,
        device="cpu",
    )


def sandwich(model: nn.Module, batch: tuple) -> Tensor:
    """Call the model twice before one backward, and skip a block on every second draw."""
    x, y, deep = batch
    return F.cross_entropy(model(x, False), y) + F.cross_entropy(model(x, deep), y)


def train_shared(steps: int, folder: Path | None = None, loader: bool = False) -> Fit:
    """Train without random layers: the same whatever the number of processes."""
    torch.manual_seed(0)
    model = Net(dropout=0.0, norm=False)
    x, y = data()
    if loader:
        dataset = torch.utils.data.TensorDataset(x, y, torch.ones(96, dtype=torch.bool))
        source = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)
    else:
        batches = Batches(x, y, batch_size=16, seed=3, transform=jitter)

        def source(n: int) -> tuple:
            return (*batches(n), n % 2 == 0)

    return fit(
        model,
        source,
        lambda model, batch: sandwich(
            model, (batch[0], batch[1], bool(torch.as_tensor(batch[2]).all()))
        ),
        steps=steps,
        lr=0.01,
        accumulate=2,
        clip=1.0,
        ema=0.9,
        checkpoint=folder,
        log_every=1,
        quiet=True,
        device="cpu",
    )


def train_sharded(steps: int, folder: Path | None = None, sharded: bool = True) -> Fit:
    """Train with the weights spread over the processes (FSDP2), or not, for comparison."""

    def parallelize(module: nn.Module, mesh: Any) -> nn.Module:
        fully_shard(module, mesh=mesh["data_parallel"])
        return module

    torch.manual_seed(0)
    x, y = data()
    return fit(
        Net(dropout=0.0, norm=False),
        Batches(x, y, batch_size=16, seed=3),
        lambda model, batch: F.cross_entropy(model(batch[0], True), batch[1]),
        steps=steps,
        lr=0.01,
        accumulate=2,
        clip=1.0,
        ema=0.9,
        checkpoint=folder,
        log_every=1,
        quiet=True,
        device="cpu",
        strategy=ModelParallelStrategy(parallelize, 2, 1) if sharded else "auto",
    )


def report(result: Fit) -> dict:
    whole = {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in result.model.state_dict().items()
    }
    weights = {name: t.flatten().tolist() for name, t in whole.items()}
    return {"history": result.history, "weights": weights}


def share(out: Path) -> None:
    results = {
        "whole": report(train_shared(8)),
        "first": report(train_shared(4, out / "state")),
        "resumed": report(train_shared(8, out / "state")),
        "loader": report(train_shared(8, loader=True)),
        "sharded": report(train_sharded(8)),
        "sharded first": report(train_sharded(4, out / "shards")),
        "sharded resumed": report(train_sharded(8, out / "shards")),
    }
    write_json(out / f"rank-{torch.distributed.get_rank()}.json", results)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "--shared":
        share(Path(sys.argv[2]))
    else:
        pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
        save_file(train(Path(sys.argv[1]), pause=pause).model.state_dict(), sys.argv[2])
