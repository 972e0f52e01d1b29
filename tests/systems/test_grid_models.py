"""FNO, F-FNO and Dil-ResNet: sizes, and what they commute with."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.systems.dilated_resnet import DilatedResNet
from pantarhei.systems.fno import FNO, FactorizedFNO, SpectralConv
from pantarhei.systems.unet_mod import UNetMod


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_sizes():
    assert count(FNO(10, 2)) == 1_188_706 and count(FNO(13, 2)) == 1_188_802  # of CFDBench
    assert count(DilatedResNet(12, 3)) == pytest.approx(4.2e6, rel=0.02)
    with torch.device("meta"):
        assert count(UNetMod(12, 3)) == 144_263_683  # 144 M: PDEArena's own code builds as many


def test_a_unet_mod_is_its_equations():
    """One block at each of two resolutions, written out with functional calls."""
    torch.manual_seed(0)
    net = UNetMod(2, 1, width=8, mults=(1, 2), blocks=1)
    parts = dict(net.named_parameters())

    def conv(name, x, **options):
        weight = parts[f"{name}.weight"]
        return F.conv2d(x, weight, parts[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)

    def norm(name, x, groups=1):
        return F.gelu(F.group_norm(x, groups, parts[f"{name}.weight"], parts[f"{name}.bias"]))

    def block(name, x):
        h = conv(f"{name}.conv1", norm(f"{name}.norm1", x))
        h = conv(f"{name}.conv2", norm(f"{name}.norm2", h))
        return h + (conv(f"{name}.around", x) if f"{name}.around.weight" in parts else x)

    x = torch.randn(2, 2, 8, 6)
    a = conv("lift", x)
    b = block("down.0", a)
    c = conv("down.1", b, stride=2)
    d = block("down.2", c)
    y = block("middle.1", block("middle.0", d))
    y = block("up.1", torch.cat([block("up.0", torch.cat([y, d], 1)), c], 1))
    y = F.conv_transpose2d(y, parts["up.2.weight"], parts["up.2.bias"], stride=2, padding=1)
    y = block("up.4", torch.cat([block("up.3", torch.cat([y, b], 1)), a], 1))
    torch.testing.assert_close(net(x), conv("project", norm("norm", y, 8)))


@pytest.mark.parametrize(
    "net",
    [
        FNO(1, 1, width=4, modes=5, layers=2),
        FactorizedFNO(1, 1, width=4, modes=5, layers=2),
        DilatedResNet(1, 1, width=4, blocks=1, padding="circular"),
    ],
    ids=("fno", "ffno", "dil-resnet"),
)
def test_periodic_networks_commute_with_shifts(net):
    x = torch.randn(2, 1, 16, 12)
    moved = net(x.roll((3, -5), (2, 3)))
    torch.testing.assert_close(moved, net(x).roll((3, -5), (2, 3)), atol=1e-5, rtol=1e-4)


def test_a_spectral_layer_is_what_it_says_and_needs_no_fixed_grid():
    layer = SpectralConv(2, 3, 2)
    x = torch.randn(1, 2, 12, 10)
    spectrum, out = torch.fft.rfft2(x), torch.zeros(1, 2, 12, 6, dtype=torch.cfloat)
    for ky in range(-3, 3):
        for kx in range(3):
            block, row = (0, ky) if ky >= 0 else (1, ky + 3)
            out[0, :, ky, kx] = layer.weights[block, :, :, row, kx].T @ spectrum[0, :, ky, kx]
    torch.testing.assert_close(layer(x), torch.fft.irfft2(out, s=(12, 10)))
    wave, fine = (
        torch.cos(torch.arange(n) / n * 2 * torch.pi)[None, None, :, None].expand(1, 2, n, n)
        for n in (12, 24)
    )
    torch.testing.assert_close(layer(fine)[..., ::2, ::2], layer(wave), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("space", [1, 3])
def test_other_numbers_of_axes(space):
    x = torch.randn(1, 2, *(8,) * space)
    for net in (FNO(2, 1, width=4, modes=6, space=space),
                FactorizedFNO(2, 1, width=4, modes=6, layers=1, space=space),
                DilatedResNet(2, 1, width=4, blocks=1, space=space),
                UNetMod(2, 1, width=3, space=space)):  # fmt: skip
        assert net(x).shape == (1, 1, *(8,) * space)
        net(x).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            assert net(x).isfinite().all()


def test_wrong_numbers():
    for wrong in (lambda: FNO(1, 1, modes=0), lambda: FactorizedFNO(1, 1, space=4),
                  lambda: DilatedResNet(1, 1, width=0),
                  lambda: UNetMod(1, 1, mults=())):  # fmt: skip
        with pytest.raises(RequestError, match="1 to 3 axes"):
            wrong()
    with pytest.raises(RequestError, match="zeros or circular"):
        DilatedResNet(1, 1, padding="mirror")
