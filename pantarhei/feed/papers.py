"""Papers in the store: put in, found, listed, and what was measured of them."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import Any, Literal

import sqlalchemy as sa

from pantarhei.claims import SCALES
from pantarhei.errors import RequestError, nearest
from pantarhei.feed import schema, trends
from pantarhei.feed.store import clean, lock
from pantarhei.papers import WINGS

STATUSES = ("runs", "planned", "listed")
SOURCES = ("catalogue", "arxiv", "bibtex", "json")
ORDERS = ("date", "heat")
MOST = 1000  # papers in one listing
_LIMITS = {"title": 1000, "summary": 20_000, "key": 200, "categories": 500, "code": 500, "doi": 300}
_AUTHORS = 10_000
_ARXIV = re.compile(r"[0-9]{4}\.[0-9]{4,5}|[a-z-]+(\.[A-Z]{2})?/[0-9]{7}")

_papers = schema.papers


@dataclass(frozen=True, slots=True)
class Paper:
    """One row of the papers table; see :mod:`pantarhei.feed.schema` for each column."""

    id: int
    key: str
    title: str
    summary: str
    date: str
    authors: tuple[str, ...]
    authors_count: int
    arxiv: str | None
    doi: str | None
    code: str | None
    categories: str
    wing: str | None
    source: str
    status: str
    added: float
    changed: float
    votes: int
    comments: int
    held: int
    measured: int
    heat: float

    @property
    def badge(self) -> Literal["held", "not-held", "runs", "planned", "listed"]:
        """What is known at one glance: ``held`` where every newest claim holds, ``not-held`` where
        one does not, else whether the paper runs, is planned, or is only listed.
        """  # noqa: D205
        if self.measured:
            return "held" if self.held == self.measured else "not-held"
        return self.status  # type: ignore[return-value]


_EVERYTHING = sa.select(*(_papers.c[field.name] for field in fields(Paper)))
# made once: every search ends with it
_BY_ID = _EVERYTHING.where(_papers.c.id.in_(sa.bindparam("ids", expanding=True)))


@dataclass(frozen=True)
class Added:
    """What :func:`add` did with the rows it was given."""

    new: int
    changed: int
    same: int


@dataclass(frozen=True)
class Page:
    """Some papers of a listing; ``next`` asks for those after them, None where there are none."""

    papers: tuple[Paper, ...]
    next: str | None


@dataclass(frozen=True)
class Day:
    """The papers of a day, hottest first, ``total`` of them; the nearest days that have any."""

    date: str
    papers: tuple[Paper, ...]
    total: int
    previous: str | None
    next: str | None


@dataclass(frozen=True)
class Measured:
    """A run (a row of the runs table) and those of its claims (rows) that are the newest."""

    run: sa.Row[Any]
    claims: tuple[sa.Row[Any], ...]


def add(c: sa.Connection, rows: Iterable[Mapping[str, Any]], *, now: float | None = None) -> Added:
    """Put papers in, or bring those that are there up to date; any number, in bulk.

    A row needs ``title``, ``date`` (ISO 8601), ``source`` and ``key`` or ``arxiv``; it may have
    ``summary``, ``authors`` (names), ``authors_count``, ``doi``, ``code``, ``categories`` (text or
    a list) and ``wing``, and a card ``status``. It is the paper that has the same arXiv identifier
    (the version does not matter), else the same key. What a row leaves empty is kept. Where both
    say something, the better source is believed: our catalogue's cards before arXiv before others,
    and of equals the later; so a card's own words stay. Votes and all else are kept.

    A key given by a card or arXiv moves on to the paper; characters that do not belong in an
    address become dashes. Of several rows about one paper each counts as one.

    Raises :class:`RequestError` naming the row that cannot be taken.
    """
    lock(c, "papers")  # two that add the same paper at once would not see each other's
    # Taken once the turn has come: what a digest covered before is older, and what it left is not.
    now = time.time() if now is None else now
    counts = {"new": 0, "changed": 0, "same": 0}
    prepared = (_normal(row) for row in rows)
    while chunk := list(islice(prepared, 1000)):
        _add(c, chunk, now, counts)
    return Added(**counts)


def get(c: sa.Connection, key: str) -> Paper | None:
    """Return the paper with a key or, as links from before a card existed have it, an arXiv
    identifier, with or without its version.
    """  # noqa: D205
    key = clean(key)
    names = (_papers.c.key == key, _papers.c.arxiv == _without_version(key))
    for condition in names:
        if row := c.execute(_EVERYTHING.where(condition)).first():
            return _paper(row)
    return None


def by_id(c: sa.Connection, ids: Sequence[int]) -> list[Paper]:
    """Return papers in the order of ``ids``; one that is not there is left out."""
    rows = c.execute(_BY_ID, {"ids": list(ids)})
    found = {row.id: _paper(row) for row in rows}
    return [found[id] for id in ids if id in found]


def day(
    c: sa.Connection,
    date: str | None = None,
    *,
    wing: str | None = None,
    status: str | None = None,
    limit: int = 50,
) -> Day:
    """Return the papers published on a day; None is the newest that has any and is not to come.

    A day without papers is empty and still has neighbours. An empty store's newest day is today.
    """
    conditions = conditions_of(wing=wing, status=status)
    column = _papers.c.date
    if date is None:
        # tomorrow, seen from here, may be today where the paper appeared
        today = datetime.now(UTC).date()
        latest = (today + timedelta(days=1)).isoformat()
        date = c.scalar(sa.select(sa.func.max(column)).where(column <= latest, *conditions))
        date = date or today.isoformat()
    _check_date(date)
    those = _EVERYTHING.where(column == date, *conditions)
    rows = c.execute(those.order_by(_papers.c.heat.desc(), _papers.c.id.desc()).limit(limit)).all()
    count = sa.select(sa.func.count()).select_from(_papers).where(column == date, *conditions)
    return Day(
        date,
        tuple(map(_paper, rows)),
        len(rows) if len(rows) < limit else c.execute(count).scalar_one(),
        c.scalar(sa.select(sa.func.max(column)).where(column < date, *conditions)),
        c.scalar(sa.select(sa.func.min(column)).where(column > date, *conditions)),
    )


def listing(
    c: sa.Connection,
    order: str = "date",
    *,
    wing: str | None = None,
    status: str | None = None,
    tag: str | None = None,
    since: str | None = None,
    until: str | None = None,
    after: str | None = None,
    limit: int = 50,
) -> Page:
    """List papers, newest (``date``) or hottest (``heat``) first.

    ``since`` and ``until`` are days, both included; ``after`` is the ``next`` of the page before:
    no paper is listed twice or left out, whatever was added meanwhile.
    """
    if order not in ORDERS:
        raise RequestError(f"Unknown order '{order}': choose date or heat.{nearest(order, ORDERS)}")
    if not 1 <= limit <= MOST:
        raise RequestError(f"{limit} papers cannot be listed at once: choose 1 to {MOST}.")
    column = _papers.c[order]
    conditions = conditions_of(wing=wing, status=status, tag=tag, since=since, until=until)
    if after is not None:
        place = sa.tuple_(*map(sa.literal, unfold(order, after)))
        conditions.append(sa.tuple_(column, _papers.c.id) < place)
    statement = _EVERYTHING.where(*conditions)
    statement = statement.order_by(column.desc(), _papers.c.id.desc()).limit(limit + 1)
    found = [_paper(row) for row in c.execute(statement)]
    shown = tuple(found[:limit])
    more = len(found) > limit
    return Page(shown, fold(getattr(shown[-1], order), shown[-1].id) if more else None)


def results(c: sa.Connection, paper: int) -> list[Measured]:
    """Return what was measured of a paper: the newest result of each claim at each scale.

    By scale (quick, cpu, gpu), the newest run first; a run has its claims in the recipe's order.
    """
    runs, claims = schema.runs, schema.claims
    newest = runs.c.date.desc(), runs.c.uid
    found = c.execute(sa.select(runs).where(runs.c.paper == paper).order_by(*newest)).all()
    those: dict[str, list[sa.Row[Any]]] = {run.uid: [] for run in found}
    statement = sa.select(claims).where(claims.c.run.in_(those)).order_by(claims.c.position)
    for claim in c.execute(statement):
        those[claim.run].append(claim)
    rank: dict[str, int] = {scale: place for place, scale in enumerate(SCALES)}
    found = sorted(found, key=lambda run: rank.get(run.scale, len(rank)))
    return [Measured(run, tuple(those[run.uid])) for run in found]


def compare(c: sa.Connection, keys: Sequence[str]) -> list[tuple[Paper, list[Measured]]]:
    """Return several papers, each beside what was measured of it, in the order of ``keys``.

    Raises :class:`RequestError` for an unknown key and for more than ten.
    """
    keys = list(dict.fromkeys(keys))
    if len(keys) > 10:
        raise RequestError(f"{len(keys)} papers are too many to compare: choose up to ten.")
    found: dict[int, tuple[Paper, list[Measured]]] = {}
    for key in keys:
        paper = get(c, key)
        if paper is None:
            raise RequestError(f"Unknown paper '{clean(key)[:100]}': search for its title.")
        found.setdefault(paper.id, (paper, results(c, paper.id)))
    return list(found.values())


def _paper(row: Sequence[Any]) -> Paper:
    paper = Paper(*row)
    object.__setattr__(paper, "authors", tuple(paper.authors))
    return paper


def conditions_of(
    *,
    wing: str | None = None,
    status: str | None = None,
    tag: str | None = None,
    since: str | None = None,
    until: str | None = None,
) -> list[sa.ColumnElement[bool]]:
    """Return what a paper's row must fulfil to pass; what is wrong raises RequestError."""
    conditions: list[sa.ColumnElement[bool]] = []
    for name, value, known in (("wing", wing, WINGS), ("status", status, STATUSES)):
        if value is None:
            continue
        if value not in known:
            raise RequestError(
                f"Unknown {name} '{clean(value)[:100]}': choose {', '.join(known)}."
                f"{nearest(value[:100], known)}"
            )
        conditions.append(_papers.c[name] == value)
    if tag is not None:
        tags = schema.tags
        tagged = sa.select(tags.c.paper).where(tags.c.tag == clean(tag))
        conditions.append(_papers.c.id.in_(tagged))
    if since is not None:
        conditions.append(_papers.c.date >= _check_date(since))
    if until is not None:
        conditions.append(_papers.c.date <= _check_date(until))
    return conditions


