"""People: accounts without passwords, and what they give to papers.

Whoever opens a link that was mailed to an address has its account. Of the link, and of the session
that it opens, only a hash is kept. Votes, comments and heat of a paper are counted again in the
transaction that changes them (:func:`pantarhei.feed.trends.keep_in_step`).

``account`` and ``paper`` are identifiers throughout; what is wrong raises :class:`RequestError`.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from pantarhei.errors import RequestError
from pantarhei.feed import papers, schema, trends
from pantarhei.feed.papers import Page
from pantarhei.feed.store import clean, insert, lock

LOCAL = "you@localhost"  # the one reader of a page on one's own machine; no mail goes there
LINK_SECONDS = 15 * 60.0
SESSION_SECONDS = 30 * 86400.0
COMMENT_LENGTH, NAME_LENGTH, TAG_LENGTH, TAGS = 10_000, 50, 40, 20


@dataclass(frozen=True)
class Account:
    """Who takes part. ``name`` stands beside comments, ``email`` is nobody else's concern."""

    id: int
    email: str
    name: str


@dataclass(frozen=True)
class Comment:
    """A comment; ``body`` is Markdown as it was written, and not safe to show as it is."""

    id: int
    paper: int
    account: int
    name: str
    body: str
    created: float
    changed: float | None


@dataclass(frozen=True)
class Mine:
    """What an account gave to some papers: those it voted for, saved, and its tags of each."""

    votes: frozenset[int]
    saved: frozenset[int]
    tags: dict[int, tuple[str, ...]]


# --- accounts ------------------------------------------------------------------------------------


def address(email: str) -> str:
    """Return an e-mail address in lower case; what is none raises :class:`RequestError`.

    >>> address(" Ada@Example.org ")
    'ada@example.org'
    """
    text = email.strip().lower()
    word = r"[^\s@<>()\[\],;:\\\"\x00-\x1f\x7f]+"
    if len(text) > 254 or clean(text) != text or not re.fullmatch(rf"{word}@{word}\.{word}", text):
        raise RequestError(f"'{clean(text)[:100]}' is not an e-mail address: check it.")
    return text


def account(c: sa.Connection, email: str, *, now: float | None = None) -> Account:
    """Return the account of an address, :data:`LOCAL` included; it is made where there is none."""
    email = LOCAL if email == LOCAL else address(email)
    accounts = schema.accounts
    row = {"email": email, "name": email.partition("@")[0][:NAME_LENGTH], "created": _now(now)}
    c.execute(insert(c, accounts).on_conflict_do_nothing(), row)
    found = _account(c, accounts.c.email == email)
    assert found is not None
    return found


def rename(c: sa.Connection, account: int, name: str) -> None:
    """Change the name that stands beside an account's comments."""
    name = " ".join(clean(name).split())
    if not 1 <= len(name) <= NAME_LENGTH or not name.isprintable():
        raise RequestError(f"A name has 1 to {NAME_LENGTH} characters: choose another one.")
    accounts = schema.accounts
    c.execute(sa.update(accounts).where(accounts.c.id == account).values(name=name))


def forget(c: sa.Connection, account: int) -> None:
    """Remove an account with everything it gave."""
    accounts, tokens = schema.accounts, schema.tokens
    lock(c, "papers")
    # held, so that it gives nothing more meanwhile
    c.execute(sa.select(accounts.c.id).where(accounts.c.id == account).with_for_update())
    touched: set[int] = set()
    for table in (schema.votes, schema.comments):
        touched |= set(c.scalars(sa.select(table.c.paper).where(table.c.account == account)))
    email = sa.select(accounts.c.email).where(accounts.c.id == account).scalar_subquery()
    c.execute(sa.delete(tokens).where(tokens.c.email == email))
    c.execute(sa.delete(accounts).where(accounts.c.id == account))
    trends.keep_in_step(c, touched)


def login_token(c: sa.Connection, email: str, *, now: float | None = None) -> str:
    """Return a token for a link that logs an address in: once, within 15 minutes."""
    tokens = schema.tokens
    c.execute(sa.delete(tokens).where(tokens.c.expires < _now(now)))
    return _token(c, "login", address(email), LINK_SECONDS, _now(now))


def login_email(c: sa.Connection, token: str, *, now: float | None = None) -> str | None:
    """Return whom a login token is for, without using it; None where it is not valid."""
    return c.scalar(sa.select(schema.tokens.c.email).where(*_valid("login", token, _now(now))))


def log_in(c: sa.Connection, token: str, *, now: float | None = None) -> tuple[Account, str] | None:
    """Use a login token: return the account and its new session's token, None where not valid."""
    tokens, moment = schema.tokens, _now(now)
    using = sa.update(tokens).where(*_valid("login", token, moment)).values(used=moment)
    email = c.scalar(using.returning(tokens.c.email))
    if email is None:
        return None
    return account(c, email, now=now), _token(c, "session", email, SESSION_SECONDS, moment)


def session(c: sa.Connection, token: str, *, now: float | None = None) -> Account | None:
    """Return whose session a token is; None where it is none, ended or older than 30 days."""
    email = sa.select(schema.tokens.c.email).where(*_valid("session", token, _now(now)))
    return _account(c, schema.accounts.c.email == email.scalar_subquery())


