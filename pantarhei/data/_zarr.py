"""Zarr groups that nobody vouches for: what they say is read as JSON before Zarr opens anything.

Codecs are those of numbers (a ``pickle`` filter runs whatever code it holds), the folder holds
plain files alone (a link could point at any other), and a chunk fits into memory.
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

from pantarhei.data._read import needed

_ABOUT = {3: "zarr.json", 2: ".zgroup"}
_CODECS = {
    "blosc", "bytes", "bz2", "crc32c", "gzip", "lz4", "lzma", "sharding_indexed", "transpose",
    "zlib", "zstd",
}  # fmt: skip
_NUMBER = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|[<>|][biuf][1248]")
_MOST_BYTES = 2**31  # of a chunk, which is unpacked at once
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
        if math.prod(found.chunks) * found.dtype.itemsize > _MOST_BYTES:
            raise ValueError(f"a chunk of '{name}' is larger than {_MOST_BYTES} bytes")
        return found

    def _check(self, name: str) -> None:
        if self._format == 3:
            about = _json(self.place / name / "zarr.json")
            kind, codecs = about.get("data_type"), list(_names(about.get("codecs", [])))
        else:
            about = _json(self.place / name / ".zarray")
            kind = about.get("dtype")
            parts = [about.get("compressor"), *(about.get("filters") or [])]
            codecs = [part.get("id") for part in parts if part is not None]
        if not (isinstance(kind, str) and _NUMBER.fullmatch(kind)):
            raise ValueError(f"'{name}' holds {str(kind)[:40]}, not numbers")
        if unknown := [codec for codec in codecs if codec not in _CODECS]:
            raise ValueError(f"'{name}' is packed by '{str(unknown[0])[:40]}', which is not read")


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


def _names(codecs: Any) -> Iterator[Any]:
    """Yield the names of format 3's codecs, those inside of a shard too."""
    for codec in codecs:
        about: dict[str, Any] = {"name": codec} if isinstance(codec, str) else codec
        yield about.get("name")
        inner = about.get("configuration") or {}
        for part in ("codecs", "index_codecs"):
            yield from _names(inner.get(part, []))


def _check_plain(place: Path) -> None:
    folders = [place]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise ValueError(f"'{entry.name}' inside is a link, or not a file")
