"""What a flow model does for conditions it has not seen: subsets, distance, speed.

A set of cases comes in subsets that vary one thing each (boundary values, fluid properties,
geometry). Whole cases are split within each subset, so that the parts of any mix of subsets are the
unions of theirs and a model trained on one mix may be tested on every other.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pantarhei.data.simulate.flow.cases import Case, Problem
from pantarhei.data.trajectories import Trajectories
from pantarhei.data.windows import split
from pantarhei.errors import RequestError, nearest
from pantarhei.rollout import nmse
from pantarhei.systems.flow.evaluation import distances, mean, multi_step, one_step, subset_of
from pantarhei.systems.flow.surrogate import columns_of, inputs_of


@dataclass(frozen=True)
class Parts:
    """Case numbers for training, for choosing (development), and for testing."""

    train: tuple[int, ...]
    development: tuple[int, ...]
    test: tuple[int, ...]


def split_by_subset(
    data: Trajectories, seed: int = 0, shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
) -> dict[str, Parts]:
    """Split the cases of each subset 8:1:1 (one at least to each part), the same for a seed."""
    groups: dict[str, list[int]] = {}
    for case in range(len(data)):
        groups.setdefault(subset_of(data, case), []).append(case)
    found = {}
    for subset, cases in groups.items():
        numbers = np.array(cases)
        parts = (tuple(numbers[part].tolist()) for part in split(len(cases), shares, seed))
        found[subset] = Parts(*parts)
    return found


def mixes(subsets: Sequence[str]) -> list[str]:
    """Name every mix of subsets: CFDBench's seven, of three.

    >>> mixes(["bc", "prop", "geo"])
    ['bc', 'prop', 'geo', 'bc+prop', 'bc+geo', 'prop+geo', 'bc+prop+geo']
    """
    return [
        "+".join(chosen)
        for count in range(1, len(subsets) + 1)
        for chosen in itertools.combinations(subsets, count)
    ]


def mixed(parts: Mapping[str, Parts], mix: str) -> Parts:
    """Return the parts of a mix such as ``"bc+geo"``; ``"all"`` is every subset."""
    names = list(parts) if mix == "all" else mix.split("+")
    for name in names:
        if name not in parts:
            raise RequestError(
                f"There is no subset '{name}': choose among {', '.join(parts)}, joined by '+', or "
                f"'all'.{nearest(name, parts)}"
            )

    def union(which: str) -> tuple[int, ...]:
        return tuple(case for name in names for case in getattr(parts[name], which))

    return Parts(union("train"), union("development"), union("test"))


def across_subsets(
    models: Mapping[str, Any], data: Trajectories, parts: Mapping[str, Parts]
) -> list[dict[str, Any]]:
    """Test models, named by the mix they were trained on, on every subset.

    A row per pair: ``trained_on``, ``tested_on``, and the means of :func:`.one_step` over the test
    cases.
    """
    rows = []
    for mix, model in models.items():
        for subset, part in parts.items():
            found = one_step(model, data, part.test)
            row: dict[str, Any] = {"trained_on": mix, "tested_on": subset, "cases": len(found)}
            columns = ("nmse_u", "nmse_v", "nmse", "nmse_floored")
            rows.append(row | {column: mean(found, column) for column in columns})
    return rows


def against_distance(
    model: Any, data: Trajectories, training: Sequence[int], cases: Sequence[int]
) -> list[dict[str, Any]]:
    """Return each case's one-step error beside its distance from the nearest training case.

    The distance is of the problem's own parameters, standardised by the training cases.
    """
    columns = columns_of(data, inputs_of(data))
    assert data.parameters is not None
    table = data.parameters[:, columns]
    far = distances(table[list(training)], table[list(cases)])
    return [
        row | {"distance": float(d)}
        for row, d in zip(one_step(model, data, cases), far, strict=True)
    ]


def speed_at_equal_error(
    model: Any,
    problem: Problem,
    cases: Sequence[Case],
    data: Trajectories,
    rows: Sequence[int],
    coarser: Sequence[Mapping[str, Any]],
    steps: int = 20,
    device: str | torch.device = "cpu",
) -> list[dict[str, Any]]:
    """Time the model and the solver at several resolutions, each with its error over the horizon.

    ``coarser`` are the solver's options, cheapest first; its frames are interpolated to the grid
    of ``data``, whose cases ``rows`` were solved from ``cases``. The first row is the model; the
    cheapest solver that is at least as good is marked ``equal``, and ``speedup`` is its time over
    the model's. It is NaN where none is: the model is then better than all the solvers tried. The
    solver's start before the first frame (a wake's transient) counts for the solver.
    """
    truth = data.tensor(rows, 1, steps + 1)

    def timed_model() -> float:
        return float(multi_step(model, data, rows, steps).curve.mean())

    timed_model()  # warm
    began = time.perf_counter()
    error = timed_model()
    spent = time.perf_counter() - began
    found: list[dict[str, Any]] = [{"who": "model", "seconds": spent, "nmse_u": error}]
    for options in coarser:
        began = time.perf_counter()
        solution = problem.solve(cases, frames=steps + 1, device=device, **options)
        taken = time.perf_counter() - began
        states = solution.states[:, 1:].flatten(0, 1).float()
        fine = F.interpolate(states, truth.shape[-2:], mode="bilinear", align_corners=False)
        mask = torch.from_numpy(data.masks()[list(rows)]).repeat_interleave(steps, 0)[:, None]
        aim = truth.flatten(0, 1)
        gap = float(nmse(fine[:, :1] * mask, aim[:, :1] * mask).mean())
        name = " ".join(f"{key}={value}" for key, value in options.items())
        found.append({"who": name, "seconds": taken, "nmse_u": gap})
    good = [row for row in found[1:] if row["nmse_u"] <= error]
    best = min(good, key=lambda row: row["seconds"]) if good else None
    for row in found[1:]:
        row["equal"] = row is best
    found[0]["speedup"] = best["seconds"] / spent if best else float("nan")
    return found
