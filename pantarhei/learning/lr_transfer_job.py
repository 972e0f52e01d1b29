"""The body of ``pantarhei lr-transfer``: a sweep on the user's factory, the rate, the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.data.table import read_arrays, read_table
from pantarhei.errors import RequestError
from pantarhei.files import write_figure, write_json
from pantarhei.fit import Batches, Loss
from pantarhei.learning.lr_transfer import Size, Sweep, Transfer, lr_sweep, sizes_of, start_of
from pantarhei.learning.user_code import load_function

_EVALUATED = 4096  # rows of the data that the final loss is taken on
_GRIDS = {"sgd": (-6, 4), "adam": (-15, -4), "adamw": (-15, -4)}  # powers of two


@dataclass(frozen=True)
class Task:
    """What to train on: batches, loss, and the batches of the final loss."""

    batches: Callable[[int], Any]
    loss: Loss
    evaluate: tuple[Any, ...]


def parse_grid(text: str | None, optimizer: str) -> tuple[float, ...]:
    """Read ``2^-4..2^6`` (every power of two) or ``0.01,0.03,0.1``.

    >>> parse_grid("2^-1..2^1", "sgd"), parse_grid("0.1,0.3", "sgd")
    ((0.5, 1.0, 2.0), (0.1, 0.3))
    """
    low, high = _GRIDS[optimizer]
    text = text or f"2^{low}..2^{high}"
    try:
        if ".." in text:
            ends = [float(part.strip().removeprefix("2^")) for part in text.split("..")]
            first, last = ends
            return tuple(2.0 ** (first + k) for k in range(math.floor(last - first) + 1))
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(
            f"--grid '{text}' is neither 2^-4..2^6 nor a list 0.01,0.03,0.1."
        ) from None


def parse_sizes(text: str | None, option: str) -> tuple[int, ...]:
    """Read ``64,128,256``.

    >>> parse_sizes("64,128", "--widths"), parse_sizes(None, "--depths")
    ((64, 128), ())
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise RequestError(f"{option} '{text}' is not a list of whole numbers: 64,128.") from None


def load_task(data: str, loss: str, batch_size: int, seed: int) -> Task:
    """Read the data and choose the loss.

    ``data`` is an ``.npz`` with X and y, a CSV whose last column is the target, or a
    ``file.py:function`` that returns either two tensors, or a function of the step's number that
    returns a batch, or batches in a list.
    """
    if ":" in data and not Path(data).exists():
        made = load_function(data, "--data")()
        if callable(made):
            return Task(made, _loss(loss, made(0)), ())
        if not (isinstance(made, tuple) and len(made) == 2):
            batches = tuple(made) if isinstance(made, Iterable) else ()
            if not batches:
                raise RequestError(f"--data '{data}' returned {type(made).__name__}: no batches.")
            return Task(lambda n: batches[n % len(batches)], _loss(loss, batches[0]), batches)
        x, y = (torch.as_tensor(part) for part in made)
    else:
        x, y = _table(data)
    rows = Batches(x, y, batch_size=min(batch_size, len(x)), seed=seed)
    parts = zip(x[:_EVALUATED].split(512), y[:_EVALUATED].split(512), strict=True)
    return Task(rows, _loss(loss, (x, y)), tuple(parts))


def _table(path: str) -> tuple[Tensor, Tensor]:
    if not path.lower().endswith(".npz"):
        table = read_table(path)
        classes = all("=" in name for name in table.target_names)
        y = torch.from_numpy(table.targets)
        return torch.from_numpy(table.inputs).float(), y.argmax(1) if classes else y.float()
    x, y = (torch.as_tensor(part) for part in read_arrays(path))
    if len(x) != len(y) or len(x) < 2:
        raise RequestError(f"'{path}' has {len(x)} rows of X and {len(y)} of y.")
    return _narrow(x), _narrow(y)


