"""Small models and the invariants that hold for every model and every choice."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from pantarhei.cost import profile
from pantarhei.elastic import Choice, ElasticNet

torch.set_num_threads(1)


# --- invariants -------------------------------------------------------------------------------


def leaves(output: Any) -> list[Tensor]:
    """All tensors in an output: a tensor, a tuple, a dict or a data class."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def same(a: Any, b: Any) -> bool:
    """Whether two outputs hold the same numbers, bit for bit."""
    a, b = leaves(a), leaves(b)
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def counted(module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """What the profiler counts (it knows the products of attention only written out)."""
    with sdpa_kernel(SDPBackend.MATH):
        return profile(module, *args, **kwargs)


def snapshot(module: nn.Module) -> dict[str, Any]:
    """Everything about a module that wrapping and running must not change."""
    tensors = {n: (t, t.detach().clone()) for n, t in module.state_dict(keep_vars=True).items()}
    facts = {
        path: (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), list(vars(m)))
        for path, m in module.named_modules()
    }
    numbers = {
        (path, name): value
        for path, m in module.named_modules()
        for name, value in vars(m).items()
        if isinstance(value, int | float | tuple | str)
    }
    return {"tensors": tensors, "facts": facts, "numbers": numbers}


def unchanged(before: dict[str, Any], module: nn.Module) -> bool:
    after = snapshot(module)
    return (
        before["facts"] == after["facts"]
        and before["numbers"] == after["numbers"]
        and before["tensors"].keys() == after["tensors"].keys()
        and all(
            t is after["tensors"][n][0] and torch.equal(old, t)
            for n, (t, old) in before["tensors"].items()
        )
    )


def some_choices(net: ElasticNet, n: int = 6) -> list[Choice]:
    """The ends, a chain between them, the corners of each axis, and a sample."""
    space = net.space
    if len(space) <= n:
        return list(space)
    corners = [space.largest.replace(**{a: v[0]}) for a, v in space.axes.items()]
    return list(dict.fromkeys([*space.chain(3), *corners, *space.sample(2, seed=1)]))


def check(
    model: nn.Module, net: ElasticNet, *args: Any, choices: Any = None, **kwargs: Any
) -> ElasticNet:
    """Hold the invariants of the design for some choices of ``net``; all in evaluation mode."""
    n = net.batch
    with torch.no_grad():
        assert same(net(*args, **kwargs), model.eval()(*args, **kwargs)), "largest == original"
        for choice in choices or some_choices(net):
            sub = net.extract(choice).eval()
            assert same(net(*args, choice=choice, **kwargs), sub(*args, **kwargs)), str(choice)
            cost, seen = net.cost(choice), counted(sub, args, kwargs)
            assert (cost.macs * n, cost.params, cost.bytes) == (seen.macs, seen.params, seen.bytes)
            assert no_trace(sub)
        check_storage(net)
        check_monotone(net)
    return net


def no_trace(module: nn.Module) -> bool:
    """Whether a module keeps nothing of this library."""
    return not any(
        type(value).__module__.startswith("pantarhei")
        for m in module.modules()
        for value in (m, *vars(m).values())
    )


def check_storage(net: ElasticNet) -> None:
    """A choice's tensors are views of the full ones wherever the kept channels are contiguous."""
    plan = net.plan(net.space.smallest)
    with net._body(plan, net.space.smallest) as body:
        for name, tensor in net.tensors().items():
            path, slot = net._structure.slots[name][0]
            bound = {**body.index[path]._parameters, **body.index[path]._buffers}[slot]
            if all(cut.index is None for cut in plan.cuts.get(name, ())):
                assert bound.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def check_monotone(net: ElasticNet) -> None:
    """Costs never fall along a nested chain, nor along one axis."""
    space, top = net.space, net.space.largest
    chains = [space.chain(max(map(len, space.axes.values())))]
    chains += [[top.replace(**{a: v}) for v in values] for a, values in space.axes.items()]
    for chain in chains:
        for a, b in itertools.pairwise(chain):
            assert a <= b
            small, large = net.cost(a), net.cost(b)
            assert small.macs <= large.macs
            assert small.params <= large.params
            assert small.bytes <= large.bytes
