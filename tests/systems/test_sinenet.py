"""SineNet: parameter counts, its equations against a network by hand, what it commutes with."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.rollout import forecast_loss, rollout
from pantarhei.systems.sinenet import (
    SineNet,
    _Pad,
    dilated,
    multiplier,
    parameter_count,
    sinusoidal,
    unet,
    upsampled,
)

SETS = {"INS": (12, 3), "CNS": (40, 4), "SWE": (6, 3)}
TABLE = {
    (2, 1.8075): (35_499_989, 35_516_694, 35_496_533),
    (4, 1.611): (35_493_699, 35_510_404, 35_490_243),
    (6, 1.5): (35_475_499, 35_492_204, 35_472_043),
    (8, 1.425): (35_490_219, 35_506_924, 35_486_763),
    (1, 2.0): (33_788_099, 33_804_804, 33_784_643),
}


def count(net):
    return sum(p.numel() for p in net.parameters())


def tiny(**options):
    torch.manual_seed(0)
    return SineNet(2, 1, **{"waves": 2, "width": 6, "mult": 1.5, "levels": 2} | options)


@pytest.mark.parametrize(("waves", "mult"), TABLE)
def test_the_papers_parameter_counts(waves, mult):
    for (i, o), expected in zip(SETS.values(), TABLE[waves, mult], strict=True):
        assert parameter_count(i, o, mult, waves=waves) == expected
    assert count(SineNet(12, 3, waves=waves, mult=mult)) == TABLE[waves, mult][0]


def test_the_papers_other_networks():
    assert parameter_count(12, 3, 1.425, disentangle=False) == 32_831_403
    assert parameter_count(12, 3, 1.425, waves=1, blocks=8) == 28_628_084
    assert parameter_count(12, 3, 2.0, waves=1, width=128) == 135_094_659


@pytest.mark.parametrize(
    "options",
    [
        {"disentangle": False, "block_residual": False},
        {"space": 1},
        {"space": 3, "levels": 1},
        {"round_to": 4},
    ],
)
def test_the_formula_counts_what_is_built(options):
    shape = {"waves": 2, "width": 6, "levels": 2} | options
    assert count(tiny(**options)) == parameter_count(2, 1, 1.5, **shape)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("condition", ["adagn", "add"])
@pytest.mark.parametrize("conditions", [0, 1, 3])
def test_what_a_network_is_told_counts_and_a_budget_holds_it(conditions, condition, mask, blocks):
    options = {"conditions": conditions, "condition": condition, "mask": mask, "blocks": blocks}
    shape = {"waves": 2, "width": 6, "levels": 2} | options
    assert count(tiny(**options)) == parameter_count(2, 1, 1.5, **shape)
    told = SineNet(2, 1, param_budget=400_000, **shape)
    assert count(told) == pytest.approx(400_000, rel=0.02)
    assert multiplier(2, 1, 400_000, **shape) == told.arguments["mult"]


@pytest.mark.parametrize(
    ("width", "low", "high", "mults"),
    [
        (12, 1.19e6, 1.20e6, (2, 1.797, 1.599, 1.416)),
        (16, 2.12e6, 2.14e6, (2, 1.795, 1.601, 1.415)),
    ],
)
def test_a_budget_is_met_by_every_number_of_waves(width, low, high, mults):
    for waves, sheet in zip((1, 2, 4, 8), mults, strict=True):
        shape = {"waves": waves, "width": width}
        assert low <= round(parameter_count(12, 3, sheet, **shape), -4) <= high
        budget = round((low + high) / 2)
        assert count(SineNet(12, 3, param_budget=budget, **shape)) == pytest.approx(budget, 0.01)
        assert multiplier(12, 3, budget, **shape) == pytest.approx(sheet, 0.01)
    with pytest.raises(RequestError, match="not reached"):
        SineNet(12, 3, param_budget=100)


def by_hand(net, x):
    """The U-Net of the module's equations, written out with functional calls for L = 2."""
    parts = dict(net.named_parameters())

    def conv(name, x, pad=1):
        return F.conv2d(x, parts[f"{name}.weight"], parts[f"{name}.bias"], padding=pad)

    def block(name, x):
        for i in "12":
            x = conv(f"{name}.blocks.0.conv{i}", x)
            weight, bias = (
                parts[f"{name}.blocks.0.norm{i}.weight"],
                parts[f"{name}.blocks.0.norm{i}.bias"],
            )
            x = F.gelu(F.group_norm(x, 1, weight, bias))
        return x

    h0 = conv("lift", x)
    g = F.avg_pool2d(h0, 2)
    h1 = block("waves.0.down.0", g) + conv("waves.0.down.0.around", g, 0)
    g = F.avg_pool2d(h1, 2)
    y = block("waves.0.down.1", g) + conv("waves.0.down.1.around", g, 0)
    for level, h in ((1, h1), (0, h0)):
        v = F.interpolate(y, scale_factor=2, mode="bicubic", align_corners=False)
        y = block(f"waves.0.up.{level}", torch.cat([h, v], 1))
        y = y + conv(f"waves.0.up.{level}.around", v, 0)
    return conv("project", y)


