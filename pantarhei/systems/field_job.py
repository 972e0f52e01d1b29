"""The body of ``pantarhei forecast`` for trajectories on a grid: train, compare, forecast, show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pantarhei.data.trajectories import Trajectories, open_trajectories
from pantarhei.data.windows import split
from pantarhei.errors import RequestError, nearest
from pantarhei.files import atomic
from pantarhei.outcome import Outcome
from pantarhei.rollout import correlation, correlation_time, nrmse, persistence, rollout
from pantarhei.systems._field_figures import animate, error_figure, frames_figure
from pantarhei.systems.flow.surrogate import inputs_of
from pantarhei.systems.forecaster import FieldForecaster, Given, build
from pantarhei.systems.parameters import ParameterScale
from pantarhei.systems.sizes import weight_count, width_for
from pantarhei.systems.told import POINTS, Told

Array = NDArray[np.float32]
MODELS = (
    "sinenet", "unet", "unet-mod", "dil-resnet", "fno", "ffno", "neuralop-fno", *POINTS,
)  # fmt: skip
_LEAST = 1e-3  # of a channel's standard deviation: members that agree are not certain


@dataclass(frozen=True)
class Plan:
    """How large the models are, how they are trained, and how far they are run."""

    horizon: int | None
    history: int
    members: int
    steps: int
    batch_size: int
    lr: float
    parameters: int
    padding: str
    coverage: float
    cases: int
    seed: int
    device: str
    quiet: bool
    tell: bool = True


@dataclass(frozen=True)
class Parts:
    """Trajectories to train on, to calibrate on and to test on; the latter may be another set's."""

    data: Trajectories
    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    held: Trajectories
    test: NDArray[np.int64]
    horizon: int
    columns: tuple[int, ...]  # of the parameters that the models are told
    mask: bool  # whether they are told where the fluid is

    @property
    def given(self) -> tuple[Given, ...]:
        """What stands beside the frames in a batch."""
        parts: tuple[tuple[Given, Any], ...] = (("parameters", self.columns), ("mask", self.mask))
        return tuple(name for name, there in parts if there)

    @property
    def told(self) -> str:
        """What the models are told beside the frames, in words."""
        names = [self.data.parameter_names[column] for column in self.columns]
        return ", ".join(names + ["mask"] * self.mask) or "nothing but the frames"


def forecast(
    path: str, test: str | None, model: str, baselines: Sequence[str], plan: Plan
) -> Outcome:
    """Train ``model`` and the baselines, run all forward on held-out trajectories, and compare."""
    for name in (model, *baselines):
        if name not in MODELS:
            raise RequestError(
                f"Unknown model '{name}': choose one of {', '.join(MODELS)}.{nearest(name, MODELS)}"
            )
    parts = _parts(path, test, plan)
    horizon = parts.horizon
    # all are made before the first is trained: what does not fit is said at once
    made = {name: _members(name, parts, plan) for name in dict.fromkeys((model, *baselines))}
    ensembles = {name: _train(name, members, parts, plan) for name, members in made.items()}
    one = ensembles[model][0]
    truth = parts.held.tensor(parts.test, plan.history, plan.history + horizon).numpy()
    start = parts.held.tensor(parts.test, 0, plan.history)
    given = one.told(parts.held, parts.test)
    told = {name: _run(group, start, horizon, given) for name, group in ensembles.items()}
    told |= _naive(start, horizon, one)
    errors = {name: _error(found.mean(0), truth, one) for name, found in told.items()}
    low, high, covered = _intervals(ensembles[model], parts, told[model], truth, plan)
    dt = parts.held.dt
    curves = [
        {"step": t + 1, "time": (t + 1) * dt, "coverage": float(covered[t])}
        | {name: float(error[t]) for name, error in errors.items()}
        for t in range(horizon)
    ]
    shown = told[model].mean(0)
    arrays = {"forecast": shown, "low": low, "high": high, "truth": truth, "cases": parts.test}
    return Outcome(
        f"Error of {', '.join(parts.held.channels)} (RMSE over the training data's deviation)",
        _rows(errors, told, truth, ensembles, dt),
        {
            "trained on": len(parts.train),
            "calibrated on": len(parts.validation),
            "tested on": len(parts.test),
            "members": plan.members,
            "models are told": parts.told,
            f"intervals meant to cover {plan.coverage:.0%} cover": f"{covered.mean():.1%}",
        },
        {"errors": curves},
        {
            "errors": lambda: error_figure(curves, list(errors), plan.coverage),
            "frames": lambda: frames_figure(truth[0], shown[0], parts.held),
        },
        {
            "forecast.npz": lambda to: _save_arrays(to, arrays, parts.held),
            "forecast.gif": lambda to: animate(to, truth[0], shown[0], dt),
            **{f"model-{j}": member.save for j, member in enumerate(ensembles[model])},
        },
    )


