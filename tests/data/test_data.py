from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pantarhei import data
from pantarhei.data import Images, Labelled, _read
from pantarhei.errors import RequestError

SHARED = os.environ.get("PANTARHEI_DATA") or str(Path(__file__).parents[3] / "shared" / "data")
needs_shared = pytest.mark.skipif(
    not Path(SHARED, "README.md").is_file(), reason="PANTARHEI_DATA names no folder of data sets"
)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no shared folder."""
    monkeypatch.setenv("PANTARHEI_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PANTARHEI_DATA", raising=False)
    return tmp_path / "home" / "data"


def mnist_npz(folder: Path, mark: int = 0, **changes: object) -> Path:
    """A data set of the shape of MNIST whose first pixel tells where it came from."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.full((4, 28, 28), mark, np.uint8)
    labels = np.array([3, 1, 2, 0], np.uint8)
    arrays = {"train_images": images, "train_labels": labels}
    arrays |= {"test_images": images[:2], "test_labels": labels[:2]}
    np.savez_compressed(folder / "mnist.npz", **(arrays | changes))
    return folder / "mnist.npz"


def idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def mnist_idx(folder: Path, count: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for part, number in (("train", count), ("t10k", 2)):
        images = rng.integers(0, 256, (number, 28, 28)).astype(np.uint8)
        arrays[f"{part}-images-idx3-ubyte.gz"] = images
        arrays[f"{part}-labels-idx1-ubyte.gz"] = np.arange(number, dtype=np.uint8)
    for name, array in arrays.items():
        idx(folder / name, array)
    return arrays


def picture(size: tuple[int, int] = (6, 4), mode: str = "RGB", kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, 7).save(stream, kind)
    return stream.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


# Always there


def test_digits_come_with_scikit_learn_and_lose_nothing():
    from sklearn.datasets import load_digits

    digits, raw = data.load("digits"), load_digits()
    images = np.concatenate([digits.train_images, digits.test_images])
    assert images.dtype == np.uint8 and images.max() == 255
    assert (np.rint(images * (16 / 255)) == raw.images).all()
    assert (np.concatenate([digits.train_labels, digits.test_labels]) == raw.target).all()
    assert len(digits.classes) == 10 and len(digits.test_images) == 360


def test_photographs_need_no_download(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tried to download")

    monkeypatch.setattr("pooch.retrieve", refuse)
    monkeypatch.setattr("pooch.core.Pooch.fetch", refuse)
    color, gray = data.load("photographs"), data.load("photographs_gray")
    assert {"astronaut", "chelsea", "coffee", "china"} <= set(color.names)
    assert all(i.ndim == 3 and i.shape[2] == 3 and i.dtype == np.uint8 for i in color.images)
    assert {"camera", "astronaut"} <= set(gray.names) and len(gray) > len(color)
    assert all(image.ndim == 2 and image.dtype == np.uint8 for image in gray.images)
    assert dict(zip(color.names, color.lossless, strict=True))["china"] is False
    astronaut = color.images[color.names.index("astronaut")].astype(float)
    luma = gray.images[gray.names.index("astronaut")]
    assert np.abs(astronaut @ (0.299, 0.587, 0.114) - luma).max() <= 1


# Where data sets are looked for


def test_each_place_is_asked_in_order(tmp_path, monkeypatch, places):
    def mark(path: Path | None = None) -> int:
        return int(data.load("mnist", path).train_images[0, 0, 0])

    mnist_npz(places / "mnist", 1)
    assert mark() == 1  # the cache
    mnist_npz(tmp_path / "shared" / "mnist", 2)
    monkeypatch.setenv("PANTARHEI_DATA", str(tmp_path / "shared"))
    assert mark() == 2
    mnist_npz(tmp_path / "own folder", 3)
    for path in (tmp_path / "own folder", tmp_path / "own folder" / "mnist.npz"):
        assert mark(path) == 3
    assert mark(tmp_path / "shared") == 2  # the folder above
    where = {row.name: row for row in data.located()}["mnist"]
    assert where.found and where.where == str(tmp_path / "shared" / "mnist")


def test_files_may_lie_in_the_shared_folder_itself(tmp_path, monkeypatch):
    mnist_npz(tmp_path, 4)
    monkeypatch.setenv("PANTARHEI_DATA", str(tmp_path))
    assert data.load("mnist").train_images[0, 0, 0] == 4


def test_a_path_given_is_the_only_place(tmp_path, places):
    mnist_npz(places / "mnist")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        RequestError, match=r"'.*empty' does not hold data set 'mnist': it needs mnist"
    ):
        data.load("mnist", tmp_path / "empty")
    with pytest.raises(RequestError, match="does not exist"):
        data.load("mnist", tmp_path / "nowhere")
    (tmp_path / "empty" / "other.npz").write_bytes(b"")
    with pytest.raises(RequestError, match="does not hold"):
        data.load("mnist", tmp_path / "empty" / "other.npz")


def test_a_set_that_is_nowhere_says_what_to_put_where():
    with pytest.raises(RequestError, match=r"put train400_gray\.zip into a folder 'images_train'"):
        data.load("images_train")
    with pytest.raises(RequestError, match="not on this machine"):
        data.load("mnist", download=False)
    where = {row.name: row for row in data.located()}
    assert not where["images_train"].found and "train400_gray.zip" in where["images_train"].where
    assert "downloaded" in where["mnist"].where


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(RequestError, match=r"'cifar'.* Did you mean 'cifar10'"):
        data.load("cifar")


def test_a_download_is_checked_kept_and_used_again(tmp_path, monkeypatch, places):
    arrays = mnist_idx(tmp_path / "server")
    asked = []

    def retrieve(url: str, known_hash: str, fname: str, path: Path, **_: object) -> None:
        asked.append(url)
        if "yann" in url:
            raise ConnectionError("refused")
        assert known_hash.startswith("md5:") and len(known_hash) == 36
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, fname).write_bytes((tmp_path / "server" / fname).read_bytes())

    monkeypatch.setattr("pooch.retrieve", retrieve)
    mnist = data.load("mnist")
    assert (mnist.train_images == arrays["train-images-idx3-ubyte.gz"]).all()
    assert mnist.train_labels.tolist() == [0, 1, 2, 3, 4] and len(mnist.test_images) == 2
    assert len(asked) == 5  # the first address failed once, the second served four files
    assert (data.load("mnist").train_images == mnist.train_images).all()
    assert len(asked) == 5 and len(list((places / "mnist").iterdir())) == 4


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), ValueError("hash differs"), OSError()]
)
def test_a_failed_download_is_one_sentence(monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("pooch.retrieve", fail)
    with pytest.raises(
        RequestError, match=r"could not be downloaded \(.*cs\.toronto.*\): put cifar-10"
    ):
        data.load("cifar10")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    monkeypatch.delenv("PANTARHEI_HOME")
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: Path("~") / name)
    with pytest.raises(RequestError, match="set PANTARHEI_HOME"):
        data.cache()


# Formats


def test_fashion_mnist_is_put_back_into_its_original_order(tmp_path):
    folder = tmp_path / "fashion_mnist"
    mnist_npz(folder).rename(folder / "fashion_mnist.npz")
    order = {
        "train_order": np.array([2, 0, 3, 1], np.uint16),
        "test_order": np.array([1, 0], np.uint16),
    }
    np.savez(folder / "original_order.npz", **order)
    fashion = data.load("fashion_mnist", folder)
    assert fashion.train_labels.tolist() == [2, 3, 0, 1] and fashion.test_labels.tolist() == [1, 3]
    order["train_order"] = np.array([0, 0, 1, 2], np.uint16)
    np.savez(folder / "original_order.npz", **order)
    with pytest.raises(RequestError, match=r"original_order\.npz' is not the file expected"):
        data.load("fashion_mnist", folder)


def test_cifar_binary_and_jpeg_copies_are_read(tmp_path):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (6, 10_000, 3073), dtype=np.uint8)
    records[:, :, 0] %= 10
    names = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz", compresslevel=0) as out:
        for name, batch in [
            ("readme.html", np.zeros(9, np.uint8)),
            *zip(names, records, strict=True),
        ]:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = batch.nbytes
            out.addfile(entry, io.BytesIO(batch.tobytes()))
    cifar = data.load("cifar10", tmp_path)
    assert cifar.source == "original pixels" and cifar.classes[3] == "cat"
    assert cifar.train_images.shape == (50_000, 32, 32, 3)
    assert cifar.train_images[10_001, 2, 3].tolist() == records[1, 1, [68, 1092, 2116]].tolist()
    assert cifar.test_labels.tolist() == records[5, :, 0].tolist()

    files = [picture((32, 32), kind="JPEG")] * 3
    arrays = {}
    for part in ("train", "test"):
        arrays[f"{part}_jpeg"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"{part}_offsets"] = np.cumsum([0, *map(len, files)])
        arrays[f"{part}_labels"] = np.arange(3, dtype=np.uint8)
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    assert data.load("cifar10", tmp_path).source == "original pixels"  # the better copy wins
    copy = data.load("cifar10", tmp_path / "cifar10_jpeg.npz")
    assert copy.source == "JPEG-75 copy" and copy.train_images.shape == (3, 32, 32, 3)


def test_images_are_read_in_order_grey_or_colour(tmp_path):
    members = {"b.png": picture(mode="L"), "a.jpg": picture(kind="JPEG"), "notes.txt": b"x"}
    archive(tmp_path / "train400_gray.zip", members)
    images = data.load("images_train", tmp_path)
    assert images.names == ("a", "b") and images.lossless == (False, False)
    assert [image.shape for image in images.images] == [(4, 6, 3), (4, 6)]


# Hostile files


@pytest.mark.parametrize(
    "changes",
    [
        {"train_images": np.zeros((4, 28, 27), np.uint8)},
        {"train_images": np.zeros((4, 28, 28), np.float32)},
        {"train_images": np.zeros((5, 28, 28), np.uint8)},
        {"train_labels": np.array([0, 1, 2, 99], np.uint8)},
        {"train_labels": np.array([0, 1, 2, -1], np.int8)},
        {"test_images": np.zeros((0, 28, 28), np.uint8), "test_labels": np.zeros(0, np.uint8)},
        {"train_images": np.array([{"a": 1}] * 4, dtype=object)},
    ],
)
def test_arrays_of_another_shape_or_kind_are_refused(tmp_path, changes):
    path = mnist_npz(tmp_path, **changes)
    with pytest.raises(RequestError, match=r"mnist\.npz' is not the file expected"):
        data.load("mnist", path)


def test_a_pickle_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "ran").touch, ())

    path = mnist_npz(tmp_path, train_labels=np.array([Bomb()] * 4, dtype=object))
    with pytest.raises(RequestError, match="not the file expected"):
        data.load("mnist", path)
    assert not (tmp_path / "ran").exists()


def test_a_header_that_promises_the_world_is_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 28, 28)}
    )
    archive(
        tmp_path / "mnist.npz", {f"{name}.npy": header.getvalue() for name in ("train_images",)}
    )
    with pytest.raises(RequestError, match="not the file expected"):
        data.load("mnist", tmp_path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(_read, "_MOST_BYTES", 10_000)
    archive(tmp_path / "set5.zip", {"a.png": b"\0" * 20_000})
    with pytest.raises(RequestError, match="more inside"):
        data.load("set5", tmp_path)
    monkeypatch.setattr(_read, "_MOST_MEMBERS", 2)
    archive(tmp_path / "set5.zip", {f"{n}.png": picture() for n in range(3)})
    with pytest.raises(RequestError, match="more inside"):
        data.load("set5", tmp_path)
    idx(tmp_path / "train-images-idx3-ubyte.gz", np.zeros((20, 28, 28), np.uint8))
    with pytest.raises(RequestError, match="not the file expected"):
        _read.idx(tmp_path / "train-images-idx3-ubyte.gz", (None, 28, 28))


def test_a_decompression_bomb_of_a_picture_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_read, "_MOST_PIXELS", 20)
    archive(tmp_path / "set5.zip", {"a.png": picture()})
    with pytest.raises(RequestError, match="a picture of 6 x 4"):
        data.load("set5", tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(RequestError, match="not the file expected"):
        data.load("set5", tmp_path)


def test_names_that_climb_out_write_nothing(tmp_path):
    archive(tmp_path / "in" / "set5.zip", {"../../climbed.png": picture(), "/root.png": picture()})
    assert len(data.load("set5", tmp_path / "in")) == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "set5.zip"]


def test_a_tar_with_an_absurd_member_is_refused(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as out:
        entry = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        entry.size = 40_000_000
        out.addfile(entry, io.BytesIO(b"\0" * entry.size))
    with pytest.raises(RequestError, match="not the file expected"):
        data.load("cifar10", tmp_path)


@example(content=b"\x08\x04", name="cifar-10-binary.tar.gz")
@given(
    st.binary(max_size=300), st.sampled_from(["mnist.npz", "set5.zip", "cifar-10-binary.tar.gz"])
)
def test_arbitrary_bytes_are_one_sentence(tmp_path_factory, content, name):
    folder = tmp_path_factory.mktemp("bytes")
    heads = {
        "mnist.npz": b"PK\x03\x04",
        "set5.zip": b"PK\x05\x06",
        "cifar-10-binary.tar.gz": b"\x1f\x8b",
    }
    sets = {"mnist.npz": "mnist", "set5.zip": "set5", "cifar-10-binary.tar.gz": "cifar10"}
    for head in (b"", heads[name]):
        (folder / name).write_bytes(head + content)
        with pytest.raises(RequestError, match="not the file expected"):
            data.load(sets[name], folder)


@given(cut=st.floats(0, 0.999))
def test_a_truncated_file_is_one_sentence(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("cut")
    mnist_idx(folder)
    path = folder / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(RequestError, match=r"train-images.*' is not the file expected"):
        data.load("mnist", folder)


# The real files


@needs_shared
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_shared_copy_is_the_original_bit_for_bit(name):
    expected = {
        "mnist": ("6bbc9ace898e44ae57da46a324031adb", "2646ac647ad5339dbf082846283269ea"),
        "fashion_mnist": (None, None),
    }[name]
    found = data.load(name, SHARED)
    assert isinstance(found, Labelled)
    assert found.train_images.shape == (60_000, 28, 28) and len(found.test_labels) == 10_000
    for images, md5 in zip((found.train_images, found.test_images), expected, strict=True):
        head = struct.pack(">BBBB3I", 0, 0, 8, 3, *images.shape)
        if md5 is not None:
            assert hashlib.md5(head + images.tobytes()).hexdigest() == md5
    first = {"mnist": [5, 0, 4, 1, 9], "fashion_mnist": [9, 0, 0, 3, 0]}[name]
    assert found.train_labels[:5].tolist() == first


@needs_shared
@pytest.mark.parametrize(
    ("name", "count", "lossless"),
    [("images_train", 400, False), ("images_test", 53, True), ("classic5", 5, True)],
)
def test_the_shared_images_are_read(name, count, lossless):
    found = data.load(name, SHARED)
    assert isinstance(found, Images) and len(found) == count == len(set(found.names))
    assert set(found.lossless) == {lossless}
    assert all(image.dtype == np.uint8 and image.ndim in (2, 3) for image in found.images)


@needs_shared
def test_the_shared_cifar_says_that_it_is_a_copy():
    found = data.load("cifar10", SHARED)
    assert found.source == "JPEG-75 copy"
    assert np.bincount(found.train_labels).tolist() == [5000] * 10
    assert found.train_labels[:5].tolist() == [6, 9, 9, 4, 1]
