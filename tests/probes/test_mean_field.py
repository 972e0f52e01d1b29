# ruff: noqa: SIM300 - C_W is a quantity, not a constant
"""Gaussian averages, susceptibilities and critical points against closed forms."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.probes.mean_field import (
    ACTIVATIONS,
    Activation,
    critical_gain,
    critical_point,
    susceptibilities,
)

DOUBLE = torch.float64


def rough(z):
    """Smooth but for a jump, a kink and a jump of curvature, none at a round place."""
    step = torch.where(z > 0.7123, 1.0, 0.0)
    return torch.tanh(z) + 0.3 * step + torch.relu(z + 1.4142) + 0.5 * torch.relu(z - 2.2) ** 2


def test_kinks_are_found_where_they_are():
    kinks = Activation(rough).kinks
    torch.testing.assert_close(kinks, torch.tensor([-1.4142, 0.7123, 2.2], dtype=DOUBLE))
    assert Activation("elu").kinks.tolist() == [0.0]  # only its second derivative jumps
    assert Activation(nn.Hardswish()).kinks.tolist() == [-3.0, 3.0]
    assert Activation(lambda z: torch.tanh(50 * z)).kinks.numel() == 0
    for name in ("tanh", "sin", "gelu", "silu", "mish", "softplus", "linear"):
        assert Activation(name).kinks.numel() == 0


@pytest.mark.parametrize("K", [0.01, 1.0, 14.0, 400.0])
@pytest.mark.parametrize("function", ["relu", "tanh", "gelu", "hardtanh", rough])
def test_averages_agree_with_adaptive_quadrature(function, K):
    act = Activation(function)
    points = sorted({*(act.kinks / math.sqrt(K)).clamp(-11, 11).tolist(), 0.0})
    ends = [-12.0, *points, 12.0]

    def integrand(u):
        z = torch.tensor(math.sqrt(K) * u, dtype=DOUBLE)
        return float(act(z)) ** 2 * math.exp(-u * u / 2) / math.sqrt(2 * math.pi)

    parts = [
        quad(integrand, a, b, epsabs=1e-13, epsrel=1e-12, limit=400)[0]
        for a, b in itertools.pairwise(ends)
    ]
    measured = act.average(lambda z: act(z) ** 2, K)
    assert float(measured) == pytest.approx(sum(parts), rel=1e-9)


def test_averages_are_vectorised_over_kernels_and_functions():
    act, K = Activation("tanh"), torch.tensor([[0.0, 0.5], [2.0, 30.0]], dtype=DOUBLE)
    both = act.average(lambda z: torch.stack([z**2, act(z) ** 2]), K)
    torch.testing.assert_close(both[0], K)
    for at in ((0, 1), (1, 1)):
        assert both[1][at] == pytest.approx(float(act.average(lambda z: act(z) ** 2, K[at])))
    assert both[1, 0, 0] == 0


def test_averages_that_do_not_exist_are_refused():
    act = Activation(torch.sinh)
    half = float(act.average(lambda z: act(z) ** 2, 0.5))
    assert half == pytest.approx((math.exp(1) - 1) / 2)
    with pytest.raises(RequestError, match="does not exist"):
        act.average(lambda z: act(z) ** 2, 200.0)
    with pytest.raises(RequestError, match="not negative"):
        act.average(act, -1.0)


def test_relu_is_critical_at_every_kernel():
    K = torch.logspace(-6, 6, 25, dtype=DOUBLE)
    parallel, perpendicular, h = susceptibilities("relu", K, 2.0)
    for chi in (parallel, perpendicular):
        torch.testing.assert_close(chi, torch.ones_like(K), atol=1e-12, rtol=0)
    assert float((h * K).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["tanh", "gelu", "elu", "hardtanh", "softplus"])
def test_susceptibilities_are_derivatives(name):
    act, step = Activation(name), 1e-4
    K, C_W = torch.tensor([0.3, 2.0], dtype=DOUBLE), 1.7
    parallel, perpendicular, h = susceptibilities(name, K, C_W, gamma=0.5)

    def moved(by):
        return act.average(lambda z: torch.stack([act(z), act.derivative(z)]) ** 2, K + by) * C_W

    square, slope = (moved(step) - moved(-step)) / (2 * step)
    torch.testing.assert_close(parallel, 0.25 + square, rtol=1e-6, atol=0)
    torch.testing.assert_close(perpendicular, 0.25 + moved(0.0)[1])
    torch.testing.assert_close(h, slope / 2, rtol=1e-5, atol=1e-9)


def test_susceptibilities_reach_their_limit_at_zero():
    at_zero = susceptibilities("gelu", 0.0, 2.0)
    near = susceptibilities("gelu", 1e-7, 2.0)
    for limit, value in zip(at_zero, near, strict=True):
        assert float(value) == pytest.approx(float(limit), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "C_b", "C_W", "K"),
    [
        ("gelu", 0.17292239, 1.98305826, 3.56155281),
        ("swish", 0.55514317, 1.98800468, 14.3201736),
    ],
)
def test_half_stable_fixed_points(name, C_b, C_W, K):
    found = critical_point(name)
    assert found.universality == "half-stable"
    assert found.C_b == pytest.approx(C_b, abs=1e-8)
    assert found.C_W == pytest.approx(C_W, abs=1e-8)
    assert found.K == pytest.approx(K, abs=2e-7)
    act = Activation(name)
    kernel = found.C_b + found.C_W * act.average(lambda z: act(z) ** 2, found.K)
    assert float(kernel) == pytest.approx(found.K, abs=1e-10)
    parallel, perpendicular, _ = susceptibilities(name, found.K, found.C_W)
    assert float(parallel) == pytest.approx(1, abs=1e-10)
    assert float(perpendicular) == pytest.approx(1, abs=1e-10)
    if name == "gelu":
        assert found.K == pytest.approx((3 + math.sqrt(17)) / 2, abs=1e-9)


def test_swish_is_not_the_misplaced_digit():
    """A bias variance of 0.0555, which circulates, leaves K = 14.32 no fixed point."""
    act, found = Activation("swish"), critical_point("swish")
    kernel = 0.055514317 + found.C_W * act.average(lambda z: act(z) ** 2, found.K)
    assert abs(float(kernel) - found.K) > 0.4


@pytest.mark.parametrize("name", ["sigmoid", "softplus", "cos", lambda z: z**2, lambda z: z**3])
def test_no_critical_point_is_said_and_no_negative_variance_given(name):
    found = critical_point(torch.cos if name == "cos" else name)
    assert found.universality == "none" and found.C_b is None and found.C_W is None
    assert found.reason


def test_classes_and_coefficients():
    sin, erf_ = critical_point("sin"), critical_point("erf")
    assert (sin.universality, sin.C_W, sin.a1, sin.b1) == ("K*=0", 1.0, -1.0, -1.0)
    assert erf_.C_W == pytest.approx(math.pi / 4)
    leaky = critical_point(nn.LeakyReLU(0.2))
    A2, A4 = (1 + 0.2**2) / 2, (1 + 0.2**4) / 2
    assert leaky.universality == "scale-invariant"
    assert leaky.C_W == pytest.approx(1 / A2) and leaky.nu == pytest.approx(3 * A4 / A2**2 - 1)
    assert critical_point("linear").nu == pytest.approx(2)
    assert critical_point("elu").a1 is None and critical_point("elu").universality == "K*=0"
    skewed = critical_point(lambda z: torch.tanh(z) + 0.4 * torch.tanh(z) ** 2)
    assert skewed.a1 == pytest.approx(-2 + 0.75 * 0.64)
    assert skewed.b1 == pytest.approx(-2 + 0.64)
    # the quadratic term wins: K = 0 is unstable
    assert critical_point(lambda z: torch.tanh(z) + torch.tanh(z) ** 2).universality != "K*=0"


def test_every_named_activation_has_a_verdict():
    for name in ACTIVATIONS:
        found = critical_point(name)
        assert (found.C_W is None) == (found.universality == "none")
        assert found.C_b is None or found.C_b >= 0


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8])
def test_residual_nu(gamma):
    """The book's formulas without the cubic vertex, and the K* = 0 class's with either."""
    g = gamma**2
    for name, A2, A4 in (("relu", 0.5, 0.5), ("linear", 1, 1)):
        book = (1 - g) * ((1 - g) * (3 * A4 / A2**2 - 1) + 4 * g)
        found = critical_point(name, gamma, cubic=False)
        assert found.nu == pytest.approx(book) and found.C_W == pytest.approx((1 - g) / A2)
    assert critical_point("linear", gamma).nu == pytest.approx((1 - g) * (2 * (1 - g) + 4 * g))
    assert critical_point("tanh", gamma).nu == pytest.approx(2 / 3 * (1 - gamma**4))
    parallel, perpendicular, _ = susceptibilities("relu", 3.0, 2 * (1 - g), gamma)
    assert float(parallel) == pytest.approx(1) and float(perpendicular) == pytest.approx(1)


def test_residual_critical_point_of_the_half_stable_class():
    found, act = critical_point("gelu", 0.6), Activation("gelu")
    kernel = 0.36 * found.K + found.C_b + found.C_W * act.average(lambda z: act(z) ** 2, found.K)
    assert float(kernel) == pytest.approx(found.K)
    for chi in susceptibilities("gelu", found.K, found.C_W, 0.6)[:2]:
        assert float(chi) == pytest.approx(1)


def test_critical_gain():
    assert critical_gain("tanh") == (1.0, 0.0)
    assert critical_gain("linear").gain == pytest.approx(1)
    assert critical_gain("relu").gain == pytest.approx(math.sqrt(2))
    assert critical_gain("erf").gain == pytest.approx(math.sqrt(math.pi) / 2)
    act = Activation("sigmoid")
    gain, q = critical_gain(act)
    square, slope = act.average(lambda z: torch.stack([act(z), act.derivative(z)]) ** 2, q)
    assert gain**2 * float(square) == pytest.approx(q)
    assert gain**2 * float(slope) == pytest.approx(1)
    with pytest.raises(RequestError, match="no critical gain"):
        critical_gain("softplus")


def relu_pair(a, b, c):
    """E relu(x) relu(y), independently of the library: Cho and Saul's arc-cosine kernel."""
    theta = math.acos(c / math.sqrt(a * b))
    angle = math.sin(theta) + (math.pi - theta) * math.cos(theta)
    return math.sqrt(a * b) * angle / (2 * math.pi)


