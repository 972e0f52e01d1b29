"""Structures that tracing has to see through, and those that it has to refuse and say why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from zoo import check, snapshot, unchanged

import pantarhei as pr
from pantarhei.elastic import Choice, Sized
from pantarhei.elastic.trace import trace
from pantarhei.errors import RequestError

IMAGE, ROW, TOKENS = (2, 3, 8, 8), (2, 8), (2, 6, 16)
CASES: list = []
RATIOS = (0.25, 0.5, 0.8, 1.0)


def case(shape: tuple[int, ...], groups: dict, fixed: dict[str, str] | None = None) -> Callable:
    """Register a model: the shape of its input, its groups, and words of what is fixed where."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        CASES.append(pytest.param(cls, shape, groups, fixed or {}, id=cls.__name__))
        return cls

    return register


@pytest.mark.parametrize(("cls", "shape", "groups", "fixed"), CASES)
def test_structures(cls: type[nn.Module], shape: tuple, groups: dict, fixed: dict) -> None:
    torch.manual_seed(0)
    model, x = cls(), torch.randn(shape)
    before = snapshot(model)
    net = pr.elastic(model, x, width=RATIOS)
    assert unchanged(before, model)
    found = {g.name.removeprefix("model."): (g.kind, g.size) for g in net.groups.values()}
    assert found == groups
    for name, words in fixed.items():
        assert words in net.fixed[name]
    check(model, net.eval(), x, choices=list(net.space))


C = "channels"


@case((2, 3, 16), {"0": (C, 16), "3": (C, 24)})
class OneDimensional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Conv1d(16, 24, 3, stride=2), nn.GELU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
            nn.Linear(24, 5),
        )  # fmt: skip


@case((2, 3, 8, 8, 8), {"0": (C, 16), "4": (C, 4)})  # a norm's groups stay whole
class ThreeDimensional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(3, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2),
            nn.Conv3d(16, 24, 3), nn.GroupNorm(4, 24), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
            nn.Linear(24, 5),
        )  # fmt: skip


@case(IMAGE, {"0": (C, 16), "2": (C, 12)})
class Transposed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 12, 2, 2), nn.BatchNorm2d(12),
            nn.Conv2d(12, 3, 1),
        )  # fmt: skip


@case(IMAGE, {"0": (C, 4)})
class GroupedTransposed(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 24, 2, 2, groups=4),
            nn.BatchNorm2d(24), nn.Conv2d(24, 3, 1),
        )  # fmt: skip


@case(IMAGE, {"0": (C, 8)})
class DepthwiseMultiplier(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 24, 3, groups=8), nn.Conv2d(24, 3, 1))


@case(IMAGE, {"0": (C, 8), "4": ("mlp", 12)})
class Flattened(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, 5),
        )  # fmt: skip


@case((2, 4, 8, 8), {"a": (C, 4), "b": (C, 12)})
class PixelShuffles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2)
        self.b, self.down = nn.Conv2d(4, 12, 3, padding=1), nn.PixelUnshuffle(2)
        self.out = nn.Conv2d(48, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.b(self.up(self.a(x))).relu()))


