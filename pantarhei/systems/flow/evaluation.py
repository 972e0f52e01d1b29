r"""Tests of flow models: one step, many steps, physics, and how far the conditions are from known.

Everything is measured on interior cells of the fluid, u and v apart. NMSE is a ratio per frame,
averaged over frames and cases (CFDBench's test); near rest its denominator vanishes, so a variant
with a floor, 1 % of the case's mean square over time, stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.rollout import nmse, rollout
from pantarhei.systems.flow.surrogate import columns_of
from pantarhei.systems.parameters import ParameterScale

_CHUNK = 64  # frames evaluated at once


class Persistence:
    """The baseline "Identity": the next frame is this one."""

    channels = 2
    steps_forward = True

    def step(self, field: Tensor, parameters: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the field."""
        return field


def floored_nmse(forecast: Tensor, truth: Tensor, floor: Tensor | float) -> Tensor:
    r"""Return :math:`\overline{(p-y)^2} / \max(\overline{y^2}, \mathrm{floor})` per frame, (N,).

    >>> floored_nmse(torch.ones(1, 1, 4), torch.zeros(1, 1, 4), 0.5).item()
    2.0
    """
    gap = (forecast - truth).square().flatten(1).mean(1)
    return gap / truth.square().flatten(1).mean(1).clamp(min=floor)


def one_step(model: Any, data: Trajectories, cases: Sequence[int]) -> list[dict[str, Any]]:
    """Measure each case one frame at a time: a row per case, means over its frames but the first.

    Columns: ``case``, ``subset``, ``nmse_u``, ``nmse_v`` (NaN for a model of u alone), ``nmse``
    (all that the model predicts), ``nmse_floored`` (u), ``frames``.
    """
    rows = []
    for case in _some(cases):
        truth, table, mask = _case(data, case, _where(model))
        found = _frames(model, truth, table, mask)
        aim = truth[1:] * mask
        floor = 0.01 * aim[:, 0].square().mean()
        row = {"case": case, "subset": subset_of(data, case)}
        row["nmse_u"] = float(nmse(found[:, :1], aim[:, :1]).mean())
        row["nmse_v"] = (
            float(nmse(found[:, 1:2], aim[:, 1:2]).mean()) if model.channels > 1 else np.nan
        )
        row["nmse"] = float(nmse(found[:, : model.channels], aim[:, : model.channels]).mean())
        row["nmse_floored"] = float(floored_nmse(found[:, :1], aim[:, :1], float(floor)).mean())
        row["frames"] = len(aim)
        rows.append(row)
    return rows


def case_mean(data: Trajectories, cases: Sequence[int]) -> list[dict[str, Any]]:
    """Measure the baseline that knows each case's own mean over time, and predicts it always."""
    rows = []
    for case in _some(cases):
        truth, _, mask = _case(data, case, torch.device("cpu"))
        aim = truth[1:] * mask
        found = aim.mean(0, keepdim=True).expand_as(aim)
        row = {"case": case, "subset": subset_of(data, case)}
        rows.append(row | {"nmse_u": float(nmse(found[:, :1], aim[:, :1]).mean())})
    return rows


@dataclass(frozen=True)
class Horizon:
    """What :func:`multi_step` returns: NMSE of u (case, step), and where a case blew up, or 0."""

    nmse_u: Tensor
    blown_at: Tensor

    @property
    def blown(self) -> int:
        """How many cases blew up."""
        return int((self.blown_at > 0).sum())

    @property
    def curve(self) -> Tensor:
        """Mean over cases at each step; infinite from the step on at which one blew up."""
        return self.nmse_u.nan_to_num(torch.inf).mean(0)

    def rows(self) -> list[dict[str, float]]:
        """Return a row per step: mean, median and largest NMSE of u, and how many had blown up."""
        steps = torch.arange(1, self.nmse_u.shape[1] + 1)
        blown = ((self.blown_at[:, None] > 0) & (self.blown_at[:, None] <= steps)).sum(0)
        finite = self.nmse_u.nan_to_num(torch.inf)
        return [
            {
                "step": t + 1,
                "nmse_u": float(finite[:, t].mean()),
                "median": float(finite[:, t].median()),
                "largest": float(finite[:, t].max()),
                "blown": int(blown[t]),
            }
            for t in range(len(steps))
        ]

    def by_case(self, data: Trajectories, cases: Sequence[int]) -> list[dict[str, Any]]:
        """Return a row per case and step, with the case's subset."""
        return [
            {"case": case, "subset": subset_of(data, case), "step": t + 1, "nmse_u": value}
            for case, row in zip(cases, self.nmse_u.tolist(), strict=True)
            for t, value in enumerate(row)
        ]