def test_pairs_against_closed_forms():
    rows = torch.tensor([0.5, 2.0], dtype=DOUBLE)
    columns = torch.tensor([1.0, 0.3, 4.0], dtype=DOUBLE)
    K = torch.tensor([[0.2, -0.3, 0.1], [1.3, 0.0, -2.7]], dtype=DOUBLE)
    relu, erf_ = (
        Activation("relu").pairs(K, rows, columns),
        Activation("erf").pairs(K, rows, columns),
    )
    slope = Activation("erf").pairs(K, rows, columns, order=1)
    for i, a in enumerate(rows.tolist()):
        for j, b in enumerate(columns.tolist()):
            c = float(K[i, j])
            assert float(relu[i, j]) == pytest.approx(relu_pair(a, b, c), rel=1e-10)
            # Williams 1998
            sine = 2 * c / math.sqrt((1 + 2 * a) * (1 + 2 * b))
            assert float(erf_[i, j]) == pytest.approx(2 / math.pi * math.asin(sine), abs=1e-10)
            other = 4 / math.pi / math.sqrt((1 + 2 * a) * (1 + 2 * b) - 4 * c * c)
            assert float(slope[i, j]) == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("name", ["tanh", "gelu", "hardtanh", "elu"])
def test_pairs_of_an_input_with_itself_are_single_averages(name):
    act, K = Activation(name), torch.tensor([0.2, 1.5, 9.0], dtype=DOUBLE)
    for order in (0, 1):
        single = act.average(lambda z, n=order: act.derivative(z, n) ** 2, K)
        both = act.pairs(K.diag() * 0 + K[:, None].minimum(K), K, K, order)
        torch.testing.assert_close(both.diag(), single, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["tanh", "elu"])
