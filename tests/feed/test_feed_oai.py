from __future__ import annotations

import dataclasses

import pytest
from arxiv_server import XML, Arxiv, Paper, Reply, oai, oai_error, oai_record, papers

from pantarhei.feed.sources import oai as source
from pantarhei.feed.sources.fetch import Fetcher, SourceError, Unreadable


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Arxiv().running() as running:
        monkeypatch.setenv("PANTARHEI_ARXIV_OAI", running.url + "/oai")
        yield running


@pytest.fixture
def fetcher(tmp_path):
    with Fetcher(tmp_path / "lock", pause=0, sleep=lambda _: None) as f:
        yield f


def records(*listed: Paper, token: str = "") -> bytes:
    body = "".join(map(oai_record, listed))
    return oai(f"<ListRecords>{body}<resumptionToken>{token}</resumptionToken></ListRecords>")


def harvest(fetcher, since="2026-01-05", until="2026-01-07", token=None):
    found, there, here = [], None, source.Place(since, token)
    for answer, there in source.pages(fetcher, "cs.LG", here, until):  # noqa: B007
        found += [entry.arxiv for entry in answer.entries]
    assert there is None
    return found


def test_a_record_is_read():
    paper = Paper(
        "0704.0001",
        "2007-04-02T19:18:42Z",
        title="Deep & wide\n  networks",
        authors=(("C.", "Balázs"), ("", "ATLAS Collaboration")),
        comment="This paper has been withdrawn by the authors",
        doi="10.1103/PhysRevD.76.013009",
        changed="2026-01-05",
    )
    (entry,) = source.read(records(paper)).entries
    assert (entry.arxiv, entry.title) == ("0704.0001", "Deep & wide networks")
    assert entry.date == "2007-04-02"  # of publication, not of the change
    assert entry.authors == ("C. Balázs", "ATLAS Collaboration")
    assert entry.summary.split("\n\n") == [paper.comment, "An abstract of two lines."]
    assert entry.doi == "10.1103/physrevd.76.013009" and entry.categories == "cs.LG stat.ML"


def test_deleted_and_unreadable_records_are_named():
    good, gone, bad = papers(3)
    answer = source.read(
        records(
            good,
            dataclasses.replace(gone, deleted=True),
            dataclasses.replace(bad, authors=()),
        )
    )
    assert [entry.arxiv for entry in answer.entries] == [good.id]
    assert answer.deleted == ("oai:arXiv.org:2601.05002",)
    assert answer.unreadable == ("oai:arXiv.org:2601.05003 has no authors",)


def test_another_metadata_format_is_unreadable_record_by_record():
    data = records(papers(1)[0]).replace(b"http://arxiv.org/OAI/arXiv/", b"http://purl.org/dc/")
    assert "no metadata in arXiv's format" in source.read(data).unreadable[0]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (oai_error("badResumptionToken"), source.BadToken),
        (oai_error("badArgument", "set is unknown"), SourceError),
        (oai_error("cannotDisseminateFormat"), SourceError),
        (oai(""), Unreadable),
        (records(*papers(2))[:-30], Unreadable),
        (records(token="x" * 5000), Unreadable),
        (b'<!DOCTYPE a [<!ENTITY b "c">]>' + records()[38:], Unreadable),
    ],
)
def test_errors(data, error):
    with pytest.raises(error):
        source.read(data)


def test_no_records_are_an_answer():
    assert source.read(oai_error("noRecordsMatch")) == source.Answer((), (), (), None)


def test_every_page_of_every_day_is_read(server, fetcher):
    server.papers = papers(5) + papers(3, "2026-01-07") + papers(2, "2026-01-08")
    assert harvest(fetcher) == [p.id for p in server.papers[:8]]
    asked = [r.get("from", r.get("resumptionToken")) for r in server.requests]
    assert asked == [
        "2026-01-05", "2026-01-05|2", "2026-01-05|4", "2026-01-06", "2026-01-07", "2026-01-07|2"
    ]  # fmt: skip
    assert server.requests[0]["set"] == "cs:cs:LG"


def test_a_token_that_has_expired_costs_one_day(server, fetcher):
    server.papers = papers(5) + papers(3, "2026-01-06")
    assert harvest(fetcher, token="expired") == [p.id for p in server.papers]
    assert [r.get("from", r.get("resumptionToken")) for r in server.requests][:2] == [
        "expired",
        "2026-01-05",
    ]


def test_a_server_that_never_takes_its_own_token_is_left(server, fetcher):
    server.papers = papers(5)
    server.before = server.tokens.clear
    with pytest.raises(SourceError, match="does not accept its own resumption token"):
        harvest(fetcher)


def test_tokens_in_circles_are_noticed(server, fetcher):
    page = Reply(records(papers(1)[0], token="same"), kind=XML)
    server.faults = [page, page, page]
    with pytest.raises(SourceError, match="lead in circles"):
        harvest(fetcher)


def test_a_token_is_passed_on_as_it_is(server, fetcher):
    token = "a b&c=d+e|ü"
    escaped = token.replace("&", "&amp;")
    server.faults = [Reply(records(papers(1)[0], token=escaped), kind=XML)]
    server.tokens[token] = (papers(3), 2)
    assert len(harvest(fetcher, until="2026-01-05")) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=503, headers={"Retry-After": "20"}),
        Reply(records(*papers(2))[:-30], kind=XML),
        Reply(b"<html>", kind="text/html"),
        Reply(records(*papers(2)), kind=XML, cut=300),
    ],
)
def test_faults_are_asked_again(server, fetcher, fault):
    server.papers = papers(5)
    server.faults = [fault, None, fault]
    assert harvest(fetcher) == [p.id for p in server.papers]
