"""The FNO of the library ``neuraloperator``, as a model that is trained, saved and loaded here.

It is not the network of :class:`pantarhei.systems.fno.FNO`: theirs lifts with two pointwise maps
from the fields and the points' coordinates, has a perceptron over channels in every layer, and
applies its activation twice in a layer and not after the last one. Where the activation is one that
a second time changes nothing (ReLU), a configuration of theirs computes what ours does, to rounding
(a test holds this); with GELU none does.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.systems._axes import check_sizes


class NeuralopFNO(nn.Module):
    """(B, in_ch, *space) to (B, out_ch, *space): ``neuralop.models.FNO`` with its own defaults.

    ``modes`` wavenumbers of each sign along each axis, which the library calls ``n_modes`` of twice
    as many; ``width`` its ``hidden_channels``. Computes in float32 whatever the autocast. Where the
    library is missing, :class:`RequestError` says what to install.
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        width: int = 32,
        modes: int = 12,
        layers: int = 4,
        space: int = 2,
    ) -> None:
        super().__init__()
        check_sizes("A Fourier operator", space, in_ch, out_ch, width, modes, layers)
        self.arguments = {"in_ch": in_ch, "out_ch": out_ch, "width": width, "modes": modes,
                          "layers": layers, "space": space}  # fmt: skip
        self.net = neuralop().FNO(
            n_modes=(2 * modes,) * space,
            in_channels=in_ch,
            out_channels=out_ch,
            hidden_channels=width,
            n_layers=layers,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_ch, *space)."""
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.net(x.float())
        return out.to(x.dtype)

    def state_dict(  # type: ignore[override]
        self, *args: Any, **options: Any
    ) -> dict[str, Any]:
        """Return the weights alone: the library adds the arguments, which are no tensors."""
        found: dict[str, Any] = super().state_dict(*args, **options)
        found.pop("_metadata", None)
        return found


@functools.cache
def neuralop() -> Any:
    """Return ``neuralop.models``, or say in one sentence what to install."""
    try:
        return importlib.import_module("neuralop.models")
    except ImportError as error:
        raise RequestError(
            f"neuralop-fno needs the library neuraloperator ({error}): "
            "pip install 'pantarhei[neuraloperator]'."
        ) from error
