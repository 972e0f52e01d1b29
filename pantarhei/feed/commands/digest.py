"""``pantarhei feed digest``: what is new, by mail; to be run by cron or a timer."""

from __future__ import annotations

from typing import Annotated

import typer


def digest(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write .eml files; queue, send and change nothing.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="With --dry-run: a new folder; digest-<time> unless named.")
    ] = None,
    period: Annotated[str | None, typer.Option(help="daily or weekly; both unless named.")] = None,
    store: Annotated[
        str | None,
        typer.Option(help="A file, or postgresql://...; the user's own unless named."),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--public-url",
            envvar="PANTARHEI_URL",
            help="The page's address, as https://papers.example.org: links begin with it.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Make the digests that are due, and send all mail that is: safe to run at any time.

    PANTARHEI_SMTP_HOST, _PORT, _USER, _PASSWORD, _FROM and _TLS (starttls, tls or none) name the
    mail server.
    """
    from dataclasses import asdict
    from datetime import UTC, datetime
    from pathlib import Path

    from pantarhei import report
    from pantarhei.errors import RequestError
    from pantarhei.feed.commands import installed, say

    with installed():
        from pantarhei.feed import digest, mail, outbox
        from pantarhei.feed.search import Searcher
        from pantarhei.feed.store import Store

    settings = mail.Settings.from_environment()
    if out is not None and not dry_run:
        raise RequestError("--out is where --dry-run writes: name both, or neither.")
    if not dry_run and settings is None:
        raise RequestError(
            "No mail server is named: set PANTARHEI_SMTP_HOST, or look at the digests with "
            "--dry-run."
        )
    if not dry_run and not url:
        raise RequestError(
            "The page's address is not known: set PANTARHEI_URL, with which the links begin."
        )
    folder = None
    if dry_run:
        folder = Path(out or f"digest-{datetime.now(UTC):%Y%m%dT%H%M%SZ}")
    with Store(store) as opened:
        sender = settings.sender if settings else ""
        head = mail.Letterhead(url or "http://127.0.0.1:8000", opened.secret, sender)
        searcher = Searcher(opened)
        try:
            made = digest.run(opened, head, searcher, period=period, dry_run=folder)
        finally:
            searcher.close()
        sent = outbox.Sent()
        if settings is not None and not dry_run:
            sent = outbox.Outbox(opened).send_due(settings)
    if json:
        files = [str(path) for path in made.files]
        report.emit_json(asdict(made) | {"files": files} | asdict(sent))
        return
    report.emit(str(made) if dry_run else f"{made} {sent}")
    if folder is not None and made.files:
        report.emit(f"They are in {folder}.")
    if sent.trouble:
        say(f"The mail server could not be used, the rest waits: {sent.trouble}")
