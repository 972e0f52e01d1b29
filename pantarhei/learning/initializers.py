r"""Initial weights with known properties, for any model: its modules are walked.

Signals pass a deep network unchanged in size if every layer preserves norms. Scaled Gaussian
weights do so on average only: the singular values of their product spread exponentially with depth.
Products of orthogonal weights keep all singular values at 1, whatever the depth, which makes the
learning time of deep linear networks independent of it (Saxe, McClelland and Ganguli, arXiv
1312.6120); greedy pretraining does the same with directions that the data choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pantarhei.errors import RequestError, nearest
from pantarhei.learning.deep_linear.correlations import Correlations
from pantarhei.learning.deep_linear.flow import gradient_descent

Block = tuple[Tensor, float]  # a view of the weights that is one matrix, and its fan-in


def haar(rows: int, columns: int, generator: torch.Generator | None = None) -> Tensor:
    """Return a random matrix with orthonormal rows or columns (the fewer), in float64.

    Uniform over all such matrices (Haar): QR of a Gaussian matrix with the signs of R's diagonal
    moved to Q, without which LAPACK's convention would bias it.

    >>> q = haar(3, 5)
    >>> torch.allclose(q @ q.T, torch.eye(3, dtype=q.dtype))
    True
    """
    tall = torch.randn(
        max(rows, columns), min(rows, columns), dtype=torch.float64, generator=generator
    )
    q, r = torch.linalg.qr(tall)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return q if rows >= columns else q.T


def initialize_(
    model: nn.Module,
    scheme: Literal["orthogonal", "gaussian"] = "orthogonal",
    *,
    gain: float = 1.0,
    bias: float | None = 0.0,
    select: Callable[[str, nn.Module], bool] | None = None,
    generator: torch.Generator | None = None,
) -> list[str]:
    r"""Initialise every weight matrix of a model in place and return the names of the weights.

    ``"orthogonal"``: gain times a Haar orthogonal matrix, semi-orthogonal where it is not square
    (it then preserves norms in min(in, out) directions only). Convolutions are delta-orthogonal
    (Xiao et al., arXiv 1806.05393): that matrix at the centre tap and 0 elsewhere, group by group.
    ``"gaussian"``: independent :math:`N(0, \mathrm{gain}^2/\mathrm{fan\ in})`.

    Args:
        model: Any module. Walked are nn.Linear, convolutions and their transposes, the projections
            of nn.MultiheadAttention, each gate of nn.RNN, nn.LSTM and nn.GRU, and the Conv1D of
            transformers; norms and embeddings stay, as do weights shared with one that was done.
        scheme: See above.
        gain: Factor; :func:`pantarhei.probes.mean_field.critical_gain` gives that of an activation.
        bias: Value for the biases of the modules walked; None leaves them.
        select: ``select(name, module)`` tells which modules to initialise; default all of those.
        generator: Source of random numbers, on the CPU.

    Raises :class:`RequestError` for weights that cannot be set: uninitialised (lazy) ones, those on
    the meta device, sharded ones and parametrised ones.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
    >>> initialize_(net, "orthogonal", gain=2 ** 0.5)
    ['0.weight', '3.weight']
    >>> w = net[3].weight.detach()
    >>> torch.allclose(w @ w.T, 2 * torch.eye(5), atol=1e-5)
    True
    """
    fillers = {"orthogonal": _fill_orthogonal, "gaussian": _fill_gaussian}
    if scheme not in fillers:
        raise RequestError(
            f"Unknown initialisation '{scheme}': choose {' or '.join(fillers)}."
            f"{nearest(scheme, fillers)}"
        )
    if not math.isfinite(gain):
        raise RequestError(f"The gain is a finite number, not {gain}.")
    done: dict[int, str] = {}
    for prefix, module in model.named_modules():
        if select is not None and not select(prefix, module):
            continue
        names = [name for name in _matrix_names(module) if hasattr(module, name)]
        for name in names:
            label = f"{prefix}.{name}" if prefix else name
            parameter = _settable(label, module, name)
            if id(parameter) in done:
                continue
            done[id(parameter)] = label
            with torch.no_grad():
                for view, fan_in in _blocks(module, name, parameter):
                    fillers[scheme](view, fan_in, gain, generator)
        if bias is not None and names:
            for name, parameter in module.named_parameters(recurse=False):
                if "bias" in name:
                    nn.init.constant_(parameter, bias)
    if not done:
        raise RequestError("The model has no weight matrix to initialise: give one with layers.")
    return list(done.values())


def balanced(
    widths: Sequence[int],
    U: ArrayLike,
    V: ArrayLike,
    u0: ArrayLike | None = None,
    *,
    strengths: ArrayLike | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""Return weights from which every mode of a deep linear network is learned by itself.

    .. math:: W^l = R_{l+1} D_l R_l^T, \qquad R_1 = V,\ R_{n+1} = U,

    the other R_l with random orthonormal columns. With equal :math:`D_l = u_0^{1/n}` the layers are
    balanced, :math:`W^{l+1\,T}W^{l+1} = W^l W^{l\,T}`, at all times.

    Args:
        widths: (N1, ..., N3), of n + 1 layers of neurons.
        U, V: (N3, K) and (N1, K): the modes, such as ``data.modes()`` has them.
        u0: End-to-end strengths, a number or (K,).
        strengths: (n, K) strengths of the layers, instead of ``u0``, if they shall differ.
        generator: Source of random numbers, on the CPU.

    Raises :class:`RequestError` where a hidden layer is narrower than K, or u0 is negative.

    >>> w1, w2 = balanced((4, 6, 3), np.eye(3), np.eye(4)[:, :3], 0.01)
    >>> torch.allclose(w2 @ w1, 0.01 * torch.eye(3, 4, dtype=w1.dtype))
    True
    """
    u, v = (torch.as_tensor(np.array(m, dtype=np.float64)) for m in (U, V))
    n, k = len(widths) - 1, u.shape[-1]
    if u.dim() != 2 or v.shape != (widths[0], k) or len(u) != widths[-1]:
        raise RequestError(
            f"U {tuple(u.shape)} and V {tuple(v.shape)} are not modes of a map from {widths[0]} to "
            f"{widths[-1]}: give ({widths[-1]}, K) and ({widths[0]}, K)."
        )
    if min(widths[1:-1], default=k) < k:
        raise RequestError(
            f"A hidden layer of width {min(widths[1:-1])} cannot hold {k} modes: widen it, or give "
            "fewer columns of U and V."
        )
    if (u0 is None) == (strengths is None):
        raise RequestError("Give either u0 or strengths.")
    if strengths is None:
        start = np.broadcast_to(np.asarray(u0, dtype=np.float64), (k,))
        if (start < 0).any():
            raise RequestError("u0 is not negative: give strengths of both signs instead.")
        strengths = np.broadcast_to(start ** (1 / n), (n, k))
    d = torch.as_tensor(np.array(np.broadcast_to(np.asarray(strengths, float), (n, k))))
    sides = [v, *(haar(width, k, generator) for width in widths[1:-1]), u]
    return [above * a @ below.T for a, (below, above) in zip(d, pairwise(sides), strict=True)]


