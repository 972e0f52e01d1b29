from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pantarhei import claims
from pantarhei.claims import Claim, ClaimSpec, Ledger, RunInfo
from pantarhei.errors import RequestError

SPEC = ClaimSpec("fewer-macs", "mean MACs fall", "macs_ratio", "<=", 0.75, paper_value="0.87")


def info(uid: str = "u", **changes) -> RunInfo:
    record = RunInfo(
        uid, "rbqe", "quick", 0, "cpu", "2026-01-01T00:00:00Z", "pantarhei run rbqe", "/r", {"a": 1}
    )
    return replace(record, **changes)


def claim(measured: float = 0.5, **changes) -> Claim:
    made = Claim(
        paper="rbqe",
        id=SPEC.id,
        statement=SPEC.statement,
        quantity=SPEC.quantity,
        direction="<=",
        bound=0.75,
        paper_value=SPEC.paper_value,
        measured=measured,
        holds=SPEC.holds(measured, "quick"),
        scale="quick",
        seed=0,
        seconds=1.5,
        evidence="frontier.csv",
    )
    return replace(made, **changes)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False), st.booleans())
def test_a_claim_holds_exactly_when_its_inequality_does(bound, measured, at_most):
    spec = ClaimSpec("c", "", "q", "<=" if at_most else ">=", bound)
    expected = measured <= bound if at_most else measured >= bound
    assert spec.holds(measured, "cpu") is (expected and math.isfinite(measured))


def test_nan_never_holds_and_a_scale_left_out_makes_no_claim():
    spec = ClaimSpec("c", "", "q", ">=", {"cpu": 1.0})
    assert not spec.holds(math.nan, "cpu")
    assert spec.bound_at("quick") is None
    assert not spec.holds(5.0, "quick")


@pytest.mark.parametrize(
    "wrong", [{"direction": "<"}, {"bound": {"tiny": 1.0}}, {"bound": math.nan}]
)
def test_a_malformed_claim_cannot_be_written(wrong):
    with pytest.raises(ValueError, match="claim 'c'"):
        ClaimSpec(
            **{"id": "c", "statement": "", "quantity": "q", "direction": "<=", "bound": 1.0} | wrong
        )


@pytest.mark.parametrize("measured", [0.5, math.nan, math.inf])
def test_a_claim_survives_json_that_any_reader_accepts(measured):
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(json.dumps(claim(measured).to_json()), parse_constant=refuse)
    assert list(row) == [
        *("id", "statement", "quantity", "direction", "bound", "paper_value"),
        *("measured", "holds", "evidence"),
    ]
    again = Claim.from_json(row, paper="rbqe", scale="quick", seed=0, seconds=1.5)
    if math.isfinite(measured):
        assert again == claim(measured)
    else:
        assert math.isnan(again.measured) and not again.holds


def test_the_ledger_returns_what_it_was_given(tmp_path):
    ledger = Ledger(tmp_path / "new folder" / "ledger.sqlite")
    run = info(seconds=12.5, commit=None, settings={"lr": 0.1, "widths": [1, 2], "on": True})
    assert ledger.add(run, [claim(), claim(id="other", measured=math.nan, holds=False)])
    first, second = Ledger(ledger.path).latest()
    assert first.run == run
    assert first.claim == claim()
    assert second.claim.id == "other" and math.isnan(second.claim.measured)
    assert set(first.run.versions) == {"python", "torch", "pantarhei"}
    assert {"cpu", "cores", "device"} <= set(first.run.machine)


