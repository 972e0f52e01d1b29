"""Runs: one recipe, one scale, one seed, one folder.

A run's folder holds ``config.json``, ``seed``, ``log.txt``, the recipe's metrics (CSV) and plots
(PNG and SVG), ``checkpoints/`` and, once everything is measured, ``claims.json``. Files appear
whole or not at all; a lock keeps a second process out of the folder; a killed run resumes there.

A recipe is a module with its data first and its story second::

    CLAIMS = (ClaimSpec("fewer-macs", "mean MACs fall", "macs_ratio", "<=", 0.75),)
    SETTINGS = {"quick": {"steps": 50, "lr": 1e-3}, "cpu": {"steps": 5000, "lr": 1e-3}}

    def recipe(run: Run) -> Iterator[Claim]:
        ...
        yield run.claim("fewer-macs", ratio, evidence="frontier.csv")
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import random
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any

from pantarhei.claims import (
    SCALES,
    Claim,
    ClaimSpec,
    Ledger,
    RunInfo,
    library_versions,
    this_commit,
    this_machine,
)
from pantarhei.devices import chosen_device
from pantarhei.errors import RequestError, nearest
from pantarhei.files import atomic, read_json, write_csv, write_figure, write_json

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from pantarhei.progress import Progress

Setting = int | float | str | bool | tuple[Any, ...]

_LOCK = ".lock"


class Settings(dict[str, Any]):
    """A recipe's settings: a mapping whose keys are attributes as well.

    >>> Settings(lr=0.1).lr
    0.1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting '{name}' among {sorted(self)}") from None


@dataclass(frozen=True)
class Recipe:
    """What a recipe module defines, checked: its claims, its settings and its story.

    Raises ``ValueError`` (a defect of the recipe, not of a request) where claim ids repeat, or the
    scales' settings differ in their keys or types.
    """

    slug: str
    claims: tuple[ClaimSpec, ...]
    settings: Mapping[str, Mapping[str, Setting]]
    measure: Callable[[Run], Iterator[Claim]]

    def __post_init__(self) -> None:
        ids = [spec.id for spec in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"recipe '{self.slug}' repeats a claim id: {ids}")
        kinds = [
            {key: type(value) for key, value in values.items()} for values in self.settings.values()
        ]
        if not kinds or any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"recipe '{self.slug}': each scale has the same settings and types")
        if unknown := set(self.settings) - set(SCALES):
            raise ValueError(f"recipe '{self.slug}' has unknown scales {unknown}")

    @classmethod
    def of(cls, slug: str, module: ModuleType) -> Recipe:
        """Read a recipe module's CLAIMS, SETTINGS and ``recipe``."""
        return cls(slug, tuple(module.CLAIMS), module.SETTINGS, module.recipe)

    def settings_at(self, scale: str, changes: Mapping[str, Any] | None = None) -> Settings:
        """Return the settings of ``scale`` with ``changes``, each typed as the setting it replaces.

        A change may be text, as ``--set`` gives it. An unknown scale or setting, or a value of the
        wrong type, raises :class:`RequestError`.
        """
        if scale not in self.settings:
            raise RequestError(
                f"'{self.slug}' has no scale '{scale}': choose one of "
                f"{', '.join(self.settings)}.{nearest(scale, self.settings)}"
            )
        settings = Settings(self.settings[scale])
        for key, value in (changes or {}).items():
            if key not in settings:
                raise RequestError(
                    f"'{self.slug}' has no setting '{key}': choose one of "
                    f"{', '.join(sorted(settings)) or 'none'}.{nearest(key, settings)}"
                )
            settings[key] = self._typed(key, value, settings[key])
        return settings

    def _typed(self, key: str, value: Any, default: Setting) -> Setting:
        typed = parse_setting(key, value, default)
        # A count or a rate that is never negative in the recipe has no negative meaning.
        defaults = [values[key] for values in self.settings.values()]
        numbers = [v for d in defaults for v in (d if isinstance(d, tuple) else (d,))]
        given = typed if isinstance(typed, tuple) else (typed,)
        if not any(isinstance(v, str) or v < 0 for v in numbers) and any(
            not isinstance(v, str) and v < 0 for v in given
        ):
            raise RequestError(f"Setting '{key}' is never negative: {format_setting(typed)} is.")
        return typed


