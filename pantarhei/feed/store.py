"""The page's store: one SQLite file, or a PostgreSQL database that several machines share.

Everything else in this package takes a connection, inside a transaction that its caller opened with
:meth:`Store.read` or :meth:`Store.write`: what belongs together is written together or not at all.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from pantarhei.claims import ledger_path
from pantarhei.errors import RequestError
from pantarhei.feed import schema

_APPLICATION_ID = 0x50526664  # "PRfd": tells a store from any other SQLite file
_VERSION_TABLE = "pantarhei_version"
_MIGRATIONS = Path(__file__).parent / "migrations"
_PATIENCE = 60  # seconds that a writer waits for its turn
_READERS = 16  # connections kept open
# SQLite's result codes:
_DAMAGED = (11, 26)  # CORRUPT, NOTADB
_DEFECT = (1, 19, 20, 21, 25)  # ERROR, CONSTRAINT, MISMATCH, MISUSE, RANGE: ours, not the file's

_QUERY_ONLY = 8  # READONLY without a further reason: a write where only reading was asked for

# Alembic keeps its context in module-level proxies: one migration at a time in this process.
_migrating = threading.Lock()


class Store:
    """The page's database, safe to share among threads; any number of processes may open it.

    ``url`` is a path, ``sqlite:///path`` or ``postgresql://user@host/database``; None is
    ``feed.sqlite`` beside the ledger (in ``PANTARHEI_HOME`` or the user's data folder). Opening
    creates the tables or migrates them. A database that is damaged, another program's, written by
    a newer pantarhei or out of reach raises :class:`RequestError` and stays as it is.

    A commit survives ``kill -9`` at once. SQLite keeps a write-ahead log that is synchronised at
    checkpoints: a power cut may undo the last commits, and cannot damage the file. PostgreSQL does
    what its server was told, by default keeping every commit.

    >>> import tempfile
    >>> with Store(Path(tempfile.mkdtemp()) / "feed.sqlite") as store, store.read() as c:
    ...     store.dialect, c.execute(sa.select(schema.papers)).all()
    ('sqlite', [])
    """

    dialect: Literal["sqlite", "postgresql"]
    url: str  # to be shown: without its password
    path: Path | None  # of the SQLite file

    def __init__(self, url: str | os.PathLike[str] | None = None) -> None:
        target = _target(url)
        self.dialect = "sqlite" if target.get_backend_name() == "sqlite" else "postgresql"
        self.url = target.render_as_string(hide_password=True)
        self.path = Path(target.database or "") if self.dialect == "sqlite" else None
        if self.path is not None:
            self._readers, self._writers = _sqlite_engines(target, self.path)
        else:
            self._readers, self._writers = _postgresql_engines(target)
        self._secret = ""
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Open a transaction that sees one state of the database and may not change it."""
        with self._explained(), self._readers.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Open a transaction that is committed at the block's end, and undone on an error.

        On SQLite it has the file to itself from the beginning, having waited up to a minute for
        other writers; readers go on meanwhile. Do not open another within it.
        """
        with self._explained(), self._writers.begin() as connection:
            yield connection

    @property
    def secret(self) -> str:
        """What signs this store's links and cookies: 256 random bits, made with the tables."""
        if not self._secret:
            with self.read() as c:
                self._secret = str(fact(c, "secret"))
        return self._secret

    def close(self) -> None:
        """Close every connection. A store that was closed opens again when it is used."""
        self._readers.dispose()
        self._writers.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the user can do something about into one sentence."""
        try:
            yield
        except sa.exc.TimeoutError as error:
            raise RequestError(self._busy()) from error
        except DBAPIError as error:
            sentence = self._explain(error)
            if sentence is None:
                raise
            raise RequestError(sentence) from error

    def _busy(self) -> str:
        return f"The store '{self.url}' is busy: try again when the other writer is done."

    def _explain(self, error: DBAPIError) -> str | None:
        reason = " ".join(str(error.orig).split())
        if self.dialect == "postgresql":
            # No state at all: the server was not reached. Classes of states: 08 connection,
            # 28 who asks, 3D no such database, 53 resources, 57 stopped, 58 system; 40 and 55 are
            # transactions that were in each other's way.
            state = getattr(error.orig, "sqlstate", None)
            if state is not None and state[:2] in ("40", "55"):
                return self._busy()
            outside = state is None or state[:2] in ("08", "28", "3D", "53", "57", "58")
            if not isinstance(error, sa.exc.OperationalError) or not outside:
                return None
            return (
                f"The store '{self.url}' cannot be reached ({reason}): start its server, or name "
                "another store."
            )
        code = getattr(error.orig, "sqlite_errorcode", 1)
        if code == _QUERY_ONLY or (code := code & 0xFF) in _DEFECT:
            return None
        if code in _DAMAGED:
            return (
                f"The store '{self.path}' is damaged ({reason}): move it away, or set "
                "PANTARHEI_HOME to another folder."
            )
        return (
            f"The store '{self.path}' cannot be used ({reason}): see that it can be written and "
            "that the disk has room, or set PANTARHEI_HOME to another folder."
        )

    def _prepare(self) -> None:
        """Create or migrate the tables, refusing what is not a store of ours."""
        with self._readers.begin() as c:
            if self._version(c) == _head():
                return
        if self.dialect == "sqlite":
            self._log_ahead()
        with _migrating, self._writers.begin() as c:
            # Another process may have migrated while this one waited for its turn.
            lock(c, "migrations")
            if self._version(c) != _head():
                if self.dialect == "sqlite":
                    c.exec_driver_sql(f"PRAGMA application_id = {_APPLICATION_ID}")
                migrate(c)
                row = {"name": "secret", "value": secrets.token_hex(32)}
                c.execute(insert(c, schema.facts).on_conflict_do_nothing(), row)

    def _log_ahead(self) -> None:
        """Turn SQLite's write-ahead log on.

        That needs the file alone for a moment, outside a transaction, and SQLite does not wait for
        it by itself when several processes create the store together.
        """
        raw, deadline = self._writers.raw_connection(), time.monotonic() + _PATIENCE
        try:
            while True:
                try:
                    raw.cursor().execute("PRAGMA journal_mode = WAL")
                    return
                except sqlite3.OperationalError as error:
                    if "locked" not in str(error) or time.monotonic() > deadline:
                        raise DBAPIError.instance("", None, error, sqlite3.Error) from error
                    time.sleep(0.05)
        finally:
            raw.close()

    def _version(self, c: sa.Connection) -> str:
        """Return the schema's version, or "" where the database is empty."""
        tables = sa.inspect(c).get_table_names()
        ours = _VERSION_TABLE in tables
        if self.dialect == "sqlite":
            marked = c.exec_driver_sql("PRAGMA application_id").scalar()
            ours = marked == _APPLICATION_ID
            tables = tables or ["?"] * c.exec_driver_sql("PRAGMA user_version").scalar_one()
        if tables and not ours:
            raise RequestError(
                f"'{self.path or self.url}' is a database of another program: name another one "
                "for pantarhei."
            )
        if not tables:
            return ""
        version = c.exec_driver_sql(f"SELECT version_num FROM {_VERSION_TABLE}").scalar()
        if version is not None and version > _head():
            raise RequestError(
                f"The store '{self.path or self.url}' was written by a newer pantarhei: install "
                "that version, or name another store."
            )
        return version or ""


def insert(c: sa.Connection, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """Return an INSERT that knows ``on_conflict_do_nothing`` and ``on_conflict_do_update``."""
    if c.dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def lock(c: sa.Connection, name: str) -> None:
    """Wait until no other transaction holds ``name``; keep it until this one ends.

    On SQLite a transaction that writes is alone anyway.
    """
    if c.dialect.name == "postgresql":
        key = sa.func.hashtextextended(f"pantarhei {name}", 0)
        c.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))


