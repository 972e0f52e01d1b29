"""The pages that are read: by day, trending, all papers, search, one paper, comparison, about."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import APIRouter
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from pantarhei.errors import RequestError
from pantarhei.feed import papers, people, schema, trends
from pantarhei.feed.web import pictures, taking_part, wording
from pantarhei.feed.web.pages import Pages, conditional, searched
from pantarhei.papers import WINGS, card

router = APIRouter(include_in_schema=False)

_ON_A_DAY = 50  # papers shown of one day, the hottest
_ON_A_PAGE = 50
_FOUND = 20
_QUERY = 200  # characters
_FILL = 8  # papers that a day needs to stand alone on the front page
_VIEWS = ("wing", "status", "since", "until")
# A plot is looked at, and runs nothing: no script, no frame, nothing loaded.
_PLOT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox"


@router.get("/")
def front(request: Request) -> Response:
    """Show the papers of a day, the newest unless named."""
    asked = _query(request, "day", "wing")

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        found = papers.day(c, asked["day"], wing=asked["wing"], limit=_ON_A_DAY)
        # A day with few papers is followed by what came before it.
        before = None
        if found.previous and found.total < _FILL:
            before = papers.listing(c, wing=asked["wing"], until=found.previous, limit=_FILL)
        shown = [*found.papers, *(before.papers if before else ())]
        return {
            "section": "days",
            "found": found,
            "before": before,
            "wing": asked["wing"],
            "wings": WINGS,
            "feed": wording.address(
                "/feed/atom", view=asked["wing"] and "wing", value=asked["wing"]
            ),
        } | _mine(request, c, shown)

    return _pages(request).page(request, "day.html", contents)


@router.get("/trending")
def trending(request: Request) -> Response:
    """Show the papers around which most happened lately."""
    asked = _query(request, "wing", "after")

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        page = papers.listing(c, "heat", wing=asked["wing"], after=asked["after"], limit=_ON_A_PAGE)
        return {
            "section": "trending",
            "page": page,
            "wing": asked["wing"],
            "wings": WINGS,
            "more": wording.address("/trending", wing=asked["wing"], after=page.next),
            "begun": asked["after"] is None,
        } | _mine(request, c, page.papers)

    return _pages(request).page(request, "trending.html", contents)


@router.get("/papers")
def all_papers(request: Request) -> Response:
    """List papers, filtered and in either order."""
    asked = _query(request, *_VIEWS, "tag", "order", "after")
    return _listing(request, asked, "/papers", "papers")


@router.get("/tags/{tag}")
def tagged(request: Request, tag: str) -> Response:
    """List the papers with a tag."""
    asked = _query(request, "order", "after") | {"tag": tag[:_QUERY]}
    return _listing(request, asked, f"/tags/{quote(tag, safe='')}", "")


def _listing(request: Request, asked: dict[str, str | None], path: str, section: str) -> Response:
    order = asked.pop("order") or "date"
    after = asked.pop("after")
    here = {name: value for name, value in asked.items() if f"/{name}s/" not in path}

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        page = papers.listing(c, order, **_filters(asked), after=after, limit=_ON_A_PAGE)
        view = {"order": None if order == "date" else order, **here}
        return {
            "section": section,
            "page": page,
            "asked": {name: asked.get(name) for name in (*_VIEWS, "tag")},
            "order": order,
            "wings": WINGS,
            "statuses": papers.STATUSES,
            "words": wording.listing_words(asked),
            "first": wording.address(path, **view) if after else None,
            "more": wording.address(path, **view, after=page.next) if page.next else None,
            "takings": _takings("/export", {"order": view["order"], **asked}),
            "feed": _feed_of(asked),
        } | _mine(request, c, page.papers)

    return _pages(request).page(request, "papers.html", contents)


@router.get("/search")
async def search(request: Request) -> Response:
    """Search by words and by meaning; without a query, offer to."""
    asked = _query(request, "q", *_VIEWS, "page")
    query = " ".join((asked.pop("q") or "").split())
    if len(query) > _QUERY:
        raise RequestError(f"A search has at most {_QUERY} characters: shorten it.")
    number = _page_number(asked.pop("page"))
    return await searched(request, query, lambda: _search(request, query, asked, number))


def _search(request: Request, query: str, asked: dict[str, str | None], number: int) -> Response:
    searcher = request.app.state.searcher

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        found, begun = None, ()
        if query:
            part = {"limit": _FOUND, "offset": (number - 1) * _FOUND}
            found = searcher.search(query, **_filters(asked), **part, within=c)
            # While somebody types, the last word may be unfinished.
            typing = "hx-request" in request.headers and not any(asked.values())
            if typing and (found.corrected or not found.total):
                begun = searcher.suggest(query, limit=_FOUND)
        hits = found.hits if found and not begun else ()
        shown = begun or [hit.paper for hit in hits]
        last = begun or number * _FOUND >= (found.total if found else 0)
        view = {"q": query, **asked}
        return {
            "section": "search",
            "query": query,
            "found": found,
            "shown": shown,
            "total": len(begun) or (found.total if found else 0),
            "corrected": None if begun or not found else found.corrected,
            "snippets": {hit.paper.id: hit.snippet for hit in hits},
            "asked": asked,
            "wings": WINGS,
            "statuses": papers.STATUSES,
            "back": wording.address("/search", **view, page=number - 1 if number > 2 else None)
            if number > 1
            else None,
            "more": None if last else wording.address("/search", **view, page=number + 1),
            "takings": _takings("/export", view) if query else (),
            "feed": wording.address("/feed/atom", view="search", value=query) if query else None,
        } | _mine(request, c, shown)

    return _pages(request).page(request, "search.html", contents, keep=False)


@router.get("/paper/{key}")
def paper(request: Request, key: str) -> Response:
    """Show one paper: our summary, what it claims, and what was measured."""
    searcher = request.app.state.searcher
    with _pages(request).store.read() as c:
        found = papers.get(c, key)
    if found is None:
        raise HTTPException(404, "There is no such paper here: search for its title.")
    if found.key != key:  # an arXiv identifier, or an address from before
        return RedirectResponse(wording.paper_path(found), 301)
    related = searcher.related(found.id)

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        measured = papers.results(c, found.id)
        return {
            "paper": found,
            "measured": [m for m in measured if m.claims],
            "own": card(found.key).own if found.source == "catalogue" else None,
            "plots": pictures.plots(_newest_folder(c, found.id)),
            "related": related,
            "part": taking_part.part(c, taking_part.visitor(request), found),
            "scales": wording.SCALES,
        }

    return _pages(request).page(request, "paper.html", contents, keep=False)


@router.get("/paper/{key}/figure/{number}")
def figure(request: Request, key: str, number: int, vector: bool = False) -> Response:
    """Send a plot of the newest run: the one with this place among those that are there."""
    with _pages(request).store.read() as c:
        found = papers.get(c, key)
        plots = pictures.plots(_newest_folder(c, found.id)) if found else []
    if not 0 <= number < len(plots):
        raise HTTPException(404, "There is no such plot here.")
    path = plots[number].vector if vector else plots[number].path
    content = pictures.content(path) if path else None
    if content is None:
        raise HTTPException(404, "There is no such plot here.")
    headers = {"Content-Security-Policy": _PLOT_POLICY}
    return conditional(request, *content, headers)


@router.get("/compare")
def compare(request: Request) -> Response:
    """Show what was measured of several papers side by side."""
    keys = [key[:_QUERY] for key in request.query_params.getlist("paper") if key]

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        chosen = papers.compare(c, keys)
        runs = papers.listing(c, "heat", status="runs", limit=100)
        rest = [p for p in runs.papers if p.measured and p.key not in keys]
        return {
            "chosen": chosen,
            "others": sorted(rest, key=lambda paper: paper.title.casefold()),
            "scales": wording.SCALES,
            "tally": {found.id: _tally(measured) for found, measured in chosen},
        }

    return _pages(request).page(request, "compare.html", contents)


@router.get("/about")
def about(request: Request) -> Response:
    """Say what this page is, how papers trend and what the badges mean."""

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        table = schema.papers
        rows = c.execute(sa.select(table.c.status, sa.func.count()).group_by(table.c.status))
        return {
            "section": "about",
            "counts": {name: 0 for name in papers.STATUSES} | dict(rows.tuples().all()),
            "trends": trends,
            "scales": wording.SCALES,
        }

    return _pages(request).page(request, "about.html", contents)


@router.get("/api")
def programs(request: Request) -> Response:
    """Describe the JSON API for people, from its own description."""

    def contents(c: sa.Connection) -> Mapping[str, Any]:
        return {"operations": _operations(request)}

    return _pages(request).page(request, "programs.html", contents)


@router.get("/robots.txt")
def robots(request: Request) -> Response:
    """Let crawlers read what stays, and leave searches alone."""
    closed = ("/search", "/compare", "/login", "/api/")
    lines = ["User-agent: *", *(f"Disallow: {path}" for path in closed)]
    return conditional(request, "\n".join([*lines, ""]).encode(), "text/plain", {})


# ------------------------------------------------------------------------------------------ parts


def _pages(request: Request) -> Pages:
    return cast(Pages, request.app.state.pages)


def _query(request: Request, *names: str) -> dict[str, str | None]:
    """Return parameters by name; what a form left empty was not asked for."""
    given = request.query_params
    return {name: (given.get(name) or "").strip() or None for name in names}


def _filters(asked: Mapping[str, str | None]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if value is not None}


def _page_number(text: str | None) -> int:
    if text is None:
        return 1
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:9]) <= 500:
        raise RequestError("There is no such page of results: choose one from 1 to 500.")
    return int(text)


def _mine(request: Request, c: sa.Connection, shown: Sequence[papers.Paper]) -> dict[str, Any]:
    """Return which of the papers whoever asks has voted for."""
    account = taking_part.visitor(request).account
    if account is None or not shown:
        return {"voted": frozenset()}
    return {"voted": people.voted(c, account.id, [paper.id for paper in shown])}


def _newest_folder(c: sa.Connection, paper: int) -> str:
    """Return the folder of the newest run that has one, on whichever machine it was."""
    runs = schema.runs
    statement = sa.select(runs.c.folder).where(runs.c.paper == paper, runs.c.folder != "")
    return c.scalar(statement.order_by(runs.c.date.desc(), runs.c.uid).limit(1)) or ""


def _tally(measured: Sequence[papers.Measured]) -> dict[str, tuple[int, int]]:
    """Count, for each scale, the claims that held and those that were measured."""
    counts: dict[str, tuple[int, int]] = {}
    for run, claims in ((m.run, m.claims) for m in measured):
        held, all = counts.get(run.scale, (0, 0))
        counts[run.scale] = held + sum(claim.holds for claim in claims), all + len(claims)
    return counts


def _takings(path: str, view: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the addresses of a listing's exports, with their labels."""
    kinds = (("BibTeX", "bib"), ("CSV", "csv"))
    return tuple((label, wording.address(f"{path}.{kind}", **view)) for label, kind in kinds)


def _feed_of(asked: Mapping[str, str | None]) -> str:
    for view in ("tag", "wing"):
        if asked.get(view):
            return wording.address("/feed/atom", view=view, value=asked[view])
    return "/feed/atom"


@functools.lru_cache(maxsize=1)
def _described(openapi: Any) -> list[dict[str, Any]]:
    return [
        {
            "path": path,
            "summary": operation.get("summary", ""),
            "description": operation.get("description", ""),
            "parameters": [p["name"] for p in operation.get("parameters", ())],
        }
        for path, operations in openapi().get("paths", {}).items()
        for operation in operations.values()
    ]


def _operations(request: Request) -> list[dict[str, Any]]:
    return _described(request.app.openapi)
