"""Which channels of a network must live and die together: found by watching it run once.

Every index along every axis of every parameter is a *node*. One forward pass on example inputs is
observed operation by operation (a ``TorchDispatchMode``); each operation says which nodes it ties:
a convolution ties its input's channels to the second axis of its weight, a residual sum ties its
two operands, an attention product ties the channels of one head. The connected components of that
graph are the *units*, the smallest things that can be removed; units that touch the same axes of
the same tensors form a :class:`Group`, and a group's width is the number of units kept.

Nodes, not whole axes, are labelled, so concatenation, splitting, grouped convolution, grouped-query
attention and channel shuffles need no special cases: a label travels through reshapes as an array.
An operation that is not understood *freezes* the units it meets and says why; it is never guessed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pantarhei.cost import without_fast_path
from pantarhei.errors import RequestError

Ids = np.ndarray


@dataclass(eq=False)
class Block:
    """Labels over some axes of one tensor: ``ids[i, j, ...]`` is the node at those positions."""

    axes: tuple[int, ...]
    ids: Ids


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a nested value, data classes included."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in(list(vars(leaf).values()))
    return found


def spoken(module: str) -> str:
    """Return how a sentence names a module of the traced root: quoted, or the model itself."""
    path = module.removeprefix("model").removeprefix(".")
    return f"'{path}'" if path else "the model's own code"


@dataclass
class Seen:
    """A tensor's sizes or a costed operation's, with the labels that they depend on.

    ``sizes``: for each size, the full size and the nodes along it (None where it is constant);
    ``call``: how many module calls had ended before it.
    """

    module: str
    scale: int = 1
    sizes: list[tuple[int, Ids | None]] = field(default_factory=list)
    call: int = 0


@dataclass
class Group:
    """Units that touch the same axes of the same tensors, in order; a choice keeps the first k."""

    name: str
    kind: str
    units: list[int]
    axes: list[tuple[str, int]]

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.units)


class Tracer(TorchDispatchMode):
    """Watches one forward pass and collects ties, frozen nodes and costed operations.

    After the pass, ``labels[tensor name]`` holds for every axis of every parameter and buffer the
    nodes along it; ``ended`` names the module calls in the order in which they ended; ``steps``
    holds, in order, the module and the sizes of what shows whether code follows a change of width:
    the outputs of modules, of reshapes and of slices, and costed operations.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.nodes = 0
        self.labels: dict[str, list[Ids]] = {}
        self.edges: list[tuple[Ids, Ids]] = []
        self.frozen: list[tuple[Ids, str]] = []
        self.joint: list[Ids] = []
        self.attention: list[Ids] = []
        self.counted: list[Seen] = []
        self.steps: list[tuple[str, list[Seen]]] = []
        self.ended: list[str] = []
        self.stack: list[str] = [""]
        self.operation = ""
        self.first_use: dict[str, int] = {}
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._blocks: dict[int, tuple[Tensor, list[Block]]] = {}
        for name, tensor in tensors.items():
            axes = [self._fresh(size) for size in tensor.shape]
            self.labels[name] = axes
            if tensor.is_floating_point():
                blocks = [Block((d,), ids) for d, ids in enumerate(axes) if len(ids) > 1]
                self._blocks[id(tensor)] = (tensor, blocks)

    def _fresh(self, size: int) -> Ids:
        self.nodes += size
        return np.arange(self.nodes - size, self.nodes)

    # --- labels -------------------------------------------------------------------------------

    def blocks(self, tensor: Tensor) -> list[Block]:
        """Return the labels of a tensor; an empty list for one that depends on no channel."""
        return self._blocks.get(id(tensor), (tensor, []))[1]

    def _set(self, tensor: Tensor, blocks: Iterable[Block]) -> None:
        # The tensor is kept alive, so that its id stays its own for as long as the trace lasts.
        self._blocks[id(tensor)] = (tensor, [b for b in blocks if b.ids.size])

    def tie(self, a: Ids, b: Ids) -> None:
        """Say that each node of ``a`` lives exactly when its partner in ``b`` does."""
        self.edges.append((a.ravel(), b.ravel()))

    def freeze(self, ids: Ids, why: str) -> None:
        """Say that these nodes can never be removed; an empty reason is not worth reporting."""
        self.frozen.append((ids.ravel(), why and f"in {spoken(self.stack[-1])}, {why}"))

    def _collapse(self, tensor: Tensor, block: Block, keep: Sequence[int]) -> Block:
        """Make ``block`` depend on the axes ``keep`` only: tie its nodes along the others."""
        order = [block.axes.index(a) for a in keep]
        rest = [i for i in range(len(block.axes)) if i not in order]
        flat = block.ids.transpose(order + rest).reshape([block.ids.shape[i] for i in order] + [-1])
        self.tie(np.broadcast_to(flat[..., :1], flat.shape), flat)
        slim = Block(tuple(keep), np.ascontiguousarray(flat[..., 0]))
        self._set(tensor, [slim if b is block else b for b in self.blocks(tensor)])
        return slim

    def along(self, tensor: Tensor, axis: int) -> Ids | None:
        """Return the nodes along one axis (None: constant); ties what shares a label with it."""
        axis %= max(tensor.dim(), 1)
        for block in self.blocks(tensor):
            if axis in block.axes:
                if len(block.axes) > 1:
                    block = self._collapse(tensor, block, [axis])
                return block.ids
        return None

    def whole(self, tensor: Tensor, axis: int, why: str) -> None:
        """Say that an axis is always complete: tie along it where others can carry its label."""
        axis %= max(tensor.dim(), 1)
        for block in self.blocks(tensor):
            if axis in block.axes:
                if len(block.axes) > 1:
                    self._collapse(tensor, block, [a for a in block.axes if a != axis])
                else:
                    self.freeze(block.ids, why)
                    self._set(tensor, [b for b in self.blocks(tensor) if b is not block])
                return

    def _match(self, a: Ids | None, b: Ids | None, why: str) -> Ids | None:
        """Tie two labels of one axis; a label that meets a constant axis is frozen."""
        if a is None or b is None:
            for ids in (a, b):
                if ids is not None:
                    self.freeze(ids, why)
            return None
        if a is not b:
            self.tie(a, b)
        return a

    def _contract(self, a: Tensor, axis: int, b: Tensor, other: int) -> None:
        """Tie the two axes that a product sums over; a label shared with an outer axis moves out.

        (Channels seen as heads x channels: the product over a head's channels keeps whole heads.)
        """
        joint = False
        for tensor, d in ((a, axis), (b, other)):
            for block in self.blocks(tensor):
                if d in block.axes and len(block.axes) > 1:
                    self.whole(tensor, d, "")
                    joint = True
        if joint:
            for tensor, d in ((a, axis), (b, other)):
                self.whole(tensor, d, "its channels meet a fixed size in a product")
            return
        self._match(
            self.along(a, axis), self.along(b, other), "its channels meet a fixed size in a product"
        )

    # --- observation --------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then let its rule label what came out."""
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        rule = RULES.get(name) or RULES.get(name.rstrip("_"))
        pointwise = torch.Tag.pointwise in func.tags or name.rstrip("_") in POINTWISE
        if rule is None and not pointwise:
            with self:  # an operation made of others shows itself as these
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            rule = _unknown
            self.operation = name
        result = func(*args, **kwargs)
        outputs, inputs = tensors_in(result), tensors_in((args, kwargs))
        for tensor in inputs:
            if id(tensor) in self._names:
                self.first_use.setdefault(self._names[id(tensor)], len(self.ended))
        if rule is None:
            self._pointwise(inputs, outputs)
        else:
            bound = {
                p.name: args[i] if i < len(args) else kwargs.get(p.name, p.default_value)
                for i, p in enumerate(func._schema.arguments)
            }
            rule(self, bound, outputs)
        if rule in (_view, _slices):
            self.steps.append((self.stack[-1], self.describe(outputs)))
        return result

    def _pointwise(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        for out in outputs:
            self._set(out, self._broadcast(inputs, out))

    def _broadcast(self, inputs: Sequence[Tensor], out: Tensor) -> list[Block]:
        rank, found = out.dim(), list[Block]()
        inputs = [t for t in inputs if t.dim()]

        def holds(tensor: Tensor, axis: int) -> bool:  # has this axis, not broadcast along it
            d = axis - rank + tensor.dim()
            return d >= 0 and tensor.shape[d] == out.shape[axis] and not _expanded(tensor, d)

        def shifted(tensor: Tensor) -> list[Block]:
            shift = rank - tensor.dim()
            return [Block(tuple(a + shift for a in b.axes), b.ids) for b in self.blocks(tensor)]

        # Where all operands see a joint label alike it stays joint; else it is resolved by axis.
        for tensor in inputs:
            for block in shifted(tensor):
                if len(block.axes) < 2:
                    continue
                for other in inputs:
                    if other is tensor or not any(holds(other, a) for a in block.axes):
                        continue
                    same = any(b.axes == block.axes for b in shifted(other))
                    if same:
                        continue
                    back = tensor.dim() - rank
                    for a in block.axes:
                        labelled = any(a in b.axes for b in shifted(other))
                        current = [b for b in self.blocks(tensor) if a + back in b.axes]
                        if current and len(current[0].axes) > 1:
                            # The outer axis keeps the label: whole heads, not slices of each.
                            if labelled and a == block.axes[0]:
                                self.along(tensor, a + back)
                            elif holds(other, a):
                                self.whole(tensor, a + back, "")
        done: set[int] = set()
        for tensor in inputs:
            for block in shifted(tensor):
                if done & set(block.axes):
                    continue
                done |= set(block.axes)
                label: Ids | None = block.ids
                for other in inputs:
                    if other is tensor or not all(holds(other, a) for a in block.axes):
                        continue
                    match = next((b for b in shifted(other) if b.axes == block.axes), None)
                    label = self._match(
                        label,
                        match.ids if match else None,
                        "its channels meet a tensor of fixed size",
                    )
                    if label is None:
                        break
                if label is not None:
                    found.append(Block(block.axes, label))
        return found

    def count(self, scale: int, *sizes: tuple[int, Ids | None]) -> None:
        """Record a costed operation: ``scale`` times the product of the sizes."""
        self.counted.append(Seen(self.stack[-1], scale, list(sizes), len(self.ended)))
        self.steps.append((self.stack[-1], [self.counted[-1]]))

    def describe(self, value: Any) -> list[Seen]:
        """Return the label of every size of every tensor in a module's output."""
        return [
            Seen(
                self.stack[-1],
                1,
                [(n, self._axis_view(t, d)) for d, n in enumerate(t.shape)],
            )
            for t in tensors_in(value)
        ]

    def _axis_view(self, tensor: Tensor, axis: int) -> Ids | None:
        """Return labels along an axis without tying: a joint label is resolved after the pass."""
        for block in self.blocks(tensor):
            if axis in block.axes:
                return np.moveaxis(block.ids, block.axes.index(axis), 0)
        return None

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Keep the name of the running module, and note the sizes of every module's output."""

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self.stack.append(name)

        def leave(*call: Any) -> None:
            self.steps.append((self.stack[-1], self.describe(call[-1])))
            self.ended.append(self.stack.pop())

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- the answer ---------------------------------------------------------------------------

    def units(self) -> tuple[Ids, dict[int, str]]:
        """Return the unit of every node, and the reasons why units are frozen."""
        none = np.zeros(0, dtype=np.int64)
        while True:
            a = np.concatenate([none, *(a for a, _ in self.edges)])
            b = np.concatenate([none, *(b for _, b in self.edges)])
            graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), (self.nodes, self.nodes))
            unit = connected_components(graph, directed=False)[1]
            # A label over several axes is a dense array: it can shrink along one of them only.
            loose = [ids for ids in self.joint if not _on_one_axis(unit[ids])]
            if not loose:
                break
            for ids in loose:
                flat = np.moveaxis(ids, int(np.argmax(ids.shape)), 0).reshape(max(ids.shape), -1)
                self.tie(np.broadcast_to(flat[:, :1], flat.shape), flat)
        why: dict[int, str] = {}
        for ids, reason in self.frozen:
            for u in np.unique(unit[ids]):
                why.setdefault(int(u), reason)
        return unit, why

    def groups(self, modules: dict[str, nn.Module]) -> tuple[list[Group], Ids, dict[str, str]]:
        """Return the groups, the unit of every node, and why named axes are not elastic."""
        unit, why = self.units()
        touches: dict[int, list[tuple[str, int]]] = defaultdict(list)
        counts: dict[int, list[int]] = defaultdict(list)
        for name, labels in self.labels.items():
            for axis, ids in enumerate(labels):
                if len(ids) < 2:
                    continue
                here, times = np.unique(unit[ids], return_counts=True)
                for u, n in zip(here.tolist(), times.tolist(), strict=True):
                    touches[u].append((name, axis))
                    counts[u].append(n)
        attended = set(np.unique(unit[np.concatenate(self.attention)])) if self.attention else set()
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        reasons: dict[str, str] = {}

        def explain(axes: list[tuple[str, int]], reason: str) -> None:
            for name, axis in axes:
                if axis == 0 and reason:
                    reasons.setdefault(name.rpartition(".")[0], reason)

        for u in sorted(touches, key=lambda u: _first(touches[u], self.labels, unit, u)):
            if u in why:
                explain(touches[u], why[u])
            else:
                alike[(*touches[u], *counts[u])].append(u)
        groups = []
        for members in alike.values():
            axes = touches[members[0]]
            # One axis alone (a kernel's window, a table read by number) is not a channel.
            if len(axes) < 2:
                continue
            if len(members) == 1:
                explain(axes, "its channels are tied together: all of them stay, or none")
                continue
            name = axes[0][0].rpartition(".")[0] or axes[0][0]
            kind = _kind(axes, modules, not attended.isdisjoint(members))
            groups.append(Group(name, kind, members, axes))
        taken: dict[str, int] = defaultdict(int)
        for group in groups:  # a fused projection can belong to several groups
            taken[group.name] += 1
            if taken[group.name] > 1:
                group.name += f"#{taken[group.name]}"
        return groups, unit, reasons


