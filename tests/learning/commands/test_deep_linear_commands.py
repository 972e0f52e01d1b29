"""pantarhei deep-linear: the user's tables, good and bad, and what is printed and written."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from pantarhei.data.table import read_table
from pantarhei.errors import RequestError
from pantarhei.learning import deep_linear as dl
from pantarhei.learning.commands.deep_linear import app


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)) * [1, 2, 0.5, 1] + 3
    y = x @ [1.0, -2.0, 1.0, 0.0] + 0.1 * rng.normal(size=200)
    kind = np.where(x[:, 0] > 3.5, "high", np.where(x[:, 0] < 2.5, "low", "middle"))
    path = tmp_path_factory.mktemp("data") / "table.csv"
    with path.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["a", "b", "c", "d", "kind", "y"])
        writer.writerows([*row, k, v] for row, k, v in zip(x, kind, y, strict=True))
    np.savez(path.with_suffix(".npz"), X=x, y=np.stack([y, y**2], 1))
    return path


def test_tables_are_read(table, tmp_path):
    plain = tmp_path / "plain.csv"
    plain.write_text("a,b,y\n1,2,3\n4,5,6\n")
    read = read_table(str(plain))
    assert read.inputs.tolist() == [[1, 2], [4, 5]] and read.targets.tolist() == [[3], [6]]
    assert read.input_names == ("a", "b") and read.target_names == ("y",)
    both = read_table(str(plain), ["y", "a"])
    assert both.targets.tolist() == [[3, 1], [6, 4]] and both.input_names == ("b",)
    assert read_table(str(plain), classes=True).target_names == ("y=3", "y=6")
    with pytest.raises(RequestError, match=r"Column 'kind'.*holds '"):
        read_table(str(table))
    words = tmp_path / "words.csv"
    words.write_text("a,y\n1,u\n2,v\n3,u\n")
    read = read_table(str(words))
    assert read.target_names == ("y=u", "y=v")
    assert read.targets.tolist() == [[1, 0], [0, 1], [1, 0]]
    arrays = read_table(str(table.with_suffix(".npz")))
    assert arrays.targets.shape == (200, 2) and arrays.target_names == ("y0", "y1")


BAD = {
    "a,b\n": "needs a header",
    "a,b\n1,2\n": "too few rows",
    "a\n1\n2\n": "needs a header",
    "a,b\n1,2\n3\n": "Row 2 .* has 1 fields",
    "a,a\n1,2\n3,4\n": "twice",
    "a,b\n1,2\n,4\n": "Column 'a' .* holds '' in row 2",
    "a,b\nnan,2\n3,4\n": "Column 'a' .* holds 'nan' in row 1",
    "a,b\n1,2\n3,\n": "Target 'b' .* missing in row 2",
    "a,b\n1,2\n3,nan\n": "Target 'b' .* not finite in row 2",
    "a,b\n1,u\n3,v\n4,w\n5,x\n": "4 different values in 4 rows",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_tables_are_one_sentence(text, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(RequestError, match=BAD[text]) as caught:
        run("predict", path)
    assert "\n" not in str(caught.value)


def test_other_bad_requests(table, tmp_path):
    npz = table.with_suffix(".npz")
    np.savez(tmp_path / "wrong.npz", A=np.ones(3))
    np.savez(tmp_path / "uneven.npz", X=np.ones((3, 2)), y=np.ones(4))
    np.savez(tmp_path / "hole.npz", X=np.full((3, 2), np.nan), y=np.ones(3))
    np.savez(tmp_path / "same.npz", X=np.ones((3, 2)), y=np.arange(3))
    np.savez(tmp_path / "wide.npz", X=np.random.default_rng(0).normal(size=(5, 9)), y=np.arange(5))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04nonsense")
    for arguments, sentence in (
        (("predict", "nowhere.csv"), "not a file"),
        (("predict", table, "--target", "z"), "no column 'z'"),
        (("predict", npz, "--target", "y"), "column of a CSV"),
        (("predict", tmp_path / "wrong.npz"), "needs X and y"),
        (("predict", tmp_path / "uneven.npz"), "give \\(P, N1\\)"),
        (("predict", tmp_path / "hole.npz"), "missing or not finite in row 1, column 1"),
        (("predict", tmp_path / "same.npz"), "nothing to learn"),
        (("predict", tmp_path / "wide.npz", "--hidden", 4), "too few to whiten"),
        (("predict", tmp_path / "binary.csv"), "binary.csv"),
        (("predict", tmp_path / "broken.npz"), "broken.npz"),
        (("predict", npz, "--validation", 1.5), "share from 0"),
        (("predict", npz, "--lr", 0), "positive"),
        (("predict", npz, "--hidden", 0), "one unit"),
        (("predict", npz, "--hidden", 4, "--start", "zero"), "never leaves zero"),
        (("predict", npz, "--hidden", 4, "--raw"), "leave --raw away"),
        (("predict", npz, "--hidden", 1, "--start", "decoupled"), "cannot hold 2 modes"),
        (("predict", npz, "--out", tmp_path), "there already"),
        (("depth-sweep", "--start", "orthogonall"), "Did you mean 'orthogonal'"),
        (("depth-sweep", "--depth", 0), "1 or more"),
        (("gain-sweep", "--start", "decoupled"), "orthogonal or gaussian"),
        (("gain-sweep", "nonsense"), "nonsense"),
    ):
        with pytest.raises(RequestError, match=sentence) as caught:
            run(*arguments)
        assert "\n" not in str(caught.value), arguments


def test_a_linear_model_of_a_table(table):
    found = json.loads(
        run(
            "predict", table.with_suffix(".npz"), "--validation", 0.25, "--lr", 0.01, "--check",
            "--loss", "half-mean", "--json",
        )
    )  # fmt: skip
    assert found["prediction"] == "exact" and found["widths"] == [4, 2] and found["samples"] == 150
    assert found["tau"] == pytest.approx(100)
    assert found["largest_error_of_the_predicted_loss"] < 0.01
    for row in found["table"]:
        if row["t_half"] is not None:
            assert row["t_half"] == pytest.approx(row["t_half_simulated"], rel=0.03, abs=1)
    assert found["stop_at_step"] > 0 and found["validation_loss_there"] > 0
    assert found["loss_floor"] < found["loss_at_start"]


def test_a_deep_network_of_a_table_writes_its_curves(table, tmp_path):
    out = tmp_path / "out"
    found = json.loads(
        run(
            "predict", table.with_suffix(".npz"), "--hidden", 16, "--std", 1e-3, "--lr", 0.02,
            "--loss", "half-mean", "--check", "--draws", 6, "--out", out, "--json",
        )
    )  # fmt: skip
    assert found["prediction"] == "projected"
    assert {path.name for path in out.iterdir()} == {
        "curves.csv", "curves.png", "curves.svg", "summary.json", "table.csv",
    }  # fmt: skip
    for row in found["table"]:
        assert row["t_half_low"] <= row["t_half"] <= row["t_half_high"]
        # of this rate the descent is behind the flow by a few per cent
        assert row["t_half"] == pytest.approx(row["t_half_simulated"], rel=0.1)
    rows = list(csv.DictReader((out / "curves.csv").open()))
    assert float(rows[0]["step"]) == 0 and float(rows[-1]["u_1"]) > 0.9 * found["table"][0]["s"]
    saved = json.loads((out / "summary.json").read_text())
    assert saved["order_learned"] == found["order_learned"]
    with pytest.raises(RequestError, match="there already"):
        run("predict", table.with_suffix(".npz"), "--out", out)


def test_the_table_printed_is_the_prediction(table):
    text = run("predict", table.with_suffix(".npz"), "--hidden", 8, "--start", "decoupled")
    arrays = read_table(str(table.with_suffix(".npz")))
    white, _ = dl.whiten(arrays.inputs - arrays.inputs.mean(0))
    data = dl.Correlations.of(white, arrays.targets - arrays.targets.mean(0))
    s = data.modes().s
    assert "exact" in text and "order learned: 1, 2" in text
    half = dl.logistic_time(s[1] / 2, s[1], 1e-3, data.tau(0.1, "mse"))
    row = next(line.split() for line in text.splitlines() if line.strip().startswith("2 "))
    assert float(row[4]) == pytest.approx(float(half), rel=0.02, abs=0.05)


def test_depth_and_gain_sweeps(table, tmp_path):
    found = json.loads(
        run(
            "depth-sweep", "--size", 5, "--depth", 2, "--depth", 4, "--seeds", 1, "--json",
            "--start", "orthogonal", "--start", "decoupled", "--out", tmp_path / "d",
        )
    )  # fmt: skip
    assert [(row["start"], row["n"]) for row in found["table"]] == [
        ("orthogonal", 2), ("orthogonal", 4), ("decoupled", 2), ("decoupled", 4),
    ]  # fmt: skip
    assert (tmp_path / "d" / "depth.png").exists()
    own = json.loads(run("depth-sweep", table.with_suffix(".npz"), "--depth", 2, "--json"))
    assert "targets scaled" in own["task"]
    text = run(
        "gain-sweep", "tanh", "--width", 10, "--depth", 5, "--gain", 1.0, "--out", tmp_path / "g"
    )
    assert "critical gain: 1" in text
    values = list(csv.DictReader((tmp_path / "g" / "spectra.csv").open()))
    assert len(values) == 20
    around = json.loads(run("gain-sweep", "relu", "--width", 6, "--depth", 3, "--json"))
    assert around["table"][1]["gain"] == pytest.approx(2**0.5, abs=1e-4)
