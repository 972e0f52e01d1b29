r"""Pure translation: a random band-limited field that moves by some cells each step and decays.

.. math:: u(x, t + 1) = \gamma\, u(x - s, t), \qquad
          \hat u_k(t) = (\gamma e^{-i k \cdot s})^t\, \hat u_k(0)

on a periodic square. The exact answer is known for any shift, whole or not: the simplest problem on
which a model that cannot move things far is found out.
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


@dataclass(frozen=True)
class Translation:
    """Fields on ``size`` x ``size`` cells of length 1; a step moves by (``shift_y``, ``shift_x``).

    ``waves`` is the largest wavenumber, in waves per domain; ``decay`` the factor per step; fields
    start with standard deviation 1. The channel is ``u``, axes are (y, x).

    >>> Translation(size=16, frames=3).simulate([0, 1]).shape
    (2, 3, 1, 16, 16)
    """

    size: int = 32
    shift_x: float = 4.0
    shift_y: float = 0.0
    decay: float = 0.98
    waves: int = 4
    frames: int = 14

    def __post_init__(self) -> None:
        if self.size < 4 or self.frames < 1 or not 1 <= self.waves < self.size / 2:
            raise RequestError(
                f"size={self.size}, frames={self.frames}, waves={self.waves}: at least 4 cells and "
                "1 frame, and 1 wave to fewer than half the cells."
            )

    def initial(self, cases: Sequence[int], seed: int = 0) -> Tensor:
        """Return the spectra of the fields at time 0, (B, n, n/2 + 1), complex."""
        n = self.size
        noise = torch.stack(
            [torch.randn(n, n, generator=g, dtype=torch.float64) for g in generators(seed, cases)]
        )
        spectrum = torch.fft.rfft2(noise)
        ky, kx = self._wavenumbers()
        radius = torch.hypot(ky, kx)
        spectrum = spectrum * ((radius > 0) & (radius <= self.waves))
        return spectrum / torch.fft.irfft2(spectrum, s=(n, n)).std((1, 2), False)[:, None, None]

    def states(self, spectra: Tensor, steps: Tensor) -> Tensor:
        """Return the fields after the steps named, (B, T, n, n): the closed form."""
        ky, kx = (k.to(spectra.device) for k in self._wavenumbers())
        phase = -2 * math.pi / self.size * (ky * self.shift_y + kx * self.shift_x)
        t = steps.to(spectra.device, torch.float64)[:, None, None]
        factor = self.decay**t * torch.exp(1j * phase * t)
        return torch.fft.irfft2(spectra[:, None] * factor, s=(self.size, self.size))

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Trajectories:
        """Return trajectories of the cases named; the same case and seed give the same states."""
        spectra = self.initial(cases, seed).to(device)
        states = self.states(spectra, torch.arange(self.frames))
        return simulated(self, states[:, :, None], ("u",), spacing=(1.0, 1.0))

    def _wavenumbers(self) -> tuple[Tensor, Tensor]:
        n = self.size
        ky = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)[:, None]
        return ky, torch.fft.rfftfreq(n, 1 / n, dtype=torch.float64)[None]
