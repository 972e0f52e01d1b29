from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_recipe import ROOT, SLUG, command, install

from pantarhei import cli, runs
from pantarhei.claims import Ledger
from pantarhei.papers import catalogue


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PANTARHEI_HOME", str(home))
    monkeypatch.delenv("PANTARHEI_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    install(home, monkeypatch)
    return home


@pytest.fixture
def call(capfd):
    """Call the command line in this process: exit code, standard output, standard error."""

    def invoke(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capfd.readouterr()

    return invoke


def pantarhei(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """Call the command line as a process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    full = [sys.executable, "-m", "pantarhei", *arguments]
    return subprocess.run(full, capture_output=True, text=True, env=environment, **options)


def test_the_version_is_printed(call):
    code, out, _ = call("--version")
    assert code == 0 and re.fullmatch(r"pantarhei \S+\n", out)


def test_light_commands_start_without_torch():
    program = (
        "import sys; from pantarhei.cli import main;"
        "codes = [main(a) for a in (['--help'], ['papers'], ['show', 'adapt'], ['report'])];"
        "heavy = {'torch', 'skimage', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules);"
        "sys.exit(f'{codes} {heavy}' if any(codes) or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_papers_lists_and_searches(call):
    code, out, _ = call("papers")
    assert code == 0 and all(card.slug in out and card.title in out for card in catalogue())
    code, out, _ = call("papers", "early", "exit", "--json")
    assert code == 0 and json.loads(out)[0]["slug"] == "rbqe"
    _, out, _ = call("papers", "--wing", "learning", "--json")
    assert {row["wing"] for row in json.loads(out)} == {"learning"}
    _, out, _ = call("papers", "--status", "runs", "--json")
    assert SLUG in {row["slug"] for row in json.loads(out)}
    code, out, _ = call("papers", "xyzzy")
    assert code == 0 and "No paper matches 'xyzzy'" in out


def test_show_tells_claims_settings_and_results(call):
    code, out, _ = call("show", SLUG)
    assert code == 0 and "Nothing measured here yet" in out
    assert call("run", SLUG, "--device", "cpu")[0] == 0
    _, out, _ = call("show", SLUG)
    for part in ("the value grows", ">= 1", "<= -1", "2 in Table 1", "widths", "0.25,1.0"):
        assert part in out
    assert f"pantarhei run {SLUG} --scale gpu" in out
    assert "Measured here" in out
    document = json.loads(call("show", SLUG, "--json")[1])
    assert document["status"] == "runs"
    assert document["claims"][1]["bound"] == {"quick": 10.0, "cpu": -1.0, "gpu": None}
    assert document["settings"]["cpu"]["steps"] == 6
    assert [row["id"] for row in document["measured"]] == ["grows", "small"]


def test_show_of_a_planned_paper_says_so_and_makes_no_ledger(call, place):
    code, out, _ = call("show", "adapt")
    assert code == 0 and "Planned" in out
    document = json.loads(call("show", "adapt", "--json")[1])
    assert document["status"] == "planned" and document["claims"] == []
    assert not (place / "ledger.sqlite").exists()


def test_run_prints_the_verdict_and_where_the_files_are(call):
    code, out, err = call("run", SLUG, "--out", "a folder", "--device", "cpu", "--seed", "3")
    assert code == 0
    assert "2 of 2 claims hold" in out and "yes" in out and "2 in Table 1" in out
    assert f"a folder{os.sep}claims.json" in out
    assert "holds" in err  # the log, while it ran


def test_a_claim_that_does_not_hold_is_exit_code_1(call):
    code, out, _ = call("run", SLUG, "--scale", "cpu", "--device", "cpu")
    assert code == 1 and "NO" in out and "1 of 2 claims hold" in out


def test_json_is_the_claims_file_and_nothing_else(call):
    code, out, _ = call("run", SLUG, "--out", "r", "--device", "cpu", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(Path("r/claims.json").read_text())
    code, again, _ = call("run", SLUG, "--out", "r", "--resume", "--json")
    assert (code, again) == (0, out)


def test_settings_reach_the_recipe_and_the_command(call):
    assert call("run", SLUG, "--device", "cpu", "--set", "steps=9", "--set", "mode=a b")[0] == 0
    (entry, _) = Ledger().latest(changed=True)
    assert entry.run.settings["steps"] == 9
    assert entry.run.overrides == {"steps": 9, "mode": "a b"}
    expected = f"pantarhei run {SLUG} --scale quick --seed 0 --set steps=9 --set 'mode=a b'"
    assert entry.run.command == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "stagd"], "Unknown paper 'stagd': .* Did you mean 'staged'?"),
        (["show", "rd_prune"], "Did you mean 'rd-prune'?"),
        (["show", "ünïcode-\u202e論文"], "Unknown paper 'ünïcode"),
        (["run", "../../etc/passwd"], "Unknown paper"),
        (["run", "adapt"], "'adapt' is planned and does not run yet; these run: .*staged"),
        (["run", SLUG, "--scale", "quik"], "no scale 'quik'.* Did you mean 'quick'?"),
        (["run", SLUG, "--scal", "quick"], "Unknown option '--scal'.* Did you mean '--scale'?"),
        (["runn", SLUG], "Did you mean 'run'?"),
        (["run"], "Missing argument"),
        (["run", SLUG, "--seed", "x"], "--seed"),
        (["run", SLUG, "--seed", "-1"], "Seed -1 is out of range"),
        (["run", SLUG, "--seed", "9" * 40], "out of range"),
        (["run", SLUG, "--device", "gpu"], "Device 'gpu' is unknown"),
        (["run", SLUG, "--set", "stepz=1"], "no setting 'stepz'.* Did you mean 'steps'?"),
        (["run", SLUG, "--set", "steps"], "--set takes KEY=VALUE, not 'steps'"),
        (["run", SLUG, "--set", "=1"], "--set takes KEY=VALUE"),
        (["run", SLUG, "--set", "steps=" + "9" * 5000], "'steps' is an integer, not '9999"),
        (["run", SLUG, "--set", "steps=1", "--set", "steps=2"], "names 'steps' twice"),
        (["run", SLUG, "--set", "rate=inf"], "must be finite"),
        (["run", SLUG, "--resume"], "No unfinished run"),
        (["run", SLUG, "--out", "/dev/null/r"], "cannot be made"),
        (["papers", "--wing", "learn"], "Unknown wing 'learn'.* Did you mean 'learning'?"),
        (["papers", "--status", "run"], "Unknown status 'run'.* Did you mean 'runs'?"),
        (["report", "--ledger", "nowhere"], "The ledger 'nowhere' does not exist"),
        (["report", "--out", "/dev/null/RESULTS.md"], "could not be written"),
        (["run", SLUG, "--set", "mode=refuse"], "This cannot be served: do something else."),
    ],
)
def test_a_wrong_request_is_one_sentence_and_exit_code_2(call, arguments, says):
    code, out, err = call(*arguments)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "")
    assert re.search(says, last)
    assert "Traceback" not in err and len(last) < 300


def test_a_folder_in_use_is_refused_in_one_sentence(call):
    from pantarhei.papers import load_recipe

    with runs.start(load_recipe(SLUG), out="r", device="cpu", quiet=True):
        code, _, err = call("run", SLUG, "--out", "r", "--device", "cpu")
    assert code == 2 and "being written by another run" in err and err.count("\n") == 1


def test_a_defect_is_neither_a_verdict_nor_a_wrong_request(call):
    code, _, err = call("run", SLUG, "--out", "r", "--device", "cpu", "--set", "mode=bug")
    assert code == 70 and "KeyError" in err and "defect of pantarhei" in err
    assert "Stopped: KeyError" in Path("r/log.txt").read_text()


def test_interrupted_says_how_to_continue_and_that_works(call):
    options = ("--out", "my run", "--device", "cpu")
    code, _, err = call("run", SLUG, *options, "--set", "mode=interrupt")
    assert code == 130
    expected = f"pantarhei run {SLUG} --scale quick --out 'my run' --resume"
    assert err.splitlines()[-1] == f"Interrupted; continue with: {expected}"


def test_control_c_in_a_real_process(place, tmp_path):
    worker = subprocess.Popen(
        command(place, "run", SLUG, "--out", "r", "--device", "cpu", "--set", "pause=20"),
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = tmp_path / "r/checkpoints/place.json"
    while not checkpoint.exists() and worker.poll() is None:
        time.sleep(0.02)
    worker.send_signal(signal.SIGINT)
    _, err = worker.communicate()
    assert worker.returncode == 130
    assert "--resume" in err.splitlines()[-1] and "Traceback" not in err


def test_a_corrupt_ledger_stops_a_run_before_it_starts(call, place):
    (place / "ledger.sqlite").write_bytes(b"garbage " * 1000)
    code, _, err = call("run", SLUG, "--out", "r")
    assert code == 2 and "ledger.sqlite' is damaged" in err and err.count("\n") == 1
    assert not Path("r").exists()
    assert (place / "ledger.sqlite").read_bytes() == b"garbage " * 1000


def test_a_user_without_a_home_is_told_what_to_set(call, monkeypatch):
    monkeypatch.delenv("PANTARHEI_HOME")
    monkeypatch.setattr("platformdirs.user_data_path", lambda name: Path("~/.local") / name)
    code, _, err = call("run", SLUG, "--device", "cpu")
    assert code == 2 and "set PANTARHEI_HOME" in err
    assert not Path("~").exists() and not Path("runs").exists()


def test_the_report_is_markdown_with_everything_that_tells_a_result(call):
    call("run", SLUG, "--device", "cpu", "--seed", "2")
    call("run", SLUG, "--device", "cpu", "--scale", "cpu")
    call("run", SLUG, "--device", "cpu", "--set", "steps=2")
    code, out, _ = call("report")
    assert code == 0
    title = next(card.title for card in catalogue() if card.slug == SLUG)
    assert f"## {SLUG}: {title}" in out and "3 of 4 measured claims hold" in out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    header = [cell.strip("| ") for cell in rows[0]]
    assert header == [
        *("scale", "claim", "the paper", "bound", "measured", "holds", "seed", "seconds"),
        *("date", "machine", "commit", "command"),
    ]
    assert all(len(row) == len(header) for row in rows)
    grows = dict(zip(header, (cell.strip("| ") for cell in rows[2]), strict=True))
    assert grows["scale"] == "quick" and grows["claim"] == "grows: the value grows"
    assert grows["the paper"] == "2 in Table 1" and grows["bound"] == "value >= 1"
    assert grows["holds"] == "yes" and grows["seed"] == "2"
    assert grows["command"] == f"`pantarhei run {SLUG} --scale quick --seed 2`"
    assert re.search(r"\| cpu \| small: .*\| \*\*no\*\* \|", out)
    changed = out.partition("## With settings changed")[2]
    assert changed.count("--set steps=2`") == 2

    code, message, _ = call("report", "--out", "RESULTS.md")
    assert (code, message) == (0, "Wrote RESULTS.md.\n")
    assert Path("RESULTS.md").read_text() == out
    ledger = str(Ledger().path)
    assert call("report", "--ledger", ledger)[1] == out


def test_an_empty_report_is_a_report(call):
    code, out, _ = call("report")
    assert code == 0 and "0 of 0 measured claims hold" in out


def test_a_pipe_in_a_claim_does_not_break_the_table(call):
    from test_claims import claim, info

    Ledger().add(info(), [claim(statement="a | b\nc")])
    assert r"a \| b c" in call("report")[1]


def test_data_lists_every_set(call):
    code, out, _ = call("data")
    assert code == 0 and "digits" in out and "comes with the installed packages" in out
    rows = json.loads(call("data", "--json")[1])
    assert {"mnist", "cifar10", "images_train"} <= {row["name"] for row in rows}


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "pantarhei", "papers"],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_ascii_terminal_gets_substitutes(place):
    done = pantarhei("show", "physical-ff", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "physical-ff ? learning" in done.stdout
