"""The outbox against a real mail server process: faults, several senders, kill -9."""

from __future__ import annotations

import email
import os
import signal
import socket
import subprocess
import sys
import threading
from email import policy
from pathlib import Path

import pytest
import sqlalchemy as sa

pytest.importorskip("aiosmtpd", reason="needs `pip install 'pantarhei[dev]'`")

from _mail_server import Server, certificate

from pantarhei.feed import mail, outbox, schema
from pantarhei.feed.mail import Letterhead, Settings
from pantarhei.feed.outbox import Outbox, Sender, Sent
from pantarhei.feed.store import Store

HEAD = Letterhead("https://papers.example.org", "secret")


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "mail")
    yield made
    made.stop()


@pytest.fixture
def plain(server) -> Settings:
    return settings_of(server)


def settings_of(server: Server, **changes) -> Settings:
    given = {"host": "localhost", "sender": HEAD.sender, "port": server.port, "tls": "none"}
    return Settings(**given | {"timeout": 20, "patience": 20} | changes)


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1_770_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def box(store, clock) -> Outbox:
    return Outbox(store, clock)


def queue(box: Outbox, *names: str) -> None:
    with box.store.write() as c:
        for name in names:
            to = f"{name}@example.org"
            made = mail.message(HEAD, to, f"For {name}", f"Hello {name}\n.\n", "<p>Hello</p>")
            assert box.put(c, f"test/{name}", to, made)


def rows(box: Outbox) -> dict[str, sa.Row]:
    with box.store.read() as c:
        found = c.execute(sa.select(schema.outbox).order_by(schema.outbox.c.id)).all()
    return {row.recipient.partition("@")[0]: row for row in found}


def read(message: dict) -> email.message.EmailMessage:
    return email.message_from_string(message["content"], policy=policy.default)


def test_a_message_is_sent_once_and_whole(box, server, plain):
    queue(box, "ada", "ben")
    assert box.send_due(plain) == Sent(sent=2)
    assert box.send_due(plain) == Sent()
    assert server.count() == {"ada@example.org": 1, "ben@example.org": 1}
    first = read(server.taken[0])
    assert server.taken[0]["from"] == "noreply@papers.example.org"
    assert first["to"] == "ada@example.org" and first["subject"] == "For ada"
    assert first["auto-submitted"] == "auto-generated"
    assert first.get_content_type() == "multipart/alternative"
    kinds = [part.get_content_type() for part in first.iter_parts()]
    assert kinds == ["text/plain", "text/html"]
    text = first.get_body(("plain",)).get_content()
    assert text.splitlines() == ["Hello ada", "."], "a line with a lone dot survives"
    row = rows(box)["ada"]
    assert row.sent is not None and row.leased is None
    assert row.message == b"", "a message that was sent, with its links, is not kept"


def test_a_key_is_queued_once_and_gives_the_message_id(box, store):
    made = mail.message(HEAD, "ada@example.org", "s", "t", "h")
    with store.write() as c:
        assert box.put(c, "digest/1/2026-01-31", "ada@example.org", made)
        first = made["Message-ID"]
        assert not box.put(c, "digest/1/2026-01-31", "ada@example.org", made)
        assert made["Message-ID"] == first
        assert box.put(c, "digest/1/2026-02-01", "ada@example.org", made)
        assert made["Message-ID"] != first
    assert box.waiting() == 2


def test_a_transaction_that_fails_queues_nothing(box, store):
    with pytest.raises(ZeroDivisionError), store.write() as c:
        box.put(c, "k", "ada@example.org", mail.message(HEAD, "ada@example.org", "s", "t", "h"))
        raise ZeroDivisionError
    assert box.waiting() == 0


def test_what_a_person_waits_for_goes_before_digests(box, server, plain):
    with box.store.write() as c:
        for number, unsubscribe in enumerate(["https://x.example/u", "https://x.example/u", None]):
            to = f"n{number}@example.org"
            made = mail.message(HEAD, to, "s", "t", "h", unsubscribe=unsubscribe)
            box.put(c, f"k/{number}", to, made)
    box.send_due(plain)
    assert [m["to"][:2] for m in server.taken] == ["n2", "n0", "n1"]