def multi_step(
    model: Any,
    data: Trajectories,
    cases: Sequence[int],
    steps: int = 20,
    start: int = 0,
    *,
    limit: float = torch.inf,
    off_by_one: bool = False,
) -> Horizon:
    """Run each case forward from frame ``start`` and measure u at each step.

    Cases that are too short repeat their last frame, as in CFDBench. A case has blown up when a
    value is not finite or reaches ``limit``, m/s; it is then left alone and counted. Models that
    answer for a time are asked for each frame. ``off_by_one`` compares the prediction after k steps
    with frame k - 1, a fault of the published test.
    """
    chosen = _some(cases)
    where = _where(model)
    if steps < 1 or start < 0 or start + 1 >= data.shape[1]:
        raise RequestError(
            f"{steps} steps from frame {start} cannot be compared with {data.shape[1]} frames."
        )
    truth = _padded(data, chosen, start, start + steps + 1).to(where)
    table, mask = _given(data, chosen, where)
    shift = 0 if off_by_one else 1
    aims = (truth[:, shift : shift + steps] * mask[:, None])[:, :, :1]

    def error(found: Tensor, aim: Tensor) -> Tensor:
        return nmse(found[:, :1] * mask, aim[:, :1])

    if model.steps_forward:
        found = rollout(
            model if isinstance(model, nn.Module) else model.step,  # modules in evaluation mode
            truth[:, :1],
            steps,
            given=(table, mask),
            metrics={"nmse_u": error},
            truth=aims.expand(-1, -1, truth.shape[2], -1, -1),
            keep="none",
            limit=limit,
        )
        scores = found.scores["nmse_u"]
        if scores.shape[1] < steps:  # all blew up: it stopped there
            rest = scores.new_full((len(scores), steps - scores.shape[1]), torch.nan)
            scores = torch.cat([scores, rest], 1)
        return Horizon(scores, found.blown_at)
    with torch.no_grad():
        times = torch.arange(start + 1, start + steps + 1, device=where).float()
        columns = [
            error(model.frame(t.expand(len(chosen)), table), aims[:, i])
            for i, t in enumerate(times)
        ]
    return Horizon(torch.stack(columns, 1).cpu(), torch.zeros(len(chosen), dtype=torch.long))


