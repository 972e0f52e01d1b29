from __future__ import annotations

import dataclasses

import pytest
from arxiv_server import Arxiv, Paper, Reply, atom, atom_entry, atom_error, papers

from pantarhei.feed.sources import arxiv
from pantarhei.feed.sources.fetch import Fetcher, SourceError, Unreadable

ENTITIES = b"""<?xml version="1.0"?><!DOCTYPE feed [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">
<!ENTITY c "&b;&b;&b;&b;">]><feed xmlns="http://www.w3.org/2005/Atom"><title>&c;</title></feed>"""
OUTSIDE = b"""<!DOCTYPE feed [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<feed xmlns="http://www.w3.org/2005/Atom"><title>&x;</title></feed>"""


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(arxiv, "PAGE", 10)
    with Arxiv().running() as running:
        monkeypatch.setenv("PANTARHEI_ARXIV_API", running.url + "/api/query")
        yield running


@pytest.fixture
def fetcher(tmp_path):
    with Fetcher(tmp_path / "lock", pause=0, sleep=lambda _: None) as f:
        yield f


def single(paper: Paper):
    (entry,) = arxiv.read(atom(atom_entry(paper), 1)).entries
    return entry


def test_an_entry_is_read():
    entry = single(
        Paper(
            "2601.00001",
            "2026-01-05T18:59:59Z",
            title="Deep & <dynamic>\n  networks: $\\alpha < 1$",
            summary="  First line\nsecond line.\n  Another paragraph.\n",
            version=2,
            doi="10.1000/A 10.1000/b",
        )
    )
    assert entry.key == entry.arxiv == "2601.00001" and entry.version == 2
    assert entry.title == "Deep & <dynamic> networks: $\\alpha < 1$"
    assert entry.summary == "First line second line.\n\nAnother paragraph."
    assert entry.date == "2026-01-05" and entry.authors == ("Ada Lovelace", "Alan Turing")
    assert entry.categories == "cs.LG stat.ML"  # no MSC or ACM classes
    assert entry.doi == "10.1000/a"
    row = entry.row()
    assert (row["wing"], row["status"], row["source"]) == (None, "listed", "arxiv")


def test_an_old_identifier():
    entry = single(Paper("math/0309136", "2003-09-08T00:00:00Z", categories=("math.GT",)))
    assert (entry.arxiv, entry.key) == ("math/0309136", "math-0309136")


def test_a_withdrawn_paper_says_so_first():
    entry = single(Paper("2601.00001", "2026-01-05T00:00:00Z", comment="Withdrawn: an error in 3"))
    assert entry.summary.startswith("Withdrawn: an error in 3\n\nAn abstract")
    entry = single(Paper("2601.00001", "2026-01-05T00:00:00Z", comment="12 pages, 3 withdrawn"))
    assert entry.summary.startswith("An abstract")


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_versions_the_newer_is_kept(order):
    old = Paper("2601.00001", "2026-01-05T00:00:00Z", title="Old")
    new = dataclasses.replace(old, version=2, title="New")
    answer = arxiv.read(atom("".join(map(atom_entry, (old, new)[::order])), 2))
    assert [entry.title for entry in answer.entries] == ["New"]


def test_what_cannot_be_read_is_left_out_and_named():
    good, bad = papers(2)
    bad = dataclasses.replace(bad, title=" ")
    endless = dataclasses.replace(bad, id="2601.05003", title="x" * 1001)
    answer = arxiv.read(atom("".join(map(atom_entry, (good, bad, endless))), 3))
    assert [entry.arxiv for entry in answer.entries] == [good.id]
    assert answer.unreadable == (
        "http://arxiv.org/abs/2601.05002v1 has no title",
        "http://arxiv.org/abs/2601.05003v1 has a title of more than 1000 characters",
    )
    assert answer.count == 3


def test_a_refusal_is_said_in_arxivs_words():
    with pytest.raises(SourceError, match="arXiv refuses: incorrect id format for 1"):
        arxiv.read(atom_error("incorrect id format for 1"))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<feed",
        atom(atom_entry(papers(1)[0]), 1)[:-40],
        b"<html><body>busy</body></html>",
        b'<?xml version="1.0" encoding="nonsense"?><feed/>',
        b"\xff\xfe\x00",
        ENTITIES,
        OUTSIDE,
        b'<feed xmlns="http://www.w3.org/2005/Atom"/>',
        atom("", 1).replace(b">1<", b">many<"),
    ],
)
def test_what_is_no_answer_is_unreadable(data):
    with pytest.raises(Unreadable):
        arxiv.read(data)


def test_deep_nesting_is_harmless():
    depth = 100_000
    answer = arxiv.read(atom("<x>" * depth + "</x>" * depth, 0))
    assert answer.entries == ()


def test_papers_by_identifier_come_in_the_order_asked_for(server, fetcher):
    server.papers = papers(150)
    wanted = [f"2601.05{number:03}" for number in range(150, 0, -1)]
    found = arxiv.by_identifier(fetcher, [f"arXiv:{i}v3" for i in wanted] + wanted[:3])
    assert [entry.arxiv for entry in found] == wanted
    assert len(server.requests) == 2  # a hundred at a time, each paper once


def test_an_identifier_that_arxiv_does_not_have_is_named(server, fetcher):
    server.papers = papers(1)
    with pytest.raises(SourceError, match=r"arXiv has no paper 2601\.05002 or 2601\.05003"):
        arxiv.by_identifier(fetcher, ["2601.05001", "2601.05002", "2601.05003"])


def harvest(fetcher, since="202601010000", until="202601312359"):
    found, there = [], None
    for answer, there in arxiv.pages(fetcher, "cs.LG", arxiv.Place(since), until):  # noqa: B007
        found += [entry.arxiv for entry in answer.entries]
    assert there is None
    return found


def test_every_paper_of_a_period_is_read(server, fetcher):
    server.papers = papers(35) + papers(20, "2026-01-07") + papers(3, "2026-02-01")
    assert set(harvest(fetcher)) == {p.id for p in server.papers[:55]}
    assert len(server.requests) == 6  # each page but the first repeats one paper


def test_no_papers_at_all(server, fetcher):
    assert harvest(fetcher) == []


def test_a_minute_with_more_papers_than_a_page(server, fetcher):
    same = [dataclasses.replace(p, published="2026-01-05T10:00:00Z") for p in papers(35)]
    server.papers = [*same, *papers(5, "2026-01-06")]
    assert set(harvest(fetcher)) == {p.id for p in server.papers}


def test_papers_that_appear_or_vanish_meanwhile_hide_none(server, fetcher):
    everything = papers(60)
    late, gone = everything[3], everything[12]
    server.papers = [p for p in everything if p != late]

    def change() -> None:
        if len(server.requests) == 2:
            server.papers = [p for p in everything if p != gone]

    server.before = change
    assert set(harvest(fetcher)) >= {p.id for p in everything if p not in (late, gone)}


def test_an_empty_page_where_there_are_papers_is_asked_for_again(server, fetcher):
    server.papers = papers(5)
    server.faults = [Reply(atom("", 5))]
    assert len(harvest(fetcher)) == 5


def test_a_server_that_never_ends_is_left(server, fetcher, monkeypatch):
    monkeypatch.setattr(arxiv, "_MOST", 30)
    server.faults = [Reply(atom(atom_entry(papers(1)[0]) * 10, 10**8))] * 10
    with pytest.raises(SourceError, match="more than 30 papers at once"):
        harvest(fetcher)