def test_one_plain_wave_is_a_unet():
    torch.manual_seed(0)
    net = unet(2, 3, width=6, mult=1.7, levels=2)
    x = torch.randn(2, 2, 16, 12)
    torch.testing.assert_close(net(x), by_hand(net, x))


def test_waves_add_to_their_input():
    net = tiny()
    x = torch.randn(1, 2, 8, 8)
    for wave in net.waves:
        wave.forward = lambda x, told: torch.zeros_like(x)
    torch.testing.assert_close(net(x), net.project(net.lift(x)))
    assert torch.equal(tiny(wave_residual=False)(x), tiny(wave_residual=False)(x))
    assert not torch.equal(tiny(wave_residual=False)(x), tiny()(x))


def test_the_parallel_stream_is_the_pooled_input_of_the_wave():
    net, seen = tiny(), []
    net.waves[0].down[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 2, 16, 16)
    net(x)
    pooled = F.avg_pool2d(net.lift(x), 4)
    torch.testing.assert_close(seen[0][:, -6:], pooled)


@pytest.mark.parametrize("levels", [2, 4])
def test_a_circular_network_commutes_with_shifts_and_one_with_zeros_does_not(levels):
    torch.manual_seed(0)
    x = torch.randn(1, 2, 48, 64)
    shift = (2**levels, -(2 ** (levels + 1)))
    for padding in ("circular", "zeros"):
        net = SineNet(2, 1, waves=2, width=4, mult=1.5, levels=levels, padding=padding)
        gap = (net(x.roll(shift, (2, 3))) - net(x).roll(shift, (2, 3))).abs().max()
        assert (gap < 1e-5) == (padding == "circular")


def test_mixed_borders_commute_along_the_periodic_axis_alone():
    net = tiny(padding=("zeros", "circular"))
    x = torch.randn(1, 2, 16, 16)
    for axis, commutes in ((2, False), (3, True)):
        gap = (net(x.roll(4, axis)) - net(x).roll(4, axis)).abs().max()
        assert (gap < 1e-5) == commutes


def test_upsampling_is_torchs_and_has_no_seam_where_it_is_periodic():
    x = torch.randn(2, 3, 8, 6)
    for kind in ("bicubic", "bilinear"):
        theirs = F.interpolate(x, scale_factor=2, mode=kind, align_corners=False)
        torch.testing.assert_close(upsampled(x, ("zeros",) * 2, kind), theirs)
    wrapped = F.interpolate(F.pad(x, (2,) * 4, "circular"), scale_factor=2, mode="bicubic")
    torch.testing.assert_close(upsampled(x, ("circular",) * 2), wrapped[..., 4:-4, 4:-4])
    cube = torch.randn(1, 1, 4, 4, 4)
    linear = F.interpolate(cube, scale_factor=2, mode="trilinear", align_corners=False)
    torch.testing.assert_close(upsampled(cube, ("zeros",) * 3, "bilinear"), linear)


@pytest.mark.parametrize("borders", [("zeros",) * 2, ("circular", "zeros")])
def test_channels_that_lie_last_in_memory_stay_there_and_change_nothing(borders):
    x = torch.randn(2, 3, 8, 6, requires_grad=True)
    last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    pad = _Pad(borders)
    for way in (lambda x: upsampled(x, borders), pad):
        ours, theirs = way(last), way(x)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        weights = torch.randn_like(theirs)
        gradients = [torch.autograd.grad(y, z, weights)[0] for y, z in ((ours, last), (theirs, x))]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    cube = torch.randn(1, 2, 4, 4, 6)
    moved = upsampled(cube.to(memory_format=torch.channels_last_3d), (*borders, "zeros"))
    torch.testing.assert_close(moved, upsampled(cube, (*borders, "zeros")), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cells", [1, 3])
def test_a_pad_comes_from_across_the_domain_or_is_zero(cells):
    pad, x = _Pad(("circular", "zeros")), torch.randn(2, 3, 5, 4)
    pad.cells = cells
    around = F.pad(x, (0, 0, cells, cells), "circular")
    assert torch.equal(pad(x), F.pad(around, (cells, cells, 0, 0)))


def test_the_receptive_field_grows_with_levels_and_wraps_only_where_it_is_periodic():
    def reach(padding, levels):
        torch.manual_seed(0)
        net = SineNet(1, 1, waves=1, width=4, levels=levels, padding=padding).double()
        for module in net.modules():  # a norm over space sees everything: leave it out here
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda x: x
        x = torch.randn(1, 1, 64, 64, dtype=torch.float64, requires_grad=True)
        net(x)[0, 0, 32, 32].backward()
        rows = x.grad[0, 0].abs().sum(1).nonzero()[:, 0]
        return int(rows.max() - rows.min()) + 1

    # lift 3, and per level two blocks of two 3-wide convolutions at each resolution
    assert 20 < reach("zeros", 1) < reach("zeros", 2) < 64
    torch.manual_seed(0)
    net = SineNet(1, 1, waves=1, width=4, levels=1, padding="circular").double()
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64, requires_grad=True)
    net(x)[0, 0, 0, 32].backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero()[:, 0].tolist()
    assert 63 in rows and 0 in rows and 32 not in rows


