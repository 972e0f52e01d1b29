"""The part of a summary that shows why a paper was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pantarhei.feed.search.words import fold, stem

_LENGTH = 240  # characters


@dataclass(frozen=True)
class Snippet:
    """Plain text, to be escaped like any other, and which parts of it are words of the query.

    Iterating gives the text in parts, each with whether it is such a word:

    >>> list(Snippet("a deep net", ((2, 6),)))
    [('a ', False), ('deep', True), (' net', False)]
    """

    text: str
    marks: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        return self.text

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        end = 0
        for start, stop in self.marks:
            if start > end:
                yield self.text[end:start], False
            yield self.text[start:stop], True
            end = stop
        if end < len(self.text):
            yield self.text[end:], False


def beginnings(words: Iterable[str]) -> list[str]:
    """Return what a word of the text begins with where it is one of these, in any inflection.

    >>> beginnings(["networks", "policies"])
    ['network', 'polic']
    """
    found: dict[str, None] = {}
    for word in words:
        root = stem(word)
        same = next((i for i, (a, b) in enumerate(zip(word, root)) if a != b), len(root))  # noqa: B905
        found[word[:same] or word] = None
    return list(found)


def cut(text: str, words: Sequence[str]) -> Snippet:
    """Return about 240 characters of ``text`` that hold most of the words (as :func:`beginnings`).

    >>> str(cut("First. " * 60 + "The networks learn.", ["network"]))[-19:]
    'The networks learn.'
    """
    folded = fold(text)
    if len(folded) != len(text):  # an accent was a character of its own: positions would shift
        folded = text.lower() if len(text.lower()) == len(text) else text
    places = sorted(place for number, word in enumerate(words)
                    for place in _places(folded, word, number))  # fmt: skip
    start = _window(places, len(text))
    # not in the middle of a word, and better from the beginning of a sentence nearby
    if start:
        sentence = text.rfind(". ", max(0, start - 60), start)
        start = sentence + 2 if sentence >= 0 else text.find(" ", start) + 1
    end = len(text)
    if start + _LENGTH < end:
        end = text.rfind(" ", start, start + _LENGTH)
        end = start + _LENGTH if end <= start else end
    before, after = "… " * (start > 0), " …" * (end < len(text))
    shift = len(before) - start
    marks = tuple(
        (place + shift, stop + shift) for place, stop, _ in places if start <= place and stop <= end
    )
    return Snippet(before + text[start:end] + after, _apart(marks))


def _places(folded: str, word: str, number: int) -> Iterator[tuple[int, int, int]]:
    """Return where words that begin with ``word`` stand: at most eight."""
    at = -1
    for _ in range(64):
        at = folded.find(word, at + 1)
        if at < 0:
            return
        if at and folded[at - 1].isalnum():
            continue
        stop = at + len(word)
        while stop < len(folded) and folded[stop].isalnum():
            stop += 1
        # a short stem inside a long word is another word: "net" is none of "netherlands"
        if stop - at <= len(word) + 5:
            yield at, stop, number


def _window(places: Sequence[tuple[int, int, int]], length: int) -> int:
    """Return where a window with the most different words begins, the first of equals."""
    best, start = 0, 0
    for index, (first, _, _) in enumerate(places):
        inside = {n for at, stop, n in places[index : index + 32] if stop <= first + _LENGTH - 40}
        if len(inside) > best:
            best, start = len(inside), first
    if start <= _LENGTH // 3 or length <= _LENGTH:
        return 0
    return max(0, min(start - 40, length - _LENGTH))


def _apart(marks: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Leave out what overlaps."""
    kept: list[tuple[int, int]] = []
    for start, stop in marks:
        if not kept or start >= kept[-1][1]:
            kept.append((start, stop))
    return tuple(kept)