def test_the_newest_result_wins_per_paper_scale_and_claim(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(info("new", date="2026-03-01T00:00:00Z"), [claim(0.6)])
    ledger.add(info("old", date="2026-02-01T00:00:00Z"), [claim(0.7), claim(id="gone")])
    ledger.add(info("cpu", scale="cpu"), [claim(0.3, scale="cpu")])
    ledger.add(info("first", paper="adapt"), [claim(0.1, paper="adapt")])
    found = [(e.run.paper, e.run.scale, e.claim.id, e.claim.measured) for e in ledger.latest()]
    assert found == [
        ("adapt", "quick", "fewer-macs", 0.1),
        ("rbqe", "quick", "fewer-macs", 0.6),
        ("rbqe", "quick", "gone", 0.5),
        ("rbqe", "cpu", "fewer-macs", 0.3),
    ]
    assert [e.run.uid for e in ledger.latest(scale="cpu")] == ["cpu"]
    assert [e.run.uid for e in ledger.latest(paper="adapt")] == ["first"]


def test_changed_settings_do_not_stand_in_for_the_recipes_own(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.add(info("own"), [claim(0.5)])
    ledger.add(info("set", date="2027-01-01T00:00:00Z", overrides={"lr": 1}), [claim(0.9)])
    assert [e.run.uid for e in ledger.latest()] == ["own"]
    assert [e.run.uid for e in ledger.latest(changed=True)] == ["set"]


def test_a_run_is_kept_once(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    assert ledger.add(info(), [claim()])
    assert not ledger.add(info(), [claim(0.9)])
    assert [e.claim.measured for e in ledger.latest()] == [0.5]


def test_two_processes_add_to_a_new_ledger_at_once(tmp_path):
    here = Path(__file__).parent
    program = f"""
import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]
from test_claims import info, claim; from pantarhei.claims import Ledger
for n in range(15):
    name = f"{{sys.argv[2]}}-{{n}}"
    Ledger(sys.argv[1]).add(info(name), [claim(id=name)])
"""
    path = tmp_path / "ledger.sqlite"
    arguments = [[sys.executable, "-c", program, str(path), name] for name in "ab"]
    workers = [subprocess.Popen(a, stderr=subprocess.PIPE, text=True) for a in arguments]
    assert [(w.communicate()[1], w.returncode) for w in workers] == [("", 0), ("", 0)]
    assert len(Ledger(path).latest()) == 30


@pytest.mark.parametrize("content", [b"not a database at all " * 100, b"\0" * 5000])
def test_a_corrupt_ledger_is_named_and_left_alone(tmp_path, content):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"ledger\.sqlite' is damaged .*PANTARHEI_HOME"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_ledger_damaged_inside_is_named(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).add(info(), [claim()])
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(bytes(content))
    with pytest.raises(RequestError, match="is damaged"):
        Ledger(path).latest()


def test_another_programs_database_is_refused_untouched(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RequestError, match="database of another program"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_newer_ledger_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    script = 'ALTER TABLE runs ADD COLUMN remark TEXT DEFAULT "none"'
    with monkeypatch.context() as later:
        later.setattr(claims, "_MIGRATIONS", (*claims._MIGRATIONS, script))
        Ledger(path)
    with pytest.raises(RequestError, match="newer pantarhei"):
        Ledger(path)


def test_an_older_ledger_is_migrated_with_its_content(tmp_path, monkeypatch):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).add(info(), [claim()])
    script = "ALTER TABLE runs ADD COLUMN remark TEXT DEFAULT 'none'"
    monkeypatch.setattr(claims, "_MIGRATIONS", (*claims._MIGRATIONS, script))
    assert [e.claim for e in Ledger(path).latest()] == [claim()]
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT remark FROM runs").fetchall() == [("none",)]
    connection.close()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="set PANTARHEI_HOME"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


def test_home_moves_with_the_variable_and_must_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("PANTARHEI_HOME", str(tmp_path))
    assert claims.ledger_path() == tmp_path / "ledger.sqlite"
    monkeypatch.delenv("PANTARHEI_HOME")
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: Path("~/.local/share") / name)
    with pytest.raises(RequestError, match="set PANTARHEI_HOME"):
        claims.ledger_path()


def test_the_commit_is_that_of_a_checkout_and_tells_of_changes(tmp_path, monkeypatch):
    module = tmp_path / "checkout" / "pantarhei" / "claims.py"
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(claims, "__file__", str(module))
    find = claims.this_commit.__wrapped__
    assert find() is None

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        subprocess.run(
            ["git", "-C", module.parent.parent, *who, *arguments], check=True, capture_output=True
        )

    git("init")
    assert find() is None  # no commit yet
    git("add", ".")
    git("commit", "-m", "first")
    commit = find()
    assert commit is not None and len(commit) == 40
    (module.parent.parent / "RESULTS.md").write_text("not the library")
    assert find() == commit
    module.write_text("changed")
    assert find() == f"{commit}-modified"
