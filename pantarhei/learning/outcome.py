"""What a command's job found, and how it reaches a person: a table, JSON, a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pantarhei.errors import RequestError
from pantarhei.files import atomic, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".csv", ".png", ".svg")


@dataclass(frozen=True)
class Outcome:
    """What a job found: ``rows`` for a table, ``facts`` beside it, and how to draw it."""

    title: str
    rows: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[[], Figure] | None = None


def deliver(outcome: Outcome, out: str | None, json: bool) -> None:
    """Print an outcome, as a table or JSON, and write it to ``out`` (CSV, PNG or SVG)."""
    from pantarhei import report

    if out is not None:
        _write(outcome, Path(out))
    rows = [{k: _plain(v) for k, v in row.items()} for row in outcome.rows]
    facts = {key: _plain(value) for key, value in outcome.facts.items()}
    if json:
        report.emit_json({"title": outcome.title, **facts, "rows": rows})
        return
    columns = list(rows[0])
    shown = ([_text(row[key]) for key in columns] for row in rows)
    report.emit(report.table(outcome.title, columns, shown))
    if facts:
        report.emit(report.table(None, ("", "value"), ((k, _text(v)) for k, v in facts.items())))
    if out is not None:
        report.emit(f"Written to {out}.")


def check_out(out: str | None) -> None:
    """Refuse, before the work is done, a file that could not be written."""
    if out is None:
        return
    if Path(out).suffix.lower() not in _SUFFIXES:
        raise RequestError(f"'{out}' has no known ending: choose {', '.join(_SUFFIXES)}.")
    if Path(out).exists():
        raise RequestError(f"'{out}' exists already: name another file.")


def _write(outcome: Outcome, path: Path) -> None:
    if path.suffix.lower() == ".csv":
        write_csv(path, outcome.rows)
        return
    if outcome.draw is None:
        raise RequestError(f"this result is a table and has no picture: write '{path}' as .csv.")
    import matplotlib

    matplotlib.use("Agg")
    with atomic(path) as temporary:
        outcome.draw().savefig(temporary, dpi=150)


def _plain(value: Any) -> Any:
    """Return a value that JSON has: what is not finite becomes text."""
    if isinstance(value, str):
        return value
    number = float(value)
    if not np.isfinite(number):
        return str(number)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.5g}"
