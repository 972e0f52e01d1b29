"""What networks on grids of one, two or three axes have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

from pantarhei.errors import RequestError

CONVOLUTION: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""By number of axes."""


def check_sizes(kind: str, space: int, *counts: int) -> None:
    """Refuse a number of axes that there is none for, and counts below one."""
    if space not in CONVOLUTION or min(counts) < 1:
        raise RequestError(
            f"{kind} has 1 to 3 axes and positive numbers, not space={space}, {counts}."
        )
