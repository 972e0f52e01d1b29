"""Taking part, through the whole application, as a browser without JavaScript does."""

from __future__ import annotations

import re
import time
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import sqlalchemy as sa
from _visiting import PUBLIC, Visitor, application, last_link, messages
from test_feed_markdown import ATTACKS, assert_inert
from test_feed_security import Clock

from pantarhei.feed import mail, papers, people, schema, subscriptions
from pantarhei.feed.store import Store
from pantarhei.feed.web import taking_part
from pantarhei.feed.web.security import Limit, Limiter

ADA, BOB = "ada@example.org", "bob@example.org"
PAPER = "/paper/paper-1"
SESSION = "__Host-session"


@pytest.fixture
def shared(store: Store) -> Any:
    return application(store)


@pytest.fixture
def ada(shared: Any, store: Store) -> Visitor:
    visitor = Visitor(shared, PUBLIC, "198.51.100.1")
    visitor.log_in(store, ADA)
    return visitor


@pytest.fixture
def bob(shared: Any, store: Store) -> Visitor:
    visitor = Visitor(shared, PUBLIC, "198.51.100.2")
    visitor.log_in(store, BOB)
    return visitor


@pytest.fixture
def nobody(shared: Any) -> Visitor:
    return Visitor(shared, PUBLIC, "198.51.100.3")


@pytest.fixture
def owner(store: Store) -> Visitor:
    return Visitor(application(store, "local"), "http://localhost:8000")


def rows(store: Store, table: str) -> list[Any]:
    with store.read() as c:
        return list(c.execute(sa.select(schema.metadata.tables[table])))


def votes(store: Store, key: str = "paper-1") -> int:
    with store.read() as c:
        query = sa.select(schema.papers.c.votes).where(schema.papers.c.key == key)
        return int(c.execute(query).scalar_one())


# -------------------------------------------------------------------------------------- logging in


def test_a_link_in_a_mail_logs_in_once(shared: Any, store: Store, nobody: Visitor) -> None:
    nobody.open(f"/login?next={PAPER}")
    assert "on its way" in nobody.press("/login", email=" Ada@Example.org ")
    link = last_link(store, ADA)
    path = urlsplit(link).path
    # A program that looks at mail follows the link, as often as it likes ...
    for _ in range(3):
        assert f"log in as {ADA}" in Visitor(shared, PUBLIC).open(link)
    assert nobody.client.get(link).headers["cache-control"] == "no-store"
    assert rows(store, "accounts") == []
    # ... and the person presses the button.
    nobody.open(link)
    answer = nobody.send(path)
    assert answer.headers["location"] == PAPER
    cookie = next(c for c in answer.headers.get_list("set-cookie") if c.startswith(SESSION))
    for flag in ("HttpOnly", "Secure", "SameSite=lax", "Path=/", f"Max-Age={30 * 86400}"):
        assert flag in cookie
    assert ADA in nobody.open(PAPER)
    other = Visitor(shared, PUBLIC)
    assert "does not work" in other.open(link, 410)
    other.open("/login")
    token = other.form("/login").fields["csrf"]
    assert other.client.post(path, data={"csrf": token}).status_code == 410


def test_only_hashes_of_links_and_sessions_are_kept(store: Store, ada: Visitor) -> None:
    token = urlsplit(last_link(store, ADA)).path.rpartition("/")[2]
    session = ada.client.cookies[SESSION]
    kept = str(rows(store, "tokens"))
    assert len(rows(store, "tokens")) >= 1
    assert token not in kept and session not in kept


def test_the_answer_is_the_same_with_and_without_an_account(
    store: Store, ada: Visitor, nobody: Visitor
) -> None:
    answers = []
    for email in (ADA, "new@example.org"):
        nobody.open("/login")
        answer = nobody.send("/login", email=email)
        answers.append((answer.status_code, answer.headers["location"], answer.content))
        assert len(messages(store, email)) >= 1
    assert answers[0] == answers[1]


