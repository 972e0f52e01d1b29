"""The nested U-Net: the published counts, exact equalities between its ways of running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pantarhei.compute.enhancement.nested_unet import ECA, NestedUNet
from pantarhei.compute.enhancement.quality import TchebichefQuality
from pantarhei.cost import profile
from pantarhei.data.simulate.codecs import jpeg_luma, rgb_to_ycbcr
from pantarhei.errors import RequestError


def small(**changes: object) -> NestedUNet:
    """A small network whose heads have been moved off zero, where they start."""
    torch.manual_seed(0)
    net = NestedUNet(**{"levels": 4, "width": 6, **changes}).eval()  # type: ignore[arg-type]
    for head in net.heads:
        for parameter in head.residual.parameters():
            nn.init.normal_(parameter, std=0.1)
    return net


def pictures(batch: int = 4, height: int = 40, width: int = 56) -> Tensor:
    """Smooth random fields, compressed so differently that their scores differ."""
    draw = torch.Generator().manual_seed(3)
    coarse = torch.rand(batch, 1, height // 4, width // 4, generator=draw)
    raw = nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return jpeg_luma(raw, torch.linspace(5, 95, batch).long())


def gates(net: nn.Module) -> int:
    return sum(p.numel() for n, p in net.named_parameters() if "taps" in n)


def test_published_parameter_counts():
    net = NestedUNet()
    assert gates(net) == 54 * 3
    assert sum(p.numel() for p in net.parameters()) == 300_455
    ungated = NestedUNet(eca=False)
    cumulative = [sum(p.numel() for p in ungated.parameters_to(k)) for k in range(1, 6)]
    assert cumulative == [45_889, 91_778, 148_579, 217_636, 300_293]
    assert gates(NestedUNet(eca_last=True)) == 60 * 3


def test_published_macs():
    net = NestedUNet()
    exits = range(1, 6)
    true = [round(net.macs(512, 512, k) / 1e9, 3) for k in exits]
    assert true == [9.311, 12.640, 15.460, 18.497, 21.932]
    paper = [round(net.macs(512, 512, k, "paper") / 1e9, 1) for k in exits]
    assert paper == [10.2, 14.7, 18.7, 22.9, 27.6]
    heads = net.macs(512, 512, 5, assessed=True) - net.macs(512, 512, 5)
    assert heads / 4 / 1e9 == pytest.approx(0.084, abs=5e-4)


@pytest.mark.parametrize(
    "changes",
    [{}, {"separable": False}, {"in_ch": 3}, {"eca": False}, {"eca_last": True}, {"levels": 2}],
)
def test_macs_equal_a_profilers_count(changes: dict[str, object]):
    net = small(**changes)
    x = torch.rand(1, net.in_ch, 21, 40)
    for k in range(1, net.exits + 1):
        assert profile(net, x, exit=k).macs == net.macs(21, 40, k)


@settings(max_examples=20, deadline=None)
@given(
    levels=st.integers(2, 5),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    in_ch=st.sampled_from([1, 3]),
    separable=st.booleans(),
    eca=st.booleans(),
)
def test_every_way_of_running_gives_the_same_bits(
    levels: int, height: int, width: int, in_ch: int, separable: bool, eca: bool
):
    net = small(levels=levels, in_ch=in_ch, separable=separable, eca=eca)
    x = torch.rand(2, in_ch, height, width)
    with torch.no_grad():
        everything = net(x)
        partial = net.begin(x)
        for k, picture in enumerate(everything, 1):
            partial = net.advance(partial)
            assert picture.shape == x.shape
            assert torch.equal(net.read(partial), picture)
            assert torch.equal(net(x, exit=k), picture)


def test_a_state_can_be_resumed_twice():
    net, x = small(), pictures()
    with torch.no_grad():
        first = net.advance(net.begin(x))
        once, again = net.advance(first), net.advance(first)
        assert torch.equal(net.read(once), net.read(again))
        assert torch.equal(net.read(net.advance(once)), net(x, exit=3))
        with pytest.raises(RequestError, match="last"):
            net.advance(net.advance(once))


def test_padding_is_replication_and_is_cropped():
    net = small()
    x = torch.rand(1, 1, 21, 27)
    padded = nn.functional.pad(x, (0, 5, 0, 3), mode="replicate")
    with torch.no_grad():
        assert torch.equal(net(x, exit=3), net(padded, exit=3)[..., :21, :27])


@pytest.mark.parametrize("separable", [False, True])
def test_a_new_network_returns_its_input_at_every_exit(separable: bool):
    net, x = NestedUNet(levels=4, width=6, separable=separable), pictures()
    assert all(torch.equal(picture, x) for picture in net(x))


def test_features_neither_fade_nor_explode_at_the_start():
    torch.manual_seed(0)
    net = NestedUNet()
    partial = net.begin(pictures(4, 64, 64))
    with torch.no_grad():
        for _ in range(net.exits):
            partial = net.advance(partial)
            spread = partial.nodes[1, partial.step + 1].feature.std((2, 3)).mean()
            assert 0.02 < float(spread) < 2


@pytest.mark.parametrize("eca_last", [False, True])
def test_an_exit_does_not_train_what_lies_beyond_it(eca_last: bool):
    net = small(eca_last=eca_last)
    every = dict(net.named_parameters())
    for k in range(1, net.exits + 1):
        net.zero_grad()
        net(pictures())[k - 1].square().mean().backward()
        needed = {id(p) for p in net.parameters_to(k)} - {
            id(p) for j in range(k - 1) for p in net.heads[j].parameters()
        }
        for name, parameter in every.items():
            used = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert used == (id(parameter) in needed), (k, name)


def test_the_gate_of_an_edge_is_its_own():
    net, x = small(), pictures()
    with torch.no_grad():
        before = net(x)
        skip = net.up["1_3"].gates[1]  # C[1,2] as seen by C[1,3], not by the head of exit 1
        assert isinstance(skip, ECA)
        skip.taps.weight += 3.0
        after = net(x)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_the_gate_is_the_equation():
    gate, z = ECA(), torch.rand(2, 5, 3, 4)
    mean = z.mean((2, 3))
    taps = gate.taps.weight.flatten()
    near = nn.functional.pad(mean, (1, 1))
    logits = taps[0] * near[:, :-2] + taps[1] * near[:, 1:-1] + taps[2] * near[:, 2:]
    assert torch.allclose(gate(z, mean), z * torch.sigmoid(logits)[:, :, None, None])


def test_the_last_step_of_the_reference_has_no_gate():
    net = NestedUNet(levels=4, width=4)
    ungated = {"up.3_2.gates.1", "up.2_3.gates.2", "up.1_4.gates.3", "heads.2.gate"}
    edges = {n for n, m in net.named_modules() if type(m).__name__ in ("ECA", "Ungated")}
    assert {n for n in edges if not isinstance(net.get_submodule(n), ECA)} == ungated


def test_thresholds_at_the_ends():
    net, x = small(), pictures()
    first, last = net.dynamic(x, 0.0), net.dynamic(x, 1.1)
    assert first.exit.tolist() == [1] * 4 and last.exit.tolist() == [3] * 4
    with torch.no_grad():
        assert torch.equal(first.output, net(x, exit=1))
        assert torch.equal(last.output, net(x, exit=3))
    assert torch.isnan(first.scores[:, 1]).all() and not torch.isnan(last.scores).any()


def mixed_threshold(net: NestedUNet, x: Tensor) -> float:
    scores = net.dynamic(x, 1.1).scores
    return float(scores.max(1).values.sort().values[1:3].mean())


def test_a_batch_is_its_images_one_by_one():
    net, x = small(), pictures(6)
    threshold = mixed_threshold(net, x)
    together = net.dynamic(x, threshold)
    assert len(together.exit.unique()) > 1
    for index, image in enumerate(x):
        alone = net.dynamic(image[None], threshold)
        assert alone.exit.item() == together.exit[index].item()
        assert alone.macs.item() == together.macs[index].item()
        assert torch.allclose(alone.output[0], together.output[index], atol=1e-6)
        assert torch.allclose(alone.scores[0], together.scores[index], atol=2e-3, equal_nan=True)


def test_the_exit_is_the_first_that_is_good_enough_and_macs_are_what_ran():
    net, x = small(), pictures(6)
    quality = TchebichefQuality()
    threshold = mixed_threshold(net, x)
    routed = net.dynamic(x, threshold, quality)
    with torch.no_grad():
        everything = net(x)
    judged = [quality(picture) for picture in everything[:-1]]
    for index in range(6):
        good = [k for k, j in enumerate(judged, 1) if j.score[index] >= threshold]
        exit = good[0] if good else 3
        assert routed.exit[index].item() == exit
        assert torch.allclose(routed.output[index], everything[exit - 1][index], atol=1e-6)
        spent = sum(int(j.macs[index]) for j in judged[:exit])
        assert routed.macs[index].item() == net.macs(40, 56, exit, assessed=True) + spent


def test_images_that_left_are_not_computed():
    net, x = small(), pictures(6)
    threshold = mixed_threshold(net, x)
    sizes: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: sizes.append(len(out)))
        for layer in net.down
    ]
    routed = net.dynamic(x, threshold)
    for hook in hooks:
        hook.remove()
    assert sizes == [int((routed.exit >= k).sum()) for k in range(1, int(routed.exit.max()) + 1)]
    assert sizes[-1] < 6


def test_early_exits_compute_what_their_exit_needs_and_no_more():
    net, x = small(levels=5, width=8), pictures(2, 64, 64)
    ran: list[tuple[str, tuple[int, ...]]] = []
    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _m, _i, out, n=name: ran.append((n, out.shape)))

    def layers(call: Callable[[], object]) -> Counter:
        ran.clear()
        with torch.no_grad():
            call()
        return Counter(layer for layer in ran if not layer[0].startswith("heads."))

    shallow, deep = (layers(lambda k=k: net(x, exit=k)) for k in (1, 4))
    assert layers(lambda: net.dynamic(x, 0.0)) == shallow
    assert layers(lambda: net.dynamic(x, 1.1)) == deep
    assert sum(shallow.values()) < sum(deep.values()) / 2


def test_colour_is_enhanced_in_its_luma():
    net = small()
    rgb = torch.rand(2, 3, 32, 40)
    routed = net.dynamic(rgb, 1.1)
    before, after = rgb_to_ycbcr(rgb), rgb_to_ycbcr(routed.output)
    with torch.no_grad():
        assert torch.allclose(after[:, :1], net(before[:, :1], exit=3), atol=1e-5)
    assert torch.allclose(after[:, 1:], before[:, 1:], atol=1e-5)
    assert small(in_ch=3).dynamic(rgb, 1.1).output.shape == rgb.shape


def test_an_offset_reaches_the_assessment():
    net, x = small(), pictures()
    quality = TchebichefQuality()
    routed = net.dynamic(x, 1.1, offset=(3, 2))
    with torch.no_grad():
        expected = quality(net(x, exit=1), offset=(3, 2)).score
    assert torch.allclose(routed.scores[:, 0], expected)


def test_channels_last_survives_regrouping():
    net = small().to(memory_format=torch.channels_last)
    partial = net.advance(net.begin(pictures().to(memory_format=torch.channels_last)))
    kept = partial.keep(torch.tensor([0, 2]))
    for node in kept.nodes.values():
        assert node.feature.is_contiguous(memory_format=torch.channels_last)


def test_a_budget_names_an_exit():
    net = small()
    costs = [net.macs(40, 40, k) for k in (1, 2, 3)]
    assert [net.exit_under(c, 40, 40) for c in costs] == [1, 2, 3]
    assert net.exit_under(costs[1] - 1, 40, 40) == 1
    with pytest.raises(RequestError, match="below the first exit"):
        net.exit_under(costs[0] - 1, 40, 40)


@pytest.mark.parametrize(
    "x", [torch.rand(1, 2, 8, 8), torch.rand(8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8)]
)
def test_unfit_inputs_are_refused(x: Tensor):
    with pytest.raises(RequestError, match="does not fit"):
        small()(x)


def test_exits_that_do_not_exist_are_refused():
    for exit in (0, 4):
        with pytest.raises(RequestError, match="exits 1 to 3"):
            small()(pictures(), exit=exit)
    with pytest.raises(RequestError, match="cannot be built"):
        NestedUNet(levels=1)


def test_the_configuration_rebuilds_the_network():
    net = small(separable=False, eca_last=True)
    twin = NestedUNet(**net.config)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(pictures(), exit=3), net(pictures(), exit=3))