@case(IMAGE, {"a": (C, 8), "a#2": (C, 8), "b.0": (C, 8)})
class ShuffleUnit(nn.Module):  # as in ShuffleNet v2
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 1)
        self.b = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1),
        )  # fmt: skip
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu().chunk(2, 1)
        x = torch.cat([left, self.b(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


@case(IMAGE, {"a": (C, 4), "b": (C, 8)})
class ShuffleOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.channel_shuffle(self.a(x), 4)).relu())


@case(IMAGE, {"stem": (C, 8), "layers.0.2": (C, 8), "layers.1.2": (C, 8)})
class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 8, 3, padding=1))
            for n in (8, 16)
        )
        self.norm, self.fc = nn.BatchNorm2d(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return self.fc(self.norm(torch.cat(seen, 1)).relu().mean((2, 3)))


@case(IMAGE, {"c": (C, 16), "f1": (C, 4), "l1": ("mlp", 4)})
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.AdaptiveAvgPool2d(1)
        self.f1, self.f2 = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.l1, self.l2, self.out = nn.Linear(16, 4), nn.Linear(4, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        x = x * torch.sigmoid(self.f2(self.f1(self.pool(x)).relu()))
        x = x * self.l2(self.l1(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return self.out(self.pool(x).flatten(1))


@case(ROW, {"0": ("mlp", 16), "2": ("mlp", 12), "4": ("mlp", 16)})
class Parametrized(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            parametrizations.weight_norm(nn.Linear(8, 16)), nn.ReLU(),
            parametrizations.weight_norm(nn.Linear(16, 12)), nn.ReLU(), nn.Linear(12, 16),
            nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip


def test_spectral_norm() -> None:
    """Its products of matrix and vector round differently on a view, in the last bit."""
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4)
    ).eval()
    x = torch.randn(2, 8)
    net = pr.elastic(model, x, width=RATIOS)
    assert [(g.kind, g.size) for g in net.groups.values()] == [("mlp", 16)]
    for choice in net.space:
        torch.testing.assert_close(net(x, choice), net.extract(choice)(x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_hook() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(8, 16)), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(2, 8)
    net = pr.elastic(model, x, width=(0.5, 1.0))
    assert list(net.groups) == ["model.0"]
    net(x, Choice(width=0.5)).sum().backward()
    assert model[0].weight_v.grad[8:].abs().sum() == 0 < model[0].weight_v.grad[:8].abs().sum()
    with torch.no_grad():
        assert torch.equal(net(x, Choice(width=0.5)), net.extract(Choice(width=0.5))(x))


@case(ROW, {"a": ("mlp", 16)})
class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.o(self.m(self.m(x).relu()).relu())


@case(ROW, {"a": ("mlp", 16), "m": ("mlp", 12)})
class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.m, self.n = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(self.m(self.a(x).relu()).relu())
        return F.linear(h, self.a.weight.t())


@case(TOKENS, {"q": ("heads", 4)}, {"o": "fixed size"})
class EinsumAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.o, self.out, self.heads = nn.Linear(32, 16), nn.Linear(16, 5), 4

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).view(b, n, self.heads, -1) for f in (self.q, self.k, self.v))
        a = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        y = torch.einsum("bhqk,bkhd->bqhd", a, v).reshape(b, n, -1)
        return self.out((x + self.o(y)).mean(1))


@case(TOKENS, {"q": ("heads", 4)})
class LinearAttention(EinsumAttention):  # its heads would not show in the products' MACs
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = q @ (k.softmax(-2).transpose(-1, -2) @ v)
        return self.out((x + self.o(y.transpose(1, 2).reshape(b, n, -1))).mean(1))


@case(TOKENS, {"qkv": ("heads", 4)})
class FusedProjection(nn.Module):  # as in timm
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj, self.out = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, -1)
        return self.out((x + self.proj(y)).mean(1))


@case(TOKENS, {"m1": ("mlp", 32)}, {"qkv": "tied to the full size"})
class FusedProjectionByWidth(nn.Module):  # head size = width / heads: no number of heads can shrink
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(16, 48), nn.Linear(16, 16)
        self.m1, self.m2, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        size = c // self.num_heads
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, size).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        x = x + self.proj(y)
        return self.out((x + self.m2(self.m1(x).relu())).mean(1))


@case(TOKENS, {"i": ("mlp", 24), "f": ("mlp", 12)}, {"a": "tied to the full size"})
class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.e = nn.Linear(16, 24), nn.Linear(24, 16)
        self.a = nn.MultiheadAttention(16, 4, batch_first=True)
        self.f, self.g = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(self.i(x).relu())
        return self.g(self.f((x + self.a(x, x, x)[0]).mean(1)).relu())


@case(TOKENS, {"i": ("mlp", 24), "f": ("mlp", 12)})
class TorchAttentionWrittenOut(TorchAttention):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.MultiheadAttention(16, 4)


@case(TOKENS, {"t.layers.0.linear1": ("mlp", 32), "t.layers.1.linear1": ("mlp", 32),
               "g": ("mlp", 12)}, {"t.layers.0.self_attn": "tied to the full size"})  # fmt: skip
class TorchEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.i, self.t = nn.Linear(16, 16), nn.TransformerEncoder(layer, 2)
        self.g, self.h = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.g(self.t(self.i(x)).mean(1)).relu())


@case((2, 6, 8), {"g": ("mlp", 12)}, {"i": "mkldnn_rnn_layer", "r": "mkldnn_rnn_layer"})
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.r = nn.Linear(8, 16), nn.LSTM(16, 16, batch_first=True)
        self.g, self.h = nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.g(self.r(self.i(x))[0][:, -1]).relu())


