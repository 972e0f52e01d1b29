r"""How signals go through a network: sizes of activations and gradients, Jacobians, spectra.

A signal that grows or shrinks in every layer is gone after many. What to look at, in a network of
your own: the second moment of every layer's output and of the loss's gradient there
(:func:`layer_moments`), the singular values of the input-output Jacobian (all near 1: dynamical
isometry; Saxe et al. 2014, arXiv 1312.6120), and how fast two inputs become alike with depth
(:func:`correlation_length`; Schoenholz et al. 2017, arXiv 1611.01232). What theory predicts for an
activation before any network is built (susceptibilities, critical initialisation) is in
:mod:`pantarhei.probes.mean_field`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import lapack
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pantarhei.errors import RequestError
from pantarhei.probes._objective import Loss, Objective, differentiate
from pantarhei.probes._outputs import Outputs, Read

Layers = Callable[[str, nn.Module], bool]

_MEMORY = 2**29  # bytes that a block of Jacobians may take


def input_jacobian(
    model: nn.Module,
    inputs: Any,
    *,
    wrt: int | str | None = None,
    read: Read | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return the input-output Jacobian of each input, (n, o, d).

    .. math:: J_{ab}(x) = \partial f_a(x) / \partial x_b

    Outputs and inputs are flattened. Each input is taken by itself, in evaluation mode, all of them
    in one vectorised pass: in reverse mode, or forward mode where there are more outputs.

    Args:
        model: Any module; one without trainable weights will do.
        inputs: What the model is called with, n rows: a tensor, a tuple of arguments or a dict of
            keyword arguments.
        wrt: Position or keyword of the argument to differentiate by; default the first
            floating-point tensor. For a language model give ``inputs_embeds``.
        read: Picks the outputs from what the model returns; default that tensor, or its ``logits``.
        dtype: Work on copies in this precision.

    Raises:
        RequestError: Where there is no such argument, or it is not floating-point.

    >>> input_jacobian(nn.ReLU(), torch.tensor([[1.0, -1.0]]))
    tensor([[[1., 0.],
             [0., 0.]]])
    """
    function = _InputFunction(model, inputs, wrt, read, dtype)
    return torch.cat(list(function.dense()))


def jacobian_singular_values(
    model: nn.Module,
    inputs: Any,
    k: int | None = None,
    *,
    wrt: int | str | None = None,
    read: Read | None = None,
    dtype: torch.dtype | None = None,
    tol: float = 1e-6,
    seed: int = 0,
) -> Tensor:
    r"""Return the singular values of each input's Jacobian, (n, min(o, d)), largest first.

    With ``k`` only the largest k, (n, k), by block Krylov iteration on all inputs at once: products
    :math:`Jv` and :math:`J^\top u` alone, until the k values change by less than ``tol`` of the
    largest. Blocks of k vectors find values that occur up to k times. It pays where k is far below
    o and d; where it could not, the Jacobians are taken whole.

    The smallest values are as exact as the precision of the largest: below 1e-16 of it (1e-7 in
    float32) they are rounding.

    Other arguments and errors as of :func:`input_jacobian`.

    >>> net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    >>> _ = [nn.init.orthogonal_(layer.weight) for layer in net]
    >>> values = jacobian_singular_values(net, torch.randn(2, 3), dtype=torch.float64)
    >>> (values - 1).abs().max() < 1e-6
    tensor(True)
    """
    function = _InputFunction(model, inputs, wrt, read, dtype)
    smaller = min(function.o, function.d)
    if k is not None and not 1 <= k <= smaller:
        raise RequestError(
            f"k={k} singular values of a {function.o} by {function.d} Jacobian: choose 1 to "
            f"{smaller}."
        )
    if k is None or 4 * k >= smaller:
        values = torch.cat([torch.linalg.svdvals(block) for block in function.dense()])
        return values[:, :k]
    return _largest(function, k, tol, seed)


