"""Frontier: measured once, resumed after a kill, selected from without search."""

from __future__ import annotations

import csv
import json
import math

import pytest
import torch
import torch.nn.functional as F

from pantarhei.cost import Cost
from pantarhei.elastic.frontier import Frontier, Point, accuracy, frontier
from pantarhei.elastic.space import Choice, Space
from pantarhei.errors import RequestError


class Sliced(torch.nn.Module):
    """A sliceable two-layer network with the interface of an elastic network."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.space = Space({"width": (0.25, 0.5, 0.75, 1.0), "inputs": (2, 4)})
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        self.calls, self.recalibrated = [], []

    def forward(self, x, choice):
        assert not self.training
        self.calls.append(choice)
        k, i = round(8 * choice["width"]), choice["inputs"]
        hidden = F.linear(x[:, :i], self.first.weight[:k, :i], self.first.bias[:k]).relu()
        return F.linear(hidden, self.second.weight[:, :k], self.second.bias)

    def cost(self, choice):
        k = round(8 * choice["width"])
        return Cost(k * choice["inputs"] + 3 * k, k * choice["inputs"] + 4 * k + 3, 4 * k)

    def recalibrate(self, choice, batches):
        self.recalibrated.append((choice, len(batches)))

    def latency(self, choice):
        return 1.0 * choice["width"]


def make_data(batches=3, size=20):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(batches)
    ]


def point(macs, quality, **choice):
    return Point(Choice(choice), quality, Cost(macs, macs // 2, 4 * macs))


def test_quality_is_what_the_slow_computation_gives():
    net, data = Sliced().train(), make_data()
    front = frontier(net, data, group=3)
    assert [p.choice for p in front.points] == list(net.space)
    net.eval()
    x, y = (torch.cat(part) for part in zip(*data, strict=True))
    for p in front.points:
        expected = (net(x, p.choice).argmax(-1) == y).float().mean().item()
        assert p.quality == pytest.approx(expected) and p.cost == net.cost(p.choice)


def test_training_mode_is_restored():
    net = Sliced().train()
    net.second.eval()
    frontier(net, make_data(), choices=2)
    assert net.training and net.first.training and not net.second.training


def test_each_batch_is_fetched_once_for_a_group():
    net, fetched = Sliced(), []

    class Loader:
        def __iter__(self):
            for batch in make_data():
                fetched.append(1)
                yield batch

    frontier(net, Loader(), group=8)
    assert len(fetched) == 3
    frontier(net, Loader(), group=4, batches=2)
    assert len(fetched) == 3 + 2 * 2


def test_a_sample_is_seeded_distinct_and_holds_the_bounds():
    net, data = Sliced(), make_data(1)
    one, two = (frontier(net, data, choices=5, seed=2) for _ in range(2))
    found = [p.choice for p in one.points]
    assert found == [p.choice for p in two.points] and len(set(found)) == 5
    assert net.space.smallest in found and net.space.largest in found
    assert len(frontier(net, data, choices=100)) == 8


def test_recalibrates_each_choice_once_before_measuring():
    net = Sliced()
    frontier(net, make_data(), recalibrate=iter(make_data(2)))
    assert net.recalibrated == [(c, 2) for c in net.space]


def test_a_killed_measurement_goes_on_where_it_was(tmp_path):
    data, path = make_data(), tmp_path / "front.json"
    whole = frontier(Sliced(), data)

    class Killed(Sliced):
        def forward(self, x, choice):
            if len(self.calls) == 10:
                raise KeyboardInterrupt
            return super().forward(x, choice)

    with pytest.raises(KeyboardInterrupt):
        frontier(Killed(), data, group=2, checkpoint=path)
    assert len(Frontier.from_json(path)) == 2
    net = Sliced()
    again = frontier(net, data, group=2, checkpoint=path)
    assert len(net.calls) == 6 * len(data) and again.points == whole.points
    assert Frontier.from_json(path).points == whole.points
    # finished: nothing is run again; a wider file is not shortened by a narrower question
    assert len(frontier(net, data, choices=[net.space.largest], checkpoint=path)) == 1
    assert len(net.calls) == 6 * len(data) and len(Frontier.from_json(path)) == 8
    with pytest.raises(RequestError, match="accuracy"):
        frontier(net, data, lambda o, b: (1.0, 1), name="loss", checkpoint=path)


def test_selection_by_budget():
    front = Frontier(
        (
            point(10, 0.7, width=0.25),
            point(20, 0.9, width=0.5),
            point(30, 0.85, width=0.75),
            point(40, 0.95, width=1.0),
        )
    )
    assert front.under(macs=35)["width"] == 0.5
    assert front.under(macs=35, pick="largest")["width"] == 0.75
    assert front.under(params=5)["width"] == 0.25
    assert front.under(bytes=160)["width"] == 1.0
    assert front.under(metric_at_least=0.8)["width"] == 0.5
    assert front.under()["width"] == 1.0
    assert [p.cost.macs for p in front.pareto] == [10, 20, 40]
    with pytest.raises(RequestError, match="smallest available are macs 10"):
        front.under(macs=5)
    with pytest.raises(RequestError, match=r"best is 0\.9 \(choice 'width=0\.5'\)"):
        front.under(macs=35, metric_at_least=0.94)
    with pytest.raises(RequestError, match="'best' or 'largest'"):
        front.under(pick="bset")


def test_lower_is_better():
    front = Frontier(
        (point(10, 3.0, width=0.5), point(20, 1.0, width=1.0), point(15, 4.0, width=0.75)), False
    )
    assert front.under(macs=16)["width"] == 0.5
    assert front.under(metric_at_least=3.5)["width"] == 0.5
    assert [p.cost.macs for p in front.pareto] == [10, 20]
    assert len(front.inversions().pairs) == 1


def test_latency_is_measured_on_demand_for_candidates_and_kept(tmp_path):
    asked = []

    def measure(choice):
        asked.append(choice["width"])
        return 10 * choice["width"]

    front = Frontier(
        (point(10, 0.7, width=0.25), point(20, 0.9, width=0.5), point(40, 0.95, width=1.0)),
        measure=measure,
    )
    assert front.under(latency_ms=6)["width"] == 0.5
    assert asked == [1.0, 0.5]  # the smallest was never needed
    assert front.under(latency_ms=7)["width"] == 0.5 and asked == [1.0, 0.5]
    with pytest.raises(RequestError, match=r"the fastest takes 2\.5 ms"):
        front.under(latency_ms=1)
    front.to_json(tmp_path / "f.json")
    loaded = Frontier.from_json(tmp_path / "f.json")
    assert loaded.under(latency_ms=6)["width"] == 0.5
    with pytest.raises(RequestError, match=r"measure = net\.latency"):
        loaded.latency(Choice(width=0.1))


def test_nan_is_kept_but_never_chosen(tmp_path):
    class Broken(Sliced):
        def forward(self, x, choice):
            scale = math.nan if choice["width"] == 1.0 else 1.0
            return super().forward(x, choice) * scale

    front = frontier(Broken(), make_data())
    assert sum(math.isnan(p.quality) for p in front.points) == 2
    assert front.under()["width"] < 1 and front.under(pick="largest")["width"] < 1
    assert all(p.choice["width"] < 1 for p in front.pareto)
    assert front.inversions().compared > 0 and math.isfinite(front.spearman())
    front.to_json(tmp_path / "f.json")
    assert "NaN" not in (tmp_path / "f.json").read_text()
    assert sum(math.isnan(p.quality) for p in Frontier.from_json(tmp_path / "f.json").points) == 2
    front.plot(tmp_path / "front")
    only = Frontier((point(1, math.nan, width=1.0),))
    with pytest.raises(RequestError, match="not a number"):
        only.under()


def test_inversions_count_nested_pairs_only():
    front = Frontier(
        (
            point(10, 0.5, width=0.5, depth=1),
            point(20, 0.4, width=1.0, depth=1),
            point(15, 0.9, width=0.5, depth=2),
            point(30, 0.8, width=1.0, depth=2),
        )
    )
    report = front.inversions()
    # (w .5, d 2) and (w 1, d 1) are not nested: their order says nothing about the sort
    assert report.compared == 5 and len(report.pairs) == 2
    assert report.pairs[0][2] == pytest.approx(0.1) and report.share == pytest.approx(0.4)
    assert len(front.inversions(tolerance=0.11).pairs) == 0
    assert report.spearman == pytest.approx(1 - 6 * 10 / (4 * 15))
    assert "2 of 5 nested pairs" in str(report)


def test_files_and_figures(tmp_path):
    net = Sliced()
    front = frontier(net, make_data())
    front.plot(tmp_path / "front.png", named={"mine": net.space.smallest}, against={"other": front})
    front.heatmap("inputs", "width", tmp_path / "map", relative=True)
    for name in ("front.png", "front.svg", "map.png", "map.svg"):
        assert (tmp_path / name).stat().st_size > 1000
    assert "mine" in (tmp_path / "front.svg").read_text()
    front.to_csv(tmp_path / "front.csv")
    rows = list(csv.DictReader((tmp_path / "front.csv").open()))
    assert [float(r["accuracy"]) for r in rows] == [p.quality for p in front.points]
    rows, columns, table = front.table("inputs", "width")
    assert (rows, columns) == ([2, 4], [0.25, 0.5, 0.75, 1.0])
    assert table[0, 1] == front[Choice(width=0.5, inputs=2)].quality
    with pytest.raises(RequestError, match="'depth' was not measured"):
        front.heatmap("depth", "width")
    with pytest.raises(RequestError, match="was not measured"):
        front[Choice(width=0.3)]


def test_heatmap_holds_other_axes_at_their_largest():
    front = Frontier(
        tuple(
            point(1, w + 10 * d + 100 * h, w=w, d=d, h=h)
            for w in (1, 2)
            for d in (1, 2)
            for h in (1, 2)
        )
    )
    assert front.table("w", "d")[2].tolist() == [[211, 221], [212, 222]]
    assert front.table("w", "d", fixed=Choice(h=1))[2].tolist() == [[111, 121], [112, 122]]


@pytest.mark.parametrize("text", ["{", "[]", '{"points": [{}]}', '{"points": 3}'])
def test_a_corrupt_file_is_named(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=r"bad\.json"):
        Frontier.from_json(path)


def test_bad_requests():
    net, data = Sliced(), make_data(1)
    with pytest.raises(RequestError, match="no batch"):
        frontier(net, [])
    with pytest.raises(RequestError, match="counted no example"):
        frontier(net, data, lambda outputs, batch: (0.0, 0))
    with pytest.raises(RequestError, match="empty"):
        frontier(net, data, choices=[])
    with pytest.raises(RequestError, match="at least one"):
        frontier(net, data, choices=0)
    with pytest.raises(RequestError, match="outside the space"):
        frontier(net, data, choices=[Choice(width=0.33)])
    net.space = Space({str(i): (1, 2) for i in range(60)})
    with pytest.raises(RequestError, match="choices=200"):
        frontier(net, data)


def test_accuracy_counts_and_flags_broken_scores():
    batch = (None, torch.tensor([0, 1]))
    right, count = accuracy(torch.tensor([[2.0, 1.0], [3.0, 1.0]]), batch)
    assert (right.item(), count) == (1.0, 2)
    assert math.isnan(accuracy(torch.tensor([[2.0, math.nan], [3.0, 1.0]]), batch)[0])


def test_progress_lines_and_silence(capsys):
    frontier(Sliced(), make_data(1), progress=True)
    assert "sub-networks: 8/8" in capsys.readouterr().err
    frontier(Sliced(), make_data(1))
    assert capsys.readouterr().err == ""


def test_json_is_plain(tmp_path):
    frontier(Sliced(), make_data(1)).to_json(tmp_path / "f.json")
    content = json.loads((tmp_path / "f.json").read_text())
    assert content["points"][0]["choice"] == {"inputs": 2, "width": 0.25}
