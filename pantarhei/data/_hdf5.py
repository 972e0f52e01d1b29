"""HDF5 files that nobody vouches for: what a name leads to lies in the file, at its honest size.

Links other than hard ones are not followed, not even to see whether they lead anywhere; external
storage and virtual arrays, which hold no numbers of their own, are refused. HDF5 itself unpacks a
chunk to whatever it grows to: a packed one is measured first, a mebibyte at a time, and refused
unless it has the size of its shape. What is wrong raises ``ValueError``.
"""

from __future__ import annotations

import itertools
import math
import zlib
from pathlib import Path
from typing import Any

from pantarhei.data._read import MOST_AT_ONCE, needed, sized

_DEFLATE, _SHUFFLE, _FLETCHER32, _LZF = 1, 2, 3, 32000
_FILTERS = {_DEFLATE: "gzip", _SHUFFLE: "shuffle", _FLETCHER32: "fletcher32", _LZF: "lzf"}
_CHECKSUM = 4  # bytes that Fletcher's adds
_PIECE = 2**20


def library() -> Any:
    """Return h5py, or say what to install."""
    return needed("h5py", "HDF5", "fields")


def opened(path: Path) -> Any:
    """Open a file to read; a pipe, which would be waited for, is not one."""
    if not path.is_file():
        raise ValueError("not a file")
    return library().File(path, "r")


def holds(group: Any, name: str) -> bool:
    """Return whether a group holds something of this name, without following a link."""
    if not isinstance(group, library().Group):
        raise ValueError(f"no group that '{name}' could be in")
    return bool(group.id.links.exists(name.encode()))


def member(group: Any, name: str) -> Any:
    """Return what lies in a group of this very file: a link may lead to any other."""
    if not holds(group, name):
        raise ValueError(f"no '{name}' inside")
    if group.id.links.get_info(name.encode()).type != library().h5l.TYPE_HARD:
        raise ValueError(f"'{name}' is a link into another file, or to another name")
    return group[name]


def dataset(group: Any, name: str, leading: int = 2) -> Any:
    """Return an array of numbers that lies in this file, to be sliced as (case, start:stop).

    ``leading``: how many axes stand before those of a frame.
    """
    found = member(group, name)
    if not isinstance(found, library().Dataset) or found.is_virtual or found.external:
        raise ValueError(f"'{name}' is not an array of this file")
    if found.dtype.kind not in "biuf" or found.shape is None:
        raise ValueError(f"'{name}' holds {str(found.dtype)[:40]}, not numbers")
    sized(found, name, leading)
    packers = _packers(found, name)
    if packers:
        return _Packed(found, name, packers)
    size = Path(found.file.filename).stat().st_size
    if found.chunks is None and found.nbytes > size:
        raise ValueError(f"'{name}' is to have {found.nbytes} bytes, the file has {size}")
    return found


class _Packed:
    """A data set whose chunks are measured before HDF5 unpacks them, each once."""

    def __init__(self, found: Any, name: str, packers: list[int]) -> None:
        self.shape, self.dtype, self.ndim = found.shape, found.dtype, found.ndim
        self.chunks = found.chunks
        self._found, self._name, self._packers = found, name, packers
        self._size = math.prod(found.chunks) * found.dtype.itemsize
        if self._size > MOST_AT_ONCE:
            raise ValueError(f"a chunk of '{name}' is larger than {MOST_AT_ONCE} bytes")
        self._measured: set[tuple[int, ...]] = set()

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, key: Any) -> Any:
        key = key if isinstance(key, tuple) else (key,)
        axes = []
        for axis, (length, chunk) in enumerate(zip(self.shape, self.chunks, strict=True)):
            one = key[axis] if axis < len(key) and key[axis] is not ... else slice(None)
            begin, end, _ = one.indices(length) if isinstance(one, slice) else (one, one + 1, 1)
            axes.append(range(begin // chunk * chunk, end, chunk))
        for offset in itertools.product(*axes):
            if offset not in self._measured:
                self._measure(offset)
                self._measured.add(offset)
        return self._found[key]

    def _measure(self, offset: tuple[int, ...]) -> None:
        """Refuse the chunk that begins at ``offset`` unless it unpacks to its own size."""
        stored = self._found.id.get_chunk_info_by_coord(offset)
        if stored.byte_offset is None:  # never written: all of it is one value
            return
        if stored.size > self._size + self._size // 64 + _PIECE:  # what zlib adds at worst
            raise ValueError(f"chunk {offset} of '{self._name}' has {stored.size} bytes")
        skipped, content = self._found.id.read_direct_chunk(offset)
        wanted = self._size
        for place, code in enumerate(self._packers):
            if skipped >> place & 1:
                continue
            if code == _FLETCHER32:
                wanted += _CHECKSUM
            elif code != _SHUFFLE:
                # what a checksum adds after packing is behind what is unpacked
                later = range(place + 1, len(self._packers))
                tail = _CHECKSUM * sum(not skipped >> other & 1 for other in later)
                content = content[: len(content) - tail]
                found = _inflated(content, wanted) if code == _DEFLATE else _lzf(content)
                if found != wanted:
                    raise ValueError(
                        f"chunk {offset} of '{self._name}' unpacks to "
                        f"{'more' if found > wanted else 'fewer'} than its {self._size} bytes"
                    )
                return
        if len(content) != wanted:
            raise ValueError(f"chunk {offset} of '{self._name}' has {len(content)} bytes")


def _packers(found: Any, name: str) -> list[int]:
    """Return the filters of a data set, in the order of writing; none but what is known here."""
    plist = found.id.get_create_plist()
    filters = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    codes = [code for code, *_ in filters]
    if unknown := [f for f in filters if f[0] not in _FILTERS]:
        raise ValueError(f"'{name}' is packed by filter {unknown[0][0]}, which is not read")
    packing = [i for i, code in enumerate(codes) if code in (_DEFLATE, _LZF)]
    if len(packing) > 1 or any(code != _FLETCHER32 for i in packing for code in codes[i + 1 :]):
        raise ValueError(f"'{name}' is packed twice, or mixed after packing")
    size = math.prod(found.chunks or ()) * found.dtype.itemsize + _CHECKSUM * len(codes)
    # h5py's LZF reserves at once what its third value says
    if any(code == _LZF and max(values[2:3], default=0) > size for code, _, values, _ in filters):
        raise ValueError(f"'{name}' says wrongly how large its chunks are")
    return codes


def _inflated(content: bytes, most: int) -> int:
    """Return how many bytes zlib's format unpacks to; more than ``most`` is not counted."""
    stream, total = zlib.decompressobj(), 0
    while not stream.eof and total <= most:
        piece = stream.decompress(content, _PIECE)
        total += len(piece)
        if not piece and not stream.unconsumed_tail:
            break
        content = stream.unconsumed_tail
    return total


def _lzf(content: bytes) -> int:
    """Return how many bytes LibLZF's format unpacks to: the sum of its literals and copies."""
    place, total = 0, 0
    while place < len(content):
        control = content[place]
        if control < 32:  # so many literals, and one
            place, total = place + control + 2, total + control + 1
        elif control < 224:
            place, total = place + 2, total + (control >> 5) + 2
        else:  # the length goes on in the next byte
            place, total = place + 3, total + 9 + sum(content[place + 1 : place + 2])
    return total
