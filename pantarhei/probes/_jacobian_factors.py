r"""Rows of the output-weight Jacobian, kept as factors so that their products stay cheap.

The gradient of an output by the weight of a linear layer is a sum of outer products over positions
p (pixels of a convolution, tokens of a sequence; one for a plain layer),

.. math:: \frac{\partial f_a(x_i)}{\partial W} = \sum_p \delta_{iap}\, h_{ip}^\top ,

with the layer's input h and the derivative :math:`\delta` of the output by what the layer puts out.
The scalar product of two such gradients is
:math:`\sum_{pq} (\delta_{iap}\cdot\delta_{jbq})(h_{ip}\cdot h_{jq})`: two small Gram matrices in
place of one product over all weights, and no gradient is ever formed. For many positions forming
it is cheaper again; each layer takes the cheaper way by its count of multiplications.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pantarhei.probes._objective import differentiate
from pantarhei.probes._outputs import Outputs

Rates = Mapping[str, "float | Tensor"]  # learning rate of each weight, by parameter

# Products are made in the layout that the matrix multiplication leaves: (n, c, m, c) for all pairs
# of outputs, (c, n, m) for each output with itself, (n, m) for their sum.
FULL, DIAGONAL, TRACE = "full", "diagonal", "trace"


@dataclass
class Dense:
    """Rows of a Jacobian as they are, (n, c, f)."""

    rows: Tensor

    def dense(self) -> Dense:
        """Return itself."""
        return self

    def elements(self, c: int) -> int:
        """Return how many numbers there would be with c outputs, where it has one."""
        return c * self.rows.numel()

    def dot(self, other: Dense, kind: str) -> Tensor:
        """Return the products of all rows of one with those of the other."""
        x, y = self.rows, other.rows
        if kind == DIAGONAL:
            return x.transpose(0, 1) @ y.permute(1, 2, 0)
        if kind == TRACE:
            return _gram(x.flatten(1), y.flatten(1))
        return _gram(x.flatten(0, 1), y.flatten(0, 1)).view(*x.shape[:2], *y.shape[:2])


@dataclass
class Outer:
    """Rows that are sums of outer products: d (n, c, p, i) with h (n, p, j)."""

    d: Tensor
    h: Tensor

    def dense(self) -> Dense:
        """Form the rows: (n, c, i * j)."""
        d = self.d.permute(0, 1, 3, 2).flatten(1, 2)  # (n, c * i, p)
        return Dense((d @ self.h).view(*self.d.shape[:2], -1))

    def elements(self, c: int) -> int:
        """Return how many numbers there would be with c outputs, where it has one."""
        return 3 * c * self.d.numel() + self.h.numel()  # twice more in the graph

    def dot(self, other: Outer, kind: str) -> Tensor:
        """Return the products of all rows of one with those of the other, the cheaper way."""
        (n, c, p, i), m, q = self.d.shape, len(other.h), other.h.shape[1]
        pairs = n * m * c * (c if kind == FULL else 1)
        forming, size, matching = self._costs()
        formed = (n * p + m * q) * c * forming + pairs * size
        # 16: what goes through memory element by element is that much slower than multiplying
        summed = 0 if p == q == 1 else 16
        if formed < n * m * p * q * matching + pairs * p * q * (i + summed):
            mine = self.dense()
            return mine.dot(mine if other is self else other.dense(), kind)
        h = self._match(other)
        if p == q == 1:
            return Dense(self.d[:, :, 0]).dot(Dense(other.d[:, :, 0]), kind) * (
                h[:, None, :, None] if kind == FULL else h
            )
        if kind == TRACE:
            d = _positions_first(self.d) @ _positions_first(other.d).T
            return (d * h).view(n, p, m, q).sum((1, 3))
        h = h.view(n, p, m, q)
        if kind == FULL:
            d = self.d.flatten(0, 2) @ other.d.flatten(0, 2).T
            return torch.einsum("ncpmdq,npmq->ncmd", d.view(n, c, p, m, c, q), h)
        each = [
            (self.d[:, a].flatten(0, 1) @ other.d[:, a].flatten(0, 1).T).view(n, p, m, q)
            for a in range(c)
        ]
        return torch.stack([(d * h).sum((1, 3)) for d in each])

    def _costs(self) -> tuple[int, int, int]:
        """Return the multiplications to form a row, its size, and those to match two positions."""
        i, j = self.d.shape[3], self.h.shape[2]
        return i * j, i * j, j

    def _match(self, other: Outer) -> Tensor:
        """Return the products of the inputs at all positions, (n p, m q)."""
        return self.h.flatten(0, 1) @ other.h.flatten(0, 1).T


@dataclass
class Chosen(Outer):
    """Rows about an embedding: the inputs h are one-hot, and given as positions (n, p) of size."""

    size: int

    def dense(self) -> Dense:
        """Form the rows: (n, c, size * i)."""
        n, c, _, i = self.d.shape
        rows = self.d.new_zeros(n, c, self.size, i)
        at = self.h[:, None, :, None].expand_as(self.d)
        return Dense(rows.scatter_add_(2, at, self.d).flatten(2))

    def _costs(self) -> tuple[int, int, int]:
        i = self.d.shape[3]
        return i, self.size * i, 1

    def _match(self, other: Outer) -> Tensor:
        return (self.h.flatten()[:, None] == other.h.flatten()).to(self.d)


Factor = Dense | Outer


def _gram(x: Tensor, y: Tensor, panels: int = 8) -> Tensor:
    """Return x y^T; where y is x, little more than half of it is multiplied."""
    if x.data_ptr() != y.data_ptr() or x.shape != y.shape or len(x) < 64 * panels:
        return x @ y.T
    product = x.new_empty(len(x), len(x))
    step = -(-len(x) // panels)
    for i in range(0, len(x), step):
        torch.mm(x[i : i + step], x[: i + step].T, out=product[i : i + step, : i + step])
        product[:i, i : i + step] = product[i : i + step, :i].T
    return product


def _positions_first(d: Tensor) -> Tensor:
    return d.transpose(1, 2).flatten(2).flatten(0, 1)  # (n p, c i)


@dataclass
class _Calls:
    """What a module was called with and put out, in one pass, and its weights' names by role."""

    module: nn.Module
    prefix: str
    names: dict[str, str]
    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    plain: bool = True  # whether every call was one of tensors alone


