"""A user's table: a CSV file with a header, or an NPZ with X and y, as arrays to learn from."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pantarhei.data._read import arrays, guarded
from pantarhei.errors import RequestError, nearest

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """A user's data: inputs (P, N1) and targets (P, N3), with the names of their columns."""

    inputs: Array
    targets: Array
    input_names: tuple[str, ...]
    target_names: tuple[str, ...]


def read_table(path: str, targets: Sequence[str] = (), classes: bool = False) -> Table:
    """Read a CSV with a header, or an NPZ that holds X (P, N1) and y (P,) or (P, N3).

    ``targets`` name columns of the CSV, the last by default. A target of words is made one column
    for each word; ``classes`` does the same for numbers.

    Raises :class:`RequestError`, in one sentence that names the place, for a file that is not
    there or not a table, a column that is not there, a field that is empty or no finite number, and
    fewer than two rows.
    """
    file = Path(path)
    if not file.is_file():
        raise RequestError(f"'{path}' is not a file: name a CSV table, or an .npz with X and y.")
    read = _read_npz if file.suffix.lower() == ".npz" else _read_csv
    inputs, input_names, columns = read(file, targets)
    blocks, names = [], []
    for name, values in columns.items():
        found = values if isinstance(values, np.ndarray) else _numbers(values)
        if classes or found is None:
            kinds, index = np.unique(np.asarray(values).astype(str), return_inverse=True)
            if len(kinds) > max(2, len(values) // 2):
                raise RequestError(
                    f"Target '{name}' of '{path}' has {len(kinds)} different values in "
                    f"{len(values)} rows: give numbers, or classes that repeat."
                )
            blocks.append(np.eye(len(kinds))[index])
            names += [f"{name}={kind}" for kind in kinds.tolist()]
        else:
            if not np.isfinite(found).all():
                row = int(np.argmin(np.isfinite(found))) + 1
                raise RequestError(
                    f"Target '{name}' of '{path}' is missing or not finite in row {row}: fill or "
                    "drop it."
                )
            blocks.append(found[:, None])
            names.append(name)
    if len(inputs) < 2:
        raise RequestError(f"'{path}' has too few rows ({len(inputs)}): give two or more.")
    return Table(inputs, np.hstack(blocks), input_names, tuple(names))


def read_arrays(path: str | Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """Read X and y of an NPZ as they are, of any shapes and types but objects."""
    file = Path(path)
    if not file.is_file():
        raise RequestError(f"'{path}' is not a file: name a CSV table, or an .npz with X and y.")
    found = arrays(file, ("X", "y"))
    return found["X"], found["y"]


Columns = dict[str, "NDArray[Any] | list[str]"]


def _read_npz(file: Path, targets: Sequence[str]) -> tuple[Array, tuple[str, ...], Columns]:
    if targets:
        raise RequestError("--target names a column of a CSV; an .npz has its targets in y.")
    x, y = read_arrays(file)
    y = y[:, None] if y.ndim == 1 else y
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise RequestError(
            f"'{file}' has X of shape {x.shape} and y of shape {y.shape}: give (P, N1) and (P, N3)."
        )
    try:
        x = x.astype(np.float64)
    except ValueError:
        raise RequestError(f"X of '{file}' is not made of numbers: encode it first.") from None
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0] + 1
        raise RequestError(
            f"X of '{file}' is missing or not finite in row {row}, column {column}: fill or drop "
            "it."
        )
    words = y.dtype.kind not in "biuf"
    columns: Columns = {
        f"y{k}" if y.shape[1] > 1 else "y": (
            y[:, k].astype(str).tolist() if words else y[:, k].astype(np.float64)
        )
        for k in range(y.shape[1])
    }
    return x, tuple(f"x{i}" for i in range(x.shape[1])), columns


def _read_csv(file: Path, targets: Sequence[str]) -> tuple[Array, tuple[str, ...], Columns]:
    with guarded(file), file.open(newline="", encoding="utf-8-sig") as handle:
        rows = [row for row in csv.reader(handle) if row]
    if len(rows) < 2 or len(rows[0]) < 2:
        raise RequestError(f"'{file}' needs a header, an input and a target, and rows of them.")
    header, rows = [name.strip() for name in rows[0]], rows[1:]
    if len(set(header)) < len(header):
        raise RequestError(f"'{file}' names a column twice: rename one.")
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise RequestError(
                f"Row {number} of '{file}' has {len(row)} fields and the header {len(header)}: "
                "mend it."
            )
    chosen = list(targets) or header[-1:]
    for name in chosen:
        if name not in header:
            raise RequestError(f"'{file}' has no column '{name}'.{nearest(name, header)}")
    if len(set(chosen)) == len(header):
        raise RequestError(f"Every column of '{file}' is a target: leave some as inputs.")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    names = tuple(name for name in header if name not in chosen)
    inputs = []
    for name in names:
        numbers = _numbers(columns[name])
        bad = next((i for i, v in enumerate(columns[name]) if not _finite(v)), None)
        if numbers is None or bad is not None:
            raise RequestError(
                f"Column '{name}' of '{file}' holds '{columns[name][bad or 0][:40]}' in row "
                f"{(bad or 0) + 1}: give finite numbers, or leave the column or the row out."
            )
        inputs.append(numbers)
    for name in chosen:
        if any(not value.strip() for value in columns[name]):
            number = next(i for i, value in enumerate(columns[name], 1) if not value.strip())
            raise RequestError(
                f"Target '{name}' of '{file}' is missing in row {number}: fill or drop it."
            )
    return np.stack(inputs, 1), names, {name: columns[name] for name in chosen}


def _numbers(values: Sequence[str]) -> Array | None:
    try:
        return np.array([float(value) for value in values])
    except ValueError:
        return None


def _finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
