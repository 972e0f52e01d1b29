r"""SineNet: a chain of slim U-Nets, each of which moves the field by a part of the step.

"SineNet: Learning Temporal Dynamics in Time-Dependent Partial Differential Equations", arXiv
2403.19507. A U-Net joins encoder features, still at time t, with decoder features that already
evolve towards t + 1; where something is carried along, the two no longer lie in the same place. K
waves :math:`V_k` in a chain let each correct for 1/K of the way:

.. math:: x_0 = P(u_{t-h+1..t}), \qquad x_k = x_{k-1} + V_k(x_{k-1}), \qquad \hat u_{t+1} = Q(x_K)

with 3-wide convolutions P and Q. A wave has L levels of widths
:math:`c_l = \lfloor C m^l \rfloor`; in it, with :math:`h_0 = d_0 = x` and :math:`\downarrow`
pooling by 2, :math:`\uparrow` cubic interpolation by 2,

.. math:: d_{l+1} = {\downarrow} d_l, \quad g = {\downarrow} h_l, \quad
          h_{l+1} = \mathrm{Block}([g, d_{l+1}]) + S g, \qquad
          v = {\uparrow} y_{l+1}, \quad y_l = \mathrm{Block}([h_l, v]) + S' v, \quad y_L = h_L,

where d, pooled copies of the wave's input, is the parallel ("disentangled") stream, joined from the
second level on, and S are 1-wide convolutions. Block: twice convolution, GroupNorm of one group,
GELU. The network predicts the field itself, in normalised units.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pantarhei.errors import RequestError
from pantarhei.systems._axes import CONVOLUTION

Border = Literal["zeros", "circular"]
_POOL: dict[str, dict[int, Any]] = {
    "avg": {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d},
    "max": {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d},
}
_EMBEDDED, _EMBEDDING = 64, 256


class SineNet(nn.Module):
    """The last frames (B, in_ch, *space), stacked as channels, to the next (B, out_ch, *space).

    Args:
        in_ch: Channels of the input: frames times fields.
        out_ch: Fields.
        waves: K. One wave without residual and without the parallel stream is a U-Net.
        width: C, the channels at full resolution.
        mult: m; found by :func:`multiplier` where ``param_budget`` is given instead.
        param_budget: The number of parameters to come nearest to.
        levels: L. A grid that 2^L does not divide is padded and the result cropped.
        padding: ``"zeros"``, ``"circular"``, or one of them for each axis.
        pool: ``"avg"`` or ``"max"``.
        upsample: ``"bicubic"`` or ``"bilinear"``, along each axis of the grid.
        disentangle: Whether there is the parallel stream.
        block_residual: Whether there are S and S'.
        wave_residual: Whether waves add to their input.
        blocks: Blocks in series at every level; those after the first add to their input.
        conditions: Scalars told beside the frames (a parameter, a lead time), (B, conditions).
        condition: How a block is told: ``"adagn"``, :math:`h (1 + s) + t`, or ``"add"``, h + t.
        mask: Whether a mask (B or 1, *space) is told, as one more channel.
        space: Axes of the grid: 1, 2 or 3.
        checkpoint: Compute a wave's features again in the backward pass instead of keeping them.
        round_to: Widths to multiples of this (tensor cores and AMX like 8); 1: as in the paper.
        reach: Dilation of the 3-wide convolutions, as :func:`dilated` sets it.

    Raises:
        RequestError: For numbers that are not positive, names that are not known, and a budget that
            no multiplier reaches.

    >>> net = SineNet(12, 3, waves=8, mult=1.425)
    >>> sum(p.numel() for p in net.parameters())
    35490219
    >>> SineNet(1, 1, waves=2, width=4, levels=2)(torch.zeros(2, 1, 10, 12)).shape
    torch.Size([2, 1, 10, 12])
    """

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        waves: int = 8,
        width: int = 64,
        mult: float | None = None,
        param_budget: int | None = None,
        levels: int = 4,
        padding: Border | Sequence[Border] = "zeros",
        pool: Literal["avg", "max"] = "avg",
        upsample: Literal["bicubic", "bilinear"] = "bicubic",
        disentangle: bool = True,
        block_residual: bool = True,
        wave_residual: bool = True,
        blocks: int = 1,
        conditions: int = 0,
        condition: Literal["adagn", "add"] = "adagn",
        mask: bool = False,
        space: int = 2,
        checkpoint: bool = False,
        round_to: int = 1,
        reach: int = 1,
    ) -> None:
        super().__init__()
        counts = {"in_ch": in_ch, "out_ch": out_ch, "waves": waves, "width": width,
                  "levels": levels, "blocks": blocks, "round_to": round_to,
                  "reach": reach}  # fmt: skip
        if bad := {name: n for name, n in counts.items() if n < 1}:
            raise RequestError(f"SineNet needs positive numbers, not {bad}.")
        borders = (padding,) * space if isinstance(padding, str) else tuple(padding)
        if (
            space not in CONVOLUTION
            or len(borders) != space
            or not {*borders} <= {"zeros", "circular"}
            or pool not in _POOL
            or upsample not in ("bicubic", "bilinear")
            or condition not in ("adagn", "add")
        ):
            raise RequestError(
                f"space={space}, padding={padding!r}, pool={pool!r}, upsample={upsample!r}, "
                f"condition={condition!r}: 1 to 3 axes, each zeros or circular; avg or max; "
                "bicubic or bilinear; adagn or add."
            )
        shape = {"waves": waves, "width": width, "levels": levels, "disentangle": disentangle,
                 "block_residual": block_residual, "blocks": blocks, "conditions": conditions,
                 "condition": condition, "mask": mask, "space": space,
                 "round_to": round_to}  # fmt: skip
        if mult is None:
            mult = 2.0 if param_budget is None else multiplier(in_ch, out_ch, param_budget, **shape)
        self.arguments: dict[str, Any] = {
            "in_ch": in_ch, "out_ch": out_ch, "mult": mult, "padding": padding, "pool": pool,
            "upsample": upsample, "wave_residual": wave_residual, "checkpoint": checkpoint,
            "reach": reach, **shape,
        }  # fmt: skip
        self.widths = level_widths(width, mult, levels, round_to)
        self.space, self.levels, self.borders = space, levels, borders
        self.conditions, self.mask = conditions, mask
        self.wave_residual, self.checkpoint = wave_residual, checkpoint
        convolution = functools.partial(_convolution, borders=borders)
        self.lift = convolution(in_ch + mask, width)
        self.embeddings = nn.ModuleList(
            nn.Sequential(
                nn.Linear(_EMBEDDED, _EMBEDDING), nn.GELU(), nn.Linear(_EMBEDDING, _EMBEDDING)
            )
            for _ in range(conditions)
        )
        self.waves = nn.ModuleList(
            Wave(
                self.widths, borders, pool, upsample, disentangle, block_residual, blocks,
                condition if conditions else None,
            )
            for _ in range(waves)
        )  # fmt: skip
        self.project = convolution(width, out_ch)
        for module in self.modules():
            if isinstance(module, _Pad):
                module.cells = reach
            elif isinstance(module, CONVOLUTION[space]) and module.kernel_size[0] == 3:
                module.dilation = (reach,) * space
                module.padding = tuple(reach * n for n in module.padding)

    def forward(
        self, x: Tensor, conditions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the next fields; ``conditions`` (B, n) and ``mask`` where the network has them.

        A network with a mask alone takes it as the second argument, too.
        """
        if self.mask and not self.conditions and mask is None:
            conditions, mask = None, conditions
        self._check(x, conditions, mask)
        size = x.shape[2:]
        if mask is not None:
            x = torch.cat([x, mask.to(x).expand(len(x), *size)[:, None]], 1)
        x = self.lift(padded(x, 2**self.levels, self.borders))
        told = None
        if conditions is not None:
            parts = [
                embed(sinusoidal(conditions[:, i].to(x.dtype)))
                for i, embed in enumerate(self.embeddings)
            ]
            told = torch.stack(parts).sum(0)
        for wave in self.waves:
            if self.checkpoint and torch.is_grad_enabled():
                found = checkpoint(wave, x, told, use_reentrant=False)
            else:
                found = wave(x, told)
            x = x + found if self.wave_residual else found
        return self.project(x)[(..., *(slice(0, n) for n in size))]

    def _check(self, x: Tensor, conditions: Tensor | None, mask: Tensor | None) -> None:
        if x.dim() != self.space + 2 or x.shape[1] != self.arguments["in_ch"]:
            raise RequestError(
                f"SineNet takes (batch, {self.arguments['in_ch']}, and {self.space} axes), not "
                f"{tuple(x.shape)}."
            )
        told = 0 if conditions is None else conditions.shape[-1]
        if told != self.conditions or (mask is not None) != self.mask:
            raise RequestError(
                f"This SineNet is told {self.conditions} conditions and "
                f"{'a' if self.mask else 'no'} mask, and got {told} and "
                f"{'no' if mask is None else 'a'} mask."
            )


