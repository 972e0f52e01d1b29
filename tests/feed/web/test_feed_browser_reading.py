"""The pages in a real browser: accessible, still, narrow and wide, with and without JavaScript."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from _reading import EVIDENCE, filled
from _serving import chromium, picture, serving
from test_feed_pictures import png

from pantarhei.feed import papers, schema
from pantarhei.feed.search import Searcher
from pantarhei.feed.store import Store
from pantarhei.feed.web.app import create_app
from pantarhei.papers import catalogue

PAGES = {
    "day": "/",
    "trending": "/trending",
    "papers": "/papers?wing=compute",
    "search": "/search?q=dynamic+deep+neural+network",
    "search-empty": "/search",
    "search-nothing": "/search?q=network&since=2099-01-01",
    "paper": "/paper/evolvegcn",
    "paper-plots": "/paper/rbqe",
    "paper-planned": "/paper/adapt",
    "compare": "/compare?paper=rbqe&paper=evolvegcn",
    "about": "/about",
    "api": "/api",
    "missing": "/nowhere",
}
SHIFT = """
window.shifted = 0;
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.shifted += entry.value;
}).observe({type: "layout-shift", buffered: true});
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("reading")
    (folder / "claims.json").write_text("{}")
    for name in ("frontier", "psnr-over-macs"):
        (folder / f"{name}.png").write_bytes(png(900, 560))
    assert EVIDENCE.is_dir()
    with Store(folder / "feed.sqlite") as store:
        with filled(store).write() as c:
            paper = papers.get(c, "rbqe").id
            runs = schema.runs
            c.execute(sa.update(runs).where(runs.c.paper == paper).values(folder=str(folder)))
        searcher = Searcher(store)
        with serving(create_app(store, searcher=searcher)) as found:
            yield found
        searcher.close()


@pytest.fixture
def open_page(browser, address) -> Iterator[Any]:
    contexts = []

    def opened(path: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on(
            "console",
            lambda said: (
                page.problems.append(said.text)
                if said.type in ("error", "warning") and "404" not in said.text
                else None
            ),
        )
        page.add_init_script(SHIFT)
        page.goto(address + path)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(open_page, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for size in ({"width": 1280, "height": 900}, {"width": 360, "height": 740}):
        page = open_page(PAGES[name], color_scheme=scheme, viewport=size)
        found = axe.Axe().run(page).response["violations"]
        serious = [
            (fault["id"], node["target"], node.get("failureSummary"))
            for fault in found
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ]
        assert serious == []
        assert page.problems == []
        picture(page, f"reading-{name}-{scheme}-{size['width']}")


@pytest.mark.parametrize("name", PAGES)
def test_fits_a_phone_and_a_wide_screen(open_page, name):
    for width in (320, 768, 1920):
        page = open_page(PAGES[name], viewport={"width": width, "height": 700})
        size = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(size) <= 0
        picture(page, f"reading-{name}-{width}")


@pytest.mark.parametrize("name", PAGES)
def test_nothing_moves_once_it_is_painted(open_page, name):
    for width in (360, 1280):
        page = open_page(PAGES[name], viewport={"width": width, "height": 800})
        page.wait_for_load_state("networkidle")
        page.wait_for_timeout(150)
        assert page.evaluate("window.shifted") == 0


def test_everything_is_reached_without_javascript(open_page):
    page = open_page("/", java_script_enabled=False)
    page.fill("#find", "early exit")
    page.press("#find", "Enter")
    assert "/search?q=early+exit" in page.url
    page.select_option("#wing", "compute")
    page.click("form.filters button")
    assert "wing=compute" in page.url
    page.click("ol.papers h2 a >> nth=0")
    assert "/paper/" in page.url
    page.goto(page.url.partition("/paper/")[0] + "/paper/rbqe")
    assert not page.locator(".command button:visible").count()
    commands = page.locator(".command code").all_inner_texts()
    assert commands == [catalogue()[0].own, "pantarhei run rbqe"]
    page.click("text=Compare with other papers")
    page.check('input[value="evolvegcn"]')
    page.click("text=Compare >> nth=-1")
    assert page.url.endswith("paper=rbqe&paper=evolvegcn")


def test_results_appear_while_one_types(open_page):
    page = open_page("/search")
    page.wait_for_load_state("networkidle")
    page.locator("#q").press_sequentially("sorted lla", delay=20)
    page.wait_for_selector("#results ol.papers")
    page.wait_for_selector('#results li:first-child a[href$="/soft"]')
    assert page.evaluate("document.activeElement.id") == "q"
    assert page.input_value("#q") == "sorted lla"
    assert "paper" in page.inner_text("#count")
    page.wait_for_url("**q=sorted+lla*")
    page.select_option("#wing", "learning")
    page.wait_for_url("**wing=learning*")
    page.reload()
    assert page.input_value("#wing") == "learning"
    assert page.problems == []


def test_a_slip_is_forgiven_while_one_types(open_page):
    page = open_page("/search")
    page.wait_for_load_state("networkidle")
    page.fill("#q", "turbulense")
    page.press("#q", "Enter")
    page.wait_for_selector("#results ol.papers")


def test_the_command_is_copied(open_page):
    page = open_page("/paper/rbqe", permissions=["clipboard-read", "clipboard-write"])
    for place, command in enumerate((catalogue()[0].own, "pantarhei run rbqe")):
        page.click(f".command button >> nth={place}")
        page.wait_for_function(
            "n => document.querySelectorAll('.command button')[n].textContent == 'Copied'",
            arg=place,
        )
        assert page.evaluate("navigator.clipboard.readText()") == command


def test_the_keyboard_reaches_the_content_first(open_page):
    page = open_page("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")


def test_days_are_turned_back_and_forth(open_page):
    page = open_page("/")
    newest = page.inner_text("h1")
    page.click('nav[aria-label="Days"] a[rel="prev"]')
    assert page.inner_text("h1") != newest
    page.click('nav[aria-label="Days"] a[rel="next"]')
    assert page.inner_text("h1") == newest


def test_print_shows_the_text_and_leaves_the_controls_out(open_page):
    page = open_page("/paper/evolvegcn")
    page.emulate_media(media="print")
    assert page.locator("nav").first.is_hidden() and page.locator(".doing").is_hidden()
    assert page.locator(".claims").first.is_visible()
