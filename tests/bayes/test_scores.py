"""Scores against integrals, gradients, and data drawn from the forecast itself."""

from __future__ import annotations

import math

import pytest
import torch

from pantarhei.bayes import scores
from pantarhei.errors import RequestError

Y = torch.linspace(-3, 3, 7, dtype=torch.float64)
MEANS = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
VARIANCES = torch.tensor([[0.3], [1.0], [2.5]], dtype=torch.float64)


def integrated_crps(y, cdf):
    grid = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    inside = (cdf(grid) - (grid >= y).double()) ** 2
    return torch.trapezoid(inside, grid)


def test_the_nll_is_that_of_torch_and_its_gradient_is_right():
    mean, variance = torch.tensor(0.4, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(Y)
    assert torch.allclose(scores.gaussian_nll(Y, mean, variance), expected)
    inputs = [t.expand(7).clone().requires_grad_() for t in (mean, variance)]
    assert torch.autograd.gradcheck(lambda m, v: scores.gaussian_nll(Y, m, v), inputs)
    many = [t.expand(3, 7).clone().requires_grad_() for t in (MEANS, VARIANCES)]
    assert torch.autograd.gradcheck(lambda m, v: scores.mixture_nll(Y, m, v), many)
    assert torch.autograd.gradcheck(lambda m, v: scores.mixture_crps(Y, m, v), many)


def test_a_perfect_forecast_has_the_entropy_as_its_nll():
    sd = 0.7
    y = sd * torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = scores.gaussian_nll(y, torch.zeros(1), torch.full((1,), sd**2)).mean().item()
    assert found == pytest.approx(0.5 * math.log(2 * math.pi * math.e * sd**2), abs=5e-3)


def test_the_mixture_is_torchs():
    weights = torch.distributions.Categorical(torch.ones(3))
    parts = torch.distributions.Normal(MEANS[:, 0], VARIANCES[:, 0].sqrt())
    mixture = torch.distributions.MixtureSameFamily(weights, parts)
    assert torch.allclose(scores.mixture_nll(Y, MEANS, VARIANCES), -mixture.log_prob(Y))
    assert torch.allclose(scores.mixture_pit(Y, MEANS, VARIANCES), mixture.cdf(Y))
    one = scores.mixture_nll(Y, MEANS[:1], VARIANCES[:1])
    assert torch.allclose(one, scores.gaussian_nll(Y, MEANS[0], VARIANCES[0]))


@pytest.mark.parametrize("y", [-2.0, 0.1, 3.0])
def test_the_crps_is_the_integral_that_defines_it(y):
    y = torch.tensor(y, dtype=torch.float64)
    normal = torch.distributions.Normal(MEANS[2, 0], VARIANCES[2, 0].sqrt())
    found = scores.gaussian_crps(y, MEANS[2, 0], VARIANCES[2, 0])
    assert found.item() == pytest.approx(integrated_crps(y, normal.cdf).item(), abs=1e-3)
    found = scores.mixture_crps(y, MEANS[:, 0], VARIANCES[:, 0])
    cdf = lambda grid: scores.mixture_pit(grid, MEANS, VARIANCES)  # noqa: E731
    assert found.item() == pytest.approx(integrated_crps(y, cdf).item(), abs=1e-3)


def test_the_crps_of_samples_is_the_double_sum_and_approaches_the_gaussians():
    samples = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.tensor([0.0, 1.0, -1.0, 5.0], dtype=torch.float64)
    apart = (samples[:, None] - samples[None]).abs()
    near = (samples - y).abs().mean(0)
    assert torch.allclose(scores.sample_crps(y, samples), near - 0.5 * apart.mean((0, 1)))
    fair = near - 0.5 * apart.sum((0, 1)) / (9 * 8)
    assert torch.allclose(scores.sample_crps(y, samples, fair=True), fair)
    many = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact = scores.gaussian_crps(y, torch.zeros(1), torch.ones(1).double())
    assert torch.allclose(scores.sample_crps(y, many.expand(-1, 4)), exact, atol=0.03)
    with pytest.raises(RequestError, match="two or more"):
        scores.sample_crps(y, samples[:1])


def test_the_pit_is_uniform_on_data_from_the_forecast_itself():
    generator = torch.Generator().manual_seed(3)
    member = torch.randint(3, (60_000,), generator=generator)
    noise = torch.randn(60_000, generator=generator, dtype=torch.float64)
    y = MEANS[member, 0] + VARIANCES[member, 0].sqrt() * noise
    pit = scores.mixture_pit(y, MEANS, VARIANCES)
    assert scores.calibration_error(pit).item() < 0.005
    assert scores.coverage(pit, 0.95).item() == pytest.approx(0.95, abs=0.005)
    wanted, found = scores.calibration_curve(pit, 9)
    assert torch.allclose(wanted, found, atol=0.01)
    # a forecast that is too narrow is found out
    narrow = scores.mixture_pit(y, MEANS, VARIANCES / 9)
    assert scores.coverage(narrow, 0.95).item() < 0.8
    assert scores.calibration_error(narrow).item() > 0.02


def test_quantiles_invert_the_pit_and_samples_have_one():
    for level in (0.025, 0.5, 0.9):
        at = scores.mixture_quantile(MEANS, VARIANCES, level)
        assert scores.mixture_pit(at, MEANS, VARIANCES).item() == pytest.approx(level, abs=1e-9)
    same = scores.mixture_quantile(torch.ones(4, 2), torch.zeros(4, 2) + 4, 0.975)
    assert torch.allclose(same, torch.full((2,), 1 + 2 * 1.959964), atol=1e-4)
    samples = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert scores.sample_pit(torch.tensor([2.0]), samples).item() == 0.375
    with pytest.raises(RequestError, match="between 0 and 1"):
        scores.mixture_quantile(MEANS, VARIANCES, 1.0)


def test_sharpness_is_the_width_of_the_interval():
    assert scores.sharpness(torch.tensor([1.0, 9.0]), 0.95).item() == pytest.approx(
        7.8399, abs=1e-3
    )