def share_in_band(singular_values: Tensor, low: float = 0.1, high: float = 10.0) -> Tensor:
    """Return the share of singular values in [low, high], over the last axis.

    >>> share_in_band(torch.tensor([20.0, 1.0, 1.0, 0.0]))
    tensor(0.5000)
    """
    if not 0 <= low <= high:
        raise RequestError(f"the band [{low}, {high}] is empty: give 0 <= low <= high.")
    inside = (singular_values >= low) & (singular_values <= high)
    return inside.double().mean(-1).to(singular_values.dtype)


class _InputFunction:
    """The outputs as a function of one argument: Jacobians whole, and products with them."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        wrt: int | str | None,
        read: Read | None,
        dtype: torch.dtype | None,
    ):
        self.outputs = Outputs(model, inputs, read=read, dtype=dtype, weights=False)
        self.weights = self.outputs.objective.params
        self.leaves, self.structure = pytree.tree_flatten((self.outputs.args, self.outputs.kwargs))
        self.at = self._position(wrt)
        self.x: Tensor = self.leaves[self.at]
        self.n, self.o = self.outputs.n, self.outputs.o
        self.d = self.x[0].numel()

    def _position(self, wrt: int | str | None) -> int:
        args, kwargs = self.outputs.args, self.outputs.kwargs
        if wrt is None:
            for i, leaf in enumerate(self.leaves):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    return i
            raise RequestError(
                "no input is floating-point, so there is nothing to differentiate by: give a "
                "language model inputs_embeds= in place of its tokens (a Propagation probe does "
                "without with inputs=0)."
            )
        chosen = kwargs.get(wrt) if isinstance(wrt, str) else dict(enumerate(args)).get(wrt)
        if not isinstance(chosen, Tensor) or not chosen.is_floating_point():
            raise RequestError(
                f"wrt={wrt!r} is not a floating-point tensor among the inputs: name one of "
                f"{[*range(len(args)), *kwargs]}."
            )
        return next(i for i, leaf in enumerate(self.leaves) if leaf is chosen)

    def dense(self) -> Iterator[Tensor]:
        """Yield the Jacobians, (rows, o, d), a block of inputs at a time."""
        each = max(1, self.o * self.d, min(self.o, self.d) * 4096) * self.x.element_size()
        rows = max(1, _MEMORY // each)
        for start in range(0, self.n, rows):
            yield self._jacobians(slice(start, start + rows))

    def _jacobians(self, rows: slice) -> Tensor:
        taken = [leaf[rows] if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        varying = {i: t for i, t in enumerate(taken) if isinstance(t, Tensor)}

        def one(x: Tensor, others: dict[int, Tensor]) -> Tensor:
            filled = [others.get(i, leaf) for i, leaf in enumerate(taken)]
            filled[self.at] = x
            return self.outputs.one(self.weights, *pytree.tree_unflatten(filled, self.structure))

        x = varying.pop(self.at)
        reverse = torch.func.vmap(torch.func.jacrev(one))
        forward = torch.func.vmap(torch.func.jacfwd(one))
        try:
            jacobian = (reverse if self.o <= self.d else forward)(x, varying)
        except (NotImplementedError, RuntimeError):
            jacobian = torch.stack([self._loop(i) for i in range(self.n)[rows]])
        return jacobian.detach().reshape(len(x), self.o, self.d)

    def _loop(self, row: int) -> Tensor:
        """Return one Jacobian by one backward pass an output, for what cannot be vectorised."""
        x, out = self._graph(slice(row, row + 1))
        rows = [differentiate(out[0, a], (x,), keep=True)[0] for a in range(self.o)]
        return torch.stack(rows)

    def _graph(self, rows: slice) -> tuple[Tensor, Tensor]:
        taken = [leaf[rows] if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        x = taken[self.at] = taken[self.at].detach().requires_grad_()
        with torch.enable_grad():
            return x, self.outputs.of(self.weights, *pytree.tree_unflatten(taken, self.structure))

    def products(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return J v, (n, d, k) to (n, o, k), and J^T u, back, through one kept graph."""
        x, out = self._graph(slice(0, self.n))
        u = torch.zeros_like(out, requires_grad=True)
        (pulled,) = differentiate(out, (x,), u, graph=True)

        def forward(v: Tensor) -> Tensor:
            along = v.movedim(2, 0).reshape(-1, *x.shape)
            return differentiate(pulled, (u,), along, keep=True, batched=True)[0].movedim(0, 2)

        def back(w: Tensor) -> Tensor:
            along = w.movedim(2, 0).contiguous()
            (found,) = differentiate(out, (x,), along, keep=True, batched=True)
            return found.flatten(2).movedim(0, 2)

        return forward, back


