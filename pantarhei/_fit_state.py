"""What a training step changes, and the folder that keeps it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pantarhei import _fit_checkpoint as checkpoints
from pantarhei import files
from pantarhei.errors import RequestError

_logger = logging.getLogger("pantarhei.fit")


class Ema:
    """Averaged weights and floating-point buffers."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._live = _floating(model)
        self._average = [checkpoints.local(d[n]).detach().clone() for d, n, _ in self._live]

    def update(self, step: int) -> None:
        """Move the averages towards the live weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [checkpoints.local(d[n]).detach() for d, n, _ in self._live]
        get_ema_multi_avg_fn(decay)(self._average, live, None)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averages by name."""
        return {name: t for (_, _, name), t in zip(self._live, self._average, strict=True)}


def _floating(model: nn.Module) -> list[tuple[dict[str, Any], str, str]]:
    """Return where each floating-point tensor of the model lives: (dict, key in it, full name).

    The place and not the tensor, because a module may put a new tensor in a buffer's place.
    """
    names = tensors_of(model)
    return [
        (place, key, name)
        for prefix, module in model.named_modules()
        for place in (module._parameters, module._buffers)
        for key, tensor in place.items()
        if (name := f"{prefix}.{key}" if prefix else key) in names
        and tensor is not None
        and (tensor.is_floating_point() or tensor.is_complex())
    ]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name; tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


