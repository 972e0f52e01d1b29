r"""Recordings of many sensors, each with a sampling rate of its own, as windows to learn from.

A *recording* is one run of an experiment: named signals with times in seconds. Features bring them
to *frames* of one length: frame k ends at :math:`t_k` and sees samples up to :math:`t_k` only, so
that nothing from the future enters a forecast made at :math:`t_k`. *Windows* then hold, for a
forecast made at the end of a frame, the history of the inputs, the controls that are planned for
the frames to come, and the targets in these frames. Runs are never cut in two by a split, and
scales come from training runs alone.

:mod:`pantarhei.data.recordings` reads a user's files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pantarhei.errors import RequestError, nearest

Array = NDArray[np.float64]
Floats = NDArray[np.float32]

_EDGE = 1e-6  # of a sampling interval: a sample this close after a frame's end belongs to it


@dataclass(frozen=True)
class Signal:
    """Samples of one sensor, (T,): evenly spaced (``rate`` in Hz from ``start``), or at ``times``.

    Raises :class:`RequestError` for times that do not increase and values that are infinite. NaN
    stands for a sample that is missing.

    >>> Signal(np.arange(5.0), rate=10.0).count(np.array([0.05, 0.1, 9.0])).tolist()
    [1, 2, 5]
    """

    values: NDArray[np.floating]
    rate: float | None = None
    times: Array | None = None
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or not len(self.values):
            raise RequestError(f"A signal is one row of samples, not of shape {self.values.shape}.")
        if np.isinf(self.values).any():
            at = int(np.isinf(self.values).argmax())
            raise RequestError(f"A signal is infinite at sample {at}: mend it, or leave it empty.")
        if (self.rate is None) == (self.times is None):
            raise RequestError("A signal has a rate, or a time for every sample.")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise RequestError(f"A sampling rate is above 0 Hz, not {self.rate}.")
        if self.times is None:
            return
        if self.times.shape != self.values.shape:
            raise RequestError(
                f"A signal has {len(self.values)} samples and {len(self.times)} times."
            )
        steps = np.diff(self.times)
        if not np.isfinite(self.times).all() or not (steps > 0).all():
            at = int((~(steps > 0)).argmax()) + 1 if len(steps) else 0
            raise RequestError(
                f"Times must increase, and do not at sample {at} (t = {self.times[at]:g} s): sort "
                "them and drop duplicates."
            )

    @property
    def span(self) -> tuple[float, float]:
        """The times of the first and the last sample, in seconds."""
        if self.times is not None:
            return float(self.times[0]), float(self.times[-1])
        assert self.rate is not None
        return self.start, self.start + (len(self.values) - 1) / self.rate

    def count(self, ends: Array) -> NDArray[np.int64]:
        """Return how many samples lie at or before each of ``ends``."""
        if self.times is not None:
            step = np.diff(self.times).min() if len(self.times) > 1 else 1.0
            return np.searchsorted(self.times, ends + _EDGE * step, "right").astype(np.int64)
        assert self.rate is not None
        found = np.floor((ends - self.start) * self.rate + _EDGE).astype(np.int64) + 1
        return np.clip(found, 0, len(self.values))

    def time_of(self, index: NDArray[np.int64]) -> Array:
        """Return the times of samples."""
        if self.times is not None:
            return self.times[index]
        assert self.rate is not None
        return self.start + index / self.rate


@dataclass(frozen=True)
class Recording:
    """One run: its ``name`` and its ``signals``."""

    name: str
    signals: Mapping[str, Signal]

    def __getitem__(self, channel: str) -> Signal:
        if channel not in self.signals:
            raise RequestError(
                f"Run '{self.name}' has no channel '{channel}': it has "
                f"{', '.join(sorted(self.signals))}.{nearest(channel, self.signals)}"
            )
        return self.signals[channel]


class Feature(Protocol):
    """What turns samples into the columns of a frame.

    ``group`` names what it belongs to for ablations: its channel, or the ``sensor`` given. ``lags``
    is how many of the last frames a forecaster sees (None: the whole window). A call returns
    (frames, columns).
    """

    @property
    def lags(self) -> int | None:
        """How many of the last frames a forecaster sees."""

    @property
    def group(self) -> str:
        """The sensor that the columns come from."""

    @property
    def names(self) -> tuple[str, ...]:
        """One name for each column."""

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the columns of the frames that end at ``ends`` and last ``step`` seconds."""


