import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.probes import Hessian, Operator, hutch_pp, hutchinson


def rotated(values, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g).double())[0]
    return q @ torch.diag(torch.as_tensor(values).double()) @ q.T


@settings(max_examples=20, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=20), seed=st.integers(0, 1000))
def test_hutchinson_is_exact_for_diagonal_matrices(values, seed):
    matrix = torch.diag(torch.tensor(values, dtype=torch.float64))
    for products in (1, 3):
        found = hutchinson(matrix, products, seed=seed)
        assert found.value == pytest.approx(sum(values), abs=1e-9)


def test_hutchinson_has_the_mean_and_variance_of_the_formula():
    matrix = rotated(torch.linspace(0.1, 2, 30).tolist())
    off = matrix - torch.diag(matrix.diagonal())
    one = Operator.of(matrix)
    found = hutchinson(one, 20000)
    deviation = math.sqrt(2 * off.square().sum() / 20000)
    assert found.error == pytest.approx(deviation, rel=0.05)
    assert abs(found.value - matrix.trace()) < 4 * deviation
    assert found.products == one.products == 20000


def test_hutch_pp_has_less_variance_at_equal_products_on_a_decaying_spectrum():
    values = [1 / (i + 1) ** 2 for i in range(100)]
    matrix, products = rotated(values), 30
    errors = {
        method: torch.tensor([method(matrix, products, seed=s).value for s in range(60)]).double()
        - sum(values)
        for method in (hutchinson, hutch_pp)
    }
    spread = {method: e.square().mean().sqrt().item() for method, e in errors.items()}
    assert spread[hutch_pp] < 0.2 * spread[hutchinson]
    for e in errors.values():  # and neither is biased
        assert e.mean().abs() < 4 * e.std() / math.sqrt(len(e))


def test_hutch_pp_is_exact_where_the_sketch_holds_the_matrix():
    values = [5.0, -3.0, 2.0] + [0.0] * 40
    operator = Operator.of(rotated(values))
    found = hutch_pp(operator, 18)
    assert found.value == pytest.approx(4.0, abs=1e-10) and found.error < 1e-10
    assert found.products == operator.products == 18
    whole = hutch_pp(rotated([5.0, -3.0, 2.0]), 90)  # more products than the matrix has columns
    assert whole.value == pytest.approx(4.0, abs=1e-10) and whole.error == 0 and whole.products == 6


def test_trace_of_a_network_against_the_dense_matrix():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    batch = (torch.randn(20, 6).double(), torch.randint(3, (20,)))
    hessian = Hessian(net, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch)
    exact = hessian.dense().trace().item()
    state = torch.get_rng_state()
    for method in (hutchinson, hutch_pp):
        found = method(hessian, 60)
        assert abs(found.value - exact) < 4 * found.error
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_requests_are_one_sentence():
    matrix = torch.eye(4)
    with pytest.raises(RequestError, match="products=0"):
        hutchinson(matrix, 0)
    with pytest.raises(RequestError, match="products=2: choose at least 3"):
        hutch_pp(matrix, 2)
    with pytest.raises(RequestError, match="not finite"):
        hutchinson(matrix * float("inf"), 3)
    assert math.isnan(hutchinson(matrix, 1).error)
