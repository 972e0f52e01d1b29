"""Files of recordings: CSV, Parquet and NPZ that say the same, and files that say nothing."""

from __future__ import annotations

import sys
from datetime import datetime, timedelta
from decimal import Decimal

import numpy as np
import pytest

from pantarhei.data.recordings import read_recordings, write_recording
from pantarhei.data.series import Last, Layout, Recording, Signal
from pantarhei.errors import RequestError


def test_a_csv_of_several_rates_and_an_npz_are_the_same_run(tmp_path):
    rows = ["time,p,T", "0,1.5,20", "0.1,2.5,", "0.2,3.5,", "0.3,4.5,21"]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    np.savez(
        tmp_path / "b.npz",
        **{"p": np.array([1.5, 2.5, 3.5, 4.5]), "T": np.array([20, 21]), "rate": 10.0,
           "T.time": np.array([0.0, 0.3])},
    )  # fmt: skip
    one, two = read_recordings(tmp_path)
    assert (one.name, two.name) == ("a", "b")
    assert one["T"].times.tolist() == [0.0, 0.3] and two["p"].rate == 10.0
    layout = Layout(0.1, inputs=(Last("p"), Last("T")), targets=(Last("p"),))
    a, b = layout.frames(one), layout.frames(two)
    assert np.array_equal(a.inputs, b.inputs) and a.inputs.tolist() == [
        [2.5, 20],
        [3.5, 20],
        [4.5, 21],
    ]
    dated = tmp_path / "c.csv"
    dated.write_text(
        "run,when,x\n1,2026-01-01T00:00:10,1\n1,2026-01-01T00:01:10,2\n2,2026-01-02,3\n"
    )
    first, second = read_recordings(dated, time="when", run="run")
    assert first["x"].times.tolist() == [0.0, 60.0] and second["x"].values.tolist() == [3.0]