class Wave(nn.Module):
    """One U-Net of the chain, (B, C, *space) to the same shape; see the module's equations."""

    def __init__(
        self,
        widths: Sequence[int],
        borders: tuple[Border, ...],
        pool: str,
        upsample: str,
        disentangle: bool,
        block_residual: bool,
        blocks: int,
        condition: str | None,
    ) -> None:
        super().__init__()
        self.borders, self.upsample, self.disentangle = borders, upsample, disentangle
        self.pool: Callable[..., Tensor] = _POOL[pool][len(borders)]
        stage = functools.partial(
            _Stage, borders=borders, residual=block_residual, blocks=blocks, condition=condition
        )
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(
            stage(a + (widths[0] if disentangle and level else 0), a, b)
            for level, (a, b) in enumerate(pairs)
        )
        self.up = nn.ModuleList(stage(a + b, b, a) for a, b in pairs)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        """Return what the wave adds."""
        skips, pooled = [x], x
        for level, down in enumerate(self.down):
            g = self.pool(skips[-1], 2)
            seen = g
            if self.disentangle:
                pooled = self.pool(pooled, 2)
                seen = torch.cat([g, pooled], 1) if level else g
            skips.append(down(seen, g, told))
        y = skips.pop()
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            v = upsampled(y, self.borders, self.upsample)
            y = up(torch.cat([skip, v], 1), v, told)
        return y


