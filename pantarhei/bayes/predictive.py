r"""What an ensemble of mean-variance networks says: a Gaussian mixture, and whence its width.

Law of total variance, over members j that count equally:

.. math:: m = \overline{\mu_j}, \qquad V = A + E, \qquad A = \overline{s_j^2}, \qquad
          E = \overline{\mu_j^2} - m^2.

A, aleatoric, is the noise that the members see in the data; E, epistemic, is their disagreement.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.bayes import scores
from pantarhei.bayes.gaussian import Gaussian
from pantarhei.errors import RequestError


@dataclass(frozen=True)
class Predictive:
    """Means and variances of M members, (M, ...) each.

    ``correction`` = 1 divides the spread of the members by M - 1: unbiased, where few members would
    make E too small by the factor (M - 1)/M. With 0, E is exactly that of the mixture.

    >>> told = Predictive(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]]))
    >>> told.mean.item(), told.aleatoric.item(), told.epistemic.item(), told.variance.item()
    (1.0, 2.0, 1.0, 3.0)
    """

    means: Tensor
    variances: Tensor
    correction: int = 0

    def __post_init__(self) -> None:
        if self.means.shape != self.variances.shape or len(self.means) <= self.correction:
            raise RequestError(
                f"Means {tuple(self.means.shape)} and variances {tuple(self.variances.shape)} need "
                f"one shape and more than {self.correction} members."
            )

    @property
    def mean(self) -> Tensor:
        """The mean of the mixture."""
        return self.means.mean(0)

    @property
    def aleatoric(self) -> Tensor:
        """The mean variance of the members, A."""
        return self.variances.mean(0)

    @property
    def epistemic(self) -> Tensor:
        """The variance of the members' means, E."""
        return self.means.var(0, correction=self.correction)

    @property
    def variance(self) -> Tensor:
        """The total variance, A + E."""
        return self.aleatoric + self.epistemic

    @property
    def gaussian(self) -> Gaussian:
        """The Gaussian of the same mean and variance."""
        return Gaussian(self.mean, self.variance)

    def nll(self, y: Tensor, mixture: bool = False) -> Tensor:
        """Return the negative log-likelihood of ``y``: of N(mean, variance), or of the mixture."""
        if mixture:
            return scores.mixture_nll(y, self.means, self.variances)
        return scores.gaussian_nll(y, *self.gaussian)

    def crps(self, y: Tensor, mixture: bool = False) -> Tensor:
        """Return the continuous ranked probability score of ``y``."""
        if mixture:
            return scores.mixture_crps(y, self.means, self.variances)
        return scores.gaussian_crps(y, *self.gaussian)

    def pit(self, y: Tensor, mixture: bool = False) -> Tensor:
        """Return the forecast's probability of less than ``y``."""
        if mixture:
            return scores.mixture_pit(y, self.means, self.variances)
        return scores.gaussian_pit(y, *self.gaussian)

    def quantile(self, level: float, mixture: bool = False) -> Tensor:
        """Return the value that is not exceeded with probability ``level``."""
        if mixture:
            return scores.mixture_quantile(self.means, self.variances, level)
        return scores.mixture_quantile(self.mean[None], self.variance[None], level)

    def interval(self, level: float = 0.95, mixture: bool = False) -> tuple[Tensor, Tensor]:
        """Return the ends of the central interval of probability ``level``."""
        tail = (1 - level) / 2
        return self.quantile(tail, mixture), self.quantile(1 - tail, mixture)

    def exceeds(self, threshold: float, mixture: bool = False) -> Tensor:
        """Return the probability of more than ``threshold``: what an alarm looks at."""
        return 1 - self.pit(torch.full_like(self.mean, threshold), mixture)

    def __getitem__(self, index: object) -> Predictive:
        """Return the forecast at some places; the members all stay."""
        index = index if isinstance(index, tuple) else (index,)
        at = (slice(None), *index)
        return Predictive(self.means[at], self.variances[at], self.correction)