def test_links_that_are_old_or_tampered_with_do_nothing(
    store: Store, nobody: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody.open("/login")
    nobody.press("/login", email=ADA)
    path = urlsplit(last_link(store, ADA)).path
    token = path.rpartition("/")[2]
    flipped = ("A" if token[0] != "A" else "B") + token[1:]
    csrf = {"csrf": nobody.client.get("/login").text.split('name="csrf" value="')[1][:64]}
    wrongs = (token[:-1], token + "A", flipped, token.swapcase(), "x", "%00", "é", "' OR 1=1 --")
    for wrong in wrongs:
        answer = nobody.client.post(f"/login/{quote(wrong, safe='%')}", data=csrf)
        assert answer.status_code in (400, 410), wrong
        assert SESSION not in answer.headers.get("set-cookie", "")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 15 * 60 + 1)
    assert "does not work" in nobody.open(path, 410)
    assert nobody.client.post(path, data=csrf).status_code == 410


def test_a_session_ends(
    store: Store, shared: Any, ada: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = ada.client.cookies[SESSION]
    ada.open("/")
    ada.press("/logout")
    assert SESSION not in ada.client.cookies
    thief = Visitor(shared, PUBLIC)
    thief.client.cookies.set(SESSION, session, domain="papers.example")
    assert ADA not in thief.open("/")  # logging out ends it in the store, not only here
    ada.log_in(store, ADA)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30 * 86400 + 1)
    assert ADA not in ada.open("/")


def test_a_session_cannot_be_fixed_beforehand(store: Store, nobody: Visitor) -> None:
    nobody.client.cookies.set(SESSION, "chosen-by-somebody", domain="papers.example")
    assert ADA not in nobody.open("/")
    nobody.log_in(store, ADA)
    first = nobody.client.cookies[SESSION]
    assert first != "chosen-by-somebody" and len(first) >= 43
    before = nobody.client.cookies[SESSION]
    nobody.client.get("/login")
    # logging in again begins another and ends this one
    nobody.open(PAPER)
    csrf = nobody.form("/vote").fields["csrf"]
    nobody.client.post("/login", data={"csrf": csrf, "email": ADA})
    path = urlsplit(last_link(store, ADA)).path
    nobody.client.post(path, data={"csrf": csrf})
    assert nobody.client.cookies[SESSION] != before
    nobody.client.cookies.set(SESSION, before, domain="papers.example")
    assert ADA not in nobody.open("/")


@pytest.mark.parametrize("next", ["//evil.example", "/\\evil.example", "https:evil", "/%0d%0aX:y"])
def test_logging_in_leads_nowhere_else(store: Store, nobody: Visitor, next: str) -> None:
    nobody.open(f"/login?next={quote(next)}")
    nobody.press("/login", email=ADA)
    link = last_link(store, ADA)
    assert "next=" not in link
    nobody.open(f"{link}?next={quote(next)}")
    assert nobody.send(urlsplit(link).path, next=next).headers["location"] == "/"


def test_mail_is_not_sent_without_end(shared: Any, store: Store, nobody: Visitor) -> None:
    for name in ("ada", "ada+1", "ada+2", "ADA"):
        nobody.open("/login")
        nobody.press("/login", email=f"{name}@example.org")
    nobody.open("/login")
    refused = nobody.send("/login", 429, email="ada+3@example.org")
    assert int(refused.headers["retry-after"]) > 60
    for n in range(15):
        nobody.open("/login")
        nobody.press("/login", email=f"p{n}@example.org")
    nobody.open("/login")
    nobody.send("/login", 429, email="last@example.org")


def test_an_address_is_checked(nobody: Visitor, store: Store) -> None:
    for email in ("", "ada", "a@b", "a@e.org\r\nBcc: x@e.org", "a@e.org,b@e.org", "<a@e.org>"):
        nobody.open("/login")
        assert "not an e-mail address" in nobody.send("/login", 400, email=email).text
    assert rows(store, "outbox") == []


def test_without_mail_nobody_is_promised_any(shared: Any, nobody: Visitor) -> None:
    nobody.open("/login")
    shared.state.letterhead = None
    assert "sends no mail" in nobody.send("/login", 503, email=ADA).text
    nobody.open("/subscribe", 503)


# ------------------------------------------------------------------------------------- modes


def test_the_owner_of_a_local_page_takes_part_at_once(owner: Visitor, store: Store) -> None:
    owner.open(PAPER)
    owner.press("/vote")
    owner.open(PAPER)
    owner.press("/comment", body="mine", do="send")
    assert votes(store) == 1
    assert [row.email for row in rows(store, "accounts")] == ["you@localhost"]
    owner.open("/login", 200)  # leads to where one is already
    assert owner.page.url.path == "/"
    owner.open("/login/abc", 404)


