"""Results go from one ledger to another as files, and nothing else gets in."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from pantarhei import cli
from pantarhei.claims import Claim, Ledger, RunInfo
from pantarhei.errors import RequestError
from pantarhei.records import export_records, import_records
from pantarhei.report import results_markdown


def run(uid, paper="rbqe", scale="quick", date="2026-01-01T00:00:00Z", **other):
    return RunInfo(uid, paper, scale, 0, "cpu", date, "pantarhei run", "/home/me", {"a": [1]},
                   commit="c" * 40, seconds=5.0, **other)  # fmt: skip


def claim(info, id="one", measured=0.5):
    return Claim(info.paper, id, "it holds", "x", "<=", 0.75, "0.7", measured,
                 measured <= 0.75, info.scale, info.seed, 3.0, "x.csv")  # fmt: skip


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "a" / "ledger.sqlite")
    old, new = run("u1"), run("u2", date="2026-01-02T00:00:00Z")
    made.add(old, [claim(old), claim(old, "two")])
    made.add(new, [claim(new, measured=math.nan)])
    other = run("u3", "sortednet", "cpu")
    made.add(other, [claim(other)])
    made.add(run("u4", overrides={"steps": 1}), [claim(run("u4"))])
    return made


def test_a_report_is_the_same_after_the_journey(ledger, tmp_path):
    files = export_records(ledger, tmp_path / "evidence")
    assert [f.name for f in files] == ["rbqe-quick.json", "rbqe-quick-2.json", "sortednet-cpu.json"]
    assert "/home/me" not in files[0].read_text()
    other = Ledger(tmp_path / "b" / "ledger.sqlite")
    assert import_records(other, tmp_path / "evidence") == 3
    assert import_records(other, tmp_path / "evidence") == 0
    # runs with changed settings are no evidence, and stay
    wanted = results_markdown(ledger).split("\n## With settings changed")[0].rstrip()
    assert results_markdown(other).rstrip() == wanted
    for ours, theirs in zip(ledger.latest(), other.latest(), strict=True):
        assert theirs.run == replace(ours.run, folder="")
        assert repr(theirs.claim) == repr(ours.claim)


def test_the_command_imports_reports_and_exports(ledger, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    export_records(ledger, "evidence")
    words = ["report", "--ledger", "new.sqlite", "--import", "evidence", "--export", "again"]
    assert cli.main(words) == 0
    assert "## sortednet" in capsys.readouterr().out
    for path in (tmp_path / "evidence").iterdir():
        assert path.read_text() == (tmp_path / "again" / path.name).read_text()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.update(format="other"), "not a record"),
        (lambda r: r.update(version=2), "newer"),
        (lambda r: r["run"].pop("uid"), "damaged"),
        (lambda r: r["run"].update(more=1), "damaged"),
        (lambda r: r["claims"][0].update(bound=None), "damaged"),
        (lambda r: r["claims"][0].pop("measured"), "damaged"),
    ],
)
def test_a_file_that_is_no_record_adds_nothing(ledger, tmp_path, change, sentence):
    files = export_records(ledger, tmp_path / "evidence")
    record = json.loads(files[-1].read_text())
    change(record)
    files[-1].write_text(json.dumps(record))
    other = Ledger(tmp_path / "b" / "ledger.sqlite")
    with pytest.raises(RequestError, match=sentence):
        import_records(other, tmp_path / "evidence")
    assert other.latest() == []
    with pytest.raises(RequestError, match="holds no records"):
        import_records(other, tmp_path / "nowhere")


def test_results_md_is_what_the_records_say(tmp_path):
    root = Path(__file__).resolve().parent.parent
    made = Ledger(tmp_path / "ledger.sqlite")
    assert import_records(made, root / "pantarhei/papers/evidence") > 0
    assert results_markdown(made) == (root / "RESULTS.md").read_text("utf-8")
