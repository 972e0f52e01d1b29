r"""How far apart what a U-Net joins lies: the shift between a skip and the upsampled feature.

Features of the encoder lie where things are, those of the decoder where they will be. For each skip
:math:`h` and upsampled feature :math:`v` of a network's waves, normalised to mean 0 and norm 1 by
channel, the score of a shift s is the mean squared correlation of all pairs of channels,

.. math:: \rho^2(s) = \overline{\Big(\sum_x h_i(x)\, v_j(x + s)\Big)^2}_{ij},

with periodic shifts. The displacement is the s of the largest score, in cells of the full grid.
What it would help to move the skip there is measured by a linear fit of v by h at each point: the
share of the variance of v that the fit explains with and without the shift. (The measure of the
paper's appendix is not public in code; this one is ours, from the same idea.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.systems.sinenet import SineNet


@dataclass(frozen=True)
class Misalignment:
    """One skip of one wave, over a batch.

    ``displacement`` (B, space) in cells of the full grid; ``distance`` its mean length.
    ``explained`` and ``explained_shifted``: shares of the variance of the upsampled feature that a
    linear fit by the skip explains, as it lies and moved by the displacement.
    """

    wave: int
    level: int
    displacement: Tensor
    explained: float
    explained_shifted: float

    @property
    def distance(self) -> float:
        """The mean length of the displacement, in cells of the full grid."""
        return float(self.displacement.norm(dim=1).mean())


def misalignment(
    model: SineNet, x: Tensor, *told: Tensor, largest: float = 0.25
) -> list[Misalignment]:
    """Measure every skip of every wave on inputs ``x`` (and what else the model is told).

    Displacements are sought up to ``largest`` of the domain along each axis.

    >>> net = SineNet(1, 1, waves=2, width=4, levels=2)
    >>> found = misalignment(net, torch.randn(2, 1, 16, 16))
    >>> [(one.wave, one.level) for one in found]
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    if not 0 < largest <= 0.5:
        raise RequestError(f"largest={largest}: a share of the domain, above 0 and at most 0.5.")
    with torch.no_grad(), _joined(model) as pairs:
        model(x, *told)
    rows = []
    for (wave, level), (skip, feature) in sorted(pairs.items()):
        shift = displacement(skip, feature, largest)
        axes = tuple(range(1, skip.dim() - 1))
        moved = torch.stack(
            [h.roll(s.tolist(), axes) for h, s in zip(skip, shift.long(), strict=True)]
        )
        rows.append(
            Misalignment(
                wave,
                level,
                shift * 2**level,
                explained(skip, feature),
                explained(moved, feature),
            )
        )
    return rows


def displacement(skip: Tensor, feature: Tensor, largest: float = 0.25) -> Tensor:
    """Return the shift of ``skip`` that matches ``feature`` best, (B, space), in cells of theirs.

    >>> x = torch.randn(1, 2, 16, 16)
    >>> displacement(x, x.roll((3, -2), (2, 3))).tolist()
    [[3.0, -2.0]]
    """
    space = tuple(skip.shape[2:])
    axes = tuple(range(2, skip.dim()))
    h, v = (torch.fft.rfftn(_normal(x.double()), dim=axes) for x in (skip, feature))
    score = torch.zeros(len(skip), *space, dtype=torch.float64, device=skip.device)
    for i in range(skip.shape[1]):  # one channel of the skip against all: memory stays small
        cross = torch.fft.irfftn(h[:, i : i + 1].conj() * v, s=space, dim=axes)
        score += cross.square().sum(1)
    for axis, n in enumerate(space, start=1):
        steps = torch.fft.fftfreq(n, 1 / n, device=skip.device).abs() > max(1, largest * n)
        score.index_fill_(axis, steps.nonzero()[:, 0], -math.inf)
    best = score.flatten(1).argmax(1)
    indices = torch.stack(torch.unravel_index(best, space), 1)
    sizes = torch.tensor(space, device=skip.device)
    return torch.where(indices > sizes / 2, indices - sizes, indices).float()


def explained(skip: Tensor, feature: Tensor) -> float:
    """Return the share of the variance of ``feature`` that a linear map of ``skip`` explains.

    The map is from channels to channels, the same at every point and for the whole batch.
    """
    h, v = (x.double().transpose(0, 1).flatten(1).T for x in (skip, feature))
    h, v = h - h.mean(0), v - v.mean(0)
    gram = h.T @ h
    ridge = 1e-8 * gram.diagonal().mean().clamp(min=1e-300)
    weights = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), h.T @ v)
    return 1 - float((v - h @ weights).square().sum() / v.square().sum())


def _normal(x: Tensor) -> Tensor:
    axes = tuple(range(2, x.dim()))
    x = x - x.mean(axes, keepdim=True)
    return x / x.square().sum(axes, keepdim=True).sqrt().clamp(min=1e-300)


@contextmanager
def _joined(model: SineNet) -> Iterator[dict[tuple[int, int], tuple[Tensor, Tensor]]]:
    """Collect what is joined in the decoders of a forward pass, by (wave, level)."""
    found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    handles = []

    def watch(place: tuple[int, int], width: int, stage: nn.Module) -> None:
        def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            joined = inputs[0]
            found[place] = joined[:, :width].detach(), joined[:, width:].detach()

        handles.append(stage.register_forward_pre_hook(take))

    for number, wave in enumerate(model.waves):
        for level, stage in enumerate(wave.up):  # type: ignore[arg-type]
            watch((number, level), model.widths[level], stage)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
