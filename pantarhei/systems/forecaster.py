"""A trained model of fields with what it takes to use it: statistics, history, names, time step.

Trains on windows of trajectories, rolls out in normalised units, measures in physical ones, and is
saved as a folder of safetensors and JSON.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pantarhei.data.trajectories import Trajectories
from pantarhei.data.windows import Statistics, Windows, with_lead
from pantarhei.devices import chosen_device
from pantarhei.errors import RequestError, nearest
from pantarhei.fit import Fit, fit
from pantarhei.rollout import Forecast, Metric, correlation, forecast_loss, relative_l2, rollout
from pantarhei.systems import _saved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Cases = Sequence[int] | NDArray[Any]

Given = Literal["parameters", "mask", "lead"]
MODELS = {
    "sinenet": "pantarhei.systems.sinenet:SineNet",
    "unet-mod": "pantarhei.systems.unet_mod:UNetMod",
    "dil-resnet": "pantarhei.systems.dilated_resnet:DilatedResNet",
    "fno": "pantarhei.systems.fno:FNO",
    "ffno": "pantarhei.systems.fno:FactorizedFNO",
    "neuralop-fno": "pantarhei.systems.neuralop_fno:NeuralopFNO",
    "told": "pantarhei.systems.told:Told",
}
"""Models that a saved forecaster is rebuilt from by name; a new one is a line here."""

_BATCH = 32


@dataclass
class FieldForecaster:
    """A model (B, history x C, *space) to (B, C, *space) in normalised units, and its statistics.

    ``given`` names what the model is told beside the frames: ``"parameters"``, ``"mask"``, and
    ``"lead"``, how many frames ahead it is to forecast: the last column of the parameters, or
    alone (B, 1). A model that is told the lead forecasts any frame in one step
    (:meth:`evaluate_leads`, :meth:`forecast_leads`), and is run forward by steps of one frame.

    >>> import numpy as np
    >>> from pantarhei.systems.sinenet import SineNet
    >>> data = Trajectories.of(np.random.default_rng(0).normal(size=(6, 8, 1, 16, 16)))
    >>> forecaster = FieldForecaster.of(SineNet(2, 1, waves=2, width=4, levels=2), data, range(4),
    ...                                 history=2)
    >>> _ = forecaster.train(data, range(4), steps=3, batch_size=4, quiet=True)
    >>> found = forecaster.evaluate(data, [4, 5], steps=5)
    >>> found.scores["relative_l2"].shape  # case, step, channel
    torch.Size([2, 5, 1])
    """

    model: nn.Module
    statistics: Statistics
    history: int
    channels: tuple[str, ...]
    dt: float
    given: tuple[Given, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        data: Trajectories,
        training: Cases,
        *,
        history: int,
        given: Sequence[Given] = (),
    ) -> FieldForecaster:
        """Measure the statistics of the training cases for a model that is yet to be trained."""
        statistics = Statistics.of(data, training)
        return cls(model, statistics, history, data.channels, data.dt, tuple(given))

    def train(
        self,
        data: Trajectories,
        training: Cases,
        validation: Cases = (),
        *,
        steps: int,
        batch_size: int = 32,
        horizon: int = 1,
        pushforward: int = 0,
        noise: float = 0.0,
        leads: int | None = None,
        error: Metric | None = None,
        lr: float = 2e-4,
        weight_decay: float = 1e-5,
        seed: int = 0,
        in_memory: bool | None = None,
        device: str | torch.device = "auto",
        **options: Any,
    ) -> Fit:
        """Train on windows of the training cases; return what :func:`pantarhei.fit.fit` does.

        The loss is that of :func:`pantarhei.rollout.forecast_loss`: ``horizon`` steps with
        gradients after ``pushforward`` steps without, from inputs with ``noise``. With ``leads``
        the target lies 1 to that many frames ahead instead (:func:`~pantarhei.data.windows.
        draw_leads`); for a model that is told the lead, as many as there are unless given. With
        ``validation`` cases the weights with the least error of their whole rollout are kept,
        checked ``validate_every`` steps (ten times unless given). ``in_memory`` as for
        :class:`~pantarhei.data.windows.Windows`; further options are ``fit``'s.
        """
        where = chosen_device(device)
        if leads is None and "lead" in self.given:
            leads = data.shape[1] - self.history
        windows = Windows(
            data,
            training,
            history=self.history,
            horizon=horizon + pushforward,
            batch_size=batch_size,
            seed=seed,
            statistics=self.statistics,
            given=self.given,
            leads=leads,
            in_memory=in_memory,
            device=where,
        )
        if len(validation):
            kind = options.get("precision", "auto")

            def judge(model: nn.Module) -> float:
                with _autocast(kind, where):
                    if leads is None:
                        found = self.evaluate(data, validation, metrics={"l2": relative_l2})
                    else:
                        aims = range(1, min(leads, self._last_lead(data, validation)) + 1)
                        found = self.evaluate_leads(
                            data, validation, aims, metrics={"l2": relative_l2}
                        )
                return found.mean("l2")

            options = {"validate_every": max(1, steps // 10), **options}
            options |= {"validate": judge, "best": "min"}
        loss = forecast_loss(error, steps=horizon, pushforward=pushforward, noise=noise)
        return fit(
            self.model, windows, loss, steps=steps, lr=lr, weight_decay=weight_decay, seed=seed,
            device=where, **options,
        )  # fmt: skip

    def evaluate(
        self,
        data: Trajectories,
        cases: Cases,
        steps: int | None = None,
        *,
        metrics: Mapping[str, Metric] | None = None,
        keep: Literal["all", "none"] = "none",
        **options: Any,
    ) -> Forecast:
        """Roll out from the first frames of the cases and compare with the rest of them.

        Scores (``relative_l2`` and ``correlation`` by channel unless ``metrics`` names others) are
        of physical fields. Further options are those of :func:`pantarhei.rollout.stream`:
        ``forced=steps`` measures every single step from the truth.
        """
        self._check(data)
        steps = data.shape[1] - self.history if steps is None else steps
        states = data.tensor(cases, 0, self.history + steps, repeat_last=True)
        told = self.told(data, cases)
        chosen = metrics or {"relative_l2": relative_l2, "correlation": correlation}
        parts = []
        for first in range(0, len(states), _BATCH):
            some = slice(first, first + _BATCH)
            device = next(self.model.parameters()).device
            batch = self.statistics.normalise(states[some].to(device))
            parts.append(
                rollout(
                    self.model,
                    batch[:, : self.history],
                    steps,
                    truth=batch[:, self.history :],
                    given=[t[some].to(device) for t in told],
                    metrics=chosen,
                    keep=keep,
                    decode=self.statistics.restore,
                    **options,
                )
            )
        return _joined(parts)

    def forecast(self, frames: Tensor, steps: int, *given: Tensor, **options: Any) -> Forecast:
        """Forecast from the user's own last frames (B, history, C, *space), in physical units."""
        if frames.dim() < 3 or frames.shape[1:3] != (self.history, len(self.channels)):
            raise RequestError(
                f"The forecast starts from (case, {self.history}, {len(self.channels)}, *space), "
                f"not {tuple(frames.shape)}."
            )
        device = next(self.model.parameters()).device
        start = self.statistics.normalise(frames.to(device, torch.float32))
        told = [t.to(device) for t in given]
        return rollout(
            self.model, start, steps, given=told, decode=self.statistics.restore, **options
        )

    def evaluate_leads(
        self,
        data: Trajectories,
        cases: Cases,
        leads: Sequence[int] | None = None,
        *,
        metrics: Mapping[str, Metric] | None = None,
        keep: Literal["all", "none"] = "none",
    ) -> Forecast:
        """Forecast the frames that lie ``leads`` ahead of the first ones, each in one step.

        As :meth:`evaluate`, whose repeated steps of one frame it is to be compared with; the
        ``steps`` of what is returned are the leads, all that the shortest case has unless given.
        """
        self._check(data)
        last = self._last_lead(data, cases)
        aims = [int(lead) for lead in (range(1, last + 1) if leads is None else leads)]
        if not aims or not all(1 <= lead <= last for lead in aims):
            raise RequestError(
                f"Leads {aims} cannot be compared: after {self.history} frames the shortest of "
                f"these cases has {last} more. Choose among 1 to {last}."
            )
        states = data.tensor(cases, 0, self.history + max(aims))
        start, truth = states[:, : self.history], states[:, [self.history - 1 + n for n in aims]]
        told = dict(zip(self._names(), self.told(data, cases, lead=None), strict=True))
        made = torch.cat(
            [
                self.forecast_leads(start[some], aims, **{k: v[some] for k, v in told.items()})
                for some in torch.arange(len(start)).split(_BATCH)
            ]
        )
        chosen = metrics or {"relative_l2": relative_l2, "correlation": correlation}
        scores = {
            name: torch.stack([metric(made[:, t], truth[:, t]) for t in range(len(aims))], 1)
            for name, metric in chosen.items()
        }
        lost = ~made.flatten(2).isfinite().all(2)
        blown_at = torch.where(lost.any(1), lost.long().argmax(1) + 1, 0)
        return Forecast(made if keep == "all" else None, None, tuple(aims), scores, blown_at)

    def forecast_leads(
        self,
        frames: Tensor,
        leads: Sequence[float],
        *,
        parameters: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Forecast from the user's own last frames (B, history, C, *space) in one step for a lead.

        ``leads`` are in units of ``dt``; one between two frames is allowed. Returns
        (B, lead, C, *space) in physical units.
        """
        told = {"parameters": parameters, "mask": mask}
        known = {name: value for name, value in told.items() if value is not None}
        if sorted(known) != sorted(self._names()):
            raise RequestError(
                f"This model is told {', '.join(self._names()) or 'neither parameters nor mask'} "
                f"beside the lead, and got {', '.join(known) or 'neither'}."
            )
        found = []
        for lead in leads:
            at = torch.full((len(frames),), float(lead))
            given = with_lead({k: v.cpu() for k, v in known.items()}, at, self.given)
            found.append(self.forecast(frames, 1, *given).kept)
        return torch.cat(found, 1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the weights and everything else to a new folder."""
        kind = f"{type(self.model).__module__}:{type(self.model).__qualname__}"
        known = {path: name for name, path in MODELS.items()}
        about = {
            "model": known.get(kind),
            "arguments": getattr(self.model, "arguments", None) if kind in known else None,
            "statistics": self.statistics.to_json(),
            "history": self.history,
            "channels": self.channels,
            "dt": self.dt,
            "given": self.given,
        }
        _saved.save(_saved.new_folder(folder), "forecaster", self.model.state_dict(), about)

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], model: nn.Module | None = None
    ) -> FieldForecaster:
        """Read a saved forecaster; one around a model of your own needs that ``model`` again."""

        def restore(about: dict[str, Any], tensors: dict[str, Tensor]) -> FieldForecaster:
            if model is None and about["model"] is None:
                raise RequestError(
                    f"'{folder}' was saved around a model that this library does not build: "
                    "give it as model=."
                )
            made = build(about["model"], **about["arguments"]) if model is None else model
            made.load_state_dict(tensors)
            return cls(
                made.eval(), Statistics.from_json(about["statistics"]), int(about["history"]),
                tuple(about["channels"]), float(about["dt"]), tuple(about["given"]),
            )  # fmt: skip

        return _saved.load(folder, "forecaster", restore)

    def _check(self, data: Trajectories) -> None:
        if data.channels != self.channels or not math.isclose(data.dt, self.dt, rel_tol=1e-3):
            raise RequestError(
                f"The forecaster is of {self.channels} at dt {self.dt:g}, the data hold "
                f"{data.channels} at dt {data.dt:g}."
            )

    def told(self, data: Trajectories, cases: Cases, lead: float | None = 1.0) -> list[Tensor]:
        """Return what the model is told of these cases, for :meth:`forecast`.

        A model that is told the lead goes forward by ``lead`` frames a step; None leaves it out.
        """
        chosen = [int(case) for case in cases]
        parts = {"parameters": data.parameters, "mask": data.masks()}
        told = {}
        for name in self._names():
            if (values := parts[name]) is None:
                raise RequestError(f"The model is told {name}, and the data hold none.")
            told[name] = torch.from_numpy(values[chosen]).float()
        if lead is None:
            return list(told.values())
        return with_lead(told, torch.full((len(chosen),), float(lead)), self.given)

    def _names(self) -> list[str]:
        return [name for name in self.given if name != "lead"]

    def _last_lead(self, data: Trajectories, cases: Cases) -> int:
        return min(data.length(int(case)) for case in cases) - self.history


