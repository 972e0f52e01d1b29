"""Neural flow solvers and the benchmark that asks what they do for conditions not seen.

Nine models of CFDBench (arXiv 2310.05963) behind two calls: ``predict(points, t, omega)`` and
``step(field, omega, mask)``.

>>> import torch
>>> net = model("unet", parameters=5)
>>> net.step(torch.zeros(2, 2, 32, 32), torch.zeros(2, 5), torch.ones(2, 1, 32, 32)).shape
torch.Size([2, 2, 32, 32])
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pantarhei.errors import RequestError, nearest
from pantarhei.systems.flow.image_models import FNO, ImageModel, ResNet, UNet
from pantarhei.systems.flow.point_models import (
    FFN,
    AutoDeepONet,
    AutoDeepONetCNN,
    AutoEDeepONet,
    AutoFFN,
    DeepONet,
)

POINT_MODELS: dict[str, type[nn.Module]] = {"ffn": FFN, "deeponet": DeepONet}
STEP_AT_POINTS: dict[str, type[nn.Module]] = {
    "auto-ffn": AutoFFN,
    "auto-deeponet": AutoDeepONet,
    "auto-edeeponet": AutoEDeepONet,
    "auto-deeponet-cnn": AutoDeepONetCNN,
}
IMAGE_MODELS: dict[str, type[nn.Module]] = {"resnet": ResNet, "unet": UNet, "fno": FNO}
MODELS = {**POINT_MODELS, **STEP_AT_POINTS, **IMAGE_MODELS}

__all__ = [
    "FFN",
    "FNO",
    "IMAGE_MODELS",
    "MODELS",
    "POINT_MODELS",
    "STEP_AT_POINTS",
    "AutoDeepONet",
    "AutoDeepONetCNN",
    "AutoEDeepONet",
    "AutoFFN",
    "DeepONet",
    "ImageModel",
    "ResNet",
    "UNet",
    "model",
]


def model(
    name: str, parameters: int, grid: tuple[int, int] = (64, 64), channels: int = 2, **options: Any
) -> Any:
    """Return a model by its name, for ``parameters`` operating parameters and u (and v).

    The image models take any grid; the others are made for one. An unknown name raises
    :class:`RequestError`.
    """
    if name not in MODELS:
        raise RequestError(
            f"Unknown flow model '{name}': choose one of {', '.join(MODELS)}."
            f"{nearest(name, MODELS)}"
        )
    made = {"parameters": parameters, "channels": channels, **options}
    if name not in IMAGE_MODELS:
        made["grid"] = (grid[0], grid[1])
    net: Any = MODELS[name](**made)
    net.arguments = {"name": name, **made}  # what a saved one is made of again
    return net
