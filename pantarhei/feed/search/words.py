"""Words: how texts are split, what a mistyped word was meant to be, how a started one goes on."""

from __future__ import annotations

import functools
import re
import sqlite3
import threading
import unicodedata
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

_WORD = re.compile(r"[^\W_]+")
_LONGEST = 64  # characters of a word; what is longer is no word anybody types

# Left out of a query that has other words: nearly every paper holds them.
STOP_WORDS = frozenset(
    """a an and are as at be by can do does for from has have how in into is it its of on or our
    that the their these this those to via was we were what when where which who why will with you
    your""".split()  # noqa: SIM905
)


def fold(text: str) -> str:
    """Return ``text`` in lower case without accents, as FTS5's ``unicode61`` compares it.

    >>> fold("Schrödinger Bridges")
    'schrodinger bridges'
    """
    if text.isascii():
        return text.lower()
    parts = unicodedata.normalize("NFD", text.lower())
    return "".join(char for char in parts if not unicodedata.combining(char))


def split(text: str) -> list[str]:
    """Return the words of ``text``, folded.

    >>> split("Early-Exit (BERT) networks, 2x")
    ['early', 'exit', 'bert', 'networks', '2x']
    """
    return _WORD.findall(fold(text))


class _Stemmer:
    """SQLite's own, asked through an index in memory that never keeps anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._c = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._c.execute(
            "CREATE VIRTUAL TABLE t USING fts5(w, tokenize='porter unicode61 remove_diacritics 2')"
        )
        self._c.execute("CREATE VIRTUAL TABLE v USING fts5vocab(t, 'instance')")

    def __call__(self, words: Sequence[str]) -> list[str]:
        with self._lock:
            self._c.execute("BEGIN")
            try:
                self._c.executemany("INSERT INTO t (rowid, w) VALUES (?, ?)", enumerate(words))
                terms = self._c.execute('SELECT doc, term FROM v WHERE "offset" = 0')
                found = dict(terms.fetchall())
            finally:
                self._c.execute("ROLLBACK")
        return [found.get(index, word) for index, word in enumerate(words)]


_stemmer = functools.cache(_Stemmer)


def stems(words: Sequence[str]) -> list[str]:
    """Return each word's Porter stem, by the very stemmer that SQLite's full-text index uses.

    >>> stems(["networks", "learning", "dynamic", "dynamics"])
    ['network', 'learn', 'dynam', 'dynam']
    """
    return _stemmer()(words)


@functools.lru_cache(16_384)
def stem(word: str) -> str:
    """Return one word's Porter stem."""
    return stems([word])[0]


@dataclass(frozen=True)
class Vocabulary:
    """Every word of the store's papers, with the number of papers that hold it.

    >>> words = Vocabulary({"neural": 40, "network": 50, "netting": 2})
    >>> words.correct("nueral"), words.correct("network"), words.correct("zzzzzz")
    ('neural', 'network', None)
    >>> words.complete("net")
    ['network', 'netting']
    """

    counts: Mapping[str, int]
    papers: int = 0
    stems: Collection[str] = ()
    _corrected: dict[str, str | None] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def _ordered(self) -> list[str]:
        return sorted(self.counts)

    @functools.cached_property
    def _alike(self) -> Mapping[tuple[str, int], list[str]]:
        """What may be meant, by first letter and length."""
        found: dict[tuple[str, int], list[str]] = {}
        for word in self.counts:
            if self._meant(word):
                found.setdefault((word[0], len(word)), []).append(word)
        return found

    def prepare(self) -> Vocabulary:
        """Make now what the first slip and the first started word would wait for."""
        _ = self._ordered, self._alike
        return self

    def _meant(self, word: str) -> bool:
        """Whether a word is what somebody may have meant."""
        # In a large store a word that stands in one paper only may be that paper's own slip.
        least = 2 if self.papers >= 1000 else 1
        return self.counts.get(word, 0) >= least and word.isalpha() and len(word) <= _LONGEST

    def correct(self, word: str) -> str | None:
        """Return the word that was meant: itself where it is known, None where nothing is near.

        One slip (a letter too many, missing, wrong, or two exchanged) is forgiven in words of four
        letters and more, two behind the first letter from eight on. Among words equally near the
        more frequent is meant.
        """
        if word in self.counts:
            return word
        if len(word) < 4 or len(word) > _LONGEST or not word.isalpha():
            return None
        if word not in self._corrected:
            if len(self._corrected) > 10_000:
                self._corrected.clear()
            self._corrected[word] = self._nearest(word)
        return self._corrected[word]

    def inflected(self, word: str) -> bool:
        """Whether another form of the word is known."""
        return stem(word) in self.stems

    def _nearest(self, word: str) -> str | None:
        found = {other for other in self.counts.keys() & _one_slip(word) if self._meant(other)}
        if not found and len(word) >= 8:
            found = self._two_slips(word)
        # people rarely miss the first letter
        return max(found, key=lambda w: (w[0] == word[0], self.counts[w], w), default=None)

    def _two_slips(self, word: str) -> set[str]:
        """Return the words two slips away that begin with the same letter."""
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        lengths = range(len(word) - 2, len(word) + 3)
        alike = [other for n in lengths for other in self._alike.get((word[0], n), ())]
        found = process.extract(word, alike, scorer=OSA.distance, score_cutoff=2, limit=None)
        return {other for other, _, _ in found}

    def complete(self, start: str, limit: int = 24) -> list[str]:
        """Return the words that begin with ``start``, the most frequent first."""
        first = bisect_left(self._ordered, start)
        last = bisect_left(self._ordered, start + "\U0010ffff")
        return sorted(self._ordered[first:last], key=lambda w: (-self.counts[w], w))[:limit]


_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def _one_slip(word: str) -> set[str]:
    """Return everything one slip away: some fifty per letter, whatever the vocabulary's size."""
    parts = [(word[:place], word[place:]) for place in range(len(word) + 1)]
    found = {a + letter + b for a, b in parts for letter in _LETTERS}
    found |= {a + letter + b[1:] for a, b in parts if b for letter in _LETTERS}
    found |= {a + b[1:] for a, b in parts if b}
    return found | {a + b[1] + b[0] + b[2:] for a, b in parts if len(b) > 1}
