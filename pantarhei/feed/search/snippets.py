"""The part of a summary that shows why a paper was found."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pantarhei.feed.search.words import fold, stem

_LENGTH = 240  # characters
_PLACES = 16  # of words that are looked at
_SPECIAL = re.compile("[&<>\"']")  # characters that HTML has to be told
_INFLECTION = re.compile(r"\w{0,5}(?!\w)")


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

    def __html__(self) -> str:
        """Return it as HTML, the words in ``<mark>``: what a template that escapes may show."""
        escaped = html.escape if _SPECIAL.search(self.text) else str
        return "".join(
            f"<mark>{escaped(part)}</mark>" if marked else escaped(part) for part, marked in self
        )

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        end = 0
        for start, stop in self.marks:
            if start > end:
                yield self.text[end:start], False
            yield self.text[start:stop], True
            end = stop
        if end < len(self.text):
            yield self.text[end:], False


def roots(words: Iterable[str]) -> tuple[str, ...]:
    """Return what the inflections of each of these folded words begin with.

    >>> roots(["networks", "policies"])
    ('network', 'polic')
    """
    found: dict[str, None] = {}
    for word in words:
        root = stem(word)
        same = next((i for i, (a, b) in enumerate(zip(word, root)) if a != b), len(root))  # noqa: B905
        # Porter writes a final y as i
        same -= same > 3 and root[:same].endswith("i")
        found[word[:same] or word] = None
    return tuple(found)


def cut(text: str, words: Sequence[str]) -> Snippet:
    """Return about 240 characters of ``text`` that hold most of the words that begin so.

    >>> str(cut("First. " * 60 + "The networks learn.", roots(["network"])))[-19:]
    'The networks learn.'
    """
    folded = fold(text)
    if len(folded) != len(text):  # an accent was a character of its own: positions would shift
        folded = text
    places = _places(folded, words)
    start = _window(places, folded)
    # not in the middle of a word, and better from the beginning of a sentence nearby
    if start:
        sentence = text.rfind(". ", max(0, start - 60), start)
        start = sentence + 2 if sentence >= 0 else text.find(" ", start) + 1
    end = len(text)
    if start + _LENGTH + 60 < end:
        end = text.rfind(" ", start, start + _LENGTH)
        end = start + _LENGTH if end <= start else end
    before, after = "… " * (start > 0), " …" * (end < len(text))
    shift = len(before) - start
    marks = tuple((a + shift, b + shift) for a, b in places if start <= a and b <= end)
    return Snippet(before + text[start:end] + after, marks)


def _places(folded: str, words: Sequence[str]) -> list[tuple[int, int]]:
    """Return where the first inflections of the words stand.

    A short stem inside a long word is another word: "net" is none of "netherlands". Looking for
    each in turn is several times as fast as a pattern of all, which is made anew for every query.
    """
    found: set[tuple[int, int]] = set()
    for word in words:
        length, left = len(word), _PLACES
        start = folded.find(word)
        while start >= 0 and left:
            end = start + length
            if not start or not _in_word(folded[start - 1]):
                if end < len(folded) and _in_word(folded[end]):
                    rest = _INFLECTION.match(folded, end)
                    end = rest.end() if rest else -1
                if end > 0:
                    found.add((start, end))
                    left -= 1
            start = folded.find(word, start + length)
    return sorted(found)[:_PLACES]


def _in_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _window(places: Sequence[tuple[int, int]], folded: str) -> int:
    """Return where a window with the most different words begins, the first of equals."""
    names = [folded[a : a + 4] for a, _ in places]
    most, best, start, last = len(set(names)), 0, 0, 0
    inside: dict[str, int] = {}
    for index, (name, (first, _)) in enumerate(zip(names, places, strict=True)):
        reach = first + _LENGTH - 40
        while last < len(places) and (last == index or places[last][1] <= reach):
            inside[names[last]] = inside.get(names[last], 0) + 1
            last += 1
        if len(inside) > best:
            best, start = len(inside), first
            if best == most:
                break
        if inside[name] == 1:
            del inside[name]
        else:
            inside[name] -= 1
    if start <= _LENGTH // 3 or len(folded) <= _LENGTH:
        return 0
    return max(0, min(start - 40, len(folded) - _LENGTH))
