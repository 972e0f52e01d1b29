"""The forward equations against automatic differentiation, the estimators against theory."""

import itertools

import pytest
import torch
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.monte_carlo import (
    Layer,
    first_layer,
    measure,
    next_layer,
    pair_means,
)
from pantarhei.learning.effective_theory.recursions import vertices
from pantarhei.probes.mean_field import Activation
from pantarhei.probes.tangent_kernel import differential, ntk

DOUBLE = torch.float64
RATES = ((0.75, 1.25), (0.5, 2.0), (1.125, 0.625))


class Residual(nn.Module):
    def __init__(self, layers, activation, gamma):
        super().__init__()
        self.layers, self.activation, self.gamma = layers, activation, gamma

    def forward(self, x):
        z = self.layers[0](x)
        for layer in self.layers[1:]:
            z = self.gamma * z + layer(self.activation(z))
        return z


def network(activation, gamma, seed=0):
    torch.manual_seed(seed)
    n = 4
    layers = nn.ModuleList(nn.Linear(n, n) for _ in range(3)).double()
    for parameter in layers.parameters():
        nn.init.normal_(parameter)
    model = Residual(layers, activation, gamma)
    rates = {}
    for index, (b, W) in enumerate(RATES):
        linear = layers[index]
        rates[f"layers.{index}.bias"] = torch.full_like(linear.bias, b)
        rates[f"layers.{index}.weight"] = torch.full_like(linear.weight, W / linear.in_features)
    return model, rates


