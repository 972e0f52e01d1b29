"""Trajectories for training: split by trajectory, normalised by the training part, in windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from pantarhei.fit import Batches


def split(
    count: int,
    shares: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> tuple[NDArray[np.int64], ...]:
    """Split ``count`` trajectories into parts of these shares, whole trajectories each.

    Trajectories of one of ``groups`` (one label for each) stay together; the shares are then of the
    groups. Every part gets at least one. The same arguments give the same split.

    >>> [part.tolist() for part in split(5, (0.6, 0.2, 0.2))]
    [[2, 3, 4], [0], [1]]
    """
    labels = np.arange(count)
    if groups is not None:
        labels = np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(labels) != count or any(s <= 0 for s in shares):
        raise RequestError("A split has a positive share per part, and a group per trajectory.")
    units = int(labels.max()) + 1 if count else 0
    if units < len(shares):
        raise RequestError(
            f"{units} trajectories or groups cannot be split into {len(shares)} parts."
        )
    order = np.random.default_rng(seed).permutation(units)
    ends = np.round(np.cumsum(shares) / sum(shares) * units).astype(int)
    for i in range(len(ends)):  # at least one for each part, and for those that follow
        ends[i] = min(max(ends[i], ends[i - 1] + 1 if i else 1), units - (len(ends) - 1 - i))
    return tuple(
        np.flatnonzero(np.isin(labels, order[start:end]))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Statistics:
    r"""Mean and standard deviation of each channel, for :math:`(x - \mathrm{mean})/\mathrm{sd}`.

    ``mean`` and ``sd`` are (C,), ``space`` the number of space axes. A constant channel has sd 1.

    >>> data = Trajectories.of(np.random.default_rng(0).normal(3.0, 2.0, (4, 50, 1, 8)))
    >>> found = Statistics.of(data, [0, 1, 2])
    >>> found.mean.round().tolist(), found.sd.round().tolist()
    ([3.0], [2.0])
    """

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    space: int

    @classmethod
    def of(cls, data: Trajectories, cases: Sequence[int] | NDArray[np.integer[Any]]) -> Statistics:
        """Measure the cases named (the training part, and nothing else), one after another.

        Masked cells do not count.
        """
        if len(cases) == 0:
            raise RequestError("Statistics need one trajectory or more: name the training part.")
        masks = data.masks()
        count, mean, square = 0, np.zeros(data.shape[2]), np.zeros(data.shape[2])
        for case in cases:
            values = data.frames(int(case)).astype(np.float64)
            values = np.moveaxis(values.reshape(*values.shape[:2], -1), 1, 0)
            if data.mask is not None:
                values = values[..., masks[int(case)].reshape(-1)]
            values = values.reshape(len(mean), -1)
            here, part = values.mean(1), values.shape[1]
            # Chan, Golub and LeVeque: sums of squares about the means are joined without loss
            gap = here - mean
            square += ((values - here[:, None]) ** 2).sum(1) + gap**2 * count * part / (
                count + part
            )
            count += part
            mean += gap * part / count
        sd = np.sqrt(square / count)
        return cls(mean, np.where(sd > 0, sd, 1.0), len(data.shape) - 3)

    def normalise(self, states: Tensor) -> Tensor:
        """Return states (..., C, *space) with mean 0 and standard deviation 1."""
        return (states - self._as(states, self.mean)) / self._as(states, self.sd)

    def restore(self, states: Tensor) -> Tensor:
        """Return normalised states in physical units."""
        return states * self._as(states, self.sd) + self._as(states, self.mean)

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads; it belongs beside the model's weights."""
        return {"mean": self.mean.tolist(), "sd": self.sd.tolist(), "space": self.space}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Statistics:
        """Rebuild the statistics that were saved with a model."""
        try:
            mean, sd = (np.array(value[key], np.float64) for key in ("mean", "sd"))
            if mean.ndim != 1 or mean.shape != sd.shape or not (sd > 0).all():
                raise ValueError("mean and sd do not fit")
            return cls(mean, sd, int(value["space"]))
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(f"These are no statistics of channels ({error}).") from error

    def _as(self, like: Tensor, values: NDArray[np.float64]) -> Tensor:
        import torch

        return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(
            -1, *(1,) * self.space
        )


