"""What stands between the network and the page: one ASGI middleware, :class:`Guard`.

Every request passes it before any route sees it, so that a route cannot forget it. It checks where
the request was sent to (``Host``), how large it is and how often its address asks; for a request
that changes something also where it comes from (``Origin``, ``Sec-Fetch-Site``) and that its form
carries the token of this very browser. Every answer leaves with the headers that make a browser
run nothing but the page's own files.

Three modes: in ``local`` the page serves one person on their own machine, who takes part without
an account; in ``shared`` people have accounts; in ``reading`` nobody can change anything.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pantarhei.errors import RequestError

Mode = Literal["local", "shared", "reading"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

TARGET_BYTES = 8 * 1024  # path and query
HEADER_BYTES = 16 * 1024
HEADER_LINES = 100
BODY_BYTES = 64 * 1024
BODY_SECONDS = 20.0
FIELDS = 64
SESSION_SECONDS = 30 * 24 * 3600
# Mailed to people and posted to by their mail programs (RFC 8058): the signed token in the address
# is the authority, and no cookie is looked at.
ONE_CLICK = "/unsubscribe/"

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # "no-referrer" would make browsers send "Origin: null" with our own forms
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}
_READING = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # all but tab and the ends of lines


@dataclass(frozen=True)
class Limit:
    """At most ``burst`` at once, and ``burst`` more within every ``seconds``."""

    burst: int
    seconds: float


LIMITS: Mapping[str, Limit] = {
    "read": Limit(1200, 60),  # per address, as are the next two
    "write": Limit(120, 60),
    "mail": Limit(20, 3600),  # forms that make us send a message
    "recipient": Limit(4, 3600),  # messages asked for, per recipient
    "account": Limit(60, 60),  # votes, tags and the like, per account
    "comment": Limit(20, 600),  # per account
}


class Limiter:
    """Token buckets, one per key, for this process.

    A bucket holds ``burst`` tokens and refills at burst/seconds per second; what is asked of an
    empty one has to wait. Of the buckets, the ``capacity`` that were used last are kept.

    >>> now = [0.0]
    >>> limiter = Limiter(clock=lambda: now[0])
    >>> [limiter.wait("a", Limit(2, 60)) for _ in range(3)]
    [0.0, 0.0, 30.0]
    >>> now[0] = 30.0
    >>> limiter.wait("a", Limit(2, 60))
    0.0
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, capacity: int = 100_000
    ) -> None:
        self.clock = clock
        self._capacity = capacity
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, key: str, limit: Limit) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        rate = limit.burst / limit.seconds
        with self._lock:
            now = self.clock()
            tokens, then = self._buckets.pop(key, (float(limit.burst), now))
            tokens = min(float(limit.burst), tokens + max(0.0, now - then) * rate)
            enough = tokens >= 1 - 1e-9  # rounding does not make anybody wait
            self._buckets[key] = (tokens - 1 if enough else tokens, now)
            if len(self._buckets) > self._capacity:
                self._buckets.popitem(last=False)
        return 0.0 if enough else (1 - tokens) / rate


