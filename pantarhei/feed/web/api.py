"""The JSON API, version 1: what the page shows, for programs. Described at /api/openapi.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, cast
from urllib.parse import quote

import sqlalchemy as sa
from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pantarhei.feed import papers
from pantarhei.feed.store import Store
from pantarhei.feed.web import wording
from pantarhei.feed.web.pages import searched
from pantarhei.feed.web.security import Site

Wing = Literal["compute", "systems", "learning"]
Status = Literal["runs", "planned", "listed"]
Badge = Literal["held", "not-held", "runs", "planned", "listed"]

_DAY = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
Day = Annotated[
    str, Query(pattern=_DAY, json_schema_extra={"format": "date"}, examples=["2026-01-31"])
]
Cursor = Annotated[str, Query(max_length=500, description="`next` of the page before.")]
Key = Annotated[
    str, Path(min_length=1, max_length=200, description="A paper's key or arXiv identifier.")
]
Text = Annotated[str, Query(min_length=1, max_length=200)]


class Problem(BaseModel):
    """What could not be answered, and what to do instead."""

    error: str = Field(examples=["'2026-02-30' is not a date: write it as 2026-01-31."])


class PaperOut(BaseModel):
    """A paper."""

    key: str
    url: str = Field(description="Its page.")
    title: str
    summary: str
    date: str = Field(description="Of publication, ISO 8601.")
    authors: list[str] = Field(description="Empty where only their number is known.")
    authors_count: int
    arxiv: str | None
    doi: str | None
    code: str | None
    categories: list[str]
    wing: Wing | None
    source: Literal["catalogue", "arxiv", "bibtex", "json"]
    status: Status
    badge: Badge
    votes: int
    comments: int
    claims_held: int
    claims_measured: int
    changed: str = Field(description="When what is said of it last changed, UTC.")


class PaperList(BaseModel):
    """Some papers; `next` is the cursor of those after them."""

    papers: list[PaperOut]
    next: str | None


class DayOut(BaseModel):
    """The papers of a day, hottest first, `total` of them; the nearest days that have any."""

    date: str
    papers: list[PaperOut]
    total: int
    previous: str | None
    next: str | None


class ClaimOut(BaseModel):
    """A claim as measured; `bound` is null where it is not made at this scale."""

    id: str
    statement: str
    quantity: str
    direction: Literal["<=", ">="]
    bound: float | None
    paper_value: str | None = Field(description="The paper's own figure, with its setting.")
    measured: float | None = Field(description="Null where it was not a finite number.")
    holds: bool
    evidence: str = Field(description="The file in the run's folder that shows it.")


class RunOut(BaseModel):
    """A run and those of its claims that are the newest at its scale."""

    uid: str
    scale: str
    seed: int
    date: str
    seconds: float
    device: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    command: str
    claims: list[ClaimOut]


class PaperResults(BaseModel):
    """A paper beside what was measured of it."""

    paper: PaperOut
    results: list[RunOut]


class Comparison(BaseModel):
    """Several papers, each beside what was measured of it."""

    papers: list[PaperResults]


class HitOut(BaseModel):
    """A paper that a search found."""

    paper: PaperOut
    score: float


class Found(BaseModel):
    """What a search found; `corrected` is the query it was taken for, where words were slips."""

    query: str
    corrected: str | None
    total: int
    hits: list[HitOut]


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "A value that means nothing here."},
    422: {"model": Problem, "description": "A parameter that is missing or of another kind."},
    429: {"model": Problem, "description": "Too many requests: wait as `Retry-After` says."},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "description": "There is no such paper."}
}

router = APIRouter(prefix="/api/v1", responses=PROBLEMS)


async def _filters(  # which a thread would take longer to begin with than to do
    wing: Wing | None = None,
    status: Status | None = None,
    since: Day | None = None,
    until: Day | None = None,
) -> dict[str, Any]:
    given = {"wing": wing, "status": status, "since": since, "until": until}
    return {name: value for name, value in given.items() if value is not None}


# The filters that listings, searches and exports share; those that were given.
Filtered = Annotated[dict[str, Any], Depends(_filters)]


@router.get("/papers")
def list_papers(
    request: Request,
    filters: Filtered,
    tag: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
    order: Literal["date", "heat"] = "date",
    after: Cursor | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> PaperList:
    """List papers, newest (`date`) or hottest (`heat`) first."""
    with _store(request).read() as c:
        page = papers.listing(c, order, **filters, tag=tag, after=after, limit=limit)
    return PaperList(papers=_papers(request, page.papers), next=page.next)


@router.get("/papers/{key}", responses=_UNKNOWN)
def get_paper(request: Request, key: Key) -> PaperResults:
    """Return a paper beside what was measured of it."""
    with _store(request).read() as c:
        paper = _known(papers.get(c, key))
        measured = papers.results(c, paper.id)
    return _results(request, paper, measured)


@router.get("/papers/{key}/claims", responses=_UNKNOWN)
def get_claims(request: Request, key: Key) -> list[RunOut]:
    """Return the newest result of each of a paper's claims at each scale, by the run it is of."""
    with _store(request).read() as c:
        measured = papers.results(c, _known(papers.get(c, key)).id)
    return [_run(one) for one in measured if one.claims]


