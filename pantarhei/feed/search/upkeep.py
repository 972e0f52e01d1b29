"""Keeping the indices in step with the store, and on disk between starts."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from pantarhei.errors import RequestError
from pantarhei.feed.schema import embeddings, papers
from pantarhei.feed.search import index, postings
from pantarhei.feed.search import meaning as meanings
from pantarhei.feed.search.meaning import Model
from pantarhei.feed.search.postings import Postings
from pantarhei.feed.store import Store, fact, keep_facts
from pantarhei.files import atomic

_BATCH = 256  # papers that are embedded, and committed, at a time
_KEPT = 5_000  # papers from which on the indices are kept on disk
_REMEMBERED = 200_000  # changes that the store keeps for processes that are behind

changes = sa.table("search_changes", sa.column("n"), sa.column("paper"))


@dataclass(frozen=True, eq=False)
class State:
    """The words of all papers, as the store was after its ``n``-th change."""

    n: int
    words: Postings

    def by_id(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return a mask over rows as one over the papers' ids."""
        ids = self.words.facts.ids
        found = np.zeros(int(ids.max(initial=0)) + 1, bool)
        found[ids[mask]] = True
        return found

    def holding(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return some papers' ids as a mask over rows."""
        return np.isin(self.words.facts.ids, ids)


class Upkeep:
    """The indices of one store in this process."""

    def __init__(self, store: Store, folder: Path | None, exact: int) -> None:
        self.state: State | None = None
        self.near: index.Index | None = None
        self.model: Model | None = None
        self._store, self._folder, self._exact = store, folder, exact
        self._near_n = -1
        self._wording, self._meaning = threading.Lock(), threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        """End a refresh at its next step."""
        self._stopped = True

    def behind(self, c: sa.Connection) -> bool:
        """Whether the store has changed since the words were read."""
        return self.state is None or self.state.n != _newest(c)

    def small(self, c: sa.Connection, most: int) -> bool:
        """Whether the store has so few papers."""
        some = sa.select(papers.c.id).limit(most + 1).subquery()
        return c.execute(sa.select(sa.func.count()).select_from(some)).scalar_one() <= most

    def words(self) -> None:
        """Bring the words up to date."""
        with self._wording:
            state = self.state or self._saved_words()
            with self._store.read() as c:
                n = _newest(c)
                if state is None or (changed := _since(c, state.n)) is None:
                    words = postings.empty().updated([], postings.rows_of(c))
                elif changed:
                    words = state.words.updated(changed, postings.rows_of(c, changed))
                else:
                    words = state.words
            grown = state is None or abs(len(words) - len(state.words)) > len(words) // 100
            words.vocabulary.prepare()
            self.state = State(n, words)
            if grown and len(words) >= _KEPT and self._folder is not None:
                self._keep_words(self._folder, self.state)

    def meaning(self) -> None:
        """Embed what has to be, and bring the index of meanings up to date."""
        with self._meaning:
            self.model = self.model or meanings.load()
            state = self.state
            if self.model is None or state is None:
                return
            in_database = index.Pgvector.serves(self._store)
            if not in_database and self.near is None:
                self._saved_near(self.model)  # searched while the rest is embedded
            self._embed(self.model, in_database)
            if self._stopped:
                return
            if in_database:
                self.near = self.near or index.Pgvector(self._store, self.model.name)
            elif self._near_n != state.n:
                self._gather(self.model, state.n)
            self._forget(state.n)

    def _embed(self, model: Model, in_database: bool) -> None:
        """Embed every paper that has no vector: the newest first, each batch committed."""
        missing = (
            sa.select(papers.c.id, papers.c.title, papers.c.summary)
            .outerjoin(
                embeddings,
                (embeddings.c.paper == papers.c.id) & (embeddings.c.model == model.name),
            )
            .where(embeddings.c.paper.is_(None))
            .order_by(papers.c.id.desc())
            .limit(_BATCH)
        )
        last = 2**31 - 1
        while not self._stopped:
            with self._store.read() as c:
                rows = c.execute(missing.where(papers.c.id < last)).all()
            if not rows:
                return
            last = rows[-1].id
            vectors = model.embed([meanings.text_of(row.title, row.summary) for row in rows])
            values = [
                {"id": row.id, "title": row.title, "summary": row.summary, "model": model.name,
                 "digest": meanings.digest(row.title, row.summary), "vector": meanings.pack(vector),
                 "near": index.literal(vector)}
                for row, vector in zip(rows, vectors, strict=True)
            ]  # fmt: skip
            with self._store.write() as c:
                c.execute(_insertion(in_database), values)

    def _gather(self, model: Model, n: int) -> None:
        """Bring the index in memory to the store's ``n``-th change."""
        near = self.near
        with self._store.read() as c:
            changed = None if near is None else _since(c, self._near_n, n)
            if near is not None and changed is not None:
                ids, vectors = _vectors(c, model, changed)
                gone = np.array(changed, np.int64)
                if isinstance(near, index.Approximate):
                    near = near.updated(gone, ids, vectors)
                elif isinstance(near, index.Exact):
                    kept = ~np.isin(near.ids, gone)
                    ids = np.append(near.ids[kept], ids)
                    vectors = np.concatenate([near.vectors[kept], vectors])
                    near = index.Exact(ids, vectors) if len(ids) <= self._exact else None
            else:
                near = None
            if near is None:
                ids, vectors = _vectors(c, model)
        if near is None:
            near = index.build(ids, vectors, self._exact)
            if isinstance(near, index.Approximate) and self._folder is not None:
                self._keep_near(self._folder, near, model, n)
        self.near, self._near_n = near, n

    def _forget(self, n: int) -> None:
        """Delete the oldest changes: who has not read them reads the store anew."""
        with self._store.read() as c:
            oldest = c.execute(sa.select(sa.func.min(changes.c.n))).scalar()
        if oldest is not None and oldest < n - 2 * _REMEMBERED:
            with self._store.write() as c:
                c.execute(sa.delete(changes).where(changes.c.n < n - _REMEMBERED))

    # --- on disk -------------------------------------------------------------------------------

    def _mark(self) -> str:
        """Return what tells this store from another one at the same address."""
        with self._store.read() as c:
            found = fact(c, "search")
        if found is None:
            with self._store.write() as c:
                found = fact(c, "search") or secrets.token_hex(16)
                keep_facts(c, {"search": found})
        return found

    def _keep_words(self, folder: Path, state: State) -> None:
        try:
            with atomic(folder / "words.npz") as path:
                postings.save(path, state.words, {"n": state.n, "store": self._mark()})
        except RequestError:
            pass  # a full disk: it is made again at the next start

    def _saved_words(self) -> State | None:
        if self._folder is None or not (self._folder / "words.npz").exists():
            return None
        found = postings.load(self._folder / "words.npz")
        if found is None or not self._continues(found[1]):
            return None
        return State(int(found[1]["n"]), found[0])

    def _keep_near(self, folder: Path, near: index.Approximate, model: Model, n: int) -> None:
        described = {"n": n, "store": self._mark(), "model": model.name}
        try:
            with atomic(folder / "meanings.npz") as path:
                near.save(path, described)
        except RequestError:
            pass  # a full disk: it is made again at the next start

    def _saved_near(self, model: Model) -> None:
        if self._folder is None or not (self._folder / "meanings.npz").exists():
            return
        try:
            found = index.read(self._folder / "meanings.npz")
        except ImportError:
            return
        if found is None or not self._continues(found[1]):
            return
        near, described = found
        if described.get("model") == model.name and len(near.low) == model.dimensions:
            self.near, self._near_n = near, int(described["n"])

    def _continues(self, described: Any) -> bool:
        """Whether what was kept is of an earlier state of this store."""
        if not isinstance(described, Mapping) or described.get("store") != self._mark():
            return False
        with self._store.read() as c:
            n = described.get("n")
            return isinstance(n, int) and n <= _newest(c) and _since(c, n) is not None


def _newest(c: sa.Connection) -> int:
    return int(c.exec_driver_sql("SELECT coalesce(max(n), 0) FROM search_changes").scalar_one())


def _since(c: sa.Connection, n: int, until: int | None = None) -> list[int] | None:
    """Return the papers that changed after the ``n``-th change; None where it is not known."""
    oldest = c.execute(sa.select(sa.func.min(changes.c.n))).scalar()
    if oldest is not None and oldest > n + 1:
        return None
    statement = sa.select(changes.c.paper).distinct().where(changes.c.n > n)
    if until is not None:
        statement = statement.where(changes.c.n <= until)
    return [row[0] for row in c.execute(statement)]


def _vectors(
    c: sa.Connection, model: Model, only: Sequence[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Read vectors, of all papers or of some."""
    statement = sa.select(embeddings.c.paper, embeddings.c.vector)
    statement = statement.where(embeddings.c.model == model.name).order_by(embeddings.c.paper)
    ids: list[int] = []
    parts = [np.zeros((0, model.dimensions), np.float32)]
    chunks = [None] if only is None else [only[i : i + 1000] for i in range(0, len(only), 1000)]
    for chunk in chunks:
        chosen = statement if chunk is None else statement.where(embeddings.c.paper.in_(chunk))
        result = c.execution_options(yield_per=4096).execute(chosen)
        for rows in result.partitions():
            ids += [row[0] for row in rows]
            parts.append(meanings.unpack([row[1] for row in rows], model.dimensions))
    return np.array(ids, np.int64), np.concatenate(parts)


def _insertion(in_database: bool) -> sa.TextClause:
    """Keep a vector, unless the paper's text is another one by now."""
    column, value = (", near", ", CAST(:near AS vector)") if in_database else ("", "")
    again = ", near = excluded.near" if in_database else ""
    return sa.text(
        f"INSERT INTO embeddings (paper, model, digest, vector{column}) "
        f"SELECT id, :model, :digest, :vector{value} FROM papers "
        "WHERE id = :id AND title = :title AND summary = :summary "
        "ON CONFLICT (paper, model) DO UPDATE SET "
        f"digest = excluded.digest, vector = excluded.vector{again}"
    )