def test_a_local_page_is_for_its_own_machine(store: Store) -> None:
    app = application(store, "local")
    rebound = Visitor(app, "http://evil.example:8000")
    assert rebound.client.get(PAPER).status_code == 421
    assert rebound.client.post(f"{PAPER}/vote", data={"on": "1"}).status_code == 421


def test_readers_read(store: Store) -> None:
    app = application(store, "reading")
    reader = Visitor(app, "http://192.168.1.7:8000")
    html = reader.open(PAPER)
    assert "<textarea" not in html and "/login" not in html
    assert 'method="post"' not in html and "set-cookie" not in reader.page.headers
    assert reader.client.post(f"{PAPER}/vote", data={"on": "1"}).status_code == 403
    reader.open("/login", 404)
    reader.open("/list", 403)


def test_nobody_is_asked_to_log_in_and_comes_back(nobody: Visitor, store: Store) -> None:
    html = nobody.open(PAPER)
    assert "<textarea" not in html and f"/login?next={PAPER}" in html
    nobody.open("/login")
    csrf = nobody.form("/login").fields["csrf"]
    answer = nobody.client.post(f"{PAPER}/vote", data={"csrf": csrf, "on": "1"})
    assert answer.status_code == 303
    assert answer.headers["location"] == f"/login?next={quote(PAPER, safe='')}"
    by_script = nobody.client.post(
        f"{PAPER}/vote", data={"csrf": csrf, "on": "1"}, headers={"HX-Request": "true"}
    )
    assert by_script.headers["hx-redirect"] == answer.headers["location"]
    assert votes(store) == 0
    nobody.open("/list")
    assert nobody.page.url.path == "/login"


# ------------------------------------------------------------------------ votes, tags, list


def test_votes_are_given_and_taken_back(ada: Visitor, bob: Visitor, store: Store) -> None:
    for visitor in (ada, bob):
        visitor.open(PAPER)
        assert 'aria-pressed="false"' in visitor.page.text
        visitor.press("/vote")
    assert votes(store) == 2
    ada.open(PAPER)
    form = ada.form("/vote")
    assert 'aria-pressed="true"' in ada.page.text and form.fields["on"] == "0"
    for _ in range(2):  # sent twice, it does the same
        ada.send("/vote")
    assert votes(store) == 1
    assert [row.votes for row in rows(store, "papers") if row.key == "paper-2"] == [0]


def test_with_htmx_only_the_button_comes_back(ada: Visitor, store: Store) -> None:
    ada.open(PAPER)
    form = ada.form("/vote")
    answer = ada.client.post(form.action, data=form.fields, headers={"HX-Request": "true"})
    assert answer.status_code == 200 and votes(store) == 1
    assert answer.text.strip().startswith("<form") and answer.text.count("<form") == 1
    assert 'aria-pressed="true"' in answer.text and form.fields["csrf"] in answer.text


def test_a_vote_leads_back_to_where_it_was_given(ada: Visitor) -> None:
    ada.open("/papers")
    assert ada.send("/paper-2/vote").headers["location"] == "/papers"
    for away in ("//evil.example", "https://evil.example", "/\\evil.example", "/a\r\nX: y"):
        ada.open("/papers")
        assert ada.send("/paper-2/vote", next=away).headers["location"] == "/paper/paper-2"


def test_tags(ada: Visitor, bob: Visitor, store: Store) -> None:
    for visitor in (ada, bob):
        visitor.open(PAPER)
        visitor.press("/tag", tag="Early Exits")
    html = ada.open(PAPER)
    [tag] = {row.tag for row in rows(store, "tags")}
    assert "×2" in html and f"/tags/{quote(tag)}" in html
    csrf = ada.form("/tag").fields["csrf"]
    ada.client.post(f"{PAPER}/tag", data={"csrf": csrf, "tag": tag, "on": "0"})
    assert len(rows(store, "tags")) == 1
    ada.client.post(f"{PAPER}/tag", data={"csrf": csrf, "tag": tag, "on": "0"})
    assert len(rows(store, "tags")) == 1  # another's is not ours to take
    for wrong in ("", " ", "x" * 1000, "\u202e"):
        answer = ada.client.post(f"{PAPER}/tag", data={"csrf": csrf, "tag": wrong, "on": "1"})
        assert answer.status_code == 400, wrong
    for on in ("", "2", "yes"):
        answer = ada.client.post(f"{PAPER}/tag", data={"csrf": csrf, "tag": "a", "on": on})
        assert answer.status_code == 400


