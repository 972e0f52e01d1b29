r"""Rotating shallow water on a doubly periodic plane, pseudo-spectral.

.. math:: \partial_t h = -\nabla \cdot ((H + h) u), \qquad
          \partial_t u = (\zeta + f)\, v - \partial_x B, \qquad
          \partial_t v = -(\zeta + f)\, u - \partial_y B, \qquad
          \zeta = \partial_x v - \partial_y u, \quad B = g h + |u|^2 / 2

in units with f = g = H = 1, in a box of side 16 (a radius of deformation of 1). Products are formed
on the grid and truncated to two thirds of the wavenumbers; RK4 in time; after each step the spectra
are multiplied by :math:`\exp(-36\,(\max(|k_x|, |k_y|)/(n/3))^{18})`, which dissipates what
fronts would pile up at the smallest scales.

A stand-in for the shallow-water set on the sphere of SineNet's paper (arXiv 2403.19507), for what
asks for a periodic domain; its figures are not those of the paper's set. Axes are (y, x).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.data.simulate import generators, simulated
from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError

_F, _G, _DEPTH = 1.0, 1.0, 1.0


@dataclass(frozen=True)
class ShallowWater:
    """``size`` x ``size`` points in a box of side ``length``; channels are ``h``, ``vx``, ``vy``.

    Cases start in geostrophic balance, :math:`h = f \\psi/g`, :math:`u = e_z \\times \\nabla\\psi`,
    from a random streamfunction whose spectrum is a Gaussian (sd 1) around ``waves`` waves per
    domain, with root mean square speed ``speed``. A frame is kept at the start and every ``every``
    steps of ``dt``.

    >>> ShallowWater(size=16, frames=2, every=2).simulate([0]).shape
    (1, 2, 3, 16, 16)
    """

    size: int = 64
    length: float = 16.0
    dt: float = 0.05
    speed: float = 0.3
    waves: float = 4.0
    every: int = 40
    frames: int = 21

    def __post_init__(self) -> None:
        if self.size < 8 or self.size % 2 or self.frames < 1 or self.every < 1:
            raise RequestError(
                f"size={self.size}, frames={self.frames}, every={self.every}: an even number of at "
                "least 8 points, 1 frame, and every step."
            )
        if not (self.length > 0 and self.dt > 0 and self.speed >= 0 and self.waves > 0):
            raise RequestError(
                f"length={self.length}, dt={self.dt}, speed={self.speed}, waves={self.waves}: "
                "positive numbers, and a speed that is not negative."
            )
        # RK4 is stable up to 2.8 over the frequency of the fastest wave
        fastest = math.hypot(
            _F, math.sqrt(2 * _G * _DEPTH) * 2 * math.pi * self.size / 3 / self.length
        )
        if self.dt * fastest > 2.0:
            raise RequestError(
                f"dt={self.dt} is too long for {self.size} points in {self.length:g}: choose at "
                f"most {2.0 / fastest:.2g}."
            )

    def initial(self, cases: Sequence[int], seed: int = 0) -> Tensor:
        """Return the states at the start, (B, 3, n, n): h, vx, vy."""
        n = self.size
        noise = torch.stack(
            [torch.randn(n, n, generator=g, dtype=torch.float64) for g in generators(seed, cases)]
        )
        iky, ikx, keep, _ = self._spectral(noise.device)
        radius = torch.hypot(iky.imag, ikx.imag) * self.length / (2 * math.pi)
        weight = torch.exp(-((radius - self.waves) ** 2) / 2) * keep * (radius > 0)
        psi = torch.fft.rfft2(noise) * weight
        u, v = (torch.fft.irfft2(ik * psi, s=(n, n)) for ik in (-iky, ikx))
        rms = (u**2 + v**2).mean((1, 2)).sqrt()
        scale = (self.speed / rms)[:, None, None]
        h = torch.fft.irfft2(psi, s=(n, n)) * _F / _G
        return torch.stack([h, u, v], 1) * scale[:, None]

    def step(self, spectra: Tensor) -> Tensor:
        """Advance the spectra (B, 3, n, n/2 + 1) by ``dt``."""
        dt = self.dt
        k1 = self.tendency(spectra)
        k2 = self.tendency(spectra + dt / 2 * k1)
        k3 = self.tendency(spectra + dt / 2 * k2)
        k4 = self.tendency(spectra + dt * k3)
        return self._spectral(spectra.device)[3] * (spectra + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))

    def tendency(self, spectra: Tensor) -> Tensor:
        """Return the time derivative of the spectra."""
        n = self.size
        iky, ikx, keep, _ = self._spectral(spectra.device)
        vorticity = ikx * spectra[:, 2] - iky * spectra[:, 1]
        fields = torch.cat([spectra, vorticity[:, None]], 1)
        h, u, v, spin = torch.fft.irfft2(fields, s=(n, n)).unbind(1)
        spin, depth = spin + _F, h + _DEPTH
        products = [depth * u, depth * v, spin * v, spin * u, _G * h + (u * u + v * v) / 2]
        hu, hv, spin_v, spin_u, head = torch.fft.rfft2(torch.stack(products, 1)).unbind(1)
        out = [-ikx * hu - iky * hv, spin_v - ikx * head, -spin_u - iky * head]
        return torch.stack(out, 1) * keep

    def energy(self, states: Tensor) -> Tensor:
        r"""Return :math:`\overline{(H + h)|u|^2 + g h^2} / 2` of (B, 3, n, n), (B,)."""
        h, u, v = states.unbind(1)
        return ((_DEPTH + h) * (u**2 + v**2) + _G * h**2).mean((1, 2)) / 2

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Trajectories:
        """Return trajectories of the cases named; the same case and seed give the same states."""
        spectra = torch.fft.rfft2(self.initial(cases, seed).to(device))
        frames = []
        for step in range(self.every * (self.frames - 1) + 1):
            if step:
                spectra = self.step(spectra)
            if step % self.every == 0:
                frames.append(torch.fft.irfft2(spectra, s=(self.size, self.size)).float())
        return simulated(
            self,
            torch.stack(frames, 1),
            ("h", "vx", "vy"),
            dt=self.dt * self.every,
            spacing=(self.length / self.size,) * 2,
        )

    def _spectral(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _spectral(self.size, self.length, device)


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # what is kept may be part of a graph later
def _spectral(n: int, length: float, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return i ky, i kx, what the two-thirds rule keeps, and the filter."""
    my = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)[:, None]
    mx = torch.fft.rfftfreq(n, 1 / n, dtype=torch.float64)
    largest = torch.maximum(my.abs(), mx.abs()) / (n / 3)
    keep, unit = (largest < 1).double(), 2j * math.pi / length
    parts = unit * my, unit * mx, keep, torch.exp(-36 * largest**18)
    return tuple(part.to(device) for part in parts)  # type: ignore[return-value]
