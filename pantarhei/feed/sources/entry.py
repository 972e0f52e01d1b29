"""A paper as a source describes it, checked: what a store may be given."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal
from urllib.parse import urlsplit

MAX_TITLE, MAX_SUMMARY = 1_000, 20_000
MAX_AUTHORS, MAX_NAME, MAX_KEY = 10_000, 300, 120

# Control characters, lone surrogates, and the marks that make text read in another order than it
# is stored in: none belongs in a paper's description, and PostgreSQL keeps no NUL.
_UNWANTED: dict[int, str | None] = {
    **dict.fromkeys((*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000))),
    **dict.fromkeys((0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF)),
    **dict.fromkeys((0x09, 0x85), " "),
    **dict.fromkeys((0x0A, 0x2028, 0x2029), "\n"),
}
_MONTH = r"(?:0[1-9]|1[0-2])"
_ARXIV = re.compile(
    r"(?:arxiv:\s*|(?:https?://)?(?:www\.|export\.)?arxiv\.org/(?:abs|pdf|html)/)?"
    rf"(?P<id>\d\d{_MONTH}\.\d{{4,5}}|(?P<archive>[a-z]+(?:-[a-z]+)?)(?:\.[a-z-]{{2,12}})?/"
    rf"(?P<number>\d\d{_MONTH}\d{{3}}))(?:v(?P<version>[1-9]\d{{0,2}}))?(?:\.pdf)?",
    re.IGNORECASE | re.ASCII,
)
_CATEGORY = re.compile(r"[a-z]+(?:-[a-z]+)?(?:\.[A-Za-z]+(?:-[a-z]+)?)?", re.ASCII)
_WITHDRAWN = re.compile(
    r"\W*(?:th(?:e|is) (?:paper|article|submission|manuscript|work|version) )?"
    r"(?:has been |is |was )?withdrawn\b",
    re.IGNORECASE,
)
_DOI = re.compile(r"(?:doi:\s*|https?://(?:dx\.)?doi\.org/)?(10\.\d{4,9}/[^\s<>\"{}|\\^`]+)", re.I)


@dataclass(frozen=True)
class Entry:
    """A paper's description. ``date`` is ISO 8601, ``categories`` are separated by spaces.

    ``version`` is the version of an arXiv paper that was described; it is not stored.

    Made by :meth:`of`, which cleans every field.
    """

    key: str
    title: str
    summary: str
    date: str
    authors: tuple[str, ...]
    source: Literal["arxiv", "bibtex", "json"]
    arxiv: str | None = None
    doi: str | None = None
    code: str | None = None
    categories: str = ""
    version: int = 0

    @classmethod
    def of(
        cls,
        source: Literal["arxiv", "bibtex", "json"],
        *,
        title: str,
        date: str,
        authors: Iterable[str],
        key: str = "",
        summary: str = "",
        arxiv: str | None = None,
        doi: str | None = None,
        code: str | None = None,
        categories: Iterable[str] = (),
    ) -> Entry:
        r"""Check and clean a description.

        The key of a paper with an arXiv identifier is that identifier, its slash (in old ones) a
        hyphen; any other key is reduced to what may stand in an address.

        >>> paper = Entry.of("json", title=" A\n title ", date="2003-09-08", authors=["E. N."],
        ...                  arxiv="arXiv:math.GT/0309136v2")
        >>> paper.title, paper.arxiv, paper.version, paper.key
        ('A title', 'math/0309136', 2, 'math-0309136')

        Raises ``ValueError`` whose message continues "the entry ...", such as "has no title".
        """
        names = tuple(name for name in map(line, authors) if name)
        title, summary = line(title), paragraphs(summary)
        identifier, version = arxiv_identifier(arxiv) if arxiv and arxiv.strip() else (None, 0)
        kinds = [*dict.fromkeys(c for c in categories if _CATEGORY.fullmatch(c) and len(c) < 25)]
        key = (identifier or plain_key(key or title)).replace("/", "-")
        for is_wrong, fault in (
            (not title, "has no title"),
            (len(title) > MAX_TITLE, f"has a title of more than {MAX_TITLE} characters"),
            (not names, "has no authors"),
            (len(names) > MAX_AUTHORS, f"has more than {MAX_AUTHORS} authors"),
            (any(len(n) > MAX_NAME for n in names), f"has an author of over {MAX_NAME} characters"),
            (len(summary) > MAX_SUMMARY, f"has an abstract of over {MAX_SUMMARY} characters"),
            (not key, "has no key that could stand in an address"),
            (
                not identifier and _is_arxivs(key),
                f"has the key '{key}' and no arXiv identifier: such keys are for arXiv's papers",
            ),
        ):
            if is_wrong:
                raise ValueError(fault)
        return cls(
            key=key,
            title=title,
            summary=summary,
            date=iso_date(date),
            authors=names,
            source=source,
            arxiv=identifier,
            doi=_doi(doi) if doi and doi.strip() else None,
            code=web_address(code) if code and code.strip() else None,
            categories=" ".join(kinds[:20]),
            version=version,
        )

    def row(self) -> dict[str, Any]:
        """Return the paper as a row of the store: anybody's paper, listed, of no wing."""
        row = asdict(self)
        del row["version"]
        row |= {"authors": list(self.authors), "authors_count": len(self.authors)}
        return row | {"wing": None, "status": "listed"}


