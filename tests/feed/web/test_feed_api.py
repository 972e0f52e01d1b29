"""The JSON API: what it says, what it refuses, and that its description is true."""

from __future__ import annotations

import math
from typing import Any

import pytest
import sqlalchemy as sa
from _reading import client, filled

from pantarhei.feed import papers, schema
from pantarhei.feed.search import Searcher
from pantarhei.feed.store import Store
from pantarhei.papers import catalogue

V1 = "/api/v1"


@pytest.fixture
def browser(store: Store) -> Any:
    searcher = Searcher(filled(store))
    yield client(store, "reading", searcher=searcher)
    searcher.close()


def test_every_paper_is_listed_once_cursor_by_cursor(browser):
    seen, after = [], None
    while True:
        query = {"limit": 7} | ({"after": after} if after else {})
        answer = browser.get(f"{V1}/papers", params=query).json()
        seen += [paper["key"] for paper in answer["papers"]]
        after = answer["next"]
        if after is None:
            break
    assert sorted(seen) == sorted(card.slug for card in catalogue())


def test_a_paper_with_its_results(browser):
    answer = browser.get(f"{V1}/papers/evolvegcn").json()
    paper, results = answer["paper"], answer["results"]
    assert paper["url"] == "http://localhost:8000/paper/evolvegcn"
    assert paper["badge"] == "not-held" and paper["arxiv"] == "1902.10191"
    assert (paper["claims_held"], paper["claims_measured"]) == (10, 13)
    assert [run["scale"] for run in results] == ["quick", "cpu"]
    [links] = [claim for claim in results[1]["claims"] if claim["id"] == "links"]
    assert links["bound"] == 1.2 and links["holds"] is False and links["direction"] == ">="
    assert links["measured"] == pytest.approx(0.9996576284169502)
    assert browser.get(f"{V1}/papers/evolvegcn/claims").json() == results
    assert browser.get(f"{V1}/papers/1902.10191").json() == answer


def test_figures_that_are_not_finite_are_null(browser, store):
    with store.write() as c:
        c.execute(sa.update(schema.claims).values(measured=None, bound=math.inf))
        c.execute(sa.update(schema.runs).values(seconds=math.inf))
    answer = browser.get(f"{V1}/papers/evolvegcn")
    assert answer.status_code == 200
    claims = [claim for run in answer.json()["results"] for claim in run["claims"]]
    assert {(claim["bound"], claim["measured"]) for claim in claims} == {(None, None)}
    assert browser.get("/paper/evolvegcn").status_code == 200


def test_search_suggest_and_related(browser):
    found = browser.get(f"{V1}/search", params={"q": "early exit", "limit": 3}).json()
    assert found["query"] == "early exit" and found["corrected"] is None
    assert found["total"] >= len(found["hits"]) > 0
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    begun = browser.get(f"{V1}/suggest", params={"q": "sorted lla"}).json()
    assert begun[0]["key"] == "soft"
    near = browser.get(f"{V1}/papers/soft/related", params={"limit": 3}).json()
    assert len(near) == 3 and "soft" not in {paper["key"] for paper in near}


def test_trending_day_and_comparison(browser):
    hot = browser.get(f"{V1}/trending", params={"limit": 5}).json()["papers"]
    assert all(paper["claims_measured"] for paper in hot)
    newest = browser.get(f"{V1}/day").json()
    assert newest["next"] is None and newest["total"] == 1
    day = browser.get(f"{V1}/day", params={"date": newest["previous"]}).json()
    assert day["next"] == newest["date"]
    answer = browser.get(f"{V1}/compare", params={"paper": ["rbqe", "pdlt"]}).json()
    assert [one["paper"]["key"] for one in answer["papers"]] == ["rbqe", "pdlt"]


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/papers?wing=fluids", 422, "wing"),
        ("/papers?limit=0", 422, "limit"),
        ("/papers?limit=x", 422, "limit"),
        ("/papers?since=2026-02-30", 400, "2026-02-30"),
        ("/papers?since=yesterday", 422, "since"),
        ("/papers?after=nonsense", 400, "this list"),
        ("/papers/nobody", 404, "no such paper"),
        ("/papers/nobody/claims", 404, "no such paper"),
        ("/papers/nobody/related", 404, "no such paper"),
        ("/papers/" + "a" * 201, 422, "key"),
        ("/search", 422, "q"),
        ("/search?q=" + "a" * 201, 422, "q"),
        ("/search?q=a&offset=-1", 422, "offset"),
        ("/compare", 422, "paper"),
        ("/compare?paper=nobody", 404, "no such paper"),
        ("/compare?" + "&".join(f"paper={n}" for n in range(11)), 422, "paper"),
        ("/nonsense", 404, "Nothing is at this address"),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(browser, path, status, says):
    answer = browser.get(V1 + path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    [(name, sentence)] = answer.json().items()
    assert name == "error" and says in sentence and sentence.endswith(".")


def test_answers_have_tags(browser):
    first = browser.get(f"{V1}/papers")
    tag = {"if-none-match": first.headers["etag"]}
    assert browser.get(f"{V1}/papers", headers=tag).status_code == 304
    head = browser.head(f"{V1}/papers")
    assert head.content == b"" and head.headers["etag"] == first.headers["etag"]
    assert browser.get("/api/openapi.json").json()["info"]["title"] == "pantarhei"


def test_the_address_is_the_public_one(store):
    browser = client(filled(store), "shared", public_url="https://papers.example")
    answer = browser.get(f"{V1}/papers/rbqe").json()
    assert answer["paper"]["url"] == "https://papers.example/paper/rbqe"


def test_a_key_from_outside_may_hold_anything(store):
    row = {"key": "a.b:c+d-é", "title": "T", "date": "2026-01-31", "source": "bibtex"}
    with store.write() as c:
        papers.add(c, [row])
    browser = client(store, "reading")
    [paper] = browser.get(f"{V1}/papers").json()["papers"]
    path = paper["url"].removeprefix("http://localhost:8000")
    assert browser.get(path).status_code == 200
    assert browser.get(path.replace("/paper/", f"{V1}/papers/")).json()["paper"] == paper