@case((2, 6, 8), {"i": (C, 16), "g": ("mlp", 12)}, {"r": "fixed size"})
class Gru(Lstm):
    def __init__(self) -> None:
        super().__init__()
        self.r = nn.GRU(16, 16, batch_first=True)


@case(IMAGE, {"a": (C, 16), "fc": ("mlp", 12)}, {"b": "the model's own code"})
class HardCoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 3, padding=1)
        self.fc, self.out = nn.Linear(64, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.b(self.a(x).relu()), 1)
        return self.out(self.fc(x.view(-1, 64)).relu())


@case(ROW, {"b": ("mlp", 12)}, {"a": "where"})
class HardCodedHalves(nn.Module):  # runs at any width, but not as at the full one
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = torch.cat([h[:, :8], h[:, 8:] * 2], 1)
        return self.out(self.b(h).relu())


@case(IMAGE, {"b": (C, 12)}, {"a": "where"})
class HardCodedShuffle(nn.Module):  # channels would change places from width to width
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 1), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = h.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2)
        return self.c(self.b(h).relu())


@case(IMAGE, {"a": (C, 16), "fc": ("mlp", 12)})
class DataDependentRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = nn.Conv2d(3, 16, 3), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu().mean((2, 3))
        return self.out(self.fc(x[x.sum(1) > -1]).relu())


@case(TOKENS, {"a": ("mlp", 16)})
class MaskedTokens(nn.Module):  # a mask over two axes
    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(16, 16), nn.Linear(16, 5)
        self.register_buffer("mask", torch.rand(2, 6) > 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x)[self.mask])


@case(IMAGE, {"model": (C, 16), "fc": ("mlp", 12)})
class ConstantsPerChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = nn.Conv2d(3, 16, 3), nn.Linear(16, 12), nn.Linear(12, 5)
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("shift", torch.rand(1, 16, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * self.scale[:, None, None] + self.shift
        return self.out(self.fc(x.mean((2, 3))).relu())


@case(IMAGE, {"fc": ("mlp", 12)}, {"a": "a tensor of fixed size"})
class UnregisteredConstant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = nn.Conv2d(3, 16, 3), nn.Linear(16, 12), nn.Linear(12, 5)
        self.scale = torch.rand(16, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc((self.a(x) * self.scale).mean((2, 3))).relu())


@case(IMAGE, {"a": (C, 4), "fc": ("mlp", 12)})
class NormsWithoutAffine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = nn.Conv2d(3, 16, 3), nn.Linear(16, 12), nn.Linear(12, 5)
        self.g, self.b = nn.GroupNorm(4, 16, affine=False), nn.BatchNorm2d(16, affine=False)
        self.n = nn.LayerNorm(12, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.n(self.fc(self.b(self.g(self.a(x))).mean((2, 3)))).relu())


@case(IMAGE, {"a": (C, 16), "fc": (C, 12)})
class OtherNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.out = nn.Conv2d(3, 16, 3), nn.Linear(16, 12), nn.Linear(12, 5)
        self.g, self.h = nn.InstanceNorm2d(16, affine=True), nn.InstanceNorm2d(16)
        self.p, self.r = nn.PReLU(16), nn.RMSNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.p(self.h(self.g(self.a(x)))), dim=1)
        return self.out(self.r(self.fc(x.mean((2, 3)))))


@case(ROW, {"a": ("mlp", 16), "b": ("mlp", 12)})
class GatedUnits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 32), nn.Linear(16, 24), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.b(F.glu(self.a(x))).chunk(2, -1)
        return self.out(value * F.silu(gate))


@case(ROW, {"model": ("mlp", 16), "model#2": ("mlp", 12)})
class RawParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(16, 12))
        self.c, self.out = nn.Parameter(torch.zeros(12)), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x @ self.a).relu() @ self.b + self.c)


@case((2, 3, 16, 16), {"a": (C, 16), "b": (C, 12)})
class Resampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.interpolate(F.avg_pool2d(self.a(x), 2), scale_factor=2, mode="bilinear")
        h = self.b(F.pad(h, (1, 1, 1, 1), mode="reflect"))
        return self.out(F.interpolate(h, size=x.shape[2:], mode="nearest"))


