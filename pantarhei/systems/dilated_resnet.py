"""Dil-ResNet: a network at full resolution that sees far by dilated convolutions.

Stachenfeld and others, arXiv 2112.15275, as PDEArena and SineNet compare with it: a 3-wide
convolution, four residual blocks of convolutions with dilations 1, 2, 4, 8, 4, 2, 1, each followed
by GroupNorm and ReLU, and a 3-wide convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.systems._axes import CONVOLUTION, check_sizes


class DilatedResNet(nn.Module):
    """(B, in_ch, *space) to (B, out_ch, *space); ``padding`` is ``"zeros"`` or ``"circular"``.

    >>> net = DilatedResNet(12, 3)
    >>> round(sum(p.numel() for p in net.parameters()) / 1e6, 1)
    4.2
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        width: int = 128,
        blocks: int = 4,
        dilations: tuple[int, ...] = (1, 2, 4, 8, 4, 2, 1),
        padding: str = "zeros",
        space: int = 2,
    ) -> None:
        super().__init__()
        check_sizes("A Dil-ResNet", space, in_ch, out_ch, width, blocks, *dilations)
        if padding not in ("zeros", "circular"):
            raise RequestError(f"padding={padding!r}: choose zeros or circular.")
        self.arguments = {"in_ch": in_ch, "out_ch": out_ch, "width": width, "blocks": blocks,
                          "dilations": list(dilations), "padding": padding,
                          "space": space}  # fmt: skip

        def convolution(inputs: int, outputs: int, dilation: int = 1) -> nn.Module:
            return CONVOLUTION[space](inputs, outputs, 3, padding=dilation, dilation=dilation,
                                padding_mode=padding)  # fmt: skip

        self.lift = convolution(in_ch, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(
                    layer
                    for dilation in dilations
                    for layer in (
                        convolution(width, width, dilation),
                        nn.GroupNorm(1, width),
                        nn.ReLU(),
                    )
                )
            )
            for _ in range(blocks)
        )
        self.project = convolution(width, out_ch)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_ch, *space)."""
        x = self.lift(x)
        for block in self.blocks:
            x = x + block(x)
        return self.project(x)
