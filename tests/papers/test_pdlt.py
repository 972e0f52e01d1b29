"""The pdlt recipe at a tiny setting, its arithmetic and its batched networks."""

from __future__ import annotations

import csv
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.papers import _pdlt_parts as parts
from pantarhei.papers import load_recipe, pdlt
from pantarhei.probes.mean_field import Activation, critical_point
from pantarhei.probes.tangent_kernel import ntk
from pantarhei.runs import execute, start

TINY = {
    "networks": 8,
    "differentials": 4,
    "chains": 50,
    "deep_chains": 20,
    "widths": (50, 100),
    "depth": 9,
    "ratios": (0.04, 0.08),
    "train_depth": 4,
    "train_width": 12,
    "steps": 2,
    "rates": (1e-2, 1e-1),
    "kernel_widths": (8, 16),
    "kernel_depths": (2, 3),
    "kernel_networks": 2,
    "kernel_inputs": 6,
}


def test_a_tiny_run_measures_every_claim_and_leaves_its_evidence(tmp_path):
    recipe = load_recipe("pdlt")
    changes = {**TINY, "depth": 55, "widths": (25, 50)}
    run = start(
        recipe, scale="cpu", out=tmp_path / "run", device="cpu", quiet=True, changes=changes
    )
    with run:
        result = execute(run)
    assert {claim.id for claim in result.claims} == {spec.id for spec in pdlt.CLAIMS}
    assert all(np.isfinite(claim.measured) for claim in result.claims)
    names = {path.name for path in result.dir.iterdir()}
    for stem in ("vertices-relu", "vertices-tanh", "collapse", "criticality", "kernel-change"):
        assert {f"{stem}.png", f"{stem}.svg", f"{stem}.csv"} <= names
    for claim in result.claims:
        assert claim.evidence in names
    rows = list(csv.DictReader((result.dir / "criticality.csv").open()))
    assert len(rows) == 3 * 5 * 2  # activations, starts, rates
    assert {row["scale"] for row in rows} == {"0.6", "1.0", "1.6", "nan"}


def test_bounds_are_those_of_the_sheet():
    bounds = {spec.id: (spec.direction, spec.bound_at("cpu")) for spec in pdlt.CLAIMS}
    assert bounds == {
        "relu-vertices": ("<=", 1.0),
        "tanh-vertices": ("<=", 1.0),
        "relu-slope": ("<=", 0.08),
        "linear-slope": ("<=", 0.08),
        "tanh-slope": ("<=", 0.10),
        "collapse": ("<=", 0.10),
        "critical-trains": (">=", 0.90),
        "small-weights-do-not-train": ("<=", 0.30),
        "large-weights-do-not-train": ("<=", 0.30),
        "large-weights-cost-tanh": (">=", 10.0),
        "gradients-even-at-criticality": ("<=", 10.0),
        "gradients-uneven-off-it": (">=", 10.0),
        "feature-learning": ("<=", 0.3),
    }


def chain(width, layers, nu, K=2.0):
    return [
        {
            "width": width,
            "layer": layer + 1,
            "ratio": layer / width,
            "K": K,
            "V": width * K**2 * ((1 + nu / width) ** layer - 1),
            "measured": (1 + nu / width) ** layer - 1,
        }
        for layer in range(layers)
    ]


def test_the_slope_is_extrapolated_to_infinite_width():
    rows = [row for width in (50, 100, 200) for row in chain(width, 5, 5.0)]
    assert pdlt.extrapolated_slope(rows, 1) == pytest.approx(5, rel=0.01)
    # one width alone is off by more than the claim's bound
    assert pdlt.extrapolated_slope(chain(50, 5, 5.0), 1) > 5 * 1.08


def test_the_spread_compares_equal_ratios():
    rows = chain(50, 5, 5.0) + chain(100, 9, 5.0)
    expected = ((1 + 5 / 100) ** 8 - 1) / ((1 + 5 / 50) ** 4 - 1) - 1
    assert pdlt.spread(rows, 0.08) == pytest.approx(expected)
    with pytest.raises(RequestError, match="choose another"):
        pdlt.spread(rows, 0.013)


