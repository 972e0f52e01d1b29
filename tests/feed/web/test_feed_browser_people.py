"""Taking part in a real browser: with and without JavaScript, by keyboard, in light and dark."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from _serving import chromium, picture, serving
from _visiting import application, last_link

from pantarhei.feed import mail, schema, subscriptions
from pantarhei.feed.store import Store

ADA = "ada@example.org"
PAPER = "/paper/paper-1"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def own_store(tmp_path: Any) -> Iterator[Store]:
    with Store(tmp_path / "feed.sqlite") as opened:
        yield opened


@pytest.fixture
def local(own_store: Store) -> Iterator[str]:
    with serving(application(own_store, "local")) as address:
        yield address


@pytest.fixture
def shared(own_store: Store) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with serving(application(own_store, "shared", public_url=address), port):
        yield address


@pytest.fixture(params=[True, False], ids=["script", "no-script"])
def page(browser: Any, request: Any) -> Iterator[Any]:
    """A page of a new browser profile; nothing may be wrong on its console."""
    context = browser.new_context(
        java_script_enabled=request.param, viewport={"width": 1000, "height": 900}
    )
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.script = request.param
    yield opened
    context.close()
    assert wrong == []


def rows(store: Store, name: str) -> list[Any]:
    with store.read() as c:
        return list(c.execute(sa.select(schema.metadata.tables[name])))


def assert_accessible(page: Any) -> None:
    """No fault that axe calls serious or critical."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    if not page.script:
        return  # axe is a script
    found = axe.Axe().run(page).response["violations"]
    bad = [
        (fault["id"], [node["html"] for node in fault["nodes"]])
        for fault in found
        if fault["impact"] in ("serious", "critical")
    ]
    assert not bad


def test_a_local_reader_votes_comments_tags_and_saves(
    local: str, own_store: Store, page: Any
) -> None:
    page.goto(local + PAPER)
    assert_accessible(page)
    picture(page, f"paper-{page.script}")
    page.evaluate("window.untouched = true") if page.script else None
    page.get_by_role("button", name="for “Paper 1").click()
    page.locator(".toggle button[aria-pressed=true]").first.wait_for()
    assert len(rows(own_store, "votes")) == 1
    if page.script:  # in place, and the focus stays where it was
        assert page.evaluate("window.untouched")
        assert page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.reload()  # repeats nothing
    assert len(rows(own_store, "votes")) == 1

    page.get_by_label("Add a tag").fill("early exit")
    page.get_by_role("button", name="Add", exact=True).click()
    page.locator(".tags li").wait_for()
    assert [row.tag for row in rows(own_store, "tags")] == ["early-exit"]

    page.get_by_role("button", name="Add to my list").click()
    page.get_by_role("button", name="On my list").wait_for()
    assert len(rows(own_store, "saved")) == 1

    page.get_by_label("Write a comment").fill("It *holds*.\n\n- one\n- two\n\n```\nx < y\n```")
    page.get_by_role("button", name="Preview").click()
    page.locator(".said em").wait_for()
    assert rows(own_store, "comments") == []
    assert_accessible(page)
    picture(page, f"preview-{page.script}")
    page.get_by_role("button", name="Comment", exact=True).click()
    page.locator("article.comment em").wait_for()
    assert len(rows(own_store, "comments")) == 1
    page.reload()
    page.go_back()
    assert len(rows(own_store, "comments")) == 1

    page.goto(local + PAPER)
    assert_accessible(page)
    picture(page, f"paper-after-{page.script}")
    page.get_by_role("link", name="Edit your comment").click()
    page.get_by_label("Your comment").fill("It did **not** hold.")
    page.get_by_role("button", name="Save").click()
    page.locator("article.comment strong", has_text="not").wait_for()
    page.get_by_role("link", name="Delete your comment").click()
    assert_accessible(page)
    picture(page, f"delete-{page.script}")
    page.get_by_role("button", name="Delete").click()
    page.get_by_text("No comments").wait_for()
    assert rows(own_store, "comments") == []

    page.get_by_role("button", name="Take my tag").click()
    page.get_by_label("Add a tag").wait_for()
    assert rows(own_store, "tags") == []
    page.goto(f"{local}/list")
    assert_accessible(page)
    picture(page, f"list-{page.script}")
    page.get_by_role("button", name="On my list").click()
    page.goto(f"{local}/list")
    page.get_by_text("Nothing yet").wait_for()
    assert rows(own_store, "saved") == []


