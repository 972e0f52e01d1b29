from __future__ import annotations

import gzip
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime
from email.utils import format_datetime

import httpx
import pytest
from arxiv_server import Arxiv, Reply

from pantarhei.errors import RequestError
from pantarhei.feed.sources.fetch import Fetcher, SourceError, Unreadable, address


class Clock:
    """Time that passes only in sleep."""

    def __init__(self) -> None:
        self.now, self.slept = 1_770_000_000.0, []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(round(seconds, 3))
        self.now += seconds


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Arxiv().running() as running:
        yield running


@pytest.fixture
def clock():
    return Clock()


def fetcher(tmp_path, clock, **more):
    return Fetcher(tmp_path / "lock", clock=clock, sleep=clock.sleep, **{"pause": 3.0} | more)


def ask(server, tmp_path, clock, read=bytes, **more):
    with fetcher(tmp_path, clock, **more) as f:
        return f.get(server.url + "/api/query", {"id_list": "0"}, read)


def ok(text: bytes = b"<a/>") -> Reply:
    return Reply(text)


def test_requests_are_three_seconds_apart_and_say_who_asks(server, tmp_path, clock):
    with fetcher(tmp_path, clock) as f:
        for _ in range(3):
            f.get(server.url + "/api/query", {"id_list": "x y&z"}, bytes)
            clock.now += 1
    assert clock.slept == [2.0, 2.0]
    assert server.requests == [{"id_list": "x y&z"}] * 3
    assert server.headers[0]["User-Agent"].startswith("pantarhei/")


def test_the_pause_holds_from_one_process_to_the_next(server, tmp_path, clock):
    for _ in range(2):
        ask(server, tmp_path, clock)
    assert clock.slept == [3.0]


def test_a_clock_that_was_set_back_stops_nobody(server, tmp_path, clock):
    ask(server, tmp_path, clock)
    clock.now -= 86_400
    ask(server, tmp_path, clock)
    assert clock.slept == [3.0]


def test_arxivs_own_hosts_never_get_less_than_the_pause(tmp_path, clock, monkeypatch):
    monkeypatch.setenv("PANTARHEI_ARXIV_PAUSE", "0")
    with Fetcher(tmp_path / "lock", clock=clock, sleep=clock.sleep) as f:
        for host, pause in (("mirror.example", 0), ("export.arxiv.org", 3), ("arxiv.org", 3)):
            clock.slept.clear()
            for _ in range(2):
                with f._turn(host):
                    pass
            assert sum(clock.slept) >= pause


def test_one_connection_at_a_time_over_threads(server, tmp_path, clock):
    threads = [threading.Thread(target=ask, args=(server, tmp_path, clock)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 6 and server.most == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_with_growing_pauses(server, tmp_path, clock, status):
    server.faults = [Reply(status=status)] * 3 + [ok()]
    said = []
    assert ask(server, tmp_path, clock, pause=0, say=said.append) == b"<a/>"
    assert clock.slept == [5, 10, 20]
    assert said[0] == f"127.0.0.1: HTTP status {status}; asking again in 5 s."


def test_retry_after_is_kept_to(server, tmp_path, clock):
    date = format_datetime(datetime.fromtimestamp(clock.now + 120 + 90, UTC), usegmt=True)
    server.faults = [
        Reply(status=503, headers={"Retry-After": "120"}),
        Reply(status=429, headers={"Retry-After": date}),
        Reply(status=503, headers={"Retry-After": "soon"}),
        ok(),
    ]
    ask(server, tmp_path, clock, pause=0)
    assert clock.slept == [120, 90, 20]


def test_a_server_that_asks_for_hours_is_left_alone(server, tmp_path, clock):
    server.faults = [Reply(status=503, headers={"Retry-After": "7200"})]
    with pytest.raises(SourceError, match="left alone for 120 minutes"):
        ask(server, tmp_path, clock)
    assert clock.slept == []


def test_after_the_last_try_the_fault_is_named(server, tmp_path, clock):
    server.faults = [Reply(status=503)] * 5
    with pytest.raises(SourceError, match=r"did not answer properly in 5 tries \(HTTP status 503"):
        ask(server, tmp_path, clock)
    assert len(server.requests) == 5


@pytest.mark.parametrize("status", [400, 403, 404, 410, 418])
def test_a_refusal_is_not_asked_again(server, tmp_path, clock, status):
    server.faults = [Reply(b"no", status=status, kind="text/html")]
    with pytest.raises(SourceError, match=f"refuses with HTTP status {status}"):
        ask(server, tmp_path, clock)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Reply(b"<html>", kind="text/html; charset=x"), "it sent text/html instead of XML"),
        (Reply(b"<a/>", kind=""), "something unnamed"),
        (Reply(b"<a>" * 99, cut=100), "its answer breaks off"),
        (Reply(gzip.compress(b"a" * 9999)[:-9], headers={"Content-Encoding": "gzip"}), "breaks"),
        (Reply(b"<a/>", headers={"Content-Encoding": "gzip"}), "its answer is damaged"),
        (Reply(b"<a/>", headers={"Content-Encoding": "br"}), "an encoding that was not asked for"),
        (Reply(b"<a/>" * 50, drip=0.02), "its answer took more than 0 s"),
    ],
)
def test_a_faulty_answer_is_asked_again(server, tmp_path, clock, fault, reason):
    server.faults = [fault, ok()]
    said = []
    assert ask(server, tmp_path, clock, deadline=0.2, say=said.append) == b"<a/>"
    assert reason in said[0]