def build(name: str, **arguments: Any) -> nn.Module:
    """Build a model of :data:`MODELS` by name.

    >>> type(build("fno", in_ch=1, out_ch=1, width=4, modes=2)).__name__
    'FNO'
    """
    if name not in MODELS:
        raise RequestError(
            f"Unknown model '{name}': choose one of {', '.join(MODELS)}.{nearest(name, MODELS)}"
        )
    module, _, kind = MODELS[name].partition(":")
    model: nn.Module = getattr(importlib.import_module(module), kind)(**arguments)
    return model


def warmup_cosine(
    epochs: int, warmup: int, lr: float, least: float = 1e-7
) -> Callable[[float], float]:
    r"""Return SineNet's schedule, a factor on ``lr`` for :func:`pantarhei.fit.fit`.

    Constant within an epoch e: linear from ``least`` to ``lr`` over ``warmup`` epochs, then
    :math:`\mathrm{least} + (\mathrm{lr} - \mathrm{least})(1 + \cos \pi\frac{e - w}{E - w})/2`.

    >>> [f"{2e-4 * warmup_cosine(50, 5, 2e-4)(e / 50):.1e}" for e in (0, 5, 50)]
    ['1.0e-07', '2.0e-04', '1.0e-07']
    """

    def factor(fraction: float) -> float:
        epoch = math.floor(fraction * epochs + 1e-9)
        if epoch < warmup:
            value = least + (lr - least) * epoch / warmup
        else:
            turn = math.pi * (epoch - warmup) / (epochs - warmup)
            value = least + (lr - least) * (1 + math.cos(turn)) / 2
        return value / lr

    return factor


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    low = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16) if low else nullcontext()


def _joined(parts: Sequence[Forecast]) -> Forecast:
    """Join forecasts of different cases; one that ended early, when all blew up, is filled up."""
    steps = max((part.steps for part in parts), key=len)

    def filled(states: Tensor, length: int) -> Tensor:
        missing = length - states.shape[1]
        nan = states.new_full((len(states), missing, *states.shape[2:]), math.nan)
        return torch.cat([states, nan], 1)

    def join(pieces: list[Tensor]) -> Tensor:
        longest = max(piece.shape[1] for piece in pieces)
        return torch.cat([filled(piece, longest) for piece in pieces])

    return Forecast(
        None if parts[0].kept is None else join([part.kept for part in parts]),
        None,
        steps,
        {name: join([part.scores[name] for part in parts]) for name in parts[0].scores},
        torch.cat([part.blown_at for part in parts]),
    )
