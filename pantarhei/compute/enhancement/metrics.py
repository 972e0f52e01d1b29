"""How far a picture is from the original: PSNR, SSIM, PSNR-B.

All take pictures (B, 1, H, W) in [0, 1], clamp and round both to 8 bit first (what a file would
hold), and return one float64 value per image, (B,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pantarhei.errors import RequestError


def psnr(image: Tensor, original: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB, ``10 log10(255^2 / MSE)``; inf where equal.

    >>> psnr(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 1 / 255)).round(decimals=2).tolist()
    [48.13]
    """
    a, b = _eight_bit(image, original)
    return 10 * torch.log10(255**2 / (a - b).square().mean((1, 2, 3)))


def ssim(image: Tensor, original: Tensor) -> Tensor:
    """Return the mean structural similarity of Wang, Bovik, Sheikh and Simoncelli (2004).

    Gaussian windows of 11x11 and sigma 1.5 that lie inside the picture, K1 = .01, K2 = .03,
    population (co)variances. The picture must be at least 11x11.

    >>> x = torch.rand(1, 1, 16, 16)
    >>> ssim(x, x).tolist()
    [1.0]
    """
    a, b = _eight_bit(image, original)
    if min(a.shape[-2:]) < 11:
        raise RequestError(f"a {a.shape[-2]}x{a.shape[-1]} picture is too small for SSIM (11x11).")
    t = torch.arange(11, dtype=a.dtype, device=a.device) - 5
    taps = torch.exp(-(t**2) / (2 * 1.5**2))
    taps = taps / taps.sum()

    def smooth(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, taps.reshape(1, 1, 1, 11)), taps.reshape(1, 1, 11, 1))

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


def psnr_b(image: Tensor, original: Tensor, block: int = 8) -> Tensor:
    """Return the block-aware PSNR in dB of Yim and Bovik (IEEE TIP 20(1), 2011).

    ``10 log10(255^2 / (MSE + BEF))``; the blocking-effect factor compares the mean square step of
    ``image`` over the borders of ``block`` x ``block`` blocks, D_b, with that of all other
    neighbours, D_n: ``BEF = max(0, D_b - D_n) log2(block) / log2(min(H, W))``.

    >>> x = torch.zeros(1, 1, 16, 16)
    >>> y = x.clone()
    >>> y[..., 8:] = 0.1
    >>> bool(psnr_b(y, x) < psnr(y, x))
    True
    """
    a, b = _eight_bit(image, original)
    border = inner = a.new_zeros(len(a))
    count_b = count_n = 0
    for axis in (2, 3):
        step = a.diff(dim=axis).square().sum((1, 5 - axis))
        at_border = torch.arange(1, a.shape[axis], device=a.device) % block == 0
        border = border + step[:, at_border].sum(1)
        inner = inner + step[:, ~at_border].sum(1)
        count_b += int(at_border.sum()) * a.shape[5 - axis]
        count_n += int((~at_border).sum()) * a.shape[5 - axis]
    excess = border / max(1, count_b) - inner / max(1, count_n)
    weight = math.log2(block) / math.log2(max(2, min(a.shape[-2:])))
    error = (a - b).square().mean((1, 2, 3)) + weight * excess.clamp_min(0)
    return 10 * torch.log10(255**2 / error)


def _eight_bit(image: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != original.shape or image.dim() != 4 or image.shape[1] != 1:
        raise RequestError(
            f"pictures of shapes {tuple(image.shape)} and {tuple(original.shape)} cannot be "
            "compared: give both as (batch, 1, height, width)."
        )
    a, b = ((z.detach().double().clamp(0, 1) * 255).round() for z in (image, original))
    return a, b
