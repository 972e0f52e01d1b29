r"""The vertices measured over many random networks at once, with standard errors.

The tangent kernel and its differential are not differentiated but carried from layer to layer by
their exact forward equations ("The Principles of Deep Learning Theory", chapters 8 and 11),
batched over networks; means over neurons leave coincident indices out, so that the estimates are
unbiased up to the product of two means.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.recursions import Schedule, _per_layer, _variances
from pantarhei.probes.mean_field import Activation, Function
from pantarhei.progress import progress as show_progress

# Bytes of the largest tensors of a batch of networks: in a processor's cache they are several times
# faster, an accelerator wants them large.
_BYTES = {"cpu": 2**23, "other": 2**29}


@dataclass(frozen=True)
class Layer:
    """One layer of a batch of networks at one input.

    ``z`` (B, n) are the preactivations, ``H`` (B, n, n) the tangent kernel of the layer's neurons
    and ``dH`` (B, n, n, n) its differential (first index: the twice differentiated neuron), or None
    where not asked for.
    """

    z: Tensor
    H: Tensor | None = None
    dH: Tensor | None = None


def first_layer(
    z: Tensor, x2: float, lambda_b: float, lambda_W: float, *, ntk: bool = True, dntk: bool = False
) -> Layer:
    r"""Return layer 1 with the given preactivations: :math:`H = (\lambda_b + \lambda_W x^2)\,1`.

    ``x2`` is x.x / n_0. The differential is 0: the layer is linear in its weights.
    """
    n = z.shape[1]
    eye = torch.eye(n, dtype=z.dtype, device=z.device).expand(len(z), n, n)
    H = (lambda_b + lambda_W * x2) * eye if ntk or dntk else None
    return Layer(z, H, z.new_zeros(len(z), n, n, n) if dntk else None)


def next_layer(
    before: Layer,
    W: Tensor,
    b: Tensor | float,
    activation: Activation,
    lambda_b: float = 1.0,
    lambda_W: float = 1.0,
    gamma: float = 0.0,
) -> Layer:
    r"""Carry a batch of networks through one layer by the exact forward equations.

    With :math:`J = \gamma 1 + W\,\mathrm{diag}\,\sigma'` and U = H J^T:

    .. math::
        z' &= \gamma z + b + W\sigma, \qquad
        H' = \Bigl(\lambda_b + \tfrac{\lambda_W}{n}\sum_j\sigma_j^2\Bigr) 1 + J H J^T \\
        \widehat{dH}'_{012} &= \sum_j W_{0j}\sigma''_j U_{j1} U_{j2}
          + J J J\,\widehat{dH}
          + \tfrac{\lambda_W}{n}\Bigl(\delta_{01}\sum_j \sigma_j\sigma'_j U_{j2}
          + \delta_{02}\sum_j \sigma_j\sigma'_j U_{j1}\Bigr)

    Args:
        before: The layer before.
        W: Weights (B, n', n).
        b: Biases (B, n'), or 0.
        activation: Between the layers.
        lambda_b, lambda_W: Learning-rate factors of this layer; that of a weight is lambda_W / n.
        gamma: Strength of the residual branch; n' = n then.
    """
    z, H, dH = before.z, before.H, before.dH
    n, s = z.shape[1], activation(z)
    out = b + torch.einsum("bij,bj->bi", W, s)
    if gamma:
        out = out + gamma * z
    if H is None:
        return Layer(out)
    slope = activation.derivative(z)
    J = W * slope[:, None]
    if gamma:
        J = J + gamma * torch.eye(n, dtype=z.dtype, device=z.device)
    U = H @ J.transpose(1, 2)
    new_H = J @ U
    new_H.diagonal(dim1=1, dim2=2).add_(lambda_b + lambda_W * s.square().mean(1, keepdim=True))
    if dH is None:
        return Layer(out, new_H)
    bent = W * activation.derivative(z, 2)[:, None]
    new = torch.einsum("bij,bjk,bjl->bikl", bent, U, U)
    moved = torch.einsum("bia,bacd->bicd", J, dH)
    moved = torch.einsum("bicd,bkc->bikd", moved, J)
    new += torch.einsum("bikd,bld->bikl", moved, J)
    own = lambda_W / n * torch.einsum("bj,bjk->bk", s * slope, U)
    new.diagonal(dim1=1, dim2=2).add_(own[:, :, None])  # 0 = 1; the diagonal comes last
    new.diagonal(dim1=1, dim2=3).add_(own[:, :, None])
    return Layer(out, new_H, new)


@dataclass(frozen=True)
class Estimates:
    """What :func:`measure` returns: for each vertex its values and standard errors, (L,) each.

    ``values["V"][l - 1]`` estimates the V of :class:`~.recursions.Vertices` at layer l, that is the
    cumulant times the width before; G stands for E z^2 and Theta for E H_ii at this width.
    """

    values: dict[str, Tensor]
    errors: dict[str, Tensor]
    networks: int

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]


def measure(
    activation: Activation | Function | str,
    widths: Sequence[int],
    x2: float = 1.0,
    *,
    networks: int = 10_000,
    C_b: float | None = None,
    C_W: float | None = None,
    lambda_b: Schedule = 1.0,
    lambda_W: Schedule = 1.0,
    gamma: float = 0.0,
    ntk: bool = False,
    dntk: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float64,
    quiet: bool = True,
) -> Estimates:
    r"""Measure G, T, V (with ``ntk`` also Theta, D, F, A, B; with ``dntk`` P, Q) of every layer.

    Networks are drawn and carried forward in batches. Without tangent kernel no weight is drawn:
    given the layer before, the preactivations of a layer are exactly independent Gaussians of
    variance :math:`C_b + C_W\overline{\sigma^2}` around :math:`\gamma z`, so that a network costs
    its neurons and not its weights. The estimators are means over pairs of distinct neurons,

    .. math:: \frac{V}{n} = \overline{z_i^2 z_j^2} - \overline{z^2}^2, \quad
        \frac{F}{n} = \overline{z_i z_j H_{ij}}, \quad
        \frac{B}{n} = \overline{H_{ij}^2}, \quad
        \frac{P}{n} = \overline{\widehat{dH}_{ijj} z_i}, \quad
        \frac{Q}{n} = \overline{\widehat{dH}_{iij} z_j},

    D and A like V; standard errors are those over networks, by linearisation.

    Args:
        activation: Any elementwise torch function, or a name.
        widths: n_1 .. n_L, the number of neurons of every layer, the last included; each >= 2.
        x2: x.x / n_0.
        networks: How many.
        C_b, C_W: Variances; the critical ones unless given.
        lambda_b, lambda_W: Learning-rate factors, one number or one a layer.
        gamma: Strength of the residual branch (no dntk then).
        ntk, dntk: Whether to carry the tangent kernel (n^2 numbers a network) and its differential
            (n^3).
        seed, device, dtype: Of the draws.
        quiet: Show no progress.

    >>> found = measure("relu", (50, 50, 50), networks=4000)
    >>> bool((found["V"] - torch.tensor([0, 20, 42]).double()).abs().max() < 4)
    True
    """
    act = Activation(activation)
    C_b, C_W = _variances(act, gamma, C_b, C_W)
    layers = len(widths)
    rates_b, rates_W = _per_layer(lambda_b, layers), _per_layer(lambda_W, layers)
    _check(widths, networks, gamma, dntk)
    generator = torch.Generator(device).manual_seed(seed)
    largest = max(widths) ** (3 if dntk else 2 if ntk else 1)
    room = _BYTES.get(generator.device.type, _BYTES["other"])
    size = max(1, min(networks, room // (4 * dtype.itemsize * largest)))
    totals = [_Moments() for _ in widths]
    with show_progress(networks, f"{act.name} networks", quiet=quiet) as bar:
        for done in range(0, networks, size):
            count = min(size, networks - done)
            batch = _networks(
                act, widths, count, x2, C_b, C_W, rates_b, rates_W, gamma, ntk, dntk, generator,
                dtype,
            )  # fmt: skip
            for total, layer in zip(totals, batch, strict=True):
                total.add(pair_means(layer))
            bar.advance(count)
    values: dict[str, list[Tensor]] = {}
    errors: dict[str, list[Tensor]] = {}
    for index, total in enumerate(totals):
        # The first layer is exactly Gaussian: its cumulants are measured, too, over 1 / n_1.
        n = widths[max(0, index - 1)]
        for name, (value, error) in total.vertices().items():
            factor = 1 if name in ("G", "Theta") else n
            values.setdefault(name, []).append(factor * value)
            errors.setdefault(name, []).append(factor * error)
    return Estimates(
        {name: torch.stack(v).cpu() for name, v in values.items()},
        {name: torch.stack(v).cpu() for name, v in errors.items()},
        networks,
    )


def _networks(
    act: Activation,
    widths: Sequence[int],
    count: int,
    x2: float,
    C_b: float,
    C_W: float,
    rates_b: list[float],
    rates_W: list[float],
    gamma: float,
    ntk: bool,
    dntk: bool,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> Iterator[Layer]:
    def normal(*shape: int) -> Tensor:
        # Drawn to seven digits, which is six times faster: far below any error of the estimates.
        drawn = torch.randn(*shape, generator=generator, device=generator.device)
        return drawn.to(dtype)

    z = (C_b + C_W * x2) ** 0.5 * normal(count, widths[0])
    layer = first_layer(z, x2, rates_b[0], rates_W[0], ntk=ntk, dntk=dntk)
    yield layer
    for index, (before, n) in enumerate(itertools.pairwise(widths), start=1):
        if layer.H is None:
            variance = C_b + C_W * act(layer.z).square().mean(1, keepdim=True)
            z = variance.sqrt() * normal(count, n)
            layer = Layer(z + gamma * layer.z if gamma else z)
        else:
            W = normal(count, n, before).mul_((C_W / before) ** 0.5)
            b = C_b**0.5 * normal(count, n) if C_b else 0.0
            layer = next_layer(layer, W, b, act, rates_b[index], rates_W[index], gamma)
        yield layer


def pair_means(layer: Layer) -> dict[str, Tensor]:
    """Return, for each network of a batch, the means over distinct neurons that vertices need.

    ``"zz"`` is the mean of z_i^2 z_j^2, ``"zH"`` of z_i^2 H_jj, and so on, i and j different; each
    is (B,).
    """
    z, H, dH = layer.z, layer.H, layer.dH
    n = z.shape[1]
    pairs = n * (n - 1)
    square, total = z.square(), z.square().sum(1)
    found = {
        "z": total / n,
        "zz": (total**2 - square.square().sum(1)) / pairs,
        "T": (z.sum(1) * total - (z * square).sum(1)) / pairs,
    }
    if H is not None:
        diagonal = H.diagonal(dim1=1, dim2=2)
        trace, same = diagonal.sum(1), (square * diagonal).sum(1)
        own = diagonal.square().sum(1)
        found |= {
            "H": trace / n,
            "zH": (total * trace - same) / pairs,
            "HH": (trace**2 - own) / pairs,
            "F": (torch.einsum("bi,bij,bj->b", z, H, z) - same) / pairs,
            "B": (H.square().sum((1, 2)) - own) / pairs,
        }
    if dH is not None:
        same = torch.einsum("biii,bi->b", dH, z)
        found |= {
            "P": (torch.einsum("bijj,bi->b", dH, z) - same) / pairs,
            "Q": (
                (torch.einsum("biij,bj->b", dH, z) + torch.einsum("biji,bj->b", dH, z)) / 2 - same
            )
            / pairs,
        }
    return found


class _Moments:
    """Collects per-network means; its vertices are connected parts with their errors."""

    _CONNECTED = ("V", "zz", "z", "z"), ("D", "zH", "z", "H"), ("A", "HH", "H", "H")

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def add(self, means: dict[str, Tensor]) -> None:
        for name, values in means.items():
            self.rows.setdefault(name, []).append(values)

    def vertices(self) -> dict[str, tuple[Tensor, Tensor]]:
        rows = {name: torch.cat(parts) for name, parts in self.rows.items()}
        mean = {name: values.mean() for name, values in rows.items()}
        count = len(rows["z"])
        influence = {"G": rows["z"]} | {k: rows[k] for k in ("T", "F", "B", "P", "Q") if k in rows}
        value = {name: values.mean() for name, values in influence.items()}
        if "H" in rows:
            influence["Theta"], value["Theta"] = rows["H"], mean["H"]
        for name, both, left, right in self._CONNECTED:
            if both not in rows:
                continue
            # cov(left, right) / count is the bias of the product of two means.
            bias = ((rows[left] - mean[left]) * (rows[right] - mean[right])).mean() / (count - 1)
            value[name] = mean[both] - mean[left] * mean[right] + bias
            influence[name] = rows[both] - mean[left] * rows[right] - mean[right] * rows[left]
        return {name: (value[name], influence[name].std() / count**0.5) for name in value}


def _check(widths: Sequence[int], networks: int, gamma: float, dntk: bool) -> None:
    if len(widths) < 1 or min(widths) < 2:
        raise RequestError(
            f"widths={tuple(widths)}: give n_1 to n_L, each at least 2, for pairs of neurons."
        )
    if networks < 2:
        raise RequestError(f"networks={networks}: standard errors need at least 2.")
    if gamma and len(set(widths)) > 1:
        raise RequestError("A residual branch needs equal widths, but widths has different ones.")
    if gamma and dntk:
        raise RequestError("The differential of the tangent kernel is measured for gamma=0 only.")
