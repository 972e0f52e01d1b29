"""Search by words as the database does it: FTS5 with BM25 on SQLite, tsvector on PostgreSQL.

Both are kept by triggers, so that what was committed is found at once.

What a user typed never reaches either as a query language: it is split into words here, and only
double quotes mean something (words side by side).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from pantarhei.feed import papers as store_papers
from pantarhei.feed.schema import papers
from pantarhei.feed.search.words import STOP_WORDS, Vocabulary, fold, split

WEIGHTS = {"title": 8, "key": 6, "authors": 4, "categories": 2, "summary": 1}  # see migration 0002
_MOST_WORDS = 16
_LONGEST = 500  # characters of a query that are read

# What a paper has to hold: one alternative of every group. An alternative of several words, with
# spaces between them, is a phrase.
Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Query:
    """What was asked for. ``words`` are folded, each once, in the order of the query."""

    text: str
    words: tuple[str, ...]
    phrases: tuple[str, ...]

    def groups(self) -> Groups:
        """Return what a paper has to hold to match all of the query."""
        return tuple((word,) for word in (*self.words, *self.phrases))


def corrected(query: Query, known: Vocabulary) -> tuple[Query, str | None]:
    """Return the query with unknown words taken for known ones, and as text where there were any.

    A word whose stem is known (``exiting`` where papers have ``exits``) is no slip.
    """
    better: dict[str, str] = {}
    for word in query.words:
        if word not in known.counts and not known.inflected(word):
            meant = known.correct(word)
            if meant is not None:
                better[word] = meant
    if not better:
        return query, None
    words = tuple(dict.fromkeys(better.get(word, word) for word in query.words))
    text = fold(query.text)
    for word, meant in better.items():
        text = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", meant, text)
    return Query(text, words, query.phrases), " ".join(text.split())


def parse(query: str) -> Query:
    """Split what a user typed; nothing in it is an error.

    Words that nearly every text holds are left out beside others. Of a very long query the first
    500 characters and 16 words count.

    >>> parse('the "early exit" AND (networks* NEAR/2 title:x')
    Query(text='the "early exit" AND (networks* NEAR/2 title:x', words=('networks', 'near', '2', \
'title', 'x'), phrases=('early exit',))
    >>> parse("who are you").words
    ('who', 'are', 'you')
    """
    text = query[:_LONGEST]
    words: dict[str, None] = {}
    phrases: dict[str, None] = {}
    for number, part in enumerate(re.split(r'["“”„«»]', text)):
        found = split(part)
        # every second part lies between quotes; a quote that was never closed opens nothing
        if number % 2 and len(found) > 1 and number < _quotes(text):
            phrases[" ".join(found[:_MOST_WORDS])] = None
        else:
            words.update(dict.fromkeys(found))
    kept = [word for word in words if word not in STOP_WORDS] or ([] if phrases else list(words))
    return Query(text, tuple(kept[:_MOST_WORDS]), tuple(phrases)[:4])


def _quotes(text: str) -> int:
    """Return how many quotes a text holds."""
    return sum(char in '"“”„«»' for char in text)


@dataclass(frozen=True)
class Filter:
    """Which papers may be found at all; dates are ISO 8601, both ends included."""

    wing: str | None = None
    status: str | None = None
    since: str | None = None
    until: str | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """Return the filter as SQL conditions; what is none raises RequestError."""
        return store_papers.conditions_of(
            wing=self.wing or None,
            status=self.status or None,
            since=self.since or None,
            until=self.until or None,
        )

    def __bool__(self) -> bool:
        return bool(self.wing or self.status or self.since or self.until)


@dataclass(frozen=True)
class Found:
    """The best papers, best first, how many there are in all, and which, where that is known."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    total: int
    all: NDArray[np.int64] | None = None


NOTHING = Found(np.zeros(0, np.int64), np.zeros(0), 0)


