"""The recursions against closed forms, the fact sheet's trial numbers and simulations."""

import itertools
import math

import pytest
import torch

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.recursions import joint_vertices, vertices
from pantarhei.probes.mean_field import Activation

DOUBLE = torch.float64
RATES = {"lambda_b": 0.7, "lambda_W": 1.3}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("K", (2, 2, 2, 2)),
        ("Theta", (2, 4, 6, 8)),
        ("V", (0, 20, 40, 60)),
        ("D", (0, 17, 51, 102)),
        ("F", (0, 8, 24, 48)),
        ("B", (0, 8, 40, 112)),
        ("A", (0, 17.65, 83.05, 226.3)),
        ("P", (0, 0, 0, 0)),
        ("G1", (0, 0, 0, 0)),
    ],
)
def test_relu_has_the_numbers_of_the_sheet(name, values):
    found = getattr(vertices("relu", 4, **RATES), name)
    torch.testing.assert_close(found, torch.tensor(values, dtype=DOUBLE), atol=1e-10, rtol=0)


def test_tanh_has_the_numbers_of_the_sheet():
    found = vertices("tanh", 3, 0.8, **RATES)
    for name, value, digits in (
        ("K", 0.2205, 1e-4), ("Theta", 2.3245, 2e-4), ("V", 0.0633, 1e-4), ("P", -0.740, 1e-3),
        ("Q", -0.325, 1e-3),
    ):  # fmt: skip
        assert float(getattr(found, name)[-1]) == pytest.approx(value, abs=digits)


def test_tanh_converges_as_slowly_as_the_sheet_says():
    found = vertices("tanh", 1000, 0.5)
    growth = found.V / found.K**2 / torch.arange(1, 1001)
    assert float(growth[199]) == pytest.approx(0.6586, abs=1e-4)
    assert float(growth[999]) == pytest.approx(0.6646, abs=1e-4)
    assert float(found.K[-1]) * 2 * 1000 == pytest.approx(1, rel=0.02)  # K ~ 1 / (-a1 l)


@pytest.mark.parametrize(
    ("name", "gamma", "cubic", "value"),
    [
        ("relu", 0.5, False, 17.8),
        ("relu", 0.5, True, 26.6),
        ("relu", 0.8, False, 7.8),
        ("relu", 0.8, True, 12.2),
        ("linear", 0.5, True, 9.4),
    ],
)
def test_residual_branches_have_the_numbers_of_the_sheet(name, gamma, cubic, value):
    found = vertices(name, 6, gamma=gamma, cubic=cubic)
    assert float((found.V / found.K**2)[-1]) == pytest.approx(value, abs=0.05)
    assert found.D is None
    with pytest.raises(RequestError, match="gamma=0"):
        _ = found.feature_learning


def exact_linear(widths, C_W):
    """Deep linear: G = C_W^l, E[z_i^2 z_j^2] = G^2 prod(1 + 2/n), so V/n = G^2 (prod - 1)."""
    values, product = [0.0], 1.0
    for layer, n in enumerate(widths, start=2):
        product *= 1 + 2 / n
        values.append(C_W ** (2 * layer) * (product - 1) * n)
    return torch.tensor(values, dtype=DOUBLE)


def test_leading_order_is_that_of_the_exact_deep_linear_vertex_at_any_widths():
    shape = torch.tensor([3.0, 1.0, 4.0, 2.0, 5.0])
    for C_W in (1.0, 1.3):
        for size in (1e4, 1e6):
            widths = [int(w * size) for w in shape]
            found = vertices("linear", 6, C_b=0, C_W=C_W, widths=widths).V
            exact = exact_linear(widths, C_W)
            torch.testing.assert_close(found, exact, rtol=40 / size, atol=1e-9)


def test_deep_linear_tangent_kernel_fluctuations():
    """Two layers, closed form: H = (b + w s^2) 1 + c W W^T, with s^2 the mean square."""
    c = RATES["lambda_b"] + RATES["lambda_W"]
    found = vertices("linear", 2, C_b=0, C_W=1, **RATES)
    # E[H_ij^2] = c^2 E[(w_i.w_j)^2] = c^2/n;  E[z_i z_j H_ij] = c E[z_i z_j w_i.w_j] = c/n.
    assert float(found.B[1]) == pytest.approx(c**2)
    assert float(found.F[1]) == pytest.approx(c)
    # Var of the mean square is 2/n: D = 2 w, and A = 2 w^2 (w_i.w_i, w_j.w_j are independent).
    assert float(found.D[1]) == pytest.approx(2 * RATES["lambda_W"])
    assert float(found.A[1]) == pytest.approx(2 * RATES["lambda_W"] ** 2)


def test_several_inputs_at_once_are_each_on_its_own():
    both = vertices("gelu", 3, torch.tensor([0.5, 2.0]))
    for index, x2 in enumerate((0.5, 2.0)):
        alone = vertices("gelu", 3, x2)
        for name in ("K", "Theta", "V", "A", "P", "Q", "G1"):
            torch.testing.assert_close(getattr(both, name)[:, index], getattr(alone, name))