@dataclass(frozen=True)
class Site:
    """How this installation is run, as every part of the page needs to know it.

    ``public_url`` is the address that people use, ``https://papers.example.org``; ``shared`` needs
    it. ``proxies`` are the networks whose ``X-Forwarded-For`` is believed. ``secret`` signs the
    tokens of forms.

    >>> Site("shared", "https://papers.example.org", b"s" * 32).secure
    True
    """

    mode: Mode
    public_url: str | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    proxies: tuple[Network, ...] = ()
    limits: Mapping[str, Limit] = field(default_factory=lambda: LIMITS)
    limiter: Limiter = field(default_factory=Limiter)

    def __post_init__(self) -> None:
        if self.mode not in ("local", "shared", "reading"):
            raise RequestError(f"The page has no mode '{self.mode}': use local, shared or reading.")
        if self.public_url is None:
            if self.mode == "shared":
                raise RequestError(
                    "A shared page needs the address that people use: set PANTARHEI_URL, "
                    "as in https://papers.example.org."
                )
            return
        parts = urlsplit(self.public_url)
        if (
            parts.scheme not in ("http", "https")
            or not _HOST.fullmatch(parts.netloc)
            or parts.path not in ("", "/")
            or parts.query
            or parts.fragment
        ):
            raise RequestError(
                f"'{self.public_url}' is no address for the page: write it as "
                "https://papers.example.org, without a path."
            )

    @property
    def secure(self) -> bool:
        """Whether people reach the page over TLS."""
        return self.mode == "shared" and (self.public_url or "").lower().startswith("https://")

    @property
    def session_cookie(self) -> str:
        """The session cookie's name; ``__Host-`` binds it to this one host, over TLS only."""
        return "__Host-session" if self.secure else "pantarhei_session"

    @property
    def form_cookie(self) -> str:
        """The name of the cookie that ties the forms of somebody without session to a browser."""
        return "__Host-form" if self.secure else "pantarhei_form"

    def origin(self, scheme: str, host: str) -> str:
        """Return the origin that the page's own forms are sent from."""
        if self.mode == "shared" and self.public_url is not None:
            parts = urlsplit(self.public_url.lower())
            return f"{parts.scheme}://{parts.netloc}"
        return f"{scheme}://{host}".lower()

    def knows(self, host: str) -> bool:
        """Whether ``host``, a Host header, is one of ours.

        A page of somebody else whose name is made to point here (DNS rebinding) sends its own
        name, and is refused by it. An address in figures cannot be rebound.
        """
        match = _HOST.fullmatch(host)
        if not match:
            return False
        if self.mode != "local" and self.public_url is not None:
            if host.lower() == urlsplit(self.public_url.lower()).netloc:
                return True
            if self.mode == "shared":
                return False
        name = match[1].lower().strip("[]")
        address = _parsed(name)
        loopback = name == "localhost" or (address is not None and address.is_loopback)
        return loopback or (self.mode == "reading" and address is not None)

    def token(self, session: str | None, form: str) -> str:
        """Return the token of the forms of this session, or of a browser without one.

        It is the same for all the forms of a session, so that an unchanged page stays unchanged
        (ETags). Somebody who guessed it from the length of compressed answers would still have to
        pass the check of the origin.
        """
        bound = f"session:{session}" if session else f"form:{form}"
        return hmac.new(self.secret, bound.encode(), hashlib.sha256).hexdigest()

    def within(self, name: str, who: str) -> None:
        """Count one of ``name`` (a key of ``limits``) for ``who``; too many raise a 429.

        The person on their own machine is never limited.
        """
        if self.mode == "local":
            return
        seconds = self.limiter.wait(f"{name} {who}", self.limits[name])
        if seconds:
            raise _too_many(seconds)


def networks(names: Iterable[str]) -> tuple[Network, ...]:
    """Return the networks of proxies by name, such as ``127.0.0.1`` or ``10.0.0.0/8``.

    >>> networks(["10.0.0.0/8"])
    (IPv4Network('10.0.0.0/8'),)
    """
    found = []
    for name in names:
        try:
            found.append(ipaddress.ip_network(name.strip(), strict=False))
        except ValueError as error:
            raise RequestError(
                f"'{name}' is no address of a proxy: write it as 127.0.0.1 or 10.0.0.0/8."
            ) from error
    return tuple(found)


def local_path(target: str | None, default: str = "/") -> str:
    """Return ``target`` where it is a path on this page, else ``default``.

    It is read as a browser reads it: ``//host`` and ``/\\host`` are other hosts, tabs and ends of
    lines are dropped from the middle. Whatever could be read in two ways is no path.

    >>> local_path("/paper/rbqe?x=1#comments"), local_path("//evil.example"), local_path("https://x")
    ('/paper/rbqe?x=1#comments', '/', '/')
    """
    if not target or len(target) > 2000:
        return default
    for text in (target, unquote(target), unquote(unquote(target))):
        path = text.partition("?")[0].partition("#")[0]
        if (
            not text.startswith("/")
            or "//" in path
            or "\\" in text
            or not text.isprintable()
            or {"..", "."} & set(path.split("/"))
        ):
            return default
    return target


def web_address(text: str | None) -> str | None:
    """Return ``text`` where it is an address on the web, None where it could be anything else.

    For the addresses that come with papers, before they stand in a link.

    >>> web_address("https://example.org/a"), web_address("javascript:alert(1)")
    ('https://example.org/a', None)
    """
    if not text or not text.isprintable() or set(text) & set(" \\"):
        return None
    try:
        parts = urlsplit(text)
    except ValueError:
        return None
    return text if parts.scheme in ("http", "https") and parts.netloc else None