def balanced_(
    model: nn.Module,
    U: ArrayLike,
    V: ArrayLike,
    u0: ArrayLike | None = None,
    *,
    strengths: ArrayLike | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Give the linear layers of a model, in their order, the weights of :func:`balanced`.

    Biases become 0. Raises :class:`RequestError` where the layers do not follow each other.

    >>> net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    >>> balanced_(net, np.eye(3), np.eye(4)[:, :3], 0.01)
    >>> torch.allclose(net(torch.eye(4))[:3], 0.01 * torch.eye(3), atol=1e-6)
    True
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    widths = [layer.in_features for layer in layers] + [x.out_features for x in layers[-1:]]
    if not layers or any(a.out_features != w for a, w in zip(layers, widths[1:], strict=True)):
        raise RequestError(
            "The model's linear layers do not follow each other in width: give a plain stack."
        )
    weights = balanced(widths, U, V, u0, strengths=strengths, generator=generator)
    with torch.no_grad():
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.zero_()


def pretrain_(
    model: nn.Module,
    inputs: Tensor | Iterable[Tensor],
    *,
    method: Literal["limit", "descent"] = "limit",
    steps: int = 2000,
    std: float = 1e-3,
    last: bool = False,
    generator: torch.Generator | None = None,
) -> list[str]:
    r"""Pretrain a model's linear layers greedily as autoencoders of what reaches them.

    Layer by layer, in the order in which they run, W and a decoder C are to minimise
    :math:`\langle|h - C W h|^2\rangle` over the layer's inputs h. From a small start W converges to
    :math:`R\,V_k^T`: the k = min(in, out) principal directions of h, each with singular value 1,
    turned by a random R. The product of such layers has singular values 1 too, and with the task's
    last layer it is a decoupled start where input and task share their directions
    (:func:`kept_by_pretraining` tells whether they do).

    Args:
        model: Any module; its ``nn.Linear`` layers are pretrained, whatever lies between them.
        inputs: A batch that ``model`` takes, or several.
        method: ``"limit"`` sets :math:`R V_k^T` directly, from the eigenvectors of the inputs'
            correlation. ``"descent"`` trains W and C on that correlation, as one would with the
            samples: directions of little power are then still at their small start after ``steps``.
        steps: Of that descent, at 0.3 over the largest power.
        std: Of its random start.
        last: Pretrain the last layer, the read-out, too.
        generator: Source of random numbers, on the CPU.

    Returns the names of the layers pretrained; their biases become 0. Raises
    :class:`RequestError` where the model has no such layer, or inputs are not finite.

    >>> net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    >>> pretrain_(net, torch.randn(100, 6))
    ['0', '1']
    >>> torch.linalg.svdvals((net[1].weight @ net[0].weight).detach()).round(decimals=4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    batches = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    order = _run_order(model, batches)
    names = list(order) if last else list(order)[:-1]
    if not names:
        raise RequestError(
            "The model runs too few linear layers to pretrain: it needs one, and a read-out."
        )
    if method not in ("limit", "descent"):
        raise RequestError(f"'{method}' is not a way to pretrain: choose limit or descent.")
    for name in names:
        layer = order[name]
        sigma = _correlation(model, layer, batches)
        if not np.isfinite(sigma).all():
            raise RequestError(f"What reaches layer '{name}' is not finite: check the inputs.")
        shape = (layer.out_features, layer.in_features)
        if method == "limit":
            weight = _principal(sigma, shape, generator)
        else:
            weight = _autoencoder(sigma, shape, steps, std, generator)
        with torch.no_grad():
            layer.weight.copy_(weight)
            if layer.bias is not None:
                layer.bias.zero_()
    return names


def kept_by_pretraining(data: Correlations, width: int) -> float:
    r"""Return the share of the learnable loss that survives a pretrained layer of this width.

    Pretraining keeps the ``width`` strongest principal directions of the inputs; the task may need
    others. With :math:`\Sigma_{11} = V\Lambda V^T` it is
    :math:`\sum_{k\le\mathrm{width}} |\Sigma_{31}v_k|^2/\lambda_k` over the sum of all.

    >>> data = Correlations(np.array([[0.0, 1.0]]), np.diag([4.0, 1.0]), 1.0)
    >>> kept_by_pretraining(data, 1), kept_by_pretraining(data, 2)
    (0.0, 1.0)
    """
    power, v = np.linalg.eigh(data.sigma11)
    power, v = power[::-1], v[:, ::-1]
    some = power > 1e-10 * power.max(initial=0.0)
    gain = np.divide(((data.sigma31 @ v) ** 2).sum(0), power, out=np.zeros_like(power), where=some)
    return float(gain[:width].sum() / gain.sum()) if gain.sum() else 0.0


def _fill_orthogonal(
    view: Tensor, fan_in: float, gain: float, generator: torch.Generator | None
) -> None:
    rows, columns = view.shape[:2]
    matrix = gain * haar(rows, columns, generator)
    if view.dim() == 2:
        view.copy_(matrix)
        return
    view.zero_()
    centre: Any = (..., *(size // 2 for size in view.shape[2:]))
    view[centre] = matrix.to(view)


def _fill_gaussian(
    view: Tensor, fan_in: float, gain: float, generator: torch.Generator | None
) -> None:
    noise = torch.randn(view.shape, dtype=torch.float64, generator=generator)
    view.copy_(noise * (gain / math.sqrt(fan_in)))


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _matrix_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names that a module's weight matrices may have; none for what is not walked."""
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)) or _is_conv1d(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        # Of in_proj_weight and the other three, one or the other is None.
        own = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in own if getattr(module, name) is not None)
    if isinstance(module, nn.RNNBase):
        return tuple(name for name, _ in module.named_parameters() if "weight" in name)
    return ()


