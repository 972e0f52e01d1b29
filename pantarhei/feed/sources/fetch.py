"""Asking arXiv politely: one connection, a pause between requests, patience with faults.

arXiv asks for at most one request every three seconds and a single connection at a time, over all
of a user's programs (Terms of Use for arXiv APIs). A lock file in the user's data folder makes
every pantarhei process of this user take turns, and keeps the time of the last request.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import httpx

from pantarhei.claims import library_versions
from pantarhei.errors import RequestError

T = TypeVar("T")

PAUSE = 3.0  # seconds between two requests, as arXiv asks
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_MOVED = (301, 302, 303, 307, 308)
_XML = ("application/atom+xml", "application/xml", "text/xml")


class SourceError(RequestError):
    """What a source could not give; the message has no full stop, for the caller to go on."""


class Unreadable(ValueError):
    """An answer that is not what the protocol promises: worth asking again."""


class _Fault(Exception):
    """A try that failed. ``pause`` is what the server asks to wait, in seconds."""

    def __init__(self, reason: str, pause: float = 0.0, *, offline: bool = False) -> None:
        super().__init__(reason)
        self.pause, self.offline = pause, offline


def address(variable: str, default: str) -> str:
    """Return a base address: ``default`` unless the environment names a mirror's."""
    value = os.environ.get(variable) or default
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise RequestError(
            f"{variable} is an http or https address without a query, not '{value}'."
        )
    return value


