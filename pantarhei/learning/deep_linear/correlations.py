r"""What a linear network sees of its data: two correlation matrices, and their modes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pantarhei.errors import RequestError

Array = NDArray[np.float64]
Convention = Literal["half-sum", "half-mean", "mse", "mse-sum"]

_ROUNDING = 1e-12  # of the strongest mode: weaker ones are not in the data
_TOLERANCE = 1e-6  # of the largest entry: rounding of data that were whitened in float32


@dataclass(frozen=True, eq=False)
class Modes:
    r"""Singular modes of the input-output correlation, :math:`\Sigma_{31} = U S V^T`.

    Attributes:
        U: (N3, K) output directions. V: (N1, K) input directions; K = min(N1, N3).
        s: (K,) singular values, largest first.
        power: (K,) power of the inputs along each v; 1 for whitened inputs.

    What a mode reaches is :attr:`target` = s / power, and it gets there as a whitened mode of that
    strength does with tau / power.
    """

    U: Array
    s: Array
    V: Array
    power: Array

    @cached_property
    def target(self) -> Array:
        """Strength (K,) that each mode has when it is learned."""
        some = self.power > 0
        return np.divide(self.s, self.power, out=np.zeros_like(self.s), where=some)

    def strengths(self, product: Array) -> Array:
        """Return :math:`u_k = u_k^T W v_k`, (..., K), of end-to-end maps W (..., N3, N1)."""
        return np.einsum("ik,...ij,jk->...k", self.U, product, self.V, optimize=True)


@dataclass(frozen=True, eq=False)
class Correlations:
    r"""Averages over a data set: all that full-batch training of a linear network depends on.

    .. math:: \Sigma_{31} = \tfrac1P \sum_\mu y^\mu x^{\mu T}, \quad
              \Sigma_{11} = \tfrac1P \sum_\mu x^\mu x^{\mu T}, \quad
              \mathrm{power} = \tfrac1P \sum_\mu |y^\mu|^2

    The paper sums instead of averaging; only the unit of time differs (:meth:`tau`). The loss is
    :math:`L = \tfrac1{2P} \sum_\mu |y^\mu - W x^\mu|^2` throughout.

    >>> x = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    >>> data = Correlations.of(x, x @ np.diag([3.0, 1.0]))
    >>> data.whitened, data.modes().s.tolist(), data.loss(np.zeros((2, 2))).tolist()
    (True, [3.0, 1.0], 5.0)
    """

    sigma31: Array
    sigma11: Array
    power: float
    samples: int = 1

    @classmethod
    def of(cls, inputs: ArrayLike, targets: ArrayLike) -> Correlations:
        """Average over inputs (P, N1) and targets (P, N3) or (P,).

        Raises :class:`RequestError` where they disagree in length or hold numbers not finite.
        """
        x, y = (np.asarray(a, dtype=np.float64) for a in (inputs, targets))
        y = y[:, None] if y.ndim == 1 else y
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or not len(x):
            raise RequestError(
                f"Inputs of shape {x.shape} and targets of shape {y.shape} are not samples of one "
                "data set: give (P, N1) and (P, N3)."
            )
        for name, array in (("inputs", x), ("targets", y)):
            if not np.isfinite(array).all():
                row, column = np.argwhere(~np.isfinite(array))[0]
                raise RequestError(
                    f"The {name} hold {array[row, column]} in row {row}, column {column}: fill or "
                    "drop what is missing."
                )
        p = len(x)
        return cls(y.T @ x / p, x.T @ x / p, float((y**2).sum() / p), p)

    @classmethod
    def of_map(cls, target: ArrayLike, power: float | None = None) -> Correlations:
        """Return those of whitened inputs whose targets are ``target`` (N3, N1) times the input."""
        w = np.asarray(target, dtype=np.float64)
        return cls(w, np.eye(w.shape[1]), float((w**2).sum()) if power is None else power)

    @cached_property
    def whitened(self) -> bool:
        """Whether the input correlation is the identity to one part in a million."""
        return bool(np.abs(self.sigma11 - np.eye(len(self.sigma11))).max() <= _TOLERANCE)

    @cached_property
    def floor(self) -> float:
        """The least loss that a linear map has on these data."""
        return self.power / 2 - float(np.sum(self.sigma31 * self.least_squares)) / 2

    @cached_property
    def least_squares(self) -> Array:
        """The map (N3, N1) of least loss, and of least norm among those."""
        if self.whitened:
            return self.sigma31
        return self.sigma31 @ np.linalg.pinv(self.sigma11, rcond=1e-10, hermitian=True)

    def loss(self, product: Array) -> Array:
        """Return the losses (...) of end-to-end maps (..., N3, N1)."""
        seen = product if self.whitened else product @ self.sigma11
        return self.power / 2 + ((seen / 2 - self.sigma31) * product).sum((-2, -1))

    def modes(self, approximate: bool = False) -> Modes:
        r"""Return the singular modes of the input-output correlation.

        Closed forms hold where the modes do not mix: for whitened inputs, and where
        :math:`\Sigma_{11} = V \Lambda V^T` has the same V. Otherwise this raises
        :class:`RequestError`, or with ``approximate`` warns and takes the diagonal of
        :math:`V^T \Sigma_{11} V`.
        """
        if not self.whitened and self.commuting:
            return self._commuting_modes()
        u, s, vt = np.linalg.svd(self.sigma31, full_matrices=False)
        s = np.where(s > _ROUNDING * s.max(initial=0.0), s, 0.0)
        if self.whitened:
            return Modes(u, s, vt.T, np.ones_like(s))
        mixing = f"their correlation mixes the modes (by {self.mixing:.2g} of its size)"
        if not approximate:
            raise RequestError(
                f"The inputs are not white and {mixing}, so that no closed form holds: "
                "whiten() the inputs, take gradient_flow(), or pass approximate=True."
            )
        warnings.warn(
            f"the inputs are not white and {mixing}: the curves are approximate", stacklevel=2
        )
        return Modes(u, s, vt.T, np.einsum("ki,ij,kj->k", vt, self.sigma11, vt, optimize=True))

    def principal_modes(self) -> Modes:
        r"""Return the modes of a network of one layer, which learns any data mode by mode.

        They are the principal directions v of the inputs, with :math:`s = |\Sigma_{31} v|` and
        u the direction of :math:`\Sigma_{31} v`; there are N1, and their u are not orthogonal.
        Strongest s first.
        """
        power, v = np.linalg.eigh(self.sigma11)
        image = self.sigma31 @ v
        s = np.linalg.norm(image, axis=0)
        order = np.argsort(-s, kind="stable")
        u = np.divide(image, s, out=np.zeros_like(image), where=s > 0)
        return Modes(u[:, order], s[order], v[:, order], np.maximum(power, 0.0)[order])

    @cached_property
    def mixing(self) -> float:
        r"""How far :math:`\Sigma_{31}^T\Sigma_{31}` and :math:`\Sigma_{11}` are from commuting."""
        gram = self.sigma31.T @ self.sigma31
        size = np.linalg.norm(gram) * np.linalg.norm(self.sigma11)
        commutator = gram @ self.sigma11 - self.sigma11 @ gram
        return float(np.linalg.norm(commutator) / size) if size else 0.0

    @property
    def commuting(self) -> bool:
        """Whether inputs and task share their directions, so that modes do not mix."""
        return self.mixing <= _TOLERANCE

    def _commuting_modes(self) -> Modes:
        """Diagonalise both: the SVD alone is free to turn modes of equal strength."""
        gram, k = self.sigma31.T @ self.sigma31, min(self.sigma31.shape)
        # A generic combination of two commuting matrices has exactly their common eigenvectors.
        scale = np.linalg.norm(gram, 2) / (np.linalg.norm(self.sigma11, 2) or 1.0)
        _, vectors = np.linalg.eigh(gram + 0.61803398875 * scale * self.sigma11)
        order = np.argsort(-np.einsum("ij,ij->j", vectors, gram @ vectors), kind="stable")
        v = vectors[:, order[:k]]
        image = self.sigma31 @ v
        s = np.linalg.norm(image, axis=0)
        s = np.where(s > _ROUNDING * s.max(initial=0.0), s, 0.0)
        u, r = np.linalg.qr(np.where(s > 0, image, 0.0))
        u = u * np.where(np.diag(r) < 0, -1.0, 1.0)
        return Modes(u, s, v, np.einsum("ij,ij->j", v, self.sigma11 @ v))

    def tau(self, lr: float, loss: Convention = "half-mean") -> float:
        r"""Return the time constant, in steps, of gradient descent at learning rate ``lr``.

        One step adds lr times minus the gradient of the loss that is trained, and

        ============  ====================================================  ====================
        ``loss``      what is minimised                                     1 / tau
        ============  ====================================================  ====================
        half-mean     :math:`\tfrac1{2P} \sum_\mu |y - \hat y|^2`           lr
        half-sum      :math:`\tfrac12 \sum_\mu |y - \hat y|^2` (the paper)  lr P
        mse           ``torch.nn.MSELoss()``, mean over P and N3            2 lr / N3
        mse-sum       ``torch.nn.MSELoss(reduction="sum")``                 2 lr P
        ============  ====================================================  ====================

        so that a curve of this package at time t, with this tau, is that training after t steps.

        >>> data = Correlations.of(np.eye(4), np.eye(4)[:, :2])
        >>> [round(data.tau(0.1, loss), 6) for loss in ("half-mean", "half-sum", "mse", "mse-sum")]
        [10.0, 2.5, 10.0, 1.25]
        """
        factors = {
            "half-mean": 1.0,
            "half-sum": float(self.samples),
            "mse": 2 / len(self.sigma31),
            "mse-sum": 2.0 * self.samples,
        }
        if loss not in factors:
            raise RequestError(f"'{loss}' is not a loss: choose {', '.join(factors)}.")
        if not lr > 0:
            raise RequestError(f"The learning rate is positive, not {lr}.")
        return 1 / (lr * factors[loss])


def whiten(inputs: ArrayLike, floor: float = 1e-10) -> tuple[Array, Array]:
    r"""Return inputs (P, M) with :math:`\Sigma_{11} = I`, and the map (N1, M) that made them.

    ``inputs @ map`` are the principal components, each divided by the root of its power. Directions
    with less than ``floor`` of the largest power are left out, so M is at most N1 and P. New data
    are whitened by the same map.

    Raises :class:`RequestError` for inputs that are not (P, N1) or hold numbers not finite.

    >>> x, w = whiten(np.random.default_rng(0).normal(size=(50, 3)) @ np.diag([5.0, 1.0, 0.0]))
    >>> x.shape, w.shape, bool(np.allclose(x.T @ x / 50, np.eye(2)))
    ((50, 2), (3, 2), True)
    """
    x = np.asarray(inputs, dtype=np.float64)
    sigma11 = Correlations.of(x, np.zeros((len(x), 1))).sigma11
    power, vectors = np.linalg.eigh(sigma11)
    kept = np.flatnonzero(power > floor * power.max(initial=0.0))[::-1]
    if not len(kept):
        raise RequestError("The inputs are all zero and cannot be whitened: give others.")
    transform = vectors[:, kept] / np.sqrt(power[kept])
    return x @ transform, transform