def _expanded(tensor: Tensor, axis: int) -> bool:
    """Say whether one value stands for all along an axis: its size follows what it meets."""
    return tensor.device.type != "meta" and tensor.shape[axis] > 1 and tensor.stride(axis) == 0


def _first(touches: list[tuple[str, int]], labels: dict[str, list[Ids]], unit: Ids, u: int) -> int:
    name, axis = touches[0]
    ids = labels[name][axis]
    return int(ids[np.argmax(unit[ids] == u)])


def _on_one_axis(units: Ids) -> bool:
    """Say whether an array of units varies along one axis only."""
    return any(
        bool((units == np.take(units, [0], axis=axis)).all())
        if units.ndim == 1
        else bool((moved == moved[:, :1]).all())
        for axis in range(units.ndim)
        for moved in [np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1)]
    )


def _kind(axes: list[tuple[str, int]], modules: dict[str, nn.Module], attended: bool) -> str:
    """Name a group's kind.

    ``heads`` take part in an attention or another batched product; ``mlp``: hidden units that only
    linear layers and a module's raw parameters touch; ``channels``: all others.
    """
    if attended:
        return "heads"

    def between_layers(name: str) -> bool:
        path, _, inner = name.partition(".parametrizations.")
        owner = modules[path if inner else path.rpartition(".")[0]]
        kind = type(owner)
        raw = not kind.__module__.startswith("torch.nn.") and "Norm" not in kind.__name__
        return raw or isinstance(owner, nn.Linear)

    return "mlp" if all(between_layers(name) for name, _ in axes) else "channels"


