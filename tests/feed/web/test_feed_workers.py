"""Several processes at one address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def server() -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """A server that answers who it is, and its port."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("pid_server.py"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield int(process.stdout.readline()), process
    finally:
        process.kill()
        process.communicate()


def who(port: int) -> int:
    """Ask which process answers."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as asking:
        said = b""
        while part := asking.recv(100):
            said += part
    greeting, _, number = said.partition(b" ")
    assert greeting == b"hello"
    return int(number)


def test_connections_go_to_each_process_in_turn(server):
    port, process = server
    answered = [who(port) for _ in range(8)]
    assert len(set(answered)) == 2
    assert answered[::2] == [answered[0]] * 4 and answered[1::2] == [answered[1]] * 4
    assert process.pid not in answered


def test_a_process_that_was_killed_is_replaced(server):
    port, _ = server
    first, second = who(port), who(port)
    os.kill(first, signal.SIGKILL)
    while Path(f"/proc/{first}").exists() and "Z" not in status(first):
        time.sleep(0.02)
    answered = [who(port) for _ in range(4)]
    assert first not in answered and second in answered
    assert len(set(answered)) == 2


def status(process: int) -> str:
    """Return the state of a process, "" where it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_end_when_told_to(server, number):
    port, process = server
    answered = {who(port), who(port)}
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -number or "KeyboardInterrupt" in errors
    assert not [one for one in answered if status(one) not in ("", "Z")]


def test_they_end_when_who_handed_them_connections_is_killed(server):
    port, process = server
    answered = [who(port), who(port)]
    process.kill()
    process.wait()
    for _ in range(500):
        if all(status(one) in ("", "Z") for one in answered):
            break
        time.sleep(0.02)
    else:
        pytest.fail("a process went on without its parent")
