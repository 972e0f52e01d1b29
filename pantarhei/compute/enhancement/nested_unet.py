"""The nested U-Net of RBQE: one network, K exits of growing depth, every step re-used by the next.

Nodes ``C[i, j]`` (level ``i`` at 1/2^(i-1) of the resolution, column ``j``) exist for
``i + j <= levels + 1``. Step ``k`` adds the anti-diagonal ``i + j = k + 2``::

    C[1,1]   = Conv(relu) Conv(relu) x
    C[i+1,1] = Down(ECA(C[i,1]))
    C[i,j]   = Up(cat[ECA(C[i,1]), ..., ECA(C[i,j-1])], ECA(C[i+1,j-1])),   j >= 2
    y_k      = x + SepConv(ECA(C[1,k+1])),                                  k = 1..levels-1

with a separate channel gate ECA for every consumer of a feature, and none on the lower-level
inputs and the head of the last step (the reference's quirk; ``eca_last=True`` gives them one).

Source: Xing, Xu, Li, Guan, "Early Exit or Not: Resource-Efficient Blind Quality Enhancement for
Compressed Images", ECCV 2020 (arXiv 2006.16581); the fact sheet ``rbqe``, "Layers".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.compute.enhancement.quality import TchebichefQuality
from pantarhei.data.simulate.codecs import luma, rgb_to_ycbcr, ycbcr_to_rgb
from pantarhei.errors import RequestError

Convention = Literal["true", "paper"]
Pool = Callable[[tuple[int, int], Tensor], Tensor]
"""``pool((i, j), C[i, j])`` returns the (B, C) means that gate ``C[i, j]``."""


class ECA(nn.Module):
    """Channel gate ``z * sigmoid(conv3(mean(z)))``, the convolution running over the channels.

    The spatial mean is handed in, because every consumer of a feature needs the same one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, z: Tensor, mean: Tensor) -> Tensor:
        """Gate ``z`` (B, C, H, W) by its spatial ``mean`` (B, C)."""
        gain = torch.sigmoid(self.taps(mean.unsqueeze(1))).squeeze(1)
        return z * gain[:, :, None, None].to(z.dtype)


class Ungated(nn.Module):
    """Stands where an edge has no gate."""

    def forward(self, z: Tensor, mean: Tensor) -> Tensor:
        """Return ``z``."""
        return z


def _spatial_mean(at: tuple[int, int], feature: Tensor) -> Tensor:
    return feature.mean(dim=(2, 3))


class Node(NamedTuple):
    """A computed feature map (B, C, H, W) and its spatial mean (B, C)."""

    feature: Tensor
    mean: Tensor


def _conv(inputs: int, outputs: int, separable: bool) -> nn.Module:
    """Return 3x3 then nothing: depthwise 3x3 and pointwise 1x1 (both with bias), or plain 3x3."""
    if not separable:
        return nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv2d(inputs, outputs, 1)
    )


class _Down(nn.Module):
    """Gate, two 3x3 convolutions and one of stride 2, each with ReLU."""

    def __init__(self, width: int, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, node: Node) -> Tensor:
        result: Tensor = self.body(self.gate(*node))
        return result


class _Up(nn.Module):
    """Double the lower map, append it to the gated skips, and mix with two convolutions."""

    def __init__(self, width: int, gates: Sequence[nn.Module], separable: bool) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)  # one per skip, the last for the lower map
        self.enlarge = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.mix = nn.Sequential(
            _conv(width * len(gates), width, separable),
            nn.ReLU(inplace=True),
            _conv(width, width, separable),
            nn.ReLU(inplace=True),
        )

    def forward(self, skips: Sequence[Node], lower: Node) -> Tensor:
        gated = [gate(*node) for gate, node in zip(self.gates, [*skips, lower], strict=True)]
        gated[-1] = F.relu(self.enlarge(gated[-1]), inplace=True)
        joined = torch.cat(gated, dim=1)
        gated.clear()  # the parts would double the peak while they are mixed
        result: Tensor = self.mix(joined)
        return result


class _Head(nn.Module):
    """Gate and one convolution: the residual of an exit."""

    def __init__(self, width: int, channels: int, gate: nn.Module, separable: bool) -> None:
        super().__init__()
        self.gate = gate
        self.residual = _conv(width, channels, separable)

    def forward(self, node: Node) -> Tensor:
        result: Tensor = self.residual(self.gate(*node))
        return result


@dataclass(frozen=True)
class Partial:
    """A forward pass that stopped after ``step`` steps and can go on.

    ``image`` is the input as given (B, C, H, W); ``nodes`` holds ``C[i, j]`` of the input padded
    to whole multiples of 2^(levels-1).
    """

    image: Tensor
    nodes: dict[tuple[int, int], Node]
    step: int
    pool: Pool

    def keep(self, rows: Tensor) -> Partial:
        """Return the same state for the images in ``rows`` (indices or mask) only."""
        nodes = {at: Node(n.feature[rows], n.mean[rows]) for at, n in self.nodes.items()}
        return replace(self, image=self.image[rows], nodes=nodes)


