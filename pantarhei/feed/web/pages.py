"""How a page is answered: rendered once, kept until the store changes, sent only where it is new.

A page's ETag is a hash of its content, so it outlives a restart and is the same for every worker. A
page is kept with the state of the store it shows; while that state is the store's, a request costs
one look at the state, and a conditional one that nothing changed for costs no rendering at all.

What differs between two browsers that see the same page is the token of their forms. It is written
into the finished page, in the place of a mark, and counts in the ETag.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jinja2
import sqlalchemy as sa
from anyio import to_thread
from fastapi.templating import Jinja2Templates
from starlette.requests import Request
from starlette.responses import Response

from pantarhei.feed.store import Store
from pantarhei.feed.web import taking_part, wording
from pantarhei.feed.web.security import web_address

T = TypeVar("T")
# Nobody can write it into a comment: it is another one in every process.
_MARK = secrets.token_hex(32)
_KEPT_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Looking:
    """Who looks at a page, as templates see them: ``token`` is a mark for the browser's own."""

    account: Any
    may_log_in: bool
    token: str = _MARK


@dataclass(frozen=True)
class _Kept:
    state: object
    body: bytes
    digest: str
    forms: bool


class Pages:
    """Renders, keeps and answers the pages of one application; safe to share among threads."""

    def __init__(self, store: Store, templates: Jinja2Templates) -> None:
        self.store = store
        self.templates = templates
        self._state = _State(store)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Any, ...], _Kept] = OrderedDict()
        self._bytes = 0

    def page(
        self,
        request: Request,
        name: str,
        contents: Callable[[sa.Connection], Mapping[str, Any]],
        *,
        keep: bool = True,
        status: int = 200,
    ) -> Response:
        """Answer with template ``name`` and what ``contents`` reads, in one transaction.

        ``keep`` holds the page for whoever of the same account asks for the same address; it is for
        pages that show nothing but the store.
        """
        visitor = taking_part.visitor(request)
        account = visitor.account
        key = _key(request, visitor)
        state = self._state.now() if keep else None
        kept = self._look(key, state) if keep else None
        if kept is None:
            with self.store.read() as c:
                values = contents(c)
            context = {**taking_part.context(request), **values}
            context["visitor"] = Looking(account, visitor.may_log_in)
            context["request"] = request
            body = self.templates.get_template(name).render(context).encode()
            digest = hashlib.sha256(body.replace(_MARK.encode(), b"")).hexdigest()[:32]
            kept = _Kept(state, body, digest, _MARK.encode() in body)
            if keep:
                self._keep(key, kept)
        return self._answer(request, kept, status, visitor)

    def at_once(self, request: Request) -> Response | None:
        """Answer with a page that was kept, where that takes no look into the store; else None.

        For the event loop: nothing here waits.
        """
        asked, owner = request.state.asked, getattr(request.app.state, "owner", None)
        unknown = asked.session is not None or (asked.site.mode == "local" and owner is None)
        if unknown or not self._state.near:
            return None
        visitor = taking_part.visitor(request)
        kept = self._look(_key(request, visitor), self._state.now())
        return None if kept is None else self._answer(request, kept, 200, visitor)

    def close(self) -> None:
        """Close the connection that watches the store."""
        self._state.close()

    def _answer(
        self, request: Request, kept: _Kept, status: int, visitor: taking_part.Visitor
    ) -> Response:
        body, digest = kept.body, kept.digest
        if kept.forms:
            token = visitor.token
            digest = hashlib.sha256(f"{digest} {token}".encode()).hexdigest()[:32]
        headers = {"ETag": f'"{digest}"'}
        if status == 200 and is_known(request, digest):
            return Response(status_code=304, headers=headers)
        if kept.forms:
            body = body.replace(_MARK.encode(), token.encode())
        return Response(body, status, headers, "text/html")

    def _look(self, key: tuple[Any, ...], state: object) -> _Kept | None:
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept.state != state:
                return None
            self._kept.move_to_end(key)
            return kept

    def _keep(self, key: tuple[Any, ...], kept: _Kept) -> None:
        with self._lock:
            old = self._kept.pop(key, None)
            self._kept[key] = kept
            self._bytes += len(kept.body) - (len(old.body) if old else 0)
            while self._bytes > _KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1].body)


def _key(request: Request, visitor: taking_part.Visitor) -> tuple[Any, ...]:
    account = visitor.account
    return request.scope["path"], request.scope["query_string"], account and account.id


class _State:
    """Tells whether anything was committed to the store since, without reading what.

    Two equal values saw the same data; taken before a transaction, a value is never newer than what
    the transaction reads.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._watch: sqlite3.Connection | None = None
        if store.path is not None:
            self._watch = sqlite3.connect(store.path, timeout=60, check_same_thread=False)
            self._watch.execute("PRAGMA query_only = ON")

    @property
    def near(self) -> bool:
        """Whether the store is asked without waiting."""
        return self._watch is not None

    def now(self) -> object:
        if self._watch is not None:
            # It changes when another connection, of whichever process, has committed.
            try:
                with self._lock:
                    return self._watch.execute("PRAGMA data_version").fetchone()[0]
            except sqlite3.Error:
                return object()  # like no other: the store is asked, and says what is wrong
        with self._store.read() as c:
            # What is committed: everything below, but what still ran.
            return c.scalar(sa.text("SELECT pg_current_snapshot()::text"))

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()


async def searched(request: Request, query: str, answer: Callable[[], T]) -> T:
    """Return what ``answer`` makes of a search.

    One that takes milliseconds is made right here, in the event loop. Handed to a thread, it would
    wait for the interpreter's lock again and again, and so would the loop: a fifth fewer a second,
    and the last of them a half later. Others take turns, as many at once as there are processors.
    """
    if request.app.state.searcher.prompt(query):
        return answer()
    return await to_thread.run_sync(answer, limiter=request.app.state.searching)


def is_known(request: Request, digest: str) -> bool:
    """Whether the browser has the content with this digest already (RFC 9110, If-None-Match)."""
    given = request.headers.get("if-none-match")
    if given is None:
        return False
    known = {tag.strip().removeprefix("W/") for tag in given.split(",")}
    return "*" in known or f'"{digest}"' in known


def conditional(request: Request, body: bytes, media: str, headers: Mapping[str, str]) -> Response:
    """Answer with ``body``, or with 304 where the client has it; for what is not a page."""
    digest = hashlib.sha256(body).hexdigest()[:32]
    tagged = {**headers, "ETag": f'"{digest}"'}
    if is_known(request, digest):
        return Response(status_code=304, headers=tagged)
    return Response(body, 200, tagged, media)


def environment() -> jinja2.Environment:
    """Return the templates' environment: HTML is escaped, a name that is not there is a defect."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("pantarhei.feed.web"),
        autoescape=True,
        auto_reload=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters |= wording.FILTERS | {"web_address": web_address}
    made.globals |= {"address": wording.address, "section": "", "messages": ()}
    return made
