r"""The empirical neural tangent kernel: which inputs learn together.

Under gradient flow with learning rates :math:`\lambda_\mu` the outputs of any network move as
:math:`\dot f_a(x) = -\sum_{j,b} \Theta_{ab}(x, x_j)\, \partial L/\partial f_b(x_j)`, with

.. math:: \Theta_{ab}(x, x') = \sum_\mu \lambda_\mu\,
          \frac{\partial f_a(x)}{\partial\theta_\mu}\,\frac{\partial f_b(x')}{\partial\theta_\mu}

(Jacot et al. 2018, arXiv 1806.07572; with a learning rate for each weight as in Roberts and Yaida
2022, arXiv 2106.10165). In a very wide network it stays what it was; how much it moves is a measure
of feature learning. Its largest eigenvalue, divided by n, is that of the Gauss-Newton matrix of the
mean squared error, and bounds the learning rate.

:func:`ntk` gives the kernel whole, :class:`TangentKernel` its products with vectors, for its top
eigenvalues (:mod:`pantarhei.probes.eigen`) where it would not fit. :func:`differential` is the
kernel's own velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pantarhei.errors import RequestError, nearest
from pantarhei.probes._jacobian_factors import DIAGONAL, FULL, TRACE, Backprop, Dense, Factor, weigh
from pantarhei.probes._objective import differentiate
from pantarhei.probes._outputs import Outputs, Read
from pantarhei.probes.curvature import Operator, learning_rates

GivenRates = (
    Mapping[str, "float | Tensor"]
    | Callable[[str, nn.Parameter], "float | Tensor"]
    | Optimizer
    | Tensor
    | float
)
Kind = Literal["full", "diagonal", "trace", "pseudo"]
Parameters = Callable[[str, nn.Parameter], bool]


def ntk(
    model: nn.Module,
    inputs: Any,
    others: Any = None,
    *,
    kind: Kind | int = "full",
    rates: GivenRates | None = None,
    parameters: Parameters | None = None,
    read: Read | None = None,
    dtype: torch.dtype | None = None,
    method: Literal["layers", "contraction", "products"] = "layers",
    memory: int = 2**30,
) -> Tensor:
    r"""Return the tangent kernel of a model on n inputs, or between n and m.

    ============ ============================================================== ============
    ``kind``     is                                                             shape
    ============ ============================================================== ============
    ``full``     :math:`\Theta_{ab}(x_i, x_j)`                                  (n, m, o, o)
    ``diagonal`` :math:`\Theta_{aa}(x_i, x_j)`, by output                       (n, m, o)
    ``trace``    :math:`\frac1o\sum_a \Theta_{aa}(x_i, x_j)`                    (n, m)
    ``pseudo``   :math:`\frac1o\sum_{ab} \Theta_{ab}(x_i, x_j)`: the kernel of  (n, m)
                 the sum of the outputs, at the price of one output
                 (Mohamadi et al. 2023, arXiv 2206.12543)
    an integer   :math:`\Theta_{aa}(x_i, x_j)` of that output alone             (n, m)
    ============ ============================================================== ============

    Args:
        model: Any module, measured in evaluation mode, each input by itself.
        inputs: What the model is called with, n rows: a tensor, a tuple of arguments or a dict of
            keyword arguments.
        others: The same, m rows; default the inputs again.
        rates: The learning-rate tensor :math:`\lambda_\mu`, default 1: a number, a dict of numbers
            or tensors by the names of parameters, a function of name and parameter, one flat vector
            in the order of the parameters, or the optimizer whose rates they are.
        parameters: ``parameters(name, parameter)`` says which trainable weights count; default all.
        read: Picks the outputs from what the model returns; default that tensor, or its ``logits``.
        dtype: Work on copies in this precision.
        method: ``"layers"``: one backward pass for each output, and the layers' own structure
            (:mod:`pantarhei.probes._jacobian_factors`); what no layer explains, or what differs
            from plain autograd on the first input, is contracted. The fastest wherever most weights
            are in linear layers, convolutions and embeddings. ``"contraction"``: the Jacobian of
            each input and a matrix product; fastest for few weights outside of such layers.
            ``"products"``: Theta times unit vectors; the slowest but for very many weights and few
            outputs, and the least in memory: no Jacobian is held.
        memory: Bytes that the Jacobians' factors may take at a time; more inputs go in blocks, at
            the price of computing factors again.

    Raises:
        RequestError: For inputs that the model does not take, rates that do not fit the parameters,
            an output that is not there, and what :class:`Objective` refuses.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> ntk(nn.Linear(2, 3, bias=False), x, kind="trace")
    tensor([[5., 2.],
            [2., 1.]])
    >>> ntk(nn.Linear(2, 3), x, x[:1], kind=0, rates={"weight": 0.5, "bias": 1.0})
    tensor([[3.5000],
            [2.0000]])
    """
    sides = [
        Outputs(model, side, read=read, parameters=parameters, dtype=dtype)
        for side in ((inputs,) if others is None else (inputs, others))
    ]
    if sides[0].o != sides[-1].o:
        raise RequestError(
            f"the two sets of inputs give {sides[0].o} and {sides[-1].o} outputs: use like ones."
        )
    if memory < 1:
        raise RequestError(f"memory={memory}: give a number of bytes.")
    pulled, pairs = _pulled(sides[0], kind)
    spread = _rates(rates, sides[0])
    if method == "products":
        return _by_products(sides, spread, pulled, pairs)
    if method not in ("layers", "contraction"):
        raise RequestError(
            f"method={method!r} is not known: choose layers, contraction or products."
            f"{nearest(str(method), ('layers', 'contraction', 'products'))}"
        )
    rows = [_Rows(side, spread, pulled, method == "layers") for side in sides]
    return _blockwise(rows, pairs, memory)


def _pulled(outputs: Outputs, kind: Kind | int) -> tuple[Tensor, str]:
    """Return the combinations of outputs to pull back, (c, o), and which pairs of them to take."""
    like = next(iter(outputs.objective.params.values()))
    o, unit = outputs.o, torch.eye(outputs.o, dtype=outputs.objective.dtype, device=like.device)
    if isinstance(kind, int) and not isinstance(kind, bool):
        if not 0 <= kind < o:
            raise RequestError(f"kind={kind} asks for one of {o} outputs: choose 0 to {o - 1}.")
        return unit[kind : kind + 1], TRACE
    if kind == "pseudo":
        return unit.sum(0, keepdim=True) / o**0.5, TRACE
    if kind not in (FULL, DIAGONAL, TRACE):
        raise RequestError(
            f"kind={kind!r} is not known: choose full, diagonal, trace, pseudo or the number of an "
            f"output.{nearest(str(kind), (FULL, DIAGONAL, TRACE, 'pseudo'))}"
        )
    return unit, kind


def _rates(given: GivenRates | None, outputs: Outputs) -> dict[str, float | Tensor]:
    """Return a learning rate for every parameter: a number, or a tensor of its shape."""
    objective = outputs.objective
    if given is None or isinstance(given, int | float):
        found: dict[str, Any] = dict.fromkeys(objective.names, 1.0 if given is None else given)
    elif isinstance(given, Optimizer):
        found = objective.unflatten(learning_rates(objective, given))
    elif isinstance(given, Tensor):
        found = objective.unflatten(given)
    elif isinstance(given, Mapping):
        found = dict(given)
    else:
        found = {name: given(name, p) for name, p in objective.parameters.items()}
    for name in {*found} ^ {*objective.names}:
        what = "is no weight that counts" if name in found else "has no rate, and 0 leaves one out"
        raise RequestError(f"rates: '{name}' {what}.{nearest(name, objective.names)}")
    return {name: _rate(name, found[name], objective.params[name]) for name in objective.names}


def _rate(name: str, given: Any, weight: Tensor) -> float | Tensor:
    rate = torch.as_tensor(given, dtype=weight.dtype, device=weight.device).detach()
    if rate.dim() and rate.shape != weight.shape:
        raise RequestError(
            f"rates: '{name}' of shape {tuple(weight.shape)} has rates of shape "
            f"{tuple(rate.shape)}: give a number or the same shape."
        )
    if not (rate.isfinite().all() and (rate >= 0).all()):
        raise RequestError(f"rates: those of '{name}' must be finite and not negative.")
    return float(rate.flatten()[0]) if rate.min() == rate.max() else rate


class _Rows:
    """The Jacobian's rows of a set of inputs, a block at a time."""

    def __init__(
        self, outputs: Outputs, rates: Mapping[str, float | Tensor], pulled: Tensor, layers: bool
    ):
        self.outputs, self.pulled, self.n = outputs, pulled, outputs.n
        self.rates = {name: r for name, r in rates.items() if isinstance(r, Tensor) or r > 0}
        self.backprop = Backprop(outputs, self.rates if layers else {}, self.rates, pulled)
        held = self._check() if self.backprop.served else 0
        rest = self.rates.keys() - self.backprop.served
        contracted = sum(outputs.objective.params[name].numel() for name in rest)
        self.bytes = (held + 2 * len(pulled) * contracted) * pulled.element_size()  # of one input

    def _check(self) -> int:
        """Keep of the layers what agrees with plain autograd on the first input, taken alone.

        A weight that is used elsewhere too, or outputs that depend on the other inputs of a batch,
        show here, the cotangent being random. Returns the elements that one input will take.
        """
        names, pair = sorted(self.backprop.served), self.outputs.first_two()
        like = self.pulled
        generator = torch.Generator(like.device).manual_seed(0)
        cotangent = torch.randn(like.shape[1], generator=generator, device=like.device).to(like)
        probe = Backprop(pair, names, dict.fromkeys(names, 1.0), cotangent[None])
        factors = probe.factors(slice(0, 2))
        leaves = self.outputs.objective.leaves()
        with torch.enable_grad():
            output = self.outputs(leaves, slice(0, 1))
        gradients = differentiate(output[0], [leaves[name] for name in names], cotangent)
        whole = float(torch.stack([g.norm() for g in gradients]).norm())
        tolerance = torch.finfo(like.dtype).eps ** 0.6  # 7e-5 in float32, 4e-10 in float64
        wrong = set()
        for name, gradient in zip(names, gradients, strict=True):
            error = torch.tensor(torch.inf)
            if name in factors:
                error = (factors[name].dense().rows[0, 0] - gradient.flatten()).norm()
            if not error <= tolerance * (gradient.norm() + 1e-3 * whole):
                wrong.add(name)
        self.backprop.without(wrong)
        kept = [f for name, f in factors.items() if name not in wrong]
        formed = max((f.dense().rows[0].numel() for f in kept), default=0)
        return len(like) * formed + sum(f.elements(len(like)) for f in kept) // 2

    def factors(self, rows: slice) -> dict[str, Factor]:
        """Return the factors of these rows, by weight; what no output depends on is left out."""
        found = self.backprop.factors(rows) if self.backprop.served else {}
        missing = [name for name in self.rates if name not in found]
        return found | self._contracted(rows, missing) if missing else found

    def _contracted(self, rows: slice, names: list[str]) -> dict[str, Factor]:
        """Return the Jacobian's rows of what no layer explains, each input by itself."""
        objective = self.outputs.objective
        leaves = objective.leaves()
        with torch.enable_grad():
            output = self.outputs(leaves, rows)
        if not output.requires_grad:
            return {}
        by = [leaves[name] for name in names]
        touched = torch.autograd.grad(output.sum(), by, allow_unused=True)
        names = [name for name, g in zip(names, touched, strict=True) if g is not None]
        if not names:
            return {}
        weights = {name: objective.params[name] for name in names}

        def one(own: dict[str, Tensor], call: tuple[Any, Any]) -> Tensor:
            return self.pulled @ self.outputs.one({**objective.params, **own}, *call)

        call = self.outputs.take(rows)
        axes = pytree.tree_map(lambda t: 0 if isinstance(t, Tensor) else None, call)
        try:
            jacobians = torch.func.vmap(torch.func.jacrev(one), (None, axes))(weights, call)
        except (RuntimeError, NotImplementedError):  # what cannot be vectorised
            jacobians = self._loop(names, rows)
        return {
            name: Dense(weigh(j.detach(), self.rates[name]).flatten(2))
            for name, j in jacobians.items()
        }

    def _loop(self, names: list[str], rows: slice) -> dict[str, Tensor]:
        """Return the rows by one backward pass for each input and output."""
        objective, found = self.outputs.objective, []
        for i in range(self.n)[rows]:
            leaves = objective.leaves()
            with torch.enable_grad():
                output = self.pulled @ self.outputs(leaves, slice(i, i + 1))[0]
            by = [leaves[name] for name in names]
            found.append([differentiate(out, by, keep=True) for out in output])
        return {
            name: torch.stack([torch.stack([g[k] for g in of_input]) for of_input in found])
            for k, name in enumerate(names)
        }


