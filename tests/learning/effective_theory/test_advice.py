"""Entropy and information against numerical integrals, the advice, the meter, the sweep."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import gammaln
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.advice import (
    advise,
    entropy,
    mutual_information,
    non_gaussianity,
    optimal_ratio,
    sweep,
)
from pantarhei.learning.effective_theory.training import critical_init_


def lognormal(v, nodes=60):
    """Gains of mean 1 and variance v, and their weights: Gauss-Hermite in the logarithm."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    s = math.sqrt(math.log1p(v))
    return torch.exp(s * x - s * s / 2), w / w.sum()


def entropy_of_mixture(gains, weights, m):
    """Entropy of z = sqrt(g) times m standard normals, by the density of |z|."""

    def density(r):
        logs = -r * r / (2 * gains) - m / 2 * torch.log(2 * math.pi * gains)
        return float((weights * logs.exp()).sum())

    area = 2 * math.exp(m / 2 * math.log(math.pi) - gammaln(m / 2))

    def integrand(r):
        p = density(r)
        return -area * r ** (m - 1) * p * math.log(p) if p > 0 else 0.0

    ends = [0, *(float(gains.mean().sqrt()) * k for k in (1, 2, 4, 8, 16))]
    return sum(
        quad(integrand, a, b, epsabs=1e-13, epsrel=1e-11, limit=200)[0]
        for a, b in itertools.pairwise(ends)
    )


def student_entropy(m, dof):
    """Entropy of a multivariate Student t with unit variance, by its density."""
    scale = (dof - 2) / dof
    constant = gammaln((dof + m) / 2) - gammaln(dof / 2) - m / 2 * math.log(dof * math.pi * scale)
    area = 2 * math.exp(m / 2 * math.log(math.pi) - gammaln(m / 2))

    def integrand(r):
        log = constant - (dof + m) / 2 * math.log1p(r * r / (dof * scale))
        return -area * r ** (m - 1) * math.exp(log) * log

    return sum(
        quad(integrand, a, b, epsabs=1e-13, epsrel=1e-11, limit=300)[0]
        for a, b in ((0, 2), (2, 6), (6, 20), (20, 400))
    )


@pytest.mark.parametrize("m", [1, 2, 4])
def test_entropy_to_second_order_for_lognormal_and_student_mixtures(m):
    """The book's coefficient (m^2 + 2 m)/16, and no other, is the limit of the loss over v^2."""
    gaussian = float(entropy(1.0, 0.0, m))
    for v in (0.02, 0.01):
        for exact in (
            entropy_of_mixture(*lognormal(v), m),
            student_entropy(m, 4 + 2 / v),  # gains inverse gamma, of variance v
        ):
            loss = gaussian - exact
            expected = gaussian - float(entropy(1.0, v, m))
            assert loss == pytest.approx(expected, rel=15 * v)
    assert gaussian == pytest.approx(m / 2 * math.log(2 * math.pi * math.e))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 3), (2, 2), (5, 5)])
def test_mutual_information_has_the_book_s_third_order(first, second):
    """Lognormal gains are the large-n law of scale-invariant stacks: c = (20 + 3 n_L) / 6."""
    found = []
    for v in (0.01, 0.005):
        gains = lognormal(v)
        parts = [entropy_of_mixture(*gains, m) for m in (first, second, first + second)]
        exact = parts[0] + parts[1] - parts[2]
        assert exact == pytest.approx(float(mutual_information(v, first, second)), rel=30 * v)
        found.append((1 - exact / (first * second / 8 * v**2)) / v)
    c = (20 + 3 * (first + second)) / 6
    assert 2 * found[1] - found[0] == pytest.approx(c, rel=0.03)  # extrapolated to v = 0


def test_the_optimum_of_the_information_is_the_ratio_s():
    for first, second in ((1, 1), (3, 7)):
        v = torch.linspace(0, 0.3, 300_001, dtype=torch.float64)
        best = float(v[mutual_information(v, first, second).argmax()])
        assert best == pytest.approx(5 * optimal_ratio(5, first + second), abs=2e-6)


