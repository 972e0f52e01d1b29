"""Digests: what they hold, one per subscription and period, whatever is killed or runs twice."""

from __future__ import annotations

import email
import os
import re
import signal
import subprocess
import sys
import threading
from email import policy
from html.parser import HTMLParser
from pathlib import Path

import pytest

sa = pytest.importorskip("sqlalchemy", reason="needs `pip install 'pantarhei[feed]'`")
pytest.importorskip("aiosmtpd", reason="needs `pip install 'pantarhei[dev]'`")

from _mail_server import Server  # noqa: E402

from pantarhei.claims import Claim, RunInfo  # noqa: E402
from pantarhei.errors import RequestError  # noqa: E402
from pantarhei.feed import digest, loading, papers, people, schema, subscriptions  # noqa: E402
from pantarhei.feed.mail import Letterhead  # noqa: E402
from pantarhei.feed.search import Searcher  # noqa: E402
from pantarhei.feed.store import Store  # noqa: E402

DAY = 86400.0
NOW = 1_769_990_400.0  # Monday 2026-02-02, 00:00 UTC


@pytest.fixture
def head(store) -> Letterhead:
    return Letterhead("https://papers.example.org", store.secret)


def add(store: Store, *titles: str, now: float = NOW + 1, **more) -> None:
    rows = [
        {
            "key": re.sub(r"\W+", "-", title.lower()).strip("-")[:60],
            "title": title,
            "date": "2026-02-01",
            "source": "json",
            "summary": f"What {title} is about.",
        }
        | more
        for title in titles
    ]
    with store.write() as c:
        papers.add(c, rows, now=now)


def subscribed(store: Store, *names: str, period="daily", kind="all", value="", now=NOW) -> None:
    """Subscribe and confirm, without the messages."""
    with store.write() as c:
        for name in names:
            row = {"email": f"{name}@example.org", "period": period, "kind": kind, "value": value}
            row |= {"created": now, "confirmed": now, "covered": now}
            c.execute(sa.insert(schema.subscriptions).values(row))


def make(store: Store, head: Letterhead, now: float = NOW + 60, **options) -> dict[str, list]:
    """Run once; return the messages that were queued, by recipient's name."""
    with store.read() as c:
        before = c.scalar(sa.select(sa.func.max(schema.outbox.c.id))) or 0
    searcher = Searcher(store)
    try:
        made = digest.run(store, head, searcher, now=now, **options)
    finally:
        searcher.close()
    with store.read() as c:
        rows = c.execute(sa.select(schema.outbox).where(schema.outbox.c.id > before)).all()
    found: dict[str, list] = {}
    for row in rows:
        message = email.message_from_bytes(row.message, policy=policy.default)
        assert message["to"] == row.recipient
        found.setdefault(row.recipient.partition("@")[0], []).append(message)
    assert made.digests == len(rows)
    return found


def text(message) -> str:
    return message.get_body(("plain",)).get_content()


def html(message) -> str:
    return message.get_body(("html",)).get_content()


def listed(message) -> list[str]:
    """The keys of the papers in a digest, in order; both parts have the same."""
    keys = [re.findall(r"/paper/([^\s\"]+)", part(message)) for part in (text, html)]
    assert keys[0] == keys[1]
    return keys[0]


def measure(store: Store, slug: str, holds: bool, *, uid: str, now: float, scale="quick") -> None:
    said = (slug, "c", "it is <b>faster</b>", "ratio", "<=", 0.75, None)
    claim = Claim(*said, 0.5 if holds else 0.9, holds, scale, 0, 1.0)
    run = RunInfo(uid, slug, scale, 0, "cpu", f"2026-02-02T00:00:{uid[-2:]}Z", "", "", {})
    with store.write() as c:
        loading.keep(c, [(run, claim)], "here")
        c.execute(sa.update(schema.runs).where(schema.runs.c.uid == uid).values(added=now))


def test_what_is_new_once_and_then_what_is_newer(store, head):
    add(store, "Old", now=NOW)
    subscribed(store, "ada")
    assert make(store, head) == {}, "nothing is new"
    add(store, "First", "Second")
    [message] = make(store, head)["ada"]
    assert sorted(listed(message)) == ["first", "second"]
    assert message["subject"] == "2 new papers: all papers"
    add(store, "Third", now=NOW + 90)
    assert make(store, head, NOW + 120) == {}, "it is still the same day"
    assert make(store, head, NOW + DAY - 1) == {}
    [message] = make(store, head, NOW + DAY)["ada"]
    assert listed(message) == ["third"] and "1 new paper:" in message["subject"]
    assert make(store, head, NOW + 2 * DAY) == {}


