"""Enhancing a plane of any size in bounded memory, with the result of a single pass over it.

Two things keep a tile from being a small image: the zeros that convolutions see beyond its border,
and the gates, which depend on the means of every feature over the *whole* image. So

* a tile is computed with a margin of at least the receptive field around the part that is kept,
  except at the image's own border. Going back from the exit, let ``n(i,j)`` be the cells of
  ``C[i, j]`` that are needed beyond the kept part, which starts on whole cells of every level::

      n(1,k+1) = 1                                              the exit's convolution
      n(i,c) >= n(i,j) + 2,   n(i+1,j-1) >= ceil((n(i,j) + 2) / 2)      for each C[i,j], c < j
      n(i,1) >= 2 n(i+1,1) + 3,                                 and the image n(1,1) + 2

* all tiles are gated by the same means. Those come first from a few windows spread over the image;
  the pass over all tiles then yields the means of the whole image under these gates. A mean depends
  only on gates of earlier nodes, so repeating the pass makes at least one more node exact each
  time, and its fixed point *is* the result of the untiled network. A pass is repeated only while
  its means would still move some gate by more than ``tolerance``.

The exit is one decision per image: the first exit whose quality score, pooled over all patches of
the image, reaches the threshold. The windows only predict how deep to compute at once; all exits up
to there are rendered and scored, and where none is good enough the next pass goes deeper. An image
that fits into one tile is computed step by step and re-uses everything.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pantarhei.compute.enhancement.nested_unet import NestedUNet, Partial
from pantarhei.compute.enhancement.quality import TchebichefQuality
from pantarhei.errors import RequestError

Samples = NDArray[np.uint8] | NDArray[np.uint16]
Precision = Literal["auto", "float32", "bfloat16"]
At = tuple[int, int]
_TILE = {"cpu": 896, "cuda": 2048}
_BAND = 256  # rows that are scored at a time
_SAMPLE = 256  # side of the windows that the first means come from
_SAMPLE_RIM = 32  # their border, which sees zeros instead of the image, is left out


@dataclass(frozen=True)
class Enhanced:
    """One enhanced plane.

    ``plane`` (H, W) of the input's type; ``exit`` 1..K; ``scores`` the pooled quality of the exits
    that were assessed, in order; ``before`` and ``after`` the quality of input and output;
    ``macs`` everything that was computed, overlap and repeated passes included; ``passes`` over the
    tiles (0: the plane fitted into one) and ``drift``, by how much the whole plane's means would
    still move a gate (0 if exact).
    """

    plane: Samples
    exit: int
    scores: tuple[float, ...]
    before: float
    after: float
    macs: int
    passes: int = 0
    drift: float = 0.0


@dataclass(frozen=True)
class Window:
    """A tile: ``core`` is kept, ``outer`` is computed; each is (top, left, bottom, right)."""

    core: tuple[int, int, int, int]
    outer: tuple[int, int, int, int]

    def inner(self, level: int) -> tuple[slice, slice]:
        """Return where ``core`` lies in a feature map of the given level."""
        (top, left, bottom, right), (up, west, _, _) = self.core, self.outer
        s = level - 1
        return (
            slice((top - up) >> s, (bottom - up) >> s),
            slice((left - west) >> s, (right - west) >> s),
        )


def margin(exit: int, multiple: int) -> int:
    """Return the pixels around a tile that exit ``exit`` sees, rounded up to ``multiple``.

    >>> [margin(k, 32) for k in (1, 2, 3, 4, 5)]
    [32, 32, 64, 96, 160]
    """
    need: dict[At, int] = {(1, exit + 1): 1}

    def require(at: At, cells: int) -> None:
        need[at] = max(need.get(at, 0), cells)

    for k in range(exit, 0, -1):
        for j in range(k + 1, 1, -1):
            i = k + 2 - j
            cells = need[i, j] + 2
            for column in range(1, j):
                require((i, column), cells)
            require((i + 1, j - 1), -(-cells // 2))
        require((k, 1), 2 * need[k + 1, 1] + 3)
    return -(-(need[1, 1] + 2) // multiple) * multiple


def windows(height: int, width: int, core: int, margin: int, multiple: int) -> list[Window]:
    """Cut ``height`` x ``width`` (padded up to ``multiple``) into tiles of nearly equal cores.

    Cores are at most ``core`` wide, start on multiples of ``multiple`` and cover every pixel once.

    >>> [w.core for w in windows(64, 100, 64, 32, 32)]
    [(0, 0, 64, 64), (0, 64, 64, 128)]
    >>> windows(64, 100, 64, 32, 32)[1].outer
    (0, 32, 64, 128)
    """

    def spans(size: int) -> list[tuple[int, int]]:
        units = -(-size // multiple)
        parts = -(-units // max(1, core // multiple))
        cuts = [units * p // parts * multiple for p in range(parts + 1)]
        return list(itertools.pairwise(cuts))

    down, across = spans(height), spans(width)
    bottom_most, right_most = down[-1][1], across[-1][1]
    return [
        Window(
            (top, left, bottom, right),
            (
                max(0, top - margin),
                max(0, left - margin),
                min(bottom_most, bottom + margin),
                min(right_most, right + margin),
            ),
        )
        for top, bottom in down
        for left, right in across
    ]


class Enhancer:
    """Runs a network over planes of any size.

    ``net`` takes luma (``in_ch`` 1); a private copy in evaluation mode is made on ``device`` (the
    network's own unless given), in channels-last order, which is about three times as fast on a
    CPU. ``tile`` is the side of what is computed at once, margins included (896, on CUDA 2048);
    memory grows with its square. ``precision`` "auto" computes 8-bit planes in bfloat16 where the
    processor multiplies it natively. ``tolerance``: see the module's text.

    >>> net = NestedUNet(levels=3, width=4)
    >>> plane = np.random.default_rng(0).integers(0, 256, (70, 90), dtype=np.uint8)
    >>> whole = Enhancer(net)(plane, exit=2)
    >>> tiled = Enhancer(net, tile=64, tolerance=0)(plane, exit=2)
    >>> int(np.abs(whole.plane.astype(int) - tiled.plane).max()) <= 1
    True
    """

    def __init__(
        self,
        net: NestedUNet,
        *,
        quality: TchebichefQuality | None = None,
        device: torch.device | str | None = None,
        tile: int | None = None,
        precision: Precision = "auto",
        tolerance: float = 0.01,
    ) -> None:
        if net.in_ch != 1:
            raise RequestError(
                f"this network takes {net.in_ch} channels: only luma is enhanced, give one that "
                "was built with in_ch=1."
            )
        least = 2 * margin(net.exits, net.multiple) + net.multiple
        self.device = torch.device(device) if device else next(net.parameters()).device
        self.tile = max(tile or _TILE.get(self.device.type, 896), least)
        self.net = copy.deepcopy(net).eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.quality = TchebichefQuality() if quality is None else copy.deepcopy(quality)
        self.precision, self.tolerance = precision, tolerance

    @torch.inference_mode()
    def __call__(
        self, plane: Samples, *, threshold: float | None = None, exit: int | None = None
    ) -> Enhanced:
        """Enhance a plane (H, W) of uint8 or uint16 whose codec grid starts at its first pixel.

        Either ``exit`` is forced, or the first exit whose pooled quality reaches ``threshold`` is
        taken.
        """
        if (threshold is None) == (exit is None):
            raise RequestError("give either a threshold or an exit, and not both.")
        if exit is not None and not 1 <= exit <= self.net.exits:
            raise RequestError(
                f"exit {exit} does not exist: this network has exits 1 to {self.net.exits}."
            )
        height, width = plane.shape
        before = self.score(plane)[0]
        padded = [-(-size // self.net.multiple) * self.net.multiple for size in (height, width)]
        with self._arithmetic(plane):
            if padded[0] * padded[1] <= self.tile**2:
                return self._whole(plane, before, threshold, exit)
            return self._tiled(plane, before, threshold, exit)

    def score(self, plane: Samples) -> tuple[float, int]:
        """Return the quality of a plane, pooled over all its patches, and the MACs it took.

        Taken band by band; it equals the score of the plane as a whole.
        """
        n = self.quality.n
        bands = (plane[top : top + _BAND + n] for top in range(0, max(1, len(plane) - n), _BAND))
        return self._pooled(torch.from_numpy(_eight_bit(b))[None, None] for b in bands)

    def _pooled(self, blocks: Iterable[Tensor]) -> tuple[float, int]:
        """Pool uint8 blocks (B, 1, H, W): means over patches, not over blocks."""
        n, macs = self.quality.n, 0
        sums = torch.zeros(4, dtype=torch.float64)  # blocking, smooth patches; blur, textured ones
        for block in blocks:
            with torch.autocast(self.device.type, enabled=False):
                found = self.quality(block.to(self.device))
            each = max(0, block.shape[2] // n - 1) * max(0, block.shape[3] // n - 1)
            textured = (found.textured.double() * each).round()
            smooth = each - textured
            parts = (found.blocking * smooth, smooth, found.blur * textured, textured)
            sums += torch.stack([p.double().sum() for p in parts]).cpu()
            macs += int(found.macs.sum())
        block_sum, smooth_sum, blur_sum, textured_sum = sums.tolist()
        blocking = block_sum / smooth_sum if smooth_sum else 1.0
        blur = blur_sum / textured_sum if textured_sum else 1.0
        alpha = self.quality.alpha
        return float(blocking**alpha * blur ** (1 - alpha)), macs

    # ---- one tile is enough -------------------------------------------------------------------

    def _whole(
        self, plane: Samples, before: float, threshold: float | None, exit: int | None
    ) -> Enhanced:
        net, scores, spent = self.net, list[float](), 0
        height, width = plane.shape
        partial = net.begin(self._load(plane, (0, 0, height, width)))
        for k in range(1, (exit or net.exits) + 1):
            partial = net.advance(partial)
            if exit is not None and k < exit:
                continue
            result = _integers(net.read(partial)[0, 0], plane.dtype)
            after, macs = self.score(result)
            if exit is not None or k == net.exits:
                break
            scores.append(after)
            spent += macs
            if threshold is not None and after >= threshold:
                break
        spent += net.macs(height, width, k, assessed=exit is None)
        return Enhanced(result, k, tuple(scores), before, after, spent)

    # ---- many tiles ---------------------------------------------------------------------------

    def _tiled(
        self, plane: Samples, before: float, threshold: float | None, exit: int | None
    ) -> Enhanced:
        last, passes = self.net.exits, 0
        means, likely, spent = self._sample(plane, exit or last)
        depth = exit or _first(likely, threshold, 1, last)
        while True:
            wanted = [exit] if exit is not None else list(range(1, depth + 1))
            planes, found, macs = self._render(plane, means, depth, wanted)
            drift = self._drift(means, found, depth)
            means |= found
            passes, spent = passes + 1, spent + macs
            if drift > self.tolerance and passes % (2 * depth + 2):
                continue  # C[1, depth+1] is the end of a chain of 2 depth + 1 nodes
            judged = {k: self.score(result) for k, result in planes.items()}
            scores = [judged[k][0] for k in wanted if k < last] if exit is None else []
            spent += sum(judged[k][1] for k in wanted if k < last) if exit is None else 0
            chosen = exit or _first(scores, threshold, 1, depth + (depth < last))
            if chosen <= depth:
                break
            depth = _first(likely, threshold, depth + 1, last)
        after = judged[chosen][0]
        assessed = tuple(scores[:chosen])
        return Enhanced(planes[chosen], chosen, assessed, before, after, spent, passes, drift)

    def _sample(self, plane: Samples, depth: int) -> tuple[dict[At, Tensor], list[float], int]:
        """Return estimates of the nodes' means and the exits' scores from windows on a grid."""
        places = [_spread(size) for size in plane.shape]
        tiles = [
            self._load(plane, (top, left, top + _SAMPLE, left + _SAMPLE))
            for top in places[0]
            for left in places[1]
        ]
        means: dict[At, Tensor] = {}

        def pool(at: At, feature: Tensor) -> Tensor:
            rim = _SAMPLE_RIM >> (at[0] - 1)
            inner = feature[..., rim:-rim, rim:-rim] if rim else feature
            means[at] = inner.float().mean(dim=(0, 2, 3))[None]
            return means[at]

        scores, spent, rim = list[float](), 0, _SAMPLE_RIM
        for k, partial in self._steps(torch.cat(tiles), pool, depth):
            if k < self.net.exits:
                pictures = self.net.read(partial)[..., rim:-rim, rim:-rim]
                score, macs = self._pooled([_eight_bit_tensor(pictures)])
                scores.append(score)
                spent += macs
        spent += len(tiles) * self.net.macs(_SAMPLE, _SAMPLE, depth, assessed=True)
        return means, scores, spent

    def _render(
        self, plane: Samples, means: dict[At, Tensor], depth: int, wanted: list[int]
    ) -> tuple[dict[int, Samples], dict[At, Tensor], int]:
        """Run all tiles to ``depth`` under given means.

        Returns the planes of the ``wanted`` exits, the means found over the whole plane, and the
        MACs.
        """
        (height, width), multiple = plane.shape, self.net.multiple
        rim = margin(depth, multiple)
        planes: dict[int, Samples] = {k: np.empty_like(plane) for k in wanted}
        sums: dict[At, Tensor] = {}
        spent = 0
        tiles = windows(height, width, self.tile - 2 * rim, rim, multiple)
        for window in tiles:
            rows, columns = (slice(*window.core[a::2]) for a in (0, 1))

            def pool(at: At, feature: Tensor, window: Window = window) -> Tensor:
                inner = feature[(0, slice(None), *window.inner(at[0]))]
                total = inner.sum(dim=(1, 2), dtype=torch.float32).double()
                sums[at] = sums[at] + total if at in sums else total
                return means[at]

            tile = self._load(plane, window.outer)
            for k, partial in self._steps(tile, pool, depth):
                if k in planes:
                    picture = self.net.read(partial)[(0, 0, *window.inner(1))]
                    target = planes[k][rows, columns]
                    target[:] = _integers(picture, plane.dtype)[: len(target), : target.shape[1]]
            spent += self.net.macs(*tile.shape[-2:], depth, assessed=len(wanted) > 1)
        bottom, right = tiles[-1].core[2:]
        found = {
            at: (total / ((bottom * right) >> 2 * (at[0] - 1))).float()[None]
            for at, total in sums.items()
        }
        return planes, found, spent

    def _steps(self, x: Tensor, pool: Any, depth: int) -> Iterator[tuple[int, Partial]]:
        partial = self.net.begin(x, pool)
        for k in range(1, depth + 1):
            partial = self.net.advance(partial)
            yield k, partial

    def _drift(self, used: dict[At, Tensor], found: dict[At, Tensor], depth: int) -> float:
        """Return the largest change of any gate up to ``depth`` when one set replaces the other."""
        one = torch.ones(1, self.net.width, 1, 1, device=self.device)
        changes = [
            (gate(one, used[at]) - gate(one, found[at])).abs().max()
            for gate, at in self.net.gated(depth)
        ]
        return float(torch.stack(changes).max())

    # ---- samples and tensors ------------------------------------------------------------------

    def _load(self, plane: Samples, box: tuple[int, int, int, int]) -> Tensor:
        """Return a part of the plane, continued by its last rows and columns, (1, 1, H, W)."""
        top, left, bottom, right = box
        part: NDArray[Any] = plane[top:bottom, left:right]
        beyond = [(0, bottom - top - part.shape[0]), (0, right - left - part.shape[1])]
        part = np.pad(part, beyond, mode="edge") if any(b for _, b in beyond) else part
        scaled = part.astype(np.float32) / np.float32(np.iinfo(plane.dtype).max)
        return torch.from_numpy(scaled)[None, None].to(self.device)

    def _arithmetic(self, plane: Samples) -> torch.autocast:
        fast = self.precision == "bfloat16" or (
            self.precision == "auto" and plane.dtype == np.uint8 and _native_bfloat16(self.device)
        )
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)


def _first(scores: list[float], threshold: float | None, start: int, otherwise: int) -> int:
    """Return the first exit from ``start`` on whose score reaches the threshold."""
    if threshold is None:
        return otherwise
    good = [k for k, score in enumerate(scores, 1) if k >= start and score >= threshold]
    return good[0] if good else otherwise


def _spread(size: int, count: int = 3) -> list[int]:
    """Return where up to ``count`` windows start, evenly spread, on multiples of 32."""
    room = max(0, size - _SAMPLE)
    return sorted({room * p // (count - 1) // 32 * 32 for p in range(count)})


def _integers(picture: Tensor, dtype: np.dtype[Any]) -> Samples:
    """Clamp to [0, 1] and round to the samples' type."""
    top = float(np.iinfo(dtype).max)
    rounded: Samples = (picture.float().clamp(0, 1) * top).round().cpu().numpy().astype(dtype)
    return rounded


def _eight_bit(plane: Samples) -> NDArray[np.uint8]:
    if plane.dtype == np.uint8:
        return np.array(plane)  # a copy: what Pillow decoded is read-only
    return ((plane.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _eight_bit_tensor(pictures: Tensor) -> Tensor:
    return (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _native_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 natively; emulated it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, c, lambda: False)() for c in checks)
