"""What a command's job found, and how it reaches a person: tables, JSON, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantarhei.errors import RequestError
from pantarhei.files import write_csv, write_figure, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Outcome:
    """What a job found: a ``table`` and ``facts`` to be shown, further tables, and pictures."""

    title: str
    table: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)


def check_out(out: str | None) -> None:
    """Refuse, before any work, a folder that holds something."""
    if out is None:
        return
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(f"'{out}' is there already: name a new folder with --out.")


def deliver(outcome: Outcome, out: str | None, json: bool) -> None:
    """Print an outcome, as a table or JSON; write its CSV, JSON and pictures to a new folder."""
    from pantarhei import report

    document = _plain({"title": outcome.title, **outcome.facts, "table": outcome.table})
    if out is not None:
        check_out(out)
        folder = Path(out)
        for name, rows in {"table": outcome.table, **outcome.curves}.items():
            write_csv(folder / f"{name}.csv", rows)
        write_json(folder / "summary.json", document)
        for name, draw in outcome.figures.items():
            write_figure(folder / f"{name}.png", draw())
        document["files"] = sorted(str(path) for path in folder.iterdir())
    if json:
        report.emit_json(document)
        return
    columns = list(outcome.table[0])
    shown = ([_shown(row[key]) for key in columns] for row in outcome.table)
    report.emit(report.table(outcome.title, columns, shown))
    for key, value in outcome.facts.items():
        report.emit(f"{key.replace('_', ' ')}: {_shown(value)}")
    if out is not None:
        report.emit(f"Everything is in {out}.")


def _plain(value: Any) -> Any:
    """Return the value as JSON has it: what is missing or not finite becomes null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)  # of NumPy, too
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value) if value else "none"
    if isinstance(value, str | bool | int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.5g}"