class _Stage(nn.Module):
    """Blocks in series: the first changes the width beside S, the others add to their input."""

    def __init__(
        self,
        inputs: int,
        around: int,
        outputs: int,
        borders: tuple[Border, ...],
        residual: bool,
        blocks: int,
        condition: str | None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            _Block(inputs if i == 0 else outputs, outputs, borders, condition)
            for i in range(blocks)
        )
        self.residual = residual
        self.around = CONVOLUTION[len(borders)](around, outputs, 1) if residual else None

    def forward(self, x: Tensor, around: Tensor, told: Tensor | None) -> Tensor:
        first, *others = self.blocks
        y = first(x, told) if self.around is None else first(x, told) + self.around(around)
        for block in others:
            y = y + block(y, told) if self.residual else block(y, told)
        return y


class _Block(nn.Module):
    """Convolution, GroupNorm(1), GELU, twice; conditions come in between."""

    def __init__(
        self, inputs: int, outputs: int, borders: tuple[Border, ...], condition: str | None
    ) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, borders)
        self.norm1 = nn.GroupNorm(1, outputs)
        self.conv2 = _convolution(outputs, outputs, borders)
        self.norm2 = nn.GroupNorm(1, outputs)
        self.scales = condition == "adagn"
        self.told = nn.Linear(_EMBEDDING, outputs * (1 + self.scales)) if condition else None

    def forward(self, x: Tensor, told: Tensor | None) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        if self.told is not None:
            shift = self.told(told).to(x.dtype).view(len(x), -1, *(1,) * (x.dim() - 2))
            if self.scales:
                scale, shift = shift.chunk(2, 1)
                x = x * (1 + scale)
            x = x + shift
        return F.gelu(self.norm2(self.conv2(x)))


