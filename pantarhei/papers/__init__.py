"""The catalogue: one card per paper, and one recipe module for each paper that runs.

``cards.json`` holds the facts and our own summaries. A paper runs as soon as its recipe module
stands beside this file (``rd-prune`` is ``rd_prune.py``); nothing registers anything.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import re
from dataclasses import asdict, dataclass
from importlib import resources, util
from typing import Any, Literal

from pantarhei.errors import RequestError, nearest
from pantarhei.runs import Recipe

WINGS = ("compute", "systems", "learning")


@dataclass(frozen=True)
class Card:
    """A paper's facts. ``date`` is ISO 8601; ``code`` the authors' repository, where there is one.

    ``own`` is the command that runs the method on the reader's own data, once there is one.

    >>> card("rbqe").wing
    'compute'
    """

    slug: str
    title: str
    date: str
    authors_count: int
    arxiv: str | None
    code: str | None
    wing: Literal["compute", "systems", "learning"]
    summary: str
    own: str | None = None

    @property
    def module(self) -> str:
        """The name of the paper's recipe module."""
        return f"{__name__}.{self.slug.replace('-', '_')}"

    @property
    def status(self) -> Literal["runs", "planned"]:
        """Whether the recipe module exists; it is not imported."""
        return "runs" if util.find_spec(self.module) else "planned"

    def to_json(self) -> dict[str, Any]:
        """Return the card with its status."""
        return asdict(self) | {"status": self.status}


@functools.cache
def catalogue() -> tuple[Card, ...]:
    """Return every card, in the order of the reading list."""
    text = resources.files(__name__).joinpath("cards.json").read_text("utf-8")
    return tuple(Card(**row) for row in json.loads(text))


def card(slug: str) -> Card:
    """Return the card of ``slug``; an unknown one raises :class:`RequestError`."""
    known = {card.slug: card for card in catalogue()}
    if slug not in known:
        raise RequestError(
            f"Unknown paper '{slug}': `pantarhei papers` lists them.{nearest(slug, known)}"
        )
    return known[slug]


def load_recipe(slug: str) -> Recipe:
    """Import the recipe of a paper; a planned one raises :class:`RequestError`."""
    paper = card(slug)
    if paper.status == "planned":
        runs = ", ".join(card.slug for card in catalogue() if card.status == "runs") or "none yet"
        raise RequestError(f"'{slug}' is planned and does not run yet; these run: {runs}.")
    return Recipe.of(slug, importlib.import_module(paper.module))


def find(
    query: str = "", *, wing: str | None = None, status: str | None = None
) -> tuple[Card, ...]:
    """Return the cards that match every word of ``query``, best first.

    Slug, wing, title and summary are searched without regard to case; a word one typing slip away
    from theirs still matches. An unknown wing or status raises :class:`RequestError`.

    >>> [card.slug for card in find("sortdnet")]
    ['sortednet']
    """
    for name, value, known in (("wing", wing, WINGS), ("status", status, ("runs", "planned"))):
        if value is not None and value not in known:
            raise RequestError(
                f"Unknown {name} '{value}': choose {' or '.join(known)}.{nearest(value, known)}"
            )
    words = _words(query)
    scored = [
        (
            min((_score(card, word) for word in words), default=1.0),
            sum(_score(card, w) for w in words),
            card,
        )
        for card in catalogue()
        if wing in (None, card.wing) and (status is None or card.status == status)
    ]
    matching = [row for row in scored if row[0] > 0]
    return tuple(row[2] for row in sorted(matching, key=lambda row: row[1], reverse=True))


def _score(card: Card, word: str) -> float:
    """Weigh the best place in the card where ``word`` stands: 0 where it stands nowhere."""
    places = ((4.0, card.slug), (3.0, card.title), (2.0, card.wing), (1.0, card.summary))
    return max(weight * _likeness(word, text) for weight, text in places)


def _likeness(word: str, text: str) -> float:
    words = _words(text)
    if word in words or word == text.lower():
        return 1.0
    if any(word in other for other in words):
        return 0.8
    if len(word) >= 4 and difflib.get_close_matches(word, words, n=1, cutoff=0.8):
        return 0.5
    return 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
