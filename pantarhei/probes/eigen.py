r"""Extreme eigenvalues of a matrix known by its products.

:func:`lanczos` is the method of choice: it needs far fewer products than :func:`power_iteration`
and finds the end of the spectrum it is asked for. Power iteration finds the eigenvalue of largest
magnitude, which early in training is often a negative one; it is here with the shift that mends
this, and because much of the literature used it.

Both searches end when the residual :math:`\lVert A x - \theta x\rVert` is at most ``tol``
:math:`|\theta|`: an eigenvalue lies that near for certain. Usually it is far nearer: where the
eigenvalue stands apart from the others, the error is quadratic in the residual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pantarhei.errors import RequestError, nearest
from pantarhei.probes.curvature import Operator

Which = Literal["largest", "smallest", "magnitude"]
_RANDOM_PART = 0.1  # of a warm start's length, so that a newcomer at the top is found


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues (k,), in the order asked for, and their vectors (size, k).

    ``residuals`` (k,) are the norms of A x - value x, ``products`` the matrix-vector products used,
    ``converged`` says whether every residual is within the tolerance. Values and residuals are
    float64 and on the processor.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int
    converged: bool

    @property
    def top(self) -> float:
        """The first eigenvalue."""
        return float(self.values[0])


def lanczos(
    matrix: Operator | Tensor,
    k: int = 1,
    *,
    which: Which = "largest",
    tol: float = 1e-3,
    max_products: int = 200,
    basis: int | None = None,
    start: Tensor | Eigen | None = None,
    seed: int = 0,
) -> Eigen:
    r"""Find the ``k`` largest, smallest, or largest-in-magnitude eigenvalues and their vectors.

    Lanczos with full reorthogonalisation: the basis Q of the Krylov space grows by one product per
    step, :math:`T = Q^\top A Q` gives the values, and the last coupling the residuals. When the
    basis is full it is restarted from its best vectors (thick restart, Wu & Simon 2000).

    Args:
        matrix: An :class:`Operator`, or a symmetric tensor (size, size).
        k: How many.
        which: ``"largest"`` and ``"smallest"`` are algebraic; ``"magnitude"`` ignores the sign.
        tol: Largest residual, relative to the eigenvalue. In float32 no less than about 1e-5.
        max_products: Bound on the products; what was found by then is returned unconverged.
        basis: Vectors kept at most, the memory of as many models; default ``max(40, 4 k)``.
        start: A vector (size,), or the result at an earlier step of training: its vectors are the
            start of the search, which then needs fewer products.
        seed: Of the random start, or the random part of a warm one.

    Raises :class:`RequestError` for products that are not finite and settings that do not fit.

    >>> found = lanczos(torch.diag(torch.tensor([-9.0, 1.0, 2.0, 4.0])), k=2)
    >>> found.values.round(decimals=3).tolist()
    [4.0, 2.0]
    """
    operator = Operator.of(matrix)
    _check(operator, k, which, tol, max_products)
    room = min(operator.size, max(40, 4 * k) if basis is None else basis)
    if room < min(operator.size, k + 2):
        raise RequestError(f"basis={basis} is too small for k={k}: choose at least {k + 2}.")
    generator = torch.Generator(operator.device).manual_seed(seed)
    used, eps = operator.products, torch.finfo(operator.dtype).eps
    q = torch.empty(room, operator.size, dtype=operator.dtype, device=operator.device)
    t = torch.zeros(room, room, dtype=torch.float64)
    q[0] = _start(operator, start, generator)
    m, first, settled = 0, 0, torch.zeros(0)
    while True:
        # The couplings to the vectors before are known; one full pass takes away what is left.
        w = torch.addmv(operator @ q[m], q[first:m].T, t[first:m, m].to(q), alpha=-1)
        alpha = q[m] @ w
        w.addcmul_(q[m], alpha, value=-1)
        left = q[: m + 1] @ w
        w.addmv_(q[: m + 1].T, left, alpha=-1)
        t[m, m] = float(alpha + left[m])
        m += 1
        beta = _finite_norm(w)
        ritz = _ritz(t[:m, :m], beta, which)
        scale = float(ritz.values.abs().max())
        allowed = tol * ritz.values[:k].abs().clamp(min=eps ** (2 / 3) * scale)
        good = m >= k and bool((ritz.residuals[:k] <= allowed).all())
        exhausted = beta <= 10 * eps * scale
        if exhausted and m < operator.size:
            # An eigenvalue's other vectors are in no Krylov space of this start: look elsewhere,
            # until that changes nothing.
            good = good and len(settled) == k and torch.allclose(settled, ritz.values[:k])
            settled = ritz.values[:k]
            w = _elsewhere(q[:m], generator)
        spent = operator.products - used
        if good or m == operator.size or spent >= max_products:
            vectors = q[:m].T @ ritz.vectors[:, :k].to(q)
            finished = good or m == operator.size
            return Eigen(ritz.values[:k], vectors, ritz.residuals[:k], spent, finished)
        if exhausted:
            beta = 0.0
        if m == room:
            m = min(room - 1, k + (room - k) // 2)
            couplings = beta * ritz.vectors[-1, :m]
            q[:m] = ritz.vectors[:, :m].T.to(q) @ q
            t = torch.zeros_like(t)
            t[range(m), range(m)] = ritz.values[:m]
            t[m, :m] = t[:m, m] = couplings
            first = 0
        else:
            t[m, m - 1] = t[m - 1, m] = beta
            first = m - 1
        torch.div(w, w.norm(), out=q[m])


def power_iteration(
    matrix: Operator | Tensor,
    k: int = 1,
    *,
    which: Which = "magnitude",
    tol: float = 1e-3,
    max_products: int = 1000,
    start: Tensor | Eigen | None = None,
    seed: int = 0,
) -> Eigen:
    r"""Find eigenvalues by power iteration, one after the other.

    .. math:: x \leftarrow \frac{(A + \mu I)\, x}{\lVert (A + \mu I)\, x\rVert}

    With :math:`\mu = 0` it finds the largest in magnitude, whatever its sign. For ``"largest"`` and
    ``"smallest"`` this is the first stage, and where its sign is the wrong one a second stage
    begins with the shift :math:`\mu` that makes the other end of the spectrum the larger one. What
    was found is deflated: the following vectors are kept orthogonal to it.

    Arguments, result and errors are those of :func:`lanczos`; ``max_products`` is for all k
    together, and residuals are those of the deflated matrix.

    >>> round(power_iteration(torch.diag(torch.tensor([-9.0, 1.0, 4.0]))).top, 2)
    -9.0
    >>> round(power_iteration(torch.diag(torch.tensor([-9.0, 1.0, 4.0])), which="largest").top, 2)
    4.0
    """
    operator = Operator.of(matrix)
    _check(operator, k, which, tol, max_products)
    generator = torch.Generator(operator.device).manual_seed(seed)
    end = operator.products + max_products
    sign = {"largest": 1.0, "smallest": -1.0, "magnitude": 0.0}[which]
    basis = torch.empty(k, operator.size, dtype=operator.dtype, device=operator.device)
    values, residuals = torch.zeros(2, k, dtype=torch.float64)
    x, shift, found, converged = _start(operator, start, generator), 0.0, 0, True
    while found < k:
        x, value, residual = _iterate(operator, x, basis[:found], shift, tol, end)
        good = residual <= tol * abs(value)
        basis[found] = x
        seen = basis[: found + 1]
        if good and shift == 0.0 and sign * value < 0:
            shift = -value  # the wrong end of the spectrum moves to zero, the other on top
        else:
            values[found], residuals[found] = value, residual
            converged, found = converged and good, found + 1
        if found < k:
            x = _elsewhere(seen, generator)
    spent = operator.products - end + max_products
    return Eigen(values, basis.T.clone(), residuals, spent, converged)


def _iterate(
    operator: Operator, x: Tensor, basis: Tensor, shift: float, tol: float, end: int
) -> tuple[Tensor, float, float]:
    """Iterate from x, orthogonally to ``basis``; return the vector, its value and its residual."""
    while True:
        y = operator @ x
        value = float(x @ y)
        residual = _finite_norm(_orthogonal(y - value * x, basis)[0])
        if residual <= tol * abs(value) or operator.products >= end:
            return x, value, residual
        y = _orthogonal(y + shift * x, basis)[0]
        x = y / y.norm()


@dataclass(frozen=True)
class _Ritz:
    """The pairs of a projected matrix, those asked for first."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


