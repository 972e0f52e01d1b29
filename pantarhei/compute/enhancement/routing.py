"""Which exit for which image: calibrating the threshold, and the routers it is compared with.

Everything is decided on a stored table: per image the quality score, the PSNR and the MACs of
every exit, measured once. A threshold's behaviour is then arithmetic::

    exit(T) = first k < K with score_k >= T, else K

The bounds on both sides: the oracle knows the codec's setting and takes the exit meant for it; the
random router draws exits blindly at the same mean MACs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.compute.enhancement.metrics import psnr, psnr_b, ssim
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.quality import TchebichefQuality
from pantarhei.compute.enhancement.training import Codec, difficulty
from pantarhei.data.simulate.codecs import jpeg_luma
from pantarhei.errors import RequestError


@dataclass(frozen=True)
class ExitTable:
    """What every exit does to every compressed image; N rows, K exits.

    ``quality`` (N,) the codec's setting; ``psnr_in`` (N,) dB of the compressed image; ``psnr``
    (N, K) dB of each exit; ``scores`` (N, K-1); ``macs`` (N, K) true MACs of a run that goes
    straight to the exit; ``assessed`` (N, K) those of a dynamic run that leaves there, earlier
    heads and assessments included.
    """

    quality: Tensor
    psnr_in: Tensor
    psnr: Tensor
    scores: Tensor
    macs: Tensor
    assessed: Tensor

    @property
    def gain(self) -> Tensor:
        """(N, K) dPSNR in dB: PSNR of the exit minus PSNR of the compressed image."""
        return self.psnr - self.psnr_in[:, None]

    @property
    def exits(self) -> int:
        """K."""
        return self.psnr.shape[1]

    def route(self, thresholds: Tensor) -> Tensor:
        """Return (T, N) exits 1..K for (T,) thresholds.

        >>> one = torch.ones(1, 3)
        >>> table = ExitTable(one[0], one[0], one, torch.tensor([[0.5, 0.8]]), one, one)
        >>> table.route(torch.tensor([0.0, 0.6, 0.9])).flatten().tolist()
        [1, 2, 3]
        """
        good = self.scores[None] >= thresholds.to(self.scores)[:, None, None]
        last = torch.ones_like(good[..., :1])
        return torch.cat([good, last], -1).int().argmax(-1) + 1

    def rows(self) -> list[dict[str, float | int]]:
        """Return the table as rows for a CSV file."""
        result: list[dict[str, float | int]] = []
        for n in range(len(self.quality)):
            row: dict[str, float | int] = {"quality": int(self.quality[n])}
            row["psnr_in"] = round(float(self.psnr_in[n]), 4)
            for k in range(self.exits):
                row[f"psnr_{k + 1}"] = round(float(self.psnr[n, k]), 4)
                row[f"macs_{k + 1}"] = int(self.macs[n, k])
                row[f"dynamic_macs_{k + 1}"] = int(self.assessed[n, k])
                if k < self.exits - 1:
                    row[f"score_{k + 1}"] = round(float(self.scores[n, k]), 5)
            result.append(row)
        return result


@torch.no_grad()
def measure_exits(
    net: NestedUNet,
    images: Iterable[Tensor],
    qualities: Sequence[int],
    quality: TchebichefQuality | None = None,
    codec: Codec = jpeg_luma,
) -> ExitTable:
    """Compress each raw luma image (1, H, W) at each setting and measure every exit on it.

    The network runs in evaluation mode on its own device, all settings of an image as one batch.
    """
    judge = TchebichefQuality() if quality is None else quality
    settings = torch.tensor(list(qualities))
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    parts: list[tuple[Tensor, ...]] = []
    for image in images:
        raw = image.to(device).expand(len(settings), 1, *image.shape[-2:])
        compressed = codec(raw, settings)
        pictures = net(compressed)
        judged = [judge(picture) for picture in pictures[:-1]]
        spent = torch.stack([j.macs for j in judged], 1).cumsum(1)
        spent = torch.cat([spent, spent[:, -1:]], 1)  # the last exit is not assessed
        (height, width), exits = image.shape[-2:], range(1, net.exits + 1)
        straight = torch.tensor([net.macs(height, width, k) for k in exits])
        dynamic = torch.tensor([net.macs(height, width, k, assessed=True) for k in exits])
        columns = (
            settings,
            psnr(compressed, raw),
            torch.stack([psnr(picture, raw) for picture in pictures], 1),
            torch.stack([j.score for j in judged], 1),
            straight.expand(len(settings), -1),
            dynamic + spent.cpu(),
        )
        parts.append(tuple(column.cpu() for column in columns))
    net.train(training)
    if not parts:
        raise RequestError("no image was given to measure the exits on: give at least one.")
    return ExitTable(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def measure_static(
    net: nn.Module,
    images: Iterable[Tensor],
    qualities: Sequence[int],
    codec: Codec = jpeg_luma,
) -> Tensor:
    """Return the dPSNR (N,) in dB of a single-output network, rows as in :func:`measure_exits`."""
    settings = torch.tensor(list(qualities))
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    gains = []
    for image in images:
        raw = image.to(device).expand(len(settings), 1, *image.shape[-2:])
        compressed = codec(raw, settings)
        gains.append(psnr(net(compressed), raw) - psnr(compressed, raw))
    net.train(training)
    return torch.cat(gains).cpu()


@dataclass(frozen=True)
class Calibration:
    """What each threshold T_Q does on average over a validation set.

    ``gain`` is the mean dPSNR in dB, ``share`` the mean MACs as a share of the whole network's
    (that of a run straight to the last exit), ``last_gain`` the mean dPSNR of the last exit.
    ``chosen`` is the threshold to use unless another is asked for.
    """

    thresholds: tuple[float, ...]
    gain: tuple[float, ...]
    share: tuple[float, ...]
    last_gain: float
    chosen: float

    def turning_point(self) -> float:
        """Return the threshold farthest above the chord of the gain-over-MACs curve.

        Both axes are scaled to [0, 1] between the cheapest and the dearest point.
        """
        share, gain = torch.tensor(self.share), torch.tensor(self.gain)
        low, high = int(share.argmin()), int(share.argmax())
        width, rise = share[high] - share[low], gain[high] - gain[low]
        if width <= 0 or rise <= 0:
            return self.thresholds[low]
        above = (gain - gain[low]) / rise - (share - share[low]) / width
        return self.thresholds[int(above.argmax())]

    def under(self, share: float) -> float:
        """Return the threshold of largest gain whose mean MACs are at most ``share``."""
        allowed = [i for i, s in enumerate(self.share) if s <= share]
        if not allowed:
            raise RequestError(
                f"a budget of {share:.3g} of the network's MACs cannot be kept: the first exit "
                f"alone takes {min(self.share):.3g}; raise the budget to that."
            )
        return self.thresholds[max(allowed, key=lambda i: (self.gain[i], -self.share[i]))]

    def within_loss(self, decibel: float) -> float:
        """Return the cheapest threshold that loses at most ``decibel`` against the best gain.

        The best is that of any threshold or of the last exit, whichever is more: the last exit
        need not be the best of a briefly trained network. Where none does, the best threshold.
        """
        best = max(self.last_gain, *self.gain)
        good = [i for i, g in enumerate(self.gain) if g >= best - decibel]
        if not good:
            return self.thresholds[max(range(len(self.gain)), key=self.gain.__getitem__)]
        return self.thresholds[min(good, key=lambda i: self.share[i])]

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as JSON can keep it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Calibration:
        """Read what :meth:`to_json` wrote; anything else raises :class:`RequestError`."""
        try:
            thresholds, gain, share = (
                tuple(float(v) for v in value[key]) for key in ("thresholds", "gain", "share")
            )
            ends = float(value["last_gain"]), float(value["chosen"])
        except (KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"the calibration of the thresholds is not readable ({error}): calibrate again."
            ) from error
        if not len(thresholds) == len(gain) == len(share) > 0:
            raise RequestError(
                "the calibration's columns differ in length or are empty: calibrate again."
            )
        return cls(thresholds, gain, share, *ends)


def calibrate(table: ExitTable, step: float = 0.005, loss: float = 0.01) -> Calibration:
    """Sweep T_Q from 0 to just above 1 in steps of ``step`` over a validation table.

    ``chosen`` is the cheapest threshold that loses at most ``loss`` dB against the best gain;
    :meth:`Calibration.turning_point` and :meth:`Calibration.under` choose otherwise.
    """
    thresholds = torch.arange(round(1 / step) + 2, dtype=torch.float64) * step
    index = table.route(thresholds) - 1
    rows = torch.arange(table.psnr.shape[0])
    share = table.assessed.double() / table.macs[:, -1:].double()
    sweep = Calibration(
        tuple(thresholds.tolist()),
        tuple(table.gain[rows, index].mean(1).tolist()),
        tuple(share[rows, index].mean(1).tolist()),
        float(table.gain[:, -1].mean()),
        chosen=1.0,
    )
    return Calibration(**{**asdict(sweep), "chosen": sweep.within_loss(loss)})


@dataclass(frozen=True)
class Outcome:
    """What a router gave: exit, dPSNR (dB) and MACs of each of N images (or expectations)."""

    exit: Tensor
    gain: Tensor
    macs: Tensor

    def histogram(self, quality: Tensor, exits: int) -> dict[int, list[int]]:
        """Return, for each setting of the codec, how many images took each exit."""
        return {
            int(q): torch.bincount(self.exit[quality == q] - 1, minlength=exits).tolist()
            for q in quality.unique()
        }


def dynamic_routing(table: ExitTable, threshold: float) -> Outcome:
    """Leave at the first exit whose score reaches ``threshold``; assessments are paid for."""
    exit = table.route(torch.tensor([threshold], dtype=torch.float64))[0]
    return _taken(table, exit, table.assessed)


def static_routing(table: ExitTable, exit: int) -> Outcome:
    """Take the same exit for every image; nothing is assessed."""
    return _taken(table, torch.full_like(table.quality, exit, dtype=torch.int64), table.macs)


def oracle_routing(table: ExitTable, easiest: float, hardest: float) -> Outcome:
    """Take the exit meant for the (known) setting of the codec: not blind, an upper bound.

    >>> q, flat = torch.tensor([50, 10]), torch.ones(2, 3)
    >>> table = ExitTable(q, flat[:, 0], flat, flat[:, 1:], flat, flat)
    >>> oracle_routing(table, easiest=50, hardest=10).exit.tolist()
    [1, 3]
    """
    place = difficulty(table.quality, easiest, hardest) * (table.exits - 1)
    return _taken(table, place.round().long() + 1, table.macs)


def random_routing(table: ExitTable, like: Outcome) -> Outcome:
    """Draw exits blindly, with the mean MACs of ``like``; expectations, so nothing is drawn.

    Exits are drawn for every image from one distribution: how often ``like`` took each exit,
    moved towards the last exit (or the first) until the mean MACs are equal, so that ``like``
    pays for its assessments and chance does not.
    """
    share = torch.bincount(like.exit - 1, minlength=table.exits).double() / len(like.exit)
    each = table.macs.double().mean(0)
    target, now = like.macs.double().mean(), (share * each).sum()
    towards = table.exits - 1 if target > now else 0
    span = each[towards] - now
    part = ((target - now) / span).clamp(0, 1) if span != 0 else torch.tensor(0.0)
    share = share * (1 - part)
    share[towards] += part
    expected = (share * torch.arange(1, table.exits + 1)).sum().expand(len(like.exit))
    return Outcome(expected, table.gain @ share, table.macs.double() @ share)


def _taken(table: ExitTable, exit: Tensor, macs: Tensor) -> Outcome:
    rows, column = torch.arange(len(exit)), exit - 1
    return Outcome(exit, table.gain[rows, column], macs[rows, column])


@torch.no_grad()
def quality_table(
    net: NestedUNet,
    images: Sequence[Tensor],
    qualities: Sequence[int],
    threshold: float,
    quality: TchebichefQuality | None = None,
    codec: Codec = jpeg_luma,
) -> list[dict[str, float | int]]:
    """Run the network dynamically and return one row per setting of the codec.

    Columns: PSNR, SSIM and PSNR-B of the compressed and the enhanced pictures, the score of the
    compressed ones, mean MACs and their share of the whole network's, how many images took each
    exit, and the mean wall-clock of the dynamic run and of one to the last exit (milliseconds).
    """
    judge = TchebichefQuality() if quality is None else quality
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    rows: list[dict[str, float | int]] = []
    for q in qualities:
        each: dict[str, list[float]] = {}
        exits = [0] * net.exits
        for image in images:
            raw = image.to(device)[None]
            compressed = codec(raw, torch.tensor([q]))
            routed, ms = _timed(partial(net.dynamic, compressed, threshold, judge))
            _, full = _timed(partial(net, compressed, exit=net.exits))
            exits[int(routed.exit) - 1] += 1
            height, width = image.shape[-2:]
            share = int(routed.macs) / net.macs(height, width, net.exits)
            values = {
                "psnr_in": psnr(compressed, raw),
                "psnr_out": psnr(routed.output, raw),
                "ssim_in": ssim(compressed, raw),
                "ssim_out": ssim(routed.output, raw),
                "psnr_b_in": psnr_b(compressed, raw),
                "psnr_b_out": psnr_b(routed.output, raw),
                "score_in": judge(compressed).score,
            }
            values |= {"macs": routed.macs, "share": share, "ms": ms, "ms_last_exit": full}
            for name, value in values.items():
                each.setdefault(name, []).append(float(value))
        means = {name: round(sum(column) / len(column), 5) for name, column in each.items()}
        counts = {f"exit_{k}": n for k, n in enumerate(exits, 1)}
        rows.append({"quality": q, **means, **counts})
    net.train(training)
    return rows


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what ``call`` returns and how many milliseconds it took."""
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, (time.perf_counter() - start) * 1e3
