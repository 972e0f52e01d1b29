"""Search: by words and by meaning, fused; related papers; results as you type.

The words' index lies in memory (:mod:`.postings`), as does the meanings' (:mod:`.index`), unless
PostgreSQL keeps the latter itself. Both follow the store by the numbered list of changes that its
triggers write. Until they are built in a large store the database's own full text answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from pantarhei.errors import RequestError
from pantarhei.feed import papers
from pantarhei.feed.papers import Paper
from pantarhei.feed.search import index, snippets, text, upkeep
from pantarhei.feed.search.snippets import Snippet
from pantarhei.feed.search.text import Filter, Found, Groups, Query
from pantarhei.feed.store import Store

__all__ = ["Hit", "Results", "Searcher", "Snippet"]

_DEPTH = 200  # places of either ranking that are fused
_NEAR = 100  # papers that are found by meaning alone, at most
_LIKE = 0.3  # their least cosine, and ...
_LIKE_BEST = 0.6  # ... their least share of the best one's
_RANK = 60  # reciprocal rank fusion, Cormack, Clarke and Buettcher 2009
_BY_MEANING = 0.6  # of a vote by words, which a reader can check
_FEW = 10  # matches of all words, below which some of the words suffice
_SMALL = 5_000  # papers that are indexed while a search waits
_REMEMBERED = 512  # rankings
_MOST = 100  # papers in one answer
_FARTHEST = 10_000


@dataclass(frozen=True)
class Hit:
    """A paper that was found. ``score`` orders the hits of one search and means nothing else."""

    paper: Paper
    score: float
    snippet: Snippet


@dataclass(frozen=True)
class Results:
    """What a search found.

    ``total`` counts the papers that hold the words, and those that were found by meaning alone.
    ``corrected`` is the query that was answered, where unknown words were taken for others.
    """

    hits: tuple[Hit, ...]
    total: int
    corrected: str | None
    seconds: float


@dataclass(frozen=True)
class _Ranking:
    ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    total: int
    query: Query
    corrected: str | None


class Searcher:
    """Searches one store; to be shared among threads.

    Call :meth:`refresh` at the start (in a thread of its own) and after papers were added. What was
    added elsewhere is noticed by the next search. ``folder`` is where the indices of a large store
    are kept between starts: beside an SQLite file; ``exact`` is the number of papers up to which
    every vector is looked at.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()) / "feed.sqlite")
    >>> with store.write() as c:
    ...     row = {"key": "a", "title": "Early exits", "date": "2026-01-31", "source": "json"}
    ...     _ = papers.add(c, [row])
    >>> searcher = Searcher(store)
    >>> [hit.paper.key for hit in searcher.search("erly exit").hits]
    ['a']
    """

    def __init__(
        self, store: Store, *, folder: Path | None = None, exact: int = index.EXACT
    ) -> None:
        self._store = store
        if folder is None and store.path is not None:
            folder = store.path.with_name(store.path.name + "-search")
        self._upkeep = upkeep.Upkeep(store, folder, exact)
        self._background: threading.Thread | None = None
        self._starting = threading.Lock()
        self._rankings: OrderedDict[object, _Ranking] = OrderedDict()
        self._remembering = threading.Lock()

    def refresh(self) -> None:
        """Index what is new and what changed, and embed it; what was done before is kept.

        Interrupted, it goes on where it was. Several processes may do it at once.
        """
        self._upkeep.words()
        self._upkeep.meaning()

    def close(self) -> None:
        """Stop what goes on in the background."""
        self._upkeep.stop()
        if self._background is not None:
            self._background.join()

    def search(
        self,
        query: str,
        *,
        wing: str | None = None,
        status: str | None = None,
        since: str | None = None,
        until: str | None = None,
        limit: int = 20,
        offset: int = 0,
        within: sa.Connection | None = None,
    ) -> Results:
        """Find papers, best first.

        Papers with all words of the query come before those with some of them where there are few
        of the former; ``"words in quotes"`` have to stand side by side. A word that no paper holds
        is taken for the likeliest one that is. Papers are also found by what they are about.
        ``within`` is the transaction that papers are read in, one of its own unless given. No
        query is an error; a wing, a status or a date that is none raises
        :class:`~pantarhei.errors.RequestError`.
        """
        began = time.perf_counter()
        allowed = Filter(wing, status, since, until)
        allowed.conditions()  # says what is wrong with it
        limit, offset = max(1, min(limit, _MOST)), max(0, min(offset, _FARTHEST))
        with nullcontext(within) if within is not None else self._store.read() as c:
            ranking = self._ranked(c, query, allowed, offset + limit)
            chosen = slice(offset, offset + limit)
            ids = ranking.ids[chosen].tolist()
            scores = dict(zip(ids, ranking.scores[chosen].tolist(), strict=True))
            found = papers.by_id(c, ids)
        said = ranking.query
        words = snippets.roots((*said.words, *" ".join(said.phrases).split()))
        hits = tuple(
            Hit(paper, scores[paper.id], snippets.cut(paper.summary, words)) for paper in found
        )
        return Results(hits, ranking.total, ranking.corrected, time.perf_counter() - began)

    def prompt(self, query: str) -> bool:
        """Whether this search needs a few milliseconds: for an event loop, where others wait.

        It does where the indices are in memory and up to date, the papers in a file on this
        machine, and the order of words is not asked for, which is known to the database alone.
        """
        if self._store.path is None or text.parse(query).phrases:
            return False
        with self._store.read() as c:
            return not self._upkeep.behind(c)

    def suggest(self, query: str, limit: int = 8) -> tuple[Paper, ...]:
        """Return papers for a query that is still being typed: its last word may be unfinished."""
        limit = max(1, min(limit, _MOST))
        asked = text.parse(query)
        unfinished = bool(asked.words) and query[-1:].isalnum()
        with self._store.read() as c:
            state = self._current(c)
            if state is None:
                found = text.search(c, asked.groups(), True, Filter(), limit)
                return tuple(papers.by_id(c, found.ids.tolist()))
            groups = list(asked.groups())
            if unfinished:
                last = asked.words[-1]
                whole = [last] if last in state.words.vocabulary.counts else []
                more = state.words.vocabulary.complete(last)
                guessed = [state.words.vocabulary.correct(last) or last]
                groups[len(asked.words) - 1] = tuple(dict.fromkeys(whole + more)) or tuple(guessed)
            found = self._by_words(c, state, tuple(groups), True, None, limit)
            if not found.total:
                found = self._by_words(c, state, tuple(groups), False, None, limit)
            return tuple(papers.by_id(c, found.ids.tolist()))

    def related(self, paper: int, n: int = 5) -> tuple[Paper, ...]:
        """Return the papers nearest to one in meaning, else those that share its title's words."""
        n = max(1, min(n, _MOST))
        near = self._upkeep.near
        vector = near.vector(paper) if near is not None else None
        with self._store.read() as c:
            if near is not None and vector is not None and vector.any():
                ids = near.nearest(vector, n + 1)[0]
            else:
                found = papers.by_id(c, [paper])
                asked = text.parse(found[0].title if found else "")
                state = self._current(c)
                groups = tuple((word,) for word in asked.words)
                ids = self._by_words(c, state, groups, False, None, n + 1).ids
            return tuple(papers.by_id(c, [i for i in ids.tolist() if i != paper][:n]))

    def _current(self, c: sa.Connection) -> upkeep.State | None:
        """Return the words' index, up to date where that takes no time; None where none is yet."""
        if self._upkeep.behind(c):
            if self._upkeep.small(c, _SMALL):
                self._upkeep.words()
            self._refresh_in_background()
        return self._upkeep.state

    def _refresh_in_background(self) -> None:
        def work() -> None:
            try:
                self.refresh()
            except RequestError as error:
                logging.getLogger(__name__).warning("The index is not up to date: %s", error)

        with self._starting:
            if self._background is None or not self._background.is_alive():
                self._background = threading.Thread(target=work, daemon=True, name="index")
                self._background.start()

    def _ranked(self, c: sa.Connection, query: str, allowed: Filter, depth: int) -> _Ranking:
        state = self._current(c)
        depth = _DEPTH if depth <= _DEPTH else _FARTHEST + _MOST
        key = (state, self._upkeep.near, query, allowed, depth)
        if state is not None:
            with self._remembering:
                if (known := self._rankings.get(key)) is not None:
                    self._rankings.move_to_end(key)
                    return known
        ranking = self._rank(c, state, query, allowed, depth)
        if state is not None:
            with self._remembering:
                self._rankings[key] = ranking
                while len(self._rankings) > _REMEMBERED:
                    self._rankings.popitem(last=False)
        return ranking

    def _rank(
        self, c: sa.Connection, state: upkeep.State | None, query: str, allowed: Filter, depth: int
    ) -> _Ranking:
        asked, corrected = text.parse(query), None
        if state is not None:
            asked, corrected = text.corrected(asked, state.words.vocabulary)
        mask = state.words.facts.passing(allowed) if state is not None and allowed else None
        groups = asked.groups()
        found = self._by_words(c, state, groups, True, mask, depth, allowed)
        if found.total < _FEW and len(groups) > 1:
            some = self._by_words(c, state, groups, False, mask, depth, allowed)
            found = _behind(found, some)
        near = self._by_meaning(state, asked, mask)
        ids, scores = _fused(found.ids, near)
        total = found.total + len(near)
        if len(near):
            total -= int(np.isin(found.ids if found.all is None else found.all, near).sum())
        return _Ranking(ids, scores, total, asked, corrected)

    def _by_words(
        self,
        c: sa.Connection,
        state: upkeep.State | None,
        groups: Groups,
        every: bool,
        mask: NDArray[np.bool_] | None,
        k: int,
        allowed: Filter = Filter(),  # noqa: B008 (frozen)
    ) -> Found:
        if state is None:
            return text.search(c, groups, every, allowed, k)
        phrases = [alternatives[0] for alternatives in groups if " " in alternatives[0]]
        if not phrases:
            return state.words.search(groups, every, mask, k)
        # The order of words is known to the database alone: it says which papers hold a phrase,
        # which is asked for in any case; the ranking is by the phrase's words.
        mask = state.words.facts.alive if mask is None else mask
        for phrase in phrases:
            mask = mask & state.holding(text.holding(c, phrase))
        words = tuple((w,) for group in groups for w in group[0].split())
        single = tuple(group for group in groups if " " not in group[0])
        if every or not single:
            return state.words.search((*single, *words), every and bool(single), mask, k)
        return state.words.search(words, False, mask, k)

    def _by_meaning(
        self, state: upkeep.State | None, asked: Query, mask: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        near, model = self._upkeep.near, self._upkeep.model
        none = np.zeros(0, np.int64)
        if state is None or near is None or model is None or not asked.words or asked.phrases:
            return none
        vector = model.embed([" ".join(asked.words)])[0]
        allowed = None if mask is None else state.by_id(mask)
        ids, cosines = near.nearest(vector, _NEAR, allowed)
        if not len(ids):
            return none
        return ids[cosines >= max(_LIKE, _LIKE_BEST * float(cosines[0]))]


def _behind(best: Found, others: Found) -> Found:
    """Put what matches some words behind what matches all."""
    new = ~np.isin(others.ids, best.ids)
    return Found(
        np.append(best.ids, others.ids[new]),
        np.append(best.scores, others.scores[new]),
        others.total,
        others.all,
    )


def _fused(
    by_words: NDArray[np.int64], by_meaning: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the papers of both rankings by the sum of their reciprocal ranks.

    Of a long list the head is fused; the rest follows as it is.
    """
    head, rest = by_words[:_DEPTH], by_words[_DEPTH:]
    ids, where = np.unique(np.append(head, by_meaning), return_inverse=True)
    votes = np.append(
        1.0 / (_RANK + np.arange(1, len(head) + 1)),
        _BY_MEANING / (_RANK + np.arange(1, len(by_meaning) + 1)),
    )
    values = np.bincount(where, votes, len(ids)).astype(float)
    order = np.lexsort((-ids, -values))
    ids, values = ids[order], values[order]
    if len(rest):
        rest = rest[~np.isin(rest, ids)]
        ids, values = np.append(ids, rest), np.append(values, np.zeros(len(rest)))
    return ids, values
