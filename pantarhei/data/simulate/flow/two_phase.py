r"""Liquid and gas that do not mix, on the staggered grid of :mod:`.mac`, batched over cases.

.. math:: a_t + \nabla\cdot(a u) = 0, \quad \rho(a)\,(u_t + u\cdot\nabla u) = -\nabla p
          + \nabla\cdot(\mu(a) \nabla u) + \rho g, \quad \nabla\cdot u = 0

a is the liquid's share of a cell; density and viscosity are its weighted means. The interface is
moved by fluxes of THINC (Xiao, Honma and Kono, 2005: a hyperbolic tangent in each mixed cell), one
direction after the other, weighted by the interface's normal (WLIC, Yokoi), with Weymouth and
Yue's correction, so that the volume changes by what flows through the sides alone. Momentum:
second-order upwind, first-order beside the interface, Adams-Bashforth 2. The pressure equation with
a varying density is solved by conjugate gradients, preconditioned by the constant-density inverse.
There is no surface tension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pantarhei.data.simulate.flow._stencils import End, mean_of_four, padded, upwind
from pantarhei.data.simulate.poisson import Laplacian
from pantarhei.errors import RequestError

GRAVITY = 9.81  # m/s^2
BETA = 3.5  # steepness of the interface: it spreads over about a cell
_MIXED = 1e-6
_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fluids:
    """Densities, kg/m^3, and viscosities, Pa s, of liquid (B,) and gas.

    The gas is air, but with a viscosity of 1e-3 (air: 1.8e-5), which the grid can carry.
    """

    liquid_density: Tensor
    liquid_viscosity: Tensor
    gas_density: float = 1.2
    gas_viscosity: float = 1e-3


@dataclass(frozen=True)
class TwoPhaseState:
    """Velocities on faces, the liquid's share of each cell, the pressure, Pa, and the time, s."""

    u: Tensor
    v: Tensor
    a: Tensor
    p: Tensor
    t: Tensor
    steps: int = 0
    before: tuple[Tensor, Tensor] | None = None


