r"""Parametrisations: how initial sizes, multipliers and learning rates follow width and depth.

One number :math:`\eta_0` is tuned. A weight :math:`W = m\,w` has :math:`w \sim N(0, \sigma_0^2)`,
a multiplier :math:`m` and the learning rate :math:`\eta_0 c`; with :math:`r` the factor by which a
dimension is larger than in the base model (fan-in, fan-out; :math:`r = 1` where it does not grow),

=========  ==================  =====================  =====================================
kind       m                   c for SGD              c for Adam
=========  ==================  =====================  =====================================
``sp``     1 (σ ~ r_in^-1/2)   1                      1
``ntp``    r_in^-1/2           1                      (r_in r_out)^-1/2; output r_in^-1/2
``mup``    r_in^-1/2;          r_out; output r_in     input 1; hidden r_in^-1/2; output 1
           output r_in^-1
=========  ==================  =====================  =====================================

Biases, gains of norms and embeddings behave as weights of a fan-in that does not grow. Attention
logits are scaled by 1/d_head under ``mup``. ``depth-mup`` is ``mup`` with residual branches
multiplied by :math:`(L/L_0)^{-1/2}`, and Adam's rate in the blocks as well.

Sources: Yang and Hu (arXiv 2011.14522) and Yang et al. (2203.03466) for width, Bordelon et al.
(2309.16620) and Yang et al. (2310.02244) for depth, Jacot et al. (1806.07572) for NTP. What Adam
needs to stay lazy under NTP, and its split over layers, is derived here by counting orders.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

from pantarhei.errors import RequestError, nearest
from pantarhei.learning._multipliers import (
    Depth,
    Times,
    TimesInput,
    TimesOutput,
    scale_attention,
    scale_queries,
)
from pantarhei.learning._roles import (
    ROLES,
    Growth,
    Reference,
    Role,
    Shapes,
    Use,
    growth_of,
    has_values,
    places,
    rms,
)

Kind = Literal["sp", "ntp", "mup", "depth-mup"]
OptimizerName = Literal["sgd", "adam", "adamw"]

KINDS: tuple[Kind, ...] = ("sp", "ntp", "mup", "depth-mup")
OPTIMIZERS: dict[OptimizerName, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

# Adam's epsilon would set a scale of its own that gradients cross as they shrink with the width;
# zero itself gives 0/0 where a gradient is exactly zero (an output layer that starts at zero).
ADAM_EPS = 1e-30


class _Exponents(NamedTuple):
    """Powers of (r_in, r_out): of the multiplier, and of the learning rates of w."""

    multiplier: tuple[float, float]
    sgd: tuple[float, float]
    adam: tuple[float, float]


_HALF = (-0.5, 0.0)
_EXPONENTS: dict[str, dict[str, _Exponents]] = {
    # Multipliers of sp are not learnt through: they are folded into the initial weights.
    "sp": {role: _Exponents(_HALF, (0, 0), (0, 0)) for role in ROLES},
    "ntp": {
        "input": _Exponents(_HALF, (0, 0), (0, -0.5)),
        "hidden": _Exponents(_HALF, (0, 0), (-0.5, -0.5)),
        "output": _Exponents(_HALF, (0, 0), (-0.5, 0)),
        "fixed": _Exponents(_HALF, (0, 0), (0, 0)),
    },
    "mup": {
        "input": _Exponents(_HALF, (0, 1), (0, 0)),
        "hidden": _Exponents(_HALF, (0, 1), (-0.5, 0)),
        "output": _Exponents((-1.0, 0.0), (1, 0), (0, 0)),
        "fixed": _Exponents(_HALF, (0, 0), (0, 0)),
    },
}


@dataclass(frozen=True)
class Scaling:
    """What a parametrisation does to one parameter.

    Attributes:
        role: ``"input"`` (only its fan-out grows; also biases, norms, embeddings), ``"hidden"``
            (both grow), ``"output"`` (only its fan-in grows) or ``"fixed"`` (nothing grows).
        fan_in, fan_out: The factors r_in and r_out.
        multiplier: The factor m on the stored tensor wherever the model uses it; 1 when folded.
        init: Factor on the stored tensor's initial size at the base width.
        lr: Factor on the learning rate.
    """

    role: Role
    fan_in: float
    fan_out: float
    multiplier: float
    init: float
    lr: float


@dataclass(frozen=True)
class Parametrized:
    """A model in a parametrisation, and the learning rates that belong to it.

    ``scalings`` has an entry per parameter, by its name in ``model`` as it is now.
    """

    model: nn.Module
    kind: Kind
    optimizer_name: OptimizerName
    form: str
    scalings: Mapping[str, Scaling]

    def groups(self, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Return optimizer groups for the trainable parameters: one per distinct factor.

        The decay per step, learning rate times ``weight_decay``, is the same for all of them and
        independent of width and depth (independent weight decay).
        """
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                by_factor.setdefault(self.scalings[name].lr, []).append(parameter)
        if not by_factor:
            raise RequestError(
                "the model has no trainable parameter: call requires_grad_(True) on what to train."
            )
        eps = {} if self.optimizer_name == "sgd" else {"eps": ADAM_EPS}
        return [
            {"params": params, "lr": lr * c, "weight_decay": weight_decay / c, **eps}
            for c, params in by_factor.items()
        ]

    def optimizer(
        self, lr: float, weight_decay: float = 0.0, **options: Any
    ) -> torch.optim.Optimizer:
        """Return the optimizer at the tuned rate ``lr``; ``options`` go to it (momentum=0.9)."""
        return OPTIMIZERS[self.optimizer_name](self.groups(lr, weight_decay), **options)