def newest(entries: Iterable[Entry]) -> list[Entry]:
    """Return each paper once, in order of first appearance: of several versions the highest."""
    kept: dict[str, Entry] = {}
    for entry in entries:
        if entry.key not in kept or entry.version >= kept[entry.key].version:
            kept[entry.key] = entry
    return list(kept.values())


def line(text: str) -> str:
    """Return ``text`` on one line, without control characters, in Unicode's composed form.

    >>> line("  Deep\\n  networks\\x00 ")
    'Deep networks'
    """
    return " ".join(_clean(text).split())


def paragraphs(text: str) -> str:
    """Return ``text`` with one line for each paragraph, an empty line between two.

    A line that begins with two spaces, as arXiv writes them, begins a paragraph.

    >>> paragraphs("  One,\\ntwo.\\n  Three.\\n\\nFour.")
    'One, two.\\n\\nThree.\\n\\nFour.'
    """
    parts = re.split(r"\n(?:[ \t]*\n|[ \t]{2})", _clean(text))
    return "\n\n".join(filter(None, (" ".join(part.split()) for part in parts)))


def _clean(text: str) -> str:
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n").translate(_UNWANTED))


def arxiv_identifier(text: str) -> tuple[str, int]:
    """Return an arXiv identifier as arXiv writes it, and the version asked for (0: none).

    ``arXiv:`` before it and addresses of arXiv are understood; an old identifier loses its
    subject class, as arXiv's own addresses do.

    >>> arxiv_identifier("https://arxiv.org/pdf/2006.16581v3.pdf")
    ('2006.16581', 3)
    >>> arxiv_identifier("math.GT/0309136")
    ('math/0309136', 0)

    Raises ``ValueError`` for anything else.
    """
    found = _ARXIV.fullmatch(text.strip())
    if found is None:
        shown = line(text)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise ValueError(f"has '{shown}', which is no arXiv identifier such as 2006.16581")
    archive, number = found["archive"], found["number"]
    identifier = f"{archive.lower()}/{number}" if archive else found["id"]
    return identifier, int(found["version"] or 0)


def _is_arxivs(key: str) -> bool:
    archive, _, number = key.rpartition("-")
    return any(map(_ARXIV.fullmatch, (key, f"{archive}/{number}")))


def plain_key(text: str) -> str:
    """Reduce ``text`` to what may stand in an address: ASCII letters, digits, ``.``, ``_``, ``-``.

    >>> plain_key("DBLP:conf/nips/Müller17")
    'DBLP-conf-nips-Muller17'
    """
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_text)[:MAX_KEY].strip("-._")


def iso_date(text: str) -> str:
    """Check an ISO 8601 date (a time after it is dropped); the year alone is its first day.

    >>> iso_date("2026-01-31T18:59:59Z"), iso_date("2020"), iso_date("2020-05")
    ('2026-01-31', '2020-01-01', '2020-05-01')

    Raises ``ValueError`` for what is no date, and for one before 1800 or after the next year: the
    page opens on the newest day.
    """
    text = text.strip()
    day = text[:10] if len(text) >= 10 else (text + "-01-01")[:10]
    try:
        found = date.fromisoformat(day) if re.match(r"\d{4}(-|$)", text) else None
    except ValueError:
        found = None
    if found is None:
        raise ValueError(f"has the date '{line(text)[:40]}', which is not like 2026-01-31")
    if not 1800 <= found.year <= date.today().year + 1:
        raise ValueError(f"has a date in the year {found.year}")
    return found.isoformat()


def web_address(text: str) -> str:
    """Return an http or https address; anything else (``javascript:``, a path) is refused."""
    text = line(text)
    try:
        parts = urlsplit(text)
        fine = parts.scheme.lower() in ("http", "https") and bool(parts.hostname)
    except ValueError:
        fine = False
    if not fine or " " in text or len(text) > 500 or any(c in text for c in "<>\"'`\\"):
        raise ValueError(f"has '{text[:60]}', which is no http or https address")
    return text


def withdrawn(summary: str, comment: str) -> str:
    """Return the abstract, a withdrawal that the comment tells of before it.

    >>> withdrawn("We prove P = NP.", "This paper has been withdrawn by the author")
    'This paper has been withdrawn by the author\\n\\nWe prove P = NP.'
    """
    return f"{line(comment)}\n\n{summary}" if _WITHDRAWN.match(comment) else summary


def readable_doi(text: str) -> str | None:
    """Return the first DOI in arXiv's field, which may hold several, or none at all."""
    first = text.split()[:1]
    return first[0] if first and _DOI.fullmatch(first[0]) else None


def _doi(text: str) -> str:
    found = _DOI.fullmatch(line(text))
    if found is None or len(found[1]) > 200:
        raise ValueError(f"has '{line(text)[:60]}', which is no DOI such as 10.1000/182")
    return found[1].lower()  # a DOI is the same in either case
