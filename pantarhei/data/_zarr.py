"""Zarr groups that nobody vouches for: what they say is read as JSON before Zarr opens anything.

Codecs are those of numbers (a ``pickle`` filter runs whatever code it holds), the folder holds
plain files alone (a link could point at any other), a chunk or a frame fits into memory, and a
chunk is unpacked to its own size and no further.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pantarhei.data._read import MOST_AT_ONCE, needed, sized

_ABOUT = {3: "zarr.json", 2: ".zgroup"}
PACKERS = {"blosc", "bz2", "gzip", "lz4", "lzma", "zlib", "zstd"}
_CODECS = {"bytes", "crc32c", "sharding_indexed", "transpose"} | PACKERS
_NUMBER = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|[<>|][biuf][1248]")
_MOST_IN_SHARD = 2**22  # chunks, whose places are read at once
_CHUNK = 2**19  # bytes that a chunk has at least, where a case has as many


def is_group(place: Path) -> bool:
    """Return whether a folder is a Zarr group."""
    return any((place / name).is_file() for name in _ABOUT.values())


class Group:
    """The arrays of a group on disk, ``group[name]``, and its ``attributes``; of format 2 or 3.

    Arrays are read when they are sliced. Raises ``ValueError`` for what the module says.
    """

    def __init__(self, place: Path) -> None:
        self._zarr = needed("zarr", "Zarr", "fields")
        self.place = place
        self._format = 3 if (place / _ABOUT[3]).is_file() else 2
        _check_plain(place)
        if self._format == 3:
            self.attributes = dict(_json(place / "zarr.json").get("attributes", {}))
        else:
            stored = place / ".zattrs"
            self.attributes = dict(_json(stored)) if stored.exists() else {}

    def __contains__(self, name: str) -> bool:
        return (self.place / name / ("zarr.json" if self._format == 3 else ".zarray")).is_file()

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise ValueError(f"no array '{name}'")
        self._check(name)
        # without the group, whose consolidated metadata could say something else
        found = self._zarr.open_array(
            self.place / name, mode="r", zarr_format=self._format, use_consolidated=False
        )
        sized(found, name)
        if math.prod(found.chunks) * found.dtype.itemsize > MOST_AT_ONCE:
            raise ValueError(f"a chunk of '{name}' is larger than {MOST_AT_ONCE} bytes")
        if math.prod(found.shards or ()) > _MOST_IN_SHARD * math.prod(found.chunks):
            raise ValueError(f"a shard of '{name}' has more than {_MOST_IN_SHARD} chunks")
        from pantarhei.data._zarr_chunks import bounded

        return bounded(found)

    def _check(self, name: str) -> None:
        if self._format == 3:
            about = _json(self.place / name / "zarr.json")
            kind, chains = about.get("data_type"), list(_chains(about.get("codecs", [])))
            known = _CODECS
        else:
            about = _json(self.place / name / ".zarray")
            kind = about.get("dtype")
            packer, filters = about.get("compressor"), about.get("filters") or []
            chains = [[part.get("id") for part in (*filters, packer) if part is not None]]
            known = PACKERS if not filters else set()
        if not (isinstance(kind, str) and _NUMBER.fullmatch(kind)):
            raise ValueError(f"'{name}' holds {str(kind)[:40]}, not numbers")
        for chain in chains:
            if unknown := [codec for codec in chain if codec not in known]:
                which = str(unknown[0])[:40]
                raise ValueError(f"'{name}' is packed by '{which}', which is not read")
            sharded = "sharding_indexed" in chain and len(chain) > 1
            if sharded or sum(codec in PACKERS for codec in chain) > 1:
                raise ValueError(f"'{name}' is packed twice")


def write(
    place: Path,
    meta: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    cases: Iterable[np.ndarray],
) -> None:
    """Write a group: ``cases`` one after another to ``states``, each a file, and ``arrays``.

    A file that gets lost is not a case of zeros: what is missing is NaN.
    """
    zarr = needed("zarr", "Zarr", "fields")
    group = zarr.open_group(place, mode="w", zarr_format=3)
    group.attrs["meta"] = dict(meta)
    for name, part in arrays.items():
        group.create_array(name, data=np.ascontiguousarray(part), compressors=None)
    states = None
    for number, case in enumerate(cases):
        if states is None:
            frame = math.prod(shape[2:]) * case.dtype.itemsize
            per = max(1, min(shape[1], _CHUNK // frame))
            states = group.create_array(
                "states",
                shape=shape,
                dtype=case.dtype,
                chunks=(1, per, *shape[2:]),
                shards=(1, -(-shape[1] // per) * per, *shape[2:]),
                compressors=None,
                fill_value=math.nan,
            )
        states[number] = case


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no names")
    return found


def _chains(codecs: Any) -> Iterator[list[Any]]:
    """Yield the names of format 3's codecs, and of those inside of a shard."""
    chain: list[dict[str, Any]] = [{"name": c} if isinstance(c, str) else c for c in codecs]
    yield [about.get("name") for about in chain]
    for about in chain:
        inner = about.get("configuration") or {}
        for part in ("codecs", "index_codecs"):
            yield from _chains(inner.get(part, []))


def _check_plain(place: Path) -> None:
    folders = [place]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise ValueError(f"'{entry.name}' inside is a link, or not a file")
