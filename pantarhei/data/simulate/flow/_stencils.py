"""Differences on a staggered grid: ghosts, second-order upwind, means of four. Any axis."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["wall", "slip", "inlet", "outlet"]
End = tuple[Kind, Tensor]
"""What happens at one end of an axis, and the velocity that belongs to it."""


def padded(q: Tensor, axis: int, low: End, high: End, *, normal: bool, count: int = 2) -> Tensor:
    """Put ``count`` ghosts at both ends of an axis. ``normal``: q lies on the two sides."""
    ends = _ghosts(q, axis, *low, normal, count), _ghosts(q.flip(axis), axis, *high, normal, count)
    return torch.cat([ends[0], q, ends[1].flip(axis)], axis)


def _ghosts(q: Tensor, axis: int, kind: Kind, velocity: Tensor, normal: bool, count: int) -> Tensor:
    if kind == "outlet" or (normal and kind == "inlet"):
        edge = q.narrow(axis, 0, 1)
        return edge.expand(*(count if i == axis else -1 for i in range(q.dim())))
    if normal:
        return -q.narrow(axis, 1, count).flip(axis)  # odd: the side is closed
    mirrored = q.narrow(axis, 0, count).flip(axis)
    if kind == "slip":
        return mirrored
    return 2 * velocity - mirrored if kind == "wall" else -mirrored


def upwind(q: Tensor, c: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    r"""Return c q' (second-order upwind) and q'', both without spacing; q has 2 ghosts.

    The one-sided difference :math:`(3 q_0 - 4 q_{-1} + q_{-2})/2` of either direction is the mean
    of both plus sign(c) times half their difference.
    """
    n = c.shape[axis]
    a, b, m, d, e = (q.narrow(axis, i, n) for i in range(5))
    near, far = b + d, a + e
    central = torch.sub(d, b).mul_(4).sub_(e).add_(a)
    biased = far.sub_(near, alpha=4).add_(m, alpha=6)
    first = central.mul_(c).addcmul_(c.abs(), biased).mul_(0.25)
    return first, near.sub_(m, alpha=2)


def mean_of_four(q: Tensor, axis: int, low: End, high: End) -> Tensor:
    """Return a velocity at the other one's faces: means of four, with ghosts along ``axis``.

    ``axis`` is the one that q does not point along; of q (B, ny + 1, nx) with axis 2 the result is
    (B, ny, nx + 1).
    """
    wide = padded(q, axis, low, high, normal=False, count=1)
    n, other = q.shape[axis] + 1, 3 - axis
    mean = wide.narrow(axis, 0, n) + wide.narrow(axis, 1, n)
    m = q.shape[other] - 1
    return (mean.narrow(other, 0, m) + mean.narrow(other, 1, m)).mul_(0.25)
