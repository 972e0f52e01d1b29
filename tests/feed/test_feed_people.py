"""People log in once per link, and every count stays in step with what they gave."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import sqlalchemy as sa

from pantarhei.claims import Claim, RunInfo
from pantarhei.errors import RequestError
from pantarhei.feed import loading, papers, people, schema, trends
from pantarhei.feed.store import Store

NOW = 1.8e9


@pytest.fixture
def filled(store):
    """Three papers, and accounts 1 to 3."""
    with store.write() as c:
        papers.add(c, ({"arxiv": f"2601.{n:05d}", "title": "t", "date": f"2026-01-{n:02d}",
                        "source": "arxiv"} for n in (1, 2, 3)), now=NOW)  # fmt: skip
        for name in "abc":
            people.account(c, f"{name}@example.org", now=NOW)
    return store


def recounted(store):
    """Return, computed the slow way, what every paper's row should say, beside what it says."""
    with store.read() as c:
        rows = {
            name: c.execute(sa.select(schema.metadata.tables[name])).all()
            for name in ("papers", "votes", "comments", "runs", "claims")
        }
    for paper in sorted(rows["papers"], key=lambda row: row.id):
        votes = [v for v in rows["votes"] if v.paper == paper.id]
        said = [v for v in rows["comments"] if v.paper == paper.id]
        runs = {r.uid: r for r in rows["runs"] if r.paper == paper.id}
        claims = [k for k in rows["claims"] if k.run in runs]
        events = [(1.0, min(trends.seconds(paper.date), paper.added))]
        events += [(1.0, v.created) for v in votes]
        events += [(0.25, trends.seconds(runs[k.run].date)) for k in claims]
        wanted = (len(votes), len(said), sum(k.holds for k in claims), len(claims))
        yield (*wanted, trends.heat(events)), (
            paper.votes, paper.comments, paper.held, paper.measured, paper.heat)  # fmt: skip


def in_step(store):
    return all(wanted == kept for wanted, kept in recounted(store))


def measure(c, draw, uid):
    """Let a run, newer or older than those before, measure some claims of the card."""
    date, scale = f"2026-0{draw.randint(1, 9)}-01T00:00:00Z", draw.choice(("quick", "cpu"))
    run = RunInfo(uid, "slug", scale, 0, "cpu", date, "", "", {})
    results = [
        (run, Claim("slug", id, "s", "q", "<=", 1.0, None, 0.5, holds, scale, 0, 1.0))
        for id, holds in (("x", draw.random() < 0.5), ("y", True))
    ]
    loading.keep(c, results[: draw.randint(1, 2)], draw.choice(("here", "shipped")))


@pytest.mark.parametrize("seed", range(3))
def test_counts_and_heat_stay_in_step_whatever_happens(filled, seed):
    draw, accounts, everything = random.Random(seed), [1, 2, 3], False
    with filled.write() as c:  # paper 1 is a card, which runs measure
        card = sa.update(schema.papers).where(schema.papers.c.id == 1)
        c.execute(card.values(source="catalogue", key="slug"))
    for turn in range(60):
        when, who, paper = NOW + turn * 3600, draw.choice(accounts), draw.randint(1, 3)
        with filled.write() as c:
            said = people.comments(c, paper)
            match draw.randint(0, 6):
                case 0 | 1:
                    people.vote(c, who, paper, draw.random() < 0.7, now=when)
                case 2:
                    nonce = f"nonce {draw.randint(0, 3)} {who} {paper}"
                    people.comment(c, who, paper, "hm", nonce, now=when)
                case 3 if said:
                    people.delete(c, said[0].account, said[0].id)
                case 4:
                    measure(c, draw, f"run {turn}")
                case 5:
                    date = f"2026-01-{draw.randint(10, 28)}"
                    row = {"arxiv": f"2601.{paper:05d}", "title": "t", "source": "arxiv"}
                    papers.add(c, [row | {"date": date}], now=when)
                case 6 if turn > 40:
                    people.forget(c, who)
                    accounts.remove(who)
                    accounts.append(people.account(c, f"{turn}@example.org").id)
        rows = list(recounted(filled))
        assert all(wanted == kept for wanted, kept in rows)
        everything |= all(rows[0][1])
    assert everything  # votes, comments and claims, some held, of one paper at once


def test_a_transaction_that_fails_leaves_counts_as_they_were(filled):
    with pytest.raises(ZeroDivisionError), filled.write() as c:
        people.vote(c, 1, 1)
        people.comment(c, 1, 1, "x", "nonce-nonce")
        raise ZeroDivisionError
    assert [kept[:2] for _, kept in recounted(filled)] == [(0, 0)] * 3
    assert in_step(filled)


def test_a_vote_is_one_however_often_it_is_cast(filled):
    with filled.write() as c:
        assert people.vote(c, 1, 1, now=NOW) == 1
        before = papers.get(c, "2601.00001")
        assert people.vote(c, 1, 1, now=NOW + 9e9) == 1  # its time is that of the first
        assert papers.get(c, "2601.00001") == before
        assert people.vote(c, 2, 1) == 2
        assert people.vote(c, 2, 1, False) == people.vote(c, 2, 1, False) == 1
        assert papers.listing(c, "heat").papers[0].id == 1


