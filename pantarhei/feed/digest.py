"""Digests: what is new for a subscription, as one message.

A digest holds the papers that came into the store after the subscription's last digest (or its
confirmation), best first, and the claims measured since. Where nothing is new, nothing is sent.
A subscription gets one digest in a period, a UTC day or an ISO week, whoever runs :func:`run` and
however often: the message and the note of what it covered are written together, under a key made
of subscription and period.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from pantarhei.errors import RequestError
from pantarhei.feed import mail, outbox, papers, schema, subscriptions
from pantarhei.feed.mail import Letterhead
from pantarhei.feed.papers import Measured, Paper
from pantarhei.feed.store import Store, lock
from pantarhei.feed.subscriptions import Subscription
from pantarhei.feed.web import wording
from pantarhei.files import atomic
from pantarhei.outcome import check_out

if TYPE_CHECKING:
    from pantarhei.feed.search import Searcher

# Shown in a digest, of measured papers, of claims of each: some mail programs cut at 100 kB.
PAPERS, MEASURED, CLAIMS = 20, 8, 5
_LOOKED_AT = 2000  # hits of a saved search among which the new ones are looked for


@dataclass(frozen=True)
class News:
    """What came in for a subscription: the best of the papers and of the results, of so many."""

    papers: tuple[Paper, ...]
    papers_total: int
    measured: tuple[tuple[Paper, tuple[Measured, ...]], ...]
    measured_total: int

    def __bool__(self) -> bool:
        return bool(self.papers or self.measured)


@dataclass(frozen=True)
class Made:
    """What :func:`run` did: ``digests`` made, and how many subscriptions had nothing new."""

    digests: int
    without_news: int
    files: tuple[Path, ...] = ()

    def __str__(self) -> str:
        quiet = wording.plural(self.without_news, "subscription")
        return f"{wording.plural(self.digests, 'digest')} made, nothing new for {quiet}."


def label(period: str, moment: float) -> str:
    """Name the period that a moment is in, by UTC.

    >>> label("daily", 1769817600.0), label("weekly", 1769817600.0)
    ('2026-01-31', '2026-W05')
    """
    when = datetime.fromtimestamp(moment, UTC)
    return f"{when:%Y-%m-%d}" if period == "daily" else f"{when:%G-W%V}"


def due(given: Subscription, now: float) -> bool:
    """Whether a subscription has had no digest in the period that ``now`` is in."""
    if not given.active or given.covered is None or given.confirmed is None:
        return False
    first = given.covered <= given.confirmed
    return given.covered < now and (
        first or label(given.period, given.covered) != label(given.period, now)
    )


def run(
    store: Store,
    head: Letterhead,
    searcher: Searcher | None = None,
    *,
    period: str | None = None,
    now: float | None = None,
    dry_run: Path | None = None,
) -> Made:
    """Queue the digests that are due; :meth:`.outbox.Outbox.send_due` sends them.

    ``searcher`` answers saved searches; without one they have nothing new. With ``dry_run``, a new
    folder, each is written there as a message file (``.eml``) instead, and the store stays as it
    is. Any number of processes may run at once, and one that is killed is simply run again.
    """
    if dry_run is not None:
        check_out(str(dry_run))
    until = _until(store, dry_run is None) if now is None else now
    with store.read() as c:
        found = [given for given in subscriptions.active(c, period) if due(given, until)]
    known: dict[tuple[str, str, float | None], News] = {}  # most share theirs
    digests, files = 0, []
    for given in found:
        key = (given.kind, given.value, given.covered)
        if key not in known:
            with store.read() as c:
                known[key] = news(c, given, until, searcher)
        if not known[key]:
            continue
        message = compose(head, given, known[key])
        if dry_run is None:
            digests += _queue(store, head, given, message, until)
            continue
        name = f"{given.period}-{label(given.period, until)}-{given.id}.eml"
        with atomic(dry_run / name) as temporary:
            sealed = outbox.seal(message, _key(given, until), secret=head.secret, now=until)
            temporary.write_bytes(sealed)
        files.append(dry_run / name)
        digests += 1
    if dry_run is None:
        with store.write() as c:
            subscriptions.forget(c, now=until)
    quiet = sum(not known[given.kind, given.value, given.covered] for given in found)
    return Made(digests, quiet, tuple(files))


def _until(store: Store, waits: bool) -> float:
    """Return a moment such that all that came in before it can be seen by now."""
    if waits:
        with store.write() as c:
            lock(c, "papers")  # what is being added now, with an earlier time, is waited for
            lock(c, "claims")
            return time.time()
    return time.time()


def _key(given: Subscription, until: float) -> str:
    return f"digest/{given.id}/{label(given.period, until)}"


def _queue(
    store: Store, head: Letterhead, given: Subscription, message: EmailMessage, until: float
) -> bool:
    """Queue a digest, unless another process did so or it was ended meanwhile."""
    table = schema.subscriptions
    mine = sa.and_(
        table.c.id == given.id,
        table.c.covered == given.covered,
        table.c.confirmed == given.confirmed,
        table.c.ended.is_(None),
    )
    with store.write() as c:
        if c.execute(sa.select(table.c.id).where(mine).with_for_update()).first() is None:
            return False
        key = _key(given, until)
        if not outbox.put(c, key, given.email, message, secret=head.secret, now=until):
            return False  # ended and begun anew on one day: it had today's
        c.execute(sa.update(table).where(table.c.id == given.id).values(covered=until))
    return True


# --- what is new ---------------------------------------------------------------------------------


def news(
    c: sa.Connection, given: Subscription, until: float, searcher: Searcher | None = None
) -> News:
    """Return what came in for a subscription after what it covered, ``until`` included.

    For a tag that is what was added or got the tag since. For a search it is what stands among the
    first results, in their order; else the hottest paper comes first.
    """
    table, since = schema.papers, given.covered or 0.0
    conditions: list[sa.ColumnElement[bool]] = []
    came: sa.ColumnElement[Any] = table.c.added
    if given.kind == "wing":
        conditions.append(table.c.wing == given.value)
    if given.kind == "tag":
        tags = schema.tags
        tagged = sa.select(sa.func.min(tags.c.created))
        mine = tagged.where(tags.c.paper == table.c.id, tags.c.tag == given.value)
        first = mine.scalar_subquery()
        conditions.append(first.is_not(None))
        came = sa.case((first > table.c.added, first), else_=table.c.added)
    runs = schema.runs
    new_runs = sa.select(runs.c.paper).where(runs.c.added > since, runs.c.added <= until)
    added = _ranked(c, given, searcher, [came > since, came <= until, *conditions])
    measured = _ranked(c, given, searcher, [table.c.id.in_(new_runs), *conditions])
    results = []
    for paper in papers.by_id(c, measured[:MEASURED]):
        fresh = tuple(m for m in papers.results(c, paper.id) if since < m.run.added <= until)
        results.append((paper, tuple(m for m in fresh if m.claims)))
    shown = papers.by_id(c, added[:PAPERS])
    return News(tuple(shown), len(added), tuple(r for r in results if r[1]), len(measured))


def _ranked(
    c: sa.Connection,
    given: Subscription,
    searcher: Searcher | None,
    conditions: Sequence[sa.ColumnElement[bool]],
) -> list[int]:
    """Return the papers under ``conditions`` that a subscription is about, best first."""
    table = schema.papers
    order = table.c.heat.desc(), table.c.id.desc()
    found = c.execute(sa.select(table.c.id, table.c.date).where(*conditions).order_by(*order)).all()
    if given.kind != "search" or not found:
        return [row.id for row in found]
    return (
        []
        if searcher is None
        else _hits(searcher, given.value, {row.id: row.date for row in found})
    )


def _hits(searcher: Searcher, query: str, dates: dict[int, str]) -> list[int]:
    """Return those of the papers that a search finds, in its order."""
    hits: list[int] = []
    first, last = min(dates.values()), max(dates.values())
    for offset in range(0, _LOOKED_AT, 100):
        try:
            found = searcher.search(query, since=first, until=last, limit=100, offset=offset)
        except RequestError:  # a query without a word, say: nothing is found
            break
        hits += [hit.paper.id for hit in found.hits if hit.paper.id in dates]
        if len(found.hits) < 100 or len(hits) == len(dates):
            break
    return hits


# --- the message ---------------------------------------------------------------------------------


def compose(head: Letterhead, given: Subscription, found: News) -> EmailMessage:
    """Return a subscription's digest: text and HTML, with one-click unsubscribing."""
    counts = []
    if found.papers_total:
        counts.append(wording.plural(found.papers_total, "new paper"))
    if found.measured_total:
        counts.append(f"{found.measured_total:,} newly measured")
    subject = f"{', '.join(counts)}: {given.topic}"
    leave = subscriptions.unsubscribe_link(head, given)
    text, html = mail.render(
        "digest",
        head=head,
        subject=subject,
        given=given,
        listing=_listing(head, given),
        leave=leave,
        papers=[_entry(head, paper) for paper in found.papers],
        papers_more=found.papers_total - len(found.papers),
        measured=[_measured(head, paper, results) for paper, results in found.measured],
        measured_more=found.measured_total - len(found.measured),
    )
    return mail.message(head, given.email, subject, text, html, unsubscribe=leave)


