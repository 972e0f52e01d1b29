"""Probes on a schedule: what is measured of a network while it learns, in one table.

A probe is any callable ``probe(model, loss, *batches)`` that returns a dict of numbers. One that
has a parameter ``optimizer`` is given the optimizer. One that keeps something which a resumed
training must find again has ``state_dict()``, a flat dict of tensors, and ``load_state_dict(it)``.
"""

from __future__ import annotations

import csv
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pantarhei._fit_random import own_randomness
from pantarhei.errors import RequestError
from pantarhei.files import atomic, write_csv
from pantarhei.probes._objective import Loss
from pantarhei.probes.sharpness import Sharpness

if TYPE_CHECKING:
    from pantarhei.fit import Step

Row = dict[str, float]


class Probe(Protocol):
    """What :class:`Watch` calls: any function of this form."""

    def __call__(self, model: nn.Module, loss: Loss, *batches: Any) -> Mapping[str, float]:
        """Measure, and leave the model as it is."""


class Watch:
    r"""Probes attached to a training: ``fit(..., on_step=Watch(loss, batch, every=50))``.

    At every ``every``-th step each probe is called on the model, the loss and the batches, and what
    they return becomes a row of one table, ``rows``, with the ``step``. The training is not
    disturbed: not its weights, nor its random numbers.

    With ``path`` the table is a CSV file, written whole after each row. A training that was killed
    and is resumed goes on with it: the rows of steps that the training makes again are measured
    again, so that none is double and none is missing. Under ``torchrun`` the first process measures
    (its share of the batch, where none is given).

    Args:
        loss: As for ``fit``; usually the same.
        batches: What to measure on, always the same examples; without any, the training batch of
            the step, whose curvature fluctuates. Augmentation belongs outside of it.
        every: Steps between rows, or a function of the step's number that says whether to measure.
        probes: A list, or a dict whose names then precede their columns (``name_column``); default
            :class:`Sharpness`.
        path: The CSV file.

    Raises :class:`RequestError` for columns of the same name from two probes, values that are not
    numbers, a file that is not such a table, and whatever the probes raise.

    >>> from pantarhei.fit import Batches, fit
    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> data = Batches(x, x.sum(1, keepdim=True), batch_size=64)
    >>> mse = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    >>> watch = Watch(mse, (x, x.sum(1, keepdim=True)), every=10)
    >>> sgd = lambda weights: torch.optim.SGD(weights, lr=0.1)
    >>> _ = fit(nn.Linear(3, 1), data, mse, steps=30, optimizer=sgd, on_step=watch, quiet=True)
    >>> [row["step"] for row in watch.rows], watch.rows[-1]["threshold"]
    ([10, 20, 30], 20.0)
    """

    def __init__(
        self,
        loss: Loss,
        *batches: Any,
        every: int | Callable[[int], bool] = 50,
        probes: Sequence[Probe] | Mapping[str, Probe] | None = None,
        path: str | os.PathLike[str] | None = None,
    ):
        if isinstance(every, int) and every < 1:
            raise RequestError(f"every={every}: choose at least 1 step, or a function of the step.")
        probes = (Sharpness(),) if probes is None else probes
        if not isinstance(probes, Mapping):
            probes = {str(i): probe for i, probe in enumerate(probes)}
            self._prefixes = dict.fromkeys(probes, "")
        else:
            self._prefixes = {name: f"{name}_" for name in probes}
        if not all(callable(probe) for probe in probes.values()):
            raise RequestError("a probe is not callable: give functions probe(model, loss, batch).")
        self.loss, self.batches, self.every = loss, batches, every
        self._probes = dict(probes)
        self._path = Path(path) if path else None
        self.rows: list[Row] = _read(self._path)
        self._trained = False  # a step of training has been seen
        self._loaded = False  # what the probes keep has been read

    def __call__(self, step: Step) -> None:
        """Measure after a step of ``fit`` (its ``on_step``), if it is due."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_rank() > 0:
            return
        if not self._trained:
            # Where a resumed training begins; what it had reached beyond is made again.
            self.rows = [row for row in self.rows if row["step"] < step.number]
            self._trained = True
        every = self.every
        if step.number % every == 0 if isinstance(every, int) else every(step.number):
            self.record(step.model, step.number, optimizer=step.optimizer, batch=step.batch)

    def record(
        self,
        model: nn.Module,
        step: int,
        *,
        optimizer: Optimizer | None = None,
        batch: Any = None,
    ) -> Row:
        """Measure now and return the row; one of the same step is replaced.

        For the state before training, ``watch.record(model, 0)``, and for other training loops.
        """
        self._load()
        batches = self.batches or ((batch,) if batch is not None else ())
        row: Row = {"step": step}
        for name, probe in self._probes.items():
            with _undisturbed(model):
                measured = self._measure(probe, model, batches, optimizer)
            for column, value in measured.items():
                column = self._prefixes[name] + column
                if column in row:
                    raise RequestError(
                        f"two probes report '{column}': give them names, probes={{'a': ..., 'b': "
                        "...}."
                    )
                row[column] = _number(column, value)
        self.rows = sorted(
            [*(old for old in self.rows if old["step"] != step), row], key=lambda r: r["step"]
        )
        self._write()
        return row

    def series(self, column: str) -> tuple[list[float], list[float]]:
        """Return the steps and values of a column, where it was recorded."""
        kept = [row for row in self.rows if column in row]
        if not kept:
            known = ", ".join(dict.fromkeys(name for row in self.rows for name in row))
            raise RequestError(f"no row has '{column}': choose one of {known or 'none yet'}.")
        return [row["step"] for row in kept], [row[column] for row in kept]

    def _measure(
        self, probe: Probe, model: nn.Module, batches: tuple[Any, ...], optimizer: Optimizer | None
    ) -> Mapping[str, float]:
        wants = "optimizer" in inspect.signature(probe).parameters
        result = (
            probe(model, self.loss, *batches, optimizer=optimizer)  # type: ignore[call-arg]
            if wants
            else probe(model, self.loss, *batches)
        )
        if not isinstance(result, Mapping):
            raise RequestError(
                f"a probe returned {type(result).__name__}: return a dict of numbers."
            )
        return result

    def _load(self) -> None:
        states, first = self._states, not self._loaded
        self._loaded = True
        if not (first and self.rows and states and states.exists()):
            return
        try:
            tensors = load_file(states)
        except (SafetensorError, OSError) as error:
            raise RequestError(
                f"'{states}' is not readable ({error}): remove it to go on without what the probes "
                "kept."
            ) from error
        for name, probe in self._stateful().items():
            start = f"{name}/"
            own = {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
            if own:
                probe.load_state_dict(own)

    def _stateful(self) -> dict[str, Any]:
        return {n: p for n, p in self._probes.items() if hasattr(p, "state_dict")}

    @property
    def _states(self) -> Path | None:
        return self._path.with_suffix(".safetensors") if self._path else None

    def _write(self) -> None:
        if self._path is None or self._states is None:
            return
        kept: dict[str, Tensor] = {
            f"{name}/{key}": tensor.detach().cpu().contiguous()
            for name, probe in self._stateful().items()
            for key, tensor in probe.state_dict().items()
        }
        if kept:
            with atomic(self._states) as temporary:
                save_file(kept, temporary)
        write_csv(self._path, self.rows)


def subset(batch: Any, rows: int, seed: int = 0) -> Any:
    """Return the same random rows of every tensor in a batch, to measure on fewer examples.

    >>> x, y = subset((torch.arange(5), torch.arange(5) * 10), 2)
    >>> len(x), bool((y == 10 * x).all())
    (2, True)
    """
    parts, structure = pytree.tree_flatten(batch)
    lengths = {len(p) for p in parts if isinstance(p, Tensor) and p.dim()}
    if len(lengths) != 1 or not 1 <= rows <= max(lengths):
        raise RequestError(
            f"rows={rows} of a batch whose tensors have {sorted(lengths)} rows: choose at most as "
            "many, of tensors that agree in length."
        )
    chosen = torch.randperm(lengths.pop(), generator=torch.Generator().manual_seed(seed))[:rows]
    return pytree.tree_unflatten(
        [p[chosen.to(p.device)] if isinstance(p, Tensor) and p.dim() else p for p in parts],
        structure,
    )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put training modes and random generators back, whatever a probe did."""
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with own_randomness(device):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _number(column: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"a probe returned {type(value).__name__} as '{column}': return one number."
        ) from error
    return int(number) if isinstance(value, int) else number


def _read(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            table = list(csv.DictReader(file, strict=True))
        rows = [
            {name: float(text) for name, text in row.items() if text not in ("", None)}
            for row in table
        ]
        if any(not math.isfinite(row["step"]) for row in rows):
            raise ValueError("a step that is not a number")
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise RequestError(
            f"'{path}' is not a table of probes ({error}): name another file, or remove it."
        ) from error
    return [{**row, "step": int(row["step"])} for row in rows]
