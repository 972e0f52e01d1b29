"""One progress display: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

# A redraw costs far more than a short training step: the display is touched at most this often.
_SECONDS_BETWEEN_REDRAWS = 0.1
_LINES = 10


class Progress:
    """How far a piece of work has come; made by :func:`progress`."""

    def __init__(self, total: int, label: str, start: int, show: Callable[[Progress], None]):
        self.total, self.label, self.start, self.done, self.note = total, label, start, start, ""
        self._show = show
        self._began = time.monotonic()
        self._shown = 0.0

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more units as done; ``note`` (kept until the next one) is shown beside."""
        self.done += n
        self.note = note or self.note
        now = time.monotonic()
        if now - self._shown >= _SECONDS_BETWEEN_REDRAWS or self.done >= self.total:
            self._shown = now
            self._show(self)

    @property
    def rate(self) -> float:
        """Units per second since the display was opened."""
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)


@contextmanager
def progress(total: int, label: str, quiet: bool = False, start: int = 0) -> Iterator[Progress]:
    """Show how far ``total`` units of work have come, on the error stream.

    On a terminal this is a bar with the rate and the time left. Elsewhere (a log file, a pipe) it
    is a plain line about every 10 %. ``start`` units are already done, as after a resume, and do
    not count towards the rate. ``quiet=True`` shows nothing.

    >>> with progress(3, "training", quiet=True) as bar:
    ...     for loss in (0.9, 0.5, 0.2):
    ...         bar.advance(note=f"loss {loss:.1f}")
    >>> bar.done, bar.note
    (3, 'loss 0.2')
    """
    console = Console(stderr=True)
    if quiet:
        yield Progress(total, label, start, lambda _: None)
    elif console.is_terminal:
        yield from _bar(console, total, label, start)
    else:
        yield Progress(total, label, start, _Lines(start * _LINES // max(total, 1)))


def _bar(console: Console, total: int, label: str, start: int) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} · {task.fields[rate]} ·"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    bar = RichProgress(*columns, console=console)
    try:
        bar.start()
    except LiveError:  # a bar is already on this terminal and this rich cannot nest them
        yield Progress(total, label, start, _Lines(start * _LINES // max(total, 1)))
        return
    try:
        task = bar.add_task(label, total=total, completed=start, note="", rate=_rate(0.0))
        yield Progress(
            total,
            label,
            start,
            lambda p: bar.update(task, completed=p.done, note=p.note, rate=_rate(p.rate)),
        )
    finally:
        bar.stop()


class _Lines:
    """Prints a line whenever another tenth of the work is done."""

    def __init__(self, tenth: int):
        self._tenth = tenth

    def __call__(self, p: Progress) -> None:
        tenth = p.done * _LINES // max(p.total, 1)
        if tenth <= self._tenth:
            return
        self._tenth = tenth
        left = timedelta(seconds=round((p.total - p.done) / max(p.rate, 1e-9)))
        parts = [f"{p.done}/{p.total} ({100 * p.done // max(p.total, 1)} %)", _rate(p.rate)]
        parts += [f"{left} left"] if p.done < p.total else []
        parts += [p.note] if p.note else []
        print(f"{p.label}: " + ", ".join(parts), file=sys.stderr, flush=True)


def _rate(rate: float) -> str:
    return f"{rate:.1f}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f} s each"