def carried(model, x, act, gamma, dntk):
    layers = model.layers
    z = layers[0](x)
    layer = first_layer(z, float(x.square().mean()), *RATES[0], dntk=dntk)
    for linear, (b, W) in zip(layers[1:], RATES[1:], strict=True):
        layer = next_layer(layer, linear.weight[None], linear.bias[None], act, b, W, gamma)
    return layer


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("gamma", [0.0, 0.6])
def test_tangent_kernel_is_that_of_autograd(name, gamma):
    act = Activation(name)
    model, rates = network(act, gamma)
    x = torch.randn(1, 4, dtype=DOUBLE)
    with torch.no_grad():
        layer = carried(model, x, act, gamma, dntk=False)
        torch.testing.assert_close(layer.z, model(x), atol=1e-12, rtol=0)
    theirs = ntk(model, x, rates=rates)[0, 0]
    torch.testing.assert_close(layer.H[0].detach(), theirs.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu"])
def test_differential_of_the_tangent_kernel_is_that_of_autograd(name):
    act = Activation(name)
    model, rates = network(act, 0.0)
    x = torch.randn(1, 4, dtype=DOUBLE)
    with torch.no_grad():
        layer = carried(model, x, act, 0.0, dntk=True)
    theirs = differential(model, x, rates=rates).reshape(4, 4, 4)
    assert theirs.abs().max() > 0.01
    torch.testing.assert_close(layer.dH[0], theirs.detach(), atol=1e-10, rtol=0)


def test_pair_means_leave_coincident_indices_out():
    torch.manual_seed(0)
    n = 5
    H = torch.randn(2, n, n, dtype=DOUBLE)
    layer = Layer(torch.randn(2, n, dtype=DOUBLE), H + H.mT, torch.randn(2, n, n, n, dtype=DOUBLE))
    found = pair_means(layer)
    z, H, dH = layer.z, layer.H, layer.dH
    pairs = list(itertools.permutations(range(n), 2))

    def mean(f):
        return sum(f(i, j) for i, j in pairs) / len(pairs)

    slow = {
        "zz": mean(lambda i, j: z[:, i] ** 2 * z[:, j] ** 2),
        "T": mean(lambda i, j: z[:, i] * z[:, j] ** 2),
        "zH": mean(lambda i, j: z[:, i] ** 2 * H[:, j, j]),
        "HH": mean(lambda i, j: H[:, i, i] * H[:, j, j]),
        "F": mean(lambda i, j: z[:, i] * z[:, j] * H[:, i, j]),
        "B": mean(lambda i, j: H[:, i, j] ** 2),
        "P": mean(lambda i, j: dH[:, i, j, j] * z[:, i]),
        "Q": mean(lambda i, j: (dH[:, i, i, j] + dH[:, i, j, i]) / 2 * z[:, j]),
    }
    for name, value in slow.items():
        torch.testing.assert_close(found[name], value)


def agrees(found, theory, name, layer, bias, size=None):
    """Within 4 standard errors and the next order in 1/n."""
    value, error = float(found[name][layer]), float(found.errors[name][layer])
    expected = float(theory[layer])
    size = abs(expected) if size is None else float(size[layer].abs())
    assert abs(value - expected) < 4 * error + bias * size + 1e-12, (name, layer)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_every_vertex_is_that_of_the_recursion(name):
    n, rates = 24, {"lambda_b": 0.7, "lambda_W": 1.3}
    found = measure(name, (n,) * 3, 0.8, networks=1500, dntk=True, **rates)
    theory = vertices(name, 3, 0.8, **rates)
    nu = 5 if name == "relu" else 2 / 3
    for vertex in ("Theta", "V", "D", "F", "A", "B", "P", "Q"):
        for layer in (1, 2):
            # P of ReLU is 0 to leading order: the next one is of the size of Q
            size = theory.Q if vertex == "P" else None
            bias = 1.5 * nu * layer / n + 2 / n
            agrees(found, getattr(theory, vertex), vertex, layer, bias, size)


def test_a_narrow_tanh_network_has_a_smaller_kernel():
    n = 20
    found = measure("tanh", (n,) * 4, networks=200_000)
    theory = vertices("tanh", 4)
    for layer in range(1, 4):
        shift = float(found["G"][layer] - theory.K[layer]) * n
        error = float(found.errors["G"][layer]) * n
        expected = float(theory.G1[layer])
        assert abs(shift - expected) < 4 * error + 0.15 * abs(expected)
        assert layer == 1 or abs(expected) > 5 * error


def test_wide_to_narrow():
    widths, rates = (40, 10, 20), {"lambda_b": 0.5, "lambda_W": 1.5}
    found = measure("tanh", widths, 0.5, networks=6000, C_W=2.0, C_b=0.1, ntk=True, **rates)
    theory = vertices("tanh", 3, 0.5, C_W=2.0, C_b=0.1, widths=widths[:-1], **rates)
    for vertex in ("V", "D", "F", "A", "B"):
        agrees(found, getattr(theory, vertex), vertex, 2, 0.15)


def test_the_exact_deep_linear_law():
    n, layers = 20, 6
    found = measure("linear", (n,) * layers, networks=100_000)
    for layer in range(layers):
        exact = n * ((1 + 2 / n) ** layer - 1)
        assert abs(float(found["V"][layer]) - exact) < 4 * float(found.errors["V"][layer])


def test_cubic_vertex_of_residual_relu():
    n = 200
    found = measure("relu", (n,) * 4, networks=40_000, gamma=0.5)
    theory = vertices("relu", 4, gamma=0.5)
    agrees(found, theory.T, "T", 3, 0.08)
    agrees(found, theory.V, "V", 3, 0.08)
    # the book's formula without T lies outside
    book = float(vertices("relu", 4, gamma=0.5, cubic=False).V[3])
    assert float(found["V"][3]) - book > 8 * float(found.errors["V"][3])


def test_with_and_without_weights_the_same_law():
    plain = measure("relu", (16,) * 3, networks=20_000, seed=1)
    drawn = measure("relu", (16,) * 3, networks=20_000, seed=2, ntk=True)
    for name in ("G", "V"):
        error = (plain.errors[name] ** 2 + drawn.errors[name] ** 2).sqrt()
        assert bool(((plain[name] - drawn[name]).abs() < 4 * error + 1e-12).all())


def test_standard_errors_are_those_of_repetitions():
    runs = [measure("relu", (10,) * 3, networks=400, seed=seed) for seed in range(60)]
    for name in ("G", "V"):
        spread = torch.stack([run[name][2] for run in runs]).std()
        said = torch.stack([run.errors[name][2] for run in runs]).mean()
        assert 0.6 < float(said / spread) < 1.6


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: measure("relu", (1, 5)), "at least 2"),
        (lambda: measure("relu", ()), "at least 2"),
        (lambda: measure("relu", (4, 4), networks=1), "at least 2"),
        (lambda: measure("relu", (4, 5), gamma=0.5), "equal widths"),
        (lambda: measure("relu", (4, 4), gamma=0.5, dntk=True), "gamma=0 only"),
    ],
)
def test_bad_requests_are_refused(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
