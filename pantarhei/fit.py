"""The training loop: one function over plain PyTorch, on Lightning Fabric.

What it adds to the ten lines everybody writes: devices and precision, accumulation and clipping,
schedules, averaged weights, validation with early stopping, and checkpoints from which a killed run
continues to the same weights, bit for bit.

The last is simple because nothing about a step depends on the steps before it except the weights
and the optimizer: the batch is a function of the draw number, the learning rate a function of the
step number, and the random numbers (dropout, augmentation) of step and seed.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments import TorchElasticEnvironment
from lightning_fabric.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from pantarhei import _fit_checkpoint as checkpoints
from pantarhei._fit_loader import Loader
from pantarhei._fit_loss import Loss as Loss
from pantarhei._fit_loss import scalar
from pantarhei._fit_random import mix, own_randomness, seed_all
from pantarhei._fit_state import Ema, State, Store, plain_groups
from pantarhei.devices import chosen_device
from pantarhei.errors import RequestError, nearest
from pantarhei.progress import progress

_STEPS_PER_SYNC = 16  # losses come to the host this many steps at a time
_COLUMNS = {"step", "lr", "loss", "gradient_norm"}  # of the history, besides the metrics
_ROWS = 500  # that the history has at most, unless log_every says otherwise


@dataclass(frozen=True)
class Step:
    """One finished update, as ``on_step`` sees it.

    The gradients that the update used (clipped) are still in the parameters, ``batch`` is the last
    of the accumulated ones. ``values`` are the loss and the other metrics, means over the
    accumulated batches, of this process alone and still on the device (reading one waits for it).
    """

    number: int
    model: nn.Module
    optimizer: Optimizer
    batch: Any
    values: Mapping[str, Tensor | float]


@dataclass
class Fit:
    """What :func:`fit` returns.

    ``model`` is the model that was given, trained in place and in evaluation mode. Its weights are
    the best validated ones (with ``best``), else the averaged ones (with ``ema``), else the last.
    ``history`` has a row per ``log_every`` steps: ``step``, ``lr``, ``loss`` and the other metrics
    as means since the row before, and the values of ``validate`` where it ran. ``stopped`` is
    ``"steps"``, ``"patience"`` or what ``on_step`` returned. ``best`` is the best value of the
    first validated quantity, reached after ``best_step`` steps.
    """

    model: nn.Module
    history: list[dict[str, float]]
    step: int
    stopped: str
    best: float | None = None
    best_step: int | None = None
    checkpoint: Path | None = None


class Batches:
    """Batches of tensors as a function of the draw number: ``batches(n)`` is the n-th batch.

    Every epoch goes through a new random permutation that depends only on ``(seed, epoch)``; the
    examples that do not fill a last batch are left out of that epoch. Nothing is remembered between
    calls, so that training resumes exactly and several readers do not disturb each other.

    ``transform(generator, *tensors)`` augments a batch; its generator depends only on ``(seed, n)``
    and lives on the device of the first tensor. Under ``torchrun`` every process transforms the
    whole batch and takes its share of the rows, so that the data do not depend on how many
    processes there are.

    Raises :class:`RequestError` when the tensors disagree in length, or the batch does not fit.

    >>> batches = Batches(torch.arange(10), batch_size=4, seed=0)
    >>> len(batches)
    2
    >>> torch.equal(batches(7)[0], batches(7)[0])
    True
    >>> sorted(torch.cat([*batches(0), *batches(1)]).tolist())[-1] < 10
    True
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        seed: int = 0,
        transform: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
    ):
        lengths = {len(t) for t in tensors}
        if len(lengths) != 1:
            raise RequestError(
                f"Batches needs tensors with one common number of rows, but they have "
                f"{sorted(lengths)}: give inputs and targets of the same examples."
            )
        if not 1 <= batch_size <= min(lengths):
            raise RequestError(
                f"batch_size={batch_size} does not fit {min(lengths)} examples: "
                f"choose 1 to {min(lengths)}."
            )
        self.tensors = tensors
        self.batch_size = batch_size
        self.seed = seed
        self.transform = transform
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.batch_size

    def __call__(self, n: int) -> tuple[Tensor, ...]:
        """Return the n-th batch, this process's share of it under ``torchrun``."""
        rank, world = _place_in_world()
        if self.batch_size % world:
            raise RequestError(
                f"batch_size={self.batch_size} cannot be shared by {world} processes: "
                f"choose a multiple of {world}."
            )
        epoch, position = divmod(n, len(self))
        chosen = self._permutation(epoch)[position * self.batch_size :][: self.batch_size]
        share = slice(
            rank * self.batch_size // world,
            (rank + 1) * self.batch_size // world,
        )
        if self.transform is None:
            chosen = chosen[share]
        batch = tuple(t[chosen.to(t.device)] for t in self.tensors)
        if self.transform is None:
            return batch
        generator = torch.Generator(batch[0].device).manual_seed(mix(self.seed, "draw", n))
        changed = self.transform(generator, *batch)
        changed = (changed,) if isinstance(changed, Tensor) else tuple(changed)
        return tuple(t[share] for t in changed)

    def _permutation(self, epoch: int) -> Tensor:
        kept, order = self._order
        if kept != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, "epoch", epoch))
            order = torch.randperm(len(self.tensors[0]), generator=generator)
            self._order = (epoch, order)
        return order


