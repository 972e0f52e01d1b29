r"""U-Net-Mod: the wide U-Net with residual blocks that PDEArena (arXiv 2209.15616) compares with.

Pre-norm blocks :math:`x + \mathrm{conv}(\sigma(N(\mathrm{conv}(\sigma(N(x))))))` of 3-wide
convolutions, GroupNorm of one group and GELU, with a 1-wide convolution around where the number of
channels changes. Two of them at each of four resolutions on the way down, of C, 2C, 4C and 16C
channels, 3-wide convolutions of stride 2 in between; two in the middle; three at each resolution on
the way up, each of which takes one of the way down's outputs beside what it gets, transposed 4-wide
convolutions in between. It pads with zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.systems._axes import CONVOLUTION, check_sizes
from pantarhei.systems.sinenet import Border, padded

_BACK: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class UNetMod(nn.Module):
    """(B, in_ch, *space) to (B, out_ch, *space).

    ``width`` is C, ``mults`` by how much the channels grow at each resolution, ``blocks`` how many
    there are at each on the way down. A grid that the resolutions do not divide is filled up and
    the result cropped.

    >>> net = UNetMod(4, 2, width=8)
    >>> net.widths
    [8, 16, 32, 128]
    >>> net(torch.zeros(1, 4, 20, 16)).shape
    torch.Size([1, 2, 20, 16])
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        width: int = 64,
        mults: Sequence[int] = (1, 2, 2, 4),
        blocks: int = 2,
        space: int = 2,
    ) -> None:
        super().__init__()
        check_sizes("A U-Net-Mod", space, in_ch, out_ch, width, blocks, len(mults), *mults)
        self.arguments = {"in_ch": in_ch, "out_ch": out_ch, "width": width, "mults": list(mults),
                          "blocks": blocks, "space": space}  # fmt: skip
        self.widths = [width * n for n in itertools.accumulate(mults, lambda a, b: a * b)]
        convolution, last = CONVOLUTION[space], len(mults) - 1
        self.lift = convolution(in_ch, width, 3, padding=1)
        down: list[nn.Module] = []
        kept = [width]  # channels of what the way up takes
        for level, wide in enumerate(self.widths):
            for _ in range(blocks):
                down.append(_Residual(kept[-1], wide, space))
                kept.append(wide)
            if level < last:
                down.append(convolution(wide, wide, 3, stride=2, padding=1))
                kept.append(wide)
        self.down = nn.ModuleList(down)
        self.middle = nn.Sequential(*(_Residual(kept[-1], kept[-1], space) for _ in range(2)))
        up: list[nn.Module] = []
        for level in range(last, -1, -1):
            wide = self.widths[level]
            narrow = self.widths[level - 1] if level else width
            for out in (*(wide,) * blocks, narrow):
                up.append(_Residual(wide + kept.pop(), out, space))
            if level:
                up.append(_BACK[space](narrow, narrow, 4, stride=2, padding=1))
        self.up = nn.ModuleList(up)
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.project = convolution(width, out_ch, 3, padding=1)
        outside: Border = "zeros"
        self.borders = (outside,) * space
        self.multiple = 2**last

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_ch, *space)."""
        size = x.shape[2:]
        x = self.lift(padded(x, self.multiple, self.borders))
        kept = [x]
        for part in self.down:
            x = part(x)
            kept.append(x)
        x = self.middle(x)
        for part in self.up:
            x = part(torch.cat([x, kept.pop()], 1) if isinstance(part, _Residual) else x)
        return self.project(F.gelu(self.norm(x)))[(..., *(slice(0, n) for n in size))]


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, space: int) -> None:
        super().__init__()
        convolution = CONVOLUTION[space]
        self.norm1, self.norm2 = nn.GroupNorm(1, inputs), nn.GroupNorm(1, outputs)
        self.conv1 = convolution(inputs, outputs, 3, padding=1)
        self.conv2 = convolution(outputs, outputs, 3, padding=1)
        self.around = nn.Identity() if inputs == outputs else convolution(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.gelu(self.norm1(x)))
        return self.conv2(F.gelu(self.norm2(h))) + self.around(x)
