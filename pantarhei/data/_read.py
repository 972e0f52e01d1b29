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
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pantarhei.errors import RequestError

Array = NDArray[np.uint8]

MOST_AT_ONCE = 2**31  # bytes of what is unpacked, or read, at once
_MOST_BYTES = 2**30  # of one file unpacked; the largest known set has 188 MB
_MOST_CHUNKS = 2**20  # that are read at once
_MOST_FRAMES = 2**27  # of a set, over all cases
_MOST_MEMBERS = 20_000
_MOST_PIXELS = 50_000_000
# by method, to how many bytes one byte can unpack at most: zlib's authors' figure, and twice what
# LZMA makes of zeros; bz2 knows no such bound
_REACH = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032, zipfile.ZIP_LZMA: 16_000}
_LZMA_MEMORY = 2**26  # bytes, for its dictionary
_CIFAR_RECORDS = 10_000 * 3073  # bytes of one of the six files


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
        found = {}
        for name, shape in shapes.items():
            array = member(archive, name)
            fits = array.ndim == len(shape) and all(
                want in (None, have) for want, have in zip(shape, array.shape, strict=True)
            )
            if not fits or array.dtype.kind not in "ui":
                raise ValueError(f"array '{name}' is {array.dtype}{array.shape}")
            found[name] = array
        return found


def arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Read arrays of numbers or texts, all or the ones named, from a ``.npz`` of a user's own."""
    with guarded(path), zipfile.ZipFile(path) as archive:
        inside = archive.infolist()
        if sum(m.file_size for m in inside if m.compress_type) > MOST_AT_ONCE:
            raise ValueError("compressed, and too large: save it uncompressed")
        if sum(m.compress_size for m in inside) > path.stat().st_size:
            raise ValueError("its members overlap")
        held = [m.filename.removesuffix(".npy") for m in inside if m.filename.endswith(".npy")]
        if names is not None and not set(names) <= set(held):
            raise ValueError(f"it needs {' and '.join(names)}, and holds {held}")
        return {name: member(archive, name) for name in (held if names is None else names)}