BAD = {
    "time,x\n": "needs a header",
    "t,x\n1,2\n2,3\n": "no column 'time'",
    "time,x,x\n1,2,3\n2,3,4\n": "twice",
    "time,x\n1,2\n2\n": "Row 2 .* has 1 fields",
    "time,x\n1,2\n1,3\n": "Column 'x', run 'bad'.*Times must increase.*sample 1",
    "time,x\n2,2\n1,3\n": "Times must increase",
    "time,x\n1,2\n2,cold\n": "Column 'x' .* holds 'cold' in row 2",
    "time,x\n1,2\n2,inf\n": "infinite at sample 1",
    "time,x\n1,2\nsoon,3\n": "holds '1' in row 1: give seconds",
    "time,x\n1,\n2,\n": "has no sample",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_tables_are_one_sentence(text, tmp_path):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(RequestError, match=BAD[text]) as caught:
        list(read_recordings(tmp_path / "bad.csv"))
    assert "\n" not in str(caught.value)


def test_bad_files_are_one_sentence(tmp_path):
    for path, reason in (
        (tmp_path / "none.csv", "not a file"),
        (tmp_path, "no .csv, .parquet or .npz"),
    ):
        with pytest.raises(RequestError, match=reason):
            list(read_recordings(path))
    (tmp_path / "x.npz").write_bytes(b"no archive")
    with pytest.raises(RequestError, match="not the file expected"):
        list(read_recordings(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", p=np.ones(3))
    with pytest.raises(RequestError, match=r"needs numbers and 'p.time'"):
        list(read_recordings(tmp_path / "x.npz"))
    np.savez(tmp_path / "x.npz", rate=1.0)
    with pytest.raises(RequestError, match="no signal"):
        list(read_recordings(tmp_path / "x.npz"))


def parquet(path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_is_read_as_the_csv_is(tmp_path):
    (tmp_path / "a.csv").write_text("time,p,T,on\n0,1.5,20,1\n0.1,2.5,,0\n0.2,3.5,21,1\n")
    parquet(
        tmp_path / "b.parquet",
        time=[0.0, 0.1, 0.2],
        p=np.array([1.5, 2.5, 3.5], np.float32),
        T=[20, None, 21],
        on=[True, False, True],
    )
    one, two = read_recordings(tmp_path)
    assert (one.name, two.name) == ("a", "b") and list(one.signals) == list(two.signals)
    for name in ("p", "T", "on"):
        assert np.array_equal(one[name].values, two[name].values)
        assert np.array_equal(one[name].times, two[name].times)
    assert two["T"].times.tolist() == [0.0, 0.2]


def test_parquet_with_dates_runs_and_decimals(tmp_path):
    pa = pytest.importorskip("pyarrow")
    start = datetime(2026, 1, 1)
    dates = [start + timedelta(milliseconds=250 * t) for t in range(3)] * 2
    about = {"when": dates, "x": [Decimal("1.25")] * 6}
    for labels in (["u"] * 3 + ["v"] * 3, [1] * 3 + [2] * 3):
        names = sorted({str(label) for label in labels})
        for column in (pa.array(labels), pa.array(labels).dictionary_encode()):
            parquet(tmp_path / "c.parquet", run=column, **about)
            found = list(read_recordings(tmp_path / "c.parquet", time="when", run="run"))
            assert [one.name for one in found] == names
            assert found[1]["x"].times.tolist() == [0, 0.25, 0.5]
            assert found[1]["x"].values.tolist() == [1.25] * 3


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"time": [0.0, 1.0]}, "a column of times, a sensor"),
        ({"time": [0.0], "x": [1.0]}, "two rows"),
        ({"t": [0.0, 1.0], "x": [1.0, 2.0]}, "no column 'time'"),
        ({"time": [1.0, 0.0], "x": [1.0, 2.0]}, "Times must increase"),
        ({"time": [1.0, None], "x": [1.0, 2.0]}, "Times must increase"),
        ({"time": [0.0, 1.0], "x": [[1.0], [2.0]]}, "column 'x' holds list"),
        ({"time": [0.0, 1.0], "x": ["1.5", "cold"]}, "'cold' in row 2"),
        ({"time": [0.0, 1.0], "x": [datetime(2026, 1, 1)] * 2}, "holds dates"),
        ({"time": [0.0, 1.0], "x": [1.0, float("inf")]}, "infinite at sample 1"),
        ({"time": [0.0, 1.0], "x": [None, float("nan")]}, "has no sample"),
    ],
)
def test_bad_parquet_is_one_sentence(tmp_path, columns, sentence):
    path = parquet(tmp_path / "bad.parquet", **columns)
    with pytest.raises(RequestError, match=sentence) as caught:
        list(read_recordings(path))
    assert "\n" not in str(caught.value) and "bad" in str(caught.value)


def test_damaged_parquet_and_a_missing_library(tmp_path, monkeypatch):
    path = parquet(tmp_path / "a.parquet", time=np.arange(500.0), x=np.arange(500.0))
    content = path.read_bytes()
    for cut in (
        b"",
        b"PAR1",
        content[:200],
        content[:-1],
        content[:100] + bytes(200) + content[300:],
    ):
        path.write_bytes(cut)
        with pytest.raises(RequestError) as caught:
            list(read_recordings(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    path.write_bytes(content)
    monkeypatch.setattr("pantarhei.data.recordings._MOST_CELLS", 999)
    with pytest.raises(RequestError, match="500 rows of 2 columns"):
        list(read_recordings(path))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RequestError, match=r"needs pyarrow: .* 'pantarhei\[series\]'"):
        list(read_recordings(path))


def test_what_is_written_is_what_is_read(tmp_path):
    times = np.array([0.5, 0.7, 1.5])
    signals = {
        "p": Signal(np.array([1.0, 2.0], np.float32), rate=4.0),
        "q": Signal(np.arange(3.0), rate=4.0, start=2.0),
        "T": Signal(np.array([1.0, np.nan, 3.0]), times=times),
    }
    write_recording(Recording("a", signals), tmp_path / "a.npz")
    (again,) = read_recordings(tmp_path / "a.npz")
    assert again.name == "a" and again["p"].rate == 4 and again["p"].values.dtype == np.float32
    assert again["q"].times.tolist() == [2.0, 2.25, 2.5] and again["T"].times.tolist() == [*times]
    assert np.array_equal(again["T"].values, signals["T"].values, equal_nan=True)
    for name in ("a.npz", "a.csv"):
        with pytest.raises(RequestError, match="name a new one"):
            write_recording(Recording("a", signals), tmp_path / name)
