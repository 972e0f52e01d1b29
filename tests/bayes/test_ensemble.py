"""Ensembles: vectorised equals one by one, and the linear case equals Bayes."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from pantarhei.bayes import (
    Ensemble,
    GaussianHead,
    Predictive,
    Prior,
    fit_ensemble,
    gaussian_loss,
    perturbed,
)
from pantarhei.errors import RequestError
from pantarhei.fit import Batches

X = torch.randn(96, 3, generator=torch.Generator().manual_seed(0))
Y = torch.sin(X.sum(1, keepdim=True)) + 0.1 * torch.randn(
    96, 1, generator=torch.Generator().manual_seed(1)
)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), GaussianHead(8))


def weights(ensemble):
    return torch.cat([p.detach().flatten(1) for p in ensemble.parameters()], 1)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("anchored", [False, True])
def test_members_together_equal_members_one_by_one(anchored, optimizer):
    prior = Prior.fan_in(mlp()) if anchored else None
    found = []
    own = {"sgd": lambda p: torch.optim.SGD(p, momentum=0.9), "adamw": None}[optimizer]
    for together in (True, False):
        ensemble = Ensemble.of(mlp, members=4, seed=5, prior=prior)
        fits = fit_ensemble(
            ensemble,
            Batches(X, perturbed(Y, 4, 0.3), batch_size=32),
            steps=30, lr=0.01, schedule="cosine", prior=prior, examples=96, by_member=(1,),
            together=together, quiet=True, optimizer=own,
        )  # fmt: skip
        assert len(fits) == (1 if together else 4) and ensemble.together is together
        found.append((weights(ensemble), ensemble.predict(X)))
    (w, told), (w_alone, told_alone) = found
    assert torch.allclose(w, w_alone, atol=2e-5)
    assert torch.allclose(told.means, told_alone.means, atol=1e-4)
    assert (w[0] - w[1]).abs().max() > 0.1  # they are different networks
    own = torch.stack([X + j for j in range(4)])
    for each in (ensemble, Ensemble([ensemble.member(j) for j in range(4)])):
        one = each.each(own).mean[2]
        assert torch.allclose(one, ensemble.member(2)(X + 2).mean, atol=1e-5)


def test_a_network_that_cannot_be_stacked_trains_one_by_one_and_says_so():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), GaussianHead(4)

        def forward(self, x):
            h = self.body(x)
            return self.head(h if h.sum().item() > 0 else 2 * h)  # .item() cannot run under vmap

    ensemble = Ensemble.of(Choosy, members=2)
    before = weights(ensemble)
    with pytest.warns(UserWarning, match="one by one"):
        fits = fit_ensemble(ensemble, Batches(X, Y, batch_size=32), steps=5, quiet=True)
    assert len(fits) == 2 and not ensemble.together
    assert (weights(ensemble) - before).abs().amax(1).min() > 0
    assert ensemble.predict(X).means.shape == (2, 96, 1)
    with pytest.raises(RequestError, match="vmap"):
        fit_ensemble(ensemble, Batches(X, Y, batch_size=32), steps=1, quiet=True, together=True)


def test_recurrent_and_normalised_and_tied_networks():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.head = nn.GRU(3, 5, batch_first=True), GaussianHead(5)

        def forward(self, x):
            return self.head(self.gru(x)[0][:, -1])

    series = X.reshape(32, 3, 3)
    ensemble = Ensemble.of(Recurrent, members=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fit_ensemble(ensemble, Batches(series, Y[:32], batch_size=16), steps=6, quiet=True)
    alone = torch.stack([ensemble.member(j)(series).mean for j in range(2)])
    assert torch.allclose(ensemble.predict(series).means, alone, atol=1e-6)
    assert (alone[0] - alone[1]).abs().max() > 1e-3

    def normed():
        # without a bias, whose gradient before a norm is rounding that Adam would blow up
        return nn.Sequential(
            nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), GaussianHead(6)
        )

    ensembles = [Ensemble.of(normed, members=2, seed=1) for _ in range(2)]
    for ensemble, together in zip(ensembles, (True, False), strict=True):
        fit_ensemble(ensemble, Batches(X, Y, batch_size=32), steps=8, quiet=True, together=together)
    told, alone = (ensemble.predict(X) for ensemble in ensembles)
    assert torch.allclose(told.means, alone.means, atol=1e-4)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    ensemble = Ensemble.of(Tied, members=3)
    assert ensemble.stacked.a.weight is ensemble.stacked.b.weight
    assert torch.allclose(ensemble(X)[2], ensemble.member(2)(X), atol=1e-6)


def test_a_killed_training_continues_to_the_same_weights(tmp_path):
    def train(steps, folder=None, **more):
        ensemble = Ensemble.of(mlp, members=3, seed=2, prior=prior)
        fit_ensemble(
            ensemble, Batches(X, Y, batch_size=32), steps=steps, prior=prior, examples=96,
            checkpoint=folder, quiet=True, **more,
        )  # fmt: skip
        return weights(ensemble)

    prior = Prior.fan_in(mlp())
    train(4, tmp_path)
    assert torch.equal(train(9, tmp_path), train(9))


def bayes(x, y, noise, sd):
    precision = x.T @ x / noise**2 + torch.eye(3, dtype=x.dtype) / sd**2
    posterior = torch.linalg.inv(precision)
    return posterior @ x.T @ y[:, 0] / noise**2, posterior


@pytest.mark.parametrize("perturb", [True, False])
def test_a_linear_anchored_ensemble_is_the_posterior(perturb):
    """With perturbed targets P; without P S0^-1 P, far too small; the mean is right in both."""
    noise, sd, members = 0.5, 0.8, 20_000
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([[1.0], [-0.5], [0.2]], dtype=torch.float64)
    y = y + noise * torch.randn(30, 1, generator=generator, dtype=torch.float64)

    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean() / (2 * noise**2)

    prior = Prior({"weight": sd})
    ensemble = Ensemble.of(
        lambda: nn.Linear(3, 1, bias=False, dtype=torch.float64), members, seed=1, prior=prior
    )
    start = weights(ensemble)
    targets = perturbed(y, members, noise if perturb else 0.0, seed=9)
    fit_ensemble(
        ensemble, lambda n: (x, targets), loss, steps=150, lr=0.15, by_member=(1,), prior=prior,
        examples=30, optimizer=lambda p: torch.optim.SGD(p), quiet=True, together=True,
    )  # fmt: skip
    mean, posterior = bayes(x, y, noise, sd)
    expected = posterior if perturb else posterior @ posterior / sd**2
    found = weights(ensemble)
    apart = (found.mean(0) - mean).abs() / posterior.diagonal().sqrt()
    assert apart.max() < 0.05
    ratio = torch.cov(found.T) / expected
    assert (ratio.diagonal() - 1).abs().max() < 0.05
    assert torch.allclose(torch.cov(found.T), expected, atol=0.03 * expected.diagonal().max())
    if not perturb:
        assert (expected.diagonal() / posterior.diagonal()).max() < 0.05
    assert torch.allclose(torch.cov(start.T), sd**2 * torch.eye(3).double(), atol=0.02)


def test_a_very_strong_anchor_returns_the_prior_draws_and_many_data_leave_no_spread():
    loss = gaussian_loss()
    strong = Prior({name: 1e-4 for name, _ in mlp().named_parameters()})
    ensemble = Ensemble.of(mlp, members=3, prior=Prior.fan_in(mlp()))
    start = weights(ensemble)
    options = {"steps": 60, "lr": 1e-3, "quiet": True, "examples": 96}
    fit_ensemble(ensemble, Batches(X, Y, batch_size=96), loss, prior=strong, **options)
    assert (weights(ensemble) - start).abs().max() < 2e-3
    free = Ensemble.of(mlp, members=3, prior=Prior.fan_in(mlp()))
    fit_ensemble(free, Batches(X, Y, batch_size=96), loss, **options)
    assert (weights(free) - start).abs().max() > 0.02

    spread = []
    for count in (20, 2000):
        generator = torch.Generator().manual_seed(6)
        x = torch.randn(count, 3, generator=generator)
        y = perturbed(x[:, :1], 400, 0.5, seed=3)
        prior = Prior({"weight": 1.0})
        ensemble = Ensemble.of(lambda: nn.Linear(3, 1, bias=False), 400, prior=prior)
        fit_ensemble(
            ensemble, lambda n, x=x, y=y: (x, y),
            lambda model, b: ((model(b[0]) - b[1]) ** 2).mean() / 0.5,
            steps=120, lr=0.1, by_member=(1,), prior=prior, examples=count,
            optimizer=lambda p: torch.optim.SGD(p), quiet=True,
        )  # fmt: skip
        with torch.no_grad():
            spread.append(ensemble(X).var(0).mean().item())
    assert spread[1] < 0.02 * spread[0]


def test_the_variance_is_aleatoric_plus_epistemic():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    variances = torch.rand(5, 7, generator=generator, dtype=torch.float64) + 0.1
    told = Predictive(means, variances)
    second = (variances + means**2).mean(0)
    assert torch.allclose(told.variance, second - told.mean**2)
    assert torch.allclose(told.epistemic, (means**2).mean(0) - told.mean**2)
    assert torch.equal(told.variance, told.aleatoric + told.epistemic)
    assert torch.allclose(Predictive(means, variances, 1).epistemic, told.epistemic * 5 / 4)
    low, high = told.interval(0.9)
    assert torch.allclose(told.pit(low), torch.tensor(0.05).double())
    low, high = told.interval(0.9, mixture=True)
    assert torch.allclose(told.pit(high, mixture=True), torch.tensor(0.95).double())
    z = (2.0 - told.mean) / told.variance.sqrt()
    assert torch.allclose(told.exceeds(2.0), 1 - torch.special.ndtr(z))
    assert told[2:4].means.shape == (5, 2)
    with pytest.raises(RequestError, match="one shape"):
        Predictive(means, variances[:2])


def test_what_contradicts_itself_is_refused():
    prior = Prior.fan_in(mlp())
    ensemble = Ensemble.of(mlp, members=2, prior=prior)
    batches = Batches(X, Y, batch_size=32)
    for options, reason in (
        ({"clip": 1.0}, "clip"),
        ({"prior": prior}, "examples"),
        ({"prior": prior, "examples": 9, "weight_decay": 0.1}, "choose one"),
        ({"prior": Prior({"0.weight": 1.0}), "examples": 9}, "no sd for parameter"),
        ({"prior": Prior(dict.fromkeys(prior.sd, 0.0)), "examples": 9}, "above 0"),
    ):
        with pytest.raises(RequestError, match=reason):
            fit_ensemble(ensemble, batches, steps=1, quiet=True, **options)
    with pytest.raises(RequestError, match="one member or more"):
        Ensemble.of(mlp, 0)
    with pytest.raises(RequestError, match="same names and shapes"):
        Ensemble([nn.Linear(2, 1), nn.Linear(3, 1)])
    with pytest.raises(RequestError, match="one shape"):
        fit_ensemble(ensemble, Batches(X, Y[:, 0], batch_size=32), steps=1, quiet=True)
