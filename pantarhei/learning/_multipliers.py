"""Multipliers that stay in the model: of weights, of residual branches, of attention logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from pantarhei.errors import RequestError, nearest
from pantarhei.learning._roles import Shapes, affine, counterpart


class Times(nn.Module):
    """A stored tensor's multiplier."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


class TimesRows(nn.Module):
    """Multiply the first rows, those that make the queries."""

    def __init__(self, factor: float, rows: int):
        super().__init__()
        self.factor, self.rows = factor, rows

    def forward(self, weight: Tensor) -> Tensor:
        return torch.cat([self.factor * weight[: self.rows], weight[self.rows :]])


@dataclass(frozen=True)
class TimesInput:
    """Forward pre-hook that multiplies the first argument."""

    factor: float

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.factor * args[0], *args[1:])


@dataclass(frozen=True)
class TimesOutput:
    """Forward hook that multiplies the output, the first one of several."""

    factor: float

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # attention layers return their weights as well
            return (self.factor * output[0], *output[1:])
        return self.factor * output


@dataclass(frozen=True)
class Depth:
    """The residual branches: what multiplies their outputs, where, and the blocks around them."""

    factor: float = 1.0
    folded: tuple[nn.Module, ...] = ()
    hooked: tuple[nn.Module, ...] = ()
    blocks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        base: nn.Module | Shapes | None,
        patterns: Sequence[str],
        exponent: float,
    ) -> Depth:
        """Find the branches in the model and count them in the base."""
        if not patterns or exponent == 0:
            return cls()
        modules = dict(model.named_modules())
        names = [name for name in modules if _matches(name, patterns)]
        there = _module_paths(base) if base is not None else set()
        count = sum(_matches(name, patterns) for name in there) if base is not None else 1
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in modules):
                raise RequestError(
                    f"no module is called '{pattern}', as branches= says ('*' stands for one part "
                    f"between dots).{nearest(pattern, modules)}"
                )
        if count == 0:
            raise RequestError(f"the base has no residual branch of branches={list(patterns)}.")
        found = [modules[name] for name in names]
        return cls(
            (len(names) / count) ** -exponent,
            tuple(module for module in found if affine(module)),
            tuple(module for module in found if not affine(module)),
            tuple({_block_of(name, set(modules), there) for name in names}),
        )

    def holds(self, parameter: str) -> bool:
        """Say whether a parameter lies in one of the repeated blocks."""
        return any(parameter.startswith(f"{block}.") for block in self.blocks)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    parts = name.split(".")
    return any(
        len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
        for wanted in (pattern.split(".") for pattern in patterns)
    )


def _module_paths(model: nn.Module | Shapes) -> set[str]:
    if isinstance(model, nn.Module):
        return {name for name, _ in model.named_modules()}
    return {".".join(name.split(".")[:i]) for name in model for i in range(name.count(".") + 1)}


def _block_of(branch: str, own: set[str], there: set[str]) -> str:
    """Return the repeated block around a branch: the first index that goes further than the base.

    Where the base is as deep (or there is none) it is the first index, and without one the branch.
    """
    parts = branch.split(".")
    indices = [i for i, part in enumerate(parts) if part.isdigit()]
    for i in indices:
        lead = ".".join([*parts[:i], ""])
        counts = [
            len({n[len(lead) :].split(".")[0] for n in names if n.startswith(lead)})
            for names in (own, there)
        ]
        if counts[0] != counts[1]:
            return ".".join(parts[: i + 1])
    return ".".join(parts[: indices[0] + 1]) if indices else branch


def scale_attention(model: nn.Module, base: nn.Module | Shapes | None) -> None:
    """Scale attention logits by 1/d_head, equal to the model's own scale at the base's d_head."""
    before = dict(base.named_modules()) if isinstance(base, nn.Module) else {}
    for name, module in list(model.named_modules()):
        other = before.get(counterpart(name, before)) if before else None
        slot = next((s for s in ("scaling", "scale") if _is_head_scale(module, s)), None)
        if not slot and not isinstance(module, nn.MultiheadAttention):
            continue
        if base is not None and type(getattr(other, slot or "head_dim", None)) not in (float, int):
            raise RequestError(
                f"the base does not tell the head size of the attention '{name}': give a model "
                "(built on the meta device it takes no memory), not its shapes."
            )
        if slot:
            own = getattr(module, slot)
            setattr(module, slot, own * own / (getattr(other, slot) if base is not None else 1.0))
        elif isinstance(module, nn.MultiheadAttention):
            ratio = module.head_dim / (getattr(other, "head_dim") if base is not None else 1)  # noqa: B009
            _scale_queries_of(module, ratio**-0.5)


def _is_head_scale(module: nn.Module, slot: str) -> bool:
    """Tell the attribute d_head^-1/2 of an attention layer from other numbers of that name."""
    value = getattr(module, slot, None)
    if type(value) is not float or not 0 < value < 1 or "ttention" not in type(module).__name__:
        return False
    return abs(value**-2 - round(value**-2)) < 1e-6 * value**-2


def _scale_queries_of(attention: nn.MultiheadAttention, factor: float) -> None:
    for slot in ("in_proj_weight", "in_proj_bias", "q_proj_weight"):
        if factor != 1.0 and getattr(attention, slot, None) is not None:
            times = TimesRows(factor, attention.embed_dim)
            torch_parametrize.register_parametrization(attention, slot, times)


def scale_queries(model: nn.Module, queries: Mapping[str, float]) -> None:
    """Multiply the queries that the named modules make, given d_head over the base's."""
    modules = dict(model.named_modules())
    for pattern, ratio in queries.items():
        found = [modules[name] for name in modules if _matches(name, [pattern])]
        if not found:
            raise RequestError(
                f"no module is called '{pattern}', as queries= says.{nearest(pattern, modules)}"
            )
        for module in found:
            module.register_forward_hook(TimesOutput(ratio**-0.5))