def _largest(function: _InputFunction, k: int, tol: float, seed: int) -> Tensor:
    """Return the k largest singular values of all Jacobians, by block Krylov iteration."""
    forward, back = function.products()
    generator = torch.Generator(function.x.device).manual_seed(seed)

    def random() -> Tensor:
        return torch.randn(
            function.n, function.d, k,
            generator=generator, dtype=function.x.dtype, device=function.x.device,
        )  # fmt: skip

    block = torch.linalg.qr(random())[0]
    basis, images, values = block, forward(block), torch.zeros(function.n, k).to(function.x)
    while True:
        before, values = values, torch.linalg.svdvals(images)[:, :k]
        settled = (values - before).abs() <= tol * values[:, :1]
        if settled.all() or basis.shape[2] + k > min(function.o, function.d):
            break
        block = _new_directions(back(images[:, :, -k:]), basis, random())
        basis, images = torch.cat([basis, block], 2), torch.cat([images, forward(block)], 2)
    if not settled.all():  # the space is nearly spent: take the Jacobians whole
        return torch.cat([torch.linalg.svdvals(block) for block in function.dense()])[:, :k]
    return values


def _new_directions(block: Tensor, basis: Tensor, random: Tensor) -> Tensor:
    """Orthonormalise against the basis; spent directions are replaced by random ones."""
    size = block.norm(dim=1, keepdim=True)
    for _ in range(2):
        block = block - basis @ (basis.mT @ block)
    spent = block.norm(dim=1, keepdim=True) <= 1e3 * torch.finfo(block.dtype).eps * size
    block, triangle = torch.linalg.qr(torch.where(spent, random, block))
    pivots = triangle.diagonal(dim1=1, dim2=2).abs()
    weak = (pivots <= 1e3 * torch.finfo(block.dtype).eps * pivots.amax(1, True))[:, None]
    block = torch.where(weak, random, block)
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
    return block


def weights_in_order(model: nn.Module | Sequence[Tensor]) -> list[Tensor]:
    """Return the weight matrices W^1 .. W^n of a stack of linear layers, input to output.

    ``model`` is a sequence of matrices, or a module whose ``nn.Linear`` layers are taken in the
    order of definition. Raises :class:`RequestError` where there is none or they do not chain.

    >>> [tuple(w.shape) for w in weights_in_order(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))]
    [(3, 4), (2, 3)]
    """
    if isinstance(model, nn.Module):
        weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    else:
        weights = [torch.as_tensor(w).detach() for w in model]
    if not weights:
        raise RequestError("the model has no nn.Linear layer: give its weight matrices in order.")
    if any(w.dim() != 2 for w in weights):
        raise RequestError("the weights must be matrices, (out, in) each: reshape them.")
    for i, (w, following) in enumerate(itertools.pairwise(weights)):
        if w.shape[0] != following.shape[1]:
            raise RequestError(
                f"weights {i} and {i + 1} of shapes {tuple(w.shape)} and {tuple(following.shape)} "
                "do not chain: give the matrices of one stack, input to output."
            )
    return weights