def parametrize(
    model: nn.Module,
    base: nn.Module | Shapes | None = None,
    *,
    roles: Mapping[str, Role] | None = None,
    delta: nn.Module | Shapes | None = None,
    kind: Kind = "mup",
    optimizer: OptimizerName = "sgd",
    form: Literal["effective", "multiplier"] = "effective",
    init: Literal["own", "normal"] | None = None,
    gain: float | Callable[[str], float] = 1.0,
    zero_output: bool = False,
    branches: Sequence[str] = (),
    branch_exponent: float | None = None,
    queries: Mapping[str, float] | None = None,
) -> Parametrized:
    r"""Bring ``model`` into a parametrisation, in place, and return it with its learning rates.

    What a parameter's role is is found by comparing its shape with that of the same parameter in
    ``base``, the same architecture at another width: dimensions that differ grow. At the base's own
    sizes every kind is the model as it was written, so a rate tuned there stays valid.
    Without a base, ``roles`` names all of them and r is the dimension itself: the forms of the
    literature, :math:`W_{hidden} \sim N(0, 1/N)`, :math:`W_{out} \sim N(0, 1/N^2)` under muP.

    Args:
        model: Any module. Tied weights count as input weights, and their use as an output is
            multiplied by a hook.
        base: A model at another width, or its :func:`base_shapes`. It may have another depth where
            the layers that it lacks are repetitions of one block.
        roles: ``{pattern: role}`` by parameter name (``*`` and ``?``), first match; overrides what
            the comparison finds.
        delta: A model at a second width, for one that has the base's own sizes.
        kind: ``"sp"``, ``"ntp"``, ``"mup"`` or ``"depth-mup"``.
        optimizer: Whose learning rates to give.
        form: ``"effective"`` folds the multipliers into the weights and rates: the model stays as
            it was written. ``"multiplier"`` keeps :math:`m` apart
            (``torch.nn.utils.parametrize``). Both follow the same function trajectory.
        init: ``"own"`` keeps the draws of the model's constructor and brings their size to that of
            the base's, times what the parametrisation says. ``"normal"`` draws weights from
            :math:`N(0, g^2 / \mathrm{fan\_in})`, scaled likewise (embeddings :math:`N(0, g^2)`,
            biases zero). Default: ``"own"`` where ``base`` is a model with values.
        gain: :math:`g`, for all or by parameter name; :math:`\sqrt 2` for ReLU.
        zero_output: Start output weights at zero, which muP allows as well.
        branches: Patterns of the modules whose outputs are added to the residual stream. Under
            ``depth-mup`` those outputs are multiplied by :math:`(L/L_0)^{-1/2}`, with
            :math:`L/L_0` the number of branches over that in the base (without a base:
            :math:`L`). A pattern that names linear maps, convolutions or norms is folded into their
            weights under ``form="effective"``; other modules get a hook.
        branch_exponent: Another exponent than 1/2 (``depth-mup``) or 0 (the other kinds).
        queries: ``{pattern of the modules that make queries: d_head / base d_head}``, for attention
            whose scale is hidden in the code. That of ``nn.MultiheadAttention``, and an attribute
            ``scaling`` or ``scale`` of :math:`d_{head}^{-1/2}` (Hugging Face, timm), is found.

    Raises:
        RequestError: For names that do not exist, a base that does not fit, and parameters whose
            role cannot be told.

    >>> def mlp(n):
    ...     return nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, n), nn.Linear(n, 2))
    >>> wide = parametrize(mlp(64), mlp(16), kind="mup", optimizer="adam")
    >>> {name: (s.role, s.lr) for name, s in wide.scalings.items() if "weight" in name}
    {'0.weight': ('input', 1.0), '2.weight': ('hidden', 0.25), '3.weight': ('output', 0.25)}
    >>> sorted(group["lr"] for group in wide.groups(lr=0.01))
    [0.0025, 0.01]
    """
    rules = roles or {}
    _check(model, base, rules, kind, optimizer, form, init, branches)
    reference = Reference.of(model, base, delta)
    own = reference.sizes if reference and reference.sizes and init != "normal" else None
    exponent = (0.5 if kind == "depth-mup" else 0.0) if branch_exponent is None else branch_exponent
    depth = Depth.of(model, base, branches, exponent)
    found = places(model)
    grown = {n: [growth_of(n, use, reference, rules) for use in uses] for n, uses in found.items()}
    if _width(kind) == "mup":
        scale_attention(model, base)
        scale_queries(model, queries or {})
    by_parameter: dict[int, Scaling] = {}
    for name, uses in found.items():
        growths = grown[name]
        growth = min(growths, key=lambda g: ROLES.index(g.role))  # tied weights: the input's
        branch = depth.factor if any(use.module in depth.folded for use in uses) else 1.0
        block = depth.factor if depth.holds(name) else 1.0
        scaling = _scaling(growth, kind, optimizer, form, branch, block)
        by_parameter[id(uses[0].parameter)] = scaling
        _initialise(name, uses[0], growth, scaling, own, gain, zero_output)
        for use, other in zip(uses, growths, strict=True):
            if scaling.multiplier != 1.0:
                times = Times(scaling.multiplier)
                torch_parametrize.register_parametrization(use.module, use.slot, times)
            if other.role == "output" and growth.role == "input" and kind != "sp":
                power = _EXPONENTS[_width(kind)]["output"].multiplier[0]
                use.module.register_forward_pre_hook(TimesInput(other.fan_in**power))
    for module in depth.hooked:
        module.register_forward_hook(TimesOutput(depth.factor))
    scalings = {name: by_parameter[id(p)] for name, p in model.named_parameters()}
    return Parametrized(model, kind, optimizer, form, scalings)