def _is_conv1d(module: nn.Module) -> bool:
    """Tell transformers' Conv1D, a linear layer with its weight transposed, without the import."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _settable(label: str, module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters.get(name)
    reason = ""
    if parameter is None:
        reason = "is made by a parametrisation: remove that first, and put it back afterwards"
    elif isinstance(parameter, UninitializedParameter):
        reason = "has no shape yet: run the model once on a batch"
    elif parameter.is_meta:
        reason = "is on the meta device: move the model to a real one"
    elif hasattr(parameter, "device_mesh"):
        reason = "is sharded: initialise the model before it is wrapped"
    if reason or parameter is None:
        raise RequestError(f"Weight '{label}' {reason}.")
    return parameter


def _blocks(module: nn.Module, name: str, weight: Tensor) -> Iterator[Block]:
    """Yield the matrices in a weight: one, or one for each group, projection or gate."""
    count = 1
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        count = module.groups
    elif isinstance(module, nn.RNNBase) and not name.startswith("weight_hr"):
        count = len(weight) // module.hidden_size
    elif name == "in_proj_weight":
        count = 3
    for view in weight.chunk(count):
        fan_in: float = view[0].numel()
        if isinstance(module, _TRANSPOSED):  # (in, out, taps...): every stride-th tap is met
            fan_in = len(view) * view[0, 0].numel() / math.prod(module.stride)
        elif _is_conv1d(module):
            fan_in = len(view)
        yield view, fan_in


def _run_order(model: nn.Module, batches: Sequence[Tensor]) -> dict[str, nn.Linear]:
    """Return the linear layers that a batch runs through, by name, in the order of running."""
    order: dict[str, nn.Linear] = {}
    if not batches:
        raise RequestError("There are no inputs to pretrain on: give a batch.")
    with _hooked(model, lambda name, layer, _: order.setdefault(name, layer)):
        _forward(model, batches[:1])
    return order


def _correlation(model: nn.Module, layer: nn.Linear, batches: Sequence[Tensor]) -> np.ndarray:
    """Return the correlation of what reaches a layer, with the layers before it as they are now."""
    size = layer.in_features
    total = torch.zeros(size, size, dtype=torch.float64, device=layer.weight.device)
    count = 0

    def add(_: str, called: nn.Linear, h: Tensor) -> None:
        nonlocal count
        if called is layer:
            rows = h.detach().reshape(-1, size).to(torch.float64)
            total.addmm_(rows.T, rows)
            count += len(rows)

    with _hooked(model, add):
        _forward(model, batches)
    return (total / max(count, 1)).cpu().numpy()


@contextmanager
def _hooked(model: nn.Module, see: Callable[[str, Any, Tensor], object]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def seen(layer: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, layer, args[0])

        return seen

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Run the batches as in evaluation, and leave every module's mode as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for module, training in modes.items():
            module.training = training


def _principal(
    sigma: np.ndarray, shape: tuple[int, int], generator: torch.Generator | None
) -> Tensor:
    """Return R V_k^T, without the directions in which the inputs have no power."""
    power, v = np.linalg.eigh(sigma)
    k = min(min(shape), int((power > 1e-10 * power.max(initial=0.0)).sum()))
    top = torch.from_numpy(np.ascontiguousarray(v[:, ::-1][:, :k]))
    return haar(shape[0], k, generator) @ top.T if k else torch.zeros(shape)


def _autoencoder(
    sigma: np.ndarray,
    shape: tuple[int, int],
    steps: int,
    std: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Train encoder and decoder on the correlation from a small start; return the encoder."""
    largest = float(np.linalg.norm(sigma, 2))
    if largest == 0:
        return torch.zeros(shape)
    start = [
        std * torch.randn(size, dtype=torch.float64, generator=generator)
        for size in (shape, shape[::-1])
    ]
    data = Correlations(sigma, sigma, float(np.trace(sigma)))
    done = gradient_descent(start, data, 0.3 / largest, steps, every=steps)
    return torch.from_numpy(done.weights[0])
