"""The outbox: messages that wait in the store until a mail server has taken them.

A message is queued in the transaction that makes it due, and at most once: its key says what it is.
To send it, a process *leases* it (a time until which it is that process's alone, prolonged while
the process lives), hands it over, and writes down that it is sent. A process that dies leaves a
lease that runs out, and another sends the message. So a crash loses nothing, and doubles nothing
save in one place that SMTP itself leaves open: between the server's 250 and our commit nobody can
know. The message sent again then has the same ``Message-ID``, by which most mail programs show it
once.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import format_datetime

import sqlalchemy as sa

from pantarhei.errors import RequestError
from pantarhei.feed.mail import (
    Connection,
    Deferred,
    Lost,
    Refused,
    Settings,
    Unavailable,
    address,
    mailbox,
)
from pantarhei.feed.schema import outbox
from pantarhei.feed.store import Store, insert

LEASE = 120.0  # seconds that a dead sender's message waits for another
# Retries after 1, 2, 4 ... minutes, then every 8 hours: given up after about four days, as
# RFC 5321 (4.5.4.1) asks.
ATTEMPTS = 20
_FIRST, _LONGEST = 60.0, 8 * 3600.0
_HANG_UPS = 3  # in a row without an answer: the server, rather than a message, is the trouble
_KEPT = 90 * 86400.0  # seconds for which a finished message's row stays, without its content

_log = logging.getLogger(__name__)


def delay(attempts: int) -> float:
    """Return the seconds to wait after so many attempts in vain.

    >>> [delay(n) / 60 for n in (1, 2, 3, 9, 10, 20)]
    [1.0, 2.0, 4.0, 256.0, 480.0, 480.0]
    """
    return min(_FIRST * 2.0 ** (attempts - 1), _LONGEST)


@dataclass(frozen=True)
class Sent:
    """What :meth:`Outbox.send_due` did; ``trouble`` is why the server could not be used."""

    sent: int = 0
    deferred: int = 0
    failed: int = 0
    trouble: str | None = None

    def __str__(self) -> str:
        return f"{self.sent} sent, {self.deferred} put off, {self.failed} given up."


@dataclass
class _Lease:
    id: int
    recipient: str
    message: bytes
    attempts: int  # with this one
    until: float


class Outbox:
    """The messages of one store. ``clock`` returns UTC seconds."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.clock = clock
        self._secret = store.secret  # read now: it cannot be within a transaction

    def put(self, c: sa.Connection, key: str, recipient: str, message: EmailMessage) -> bool:
        """Queue a message in the caller's transaction; see :func:`put`."""
        return put(c, key, recipient, message, secret=self._secret, now=self.clock())

    def waiting(self) -> int:
        """Return how many messages are neither sent nor given up."""
        with self.store.read() as c:
            query = sa.select(sa.func.count()).select_from(outbox).where(_waiting())
            return int(c.execute(query).scalar_one())

    def send_due(self, settings: Settings, *, going_on: Callable[[], bool] = lambda: True) -> Sent:
        """Send every message that is due; return what became of them.

        Any number of processes may do so at once. A 4xx answer or a broken connection puts a
        message off (:func:`delay`), :data:`ATTEMPTS` of them or a 5xx answer give it up, and a
        server that cannot be used puts off all that are due. ``going_on`` is asked between
        messages.
        """
        sent = deferred = failed = silent = 0
        with Connection(settings) as connection:
            while going_on() and (lease := self._lease()):
                try:
                    with self._kept(lease) as ours:
                        connection.send(lease.recipient, lease.message, ours)
                    sent += self._done(lease, sent=self.clock(), error=None)
                    silent = 0
                except Unavailable as error:
                    put_off, given_up = self._put_off_all(lease, str(error))
                    return Sent(sent, deferred + put_off, failed + given_up, str(error))
                except Deferred as error:
                    given_up = self._put_off(lease, str(error))
                    failed, deferred = failed + given_up, deferred + (not given_up)
                    silent = silent + 1 if connection.broken else 0
                    if silent == _HANG_UPS:
                        return Sent(sent, deferred, failed, str(error))
                except Refused as error:
                    failed += self._done(lease, failed=self.clock(), error=str(error))
                    silent = 0
                except Lost:
                    continue
        self._forget()
        return Sent(sent, deferred, failed)

    def _due(self, now: float) -> sa.ColumnElement[bool]:
        free = sa.or_(outbox.c.leased.is_(None), outbox.c.leased <= now)
        return sa.and_(_waiting(), outbox.c.due <= now, free)

    def _lease(self) -> _Lease | None:
        """Take the message that is due for longest, or None where nothing is."""
        now = self.clock()
        columns = (outbox.c.id, outbox.c.recipient, outbox.c.message, outbox.c.attempts)
        query = sa.select(*columns).where(self._due(now)).order_by(outbox.c.due, outbox.c.id)
        query = query.limit(1)
        # Looked at before anything is locked: most of the time nothing is due.
        with self.store.read() as c:
            if c.execute(query).first() is None:
                return None
        with self.store.write() as c:
            row = c.execute(query.with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            lease = _Lease(row.id, row.recipient, row.message, row.attempts + 1, now + LEASE)
            values = {"leased": lease.until, "attempts": lease.attempts}
            c.execute(sa.update(outbox).where(outbox.c.id == lease.id).values(values))
        return lease

    @contextmanager
    def _kept(self, lease: _Lease) -> Iterator[Callable[[], bool]]:
        """Prolong a lease while the block runs; yield what says whether it is still ours."""
        turn, over = threading.Lock(), threading.Event()

        def prolong() -> bool:
            with turn:
                until = max(self.clock() + LEASE, lease.until)
                if not self._update(lease, leased=until):
                    return False
                lease.until = until
                return True

        def keep() -> None:
            while not over.wait(LEASE / 4):
                try:
                    if not prolong():
                        return
                except Exception:  # the store is out of reach: the next turn may find it
                    _log.warning("A message's lease could not be prolonged.", exc_info=True)

        keeper = threading.Thread(target=keep, name="pantarhei-lease", daemon=True)
        keeper.start()
        try:
            yield prolong
        finally:
            over.set()
            keeper.join()

    def _update(self, lease: _Lease, **values: float | str | bytes | None) -> bool:
        """Change a leased message; return False where the lease is not ours any more."""
        # A lease that ran out is followed by one that ends later: its end tells whose it is.
        mine = sa.and_(outbox.c.id == lease.id, outbox.c.leased == lease.until)
        with self.store.write() as c:
            return c.execute(sa.update(outbox).where(mine).values(values)).rowcount == 1

    def _done(self, lease: _Lease, **values: float | str | None) -> bool:
        """Finish a message. Its content, with the links that it gave, is not kept.

        A store that is out of reach is tried again: what is sent and not written down is doubled.
        """
        for pause in (1.0, 2.0, 4.0, 8.0):
            try:
                return self._update(lease, **values, leased=None, message=b"")
            except RequestError:
                time.sleep(pause)
        return self._update(lease, **values, leased=None, message=b"")

    def _put_off(self, lease: _Lease, error: str) -> bool:
        """Put a message off; return True where it was given up."""
        if lease.attempts >= ATTEMPTS:
            return self._done(lease, failed=self.clock(), error=error)
        self._update(lease, due=self.clock() + delay(lease.attempts), leased=None, error=error)
        return False

    def _put_off_all(self, lease: _Lease, error: str) -> tuple[int, int]:
        """Put off this message and all others that are due: each would have met the same.

        Return how many were put off and given up.
        """
        given_up = int(self._put_off(lease, error))
        now = self.clock()
        retries = {n: now + delay(n + 1) for n in range(ATTEMPTS)}
        others = {
            "due": sa.case(retries, value=outbox.c.attempts, else_=now),
            "attempts": outbox.c.attempts + 1,
            "error": error,
        }
        over = {"failed": now, "message": b"", "error": error}
        with self.store.write() as c:
            last = sa.and_(self._due(now), outbox.c.attempts + 1 >= ATTEMPTS)
            failed = c.execute(sa.update(outbox).where(last).values(over)).rowcount
            put_off = c.execute(sa.update(outbox).where(self._due(now)).values(others)).rowcount
        return put_off + 1 - given_up, failed + given_up

    def _forget(self) -> None:
        """Delete finished messages' rows once they are old."""
        before = self.clock() - _KEPT
        old = sa.or_(outbox.c.sent < before, outbox.c.failed < before)
        with self.store.read() as c:
            if c.execute(sa.select(outbox.c.id).where(old).limit(1)).first() is None:
                return
        with self.store.write() as c:
            c.execute(sa.delete(outbox).where(old))


def put(
    c: sa.Connection,
    key: str,
    recipient: str,
    message: EmailMessage,
    *,
    secret: str,
    now: float | None = None,
) -> bool:
    """Queue a message in the caller's transaction; return False where ``key`` is known.

    Raises :class:`RequestError` where ``recipient`` is no address.
    """
    now = time.time() if now is None else now
    row = {
        "key": key,
        "recipient": address(recipient),
        "message": seal(message, key, secret=secret, now=now),
        "created": now,
        # What a person waits for goes before any number of digests.
        "due": now if message["Precedence"] == "bulk" else 0.0,
    }
    statement = insert(c, outbox).on_conflict_do_nothing(index_elements=["key"])
    return c.execute(statement.values(row).returning(outbox.c.id)).first() is not None


def seal(message: EmailMessage, key: str, *, secret: str, now: float) -> bytes:
    """Give a message its ``Date`` and ``Message-ID``; return the whole as it is sent.

    The latter is made from the key and the store's secret alone: the same whenever it is sent.
    """
    mark = hmac.new(secret.encode(), f"message {key}".encode(), hashlib.sha256).hexdigest()[:40]
    del message["Message-ID"], message["Date"]
    message["Message-ID"] = f"<{mark}@{message['From'].addresses[0].domain}>"
    message["Date"] = format_datetime(datetime.fromtimestamp(int(now), UTC))
    return message.as_bytes()


def counted(c: sa.Connection, kind: str, email: str, since: float, rest: str = "") -> int:
    """Count the messages whose keys begin as :func:`key_to` says, queued since ``since``."""
    mine = outbox.c.key.startswith(key_to(kind, email, rest), autoescape=True)
    query = sa.select(sa.func.count()).where(mine, outbox.c.created > since)
    return int(c.execute(query).scalar_one())


def drop(c: sa.Connection, prefix: str, *, now: float | None = None) -> None:
    """Forget what is queued under keys that begin so, unless it is being sent just now."""
    idle = sa.or_(outbox.c.leased.is_(None), outbox.c.leased <= (now or time.time()))
    mine = outbox.c.key.startswith(prefix, autoescape=True)
    c.execute(sa.delete(outbox).where(mine, idle, _waiting()))


def key_to(kind: str, email: str, rest: str) -> str:
    """Return a key for a message whose number per mailbox is limited (:func:`counted`).

    >>> key_to("login", "ada+1@example.org", "x") == key_to("login", "Ada@example.org", "x")
    True
    """
    return f"{kind}/{mailbox(email)}/{rest}"


def _waiting() -> sa.ColumnElement[bool]:
    return sa.and_(outbox.c.sent.is_(None), outbox.c.failed.is_(None))


class Sender:
    """A thread that sends what is due, for as long as the page is served.

    >>> import tempfile
    >>> with Store(tempfile.mkdtemp() + "/feed.sqlite") as store:
    ...     settings = Settings("localhost", "noreply@example.org", tls="none")
    ...     sender = Sender(store, settings)
    ...     sender.start()
    ...     sender.stop()
    """

    def __init__(self, store: Store, settings: Settings, *, seconds: float = 5.0) -> None:
        self.outbox = Outbox(store)
        self.settings = settings
        self.seconds = seconds
        self._awake = threading.Event()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; once is enough."""
        if self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._run, name="pantarhei-mail", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Look at once: something was queued."""
        self._awake.set()

    def stop(self, patience: float = 30.0) -> None:
        """End, after the message in hand; a server that is slower than ``patience`` is left.

        Such a message is sent again later, when its lease has run out.
        """
        self._over.set()
        self._awake.set()
        if self._thread is not None:
            self._thread.join(patience)
            self._thread = None

    def _run(self) -> None:
        while not self._over.is_set():
            self._awake.clear()
            try:
                done = self.outbox.send_due(self.settings, going_on=lambda: not self._over.is_set())
                if done.trouble:
                    _log.warning("Mail waits: %s", done.trouble)
                if done.failed:
                    _log.warning("Messages given up: %d", done.failed)
            except RequestError as error:  # the store is out of reach, for now
                _log.warning("Mail waits: %s", error)
            except Exception:
                _log.exception("Mail waits: this is a defect of pantarhei.")
            self._awake.wait(self.seconds)