class Backprop:
    """The Jacobian's rows through one pass of the model and one backward pass for each output.

    Args:
        outputs: The model on its inputs.
        names: The weights that count; those of modules without modules inside are served.
        rates: Learning rate of each.
        pulled: What is pulled back, (c, o): combinations of the outputs.
    """

    def __init__(self, outputs: Outputs, names: Container[str], rates: Rates, pulled: Tensor):
        self.outputs, self.rates, self.pulled = outputs, rates, pulled
        tied = _tied(outputs.model)
        self.owners: dict[nn.Module, tuple[str, dict[str, str]]] = {}
        for prefix, module in outputs.model.named_modules():
            if next(module.children(), None) is None:
                mine = {
                    role: name
                    for role, _ in module.named_parameters(recurse=False)
                    if (name := f"{prefix}.{role}" if prefix else role) in names
                }
                if mine and not tied & {*mine.values()}:
                    self.owners[module] = (prefix, mine)

    def without(self, names: set[str]) -> None:
        """Stop serving these weights, and those of the same modules."""
        self.owners = {m: n for m, n in self.owners.items() if not names & {*n[1].values()}}

    @property
    def served(self) -> set[str]:
        """The names of the weights that are served."""
        return {name for _, names in self.owners.values() for name in names.values()}

    def factors(self, rows: slice) -> dict[str, Factor]:
        """Return the factors of these rows, by the name of the weight they are about.

        A weight is left out where no output depends on it, and where this way cannot serve it: its
        module was called with other things than tensors with a row for each input.
        """
        calls, output = self._forward(rows)
        n, tensors = len(output), [t for call in calls for t in call.outputs]
        with_gradient = [t for t in tensors if t.requires_grad]
        if not with_gradient:
            return {}
        cotangents = self.pulled[:, None].expand(-1, n, -1)
        found = _each(output, with_gradient, cotangents)
        gradients = dict(zip(map(id, with_gradient), found, strict=True))
        factors: dict[str, Factor] = {}
        with torch.no_grad():
            for call in calls:
                deltas = [gradients.get(id(t)) for t in call.outputs]
                live = [
                    (x, d.transpose(0, 1))
                    for x, d in zip(call.inputs, deltas, strict=True)
                    if d is not None
                ]
                if live and call.plain:
                    factors |= self._of(call, live)
        return factors

    def _forward(self, rows: slice) -> tuple[list[_Calls], Tensor]:
        """Run the model and keep what its modules take and give."""
        args, kwargs = self.outputs.take(rows)
        leaves = self.outputs.objective.leaves()
        with torch.enable_grad():
            calls, output, spoiled = self._listen(leaves, args, kwargs, copy=False)
            if spoiled:  # an operation in place changed what was kept
                calls, output, _ = self._listen(leaves, args, kwargs, copy=True)
        return calls, output

    def _listen(
        self, leaves: dict[str, Tensor], args: Any, kwargs: Any, copy: bool
    ) -> tuple[list[_Calls], Tensor, bool]:
        calls = {module: _Calls(module, *names) for module, names in self.owners.items()}
        versions: list[tuple[Tensor, int]] = []

        def hook(module: nn.Module, inputs: tuple[Any, ...], extra: Any, output: Any) -> Any:
            call = calls[module]
            tensors = (*inputs, output)
            if extra or not all(isinstance(t, Tensor) for t in tensors):
                call.plain = False
                return None
            call.inputs.append(tuple(t.detach().clone() if copy else t.detach() for t in inputs))
            call.outputs.append(output)
            versions.extend((t, t._version) for t in tensors)
            return output.clone() if copy else None

        with _hooked(calls, hook):
            output = self.outputs.of(leaves, args, kwargs)
        spoiled = any(t._version != version for t, version in versions)
        return list(calls.values()), output, spoiled

    def _of(self, call: _Calls, live: list[tuple[tuple[Any, ...], Tensor]]) -> dict[str, Factor]:
        """Return the factors of one module."""
        n = len(live[0][1])
        if any(len(t) != n for x, d in live for t in (*x, d)):
            return {}
        unfold = _unfolding(call)
        if unfold is None:
            return self._by_module(call, live)
        taken = [unfold(x[0], d) for x, d in live]
        h = torch.cat([x for x, _ in taken], 1)
        d = torch.cat([d for _, d in taken], 2)
        outer = Outer(d, h) if h.dim() == 3 else _chosen(call.module, d, h)
        factors: dict[str, Factor] = {}
        for role, name in call.names.items():
            rate = self.rates[name]
            if role == "bias":
                factors[name] = Dense(weigh(d.sum(2), rate))
            elif isinstance(rate, Tensor):
                factors[name] = Dense(weigh(outer.dense().rows, rate.flatten()))
            else:
                factors[name] = replace(outer, d=weigh(outer.d, rate))
        return factors

    def _by_module(
        self, call: _Calls, live: list[tuple[tuple[Any, ...], Tensor]]
    ) -> dict[str, Factor]:
        """Pull back through the module alone, each input by itself."""
        objective, module = self.outputs.objective, call.module
        weights = {role: objective.params[name] for role, name in call.names.items()}
        start = call.prefix and f"{call.prefix}."
        tensors = {
            name.removeprefix(start): t
            for name, t in objective._tensors(objective.params).items()
            if name.startswith(start)
        }

        def one(x: tuple[Tensor, ...], d: Tensor) -> dict[str, Tensor]:
            def run(own: dict[str, Tensor]) -> Tensor:
                with objective._measuring():
                    return functional_call(module, {**tensors, **own}, tuple(t[None] for t in x))[0]

            pull: Any = torch.func.vjp(run, weights)[1]
            return torch.func.vmap(lambda cotangent: pull(cotangent)[0])(d)

        total: dict[str, Tensor] = {}
        for x, d in live:
            for role, rows in torch.func.vmap(one)(x, d).items():
                total[role] = total[role] + rows if role in total else rows
        return {
            name: Dense(weigh(total[role], self.rates[name]).flatten(2))
            for role, name in call.names.items()
        }


