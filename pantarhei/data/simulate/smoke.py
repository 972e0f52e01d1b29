r"""Smoke that rises in a closed box: incompressible Navier-Stokes with buoyancy.

.. math:: \partial_t u + (u \cdot \nabla) u = -\nabla p + \nu \nabla^2 u + b\, s\, e_y, \quad
          \nabla \cdot u = 0, \qquad \partial_t s + u \cdot \nabla s = 0

in a square of side 32 whose walls nothing passes, on a staggered (MAC) grid: smoke in the cells,
velocities on the faces. The steps are those of the "INS" set of SineNet (arXiv 2403.19507), which
PDEArena made with PhiFlow:

1. smoke is carried along: :math:`s(x) \leftarrow s(x - \Delta t\, u(x))`, bilinear, and beyond the
   walls as at the walls;
2. so is each velocity component, zero beyond the walls, and buoyancy pushes the new smoke upwards;
3. explicit diffusion of velocity, zero beyond the walls (in as many sub-steps as are stable);
4. the flow through the walls is set to zero and the pressure makes the rest free of divergence: a
   Poisson problem with Neumann walls, which the DCT-II diagonalises with the eigenvalues
   :math:`-(2 - 2\cos(\pi k/n))/\Delta x^2` along each axis.

Axes are (y, x), y upwards. First order in time and, through the bilinear interpolation, in space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.data.simulate import generators, simulated
from pantarhei.data.simulate.poisson import Laplacian
from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError

_LENGTH = 32.0
State = tuple[Tensor, Tensor, Tensor]
"""Smoke (B, n, n), x-velocity on its faces (B, n, n + 1), y-velocity (B, n + 1, n)."""


@dataclass(frozen=True)
class Smoke:
    """``size`` x ``size`` cells; the defaults are the set's own but for the grid (128 there).

    ``buoyancy_low`` and ``buoyancy_high``: each case draws its buoyancy uniformly between them (0.2
    and 0.5 in the conditional set). After ``spin_up`` steps of ``dt`` a frame is kept every
    ``every`` steps. Channels are ``smoke``, ``vx``, ``vy``, velocities averaged to the cells.

    >>> Smoke(size=16, frames=2).simulate([0]).shape
    (1, 2, 3, 16, 16)
    """

    size: int = 64
    dt: float = 1.5
    viscosity: float = 0.01
    buoyancy_low: float = 0.5
    buoyancy_high: float = 0.5
    spin_up: int = 8
    every: int = 4
    frames: int = 14

    def __post_init__(self) -> None:
        if self.size < 8 or self.frames < 1 or self.every < 1 or self.spin_up < 0:
            raise RequestError(
                f"size={self.size}, frames={self.frames}, every={self.every}, spin_up="
                f"{self.spin_up}: at least 8 cells, 1 frame, every step, and no negative spin-up."
            )
        if not (self.dt > 0 and self.viscosity >= 0 and self.buoyancy_low <= self.buoyancy_high):
            raise RequestError(
                f"dt={self.dt}, viscosity={self.viscosity}, buoyancy {self.buoyancy_low} to "
                f"{self.buoyancy_high}: a positive step, no negative viscosity, low before high."
            )

    @property
    def dx(self) -> float:
        """The side of a cell."""
        return _LENGTH / self.size

    def initial(self, cases: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
        r"""Return the smoke at the start, (B, n, n), and the buoyancies, (B,).

        :math:`|g|`, where g is white noise with the spectrum :math:`\kappa^{-12}` for
        :math:`\kappa^2 > 0.1`, :math:`\kappa` = 11/32 times the waves per domain, scaled to mean 0
        and standard deviation 1 (PhiFlow's ``Noise`` of smoothness 6 and scale 11).
        """
        n = self.size
        waves = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
        square = (waves[:, None] ** 2 + waves**2) * (11 / 32) ** 2
        weight = torch.where(square > 0.1, square.clamp(min=0.1) ** -6, 0.0)
        noise, buoyancy = [], []
        for generator in generators(seed, cases):
            noise.append(torch.randn(2, n, n, generator=generator, dtype=torch.float64))
            share = torch.rand((), generator=generator, dtype=torch.float64)
            buoyancy.append(self.buoyancy_low + (self.buoyancy_high - self.buoyancy_low) * share)
        real, imaginary = torch.stack(noise, 1)
        field = torch.fft.ifft2(weight * torch.complex(real, imaginary)).real
        field = field - field.mean((1, 2), keepdim=True)
        return (field / field.std((1, 2), False, keepdim=True)).abs(), torch.stack(buoyancy)

    def step(self, state: State, buoyancy: Tensor) -> State:
        """Advance by ``dt``."""
        s, u, v = state
        reach = self.dt / self.dx
        across = _to_centres(v, 1), _to_centres(u, 2)
        s = _carried(s, across[0] * reach, across[1] * reach, "border")
        # the other component on a face is the mean of the four around it
        v_on_u = F.pad((across[0][:, :, 1:] + across[0][:, :, :-1]) / 2, (1, 1))
        u_on_v = F.pad((across[1][:, 1:] + across[1][:, :-1]) / 2, (0, 0, 1, 1))
        u, v = (
            _carried(u, v_on_u * reach, u * reach, "zeros"),
            _carried(v, v * reach, u_on_v * reach, "zeros"),
        )
        v = v + F.pad(self.dt * buoyancy.view(-1, 1, 1) * (s[:, 1:] + s[:, :-1]) / 2, (0, 0, 1, 1))
        u, v = self.diffused(u), self.diffused(v)
        return s, *self.projected(u, v)

    def diffused(self, q: Tensor) -> Tensor:
        """Return the velocity component after diffusion over ``dt``, zero beyond the walls."""
        number = self.dt * self.viscosity / self.dx**2
        parts = max(1, math.ceil(4 * number))  # stable up to a quarter
        for _ in range(parts):
            around = F.pad(q, (1, 1, 1, 1))
            neighbours = around[:, 2:, 1:-1] + around[:, :-2, 1:-1]
            neighbours = neighbours + around[:, 1:-1, 2:] + around[:, 1:-1, :-2]
            q = q + number / parts * (neighbours - 4 * q)
        return q

    def projected(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest velocities without divergence and without flow through the walls."""
        # in float64: differences of a pressure in float32 leave a divergence of 1e-3 on 128 cells
        kind = u.dtype
        u, v = F.pad(u.double()[:, :, 1:-1], (1, 1)), F.pad(v.double()[:, 1:-1], (0, 0, 1, 1))
        dx = u.new_tensor([self.dx])
        p = Laplacian((self.size, self.size), dx, dx).solve(divergence(u, v, self.dx))
        u = u - F.pad((p[:, :, 1:] - p[:, :, :-1]) / self.dx, (1, 1))
        v = v - F.pad((p[:, 1:] - p[:, :-1]) / self.dx, (0, 0, 1, 1))
        return u.to(kind), v.to(kind)

    def simulate(
        self,
        cases: Sequence[int],
        seed: int = 0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Trajectories:
        """Return trajectories of the cases named; the same case and seed give the same states."""
        smoke, buoyancy = self.initial(cases, seed)
        b, n = buoyancy.to(device, dtype), self.size
        s = smoke.to(device, dtype)
        state = (s, s.new_zeros(len(s), n, n + 1), s.new_zeros(len(s), n + 1, n))
        frames = []
        for step in range(1, self.spin_up + self.every * self.frames + 1):
            state = self.step(state, b)
            if step > self.spin_up and (step - self.spin_up) % self.every == 0:
                s, u, v = state
                frames.append(torch.stack([s, _to_centres(u, 2), _to_centres(v, 1)], 1))
        return simulated(
            self,
            torch.stack(frames, 1),
            ("smoke", "vx", "vy"),
            dt=self.dt * self.every,
            spacing=(self.dx, self.dx),
            parameters=buoyancy.numpy(),
            parameter_names=("buoyancy",),
        )


def divergence(u: Tensor, v: Tensor, dx: float) -> Tensor:
    """Return the flow out of each cell over its area, (B, n, n)."""
    return (u[:, :, 1:] - u[:, :, :-1] + v[:, 1:] - v[:, :-1]) / dx


def _to_centres(face: Tensor, dim: int) -> Tensor:
    n = face.shape[dim] - 1
    return (face.narrow(dim, 0, n) + face.narrow(dim, 1, n)) / 2


def _carried(q: Tensor, up: Tensor, right: Tensor, outside: str) -> Tensor:
    """Return q at the points that lie (``up``, ``right``) cells before its own, bilinear."""
    rows, columns = q.shape[1:]
    y = torch.arange(rows, dtype=q.dtype, device=q.device)[:, None] - up
    x = torch.arange(columns, dtype=q.dtype, device=q.device) - right
    grid = torch.stack([2 * x / (columns - 1) - 1, 2 * y / (rows - 1) - 1], -1)
    return F.grid_sample(q[:, None], grid, "bilinear", outside, align_corners=True)[:, 0]
