from __future__ import annotations

import csv
import errno
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_recipe import SLUG, command, install

from pantarhei import files, runs
from pantarhei.claims import ClaimSpec, Ledger
from pantarhei.errors import RequestError
from pantarhei.papers import load_recipe
from pantarhei.runs import Recipe, Run, execute, format_setting, parse_setting, read_result, start


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("PANTARHEI_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    install(home, monkeypatch)
    return load_recipe(SLUG)


def run_once(recipe: Recipe, ledger: Ledger | None = None, **options) -> runs.Result:
    with start(recipe, device="cpu", quiet=True, **options) as run:
        return execute(run, ledger)


def content(folder: Path) -> dict:
    """What a run measured, without the time it took."""
    document = json.loads((folder / "claims.json").read_text())
    assert document.pop("seconds") >= 0
    return document


# Settings


@given(
    st.one_of(
        st.booleans(),
        st.integers(-(2**62), 2**62),
        st.floats(allow_nan=False, allow_infinity=False),
        st.from_regex(r"[a-z0-9_./=-]{0,20}", fullmatch=True),
        st.lists(st.floats(0, 1), min_size=1).map(tuple),
    )
)
def test_a_setting_written_as_text_reads_as_itself(value):
    again = parse_setting("key", format_setting(value), value)
    assert again == value and type(again) is type(value)


@pytest.mark.parametrize(
    ("text", "default", "says"),
    [
        ("many", 5, "is an integer, not 'many'"),
        ("1.5", 5, "is an integer, not '1.5'"),
        ("9" * 5000, 5, "is an integer"),
        ("9" * 30, 5, "too large"),
        ("-" + "9" * 30, 5, "too large"),
        ("nan", 0.5, "must be finite"),
        ("1e999", 0.5, "must be finite"),
        ("", 0.5, "is a number, not ''"),
        ("maybe", True, "is true or false"),
        ("a\x1b[2Jb", "plain", "cannot be printed"),
        ("0.5,x", (0.25, 1.0), "is a number, not 'x'"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_short_sentence(text, default, says):
    with pytest.raises(RequestError, match=says) as caught:
        parse_setting("key", text, default)
    assert "'key'" in str(caught.value) and len(str(caught.value)) < 120


def test_settings_are_typed_by_the_recipe(recipe):
    settings = recipe.settings_at("cpu", {"steps": "9", "rate": "1", "on": "no", "widths": "1, 2"})
    assert settings.steps == 9 and settings.widths == (1.0, 2.0)
    assert settings.on is False and type(settings.rate) is float
    assert settings.mode == "plain"
    with pytest.raises(AttributeError, match="no setting 'stepz'"):
        _ = settings.stepz


@pytest.mark.parametrize(
    ("scale", "changes", "says"),
    [
        ("quik", {}, "has no scale 'quik': .* Did you mean 'quick'"),
        ("quick", {"step": 1}, "has no setting 'step': .* Did you mean 'steps'"),
        ("quick", {"steps": -1}, "never negative"),
        ("quick", {"widths": "0.5,-0.5"}, "never negative"),
    ],
)
def test_an_unknown_scale_or_setting_names_the_nearest(recipe, scale, changes, says):
    with pytest.raises(RequestError, match=says):
        recipe.settings_at(scale, changes)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quick": {"a": 1}, "cpu": {"b": 1}},
        {"quick": {"a": 1}, "cpu": {"a": 1.0}},
        {"tiny": {"a": 1}},
    ],
)
def test_a_recipe_with_unequal_settings_is_a_defect(settings):
    with pytest.raises(ValueError, match="recipe 'x'"):
        Recipe("x", (), settings, lambda run: iter(()))


def test_a_recipe_that_repeats_a_claim_is_a_defect():
    spec = ClaimSpec("same", "", "q", "<=", 1.0)
    with pytest.raises(ValueError, match="repeats a claim"):
        Recipe("x", (spec, spec), {"quick": {}}, lambda run: iter(()))


# The folder


def test_a_run_leaves_everything_that_is_promised(recipe, tmp_path):
    ledger = Ledger()
    result = run_once(recipe, ledger, out=tmp_path / "a folder", seed=3)
    assert result.dir == tmp_path / "a folder"
    document = content(result.dir)
    assert list(document) == ["paper", "scale", "seed", "device", "versions", "claims"]
    assert (document["paper"], document["scale"], document["seed"]) == (SLUG, "quick", 3)
    assert [row["id"] for row in document["claims"]] == ["grows", "small"]  # far: not at quick
    assert (result.dir / "seed").read_text() == "3\n"
    config = json.loads((result.dir / "config.json").read_text())
    assert config["settings"]["steps"] == 4 and config["overrides"] == {}
    assert (result.dir / "checkpoints" / "place.json").exists()
    with (result.dir / "values.csv").open() as lines:
        assert float(next(csv.DictReader(lines))["value"]) == result.claims[0].measured
    log = (result.dir / "log.txt").read_text().splitlines()
    for line in log:
        time.strptime(line.split()[0], "%Y-%m-%dT%H:%M:%SZ")
    assert any("far: value" in line and "not a claim" in line for line in log)
    assert not list(result.dir.rglob(".tmp-*"))
    assert [entry.claim.id for entry in ledger.latest()] == ["grows", "small"]
    assert ledger.latest()[0].run.command == f"pantarhei run {SLUG} --scale quick --seed 3"


def test_the_seed_decides_and_the_folder_does_not(recipe, tmp_path):
    first, second, other = (
        run_once(recipe, out=tmp_path / name, seed=seed).claims[0].measured
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second != other


def test_without_a_name_each_run_gets_a_folder_of_its_own(recipe, tmp_path):
    folders = {run_once(recipe).dir for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.parent == Path("runs") for folder in folders)
    assert all(folder.name.startswith(f"{SLUG}-quick-2") for folder in folders)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**40])
def test_an_absurd_seed_is_refused_before_anything_is_written(recipe, tmp_path, seed):
    with pytest.raises(RequestError, match=r"Seed .* out of range"):
        start(recipe, seed=seed, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_device_that_is_not_there_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RequestError, match="Device 'cuda' is not there"):
        start(recipe, device="cuda", out=tmp_path / "r")
    with pytest.raises(RequestError, match="Device 'gpu' is unknown"):
        start(recipe, device="gpu", out=tmp_path / "r")


def test_a_folder_that_holds_something_is_never_written(recipe, tmp_path):
    finished = run_once(recipe, out=tmp_path / "finished").dir
    before = (finished / "claims.json").read_bytes()
    with pytest.raises(RequestError, match="holds a finished run already: add --resume"):
        start(recipe, out=finished)
    assert (finished / "claims.json").read_bytes() == before

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(RequestError, match="files that are not a run"):
            start(recipe, out=other, resume=resume)
    assert [path.name for path in other.iterdir()] == ["chapter.tex"]

    with pytest.raises(RequestError, match="is a file"):
        start(recipe, out=other / "chapter.tex")
    with pytest.raises(RequestError, match="cannot be made"):
        start(recipe, out=other / "chapter.tex" / "below")
    with pytest.raises(RequestError, match="cannot be made"):
        start(recipe, out=tmp_path / ("x" * 300))


def test_a_read_only_folder_is_one_sentence(recipe, tmp_path, monkeypatch):
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)  # not chmod: root may write anywhere
    with pytest.raises(RequestError, match=r"cannot be written \(Read-only file system\)"):
        start(recipe, out=tmp_path / "r")


