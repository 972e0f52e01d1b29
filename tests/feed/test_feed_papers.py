"""Papers are put in once, believed by source, and listed without gaps, on either database."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap

import pytest
import sqlalchemy as sa

from pantarhei.errors import RequestError
from pantarhei.feed import papers, schema, trends
from pantarhei.feed.papers import Added
from pantarhei.feed.store import Store


def row(number=1, **other):
    arxiv = f"2601.{number:05d}"
    return {"key": arxiv, "arxiv": arxiv, "title": f"Paper {number}", "summary": "About it.",
            "date": "2026-01-31", "authors": ["A. One", "B. Two"], "source": "arxiv",
            "categories": "cs.LG stat.ML", **other}  # fmt: skip


CARD = {"key": "slug", "arxiv": "2601.00001", "title": "The card", "summary": "Our own words.",
        "date": "2026-01-30", "authors_count": 2, "wing": "compute", "source": "catalogue",
        "status": "runs", "code": "https://example.org/code"}  # fmt: skip


def add(store, *rows, now=1.8e9):
    with store.write() as c:
        return papers.add(c, rows, now=now)


def every(store):
    with store.read() as c:
        return list(papers.listing(c, limit=1000).papers)


def test_a_paper_comes_back_as_it_was_given(store):
    assert add(store, row(doi="https://doi.org/10.1000/abc, 10.1000/other")) == Added(1, 0, 0)
    with store.read() as c:
        paper = papers.get(c, "2601.00001")
    assert paper.authors == ("A. One", "B. Two") and paper.authors_count == 2
    assert (paper.title, paper.summary, paper.date) == ("Paper 1", "About it.", "2026-01-31")
    assert (paper.doi, paper.code, paper.wing) == ("10.1000/abc", None, None)
    assert (paper.categories, paper.source, paper.status) == ("cs.LG stat.ML", "arxiv", "listed")
    assert (paper.votes, paper.comments, paper.held, paper.measured) == (0, 0, 0, 0)
    assert paper.badge == "listed" and paper.added == paper.changed == 1.8e9
    assert paper.heat == trends.seconds("2026-01-31") / trends.HALF_LIFE


def test_adding_again_changes_nothing_and_news_changes_what_is_new(store):
    add(store, row(1), row(2))
    assert add(store, row(1), row(2), now=1.9e9) == Added(0, 0, 2)
    again = row(1, arxiv="arXiv:2601.00001v3", key="another", title="Renamed", summary="")
    assert add(store, again, row(3), now=1.9e9) == Added(1, 1, 0)
    one = every(store)[-1]
    assert (one.key, one.title, one.summary) == ("2601.00001", "Renamed", "About it.")
    assert (one.added, one.changed) == (1.8e9, 1.9e9)


def test_one_paper_several_times_in_one_batch_is_one(store):
    assert add(store, row(1), row(1), row(1, title="Later")) == Added(1, 1, 1)
    assert [p.title for p in every(store)] == ["Later"]


def test_a_card_keeps_its_own_words_and_learns_what_it_lacks(store):
    add(store, CARD)
    assert add(store, row(1)) == Added(0, 1, 0)
    assert add(store, row(1)) == Added(0, 0, 1)
    [paper] = every(store)
    assert (paper.key, paper.title, paper.summary) == ("slug", "The card", "Our own words.")
    assert (paper.date, paper.status, paper.source) == ("2026-01-30", "runs", "catalogue")
    assert (paper.authors, paper.categories) == (("A. One", "B. Two"), "cs.LG stat.ML")


def test_a_card_takes_over_a_paper_that_was_there_and_old_addresses_still_lead_to_it(store):
    add(store, row(1))
    assert add(store, CARD) == Added(0, 1, 0)
    with store.read() as c:
        for name in ("slug", "2601.00001", "2601.00001v2"):
            assert papers.get(c, name).title == "The card"
        assert papers.get(c, "nothing") is None and papers.get(c, "sl\0u\ud800g") is None
    assert every(store)[0].authors == ("A. One", "B. Two")


def test_a_lesser_source_only_fills_in(store):
    add(store, row(1))
    bib = row(1, source="bibtex", title="PAPER ONE", doi="10.1000/x")
    assert add(store, bib) == Added(0, 1, 0)
    [paper] = every(store)
    assert (paper.title, paper.doi, paper.source) == ("Paper 1", "10.1000/x", "arxiv")


def test_two_papers_that_want_one_key(store):
    add(store, row(1, key="smith2026"))
    assert add(store, row(2, key="smith2026")) == Added(1, 0, 0)
    assert {p.key for p in every(store)} == {"smith2026", "2601.00002"}
    # a card's slug is its own, whoever has it
    assert add(store, CARD | {"key": "smith2026", "arxiv": "2601.00009"}) == Added(1, 0, 0)
    keys = {p.key: p.title for p in every(store)}
    assert keys["smith2026"] == "The card" and keys["smith2026-2601.00001"] == "Paper 1"
    # and where the card is known as another paper already
    add(store, row(5, key="slug", arxiv=None, source="json"), row(1))
    assert add(store, CARD | {"arxiv": "2601.00002"}) == Added(0, 1, 0)
    assert {p.title: p.key for p in every(store)}["The card"] in ("slug", "smith2026")
    assert len(every(store)) == 4


def test_without_an_arxiv_identifier_the_key_decides(store):
    bib = {"key": "müller/2026 a", "title": "T", "date": "2026-01-01", "source": "bibtex"}
    assert add(store, bib) == Added(1, 0, 0)
    assert add(store, bib | {"summary": "s", "arxiv": "2601.00007"}) == Added(0, 1, 0)
    assert add(store, row(7)) == Added(0, 1, 0)
    [paper] = every(store)
    assert (paper.key, paper.arxiv, paper.title) == ("müller-2026-a", "2601.00007", "Paper 7")


def test_an_arxiv_identifier_as_key_is_that_papers_alone(store):
    assert add(store, row(1), row(2, key="2601.00001"), row(3, key="2601.00003v2", arxiv=None),
               row(4, key="hep-th/9901001", arxiv=None)) == Added(4, 0, 0)  # fmt: skip
    assert [(p.key, p.arxiv) for p in reversed(every(store))] == [
        ("2601.00001", "2601.00001"), ("2601.00002", "2601.00002"), ("2601.00003", "2601.00003"),
        ("hep-th-9901001", "hep-th/9901001"),
    ]  # fmt: skip
    with store.read() as c:
        assert papers.get(c, "hep-th/9901001v1").key == "hep-th-9901001"


@pytest.mark.parametrize(
    "wrong",
    [
        {"title": " "}, {"title": "x" * 1001}, {"title": 7}, {"title": None},
        {"date": "2026-02-30"}, {"date": "20260131"}, {"date": None},
        {"arxiv": "../x"}, {"arxiv": None, "key": "..."},
        {"source": "elsewhere"}, {"status": "runs"}, {"wing": "left"}, {"authors": [1]},
        {"authors": ["x"] * 10_001}, {"authors_count": -1}, {"authors_count": "many"},
        {"code": "javascript:alert(1)"}, {"summary": "x" * 20_001}, {"categories": 5},
    ],
)  # fmt: skip
def test_what_is_no_paper_is_refused_with_its_name_and_nothing_is_kept(store, wrong):
    with pytest.raises(RequestError, match=r"^Paper '.*' cannot be added: .*\.$"):
        add(store, row(1), row(2, **wrong))
    assert every(store) == []


def test_text_no_database_keeps_is_made_text(store):
    add(store, row(1, title="a\0b \ud800 \n c", summary="x\0y"))
    [paper] = every(store)
    assert (paper.title, paper.summary) == ("ab ? c", "xy")


def test_a_kill_in_a_bulk_ingest_loses_and_doubles_nothing(store):
    code = """
        import sys, time
        from pantarhei.feed import papers
        from pantarhei.feed.store import Store
        def rows(first, last):
            for n in range(first, last):
                if n == 5000:
                    print("half", flush=True)
                    time.sleep(600)
                yield {"arxiv": f"2601.{n:05d}", "title": "t", "date": "2026-01-31",
                       "source": "arxiv"}
        store = Store(sys.argv[1])
        with store.write() as c:
            papers.add(c, rows(0, 2000))
        with store.write() as c:
            papers.add(c, rows(1000, 9000))
    """
    worker = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), store.url], stdout=subprocess.PIPE
    )
    assert worker.stdout.readline() == b"half\n"
    os.kill(worker.pid, signal.SIGKILL)
    worker.communicate()
    count = sa.select(sa.func.count()).select_from(schema.papers)
    with Store(store.url) as again:
        with again.read() as c:
            assert c.scalar(count) == 2000
        rows = (row(n, title="t", key=None) for n in range(1000, 9000))
        assert add(again, *rows) == Added(7000, 1000, 0)
        with again.read() as c:
            assert c.scalar(count) == 9000


def test_writers_from_several_processes_add_each_paper_once(store):
    code = """
        import random, sys
        from pantarhei.feed import papers
        from pantarhei.feed.store import Store
        new = 0
        numbers = list(range(300))
        random.Random(sys.argv[2]).shuffle(numbers)
        with Store(sys.argv[1]) as store:
            for first in range(0, 300, 50):
                rows = [{"arxiv": f"2601.{n:05d}", "title": "t", "date": "2026-01-31",
                         "source": "arxiv"} for n in numbers[first:first + 50]]
                with store.write() as c:
                    new += papers.add(c, rows).new
        print(new)
    """
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), store.url, str(n)],
            stdout=subprocess.PIPE,
        )
        for n in range(3)
    ]
    assert sum(int(worker.communicate()[0]) for worker in workers) == 300
    assert len(every(store)) == 300


def test_days_follow_each_other_and_the_hottest_is_first(store):
    add(store, row(1, date="2026-01-01"), row(2, date="2026-01-03"), row(3, date="2026-01-03"),
        row(4, date="2026-01-05", wing="compute"), row(5, date="2999-01-01"))  # fmt: skip
    with store.write() as c:
        c.execute(
            sa.update(schema.papers).where(schema.papers.c.key == "2601.00002").values(heat=9e9)
        )
    with store.read() as c:
        newest = papers.day(c)
        assert (newest.date, newest.previous, newest.next) == (
            "2026-01-05", "2026-01-03", "2999-01-01")  # fmt: skip
        middle = papers.day(c, "2026-01-03")
        assert [p.title for p in middle.papers] == ["Paper 2", "Paper 3"]
        assert (middle.previous, middle.next, middle.total) == ("2026-01-01", "2026-01-05", 2)
        few = papers.day(c, "2026-01-03", limit=1)
        assert len(few.papers) == 1 and few.total == 2
        empty = papers.day(c, "2026-01-02")
        assert (empty.papers, empty.total, empty.previous, empty.next) == (
            (), 0, "2026-01-01", "2026-01-03")  # fmt: skip
        assert papers.day(c, wing="compute").previous is None
        for wrong in ("yesterday", "2026-1-1", "2026-02-30", "", "x" * 10_000):
            with pytest.raises(RequestError, match="not a date"):
                papers.day(c, wrong)


def test_an_empty_store_has_a_day_and_a_page(store):
    with store.read() as c:
        found = papers.day(c)
        assert (found.papers, found.total, found.previous, found.next) == ((), 0, None, None)
        assert papers.listing(c) == papers.Page((), None)
        assert papers.by_id(c, []) == [] and papers.results(c, 1) == []


@pytest.mark.parametrize("order", ["date", "heat"])
def test_pages_leave_nothing_out_and_list_nothing_twice(store, order):
    draw = random.Random(0)
    add(store, *(row(n, date=f"2026-01-{draw.randint(1, 9):02d}") for n in range(57)))
    seen, cursor = [], None
    with store.read() as c:
        wanted = list(papers.listing(c, order, limit=1000).papers)
    for turn in itertools.count():
        with store.read() as c:
            page = papers.listing(c, order, after=cursor, limit=10)
        seen += page.papers
        cursor = page.next
        if cursor is None:
            break
        add(store, row(100 + turn, date="2026-02-01"))  # news come before, not between
    assert seen == wanted
    keys = [(getattr(p, order), p.id) for p in seen]
    assert keys == sorted(keys, reverse=True) and len(set(keys)) == 57


def test_filters(store):
    add(store, CARD, CARD | {"key": "b", "arxiv": None, "wing": "systems", "status": "planned"},
        row(3, date="2026-02-01"))  # fmt: skip
    with store.write() as c:
        account = c.execute(sa.insert(schema.accounts), {"email": "a@b", "name": "a", "created": 0})
        tag = {"account": account.inserted_primary_key[0], "paper": 3, "tag": "x"}
        c.execute(sa.insert(schema.tags), tag)
    with store.read() as c:

        def keys(**filters):
            return [p.key for p in papers.listing(c, **filters).papers]

        assert keys(wing="systems") == ["b"]
        assert keys(status="listed") == ["2601.00003"]
        assert keys(tag="x") == ["2601.00003"] and keys(tag="y\0") == []
        assert keys(since="2026-01-31") == ["2601.00003"]
        assert keys(until="2026-01-30") == ["b", "slug"]
        assert keys(since="2026-01-30", until="2026-01-30", wing="compute") == ["slug"]
        assert [p.key for p in papers.by_id(c, [3, 99, 1])] == ["2601.00003", "slug"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"order": "votes"}, {"wing": "x" * 9999}, {"status": "ran"}, {"since": "now"},
        {"limit": 0}, {"limit": 1001}, {"after": "!"}, {"after": "W10"}, {"after": "bnVsbA"},
        {"after": "WyIyMDI2LTAxLTAxIiwgLTFd"}, {"after": "WyIyMDI2LTAxLTAxIiwgOTk5OTk5OTk5OTk5XQ"},
        {"after": "WzEuMCwgMV0"}, {"after": "ä"}, {"after": "W1tbW1tbW1tbW1tb" * 999},
    ],
)  # fmt: skip
def test_a_listing_that_cannot_be_is_refused(store, wrong):
    with store.read() as c, pytest.raises(RequestError):
        papers.listing(c, **wrong)


def test_heat_orders_as_the_decayed_sum_does_at_any_time():
    draw = random.Random(1)
    now = 1.8e9
    events = [
        [(draw.choice((1.0, 0.25)), now - draw.random() * 1e7) for _ in range(draw.randint(1, 9))]
        for _ in range(200)
    ]

    def directly(those, at):
        return sum(w * 2 ** ((t - at) / trends.HALF_LIFE) for w, t in those)

    heats = [trends.heat(those) for those in events]
    for at in (now, now + 3e6):
        for those, heat in zip(events, heats, strict=True):
            assert trends.score(heat, at) == pytest.approx(directly(those, at), rel=1e-9)
        order = sorted(range(200), key=lambda n: directly(events[n], at))
        assert order == sorted(range(200), key=lambda n: heats[n])
    # a vote a week ago is half a vote now
    assert trends.score(trends.heat([(1.0, now - 7 * 86400)]), now) == pytest.approx(0.5)
    assert trends.heat(events[0]) == trends.heat(events[0][::-1])


def test_a_date_to_come_is_no_head_start(store):
    add(store, row(1, date="2026-01-31"), row(2, date="2999-01-01"), now=1.8e9)
    with store.read() as c:
        assert papers.get(c, "2601.00002").heat == 1.8e9 / trends.HALF_LIFE
    # a corrected date changes the heat
    add(store, row(2, date="2026-01-30"))
    with store.read() as c:
        assert papers.get(c, "2601.00002").heat == trends.seconds("2026-01-30") / trends.HALF_LIFE