def test_a_refused_connection_puts_everything_off_with_growing_delays(box, clock):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = Settings("localhost", HEAD.sender, unused.getsockname()[1], tls="none", timeout=5)
    queue(box, "ada", "ben")
    waits = []
    for attempt in range(1, outbox.ATTEMPTS):
        done = box.send_due(nobody)
        assert (done.sent, done.deferred, done.failed) == (0, 2, 0) and "refused" in done.trouble
        assert box.send_due(nobody) == Sent(), "nothing is due before its time"
        found = rows(box)
        assert {row.attempts for row in found.values()} == {attempt}
        assert found["ada"].due == found["ben"].due
        waits.append(found["ada"].due - clock.now)
        clock.now = found["ada"].due
    assert waits[:4] == [60, 120, 240, 480] and waits[-1] == 8 * 3600
    assert 4 * 86400 < sum(waits) + 8 * 3600 < 5 * 86400
    assert box.send_due(nobody).failed == 2
    assert box.waiting() == 0 and all(row.message == b"" for row in rows(box).values())


def test_a_server_that_comes_back_gets_what_waited(box, clock, tmp_path):
    first = Server(tmp_path / "a")
    port = first.port
    first.stop()
    queue(box, "ada")
    assert box.send_due(settings_of(first)).deferred == 1
    second = Server(tmp_path / "b", port=port)
    try:
        clock.now += 60
        assert box.send_due(settings_of(second)).sent == 1
        assert second.count() == {"ada@example.org": 1}
    finally:
        second.stop()


@pytest.mark.parametrize("at", ["rcpt", "data"])
def test_a_4xx_puts_one_message_off(box, server, plain, clock, at):
    server.faults({"at": at, "who": "ben@example.org", "answer": "451 greylisted", "times": 2})
    queue(box, "ada", "ben", "cyd")
    assert box.send_due(plain) == Sent(sent=2, deferred=1)
    row = rows(box)["ben"]
    assert row.due == clock.now + 60 and row.error == "451 greylisted" and row.leased is None
    clock.now += 60
    assert box.send_due(plain) == Sent(deferred=1)
    assert rows(box)["ben"].due == clock.now + 120
    clock.now += 120
    assert box.send_due(plain) == Sent(sent=1)
    assert set(server.count().values()) == {1}


@pytest.mark.parametrize("at", ["rcpt", "data"])
def test_a_5xx_gives_one_message_up(box, server, plain, clock, at):
    server.faults({"at": at, "who": "ben@example.org", "answer": "550 5.1.1 nobody here"})
    queue(box, "ada", "ben", "cyd")
    assert box.send_due(plain) == Sent(sent=2, failed=1)
    row = rows(box)["ben"]
    assert row.failed == clock.now and row.error == "550 5.1.1 nobody here"
    clock.now += 1e6
    assert box.send_due(plain) == Sent()
    assert server.count() == {"ada@example.org": 1, "cyd@example.org": 1}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"at": "mail", "answer": "550 5.7.1 sender refused"}, "550 5.7.1 sender refused"),
        ({"at": "rcpt", "answer": "421 too busy"}, "421 too busy"),
        ({"at": "connect", "drop": True}, ""),
    ],
)
def test_a_server_in_trouble_puts_everything_off(box, server, plain, clock, fault, said):
    server.faults(fault)
    queue(box, "ada", "ben")
    done = box.send_due(plain)
    assert (done.sent, done.deferred, done.failed) == (0, 2, 0) and said in done.trouble
    clock.now += 60
    assert box.send_due(plain) == Sent(sent=2)
    assert set(server.count().values()) == {1}


@pytest.mark.parametrize("at", ["rcpt", "data"])
def test_a_dropped_connection_puts_one_message_off(box, server, plain, clock, at):
    server.faults({"at": at, "who": "ada@example.org", "drop": True})
    queue(box, "ada", "ben")
    assert box.send_due(plain) == Sent(sent=1, deferred=1)
    clock.now += 60
    assert box.send_due(plain) == Sent(sent=1)
    assert server.count() == {"ada@example.org": 1, "ben@example.org": 1}


def test_a_server_that_keeps_dropping_is_left_alone(box, server, plain):
    server.faults({"at": "data", "drop": True, "times": 100})
    queue(box, *"abcdef")
    done = box.send_due(plain)
    assert (done.sent, done.deferred) == (0, 3) and done.trouble


def test_taken_but_never_answered_is_sent_again_with_the_same_id(box, server, plain, clock):
    """What SMTP leaves open: the server took the message and its answer never came."""
    server.faults({"at": "taken", "drop": True})
    queue(box, "ada")
    assert box.send_due(plain) == Sent(deferred=1)
    clock.now += 60
    assert box.send_due(plain) == Sent(sent=1)
    first, second = (read(m) for m in server.taken)
    assert first["message-id"] == second["message-id"]
    assert server.taken[0]["content"] == server.taken[1]["content"]


