"""Subscriptions to new papers by mail, with double opt-in.

Whoever types an address into the form gets nothing but one message with a link sent there; papers
come once that link was followed (and its button pressed). Both links carry a signature instead of
a password: the one that confirms lasts a week, the one that ends a subscription for ever.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import sqlalchemy as sa
from itsdangerous import BadData, URLSafeSerializer

from pantarhei.errors import RequestError, nearest
from pantarhei.feed import outbox, people
from pantarhei.feed.mail import Letterhead, address, mailbox, note, one_line
from pantarhei.feed.schema import subscriptions
from pantarhei.feed.store import clean, insert, lock
from pantarhei.papers import WINGS

PERIODS = ("daily", "weekly")
KINDS = ("all", "wing", "tag", "search")
QUERY_LENGTH = 200
CONFIRM_SECONDS = 7 * 86400.0
# So that nobody's mailbox is filled from our form: messages that ask, to one mailbox in a day, and
# the least seconds between two about the same subscription.
PER_DAY, APART = 5, 600.0


@dataclass(frozen=True)
class Subscription:
    """One row of the subscriptions table; see :mod:`pantarhei.feed.schema` for each column."""

    id: int
    email: str
    period: str
    kind: str
    value: str
    created: float
    confirmed: float | None
    ended: float | None
    covered: float | None

    @property
    def active(self) -> bool:
        """Whether digests are sent."""
        return self.confirmed is not None and self.ended is None

    @property
    def topic(self) -> str:
        """What it is about, as words in a sentence.

        >>> Subscription(1, "ada@example.org", "daily", "tag", "exits", 0, 0, None, 0).topic
        'the tag “exits”'
        """
        return {
            "all": "all papers",
            "wing": f"the wing “{self.value}”",
            "tag": f"the tag “{self.value}”",
            "search": f"the search “{self.value}”",
        }[self.kind]


COLUMNS = tuple(subscriptions.c[field.name] for field in fields(Subscription))


def subscribe(
    c: sa.Connection,
    head: Letterhead,
    email: str,
    period: str,
    kind: str,
    value: str = "",
    *,
    now: float | None = None,
) -> bool:
    """Queue the message that asks an address whether it wants papers; return whether one was.

    None is where the subscription is there already, or where the last such message is younger
    than ten minutes: the caller should say the same in any case, since the answer is nobody else's
    concern. Raises :class:`RequestError` for what is no address or no subscription, and where five
    messages were queued for this mailbox within a day.
    """
    now = time.time() if now is None else now
    email = address(email)
    period, kind = _one_of("period", period, PERIODS), _one_of("kind", kind, KINDS)
    what = {"email": email, "period": period, "kind": kind, "value": _value(kind, value)}
    lock(c, f"mail to {mailbox(email)}")  # two requests at once ask once
    found = _asked(c, what, now)
    same_again = outbox.counted(c, "confirm", email, now - APART, f"{found.id}/")
    if found.active or same_again:
        return False
    if outbox.counted(c, "confirm", email, now - 86400.0) >= PER_DAY:
        raise RequestError(
            "Several messages were sent to this address today: look for them where your mail "
            "program puts spam, or try again tomorrow."
        )
    token = _confirming(head.secret).dumps([found.id, found.created])
    message = note(
        head,
        email,
        f"Confirm: {found.topic}, {period}",
        link=head.link("subscribe", "confirm", token),
        label="Yes, send me these",
        lines=(
            f"Somebody, hopefully you, asked {head.host} to send this address new papers and "
            f"newly measured claims about {found.topic}, {period}.",
            "If it was not you, ignore this message: nothing else will come. "
            "The link works for a week.",
        ),
    )
    key = outbox.key_to("confirm", email, f"{found.id}/{now!r}")
    return outbox.put(c, key, email, message, secret=head.secret, now=now)


def confirm(c: sa.Connection, secret: str, token: str, *, now: float | None = None) -> Subscription:
    """Begin a subscription whose link was followed; twice is once.

    Raises :class:`RequestError` for a link that is not ours or older than a week, or whose
    subscription was ended since.
    """
    now = time.time() if now is None else now
    id, created = _read(_confirming(secret), token)
    mine = sa.and_(subscriptions.c.id == id, subscriptions.c.created == created)
    open_ = sa.and_(subscriptions.c.confirmed.is_(None), subscriptions.c.ended.is_(None))
    if now - created <= CONFIRM_SECONDS:
        c.execute(sa.update(subscriptions).where(mine, open_).values(confirmed=now, covered=now))
    row = c.execute(sa.select(*COLUMNS).where(mine)).first()
    if row is None or not Subscription(*row).active:
        raise RequestError("This link is spent or too old: subscribe again.")
    return Subscription(*row)


def unsubscribe(
    c: sa.Connection, secret: str, token: str, *, now: float | None = None
) -> Subscription | None:
    """End a subscription by its link; twice is once, and nothing that waits is sent any more.

    Returns None where it was forgotten since. Raises :class:`RequestError` for a link that is not
    ours.
    """
    now = time.time() if now is None else now
    id, mark = _read(_ending(secret), token)
    row = c.execute(sa.select(*COLUMNS).where(subscriptions.c.id == id)).first()
    if row is None or _mark(row.email) != mark:
        return None
    return end(c, Subscription(*row), now=now)


def end(c: sa.Connection, given: Subscription, *, now: float | None = None) -> Subscription:
    """End a subscription: nothing that waits for it is sent any more."""
    now = time.time() if now is None else now
    mine = sa.and_(subscriptions.c.id == given.id, subscriptions.c.ended.is_(None))
    c.execute(sa.update(subscriptions).where(mine).values(ended=now))
    outbox.drop(c, f"digest/{given.id}/", now=now)
    return Subscription(*c.execute(sa.select(*COLUMNS).where(subscriptions.c.id == given.id)).one())


def of(c: sa.Connection, email: str) -> list[Subscription]:
    """Return an address's subscriptions that are confirmed and not ended, oldest first."""
    mine = sa.and_(subscriptions.c.email == address(email), _active())
    found = c.execute(sa.select(*COLUMNS).where(mine).order_by(subscriptions.c.id))
    return [Subscription(*row) for row in found]


