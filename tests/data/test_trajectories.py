"""Trajectories: the format, foreign layouts, windows and splits, and files nobody vouches for."""

from __future__ import annotations

import json
import os
import zipfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from pantarhei.data import layouts
from pantarhei.data import trajectories as tr
from pantarhei.data.trajectories import Trajectories, open_trajectories
from pantarhei.data.windows import Statistics, Windows, split
from pantarhei.errors import RequestError

RNG = np.random.default_rng(0)
FORMATS = [
    pytest.param(".npz"),
    pytest.param(".h5", marks=pytest.mark.skipif(not find_spec("h5py"), reason="no h5py")),
    pytest.param(".zarr", marks=pytest.mark.skipif(not find_spec("zarr"), reason="no zarr")),
]


def example(cases=5, frames=7, channels=2, space=(4, 6), **about):
    states = RNG.normal(size=(cases, frames, channels, *space)).astype(np.float32)
    about = {
        "channels": ("u", "v")[:channels],
        "dt": 0.25,
        "units": ("m/s",) * channels,
        "spacing": (0.5,) * len(space),
        "parameters": RNG.normal(size=(cases, 3)),
        "parameter_names": ("a", "b", "c"),
        "mask": RNG.random((cases, *space)) < 0.8,
        "name": "example",
        "settings": {"nu": 0.01},
    } | about
    return states, Trajectories.of(states, **about)


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("space", [(), (9,), (4, 6), (3, 4, 5)])
def test_what_is_saved_is_what_is_opened(tmp_path, suffix, space):
    states, data = example(space=space)
    data.save(tmp_path / f"a{suffix}")
    again = open_trajectories(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(again.tensor(), states)
    np.testing.assert_array_equal(again.frames(2, 3, 5), states[2, 3:5])
    if suffix == ".npz":
        with np.load(tmp_path / "a.npz", allow_pickle=False) as plain:
            np.testing.assert_array_equal(plain["states"], states)
    for name in ("shape", "channels", "dt", "units", "spacing", "parameter_names", "name"):
        assert getattr(again, name) == getattr(data, name)
    assert again.settings == {"nu": 0.01}
    np.testing.assert_array_equal(again.parameters, data.parameters)
    np.testing.assert_array_equal(again.mask, data.mask)
    with pytest.raises(RequestError, match="there already"):
        data.save(tmp_path / f"a{suffix}")


def test_cases_of_different_lengths(tmp_path):
    cases = [RNG.normal(size=(n, 1, 4)) for n in (3, 6, 5)]
    data = Trajectories.of(cases)
    data.save(tmp_path / "a.npz")
    again = open_trajectories(tmp_path / "a.npz")
    assert [again.length(i) for i in range(3)] == [3, 6, 5] and again.shape == (3, 6, 1, 4)
    np.testing.assert_array_equal(again.frames(2), cases[2])
    with pytest.raises(RequestError, match="has 3 frames"):
        again.tensor()
    padded = again.tensor(repeat_last=True)
    assert torch.equal(padded[0, 2], padded[0, 5])
    windows = Windows(again, [0, 1, 2], history=2, horizon=2, batch_size=5)
    assert len(windows) == 1  # 0 + 3 + 2 of them


def test_a_folder_of_files_is_one_set(tmp_path):
    states, data = example(cases=7)
    for i, cases in enumerate(([0, 1, 2], [3], [4, 5, 6])):
        Trajectories.of(
            states[cases], channels=("u", "v"), dt=0.25, parameters=data.parameters[cases],
            parameter_names=data.parameter_names,
        ).save(tmp_path / f"part-{i}.npz")  # fmt: skip
    whole = open_trajectories(tmp_path)
    np.testing.assert_array_equal(whole.tensor(), states)
    np.testing.assert_array_equal(whole.parameters, data.parameters)
    np.testing.assert_array_equal(whole.frames(6, 1, 3), states[6, 1:3])
    with pytest.raises(RequestError, match="agree in channels"):
        tr.concatenate([whole, Trajectories.of(states, channels=("u", "v"), dt=0.5)])


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_set_larger_than_memory_is_read_by_slices(tmp_path, suffix):
    shape = (1024, 1024, 1, 128, 128)
    meta = {"format": tr.FORMAT, "version": 1, "dt": 1.0, "channels": ["u"]}
    # 64 GiB on paper, of which a few chunks were ever written
    if suffix == ".zarr":
        group = pytest.importorskip("zarr").open_group(tmp_path / "big.zarr", mode="w")
        group.attrs["meta"] = meta
        states = group.create_array(
            "states", shape=shape, chunks=(1, 1, 1, 128, 128), shards=(1, 128, 1, 128, 128),
            dtype="f4",
        )  # fmt: skip
        states[1000, 500:503] = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
    elif suffix == ".h5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(tmp_path / "big.h5", "w") as file:
            states = file.create_dataset("states", shape, "f4", chunks=(1, 1, 1, 128, 128))
            states[1000, 500:503] = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1)
            file.attrs["meta"] = json.dumps(meta)
    else:
        # a sparse file: the array's header, and nothing written behind it
        sparse_npz(tmp_path / "big.npz", shape, at=(1000, 500), values=(0.0, 1.0, 2.0))
    big = open_trajectories(tmp_path / f"big{suffix}")
    assert big.shape == shape
    assert big.frames(1000, 500, 503)[:, 0, 5, 7].tolist() == [0, 1, 2]
    windows = Windows(big, [1000], history=1, horizon=1, batch_size=2, in_memory=False)
    past, targets = windows(0)
    assert past.shape == targets.shape == (2, 1, 1, 128, 128)


