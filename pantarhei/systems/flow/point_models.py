"""Neural flow solvers that answer at points: FFN, the DeepONets, and their autoregressive kin.

Models of CFDBench (arXiv 2310.05963), with the sizes of its code. Two ways to ask:

- ``predict(points, t, omega)``: the velocity at points and time from the operating parameters alone
  (:class:`FFN`, :class:`DeepONet`);
- ``step(field, omega, mask)``: the next frame from the present one, or only at ``points`` with
  ``at(field, omega, points)`` (:class:`AutoFFN`, :class:`AutoDeepONet`, :class:`AutoEDeepONet`,
  :class:`AutoDeepONetCNN`); each adds what it computes to the present value there.

The latter see the last ``history`` frames, stacked to (B, history x channels, R, C), and add to the
last; the paper's see one. Points are (row, column) in cells, t is the frame's number, omega the
parameters as :class:`~pantarhei.systems.parameters.ParameterScale` makes them, fields are (B,
channels, R, C) with u first. The published models are called with ``published=True``; by default
raw indices are scaled to the unit square, and the faults named in each class are corrected.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.systems.flow._layers import (
    Mlp,
    NormAct,
    at_points,
    check_channels,
    check_parameters,
    check_step,
    grid_points,
    planes,
)


class _Point(nn.Module):
    """Holds the grid and scales points: to [-1/2, 1/2] over the grid, or as published."""

    def __init__(
        self, grid: tuple[int, int], parameters: int, channels: int, published: bool
    ) -> None:
        super().__init__()
        self.grid, self.parameters_count = grid, parameters
        self.channels, self.published = check_channels(channels), published

    def _unit(self, points: Tensor) -> Tensor:
        return (points + 0.5) / points.new_tensor(self.grid) - 0.5


class _PredictsPoints(_Point):
    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        frames: int = 100,
        published: bool = False,
    ) -> None:
        super().__init__(grid, parameters, channels, published)
        self.frames = frames

    def predict(self, points: Tensor, t: Tensor, omega: Tensor) -> Tensor:
        """Return velocities (B, Q, channels) at points (Q, 2) or (B, Q, 2), frames t (B,)."""
        check_parameters(omega, self.parameters_count, len(t))
        points, t = points.to(omega.dtype), t.to(omega.dtype)
        if not self.published:
            points, t = self._unit(points), t / self.frames - 0.5
        return self._at(points if points.dim() == 3 else points[None], t, omega)

    def predict_frame(self, t: Tensor, omega: Tensor) -> Tensor:
        """Return the whole frame t of each sample, (B, channels, R, C)."""
        values = self.predict(grid_points(self.grid, omega.device), t, omega)
        return values.transpose(1, 2).unflatten(2, self.grid)

    def _at(self, points: Tensor, t: Tensor, omega: Tensor) -> Tensor:
        raise NotImplementedError


class FFN(_PredictsPoints):
    """Perceptron [P + 3, 100 x 8, channels] on (omega, row, column, t) with :class:`NormAct`.

    ``published``: raw indices, up to 64 for points and up to thousands for frames. ``frames`` is
    the number that t is divided by otherwise.

    >>> model = FFN(parameters=5)
    >>> sum(p.numel() for p in model.parameters())
    71701
    >>> model.predict(torch.zeros(7, 2), torch.zeros(3), torch.zeros(3, 5)).shape
    torch.Size([3, 7, 1])
    """

    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        frames: int = 100,
        published: bool = False,
    ) -> None:
        super().__init__(parameters, grid, channels, frames, published)
        self.net = Mlp([parameters + 3, *[100] * 8, channels], NormAct())

    def _at(self, points: Tensor, t: Tensor, omega: Tensor) -> Tensor:
        # The first layer is linear: parameters, time and points are weighed apart, then summed,
        # so that nothing is repeated for each query.
        first = self.net.first
        of_case, of_point, of_time = first.weight.split([self.parameters_count, 2, 1], 1)
        per_case = F.linear(torch.cat([omega, t[:, None]], 1), torch.cat([of_case, of_time], 1))
        return self.net.after_first((per_case + first.bias)[:, None] + F.linear(points, of_point))


class DeepONet(_PredictsPoints):
    """Branch [P, 100 x 8] on omega times trunk on (t, row, column): their product plus a bias.

    The trunk sums a linear map of t and one of the point, then goes through [100 x 8]; with two
    channels the last layers are twice as wide and each half makes its own product.

    ``published``: raw indices, and a NormAct that normalises over all queries of a call, so that
    the answer at a point depends on the others asked for. The default normalises each query alone.

    >>> sum(p.numel() for p in DeepONet(parameters=5).parameters())
    142501
    """

    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        frames: int = 100,
        published: bool = False,
    ) -> None:
        super().__init__(parameters, grid, channels, frames, published)
        self.branch = Mlp([parameters, *[100] * 7, 100 * channels], NormAct())
        self.of_time, self.of_point = nn.Linear(1, 100), nn.Linear(2, 100)
        self.trunk = Mlp([*[100] * 7, 100 * channels], NormAct(whole=published))
        self.bias = nn.Parameter(torch.zeros(channels))

    def _at(self, points: Tensor, t: Tensor, omega: Tensor) -> Tensor:
        trunk = self.trunk(self.of_time(t[:, None])[:, None] + self.of_point(points))
        return _product(self.branch(omega), trunk, self.channels) + self.bias


class _StepsPoints(_Point):
    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        published: bool = False,
        history: int = 1,
    ) -> None:
        super().__init__(grid, parameters, channels, published)
        self._seen = history * self.channels

    def step(self, field: Tensor, omega: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the next frame (B, channels, R, C); the mask (B, 1, R, C) is 1 in the fluid."""
        check_step(field, omega, self._seen, self.parameters_count)
        if tuple(field.shape[-2:]) != self.grid:
            raise RequestError(
                f"the field has {tuple(field.shape[-2:])} cells: this model was made for "
                f"{self.grid}."
            )
        points = self._scaled(grid_points(self.grid, field.device).to(field.dtype))
        change = self._change(field, omega, points, mask)
        return field[:, -self.channels :] + change.transpose(1, 2).unflatten(2, self.grid)

    def at(
        self, field: Tensor, omega: Tensor, points: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the next velocities (B, Q, channels) at points (Q, 2) or (B, Q, 2) alone."""
        check_step(field, omega, self._seen, self.parameters_count)
        points = points.to(field.dtype)
        present = at_points(field[:, -self.channels :], points)
        return present + self._change(field, omega, self._scaled(points), mask)

    def _scaled(self, points: Tensor) -> Tensor:
        scaled = (points - 50) / 100 if self.published else self._unit(points)
        return scaled if scaled.dim() == 3 else scaled[None]

    def _change(self, field: Tensor, omega: Tensor, points: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class AutoFFN(_StepsPoints):
    """Perceptron [channels R C + P + 2, 200 x 8, channels] on (field, omega, row, column).

    ``width``: of the hidden layers, 200 as published. ``published``: raw indices, and frames paired
    with the wrong queries as soon as a batch holds more than one: entry (b, k) of B x K sees frame
    (b K + k) mod B. It learns to change nothing.

    >>> sum(p.numel() for p in AutoFFN(parameters=5).parameters())
    1102401
    """

    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        published: bool = False,
        history: int = 1,
        width: int = 200,
    ) -> None:
        super().__init__(parameters, grid, channels, published, history)
        inputs = self._seen * grid[0] * grid[1] + parameters + 2
        self.net = Mlp([inputs, *[width] * 8, channels])

    def _change(self, field: Tensor, omega: Tensor, points: Tensor, mask: Tensor | None) -> Tensor:
        # As in FFN: the frame is weighed once, not once for each query.
        first = self.net.first
        frames = F.linear(torch.cat([field.flatten(1), omega], 1), first.weight[:, :-2], first.bias)
        queries = F.linear(points, first.weight[:, -2:])
        batch, count = len(field), queries.shape[1]
        per_query = frames[:, None]
        if self.published:
            flat = torch.arange(batch * count, device=field.device)
            per_query = frames[flat % batch].unflatten(0, (batch, count))
        return self.net.after_first(per_query + queries)


class AutoDeepONet(_StepsPoints):
    """Branch [channels R C + P, 100 x 8] on (field, omega) times trunk [2, 100 x 8] on the point.

    ``width``: of the hidden layers, 100 as published. ``published``: the point as (index - 50)/100,
    whatever the grid.

    >>> sum(p.numel() for p in AutoDeepONet(parameters=5).parameters())
    551901
    """

    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        published: bool = False,
        history: int = 1,
        width: int = 100,
    ) -> None:
        super().__init__(parameters, grid, channels, published, history)
        wide = [*[width] * 7, width * channels]
        self.branch = Mlp([self._seen * grid[0] * grid[1] + parameters, *wide])
        self.trunk = Mlp([2, *wide])
        self.bias = nn.Parameter(torch.zeros(channels))

    def _change(self, field: Tensor, omega: Tensor, points: Tensor, mask: Tensor | None) -> Tensor:
        branch = self.branch(torch.cat([field.flatten(1), omega], 1))
        return _product(branch, self.trunk(points), self.channels) + self.bias


class AutoEDeepONet(_StepsPoints):
    """Branches of their own for the field and for omega, multiplied.

    Trunk and ``width`` as AutoDeepONet's.

    >>> sum(p.numel() for p in AutoEDeepONet(parameters=5).parameters())
    622701
    """

    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        published: bool = False,
        history: int = 1,
        width: int = 100,
    ) -> None:
        super().__init__(parameters, grid, channels, published, history)
        wide = [*[width] * 7, width * channels]
        self.field_branch = Mlp([self._seen * grid[0] * grid[1], *wide])
        self.parameter_branch = Mlp([parameters, *wide])
        self.trunk = Mlp([2, *wide])
        self.bias = nn.Parameter(torch.zeros(channels))

    def _change(self, field: Tensor, omega: Tensor, points: Tensor, mask: Tensor | None) -> Tensor:
        branch = self.field_branch(field.flatten(1)) * self.parameter_branch(omega)
        return _product(branch, self.trunk(points), self.channels) + self.bias


class AutoDeepONetCNN(_StepsPoints):
    """Convolutional branch on (u, v, mask, omega) times trunk [2, 100 x 4, 512], then a perceptron.

    Branch: Conv5x5 to 32, 4 x (Conv5x5, MaxPool2, ReLU), Conv5x5, 4x4 cells (pooled to that on
    other grids than the paper's); the product goes through [512, width, width, channels]. With one
    channel the field is u and its v plane is zero.

    >>> sum(p.numel() for p in AutoDeepONetCNN(parameters=5).parameters())
    742730
    """

    def __init__(
        self,
        parameters: int,
        grid: tuple[int, int] = (64, 64),
        channels: int = 1,
        published: bool = False,
        history: int = 1,
        width: int = 512,
    ) -> None:
        super().__init__(parameters, grid, channels, published, history)
        if min(grid) < 16:
            raise RequestError(
                f"a grid of {grid} is too small for AutoDeepONetCNN: 16x16 at least."
            )
        layers: list[nn.Module] = [nn.Conv2d(max(2, self._seen) + 1 + parameters, 32, 5, padding=2)]
        for _ in range(4):
            layers += [nn.Conv2d(32, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()]
        layers += [nn.Conv2d(32, 32, 5, padding=2), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        self.branch = nn.Sequential(*layers)
        self.trunk = Mlp([2, *[100] * 4, 512])
        self.out = Mlp([512, width, width, channels])
        self.bias = nn.Parameter(torch.zeros(channels))

    def _change(self, field: Tensor, omega: Tensor, points: Tensor, mask: Tensor | None) -> Tensor:
        both = field if self._seen > 1 else torch.cat([field, torch.zeros_like(field)], 1)
        branch = self.branch(planes(both, mask, omega))
        return self.out(branch[:, None] * self.trunk(points)) + self.bias


def _product(branch: Tensor, trunk: Tensor, channels: int) -> Tensor:
    """Inner products (B, Q, channels) of (B, channels k) and (1 or B, Q, channels k)."""
    b, k = branch.unflatten(-1, (channels, -1)), trunk.unflatten(-1, (channels, -1))
    if len(k) == 1:
        return torch.einsum("bck,qck->bqc", b, k[0])
    return torch.einsum("bck,bqck->bqc", b, k)
