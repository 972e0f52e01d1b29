"""The static networks: their published sizes, and what a single exit computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pantarhei.compute.enhancement.baselines import DCAD, DnCNN, SingleExit
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.cost import profile


@pytest.mark.parametrize(
    ("net", "convolutions", "norms", "parameters"),
    [(DnCNN(), 20, 18, 667_073), (DCAD(), 10, 0, 296_641)],
)
def test_published_layers(net: DnCNN, convolutions: int, norms: int, parameters: int):
    kinds = [type(layer) for layer in net.modules()]
    assert kinds.count(nn.Conv2d) == convolutions
    assert kinds.count(nn.BatchNorm2d) == norms
    assert kinds.count(nn.ReLU) == convolutions - 1
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert profile(net.eval(), torch.rand(1, 1, 9, 12)).macs == net.macs(9, 12)


@pytest.mark.parametrize("make", [DnCNN, DCAD])
def test_they_start_as_the_identity_and_add_a_residual(make: type[DnCNN]):
    net, x = make(), torch.rand(2, 1, 11, 13)
    assert torch.equal(net(x), x)
    nn.init.ones_(net.body[-1].bias)
    assert torch.allclose(net(x), x + 1)


@pytest.mark.parametrize("exit", [None, 2])
def test_a_single_exit_is_that_exit_and_nothing_else(exit: int | None):
    torch.manual_seed(0)
    nested = NestedUNet(levels=4, width=6)
    for head in nested.heads:
        nn.init.normal_(head.residual[-1].weight, std=0.1)
    x = torch.rand(1, 1, 16, 24)
    expected = nested(x)[(exit or 3) - 1]
    before = sum(p.numel() for p in nested.parameters())
    net = SingleExit(nested, exit)
    assert torch.equal(net(x), expected) and not torch.equal(expected, x)
    assert sum(p.numel() for p in net.parameters()) < before
    assert profile(net, x).macs == net.macs(16, 24)