def _parts(path: str, test: str | None, plan: Plan) -> Parts:
    if path.lower().endswith((".csv", ".csv.gz", ".tsv", ".parquet", ".pq")):
        raise RequestError(
            f"'{path}' is a table: forecast it with pantarhei forecast-series {path} --target NAME."
        )
    data = open_trajectories(path)
    if len(data.shape) < 4:
        raise RequestError(
            f"'{path}' holds series without a grid, (case, time, channel): "
            "forecast a table of them with pantarhei forecast-series."
        )
    if len(data) < (2 if test else 3):
        raise RequestError(
            f"'{path}' holds {len(data)} trajectories, and training, calibration and testing need "
            "one each: give more, or cut a long one into several."
        )
    held = open_trajectories(test) if test else data
    if held.shape[2:] != data.shape[2:] or held.channels != data.channels:
        raise RequestError(
            f"'{test}' has channels {held.channels} on {held.shape[3:]}, and '{path}' "
            f"{data.channels} on {data.shape[3:]}: give sets of the same."
        )
    frames = min(held.length(case) for case in range(len(held)))
    horizon = frames - plan.history if plan.horizon is None else plan.horizon
    if horizon < 1 or plan.history < 1 or plan.history + horizon > frames:
        raise RequestError(
            f"--history {plan.history} and a --horizon of {max(horizon, 1)} need trajectories of "
            f"{plan.history + max(horizon, 1)} frames, and the shortest has {frames}: ask for less."
        )
    if plan.members < 1 or plan.steps < 1 or not 0 < plan.coverage < 1:
        raise RequestError(
            "--members and --steps are 1 or more, and --coverage is between 0 and 1."
        )
    if test:
        train, validation = split(len(data), (0.85, 0.15), plan.seed)
        tested = np.arange(len(held))
    else:
        train, validation, tested = split(len(data), (0.7, 0.1, 0.2), plan.seed)
    columns, mask = _worth_telling(data, train) if plan.tell else ((), False)
    if columns and held.parameter_names != data.parameter_names:
        raise RequestError(
            f"The cases of '{path}' have the parameters {', '.join(data.parameter_names)}, and "
            f"those of '{test}' {', '.join(held.parameter_names) or 'none'}: give the same, or "
            "--no-tell."
        )
    return Parts(data, train, validation, held, tested[: plan.cases], horizon, columns, mask)


def _worth_telling(data: Trajectories, train: NDArray[np.int64]) -> tuple[tuple[int, ...], bool]:
    """Return the columns of parameters that differ among the training cases, and if a mask does.

    Of a simulator's the problem's own; a mask that is one everywhere says nothing.
    """
    columns: tuple[int, ...] = ()
    if data.parameters is not None:
        own, table = inputs_of(data), data.parameters[train]
        columns = tuple(
            i
            for i, name in enumerate(data.parameter_names)
            if name in own and np.ptp(table[:, i]) > 1e-9 * np.abs(table[:, i]).max()
        )
    return columns, data.mask is not None and not data.masks()[train].all()


def _model(net: str, arguments: Mapping[str, Any], planes: bool, parts: Parts) -> nn.Module:
    if not parts.given and net not in POINTS:
        return build(net, **arguments)
    told = Told(net, parts.columns, parts.mask, as_channels=planes, **arguments)
    if parts.columns:
        assert parts.data.parameters is not None
        table = parts.data.parameters[parts.train]
        told.scale = ParameterScale.of(table[:, parts.columns])
    return told


def _levels_and_waves(name: str, parts: Parts) -> dict[str, Any]:
    space = parts.data.shape[3:]
    return {
        # the coarsest level keeps four cells along the shortest axis
        "levels": max(1, min(4, int(math.log2(min(space) / 4)))),
        "waves": 4 if name == "sinenet" else 1,
        "disentangle": name == "sinenet",
        "space": len(space),
    }


def _tells_by_planes(name: str, parts: Parts, plan: Plan) -> bool:
    """Whether a network is told by channels: a SineNet is where embeddings leave it no room."""
    from pantarhei.systems.sinenet import parameter_count

    if name != "sinenet" or not parts.columns:
        return name == "unet"
    fields = parts.data.shape[2]
    shape = _levels_and_waves(name, parts) | {"width": 4, "conditions": len(parts.columns)}
    return parameter_count(fields * plan.history, fields, 1.4, **shape) > plan.parameters