def parse_setting(key: str, value: Any, default: Setting) -> Setting:
    """Read ``value`` (text or typed) as the type of ``default``; a tuple is ``a,b,c``.

    >>> parse_setting("steps", "1_000", 5), parse_setting("width", "0.5,1", (0.25, 1.0))
    (1000, (0.5, 1.0))

    Raises :class:`RequestError` for text that is not of that type, an integer of more than 63 bits
    and a number that is not finite.
    """
    if isinstance(default, tuple):
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, Sequence):
            parts = [parts]
        kept = [part for part in parts if not (isinstance(part, str) and not part.strip())]
        return tuple(parse_setting(key, part, default[0] if default else "") for part in kept)
    text = str(value).strip()
    shown = text if len(text) <= 40 else text[:37] + "..."
    if isinstance(default, str):
        if not text.isprintable():
            raise RequestError(f"Setting '{key}' holds characters that cannot be printed.")
        return text
    if isinstance(default, bool):
        words = {"true": True, "yes": True, "on": True, "1": True}
        words |= {"false": False, "no": False, "off": False, "0": False}
        if text.lower() not in words:
            raise RequestError(f"Setting '{key}' is true or false, not '{shown}'.")
        return words[text.lower()]
    kind = "an integer" if isinstance(default, int) else "a number"
    try:
        number = int(text) if isinstance(default, int) else float(text)
    except ValueError:
        raise RequestError(f"Setting '{key}' is {kind}, not '{shown}'.") from None
    if isinstance(number, int) and abs(number) >= 2**63:
        raise RequestError(f"Setting '{key}' is too large: '{shown}' has more than 63 bits.")
    if not math.isfinite(number):
        raise RequestError(f"Setting '{key}' must be finite, not '{shown}'.")
    return number


