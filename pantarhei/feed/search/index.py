"""Nearest papers by meaning: exact up to 50,000 of them, approximate beyond, or in PostgreSQL.

Every index here answers ``nearest(vector, k, allowed)`` with papers and their cosines, the nearest
first. ``allowed`` says of each paper's id whether it may be found; None allows all.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from pantarhei.errors import RequestError
from pantarhei.feed.store import Store

EXACT = 50_000  # papers up to which every vector is looked at
_PROBES = 24  # lists of the approximate index that a search looks into
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
    """FAISS: vectors in lists around centroids, a byte a number; those added since, exactly.

    ``stale`` says of each id whether the lists hold an outdated vector of it, or of a paper that
    is gone.
    """

    lists: Any
    count: int  # of vectors in the lists
    stale: Allowed
    tail: Exact

    def nearest(self, vector: Vectors, k: int, allowed: Allowed | None = None) -> Nearest:
        """Return (nearly always) the ``k`` nearest papers and their cosines."""
        faiss = _faiss()
        _one_thread(faiss)
        parameters = faiss.SearchParametersIVF(nprobe=_PROBES)
        if allowed is not None:
            # as many papers are looked at as without a filter, in more lists
            share = max(int(allowed.sum()), 1) / max(self.count, 1)
            parameters.nprobe = min(int(_PROBES / min(share, 1)) + 1, self.lists.nlist)
            permitted = allowed.copy()
            permitted[self.stale[: len(permitted)].nonzero()[0]] = False
            bits = np.packbits(permitted, bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(bits)
        found = k if allowed is not None else k + min(int(self.stale.sum()), k)
        cosines, ids = self.lists.search(vector[None], found, params=parameters)
        ids, cosines = ids[0], cosines[0]
        current = (ids >= 0) & ~_permits(self.stale, ids)
        tail_ids, tail_cosines = self.tail.nearest(vector, k, allowed)
        return _first(
            np.append(ids[current], tail_ids), np.append(cosines[current], tail_cosines), k
        )

    def vector(self, paper: int) -> Vectors | None:
        """Return a paper's own vector, as exactly as the index knows it."""
        if (found := self.tail.vector(paper)) is not None or _permits(
            self.stale, np.array([paper])
        )[0]:
            return found
        try:
            return np.asarray(self.lists.reconstruct(paper))
        except RuntimeError:  # FAISS's way to say that it is not there
            return None

    def updated(self, changed: Ids, ids: Ids, vectors: Vectors) -> Approximate | None:
        """Return the index with some papers changed, gone or new; None where it is time to rebuild.

        ``changed`` are all of them, ``ids`` and ``vectors`` those that are there.
        """
        kept = ~np.isin(self.tail.ids, changed)
        tail = Exact(
            np.append(self.tail.ids[kept], ids), np.concatenate([self.tail.vectors[kept], vectors])
        )
        if len(tail.ids) > max(_TAIL, self.count // 10):
            return None
        stale = np.zeros(max(len(self.stale), int(changed.max(initial=0)) + 1), bool)
        stale[: len(self.stale)] = self.stale
        stale[changed] = True
        return Approximate(self.lists, self.count, stale, tail)

    def save(self, path: Path) -> None:
        """Write the lists, without what was added since; atomically, by the caller's path."""
        _faiss().write_index(self.lists, str(path))


def approximate(ids: Ids, vectors: Vectors) -> Approximate:
    """Build the approximate index."""
    faiss = _faiss()
    _one_thread(faiss)
    dimensions = vectors.shape[1]
    lists = int(4 * len(ids) ** 0.5)
    made = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dimensions),
        dimensions,
        lists,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
        False,  # the vectors themselves, not their distance to the centroid
    )
    made.cp.niter, made.cp.seed, made.cp.min_points_per_centroid = 8, 1, 1
    sample = np.random.default_rng(1).permutation(len(ids))[: 40 * lists]
    made.train(vectors[sample])
    made.add_with_ids(vectors, ids)
    return opened(made)


def opened(lists: Any) -> Approximate:
    """Return an index around FAISS's own."""
    lists.set_direct_map_type(_faiss().DirectMap.Hashtable)
    none = Exact(np.zeros(0, np.int64), np.zeros((0, lists.d), np.float32))
    return Approximate(lists, int(lists.ntotal), np.zeros(0, bool), none)


def read(path: Path) -> Approximate:
    """Open lists that were written, memory-mapped; what is no index raises RequestError."""
    faiss = _faiss()
    try:
        return opened(faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY))
    except RuntimeError as error:
        raise RequestError(f"'{path}' is no index: delete it, and it is made again.") from error


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
