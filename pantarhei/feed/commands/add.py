"""``pantarhei feed add``: papers into the store, by arXiv identifier, BibTeX or JSON."""

from __future__ import annotations

from typing import Annotated

import typer


def add(
    papers: Annotated[
        list[str],
        typer.Argument(
            metavar="ARXIV_ID|FILE.bib|FILE.json|-...",
            help="arXiv identifiers or addresses, files, or - for standard input.",
        ),
    ],
    store: Annotated[
        str | None,
        typer.Option(help="A file, or postgresql://...; the user's own unless named."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Add papers to the page: all that are named, or none where one cannot be read."""
    from dataclasses import asdict

    from pantarhei import report
    from pantarhei.feed.commands import installed, say

    with installed():
        from pantarhei.feed.sources import growing
        from pantarhei.feed.sources.fetch import Fetcher
        from pantarhei.feed.store import Store

    with Store(store) as opened:
        added = growing.add(opened, papers, lambda: Fetcher(growing.lock_path(), say=say))
    if json:
        report.emit_json(asdict(added))
    else:
        report.emit(f"{added.new} new, {added.changed} changed, {added.same} known already.")