def test_an_account_by_mail(shared: str, own_store: Store, page: Any) -> None:
    page.goto(shared + PAPER)
    assert_accessible(page)
    page.get_by_role("link", name="log in to vote").click()
    assert_accessible(page)
    picture(page, f"login-{page.script}")
    page.get_by_label("E-mail address").fill(ADA)
    page.get_by_role("button", name="Send me a link").click()
    page.get_by_role("heading", name="Look into your mail").wait_for()
    assert_accessible(page)
    page.goto(shared + last_link(own_store, ADA, shared))
    assert_accessible(page)
    picture(page, f"login-confirm-{page.script}")
    page.get_by_role("button", name="Log in").click()
    page.get_by_role("button", name="Log out").wait_for()
    assert page.url == shared + PAPER  # back where the vote was to be given
    page.get_by_role("button", name="for “Paper 1").click()
    page.locator(".toggle button[aria-pressed=true]").first.wait_for()
    assert len(rows(own_store, "votes")) == 1
    page.goto(f"{shared}/account")
    assert_accessible(page)
    picture(page, f"account-{page.script}")
    page.get_by_role("button", name="Log out").click()
    page.locator("header").get_by_role("link", name="Log in").wait_for()


def test_papers_by_mail(shared: str, own_store: Store, page: Any) -> None:
    page.goto(shared)
    page.get_by_role("link", name="Papers by mail").click()
    assert_accessible(page)
    picture(page, f"subscribe-{page.script}")
    page.get_by_label("E-mail address").fill(ADA)
    page.get_by_label("Every week").check()
    page.get_by_label("Those that a search finds").check()
    page.get_by_role("textbox", name="Search", exact=True).fill("early exits")
    page.get_by_role("button", name="Subscribe").click()
    page.get_by_role("heading", name="Look into your mail").wait_for()
    [row] = rows(own_store, "subscriptions")
    assert (row.period, row.kind, row.value, row.confirmed) == (
        "weekly",
        "search",
        "early exits",
        None,
    )
    page.goto(shared + last_link(own_store, ADA, shared))
    assert_accessible(page)
    picture(page, f"confirm-{page.script}")
    page.get_by_role("button", name="Yes, send them").click()
    page.get_by_role("heading", name="You are subscribed").wait_for()
    picture(page, f"subscribed-{page.script}")
    assert rows(own_store, "subscriptions")[0].confirmed is not None
    with own_store.read() as c:
        [one] = subscriptions.active(c)
    head = mail.Letterhead(shared, own_store.secret)
    page.goto(subscriptions.unsubscribe_link(head, one))
    assert_accessible(page)
    picture(page, f"unsubscribe-{page.script}")
    page.get_by_role("button", name="Unsubscribe").click()
    page.get_by_role("heading", name="You are unsubscribed").wait_for()
    assert rows(own_store, "subscriptions")[0].ended is not None


def focus_on(page: Any, what: str) -> None:
    """Press Tab until the focus is on what matches; whoever has no mouse gets there."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(f"document.activeElement.matches({what!r})"):
            style = "getComputedStyle(document.activeElement).outlineStyle"
            assert page.evaluate(style) != "none"  # and sees where it is
            return
    raise AssertionError(f"Tab does not lead to {what}")


def test_with_the_keyboard_alone(local: str, own_store: Store, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.goto(local + PAPER)
    focus_on(page, "[id^=vote-]")
    page.keyboard.press("Space")
    page.locator("[id^=vote-][aria-pressed=true]").wait_for()
    page.keyboard.press("Enter")  # the focus is still on it: the vote is taken back
    page.locator("[id^=vote-][aria-pressed=false]").wait_for()
    page.keyboard.press("Enter")
    page.locator("[id^=vote-][aria-pressed=true]").wait_for()
    focus_on(page, "#tag")
    page.keyboard.type("by hand")
    page.keyboard.press("Enter")
    page.locator(".tags li").wait_for()
    focus_on(page, "#body")
    page.keyboard.type("written without a mouse")
    focus_on(page, "button[value=send]")
    page.keyboard.press("Enter")
    page.locator("article.comment").wait_for()
    counts = [len(rows(own_store, name)) for name in ("votes", "tags", "comments")]
    assert counts == [1, 1, 1]
    context.close()


@pytest.mark.parametrize(("scheme", "width"), [("dark", 320), ("light", 320), ("dark", 1400)])
def test_narrow_and_wide_dark_and_light(
    shared: str, own_store: Store, browser: Any, scheme: str, width: int
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=True
    )
    page = context.new_page()
    page.script = True
    for path in (PAPER, "/login", "/subscribe", "/login/sent", "/unsubscribe/x"):
        page.goto(shared + path)
        assert_accessible(page)
        wide = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        assert not page.evaluate(wide), path
        picture(page, f"{path.strip('/').replace('/', '-')}-{scheme}-{width}")
    context.close()
