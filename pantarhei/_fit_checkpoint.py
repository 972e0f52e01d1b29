"""Training state on disk: tensors in safetensors, everything else in JSON, never a pickle.

A checkpoint is a folder ``step-XXXXXXXX`` with ``state-0.safetensors`` (one file per process for
sharded training) and ``state.json``. The JSON is written last and carries the digest of every
tensor file, so a folder either holds a whole, verified state or does not count. The two newest are
kept; a process killed while writing leaves the older ones as they were.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pantarhei import files
from pantarhei.errors import RequestError

FORMAT = 1


class Damaged(Exception):
    """A checkpoint that cannot be used; the message says which file and why."""


def folders(root: Path) -> list[Path]:
    """Return the checkpoints under ``root`` whose writing was finished, newest first."""
    found = [p for p in root.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted((p for p in found if (p / "state.json").exists()), key=_step, reverse=True)


def clear(root: Path) -> None:
    """Remove every checkpoint under ``root``."""
    for folder in root.glob("step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def place(root: Path, step: int, rank: int) -> Path:
    """Return the tensor file of one process for the checkpoint of ``step``."""
    return root / f"step-{step:08d}" / f"state-{rank}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write one process's tensors and return the digest of the file."""
    try:
        with files.atomic(path) as temporary:
            try:
                save_file({name: _plain(t) for name, t in tensors.items()}, temporary)
            except SafetensorError as error:  # safetensors reports a full disk in its own type
                raise OSError(errno.ENOSPC, str(error)) from error
            except KeyError as error:
                raise RequestError(
                    f"safetensors has no type for {error}: use another type for that weight, or "
                    "train without checkpoint=."
                ) from error
            return _digest(temporary)
    except BaseException:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise


def write_facts(
    root: Path, step: int, facts: Mapping[str, Any], digests: Mapping[str, str]
) -> None:
    """Finish the checkpoint of ``step`` and drop all but it and the one before it."""
    folder = root / f"step-{step:08d}"
    content = {"format": FORMAT, **facts, "tensors": digests}
    try:
        files.write_json(folder / "state.json", {**content, "sha256": _digest_of(content)})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    before = [other for other in folders(root) if _step(other) < step]
    keep = {folder, *before[:1]}
    for other in root.glob("step-*"):
        if other not in keep:
            shutil.rmtree(other, ignore_errors=True)


def read(folder: Path, rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read one checkpoint for one process; raise :class:`Damaged` when it is not whole."""
    try:
        facts = files.read_json(folder / "state.json")
        digest = facts.pop("sha256", None) if isinstance(facts, dict) else None
        if digest is None or digest != _digest_of(facts):
            raise Damaged(f"'{folder / 'state.json'}' is not what was written")
        if facts["format"] != FORMAT:
            raise Damaged(f"'{folder}' has format {facts['format']}, this version reads {FORMAT}")
        # With fewer files than processes the first will do: they are all there is, or the caller
        # is about to see that the number of processes has changed.
        path = place(folder.parent, _step(folder), rank if rank < len(facts["tensors"]) else 0)
        if _digest(path) != facts["tensors"].get(path.name):
            raise Damaged(f"'{path}' is not what was written")
        return facts, load_file(path)
    except RequestError as error:
        raise Damaged(f"'{folder / 'state.json'}' is not readable JSON") from error
    except (OSError, SafetensorError) as error:
        raise Damaged(f"'{folder}' cannot be read ({error})") from error


def split_slots(
    slots: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Split optimizer state (parameter name -> slot -> value) into tensors and plain values."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for name, values in slots.items():
        for slot, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{name}:{slot}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                plain.setdefault(name, {})[slot] = value
            else:
                raise RequestError(
                    f"the optimizer keeps '{slot}' as a {type(value).__name__}, which a checkpoint "
                    "cannot hold: use another optimizer, or train without checkpoint=."
                )
    return tensors, plain


def join_slots(
    tensors: Mapping[str, Tensor], plain: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Undo :func:`split_slots`."""
    slots: dict[str, dict[str, Any]] = {name: dict(values) for name, values in plain.items()}
    for key, tensor in tensors.items():
        name, slot = key.rsplit(":", 1)
        slots.setdefault(name, {})[slot] = tensor
    return slots


def take(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose name starts with ``prefix``, without it."""
    return {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}


@torch.no_grad()
def copy_into(live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy stored values over the live tensors of the same names."""
    for name, tensor in live.items():
        local(tensor).copy_(stored[name])


def difference(live: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> str | None:
    """Say in a few words how the stored tensors differ from the live ones; ``None`` if they fit."""
    if unshared := sorted(live.keys() ^ stored.keys()):
        return f"it has {'no ' if unshared[0] in live else ''}'{unshared[0]}'"
    for name, tensor in live.items():
        expected, found = local(tensor), stored[name]
        if expected.shape != found.shape or expected.dtype != found.dtype:
            return (
                f"its '{name}' is {tuple(found.shape)} {found.dtype}, the model's is "
                f"{tuple(expected.shape)} {expected.dtype}"
            )
    return None


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a distributed tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_like(parameter: Any, value: Any) -> Any:
    """Undo :func:`local` for an optimizer's slot of a distributed parameter."""
    if not hasattr(parameter, "to_local") or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    from torch.distributed.tensor import DTensor  # its import takes a second

    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _plain(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU: safetensors writes no strides and no shared storage."""
    return local(tensor.detach()).to("cpu", copy=True).contiguous()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