def sparse_npz(path, shape, at, values):
    """Write a .npz by hand whose states are a hole in the file, but for some frames."""
    frame = int(np.prod(shape[2:])) * 4
    header = np.lib.format.header_data_from_array_1_0(np.zeros((), np.float32))
    header["shape"] = shape
    with path.open("wb") as raw, zipfile.ZipFile(raw, "w", allowZip64=True) as archive:
        meta = {"format": tr.FORMAT, "version": 1, "dt": 1.0, "channels": ["u"]}
        with archive.open("meta.npy", "w") as member:
            np.lib.format.write_array(member, np.frombuffer(json.dumps(meta).encode(), np.uint8))
        info = zipfile.ZipInfo("states.npy")
        info.header_offset = raw.tell()
        info.extra, info.CRC = b"", 0
        raw.write(info.FileHeader(zip64=True))
        begin = raw.tell()
        np.lib.format.write_array_header_1_0(raw, header)
        data = raw.tell()
        for i, value in enumerate(values):
            raw.seek(data + frame * (at[0] * shape[1] + at[1] + i))
            raw.write(np.full(shape[2:], value, np.float32).tobytes())
        end = data + frame * shape[0] * shape[1]
        raw.seek(end)
        info.file_size = info.compress_size = end - begin
        archive.filelist.append(info)
        archive.NameToInfo[info.filename] = info
        archive.start_dir = end
        archive._didModify = True


def test_pdearena(tmp_path):
    h5py = pytest.importorskip("h5py")
    fields = {n: RNG.normal(size=(3, 5, 4, 6)).astype(np.float32) for n in ("u", "vx", "vy")}
    for i in range(2):
        with h5py.File(tmp_path / f"NavierStokes2D_train_{i}.h5", "w") as file:
            group = file.create_group("train")
            for name, values in fields.items():
                group[name] = values + i
            group["dt"], group["buo_y"] = np.full(3, 1.5), np.array([0.2, 0.3, 0.4])
            group["dx"], group["dy"] = np.full(3, 0.25), np.full(3, 0.25)
    data = layouts.pdearena(sorted(tmp_path.glob("*.h5")))
    assert data.shape == (6, 5, 3, 4, 6) and data.channels == ("smoke", "vx", "vy")
    assert data.dt == 1.5 and data.parameters[:, 0].tolist() == [0.2, 0.3, 0.4] * 2
    assert data.spacing == (0.25, 0.25)
    np.testing.assert_array_equal(data.frames(4, 1, 3)[:, 2], fields["vy"][1, 1:3] + 1)
    np.testing.assert_array_equal(open_trajectories(tmp_path).tensor(), data.tensor())
    with pytest.raises(RequestError, match="no 'test' inside"):
        layouts.pdearena(sorted(tmp_path.glob("*.h5")), "test")


