"""Chains of `posteriors` against a posterior known in closed form."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from pantarhei.bayes import Prior
from pantarhei.bayes.sgmcmc import sample_posterior
from pantarhei.errors import RequestError


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator)
    y = x @ torch.tensor([[0.7], [-0.4]]) + 0.5 * torch.randn(40, 1, generator=generator)
    precision = x.T @ x / 0.25 + torch.eye(2)
    covariance = torch.linalg.inv(precision)
    return x, y, covariance @ x.T @ y[:, 0] / 0.25, covariance


def loss(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean() / 0.5


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("method", "lr"), [("sgld", 0.05), ("sghmc", 0.05)])
def test_a_chain_samples_the_posterior_of_a_linear_model(method, lr):
    pytest.importorskip("posteriors")
    x, y, mean, covariance = problem()
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    options = {"alpha": 2.0} if method == "sghmc" else {}
    found = sample_posterior(
        model, lambda n: (x, y), loss, prior=Prior({"weight": 1.0}), examples=40, members=300,
        every=10, burn_in=100, lr=lr, method=method, quiet=True, **options,
    )  # fmt: skip
    drawn = next(found.parameters()).detach()[:, 0]
    sd = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean).abs() / sd).max() < 0.25
    assert (drawn.std(0) / sd - 1).abs().max() < 0.25
    assert torch.equal(model.weight, before) and found.members == 300


def test_what_cannot_be_sampled_is_refused(monkeypatch):
    model, prior = nn.Linear(2, 1, bias=False), Prior({"weight": 1.0})
    options = {"prior": prior, "examples": 4, "members": 1, "every": 1, "burn_in": 0, "lr": 0.1}
    for change in ({"method": "hmc"}, {"members": 0}, {"burn_in": -1}):
        with pytest.raises(RequestError, match="A chain is one of sgld"):
            sample_posterior(model, lambda n: None, loss, **{**options, **change})
    monkeypatch.setitem(sys.modules, "posteriors.sgmcmc", None)
    with pytest.raises(RequestError, match=r"pip install 'pantarhei\[bayes\]'"):
        sample_posterior(model, lambda n: None, loss, **options)
