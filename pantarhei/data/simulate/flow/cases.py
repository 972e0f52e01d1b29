"""Cases of a flow problem: operating parameters in SI units, in subsets that vary one thing each.

A :class:`Problem` is a name, its parameters, a grid of them for each subset (boundary values
``bc``, fluid properties ``prop``, geometry ``geo``, or any others) and a solver. Yours is made in
the same way as the four that come along, and :func:`generate` turns either into trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError, nearest

Parameters = Mapping[str, float]


@dataclass(frozen=True)
class Case:
    """One case: its problem's name, its subset, its number there and its parameters in SI units."""

    problem: str
    subset: str
    number: int
    parameters: Parameters

    @property
    def name(self) -> str:
        """``subset/number``, as 'bc/0003'."""
        return f"{self.subset}/{self.number:04d}"


@dataclass(frozen=True)
class Solution:
    """What a solver returns for its cases.

    ``states`` (case, frame, channel, H, W), the first at t = 0 or after the transient; ``mask``
    (case, H, W), 1 in the fluid; ``interval`` (case,) s between frames; ``dx`` and ``dy`` (case,)
    m between the cells stored. Rows run along y, row 0 at the bottom.
    """

    states: Tensor
    mask: Tensor
    interval: Tensor
    dx: Tensor
    dy: Tensor


Solve = Callable[..., Solution]
"""``solve(cases, cells=, frames=, device=)`` runs cases of one problem together."""


@dataclass(frozen=True)
class Problem:
    """A problem: ``grids[subset]`` lists the parameter sets, ``solve`` runs cases of them.

    ``derived`` names dimensionless numbers computed from a parameter set.

    >>> drag = Problem("drag", ("velocity",), {"bc": [{"velocity": v} for v in (1.0, 2.0, 3.0)]},
    ...                solve=lambda cases, **options: None)
    >>> [case.parameters["velocity"] for case in drag.cases(bc=2)]
    [1.0, 3.0]
    """

    name: str
    parameters: tuple[str, ...]
    grids: Mapping[str, Sequence[Parameters]]
    solve: Solve
    derived: Mapping[str, Callable[[Parameters], float]] = field(default_factory=dict)
    channels: tuple[str, ...] = ("u", "v")

    def __post_init__(self) -> None:
        for subset, grid in self.grids.items():
            for values in grid:
                if set(values) != set(self.parameters):
                    raise RequestError(
                        f"A case of subset '{subset}' of '{self.name}' has the parameters "
                        f"{', '.join(values)} where {', '.join(self.parameters)} are needed."
                    )
                if not all(math.isfinite(value) for value in values.values()):
                    raise RequestError(
                        f"A case of subset '{subset}' has a value that is not finite."
                    )

    def cases(self, **counts: int | None) -> list[Case]:
        """Return so many cases of each subset named, spread evenly over its grid; None: all.

        Without a name, all cases of all subsets.
        """
        chosen = []
        for subset, wanted in (counts or dict.fromkeys(self.grids)).items():
            if subset not in self.grids:
                raise RequestError(
                    f"'{self.name}' has no subset '{subset}': choose one of "
                    f"{', '.join(self.grids)}.{nearest(subset, self.grids)}"
                )
            grid = self.grids[subset]
            count = len(grid) if wanted is None else wanted
            if not 0 <= count <= len(grid):
                raise RequestError(
                    f"Subset '{subset}' of '{self.name}' has {len(grid)} cases, not {count}."
                )
            rows = [0] if count == 1 else np.linspace(0, len(grid) - 1, count).round().astype(int)
            chosen += [Case(self.name, subset, int(i), grid[i]) for i in rows]
        return chosen


def generate(
    problem: Problem,
    cases: Sequence[Case],
    *,
    cells: int = 64,
    frames: int = 60,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Trajectories:
    """Solve the cases and return them as trajectories, their masks and parameters with them.

    ``parameters`` holds the problem's own, then its derived numbers, then ``dx``, ``dy`` (m),
    ``interval`` (s between frames) and ``subset``, a number into ``settings["subset_names"]``. The
    trajectories' ``dt`` is 1: one frame. ``options`` go to the solver.

    Raises :class:`RequestError` where there is no case, or one's flow is not finite.
    """
    if not cases:
        raise RequestError(f"There is no case of '{problem.name}' to solve: ask for one or more.")
    found = problem.solve(cases, cells=cells, frames=frames, device=device, **options)
    wanted = (len(cases), frames, len(problem.channels))
    if found.states.dim() != 5 or found.states.shape[:3] != wanted:
        raise RequestError(
            f"The solver of '{problem.name}' returned states of shape {tuple(found.states.shape)}: "
            f"{wanted} and the grid's rows and columns are wanted."
        )
    bad = ~torch.isfinite(found.states).flatten(1).all(1)
    if bad.any():
        names = ", ".join(c.name for c, wrong in zip(cases, bad.tolist(), strict=True) if wrong)
        raise RequestError(
            f"The flow of {problem.name} became infinite in {names}: take more cells, or a lower "
            "Reynolds number."
        )
    own = [[c.parameters[name] for name in problem.parameters] for c in cases]
    derived = [[number(c.parameters) for number in problem.derived.values()] for c in cases]
    grid = torch.stack([found.dx, found.dy, found.interval], 1).double().cpu().numpy()
    subsets = list(problem.grids)
    which = np.array([[subsets.index(c.subset)] for c in cases])
    return Trajectories.of(
        found.states.float().cpu().numpy(),
        channels=problem.channels,
        parameters=np.concatenate(
            [np.array(own), np.array(derived).reshape(len(own), -1), grid, which], 1
        ),
        parameter_names=(*problem.parameters, *problem.derived, "dx", "dy", "interval", "subset"),
        mask=found.mask.cpu().numpy(),
        name=problem.name,
        settings={
            "subset_names": subsets,
            "derived": list(problem.derived),
            "cells": cells,
            **{k: v for k, v in options.items() if isinstance(v, int | float | str)},
        },
    )
