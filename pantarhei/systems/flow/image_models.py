"""Neural flow solvers that map frame to frame: ResNet, U-Net and FNO.

Models of CFDBench (arXiv 2310.05963), with the sizes of its code. ``step(field, omega, mask)``
returns the next frame (B, channels, R, C) from the present one; the parameters omega (B, P) and the
mask (B, 1, R, C), 1 in the fluid, enter as planes, and the answer is zero where the mask is. Any
grid serves. By default u and v are predicted.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pantarhei.systems.flow._layers import check_channels, check_step, planes


class _Image(nn.Module):
    def __init__(self, parameters: int, channels: int) -> None:
        super().__init__()
        self.parameters_count, self.channels = parameters, check_channels(channels)

    def step(self, field: Tensor, omega: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the next frame (B, channels, R, C); without a mask all is fluid."""
        check_step(field, omega, self.channels, self.parameters_count)
        out = self._next(field, omega, mask)
        return out if mask is None else out * mask

    def _next(self, field: Tensor, omega: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 7, padding=3, padding_mode="replicate")
        self.conv2 = nn.Conv2d(width, outputs, 7, padding=3, padding_mode="replicate")
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(outputs)
        self.around = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout, self.norm = nn.Dropout(dropout), norm
        if not norm:  # counted by the paper, and not used
            self.norm1.requires_grad_(False)
            self.norm2.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(x)
        hidden = F.gelu(self.dropout(self.norm1(hidden) if self.norm else hidden))
        out = self.conv2(hidden)
        return self.around(x) + (self.norm2(out) if self.norm else out)


class ResNet(_Image):
    """1 + 4 + 1 residual blocks of 7x7 convolutions, hidden 16, inner 64, added to the field.

    The published blocks own batch norms that they never apply; ``norm=True`` applies them. They
    count in the paper's number of parameters, and are frozen while unused.

    >>> sum(p.numel() for p in ResNet(parameters=5).parameters())
    534696
    """

    def __init__(
        self, parameters: int, channels: int = 2, dropout: float = 0.2, norm: bool = False
    ) -> None:
        super().__init__(parameters, channels)
        sizes = [channels + 1 + parameters, *[16] * 5, channels]
        self.blocks = nn.Sequential(
            *[_ResidualBlock(a, 64, b, dropout, norm) for a, b in itertools.pairwise(sizes)]
        )

    def _next(self, field: Tensor, omega: Tensor, mask: Tensor | None) -> Tensor:
        return field + self.blocks(planes(field, mask, omega))


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (inputs, outputs):
        layers += [
            nn.Conv2d(size, outputs, 3, padding=1, padding_mode="replicate"),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class UNet(_Image):
    """Double 3x3 convolutions at 5 resolutions, widths 12 to 192, added to the field.

    MaxPool down, ConvTranspose up, skips concatenated; odd sizes are padded at the edge on the way
    up. Forecast in evaluation mode: batch norm must not see the statistics of a single frame.

    >>> sum(p.numel() for p in UNet(parameters=5).parameters())
    1095038
    """

    def __init__(self, parameters: int, channels: int = 2, width: int = 12) -> None:
        super().__init__(parameters, channels)
        widths = [width * 2**level for level in range(5)]
        inputs = [channels + 1 + parameters, *widths[:-1]]
        self.down = nn.ModuleList(map(_double_conv, inputs, widths))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1])
        )
        self.merge = nn.ModuleList(_double_conv(2 * w, w) for w in reversed(widths[:-1]))
        self.out = nn.Conv2d(width, channels, 1)

    def _next(self, field: Tensor, omega: Tensor, mask: Tensor | None) -> Tensor:
        x = planes(field, mask, omega)
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            skip, x = kept.pop(), up(x)
            rows, columns = (skip.shape[i] - x.shape[i] for i in (-2, -1))
            if rows or columns:
                x = F.pad(x, (0, columns, 0, rows), mode="replicate")
            x = merge(torch.cat([skip, x], 1))
        return field + self.out(x)


class _Spectral(nn.Module):
    """Multiplies the lowest Fourier modes of both signs by complex matrices."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.positive, self.negative = (
            nn.Parameter(torch.randn(width, width, modes, modes, dtype=torch.cfloat) / width**2)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[-2:]
        # half of the rows hold negative frequencies; a small grid has fewer modes than weights
        m, n = min(self.modes, rows // 2), min(self.modes, columns // 2 + 1)
        with torch.autocast(x.device.type, enabled=False):  # no FFT of half precision
            found = torch.fft.rfft2(x.float())
            kept = torch.zeros_like(found)
            kept[..., :m, :n] = torch.einsum(
                "bixy,ioxy->boxy", found[..., :m, :n], self.positive[..., :m, :n]
            )
            kept[..., -m:, :n] = torch.einsum(
                "bixy,ioxy->boxy", found[..., -m:, :n], self.negative[..., -m:, :n]
            )
            return torch.fft.irfft2(kept, s=(rows, columns)).to(x.dtype)


class FNO(_Image):
    """Fourier neural operator: lift to 32, 4 layers of 12x12 modes beside a 1x1 bypass, GELU.

    Inputs are (field, mask, row, column in [0, 1], omega); nothing is added to the field, and
    there is no padding at the edges. ``sees_mask=False`` is what was published: the mask is
    neither an input nor applied. Complex weights count once.

    >>> sum(p.numel() for p in FNO(parameters=5).parameters())
    1188706
    """

    def __init__(
        self,
        parameters: int,
        channels: int = 2,
        width: int = 32,
        modes: int = 12,
        layers: int = 4,
        sees_mask: bool = True,
    ) -> None:
        super().__init__(parameters, channels)
        self.sees_mask = sees_mask
        self.lift = nn.Conv2d(channels + 3 + parameters, width, 1)
        self.spectral = nn.ModuleList(_Spectral(width, modes) for _ in range(layers))
        self.bypass = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))
        self.project = nn.Sequential(
            nn.Conv2d(width, 128, 1), nn.GELU(), nn.Conv2d(128, channels, 1)
        )

    def step(self, field: Tensor, omega: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the next frame; a published one ignores the mask."""
        return super().step(field, omega, mask if self.sees_mask else None)

    def _next(self, field: Tensor, omega: Tensor, mask: Tensor | None) -> Tensor:
        batch, _, rows, columns = field.shape
        row, column = (torch.linspace(0, 1, n).to(field) for n in (rows, columns))
        places = torch.stack(torch.meshgrid(row, column, indexing="ij"))
        x = self.lift(torch.cat([places.expand(batch, -1, -1, -1), planes(field, mask, omega)], 1))
        for spectral, bypass in zip(self.spectral, self.bypass, strict=True):
            x = F.gelu(spectral(x) + bypass(x))
        return self.project(x)


class ImageModel(_Image):
    """Any network of images as a flow model: (B, channels + 1 + P, R, C) to (B, channels, R, C).

    It is given (field, mask, parameters as planes); ``residual`` adds its answer to the field, and
    the mask is applied.

    >>> mine = ImageModel(nn.Conv2d(2 + 1 + 5, 2, 3, padding=1), parameters=5)
    >>> mine.step(torch.zeros(1, 2, 9, 9), torch.zeros(1, 5)).shape
    torch.Size([1, 2, 9, 9])
    """

    def __init__(
        self, net: nn.Module, parameters: int, channels: int = 2, residual: bool = True
    ) -> None:
        super().__init__(parameters, channels)
        self.net, self.residual = net, residual

    def _next(self, field: Tensor, omega: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = self.net(planes(field, mask, omega))
        return field + out if self.residual else out