def active(c: sa.Connection, period: str | None = None) -> list[Subscription]:
    """Return all subscriptions that are confirmed and not ended."""
    query = sa.select(*COLUMNS).where(_active()).order_by(subscriptions.c.id)
    if period is not None:
        query = query.where(subscriptions.c.period == _one_of("period", period, PERIODS))
    return [Subscription(*row) for row in c.execute(query)]


def forget(c: sa.Connection, *, now: float | None = None) -> None:
    """Delete what was never confirmed and cannot be any more: it is a stranger's address."""
    now = time.time() if now is None else now
    old = subscriptions.c.created < now - CONFIRM_SECONDS
    c.execute(sa.delete(subscriptions).where(subscriptions.c.confirmed.is_(None), old))


def unsubscribe_link(head: Letterhead, given: Subscription) -> str:
    """Return the address whose page, or one POST (RFC 8058), ends a subscription."""
    token = _ending(head.secret).dumps([given.id, _mark(given.email)])
    return head.link("unsubscribe", token)


def _asked(c: sa.Connection, what: Mapping[str, str], now: float) -> Subscription:
    """Return the subscription, made where it is not there; one that ended begins anew."""
    statement = insert(c, subscriptions).on_conflict_do_nothing()
    c.execute(statement.values(**what, created=now))
    same = sa.and_(*(subscriptions.c[name] == given for name, given in what.items()))
    # Links that were mailed before mean the subscription as it was then: they end here. One that
    # is asked for twice in a day keeps its link, whichever of the messages is opened.
    over = sa.or_(
        subscriptions.c.ended.is_not(None),
        sa.and_(subscriptions.c.confirmed.is_(None), subscriptions.c.created < now - 86400.0),
    )
    anew = {"created": now, "confirmed": None, "ended": None, "covered": None}
    c.execute(sa.update(subscriptions).where(same, over).values(anew))
    return Subscription(*c.execute(sa.select(*COLUMNS).where(same)).one())


def _active() -> sa.ColumnElement[bool]:
    return sa.and_(subscriptions.c.confirmed.is_not(None), subscriptions.c.ended.is_(None))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        given = one_line(clean(value), 40)
        raise RequestError(
            f"Unknown {name} '{given}': choose {', '.join(known)}.{nearest(given, known)}"
        )
    return value


def _value(kind: str, value: str) -> str:
    """Check what is subscribed to and return it as it is kept."""
    if kind == "all":
        return ""
    if kind == "wing":
        return _one_of("wing", value, WINGS)
    if kind == "tag":
        return people.tag_name(value)
    query = one_line(clean(value), QUERY_LENGTH + 1)
    if not 1 <= len(query) <= QUERY_LENGTH:
        raise RequestError(f"A search that is saved has 1 to {QUERY_LENGTH} characters.")
    return query


def _confirming(secret: str) -> URLSafeSerializer:
    # The time is in what is signed, the subscription's own: a new request ends older links.
    return _signer(secret, "subscribe")


def _ending(secret: str) -> URLSafeSerializer:
    return _signer(secret, "unsubscribe")


def _signer(secret: str, purpose: str) -> URLSafeSerializer:
    digest = {"digest_method": hashlib.sha256}
    return URLSafeSerializer(secret, salt=f"pantarhei {purpose}", signer_kwargs=digest)


def _read(signer: URLSafeSerializer, token: str) -> tuple[int, Any]:
    try:
        id, rest = signer.loads(token[:500])
    except (BadData, UnicodeError):
        raise RequestError("This link is not complete: copy all of it from the message.") from None
    return id, rest


def _mark(email: str) -> str:
    """Return what ties a link to its address: a number alone may be used again one day."""
    return hashlib.sha256(email.encode()).hexdigest()[:12]
