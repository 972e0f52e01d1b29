r"""The pressure of an incompressible flow in a box: a Poisson problem on the cells."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection

import torch
from torch import Tensor


class Laplacian:
    r"""The five-point Laplacian on cells, inverted in its eigenvectors along each axis.

    The normal derivative is zero at every side but those named in ``dirichlet``, where the value is
    zero on the face. Along n cells of width :math:`\Delta x` the eigenvectors are then cosines, or
    sines where the low side is in ``dirichlet``, of :math:`\theta_k (j + 1/2)`, with

    .. math:: \theta_k = \frac{\pi}{n} (k, k + \tfrac12 \text{ or } k + 1) \text{ for none, one or
              both ends in } \texttt{dirichlet}, \qquad
              \lambda_k = -\Big(\frac{2}{\Delta x} \sin\frac{\theta_k}{2}\Big)^2.

    Args:
        shape: Cells (ny, nx); row 0 is the bottom.
        dx, dy: Spacing of each case (B,), or of all (1,).
        dirichlet: Of left, right, bottom and top.
        dtype: Of the solutions.

    >>> p = torch.cos(math.pi * (torch.arange(8, dtype=torch.float64) + 0.5) / 8).expand(1, 8, 8)
    >>> eigenvalue = 2 * math.cos(math.pi / 8) - 2
    >>> one = torch.ones(1)
    >>> torch.allclose(Laplacian((8, 8), one, one).solve(eigenvalue * p), p)
    True
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dx: Tensor,
        dy: Tensor,
        dirichlet: Collection[str] = (),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        low, high = (tuple(side in dirichlet for side in pair)
                     for pair in (("bottom", "left"), ("top", "right")))  # fmt: skip
        (y, self._y), (x, self._x) = (
            _modes(*about, dtype, dx.device) for about in zip(shape, low, high, strict=True)
        )
        dx, dy = (d.to(dtype)[:, None, None] for d in (dx, dy))
        values = y[:, None] / dy**2 + x / dx**2
        # without a side that holds it, the mean has no inverse: it is left out
        self._inverse = torch.where(values == 0, 0.0, 1 / values)

    def solve(self, f: Tensor) -> Tensor:
        """Return x (B, ny, nx) with Laplacian f; with no ``dirichlet``, of f less its mean."""
        return self._y @ ((self._y.T @ f @ self._x) * self._inverse) @ self._x.T


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is kept may be part of a graph later
def _modes(
    n: int, low: bool, high: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,) for spacing 1 and orthonormal eigenvectors (n, n), its columns.

    As matrices: up to some hundred cells their products are faster than an FFT.
    """
    k = torch.arange(n, dtype=torch.float64)
    theta = math.pi / n * (k + (low + high) / 2)
    wave = torch.sin if low else torch.cos
    vectors = wave((k[:, None] + 0.5) * theta)
    vectors /= vectors.norm(dim=0)
    values = -4 * torch.sin(theta / 2) ** 2
    return values.to(device, dtype), vectors.to(device, dtype)