def test_ones_own_list(ada: Visitor, bob: Visitor) -> None:
    assert "Nothing yet" in ada.open("/list")
    for number in (1, 2):
        ada.open(f"/paper/paper-{number}")
        ada.press("/save")
    html = ada.open("/list")
    assert html.index("Paper 2 on") < html.index("Paper 1 on")
    assert "Nothing yet" in bob.open("/list")
    ada.open("/list")
    assert "Paper 2 on" not in ada.press("/paper-2/save")


# -------------------------------------------------------------------------------------- comments


def test_a_comment_is_previewed_written_edited_and_deleted(ada: Visitor, store: Store) -> None:
    ada.open(PAPER)
    form = ada.form("/comment")
    shown = ada.client.post(form.action, data=form.fields | {"body": "*so*", "do": "preview"})
    assert shown.status_code == 200 and "<em>so</em>" in shown.text
    assert rows(store, "comments") == []
    ada.page = shown
    assert ada.form("/comment").fields["body"] == "*so*"
    answer = ada.send("/comment", do="send")
    [row] = rows(store, "comments")
    assert answer.headers["location"] == f"{PAPER}#comment-{row.id}"
    html = ada.open(PAPER)
    assert "<em>so</em>" in html and "edited" not in html and "1 comment" in html
    ada.open(f"/comment/{row.id}/edit")
    assert ada.form("/edit").fields["body"] == "*so*"
    ada.press("/edit", body="**thus**", do="send")
    assert "<strong>thus</strong>" in ada.open(PAPER) and "edited" in ada.page.text
    ada.open(f"/comment/{row.id}/delete")
    assert len(rows(store, "comments")) == 1  # asking deletes nothing
    ada.press("/delete")
    assert rows(store, "comments") == [] and "thus" not in ada.open(PAPER)


def test_a_comment_sent_twice_is_one(ada: Visitor, store: Store) -> None:
    ada.open(PAPER)
    first = ada.send("/comment", body="once", do="send")
    again = ada.send("/comment", body="once", do="send")  # the same page: the same nonce
    assert first.headers["location"] == again.headers["location"]
    assert len(rows(store, "comments")) == 1
    # another text written in another window of the same page is not lost
    ada.send("/comment", body="another", do="send")
    assert len(rows(store, "comments")) == 2
    # and the same words may be said again, from a page that shows them
    ada.open(PAPER)
    ada.send("/comment", body="once", do="send")
    assert len(rows(store, "comments")) == 3


def test_anothers_comment_is_out_of_reach(ada: Visitor, bob: Visitor, store: Store) -> None:
    ada.open(PAPER)
    ada.press("/comment", body="hers", do="send")
    [row] = rows(store, "comments")
    html = bob.open(PAPER)
    assert "hers" in html and f"/comment/{row.id}/edit" not in html
    assert ADA not in html  # her address is nobody's business
    csrf = bob.form("/comment").fields["csrf"]
    for what in ("edit", "delete"):
        bob.open(f"/comment/{row.id}/{what}", 404)
        answer = bob.client.post(
            f"/comment/{row.id}/{what}", data={"csrf": csrf, "body": "x", "do": "send"}
        )
        assert answer.status_code == 404
    for id in ("0", "-1", "99999999999999999999", "1e3", "x", "%27"):
        assert bob.client.get(f"/comment/{id}/edit").status_code in (404, 422)
    assert rows(store, "comments")[0].body == "hers"


def test_a_comment_has_a_length(ada: Visitor, store: Store) -> None:
    for body in ("", " \n ", "x" * 60_000):
        ada.open(PAPER)
        answer = ada.send("/comment", 400, body=body, do="send")
        assert 'role="alert"' in answer.text
    assert rows(store, "comments") == []
    ada.open(PAPER)
    assert ada.send("/comment", 200, body="x" * 60_000, do="preview")


def test_what_means_something_to_sql_is_text(ada: Visitor, store: Store) -> None:
    for text in (
        "Robert'); DROP TABLE comments; --",
        "100% _ \\' \" ; :name %(name)s ?",
        "$1 \\x00",
    ):
        ada.open(PAPER)
        ada.press("/comment", body=text, do="send")
        assert rows(store, "comments")[-1].body == text
        ada.open("/login")
    assert len(rows(store, "comments")) == 3


