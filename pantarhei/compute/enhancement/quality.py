"""No-reference quality of a compressed picture from discrete Tchebichef moments.

Patches of n x n pixels straddle the codec's block borders. A smooth patch tells how visible its
border is (blocking), a textured one how much it would lose by one more blur (blur)::

    P   <- P / |P|_2,  P <- P - mean P,  M = K P K^T         K: orthonormal Tchebichef basis
    SSM  = sum M^2 - M[0,0]^2                                textured if SSM > T_S, else smooth
    smooth:    E_h = sum_j |M[n-1,j]| / (sum|M| - |M[0,0]| + C),  E_w alike with the last column,
               score = log(1 - (min(E_h,T) + min(E_w,T)) / 2) / log(1 - T)
    textured:  M' of the patch blurred by a 3x3 Gaussian,
               score = 1 - mean (2 M M' + C) / (M^2 + M'^2 + C)
    Q = Q_block^alpha * Q_blur^(1-alpha)                     means over their patches, 1 if none

All are in [0, 1], larger is better; in particular Q_block is *high* when little blocking is seen:
quantisation takes the highest-order moments out of smooth patches. (A single clean step is not
punished by itself: it keeps some 15 % of its moments in the last order, more than the cap T.) The
score orders compressed pictures; it saturates, and may fall, on pristine ones.

Source: the quality module of RBQE (arXiv 2006.16581), as in the fact sheet ``rbqe``, "IQA module".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError


def tchebichef_basis(n: int) -> Tensor:
    """Return the (n, n) float64 orthonormal discrete Tchebichef basis, row p of degree p.

    ``t_0 = 1``, ``t_1 = (1-n+2x)/n``, ``p t_p = (2p-1) t_1 t_{p-1} - (p-1)(1-(p-1)^2/n^2)
    t_{p-2}``, each row divided by ``sqrt(rho_p)``, ``rho_p = n prod_{m<=p}(1-m^2/n^2) / (2p+1)``.

    >>> [round(v, 4) for v in tchebichef_basis(4)[3].tolist()]
    [-0.2236, 0.6708, -0.6708, 0.2236]
    """
    x = torch.arange(n, dtype=torch.float64)
    first = (1 - n + 2 * x) / n
    rows = [torch.ones_like(x), first]
    for p in range(2, n):
        shrink = (p - 1) * (1 - (p - 1) ** 2 / n**2)
        rows.append(((2 * p - 1) * first * rows[-1] - shrink * rows[-2]) / p)
    order = torch.arange(n, dtype=torch.float64)
    rho = n * torch.cumprod(1 - order**2 / n**2, 0) / (2 * order + 1)
    return torch.stack(rows[:n]) / rho.sqrt()[:, None]


class Quality(NamedTuple):
    """Quality of each image of a batch; every entry has shape (B,)."""

    score: Tensor
    """Q = blocking^alpha * blur^(1-alpha), in [0, 1]."""
    blocking: Tensor
    """Q_block: 1 where no border shows."""
    blur: Tensor
    """Q_blur: 1 where one more blur would change everything."""
    textured: Tensor
    """The share of patches that counted as textured."""
    macs: Tensor
    """int64: what the assessment cost."""


class TchebichefQuality(nn.Module):
    """The parameter-free score ``Q`` of a picture (see the module's text for the equations).

    ``n`` is the patch size: 8 for JPEG, 4 for HEVC. ``smooth`` is T_S, ``cap`` T, ``alpha`` the
    weight of blocking, ``sigma`` the Gaussian's, ``c`` the stabiliser C, ``dtype`` what the sums
    are computed in.

    Images are (B, 1, H, W), (1, H, W) or (H, W): floating point in [0, 1], or uint8. A
    floating-point image is first clamped and rounded to 8 bit, as the file would be
    (``eight_bit=False`` scores it as it is). ``offset`` (row, column) is the first pixel of a codec
    block, for images cropped off the grid; ``offset="auto"`` finds it for each image.
    An image too small to hold a patch scores 1.

    >>> quality = TchebichefQuality()
    >>> ramp = torch.arange(32.0).expand(32, 32) / 64 + 0.3
    >>> blocky = ramp + 0.05 * (torch.arange(32) // 8 % 2)
    >>> noisy = blocky + 0.01 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    >>> bool(quality(blocky).score < quality(noisy).score)
    True
    """

    basis: Tensor
    blurring: Tensor

    def __init__(
        self,
        n: int = 8,
        smooth: float = 0.004,
        cap: float = 0.05,
        alpha: float = 0.9,
        sigma: float = 5.0,
        c: float = 1e-5,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if n < 2 or n % 2:
            raise RequestError(f"a patch size of {n} has no middle: use 8 (JPEG) or 4 (HEVC).")
        self.n, self.smooth, self.cap, self.alpha, self.c = n, smooth, cap, alpha, c
        self.register_buffer("basis", tchebichef_basis(n).to(dtype), persistent=False)
        side = math.exp(-0.5 / sigma**2)
        taps = torch.tensor([side, 1.0, side], dtype=torch.float64) / (1 + 2 * side)
        band = sum(torch.diag(taps[k].expand(n - abs(k - 1)), k - 1) for k in range(3))
        self.register_buffer("blurring", torch.as_tensor(band).to(dtype), persistent=False)

    @torch.no_grad()
    def forward(
        self, image: Tensor, offset: tuple[int, int] | str = (0, 0), eight_bit: bool = True
    ) -> Quality:
        """Assess each image of the batch."""
        pixels = self._pixels(image, eight_bit)
        if offset == "auto":
            return self._assess_each(pixels, self._grids(pixels))
        if isinstance(offset, str):
            raise RequestError(f"offset='{offset}' is unknown: give (row, column) or 'auto'.")
        return self._assess(pixels, offset)

    @torch.no_grad()
    def grid(self, image: Tensor, eight_bit: bool = True) -> Tensor:
        """Return (B, 2): the (row, column) offset, 0..n-1, at which the codec's blocks begin.

        Along each axis, the phase wins at which the step between neighbours most often exceeds
        both steps beside it. (The least Q_block over all offsets does not find the grid: a patch
        that *is* a strongly quantised block has no high-order moments either.) A picture without
        visible blocks has no meaningful answer.
        """
        return self._grids(self._pixels(image, eight_bit))

    def _pixels(self, image: Tensor, eight_bit: bool) -> Tensor:
        """Bring an image to (B, H, W) in [0, 1] and the type and place of the computation."""
        if image.dim() == 2:
            image = image[None, None]
        elif image.dim() == 3:
            image = image[None]
        if image.dim() != 4 or image.shape[1] != 1:
            raise RequestError(
                f"an image of shape {tuple(image.shape)} cannot be assessed: give one channel, "
                "(batch, 1, height, width); use luma(rgb) for colour."
            )
        if self.basis.device != image.device:
            self.to(image.device)
        if not image.is_floating_point():
            return image[:, 0].to(self.basis.dtype) / 255
        pixels = image[:, 0].to(self.basis.dtype)
        return (pixels.clamp(0, 1) * 255).round() / 255 if eight_bit else pixels

    def _patches(self, pixels: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return patches (B*p, n, n) and energy-normalised, centred ones."""
        n, (row, column) = self.n, (int(o) % self.n for o in offset)
        pixels = pixels[:, row:, column:]
        down, across = (max(0, size // n - 1) for size in pixels.shape[1:])
        half = n // 2
        inner = pixels[:, half : half + down * n, half : half + across * n]
        tiles = inner.reshape(len(pixels), down, n, across, n).transpose(2, 3).reshape(-1, n, n)
        return tiles, self._centred(tiles)

    @staticmethod
    def _centred(tiles: Tensor) -> Tensor:
        """P <- P / |P|, P <- P - mean P; a black patch stays zero."""
        tiny = torch.finfo(tiles.dtype).tiny ** 0.5
        unit = tiles / tiles.square().sum((1, 2), keepdim=True).sqrt().clamp_min(tiny)
        return unit - unit.mean((1, 2), keepdim=True)

    def _moments(self, centred: Tensor) -> Tensor:
        return self.basis @ centred @ self.basis.T

    def blocking_scores(self, moments: Tensor) -> Tensor:
        """Score smooth patches by their (p, n, n) moments: 0 a clear border, 1 none."""
        size = moments.abs()
        total = size.sum((1, 2)) - size[:, 0, 0] + self.c
        along = (size[:, -1, :].sum(1) / total).clamp_max(self.cap)
        across = (size[:, :, -1].sum(1) / total).clamp_max(self.cap)
        return torch.log1p(-(along + across) / 2) / math.log1p(-self.cap)

    def blur_scores(self, moments: Tensor, tiles: Tensor) -> Tensor:
        """Score textured patches by what one more blur of ``tiles`` changes in their moments."""
        blurred = self._moments(self._centred(self.blurring @ tiles @ self.blurring.T))
        same = (2 * moments * blurred + self.c) / (moments**2 + blurred**2 + self.c)
        return 1 - same.mean((1, 2))

    def _assess(self, pixels: Tensor, offset: tuple[int, int]) -> Quality:
        tiles, centred = self._patches(pixels, offset)
        moments = self._moments(centred)
        spread = moments.square().sum((1, 2)) - moments[:, 0, 0] ** 2
        rough = spread > self.smooth
        batch, each = len(pixels), len(tiles) // max(1, len(pixels))
        owner = torch.arange(batch, device=tiles.device).repeat_interleave(each)
        blocking = _mean_by(self.blocking_scores(moments[~rough]), owner[~rough], batch)
        blur = _mean_by(self.blur_scores(moments[rough], tiles[rough]), owner[rough], batch)
        count = torch.bincount(owner[rough], minlength=batch)
        area, n = self.n**2, self.n
        macs = area * (2 * n * each + (2 * n + 9) * count)
        # Rounding can leave a mean a hair below zero, and a negative number has no real power.
        blocking, blur = blocking.clamp(0, 1), blur.clamp(0, 1)
        score = blocking**self.alpha * blur ** (1 - self.alpha)
        return Quality(score, blocking, blur, count / max(1, each), macs)

    def _assess_each(self, pixels: Tensor, offsets: Tensor) -> Quality:
        """Assess images that do not share one grid."""
        if not len(pixels):
            return self._assess(pixels, (0, 0))
        each = [
            self._assess(image[None], (int(at[0]), int(at[1])))
            for image, at in zip(pixels, offsets, strict=True)
        ]
        return Quality(*(torch.cat(column) for column in zip(*each, strict=True)))

    def _grids(self, pixels: Tensor) -> Tensor:
        found = []
        for axis in (1, 2):
            if pixels.shape[axis] < 4:
                found.append(torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device))
                continue
            step = pixels.diff(dim=axis).abs().transpose(1, axis)
            jumps = step[:, 1:-1] > torch.maximum(step[:, :-2], step[:, 2:])
            often = jumps.to(pixels.dtype).mean(2)
            # Entry i compares pixels i+1 and i+2: the border is before pixel i+2.
            phase = (torch.arange(often.shape[1], device=pixels.device) + 2) % self.n
            total = often.new_zeros(len(pixels), self.n).index_add(1, phase, often)
            count = torch.bincount(phase, minlength=self.n).clamp_min(1)
            found.append((total / count).argmax(1))
        return torch.stack(found, 1)


def _mean_by(values: Tensor, owner: Tensor, count: int) -> Tensor:
    """Return the mean of ``values`` for each owner 0..count-1, 1 for an owner of none."""
    total = values.new_zeros(count).index_add(0, owner, values)
    number = torch.bincount(owner, minlength=count)
    return torch.where(number > 0, total / number.clamp_min(1), 1.0)
