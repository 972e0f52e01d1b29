"""Claims: measured inequalities, and the ledger that keeps them.

A claim says *quantity (<= or >=) bound*. The bound comes from the paper and stands in the recipe
before anything is measured; the verdict is arithmetic, never judgement. The :class:`Ledger` is one
SQLite file in the user's data folder (``PANTARHEI_HOME`` moves it) that remembers every result with
what it was made with: commit, versions, machine, seed, settings.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import sqlite3
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pantarhei.devices import processors
from pantarhei.errors import RequestError

Scale = Literal["quick", "cpu", "gpu"]
SCALES: tuple[Scale, ...] = ("quick", "cpu", "gpu")


@dataclass(frozen=True)
class ClaimSpec:
    """What a paper promises, as an inequality fixed before it is measured.

    ``bound`` is one number for every scale, or a mapping from scale to number; at a scale that the
    mapping leaves out, the claim is not made. ``paper_value`` is the paper's own figure with its
    setting, for the reader only.

    >>> spec = ClaimSpec("fewer-macs", "mean MACs fall", "macs_ratio", "<=", {"cpu": 0.75})
    >>> spec.bound_at("cpu"), spec.bound_at("quick")
    (0.75, None)
    >>> spec.holds(0.7, "cpu"), spec.holds(float("nan"), "cpu")
    (True, False)
    """

    id: str
    statement: str
    quantity: str
    direction: Literal["<=", ">="]
    bound: float | Mapping[str, float]
    paper_value: str | float | None = None

    def __post_init__(self) -> None:
        if self.direction not in ("<=", ">="):
            raise ValueError(f"claim '{self.id}': direction is '<=' or '>=', not {self.direction}")
        bounds = self.bound if isinstance(self.bound, Mapping) else {"quick": self.bound}
        for scale, bound in bounds.items():
            if scale not in SCALES or not math.isfinite(bound):
                raise ValueError(f"claim '{self.id}': no finite bound for a scale in {bounds}")

    def bound_at(self, scale: str) -> float | None:
        """Return the bound at ``scale``, or None where the claim is not made."""
        bound = self.bound.get(scale) if isinstance(self.bound, Mapping) else self.bound
        return None if bound is None else float(bound)

    def holds(self, measured: float, scale: str) -> bool:
        """Compare; a value that is not finite never holds, nor does a claim not made."""
        bound = self.bound_at(scale)
        if bound is None or not math.isfinite(measured):
            return False
        return measured <= bound if self.direction == "<=" else measured >= bound


@dataclass(frozen=True)
class Claim:
    """One measured inequality. ``seconds`` is the run's age when it was measured.

    ``bound`` is NaN where the claim is not made at this scale; such a result is logged and kept
    out of the verdict.
    """

    paper: str
    id: str
    statement: str
    quantity: str
    direction: Literal["<=", ">="]
    bound: float
    paper_value: str | float | None
    measured: float
    holds: bool
    scale: str
    seed: int
    seconds: float
    evidence: str = ""

    @property
    def made(self) -> bool:
        """Whether the claim is made at this scale at all."""
        return not math.isnan(self.bound)

    def to_json(self) -> dict[str, Any]:
        """Return the claim as it stands in ``claims.json``; what is not finite becomes null."""
        keys = ("id", "statement", "quantity", "direction", "bound", "paper_value")
        row: dict[str, Any] = {key: getattr(self, key) for key in keys}
        row["measured"] = self.measured if math.isfinite(self.measured) else None
        return row | {"holds": self.holds, "evidence": self.evidence}

    @classmethod
    def from_json(cls, row: Mapping[str, Any], **run: Any) -> Claim:
        """Rebuild a claim from its row and the fields it shares with its run."""
        measured = row["measured"]
        return cls(**{**row, **run, "measured": math.nan if measured is None else measured})


def library_versions() -> dict[str, str]:
    """Return the versions that decide a result: python, torch, pantarhei (torch unimported)."""
    found = {"python": platform.python_version()}
    for name in ("torch", "pantarhei"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def this_machine(device: str = "cpu") -> dict[str, Any]:
    """Return this machine's processor, usable cores and the name of ``device``."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    processor = models[0] if models else platform.processor() or platform.machine()
    return {"cpu": processor, "cores": processors(), "device": device}