def level_widths(width: int, mult: float, levels: int, round_to: int = 1) -> list[int]:
    r"""Return :math:`\lfloor C m^l \rfloor` for l = 0..L, rounded to multiples of ``round_to``.

    >>> level_widths(64, 1.425, 4), level_widths(64, 1.425, 4, 8)
    ([64, 91, 129, 185, 263], [64, 88, 128, 184, 264])
    """
    found = [math.floor(width * mult**level) for level in range(levels + 1)]
    if round_to == 1:
        return found
    return [width, *(max(round_to, round(n / round_to) * round_to) for n in found[1:])]


def parameter_count(
    in_ch: int,
    out_ch: int,
    mult: float,
    *,
    waves: int = 8,
    width: int = 64,
    levels: int = 4,
    disentangle: bool = True,
    block_residual: bool = True,
    blocks: int = 1,
    conditions: int = 0,
    condition: str = "adagn",
    mask: bool = False,
    space: int = 2,
    round_to: int = 1,
) -> int:
    """Return the parameters of :class:`SineNet` with these arguments, without building it.

    >>> parameter_count(12, 3, 2.0, waves=1)
    33788099
    """
    kernel, widths = 3**space, level_widths(width, mult, levels, round_to)
    told = (_EMBEDDING + 1) * (2 if condition == "adagn" else 1) if conditions else 0

    def block(i: int, o: int) -> int:
        return kernel * o * (i + o) + 6 * o + told * o

    def stage(i: int, around: int, o: int) -> int:
        return block(i, o) + (blocks - 1) * block(o, o) + (around + 1) * o * block_residual

    one = 0
    for level in range(levels):
        a, b = widths[level], widths[level + 1]
        one += stage(a + (width if disentangle and level else 0), a, b) + stage(a + b, b, a)
    ends = kernel * (in_ch + mask) * width + width + kernel * width * out_ch + out_ch
    embedding = _EMBEDDING * (_EMBEDDED + 1 + _EMBEDDING + 1)
    return waves * one + ends + conditions * embedding


def multiplier(in_ch: int, out_ch: int, budget: int, **shape: Any) -> float:
    """Return the m whose parameters come nearest to ``budget``; ``shape`` as for SineNet.

    >>> level_widths(64, multiplier(12, 3, 35_490_219, waves=8), 4)
    [64, 91, 129, 185, 263]
    """

    def count(m: float) -> int:
        return parameter_count(in_ch, out_ch, m, **shape)

    low, high = 0.0, 1.0
    while count(high) < budget and high < 64:
        high *= 2
    smallest = 1 / shape.get("width", 64) ** (1 / shape.get("levels", 4)) + 1e-9
    low = smallest  # below it a level would have no channel
    if not count(low) * 0.98 <= budget <= count(high):
        raise RequestError(
            f"A SineNet of these waves and this width has at least {count(low):,} parameters: a "
            f"budget of {budget:,} is not reached by any multiplier."
        )
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) < budget else (low, middle)
    # counts rise in steps, where a width does: one side of the last step is the nearest
    return min((low, high), key=lambda m: abs(count(m) - budget))


def unet(in_ch: int, out_ch: int, **options: Any) -> SineNet:
    """Return a plain U-Net of the same blocks: one wave, no wave residual, no parallel stream.

    Options as for :class:`SineNet`. The paper's own U-Nets keep the parallel stream (so their
    parameter counts say): ``SineNet(waves=1, width=128)`` is its U-Net-128, and
    ``SineNet(waves=1, blocks=8, mult=1.425)`` its Deeper U-Net-8.
    """
    plain: dict[str, Any] = {"waves": 1, "wave_residual": False, "disentangle": False}
    return SineNet(in_ch, out_ch, **plain | options)


def dilated(net: SineNet, factor: int) -> SineNet:
    """Return a copy for a grid ``factor`` times as fine: its 3-wide convolutions are dilated.

    The same weights then look as far as they did in training. Fields of the fine grid that the
    coarse one had not seen are not made better by it than the training allows.

    >>> fine = dilated(SineNet(1, 1, waves=1, width=4, levels=1), 4)
    >>> fine(torch.zeros(1, 1, 32, 32)).shape
    torch.Size([1, 1, 32, 32])
    """
    if factor < 1:
        raise RequestError(f"A grid is refined by a whole factor of at least 1, not {factor}.")
    made = SineNet(**net.arguments | {"reach": factor * net.arguments["reach"]})
    made.load_state_dict(net.state_dict())
    return made.train(net.training).to(next(net.parameters()))


