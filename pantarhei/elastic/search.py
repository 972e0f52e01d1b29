"""Search for the best sub-network under a budget, where the space is too large to measure whole.

The three methods share one signature, so one word changes the method::

    found = evolutionary(net.space, evaluate, cost, budget, evaluations=100, seed=0)

``evaluate(choice) -> float`` is dear (higher is better; NaN counts as worst) and called exactly
``evaluations`` times, never twice for a choice; ``cost(choice) -> float`` is cheap (for instance
``lambda c: net.cost(c).macs``) and must not fall when an axis grows. Where the space is small
enough to measure, :func:`pantarhei.elastic.frontier.frontier` needs no search at all.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from pantarhei.elastic.space import Choice, Space
from pantarhei.errors import RequestError


@dataclass(frozen=True)
class Found:
    """The best choice of a search, and every evaluation in order."""

    choice: Choice
    quality: float
    history: tuple[tuple[Choice, float], ...]

    @property
    def best_so_far(self) -> list[float]:
        """The best quality after each evaluation."""
        return list(np.fmax.accumulate([quality for _, quality in self.history]))


class _Search:
    """What the methods share: feasible choices, and evaluations counted and remembered."""

    def __init__(
        self,
        space: Space,
        evaluate: Callable[[Choice], float],
        cost: Callable[[Choice], float],
        budget: float,
        evaluations: int,
        seed: int,
    ) -> None:
        if evaluations < 1:
            raise RequestError(f"evaluations={evaluations}: allow at least one evaluation.")
        if not cost(space.smallest) <= budget:
            raise RequestError(
                f"No sub-network fits the budget {budget:g}: the smallest costs "
                f"{cost(space.smallest):g}."
            )
        self.space, self.cost, self.budget = space, cost, budget
        self._evaluate, self.evaluations = evaluate, evaluations
        self.random = random.Random(seed)
        self.seen: dict[Choice, float] = {}

    @property
    def left(self) -> int:
        """Evaluations that may still be made."""
        return self.evaluations - len(self.seen)

    def evaluate(self, choice: Choice) -> None:
        """Spend one evaluation; a quality that is not a number is the worst there is."""
        quality = float(self._evaluate(choice))
        self.seen[choice] = -math.inf if math.isnan(quality) else quality

    def fits(self, choice: Choice) -> bool:
        """Whether the choice is within the budget."""
        return self.cost(choice) <= self.budget

    def repaired(self, choice: Choice) -> Choice:
        """Shrink random axes step by step until the choice fits (cost never rises that way)."""
        while not self.fits(choice):
            axes = [a for a, values in self.space.axes.items() if choice[a] > values[0]]
            axis = self.random.choice(axes)
            values = self.space.axes[axis]
            choice = choice.replace(**{axis: values[values.index(choice[axis]) - 1]})
        return choice

    def filled(self, choice: Choice) -> Choice:
        """Grow random axes step by step while the choice fits: larger networks are rarely worse."""
        axes = list(self.space.axes)
        self.random.shuffle(axes)
        for axis in axes:
            values = self.space.axes[axis]
            for larger in values[values.index(choice[axis]) + 1 :]:
                if not self.fits(grown := choice.replace(**{axis: larger})):
                    break
                choice = grown
        return choice

    def uniform(self) -> Choice:
        """Draw uniformly from the choices that fit; where these are rare, shrink what was drawn."""
        for step in range(12):
            share = min(1.0, 1.5 - step / 10)
            drawn = {
                axis: values[self.random.randrange(math.ceil(share * len(values)))]
                for axis, values in self.space.axes.items()
            }
            if self.fits(choice := Choice(drawn)):
                break
        return self.repaired(choice)

    def mutated(self, choice: Choice, rate: float) -> Choice:
        """Change each axis with probability ``rate`` (one at least), mostly by a single step."""
        axes = [a for a in self.space.axes if self.random.random() < rate]
        changed: dict[str, float | int] = {}
        for axis in axes or [self.random.choice(list(self.space.axes))]:
            values = self.space.axes[axis]
            step = values.index(choice[axis]) + self.random.choice((-1, 1))
            near = values[min(max(step, 0), len(values) - 1)]
            changed[axis] = near if self.random.random() < 0.7 else self.random.choice(values)
        child = self.repaired(choice.replace(**changed))
        return self.filled(child) if self.random.random() < 0.5 else child

    def fresh(self, propose: Callable[[], Choice], tries: int = 50) -> Choice | None:
        """Return the first proposal not evaluated yet; None when the well seems dry."""
        for _ in range(tries):
            if (choice := propose()) not in self.seen:
                return choice
        return None

    def start(self, n: int) -> None:
        """Evaluate ``n`` random choices (fewer where the space has no more)."""
        for _ in range(min(n, self.left)):
            if (choice := self.fresh(self.uniform)) is not None:
                self.evaluate(choice)

    def found(self) -> Found:
        """Return the best choice, the cheapest of equals."""
        best = max(self.seen, key=lambda c: (self.seen[c], -self.cost(c)))
        history = tuple((c, math.nan if q == -math.inf else q) for c, q in self.seen.items())
        return Found(best, history[list(self.seen).index(best)][1], history)


def random_search(
    space: Space,
    evaluate: Callable[[Choice], float],
    cost: Callable[[Choice], float],
    budget: float,
    evaluations: int,
    seed: int = 0,
) -> Found:
    """Evaluate choices drawn uniformly from those that fit the budget: the baseline.

    >>> space = Space({"width": (1, 2, 3, 4), "depth": (1, 2, 3)})
    >>> area = lambda c: c["width"] * c["depth"]
    >>> str(random_search(space, area, area, budget=8, evaluations=10).choice)
    'depth=2 width=4'

    Raises :class:`RequestError` when not even the smallest choice fits.
    """
    search = _Search(space, evaluate, cost, budget, evaluations, seed)
    search.start(evaluations)
    return search.found()


def evolutionary(
    space: Space,
    evaluate: Callable[[Choice], float],
    cost: Callable[[Choice], float],
    budget: float,
    evaluations: int,
    seed: int = 0,
    *,
    parents: int = 4,
) -> Found:
    """Evolve choices within the budget: mutation and crossover of the best ones so far.

    A quarter of the evaluations is spent on random choices; then each child has either one parent
    of the best ``parents``, mutated, or two, mixed axis by axis; it is shrunk until it fits, and
    half of the children then grow to fill the budget
    (the search of Once-for-all, arXiv 1908.09791, one child at a time so that each counts).

    Raises :class:`RequestError` when not even the smallest choice fits.
    """
    search = _Search(space, evaluate, cost, budget, evaluations, seed)
    search.start(max(2, evaluations // 4))
    rate = 1.5 / max(1, len(space.axes))
    while search.left:
        best = sorted(search.seen, key=search.seen.__getitem__, reverse=True)[:parents]
        child = search.fresh(partial(_child, search, best, rate)) or search.fresh(search.uniform)
        if child is None:
            break
        search.evaluate(child)
    return search.found()


def _child(search: _Search, best: list[Choice], rate: float) -> Choice:
    # the better of two random ones: pressure without losing variety
    def parent() -> Choice:
        return best[min(search.random.randrange(len(best)) for _ in range(2))]

    if search.random.random() < 0.5:
        return search.mutated(parent(), rate)
    one, two = parent(), parent()
    mixed = {axis: search.random.choice((one, two))[axis] for axis in search.space.axes}
    return search.mutated(Choice(mixed), rate / 2)


def predictor_guided(
    space: Space,
    evaluate: Callable[[Choice], float],
    cost: Callable[[Choice], float],
    budget: float,
    evaluations: int,
    seed: int = 0,
    *,
    candidates: int = 500,
    explore: float = 1.0,
) -> Found:
    """Learn a cheap predictor of quality from what was evaluated and evaluate where it is best.

    After a quarter of the evaluations on random choices, a Gaussian process over the positions of
    the values along their axes is fitted again every few evaluations; of ``candidates`` cheap ones
    (random, and mutations of the best) that fit the budget, the one of the highest upper bound
    mean + ``explore`` * deviation is evaluated.

    Raises :class:`RequestError` when not even the smallest choice fits.
    """
    search = _Search(space, evaluate, cost, budget, evaluations, seed)
    search.start(max(2, evaluations // 4))
    batch = max(1, evaluations // 40)
    while search.left:
        pool = list(dict.fromkeys(_candidates(search, candidates)))
        if not pool:
            break
        mean, deviation = _predict(space, search.seen, pool)
        order = np.argsort(-(mean + explore * deviation), kind="stable")
        for index in order[: min(batch, search.left)]:
            search.evaluate(pool[index])
    return search.found()


def _candidates(search: _Search, n: int) -> Iterator[Choice]:
    """Yield choices that fit and were not evaluated: half random, half mutations of the best."""
    best = sorted(search.seen, key=search.seen.__getitem__, reverse=True)[:8]
    rate = 2.0 / max(1, len(search.space.axes))
    for i in range(n):
        parent = best[i % len(best)]
        choice = search.uniform() if i % 2 else search.mutated(parent, rate)
        if choice not in search.seen:
            yield choice


def _predict(
    space: Space, seen: Mapping[Choice, float], pool: list[Choice]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the quality of ``pool`` that a Gaussian process predicts, and its deviation."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    known = {choice: q for choice, q in seen.items() if math.isfinite(q)}
    if len(known) < 2:
        return np.zeros(len(pool)), np.zeros(len(pool))
    scales = np.ones(len(space.axes))  # one for each axis: some matter more than others
    kernel = ConstantKernel(1.0) * RBF(scales) + WhiteKernel(1e-3)
    model = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=_optimise, random_state=0)
    with warnings.catch_warnings():
        # an axis that does not matter has its scale at the bound, which is as it should be
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(_encode(space, known), np.array(list(known.values())))
    return model.predict(_encode(space, pool), return_std=True)


def _encode(space: Space, choices: Iterable[Choice]) -> np.ndarray:
    """Encode each axis as the position of its value, 0 to 1."""
    axes = space.axes.items()
    return np.array([[v.index(c[axis]) / max(1, len(v) - 1) for axis, v in axes] for c in choices])


def _optimise(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    bounds: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Fit the kernel's parameters; the last digits of its likelihood are not worth their time."""
    from scipy.optimize import minimize

    found = minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 40}
    )
    return found.x, found.fun