def member(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Read an array of an ``.npz``, once header, directory and packed size agree on its size."""
    about = archive.getinfo(f"{name}.npy")
    reach = _REACH.get(about.compress_type)
    if reach is None:
        raise ValueError(f"'{name}' is packed by method {about.compress_type}, which is not read")
    with _opened(archive, about) as stream:
        npy_header(stream, name, about.file_size)
    if about.file_size > reach * (about.compress_size + 1):
        raise ValueError(f"'{name}' is packed into fewer bytes than is possible")
    with _opened(archive, about) as stream:
        found: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        if stream.read(1):
            raise ValueError(f"'{name}' unpacks to more than it says")
        return found


@contextmanager
def _opened(archive: zipfile.ZipFile, about: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    """Open a member of an archive."""
    if about.compress_type == zipfile.ZIP_LZMA:
        yield io.BufferedReader(_Lzma(archive, about))
    else:
        with archive.open(about) as stream:
            yield stream


class _Lzma(io.RawIOBase):
    """A member packed by LZMA, unpacked no further than is read: zipfile's own knows no bound.

    What LZMA writes before its stream differs in a zip (APPNOTE 5.8) from a file of its own by the
    unpacked size, which is put back here.
    """

    def __init__(self, archive: zipfile.ZipFile, about: zipfile.ZipInfo) -> None:
        assert archive.fp is not None  # an archive that is open
        self._source = source = archive.fp
        source.seek(about.header_offset)
        local = source.read(30)
        source.seek(int.from_bytes(local[26:28], "little"), 1)
        source.seek(int.from_bytes(local[28:30], "little"), 1)
        start = source.read(9)
        if about.flag_bits & 1 or start[2:4] != b"\5\0" or len(start) < 9:
            raise ValueError(f"'{about.filename}' is no LZMA stream")
        self._left, self._read, self._sum = about.compress_size - len(start), 0, 0
        self._about = about
        marked = about.flag_bits & 2  # its end is, and the size need not be known
        size = 2**64 - 1 if marked else about.file_size
        self._unpacker = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)
        self._unpacker.decompress(start[4:] + size.to_bytes(8, "little"), 0)

    def readable(self) -> bool:
        """Whether it can be read: it can."""
        return True

    def tell(self) -> int:
        """Return how many bytes were read."""
        return self._read

    def readinto(self, buffer: Any) -> int:
        """Fill ``buffer``, or a part of it; 0 at the end."""
        piece = b""
        while not piece and not self._unpacker.eof:
            packed = b""
            if self._unpacker.needs_input:
                packed = self._source.read(min(self._left, io.DEFAULT_BUFFER_SIZE))
                self._left -= len(packed)
                if not packed:
                    break
            piece = self._unpacker.decompress(packed, len(buffer))
        if not piece and self._sum != self._about.CRC:  # which LZMA itself has none of
            raise ValueError(f"'{self._about.filename}' is damaged")
        buffer[: len(piece)] = piece
        self._read += len(piece)
        self._sum = zlib.crc32(piece, self._sum)
        return len(piece)


def npy_header(
    stream: IO[bytes], name: str, size: int
) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, Fortran order and type of an npy file that has ``size`` bytes in all."""
    if np.lib.format.read_magic(stream) != (1, 0):  # whose header is 64 kB at most
        raise ValueError(f"'{name}' has another version of the npy format than 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in "biufUS":
        raise ValueError(f"'{name}' holds {str(dtype)[:40]}, not numbers")
    wanted = stream.tell() + math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or wanted != size:
        raise ValueError(f"'{name}' says {dtype}{shape}, and has {size} bytes")
    return shape, fortran, dtype


def sized(array: Any, name: str, leading: int = 2) -> None:
    """Refuse an array with frames that do not fit into memory, or with absurdly many.

    A file may claim any shape; ``leading`` axes of it (case, time) stand before those of a frame.
    """
    frames, frame = math.prod(array.shape[:leading]), math.prod(array.shape[leading:])
    if frames > _MOST_FRAMES or frame * array.dtype.itemsize > MOST_AT_ONCE:
        raise ValueError(f"'{name}' of shape {array.shape} is larger than any set has")
    _check_chunks(array, name, leading)


def whole(array: Any, name: str) -> NDArray[Any]:
    """Return all of an array that is read by slices; one of more than 2 GiB is refused."""
    if math.prod(array.shape) * 8 > MOST_AT_ONCE:
        raise ValueError(f"'{name}' of shape {array.shape} is larger than any set has")
    _check_chunks(array, name, 0)
    return np.asarray(array[...])


def _check_chunks(array: Any, name: str, leading: int) -> None:
    """Refuse what is cut so small that looking for its chunks, there or not, takes for ever."""
    chunks = getattr(array, "chunks", None) or array.shape
    sides = zip(array.shape[leading:], chunks[leading:], strict=True)
    if math.prod(-(-n // max(c, 1)) for n, c in sides) > _MOST_CHUNKS:
        raise ValueError(f"'{name}' is cut into more than {_MOST_CHUNKS} chunks")


def idx(path: Path, shape: tuple[int | None, ...]) -> Array:
    """Read a gzipped IDX file of unsigned bytes: a magic number, the shape, the values."""
    with guarded(path), gzip.open(path) as stream:
        start = stream.read(4 + 4 * len(shape))
        if start[:3] != b"\0\0\x08" or start[3:4] != bytes([len(shape)]):
            raise ValueError("not an IDX file of bytes in that many dimensions")
        found = tuple(int(n) for n in np.frombuffer(start[4:], ">u4"))
        fits = all(want in (None, have) for want, have in zip(shape, found, strict=True))
        size = math.prod(found)
        content = stream.read(size + 1) if fits and size <= _MOST_BYTES else b""
        if not fits or len(content) != size:
            raise ValueError(f"shape {found}")
        return np.frombuffer(content, np.uint8).reshape(found).copy()


def text(path: Path) -> str:
    """Read a text file, or a gzipped one by its ``.gz``."""
    with guarded(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        return content.decode("utf-8-sig")


def cifar_binary(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read CIFAR-10's binary archive: records of a label and three 32 x 32 colour planes."""
    wanted = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
    batches: dict[str, Array] = {}
    with guarded(path), gzip.open(path) as packed:
        content = packed.read(7 * _CIFAR_RECORDS + 1)  # six files, and what stands around them
        if len(content) > 7 * _CIFAR_RECORDS:
            raise ValueError("more inside than the archive has")
    with guarded(path), tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for number, part in enumerate(archive):
            if number > 50 or part.size > _CIFAR_RECORDS:
                raise ValueError("a member that the archive does not have")
            name = part.name.rpartition("/")[2]
            stream = archive.extractfile(part) if name in wanted and part.isreg() else None
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
    found = npz(path, {f"{part}_{kind}": (None,) for part in ("train", "test") for kind in kinds})
    out: dict[str, NDArray[np.generic]] = {}
    with guarded(path):
        for part in ("train", "test"):
            data, offsets = found[f"{part}_jpeg"].tobytes(), found[f"{part}_offsets"].astype(int)
            if (np.diff(offsets) < 0).any() or offsets.min() < 0 or offsets.max() > len(data):
                raise ValueError(f"{part}_offsets do not ascend within the file")
            images = np.empty((len(offsets) - 1, 32, 32, 3), np.uint8)
            for row, (begin, end) in enumerate(pairwise(offsets)):
                images[row] = image(data[begin:end], "RGB")
            out[f"{part}_images"] = images
            out[f"{part}_labels"] = found[f"{part}_labels"]
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
