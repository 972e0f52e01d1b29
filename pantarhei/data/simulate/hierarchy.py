r"""Items in a tree: features that diffuse from the root to the leaves, flipping on their way.

The data of the theory of staged learning (Saxe, McClelland and Ganguli, arXiv 1312.6120; the
generative model is theirs of 2013): a network that learns the items' features learns the broad
distinctions first and the fine ones last.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pantarhei.errors import RequestError

Array = NDArray[np.float64]


def hierarchy(
    branching: int = 2, depth: int = 3, flip: float = 0.1, features: int = 100, seed: int = 0
) -> tuple[Array, Array]:
    r"""Return inputs (P, P) and targets (P, features) of the P = branching^depth leaves of a tree.

    Each feature is +1 or -1 at the root with equal chance, and every child has its parent's value,
    flipped with probability ``flip``. Inputs name the item, one by one, scaled so that they are
    white: :math:`\tfrac1P\sum_\mu x x^T = I`.

    >>> x, y = hierarchy()
    >>> x.shape, y.shape, sorted(set(y.ravel().tolist()))
    ((8, 8), (8, 100), [-1.0, 1.0])
    """
    _check(branching, depth, flip)
    if features < 1:
        raise RequestError(f"A tree has one feature or more, not {features}.")
    rng = np.random.default_rng(seed)
    values = rng.choice([-1.0, 1.0], (1, features))
    for _ in range(depth):
        values = values.repeat(branching, 0)
        values = np.where(rng.random(values.shape) < flip, -values, values)
    return np.sqrt(len(values)) * np.eye(len(values)), values


def hierarchy_strengths(branching: int, depth: int, flip: float, features: int = 100) -> Array:
    r"""Return the expected strength of the modes by level, (depth + 1,): broadest first.

    Two leaves whose last common ancestor is d levels above them have correlated features,
    :math:`q^d` with :math:`q = (1-2\,\mathrm{flip})^2`. The eigenvectors are the constant and the
    contrasts between the children of a node; the root of features/P times the eigenvalue is the
    singular value of the input-output correlation for many features. The contrasts below a node
    at level l, of which there are (b - 1) b^l, have the eigenvalue

    .. math:: 1 + \sum_{d=1}^{D-l-1} q^d (b-1) b^{d-1} - q^{D-l} b^{D-l-1},

    the constant that sum up to D. Strengths fall from level to level.

    >>> hierarchy_strengths(2, 3, 0.1, 100).round(2).tolist()
    [6.62, 4.2, 3.2, 2.12]
    """
    _check(branching, depth, flip)
    b, q = branching, (1 - 2 * flip) ** 2
    d = np.arange(1, depth + 1)
    within = np.concatenate([[0.0], np.cumsum(q**d * (b - 1) * b ** (d - 1.0))]) + 1
    below = depth - np.arange(depth)
    contrasts = within[below - 1] - q**below * b ** (below - 1.0)
    return np.sqrt(np.concatenate([within[-1:], contrasts]) * features / b**depth)


def _check(branching: int, depth: int, flip: float) -> None:
    if branching < 2 or depth < 1 or branching**depth > 10**5:
        raise RequestError(
            f"A tree of branching {branching} and depth {depth} is no use: branch in 2 or more, 1 "
            "to some levels deep, with at most 100,000 leaves."
        )
    if not 0 <= flip <= 0.5:
        raise RequestError(f"The probability to flip is between 0 and 0.5, not {flip}.")
