"""The pages that are read, on both kinds of store."""

from __future__ import annotations

import asyncio
import html
import json
import re

import pytest
import sqlalchemy as sa
from _reading import EVIDENCE, LOCAL, client, filled, text, titles
from _visiting import PUBLIC, Visitor, application
from starlette.testclient import TestClient

from pantarhei import report
from pantarhei.feed import papers, schema
from pantarhei.feed.search import Searcher
from pantarhei.feed.store import Store
from pantarhei.feed.web.app import create_app
from pantarhei.papers import catalogue

ALL = ("/", "/trending", "/papers", "/search", "/compare", "/about", "/api", "/paper/evolvegcn")


@pytest.fixture
def full(store: Store) -> Store:
    return filled(store)


@pytest.mark.parametrize("path", ALL)
def test_every_page_is_whole_html_that_runs_nothing_of_its_own(full, path):
    answer = client(full).get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = answer.text
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert '<html lang="en">' in page and len(re.findall("<h1", page)) == 1
    assert "<style" not in page and " style=" not in page and " onclick" not in page
    assert not re.search(r"<script(?! src=)", page)
    assert not re.search(r"(src|href)=\"(https?:)?//(?!arxiv|doi|github)", page)
    for target in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{target}"' in page


@pytest.mark.parametrize("path", ALL)
def test_head_says_what_get_says(full, path):
    browser = client(full)
    got, head = browser.get(path), browser.head(path)
    assert head.status_code == 200 and head.content == b""
    for name in ("etag", "content-type", "content-length"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize("path", ALL)
def test_an_unchanged_page_is_not_sent_again(full, path):
    browser = client(full)
    first = browser.get(path)
    tag = first.headers["etag"]
    again = browser.get(path, headers={"if-none-match": f'"other", W/{tag}'})
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == tag
    assert browser.get(path, headers={"if-none-match": '"other"'}).status_code == 200


def test_a_page_changes_with_the_store(full):
    browser = client(full)
    before = browser.get("/papers").headers["etag"]
    row = {"key": "new", "title": "Brand new", "date": "2026-01-31", "source": "json"}
    with full.write() as c:
        papers.add(c, [row])
    after = browser.get("/papers", headers={"if-none-match": before})
    assert after.status_code == 200 and "Brand new" in after.text


def test_a_page_is_the_same_for_another_process_and_after_a_restart(full):
    one = client(full, "reading").get("/papers").headers["etag"]
    assert client(full, "reading").get("/papers").headers["etag"] == one


def test_two_browsers_get_their_own_token_of_forms(full):
    app = client(full).app
    from starlette.testclient import TestClient

    pages = []
    for _ in range(2):
        browser = TestClient(app, base_url=LOCAL)
        found = set(re.findall(r'name="csrf" value="([^"]+)"', browser.get("/papers").text))
        assert len(found) == 1
        pages.append(found.pop())
        assert browser.get("/papers").text.count(pages[-1]) > 10
    assert pages[0] != pages[1]


def test_who_only_reads_is_given_no_form_and_no_cookie(full):
    answer = client(full, "reading").get("/")
    assert "set-cookie" not in answer.headers and "csrf" not in answer.text
    answer = client(full, "shared", public_url="https://papers.example").get("/")
    assert "set-cookie" not in answer.headers and "/login?next=" in answer.text


class TestFront:
    def test_shows_the_newest_day_and_what_came_before(self, full):
        page = client(full).get("/").text
        by_date = sorted(catalogue(), key=lambda card: card.date, reverse=True)
        assert titles(page)[0] == by_date[0].slug
        dates = {card.slug: card.date for card in catalogue()}
        shown = [dates[slug] for slug in titles(page)]
        assert shown == sorted(shown, reverse=True) and len(shown) >= 8

    def test_days_lead_to_one_another_and_back(self, full):
        browser = client(full)
        newest = browser.get("/").text
        address = html.unescape(re.search(r'rel="prev" href="([^"]+)"', newest)[1])
        day = browser.get(address).text
        assert address.startswith("/?day=")
        onward = html.unescape(re.search(r'rel="next" href="([^"]+)"', day)[1])
        assert titles(browser.get(onward).text)[0] == titles(newest)[0]

    def test_every_paper_is_reached_by_going_back(self, full):
        browser, address, seen = client(full), "/", set()
        while address:
            page = browser.get(address).text
            seen |= set(titles(page))
            found = re.search(r'rel="prev" href="([^"]+)"', page)
            address = html.unescape(found[1]) if found else None
        assert seen == {card.slug for card in catalogue()}

    def test_a_wing_has_days_of_its_own(self, full):
        page = client(full).get("/?wing=learning").text
        wings = {card.slug: card.wing for card in catalogue()}
        assert {wings[slug] for slug in titles(page)} == {"learning"}

    def test_a_day_without_papers_says_so(self, full):
        page = text(client(full).get("/?day=2020-01-01").text)
        assert "No paper appeared on this day." in page

    def test_an_empty_store_says_how_to_fill_it(self, store):
        page = text(client(store).get("/").text)
        assert "No papers yet" in page and "pantarhei feed add" in page

    def test_a_day_with_many_papers_says_how_many(self, store):
        rows = [
            {"key": f"p{n}", "title": f"P {n}", "date": "2026-01-31", "source": "json"}
            for n in range(130)
        ]
        with store.write() as c:
            papers.add(c, rows)
        page = client(store).get("/").text
        assert len(titles(page)) == 50 and "The 50 of 130 papers" in text(page)
        assert "/papers?since=2026-01-31&amp;until=2026-01-31" in page


class TestListings:
    def test_trending_puts_measured_papers_first(self, full):
        page = client(full).get("/trending").text
        measured = {"rbqe", "evolvegcn", "sortednet", "pdlt", "lr-transfer"}
        assert measured <= set(titles(page)[:10])

    @pytest.mark.parametrize("order", ["", "heat"])
    def test_all_papers_are_listed_page_by_page(self, store, order):
        rows = [
            {
                "key": f"p{n}",
                "title": f"P {n}",
                "date": f"2026-01-{n % 28 + 1:02d}",
                "source": "json",
            }
            for n in range(120)
        ]
        with store.write() as c:
            papers.add(c, rows)
        browser, seen, address = client(store), [], f"/papers?order={order}"
        while address:
            page = browser.get(address).text
            seen += titles(page)
            found = re.search(r'rel="next" href="([^"]+)"', page)
            address = html.unescape(found[1]) if found else None
        assert sorted(seen) == sorted(row["key"] for row in rows)

    def test_filters_are_kept_and_said(self, full):
        page = client(full).get("/papers?wing=compute&status=runs&since=2020-01-01&until=").text
        assert titles(page) == ["sortednet", "rbqe"]
        assert "of the wing compute, that run, since 1 January 2020" in text(page)
        assert '<option value="compute" selected>' in page and 'value="2020-01-01"' in page
        assert "/export.bib?wing=compute&amp;status=runs&amp;since=2020-01-01" in page

    def test_nothing_found_says_so(self, full):
        page = text(client(full).get("/papers?since=2030-01-01").text)
        assert "No paper is like that." in page

    def test_a_tag_has_a_page(self, full):
        with full.write() as c:
            who = c.execute(
                sa.insert(schema.accounts)
                .values(email="a@example.org", name="a", created=0.0)
                .returning(schema.accounts.c.id)
            ).scalar_one()
            paper = papers.get(c, "rbqe")
            c.execute(sa.insert(schema.tags).values(account=who, paper=paper.id, tag="a/b ü"))
        answer = client(full).get("/tags/a%2Fb%20%C3%BC")
        if answer.status_code == 404:  # a slash is no part of a tag's address
            answer = client(full).get("/papers?tag=a/b%20%C3%BC")
        assert titles(answer.text) == ["rbqe"]
        assert "No paper carries this tag." in text(client(full).get("/tags/none").text)


class TestSearch:
    @pytest.fixture
    def browser(self, full):
        searcher = Searcher(full)
        yield client(full, searcher=searcher)
        searcher.close()

    def test_finds_by_words(self, browser):
        answer = browser.get("/search?q=early+exit+compressed+images")
        assert titles(answer.text)[0] == "rbqe"
        assert re.search(r"\d+ papers?", text(answer.text))
        assert "<mark>" in answer.text

    def test_forgives_a_slip_and_says_so(self, browser):
        page = browser.get("/search?q=turbulense").text
        assert titles(page) and "No paper has “turbulense”" in text(page)

    def test_finds_while_a_word_is_being_typed(self, browser):
        page = browser.get("/search?q=sorted+lla", headers={"hx-request": "true"}).text
        assert titles(page)[0] == "soft"

    def test_filters(self, browser):
        page = browser.get("/search?q=network&wing=systems").text
        wings = {card.slug: card.wing for card in catalogue()}
        assert titles(page) and {wings[slug] for slug in titles(page)} == {"systems"}

    def test_goes_on_page_by_page(self, browser):
        first = browser.get("/search?q=network").text
        assert len(titles(first)) == 20
        onward = html.unescape(re.search(r'rel="next" href="([^"]+)"', first)[1])
        second = browser.get(onward).text
        assert titles(second) and not set(titles(first)) & set(titles(second))

    def test_says_what_to_do_where_nothing_is_found(self, browser):
        page = text(browser.get("/search?q=network&since=2099-01-01").text)
        assert "Nothing here matches “network” with these filters" in page

    @pytest.mark.parametrize(
        "query",
        [
            '"',
            "'; DROP TABLE papers; --",
            "a" * 200,
            "NEAR(a b)",
            "*",
            "\\",
            "ﬀ 😀",
            "<b>",
            "-",
            "%",
        ],
    )
    def test_takes_any_text(self, browser, query):
        answer = browser.get("/search", params={"q": query})
        assert answer.status_code == 200
        assert "<b>" not in answer.text

    def test_refuses_what_is_too_long(self, browser):
        answer = browser.get("/search", params={"q": "a" * 201})
        assert answer.status_code == 400 and "at most 200 characters" in text(answer.text)

    @pytest.mark.parametrize("page", ["0", "x", "-1", "501", "9" * 5000, "²"])
    def test_refuses_a_page_that_is_none(self, browser, page):
        assert browser.get("/search", params={"q": "a", "page": page}).status_code == 400


class TestPaper:
    def test_shows_each_claim_beside_the_paper_s_own_figure(self, full):
        page = text(client(full).get("/paper/evolvegcn").text)
        record = json.loads((EVIDENCE / "evolvegcn-cpu.json").read_text())
        for claim in record["claims"]:
            assert " ".join(claim["statement"].split()) in html.unescape(page)
        for words in (
            "39 on BC-OTC (.0968 over .0025)",  # the paper's value
            "≥ 1.2",
            report.number(next(c["measured"] for c in record["claims"] if c["id"] == "links")),
            "✗ does not hold",
            "✓ holds",
            "summary.csv",
            "seed 0",
            "AMD EPYC, 2 cores",
            "26 November 2026",
            "66f3cfb564e8",
            "50 min",
            "pantarhei run evolvegcn",
        ):
            assert words in html.unescape(page), words

    def test_says_what_is_known_where_nothing_was_measured(self, full):
        browser = client(full)
        planned = next(card for card in catalogue() if card.status == "planned")
        page = text(browser.get(f"/paper/{planned.slug}").text)
        assert "Planned: there is no recipe yet" in page and "Run it" not in page

    def test_answers_to_the_arxiv_identifier(self, full):
        for name in ("2006.16581", "2006.16581v2"):
            answer = client(full).get(f"/paper/{name}")
            assert answer.status_code == 301 and answer.headers["location"] == "/paper/rbqe"

    def test_an_unknown_one_is_404_in_style(self, full):
        answer = client(full).get("/paper/nobody")
        assert answer.status_code == 404 and "There is no such paper here" in answer.text
        assert "<nav" in answer.text and "style.css" in answer.text

    def test_shows_what_strangers_wrote_as_text(self, store):
        evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
        row = {
            "key": "evil",
            "title": evil,
            "summary": evil,
            "authors": [evil],
            "date": "2026-01-31",
            "source": "json",
            "categories": 'cs.LG"><script>',
            "code": "https://example.org/\"onmouseover='alert(1)'",
            "doi": '10.1234/"><script>',
        }
        with store.write() as c:
            papers.add(c, [row])
        for path in ("/", "/papers", "/trending", "/paper/evil"):
            page = client(store).get(path).text
            assert "<script>" not in page and "<img" not in page and "alert(1)" in page
            assert 'href="https://example.org/"onmouse' not in page

    def test_related_papers(self, full):
        class Near:
            def refresh(self):
                pass

            def related(self, paper, n=5):
                with full.read() as c:
                    return [papers.get(c, "sortednet")]

        page = client(full, searcher=Near()).get("/paper/soft").text
        assert titles(page) == ["sortednet"] and "Related papers" in page


class TestCompare:
    def test_puts_papers_side_by_side(self, full):
        page = client(full).get("/compare?paper=rbqe&paper=evolvegcn&paper=rbqe").text
        for paper in ("rbqe", "evolvegcn"):
            claims = json.loads((EVIDENCE / f"{paper}-cpu.json").read_text())["claims"]
            held = sum(claim["holds"] for claim in claims)
            assert f"{held} of {len(claims)} held" in text(page)
        assert page.count('<section class="broad measured"') == 2
        assert page.count("checked>") == 2

    def test_offers_what_was_measured(self, full):
        page = client(full).get("/compare").text
        offered = set(re.findall(r'name="paper" value="([^"]+)"', page))
        assert "rbqe" in offered and "staged" not in offered

    def test_refuses_too_many_and_unknown_ones(self, full):
        browser = client(full)
        many = "&".join(f"paper={card.slug}" for card in catalogue()[:11])
        assert browser.get(f"/compare?{many}").status_code == 400
        answer = browser.get("/compare?paper=nobody")
        assert answer.status_code == 400 and "Unknown paper" in answer.text


def test_a_search_of_milliseconds_is_made_in_the_event_loop_and_no_other(full, monkeypatch):
    searcher = Searcher(full)
    searcher.refresh()
    made, where = searcher.search, []

    def search(*arguments, **options):
        try:
            asyncio.get_running_loop()
            where.append("loop")
        except RuntimeError:
            where.append("thread")
        return made(*arguments, **options)

    monkeypatch.setattr(searcher, "search", search)
    browser = TestClient(create_app(full, searcher=searcher), base_url=LOCAL)
    prompt = "loop" if full.path is not None else "thread"
    for path in ("/search?q={}", "/api/v1/search?q={}"):
        for query, expected in (("early exit", prompt), ('"early exit"', "thread")):
            where.clear()
            answer = browser.get(path.format(query))
            assert answer.status_code == 200 and "rbqe" in answer.text
            assert where == [expected]


def test_about_says_the_formula_with_its_constants(full):
    page = text(client(full).get("/about").text)
    assert "heat = log 2 Σ w · 2 t ∕ 7 days" in page
    assert "each vote 1 , each newest measured claim 0.25" in page.replace("1,", "1 ,")
    assert "10 papers run and 21 are planned" in page


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/nowhere", 404),
        ("/paper/", 404),
        ("/?day=2026-02-30", 400),
        ("/?day=%F0%9F%98%80", 400),
        ("/?wing=nonsense", 400),
        ("/papers?order=nonsense", 400),
        ("/papers?after=nonsense", 400),
        ("/papers?status=nonsense", 400),
        ("/trending?after=e30", 400),
        ("/feed/atom?view=nonsense", 400),
        ("/feed/atom?view=wing", 400),
        ("/export.csv?order=nonsense", 422),
        ("/paper/rbqe/figure/x", 422),
        ("/paper/rbqe/figure/0", 404),
        ("/paper/rbqe/figure/99999999999999999999", 404),
        ("/static/../app.py", 404),
        ("/static/%2e%2e%2fapp.py", 404),
    ],
)
def test_what_cannot_be_answered_is_one_sentence_in_style(full, path, status):
    answer = client(full).get(path)
    assert answer.status_code == status
    assert "<h1>" in answer.text and "style.css" in answer.text and "Traceback" not in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_a_defect_of_ours_is_500_in_style_and_tells_nothing(full):
    class Broken:
        def refresh(self):
            pass

        def related(self, paper, n=5):
            raise ZeroDivisionError("the secret of the house")

    answer = client(full, searcher=Broken()).get("/paper/rbqe")
    assert answer.status_code == 500 and "This is our fault" in answer.text
    assert "secret" not in answer.text