def fact(c: sa.Connection, name: str) -> str | None:
    """Return a fact that was kept, or None."""
    facts = schema.facts
    return c.execute(sa.select(facts.c.value).where(facts.c.name == name)).scalar()


def keep_facts(c: sa.Connection, values: Mapping[str, str]) -> None:
    """Keep facts, each in the place of what was kept under its name before."""
    statement = insert(c, schema.facts)
    statement = statement.on_conflict_do_update(
        index_elements=["name"], set_={"value": statement.excluded.value}
    )
    c.execute(statement, [{"name": name, "value": value} for name, value in values.items()])


def migrate(c: sa.Connection, revision: str = "head") -> None:
    """Bring the database to a revision, in the caller's transaction."""
    # Imported here: a store that is current opens without Alembic, four times as fast.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = c
    config.attributes["version_table"] = _VERSION_TABLE
    command.upgrade(config, revision)


def _head() -> str:
    """Return the newest revision: their files are named ``<revision>_<what>.py``, in order."""
    return max(path.name[:4] for path in (_MIGRATIONS / "versions").glob("[0-9]*.py"))


def _target(url: str | os.PathLike[str] | None) -> sa.URL:
    if url is None:
        url = ledger_path().with_name("feed.sqlite")
    text = os.fspath(url)
    if "://" not in text:
        target = sa.URL.create("sqlite", database=os.path.abspath(text))
    else:
        try:
            target = sa.make_url(text)
        except (SQLAlchemyError, ValueError):
            raise RequestError(_unknown(text)) from None
    backend = target.drivername.partition("+")[0]
    if backend in ("postgresql", "postgres"):
        return target.set(drivername="postgresql+psycopg")
    if backend != "sqlite" or not target.database or target.database == ":memory:":
        raise RequestError(_unknown(text))
    if "\0" in target.database:
        raise RequestError("The store's path holds a null character: name another one.")
    return target.set(drivername="sqlite", database=os.path.abspath(target.database))


