"""Event lists as users have them, the snapshots they make, and the splits in time."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from pantarhei.data import load
from pantarhei.data.events import (
    Events,
    NodeValues,
    degree_features,
    degree_width,
    read_events,
    snapshots,
    split,
    summed,
    with_features,
)
from pantarhei.errors import RequestError

SHARED = os.environ.get("PANTARHEI_DATA") or str(Path(__file__).parents[3] / "shared" / "data")
needs_shared = pytest.mark.skipif(
    not Path(SHARED, "dynamic_graphs").is_dir(), reason="PANTARHEI_DATA names no data sets"
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from,to,time,rating\n7,3,20,1\n3,10,10,-2\n", "a.csv"),
        ("7,3,20,1\n3,10,10,-2\n", "a.csv"),
        ("7\t3\t20\t1\n3\t10\t10\t-2\n", "a.tsv"),
        ("# who whom when what\n7 3 20 1\n\n3 10 10 -2\n", "a.txt"),
        ("\ufeffsource;target;timestamp;weight\n7;3;20;1\n3;10;10;-2\n", "a.csv"),
        ('src,dst,rating,time\n"7","3",1,20\n3,10,-2,10\n', "a.csv"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_common_form_of_a_list_is_read(tmp_path, text, name, packed):
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    weight = None if "rating" in text or "weight" in text else 3
    found = read_events(path, weight=weight)
    assert found.names.tolist() == [3, 7, 10]  # numbers, not words: 10 after 7
    assert found.source.tolist() == [0, 1] and found.target.tolist() == [2, 0]  # by time
    assert found.time.tolist() == [10, 20] and found.weight.tolist() == [-2, 1]


def test_columns_are_named_by_header_or_number(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("when,who,whom,kind\n2024-03-01,ann,bob,call\n2024-02-01 10:00,bob,ann,mail\n")
    found = read_events(path, source="who", target=2, time="when", label="kind")
    assert found.classes == ("call", "mail") and found.label.tolist() == [1, 0]
    assert found.time[1] - found.time[0] == pytest.approx((29 - 10 / 24) * 86400)


@pytest.mark.parametrize(
    ("text", "options", "sentence"),
    [
        ("a,b\n1,2\n", {}, "an event has a source, a target and a time"),
        ("", {}, "no rows"),
        ("src,dst,time\n", {}, "no events"),
        ("src,dst,time\na,b,1\na,b,soon\n", {}, "Event 2 .* has the time 'soon'"),
        ("src,dst,time\na,b,1\na,b,nan\n", {}, "time of event 2 .* not finite"),
        ("src,dst,time\na,b,1\na,b\n", {}, "not the file expected"),
        ("src,dst,time\na,a,1\n", {}, "no event between two different nodes"),
        ("src,dst,time\na,b,1\n", {"label": "kinds"}, "no column 'kinds' for label"),
        ("src,dst,time\na,b,1\n", {"weight": 7}, "no 7 for weight"),
        ("src,dst,time,weight\na,b,1,x\n", {}, "not made of numbers"),
    ],
)
def test_bad_lists_are_one_sentence(tmp_path, text, options, sentence):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(RequestError, match=sentence):
        read_events(path, **options)


def test_arrays_are_taken_and_bad_ones_refused(tmp_path):
    with pytest.raises(RequestError, match="is not a file"):
        read_events(tmp_path / "none.csv")
    with pytest.raises(RequestError, match="vectors of one length"):
        Events.of([1, 2], [2, 3], [1])
    moments = np.array(["2024-01-01", "2024-01-02"], "datetime64[D]")
    assert np.diff(Events.of([1, 2], [2, 3], moments).time) == 86400
    with pytest.raises(RequestError, match="weight of event 2"):
        Events.of([1, 2], [2, 3], [1, 2], weight=[1, np.inf])


def test_multi_edges_are_one_with_votes_and_counts():
    e = Events.of(
        [0, 0, 0, 0, 1, 0],
        [1, 1, 1, 2, 0, 1],
        [0, 1, 2, 3, 4, 10],
        weight=[1, 2, 3, 4, 5, 6],
        label=["trust", "distrust", "trust", "trust", "distrust", "distrust"],
    )
    first = snapshots(e, 5).edges[0]
    assert list(zip(first.source, first.target, strict=True)) == [(0, 1), (0, 2), (1, 0)]
    assert first.weight.tolist() == [3, 1, 1]
    assert first.label.tolist() == [1, 1, 0]
    assert snapshots(e, 5, weight="sum").edges[0].weight.tolist() == [6, 4, 5]
    both = snapshots(e, 5, symmetric=True).edges[0]
    assert list(zip(both.source, both.target, strict=True)) == [(0, 1), (0, 2), (1, 0), (2, 0)]
    assert both.weight.tolist() == [4, 1, 4, 1]
    assert both.label.tolist() == [0, 1, 0, 1]  # 2 votes against 2: the first class, distrust
    assert [len(s) for s in snapshots(e, 5).edges] == [3, 0, 1]


def test_a_bin_holds_what_its_interval_says():
    rng = np.random.default_rng(0)
    e = Events.of(rng.integers(0, 9, 400), rng.integers(9, 20, 400), rng.uniform(-5, 95, 400))
    graph = snapshots(e, 7.0, start=-6.0)
    for step, edges in enumerate(graph.edges):
        inside = (e.time >= graph.start + 7 * step) & (e.time < graph.start + 7 * (step + 1))
        pairs = np.stack([e.source[inside], e.target[inside]], 1)
        expected, counts = np.unique(pairs, axis=0, return_counts=True)
        assert np.array_equal(np.stack([edges.source, edges.target], 1), expected)
        assert np.array_equal(edges.weight, counts)
    for width, start in ((0.0, None), (np.nan, None), (1e-9, None), (1.0, 0.0)):
        with pytest.raises(RequestError, match="do not fit"):
            snapshots(e, width, start=start)
    with pytest.raises(RequestError, match="no weights to sum"):
        snapshots(e, 1.0, weight="sum")


@pytest.mark.parametrize("window", [1, 2, 3, 20, 99])
@pytest.mark.parametrize("weight", ["count", "sum", "one"])
def test_summed_adjacencies_are_those_of_the_slow_sum(window, weight):
    rng = np.random.default_rng(window)
    ends = rng.integers(0, 6, (2, 80))
    time = np.sort(rng.choice([0, 1, 2, 3, 8, 9, 11, 19], 80))  # bins without an event too
    events = Events.of(*ends, time, weight=rng.normal(size=80), label=rng.integers(0, 2, 80))
    graph = snapshots(events, 1, weight=weight)
    found = summed(graph, window)
    assert len(found) == len(graph) == 20 and found.names is graph.names
    dense = np.zeros((len(graph), graph.nodes, graph.nodes))
    for t, edges in enumerate(graph.edges):
        dense[t, edges.source, edges.target] = edges.weight
    for t, edges in enumerate(found.edges):
        seen = slice(max(0, t - window + 1), t + 1)
        slow = np.zeros_like(dense[0])
        slow[edges.source, edges.target] = edges.weight
        np.testing.assert_allclose(slow, dense[seen].sum(0), atol=1e-12)
        there = np.argwhere((dense[seen] != 0).any(0))
        assert np.array_equal(there, np.stack([edges.source, edges.target], 1))
        assert (edges.label is None) == (window > 1)


def test_splits_are_in_order_of_time_and_those_of_the_paper():
    otc, uci = split(138, first=10), split(89, 0.71, first=10)
    assert (otc.train.stop, len(otc.validation), len(otc.test[:-1])) == (95, 14, 28)
    assert (uci.train.stop, len(uci.validation), len(uci.test[:-1])) == (62, 9, 17)
    assert otc.train.stop <= otc.validation.start and otc.validation.stop <= otc.test.start
    for bad in ((5, 0.7, 0.1), (100, 1.0, 0.1), (100, 0.7, 0.0), (100, 0.95, 0.1)):
        with pytest.raises(RequestError, match="cannot be split"):
            split(*bad, first=2)


def test_degrees_count_distinct_neighbours_and_overflow_into_the_last_place():
    e = Events.of([0, 0, 0, 0, 5, 0], [1, 1, 2, 3, 6, 4], [0, 0, 0, 0, 0, 9])
    graph = snapshots(e, 5)
    assert graph.edges[0].active.tolist() == [0, 1, 2, 3, 5, 6]
    assert graph.edges[0].degrees().tolist() == [3, 0, 0, 0, 1, 0]
    assert degree_width(graph, range(1)) == 4 and degree_width(graph, range(1, 2)) == 2
    assert degree_features(graph.edges[0], 2).tolist() == [1, 0, 0, 0, 1, 0]


def test_a_users_features_of_three_forms():
    graph = snapshots(Events.of([0, 1], [1, 2], [0, 9]), 5)
    static = with_features(graph, np.arange(6).reshape(3, 2))
    assert static.features[1].values.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert with_features(graph, np.zeros((2, 3, 4))).features[0].values.shape == (3, 4)
    some = [NodeValues(np.array([0, 1]), np.ones((2, 5)))] * 2
    assert with_features(graph, some).features[0].nodes.tolist() == [0, 1]
    for bad in (np.zeros((4, 2)), np.full((3, 2), np.nan), some[:1]):
        with pytest.raises(RequestError):
            with_features(graph, bad)


@needs_shared
@pytest.mark.parametrize(
    ("name", "rows", "nodes", "negative", "width", "last"),
    [
        ("bitcoin_otc", 35592, 5881, 3563, 1.2e6, 137),
        ("bitcoin_alpha", 24186, 3783, 1536, 1.2e6, 136),
        ("uci_messages", 59835, 1899, None, 190080, 88),
    ],
)
def test_the_papers_sets_have_their_sizes(name, rows, nodes, negative, width, last):
    found = load(name, SHARED)
    assert (len(found), found.nodes, found.name) == (rows, nodes, name)
    assert (np.diff(found.time) >= 0).all() and found.self_loops == 0
    if negative:
        assert found.classes == ("distrust", "trust") and (found.label == 0).sum() == negative
    assert len(snapshots(found, width)) == last + 1


def test_snaps_own_file_is_read_too(tmp_path):
    (tmp_path / "soc-sign-bitcoinotc.csv").write_text("6,2,4,1289241911.7\n6,5,-2,1289241941.5\n")
    found = load("bitcoin_otc", tmp_path)
    assert found.weight.tolist() == [4, -2] and found.label.tolist() == [1, 0]
    (tmp_path / "soc-sign-bitcoinotc.csv").write_text("6,2,4.5,1289241911\n")
    with pytest.raises(RequestError, match="no column of ratings"):
        load("bitcoin_otc", tmp_path)
