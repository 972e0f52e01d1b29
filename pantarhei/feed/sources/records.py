"""Papers as JSON: a list of objects, or one object.

    [{"title": "...", "authors": ["A. Author"], "date": "2026-01-31", "key": "author2026",
      "summary": "...", "arxiv": "2601.00001", "doi": "...", "code": "https://...",
      "categories": ["cs.LG"]}]

``title``, ``authors`` and ``date`` are needed, and a ``key`` where there is no ``arxiv``.
"""

from __future__ import annotations

import json
from typing import Any

from pantarhei.errors import RequestError, nearest
from pantarhei.feed.sources.entry import Entry, line

_TEXT = ("key", "title", "date", "summary", "arxiv", "doi", "code")
_LISTS = ("authors", "categories")
_NEEDED = ("title", "authors", "date")


def read(text: str, name: str) -> list[Entry]:
    """Read every paper of the file ``name``.

    Raises :class:`RequestError`, naming the paper, where one is not as it should be.
    """
    try:
        papers = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RequestError(f"'{name}' is not readable JSON ({reason}).") from error
    papers = [papers] if isinstance(papers, dict) else papers
    if not isinstance(papers, list) or not papers:
        raise RequestError(f"'{name}' holds no papers: it is a list of objects, one for each.")
    return [_entry(paper, number, name) for number, paper in enumerate(papers, 1)]


def _entry(paper: Any, number: int, name: str) -> Entry:
    which = f"Paper {number} in '{name}'"
    if not isinstance(paper, dict):
        raise RequestError(f"{which} is not an object with a title, authors and a date.")
    if isinstance(paper.get("key"), str):
        which += f" ('{line(paper['key'])[:60]}')"
    for field in paper:
        if field not in _TEXT + _LISTS:
            raise RequestError(
                f"{which} has the unknown field '{line(field)[:60]}'."
                f"{nearest(field[:60], _TEXT + _LISTS)}"
            )
    needed = _NEEDED if paper.get("arxiv") else (*_NEEDED, "key")
    if missing := [field for field in needed if not paper.get(field)]:
        raise RequestError(f"{which} has no {' and no '.join(missing)}.")
    for field, value in paper.items():
        if field in _TEXT and not isinstance(value, str | None):
            raise RequestError(f"{which}: '{field}' is text.")
        if field in _LISTS and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise RequestError(f"{which}: '{field}' is a list of texts.")
    try:
        return Entry.of("json", **{k: v for k, v in paper.items() if v is not None})
    except ValueError as error:
        raise RequestError(f"{which} {error}.") from error