@functools.cache
def this_commit() -> str | None:
    """Return the commit of the pantarhei checkout this code runs from, None when it is none.

    A checkout whose library differs from its commit says so: ``<commit>-modified``.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--", "pantarhei")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-modified" if changed else head


@dataclass(frozen=True)
class RunInfo:
    """What a run was made with: everything needed to make it again.

    ``overrides`` are the settings that differ from the recipe's own (``--set``); ``commit`` is the
    library's own checkout, None for an installed copy; ``date`` is UTC, ISO 8601.
    """

    uid: str
    paper: str
    scale: str
    seed: int
    device: str
    date: str
    command: str
    folder: str
    settings: Mapping[str, Any]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=library_versions)
    machine: Mapping[str, Any] = field(default_factory=this_machine)
    commit: str | None = field(default_factory=this_commit)
    seconds: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A claim in the ledger beside the run that measured it."""

    claim: Claim
    run: RunInfo


def ledger_path() -> Path:
    """Return where the ledger lies: in ``PANTARHEI_HOME`` or the user's data folder."""
    named = os.environ.get("PANTARHEI_HOME")
    if named:
        return Path(named) / "ledger.sqlite"
    import platformdirs

    folder = platformdirs.user_data_path("pantarhei")
    if not folder.is_absolute():
        raise RequestError("This user has no home folder: set PANTARHEI_HOME to a folder to use.")
    return folder / "ledger.sqlite"


