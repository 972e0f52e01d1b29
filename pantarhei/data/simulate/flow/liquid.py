"""Two flows of water and air: a tube that fills, and water that meets an obstacle.

Parameter grids are those of CFDBench (arXiv 2310.05963) as far as this solver carries them,
Reynolds numbers of 20 to 400. Only velocities are stored, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from pantarhei.data.simulate.flow.two_phase import GRAVITY, Fluids, TwoPhase, TwoPhaseState

BOX = (0.4, 1.5)  # height and width of the dam's box, m
_INLET, _OBSTACLE = 0.1, 0.5  # height of the dam's inlet, and where its obstacle begins, m


def solve_tube(
    cases: Sequence[Case],
    *,
    cells: int = 64,
    frames: int = 60,
    device: str | torch.device = "cpu",
    passages: float = 1.5,
    across: int = 16,
    dtype: torch.dtype = torch.float64,
) -> Solution:
    """Fill tubes of air with water from the left; frame 0 is rest.

    ``passages``: the time of the last frame, in width/velocity. ``across``: the solver's cells.
    """
    p = columns(cases, device)
    seconds = passages * p["width"] / p["velocity"] / (frames - 1)
    shapes = [(across, round(ratio * across)) for ratio in (p["width"] / p["height"]).tolist()]

    def box(rows: Tensor, shape: tuple[int, int]) -> TwoPhase:
        height, width, speed = (p[n][rows] for n in ("height", "width", "velocity"))
        fluids = Fluids(p["density"][rows], p["viscosity"][rows])
        dx, dy = width / shape[1], height / shape[0]
        return TwoPhase(shape, dx, dy, fluids, speed, dtype=dtype)

    states = torch.zeros(len(cases), frames, 2, cells, cells)
    for shape in dict.fromkeys(shapes):
        of_shape = torch.tensor([i for i, s in enumerate(shapes) if s == shape])
        stable = box(of_shape, shape).stable_step(p["velocity"][of_shape])
        for part in alike((seconds[of_shape] / stable).ceil().long()):
            rows = of_shape[part]
            flow = box(rows, shape)
            start = flow.start(torch.zeros(1, *shape))
            _record(flow, start, p["velocity"][rows], seconds[rows], states, rows)
    states[:, 0] = 0
    dx, dy = p["width"] / cells, p["height"] / cells
    return Solution(states, torch.ones(len(cases), cells, cells), seconds, dx, dy)


def solve_dam(
    cases: Sequence[Case],
    *,
    cells: int = 64,
    frames: int = 60,
    device: str | torch.device = "cpu",
    interval: float = 0.1,
    across: int = 32,
    dtype: torch.dtype = torch.float64,
) -> Solution:
    """Send water against obstacles of height x width at .5 m, under gravity.

    The box is 1.5 x .4 m. Water enters at the left below .1 m and fills, moving, what lies between
    inlet and obstacle at t = 0; the rest of the left side and the right one are open. ``interval``:
    s between frames. Obstacles are whole cells of the solver, ``across`` to the box's height.
    """
    p = columns(cases, device)
    shape = (across, round(across * BOX[1] / BOX[0]))
    y, x = (
        (torch.arange(n, device=device) + 0.5) * length / n
        for n, length in zip(shape, BOX, strict=True)
    )
    speed = p["velocity"] + (GRAVITY * BOX[0]) ** 0.5
    water = (y[:, None] < _INLET) & (x < _OBSTACLE)
    states = torch.zeros(len(cases), frames, 2, cells, cells)
    seconds = torch.full((len(cases),), interval, dtype=torch.float64, device=device)

    def box(rows: Tensor) -> TwoPhase:
        height, width = (p[n][rows][:, None, None] for n in ("height", "width"))
        dx, dy = (torch.full((len(rows),), d, device=device, dtype=torch.float64)
                  for d in (BOX[1] / shape[1], BOX[0] / shape[0]))  # fmt: skip
        return TwoPhase(
            shape, dx, dy, Fluids(p["density"][rows], p["viscosity"][rows]), p["velocity"][rows],
            inlet=y < _INLET, gravity=GRAVITY, solid=_inside(x, y[:, None], height, width),
            dtype=dtype,
        )  # fmt: skip

    everyone = torch.arange(len(cases))
    for rows in alike((seconds / box(everyone).stable_step(speed)).ceil().long()):
        flow = box(rows)
        moving = (
            torch.nn.functional.pad(water.to(dtype), (1, 0)) * p["velocity"][rows][:, None, None]
        )
        _record(flow, flow.start(water, moving), speed[rows], seconds[rows], states, rows)
    dx, dy = (torch.full_like(seconds, d / cells) for d in (BOX[1], BOX[0]))
    line = torch.arange(cells, device=device) + 0.5
    obstacle = _inside(
        line * BOX[1] / cells, line[:, None] * BOX[0] / cells,
        p["height"][:, None, None], p["width"][:, None, None],
    ).cpu()  # fmt: skip
    return Solution(states * ~obstacle[:, None, None], ~obstacle, seconds, dx, dy)


def _inside(x: Tensor, y: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Cells of the obstacle; one column at least, however thin it is."""
    step = x[1] - x[0]
    return (x > _OBSTACLE) & (x < _OBSTACLE + torch.maximum(width, step)) & (y < height)


