import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.probes import Eigen, Hessian, Operator, lanczos, power_iteration


def symmetric(size=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(size, size, generator=g).double()
    return a + a.T


def rotated(values, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g).double())[0]
    return q @ torch.diag(torch.as_tensor(values).double()) @ q.T


def expected(matrix, k, which):
    values = torch.linalg.eigvalsh(matrix)
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    return values[key.argsort()[:k]]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@settings(max_examples=30, deadline=None)
@given(
    size=st.integers(1, 60),
    k=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    which=st.sampled_from(["largest", "smallest", "magnitude"]),
    basis=st.sampled_from([None, 8]),
)
def test_lanczos_finds_the_values_of_the_dense_matrix(size, k, seed, which, basis):
    matrix, k = symmetric(size, seed), min(k, size)
    found = lanczos(matrix, k, which=which, tol=1e-9, basis=basis, max_products=5000)
    assert found.converged and found.values.shape == (k,)
    torch.testing.assert_close(found.values, expected(matrix, k, which), rtol=1e-8, atol=1e-10)
    residual = matrix @ found.vectors - found.vectors * found.values
    torch.testing.assert_close(residual.norm(dim=0), found.residuals, rtol=1e-2, atol=1e-9)
    torch.testing.assert_close(
        found.vectors.T @ found.vectors, torch.eye(k).double(), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_power_iteration_finds_them_too_with_many_more_products(which):
    matrix = rotated([5.0, 4.0, 3.0, *torch.linspace(-0.5, 1, 40).tolist(), -3.5, -4.5])
    power = power_iteration(matrix, 3, which=which, tol=1e-4, max_products=10**4)
    quick = lanczos(matrix, 3, which=which, tol=1e-6)
    wanted = expected(matrix, 3, which)
    torch.testing.assert_close(power.values, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(quick.values, wanted, rtol=1e-6, atol=0)
    assert power.converged and 3 * quick.products < power.products
    overlap = power.vectors.T @ power.vectors
    torch.testing.assert_close(overlap, torch.eye(3).double(), rtol=0, atol=1e-10)


def test_a_quadratic_loss_is_exact_and_gradient_descent_diverges_past_two_over_its_top():
    """L = sum lambda_i theta_i^2 / 2: sharpness is max lambda, 2 / lambda the last stable rate."""
    scale = torch.tensor([0.5, 3.0, 7.0, 1.0]).double()

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.theta = nn.Parameter(torch.ones(4).double())

        def forward(self, x):
            return scale.sqrt() * self.theta * x

    def loss(model, x):
        return model(x).square().sum() / 2

    one = torch.ones(()).double()
    hessian = Hessian(Quadratic(), loss, one)
    for find in (lanczos, power_iteration):
        assert find(hessian, tol=1e-12, max_products=2000).top == pytest.approx(7.0, rel=1e-12)
    assert lanczos(hessian, 4, tol=1e-12).values.tolist() == pytest.approx([7, 3, 1, 0.5])
    for factor, stable in ((0.99, True), (1.01, False)):
        model = Quadratic()
        sgd = torch.optim.SGD(model.parameters(), lr=factor * 2 / 7)
        for _ in range(2000):
            sgd.zero_grad()
            loss(model, one).backward()
            sgd.step()
        assert (loss(model, one).item() < 1e-8) == stable


def test_power_iteration_returns_negative_curvature_early_in_training():
    """The sheet's pitfall on a network: the largest magnitude is negative, the sharpness is not."""
    matrix = rotated([2.0, 1.5, *torch.linspace(0, 1, 30).tolist(), -3.0])
    assert power_iteration(matrix).top == pytest.approx(-3.0, rel=1e-3)
    assert power_iteration(matrix, which="largest").top == pytest.approx(2.0, rel=1e-3)
    assert lanczos(matrix).top == pytest.approx(2.0, rel=1e-3)

    # Targets far above, units on the convex side of tanh: the residual part is negative and rules.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    nn.init.constant_(net[0].bias, -0.8)
    nn.init.constant_(net[2].weight, 0.3)
    batch = (torch.ones(1, 2).double(), torch.tensor([[30.0]]).double())
    first = {"parameters": lambda name, p: name.startswith("0")}
    hessian = Hessian(net, lambda m, b: F.mse_loss(m(b[0]), b[1]), batch, **first)
    values = torch.linalg.eigvalsh(hessian.dense())
    assert -values[0] > 2 * values[-1] > 0
    plain = power_iteration(hessian, max_products=5000).top
    assert plain == pytest.approx(values[0].item(), rel=1e-3)
    shifted = power_iteration(hessian, which="largest", max_products=5000).top
    assert shifted == pytest.approx(values[-1].item(), rel=1e-3)
    assert lanczos(hessian).top == pytest.approx(values[-1].item(), rel=1e-3)


def test_a_warm_start_saves_products_and_notices_a_newcomer():
    values = [5.0, 4.9, *torch.logspace(0.6, -3, 300).tolist()]
    matrix = rotated(values)
    cold = lanczos(matrix, tol=1e-4)
    noise = 1e-3 * symmetric(len(values), seed=1) / 30
    warm = lanczos(matrix + noise, tol=1e-4, start=cold)
    again = lanczos(matrix + noise, tol=1e-4)
    assert warm.top == pytest.approx(again.top, rel=2e-4)
    assert 2 * warm.products <= again.products
    newcomer = torch.linalg.eigh(matrix)[1][:, 100]
    risen = matrix + 8.0 * torch.outer(newcomer, newcomer)
    assert lanczos(risen, tol=1e-4, start=cold).top == pytest.approx(
        torch.linalg.eigvalsh(risen)[-1].item(), rel=2e-4
    )


def test_warm_start_over_training_of_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 4))
    batch = (torch.randn(64, 10), torch.randint(4, (64,)))
    sgd, last, spent = torch.optim.SGD(net.parameters(), lr=0.2), None, [0, 0]
    for _ in range(10):
        hessian = Hessian(net, cross_entropy, batch)
        cold, last = lanczos(hessian), lanczos(hessian, start=last)
        assert last.top == pytest.approx(cold.top, rel=2e-3)
        spent[0], spent[1] = spent[0] + cold.products, spent[1] + last.products
        for _ in range(2):
            sgd.zero_grad()
            cross_entropy(net, batch).backward()
            sgd.step()
    assert spent[1] < 0.8 * spent[0]


