"""Leaving early: heads on the way through a network, and policies that say who leaves where.

A batch runs stage by stage. After each exit's module its head answers for every example still in
the batch, a policy says which of them leave with that answer, and the rest of the network runs on
the others only: the saving is wall-clock. Nothing is changed in the model's code: a forward hook on
the exit's module hands on the smaller batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from pantarhei.elastic.blocks import first_tensor
from pantarhei.elastic.structure import as_call, inputs_only, skeleton
from pantarhei.elastic.trace import first_run
from pantarhei.errors import RequestError, nearest

if TYPE_CHECKING:
    from pantarhei.elastic.net import ElasticNet

Policy: TypeAlias = Callable[[list[Tensor]], Tensor]


# --- policies ---------------------------------------------------------------------------------
# A policy sees the answers so far (logits of exits 1..k for the examples still in the batch) and
# returns which of these examples leave now, as a boolean tensor.


@dataclass(frozen=True)
class Confidence:
    """Leave when the largest class probability reaches ``threshold`` (one, or one per exit).

    >>> Confidence(0.9)([torch.tensor([[5.0, 0.0], [0.1, 0.0]])])
    tensor([ True, False])
    """

    threshold: float | tuple[float, ...]

    def score(self, logits: Tensor) -> Tensor:
        """Return the largest probability of each example, over the last axis."""
        return (
            logits.float().softmax(-1).amax(-1).flatten(1).mean(1)
            if logits.dim() > 2
            else (logits.float().softmax(-1).amax(-1))
        )

    def __call__(self, answers: list[Tensor]) -> Tensor:
        """Return who leaves."""
        return self.score(answers[-1]) >= _at(self.threshold, len(answers))


@dataclass(frozen=True)
class Entropy:
    """Leave when the entropy of the class probabilities, in nats, is at most ``threshold``.

    H = -sum_c p_c log p_c (BranchyNet, arXiv 1709.01686).

    >>> Entropy(0.1)([torch.tensor([[9.0, 0.0], [0.1, 0.0]])])
    tensor([ True, False])
    """

    threshold: float | tuple[float, ...]

    def score(self, logits: Tensor) -> Tensor:
        """Return minus the entropy of each example (larger is surer, as for all policies)."""
        logs = logits.float().log_softmax(-1)
        return (logs.exp() * logs).sum(-1).reshape(len(logits), -1).mean(1)

    def __call__(self, answers: list[Tensor]) -> Tensor:
        """Return who leaves."""
        return self.score(answers[-1]) >= -_at(self.threshold, len(answers))


@dataclass(frozen=True)
class Patience:
    """Leave when ``exits`` heads in a row agree on the class (PABEE, arXiv 2006.04152).

    >>> agree, differ = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> Patience(2)([agree]), Patience(2)([agree, agree]), Patience(2)([agree, differ])
    (tensor([False]), tensor([True]), tensor([False]))
    """

    exits: int = 2

    def __call__(self, answers: list[Tensor]) -> Tensor:
        """Return who leaves."""
        if len(answers) < self.exits:
            return torch.zeros(len(answers[-1]), dtype=torch.bool, device=answers[-1].device)
        votes = torch.stack([a.argmax(-1) for a in answers[-self.exits :]])
        return (votes == votes[0]).reshape(self.exits, len(answers[-1]), -1).all(2).all(0)


class Gate(nn.Module):
    """A learned gate: leave when a logistic model believes that the answer is right.

    One model for each exit over (largest probability, its margin to the second, entropy),
    p(right) = sigmoid(w . features + b), fitted by :meth:`fit` on validation data.
    """

    def __init__(self, exits: int, threshold: float = 0.5) -> None:
        super().__init__()
        self.threshold = threshold
        self.weight = nn.Parameter(torch.zeros(exits, 3))
        self.bias = nn.Parameter(torch.zeros(exits))

    @staticmethod
    def features(logits: Tensor) -> Tensor:
        """Return the three features of each example: (n, classes) to (n, 3)."""
        logs = logits.float().log_softmax(-1)
        p = logs.exp()
        top = p.topk(2, -1).values
        return torch.stack([top[:, 0], top[:, 0] - top[:, 1], (p * logs).sum(-1)], -1)

    def score(self, logits: Tensor, exit: int) -> Tensor:
        """Return the probability that the answer of ``exit`` (1, 2, ...) is right."""
        return torch.sigmoid(self.features(logits) @ self.weight[exit - 1] + self.bias[exit - 1])

    def forward(self, answers: list[Tensor]) -> Tensor:
        """Return who leaves."""
        return self.score(answers[-1], len(answers)) >= self.threshold

    def fit(self, answers: Sequence[Tensor], labels: Tensor) -> Gate:
        """Fit to the logits of each exit, (n, classes), and the true classes, (n,)."""
        right = torch.stack([(a.argmax(-1) == labels).float() for a in answers])
        features = torch.stack([self.features(a) for a in answers])
        optimizer = torch.optim.LBFGS(
            self.parameters(), max_iter=100, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            margin = (features * self.weight[:, None]).sum(-1) + self.bias[:, None]
            loss = nn.functional.binary_cross_entropy_with_logits(margin, right)
            loss = loss + 1e-4 * self.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return self


def calibrate(
    net: ElasticNet,
    data: Iterable[Any],
    macs: float,
    policy: type[Confidence] | type[Entropy] = Confidence,
    choice: Any = None,
) -> Confidence | Entropy:
    """Return the policy whose threshold spends at most a share ``macs`` of the network's MACs.

    ``data``: validation batches (an input, or a tuple that begins with it). The threshold is the
    strictest that, on average over these examples, stays within the budget; raises
    :class:`RequestError` when even leaving at the first exit costs more.
    """
    if not net.exits:
        raise RequestError("This network has no exits: make it elastic with exits=(...) first.")
    if not macs > 0:
        raise RequestError(f"macs={macs!r} is no budget: give a share of the MACs above 0.")
    choice = net.space.complete(choice)
    plan = net.plan(choice)
    costs = torch.tensor(net.exit_macs(choice), dtype=torch.float64)
    budget = macs * float(costs[-1])
    scores = []
    with torch.no_grad():
        for batch in data:
            with net.body(plan, evaluate=True) as body:
                answers = body.run_all(*as_call(inputs_only(batch)))[:-1]
            scores.append(torch.stack([policy(0.0).score(as_logits(a)) for a in answers], 1))
    if not scores:
        raise RequestError("calibrate() was given no data: pass at least one validation batch.")
    table = torch.cat(scores).double().cpu()

    def spent(threshold: float) -> float:
        leaves = table >= threshold
        first = torch.where(leaves.any(1), leaves.double().argmax(1), len(costs) - 1)
        return float(costs[first].mean())

    candidates = torch.cat([torch.tensor([-torch.inf]), table.flatten().unique()])
    low, high = 0, len(candidates) - 1
    if spent(float(candidates[0])) > budget:
        raise RequestError(
            f"A budget of {macs:.0%} of the MACs cannot be kept: the first exit alone costs "
            f"{float(costs[0] / costs[-1]):.0%}. Raise the budget or add an earlier exit."
        )
    if spent(torch.inf) <= budget:
        return policy(torch.inf if policy is Confidence else -torch.inf)
    while low < high:  # the cost grows with the threshold
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if spent(float(candidates[middle])) <= budget else (low, middle - 1)
        )
    threshold = float(candidates[low])
    return policy(threshold if policy is Confidence else -threshold)


def _at(threshold: float | tuple[float, ...], exit: int) -> float:
    if not isinstance(threshold, tuple):
        return threshold
    if len(threshold) < exit:
        raise RequestError(f"{len(threshold)} thresholds are too few: exit {exit} has none.")
    return threshold[exit - 1]


def as_logits(output: Any) -> Tensor:
    """Return the logits of an output: a tensor, or what Hugging Face models wrap them in."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    found = logits if isinstance(logits, Tensor) else first_tensor(output)
    if found is None:
        raise RequestError(
            f"The model returns {type(output).__name__}, in which no logits are found: "
            "let it return a tensor, or an object with .logits."
        )
    return found


