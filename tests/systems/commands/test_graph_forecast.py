"""pantarhei graph-forecast: a user's list of events in, tables and a forecaster out."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pantarhei.errors import RequestError
from pantarhei.systems.commands.graph import app

QUICK = ("--epochs", 2, "--hidden", 6, "--head-hidden", 8, "--window", 2, "--against", "gcn")


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Thirty people; the first five call whom they called before, every day."""
    rng = np.random.default_rng(0)
    lines = ["caller,called,at,mood"]
    for day in range(30):
        for u in range(5):
            lines += [f"n{u},n{(7 * u + k) % 30},{day + 0.1 + k / 10},good" for k in (7, 9)]
        for _ in range(12):
            u, v = rng.choice(30, 2, replace=False)
            lines.append(f"n{u},n{v},{day + 0.5},{rng.choice(['good', 'bad'])}")
    path = tmp_path_factory.mktemp("calls") / "calls.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


COLUMNS = ("--source", "caller", "--target", 1, "--time", "at", "--label", "mood")


@pytest.fixture(scope="module")
def folder(calls, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "calls"
    run("train", calls, *COLUMNS, "--bin", 1, *QUICK, "--top", 15, "--out", out)
    return out


def test_training_leaves_tables_predictions_and_a_forecaster(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "table.csv", "training.csv", "snapshots.csv", "next.csv", "summary.json",
        "forecaster.json", "forecaster.safetensors",
    }  # fmt: skip
    table = {row["model"]: row for row in rows_of(folder / "table.csv")}
    assert list(table) == [
        "evolvegcn-h", "gcn", "edgebank", "last snapshot", "preferential attachment",
    ]  # fmt: skip
    assert float(table["edgebank"]["mrr_filtered"]) > 0.2  # regular calls are easy to remember
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["nodes"] == 30 and summary["snapshots"] == 30
    assert summary["measure"] == "mrr_filtered" and summary["best"] in table
    coming = rows_of(folder / "next.csv")
    scores = [float(row["score"]) for row in coming]
    assert len(coming) == 15 and scores == sorted(scores, reverse=True)
    assert all(row["source"] != row["target"] for row in coming)
    assert {row["seen"] for row in coming} <= {"True", "False"}
    sizes = rows_of(folder / "snapshots.csv")
    assert len(sizes) == 30 and float(sizes[0]["events"]) == 22


def test_a_saved_forecaster_predicts_the_same_and_follows_new_events(folder, calls, tmp_path):
    again = json.loads(run("predict", folder, calls, *COLUMNS, "--top", 15, "--json"))
    before = rows_of(folder / "next.csv")
    assert [(r["source"], r["target"]) for r in again["table"]] == [
        (r["source"], r["target"]) for r in before
    ]
    assert again["from"] == 30.5 and again["to"] == 31.5
    longer = tmp_path / "longer.csv"
    longer.write_text(calls.read_text() + "anew,n3,30.9,good\nanew,n4,31.5,good\n")
    out = tmp_path / "next"
    run("predict", folder, longer, *COLUMNS, "--top", 5, "--out", out)
    assert {"n4", "anew"} & {row["source"] for row in rows_of(out / "table.csv")}


def test_a_saved_forecaster_is_judged_on_other_events(folder, calls, tmp_path):
    found = json.loads(run("evaluate", folder, calls, *COLUMNS, "--json"))
    assert [row["model"] for row in found["table"]][:2] == ["evolvegcn-h", "edgebank"]
    assert found["judged_steps"] == 27
    short = tmp_path / "short.csv"
    short.write_text("\n".join(calls.read_text().splitlines()[:20]) + "\n")
    with pytest.raises(RequestError, match="too few snapshots"):
        run("evaluate", folder, short, *COLUMNS)


def test_the_window_of_summed_adjacencies_is_kept_with_the_forecaster(calls, tmp_path):
    out, wide = tmp_path / "out", ("--adjacency-window", 4)
    run("train", calls, *COLUMNS, "--bin", 1, *QUICK, *wide, "--out", out)
    again = json.loads(run("predict", out, calls, *COLUMNS, "--top", 100, "--json"))["table"]
    ahead = rows_of(out / "next.csv")
    assert [(r["source"], r["target"]) for r in ahead] == [
        (r["source"], r["target"]) for r in again
    ]
    assert len({name for row in ahead for name in (row["source"], row["target"])}) > 20


def test_labels_of_edges(calls, tmp_path):
    out = tmp_path / "moods"
    run(
        "train", calls, *COLUMNS, "--bin", "3s", "--task", "edge", *QUICK, "--model", "evolvegcn-o",
        "--class-weight", 0.8, "--class-weight", 0.2, "--policy", "carry", "--out", out,
    )  # fmt: skip
    table = [row["model"] for row in rows_of(out / "table.csv")]
    assert table == ["evolvegcn-o", "gcn", "majority"] and not (out / "next.csv").exists()
    assert "majority" in run("evaluate", out, calls, *COLUMNS)
    with pytest.raises(RequestError, match="not of links"):
        run("predict", out, calls, *COLUMNS)
    with pytest.raises(RequestError, match="has the labels none"):
        run("evaluate", out, calls, *COLUMNS[:-2])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--bin", "never"), "--bin never"),
        (("--bin", "-3"), "--bin -3"),
        (("--top", 0), "--top 0"),
        (("--time", "when"), "no column 'when'"),
        (("--class-weight", 1), "class_weights"),
        (("--window", 40), "cannot be split"),
        (("--model", "gcn", "--policy", "carry"), "no state to carry"),
        (("--device", "gpu"), "choose auto, cpu or cuda"),
    ],
)
def test_bad_requests_are_one_sentence_and_leave_nothing(calls, tmp_path, options, sentence):
    with pytest.raises(RequestError, match=sentence):
        run("train", calls, *COLUMNS, "--bin", 1, *QUICK, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_and_a_foreign_folder_is_refused(folder, calls, tmp_path):
    with pytest.raises(RequestError, match="is there already"):
        run("train", calls, *COLUMNS, "--out", folder)
    with pytest.raises(RequestError, match="does not exist"):
        run("predict", tmp_path, calls, *COLUMNS)
    (tmp_path / "forecaster.json").write_text((folder / "forecaster.json").read_text())
    with pytest.raises(RequestError, match="is not a saved forecaster"):
        run("predict", tmp_path, calls, *COLUMNS)
    (tmp_path / "forecaster.json").write_text("[]")
    with pytest.raises(RequestError, match="is not a saved forecaster"):
        run("predict", tmp_path, calls, *COLUMNS)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_a_kept_forecaster_is_run_where_one_says(folder, calls, command):
    one = run(command, folder, calls, *COLUMNS, "--device", "cpu", "--json")
    assert one == run(command, folder, calls, *COLUMNS, "--device", "cpu", "--json")
    with pytest.raises(RequestError, match="choose auto, cpu or cuda"):
        run(command, folder, calls, *COLUMNS, "--device", "tpu9")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("task", ["link", "edge"])
def test_cuda_says_what_the_cpu_says(calls, tmp_path, task):
    told = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        run("train", calls, *COLUMNS, "--bin", 1, *QUICK, "--task", task, "--device", device,
            "--out", out)  # fmt: skip
        shown = run("evaluate", tmp_path / "cpu", calls, *COLUMNS, "--device", device, "--json")
        told.append(json.loads(shown)["table"])
    for here, there in zip(*told, strict=True):
        assert here.keys() == there.keys()
        numbers = [k for k, v in here.items() if isinstance(v, float)]
        assert [here[k] for k in numbers] == pytest.approx([there[k] for k in numbers], rel=1e-3)
