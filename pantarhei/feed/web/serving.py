"""The page as a process, or several: a socket first, then everything else.

The address is printed as soon as it is taken. Whoever comes before the page is ready waits in the
socket's queue, for about a second. Cards and results are loaded before the first answer; what a run
adds to the ledger later appears by itself.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from pantarhei.errors import RequestError
from pantarhei.feed.commands import say
from pantarhei.feed.store import Store
from pantarhei.feed.web import workers as several
from pantarhei.feed.web.security import Mode, Site, networks

if TYPE_CHECKING:
    from fastapi import FastAPI

_WORKERS = 64
_LOOK = 3.0  # seconds between looks at the ledger


@dataclass(frozen=True)
class Plan:
    """What is served, and to whom."""

    mode: Mode
    store: str | None = None
    public_url: str | None = None
    proxies: tuple[str, ...] = ()

    def check(self, host: str, workers: int) -> None:
        """Raise :class:`RequestError` for what cannot be meant."""
        Site(self.mode, self.public_url, b"", networks(self.proxies))
        if not 1 <= workers <= _WORKERS:
            raise RequestError(f"{workers} workers cannot serve: choose 1 to {_WORKERS}.")
        if self.mode == "local" and not _is_loopback(host):
            raise RequestError(
                f"At {host} everybody on the network would take part as you: leave --mine out, "
                "take --shared, or listen at 127.0.0.1."
            )


def serve(plan: Plan, host: str, port: int, workers: int = 1) -> None:
    """Serve until interrupted; see :func:`pantarhei.feed.commands.serve.serve`."""
    plan.check(host, workers)
    listening = _listen(host, port)
    try:
        with Store(plan.store) as store:
            print(f"The page is at {address(listening)} (Ctrl-C ends it).", flush=True)
            _load(store)
            over = threading.Event()
            threading.Thread(target=_follow, args=(store, over), daemon=True).start()
            try:
                if workers == 1:
                    _answer(plan, store, listening)
                else:
                    several.run(_work, plan, listening, workers)
            finally:
                over.set()
    finally:
        listening.close()


def address(listening: socket.socket) -> str:
    """Return where a socket is reached from this machine."""
    host, port = listening.getsockname()[:2]
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _answer(plan: Plan, store: Store, listening: socket.socket) -> None:
    config = uvicorn.Config(
        _application(plan, store),
        loop="asyncio",  # others do not accept as workers.Handed does
        log_level="warning",
        access_log=False,
        server_header=False,
        # The guard reads X-Forwarded-For itself, as far as it can be believed.
        proxy_headers=False,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _work(plan: Plan, handed: socket.socket) -> None:
    """Answer in a process of several."""
    with Store(plan.store) as store:
        _answer(plan, store, handed)


def _application(plan: Plan, store: Store) -> FastAPI:
    from pantarhei.feed import mail
    from pantarhei.feed.outbox import Sender
    from pantarhei.feed.web.app import create_app

    letterhead = sender = None
    if plan.mode == "shared" and (settings := mail.Settings.from_environment()):
        letterhead = mail.Letterhead(plan.public_url or "", store.secret, settings.sender)
        sender = Sender(store, settings)
    return create_app(
        store,
        mode=plan.mode,
        public_url=plan.public_url,
        proxies=networks(plan.proxies),
        letterhead=letterhead,
        sender=sender,
    )


def _listen(host: str, port: int) -> socket.socket:
    """Take the address, before anything else can fail."""
    if not 0 <= port < 65536:
        raise RequestError(f"{port} is no port: choose 0 to 65535.")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, where = found[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError):
        raise RequestError(f"'{host}' is no address of this machine: try 127.0.0.1.") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise RequestError(
            f"{host}, port {port}, cannot be listened at ({error.strerror}): choose another "
            "--port, or 0 for any that is free."
        ) from None
    return listening


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _load(store: Store) -> None:
    """Load cards and results; the page serves what it has where that fails."""
    from pantarhei.feed import loading

    try:
        loading.load(store)
    except RequestError as error:
        say(f"Not everything could be loaded: {error}")


def _follow(store: Store, over: threading.Event) -> None:
    """Load again when the ledger's file changes."""
    from pantarhei.claims import ledger_path

    path = ledger_path()
    known = _state(path)
    while not over.wait(_LOOK):
        now = _state(path)
        if now != known:
            known = now
            _load(store)


def _state(path: Path) -> tuple[Any, ...]:
    """Return what changes with a SQLite file: its size and time, and its log's."""
    found: list[Any] = []
    for file in (path, path.with_name(f"{path.name}-wal")):
        try:
            status = file.stat()
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)
