# ruff: noqa: SIM300 - C_W is a quantity, not a constant
"""Initialisation and rates on real modules, and the wide-limit predictor against wide networks."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.recursions import joint_vertices, vertices
from pantarhei.learning.effective_theory.training import (
    InfiniteWidth,
    critical_init_,
    find_activation,
    parameter_groups,
    rates,
    weighted_layers,
)
from pantarhei.probes.mean_field import critical_point
from pantarhei.probes.tangent_kernel import ntk

DOUBLE = torch.float64


def mlp(activation, width, depth, outputs=1, inputs=8):
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.body = nn.Conv2d(64, 64, 3, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.act = nn.GELU()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.act(self.norm(self.body(self.act(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def test_convolutions_and_linear_layers_get_the_critical_variances():
    torch.manual_seed(0)
    model = Convolutional()
    norm = {k: v.clone() for k, v in model.norm.state_dict().items()}
    rows = critical_init_(model)
    point = critical_point("gelu")
    assert [(r.name, r.fan_in) for r in rows] == [("stem", 27), ("body", 288), ("head", 64)]
    assert rows[0].C_W == pytest.approx(point.K - point.C_b)  # the first kernel is K*
    assert rows[1].C_W == rows[2].C_W == point.C_W
    for row in rows:
        layer = model.get_submodule(row.name)
        entries = layer.weight.numel()
        spread = float(layer.weight.detach().var()) * row.fan_in / row.C_W
        assert spread == pytest.approx(1, abs=5 * math.sqrt(2 / entries))
    assert float(model.stem.bias.detach().var()) == pytest.approx(point.C_b, rel=0.6)
    for name, value in model.norm.state_dict().items():
        assert torch.equal(value, norm[name])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_a_deep_network_keeps_its_signal_only_when_critical(activation):
    """The kernel of layer 12, over inputs of any scale, is what the theory says."""
    x = 3.0 * F.normalize(torch.randn(40, 8), dim=1) * math.sqrt(8)
    theory = vertices(activation.__name__.lower(), 12).K
    if activation is nn.GELU:
        theory = torch.full((12,), critical_point("gelu").K)
    for scale, kept in ((1.0, True), (0.5, False)):
        torch.manual_seed(1)
        model = mlp(activation, 400, 12, outputs=400)
        critical_init_(model, x2=9.0, scale=scale)
        with torch.no_grad():
            kernel = float(model(x).square().mean())
        close = abs(kernel / float(theory[-1]) - 1) < 0.4
        assert close == kept


def test_generator_makes_it_reproducible_and_scale_off_criticality():
    first, second = mlp(nn.Tanh, 20, 3), mlp(nn.Tanh, 20, 3)
    critical_init_(first, generator=torch.Generator().manual_seed(3))
    critical_init_(second, generator=torch.Generator().manual_seed(3), scale=4.0)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(b, 2 * a)


def test_shared_layers_count_once():
    shared = nn.Linear(5, 5)
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), shared, nn.ReLU(), shared)
    tied = nn.Linear(5, 5)
    tied.weight = shared.weight
    model.append(tied)
    assert [name for name, _ in weighted_layers(model)] == ["0", "2"]


def test_rates_by_class():
    b, W = rates("relu", 5, lambda_b=2.0, lambda_W=3.0)
    assert b == [0.4] * 5 and W == [0.6] * 5
    b, W = rates("sin", 4)  # odd: p = 1
    assert b == [1, 1 / 2, 1 / 3, 1 / 4] and W == [1.0] * 4

    def skewed(z):
        return torch.tanh(z) + 0.4 * torch.tanh(z) ** 2

    p = (-2 + 0.64) / (-2 + 0.75 * 0.64)
    b, W = rates(skewed, 8)
    for layer in (1, 3, 8):
        assert b[layer - 1] == pytest.approx(layer**-p * 8 ** (p - 1))
        assert W[layer - 1] == pytest.approx((8 / layer) ** (p - 1))


def shares(name, depth, b, W):
    """Each layer's own part of the tangent kernel: Theta with the other layers' rates 0."""
    parts = []
    for layer in range(depth):
        only = [[0.0] * depth, [0.0] * depth]
        only[0][layer], only[1][layer] = b[layer], W[layer]
        parts.append(float(vertices(name, depth, lambda_b=only[0], lambda_W=only[1]).Theta[-1]))
    return torch.tensor(parts)


@pytest.mark.parametrize("name", ["relu", "tanh", "elu"])
def test_rates_make_layers_count_alike(name):
    depth = 14
    part = shares(name, depth, *rates(name, depth))
    bounds = {"relu": 1e-9, "elu": 1e-9, "tanh": 1.2}[name]  # tanh: of the same order
    assert float(part[1:].max() / part[1:].min()) < 1 + bounds
    if name == "tanh":
        uniform = shares(name, depth, [1.0] * depth, [0.0] * depth)
        assert float(uniform.max() / uniform.min()) > 5


def test_parameter_groups_step_as_the_theory_does():
    """A step of SGD moves theta by lr lambda grad, with lambda_W over the fan-in."""
    torch.manual_seed(0)
    model = nn.Sequential(mlp(nn.Tanh, 6, 3), nn.LayerNorm(1)).double()
    x = torch.randn(5, 8, dtype=DOUBLE)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, 0.5, lambda_b=2.0, lambda_W=3.0))
    model(x).square().sum().backward()
    optimizer.step()
    b, W = rates("tanh", 3, lambda_b=2.0, lambda_W=3.0)
    for name, parameter in model.named_parameters():
        factor = 1.0
        if name.startswith("0."):
            layer = int(name.split(".")[1]) // 2
            fan_in = before[f"0.{2 * layer}.weight"].shape[1]
            factor = b[layer] if name.endswith("bias") else W[layer] / fan_in
        torch.testing.assert_close(parameter, before[name] - 0.5 * factor * parameter.grad)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_kernels_are_those_of_wide_networks(name):
    """The tangent kernel of wide random networks, averaged, by automatic differentiation."""
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    module = {"relu": nn.ReLU, "tanh": nn.Tanh}[name]
    found = []
    for _ in range(12):
        model = mlp(module, 300, 3)
        critical_init_(model)
        lrs = {g["name"]: g["lr"] for g in parameter_groups(model, 1.0)}
        found.append(ntk(model, x, kind="trace", rates=lrs).detach())
    b, W = rates(name, 3)
    theta = InfiniteWidth(name, 3, lambda_b=b, lambda_W=W).kernels(x)[1]
    mean = torch.stack(found).double().mean(0)
    assert float((mean - theta).norm() / theta.norm()) < 0.05


def test_kernels_are_the_joint_recursion_and_agree_between_blocks():
    x = torch.randn(6, 5, dtype=DOUBLE)
    for name in ("gelu", "relu", "hardtanh"):
        wide = InfiniteWidth(name, 4, C_b=0.2, C_W=1.4, lambda_b=0.5, lambda_W=2.0)
        joint = joint_vertices(
            name, 4, x, C_b=0.2, C_W=1.4, lambda_b=0.5, lambda_W=2.0, four_point=False
        )
        K, Theta = wide.kernels(x)
        torch.testing.assert_close(K, joint.K[-1], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(Theta, joint.Theta[-1], rtol=1e-6, atol=1e-9)
        block = wide.kernels(x[:2], x[2:])
        torch.testing.assert_close(block[0], K[:2, 2:], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(block[1], Theta[:2, 2:], rtol=1e-7, atol=1e-9)


def test_descent_is_the_recursion_of_the_theory():
    """z <- z - eta Theta (z - y), step by step, on training and test inputs."""
    torch.manual_seed(0)
    x, y, test = torch.randn(7, 4), torch.randn(7, 2), torch.randn(3, 4)
    wide = InfiniteWidth("tanh", 3)
    eta = 0.4 * wide.largest_rate(x)
    z, t = torch.randn(7, 2, dtype=DOUBLE), torch.randn(3, 2, dtype=DOUBLE)
    Theta, cross = wide.kernels(x)[1], wide.kernels(test, x)[1]
    start, test_start = z.clone(), t.clone()
    steps = [0, 1, 5, 40]
    trained, tested = wide.descend(
        x, y, test, eta=eta, steps=steps, start=start, test_start=test_start
    )
    for step in range(41):
        if step in steps:
            index = steps.index(step)
            torch.testing.assert_close(trained[index], z, atol=1e-9, rtol=1e-9)
            torch.testing.assert_close(tested[index], t, atol=1e-9, rtol=1e-9)
        error = z - y
        z, t = z - eta * Theta @ error, t - eta * cross @ error
    last, test_last = wide.descend(x, y, test, eta=eta, steps=math.inf)
    torch.testing.assert_close(last[0], y.double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(test_last[0], cross @ torch.linalg.solve(Theta, y.double()))


def test_a_rate_between_one_and_two_oscillates_and_converges():
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    wide = InfiniteWidth("relu", 2)
    eta = 0.9 * wide.largest_rate(x)
    one, _ = wide.descend(x, y, x, eta=eta, steps=[1.0])
    Theta = wide.kernels(x)[1]
    torch.testing.assert_close(one[0], eta * Theta @ y.double())


def test_a_wide_network_trains_as_predicted():
    torch.manual_seed(0)
    x, test = torch.randn(10, 8), torch.randn(5, 8)
    y = x[:, :1] * x[:, 1:2]
    model = mlp(nn.ReLU, 1500, 3)
    critical_init_(model)
    b, W = rates("relu", 3)
    wide = InfiniteWidth("relu", 3, lambda_b=b, lambda_W=W)
    eta, steps = 0.25 * wide.largest_rate(x), 60
    with torch.no_grad():
        start, test_start = model(x), model(test)
    _, told = wide.descend(x, y, test, eta=eta, steps=[steps], start=start, test_start=test_start)
    optimizer = torch.optim.SGD(parameter_groups(model, eta))
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / 2).backward()
        optimizer.step()
    with torch.no_grad():
        moved, expected = model(test) - test_start, told[0].float() - test_start
    assert float((moved - expected).norm() / expected.norm()) < 0.25
    assert float(expected.norm()) > 0.3


def test_bayes_is_gaussian_process_regression():
    torch.manual_seed(0)
    x, y, test = torch.randn(6, 3), torch.randn(6, 2), torch.randn(4, 3)
    wide = InfiniteWidth("gelu", 3)
    mean, variance = wide.bayes(x, y, test, noise=0.1)
    K, own, cross = wide.kernels(x)[0], wide.kernels(test)[0], wide.kernels(test, x)[0]
    inverse = torch.linalg.inv(K + 0.1 * torch.eye(6, dtype=DOUBLE))
    torch.testing.assert_close(mean, cross @ inverse @ y.double())
    torch.testing.assert_close(variance, (own - cross @ inverse @ cross.T).diag())
    interpolated, none_left = wide.bayes(x, y, x)
    torch.testing.assert_close(interpolated, y.double(), atol=1e-7, rtol=0)
    assert float(none_left.abs().max()) < 1e-8


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: critical_init_(nn.ReLU()), "no nn.Linear"),
        (lambda: critical_init_(nn.Linear(2, 2)), "name it"),
        (lambda: critical_init_(nn.Sequential(nn.LazyLinear(2), nn.ReLU())), "is lazy"),
        (lambda: critical_init_(nn.Linear(2, 2), "sigmoid"), "no critical point"),
        (lambda: critical_init_(nn.Linear(2, 2), "relu", x2=0.0), "must be positive"),
        (lambda: find_activation(nn.Sequential(nn.ReLU(), nn.Tanh())), "several"),
        (lambda: rates("softplus", 3), "no critical point"),
        (
            lambda: InfiniteWidth("relu", 2).descend(
                torch.ones(2, 2), torch.ones(3, 1), torch.ones(1, 2), eta=0.1, steps=1
            ),
            "target for each",
        ),
        (
            lambda: InfiniteWidth("relu", 2).descend(
                torch.eye(2), torch.ones(2, 1), torch.ones(1, 2), eta=100.0, steps=1
            ),
            "diverges",
        ),
        (
            lambda: InfiniteWidth("relu", 2).descend(
                torch.eye(2), torch.ones(2, 1), torch.ones(1, 2), eta=0.1, steps=1.5
            ),
            "whole numbers",
        ),
        (lambda: InfiniteWidth("relu", 2).kernels(torch.ones(3)), "finite matrix"),
        (lambda: InfiniteWidth("relu", 2).kernels(torch.eye(2), torch.eye(3)), "entries a row"),
        (
            lambda: InfiniteWidth("relu", 2).bayes(
                torch.ones(2, 2), torch.ones(2, 1), torch.ones(1, 2)
            ),
            "noise > 0",
        ),
    ],
)
def test_bad_requests_are_refused(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()


def test_a_refused_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())
    before = model[0].weight.detach().clone()
    with pytest.raises(RequestError):
        critical_init_(model)
    assert torch.equal(model[0].weight, before)
