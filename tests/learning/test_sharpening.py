"""The solvable two-layer linear network: its closed forms against gradient descent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pantarhei.errors import RequestError
from pantarhei.learning.sharpening import descend, final_sharpness, sharpness_curve
from pantarhei.probes import Hessian


def test_the_prediction_at_sixteen_dimensions():
    assert float(final_sharpness(16)) == pytest.approx(2 * 17**0.5 / 16)
    assert float(final_sharpness(16)) == pytest.approx(0.5154, abs=5e-5)


@pytest.mark.parametrize(("dimension", "norm"), [(16, 1.0), (4, 2.0)])
def test_gradient_descent_at_width_4096_ends_at_the_prediction(dimension, norm):
    run = descend(4096, dimension, target_norm=norm, record=4000)
    assert run.loss[-1] < 1e-12
    assert run.sharpness[-1] == pytest.approx(float(final_sharpness(dimension, norm)), rel=0.01)


def test_the_whole_curve_is_predicted():
    run = descend(4096, 16, lr=0.01, steps=4000, record=200)
    np.testing.assert_allclose(run.sharpness, sharpness_curve(run.times, 16), rtol=0.07)
    late = run.times > 10
    np.testing.assert_allclose(run.sharpness[late], sharpness_curve(run.times, 16)[late], rtol=0.02)


def test_the_curve_solves_its_equation():
    times = np.linspace(0, 30, 30_001)
    for features in (1.0, 0.3, 2.0):
        lam = sharpness_curve(times, 8, 1.5, features)
        theta = np.arccosh(lam * 8 / 2) / 2
        c = (features * 8) ** -0.5
        left = np.gradient(theta, times)
        right = (features / 8) ** 0.5 * (1.5 - c * np.sinh(2 * theta))
        np.testing.assert_allclose(left[5:-5], right[5:-5], rtol=1e-3, atol=1e-6)
        assert lam[0] == pytest.approx(2 / 8)
        assert lam[-1] == pytest.approx(float(final_sharpness(8, 1.5, features)), rel=1e-5)


def test_ntp_stays_where_it_starts_and_mup_does_not():
    for width in (256, 1024):
        ntp = descend(width, 16, features=1 / width, record=4000)
        mup = descend(width, 16, record=4000)
        assert ntp.loss[-1] < 1e-6 and mup.loss[-1] < 1e-12
        assert abs(ntp.sharpness[-1] / ntp.sharpness[0] - 1) < 0.02
        assert mup.sharpness[-1] / mup.sharpness[0] > 3
    starts = [np.mean([descend(n, 16, steps=0, seed=s).sharpness[0] for s in range(5)]) for n in
              (64, 1024, 16384)]  # fmt: skip
    assert starts[0] > starts[1] > starts[2] > 2 / 16


def test_balance_is_conserved_by_small_steps():
    coarse = descend(64, 8, lr=0.05, steps=200, record=200).imbalance[-1]
    fine = descend(64, 8, lr=0.005, steps=2000, record=2000).imbalance[-1]
    assert fine < 0.15 * coarse and fine < 1e-2


def test_the_sharpness_is_the_scaled_hessians_at_the_minimum():
    n, d = 24, 4

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(n, dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.randn(n, d, dtype=torch.float64))

        def forward(self, x):
            return x @ (self.b.T @ self.a) / (n**0.5 * (n * d) ** 0.5)

    torch.manual_seed(0)
    net = Net()
    x = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] * d**0.5  # whitened
    y = net(x).detach()  # at the minimum H = G
    hessian = Hessian(net, lambda m, b: 0.5 * (m(b[0]) - b[1]).square().mean(), (x, y))
    top = torch.linalg.eigvalsh(n * hessian.dense())[-1]
    a, b = net.a.detach(), net.b.detach()
    expected = (a @ a + torch.linalg.eigvalsh(b.T @ b)[-1]) / (n * d)
    assert float(top) == pytest.approx(float(expected), rel=1e-10)


def test_bad_numbers_are_refused():
    with pytest.raises(RequestError, match="dimension=0"):
        final_sharpness(0)
    with pytest.raises(RequestError, match="width=-1"):
        descend(-1, 4)
