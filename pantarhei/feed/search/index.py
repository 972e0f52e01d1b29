"""Nearest papers by meaning: exact up to 50,000 of them, approximate beyond, or in PostgreSQL.

Every index here answers ``nearest(vector, k, allowed)`` with papers and their cosines, the nearest
first. ``allowed`` says of each paper's id whether it may be found; None allows all.
"""

from __future__ import annotations

import importlib.util
import json
import threading
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from pantarhei.feed.store import Store

EXACT = 50_000  # papers up to which every vector is looked at
_AGAIN = 4  # times as many papers as are asked for are compared once more
_FEW = 4_000  # papers that are compared without the approximate index
_TAIL = 5_000  # papers that are looked at one by one before they are put into it

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]
Allowed = NDArray[np.bool_]
Nearest = tuple[Ids, NDArray[np.float32]]


class Index(Protocol):
    """Papers by meaning."""

    def nearest(self, vector: Vectors, k: int, allowed: Allowed | None = None) -> Nearest:
        """Return the ``k`` nearest papers and their cosines."""
        ...

    def vector(self, paper: int) -> Vectors | None:
        """Return a paper's own vector."""
        ...


@dataclass(frozen=True, eq=False)
class Exact:
    """One matrix product over all vectors.

    >>> index = Exact(np.array([7, 9]), np.eye(2, dtype=np.float32))
    >>> index.nearest(np.array([0.6, 0.8], np.float32), 1)[0].tolist()
    [9]
    """

    ids: Ids
    vectors: Vectors

    def nearest(self, vector: Vectors, k: int, allowed: Allowed | None = None) -> Nearest:
        """Return the ``k`` nearest papers and their cosines."""
        # not BLAS, whose threads would wait for each other where several searches go on
        cosines = np.einsum("nd,d->n", self.vectors, vector)
        if allowed is not None:
            cosines[~_permits(allowed, self.ids)] = -np.inf
        return _first(self.ids, cosines, k)

    def vector(self, paper: int) -> Vectors | None:
        """Return a paper's own vector."""
        found = np.flatnonzero(self.ids == paper)
        return self.vectors[found[-1]] if len(found) else None


@dataclass(frozen=True, eq=False)
class Approximate:
    """FAISS's product quantiser over all vectors, its best compared once more, more exactly.

    ``scan`` keeps half a byte for every two numbers of a vector and compares those of 100,000
    papers with a query in a third of a millisecond, in the processor's registers (Andre, Kermarrec
    and Le Scouarnec 2017). Which papers are nearest is then said by ``codes``, a byte a number:
    ``vector = low + step * codes``. What was added since is in ``tail``; of ``rows`` that are
    ``stale`` the paper has changed or is gone.
    """

    scan: Any
    ids: Ids
    codes: NDArray[np.uint8]
    low: Vectors
    step: Vectors
    stale: NDArray[np.bool_]
    tail: Exact

    def nearest(self, vector: Vectors, k: int, allowed: Allowed | None = None) -> Nearest:
        """Return (nearly always) the ``k`` nearest papers and their cosines."""
        may = None if allowed is None else np.flatnonzero(_permits(allowed, self.ids) & ~self.stale)
        if may is not None and len(may) <= _FEW:
            rows = may
        else:
            share = 1.0 if may is None else len(may) / len(self.ids)
            _one_thread(_faiss())
            looked_at = min(int(_AGAIN * k / share) + int(self.stale.sum()), len(self.ids))
            rows = self.scan.search(vector[None], looked_at)[1][0]
            rows = rows[rows >= 0]
            rows = rows[~self.stale[rows]]
            if allowed is not None:
                rows = rows[_permits(allowed, self.ids[rows])]
        codes = self.codes[rows].astype(np.float32)
        cosines = np.einsum("nd,d->n", codes, self.step * vector) + np.dot(self.low, vector)
        tail_ids, tail_cosines = self.tail.nearest(vector, k, allowed)
        return _first(np.append(self.ids[rows], tail_ids), np.append(cosines, tail_cosines), k)

    def vector(self, paper: int) -> Vectors | None:
        """Return a paper's own vector, as exactly as the index knows it."""
        if (found := self.tail.vector(paper)) is not None:
            return found
        rows = np.flatnonzero((self.ids == paper) & ~self.stale)
        return self.low + self.step * self.codes[rows[-1]] if len(rows) else None

    def updated(self, changed: Ids, ids: Ids, vectors: Vectors) -> Approximate | None:
        """Return the index with some papers changed, gone or new; None where it is time to rebuild.

        ``changed`` are all of them, ``ids`` and ``vectors`` those that are there.
        """
        kept = ~np.isin(self.tail.ids, changed)
        tail = Exact(
            np.append(self.tail.ids[kept], ids), np.concatenate([self.tail.vectors[kept], vectors])
        )
        stale = self.stale | np.isin(self.ids, changed)
        if max(len(tail.ids), int(stale.sum())) > max(_TAIL, len(self.ids) // 10):
            return None
        return replace(self, stale=stale, tail=tail)

    def save(self, path: Path, described: Mapping[str, Any]) -> None:
        """Write it into one file, without what was added since, with a description."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        header = np.frombuffer(json.dumps({**described, "format": 1}).encode(), np.uint8)
        scan = _faiss().serialize_index(self.scan)
        with path.open("wb") as file:
            np.savez(file, header=header, scan=scan, **arrays)


_ARRAYS = ("ids", "codes", "low", "step")


def approximate(ids: Ids, vectors: Vectors) -> Approximate:
    """Build the approximate index."""
    faiss = _faiss()
    _one_thread(faiss)
    count, dimensions = vectors.shape
    scan = faiss.IndexPQFastScan(dimensions, dimensions // 2, 4, faiss.METRIC_INNER_PRODUCT)
    scan.pq.cp.seed = 1
    sample = np.random.default_rng(1).permutation(count)[:20_000]
    scan.train(vectors[sample])
    scan.add(vectors)
    low = vectors.min(0)
    step = np.maximum(vectors.max(0) - low, 1e-9) / 255
    codes = np.empty(vectors.shape, np.uint8)
    for first in range(0, count, 4096):  # by parts: no second matrix of floats
        part = slice(first, first + 4096)
        codes[part] = np.rint((vectors[part] - low) / step)
    return _opened(scan, ids, codes, low, step)


def _opened(scan: Any, ids: Ids, codes: Any, low: Vectors, step: Vectors) -> Approximate:
    none = Exact(np.zeros(0, np.int64), np.zeros((0, len(low)), np.float32))
    return Approximate(scan, ids, codes, low, step, np.zeros(len(ids), bool), none)


def read(path: Path) -> tuple[Approximate, dict[str, Any]] | None:
    """Open an index that was saved, with its description; None where it is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header.pop("format") != 1:
                return None
            scan, ids, codes, low, step = (file[name] for name in ("scan", *_ARRAYS))
        index = _faiss().deserialize_index(scan)
        shapes = ids.shape, codes.shape, low.shape, step.shape
        if shapes != ((index.ntotal,), (index.ntotal, index.d), (index.d,), (index.d,)):
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile):
        return None
    return _opened(index, ids, codes, low, step), header


