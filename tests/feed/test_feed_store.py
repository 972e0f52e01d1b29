"""The store opens, migrates and refuses, on either database."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from pantarhei.errors import RequestError
from pantarhei.feed import schema
from pantarhei.feed import store as module
from pantarhei.feed.store import Store, fact, keep_facts, lock, migrate


def python(code: str, *arguments: str) -> subprocess.Popen:
    """Start another process; it prints a line when it has begun."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_transaction_is_kept_whole_or_not_at_all(store):
    with store.write() as c:
        keep_facts(c, {"a": "1", "b": "2"})
    with pytest.raises(ZeroDivisionError), store.write() as c:
        keep_facts(c, {"a": "3"})
        raise ZeroDivisionError
    with store.read() as c:
        assert (fact(c, "a"), fact(c, "b"), fact(c, "c")) == ("1", "2", None)
    with store.write() as c:
        keep_facts(c, {"a": "4"})
        assert fact(c, "a") == "4"


def test_reading_changes_nothing(store):
    with pytest.raises(sa.exc.DBAPIError), store.read() as c:
        keep_facts(c, {"a": "1"})
    with store.read() as c:
        assert fact(c, "a") is None


def test_a_reader_sees_one_state_and_is_not_held_up(store):
    with store.write() as c:
        keep_facts(c, {"a": "1"})
    with store.read() as reader:
        assert fact(reader, "a") == "1"
        with store.write() as c:
            keep_facts(c, {"a": "2"})
        assert fact(reader, "a") == "1"
    with store.read() as c:
        assert fact(c, "a") == "2"
        if store.dialect == "sqlite":
            assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_the_first_migration_makes_the_tables_of_the_schema(new_url, store, dialect):
    # only what the metadata say, and all of it (Alembic misreads empty defaults on SQLite)
    url = new_url()
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as c:
        migrate(c, "0001")
        context = MigrationContext.configure(
            c, opts={"compare_server_default": dialect != "sqlite"}
        )
        found = compare_metadata(context, schema.metadata)
        assert [d for d in found if "pantarhei_version" not in str(d)] == []
        # what Alembic does not compare: what follows when a row is deleted
        for table in schema.metadata.tables.values():
            theirs = {
                (k["constrained_columns"][0], k["options"].get("ondelete"))
                for k in sa.inspect(c).get_foreign_keys(table.name)
            }
            assert theirs == {(k.parent.name, k.ondelete) for k in table.foreign_keys}
    engine.dispose()
    # at the newest revision all that is there still, whatever indices were added
    with store.read() as c:
        options = {"include_object": lambda _o, _n, _t, reflected, to: not reflected or to}
        context = MigrationContext.configure(c, opts=options)
        assert compare_metadata(context, schema.metadata) == []


def test_the_head_is_alembics():
    config = Config()
    config.set_main_option("script_location", str(module._MIGRATIONS))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [module._head()]


def test_a_current_store_opens_without_alembic(store):
    code = """
        import sys
        from pantarhei.feed.store import Store, fact
        with Store(sys.argv[1]) as store, store.read() as c:
            fact(c, "a")
        print([name for name in ("alembic", "torch", "fastapi") if name in sys.modules])
    """
    assert python(code, store.url).communicate()[0].strip() == "[]"


def test_an_older_store_is_brought_up_to_date(new_url, monkeypatch):
    url = new_url()
    with monkeypatch.context() as old:
        old.setattr(module, "migrate", lambda c: migrate(c, "0001"))
        old.setattr(module, "_head", lambda: "0001")
        with Store(url) as store, store.write() as c:
            keep_facts(c, {"a": "1"})
    with Store(url) as store, store.read() as c:
        assert fact(c, "a") == "1"
        version = c.exec_driver_sql("SELECT version_num FROM pantarhei_version").scalar()
        assert version == module._head()


def test_a_migration_that_fails_leaves_nothing(new_url, monkeypatch):
    url = new_url()

    def failing(c):
        migrate(c, "0001")
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(module, "migrate", failing)
        with pytest.raises(ZeroDivisionError):
            Store(url)
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as c:
        assert sa.inspect(c).get_table_names() == []
    engine.dispose()
    Store(url).close()


