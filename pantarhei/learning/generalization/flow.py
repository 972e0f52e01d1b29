r"""The weights themselves along gradient flow, without a step: linear students of any depth.

Data come as rows: ``inputs`` (P, N), ``targets`` (P,) or (P, q). Time is that of
:math:`\dot w = y X^T - w X X^T`, the gradient of half the summed squared error;
:func:`~.estimate.time_of_steps` converts steps of gradient descent to it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from pantarhei.errors import RequestError
from pantarhei.learning.generalization.spectrum import Array, _matrix, _not_negative, _numbers


def flow(
    inputs: ArrayLike, targets: ArrayLike, times: ArrayLike, start: ArrayLike | None = None
) -> Array:
    r"""Return the weights of a linear student at ``times`` (T,): (T, N), or (T, N, q).

    With :math:`X X^T = V \Lambda V^T`, each mode is on its own,

    .. math:: w(t) = w(0) + V\,(1 - e^{-\Lambda t})\,(\Lambda^{-1} V^T X y - V^T w(0)),

    and what no input reaches stays exactly as ``start`` (N,) or (N, q) has it; default 0. Infinity
    among the times is the interpolating (or least-squares) solution nearest to the start.

    >>> x = np.array([[1.0, 0.0], [2.0, 0.0]])
    >>> flow(x, [1.0, 2.0], [0.0, np.inf], start=[5.0, 5.0])
    array([[5., 5.],
           [1., 5.]])
    """
    x, y = pair(inputs, targets)
    t = _not_negative("times", times, infinite=True)
    w = np.zeros((x.shape[1], *y.shape[1:])) if start is None else _numbers("start", start)
    if w.shape != (x.shape[1], *y.shape[1:]):
        raise RequestError(
            f"start has shape {w.shape}: weights here have {(x.shape[1], *y.shape[1:])}."
        )
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    there = singular > singular.max() * max(x.shape) * np.finfo(np.float64).eps
    # An input that is always 0 is rounding in the basis; its weight stays bit for bit.
    left, singular, right = left[:, there], singular[there], right[there] * x.any(0)
    gone = (left.T @ y).T / singular - (right @ w).T
    moved = -np.expm1(-(singular**2) * t.reshape(-1, *[1] * w.ndim))  # (T, [1,] K)
    return np.asarray(w + np.moveaxis((moved * gone) @ right, 1, -1))


def deep_flow(
    inputs: ArrayLike,
    targets: ArrayLike,
    times: ArrayLike,
    start: ArrayLike,
    depth: int,
    tolerance: float = 1e-12,
) -> Array:
    r"""Return the product of the weights of a deep linear student at ``times`` (T,): (T, N).

    A student of ``depth`` weight matrices and one output, balanced at its start
    (:math:`W_{l+1}^T W_{l+1} = W_l W_l^T`), moves its product :math:`w` by

    .. math:: \dot w = |w|^{2 - 2/L}\,\big(g + (L - 1)\,\hat w\,(\hat w \cdot g)\big),
              \qquad g = yX^T - wXX^T,\quad \hat w = w/|w|,

    which follows from the balance that gradient flow keeps (derived for this library). Each matrix
    has norm :math:`|w|^{1/L}`. ``start`` (N,) must not be 0 for a depth above 1: there nothing
    moves. The equation is integrated in the eigenbasis of the inputs (DOP853, the tolerance
    relative).

    >>> x, y = np.eye(2), np.array([1.0, 0.5])
    >>> deep_flow(x, y, [0.0, 50.0], start=[0.1, 0.1], depth=3).round(4)
    array([[0.1, 0.1],
           [1. , 0.5]])
    """
    from scipy.integrate import solve_ivp

    x, y = pair(inputs, targets)
    t, w = _not_negative("times", times).reshape(-1), _numbers("start", start)
    if y.ndim != 1 or w.shape != (x.shape[1],):
        raise RequestError(
            f"deep_flow takes one target an example and {x.shape[1]} initial weights, not "
            f"{y.shape[1:]} and {w.shape}."
        )
    if depth < 1 or (depth > 1 and not w.any()):
        raise RequestError(
            f"a student of depth {depth} starting at {'zero' if depth > 0 else 'no layers'} does "
            "not move: give it a depth of at least 1 and a small start that is not zero."
        )
    if (np.diff(t) < 0).any():
        raise RequestError("times of a deep student must not fall: sort them.")
    _, singular, right = np.linalg.svd(x, full_matrices=False)
    rate, drive = singular**2, right @ (x.T @ y)
    hidden = w - right.T @ (right @ w)  # what no input reaches moves only with the norm of w
    size = float(np.linalg.norm(hidden))

    def velocity(_: float, state: Array) -> Array:
        z, stretch = state[:-1], state[-1]
        norm = np.sqrt(z @ z + (stretch * size) ** 2)
        gradient = drive - rate * z
        along = (depth - 1) * (z @ gradient) / norm**2
        return np.asarray(
            norm ** (2 - 2 / depth) * np.append(gradient + along * z, along * stretch)
        )

    if depth == 1:
        return flow(x, y, t, w)
    solved = solve_ivp(
        velocity,
        (0.0, max(float(t.max(initial=0.0)), 1e-300)),
        np.append(right @ w, 1.0),
        "DOP853",
        t_eval=t,
        rtol=tolerance,
        atol=tolerance * max(1e-3, float(np.linalg.norm(w))) * 1e-2,
    )
    if not solved.success:
        raise RequestError(f"the deep student's flow could not be followed: {solved.message}")
    return np.asarray(solved.y[:-1].T @ right + solved.y[-1][:, None] * hidden)


def pair(inputs: ArrayLike, targets: ArrayLike) -> tuple[Array, Array]:
    """Return the two as float64 arrays of as many rows, or refuse them."""
    x, y = _matrix("inputs", inputs), _numbers("targets", targets)
    if x.ndim != 2 or y.ndim not in (1, 2) or len(x) != len(y):
        raise RequestError(
            f"inputs have shape {x.shape} and targets {y.shape}: give a row of inputs and a "
            "target for each example."
        )
    if not np.isfinite(y).all():
        raise RequestError("targets hold values that are not finite: remove those examples.")
    return x, y