def networks(name, widths, scales=(1.0, 1.0), seed=0):
    act = Activation(name)
    generator = torch.Generator().manual_seed(seed)
    nets = parts.Networks.critical(
        act, critical_point(name), widths, torch.tensor(scales), generator
    )
    return nets.to(torch.device("cpu"), torch.float64)


def module(nets, index, activation):
    layers = []
    for W, b in zip(nets.weights, nets.biases, strict=True):
        linear = nn.Linear(W.shape[2], W.shape[1]).double()
        with torch.no_grad():
            linear.weight.copy_(W[index])
            linear.bias.copy_(b[index, 0])
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def test_a_batch_of_networks_trains_as_each_by_itself():
    torch.manual_seed(0)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
    nets = networks("gelu", (5, 6, 6, 3))
    alone = [module(nets, i, nn.GELU) for i in range(2)]
    rates = torch.tensor([0.1, 0.7], dtype=torch.float64)
    for _ in range(3):
        losses = parts.cross_entropy(nets.preactivations(x)[-1], y)
        nets.step(losses.sum(), [rates] * 3, [rates] * 3)
        for model, rate in zip(alone, rates.tolist(), strict=True):
            optimizer = torch.optim.SGD(model.parameters(), lr=rate)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    for index, model in enumerate(alone):
        torch.testing.assert_close(nets.preactivations(x)[-1][index], model(x))
        right = (model(x).argmax(1) == y).double().mean()
        torch.testing.assert_close(parts.accuracy(nets, x, y)[index], right)


def test_a_diverged_network_has_no_accuracy_and_harms_no_other():
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    nets = networks("relu", (4, 8, 3))
    with torch.no_grad():
        nets.weights[0][0] = torch.nan
    before = nets.weights[0][1].clone()
    losses = parts.cross_entropy(nets.preactivations(x)[-1], y)
    rate = torch.full((2,), 0.1, dtype=torch.float64)
    nets.step(losses.sum(), [rate] * 2, [rate] * 2)
    assert parts.accuracy(nets, x, y)[0] == 0
    assert bool(nets.weights[0][1].isfinite().all()) and not torch.equal(nets.weights[0][1], before)


def test_the_tangent_kernel_is_that_of_autograd():
    x = torch.randn(4, 5, dtype=torch.float64)
    nets = networks("tanh", (5, 6, 7, 1))
    b, W = [0.5, 0.25, 2.0], [1.0, 3.0, 0.75]
    found = nets.tangent_kernel(x, b, W)
    for index in range(2):
        model, rates = module(nets, index, nn.Tanh), {}
        for layer, (bias, weight) in enumerate(zip(b, W, strict=True)):
            linear = model[2 * layer]
            rates[f"{2 * layer}.bias"] = torch.full_like(linear.bias, bias)
            rates[f"{2 * layer}.weight"] = torch.full_like(
                linear.weight, weight / linear.in_features
            )
        theirs = ntk(model, x, kind="trace", rates=rates).detach()
        torch.testing.assert_close(found[index], theirs, rtol=1e-6, atol=0)


