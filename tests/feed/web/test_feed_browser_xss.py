"""The corpus of attacks in a real browser: with and without the policy, nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from _serving import chromium, serving
from fastapi import FastAPI
from starlette.responses import HTMLResponse
from test_feed_markdown import ATTACKS

from pantarhei.feed.web.markdown import render
from pantarhei.feed.web.security import Guard, Site


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    guarded, bare = FastAPI(), FastAPI()
    guarded.add_middleware(Guard, site=Site("local"))

    def page(body: str) -> HTMLResponse:
        return HTMLResponse(f"<!doctype html><title>t</title><main>{body}</main><p id=end>end</p>")

    @guarded.get("/control")
    @bare.get("/control")
    def control() -> HTMLResponse:  # what the listeners must notice, or they notice nothing
        return page("<script>alert(1)</script><img src=x onerror=alert(2)>")

    @guarded.get("/corpus")
    @bare.get("/corpus")
    def corpus() -> HTMLResponse:
        comments = [render(text) + render(f"> - {text}") for text in ATTACKS]
        return page("".join(f"<section>{comment}</section>" for comment in comments))

    # The guard is put before the other application only to be mounted beside it.
    both = FastAPI()
    both.mount("/guarded", guarded)
    both.mount("/bare", bare)
    with serving(both) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


class Watched:
    """A page whose dialogs, broken policies and requests are noted."""

    def __init__(self, browser: Any) -> None:
        self.dialogs: list[str] = []
        self.violations: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context()
        self.page = self.context.new_page()
        self.page.expose_function("violated", lambda name: self.violations.append(name))
        self.page.add_init_script(
            "document.addEventListener('securitypolicyviolation',"
            " e => window.violated(e.violatedDirective))"
        )
        self.page.on("dialog", self._dialog)
        self.page.on("request", lambda request: self.requests.append(request.url))

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def open(self, url: str) -> None:
        self.page.goto(url)
        self.page.wait_for_selector("#end", state="attached")
        self.page.evaluate("new Promise(done => setTimeout(done, 20))")


def test_the_listeners_notice_what_runs(browser: Any, address: str) -> None:
    watched = Watched(browser)
    watched.open(f"{address}/bare/control")
    assert set(watched.dialogs) == {"1", "2"}
    watched.open(f"{address}/guarded/control")
    assert set(watched.dialogs) == {"1", "2"}  # the policy let neither of them run again
    assert {name.split("-")[0] for name in watched.violations} >= {"script"}
    watched.context.close()


@pytest.mark.parametrize("where", ["bare", "guarded"])
def test_nothing_of_the_corpus_runs_or_loads(browser: Any, address: str, where: str) -> None:
    watched = Watched(browser)
    watched.open(f"{address}/{where}/corpus")
    page = watched.page
    assert page.locator("main > section").count() == len(ATTACKS)  # none broke out of its own
    protocols = page.eval_on_selector_all("main a[href]", "all => all.map(a => a.protocol)")
    assert set(protocols) == {"http:", "https:"}
    page.evaluate(
        "for (const e of document.querySelectorAll('main, main *'))"
        " for (const n of ['mouseover', 'focus', 'click', 'toggle', 'error', 'load'])"
        "  if (n != 'click' || e.tagName != 'A') e.dispatchEvent(new Event(n))"
    )
    # the browser's own writing-out and reading-in again changes nothing (mutation)
    kept = "document.querySelector('main').innerHTML"
    before = page.evaluate(kept)
    page.evaluate(f"document.querySelector('main').innerHTML = {kept}")
    assert page.evaluate(kept) == before
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    assert not watched.dialogs
    assert not watched.violations
    foreign = [url for url in watched.requests if not url.startswith(address)]
    assert not foreign  # no picture tells its owner that somebody reads
    watched.context.close()