class _OfOneChannel:
    """What features of one channel have in common: the sensor that they are a part of."""

    channel: str
    sensor: str

    @property
    def group(self) -> str:
        """The sensor."""
        return self.sensor or self.channel


@dataclass(frozen=True)
class Last(_OfOneChannel):
    """The last sample that is not missing, no more than ``hold`` seconds old; otherwise NaN."""

    channel: str
    hold: float = math.inf
    lags: int | None = None
    sensor: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """One column."""
        return (self.channel,)

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the samples that were held."""
        signal = recording[self.channel]
        there = np.flatnonzero(~np.isnan(signal.values))
        before = np.searchsorted(there, signal.count(ends), "left")
        found = np.full(len(ends), np.nan)
        ok = before > 0
        index = there[before[ok] - 1] if len(there) else np.array([], np.int64)
        found[ok] = signal.values[index]
        found[ok] = np.where(
            ends[ok] - signal.time_of(index) <= self.hold * (1 + 1e-9), found[ok], np.nan
        )
        return found[:, None]


@dataclass(frozen=True)
class Mean(_OfOneChannel):
    """The mean of a frame's samples, NaN where it has none."""

    channel: str
    lags: int | None = None
    sensor: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """One column."""
        return (self.channel,)

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the means."""
        signal = recording[self.channel]
        return _mean(signal, signal.values, ends, step)[:, None]


@dataclass(frozen=True)
class Amplitude(_OfOneChannel):
    r"""The amplitude :math:`a=\sqrt{2\,\overline{x^2}}` of an oscillation over a frame.

    With ``log`` its logarithm. ``band`` (low, high) in Hz filters before, causally (Butterworth of
    order 4). ``floor`` is the sensor's resolution, in its units: less is read as that much, so that
    a dead sensor is an odd number and not minus infinity.
    """

    channel: str
    log: bool = True
    band: tuple[float, float] | None = None
    floor: float = 1e-2
    lags: int | None = None
    sensor: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """One column."""
        return (f"log amplitude of {self.channel}" if self.log else f"amplitude of {self.channel}",)

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the amplitudes."""
        signal = recording[self.channel]
        x = np.asarray(signal.values, np.float64)
        if self.band is not None:
            from scipy.signal import butter, sosfilt

            rate = _even(signal, self.channel, recording)
            if not 0 < self.band[0] < self.band[1] < rate / 2:
                raise RequestError(
                    f"A band of {self.band} Hz does not fit {rate:g} Hz: stay below half of that."
                )
            x = sosfilt(butter(4, self.band, "bandpass", fs=rate, output="sos"), x)
        amplitude = np.sqrt(2 * _mean(signal, x**2, ends, step))
        amplitude = np.maximum(amplitude, self.floor)  # NaN stays
        return (np.log(amplitude) if self.log else amplitude)[:, None]


