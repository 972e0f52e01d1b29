"""The sweeps over depth and gain."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pantarhei.errors import RequestError
from pantarhei.learning import deep_linear as dl
from pantarhei.learning.deep_linear import figures, sweeps
from pantarhei.probes.signal import input_jacobian


def task(size=6, seed=0):
    return sweeps.graded(size, 0.5, 2.0, torch.Generator().manual_seed(seed))


def test_depth_sweep_finds_the_first_rate_to_arrive():
    data, rates = task(), [0.01, 0.05, 0.1, 0.2, 3.0]
    rows = sweeps.depth_sweep(data, [2, 3], ["orthogonal"], rates, seeds=2, max_steps=300, seed=4)
    assert [(row["n"], row["seed"]) for row in rows] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    generator = torch.Generator().manual_seed(4)
    for row in rows[2:]:
        start = sweeps.start_weights("orthogonal", (6, 6, 6, 6), data, generator)
        each = [float(dl.steps_to(start, data, r, max_steps=300)) for r in rates]
        assert row["steps"] == min(each) and row["rate"] == rates[int(np.argmin(each))]


def test_rates_that_never_arrive_are_said_to():
    rows = sweeps.depth_sweep(task(), [3], ["gaussian"], [1e-6], seeds=1, max_steps=5)
    assert math.isinf(rows[0]["steps"]) and math.isnan(rows[0]["rate"])
    figures.depth_curves(rows, 5, 0.02)


@pytest.mark.parametrize("start", sweeps.STARTS)
def test_starts_have_the_spectra_they_are_named_for(start):
    data = task()
    weights = sweeps.start_weights(
        start, (6, 8, 8, 6), data, torch.Generator().manual_seed(0), u0=0.3
    )
    assert [tuple(w.shape) for w in weights] == [(8, 6), (8, 8), (6, 8)]
    values = torch.linalg.svdvals(dl.product(weights)).numpy()
    expected = {"decoupled": 0.3}.get(start, 1.0)
    flat = np.abs(values[:4] / expected - 1).max() < 1e-6
    if start in ("decoupled",):
        assert flat
        assert dl.predict(data, weights).kind == "exact"
    if start in ("orthogonal", "pretrained"):
        inner = torch.linalg.svdvals(weights[1] @ weights[0])
        assert (inner - 1).abs().max() < 1e-6
    if start == "gaussian":
        assert values[0] / values[-1] > 3
    with pytest.raises(RequestError, match="not a start"):
        sweeps.start_weights("orthogonall", (6, 6), data, None)


def test_depth_costs_gaussian_more_than_orthogonal():
    """The claim in small: sixteen modes, twelve layers."""
    rows = sweeps.depth_sweep(
        task(16), [12], ["orthogonal", "gaussian"], [0.005, 0.01, 0.02, 0.04], max_steps=200
    )
    steps = {
        start: np.median([r["steps"] for r in rows if r["start"] == start])
        for start in ("orthogonal", "gaussian")
    }
    assert steps["orthogonal"] < 200 and steps["gaussian"] > 1.5 * steps["orthogonal"]


def test_the_jacobian_is_the_product_of_the_layers():
    net = sweeps.Stack("tanh", 6, 4, gain=1.1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 6, dtype=torch.float64)
    h, j = x, torch.eye(6, dtype=torch.float64)
    spectra = []
    for linear in list(net)[1::2]:
        layer = linear.weight * (1 - torch.tanh(h[0]) ** 2)  # g W D
        spectra.append(torch.linalg.svdvals(layer.detach()))
        j, h = layer @ j, torch.tanh(h) @ linear.weight.T
    torch.testing.assert_close(input_jacobian(net, x)[0], j.detach())
    torch.testing.assert_close(sweeps.layer_spectra(net, x), torch.stack(spectra))


def test_gain_sweep_of_a_linear_network_is_known():
    rows = sweeps.gain_sweep("linear", [0.9, 1.0], ["orthogonal"], width=8, depth=30)
    for row in rows:
        assert row["largest"] == pytest.approx(row["gain"] ** 30)
        assert row["smallest"] == pytest.approx(row["gain"] ** 30)
        assert row["share"] == (1.0 if row["gain"] == 1 else 0.0)
    assert figures.gain_shares(rows).axes and figures.gain_spectra(rows).axes


def test_bad_requests():
    with pytest.raises(RequestError, match="no weights"):
        sweeps.Stack("tanh", 0, 3)
    with pytest.raises(RequestError):
        sweeps.gain_sweep("tanhh", [1.0])
