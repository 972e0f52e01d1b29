"""Splits by subset, tables across subsets, distance and speed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.data.simulate.flow import cavity, generate
from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.systems.flow.benchmark import (
    across_subsets,
    against_distance,
    mixed,
    mixes,
    speed_at_equal_error,
    split_by_subset,
)
from pantarhei.systems.flow.evaluation import Persistence, mean, one_step
from pantarhei.systems.flow.surrogate import Surrogate
from pantarhei.systems.parameters import ParameterScale


def three_subsets(count=30):
    """Fields that double each frame in subset 1 and are constant elsewhere."""
    subset = np.arange(count) % 3
    growth = np.where(subset == 1, 2.0, 1.0)
    states = growth[:, None, None, None, None] ** np.arange(4)[:, None, None, None]
    return Trajectories.of(
        np.broadcast_to(states, (count, 4, 2, 4, 4)).copy(), channels=("u", "v"),
        parameters=np.stack([np.arange(count), subset], 1), parameter_names=("size", "subset"),
        settings={"subset_names": ["bc", "prop", "geo"]},
    )  # fmt: skip


def test_the_split_is_by_case_disjoint_and_stable():
    data = three_subsets()
    parts = split_by_subset(data, seed=4)
    assert list(parts) == ["bc", "prop", "geo"]
    everything = [c for p in parts.values() for c in (*p.train, *p.development, *p.test)]
    assert sorted(everything) == list(range(30))
    for number, part in enumerate(parts.values()):
        assert [len(part.train), len(part.development), len(part.test)] == [8, 1, 1]
        assert all(case % 3 == number for case in (*part.train, *part.development, *part.test))
    assert parts == split_by_subset(data, seed=4) != split_by_subset(data, seed=5)


def test_a_mix_joins_the_parts_so_that_no_test_case_is_trained_on():
    parts = split_by_subset(three_subsets())
    for name in mixes(list(parts)):
        joined = mixed(parts, name)
        for other in parts.values():
            assert not set(joined.train) & set(other.test)
    assert mixed(parts, "all") == mixed(parts, "bc+prop+geo")
    with pytest.raises(RequestError, match="Did you mean 'geo'"):
        mixed(parts, "bc+ge")


def test_a_table_has_the_error_of_every_pair():
    data = three_subsets()
    rows = across_subsets({"bc": Persistence()}, data, split_by_subset(data))
    assert [(r["trained_on"], r["tested_on"]) for r in rows] == [
        ("bc", "bc"), ("bc", "prop"), ("bc", "geo"),
    ]  # fmt: skip
    assert [r["nmse_u"] for r in rows] == pytest.approx([0, 0.25, 0])


def test_error_stands_beside_distance():
    data = three_subsets()
    rows = against_distance(Persistence(), data, [0, 3, 6], [6, 9])
    sd = np.std([0, 3, 6])
    assert [r["distance"] for r in rows] == pytest.approx([0, 3 / sd])


class Slow(nn.Module):
    channels = 2

    def step(self, field, omega, mask):
        return 1.5 * field + 0.1


def test_speed_is_that_of_the_cheapest_solver_as_good():
    problem = cavity(500)
    cases = problem.cases(bc=2)
    data = generate(problem, cases, cells=16, frames=6)
    net = Surrogate(Slow(), [0], ParameterScale(torch.zeros(1), torch.ones(1)))
    rows = speed_at_equal_error(
        net, problem, cases, data, [0, 1], [{"cells": 8}, {"cells": 16}], steps=5
    )
    assert [r["who"] for r in rows] == ["model", "cells=8", "cells=16"]
    assert rows[2]["nmse_u"] < 1e-9 < rows[1]["nmse_u"] < rows[0]["nmse_u"]
    assert [r["equal"] for r in rows[1:]].count(True) == 1 and rows[0]["speedup"] > 0

    exact = speed_at_equal_error(net, problem, cases, data, [0, 1], [], steps=5)
    assert math.isnan(exact[0]["speedup"])


def test_means_over_cases_agree_with_the_rows():
    data = three_subsets()
    rows = one_step(Persistence(), data, [0, 1])
    assert mean(rows, "nmse_u") == pytest.approx(0.125)