def test_pdebench_in_its_three_layouts(tmp_path):
    h5py = pytest.importorskip("h5py")
    flow = {n: RNG.normal(size=(3, 5, 4, 4)) for n in ("Vx", "Vy", "density", "pressure")}
    with h5py.File(tmp_path / "cfd.hdf5", "w") as file:
        for name, values in flow.items():
            file[name] = values
        file["t-coordinate"] = np.arange(6) * 0.05
        file["x-coordinate"] = file["y-coordinate"] = np.arange(4) / 4
    data = open_trajectories(tmp_path / "cfd.hdf5")
    assert data.channels == ("density", "pressure", "Vx", "Vy")
    assert data.dt == pytest.approx(0.05) and data.spacing == pytest.approx((0.25, 0.25))
    np.testing.assert_array_equal(data.frames(1)[:, 2], flow["Vx"][1])
    with h5py.File(tmp_path / "advection.hdf5", "w") as file:
        file["tensor"] = flow["Vx"][..., 0]
    assert layouts.pdebench(tmp_path / "advection.hdf5").shape == (3, 5, 1, 4)
    reaction = RNG.normal(size=(2, 5, 4, 6, 2))
    with h5py.File(tmp_path / "reaction.h5", "w") as file:
        for i in range(2):
            group = file.create_group(f"{i:04d}")
            group["data"] = reaction[i]
            group["grid/t"], group["grid/x"] = np.arange(5) * 2.0, np.arange(4) * 0.5
            group["grid/y"] = np.arange(6) * 0.1
    data = layouts.pdebench(tmp_path / "reaction.h5")
    assert data.shape == (2, 5, 2, 4, 6) and data.dt == 2.0
    np.testing.assert_array_equal(data.frames(1, 2, 4), np.moveaxis(reaction[1, 2:4], -1, 1))


def test_cfdbench_folders(tmp_path):
    for i, frames in enumerate((4, 6)):
        place = tmp_path / "bc" / f"case{i:04d}"
        place.mkdir(parents=True)
        np.save(place / "u.npy", np.full((frames, 4, 4), i, np.float32))
        np.save(place / "v.npy", np.full((frames, 4, 4), 10 + i, np.float32))
        (place / "case.json").write_text(json.dumps({"vel_top": i, "density": 2.0, "name": "x"}))
    data = open_trajectories(tmp_path)
    assert data.shape == (2, 6, 2, 4, 4) and [data.length(i) for i in range(2)] == [4, 6]
    assert data.parameter_names == ("density", "vel_top")
    assert data.parameters.tolist() == [[2, 0], [2, 1]]
    assert data.frames(1)[5, :, 0, 0].tolist() == [1, 11]


def test_a_split_is_by_trajectory():
    parts = split(50, (0.8, 0.1, 0.1), seed=3)
    assert [len(p) for p in parts] == [40, 5, 5]
    assert sorted(np.concatenate(parts).tolist()) == list(range(50))
    assert all(np.array_equal(a, b) for a, b in zip(parts, split(50, seed=3), strict=True))
    assert not np.array_equal(parts[0], split(50, seed=4)[0])
    assert [len(p) for p in split(3, (0.98, 0.01, 0.01))] == [1, 1, 1]
    groups = np.repeat(np.arange(10), 5)
    for part in split(50, (0.6, 0.4), groups=groups):
        chosen = np.isin(groups, groups[part])
        assert chosen.sum() == len(part)
    with pytest.raises(RequestError, match="cannot be split"):
        split(2, (0.8, 0.1, 0.1))


