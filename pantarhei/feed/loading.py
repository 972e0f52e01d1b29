"""What comes into the store by itself: the catalogue's cards, and what was measured of them.

Results are those that ship with pantarhei, as records, and those of the user's own ledger. The
store keeps the newest result of each claim at each scale, wherever it was measured.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pantarhei.claims import Claim, Ledger, RunInfo, ledger_path
from pantarhei.errors import RequestError
from pantarhei.feed import papers, schema, trends
from pantarhei.feed.papers import Added
from pantarhei.feed.store import Store, clean, fact, insert, keep_facts, lock
from pantarhei.papers import catalogue
from pantarhei.records import read_record
from pantarhei.report import number

Result = tuple[RunInfo, Claim]


@dataclass(frozen=True)
class Loaded:
    """What :func:`load` found: the cards, and how many claims have a newer result than before."""

    cards: Added
    claims: int


def load(
    store: Store,
    *,
    evidence: str | os.PathLike[str] | None = None,
    ledger: str | os.PathLike[str] | None = None,
    now: float | None = None,
) -> Loaded:
    """Bring cards and results up to date; takes milliseconds where nothing changed.

    ``evidence`` is a folder of records (those that ship with pantarhei unless named), ``ledger``
    the ledger's file (the user's own unless named); what is not there is passed over, and so are
    papers without a card and runs with changed settings. Nothing that was loaded is taken away.

    A record or a ledger that is damaged raises :class:`RequestError`; what could be loaded before
    it stays.
    """
    folder = Path(evidence if evidence is not None else _shipped())
    own = Path(ledger if ledger is not None else ledger_path()).absolute()
    cards = [
        {
            "key": card.slug,
            "title": card.title,
            "summary": card.summary,
            "date": card.date,
            "authors_count": card.authors_count,
            "arxiv": card.arxiv,
            "code": card.code,
            "wing": card.wing,
            "status": card.status,
            "source": "catalogue",
        }
        for card in catalogue()
    ]
    # A new card may be that of a paper whose results were passed over.
    stamp = hashlib.sha256(json.dumps(cards).encode()).hexdigest()
    added, claims = Added(0, 0, len(cards)), 0
    if _news(store, "loaded/cards", stamp):
        with store.write() as c:
            added = papers.add(c, cards, now=now)
            keep_facts(c, {"loaded/cards": stamp})
    claims += _load(
        store, "loaded/evidence", stamp + _content(folder), "shipped", lambda: _records(folder)
    )
    if own.exists():
        # of this machine: others may share the database
        name = f"loaded/ledger/{platform.node()}{own}"
        claims += _load(store, name, stamp + _state(own), "here", lambda: _entries(own))
    return Loaded(added, claims)


def keep(c: sa.Connection, results: Iterable[Result], origin: str) -> int:
    """Put results in (``origin`` is ``shipped`` or ``here``); return how many are the newest.

    Of two results of one claim at one scale the newer run's is kept; of equally old ones that of
    this machine, and of two of those the one that came later.
    """
    lock(c, "papers")
    table = schema.papers
    cards = sa.select(table.c.key, table.c.id).where(table.c.source == "catalogue")
    ids: dict[str, int] = dict(c.execute(cards).tuples().all())
    newest, known = _newest(c), _known_runs(c)
    fresh: dict[tuple[int, str, str], Result] = {}
    for run, claim in results:
        paper = ids.get(run.paper)
        # a run's identifier is its own: what comes under another's is not believed
        if (
            run.overrides
            or paper is None
            or known.get(run.uid, (paper, run.scale))[:2]
            != (
                paper,
                run.scale,
            )
        ):
            continue
        if origin == "here" and known.get(run.uid, ("", "", "here"))[2] == "shipped":
            # It was measured here, so its pictures are here.
            c.execute(
                sa.update(schema.runs)
                .where(schema.runs.c.uid == run.uid)
                .values(origin=origin, folder=clean(run.folder))
            )
            known[run.uid] = (paper, run.scale, origin)
        key = (paper, run.scale, claim.id)
        date, uid = newest.get(key, ("", ""))
        if uid != run.uid and (run.date > date or (run.date == date and origin == "here")):
            newest[key] = (run.date, run.uid)
            fresh[key] = (run, claim)
    if fresh:
        _write(c, fresh, origin)
    return len(fresh)


def _write(c: sa.Connection, fresh: dict[tuple[int, str, str], Result], origin: str) -> None:
    runs, claims = schema.runs, schema.claims
    superseded = sa.select(runs.c.uid).where(
        runs.c.paper == sa.bindparam("_paper"), runs.c.scale == sa.bindparam("_scale")
    )
    c.execute(
        sa.delete(claims).where(claims.c.id == sa.bindparam("_id"), claims.c.run.in_(superseded)),
        [{"_paper": paper, "_scale": scale, "_id": id} for paper, scale, id in fresh],
    )
    made = {run.uid: _run_row(run, paper, origin) for (paper, _, _), (run, _) in fresh.items()}
    c.execute(insert(c, runs).on_conflict_do_nothing(), list(made.values()))
    positions: dict[str, int] = {}
    rows = []
    for run, claim in fresh.values():
        positions[run.uid] = positions.get(run.uid, -1) + 1
        rows.append(_claim_row(run, claim, positions[run.uid]))
    c.execute(sa.insert(claims), rows)
    c.execute(sa.delete(runs).where(runs.c.uid.not_in(sa.select(claims.c.run))))
    trends.keep_in_step(c, {paper for paper, _, _ in fresh})


def _run_row(run: RunInfo, paper: int, origin: str) -> dict[str, Any]:
    try:
        trends.seconds(run.date)
        return {
            "uid": run.uid,
            "paper": paper,
            "scale": run.scale,
            "seed": int(run.seed),
            "date": run.date,
            "seconds": float(run.seconds),
            "device": clean(run.device),
            "command": clean(run.command),
            "folder": clean(run.folder),
            "versions": dict(run.versions),
            "machine": dict(run.machine),
            "commit": None if run.commit is None else clean(run.commit),
            "origin": origin,
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise RequestError(
            f"Run '{run.uid}' of {run.paper} is damaged ({error}): export its record again."
        ) from error


def _claim_row(run: RunInfo, claim: Claim, position: int) -> dict[str, Any]:
    said = claim.paper_value
    return {
        "run": run.uid,
        "id": claim.id,
        "position": position,
        "statement": clean(claim.statement),
        "quantity": clean(claim.quantity),
        "direction": claim.direction,
        "bound": claim.bound,
        "paper_value": number(said) if isinstance(said, int | float) else said and clean(said),
        "measured": claim.measured if math.isfinite(claim.measured) else None,
        "holds": claim.holds,
        "evidence": clean(claim.evidence),
    }


def _newest(c: sa.Connection) -> dict[tuple[int, str, str], tuple[str, str]]:
    """Return date and run of the newest result per paper, scale and claim."""
    runs, claims = schema.runs, schema.claims
    columns = runs.c.paper, runs.c.scale, claims.c.id, runs.c.date, runs.c.uid
    statement = sa.select(*columns).join(claims, claims.c.run == runs.c.uid)
    return {(p, scale, id): (date, uid) for p, scale, id, date, uid in c.execute(statement)}


def _known_runs(c: sa.Connection) -> dict[str, tuple[int, str, str]]:
    runs = schema.runs
    statement = sa.select(runs.c.uid, runs.c.paper, runs.c.scale, runs.c.origin)
    return {uid: (paper, scale, origin) for uid, paper, scale, origin in c.execute(statement)}


def _load(
    store: Store, name: str, stamp: str, origin: str, results: Callable[[], list[Result]]
) -> int:
    """Keep a source's results where its stamp is not the one kept; return how many were newer."""
    if not _news(store, name, stamp):
        return 0
    found = results()
    with store.write() as c:
        count = keep(c, found, origin)
        keep_facts(c, {name: stamp})
    return count


def _news(store: Store, name: str, stamp: str) -> bool:
    with store.read() as c:
        return fact(c, name) != stamp


def _shipped() -> str:
    return str(resources.files("pantarhei.papers").joinpath("evidence"))


def _records(folder: Path) -> list[Result]:
    found = [read_record(path) for path in sorted(folder.glob("*.json"))]
    return [(run, claim) for run, claims in found for claim in claims]


def _content(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _entries(path: Path) -> list[Result]:
    return [(entry.run, entry.claim) for entry in Ledger(path).latest()]


def _state(path: Path) -> str:
    """Return what changes whenever the ledger is written: sizes and times of file and log."""
    found = ""
    for part in (path, path.with_name(f"{path.name}-wal")):
        if part.exists() and (state := part.stat()).st_size:
            found += f" {state.st_size} {state.st_mtime_ns}"
    return found