class TwoPhase:
    """A box with liquid and gas: liquid enters at the left, both leave at the right.

    Args:
        shape: Cells (ny, nx).
        dx, dy: Spacing (B,), m.
        fluids: Their properties.
        speed: Of the liquid at the inlet (B,), m/s.
        inlet: Which rows of the left side are inlet, (ny,) or (B, ny) of bool. What is not is
            open, at pressure 0, and lets gas in.
        closed: No inlet and no outlet: walls all around.
        gravity: m/s^2, downwards.
        solid: Cells of an obstacle, (B or 1, ny, nx) of bool: no flow through their faces.
        tolerance: Of the pressure's residual, relative to its right-hand side.

    >>> one = torch.ones(1, dtype=torch.float64)
    >>> box = TwoPhase((4, 16), one / 4, one / 4, Fluids(100 * one, 0.1 * one), one)
    >>> state = box.start(torch.zeros(1, 4, 16))
    >>> for _ in range(20):
    ...     state = box.step(state, 0.01 * one)
    >>> abs(float(state.a.sum()) / 16 - 0.2) < 1e-6  # one metre high, 1 m/s for .2 s
    True
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dx: Tensor,
        dy: Tensor,
        fluids: Fluids,
        speed: Tensor,
        *,
        inlet: Tensor | None = None,
        closed: bool = False,
        gravity: float = 0.0,
        solid: Tensor | None = None,
        tolerance: float = 1e-6,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if not (len(dx) == len(dy) == len(speed) == len(fluids.liquid_density)):
            raise RequestError("dx, dy, speed and the fluids are one number for each case.")
        ny, nx = shape
        self.shape, self.dtype, self.gravity, self.tolerance = shape, dtype, gravity, tolerance
        self.dx, self.dy = dx.to(dtype)[:, None, None], dy.to(dtype)[:, None, None]
        self.fluids, self.closed = fluids, closed
        rows = torch.ones(ny, dtype=torch.bool) if inlet is None else inlet
        self.inlet = rows.to(dx.device).expand(len(dx), ny)
        self.speed = torch.where(self.inlet, speed.to(dtype)[:, None], 0.0)
        full = solid if solid is not None else torch.zeros(1, ny, nx, dtype=torch.bool)
        wet = F.pad((~full.to(dx.device)).to(dtype), (1, 1, 1, 1), value=1.0)
        # a face is open when the cells on both of its sides are
        self.open_u = wet[:, 1:-1, 1:] * wet[:, 1:-1, :-1]
        self.open_v = wet[:, 1:, 1:-1] * wet[:, :-1, 1:-1]
        self._laplace = Laplacian(shape, dx, dy, () if closed else ("right",), dtype)

    def start(self, a: Tensor, u: Tensor | None = None) -> TwoPhaseState:
        """Return the state with liquid ``a`` (B, ny, nx) in its cells, moving with ``u`` or not."""
        batch, (ny, nx) = len(self.dx), self.shape
        zeros = torch.zeros(batch, ny, nx, dtype=self.dtype, device=self.dx.device)
        flow = zeros.new_zeros(batch, ny, nx + 1) if u is None else u.to(self.dtype)
        a = a.to(zeros).expand(batch, ny, nx).clamp(0, 1)
        still = TwoPhaseState(flow, zeros.new_zeros(batch, ny + 1, nx), a, zeros, zeros[:, 0, 0])
        u, v, _ = self._project(*self._bounded(still.u, still.v), a, zeros, zeros.new_ones(1, 1, 1))
        return TwoPhaseState(u, v, a, zeros, still.t)

    def step(self, state: TwoPhaseState, dt: Tensor) -> TwoPhaseState:
        """Return the state dt (B,) later; the interface moves in sub-steps of CFL .25 at most."""
        h = dt.to(self.dtype)[:, None, None]
        a = self._advect_interface(state, h)
        ru, rv = self._rates(state, a)
        if state.before is None:
            u, v = state.u + h * ru, state.v + h * rv
        else:
            u = state.u + h * (1.5 * ru - 0.5 * state.before[0])
            v = state.v + h * (1.5 * rv - 0.5 * state.before[1])
        u, v, p = self._project(*self._bounded(u, v - h * self.gravity), a, state.p, h)
        return TwoPhaseState(u, v, a, p, state.t + dt.to(self.dtype), state.steps + 1, (ru, rv))

    def centres(self, state: TwoPhaseState) -> Tensor:
        """Return the velocities in the cells, (B, 2, ny, nx)."""
        u, v = state.u, state.v
        return torch.stack([(u[..., 1:] + u[..., :-1]) / 2, (v[:, 1:] + v[:, :-1]) / 2], 1)

    def divergence(self, state: TwoPhaseState) -> Tensor:
        """Return the divergence of the velocity in each cell, 1/s."""
        return state.u.diff(dim=2) / self.dx + state.v.diff(dim=1) / self.dy

    def stable_step(self, speed: Tensor) -> Tensor:
        """Return a stable dt (B,) for the reference ``speed``, as :meth:`.Flow.stable_step`."""
        f, h = self.fluids, torch.minimum(self.dx, self.dy)[:, 0, 0]
        liquid = (f.liquid_viscosity / f.liquid_density).to(h)
        nu = liquid.clamp(min=f.gas_viscosity / f.gas_density)
        return 1 / (speed.to(h) / (0.11 * h) + nu / (0.08 * h**2))

    # the interface

    def _advect_interface(self, state: TwoPhaseState, h: Tensor) -> Tensor:
        courant = torch.stack(
            [(state.u.abs() * h / self.dx).amax(), (state.v.abs() * h / self.dy).amax()]
        ).amax()
        count = max(1, int((courant / 0.25).ceil()))
        a, cu, cv = state.a, state.u * h / self.dx / count, state.v * h / self.dy / count
        for i in range(count):
            full = (a > 0.5).to(a)  # Weymouth and Yue: the same in both directions
            sweeps = [self._sweep_x, self._sweep_y]
            for sweep in sweeps if (state.steps + i) % 2 == 0 else reversed(sweeps):
                a = sweep(a, cu, cv, full)
            a = self._within(a)
        return a

    def _sweep_x(self, a: Tensor, cu: Tensor, cv: Tensor, full: Tensor) -> Tensor:
        left = self.inlet.to(a)[..., None] if not self.closed else a[..., :1]
        wide = torch.cat([left, a, a[..., -1:]], 2)
        flux = _thinc(wide.mT, cu.mT, self._normal_share(a, along_x=True).mT).mT
        return a - flux.diff(dim=2) + full * cu.diff(dim=2)

    def _sweep_y(self, a: Tensor, cu: Tensor, cv: Tensor, full: Tensor) -> Tensor:
        wide = torch.cat([a[:, :1], a, a[:, -1:]], 1)
        flux = _thinc(wide, cv, self._normal_share(a, along_x=False))
        return a - flux.diff(dim=1) + full * cv.diff(dim=1)

    def _normal_share(self, a: Tensor, along_x: bool) -> Tensor:
        """|n_x| / (|n_x| + |n_y|) in each cell and, along the axis asked for, its ghosts."""
        wide = F.pad(a[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        nx = (wide[:, 1:-1, 2:] - wide[:, 1:-1, :-2]).abs() / self.dx
        ny = (wide[:, 2:, 1:-1] - wide[:, :-2, 1:-1]).abs() / self.dy
        share = (nx if along_x else ny) / (nx + ny).clamp(min=1e-12)
        pad = (1, 1, 0, 0) if along_x else (0, 0, 1, 1)
        return F.pad(share[:, None], pad)[:, 0]

    def _within(self, a: Tensor) -> Tensor:
        """Clip to [0, 1], and spread what that took over the mixed cells."""
        clipped = a.clamp(0, 1)
        mixed = ((clipped > 0.01) & (clipped < 0.99)).to(a)
        lost = (a - clipped).sum((1, 2), keepdim=True)
        share = lost / mixed.sum((1, 2), keepdim=True).clamp(min=1)
        return (clipped + share * mixed).clamp(0, 1)

    # momentum

    def _rates(self, state: TwoPhaseState, a: Tensor) -> tuple[Tensor, Tensor]:
        wall: End = ("wall", self.dx.new_zeros(()))
        left: End = wall if self.closed else ("inlet", wall[1])
        right: End = wall if self.closed else ("outlet", wall[1])
        u, v = state.u, state.v
        at_u = mean_of_four(v, 2, left, right)
        at_v = mean_of_four(u, 1, wall, wall)
        wide = F.pad(a[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        a_u = (wide[:, 1:-1, 1:] + wide[:, 1:-1, :-1]) / 2
        a_v = (wide[:, 1:, 1:-1] + wide[:, :-1, 1:-1]) / 2
        tall = F.pad(a_u[:, None], (0, 0, 1, 1), mode="replicate")[:, 0]
        mu_corner = self._viscosity((tall[:, 1:] + tall[:, :-1]) / 2)
        mu_x, mu_y = self._viscosity(wide[:, 1:-1]), self._viscosity(wide[..., 1:-1])
        u_x = padded(u, 2, left, right, normal=True)
        u_y = padded(u, 1, wall, wall, normal=False)
        v_x = padded(v, 2, left, right, normal=False)
        v_y = padded(v, 1, wall, wall, normal=True)
        xx, yy = self.dx**2, self.dy**2
        friction_u = _diffused(u_x, mu_x, 2) / xx + _diffused(u_y, mu_corner, 1) / yy
        friction_v = _diffused(v_x, mu_corner, 2) / xx + _diffused(v_y, mu_y, 1) / yy
        return (
            friction_u / self._density(a_u) - self._carried(u_x, u_y, u, at_u, a_u),
            friction_v / self._density(a_v) - self._carried(v_x, v_y, at_v, v, a_v),
        )

    def _carried(self, q_x: Tensor, q_y: Tensor, cx: Tensor, cy: Tensor, a: Tensor) -> Tensor:
        """c . grad q: second-order upwind in one fluid, first-order where both are."""
        pure = (a < 0.01) | (a > 0.99)
        found = torch.zeros_like(cx)
        for q, c, axis, spacing in ((q_x, cx, 2, self.dx), (q_y, cy, 1, self.dy)):
            before, here, after = (q.narrow(axis, i, c.shape[axis]) for i in (1, 2, 3))
            first = c.clamp(min=0) * (here - before) + c.clamp(max=0) * (after - here)
            found += torch.where(pure, upwind(q, c, axis)[0], first) / spacing
        return found

    def _density(self, a: Tensor) -> Tensor:
        liquid = self.fluids.liquid_density.to(a)[:, None, None]
        return a * liquid + (1 - a) * self.fluids.gas_density

    def _viscosity(self, a: Tensor) -> Tensor:
        liquid = self.fluids.liquid_viscosity.to(a)[:, None, None]
        return a * liquid + (1 - a) * self.fluids.gas_viscosity

    # pressure

    def _bounded(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Set what the sides prescribe; open ones take what arrives, which pressure corrects."""
        u, v = u.clone(), v.clone()
        v[:, 0] = v[:, -1] = 0
        if self.closed:
            u[..., 0] = u[..., -1] = 0
        else:
            u[..., 0] = torch.where(self.inlet, self.speed, u[..., 1])
            u[..., -1] = u[..., -2]
        return u * self.open_u, v * self.open_v

    def _project(
        self, u: Tensor, v: Tensor, a: Tensor, p: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = F.pad(a[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        light_u = self.open_u / self._density((wide[:, 1:-1, 1:] + wide[:, 1:-1, :-1]) / 2)
        light_v = self.open_v / self._density((wide[:, 1:, 1:-1] + wide[:, :-1, 1:-1]) / 2)
        # the value outside is p = 0 on the face, half a cell away; walls and inlets have no slope
        ends = torch.zeros_like(light_u[..., 0]), torch.zeros_like(light_u[..., 0])
        if not self.closed:
            ends = torch.where(self.inlet, 0.0, 2 * light_u[..., 0]), 2 * light_u[..., -1]
        light_u = torch.cat([ends[0][..., None], light_u[..., 1:-1], ends[1][..., None]], 2)
        light_v = F.pad(light_v[:, 1:-1], (0, 0, 1, 1))

        def slopes(q: Tensor) -> tuple[Tensor, Tensor]:
            return (
                light_u * F.pad(q, (1, 1)).diff(dim=2) / self.dx,
                light_v * F.pad(q, (0, 0, 1, 1)).diff(dim=1) / self.dy,
            )

        def operator(q: Tensor) -> Tensor:
            su, sv = slopes(q)
            return su.diff(dim=2) / self.dx + sv.diff(dim=1) / self.dy

        wanted = (u.diff(dim=2) / self.dx + v.diff(dim=1) / self.dy) / h
        root = self._density(a).sqrt()
        p = _conjugate_gradients(
            operator, wanted, p, lambda r: root * self._laplace.solve(root * r), self.tolerance
        )
        su, sv = slopes(p)
        return u - h * su, v - h * sv, p


def _diffused(q: Tensor, mu: Tensor, axis: int) -> Tensor:
    """(mu q')' along an axis, without spacing: q has two ghosts, mu lies between its points."""
    inner = q.narrow(axis, 1, q.shape[axis] - 2).diff(dim=axis)
    return (mu * inner).diff(dim=axis)


def _thinc(a: Tensor, courant: Tensor, weight: Tensor) -> Tensor:
    r"""Liquid that crosses each face of axis 1 in a step, as a share of a cell.

    a and weight have a ghost at both ends, so that face i lies between i and i + 1. The mean over
    what is swept, of length |c|, of
    :math:`\tfrac12 (1 + \gamma \tanh \beta(\xi - \tilde x))` in the cell upstream.
    """
    slope = F.pad(a, (0, 0, 1, 1), mode="replicate")
    sign = torch.where(slope[:, 2:] >= slope[:, :-2], 1.0, -1.0).to(a)
    n = courant.shape[1]
    forward = courant >= 0

    def upstream(q: Tensor) -> Tensor:
        return torch.where(forward, q[:, :n], q[:, 1 : n + 1])

    share, gamma, part = upstream(a), upstream(sign), upstream(weight)
    inside = share.clamp(_MIXED, 1 - _MIXED)
    e = torch.exp(BETA * (2 * inside - 1) / gamma)
    # where the profile of this share crosses 1/2
    start = torch.log((math.exp(BETA) - e) / (e - math.exp(-BETA))) / (2 * BETA)
    face = forward.to(a)
    swept = courant.abs().clamp(min=1e-12)
    ratio = torch.cosh(BETA * (face - start - courant)) / torch.cosh(BETA * (face - start))
    steep = 0.5 * (swept - torch.where(forward, gamma, -gamma) * torch.log(ratio) / BETA)
    mixed = (share > _MIXED) & (share < 1 - _MIXED)
    plain = share * courant.abs()
    amount = torch.where(mixed, part * steep + (1 - part) * plain, plain)
    return torch.where(forward, amount, -amount)


def _conjugate_gradients(
    operator: _Map, wanted: Tensor, x: Tensor, precondition: _Map, tolerance: float, most: int = 500
) -> Tensor:
    """Solve operator(x) = wanted (negative semi-definite) for each case of a batch at once."""
    size = wanted.square().sum((1, 2), keepdim=True).sqrt()
    r = wanted - operator(x)
    z = precondition(r)
    d, rz = z, (r * z).sum((1, 2), keepdim=True)
    for _ in range(most):
        if bool((r.square().sum((1, 2), keepdim=True).sqrt() <= tolerance * size + 1e-300).all()):
            break
        image = operator(d)
        curve = (d * image).sum((1, 2), keepdim=True)
        step = torch.where(curve == 0, 0.0, rz / torch.where(curve == 0, 1.0, curve))
        x, r = x + step * d, r - step * image
        z = precondition(r)
        new = (r * z).sum((1, 2), keepdim=True)
        d = z + torch.where(rz == 0, 0.0, new / torch.where(rz == 0, 1.0, rz)) * d
        rz = new
    return x
