"""What the command line shows: papers, claims, results; and RESULTS.md.

Text for people goes through one console; text for programs is JSON. Either survives a reader that
has gone away (``pantarhei papers | head``).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pantarhei.claims import Claim, ClaimSpec, Entry, Ledger, ledger_path
from pantarhei.errors import RequestError
from pantarhei.files import atomic

if TYPE_CHECKING:
    from rich.table import Table

    from pantarhei.papers import Card
    from pantarhei.runs import Recipe, Result

_READER_GONE = 141  # what a shell reports for a program that SIGPIPE ended


def emit(value: str | Table) -> None:
    """Write text or a table to standard output."""
    from rich.console import Console

    # In a pipe or a file, lines are as long as they are.
    terminal = sys.stdout.isatty()
    console = Console(
        file=sys.stdout,
        width=None if terminal else 10_000,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=isinstance(value, str),
    )
    try:
        with console.capture() as capture:
            console.print(value)
        lines = (line.rstrip() for line in capture.get().splitlines())
        sys.stdout.write("\n".join(lines) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still buffered has no reader either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(_READER_GONE) from None


def emit_json(value: Any) -> None:
    """Write ``value`` as indented JSON to standard output."""
    emit(json.dumps(value, indent=2, ensure_ascii=False, default=list))


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a plain table; the first column is never broken."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def show_papers(cards: Sequence[Card], query: str = "") -> None:
    """List papers."""
    if not cards:
        emit(f"No paper matches '{query}': `pantarhei papers` lists all.")
        return
    rows = ((c.slug, c.title, c.date, c.wing, c.status) for c in cards)
    emit(table(None, ("paper", "title", "date", "wing", "status"), rows))


def show_paper(card: Card, recipe: Recipe | None) -> None:
    """Tell everything about one paper: facts, claims, settings, command, newest results."""
    emit(f"{card.title}\n{card.slug} · {card.wing} · {card.date} · {card.authors_count} authors")
    emit(f"arXiv {card.arxiv or 'none'} · code {card.code or 'not published'} · {card.status}\n")
    emit(f"{card.summary}\n")
    if recipe is None:
        emit("Planned: it does not run yet.")
        return
    scales = tuple(recipe.settings)
    claims = (
        (
            spec.id,
            spec.statement,
            *(_bound(spec, scale) for scale in scales),
            _text(spec.paper_value),
        )
        for spec in recipe.claims
    )
    emit(table("Claims", ("claim", "statement", *scales, "the paper"), claims))
    settings = (
        (key, *(_shown(values[key]) for values in recipe.settings.values()))
        for key in recipe.settings[scales[0]]
    )
    emit(table("Settings", ("setting", *scales), settings))
    if card.own is not None:
        emit(f"On your own data: {card.own}")
    emit(f"Run it: {' | '.join(f'pantarhei run {card.slug} --scale {s}' for s in scales)}\n")
    if entries := newest(card.slug):
        measured = (
            (
                e.run.scale,
                e.claim.id,
                _inequality(e.claim),
                number(e.claim.measured),
                _yes(e.claim.holds),
                e.run.date[:10],
            )
            for e in entries
        )
        columns = ("scale", "claim", "bound", "measured", "holds", "date")
        emit(table("Measured here", columns, measured))
    else:
        emit("Nothing measured here yet.")


def paper_document(card: Card, recipe: Recipe | None) -> dict[str, Any]:
    """Return what :func:`show_paper` tells, for programs."""
    document = card.to_json() | {"claims": [], "settings": {}, "commands": {}, "measured": []}
    if recipe is not None:
        document["claims"] = [
            {
                "id": spec.id,
                "statement": spec.statement,
                "quantity": spec.quantity,
                "direction": spec.direction,
                "bound": {scale: spec.bound_at(scale) for scale in recipe.settings},
                "paper_value": spec.paper_value,
            }
            for spec in recipe.claims
        ]
        document["settings"] = {scale: dict(values) for scale, values in recipe.settings.items()}
        document["commands"] = {
            s: f"pantarhei run {card.slug} --scale {s}" for s in document["settings"]
        }
        document["measured"] = [
            entry.claim.to_json()
            | {"scale": entry.run.scale, "seed": entry.run.seed, "date": entry.run.date}
            for entry in newest(card.slug)
        ]
    return document


def newest(paper: str) -> list[Entry]:
    """Return the ledger's newest results of ``paper``; a ledger that is not there has none."""
    return Ledger().latest(paper=paper) if ledger_path().exists() else []


