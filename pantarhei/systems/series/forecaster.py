r"""Probabilistic forecasts of sensor series by an ensemble of mean-variance networks.

*Direct*: one network answers for every lead time at once, from the past and the planned controls.
*Autoregressive*: it answers for the next frame alone, from the past and that frame's controls. Each
member draws paths, :math:`a_{t+1}\sim N(\mu_j, s_j^2)`, which are fed back into its history; what
is not a target is held at its last value. Over the paths of a member the mean and variance at
each lead are its Gaussian, and the law of total variance splits the width as for a direct forecast.

After "Forecasting Thermoacoustic Instabilities in Liquid Propellant Rocket Engines Using Multimodal
Bayesian Deep Learning" (arXiv 2107.06396), whose network is not public.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pantarhei._fit_random import mix
from pantarhei.bayes import (
    Ensemble,
    Gaussian,
    GaussianHead,
    Predictive,
    Prior,
    fit_ensemble,
    gaussian_loss,
    perturbed,
)
from pantarhei.data.series import Feature, Layout, Scaler, Windows
from pantarhei.errors import RequestError
from pantarhei.fit import Batches
from pantarhei.systems import _saved
from pantarhei.systems.series.encoder import Encoder

Network = Callable[[int, int], nn.Module]  # inputs, outputs -> returns (mean, variance)
_CELLS = ("past", "future", "mean", "sd", "share")  # what an encoder has of tensors
_IN_MEMORY = 2**28  # numbers of all windows together; more are gathered batch by batch


class Perceptron(nn.Module):
    """Tanh layers with a mean-variance head, and a linear path beside them to the mean.

    Few runs identify a linear autoregression at best: with its path there, the layers only have to
    learn what it misses.
    """

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int] = (32, 32)):
        super().__init__()
        self.hidden = tuple(hidden)
        sizes = (inputs, *hidden)
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.Tanh()]
        self.line = nn.Linear(inputs, outputs, bias=False)
        self.layers = nn.Sequential(*layers, GaussianHead(sizes[-1], outputs))

    def forward(self, x: Tensor) -> Gaussian:
        """Return the Gaussian of each row of inputs."""
        mean, variance = self.layers(x)
        return Gaussian(mean + self.line(x), variance)

    @staticmethod
    def prior(model: nn.Module) -> Prior:
        """Return the prior of this network, or that by fan-in of another one.

        Gains of 1 in the first layer and along the line make functions that are smooth and of the
        targets' own size (chosen on simulated runs that no recipe tests on).
        """
        prior = Prior.fan_in(model, first=1.0)
        lines = {
            f"{name}.line.weight".lstrip("."): 1 / math.sqrt(module.line.in_features)
            for name, module in model.named_modules()
            if isinstance(module, Perceptron)
        }
        return replace(prior, sd={**prior.sd, **lines})


class _Convolutional(nn.Module):
    """A stack of convolutions reads some of the inputs as a signal; its means join the others."""

    def __init__(self, signal: slice, inputs: int, outputs: int, hidden: Sequence[int], width: int):
        super().__init__()
        self.signal = signal
        self.reads = nn.Sequential(
            nn.Conv1d(1, width, 16, stride=4),
            nn.Tanh(),
            nn.Conv1d(width, width, 8, stride=4),
            nn.Tanh(),
        )
        rest = inputs - (signal.stop - signal.start)
        self.told = Perceptron(rest + 2 * width, outputs, hidden)

    def forward(self, x: Tensor) -> Gaussian:
        read = self.reads(x[:, None, self.signal])
        # a mode's loudness is in the squares: its phase is chance
        seen = torch.cat([read.mean(2), (read**2).mean(2)], 1)
        rest = torch.cat([x[:, : self.signal.start], x[:, self.signal.stop :]], 1)
        told: Gaussian = self.told(torch.cat([rest, seen], 1))
        return told


def convolutional(
    layout: Layout,
    history: int,
    raw: Feature,
    groups: Sequence[str] | None = None,
    hidden: Sequence[int] = (32, 32),
    width: int = 16,
) -> Network:
    """Return a network for ``train_forecaster``: convolutions over the samples of ``raw``.

    ``raw`` is a feature of the layout's inputs such as ``Raw("p", 1024)``, of which the last frame
    is seen; ``history`` and ``groups`` are those of the training.

    Raises :class:`RequestError` where it is not among the inputs, or has fewer than 64 samples.
    """
    if raw not in layout.inputs or (groups is not None and raw.group not in groups):
        raise RequestError(f"'{raw.group}' is not among the inputs: add the feature to the layout.")
    if raw.lags != 1 or len(raw.names) < 64:
        raise RequestError("Convolutions read one frame of 64 samples or more.")
    owned = [(f, f.group) for f in layout.inputs for _ in f.names]
    chosen = np.array([groups is None or group in groups for _, group in owned])
    kept = layout.seen(history) & chosen
    place = np.flatnonzero(kept.ravel())
    own = np.zeros_like(kept)
    own[-1] = [feature == raw for feature, _ in owned]
    start = int(np.searchsorted(place, np.flatnonzero(own.ravel())[0]))
    signal = slice(start, start + len(raw.names))
    return lambda inputs, outputs: _Convolutional(signal, inputs, outputs, hidden, width)


@dataclass(frozen=True)
class Forecaster:
    """A trained ensemble: what it looks at, in which scale, and for which lead times.

    ``leads`` are frames ahead, ascending; an autoregressive one has the lead 1 and goes on itself.
    """

    encoder: Encoder
    targets: Scaler
    ensemble: Ensemble
    leads: tuple[int, ...]
    mode: Literal["direct", "autoregressive"] = "direct"
    feedback: tuple[int, ...] = ()

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, scales, layout and what else it takes to a new folder."""
        encoder, network = self.encoder, self.ensemble.stacked
        about = {
            "layout": encoder.layout.to_json(),
            "history": encoder.history,
            "horizon": encoder.horizon,
            "owners": encoder.owners,
            "leads": self.leads,
            "mode": self.mode,
            "feedback": self.feedback,
            "members": self.ensemble.members,
            "hidden": network.hidden if isinstance(network, Perceptron) else None,
        }
        tensors = {f"encoder.{name}": getattr(encoder, name) for name in _CELLS}
        tensors |= {
            f"targets.{name}": torch.from_numpy(getattr(self.targets, name))
            for name in ("mean", "sd")
        }
        tensors |= {f"ensemble.{k}": v for k, v in self.ensemble.state_dict().items()}
        _saved.save(_saved.new_folder(folder), "forecaster", tensors, about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], network: Network | None = None) -> Forecaster:
        """Read a saved forecaster, on the CPU; one of a ``network`` of your own needs it again."""

        def restore(about: dict[str, Any], tensors: dict[str, Tensor]) -> Forecaster:
            if network is None and about["hidden"] is None:
                raise RequestError(
                    f"'{folder}' was saved around networks of your own: give network=, as in the "
                    "training."
                )
            cells = [tensors[f"encoder.{name}"] for name in _CELLS]
            encoder = Encoder(
                Layout.from_json(about["layout"]), int(about["history"]), int(about["horizon"]),
                tuple((name, lag) for name, lag in about["owners"]), *cells,
            )  # fmt: skip
            targets = Scaler(*(tensors[f"targets.{name}"].numpy() for name in ("mean", "sd")))
            leads, members = tuple(map(int, about["leads"])), int(about["members"])
            weights = {
                name.removeprefix("ensemble."): tensor
                for name, tensor in tensors.items()
                if name.startswith("ensemble.")
            }
            if not weights or any(len(tensor) != members for tensor in weights.values()):
                raise ValueError(f"not the weights of {members} members")
            make = network or functools.partial(Perceptron, hidden=about["hidden"])
            outputs = len(leads) * len(targets.mean)
            ensemble = Ensemble([make(len(encoder), outputs) for _ in range(members)])
            ensemble.load_state_dict(weights)
            feedback = tuple(map(int, about["feedback"]))
            return cls(encoder, targets, ensemble.eval(), leads, about["mode"], feedback)

        return _saved.load(folder, "forecaster", restore)

    def forecast(
        self,
        windows: Windows,
        *,
        leads: Sequence[int] | None = None,
        paths: int = 32,
        seed: int = 0,
        correction: int = 0,
    ) -> Predictive:
        """Forecast every window; members' means and variances are (M, N, leads, G), in own units.

        ``leads`` names the lead times of an autoregressive forecast, default all of the windows'
        horizon; ``paths`` is how many each member draws, and ``seed`` decides them.
        """
        if self.mode == "direct":
            told = [
                self.at(past, future, correction)
                for past, future, _ in _parts(windows, self.encoder)
            ]
        else:
            at = torch.tensor(leads or range(1, windows.horizon + 1)) - 1
            told = []
            for drawn in self.draw(windows, paths=paths, seed=seed):
                kept = drawn[:, :, :, at]
                told.append(Predictive(kept.mean(1), kept.var(1), correction))
        means, variances = (
            torch.cat([getattr(t, name) for t in told], 1) for name in ("means", "variances")
        )
        return Predictive(means, variances, correction)

    def at(self, past: Tensor, future: Tensor, correction: int = 0) -> Predictive:
        """Forecast directly from a past (B, history, F) and planned controls (B, horizon, C)."""
        told = self.predict_encoded(self.encoder(past, future), correction)
        mean, sd = map(torch.from_numpy, (self.targets.mean, self.targets.sd))
        shape = (*told.means.shape[:2], len(self.leads), len(mean))
        means, variances = told.means.view(shape), told.variances.view(shape)
        return Predictive(mean + sd * means, sd**2 * variances, correction)

    def predict_encoded(self, x: Tensor, correction: int = 0) -> Predictive:
        """Forecast from encoded inputs (B, D), in standard units of the targets."""
        device = next(self.ensemble.parameters()).device
        told = self.ensemble.predict(x.to(device))
        return Predictive(told.means.cpu(), told.variances.cpu(), correction)

    @torch.no_grad()
    def draw(self, windows: Windows, *, paths: int = 32, seed: int = 0) -> Iterator[Tensor]:
        """Yield drawn futures (M, paths, B, horizon, G) of an autoregressive forecaster, in parts.

        Quantiles over the first two dimensions are those of the mixture of all members.
        """
        if self.mode != "autoregressive":
            raise RequestError("Paths are drawn by an autoregressive forecaster, not a direct one.")
        if paths < 2:
            raise RequestError(f"A member draws two paths or more, not {paths}.")
        self.ensemble.eval()
        mean, sd = map(torch.from_numpy, (self.targets.mean, self.targets.sd))
        device = next(self.ensemble.parameters()).device
        members, columns = self.ensemble.members, list(self.feedback)
        rows = max(1, 65_536 // (members * paths))
        for part, (past, future, _) in enumerate(_parts(windows, self.encoder, rows)):
            generator = torch.Generator().manual_seed(mix(seed, "paths", part))
            copies = members * paths
            history = past.repeat(copies, 1, 1)
            found = torch.empty(copies, len(past), windows.horizon, len(mean))
            for step in range(windows.horizon):
                x = self.encoder(history, future[:, step : step + 1].repeat(copies, 1, 1))
                told = self.ensemble.each(x.view(members, -1, x.shape[1]).to(device))
                means, variances = (t.cpu().flatten(0, 1) for t in told)
                noise = torch.randn(means.shape, generator=generator)
                drawn = mean + sd * (means + variances.sqrt() * noise)
                found[:, :, step] = drawn.view(copies, len(past), -1)
                frame = history[:, -1:].clone()
                frame[:, 0, columns] = drawn
                history = torch.cat([history[:, 1:], frame], 1)
            yield found.view(members, paths, len(past), windows.horizon, -1)


def train_forecaster(
    layout: Layout,
    windows: Windows,
    *,
    groups: Sequence[str] | None = None,
    leads: Sequence[int] | None = None,
    mode: Literal["direct", "autoregressive"] = "direct",
    members: int = 10,
    hidden: Sequence[int] = (32, 32),
    network: Network | None = None,
    anchored: bool = True,
    perturb: float = 0.0,
    drop: float = 0.0,
    beta: float = 0.0,
    epochs: int = 40,
    batch_size: int = 256,
    lr: float = 1e-2,
    all_lags: bool = False,
    together: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    quiet: bool = False,
    label: str = "forecaster",
) -> Forecaster:
    """Train an ensemble of mean-variance networks on training windows.

    Args:
        layout: Of the windows' frames.
        windows: Of the training runs; scales come from these runs alone.
        groups: Sensors and controls to look at, by name; all unless given.
        leads: Frames ahead that a direct forecast answers for; all of the horizon unless given.
        mode: ``"autoregressive"`` learns one frame ahead and needs the targets among the inputs.
        members: Of the ensemble; 1 is a single network.
        hidden: Widths of the tanh layers of the default network, a :class:`Perceptron`.
        network: ``network(inputs, outputs)`` makes another one, which returns (mean, variance).
        anchored: Hold the members to draws of a prior; otherwise a plain deep ensemble.
        perturb: Standard deviation, in those of the targets, of noise that each member's targets
            get: randomised maximum a posteriori, see :func:`pantarhei.bayes.perturbed`.
        drop: Chance of every sensor to be missing, in every window of a batch: a network that is to
            go on when a sensor drops out has to have seen it.
        beta: Of the beta-NLL; 0 is the likelihood.
        epochs: Passes over the windows, with Adam at ``lr`` on a cosine to 0.
        batch_size: Windows to a step, at most an eighth of all.
        all_lags: Show every frame of every input, for a network that reads a sequence.
        together: See :func:`pantarhei.bayes.fit_ensemble`.
        checkpoint: Folder from which a killed training continues.
        checkpoint_every: Steps between checkpoints, default a tenth of all.
        device, seed, quiet, label: As for ``fit``.

    Windows overlap, and are not so many observations: N of the anchors' strength counts those that
    do not, so that the prior speaks as loud as the data are few.
    """
    leads = (1,) if mode == "autoregressive" else tuple(leads or range(1, windows.horizon + 1))
    if not leads or sorted(set(leads)) != list(leads) or not 1 <= leads[0] <= leads[-1]:
        raise RequestError(f"Leads are frames ahead, ascending from 1: not {leads}.")
    if leads[-1] > windows.horizon:
        raise RequestError(f"Lead {leads[-1]} is beyond the windows' horizon {windows.horizon}.")
    feedback = _feedback(layout) if mode == "autoregressive" else ()
    if mode == "autoregressive":
        windows = Windows(windows.frames, windows.history, 1, windows.stride)
    encoder = Encoder.of(layout, windows, groups, all_lags=all_lags)
    targets = Scaler.of([frames.targets for frames in windows.frames])
    outputs = len(leads) * len(targets.mean)
    make = network or functools.partial(Perceptron, hidden=hidden)
    factory = functools.partial(make, len(encoder), outputs)
    overlap = max(1, (windows.history + leads[-1]) // windows.stride)
    prior = Perceptron.prior(factory()) if anchored else None
    ensemble = Ensemble.of(factory, members, seed=mix(seed, "members"), prior=prior)
    batch_size = min(batch_size, max(1, len(windows) // 8))
    batches = _batches(windows, encoder, targets, leads, batch_size, seed)
    if not 0 <= drop < 1:
        raise RequestError(f"The chance that a sensor is missing lies in [0, 1), not at {drop}.")
    batches = _dropping(batches, encoder, drop, seed) if drop else batches
    draws: Any = batches
    if perturb:
        draws = _perturbed(batches, members, perturb, len(windows), outputs, seed)
    fit_ensemble(
        ensemble,
        draws,
        gaussian_loss(beta),
        steps=epochs * (len(windows) // batch_size),
        prior=prior,
        examples=max(1, len(windows) * outputs // overlap),  # the loss is a mean over both
        by_member=(1,) if perturb else (),
        together=together,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        optimizer=torch.optim.Adam,
        lr=lr,
        schedule="cosine",
        device=device,
        seed=seed,
        quiet=quiet,
        label=label,
    )
    return Forecaster(encoder, targets, ensemble, leads, mode, feedback)


@dataclass
class Stream:
    """Forecasts as frames arrive: ``update`` takes one and answers once the window is full.

    For each frame: the inputs (F,) of the layout, and the planned controls (horizon, C) after it.
    """

    forecaster: Forecaster
    history: deque[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.history = deque(maxlen=self.forecaster.encoder.history)

    def update(self, inputs: Any, controls: Any = None) -> Predictive | None:
        """Take a frame in; return the direct forecast from it, (M, leads, G), or None."""
        encoder = self.forecaster.encoder
        self.history.append(torch.as_tensor(np.asarray(inputs, np.float32)))
        if len(self.history) < encoder.history:
            return None
        past = torch.stack(list(self.history))[None]
        planned = np.zeros((encoder.horizon, 0)) if controls is None else controls
        future = torch.as_tensor(np.asarray(planned, np.float32))[None]
        wanted = (encoder.horizon, sum(len(f.names) for f in encoder.layout.controls))
        if future.shape[1:] != wanted:
            raise RequestError(
                f"Planned controls have shape {tuple(future.shape[1:])}: give {wanted}."
            )
        return self.forecaster.at(past, future)[0]


def _feedback(layout: Layout) -> tuple[int, ...]:
    """Return the input columns that hold the targets, which a path writes to."""
    place, columns = 0, {}
    for feature in layout.inputs:
        columns[feature] = range(place, place := place + len(feature.names))
    found: list[int] = []
    for feature in layout.targets:
        if feature not in columns:
            raise RequestError(
                f"Target '{feature.names[0]}' is not among the inputs: an autoregressive forecast "
                "feeds it back there."
            )
        found += columns[feature]
    return tuple(found)


def _parts(
    windows: Windows, encoder: Encoder, rows: int = 8192
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if windows.history != encoder.history or (
        len(encoder.layout.names("inputs")) != windows.frames[0].inputs.shape[1]
    ):
        raise RequestError(
            f"The forecaster looks {encoder.history} frames back at "
            f"{len(encoder.layout.names('inputs'))} inputs: these windows are others."
        )
    for index in torch.arange(len(windows)).split(rows):
        yield windows.batch(index)


def _batches(
    windows: Windows,
    encoder: Encoder,
    targets: Scaler,
    leads: Sequence[int],
    batch_size: int,
    seed: int,
) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """Return batches of encoded inputs, scaled targets, and the windows' numbers."""
    at = torch.tensor(leads) - 1

    def encoded(index: Tensor) -> tuple[Tensor, Tensor]:
        past, future, target = windows.batch(index)
        return encoder(past, future), targets.apply(target[:, at]).flatten(1)

    every = torch.arange(len(windows))
    if len(windows) * len(encoder) <= _IN_MEMORY:
        parts = [encoded(part) for part in every.split(8192)]
        x, y = (torch.cat(held) for held in zip(*parts, strict=True))
        drawn: Any = Batches(x, y, every, batch_size=batch_size, seed=seed)
        return drawn
    numbers = Batches(every, batch_size=batch_size, seed=seed)

    def lazily(n: int) -> tuple[Tensor, Tensor, Tensor]:
        (index,) = numbers(n)
        return (*encoded(index), index)

    return lazily


def _dropping(
    batches: Callable[[int], Any], encoder: Encoder, drop: float, seed: int
) -> Callable[[int], Any]:
    """Take sensors out of encoded windows at random, and mark them."""

    def drawn(n: int) -> Any:
        x, *rest = batches(n)
        generator = torch.Generator().manual_seed(mix(seed, "drop", n))
        gone = torch.rand(len(x), encoder.share.shape[1], generator=generator) < drop
        cells = (gone.float() @ encoder.share.T) > 0
        values, marks = x.split(encoder.share.shape, 1)
        return torch.cat([values * ~cells, torch.where(gone, 1.0, marks)], 1), *rest

    return drawn


def _perturbed(
    batches: Callable[[int], Any], members: int, sd: float, count: int, outputs: int, seed: int
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Give every member noise of its own on its targets, the same at every visit."""
    noise = perturbed(torch.zeros(count, outputs), members, sd, seed=mix(seed, "targets"))

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        x, y, index = batches(n)
        return x, y[:, None] + noise[index]

    return drawn
