"""The job behind ``pantarhei forecast-series``: a user's table in, skill and forecasts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pantarhei.bayes import Predictive
from pantarhei.data.recordings import read_recordings
from pantarhei.data.series import (
    Amplitude,
    Feature,
    Frames,
    Last,
    Layout,
    Mean,
    Recording,
    Windows,
    split_runs,
)
from pantarhei.errors import RequestError, nearest
from pantarhei.outcome import Outcome
from pantarhei.systems.series.baselines import linear, persistence, recurrent
from pantarhei.systems.series.forecaster import Forecaster, train_forecaster
from pantarhei.systems.series.scoring import lead_curve


def forecast_table(
    paths: Sequence[str],
    *,
    target: str,
    controls: Sequence[str] = (),
    amplitudes: Sequence[str] = (),
    ignore: Sequence[str] = (),
    time: str = "time",
    run: str | None = None,
    step: float | None = None,
    history: int = 10,
    horizon: int = 10,
    leads: Sequence[int] = (),
    test: Sequence[str] = (),
    share: float = 0.25,
    members: int = 10,
    epochs: int = 40,
    gru: bool = True,
    device: str = "auto",
    seed: int = 0,
    quiet: bool = False,
) -> Outcome:
    """Train on a user's runs, compare with the baselines on held-back runs, forecast onwards.

    See the command for what the options mean. A table of one run is cut in two in time.
    """
    if not 0 < share < 1:
        raise RequestError(f"The share of test runs lies between 0 and 1, not at {share}.")
    recordings = list(read_recordings(list(paths), time, run))
    layout = layout_for(recordings, target, controls, amplitudes, ignore, step)
    frames = layout.all_frames(recordings)
    early, late = _split(frames, test, share, seed)
    train, unseen = (Windows(part, history, horizon) for part in (early, late))
    ahead = tuple(sorted(set(leads))) or _leads(horizon)
    options: dict[str, Any] = {
        "leads": ahead, "epochs": epochs, "seed": seed, "device": device, "quiet": quiet,
    }  # fmt: skip
    found = train_forecaster(layout, train, members=members, **options)
    told = {
        "persistence": persistence(train, unseen, ahead),
        "linear autoregression": linear(layout, train, unseen, ahead),
    }
    if gru:
        network = recurrent(layout, history)
        one = train_forecaster(
            layout, train, members=1, anchored=False, all_lags=True, network=network,
            together=False, label="GRU", **options,
        )  # fmt: skip
        told["GRU"] = one.forecast(unseen)
    told["ensemble"] = found.forecast(unseen)
    return _outcome(layout, found, told, unseen, train, frames)


def layout_for(
    recordings: Sequence[Recording],
    target: str,
    controls: Sequence[str] = (),
    amplitudes: Sequence[str] = (),
    ignore: Sequence[str] = (),
    step: float | None = None,
) -> Layout:
    """Choose a feature for every column: mean where it is sampled faster than a frame, else last.

    ``amplitudes`` are oscillations, seen by their log amplitude. A frame lasts ``step`` seconds,
    the median sampling interval of the target unless given. A sensor that is silent for three of
    its intervals counts as missing.
    """
    names = list(dict.fromkeys(name for one in recordings for name in one.signals))
    for name in (target, *controls, *amplitudes, *ignore):
        if name not in names:
            raise RequestError(
                f"There is no column '{name}': choose of {', '.join(names)}.{nearest(name, names)}"
            )
    if target in (*controls, *ignore):
        raise RequestError(f"'{target}' is the target: it is not known in advance, nor ignored.")
    pace = {name: _interval(recordings, name) for name in names}
    if step is None and target in amplitudes:
        raise RequestError(f"'{target}' is an oscillation: give --step, a frame's length in s.")
    frame = pace[target] if step is None else step
    if not frame > 0 or frame < 0.999 * pace[target]:
        raise RequestError(
            f"A frame of {frame:g} s is shorter than '{target}' is sampled, {pace[target]:g} s."
        )

    def feature(name: str) -> Feature:
        if name in amplitudes:
            return Amplitude(name)
        if pace[name] < 0.75 * frame:
            return Mean(name)
        # what is to be forecast must have been measured in its frame
        return Last(
            name, hold=0.999 * frame if name == target else max(3 * pace[name], 1.5 * frame)
        )

    inputs = tuple(feature(n) for n in names if n not in (*controls, *ignore))
    return Layout(frame, inputs, tuple(Last(name) for name in controls), (feature(target),))


def onwards(found: Forecaster, frames: Frames) -> tuple[float, Predictive] | None:
    """Forecast from the last frame of a run in which its target was seen; None where it is short.

    Controls that are planned beyond the sensors' last sample are used, the last one is held after.
    """
    encoder = found.encoder
    seen = np.flatnonzero(np.isfinite(frames.targets).all(1))
    if not len(seen) or seen[-1] + 1 < encoder.history:
        return None
    k = int(seen[-1])
    past = torch.from_numpy(frames.inputs[k + 1 - encoder.history : k + 1])[None]
    plan = np.minimum(k + 1 + np.arange(encoder.horizon), len(frames.times) - 1)
    return float(frames.times[k]), found.at(past, torch.from_numpy(frames.controls[plan])[None])


def _interval(recordings: Sequence[Recording], name: str) -> float:
    """Return the median sampling interval of a channel over the runs that have it."""
    found = []
    for one in recordings:
        if name in one.signals:
            signal = one[name]
            start, end = signal.span
            steps = np.diff(signal.times) if signal.times is not None else [1 / (signal.rate or 1)]
            found.append(float(np.median(steps)) if len(steps) else end - start)
    return float(np.median(found))


def _leads(horizon: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(horizon * part / 6)) for part in range(1, 7)} | {1}))


def _split(
    frames: Sequence[Frames], test: Sequence[str], share: float, seed: int
) -> tuple[list[Frames], list[Frames]]:
    """Hold runs back, or the end of the only one."""
    if len(frames) > 1:
        names, held = split_runs([f.run for f in frames], list(test) or share, seed)
        return [f for f in frames if f.run in names], [f for f in frames if f.run in held]
    if test:
        raise RequestError("There is one run only: its end is held back, no run can be.")
    one, cut = frames[0], round((1 - share) * len(frames[0].times))

    def part(where: slice) -> Frames:
        return replace(
            one, times=one.times[where], inputs=one.inputs[where], controls=one.controls[where],
            targets=one.targets[where],
        )  # fmt: skip

    return [part(slice(0, cut))], [part(slice(cut, None))]


def _outcome(
    layout: Layout,
    found: Forecaster,
    told: Mapping[str, Predictive],
    unseen: Windows,
    train: Windows,
    frames: Sequence[Frames],
) -> Outcome:
    from pantarhei.systems.series.figures import calibration_figure, lead_figure, run_figure

    y = unseen.tensors()[2][:, [lead - 1 for lead in found.leads]]
    curves = {name: lead_curve(one, y, found.leads, layout.step) for name, one in told.items()}
    still = [row["rmse"] for row in curves["persistence"]]
    table = [
        {
            "method": name,
            "seconds": row["seconds"],
            "rmse": row["rmse"],
            "skill": 1 - row["rmse"] / base if base > 0 else float("nan"),
            "nll": row["nll"],
            "crps": row["crps"],
            "coverage": row["coverage"],
        }
        for name, rows in curves.items()
        for row, base in zip(rows, still, strict=True)
    ]
    name = layout.names("targets")[0]
    ensemble, last = told["ensemble"], len(found.leads) - 1
    first = unseen.run == unseen.run[0]
    seconds = found.leads[last] * layout.step
    best = min(curves, key=lambda method: sum(row["nll"] for row in curves[method]))
    return Outcome(
        f"{name}: error on {len(unseen)} windows of runs that training has not seen",
        table,
        {
            "target": name,
            "frame_in_seconds": layout.step,
            "training_windows": len(train),
            "test_windows": len(unseen),
            "windows_without_a_target": train.dropped + unseen.dropped,
            "lowest_NLL": best,
        },
        {
            "predictions": _predictions(found, ensemble, unseen, y, layout.step),
            "onwards": _onwards(found, frames, layout.step),
            "lead-times": [{"method": n, **row} for n, rows in curves.items() for row in rows],
        },
        {
            "lead-times": lambda: lead_figure(curves, name),
            "forecast": lambda: run_figure(
                unseen.times[first] + seconds,
                y[first, last, 0],
                ensemble[first, last, 0],
                label=name,
                title=f"{unseen.frames[0].run}, forecast {seconds:g} s ahead",
            ),
            "calibration": lambda: calibration_figure(
                {n: one.pit(y) for n, one in told.items()}, "all lead times"
            ),
        },
        {"model": found.save},
    )


def _predictions(
    found: Forecaster, told: Predictive, windows: Windows, y: torch.Tensor, step: float
) -> list[dict[str, Any]]:
    """Return a row for each window and lead."""
    columns = _columns(told)
    times, runs = windows.times.tolist(), windows.run.tolist()
    return [
        {
            "run": windows.frames[run].run,
            "made_at": round(made, 9),
            "time": round(made + lead * step, 9),
            **{key: float(values[i, k]) for key, values in columns.items()},
            "came": float(y[i, k, 0]),
        }
        for i, (made, run) in enumerate(zip(times, runs, strict=True))
        for k, lead in enumerate(found.leads)
    ]


def _onwards(found: Forecaster, frames: Sequence[Frames], step: float) -> list[dict[str, Any]]:
    """Return the forecasts from the end of every run."""
    rows = []
    for run in frames:
        if (ahead := onwards(found, run)) is not None:
            made, told = ahead
            columns = _columns(told)
            rows += [
                {
                    "run": run.run,
                    "made_at": round(made, 9),
                    "time": round(made + lead * step, 9),
                    **{key: float(values[0, k]) for key, values in columns.items()},
                }
                for k, lead in enumerate(found.leads)
            ]
    return rows


def _columns(told: Predictive) -> dict[str, torch.Tensor]:
    low, high = told.interval(0.95)
    columns = {
        "mean": told.mean, "low": low, "high": high, "sd": told.variance.sqrt(),
        "epistemic_sd": told.epistemic.sqrt(), "aleatoric_sd": told.aleatoric.sqrt(),
    }  # fmt: skip
    return {key: values[..., 0] for key, values in columns.items()}
