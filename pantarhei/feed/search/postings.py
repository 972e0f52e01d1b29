"""Search by words, in memory: BM25 with fields, over arrays.

A database computes BM25 row by row, and asks for every row that holds a word how long it is: over
100,000 papers a search for ``neural network`` takes SQLite's FTS5 a third of a second. Here a
word's papers and what each of them gains by it lie in two arrays, so that the same search adds two
arrays into a third.

The score of a paper d for the words of a query is

    sum over w of  log(1 + (N - n_w + 1/2) / (n_w + 1/2)) * f (k + 1) / (f + k (1 - b + b |d| / L))

with N papers of mean length L, n_w of which hold w, k = 1.2 and b = 0.75 (Robertson and Zaragoza,
*The Probabilistic Relevance Framework*, 2009, with the logarithm kept positive as Lucene does), and
f how often d holds w, a title's word counting eight times (``text.WEIGHTS``).
"""

from __future__ import annotations

import itertools
import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from pantarhei.feed.schema import papers
from pantarhei.feed.search.text import NOTHING, WEIGHTS, Filter, Found, Groups
from pantarhei.feed.search.words import Vocabulary, split, stem, stems

_K, _B = 1.2, 0.75
_BATCH = 1000  # papers that are read and counted at a time, and ...
_PART = 5_000  # ... that are put into the index

Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of each row's paper besides its words; the rows never change their place."""

    ids: NDArray[np.int64]
    alive: NDArray[np.bool_]  # a paper that was changed has a new row, and its old one is dead
    lengths: NDArray[np.int32]  # in words
    dates: NDArray[np.int32]  # 20260131
    wings: NDArray[np.int16]
    statuses: NDArray[np.int16]
    names: tuple[str, ...]  # of wings and statuses, by number

    def passing(self, allowed: Filter) -> NDArray[np.bool_]:
        """Return which rows pass a filter."""
        found = self.alive
        for value, column in ((allowed.wing, self.wings), (allowed.status, self.statuses)):
            if value:
                found = found & (column == self._number(value))
        if allowed.since:
            found = found & (self.dates >= _day(allowed.since, 0))
        if allowed.until:
            found = found & (self.dates <= _day(allowed.until, 9999))
        return found

    def _number(self, name: str) -> int:
        return self.names.index(name) if name in self.names else -1