def _check_date(text: str) -> str:
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            raise ValueError
        date.fromisoformat(text)
    except ValueError:
        raise RequestError(
            f"'{clean(text)[:100]}' is not a date: write it as 2026-01-31."
        ) from None
    return text


def fold(value: str | float, id: int) -> str:
    """Return the cursor of a place in a list that is ordered by a value, then an identifier."""
    return base64.urlsafe_b64encode(json.dumps([value, id]).encode()).decode().rstrip("=")


def unfold(order: str, cursor: str) -> tuple[str | float, int]:
    """Return the place that a cursor names; ``order`` is ``date``, or else a number's."""
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4))
        value, id = json.loads(text)
        kind = str if order == "date" else float
        if type(value) is not kind or type(id) is not int or not 0 <= id < 2**31:
            raise ValueError
        if isinstance(value, str):
            _check_date(value)
    except (binascii.Error, ValueError, TypeError, RecursionError):
        raise RequestError("There is no such place in this list: begin at its start.") from None
    return value, id


# --- putting papers in -----------------------------------------------------------------------


_RANK = {"catalogue": 2, "arxiv": 1}
_FACTS = [
    "title",
    "summary",
    "date",
    "authors",
    "authors_count",
    "doi",
    "code",
    "categories",
    "wing",
]  # what a better source overrules and any source fills in


