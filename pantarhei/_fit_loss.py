"""What a loss is: shared by the training loop and by the instruments, which load no Fabric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pantarhei.errors import RequestError

Loss = Callable[[Any, Any], "Tensor | tuple[Tensor, Mapping[str, Tensor | float]]"]


def scalar(result: Any) -> Tensor:
    """Return the loss, of shape (), out of what ``loss(model, batch)`` returned."""
    value = result[0] if isinstance(result, tuple) else result
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RequestError(f"loss(model, batch) returned {what}: return one number, a scalar.")
    return value.reshape(())
