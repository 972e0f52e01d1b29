"""Search under a budget: within it, without waste, and better than random search."""

from __future__ import annotations

import math
import statistics
from functools import partial

import numpy as np
import pytest

from pantarhei.elastic.search import evolutionary, predictor_guided, random_search
from pantarhei.elastic.space import Space
from pantarhei.errors import RequestError

METHODS = (random_search, evolutionary, predictor_guided)
SPACE = Space({f"axis{i}": (1, 2, 3, 4, 5, 6) for i in range(6)})
GAIN = np.array([1.0, 0.2, 0.7, 0.4, 0.9, 0.1])
PRICE = np.array([0.5, 1.0, 0.3, 0.9, 0.6, 0.2])
BUDGET = 0.5 * PRICE.sum()


def point(choice):
    return np.array([choice[f"axis{i}"] for i in range(6)]) / 6


def quality(choice):
    """Concave in each axis, with an interaction: a wide first axis needs a wide third one."""
    u = np.log1p(4 * point(choice))
    return float(u @ GAIN + 0.5 * u[0] * u[2] - 0.3 * abs(u[3] - u[4]))


def price(choice):
    return float(point(choice) @ PRICE)


@pytest.mark.parametrize("method", METHODS)
def test_spends_what_it_may_stays_within_budget_and_repeats_nothing(method):
    seen = []

    def evaluate(choice):
        seen.append(choice)
        return quality(choice)

    found = method(SPACE, evaluate, price, BUDGET, 30, seed=3)
    assert len(seen) == len(set(seen)) == len(found.history) == 30
    assert all(price(c) <= BUDGET and c in SPACE for c in seen)
    assert [c for c, _ in found.history] == seen
    assert found.quality == max(q for _, q in found.history) == quality(found.choice)
    assert found.best_so_far[-1] == found.quality
    assert found.best_so_far == sorted(found.best_so_far)
    again = method(SPACE, quality, price, BUDGET, 30, seed=3)
    assert again.history == found.history
    assert method(SPACE, quality, price, BUDGET, 30, seed=4).history != found.history


@pytest.mark.parametrize(
    "method, seeds",
    # the cheap method over many seeds: five let chance decide
    [(evolutionary, range(30)), (partial(predictor_guided, candidates=100), range(5))],
)
def test_beats_random_search_at_equal_evaluations(method, seeds):
    best = max(quality(c) for c in SPACE if price(c) <= BUDGET)
    ours, random = (
        [best - m(SPACE, quality, price, BUDGET, 40, seed).quality for seed in seeds]
        for m in (method, random_search)
    )
    assert statistics.fmean(ours) < 0.7 * statistics.fmean(random)
    assert sum(a < b for a, b in zip(ours, random, strict=True)) >= 0.8 * len(seeds)


@pytest.mark.parametrize("method", METHODS)
def test_a_small_space_is_exhausted_once(method):
    space = Space({"width": (1, 2, 3), "depth": (1, 2)})

    def area(c):
        return c["width"] * c["depth"]

    found = method(space, area, area, 4, 50)
    assert sorted(q for _, q in found.history) == [1, 2, 2, 3, 4]
    assert area(found.choice) == 4
    alone = method(space, area, area, 1, 50)
    assert alone.choice == space.smallest and len(alone.history) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_few_choices_fit_and_an_enormous_space(method):
    huge = Space({f"a{i}": tuple(range(1, 9)) for i in range(30)})
    found = method(huge, lambda c: float(sum(c.values())), lambda c: sum(c.values()), 33, 8)
    assert len(found.history) == 8 and sum(found.choice.values()) <= 33


@pytest.mark.parametrize("method", METHODS)
def test_nan_is_the_worst_quality(method):
    def sometimes(choice):
        return math.nan if choice["axis0"] > 2 else quality(choice)

    found = method(SPACE, sometimes, price, BUDGET, 25, seed=1)
    assert math.isfinite(found.quality) and found.choice["axis0"] <= 2
    assert any(math.isnan(q) for _, q in found.history)
    nothing = method(SPACE, lambda c: math.nan, price, BUDGET, 5)
    assert math.isnan(nothing.quality) and len(nothing.history) == 5


@pytest.mark.parametrize("method", METHODS)
def test_bad_requests(method):
    with pytest.raises(RequestError, match="smallest costs"):
        method(SPACE, quality, price, 0.01, 10)
    with pytest.raises(RequestError, match="at least one evaluation"):
        method(SPACE, quality, price, BUDGET, 0)