def test_two_runs_never_share_a_folder(recipe, tmp_path):
    with start(recipe, out=tmp_path / "r", quiet=True):
        for resume in (False, True):
            with pytest.raises(RequestError, match="being written by another run"):
                start(recipe, out=tmp_path / "r", resume=resume)
    with start(recipe, out=tmp_path / "r", resume=True, quiet=True) as run:
        assert run.resume


# Resuming


def test_resuming_takes_seed_and_settings_from_the_run(recipe, tmp_path):
    start(recipe, out="r", seed=5, changes={"steps": 7}, quiet=True).__exit__()
    result = run_once(recipe, out="r", resume=True)
    whole = run_once(recipe, out="whole", seed=5, changes={"steps": 7})
    assert content(result.dir) == content(whole.dir)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 6}, "seed 6 is asked for and 5 is there"),
        ({"scale": "cpu"}, "scale cpu is asked for and quick is there"),
        ({"changes": {"steps": 8}}, "with steps=7: it cannot resume with steps=8"),
    ],
)
def test_another_run_cannot_be_resumed_in_a_folder(recipe, tmp_path, options, says):
    start(recipe, out="r", seed=5, changes={"steps": 7}, quiet=True).__exit__()
    before = (tmp_path / "r" / "config.json").read_bytes()
    with pytest.raises(RequestError, match=says):
        start(recipe, out="r", resume=True, **options)
    assert (tmp_path / "r" / "config.json").read_bytes() == before
    start(recipe, out="r", resume=True, seed=5, changes={"steps": 7}, quiet=True).__exit__()