def test_comments_are_safe_where_they_are_shown(ada: Visitor, store: Store) -> None:
    body = "\n\n".join(text for text in ATTACKS if "\x01" not in text and "\x0c" not in text)
    for start in range(0, len(body), 3000):
        ada.open(PAPER)
        ada.press("/comment", body=body[start : start + 3000], do="send")
    html = ada.open(PAPER)
    said = re.findall(r'<div class="said">(.*?)</div>\s*</article>', html, re.DOTALL)
    assert len(said) == len(rows(store, "comments")) > 0
    for part in said:
        assert_inert(part)


def test_what_people_write_elsewhere_is_escaped(ada: Visitor, store: Store) -> None:
    ada.open(PAPER)
    answer = ada.send("/tag", 400, tag="<script>alert(1)</script>")
    assert "&lt;script&gt;alert" in answer.text and "<script>alert" not in answer.text
    ada.open("/account")
    ada.press("/account", name="<script>alert(1)</script>")
    ada.open(PAPER)
    assert "<script>alert" not in ada.press("/comment", body="by whom?", do="send")
    ada.open(PAPER)
    shown = ada.send("/comment", 200, body="</textarea><script>alert(1)</script>", do="preview")
    assert "<script>alert" not in shown.text
    assert "<script>alert" not in ada.open("/login?next=<script>alert(1)</script>")
    assert "<script>alert" not in ada.open("/subscribe?kind=tag&value=<script>alert(1)</script>")


def test_many_comments_stand_on_several_pages(ada: Visitor, store: Store) -> None:
    with store.write() as c:
        [account] = c.execute(sa.select(schema.accounts.c.id)).scalars()
        paper = papers.get(c, "paper-1")
        assert paper is not None
        for n in range(taking_part.COMMENTS + 2):
            people.comment(c, account, paper.id, f"number {n}.", f"nonce-{n:05d}")
    html = ada.open(PAPER)
    assert "102 comments" in html and "number 99." in html and "number 100." not in html
    [rest] = re.findall(r'href="(/paper/paper-1/comments\?after=\d+)', html)
    html = ada.open(rest)
    assert "number 99." not in html and "number 100." in html and "number 101." in html
    # a new one leads to where it stands, and sent twice it is one all the same
    for _ in range(2):
        ada.open(PAPER)
        form = ada.form("/comment")
        answer = ada.client.post(form.action, data=form.fields | {"body": "new", "do": "send"})
        again = ada.client.post(form.action, data=form.fields | {"body": "new", "do": "send"})
        assert again.headers["location"] == answer.headers["location"]
        assert ">new<" in ada.open(answer.headers["location"])
    assert len(rows(store, "comments")) == taking_part.COMMENTS + 4
    for after in ("-1", "99999999999999999999", "x", "1.5", "%00"):
        assert ada.client.get(f"{PAPER}/comments?after={after}").status_code in (200, 400, 422)


def test_an_account_is_named_and_deleted(ada: Visitor, bob: Visitor, store: Store) -> None:
    ada.open(PAPER)
    ada.press("/comment", body="mine", do="send")
    ada.open(PAPER)
    ada.press("/vote")
    ada.open("/account")
    assert ada.form("/account").fields["name"] == "ada"
    ada.press("/account", name="Ada L.")
    assert "<strong>Ada L.</strong>" in bob.open(PAPER)
    for wrong in ("", "  ", "x" * 51):
        ada.open("/account")
        assert 'role="alert"' in ada.send("/account", 400, name=wrong).text
    ada.open("/account/delete")
    assert votes(store) == 1
    ada.press("/account/delete")
    assert votes(store) == 0 and rows(store, "comments") == []
    assert [row.email for row in rows(store, "accounts")] == [BOB]
    assert [row.email for row in rows(store, "tokens") if row.purpose == "session"] == [BOB]
    assert "Log in" in ada.open("/")
    assert SESSION not in ada.client.cookies