def test_many_processes_and_threads_open_a_new_store_together(new_url):
    url = new_url()
    code = """
        import sys
        from pantarhei.feed.store import Store
        with Store(sys.argv[1]) as store:
            print(store.secret)
    """
    workers = [python(code, url) for _ in range(4)]
    secrets = [None] * 4

    def open_one(number):
        with Store(url) as store:
            secrets[number] = store.secret

    threads = [threading.Thread(target=open_one, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {worker.communicate()[0].strip() for worker in workers} | set(secrets)
    assert [worker.returncode for worker in workers] == [0] * 4
    assert len(found) == 1
    assert len(bytes.fromhex(found.pop())) == 32


def test_no_increment_of_several_processes_is_lost(store):
    code = """
        import sys
        from pantarhei.feed.store import Store, fact, keep_facts, lock
        with Store(sys.argv[1]) as store:
            for _ in range(25):
                with store.write() as c:
                    lock(c, "count")
                    keep_facts(c, {"count": str(int(fact(c, "count") or 0) + 1)})
    """
    workers = [python(code, store.url) for _ in range(3)]

    def count():
        for _ in range(25):
            with store.write() as c:
                lock(c, "count")
                keep_facts(c, {"count": str(int(fact(c, "count") or 0) + 1)})

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [worker.wait() for worker in workers] == [0] * 3
    with store.read() as c:
        assert fact(c, "count") == "150"


def test_what_was_committed_survives_a_kill(store):
    code = """
        import sys, time
        from pantarhei.feed.store import Store, keep_facts
        store = Store(sys.argv[1])
        with store.write() as c:
            keep_facts(c, {"a": "kept"})
        with store.write() as c:
            keep_facts(c, {"a": "not kept", "b": "not kept"})
            print("now", flush=True)
            time.sleep(600)
    """
    worker = python(code, store.url)
    assert worker.stdout.readline() == "now\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    with store.write() as c:  # the lock died with its holder
        assert (fact(c, "a"), fact(c, "b")) == ("kept", None)


def test_a_path_an_address_and_the_default_name_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PANTARHEI_HOME", str(tmp_path / "new folder"))
    monkeypatch.chdir(tmp_path)
    with Store() as store, store.write() as c:
        keep_facts(c, {"a": "1"})
    path = tmp_path / "new folder" / "feed.sqlite"
    assert store.path == path
    for url in (path, str(path), "new folder/feed.sqlite", f"sqlite:///{path}"):
        with Store(url) as store, store.read() as c:
            assert fact(c, "a") == "1"


@pytest.mark.parametrize(
    "url",
    ["mysql://me:secret@host/x", "sqlite://", "sqlite:///:memory:", "://", "postgresql://[/", ""],
)
def test_what_is_no_store_is_refused_in_one_sentence(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"name|folder") as caught:
        Store(url)
    assert "secret" not in str(caught.value)


def test_a_server_out_of_reach_is_said_without_the_password():
    with pytest.raises(RequestError, match="cannot be reached") as caught:
        Store("postgresql://me:secret@127.0.0.1:1/x")
    assert "secret" not in str(caught.value)


def test_a_foreign_database_stays_as_it_is(new_url):
    url = new_url()
    engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.begin() as c:
        c.exec_driver_sql("CREATE TABLE papers (x INTEGER)")
    with pytest.raises(RequestError, match="another program"):
        Store(url)
    with engine.connect() as c:
        assert sa.inspect(c).get_table_names() == ["papers"]
    engine.dispose()


def test_a_newer_store_stays_as_it_is(new_url):
    url = new_url()
    with Store(url) as store, store.write() as c:
        c.exec_driver_sql("UPDATE pantarhei_version SET version_num = '9999'")
    with pytest.raises(RequestError, match="newer pantarhei"):
        Store(url)
    with store.read() as c:
        assert c.exec_driver_sql("SELECT version_num FROM pantarhei_version").scalar() == "9999"


@pytest.mark.parametrize("content", [b"not a database " * 999, b"SQLite format 3\0" + b"x" * 5000])
def test_a_file_that_is_no_database_stays_as_it_is(tmp_path, content):
    path = tmp_path / "feed.sqlite"
    path.write_bytes(content)
    with pytest.raises(RequestError, match="damaged"):
        Store(path)
    assert path.read_bytes() == content


def test_damage_found_later_is_said_in_one_sentence(tmp_path):
    path = tmp_path / "feed.sqlite"
    with Store(path) as store, store.write() as c:
        keep_facts(c, {f"fact {n}": "x" * 500 for n in range(500)})
    content = path.read_bytes()
    half = len(content) // 2 // 4096 * 4096
    path.write_bytes(content[:half] + b"\xff" * (len(content) - half))
    with Store(path) as store, pytest.raises(RequestError, match="damaged"), store.read() as c:
        c.execute(sa.select(schema.facts)).all()


def test_another_programs_sqlite_file_is_told_by_its_mark_alone(tmp_path):
    path = tmp_path / "feed.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(RequestError, match="another program"):
        Store(path)
    other = tmp_path / "other.sqlite"
    Store(other).close()
    shutil.copy(other, path)
    Store(path).close()  # a copy is a store like any other


@pytest.mark.parametrize("path", ["file/feed.sqlite", "folder", "a\0b"])
def test_a_place_that_cannot_hold_a_store(tmp_path, path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(RequestError, match=r"cannot|null"):
        Store(tmp_path / path)


def test_a_writer_that_waits_too_long_says_so(new_url, dialect, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    url = new_url()
    with Store(url) as one, Store(url) as other, one.write() as c:
        lock(c, "x")
        with pytest.raises(RequestError, match=r"busy|cannot be used .*locked"), other.write() as d:
            lock(d, "x")
        if dialect == "sqlite":
            with pytest.raises(RequestError, match="busy"), one.write():
                pass


def test_writers_in_each_others_way_are_told(store):
    if store.dialect == "sqlite":
        pytest.skip("SQLite has one writer at a time")
    with store.write() as c:
        keep_facts(c, {"a": "1", "b": "1"})
    both, told = threading.Barrier(2), []

    def change(first, second):
        try:
            with store.write() as c:
                keep_facts(c, {first: "2"})
                both.wait(60)
                keep_facts(c, {second: "2"})
        except RequestError as error:
            told.append(str(error))

    threads = [threading.Thread(target=change, args=names) for names in ("ab", "ba")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 1 and "busy: try again" in told[0]


def test_a_store_serves_more_readers_than_it_keeps(store):
    begun = threading.Barrier(20)

    def read():
        with store.read() as c:
            fact(c, "a")
            if store.dialect == "sqlite":
                begun.wait(60)

    threads = [threading.Thread(target=read) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.dialect == "postgresql" or not begun.broken


def test_a_defect_of_ours_is_not_blamed_on_the_file(store):
    for statement in ("SELECT * FROM nowhere", "INSERT INTO facts (name) VALUES ('x')"):
        with pytest.raises(sa.exc.DBAPIError), store.write() as c:
            c.exec_driver_sql(statement)
