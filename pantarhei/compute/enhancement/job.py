"""The job behind ``pantarhei enhance IN... -o OUT``: files and folders in, better pictures out.

:func:`enhance` does one picture, :func:`run_job` many files. A file that cannot be done is reported
in one line and the rest goes on; an input is never written to; an output appears whole or not at
all.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pantarhei.compute.enhancement import images, shipped
from pantarhei.compute.enhancement.images import MAX_PIXELS, SUFFIXES, Format, Picture
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.routing import Calibration
from pantarhei.compute.enhancement.tiles import Enhanced, Enhancer, Samples
from pantarhei.devices import chosen_device
from pantarhei.errors import RequestError
from pantarhei.files import atomic, write_csv, write_json
from pantarhei.progress import progress

_GRID_SEARCH = 512  # side of the part in which an unknown block grid is looked for
COLUMNS = ("image", "exit", "ms", "quality", "GMACs", "of full", "result")


# ---- one picture -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Route:
    """How the exit is chosen: a quality ``threshold``, or one ``exit`` (1..K) for all."""

    threshold: float | None = None
    exit: int | None = None


@dataclass(frozen=True)
class Enhancement:
    """An enhanced picture and what it took.

    ``exit`` of ``exits``; ``quality_before`` and ``quality_after`` the no-reference score in
    [0, 1]; ``macs`` everything computed and ``share``, ``macs`` over those of a plain run to the
    last exit (above 1 where tiles overlap a lot); ``milliseconds`` of the computation.
    """

    picture: Picture
    exit: int
    exits: int
    quality_before: float
    quality_after: float
    macs: int
    share: float
    milliseconds: float

    def array(self) -> Samples:
        """Return the samples, (H, W) or (H, W, C), as the input had them."""
        return self.picture.array()

    def save(self, path: str | os.PathLike[str], format: Format = "png") -> None:
        """Write the picture with its tags, atomically."""
        with atomic(path) as temporary:
            self.picture.save(temporary, format)


def enhance(
    image: str | os.PathLike[str] | NDArray[Any] | Image.Image,
    model: NestedUNet | str | os.PathLike[str] | None = None,
    *,
    budget: str | float | None = None,
    threshold: float | None = None,
    exit: int | None = None,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Enhancement:
    """Enhance one picture: a file, an array of uint8 or uint16, or a Pillow image.

    Only luma changes. ``model`` is a network, a model file, or None for the one that ships with
    the package. The exit is chosen by the model's calibrated threshold unless one of these is
    given: ``budget`` (0.5 or "50%" of the full network's MACs on average; "0.02dB" mean loss
    against the full network), ``threshold`` (quality to reach) or ``exit`` (1..K). ``device`` is
    "auto", "cpu" or "cuda".

    Raises :class:`RequestError` for what is not a picture, and for two of the choices at once.

    >>> net = NestedUNet(levels=3, width=4)
    >>> grey = np.full((20, 30), 128, np.uint8)
    >>> done = enhance(grey, net, exit=1)
    >>> done.array().shape, done.exit, done.exits
    ((20, 30), 1, 2)
    """
    enhancer, route = prepare(model, budget=budget, threshold=threshold, exit=exit, device=device)
    if isinstance(image, np.ndarray | Image.Image):
        picture = Picture.of(image)
    else:
        picture = images.read(image, max_pixels)
    return improve(picture, enhancer, route)


def prepare(
    model: NestedUNet | str | os.PathLike[str] | None = None,
    *,
    budget: str | float | None = None,
    threshold: float | None = None,
    exit: int | None = None,
    device: str = "auto",
) -> tuple[Enhancer, Route]:
    """Return what runs the network and how it chooses exits; the arguments of :func:`enhance`."""
    if sum(value is not None for value in (budget, threshold, exit)) > 1:
        raise RequestError("budget, threshold and exit exclude each other: give one of them.")
    calibration: Calibration | None = None
    if isinstance(model, NestedUNet):
        net = model
    else:
        loaded = shipped.load_shipped() if model is None else shipped.load_model(Path(model))
        net, calibration = loaded.model, loaded.calibration
    if exit is not None and not 1 <= exit <= net.exits:
        raise RequestError(f"exit {exit} does not exist: this model has exits 1 to {net.exits}.")
    if threshold is not None and not threshold >= 0:
        raise RequestError(f"threshold {threshold} is not a quality: give a number from 0 to 1.")
    if threshold is None and exit is None:
        if calibration is None:
            raise RequestError("this model has no calibration: give a threshold or an exit.")
        threshold = calibration.chosen if budget is None else within(calibration, budget)
    return Enhancer(net, device=chosen_device(device)), Route(threshold, exit)


def within(calibration: Calibration, budget: str | float) -> float:
    """Return the threshold that keeps a budget: a share of the MACs, or a loss in dB.

    >>> c = Calibration((0.0, 1.1), (0.4, 0.5), (0.4, 1.0), last_gain=0.5, chosen=1.1)
    >>> within(c, "50%"), within(c, 1.0), within(c, "0.2 dB")
    (0.0, 1.1, 0.0)
    """
    text = str(budget).strip().lower()
    unit = next((u for u in ("db", "%") if text.endswith(u)), "")
    try:
        number = float(text.removesuffix(unit))
    except ValueError:
        number = float("nan")
    share = number / 100 if unit == "%" else number
    if unit == "db" and number >= 0:
        return calibration.within_loss(number)
    if unit != "db" and 0 < share <= 1:
        return calibration.under(share)
    raise RequestError(
        f"budget '{budget}' is not one: give a share of the full network's MACs such as 0.5 or "
        "50%, or a loss such as 0.02dB."
    )


def improve(picture: Picture, enhancer: Enhancer, route: Route) -> Enhancement:
    """Enhance a picture's planes; the first one decides the exit for all.

    The codec's grid starts at the first pixel of a JPEG. In any other file, which may be a crop
    of a decoded JPEG, it is looked for, and the plane continued until a whole block comes first.
    """
    start = time.perf_counter()
    down, across = (0, 0) if picture.jpeg else _grid(picture.luma, enhancer)
    results: list[Enhanced] = []
    for plane in picture.planes:
        aligned: NDArray[Any] = plane
        if down or across:
            aligned = np.pad(plane, ((down, 0), (across, 0)), mode="edge")
        exit = results[0].exit if results else route.exit
        threshold = route.threshold if exit is None else None
        results.append(enhancer(aligned, threshold=threshold, exit=exit))
    first, macs = results[0], sum(result.macs for result in results)
    height, width = picture.luma.shape
    net = enhancer.net
    return Enhancement(
        picture.with_luma(*(result.plane[down:, across:] for result in results)),
        first.exit,
        net.exits,
        first.before,
        first.after,
        macs,
        macs / (len(results) * net.macs(height, width, net.exits)),
        (time.perf_counter() - start) * 1e3,
    )


def _grid(luma: Samples, enhancer: Enhancer) -> tuple[int, int]:
    """Return the rows and columns that are missing before the first whole block."""
    n = enhancer.quality.n
    top, left = (max(0, size - _GRID_SEARCH) // 2 // n * n for size in luma.shape)
    part = luma[top : top + _GRID_SEARCH, left : left + _GRID_SEARCH]
    scaled = torch.from_numpy(part.astype(np.float32)) / float(np.iinfo(luma.dtype).max)
    row, column = enhancer.quality.grid(scaled.to(enhancer.device))[0].tolist()
    return -row % n, -column % n


# ---- which files, and where to ---------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One input and where its result goes, without the suffix; or what is wrong with it."""

    source: Path
    target: Path
    problem: str | None = None