class Windows:
    """Batches of windows as a function of the draw number, for :func:`pantarhei.fit.fit`.

    ``windows(n)`` is ``(past, targets, *given)``: (B, history, C, *space), (B, horizon, C, *space)
    and those of ``given`` (``"parameters"`` (B, P), ``"mask"`` (B, *space)). An epoch is every
    window of the cases once, in an order that depends only on ``(seed, epoch)``. States are
    normalised by ``statistics``. ``in_memory`` holds all states on ``device`` (so does None, when
    they take less than 1 GiB); else each batch is read from the file.

    With ``leads`` the target (``horizon`` 1) is not the next frame but one that lies 1 to ``leads``
    frames ahead, drawn by :func:`draw_leads`; an epoch has as many draws of a case as that has
    frames to forecast. ``given`` may then name ``"lead"`` too, in frames: a last column of the
    parameters, (B, P + 1), or alone (B, 1).

    >>> data = Trajectories.of(np.arange(12.0).reshape(2, 6, 1))
    >>> windows = Windows(data, [0, 1], history=2, horizon=1, batch_size=8)
    >>> past, targets = windows(0)
    >>> len(windows), past.shape, bool((targets == past[:, -1:] + 1).all())
    (1, torch.Size([8, 2, 1]), True)
    """

    def __init__(
        self,
        data: Trajectories,
        cases: Sequence[int] | NDArray[np.integer[Any]],
        *,
        history: int,
        batch_size: int,
        horizon: int = 1,
        seed: int = 0,
        statistics: Statistics | None = None,
        given: Sequence[Literal["parameters", "mask", "lead"]] = (),
        leads: int | None = None,
        in_memory: bool | None = None,
        device: Any = "cpu",
    ) -> None:
        import torch

        from pantarhei.fit import Batches

        if history < 1 or horizon < 1:
            raise RequestError(f"history={history}, horizon={horizon}: each is at least 1.")
        if leads is not None and (leads < 1 or horizon > 1):
            raise RequestError(
                f"leads={leads}, horizon={horizon}: the longest lead is 1 or more, and the horizon "
                "beside it 1."
            )
        if leads is None and "lead" in given:
            raise RequestError("A lead is told where it is drawn: say how long it may be, leads=.")
        self.data, self.cases = data, [int(case) for case in cases]
        self.history, self.horizon, self.device = history, horizon, torch.device(device)
        self.statistics, self.leads = statistics, leads
        starts = [  # with leads the count alone matters
            (row, start)
            for row, case in enumerate(self.cases)
            for start in range(data.length(case) - history - horizon + 1)
        ]
        if not starts:
            raise RequestError(
                f"No trajectory has {history} + {horizon} frames: choose a shorter history or "
                "horizon."
            )
        size = len(self.cases) * math.prod(data.shape[1:]) * 4
        self._states: Tensor | None = None
        if in_memory or (in_memory is None and size < 2**30):
            self._states = self._normalised(data.tensor(self.cases, repeat_last=True).to(device))
        self._given = {name: self._of_each_case(name) for name in given if name != "lead"}
        self._names = tuple(given)
        # where a window's last frame, or its target, may lie in each case
        lengths = [data.length(case) - history + 1 for case in self.cases]
        self._places = torch.tensor(lengths)
        self._batches: Batches = Batches(
            torch.tensor(starts), batch_size=batch_size, seed=seed, transform=self._gather
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __call__(self, n: int) -> tuple[Tensor, ...]:
        """Return the n-th batch."""
        return self._batches(n)

    def _gather(self, generator: Any, chosen: Tensor) -> tuple[Tensor, ...]:
        import torch

        rows, first = chosen.unbind(1)
        length = self.history + self.horizon
        steps = first[:, None] + torch.arange(length)
        leads = torch.ones(len(rows), dtype=torch.long)
        if self.leads is not None:
            start, leads = draw_leads(generator, self._places[rows], self.leads)
            steps = start[:, None] + torch.arange(length)
            steps[:, -1] += leads - 1
        if self._states is not None:
            states = self._states[rows[:, None].to(self.device), steps.to(self.device)]
        else:
            read = self.data.frames
            found = [
                read(self.cases[row], own[0], own[-1] + 1)
                if self.leads is None
                else np.concatenate(
                    [read(self.cases[row], own[0], own[-2] + 1),
                     read(self.cases[row], own[-1], own[-1] + 1)]
                )
                for row, own in zip(rows.tolist(), steps.tolist(), strict=True)
            ]  # fmt: skip
            stacked = torch.from_numpy(np.stack(found).astype(np.float32))
            states = self._normalised(stacked.to(self.device))
        past, targets = states[:, : self.history], states[:, self.history :]
        told: dict[str, Tensor] = {
            name: values[rows.to(self.device)] for name, values in self._given.items()
        }
        return past, targets, *with_lead(told, leads.to(self.device), self._names)

    def _normalised(self, states: Tensor) -> Tensor:
        return states if self.statistics is None else self.statistics.normalise(states)

    def _of_each_case(self, name: str) -> Tensor:
        import torch

        if name not in ("parameters", "mask"):
            raise RequestError(f"given holds 'parameters', 'mask' and 'lead', not '{name}'.")
        values = self.data.parameters if name == "parameters" else self.data.mask
        if values is None:
            raise RequestError(f"These trajectories have no {name}: leave it out of given.")
        if name == "mask":
            values = self.data.masks()
        return torch.from_numpy(values[self.cases].astype(np.float32)).to(self.device)


def draw_leads(generator: Any, frames: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    r"""Draw a start and a lead within each of ``frames`` (B,) frames, each 2 or more.

    As PDEArena's conditional training does (and SineNet's), so that long leads are not rare: the
    end e is uniform in 1..n - 1 and the start s before it early rather than late,

    .. math:: P(s \mid e) \propto \frac{1}{s + 1}, \qquad \max(0, e - L) \le s < e,

    with L = ``longest``. Returns s and e - s. Uniform pairs would have leads in proportion to
    n - d, and with a history of 14 frames a lead of 13 once in 91 draws; here it is once in 41.

    >>> import torch
    >>> start, lead = draw_leads(torch.Generator().manual_seed(0), torch.full((4000,), 14), 13)
    >>> 80 < int((lead == 13).sum()) < 120
    True
    """
    import torch

    def uniform() -> Tensor:
        return torch.rand(len(frames), generator=generator, dtype=torch.float64)

    end = 1 + (uniform() * (frames - 1)).long().clamp(max=frames - 2)
    low = (end - longest).clamp(min=0)
    # sums[k] = 1 + 1/2 + .. + 1/k: the start is where a uniform number falls between two of them
    parts = 1 / torch.arange(1, int(frames.max()), dtype=torch.float64)
    sums = torch.cat([parts.new_zeros(1), parts.cumsum(0)])
    point = torch.lerp(sums[low], sums[end], uniform())
    start = torch.searchsorted(sums, point, right=True) - 1
    start = torch.minimum(torch.maximum(start, low), end - 1)
    return start, end - start


def with_lead(told: Mapping[str, Tensor], lead: Tensor, names: Sequence[str]) -> list[Tensor]:
    """Return what is told in the order of ``names``, the lead (B,) beside the parameters.

    It is their last column, (B, P + 1), and alone (B, 1).
    """
    import torch

    found = {name: told[name] for name in names if name != "lead"}
    if "lead" in names:
        column = lead.float()[:, None]
        known = [found["parameters"]] if "parameters" in found else []
        found = {"parameters": torch.cat([*known, column], 1)} | {
            name: value for name, value in found.items() if name != "parameters"
        }
    return list(found.values())
