"""Networks that are told what distinguishes the cases: parameters (a viscosity, a speed) and masks.

Three ways, by what the network takes: SineNet's blocks are scaled and shifted by embedded scalars,
and a mask is one of its channels; CFDBench's DeepONets have parameters and mask as arguments; any
other network gets them as further channels, a constant plane for each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.systems.forecaster import build
from pantarhei.systems.parameters import ParameterScale

SCALARS, POINTS = ("sinenet",), ("auto-ffn", "auto-deeponet", "auto-edeeponet", "auto-deeponet-cnn")


class Told(nn.Module):
    """(B, in_ch, *space), parameters (B, P) and mask (B, *space), where told, to (B, C, *space).

    Args:
        net: The network's name in :data:`pantarhei.systems.forecaster.MODELS`, or one of
            :data:`POINTS`.
        columns: Which of the parameters it sees; none unless given.
        mask: Whether it is told a mask, 1 in the fluid.
        as_channels: Tell a SineNet by channels, too (its U-Net has no other way in common use).
        arguments: The network's own, without what it is told.

    ``scale`` standardises the parameters: set it to :meth:`ParameterScale.of` the training cases.

    >>> net = Told("fno", columns=[1], mask=True, in_ch=2, out_ch=2, width=4, modes=3)
    >>> net(torch.zeros(3, 2, 8, 8), torch.zeros(3, 2), torch.ones(3, 8, 8)).shape
    torch.Size([3, 2, 8, 8])
    """

    def __init__(
        self,
        net: str,
        columns: Sequence[int] = (),
        mask: bool = False,
        as_channels: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.columns, self.mask = [int(column) for column in columns], mask
        told = len(self.columns)
        self.arguments = {
            "net": net, "columns": self.columns, "mask": mask, "as_channels": as_channels,
            **arguments,
        }  # fmt: skip
        self.way = "points" if net in POINTS else "channels"
        if net in SCALARS and not as_channels:
            self.way = "scalars"
        if self.way == "points":
            from pantarhei.systems.flow import model

            self.net: Any = model(net, parameters=told, **arguments)
        elif self.way == "scalars":
            self.net = build(net, conditions=told, mask=mask, **arguments)
        else:
            inputs = arguments.pop("in_ch") + told + mask
            self.net = build(net, in_ch=inputs, **arguments)
        self.scale = ParameterScale(torch.zeros(told), torch.ones(told))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        """Return the next fields; ``given`` are the parameters (B, all of them) and the mask."""
        if len(given) != bool(self.columns) + self.mask:
            raise RequestError(
                f"This network is told {len(self.columns)} parameters and "
                f"{'a' if self.mask else 'no'} mask, and got {len(given)} of them."
            )
        omega = self.scale(given[0][:, self.columns]) if self.columns else x.new_zeros(len(x), 0)
        omega = omega.to(x.dtype)
        mask = given[-1].to(x.dtype).expand(len(x), *x.shape[2:])[:, None] if self.mask else None
        if self.way == "scalars":
            known = omega if self.columns else None
            out: Tensor = self.net(x, known, None if mask is None else mask[:, 0])
        elif self.way == "points":
            out = self.net.step(x, omega, mask)
        else:
            planes = omega.view(*omega.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
            out = self.net(torch.cat([x, planes] if mask is None else [x, planes, mask], 1))
        return out
