"""The first tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Float, Integer, LargeBinary, Text

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _paper(primary_key: bool = False) -> Column[int]:
    key = sa.ForeignKey("papers.id", ondelete="CASCADE")
    return Column("paper", Integer, key, nullable=False, primary_key=primary_key)


def _account(primary_key: bool = False) -> Column[int]:
    key = sa.ForeignKey("accounts.id", ondelete="CASCADE")
    return Column("account", Integer, key, nullable=False, primary_key=primary_key)


def upgrade() -> None:
    """Create them."""
    _papers()
    _results()
    _people()
    _mail()
    op.create_table(
        "facts", Column("name", Text, primary_key=True), Column("value", Text, nullable=False)
    )


def _papers() -> None:
    op.create_table(
        "papers",
        Column("id", Integer, primary_key=True),
        Column("key", Text, nullable=False, unique=True),
        Column("title", Text, nullable=False),
        Column("summary", Text, nullable=False),
        Column("date", Text, nullable=False),
        Column("authors", sa.JSON, nullable=False),
        Column("authors_count", Integer, nullable=False),
        Column("arxiv", Text, unique=True),
        Column("doi", Text),
        Column("code", Text),
        Column("categories", Text, nullable=False, server_default=""),
        Column("wing", Text),
        Column("source", Text, nullable=False),
        Column("status", Text, nullable=False),
        Column("added", Float, nullable=False),
        Column("changed", Float, nullable=False),
        Column("votes", Integer, nullable=False, server_default="0"),
        Column("comments", Integer, nullable=False, server_default="0"),
        Column("held", Integer, nullable=False, server_default="0"),
        Column("measured", Integer, nullable=False, server_default="0"),
        Column("heat", Float, nullable=False),
    )
    op.create_index("papers_by_date", "papers", ["date", "id"])
    op.create_index("papers_by_heat", "papers", ["heat", "id"])
    op.create_index("papers_by_wing", "papers", ["wing", "date"])
    op.create_index("papers_by_status", "papers", ["status", "date"])
    op.create_table(
        "embeddings",
        _paper(primary_key=True),
        Column("model", Text, primary_key=True),
        Column("digest", Text, nullable=False),
        Column("vector", LargeBinary, nullable=False),
    )


def _results() -> None:
    op.create_table(
        "runs",
        Column("uid", Text, primary_key=True),
        _paper(),
        Column("scale", Text, nullable=False),
        Column("seed", sa.BigInteger, nullable=False),
        Column("date", Text, nullable=False),
        Column("seconds", Float, nullable=False),
        Column("device", Text, nullable=False),
        Column("command", Text, nullable=False),
        Column("folder", Text, nullable=False),
        Column("versions", sa.JSON, nullable=False),
        Column("machine", sa.JSON, nullable=False),
        Column("commit", Text),
        Column("added", Float, nullable=False, server_default="0"),
        Column("origin", Text, nullable=False),
    )
    op.create_index("runs_by_paper", "runs", ["paper", "date"])
    op.create_table(
        "claims",
        Column("run", Text, sa.ForeignKey("runs.uid", ondelete="CASCADE"), primary_key=True),
        Column("id", Text, primary_key=True),
        Column("position", Integer, nullable=False),
        Column("statement", Text, nullable=False),
        Column("quantity", Text, nullable=False),
        Column("direction", Text, nullable=False),
        Column("bound", Float, nullable=False),
        Column("paper_value", Text),
        Column("measured", Float),
        Column("holds", sa.Boolean, nullable=False),
        Column("evidence", Text, nullable=False),
    )


def _people() -> None:
    op.create_table(
        "accounts",
        Column("id", Integer, primary_key=True),
        Column("email", Text, nullable=False, unique=True),
        Column("name", Text, nullable=False),
        Column("created", Float, nullable=False),
    )
    op.create_table(
        "tokens",
        Column("hash", Text, primary_key=True),
        Column("purpose", Text, nullable=False),
        Column("email", Text, nullable=False),
        Column("created", Float, nullable=False),
        Column("expires", Float, nullable=False),
        Column("used", Float),
    )
    op.create_index("tokens_by_expiry", "tokens", ["expires"])
    op.create_table(
        "votes",
        _account(primary_key=True),
        _paper(primary_key=True),
        Column("created", Float, nullable=False),
    )
    op.create_index("votes_by_paper", "votes", ["paper"])
    op.create_table(
        "comments",
        Column("id", Integer, primary_key=True),
        Column("nonce", Text, nullable=False, unique=True),
        _paper(),
        _account(),
        Column("body", Text, nullable=False),
        Column("created", Float, nullable=False),
        Column("changed", Float),
    )
    op.create_index("comments_by_paper", "comments", ["paper", "created"])
    op.create_table(
        "tags",
        _account(primary_key=True),
        _paper(primary_key=True),
        Column("tag", Text, primary_key=True),
        Column("created", Float, nullable=False, server_default="0"),
    )
    op.create_index("tags_by_paper", "tags", ["paper"])
    op.create_index("tags_by_tag", "tags", ["tag"])
    op.create_table(
        "saved",
        _account(primary_key=True),
        _paper(primary_key=True),
        Column("created", Float, nullable=False),
    )


def _mail() -> None:
    op.create_table(
        "subscriptions",
        Column("id", Integer, primary_key=True),
        Column("email", Text, nullable=False),
        Column("period", Text, nullable=False),
        Column("kind", Text, nullable=False),
        Column("value", Text, nullable=False),
        Column("created", Float, nullable=False),
        Column("confirmed", Float),
        Column("ended", Float),
        Column("covered", Float),
        sa.UniqueConstraint("email", "period", "kind", "value"),
    )
    op.create_table(
        "outbox",
        Column("id", Integer, primary_key=True),
        Column("key", Text, nullable=False, unique=True),
        Column("recipient", Text, nullable=False),
        Column("message", LargeBinary, nullable=False),
        Column("created", Float, nullable=False),
        Column("attempts", Integer, nullable=False, server_default="0"),
        Column("due", Float, nullable=False),
        Column("leased", Float),
        Column("sent", Float),
        Column("failed", Float),
        Column("error", Text),
    )
    op.create_index("outbox_by_due", "outbox", ["sent", "failed", "due"])
