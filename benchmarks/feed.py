"""The page with many papers: search, front page, ingest, memory; beside a scan of TF-IDF.

    python benchmarks/feed.py [--papers 100000] [--readers 16] [--workers 1] [--mine] [--store F]
        [--direct]

Papers are synthetic: abstracts of 100 to 220 words, drawn by Zipf's law from a vocabulary of 70,000
in which the field's own words are as frequent as on arXiv (three of four papers say "neural"), a
third of them from one of 300 topics. Queries are distinct, so that no answer is remembered: topic
words with and without common ones, common words alone, parts of titles, mistyped words, rare words,
some with filters. Readers are a process of their own that asks over HTTP, each again as soon as it
is answered, on the same cores as the server (``pantarhei serve``: for reading, as many people do;
``--mine`` shows one person's buttons on every paper). Each request comes from an address of its
own, as a proxy tells it, so that the limit per address is not what is measured.

The peer is what arXiv Sanity Lite does: a TF-IDF matrix (scikit-learn, 20,000 words) of which each
row is multiplied by the query's and all are sorted: a function call, no HTTP, no papers read.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from pantarhei.feed import papers
from pantarhei.feed.search import Searcher
from pantarhei.feed.store import Store
from pantarhei.papers import catalogue

FIELD = """network neural learning model models data training deep method performance approach
results state propose tasks networks problem show paper graph language large representation images
information algorithm framework efficient learned features dynamic prediction optimization
""".split()  # noqa: SIM905
SYLLABLES = "karomitensolverdalinquextrophazenborgranyloshimurtal"


class Corpus:
    """Synthetic papers and queries about them; the same for the same seed."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.rng = count, np.random.default_rng(seed)
        cards = {w for card in catalogue() for w in card.summary.lower().split() if w.isalpha()}
        pairs = [SYLLABLES[i : i + 3] for i in range(0, len(SYLLABLES) - 2, 2)]
        made = {"".join(self.rng.choice(pairs, self.rng.integers(2, 5))) for _ in range(90_000)}
        rest = sorted((cards | made) - set(FIELD))
        self.rng.shuffle(rest)
        self.words = np.array(FIELD + rest)
        weights = 1 / (np.arange(len(self.words)) + 10.0) ** 1.05
        self.cumulated = np.cumsum(weights / weights.sum())
        common = np.arange(len(FIELD), len(FIELD) + 8000)
        self.topics = np.array([self.rng.choice(common, 120, replace=False) for _ in range(300)])
        within = 1 / (np.arange(120) + 3.0)
        self.within = np.cumsum(within / within.sum())

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the papers, the oldest first, ten to twenty a day."""
        day = np.datetime64("2026-01-31") - self.count // 15
        for number in range(self.count):
            topic = self.topics[self.rng.integers(len(self.topics))]
            length = int(self.rng.integers(110, 230))
            places = np.searchsorted(self.cumulated, self.rng.random(length))
            places = np.minimum(places, len(self.words) - 1)
            about = self.rng.random(length) < 0.35
            inside = np.searchsorted(self.within, self.rng.random(int(about.sum())))
            places[about] = topic[np.minimum(inside, 119)]
            text = self.words[places]
            authors = self.words[self.rng.integers(5000, len(self.words), 2 * (1 + number % 5))]
            yield {
                "arxiv": f"{1000 + number // 10000:04d}.{number % 10000:05d}",
                "title": " ".join(text[:10]).capitalize(),
                "summary": " ".join(text[10:]).capitalize() + ".",
                "date": str(day + number // 15),
                "authors": [f"{a} {b}".title() for a, b in zip(*[iter(authors)] * 2, strict=True)],
                "categories": "cs.LG stat.ML" if number % 3 else "cs.CV",
                "wing": (None, "compute", "systems", "learning")[number % 4],
                "source": "arxiv",
            }

    def queries(self, count: int) -> list[dict[str, str]]:
        """Return distinct searches."""
        rng, found = np.random.default_rng(7), {}
        while len(found) < count:
            topic = [self.words[i] for i in self.topics[rng.integers(300)][:40]]
            some = list(rng.choice(topic, 3, replace=False))
            field = list(rng.choice(FIELD, 4, replace=False))
            rare = self.words[rng.integers(9000, len(self.words))]
            slip = some[0][:1] + some[0][2:3] + some[0][1:2] + some[0][3:]
            words = [
                some[:2], [*some[:2], field[0]], [some[0], *field[:2]], field[:2], field[:3], field,
                some, [slip, some[1]], [rare], [rare, field[0]],
            ][int(rng.integers(10))]  # fmt: skip
            asked = {"q": " ".join(words)}
            if rng.random() < 0.15:
                asked["wing"] = "systems"
            if rng.random() < 0.1:
                asked["since"] = "2020-01-01"
            found[json.dumps(asked)] = asked
        return list(found.values())


class Times:
    """Seconds that requests took, by readers that ask in turn."""

    def __init__(self, taken: Sequence[float], seconds: float) -> None:
        self.taken, self.seconds = np.sort(np.array(taken)), seconds

    def at(self, share: float) -> float:
        """Return a quantile in milliseconds."""
        return float(np.quantile(self.taken, share)) * 1e3

    def __str__(self) -> str:
        rate = len(self.taken) / self.seconds
        return (
            f"p50 {self.at(0.5):7.1f} ms   p95 {self.at(0.95):7.1f} ms   "
            f"p99 {self.at(0.99):7.1f} ms   {rate:7.1f} a second   ({len(self.taken):,})"
        )


def in_turn(ask: Callable[[Any], object], questions: Sequence[Any], readers: int) -> Times:
    """Ask every question once, by so many threads."""
    left, taken, lock = iter(questions), [], threading.Lock()

    def read() -> None:
        while True:
            with lock:
                question = next(left, None)
            if question is None:
                return
            began = time.perf_counter()
            ask(question)
            taken.append(time.perf_counter() - began)

    began = time.perf_counter()
    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Times(taken, time.perf_counter() - began)


def over_http(server: Server, paths: Sequence[str], readers: int) -> Times:
    """Ask for every path once over so many connections, from a process of its own."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import feed; feed.reading()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        input=json.dumps([server.port, server.mine, list(paths), readers]),
        capture_output=True,
        text=True,
        check=True,
    )
    return Times(*json.loads(done.stdout))