def test_a_day_without_news_does_not_use_up_the_next(store, head):
    subscribed(store, "ada", now=NOW - DAY)
    assert make(store, head, NOW + 1) == {}
    add(store, "Late", now=NOW + 500)
    assert listed(make(store, head, NOW + 600)["ada"][0]) == ["late"]


def test_a_week_is_a_week(store, head):
    subscribed(store, "ada", period="weekly", now=NOW - 1)
    add(store, "First")
    assert listed(make(store, head)["ada"][0]) == ["first"]
    add(store, "Second", now=NOW + 2 * DAY)
    assert make(store, head, NOW + 7 * DAY - 1) == {}
    assert listed(make(store, head, NOW + 7 * DAY)["ada"][0]) == ["second"]


def test_one_period_can_be_asked_for(store, head):
    subscribed(store, "ada")
    subscribed(store, "ben", period="weekly")
    add(store, "First")
    assert set(make(store, head, period="weekly")) == {"ben"}
    assert set(make(store, head, period="daily")) == {"ada"}
    with pytest.raises(RequestError, match="daily"):
        make(store, head, period="dayly")


def test_only_who_confirmed_and_did_not_end_it(store, head):
    subscribed(store, "ada", "ben")
    with store.write() as c:
        subscriptions.subscribe(c, head, "cyd@example.org", "daily", "all", now=NOW)
        ben = subscriptions.of(c, "ben@example.org")[0]
        subscriptions.end(c, ben, now=NOW)
    add(store, "First")
    assert set(make(store, head)) == {"ada"}


def test_each_gets_what_it_subscribed_to(store, head):
    subscribed(store, "all")
    subscribed(store, "wing", kind="wing", value="systems")
    subscribed(store, "tag", kind="tag", value="exits")
    subscribed(store, "search", kind="search", value="fracture")
    subscribed(store, "nothing", kind="search", value="zebra")
    subscribed(store, "empty", kind="search", value="!?")
    add(store, "Cracks in steel", wing="systems", summary="How fracture grows.")
    add(store, "Leaving early", wing="compute")
    with store.write() as c:
        account = people.account(c, "x@example.org").id
        people.tag(c, account, papers.get(c, "leaving-early").id, "exits")
        c.execute(sa.update(schema.tags).values(created=NOW + 2))
    found = {name: listed(messages[0]) for name, messages in make(store, head).items()}
    assert sorted(found.pop("all")) == ["cracks-in-steel", "leaving-early"]
    assert found == {
        "wing": ["cracks-in-steel"],
        "tag": ["leaving-early"],
        "search": ["cracks-in-steel"],
    }


def test_a_paper_that_gets_the_tag_later_is_new_then(store, head):
    subscribed(store, "ada", kind="tag", value="exits")
    add(store, "First", "Second", now=NOW - 10 * DAY)

    def tag(name: str, key: str, now: float) -> None:
        with store.write() as c:
            account = people.account(c, f"{name}@example.org").id
            people.tag(c, account, papers.get(c, key).id, "exits")
            mine = schema.tags.c.account == account
            c.execute(sa.update(schema.tags).where(mine).values(created=now))

    tag("x", "first", NOW + 10)
    assert listed(make(store, head)["ada"][0]) == ["first"]
    tag("y", "first", NOW + DAY)
    assert make(store, head, NOW + DAY + 60) == {}, "it had that tag already"


def test_the_best_comes_first_and_no_more_than_can_be_read(store, head):
    subscribed(store, "ada")
    subscribed(store, "query", kind="search", value="number")
    add(store, *(f"Number {n} {'long ' * 40}" for n in range(60)), summary="word " * 200)
    with store.write() as c:
        best = papers.listing(c).papers[-1]
        people.vote(c, people.account(c, "x@example.org").id, best.id)
    found = make(store, head)
    message = found["ada"][0]
    assert listed(message)[0] == best.key and len(listed(message)) == digest.PAPERS
    assert message["subject"].startswith("60 new papers")
    more = f"{60 - digest.PAPERS} more"
    assert more in text(message) and more in html(message)
    assert "https://papers.example.org/papers" in text(message)
    assert "https://papers.example.org/search?q=number" in text(found["query"][0])
    assert len(message.as_bytes()) < 100_000, "some mail programs cut what is larger"


