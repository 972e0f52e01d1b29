"""The no-reference score against closed forms, a slow literal version and measured tables."""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import signal, stats
from skimage import data as photographs
from torch import Tensor

from pantarhei.compute.enhancement.quality import TchebichefQuality, tchebichef_basis
from pantarhei.data.simulate.codecs import hevc_intra, jpeg_luma, luma, to_eight_bit
from pantarhei.errors import RequestError

DATA = Path(os.environ.get("PANTARHEI_DATA", Path(__file__).parents[4] / "shared" / "data"))
QFS = torch.tensor([10, 20, 30, 40, 50])


def photograph(name: str = "camera", size: int = 256) -> Tensor:
    pixels = np.atleast_3d(getattr(photographs, name)())[:size, :size, :3].copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255
    return to_eight_bit(luma(image))


def slow_quality(image: np.ndarray, n: int) -> tuple[float, float, float]:
    """The sheet's text, patch by patch and formula by formula."""
    basis = np.linalg.qr(np.vander(np.arange(n), n, increasing=True).astype(float))[0].T
    axis = np.arange(3) - 1
    kernel = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 5.0**2))
    kernel /= kernel.sum()

    def moments(patch: np.ndarray) -> np.ndarray:
        unit = patch / np.sqrt((patch**2).sum())
        unit = unit - unit.mean()
        return basis @ unit @ basis.T

    smooth, textured = [], []
    for row in range(image.shape[0] // n - 1):
        for column in range(image.shape[1] // n - 1):
            top, left = n // 2 + row * n, n // 2 + column * n
            patch = image[top : top + n, left : left + n]
            m = moments(patch)
            if (m**2).sum() - m[0, 0] ** 2 > 0.004:
                b = moments(signal.convolve2d(patch, kernel, mode="same"))
                textured.append(1 - ((2 * m * b + 1e-5) / (m**2 + b**2 + 1e-5)).mean())
            else:
                strength = np.abs(m).sum() - abs(m[0, 0]) + 1e-5
                h = min(np.abs(m[-1]).sum() / strength, 0.05)
                w = min(np.abs(m[:, -1]).sum() / strength, 0.05)
                smooth.append(math.log(1 - (h + w) / 2) / math.log(1 - 0.05))
    block = float(np.mean(smooth)) if smooth else 1.0
    blur = float(np.mean(textured)) if textured else 1.0
    return block**0.9 * blur**0.1, block, blur


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_basis_is_orthonormal_and_spans_the_polynomials(n: int):
    basis = tchebichef_basis(n)
    assert torch.allclose(basis @ basis.T, torch.eye(n, dtype=torch.float64), atol=1e-12)
    powers = torch.arange(n, dtype=torch.float64)[:, None] ** torch.arange(n)
    q, r = torch.linalg.qr(powers)
    assert torch.allclose(basis, (q * r.diagonal().sign()).T, atol=1e-9)


def test_last_rows_as_printed():
    eight = [-0.0171, 0.1195, -0.3585, 0.5974, -0.5974, 0.3585, -0.1195, 0.0171]
    assert tchebichef_basis(8)[-1].tolist() == pytest.approx(eight, abs=5e-5)
    four = [-0.2236, 0.6708, -0.6708, 0.2236]
    assert tchebichef_basis(4)[-1].tolist() == pytest.approx(four, abs=5e-5)


@pytest.mark.parametrize(("n", "shape"), [(8, (120, 133)), (4, (61, 90)), (8, (64, 64))])
def test_it_is_the_literal_algorithm(n: int, shape: tuple[int, int]):
    image = jpeg_luma(photograph("astronaut")[..., : shape[0], 100 : 100 + shape[1]], 30)
    fast = TchebichefQuality(n=n)(image)
    slow = slow_quality(image[0, 0].numpy(), n)
    assert [float(v) for v in fast[:3]] == pytest.approx(slow, abs=1e-10)
    assert 0 < float(fast.textured) < 1


def test_the_spread_of_moments_is_the_squared_coefficient_of_variation():
    quality = TchebichefQuality()
    image = photograph()[:, 0]
    tiles, centred = quality._patches(image, (0, 0))
    moments = quality._moments(centred)
    spread = moments.square().sum((1, 2)) - moments[:, 0, 0] ** 2
    expected = tiles.var((1, 2), correction=0) / tiles.square().mean((1, 2))
    assert torch.allclose(spread, expected, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_flat_and_black_images_are_finite(value: float):
    result = TchebichefQuality()(torch.full((2, 1, 40, 40), value))
    assert all(torch.isfinite(column.double()).all() for column in result)
    assert result.textured.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (15, 40), (7, 300)])
def test_an_image_without_a_patch_scores_one(shape: tuple[int, int]):
    result = TchebichefQuality()(torch.rand(2, 1, *shape))
    assert result.score.tolist() == [1, 1]
    assert result.macs.tolist() == [0, 0]


@settings(max_examples=15, deadline=None)
@given(gain=st.floats(0.05, 1.0), n=st.sampled_from([4, 8]))
def test_a_global_gain_does_not_change_the_score(gain: float, n: int):
    image = jpeg_luma(photograph(size=96), 20)
    quality = TchebichefQuality(n=n)
    before, after = quality(image), quality(image * gain, eight_bit=False)
    assert torch.allclose(before.score, after.score, atol=1e-9)


@pytest.mark.parametrize("n", [4, 8])
def test_a_ramp_scores_zero(n: int):
    ramp = 0.6 + 0.001 * torch.arange(64, dtype=torch.float64).expand(64, 64)
    result = TchebichefQuality(n=n)(ramp + 0.002 * ramp.T, eight_bit=False)
    assert result.textured.item() == 0
    assert result.blocking.item() == pytest.approx(0, abs=1e-8)


def test_patch_scores_at_the_cap():
    both, one = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    both[0, -1, -1] = 1.0
    one[0, -1, 3] = 1.0
    quality = TchebichefQuality()
    assert quality.blocking_scores(both).item() == pytest.approx(1, abs=1e-12)
    expected = math.log(1 - 0.05 / 2) / math.log(1 - 0.05)
    assert quality.blocking_scores(one).item() == pytest.approx(expected, abs=1e-12)
    assert expected == pytest.approx(0.4936, abs=5e-5)


def test_fine_detail_across_the_border_is_high_and_its_loss_is_low():
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    quality = TchebichefQuality()
    detailed = quality(0.5 + noise)
    coded = quality(jpeg_luma((0.5 + noise)[None, None] + 0.002 * torch.arange(64), 10))
    assert detailed.textured.item() == coded.textured.item() == 0
    assert detailed.blocking.item() > 0.95 > 0.5 > coded.blocking.item()


def test_a_lone_step_at_the_border_is_at_the_cap_in_its_direction():
    step = 0.5 + 0.02 * (torch.arange(64) // 8 % 2).expand(64, 64)
    result = TchebichefQuality()(step, eight_bit=False)
    assert result.blocking.item() == pytest.approx(0.4936, abs=1e-4)


def test_a_blurred_texture_scores_below_a_sharp_one():
    texture = 0.2 + 0.6 * torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(texture[None, None], 3, 1, 1)
    quality = TchebichefQuality(smooth=0.0)
    assert quality(texture).blur.item() > quality(blurred).blur.item()


def test_a_batch_is_the_images_one_by_one_in_any_type():
    images = jpeg_luma(torch.cat([photograph(), photograph("moon")]), torch.tensor([10, 50]))
    quality = TchebichefQuality()
    together = quality(images)
    for index, image in enumerate(images):
        alone = quality(image)
        assert [v[0].item() for v in alone] == pytest.approx([v[index].item() for v in together])
    as_bytes = (images * 255).round().to(torch.uint8)
    assert torch.allclose(quality(as_bytes).score, together.score, atol=1e-9)
    assert torch.allclose(quality(images.float()).score, together.score, atol=1e-9)
    single = TchebichefQuality(dtype=torch.float32)(images)
    assert torch.allclose(single.score.double(), together.score, atol=2e-3)


def test_floats_are_scored_as_the_eight_bit_file_would_be():
    image = jpeg_luma(photograph(), 30)
    moved = image + 0.3 / 255 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    quality = TchebichefQuality()
    assert torch.equal(quality(moved).score, quality(image).score)
    assert not torch.equal(quality(moved, eight_bit=False).score, quality(image).score)
    assert torch.equal(quality(image * 3 - 1).score, quality((image * 3 - 1).clamp(0, 1)).score)


@pytest.mark.parametrize("crop", [(3, 5), (0, 6), (7, 0)])
def test_an_offset_brings_a_crop_back_to_the_grid(crop: tuple[int, int]):
    image = jpeg_luma(photograph("astronaut"), 20)
    top, left = crop
    offset = (-top % 8, -left % 8)
    cropped = image[..., top:, left:]
    quality = TchebichefQuality()
    aligned = image[..., top + offset[0] :, left + offset[1] :]
    assert torch.equal(quality(cropped, offset=offset).score, quality(aligned).score)
    assert quality.grid(cropped).tolist() == [list(offset)]
    assert quality.grid(cropped[..., :3]).tolist() == [[offset[0], 0]]
    assert torch.equal(quality(cropped, offset="auto").score, quality(aligned).score)


def test_the_grid_is_found_for_each_image_of_a_batch():
    image = jpeg_luma(photograph("astronaut"), 20)
    batch = torch.cat([image[..., 2:202, 3:203], image[..., 5:205, 8:208]])
    assert TchebichefQuality().grid(batch).tolist() == [[6, 5], [3, 0]]


def test_hevc_is_ordered_with_patches_of_four():
    pytest.importorskip("av", reason="needs the extra 'hevc'")
    raw = photograph("astronaut").expand(3, -1, -1, -1)
    score = TchebichefQuality(n=4)(hevc_intra(raw, torch.tensor([22, 32, 42]))).score
    assert score[0] > score[1] > score[2]


def test_the_score_orders_the_quality_of_photographs():
    scores = []
    for name in ("camera", "astronaut", "coffee"):
        raw = photograph(name, 400).expand(5, -1, -1, -1)
        scores.append(TchebichefQuality()(jpeg_luma(raw, QFS)).score)
    mean = torch.stack(scores).mean(0)
    assert (mean.diff() > 0).all()
    assert np.mean([stats.spearmanr(QFS, score)[0] for score in scores]) >= 0.93


@pytest.mark.parametrize(
    ("name", "expected", "rank", "monotone"),
    [
        ("live1", [0.583, 0.740, 0.799, 0.833, 0.852], 0.979, 26),
        ("classic5", [0.674, 0.825, 0.879, 0.901, 0.907], 1.0, 5),
    ],
)
def test_the_measured_tables(name: str, expected: list[float], rank: float, monotone: int):
    path = DATA / "images_test" / f"{name}.zip"
    if not path.exists():
        pytest.skip(f"needs {path} (set PANTARHEI_DATA)")
    quality, scores = TchebichefQuality(), []
    with zipfile.ZipFile(path) as archive:
        for entry in sorted(archive.namelist()):
            pixels = np.array(Image.open(archive.open(entry)).convert("RGB"))
            rgb = torch.from_numpy(pixels).permute(2, 0, 1)[None].double() / 255
            raw = to_eight_bit(luma(rgb)).expand(5, -1, -1, -1)
            scores.append(quality(jpeg_luma(raw, QFS)).score)
    table = torch.stack(scores)
    assert table.mean(0).tolist() == pytest.approx(expected, abs=0.005)
    ranks = [stats.spearmanr(QFS, row)[0] for row in table]
    assert float(np.mean(ranks)) == pytest.approx(rank, abs=0.005)
    assert int((table.diff(dim=1) > 0).all(1).sum()) == monotone


def test_colour_and_odd_patches_are_refused():
    with pytest.raises(RequestError, match="luma"):
        TchebichefQuality()(torch.rand(1, 3, 32, 32))
    with pytest.raises(RequestError, match="patch size"):
        TchebichefQuality(n=5)
    with pytest.raises(RequestError, match="auto"):
        TchebichefQuality()(torch.rand(1, 1, 32, 32), offset="guess")


def test_the_cost_of_an_assessment():
    quality = TchebichefQuality()
    smooth = quality(torch.full((1, 1, 520, 520), 0.5))
    assert smooth.macs.item() == 64 * 64 * 64 * 16  # 2n multiplications a pixel
    rough = quality(torch.rand(1, 1, 520, 520))
    assert rough.textured.item() == 1
    assert rough.macs.item() == 64 * 64 * 64 * (16 + 16 + 9)
