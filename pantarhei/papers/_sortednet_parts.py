"""What the SortedNet recipe trains: plain networks that know nothing of sub-networks; data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _MLPBlock(nn.Module):
    """Pre-norm residual block: x + W2 relu(W1 LayerNorm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    """Images (B, 1, H, W) to class scores through ``depth`` residual blocks of ``width`` units."""

    def __init__(self, pixels: int, width: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(pixels, width)
        self.blocks = nn.Sequential(*[_MLPBlock(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (B, classes)."""
        return self.head(self.norm(self.blocks(self.stem(x.flatten(1)))))


class _ResNetBlock(nn.Module):
    """Pre-activation basic block; the first of a stage changes width and resolution."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = stride != 1 or inputs != width
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(x))
        around = x if self.shortcut is None else self.shortcut(hidden)
        return around + self.conv2(F.relu(self.norm2(self.conv1(hidden))))


class ResNet(nn.Module):
    """Images (B, C, H, W) to class scores: a stem, stages of residual blocks, pooling, a head.

    ``widths`` and ``blocks`` per stage; each stage after the first halves the resolution, and the
    stem does when ``stem_stride`` is 2.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        stem_stride: int = 1,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    _ResNetBlock(widths[max(0, i - (k == 0))], width, 2 if i > 0 and k == 0 else 1)
                    for k in range(count)
                ]
            )
            for i, (width, count) in enumerate(zip(widths, blocks, strict=True))
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (B, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class _InvertedResidual(nn.Module):
    """MobileNetV2's block: expand 1x1, depthwise 3x3, project 1x1; a sum where shapes agree."""

    def __init__(self, inputs: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, width, 1, bias=False),
            nn.BatchNorm2d(width),
        ]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381) for 32x32 images: its first two strides are 1."""

    # expansion, channels, blocks, stride of the first block
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        inputs = 32
        self.stem = nn.Sequential(
            nn.Conv2d(3, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6()
        )
        stages = []
        for expand, width, count, stride in self.STAGES:
            blocks = []
            for k in range(count):
                blocks.append(_InvertedResidual(inputs, width, stride if k == 0 else 1, expand))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.last = nn.Sequential(
            nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()
        )
        self.head = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (B, classes)."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.last(x).mean((2, 3)))


class Standardise:
    """Images as stored, uint8 (N, H, W) or (N, H, W, C), to float (N, C, H, W), channels last.

    Each channel has mean 0 and standard deviation 1 over the images given.
    """

    def __init__(self, images: Tensor) -> None:
        pixels = _with_channels(images).flatten(0, 2).double()
        self.mean = pixels.mean(0).float()
        self.deviation = pixels.std(0).float()

    def __call__(self, images: Tensor) -> Tensor:
        """Return the standardised images."""
        values = (_with_channels(images) - self.mean) / self.deviation
        return values.permute(0, 3, 1, 2)


def crop_and_flip(generator: torch.Generator, images: Tensor, margin: int = 4) -> Tensor:
    """Shift each image (N, H, W, C) by up to ``margin`` pixels, reflected, and mirror half."""
    n, height, width, _ = images.shape
    device = images.device

    def draw(high: int) -> Tensor:
        return torch.randint(high, (n, 1), generator=generator, device=device)

    rows = _reflected(torch.arange(height, device=device) + draw(2 * margin + 1) - margin, height)
    columns = _reflected(torch.arange(width, device=device) + draw(2 * margin + 1) - margin, width)
    columns = torch.where(draw(2).bool(), columns, columns.flip(1))
    index = torch.arange(n, device=device)[:, None, None]
    return images[index, rows[:, :, None], columns[:, None, :]]


def training_transform(
    standardise: Standardise, augment: bool
) -> Callable[[torch.Generator, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the transform of training batches for :class:`pantarhei.fit.Batches`."""

    def transform(
        generator: torch.Generator, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        return standardise(crop_and_flip(generator, images) if augment else images), labels

    return transform


def _with_channels(images: Tensor) -> Tensor:
    return images if images.dim() == 4 else images[..., None]


def _reflected(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)