# --- rules ------------------------------------------------------------------------------------
# Each rule sees the operation's arguments by name and its outputs, and labels the outputs.

Rule = Callable[[Tracer, dict[str, Any], list[Tensor]], None]
RULES: dict[str, Rule] = {}

# Operations that keep the shape and each channel where it is, but lack torch's pointwise tag.
POINTWISE = frozenset({
    "_conj", "_prelu_kernel", "_to_copy", "alias", "bernoulli", "copy", "detach", "empty_like",
    "exponential", "fill", "floor_divide", "full_like", "hardswish", "lift_fresh",
    "lift_fresh_copy", "log_sigmoid_forward", "native_dropout", "normal", "ones_like", "rand_like",
    "randint_like", "randn_like", "rrelu_with_noise", "uniform", "zero", "zeros_like",
})  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for some operations."""

    def register(f: Rule) -> Rule:
        for name in names:
            RULES[name] = f
        return f

    return register


def _unknown(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    for tensor in tensors_in(a):
        for block in t.blocks(tensor):
            t.freeze(block.ids, f"the operation '{t.operation}' may mix its channels")


def _relabel(t: Tracer, out: Tensor, blocks: Iterable[Block], axes: dict[int, int]) -> None:
    """Give ``out`` the blocks of its source with axes renamed; ``axes`` covers those that stay."""
    t._set(out, [Block(tuple(axes[a] for a in b.axes), b.ids) for b in blocks])


def _channel(x: Tensor, spatial: int) -> int:
    return x.dim() - spatial - 1


@rule("convolution", "_convolution")
def _convolution(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, w, bias, out, g = a["input"], a["weight"], a["bias"], outputs[0], a["groups"]
    c = _channel(x, w.dim() - 2)
    inputs = t.along(x, c)
    per_in, per_out = (0, 1) if a["transposed"] else (1, 0)
    window = math.prod(w.shape[2:])
    # A transposed convolution visits its window once for each input position, not output position.
    places = math.prod((x if a["transposed"] else out).shape[c + 1 :]) * window
    batch = x.shape[0] if c else 1
    outs: Ids | None
    if g == 1:
        t._match(inputs, t.along(w, per_in), "its input channels are fixed")
        outs = t.along(w, per_out)
    elif inputs is None:
        for axis in (0, 1):
            t.whole(w, axis, "its grouped convolution reads fixed channels")
        outs = None
    else:
        # Groups live and die whole; one group's channels are one unit (depthwise: one channel).
        heads = inputs.reshape(g, -1)
        t.tie(np.broadcast_to(heads[:, :1], heads.shape), heads)
        t.whole(w, 1, "a grouped convolution keeps the size of its groups")
        first = t.along(w, 0)
        if first is not None:
            t.tie(np.repeat(heads[:, 0], len(first) // g), first)
        outs = np.repeat(heads[:, 0], out.shape[c] // g)
        if first is not None and not a["transposed"]:
            outs = first
    if bias is not None:
        outs = t._match(outs, t.along(bias, 0), "its output channels are fixed")
    t._set(out, [Block((c,), outs)] if outs is not None and len(outs) > 1 else [])
    in_per_group = (x.shape[c], inputs) if g == 1 else (x.shape[c] // g, None)
    t.count(places * batch, (out.shape[c], outs), in_per_group)


@rule("mm", "addmm", "linear")
def _mm(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    out = outputs[0]
    if "weight" in a:
        x, w, bias, w_in, w_out = a["input"], a["weight"], a["bias"], 1, 0
    else:
        x, w, bias = a.get("mat1", a.get("self")), a["mat2"], a["self"] if "mat1" in a else None
        w_in, w_out = 0, 1
    t._contract(x, x.dim() - 1, w, w_in)
    rows = [b for b in t.blocks(x) if x.dim() - 1 not in b.axes]
    t.count(
        1,
        *((x.shape[d], t._axis_view(x, d)) for d in range(x.dim() - 1)),
        (x.shape[-1], t.along(w, w_in)),
        (w.shape[w_out], t.along(w, w_out)),
    )
    columns = t.along(w, w_out)
    t._set(out, [*rows, *([Block((out.dim() - 1,), columns)] if columns is not None else [])])
    if bias is not None:
        product = torch.empty_like(out, device="meta")
        t._set(product, t.blocks(out))
        t._set(out, t._broadcast([product, bias], out))


@rule("bmm", "baddbmm")
def _bmm(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, y = (a["batch1"], a["batch2"]) if "batch1" in a else (a["self"], a["mat2"])
    t._contract(x, 2, y, 1)
    batch = t._match(t.along(x, 0), t.along(y, 0), "a batched product has a fixed batch")
    if batch is not None:
        t.attention.append(batch)
    labels = [batch, t.along(x, 1), t.along(y, 2)]
    out = outputs[0]
    t._set(out, [Block((d,), ids) for d, ids in enumerate(labels) if ids is not None])
    t.count(
        1,
        (x.shape[0], batch),
        (x.shape[1], labels[1]),
        (x.shape[2], t.along(x, 2)),
        (y.shape[2], labels[2]),
    )
    if "batch1" in a:
        product = torch.empty_like(out, device="meta")
        t._set(product, t.blocks(out))
        t._set(out, t._broadcast([product, a["self"]], out))


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attention(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    q, k, v, out = a["query"], a["key"], a["value"], outputs[0]
    head = q.dim() - 3
    t._contract(q, q.dim() - 1, k, k.dim() - 1)
    q_heads, k_heads, v_heads = (t.along(x, head) for x in (q, k, v))
    shared = t._match(k_heads, v_heads, "keys and values differ in heads")
    if shared is not None and q_heads is not None and len(q_heads) != len(shared):
        shared = np.repeat(shared, len(q_heads) // len(shared))
    heads = t._match(q_heads, shared, "queries and keys differ in heads")
    mask = a.get("attn_mask", a.get("attn_bias"))
    if (
        isinstance(mask, Tensor)
        and mask.dim() >= 3
        and mask.shape[-3] > 1
        and not _expanded(mask, mask.dim() - 3)
    ):
        heads = t._match(heads, t.along(mask, -3), "its attention mask has fixed heads")
    if heads is not None:
        t.attention.append(heads)
    labels = {head: heads, v.dim() - 1: t.along(v, v.dim() - 1)}
    t._set(out, [Block((d,), ids) for d, ids in labels.items() if ids is not None])
    lead = math.prod(q.shape[:head]) * q.shape[-2] * k.shape[-2]
    for size in ((q.shape[-1], t.along(q, q.dim() - 1)), (v.shape[-1], labels[v.dim() - 1])):
        t.count(lead, (q.shape[head], heads), size)


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "miopen_batch_norm",
)
def _batch_norm(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x = a["input"]
    ids = t.along(x, 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if isinstance(a.get(name), Tensor):
            ids = t._match(ids, t.along(a[name], 0), "it normalises fixed channels")
    others = [b for b in t.blocks(x) if 1 not in b.axes]
    t._set(outputs[0], [*others, *([Block((1,), ids)] if ids is not None else [])])


@rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x = a["input"]
    first = x.dim() - len(a["normalized_shape"])
    for d in range(first, x.dim()):
        for name in ("weight", "bias"):
            if isinstance(a.get(name), Tensor):
                t._match(t.along(x, d), t.along(a[name], d - first), "it normalises a fixed size")
    t._set(outputs[0], t.blocks(x))
    for extra in outputs[1:]:
        t._set(extra, [b for b in t.blocks(x) if max(b.axes) < first])


@rule("native_group_norm")
def _group_norm(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, g = a["input"], a["group"]
    ids = t.along(x, 1)
    if ids is not None and g > 1:  # a norm group keeps its size: groups are dropped whole
        whole = ids.reshape(g, -1)
        t.tie(np.broadcast_to(whole[:, :1], whole.shape), whole)
    for name in ("weight", "bias"):
        if isinstance(a.get(name), Tensor):
            ids = t._match(ids, t.along(a[name], 0), "it normalises fixed channels")
    t._set(outputs[0], [Block((1,), ids)] if ids is not None else [])


@rule("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "view_as_real")
def _same(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    t._set(outputs[0], t.blocks(a["self"]))


@rule("sum", "mean", "var", "std", "var_mean", "amax", "amin", "max", "min", "prod", "norm",
      "linalg_vector_norm", "logsumexp", "any", "all", "argmax", "argmin", "count_nonzero",
      "median")  # fmt: skip
def _reduce(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, dim = a["self"], a.get("dim")
    if isinstance(a.get("other"), Tensor):  # max(x, y), elementwise
        return t._pointwise([x, a["other"]], outputs)
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        dim = range(x.dim())
    gone = {d % max(x.dim(), 1) for d in ([dim] if isinstance(dim, int) else dim)}
    kept = [d for d in range(x.dim()) if d not in gone]
    for block in t.blocks(x):  # a joint label reduced along one axis lives on in the others
        inside = [d for d in block.axes if d in gone]
        if inside and len(inside) < len(block.axes):
            t._collapse(x, block, [d for d in block.axes if d not in gone])
    keep = a.get("keepdim", False)
    axes = {d: d if keep else i for i, d in enumerate(kept)}
    for out in outputs:
        _relabel(t, out, [b for b in t.blocks(x) if not gone & set(b.axes)], axes)
    return None


@rule("as_strided")
def _as_strided(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out = a["self"], outputs[0]
    if x.shape == out.shape and x.data_ptr() == out.data_ptr():  # only the memory format changes
        return t._set(out, t.blocks(x))
    for block in t.blocks(x):
        t.freeze(block.ids, "it addresses its channels by memory offset")
    return None


@rule("permute", "transpose", "t")
def _permute(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x = a["self"]
    order = list(range(x.dim()))
    if "dims" in a:
        order = [d % x.dim() for d in a["dims"]]
    elif "dim0" in a:
        i, j = a["dim0"] % max(x.dim(), 1), a["dim1"] % max(x.dim(), 1)
        order[i], order[j] = order[j], order[i]
    else:
        order = order[::-1]
    _relabel(t, outputs[0], t.blocks(x), {d: i for i, d in enumerate(order)})


@rule("unsqueeze")
def _unsqueeze(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out = a["self"], outputs[0]
    new = a["dim"] % out.dim()
    _relabel(t, out, t.blocks(x), {d: d + (d >= new) for d in range(x.dim())})


@rule("squeeze")
def _squeeze(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, dim = a["self"], a.get("dim")
    dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % max(x.dim(), 1) for d in dims if x.shape[d] == 1}
    kept = [d for d in range(x.dim()) if d not in gone]
    _relabel(t, outputs[0], t.blocks(x), {d: i for i, d in enumerate(kept)})


@rule("expand")
def _expand(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out = a["self"], outputs[0]
    shift = out.dim() - x.dim()
    _relabel(t, out, t.blocks(x), {d: d + shift for d in range(x.dim())})


@rule("view", "_unsafe_view", "_reshape_alias")
def _view(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out = a["self"], outputs[0]
    if not t.blocks(x):
        return t._set(out, [])
    made: list[Block] = []
    for old, new in _aligned(x.shape, out.shape):
        inside = set(old)
        for block in list(t.blocks(x)):
            within = [d for d in block.axes if d in inside]
            if within and len(within) < len(block.axes):
                t._collapse(x, block, within)
        here = [b for b in t.blocks(x) if inside & set(b.axes)]
        for surplus in here[1:]:
            t.freeze(surplus.ids, "a reshape folds two of its channel axes into one")
        if not here:
            continue
        block = here[0]
        order = [d for d in old if d in block.axes]
        ids = block.ids.transpose([block.axes.index(d) for d in order])
        ids = ids.reshape([x.shape[d] if d in order else 1 for d in old])
        full = np.broadcast_to(ids, [x.shape[d] for d in old]).reshape([out.shape[d] for d in new])
        made += _split(t, full, new)
    return t._set(out, made)


def _split(t: Tracer, ids: Ids, axes: list[int]) -> list[Block]:
    """Label several axes by one array, by as few of them as it depends on."""
    depends = [i for i in range(ids.ndim) if bool((ids != ids.take([0], axis=i)).any())]
    if not depends:
        return []
    slim = ids[tuple(slice(None) if i in depends else 0 for i in range(ids.ndim))]
    if len(depends) > 1:
        t.joint.append(slim)
    return [Block(tuple(axes[i] for i in depends), slim)]


def _aligned(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Pair runs of old axes with the runs of new axes that hold the same elements."""
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        m, n = (old[i] if a else 1), (new[j] if b else 1)
        i, j = i + len(a), j + len(b)
        while m != n:
            if m < n:
                m, a, i = m * old[i], [*a, i], i + 1
            else:
                n, b, j = n * new[j], [*b, j], j + 1
        yield a, b


