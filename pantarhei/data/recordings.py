"""Files of sensor recordings: CSV, Parquet and NPZ, as runs for :mod:`pantarhei.data.series`.

A file holds a run. CSV and Parquet: a column of times and one column for each sensor, named in the
header; a cell is empty (null) where a slower sensor has no sample. NPZ: an array ``x`` (T,) for
each sensor with its times ``x.time`` (T,) or its rate ``x.rate`` in Hz; ``time`` or ``rate`` serve
all that have none. Parquet needs pyarrow (``pip install 'pantarhei[series]'``).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pantarhei.data._read import arrays, guarded, needed
from pantarhei.data.series import Array, Recording, Signal
from pantarhei.errors import RequestError, nearest
from pantarhei.files import atomic

_PARQUET = (".parquet", ".pq")
_READ = (".csv", ".npz", *_PARQUET)
_MOST_CELLS = 2**28  # of a Parquet file, whose columns can be packed very small: 2 GiB of numbers
Column = list[str] | NDArray[Any]
"""Cells as they are written, or what a typed file holds: numbers (NaN where null) or dates."""


def read_recordings(
    paths: str | Path | Sequence[str | Path], time: str = "time", run: str | None = None
) -> Iterator[Recording]:
    """Read runs one after the other: files, or all CSV, Parquet and NPZ of a folder, by name.

    ``time`` names the column of times: seconds, or dates (in CSV as ISO 8601 has them). ``run``
    names a column that tells the runs of one table apart; without it a file is a run.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files: list[Path] = []
    for path in map(Path, given):
        inside = sorted(p for p in path.glob("*") if p.suffix.lower() in _READ)
        if path.is_dir() and not inside:
            raise RequestError(f"Folder '{path}' holds no .csv, .parquet or .npz file.")
        files += inside if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            raise RequestError(
                f"'{file}' is not a file: name a CSV, a Parquet, an NPZ, or a folder of them."
            )
        if file.suffix.lower() == ".npz":
            yield _read_npz(file)
        else:
            read = _read_parquet if file.suffix.lower() in _PARQUET else _read_csv
            yield from _runs(read(file), file, time, run)


def write_recording(recording: Recording, path: str | Path) -> None:
    """Write a run to a new ``.npz``, whole or not at all, as :func:`read_recordings` reads it."""
    target = Path(path)
    if target.suffix != ".npz" or target.exists():
        raise RequestError(f"'{path}' is there already, or not an .npz: name a new one.")
    arrays: dict[str, Any] = {}
    for name, signal in recording.signals.items():
        arrays[name] = signal.values
        if signal.rate is not None and signal.start == 0:
            arrays[f"{name}.rate"] = np.float64(signal.rate)
        else:
            arrays[f"{name}.time"] = signal.time_of(np.arange(len(signal.values)))
    with atomic(target) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _read_npz(file: Path) -> Recording:
    held = arrays(file)
    signals = {}
    for name, values in held.items():
        if name in ("time", "rate") or name.endswith((".time", ".rate")):
            continue
        times, rate = held.get(f"{name}.time"), held.get(f"{name}.rate")
        if times is None and rate is None:
            times, rate = held.get("time"), held.get("rate")
        if (times is None and rate is None) or values.dtype.kind not in "biuf":
            raise RequestError(
                f"'{name}' of '{file}' needs numbers and '{name}.time' or '{name}.rate' (Hz)."
            )
        values = values if values.dtype.kind == "f" else values.astype(np.float64)
        with _named(f"'{name}' of '{file}'"):
            if times is not None:
                signals[name] = Signal(values, times=times.astype(np.float64))
            else:
                assert rate is not None
                signals[name] = Signal(values, rate=float(rate))
    if not signals:
        raise RequestError(f"'{file}' holds no signal.")
    return Recording(file.stem, signals)


def _read_csv(file: Path) -> list[tuple[str, Column]]:
    with guarded(file), file.open(newline="", encoding="utf-8-sig") as handle:
        header, *rows = [row for row in csv.reader(handle) if row] or [[]]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise RequestError(
                f"Row {number} of '{file}' has {len(row)} fields and the header {len(header)}: "
                "mend it."
            )
    return [(name.strip(), [row[i].strip() for row in rows]) for i, name in enumerate(header)]


def _read_parquet(file: Path) -> list[tuple[str, Column]]:
    parquet = needed("pyarrow.parquet", "Parquet", "series")
    with guarded(file), parquet.ParquetFile(file) as stored:
        about, schema = stored.metadata, stored.schema_arrow
        if about.num_rows * about.num_columns > _MOST_CELLS:
            raise ValueError(f"{about.num_rows} rows of {about.num_columns} columns")
        texts = [field.name for field in schema if _is_read(field.type, field.name) == "text"]
    # a text that a million rows point to is held once
    with guarded(file), parquet.ParquetFile(file, read_dictionary=texts) as stored:
        table = stored.read()
        return [
            (name, _column(part))
            for name, part in zip(table.column_names, table.columns, strict=True)
        ]