def test_multiple_eigenvalues_are_found_as_often_as_they_occur():
    matrix = rotated([4.0] * 5 + [1.0] * 50)
    found = lanczos(matrix, 6, tol=1e-8).values
    torch.testing.assert_close(found, torch.tensor([4.0] * 5 + [1.0]).double())
    assert lanczos(torch.eye(5), 3).values.tolist() == pytest.approx([1, 1, 1])
    assert lanczos(torch.zeros(5, 5), 2).values.tolist() == [0, 0]


def test_an_eigenvector_as_start_does_not_hide_the_top():
    matrix = torch.diag(torch.arange(1.0, 31).double())
    start = torch.zeros(30).double()
    start[3] = 1
    assert lanczos(matrix, start=start).top == pytest.approx(30, rel=1e-3)
    assert power_iteration(matrix, start=start).top == pytest.approx(30, rel=1e-3)


def test_the_bound_on_products_is_kept_and_said():
    matrix = symmetric(200)
    for find in (lanczos, power_iteration):
        operator = Operator.of(matrix)
        found = find(operator, 2, tol=1e-10, max_products=15)
        assert not found.converged and found.products == operator.products
        assert found.products <= 15 + 2  # power iteration looks at each vector once at least
        assert isinstance(found, Eigen) and found.vectors.isfinite().all()


def test_an_eigenvalue_lies_within_the_residual_and_usually_much_nearer():
    matrix = rotated([3.0, 2.0, *torch.linspace(-1, 1, 80).tolist()])
    found = lanczos(matrix, tol=1e-2)
    assert abs(found.top - 3.0) <= 0.1 * found.residuals[0] <= 3e-3


def test_single_precision_reaches_its_tolerance():
    matrix = rotated([10.0, 9.0, *torch.linspace(-5, 5, 200).tolist()])
    found = lanczos(matrix.float(), 2, tol=1e-5)
    assert found.converged
    assert found.values.tolist() == pytest.approx([10.0, 9.0], rel=2e-5)


def test_the_global_generators_are_left_alone():
    state = copy.deepcopy(torch.get_rng_state())
    first = lanczos(symmetric(), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.vectors, lanczos(symmetric(), 2).vectors)
    assert not torch.equal(first.vectors, lanczos(symmetric(), 2, seed=1).vectors)


def test_bad_requests_are_one_sentence():
    matrix = symmetric(10)
    for find in (lanczos, power_iteration):
        with pytest.raises(RequestError, match="k=11"):
            find(matrix, 11)
        with pytest.raises(RequestError, match="Did you mean 'largest'"):
            find(matrix, which="larges")
        with pytest.raises(RequestError, match="tol=0"):
            find(matrix, tol=0)
        with pytest.raises(RequestError, match="max_products=1"):
            find(matrix, 2, max_products=1)
        with pytest.raises(RequestError, match="not all zero"):
            find(matrix, start=torch.zeros(10).double())
        with pytest.raises(RequestError, match="give a vector of 10"):
            find(matrix, start=torch.ones(4))
        with pytest.raises(RequestError, match="not finite"):
            find(matrix * float("nan"))
    with pytest.raises(RequestError, match="basis=3 is too small"):
        lanczos(matrix, 2, basis=3)


def test_an_operator_may_return_its_argument():
    def scaled(rows):
        return rows.mul_(1) if rows.dim() == 1 else rows

    identity = Operator(scaled, 12, dtype=torch.float64)
    assert lanczos(identity, 2).values.tolist() == pytest.approx([1, 1])
    assert power_iteration(identity, 2).values.tolist() == pytest.approx([1, 1])