def base_shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the shapes by name that :func:`parametrize` takes as a base; they go into JSON.

    >>> base_shapes(nn.Linear(2, 3))
    {'weight': [3, 2], 'bias': [3]}
    """
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def random_features(parametrized: Parametrized) -> Parametrized:
    """Train the output layer alone: the control in which no feature can be learnt.

    Everything that is not an output weight, or the bias beside one, stops requiring gradients.

    >>> def mlp(n):
    ...     return nn.Sequential(nn.Linear(3, n), nn.ReLU(), nn.Linear(n, 2))
    >>> control = random_features(parametrize(mlp(8), mlp(4)))
    >>> [name for name, p in control.model.named_parameters() if p.requires_grad]
    ['2.weight', '2.bias']
    """
    scalings = parametrized.scalings
    output = {_module_of(name) for name, s in scalings.items() if s.role == "output"}
    if not output:
        raise RequestError(
            "no output weight was found, of which only the fan-in grows: name it with "
            "roles={'head.weight': 'output'}, or give delta= where the model has the base's width."
        )
    for name, parameter in parametrized.model.named_parameters():
        parameter.requires_grad_(
            _module_of(name) in output and scalings[name].role in ("output", "fixed")
        )
    return parametrized


def lazy(parametrized: Parametrized, scale: float) -> Parametrized:
    r"""Scale the output up, the control in which training stays near its linearisation.

    The model becomes :math:`\alpha\,(f_\theta(x) - f_{\theta_0}(x))` (Chizat et al., arXiv
    1812.07956), and the learning rates those at which the output moves as fast as before:
    divided by :math:`\alpha^2` for SGD and by :math:`\alpha` for Adam. The weights then move by
    :math:`1/\alpha`. The model must return one tensor.

    >>> net = parametrize(nn.Linear(2, 1), roles={"*": "output"})
    >>> control = lazy(net, 100.0)
    >>> control.model(torch.ones(1, 2)).item(), control.groups(1.0)[0]["lr"] < 1e-3
    (0.0, True)
    """
    if not scale > 0:
        raise RequestError(f"scale={scale}: choose a positive factor on the output, such as 100.")
    power = 2 if parametrized.optimizer_name == "sgd" else 1
    scalings = {
        f"model.{name}": replace(s, lr=s.lr / scale**power)
        for name, s in parametrized.scalings.items()
    }
    return replace(parametrized, model=_Lazy(parametrized.model, scale), scalings=scalings)


class _Lazy(nn.Module):
    def __init__(self, model: nn.Module, scale: float):
        super().__init__()
        self.model, self.scale = model, scale
        self.start = copy.deepcopy(model).requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.scale * (self.model(*args, **kwargs) - self.start(*args, **kwargs))


def _module_of(name: str) -> str:
    return re.sub(r"\.?(parametrizations\.)?[^.]+(\.original)?$", "", name)


def _width(kind: Kind) -> str:
    return "mup" if kind == "depth-mup" else kind


def _scaling(
    growth: Growth, kind: Kind, optimizer: OptimizerName, form: str, branch: float, block: float
) -> Scaling:
    """Work the table out; ``branch`` multiplies the output, ``block`` is of Adam's rate."""
    exponents = _EXPONENTS[_width(kind)][growth.role]

    def power(pair: tuple[float, float]) -> float:
        return float(growth.fan_in ** pair[0] * growth.fan_out ** pair[1])

    sgd = optimizer == "sgd"
    rate = power(exponents.sgd) if sgd else power(exponents.adam) * block
    static, multiplier = 1.0, power(exponents.multiplier) * branch
    if kind == "sp":
        static, multiplier = power(exponents.multiplier), branch
    if form == "effective":
        rate *= multiplier**2 if sgd else multiplier
        static, multiplier = static * multiplier, 1.0
    return Scaling(growth.role, growth.fan_in, growth.fan_out, multiplier, static, rate)


