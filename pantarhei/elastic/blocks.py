"""Residual blocks that a network can do without: found by looking for the path that skips them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What a value may meet on its way around a block and still be the block's input, passed on.
_PASSES = frozenset({
    "Add", "Alias", "Clone", "Gelu", "NativeLayerNorm", "Permute", "Relu", "ReshapeAlias", "Silu",
    "Squeeze", "T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View",
})  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """Blocks of one list that run one after the other; a depth of d keeps the first d of them.

    Those that are not ``skippable`` (they change the shape, say) run at every depth.
    """

    name: str
    blocks: tuple[str, ...]
    skippable: tuple[str, ...]

    @property
    def smallest(self) -> int:
        """The least number of blocks that can run."""
        return max(1, len(self.blocks) - len(self.skippable))

    def skipped(self, depth: int) -> tuple[str, ...]:
        """Return the blocks that do not run when ``depth`` of them do: the last ones that can."""
        gone = max(0, len(self.blocks) - depth)
        return self.skippable[len(self.skippable) - gone :] if gone else ()


def first_tensor(value: Any) -> Tensor | None:
    """Return the tensor a module passes on: its output, or the first of a tuple or data class."""
    if is_dataclass(value) and not isinstance(value, (type, dict)):
        value = vars(value)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def _goes_around(out: Tensor, start: Any) -> bool:
    """Say whether a node of the graph reaches a tensor by sums alone (and what commutes with them).

    At least one sum has to be on the way: an identity is no residual block.
    """
    seen: set[tuple[Any, bool]] = set()
    todo = [(out.grad_fn, False)]
    while todo:
        node, added = todo.pop()
        if node is None or (node, added) in seen:
            continue
        seen.add((node, added))
        if node is start:
            if added:
                return True
            continue
        kind = re.sub(r"Backward\d*$", "", node.name())
        if kind in _PASSES:
            todo += [(below, added or kind == "Add") for below, _ in node.next_functions]
    return False


def _verdict(x: Any, start: Any, out: Any) -> str | None:
    """Say why a block that got ``x`` and returned ``out`` has to run, or None when it can go."""
    result = first_tensor(out)
    if not isinstance(x, Tensor) or result is None:
        return "it does not pass on a tensor"
    if result.shape != x.shape or result.dtype != x.dtype:
        return f"it turns shape {tuple(x.shape[1:])} into {tuple(result.shape[1:])}"
    if not isinstance(out, (Tensor, tuple)) or (
        isinstance(out, tuple) and any(v is not None for v in out[1:])
    ):
        return "it returns more than the tensor it passes on"
    if start is None or not _goes_around(result, start):
        return "it has no residual path around it"
    return None


@dataclass
class _Call:
    """One call of a block: why it has to run (None: it can go), and the form of its output."""

    why: str | None
    nones: int | None


def _watch_blocks(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, list[_Call]]:
    """Run a model once, with the autograd graph as a record of what goes around each block."""
    calls: dict[str, list[_Call]] = {}
    starts: dict[str, list[Any]] = {}

    def enter(name: str) -> Any:
        def hook(_: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> Any:
            x = a[0] if a else None
            if not isinstance(x, Tensor) or not x.is_floating_point():
                starts.setdefault(name, []).append(None)
                return None
            x = (x if x.requires_grad else x.detach().requires_grad_()).clone()
            starts.setdefault(name, []).append(x.grad_fn)
            return (x, *a[1:]), k

        return hook

    def leave(name: str) -> Any:
        def hook(_: nn.Module, a: tuple[Any, ...], k: dict[str, Any], out: Any) -> None:
            why = _verdict(a[0] if a else None, starts[name].pop(), out)
            nones = len(out) - 1 if isinstance(out, tuple) else None
            calls.setdefault(name, []).append(_Call(why, nones))

        return hook

    for name, module in model.named_modules():
        if name and next(module.children(), None) is not None:
            module.register_forward_pre_hook(enter(name), with_kwargs=True)
            module.register_forward_hook(leave(name), with_kwargs=True)
    with torch.enable_grad():
        model(*args, **kwargs)
    return calls


def find_stages(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    exits: Sequence[str] = (),
) -> tuple[list[Stage], dict[str, str], dict[str, int | None]]:
    """Return the stages of ``model`` whose depth can change, and why other blocks have to run.

    Third comes the form of what each skippable block returns: None for a tensor, else the number of
    Nones that follow it in a tuple. A block with one of the ``exits`` inside has to run.

    A block is skippable when it is called once, returns what it gets in shape and type, and passes
    its input around itself by a residual sum. Innermost blocks that stand in a list
    (``nn.Sequential``, ``nn.ModuleList``) count; one that cannot be skipped (it down-samples, say)
    begins a new stage and always runs.
    """
    calls = _watch_blocks(model, args, kwargs)
    modules = dict(model.named_modules())
    why: dict[str, str] = {}

    def skippable(name: str) -> bool:
        reason = (
            calls[name][0].why
            if len(calls.get(name, [])) == 1
            else ("it runs more than once or not at all")
        )
        if any(e.startswith(f"{name}.") for e in exits):
            reason = "an exit is inside it"
        if reason:
            why[name] = reason
        return not reason

    containers = {
        name: [f"{name}.{c}" if name else c for c, _ in m.named_children()]
        for name, m in modules.items()
        if isinstance(m, (nn.Sequential, nn.ModuleList))
    }
    found: dict[str, list[str]] = {}
    for name, children in reversed(containers.items()):  # children come before what holds them
        inner = [c for c in children if any(f"{s}.".startswith(f"{c}.") for s in found)]
        composite = [c for c in children if next(modules[c].children(), None) is not None]
        if not inner and composite:
            good = [c for c in composite if skippable(c)]
            if good:
                found[name] = good
    stages = [
        stage
        for name, good in reversed(found.items())
        for stage in _split(name, [c for c in containers[name] if c in calls], good)
    ]
    # The reasons that matter: of blocks beside skippable ones, or of all where there are none.
    beside = {c for name in found for c in containers[name]}
    reasons = {b: r for b, r in why.items() if b in beside or not stages}
    return stages, reasons, {b: calls[b][0].nones for s in stages for b in s.skippable}


def _split(container: str, children: list[str], skippable: list[str]) -> list[Stage]:
    """Cut a list of blocks into stages: each begins where a block has to run."""
    runs: list[list[str]] = []
    for child in children:
        if not runs or child not in skippable:
            runs.append([])
        runs[-1].append(child)
    runs = [run for run in runs if len(run) > 1]
    whole = len(runs) == 1
    return [
        Stage(container if whole else run[0], tuple(run), tuple(c for c in run if c in skippable))
        for run in runs
    ]