# --- heads ------------------------------------------------------------------------------------


class PooledHead(nn.Module):
    """Mean over all positions, then a linear layer: logits from features (n, c, ...) or (n, t, c).

    ``channels_last``: the features' last axis holds the channels (token sequences).
    """

    def __init__(self, channels: int, classes: int, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n, classes)."""
        axes = range(1, x.dim() - 1) if self.channels_last else range(2, x.dim())
        pooled = x.mean(list(axes)) if len(axes) else x
        return self.linear(self.norm(pooled))


class Stop(BaseException):
    """Ends a forward pass at an exit, with its answer; no model's ``except Exception`` holds it."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer


@dataclass
class Exits:
    """The exits of a network: after which modules, and with which heads."""

    names: tuple[str, ...]
    heads: list[nn.Module]

    @classmethod
    def find(
        cls,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        exits: str | Sequence[str] | Mapping[str, nn.Module | None],
    ) -> Exits:
        """Look the exits up in ``model``, put them in the order in which they run, build heads."""
        exits = (exits,) if isinstance(exits, str) else exits
        if not isinstance(exits, (Sequence, Mapping)) or not all(isinstance(n, str) for n in exits):
            raise RequestError(
                f"exits={exits!r} names no modules: give a tuple of names from "
                "model.named_modules(), or a mapping from names to heads."
            )
        modules = dict(model.named_modules())
        for name in exits:
            if name not in modules or not name:
                raise RequestError(
                    f"The model has no module '{name}' to exit after: see "
                    f"model.named_modules().{nearest(name, modules)}"
                )
        order: dict[str, Tensor | None] = {}
        body = skeleton(model).eval()

        def note(name: str) -> Callable[..., None]:
            def hook(_: Any, __: Any, out: Any) -> None:
                if name in order:
                    raise RequestError(
                        f"The module '{name}' runs more than once in a forward pass: exit after "
                        "one that runs once."
                    )
                order[name] = first_tensor(out)

            return hook

        for name in exits:
            body.get_submodule(name).register_forward_hook(note(name))
        output = as_logits(first_run(body, args, kwargs))
        given = exits if isinstance(exits, Mapping) else dict.fromkeys(exits)
        heads = []
        for name in order if len(order) == len(given) else exits:
            out = order.get(name)
            if out is None:
                raise RequestError(
                    f"The module '{name}' passes on no tensor in a forward pass: choose another."
                )
            head = given[name]
            if head is None:
                if output.dim() != 2:
                    raise RequestError(
                        f"The model's output has shape {tuple(output.shape)}; a head is built only "
                        f"for (batch, classes): give exits={{'{name}': head}}."
                    )
                last = out.dim() == 3
                head = PooledHead(out.shape[-1 if last else 1], output.shape[-1], last)
                head = head.to(out.device, out.dtype).train(model.training)
            heads.append(head)
        return cls(tuple(order), heads)

    def check_batches(self, net: ElasticNet) -> None:
        """Make sure that the network runs on after each exit with fewer examples, and correctly.

        Raises :class:`RequestError` naming the exit after which the code insists on the full batch.
        """
        n = net.batch
        (args, kwargs), rows = _enlarge(net.example, n)
        single = carriers(net, *net.example, n)
        net._carriers = single & carriers(net, args, kwargs, rows)
        plan = net.plan()
        for at in range(len(self.names)):
            picks = iter([torch.arange(rows) % 2 == 0])

            def leave(answers: list[Tensor], at: int = at, picks: Any = picks) -> Tensor:
                here = len(answers) == at + 1
                none = torch.zeros(len(answers[-1]), dtype=torch.bool)
                return next(picks) if here else none

            try:
                got = net.adaptive(*args, policy=leave, **kwargs).logits[1::2]
                with torch.no_grad(), net.body(plan, evaluate=True) as body:
                    want = as_logits(body.run(args, kwargs, None))[1::2]
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
            except (RuntimeError, ValueError, IndexError, AssertionError, TypeError) as error:
                raise RequestError(
                    f"After the exit '{self.names[at]}' the model does not run on a smaller batch "
                    f"({str(error).splitlines()[0]}): exit where one tensor carries all examples."
                ) from error