def _listing(head: Letterhead, given: Subscription) -> str:
    """Return the page that lists what a subscription is about."""
    if given.kind == "tag":
        return head.link("tags", given.value)
    if given.kind == "search":
        return head.link("search", q=given.value)
    return head.link("papers", **({"wing": given.value} if given.kind == "wing" else {}))


def _entry(head: Letterhead, paper: Paper) -> dict[str, Any]:
    facts = [wording.day(paper.date), wording.by(paper)]
    facts += [paper.wing] if paper.wing else []
    facts += [wording.plural(paper.votes, "vote")] if paper.votes else []
    facts += [wording.plural(paper.comments, "comment")] if paper.comments else []
    return {
        "title": mail.one_line(paper.title, 300),
        "link": head.link("paper", paper.key),
        "facts": mail.one_line(" · ".join(facts), 300),
        "badge": wording.badge(paper),
        "verdict": paper.badge,
        "gist": mail.one_line(wording.gist(paper.summary), 300),
    }


def _measured(head: Letterhead, paper: Paper, results: Sequence[Measured]) -> dict[str, Any]:
    claims = [
        {
            "statement": mail.one_line(claim.statement, 300),
            "holds": bool(claim.holds),
            "verdict": "held" if claim.holds else "did not hold",
            "figures": f"measured {wording.figure(claim.measured)}, bound {wording.bound(claim)}",
            "scale": result.run.scale,
        }
        for result in results
        for claim in result.claims
    ]
    claims.sort(key=lambda claim: claim["holds"])  # what did not hold is not to be overlooked
    return _entry(head, paper) | {"claims": claims[:CLAIMS], "more": len(claims) - CLAIMS}
