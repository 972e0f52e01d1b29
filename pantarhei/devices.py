"""The device that a user means, and the processors of this machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pantarhei.errors import RequestError

if TYPE_CHECKING:
    import torch


def chosen_device(device: str | torch.device) -> torch.device:
    """Return the device meant: ``"auto"`` is CUDA where there is one.

    Raises :class:`RequestError` for one that is unknown or not there.

    >>> chosen_device("cpu")
    device(type='cpu')
    """
    import torch

    try:
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        where = where if device == "auto" else torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"Device '{device}' is unknown: choose auto, cpu or cuda.") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            f"Device '{device}' is not there, PyTorch sees no CUDA device: choose cpu, or install "
            "a CUDA build of PyTorch."
        )
    return where


def processors() -> int:
    """Return how many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