def _unknown(text: str) -> str:
    scheme = text.partition("://")[0]  # the rest may hold a password
    return (
        f"The store '{scheme}://...' is not one that pantarhei knows: name a file, "
        "sqlite:///FILE or postgresql://USER@HOST/DATABASE."
    )


def _sqlite_engines(target: sa.URL, path: Path) -> tuple[sa.Engine, sa.Engine]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"'{path.parent}' cannot hold the store ({error.strerror}): name another file, or set "
            "PANTARHEI_HOME to a folder that can be written."
        ) from error
    options: dict[str, Any] = {
        "poolclass": sa.QueuePool,
        # transactions are begun below, not by the driver
        "connect_args": {"timeout": _PATIENCE, "isolation_level": None, "check_same_thread": False},
    }
    readers = sa.create_engine(target, pool_size=_READERS, max_overflow=64, **options)
    # One: threads that write queue here, in order, and not in SQLite, which polls.
    writers = sa.create_engine(
        target, pool_size=1, max_overflow=0, pool_timeout=_PATIENCE, **options
    )

    def connected(reads: bool) -> Any:
        def prepare(connection: Any, _: object) -> None:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA journal_size_limit = 67108864")
            connection.execute("PRAGMA cache_size = -4096")
            connection.execute(f"PRAGMA query_only = {int(reads)}")

        return prepare

    sa.event.listen(readers, "connect", connected(reads=True))
    sa.event.listen(writers, "connect", connected(reads=False))
    sa.event.listen(readers, "begin", _beginning("BEGIN"))
    sa.event.listen(writers, "begin", _beginning("BEGIN IMMEDIATE"))
    return readers, writers


def _beginning(statement: str) -> Any:
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(statement)

    return begin


def _postgresql_engines(target: sa.URL) -> tuple[sa.Engine, sa.Engine]:
    try:
        engine = sa.create_engine(
            target, pool_size=_READERS, pool_timeout=_PATIENCE, pool_pre_ping=True
        )
    except ImportError:
        raise RequestError(
            "A PostgreSQL store needs psycopg: `pip install 'pantarhei[postgresql]'`."
        ) from None

    def connected(connection: Any, _: object) -> None:
        connection.execute(f"SET lock_timeout = {int(_PATIENCE * 1000)}")  # milliseconds
        connection.commit()

    sa.event.listen(engine, "connect", connected)
    readers = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return readers, engine


def clean(text: str) -> str:
    """Return text without what a database cannot keep: null characters and lone surrogates.

    >>> clean("a\\0b\\ud800c")
    'ab?c'
    """
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()
    return text.replace("\0", "")
