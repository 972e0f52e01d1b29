"""Trending: how much happened around a paper lately.

An event of weight :math:`w` at time :math:`t` counts

.. math:: w \\, 2^{(t - now) / 7\\,days}

so it halves with every week. Publication weighs 1 (no later than the day the paper came to this
store: a date in the future is no head start), a vote 1, and each newest measured claim 1/4, whether
it holds or not: that somebody measured is what counts. The sum's order does not depend on *now*, so

.. math:: heat = \\log_2 \\sum w \\, 2^{t / 7\\,days}

is stored with each paper and indexed. It changes only with the events, in their transaction, and is
computed from all of them: rounding does not add up.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from pantarhei.feed import schema

HALF_LIFE = 7 * 86400.0  # seconds
PUBLICATION, VOTE, CLAIM = 1.0, 1.0, 0.25


def heat(events: Iterable[tuple[float, float]]) -> float:
    """Return log2 of the sum of events, given as pairs (weight, time in seconds since 1970).

    >>> heat([(1.0, HALF_LIFE), (1.0, HALF_LIFE)])
    2.0
    """
    weighed = [(weight, time / HALF_LIFE) for weight, time in events]
    last = max(age for _, age in weighed)  # taken out: 2 to the power of 2900 weeks is no float
    total = math.fsum(weight * 2.0 ** (age - last) for weight, age in weighed)
    return last + math.log2(total)


def score(heat: float, now: float) -> float:
    """Return what a heat amounts to at a time: the decayed number of votes.

    >>> score(heat([(1.0, 1e9)]), now=1e9 + HALF_LIFE)
    0.5
    """
    return float(2.0 ** (heat - now / HALF_LIFE))


def seconds(date: str) -> float:
    """Return the time of an ISO 8601 date, or date and time, in seconds since 1970; UTC.

    >>> seconds("1970-01-02"), seconds("1970-01-01T00:01:00Z")
    (86400.0, 60.0)
    """
    when = datetime.fromisoformat(date)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def published(date: str, added: float) -> tuple[float, float]:
    """Return the event of a paper's publication."""
    return PUBLICATION, min(seconds(date), added)


def keep_in_step(c: sa.Connection, papers: Iterable[int]) -> None:
    """Count votes, comments and claims of these papers again, and their heat.

    Called at the end of every transaction that changes one of them. The papers' rows are locked
    first, in order, so that of two transactions the second counts what the first wrote.
    """
    every = sorted(set(papers))
    for first in range(0, len(every), 500):
        rows = _counted(c, every[first : first + 500])
        if rows:
            table = schema.papers
            names = ("votes", "comments", "held", "measured", "heat")
            values: dict[str, Any] = {name: sa.bindparam(f"_{name}") for name in names}
            statement = sa.update(table).where(table.c.id == sa.bindparam("_id")).values(values)
            c.execute(statement, rows)


def _counted(c: sa.Connection, ids: Sequence[int]) -> list[dict[str, Any]]:
    papers, votes, comments, runs, claims = (
        schema.metadata.tables[name] for name in ("papers", "votes", "comments", "runs", "claims")
    )
    locked = (
        sa.select(papers.c.id, papers.c.date, papers.c.added)
        .where(papers.c.id.in_(ids))
        .order_by(papers.c.id)
        .with_for_update()
    )
    found = c.execute(locked).all()
    voted: defaultdict[int, list[float]] = defaultdict(list)
    for paper, created in c.execute(
        sa.select(votes.c.paper, votes.c.created).where(votes.c.paper.in_(ids))
    ):
        voted[paper].append(created)
    said: dict[int, int] = dict(
        c.execute(
            sa.select(comments.c.paper, sa.func.count())
            .where(comments.c.paper.in_(ids))
            .group_by(comments.c.paper)
        )
        .tuples()
        .all()
    )
    measured: defaultdict[int, list[tuple[float, bool]]] = defaultdict(list)
    for paper, date, holds in c.execute(
        sa.select(runs.c.paper, runs.c.date, claims.c.holds)
        .join(claims, claims.c.run == runs.c.uid)
        .where(runs.c.paper.in_(ids))
    ):
        measured[paper].append((seconds(date), holds))
    return [
        {
            "_id": paper.id,
            "_votes": len(voted[paper.id]),
            "_comments": said.get(paper.id, 0),
            "_held": sum(holds for _, holds in measured[paper.id]),
            "_measured": len(measured[paper.id]),
            "_heat": heat(
                [
                    published(paper.date, paper.added),
                    *((VOTE, created) for created in voted[paper.id]),
                    *((CLAIM, time) for time, _ in measured[paper.id]),
                ]
            ),
        }
        for paper in found
    ]