@rule("slice", "select", "split", "unbind", "split_with_sizes", "unsafe_split",
      "unsafe_split_with_sizes", "diagonal")  # fmt: skip
def _slices(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x = a["self"]
    if "offset" in a:  # diagonal
        for block in t.blocks(x):
            t.freeze(block.ids, "it takes a diagonal of its channels")
        return
    dim = (a.get("dim") or 0) % max(x.dim(), 1)
    places: list[Ids] = []
    if "index" in a:
        places = [np.array(a["index"] % x.shape[dim])]
    elif "start" in a or "end" in a:
        start = a.get("start") or 0
        end = a["end"] if a.get("end") is not None else x.shape[dim]
        places = [np.arange(x.shape[dim])[start : end : a.get("step") or 1]]
    elif outputs and outputs[0].dim() < x.dim():  # unbind
        places = [np.array(i) for i in range(len(outputs))]
    else:
        stops = np.cumsum([o.shape[dim] for o in outputs])
        places = [np.arange(s - o.shape[dim], s) for s, o in zip(stops, outputs, strict=True)]
    for out, place in zip(outputs, places, strict=True):
        drops = place.ndim == 0
        made = []
        for block in t.blocks(x):
            ids, axes = block.ids, block.axes
            if dim in axes and out.shape != x.shape:
                ids = ids.take(place, axis=axes.index(dim))
                if drops:
                    axes = tuple(d for d in axes if d != dim)
            if axes:
                made.append(Block(tuple(d - (drops and d > dim) for d in axes), ids))
            elif drops:
                t.freeze(ids, "it reads a channel by its number")
        t._set(out, made)


@rule("cat", "stack")
def _cat(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    tensors = [x for x in a["tensors"] if x.numel()]
    out = outputs[0]
    dim = a.get("dim", 0) % out.dim()
    if tensors[0].dim() < out.dim():  # stack: a new axis, everything else as in a sum
        sources = []
        for x in tensors:
            moved = torch.empty([*x.shape[:dim], 1, *x.shape[dim:]], device="meta")
            _relabel(t, moved, t.blocks(x), {d: d + (d >= dim) for d in range(x.dim())})
            sources.append(moved)
        return t._set(out, t._broadcast(sources, out))
    joints = [[b for b in t.blocks(x) if dim in b.axes] for x in tensors]
    alike = all(j and j[0].axes == joints[0][0].axes for j in joints) if joints[0] else False
    if alike:
        axes = joints[0][0].axes
        ids = np.concatenate([j[0].ids for j in joints], axis=axes.index(dim))
        if len(axes) > 1:
            t.joint.append(ids)
        made = [Block(axes, ids)]
    else:
        labels = [t.along(x, dim) for x in tensors]
        made = []
        if any(ids is not None for ids in labels):
            # Channels that come from nowhere (a constant, padding) take nodes that stay.
            joined = []
            for x, label in zip(tensors, labels, strict=True):
                joined.append(t._fresh(x.shape[dim]) if label is None else label)
                if label is None:
                    t.freeze(joined[-1], "")
            made = [Block((dim,), np.concatenate(joined))]
    covered = {d for b in made for d in b.axes} | {dim}
    rest = []
    for x in tensors:
        rest.append(_stand_in(x, covered))
        t._set(rest[-1], [b for b in t.blocks(x) if not covered & set(b.axes)])
    return t._set(out, [*made, *t._broadcast(rest, _stand_in(out, covered))])


def _stand_in(x: Tensor, flat: set[int]) -> Tensor:
    """Return a tensor of the shape of ``x``, but of size 1 along the axes ``flat``."""
    return torch.empty([1 if d in flat else n for d, n in enumerate(x.shape)], device="meta")


@rule("repeat")
def _repeat(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out = a["self"], outputs[0]
    shift = out.dim() - x.dim()
    made = []
    for block in list(t.blocks(x)):
        times = [out.shape[d + shift] // x.shape[d] for d in block.axes]
        made.append(Block(tuple(d + shift for d in block.axes), np.tile(block.ids, times)))
    t._set(out, made)


@rule("repeat_interleave")
def _repeat_interleave(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out, dim = a["self"], outputs[0], a.get("dim")
    if not isinstance(a.get("repeats"), int) or dim is None:
        for block in t.blocks(x):
            t.freeze(block.ids, "it repeats channels by a tensor")
        return
    dim %= x.dim()
    t._set(
        out,
        [
            Block(b.axes, np.repeat(b.ids, a["repeats"], axis=b.axes.index(dim)))
            if dim in b.axes
            else b
            for b in t.blocks(x)
        ],
    )


@rule("roll", "flip")
def _roll(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, dims = a["self"], [d % a["self"].dim() for d in a["dims"]]
    shifts = a.get("shifts", [None] * len(dims))
    made = []
    for block in t.blocks(x):
        ids = block.ids
        for d, s in zip(dims, shifts, strict=True):
            if d in block.axes:
                axis = block.axes.index(d)
                ids = np.flip(ids, axis) if s is None else np.roll(ids, s, axis)
        made.append(Block(block.axes, ids))
    t._set(outputs[0], made)


@rule("constant_pad_nd", *(f"{kind}_pad{d}d" for kind in ("reflection", "replication")
                           for d in (1, 2, 3)))  # fmt: skip
def _pad(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x: Tensor = a["self"]
    pads: Sequence[int] = a["pad"] if "pad" in a else a["padding"]
    for i in range(len(pads) // 2):
        if pads[2 * i] or pads[2 * i + 1]:
            t.whole(x, x.dim() - 1 - i, "it pads its channels")
    t._set(outputs[0], t.blocks(x))


@rule(
    *(f"{kind}{d}d" for d in (1, 2, 3) for kind in (
        "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool",
        "upsample_nearest", "_upsample_nearest_exact")),
    "max_pool2d_with_indices", "max_pool3d_with_indices", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d",
)  # fmt: skip
def _spatial(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x: Tensor = a["self"] if "self" in a else a["input"]
    keep = [b for b in t.blocks(x) if all(outputs[0].shape[d] == x.shape[d] for d in b.axes)]
    for out in outputs:
        t._set(out, keep)


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
def _new(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    if outputs[0].shape == a["self"].shape:
        t._set(outputs[0], t.blocks(a["self"]))


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "glu")
def _rearrange(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out = a["self"], outputs[0]
    axis = a.get("dim", -3) % x.dim()
    ids = t.along(x, axis)
    if ids is None:
        return t._set(out, t.blocks(x))

    def alike(ids: Ids, rows: int) -> Ids:  # each column of the array lives and dies as one
        grid = ids.reshape(rows, -1)
        t.tie(np.broadcast_to(grid[:1], grid.shape), grid)
        return grid[0]

    if "upscale_factor" in a:
        square = a["upscale_factor"] ** 2
        ids = alike(ids.reshape(-1, square).T, square)
    elif "downscale_factor" in a:
        ids = np.repeat(ids, a["downscale_factor"] ** 2)
    elif "groups" in a:  # its number of groups stays, so all of them shrink alike
        ids = np.repeat(alike(ids, a["groups"]), a["groups"])
    elif "kernel_size" in a:
        ids = np.repeat(ids, math.prod(a["kernel_size"]))
    else:  # glu: the first half of the channels times the second
        ids = alike(ids, 2)
    t._set(out, [*(b for b in t.blocks(x) if b.axes < (axis,)), Block((axis,), ids)])


@rule("_weight_norm_interface")
def _weight_norm(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    v, g, dim = a["v"], a["g"], a["dim"]
    t._match(t.along(v, dim), t.along(g, dim), "its weight's norm has a fixed size")
    t._set(outputs[0], t.blocks(v))
    t._set(outputs[1], t.blocks(g))


@rule("mv", "dot", "vdot")
def _vector_product(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x: Tensor = a["self"]
    y: Tensor = a["vec"] if "vec" in a else a["tensor"] if "tensor" in a else a["other"]
    t._contract(x, x.dim() - 1, y, 0)
    rows = t.along(x, 0) if x.dim() == 2 else None
    t._set(outputs[0], [Block((0,), rows)] if rows is not None else [])


@rule("view_as_complex")
def _view_as_complex(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x: Tensor = a["self"]
    t.whole(x, x.dim() - 1, "its channels are read in pairs, as complex numbers")
    t._set(outputs[0], t.blocks(x))


@rule("embedding")
def _embedding(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    w, out = a["weight"], outputs[0]
    t.whole(w, 0, "")
    columns = t.along(w, 1)
    t._set(out, [Block((out.dim() - 1,), columns)] if columns is not None else [])


@rule("index", "index_select")
def _index(t: Tracer, a: dict[str, Any], outputs: list[Tensor]) -> None:
    x, out = a["self"], outputs[0]
    given = a["indices"] if "indices" in a else [None] * (a["dim"] % x.dim()) + [a["index"]]
    indices: list[Any] = []
    for i in given:  # a mask stands for as many axes as it has
        indices += [i] * (i.dim() if i is not None and i.dtype in (torch.bool, torch.uint8) else 1)
    at = [d for d, i in enumerate(indices) if i is not None]
    for d in at:
        t.whole(x, d, "")
    if at != list(range(at[0], at[0] + len(at))):
        for block in t.blocks(x):
            t.freeze(block.ids, "it is indexed along separate axes")
        return
    grown = out.dim() - x.dim()
    axes = {d: d if d < at[0] else d + grown for d in range(x.dim()) if d not in at}
    _relabel(t, out, t.blocks(x), axes)


def first_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a model on the example inputs; its own failure becomes a :class:`RequestError`."""
    try:
        with torch.no_grad(), without_fast_path():
            return model(*args, **kwargs)
    except RequestError:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else ""
        raise RequestError(
            f"The model fails on the example inputs ({type(error).__name__}: {text}): give inputs "
            "that its forward accepts, as a tensor, a tuple or a dict of keywords."
        ) from error


def trace(
    model: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tracer, Any]:
    """Run ``model`` once in evaluation mode and return what was seen, and its output.

    ``tensors``: each parameter and buffer once, by its first name. Every channel of the output is
    frozen: who calls the network expects its shape. A model that fails on the example inputs
    raises :class:`RequestError` with its own message.
    """
    tracer = Tracer(tensors)
    with tracer.watch(model), tracer:
        output = first_run(model, args, kwargs)
    for tensor in tensors_in(output):
        for block in tracer.blocks(tensor):
            tracer.freeze(block.ids, "its channels are the output")
    return tracer, output