def _arguments(name: str, parts: Parts, plan: Plan) -> tuple[str, dict[str, Any]]:
    """Return the name of a network to build, and its arguments without what it is told."""
    fields, space = parts.data.shape[2], parts.data.shape[3:]
    inputs = fields * plan.history
    if name in POINTS:
        if len(space) != 2 or (name == "auto-edeeponet" and not parts.columns):
            raise RequestError(
                f"{name} forecasts fields on two axes"
                f"{' of cases with parameters' if name == 'auto-edeeponet' else ''}: these have "
                f"{len(space)} axes, and {len(parts.columns)} parameters that differ."
            )
        points: dict[str, Any] = {"channels": fields, "grid": space, "history": plan.history}
        width = width_for(
            plan.parameters,
            lambda w: Told(name, parts.columns, parts.mask, width=w, **points),
        )
        return name, points | {"width": width}
    if name in ("sinenet", "unet"):
        from pantarhei.systems.sinenet import multiplier, parameter_count

        # what tells a network is a part of its size
        told = {"conditions": len(parts.columns), "mask": parts.mask}
        planes = _tells_by_planes(name, parts, plan)
        seen = inputs + sum(told.values()) * planes
        counted: dict[str, Any] = {} if planes else told
        shape = _levels_and_waves(name, parts)

        def least(width: int) -> int:
            return parameter_count(seen, fields, 1.4, width=width, **shape, **counted)

        # the widest whose channels can still grow by half a level, as the paper's family does
        widths = [w for w in (4, 8, 12, 16, 24, 32, 48, 64) if least(w) <= plan.parameters]
        if not widths:
            raise RequestError(
                f"--parameters {plan.parameters} are too few for a {name} of this grid: give "
                f"{least(4)} or more."
            )
        shape["width"] = widths[-1]
        return "sinenet", {
            "in_ch": inputs, "out_ch": fields, "padding": plan.padding,
            "mult": multiplier(seen, fields, plan.parameters, **shape, **counted),
            "wave_residual": name == "sinenet", **shape,
        }  # fmt: skip
    if name == "unet-mod" and plan.padding != "zeros":
        raise RequestError("unet-mod pads with zeros alone: leave --padding, or take unet.")
    modes = min(space) // 3
    kinds: dict[str, dict[str, Any]] = {
        "unet-mod": {},
        "dil-resnet": {"padding": plan.padding},
        "fno": {"modes": modes},
        "ffno": {"modes": modes, "layers": 8},
        "neuralop-fno": {"modes": modes},
    }
    own = {"out_ch": fields, "space": len(space), **kinds[name]}
    seen = inputs + len(parts.columns) + parts.mask
    width = width_for(plan.parameters, lambda w: build(name, in_ch=seen, width=w, **own))
    return name, {"in_ch": inputs, "width": width, **own}


def _members(name: str, parts: Parts, plan: Plan) -> list[nn.Module]:
    made = []
    net, arguments = _arguments(name, parts, plan)
    planes = _tells_by_planes(name, parts, plan)
    for member in range(plan.members):
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed + member)
            model = _model(net, arguments, planes, parts)
        if len(parts.data.shape) == 5 and name in ("sinenet", "unet", "unet-mod", "dil-resnet"):
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        made.append(model)
    return made


def _train(
    name: str, members: Sequence[nn.Module], parts: Parts, plan: Plan
) -> list[FieldForecaster]:
    group = []
    for member, model in enumerate(members):
        one = FieldForecaster.of(
            model, parts.data, parts.train, history=plan.history, given=parts.given
        )
        windows = sum(max(0, parts.data.length(int(c)) - plan.history) for c in parts.train)
        one.train(
            parts.data,
            parts.train,
            parts.validation,
            steps=plan.steps,
            batch_size=max(1, min(plan.batch_size, windows)),
            lr=plan.lr,
            schedule="cosine",
            warmup=plan.steps // 20,
            seed=plan.seed + member,
            device=plan.device,
            label=f"{name}, member {member + 1} of {plan.members}",
            quiet=plan.quiet,
        )
        group.append(one)
    return group


