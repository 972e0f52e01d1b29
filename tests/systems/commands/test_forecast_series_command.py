"""pantarhei forecast-series: the user's tables, what is printed and written, what is refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from pantarhei.cli import app
from pantarhei.errors import RequestError


def run(*arguments):
    result = CliRunner().invoke(app, ["forecast-series", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def series(rng, length=90):
    """A tank: its level follows the valve with a lag; the valve is planned."""
    valve = np.repeat(rng.uniform(-1, 1, length // 5 + 1), 5)[:length]
    level = np.zeros(length)
    for t in range(1, length):
        level[t] = 0.85 * level[t - 1] + 0.6 * valve[t] + 0.05 * rng.normal()
    return level, valve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    for name in "abcd":
        level, valve = series(rng)
        with (path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["time", "level", "valve", "temperature", "note"])
            for t, row in enumerate(zip(level, valve, strict=True)):
                slow = f"{20 + rng.normal():.3f}" if t % 4 == 0 else ""
                writer.writerow([0.5 * t, f"{row[0]:.5f}", f"{row[1]:.5f}", slow, t % 3])
            for t in range(90, 95):  # the plan goes on
                writer.writerow([0.5 * t, "", "1.0", "", ""])
    return path


OPTIONS = ("--target", "level", "--control", "valve", "--ignore", "note", "--history", 3,
           "--horizon", 6, "--members", 3, "--epochs", 12)  # fmt: skip


def test_a_folder_of_runs_is_forecast_and_everything_is_written(folder, tmp_path, monkeypatch):
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: save(self, path, dpi=30))
    out = tmp_path / "new"
    printed = run(folder, *OPTIONS, "--test", "b", "--out", out, "--json")
    document = json.loads(printed)
    assert document["frame_in_seconds"] == 0.5 and document["target"] == "level"
    methods = {row["method"] for row in document["table"]}
    assert methods == {"persistence", "linear autoregression", "GRU", "ensemble"}
    skill = {(r["method"], r["seconds"]): r["skill"] for r in document["table"]}
    assert skill["persistence", 0.5] == 0 and skill["ensemble", 3] > 0.4
    assert skill["linear autoregression", 3] > 0.5
    names = {path.name for path in out.iterdir()}
    assert {"table.csv", "predictions.csv", "onwards.csv", "summary.json", "lead-times.png",
            "model", "forecast.svg", "calibration.png", "lead-times.csv"} <= names  # fmt: skip
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert {row["run"] for row in rows} == {"b"}
    inside = [float(r["low"]) <= float(r["came"]) <= float(r["high"]) for r in rows]
    assert 0.8 < np.mean(inside) <= 1
    for row in rows[:20]:
        parts = float(row["epistemic_sd"]) ** 2 + float(row["aleatoric_sd"]) ** 2
        assert float(row["sd"]) ** 2 == pytest.approx(parts, rel=1e-4)
    ahead = list(csv.DictReader((out / "onwards.csv").open()))
    assert {row["run"] for row in ahead} == set("abcd")
    assert [float(row["made_at"]) for row in ahead] == [44.5] * len(ahead)
    # the plan opens the valve wide, which the level follows
    end = {row["run"]: float(row["mean"]) for row in ahead if row["time"] == "47.5"}
    assert min(end.values()) > 1.0
    with pytest.raises(RequestError, match="there already"):
        run(folder, *OPTIONS, "--out", out)


def test_one_run_is_cut_in_time_and_runs_of_one_table_are_told_apart(folder, tmp_path):
    short = (*OPTIONS[:-4], "--members", 2, "--epochs", 2, "--no-gru")
    printed = run(folder / "a.csv", *short, "--lead", 2, "--lead", 1)
    assert "level" in printed and "persistence" in printed and "GRU" not in printed
    with pytest.raises(RequestError, match="one run only"):
        run(folder / "a.csv", *short, "--test", "a")
    rng = np.random.default_rng(1)
    lines = ["when,run,level,valve,note"]
    for name in ("x", "y"):
        lines += [
            f"2026-01-01T00:{t // 60:02d}:{t % 60:02d},{name},{a:.4f},{b:.4f},0"
            for t, (a, b) in enumerate(zip(*series(rng), strict=True))
        ]
    (tmp_path / "both.csv").write_text("\n".join(lines) + "\n")
    found = json.loads(
        run(tmp_path / "both.csv", *short, "--time", "when", "--run", "run", "--json")
    )
    assert found["frame_in_seconds"] == 1 and found["test_windows"] == 90 - 1 - 2 - 6


def test_a_fast_column_is_forecast_by_its_log_amplitude(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        size = np.repeat(rng.uniform(0.5, 3, 40), 100)
        np.savez(tmp_path / f"{name}.npz", p=size * rng.normal(size=4000), rate=1000.0)
    short = ("--history", 2, "--horizon", 2, "--members", 2, "--epochs", 2, "--no-gru", "--json")
    found = json.loads(run(tmp_path, "--target", "p", "--amplitude", "p", "--step", 0.05, *short))
    assert found["target"] == "log amplitude of p" and found["training_windows"] == 2 * 76


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--target", "levle"), "Did you mean 'level'"),
        (("--target", "level", "--control", "level"), "not known in advance"),
        (("--target", "level", "--step", 0.1), "shorter than 'level' is sampled"),
        (("--target", "level", "--amplitude", "level"), "give --step"),
        (("--target", "level", "--share", 1.5), "between 0 and 1"),
        (("--target", "level", "--test", "z"), "no run 'z'"),
        (("--target", "level", "--history", 500), "No window of 500 frames"),
        (("--target", "level", "--lead", 50), "beyond the windows' horizon"),
        (("--target", "level", "--time", "clock"), "no column 'clock'"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    folder, tmp_path, options, reason
):
    with pytest.raises(RequestError, match=reason) as caught:
        run(folder, *options, "--out", tmp_path / "none")
    assert "\n" not in str(caught.value) and not (tmp_path / "none").exists()
