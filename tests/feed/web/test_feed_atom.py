"""Atom feeds and exports."""

from __future__ import annotations

import csv
import io
from xml.etree import ElementTree as ET

import pytest
import sqlalchemy as sa
from _reading import client, filled

from pantarhei.feed import papers, schema
from pantarhei.feed.search import Searcher
from pantarhei.papers import catalogue

ATOM = "{http://www.w3.org/2005/Atom}"


def feed(browser, query=""):
    answer = browser.get(f"/feed/atom{query}")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/atom+xml")
    root = ET.fromstring(answer.content)
    assert root.tag == f"{ATOM}feed"
    for element in (root, *root.iter(f"{ATOM}entry")):  # RFC 4287, 4.1.1 and 4.1.2
        for name in ("id", "title", "updated"):
            assert len(element.findall(f"{ATOM}{name}")) == 1
        assert element.find(f"{ATOM}author/{ATOM}name").text
    ids = [entry.findtext(f"{ATOM}id") for entry in root.iter(f"{ATOM}entry")]
    assert len(set(ids)) == len(ids)
    return root


def links(root):
    found = [e.find(f"{ATOM}link[@rel='alternate']") for e in root.iter(f"{ATOM}entry")]
    return [link.get("href") for link in found]


def test_the_newest_papers(store):
    browser = client(filled(store), "shared", public_url="https://papers.example")
    root = feed(browser)
    newest = max(catalogue(), key=lambda card: card.date)
    assert links(root)[0] == f"https://papers.example/paper/{newest.slug}"
    assert root.find(f"{ATOM}link[@rel='self']").get("href") == "https://papers.example/feed/atom"


def test_each_view_has_its_feed(store):
    with filled(store).write() as c:
        row = {"email": "a@example.org", "name": "a", "created": 0.0}
        who = c.execute(sa.insert(schema.accounts).values(row).returning(schema.accounts.c.id))
        paper = papers.get(c, "rbqe").id
        tag = {"account": who.scalar_one(), "paper": paper, "tag": "exits"}
        c.execute(sa.insert(schema.tags).values(tag))
    searcher = Searcher(store)
    browser = client(store, "reading", searcher=searcher)
    wings = {card.slug: card.wing for card in catalogue()}
    found = [href.rpartition("/")[2] for href in links(feed(browser, "?view=wing&value=learning"))]
    assert {wings[slug] for slug in found} == {"learning"}
    assert links(feed(browser, "?view=tag&value=exits")) == ["http://localhost:8000/paper/rbqe"]
    assert len(links(feed(browser, "?view=trending"))) == len(catalogue())
    assert links(feed(browser, "?view=search&value=sorted+llama"))[0].endswith("/soft")
    searcher.close()


def test_names_stay_whatever_the_address(store):
    filled(store)
    one = feed(client(store, "shared", public_url="https://papers.example"))
    other = feed(client(store, "reading"))
    for name in ("id", "updated"):
        assert [e.text for e in one.iter(f"{ATOM}{name}")] == [
            e.text for e in other.iter(f"{ATOM}{name}")
        ]


def test_an_empty_feed_is_one(store):
    assert links(feed(client(store))) == []


def test_what_xml_cannot_hold_is_left_out(store):
    row = {"key": "k", "title": "a\x07b\ufffec <&>", "date": "2026-01-31", "source": "json"}
    with store.write() as c:
        papers.add(c, [row])
    [title] = [e.text for e in feed(client(store)).iter(f"{ATOM}title")][1:]
    assert title.endswith("c <&>") and title.startswith("a")


@pytest.mark.parametrize("path", ["/feed/atom", "/export.bib", "/export.csv"])
def test_unchanged_ones_are_not_sent_again(store, path):
    browser = client(filled(store))
    first = browser.get(path)
    again = browser.get(path, headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert browser.head(path).headers["etag"] == first.headers["etag"]


def test_exports_hold_what_their_page_lists(store):
    browser = client(filled(store))
    rows = list(csv.DictReader(io.StringIO(browser.get("/export.csv?wing=learning").text)))
    assert {row["key"] for row in rows} == {c.slug for c in catalogue() if c.wing == "learning"}
    answer = browser.get("/export.bib?status=runs")
    assert answer.text.count("@") == sum(card.status == "runs" for card in catalogue())
    assert "papers.bib" in answer.headers["content-disposition"]
    assert answer.headers["content-type"] == "application/x-bibtex; charset=utf-8"


def test_a_search_is_exported_in_its_order(store):
    searcher = Searcher(filled(store))
    browser = client(store, searcher=searcher)
    rows = list(csv.DictReader(io.StringIO(browser.get("/export.csv?q=sorted+llama").text)))
    assert rows[0]["key"] == "soft"
    assert browser.get("/export.bib", params={"q": "a" * 201}).status_code == 422
    searcher.close()
