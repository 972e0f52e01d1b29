r"""Compressible flow of an ideal gas on a periodic square, in the inviscid limit: finite volumes.

.. math:: \partial_t \begin{pmatrix} \rho \\ \rho u \\ E \end{pmatrix} + \nabla \cdot
          \begin{pmatrix} \rho u \\ \rho u \otimes u + p I \\ (E + p)\, u \end{pmatrix} = 0, \qquad
          E = \frac{p}{\gamma - 1} + \frac{\rho |u|^2}{2}, \quad \gamma = 5/3

Primitive variables are linear in each cell with the monotonised central slope,
:math:`\mathrm{sign} \cdot \min(2|\Delta_L|, 2|\Delta_R|, |\Delta_C|)` where both differences agree
in sign and 0 elsewhere; HLLC fluxes (Toro's book, chapter 10, with Davis' wave speeds), unsplit;
the midpoint rule in time with the Courant number 0.3, each case at its own step. Second order where
the flow is smooth. Pressure does not fall below 1e-4.

The initial fields are those of PDEBench's compressible set (viscosities of 1e-8 there, none here),
which SineNet (arXiv 2403.19507) calls CNS. Axes are (y, x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.data.simulate import generators, simulated
from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError

GAMMA = 5 / 3
_COURANT, _LEAST_PRESSURE, _LEAST_SHARE = 0.3, 1e-4, 0.01
_MOST_STEPS = 100_000


@dataclass(frozen=True)
class Compressible:
    """``size`` x ``size`` cells, of which every ``stride``-th is stored along each axis.

    Channels are ``density``, ``pressure``, ``vx``, ``vy``; ``mach`` is the mean speed over the mean
    speed of sound (by the root of gamma T0) at the start; a frame every ``dt``, the start included.
    Density and pressure start at 1 % of their mean at least.

    >>> Compressible(size=16, stride=2, frames=2).simulate([0]).shape
    (1, 2, 4, 8, 8)
    """

    size: int = 128
    stride: int = 4
    dt: float = 0.05
    frames: int = 21
    mach: float = 0.1

    def __post_init__(self) -> None:
        if self.size < 8 or self.frames < 1 or self.stride < 1 or self.size % self.stride:
            raise RequestError(
                f"size={self.size}, stride={self.stride}, frames={self.frames}: at least 8 cells "
                "and 1 frame, and a stride that divides the cells."
            )
        if not (self.dt > 0 and self.mach >= 0):
            raise RequestError(
                f"dt={self.dt}, mach={self.mach}: a positive step, no negative Mach."
            )

    def initial(self, cases: Sequence[int], seed: int = 0) -> Tensor:
        """Return the primitive variables at the start, (B, 4, n, n): density, vx, vy, pressure."""
        return torch.stack([self._one(generator) for generator in generators(seed, cases)])

    def _one(self, generator: torch.Generator) -> Tensor:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            draw = torch.rand(shape, generator=generator, dtype=torch.float64)
            return low + (high - low) * draw

        x = (torch.arange(self.size, dtype=torch.float64) + 0.5) / self.size
        density, temperature = uniform(0.1, 10, 2)
        pressure = density * temperature
        whole = torch.tensor([k for k in range(-4, 5) if k], dtype=torch.float64)
        radius = 2 * math.pi * torch.hypot(whole[:, None], whole)
        waves = torch.polar(radius**-0.5, uniform(0, 2 * math.pi, 4, 8, 8))
        basis = torch.exp(2j * math.pi * x[:, None] * whole)
        fields = (basis @ waves @ basis.T).imag  # sums of sines with random phases
        rho, p, vx, vy = fields
        speed = self.mach * torch.sqrt(GAMMA * temperature) / torch.hypot(vx, vy).mean()
        share = uniform(0.01, 0.2, 2)
        parts = [
            share[0] * density * rho / rho.abs().mean(),
            speed * vx,
            speed * vy,
            share[1] * pressure * p / p.abs().mean(),
        ]
        low, high = uniform(0.1, 0.45, 2), uniform(0.55, 0.9, 2)
        windowed = uniform(0, 1, 1) < 0.5
        edge = (torch.tanh((x - low[:, None]) / 0.01) - torch.tanh((x - high[:, None]) / 0.01)) / 2
        window = edge[0][:, None] * edge[1] if windowed else torch.ones(())
        state = torch.stack(parts) * window
        state[0] = (density + state[0]).clamp(min=_LEAST_SHARE * density)
        state[3] = (pressure + state[3]).clamp(min=_LEAST_SHARE * pressure)
        return state

    def simulate(
        self,
        cases: Sequence[int],
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> Trajectories:
        """Return trajectories of the cases named; the same case and seed give the same states."""
        dx, every = 1 / self.size, self.stride
        conserved = to_conserved(self.initial(cases, seed).to(device, dtype))
        frames = []
        for frame in range(self.frames):
            if frame:
                conserved = advance(conserved, self.dt, dx)
            density, vx, vy, pressure = to_primitive(conserved)[:, :, ::every, ::every].unbind(1)
            frames.append(torch.stack([density, pressure, vx, vy], 1).float())
        return simulated(
            self,
            torch.stack(frames, 1),
            ("density", "pressure", "vx", "vy"),
            dt=self.dt,
            spacing=(every * dx, every * dx),
        )


def advance(conserved: Tensor, time: float, dx: float) -> Tensor:
    """Advance (B, 4, ny, nx) by ``time``, each case in steps of its own Courant number."""
    left = torch.full((len(conserved), 1, 1, 1), time, dtype=conserved.dtype,
                      device=conserved.device)  # fmt: skip
    for _ in range(_MOST_STEPS):
        if not (left > 0).any():
            return conserved
        dt = torch.minimum(_COURANT * dx / _fastest(conserved), left)
        conserved = step(conserved, dt, dx)
        left = left - dt
    raise RequestError(
        f"The flow needs more than {_MOST_STEPS} steps to advance by {time:g}: it has blown up."
    )


def step(conserved: Tensor, dt: Tensor, dx: float) -> Tensor:
    """Advance by ``dt`` (B, 1, 1, 1) with the midpoint rule."""
    middle = conserved - dt / 2 * outflow(conserved, dx)
    return conserved - dt * outflow(middle, dx)


def outflow(conserved: Tensor, dx: float) -> Tensor:
    """Return the divergence of the fluxes, (B, 4, ny, nx)."""
    primitive = to_primitive(conserved)
    along_x = _flux(primitive, 3)
    # the same along y with the roles of the two velocities exchanged
    along_y = _flux(primitive[:, [0, 2, 1, 3]], 2)[:, [0, 2, 1, 3]]
    out = along_x[..., 1:] - along_x[..., :-1]
    return out.add_(along_y[:, :, 1:] - along_y[:, :, :-1]).div_(dx)


def to_primitive(conserved: Tensor) -> Tensor:
    """Return density, vx, vy, pressure of density, momenta and energy."""
    density, mx, my, energy = conserved.unbind(1)
    vx, vy = mx / density, my / density
    pressure = (GAMMA - 1) * (energy - (mx * vx + my * vy) / 2)
    return torch.stack([density, vx, vy, pressure.clamp(min=_LEAST_PRESSURE)], 1)


def to_conserved(primitive: Tensor) -> Tensor:
    """Return density, momenta and energy of density, vx, vy, pressure."""
    density, vx, vy, pressure = primitive.unbind(1)
    energy = pressure / (GAMMA - 1) + density * (vx**2 + vy**2) / 2
    return torch.stack([density, density * vx, density * vy, energy], 1)


def _fastest(conserved: Tensor) -> Tensor:
    density, vx, vy, pressure = to_primitive(conserved).unbind(1)
    sound = torch.sqrt(GAMMA * pressure / density)
    return (torch.maximum(vx.abs(), vy.abs()) + sound).amax((1, 2)).view(-1, 1, 1, 1)


def _flux(primitive: Tensor, axis: int) -> Tensor:
    """Return the HLLC fluxes through the n + 1 faces along ``axis``, the first the last again.

    Channel 1 is the velocity along the axis.
    """
    n = primitive.shape[axis]

    def part(x: Tensor, begin: int, end: int) -> Tensor:
        return x.narrow(axis, begin, x.shape[axis] - begin - end)

    across = [primitive.narrow(axis, n - 2, 2), primitive, primitive.narrow(axis, 0, 2)]
    cells = torch.cat(across, axis)
    step = part(cells, 1, 0) - part(cells, 0, 1)
    backward, forward = part(step, 0, 1), part(step, 1, 0)
    size = step.abs()
    steepest = torch.minimum(part(size, 0, 1), part(size, 1, 0)).mul_(2)
    central = (backward + forward).div_(2)
    # half the slope: the central one, no steeper than twice either side, none at an extremum
    half = torch.minimum(torch.maximum(central, -steepest), steepest).div_(2)
    half = half.mul_(backward * forward > 0)
    inner = part(cells, 1, 1)
    return _hllc(part(inner, 0, 1) + part(half, 0, 1), part(inner, 1, 0) - part(half, 1, 0))


def _hllc(left: Tensor, right: Tensor) -> Tensor:
    rho_l, u_l, _, p_l = left.unbind(1)
    rho_r, u_r, _, p_r = right.unbind(1)
    c_l, c_r = (p_l / rho_l).mul_(GAMMA).sqrt_(), (p_r / rho_r).mul_(GAMMA).sqrt_()
    s_l, s_r = torch.minimum(u_l - c_l, u_r - c_r), torch.maximum(u_l + c_l, u_r + c_r)
    mass_l, mass_r = rho_l * (s_l - u_l), rho_r * (s_r - u_r)
    s_m = (p_r - p_l + mass_l * u_l - mass_r * u_r) / (mass_l - mass_r)
    # the side that the contact wave leaves behind
    upwind = s_m >= 0
    rho, u, v, p = torch.where(upwind[:, None], left, right).unbind(1)
    s, mass = torch.where(upwind, s_l, s_r), torch.where(upwind, mass_l, mass_r)
    # a wave that already moves away from the face leaves the flux of its side as it is
    beyond = torch.where(upwind, s.clamp(max=0), s.clamp(min=0))
    energy = p / (GAMMA - 1) + rho * (u * u + v * v) / 2
    momentum, density = rho * u, mass / (s - s_m)
    star_energy = density * (energy / rho + (s_m - u) * (s_m + p / mass))
    return torch.stack(
        [
            momentum + beyond * (density - rho),
            momentum * u + p + beyond * (density * s_m - momentum),
            momentum * v + beyond * (density - rho) * v,
            (energy + p) * u + beyond * (star_energy - energy),
        ],
        1,
    )