class State:
    """Everything that a step changes: what a checkpoint has to hold."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, ema: Ema | None):
        self.model, self.optimizer, self.ema = model, optimizer, ema
        self.step = 0
        self.stopped = ""
        self.history: list[dict[str, float]] = []
        self.best: float | None = None
        self.best_step: int | None = None
        self.misses = 0
        self.best_weights: dict[str, Tensor] = {}

    def judge(self, values: dict[str, float], best: str | None, patience: int | None) -> None:
        """Enter validated values in the history, keep the best weights, lose patience."""
        self.history[-1].update(values)
        if best is None:
            return
        value = next(iter(values.values()))
        if math.isnan(value):
            better = False
        elif self.best is None:
            better = True
        else:
            better = value > self.best if best == "max" else value < self.best
        if better:
            self.best, self.best_step, self.misses = value, self.step, 0
            with self.validated_weights():
                self.best_weights = _snapshot(self.model)
        else:
            self.misses += 1
            if patience and self.misses >= patience and not self.stopped:
                self.stopped = "patience"

    @contextmanager
    def validated_weights(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, into the model for a while."""
        if self.ema is None:
            yield
            return
        raw = _snapshot(self.model)
        checkpoints.copy_into(
            {n: tensors_of(self.model)[n] for n in self.ema.weights}, self.ema.weights
        )
        try:
            yield
        finally:
            checkpoints.copy_into(tensors_of(self.model), raw)

    def finish(self, fabric: Fabric) -> None:
        """Leave the model with the weights that :class:`Fit` promises, the same everywhere."""
        weights = self.best_weights or (self.ema.weights if self.ema else {})
        live = tensors_of(self.model)
        checkpoints.copy_into({name: live[name] for name in weights}, weights)
        if fabric.world_size > 1 and not sharded(fabric):
            for tensor in live.values():  # each process has its own running statistics
                torch.distributed.broadcast(tensor.detach(), src=0)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.eval()

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all tensors under the names they have on disk, and the rest ready for JSON."""
        slots = {n: self.optimizer.state.get(p, {}) for n, p in self._named_parameters()}
        tensors, plain = checkpoints.split_slots(slots)
        facts = {
            "step": self.step,
            "stopped": self.stopped,
            "best": self.best,
            "best_step": self.best_step,
            "misses": self.misses,
            "optimizer": {"state": plain, "groups": plain_groups(self.optimizer)},
            "history": self.history,
        }
        return {
            **{f"model.{n}": t for n, t in tensors_of(self.model).items()},
            **{f"ema.{n}": t for n, t in (self.ema.weights if self.ema else {}).items()},
            **{f"best.{n}": t for n, t in self.best_weights.items()},
            **{f"optimizer.{n}": t for n, t in tensors.items()},
        }, facts

    def restore(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Become the state that :meth:`dump` described."""
        self.step, self.stopped = facts["step"], facts["stopped"]
        self.best, self.best_step = facts["best"], facts["best_step"]
        self.misses = facts["misses"]
        self.history[:] = facts["history"]
        live = tensors_of(self.model)
        checkpoints.copy_into(live, checkpoints.take(tensors, "model."))
        if self.ema:
            checkpoints.copy_into(self.ema.weights, checkpoints.take(tensors, "ema."))
        self.best_weights = {
            n: t.to(live[n].device) for n, t in checkpoints.take(tensors, "best.").items()
        }
        slots = checkpoints.join_slots(
            checkpoints.take(tensors, "optimizer."), facts["optimizer"]["state"]
        )
        groups = self.optimizer.state_dict()["param_groups"]
        for group, stored in zip(groups, facts["optimizer"]["groups"], strict=True):
            for key, value in stored.items():
                group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
        state = {
            i: {slot: checkpoints.shard_like(p, v) for slot, v in slots[n].items()}
            for i, (n, p) in enumerate(self._named_parameters())
            if n in slots
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the optimizer's parameters in its own order."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            yield from ((names[id(p)], p) for p in group["params"])


class Store:
    """The checkpoint folder of one training."""

    def __init__(self, root: str | os.PathLike[str], settings: dict[str, Any], fabric: Fabric):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise RequestError(f"checkpoint='{root}' is a file: name a folder.")
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as on disk
        self.fabric = fabric

    def open(self, state: State, resume: bool) -> None:
        """Bring ``state`` to the newest whole checkpoint; without ``resume`` remove them all."""
        if not resume:
            if self.fabric.is_global_zero:
                checkpoints.clear(self.root)
            self.fabric.barrier()
            return
        damaged: list[str] = []
        for folder in checkpoints.folders(self.root):
            try:
                facts, tensors = checkpoints.read(folder, self.fabric.global_rank)
            except checkpoints.Damaged as error:
                damaged.append(str(error))
                continue
            self._match(folder, state, facts, tensors)
            state.restore(facts, tensors)
            if damaged and self.fabric.is_global_zero:
                _logger.warning("%s; continuing from '%s' instead.", "; ".join(damaged), folder)
            return
        if damaged:
            raise RequestError(
                f"{damaged[0]}: restore it from a copy, or pass resume=False to start anew."
            )

    def _match(
        self, folder: Path, state: State, facts: dict[str, Any], tensors: dict[str, Tensor]
    ) -> None:
        for name, value in self.settings.items():
            if value != (stored := facts["settings"].get(name)):
                raise RequestError(
                    f"the checkpoint '{folder}' was made with {name}={stored}, not {value}: use "
                    "the same settings, another folder, or resume=False to start anew."
                )
        why = checkpoints.difference(tensors_of(state.model), checkpoints.take(tensors, "model."))
        if why:
            raise RequestError(
                f"the checkpoint '{folder}' is of another model ({why}): use the model it was made "
                "with, another folder, or resume=False to start anew."
            )

    def save(self, state: State) -> None:
        """Write the whole state, then the history as CSV."""
        rank, shards = self.fabric.global_rank, sharded(self.fabric)
        digests: dict[str, str] = {}
        tensors, facts = state.dump()
        if rank == 0 or shards:
            path = checkpoints.place(self.root, state.step, rank)
            digests = {path.name: checkpoints.write_tensors(path, tensors)}
        if shards:
            parts: list[Any] = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(parts, digests)
            digests = {name: digest for part in parts for name, digest in part.items()}
        if rank == 0:
            facts = {"settings": self.settings, **facts}
            checkpoints.write_facts(self.root, state.step, facts, digests)
            files.write_csv(self.root / "metrics.csv", state.history)


def sharded(fabric: Fabric) -> bool:
    """Return whether every process holds a part of the weights of its own."""
    return isinstance(fabric.strategy, FSDPStrategy | ModelParallelStrategy)


@torch.no_grad()
def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: checkpoints.local(t).detach().clone() for name, t in tensors_of(model).items()}


def plain_groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the hyperparameters of each group that JSON can hold."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return [
        {k: v for k, v in group.items() if k != "params" and isinstance(v, plain)}
        for group in optimizer.param_groups
    ]