@dataclass(frozen=True, eq=False)
class Postings:
    """An index of a state of the store; :meth:`updated` gives the next one.

    Word t's papers are ``rows[starts[t]:starts[t + 1]]``, in order, with its ``counts`` in them.
    """

    facts: Facts
    starts: NDArray[np.int64]
    rows: NDArray[np.int32]
    counts: NDArray[np.uint16]  # weighted by field
    gains: NDArray[np.float32]  # what the row's paper gains, without the word's logarithm
    stems: dict[str, int]  # a stem's number t
    words: dict[str, int]  # a word's number in ...
    stem_of: NDArray[np.int32]  # ... the numbers of their stems
    papers_with: NDArray[np.int32]  # ... and in how many papers they stand
    vocabulary: Vocabulary

    def __len__(self) -> int:
        return self.vocabulary.papers

    def search(self, groups: Groups, every: bool, mask: NDArray[np.bool_] | None, k: int) -> Found:
        """Return the ``k`` best papers that hold every group of words, or any of them.

        ``mask`` says which rows may be found. The newer of equals comes first.
        """
        known = [self._terms(group) for group in groups]
        if (every and not all(known)) or not any(known):
            return NOTHING
        known = sorted((t for t in known if t), key=self._size)
        rows = self._every(known) if every else self._any(known)
        if mask is not None:
            rows = rows[mask[rows]]
        aligned = every and all(len(terms) == 1 for terms in known)
        scores = self._scores(rows, [t for terms in known for t in terms], aligned)
        best = _best(scores, rows, k)
        ids = self.facts.ids[rows]
        return Found(ids[best], scores[best].astype(float), len(rows), ids)

    def updated(self, changed: Iterable[int], rows: Iterable[Sequence[Any]]) -> Postings:
        """Return the index without the papers that changed, and with them as they are now."""
        facts = self.facts
        gone = facts.alive & np.isin(facts.ids, np.fromiter(set(changed), np.int64))
        kept = replace(facts, alive=facts.alive & ~gone)
        base = replace(self, facts=kept)
        if gone.any():
            held = gone[self.rows]
            before = np.cumsum(held, dtype=np.int32)  # of the postings that go, up to each
            starts = self.starts.copy()
            starts[1:] -= np.where(starts[1:] > 0, before[starts[1:] - 1], 0)
            base = replace(base, starts=starts, rows=self.rows[~held], counts=self.counts[~held])
        # by parts: what is sorted at a time is a tenth of a large store
        index, rows = base, iter(rows)
        while part := list(itertools.islice(rows, _PART)):
            index = _merged(index, _counted(index, part))
        return index if index is not base else _merged(base, _Count(base))

    def _terms(self, group: Sequence[str]) -> list[int]:
        """Return the numbers of the words of a group that the store knows."""
        found: dict[int, None] = {}
        for word in group:
            number = self.words.get(word)
            term = self.stem_of[number] if number is not None else self.stems.get(stem(word), -1)
            if term >= 0 and self.starts[term + 1] > self.starts[term]:
                found[int(term)] = None
        return list(found)

    def _slice(self, term: int) -> slice:
        return slice(int(self.starts[term]), int(self.starts[term + 1]))

    def _size(self, terms: Sequence[int]) -> int:
        return sum(int(self.starts[t + 1] - self.starts[t]) for t in terms)

    def _any(self, groups: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        marked = np.zeros(len(self.facts.ids), bool)
        for term in itertools.chain.from_iterable(groups):
            marked[self.rows[self._slice(term)]] = True
        return np.flatnonzero(marked).astype(np.int32)

    def _every(self, groups: Sequence[Sequence[int]]) -> NDArray[np.int32]:
        """Begin with the rarest, and look the others up in what is left."""
        rows = (
            self.rows[self._slice(groups[0][0])] if len(groups[0]) == 1 else self._any(groups[:1])
        )
        for terms in groups[1:]:
            if len(terms) > 1 or not self._worth_looking_up(terms[0], rows):
                marked = np.zeros(len(self.facts.ids), bool)
                for term in terms:
                    marked[self.rows[self._slice(term)]] = True
                rows = rows[marked[rows]]
            else:
                rows = rows[self._places(terms[0], rows)[1]]
        return rows

    def _worth_looking_up(self, term: int, rows: Integers) -> bool:
        return len(rows) * 16 < self._size([term])

    def _places(self, term: int, rows: Integers) -> tuple[Integers, NDArray[np.bool_]]:
        """Return where each row stands in the word's list, and whether it does."""
        held = self.rows[self._slice(term)]
        places = np.searchsorted(held, rows)
        places[places == len(held)] = 0
        return places, held[places] == rows

    def _scores(self, rows: Integers, terms: Sequence[int], aligned: bool) -> NDArray[np.float32]:
        """Add up what each row gains; ``aligned``: every row holds every word."""
        scores = np.zeros(len(rows), np.float32)
        marked = np.zeros(len(self.facts.ids), bool if aligned else np.float32)
        if aligned:
            marked[rows] = True
        spread = False
        for term in terms:
            part, weight = self._slice(term), np.float32(self._weight(term))
            held, gains = self.rows[part], self.gains[part]
            if self._worth_looking_up(term, rows):
                places, there = self._places(term, rows)
                scores += np.where(there, gains[places], 0) * weight
            elif aligned:  # those of the word's rows that are ours are all of ours, in order
                scores += gains[np.flatnonzero(marked[held])] * weight
            else:
                marked[held] += gains * weight
                spread = True
        return scores + marked[rows] if spread else scores

    def _weight(self, term: int) -> float:
        n = self._size([term])
        return math.log1p((len(self) - n + 0.5) / (n + 0.5))


def _best(scores: NDArray[np.float32], rows: Integers, k: int) -> Integers:
    """Return the places of the ``k`` highest scores, of equals those of the last rows."""
    places = np.arange(len(scores))
    if len(scores) > k:
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        places = np.flatnonzero(scores >= least)
    return places[np.lexsort((-rows[places].astype(np.int64), -scores[places]))][:k]


def _day(date: str, rest: int) -> int:
    """Return an ISO date as a number; where month or day are left out, ``rest`` stands for them."""
    digits = "".join(char for char in date[:10] if char.isdigit())
    return int(digits.ljust(8, "9" if rest else "0") or 0)


_COLUMNS = [papers.c[name] for name in ("id", *WEIGHTS, "arxiv", "date", "wing", "status")]


def rows_of(c: sa.Connection, ids: Sequence[int] | None = None) -> Iterator[Sequence[Any]]:
    """Read papers as :meth:`Postings.updated` takes them: those named, or all."""
    statement = sa.select(*_COLUMNS).order_by(papers.c.id)
    if ids is None:
        yield from c.execution_options(yield_per=_BATCH).execute(statement)
        return
    for first in range(0, len(ids), _BATCH):
        part = [int(paper) for paper in ids[first : first + _BATCH]]
        yield from c.execute(statement.where(papers.c.id.in_(part)))


def empty() -> Postings:
    """Return the index of a store without papers."""
    none = np.zeros(0, np.int32)
    facts = Facts(none.astype(np.int64), none.astype(bool), none, none,
                  none.astype(np.int16), none.astype(np.int16), ())  # fmt: skip
    return Postings(facts, np.zeros(1, np.int64), none, none.astype(np.uint16),
                    none.astype(np.float32), {}, {}, none, none, Vocabulary({}))  # fmt: skip


class _Count:
    """Papers counted word by word, in batches, with the numbers of words and stems going on."""

    def __init__(self, base: Postings) -> None:
        # copies: searches go on in the index that these come from
        self.words, self.stems = dict(base.words), dict(base.stems)
        self.names = list(base.facts.names)
        self.stem_of = [base.stem_of]
        self.papers_with = [base.papers_with]
        self.first = len(base.facts.ids)
        self.columns: list[tuple[Any, ...]] = []
        self.parts: list[tuple[Integers, Integers, Integers]] = []  # stems, rows, counts

    def add(self, batch: Sequence[Sequence[Any]]) -> None:
        texts = [_texts(row) for row in batch]
        new = {word for fields in texts for words in fields for word in words} - self.words.keys()
        self._meet(sorted(new))
        numbers = [self.words[word] for fields in texts for words in fields for word in words]
        lengths = np.array([[len(words) for words in fields] for fields in texts])
        rows = np.repeat(np.arange(len(batch)), lengths.sum(1))
        fields = np.tile(np.array(list(WEIGHTS.values())), len(batch))
        weights = np.repeat(fields, lengths.ravel())
        word = np.array(numbers, np.int64)
        _, distinct = np.divmod(np.unique(rows * len(self.words) + word), len(self.words))
        with_word = np.bincount(distinct, minlength=len(self.words)).astype(np.int32)
        self.papers_with = [_padded(self.papers_with[0], len(with_word)) + with_word]
        stem_of = np.concatenate(self.stem_of)
        self.stem_of = [stem_of]
        pairs, where = np.unique(stem_of[word] * len(batch) + rows, return_inverse=True)
        counts = np.bincount(where, weights, len(pairs)).clip(max=65535).astype(np.uint16)
        term, row = np.divmod(pairs, len(batch))
        first = self.first + len(self.columns)
        self.parts.append((term.astype(np.int32), (row + first).astype(np.int32), counts))
        for paper, length in zip(batch, lengths.sum(1), strict=True):
            date, wing, status = paper[-3:]
            row_facts = (paper[0], length, _day(date, 0), self._name(wing), self._name(status))
            self.columns.append(row_facts)

    def _meet(self, new: list[str]) -> None:
        numbers = []
        for word, stem_ in zip(new, stems(new), strict=True):
            self.words[word] = len(self.words)
            numbers.append(self.stems.setdefault(stem_, len(self.stems)))
        self.stem_of.append(np.array(numbers, np.int32))

    def _name(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)


def _texts(row: Sequence[Any]) -> list[list[str]]:
    """Return the words of each field, in the order of the weights."""
    _, title, key, authors, categories, summary, arxiv, *_ = row
    fields = (title, f"{key} {arxiv or ''}", " ".join(map(str, authors)), categories, summary)
    return [split(text) for text in fields]


def _padded(values: Integers, length: int) -> Integers:
    return np.concatenate([values, np.zeros(length - len(values), values.dtype)])


def _counted(base: Postings, rows: Iterable[Sequence[Any]]) -> _Count:
    count, rows = _Count(base), iter(rows)
    while batch := list(itertools.islice(rows, _BATCH)):
        count.add(batch)
    return count


def _merged(base: Postings, more: _Count) -> Postings:
    """Return an index of the papers of both."""
    facts = base.facts
    if more.columns:
        ids, lengths, dates, wings, statuses = zip(*more.columns, strict=True)
        facts = Facts(
            np.append(facts.ids, np.array(ids, np.int64)),
            np.append(facts.alive, np.ones(len(ids), bool)),
            np.append(facts.lengths, np.array(lengths, np.int32)),
            np.append(facts.dates, np.array(dates, np.int32)),
            np.append(facts.wings, np.array(wings, np.int16)),
            np.append(facts.statuses, np.array(statuses, np.int16)),
            tuple(more.names),
        )
    sizes = _padded(np.diff(base.starts), len(more.stems))
    rows, counts = base.rows, base.counts
    if more.parts:
        terms, new_rows, new_counts = (
            np.concatenate(part) for part in zip(*more.parts, strict=True)
        )
        order = np.argsort(terms, kind="stable")  # rows ascend within a word already
        ends = np.append(base.starts[1:], np.full(len(more.stems), len(rows)))
        at = ends[terms[order]]  # new rows go behind a word's old ones
        rows = np.insert(rows, at, new_rows[order])
        counts = np.insert(counts, at, new_counts[order])
        sizes = sizes + np.bincount(terms, minlength=len(sizes))
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    papers_with = _padded(more.papers_with[0], len(more.words)).astype(np.int32)
    numbers = papers_with.tolist()
    known = {word: numbers[number] for word, number in more.words.items()}
    return Postings(
        facts, starts, rows, counts, _gains(facts, rows, counts), more.stems, more.words,
        np.concatenate(more.stem_of), papers_with,
        Vocabulary(known, int(facts.alive.sum()), more.stems),
    )  # fmt: skip


def _gains(facts: Facts, rows: Integers, counts: Integers) -> NDArray[np.float32]:
    lengths = facts.lengths[facts.alive]
    mean = float(lengths.mean()) if len(lengths) else 1.0
    slow = (_K * (1 - _B + _B * facts.lengths / max(mean, 1.0))).astype(np.float32)
    gains = np.empty(len(rows), np.float32)
    for first in range(0, len(rows), 1 << 20):  # by parts, for the memory
        part = slice(first, first + (1 << 20))
        f = counts[part].astype(np.float32)
        gains[part] = f * np.float32(_K + 1) / (f + slow[rows[part]])
    return gains


_ARRAYS = ("starts", "rows", "counts", "stem_of", "papers_with")
_FACTS = ("ids", "alive", "lengths", "dates", "wings", "statuses")


def save(path: Path, index: Postings, described: Mapping[str, Any]) -> None:
    """Write an index into one file (NumPy's npz) with a description of what it is of."""
    names = {"words": list(index.words), "stems": list(index.stems), "names": index.facts.names}
    header = json.dumps({**described, "format": 1, **names}).encode()
    arrays = {name: getattr(index, name) for name in _ARRAYS}
    arrays |= {name: getattr(index.facts, name) for name in _FACTS}
    with path.open("wb") as file:
        np.savez(file, header=np.frombuffer(header, np.uint8), allow_pickle=False, **arrays)


def load(path: Path) -> tuple[Postings, dict[str, Any]] | None:
    """Read an index and its description; None where the file is not a whole one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header.pop("format") != 1:
                return None
            facts = Facts(names=tuple(header.pop("names")), **{name: file[name] for name in _FACTS})
            arrays = {name: file[name] for name in _ARRAYS}
        words = {word: number for number, word in enumerate(header.pop("words"))}
        stems_ = {stem_: number for number, stem_ in enumerate(header.pop("stems"))}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    known = dict(zip(words, arrays["papers_with"].tolist(), strict=True))
    made = Postings(
        facts, gains=_gains(facts, arrays["rows"], arrays["counts"]), stems=stems_, words=words,
        vocabulary=Vocabulary(known, int(facts.alive.sum()), stems_), **arrays,
    )  # fmt: skip
    return made, header
