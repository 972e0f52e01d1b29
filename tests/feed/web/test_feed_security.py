"""The guard, before an application of a few lines: nothing here knows of papers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.testclient import TestClient

from pantarhei.errors import RequestError
from pantarhei.feed.web import security
from pantarhei.feed.web.security import (
    Guard,
    Limit,
    Limiter,
    Site,
    address_block,
    client_address,
    local_path,
    networks,
    web_address,
)

SECRET = b"s" * 32
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def application(site: Site) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Guard, site=site)

    @app.get("/form")
    def form(request: Request) -> HTMLResponse:
        return HTMLResponse(request.state.asked.token)

    @app.get("/plain")
    def plain() -> PlainTextResponse:
        return PlainTextResponse("plain")

    @app.post("/said")
    async def said(request: Request) -> dict[str, Any]:
        # the body can be read again by those who do not know that the guard has
        return {"guard": request.state.asked.form, "again": dict(await request.form())}

    @app.post("/unsubscribe/{token}")
    def unsubscribe(token: str) -> str:
        return token

    @app.get("/who")
    def who(request: Request) -> str:
        return request.state.asked.address

    return app


def client(site: Site, base: str = "http://localhost", peer: str = "127.0.0.1") -> TestClient:
    return TestClient(application(site), base_url=base, client=(peer, 5000))


@pytest.fixture
def local() -> Iterator[TestClient]:
    with client(Site("local", secret=SECRET)) as opened:
        yield opened


@pytest.fixture
def shared() -> Iterator[TestClient]:
    site = Site("shared", "https://papers.example", SECRET)
    with client(site, "https://papers.example", "198.51.100.1") as opened:
        yield opened


def test_every_answer_carries_the_headers_errors_included(local: TestClient) -> None:
    for path in ("/plain", "/none"):
        headers = local.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "private, no-cache"
        assert headers["vary"] == "Cookie"
    refused = local.get("/plain", headers={"Host": "evil.example"})
    assert refused.status_code == 421 and "content-security-policy" in refused.headers
    assert "strict-transport-security" not in refused.headers


def test_tls_is_insisted_on_where_the_page_has_it(shared: TestClient) -> None:
    assert shared.get("/plain").headers["strict-transport-security"] == "max-age=31536000"


@pytest.mark.parametrize(
    ("mode", "host", "known"),
    [
        ("local", "localhost:8000", True),
        ("local", "127.0.0.1:8000", True),
        ("local", "[::1]:8000", True),
        ("local", "127.9.9.9", True),
        ("local", "evil.example", False),  # DNS rebinding
        ("local", "evil.example:8000", False),
        ("local", "localhost.evil.example", False),
        ("local", "localhost@evil.example", False),
        ("local", "192.168.1.7", False),
        ("local", "papers.example", False),
        ("local", "", False),
        ("local", "local host", False),
        ("local", "localhost/x", False),
        ("reading", "192.168.1.7:8000", True),
        ("reading", "papers.example", True),
        ("reading", "evil.example", False),
        ("shared", "papers.example", True),
        ("shared", "PAPERS.example", True),
        ("shared", "papers.example:81", False),
        ("shared", "localhost", False),
    ],
)
def test_only_our_own_names_are_answered(mode: Any, host: str, known: bool) -> None:
    assert Site(mode, "https://papers.example").knows(host) is known
    assert Site("local").knows("evil.example") is False


def test_a_local_page_behind_a_proxy_is_refused(local: TestClient) -> None:
    answer = local.get("/plain", headers={"X-Forwarded-For": "198.51.100.1"})
    assert answer.status_code == 403 and "--shared" in answer.text


@pytest.mark.parametrize(
    "url",
    ["papers.example", "ftp://papers.example", "https://papers.example/sub", "https://a b", "//x"],
)
def test_a_public_address_is_checked_at_the_start(url: str) -> None:
    with pytest.raises(RequestError, match="no address for the page"):
        Site("shared", url)
    with pytest.raises(RequestError, match="PANTARHEI_URL"):
        Site("shared")
    with pytest.raises(RequestError, match="no mode"):
        Site("open")  # type: ignore[arg-type]


def test_a_form_with_its_token_is_taken(local: TestClient) -> None:
    token = local.get("/form").text
    assert local.get("/form").text == token  # a page that is unchanged looks unchanged
    answer = local.post("/said", data={"csrf": token, "a": "ä\r\nb"})
    assert answer.status_code == 200
    assert answer.json()["guard"]["a"] == "ä\nb"
    assert answer.json()["again"]["a"] == "ä\r\nb"
    by_header = local.post("/said", data={"a": "1"}, headers={"X-CSRF-Token": token})
    assert by_header.status_code == 200


def test_a_form_without_its_token_is_refused(local: TestClient) -> None:
    token = local.get("/form").text
    for data in ({}, {"csrf": ""}, {"csrf": token[:-1]}, {"csrf": "ü"}, {"csrf": token.upper()}):
        assert local.post("/said", data=data).status_code == 403
    with client(Site("local", secret=SECRET)) as other:
        foreign = other.get("/form").text
        assert foreign != token
        assert local.post("/said", data={"csrf": foreign}).status_code == 403
    local.cookies.clear()
    assert local.post("/said", data={"csrf": token}).status_code == 403


def test_tokens_belong_to_one_session_and_one_installation(shared: TestClient) -> None:
    site = Site("shared", "https://papers.example", SECRET)
    shared.cookies.set("__Host-session", "mine")
    token = shared.get("/form").text
    assert token == site.token("mine", "")
    assert "set-cookie" not in shared.get("/form").headers  # the session is enough
    assert shared.post("/said", data={"csrf": token}).status_code == 200
    for wrong in (
        site.token("theirs", ""),
        site.token(None, "mine"),  # a form of nobody's is no form of a session's
        Site("shared", "https://papers.example", b"t" * 32).token("mine", ""),
    ):
        assert shared.post("/said", data={"csrf": wrong}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://papers.example"},  # not over TLS
        {"Origin": "https://papers.example.evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},  # a neighbour's host may be somebody else's
    ],
)
def test_a_form_of_another_site_is_refused_even_with_the_token(
    shared: TestClient, headers: dict[str, str]
) -> None:
    data = {"csrf": shared.get("/form").text}
    assert shared.post("/said", data=data).status_code == 200
    ours = {"Origin": "https://papers.example", "Sec-Fetch-Site": "same-origin"}
    assert shared.post("/said", data=data, headers=ours).status_code == 200
    assert shared.post("/said", data=data, headers=headers).status_code == 403


def test_every_method_that_writes_is_checked(local: TestClient) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "MERGE"):
        assert local.request(method, "/said").status_code == 403
    assert local.get("/said").status_code == 405


def test_one_click_needs_no_cookie_and_no_token(shared: TestClient) -> None:
    body = {"List-Unsubscribe": "One-Click"}
    away = {"Origin": "https://mail.example", "Sec-Fetch-Site": "cross-site"}
    assert shared.post("/unsubscribe/abc", data=body, headers=away).status_code == 200
    assert shared.post("/unsubscribe/../said", data=body).status_code in (403, 404)


def test_nothing_is_written_in_reading_mode() -> None:
    with client(Site("reading", secret=SECRET), "http://192.168.1.7:8000") as reader:
        token = reader.get("/form").text
        answer = reader.post("/said", data={"csrf": token})
        assert answer.status_code == 403 and "read but not written" in answer.text


def test_cookies_are_out_of_reach(shared: TestClient, local: TestClient) -> None:
    cookie = shared.get("/form").headers["set-cookie"]
    assert cookie.startswith("__Host-form=")
    for flag in ("HttpOnly", "Secure", "SameSite=lax", "Path=/"):
        assert flag in cookie
    assert "Domain" not in cookie
    plain = local.get("/form").headers["set-cookie"]
    assert plain.startswith("pantarhei_form=") and "Secure" not in plain and "HttpOnly" in plain
    assert "set-cookie" not in local.get("/plain").headers  # no cookie without a form


def test_what_is_too_large_is_refused(local: TestClient) -> None:
    csrf = local.get("/form").text
    fits = {"csrf": csrf, "a": "x" * (security.BODY_BYTES - 200)}
    assert local.post("/said", data=fits).status_code == 200
    assert local.post("/said", data=fits | {"b": "x" * 200}).status_code == 413
    for length in ("99999999999999999999999999", "-1", "1e3", "x"):
        answer = local.post("/said", content=b"a=b", headers=FORM | {"Content-Length": length})
        assert answer.status_code == 413
    assert local.get("/plain", headers={"X": "x" * security.HEADER_BYTES}).status_code == 431
    many = [(f"X-{n}", "x") for n in range(security.HEADER_LINES)]
    assert local.get("/plain", headers=many).status_code == 431
    assert local.get("/plain?q=" + "x" * security.TARGET_BYTES).status_code == 414
    assert local.get("/" + "x" * security.TARGET_BYTES).status_code == 414
    fields = {"csrf": csrf} | {f"f{n}": "" for n in range(security.FIELDS)}
    assert local.post("/said", data=fields).status_code == 400


def test_a_body_in_pieces_is_counted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "BODY_SECONDS", 0.05)
    started: list[int] = []

    async def sent(pieces: list[Any]) -> int:
        async def receive() -> Any:
            if not pieces:
                await asyncio.sleep(60)  # whoever sends a byte a minute
            return pieces.pop(0)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                started.append(message["status"])

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/said",
            "raw_path": b"/said",
            "query_string": b"",
            "scheme": "http",
            "headers": [(b"host", b"localhost"), (b"content-type", b"text/plain")],
            "client": ("127.0.0.1", 1),
        }
        await Guard(application(Site("local")), Site("local"))(scope, receive, send)
        return started[-1]

    piece = {"type": "http.request", "body": b"x" * 60_000, "more_body": True}
    assert asyncio.run(sent([dict(piece), dict(piece)])) == 413
    assert asyncio.run(sent([dict(piece)])) == 408
    assert asyncio.run(sent([{"type": "http.disconnect"}])) == 400


def test_what_is_no_form_is_refused(local: TestClient) -> None:
    csrf = {"X-CSRF-Token": local.get("/form").text}
    assert local.post("/said", json={}, headers=csrf).status_code == 415
    assert local.post("/said", files={"a": b"x"}, headers=csrf).status_code == 415
    for body in (b"a=%00", b"a=%1b", b"a=%ff", b"a=%ed%a0%80", b"a=\xc3\xa4", b"%00=a"):
        answer = local.post("/said", content=body, headers=FORM | csrf)
        assert answer.status_code == 400, body
    for target in ("/plain%00", "/plain?q=%00"):
        assert local.get(target).status_code == 400


def test_websockets_are_closed(local: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), local.websocket_connect("/plain"):
        pass


def test_refusals_are_answered_as_the_application_answers_errors() -> None:
    from starlette.exceptions import HTTPException

    app = application(Site("local"))

    @app.exception_handler(HTTPException)
    async def page(request: Request, error: HTTPException) -> HTMLResponse:
        return HTMLResponse(f"<h1>{error.detail}</h1>", error.status_code, error.headers)

    with TestClient(app, base_url="http://evil.example") as visitor:
        answer = visitor.get("/plain")
        assert answer.status_code == 421 and answer.text.startswith("<h1>This page")


# --------------------------------------------------------------------------------------- limits


def limited(clock: Clock, **options: Any) -> Site:
    limits = {"read": Limit(3, 60), "write": Limit(2, 60), "comment": Limit(1, 60)}
    return Site(
        "shared", "http://papers.example", SECRET, limits=limits, limiter=Limiter(clock), **options
    )


def test_an_address_that_asks_too_often_waits() -> None:
    clock = Clock()
    site = limited(clock)
    app = application(site)
    with (
        TestClient(app, base_url="http://papers.example", client=("198.51.100.1", 1)) as one,
        TestClient(app, base_url="http://papers.example", client=("198.51.100.2", 1)) as two,
    ):
        assert [one.get("/plain").status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = one.get("/plain")
        assert refused.headers["retry-after"] == "20" and "try again in 20 s" in refused.text
        assert two.get("/plain").status_code == 200
        clock.now = 20.0
        assert [one.get("/plain").status_code for _ in range(2)] == [200, 429]
        # what is refused for another reason counts as well, or tokens could be guessed at will
        assert [two.post("/said").status_code for _ in range(3)] == [403, 403, 429]


def test_an_account_has_a_limit_of_its_own() -> None:
    from starlette.exceptions import HTTPException

    clock = Clock()
    site = limited(clock)
    site.within("comment", "7")
    site.within("comment", "8")
    with pytest.raises(HTTPException) as refused:
        site.within("comment", "7")
    assert refused.value.status_code == 429
    clock.now = 60.0
    site.within("comment", "7")


def test_the_person_on_their_own_machine_is_not_limited() -> None:
    once = Limit(1, 60)
    with client(Site("local", limits={"read": once, "write": once})) as alone:
        assert {alone.get("/plain").status_code for _ in range(9)} == {200}


def test_forwarded_addresses_are_believed_from_known_proxies_only() -> None:
    header = {"X-Forwarded-For": "6.6.6.6, 198.51.100.7"}
    with client(limited(Clock()), "http://papers.example", "127.0.0.1") as alone:
        assert alone.get("/who", headers=header).json() == "127.0.0.1"
    site = limited(Clock(), proxies=networks(["127.0.0.1", "10.0.0.0/8"]))
    with client(site, "http://papers.example", "127.0.0.1") as behind:
        assert behind.get("/who", headers=header).json() == "198.51.100.7"
        with pytest.raises(RequestError, match="no address of a proxy"):
            networks(["proxy.example"])
    known = networks(["127.0.0.1", "10.0.0.0/8"])
    assert client_address("127.0.0.1", ["198.51.100.7, 10.1.2.3"], known) == "198.51.100.7"
    assert client_address("::ffff:127.0.0.1", ["198.51.100.7"], known) == "198.51.100.7"
    assert client_address("127.0.0.1", ["6.6.6.6, <script>"], known) == "127.0.0.1"
    assert client_address("127.0.0.1", ["6.6.6.6", "7.7.7.7"], known) == "7.7.7.7"
    assert client_address("5.5.5.5", ["6.6.6.6"], known) == "5.5.5.5"
    assert client_address("127.0.0.1", [], known) == "127.0.0.1"


def test_a_household_of_ipv6_counts_as_one() -> None:
    assert address_block("2001:db8:1:2::1") == address_block("2001:db8:1:2:ffff::9")
    assert address_block("2001:db8:1:2::1") != address_block("2001:db8:1:3::1")
    assert address_block("::ffff:198.51.100.7") == "198.51.100.7"
    assert address_block("testclient") == "testclient"


def test_the_limiter_forgets_the_longest_unused_and_never_runs_backwards() -> None:
    clock = Clock()
    limiter = Limiter(clock, capacity=2)
    limit = Limit(1, 10)
    assert limiter.wait("a", limit) == 0 and limiter.wait("a", limit) == pytest.approx(10)
    assert limiter.wait("b", limit) == 0 and limiter.wait("c", limit) == 0  # "a" is let go
    assert limiter.wait("a", limit) == 0
    clock.now = -100.0
    assert limiter.wait("a", limit) == pytest.approx(10)


# -------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "///evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "/\n/evil.example",
        "/ok\r\nSet-Cookie: a=b",
        "/ok%0d%0aSet-Cookie:%20a=b",
        "/%09/evil.example",
        "/%2fevil.example",
        "/%5cevil.example",
        "/%252fevil.example",
        "/a//evil.example",
        "/..//evil.example",
        "/../etc/passwd",
        "/%2e%2e/x",
        "/./x",
        "https://evil.example",
        "https:evil.example",
        "http:/\\evil.example",
        "javascript:alert(1)",
        "JaVaScRiPt:alert(1)",
        "data:text/html,x",
        "evil.example",
        "@evil.example",
        " /ok",
        "/ok\x00",
        "/\u2028",
        "?next=/",
        "",
        "/" + "x" * 2001,
        None,
    ],
)
def test_no_redirect_leaves_the_page(target: str | None) -> None:
    assert local_path(target) == "/"


@pytest.mark.parametrize(
    "target",
    ["/", "/paper/rbqe", "/search?q=a+b&wing=compute", "/paper/x?u=https://y//z#c", "/tags/größe"],
)
def test_paths_of_the_page_are_kept(target: str) -> None:
    assert local_path(target) == target


@pytest.mark.parametrize(
    "text",
    [
        "javascript:alert(1)",
        "java\nscript:alert(1)",
        " https://x",
        "//x",
        "https:/x",
        "https:x",
        "ftp://x",
        "data:text/html,x",
        "https://x\\y",
        "https://[x",
        "",
        None,
    ],
)
def test_only_addresses_of_the_web_become_links(text: str | None) -> None:
    assert web_address(text) is None