def reading() -> None:
    """Be the readers: take port, kind, paths and their number from stdin, print the times."""
    port, mine, paths, readers = json.load(sys.stdin)
    left, taken, addresses = iter(paths), [], itertools.count(random.randrange(2**24))

    async def read() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for path in left:
            began = time.perf_counter()
            number = next(addresses)
            address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
            told = "" if mine else f"X-Forwarded-For: {address}\r\n"
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{told}\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(f"{path}: {head[:200]!r}")
            length = head.lower().split(b"content-length:")[1].split(b"\r\n")[0]
            await reader.readexactly(int(length))
            taken.append(time.perf_counter() - began)
        writer.close()

    async def together() -> None:
        await asyncio.gather(*(read() for _ in range(readers)))

    began = time.perf_counter()
    asyncio.run(together())
    print(json.dumps([taken, time.perf_counter() - began]))


def scan(store: Store) -> Callable[[dict[str, str]], object]:
    """Return arXiv Sanity Lite's way: every row of a TF-IDF matrix for every query."""
    import sqlalchemy as sa
    from sklearn.feature_extraction.text import TfidfVectorizer

    from pantarhei.feed.schema import papers as table

    with store.read() as c:
        rows = c.execute(sa.select(table.c.title, table.c.summary).order_by(table.c.id))
        texts = [f"{title} {summary}" for title, summary in rows]
    words = TfidfVectorizer(
        strip_accents="unicode", stop_words="english", max_features=20_000, sublinear_tf=True,
        min_df=min(5, max(1, len(texts) // 100)), dtype=np.float32,
    )  # fmt: skip
    matrix = words.fit_transform(texts)

    def search(asked: dict[str, str]) -> object:
        scores = matrix @ words.transform([asked["q"]]).T.toarray()[:, 0]
        return np.argsort(-scores)[:20]

    return search


def memory(process: int | None = None) -> float:
    """Return the megabytes that a process holds, or the largest of its workers does."""
    return max(
        int(Path(f"/proc/{one}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        for one in family(process or os.getpid())
    )


def processor(process: int | None = None) -> float:
    """Return the seconds that a process and its workers have computed."""
    spent = 0
    for one in family(process or os.getpid()):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        spent += int(fields[11]) + int(fields[12])
    return spent / os.sysconf("SC_CLK_TCK")


def family(process: int) -> list[int]:
    """Return a process and its children."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *map(int, children)]


class Server:
    """``pantarhei serve``, in processes of its own."""

    def __init__(self, store: Store, workers: int, mine: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "pantarhei", "serve", "--store", str(store.path)]
        command += ["--port", str(self.port), "--workers", str(workers)]
        command += ["--mine"] if mine else ["--proxy", "127.0.0.1"]
        self.mine = mine
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        began = time.perf_counter()
        while time.perf_counter() - began < 120 and self.process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                break
            except OSError:
                time.sleep(0.02)
        self.started = time.perf_counter() - began

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--papers", type=int, default=100_000)
    parser.add_argument("--readers", type=int, default=16)
    parser.add_argument("--queries", type=int, default=3000)
    parser.add_argument("--scans", type=int, default=300, help="of the queries, by the peer")
    parser.add_argument("--workers", type=int, default=1, help="processes of the server")
    parser.add_argument("--mine", action="store_true", help="serve one person, with buttons")
    parser.add_argument("--store", type=Path, help="made where it does not exist, and kept")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--http", dest="direct", action="store_false", help="the page (the default)")
    way.add_argument("--direct", action="store_true", help="the searcher itself, without HTTP")
    parser.set_defaults(direct=False)
    given = parser.parse_args(arguments)
    corpus = Corpus(given.papers)
    with tempfile.TemporaryDirectory() as folder:
        path = given.store or Path(folder) / "feed.sqlite"
        fresh = not path.exists()
        with Store(path) as store:
            if fresh:
                grow(store, corpus)
            compare(store, corpus.queries(given.queries), given)


def grow(store: Store, corpus: Corpus) -> None:
    rows = list(corpus.rows())
    began = time.perf_counter()
    with store.write() as c:
        papers.add(c, rows)
    taken = time.perf_counter() - began
    print(f"ingest: {len(rows):,} papers in {taken:.1f} s, {len(rows) / taken:,.0f} a second")
    again = rows[: max(1, len(rows) // 10)]
    began = time.perf_counter()
    with store.write() as c:
        papers.add(c, again)
    print(f"  the same again: {len(again) / (time.perf_counter() - began):,.0f} a second")
    began = time.perf_counter()
    searcher = Searcher(store)
    searcher._upkeep.words()
    words = time.perf_counter() - began
    searcher.refresh()
    print(f"index: words {words:.1f} s, meanings {time.perf_counter() - began - words:.1f} s")


def compare(store: Store, asked: list[dict[str, str]], given: argparse.Namespace) -> None:
    if not given.direct:
        ours = by_web(store, asked, given)
    else:
        before = memory()
        searcher = Searcher(store)
        searcher.refresh()
        for one in asked[:20]:
            searcher.search(**{"query": one["q"], **{k: v for k, v in one.items() if k != "q"}})
        computed = processor()
        ours = in_turn(
            lambda one: searcher.search(one["q"], **{k: v for k, v in one.items() if k != "q"}),
            asked[20:],
            given.readers,
        )
        each = (processor() - computed) / len(ours.taken) * 1e3
        print(f"search, {given.readers} threads: {ours}, {each:.2f} ms of a processor each")
        print(f"memory: {memory():.0f} MB, {memory() - before:.0f} MB of them for searching")
        with store.read() as c:
            front = in_turn(lambda _: papers.day(c), range(200), 1)
        print(f"front page, its papers alone: {front}")
    theirs = in_turn(scan(store), asked[: given.scans], given.readers)
    print(f"scan of TF-IDF vectors, {given.readers} threads: {theirs}")
    print(
        f"the scan's p95 is {theirs.at(0.95) / ours.at(0.95):.1f} times ours; we answer "
        f"{len(ours.taken) / ours.seconds / (len(theirs.taken) / theirs.seconds):.1f} times as many"
    )


def watched(what: str, server: Server, paths: Sequence[str], readers: int) -> Times:
    before = processor(server.process.pid)
    found = over_http(server, paths, readers)
    each = (processor(server.process.pid) - before) / len(paths) * 1e3
    print(f"{what}, {readers} readers: {found}, {each:.2f} ms of a processor each")
    return found


def by_web(store: Store, asked: list[dict[str, str]], given: argparse.Namespace) -> Times:
    readers, workers = given.readers, given.workers
    server = Server(store, workers, given.mine)
    try:
        paths = [f"/search?{urlencode(one)}" for one in asked]
        quick = 0
        for number in range(600):  # until the index answers: common words are slow without it
            path = f"/search?q=neural+network+data+{number}"
            quick = quick + 1 if over_http(server, [path], 1).at(1) < 150 else 0
            if quick == 5 * workers:
                break
            time.sleep(0.5 if number > 5 else 0)
        print(f"server: answers after {server.started:.2f} s")
        half = len(paths) // 2  # what was asked once is remembered
        ours = watched("search over HTTP", server, paths[:half], readers)
        jsons = [f"/api/v1{path}&limit=20" for path in paths[half:]]
        watched("search over HTTP, JSON", server, jsons, readers)
        watched("front page", server, ["/"] * len(paths), readers)
        held = memory(server.process.pid)
        print(f"memory of the server, or a worker, with the embedding model: {held:.0f} MB")
        return ours
    finally:
        server.close()


if __name__ == "__main__":
    main()
