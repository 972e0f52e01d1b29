import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.probes import GaussNewton, Operator, spectral_density
from pantarhei.probes.density import tridiagonal


@settings(max_examples=20, deadline=None)
@given(size=st.integers(2, 30), seed=st.integers(0, 10**6), steps=st.integers(1, 8))
def test_moments_are_exact_to_order_two_m_minus_one(size, seed, steps):
    """Signs see a diagonal matrix's moments exactly, and m steps keep 2 m - 1 of them."""
    g = torch.Generator().manual_seed(seed)
    values = 2 * torch.rand(size, generator=g).double() - 1
    density = spectral_density(torch.diag(values), steps=steps, probes=2, seed=seed)
    for order in range(2 * min(steps, size)):
        assert density.moment(order) == pytest.approx((values**order).mean().item(), abs=1e-10)


def test_quadrature_is_what_the_start_vector_sees():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20, 20, generator=g).double()
    matrix = (a + a.T) / 10
    start = torch.randn(3, 20, generator=g).double()
    start /= start.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(tridiagonal(Operator.of(matrix), start, 5))
    for order in range(10):
        exact = ((start @ torch.linalg.matrix_power(matrix, order)) * start).sum(1)
        quadrature = (vectors[:, 0] ** 2 * values**order).sum(1)
        torch.testing.assert_close(quadrature, exact, rtol=1e-9, atol=1e-12)


def test_density_counts_the_eigenvalues_of_a_network_and_integrates_to_one():
    """Rank 8 of 128: all but 8 eigenvalues of G are zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1, bias=False)).double()
    batch = (torch.randn(8, 6).double(), torch.randn(8, 1).double())
    operator = GaussNewton(net, lambda m, b: F.mse_loss(m(b[0]), b[1]), batch)
    density = spectral_density(operator, steps=20, probes=40)
    assert density.products == operator.products <= 800
    dense = operator.dense()
    exact = torch.linalg.eigvalsh(dense)
    zero = (exact.abs() < 1e-8).double().mean().item()
    assert density.fraction(-1e-8, 1e-8) == pytest.approx(zero, abs=0.02)
    deviation = (2 / 40 * (dense - torch.diag(dense.diagonal())).square().sum()).sqrt().item()
    assert abs(density.moment(1) * density.size - exact.sum().item()) < 4 * deviation
    assert density.nodes.max() == pytest.approx(exact[-1].item(), rel=1e-6)
    grid = torch.linspace(-2, exact[-1].item() + 2, 4001).double()
    assert torch.trapezoid(density(grid, 0.1), grid).item() == pytest.approx(1, abs=1e-6)
    assert density(grid).shape == grid.shape


def test_an_exhausted_krylov_space_keeps_its_weights():
    density = spectral_density(torch.diag(torch.tensor([2.0, 2, 2, 7]).double()), steps=4, probes=3)
    assert density.fraction(1.9, 2.1) == pytest.approx(0.75)
    assert density.fraction(6.9, 7.1) == pytest.approx(0.25)
    assert density.weights.sum(1).tolist() == pytest.approx([1, 1, 1])


def test_bad_requests_are_one_sentence():
    with pytest.raises(RequestError, match="steps=0"):
        spectral_density(torch.eye(3), steps=0)
    with pytest.raises(RequestError, match="probes=0"):
        spectral_density(torch.eye(3), probes=0)
    with pytest.raises(RequestError, match="not finite"):
        spectral_density(torch.eye(3) * float("nan"))