def format_setting(value: Any) -> str:
    """Write a setting as ``--set`` reads it.

    >>> format_setting((0.5, 1.0)), format_setting(True)
    ('0.5,1.0', 'true')
    """
    if isinstance(value, tuple | list):
        return ",".join(map(format_setting, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


class Run:
    """A recipe's working place: its settings, its folder and everything that goes there.

    Attributes: ``paper`` (slug), ``scale``, ``seed``, ``device`` (torch.device), ``settings``
    (mapping with attribute access), ``dir`` (Path), ``resume`` (whether the folder held this run
    before), ``quiet``. Made by :func:`start`; used as a context manager it releases its folder.
    Under ``torchrun`` every process has a Run, and only the first one writes.
    """

    def __init__(
        self,
        recipe: Recipe,
        info: RunInfo,
        device: torch.device,
        folder: Path,
        *,
        resume: bool = False,
        quiet: bool = False,
        lock: IO[str] | None = None,
    ) -> None:
        self.recipe, self.info = recipe, info
        self.paper, self.scale, self.seed = info.paper, info.scale, info.seed
        self.settings = Settings(info.settings)
        self.device, self.dir = device, folder
        self.resume, self.quiet = resume, quiet
        self.leads = _rank() == 0
        self._lock = lock
        self._began = time.monotonic()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def seconds(self) -> float:
        """Seconds of work so far, those before an interruption included."""
        return self.info.seconds + time.monotonic() - self._began

    def path(self, name: str) -> Path:
        """Return ``dir/name``, its folder made; a name that leaves the run's folder is refused."""
        path = self.dir / name
        if not path.resolve().is_relative_to(self.dir.resolve()):
            raise ValueError(f"'{name}' lies outside the run's folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def checkpoint(self, name: str) -> Path:
        """Return ``dir/checkpoints/name``: where ``fit`` or a recipe keeps what it resumes from."""
        return self.path(f"checkpoints/{name}")

    def log(self, sentence: str) -> None:
        """Add a line to ``log.txt`` with the time (UTC), and show it unless quiet."""
        if not self.leads:
            return
        line = " ".join(sentence.split())
        try:
            with (self.dir / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"{_now()} {line}\n")
        except OSError as error:
            raise RequestError(
                f"'{self.dir / 'log.txt'}' could not be written ({error.strerror}): free some "
                "space, then resume the run."
            ) from error
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def metrics(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write ``rows`` as ``name`` (CSV); the columns are the rows' keys in order of arrival."""
        path = self.path(name if name.endswith(".csv") else f"{name}.csv")
        if self.leads:
            write_csv(path, rows)
        return path

    def figure(self, name: str, fig: Figure) -> Path:
        """Write ``fig`` as ``name.png`` and ``name.svg``; return the PNG's path."""
        png = self.path(f"{name.removesuffix('.png').removesuffix('.svg')}.png")
        if self.leads:
            write_figure(png, fig)
        if pyplot := sys.modules.get("matplotlib.pyplot"):
            pyplot.close(fig)
        return png

    def progress(self, total: int, label: str, start: int = 0) -> AbstractContextManager[Progress]:
        """Show progress over ``total`` steps: a bar on a terminal, plain lines elsewhere.

        ``start`` steps are done already, as after a resume.
        """
        from pantarhei.progress import progress

        return progress(total, label, quiet=self.quiet or not self.leads, start=start)

    def claim(self, id: str, measured: Any, evidence: str = "") -> Claim:
        """Judge ``measured`` (a number or a tensor of one) by the claim ``id``'s bound.

        ``evidence`` names the file in the run's folder that shows the number.
        """
        known = {spec.id: spec for spec in self.recipe.claims}
        if id not in known:
            raise ValueError(f"recipe '{self.paper}' has no claim '{id}': {sorted(known)}")
        spec, value = known[id], float(measured)
        bound = spec.bound_at(self.scale)
        return Claim(
            paper=self.paper,
            id=id,
            statement=spec.statement,
            quantity=spec.quantity,
            direction=spec.direction,
            bound=math.nan if bound is None else bound,
            paper_value=spec.paper_value,
            measured=value,
            holds=spec.holds(value, self.scale),
            scale=self.scale,
            seed=self.seed,
            seconds=round(self.seconds, 3),
            evidence=evidence,
        )


@dataclass(frozen=True)
class Result:
    """What a finished run measured; ``holds`` when every claim made at its scale does."""

    dir: Path
    document: Mapping[str, Any]
    claims: tuple[Claim, ...]

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(claim.holds for claim in self.claims)


def start(
    recipe: Recipe,
    *,
    scale: str = "quick",
    seed: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    changes: Mapping[str, Any] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> Run:
    """Take a folder for a run of ``recipe``, or with ``resume`` the folder of one begun before.

    Without ``out`` a new run gets ``runs/<slug>-<scale>-<UTC time>`` in the current folder, and
    ``resume`` takes the newest unfinished run of that paper and scale there. ``changes`` replaces
    settings. A resumed run keeps its seed and settings; naming others is refused.

    Raises :class:`RequestError`, before anything is written, for whatever cannot be served.
    """
    settings = recipe.settings_at(scale, changes)
    if seed is not None and not 0 <= seed < 2**32:
        raise RequestError(f"Seed {seed} is out of range: choose one from 0 to {2**32 - 1}.")
    target = _device(device)
    if _rank() > 0:
        return _follow(recipe, target, out)
    folder, lock = _take(recipe.slug, scale, out, resume)
    try:
        begun = (folder / "config.json").exists()
        if begun:
            info = _continued(recipe, folder, scale, seed, changes or {})
        else:
            info = _begun(recipe, folder, scale, seed or 0, settings)
        finished = (folder / "claims.json").exists()
        if not finished:
            info = _session(folder, info, target)
        run = Run(recipe, info, target, folder, resume=begun, quiet=quiet, lock=lock)
        if not finished:
            run.log(f"{'Resuming' if begun else 'Starting'} {info.command} in '{folder}'.")
        return run
    except BaseException:
        lock.close()
        raise


def execute(run: Run, ledger: Ledger | None = None) -> Result:
    """Measure every claim of the run's recipe, write ``claims.json``, and tell the ledger.

    A run that was finished before is read, not repeated. A claim the recipe never measured is
    reported as one that does not hold.
    """
    finished = run.path("claims.json")
    if not finished.exists():
        claims = _measure(run)
        document = {
            "paper": run.paper,
            "scale": run.scale,
            "seed": run.seed,
            "seconds": round(run.seconds, 3),
            "device": run.info.device,
            "versions": dict(run.info.versions),
            "claims": [claim.to_json() for claim in claims],
        }
        if not run.leads:
            return Result(run.dir, document, claims)
        write_json(finished, document)
    result = read_result(run.dir)
    if ledger is not None and run.leads:
        # The ledger knows a run by its uid, so a kill between the two writes costs nothing.
        ledger.add(replace(run.info, seconds=result.document["seconds"]), result.claims)
    return result


def read_result(folder: str | os.PathLike[str]) -> Result:
    """Read a finished run's ``claims.json``."""
    path = Path(folder) / "claims.json"
    document = read_json(path)
    try:
        shared = {key: document[key] for key in ("paper", "scale", "seed", "seconds")}
        claims = tuple(Claim.from_json(row, **shared) for row in document["claims"])
    except (KeyError, TypeError) as error:
        raise RequestError(f"'{path}' is not a run's claims ({error}): run it again.") from error
    return Result(Path(folder), document, claims)


def _measure(run: Run) -> tuple[Claim, ...]:
    _seed_everything(run.seed)
    os.environ.setdefault("MPLBACKEND", "Agg")
    claims: dict[str, Claim] = {}
    try:
        for claim in run.recipe.measure(run):
            if claim.id in claims:
                raise ValueError(f"recipe '{run.paper}' measured claim '{claim.id}' twice")
            claims[claim.id] = claim
            run.log(_verdict(claim))
    except Exception as error:
        wrong = _request_error(error)
        with suppress(RequestError):
            run.log(f"Stopped: {wrong or f'{type(error).__name__}: {error}'}")
        if wrong is None:
            raise
        raise wrong from error
    for spec in run.recipe.claims:
        if spec.bound_at(run.scale) is not None and spec.id not in claims:
            claims[spec.id] = run.claim(spec.id, math.nan, "not measured")
    order = [spec.id for spec in run.recipe.claims]
    made = [claim for claim in claims.values() if claim.made]
    return tuple(sorted(made, key=lambda claim: order.index(claim.id)))


def _verdict(claim: Claim) -> str:
    measured = f"{claim.id}: {claim.quantity} = {claim.measured:.6g}"
    if not claim.made:
        return f"{measured}; not a claim at scale '{claim.scale}'."
    verdict = "holds" if claim.holds else "does NOT hold"
    return f"{measured} {claim.direction} {claim.bound:.6g} {verdict}."


def _request_error(error: Exception) -> RequestError | None:
    """Return what the user can do about ``error``, or None where it is a defect of ours."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        name = error.filename or "the run's folder"
        return RequestError(
            f"'{name}' could not be written ({error.strerror}): free some space, then resume."
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return RequestError(
            "The memory did not suffice: choose a smaller scale, or smaller settings with --set."
        )
    return None


def _seed_everything(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _rank() -> int:
    """Return this process's rank under torchrun, 0 elsewhere."""
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1")
    return 0 if alone else int(os.environ.get("RANK", "0"))


def _device(name: str) -> torch.device:
    """Return the device of this process, one of its own under torchrun."""
    import torch

    where = chosen_device(name)
    if where.type == "cuda" and where.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return where


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _begun(recipe: Recipe, folder: Path, scale: str, seed: int, settings: Settings) -> RunInfo:
    own = recipe.settings[scale]
    overrides = {key: value for key, value in settings.items() if value != own[key]}
    words = ["pantarhei", "run", recipe.slug, "--scale", scale, "--seed", str(seed)]
    for key, value in overrides.items():
        words += ["--set", f"{key}={format_setting(value)}"]
    return RunInfo(
        uid=uuid.uuid4().hex,
        paper=recipe.slug,
        scale=scale,
        seed=seed,
        device="",
        date=_now(),
        command=shlex.join(words),
        folder=str(folder.resolve()),
        settings=settings,
        overrides=overrides,
    )


def _continued(
    recipe: Recipe, folder: Path, scale: str, seed: int | None, changes: Mapping[str, Any]
) -> RunInfo:
    """Return the record of the run in ``folder``, having checked that it is the one asked for."""
    info = _read_config(folder)
    own = recipe.settings_at(scale)
    different = [
        f"{what} {now} is asked for and {before} is there"
        for what, before, now in (
            ("paper", info.paper, recipe.slug),
            ("scale", info.scale, scale),
            ("seed", info.seed, info.seed if seed is None else seed),
            ("settings", sorted(info.settings), sorted(own)),
        )
        if before != now
    ]
    if different:
        raise RequestError(
            f"'{folder}' holds another run: {'; '.join(different)}; choose another folder."
        )
    settings = Settings(
        {key: parse_setting(key, info.settings[key], default) for key, default in own.items()}
    )
    for key, value in recipe.settings_at(scale, changes).items():
        if key in changes and value != settings[key]:
            raise RequestError(
                f"'{folder}' holds a run with {key}={format_setting(settings[key])}: it cannot "
                f"resume with {key}={format_setting(value)}; choose another folder."
            )
    return replace(info, settings=settings)


def _session(folder: Path, info: RunInfo, device: torch.device) -> RunInfo:
    """Write ``config.json`` for a session that begins now, on this machine and these versions."""
    config = folder / "config.json"
    before = info.seconds
    if config.exists():
        # It was written when the last session began; the newest file tells when that ended.
        times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
        before += max(0.0, max(times) - config.stat().st_mtime)
    info = replace(
        info,
        device=device.type,
        machine=this_machine(_device_name(device)),
        versions=library_versions(),
        commit=this_commit(),
        seconds=before,
    )
    write_json(config, asdict(info))
    with atomic(folder / "seed") as temporary:
        temporary.write_text(f"{info.seed}\n")
    return info


def _read_config(folder: Path) -> RunInfo:
    path = folder / "config.json"
    record = read_json(path)
    if not isinstance(record, dict) or set(record) != set(RunInfo.__dataclass_fields__):
        raise RequestError(f"'{path}' is not a run's configuration: choose another folder.")
    return RunInfo(**record)


def _follow(recipe: Recipe, device: torch.device, out: str | os.PathLike[str] | None) -> Run:
    """Join, as a later process of torchrun, the run whose folder the first process took."""
    if out is None:
        raise RequestError("Under torchrun, name the run's folder with --out.")
    folder, deadline = Path(out), time.monotonic() + 120
    while not (folder / "config.json").exists():
        if time.monotonic() > deadline:
            raise RequestError(f"'{folder}' was not prepared by the first process: see its error.")
        time.sleep(0.05)
    return Run(recipe, _read_config(folder), device, folder, quiet=True)


def _take(
    slug: str, scale: str, out: str | os.PathLike[str] | None, resume: bool
) -> tuple[Path, IO[str]]:
    """Return the run's folder and the lock that keeps every other process out of it."""
    if out is not None:
        return _take_named(Path(out), resume)
    if resume:
        return _take_unfinished(slug, scale)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for number in range(1, 1000):
        folder = Path("runs") / f"{slug}-{scale}-{stamp}{f'-{number}' if number > 1 else ''}"
        if _make(folder, fresh=True):
            return folder, _locked(folder)
    raise RequestError("This folder holds too many runs of this second: name one with --out.")


def _take_named(folder: Path, resume: bool) -> tuple[Path, IO[str]]:
    if resume and not folder.exists():
        raise RequestError(f"'{folder}' does not exist: there is no run to resume.")
    _make(folder)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    strangers = {name for name in names if name != _LOCK and not name.startswith(".tmp-")}
    if strangers and "config.json" not in strangers:
        raise RequestError(f"'{folder}' holds files that are not a run: choose an empty folder.")
    lock = _locked(folder)
    if (folder / "config.json").exists() and not resume:
        lock.close()
        state = "a finished" if (folder / "claims.json").exists() else "an unfinished"
        raise RequestError(
            f"'{folder}' holds {state} run already: add --resume or choose another folder."
        )
    return folder, lock


def _take_unfinished(slug: str, scale: str) -> tuple[Path, IO[str]]:
    found: list[tuple[str, Path]] = []
    for config in Path("runs").glob("*/config.json"):
        with suppress(RequestError):
            info = _read_config(config.parent)
            unfinished = not (config.parent / "claims.json").exists()
            if unfinished and (info.paper, info.scale) == (slug, scale):
                found.append((info.date, config.parent))
    busy = ""
    for _, folder in sorted(found, reverse=True):
        try:
            return folder, _locked(folder)
        except RequestError as error:
            busy = f" ({error})"
    raise RequestError(
        f"No unfinished run of '{slug}' at scale '{scale}' lies under '{Path('runs').resolve()}'"
        f"{busy}: name its folder with --out, or start one without --resume."
    )


def _make(folder: Path, fresh: bool = False) -> bool:
    """Make ``folder``; with ``fresh``, return False where it is there already."""
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
    except FileExistsError:
        if fresh and folder.is_dir():
            return False
        raise RequestError(f"'{folder}' is a file: name a folder with --out.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"'{folder}' cannot be made ({reason}): name another folder with --out."
        ) from error
    return True


def _locked(folder: Path) -> IO[str]:
    try:
        lock = (folder / _LOCK).open("a", encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"'{folder}' cannot be written ({error.strerror}): choose another folder with --out."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RequestError(
            f"'{folder}' is being written by another run: wait for it or choose another folder."
        ) from None
    return lock
