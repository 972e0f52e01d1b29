from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from arxiv_server import Arxiv, Reply, atom_error, papers

from pantarhei.errors import RequestError
from pantarhei.feed import papers as kept
from pantarhei.feed import schema
from pantarhei.feed.sources import growing
from pantarhei.feed.sources.fetch import Fetcher
from pantarhei.feed.store import fact

NOW = datetime(2026, 1, 9, 12, 30, tzinfo=UTC)
BIB = "@misc{smith, title={Deep Rivers}, author={Smith, Ann}, year=2020}\n"
BAD = "@misc{jones, title={No year}, author={Jones, Bob}}\n"


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Arxiv(page=10).running() as running:
        monkeypatch.setenv("PANTARHEI_ARXIV_API", running.url + "/api/query")
        monkeypatch.setenv("PANTARHEI_ARXIV_OAI", running.url + "/oai")
        yield running


@pytest.fixture
def fetcher(tmp_path):
    with Fetcher(tmp_path / "lock", pause=0, tries=2, sleep=lambda _: None) as f:
        yield f


@pytest.fixture
def connect(tmp_path):
    return lambda: Fetcher(tmp_path / "lock", pause=0, tries=2, sleep=lambda _: None)


def rows(store) -> list[tuple]:
    """Everything that adding may touch."""
    with store.read() as c:
        return [tuple(row) for row in c.execute(sa.select(schema.papers).order_by("key"))]


def arxivs(store) -> set[str]:
    with store.read() as c:
        return set(c.scalars(sa.select(schema.papers.c.arxiv)))


def update(store, fetcher, days=7, source="api", now=NOW, category="cs.LG"):
    return growing.update(store, fetcher, category, days=days, source=source, now=now, quiet=True)


def counts(added) -> tuple[int, int, int]:
    return added.new, added.changed, added.same


# --- add -------------------------------------------------------------------------------------


def test_papers_of_every_kind_are_added_at_once(store, server, connect, tmp_path):
    server.papers = papers(3)
    (tmp_path / "a.bib").write_text(BIB)
    (tmp_path / "b.json").write_text(
        json.dumps({"title": "T", "authors": ["A"], "date": "2026-01-02", "key": "t"})
    )
    given = [
        "arXiv:2601.05001v2",
        str(tmp_path / "a.bib"),
        str(tmp_path / "b.json"),
        "https://arxiv.org/abs/2601.05002",
    ]
    assert counts(growing.add(store, given, connect)) == (4, 0, 0)
    before = rows(store)
    assert counts(growing.add(store, given, connect)) == (0, 0, 4)
    assert rows(store) == before
    with store.read() as c:
        paper = kept.get(c, "smith")
        assert paper and (paper.title, paper.authors, paper.wing) == (
            "Deep Rivers",
            ("Ann Smith",),
            None,
        )
        assert (paper.status, paper.badge, paper.source) == ("listed", "listed", "bibtex")
        assert kept.get(c, "2601.05002").source == "arxiv"


def test_nothing_is_added_when_one_entry_is_bad(store, server, connect, tmp_path):
    server.papers = papers(1)
    (tmp_path / "a.bib").write_text(BIB + BAD)
    for given in (["a.bib"], ["2601.05001", "a.bib"]):
        given = [str(tmp_path / g) if g == "a.bib" else g for g in given]
        with pytest.raises(RequestError, match=r"Entry 'jones' in .* has no year"):
            growing.add(store, given, connect)
    assert rows(store) == [] and server.requests == []


def test_an_unknown_identifier_adds_nothing(store, server, connect, tmp_path):
    (tmp_path / "a.bib").write_text(BIB)
    with pytest.raises(RequestError, match=r"arXiv has no paper 2601\.05009; nothing was changed"):
        growing.add(store, [str(tmp_path / "a.bib"), "2601.05009"], connect)
    server.faults = [Reply(atom_error("incorrect id format"), status=400)]
    with pytest.raises(RequestError, match="arXiv refuses: incorrect id format; nothing was"):
        growing.add(store, ["2601.05009"], connect)
    assert rows(store) == []


def test_files_need_no_network(store, tmp_path):
    (tmp_path / "a.bib").write_text(BIB)
    added = growing.add(store, [str(tmp_path / "a.bib")], lambda: pytest.fail("asked"))
    assert counts(added) == (1, 0, 0)