def product_spectrum(model: nn.Module | Sequence[Tensor]) -> Tensor:
    r"""Return the singular values of the product :math:`W^n \cdots W^1`, largest first, float64.

    All of them to high *relative* accuracy, however many orders of magnitude they span: those of a
    deep Gaussian stack spread exponentially with depth, and in the plain product everything below
    1e-16 of the largest is rounding. Here the product is brought to a graded triangle by QR
    decompositions factor by factor (Stewart 1997), whose singular values one-sided Jacobi rotations
    then find (LAPACK's ``dgejsv``; Drmac and Veselic 2008).

    >>> product_spectrum([torch.diag(torch.tensor([1e-9, 1.0]).double())] * 4)
    tensor([1.0000e+00, 1.0000e-36], dtype=torch.float64)
    """
    weights = [w.to("cpu", torch.float64).numpy() for w in weights_in_order(model)]
    if not all(np.isfinite(w).all() for w in weights):
        raise RequestError("the weights hold a value that is not finite: check the training.")
    back = [w.T for w in reversed(weights)]
    _, q = _sweep(weights, np.eye(weights[0].shape[1]))
    for _ in range(2):  # sweeps to and fro sort the triangle and shrink what is off its diagonal
        triangle, q = _sweep(back, q)
        triangle, q = _sweep(weights, q)
    scaled, _, _, work, _, failed = lapack.dgejsv(triangle, joba=3, jobu=3, jobv=3, jobr=0)
    if failed:
        raise RequestError(f"LAPACK's dgejsv did not converge (info {failed}): check the weights.")
    values = np.zeros(min(weights[0].shape[1], len(weights[-1])))
    values[: len(scaled)] = np.sort(scaled * (work[0] / work[1]))[::-1]
    return torch.from_numpy(values)


