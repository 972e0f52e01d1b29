"""How each parameter of a model grows: found by comparison with the model at another width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from pantarhei.errors import RequestError

Role = Literal["input", "hidden", "output", "fixed"]
Shapes = Mapping[str, Sequence[int]]
ROLES: tuple[Role, ...] = ("input", "hidden", "output", "fixed")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_MATRICES = (nn.Linear, *_CONVOLUTIONS, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


def _is_conv1d(module: nn.Module) -> bool:
    # Hugging Face's Conv1D is a linear map that stores its weight as (in, out).
    return type(module).__name__.endswith("Conv1D") and hasattr(module, "nf")


def affine(module: nn.Module) -> bool:
    """Say whether multiplying weight and bias multiplies the output."""
    kinds = (nn.Linear, *_CONVOLUTIONS, *_NORMS)
    weight = module._parameters.get("weight")
    return (isinstance(module, kinds) or _is_conv1d(module)) and weight is not None


@dataclass(frozen=True)
class Use:
    """One place where the model uses a parameter."""

    path: str
    module: nn.Module
    slot: str
    parameter: nn.Parameter


def places(model: nn.Module) -> dict[str, list[Use]]:
    """Return every use of each parameter, by the name that ``named_parameters`` gives it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    places: dict[str, list[Use]] = {name: [] for name in names.values()}
    for path, module in model.named_modules():
        for slot, parameter in module._parameters.items():
            if parameter is not None:
                places[names[id(parameter)]].append(Use(path, module, slot, parameter))
    return places


@dataclass(frozen=True)
class Reference:
    """The base as the model's parameters see it: by their names, shapes and initial sizes there."""

    shapes: Mapping[str, tuple[int, ...]]
    grows: Mapping[str, tuple[bool, ...]]
    sizes: Mapping[str, float]

    @classmethod
    def of(
        cls, model: nn.Module, base: nn.Module | Shapes | None, delta: nn.Module | Shapes | None
    ) -> Reference | None:
        """Look every parameter up in the base, and in a model of a second width."""
        if base is None:
            return None
        own, there = _shapes(model), _shapes(base)
        names = {name: _base_name(name, own, there) for name in own}
        shapes = {name: there[names[name]] for name in own}
        for name, shape in shapes.items():
            if len(shape) != len(own[name]):
                raise RequestError(
                    f"'{name}' has shape {own[name]} here and {shape} in the base: give a base of "
                    "the same architecture that differs in its sizes alone."
                )
        second = shapes
        if delta is not None:
            other = _shapes(delta)
            second = {name: other[_base_name(name, own, other)] for name in own}
        grows = {
            name: tuple(len({a, b, c}) > 1 for a, b, c in zip(*triple, strict=True))
            for name, triple in ((n, (own[n], shapes[n], second[n])) for n in own)
        }
        values = dict(base.named_parameters()) if has_values(base) else {}  # type: ignore[union-attr]
        sizes = {name: rms(values[names[name]]) for name in own} if values else {}
        return cls(shapes, grows, sizes)


@dataclass(frozen=True)
class Growth:
    """How a parameter grows where it is used: its role, r_in, r_out, and its fan-in at the base."""

    role: Role
    fan_in: float
    fan_out: float
    base_fan_in: float


def growth_of(
    name: str, use: Use, reference: Reference | None, rules: Mapping[str, Role]
) -> Growth:
    shape = tuple(use.parameter.shape)
    role = next((role for pattern, role in rules.items() if fnmatchcase(name, pattern)), None)
    if reference is None:
        if role is None:
            raise RequestError(
                f"no rule of roles= names the parameter '{name}': add {{'{name}': 'hidden'}} or "
                "another role, or give a base model."
            )
        before: tuple[int, ...] = (1,) * len(shape)
    else:
        before = reference.shapes[name]
        role = role or _role(name, use, shape, reference.grows[name])
    if len(shape) < 2 or isinstance(use.module, _EMBEDDINGS):  # no fan-in: it cannot grow
        role = {"hidden": "input", "output": "fixed"}.get(role, role)  # type: ignore[assignment]
    inner, outer = _axes(use, shape, role)
    fan_in, base_fan_in = _fan_in(shape, inner), _fan_in(before, inner)
    if role == "fixed":
        return Growth(role, 1.0, 1.0, fan_in)
    return Growth(
        role,
        fan_in / base_fan_in,
        1.0 if role == "output" or not shape else shape[outer] / before[outer],
        base_fan_in,
    )


