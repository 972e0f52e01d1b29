from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pantarhei.compute.enhancement import tiles
from pantarhei.compute.enhancement.nested_unet import ECA, NestedUNet
from pantarhei.compute.enhancement.quality import TchebichefQuality
from pantarhei.compute.enhancement.tiles import Enhancer, margin, windows
from pantarhei.errors import RequestError


@pytest.fixture(scope="module")
def net() -> NestedUNet:
    """A network whose gates and deep levels matter far more than a trained one's."""
    torch.manual_seed(0)
    made = NestedUNet(levels=4, width=6)
    for module in made.modules():
        if isinstance(module, ECA):
            torch.nn.init.normal_(module.taps.weight, std=3)
        elif isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return made


def patchwork(height: int, width: int, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
    """An image whose parts differ a lot, so that a tile's means are not the image's."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = 128 + 100 * np.sin(x / 37) * np.cos(y / 53)
    noise = draw.normal(0, 60, (height, width)) * (x > width / 2) * (y > height / 3)
    blocks = draw.integers(-25, 25, (height // 8 + 1, width // 8 + 1)).repeat(8, 0).repeat(8, 1)
    image = (smooth + noise + blocks[:height, :width]).clip(0, 255) / 255
    return (image * np.iinfo(dtype).max).astype(dtype)


def untiled(net: NestedUNet, plane: np.ndarray, exit: int) -> np.ndarray:
    """What the network gives on the whole plane, by its own forward."""
    top = np.iinfo(plane.dtype).max
    with torch.no_grad():
        x = torch.from_numpy(plane.astype(np.float32) / top)[None, None]
        y = net.eval()(x, exit=exit)[0, 0].clamp(0, 1) * top
    return y.round().numpy().astype(int)


# ---- geometry --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([8, 16, 32]),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_cores_cover_every_pixel_once(h: int, w: int, multiple: int, units: int, rim: int) -> None:
    seen = np.zeros([-(-s // multiple) * multiple for s in (h, w)], int)
    core, around = units * multiple, rim * multiple
    for window in windows(h, w, core, around, multiple):
        top, left, bottom, right = window.core
        up, west, down, east = window.outer
        seen[top:bottom, left:right] += 1
        assert max(bottom - top, right - left) <= core
        assert all(v % multiple == 0 for v in (*window.core, *window.outer))
        assert up == max(0, top - around) and down == min(seen.shape[0], bottom + around)
        assert west == max(0, left - around) and east == min(seen.shape[1], right + around)
        for level in range(1, 4):
            rows, columns = window.inner(level)
            assert rows.stop - rows.start == (bottom - top) >> (level - 1)
            assert columns.stop - columns.start == (right - left) >> (level - 1)
    assert (seen == 1).all()


@pytest.mark.parametrize("levels", [3, 4, 5])
def test_the_margin_is_the_receptive_field(levels: int) -> None:
    """With gates held fixed, no pixel farther than the margin has any influence; a near one has."""
    torch.manual_seed(1)
    net = NestedUNet(levels, width=4).double()
    for parameter in net.parameters():  # all positive, so that no ReLU hides a path
        torch.nn.init.uniform_(parameter, 0.01, 0.1)
    exit, multiple = net.exits, net.multiple
    rim = margin(exit, multiple)
    length = 2 * (rim + multiple)
    x = torch.rand(1, 1, length, length, dtype=torch.float64, requires_grad=True)

    def pool(at: tuple[int, int], feature: Tensor) -> Tensor:
        return torch.ones(1, 4, dtype=torch.float64)

    partial = net.begin(x, pool)
    for _ in range(exit):
        partial = net.advance(partial)
    middle = length // 2
    net.read(partial)[0, 0, middle : middle + multiple, middle : middle + multiple].sum().backward()
    assert x.grad is not None
    reached = x.grad[0, 0].ne(0).nonzero()
    first, last = int(reached.min()), int(reached.max())
    assert rim - multiple < middle - first <= rim  # rounding up costs less than a unit
    assert middle < last <= middle + multiple - 1 + rim


# ---- tiled equals whole ----------------------------------------------------------------------


@pytest.mark.parametrize("exit", [1, 2, 3])
@pytest.mark.parametrize("shape", [(300, 421), (97, 640)])
def test_tiles_leave_no_trace(net: NestedUNet, shape: tuple[int, int], exit: int) -> None:
    """At 16 bit, where one step is 1/65535 and a seam of 1/255 would be 257 of them."""
    plane = patchwork(*shape, np.uint16)
    whole = untiled(net, plane, exit)
    assert np.abs(whole - plane.astype(int)).mean() > 500  # the network does something
    enhancer = Enhancer(net, tile=160, precision="float32", tolerance=0)
    done = enhancer(plane, exit=exit)
    assert done.passes >= 2 and done.drift == 0 and done.exit == exit
    assert np.abs(done.plane - whole).max() <= 3


def test_one_pass_already_has_no_seams(net: NestedUNet) -> None:
    """All tiles share their gates: what is left is one smooth error of the gates, not a seam."""
    plane = patchwork(300, 421, np.uint16)
    enhancer = Enhancer(net, tile=160, precision="float32", tolerance=1)
    done = enhancer(plane, exit=3)
    assert done.passes == 1
    error = done.plane - untiled(net, plane, 3)
    step = np.abs(np.diff(error, axis=1))
    rim = margin(3, net.multiple)
    cuts = {w.core[1] for w in windows(*plane.shape, enhancer.tile - 2 * rim, rim, net.multiple)}
    cuts.discard(0)
    at_cuts = step[:, [c - 1 for c in cuts]].mean()
    assert at_cuts <= 1.5 * step.mean() + 1


def test_tiles_with_their_own_means_would_show(net: NestedUNet) -> None:
    """The comparison above can fail: gating each tile by its own means breaks it."""
    plane = patchwork(300, 421, np.uint16)
    rim = margin(3, net.multiple)
    result = np.empty(plane.shape, int)
    for window in windows(*plane.shape, 64, rim, net.multiple):
        up, west, down, east = window.outer
        rows, columns = window.inner(1)
        piece = np.pad(plane, ((0, 8), (0, 8)), mode="edge")[up:down, west:east]
        target = result[slice(*window.core[::2]), slice(*window.core[1::2])]
        target[:] = untiled(net, piece, 3)[rows, columns][: len(target), : target.shape[1]]
    assert np.abs(result - untiled(net, plane, 3)).max() > 257


def test_bfloat16_tiles_are_within_one_step_of_8_bit() -> None:
    torch.manual_seed(0)
    net = NestedUNet(levels=4, width=6)  # small residuals, as a trained network's
    plane = patchwork(200, 300)
    done = Enhancer(net, tile=160, precision="bfloat16", tolerance=0.001)(plane, exit=3)
    assert done.passes >= 1
    assert np.abs(done.plane - untiled(net, plane, 3)).max() <= 1


def test_a_plane_that_fits_is_computed_once_by_the_network_itself(net: NestedUNet) -> None:
    plane = patchwork(45, 61)
    done = Enhancer(net, precision="float32")(plane, exit=2)
    assert done.passes == 0
    assert np.abs(done.plane - untiled(net, plane, 2)).max() <= 1
    assert done.macs == net.macs(45, 61, 2)


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_any_small_size(h: int, w: int) -> None:
    net = NestedUNet(levels=3, width=2)
    done = Enhancer(net)(patchwork(h, w), threshold=0.5)
    assert done.plane.shape == (h, w) and 1 <= done.exit <= 2


# ---- the exit --------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [128, 1024])
def test_the_exit_is_that_of_the_whole_image(net: NestedUNet, tile: int) -> None:
    """For any threshold the tiled route is the one the pooled scores of the whole image give."""
    plane = patchwork(140, 200)
    quality = TchebichefQuality()
    pooled = [
        float(quality(torch.from_numpy(untiled(net, plane, k).astype(np.uint8)))[0]) for k in (1, 2)
    ]
    enhancer = Enhancer(net, tile=tile, precision="float32", tolerance=1e-4)
    assert enhancer.tile == tile
    between = sorted([0.0, *pooled, 1.1])
    for threshold in [(a + b) / 2 for a, b in itertools.pairwise(between)]:
        wanted = next((k for k, s in enumerate(pooled, 1) if s >= threshold), 3)
        done = enhancer(plane, threshold=threshold)
        assert done.exit == wanted
        assert done.scores == pytest.approx(pooled[: len(done.scores)], abs=2e-3)
        assert len(done.scores) == min(wanted, 2)
        assert np.abs(done.plane - untiled(net, plane, wanted)).max() <= 1


def test_deeper_exits_run_only_for_images_that_need_them(net: NestedUNet) -> None:
    plane = patchwork(140, 200)
    enhancer = Enhancer(net, tile=128, precision="float32")
    easy, hard = enhancer(plane, threshold=0.0), enhancer(plane, threshold=1.1)
    assert (easy.exit, hard.exit) == (1, 3)
    assert easy.macs < 0.8 * hard.macs


def test_a_wrong_prediction_goes_deeper(net: NestedUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows only guess the depth: when they promise too much, another pass follows."""
    plane = patchwork(140, 200)
    enhancer = Enhancer(net, tile=128, precision="float32", tolerance=1e-4)
    sample = enhancer._sample

    def optimist(plane: np.ndarray, depth: int) -> Any:
        means, likely, macs = sample(plane, depth)
        return means, [2.0 for _ in likely], macs

    monkeypatch.setattr(enhancer, "_sample", optimist)
    done = enhancer(plane, threshold=1.1)
    assert done.exit == 3 and len(done.scores) == 2
    assert np.abs(done.plane - untiled(net, plane, 3)).max() <= 1


@pytest.mark.parametrize("shape", [(700, 90), (264, 40), (9, 9), (8, 30), (16, 16), (513, 77)])
def test_the_score_is_pooled_over_patches(net: NestedUNet, shape: tuple[int, int]) -> None:
    plane = patchwork(*shape)
    whole = float(TchebichefQuality()(torch.from_numpy(plane)).score)
    assert Enhancer(net).score(plane)[0] == pytest.approx(whole, abs=1e-9)
    # A 16-bit plane is scored as the 8-bit file it would be.
    assert Enhancer(net).score(plane.astype(np.uint16) * 257)[0] == pytest.approx(whole, abs=1e-9)


# ---- limits ----------------------------------------------------------------------------------


def test_no_computation_is_larger_than_a_tile(net: NestedUNet) -> None:
    seen: list[int] = []
    enhancer = Enhancer(net, tile=160)
    enhancer.net.stem.register_forward_pre_hook(
        lambda _, x: seen.append(x[0].shape[-1] * x[0].shape[-2])
    )
    enhancer(patchwork(300, 500), exit=3)
    assert len(seen) > 4
    assert max(seen[1:]) <= 160 * 160  # the first is the sample, of fixed size


_PEAK = """
import resource, sys
import numpy as np, torch
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.tiles import Enhancer
torch.set_num_threads(1)
height, width = int(sys.argv[1]), int(sys.argv[2])
plane = np.tile(np.arange(256, dtype=np.uint8), (height, width // 256))
Enhancer(NestedUNet(4, 4), tile=128, tolerance=1)(plane, exit=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_memory_does_not_grow_with_the_image() -> None:
    def peak(height: int, width: int) -> int:
        command = [sys.executable, "-c", _PEAK, str(height), str(width)]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    small, large = peak(512, 512), peak(2048, 2048)
    extra = 2048 * 2048 - 512 * 512
    features = 4 * 4 * extra  # bytes of one of the network's full-size float32 maps
    assert large - small < 8 * extra  # the arrays themselves: input, output, 8-bit copies
    assert large - small < features


def test_the_network_given_is_not_changed(net: NestedUNet) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    Enhancer(net, tile=96)(patchwork(200, 300), threshold=0.7)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_requests_that_make_no_sense(net: NestedUNet) -> None:
    with pytest.raises(RequestError, match="in_ch=1"):
        Enhancer(NestedUNet(3, 4, in_ch=3))
    plane = patchwork(16, 16)
    with pytest.raises(RequestError, match="not both"):
        Enhancer(net)(plane)
    with pytest.raises(RequestError, match="exits 1 to 3"):
        Enhancer(net)(plane, exit=4)


def test_nothing_is_read_from_beyond_a_tile_s_margin(
    net: NestedUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A margin that is too small is seen by the equality test above."""
    plane = patchwork(97, 640, np.uint16)
    monkeypatch.setattr(tiles, "margin", lambda exit, multiple: 0)
    done = Enhancer(net, tile=64, precision="float32", tolerance=0)(plane, exit=3)
    assert np.abs(done.plane - untiled(net, plane, 3)).max() > 257