def test_voters_at_once_are_all_counted(filled):
    code = """
        import sys
        from pantarhei.feed import people
        from pantarhei.feed.store import Store
        with Store(sys.argv[1]) as store:
            for n in range(8):
                with store.write() as c:
                    me = people.account(c, f"{sys.argv[2]}-{n}@example.org").id
                    people.vote(c, me, 1)
                with store.write() as c:
                    people.comment(c, me, 1, "x", f"{sys.argv[2]}-{n}-nonce")
    """
    workers = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), filled.url, str(n)])
        for n in range(3)
    ]
    assert [worker.wait() for worker in workers] == [0] * 3
    assert in_step(filled)
    assert next(recounted(filled))[1][:2] == (24, 24)


def test_a_comment_comes_once_though_its_request_comes_again(filled):
    with filled.write() as c:
        made = people.comment(c, 1, 2, " *hello*\r\nyou\0 ", "form-0001", now=NOW)
    with filled.write() as c:
        assert people.comment(c, 1, 2, "another text", "form-0001") == made
        assert made.body == "*hello*\nyou" and made.name == "a"
        for account, paper in ((2, 2), (1, 3)):
            with pytest.raises(RequestError, match="used before"):
                people.comment(c, account, paper, "mine", "form-0001")
        other = people.comment(c, 2, 2, "second", "form-0002")
        assert people.comments(c, 2) == [made, other]
        assert people.comments(c, 2, after=made.id) == [other]
        assert people.comments(c, 2, limit=1) == [made] and people.comments(c, 1) == []
    assert in_step(filled)


def test_the_same_form_sent_by_many_at_once_makes_one_comment(filled):
    made = []

    def send():
        with filled.write() as c:
            made.append(people.comment(c, 1, 1, "x", "form-0001"))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 6 and len(set(made)) == 1


def test_a_kill_before_the_comment_is_kept_and_the_request_again(filled):
    code = """
        import sys, time
        from pantarhei.feed import people
        from pantarhei.feed.store import Store
        store = Store(sys.argv[1])
        with store.write() as c:
            people.comment(c, 1, 1, "x", "form-0001")
            people.vote(c, 1, 1)
            print("now", flush=True)
            time.sleep(600)
    """
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), filled.url], stdout=subprocess.PIPE
    )
    assert worker.stdout.readline() == b"now\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    with Store(filled.url) as again:
        assert next(recounted(again))[1][:2] == (0, 0)
        for _ in range(2):
            with again.write() as c:
                people.comment(c, 1, 1, "x", "form-0001")
        assert next(recounted(again))[1][:2] == (0, 1)
        assert in_step(again)


def test_only_ones_own_comments_are_changed(filled):
    with filled.write() as c:
        made = people.comment(c, 1, 1, "x", "form-0001", now=NOW)
        for account, comment in ((2, made.id), (1, 99)):
            with pytest.raises(RequestError, match="no such comment of yours"):
                people.edit(c, account, comment, "y")
            with pytest.raises(RequestError, match="no such comment of yours"):
                people.delete(c, account, comment)
        edited = people.edit(c, 1, made.id, "y", now=NOW + 1)
        assert (edited.body, edited.created, edited.changed) == ("y", NOW, NOW + 1)
        assert people.delete(c, 1, made.id) == 1
        assert people.comments(c, 1) == []


@pytest.mark.parametrize(
    ("body", "nonce"),
    [("", "form-0001"), (" \n ", "form-0001"), ("x" * 10_001, "form-0001"), ("x", "short"),
     ("x", "n" * 101), ("x", "form\0 0001"), ("x", "form-öööö")],
)  # fmt: skip
def test_a_comment_that_is_none(filled, body, nonce):
    with filled.write() as c, pytest.raises(RequestError):
        people.comment(c, 1, 1, body, nonce)


def test_what_is_gone_is_said(filled):
    with filled.write() as c:
        for paper, account, gone in ((99, 1, "paper"), (1, 99, "account")):
            for act in (people.vote, people.save):
                with pytest.raises(RequestError, match=f"This {gone} is not here"):
                    act(c, account, paper)
            with pytest.raises(RequestError, match=f"This {gone} is not here"):
                people.tag(c, account, paper, "x")
            with pytest.raises(RequestError, match=f"This {gone} is not here"):
                people.comment(c, account, paper, "x", "form-0001")


def test_tags(filled):
    with filled.write() as c:
        assert people.tag(c, 1, 1, " Early  EXIT ") == "early-exit"
        assert people.tag(c, 1, 1, "early-exit") == people.tag(c, 2, 1, "Early Exit")
        people.tag(c, 1, 2, "ﬁeld")  # a ligature is two letters
        assert people.tags(c, 1) == [("early-exit", 2)]
        assert people.tags(c) == [("early-exit", 2), ("field", 1)]
        assert people.mine(c, 1, [1, 2, 3]).tags == {1: ("early-exit",), 2: ("field",)}
        people.tag(c, 1, 1, "early exit", on=False)
        assert people.tags(c, 1) == [("early-exit", 1)]
        for wrong in ("", " ", "-x", "a/b", "<b>", "x" * 41, "a\u202eb", "a,b"):
            with pytest.raises(RequestError, match="not a tag"):
                people.tag(c, 1, 1, wrong)
        for n in range(20):
            people.tag(c, 1, 3, f"t{n}")
        people.tag(c, 1, 3, "t0")
        with pytest.raises(RequestError, match="20 tags"):
            people.tag(c, 1, 3, "one-more")


