"""The tables of the page's store, as SQLAlchemy sees them, on SQLite and PostgreSQL alike.

Times are UTC seconds since 1970, dates are ISO 8601 text (``2026-01-31``): both sort as they are
and mean the same in either database. What one database alone can do (full-text indices, vectors)
is written in the migrations and in :mod:`pantarhei.feed.search`, not here.
"""

from __future__ import annotations

import time

import sqlalchemy as sa
from sqlalchemy import Column, Float, ForeignKey, Index, Integer, LargeBinary, Table, Text

metadata = sa.MetaData()


def _paper(primary_key: bool = False) -> Column[int]:
    key = ForeignKey("papers.id", ondelete="CASCADE")
    return Column("paper", key, nullable=False, primary_key=primary_key)


def _account(primary_key: bool = False) -> Column[int]:
    key = ForeignKey("accounts.id", ondelete="CASCADE")
    return Column("account", key, nullable=False, primary_key=primary_key)


papers = Table(
    "papers",
    metadata,
    Column("id", Integer, primary_key=True),
    # what stands in addresses: the slug of a card, an arXiv identifier, a BibTeX key
    Column("key", Text, nullable=False, unique=True),
    Column("title", Text, nullable=False),
    Column("summary", Text, nullable=False),  # a card's own words, else the abstract as published
    Column("date", Text, nullable=False),  # of publication
    Column("authors", sa.JSON, nullable=False),  # names; empty where only their number is known
    Column("authors_count", Integer, nullable=False),
    Column("arxiv", Text, unique=True),  # without the version
    Column("doi", Text),
    Column("code", Text),  # address of the authors' repository
    Column("categories", Text, nullable=False, server_default=""),  # arXiv's, separated by spaces
    Column("wing", Text),
    Column("source", Text, nullable=False),  # catalogue, arxiv, bibtex or json
    # runs (a recipe measures it), planned (a card without one), listed (anybody's paper)
    Column("status", Text, nullable=False),
    Column("added", Float, nullable=False),
    Column("changed", Float, nullable=False),
    # kept in step by the transactions that write votes, comments and claims
    Column("votes", Integer, nullable=False, server_default="0"),
    Column("comments", Integer, nullable=False, server_default="0"),
    Column("held", Integer, nullable=False, server_default="0"),  # newest claims that hold ...
    Column("measured", Integer, nullable=False, server_default="0"),  # ... of so many
    Column("heat", Float, nullable=False),  # see trends
    Index("papers_by_date", "date", "id"),
    Index("papers_by_heat", "heat", "id"),
    Index("papers_by_wing", "wing", "date"),
    Index("papers_by_status", "status", "date"),
)

runs = Table(
    "runs",
    metadata,
    Column("uid", Text, primary_key=True),
    _paper(),
    Column("scale", Text, nullable=False),
    Column("seed", sa.BigInteger, nullable=False),
    Column("date", Text, nullable=False),  # ISO 8601 with time
    Column("seconds", Float, nullable=False),
    Column("device", Text, nullable=False),
    Column("command", Text, nullable=False),
    Column("folder", Text, nullable=False),  # where its pictures lie on this machine, or empty
    Column("versions", sa.JSON, nullable=False),
    Column("machine", sa.JSON, nullable=False),
    Column("commit", Text),
    # to this store: what is new to readers is told by mail
    Column("added", Float, nullable=False, default=time.time, server_default="0"),
    Column("origin", Text, nullable=False),  # shipped (came with pantarhei) or here (own ledger)
    Index("runs_by_paper", "paper", "date"),
)

claims = Table(
    "claims",
    metadata,
    Column("run", ForeignKey("runs.uid", ondelete="CASCADE"), primary_key=True),
    Column("id", Text, primary_key=True),
    Column("position", Integer, nullable=False),
    Column("statement", Text, nullable=False),
    Column("quantity", Text, nullable=False),
    Column("direction", Text, nullable=False),
    Column("bound", Float, nullable=False),
    Column("paper_value", Text),  # the paper's own figure, as text
    Column("measured", Float),  # null where it was not finite
    Column("holds", sa.Boolean, nullable=False),
    Column("evidence", Text, nullable=False),
)

embeddings = Table(
    "embeddings",
    metadata,
    _paper(primary_key=True),
    Column("model", Text, primary_key=True),
    Column("digest", Text, nullable=False),  # of the text: a changed paper is embedded anew
    Column("vector", LargeBinary, nullable=False),  # float16, little-endian, of unit length
)

accounts = Table(
    "accounts",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("email", Text, nullable=False, unique=True),  # lower case
    Column("name", Text, nullable=False),  # shown beside comments
    Column("created", Float, nullable=False),
)

# A link that was mailed, or a session that it opened: only a hash is kept of what was handed out.
tokens = Table(
    "tokens",
    metadata,
    Column("hash", Text, primary_key=True),  # SHA-256, hexadecimal
    Column("purpose", Text, nullable=False),  # login or session
    Column("email", Text, nullable=False),
    Column("created", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("used", Float),
    Index("tokens_by_expiry", "expires"),
)

votes = Table(
    "votes",
    metadata,
    _account(primary_key=True),
    _paper(primary_key=True),
    Column("created", Float, nullable=False),
    Index("votes_by_paper", "paper"),
)

comments = Table(
    "comments",
    metadata,
    Column("id", Integer, primary_key=True),
    # made by the form: a request that is sent twice, or again after a crash, makes one comment
    Column("nonce", Text, nullable=False, unique=True),
    _paper(),
    _account(),
    Column("body", Text, nullable=False),  # Markdown as written; made safe when shown
    Column("created", Float, nullable=False),
    Column("changed", Float),
    Index("comments_by_paper", "paper", "created"),
)

tags = Table(
    "tags",
    metadata,
    _account(primary_key=True),
    _paper(primary_key=True),
    Column("tag", Text, primary_key=True),
    Column("created", Float, nullable=False, default=time.time, server_default="0"),
    Index("tags_by_paper", "paper"),
    Index("tags_by_tag", "tag"),
)

saved = Table(  # the personal list
    "saved",
    metadata,
    _account(primary_key=True),
    _paper(primary_key=True),
    Column("created", Float, nullable=False),
)

subscriptions = Table(
    "subscriptions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("email", Text, nullable=False),
    Column("period", Text, nullable=False),  # daily or weekly
    Column("kind", Text, nullable=False),  # all, wing, tag or search
    Column("value", Text, nullable=False),  # the wing, the tag, the query; empty for all
    Column("created", Float, nullable=False),
    Column("confirmed", Float),  # null until the link in the first message was followed
    Column("ended", Float),
    Column("covered", Float),  # papers added up to here were in a digest
    sa.UniqueConstraint("email", "period", "kind", "value"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", Integer, primary_key=True),
    # what this message is, such as "digest/12/2026-01-31": a message is queued at most once
    Column("key", Text, nullable=False, unique=True),
    Column("recipient", Text, nullable=False),
    Column("message", LargeBinary, nullable=False),  # whole, with a Message-ID made from the key
    Column("created", Float, nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("due", Float, nullable=False),  # of the next attempt
    Column("leased", Float),  # a sender has it until then
    Column("sent", Float),
    Column("failed", Float),  # given up
    Column("error", Text),  # of the last attempt
    Index("outbox_by_due", "sent", "failed", "due"),
)

# Where each source was last read to, and small facts such as the secret that signs links.
facts = Table(
    "facts", metadata, Column("name", Text, primary_key=True), Column("value", Text, nullable=False)
)
