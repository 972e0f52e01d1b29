"""Chunks of Zarr arrays, unpacked to the size of their shape and not a byte further.

Zarr's own codecs unpack a chunk to whatever it grows to. Here each is told where to end: zlib, bz2
and LZMA by their streams, Blosc, LZ4 and Zstandard by the room that they are given. Imports zarr,
so :mod:`pantarhei.data._zarr` imports it where it is needed.
"""

from __future__ import annotations

import asyncio
import bz2
import lzma
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numcodecs
import numpy as np
import zarr
from numcodecs.abc import Codec as OldCodec
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec, Codec
from zarr.codecs import ShardingCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer

from pantarhei.data._zarr import PACKERS

_LZMA_MEMORY = 2**27  # bytes; xz -9 asks for 65 MB
_CHECKSUM = 4  # bytes that crc32c adds
_HEADER = {"blosc": 4, "lz4": 0}  # where the size stands, of 4 bytes


def bounded(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Return the array with codecs that end where a chunk does."""
    about: Any = array.metadata
    if about.zarr_format == 3:
        changed = replace(about, codecs=_chain(about.codecs))
    elif about.compressor is None:
        return array
    else:
        size = math.prod(about.chunks) * array.dtype.itemsize
        name = about.compressor.codec_id
        changed = replace(about, compressor=_Old(name, size))
    return zarr.Array(zarr.AsyncArray(changed, array.store_path))


def unpacked(name: str, content: bytes, size: int) -> NDArray[np.uint8]:
    """Unpack what a codec has written; other than ``size`` bytes are refused.

    >>> unpacked("zlib", zlib.compress(bytes(9)), 9).tobytes() == bytes(9)
    True
    """
    if name in ("zlib", "gzip"):
        found = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(content, size + 1)
    elif name == "bz2":
        found = bz2.BZ2Decompressor().decompress(content, size + 1)
    elif name == "lzma":  # of the kinds that say what they are, with their own bound on memory
        found = lzma.LZMADecompressor(memlimit=_LZMA_MEMORY).decompress(content, size + 1)
    elif name == "zstd":
        room = np.empty(size, np.uint8)
        found = numcodecs.Zstd().decode(content, out=room)
    else:
        place = _HEADER[name]
        if int.from_bytes(content[place : place + 4], "little") == size:
            found = {"blosc": numcodecs.Blosc, "lz4": numcodecs.LZ4}[name]().decode(content)
        else:
            found = b""
    if len(found) != size:
        raise ValueError(f"a chunk does not unpack to its {size} bytes")
    return np.frombuffer(found, np.uint8)


def _chain(codecs: Sequence[Codec]) -> tuple[Codec, ...]:
    """Put a bound on the packer of a chain, and of those inside of its shards."""
    changed: list[Codec] = []
    for place, codec in enumerate(codecs):
        name = str(codec.to_dict()["name"])
        if isinstance(codec, ShardingCodec):
            changed.append(replace(codec, codecs=_chain(codec.codecs)))
        elif name in PACKERS:
            before = sum(c.to_dict()["name"] == "crc32c" for c in codecs[:place])
            changed.append(_Bounded(name, before * _CHECKSUM))
        else:
            changed.append(codec)
    return tuple(changed)


@dataclass(frozen=True)
class _Bounded(BytesBytesCodec):
    """A packer of format 3, to read with."""

    name: str
    more: int
    is_fixed_size = False

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> Buffer:
        itemsize = chunk_spec.dtype.to_native_dtype().itemsize
        size = math.prod(chunk_spec.shape) * itemsize + self.more
        found = await asyncio.to_thread(unpacked, self.name, chunk_data.to_bytes(), size)
        return chunk_spec.prototype.buffer.from_array_like(found)

    def compute_encoded_size(self, _input_byte_length: int, _chunk_spec: ArraySpec) -> int:
        raise NotImplementedError  # as in every packer

    def to_dict(self) -> Any:
        return {"name": self.name}


class _Old(OldCodec):
    """A packer of format 2, to read with."""

    codec_id = "bounded"

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def encode(self, buf: Any) -> Any:
        raise NotImplementedError

    def decode(self, buf: Any, out: Any = None) -> NDArray[np.uint8]:
        return unpacked(self.name, bytes(buf), self.size)
