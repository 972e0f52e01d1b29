"""The guard behind a real server, spoken to octet by octet."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from _serving import serving
from test_feed_security import application

from pantarhei.feed.web.security import BODY_BYTES, Site


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(application(Site("local"))) as address:
        yield int(address.rpartition(":")[2])


def say(port: int, *parts: bytes) -> tuple[int, bytes]:
    """Send octets; return the status and the whole answer, 0 where the server only hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        answer = b""
        try:
            for part in parts:
                line.sendall(part)
            while piece := line.recv(65536):
                answer += piece
        except (BrokenPipeError, ConnectionResetError):
            pass
    head = answer.split(b"\r\n", 1)[0].split()
    return (int(head[1]) if len(head) > 1 else 0), answer


HOST = b"Host: localhost\r\nConnection: close\r\n"
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"


def test_a_plain_request_is_answered(port: int) -> None:
    status, answer = say(port, b"GET /plain HTTP/1.1\r\n" + HOST + b"\r\n")
    assert status == 200 and answer.endswith(b"plain")
    assert b"content-security-policy" in answer.lower()


@pytest.mark.parametrize(
    ("head", "statuses"),
    [
        (b"GET /plain HTTP/1.1\r\n", {400, 421}),  # no Host
        (b"GET /plain HTTP/1.0\r\n", {400, 421}),
        (b"GET /plain HTTP/1.1\r\nHost: evil.example\r\n", {421}),
        (b"GET /plain HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n", {400, 421}),
        (b"GET http://evil.example/plain HTTP/1.1\r\nHost: evil.example\r\n", {400, 404, 421}),
        (b"GET /plain HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 20_000 + b"\r\n", {431}),
        (
            b"GET /plain HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 500_000 + b"\r\n",
            {0, 400, 431},
        ),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n", {400, 414}),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n", {400, 404}),
        (b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n", {404}),
        (b"GET /plain%0d%0aX:y HTTP/1.1\r\nHost: localhost\r\n", {404}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {0, 400}),  # TLS to a plain port
    ],
)
def test_odd_requests_are_refused(port: int, head: bytes, statuses: set[int]) -> None:
    status, answer = say(port, head + b"Connection: close\r\n\r\n")
    assert status in statuses, answer[:300]
    assert b"root:" not in answer and b"Traceback" not in answer


def test_a_large_body_is_not_waited_for(port: int) -> None:
    head = b"POST /said HTTP/1.1\r\n" + HOST + FORM
    status, _ = say(port, head + b"Content-Length: 1000000000\r\n\r\n", b"a=b")
    assert status == 413  # from what it says of itself, with nothing read
    piece = b"%x\r\n" % 8192 + b"x" * 8192 + b"\r\n"
    pieces = [piece] * (2 * BODY_BYTES // 8192)
    status, _ = say(port, head + b"Transfer-Encoding: chunked\r\n\r\n", *pieces)
    assert status in (0, 413)  # it may hang up while we still send
    both = (
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /plain HTTP/1.1\r\n"
    )
    status, answer = say(port, head + both + HOST + b"\r\n")
    assert status in (400, 403) and answer.count(b"HTTP/1.1 ") == 1  # no second request inside


def test_the_server_goes_on(port: int) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port)) as line:
            line.sendall(b"POST /said HTTP/1.1\r\n" + HOST + FORM + b"Content-Length: 99\r\n\r\na")
    assert say(port, b"GET /plain HTTP/1.1\r\n" + HOST + b"\r\n")[0] == 200