def test_a_slow_server_is_waited_for_and_its_message_kept_from_others(store, server, monkeypatch):
    monkeypatch.setattr(outbox, "LEASE", 1.0)
    server.faults({"at": "data", "slow": 4})
    mine, other = Outbox(store), Outbox(store)
    queue(mine, "ada")
    done: list[Sent] = []
    thread = threading.Thread(target=lambda: done.append(mine.send_due(settings_of(server))))
    thread.start()
    while rows(mine)["ada"].leased is None:
        threading.Event().wait(0.01)
    while thread.is_alive():  # the lease is prolonged four times over: nobody else gets it
        assert other.send_due(settings_of(server)) == Sent()
        thread.join(0.2)
    assert done == [Sent(sent=1)] and server.count() == {"ada@example.org": 1}


def test_a_server_that_is_too_slow_is_left(box, server, clock):
    server.faults({"at": "rcpt", "slow": 5})
    queue(box, "ada")
    assert box.send_due(settings_of(server, timeout=0.5)).deferred == 1
    clock.now += 60
    assert box.send_due(settings_of(server)).sent == 1


def test_a_lease_that_was_lost_sends_nothing(box, server, plain, clock, monkeypatch):
    """A process that slept through its lease asks before the content goes out."""
    queue(box, "ada")
    begin = mail.Connection._begin

    def sleepy(self, smtp, recipient):
        begin(self, smtp, recipient)
        monkeypatch.setattr(mail.Connection, "_begin", begin)
        clock.now += outbox.LEASE + 1
        assert Outbox(box.store, clock).send_due(plain) == Sent(sent=1)

    monkeypatch.setattr(mail.Connection, "_begin", sleepy)
    assert box.send_due(plain) == Sent()
    assert server.count() == {"ada@example.org": 1}


class TestEncrypted:
    @pytest.fixture(scope="class")
    def certified(self, tmp_path_factory) -> Path:
        return certificate(tmp_path_factory.mktemp("certificate"))

    @pytest.fixture
    def secure(self, tmp_path, certified):
        made = Server(tmp_path / "secure", certificate=certified)
        yield made
        made.stop()

    @pytest.fixture
    def trusted(self, certified, monkeypatch):
        monkeypatch.setenv("SSL_CERT_FILE", str(certified))

    def test_starttls_and_login(self, box, secure, trusted):
        queue(box, "ada")
        changes = {"tls": "starttls", "user": "me", "password": "right"}
        assert box.send_due(settings_of(secure, **changes)) == Sent(sent=1)
        assert secure.taken[0]["tls"] and secure.taken[0]["user"] == "me"

    def test_tls_from_the_first_octet(self, box, certified, trusted, tmp_path):
        implicit = Server(tmp_path / "implicit", certificate=certified, tls=True)
        try:
            queue(box, "ada")
            changes = {"tls": "tls", "user": "me", "password": "right"}
            assert box.send_due(settings_of(implicit, **changes)) == Sent(sent=1)
            assert implicit.taken[0]["tls"] and implicit.taken[0]["user"] == "me"
        finally:
            implicit.stop()

    def test_a_wrong_password_waits_for_a_better_one(self, box, secure, trusted, clock):
        queue(box, "ada")
        changes = {"tls": "starttls", "user": "me", "password": "wrong"}
        done = box.send_due(settings_of(secure, **changes))
        assert done.deferred == 1 and "535" in done.trouble and "wrong" not in done.trouble
        clock.now += 60
        assert box.send_due(settings_of(secure, **changes | {"password": "right"})).sent == 1

    def test_an_unknown_certificate_gets_nothing(self, box, secure):
        queue(box, "ada")
        done = box.send_due(settings_of(secure, tls="starttls"))
        assert done.deferred == 1 and "CERTIFICATE_VERIFY_FAILED" in done.trouble
        assert not secure.taken

    def test_another_hosts_certificate_gets_nothing(self, box, secure, trusted):
        queue(box, "ada")
        with pytest.MonkeyPatch.context() as patch:
            real = socket.create_connection
            there = ("127.0.0.1", secure.port)
            patch.setattr(socket, "create_connection", lambda _, *rest: real(there, *rest))
            done = box.send_due(settings_of(secure, host="mail.example.org", tls="starttls"))
        assert done.deferred == 1 and not secure.taken

    def test_starttls_that_is_missing_is_not_done_without(self, box, server, trusted):
        queue(box, "ada")
        done = box.send_due(settings_of(server, tls="starttls", user="me", password="right"))
        assert done.deferred == 1 and "offers no STARTTLS" in done.trouble
        assert not server.taken


def test_many_processes_send_each_message_once(store, server, tmp_path):
    names = [f"n{number}" for number in range(60)]
    queue(Outbox(store), *names)
    senders = [sending(store, server) for _ in range(4)]
    assert [process.wait(120) for process in senders] == [0] * 4
    assert server.count() == {f"{name}@example.org": 1 for name in names}