class Fetcher:
    """Fetches XML from one server after another, at their pace.

    ``lock`` is the file by which processes take turns. ``pause`` counts from the end of a request
    to the beginning of the next; arXiv's own hosts never get less than :data:`PAUSE`. A fault is
    asked again ``tries`` times in all, waiting 5, 10, 20, ... seconds or as long as the server
    asks, up to ``patience``. An answer of more than ``limit`` bytes, or that takes longer than
    ``deadline`` seconds, is a fault. ``clock`` (UTC seconds) and ``sleep`` stand in for time in
    tests; ``say`` is told of every wait that is not the usual pause.
    """

    def __init__(
        self,
        lock: str | os.PathLike[str],
        *,
        pause: float | None = None,
        tries: int = 5,
        patience: float = 900.0,
        limit: int = 64 * 2**20,
        timeout: float = 30.0,
        deadline: float = 300.0,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.lock, self.pause = Path(lock), _pause() if pause is None else pause
        self.tries, self.patience, self.limit, self.deadline = tries, patience, limit, deadline
        self.clock, self.sleep, self.say = clock, sleep, say
        self._answered = False
        self._client = httpx.Client(
            headers={
                "User-Agent": f"pantarhei/{library_versions()['pantarhei']} (research feed reader)",
                "Accept": ", ".join(_XML),
                "Accept-Encoding": "gzip",
            },
            timeout=timeout,
            # No connection is kept: between two requests another process may have its turn.
            limits=httpx.Limits(max_connections=1, max_keepalive_connections=0),
        )

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, url: str, parameters: Mapping[str, str], read: Callable[[bytes], T]) -> T:
        """Fetch ``url`` with ``parameters`` and return what ``read`` makes of its content.

        ``read`` raises :class:`Unreadable` for content that may be better the next time. Raises
        :class:`SourceError` where there is no network, where the server refuses, and when the last
        try has failed.
        """
        host = urlsplit(url).hostname
        for attempt in range(self.tries):
            try:
                return read(self._follow(str(httpx.URL(url, params=dict(parameters)))))
            except (_Fault, Unreadable) as error:
                fault = error if isinstance(error, _Fault) else _Fault(str(error))
            if fault.offline and not self._answered:
                raise SourceError(
                    f"{host} cannot be reached ({fault}): see that this machine is on the network"
                )
            if fault.pause > self.patience:
                raise SourceError(
                    f"{host} asks to be left alone for {math.ceil(fault.pause / 60)} minutes "
                    f"({fault}): come again then"
                )
            if attempt + 1 < self.tries:
                wait = max(fault.pause, 5.0 * 2**attempt)
                self.say(f"{host}: {fault}; asking again in {wait:.0f} s.")
                self.sleep(wait)
        raise SourceError(f"{host} did not answer properly in {self.tries} tries ({fault})")

    def _follow(self, url: str) -> bytes:
        """Fetch one address, following up to three redirections among arXiv's own hosts."""
        for _ in range(4):
            with self._turn(urlsplit(url).hostname or ""):
                answer = self._ask(url)
            if isinstance(answer, bytes):
                return answer
            before, after = urlsplit(url), urlsplit(str(httpx.URL(url).join(answer)))
            if not _may_follow(before.hostname, after.hostname) or after.scheme not in (
                before.scheme,
                "https",
            ):
                raise SourceError(
                    f"{before.hostname} sends us to '{after.scheme}://{after.hostname}', "
                    "which is none of its own addresses"
                )
            url = after.geturl()
        raise _Fault("redirected in circles")

    def _ask(self, url: str) -> bytes | str:
        """Make one request; return its content, or the address it was moved to."""
        try:
            with self._client.stream("GET", url) as response:
                self._answered = True
                status = response.status_code
                if status in _MOVED and (moved := response.headers.get("location")):
                    return str(moved)
                if status in _AGAIN:
                    raise _Fault(f"HTTP status {status}", self._retry_after(response))
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                # arXiv's API explains a wrong request in an Atom document with status 400.
                if status not in (200, 400) or (status == 400 and kind not in _XML):
                    raise SourceError(f"{response.url.host} refuses with HTTP status {status}")
                if kind not in _XML:
                    shown = re.sub(r"[^\w/+.-]", "", kind)[:40] or "something unnamed"
                    raise _Fault(f"it sent {shown} instead of XML")
                return self._content(response)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            raise _Fault(_reason(error), offline=True) from error
        except httpx.InvalidURL as error:
            raise SourceError("it redirects to what is no address") from error
        except httpx.TransportError as error:
            raise _Fault(_reason(error)) from error

    def _content(self, response: httpx.Response) -> bytes:
        """Read a body within the limits of size and time, whatever it unpacks to."""
        encoding = response.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip"):
            raise _Fault("it sent an encoding that was not asked for")
        unpack = zlib.decompressobj(wbits=31) if encoding == "gzip" else None
        # iter_raw keeps a small compressed chunk from unpacking to any size at once
        until, content = time.monotonic() + self.deadline, bytearray()
        try:
            for chunk in response.iter_raw():
                room = self.limit - len(content) + 1
                content += unpack.decompress(chunk, room) if unpack else chunk[:room]
                if len(content) > self.limit:
                    raise SourceError(
                        f"{response.url.host} sent more than {self.limit:,} bytes in one answer: "
                        "ask for fewer days"
                    )
                if time.monotonic() > until:
                    raise _Fault(f"its answer took more than {self.deadline:.0f} s")
        except zlib.error as error:
            raise _Fault("its answer is damaged") from error
        if unpack and not unpack.eof:
            raise _Fault("its answer breaks off")
        return bytes(content)

    def _retry_after(self, response: httpx.Response) -> float:
        """Read Retry-After: seconds, or a date."""
        value = response.headers.get("retry-after", "").strip()
        if re.fullmatch(r"\d{1,9}", value):
            return float(value)
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - self.clock())
        except (TypeError, ValueError, OverflowError):
            return 0.0

    @contextmanager
    def _turn(self, host: str) -> Iterator[None]:
        """Wait for this user's other processes, then for the pause since their last request."""
        pause = max(self.pause, PAUSE) if _is_arxiv(host) else self.pause
        try:
            self.lock.parent.mkdir(parents=True, exist_ok=True)
            file = self.lock.open("a+")
        except OSError as error:
            raise RequestError(
                f"'{self.lock}' cannot be written ({error.strerror}): set PANTARHEI_HOME to a "
                "folder that can."
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            try:
                last = float(file.read(40))
            except ValueError:
                last = -math.inf
            # A clock that was set back must not stop us for longer than the pause.
            wait = min(last + pause - self.clock(), pause)
            if wait > 0:
                self.sleep(wait)
            try:
                yield
            finally:
                file.seek(0)
                file.truncate()
                file.write(repr(self.clock()))


def _pause() -> float:
    """Return the pause between requests; a mirror's owner may shorten it for the mirror."""
    text = os.environ.get("PANTARHEI_ARXIV_PAUSE", "")
    try:
        value = float(text) if text else PAUSE
    except ValueError:
        value = math.nan
    if not 0 <= value <= 3600:
        raise RequestError(f"PANTARHEI_ARXIV_PAUSE is a number of seconds, not '{text}'.")
    return value


def _is_arxiv(host: str) -> bool:
    return host == "arxiv.org" or host.endswith(".arxiv.org")


def _may_follow(before: str | None, after: str | None) -> bool:
    return bool(after) and (before == after or (_is_arxiv(before or "") and _is_arxiv(after or "")))


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "it takes too long"
    if isinstance(error, httpx.RemoteProtocolError):
        return "its answer breaks off"
    return " ".join(str(error).split())[:120] or type(error).__name__