def test_a_page_that_was_kept_for_one_is_not_shown_to_another(
    ada: Visitor, bob: Visitor, nobody: Visitor
) -> None:
    for path in ("/", "/papers", "/trending", PAPER, "/list", "/account"):
        html = ada.open(path)
        tag = ada.page.headers.get("etag")
        assert ADA in html
        if tag:
            headers = {"If-None-Match": tag}
            assert ada.client.get(path, headers=headers).status_code == 304
            assert bob.client.get(path, headers=headers).status_code == 200
        token = re.findall(r'name="csrf" value="(\w+)"', html)[0]
        for other in (bob, nobody):
            shown = other.open(path)
            assert ADA not in shown and token not in shown
        assert ADA in ada.open(path)


# ----------------------------------------------------------------------------- the whole surface


def routes(app: Any) -> list[tuple[str, str]]:
    """Every path with each of its methods; FastAPI keeps included routers as they are."""
    inner = [route.original_router for route in app.routes if hasattr(route, "original_router")]
    listed = [route for holder in (app, *inner) for route in holder.routes]
    return [
        (route.path, method) for route in listed for method in getattr(route, "methods", None) or ()
    ]


def test_every_form_is_refused_without_its_token(
    shared: Any, ada: Visitor, bob: Visitor, store: Store
) -> None:
    ada.open(PAPER)
    ada.press("/comment", body="hers", do="send")
    [comment] = rows(store, "comments")
    bob.open(PAPER)
    foreign = bob.form("/vote").fields["csrf"]
    before = {name: rows(store, name) for name in schema.metadata.tables}
    posts = {path for path, method in routes(shared) if method == "POST"}
    assert len(posts) >= 14
    for path in posts:
        path = path.replace("{key}", "paper-1").replace("{id}", str(comment.id))
        if path.startswith("/unsubscribe/"):
            continue
        for token in ({}, {"csrf": "0" * 64}, {"csrf": foreign}):
            data = token | {"on": "1", "tag": "x", "body": "x", "do": "send", "email": ADA}
            answer = ada.client.post(path.replace("{token}", "x"), data=data)
            assert answer.status_code == 403, path
            assert "load the page again" in answer.text
    assert {name: rows(store, name) for name in schema.metadata.tables} == before


HOSTILE = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e%2f%2e%2e%2fetc/passwd",
    "....//etc/passwd",
    "..\\..\\etc\\passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "%00",
    "paper-1%00.html",
    "paper-1'--",
    "paper-1' OR '1'='1",
    '"; DROP TABLE papers; --',
    "1; SELECT pg_sleep(5)",
    "%' OR 1=1 --",
    "\\",
    "{{7*7}}",
    "${7*7}",
    "%F0%9F%92%A9",
    "%ff",
    "\u202e",
    "x" * 3000,
    "*",
    "_",
]


def test_hostile_names_in_every_route(shared: Any, ada: Visitor, store: Store) -> None:
    ada.open(PAPER)
    csrf = ada.form("/vote").fields["csrf"]
    before = len(rows(store, "papers"))
    named = [found for found in routes(shared) if "{" in found[0] and found[1] in ("GET", "POST")]
    assert len(named) >= 16
    for path, method in named:
        for hostile in HOSTILE:
            target = re.sub(r"\{[^}]*\}", lambda _, h=hostile: quote(h, safe="%/"), path)
            answer = (
                ada.client.get(target)
                if method == "GET"
                else ada.client.post(target, data={"csrf": csrf, "on": "1", "tag": "t"})
            )
            assert answer.status_code < 500, (target, answer.text)
            assert "root:" not in answer.text and "49" not in answer.headers.get("location", "")
    assert len(rows(store, "papers")) == before
    assert rows(store, "votes") == []


def test_an_account_that_overdoes_it_waits(shared: Any, ada: Visitor, store: Store) -> None:
    site, clock = shared.state.site, Clock()
    object.__setattr__(site, "limiter", Limiter(clock))
    object.__setattr__(
        site, "limits", {**site.limits, "account": Limit(2, 60), "comment": Limit(1, 60)}
    )
    ada.open(PAPER)
    ada.send("/vote")
    ada.send("/save")
    assert "too often" in ada.send("/vote", 429).text
    ada.send("/comment", body="one", do="send")
    ada.send("/comment", 429, body="two", do="send")
    clock.now = 60.0
    ada.send("/comment", body="two", do="send")


# --------------------------------------------------------------------------------- papers by mail


def subscribed(store: Store) -> list[Any]:
    return [row for row in rows(store, "subscriptions") if row.confirmed and not row.ended]


