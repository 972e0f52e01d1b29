r"""Samples of a network's posterior by stochastic-gradient Markov chains, as an ensemble.

The chains are those of the library ``posteriors``: for example SGLD with the learning rate
:math:`\epsilon`, the loss :math:`L` (a mean negative log-likelihood) and N examples,

.. math:: \theta_{k+1} = \theta_k + \epsilon\,\nabla\log\pi(\theta_k)
          + \sqrt{2\epsilon/N}\;\xi_k, \qquad
          \log\pi(\theta) = -L(\theta) - \frac1{2N}\sum_i\frac{(\theta_i-m_i)^2}{sd_i^2},

so that what is sampled is the posterior at the temperature 1 up to the discretisation.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pantarhei._fit_loss import Loss, scalar
from pantarhei._fit_random import mix, own_randomness, seed_all
from pantarhei._stacked import WithLoss
from pantarhei.bayes.ensemble import Ensemble
from pantarhei.bayes.gaussian import gaussian_loss
from pantarhei.bayes.prior import Prior
from pantarhei.errors import RequestError
from pantarhei.progress import progress

METHODS = ("sgld", "sghmc", "baoa")


def sample_posterior(
    model: nn.Module,
    batches: Callable[[int], Any],
    loss: Loss | None = None,
    *,
    prior: Prior,
    examples: int,
    members: int,
    every: int,
    burn_in: int,
    lr: float,
    method: Literal["sgld", "sghmc", "baoa"] = "sghmc",
    seed: int = 0,
    quiet: bool = False,
    **options: Any,
) -> Ensemble:
    """Follow one chain from the model's weights, and keep a sample ``every`` so many steps.

    Args:
        model: Where the chain starts; best trained already. It stays as it is.
        batches: Batches by the draw number, as for ``fit``.
        loss: ``loss(model, batch)``, a mean negative log-likelihood; default
            :func:`~pantarhei.bayes.gaussian_loss`.
        prior: Of the weights.
        examples: N, the number of training examples.
        members: Samples to keep: the members of the ensemble.
        every: Steps between two samples.
        burn_in: Steps before the first.
        lr: Step of the chain.
        method: Langevin dynamics (``"sgld"``), with momentum (``"sghmc"``), or ``"baoa"``.
        seed: Of the chain.
        quiet: Show no progress.
        options: Of the method in ``posteriors``, such as ``alpha``, its friction.

    Buffers (running means of norms) stay as they are in ``model``. Raises :class:`RequestError`
    where ``posteriors`` is not installed, for counts that make no sense, and for a chain that
    diverges.
    """
    if method not in METHODS or min(members, every) < 1 or burn_in < 0:
        raise RequestError(
            f"A chain is one of {', '.join(METHODS)}, with 1 or more members and steps between "
            f"them: not '{method}', {members} and {every}."
        )
    prior.check(model)
    device = next(model.parameters()).device
    module = WithLoss(copy.deepcopy(model).eval(), loss or gaussian_loss())
    weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    means = {name: prior.mean.get(name.removeprefix("model."), 0.0) for name in weights}
    sds = {name: prior.sd[name.removeprefix("model.")] for name in weights}

    def log_posterior(weights: dict[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        parts = [(((w - means[n]) / sds[n]) ** 2).sum() for n, w in weights.items()]
        held = torch.stack(parts).sum() / (2 * examples)
        return -scalar(functional_call(module, weights, (batch,))) - held, torch.zeros(())

    chain = _method(method).build(log_posterior, lr=lr, temperature=1 / examples, **options)
    kept = []
    steps = burn_in + members * every
    with own_randomness(device), progress(steps, "posterior", quiet) as bar:
        seed_all(mix(seed, "chain"), device)
        state = chain.init(weights)
        for step in range(steps):
            batch = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), batches(step))
            state, _ = chain.update(state, batch)
            if step >= burn_in and (step - burn_in + 1) % every == 0:
                kept.append(_with(model, state.params))
            bar.advance()
    return Ensemble(kept)


def _with(model: nn.Module, weights: Any) -> nn.Module:
    """Return a copy of the model with these weights."""
    one = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in one.named_parameters():
            if p.requires_grad:
                p.copy_(weights[f"model.{name}"])
    if not all(bool(p.isfinite().all()) for p in one.parameters()):
        raise RequestError("The chain diverged: choose a smaller lr.")
    return one


def _method(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of tensordict, about its own defaults
            return getattr(importlib.import_module("posteriors.sgmcmc"), name)
    except ImportError as error:
        raise RequestError(
            f"Sampling needs the library posteriors ({error}): pip install 'pantarhei[bayes]'."
        ) from error