def show_result(result: Result) -> None:
    """Print the verdict of a finished run and where its files are."""
    rows = (
        (c.id, _text(c.paper_value), _inequality(c), number(c.measured), _yes(c.holds))
        for c in result.claims
    )
    document = result.document
    title = (
        f"{document['paper']} at scale {document['scale']}, seed {document['seed']}, "
        f"{document['seconds']:.0f} s on {document['device']}"
    )
    emit(table(title, ("claim", "the paper", "bound", "measured", "holds"), rows))
    held = sum(claim.holds for claim in result.claims)
    emit(f"{held} of {len(result.claims)} claims hold.")
    emit(f"Everything is in {result.dir}:")
    for path in sorted(p for p in result.dir.iterdir() if not p.name.startswith(".")):
        emit(f"  {path}{os.sep if path.is_dir() else ''}")


def results_markdown(ledger: Ledger) -> str:
    """Render the ledger's newest results as Markdown: the content of RESULTS.md."""
    from pantarhei.papers import catalogue

    entries, changed = ledger.latest(), ledger.latest(changed=True)
    titles = {card.slug: card.title for card in catalogue()}
    order = {slug: index for index, slug in enumerate(titles)}
    papers = {entry.run.paper for entry in entries}
    held = sum(entry.claim.holds for entry in entries)
    lines = [
        "# Results",
        "",
        "Printed by `pantarhei report`: the newest result of each claim at each scale. "
        "The bounds were fixed before measuring.",
        "",
        f"{held} of {len(entries)} measured claims hold, from {_count(len(papers), 'paper')}.",
    ]

    def place(entry: Entry) -> int:
        return order.get(entry.run.paper, len(order))

    for slug, group in groupby(sorted(entries, key=place), key=lambda entry: entry.run.paper):
        lines += ["", f"## {slug}: {_cell(titles.get(slug, slug))}", "", *_rows(group)]
    if changed:
        lines += ["", "## With settings changed by --set", "", *_rows(sorted(changed, key=place))]
    return "\n".join(lines) + "\n"


def write_report(out: str | None, ledger: str | None) -> None:
    """Render ``ledger`` (the user's own unless named) to the file ``out``, or to the output."""
    path = ledger_path() if ledger is None else ledger
    if ledger is not None and not os.path.isfile(ledger):
        raise RequestError(f"The ledger '{ledger}' does not exist: check the path.")
    text = results_markdown(Ledger(path))
    if out is None:
        emit(text.rstrip("\n"))
        return
    with atomic(out) as temporary:
        temporary.write_text(text, "utf-8")
    emit(f"Wrote {out}.")


_COLUMNS = (
    "scale | claim | the paper | bound | measured | holds | seed | seconds | date | machine | "
    "commit | command"
)


def _rows(entries: Iterable[Entry]) -> list[str]:
    lines = [f"| {_COLUMNS} |", "|" + " --- |" * (_COLUMNS.count("|") + 1)]
    for entry in entries:
        claim, run = entry.claim, entry.run
        cells = (
            run.scale,
            f"{claim.id}: {claim.statement}",
            _text(claim.paper_value),
            f"{claim.quantity} {_inequality(claim)}",
            number(claim.measured),
            "yes" if claim.holds else "**no**",
            str(run.seed),
            f"{run.seconds:.0f}",
            run.date[:10],
            _machine(run.machine),
            _commit(run.commit),
        )
        command = _cell(run.command)
        lines.append(f"| {' | '.join(map(_cell, cells))} | `{command}` |")
    return lines


def _machine(machine: Mapping[str, Any]) -> str:
    text = f"{machine.get('cpu', 'unknown')}, {_count(machine.get('cores', 0), 'core')}"
    device = machine.get("device", "cpu")
    return text if device == "cpu" else f"{text}, {device}"


def _commit(commit: str | None) -> str:
    if commit is None:
        return "none"
    head, _, modified = commit.partition("-")
    return head[:12] + (" modified" if modified else "")


def number(value: float) -> str:
    """Write a measured number with five significant digits.

    >>> number(0.123456), number(1234567.0), number(float("nan"))
    ('0.12346', '1.2346e+06', 'not measured')
    """
    if math.isnan(value):
        return "not measured"
    return f"{value:.5g}" if abs(value) >= 1e6 or value != round(value, 0) else f"{value:.0f}"


def _inequality(claim: Claim) -> str:
    return f"{claim.direction} {number(claim.bound)}"


def _bound(spec: ClaimSpec, scale: str) -> str:
    bound = spec.bound_at(scale)
    return "" if bound is None else f"{spec.direction} {number(bound)}"


def _text(value: str | float | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else number(value)


def _yes(holds: bool) -> str:
    return "yes" if holds else "NO"


def _shown(value: Any) -> str:
    from pantarhei.runs import format_setting

    return format_setting(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
