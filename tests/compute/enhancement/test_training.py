"""Loss weights, the weighted loss and the stream of crops."""

from __future__ import annotations

import pytest
import torch
from skimage import data as photographs
from torch import Tensor, nn

from pantarhei.compute.enhancement.baselines import DCAD, DnCNN, SingleExit
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.training import (
    Batch,
    CompressedCrops,
    difficulty,
    difficulty_weights,
    exit_loss,
    uniform_weights,
    weighted_mse,
)
from pantarhei.data.simulate.codecs import jpeg_luma
from pantarhei.errors import RequestError


def test_the_published_weights():
    table = [
        [2, 1, 1, 0.5, 0.5],
        [1, 2, 1, 0.5, 0.5],
        [0.5, 1, 2, 1, 0.5],
        [0.5, 0.5, 1, 2, 1],
        [0.5, 0.5, 1, 1, 2],
    ]
    jpeg = difficulty(torch.tensor([50, 40, 30, 20, 10]), 50, 10)
    hevc = difficulty(torch.tensor([22, 27, 32, 37, 42]), 22, 42)
    assert difficulty_weights(jpeg, 5).tolist() == table
    assert difficulty_weights(hevc, 5).tolist() == table


@pytest.mark.parametrize("exits", [1, 2, 3, 4, 7])
def test_weights_of_any_number_of_exits(exits: int):
    hard = torch.linspace(0, 1, 11)
    weights = difficulty_weights(hard, exits)
    assert weights.shape == (11, exits)
    assert ((weights == 2).sum(1) == 1).all()
    assert weights.argmax(1).tolist() == (hard * (exits - 1)).round().long().tolist()
    assert (weights.argmax(1).diff() >= 0).all()
    assert uniform_weights(hard, exits).unique().tolist() == [1]


def test_the_loss_weights_each_sample_before_the_mean():
    torch.manual_seed(0)
    raw, pictures = torch.rand(3, 1, 4, 4), [torch.rand(3, 1, 4, 4) for _ in range(2)]
    weights = torch.tensor([[2.0, 0.5], [0.5, 2.0], [1.0, 0.0]])
    expected = 0.0
    for b in range(3):
        for k in range(2):
            error = ((pictures[k][b] - raw[b]) ** 2).mean()
            expected += float(weights[b, k] * error) / 3
    assert float(weighted_mse(pictures, raw, weights)) == pytest.approx(expected)


def test_the_gradient_goes_where_the_weights_say():
    net = NestedUNet(levels=3, width=4)
    batch = Batch(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), torch.zeros(1))
    for head in net.heads:
        nn.init.normal_(head.residual[-1].weight)
    only_first = exit_loss(lambda hard, exits: torch.eye(exits)[:1].expand(len(hard), -1))
    only_first(net, batch).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.heads[0].parameters() if p.dim() > 1)
    assert all(not p.grad.any() for p in net.heads[1].parameters())


@pytest.mark.parametrize("make", [DnCNN, DCAD, lambda: SingleExit(NestedUNet(3, 4))])
def test_static_networks_train_with_the_same_loss(make: type[nn.Module]):
    net = make()
    batch = CompressedCrops([torch.rand(32, 32)], size=16, batch=2)(0)
    loss = exit_loss()(net, batch)
    expected = ((net(batch.compressed) - batch.raw) ** 2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in net.parameters())


def gradient(height: int = 48, width: int = 40) -> Tensor:
    """An image whose every pixel tells where it came from."""
    index = torch.arange(height * width).reshape(height, width)
    return (index % 256).to(torch.uint8)


def test_draws_depend_on_seed_and_number_alone():
    images = [torch.rand(40, 50), torch.rand(1, 64, 33)]
    crops = CompressedCrops(images, size=32, batch=8, seed=3)
    again = CompressedCrops(images, size=32, batch=8, seed=3)
    crops(5)
    for a, b in zip(crops(7), again(7), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(crops(7).raw, crops(8).raw)
    assert not torch.equal(crops(7).raw, CompressedCrops(images, size=32, batch=8, seed=4)(7).raw)


def test_crops_are_compressed_on_their_own_grid_at_their_own_quality():
    crops = CompressedCrops([torch.rand(40, 50)], size=32, batch=16, qualities=(50, 30, 10))
    compressed, raw, hard = crops(0)
    for c, r, d in zip(compressed, raw, hard, strict=True):
        quality = 50 - 40 * float(d)
        assert torch.equal(c, jpeg_luma(r[None], round(quality))[0])
    assert set(hard.tolist()) == {0.0, 0.5, 1.0}


def test_all_eight_symmetries_and_every_place_occur():
    image = gradient()
    crops = CompressedCrops([image], size=32, batch=64)
    corners = set()
    directions = set()
    for n in range(12):
        for crop in (crops(n).raw * 255).round().int():
            plane = crop[0]
            down = int((plane[1, 0] - plane[0, 0]) % 256)
            across = int((plane[0, 1] - plane[0, 0]) % 256)
            directions.add((down, across))
            corners.add(int(plane.min()))
    assert directions == {(a, b) for a, b in ((40, 1), (216, 1), (40, 255), (216, 255))} | {
        (b, a) for a, b in ((40, 1), (216, 1), (40, 255), (216, 255))
    }


def test_images_too_small_for_a_crop_are_left_out_or_refused():
    assert len(CompressedCrops([torch.rand(10, 99), torch.rand(32, 32)], size=32).images) == 1
    with pytest.raises(RequestError, match="32x32"):
        CompressedCrops([torch.rand(10, 99)], size=32)


def test_training_enhances():
    torch.manual_seed(0)
    image = torch.from_numpy(photographs.astronaut()[..., 1].copy())
    crops = CompressedCrops([image], size=32, batch=8, qualities=(20, 10))
    net, loss = NestedUNet(levels=3, width=8), exit_loss()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for n in range(120):
        optimizer.zero_grad()
        loss(net, crops(n)).backward()
        optimizer.step()
    test = CompressedCrops([image], size=128, batch=16, qualities=(20, 10))(0)
    before = ((test.compressed - test.raw) ** 2).mean()
    with torch.no_grad():
        after = [float(((y - test.raw) ** 2).mean() / before) for y in net(test.compressed)]
    assert after[-1] < 0.97