def _role(name: str, use: Use, shape: tuple[int, ...], grows: tuple[bool, ...]) -> Role:
    """Tell the role from the dimensions that grow."""
    count = sum(grows)
    if count == 0:
        return "fixed"
    if len(shape) < 2 or isinstance(use.module, _EMBEDDINGS):
        return "input"
    if _is_matrix(use.module) or (len(shape) == 2 and count == 2):
        inner, outer = _axes(use, shape, "hidden")
        if grows[inner or 0] + grows[outer] == count:  # and not the kernel
            return "hidden" if count == 2 else "output" if grows[inner or 0] else "input"
    elif len(shape) > 2 and count == 1 and grows[-1]:
        return "input"  # a position embedding or a token: (1, T, N)
    raise RequestError(
        f"the role of the parameter '{name}' of shape {shape} cannot be told from how it grows in "
        f"a {type(use.module).__name__}: say it with roles={{'{name}': 'input'}}, 'hidden', "
        "'output' or 'fixed'."
    )


def _axes(use: Use, shape: tuple[int, ...], role: Role) -> tuple[int | None, int]:
    """Return the axes of fan-in and of fan-out; None where the input is one-hot or a constant."""
    if len(shape) < 2:
        return None, 0
    if isinstance(use.module, _EMBEDDINGS):
        return None, 1
    if isinstance(use.module, _TRANSPOSED) or _is_conv1d(use.module):
        return 0, 1
    if _is_matrix(use.module) or len(shape) == 2:
        return 1, 0
    last = len(shape) - 1
    return (None, last) if role == "input" else (last, last - 1)  # else: a stack of matrices


def _fan_in(shape: tuple[int, ...], inner: int | None) -> float:
    if inner is None:
        return 1.0
    return float(shape[inner]) * (math.prod(shape[2:]) if inner < 2 else 1)


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, _MATRICES) or _is_conv1d(module)


def _shapes(model: nn.Module | Shapes) -> dict[str, tuple[int, ...]]:
    named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
    return {name: tuple(getattr(shape, "shape", shape)) for name, shape in named}


def has_values(base: nn.Module | Shapes | None) -> bool:
    return isinstance(base, nn.Module) and not any(p.is_meta for p in base.parameters())


def counterpart(name: str, known: Iterable[str]) -> str:
    """Return ``name`` with the indices that ``known`` lacks replaced by the last that it has."""
    paths = [path.split(".") for path in known]
    parts = name.split(".")
    for i, part in enumerate(parts):
        paths = [path for path in paths if len(path) > i]
        there = {path[i] for path in paths}
        if part.isdigit() and part not in there:
            last = max((int(c) for c in there if c.isdigit()), default=-1)
            parts[i] = str(min(last, int(part))) if last >= 0 else part
        paths = [path for path in paths if path[i] == parts[i]]
    return ".".join(parts)


def _base_name(
    name: str, own: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]
) -> str:
    """Return the base's name for a parameter; a block that it lacks stands for its last one.

    That is right where the blocks are repetitions: in the model the two must look the same.
    """
    if name in there:
        return name
    found = counterpart(name, there)
    pairs = zip(name.split("."), found.split("."), strict=True)
    differ = [i for i, (a, b) in enumerate(pairs) if a != b]
    if found not in there or any(
        _block(own, name.split(".")[: i + 1]) != _block(own, found.split(".")[: i + 1])
        for i in differ
    ):
        raise RequestError(
            f"the base has no parameter '{name}', nor a repeated block in its place: build the "
            "base with the same depth and another width."
        )
    return found


def _block(shapes: Mapping[str, tuple[int, ...]], path: list[str]) -> dict[str, tuple[int, ...]]:
    lead = ".".join([*path, ""])
    return {n[len(lead) :]: shape for n, shape in shapes.items() if n.startswith(lead)}


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