def log_out(c: sa.Connection, token: str) -> None:
    """End a session."""
    tokens = schema.tokens
    c.execute(sa.delete(tokens).where(tokens.c.hash == _hash(token), tokens.c.purpose == "session"))


def _token(c: sa.Connection, purpose: str, email: str, lasts: float, now: float) -> str:
    token = secrets.token_urlsafe(32)
    row = {"hash": _hash(token), "purpose": purpose, "email": email, "created": now}
    c.execute(sa.insert(schema.tokens), row | {"expires": now + lasts})
    return token


def _valid(purpose: str, token: str, now: float) -> list[sa.ColumnElement[bool]]:
    tokens = schema.tokens
    # What is looked up is a hash: how long that takes tells nothing about a token.
    conditions = (tokens.c.hash == _hash(token), tokens.c.purpose == purpose)
    return [*conditions, tokens.c.used.is_(None), tokens.c.expires > now]


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()


def _account(c: sa.Connection, condition: sa.ColumnElement[bool]) -> Account | None:
    accounts = schema.accounts
    columns = accounts.c.id, accounts.c.email, accounts.c.name
    row = c.execute(sa.select(*columns).where(condition)).first()
    return None if row is None else Account(*row)


def _now(now: float | None) -> float:
    return time.time() if now is None else now


# --- votes, lists, tags --------------------------------------------------------------------------


def vote(
    c: sa.Connection, account: int, paper: int, on: bool = True, *, now: float | None = None
) -> int:
    """Vote for a paper, or take the vote back; return the paper's votes. Twice is once."""
    _hold(c, paper)
    _give(c, schema.votes, account, paper, on, {"created": _now(now)})
    trends.keep_in_step(c, [paper])
    return c.execute(
        sa.select(schema.papers.c.votes).where(schema.papers.c.id == paper)
    ).scalar_one()


def save(
    c: sa.Connection, account: int, paper: int, on: bool = True, *, now: float | None = None
) -> None:
    """Put a paper on an account's own list, or take it off."""
    _hold(c, paper)
    _give(c, schema.saved, account, paper, on, {"created": _now(now)})


def saved(c: sa.Connection, account: int, *, after: str | None = None, limit: int = 50) -> Page:
    """Return an account's own list, what was saved last first; see :func:`papers.listing`."""
    if not 1 <= limit <= papers.MOST:
        raise RequestError(f"{limit} papers cannot be listed at once: choose 1 to {papers.MOST}.")
    table = schema.saved
    order = table.c.created, table.c.paper
    statement = sa.select(*order).where(table.c.account == account)
    if after is not None:
        place = sa.tuple_(*map(sa.literal, papers.unfold("created", after)))
        statement = statement.where(sa.tuple_(*order) < place)
    statement = statement.order_by(*(column.desc() for column in order)).limit(limit + 1)
    found = c.execute(statement).all()
    shown = found[:limit]
    more = papers.fold(*shown[-1]) if len(found) > limit else None
    return Page(tuple(papers.by_id(c, [row.paper for row in shown])), more)


def tag(c: sa.Connection, account: int, paper: int, name: str, on: bool = True) -> str:
    """Tag a paper, or take the tag off; return the tag as it is kept (see :func:`tag_name`)."""
    name = tag_name(name)
    _hold(c, paper)
    table = schema.tags
    if on:
        mine = (table.c.account == account, table.c.paper == paper, table.c.tag != name)
        count = sa.select(sa.func.count()).select_from(table).where(*mine)
        if c.execute(count).scalar_one() >= TAGS:
            raise RequestError(f"A paper takes {TAGS} tags from each reader: take one off first.")
    _give(c, table, account, paper, on, {"tag": name}, table.c.tag == name)
    return name


def tag_name(text: str) -> str:
    """Return a tag as it is kept: in lower case, words joined by dashes.

    >>> tag_name(" Early  Exit ")
    'early-exit'
    """
    name = "-".join(unicodedata.normalize("NFKC", clean(text)).casefold().split())
    if not 1 <= len(name) <= TAG_LENGTH or not re.fullmatch(r"\w[\w.+-]*", name):
        raise RequestError(
            f"'{clean(text)[:100]}' is not a tag: use up to {TAG_LENGTH} letters, digits, "
            "dashes, dots and plus signs."
        )
    return name


def tags(c: sa.Connection, paper: int | None = None, *, limit: int = 100) -> list[tuple[str, int]]:
    """Return the tags of a paper, or of all, each with how often it was given; those first."""
    table = schema.tags
    count = sa.func.count()
    statement = sa.select(table.c.tag, count).group_by(table.c.tag)
    if paper is not None:
        statement = statement.where(table.c.paper == paper)
    found = c.execute(statement.order_by(count.desc(), table.c.tag).limit(limit))
    return [(tag, times) for tag, times in found]


def voted(c: sa.Connection, account: int, ids: Sequence[int]) -> frozenset[int]:
    """Return which of some papers an account has voted for."""
    votes = schema.votes
    conditions = votes.c.account == account, votes.c.paper.in_(ids)
    return frozenset(c.scalars(sa.select(votes.c.paper).where(*conditions)))