def test_ratios_of_the_sheet():
    for name, outputs, ratio in (
        ("relu", 1, 0.0348), ("tanh", 1, 0.261), ("relu", 10, 0.016), ("tanh", 10, 0.12),
    ):  # fmt: skip
        assert advise(name, outputs).ratio == pytest.approx(ratio, rel=0.005)
    ratios = [advise("relu", 10, gamma=g).ratio for g in (0.0, 0.5, 0.9, 0.999)]
    book = [advise("relu", 10, gamma=g, cubic=False).ratio for g in (0.5, 0.9, 0.999)]
    # the residual branch allows any depth in the end; the cubic vertex asks for more of it
    assert book == sorted(book) and book[-1] > 5 * ratios[0]
    assert all(ours < theirs for ours, theirs in zip(ratios[1:], book, strict=True))


def test_advice_in_words_and_numbers():
    told = advise("gelu", 10, depth=6)
    assert told.width == round(6 / told.ratio)
    assert told.non_gaussianity == pytest.approx(told.critical.nu * 6 / told.width)
    assert "Var W = 1.98306 / fan-in" in told.sentences[0] and "3.562" in told.sentences[0]
    deep = advise("relu", 10, depth=50, width=100)
    assert any("Too deep" in s for s in deep.sentences)
    assert any("leading order" in s for s in deep.sentences)
    assert deep.resummed == pytest.approx(math.expm1(2.5))
    wide = advise("relu", 10, depth=2, width=4000)
    assert any("Wide for its depth" in s for s in wide.sentences)
    none = advise("relu")
    assert none.depth is None and none.width is None and none.non_gaussianity is None


def stack(width, depth):
    layers = [nn.Linear(6, width)]
    for _ in range(depth - 1):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers)


def test_the_meter_reads_the_theory_off_real_modules():
    torch.manual_seed(0)
    width = 20
    model, x = stack(width, 4), torch.randn(3, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    found = non_gaussianity(model, x, networks=500, init=critical_init_, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [row.name for row in found] == ["0", "2", "4", "6"]
    for layer, row in enumerate(found):
        exact = (1 + 5 / width) ** layer - 1
        assert row.neurons == width
        assert abs(row.v - exact) < 5 * row.error + 1e-3
        assert row.error < 0.3 * exact + 0.05


def test_the_meter_takes_convolutions_and_pytorch_s_own_initialisation():
    model = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 5))
    found = non_gaussianity(model, torch.randn(2, 1, 6, 6), networks=60)
    assert [(row.name, row.neurons) for row in found] == [("0", 12), ("3", 5)]
    assert all(math.isfinite(row.v) and row.error > 0 for row in found)


def test_the_meter_of_one_network():
    torch.manual_seed(0)
    model = stack(2000, 3)
    quiet = non_gaussianity(model, torch.randn(20, 6), trained=True)
    assert abs(quiet[-1].v) < 0.1
    with torch.no_grad():
        model[-1].weight[:40] *= 10  # forty neurons of two thousand take over
    loud = non_gaussianity(model, torch.randn(20, 6), trained=True)
    assert loud[-1].v > 1 and abs(loud[0].v - quiet[0].v) < 0.2


def test_the_sweep_measures_the_exact_law():
    rows = sweep("linear", (16, 32), 5, networks=60_000)
    assert len(rows) == 10 and rows[-1]["ratio"] == 4 / 32
    for row in rows:
        assert row["resummed"] == pytest.approx((1 + 2 / row["width"]) ** (row["layer"] - 1) - 1)
        assert abs(row["measured"] - row["resummed"]) < 5 * row["error"]
    assert rows[4]["theory"] == pytest.approx(2 * 4 / 16)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: advise("sigmoid"), "no critical point"),
        (lambda: advise("relu", 0), "outputs=0"),
        (lambda: advise("relu", depth=0), "depth=0"),
        (lambda: optimal_ratio(-1.0, 1), "positive"),
        (lambda: non_gaussianity(nn.Linear(2, 2), torch.ones(1, 2), networks=1), "at least 2"),
        (lambda: non_gaussianity(nn.ReLU(), torch.ones(1, 2)), "no nn.Linear"),
    ],
)
def test_bad_requests_are_refused(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