def test_what_was_measured_is_news(store, head):
    loading.load(store, evidence=Path("/nonexistent"), ledger="/nonexistent", now=NOW - DAY)
    measure(store, "rbqe", True, uid="old00", now=NOW - 100, scale="cpu")
    subscribed(store, "ada")
    subscribed(store, "ben", kind="wing", value="systems")
    subscribed(store, "cyd", kind="search", value="compressed images")
    assert make(store, head, NOW + 1) == {}
    measure(store, "rbqe", False, uid="new01", now=NOW + 5)
    found = make(store, head)
    assert set(found) == {"ada", "cyd"}
    message = found["ada"][0]
    assert message["subject"] == "1 newly measured: all papers" and listed(message)[:1] == ["rbqe"]
    assert "1 claim held, 1 did not" in text(message)
    assert "DID NOT HOLD: it is <b>faster</b> (measured 0.9, bound ≤ 0.75" in text(message)
    assert text(message).count("HOLD") == 1 and "HELD" not in text(message), "the old is not news"
    assert "it is &lt;b&gt;faster&lt;/b&gt;" in html(message)


def test_what_others_wrote_stays_text(store, head):
    evil = "<script>alert(1)</script><img src=https://evil.example/x.png>"
    subscribed(store, "ada", kind="search", value=evil)
    add(store, f"{evil} & more", authors=[evil], summary=f"{evil}\r\n.\r\nQUIT")
    [message] = make(store, head)["ada"]
    page = html(message)
    assert page.count("&lt;script&gt;alert(1)") >= 4, "it is shown, in title, authors, gist, query"
    found = Elements(page)
    assert not found.names & {"script", "img", "link", "iframe", "object", "form", "svg"}
    assert not found.attributes & {"src", "srcset", "background", "onload", "onerror", "onclick"}
    assert {link.split("/")[2] for link in found.links} == {"papers.example.org"}
    assert not re.search(r"url\(|@import", page), "nothing is fetched when it is read"


class Elements(HTMLParser):
    """What a mail program sees in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value for name, value in attrs if name == "href"]


def test_one_click_ends_it(store, head):
    subscribed(store, "ada")
    add(store, "First")
    [message] = make(store, head)["ada"]
    assert message["list-unsubscribe-post"] == "List-Unsubscribe=One-Click"
    link = message["list-unsubscribe"].strip().strip("<>")
    assert link in text(message) and link in html(message)
    start = "https://papers.example.org/unsubscribe/"
    assert link.startswith(start)
    with store.write() as c:
        ended = subscriptions.unsubscribe(c, store.secret, link.removeprefix(start))
        assert ended.email == "ada@example.org"
        waiting = c.execute(sa.select(schema.outbox)).all()
    assert waiting == [], "nor is what waits sent"
    add(store, "Second", now=NOW + DAY)
    assert make(store, head, NOW + DAY + 60) == {}


def everything(store: Store) -> dict[str, list]:
    with store.read() as c:
        return {
            table.name: [tuple(row) for row in c.execute(sa.select(table))]
            for table in schema.metadata.sorted_tables
        }


def test_a_dry_run_writes_files_and_changes_nothing(store, head, tmp_path):
    subscribed(store, "ada", "ben")
    subscribed(store, "cyd", period="weekly", kind="search", value="second")
    add(store, "First", "Second")
    before = everything(store)
    made = digest.run(store, head, None, now=NOW + 60, dry_run=tmp_path / "out")
    assert everything(store) == before
    assert made.digests == 2 and made.without_news == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "daily-2026-02-02-1.eml",
        "daily-2026-02-02-2.eml",
    ]
    queued = make(store, head)["ada"][0]
    written = email.message_from_bytes(made.files[0].read_bytes(), policy=policy.default)
    assert written["message-id"] == queued["message-id"] and written["date"] == queued["date"]
    assert text(written) == text(queued)
    with pytest.raises(RequestError, match="is there already"):
        digest.run(store, head, None, now=NOW + 60, dry_run=tmp_path / "out")


# --- real processes ------------------------------------------------------------------------------

_COMMAND = """
import os, signal, sys
from pantarhei import cli
from pantarhei.feed import digest, outbox, store
from pantarhei.feed.commands.digest import digest as command

place = sys.argv.pop(1)
outbox.LEASE = 1.0

def killed(owner, name, *, after=False, turn=4):
    real, calls = getattr(owner, name), []
    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == turn and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if len(calls) == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

