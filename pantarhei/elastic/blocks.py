"""Residual blocks that a network can do without: found by looking for the path that skips them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What a value may meet on its way around a block and still be the block's input, passed on.
_PASSES = ("Add", "Relu", "Gelu", "Silu", "LayerNorm", "View", "Transpose", "Permute", "Clone",
           "Reshape", "Alias", "ToCopy", "Unsqueeze", "Squeeze", "Contiguous")  # fmt: skip


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
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    return (
        value[0]
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor)
        else None
    )


def _goes_around(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Say whether the input reaches the output by additions alone (and what commutes with them)."""
    leaf = args[0].detach().clone().requires_grad_(True)
    with torch.enable_grad():
        out = first_tensor(module(leaf.clone(), *args[1:], **kwargs))
    seen: set[tuple[Any, bool]] = set()
    todo = [(out.grad_fn if out is not None else None, False)]
    while todo:
        node, added = todo.pop()
        if node is None or (node, added) in seen:
            continue
        seen.add((node, added))
        if getattr(node, "variable", None) is leaf:
            if added:
                return True
            continue
        if any(word in node.name() for word in _PASSES):
            added = added or "Add" in node.name()
            todo += [(below, added) for below, _ in node.next_functions]
    return False


def find_stages(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Stage], dict[str, str], dict[str, Any]]:
    """Return the stages of ``model`` whose depth can change, why other blocks have to run, and the
    form of what each skippable block returns.

    A block is skippable when it is called once, returns what it gets in shape and type, and passes
    its input around itself by a residual sum. Innermost blocks that stand in a list
    (``nn.Sequential``, ``nn.ModuleList``) count; one that cannot be skipped (it down-samples, say)
    begins a new stage and always runs.
    """
    calls: dict[str, list[tuple[Any, Any, Any]]] = {}

    def keep(name: str) -> Any:
        return lambda _, a, k, out: calls.setdefault(name, []).append((a, k, out))

    modules = dict(model.named_modules())
    handles = [
        m.register_forward_hook(keep(name), with_kwargs=True)
        for name, m in modules.items()
        if name and next(m.children(), None) is not None
    ]
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()

    why: dict[str, str] = {}

    def skippable(name: str) -> bool:
        if len(calls.get(name, [])) != 1:
            why[name] = "it runs more than once or not at all"
            return False
        a, k, out = calls[name][0]
        result = first_tensor(out)
        if not a or not isinstance(a[0], Tensor) or result is None:
            why[name] = "it does not pass on a tensor"
        elif result.shape != a[0].shape or not result.is_floating_point():
            why[name] = f"it turns shape {tuple(a[0].shape[1:])} into {tuple(result.shape[1:])}"
        elif not isinstance(out, Tensor) and any(v is not None for v in list(out)[1:]):
            why[name] = "it returns more than the tensor it passes on"
        elif not _goes_around(modules[name], a, k):
            why[name] = "it has no residual path around it"
        else:
            return True
        return False

    containers = {
        name: [f"{name}.{c}" if name else c for c, _ in m.named_children()]
        for name, m in modules.items()
        if isinstance(m, (nn.Sequential, nn.ModuleList))
    }
    found: dict[str, list[str]] = {}
    for name, children in reversed(containers.items()):  # children come before what holds them
        inner = [c for c in children if any(s.startswith(c + ".") for s in found)]
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
    return stages, reasons, {b: calls[b][0][2] for s in stages for b in s.skippable}


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
