"""How the page says things: dates, figures, verdicts, addresses. Filters of the templates."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any
from urllib.parse import quote, urlencode

from markupsafe import Markup, escape

from pantarhei.feed.papers import Paper
from pantarhei.report import number

SCALES = {
    "quick": "A first look (scale quick)",
    "cpu": "Evidence (scale cpu)",
    "gpu": "Near the paper's own setting (scale gpu)",
}


@functools.lru_cache(4096)  # a list asks for the same few again and again
def day(text: str) -> str:
    """Write an ISO 8601 date as people do.

    >>> day("2026-01-31"), day("2026-01-31T10:00:00Z")
    ('31 January 2026', '31 January 2026')
    """
    when = date.fromisoformat(text[:10])
    return f"{when.day} {when:%B} {when.year}"


def moment(seconds: float) -> str:
    """Write seconds since 1970 as RFC 3339 does.

    >>> moment(0.0)
    '1970-01-01T00:00:00Z'
    """
    from datetime import UTC

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def plural(count: int, noun: str, many: str = "") -> str:
    """Count something.

    >>> plural(1, "vote"), plural(0, "vote"), plural(1200, "vote")
    ('1 vote', '0 votes', '1,200 votes')
    """
    return f"{count:,} {noun if count == 1 else many or noun + 's'}"


def figure(value: float | None) -> str:
    """Write a measured number to five significant digits.

    >>> figure(0.123456), figure(None), figure(-2.0)
    ('0.12346', 'not finite', '−2')
    """
    if value is None or not math.isfinite(value):
        return "not finite"
    return number(value).replace("-", "−").replace("e−0", "e−").replace("e+0", "e+")


def bound(claim: Any) -> str:
    """Write what a claim promises: ``≤ 0.75``; nothing where it is not made at this scale."""
    if claim.bound is None or not math.isfinite(claim.bound):
        return "no bound at this scale"
    return f"{'≤' if claim.direction == '<=' else '≥'} {figure(claim.bound)}"


def badge(paper: Paper) -> str:
    """Say in words what is known of a paper at one glance.

    >>> from types import SimpleNamespace as P
    >>> badge(P(badge="not-held", held=17, measured=18))
    '17 claims held, 1 did not'
    """
    held, measured = paper.held, paper.measured
    if paper.badge == "held":
        return "Its claim held" if measured == 1 else f"All {measured} claims held"
    if paper.badge == "not-held":
        if held:
            return f"{plural(held, 'claim')} held, {measured - held} did not"
        return "Its claim did not hold" if measured == 1 else f"None of {measured} claims held"
    return {"runs": "Runs, not measured yet", "planned": "Planned"}.get(paper.badge, "Listed")


def by(paper: Paper, most: int = 3) -> str:
    """Name the authors, or say how many they are.

    >>> from types import SimpleNamespace as P
    >>> by(P(authors=("A. One", "B. Two", "C. Three"), authors_count=3), most=2)
    'A. One, B. Two and 1 other'
    >>> by(P(authors=(), authors_count=4))
    '4 authors'
    """
    if not paper.authors:
        return plural(paper.authors_count, "author") if paper.authors_count else "authors unknown"
    named = paper.authors[:most]
    more = max(len(paper.authors), paper.authors_count) - len(named)
    if more:
        return f"{', '.join(named)} and {plural(more, 'other')}"
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def gist(text: str, most: int = 260) -> str:
    """Return the beginning of a summary, whole words.

    >>> gist("one two three", 9)
    'one two …'
    """
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    return text[:most].rpartition(" ")[0].rstrip(",;:.") + " …"


def machine(facts: Mapping[str, Any]) -> str:
    """Name the machine of a run: processor, cores and, where there is one, the accelerator."""
    name = f"{facts.get('cpu', 'unknown processor')}, {plural(int(facts.get('cores', 1)), 'core')}"
    device = str(facts.get("device", "cpu"))
    return name if device == "cpu" else f"{name}, {device}"


def commit(name: str | None) -> str:
    """Shorten a commit; an installed copy has none.

    >>> commit("66f3cfb564e88c9e0de85ad90ddbb060f3cb4cc8-modified"), commit(None)
    ('66f3cfb564e8, modified', 'an installed copy')
    """
    if not name:
        return "an installed copy"
    head, _, modified = name.partition("-")
    return head[:12] + (", modified" if modified else "")


def took(seconds: float) -> str:
    """Say how long something took.

    >>> took(3.2), took(71.4), took(3007.2), took(9000)
    ('3 s', '71 s', '50 min', '2 h 30 min')
    """
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def address(path: str, **query: Any) -> str:
    """Return a path with what of ``query`` says something, always in the same order.

    >>> address("/papers", wing="compute", tag=None, after="")
    '/papers?wing=compute'
    """
    given = {name: value for name, value in query.items() if value not in (None, "", ())}
    return f"{path}?{urlencode(given, doseq=True)}" if given else path


def paper_path(paper: Paper, rest: str = "") -> str:
    """Return where a paper's page is; keys come from outside and may hold anything."""
    return f"/paper/{quote(paper.key, safe='')}{rest}"


def code_name(url: str) -> str:
    """Shorten the address of a repository for reading.

    >>> code_name("https://github.com/a/b/")
    'github.com/a/b'
    """
    return url.partition("://")[2].rstrip("/") or url


def coded(text: str) -> Markup:
    """Show what stands in backticks as code.

    >>> coded("List `date` & more")
    Markup('List <code>date</code> &amp; more')
    """
    parts = [escape(part) for part in text.split("`")]
    shown = (Markup("<code>{}</code>").format(p) if n % 2 else p for n, p in enumerate(parts))
    return Markup("").join(shown)


def listing_words(filters: Mapping[str, str | None]) -> str:
    """Say which papers a listing holds, for its title.

    >>> listing_words({"wing": "compute", "status": "runs", "since": "2020-01-01"})
    'of the wing compute, that run, since 1 January 2020'
    """
    says: Sequence[tuple[str, Any]] = (
        ("wing", lambda v: f"of the wing {v}"),
        ("status", {"runs": "that run", "planned": "planned", "listed": "listed only"}.get),
        ("tag", lambda v: f"tagged {v}"),
        ("since", lambda v: f"since {day(v)}"),
        ("until", lambda v: f"until {day(v)}"),
    )
    return ", ".join(str(say(filters[name])) for name, say in says if filters.get(name))


FILTERS = {
    function.__name__: function
    for function in (
        *(day, moment, plural, figure, bound, badge, by, gist, machine, commit, took),
        *(paper_path, code_name, coded),
    )
}