if place == "composing": killed(digest, "compose")
if place == "queueing": killed(outbox, "put")
if place == "queued": killed(outbox, "put", after=True) # in the transaction
if place == "committed": killed(digest, "_queue", after=True)
if place == "sending": killed(outbox.Outbox, "send_due", turn=1)
if place == "leased": killed(outbox.Outbox, "_lease", after=True)
if place == "written": killed(outbox.Outbox, "_done", after=True)

cli.app.command("digest-here")(command)
sys.exit(cli.main(["digest-here", *sys.argv[1:]]))
"""


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "mail")
    yield made
    made.stop()


def command(store: Store, server: Server | None, *options: str, place="", **environment: str):
    url = store._readers.url.render_as_string(hide_password=False)
    given = {
        "PYTHONPATH": str(Path(digest.__file__).parents[2]),
        "PANTARHEI_HOME": str(Path(server.folder if server else "/nonexistent")),
        "PANTARHEI_URL": "https://papers.example.org",
        "PANTARHEI_SMTP_FROM": "papers@example.org",
        "PANTARHEI_SMTP_TLS": "none",
    }
    if server is not None:
        given |= {"PANTARHEI_SMTP_HOST": "127.0.0.1", "PANTARHEI_SMTP_PORT": str(server.port)}
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, place, "--store", url, *options],
        env={**os.environ, **given, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def drained(store: Store, server: Server) -> None:
    """Run the command until nothing waits, as cron would."""
    for _ in range(20):
        process = command(store, server)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        with store.read() as c:
            query = sa.select(schema.outbox.c.id).where(schema.outbox.c.sent.is_(None))
            if not c.execute(query).all():
                return
        threading.Event().wait(0.3)
    raise AssertionError("messages wait for ever")


NAMES = [f"n{number}" for number in range(8)]
ONCE = {f"{name}@example.org": 1 for name in NAMES}


def test_the_command_makes_and_sends(store, server):
    subscribed(store, *NAMES)
    add(store, "First")
    process = command(store, server)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors
    assert said.startswith("8 digests made, nothing new for 0 subscriptions. 8 sent, 0 put off,")
    assert server.count() == ONCE
    sent = email.message_from_string(server.taken[0]["content"], policy=policy.default)
    assert listed(sent) == ["first"] and sent["from"] == "papers@example.org"
    drained(store, server)
    assert server.count() == ONCE


@pytest.mark.parametrize(
    "place",
    ["composing", "queueing", "queued", "committed", "sending", "leased", "written"],
)
def test_kill_9_neither_loses_nor_doubles_a_digest(store, server, place):
    subscribed(store, *NAMES)
    add(store, "First")
    process = command(store, server, place=place)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(server.taken) < len(NAMES), "it was killed before it was done"
    drained(store, server)
    assert server.count() == ONCE


def test_many_at_once_make_one_digest_each(store, server):
    subscribed(store, *NAMES)
    add(store, "First")
    processes = [command(store, server) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    drained(store, server)
    assert server.count() == ONCE


def test_a_server_that_is_down_is_said_and_nothing_lost(store, server):
    subscribed(store, *NAMES)
    add(store, "First")
    process = command(store, server, PANTARHEI_SMTP_PORT="1")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "8 put off" in said and "rest waits" in errors
    with store.write() as c:
        c.execute(sa.update(schema.outbox).values(due=0.0))
    drained(store, server)
    assert server.count() == ONCE


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        ([], {"PANTARHEI_SMTP_HOST": ""}, "No mail server is named"),
        ([], {"PANTARHEI_URL": ""}, "set PANTARHEI_URL"),
        (["--out", "x"], {}, "--out is where --dry-run writes"),
        (["--period", "monthly"], {}, "Unknown period 'monthly'"),
        (["--public-url", "example"], {}, "is not an address"),
        ([], {"PANTARHEI_SMTP_TLS": "maybe"}, "choose starttls, tls or none"),
    ],
)
def test_a_wrong_request_is_one_sentence(dialect, store, server, options, environment, said):
    if dialect != "sqlite":
        pytest.skip("the same with either store")
    subscribed(store, "ada")
    add(store, "First")
    process = command(store, server, *options, **environment)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and said in errors and errors.count("\n") == 1 and not out
    assert not server.taken and make(store, Letterhead("https://x.example", "s"))


def test_dry_run_from_the_command_line_needs_no_server(store, tmp_path):
    subscribed(store, "ada")
    add(store, "First")
    process = command(store, None, "--dry-run", "--out", str(tmp_path / "out"), "--json")
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert '"digests": 1' in said and len(list((tmp_path / "out").glob("*.eml"))) == 1