def fit(
    model: nn.Module,
    batches: Callable[[int], Any] | DataLoader,
    loss: Loss,
    *,
    steps: int,
    # the update
    optimizer: Callable[[list[nn.Parameter]], Optimizer] | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    schedule: Literal["constant", "cosine"] | Callable[[float], float] = "constant",
    warmup: int = 0,
    accumulate: int = 1,
    clip: float | None = None,
    ema: float | None = None,
    # validation
    validate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    validate_every: int | None = None,
    best: Literal["max", "min"] | None = None,
    patience: int | None = None,
    # what is kept
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    log_every: int | None = None,
    # where it runs
    seed: int = 0,
    precision: Literal["auto", "32", "bf16"] = "auto",
    device: str | torch.device = "auto",
    strategy: str | Strategy = "auto",
    # who watches
    label: str = "training",
    quiet: bool = False,
    on_step: Callable[[Step], str | None] | None = None,
) -> Fit:
    r"""Train ``model`` in place for ``steps`` updates and return a :class:`Fit`.

    One update, with :math:`a` = ``accumulate`` and :math:`b_n` = ``batches(n)``:

    .. math:: g_t = \tfrac1a \sum_{i<a} \nabla\, \mathrm{loss}(\theta_t, b_{ta+i}), \qquad
              \theta_{t+1} = \mathrm{optimizer}(\theta_t, \mathrm{clip}(g_t), \eta_t)

    Args:
        model: Any module; it is moved to the device. A ``torch.compile``\ d one works as it is.
        batches: A function of the draw number (:class:`Batches`, or your own; anything it returns
            is handed to ``loss`` with the tensors moved to the device), or a ``DataLoader``, whose
            order is then seeded here. Which sub-network to train is data too:
            ``lambda n: (*batches(n), sampler(n))``.
        loss: ``loss(model, batch)`` returns a scalar, or a scalar and a dict of scalars to log.
        steps: Number of updates, those before a resume included.
        optimizer: Makes the optimizer from the list of trainable parameters; default ``AdamW``.
        lr: Learning rate of every group; ``None`` leaves the optimizer's own.
        weight_decay: The same for weight decay.
        schedule: Factor on the learning rate: ``"constant"``, ``"cosine"`` (to zero), or a function
            of the fraction of the steps after the warm-up that are done, in [0, 1).
        warmup: The factor grows linearly to 1 over these first steps.
        accumulate: Batches per update.
        clip: Largest norm of the gradient; larger ones are scaled down to it.
        ema: Decay :math:`d` of averaged weights
            :math:`\bar\theta \leftarrow \min(d, \tfrac{1+t}{10+t})\,\bar\theta + (1-\cdot)\,\theta`
            (floating-point buffers too). They are what is validated and returned.
        validate: ``validate(model)`` without gradients and in evaluation mode; returns a number, or
            a dict whose first entry decides ``best`` and ``patience``.
        validate_every: Steps between validations; ``None``: after the last step only.
        best: Return the weights of the largest (``"max"``) or smallest (``"min"``) value.
        patience: Stop after this many validations without a new best.
        checkpoint: Folder for the training state and ``metrics.csv``.
        checkpoint_every: Steps between checkpoints; default a tenth of ``steps``.
        resume: Continue from ``checkpoint`` when there is one; a finished run is loaded and
            returned at once. ``False`` removes what is there and starts anew.
        log_every: Steps per row of the history; default ``steps / 500``.
        seed: Decides all random numbers drawn during training. The global generators are put back
            as they were afterwards.
        precision: ``"bf16"`` runs ``loss`` under bfloat16 autocast (weights stay as they are);
            ``"auto"`` does so on CUDA only.
        device: ``"auto"`` (CUDA when there is one), ``"cpu"``, ``"cuda"`` or a ``torch.device``.
        strategy: Fabric's strategy; the default is the single device or, under ``torchrun``,
            data-parallel training in which parameters may go unused.
        label: Name for the progress display and for messages.
        quiet: Show no progress.
        on_step: Called with a :class:`Step` after every update; a string it returns stops the
            training with that reason.

    Raises:
        RequestError: For settings that contradict each other, a loss that is not finite (the last
            good checkpoint stays), a checkpoint that is damaged or belongs to another model or
            other settings, and a full disk.

    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> net = nn.Linear(1, 1)
    >>> result = fit(
    ...     net,
    ...     Batches(x, 3 * x + 1, batch_size=16),
    ...     lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    ...     steps=200, lr=0.1, weight_decay=0.0, schedule="cosine", quiet=True,
    ... )
    >>> result.stopped, round(net.weight.item(), 2), round(net.bias.item(), 2)
    ('steps', 3.0, 1.0)
    """
    _check_counts(
        steps=steps,
        accumulate=accumulate,
        validate_every=validate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
    )
    _check_names(schedule, precision, best)
    _check_together(steps, warmup, clip, ema, validate, validate_every, best, patience)
    fabric = _fabric(device, precision, strategy)
    bare = getattr(model, "_orig_mod", model)  # without torch.compile's wrapper
    draw = Loader(batches, seed, fabric) if isinstance(batches, DataLoader) else batches
    factor = functools.partial(_factor, schedule=schedule, warmup=warmup, steps=steps)

    with own_randomness(fabric.device):
        objective = fabric.setup_module(_Objective(model, loss))
        updater: Any = fabric.setup_optimizers(_optimizer(bare, optimizer, lr, weight_decay))
        rates = [float(group["lr"]) for group in updater.param_groups]
        state = State(bare, updater.optimizer, Ema(bare, ema) if ema else None)
        log = _Log(state.history, log_every or max(1, steps // _ROWS), fabric, label, checkpoint)
        settings = {
            "steps": steps if schedule != "constant" else None,  # a constant rate can go on
            "optimizer": _name(type(updater.optimizer)),
            "hyperparameters": plain_groups(updater.optimizer),
            "schedule": schedule if isinstance(schedule, str) else _name(schedule),
            "warmup": warmup,
            "accumulate": accumulate,
            "clip": clip,
            "ema": ema,
            "best": best,
            "patience": patience,
            "seed": seed,
            "precision": fabric.strategy.precision.precision,
            "processes": fabric.world_size,
        }
        store = Store(checkpoint, settings, fabric) if checkpoint else None
        if store:
            store.open(state, resume)
        if state.stopped == "steps" and state.step < steps:
            state.stopped = ""
        if state.step > steps:
            raise RequestError(
                f"'{checkpoint}' is already at step {state.step}, past steps={steps}: "
                "ask for more steps, use another folder, or pass resume=False."
            )

        bare.train()
        shown = quiet or fabric.global_rank > 0
        with progress(steps, label, shown, start=state.step) as bar:
            while not state.stopped:
                scale = factor(state.step)
                for group, rate in zip(updater.param_groups, rates, strict=True):
                    group["lr"] = rate * scale
                updater.zero_grad(set_to_none=True)
                draws = range(state.step * accumulate, (state.step + 1) * accumulate)
                batch, values = _gradients(objective, draw, draws, seed, fabric)
                if clip:
                    norm: Any = fabric.clip_gradients(
                        objective, updater, max_norm=clip, error_if_nonfinite=False
                    )
                    # Sharded gradients have a norm in parts; this is the step's only use of it.
                    values["gradient_norm"] = getattr(norm, "full_tensor", lambda n=norm: n)()
                updater.step()
                state.step += 1
                if state.ema:
                    state.ema.update(state.step)
                log.add(state.step, rates[0] * scale, values)

                finished = state.step == steps
                if on_step:
                    told = on_step(Step(state.step, model, updater.optimizer, batch, values))
                    state.stopped = told if isinstance(told, str) else ""
                if finished:
                    state.stopped = state.stopped or "steps"
                if validate and (state.stopped or _due(state.step, validate_every)):
                    log.flush(row=True)
                    state.judge(_validate(model, validate, state, fabric), best, patience)
                if store and (
                    state.stopped or _due(state.step, checkpoint_every or max(1, steps // 10))
                ):
                    log.flush(row=True)
                    log.check_weights(bare, state.step)
                    store.save(state)
                bar.advance(note=log.note)
        log.flush(row=True)
        log.check_weights(bare, state.step)
        state.finish(fabric)
    return Fit(
        model,
        state.history,
        state.step,
        state.stopped,
        state.best,
        state.best_step,
        Path(checkpoint) if checkpoint else None,
    )


def _gradients(
    objective: Any, draw: Callable[[int], Any], draws: range, seed: int, fabric: Fabric
) -> tuple[Any, dict[str, Any]]:
    """Add up the gradients of some draws; return the last batch and the means of what was seen."""
    seen: dict[str, list[Any]] = {}
    for n in draws:
        seed_all(mix(seed, fabric.global_rank, n), fabric.device)
        batch = _to_device(draw(n), fabric.device)
        with fabric.no_backward_sync(objective, enabled=n != draws[-1]):
            value, metrics = objective(batch)
            fabric.backward(value / len(draws) if len(draws) > 1 else value)
        for name, number in {**metrics, "loss": value.detach()}.items():
            seen.setdefault(name, []).append(number)
    means = {k: v[0] if len(v) == 1 else sum(v) / len(v) for k, v in seen.items()}
    return batch, means


class _Objective(nn.Module):
    """``loss(model, batch)`` as one forward, so that Fabric wraps the model and the loss together.

    Inside, ``model`` is the user's own module: its attributes and methods are there, and a loss may
    call it several times (sandwich training), which a model wrapped for DDP does not allow.
    """

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor | float]]:
        result = self.loss(self.model, batch)
        value, metrics = scalar(result), result[1] if isinstance(result, tuple) else {}
        if not value.requires_grad:
            raise RequestError(
                "the loss does not depend on a trainable parameter: use the model's output in it, "
                "without no_grad() or detach()."
            )
        if taken := metrics.keys() & _COLUMNS:
            raise RequestError(
                f"a metric cannot be called '{min(taken)}', the history has a column of that name: "
                "choose another."
            )
        for name, metric in metrics.items():
            if isinstance(metric, Tensor) and metric.numel() != 1:
                raise RequestError(
                    f"the metric '{name}' has shape {tuple(metric.shape)}: reduce it to one number."
                )
        return value, {
            name: m.detach().reshape(()) if isinstance(m, Tensor) else m
            for name, m in metrics.items()
        }


class _Bf16(MixedPrecision):
    """Autocast alone: the batch keeps its types, since targets and coordinates need theirs."""

    def convert_input(self, data: Any) -> Any:
        return data


class _Log:
    """Losses wait on the device and come to the host a few steps at a time."""

    def __init__(
        self,
        history: list[dict[str, float]],
        every: int,
        fabric: Fabric,
        label: str,
        checkpoint: str | os.PathLike[str] | None,
    ):
        self.history, self.every, self.fabric, self.label = history, every, fabric, label
        self.kept = f"; the last good checkpoint stays in '{checkpoint}'" if checkpoint else ""
        self.note = ""
        self._waiting: list[tuple[int, float, dict[str, Tensor | float]]] = []
        self._row: dict[str, list[float]] = {}
        self._last: dict[str, float] = {"step": 0, "lr": math.nan}

    def add(self, step: int, lr: float, values: dict[str, Tensor | float]) -> None:
        """Take in what one step measured."""
        self._waiting.append((step, lr, values))
        if len(self._waiting) >= _STEPS_PER_SYNC:
            self.flush()

    def flush(self, row: bool = False) -> None:
        """Bring what waits to the host; ``row`` ends the history's row at the last step."""
        waiting, self._waiting = self._waiting, []
        for (step, lr, _), values in zip(waiting, self._fetch(waiting), strict=True):
            if not math.isfinite(values["loss"]):
                self._refuse(f"the loss became {values['loss']}", step)
            for name, value in values.items():
                self._row.setdefault(name, []).append(value)
            self._last = {"step": step, "lr": lr}
            self.note = f"loss {values['loss']:.4g}"
            if step % self.every == 0:
                self._end_row()
        if row:
            self._end_row()

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Refuse weights that are not finite: the last update can break them unseen."""
        weights = [checkpoints.local(p.detach()) for p in model.parameters()]
        if not math.isfinite(float(nn.utils.get_total_norm(weights))):
            self._refuse("the weights are no longer finite", step)

    def _fetch(self, waiting: list[tuple[int, float, dict[str, Any]]]) -> list[dict[str, float]]:
        if not waiting:
            return []
        numbers = [
            torch.as_tensor(v, dtype=torch.float64, device=self.fabric.device)
            for _, _, values in waiting
            for v in values.values()
        ]
        mean: Any = self.fabric.all_reduce(torch.stack(numbers), reduce_op="mean")
        host = iter(mean.tolist())
        return [{name: next(host) for name in values} for _, _, values in waiting]

    def _end_row(self) -> None:
        if self._row:
            means = {name: sum(values) / len(values) for name, values in self._row.items()}
            self.history.append({**self._last, **means})
            self._row = {}

    def _refuse(self, what: str, step: int) -> None:
        raise RequestError(
            f"{what} at step {step} of '{self.label}': lower lr (it was {self._last['lr']:.3g}) or "
            f"limit the gradient with clip=1.0{self.kept}."
        )


def _validate(
    model: nn.Module,
    validate: Callable[[nn.Module], float | Mapping[str, float]],
    state: State,
    fabric: Fabric,
) -> dict[str, float]:
    """Run the user's validation on the weights that would be returned; rank 0's values count."""
    training = [m for m in state.model.modules() if m.training]
    with torch.no_grad(), state.validated_weights():
        state.model.eval()
        result = validate(model)
    for module in training:
        module.training = True
    if isinstance(result, Mapping):
        values = {f"validation_{name}": float(value) for name, value in result.items()}
    else:
        values = {"validation": float(result)}
    return fabric.broadcast(values)


def _check_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise RequestError(f"{name}={count}: choose a whole number of at least 1.")


def _check_names(schedule: Any, precision: str, best: str | None) -> None:
    for name, value, known in (
        ("schedule", "constant" if callable(schedule) else schedule, ["constant", "cosine"]),
        ("precision", precision, ["auto", "32", "bf16"]),
        ("best", "max" if best is None else best, ["max", "min"]),
    ):
        if value not in known:
            hint = nearest(str(value), known)
            raise RequestError(f"{name}={value!r} is unknown: choose {' or '.join(known)}.{hint}")


def _check_together(
    steps: int,
    warmup: int,
    clip: float | None,
    ema: float | None,
    validate: Any,
    validate_every: int | None,
    best: str | None,
    patience: int | None,
) -> None:
    if not 0 <= warmup <= steps:
        raise RequestError(f"warmup={warmup}: choose 0 to steps={steps}.")
    if clip is not None and not clip > 0:
        raise RequestError(f"clip={clip}: choose a positive gradient norm, or None.")
    if ema is not None and not 0 < ema < 1:
        raise RequestError(f"ema={ema}: choose a decay between 0 and 1, for example 0.999.")
    if validate is None and (validate_every or best or patience):
        raise RequestError("validate_every, best and patience need validate=: give the function.")
    if patience and best is None:
        raise RequestError("patience needs best='max' or best='min': say what is better.")


def _fabric(device: str | torch.device, precision: str, strategy: str | Strategy) -> Fabric:
    """Set up Fabric on one device, or on those that torchrun gave to this process's group."""
    where = chosen_device(device)
    here, nodes = 1, 1
    if TorchElasticEnvironment.detect() and "LOCAL_WORLD_SIZE" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // here
    if strategy == "auto" and here * nodes > 1:
        strategy = "ddp_find_unused_parameters_true"  # a step may train a part of the network
    low = precision == "bf16" or (
        precision == "auto" and where.type == "cuda" and torch.cuda.is_bf16_supported()
    )
    shards = isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or "fsdp" in str(strategy)
    try:
        fabric = Fabric(
            accelerator=where.type,
            devices=[where.index] if where.index is not None and here == 1 else here,
            num_nodes=nodes,
            strategy=strategy,
            precision="bf16-mixed" if low and shards else None,
            plugins=_Bf16("bf16-mixed", where.type) if low and not shards else None,
        )
    except (ValueError, RuntimeError) as error:
        raise RequestError(
            f"strategy={strategy!r} on {where.type} is refused by Fabric ({error}): choose another."
        ) from error
    fabric.launch()
    return fabric


def _optimizer(
    model: nn.Module,
    make: Callable[[list[nn.Parameter]], Optimizer] | None,
    lr: float | None,
    weight_decay: float | None,
) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise RequestError(
            "the model has no trainable parameter: call requires_grad_(True) on what to train."
        )
    optimizer = (make or torch.optim.AdamW)(parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RequestError(
            "LBFGS evaluates the loss several times per step, which this loop does not: use "
            "another optimizer."
        )
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        for group in optimizer.param_groups if value is not None else ():
            if name not in group:
                raise RequestError(
                    f"{type(optimizer).__name__} has no {name}: leave {name} out of fit()."
                )
            group[name] = value
    return optimizer


def _factor(step: int, schedule: str | Callable[[float], float], warmup: int, steps: int) -> float:
    """Factor on the learning rate for the update that follows ``step`` finished ones."""
    if step < warmup:
        return (step + 1) / warmup
    fraction = (step - warmup) / (steps - warmup)
    if callable(schedule):
        return float(schedule(fraction))
    return 1.0 if schedule == "constant" else 0.5 * (1 + math.cos(math.pi * fraction))


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors of a batch; what is neither a plain container nor movable stays as it is."""
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(part, device) for part in batch))
    if type(batch) in (tuple, list):
        return type(batch)(_to_device(part, device) for part in batch)
    if type(batch) is dict:
        return {name: _to_device(part, device) for name, part in batch.items()}
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return batch.to(device) if hasattr(batch, "to") else batch


def _place_in_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else "?"
