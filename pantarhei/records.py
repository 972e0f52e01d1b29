"""Results as files: what a ledger holds, to be kept beside code or handed to somebody else.

A record is one run with its claims, as JSON. This repository keeps the records of the runs behind
RESULTS.md in ``evidence/``, so that the file can be rendered anew on any machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pantarhei.claims import Claim, Entry, Ledger, RunInfo
from pantarhei.errors import RequestError
from pantarhei.files import read_json, write_json

_FORMAT, _VERSION = "pantarhei-record", 1


def export_records(ledger: Ledger, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the runs behind the newest results, one file each; return the files.

    ``folder/<paper>-<scale>.json`` is replaced where it exists. A paper whose newest results at a
    scale come from several runs has ``-2``, ``-3`` ... after the first.
    """
    runs: dict[str, list[Entry]] = {}
    for entry in ledger.latest():
        runs.setdefault(entry.run.uid, []).append(entry)
    written: list[Path] = []
    for entries in runs.values():
        run = entries[0].run
        stem, number = f"{run.paper}-{run.scale}", 1
        while (path := Path(folder) / f"{stem}{f'-{number}' * (number > 1)}.json") in written:
            number += 1
        write_json(path, _record(run, [entry.claim for entry in entries]))
        written.append(path)
    return written


def import_records(ledger: Ledger, folder: str | os.PathLike[str]) -> int:
    """Add the records in a folder to a ledger; return how many were new.

    Raises :class:`RequestError` for a folder without records and for a file that is none: nothing
    is added then.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise RequestError(f"'{folder}' holds no records (*.json): name another folder.")
    found = [read_record(path) for path in files]
    return sum(ledger.add(run, claims) for run, claims in found)


def _record(run: RunInfo, claims: list[Claim]) -> dict[str, Any]:
    # where the run's folder lay on that machine is nobody else's concern
    described = {f.name: getattr(replace(run, folder=""), f.name) for f in fields(RunInfo)}
    rows = [claim.to_json() | {"seconds": claim.seconds} for claim in claims]
    return {"format": _FORMAT, "version": _VERSION, "run": described, "claims": rows}


def read_record(path: str | os.PathLike[str]) -> tuple[RunInfo, list[Claim]]:
    """Read one record; a file that is none raises :class:`RequestError`."""
    record = read_json(path)
    if not isinstance(record, Mapping) or record.get("format") != _FORMAT:
        raise RequestError(f"'{path}' is not a record of a run: move it out of the folder.")
    if record.get("version") != _VERSION:
        raise RequestError(f"'{path}' was written by a newer pantarhei: install that version.")
    try:
        run = RunInfo(**record["run"])
        shared = {"paper": run.paper, "scale": run.scale, "seed": run.seed}
        claims = [Claim.from_json(row, **shared) for row in record["claims"]]
        if not all(isinstance(getattr(run, name), str) for name in ("uid", "paper", "date")):
            raise ValueError("uid, paper and date are text")
        if not all(math.isfinite(float(c.bound)) and isinstance(c.id, str) for c in claims):
            raise ValueError("a claim without a bound")
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"'{path}' is a damaged record ({error}): export it again.") from error
    return run, claims
