"""Mean-variance heads, their losses, priors and integrated gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pantarhei.bayes import GaussianHead, Prior, beta_nll, gaussian_loss, integrated_gradients
from pantarhei.bayes.scores import gaussian_nll
from pantarhei.errors import RequestError


def test_the_log_variance_stays_within_bounds_and_keeps_a_gradient():
    head = GaussianHead(1, floor=1e-2, ceiling=1e2)
    nn.init.ones_(head.log_variance.weight)
    nn.init.zeros_(head.log_variance.bias)
    x = torch.tensor([[-9.0], [0.0], [9.0]], requires_grad=True)
    variance = head(x).variance
    assert (variance > 1e-2).all() and (variance < 1.02e2).all()
    assert variance[1].item() == pytest.approx(1.0, abs=0.05)  # in between it is the exponential
    (slope,) = torch.autograd.grad(variance.log().sum(), x)
    assert (slope > 1e-3).all()
    with pytest.raises(RequestError, match="floor < ceiling"):
        GaussianHead(1, floor=1.0, ceiling=0.1)


def test_beta_nll_goes_from_likelihood_to_squared_error():
    y, mean = torch.tensor([1.0, 1.0]), torch.zeros(2, requires_grad=True)
    variance = torch.tensor([0.1, 10.0])
    slopes = {}
    for beta in (0.0, 0.5, 1.0):
        (slopes[beta],) = torch.autograd.grad(beta_nll(y, mean, variance, beta).sum(), mean)
    assert torch.allclose(slopes[0.0], -1 / variance)
    assert torch.allclose(slopes[0.5], -1 / variance.sqrt())
    assert torch.allclose(slopes[1.0], -torch.ones(2))
    free = variance.clone().requires_grad_()
    (found,) = torch.autograd.grad(beta_nll(y, mean, free, 1.0).sum(), free)
    (plain,) = torch.autograd.grad(gaussian_nll(y, mean, free).sum(), free)
    assert torch.allclose(found, variance * plain)  # no gradient through the weight
    assert torch.equal(gaussian_loss()(lambda x: (mean, variance), (None, y)),
                       gaussian_nll(y, mean, variance).mean())  # fmt: skip


def test_the_prior_knows_every_parameter():
    net = nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 4), GaussianHead(4, 2)
    )
    net[3].bias.requires_grad_(False)
    prior = Prior.fan_in(net, first=2.0, hidden=1.0, last=0.5, noise=0.1, noise_level=2.0)
    assert prior.sd["0.weight"] == prior.sd["0.bias"] == pytest.approx(2 / math.sqrt(12))
    assert prior.sd["3.weight"] == 0.25 and "3.bias" not in prior.sd
    assert prior.sd["4.mean.weight"] == 0.25 and prior.sd["4.log_variance.weight"] == 0.05
    assert prior.sd["4.log_variance.bias"] == 2.0
    assert prior.sd["1.weight"] == 0.1 and prior.mean == {"1.weight": 1.0, "1.bias": 0.0}
    one, two = prior.draw(net, 2, seed=1)
    drawn = torch.stack([m[1].weight for m in prior.draw(net, 200)])
    assert drawn.mean().item() == pytest.approx(1, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(one[3].bias, net[3].bias) and not torch.equal(one[0].weight, two[0].weight)
    again = prior.draw(net, 2, seed=1)[1]
    assert torch.equal(again[0].weight, two[0].weight)


def test_integrated_gradients_are_complete():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x, baseline = 2 * torch.randn(9, 3, 2), torch.randn(3, 2)

    def function(x):
        return net(x.flatten(1))[:, 0]

    shares = integrated_gradients(function, x, baseline)
    assert shares.shape == x.shape
    with torch.no_grad():
        moved = function(x) - function(baseline[None])
    assert torch.allclose(shares.sum((1, 2)), moved, atol=1e-3)
    chunked = integrated_gradients(function, x, baseline, rows=20)
    assert torch.allclose(shares, chunked, atol=1e-6)
    assert not torch.allclose(
        integrated_gradients(function, x, baseline, points=1), shares, atol=1e-3
    )
    with pytest.raises(RequestError, match="one number for each"):
        integrated_gradients(lambda x: net(x.flatten(1)), x, baseline)


def test_integrated_gradients_are_exact_for_linear_functions_at_any_number_of_points():
    x, baseline = torch.randn(4, 5), torch.randn(5)
    w = torch.randn(5)
    shares = integrated_gradients(lambda x: x @ w, x, baseline, points=1)
    assert torch.allclose(shares, (x - baseline) * w)
