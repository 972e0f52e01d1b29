"""`pantarhei feed add` and `update` as processes, killed and without a network too."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from arxiv_server import Arxiv, Paper

from pantarhei.feed import schema
from pantarhei.feed.store import Store

ROOT = Path(__file__).resolve().parents[2]
BIB = "@misc{smith, title={Deep Rivers}, author={Smith, Ann}, year=2020}\n"
PROGRAM = """
import sys, typer
from pantarhei import cli
from pantarhei.feed.commands.add import add
from pantarhei.feed.commands.update import update
if not any("feed" in (g.name, g.typer_instance.info.name) for g in cli.app.registered_groups):
    feed = typer.Typer(name="feed")
    feed.command()(add)
    feed.command()(update)
    cli.app.add_typer(feed)
sys.exit(cli.main())
"""


@pytest.fixture
def server():
    with Arxiv(page=7).running() as running:
        yield running


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def begin(home, server, *arguments, program=PROGRAM, **environment):
    dropped = ("http_proxy", "https_proxy", "all_proxy")
    env = {k: v for k, v in os.environ.items() if k.lower() not in dropped}
    env |= {
        "PANTARHEI_HOME": str(home),
        "PANTARHEI_ARXIV_API": server.url + "/api/query",
        "PANTARHEI_ARXIV_OAI": server.url + "/oai",
        "PANTARHEI_ARXIV_PAUSE": "0",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-c", program, "feed", *arguments],
        env=env | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(home, server, *arguments, input="", **environment):
    process = begin(home, server, *arguments, **environment)
    out, err = process.communicate(input, timeout=120)
    return process.returncode, out, err


def stored(url) -> list[tuple]:
    with Store(url) as store, store.read() as c:
        p = schema.papers.c
        return [tuple(r) for r in c.execute(sa.select(p.arxiv, p.title, p.date).order_by(p.key))]


def recent(count: int) -> list[Paper]:
    """Return papers of the last days: the command goes by the clock."""
    now = datetime.now(UTC)
    return [
        Paper(
            f"2601.{number:05}",
            f"{now - timedelta(days=4) + number * timedelta(minutes=7):%Y-%m-%dT%H:%M:%SZ}",
            title=f"Paper {number}",
        )
        for number in range(1, count + 1)
    ]


def expected(papers: list[Paper]) -> list[tuple]:
    return sorted((p.id, p.title, p.published[:10]) for p in papers)


def test_add_and_update(home, server, tmp_path):
    server.papers = recent(30)
    (tmp_path / "a.bib").write_text(BIB)
    code, out, err = run(home, server, "add", "2601.00001", str(tmp_path / "a.bib"))
    assert (code, out) == (0, "2 new, 0 changed, 0 known already.\n"), err
    code, out, err = run(home, server, "add", "-", "--json", input="arXiv:2601.00001\n2601.00002v1")
    assert (code, json.loads(out)) == (0, {"new": 1, "changed": 0, "same": 1}), err
    code, out, err = run(home, server, "add", "-", input=BIB)
    assert (code, out) == (0, "0 new, 0 changed, 1 known already.\n"), err
    for source, new in (("api", 28), ("oai", 0)):
        code, out, err = run(home, server, "update", "--days", "7", "--source", source)
        assert code == 0 and f": {new} new, 0 changed" in out, err
    assert [row for row in stored(home / "feed.sqlite") if row[0]] == expected(server.papers)
    code, out, err = run(home, server, "update", "--category", "cs.LG", "--json")
    assert json.loads(out)[0]["category"] == "cs.LG", err


def test_without_a_network_one_sentence_and_nothing_changes(home, server):
    nowhere = dict.fromkeys(("PANTARHEI_ARXIV_API", "PANTARHEI_ARXIV_OAI"), "http://127.0.0.1:9/x")
    for arguments in (
        ("add", "2601.00001"),
        ("update", "--category", "cs.LG", "--days", "7"),
        ("update", "--category", "cs.LG", "--source", "oai"),
    ):
        code, out, err = run(home, server, *arguments, **nowhere)
        assert code == 2 and out == ""
        assert err.count("\n") == 1 and "cannot be reached" in err
        assert err.endswith("; nothing was changed.\n")
    assert stored(home / "feed.sqlite") == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("add", "nonsense"), "'nonsense' is neither an arXiv identifier"),
        (("add", "-"), "'standard input' holds no BibTeX entries."),
        (("update", "--category", "x y"), "'x y' is no category of arXiv"),
        (("update", "--category", "cs.LG", "--category", "?"), "'?' is no category"),
        (("update", "--days", "0"), "--days is a number from 1 to 3650, not 0."),
        (("update", "--source", "rss"), "Unknown source 'rss': choose api or oai."),
        (("update", "--store", "mysql://x/y"), "mysql"),
    ],
)
def test_a_wrong_request_is_one_sentence(home, server, arguments, sentence):
    code, out, err = run(home, server, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and sentence in err
    assert server.requests == []


@pytest.mark.parametrize("source", ["api", "oai"])
def test_killed_anywhere_nothing_is_lost_or_doubled(home, server, new_url, source):
    """kill -9 at random moments, many times, then once to the end."""
    server.papers, server.api_page, url = recent(80), 7, new_url()
    command = ("update", "--days", "7", "--source", source, "--store", url)
    seed = random.randrange(2**32)
    chance, kills = random.Random(seed), 0
    for _ in range(5):
        heard, countdown = threading.Event(), iter(range(chance.randrange(3), -1, -1))
        server.before = lambda n=countdown, heard=heard: next(n, 0) or heard.set()
        process = begin(home, server, *command)
        heard.wait(60)
        try:  # somewhere in a request, in its parsing, in the transaction, or past the end
            process.wait(chance.random() * 0.05)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate(timeout=60)
        some = stored(url)
        assert set(some) <= set(expected(server.papers)), f"seed {seed}"
        assert len(some) == len(set(some))
    server.before = lambda: None
    code, _, err = run(home, server, *command)
    assert code == 0, err
    assert stored(url) == expected(server.papers), f"seed {seed}"
    assert kills, "no process was alive to be killed"


def test_what_is_not_installed_is_named(home, server):
    program = f"import sys; sys.modules['httpx'] = None\n{PROGRAM}"
    for arguments in (("add", "2601.00001"), ("update",)):
        code, out, err = run(home, server, *arguments, program=program)
        assert (code, out) == (2, "")
        assert err == (
            "The page needs httpx, which is not installed: pip install 'pantarhei[feed]'.\n"
        )


def test_interrupted_at_the_keyboard_it_says_how_to_go_on(home, server):
    server.papers = recent(20)
    wait, asked = threading.Event(), threading.Event()
    server.before = lambda: asked.set() or (wait.wait(30) and None)
    process = begin(home, server, "update", "--source", "oai")
    assert asked.wait(60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    wait.set()
    assert process.returncode == 130
    assert err.splitlines()[-1] == "Interrupted; the same command goes on from here."


def test_two_updates_at_once_take_turns_and_double_nothing(home, server):
    server.papers = recent(40)
    both = [begin(home, server, "update", "--days", "7", "--source", s) for s in ("oai", "api")]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert stored(home / "feed.sqlite") == expected(server.papers)
    assert server.most == 1
