"""Cards and results come in by themselves, the newest wins, and nothing is done twice."""

from __future__ import annotations

import math
import shutil
import threading
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import sqlalchemy as sa

from pantarhei.claims import Claim, Ledger, RunInfo
from pantarhei.errors import RequestError
from pantarhei.feed import loading, papers, schema, trends
from pantarhei.feed.papers import Added
from pantarhei.papers import catalogue
from pantarhei.records import export_records, import_records

EVIDENCE = Path(str(resources.files("pantarhei.papers").joinpath("evidence")))


def run(uid, paper="rbqe", scale="quick", date="2026-01-01T00:00:00Z", **other):
    other = {"versions": {"torch": "2"}, "machine": {"cores": 2}, "seconds": 5.0} | other
    return RunInfo(uid, paper, scale, 2**32 - 1, "cpu", date, "pantarhei run", f"/runs/{uid}",
                   {"a": 1}, commit="c" * 40, **other)  # fmt: skip


def claim(info, id="one", measured=0.5, **other):
    row = {"paper": info.paper, "id": id, "statement": "it holds", "quantity": "x",
           "direction": "<=", "bound": 0.75, "paper_value": "0.7", "measured": measured,
           "holds": measured <= 0.75, "scale": info.scale, "seed": info.seed, "seconds": 3.0,
           "evidence": "x.csv"}  # fmt: skip
    return Claim(**row | other)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "home" / "ledger.sqlite")


@pytest.fixture
def load(store, tmp_path, ledger):
    """Load from a folder of records that is empty, and from this test's ledger, unless named."""
    (tmp_path / "records").mkdir()
    known = {"evidence": tmp_path / "records", "ledger": ledger.path}
    return lambda **other: loading.load(store, **known | other)


def newest(store):
    """Return what the store holds, as a ledger says it."""
    found = set()
    with store.read() as c:
        for card in catalogue():
            paper = papers.get(c, card.slug)
            measured = papers.results(c, paper.id)
            claims = [claim for one in measured for claim in one.claims]
            assert all(one.claims for one in measured)
            assert paper.measured == len(claims)
            assert paper.held == sum(claim.holds for claim in claims)
            events = [trends.published(paper.date, paper.added)]
            events += [
                (trends.CLAIM, trends.seconds(one.run.date)) for one in measured for _ in one.claims
            ]
            assert paper.heat == trends.heat(events)
            found |= {
                (card.slug, one.run.scale, claim.id, one.run.uid, claim.measured, claim.holds)
                for one in measured
                for claim in one.claims
            }
    return found


def expected(*ledgers):
    return {
        (e.run.paper, e.run.scale, e.claim.id, e.run.uid,
         e.claim.measured if math.isfinite(e.claim.measured) else None, e.claim.holds)
        for ledger in ledgers for e in ledger.latest()
    }  # fmt: skip


def test_the_cards_come_first_and_once(store, load):
    assert load().cards == Added(31, 0, 0)
    assert load().cards == Added(0, 0, 31)
    with store.read() as c:
        for card in catalogue():
            paper = papers.get(c, card.slug)
            for name in ("title", "date", "authors_count", "arxiv", "code", "wing", "summary"):
                assert getattr(paper, name) == getattr(card, name)
            assert paper.status == paper.badge == card.status
        order = c.scalars(sa.select(schema.papers.c.key).order_by(schema.papers.c.id)).all()
    assert order == [card.slug for card in catalogue()]


def test_the_records_that_ship_are_what_a_ledger_makes_of_them(store, load, ledger, tmp_path):
    other = Ledger(tmp_path / "other.sqlite")
    import_records(other, EVIDENCE)
    found = load(evidence=EVIDENCE)
    assert found.claims == len(other.latest()) > 50
    assert newest(store) == expected(other)
    with store.read() as c:
        origins = set(c.scalars(sa.select(schema.runs.c.origin)))
        paper = papers.get(c, "evolvegcn")
    assert origins == {"shipped"}
    assert paper.badge == "not-held"
    assert load(evidence=EVIDENCE).claims == 0


def test_nothing_is_written_where_nothing_changed(store, load, ledger, monkeypatch):
    ledger.add(run("u1"), [claim(run("u1"))])
    assert load(evidence=EVIDENCE).claims > 50
    monkeypatch.setattr(type(store), "write", None)
    monkeypatch.setattr(loading, "_entries", None)
    assert load(evidence=EVIDENCE) == loading.Loaded(Added(0, 0, 31), 0)


def test_the_ledger_is_read_again_when_it_changed(store, load, ledger):
    assert load().claims == 0
    ledger.add(run("u1"), [claim(run("u1")), claim(run("u1"), "two", math.nan)])
    assert load().claims == 2
    assert newest(store) == expected(ledger)
    later = run("u2", date="2026-01-02T00:00:00Z")
    ledger.add(later, [claim(later, measured=0.9)])
    cpu = run("u3", scale="cpu")
    ledger.add(cpu, [claim(cpu)])
    assert load().claims == 2
    assert newest(store) == expected(ledger)
    with store.read() as c:
        paper = papers.get(c, "rbqe")
        quick2, quick1, big = papers.results(c, paper.id)
    assert (paper.held, paper.measured, paper.badge) == (1, 3, "not-held")
    assert [one.run.uid for one in (quick2, quick1, big)] == ["u2", "u1", "u3"]
    assert [one.id for one in quick1.claims] == ["two"]
    assert quick2.run.folder == "/runs/u2" and quick2.run.origin == "here"
    assert quick2.run.seed == 2**32 - 1
    assert quick2.run.versions == {"torch": "2"} and quick2.run.machine == {"cores": 2}