def test_subscribe_confirm_unsubscribe(nobody: Visitor, store: Store) -> None:
    nobody.open("/subscribe?kind=wing&value=systems&period=weekly")
    fields = nobody.form("/subscribe").fields
    assert (fields["kind"], fields["period"]) == ("wing", "weekly")
    assert "<option selected>systems" in nobody.page.text
    assert "on its way" in nobody.press("/subscribe", email=ADA, wing="systems")
    link = last_link(store, ADA)
    assert urlsplit(link).path.startswith("/subscribe/confirm/")
    for _ in range(2):
        nobody.open(link)
        assert subscribed(store) == []  # looking is not confirming
    form = nobody.form(urlsplit(link).path)
    for _ in range(2):  # twice is once
        assert "You are subscribed" in nobody.client.post(form.action, data=form.fields).text
    [row] = subscribed(store)
    assert (row.email, row.period, row.kind, row.value) == (ADA, "weekly", "wing", "systems")
    tampered = urlsplit(link).path[:-2] + "xx"
    assert nobody.client.post(tampered, data=form.fields).status_code == 400
    path = unsubscribe_path(store)
    assert "End this subscription" in nobody.open(path)
    assert len(subscribed(store)) == 1  # looking ends nothing
    nobody.send(path, 200)
    assert subscribed(store) == []


def unsubscribe_path(store: Store) -> str:
    """Where the link in a digest leads."""
    head = mail.Letterhead(PUBLIC, store.secret)
    with store.read() as c:
        [one] = subscriptions.active(c)
    return urlsplit(subscriptions.unsubscribe_link(head, one)).path


def test_one_click_from_a_mail_program(shared: Any, nobody: Visitor, store: Store) -> None:
    nobody.open("/subscribe")
    nobody.press("/subscribe", email=ADA, kind="all", period="daily")
    nobody.open(last_link(store, ADA))
    nobody.send(urlsplit(last_link(store, ADA)).path, 200)
    path = unsubscribe_path(store)
    program = Visitor(shared, PUBLIC, "203.0.113.5")  # no cookie, no token, another origin
    body = {"List-Unsubscribe": "One-Click"}
    away = {"Origin": "https://mail.example", "Sec-Fetch-Site": "cross-site"}
    for wrong in (path[:-1], path + "x", "/unsubscribe/x", "/unsubscribe/" + quote("' OR 1=1")):
        assert program.client.post(wrong, data=body, headers=away).status_code == 400
    confirm = urlsplit(last_link(store, ADA)).path.rpartition("/")[2]
    # a link for one purpose serves no other
    assert program.client.post(f"/unsubscribe/{confirm}", data=body).status_code == 400
    assert len(subscribed(store)) == 1
    for _ in range(2):  # twice does no harm
        assert program.client.post(path, data=body, headers=away).status_code == 200
    assert subscribed(store) == []


def test_an_account_sees_and_ends_its_subscriptions(ada: Visitor, store: Store) -> None:
    for kind in ("all", "tag"):
        ada.open("/subscribe")
        assert ada.form("/subscribe").fields["email"] == ADA
        ada.press("/subscribe", kind=kind, tag="exits")
        ada.open(last_link(store, ADA))
        ada.send(urlsplit(last_link(store, ADA)).path, 200)
    html = ada.open("/account")
    assert "All papers, daily" in html and "tag “exits”, daily" in html
    ada.open(re.findall(r'href="(/unsubscribe/[^"]+)"', html)[0])
    ada.send(urlsplit(str(ada.page.url)).path, 200)
    assert len(subscribed(store)) == 1
    ada.open("/account/delete")
    ada.press("/account/delete")
    assert subscribed(store) == []


def test_a_subscription_is_checked(nobody: Visitor, store: Store) -> None:
    for changes in (
        {"email": "x"},
        {"period": "hourly"},
        {"kind": "everything"},
        {"kind": "wing", "wing": "none"},
        {"kind": "tag", "tag": ""},
        {"kind": "search", "search": ""},
        {"kind": "search", "search": "x" * 5000},
    ):
        nobody.open("/subscribe")
        answer = nobody.send("/subscribe", 400, **{"email": ADA, **changes})
        assert 'role="alert"' in answer.text
    assert rows(store, "subscriptions") == [] and rows(store, "outbox") == []