def _record(
    flow: TwoPhase,
    state: TwoPhaseState,
    speed: Tensor,
    seconds: Tensor,
    states: Tensor,
    rows: Tensor,
) -> None:
    """Write the frames of these cases into ``states``, the first one the start."""
    cells, frames = states.shape[-1], states.shape[1]
    steps = int((seconds / flow.stable_step(speed)).ceil().max())
    for i in range(frames):
        for _ in range(steps if i else 0):
            state = flow.step(state, seconds / steps)
        states[rows, i] = to_grid(flow.centres(state), cells).float().cpu()


def tube() -> Problem:
    """Return the tube: inlet .3 to 2 m/s (bc), the paper's rho and mu (prop), d and l (geo)."""
    base = dict(zip(BASE, (1.0, 100.0, 0.1, 0.1, 1.0), strict=True))

    def carried(values: Parameters) -> bool:
        return 20 <= reynolds(values, "height") <= 400

    geometries = [
        {**base, "height": d, "width": ratio * d}
        for d in (0.05, 0.1, 0.3)
        for ratio in (2, 4, 6, 8, 10)
        if 0.1 <= ratio * d <= 10
    ]
    return Problem(
        "tube",
        BASE,
        {
            "bc": product(base, carried, velocity=even(0.3, 2.0, 50)),
            "prop": _properties(base, carried),
            "geo": [values for values in geometries if carried(values)],
        },
        solve_tube,
        {
            "reynolds": lambda values: reynolds(values, "height"),
            "aspect": lambda values: values["width"] / values["height"],
        },
    )


def dam() -> Problem:
    """Return the dam: inlet .2 to 2 m/s (bc), rho and mu (prop), the obstacle's h and w (geo)."""
    base = dict(zip(BASE, (1.0, 100.0, 0.1, 0.1, 0.05), strict=True))

    def carried(values: Parameters) -> bool:
        return 20 * 0.99 <= reynolds({**values, "height": _INLET}, "height") <= 400

    return Problem(
        "dam",
        BASE,
        {
            "bc": product(base, carried, velocity=even(0.2, 2.0, 50)),
            "prop": _properties(base, carried),
            "geo": product(base, carried, height=even(0.11, 0.15, 5), width=even(0.01, 0.1, 10)),
        },
        solve_dam,
        {
            "reynolds": lambda values: reynolds({**values, "height": _INLET}, "height"),
            "froude": lambda values: values["velocity"] / (GRAVITY * _INLET) ** 0.5,
        },
    )


def _properties(base: Parameters, carried: Callable[[Parameters], bool]) -> list[Parameters]:
    densities, viscosities = (even(10, 1000, 10), even(0.01, 1, 10))
    return product(base, carried, density=densities, viscosity=viscosities)
