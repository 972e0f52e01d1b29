"""Networks of different kinds at equal size: weights counted alike, widths solved for a budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pantarhei.errors import RequestError


def weight_count(net: nn.Module) -> int:
    """Return the trainable real numbers of a network: a complex weight is two.

    >>> from pantarhei.systems.fno import SpectralConv
    >>> weight_count(SpectralConv(width=3, modes=4, space=1)) == 2 * 3 * 3 * 4
    True
    """
    return sum(p.numel() * (1 + p.is_complex()) for p in net.parameters() if p.requires_grad)


def width_for(budget: int, build: Callable[[int], nn.Module]) -> int:
    """Return the width whose network ``build(width)`` has the nearest number of weights.

    Networks are built without memory (on PyTorch's meta device), until two neighbouring widths
    enclose the budget. A budget far below the narrowest network raises :class:`RequestError`.

    >>> width_for(1000, lambda width: nn.Linear(9, width))
    100
    """

    def count(width: int) -> int:
        with torch.device("meta"):
            return weight_count(build(width))

    if budget < 0.9 * (least := count(1)):
        raise RequestError(
            f"The narrowest network of this kind has {least:,} weights: a budget of {budget:,} is "
            "not reached by any width."
        )
    low, high = 1, 2
    while count(high) < budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < budget else (low, middle)
    return min((low, high), key=lambda width: abs(count(width) - budget))