def test_two_papers_never_share_a_key(store, connect, tmp_path):
    (tmp_path / "a.bib").write_text(BIB)
    (tmp_path / "b.bib").write_text(BIB.replace("Deep Rivers", "Shallow Lakes"))
    with pytest.raises(RequestError, match="Two papers have the key 'smith'"):
        growing.add(store, [str(tmp_path / "a.bib"), str(tmp_path / "b.bib")], connect)
    growing.add(store, [str(tmp_path / "a.bib")], connect)
    before = rows(store)
    with pytest.raises(RequestError, match="The key 'smith' belongs to 'Deep Rivers' already"):
        growing.add(store, [str(tmp_path / "b.bib")], connect)
    assert rows(store) == before
    (tmp_path / "a.bib").write_text(BIB.replace("Rivers", "rivers."))
    assert counts(growing.add(store, [str(tmp_path / "a.bib")], connect)) == (0, 1, 0)


def test_a_key_like_an_arxiv_identifier_is_for_arxivs_papers(store, connect, tmp_path):
    for key in ("2601.05001", "math-0309136"):
        (tmp_path / "a.bib").write_text(BIB.replace("smith", key))
        with pytest.raises(RequestError, match="such keys are for arXiv's papers"):
            growing.add(store, [str(tmp_path / "a.bib")], connect)


def test_arxivs_description_is_not_replaced_by_a_users(store, server, connect, tmp_path):
    server.papers = papers(1)
    growing.add(store, ["2601.05001"], connect)
    title = rows(store)[0]
    (tmp_path / "a.bib").write_text(BIB.replace("year", "eprint={2601.05001}, year"))
    assert counts(growing.add(store, [str(tmp_path / "a.bib")], connect)) == (0, 0, 1)
    assert rows(store)[0] == title


def test_votes_outlive_an_update(store, server, connect, fetcher):
    server.papers = papers(2)
    growing.add(store, ["2601.05001"], connect)
    with store.write() as c:
        c.execute(sa.update(schema.papers).values(votes=3))
    server.papers = [dataclasses.replace(p, title="New title", version=2) for p in server.papers]
    assert counts(update(store, fetcher)) == (1, 1, 0)
    with store.read() as c:
        paper = kept.get(c, "2601.05001")
    assert paper and (paper.votes, paper.title) == (3, "New title")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("x.txt", b"", "is neither an arXiv identifier"),
        ("x.json", b"\xff\xfe", "is not UTF-8"),
        ("x.bib", b" " * (growing.MAX_FILE + 1), "is larger than 16 MiB"),
        ("none.bib", None, "cannot be read"),
        ("folder.bib", "folder", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(store, connect, tmp_path, name, content, sentence):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=sentence):
        growing.add(store, [str(tmp_path / name)], connect)


# --- update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["api", "oai"])
def test_an_update_that_is_repeated_changes_nothing(store, server, fetcher, monkeypatch, source):
    monkeypatch.setattr("pantarhei.feed.sources.arxiv.PAGE", 10)
    server.papers = papers(25) + papers(12, "2026-01-08") + papers(4, "2025-12-01")
    done = update(store, fetcher, source=source)
    assert (done.new, done.resumed, done.since) == (37, False, "2026-01-02")
    before = rows(store)
    again = update(store, fetcher, source=source)
    assert (again.new, again.changed) == (0, 0) and rows(store) == before


def test_both_sources_describe_the_same_papers(store, server, fetcher):
    server.papers = papers(25)
    assert update(store, fetcher).new == 25
    assert counts(update(store, fetcher, source="oai")) == (0, 0, 25)


@pytest.mark.parametrize("source", ["api", "oai"])
def test_an_interrupted_update_goes_on_where_it_stopped(
    store, server, fetcher, monkeypatch, source
):
    monkeypatch.setattr("pantarhei.feed.sources.arxiv.PAGE", 10)
    server.papers = papers(25) + papers(12, "2026-01-07")
    skipped = 3 if source == "oai" else 0  # the empty days before the first
    server.faults = [None] * (2 + skipped) + [Reply(status=503)] * 2
    with pytest.raises(RequestError, match=r"503.*; what was read so far is kept, and the same"):
        update(store, fetcher, source=source)
    some = arxivs(store)
    assert 0 < len(some) < 37
    server.requests.clear()
    done = update(store, fetcher, source=source)
    assert done.resumed and done.since == "2026-01-05"
    assert done.new == 37 - len(some)
    assert arxivs(store) == {p.id for p in server.papers}
    first = server.requests[0]
    if source == "api":
        assert "[202601050019 TO" in first["search_query"]
    else:
        assert first["resumptionToken"] == "2026-01-05|20"