def client_address(peer: str, forwarded: Iterable[str], proxies: Iterable[Network]) -> str:
    """Return the address that a request came from, as far as it can be believed.

    Each proxy appends to ``X-Forwarded-For`` who spoke to it, so the list is read from its end and
    only past proxies that are known; the rest is whatever the client chose to write.

    >>> client_address("127.0.0.1", ["6.6.6.6, 198.51.100.7"], networks(["127.0.0.1"]))
    '198.51.100.7'
    """
    proxies = tuple(proxies)
    hops = [hop.strip() for line in forwarded for hop in line.split(",")]
    found = peer
    while hops and _among(found, proxies):
        hop = hops.pop()
        if _parsed(hop) is None:
            break
        found = hop
    return found


def address_block(address: str) -> str:
    """Return whom limits count as one: an IPv4 address, or a /64 of IPv6, a household's own."""
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return address if parsed is None else str(parsed)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address in figures; one of IPv4 also where a socket of IPv6 wrote it down."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed


def _among(address: str, networks: Iterable[Network]) -> bool:
    parsed = _parsed(address)
    return parsed is not None and any(parsed in network for network in networks)


def _too_many(seconds: float) -> HTTPException:
    wait = max(1, int(seconds + 0.999))
    return HTTPException(
        429, f"That was too often: try again in {wait} s.", {"Retry-After": str(wait)}
    )


@dataclass
class Asked:
    """What the guard knows of a request; routes find it as ``request.state.asked``.

    ``form`` holds the fields of a POST. ``token`` goes into every form, as field ``csrf``.
    """

    site: Site
    address: str
    session: str | None
    _form_value: str | None
    form: dict[str, str] = field(default_factory=dict)
    _fresh: str | None = None

    @property
    def token(self) -> str:
        """The token of this browser's forms; reading it is what sets the cookie it belongs to."""
        if self.session is None and self._form_value is None:
            self._form_value = self._fresh = secrets.token_urlsafe(24)
        return self.site.token(self.session, self._form_value or "")

    @property
    def fresh_cookie(self) -> str | None:
        """The cookie's value where the browser has yet to be given it."""
        return self._fresh

    def owns(self, token: str) -> bool:
        """Whether ``token`` is that of this browser."""
        if self.session is None and self._form_value is None:
            return False
        return hmac.compare_digest(self.token.encode(), token.encode())


