"""Lists and searches as BibTeX and CSV: at /export.bib and /export.csv, and in the API."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from pantarhei.feed import export, papers
from pantarhei.feed.search import Searcher
from pantarhei.feed.store import Store
from pantarhei.feed.web.api import PROBLEMS, Filtered
from pantarhei.feed.web.pages import conditional

_MOST = 1000  # papers
_AT_ONCE = 100  # of a search
_BIBTEX, _CSV = "application/x-bibtex; charset=utf-8", "text/csv; charset=utf-8"

router = APIRouter()


def taken(
    request: Request,
    filters: Filtered,
    q: Annotated[str | None, Query(max_length=200)] = None,
    tag: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
    order: Literal["date", "heat"] = "date",
) -> Iterable[papers.Paper]:
    """Return the papers of a list or a search, chosen as its page chooses them."""
    if query := " ".join((q or "").split()):
        return _found(request.app.state.searcher, query, filters)
    with cast(Store, request.app.state.store).read() as c:
        return papers.listing(c, order, **filters, tag=tag, limit=_MOST).papers


def _found(searcher: Searcher, query: str, filters: dict[str, Any]) -> Iterator[papers.Paper]:
    """Yield what a search finds, best first."""
    for offset in range(0, _MOST, _AT_ONCE):
        hits = searcher.search(query, **filters, limit=_AT_ONCE, offset=offset).hits
        yield from (hit.paper for hit in hits)
        if len(hits) < _AT_ONCE:
            return


Taken = Annotated[Iterable[papers.Paper], Depends(taken)]


def _described(media: str) -> dict[str, Any]:
    answer = {"content": {media: {"schema": {"type": "string"}}}, "description": "The papers."}
    return {"response_class": Response, "responses": PROBLEMS | {200: answer}}


@router.get("/export.bib", include_in_schema=False)
@router.get("/api/v1/export.bib", **_described(_BIBTEX))
def export_bibtex(request: Request, taken: Taken) -> Response:
    """Export up to 1,000 papers of a list or a search as BibTeX."""
    return _file(request, export.bibtex(taken), _BIBTEX, "bib")


@router.get("/export.csv", include_in_schema=False)
@router.get("/api/v1/export.csv", **_described(_CSV))
def export_csv(request: Request, taken: Taken) -> Response:
    """Export up to 1,000 papers of a list or a search as CSV."""
    return _file(request, export.csv(taken), _CSV, "csv")


def _file(request: Request, pieces: Iterator[str], media: str, suffix: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="papers.{suffix}"'}
    return conditional(request, "".join(pieces).encode(), media, headers)
