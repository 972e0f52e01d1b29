"""A store that grows: papers added by hand, and what is new at arXiv.

Both change the store in transactions of their own: one for everything that ``add`` was given, one
for each page that ``update`` reads. A page's papers and the place to read on are written together,
so that an update which was interrupted, even by ``kill -9``, goes on where it stopped; a page that
is read again changes nothing.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pantarhei.claims import ledger_path
from pantarhei.errors import RequestError
from pantarhei.feed import papers, schema
from pantarhei.feed.sources import arxiv, bibtex, oai, records
from pantarhei.feed.sources.entry import Entry, arxiv_identifier, newest
from pantarhei.feed.sources.fetch import Fetcher, SourceError
from pantarhei.feed.store import Store, fact, keep_facts
from pantarhei.progress import progress

MAX_FILE = 16 * 2**20  # bytes
MAX_DAYS = 3_650
_CATEGORY = re.compile(r"[a-z]+(-[a-z]+)?(\.[A-Za-z]+(-[a-z]+)?)?", re.ASCII)
# Days that an update without --days reads again. Papers that moderators held back appear in the
# API under the day they were submitted; OAI-PMH gives them the day they appeared.
_AGAIN = {"api": 7, "oai": 2}


def lock_path() -> Path:
    """Return the file by which this user's processes take turns in asking arXiv."""
    return ledger_path().with_name("arxiv.lock")


def add(
    store: Store, arguments: Sequence[str], connect: Callable[[], AbstractContextManager[Fetcher]]
) -> papers.Added:
    """Add the papers that ``arguments`` name: arXiv identifiers, BibTeX and JSON files, ``-``.

    ``connect`` opens a :class:`Fetcher`, where arXiv is to be asked at all. Everything is read
    before anything is written. Raises :class:`RequestError` for the first thing that is not as it
    should be: nothing is added then.
    """
    identifiers, entries = [], []
    for argument in arguments:
        if _is_identifier(argument):
            identifiers.append(argument)
        else:
            asked, found = _read(argument)
            identifiers += asked
            entries += found
    _check_keys(entries)
    try:
        if identifiers:
            with connect() as fetcher:
                entries += arxiv.by_identifier(fetcher, identifiers)
    except SourceError as error:
        raise RequestError(f"{error}; nothing was changed.") from error
    entries = newest(entries)
    with store.write() as c:
        _check_namesakes(c, entries)
        return papers.add(c, [entry.row() for entry in entries])


def _is_identifier(text: str) -> bool:
    try:
        arxiv_identifier(text)
    except ValueError:
        return False
    return True


def _read(argument: str) -> tuple[list[str], list[Entry]]:
    """Read a file, or standard input; return the arXiv identifiers and the papers in it."""
    suffix = Path(argument).suffix.lower()
    if argument != "-" and suffix not in (".bib", ".bibtex", ".json"):
        raise RequestError(
            f"'{argument}' is neither an arXiv identifier such as 2006.16581 nor a .bib or .json "
            "file."
        )
    name = "standard input" if argument == "-" else argument
    try:
        if argument == "-":
            content = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with Path(argument).open("rb") as file:
                content = file.read(MAX_FILE + 1)
        if len(content) > MAX_FILE:
            raise RequestError(f"'{name}' is larger than {MAX_FILE // 2**20} MiB: divide it.")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"'{name}' cannot be read ({error.strerror}): check it.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"'{name}' is not UTF-8 text: convert it.") from error
    if suffix == ".json" or (argument == "-" and text.lstrip()[:1] in ("[", "{")):
        return [], records.read(text, name)
    words = text.split()
    if argument == "-" and words and all(map(_is_identifier, words)):
        return words, []
    return [], bibtex.read(text, name)


def _check_keys(entries: Sequence[Entry]) -> None:
    """Refuse two papers of one key: which of them would the key mean?"""
    seen: dict[str, Entry] = {}
    for entry in entries:
        other = seen.setdefault(entry.key, entry)
        if not entry.arxiv and not _alike(other.title, entry.title):
            raise RequestError(
                f"Two papers have the key '{entry.key}', '{other.title[:60]}' and "
                f"'{entry.title[:60]}': rename one; nothing was added."
            )


def _check_namesakes(c: sa.Connection, entries: Sequence[Entry]) -> None:
    """Refuse a paper whose key is that of another paper in the store."""
    columns = (schema.papers.c.key, schema.papers.c.title)
    asked = {entry.key: entry for entry in entries if not entry.arxiv}
    for key, title in c.execute(sa.select(*columns).where(schema.papers.c.key.in_(asked))):
        if not _alike(title, asked[key].title):
            raise RequestError(
                f"The key '{key}' belongs to '{title[:80]}' already: rename "
                f"'{asked[key].title[:80]}'; nothing was added."
            )


def _alike(one: str, other: str) -> bool:
    """Tell whether two titles are one's, but for a correction."""
    one, other = (re.sub(r"\W+", " ", text.casefold()).strip() for text in (one, other))
    return one == other or difflib.SequenceMatcher(None, one, other, autojunk=False).ratio() > 0.8


