r"""Scores of probabilistic forecasts: proper ones, calibration and sharpness. Lower is better.

Everything is elementwise over tensors of any shape, so that a caller averages over what it likes.
A Gaussian mixture is given by the means and variances of its members along the first dimension,
(M, ...), and counts all of them equally: what an ensemble of mean-variance networks predicts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pantarhei.errors import RequestError


def gaussian_nll(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    r"""Return the negative log-likelihood of ``y`` under a Gaussian, in nats.

    .. math:: \tfrac12\log(2\pi V) + \frac{(y-m)^2}{2V}

    >>> nll = gaussian_nll(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0))
    >>> round(nll.item(), 4)  # log(2 pi) / 2
    0.9189
    """
    return 0.5 * (torch.log(2 * math.pi * variance) + (y - mean) ** 2 / variance)


def mixture_nll(y: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    r"""Return :math:`-\log\tfrac1M\sum_j N(y;\mu_j,s_j^2)` of a mixture (M, ...), in nats.

    >>> means, variances = torch.tensor([-1.0, 1.0]), torch.ones(2)
    >>> round(mixture_nll(torch.tensor(0.0), means, variances).item(), 4)  # both a unit away
    1.4189
    """
    logs = -gaussian_nll(y, means, variances)
    return math.log(len(means)) - torch.logsumexp(logs, 0)


def gaussian_crps(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    r"""Return the continuous ranked probability score of a Gaussian, in the units of ``y``.

    .. math:: s\,[z(2\Phi(z)-1) + 2\varphi(z) - \pi^{-1/2}], \qquad z = (y-m)/s

    (Gneiting and Raftery, Journal of the American Statistical Association 2007, equation 21).

    >>> score = gaussian_crps(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0))
    >>> round(score.item(), 4)
    0.2337
    """
    return _absolute(y - mean, variance) - torch.sqrt(variance / math.pi)


def mixture_crps(y: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    r"""Return the CRPS of a Gaussian mixture (M, ...), in closed form.

    .. math:: \tfrac1M\sum_j A(y-\mu_j, s_j^2) - \tfrac1{2M^2}\sum_{jk} A(\mu_j-\mu_k, s_j^2+s_k^2)

    with :math:`A(m,s^2)=\mathrm E|N(m,s^2)|`. Memory grows with :math:`M^2`.

    >>> one = mixture_crps(torch.tensor(0.0), torch.zeros(3), torch.ones(3))
    >>> torch.allclose(one, gaussian_crps(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(1.0)))
    True
    """
    apart = _absolute(means[:, None] - means[None], variances[:, None] + variances[None])
    return _absolute(y - means, variances).mean(0) - 0.5 * apart.mean((0, 1))


def sample_crps(y: Tensor, samples: Tensor, fair: bool = False) -> Tensor:
    r"""Return the CRPS of the empirical distribution of ``samples``, (S, ...).

    .. math:: \tfrac1S\sum_i|x_i-y| - \tfrac1{2S^2}\sum_{ij}|x_i-x_j|

    in O(S log S): sorted, the double sum is :math:`2\sum_i(2i-S-1)x_{(i)}`. ``fair`` divides it by
    S(S - 1), so that the mean does not depend on the number of samples.
    """
    count = len(samples)
    if count < 2:
        raise RequestError(f"The CRPS of samples needs two or more of them, not {count}.")
    ranks = torch.arange(1, count + 1, dtype=samples.dtype, device=samples.device)
    weights = (2 * ranks - count - 1).view(-1, *[1] * (samples.dim() - 1))
    spread = (weights * samples.sort(0).values).sum(0)
    return (samples - y).abs().mean(0) - spread / (count * (count - 1 if fair else count))


def gaussian_pit(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the probability integral transform F(y): uniform where forecasts are calibrated."""
    return torch.special.ndtr((y - mean) / variance.sqrt())


def mixture_pit(y: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Return F(y) of a Gaussian mixture (M, ...)."""
    return gaussian_pit(y, means, variances).mean(0)


def sample_pit(y: Tensor, samples: Tensor) -> Tensor:
    """Return the share of the samples (S, ...) that lie below ``y``, ties counted half."""
    return ((samples < y).double() + 0.5 * (samples == y).double()).mean(0)


def mixture_quantile(means: Tensor, variances: Tensor, level: float) -> Tensor:
    """Return the quantile of a Gaussian mixture (M, ...), by bisection to the last digits.

    >>> means, variances = torch.tensor([-1.0, 1.0]), torch.ones(2)
    >>> round(mixture_quantile(means, variances, 0.5).item(), 6) + 0.0
    0.0
    """
    _check_level(level)
    means, variances = torch.broadcast_tensors(means, variances)
    z = torch.special.ndtri(torch.tensor(level, dtype=torch.float64)).item()
    ends = means + z * variances.sqrt()  # the mixture's quantile lies between its members'
    low, high = ends.amin(0), ends.amax(0)
    for _ in range(60 if means.dtype == torch.float64 else 30):
        middle = (low + high) / 2
        below = mixture_pit(middle, means, variances) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def coverage(pit: Tensor, level: float = 0.95) -> Tensor:
    """Return the share of observations inside the central interval of probability ``level``.

    An observation is inside where its PIT is within ``level / 2`` of one half.

    >>> coverage(torch.tensor([0.01, 0.3, 0.6, 0.99]), 0.9).item()
    0.5
    """
    _check_level(level)
    return ((pit - 0.5).abs() <= level / 2).double().mean()


def calibration_curve(pit: Tensor, levels: int = 19) -> tuple[Tensor, Tensor]:
    """Return probabilities p, (levels,), evenly inside (0, 1), and the share of PITs up to each.

    A calibrated forecast lies on the diagonal; the mean distance from it is the calibration error.
    """
    wanted = torch.arange(1, levels + 1, dtype=torch.float64, device=pit.device) / (levels + 1)
    found = torch.searchsorted(pit.flatten().double().sort().values, wanted, right=True)
    return wanted, found.double() / pit.numel()


def calibration_error(pit: Tensor, levels: int = 19) -> Tensor:
    """Return the mean distance of the calibration curve from the diagonal."""
    wanted, found = calibration_curve(pit, levels)
    return (wanted - found).abs().mean()


def sharpness(variance: Tensor, level: float = 0.95) -> Tensor:
    """Return the mean width of the central Gaussian interval of probability ``level``.

    Among calibrated forecasts the sharpest is the best; alone the figure says nothing.
    """
    _check_level(level)
    z = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()
    return 2 * z * variance.sqrt().mean()


def _absolute(mean: Tensor, variance: Tensor) -> Tensor:
    """Return E|X| of X ~ N(mean, variance)."""
    sd = variance.sqrt()
    z = mean / sd
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return mean * torch.erf(z / math.sqrt(2)) + 2 * sd * density


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise RequestError(f"A probability lies between 0 and 1, not at {level}.")
