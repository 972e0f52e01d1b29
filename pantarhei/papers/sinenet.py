"""SineNet (arXiv 2403.19507): a chain of slim U-Nets against one wide one, at equal parameters.

The story: flows are simulated; networks of one to eight waves, all with the same number of
parameters, learn the next frame from the last ones, from the same data, for as many updates; then
each is rolled out from the first frames of test trajectories and compared with the truth. Beside
them stand ablations (no parallel stream, other borders), a wide U-Net and, with as many weights and
updates, networks of other kinds: U-Net, Dil-ResNet, FNO, DeepONets. The claims compare errors of
rollouts, means over training seeds.

The paper's set of smoke is made again by a simulator that follows it step by step; its shallow
water on the sphere is replaced by a periodic plane, for the claim about borders alone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec
from pantarhei.runs import Run

Rows = list[dict[str, Any]]

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from pantarhei.data.trajectories import Trajectories
    from pantarhei.rollout import Forecast
    from pantarhei.systems.forecaster import FieldForecaster

# The bounds are the fact sheet's. At quick the longest chain has four waves.
CLAIMS = (
    ClaimSpec(
        "more-waves",
        "at equal parameters the longest chain of waves rolls out better than one wave, on smoke",
        "rollout error of the most waves (8; at quick 4) over that of one wave",
        "<=",
        0.93,
        "the error falls as waves are added at constant parameters (Figure 3)",
    ),
    ClaimSpec(
        "no-doubling-hurts",
        "no doubling of the waves makes the rollout noticeably worse, on smoke",
        "largest rollout error of 2K waves over that of K waves",
        "<=",
        {"cpu": 1.02, "gpu": 1.02},
        "the error falls as waves are added at constant parameters (Figure 3)",
    ),
    ClaimSpec(
        "beats-wider-unet",
        "eight waves roll out better than one wave of twice the width, with four times the weights",
        "rollout error of eight waves over that of one wave of double width, on smoke",
        "<=",
        {"gpu": 0.95},
    ),
    ClaimSpec(
        "circular-padding",
        "on a periodic domain circular padding rolls out far better than zeros",
        "rollout error with circular padding over that with zeros, shallow water",
        "<=",
        {"cpu": 0.7, "gpu": 0.7},
        "0.42 (1.78 % against 4.19 %, Table 3, shallow water on the sphere)",
    ),
    ClaimSpec(
        "disentangle",
        "the parallel stream makes the rollout no worse",
        "rollout error of the most waves with the parallel stream over that without, on smoke",
        "<=",
        {"cpu": 1.0, "gpu": 1.0},
    ),
)

# A model is a number of waves, with "entangled" (no parallel stream), "circular" or "zeros"
# (borders) or "longer" (as many MACs of training as the longest chain); or one of KINDS, all with
# the budget's weights but "wide". The sheet's cpu scale (64 x 64, 256 trajectories, 20 epochs)
# would take some ten hours on two cores: here it is 32 x 32 and two epochs.
KINDS = (
    "wide", "deeper", "unet", "unet-mod", "dil-resnet", "fno", "ffno", "neuralop-fno",
    "auto-deeponet", "auto-deeponet-cnn",
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "size": 32,
        "train": 48,
        "valid": 8,
        "test": 16,
        "translation": ("1", "4"),
        "smoke": ("1", "4"),
        "water": (),
        "gas": (),
        "seeds": 2,
        "width": 8,
        "budget": 530_000,
        "updates": 100,
        "warmup": 10,
        "checks": 4,
        "stepped": False,
        "batch_size": 16,
        "lr": 2e-3,
        "precision": "32",
    },
    "cpu": {
        "size": 32,
        "train": 256,
        "valid": 32,
        "test": 64,
        "translation": (),
        "smoke": (
            "1", "2", "4", "8", "8 entangled", "wide", "unet", "dil-resnet", "fno",
            "auto-deeponet", "auto-deeponet-cnn",
        ),
        "water": ("4 circular", "4 zeros"),
        "gas": (),
        "seeds": 2,
        "width": 12,
        "budget": 1_195_000,
        "updates": 300,
        "warmup": 30,
        "checks": 6,
        "stepped": False,
        "batch_size": 16,
        "lr": 1e-3,
        "precision": "bf16",
    },
    # 20 epochs of 14 windows of each of 1,500 trajectories in batches of 32
    "gpu": {
        "size": 128,
        "train": 1500,
        "valid": 150,
        "test": 300,
        "translation": (),
        "smoke": (
            "1", "2", "4", "8", "8 entangled", "1 longer", "wide", "deeper", "dil-resnet", "ffno",
        ),
        "water": ("8 circular", "8 zeros"),
        "gas": ("1", "8"),
        "seeds": 2,
        "width": 64,
        "budget": 35_490_219,
        "updates": 13_120,
        "warmup": 1312,
        "checks": 20,
        "stepped": True,
        "batch_size": 32,
        "lr": 2e-4,
        "precision": "bf16",
    },
}  # fmt: skip

# history, frames, border
STUDIES = {
    "translation": (1, 11, "circular"),
    "smoke": (4, 14, "zeros"),
    "water": (2, 11, "circular"),
    "gas": (10, 21, "circular"),
}


def recipe(run: Run) -> Iterator[Claim]:
    """Train and roll out every model of every study, then compare."""
    check_models(run)
    rows: Rows = []
    for name in STUDIES:
        if run.settings[name]:
            study = Study.of(run, name)
            rows += study.measure()
            run.metrics("models", rows)
    for id, measured in compare(rows, run.settings).items():
        yield run.claim(id, measured, evidence="models.csv")


def check_models(run: Run) -> None:
    """Refuse a model that nobody knows, before anything is simulated."""
    from pantarhei.errors import RequestError

    turns = ("", "entangled", "circular", "zeros", "longer")
    for study in STUDIES:
        for model in run.settings[study]:
            waves, _, turn = model.partition(" ")
            if model not in KINDS and not (waves.isdecimal() and int(waves) and turn in turns):
                raise RequestError(
                    f"'{model}' is no model of this recipe: a number of waves, alone or with "
                    f"{', '.join(turns[1:])}; or {', '.join(KINDS)}."
                )
            if model == "neuralop-fno":
                from pantarhei.systems.neuralop_fno import neuralop

                neuralop()


def compare(rows: Rows, settings: Any) -> dict[str, float]:
    """Work the claims' quantities out of the models' rows; what was not trained is left out."""
    errors: dict[tuple[str, str], float] = {}
    for row in rows:
        own = [
            r["rollout"] for r in rows if (r["study"], r["model"]) == (row["study"], row["model"])
        ]
        errors[row["study"], row["model"]] = fmean(own)
    chains = sorted(int(m) for s, m in errors if s == "smoke" and m.isdecimal())
    most = str(chains[-1]) if chains else ""

    def ratio(study: str, model: str, other: str) -> float:
        over, under = errors[study, model], errors[study, other]
        return over / under if math.isfinite(over) or math.isfinite(under) else math.nan

    found: dict[str, float] = {}
    if len(chains) > 1:
        found["more-waves"] = ratio("smoke", most, str(chains[0]))
    doublings = [(k, n) for k, n in itertools.pairwise(chains) if n == 2 * k]
    if doublings:
        found["no-doubling-hurts"] = max(ratio("smoke", str(n), str(k)) for k, n in doublings)
    if ("smoke", "wide") in errors and most:
        found["beats-wider-unet"] = ratio("smoke", most, "wide")
    for waves in {m.partition(" ")[0] for m in settings["water"]}:
        pair = f"{waves} circular", f"{waves} zeros"
        if all(("water", model) in errors for model in pair):
            found["circular-padding"] = ratio("water", *pair)
    if ("smoke", f"{most} entangled") in errors:
        found["disentangle"] = ratio("smoke", most, f"{most} entangled")
    return found


@dataclass(frozen=True)
class Study:
    """One flow: its trajectories, split, and how models of it are trained and measured."""

    run: Run
    name: str
    data: Trajectories
    parts: tuple[NDArray[Any], NDArray[Any], NDArray[Any]]

    @classmethod
    def of(cls, run: Run, name: str) -> Study:
        """Simulate the trajectories of a study."""
        import numpy as np

        from pantarhei.data.trajectories import concatenate

        settings = run.settings
        sizes = (settings.train, settings.valid, settings.test)
        ends = np.cumsum((0, *sizes))
        simulator = simulation(name, settings.size)
        sets = []
        with run.progress(int(ends[-1]), f"simulating {name}") as bar:
            for first in range(0, ends[-1], 32):
                cases = range(first, min(first + 32, ends[-1]))
                sets.append(simulator.simulate(cases, run.seed, run.device))
                bar.advance(len(cases))
        parts = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
        return cls(run, name, concatenate(sets), (parts[0], parts[1], parts[2]))

    def measure(self) -> Rows:
        """Train every model with every seed; return a row for each and draw the pictures."""
        rows, horizon, spectrum, apart, pictures = [], [], [], [], {}
        truth = self.data.tensor(self.parts[2])[:, self.history :]
        forecasts = [("persistence", 0, self.persistence())]
        for model, seed in itertools.product(
            self.run.settings[self.name], range(self.run.settings.seeds)
        ):
            made, row = self.train(model, seed)
            found = made.evaluate(self.data, self.parts[2], keep="all")
            forced = made.evaluate(self.data, self.parts[2], forced=truth.shape[1])
            row |= self.scores(found) | {"one_step": forced.mean("relative_l2")}
            rows.append({"study": self.name, "model": model, "seed": seed, **row})
            forecasts.append((model, seed, found))
            if seed == 0:
                pictures[model] = found.kept[0, :, 0].numpy()
                if model.isdecimal():
                    apart += self.probe(model, made)
        for model, seed, found in forecasts:
            error = found.scores["relative_l2"]
            horizon += [
                {"model": model, "seed": seed, "step": t + 1,
                 "relative_l2": float(error[:, t].nanmean()),
                 **{c: float(error[:, t, i].nanmean()) for i, c in enumerate(self.data.channels)},
                 "blown": int(((found.blown_at > 0) & (found.blown_at <= t + 1)).sum())}
                for t in range(error.shape[1])
            ]  # fmt: skip
            if seed == 0:
                spectrum += self.spectrum(model, found.kept - truth)
        spectrum += self.spectrum("truth", truth)
        self.write(horizon, spectrum, apart)
        self.draw(horizon, spectrum, apart, pictures, truth)
        persistence = {"study": self.name, "model": "persistence", "seed": 0}
        return [*rows, persistence | self.scores(forecasts[0][2])]

    @property
    def history(self) -> int:
        """How many frames a model sees."""
        return STUDIES[self.name][0]

    def train(self, model: str, seed: int) -> tuple[FieldForecaster, dict[str, Any]]:
        """Train a model; return it with its size and what its training took."""
        import torch

        from pantarhei.systems.forecaster import FieldForecaster, warmup_cosine
        from pantarhei.systems.sizes import weight_count

        settings, device = self.run.settings, self.run.device
        seed = 1000 * self.run.seed + seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = self.network(model).to(device)
        # weights of modes have no such form; and on CPUs (PyTorch 2.13, bfloat16) gradients of
        # dilated convolutions are garbage in it unless 16 divides the channels
        dilated = model == "dil-resnet" and device.type == "cpu"
        if not dilated and not any(p.is_complex() for p in net.parameters()):
            net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        made = FieldForecaster.of(net, self.data, self.parts[0], history=self.history)
        updates = self.updates(model)
        schedule: Any = "cosine"
        if settings.stepped:  # by epochs, the warm-up included, as the paper's training does it
            epochs = settings.checks
            schedule = warmup_cosine(epochs, max(1, epochs // 10), settings.lr)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        made.train(
            self.data,
            self.parts[0],
            self.parts[1],
            steps=updates,
            batch_size=settings.batch_size,
            lr=settings.lr,
            schedule=schedule,
            warmup=0 if settings.stepped else min(settings.warmup, updates - 1),
            validate_every=max(1, updates // settings.checks),
            precision=settings.precision,
            seed=seed,
            in_memory=True,
            device=device,
            checkpoint=self.run.checkpoint(f"{self.name}-{model.replace(' ', '-')}-{seed}"),
            label=f"{self.name}: {model}, seed {seed}",
            quiet=self.run.quiet,
        )
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else math.nan
        return made, {
            "parameters": weight_count(net),
            "updates": updates,
            "seconds": round(time.perf_counter() - began, 1),
            "peak_mib": peak / 2**20,
        }

    def network(self, model: str) -> nn.Module:
        """Build a model by its name; see SETTINGS."""
        from pantarhei.systems.dilated_resnet import DilatedResNet
        from pantarhei.systems.forecaster import build
        from pantarhei.systems.sinenet import SineNet, unet
        from pantarhei.systems.sizes import width_for
        from pantarhei.systems.told import Told

        width, budget = self.run.settings.width, self.run.settings.budget
        fields, grid = len(self.data.channels), self.data.shape[3:]
        ends = (self.history * fields, fields)
        waves, _, turn = model.partition(" ")
        border: Any = turn if turn in ("circular", "zeros") else STUDIES[self.name][2]
        if waves.isdecimal():
            return SineNet(
                *ends,
                waves=int(waves),
                width=width,
                param_budget=budget,
                padding=border,
                disentangle=turn != "entangled",
            )
        options: dict[str, Any] = {"width": width, "padding": border}
        if model == "wide":
            return SineNet(*ends, 1, 2 * width, 2.0, padding=border)
        if model == "deeper":
            return SineNet(*ends, 1, param_budget=budget, blocks=8, **options)
        if model == "unet":
            return unet(*ends, param_budget=budget, **options)
        # FNO: a third of the grid's points in wavenumbers; F-FNO: all up to its authors' 32
        most, share = (32, 2) if model == "ffno" else (16, 3)
        modes = min(most, self.run.settings.size // share)

        def of(width: int) -> nn.Module:
            if model == "dil-resnet":
                return DilatedResNet(*ends, width, padding=border)
            if model.startswith("auto"):
                return Told(model, channels=fields, grid=grid, history=self.history, width=width)
            more = {} if model == "unet-mod" else {"modes": modes}
            return build(model, in_ch=ends[0], out_ch=fields, width=width, **more)

        return of(width_for(budget, of))

    def updates(self, model: str) -> int:
        """Return the updates of a model: the same for all, but for one that trains "longer"."""
        import torch

        from pantarhei.cost import profile

        updates: int = self.run.settings.updates
        if not model.endswith(" longer"):
            return updates
        chains = [int(m) for m in self.run.settings[self.name] if m.isdecimal()]
        x = torch.zeros(1, self.history * len(self.data.channels), *self.data.shape[3:])
        macs = [profile(self.network(name), x).macs for name in (str(max(chains)), model)]
        return round(updates * macs[0] / macs[1])

    def persistence(self) -> Forecast:
        """Return the forecast that nothing changes."""
        from pantarhei.rollout import correlation, persistence, relative_l2, rollout

        states = self.data.tensor(self.parts[2])
        past, truth = states[:, : self.history], states[:, self.history :]
        metrics = {"relative_l2": relative_l2, "correlation": correlation}
        return rollout(
            persistence, past, truth.shape[1], truth=truth, metrics=metrics, layout="window"
        )

    def scores(self, found: Forecast) -> dict[str, Any]:
        """Return the figures of a rollout: error, that of each channel, how long it is any good."""
        from pantarhei.rollout import correlation_time

        error = found.scores["relative_l2"]
        similar = found.scores["correlation"].mean(2)
        return {
            "rollout": found.mean("relative_l2"),
            **{c: float(error[:, :, i].nanmean()) for i, c in enumerate(self.data.channels)},
            "correlation_time": float(correlation_time(similar, self.data.dt).mean()),
            "blown": found.blown,
        }

    def spectrum(self, model: str, states: Tensor) -> Rows:
        """Return the energy by wavenumber of the last step, a mean over cases, all channels."""
        from pantarhei.rollout import radial_spectrum

        energy = radial_spectrum(states[:, -1]).nanmean(0).sum(0)
        return [{"model": model, "wavenumber": k, "energy": float(e)} for k, e in enumerate(energy)]

    def probe(self, model: str, made: FieldForecaster) -> Rows:
        """Return how far what the network joins lies apart, wave by wave."""
        from pantarhei.systems.misalignment import misalignment

        net: Any = made.model
        past = self.data.tensor(self.parts[2][:8], 0, self.history).to(self.run.device)
        return [
            {"model": model, "wave": one.wave, "level": one.level, "distance": one.distance,
             "explained": one.explained, "explained_shifted": one.explained_shifted}
            for one in misalignment(net, made.statistics.normalise(past).flatten(1, 2))
        ]  # fmt: skip

    def write(self, horizon: Rows, spectrum: Rows, apart: Rows) -> None:
        """Write the tables of the study."""
        self.run.metrics(f"{self.name}-horizon", horizon)
        self.run.metrics(f"{self.name}-spectrum", spectrum)
        self.run.metrics(f"{self.name}-misalignment", apart)

    def draw(
        self,
        horizon: Rows,
        spectrum: Rows,
        apart: Rows,
        pictures: dict[str, NDArray[Any]],
        truth: Tensor,
    ) -> None:
        """Draw the pictures of the study."""
        from pantarhei.papers import _sinenet_figures as figures

        run, name = self.run, self.name
        means = []
        for model, step in dict.fromkeys((r["model"], r["step"]) for r in horizon):
            own = [r["relative_l2"] for r in horizon if (r["model"], r["step"]) == (model, step)]
            means.append({"model": model, "step": step, "relative_l2": fmean(own)})
        title = f"{name}, {run.settings.size} x {run.settings.size}, {truth.shape[0]} trajectories"
        run.figure(f"{name}-horizon", figures.over_the_horizon(means, title))
        run.figure(f"{name}-spectrum", figures.spectra(spectrum, f"{title}, last step"))
        steps = sorted({1, (truth.shape[1] + 1) // 2, truth.shape[1]})
        shown = dict(list(pictures.items())[:4])
        picture = figures.side_by_side(truth[0, :, 0].numpy(), shown, steps, title)
        run.figure(f"{name}-states", picture)
        if apart:
            run.figure(f"{name}-misalignment", figures.shifts(apart, f"{name}: skip to decoder"))


def simulation(name: str, size: int) -> Any:
    """Return the simulator of a study."""
    from pantarhei.data.simulate.compressible import Compressible
    from pantarhei.data.simulate.shallow_water import ShallowWater
    from pantarhei.data.simulate.smoke import Smoke
    from pantarhei.data.simulate.translation import Translation

    frames = STUDIES[name][1]
    if name == "translation":
        return Translation(size=size, shift_x=size / 8, frames=frames)
    if name == "smoke":
        return Smoke(size=size, frames=frames)
    if name == "gas":
        return Compressible(size=size, stride=1, frames=frames)
    dt = 0.05 * 64 / size  # the same Courant number on every grid
    return ShallowWater(size=size, dt=dt, every=round(2 / dt), frames=frames)