def _add(c: sa.Connection, rows: list[dict[str, Any]], now: float, counts: dict[str, int]) -> None:
    """Add one chunk of prepared rows."""
    known = _known(c, rows)
    new: list[dict[str, Any]] = []
    changed: dict[int, dict[str, Any]] = {}
    redated: set[int] = set()
    for row in rows:
        old = _counterpart(c, known, row)
        if old is None:
            event = trends.published(row["date"], now)
            row |= {"added": now, "changed": now, "heat": trends.heat([event])}
            new.append(row)
            known.keep(row)
            counts["new"] += 1
            continue
        different = _differences(old, row)
        counts["changed" if different else "same"] += 1
        if not different:
            continue
        old |= different
        known.keep(old)
        if "id" in old:  # else it is among the new ones
            changed[old["id"]] = old
            if "date" in different:
                redated.add(old["id"])
        elif "date" in different:
            old["heat"] = trends.heat([trends.published(old["date"], now)])
    if new:
        c.execute(sa.insert(_papers), new)
    if changed:
        names = (*_FACTS, "arxiv", "key", "source", "status")
        values: dict[str, Any] = {name: sa.bindparam(f"_{name}") for name in names}
        statement = (
            sa.update(_papers)
            .where(_papers.c.id == sa.bindparam("_id"))
            .values(values | {"changed": now})
        )
        those = [{f"_{n}": row[n] for n in (*names, "id")} for row in changed.values()]
        c.execute(statement, those)
    trends.keep_in_step(c, redated)


