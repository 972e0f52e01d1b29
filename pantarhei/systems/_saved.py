"""Trained models as folders of safetensors and JSON, read without running anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from pantarhei.errors import RequestError
from pantarhei.files import atomic, read_json, write_json

Made = TypeVar("Made")
_WEIGHTS = "weights.safetensors"


def new_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that is not there yet, or is empty."""
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RequestError(f"'{folder}' is there already: name a new folder.")
    return place


def save(
    place: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    weights: str = _WEIGHTS,
) -> None:
    """Write weights and, to ``kind``.json, what :func:`load` needs beside them."""
    from safetensors.torch import save_file

    with atomic(place / weights) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
    write_json(place / f"{kind}.json", about)


def load(
    folder: str | os.PathLike[str],
    kind: str,
    restore: Callable[[dict[str, Any], dict[str, Tensor]], Made],
    weights: str = _WEIGHTS,
) -> Made:
    """Return what ``restore(about, tensors)`` makes of a folder that :func:`save` wrote.

    Whatever does not fit raises :class:`RequestError` in one sentence that names the folder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder)
    about = read_json(place / f"{kind}.json")
    wrong = (KeyError, TypeError, ValueError, AttributeError, OSError, RuntimeError)
    try:
        return restore(about, load_file(place / weights))
    except (*wrong, SafetensorError) as error:
        if isinstance(error, RequestError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"'{folder}' is not a saved {kind} ({reason}).") from error
