"""A store of either kind for every test: ``store`` runs a test on SQLite and on PostgreSQL.

PostgreSQL is a private cluster, begun once for the session in a temporary folder and reached
through a socket in it. It comes from the package pgserver (with pgvector) or from Debian's
postgresql; where neither is found, or none can be started, those tests are skipped.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path

import pytest

sa = pytest.importorskip("sqlalchemy", reason="needs `pip install 'pantarhei[feed]'`")

from pantarhei.feed.store import Store  # noqa: E402

_numbers = itertools.count()


@pytest.fixture(params=["sqlite", "postgresql"])
def dialect(request) -> str:
    return request.param


@pytest.fixture
def new_url(dialect, request, tmp_path) -> Iterator[Callable[[], str]]:
    """Give the address of a new, empty database at each call."""
    if dialect == "sqlite":
        yield lambda: f"sqlite:///{tmp_path}/feed-{next(_numbers)}.sqlite"
        return
    cluster, made = request.getfixturevalue("postgresql"), []

    def create() -> str:
        made.append(f"t{next(_numbers)}")
        return cluster.create(made[-1])

    yield create
    for name in made:
        cluster.drop(name)


@pytest.fixture
def store(dialect, request, tmp_path) -> Iterator[Store]:
    """A store whose tables are made and empty."""
    url = f"sqlite:///{tmp_path}/feed.sqlite"
    if dialect == "sqlite":
        shutil.copy(request.getfixturevalue("_sqlite_template"), tmp_path / "feed.sqlite")
    else:
        url = request.getfixturevalue("_postgresql_store")
    with Store(url) as opened:
        if dialect == "postgresql":
            with opened.write() as c:  # ten times as fast as a database for each test
                names = set(sa.inspect(c).get_table_names()) - {"pantarhei_version", "facts"}
                c.exec_driver_sql(f"TRUNCATE {', '.join(names)} RESTART IDENTITY CASCADE")
                c.exec_driver_sql("DELETE FROM facts WHERE name != 'secret'")
        yield opened


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("template") / "feed.sqlite"
    Store(path).close()
    return path


@pytest.fixture(scope="session")
def _postgresql_store(postgresql) -> str:
    return postgresql.create("feed")


class Cluster:
    """A PostgreSQL server of our own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def url(self, name: str) -> str:
        return f"postgresql:///{name}?host={self.folder}&user=pantarhei"

    def create(self, name: str) -> str:
        """Create a database and return its address."""
        self._do(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        return self.url(name)

    def drop(self, name: str) -> None:
        """Drop a database, whoever uses it."""
        self._do(f"DROP DATABASE {name} WITH (FORCE)")

    def _do(self, statement: str) -> None:
        url = self.url("postgres").replace("postgresql:", "postgresql+psycopg:")
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as c:
            c.exec_driver_sql(statement)
        engine.dispose()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Cluster]:
    if util.find_spec("psycopg") is None:
        pytest.skip("PostgreSQL is not tested: psycopg is not installed")
    user = _unprivileged()
    binaries = next((b for b in _binaries() if _runs(b, user)), None)
    if binaries is None:
        pytest.skip("PostgreSQL is not tested: neither pgserver nor Debian's postgresql is here")
    # In /tmp itself: a socket's path is short, and another user has to get there.
    folder = Path(tempfile.mkdtemp(prefix="pantarhei-pg-", dir="/tmp"))
    try:
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        server = _start(binaries, folder, user)
        try:
            yield Cluster(folder)
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait(60)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _binaries() -> Iterator[Path]:
    spec = util.find_spec("pgserver")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "pginstall" / "bin"
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent


def _unprivileged() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root: return another user where we are."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    pytest.skip("PostgreSQL is not tested: root has no unprivileged user to run it as")


def _as(user: pwd.struct_passwd | None) -> dict:
    if user is None:
        return {"cwd": "/"}
    return {"cwd": "/", "user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _runs(binaries: Path, user: pwd.struct_passwd | None) -> bool:
    try:
        for name in ("initdb", "postgres"):
            command = [binaries / name, "--version"]
            subprocess.run(command, check=True, capture_output=True, **_as(user))
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def _start(binaries: Path, folder: Path, user: pwd.struct_passwd | None) -> subprocess.Popen:
    words = ["--username", "pantarhei", "--auth", "trust", "--no-sync", "--encoding", "UTF8"]
    done = subprocess.run(
        [binaries / "initdb", "--pgdata", folder / "data", "--no-locale", *words],
        capture_output=True,
        text=True,
        **_as(user),
    )
    if done.returncode:
        pytest.skip(f"PostgreSQL is not tested: initdb failed ({done.stderr.strip()[-300:]})")
    settings = {"fsync": "off", "listen_addresses": "", "unix_socket_directories": str(folder)}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]

    def die_with_us() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)  # PR_SET_PDEATHSIG

    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", folder / "data", *options],
            stdout=log,
            stderr=log,
            preexec_fn=die_with_us,
            **_as(user),
        )
    ready = [binaries / "pg_isready", "--host", folder, "--username", "pantarhei", "-d", "postgres"]
    deadline = time.monotonic() + 60
    while subprocess.run(ready, capture_output=True, **_as(user)).returncode:
        if server.poll() is not None or time.monotonic() > deadline:
            server.kill()
            pytest.skip(f"PostgreSQL is not tested: {(folder / 'log').read_text()[-300:]}")
        time.sleep(0.05)
    return server