def search(c: sa.Connection, groups: Groups, every: bool, allowed: Filter, k: int) -> Found:
    """Return the ``k`` best papers that hold every group, or any of them and every phrase.

    BM25 with the weights above on SQLite, ``ts_rank`` on PostgreSQL; the newer of equals first.
    """
    if not groups:
        return NOTHING
    index, matches, score = (
        _sqlite(groups, every) if c.dialect.name == "sqlite" else _postgresql(groups, every)
    )
    found = sa.select(papers.c.id, score.label("score")).select_from(index).where(matches)
    found = found.where(*allowed.conditions())
    best = found.order_by(sa.desc("score"), papers.c.id.desc()).limit(k)
    rows = c.execute(best).all()
    total = len(rows)
    if total == k:
        total = c.execute(
            sa.select(sa.func.count()).select_from(index).where(matches, *allowed.conditions())
        ).scalar_one()
    return Found(
        np.array([row[0] for row in rows], np.int64), np.array([row[1] for row in rows]), total
    )


def holding(c: sa.Connection, phrase: str) -> NDArray[np.int64]:
    """Return every paper that holds a phrase."""
    made = _sqlite if c.dialect.name == "sqlite" else _postgresql
    index, matches, _ = made(((phrase,),), True)
    rows = c.execute(sa.select(papers.c.id).select_from(index).where(matches)).all()
    return np.array([row[0] for row in rows], np.int64)


def permitted(c: sa.Connection, allowed: Filter) -> NDArray[np.int64]:
    """Return every paper that passes the filter."""
    rows = c.execute(sa.select(papers.c.id).where(*allowed.conditions())).all()
    return np.array([row[0] for row in rows], np.int64)


def _parts(groups: Groups, every: bool) -> list[tuple[Groups, str]]:
    """Return groups that have to hold together, each with how its own are joined."""
    if every:
        return [(groups, "AND")]
    phrases = tuple(group for group in groups if " " in group[0])
    words = tuple(group for group in groups if " " not in group[0])
    return [part for part in ((phrases, "AND"), (words, "OR")) if part[0]]


_Parts = tuple[Any, sa.ColumnElement[bool], sa.ColumnElement[float]]


def _sqlite(groups: Groups, every: bool) -> _Parts:
    # Words hold neither quotes nor anything else that FTS5 reads; between quotes they are text.
    def joined(some: Groups, operator: str) -> str:
        alternatives = [" OR ".join(f'"{word}"' for word in group) for group in some]
        return "(" + f" {operator} ".join(f"({group})" for group in alternatives) + ")"

    expression = " AND ".join(joined(*part) for part in _parts(groups, every))
    index = sa.table("papers_text", sa.column("rowid"), sa.column("rank"))
    both = index.join(papers, papers.c.id == index.c.rowid)
    matches = sa.literal_column("papers_text").op("MATCH")(sa.bindparam(None, expression))
    return both, matches, -index.c.rank


def _postgresql(groups: Groups, every: bool) -> _Parts:
    def parsed(word: str) -> sa.ColumnElement[Any]:
        return sa.func.phraseto_tsquery(sa.literal_column("'english'::regconfig"), word)

    def joined(parts: Sequence[sa.ColumnElement[Any]], operator: str) -> sa.ColumnElement[Any]:
        whole = parts[0]
        for part in parts[1:]:
            whole = sa.type_coerce(whole.op(operator)(part), sa.types.NullType()).self_group()
        return whole

    def grouped(some: Groups, operator: str) -> sa.ColumnElement[Any]:
        alternatives = [joined([parsed(word) for word in group], "||") for group in some]
        return joined(alternatives, "&&" if operator == "AND" else "||")

    query = joined([grouped(*part) for part in _parts(groups, every)], "&&")
    words: sa.ColumnElement[Any] = sa.literal_column("papers.words")
    # D, C, B, A; 1: divided by 1 + the logarithm of the length
    weights: sa.ColumnElement[Any] = sa.literal_column("'{0.125, 0.25, 0.6, 1.0}'::real[]")
    return papers, words.op("@@")(query), sa.func.ts_rank(weights, words, query, 1)