def test_statistics_come_from_the_training_part_alone():
    states, data = example(cases=6, mask=None)
    states *= 3
    states[4:] += 100
    data = Trajectories.of(states)
    found = Statistics.of(data, [0, 1, 2, 3])
    part = np.moveaxis(states[:4], 2, 0).reshape(2, -1).astype(float)
    np.testing.assert_allclose(found.mean, part.mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.sd, part.std(1), rtol=1e-6)
    x = data.tensor()
    torch.testing.assert_close(found.restore(found.normalise(x)), x)
    normal = found.normalise(x[:4]).transpose(1, 2).transpose(0, 1).flatten(1)
    torch.testing.assert_close(normal.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    again = Statistics.from_json(json.loads(json.dumps(found.to_json())))
    assert torch.equal(again.normalise(x), found.normalise(x))
    for wrong in ({}, {"mean": [1.0], "sd": [0.0], "space": 2}, {"mean": [1], "sd": [1, 2]}):
        with pytest.raises(RequestError, match="no statistics"):
            Statistics.from_json(wrong)


def test_masked_cells_do_not_count():
    states = np.ones((1, 3, 1, 4, 4))
    states[..., 2:] = 1000 * RNG.random((1, 3, 1, 4, 2))
    mask = np.ones((4, 4))
    mask[:, 2:] = 0
    found = Statistics.of(Trajectories.of(states, mask=mask), [0])
    assert found.mean.tolist() == [1] and found.sd.tolist() == [1]


def test_an_epoch_is_every_window_once_and_no_other_case():
    states = np.arange(4 * 6, dtype=np.float64).reshape(4, 6, 1)
    data = Trajectories.of(states, parameters=np.arange(4.0)[:, None], mask=np.ones(()))
    options = {"history": 2, "horizon": 1, "batch_size": 4, "given": ("parameters", "mask")}
    windows = Windows(data, [1, 3], **options)
    assert len(windows) == 2
    found = [windows(n) for n in range(2)]
    past, targets, parameters, mask = (torch.cat(part) for part in zip(*found, strict=True))
    assert sorted(past[:, 0, 0].tolist()) == [6, 7, 8, 9, 18, 19, 20, 21]
    assert torch.equal(targets[:, 0], past[:, 1] + 1)
    assert torch.equal(parameters[:, 0], (past[:, 0, 0] >= 18).float() * 2 + 1)
    assert mask.shape == (8,)
    lazy = Windows(data, [1, 3], in_memory=False, **options)
    for n in range(4):
        assert all(torch.equal(a, b) for a, b in zip(windows(n), lazy(n), strict=True))
    statistics = Statistics.of(data, [1, 3])
    normal = Windows(data, [1, 3], statistics=statistics, **options)(0)
    torch.testing.assert_close(statistics.restore(normal[0]), windows(0)[0])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"states": np.zeros((2, 3))}, "case, time, channel"),
        ({"states": np.full((1, 2, 1), np.nan)}, "Frame 0 of case 0 of .* holds"),
        ({"states": np.array([[["x"]]])}, "are numbers"),
        ({"channels": ("a", "b")}, "1 channel names, not 2"),
        ({"dt": 0.0}, "is positive"),
        ({"times": [0.0, 1.0, 3.0]}, "not uniform"),
        ({"times": [0.0, -1.0]}, "ascend"),
        ({"parameters": np.zeros((5, 1))}, "rows of parameters, not 5"),
        ({"parameters": np.full((2, 1), np.inf)}, "not finite"),
        ({"mask": np.ones((1, 5))}, "does not fit the grid"),
        ({"states": [np.zeros((2, 1, 4)), np.zeros((3, 1, 5))]}, "same channels and grid"),
    ],
)
def test_wrong_arrays_are_one_sentence(change, sentence):
    asked = {"states": np.zeros((2, 3, 1, 4))} | change
    with pytest.raises(RequestError, match=sentence) as caught:
        Trajectories.of(asked.pop("states"), **asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_damaged_files_are_one_sentence(tmp_path, suffix):
    if suffix == ".h5":
        pytest.importorskip("h5py")
    path = tmp_path / f"a{suffix}"
    example(cases=2)[1].save(path)
    content = path.read_bytes()
    hostile = [b"", b"not a file", content[: len(content) // 2], content[:100]]
    for cut in hostile:
        path.write_bytes(cut)
        with pytest.raises(RequestError) as caught:
            open_trajectories(path).tensor()
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    for missing in (tmp_path / f"no{suffix}", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(RequestError, match=r"does not exist|holds no"):
            open_trajectories(missing)


def test_objects_and_links_are_never_followed(tmp_path):
    np.savez(tmp_path / "o.npz", states=np.array([object()]), meta=np.zeros(3, np.uint8))
    with pytest.raises(RequestError, match="not the file expected"):
        open_trajectories(tmp_path / "o.npz")
    np.savez(tmp_path / "m.npz", states=np.zeros((1, 2, 1)), meta=np.frombuffer(b"{}", np.uint8))
    with pytest.raises(RequestError, match="meta does not say"):
        open_trajectories(tmp_path / "m.npz")
    h5py = pytest.importorskip("h5py")
    example(cases=2)[1].save(tmp_path / "secret.h5")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file.attrs["meta"] = json.dumps({"format": tr.FORMAT, "version": 1, "dt": 1.0})
        file["states"] = h5py.ExternalLink("secret.h5", "/states")
    with pytest.raises(RequestError, match="link into another file"):
        open_trajectories(tmp_path / "link.h5")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.attrs["meta"] = json.dumps({"format": tr.FORMAT, "version": 1, "dt": 1.0})
        layout = h5py.VirtualLayout((2, 7, 2, 4, 6), "f4")
        layout[:] = h5py.VirtualSource("secret.h5", "states", (2, 7, 2, 4, 6))
        file.create_virtual_dataset("states", layout)
    with pytest.raises(RequestError, match="not an array of this file"):
        open_trajectories(tmp_path / "virtual.h5")


def test_damage_that_opening_did_not_meet_and_wrong_meta(tmp_path):
    def torn(case, start, stop):
        raise OSError("inflate() failed")

    data = Trajectories((2, 3, 1, 4), torn, ("u",), name="flow")
    with pytest.raises(RequestError, match="case 1 of 'flow' cannot be read"):
        data.frames(1)
    place = tmp_path / "case0"
    place.mkdir()
    for name in "uv":
        np.save(place / f"{name}.npy", np.zeros((2, 4, 4), np.float32))
    (place / "case.json").write_text("[1]")
    with pytest.raises(RequestError, match="no names with numbers"):
        layouts.cfdbench(tmp_path)
    for wrong in ({"dt": "soon"}, {"spacing": ["x"]}, {"channels": 3}, {"version": 9}):
        meta = {"format": tr.FORMAT, "version": 1, "dt": 1.0, "channels": ["u"]} | wrong
        content = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(tmp_path / "m.npz", states=np.zeros((1, 2, 1)), meta=content)
        with pytest.raises(RequestError, match="not the file expected"):
            open_trajectories(tmp_path / "m.npz")


def test_an_hdf5_file_of_another_kind(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["0000"] = np.zeros(3)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["train"] = np.zeros(3)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["weights"] = np.zeros(3)
    for name in "abc":
        with pytest.raises(RequestError, match="not the file expected"):
            open_trajectories(tmp_path / f"{name}.h5")


def test_without_h5py_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(RequestError, match=r"pip install 'pantarhei\[fields\]'"):
        example(cases=2)[1].save(tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


def zarr_set(path, **about):
    """Save an example as Zarr and return its states."""
    pytest.importorskip("zarr")
    states, data = example(cases=3, **about)
    data.save(path)
    return states


def test_a_case_of_a_zarr_group_that_got_lost_is_refused(tmp_path):
    states = zarr_set(tmp_path / "a.zarr")
    (tmp_path / "a.zarr/states/c/1/0/0/0/0").unlink()
    again = open_trajectories(tmp_path / "a.zarr")
    np.testing.assert_array_equal(again.frames(2), states[2])
    with pytest.raises(RequestError, match="Frame 0 of case 1 of 'example' holds a value"):
        again.frames(1)


def test_zarr_of_format_2_is_read(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    states = RNG.normal(size=(2, 5, 1, 4)).astype(np.float32)
    group.create_array("states", data=states, chunks=(1, 2, 1, 4))
    meta = {"format": tr.FORMAT, "version": 1, "dt": 0.5, "channels": ["u"]}
    group.attrs["meta"] = json.dumps(meta)
    np.testing.assert_array_equal(open_trajectories(tmp_path / "a.zarr").tensor(), states)


def test_pdearena_in_zarr(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "train.zarr", mode="w", zarr_format=2)
    fields = {name: RNG.normal(size=(3, 20, 1, 4, 6)).astype(np.float32) for name in "uv"}
    fields["pres"] = RNG.normal(size=(3, 20, 4, 6)).astype(np.float32)
    for name, values in fields.items():
        group.create_array(name, data=values, chunks=(1, 5, *values.shape[2:]))
    group.create_array("time", data=6 * np.arange(20))
    group["time"].attrs["units"] = "hours since 2000-01-01"
    whole = open_trajectories(tmp_path / "train.zarr")
    assert whole.shape == (3, 20, 3, 4, 6) and whole.channels == ("pres", "u", "v")
    assert whole.dt == 6 and whole.settings == {"time": "hours since 2000-01-01"}
    np.testing.assert_array_equal(whole.frames(1, 3, 5)[:, 0], fields["pres"][1, 3:5])
    np.testing.assert_array_equal(whole.frames(1, 3, 5)[:, 2], fields["v"][1, 3:5, 0])
    two_days = layouts.pdearena_zarr(tmp_path / "train.zarr", first=4, every=8)
    assert two_days.shape[1] == 2 and two_days.dt == 48
    np.testing.assert_array_equal(two_days.frames(2)[:, 1], fields["u"][2, [4, 12], 0])
    with pytest.raises(RequestError, match="there are 20 frames"):
        layouts.pdearena_zarr(tmp_path / "train.zarr", first=20)
    group["u"].attrs["scale_factor"] = 0.1
    with pytest.raises(RequestError, match="are packed"):
        open_trajectories(tmp_path / "train.zarr")
    del group["u"].attrs["scale_factor"]
    group["time"][3] = 17
    with pytest.raises(RequestError, match="not uniform"):
        open_trajectories(tmp_path / "train.zarr")


def at(*keys, put):
    """Change JSON in place, where the keys lead."""

    def change(path):
        value = whole = json.loads(path.read_text())
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = put
        path.write_text(json.dumps(whole))

    return change


@pytest.mark.parametrize(
    ("where", "change", "sentence"),
    [
        ("states/zarr.json", at("data_type", put="string"), "holds string, not numbers"),
        ("states/zarr.json", at("codecs", put=[{"name": "pickle"}]), "packed by 'pickle'"),
        ("states/zarr.json",
         at("codecs", 0, "configuration", "codecs", 0, "name", put="evil"), "packed by 'evil'"),
        ("states/zarr.json", at("codecs", put=[7]), ""),
        ("states/zarr.json",
         at("codecs", 0, "configuration", "chunk_shape", put=[1, 10**12, 2, 4, 6]), "chunk"),
        ("states/zarr.json", at("shape", put=[3, 7, 2, 4]), ""),
        ("states/zarr.json", at("shape", put="many"), ""),
        ("parameters/zarr.json", at("shape", put=[10**9, 10**9]), "larger than any set has"),
        ("zarr.json", at("attributes", put=[1]), ""),
        ("zarr.json", at("attributes", put={"meta": {"format": "mine"}}), "not say that these"),
        ("zarr.json", at("attributes", put={}), "neither meta nor pres, u and v"),
        ("zarr.json", lambda path: path.write_text("[1"), ""),
        ("zarr.json", lambda path: path.write_text("[1]"), "holds no names"),
        ("states/zarr.json", lambda path: path.unlink(), "states"),
        ("states/c/0/0/0/0/0", lambda path: path.write_bytes(path.read_bytes()[:50]), ""),
        ("states/c/0/0/0/0/0", lambda path: path.write_bytes(b""), ""),
        ("states/c/0/0/0/0/0", lambda path: (path.unlink(), path.symlink_to("/etc/hostname")),
         "'0' inside is a link"),
        ("mask", lambda path: path.rename(path.with_name("m")) and path.symlink_to("m"), "a link"),
        ("pipe", os.mkfifo, "'pipe' inside is a link, or not a file"),
    ],
)  # fmt: skip
def test_hostile_zarr_is_one_sentence(tmp_path, where, change, sentence):
    zarr_set(tmp_path / "a.zarr")
    change(tmp_path / "a.zarr" / where)
    with pytest.raises(RequestError, match=sentence or None) as caught:
        open_trajectories(tmp_path / "a.zarr").tensor()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_pickle_in_zarr_is_never_run(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=2)
    group.attrs["meta"] = {"format": tr.FORMAT, "version": 1, "dt": 1.0, "channels": ["u"]}
    group.create_array("states", data=np.zeros((1, 2, 1), np.float32))
    about = tmp_path / "a.zarr" / "states" / ".zarray"
    for change in ({"filters": [{"id": "pickle", "protocol": 5}]}, {"dtype": "|O"}):
        about.write_text(json.dumps(json.loads(about.read_text()) | change))
        with pytest.raises(RequestError, match=r"packed by 'pickle'|not numbers"):
            open_trajectories(tmp_path / "a.zarr")
        about.write_text(json.dumps(json.loads(about.read_text()) | {"filters": None}))


def test_a_zarr_group_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    states, data = example(cases=3)
    pytest.importorskip("zarr")

    def torn(case, start, stop):
        if case == 2:
            raise OSError("gone")
        return states[case, start:stop]

    half = Trajectories(states.shape, torn, data.channels, name="flow")
    with pytest.raises(RequestError, match="case 2 of 'flow' cannot be read"):
        half.save(tmp_path / "a.zarr")
    assert not list(tmp_path.iterdir())
    data.save(tmp_path / "a.zarr")
    with pytest.raises(RequestError, match="there already"):
        half.save(tmp_path / "a.zarr")
    (tmp_path / ".tmp-left.zarr").mkdir()  # of a call that was killed
    np.testing.assert_array_equal(open_trajectories(tmp_path).tensor(), states)
    import sys

    monkeypatch.setitem(sys.modules, "zarr", None)
    for call in (lambda: data.save(tmp_path / "b.zarr"), lambda: open_trajectories(tmp_path)):
        with pytest.raises(RequestError, match=r"needs zarr: .* 'pantarhei\[fields\]'"):
            call()
