from __future__ import annotations

import pytest
import torch

from pantarhei.data.simulate.poisson import solve_neumann


@pytest.mark.parametrize(("rows", "columns", "dx", "dy"), [(6, 6, 0.5, None), (4, 7, 0.5, 0.2)])
def test_the_poisson_solver_equals_a_dense_solve(rows, columns, dx, dy):
    source = torch.randn(2, rows, columns, dtype=torch.float64)
    source -= source.mean((1, 2), keepdim=True)
    dense = torch.zeros(rows * columns, rows * columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            up, right = dy or dx, dx
            around = ((i + 1, j, up), (i - 1, j, up), (i, j + 1, right), (i, j - 1, right))
            for a, b, side in around:
                if 0 <= a < rows and 0 <= b < columns:
                    dense[i * columns + j, a * columns + b] += 1 / side**2
                    dense[i * columns + j, i * columns + j] -= 1 / side**2
    exact = torch.linalg.lstsq(dense, source.flatten(1).T, driver="gelsd").solution.T
    found = solve_neumann(source, dx, dy)
    torch.testing.assert_close(found.flatten(1), exact, atol=1e-10, rtol=0)
    moved = solve_neumann(source + 3, dx, dy)  # a mean has no solution and is left out
    torch.testing.assert_close(moved, found, atol=1e-10, rtol=0)