def test_a_store_that_is_away_is_503_and_keeps_its_place_to_itself(full, monkeypatch):
    browser = client(full, "reading")
    browser.get("/")
    from pantarhei.errors import RequestError

    def away(*_, **__):
        try:
            raise sa.exc.TimeoutError
        except sa.exc.TimeoutError as error:
            raise RequestError("The store '/home/ada/feed.sqlite' is busy.") from error

    monkeypatch.setattr(papers, "listing", away)
    answer = browser.get("/trending")
    assert answer.status_code == 503 and "ada" not in answer.text
    assert answer.headers["retry-after"]


def test_too_many_requests_are_429_in_style(full):
    from dataclasses import replace

    from pantarhei.feed.web.security import Limit

    browser = client(full, "reading")
    site = browser.app.state.site
    limits = {**site.limits, "read": Limit(2, 60)}
    guard = next(m for m in browser.app.user_middleware if "site" in m.kwargs)
    guard.kwargs["site"] = replace(site, limits=limits)
    assert [browser.get("/about").status_code for _ in range(3)] == [200, 200, 429]


def test_static_files_are_kept_for_good_by_their_content(full):
    browser = client(full)
    for address in re.findall(r'(?:href|src)="(/static/[^"]+)"', browser.get("/").text):
        answer = browser.get(html.unescape(address))
        assert answer.status_code == 200 and "immutable" in answer.headers["cache-control"]
        again = browser.get(address, headers={"if-none-match": answer.headers["etag"]})
        assert again.status_code == 304
    assert browser.get("/static/style.css").headers["cache-control"] == "no-cache"
    assert "Zero-Clause BSD" in browser.get("/static/htmx.LICENSE.txt").text


def test_a_shared_page_offers_each_list_by_mail(full):
    browser = client(full, "shared", public_url="https://papers.example")
    assert "/subscribe?kind=wing&amp;value=learning" in browser.get("/papers?wing=learning").text
    assert "/subscribe" not in client(full).get("/papers").text


def test_what_was_kept_for_one_is_not_shown_to_another(store):
    app = application(store)
    people = {name: Visitor(app, PUBLIC, f"198.51.100.{n}") for n, name in enumerate("abc")}
    for name in "ab":
        people[name].log_in(store, f"{name}@example.org")
    people["a"].open("/papers")
    people["a"].press("/paper-1/vote")
    for _ in range(2):  # made, then kept
        pages = {name: visitor.open("/papers") for name, visitor in people.items()}
        assert pages["a"].count('aria-pressed="true"') == 1
        assert pages["b"].count('aria-pressed="true"') == 0
        assert "aria-pressed" not in pages["c"] and "csrf" not in pages["c"]
        assert "a@example.org" not in pages["b"] + pages["c"]
        tokens = {name: set(re.findall(r'csrf" value="([^"]+)"', pages[name])) for name in "ab"}
        assert len(tokens["a"] | tokens["b"]) == 2
