"""The Poisson problem on cells against a dense solve, for every choice of sides."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pantarhei.data.simulate.poisson import Laplacian

ONE = torch.ones(1, dtype=torch.float64)
SIDES = ("left", "right", "bottom", "top")


def dense(rows, columns, dx, dy, dirichlet):
    """The operator cell by cell: a ghost cell copies, or mirrors with the other sign."""
    found = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for i, j in itertools.product(range(rows), range(columns)):
        own = i * columns + j
        around = ((i, j - 1, dx), (i, j + 1, dx), (i - 1, j, dy), (i + 1, j, dy))
        for side, (a, b, width) in zip(SIDES, around, strict=True):
            if 0 <= a < rows and 0 <= b < columns:
                found[own, a * columns + b] += 1 / width**2
                found[own, own] -= 1 / width**2
            elif side in dirichlet:
                found[own, own] -= 2 / width**2
    return found


@pytest.mark.parametrize("count", range(5))
def test_every_choice_of_sides_equals_a_dense_solve(count):
    for dirichlet, (rows, columns, dx, dy) in itertools.product(
        itertools.combinations(SIDES, count), [(6, 6, 0.5, 0.5), (4, 7, 0.5, 0.2)]
    ):
        source = torch.randn(2, rows, columns, dtype=torch.float64)
        if not dirichlet:
            source -= source.mean((1, 2), keepdim=True)
        operator = dense(rows, columns, dx, dy, dirichlet)
        exact = torch.linalg.lstsq(operator, source.flatten(1).T, driver="gelsd").solution.T
        laplace = Laplacian((rows, columns), dx * ONE, dy * ONE, dirichlet)
        found = laplace.solve(source)
        torch.testing.assert_close(found.flatten(1), exact, atol=1e-10, rtol=0)
        if not dirichlet:  # a mean has no solution and is left out
            torch.testing.assert_close(laplace.solve(source + 3), found, atol=1e-10, rtol=0)


def test_each_case_has_a_spacing_of_its_own():
    source = torch.randn(2, 5, 7, dtype=torch.float64)
    dx, dy = torch.tensor([0.1, 2.0]), torch.tensor([0.3, 1.0])
    both = Laplacian((5, 7), dx, dy, ("right",)).solve(source)
    for i in range(2):
        one = Laplacian((5, 7), dx[i : i + 1], dy[i : i + 1], ("right",)).solve(source[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], one)


def test_poisson_solves_a_cosine_at_second_order():
    errors = []
    for n in (8, 16, 32):
        x = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        wanted = torch.cos(math.pi * x)[:, None] * torch.cos(2 * math.pi * x)
        found = Laplacian((n, n), ONE / n, ONE / n).solve(-5 * math.pi**2 * wanted[None])
        errors.append(float((found[0] - wanted).abs().max()))
    assert math.log2(errors[0] / errors[1]) > 1.9 and math.log2(errors[1] / errors[2]) > 1.9
