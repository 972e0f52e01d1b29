r"""The whole spectrum of a matrix known by its products, as a density.

.. math:: \varphi(\lambda) = \frac1n \sum_{i=1}^n \delta(\lambda - \lambda_i)

Stochastic Lanczos quadrature (Golub & Welsch 1969; Ubaru, Chen & Saad 2017; for neural networks
Ghorbani, Krishnan & Xiao 2019, arXiv 1901.10159): m steps of Lanczos from a random vector give m
nodes and weights whose moments up to order 2m - 1 are those that the vector sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.errors import RequestError
from pantarhei.probes.curvature import Operator
from pantarhei.probes.trace import random_signs


@dataclass(frozen=True)
class Density:
    """Nodes and weights, (probes, steps) each; the weights of each probe sum to one.

    ``size`` is the number of eigenvalues that the density stands for, ``products`` what it took.
    Calling it smooths it with a Gaussian: ``density(grid)``.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    products: int

    def moment(self, order: int) -> float:
        r"""Return the mean of :math:`\lambda^p` over the spectrum; times ``size``, a trace."""
        return float((self.weights * self.nodes**order).sum(1).mean())

    def fraction(self, low: float = -math.inf, high: float = math.inf) -> float:
        """Return the share of eigenvalues in [low, high]: ``fraction(high=0)``, the negative ones.

        It is sharp only where the nodes are dense; a bulk at zero straddles the sign.
        """
        inside = (self.nodes >= low) & (self.nodes <= high)
        return float((self.weights * inside).sum(1).mean())

    def __call__(self, grid: Tensor, width: float | None = None) -> Tensor:
        """Return the density on a grid, smoothed by a Gaussian of this width.

        ``None``: a hundredth of the spectrum's range.
        """
        span = float(self.nodes.max() - self.nodes.min())
        width = width or max(span / 100, 1e-12)
        z = (grid.to(self.nodes)[:, None] - self.nodes.reshape(-1)) / width
        bells = torch.exp(-0.5 * z**2) / (width * math.sqrt(2 * math.pi))
        return bells @ self.weights.reshape(-1) / len(self.nodes)


def spectral_density(
    matrix: Operator | Tensor, *, steps: int = 40, probes: int = 4, seed: int = 0
) -> Density:
    r"""Estimate the spectral density from ``probes`` random vectors of signs.

    Each makes ``steps`` products; the vectors go through the matrix together, and each Krylov basis
    is kept fully orthogonal, which takes the memory of ``probes * steps`` vectors. The largest and
    smallest nodes are good estimates of the ends of the spectrum.

    >>> matrix = torch.diag(torch.tensor([0.0, 0.0, 1.0, 5.0]))
    >>> density = spectral_density(matrix, steps=3, probes=1)
    >>> round(density.moment(1) * density.size, 3), round(density.fraction(4, 6), 3)
    (6.0, 0.25)
    """
    operator = Operator.of(matrix)
    for name, count in (("steps", steps), ("probes", probes)):
        if count < 1:
            raise RequestError(f"{name}={count}: choose at least 1.")
    steps, used = min(steps, operator.size), operator.products
    generator = torch.Generator(operator.device).manual_seed(seed)
    start = random_signs(operator, probes, generator).T / math.sqrt(operator.size)
    t = tridiagonal(operator, start, steps)
    values, vectors = torch.linalg.eigh(t)
    return Density(values, vectors[:, 0] ** 2, operator.size, operator.products - used)


def tridiagonal(operator: Operator, start: Tensor, steps: int) -> Tensor:
    """Run Lanczos from each unit vector in the rows of ``start``; return (rows, steps, steps).

    A Krylov space that is exhausted early leaves zeros, whose quadrature weights are zero.
    """
    rows, eps = len(start), torch.finfo(operator.dtype).eps
    basis = start.new_zeros(rows, steps, operator.size)
    t = torch.zeros(rows, steps, steps, dtype=torch.float64)
    basis[:, 0] = start
    alive = torch.ones(rows, dtype=torch.bool)
    for j in range(steps):
        w = (operator @ basis[:, j].T).T
        if not w.isfinite().all():
            raise RequestError(
                "a product with the matrix is not finite: look at the loss and the weights."
            )
        t[:, j, j] = (basis[:, j] * w).sum(1).cpu().double()
        if j + 1 == steps:
            break
        known = basis[:, : j + 1]
        for _ in range(2):  # once leaves an error of the size of what was taken away
            w = w - torch.einsum("pm,pms->ps", torch.einsum("pms,ps->pm", known, w), known)
        beta = w.norm(dim=1)
        t_beta = beta.cpu().double()
        alive = alive & (t_beta > 10 * eps * t.abs().amax((1, 2)))
        if not alive.any():
            break
        t[:, j, j + 1] = t[:, j + 1, j] = torch.where(alive, t_beta, 0.0)
        dead = ~alive.to(w.device)
        basis[:, j + 1] = torch.where(dead[:, None], torch.zeros_like(w), w / beta[:, None])
    return t
