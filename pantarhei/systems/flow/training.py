"""Training of flow models: one step or several, with push-forward and noise, or from points."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pantarhei.data.trajectories import Trajectories
from pantarhei.data.windows import Windows
from pantarhei.devices import chosen_device
from pantarhei.errors import RequestError
from pantarhei.fit import Batches, Fit, fit
from pantarhei.rollout import forecast_loss
from pantarhei.systems.flow.evaluation import mean, one_step
from pantarhei.systems.flow.surrogate import Surrogate


def batch_nmse(forecast: Tensor, truth: Tensor) -> Tensor:
    r"""Return :math:`\overline{(p-y)^2} / \overline{y^2}` of a whole mini-batch: one ratio.

    CFDBench's training loss. Fast cases weigh as the square of their speed.

    >>> batch_nmse(torch.zeros(2, 3), torch.ones(2, 3)).item()
    1.0
    """
    return (forecast - truth).square().mean() / truth.square().mean()


def train(
    surrogate: Surrogate,
    data: Trajectories,
    cases: Sequence[int],
    *,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    schedule: Literal["published", "cosine", "constant"] = "published",
    horizon: int = 1,
    pushforward: int = 0,
    noise: float = 0.0,
    queries: int | None = None,
    development: Sequence[int] = (),
    evaluate_every: int = 10,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    precision: Literal["auto", "32", "bf16"] = "32",
    label: str = "training",
    quiet: bool = False,
) -> Fit:
    """Train with Adam on the NMSE of a mini-batch (:func:`batch_nmse`), as CFDBench does.

    Args:
        surrogate: Trained in place.
        data: Trajectories with parameters.
        cases: The training cases.
        epochs: Passes over every pair of frames (every frame, for models that answer for a time).
        batch_size: Frames in a batch; no more than there are.
        lr: Learning rate.
        schedule: ``"published"``: factor .9 every 20 epochs; ``"cosine"`` to zero; ``"constant"``.
        horizon: Steps whose errors are summed, with gradients through all of them.
        pushforward: Steps before these that carry no gradient.
        noise: Standard deviation of noise on the input, in units of the model's velocity.
        queries: Random points per frame; default 1,000 for models that answer for a time, and the
            whole frame for the others (a number makes :class:`AutoFFN` and
            :class:`AutoDeepONetCNN` cheaper to train).
        development: Cases whose one-step NMSE chooses the weights, every ``evaluate_every`` epochs.
        checkpoint, seed, device, precision, label, quiet: As in :func:`pantarhei.fit.fit`.

    Raises :class:`RequestError` where the options do not go together.
    """
    if queries is not None and (horizon > 1 or pushforward):
        raise RequestError("queries go with one step: leave horizon, pushforward or queries out.")
    if not surrogate.steps_forward and (horizon > 1 or pushforward or noise):
        raise RequestError(
            "a model that answers for a time takes no step: horizon, pushforward and noise are "
            "for the others."
        )
    where = chosen_device(device)
    surrogate.to(where)
    batches: Callable[[int], Any]
    if surrogate.steps_forward:
        batches, loss, per_epoch = _pairs(
            surrogate, data, cases, batch_size, horizon, pushforward, noise, queries, seed, where
        )
    else:
        batches, loss, per_epoch = _frames(
            surrogate, data, cases, batch_size, queries or 1000, seed, where
        )
    decay: Any = schedule
    if schedule == "published":
        decay = _Staircase(epochs)
    elif schedule not in ("cosine", "constant"):
        raise RequestError(f"schedule={schedule!r}: choose published, cosine or constant.")
    validation: dict[str, Any] = {}
    if len(development):
        validation = {
            "validate": lambda model: mean(one_step(model, data, development), "nmse_u"),
            "validate_every": evaluate_every * per_epoch,
            "best": "min",
        }
    return fit(
        surrogate,
        batches,
        loss,
        steps=epochs * per_epoch,
        optimizer=torch.optim.Adam,
        lr=lr,
        schedule=decay,
        checkpoint=checkpoint,
        seed=seed,
        device=where,
        precision=precision,
        label=label,
        quiet=quiet,
        **validation,
    )


class _Staircase:
    """Factor .9 for every 20 epochs done."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def __call__(self, fraction: float) -> float:
        return float(0.9 ** int(fraction * self.epochs / 20 + 1e-9))


def _pairs(
    surrogate: Surrogate,
    data: Trajectories,
    cases: Sequence[int],
    batch_size: int,
    horizon: int,
    pushforward: int,
    noise: float,
    queries: int | None,
    seed: int,
    device: torch.device,
) -> tuple[Windows, Any, int]:
    given: tuple[Any, ...] = ("parameters",) if data.mask is None else ("parameters", "mask")
    reach = horizon + pushforward
    available = sum(max(0, data.length(int(c)) - reach) for c in cases)
    windows = Windows(
        data,
        cases,
        history=1,
        horizon=reach,
        batch_size=max(1, min(batch_size, available)),
        seed=seed,
        given=given,
        device=device,
    )
    channels = surrogate.channels

    def error(forecast: Tensor, truth: Tensor) -> Tensor:
        return batch_nmse(forecast[:, :channels], truth[:, :channels])

    whole = forecast_loss(
        error, steps=horizon, pushforward=pushforward, noise=noise * float(surrogate.unit)
    )
    if queries is None:
        return windows, whole, len(windows)
    count = queries

    def at_points(model: Any, batch: Any) -> Tensor:
        past, targets, parameters, *mask = batch
        field, target = past[:, 0], targets[:, 0, :channels]
        if noise:
            field = field + noise * model.unit * torch.randn_like(field)
        rows, columns = _draw(count, target.shape[-2:], target.device)
        found = model.step_at(field, parameters, torch.stack([rows, columns], 1), *mask)
        return batch_nmse(found, target[:, :, rows, columns].mT)

    return windows, at_points, len(windows)


def _frames(
    surrogate: Surrogate,
    data: Trajectories,
    cases: Sequence[int],
    batch_size: int,
    queries: int,
    seed: int,
    device: torch.device,
) -> tuple[Batches, Any, int]:
    chosen = [int(c) for c in cases]
    states = data.tensor(chosen, repeat_last=True)[:, :, : surrogate.channels].to(device)
    assert data.parameters is not None
    table = torch.from_numpy(data.parameters[chosen]).float().to(device)
    pairs = torch.tensor([(i, t) for i, c in enumerate(chosen) for t in range(data.length(c))])

    def gather(_: Any, pair: Tensor) -> tuple[Tensor, ...]:
        row, t = pair.to(device).unbind(1)
        return states[row, t], t.float(), table[row]

    def loss(model: Any, batch: Any) -> Tensor:
        target, t, parameters = batch
        rows, columns = _draw(queries, target.shape[-2:], target.device)
        found = model.at(torch.stack([rows, columns], 1).float(), t, parameters)
        return batch_nmse(found, target[:, :, rows, columns].mT)

    batches = Batches(pairs, batch_size=min(batch_size, len(pairs)), seed=seed, transform=gather)
    return batches, loss, len(batches)


def _draw(
    count: int, grid: tuple[int, ...] | torch.Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    rows, columns = (torch.randint(n, (count,), device=device) for n in grid)
    return rows, columns