def test_a_longer_period_than_the_interrupted_one_is_read_from_its_beginning(
    store, server, fetcher, monkeypatch
):
    monkeypatch.setattr("pantarhei.feed.sources.arxiv.PAGE", 10)
    server.papers = papers(25) + papers(12, "2025-12-20")
    server.faults = [None, Reply(status=503), Reply(status=503)]
    with pytest.raises(RequestError):
        update(store, fetcher)
    done = update(store, fetcher, days=30)
    assert not done.resumed and arxivs(store) == {p.id for p in server.papers}


def test_what_an_interrupted_update_left_is_read_even_much_later(
    store, server, fetcher, monkeypatch
):
    monkeypatch.setattr("pantarhei.feed.sources.arxiv.PAGE", 10)
    server.papers = papers(25) + papers(5, "2026-02-20")
    server.faults = [None, Reply(status=503), Reply(status=503)]
    with pytest.raises(RequestError):
        update(store, fetcher)
    update(store, fetcher, days=1, now=datetime(2026, 2, 21, tzinfo=UTC))
    assert arxivs(store) == {p.id for p in server.papers}


def test_a_token_of_a_day_that_had_not_ended_is_not_used_again(store, server, fetcher):
    server.papers = papers(25, "2026-01-09")
    server.faults = [None] * 8 + [Reply(status=503)] * 2
    with pytest.raises(RequestError):
        update(store, fetcher, source="oai")
    server.papers = papers(30, "2026-01-09")[::-1]
    update(store, fetcher, source="oai", now=datetime(2026, 1, 10, tzinfo=UTC))
    assert arxivs(store) == {p.id for p in server.papers}


@pytest.mark.parametrize(("source", "again"), [("api", "2026-01-02"), ("oai", "2026-01-07")])
def test_without_days_it_goes_on_from_the_last_time(store, server, fetcher, source, again):
    assert update(store, fetcher, days=None, source=source).since == "2026-01-02"
    later = datetime(2026, 1, 20, tzinfo=UTC)
    assert update(store, fetcher, days=None, source=source, now=later).since == again
    assert update(store, fetcher, days=3, source=source, now=later).since == "2026-01-17"


def test_no_network_changes_nothing(store, server, tmp_path, monkeypatch):
    monkeypatch.setenv("PANTARHEI_ARXIV_API", "http://127.0.0.1:9/api")
    with (
        Fetcher(tmp_path / "lock", pause=0) as fetcher,
        pytest.raises(RequestError, match=r"127.0.0.1 cannot be reached .*; nothing was changed.$"),
    ):
        update(store, fetcher)
    with store.read() as c:
        assert fact(c, "update/api/cs.LG") is None


def test_records_that_are_left_out_are_counted_and_named(store, server, fetcher):
    good, gone, bad, *more = papers(10)
    server.papers = [good, dataclasses.replace(gone, deleted=True)]
    server.papers += [dataclasses.replace(p, title="") for p in (bad, *more)]
    done = update(store, fetcher, source="oai")
    assert done.new == 1
    lines = done.left_out()
    assert lines[0] == "Left out: oai:arXiv.org:2601.05003 has no title."
    assert lines[5:] == [
        "Left out: 3 more that cannot be read.",
        "1 deleted at arXiv; the store keeps those it has.",
    ]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"category": "cs.LG OR cat:math"}, "is no category of arXiv"),
        ({"category": "cs:LG"}, "is no category of arXiv"),
        ({"category": ""}, "is no category of arXiv"),
        ({"days": 0}, "--days is a number from 1 to 3650, not 0"),
        ({"days": 10**9}, "--days is a number"),
        ({"source": "rss"}, "choose api or oai"),
    ],
)
def test_a_request_that_cannot_be_served_asks_nobody(store, server, fetcher, options, sentence):
    with pytest.raises(RequestError, match=sentence):
        update(store, fetcher, **options)
    assert server.requests == []