# Each script takes the ledger from version i to i + 1; a new one is only ever appended.
_MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE runs (
        uid TEXT PRIMARY KEY, paper TEXT NOT NULL, scale TEXT NOT NULL, seed INTEGER NOT NULL,
        device TEXT NOT NULL, date TEXT NOT NULL, seconds REAL NOT NULL, command TEXT NOT NULL,
        folder TEXT NOT NULL, settings TEXT NOT NULL, overrides TEXT NOT NULL,
        versions TEXT NOT NULL, machine TEXT NOT NULL, "commit" TEXT
    );
    CREATE TABLE claims (
        uid TEXT NOT NULL REFERENCES runs(uid), position INTEGER NOT NULL, id TEXT NOT NULL,
        statement TEXT NOT NULL, quantity TEXT NOT NULL, direction TEXT NOT NULL,
        bound REAL NOT NULL, paper_value TEXT NOT NULL, measured REAL, holds INTEGER NOT NULL,
        seconds REAL NOT NULL, evidence TEXT NOT NULL, PRIMARY KEY (uid, id)
    );
    CREATE INDEX runs_by_paper ON runs (paper, scale, date);
    """,
)
_APPLICATION_ID = 0x50526865  # "PRhe": tells a ledger from any other SQLite file
_JSON_COLUMNS = ("settings", "overrides", "versions", "machine")


class Ledger:
    """Every result that this user's runs measured, in one SQLite file.

    Several processes may add at once (write-ahead log; a writer waits up to a minute for its turn).
    A file that is damaged, foreign or written by a newer pantarhei raises :class:`RequestError` and
    stays as it is.

    >>> import tempfile
    >>> ledger = Ledger(Path(tempfile.mkdtemp()) / "ledger.sqlite")
    >>> info = RunInfo("u1", "rbqe", "quick", 0, "cpu", "2026-01-01T00:00:00Z", "", "", {})
    >>> spec = ClaimSpec("fewer-macs", "mean MACs fall", "macs_ratio", "<=", 0.75)
    >>> ledger.add(info, [Claim("rbqe", spec.id, spec.statement, spec.quantity, "<=", 0.75, None,
    ...                         0.5, True, "quick", 0, 1.0)])
    True
    >>> [(entry.claim.id, entry.claim.holds) for entry in ledger.latest()]
    [('fewer-macs', True)]
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else ledger_path()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(
                f"'{self.path.parent}' cannot hold the ledger ({error.strerror}): "
                "set PANTARHEI_HOME to a folder that can be written."
            ) from error
        with self._connect() as connection:
            self._prepare(connection)

    def add(self, run: RunInfo, claims: Iterable[Claim]) -> bool:
        """Keep a run and its claims; return False where this run is there already."""
        record = {name: getattr(run, name) for name in RunInfo.__dataclass_fields__}
        for name in _JSON_COLUMNS:
            record[name] = json.dumps(record[name], sort_keys=True, default=list)
        with self._connect() as connection:
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("SELECT 1 FROM runs WHERE uid = ?", (run.uid,)).fetchone():
                connection.execute("ROLLBACK")
                return False
            _insert(connection, "runs", record)
            for position, claim in enumerate(claims):
                row = claim.to_json() | {"paper_value": json.dumps(claim.paper_value)}
                row |= {"uid": run.uid, "position": position, "seconds": claim.seconds}
                _insert(connection, "claims", row)
            connection.execute("COMMIT")
        return True

    def latest(
        self, *, paper: str | None = None, scale: str | None = None, changed: bool = False
    ) -> list[Entry]:
        """Return the newest result of each claim per paper and scale, ordered by the two.

        Runs whose settings were changed with ``--set`` are left out: they measure something else
        than the recipe does. With ``changed`` only they are returned, newest per set of changes.
        """
        query = """
            SELECT runs.*, claims.*, claims.seconds AS claim_seconds
            FROM claims JOIN runs USING (uid)
            WHERE (? IS NULL OR paper = ?) AND (? IS NULL OR scale = ?)
              AND (overrides != '{}') = ?
            ORDER BY date DESC, runs.rowid DESC, position
        """
        with self._connect() as connection:
            rows = connection.execute(query, (paper, paper, scale, scale, changed)).fetchall()
        newest: dict[tuple[str, ...], Entry] = {}
        for row in rows:
            key = (row["paper"], row["scale"], row["id"], row["overrides"])
            if key not in newest:
                newest[key] = _entry(row)
        rank: dict[str, int] = {name: index for index, name in enumerate(SCALES)}
        return sorted(
            newest.values(), key=lambda entry: (entry.run.paper, rank.get(entry.run.scale, 9))
        )

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
            connection.row_factory = sqlite3.Row
            yield connection
        except sqlite3.DatabaseError as error:
            raise RequestError(self._explain(error)) from error
        finally:
            if connection is not None:
                connection.close()

    def _explain(self, error: sqlite3.DatabaseError) -> str:
        if not isinstance(error, sqlite3.OperationalError):
            return (
                f"The ledger '{self.path}' is damaged ({error}): move it away, or set "
                "PANTARHEI_HOME to another folder; the runs' own claims.json files are unaffected."
            )
        return (
            f"The ledger '{self.path}' cannot be used ({error}): see that it can be written and "
            "that the disk has room, or set PANTARHEI_HOME to another folder."
        )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Create or migrate the tables, refusing what is not a ledger of ours."""
        version = self._version(connection)
        if version == len(_MIGRATIONS):
            return
        # Turning the write-ahead log on needs the file alone for a moment, and SQLite does not
        # wait for that by itself when two processes create the ledger together.
        for attempt in range(100):
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or attempt == 99:
                    raise
                time.sleep(0.05)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        for number, script in enumerate(_MIGRATIONS):
            if number >= self._version(connection):
                for statement in filter(str.strip, script.split(";")):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {number + 1}")
        connection.execute("COMMIT")

    def _version(self, connection: sqlite3.Connection) -> int:
        """Return the schema version of a file that is a ledger or empty."""
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if application != _APPLICATION_ID and (tables or version):
            raise RequestError(
                f"'{self.path}' is a database of another program: set PANTARHEI_HOME to a folder "
                "for pantarhei."
            )
        if version > len(_MIGRATIONS):
            raise RequestError(
                f"The ledger '{self.path}' was written by a newer pantarhei: install that version, "
                "or set PANTARHEI_HOME to another folder."
            )
        return int(version)


def _insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    columns = ", ".join(f'"{name}"' for name in row)
    marks = ", ".join("?" for _ in row)
    connection.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", tuple(row.values()))


def _entry(row: sqlite3.Row) -> Entry:
    record = {name: row[name] for name in RunInfo.__dataclass_fields__}
    for name in _JSON_COLUMNS:
        record[name] = json.loads(record[name])
    run = RunInfo(**record)
    claim = Claim(
        paper=run.paper,
        id=row["id"],
        statement=row["statement"],
        quantity=row["quantity"],
        direction=row["direction"],
        bound=row["bound"],
        paper_value=json.loads(row["paper_value"]),
        measured=math.nan if row["measured"] is None else row["measured"],
        holds=bool(row["holds"]),
        scale=run.scale,
        seed=run.seed,
        seconds=row["claim_seconds"],
        evidence=row["evidence"],
    )
    return Entry(claim, run)