@torch.no_grad()
def _initialise(
    name: str,
    use: Use,
    growth: Growth,
    scaling: Scaling,
    own: Mapping[str, float] | None,
    gain: float | Callable[[str], float],
    zero_output: bool,
) -> None:
    """Set the stored tensor; ``own`` holds the base's sizes, None where weights are drawn."""
    weight = use.parameter
    if zero_output and growth.role == "output":
        weight.zero_()
    elif own is not None:
        size = rms(weight)
        weight.mul_(scaling.init * own[name] / size if size > 0 else 1.0)
    elif weight.dim() >= 2:
        g = gain(name) if callable(gain) else gain
        weight.normal_().mul_(g / growth.base_fan_in**0.5 * scaling.init)
    elif "bias" in use.slot:
        weight.zero_()
    else:
        weight.mul_(scaling.init)  # the gain of a norm


def _check(
    model: nn.Module,
    base: Any,
    roles: Mapping[str, Role],
    kind: str,
    optimizer: str,
    form: str,
    init: str | None,
    branches: Sequence[str],
) -> None:
    for name, value, known in (
        ("kind", kind, KINDS),
        ("optimizer", optimizer, tuple(OPTIMIZERS)),
        ("form", form, ("effective", "multiplier")),
        ("init", init or "own", ("own", "normal")),
        *(("role", role, ROLES) for role in roles.values()),
    ):
        if value not in known:
            raise RequestError(
                f"{name}={value!r} is unknown: choose {', '.join(known)}.{nearest(value, known)}"
            )
    if base is None and not roles:
        raise RequestError(
            "parametrize needs a base model (the same architecture at another width) or roles=, "
            "such as {'embed*': 'input', 'head*': 'output', '*': 'hidden'}."
        )
    if init == "own" and not has_values(base):
        raise RequestError(
            "init='own' takes the initial sizes from a base model: give one with values (not on "
            "the meta device, not shapes), or init='normal'."
        )
    if kind == "depth-mup" and not branches:
        raise RequestError(
            "kind='depth-mup' multiplies residual branches: name the modules whose outputs are "
            "added to the stream, such as branches=['blocks.*.mlp']."
        )
    if any(torch_parametrize.is_parametrized(module) for module in model.modules()):
        raise RequestError("the model has parametrized weights already: build it anew.")
    names = [name for name, _ in model.named_parameters()]
    for pattern in roles:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RequestError(
                f"no parameter is called '{pattern}', as roles= says.{nearest(pattern, names)}"
            )
