"""Search over a store, on either database: what is found, what follows, what bears hostility."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import sqlalchemy as sa

from pantarhei.errors import RequestError
from pantarhei.feed import papers, schema
from pantarhei.feed.search import Searcher, index, meaning, text, upkeep
from pantarhei.feed.store import Store
from pantarhei.papers import catalogue


def row(key: str, title: str, summary: str = "", **more) -> dict:
    return {"key": key, "title": title, "summary": summary, "date": "2024-05-01", "source": "json",
            **more}  # fmt: skip


def add(store: Store, *rows: dict) -> None:
    with store.write() as c:
        papers.add(c, rows)


def cards() -> list[dict]:
    return [
        {"key": card.slug, "title": card.title, "summary": card.summary, "date": card.date,
         "authors_count": card.authors_count, "arxiv": card.arxiv, "code": card.code,
         "wing": card.wing, "source": "catalogue", "status": card.status}
        for card in catalogue()
    ]  # fmt: skip


@pytest.fixture
def reading_list(store) -> Store:
    add(store, *cards())
    return store


@pytest.fixture
def searcher(reading_list):
    made = Searcher(reading_list)
    made.refresh()
    yield made
    made.close()


def keys(results) -> list[str]:
    return [hit.paper.key for hit in results.hits]


def test_dynamic_deep_neural_network_ranks_sensibly(searcher):
    # Said before looking: the papers whose titles hold these words are among the first five, and
    # papers about something else (a survey of Alzheimer's disease, prices of suitcases, shares)
    # are not among the first ten.
    found = keys(searcher.search("dynamic deep neural network"))
    assert {"dynn-robustness", "dyfranet", "deep-linear"} <= set(found[:5])
    assert not {"ad-progression", "airline-pricing", "portfolio-drl"} & set(found[:10])


@pytest.mark.parametrize(
    "query, first",
    [
        ("early exit", {"rbqe", "dynn-robustness"}),
        ("SortedNet, a Place for Every Network", {"sortednet"}),
        ("sortdnet", {"sortednet"}),
        ("erly exti", {"rbqe", "dynn-robustness"}),
        ("2006.16581", {"rbqe"}),
        ("graphs that change over time", {"evolvegcn"}),
        ("stock market", {"portfolio-drl"}),
        ("rocket engine oscillations", {"thermoacoustic"}),
        ('"graph convolutional networks"', {"evolvegcn"}),
        ("learning rates", {"lr-transfer"}),
    ],
)
def test_what_readers_look_for_comes_first(searcher, query, first):
    assert set(keys(searcher.search(query))[: len(first)]) == first


def test_a_slip_is_forgiven_and_said(searcher):
    found = searcher.search("Netwrok prunning")
    assert found.corrected == "network pruning"
    assert keys(found) == keys(searcher.search("network pruning"))
    assert searcher.search("network pruning").corrected is None
    assert searcher.search("xqzvk").hits == ()


def test_meaning_finds_what_words_do_not(store):
    if meaning.load() is None:
        pytest.skip("wordllama is not installed")
    add(
        store,
        row("one", "Automobile engines", "How a motor vehicle burns fuel."),
        row("cats", "Feline sleep", "When kittens rest."),
        row("dogs", "Canine sleep", "When puppies rest."),
        row("tax", "Fiscal policy", "On revenue of the state."),
    )
    searcher = Searcher(store)
    searcher._refresh_in_background = lambda: None
    assert keys(searcher.search("kitten naps")) == ["cats"]  # a word of it
    assert keys(searcher.search("car")) == []
    searcher.refresh()
    assert keys(searcher.search("car"))[:1] == ["one"]
    assert [p.key for p in searcher.related(_id(store, "cats"), 1)] == ["dogs"]


def _id(store: Store, key: str) -> int:
    with store.read() as c:
        return papers.get(c, key).id


def test_without_the_model_words_serve_alone(reading_list, monkeypatch):
    monkeypatch.setattr(meaning, "load", lambda: None)
    searcher = Searcher(reading_list)
    searcher.refresh()
    found = searcher.search("dynamic deep neural network")
    assert {"dyfranet", "deep-linear"} == set(keys(found)[:2])  # all four words in their titles
    assert not {"ad-progression", "airline-pricing", "portfolio-drl"} & set(keys(found)[:10])
    related = searcher.related(_id(reading_list, "sinenet"))
    assert len(related) == 5 and "sinenet" not in [p.key for p in related]


def test_filters_hold_for_words_and_meanings(searcher):
    everything = searcher.search("network", limit=100)
    for name, value in (("wing", "compute"), ("wing", "systems"), ("status", "runs")):
        found = searcher.search("network", limit=100, **{name: value})
        assert 0 < found.total < everything.total
        assert {getattr(hit.paper, name) for hit in found.hits} == {value}
    found = searcher.search("network", since="2021-01-01", until="2023-06-30", limit=100)
    assert found.hits and all("2021" <= h.paper.date <= "2023-06-30" for h in found.hits)
    assert searcher.search("network", since="2090-01-01").total == 0
    for wrong in (
        {"wing": "engines"},
        {"status": "held"},
        {"since": "May"},
        {"until": "2024-13-01"},
    ):
        with pytest.raises(RequestError):
            searcher.search("network", **wrong)


def test_pages_follow_each_other_without_gaps(searcher):
    whole = searcher.search("deep network learning", limit=100)
    assert whole.total == len(whole.hits) > 12
    parts = [searcher.search("deep network learning", limit=5, offset=n) for n in range(0, 60, 5)]
    assert [key for part in parts for key in keys(part)] == keys(whole)
    assert {part.total for part in parts} == {whole.total}
    assert searcher.search("network", limit=10**9, offset=10**9).hits == ()
    assert len(searcher.search("network", limit=-3, offset=-3).hits) == 1


def test_long_lists_are_paged_behind_what_is_fused(store, monkeypatch):
    add(store, *[row(f"k{i}", f"network {'deep ' * (i % 7)}{i}") for i in range(300)])
    monkeypatch.setattr("pantarhei.feed.search._DEPTH", 50)
    searcher = Searcher(store)
    searcher.refresh()
    found = [k for n in range(0, 300, 30) for k in keys(searcher.search("network", limit=30,
                                                                         offset=n))]  # fmt: skip
    assert len(found) == len(set(found)) == 300
    assert searcher.search("network").total == 300


HOSTILE = [
    '"', '""', '"a', "'", "*", "net*", "(", ")", "((net", "AND", "OR", "NOT", "AND OR NOT", "NEAR(",
    'NEAR("a b", 3)', "title:net", "title : net", "{title summary}: net", "-net", "+net", "^net",
    "net^2", "a:b:c", "\\", "%", "%s", "_", ";", "--", "/*", "'; DROP TABLE papers; --", "\0",
    "net\0",
    ":x", ":*", "net:*", "&", "|", "!", "a & b | !c", "<->", "a <-> b", "&&", "\ud800", "𝔫𝔢𝔱", "ﬁ",
    "नेटवर्क", "神经网络", "مرحبا", "²", "½", "İ", "ß", "\u200b", "e\u0301", "net\n\r\tdeep", "💥",
    "a" * 100_000, "net " * 50_000, '"net" ' * 1000, "( " * 1000, "1e999", "0x", "NaN", "$1", "{0}",
    "<script>alert(1)</script>",
]  # fmt: skip


def test_no_query_is_an_error(searcher, reading_list):
    unready = Searcher(reading_list)
    unready._current = lambda c: None  # the database's own full text
    for query in HOSTILE:
        for asked in (searcher, unready):
            assert asked.search(query).total >= 0
            asked.search(f"{query} network", wing="compute")
            asked.suggest(query)
            asked.suggest(f"network {query}")


def test_operators_mean_nothing(searcher):
    for left, right in [
        ("early AND exit", "early exit"),
        ("early* (exit)", "early exit"),
        ("early + ^exit:", "early exit"),
        ("deep\nnetwork", "deep network"),
    ]:
        assert keys(searcher.search(left)) == keys(searcher.search(right))


def test_words_in_quotes_stand_side_by_side(store):
    add(store, row("a", "Early exit"), row("b", "Exit early"), row("c", "Early, then exit"))
    searcher = Searcher(store)
    for asked in (searcher, Searcher(store)):
        if asked is not searcher:
            asked._current = lambda c: None
        assert keys(asked.search('"early exit"')) == ["a"]
        assert set(keys(asked.search("early exit"))) == {"a", "b", "c"}
        assert keys(asked.search('"exit early" early')) == ["b"]


def test_accents_and_authors(store):
    add(
        store,
        row("a", "Bridges of Schrödinger", authors=["Bernhard Schölkopf"]),
        row("b", "Tunnels"),
    )
    searcher = Searcher(store)
    database = Searcher(store)
    database._current = lambda c: None
    for asked in (searcher, database):
        for query in ("schrodinger", "Schrödinger", "scholkopf", "SCHÖLKOPF bridges"):
            assert keys(asked.search(query)) == ["a"], query


def test_a_search_sees_what_was_just_committed(store, monkeypatch):
    monkeypatch.setattr(meaning, "load", lambda: None)  # a donkey is like a zebra
    searcher, other = Searcher(store), Searcher(store)
    assert searcher.search("zebra").total == 0
    add(store, row("a", "A zebra"), row("b", "A horse"))
    for asked in (searcher, other):
        assert keys(asked.search("zebra")) == ["a"]
    add(store, row("a", "A donkey"))
    assert searcher.search("zebra").total == 0 and keys(searcher.search("donkey")) == ["a"]
    with store.write() as c:
        c.execute(sa.update(schema.papers).values(wing="compute").where(schema.papers.c.key == "b"))
    assert keys(searcher.search("horse", wing="compute")) == ["b"]
    with store.write() as c:
        c.execute(sa.delete(schema.papers).where(schema.papers.c.key == "a"))
    for asked in (searcher, other, Searcher(store)):
        assert asked.search("donkey").total == 0
        asked.close()


def test_the_database_s_own_index_follows_too(store):
    def found(word: str) -> list[int]:
        with store.read() as c:
            return text.search(c, ((word,),), True, text.Filter(), 10).ids.tolist()

    add(store, row("a", "A zebra", "with summary", authors=["Ann"]), row("b", "A horse"))
    first = _id(store, "a")
    assert found("zebra") == found("ann") == found("summary") == [first]
    add(store, row("a", "A donkey", "with summary", authors=["Ann", "Bob"]))
    assert found("zebra") == [] and found("donkey") == found("bob") == [first]
    with store.write() as c:  # votes do not concern it
        c.execute(sa.update(schema.papers).values(votes=3))
        n = c.exec_driver_sql("SELECT max(n) FROM search_changes").scalar()
        c.execute(sa.update(schema.papers).values(heat=3.0, title=schema.papers.c.title))
        assert c.exec_driver_sql("SELECT max(n) FROM search_changes").scalar() == n
        c.execute(sa.delete(schema.papers).where(schema.papers.c.key == "a"))
    assert found("donkey") == [] and len(found("horse")) == 1


def _embedded(store: Store) -> dict[str, str]:
    e, p = schema.embeddings, schema.papers
    with store.read() as c:
        rows = c.execute(sa.select(p.c.key, e.c.digest).join(p, p.c.id == e.c.paper)).all()
    return {key: digest for key, digest in rows}


def test_what_changed_is_embedded_anew_and_nothing_else(store, monkeypatch):
    model = meaning.load()
    if model is None:
        pytest.skip("wordllama is not installed")
    seen: list[str] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda texts: seen.extend(texts) or embed(texts))
    add(store, row("a", "A zebra"), row("b", "A horse"))
    searcher = Searcher(store)
    searcher.refresh()
    assert len(seen) == 2 and set(_embedded(store)) == {"a", "b"}
    searcher.refresh()
    Searcher(store).refresh()
    assert len(seen) == 2
    add(store, row("a", "A donkey"), row("c", "A mule"))
    searcher.refresh()
    assert sorted(t.split(".")[0] for t in seen[2:]) == ["A donkey", "A mule"]
    vector = searcher._upkeep.near.vector(_id(store, "a"))
    np.testing.assert_allclose(vector, embed([meaning.text_of("A donkey", "")])[0], atol=2e-3)


def test_many_processes_refresh_one_store_and_a_killed_one_is_made_good(store):
    if meaning.load() is None:
        pytest.skip("wordllama is not installed")
    add(store, *[row(f"k{i}", f"paper {i} about networks", f"summary {i}") for i in range(1500)])
    code = textwrap.dedent("""
        import sys
        from pantarhei.feed.search import Searcher
        from pantarhei.feed.store import Store
        print("go", flush=True)
        Searcher(Store(sys.argv[1])).refresh()
    """)
    command = [sys.executable, "-c", code, store.url]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for worker in workers:
        worker.stdout.readline()
    os.kill(workers[0].pid, signal.SIGKILL)
    assert workers[0].wait() == -signal.SIGKILL
    assert [worker.wait(120) for worker in workers[1:]] == [0, 0]
    for worker in workers:
        worker.stdout.close()
    searcher = Searcher(store)
    searcher.refresh()
    assert len(_embedded(store)) == 1500
    assert keys(searcher.search("paper 777"))[0] == "k777"


def test_a_large_store_keeps_its_indices_and_notices_what_they_lack(new_url, monkeypatch, tmp_path):
    pytest.importorskip("faiss")
    if meaning.load() is None:
        pytest.skip("wordllama is not installed")
    monkeypatch.setattr(upkeep, "_KEPT", 100)
    url = new_url()
    with Store(url) as store:
        add(store, *[row(f"k{i}", f"paper {i} of cats and networks") for i in range(400)])
        folder = tmp_path / "kept"
        searcher = Searcher(store, folder=folder, exact=200)
        searcher.refresh()
        in_database = index.Pgvector.serves(store)
        assert in_database or isinstance(searcher._upkeep.near, index.Approximate)
        before = keys(searcher.search("paper 123 cats"))

        read = []
        monkeypatch.setattr(upkeep.postings, "rows_of",
                            lambda c, ids=None: read.append(ids) or [])  # fmt: skip
        again = Searcher(store, folder=folder, exact=200)
        again.refresh()
        assert keys(again.search("paper 123 cats")) == before
        assert read == []  # nothing was read anew
        monkeypatch.undo()
        monkeypatch.setattr(upkeep, "_KEPT", 100)
        add(store, row("new", "A mule among cats"), row("k5", "paper of donkeys"))
        later = Searcher(store, folder=folder, exact=200)
        later.refresh()
        assert keys(later.search("mule"))[0] == "new" and keys(later.search("donkeys"))[0] == "k5"
        related = later.related(_id(store, "new"), 3)
        assert len(related) == 3 and "new" not in [p.key for p in related]
    for file in folder.iterdir():
        file.write_bytes(b"damaged")
    with Store(url) as store:
        made = Searcher(store, folder=folder, exact=200)
        made.refresh()
        assert keys(made.search("mule"))[0] == "new"
        # changes that were forgotten before they were read
        with store.write() as c:
            c.exec_driver_sql("DELETE FROM search_changes")
        add(store, row("newer", "An okapi"))
        with store.write() as c:
            c.exec_driver_sql("DELETE FROM search_changes WHERE n < (SELECT max(n) FROM "
                              "(SELECT n FROM search_changes) AS all_of_them)")  # fmt: skip
        for asked in (made, Searcher(store, folder=folder, exact=200)):
            asked.refresh()
            assert keys(asked.search("okapi"))[0] == "newer"
    with Store(new_url()) as other:  # another store's indices are not this one's
        add(other, row("a", "A zebra"))
        stranger = Searcher(other, folder=folder)
        stranger.refresh()
        assert stranger.search("mule").total == 0 and keys(stranger.search("zebra")) == ["a"]


def test_the_log_of_changes_stays_short(store, monkeypatch):
    monkeypatch.setattr(upkeep, "_REMEMBERED", 20)
    searcher = Searcher(store)
    for round_ in range(4):
        add(store, *[row(f"k{i}", f"{round_} paper {i}") for i in range(30)])
        searcher.refresh()
    with store.read() as c:
        assert c.exec_driver_sql("SELECT count(*) FROM search_changes").scalar() <= 60


def test_pgvector_serves_where_it_is(store):
    if not index.Pgvector.serves(store):
        pytest.skip("no pgvector here")
    add(store, *cards())
    searcher = Searcher(store)
    searcher.refresh()
    near = searcher._upkeep.near
    assert isinstance(near, index.Pgvector)
    with store.read() as c:
        rows = c.execute(sa.select(schema.embeddings.c.paper, schema.embeddings.c.vector)).all()
    exact = index.Exact(np.array([r[0] for r in rows]), meaning.unpack([r[1] for r in rows], 256))
    query = meaning.load().embed(["dynamic deep neural network"])[0]
    ids, cosines = near.nearest(query, 8)
    theirs, expected = exact.nearest(query, 8)
    assert ids.tolist() == theirs.tolist()
    np.testing.assert_allclose(cosines, expected, atol=2e-3)
    allowed = np.zeros(40, bool)
    allowed[ids[[2, 5]]] = True
    assert near.nearest(query, 8, allowed)[0].tolist() == ids[[2, 5]].tolist()
    assert near.vector(10**6) is None


def test_suggestions_follow_the_typing(searcher):
    for typed in ("sor", "sorted", "sortedn", "SortedNet"):
        assert "sortednet" in [p.key for p in searcher.suggest(typed)], typed
    assert next(p.key for p in searcher.suggest("sortednet a place")) == "sortednet"
    assert searcher.suggest("early ex")[0].key in {"rbqe", "dynn-robustness"}
    assert [p.key for p in searcher.suggest("sortedmet")][:1] == ["sortednet"]
    assert searcher.suggest("") == () and len(searcher.suggest("n", limit=3)) == 3


def test_related_papers_are_others(searcher, reading_list):
    found = [p.key for p in searcher.related(_id(reading_list, "sortednet"), 4)]
    assert len(found) == len(set(found)) == 4 and "sortednet" not in found
    assert searcher.related(10**8) == ()


def test_snippets_are_plain_text(store):
    add(store, row("a", "Title", "An <script>alert(1)</script> exit & more"))
    snippet = Searcher(store).search("exit").hits[0].snippet
    assert str(snippet) == "An <script>alert(1)</script> exit & more"
    assert list(snippet)[1] == ("exit", True)
    assert snippet.__html__().count("<") == 2


def test_threads_search_while_papers_come_and_go(store):
    add(store, *cards())
    searcher = Searcher(store)
    searcher.refresh()
    failures, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            try:
                assert "rbqe" in keys(searcher.search("blind quality enhancement"))
                searcher.suggest("blind qua")
            except BaseException as error:
                failures.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number in range(12):
        add(store, row(f"n{number}", f"blind quality {number}"))
        searcher.refresh()
    stop.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert searcher.search("blind quality 11").hits[0].paper.key == "n11"
    searcher.close()


def test_a_search_is_prompt_where_all_that_it_needs_is_in_memory(reading_list, searcher):
    on_file = reading_list.path is not None
    assert searcher.prompt("early exit") is on_file
    assert not searcher.prompt('"early exit"')
    assert not Searcher(reading_list).prompt("early exit")
    add(reading_list, row("new", "Zephyrs"))
    assert not searcher.prompt("early exit")
    assert keys(searcher.search("zephyr"))[:1] == ["new"]
    assert searcher.prompt("early exit") is on_file


def test_a_store_without_papers(store):
    searcher = Searcher(store)
    searcher.refresh()
    assert searcher.search("network").hits == () and searcher.search("").total == 0
    assert searcher.suggest("net") == () and searcher.related(1) == ()


def test_loading_the_model_leaves_logging_as_it_was():
    program = (
        "import logging; from pantarhei.feed.search import meaning; meaning.load();"
        "root = logging.getLogger(); print(root.handlers, root.level)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"[] {logging.WARNING}\n" and done.stderr == ""
