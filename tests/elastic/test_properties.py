"""Random architectures, random spaces, random choices: the invariants hold for all of them."""

from __future__ import annotations

import random

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import check, inside, snapshot, unchanged

import pantarhei as pr
from pantarhei.elastic import Choice, Sized

EXAMPLES = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module, after: bool) -> None:
        super().__init__()
        self.body, self.after = nn.Sequential(*layers), after

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.body(x)
        return y.relu() if self.after else y


class Concatenation(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Excitation(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(n, max(2, n // 2)), nn.Linear(max(2, n // 2), n)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.b(self.a(x.mean((2, 3))).relu()).sigmoid()[..., None, None]


class Attention(nn.Module):
    def __init__(self, n: int, heads: int, size: int, written_out: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(n, heads * size) for _ in range(3))
        self.o, self.size, self.written_out = nn.Linear(heads * size, n), size, written_out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        if self.written_out:
            y = (q @ k.transpose(-2, -1) / self.size**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


def conv_net(draw: random.Random) -> nn.Module:
    def norm(n: int) -> nn.Module:
        divisors = [g for g in (1, 2, 4) if n % g == 0]
        return draw.choice(
            [nn.Identity(), nn.BatchNorm2d(n), nn.GroupNorm(draw.choice(divisors), n),
             nn.BatchNorm2d(n, affine=False)]
        )  # fmt: skip

    def conv(i: int, o: int) -> nn.Sequential:
        k, groups = draw.choice((1, 3)), 1
        if i == o and draw.random() < 0.4:
            groups = draw.choice([g for g in (i, 2) if i % g == 0])
        return nn.Sequential(
            nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=draw.random() < 0.5),
            norm(o), draw.choice([nn.ReLU(), nn.SiLU(), nn.PReLU(o)]),
        )  # fmt: skip

    n = draw.choice((4, 6, 8))
    layers: list[nn.Module] = [conv(3, n)]
    for _ in range(draw.randint(1, 4)):
        kind = draw.choice(("conv", "residual", "concatenation", "excitation", "transposed"))
        if kind == "conv":
            o = draw.choice((4, 6, 8, 12))
            layers.append(conv(n, o))
            n = o
        elif kind == "residual":
            hidden = draw.choice((4, 8))
            layers.append(Residual(conv(n, hidden), conv(hidden, n), after=draw.random() < 0.5))
        elif kind == "concatenation":
            outs = [draw.choice((2, 4, 6)) for _ in range(draw.randint(1, 2))]
            layers.append(Concatenation(nn.Identity(), *(conv(n, o) for o in outs)))
            n += sum(outs)
        elif kind == "excitation":
            layers.append(Excitation(n))
        else:
            o = draw.choice((4, 6))
            layers.append(nn.ConvTranspose2d(n, o, 2, 2))
            n = o
    pool = draw.choice([nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2)])
    places = 1 if isinstance(pool, nn.AdaptiveAvgPool2d) else 4
    return nn.Sequential(
        *layers, pool, nn.Flatten(), nn.Linear(n * places, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def token_net(draw: random.Random) -> nn.Module:
    n = draw.choice((8, 12))
    norms = (nn.LayerNorm, nn.RMSNorm, lambda n: nn.LayerNorm(n, elementwise_affine=False))
    norm = draw.choice(norms)
    blocks: list[nn.Module] = []
    for _ in range(draw.randint(1, 2)):
        heads, size = draw.choice((2, 3, 4)), draw.choice((2, 4))
        blocks.append(
            nn.Sequential(
                Residual(norm(n), Attention(n, heads, size, draw.random() < 0.5), after=False),
                Residual(norm(n), nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n), after=False),
            )
        )
    return nn.Sequential(nn.Linear(5, n), *blocks, norm(n), nn.Linear(n, 3))


def prepared(model: nn.Module) -> nn.Module:
    """Give norms and gates numbers that matter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 0.5, 0.3)
    return model.eval()


def widths(draw: random.Random) -> object:
    ratios = tuple(sorted({round(draw.uniform(0.1, 0.95), 2) for _ in range(2)} | {1.0}))
    kind = draw.choice(("plain", "plain", "each", "rounded"))
    if kind == "plain":
        return ratios
    return Sized(ratios, per_group=kind == "each", divisor=draw.choice((1, 2)))


@EXAMPLES
@given(st.integers(0, 10_000))
def test_convolutional_networks(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, x = prepared(conv_net(draw)), torch.randn(draw.choice((2, 3)), 3, 6, 6)
    before = snapshot(model)
    net = pr.elastic(model, x, width=widths(draw))
    check(model, net, x, choices=[net.space.smallest, *net.space.sample(2, seed)])
    assert unchanged(before, model)


@settings(EXAMPLES, max_examples=10)
@given(st.integers(0, 10_000))
def test_one_row_agrees_but_for_the_last_bit(seed: int) -> None:
    """BLAS multiplies a matrix with a single vector in an order that depends on its stride."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, x = prepared(conv_net(draw)), torch.randn(1, 3, 6, 6)
    net = pr.elastic(model, x, width={"*": (0.3, 0.7, 1.0)})
    for choice in net.space:
        with torch.no_grad():
            torch.testing.assert_close(net(x, choice), net.extract(choice)(x), rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(st.integers(0, 10_000))
def test_transformers(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, x = prepared(token_net(draw)), torch.randn(draw.choice((1, 2)), 4, 5)
    before = snapshot(model)
    axes = {"heads": (0.3, 1.0), "mlp": (0.2, 0.7, 1.0), "depth": (0.5, 1.0)}
    chosen = {name: axes[name] for name in sorted(axes) if draw.random() < 0.7}
    if "mlp" not in chosen:  # without affine norms, that takes all that heads leave
        chosen["width"] = (0.5, 1.0)
    net = pr.elastic(model, x, **chosen)
    assert {axis.partition(".")[0] for axis in net.space.axes} == set(chosen)
    check(model, net, x, choices=[net.space.smallest, *net.space.sample(2, seed)])
    assert unchanged(before, model)


@EXAMPLES
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_smaller_choices_lie_inside_larger_ones(seed: int, pick: int) -> None:
    """Of nested choices, the smaller one trains a subset of the weights of the larger one."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, x = prepared(token_net(draw)), torch.randn(2, 4, 5)
    net = pr.elastic(model, x, width=(0.3, 0.6, 1.0), heads=(0.3, 1.0), depth=(0.4, 1.0))
    a, b = net.space.sample(2, pick)
    small = Choice({name: min(a[name], b[name]) for name in a})
    assert small <= a
    assert small <= b

    assert all(net.plan(small).keep[g] <= net.plan(a).keep[g] for g in net.groups)
    assert set(net.plan(a).skipped) <= set(net.plan(small).skipped)
    model.zero_grad()
    net(x, small).square().sum().backward()
    for name, p in model.named_parameters():
        assert not (inside(net, small, name) & ~inside(net, a, name)).any(), name
        if p.grad is not None:
            assert not p.grad[~inside(net, small, name)].any(), name
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
