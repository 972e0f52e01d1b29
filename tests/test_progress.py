from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pantarhei.progress import progress


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pantarhei.progress._SECONDS_BETWEEN_REDRAWS", 0.0)


def test_elsewhere_than_on_a_terminal_a_line_per_tenth(impatient, capsys):
    with progress(200, "work [a]") as bar:
        for i in range(200):
            bar.advance(note=f"loss {i}")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 10
    assert lines[4].startswith("work [a]: 100/200 (50 %), ")
    assert lines[4].endswith(" left, loss 99")
    assert "200/200 (100 %)" in lines[-1] and "left" not in lines[-1]


def test_what_was_done_before_does_not_count_towards_the_rate(impatient, capsys):
    with progress(100, "work", start=95) as bar:
        bar.advance(5)
        assert bar.done == 100
        elapsed_times_rate = bar.rate
    assert len(capsys.readouterr().err.splitlines()) == 1
    with progress(100, "work", quiet=True, start=95) as bar:
        assert bar.rate == 0 < elapsed_times_rate


def test_quiet_shows_nothing_and_still_counts(impatient, capsys):
    with progress(3, "work", quiet=True) as bar:
        bar.advance(2)
        bar.advance(1, note="x")
        bar.advance(0)
    assert (bar.done, bar.note) == (3, "x")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_even_inside_another():
    script = (
        "import pantarhei.progress as p\n"
        "with p.progress(2, 'outer [x]') as a, p.progress(2, 'inner') as b:\n"
        "    b.advance(2, note='loss 1'); a.advance(2)\n"
    )
    command = [sys.executable, "-c", script]
    env = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "outer [x]" in done.stderr and "2/2" in done.stderr and "loss 1" in done.stderr
    assert "\x1b[" in done.stderr