def _blockwise(sides: list[_Rows], pairs: str, memory: int) -> Tensor:
    """Return the kernel from blocks of rows whose factors fit the memory.

    A large block of rows is held while small ones of columns pass by.
    """
    left, right = sides[0], sides[-1]
    n, m, c = left.n, right.n, len(left.pulled)
    room = memory // (max(side.bytes for side in sides) + 1)
    all_fit = room >= (n if left is right else n + m)
    tall, narrow = (n, m) if all_fit else (max(1, 3 * room // 4), max(1, room // 4))
    shape = {FULL: (n, c, m, c), DIAGONAL: (c, n, m), TRACE: (n, m)}[pairs]
    kernel = left.pulled.new_zeros(shape)

    def at(rows: slice, columns: slice) -> tuple[Any, ...]:
        return (rows, slice(None), columns) if pairs == FULL else (..., rows, columns)

    def place(rows: slice, columns: slice, block: Tensor | None) -> None:
        if block is None:  # no weight that counts reaches these outputs
            return
        kernel[at(rows, columns)] = block
        if left is right and rows != columns:
            mirrored = block.permute(2, 3, 0, 1) if pairs == FULL else block.mT
            kernel[at(columns, rows)] = mirrored

    for i in range(0, n, tall):
        rows = slice(i, min(i + tall, n))
        factors = left.factors(rows)
        if left is right:
            place(rows, rows, _dot(factors, factors, pairs))
        for j in range(rows.stop if left is right else 0, m, narrow):
            columns = slice(j, min(j + narrow, m))
            place(rows, columns, _dot(factors, right.factors(columns), pairs))
    return _finished(kernel, pairs, c)


def _dot(one: dict[str, Factor], other: dict[str, Factor], pairs: str) -> Tensor | None:
    total: Tensor | None = None
    for name in [name for name in one if name in other]:
        x, y = one[name], other[name]
        if isinstance(x, Dense) or isinstance(y, Dense):
            product = x.dense().dot(y.dense(), pairs)
        else:
            product = x.dot(y, pairs)
        total = product if total is None else total.add_(product)
    return total


def _finished(kernel: Tensor, pairs: str, c: int) -> Tensor:
    if pairs == FULL:
        return kernel.transpose(1, 2)
    return kernel.permute(1, 2, 0) if pairs == DIAGONAL else kernel / c


class _Graph:
    """One pass of the model, kept: products with the Jacobian J and with its transpose.

    J v is taken in reverse mode twice, as the derivative of J^T u (linear in u) along v.
    """

    def __init__(self, outputs: Outputs, rows: slice):
        self.objective = outputs.objective
        self.leaves = tuple((named := self.objective.leaves()).values())
        with torch.enable_grad():
            self.output = outputs(named, rows)
        self.u = torch.zeros_like(self.output, requires_grad=True)
        self.pulled = differentiate(self.output, self.leaves, self.u, graph=True)
        self.live = [i for i, p in enumerate(self.pulled) if p.requires_grad]

    def pull(self, cotangents: Tensor) -> Tensor:
        """Return J^T u: (k, size) from (k, rows, o)."""
        found = differentiate(self.output, self.leaves, cotangents, keep=True, batched=True)
        return self.objective.join(found, batched=True)

    def push(self, vectors: Tensor) -> Tensor:
        """Return J v: (k, rows, o) from (k, size)."""
        parts = self.objective.cut(vectors)
        return differentiate(
            tuple(self.pulled[i] for i in self.live),
            (self.u,),
            tuple(parts[i] for i in self.live),
            keep=True,
            batched=True,
        )[0]


def _flat_rates(rates: Mapping[str, float | Tensor], outputs: Outputs) -> Tensor:
    objective = outputs.objective
    return objective.flatten(
        {
            name: torch.as_tensor(rates[name], dtype=p.dtype, device=p.device).expand_as(p)
            for name, p in objective.params.items()
        }
    )


def _by_products(
    sides: list[Outputs], rates: Mapping[str, float | Tensor], pulled: Tensor, pairs: str
) -> Tensor:
    """Return the kernel from its products with unit vectors."""
    left, right = sides[0], sides[-1]
    spread, graph, columns = _flat_rates(rates, left), _Graph(left, slice(0, left.n)), []
    for j in range(right.n):
        cotangents = pulled[:, None]  # (c, 1, o)
        pushed = graph.push(spread * _Graph(right, slice(j, j + 1)).pull(cotangents))
        products = torch.einsum("bio,ao->aib", pushed, pulled)  # (c, n, c)
        if pairs != FULL:
            products = products.diagonal(dim1=0, dim2=2)  # (n, c)
        columns.append(products.sum(-1) if pairs == TRACE else products)
    if pairs == FULL:
        return torch.stack(columns, 2).permute(1, 2, 0, 3)  # from (a, i, j, b)
    kernel = torch.stack(columns, 1)
    return kernel / len(pulled) if pairs == TRACE else kernel


class TangentKernel(Operator):
    r"""The tangent kernel as a matrix known by its products, of size n times o.

    .. math:: \Theta v = J \Lambda J^\top v, \qquad \Lambda = \mathrm{diag}(\lambda_\mu)

    Row :math:`i\,o + a` is output a of input i. A product is one backward pass and one pass of
    derivatives forward, whatever the number of weights, and no Jacobian is held: this is the way to
    the top eigenvalues of many inputs.

    Args:
        model, inputs, rates, parameters, read, dtype: As for :func:`ntk`. The batch goes through
            the model together: its outputs must not depend on each other.
        block: Vectors that go through the graph in one pass.
        rows: Inputs whose graph is held at a time; default all. Fewer take less memory, and one
            more forward and backward pass for each block of vectors.

    >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    >>> kernel = TangentKernel(nn.Linear(2, 1, bias=False), x)
    >>> kernel @ torch.tensor([1.0, 0.0]), kernel.products
    (tensor([5., 2.]), 1)
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        rates: GivenRates | None = None,
        parameters: Parameters | None = None,
        read: Read | None = None,
        dtype: torch.dtype | None = None,
        block: int = 8,
        rows: int | None = None,
    ):
        if block < 1 or (rows is not None and rows < 1):
            raise RequestError(f"block={block} and rows={rows}: choose at least 1.")
        self.outputs = Outputs(model, inputs, read=read, parameters=parameters, dtype=dtype)
        objective = self.outputs.objective
        self.rates = _flat_rates(_rates(rates, self.outputs), self.outputs)
        self._block, step = block, rows or self.outputs.n
        self._slices = [slice(i, i + step) for i in range(0, self.outputs.n, step)]
        self._kept: list[_Graph] = []
        size = self.outputs.n * self.outputs.o
        super().__init__(self._product, size, dtype=objective.dtype, device=objective.device)

    def _product(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 1:
            return self._product(vectors[None])[0]
        if len(vectors) > self._block:
            return torch.cat([self._product(part) for part in vectors.split(self._block)])
        cotangents = vectors.view(len(vectors), self.outputs.n, self.outputs.o)
        pulled = sum(graph.pull(cotangents[:, rows]) for rows, graph in self._graphs())
        pushed = [graph.push(self.rates * pulled) for _, graph in self._graphs()]
        return torch.cat(pushed, 1).flatten(1)

    def _graphs(self) -> Iterator[tuple[slice, _Graph]]:
        if len(self._slices) > 1:
            yield from ((rows, _Graph(self.outputs, rows)) for rows in self._slices)
            return
        if not self._kept:
            self._kept = [_Graph(self.outputs, self._slices[0])]
        yield self._slices[0], self._kept[0]


def matrix(kernel: Tensor) -> Tensor:
    """Return a kernel (n, m, o, o) as a matrix (n o, m o); one of another shape as it is.

    >>> matrix(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([8, 12])
    """
    if kernel.dim() != 4:
        return kernel
    n, m, a, b = kernel.shape
    return kernel.transpose(1, 2).reshape(n * a, m * b)


def eigenvalues(kernel: Tensor) -> Tensor:
    """Return the eigenvalues of a kernel, largest first.

    (n o,) from (n, n, o, o), (n,) from (n, n); for a kernel by output, (n, n, o), those of each
    output: (o, n).

    >>> eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    tensor([3., 1.])
    """
    square = kernel.permute(2, 0, 1) if kernel.dim() == 3 else matrix(kernel)
    _check_square(square)
    return torch.linalg.eigvalsh(square).flip(-1)


def drift(kernel: Tensor, start: Tensor) -> Tensor:
    r"""Return how far a kernel moved, :math:`\|\Theta_t - \Theta_0\|_F / \|\Theta_0\|_F`.

    It grows with the kernel's size as well as with its shape; :func:`kernel_distance` is about its
    shape alone.

    >>> drift(torch.eye(2) * 3, torch.eye(2))
    tensor(2.)
    """
    _check_alike(kernel, start)
    _check_norm(start)
    return (kernel - start).norm() / start.norm()


def kernel_distance(kernel: Tensor, start: Tensor, *, centred: bool = False) -> Tensor:
    r"""Return :math:`1 - \langle K, K_0\rangle_F / (\|K\|_F \|K_0\|_F)`, in [0, 1] for kernels.

    It does not see a change of scale (Fort et al. 2020, arXiv 2010.15110). ``centred`` takes out
    the mean over the inputs on both sides, :math:`HKH`: what is left tells inputs apart, while the
    kernel of a ReLU network as it stands is mostly one constant.

    >>> kernel_distance(torch.ones(2, 2) * 3, torch.eye(2))
    tensor(0.2929)
    """
    _check_alike(kernel, start)
    for k in (kernel, start):
        _check_norm(k, centred)
    if centred:
        kernel, start = _centred(kernel), _centred(start)
    # half the squared distance of the normalised kernels: the same, without cancellation
    return (kernel / kernel.norm() - start / start.norm()).square().sum() / 2


def alignment(kernel: Tensor, labels: Tensor, *, centred: bool = True) -> Tensor:
    r"""Return how well a kernel is aligned with the labels, from 0 to 1.

    .. math:: A = \frac{\langle K_c, Y_c Y_c^\top\rangle_F}{\|K_c\|_F\, \|Y_c Y_c^\top\|_F},
              \qquad K_c = HKH, \quad H = 1 - \tfrac1n \mathbb{1}\mathbb{1}^\top

    (centred kernel alignment, Cortes et al. 2012). A kernel by pairs of outputs or by output is
    averaged over the outputs first.

    Args:
        kernel: (n, n), (n, n, o) or (n, n, o, o).
        labels: Classes (n,) as integers, or targets (n,) or (n, c).
        centred: Without, K and Y are taken as they are.

    Raises:
        RequestError: For labels that do not fit or are all the same, and a kernel that does not
            vary between inputs.

    >>> labels = torch.tensor([0, 0, 1])
    >>> round(alignment((labels[:, None] == labels).double(), labels).item(), 9)
    1.0
    """
    if kernel.dim() == 4:
        kernel = kernel.diagonal(dim1=2, dim2=3)
    kernel = kernel.mean(2) if kernel.dim() == 3 else kernel
    _check_square(kernel)
    if labels.shape[:1] != kernel.shape[:1] or labels.dim() > 2:
        raise RequestError(
            f"labels of shape {tuple(labels.shape)} do not fit a kernel of {len(kernel)} inputs: "
            "give one label, or one row of targets, for each."
        )
    if labels.dim() == 1 and not labels.is_floating_point():
        labels = torch.nn.functional.one_hot(labels.long().unique(return_inverse=True)[1])
    y = labels.to(kernel).reshape(len(labels), -1)
    _check_norm(kernel, centred)
    if centred:
        kernel, y = _centred(kernel), y - y.mean(0)
    if not y.any():
        raise RequestError("the labels are all the same: there is nothing to align with.")
    return (y * (kernel @ y)).sum() / (kernel.norm() * (y.mT @ y).norm())


def varies(kernel: Tensor) -> bool:
    """Return whether a kernel tells inputs apart: whether more than rounding is left centred.

    >>> varies(torch.ones(3, 3)), varies(torch.eye(3))
    (False, True)
    """
    rounding = 100 * torch.finfo(kernel.dtype).eps
    return bool(_centred(kernel).norm() > rounding * kernel.norm())


def differential(
    model: nn.Module,
    inputs: Any,
    others: Any = None,
    *,
    rates: GivenRates | None = None,
    parameters: Parameters | None = None,
    read: Read | None = None,
    dtype: torch.dtype | None = None,
    block: int = 64,
) -> Tensor:
    r"""Return the differential of the tangent kernel (dNTK), (n, m, m, o, o, o).

    .. math:: \mathrm{d}\Theta_{abc}(x, x', x'') = \sum_{\mu\nu} \lambda_\mu\lambda_\nu
              \frac{\partial^2 f_a(x)}{\partial\theta_\mu\partial\theta_\nu}
              \frac{\partial f_b(x')}{\partial\theta_\mu}
              \frac{\partial f_c(x'')}{\partial\theta_\nu}

    (Roberts and Yaida 2022, chapter 11): the kernel's own velocity. Along a step
    :math:`\theta \leftarrow \theta - \eta\Lambda\nabla L` with output gradients
    :math:`\epsilon_{jc} = \partial L/\partial f_c(x_j)` the kernel changes by
    :math:`-\eta \sum_{jc} \epsilon_{jc}\,[\mathrm{d}\Theta_{abc}(x, x', x_j) +
    \mathrm{d}\Theta_{bac}(x', x, x_j)]`.

    Exact, by a derivative forward of a derivative forward for each pair of outputs and inputs:
    :math:`(mo)^2/2` passes, for small networks. Of ReLU networks it sees the pieces, not the kinks.

    Args:
        model, inputs, rates, parameters, read, dtype: As for :func:`ntk`; ``inputs`` are the x.
        others: The x' and x'', m rows; default the inputs again.
        block: Pairs that are taken in one vectorised pass.

    >>> net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    >>> _ = [nn.init.constant_(w, v) for w, v in zip(net.parameters(), (2.0, 3.0))]
    >>> differential(net, torch.ones(1, 1)).item()  # f = w2 w1: twice w1 w2
    12.0
    """
    outputs = Outputs(model, inputs, read=read, parameters=parameters, dtype=dtype)
    side = outputs
    if others is not None:
        side = Outputs(model, others, read=read, parameters=parameters, dtype=dtype)
    if side.o != outputs.o:
        raise RequestError(f"the two sets give {outputs.o} and {side.o} outputs: use like ones.")
    objective = outputs.objective
    spread = _flat_rates(_rates(rates, outputs), outputs)
    size = side.n * side.o
    unit = torch.eye(size, dtype=objective.dtype, device=objective.device)
    directions = spread * _Graph(side, slice(0, side.n)).pull(unit.view(size, side.n, side.o))
    first, second = torch.tril_indices(size, size, device=objective.device)

    def along(u: Tensor, v: Tensor) -> Tensor:
        def slope(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.jvp(outputs, (weights,), (objective.unflatten(u),))[1]

        return torch.func.jvp(slope, (objective.params,), (objective.unflatten(v),))[1]

    found = torch.func.vmap(along, chunk_size=block)(directions[first], directions[second])
    whole = found.new_zeros(size, size, outputs.n, outputs.o)
    whole[first, second] = whole[second, first] = found
    parts = whole.view(side.n, side.o, side.n, side.o, outputs.n, outputs.o)
    return parts.permute(4, 0, 2, 5, 1, 3)


def _centred(kernel: Tensor) -> Tensor:
    """Return HKH, over the inputs on both sides."""
    columns, rows = kernel.mean(0, keepdim=True), kernel.mean(1, keepdim=True)
    return kernel - columns - rows + columns.mean(1, keepdim=True)


def _check_norm(kernel: Tensor, centred: bool = False) -> None:
    if not kernel.any() or (centred and not varies(kernel)):
        raise RequestError(
            "a kernel is zero or does not vary between inputs, and has no direction to compare: "
            "is the network dead, or are the inputs all the same?"
        )


def _check_square(kernel: Tensor) -> None:
    if kernel.dim() < 2 or kernel.shape[-1] != kernel.shape[-2]:
        raise RequestError(
            f"a kernel of shape {tuple(kernel.shape)} is not one of a set of inputs with itself: "
            "leave others= out."
        )


def _check_alike(kernel: Tensor, start: Tensor) -> None:
    if kernel.shape != start.shape:
        raise RequestError(
            f"kernels of shapes {tuple(kernel.shape)} and {tuple(start.shape)} cannot be compared: "
            "take both on the same inputs and in the same kind."
        )
