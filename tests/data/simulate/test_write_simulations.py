from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pantarhei.cli import app
from pantarhei.data.recordings import read_recordings
from pantarhei.data.simulate.combustor import Combustor, combustor
from pantarhei.data.simulate.translation import Translation
from pantarhei.data.simulate.write import SIMULATORS, simulator, write
from pantarhei.data.trajectories import open_trajectories
from pantarhei.errors import RequestError

TINY = Translation(size=8, waves=2, frames=3)


@pytest.mark.parametrize("suffix", [".npz", ".h5", ".zarr"])
def test_shards_are_one_set_and_equal_one_call(tmp_path, suffix):
    pytest.importorskip({".h5": "h5py", ".zarr": "zarr"}.get(suffix, "numpy"))
    files = write(TINY, tmp_path / "set", 7, shard=3, seed=2, suffix=suffix, quiet=True)
    assert [f.name for f in files] == [f"cases-{n:06d}{suffix}" for n in (0, 3, 6)]
    found = open_trajectories(tmp_path / "set")
    assert torch.equal(found.tensor(), TINY.simulate(range(7), seed=2).tensor())
    assert found.settings["simulator"] == "translation" and found.settings["size"] == 8


def test_a_killed_call_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    calls = []
    real = Translation.simulate

    def killed(self, cases, *rest):
        calls.append(list(cases))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, cases, *rest)

    monkeypatch.setattr(Translation, "simulate", killed)
    with pytest.raises(KeyboardInterrupt):
        write(TINY, tmp_path / "set", 6, shard=2, quiet=True)
    write(TINY, tmp_path / "set", 6, shard=2, quiet=True)
    assert calls == [[0, 1], [2, 3], [2, 3], [4, 5]]
    whole = real(TINY, range(6)).tensor()
    np.testing.assert_array_equal(open_trajectories(tmp_path / "set").tensor(), whole)


def test_other_settings_or_files_are_not_overwritten(tmp_path):
    write(TINY, tmp_path / "set", 2, quiet=True)
    for options in ({"cases": 3}, {"cases": 2, "seed": 1}):
        with pytest.raises(RequestError, match="was begun with other"):
            write(TINY, tmp_path / "set", quiet=True, **options)
    with pytest.raises(RequestError, match="begun with other settings"):
        write(Translation(size=16), tmp_path / "set", 2, quiet=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(RequestError, match="holds other files"):
        write(TINY, tmp_path / "mine", 2, quiet=True)
    with pytest.raises(RequestError, match="is a file"):
        write(TINY, tmp_path / "mine" / "thesis.txt", 2, quiet=True)
    with pytest.raises(RequestError, match="1 case or more"):
        write(TINY, tmp_path / "new", 0, quiet=True)
    with pytest.raises(RequestError, match=r"h5 or \.zarr"):
        write(TINY, tmp_path / "new", 1, suffix=".csv", quiet=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", SIMULATORS)
def test_every_simulator_is_made_by_name(name):
    key = "seconds" if name == "combustor" else "frames"
    assert getattr(simulator(name, {key: "2"}), key) == 2


def test_wrong_names_and_settings():
    with pytest.raises(RequestError, match="Did you mean 'smoke'"):
        simulator("smok")
    with pytest.raises(RequestError, match="Did you mean 'size'"):
        simulator("smoke", {"sise": 3})
    with pytest.raises(RequestError, match="is an integer"):
        simulator("smoke", {"size": "many"})


def test_the_command(tmp_path):
    run = CliRunner().invoke
    asked = ["translation", "--cases", "3", "--set", "size=8", "--set", "waves=2", "--json"]
    done = run(app, ["simulate", *asked, "--out", str(tmp_path / "set")])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["cases"] == 3 and len(document["files"]) == 1
    assert open_trajectories(tmp_path / "set").shape == (3, 14, 1, 8, 8)
    listed = run(app, ["simulate"])
    assert all(name in listed.stdout for name in SIMULATORS)
    for wrong in (["smoke"], ["smoke", "--set", "size", "--out", "x"], ["fire"],
                  ["smoke", "--device", "tpu", "--out", "x"]):  # fmt: skip
        assert isinstance(run(app, ["simulate", *wrong]).exception, RequestError)


def test_runs_of_the_combustor_are_a_file_each_and_go_on(tmp_path, monkeypatch):
    tiny, calls = Combustor(seconds=0.5), []
    real = Combustor.simulate

    def counted(self, cases, *rest):
        calls.append(list(cases))
        return real(self, cases, *rest)

    monkeypatch.setattr(Combustor, "simulate", counted)
    files = write(tiny, tmp_path / "runs", 5, shard=2, seed=3, quiet=True)
    assert [file.name for file in files] == [f"run-{n:06d}.npz" for n in range(5)]
    files[3].unlink()
    assert write(tiny, tmp_path / "runs", 5, shard=2, seed=3, quiet=True) == files
    assert calls == [[0, 1], [2, 3], [4], [2, 3]]
    made = combustor(5, 0.5, 3).recordings
    for one, again in zip(made, read_recordings(tmp_path / "runs"), strict=True):
        assert one.signals.keys() == again.signals.keys()
        for name in one.signals:
            assert np.array_equal(one[name].values, again[name].values)
            assert one[name].rate == again[name].rate
    with pytest.raises(RequestError, match=r"written as \.npz"):
        write(tiny, tmp_path / "other", 1, suffix=".h5", quiet=True)
    with pytest.raises(RequestError, match="was begun with other settings"):
        write(Combustor(seconds=0.6), tmp_path / "runs", 5, shard=2, seed=3, quiet=True)
