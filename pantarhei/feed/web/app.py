"""The page as an application: :func:`create_app` puts its parts together.

``app.state`` holds what the parts share: ``store``, ``site`` (how this installation is run),
``templates``, ``pages`` (see :mod:`.pages`), ``searcher``, ``searching`` (the turns of searches
that take long) and, where mail is sent, ``letterhead`` and ``sender``. From outside in, a request
passes :class:`.security.Guard`, then :class:`Economy`, then the routes of :mod:`.reading`,
:mod:`.taking_part`, :mod:`.atom`, :mod:`.exports` and :mod:`.api`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.templating import Jinja2Templates
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pantarhei.devices import processors
from pantarhei.errors import RequestError
from pantarhei.feed.search import Searcher
from pantarhei.feed.store import Store
from pantarhei.feed.web import api, atom, exports, reading, taking_part
from pantarhei.feed.web.pages import Pages, environment, is_known
from pantarhei.feed.web.security import Guard, Mode, Network, Site

if TYPE_CHECKING:
    from pantarhei.feed.mail import Letterhead

_log = logging.getLogger(__name__)
_MEDIA = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}


def create_app(
    store: Store,
    *,
    mode: Mode = "local",
    public_url: str | None = None,
    searcher: Searcher | None = None,
    proxies: Sequence[Network] = (),
    letterhead: Letterhead | None = None,
    sender: Any = None,
) -> FastAPI:
    """Return the page over ``store`` as an ASGI application.

    ``mode`` is ``local`` (one person, who needs no account), ``shared`` (people have accounts;
    needs ``public_url``) or ``reading``. Without ``searcher`` one is made; from the application's
    start it indexes in the background. ``letterhead`` and ``sender`` are for an installation
    that sends mail.
    """
    site = Site(mode, public_url, store.secret.encode(), tuple(proxies))
    templates = Jinja2Templates(env=environment(), context_processors=[taking_part.context])
    pages = Pages(store, templates)
    own = searcher is None
    searcher = searcher or Searcher(store)

    def prepare() -> None:
        for name in templates.env.list_templates(extensions=["html"]):
            templates.env.get_template(name)
        try:
            searcher.refresh()
        except RequestError as error:
            _log.warning("The search index is not up to date: %s", error)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        threading.Thread(target=prepare, daemon=True, name="index").start()
        if sender is not None:
            sender.start()
        yield
        if sender is not None:
            await asyncio.to_thread(sender.stop)
        if own:
            searcher.close()
        pages.close()

    app = FastAPI(
        title="pantarhei",
        summary="Papers on dynamic neural networks, and what was measured of their claims.",
        version=metadata.version("pantarhei"),
        openapi_url="/api/openapi.json",
        docs_url=None,  # both load scripts from elsewhere
        redoc_url=None,
        lifespan=running,
        redirect_slashes=False,
    )
    app.state.store, app.state.site, app.state.searcher = store, site, searcher
    app.state.templates, app.state.pages = templates, pages
    app.state.searching = CapacityLimiter(processors())
    app.state.letterhead, app.state.sender = letterhead, sender
    static = _Static.shipped()
    templates.env.globals |= {"static": static.address, "version": app.version}
    for part in (reading, taking_part, atom, api, exports, static):
        app.include_router(part.router)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_exception_handler(RequestError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(Economy)
    app.add_middleware(Guard, site=site)
    return app


class Economy:
    """Sends no more than is asked for.

    HEAD is answered wherever GET is, with the same headers and no body. An answer of the API gets
    an ETag of its content, and whoever has that content already gets a 304; pages do that
    themselves, without being made first. A page that was kept is answered right here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask for the whole, and send what is wanted of it."""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"

        async def wanted(message: Message) -> None:
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        request = Request(scope)
        if (kept := request.app.state.pages.at_once(request)) is not None:
            await kept(scope, receive, wanted)
            return
        answer = _tagging(request, wanted) if scope["path"].startswith("/api/") else wanted
        await self.app({**scope, "method": "GET"}, receive, answer)


def _tagging(request: Request, send: Send) -> Send:
    """Return a ``send`` that keeps an answer back until its content is known."""
    begun: Message = {}
    content = bytearray()

    async def tag(message: Message) -> None:
        if message["type"] == "http.response.start":
            begun.update(message)
            return
        content.extend(message.get("body", b""))
        if message.get("more_body"):
            return
        body = bytes(content)
        headers = MutableHeaders(raw=list(begun["headers"]))
        if begun["status"] == 200 and "etag" not in headers:
            digest = hashlib.sha256(body).hexdigest()[:32]
            headers["ETag"] = f'"{digest}"'
            if is_known(request, digest):
                begun["status"], body = 304, b""
                del headers["content-length"]
        await send({**begun, "headers": headers.raw})
        await send({"type": "http.response.body", "body": body})

    return tag


@dataclass(frozen=True)
class _Static:
    """The style sheet, the scripts and the icon: read once; no address reaches the file system."""

    files: dict[str, tuple[bytes, str, str]]  # name: content, media type, digest

    @classmethod
    def shipped(cls) -> _Static:
        files = {}
        for file in resources.files(__package__).joinpath("static").iterdir():
            media = _MEDIA.get(file.name.rpartition(".")[2])
            if media is not None:
                content = file.read_bytes()
                files[file.name] = content, media, hashlib.sha256(content).hexdigest()[:16]
        return cls(files)

    def address(self, name: str) -> str:
        """Return where a file is found; its content changes with its address, so it is kept."""
        return f"/static/{name}?v={self.files[name][2]}"

    @property
    def router(self) -> APIRouter:
        router = APIRouter(include_in_schema=False)

        @router.get("/static/{name}")
        async def static(request: Request, name: str, v: str = "") -> Response:
            if name not in self.files:
                raise HTTPException(404, "There is no such file here.")
            content, media, digest = self.files[name]
            kept = "public, max-age=31536000, immutable" if v == digest else "no-cache"
            headers = {"ETag": f'"{digest}"', "Cache-Control": kept}
            if is_known(request, digest):
                return Response(status_code=304, headers=headers)
            return Response(content, 200, headers, media)

        return router


_HEADINGS = {
    400: "That cannot be answered",
    403: "Not allowed",
    404: "Not found",
    405: "Not that way",
    429: "A little slower, please",
    500: "This is our fault",
    503: "Not now",
}


async def _refuse(request: Request, error: Exception) -> Response:
    """Answer what cannot be served: one sentence, as a page or as JSON."""
    status, headers = 400, None
    if isinstance(error, HTTPException):
        status, headers, sentence = error.status_code, error.headers, str(error.detail)
        if status in (301, 302, 303, 307, 308):
            return Response(status_code=status, headers=headers)
        if sentence == HTTPStatus(status).phrase:
            sentence = _PLAIN.get(status, f"{sentence}.")
    elif isinstance(error, RequestValidationError):
        status, sentence = 422, validation_sentence(error)
    elif isinstance(error.__cause__, SQLAlchemyError):
        _log.error("%s", error)  # it names the store's place, which is not the reader's business
        status, headers = 503, {"Retry-After": "10"}
        sentence = "The store behind this page does not answer: try again in a moment."
    else:
        sentence = str(error)
    return _problem(request, status, sentence, headers)


async def _fail(request: Request, error: Exception) -> Response:
    """Answer a defect of ours; what it was goes to the log, not to the reader."""
    return _problem(request, 500, "Something went wrong here; it was written down.", None)


_PLAIN = {
    404: "Nothing is at this address.",
    405: "This address does not take that kind of request.",
}


def _problem(request: Request, status: int, sentence: str, headers: Any) -> Response:
    headers = {**(headers or {}), "Cache-Control": "no-store"}
    if request.url.path.startswith("/api/"):
        return JSONResponse({"error": sentence}, status, headers)
    heading = _HEADINGS.get(status, HTTPStatus(status).phrase)
    values: dict[str, Any] = {"heading": heading, "sentence": sentence}
    # refused before it was known who asks, or by a store that cannot say it: like nobody
    values |= {"visitor": _NOBODY, "here": "/"}
    if status < 500 and hasattr(request.state, "asked"):
        values |= taking_part.context(request)
    template = request.app.state.templates.get_template("error.html")
    return Response(template.render(values), status, headers, "text/html")


_NOBODY = {"account": None, "may_log_in": False, "token": ""}


def validation_sentence(error: RequestValidationError) -> str:
    """Say in one sentence what is wrong with the first parameter that is."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part not in ("query", "path", "body")]
    name = place[0] if place else "the request"
    reason = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"'{name}' is not right: {reason[:1].lower()}{reason[1:]}."
