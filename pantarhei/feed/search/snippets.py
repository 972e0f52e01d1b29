"""The part of a summary that shows why a paper was found."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from pantarhei.feed.search.words import fold, stem

_LENGTH = 240  # characters
_PLACES = 16  # of words that are looked at


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
        return "".join(
            f"<mark>{html.escape(part)}</mark>" if marked else html.escape(part)
            for part, marked in self
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


def pattern(words: Iterable[str]) -> re.Pattern[str] | None:
    """Return what finds these words in a folded text, in any inflection.

    >>> pattern(["networks", "policies"]).findall("a policy network of the netherlands")
    ['policy', 'network']
    """
    roots: dict[str, None] = {}
    for word in words:
        root = stem(word)
        same = next((i for i, (a, b) in enumerate(zip(word, root)) if a != b), len(root))  # noqa: B905
        # Porter writes a final y as i
        same -= same > 3 and root[:same].endswith("i")
        roots[word[:same] or word] = None
    if not roots:
        return None
    # a short stem inside a long word is another word: "net" is none of "netherlands"
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, roots))})\w{{0,5}}\b")


def cut(text: str, words: re.Pattern[str] | None) -> Snippet:
    """Return about 240 characters of ``text`` that hold most of the words.

    >>> str(cut("First. " * 60 + "The networks learn.", pattern(["network"])))[-19:]
    'The networks learn.'
    """
    folded = fold(text)
    if len(folded) != len(text):  # an accent was a character of its own: positions would shift
        folded = text
    found = words.finditer(folded) if words is not None else ()
    places = [one.span() for one in islice(found, _PLACES)]
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


def _window(places: Sequence[tuple[int, int]], folded: str) -> int:
    """Return where a window with the most different words begins, the first of equals."""
    best, start = 0, 0
    names = [folded[a : a + 4] for a, _ in places]
    most = len(set(names))
    for index, (first, _) in enumerate(places):
        inside = {
            name
            for name, (_, b) in zip(names[index:], places[index:], strict=True)
            if b <= first + _LENGTH - 40
        }
        if len(inside) > best:
            best, start = len(inside), first
        if best == most:
            break
    if start <= _LENGTH // 3 or len(folded) <= _LENGTH:
        return 0
    return max(0, min(start - 40, len(folded) - _LENGTH))