def build(ids: Ids, vectors: Vectors, exact: int = EXACT) -> Exact | Approximate:
    """Return the index that suits so many papers: exact where FAISS is not installed."""
    if len(ids) <= exact or importlib.util.find_spec("faiss") is None:
        return Exact(ids, vectors)
    return approximate(ids, vectors)


class Pgvector:
    """PostgreSQL's own index (HNSW), kept by the database: always current, shared by all."""

    def __init__(self, store: Store, model: str) -> None:
        self._store, self._model = store, model

    @staticmethod
    def serves(store: Store) -> bool:
        """Whether this store has pgvector's column."""
        if store.dialect != "postgresql":
            return False
        query = sa.text(
            "SELECT 1 FROM information_schema.columns "
            "WHERE table_name = 'embeddings' AND column_name = 'near'"
        )
        with store.read() as c:
            return c.execute(query).first() is not None

    def nearest(self, vector: Vectors, k: int, allowed: Allowed | None = None) -> Nearest:
        """Return the ``k`` nearest papers and their cosines."""
        among = "" if allowed is None else "AND paper = ANY(:allowed)"
        query = sa.text(
            "SELECT paper, -(near <#> CAST(:vector AS vector)) FROM embeddings "
            f"WHERE model = :model AND near IS NOT NULL {among} "
            "ORDER BY near <#> CAST(:vector AS vector) LIMIT :k"
        )
        values: dict[str, Any] = {"vector": literal(vector), "model": self._model, "k": k}
        if allowed is not None:
            values["allowed"] = np.flatnonzero(allowed).tolist()
        with self._store.read() as c:
            c.exec_driver_sql(f"SET LOCAL hnsw.ef_search = {min(max(2 * k, 40), 1000)}")
            rows = c.execute(query, values).all()
        ids, cosines = np.array([r[0] for r in rows], np.int64), np.array([r[1] for r in rows])
        return ids, cosines.astype(np.float32)

    def vector(self, paper: int) -> Vectors | None:
        """Return a paper's own vector."""
        query = sa.text("SELECT vector FROM embeddings WHERE paper = :paper AND model = :model")
        with self._store.read() as c:
            row = c.execute(query, {"paper": paper, "model": self._model}).first()
        return None if row is None else np.frombuffer(row[0], "<f2").astype(np.float32)


def literal(vector: Vectors) -> str:
    """Return a vector as pgvector reads it."""
    return "[" + ",".join(f"{value:.6g}" for value in vector) + "]"


def _permits(allowed: Allowed, ids: Ids) -> Allowed:
    inside = (ids >= 0) & (ids < len(allowed))
    found = np.zeros(len(ids), bool)
    found[inside] = allowed[ids[inside]]
    return found


def _first(ids: Ids, cosines: NDArray[np.float32], k: int) -> Nearest:
    places: Sequence[int] | NDArray[Any] = np.arange(len(ids))
    if len(ids) > k:
        places = np.argpartition(-cosines, k)[:k]
    places = np.asarray(places)
    places = places[np.lexsort((-ids[places], -cosines[places]))]
    places = places[np.isfinite(cosines[places])]
    return ids[places], cosines[places]


def _faiss() -> Any:
    import faiss

    return faiss


_threads = threading.local()


def _one_thread(faiss: Any) -> None:
    """One core for a query: several at once use them all. OpenMP keeps this for each thread."""
    if not getattr(_threads, "set", False):
        faiss.omp_set_num_threads(1)
        _threads.set = True
