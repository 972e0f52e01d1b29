"""The plots of a run: found by listing the run's own folder, never by a name from a request."""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST = 24  # plots on a page
_BYTES = 20 * 2**20


@dataclass(frozen=True)
class Picture:
    """A plot; ``width`` and ``height`` (pixels) keep its place on the page, 0 where unknown."""

    path: Path
    width: int
    height: int
    vector: Path | None  # the same as SVG

    @property
    def caption(self) -> str:
        """The file's name in words."""
        return self.path.stem.replace("_", " ").replace("-", " ")


def plots(folder: str) -> list[Picture]:
    """Return the plots in a finished run's folder, by name; none where there is no such folder.

    Only regular files directly in it count, so that a link cannot lead out of it.
    """
    if not folder or not (root := Path(folder)).is_absolute():
        return []
    try:
        with os.scandir(root) as entries:
            files = {e.name for e in entries if e.is_file(follow_symlinks=False)}
    except OSError:
        return []
    if "claims.json" not in files:  # not a run, or not finished
        return []
    found = []
    for name in sorted(files):
        stem, _, suffix = name.rpartition(".")
        vector = root / f"{stem}.svg" if f"{stem}.svg" in files else None
        if suffix == "png" and stem and not name.startswith("."):
            found.append(Picture(root / name, *_size(root / name), vector))
        elif suffix == "svg" and stem and f"{stem}.png" not in files and not name.startswith("."):
            found.append(Picture(root / name, 0, 0, root / name))
    return found[:_MOST]


def content(path: Path) -> tuple[bytes, str] | None:
    """Return a picture's bytes and media type; None where it is gone, too large or none at all."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > _BYTES:
                return None
            body = file.read(_BYTES)
    except OSError:
        return None
    if path.suffix == ".svg":
        return body, "image/svg+xml"
    return (body, "image/png") if body.startswith(_PNG) else None


def _size(path: Path) -> tuple[int, int]:
    """Read a PNG's size from its first chunk."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        return 0, 0
    if not head.startswith(_PNG) or len(head) < 24:
        return 0, 0
    width, height = struct.unpack(">II", head[16:24])
    return (width, height) if width < 2**16 and height < 2**16 else (0, 0)