def sinusoidal(values: Tensor, size: int = _EMBEDDED, period: float = 10_000.0) -> Tensor:
    r"""Return :math:`[\cos(v \omega_i), \sin(v \omega_i)]`, (B, size) of (B,).

    :math:`\omega_i = \mathrm{period}^{-i / (\mathrm{size}/2)}`, i from 0.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values[:, None].float() * torch.exp(-math.log(period) * steps)
    return torch.cat([angles.cos(), angles.sin()], 1).to(values.dtype)


def upsampled(x: Tensor, borders: Sequence[Border], kind: str = "bicubic") -> Tensor:
    """Return (B, C, *space) on twice as many points along each axis.

    As ``torch.nn.functional.interpolate(align_corners=False)`` where the border is not periodic
    (beyond it, the last value), and without a seam where it is. One axis after another, each a
    product with a banded matrix: any number of axes, mixed borders, and gradients that are
    the same at every run (interpolate's are not on CUDA). Channels that lie last in memory stay
    there: what follows need not turn them back.
    """
    last = _channels_last(x)
    if last:
        x = x.movedim(1, -1)
    for axis, border in enumerate(borders, start=1 if last else 2):
        matrix = _doubling(x.shape[axis], border == "circular", kind, x.dtype, x.device)
        if axis == x.dim() - 1:
            x = x @ matrix.T
        else:
            behind = x.shape[axis + 1 :]
            x = (matrix @ x.flatten(axis + 1)).unflatten(-1, behind)
    return x.movedim(-1, 1) if last else x


def _channels_last(x: Tensor) -> bool:
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return form is not None and x.is_contiguous(memory_format=form) and not x.is_contiguous()


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may be part of a graph later
def _doubling(
    n: int, periodic: bool, kind: str, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the (2n, n) matrix of interpolation to the points at -1/4 and 1/4 of each cell."""
    a = -0.75  # of the cubic convolution kernel, as torch has it

    def near(t: float) -> float:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: float) -> float:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    taps = {-1: 0.25, 0: 0.75}
    if kind == "bicubic":
        taps = {-2: far(1.75), -1: near(0.75), 0: near(0.25), 1: far(1.25)}
    matrix = torch.zeros(2 * n, n)
    cells = torch.arange(n)
    for offset, weight in taps.items():
        for row, column in ((2 * cells, cells + offset), (2 * cells + 1, cells - offset)):
            column = column % n if periodic else column.clamp(0, n - 1)
            matrix.index_put_((row, column), torch.tensor(weight), accumulate=True)
    return matrix.to(device, dtype)


class _Pad(nn.Module):
    """Cells on each side, of zeros or from across the domain, axis by axis."""

    def __init__(self, borders: tuple[Border, ...]) -> None:
        super().__init__()
        self.borders, self.cells = borders, 1

    def forward(self, x: Tensor) -> Tensor:
        for axis, border in enumerate(self.borders, start=2):
            if border == "circular":  # pad(mode="circular") turns channels that lie last
                before = x.narrow(axis, x.shape[axis] - self.cells, self.cells)
                x = torch.cat([before, x, x.narrow(axis, 0, self.cells)], axis)
        walls = [self.cells * (b == "zeros") for b in reversed(self.borders) for _ in range(2)]
        return F.pad(x, walls) if any(walls) else x


def _convolution(inputs: int, outputs: int, borders: tuple[Border, ...]) -> nn.Module:
    kind = CONVOLUTION[len(borders)]
    if {*borders} == {"zeros"}:
        return kind(inputs, outputs, 3, padding=1)
    return nn.Sequential(_Pad(borders), kind(inputs, outputs, 3))


def padded(x: Tensor, multiple: int, borders: tuple[Border, ...]) -> Tensor:
    """Fill up each axis to a multiple: from across the domain, or with the last value."""
    for axis, border in enumerate(borders, start=2):
        n = x.shape[axis]
        missing = -n % multiple
        if missing:
            index = torch.arange(n + missing, device=x.device)
            index = index % n if border == "circular" else index.clamp(max=n - 1)
            x = x.index_select(axis, index)
    return x