def test_series_and_quadrature_in_two_dimensions_agree(name):
    act = Activation(name)
    K = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=DOUBLE)
    a, b = K[0, :1], K[1, 1:]
    series = act._series(K[:1, 1:] / (a[:, None] * b).sqrt(), a, b, 0)
    plane = act.joint_average(lambda z: act(z).prod(-1), K)
    assert float(series) == pytest.approx(float(plane), abs=1e-6)


def test_joint_averages_are_those_of_wick():
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=DOUBLE)
    K = root @ root.T
    wick = K[0, 1] * K[2, 3] + K[0, 2] * K[1, 3] + K[0, 3] * K[1, 2]
    for act in (Activation("tanh"), Activation("relu")):
        found = act.joint_average(lambda z: z.prod(-1), K)
        # with kinks: a finite number of nodes in each of four dimensions
        size = 3e-6 * K.diag().prod().sqrt() if len(act.kinks) else 1e-12
        torch.testing.assert_close(found, wick, atol=float(size), rtol=1e-7)
    # singular: two of the four inputs are the same
    same = K[[0, 0, 1, 1]][:, [0, 0, 1, 1]]
    found = Activation("tanh").joint_average(lambda z: z.prod(-1), same)
    torch.testing.assert_close(found, K[0, 0] * K[1, 1] + 2 * K[0, 1] ** 2)


def test_hermite_series_of_the_gaussian_cdf():
    """Independent of the library: E Phi(x)^2 = 1/4 + arcsin(K / (1 + K)) / 2 pi."""
    act = Activation(lambda z: (1 + torch.erf(z / math.sqrt(2))) / 2)
    K = torch.tensor([2.0], dtype=DOUBLE)
    value = float(act.pairs(K[:, None], K, K))
    assert value == pytest.approx(0.25 + math.asin(2 / 3) / (2 * math.pi))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("rleu", "Did you mean 'relu'"),
        ("torch:nothing_here", "cannot be imported"),
        (nn.Softmax(-1), "not elementwise"),
        (lambda z: z.numpy() + 0, "differentiated twice"),
        (lambda z: z[:2], "not elementwise"),
    ],
)
def test_bad_activations_are_refused(given, sentence):
    with pytest.raises(RequestError, match=sentence):
        Activation(given)
    with pytest.raises(RequestError, match="gamma=1"):
        critical_point("relu", 1.0)


def test_a_module_is_left_as_it_was():
    module = nn.PReLU()
    critical_point(module)
    assert module.weight.dtype == torch.float32 and module.weight.requires_grad
    assert Activation("torch:tanh").average(torch.square, 1.0) == pytest.approx(1)