def _each(output: Tensor, by: list[Tensor], cotangents: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives by these tensors for each cotangent, (c, *shape)."""
    if len(cotangents) > 1:
        with suppress(RuntimeError, NotImplementedError):  # what cannot be vectorised
            return differentiate(output, by, cotangents, keep=True, batched=True)
    each = [differentiate(output, by, cotangent, keep=True) for cotangent in cotangents]
    return tuple(torch.stack(of_one) for of_one in zip(*each, strict=True))


@contextmanager
def _hooked(calls: Mapping[nn.Module, Any], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in calls]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weigh(rows: Tensor, rate: float | Tensor) -> Tensor:
    """Return rows (n, c, ...) of a weight's Jacobian times the root of its rates."""
    if isinstance(rate, Tensor):
        return rows * rate.sqrt()
    return rows if rate == 1.0 else rows * rate**0.5


def _tied(model: nn.Module) -> set[str]:
    """Return the names of parameters that several modules hold."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return {name for found in names.values() if len(found) > 1 for name in found}


def _unfolding(call: _Calls) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Return what turns a module's input and its deltas into (n, p, j) and (n, c, p, i)."""
    module = call.module
    if not set(call.names) <= {"weight", "bias"}:
        return None
    kind = type(module)
    if kind.forward is nn.Linear.forward and "weight" in module._parameters:
        return lambda x, d: (
            x.reshape(len(x), -1, x.shape[-1]),
            d.reshape(*d.shape[:2], -1, d.shape[-1]),
        )
    if kind is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        return lambda x, d: (
            x.reshape(len(x), -1),
            d.reshape(*d.shape[:2], -1, d.shape[-1]),
        )
    if kind in (nn.Conv1d, nn.Conv2d) and "weight" in module._parameters:
        conv: Any = module
        if conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            return lambda x, d: _unfold(conv, x, d)
    return None


def _unfold(conv: Any, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(conv, nn.Conv1d):
        patches = F.unfold(
            x[:, :, None],
            (1, *conv.kernel_size),
            (1, *conv.dilation),
            (0, *conv.padding),
            (1, *conv.stride),
        )
    else:
        patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return patches.mT, d.flatten(3).mT


def _chosen(embedding: Any, d: Tensor, tokens: Tensor) -> Chosen:
    if embedding.padding_idx is not None:  # a row that autograd gives no gradient
        d = d * (tokens != embedding.padding_idx)[:, None, :, None]
    return Chosen(d, tokens, embedding.num_embeddings)