class Routed(NamedTuple):
    """What a dynamic pass gave: one row per image of the batch."""

    output: Tensor
    """(B, C, H, W), the chosen exit's picture, not clamped."""
    exit: Tensor
    """(B,) int64, 1..K."""
    macs: Tensor
    """(B,) int64: true MACs of everything run for the image, assessments included."""
    scores: Tensor
    """(B, K-1) float64 quality of each assessed exit; NaN where the image had left before."""


class NestedUNet(nn.Module):
    """Nested U-Net with ``levels - 1`` exits (see the module's text for the equations).

    ``width`` channels everywhere; ``in_ch`` 1 (luma) or 3; ``separable`` depthwise-separable
    decoders and heads (the paper) or plain 3x3; ``eca`` False removes every gate; ``eca_last``
    True also gates the last step. Any height and width: the input is padded by replication to a
    multiple of 2^(levels-1) and the output cropped back.

    Images are (B, in_ch, H, W) in [0, 1]; exits are numbered from 1. Outputs are not clamped
    (clamp and round to 8 bit before a PSNR; :mod:`.metrics` and :mod:`.quality` do it).

    >>> net = NestedUNet(levels=4, width=8)
    >>> x = torch.rand(2, 1, 21, 30)
    >>> [tuple(y.shape) for y in net(x)]
    [(2, 1, 21, 30), (2, 1, 21, 30), (2, 1, 21, 30)]
    >>> torch.equal(net(x, exit=2), net(x)[1])
    True
    >>> net.dynamic(x, threshold=0.0).exit.tolist()
    [1, 1]
    """

    def __init__(
        self,
        levels: int = 6,
        width: int = 32,
        in_ch: int = 1,
        separable: bool = True,
        eca: bool = True,
        eca_last: bool = False,
    ) -> None:
        super().__init__()
        if levels < 2 or width < 1 or in_ch not in (1, 3):
            raise RequestError(
                f"NestedUNet(levels={levels}, width={width}, in_ch={in_ch}) cannot be built: "
                "levels must be at least 2, width at least 1 and in_ch 1 or 3."
            )
        self.levels, self.width, self.in_ch = levels, width, in_ch
        self.separable, self.eca, self.eca_last = separable, eca, eca_last

        def gate(last: bool = False) -> nn.Module:
            return ECA() if eca and (eca_last or not last) else Ungated()

        self.stem = nn.Sequential(
            nn.Conv2d(in_ch, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.down = nn.ModuleList(_Down(width, gate()) for _ in range(levels - 1))
        self.up = nn.ModuleDict()
        for k in range(1, levels):
            last = k == levels - 1
            for i, j in self._decoders(k):
                gates = [*(gate() for _ in range(j - 1)), gate(last)]
                self.up[f"{i}_{j}"] = _Up(width, gates, separable)
        self.heads = nn.ModuleList(
            _Head(width, in_ch, gate(k == levels - 1), separable) for k in range(1, levels)
        )
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Start with features of even size through all steps, and with every exit the identity.

        He's rule; what reads a gated feature is doubled, because a fresh gate halves it. With
        PyTorch's default the features of this depth fade, and training stalls for thousands of
        steps. The heads' last layers start at zero.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                taps = layer.weight.numel() // layer.out_channels
                if isinstance(layer, nn.ConvTranspose2d):
                    taps = layer.in_channels  # stride 2, kernel 2: one tap of each channel
                gain = 1.0 if layer.groups > 1 else 2.0  # no ReLU follows a depthwise layer
                nn.init.normal_(layer.weight, std=(gain / taps) ** 0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        downs: list[Any] = list(self.down) if self.eca else []
        ups: list[Any] = list(self.up.values()) if self.eca else []
        for down in downs:
            down.body[0].weight *= 2
        for up in ups:
            up.enlarge.weight *= 2
            # The last inputs are the enlarged map, whose gate lies before its convolution.
            if self.separable:
                up.mix[0][0].weight[: -self.width] *= 2
            else:
                up.mix[0].weight[:, : -self.width] *= 2
        heads: list[Any] = list(self.heads)
        for head in heads:
            last = head.residual[-1] if self.separable else head.residual
            nn.init.zeros_(last.weight)

    @property
    def exits(self) -> int:
        """The number K of exits."""
        return self.levels - 1

    @property
    def multiple(self) -> int:
        """Heights and widths are padded to a multiple of this many pixels."""
        return 1 << (self.levels - 1)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as JSON can keep them."""
        names = ("levels", "width", "in_ch", "separable", "eca", "eca_last")
        return {name: getattr(self, name) for name in names}

    @staticmethod
    def _decoders(k: int) -> list[tuple[int, int]]:
        return [(k + 2 - j, j) for j in range(2, k + 2)]

    # ---- the computation, step by step -------------------------------------------------------

    def begin(self, x: Tensor, pool: Pool | None = None) -> Partial:
        """Pad ``x`` (B, in_ch, H, W) and compute ``C[1, 1]``: the state before the first step.

        ``pool`` replaces the spatial mean in this step and all that follow it: an image cut into
        tiles is gated by the means of the whole image.
        """
        if x.dim() != 4 or x.shape[1] != self.in_ch or not x.is_floating_point():
            raise RequestError(
                f"an input of shape {tuple(x.shape)} and type {x.dtype} does not fit this network: "
                f"give floating-point images in [0, 1] as (batch, {self.in_ch}, height, width)."
            )
        down, right = (-size % self.multiple for size in x.shape[-2:])
        padded = F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
        pool = _spatial_mean if pool is None else pool
        feature = self.stem(padded)
        return Partial(x, {(1, 1): Node(feature, pool((1, 1), feature))}, 0, pool)

    def advance(self, partial: Partial) -> Partial:
        """Compute the next anti-diagonal from what is stored; the state given is not changed."""
        k = partial.step + 1
        if k > self.exits:
            raise RequestError(f"the last of {self.exits} exits is reached: nothing is left to do.")
        nodes = dict(partial.nodes)

        def add(i: int, j: int, feature: Tensor) -> None:
            nodes[i, j] = Node(feature, partial.pool((i, j), feature))

        add(k + 1, 1, self.down[k - 1](nodes[k, 1]))
        for i, j in self._decoders(k):
            skips = [nodes[i, c] for c in range(1, j)]
            add(i, j, self.up[f"{i}_{j}"](skips, nodes[i + 1, j - 1]))
        return replace(partial, nodes=nodes, step=k)

    def gated(self, exit: int) -> Iterator[tuple[nn.Module, tuple[int, int]]]:
        """Yield every gate that ``exit`` (1..K) needs, with the node ``(i, j)`` that it scales."""
        for k in range(1, self._checked(exit) + 1):
            down: Any = self.down[k - 1]
            yield down.gate, (k, 1)
            for i, j in self._decoders(k):
                up: Any = self.up[f"{i}_{j}"]
                sources = [*((i, c) for c in range(1, j)), (i + 1, j - 1)]
                yield from zip(up.gates, sources, strict=True)
        head: Any = self.heads[exit - 1]
        yield head.gate, (1, exit + 1)

    def read(self, partial: Partial) -> Tensor:
        """Return the picture ``y_k`` (B, in_ch, H, W) of the step that ``partial`` stopped at."""
        height, width = partial.image.shape[-2:]
        residual = self.heads[partial.step - 1](partial.nodes[1, partial.step + 1])
        return partial.image + residual[..., :height, :width]

    @overload
    def forward(self, x: Tensor, exit: None = None) -> list[Tensor]: ...

    @overload
    def forward(self, x: Tensor, exit: int) -> Tensor: ...

    def forward(self, x: Tensor, exit: int | None = None) -> list[Tensor] | Tensor:
        """Return every exit's picture, or that of ``exit`` (1..K) computing nothing deeper."""
        last = self.exits if exit is None else self._checked(exit)
        partial, pictures = self.begin(x), []
        for k in range(1, last + 1):
            partial = self.advance(partial)
            if exit is None or k == exit:
                pictures.append(self.read(partial))
        return pictures if exit is None else pictures[0]

    @torch.no_grad()
    def dynamic(
        self,
        x: Tensor,
        threshold: float,
        quality: TchebichefQuality | None = None,
        offset: tuple[int, int] = (0, 0),
    ) -> Routed:
        """Let every image leave at the first exit k < K whose quality is at least ``threshold``.

        ``Q(y_k) >= T_Q`` with the no-reference score of :class:`TchebichefQuality` (default: JPEG,
        n=8); the last exit is never assessed. Images that have left are removed from the batch and
        no longer computed. ``offset`` is where the codec's block grid starts in ``x``. A network
        of one channel takes RGB too: it enhances the luma and keeps the colour differences.
        """
        if x.dim() == 4 and x.shape[1] == 3 and self.in_ch == 1:
            ycbcr = rgb_to_ycbcr(x)
            routed = self.dynamic(ycbcr[:, :1], threshold, quality, offset)
            mixed = torch.cat([routed.output, ycbcr[:, 1:]], 1)
            return routed._replace(output=ycbcr_to_rgb(mixed))
        quality = TchebichefQuality() if quality is None else quality
        batch, last = x.shape[0], self.exits
        height, width = x.shape[-2:]
        output = torch.empty_like(x)
        chosen = torch.full((batch,), last, device=x.device)
        macs = torch.zeros(batch, dtype=torch.int64, device=x.device)
        scores = torch.full((batch, last - 1), torch.nan, dtype=torch.float64, device=x.device)
        alive = torch.arange(batch, device=x.device)
        partial = self.begin(x)
        for k in range(1, last + 1):
            partial = self.advance(partial)
            picture = self.read(partial)
            if k == last:
                output[alive] = picture.to(x.dtype)
                macs[alive] += self.macs(height, width, k, assessed=True)
                break
            judged = quality(luma(picture), offset=offset)
            scores[alive, k - 1] = judged.score.double()
            macs[alive] += judged.macs
            done = judged.score >= threshold
            output[alive[done]] = picture[done].to(x.dtype)
            macs[alive[done]] += self.macs(height, width, k, assessed=True)
            chosen[alive[done]] = k
            if done.any():
                alive, partial = alive[~done], partial.keep(~done)
            if not len(alive):
                break
        return Routed(output, chosen, macs, scores)

    # ---- what it costs ------------------------------------------------------------------------

    def macs(
        self,
        height: int,
        width: int,
        exit: int,
        convention: Convention = "true",
        assessed: bool = False,
    ) -> int:
        """Return the multiply-accumulates of one image up to ``exit``, its head included.

        ``"true"`` counts what is computed (a transposed convolution multiplies each *input* pixel
        by its kernel); it equals torch's FlopCounterMode. ``"paper"`` is the count printed in the
        paper (the tool ``thop``): each *output* pixel of a transposed convolution with the whole
        kernel, one more for each bias, and the gates' pooling. ``assessed`` adds the heads of the
        earlier exits, which a dynamic run has to read; the assessment itself is counted by
        :class:`TchebichefQuality`.

        >>> [round(NestedUNet().macs(512, 512, k) / 1e9, 3) for k in (1, 5)]
        [9.311, 21.932]
        >>> [round(NestedUNet().macs(512, 512, k, "paper") / 1e9, 1) for k in (1, 5)]
        [10.2, 27.6]
        """
        last = self._checked(exit)
        pixels = (-(-height // self.multiple) * -(-width // self.multiple)) * self.multiple**2
        heads = range(1, last + 1) if assessed else (last,)
        total = self._ops(self.stem, pixels, convention)
        for k in range(1, last + 1):
            total += self._ops(self.down[k - 1], pixels >> 2 * (k - 1), convention)
            for i, j in self._decoders(k):
                total += self._ops(self.up[f"{i}_{j}"], pixels >> 2 * (i - 1), convention)
        return total + sum(self._ops(self.heads[k - 1], pixels, convention) for k in heads)

    def exit_under(self, macs: float, height: int, width: int) -> int:
        """Return the deepest exit within ``macs`` for an image of this size; RequestError if none.

        >>> NestedUNet().exit_under(16e9, 512, 512)
        3
        """
        affordable = [k for k in range(1, self.exits + 1) if self.macs(height, width, k) <= macs]
        if not affordable:
            raise RequestError(
                f"a budget of {macs:,.0f} MACs is below the first exit's "
                f"{self.macs(height, width, 1):,} at {height}x{width}: raise it."
            )
        return affordable[-1]

    def parameters_to(self, exit: int) -> Iterator[nn.Parameter]:
        """Yield the parameters of all exits up to ``exit``; the gates' come with their consumer."""
        last = self._checked(exit)
        yield from self.stem.parameters()
        for k in range(1, last + 1):
            yield from self.down[k - 1].parameters()
            for i, j in self._decoders(k):
                yield from self.up[f"{i}_{j}"].parameters()
            yield from self.heads[k - 1].parameters()

    def _checked(self, exit: int) -> int:
        if not 1 <= exit <= self.exits:
            raise RequestError(
                f"exit {exit} does not exist: this network has exits 1 to {self.exits}."
            )
        return exit

    def _ops(self, block: nn.Module, pixels: int, convention: Convention) -> int:
        """Count one block whose result has ``pixels`` pixels (a Down block: whose input has)."""
        paper, total = convention == "paper", 0
        gates = list(block.gates) if isinstance(block, _Up) else [getattr(block, "gate", None)]
        for index, gate in enumerate(gates):
            if isinstance(gate, ECA):
                lower = isinstance(block, _Up) and index == len(gates) - 1
                total += 3 * self.width + paper * self.width * (pixels >> 2 * lower)
        for layer in block.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                total += layer.weight.numel() * (pixels if paper else pixels // 4)
                total += paper * layer.out_channels * pixels
            elif isinstance(layer, nn.Conv2d):
                here = pixels // 4 if layer.stride == (2, 2) else pixels
                total += (layer.weight.numel() + paper * layer.out_channels) * here
        return total
