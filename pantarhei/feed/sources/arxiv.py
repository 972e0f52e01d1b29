"""arXiv's API: Atom documents, by identifier or by category and time of submission.

Protocol: the arXiv API User's Manual. Of each paper the newest version is described, and
``published`` is the date of its first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from xml.etree.ElementTree import Element

from pantarhei.feed.sources._xml import parse, text
from pantarhei.feed.sources.entry import (
    Entry,
    arxiv_identifier,
    line,
    newest,
    readable_doi,
    withdrawn,
)
from pantarhei.feed.sources.fetch import Fetcher, SourceError, Unreadable, address

_ATOM = "{http://www.w3.org/2005/Atom}"
_ARXIV = "{http://arxiv.org/schemas/atom}"
_OPENSEARCH = "{http://a9.com/-/spec/opensearch/1.1/}"
PAGE = 500  # papers asked for at once: the API gives up to 2,000, and then slowly
_IDS = 100  # identifiers in one address
_MOST = 30_000  # the API pages no further into one query


@dataclass(frozen=True)
class Answer:
    """One Atom document: its papers, what could not be read, and the size of the whole result."""

    entries: tuple[Entry, ...]
    unreadable: tuple[str, ...]
    total: int
    count: int  # of the elements, the unreadable ones included
    last: str  # the latest submission, YYYYMMDDhhmm


@dataclass(frozen=True)
class Place:
    """Where to read on: papers submitted from ``since`` (YYYYMMDDhhmm) but for ``skip`` of them."""

    since: str
    skip: int = 0


def read(data: bytes) -> Answer:
    """Read an answer. Raises ``Unreadable`` for what is none, ``SourceError`` for a refusal."""
    root = parse(data, f"{_ATOM}feed")
    entries, unreadable, last = [], [], ""
    elements = root.findall(f"{_ATOM}entry")
    for element in elements:
        identifier = line(text(element, f"{_ATOM}id"))
        if "/api/errors" in identifier:
            raise SourceError(f"arXiv refuses: {line(text(element, f'{_ATOM}summary'))[:200]}")
        try:
            entries.append(_entry(element))
        except ValueError as error:
            unreadable.append(f"{identifier[-40:] or 'one'} {error}")
        if minute := _minute(text(element, f"{_ATOM}published")):
            last = max(last, minute)
    total = text(root, f"{_OPENSEARCH}totalResults").strip()
    if not re.fullmatch(r"\d{1,9}", total):
        raise Unreadable("it does not say how many results there are")
    return Answer(tuple(newest(entries)), tuple(unreadable), int(total), len(elements), last)


def by_identifier(fetcher: Fetcher, identifiers: Sequence[str]) -> list[Entry]:
    """Return the papers with these identifiers (their versions are ignored), in that order.

    Raises :class:`SourceError` naming those that arXiv does not have.
    """
    wanted = list(dict.fromkeys(arxiv_identifier(identifier)[0] for identifier in identifiers))
    found: dict[str | None, Entry] = {}
    for begin in range(0, len(wanted), _IDS):
        some = wanted[begin : begin + _IDS]
        asked = {"id_list": ",".join(some), "max_results": str(len(some))}
        answer = fetcher.get(_address(), asked, read)
        found |= {entry.arxiv: entry for entry in answer.entries}
    if missing := [identifier for identifier in wanted if identifier not in found]:
        raise SourceError(f"arXiv has no paper {' or '.join(missing[:5])}")
    return [found[identifier] for identifier in wanted]


def pages(
    fetcher: Fetcher, category: str, place: Place, until: str
) -> Iterator[tuple[Answer, Place | None]]:
    """Yield the papers of ``category`` submitted from ``place`` to ``until``, oldest first.

    Beside each answer stands where to read on, None after the last. Reading on goes by the time of
    submission rather than by number, so that papers which appear meanwhile shift nothing out of
    sight; the papers of the last minute are read twice for it.
    """
    here: Place | None = place
    while here is not None:
        asked, whole = _query(category, here, until), partial(_read_page, skip=here.skip)
        answer = fetcher.get(_address(), asked, whole)
        if here.skip + answer.count >= answer.total:
            there = None
        elif answer.last > here.since:
            there = Place(answer.last)
        else:
            there = Place(here.since, here.skip + answer.count)
        if there and there.skip >= _MOST:
            raise SourceError(f"arXiv lists more than {_MOST:,} papers at once")
        yield answer, there
        here = there


def _read_page(data: bytes, skip: int) -> Answer:
    """Read a page. The API sometimes sends none of the results that it counts: that is a fault."""
    answer = read(data)
    if not answer.count and answer.total > skip:
        raise Unreadable("it sent an empty page")
    return answer


def _query(category: str, place: Place, until: str) -> dict[str, str]:
    return {
        "search_query": f"cat:{category} AND submittedDate:[{place.since} TO {until}]",
        "sortBy": "submittedDate",
        "sortOrder": "ascending",
        "start": str(place.skip),
        "max_results": str(PAGE),
    }


def _entry(element: Element) -> Entry:
    comment = text(element, f"{_ARXIV}comment")
    identifier = line(text(element, f"{_ATOM}id"))
    if not identifier:
        raise ValueError("has no identifier")
    return Entry.of(
        "arxiv",
        title=text(element, f"{_ATOM}title"),
        date=text(element, f"{_ATOM}published"),
        authors=[text(author, f"{_ATOM}name") for author in element.findall(f"{_ATOM}author")],
        summary=withdrawn(text(element, f"{_ATOM}summary"), comment),
        arxiv=identifier,
        doi=readable_doi(text(element, f"{_ARXIV}doi")),
        categories=[c.get("term", "") for c in element.findall(f"{_ATOM}category")],
    )


def _minute(published: str) -> str:
    found = re.match(r"\s*(\d{4})-(\d\d)-(\d\d)T(\d\d):(\d\d)", published)
    return "".join(found.groups()) if found else ""


def _address() -> str:
    return address("PANTARHEI_ARXIV_API", "https://export.arxiv.org/api/query")
