"""What search reads: full text kept by triggers, which papers changed, vectors in PostgreSQL."""

from __future__ import annotations

import logging
import unicodedata

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create it for the papers that are there and those to come."""
    # Appended to by triggers: each process that keeps an index in memory reads on from where it
    # was. The numbers are never used twice.
    op.create_table(
        "search_changes",
        sa.Column(
            "n",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            sa.Identity(),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("paper", sa.Integer, nullable=False),
        sqlite_autoincrement=True,
    )
    c = op.get_bind()
    script = _SQLITE if c.dialect.name == "sqlite" else _POSTGRESQL
    for statement in script.split("-- next"):
        c.exec_driver_sql(statement)
    if c.dialect.name == "postgresql":
        _vectors(c)


_WORDS = "title, key, authors, categories, summary"


def _row(row: str) -> str:
    """A paper's text in the columns of the index, from a trigger's row ``old`` or ``new``."""
    return (
        f"{row}.id, {row}.title, {row}.key || ' ' || coalesce({row}.arxiv, ''), "
        f"(SELECT group_concat(value, ' ') FROM json_each({row}.authors)), "
        f"{row}.categories, {row}.summary"
    )


def _differ(columns: str) -> str:
    names = columns.split()
    old, new = (", ".join(f"{row}.{name}" for name in names) for row in ("old", "new"))
    return f"({old}) IS NOT ({new})"


_READ = "title key arxiv authors categories summary"

# The index keeps no text of its own (content=''): what is shown comes from the papers themselves,
# and what leaves the index is told to it word by word.
_SQLITE = f"""
CREATE VIRTUAL TABLE papers_text USING fts5(
    {_WORDS}, content='', tokenize='porter unicode61 remove_diacritics 2'
)
-- next
INSERT INTO papers_text (papers_text, rank) VALUES ('rank', 'bm25(8.0, 6.0, 4.0, 2.0, 1.0)')
-- next
INSERT INTO papers_text (rowid, {_WORDS}) SELECT {_row("papers")} FROM papers
-- next
CREATE TRIGGER papers_text_added AFTER INSERT ON papers BEGIN
    INSERT INTO papers_text (rowid, {_WORDS}) SELECT {_row("new")};
    INSERT INTO search_changes (paper) VALUES (new.id);
END
-- next
CREATE TRIGGER papers_text_deleted AFTER DELETE ON papers BEGIN
    INSERT INTO papers_text (papers_text, rowid, {_WORDS}) SELECT 'delete', {_row("old")};
    INSERT INTO search_changes (paper) VALUES (old.id);
END
-- next
CREATE TRIGGER papers_text_changed AFTER UPDATE OF {_READ.replace(" ", ", ")} ON papers
WHEN {_differ(_READ)} BEGIN
    INSERT INTO papers_text (papers_text, rowid, {_WORDS}) SELECT 'delete', {_row("old")};
    INSERT INTO papers_text (rowid, {_WORDS}) SELECT {_row("new")};
END
-- next
CREATE TRIGGER papers_search_changed
AFTER UPDATE OF {_READ.replace(" ", ", ")}, date, wing, status ON papers
WHEN {_differ(_READ + " date wing status")} BEGIN
    INSERT INTO search_changes (paper) VALUES (new.id);
END
-- next
CREATE TRIGGER papers_meaning_changed AFTER UPDATE OF title, summary ON papers
WHEN {_differ("title summary")} BEGIN
    DELETE FROM embeddings WHERE paper = new.id;
END
"""

# PostgreSQL's parser takes "cs.LG" for a host and "2006.16581" for a number, and compares accents.
_LETTERS = [chr(code) for code in range(0xC0, 0x180) if unicodedata.decomposition(chr(code))]
_FROM = "-_./:\\" + "".join(_LETTERS)
_TO = " " * 6 + "".join(unicodedata.normalize("NFD", letter)[0] for letter in _LETTERS)


def _vector(expression: str, weight: str) -> str:
    plain = f"translate({expression}, '{_FROM}', '{_TO}')"
    return f"setweight(to_tsvector('english', {plain}), '{weight}')"


_POSTGRESQL = f"""
ALTER TABLE papers ADD COLUMN words tsvector GENERATED ALWAYS AS (
    {_vector("title", "A")} || {_vector("key || ' ' || coalesce(arxiv, '')", "B")}
    || {_vector("authors::jsonb::text", "B")} || {_vector("categories", "C")}
    || {_vector("summary", "D")}
) STORED
-- next
CREATE INDEX papers_by_words ON papers USING gin (words)
-- next
CREATE FUNCTION pantarhei_search_changed() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    changed integer[];
BEGIN
    IF TG_OP = 'INSERT' THEN
        changed := ARRAY(SELECT id FROM new_rows);
    ELSIF TG_OP = 'DELETE' THEN
        changed := ARRAY(SELECT id FROM old_rows);
    ELSE
        changed := ARRAY(
            SELECT n.id FROM new_rows n JOIN old_rows o ON o.id = n.id
            WHERE (o.title, o.key, o.arxiv, o.authors::text, o.categories, o.summary, o.date,
                   o.wing, o.status)
            IS DISTINCT FROM (n.title, n.key, n.arxiv, n.authors::text, n.categories, n.summary,
                   n.date, n.wing, n.status)
        );
        DELETE FROM embeddings e USING new_rows n, old_rows o
        WHERE e.paper = n.id AND o.id = n.id
        AND (o.title, o.summary) IS DISTINCT FROM (n.title, n.summary);
    END IF;
    IF cardinality(changed) > 0 THEN
        -- numbers become visible in their order: a reader never misses a smaller one
        PERFORM pg_advisory_xact_lock(hashtextextended('pantarhei search', 0));
        INSERT INTO search_changes (paper) SELECT unnest(changed);
    END IF;
    RETURN NULL;
END $$
-- next
CREATE TRIGGER papers_search_added AFTER INSERT ON papers
REFERENCING NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION pantarhei_search_changed()
-- next
CREATE TRIGGER papers_search_deleted AFTER DELETE ON papers
REFERENCING OLD TABLE AS old_rows
FOR EACH STATEMENT EXECUTE FUNCTION pantarhei_search_changed()
-- next
CREATE TRIGGER papers_search_changed AFTER UPDATE ON papers
REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows
FOR EACH STATEMENT EXECUTE FUNCTION pantarhei_search_changed()
"""


def _vectors(c: sa.Connection) -> None:
    """Let PostgreSQL search by meaning itself, where pgvector is and may be created."""
    try:
        with c.begin_nested():
            c.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS vector")
            c.exec_driver_sql("ALTER TABLE embeddings ADD COLUMN near vector(256)")
            c.exec_driver_sql(
                "CREATE INDEX embeddings_by_meaning ON embeddings USING hnsw (near vector_ip_ops)"
            )
    except sa.exc.DBAPIError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        logging.getLogger(__name__).info("pgvector is not used: %s", reason)