def test_the_own_list_and_what_is_mine(filled):
    with filled.write() as c:
        for turn, paper in enumerate((2, 3, 1)):
            people.save(c, 1, paper, now=NOW + turn)
        people.save(c, 1, 2, now=NOW + 99)  # saved already
        first = people.saved(c, 1, limit=2)
        assert [p.id for p in first.papers] == [1, 3]
        second = people.saved(c, 1, limit=2, after=first.next)
        assert [p.id for p in second.papers] == [2] and second.next is None
        assert people.saved(c, 2) == papers.Page((), None)
        people.save(c, 1, 3, on=False)
        people.vote(c, 1, 2)
        mine = people.mine(c, 1, [1, 2, 3])
        assert (mine.votes, mine.saved) == ({2}, {1, 2})
        assert people.mine(c, 1, [3]) == people.Mine(frozenset(), frozenset(), {})
        for wrong in ({"limit": 0}, {"after": "x"}, {"after": papers.fold("2026-01-01", 1)}):
            with pytest.raises(RequestError):
                people.saved(c, 1, **wrong)


def test_a_link_logs_in_once_and_in_time(store):
    with store.write() as c:
        token = people.login_token(c, " Ada@Example.org", now=NOW)
        late = people.login_token(c, "ada@example.org", now=NOW)
        assert len(token) >= 43
        kept = c.execute(sa.select(schema.tokens)).all()
        assert hashlib.sha256(token.encode()).hexdigest() in {row.hash for row in kept}
        assert token not in str(kept)
        assert people.login_email(c, token, now=NOW) == "ada@example.org"
        assert people.session(c, token, now=NOW) is None  # a link is no session
        account, session = people.log_in(c, token, now=NOW + 899)
        assert (account.email, account.name) == ("ada@example.org", "ada")
        assert people.log_in(c, token, now=NOW + 899) is None
        assert people.login_email(c, token, now=NOW + 899) is None
        assert people.log_in(c, late, now=NOW + 900) is None
        assert people.log_in(c, session, now=NOW) is None  # nor a session a link
    with store.read() as c:
        assert people.session(c, session, now=NOW + 30 * 86400) == account
        assert people.session(c, session, now=NOW + 31 * 86400) is None
        for wrong in ("", "x", token, "\0", "\ud800", "x" * 100_000):
            assert people.session(c, wrong, now=NOW) is None
    with store.write() as c:
        people.log_out(c, session)
        assert people.session(c, session, now=NOW) is None
        # what has expired is swept away
        people.login_token(c, "b@example.org", now=NOW + 1e6)
        assert len(c.execute(sa.select(schema.tokens)).all()) == 1


def test_one_link_opened_by_many_at_once_logs_in_once(store):
    with store.write() as c:
        token = people.login_token(c, "a@example.org")
    found = []

    def open_link():
        with store.write() as c:
            found.append(people.log_in(c, token))

    threads = [threading.Thread(target=open_link) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and sum(one is not None for one in found) == 1


@pytest.mark.parametrize(
    "wrong",
    ["", "a", "a@b", "you@localhost", "a b@c.de", "a@b@c.de", "<a@c.de>", "a@c.de\r\nBcc: x@y.zz",
     "a,b@c.de", "x" * 250 + "@c.de", "a\0@c.de", "\ud800@c.de", "a@c.de\u2028x"],
)  # fmt: skip
def test_what_is_no_address(store, wrong):
    with store.write() as c, pytest.raises(RequestError, match="not an e-mail address"):
        people.login_token(c, wrong)


def test_accounts_are_made_once_renamed_and_forgotten(filled):
    with filled.write() as c:
        me = people.account(c, people.LOCAL)
        assert people.account(c, people.LOCAL) == me and me.name == "you"
        people.rename(c, me.id, "  Ada \n L. ")
        assert people.account(c, people.LOCAL).name == "Ada L."
        for wrong in ("", "x" * 51, "a\u202eb"):
            with pytest.raises(RequestError, match="A name has"):
                people.rename(c, me.id, wrong)
        _, session = people.log_in(c, people.login_token(c, "a@example.org"))
        for account in (1, 2):
            people.vote(c, account, 1)
            people.comment(c, account, 2, "x", f"form-000{account}")
            people.save(c, account, 3)
            people.tag(c, account, 3, "x")
        people.forget(c, 1)
        assert people.session(c, session) is None
        assert people.tags(c, 3) == [("x", 1)]
    assert in_step(filled)
    assert [kept[:2] for _, kept in recounted(filled)] == [(1, 0), (0, 1), (0, 0)]
