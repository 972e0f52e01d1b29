r"""Two flows of one fluid: the lid-driven cavity and the wake of a cylinder.

Parameter grids are those of CFDBench (arXiv 2310.05963, generated there with ANSYS Fluent) as far
as this solver carries them: Reynolds numbers of 50 to 2,000 (cavity) and 40 to 400 (cylinder), so
that the cell Reynolds number u dx/nu stays below 50. The paper's cavity at Re 10^4 with a frame in
100 passages of the lid is nearly steady from its second frame; here frames are a fixed part of a
passage apart, .25 l/u, and for the cylinder .2 D/u, about 25 to a period of the wake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.data.simulate.flow._grids import (
    BASE,
    alike,
    columns,
    even,
    product,
    reynolds,
    to_grid,
)
from pantarhei.data.simulate.flow.cases import Case, Parameters, Problem, Solution
from pantarhei.data.simulate.flow.mac import Flow, Side, State


def solve_cavity(
    cases: Sequence[Case],
    *,
    cells: int = 64,
    frames: int = 60,
    device: str | torch.device = "cpu",
    interval: float = 0.25,
    resolution: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Solution:
    """Run cavities from rest: the lid moves to the right at the top.

    ``interval``: between frames, in passages height/velocity. ``resolution``: the solver's cells
    along each side, interpolated to cells x cells afterwards; 0: cells.
    """
    p = columns(cases, device)
    n = resolution or cells

    def flow(rows: Tensor) -> Flow:
        q = {name: values[rows] for name, values in p.items()}
        nu = q["viscosity"] / q["density"]
        lid = Side("wall", q["velocity"])
        return Flow((n, n), q["width"] / n, q["height"] / n, nu, top=lid, dtype=dtype)

    seconds = interval * p["height"] / p["velocity"]
    everyone = torch.arange(len(cases))
    needed = _Run(flow(everyone), p["velocity"], everyone).substeps(seconds)
    states = torch.empty(len(cases), frames, 2, cells, cells)
    for rows in alike(needed):
        run = _Run(flow(rows), p["velocity"][rows], rows)
        for i, state in enumerate(run.frames(seconds[rows], frames)):
            states[rows, i] = to_grid(run.flow.centres(state), cells).float().cpu()
    mask = torch.ones(len(cases), cells, cells, dtype=torch.bool)
    return Solution(states, mask, seconds, p["width"] / cells, p["height"] / cells)


def solve_cylinder(
    cases: Sequence[Case],
    *,
    cells: int = 64,
    frames: int = 100,
    device: str | torch.device = "cpu",
    interval: float = 0.2,
    discard: float = 50.0,
    per_diameter: int = 8,
    dtype: torch.dtype = torch.float32,
) -> Solution:
    """Run wakes behind a cylinder in a channel with walls, and interpolate to cells x cells.

    The inlet at the left is uniform, the outlet convective. For 2.5 D/u a small force across the
    stream, .04 u^2/D, right behind the cylinder starts the shedding. Times are in D/u: ``interval``
    between frames, ``discard`` before the first. ``per_diameter``: the solver's cells; five times
    as many at least lie across the channel. Cells in the solid are zero.
    """
    p = columns(cases, device)
    diameter = 2 * p["radius"]
    seconds, wait = interval * diameter / p["velocity"], discard * diameter / p["velocity"]
    cell = torch.minimum(diameter, p["height"] / 5) / per_diameter
    shapes = [
        (round(height), round(width))
        for height, width in zip(
            (p["height"] / cell).tolist(), (p["width"] / cell).tolist(), strict=True
        )
    ]
    states = torch.empty(len(cases), frames, 2, cells, cells)
    for shape in dict.fromkeys(shapes):
        of_shape = torch.tensor([i for i, s in enumerate(shapes) if s == shape])
        whole = _wake({n: v[of_shape] for n, v in p.items()}, shape, dtype)
        needed = _Run(whole, p["velocity"][of_shape], of_shape).substeps(seconds[of_shape])
        for part in alike(needed):
            rows = of_shape[part]
            run = _Run(
                _wake({n: v[rows] for n, v in p.items()}, shape, dtype), p["velocity"][rows], rows
            )
            for i, state in enumerate(run.frames(seconds[rows], frames, wait[rows])):
                found = run.flow.centres(state)
                states[rows, i] = to_grid(found, cells).float().cpu()
    dx, dy = p["width"] / cells, p["height"] / cells
    line = torch.arange(cells, device=device) + 0.5
    x, y = line * dx[:, None, None], line[:, None] * dy[:, None, None]
    mask = (_distance(p, x, y) > 0).cpu()
    return Solution(states * mask[:, None, None], mask, seconds, dx, dy)


def _distance(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    cx, cy, r = (p[name][:, None, None] for name in ("center_x", "center_y", "radius"))
    return torch.sqrt((x - cx) ** 2 + (y - cy) ** 2) - r


def _wake(p: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Flow:
    velocity, diameter = p["velocity"][:, None, None], 2 * p["radius"][:, None, None]

    def kick(t: Tensor) -> tuple[Tensor | float, Tensor]:
        x = flow.faces_v()[0] - p["center_x"][:, None, None]
        time = t * velocity / diameter
        active = (time < 2.5) & (x > diameter) & (x < 2 * diameter)
        strength = 0.04 * velocity**2 / diameter * torch.sin(2 * math.pi * time / 2.5)
        return 0.0, torch.where(active, strength, 0.0).to(dtype)

    flow = Flow(
        shape,
        p["width"] / shape[1],
        p["height"] / shape[0],
        p["viscosity"] / p["density"],
        left=Side("inlet", p["velocity"]),
        right=Side("outlet"),
        obstacle=lambda x, y: _distance(p, x, y).to(dtype),
        force=kick,
        dtype=dtype,
    )
    return flow


@dataclass(frozen=True)
class _Run:
    """Cases that advance together: every one makes as many steps between two frames."""

    flow: Flow
    speed: Tensor
    rows: Tensor

    def substeps(self, seconds: Tensor) -> Tensor:
        return (seconds / self.flow.stable_step(self.speed)).ceil().long()

    def frames(self, seconds: Tensor, count: int, wait: Tensor | None = None) -> Iterator[State]:
        """Yield ``count`` states ``seconds`` apart, the first after ``wait``."""
        state = self.flow.start()
        if wait is not None:
            steps = int(self.substeps(wait).max())
            for _ in range(steps):
                state = self.flow.step(state, wait / steps)
        steps = int(self.substeps(seconds).max())
        for i in range(count):
            for _ in range(steps if i else 0):
                state = self.flow.step(state, seconds / steps)
            yield state


def cavity(highest_reynolds: float = 2000.0) -> Problem:
    """Return the cavity: 50 lid speeds (bc), the paper's rho and mu (prop), l and w (geo).

    The viscosity is such that the fastest lid and the highest box reach ``highest_reynolds``; of
    the paper's fluids those with Re of 50 to that number stay. On coarse grids lower it, to below
    50 cells.
    """
    base = dict(zip(BASE, (10.0, 1.0, 0.5 / highest_reynolds, 0.01, 0.01), strict=True))

    def carried(values: Parameters) -> bool:
        return 50 * 0.99 <= reynolds(values, "height") <= highest_reynolds * 1.01

    lengths = (0.01, 0.02, 0.03, 0.04, 0.05)
    lowest = 50 * base["viscosity"] / 0.01
    return Problem(
        "cavity",
        BASE,
        {
            "bc": product(base, carried, velocity=even(lowest, 50.0, 50)),
            "prop": product(
                base,
                carried,
                density=(0.1, 0.5, *map(float, range(1, 11))),
                viscosity=(1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2),
            ),
            "geo": product(base, carried, height=lengths, width=lengths),
        },
        solve_cavity,
        {
            "reynolds": lambda values: reynolds(values, "height"),
            "aspect": lambda values: values["width"] / values["height"],
        },
    )


def cylinder() -> Problem:
    """Return the cylinder: inlet .3 to 2 m/s (bc), Re 40 to 400 (prop), D and margins (geo).

    Geometries have a viscosity of 1.25e-3 Pa s, so that D of .01 to .05 m is Re 80 to 400.
    """
    names = (*BASE, "radius", "center_x", "center_y")
    base = dict(zip(names, (1.0, 10.0, 1e-3, 0.12, 0.22, 0.01, 0.06, 0.06), strict=True))

    def number(values: Parameters) -> float:
        return 2 * reynolds(values, "radius")

    def carried(values: Parameters) -> bool:
        return 40 * 0.99 <= number(values) <= 400 * 1.01

    def geometry(d: float, before: float, below: float, behind: float) -> Parameters:
        width, height = before + behind, below + base["center_y"]
        place = {"radius": d / 2, "center_x": before, "center_y": below}
        return {**base, "viscosity": 1.25e-3, "height": height, "width": width, **place}

    margins = (0.02, 0.04, 0.06, 0.08, 0.1)
    return Problem(
        "cylinder",
        names,
        {
            "bc": product(base, carried, velocity=even(0.3, 2.0, 50)),
            "prop": product(
                base,
                carried,
                density=(1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0),
                viscosity=(1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
            ),
            "geo": [
                *(geometry(d, 0.06, 0.06, 0.16) for d in (0.01, 0.02, 0.03, 0.04, 0.05)),
                *(geometry(0.02, x, 0.06, 0.16) for x in margins if x != 0.06),
                *(geometry(0.02, 0.06, y, 0.16) for y in margins if y != 0.06),
                *(geometry(0.02, 0.06, 0.06, x) for x in (0.12, 0.14, 0.18, 0.2)),
            ],
        },
        solve_cylinder,
        {
            "reynolds": number,
            "blockage": lambda values: 2 * values["radius"] / values["height"],
            "inlet_length": lambda values: values["center_x"] / (2 * values["radius"]),
            "outlet_length": lambda values: (
                (values["width"] - values["center_x"]) / (2 * values["radius"])
            ),
            "offset": lambda values: values["center_y"] / values["height"],
        },
    )
