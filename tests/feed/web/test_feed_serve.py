"""``pantarhei serve`` as a process."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from _reading import EVIDENCE

from pantarhei.claims import Ledger
from pantarhei.records import import_records

MAIN = """
import sys, typer
from pantarhei import cli
from pantarhei.feed.commands.serve import serve
if "serve" not in {c.name or c.callback.__name__ for c in cli.app.registered_commands}:
    cli.app.command()(serve)
sys.exit(cli.main())
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", MAIN, "serve", *words]


@contextmanager
def served(home: Path, *words: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve at any free port, and give the address that was printed."""
    process = subprocess.Popen(
        command("--port", "0", *words),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PANTARHEI_HOME": str(home)},
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line + process.stderr.read()
        yield found[0], process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def refused(home: Path, *words: str) -> str:
    """The one sentence that a request which cannot be served ends with."""
    done = subprocess.run(
        command(*words),
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PANTARHEI_HOME": str(home)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_serves_cards_and_results_and_notices_a_changed_ledger(tmp_path):
    with served(tmp_path) as (address, _):
        assert address.startswith("http://127.0.0.1:")
        # The address is good as soon as it is printed.
        page = httpx.get(address, timeout=60)
        assert page.status_code == 200 and "pantarhei" in page.text
        paper = f"{address}/api/v1/papers/evolvegcn"
        assert httpx.get(paper).json()["paper"]["status"] == "runs"
        record = json.loads((EVIDENCE / "evolvegcn-cpu.json").read_text())
        record["run"] |= {"uid": "0123", "date": "2099-01-01T00:00:00Z", "seed": 77}
        (tmp_path / "evidence").mkdir()
        (tmp_path / "evidence" / "new.json").write_text(json.dumps(record))
        import_records(Ledger(tmp_path / "ledger.sqlite"), tmp_path / "evidence")
        for _ in range(120):
            if 77 in [run["seed"] for run in httpx.get(paper).json()["results"]]:
                break
            time.sleep(0.25)
        else:
            pytest.fail("a run that was added to the ledger did not appear")


def test_ends_when_interrupted(tmp_path):
    with served(tmp_path) as (address, process):
        assert httpx.get(address, timeout=60).status_code == 200
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130 and "Traceback" not in errors


def test_several_workers_answer_alike(tmp_path):
    with served(tmp_path, "--workers", "2") as (address, _):
        tags = {httpx.get(address, timeout=60).headers["etag"] for _ in range(8)}
        assert len(tags) == 1


def test_a_taken_port_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, "--port", str(port))
        assert str(port) in said and "choose another --port" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "70000"], "70000 is no port"),
        (["--host", "nowhere.invalid"], "no address of this machine"),
        (["--mine", "--host", "192.0.2.1"], "everybody on the network"),
        (["--mine", "--host", "0.0.0.0"], "leave --mine out"),
        (["--shared"], "PANTARHEI_URL"),
        (["--shared", "--public-url", "ftp://x"], "is no address for the page"),
        (["--shared", "--mine"], "choose --mine or --shared"),
        (["--workers", "0"], "choose 1 to"),
        (["--proxy", "nonsense"], "no address of a proxy"),
        (["--port", "0", "--store", "mysql://root:secret@host/db"], "not one that pantarhei knows"),
        (["--port", "0", "--store", "postgresql://127.0.0.1:1/db"], "cannot be reached"),
        (["--port", "x"], "port"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(tmp_path, words, says):
    said = refused(tmp_path, *words)
    assert says in said and "secret" not in said


def test_a_missing_package_names_the_command_that_installs_it(tmp_path):
    hidden = "import sys; sys.modules['uvicorn'] = None\n" + MAIN
    done = subprocess.run(
        [sys.executable, "-c", hidden, "serve"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "pip install 'pantarhei[feed]'" in done.stderr


def test_a_store_of_another_program_is_left_alone(tmp_path):
    foreign = tmp_path / "other.sqlite"
    import sqlite3

    with sqlite3.connect(foreign) as c:
        c.execute("CREATE TABLE theirs (x)")
    before = foreign.read_bytes()
    assert "another program" in refused(tmp_path, "--port", "0", "--store", str(foreign))
    assert foreign.read_bytes() == before
