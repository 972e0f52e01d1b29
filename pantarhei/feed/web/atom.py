"""Atom feeds (RFC 4287) of the page's views."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any, cast
from urllib.parse import quote
from xml.etree import ElementTree as ET

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from pantarhei.errors import RequestError, nearest
from pantarhei.feed import papers
from pantarhei.feed.store import Store
from pantarhei.feed.web import wording
from pantarhei.feed.web.api import address_of
from pantarhei.feed.web.pages import conditional

router = APIRouter(include_in_schema=False)

VIEWS = ("new", "trending", "wing", "tag", "search")
_ENTRIES = 50
_ATOM = "http://www.w3.org/2005/Atom"
ET.register_namespace("", _ATOM)


@router.get("/feed/atom")
def feed(request: Request, view: str = "new", value: str = "") -> Response:
    """Send a view as a feed."""
    view, value = view or "new", value.strip()[:200]
    if view not in VIEWS:
        raise RequestError(
            f"There is no feed '{view[:40]}': choose {', '.join(VIEWS)}.{nearest(view[:40], VIEWS)}"
        )
    if view in ("wing", "tag", "search") and not value:
        raise RequestError(f"The feed of a {view} needs its value, as in view={view}&value=....")
    found, title, path = _view(request, view, value)
    here = wording.address("/feed/atom", view=None if view == "new" else view, value=value)
    body = _feed(request, found, title, path, here)
    return conditional(request, body, "application/atom+xml", {})


def _view(request: Request, view: str, value: str) -> tuple[Iterable[papers.Paper], str, str]:
    """Return a view's papers, its title and the page it is the feed of."""
    if view == "search":
        hits = request.app.state.searcher.search(value, limit=_ENTRIES).hits
        path = wording.address("/search", q=value)
        return [hit.paper for hit in hits], f"Search for “{value}”", path
    with cast(Store, request.app.state.store).read() as c:
        if view == "trending":
            return papers.listing(c, "heat", limit=_ENTRIES).papers, "Trending", "/trending"
        only = {view: value} if view in ("wing", "tag") else {}
        found = papers.listing(c, limit=_ENTRIES, **cast(Any, only)).papers
    if view == "tag":
        return found, f"Tagged “{value}”", f"/tags/{quote(value, safe='')}"
    if view == "wing":
        return found, f"New in the wing {value}", wording.address("/papers", wing=value)
    return found, "New papers", "/"


def _feed(
    request: Request, found: Iterable[papers.Paper], title: str, path: str, here: str
) -> bytes:
    found = list(found)
    root = ET.Element(f"{{{_ATOM}}}feed")
    _add(root, "id", text=_name(here))
    _add(root, "title", text=f"{title} · pantarhei")
    _add(root, "updated", text=wording.moment(max((p.changed for p in found), default=0.0)))
    _add(root, "link", rel="self", type="application/atom+xml", href=address_of(request, here))
    _add(root, "link", rel="alternate", type="text/html", href=address_of(request, path))
    _add(_add(root, "author"), "name", text="pantarhei")
    for paper in found:
        _entry(request, root, paper)
    ET.indent(root)
    return cast(bytes, ET.tostring(root, "utf-8", xml_declaration=True))


def _entry(request: Request, root: ET.Element, paper: papers.Paper) -> None:
    entry = _add(root, "entry")
    _add(entry, "id", text=_name(f"/paper/{paper.key}"))
    _add(entry, "title", text=paper.title)
    _add(entry, "published", text=f"{paper.date}T00:00:00Z")
    _add(entry, "updated", text=wording.moment(paper.changed))
    address = address_of(request, wording.paper_path(paper))
    _add(entry, "link", rel="alternate", type="text/html", href=address)
    for name in paper.authors or ("authors unnamed",):
        _add(_add(entry, "author"), "name", text=name)
    for term in (paper.wing, *paper.categories.split()):
        if term:
            _add(entry, "category", term=term)
    _add(entry, "summary", text=f"{wording.badge(paper)}. {paper.summary}")


def _add(parent: ET.Element, tag: str, *, text: str | None = None, **attributes: str) -> ET.Element:
    element = ET.SubElement(
        parent, f"{{{_ATOM}}}{tag}", {k: _xml(v) for k, v in attributes.items()}
    )
    element.text = None if text is None else _xml(text)
    return element


def _xml(text: str) -> str:
    """Leave out what XML 1.0 has no place for."""
    return "".join(c for c in text if (c >= " " and c not in "\ufffe\uffff") or c in "\t\n")


def _name(path: str) -> str:
    """Name something for good, wherever the page is served from."""
    return uuid.uuid5(uuid.NAMESPACE_URL, f"pantarhei:{path}").urn
