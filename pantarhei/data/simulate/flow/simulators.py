"""The flows as simulators: whole sets written in shards by ``pantarhei simulate NAME``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pantarhei.data.simulate.flow.cases import Problem, generate
from pantarhei.data.simulate.flow.liquid import dam, tube
from pantarhei.data.simulate.flow.single_phase import cavity, cylinder
from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError


@dataclass(frozen=True)
class Cavity:
    """Lid-driven cavities, case i of a random order of the grids of :func:`.cavity`."""

    cells: int = 64
    frames: int = 60
    subset: str = "all"
    highest_reynolds: float = 2000.0

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Trajectories:
        """Return the trajectories of the cases named; ``seed`` decides their order."""
        return _simulated(
            cavity(self.highest_reynolds), self.subset, cases, seed, self.cells, self.frames, device
        )


@dataclass(frozen=True)
class Cylinder:
    """Wakes of a cylinder, case i of a random order of the grids of :func:`.cylinder`."""

    cells: int = 64
    frames: int = 100
    subset: str = "all"

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Trajectories:
        """Return the trajectories of the cases named; ``seed`` decides their order."""
        return _simulated(cylinder(), self.subset, cases, seed, self.cells, self.frames, device)


@dataclass(frozen=True)
class Tube:
    """Tubes of air that fill with water, case i of a random order of the grids of :func:`.tube`."""

    cells: int = 64
    frames: int = 60
    subset: str = "all"

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Trajectories:
        """Return the trajectories of the cases named; ``seed`` decides their order."""
        return _simulated(tube(), self.subset, cases, seed, self.cells, self.frames, device)


@dataclass(frozen=True)
class Dam:
    """Water that meets obstacles, case i of a random order of the grids of :func:`.dam`."""

    cells: int = 64
    frames: int = 60
    subset: str = "all"

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Trajectories:
        """Return the trajectories of the cases named; ``seed`` decides their order."""
        return _simulated(dam(), self.subset, cases, seed, self.cells, self.frames, device)


def _simulated(
    problem: Problem,
    subset: str,
    cases: Sequence[int],
    seed: int,
    cells: int,
    frames: int,
    device: str | torch.device,
) -> Trajectories:
    everything = problem.cases() if subset == "all" else problem.cases(**{subset: None})
    if max(cases, default=0) >= len(everything):
        raise RequestError(
            f"'{problem.name}' has {len(everything)} cases in subset '{subset}': ask for no more."
        )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [everything[order[i]] for i in cases]
    return generate(problem, chosen, cells=cells, frames=frames, device=device)
