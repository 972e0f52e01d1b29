"""``pantarhei generalization`` on a table of the user and on the theory, and what it refuses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pantarhei.errors import RequestError
from pantarhei.learning.commands.generalization import app
from pantarhei.learning.generalization import job, optimal_time, stopping_time


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def table(path, target="price", words=False):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)) * [1, 10, 100, 1]
    y = x @ [3, 0.2, 0.01, -2] + rng.normal(size=60)
    with path.open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["a", "b", "c", "d", target])
        shown = np.where(y > 0, "up", "down") if words else y
        writer.writerows([*row, value] for row, value in zip(x, shown, strict=True))
    return x, y


def test_stop_on_a_table_is_the_functions_answer(tmp_path):
    x, y = table(tmp_path / "t.csv")
    found = json.loads(call("stop", tmp_path / "t.csv", "--lr", 0.01, "--json").stdout)
    values = {row["quantity"]: row["value"] for row in found["table"]}
    expected = stopping_time((x - x.mean(0)) / x.std(0), y, lr=0.01)
    assert values["best step"] == round(expected.steps)
    assert values["best time t / tau"] == pytest.approx(expected.time)
    assert values["SNR"] == pytest.approx(expected.snr)
    raw = json.loads(call("stop", tmp_path / "t.csv", "--raw", "--json").stdout)
    assert raw["table"][1]["value"] != values["SNR"]


def test_npz_and_words_are_read(tmp_path):
    x, y = table(tmp_path / "t.csv", words=True)
    np.savez(tmp_path / "t.npz", X=x, y=np.where(y > 0, 1.0, -1.0))
    one, two = (job.read_table(str(tmp_path / f"t.{e}")) for e in ("csv", "npz"))
    np.testing.assert_allclose(one.inputs, two.inputs)
    np.testing.assert_array_equal(one.targets, two.targets)
    assert one.names == ("a", "b", "c", "d") and one.target == "price"
    other = job.read_table(str(tmp_path / "t.csv").replace("t.csv", "t.npz"), standardise=False)
    np.testing.assert_array_equal(other.inputs, x)


def test_stop_without_data_is_the_theory():
    found = json.loads(call("stop", "--alpha", 0.5, "--snr", 1, "--snr", 5, "--json").stdout)
    times = [row["best time"] for row in found["table"]]
    np.testing.assert_allclose(times, optimal_time(0.5, [1.0, 5.0]))
    shown = call("stop", "--alpha", 1).stdout
    assert "best ridge" in shown and "inf" in shown


@pytest.mark.parametrize("data", [False, True])
def test_curve_is_written_and_drawn(tmp_path, data):
    table(tmp_path / "t.csv")
    words = ["curve", *([tmp_path / "t.csv"] if data else ["--alpha", 2]), "--points", 5]
    assert "Everything is in" in call(*words, "--out", tmp_path / "c").stdout
    rows = list(csv.DictReader((tmp_path / "c" / "table.csv").open()))
    assert len(rows) == 5
    train = [float(row["train" if data else "train, P/N = 2"]) for row in rows]
    assert train == sorted(train, reverse=True)
    assert (tmp_path / "c" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert len(json.loads((tmp_path / "c" / "summary.json").read_text())["table"]) == 5


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("command", ["width-sweep", "bound"])
def test_sweeps(tmp_path, command, data):
    table(tmp_path / "t.csv")
    words = [command, *([tmp_path / "t.csv"] if data else ["--examples", 45]), "--seeds", 3]
    words += ["--width", 10, "--width", 45, "--width", 200, "--json"]
    found = json.loads(call(*words, "--out", tmp_path / "w").stdout)
    assert [row["width"] for row in found["table"]] == [10, 45, 200]
    key = "overtraining" if command == "width-sweep" else "conditioned bound"
    values = [row[key] for row in found["table"]]
    assert values[1] == max(values)
    if command == "bound":
        plain = [row["plain bound"] for row in found["table"]]
        assert plain == sorted(plain)
    assert (tmp_path / "w" / "widths.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("content", "words", "sentence"),
    [
        (None, ["stop", "FILE"], "not a file"),
        ("a,y\n1,2\n2,3\n3,5\n", ["stop", "FILE", "--target", "z"], "no column 'z'"),
        ("a,y\n1,2\n2,\n3,5\n", ["stop", "FILE"], "missing in row 2"),
        ("a,y\n1,2\n2,nan\n3,5\n", ["stop", "FILE"], "not finite in row 2"),
        ("a,y\n1,2\n2\n3,5\n", ["stop", "FILE"], "Row 2 of"),
        ("a,a,y\n1,1,2\n", ["stop", "FILE"], "names a column twice"),
        ("y\n1\n", ["stop", "FILE"], "needs a header"),
        ("", ["stop", "FILE"], "needs a header"),
        ("a,y\n1,2\n1,3\n1,5\n", ["stop", "FILE"], "no input of"),
        ("a,y\n1,2\n2,3\n3,5\n", ["stop", "FILE", "--snr", "1", "--snr", "2"], "--snr once"),
        ("a,y\n1,2\n2,3\n3,5\n", ["bound", "FILE", "--test-share", "0.9"], "--test-share"),
        (None, ["stop", "--lr", "0.1"], "name a table"),
        (None, ["curve", "--points", "1"], "--points"),
        (None, ["curve", "--alpha", "-1"], "alpha must be positive"),
        (None, ["stop", "--out", "FOLDER"], "there already"),
        (None, ["width-sweep", "--seeds", "0"], "--seeds"),
    ],
)
def test_bad_requests_are_one_sentence(tmp_path, content, words, sentence):
    file = tmp_path / "t.csv"
    if content is not None:
        file.write_text(content)
    (tmp_path / "mine").write_text("mine")
    names = {"FILE": str(file), "FOLDER": str(tmp_path / "mine")}
    with pytest.raises(RequestError, match=sentence):
        call(*[names.get(word, word) for word in words])
    assert (tmp_path / "mine").read_text() == "mine"


def test_nothing_is_overwritten_and_pickles_are_not_opened(tmp_path):
    there = tmp_path / "mine" / "table.csv"
    there.parent.mkdir()
    there.write_text("mine")
    with pytest.raises(RequestError, match="there already"):
        call("curve", "--out", there.parent)
    assert there.read_text() == "mine" and list(there.parent.iterdir()) == [there]
    np.savez(tmp_path / "t.npz", X=np.array([{}, {}], dtype=object), y=np.zeros(2))
    with pytest.raises(RequestError, match="not the file expected"):
        call("stop", tmp_path / "t.npz")
