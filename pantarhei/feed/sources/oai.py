"""arXiv's OAI-PMH interface: everything that changed on a day, in pages that a token leads to.

Protocol: OAI-PMH 2.0, with arXiv's own metadata format ``arXiv``. A day is that of a record's last
change, so that new versions of older papers come as well. One day is asked for at a time: a token
that has expired (arXiv's live for a day) then costs that day's pages and no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from xml.etree.ElementTree import Element

from pantarhei.feed.sources._xml import parse, text
from pantarhei.feed.sources.entry import Entry, line, newest, readable_doi, withdrawn
from pantarhei.feed.sources.fetch import Fetcher, SourceError, Unreadable, address

_OAI = "{http://www.openarchives.org/OAI/2.0/}"
_FORMAT = "{http://arxiv.org/OAI/arXiv/}"
_MAX_TOKEN = 4_096
# arXiv's groups of archives are archives of the same name, but for physics' many.
_GROUPS = ("cs", "econ", "eess", "math", "q-bio", "q-fin", "stat")


@dataclass(frozen=True)
class Answer:
    """One document: its papers, what was deleted, what could not be read, the token to go on."""

    entries: tuple[Entry, ...]
    deleted: tuple[str, ...]
    unreadable: tuple[str, ...]
    token: str | None


@dataclass(frozen=True)
class Place:
    """Where to read on: this day's records, from ``token`` on."""

    day: str
    token: str | None = None


class BadToken(Exception):
    """The server does not know the resumption token, or no longer."""


def set_of(category: str) -> str:
    """Return the set of a category or an archive.

    >>> set_of("cs.LG"), set_of("hep-th"), set_of("astro-ph.CO"), set_of("stat")
    ('cs:cs:LG', 'physics:hep-th', 'physics:astro-ph:CO', 'stat')
    """
    archive, _, subject = category.partition(".")
    group = archive if archive in _GROUPS else "physics"
    if not subject:
        return archive if archive in _GROUPS else f"{group}:{archive}"
    return f"{group}:{archive}:{subject}"


def read(data: bytes) -> Answer:
    """Read an answer; no records are an answer, too.

    Raises ``Unreadable`` for what is none, :class:`BadToken`, and ``SourceError`` for a refusal.
    """
    root = parse(data, f"{_OAI}OAI-PMH")
    for error in root.findall(f"{_OAI}error"):
        code = error.get("code", "")
        if code == "noRecordsMatch":
            return Answer((), (), (), None)
        if code == "badResumptionToken":
            raise BadToken
        said = line(f"{code} {error.text or ''}")[:200]
        raise SourceError(f"arXiv refuses: {said}")
    listed = root.find(f"{_OAI}ListRecords")
    if listed is None:
        raise Unreadable("it lists no records and says no reason")
    entries, deleted, unreadable = [], [], []
    for record in listed.findall(f"{_OAI}record"):
        identifier = line(text(record, f"{_OAI}header/{_OAI}identifier"))[-40:]
        header = record.find(f"{_OAI}header")
        if header is not None and header.get("status") == "deleted":
            deleted.append(identifier)
            continue
        try:
            entries.append(_entry(record))
        except ValueError as error:
            unreadable.append(f"{identifier or 'one'} {error}")
    token = text(listed, f"{_OAI}resumptionToken").strip()
    if len(token) > _MAX_TOKEN:
        raise Unreadable("its resumption token is too long")
    return Answer(tuple(newest(entries)), tuple(deleted), tuple(unreadable), token or None)


def pages(
    fetcher: Fetcher, category: str, place: Place, until: str
) -> Iterator[tuple[Answer, Place | None]]:
    """Yield what changed in ``category`` from ``place`` to the day ``until``.

    Beside each answer stands where to read on, None after the last.
    """
    here: Place | None = place
    seen: set[str] = set()  # the tokens of this day
    restarted = False
    there: Place | None
    while here is not None:
        try:
            answer = fetcher.get(_address(), _query(category, here), read)
        except BadToken:
            if here.token is None or restarted:
                raise SourceError("arXiv does not accept its own resumption token") from None
            here, seen, restarted = Place(here.day), set(), True
            continue
        if answer.token in seen:
            raise SourceError("arXiv's resumption tokens lead in circles")
        if answer.token:
            seen.add(answer.token)
            there = Place(here.day, answer.token)
        else:
            seen, restarted = set(), False
            there = _day_after(here.day, until)
        yield answer, there
        here = there


def _day_after(day: str, until: str) -> Place | None:
    after = (date.fromisoformat(day) + timedelta(days=1)).isoformat()
    return Place(after) if after <= until else None


def _query(category: str, place: Place) -> dict[str, str]:
    if place.token:  # exclusive: every other argument is the token's
        return {"verb": "ListRecords", "resumptionToken": place.token}
    return {
        "verb": "ListRecords",
        "metadataPrefix": "arXiv",
        "set": set_of(category),
        "from": place.day,
        "until": place.day,
    }


def _entry(record: Element) -> Entry:
    paper = record.find(f"{_OAI}metadata/{_FORMAT}arXiv")
    if paper is None:
        raise ValueError("has no metadata in arXiv's format")
    identifier = text(paper, f"{_FORMAT}id")
    if not identifier.strip():
        raise ValueError("has no identifier")
    names = paper.findall(f"{_FORMAT}authors/{_FORMAT}author")
    return Entry.of(
        "arxiv",
        title=text(paper, f"{_FORMAT}title"),
        date=text(paper, f"{_FORMAT}created"),
        authors=[_name(name) for name in names],
        summary=withdrawn(text(paper, f"{_FORMAT}abstract"), text(paper, f"{_FORMAT}comments")),
        arxiv=identifier,
        doi=readable_doi(text(paper, f"{_FORMAT}doi")),
        categories=text(paper, f"{_FORMAT}categories").split(),
    )


def _name(author: Element) -> str:
    parts = (text(author, f"{_FORMAT}{part}") for part in ("forenames", "keyname", "suffix"))
    return " ".join(filter(None, map(line, parts)))


def _address() -> str:
    return address("PANTARHEI_ARXIV_OAI", "https://oaipmh.arxiv.org/oai")