@router.get("/papers/{key}/related", responses=_UNKNOWN)
def get_related(
    request: Request, key: Key, limit: Annotated[int, Query(ge=1, le=20)] = 5
) -> list[PaperOut]:
    """Return the papers nearest to one in meaning."""
    with _store(request).read() as c:
        paper = _known(papers.get(c, key))
    return _papers(request, request.app.state.searcher.related(paper.id, limit))


@router.get("/search")
async def search_papers(
    request: Request,
    q: Text,
    filters: Filtered,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    offset: Annotated[int, Query(ge=0, le=10_000)] = 0,
) -> Found:
    """Search titles and summaries by words and by meaning, best first; slips are forgiven."""
    searcher = request.app.state.searcher
    found = await searched(
        request, q, lambda: searcher.search(q, **filters, limit=limit, offset=offset)
    )
    hits = [HitOut(paper=_paper(request, hit.paper), score=float(hit.score)) for hit in found.hits]
    return Found(query=q, corrected=found.corrected, total=found.total, hits=hits)


@router.get("/suggest")
def suggest_papers(
    request: Request, q: Text, limit: Annotated[int, Query(ge=1, le=20)] = 8
) -> list[PaperOut]:
    """Find papers while a query is typed: its last word may be unfinished."""
    return _papers(request, request.app.state.searcher.suggest(q, limit=limit))


@router.get("/trending")
def list_trending(
    request: Request,
    wing: Wing | None = None,
    after: Cursor | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> PaperList:
    """List the papers around which most happened lately, hottest first."""
    with _store(request).read() as c:
        page = papers.listing(c, "heat", wing=wing, after=after, limit=limit)
    return PaperList(papers=_papers(request, page.papers), next=page.next)


@router.get("/day")
def get_day(
    request: Request,
    date: Day | None = None,
    wing: Wing | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 100,
) -> DayOut:
    """Return the papers of a day, the newest that has any unless named."""
    with _store(request).read() as c:
        found = papers.day(c, date, wing=wing, limit=limit)
    return DayOut(
        date=found.date,
        papers=_papers(request, found.papers),
        total=found.total,
        previous=found.previous,
        next=found.next,
    )


@router.get("/compare", responses=_UNKNOWN)
def compare_papers(
    request: Request,
    paper: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        Query(min_length=1, max_length=10, description="Keys of papers; repeat it."),
    ],
) -> Comparison:
    """Return what was measured of several papers."""
    with _store(request).read() as c:
        for key in paper:
            _known(papers.get(c, key))
        found = papers.compare(c, paper)
    return Comparison(papers=[_results(request, one, measured) for one, measured in found])


def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


def _known(paper: papers.Paper | None) -> papers.Paper:
    if paper is None:
        raise HTTPException(404, "There is no such paper here: /api/v1/search finds them.")
    return paper


def address_of(request: Request, path: str) -> str:
    """Return the whole address of a path of ours, as people reach it."""
    site = cast(Site, request.app.state.site)
    return f"{site.origin(request.url.scheme, request.headers['host'])}{path}"


def _paper(request: Request, paper: papers.Paper) -> PaperOut:
    return PaperOut(
        key=paper.key,
        url=address_of(request, f"/paper/{quote(paper.key, safe='')}"),
        title=paper.title,
        summary=paper.summary,
        date=paper.date,
        authors=list(paper.authors),
        authors_count=paper.authors_count,
        arxiv=paper.arxiv,
        doi=paper.doi,
        code=paper.code,
        categories=paper.categories.split(),
        wing=cast(Any, paper.wing),
        source=cast(Any, paper.source),
        status=cast(Any, paper.status),
        badge=paper.badge,
        votes=paper.votes,
        comments=paper.comments,
        claims_held=paper.held,
        claims_measured=paper.measured,
        changed=wording.moment(paper.changed),
    )


def _papers(request: Request, found: Iterable[papers.Paper]) -> list[PaperOut]:
    return [_paper(request, paper) for paper in found]


def _results(
    request: Request, paper: papers.Paper, measured: Sequence[papers.Measured]
) -> PaperResults:
    runs = [_run(one) for one in measured if one.claims]
    return PaperResults(paper=_paper(request, paper), results=runs)


def _run(measured: papers.Measured) -> RunOut:
    row = measured.run._mapping
    names = ("uid", "scale", "seed", "date", "device", "machine", "versions", "commit", "command")
    claims = [_claim(claim) for claim in measured.claims]
    return RunOut(**{n: row[n] for n in names}, seconds=_finite(row["seconds"]) or 0, claims=claims)


def _claim(claim: sa.Row[Any]) -> ClaimOut:
    row = claim._mapping
    names = ("id", "statement", "quantity", "direction", "paper_value", "holds", "evidence")
    values = {name: row[name] for name in names}
    return ClaimOut(**values, bound=_finite(row["bound"]), measured=_finite(row["measured"]))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
