"""The two indices in memory against the slow obvious computation."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from pantarhei.feed.search import index, postings
from pantarhei.feed.search.text import WEIGHTS, Filter
from pantarhei.feed.search.words import split, stem

RNG = np.random.default_rng(0)
WORDS = [f"w{i}" for i in range(60)] + ["network", "networks", "learning", "learned"]


def paper(number: int, seed: int) -> tuple:
    rng = np.random.default_rng([number, seed])
    some = [WORDS[int(i)] for i in (rng.random(40) ** 2 * len(WORDS))]
    return (
        number, " ".join(some[:5]), f"key{number}", ["Ada Müller", "B Chen"][: number % 3],
        "cs.LG", " ".join(some[5 : 10 + number % 30]), f"2001.{number:05d}",
        f"20{10 + number % 15}-0{1 + number % 9}-11", (None, "compute", "systems")[number % 3],
        ("listed", "runs")[number % 2],
    )  # fmt: skip


def obvious(rows, groups, every, allowed=lambda row: True):
    """BM25 as it is written in the module's docstring, one paper and word at a time."""

    def fields(row):
        _, title, key, authors, categories, summary, arxiv, *_ = row
        texts = (title, f"{key} {arxiv}", " ".join(authors), categories, summary)
        return [[stem(w) for w in split(t)] for t in texts]

    counted = {}
    for row in rows:
        weighted = Counter()
        for weight, words in zip(WEIGHTS.values(), fields(row), strict=True):
            for word in words:
                weighted[word] += weight
        counted[row[0]] = (weighted, sum(map(len, fields(row))), row)
    n, mean = len(rows), np.mean([length for _, length, _ in counted.values()])
    scores = {}
    for number, (weighted, length, row) in counted.items():
        hits = [any(weighted[stem(w)] for w in group) for group in groups]
        if not allowed(row) or not (all(hits) if every else any(hits)):
            continue
        scores[number] = 0.0
        for term in {stem(w) for group in groups for w in group}:
            held = sum(1 for w, _, _ in counted.values() if w[term])
            f = weighted[term]
            idf = math.log(1 + (n - held + 0.5) / (held + 0.5))
            scores[number] += idf * f * 2.2 / (f + 1.2 * (0.25 + 0.75 * length / mean))
    return scores


def same(found, expected):
    assert found.total == len(expected)
    assert set(found.ids.tolist()) == set(expected)
    for number, score in zip(found.ids.tolist(), found.scores, strict=True):
        assert score == pytest.approx(expected[number], rel=1e-4)
    assert (np.diff(found.scores) <= 1e-6).all()


QUERIES = [
    (("w1",),), (("w1",), ("w2",)), (("networks",), ("w50",)),
    (("learned",), ("network",), ("w0",)),
    (("w59", "w58", "w57"), ("w1",)), (("muller",),), (("chen",), ("w3",)), (("2001",), ("00007",)),
]  # fmt: skip


@pytest.mark.parametrize("every", [True, False])
def test_bm25_is_the_formula_s(every):
    rows = [paper(i, 0) for i in range(1, 400)]
    index_ = postings.empty().updated([], rows)
    for groups in QUERIES:
        same(index_.search(groups, every, None, 1000), obvious(rows, groups, every))
    allowed = Filter(wing="compute", since="2012-01-01", until="2018-05-11")
    expected = obvious(
        rows, QUERIES[1], every,
        lambda row: row[8] == "compute" and "2012-01-01" <= row[7] <= "2018-05-11",
    )  # fmt: skip
    assert 0 < len(expected) < 60
    same(index_.search(QUERIES[1], every, index_.facts.passing(allowed), 1000), expected)
    best = index_.search(QUERIES[0], every, None, 7)
    assert best.ids.tolist() == index_.search(QUERIES[0], every, None, 1000).ids[:7].tolist()


def test_an_index_that_followed_is_the_one_made_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(postings, "_PART", 37)
    monkeypatch.setattr(postings, "_BATCH", 11)
    rows = {i: paper(i, 0) for i in range(1, 300)}
    index_ = postings.empty().updated([], rows.values())
    rng = np.random.default_rng(1)
    for step in range(1, 6):  # some change, some go, some come
        changed = [int(i) for i in rng.choice(list(rows), 20, replace=False)]
        for number in changed[:5]:
            del rows[number]
        for number in changed[5:]:
            rows[number] = paper(number, step)
        new = range(1000 * step, 1000 * step + 30)
        rows |= {number: paper(number, step) for number in new}
        there = [rows[n] for n in (*changed, *new) if n in rows]
        index_ = index_.updated([*changed, *new], there)
        assert len(index_) == len(rows)
    postings.save(tmp_path / "words.npz", index_, {"n": 7})
    read, described = postings.load(tmp_path / "words.npz")
    assert described == {"n": 7}
    for found in (index_, read):
        for groups in QUERIES:
            for every in (True, False):
                same(found.search(groups, every, None, 1000), obvious(list(rows.values()), groups,
                                                                      every))  # fmt: skip
        mask = found.facts.passing(Filter(status="runs"))
        assert set(found.facts.ids[mask]) == {n for n, row in rows.items() if row[9] == "runs"}