@dataclass(frozen=True)
class Spectrum(_OfOneChannel):
    r"""Log power in ``bins`` bands of ``width`` Hz around ``centre``, over the last ``window`` s.

    Periodogram with a Hann window, normalised so that a sine of amplitude a has the power
    :math:`a^2/2` in all of its lines together; ``floor``, an amplitude, is the sensor's resolution.
    NaN until there is a whole window. It looks back itself, so one frame of it is seen.
    """

    channel: str
    centre: float
    bins: int = 12
    width: float = 13.0
    window: float = 0.3
    floor: float = 1e-2
    lags: int | None = 1
    sensor: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """One column for each band."""
        low = self.centre - self.bins * self.width / 2
        return tuple(
            f"log power of {self.channel} at {low + (i + 0.5) * self.width:g} Hz"
            for i in range(self.bins)
        )

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the log powers."""
        signal = recording[self.channel]
        rate = _even(signal, self.channel, recording)
        length = round(self.window * rate)
        low = self.centre - self.bins * self.width / 2
        lines = np.arange(math.ceil(low * length / rate), length // 2 + 1)
        band = np.floor((lines * rate / length - low) / self.width).astype(int)
        lines, band = (
            lines[(band >= 0) & (band < self.bins)],
            band[(band >= 0) & (band < self.bins)],
        )
        if low < 0 or len(np.unique(band)) < self.bins:
            raise RequestError(
                f"{self.bins} bands of {self.width:g} Hz around {self.centre:g} Hz do not fit a "
                f"window of {self.window:g} s at {rate:g} Hz: widen the bands or the window."
            )
        hann = np.hanning(length + 1)[:-1]
        phase = 2 * np.pi * np.outer(np.arange(length), lines) / length
        waves = np.hstack([np.cos(phase), np.sin(phase)]) * hann[:, None]
        waves = (waves / math.sqrt((hann**2).sum() * length / 2)).astype(np.float32)
        found = np.full((len(ends), self.bins), np.nan)
        stop = signal.count(ends)
        whole = np.flatnonzero(stop >= length)
        if not len(whole):
            return found
        x = np.asarray(signal.values, np.float32)
        sliding = np.lib.stride_tricks.sliding_window_view(x, length)
        for part in np.array_split(whole, math.ceil(len(whole) / 256)):  # 256 windows at a time
            parts = sliding[stop[part] - length] @ waves
            power = (parts**2).reshape(len(part), 2, -1).sum(1)
            found[part] = power @ np.eye(self.bins, dtype=np.float32)[band]
        return np.log(np.maximum(found, self.floor**2 / 2))


@dataclass(frozen=True)
class Decay(_OfOneChannel):
    r"""The damping rate in 1/s that the envelope of a noise-driven mode shows over ``window`` s.

    A quiet mode forgets as :math:`e^{-|\nu|\tau}`; with the complex envelope z at ``centre`` Hz,
    means of single periods,

    .. math:: \hat\nu = -\tfrac1\tau \log\bigl|\langle z_t z^*_{t-\tau}\rangle /
              \langle|z_t|^2\rangle\bigr|, \qquad \tau = \mathrm{lag},

    which falls towards 0 as an instability nears. NaN until there is a whole window. It looks back
    itself, so one frame of it is seen.
    """

    channel: str
    centre: float
    window: float = 0.3
    lag: float = 0.01
    lags: int | None = 1
    sensor: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """One column."""
        return (f"damping of {self.channel}",)

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the rates."""
        signal = recording[self.channel]
        rate = _even(signal, self.channel, recording)
        period = max(1, round(rate / self.centre))
        count = len(signal.values) // period
        length, lag = (round(seconds * rate / period) for seconds in (self.window, self.lag))
        if not 0 < self.centre <= rate / 2 or not 1 <= lag < length:
            raise RequestError(
                f"A window of {self.window:g} s and a lag of {self.lag:g} s at {self.centre:g} Hz "
                f"do not fit a rate of {rate:g} Hz: the lag is a period or more, the window longer."
            )
        turn = np.exp(-2j * np.pi * self.centre * np.arange(count * period) / rate)
        z = (signal.values[: count * period] * turn).reshape(count, period).mean(1)
        product, power = z[lag:] * z[:-lag].conj(), np.abs(z) ** 2
        products, powers = (np.concatenate([[0], np.cumsum(x)]) for x in (product, power))
        stop = np.minimum(signal.count(ends) // period, count)
        found = np.full((len(ends), 1), np.nan)
        whole = stop >= length
        last = stop[whole]
        shared = products[last - lag] - products[last - length]
        total = powers[last] - powers[last - length]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.abs(shared) / (length - lag) / (total / length)
            found[whole, 0] = -np.log(np.clip(ratio, 1e-3, None)) / self.lag
        return found


@dataclass(frozen=True)
class Raw(_OfOneChannel):
    """The last ``samples`` samples as they are, for a network that reads the signal itself.

    NaN until there are so many. They are seen of the last frame alone.
    """

    channel: str
    samples: int
    lags: int | None = 1
    sensor: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """One column for each sample, the oldest first."""
        return tuple(f"{self.channel}[{i}]" for i in range(-self.samples, 0))

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the samples."""
        signal = recording[self.channel]
        stop = signal.count(ends)
        found = np.full((len(ends), self.samples), np.nan)
        whole = stop >= self.samples
        found[whole] = signal.values[stop[whole, None] + np.arange(-self.samples, 0)]
        return found


@dataclass(frozen=True)
class Product:
    """The mean over a frame of the product of two signals of one rate: the Rayleigh index."""

    channel: str
    other: str
    lags: int | None = None
    sensor: str = ""

    @property
    def group(self) -> str:
        """Both sensors: neither has it alone."""
        return self.sensor or f"{self.channel} x {self.other}"

    @property
    def names(self) -> tuple[str, ...]:
        """One column."""
        return (f"mean of {self.channel} x {self.other}",)

    def __call__(self, recording: Recording, ends: Array, step: float) -> Array:
        """Return the mean products."""
        one, two = recording[self.channel], recording[self.other]
        if len(one.values) != len(two.values) or one.span != two.span:
            raise RequestError(
                f"'{self.channel}' and '{self.other}' of run '{recording.name}' are not sampled "
                "together: a product needs the same times."
            )
        return _mean(one, np.multiply(one.values, two.values, dtype=np.float64), ends, step)[
            :, None
        ]


FEATURES: dict[str, Any] = {
    kind.__name__: kind for kind in (Last, Mean, Amplitude, Spectrum, Decay, Raw, Product)
}
"""The features that a saved layout may name."""

_PARTS = ("inputs", "controls", "targets")


def _feature_to_json(feature: Any) -> dict[str, Any]:
    kind = type(feature).__name__
    if FEATURES.get(kind) is not type(feature):
        raise RequestError(
            f"A layout with features of your own ({kind}) is not kept: choose of "
            f"{', '.join(FEATURES)}."
        )
    own = {f.name: getattr(feature, f.name) for f in fields(feature)}
    usual = {f.name: f.default for f in fields(feature)}
    return {"kind": kind} | {name: value for name, value in own.items() if value != usual[name]}


def _feature_of_json(value: Mapping[str, Any]) -> Any:
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k != "kind"}
    return FEATURES[value["kind"]](**given)


@dataclass(frozen=True)
class Frames:
    """A run in frames: inputs (K, F), controls (K, C) and targets (K, G), which end at ``times``.

    The arrays may be memory maps: windows read what they need.
    """

    run: str
    times: Array
    inputs: Floats
    controls: Floats
    targets: Floats


@dataclass(frozen=True)
class Layout:
    """Which features are inputs, controls (known in advance) and targets, and a frame's ``step``.

    ``warmup`` seconds at the start of a run are left out, in which windows of features fill.

    >>> layout = Layout(0.5, inputs=(Last("p"), Last("q")), targets=(Last("p"),))
    >>> recording = Recording("a", {"p": Signal(np.arange(10.0), rate=10.0),
    ...                             "q": Signal(np.array([1.0, np.nan, 3.0]), rate=2.0)})
    >>> frames = layout.frames(recording)
    >>> frames.times.tolist(), frames.inputs.tolist()
    ([0.5, 1.0], [[5.0, 1.0], [9.0, 3.0]])
    """

    step: float
    inputs: tuple[Feature, ...]
    controls: tuple[Feature, ...] = ()
    targets: tuple[Feature, ...] = ()
    warmup: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads; features of one's own raise RequestError."""
        return {"step": self.step, "warmup": self.warmup} | {
            part: [_feature_to_json(feature) for feature in getattr(self, part)] for part in _PARTS
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Layout:
        """Rebuild a layout that was saved with a model."""
        try:
            parts = {part: tuple(map(_feature_of_json, value[part])) for part in _PARTS}
            return cls(float(value["step"]), warmup=float(value["warmup"]), **parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"This is no layout of features ({error}).") from error

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """The columns of the inputs that come from each sensor."""
        found: dict[str, list[int]] = {}
        column = 0
        for feature in self.inputs:
            for _ in feature.names:
                found.setdefault(feature.group, []).append(column)
                column += 1
        return {group: tuple(columns) for group, columns in found.items()}

    def seen(self, history: int) -> NDArray[np.bool_]:
        """Tell which of the last ``history`` frames is seen of each input column, (history, F)."""
        lags = [f.lags or history for f in self.inputs for _ in f.names]
        back = np.arange(history)[::-1, None]
        return back < np.array(lags, int)

    def names(self, part: str = "inputs") -> tuple[str, ...]:
        """Return the columns' names of ``inputs``, ``controls`` or ``targets``."""
        return tuple(name for feature in getattr(self, part) for name in feature.names)

    def frames(self, recording: Recording) -> Frames:
        """Bring a run to frames, from its first sample to its last."""
        spans = [s.span for s in recording.signals.values()]
        start, end = min(a for a, _ in spans) + self.warmup, max(b for _, b in spans)
        count = math.floor((end - start) / self.step + _EDGE)
        if not self.step > 0 or count < 1:
            raise RequestError(
                f"Run '{recording.name}' lasts {end - start:g} s: too short for a frame of "
                f"{self.step:g} s."
            )
        ends: Array = start + self.step * np.arange(1.0, count + 1)
        parts = [
            [feature(recording, ends, self.step) for feature in features]
            for features in (self.inputs, self.controls, self.targets)
        ]
        blocks = [
            np.concatenate(held or [np.empty((count, 0))], 1).astype(np.float32) for held in parts
        ]
        return Frames(recording.name, ends, *blocks)

    def all_frames(
        self, recordings: Iterable[Recording], cache: str | Path | None = None
    ) -> list[Frames]:
        """Bring runs to frames one after the other, each held in memory only meanwhile.

        With a ``cache`` folder the frames are kept there as ``.npy`` files and mapped, not loaded.
        """
        found = []
        for number, recording in enumerate(recordings):
            frames = self.frames(recording)
            if cache is not None:
                folder = Path(cache)
                folder.mkdir(parents=True, exist_ok=True)
                mapped = []
                for part in ("inputs", "controls", "targets"):
                    file = folder / f"{number}-{part}.npy"
                    np.save(file, getattr(frames, part))
                    empty = not getattr(frames, part).size  # an empty file cannot be mapped
                    mapped.append(getattr(frames, part) if empty else np.load(file, mmap_mode="r"))
                frames = Frames(frames.run, frames.times, *mapped)
            found.append(frames)
        return found


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation of columns: of training runs, missing values left out."""

    mean: Floats
    sd: Floats

    @classmethod
    def of(cls, arrays: Sequence[Floats]) -> Scaler:
        """Measure the columns of all ``arrays`` (K, F) together, one array at a time."""
        if not arrays:
            raise RequestError("There is no run to take scales from.")
        count, total, square = (np.zeros(arrays[0].shape[1]) for _ in range(3))
        for array in arrays:
            there = ~np.isnan(array)
            x = np.where(there, array, 0.0).astype(np.float64)
            count, total, square = count + there.sum(0), total + x.sum(0), square + (x**2).sum(0)
        mean = total / np.maximum(count, 1)
        sd = np.sqrt(np.maximum(square / np.maximum(count, 1) - mean**2, 0.0))
        flat = sd <= 1e-6 * np.maximum(np.abs(mean), 1e-6)  # a constant column says nothing
        return cls(mean.astype(np.float32), np.where(flat, 1.0, sd).astype(np.float32))

    def apply(self, x: Tensor) -> Tensor:
        """Standardise columns, the last dimension."""
        mean, sd = (torch.from_numpy(a).to(x.device) for a in (self.mean, self.sd))
        return (x - mean) / sd


@dataclass(frozen=True)
class Windows:
    """Every forecast that runs allow: a window ``history`` frames back and ``horizon`` ahead.

    Window i is made at the end of frame ``origin[i]`` of run ``run[i]``. It holds ``past``
    (history, F) up to and with that frame, ``future`` (horizon, C) controls of the frames after it,
    and ``target`` (horizon, G) there. Windows with a target that is missing are left out
    (``dropped`` says how many); missing inputs are NaN.

    ``stride`` takes every so many frames. Raises :class:`RequestError` where no window fits.

    >>> x = np.arange(6, dtype=np.float32)[:, None]
    >>> windows = Windows([Frames("a", x[:, 0].astype(float), x, 10 * x, x)], history=2, horizon=2)
    >>> past, future, target = windows.batch(torch.tensor([1]))
    >>> past.flatten().tolist(), future.flatten().tolist(), target.flatten().tolist()
    ([1.0, 2.0], [30.0, 40.0], [3.0, 4.0])
    """

    frames: Sequence[Frames]
    history: int
    horizon: int
    stride: int = 1
    run: Tensor = field(init=False)
    origin: Tensor = field(init=False)
    dropped: int = field(init=False)

    def __post_init__(self) -> None:
        if min(self.history, self.horizon, self.stride) < 1:
            raise RequestError("history, horizon and stride are 1 or more frames.")
        runs, origins, dropped = [], [], 0
        for number, frames in enumerate(self.frames):
            last = len(frames.times) - self.horizon
            places = np.arange(self.history - 1, last, self.stride)
            ahead = places[:, None] + np.arange(1, self.horizon + 1)
            there = np.isfinite(np.asarray(frames.targets)[ahead]).all((1, 2))
            dropped += int((~there).sum())
            origins.append(torch.from_numpy(places[there]))
            runs.append(torch.full((int(there.sum()),), number))
        if not runs or not sum(map(len, runs)):
            longest = max((len(f.times) for f in self.frames), default=0)
            raise RequestError(
                f"No window of {self.history} frames back and {self.horizon} ahead fits: the "
                f"longest run has {longest} frames, and {dropped} windows lack a target."
            )
        object.__setattr__(self, "run", torch.cat(runs))
        object.__setattr__(self, "origin", torch.cat(origins))
        object.__setattr__(self, "dropped", dropped)

    def __len__(self) -> int:
        return len(self.run)

    @property
    def present(self) -> Tensor:
        """The targets at the end of the windows' past, (N, G): what persistence forecasts."""
        found = torch.empty(len(self), self.frames[0].targets.shape[1])
        for number, frames in enumerate(self.frames):
            own = self.run == number
            found[own] = torch.from_numpy(frames.targets[self.origin[own].numpy()])
        return found

    @property
    def times(self) -> Tensor:
        """When each forecast is made, in seconds of its run."""
        return torch.from_numpy(
            np.array([self.frames[r].times[k] for r, k in zip(self.run, self.origin, strict=True)])
        )

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return past (B, history, F), future (B, horizon, C) and target (B, horizon, G)."""
        runs, origins = self.run[index].numpy(), self.origin[index].numpy()
        back = origins[:, None] + np.arange(1 - self.history, 1)
        ahead = origins[:, None] + np.arange(1, self.horizon + 1)
        first = self.frames[0]
        sizes = (
            (self.history, first.inputs.shape[1]),
            (self.horizon, first.controls.shape[1]),
            (self.horizon, first.targets.shape[1]),
        )
        past, future, target = (np.empty((len(runs), *size), np.float32) for size in sizes)
        for number in np.unique(runs):
            own, frames = runs == number, self.frames[number]
            past[own] = frames.inputs[back[own]]
            future[own] = frames.controls[ahead[own]]
            target[own] = frames.targets[ahead[own]]
        return torch.from_numpy(past), torch.from_numpy(future), torch.from_numpy(target)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return all windows at once."""
        return self.batch(torch.arange(len(self)))


def split_runs(
    names: Sequence[str], test: float | Sequence[str] = 0.25, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Split runs into training and test, whole: windows of one run resemble each other.

    ``test`` is a share, or the names of the runs to hold back.

    >>> split_runs(["a", "b", "c", "d"], test=["c"])
    (['a', 'b', 'd'], ['c'])
    """
    if len(set(names)) < len(names):
        raise RequestError("Two runs have one name: rename one.")
    if isinstance(test, float):
        order = np.random.default_rng(seed).permutation(len(names))
        held = {names[i] for i in order[: max(1, round(test * len(names)))]}
    else:
        held = set(test)
        if unknown := held - set(names):
            name = min(unknown)
            raise RequestError(f"There is no run '{name}' to hold back.{nearest(name, names)}")
    train = [name for name in names if name not in held]
    if not train or not held:
        raise RequestError(
            f"{len(names)} runs cannot be split into training and test: give two or more."
        )
    return train, [name for name in names if name in held]


def _mean(signal: Signal, x: NDArray[np.floating], ends: Array, step: float) -> Array:
    """Return the mean of x over the samples of each frame; one running sum for all frames."""
    there = ~np.isnan(x)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, x, 0.0), dtype=np.float64)])
    counts = np.concatenate([[0], np.cumsum(there)])
    low, high = signal.count(ends - step), signal.count(ends)
    number = counts[high] - counts[low]
    total = sums[high] - sums[low]
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _even(signal: Signal, channel: str, recording: Recording) -> float:
    """Return the rate of a signal that is sampled evenly."""
    if signal.rate is not None:
        return signal.rate
    assert signal.times is not None
    steps = np.diff(signal.times)
    if not len(steps) or np.ptp(steps) > 1e-3 * steps.mean():
        raise RequestError(
            f"'{channel}' of run '{recording.name}' is not sampled evenly: a spectrum or a filter "
            "needs one rate; use Mean or Last."
        )
    return float(1 / steps.mean())
