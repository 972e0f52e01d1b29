"""PSNR, SSIM and PSNR-B against scikit-image and the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import data as photographs
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pantarhei.compute.enhancement.metrics import psnr, psnr_b, ssim
from pantarhei.data.simulate.codecs import jpeg_luma
from pantarhei.errors import RequestError


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    pixels = np.stack([photographs.camera()[:120, :97], photographs.moon()[:120, :97]])
    raw = torch.from_numpy(pixels)[:, None].float() / 255
    return jpeg_luma(raw, torch.tensor([10, 30])), raw


def as_bytes(images: torch.Tensor) -> list[np.ndarray]:
    return list((images[:, 0] * 255).round().to(torch.uint8).numpy())


def test_psnr_and_ssim_are_those_of_scikit_image():
    image, raw = pair()
    for index, (a, b) in enumerate(zip(as_bytes(image), as_bytes(raw), strict=True)):
        assert float(psnr(image, raw)[index]) == pytest.approx(peak_signal_noise_ratio(b, a))
        theirs, full = structural_similarity(
            b, a, data_range=255, gaussian_weights=True, use_sample_covariance=False, full=True
        )
        del theirs  # its mean includes windows that lean over the edge
        inside = full[5:-5, 5:-5].mean()
        assert float(ssim(image, raw)[index]) == pytest.approx(inside, abs=1e-9)


def test_floats_count_as_their_eight_bit_file():
    image, raw = pair()
    assert torch.equal(psnr(image + 0.4 / 255, raw), psnr(image, raw))
    assert torch.equal(psnr(raw + 2, raw), psnr(torch.ones_like(raw), raw))
    assert math.isinf(float(psnr(raw, raw)[0]))


def slow_psnr_b(a: np.ndarray, b: np.ndarray) -> float:
    height, width = a.shape
    borders, inner = [], []
    for y in range(height):
        for x in range(width - 1):
            (borders if (x + 1) % 8 == 0 else inner).append((a[y, x] - a[y, x + 1]) ** 2)
    for y in range(height - 1):
        for x in range(width):
            (borders if (y + 1) % 8 == 0 else inner).append((a[y, x] - a[y + 1, x]) ** 2)
    excess = np.mean(borders) - np.mean(inner)
    factor = math.log2(8) / math.log2(min(height, width)) if excess > 0 else 0.0
    return 10 * math.log10(255**2 / (((a - b) ** 2).mean() + factor * excess))


def test_psnr_b_is_its_definition():
    image, raw = pair()
    image, raw = image[..., 40:90, :60], raw[..., 40:90, :60]
    image, raw = image[..., :, :], raw[..., :, :]
    for index, (a, b) in enumerate(zip(as_bytes(image), as_bytes(raw), strict=True)):
        expected = slow_psnr_b(a.astype(float), b.astype(float))
        assert float(psnr_b(image, raw)[index]) == pytest.approx(expected)


def test_blocking_lowers_psnr_b_below_psnr():
    image, raw = pair()
    assert (psnr_b(image, raw) < psnr(image, raw)).all()
    noisy = raw + 0.05 * torch.randn(raw.shape, generator=torch.Generator().manual_seed(0))
    excess = psnr(image, raw) - psnr_b(image, raw)
    assert (psnr(noisy, raw) - psnr_b(noisy, raw) < excess).all()


def test_shapes_are_checked():
    with pytest.raises(RequestError, match="compared"):
        psnr(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 9))
    with pytest.raises(RequestError, match="too small"):
        ssim(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8))