def _sweep(factors: Sequence[np.ndarray], q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return T and Q' with product of the factors times Q = Q' T, T a product of triangles."""
    product = np.eye(q.shape[1])
    for factor in factors:
        q, triangle = np.linalg.qr(factor @ q)
        product = triangle @ product
    return product, q


def conserved(model: nn.Module | Sequence[Tensor]) -> list[Tensor]:
    r"""Return what gradient flow conserves in a stack of linear layers, a matrix for each pair.

    .. math:: C_l = W^{l+1\top} W^{l+1} - W^l W^{l\top}

    It is constant for any data and loss, and drifts at the order of the learning rate under
    gradient descent; zero means balanced layers. With ReLU or leaky ReLU between the layers (no
    biases) only its diagonal is conserved (Du et al. 2018, arXiv 1806.00900).

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    >>> conserved([b, a])
    [tensor([[-8.,  2.],
            [ 2.,  4.]])]
    """
    weights = weights_in_order(model)
    return [v.mT @ v - w @ w.mT for w, v in itertools.pairwise(weights)]


@dataclass(frozen=True)
class LayerMoments:
    r"""What one layer puts out, and the gradient that comes back to it.

    Means over inputs and units: ``mean`` of the output h, ``forward`` of :math:`h^2`, ``backward``
    of :math:`(\partial L/\partial h)^2` (``nan`` where no gradient arrives), and ``zeros``, the
    share of outputs that are exactly zero (ReLU units that are off).
    """

    layer: str
    kind: str
    mean: float
    forward: float
    backward: float
    zeros: float


def layer_moments(
    model: nn.Module,
    loss: Loss,
    *batches: Any,
    layers: Layers | None = None,
    dtype: torch.dtype | None = None,
) -> list[LayerMoments]:
    """Return the second moments of every layer's output and gradient, in the order of the calls.

    One forward and one backward pass for each batch; several batches are averaged. A layer that
    is called several times has a row for each call, ``name``, ``name#2`` and so on.

    Args:
        model, loss, batches, dtype: As for :class:`pantarhei.probes.Objective`.
        layers: ``layers(name, module)`` says which; default all without modules inside.

    Raises:
        RequestError: When no layer is heard, or not the same ones for every batch.

    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    >>> _ = nn.init.eye_(net[0].weight)
    >>> x = torch.tensor([[2.0, -2.0]])
    >>> for row in layer_moments(net, lambda m, b: m(b).sum(), x):
    ...     print(row.layer, row.kind, row.forward, row.backward, row.zeros)
    0 Linear 4.0 0.5 0.0
    1 ReLU 2.0 1.0 0.5
    """
    objective = Objective(model, loss, *batches, dtype=dtype)
    heard = [_moments(objective, batch, layers or _leaf) for batch in objective.batches]
    calls = [[(name, kind) for name, kind, _ in rows] for rows in heard]
    if not calls[0] or any(call != calls[0] for call in calls):
        raise RequestError(
            "the batches do not all go through the same layers, or through none that was asked "
            "for: give one batch at a time, or choose others with layers=."
        )
    values = torch.stack([torch.stack([row for _, _, row in rows]) for rows in heard]).mean(0)
    return [
        LayerMoments(name, kind, *row)
        for (name, kind), row in zip(calls[0], values.tolist(), strict=True)
    ]


def _moments(objective: Objective, batch: Any, layers: Layers) -> list[tuple[str, str, Tensor]]:
    rows: list[tuple[str, str, Tensor]] = []
    heard: list[nn.Module] = []

    def hear(name: str, module: nn.Module, output: Tensor) -> None:
        h = output.detach()
        moments = (h.mean(), h.square().mean(), h.mean() * math.nan, (h == 0).to(h).mean())
        row = torch.stack(moments)
        again = sum(module is before for before in heard)
        heard.append(module)
        rows.append((f"{name}#{again + 1}" if again else name, type(module).__name__, row))

        def back(gradient: Tensor) -> None:
            row[2] = gradient.detach().square().mean()

        if output.requires_grad:  # a tensor's hook sees the gradient even if ReLU works in place
            output.register_hook(back)

    leaves = objective.leaves()
    with listening(objective.model, layers, hear):
        value = objective.evaluate(leaves, batch)
    differentiate(value, leaves.values())
    return rows


@dataclass(frozen=True)
class Correlation:
    r"""How alike two inputs are after each layer, and a fit of the decay.

    ``layers`` and ``correlation`` have one entry for each layer; the fit is
    :math:`c_l = c_* + A\, e^{-l/\xi}` with ``length`` :math:`\xi` in layers, ``limit``
    :math:`c_*` and ``error`` the root of the mean squared deviation. ``length`` is infinite where
    no decay shows within twenty times the depth: at criticality there is no such length.
    """

    layers: tuple[str, ...]
    correlation: Tensor
    length: float
    limit: float
    error: float


def correlation_length(
    model: nn.Module,
    inputs: Any,
    others: Any,
    *,
    layers: Layers | None = None,
    limit: float | None = None,
    skip: int = 0,
    read: Read | None = None,
    dtype: torch.dtype | None = None,
) -> Correlation:
    r"""Follow pairs of inputs through the depth of a network and fit the length of the decay.

    .. math:: c_l = \Big\langle \frac{h_l(x)\cdot h_l(x')}{|h_l(x)|\,|h_l(x')|} \Big\rangle,
              \qquad c_l \approx c_* + A\, e^{-l/\xi}

    The mean is over the pairs. For a wide random network :math:`\xi = -1/\ln\chi_\perp`
    (Schoenholz et al. 2017) in the ordered phase: signals deeper than a few :math:`\xi` no longer
    tell the inputs apart, and such a network does not train.

    Args:
        model, inputs, read, dtype: As for :func:`input_jacobian`.
        others: As many inputs, each the partner of one.
        layers: ``layers(name, module)`` says which outputs; default those of linear layers and
            convolutions (the preactivations).
        limit: Hold :math:`c_*` at this value (1 in the ordered phase) rather than fit it.
        skip: Leave out this many first layers, where the size of the signal still settles.

    Raises:
        RequestError: With fewer than four layers to fit, or a signal that is zero or not finite.

    >>> net = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    >>> _ = [nn.init.orthogonal_(layer.weight) for layer in net]
    >>> correlation_length(net, torch.randn(3, 8), torch.randn(3, 8), dtype=torch.float64).length
    inf
    """
    signals = []
    for side in (inputs, others):
        outputs = Outputs(model, side, read=read, dtype=dtype, weights=False)
        signals.append(_signals(outputs, layers or _affine))
    if [name for name, _ in signals[0]] != [name for name, _ in signals[1]]:
        raise RequestError("the two sets of inputs go through different layers: compare like ones.")
    names = tuple(name for name, _ in signals[0])[skip:]
    if len(names) < 4:
        raise RequestError(
            f"{len(names)} layers are too few to fit a decay: choose at least four with layers=."
        )
    pairs = list(zip(*signals, strict=True))[skip:]
    if any(a.shape != b.shape for (_, a), (_, b) in pairs):
        raise RequestError("inputs and others differ in shape: give each input one partner.")
    cosines = [torch.cosine_similarity(a, b, dim=1, eps=0.0).mean() for (_, a), (_, b) in pairs]
    correlation = torch.stack(cosines)
    if not correlation.isfinite().all():
        raise RequestError(
            "a layer's signal is zero or not finite, and has no direction: see layer_moments."
        )
    return Correlation(names, correlation, *_decay(correlation.double().cpu().numpy(), limit))


def _signals(outputs: Outputs, layers: Layers) -> list[tuple[str, Tensor]]:
    heard: list[tuple[str, Tensor]] = []

    def hear(name: str, module: nn.Module, output: Tensor) -> None:
        if len(output) == outputs.n:
            heard.append((name, output.detach().flatten(1).clone()))

    with torch.no_grad(), listening(outputs.model, layers, hear):
        outputs(outputs.objective.params)
    return [(name.removeprefix("model."), h) for name, h in heard]


def _decay(c: np.ndarray, limit: float | None) -> tuple[float, float, float]:
    """Fit c_l = limit + A exp(-l/length): the two linear unknowns are solved for each length."""
    depth = np.arange(len(c), dtype=float)

    def solved(log_length: float) -> tuple[float, float]:
        decay = np.exp(-depth * math.exp(-log_length))
        if limit is not None:
            amplitude = decay @ (c - limit) / (decay @ decay)
            return float(np.sqrt(np.mean((c - limit - amplitude * decay) ** 2))), limit
        columns = np.stack([np.ones_like(decay), decay], 1)
        found = np.linalg.lstsq(columns, c, rcond=None)[0]
        return float(np.sqrt(np.mean((c - columns @ found) ** 2))), float(found[0])

    longest = math.log(20 * len(c))
    grid = np.linspace(math.log(0.1), longest, 200)
    errors = [solved(x)[0] for x in grid]
    best = int(np.argmin(errors))
    flat = float(np.ptp(c)) <= 1e-9 + 10 * max(errors[best], 1e-12)
    if flat or best == len(grid) - 1:
        return math.inf, float(c.mean()) if flat else solved(longest)[1], errors[best]
    low, high = grid[max(0, best - 1)], grid[best + 1]
    found = minimize_scalar(
        lambda x: solved(x)[0], bounds=(low, high), method="bounded", options={"xatol": 1e-10}
    )
    error, settled = solved(found.x)
    return math.exp(found.x), settled, error


@contextmanager
def listening(
    model: nn.Module, layers: Layers, hear: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Call ``hear(name, module, output)`` whenever a chosen module has put out real numbers."""
    handles = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def heard(module: nn.Module, args: Any, output: Any) -> None:
            found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
            if found and found[0].is_floating_point():
                hear(name, module, found[0])

        return heard

    for name, module in model.named_modules():
        if layers(name, module):
            handles.append(module.register_forward_hook(hook(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _leaf(name: str, module: nn.Module) -> bool:
    return next(module.children(), None) is None


def weighted_or_active(name: str, module: nn.Module) -> bool:
    """Return whether a module without modules inside has weights or is an activation."""
    own = next(module.parameters(recurse=False), None) is not None
    return _leaf(name, module) and (own or type(module).__module__ == nn.ReLU.__module__)


def _affine(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