def test_a_finished_run_is_read_and_not_repeated(recipe, tmp_path):
    ledger = Ledger()
    first = run_once(recipe, out="r")  # killed before the ledger was told
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*")}
    for _ in range(2):
        again = run_once(recipe, ledger, out="r", resume=True)
        assert again.document == first.document
    assert len(ledger.latest()) == 2
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*")} == written


def test_without_a_name_the_newest_unfinished_run_is_resumed(recipe, tmp_path):
    def folder(name: str, date: str, **options) -> Path:
        with start(recipe, out=f"runs/{name}", quiet=True, **options) as run:
            config = json.loads((run.dir / "config.json").read_text()) | {"date": date}
            files.write_json(run.dir / "config.json", config)
            return run.dir

    with pytest.raises(RequestError, match="No unfinished run"):
        start(recipe, resume=True)
    old = folder("old", "2026-01-01T00:00:00Z")
    new = folder("new", "2026-02-01T00:00:00Z")
    folder("larger", "2026-03-01T00:00:00Z", scale="cpu")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.json").write_text("{")
    with start(recipe, resume=True, quiet=True) as held:
        assert held.dir == new
        with start(recipe, resume=True, quiet=True) as other:  # the newest is busy
            assert other.dir == old
    assert run_once(recipe, resume=True).dir == new
    assert run_once(recipe, resume=True).dir == old
    with pytest.raises(RequestError, match="No unfinished run"):
        start(recipe, resume=True)


def test_a_missing_folder_or_a_corrupt_configuration_cannot_be_resumed(recipe, tmp_path):
    with pytest.raises(RequestError, match="no run to resume"):
        start(recipe, out="nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "r").mkdir()
    for text, says in (("{", "not readable JSON"), ('{"paper": 1}', "not a run's configuration")):
        (tmp_path / "r" / "config.json").write_text(text)
        with pytest.raises(RequestError, match=says):
            start(recipe, out="r", resume=True)


def test_a_killed_run_resumes_to_the_same_result(recipe, tmp_path):
    arguments = ("run", SLUG, "--out", "killed", "--device", "cpu", "--seed", "4")
    slow = ("--set", "pause=0.04", "--set", "steps=30")
    worker = subprocess.Popen(command(tmp_path / "home", *arguments, *slow))
    place = tmp_path / "killed" / "checkpoints" / "place.json"
    while not place.exists() and worker.poll() is None:
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "claims.json").exists()
    assert 0 < json.loads(place.read_text())["step"] < 30

    resumed = run_once(recipe, out="killed", resume=True)
    changes = {"steps": 30, "pause": 0.04}
    whole = run_once(recipe, out="whole", seed=4, changes=changes)
    assert content(resumed.dir) == content(whole.dir)
    assert json.loads(place.read_text())["began"] == 2  # it did not begin again
    assert resumed.document["seconds"] >= 30 * 0.04  # the killed session's time counts


# Verdicts


def test_a_claim_that_was_not_measured_does_not_hold(recipe):
    result = run_once(recipe, changes={"mode": "forget"})
    assert not result.holds
    assert [(c.id, c.holds, c.evidence) for c in result.claims][1] == (
        "small",
        False,
        "not measured",
    )
    assert content(result.dir)["claims"][1]["measured"] is None


def test_nan_does_not_hold_and_is_null(recipe):
    result = run_once(recipe, changes={"mode": "nan"})
    assert not result.holds and math.isnan(result.claims[1].measured)
    assert read_result(result.dir).document == result.document


def test_a_claim_measured_twice_or_unknown_is_a_defect(recipe, tmp_path):
    def twice(run: Run):
        yield run.claim("grows", 1)
        yield run.claim("grows", 2)

    def unknown(run: Run):
        yield run.claim("grow", 1)

    for story, says in ((twice, "'grows' twice"), (unknown, "no claim 'grow'")):
        wrong = Recipe(SLUG, recipe.claims, recipe.settings, story)
        with pytest.raises(ValueError, match=says):
            run_once(wrong)


def test_a_tensor_of_one_number_is_a_measurement(recipe, tmp_path):
    with start(recipe, out="r", quiet=True) as run:
        assert run.claim("grows", torch.tensor(2.0)).measured == 2.0
        assert run.claim("grows", np.float32(0.5)).holds is False


def test_the_same_random_numbers_come_in_every_run(recipe):
    seen = []

    def story(run: Run):
        seen.append((torch.rand(2).tolist(), np.random.rand()))
        yield run.claim("grows", 1)

    for seed in (1, 1, 2):
        run_once(Recipe(SLUG, recipe.claims, recipe.settings, story), seed=seed)
    assert seen[0] == seen[1] != seen[2]


# Trouble


def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(recipe, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with start(recipe, out="r", quiet=True) as run:
        with monkeypatch.context() as disk:
            disk.setattr(os, "replace", full)
            with pytest.raises(RequestError, match=r"No space left.*free some space"):
                execute(run)
        assert not (tmp_path / "r" / "claims.json").exists()
        assert not list((tmp_path / "r").rglob(".tmp-*"))
    assert run_once(recipe, out="r", resume=True).holds


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "big.bin"), "'big.bin' could not be"),
        (MemoryError(), "memory did not suffice"),
        (torch.OutOfMemoryError("CUDA out of memory"), "memory did not suffice"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(recipe, error, says):
    def story(run: Run):
        raise error
        yield

    with pytest.raises(RequestError, match=says):
        run_once(Recipe(SLUG, recipe.claims, recipe.settings, story))


def test_a_damaged_result_is_named(tmp_path):
    (tmp_path / "claims.json").write_text('{"paper": "x"}')
    with pytest.raises(RequestError, match="not a run's claims"):
        read_result(tmp_path)


# The recipe's tools


def test_metrics_have_every_column_in_order_of_arrival(recipe):
    with start(recipe, out="r", quiet=True) as run:
        path = run.metrics("table", [{"b": 1, "a": "x,\ny"}, {"a": 2, "c": None}])
        assert path.name == "table.csv"
        with path.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
    assert rows == [{"b": "1", "a": "x,\ny", "c": ""}, {"b": "", "a": "2", "c": ""}]


def test_a_figure_is_png_and_svg_and_the_same_each_time(recipe):
    from matplotlib.figure import Figure

    def draw(run: Run, name: str) -> tuple[bytes, bytes]:
        figure = Figure()
        figure.subplots().plot([1, 2, 3])
        png = run.figure(name, figure)
        return png.read_bytes(), png.with_suffix(".svg").read_bytes()

    with start(recipe, out="r", quiet=True) as run:
        png, svg = draw(run, "plots/one.png")
        assert png.startswith(b"\x89PNG") and b"<svg" in svg
        assert draw(run, "plots/one") == (png, svg)
        assert sorted(p.name for p in (run.dir / "plots").iterdir()) == ["one.png", "one.svg"]


def test_a_name_cannot_leave_the_folder(recipe):
    with start(recipe, out="r", quiet=True) as run:
        for name in ("../x", "/etc/x", "checkpoints/../../x"):
            with pytest.raises(ValueError, match="outside the run"):
                run.path(name)


def test_a_log_line_is_one_line_and_is_shown_unless_quiet(recipe, capsys):
    with start(recipe, out="r", quiet=True) as run:
        run.log("two\nlines")
        run.quiet = False
        run.log("shown")
        assert run.dir.joinpath("log.txt").read_text().splitlines()[-2].endswith("Z two lines")
    assert capsys.readouterr().err == "shown\n"


def test_under_torchrun_only_the_first_process_writes(recipe, tmp_path, monkeypatch):
    with start(recipe, out="r", quiet=True):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with pytest.raises(RequestError, match="--out"):
            start(recipe)
        before = sorted(p.name for p in (tmp_path / "r").iterdir())
        with start(recipe, out="r", device="cpu") as follower:
            follower.log("nothing")
            follower.metrics("nothing", [{"a": 1}])
            assert follower.settings.steps == 4 and not follower.leads
        assert sorted(p.name for p in (tmp_path / "r").iterdir()) == before
