"""Files that appear whole or not at all."""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pantarhei.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def atomic(path: str | os.PathLike[str], folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its name only when the block succeeds.

    The temporary name keeps the suffix (writers that choose a format by it go on working). On an
    error the temporary file is removed and whatever ``path`` held before is untouched. A full or
    read-only disk raises :class:`RequestError`. A ``folder`` takes the place of nothing, or of an
    empty one.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> with atomic(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in folder.iterdir()]
    ['a.txt']
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"dir": target.parent, "prefix": ".tmp-", "suffix": target.suffix}
        if folder:
            temporary = Path(tempfile.mkdtemp(**about))
        else:
            handle, name = tempfile.mkstemp(**about)
            os.close(handle)
            temporary = Path(name)
        yield temporary
        # What tempfile makes is private, and so do writers that put another in its place; a result
        # should have the permissions of anything new.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod((0o777 if folder else 0o666) & ~umask)
        for written in temporary.rglob("*") if folder else [temporary]:
            if written.is_file():
                with written.open("rb") as file:
                    os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise RequestError(
            f"'{target}' could not be written ({error.strerror or error}): "
            "free some space or choose another folder."
        ) from error
    finally:
        if temporary is not None and folder:
            shutil.rmtree(temporary, ignore_errors=True)
        elif temporary is not None:
            temporary.unlink(missing_ok=True)


def write_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write ``rows`` as CSV, atomically; the columns are the rows' keys in order of arrival."""
    rows = list(rows)
    columns = dict.fromkeys(key for row in rows for key in row)
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def write_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write ``figure`` as PNG and as SVG beside it, atomically; the same figure, the same bytes."""
    import matplotlib

    stem = Path(path).with_suffix("")
    # A fixed salt and no date: the same figure is the same file.
    with matplotlib.rc_context({"svg.hashsalt": stem.name}):
        with atomic(stem.with_name(f"{stem.name}.png")) as temporary:
            figure.savefig(temporary, dpi=150, bbox_inches="tight")
        with atomic(stem.with_name(f"{stem.name}.svg")) as temporary:
            figure.savefig(temporary, bbox_inches="tight", metadata={"Date": None})


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON; a missing or corrupt file raises :class:`RequestError` naming it."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError as error:
        raise RequestError(f"'{path}' does not exist: check the path.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RequestError(
            f"'{path}' is not readable JSON ({error}): restore it or make it again."
        ) from error
