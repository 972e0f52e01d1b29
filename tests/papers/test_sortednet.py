"""The SortedNet recipe at a tiny setting, its arithmetic, its networks and images."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest
import torch

from pantarhei.cost import Cost
from pantarhei.elastic import Choice, Frontier, elastic
from pantarhei.elastic.frontier import Point
from pantarhei.errors import RequestError
from pantarhei.papers import _sortednet_parts as parts
from pantarhei.papers import load_recipe, sortednet
from pantarhei.runs import execute, start

TINY = {
    "updates": (2,),
    "test_images": 40,
    "calibration_batches": 1,
    "batch_size": 16,
    "retune_steps": 2,
}


def tiny(folder, **changes):
    recipe = load_recipe("sortednet")
    return start(recipe, out=folder, device="cpu", quiet=True, changes={**TINY, **changes})


def test_a_tiny_run_measures_every_claim_and_leaves_its_evidence(tmp_path):
    with tiny(tmp_path / "run") as run:
        result = execute(run)
    made = {spec.id for spec in sortednet.CLAIMS if spec.bound_at("quick") is not None}
    assert {claim.id for claim in result.claims} == made and len(made) >= 4
    names = {path.name for path in result.dir.iterdir()}
    stems = ("frontier", "accuracy", "relative")
    assert {f"digits-{s}.{e}" for s in stems for e in ("png", "svg")} <= names
    grid = list(csv.DictReader((result.dir / "digits-grid.csv").open()))
    assert len(grid) == 12
    for row in grid:
        for training in ("sorted", "ordinary", "sandwich", "re-tuned", "summation"):
            assert 0 <= float(row[training]) <= 1
    trainings = list(csv.DictReader((result.dir / "digits-trainings.csv").open()))
    assert [row["training"] for row in trainings][-2:] == ["re-tuned", "summation"]
    for row in trainings:
        found = [float(point[row["training"]]) for point in grid]
        assert float(row["full"]) == found[-1] and float(row["lowest"]) == min(found)
        assert float(row["mean"]) == pytest.approx(sum(found) / 12)
    alone = list(csv.DictReader((result.dir / "digits-alone.csv").open()))
    assert [row["depth"] for row in alone] == ["1", "3"]
    assert float(alone[-1]["accuracy"]) == float(grid[-1]["ordinary"])
    by_study = next(csv.DictReader((result.dir / "claims-by-study.csv").open()))
    for claim in result.claims:
        assert claim.evidence == "claims-by-study.csv"
        assert claim.measured == pytest.approx(float(by_study[claim.id]))
    copies = next(c for c in result.claims if c.id == "switching-copies-nothing")
    assert copies.measured == 1.0


def test_other_numbers_of_draws_stand_beside(tmp_path):
    with tiny(tmp_path / "run", beside=("digits g_acc 1", "mnist g_acc 4")) as run:
        result = execute(run)
    grid = list(csv.DictReader((result.dir / "digits-grid.csv").open()))
    assert "g_acc 4" not in grid[0]
    assert all(0 <= float(row["g_acc 1"]) <= 1 for row in grid)
    with tiny(tmp_path / "other") as run:
        study = sortednet.Study.of(run, "digits", 0)
        two, one = study.train("sorted"), study.train("g_acc 1")
    assert not torch.equal(two.model.head.weight, one.model.head.weight)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"studies": ("imagenet",)}, "not a study"),
        ({"updates": (2, 3)}, "give one for each"),
        ({"beside": ("digits more",)}, "no training to stand beside"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, sentence):
    with tiny(tmp_path / "run", **changes) as run, pytest.raises(RequestError, match=sentence):
        list(sortednet.recipe(run))


def front(**qualities):
    macs = {"a": 4, "b": 10, "c": 50, "d": 100}
    return Frontier(
        tuple(
            Point(Choice(width=m / 100), qualities[k], Cost(m, m, 4 * m)) for k, m in macs.items()
        )
    )


def test_the_claims_arithmetic(tmp_path):
    fronts = {
        "sorted": front(a=0.60, b=0.79, c=0.76, d=0.80),
        "ordinary": front(a=0.10, b=0.30, c=0.80, d=0.81),
        "sandwich": front(a=0.60, b=0.77, c=0.76, d=0.80),
    }
    with tiny(tmp_path / "run") as run:
        study = sortednet.Study(run, "x", 1, 0.1, "32", None, {}, None, [])
        found = sortednet.compare(study, fronts)
    assert found["all-at-once"] == pytest.approx(0.95)  # a has less than 5 % of the MACs
    assert found["most-of-the-grid"] == pytest.approx(0.5)
    assert found["full-network-kept"] == pytest.approx(-1.0)
    assert found["ordinary-training-lacks-it"] == pytest.approx((50 + 49) / 2)
    assert found["search-free"] == pytest.approx(3.0)  # under 50 % and 75 %: b beats c
    assert found["against-the-sandwich-rule"] == pytest.approx(0.5)
    assert found["sorted"] == pytest.approx(0.8)


def test_sandwich_costs_what_sorted_training_costs(tmp_path, monkeypatch):
    from pantarhei.compute import sorted_training

    asked = {}
    monkeypatch.setattr(sorted_training, "sorted_fit", lambda net, *a, **k: asked.update(k))
    with tiny(tmp_path / "run", updates=(1000,)) as run:
        study = sortednet.Study.of(run, "digits", 0)
        net = study.train("sandwich")
    mean = sum(net.cost(c).macs for c in net.space) / len(net.space)
    ours = 1000 * run.settings.g_acc * mean
    drawn = [c for n in range(2000) for c in asked["sampler"](n)]
    theirs = asked["steps"] * asked["g_acc"] * sum(net.cost(c).macs for c in drawn) / 2000
    assert theirs == pytest.approx(ours, rel=0.02)


def test_summation_costs_what_sorted_training_costs(tmp_path, monkeypatch):
    from pantarhei.compute import sorted_training

    asked = {}
    monkeypatch.setattr(sorted_training, "sorted_fit", lambda net, *a, **k: asked.update(k))
    with tiny(tmp_path / "run", updates=(1200,)) as run:
        net = sortednet.Study.of(run, "digits", 0).train("summation")
    assert asked["sampler"](7) == list(net.space)
    assert asked["steps"] * asked["g_acc"] * len(net.space) == 1200 * run.settings.g_acc


def test_retuning_trains_the_classifier_of_slices_and_nothing_else(tmp_path):
    with tiny(tmp_path / "run", retune_steps=100, calibration_batches=20) as run:
        study = sortednet.Study.of(run, "digits", 0)
        net = study.elastic()  # at its start: below the classifier lie random features
        before = {name: tensor.clone() for name, tensor in net.model.state_dict().items()}
        untrained = study.measure("untouched", net)
        front = study.retune(net)
    after = net.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert [p.choice for p in front.points] == list(net.space)
    gains = [p.quality - untrained[p.choice].quality for p in front.points]
    assert sum(gains) / len(gains) > 0.05


def test_every_training_starts_from_the_same_weights(tmp_path):
    with tiny(tmp_path / "run") as run:
        study = sortednet.Study.of(run, "digits", 0)
        one, two = study.network(), study.network()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_the_recipe_is_read_without_torch():
    code = "import sys, pantarhei.papers.sortednet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NETWORKS = {
    "mlp": (lambda: parts.ResidualMLP(784, 32, 3), (2, 1, 28, 28), (1, 2, 3)),
    "resnet": (lambda: parts.ResNet(3, (8, 16), (2, 3), 2), (2, 3, 32, 32), (0.5, 1.0)),
    "mobilenet": (parts.MobileNetV2, (2, 3, 32, 32), {"stages.3": (1, 2, 3, 4)}),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_choice_is_the_extracted_network(kind):
    build, shape, depth = NETWORKS[kind]
    torch.manual_seed(0)
    x = torch.randn(shape)
    net = elastic(build(), x, width=(0.5, 1.0), depth=depth).eval()
    with torch.no_grad():
        assert torch.equal(net(x), net.model(x))
        for choice in net.space:
            assert torch.equal(net(x, choice), net.extract(choice)(x))
    costs = [net.cost(choice).macs for choice in net.space]
    assert len(set(costs)) == len(costs)


def test_the_grids_have_the_sizes_of_the_sheet(tmp_path):
    with tiny(tmp_path / "run") as run:
        assert len(sortednet.Study.of(run, "digits", 0).elastic().space) == 12
    axes = {"width": sortednet._ratios(1 / 16, 1.0, 16), "depth": tuple(range(1, 11))}
    net = elastic(parts.ResidualMLP(784, 192, 10), torch.zeros(1, 784), **axes)
    assert len(net.space) == 160 and net.model.stem.weight.shape[0] == 192
    smallest = net.plan(net.space.smallest).keep
    assert set(smallest.values()) == {12}


def test_images_are_standardised():
    images = torch.randint(256, (50, 6, 5, 3), dtype=torch.uint8)
    out = parts.Standardise(images)(images)
    assert out.shape == (50, 3, 6, 5) and out.dtype == torch.float32
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    assert parts.Standardise(images[..., 0])(images[..., 0]).shape == (50, 1, 6, 5)


def test_crop_and_flip_moves_pixels_and_makes_none_up():
    images = torch.arange(200 * 8 * 8).reshape(200, 8, 8, 1)
    out = parts.crop_and_flip(torch.Generator().manual_seed(0), images, margin=2)
    again = parts.crop_and_flip(torch.Generator().manual_seed(0), images, margin=2)
    assert torch.equal(out, again) and out.shape == images.shape
    mirrored, shifts = 0, set()
    for before, after in zip(images, out, strict=True):
        assert set(after.flatten().tolist()) <= set(before.flatten().tolist())
        step = int(after[4, 4] - after[4, 3])
        mirrored += step < 0
        # the middle of the crop is never reflected: where it came from tells the shift
        row, column = divmod(int(after[4, 4] - before[0, 0]), 8)
        shifts.add((row - 4, column - (4 if step > 0 else 3)))
    assert 60 < mirrored < 140
    assert shifts == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}