def test_linear_networks_of_two_layers_change_their_kernel_as_they_must():
    """One layer has a kernel that never moves; two have one that moves less the wider they are."""
    x = nn.functional.normalize(torch.randn(6, 5), dim=1) * 5**0.5
    y = torch.tensor([1.0, -1.0] * 3)
    act, moved = Activation("linear"), {}
    for depth, width in ((1, 10), (2, 64), (2, 1024)):
        change, reached = parts.kernel_change(
            act, critical_point("linear"), width, depth, x, y, networks=8, target=0.3, steps=3000,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert bool(reached.all())
        moved[depth, width] = float(change.mean())
    assert moved[1, 10] < 1e-6
    assert 6 < moved[2, 64] / moved[2, 1024] < 40


def test_gradient_ratios_follow_chi():
    """Error signals of ReLU shrink by chi a layer; gradients by weights do not show it."""
    x = nn.functional.normalize(torch.randn(64, 8, dtype=torch.float64), dim=1) * 8**0.5
    y = torch.randint(5, (64,))
    nets = networks("relu", (8, *[60] * 11, 5), scales=(1.0, 0.6))
    norms, by_weights = nets.errors(x, y), nets.weight_gradients(x, y)
    ratio = norms[0] / norms[-1]
    assert 0.2 < float(ratio[0]) < 5
    assert float(ratio[1] / ratio[0]) == pytest.approx(0.6 ** (11 / 2), rel=0.8)
    assert 0.1 < float((by_weights[0] / by_weights[-1])[1]) < 10


def test_usual_starts_are_those_of_torch():
    act = Activation("tanh")
    nets = parts.Networks.initialised(act, lambda layer: None, (300, 400, 10), 3, seed=1)
    assert [tuple(w.shape) for w in nets.weights] == [(3, 400, 300), (3, 10, 400)]
    # nn.Linear: uniform with variance 1 / (3 fan_in), weights and biases
    for weight, bias, fan_in in zip(nets.weights, nets.biases, (300, 400), strict=True):
        assert float(weight.var()) == pytest.approx(1 / 3 / fan_in, rel=0.05)
        assert float(bias.abs().max()) <= fan_in**-0.5
    for name, C_W in (("relu", 2), ("tanh", 25 / 9), ("gelu", 2)):
        nets = parts.Networks.initialised(
            act, partial(parts.kaiming_, nonlinearity=name), (300, 400), 3, seed=1
        )
        assert float(300 * nets.weights[0].var()) == pytest.approx(C_W, rel=0.02)
        assert not nets.biases[0].any()


def test_training_starts_from_critical_and_usual_weights(tmp_path):
    changes = {"steps": 2, "train_depth": 3, "train_width": 8, "rates": (0.01, 0.1)}
    recipe = load_recipe("pdlt")
    with start(recipe, out=tmp_path / "r", device="cpu", quiet=True, changes=changes) as run:
        x, y = pdlt.digits(run)
        generator = torch.Generator().manual_seed(0)
        rows = pdlt.train_around_criticality(run, "gelu", x, y, generator)
        pdlt.draw_criticality(
            run, [dict(r, activation=n) for n in ("relu", "tanh", "gelu") for r in rows]
        )
    assert [row["rate"] for row in rows] == [0.01, 0.1] * 5
    starts = ["0.6 x critical C_W", "1 x critical C_W", "1.6 x critical C_W"]
    assert [row["start"] for row in rows[::2]] == [*starts, "PyTorch's default", "Kaiming"]
    assert [row["scale"] for row in rows[:6:2]] == [0.6, 1.0, 1.6]
    assert all(0 <= row["accuracy"] <= 1 and row["uneven"] >= 1 for row in rows)


def test_an_error_signal_that_vanishes_is_uneven_without_bound(tmp_path):
    changes = {"steps": 1, "train_depth": 300, "train_width": 4, "rates": (0.01,)}
    recipe = load_recipe("pdlt")
    with start(recipe, out=tmp_path / "r", device="cpu", quiet=True, changes=changes) as run:
        x, y = pdlt.digits(run)
        generator = torch.Generator().manual_seed(0)
        rows = pdlt.train_around_criticality(run, "gelu", x, y, generator)
    assert {row["start"]: row["uneven"] for row in rows}["PyTorch's default"] == np.inf


def test_digits_are_standardised_as_the_theory_asks(tmp_path):
    with start(load_recipe("pdlt"), out=tmp_path / "r", device="cpu", quiet=True) as run:
        x, y = pdlt.digits(run)
    torch.testing.assert_close(x.square().mean(1), torch.ones(len(x)))
    assert len(x) == len(y) == 1437


def test_the_recipe_is_read_without_torch():
    code = "import sys, pantarhei.papers.pdlt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