@dataclass
class Updated:
    """What an update did.

    ``since`` is the day from which it read, ``resumed`` whether on from an earlier update;
    ``unreadable`` names records that were left out, and why.
    """

    category: str
    source: str
    since: str
    resumed: bool
    new: int = 0
    changed: int = 0
    same: int = 0
    deleted: int = 0
    pages: int = 0
    unreadable: tuple[str, ...] = ()

    def left_out(self) -> list[str]:
        """Say what was not taken, and why, in lines for the user."""
        lines = [f"Left out: {reason}." for reason in self.unreadable[:5]]
        if len(self.unreadable) > 5:
            lines.append(f"Left out: {len(self.unreadable) - 5} more that cannot be read.")
        if self.deleted:
            lines.append(f"{self.deleted} deleted at arXiv; the store keeps those it has.")
        return lines

    def __str__(self) -> str:
        how = "on from" if self.resumed else "from"
        return (
            f"{self.category} ({self.source}), {how} {self.since}: {self.new} new, "
            f"{self.changed} changed, {self.same} known already."
        )


def update(
    store: Store,
    fetcher: Fetcher,
    category: str,
    *,
    days: int | None = None,
    source: str = "api",
    now: datetime | None = None,
    quiet: bool = False,
) -> Updated:
    """Read what is new in ``category`` into the store: the last ``days`` days and today.

    Without ``days`` it reads on from where the last update ended, or the last week. An update that
    was interrupted is finished first, whatever its days were.

    Raises :class:`RequestError` where arXiv cannot be read to the end; what was read is kept.
    """
    now = now or datetime.now(UTC)
    check_request(category, days, source)
    name = f"update/{source}/{category}"
    with store.read() as c:
        before = json.loads(fact(c, name) or "{}")
    begun, place = _begin(before, source, now, days)
    done = Updated(category, source, _day(place), resumed=place == _unfinished(before, source))
    end, today = date.fromisoformat(_day(place)), now.date()
    try:
        with progress((today - end).days + 1, f"{category} ({source})", quiet=quiet) as bar:
            for answer, there in _pages(fetcher, category, place, now):
                state: dict[str, Any] = {"begun": begun, "until": today.isoformat()}
                state |= {"place": asdict(there)} if there else {"done": today.isoformat()}
                with store.write() as c:
                    added = papers.add(c, [entry.row() for entry in answer.entries])
                    keep_facts(c, {name: json.dumps(state)})
                _count(done, added, answer)
                reached = date.fromisoformat(_day(there)) if there else today + timedelta(days=1)
                bar.advance(max(0, (reached - end).days), note=f"{done.new} new papers")
                end = max(end, reached)
    except SourceError as error:
        kept = "what was read so far is kept, and the same command goes on from there"
        raise RequestError(f"{error}; {kept if done.pages else 'nothing was changed'}.") from error
    return done


def check_request(category: str, days: int | None, source: str) -> None:
    """Refuse, with a sentence, an update that cannot be made."""
    if not _CATEGORY.fullmatch(category) or len(category) > 40:
        raise RequestError(f"'{category[:60]}' is no category of arXiv such as cs.LG or hep-th.")
    if days is not None and not 1 <= days <= MAX_DAYS:
        raise RequestError(f"--days is a number from 1 to {MAX_DAYS}, not {days}.")
    if source not in _AGAIN:
        raise RequestError(f"Unknown source '{source}': choose api or oai.")


def _begin(
    before: Mapping[str, Any], source: str, now: datetime, days: int | None
) -> tuple[str, arxiv.Place | oai.Place]:
    """Return the day from which everything will have been read, and the place to begin at."""
    if days is None and before.get("done"):
        wanted = date.fromisoformat(before["done"]) - timedelta(days=_AGAIN[source])
    else:
        wanted = now.date() - timedelta(days=days or 7)
    unfinished = _unfinished(before, source)
    if unfinished and (days is None or before["begun"] <= wanted.isoformat()):
        return before["begun"], unfinished
    day = min(wanted, now.date()).isoformat()
    return day, arxiv.Place(day.replace("-", "") + "0000") if source == "api" else oai.Place(day)


def _unfinished(before: Mapping[str, Any], source: str) -> arxiv.Place | oai.Place | None:
    """Return where an earlier update stopped."""
    if "place" not in before:
        return None
    if source == "api":
        return arxiv.Place(**before["place"])
    place = oai.Place(**before["place"])
    # The list that a token leads through was made before that day had ended.
    return replace(place, token=None) if place.day >= before["until"] else place


def _pages(
    fetcher: Fetcher, category: str, place: arxiv.Place | oai.Place, now: datetime
) -> Iterator[tuple[arxiv.Answer, arxiv.Place | None] | tuple[oai.Answer, oai.Place | None]]:
    if isinstance(place, oai.Place):
        return oai.pages(fetcher, category, place, now.date().isoformat())
    return arxiv.pages(fetcher, category, place, now.strftime("%Y%m%d%H%M"))


def _day(place: arxiv.Place | oai.Place) -> str:
    if isinstance(place, oai.Place):
        return place.day
    return f"{place.since[:4]}-{place.since[4:6]}-{place.since[6:8]}"


def _count(done: Updated, added: papers.Added, answer: arxiv.Answer | oai.Answer) -> None:
    done.new += added.new
    done.changed += added.changed
    done.same += added.same
    done.pages += 1
    done.unreadable += answer.unreadable
    done.deleted += len(answer.deleted) if isinstance(answer, oai.Answer) else 0