class Guard:
    """The middleware; ``app.add_middleware(Guard, site=site)``."""

    def __init__(self, app: ASGIApp, site: Site) -> None:
        self.app = app
        self.site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or hand it on with what is known of it."""
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        asked: Asked | None = None

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._finish(MutableHeaders(scope=message), scope, asked)
            await send(message)

        try:
            self._measure(scope, headers)
            self._check_host(scope, headers)
            asked = self._ask(scope, headers)
            if scope["method"] not in _READING:
                self._check_source(scope, headers)
                body = await _read(headers, receive)
                asked.form = _fields(headers, body)
                self._check_token(scope, headers, asked)
                receive = _replay(body, receive)
        except HTTPException as refused:
            response = await _refusal(Request(scope), refused)
            await response(scope, receive, guarded_send)
            return
        await self.app(scope, receive, guarded_send)

    def _measure(self, scope: Scope, headers: Headers) -> None:
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > TARGET_BYTES:
            raise HTTPException(414, "This address is too long.")
        if len(headers.raw) > HEADER_LINES or (
            sum(len(name) + len(value) for name, value in headers.raw) > HEADER_BYTES
        ):
            raise HTTPException(431, "The headers of this request are too large.")
        # PostgreSQL keeps no NUL in text, and no address of ours has one.
        if "\x00" in scope["path"] or "\x00" in unquote(scope["query_string"].decode("latin-1")):
            raise HTTPException(400, "An address cannot hold the character NUL.")

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.site.knows(hosts[0]):
            raise HTTPException(421, "This page is not served under that name.")
        if self.site.mode == "local" and ("x-forwarded-for" in headers or "forwarded" in headers):
            raise HTTPException(
                403,
                "This page serves one person on their own machine, and a proxy would let everybody "
                "in as them: start it with --shared, or without --mine.",
            )

    def _ask(self, scope: Scope, headers: Headers) -> Asked:
        """Find out who asks, and count it."""
        site = self.site
        peer = scope["client"][0] if scope.get("client") else ""
        address = client_address(peer, headers.getlist("x-forwarded-for"), site.proxies)
        cookies = Request(scope).cookies
        asked = Asked(
            site,
            address_block(address),
            cookies.get(site.session_cookie) if site.mode == "shared" else None,
            cookies.get(site.form_cookie),
        )
        scope.setdefault("state", {})["asked"] = asked
        site.within("read" if scope["method"] in _READING else "write", asked.address)
        return asked

    def _check_source(self, scope: Scope, headers: Headers) -> None:
        """Refuse what a page of somebody else makes a browser send."""
        if scope["path"].startswith(ONE_CLICK):
            return
        if self.site.mode == "reading":
            raise HTTPException(403, "This page can be read but not written to.")
        site = headers.get("sec-fetch-site", "same-origin")
        ours = self.site.origin(scope["scheme"], headers["host"])
        origin = headers.get("origin", ours)
        if site not in ("same-origin", "none") or origin.lower() != ours:
            raise HTTPException(403, "This form was sent from another site.")

    def _check_token(self, scope: Scope, headers: Headers, asked: Asked) -> None:
        if scope["path"].startswith(ONE_CLICK):
            return
        if not asked.owns(asked.form.get("csrf", "") or headers.get("x-csrf-token", "")):
            raise HTTPException(
                403,
                "This form has expired, or cookies are off: go back, load the page again and "
                "send it once more.",
            )

    def _finish(self, headers: MutableHeaders, scope: Scope, asked: Asked | None) -> None:
        """Add to an answer what every one of them carries."""
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        if self.site.secure:
            headers.setdefault("Strict-Transport-Security", "max-age=31536000")
        # Pages differ by who looks at them; they may be kept, but not shown without asking.
        if "cache-control" not in headers:
            headers["Cache-Control"] = "private, no-cache"
            headers.add_vary_header("Cookie")
        if asked is not None and asked.fresh_cookie is not None:
            set_cookie(headers, self.site, self.site.form_cookie, asked.fresh_cookie, None)


def set_cookie(
    headers: MutableHeaders, site: Site, name: str, value: str, seconds: int | None
) -> None:
    """Set a cookie that no script can read and no other site's forms send.

    ``seconds`` is its age; None keeps it until the browser is closed, and 0 takes it away.
    """
    response = Response()
    response.set_cookie(
        name, value, max_age=seconds, path="/", secure=site.secure, httponly=True, samesite="lax"
    )
    headers.append("set-cookie", response.headers["set-cookie"])


async def _read(headers: Headers, receive: Receive) -> bytes:
    """Read a body that is short, and arrives in time."""
    declared = headers.get("content-length", "0")
    too_large = HTTPException(413, f"A form holds at most {BODY_BYTES // 1024} KiB.")
    if not declared.isdecimal() or int(declared[:20]) > BODY_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise HTTPException(400, "The request broke off.")
                body += message.get("body", b"")
                if len(body) > BODY_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        raise HTTPException(408, "The form took too long to arrive.") from None


def _fields(headers: Headers, body: bytes) -> dict[str, str]:
    """Return the fields of a form; text only, with ends of lines as Unix has them."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not body:
        return {}
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "Send forms as application/x-www-form-urlencoded.")
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=FIELDS
        )
    except ValueError:
        raise HTTPException(400, "This form cannot be read.") from None
    fields = {name: value.replace("\r\n", "\n").replace("\r", "\n") for name, value in pairs}
    if any(_CONTROL.search(text) for pair in fields.items() for text in pair):
        raise HTTPException(400, "A form holds text, and no control characters.")
    return fields


def _replay(body: bytes, receive: Receive) -> Receive:
    """Hand a body that was read already to whoever reads it next."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again


async def _refusal(request: Request, refused: HTTPException) -> Response:
    """Answer as the application answers errors, where it has a way of its own."""
    handlers = getattr(request.scope.get("app"), "exception_handlers", {})
    handler = handlers.get(HTTPException)
    if handler is not None:
        response = handler(request, refused)
        if asyncio.iscoroutine(response):
            response = await response
        if isinstance(response, Response):
            return response
    text = refused.detail or HTTPStatus(refused.status_code).phrase
    return PlainTextResponse(f"{text}\n", refused.status_code, refused.headers)