class _Known:
    """Papers of the store and of the chunk before it is written, by what identifies them."""

    def __init__(self) -> None:
        self.by_arxiv: dict[str, dict[str, Any]] = {}
        self.by_key: dict[str, dict[str, Any]] = {}

    def keep(self, row: dict[str, Any]) -> None:
        self.by_key[row["key"]] = row
        if row["arxiv"] is not None:
            self.by_arxiv[row["arxiv"]] = row


def _known(c: sa.Connection, rows: list[dict[str, Any]]) -> _Known:
    known = _Known()
    identifiers = [row["arxiv"] for row in rows if row["arxiv"] is not None]
    # the key a paper would fall back to as well
    keys = {row["key"] for row in rows} | {_key(arxiv) for arxiv in identifiers}
    names = ("id", "key", "arxiv", "source", "status", *_FACTS)
    columns = [_papers.c[name] for name in names]
    for column, values in ((_papers.c.key, keys), (_papers.c.arxiv, identifiers)):
        for found in c.execute(sa.select(*columns).where(column.in_(values))):
            if found.key not in known.by_key:
                known.keep(dict(zip(names, found, strict=True)))
    return known


def _counterpart(c: sa.Connection, known: _Known, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the paper that a row is about; where its key is another paper's, settle whose."""
    same = known.by_arxiv.get(row["arxiv"]) if row["arxiv"] else None
    namesake = known.by_key.get(row["key"])
    if namesake is None or namesake is same:
        return same
    other = bool(row["arxiv"] and namesake["arxiv"])
    if same is None and not other:
        return namesake
    if row["source"] == "catalogue":  # a card's slug is its own: the other one makes way
        namesake["key"] = _key(f"{row['key']}-{namesake['arxiv'] or namesake.get('id', 'listed')}")
        known.keep(namesake)
        del known.by_key[row["key"]]
        if "id" in namesake:
            moved = sa.update(_papers).where(_papers.c.id == namesake["id"])
            c.execute(moved.values(key=namesake["key"]))
        return same
    if same is None:
        row["key"] = _key(row["arxiv"])
        return known.by_key.get(row["key"])
    return same


def _differences(old: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the paper ``old`` learns from ``row``."""
    better = _RANK.get(row["source"], 0) >= _RANK.get(old["source"], 0)
    learnt = {name: row[name] for name in _FACTS if row[name] and (better or not old[name])}
    if better:
        learnt["source"] = row["source"]
        if row["source"] == "catalogue":
            learnt |= {"key": row["key"], "status": row["status"]}
    if row["arxiv"] and not old["arxiv"]:
        learnt["arxiv"] = row["arxiv"]
    return {name: value for name, value in learnt.items() if value != old[name]}


def _normal(row: Mapping[str, Any]) -> dict[str, Any]:
    """Check a row and return it with every column that a source may set."""
    try:
        return _checked(row)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        name = str(row.get("key") or row.get("arxiv") or row.get("title") or "without a name")
        reason = error if isinstance(error, RequestError) else "a field is not of its kind."
        raise RequestError(f"Paper '{clean(name)[:100]}' cannot be added: {reason}") from None


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    text = {
        name: " ".join(clean(row.get(name) or "").split())
        for name in ("title", "key", "code", "doi", "wing", "status")
    }
    text["summary"] = clean(row.get("summary") or "").strip()
    categories = row.get("categories") or ""
    words = categories.split() if isinstance(categories, str) else categories
    text["categories"] = " ".join(clean(word) for word in words)
    for name, most in _LIMITS.items():
        if len(text[name]) > most:
            raise RequestError(f"its {name} is longer than {most} characters.")
    if not text["title"]:
        raise RequestError("it has no title.")
    if text["code"] and not re.match(r"https?://[^\s/]+", text["code"]):
        raise RequestError("the address of its code does not begin with https://.")
    if text["wing"] and text["wing"] not in WINGS:
        raise RequestError(f"its wing is none of {', '.join(WINGS)}.")
    if row["source"] not in SOURCES:
        raise RequestError(f"its source is none of {', '.join(SOURCES)}.")
    card = row["source"] == "catalogue"
    if (text["status"] or "listed") not in (STATUSES[:2] if card else STATUSES[2:]):
        raise RequestError("only cards of the catalogue run or are planned.")
    arxiv = _arxiv(row.get("arxiv") or "")
    if _ARXIV.fullmatch(_without_version(text["key"])):  # such a key is that paper's alone
        arxiv = arxiv or _without_version(text["key"])
        text["key"] = arxiv
    authors = [" ".join(clean(name).split())[:300] for name in row.get("authors") or ()]
    count = int(row.get("authors_count") or len(authors))
    if not len(authors) <= _AUTHORS >= count >= 0:
        raise RequestError(f"it has more than {_AUTHORS} authors.")
    return {
        "key": _key(text["key"] or arxiv or ""),
        "title": text["title"],
        "summary": text["summary"],
        "date": _check_date(str(row["date"])),
        "authors": authors,
        "authors_count": count,
        "arxiv": arxiv,
        "doi": _doi(text["doi"]),
        "code": text["code"] or None,
        "categories": text["categories"],
        "wing": text["wing"] or None,
        "source": row["source"],
        "status": text["status"] or "listed",
    }


def _key(text: str) -> str:
    key = re.sub(r"[^\w.:+-]+", "-", text).strip(".-")
    if not key:
        raise RequestError("it has neither a key nor an arXiv identifier.")
    return key


def _arxiv(text: str) -> str | None:
    identifier = _without_version(clean(text).strip().removeprefix("arXiv:"))
    if not identifier:
        return None
    if not _ARXIV.fullmatch(identifier):
        raise RequestError("its arXiv identifier is not one, such as 2006.16581.")
    return identifier


def _without_version(identifier: str) -> str:
    return re.sub(r"v[0-9]+$", "", identifier)


def _doi(text: str) -> str | None:
    """Return the first DOI of a field; arXiv's has sometimes several, or none."""
    found = re.search(r"\b10\.[0-9]{4,9}/[^\s,;]+", text)
    return found.group() if found else None
