r"""The trace of a matrix known by its products.

The trace of the Hessian over the number of weights is the mean curvature. :func:`hutch_pp` needs
fewer products than :func:`hutchinson` where a few large eigenvalues carry the trace, as those of a
trained network do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.errors import RequestError
from pantarhei.probes.curvature import Operator


@dataclass(frozen=True)
class Trace:
    """An estimated trace, its standard error, and the products that it took.

    ``error`` is the standard deviation over the random vectors divided by the root of their number;
    it is nan with a single one.
    """

    value: float
    error: float
    products: int


def hutchinson(matrix: Operator | Tensor, products: int = 30, *, seed: int = 0) -> Trace:
    r"""Estimate the trace with random signs (Hutchinson 1989).

    .. math:: \mathrm{tr} A \approx \frac1m \sum_{i=1}^m z_i^\top A z_i, \qquad z_i \in \{\pm1\}^n

    Its variance is :math:`\frac2m \sum_{i\ne j} A_{ij}^2`: zero for a diagonal matrix.

    >>> hutchinson(torch.diag(torch.tensor([1.0, 2.0, 4.0])), products=2)
    Trace(value=7.0, error=0.0, products=2)
    """
    operator = Operator.of(matrix)
    _check(products, 1)
    signs = random_signs(operator, products, torch.Generator(operator.device).manual_seed(seed))
    return _summary((signs * (operator @ signs)).sum(0), 0.0, products)


def hutch_pp(matrix: Operator | Tensor, products: int = 30, *, seed: int = 0) -> Trace:
    r"""Estimate the trace, exactly where the matrix is large, with random signs elsewhere.

    With Q an orthonormal basis of :math:`A S`, S a third of the products' worth of random signs,

    .. math:: \mathrm{tr} A \approx \mathrm{tr}(Q^\top A Q) + \frac1m \sum_{i=1}^m
              z_i^\top (I - QQ^\top) A (I - QQ^\top) z_i

    (Hutch++: Meyer, Musco, Musco & Woodruff 2021, arXiv 2010.09649). For positive semi-definite
    matrices its error falls as 1 / products, that of :func:`hutchinson` as 1 / root of products. It
    keeps about ``products`` vectors in memory.

    >>> low_rank = 5.0 * torch.ones(9, 9)
    >>> round(hutch_pp(low_rank, products=6).value, 3)
    45.0
    """
    operator = Operator.of(matrix)
    _check(products, 3)
    generator = torch.Generator(operator.device).manual_seed(seed)
    third = min(products // 3, operator.size)
    image = operator @ random_signs(operator, third, generator)
    q = torch.linalg.qr(image)[0]
    exact = float((q * (operator @ q)).sum())
    if third == operator.size:
        return Trace(exact, 0.0, 2 * third)
    z = random_signs(operator, products - 2 * third, generator)
    z = z - q @ (q.T @ z)
    return _summary((z * (operator @ z)).sum(0), exact, products)


def random_signs(operator: Operator, columns: int, generator: torch.Generator) -> Tensor:
    """Return random signs (size, columns) on the operator's device."""
    signs = torch.empty(columns, operator.size, dtype=operator.dtype, device=operator.device)
    return signs.bernoulli_(0.5, generator=generator).mul_(2).sub_(1).T


def _summary(samples: Tensor, exact: float, products: int) -> Trace:
    samples = samples.cpu().double()
    if not samples.isfinite().all():
        raise RequestError("a product with the matrix is not finite: look at the loss and weights.")
    error = float(samples.std() / len(samples) ** 0.5) if len(samples) > 1 else float("nan")
    return Trace(exact + float(samples.mean()), error, products)


def _check(products: int, least: int) -> None:
    if products < least:
        raise RequestError(f"products={products}: choose at least {least}.")