def mine(c: sa.Connection, account: int, ids: Sequence[int]) -> Mine:
    """Return what an account gave to some papers."""

    def given(table: sa.Table, *columns: sa.Column[Any]) -> Sequence[sa.Row[Any]]:
        conditions = table.c.account == account, table.c.paper.in_(ids)
        return c.execute(sa.select(table.c.paper, *columns).where(*conditions)).all()

    tagged: dict[int, tuple[str, ...]] = {}
    for paper, name in sorted(tuple(row) for row in given(schema.tags, schema.tags.c.tag)):
        tagged[paper] = (*tagged.get(paper, ()), name)
    return Mine(
        voted(c, account, ids),
        frozenset(row.paper for row in given(schema.saved)),
        tagged,
    )


def _hold(c: sa.Connection, paper: int) -> None:
    """Keep a paper as it is until this transaction ends; one that is not there is refused."""
    table = schema.papers
    found = c.execute(sa.select(table.c.id).where(table.c.id == paper).with_for_update()).first()
    if found is None:
        raise RequestError("This paper is not here any more: search for it.")


def _give(
    c: sa.Connection,
    table: sa.Table,
    account: int,
    paper: int,
    on: bool,
    values: dict[str, Any],
    *which: sa.ColumnElement[bool],
) -> None:
    """Insert a row of an account's for a paper where there is none yet, or delete it."""
    if on:
        _known(c, account)
        row = {"account": account, "paper": paper} | values
        c.execute(insert(c, table).on_conflict_do_nothing(), row)
    else:
        conditions = (table.c.account == account, table.c.paper == paper, *which)
        c.execute(sa.delete(table).where(*conditions))


def _known(c: sa.Connection, account: int) -> None:
    if _account(c, schema.accounts.c.id == account) is None:
        raise RequestError("This account is not here any more: log in again.")


# --- comments ------------------------------------------------------------------------------------


def comment(
    c: sa.Connection, account: int, paper: int, body: str, nonce: str, *, now: float | None = None
) -> Comment:
    """Comment on a paper. The form's ``nonce`` (8 to 100 characters) makes a request that comes
    again, after a crash or a second click, return the comment that it made.
    """  # noqa: D205
    body = _body(body)
    if not 8 <= len(nonce) <= 100 or not nonce.isascii() or not nonce.isprintable():
        raise RequestError("This form was not made by this page: load the paper again.")
    _hold(c, paper)
    _known(c, account)
    table = schema.comments
    row = {"nonce": nonce, "paper": paper, "account": account, "body": body, "created": _now(now)}
    c.execute(insert(c, table).on_conflict_do_nothing(), row)
    made = _comments(c, table.c.nonce == nonce)[0]
    if (made.paper, made.account) != (paper, account):
        raise RequestError("This form was used before: load the paper again.")
    trends.keep_in_step(c, [paper])
    return made


def edit(
    c: sa.Connection, account: int, comment: int, body: str, *, now: float | None = None
) -> Comment:
    """Change a comment of one's own."""
    table = schema.comments
    own = (table.c.id == comment, table.c.account == account)
    done = c.execute(sa.update(table).where(*own).values(body=_body(body), changed=_now(now)))
    if not done.rowcount:
        raise _not_yours()
    return _comments(c, *own)[0]


def delete(c: sa.Connection, account: int, comment: int) -> int:
    """Delete a comment of one's own; return its paper."""
    table = schema.comments
    own = (table.c.id == comment, table.c.account == account)
    paper = c.scalar(sa.select(table.c.paper).where(*own))
    if paper is None:
        raise _not_yours()
    _hold(c, paper)
    c.execute(sa.delete(table).where(*own))
    trends.keep_in_step(c, [paper])
    return int(paper)


def comments(c: sa.Connection, paper: int, *, after: int = 0, limit: int = 200) -> list[Comment]:
    """Return a paper's comments in the order in which they were made, those after one of them."""
    table = schema.comments
    return _comments(c, table.c.paper == paper, table.c.id > after, limit=limit)


def _comments(
    c: sa.Connection, *conditions: sa.ColumnElement[bool], limit: int = 1
) -> list[Comment]:
    table, accounts = schema.comments, schema.accounts
    columns = [table.c[name] for name in ("body", "created", "changed")]
    statement = (
        sa.select(table.c.id, table.c.paper, table.c.account, accounts.c.name, *columns)
        .join(accounts, accounts.c.id == table.c.account)
        .where(*conditions)
        .order_by(table.c.id)
        .limit(limit)
    )
    return [Comment(*row) for row in c.execute(statement)]


def _body(text: str) -> str:
    body = clean(text).replace("\r\n", "\n").strip()
    if not 1 <= len(body) <= COMMENT_LENGTH:
        raise RequestError(
            f"A comment has 1 to {COMMENT_LENGTH:,} characters, not {len(body):,}: change it."
        )
    return body


def _not_yours() -> RequestError:
    return RequestError("There is no such comment of yours: load the paper again.")