def test_an_index_with_nothing_in_it():
    index_ = postings.empty()
    assert index_.search((("a",),), True, None, 5).total == 0
    assert index_.updated([1, 2], []).search((("a",),), False, None, 5).total == 0
    assert postings.empty().updated([], [paper(1, 0)]).updated([1], []).search(
        (("w1",),), False, None, 5).total == 0  # fmt: skip


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"x" * 5000])
def test_a_damaged_file_is_not_read(tmp_path, content):
    (tmp_path / "words.npz").write_bytes(content)
    assert postings.load(tmp_path / "words.npz") is None
    pytest.importorskip("faiss")
    assert index.read(tmp_path / "words.npz") is None


def unit(count: int, seed: int) -> np.ndarray:
    """Vectors around some centres, as meanings lie."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(40, 64))
    made = centres[rng.integers(40, size=count)] + rng.normal(size=(count, 64))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def test_the_exact_index_sorts_all_cosines():
    vectors, ids = unit(500, 1), np.arange(10, 510)
    found, cosines = index.Exact(ids, vectors).nearest(vectors[3], 20)
    expected = np.argsort(-(vectors @ vectors[3]))[:20]
    assert found.tolist() == ids[expected].tolist()
    np.testing.assert_allclose(cosines, np.sort(vectors @ vectors[3])[::-1][:20], atol=1e-6)
    allowed = np.zeros(200, bool)
    allowed[15:40] = True
    assert set(index.Exact(ids, vectors).nearest(vectors[3], 99, allowed)[0]) == set(range(15, 40))
    assert len(index.Exact(ids[:0], vectors[:0]).nearest(vectors[3], 5)[0]) == 0


def test_the_approximate_index_finds_nearly_the_same(tmp_path):
    pytest.importorskip("faiss")
    vectors, ids = unit(6000, 1), np.arange(1, 6001)
    near, exact = index.build(ids, vectors, exact=5000), index.Exact(ids, vectors)
    assert isinstance(near, index.Approximate)
    near.save(tmp_path / "x.npz", {"n": 3})
    read, described = index.read(tmp_path / "x.npz")
    assert described == {"n": 3}
    for found in (near, read):
        shared = [
            len(set(found.nearest(q, 20)[0]) & set(exact.nearest(q, 20)[0])) / 20
            for q in unit(50, 2)
        ]
        assert np.mean(shared) > 0.9
        np.testing.assert_allclose(found.vector(77), vectors[76], atol=0.02)
        assert found.vector(99_999) is None
    for count in (50, 4500):  # compared one by one, and through the approximate index
        few = np.zeros(6001, bool)
        few[1 + RNG.choice(6000, count, replace=False)] = True
        theirs = near.nearest(vectors[0], 50, few)[0]
        assert few[theirs].all() and len(theirs) == 50
        assert len(set(theirs) & set(exact.nearest(vectors[0], 50, few)[0])) > 44


def test_the_approximate_index_follows():
    pytest.importorskip("faiss")
    vectors, ids = unit(3000, 1), np.arange(1, 3001)
    near = index.build(ids, vectors, exact=100)
    # 1 becomes what 2 is, 3 goes, 5000 comes as what 4 is
    changed = np.array([1, 3, 5000])
    after = near.updated(changed, np.array([1, 5000]), vectors[[1, 3]])
    assert set(after.nearest(vectors[1], 2)[0]) == {1, 2}
    assert set(after.nearest(vectors[3], 2)[0]) == {4, 5000}
    assert 1 not in after.nearest(vectors[0], 3000)[0][:1]
    assert 3 not in after.nearest(vectors[2], 3000)[0]
    allowed = np.ones(6000, bool)
    allowed[4] = False
    assert after.nearest(vectors[3], 1, allowed)[0].tolist() == [5000]
    assert after.vector(3) is None
    np.testing.assert_array_equal(after.vector(1), vectors[1])
    # twice the same paper, and then more than a search can look at one by one
    again = after.updated(np.array([5000]), np.array([5000]), vectors[[9]])
    assert set(again.nearest(vectors[9], 2)[0]) == {10, 5000}
    assert after.updated(np.arange(9000, 15_000), np.arange(9000, 15_000), unit(6000, 3)) is None
    # what it was before is not touched
    assert near.nearest(vectors[2], 1)[0].tolist() == [3]