def carriers(
    net: ElasticNet, args: tuple[Any, ...], kwargs: dict[str, Any], n: int
) -> frozenset[tuple[str, str, int]]:
    """Return which tensors that modules take and return have ``n`` rows: (module, side, position).

    What has as many rows as the batch at two batch sizes holds one row for each example; a tensor
    that only happens to be as long (positions, windows of an image) does not.
    """
    found: dict[tuple[str, str, int], bool] = {}

    def note(path: str, side: str, value: Any) -> None:
        for position, leaf in enumerate(tree_leaves(value)):
            if isinstance(leaf, Tensor):
                key = (path, side, position)
                found[key] = found.get(key, True) and leaf.dim() > 0 and len(leaf) == n

    with net.body(net.plan(), evaluate=True) as body:
        handles = []
        for path, module in body.index.items():
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, a, k, path=path: note(path, "in", (a, k)), with_kwargs=True
                )
            )
            handles.append(
                module.register_forward_hook(lambda _, __, out, path=path: note(path, "out", out))
            )
        with torch.no_grad():
            body.run(args, kwargs, None)
        for handle in handles:
            handle.remove()
    return frozenset(key for key, carries in found.items() if carries)


def _enlarge(inputs: Any, n: int) -> tuple[Any, int]:
    """Repeat a batch of ``n``, turned round, to at least 4 rows; return it and how many it has."""
    times = 4 if n == 1 else 2

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != n:
            return value
        return torch.cat([value, value.flip(0)] * (times // 2))

    return tree_map(repeat, inputs), times * n


class Root(nn.Module):
    """The model and its exit heads under one roof: what is traced, bound to a choice, and run."""

    def __init__(self, model: nn.Module, heads: nn.ModuleList, exits: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.heads, self.exits = model, heads, exits

    @cached_property
    def index(self) -> dict[str, nn.Module]:
        """All modules by name, skipped blocks included."""
        return dict(self.named_modules())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model and every head."""
        return self.run_all(args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], exit: int | None) -> Any:
        """Run the model, or as far as an exit and its head."""
        if exit is None:
            return self.model(*args, **kwargs)

        def leave(_: Any, __: Any, out: Any) -> None:
            raise Stop(self.heads[exit](first_tensor(out)))

        handle = self.model.get_submodule(self.exits[exit]).register_forward_hook(leave)
        try:
            self.model(*args, **kwargs)
        except Stop as stop:
            return stop.answer
        finally:
            handle.remove()
        raise RequestError(f"The exit '{self.exits[exit]}' was not reached by this input.")

    def run_all(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Run the model and every head; return the heads' answers and the model's output."""
        answers: list[Any] = [None] * len(self.exits)

        def answer(at: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, out: Any) -> None:
                answers[at] = self.heads[at](first_tensor(out))

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_hook(answer(at))
            for at, name in enumerate(self.exits)
        ]
        try:
            output = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return [*answers, output]

    def export(self, args: tuple[Any, ...], kwargs: dict[str, Any], exit: int) -> nn.Module:
        """Return the part of the model that runs up to an exit as a plain graph module."""
        part = _Prefix(self, exit).eval()
        n = next(v.shape[0] for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        # A batch of one would be taken for a constant.
        (args, kwargs), rows = _enlarge((args, kwargs), n)
        batch = torch.export.Dim("batch", min=1)

        def free(value: Any) -> Any:
            moves = isinstance(value, Tensor) and value.dim() and len(value) == rows
            return {0: batch} if moves else None

        named = inspect.signature(part.forward).bind(*args, **kwargs).arguments
        shapes = {name: tree_map(free, value) for name, value in named.items()}
        exported = torch.export.export(part, args, kwargs, dynamic_shapes=shapes, strict=False)
        return _used_only(exported.module()).eval()


class _Prefix(nn.Module):
    def __init__(self, root: Root, exit: int) -> None:
        super().__init__()
        self.root = root

        @functools.wraps(root.model.forward)  # the exporter names inputs by the model's signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            # What runs after the exit is dead code to the exporter (which cannot follow a Stop).
            return root.run_all(args, kwargs)[exit]

        self.forward = forward


def _used_only(graph: nn.Module) -> nn.Module:
    """Remove what a graph module's output does not need: operations, parameters, submodules."""
    assert isinstance(graph, torch.fx.GraphModule)
    # Dropout in evaluation mode and shape guards count as impure, and would keep dead code alive.
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.recompile()
    used = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    # Exported graphs refuse train() and eval(); this is the same graph as an ordinary module.
    graph = torch.fx.GraphModule(graph, graph.graph)
    for path, module in graph.named_modules():
        for table in (module._parameters, module._buffers):
            for name in list(table):
                if (f"{path}.{name}" if path else name) not in used:
                    del table[name]
    graph.delete_all_unused_submodules()
    return graph


# --- per-input runs ---------------------------------------------------------------------------


@dataclass
class Adaptive:
    """A per-input run.

    ``logits``: each example's answer; ``exit``: where it left, from 1 (the whole network is the
    last); ``macs``: what it cost, heads on the way included.
    """

    logits: Tensor
    exit: Tensor
    macs: Tensor


def _checked(leaving: Any, n: int) -> Tensor:
    if isinstance(leaving, Tensor) and leaving.shape == (n,) and leaving.dtype == torch.bool:
        return leaving
    shape = f" of shape {tuple(leaving.shape)}" if isinstance(leaving, Tensor) else ""
    raise RequestError(
        f"The policy returned {getattr(leaving, 'dtype', type(leaving).__name__)}{shape}: it has "
        f"to return a boolean tensor with one value for each of the {n} examples."
    )


def _rows(value: Any) -> int:
    return len(value) if isinstance(value, Tensor) and value.dim() else -1


def rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """Return some rows of a tensor, in the order in which it lies in memory (channels last, say).

    >>> x = torch.ones(3, 2, 4, 4).to(memory_format=torch.channels_last)
    >>> rows_of(x, torch.tensor([0, 2])).is_contiguous(memory_format=torch.channels_last)
    True
    """
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if order[0] != 0 or tensor.is_contiguous():
        return tensor.index_select(0, index)
    rows = tensor.permute(order).index_select(0, index)  # copies whole rows
    return rows.permute([order.index(d) for d in range(tensor.dim())])


def run_adaptive(
    body: Root,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    policy: Policy,
    macs: Sequence[int],
    carried: frozenset[tuple[str, str, int]],
) -> Adaptive:
    """Run a bound network once, dropping examples as ``policy`` lets them go.

    ``carried``: the tensors that hold one row for each example, from :func:`carriers`.
    """
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if first is None or not len(first):
        raise RequestError("adaptive() needs a batch of at least one example as a tensor.")
    n = len(first)
    here = torch.arange(n, device=first.device)  # the examples still in the batch
    sizes = {n: here}  # batch sizes on the way, and which examples each held
    kept: dict[int, Tensor] = {}  # by batch size, where those still here were in it
    answers: list[Tensor] = []
    exit = torch.full((n,), len(body.exits) + 1, device=first.device)
    logits: Tensor | None = None

    def settle(answer: Tensor, whose: Tensor, at: int) -> None:
        nonlocal logits
        if logits is None:
            logits = answer.new_empty((n, *answer.shape[1:]))
        logits[whose] = answer.to(logits.dtype)
        exit[whose] = at + 1

    def shrink(path: str, side: str, value: Any) -> Any:
        """Bring tensors that were made for an earlier, larger batch down to the present one."""
        leaves, form = tree_flatten(value)
        for position, leaf in enumerate(leaves):
            rows = len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else len(here)
            if rows != len(here) and (path, side, position) in carried:
                if rows not in kept:
                    kept[rows] = torch.searchsorted(sizes[rows], here)
                leaves[position] = rows_of(leaf, kept[rows])
        return tree_unflatten(leaves, form)

    def hand_on(at: int) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, out: Any) -> Any:
            nonlocal here, answers
            features = first_tensor(out)
            answers.append(as_logits(body.heads[at](features)))
            leaving = _checked(policy(answers), len(here)).to(here.device)
            gone = leaving.nonzero()[:, 0]
            if not len(gone):
                return out
            settle(answers[-1][gone], here[gone], at)
            if len(gone) == len(here):
                raise Stop(None)
            stay = (~leaving).nonzero()[:, 0]
            here, answers = here[stay], [a[stay] for a in answers]
            sizes[len(here)] = here
            kept.clear()
            return shrink(f"model.{body.exits[at]}", "out", out)

        return hook

    def catch_up(path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(sizes) == 1 or (not kwargs and len(args) == 1 and _rows(args[0]) == len(here)):
                return None
            return shrink(path, "in", (args, kwargs))

        return hook

    handles = [
        body.model.get_submodule(name).register_forward_hook(hand_on(at))
        for at, name in enumerate(body.exits)
    ]
    handles += [
        m.register_forward_pre_hook(catch_up(path), with_kwargs=True)
        for path, m in body.index.items()
        if path.startswith("model.")
    ]
    try:
        with torch.no_grad():
            last = as_logits(body.model(*args, **kwargs))
            settle(last, here, len(body.exits))
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    assert logits is not None
    return Adaptive(logits, exit, torch.tensor(macs, device=exit.device)[exit - 1])