def plan(inputs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> list[Item]:
    """List the files to do in a fixed order, each with a target of its own.

    A single folder's tree is repeated in ``out``; of several inputs each folder gets a subfolder
    of its name. In folders, files with an image's suffix count; hidden ones, links to folders and
    ``out`` itself do not. Where two inputs would become one file, each keeps its suffix in the
    name (``a.jpg.png``, ``a.webp.png``), and if that is not enough a number.
    """
    folder = Path(out)
    _check_out(folder)
    if not inputs:
        raise RequestError("no input was given: name image files or folders.")
    given = [Path(i) for i in inputs]
    if not any(path.exists() or path.is_symlink() for path in given):
        raise RequestError(f"'{_shown(given[0])}' does not exist: check the path.")
    found: dict[str, tuple[Path, Path, str | None]] = {}
    for path in given:
        for source, relative, problem in _listed(path, folder, alone=len(given) == 1):
            found.setdefault(os.path.abspath(source), (source, relative, problem))
    if not found:
        raise RequestError(f"'{_shown(given[0])}' holds no image file: check the path.")
    rows = list(found.values())
    names = _distinct([relative for _, relative, _ in rows])
    return [
        Item(source, folder / name, problem)
        for (source, _, problem), name in zip(rows, names, strict=True)
    ]


def _check_out(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"'{_shown(folder)}' is a file: name a folder with -o.")
    if not folder.exists() and folder.suffix.lower() in SUFFIXES:
        raise RequestError(
            f"'{_shown(folder)}' looks like a file: name a folder with -o, files keep their names."
        )


def _listed(path: Path, out: Path, alone: bool) -> Iterator[tuple[Path, Path, str | None]]:
    """Yield each file of an input with its place in the output and what is wrong with it."""
    if not path.is_dir():
        yield path, Path(path.name), None
        return
    if out.exists() and path.samefile(out):
        raise RequestError(
            f"'{_shown(path)}' is both input and output: choose another folder with -o."
        )
    base = Path() if alone else Path(path.resolve().name)
    unread: list[OSError] = []
    for here, folders, files in os.walk(path, onerror=unread.append):
        inside = Path(here)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (out.exists() and (inside / name).samefile(out))
        )
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield inside / name, base / (inside / name).relative_to(path), None
    for error in unread:
        refused = Path(os.fsdecode(error.filename))
        yield refused, base / refused.name, f"cannot be listed ({error.strerror})"


