"""Cases as columns of numbers, grids of them, and groups that run together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pantarhei.data.simulate.flow.cases import Case, Parameters

BASE = ("velocity", "density", "viscosity", "height", "width")


def reynolds(values: Parameters, length: str) -> float:
    """Return density velocity length / viscosity."""
    return values["density"] * values["velocity"] * values[length] / values["viscosity"]


def product(
    base: Parameters, keep: Callable[[Parameters], bool], **values: Sequence[float]
) -> list[Parameters]:
    """Return ``base`` with every combination of the values given that is to be kept."""
    sets = [
        {**base, **dict(zip(values, chosen, strict=True))}
        for chosen in itertools.product(*values.values())
    ]
    return [s for s in sets if keep(s)]


def even(first: float, last: float, count: int) -> list[float]:
    """Return ``count`` numbers from first to last, evenly apart."""
    return [first + (last - first) * i / (count - 1) for i in range(count)]


def columns(cases: Sequence[Case], device: str | torch.device) -> dict[str, Tensor]:
    """Return each parameter of the cases, (case,)."""
    return {
        name: torch.tensor(
            [case.parameters[name] for case in cases], dtype=torch.float64, device=device
        )
        for name in cases[0].parameters
    }


def alike(needed: Tensor, most: float = 1.5) -> list[Tensor]:
    """Group cases whose numbers of steps differ by at most a factor of ``most``."""
    groups: list[list[int]] = []
    for row in torch.argsort(needed).tolist():
        if groups and needed[row] <= most * needed[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [torch.tensor(sorted(group)) for group in groups]


def to_grid(fields: Tensor, cells: int) -> Tensor:
    """Interpolate fields at cell centres bilinearly to cells x cells of the same box."""
    if fields.shape[-2:] == (cells, cells):
        return fields
    return F.interpolate(fields, (cells, cells), mode="bilinear", align_corners=False)