@case(TOKENS, {"q": ("heads", 4)})
class ComplexRotation(nn.Module):  # rotary positions as Meta wrote them
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.o, self.turn = nn.Linear(32, 5), torch.polar(torch.ones(6, 1, 4), torch.rand(6, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        def rotate(x: Tensor) -> Tensor:
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * self.turn).flatten(3)

        q, k, v = (f(x).view(2, 6, -1, 8) for f in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@case(ROW, {"b": ("mlp", 12)}, {"a": "'sort'"})
class UnknownOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(x).sort(-1)[0]).relu())


@case(ROW, {"a": ("mlp", 14), "b": ("mlp", 12)}, {"a": "by its number"})
class ReadByNumber(UnknownOperation):  # the channels read stay, and so keep their numbers
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(self.b(h * h[:, 0].sigmoid()[:, None] + h[:, 3][:, None]).relu())


def test_a_rigid_network_says_why() -> None:
    class Grouped(nn.Module):  # ShuffleNet v1: every group meets every other
        def __init__(self) -> None:
            super().__init__()
            self.a, self.fc = nn.Conv2d(3, 16, 1), nn.Linear(16, 5)
            self.g1, self.g2 = nn.Conv2d(16, 16, 1, groups=4), nn.Conv2d(16, 16, 1, groups=4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.fc((x + self.g2(F.channel_shuffle(self.g1(x), 4))).mean((2, 3)))

    with pytest.raises(RequestError, match=r"'a' cannot change: .*all of them stay, or none"):
        pr.elastic(Grouped(), torch.randn(IMAGE), width=(0.5, 1.0))


def test_outputs_keep_their_channels() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            h = self.a(x)
            return self.out(self.b(h).relu()), {"features": h}

    model, x = Features().eval(), torch.randn(ROW)
    net = pr.elastic(model, x, width=(0.5, 1.0))
    assert list(net.groups) == ["model.b"]
    assert "output" in net.fixed["a"]
    check(model, net, x)


def test_split_halves_shrink_together_or_not_at_all() -> None:
    """Code that splits in the middle: one ratio for both halves works, one for each does not."""
    x = torch.randn(IMAGE)

    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hard, self.unit = HardCoded(), ShuffleUnit()

        def forward(self, x: Tensor) -> Tensor:
            return self.hard(x) + self.unit(x)

    model = Stubborn().eval()
    net = pr.elastic(model, x, width=(0.25, 1.0))  # what is hard-coded elsewhere does not matter
    assert {"model.unit.a", "model.unit.a#2", "model.unit.b.0"} <= set(net.groups)
    assert "hard.b" in net.fixed
    check(model, net, x)

    unit = ShuffleUnit().eval()
    net = pr.elastic(unit, x, width=Sized((0.25, 1.0), per_group=True))
    assert set(net.groups) == {"model.b.0"}
    assert {"a", "a#2"} <= set(net.fixed)
    check(unit, net, x)


def test_labels_follow_single_operations() -> None:
    """The smallest example of what a trace finds: which indices of which tensors live together."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 3, 1, bias=False))
    tensors = dict(model.named_parameters())
    tracer, out = trace(model, tensors, (torch.ones(1, 1, 2, 2),), {})
    groups, unit, _ = tracer.groups(dict(model.named_modules()))
    labels = tracer.labels
    assert [g.axes for g in groups] == [[("0.weight", 0), ("1.weight", 1)]]
    assert (unit[labels["0.weight"][0]] == unit[labels["1.weight"][1]]).all()
    assert out.shape == (1, 3, 2, 2)
    assert tracer.ended == ["0", "1", ""]


def test_padding_masks_of_torch_encoders() -> None:
    class Padded(TorchEncoder):  # in evaluation mode torch packs the tokens into a nested tensor
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.h(self.g(self.t(x, src_key_padding_mask=mask).mean(1)).relu())

    model, x, mask = Padded().eval(), torch.randn(TOKENS), torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 4:] = True
    net = pr.elastic(model, (x, mask), mlp=(0.5, 1.0))
    assert len(net.groups) == 3
    check(model, net, x, mask)


def test_inputs_that_the_model_refuses() -> None:
    with pytest.raises(RequestError, match=r"fails on the example inputs \(RuntimeError: .*shape"):
        pr.elastic(nn.Linear(3, 4), torch.ones(1, 5), width=(0.5, 1.0))
    with pytest.raises(RequestError, match=r"TypeError: .*unexpected keyword"):
        pr.elastic(nn.Linear(3, 4), {"inputs": torch.ones(1, 3)}, width=(0.5, 1.0))