def _ritz(t: Tensor, beta: float, which: Which) -> _Ritz:
    values, vectors = torch.linalg.eigh(t)  # ascending
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    order = key.argsort()
    values, vectors = values[order], vectors[:, order]
    return _Ritz(values, vectors, (beta * vectors[-1]).abs())


def _orthogonal(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return w without its part along the rows of ``basis``, and the coefficients of that part."""
    column = torch.zeros(len(basis), dtype=torch.float64)
    for _ in range(2):  # once leaves an error of the size of what was taken away
        part = basis @ w
        w = w - part @ basis
        column += part.cpu().double()
    return w, column


def _start(operator: Operator, start: Tensor | Eigen | None, generator: torch.Generator) -> Tensor:
    random = torch.randn(
        operator.size, generator=generator, dtype=operator.dtype, device=operator.device
    )
    random /= random.norm()
    if start is None:
        return random
    warm = start.vectors.sum(1) if isinstance(start, Eigen) else start
    if warm.shape != (operator.size,) or not warm.norm() > 0:
        raise RequestError(
            f"start is of shape {tuple(warm.shape)} and norm {float(warm.norm()):.3g}: give a "
            f"vector of {operator.size} numbers that are not all zero."
        )
    warm = warm.to(random)
    x = warm / warm.norm() + _RANDOM_PART * random
    return x / x.norm()


def _elsewhere(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random unit vector orthogonal to the rows of ``basis``."""
    random = torch.randn(
        basis.shape[1], generator=generator, dtype=basis.dtype, device=basis.device
    )
    random = _orthogonal(random, basis)[0]
    return random / random.norm()


def _finite_norm(w: Tensor) -> float:
    norm = float(w.norm())
    if not math.isfinite(norm):
        raise RequestError(
            "a product with the matrix is not finite: the loss has no finite second derivative at "
            "these weights (an infinite slope, or overflow; try dtype=torch.float64)."
        )
    return norm


def _check(operator: Operator, k: int, which: str, tol: float, max_products: int) -> None:
    if not 1 <= k <= operator.size:
        raise RequestError(f"k={k}: choose 1 to {operator.size} eigenvalues, the matrix's size.")
    if which not in ("largest", "smallest", "magnitude"):
        hint = nearest(which, ("largest", "smallest", "magnitude"))
        raise RequestError(
            f"which='{which}' is unknown: choose largest, smallest or magnitude.{hint}"
        )
    if not tol > 0:
        raise RequestError(f"tol={tol}: choose a positive relative residual, for example 1e-3.")
    if max_products < k:
        raise RequestError(f"max_products={max_products}: {k} eigenvalues need at least {k}.")