def divergence(field: Tensor, mask: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    r"""Return the rms divergence of (N, 2, H, W) times a cell's size over the rms speed, (N,).

    Central differences, where a cell and its four neighbours are fluid (mask (N, 1, H, W)); what
    interpolation to the stored grid leaves in the truth is the value to compare with.

    >>> x = torch.arange(5.0).expand(1, 5, 5)
    >>> shear = torch.stack([x.mT, x], 1)  # u = y, v = x
    >>> one = torch.ones(1)
    >>> float(divergence(shear, torch.ones(1, 1, 5, 5), one, one))
    0.0
    """
    u, v = field[:, 0], field[:, 1]
    h = torch.minimum(dx, dy)[:, None, None]
    du = (u[:, 1:-1, 2:] - u[:, 1:-1, :-2]) / (2 * dx[:, None, None])
    dv = (v[:, 2:, 1:-1] - v[:, :-2, 1:-1]) / (2 * dy[:, None, None])
    m = mask[:, 0]
    inside = m[:, 1:-1, 1:-1] * m[:, 1:-1, 2:] * m[:, 1:-1, :-2] * m[:, 2:, 1:-1] * m[:, :-2, 1:-1]
    sum_of_squares = ((du + dv) * h * inside).square().flatten(1).sum(1)
    mean_square = sum_of_squares / inside.flatten(1).sum(1).clamp(min=1)
    return mean_square.sqrt() / _speed(field, mask)


def wall_violation(
    field: Tensor, mask: Tensor, closed: Sequence[str] = ("bottom", "top", "left", "right")
) -> Tensor:
    """Return how much goes through walls: rms over the rms speed, (N,).

    The velocity normal to each closed side, extrapolated to it from two cells, and all velocity in
    solid cells (mask (N, 1, H, W) is 0 there).

    >>> still = torch.zeros(1, 2, 8, 8); still[:, 0, 2:6, 2:6] = 1.0
    >>> float(wall_violation(still, torch.ones(1, 1, 8, 8)))
    0.0
    """
    u, v = field[:, 0], field[:, 1]
    ends = {
        "left": (u[..., 0], u[..., 1]),
        "right": (u[..., -1], u[..., -2]),
        "bottom": (v[:, 0], v[:, 1]),
        "top": (v[:, -1], v[:, -2]),
    }
    through = [1.5 * near - 0.5 * far for near, far in (ends[side] for side in closed)]
    through.append((field * (1 - mask)).flatten(1))
    count = sum(part.shape[1] for part in through[:-1]) + 2 * (1 - mask).flatten(1).sum(1)
    squares = torch.stack([part.square().sum(1) for part in through]).sum(0)
    return (squares / count).sqrt() / _speed(field, mask)


def physics(
    model: Any, data: Trajectories, cases: Sequence[int], closed: Sequence[str]
) -> list[dict[str, Any]]:
    """Measure divergence and wall violation of one-step predictions, and of the truth beside them.

    A row per case; means over frames. Needs a model of u and v, and ``dx`` and ``dy`` among the
    parameters.
    """
    if model.channels < 2:
        raise RequestError("divergence and wall violation need u and v: this model predicts u.")
    dx, dy = columns_of(data, ["dx", "dy"])
    rows = []
    for case in _some(cases):
        truth, table, mask = _case(data, case, _where(model))
        found = _frames(model, truth, table, mask, masked=False)
        masks, spaces = mask.expand(len(found), -1, -1, -1), table.expand(len(found), -1)
        row: dict[str, Any] = {"case": case, "subset": subset_of(data, case)}
        for name, field in (("forecast", found), ("truth", truth[1:])):
            parted = divergence(field, masks, spaces[:, dx], spaces[:, dy])
            row[f"divergence_{name}"] = float(parted.mean())
            row[f"wall_{name}"] = float(wall_violation(field, masks, closed).mean())
        rows.append(row)
    return rows


def distances(training: ArrayLike, asked: ArrayLike) -> NDArray[np.float64]:
    r"""Return how far each row of ``asked`` (M, P) is from the nearest training case (N, P).

    Euclidean, after standardising by the training cases.

    >>> distances([[0.0], [2.0]], [[2.0], [4.0]]).tolist()
    [0.0, 2.0]
    """
    scale = ParameterScale.of(training)
    known, new = (
        scale.double()(torch.as_tensor(np.asarray(a, np.float64))) for a in (training, asked)
    )
    return torch.cdist(new, known).amin(1).numpy()


def mean(rows: Sequence[dict[str, Any]], column: str) -> float:
    """Return the mean of a column."""
    return float(np.mean([row[column] for row in rows]))


def subset_of(data: Trajectories, case: int) -> str:
    """Return the subset of a case, '' where the set names none."""
    names = data.settings.get("subset_names", ())
    if data.parameters is None or not names or "subset" not in data.parameter_names:
        return ""
    return str(names[int(data.parameters[case, columns_of(data, ["subset"])[0]])])


def _speed(field: Tensor, mask: Tensor) -> Tensor:
    """Return the rms speed in the fluid, (N,)."""
    squares = (field.square() * mask).flatten(1).sum(1)
    return (squares / mask.flatten(1).sum(1).clamp(min=1)).sqrt().clamp(min=1e-12)


def _frames(model: Any, truth: Tensor, table: Tensor, mask: Tensor, masked: bool = True) -> Tensor:
    """Predict frames 1, 2, ... of one case, each from the true one before."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    parts = []
    with torch.no_grad():
        for first in range(0, len(truth) - 1, _CHUNK):
            past = truth[first : min(first + _CHUNK, len(truth) - 1)]
            rows, masks = table.expand(len(past), -1), mask.expand(len(past), -1, -1, -1)
            if model.steps_forward:
                parts.append(model.step(past, rows, masks))
            else:
                times = torch.arange(first + 1, first + 1 + len(past), device=past.device)
                parts.append(model.frame(times.float(), rows))
    if training:
        model.train()
    found = torch.cat(parts)
    return found * mask if masked else found


def _case(data: Trajectories, case: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    truth = torch.from_numpy(data.frames(case).astype(np.float32)).to(device)
    if len(truth) < 2:
        raise RequestError(f"Case {case} has a single frame: there is nothing to predict.")
    table, mask = _given(data, [case], device)
    return truth, table, mask


def _given(data: Trajectories, cases: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    if data.parameters is None:
        raise RequestError(
            "These trajectories have no parameters: a flow model is told the operating conditions."
        )
    table = torch.from_numpy(data.parameters[list(cases)]).float().to(device)
    mask = torch.from_numpy(data.masks()[list(cases)].astype(np.float32)).to(device)
    return table, mask[:, None]


def _padded(data: Trajectories, cases: Sequence[int], start: int, stop: int) -> Tensor:
    last = min(stop, data.shape[1])
    states = data.tensor(cases, 0, last, repeat_last=True)[:, start:]
    missing = stop - last
    return torch.cat([states, states[:, -1:].expand(-1, missing, -1, -1, -1)], 1)


def _some(cases: Sequence[int]) -> list[int]:
    chosen = [int(case) for case in cases]
    if not chosen:
        raise RequestError("There is no case to test on: name one or more.")
    return chosen


def _where(model: Any) -> torch.device:
    unit = getattr(model, "unit", None)
    return unit.device if isinstance(unit, Tensor) else torch.device("cpu")