def _narrow(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.long()


def _loss(name: str, example: Any) -> Loss:
    """Return the loss of that name; ``auto`` is cross-entropy for whole numbers, else MSE."""
    if ":" in name:
        return load_function(name, "--loss")
    if name not in ("auto", "cross-entropy", "mse"):
        raise RequestError(
            f"--loss '{name}' is unknown: choose auto, cross-entropy, mse or file.py:function."
        )
    target = example[1] if isinstance(example, tuple | list) and len(example) == 2 else None
    if not isinstance(target, Tensor):
        raise RequestError("the batches are not pairs (inputs, targets): name a --loss.")
    if name == "cross-entropy" or (name == "auto" and not target.is_floating_point()):
        return _cross_entropy
    return _mse


def _output(model: Any, inputs: Any) -> Tensor:
    result = model(inputs)
    return getattr(result, "logits", result)


def _cross_entropy(model: Any, batch: Any) -> Tensor:
    logits, targets = _output(model, batch[0]), batch[1]
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _mse(model: Any, batch: Any) -> Tensor:
    output = _output(model, batch[0])
    return F.mse_loss(output, batch[1].reshape(output.shape).to(output.dtype))


@dataclass(frozen=True)
class Result:
    """What the command reports."""

    sweep: Sweep
    transfer: Transfer
    groups: list[dict[str, Any]]  # of the target: factor on the rate, and the parameters

    def to_json(self) -> dict[str, Any]:
        """Return the transferred rate, the verdict and all that was measured."""
        proxy = self.transfer.optima[0]
        return {
            "lr": proxy.lr,
            "proxy": asdict(proxy.size),
            **self.transfer.to_json(),
            "target_groups": self.groups,
            "sweep": self.sweep.to_json(),
        }

    def rows(self) -> Iterable[tuple[str, ...]]:
        """Return the table: size, best rate, its loss, the parabola's vertex, the regret."""
        found = self.transfer
        for optimum, regret in zip(found.optima, found.regret, strict=True):
            if optimum.lr is None:
                yield str(optimum.size), "every rate diverged", "", "", ""
                continue
            edge = " (grid's end)" if optimum.at_edge else ""
            cost = "diverges" if math.isinf(regret) else f"{100 * regret:.2f} %"
            vertex = f"{2**optimum.vertex:.4g}"
            yield str(optimum.size), f"{optimum.lr:g}{edge}", f"{optimum.loss:.4f}", vertex, cost

    def sentences(self) -> list[str]:
        """Return the verdict, and how to use the rate."""
        found, proxy = self.transfer, self.transfer.optima[0]
        slope, error = found.exponent
        lines = [f"{found.verdict.capitalize()}: {found.reason}"]
        if math.isfinite(slope):
            spread = f" ± {error:.2f}" if math.isfinite(error) else ""
            lines.append(f"best rate ~ size^{slope:.2f}{spread}")
        for group in self.groups if proxy.lr else ():
            names = ", ".join(group["parameters"])
            shown = names if len(names) < 70 else f"{names[:67]}..."
            lines.append(f"lr {proxy.lr * group['factor']:.4g}: {shown}")
        return lines


COLUMNS = ("size", "best rate", "loss", "parabola", "cost of the first size's rate")


def run(
    factory: str,
    data: str,
    *,
    widths: str | None,
    depths: str | None,
    grid: str | None,
    loss: str,
    kind: Any,
    optimizer: Any,
    branches: Sequence[str],
    momentum: float,
    weight_decay: float,
    steps: int,
    batch_size: int,
    seeds: int,
    seed: int,
    regret: float,
    target_width: int | None,
    target_depth: int | None,
    precision: Any,
    device: str,
    out: str | None,
    resume: bool,
    quiet: bool,
) -> Result:
    """Sweep, judge, and write ``sweep.json``, ``transfer.json`` and the plot to ``out``."""
    make = load_function(factory, "FACTORY")
    wide, deep = parse_sizes(widths, "--widths"), parse_sizes(depths, "--depths")
    sizes = sizes_of(wide, deep)
    rates = parse_grid(grid, optimizer)
    folder = _folder(out, resume)
    task = load_task(data, loss, batch_size, seed)
    branches = tuple(branches or getattr(make, "branches", ()))
    try:
        sweep = lr_sweep(
            make, task.batches, task.loss, widths=wide, depths=deep, grid=rates, steps=steps,
            kind=kind, optimizer=optimizer, branches=branches, weight_decay=weight_decay,
            momentum=momentum, evaluate=task.evaluate, seeds=seeds, seed=seed,
            precision=precision, device=device, quiet=quiet, label="lr-transfer",
            checkpoint=folder / "sweep.json" if folder else None,
        )  # fmt: skip
    except RequestError:
        raise
    except Exception as error:  # of the user's model, loss or data
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RequestError(f"'{factory}' cannot be trained on '{data}' ({reason}).") from error
    target = Size(
        target_width or (sweep.sizes[-1].width if widths else None),
        target_depth or (sweep.sizes[-1].depth if depths else None),
    )
    groups = _groups(make, sizes, target, seed, kind, optimizer, branches)
    result = Result(sweep, sweep.transfer(regret=regret), groups)
    if folder:
        write_json(folder / "transfer.json", result.to_json())
        from pantarhei.learning._lr_transfer_figures import sweeps

        write_figure(folder / "sweep.png", sweeps({f"{kind}, {optimizer}": sweep}))
    return result


def _groups(
    make: Callable[..., Any],
    sizes: Sequence[Size],
    target: Size,
    seed: int,
    kind: Any,
    optimizer: Any,
    branches: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the factors on the tuned rate for a model of the target's size."""
    found = start_of(
        make, sizes, target, seed, None, kind=kind, optimizer=optimizer, roles=None,
        branches=branches,
    )  # fmt: skip
    by_factor: dict[float, list[str]] = {}
    for name, scaling in found.scalings.items():
        by_factor.setdefault(scaling.lr, []).append(name)
    return [{"factor": c, "parameters": names} for c, names in sorted(by_factor.items())]


def _folder(out: str | None, resume: bool) -> Path | None:
    if out is None:
        if resume:
            raise RequestError("--resume continues what lies in a folder: name it with --out.")
        return None
    folder = Path(out)
    if folder.exists() and not resume:
        raise RequestError(f"'{out}' exists already: name a new folder, or add --resume.")
    if resume and not (folder / "sweep.json").is_file():
        raise RequestError(f"'{out}' holds no sweep.json to resume from.")
    return folder
