"""A DataLoader whose n-th batch can be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader

from pantarhei._fit_random import mix, seed_all
from pantarhei.errors import RequestError


class Loader:
    """A ``DataLoader`` as a function of the draw number.

    The order of each epoch depends on ``(seed, epoch)``; a draw that does not follow the one before
    is reached by running through the epoch from its start.
    """

    def __init__(self, loader: DataLoader, seed: int, fabric: Fabric):
        try:
            self._length = len(loader)
        except TypeError:
            self._length = 0
        if self._length == 0:
            raise RequestError(
                "the DataLoader is empty or has no length: give one over a data set with a length, "
                "or a function of the draw number."
            )
        if loader.persistent_workers:
            raise RequestError(
                "a DataLoader with persistent_workers=True cannot be resumed exactly: make it with "
                "persistent_workers=False."
            )
        self._loader = _share(loader, fabric) if fabric.world_size > 1 else loader
        self._seed, self._fabric = seed, fabric
        self._next = -1
        self._iterator: Iterator[Any] = iter(())

    def __call__(self, n: int) -> Any:
        epoch, position = divmod(n, self._length)
        jumped = position == 0 or n != self._next
        self._next = n + 1
        if jumped:
            self._begin(epoch)
            for _ in range(position):
                next(self._iterator)
        # A sampler without a generator of its own draws the order when the first batch is asked
        # for, which must see the epoch's seed. Later batches see the draw's, as without a jump.
        if jumped and position > 0:
            seed_all(mix(self._seed, self._fabric.global_rank, n), self._fabric.device)
        return next(self._iterator)

    def _begin(self, epoch: int) -> None:
        seed = mix(self._seed, "epoch", epoch)
        seed_all(seed, self._fabric.device)
        loader = self._loader
        owner: Any
        for owner in (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if isinstance(generator := getattr(owner, "generator", None), torch.Generator):
                generator.manual_seed(seed)
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)
        self._iterator = iter(loader)


class _ShareOfBatches:
    """The rows of every batch that belong to one process."""

    def __init__(self, batches: Any, rank: int, world: int):
        self.batches, self.rank, self.world = batches, rank, world
        self.sampler = batches.sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.batches:
            if len(rows) % self.world:
                raise RequestError(
                    f"a batch of {len(rows)} cannot be shared by {self.world} processes: choose a "
                    f"batch_size that is a multiple of {self.world}, and drop_last=True."
                )
            size = len(rows) // self.world
            yield rows[self.rank * size : (self.rank + 1) * size]


def _share(loader: DataLoader, fabric: Fabric) -> DataLoader:
    if getattr(loader.batch_sampler, "sampler", None) is None:
        raise RequestError(
            "this DataLoader has no batches of a sampler to share between processes: give one "
            "with batch_size, or a function of the draw number."
        )
    shares = _ShareOfBatches(loader.batch_sampler, fabric.global_rank, fabric.world_size)
    return DataLoader(
        loader.dataset,
        batch_sampler=shares,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )
