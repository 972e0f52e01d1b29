"""Readers of data files that nobody vouches for: bounded, never unpickling, never unpacking."""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import math
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pantarhei.errors import RequestError

Array = NDArray[np.uint8]

_MOST_BYTES = 2**30  # of one file unpacked; the largest known set has 188 MB
_MOST_MEMBERS = 20_000
_MOST_PIXELS = 50_000_000


DAMAGE: tuple[type[Exception], ...] = (
    TypeError,  # tarfile's own, on a gzip header that ends early
    ValueError,
    LookupError,
    AttributeError,  # Zarr's, and ours, on JSON that holds something else
    AssertionError,
    EOFError,
    OSError,
    MemoryError,
    OverflowError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    tarfile.TarError,
)
"""What a damaged or hostile file provokes in the libraries that read it."""


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes into one sentence that names it."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, RequestError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RequestError(
            f"'{path}' is not the file expected ({reason}): get it again, or remove it."
        ) from error


def needed(module: str, kind: str, extra: str) -> Any:
    """Return the library that reads files of a kind, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(
            f"Reading {kind} needs {module.partition('.')[0]}: install it with "
            f"pip install 'pantarhei[{extra}]'."
        ) from error


def npz(path: Path, shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, NDArray[np.generic]]:
    """Read the arrays named in ``shapes`` from a ``.npz``; None stands for any length."""
    with guarded(path), zipfile.ZipFile(path) as archive:
        _check_members(archive)
        arrays = {}
        for name, shape in shapes.items():
            with archive.open(f"{name}.npy") as member:
                array = np.lib.format.read_array(member, allow_pickle=False)
            fits = array.ndim == len(shape) and all(
                want in (None, have) for want, have in zip(shape, array.shape, strict=True)
            )
            if not fits or array.dtype.kind not in "ui":
                raise ValueError(f"array '{name}' is {array.dtype}{array.shape}")
            arrays[name] = array
        return arrays


def idx(path: Path, shape: tuple[int | None, ...]) -> Array:
    """Read a gzipped IDX file of unsigned bytes: a magic number, the shape, the values."""
    with guarded(path), gzip.open(path) as stream:
        content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES or content[:3] != b"\0\0\x08" or content[3] != len(shape):
            raise ValueError("not an IDX file of bytes in that many dimensions")
        start = 4 + 4 * len(shape)
        found = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
        fits = all(want in (None, have) for want, have in zip(shape, found, strict=True))
        if not fits or len(content) - start != math.prod(found):
            raise ValueError(f"shape {found}")
        return np.frombuffer(content, np.uint8, offset=start).reshape(found).copy()


def text(path: Path) -> str:
    """Read a text file, or a gzipped one by its ``.gz``."""
    with guarded(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return content.decode("utf-8-sig")


def cifar_binary(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read CIFAR-10's binary archive: records of a label and three 32 x 32 colour planes."""
    size = 10_000 * 3073
    wanted = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    batches: dict[str, Array] = {}
    with guarded(path), tarfile.open(path, "r|gz") as archive:
        for number, member in enumerate(archive):
            if number > 50 or member.size > size:
                raise ValueError("a member that the archive does not have")
            name = member.name.rpartition("/")[2]
            stream = archive.extractfile(member) if name in wanted and member.isreg() else None
            if stream is not None:
                batches[name] = np.frombuffer(stream.read(), np.uint8).reshape(10_000, 3073)
        records = np.concatenate([batches[name] for name in wanted])
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return {
        "train_images": np.ascontiguousarray(images[:50_000]),
        "train_labels": records[:50_000, 0],
        "test_images": np.ascontiguousarray(images[50_000:]),
        "test_labels": records[50_000:, 0],
    }


def cifar_jpeg(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read the CIFAR-10 copy whose images are JPEG files laid end to end."""
    kinds = ("jpeg", "offsets", "labels")
    arrays = npz(path, {f"{part}_{kind}": (None,) for part in ("train", "test") for kind in kinds})
    out: dict[str, NDArray[np.generic]] = {}
    with guarded(path):
        for part in ("train", "test"):
            data, offsets = arrays[f"{part}_jpeg"].tobytes(), arrays[f"{part}_offsets"].astype(int)
            if (np.diff(offsets) < 0).any() or offsets.min() < 0 or offsets.max() > len(data):
                raise ValueError(f"{part}_offsets do not ascend within the file")
            images = np.empty((len(offsets) - 1, 32, 32, 3), np.uint8)
            for row, (begin, end) in enumerate(pairwise(offsets)):
                images[row] = image(data[begin:end], "RGB")
            out[f"{part}_images"] = images
            out[f"{part}_labels"] = arrays[f"{part}_labels"]
    return out


def images(path: Path) -> tuple[tuple[str, ...], tuple[Array, ...]]:
    """Read the images of a zip file, in the order of their names; nothing is written to disk."""
    with guarded(path), zipfile.ZipFile(path) as archive:
        _check_members(archive)
        members = sorted(
            name
            for name in archive.namelist()
            if name.lower().endswith((".png", ".jpg", ".jpeg", ".bmp"))
        )
        if not members:
            raise ValueError("no images inside")
        names = tuple(Path(name).stem for name in members)
        return names, tuple(image(archive.read(name)) for name in members)


def image(content: bytes, mode: str | None = None) -> Array:
    """Decode a picture to (H, W) grey or (H, W, 3) colour bytes."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "BMP")) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"a picture of {picture.width} x {picture.height}")
            grey = picture.mode in ("1", "L", "LA")
            return np.asarray(picture.convert(mode or ("L" if grey else "RGB"))).copy()
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _check_members(archive: zipfile.ZipFile) -> None:
    members: Sequence[zipfile.ZipInfo] = archive.infolist()
    if len(members) > _MOST_MEMBERS or sum(m.file_size for m in members) > _MOST_BYTES:
        raise ValueError("more inside than any known data set has")
