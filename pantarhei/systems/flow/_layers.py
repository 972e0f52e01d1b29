"""What the flow models share: perceptrons, points of a grid, interpolation, planes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pantarhei.errors import RequestError

Activation = Callable[[Tensor], Tensor]


class NormAct(nn.Module):
    r"""ReLU on standardised values, undone afterwards: "scale invariant" activation of CFDBench.

    :math:`s\,\mathrm{relu}((x - m)/s) + m = \max(x, m)` with m the mean of a sample: the standard
    deviation s cancels, so it is never computed and a constant sample gives no NaN. A sample is the
    last axis; with ``whole`` it is all axes but the first, which makes the value at one query
    depend on the other queries (what the published DeepONet does).

    >>> NormAct()(torch.tensor([[-1.0, 0.0, 4.0]]))
    tensor([[1., 1., 4.]])
    """

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        """Return the activated values, shaped as ``x``."""
        axes = tuple(range(1, x.dim())) if self.whole else (-1,)
        return torch.maximum(x, x.mean(axes, keepdim=True))


class Mlp(nn.Module):
    """Linear layers of the given sizes with an activation between them, none after the last."""

    def __init__(self, sizes: Sequence[int], activation: Activation = F.relu) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., sizes[0]) to (..., sizes[-1])."""
        return self.after_first(self.first(x))

    @property
    def first(self) -> nn.Linear:
        """The first layer, for inputs that are weighed in parts."""
        return cast(nn.Linear, self.layers[0])

    def after_first(self, hidden: Tensor) -> Tensor:
        """Go on from what the first layer gives, before its activation."""
        for layer in self.layers[1:]:
            hidden = layer(self.activation(hidden))
        return hidden


def grid_points(grid: tuple[int, int], device: torch.device | str = "cpu") -> Tensor:
    """Return every (row, column) of the grid, row by row, as floats (R C, 2).

    >>> grid_points((2, 2)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    rows, columns = (torch.arange(n, dtype=torch.float32, device=device) for n in grid)
    return torch.cartesian_prod(rows, columns)


def at_points(field: Tensor, points: Tensor) -> Tensor:
    """Return the field (B, C, R, W) at points (Q, 2) or (B, Q, 2) in cells, as (B, Q, C).

    Bilinear between cells, exact on them; outside of the grid the nearest value.
    """
    sizes = torch.tensor(field.shape[-2:], device=field.device)
    lower = points.floor().long()
    fraction = (points - lower).to(field.dtype)
    flat = field.flatten(2)
    total = field.new_zeros(())
    for dr in (0, 1):
        for dc in (0, 1):
            cell = torch.minimum((lower + torch.tensor((dr, dc), device=lower.device)), sizes - 1)
            row, column = cell.clamp(min=0).unbind(-1)
            weight = (fraction[..., 0] if dr else 1 - fraction[..., 0]) * (
                fraction[..., 1] if dc else 1 - fraction[..., 1]
            )
            index = (row * sizes[1] + column).expand(len(field), -1)
            values = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))
            total = total + values * weight.expand(len(field), -1)[:, None]
    return total.transpose(1, 2)


def planes(field: Tensor, mask: Tensor | None, omega: Tensor) -> Tensor:
    """Return (field, mask, parameters as constant planes) stacked on the channel axis."""
    batch, _, rows, columns = field.shape
    shape = (batch, -1, rows, columns)
    mask = field.new_ones(()) if mask is None else mask.to(field.dtype)
    return torch.cat(
        [field, mask.expand(batch, 1, rows, columns), omega[:, :, None, None].expand(shape)], 1
    )


def check_step(field: Tensor, omega: Tensor, channels: int, parameters: int) -> None:
    """Refuse a field or parameters of another size than the model was made for."""
    if field.dim() != 4 or field.shape[1] != channels:
        raise RequestError(
            f"the field has shape {tuple(field.shape)}: this model takes (batch, {channels}, rows, "
            "columns)."
        )
    check_parameters(omega, parameters, len(field))


def check_parameters(omega: Tensor, parameters: int, batch: int) -> None:
    """Refuse parameters that are not (batch, parameters)."""
    if omega.shape != (batch, parameters):
        raise RequestError(
            f"omega has shape {tuple(omega.shape)}: this model takes {parameters} parameters for "
            f"each of the {batch} samples, ({batch}, {parameters})."
        )


def check_channels(channels: int) -> int:
    """Refuse fewer than one: u is 1, u and v are 2, other fields may have more."""
    if channels < 1:
        raise RequestError(f"channels={channels}: choose 1 (u), 2 (u and v), or more.")
    return channels