def _is_read(kind: Any, name: str) -> Literal["text", "number"]:
    """Tell texts from what has one number in a row; a list's rows can hold any many."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    if types.is_string(kind) or types.is_large_string(kind):
        return "text"
    if types.is_primitive(kind) or types.is_decimal(kind):
        return "number"
    raise ValueError(f"column '{name[:40]}' holds {str(kind)[:40]}")


def _column(part: Any) -> Column:
    """Return numbers, dates or texts of an Arrow column."""
    import pyarrow as pa

    kind = part.type
    if pa.types.is_dictionary(kind) and _is_read(kind, "") == "text":
        cells: list[str] = []
        for chunk in part.chunks:
            words = [word or "" for word in chunk.dictionary.to_pylist()]
            cells += ["" if i is None else words[i] for i in chunk.indices.to_pylist()]
        return cells
    if pa.types.is_dictionary(kind):
        part = part.cast(kind.value_type)
        kind = part.type
    if pa.types.is_temporal(kind):
        dates: NDArray[Any] = part.to_numpy()
        return dates
    if pa.types.is_integer(kind) and not part.null_count:
        whole: NDArray[Any] = part.to_numpy()
        return whole
    numbers: NDArray[Any] = part.cast(pa.float64()).to_numpy()  # null is NaN
    return numbers


def _runs(
    columns: Sequence[tuple[str, Column]], file: Path, time: str, run: str | None
) -> Iterator[Recording]:
    """Make recordings of a table's columns."""
    header = [name for name, _ in columns]
    if len(header) < 2 or len(columns[0][1]) < 2:
        raise RequestError(f"'{file}' needs a header, a column of times, a sensor, and two rows.")
    if len(set(header)) < len(header):
        raise RequestError(f"'{file}' names a column twice: rename one.")
    for wanted in (time, *([run] if run else [])):
        if wanted not in header:
            raise RequestError(
                f"'{file}' has no column '{wanted}': it has {', '.join(header)}."
                f"{nearest(wanted, header)}"
            )
    cells = dict(columns)
    labels = _texts(cells.pop(run)) if run else None
    times = _times(cells.pop(time), time, file)
    labels = [file.stem] * len(times) if labels is None else labels
    numbers = {name: _numbers(values, name, file) for name, values in cells.items()}
    places: dict[str, int] = {}
    place = np.array([places.setdefault(label, len(places)) for label in labels])
    for label, number in places.items():
        own = place == number
        signals = {}
        for name, values in numbers.items():
            there = own & ~np.isnan(values)
            if there.any():
                with _named(f"Column '{name}', run '{label}' of '{file}'"):
                    signals[name] = Signal(values[there], times=times[there] - times[own][0])
        if not signals:
            raise RequestError(f"Run '{label}' of '{file}' has no sample.")
        yield Recording(label, signals)


def _texts(cells: Column) -> list[str]:
    return cells if isinstance(cells, list) else [str(cell) for cell in cells.astype(str)]


def _times(cells: Column, name: str, file: Path) -> Array:
    """Return seconds; of dates, since the first."""
    if isinstance(cells, np.ndarray):
        dated = cells.dtype.kind in "mM"
        return ((cells - cells[0]) / np.timedelta64(1, "s") if dated else cells).astype(np.float64)
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        pass
    found = []
    for number, cell in enumerate(cells, 1):
        try:
            found.append(datetime.fromisoformat(cell))
        except ValueError:
            raise RequestError(
                f"Column '{name}' of '{file}' holds '{cell[:40]}' in row {number}: give seconds or "
                "ISO 8601 dates."
            ) from None
    if len({date.tzinfo is None for date in found}) > 1:
        raise RequestError(f"Column '{name}' of '{file}' has dates with and without a time zone.")
    return np.array([(date - found[0]).total_seconds() for date in found])


def _numbers(cells: Column, name: str, file: Path) -> Array:
    if isinstance(cells, np.ndarray):
        if cells.dtype.kind not in "biuf":
            raise RequestError(
                f"Column '{name}' of '{file}' holds dates: give numbers, or leave the column out."
            )
        return cells.astype(np.float64)
    found = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        if cell:
            try:
                found[i] = float(cell)
            except ValueError:
                raise RequestError(
                    f"Column '{name}' of '{file}' holds '{cell[:40]}' in row {i + 1}: give "
                    "numbers, or leave the cell empty."
                ) from None
    return found


class _named:
    """Put the place before a sentence that a check below does not know it for."""

    def __init__(self, place: str):
        self.place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, RequestError):
            raise RequestError(f"{self.place}: {error}") from error