def test_of_runs_of_one_second_the_ledgers_choice_is_ours(store, load, ledger):
    for uid in ("b", "a", "c", "aa"):
        ledger.add(run(uid), [claim(run(uid))])
        load()
        assert newest(store) == expected(ledger)


def test_a_run_with_no_newest_claim_is_gone(store, load, ledger):
    ledger.add(run("u1"), [claim(run("u1"))])
    load()
    ledger.add(run("u2"), [claim(run("u2"))])
    load()
    with store.read() as c:
        assert c.scalars(sa.select(schema.runs.c.uid)).all() == ["u2"]


def test_older_records_do_not_replace_newer_results(store, load, ledger, tmp_path):
    old, new = run("old"), run("new", date="2026-02-01T00:00:00Z")
    other = Ledger(tmp_path / "other.sqlite")
    other.add(old, [claim(old), claim(old, "two")])
    export_records(other, tmp_path / "records")
    ledger.add(new, [claim(new)])
    assert load().claims == 3  # the record's two, then the ledger's newer one
    (tmp_path / "records" / "rbqe-quick.json").touch()
    shutil.copy(tmp_path / "records" / "rbqe-quick.json", tmp_path / "records" / "again.json")
    assert load().claims == 0
    runs = {(id, uid) for _, _, id, uid, _, _ in newest(store)}
    assert runs == {("one", "new"), ("two", "old")}


def test_a_run_that_ships_and_was_made_here_has_its_pictures_here(store, load, ledger, tmp_path):
    ledger.add(run("u1"), [claim(run("u1"))])
    export_records(ledger, tmp_path / "records")
    load(ledger=tmp_path / "none.sqlite")

    def where():
        with store.read() as c:
            return c.execute(sa.select(schema.runs.c.origin, schema.runs.c.folder)).one()

    assert where() == ("shipped", "")
    load()
    assert where() == ("here", "/runs/u1")
    (tmp_path / "records" / "rbqe-quick.json").rename(tmp_path / "records" / "b.json")
    load()
    assert where() == ("here", "/runs/u1")


def test_changed_settings_and_unknown_papers_are_passed_over(store, load, ledger):
    changed, unknown = run("u1", overrides={"steps": 1}), run("u2", "toy")
    ledger.add(changed, [claim(changed)])
    ledger.add(unknown, [claim(unknown)])
    assert load().claims == 0
    with store.write() as c:
        load_again = [(changed, claim(changed)), (unknown, claim(unknown))]
        assert loading.keep(c, load_again, "here") == 0
        # nor is a run believed that comes under another's identifier
        assert loading.keep(c, [(run("u3"), claim(run("u3")))], "here") == 1
        thief = run("u3", "sortednet", date="2027-01-01T00:00:00Z")
        assert loading.keep(c, [(thief, claim(thief))], "shipped") == 0


def test_a_figure_of_the_paper_is_text(store, load, ledger):
    figures = (None, "about 0.7", 0.123456789, 3)
    made = run("u1")
    ledger.add(made, [claim(made, str(n), paper_value=said) for n, said in enumerate(figures)])
    load()
    with store.read() as c:
        [one] = papers.results(c, papers.get(c, "rbqe").id)
        assert [row.paper_value for row in one.claims] == [None, "about 0.7", "0.12346", "3"]
        assert [row.measured for row in one.claims] == [0.5] * 4
        [(paper, found), (_, nothing)] = papers.compare(c, ["rbqe", "sortednet", "2006.16581"])
        assert paper.key == "rbqe" and found == [one] and nothing == []
        with pytest.raises(RequestError, match="Unknown paper 'nothing'"):
            papers.compare(c, ["rbqe", "nothing"])


def test_a_ledger_that_is_not_there_is_not_made(load, tmp_path):
    load(ledger=tmp_path / "none" / "ledger.sqlite", evidence=tmp_path / "nowhere")
    assert not (tmp_path / "none").exists()


def test_damage_is_said_and_what_could_be_loaded_stays(store, load, ledger, tmp_path):
    ledger.add(run("u1"), [claim(run("u1"))])
    export_records(ledger, tmp_path / "records")
    ledger.path.write_bytes(b"no database" * 999)
    with pytest.raises(RequestError, match="ledger"):
        load()
    assert len(newest(store)) == 1
    (tmp_path / "records" / "x.json").write_text('{"format": "else"}')
    with pytest.raises(RequestError, match="not a record"):
        load()
    bad = replace(run("u9"), date="yesterday")
    with store.write() as c, pytest.raises(RequestError, match="damaged"):
        loading.keep(c, [(bad, claim(bad))], "shipped")


def test_two_processes_that_load_at_once_load_once(store, load, ledger):
    ledger.add(run("u1"), [claim(run("u1"))])
    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert newest(store) == expected(ledger)
