r"""Networks that answer with a mean and a variance, and the losses that train them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.bayes.scores import gaussian_nll
from pantarhei.errors import RequestError


class Gaussian(NamedTuple):
    """A Gaussian for every output: ``mean`` and ``variance``, of one shape."""

    mean: Tensor
    variance: Tensor


class GaussianHead(nn.Module):
    r"""The last layer of a mean-variance network: features (..., F) to a Gaussian (..., K).

    .. math:: m = W_m h + b_m, \qquad \log s^2 = \mathrm{clamp}(W_s h + b_s)

    The log variance is held softly between the logarithms of ``floor`` and ``ceiling`` (in the
    targets' units squared, which should be standardised): two softplus functions replace the hard
    corners, so that a variance at a bound still has a gradient and comes back. Without bounds the
    likelihood of a single well-fitted point drives the variance to zero.

    Raises :class:`RequestError` where the bounds are not 0 < floor < ceiling.

    >>> mean, variance = GaussianHead(8, 2)(torch.randn(5, 8))
    >>> mean.shape, bool((variance > 1e-4).all())
    (torch.Size([5, 2]), True)
    """

    def __init__(self, features: int, outputs: int = 1, floor: float = 1e-4, ceiling: float = 1e4):
        super().__init__()
        if not 0 < floor < ceiling:
            raise RequestError(
                f"The variance's bounds need 0 < floor < ceiling: {floor}, {ceiling}."
            )
        self.mean = nn.Linear(features, outputs)
        self.log_variance = nn.Linear(features, outputs)
        bounds = torch.tensor([floor, ceiling], dtype=torch.float64).log()
        self.low, self.high = bounds.tolist()

    def forward(self, features: Tensor) -> Gaussian:
        """Return the Gaussian of each row of features."""
        log = self.high - F.softplus(self.high - self.log_variance(features))
        log = self.low + F.softplus(log - self.low)
        return Gaussian(self.mean(features), log.exp())


def beta_nll(y: Tensor, mean: Tensor, variance: Tensor, beta: float = 0.5) -> Tensor:
    r"""Return the Gaussian NLL weighted by :math:`\lfloor V^\beta\rfloor`, which has no gradient.

    With ``beta`` = 0 it is the likelihood, whose gradient for the mean is divided by the variance,
    so that noisy regions are hardly learned; with 1 that gradient is the squared error's (Seitzer
    et al., On the Pitfalls of Heteroscedastic Uncertainty Estimation, 2022). The value is not a
    score: report :func:`~pantarhei.bayes.scores.gaussian_nll`.
    """
    loss = gaussian_nll(y, mean, variance)
    return loss * variance.detach() ** beta if beta else loss


def gaussian_loss(beta: float = 0.0) -> Callable[[Any, Any], Tensor]:
    """Return ``loss(model, batch)`` for ``fit`` and ``fit_ensemble``: the mean NLL, or beta-NLL.

    ``batch`` is (inputs, targets); the model returns a :class:`Gaussian` of the targets' shape.
    """

    def loss(model: Any, batch: Any) -> Tensor:
        mean, variance = model(batch[0])
        if mean.shape != batch[1].shape:
            raise RequestError(
                f"The network answers with shape {tuple(mean.shape)} and the targets have "
                f"{tuple(batch[1].shape)}: make them one shape."
            )
        return beta_nll(batch[1], mean, variance, beta).mean()

    return loss