def _distinct(places: list[Path]) -> list[Path]:
    """Return output names without suffix, no two equal even where case does not count.

    >>> [str(p) for p in _distinct([Path("a.jpg"), Path("a.png"), Path("b.v2.jpg")])]
    ['a.jpg', 'a.png', 'b.v2']
    """
    short = [p.with_suffix("") if p.suffix.lower() in SUFFIXES else p for p in places]
    times = Counter(str(p).casefold() for p in short)
    names = [p if times[str(s).casefold()] > 1 else s for p, s in zip(places, short, strict=True)]
    taken = Counter(str(p).casefold() for p in names)
    used: set[str] = set()
    result: list[Path] = []
    for name in names:
        free, number = name, 1
        while str(free).casefold() in used or (number > 1 and str(free).casefold() in taken):
            number += 1
            free = name.with_name(f"{name.name}-{number}")
        used.add(str(free).casefold())
        result.append(free)
    return result


# ---- many files ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One line of the report; numbers are None where the file could not be done.

    ``milliseconds`` run from reading the file to the finished output.
    """

    input: str
    output: str | None = None
    width: int | None = None
    height: int | None = None
    exit: int | None = None
    exits: int | None = None
    milliseconds: float | None = None
    quality_before: float | None = None
    quality_after: float | None = None
    macs: int | None = None
    share: float | None = None
    note: str = ""
    error: str = ""

    @property
    def done(self) -> bool:
        """Whether an output was written."""
        return not self.error

    def to_json(self) -> dict[str, Any]:
        """Return the line as JSON can keep it."""
        return {**asdict(self), "done": self.done}

    def row(self) -> tuple[str, ...]:
        """Return the cells of :data:`COLUMNS`."""
        if not self.done:
            return (self.input, "", "", "", "", "", self.error)
        return (
            self.input,
            f"{self.exit}/{self.exits}",
            f"{self.milliseconds:.0f}",
            f"{self.quality_before:.3f} -> {self.quality_after:.3f}",
            f"{(self.macs or 0) / 1e9:.2f}",
            f"{self.share:.0%}",
            f"{self.output}" + (f" ({self.note})" if self.note else ""),
        )


def run_job(
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    model: NestedUNet | str | os.PathLike[str] | None = None,
    budget: str | float | None = None,
    threshold: float | None = None,
    exit: int | None = None,
    format: str = "png",
    overwrite: bool = False,
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
    quiet: bool = False,
) -> list[Result]:
    """Enhance files and folders into the folder ``out``; return one result per file.

    The choices are those of :func:`enhance`, the files those of :func:`plan`. ``format`` is "png"
    (lossless; a TIFF for CMYK), "jpeg" or "webp". An existing output is refused unless
    ``overwrite``; an input never is overwritten. Failures are printed on stderr as they happen;
    ``out`` gets report.csv and report.json, also after an interruption.

    Raises :class:`RequestError` if nothing could be begun.
    """
    if format not in get_args(Format):
        raise RequestError(f"format '{format}' is unknown: give png, jpeg or webp.")
    if max_pixels < 1:
        raise RequestError(f"--max-pixels {max_pixels} leaves nothing: give a positive number.")
    items = plan(inputs, out)
    enhancer, route = prepare(model, budget=budget, threshold=threshold, exit=exit, device=device)
    originals = _identities(items)
    results: list[Result] = []
    try:
        with progress(len(items), "enhancing", quiet=quiet) as bar:
            for item in items:
                result = _one(
                    item, enhancer, route, cast(Format, format), overwrite, max_pixels, originals
                )
                results.append(result)
                if result.error:
                    print(result.error, file=sys.stderr, flush=True)
                bar.advance(note=_shown(item.source.name))
    finally:
        if results:
            write_report(results, out)
    return results


def exit_code(results: Sequence[Result]) -> int:
    """Return 0 if every file was done, else 1."""
    return 0 if all(result.done for result in results) else 1


def write_report(results: Sequence[Result], out: str | os.PathLike[str]) -> None:
    """Write report.csv and report.json into ``out``."""
    folder = Path(out)
    write_json(folder / "report.json", [result.to_json() for result in results])
    write_csv(folder / "report.csv", (asdict(result) for result in results))


def _one(
    item: Item,
    enhancer: Enhancer,
    route: Route,
    format: Format,
    overwrite: bool,
    max_pixels: int,
    originals: set[tuple[int, int]],
) -> Result:
    """Do one file. Whatever goes wrong with it stays with it."""
    start, shown = time.perf_counter(), _shown(item.source)
    try:
        if item.problem:
            raise RequestError(f"'{item.source}' {item.problem}: change its permissions.")
        _check_target(Path(f"{item.target}{images.SUFFIX[format]}"), overwrite, originals)
        picture = images.read(item.source, max_pixels)
        target = Path(f"{item.target}{images.suffix_for(picture, format)}")
        _check_target(target, overwrite, originals)
        done = improve(picture, enhancer, route)
        done.save(target, format)
    except RequestError as error:
        return Result(shown, error=_shown(_named(error, item.source)))
    except Exception as error:  # a defect or an exhausted machine must not lose the other files
        reason = " ".join(str(error).split())[:200]
        return Result(shown, error=f"'{shown}' failed ({type(error).__name__}: {reason}).")
    height, width = picture.luma.shape
    return Result(
        shown,
        _shown(target),
        width,
        height,
        done.exit,
        done.exits,
        round((time.perf_counter() - start) * 1e3, 1),
        round(done.quality_before, 5),
        round(done.quality_after, 5),
        done.macs,
        round(done.share, 4),
        picture.note,
    )


def _check_target(target: Path, overwrite: bool, originals: set[tuple[int, int]]) -> None:
    if not os.path.lexists(target):
        return
    if target.exists() and _identity(target.stat()) in originals:
        raise RequestError(
            f"its result would replace the input '{target}': choose another folder with -o."
        )
    if not overwrite:
        raise RequestError(f"its result '{target}' exists already: use --overwrite to replace it.")


def _identities(items: Sequence[Item]) -> set[tuple[int, int]]:
    """Return what identifies the input files whatever paths and links lead to them."""
    found = set()
    for item in items:
        try:
            about = item.source.stat()
        except OSError:
            continue
        if stat.S_ISREG(about.st_mode):
            found.add(_identity(about))
    return found


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _named(error: RequestError, source: Path) -> str:
    """Return the sentence, beginning with the input's name."""
    text = " ".join(str(error).split())
    return text if text.startswith(f"'{source}'") else f"'{source}': {text}"


def _shown(path: str | os.PathLike[str]) -> str:
    """Return a name that any terminal and any JSON can hold."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else "?" for c in text)
