"""Generators: each module says which equations it solves, and how.

A simulator of fields is a frozen dataclass of its settings with one method,
``simulate(cases, seed, device)``, that returns :class:`~pantarhei.data.trajectories.Trajectories`.
What a case starts from depends on its number and the seed alone, so that any share of a set can be
made anywhere; :func:`pantarhei.data.simulate.write.write` makes whole sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from pantarhei.data.trajectories import Trajectories


class Simulator(Protocol):
    """What a simulator of trajectories is."""

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: str | torch.device = "cpu"
    ) -> Trajectories:
        """Return the trajectories of the cases named."""
        ...


def generators(seed: int, cases: Sequence[int]) -> Iterator[torch.Generator]:
    """Yield the random numbers of each case, on the CPU: the same on every machine."""
    import torch

    from pantarhei._fit_random import mix

    for case in cases:
        yield torch.Generator().manual_seed(mix(seed, "case", int(case)))


def simulated(settings: Any, states: torch.Tensor, channels: Sequence[str], **about: Any) -> Any:
    """Return (case, time, C, *space) states as float32 trajectories that name their simulator."""
    import torch

    from pantarhei.data.trajectories import Trajectories

    name = type(settings).__name__.lower()
    return Trajectories.of(
        states.to("cpu", torch.float32).numpy(),
        channels=channels,
        name=name,
        settings={"simulator": name, **asdict(settings)},
        **about,
    )