_SENDING = """
import os, signal, sys
from pantarhei.feed import mail, outbox
from pantarhei.feed.store import Store

url, port, place = sys.argv[1:]
outbox.LEASE = 1.0

def killed(owner, name, *, after=False, turn=3):
    real, calls = getattr(owner, name), []
    def call(*arguments, **options):
        calls.append(1)
        if len(calls) == turn and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **options)
        if len(calls) == turn:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

import smtplib
if place == "leased": killed(outbox.Outbox, "_lease", after=True)
if place == "connecting": killed(mail.Connection, "_ready")
if place == "mail": killed(smtplib.SMTP, "mail", after=True)
if place == "rcpt": killed(smtplib.SMTP, "rcpt", after=True)
if place == "asked": killed(outbox.Outbox, "_update", after=True, turn=5)  # before DATA
if place == "half": # in the middle of the content
    real = smtplib.SMTP.data
    calls = []
    def half(self, content):
        calls.append(1)
        if len(calls) < 3:
            return real(self, content)
        self.putcmd("data"); self.getreply()
        self.sock.sendall(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    smtplib.SMTP.data = half
if place == "taken": killed(smtplib.SMTP, "data", after=True)  # the window
if place == "written": killed(outbox.Outbox, "_done", after=True)

settings = mail.Settings("localhost", "noreply@papers.example.org", int(port), tls="none")
box = outbox.Outbox(Store(url))
while box.waiting():
    box.send_due(settings)
"""


def sending(store: Store, server: Server, place: str = "") -> subprocess.Popen:
    """Start a process that sends until nothing waits; it kills itself at ``place``."""
    url = store._readers.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", _SENDING, url, str(server.port), place]
    root = str(Path(outbox.__file__).parents[2])
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})


@pytest.mark.parametrize(
    "place", ["leased", "connecting", "mail", "rcpt", "asked", "half", "taken", "written"]
)
def test_kill_9_neither_loses_nor_doubles(store, server, place):
    names = [f"n{number}" for number in range(5)]
    queue(Outbox(store), *names)
    assert sending(store, server, place).wait(60) == -signal.SIGKILL
    assert 2 <= len(server.taken) <= 3
    assert sending(store, server).wait(60) == 0
    count = server.count()
    doubled = {name for name, times in count.items() if times > 1}
    assert set(count) == {f"{name}@example.org" for name in names}
    # Between the server's 250 and our commit, and there alone, a message can come twice:
    assert doubled == ({"n2@example.org"} if place == "taken" else set())
    same = [m["content"] for m in server.taken if m["to"] in doubled]
    assert len(set(same)) <= 1, "and then it is the same message, with the same Message-ID"


def test_kill_9_at_any_moment(store, server, tmp_path):
    """Killed again and again while it sends: at most the message in hand comes twice."""
    names = [f"n{number}" for number in range(80)]
    queue(Outbox(store), *names)
    server.faults({"at": "rcpt", "slow": 0.03, "times": 10**6})
    kills = 0
    for wait in (1.2, 1.25, 1.31, 1.37, 1.42, 1.48):
        process = sending(store, server)
        before = len(server.taken)
        while len(server.taken) == before and process.poll() is None:
            threading.Event().wait(0.01)
        try:
            process.wait(wait - 1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    server.faults()
    assert kills >= 4, "the processes were killed while they had something to send"
    assert sending(store, server).wait(120) == 0
    count = server.count()
    assert set(count) == {f"{name}@example.org" for name in names}, "nothing is lost"
    doubled = {name for name, times in count.items() if times > 1}
    assert len(doubled) <= kills and max(count.values()) <= 2
    for name in doubled:
        assert len({read(m)["message-id"] for m in server.taken if m["to"] == name}) == 1


def test_a_sender_sends_in_the_background(store, server, plain):
    box = Outbox(store)
    sender = Sender(store, plain, seconds=60)
    sender.start()
    sender.start()
    try:
        queue(box, "ada")
        sender.wake()
        for _ in range(200):
            if not box.waiting():
                break
            threading.Event().wait(0.05)
        assert server.count() == {"ada@example.org": 1}
    finally:
        sender.stop()
    queue(box, "ben")
    assert box.waiting() == 1, "a sender that was stopped sends nothing"


def test_old_rows_are_forgotten(box, server, plain, clock):
    queue(box, "ada")
    box.send_due(plain)
    clock.now += 80 * 86400
    box.send_due(plain)
    assert set(rows(box)) == {"ada"}
    clock.now += 11 * 86400
    box.send_due(plain)
    assert not rows(box)
