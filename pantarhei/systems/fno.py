r"""Fourier neural operators on periodic or padded grids of any number of axes.

FNO (arXiv 2010.08895): lift by a pointwise map, then layers

.. math:: v \leftarrow \mathrm{GELU}\big(\mathcal F^{-1}(R \cdot \mathcal F v) + W v\big),

R a complex matrix for each of the lowest wavenumbers and zero for the others, W pointwise; then two
pointwise maps. F-FNO (arXiv 2111.13802) transforms one axis at a time and sums what comes back,
:math:`v \leftarrow v + \mathrm{MLP}(\sum_i \mathcal F_i^{-1}(R_i \cdot \mathcal F_i v))`: far fewer
weights per layer, and deep networks.

Written here, where ``neuraloperator`` has an FNO too: importing that one asks for tensorly,
tensorly-torch and (to install) wandb, and these layers are thirty lines. Its own, another network,
is :class:`pantarhei.systems.neuralop_fno.NeuralopFNO`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.systems._axes import CONVOLUTION, check_sizes


class FNO(nn.Module):
    """(B, in_ch, *space) to (B, out_ch, *space); no residual from input to output.

    ``modes`` lowest wavenumbers along each axis (of both signs but on the last one), ``width``
    channels, ``layers`` Fourier layers, ``hidden`` channels of the map at the end. A grid with
    fewer wavenumbers than ``modes`` uses those that it has.

    >>> net = FNO(10, 2, width=32, modes=12)
    >>> sum(p.numel() for p in net.parameters())
    1188706
    >>> net(torch.zeros(1, 10, 32, 24)).shape
    torch.Size([1, 2, 32, 24])
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        width: int = 32,
        modes: int = 12,
        layers: int = 4,
        hidden: int = 128,
        space: int = 2,
    ) -> None:
        super().__init__()
        check_sizes("A Fourier operator", space, in_ch, out_ch, width, modes, layers, hidden)
        self.arguments = {"in_ch": in_ch, "out_ch": out_ch, "width": width, "modes": modes,
                          "layers": layers, "hidden": hidden, "space": space}  # fmt: skip
        convolution = CONVOLUTION[space]
        self.lift = convolution(in_ch, width, 1)
        self.spectral = nn.ModuleList(SpectralConv(width, modes, space) for _ in range(layers))
        self.pointwise = nn.ModuleList(convolution(width, width, 1) for _ in range(layers))
        self.project = nn.Sequential(
            convolution(width, hidden, 1), nn.GELU(), convolution(hidden, out_ch, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_ch, *space)."""
        x = self.lift(x)
        for spectral, pointwise in zip(self.spectral, self.pointwise, strict=True):
            x = F.gelu(spectral(x) + pointwise(x))
        return self.project(x)


class SpectralConv(nn.Module):
    """Multiply the lowest wavenumbers by a complex matrix each, in float32 whatever the autocast.

    Weights (2^(space - 1), width, width, modes, ...): one block for each choice of signs.
    """

    def __init__(self, width: int, modes: int, space: int) -> None:
        super().__init__()
        self.modes, self.space = modes, space
        shape = (2 ** (space - 1), width, width, *(modes,) * space)
        self.weights = nn.Parameter(torch.rand(shape, dtype=torch.cfloat) / width**2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, *space)."""
        kind, size = x.dtype, x.shape[2:]
        axes = tuple(range(2, x.dim()))
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfftn(x.float(), dim=axes)
            out = torch.zeros_like(spectrum)
            most = [min(self.modes, (n + 1) // 2) for n in spectrum.shape[2:-1]]
            last = slice(0, min(self.modes, spectrum.shape[-1]))
            for block, signs in enumerate(itertools.product((1, -1), repeat=self.space - 1)):
                low = [
                    slice(0, m) if sign > 0 else slice(-m, None)
                    for sign, m in zip(signs, most, strict=True)
                ]
                where: tuple[Any, ...] = (..., *low, last)
                used: tuple[Any, ...] = (block, ..., *(slice(0, m) for m in most), last)
                part = torch.einsum("bi...,io...->bo...", spectrum[where], self.weights[used])
                out[where] += part
            return torch.fft.irfftn(out, s=size, dim=axes).to(kind)


class FactorizedFNO(nn.Module):
    """(B, in_ch, *space) to (B, out_ch, *space), one axis transformed at a time.

    Weights of ``layers`` layers are not shared, nor normalised (the authors' are); the pointwise
    map of a layer has ``factor`` times ``width`` hidden channels.

    >>> FactorizedFNO(3, 1, width=8, modes=4, layers=2)(torch.zeros(1, 3, 16, 12)).shape
    torch.Size([1, 1, 16, 12])
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        width: int = 96,
        modes: int = 32,
        layers: int = 24,
        factor: int = 4,
        space: int = 2,
    ) -> None:
        super().__init__()
        check_sizes("A Fourier operator", space, in_ch, out_ch, width, modes, layers, factor)
        self.arguments = {"in_ch": in_ch, "out_ch": out_ch, "width": width, "modes": modes,
                          "layers": layers, "factor": factor, "space": space}  # fmt: skip
        convolution = CONVOLUTION[space]
        self.modes, self.space = modes, space
        self.lift = convolution(in_ch, width, 1)
        start = 1 / (width * math.sqrt(modes))
        self.weights = nn.ParameterList(
            start * torch.randn(space, width, width, modes, dtype=torch.cfloat)
            for _ in range(layers)
        )
        self.pointwise = nn.ModuleList(
            nn.Sequential(
                convolution(width, factor * width, 1),
                nn.GELU(),
                convolution(factor * width, width, 1),
            )
            for _ in range(layers)
        )
        self.project = nn.Sequential(
            convolution(width, 128, 1), nn.GELU(), convolution(128, out_ch, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_ch, *space)."""
        x = self.lift(x)
        for weights, pointwise in zip(self.weights, self.pointwise, strict=True):
            x = x + pointwise(self._spectral(x, weights))
        return self.project(x)

    def _spectral(self, x: Tensor, weights: Tensor) -> Tensor:
        total: Tensor | None = None
        with torch.autocast(x.device.type, enabled=False):
            for axis in range(self.space):
                moved = x.float().movedim(2 + axis, -1)
                spectrum = torch.fft.rfft(moved)
                most = min(self.modes, spectrum.shape[-1])
                low = torch.einsum(
                    "bi...k,iok->bo...k", spectrum[..., :most], weights[axis][..., :most]
                )
                back = torch.fft.irfft(low, n=moved.shape[-1]).movedim(-1, 2 + axis)
                total = back if total is None else total + back
        assert total is not None
        return total.to(x.dtype)