def test_integration_by_parts_is_the_average_of_second_derivatives():
    act, K, C_W = Activation("gelu"), 1.7, 1.9
    x2 = (K - 0.2) / C_W
    found = vertices(act, 2, x2, C_b=0.2, C_W=C_W, **RATES)

    def integrand(z):
        return act(z) * act.derivative(z, 2) * act.derivative(z) ** 2

    Theta = RATES["lambda_b"] + RATES["lambda_W"] * x2
    value = C_W**2 * float(act.average(integrand, K)) * Theta**2
    assert float(found.P[1]) == pytest.approx(value, rel=1e-10)


def simulated(act, x, layers, width, networks, C_b, C_W):
    """Exact chain over networks: given a layer, the next is Gaussian with the mean's covariance."""
    generator = torch.Generator().manual_seed(0)
    g = (C_b + C_W * x @ x.T / x.shape[1]).expand(networks, -1, -1)
    for _ in range(layers - 1):
        noise = torch.randn(networks, width, len(x), generator=generator, dtype=DOUBLE)
        z = noise @ torch.linalg.cholesky(g).transpose(1, 2)
        g = C_b + C_W * torch.einsum("bia,bic->bac", act(z), act(z)) / width
    return g


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_the_joint_vertex_is_the_covariance_of_kernels(name):
    """V/n is exactly the covariance over networks of the kernel of the layer before."""
    act, width, networks = Activation(name), 64, 40_000
    x = torch.tensor([[1.0, 0.3, -0.5], [0.2, -1.1, 0.9]], dtype=DOUBLE)
    found = joint_vertices(act, 3, x, C_b=0.1, C_W=1.6)
    g = simulated(act, x, 3, width, networks, 0.1, 1.6)
    mean = g.mean(0)
    for index in itertools.product(range(2), repeat=4):
        i, j, k, m = index
        product = (g[:, i, j] - mean[i, j]) * (g[:, k, m] - mean[k, m]) * width
        error = float(product.std()) / networks**0.5
        theory = float(found.V[-1][index])
        # next order in 1/n: a few percent of the size at this width
        size = math.sqrt(float(found.V[-1][i, j, i, j] * found.V[-1][k, m, k, m]))
        assert abs(float(product.mean()) - theory) < 4 * error + 10 / width * size


@pytest.mark.parametrize("name", ["gelu", "relu", "hardtanh"])
def test_joint_recursions_contain_those_of_one_input(name):
    x = torch.tensor([[1.0, 1.0], [0.5, -1.0]], dtype=DOUBLE)
    setting = {"C_b": 0.1, "C_W": 1.5, "widths": (10, 20), **RATES}
    joint = joint_vertices(name, 3, x, **setting)
    for index, row in enumerate(x):
        alone = vertices(name, 3, row.square().mean(), **setting)
        torch.testing.assert_close(joint.K[:, index, index], alone.K, rtol=1e-8, atol=0)
        torch.testing.assert_close(joint.Theta[:, index, index], alone.Theta, rtol=1e-6, atol=0)
        own = joint.V[:, index, index, index, index]
        torch.testing.assert_close(own, alone.V, rtol=1e-5, atol=1e-9)
    V = joint.V[-1]
    torch.testing.assert_close(V, V.permute(2, 3, 0, 1))
    torch.testing.assert_close(V, V.permute(1, 0, 2, 3))


def test_the_same_input_twice_is_one_input():
    x = torch.tensor([[1.0, -0.4], [1.0, -0.4]], dtype=DOUBLE)
    found = joint_vertices("tanh", 3, x)
    for tensor in (found.K[-1], found.Theta[-1], found.V[-1]):
        torch.testing.assert_close(tensor, tensor.flatten()[0].expand_as(tensor))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: vertices("sigmoid", 3), "no critical point"),
        (lambda: vertices("relu", 0), "at least 1"),
        (lambda: vertices("relu", 3, widths=(5,)), "give n_1 to n_2"),
        (lambda: vertices("relu", 3, widths=(5, 6), gamma=0.5), "equal widths"),
        (lambda: vertices("relu", 3, lambda_b=(1.0, 2.0)), "2 entries for 3 layers"),
        (lambda: vertices("relu", 3, C_W=-1.0), "must be positive"),
        (lambda: vertices("relu", 3, 0.0), "no signal"),
        (lambda: joint_vertices("relu", 2, torch.zeros(3)), "finite matrix"),
        (lambda: joint_vertices("relu", 2, torch.ones(20, 2)), "at most 16"),
        (lambda: joint_vertices("relu", 2, torch.ones(2, 2), gamma=0.5), "four_point=False"),
    ],
)
def test_bad_requests_are_refused(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