def _run(
    group: Sequence[FieldForecaster], start: Tensor, steps: int, given: Sequence[Tensor]
) -> Array:
    """Return the members' forecasts in physical units, (members, case, step, C, *space)."""
    found = np.full((len(group), len(start), steps, *start.shape[2:]), np.nan, np.float32)
    for member, one in zip(found, group, strict=True):
        for first in range(0, len(start), 32):
            some = slice(first, first + 32)
            kept = one.forecast(start[some], steps, *(t[some] for t in given)).kept.numpy()
            member[some, : kept.shape[1]] = kept
    return found


def _naive(start: Tensor, steps: int, one: FieldForecaster) -> dict[str, Array]:
    """Return what needs no training, (1, case, step, C, *space): the last state, and the mean."""
    last = rollout(persistence, start, steps, layout="window").kept.numpy()
    mean = np.asarray(one.statistics.mean, np.float32)
    mean = mean.reshape(-1, *(1,) * one.statistics.space)
    return {
        "persistence": last[None],
        "training mean": np.broadcast_to(mean, (1, *last.shape)),
    }


def _error(forecast: Array, truth: Array, one: FieldForecaster) -> NDArray[np.float64]:
    """Return the error of every step, (T,): NaN from the step on where every case blew up."""
    scale = torch.as_tensor(one.statistics.sd)
    steps = [
        nrmse(torch.from_numpy(np.ascontiguousarray(forecast[:, t])).double(),
              torch.from_numpy(truth[:, t]).double(), scale).nanmean()
        for t in range(truth.shape[1])
    ]  # fmt: skip
    return np.array([float(step) for step in steps])


def _intervals(
    group: Sequence[FieldForecaster], parts: Parts, told: Array, truth: Array, plan: Plan
) -> tuple[Array, Array, NDArray[np.float64]]:
    r"""Return the ends of the intervals, and what share of the test cells each step's contain.

    :math:`\bar y \pm q_{t,c}\, (s + \epsilon)`: mean and deviation of the members, and the factor
    by which, on the validation trajectories, the wanted share of all cells of that step and channel
    is inside (split conformal prediction; a lone member has s = 0).
    """
    whole = slice(plan.history, plan.history + parts.horizon)
    cases = parts.validation[: plan.cases]
    known = parts.data.tensor(cases, whole.start, whole.stop, repeat_last=True).numpy()
    start = parts.data.tensor(cases, 0, plan.history)
    floor = _LEAST * np.asarray(group[0].statistics.sd, np.float32)
    floor = floor.reshape(-1, *(1,) * group[0].statistics.space)

    def centre(found: Array) -> tuple[Array, Array]:
        spread = found.std(0, ddof=1) if len(found) > 1 else np.zeros_like(found[0])
        return found.mean(0), spread + floor

    given = group[0].told(parts.data, cases)
    mean, spread = centre(_run(group, start, parts.horizon, given))
    scores = np.moveaxis(np.abs(known - mean) / spread, (1, 2), (0, 1))
    q = np.nanquantile(scores.reshape(*scores.shape[:2], -1), plan.coverage, axis=2)
    mean, spread = centre(told)
    reach = spread * q.astype(np.float32).reshape(1, *q.shape, *(1,) * group[0].statistics.space)
    inside = np.abs(truth - mean) <= reach
    return mean - reach, mean + reach, np.moveaxis(inside, 1, 0).reshape(len(q), -1).mean(1)


def _rows(
    errors: Mapping[str, NDArray[np.float64]],
    told: Mapping[str, Array],
    truth: Array,
    ensembles: Mapping[str, Sequence[FieldForecaster]],
    dt: float,
) -> list[dict[str, Any]]:
    reference = errors["persistence"].mean()
    sizes = {name: weight_count(group[0].model) for name, group in ensembles.items()}
    rows = []
    for name, error in errors.items():
        mean = torch.from_numpy(np.ascontiguousarray(told[name].mean(0)))
        steps = torch.from_numpy(truth)
        alike = correlation(mean.flatten(0, 1), steps.flatten(0, 1)).mean(1).view(truth.shape[:2])
        rows.append(
            {
                "model": name,
                "parameters": sizes.get(name),
                "step 1": error[0],
                f"step {len(error)}": error[-1],
                "mean": error.mean(),
                "skill over persistence": 1 - error.mean() / reference,
                "time correlated (0.8)": float(correlation_time(alike, dt).mean()),
                "blown up": int((~np.isfinite(told[name].mean(0)[:, -1])).reshape(
                    len(truth), -1).any(1).sum()),
            }
        )  # fmt: skip
    return rows


def _save_arrays(path: Path, arrays: Mapping[str, Any], data: Trajectories) -> None:
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, allow_pickle=False, dt=data.dt, channels=np.array(data.channels), **arrays
        )
