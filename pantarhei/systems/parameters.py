"""Operating parameters of cases (a viscosity, a speed, a length), standardised for a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from pantarhei.errors import RequestError

# CFDBench's constants, from its cavity: (value - shift) / scale
_PUBLISHED = {
    "density": (5.0, 4.0),
    "viscosity": (0.00238, 0.005),
    **dict.fromkeys(("velocity", "vel_top", "vel_in"), (25.0, 50.0)),
}


class ParameterScale(nn.Module):
    r"""Standardise operating parameters: :math:`(\Omega - m)/s`, (B, P) to (B, P).

    >>> scale = ParameterScale.of([[1.0, 7.0], [3.0, 7.0]])
    >>> scale(torch.tensor([[2.0, 7.0]])).tolist()
    [[0.0, 0.0]]
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    @classmethod
    def of(cls, table: ArrayLike) -> ParameterScale:
        """Measure mean and deviation of the training cases (case, P); a constant has scale 1."""
        values = torch.as_tensor(np.asarray(table, np.float64))
        if values.dim() != 2 or len(values) == 0 or not bool(torch.isfinite(values).all()):
            raise RequestError(
                f"Parameters of shape {tuple(values.shape)} cannot be standardised: give finite "
                "ones of one training case or more, (case, P)."
            )
        mean, deviation = values.mean(0), values.std(0, correction=0)
        constant = deviation <= 1e-9 * mean.abs()
        return cls(mean, torch.where(constant, 1.0, deviation))

    @classmethod
    def published(cls, names: Sequence[str]) -> ParameterScale:
        """Return CFDBench's constants: made for the cavity, used there for every problem.

        Density (rho - 5)/4, viscosity (mu - .00238)/.005, velocity v/50 - .5; lengths as they are.
        """
        pairs = torch.tensor([_PUBLISHED.get(name, (0.0, 1.0)) for name in names])
        return cls(pairs[:, 0], pairs[:, 1])

    def forward(self, table: Tensor) -> Tensor:
        """Return the standardised parameters."""
        return (table - self.mean) / self.scale
