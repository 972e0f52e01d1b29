"""Array files made to hurt: each is one sentence, takes no memory and opens no other file."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count

import numpy as np
import pytest

from pantarhei.data import _read, layouts, table
from pantarhei.data import trajectories as tr
from pantarhei.data.recordings import read_recordings
from pantarhei.data.trajectories import open_trajectories
from pantarhei.errors import RequestError

META = {"format": tr.FORMAT, "version": 1, "dt": 1.0, "channels": ["u"]}
BOMB = 2**26  # bytes that 16 or 32 of a shape unpack to
RNG = np.random.default_rng(0)
hdf5 = pytest.mark.skipif(not find_spec("h5py"), reason="no h5py")
zarred = pytest.mark.skipif(not find_spec("zarr"), reason="no zarr")


@pytest.fixture(scope="module", autouse=True)
def traced():
    """Trace memory over the whole module.

    To begin or to end that while a thread unpacks (zarr's do) is a crash of Python's own
    (gh-128679), so it is ended once, when none does any more.
    """
    tracemalloc.start()
    yield
    time.sleep(0.5)
    tracemalloc.stop()


@contextmanager
def little_memory():
    """Expect less memory to be taken than what is packed inside."""
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    yield
    assert tracemalloc.get_traced_memory()[1] - before < BOMB // 2  # LZMA has 8 MiB a thread


def refused(sentence, path, read):
    """Expect one sentence with the file's name, and little memory."""
    with little_memory(), pytest.raises(RequestError, match=sentence) as caught:
        read(path)
    assert "\n" not in str(caught.value) and path.stem in str(caught.value)


def all_frames(path):
    data = open_trajectories(path)
    return np.stack([data.frames(case) for case in range(len(data))])


# ---- HDF5 ------------------------------------------------------------------------------------

PACKED = [
    {"compression": "gzip"},
    {"compression": "gzip", "shuffle": True},
    {"compression": "gzip", "shuffle": True, "fletcher32": True},
    {"compression": "lzf"},
    {"compression": "lzf", "shuffle": True},
    {"fletcher32": True},
]


def lzf_zeros(size):
    """LibLZF's format for zeros: one literal, and copies of 264 of what stands before."""
    copies, rest = divmod(size - 1, 264)
    return b"\0\0" + b"\xe0\xff\0" * copies + b"\0\0" * rest


def write_h5(path, states, **about):
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["meta"] = json.dumps(META)
        file.create_dataset("states", data=states, **about)
    return path


@hdf5
@pytest.mark.parametrize("about", PACKED)
@pytest.mark.parametrize("values", [RNG.normal(size=(3, 5, 1, 6)), np.zeros((3, 5, 1, 6))])
def test_packed_hdf5_is_read_as_it_was_written(tmp_path, about, values):
    path = write_h5(tmp_path / "a.h5", values, chunks=(2, 2, 1, 4), **about)
    np.testing.assert_array_equal(all_frames(path), values)
    np.testing.assert_array_equal(open_trajectories(path).frames(2, 3, 5), values[2, 3:5])


@hdf5
def test_a_packed_chunk_that_was_never_written_is_one_value(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["meta"] = json.dumps(META)
        states = file.create_dataset(
            "states", (2, 2, 1, 4), "f4", chunks=(1, 1, 1, 4), compression="gzip", fillvalue=7
        )
        states[1, 1] = 3
    assert all_frames(tmp_path / "a.h5")[:, :, 0, 0].tolist() == [[7, 7], [7, 3]]


@hdf5
@pytest.mark.parametrize(
    ("about", "content", "sentence"),
    [
        ({"compression": "gzip"}, zlib.compress(bytes(BOMB)), "unpacks to more than its 16"),
        ({"compression": "gzip", "fletcher32": True},
         zlib.compress(bytes(BOMB)) + bytes(4), "unpacks to more than its 16"),
        ({"compression": "lzf"}, lzf_zeros(BOMB), "unpacks to more than its 16"),
        ({"compression": "gzip"}, zlib.compress(bytes(15)), "unpacks to fewer than its 16"),
        ({"compression": "lzf"}, lzf_zeros(15), "unpacks to fewer than its 16"),
        ({"compression": "gzip"}, bytes(BOMB), f"has {BOMB} bytes"),
        ({"fletcher32": True}, bytes(BOMB), f"has {BOMB} bytes"),
        ({"compression": "gzip"}, b"no stream of zlib", "incorrect header"),
    ],
)  # fmt: skip
def test_a_chunk_that_is_not_its_shape_s_size_is_never_unpacked(tmp_path, about, content, sentence):
    import h5py

    path = write_h5(tmp_path / "a.h5", np.ones((1, 2, 1, 4), "f4"), chunks=(1, 1, 1, 4), **about)
    with h5py.File(path, "r+") as file:
        file["states"].id.write_direct_chunk((0, 1, 0, 0), content)
    assert open_trajectories(path).frames(0, 0, 1).max() == 1  # the other chunk
    refused(f"Frames 0 to 2 of case 0.*{sentence}", path, all_frames)


@hdf5
def test_hdf5_s_claims_are_checked_when_it_is_opened(tmp_path):
    import h5py

    fresh = (tmp_path / f"claim{n}.h5" for n in count())

    def claim(sentence, shape, dtype="f4", name="states", **about):
        path = next(fresh)
        with h5py.File(path, "w") as file:
            file.attrs["meta"] = json.dumps(META)
            if name != "states":
                file["states"] = np.ones((1, 2, 1, 4), "f4")
            file.create_dataset(name, shape, dtype, **about)
        refused(sentence, path, open_trajectories)

    one = (1, 1, 1, 4)
    claim("'states' is to have 1073741824 bytes, the file has", (1, 2**26, 1, 4))
    claim("larger than any set has", (1, 1, 1, 2**30), chunks=one)
    claim("larger than any set has", (2**20, 2**20, 1, 4), chunks=one)
    claim("chunk of 'states' is larger", (1, 40, 2**26), chunks=(1, 40, 2**24), compression="gzip")
    claim("cut into more than", (1, 2, 1, 2**21), chunks=(*one[:3], 1), compression="gzip")
    claim("'parameters' is cut into more", (2**11, 2**11), name="parameters", chunks=(1, 1))
    claim("filter 6, which is not read", (1, 2, 1, 4), "i4", chunks=one, scaleoffset=3)
    claim("holds object, not numbers", (1, 2, 1, 4), h5py.vlen_dtype(float))
    claim("holds object, not numbers", (1, 2, 1, 4), h5py.string_dtype())
    for name in ("parameters", "mask", "lengths"):
        claim(f"'{name}' of shape .* is larger than any set has", (2**26, 2**10), name=name,
              chunks=(2**16, 1), compression="gzip")  # fmt: skip


@hdf5
def test_hdf5_packed_twice_or_with_a_lie_about_its_chunks(tmp_path):
    import h5py

    def filtered(*filters):
        path = tmp_path / f"{filters[1][0]}.h5"
        with h5py.File(path, "w") as file:
            file.attrs["meta"] = json.dumps(META)
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_chunk((1, 1, 1, 4))
            for code, values in filters:
                plist.set_filter(code, 0, values)
            space = h5py.h5s.create_simple((1, 2, 1, 4))
            h5py.h5d.create(file.id, b"states", h5py.h5t.NATIVE_FLOAT, space, plist)
        return path

    refused("packed twice", filtered((1, (4,)), (1, (4,))), open_trajectories)
    refused("mixed after packing", filtered((1, (4,)), (2, ())), open_trajectories)


@hdf5
def test_no_name_leads_out_of_an_hdf5_file(tmp_path):
    import h5py

    os.mkfifo(tmp_path / "pipe.h5")  # whoever opens it waits for ever
    link = h5py.ExternalLink("pipe.h5", "/x")

    fresh = (tmp_path / f"linked{n}.h5" for n in count())

    def laid(*links):
        path = next(fresh)
        with h5py.File(path, "w") as file:
            for name, target in links:
                file[name] = target
        return path

    about = ("out", link), ("states", h5py.SoftLink("/out"))
    refused("'states' is a link", laid(*about), lambda p: with_meta(p) or open_trajectories(p))
    for name in ("train", "0000", "density"):
        refused(f"'{name}' is a link", laid((name, link)), open_trajectories)
    refused("'train' is a link", laid(("train", link)), lambda p: layouts.pdearena([p]))
    numbers = np.ones((2, 3, 4, 1), "f4")
    refused("'grid' is a link", laid(("0000/data", numbers), ("0000/grid", link)), layouts.pdebench)
    refused("'t' is a link", laid(("0000/data", numbers), ("0000/t", link)), layouts.pdebench)
    fields = [(f"train/{name}", numbers) for name in ("u", "vx", "vy")]
    for name in ("buo_y", "dt", "dx"):
        refused(f"'{name}' is a link", laid(*fields, (f"train/{name}", link)), open_trajectories)
    refused("not a file", tmp_path / "pipe.h5", open_trajectories)
    (tmp_path / "secret.bin").write_bytes(bytes(32))
    raw = [("secret.bin", 0, 32)]
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file.attrs["meta"] = json.dumps(META)
        file.create_dataset("states", (1, 2, 1, 4), "f4", external=raw)
    refused("'states' is not an array of this file", tmp_path / "linked.h5", open_trajectories)


def with_meta(path):
    import h5py

    with h5py.File(path, "r+") as file:
        file.attrs["meta"] = json.dumps(META)


# ---- Zarr ------------------------------------------------------------------------------------


def packers(version):
    import numcodecs
    from zarr import codecs

    if version == 3:
        return {
            "zstd": [codecs.ZstdCodec()],
            "gzip": [codecs.GzipCodec()],
            "blosc": [codecs.BloscCodec(shuffle="bitshuffle")],
            "gzip, crc32c": [codecs.GzipCodec(), codecs.Crc32cCodec()],
            "crc32c, zstd": [codecs.Crc32cCodec(), codecs.ZstdCodec()],
        }
    made = (numcodecs.Blosc, numcodecs.Zstd, numcodecs.LZ4, numcodecs.Zlib, numcodecs.GZip,
            numcodecs.BZ2, numcodecs.LZMA)  # fmt: skip
    return {codec.codec_id: codec() for codec in made}


KINDS = [
    *((3, kind) for kind in ("zstd", "gzip", "blosc", "gzip, crc32c", "crc32c, zstd")),
    *((2, kind) for kind in ("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma")),
]


def write_zarr(path, states, version=3, kind="zstd", **about):
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=version)
    group.attrs["meta"] = META
    about = {"chunks": (1, 1, *states.shape[2:]), "compressors": packers(version)[kind]} | about
    group.create_array("states", data=states, **about)
    return path


def shrunk(path, old, new):
    """Change a length, wherever the metadata of the states has it."""
    file = next(f for f in (path / "states/zarr.json", path / "states/.zarray") if f.is_file())
    text = file.read_text()
    assert str(old) in text
    file.write_text(text.replace(str(old), str(new)))


@zarred
@pytest.mark.parametrize(("version", "kind"), KINDS)
@pytest.mark.parametrize("sharded", [False, True])
def test_a_zarr_chunk_is_read_at_its_size_and_at_no_other(tmp_path, version, kind, sharded):
    if sharded and version == 2:
        return
    about = {"shards": (1, 2, 1, 8)} if sharded else {}
    values = RNG.normal(size=(2, 4, 1, 8)).astype(np.float32)
    path = write_zarr(tmp_path / "a.zarr", values, version, kind, **about)
    np.testing.assert_array_equal(all_frames(path), values)

    long = BOMB // 4 + 1357
    about = {"shards": (1, 2, 1, long)} if sharded else {}
    values = np.ones((1, 2, 1, long), np.float32)
    path = write_zarr(tmp_path / "bomb.zarr", values, version, kind, **about)
    shrunk(path, long, 8)
    refused("cannot be read", path, all_frames)


@zarred
def test_zarr_s_claims_are_checked_when_it_is_opened(tmp_path):
    states = np.ones((1, 2, 1, 1234), np.float32)

    def changed(sentence, change, **about):
        path = write_zarr(tmp_path / "claim.zarr", states, **about)
        file = next(f for f in (path / "states/zarr.json", path / "states/.zarray") if f.is_file())
        whole = json.loads(file.read_text())
        change(whole)
        file.write_text(json.dumps(whole))
        refused(sentence, path, open_trajectories)

    def codecs(*names):
        def change(whole):
            whole["codecs"] += [{"name": name, "configuration": {"level": 1}} for name in names]

        return change

    changed("packed twice", codecs("gzip"))
    changed("packed twice", codecs("gzip"), shards=(1, 2, 1, 1234))
    changed("larger than any set has", lambda w: w.update(shape=[1, 2, 1, 2**30]))
    changed("larger than any set has", lambda w: w.update(shape=[2**30, 2, 1, 1234]))
    changed(
        "not the file expected",
        lambda w: w["chunk_key_encoding"]["configuration"].update(separator="/../"),
    )

    def crumbs(whole):
        whole["shape"][3] = 2**21
        whole["chunk_grid"]["configuration"]["chunk_shape"][3] = 1

    changed("cut into more than", crumbs)

    def wide(whole):
        whole["chunk_grid"]["configuration"]["chunk_shape"] = [2**12, 2**12, 1, 1234]

    changed("more than 4194304 chunks", wide, shards=(1, 2, 1, 1234))
    old = {"version": 2, "kind": "zlib"}
    for filter in ("zlib", "shuffle"):
        changed(f"packed by '{filter}', which is not read",
                lambda w, f=filter: w.update(filters=[{"id": f}]), **old)  # fmt: skip
    changed("not the file expected", lambda w: w.update(dimension_separator="/../"), **old)


@zarred
def test_a_zarr_store_in_a_zip_is_not_opened(tmp_path):
    path = write_zarr(tmp_path / "a.zarr", np.ones((1, 2, 1, 4), np.float32))
    with zipfile.ZipFile(tmp_path / "b.zarr", "w") as archive:
        for file in path.rglob("*"):
            archive.write(file, file.relative_to(path))
    refused("not the file expected", tmp_path / "b.zarr", open_trajectories)


# ---- npz -------------------------------------------------------------------------------------


def npy(values, shape=None, version=(1, 0)):
    """An npy file's bytes, whose header may claim another shape."""
    about = np.lib.format.header_data_from_array_1_0(values)
    about["shape"] = values.shape if shape is None else shape
    text = str(about).encode().ljust(117) + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + values.tobytes()


META_NPY = npy(np.frombuffer(json.dumps(META).encode(), np.uint8))
FRAMES = np.ones((1, 2, 1, 4), np.float32)


def pack(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def lied(path, name, size):
    """Say in the directory of a zip that a member unpacks to another size."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\1\2")
    while not content[entry + 46 :].startswith(f"{name}.npy".encode()):
        entry = content.index(b"PK\1\2", entry + 1)
    content[entry + 24 : entry + 28] = struct.pack("<I", size)
    path.write_bytes(content)
    return path


READERS = {
    "trajectories": (all_frames, {"meta": META_NPY, "states": npy(FRAMES)}, "states"),
    "recordings": (
        lambda path: list(read_recordings(path)),
        {"rate": npy(np.float64(4)), "p": npy(np.ones(9))},
        "p",
    ),
    "table": (table.read_arrays, {"X": npy(np.ones((3, 2))), "y": npy(np.ones(3))}, "X"),
}


@pytest.mark.parametrize("reader", READERS)
def test_an_npz_has_the_sizes_that_it_says(tmp_path, reader, monkeypatch):
    read, members, name = READERS[reader]
    methods = (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_LZMA)
    for method in methods:
        read(pack(tmp_path / "good.npz", members, method))
    path = tmp_path / "bad.npz"

    def hurt(sentence, content, method=zipfile.ZIP_DEFLATED):
        refused(sentence, pack(path, members | {name: content}, method), read)

    for method in methods:
        hurt("'.' says|'states' says", npy(FRAMES, (2**40, 2, 1, 4)), method)
        hurt("'.' says|'states' says", npy(FRAMES, (2**70,)), method)
        hurt("not the file expected", npy(FRAMES, (-2, -4)), method)
        hurt("another version", npy(FRAMES, version=(2, 0)), method)
        hurt("not numbers", npy(np.zeros(3, "V8")), method)
    hurt("'.' says|'states' says", npy(np.ones(1)) + bytes(BOMB))  # behind an honest array
    hurt("packed by method 12", members[name], zipfile.ZIP_BZIP2)
    longer = members[name] + bytes(BOMB)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA):  # the directory's size is the header's
        pack(path, members | {name: longer}, method)
        refused("not the file expected", lied(path, name, len(members[name])), read)
    content = bytearray(pack(path, members, zipfile.ZIP_LZMA).read_bytes())
    content[content.index(f"{name}.npy".encode()) + 80] ^= 1
    path.write_bytes(content)
    refused("not the file expected", path, read)
    claimed = npy(FRAMES, (BOMB,))
    pack(path, members | {name: claimed})
    refused("fewer bytes than is possible", lied(path, name, len(claimed) - 32 + 4 * BOMB), read)
    monkeypatch.setattr(_read, "MOST_AT_ONCE", 100)
    monkeypatch.setattr(tr, "MOST_AT_ONCE", 100)
    refused("compressed,? and too large", pack(path, members), read)


def test_members_of_an_npz_that_overlap_are_refused(tmp_path):
    """One packed array under many names: the zip bomb that needs no nested archive."""
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", npy(np.ones(1000)))
        for number in range(5):
            twin = zipfile.ZipInfo(f"{number}.npy")
            first = archive.getinfo("x.npy")
            for what in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(twin, what, getattr(first, what))
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
    refused("members overlap", path, lambda p: list(read_recordings(p)))


# ---- Parquet and the known sets --------------------------------------------------------------


def test_a_text_of_parquet_that_many_rows_point_to_is_held_once(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows, word = 20_000, "x" * 20_000  # 400 MB if each row had its own
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([word]))
    for column in (names, pa.chunked_array([names, names[:0]])):
        pq.write_table(
            pa.table({"time": np.arange(float(rows)), "p": np.ones(rows), "run": column}),
            tmp_path / "a.parquet",
        )
        before = pa.total_allocated_bytes()
        with little_memory():
            (found,) = read_recordings(tmp_path / "a.parquet", run="run")
        assert found.name == word and len(found["p"].values) == rows
        assert pa.total_allocated_bytes() - before < BOMB


def test_a_list_of_parquet_is_refused_before_it_is_read(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for column in (pa.array([[1.0] * 1000, [2.0]]), pa.array([b"ab", b"c"])):
        pq.write_table(pa.table({"time": [0.0, 1.0], "x": column}), tmp_path / "a.parquet")
        with monkeypatch.context() as patch:
            patch.setattr(pq.ParquetFile, "read", lambda *_: pytest.fail("it was read"))
            refused("column 'x' holds", tmp_path / "a.parquet", lambda p: list(read_recordings(p)))


def test_an_idx_file_is_read_no_further_than_its_shape(tmp_path):
    import gzip

    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abc"))
    assert _read.idx(path, (None,)).tobytes() == b"abc"
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes(BOMB)))
    refused(r"shape \(3,\)", path, lambda p: _read.idx(p, (None,)))
    path.write_bytes(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 2**32 - 1) + bytes(9)))
    refused("shape", path, lambda p: _read.idx(p, (None,)))


def test_a_cifar_archive_is_unpacked_no_further_than_the_original(tmp_path, monkeypatch):
    """A header of tar may have any size, and is read whole."""
    import gzip
    import tarfile

    monkeypatch.setattr(_read, "_CIFAR_RECORDS", 10_000)
    entry = tarfile.TarInfo("batch")
    entry.type, entry.size = tarfile.XHDTYPE, BOMB
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(entry.tobuf() + bytes(BOMB)))
    refused("more inside than the archive has", path, _read.cifar_binary)


def test_cfdbench_folders_hold_plain_files_of_the_size_that_they_say(tmp_path):
    place = tmp_path / "case0"
    place.mkdir()
    (place / "case.json").write_text("{}")
    for name in "uv":
        (place / f"{name}.npy").write_bytes(npy(np.ones((2, 4, 4), np.float32)))
    assert layouts.cfdbench(tmp_path).shape == (1, 2, 2, 4, 4)
    (place / "u.npy").write_bytes(npy(np.ones((2, 4, 4), np.float32), (2**40, 4, 4)))
    refused("not the file expected", place, lambda p: layouts.cfdbench(p.parent))
    (place / "u.npy").unlink()
    os.mkfifo(place / "u.npy")
    refused("missing, or not a file", place, lambda p: layouts.cfdbench(p.parent))