def test_a_silent_server_is_given_up(server, tmp_path, clock):
    wait = threading.Event()
    server.before = lambda: wait.wait(10) and None
    said = []
    with pytest.raises(SourceError, match="it takes too long"):
        ask(server, tmp_path, clock, timeout=0.1, tries=2, say=said.append)
    wait.set()
    assert len(said) == 1


def test_content_that_cannot_be_read_is_asked_again(server, tmp_path, clock):
    server.faults = [ok(b"<b/>"), ok()]

    def read(data: bytes) -> bytes:
        if data == b"<b/>":
            raise Unreadable("no")
        return data

    assert ask(server, tmp_path, clock, read) == b"<a/>"


def test_gzip_is_unpacked(server, tmp_path, clock):
    server.faults = [Reply(gzip.compress(b"<a/>"), headers={"Content-Encoding": "gzip"})]
    assert ask(server, tmp_path, clock) == b"<a/>"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"a" * 1001),
        Reply(gzip.compress(b"a" * 50_000_000), headers={"Content-Encoding": "gzip"}),
    ],
    ids=["plain", "gzip"],
)
def test_an_answer_beyond_the_limit_is_refused(server, tmp_path, clock, reply):
    server.faults = [reply]
    with pytest.raises(SourceError, match="sent more than 1,000 bytes"):
        ask(server, tmp_path, clock, limit=1000)


def test_an_answer_at_the_limit_is_taken(server, tmp_path, clock):
    server.faults = [Reply(b"a" * 1000)]
    assert len(ask(server, tmp_path, clock, limit=1000)) == 1000


def test_redirections_stay_with_the_host_and_keep_the_pause(server, tmp_path, clock):
    server.faults = [Reply(status=301, headers={"Location": "/api/other?x=1"}), ok()]
    assert ask(server, tmp_path, clock) == b"<a/>"
    assert clock.slept == [3.0]
    assert server.requests[1] == {"x": "1"}


@pytest.mark.parametrize(
    "where", ["http://evil.example/", "file:///etc/passwd", "//evil.example/x", "ftp://127.0.0.1/"]
)
def test_a_redirection_elsewhere_is_refused(server, tmp_path, clock, where):
    server.faults = [Reply(status=302, headers={"Location": where})]
    with pytest.raises(SourceError, match="none of its own addresses"):
        ask(server, tmp_path, clock)


def test_a_circle_of_redirections_ends(server, tmp_path, clock):
    server.faults = [Reply(status=302, headers={"Location": "/api/query"})] * 8
    with pytest.raises(SourceError, match="redirected in circles"):
        ask(server, tmp_path, clock, tries=2)


def test_without_a_network_nothing_is_waited_for(tmp_path, clock):
    with fetcher(tmp_path, clock) as f, pytest.raises(SourceError, match="cannot be reached"):
        f.get("http://127.0.0.1:9/", {}, bytes)
    assert clock.slept == []


def test_a_network_that_fails_later_is_waited_for(server, tmp_path, clock, monkeypatch):
    said = []
    with fetcher(tmp_path, clock, say=said.append) as f:
        f.get(server.url, {"id_list": "0"}, bytes)
        real = f._client.stream
        failures = iter([httpx.ConnectError("gone")])

        def stream(*arguments, **options):
            for failure in failures:
                raise failure
            return real(*arguments, **options)

        monkeypatch.setattr(f._client, "stream", stream)
        f.get(server.url, {"id_list": "0"}, bytes)
    assert said == ["127.0.0.1: gone; asking again in 5 s."]


@pytest.mark.parametrize("value", ["ftp://x", "arxiv", "http://", "http://x/?q=1"])
def test_a_base_address_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("PANTARHEI_ARXIV_API", value)
    with pytest.raises(RequestError, match="PANTARHEI_ARXIV_API is an http"):
        address("PANTARHEI_ARXIV_API", "http://x")


@pytest.mark.parametrize("value", ["-1", "nan", "x", "1e9"])
def test_a_pause_that_is_none_is_refused(monkeypatch, tmp_path, value):
    monkeypatch.setenv("PANTARHEI_ARXIV_PAUSE", value)
    with pytest.raises(RequestError, match="PANTARHEI_ARXIV_PAUSE is a number of seconds"):
        Fetcher(tmp_path / "lock")


def test_importing_the_command_line_imports_no_http_client():
    program = "import sys, pantarhei.cli; sys.exit(str({'httpx', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.stderr.strip() == "set()"
