"""``pantarhei feed update``: what is new at arXiv, into the store."""

from __future__ import annotations

from typing import Annotated

import typer


def update(
    category: Annotated[
        list[str] | None,
        typer.Option(help="Of arXiv, such as cs.LG (taken unless named) or hep-th; repeat."),
    ] = None,
    days: Annotated[
        int | None,
        typer.Option(help="Days back from today; on from the last update unless named, else 7."),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            help="api: papers by the day they were submitted; oai: all that changed, for "
            "long periods and whole archives."
        ),
    ] = "api",
    store: Annotated[
        str | None,
        typer.Option(help="A file, or postgresql://...; the user's own unless named."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Read new papers from arXiv, at the pace that it asks for; go on where it stopped."""
    from dataclasses import asdict

    from pantarhei import report
    from pantarhei.feed.commands import installed, say

    with installed():
        from pantarhei.feed.sources import growing
        from pantarhei.feed.sources.fetch import Fetcher
        from pantarhei.feed.store import Store

    categories = list(dict.fromkeys(category or ["cs.LG"]))
    for name in categories:
        growing.check_request(name, days, source)
    results = []
    with Store(store) as opened, Fetcher(growing.lock_path(), say=say) as fetcher:
        for name in categories:
            try:
                done = growing.update(opened, fetcher, name, days=days, source=source, quiet=json)
            except KeyboardInterrupt:
                say("Interrupted; the same command goes on from here.")
                raise
            results.append(done)
            for line in done.left_out():
                say(line)
            if not json:
                report.emit(str(done))
    if json:
        report.emit_json([asdict(done) for done in results])
