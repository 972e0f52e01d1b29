r"""Incompressible flow on a staggered grid: finite volumes in torch, batched over cases.

.. math:: u_t + u \cdot \nabla u = -\nabla p / \rho + \nu \nabla^2 u + f - \chi u / \eta,
          \qquad \nabla \cdot u = 0

u lies on x-faces (B, ny, nx + 1), v on y-faces (B, ny + 1, nx), pressure in cells (Harlow and
Welch's marker-and-cell grid); row 0 is the bottom. A step is explicit for advection (second-order
upwind) and viscosity (central), Adams-Bashforth 2 in time, then implicit for the obstacle (Brinkman
penalisation), then a projection whose Poisson equation is solved exactly in the eigenvectors of the
one-dimensional operators. Each case of a batch has its own spacing, viscosity, speed and time step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.data.simulate.flow._stencils import End, Kind, mean_of_four, padded, upwind
from pantarhei.data.simulate.poisson import Laplacian
from pantarhei.errors import RequestError


@dataclass(frozen=True)
class Side:
    """What happens at one side of the box.

    ``wall``: no slip, moving along itself with ``velocity``; ``slip``: no friction; ``inlet``:
    ``velocity`` along the axis, whatever its sign; ``outlet``: left with what arrives. ``velocity``
    is one number or one for each case, m/s.
    """

    kind: Kind
    velocity: float | Tensor = 0.0


@dataclass(frozen=True)
class State:
    """Velocities, what Adams-Bashforth remembers of the step before, and the time (B,), s."""

    u: Tensor
    v: Tensor
    t: Tensor
    before: tuple[Tensor, Tensor, Tensor] | None = None  # rates of u and v, and their dt


class Flow:
    """A box of fluid: ``start`` a state, ``step`` it, read its ``centres``.

    Args:
        shape: Cells (ny, nx).
        dx, dy: Spacing of each case (B,), m.
        nu: Kinematic viscosity of each case (B,), m^2/s.
        left, right, bottom, top: The sides.
        obstacle: Signed distance to solid, m, positive in the fluid: a function of x and y (B or 1,
            ny, nx) that is asked at the faces.
        force: Acceleration (fu, fv) at time t (B, 1, 1), anything that adds to u and v, m/s^2.
        dtype: float64 (default) or float32, which holds the divergence to about 1e-4 u/dx.

    Raises :class:`RequestError` when the batch sizes differ, a spacing is not positive, or the
    sides are neither closed all around nor an inlet at the left with an outlet at the right.

    >>> one = torch.ones(1)
    >>> box = Flow((8, 8), one / 8, one / 8, one / 100, top=Side("wall", 1.0))
    >>> state = box.start()
    >>> for _ in range(10):
    ...     state = box.step(state, 0.01 * one)
    >>> float(box.divergence(state).abs().max()) < 1e-12, float(state.u[0, -1].mean()) > 0
    (True, True)
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dx: Tensor,
        dy: Tensor,
        nu: Tensor,
        *,
        left: Side = Side("wall"),
        right: Side = Side("wall"),
        bottom: Side = Side("wall"),
        top: Side = Side("wall"),
        obstacle: Callable[[Tensor, Tensor], Tensor] | None = None,
        force: Callable[[Tensor], tuple[Tensor | float, Tensor | float]] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not (dx.shape == dy.shape == nu.shape and dx.dim() == 1):
            raise RequestError("dx, dy and nu are one number for each case, of one length.")
        if not bool((dx > 0).all() and (dy > 0).all() and (nu >= 0).all()):
            raise RequestError("spacings are positive and viscosities not negative.")
        if min(shape) < 4:
            raise RequestError(f"a grid of {shape} cells is too small: 4 x 4 at least.")
        _check_sides(left, right, bottom, top)
        self.shape, self.dtype, self.device = shape, dtype, dx.device
        self.dx, self.dy, self.nu = (a.to(dtype)[:, None, None] for a in (dx, dy, nu))
        # in this order everywhere
        self.sides = {"left": left, "right": right, "bottom": bottom, "top": top}
        self._velocity = {name: self._each(side.velocity) for name, side in self.sides.items()}
        self._laplace = Laplacian(shape, dx, dy, dtype=dtype)
        self.force = force
        self._drag: tuple[Tensor, Tensor] | None = None
        if obstacle is not None:
            self._drag = (
                self._penalty(obstacle, *self.faces_u()),
                self._penalty(obstacle, *self.faces_v()),
            )

    def faces_u(self) -> tuple[Tensor, Tensor]:
        """Return x and y of the x-faces, (B, 1, nx + 1) and (B, ny, 1)."""
        ny, nx = self.shape
        return self._line(nx + 1, 0.0) * self.dx, self._line(ny, 0.5)[:, None] * self.dy

    def faces_v(self) -> tuple[Tensor, Tensor]:
        """Return x and y of the y-faces, (B, 1, nx) and (B, ny + 1, 1)."""
        ny, nx = self.shape
        return self._line(nx, 0.5) * self.dx, self._line(ny + 1, 0.0)[:, None] * self.dy

    def start(self, u: Tensor | None = None, v: Tensor | None = None) -> State:
        """Return a state at t = 0: at rest, or with the velocities given, made divergence-free."""
        batch, (ny, nx) = len(self.dx), self.shape
        zeros = torch.zeros(batch, dtype=self.dtype, device=self.device)
        u = zeros.new_zeros(batch, ny, nx + 1) if u is None else u.to(self.dtype).clone()
        v = zeros.new_zeros(batch, ny + 1, nx) if v is None else v.to(self.dtype).clone()
        u, v = self._project(*self._bounded(u, v, u, None))
        return State(u, v, zeros)

    def step(self, state: State, dt: Tensor) -> State:
        """Return the state dt (B,) later. See :meth:`stable_step`."""
        dt = dt.to(self.dtype)
        h = dt[:, None, None]
        ru, rv = self._rates(state)
        u, v = state.u + h * ru, state.v + h * rv
        if state.before is not None:
            old_u, old_v, old_h = state.before
            ratio = h**2 / (2 * old_h)  # Adams-Bashforth 2, also for a step that changes
            u, v = u + ratio * (ru - old_u), v + ratio * (rv - old_v)
        if self._drag is not None:
            u, v = u / self._drag[0], v / self._drag[1]
        u, v = self._project(*self._bounded(u, v, state.u, h))
        return State(u, v, state.t + dt, (ru, rv, h))

    def centres(self, state: State) -> Tensor:
        """Return the velocities in the cells, (B, 2, ny, nx)."""
        u, v = state.u, state.v
        return torch.stack([(u[..., 1:] + u[..., :-1]) / 2, (v[:, 1:] + v[:, :-1]) / 2], 1)

    def divergence(self, state: State) -> Tensor:
        """Return the divergence of the velocity in each cell, 1/s."""
        return self._divergence(state.u, state.v)

    def stable_step(self, speed: Tensor, cfl: float = 0.11, diffusion: float = 0.08) -> Tensor:
        r"""Return a stable dt (B,) at the reference ``speed`` (B,), s.

        1/dt = speed/(cfl dx) + nu/(diffusion dx^2): each limit alone is what Adams-Bashforth with
        upwind advection was measured to carry, where the fastest fluid is at twice the reference.
        """
        h = torch.minimum(self.dx, self.dy)[:, 0, 0]
        nu = self.nu[:, 0, 0]
        return 1 / (speed.to(self.dtype) / (cfl * h) + nu / (diffusion * h**2))

    def _rates(self, state: State) -> tuple[Tensor, Tensor]:
        u, v = state.u, state.v
        left, right, bottom, top = (
            (side.kind, self._velocity[name]) for name, side in self.sides.items()
        )
        at_u, at_v = mean_of_four(v, 2, left, right), mean_of_four(u, 1, bottom, top)
        ru = self._along(u, u, 2, left, right, normal=True)
        ru += self._along(u, at_u, 1, bottom, top, normal=False)
        rv = self._along(v, at_v, 2, left, right, normal=False)
        rv += self._along(v, v, 1, bottom, top, normal=True)
        if self.force is not None:
            fu, fv = self.force(state.t[:, None, None])
            ru, rv = ru + fu, rv + fv
        return ru, rv

    def _along(
        self, q: Tensor, c: Tensor, axis: int, low: End, high: End, *, normal: bool
    ) -> Tensor:
        """-c q' + nu q'' along one axis."""
        spacing = self.dx if axis == 2 else self.dy
        first, second = upwind(padded(q, axis, low, high, normal=normal), c, axis)
        return second.mul_(self.nu / spacing**2).sub_(first.div_(spacing))

    def _bounded(
        self, u: Tensor, v: Tensor, before: Tensor, h: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Set the normal velocities at the sides; an outlet lets out what the inlet lets in."""
        s, w = self.sides, self._velocity
        zero = torch.zeros_like(w["left"][..., 0])

        def at(name: str) -> Tensor:
            return w[name][..., 0] if s[name].kind == "inlet" else zero

        u, v = u.clone(), v.clone()
        u[..., 0], u[..., -1] = at("left"), at("right")
        v[:, 0], v[:, -1] = at("bottom"), at("top")
        if s["right"].kind == "outlet":
            out = before[..., -1]
            if h is not None:  # u_t + u_in u_x = 0
                courant = (h * w["left"] / self.dx)[..., 0]
                out = out - courant * (out - before[..., -2])
            missing = (u[..., 0] - out).mean(1, keepdim=True)
            u[..., -1] = out + missing
        return u, v

    def _project(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        phi = self._laplace.solve(self._divergence(u, v))
        u, v = u.clone(), v.clone()
        u[..., 1:-1] -= phi.diff(dim=2) / self.dx
        v[:, 1:-1] -= phi.diff(dim=1) / self.dy
        return u, v

    def _divergence(self, u: Tensor, v: Tensor) -> Tensor:
        return u.diff(dim=2) / self.dx + v.diff(dim=1) / self.dy

    def _penalty(
        self, obstacle: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
    ) -> Tensor:
        """1 + dt chi / eta with eta = dt/20; chi is smooth over a quarter of a cell."""
        distance = obstacle(x, y)
        return 1 + 20 * torch.sigmoid(-distance / (self.dx / 4))

    def _each(self, value: float | Tensor) -> Tensor:
        found = torch.as_tensor(value, dtype=self.dtype, device=self.device)
        return found.expand(len(self.dx)).reshape(-1, 1, 1)

    def _line(self, n: int, shift: float) -> Tensor:
        return torch.arange(n, dtype=self.dtype, device=self.device) + shift


def _check_sides(left: Side, right: Side, bottom: Side, top: Side) -> None:
    """Refuse sides through which more would flow in than out."""
    kinds = [side.kind for side in (left, right, bottom, top)]
    through = [kind for kind in kinds if kind in ("inlet", "outlet")]
    if through and (through != ["inlet", "outlet"] or kinds[:2] != ["inlet", "outlet"]):
        raise RequestError(
            "fluid flows in at the left and out at the right, or not at all: "
            f"the sides are {', '.join(kinds)} (left, right, bottom, top)."
        )