@pytest.mark.parametrize("size", [(10, 13), (7, 5), (16, 9)])
@pytest.mark.parametrize("padding", ["zeros", "circular"])
def test_any_grid(size, padding):
    x = torch.randn(1, 2, *size)
    assert tiny(padding=padding)(x).shape == (1, 1, *size)


@pytest.mark.parametrize("space", [1, 3])
def test_one_and_three_axes(space):
    net = tiny(space=space, padding="circular")
    assert net(torch.randn(1, 2, *(8,) * space)).shape == (1, 1, *(8,) * space)


@pytest.mark.parametrize("condition", ["adagn", "add"])
def test_conditions_and_a_mask_change_the_forecast(condition):
    net = tiny(conditions=2, condition=condition, mask=True)
    x, mask = torch.randn(3, 2, 8, 8), torch.ones(1, 8, 8)
    told = torch.tensor([[0.2, 1.0], [0.2, 1.0], [0.5, 6.0]])
    out = net(x, told, mask)
    torch.testing.assert_close(net(x[1:2], told[1:2], mask), out[1:2])
    same = net(x, told[:1].expand(3, 2), mask)
    torch.testing.assert_close(same[:2], out[:2])
    assert (same[2] - out[2]).abs().max() > 1e-4
    assert (net(x, told, 0 * mask) - out).abs().max() > 1e-4
    for wrong in ((x,), (x, told), (x, told[:, :1], mask)):
        with pytest.raises(RequestError, match="is told 2 conditions"):
            net(*wrong)
    # the first half of adagn's linear map scales: one with zeros tells nothing
    for module in net.modules():
        if getattr(module, "told", None) is not None:
            nn.init.zeros_(module.told.weight)
            nn.init.zeros_(module.told.bias)
    torch.testing.assert_close(net(x, told, mask), net(x, 0 * told, mask))


def test_the_sinusoidal_embedding():
    found = sinusoidal(torch.tensor([0.0, 2.0]), size=4)
    expected = torch.tensor([2.0, 0.02])
    torch.testing.assert_close(found[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(found[1], torch.cat([expected.cos(), expected.sin()]))


def test_checkpointing_changes_no_gradient():
    x = torch.randn(2, 2, 8, 8)
    gradients = []
    for kept in (False, True):
        net = tiny(checkpoint=kept)
        net(x).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_autocast_and_channels_last(memory):
    net = tiny().to(memory_format=memory)
    x = torch.randn(2, 2, 16, 16).to(memory_format=memory)
    exact = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("padding", ["zeros", "circular", ("zeros", "circular")])
def test_a_dilated_network_sees_a_finer_grid_as_it_saw_the_coarse_one(padding):
    net = tiny(padding=padding)
    fine = dilated(net, 4)
    for one, other in ((net.lift, fine.lift), (net.project, fine.project)):
        x = torch.randn(1, 6 if one is net.project else 2, 32, 32)
        torch.testing.assert_close(other(x)[..., ::4, ::4], one(x[..., ::4, ::4]))
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(dilated(net, 1)(x), net(x))
    assert dilated(fine, 2).arguments["reach"] == 8
    with pytest.raises(RequestError, match="whole factor"):
        dilated(net, 0)


def test_it_is_one_graph_for_the_compiler():
    net = tiny(padding=("zeros", "circular")).eval()
    x = torch.randn(1, 2, 8, 8)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


def test_inference_before_training_spoils_nothing():
    net, x = tiny(upsample="bilinear"), torch.randn(1, 2, 20, 12)
    with torch.inference_mode():
        net(x)
    net(x).sum().backward()
    assert net.lift.weight.grad.isfinite().all()


def test_it_runs_forward_and_trains_with_the_librarys_own_loss():
    net = tiny()
    start = torch.randn(3, 2, 1, 8, 8)
    assert rollout(net, start, 5).kept.shape == (3, 5, 1, 8, 8)
    forecast_loss(steps=2)(net, (start, torch.randn(3, 2, 1, 8, 8))).backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"waves": 0}, "positive numbers"),
        ({"padding": "mirror"}, "each zeros or circular"),
        ({"padding": ("zeros",)}, "each zeros or circular"),
        ({"pool": "median"}, "avg or max"),
        ({"space": 4}, "1 to 3 axes"),
    ],
)
def test_wrong_arguments(wrong, sentence):
    with pytest.raises(RequestError, match=sentence):
        tiny(**wrong)
    with pytest.raises(RequestError, match="SineNet takes"):
        tiny()(torch.zeros(1, 3, 8, 8))
