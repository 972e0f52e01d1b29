"""Training blind enhancement: crops compressed on the fly, exits weighted by difficulty.

One network serves every quality, so the qualities are mixed in each batch. With ``d`` in [0, 1]
the known difficulty of a sample (0 the best quality), the loss of K exits is::

    L = mean_b  sum_k  w_k(d_b) * MSE(y_k,b ; raw_b)

with weights that favour shallow exits for easy images and deep exits for hard ones. Each sample
is weighted before the batch mean.

Source: RBQE (arXiv 2006.16581) and the weights of its authors' re-implementation; the fact sheet
``rbqe``, "Training loss".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pantarhei._fit_random import mix
from pantarhei.data import Images
from pantarhei.data.simulate.codecs import jpeg_luma, luma, to_eight_bit
from pantarhei.errors import RequestError

Codec = Callable[[Tensor, Tensor], Tensor]
Weights = Callable[[Tensor, int], Tensor]


class Batch(NamedTuple):
    """Compressed and raw crops (B, 1, S, S) and the difficulty (B,) of each."""

    compressed: Tensor
    raw: Tensor
    difficulty: Tensor


def raw_luma(pictures: Images, halve: bool | None = None) -> dict[str, Tensor]:
    """Return the 8-bit luma (1, H, W) in [0, 1] of each picture by its name.

    Pictures that came as JPEG files carry artefacts of their own: ``halve`` reduces them to half
    the size (Lanczos) for cleaner targets; None does so where the data set says it is lossy.

    >>> from pantarhei import data
    >>> planes = raw_luma(data.load("photographs"))
    >>> planes["astronaut"].shape, planes["rocket"].shape
    (torch.Size([1, 512, 512]), torch.Size([1, 213, 320]))
    """
    planes = {}
    for name, pixels, lossless in zip(
        pictures.names, pictures.images, pictures.lossless, strict=True
    ):
        picture = Image.fromarray(pixels)
        if (not lossless) if halve is None else halve:
            size = picture.width // 2, picture.height // 2
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        plane = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, -1)
        planes[name] = to_eight_bit(luma(plane.permute(2, 0, 1)[None].float() / 255))[0]
    return planes


def centre(image: Tensor, side: int) -> Tensor:
    """Cut the middle of (C, H, W), at most ``side`` pixels wide and high.

    The cut begins at a multiple of 8, so that it keeps the grid of a codec; it is a view.

    >>> centre(torch.rand(1, 100, 60), 64).shape
    torch.Size([1, 64, 60])
    """
    top, left = (max(0, size - side) // 16 * 8 for size in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def difficulty(quality: Tensor, easiest: float, hardest: float) -> Tensor:
    """Place a codec's quality, within the two ends, between the easiest (0) and the hardest (1).

    >>> difficulty(torch.tensor([50, 30, 10]), easiest=50, hardest=10).tolist()
    [0.0, 0.5, 1.0]
    >>> difficulty(torch.tensor([22, 42]), easiest=22, hardest=42).tolist()
    [0.0, 1.0]
    """
    if easiest == hardest:
        return torch.zeros_like(quality, dtype=torch.float32)
    return ((quality.float() - easiest).abs() / abs(hardest - easiest)).clamp_max(1)


def difficulty_weights(difficulty: Tensor, exits: int) -> Tensor:
    """Return (B, K) loss weights: 2 at the exit meant for the difficulty, 1 around it, .5 beyond.

    The exit meant is the one nearest to ``difficulty * (K-1)``; "around it" is the window of three
    exits that contains it in the middle, or at an end the first or the last three. For K = 5 and
    five qualities this is the published table.

    >>> difficulty_weights(torch.linspace(0, 1, 5), 5).tolist()[0]
    [2.0, 1.0, 1.0, 0.5, 0.5]
    >>> difficulty_weights(torch.linspace(0, 1, 5), 5).tolist()[1]
    [1.0, 2.0, 1.0, 0.5, 0.5]
    """
    meant = (difficulty * (exits - 1)).round().long()[:, None]
    middle = meant.clamp(min(1, exits - 1), max(exits - 2, 0))
    k = torch.arange(exits, device=difficulty.device)
    weights = torch.where((k - middle).abs() <= 1, 1.0, 0.5)
    return torch.where(k == meant, 2.0, weights)


def uniform_weights(difficulty: Tensor, exits: int) -> Tensor:
    """Return (B, K) ones: every exit counts the same for every image."""
    return torch.ones(len(difficulty), exits, device=difficulty.device)


def weighted_mse(pictures: Sequence[Tensor], raw: Tensor, weights: Tensor) -> Tensor:
    """Return ``mean_b sum_k weights[b, k] * MSE(pictures[k][b], raw[b])``.

    >>> raw = torch.zeros(2, 1, 2, 2)
    >>> float(weighted_mse([raw + 1, raw + 2], raw, torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
    2.5
    """
    errors = [(y.float() - raw.float()).square().mean((1, 2, 3)) for y in pictures]
    return (torch.stack(errors, 1) * weights).sum(1).mean()


def exit_loss(weights: Weights = difficulty_weights) -> Callable[[nn.Module, Batch], Tensor]:
    """Return the loss ``(model, batch) -> Tensor`` that :func:`pantarhei.fit.fit` minimises.

    ``weights`` is :func:`difficulty_weights` or :func:`uniform_weights`. A model with a single
    output is trained on its plain MSE.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        compressed, raw, hard = batch
        pictures = model(compressed)
        if isinstance(pictures, Tensor):
            return weighted_mse([pictures], raw, uniform_weights(hard, 1))
        return weighted_mse(pictures, raw, weights(hard, len(pictures)))

    return loss


def fast_layout(net: nn.Module) -> nn.Module:
    """Lay the weights of ``net`` out channels-last, in place: convolutions then run faster.

    Measured on two CPU cores (batch 16, 64x64, width 16): a training step takes 0.60 of the time
    in float32, and 0.45 together with bfloat16 autocast.
    """
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@dataclass(frozen=True)
class CompressedCrops:
    """Random square crops of raw luma images, flipped and turned, then compressed.

    ``crops(n)`` is the batch of draw ``n``; it depends on ``(seed, n)`` alone, so training resumes
    exactly and every network compared sees the same samples. ``images`` are (H, W) or (1, H, W)
    tensors, uint8 or in [0, 1]; an image is drawn in proportion to its pixels. ``qualities`` are
    the codec's settings, drawn evenly, ``easiest`` to ``hardest`` in any order the codec has (JPEG:
    50..10, HEVC QP: 22..42); the first and the last of the tuple are the two ends of difficulty.
    Compression comes last, so the codec's grid starts at every crop's corner.

    >>> images = [torch.rand(40, 50)]
    >>> crops = CompressedCrops(images, size=32, batch=4, qualities=(50, 10))
    >>> compressed, raw, hard = crops(0)
    >>> compressed.shape, sorted(set(hard.tolist())) == [0.0, 1.0]
    (torch.Size([4, 1, 32, 32]), True)
    """

    images: Sequence[Tensor]
    size: int = 64
    batch: int = 16
    qualities: tuple[int, ...] = (50, 40, 30, 20, 10)
    seed: int = 0
    codec: Codec = jpeg_luma
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        large = [self._plane(image) for image in self.images if min(image.shape[-2:]) >= self.size]
        if not large:
            raise RequestError(
                f"no training image holds a crop of {self.size}x{self.size}: give larger images "
                "or choose a smaller crop."
            )
        object.__setattr__(self, "images", large)

    @staticmethod
    def _plane(image: Tensor) -> Tensor:
        """Keep an image as (H, W) uint8: it is small, and exact for 8-bit sources."""
        plane = image.reshape(image.shape[-2:])
        if plane.is_floating_point():
            plane = (plane.clamp(0, 1) * 255).round().to(torch.uint8)
        return plane

    def __call__(self, n: int) -> Batch:
        """Return the batch of draw ``n``."""
        draw = torch.Generator().manual_seed(mix(self.seed, "crops", n))
        area = torch.tensor([float(image.numel()) for image in self.images])
        picks = torch.multinomial(area, self.batch, replacement=True, generator=draw).tolist()
        down, across = torch.rand(2, self.batch, generator=draw, dtype=torch.float64).tolist()
        turns = torch.randint(8, (self.batch,), generator=draw).tolist()
        which = torch.randint(len(self.qualities), (self.batch,), generator=draw)
        raw = torch.stack(
            [
                self._crop(self.images[pick], *where)
                for pick, *where in zip(picks, down, across, turns, strict=True)
            ]
        )
        raw = raw[:, None].to(self.device).float() / 255
        quality = torch.tensor(self.qualities)[which]
        hard = difficulty(quality, self.qualities[0], self.qualities[-1])
        return Batch(self.codec(raw, quality), raw, hard.to(self.device))

    def _crop(self, image: Tensor, down: float, across: float, turn: int) -> Tensor:
        """Cut one crop; ``turn`` 0..7 is one of the square's eight symmetries."""
        top = int(down * (image.shape[0] - self.size + 1))
        left = int(across * (image.shape[1] - self.size + 1))
        crop = image[top : top + self.size, left : left + self.size]
        crop = crop.rot90(turn % 4)
        return crop.T if turn >= 4 else crop
