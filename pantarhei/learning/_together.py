"""Many trainings of one network at once: several initialisations, each at several learning rates.

The weights of all of them are stacked and the network runs under ``torch.func.vmap``: a linear
layer becomes one batched matrix product. What has diverged is taken out of the stack. Any network
that cannot run so is trained one by one through ``fit``, to the same result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei._fit_loss import scalar
from pantarhei._fit_random import mix, own_randomness, seed_all
from pantarhei._stacked import WithLoss, call_members
from pantarhei.errors import RequestError
from pantarhei.fit import Loss, Step, fit
from pantarhei.learning.parametrization import ADAM_EPS, Parametrized

_CHECK = 10  # steps between two looks at the losses: each waits for the device
_CHUNK = 2**26  # weights that train at a time, of all members together
_POINTS = 30  # of a curve


@dataclass
class Outcome:
    """How one training ended; ``loss`` is None where it diverged after ``steps`` steps.

    ``curve`` is the training loss, as means over equal parts of the steps.
    """

    loss: float | None = None
    steps: int = 0
    curve: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What the trainings of a sweep share.

    ``evaluate`` are the batches of the final loss; without any it is the mean training loss of the
    last tenth of the steps. A loss that is not finite, rises to ``limit`` times the first one, or
    ends more than 5 % above the first one has diverged.
    """

    batches: Callable[[int], Any]
    loss: Loss
    steps: int
    evaluate: Sequence[Any] = ()
    limit: float = 10.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    precision: str = "32"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the loss is computed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def diverged(self, loss: float, first: float) -> bool:
        """Tell whether a loss on the way is beyond recall."""
        return not math.isfinite(loss) or loss > self.limit * abs(first)

    def outcome(self, losses: Sequence[float], final: float | None) -> Outcome:
        """Sum a finished training up; ``final`` is its evaluated loss, if there is one."""
        if final is None:
            tail = losses[-max(1, len(losses) // 10) :]
            final = sum(tail) / len(tail)
        parts = min(_POINTS, len(losses))
        edges = [i * len(losses) // parts for i in range(parts + 1)]
        curve = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
        good = math.isfinite(final) and final <= 1.05 * losses[0]
        return Outcome(final if good else None, len(losses), curve)


def train_together(
    starts: Sequence[Parametrized], lrs: Sequence[float], plan: Plan
) -> list[list[Outcome]]:
    """Train every start at every rate; return the outcomes by start, then by rate.

    Raises whatever the network raises where it cannot run under vmap.
    """
    pairs = [(start, lr) for start in starts for lr in lrs]
    chunk = max(1, _CHUNK // sum(p.numel() for p in starts[0].model.parameters()))
    flat: list[Outcome] = []
    with own_randomness(plan.device):
        for first in range(0, len(pairs), chunk):
            flat += _Stack(pairs[first : first + chunk], plan).train()
    return [flat[i : i + len(lrs)] for i in range(0, len(flat), len(lrs))]


def train_alone(start: Parametrized, lr: float, plan: Plan) -> Outcome:
    """Train one copy of a start at one rate, through ``fit``."""
    start, losses, found = copy.deepcopy(start), list[float](), list[float]()

    def watch(step: Step) -> str | None:
        losses.append(float(step.values["loss"]))
        return "diverged" if plan.diverged(losses[-1], losses[0]) else None

    def mean_loss(model: nn.Module) -> float:
        with plan.autocast():
            found[:] = [float(scalar(plan.loss(model, batch))) for batch in on(plan, plan.evaluate)]
        return sum(found) / len(found)

    sgd = start.optimizer_name == "sgd"
    options: dict[str, Any] = {"momentum": plan.momentum} if sgd else {"betas": plan.betas}
    try:
        result = fit(
            start.model,
            plan.batches,
            plan.loss,
            steps=plan.steps,
            optimizer=lambda _: start.optimizer(lr, plan.weight_decay, **options),
            validate=mean_loss if plan.evaluate else None,
            seed=plan.seed,
            precision="bf16" if plan.precision == "bf16" else "32",
            device=plan.device,
            quiet=True,
            on_step=watch,
        )
    except RequestError:
        # fit refuses a loss or weights that are not finite; here that is a result.
        weights = nn.utils.parameters_to_vector(start.model.parameters())
        if losses and not (math.isfinite(losses[-1]) and bool(weights.isfinite().all())):
            return Outcome(None, len(losses))
        raise
    if result.stopped == "diverged":
        return Outcome(None, len(losses))
    return plan.outcome(losses, sum(found) / len(found) if found else None)


def on(plan: Plan, batches: Any) -> Any:
    """Move tensors in nested containers to the plan's device."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(plan.device), batches)


class _Stack:
    """The stacked weights of some trainings, and their optimizers' states."""

    def __init__(self, pairs: Sequence[tuple[Parametrized, float]], plan: Plan):
        first = pairs[0][0]
        self.plan, self.optimizer = plan, first.optimizer_name
        self.module = WithLoss(first.model.to(plan.device), plan.loss)
        self.weights: dict[str, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        tensors = [
            {**dict(s.model.named_buffers()), **dict(s.model.named_parameters())} for s, _ in pairs
        ]
        for name, tensor in tensors[0].items():
            stacked = torch.stack([held[name].detach().to(plan.device) for held in tensors])
            trains = isinstance(tensor, nn.Parameter) and tensor.requires_grad
            (self.weights if trains else self.constants)[name] = stacked
        self.lrs = torch.tensor([lr for _, lr in pairs], dtype=torch.float64, device=plan.device)
        self.factors = {
            name: torch.tensor([s.scalings[name].lr for s, _ in pairs], dtype=torch.float64).to(
                plan.device
            )
            for name in self.weights
        }
        self.moments: tuple[dict[str, Tensor], ...] = ()
        self.members = list(range(len(pairs)))
        self.losses: list[list[float]] = [[] for _ in pairs]
        self.outcomes = [Outcome() for _ in pairs]

    def train(self) -> list[Outcome]:
        plan, waiting = self.plan, list[Tensor]()
        self.module.train()
        for step in range(plan.steps):
            seed_all(mix(plan.seed, 0, step), plan.device)
            leaves = {name: w.requires_grad_() for name, w in self.weights.items()}
            losses = self._losses(leaves, on(plan, plan.batches(step)))
            gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
            self.weights = {name: w.detach() for name, w in leaves.items()}
            waiting.append(losses.detach())
            self._update(step, dict(zip(self.weights, gradients, strict=True)))
            if len(waiting) == _CHECK or step + 1 == plan.steps:
                self._look(torch.stack(waiting, 1).tolist())
                waiting = []
            if not self.members:
                break
        self._finish()
        return self.outcomes

    def _losses(self, weights: Mapping[str, Tensor], batch: Any) -> Tensor:
        named = {f"model.{name}": t for name, t in {**self.constants, **weights}.items()}
        with self.plan.autocast():
            return call_members(self.module, named, batch)

    @torch.no_grad()
    def _update(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """One step of SGD, Adam or AdamW as torch.optim does it, each member at its own rate."""
        plan, sgd = self.plan, self.optimizer == "sgd"
        needed = (1 if plan.momentum else 0) if sgd else 2
        if len(self.moments) < needed:
            self.moments = tuple(
                {n: torch.zeros_like(w) for n, w in self.weights.items()} for _ in range(needed)
            )
        for name, w in self.weights.items():
            g, shape = gradients[name], (-1, *[1] * (w.dim() - 1))
            rate = (self.lrs * self.factors[name]).to(w).view(shape)
            if plan.weight_decay:
                if self.optimizer == "adamw":
                    w.mul_(1 - (self.lrs * plan.weight_decay).to(w).view(shape))
                else:
                    g = g + (plan.weight_decay / self.factors[name]).to(w).view(shape) * w
            if sgd:
                if plan.momentum:
                    g = self.moments[0][name].mul_(plan.momentum).add_(g)
                w.sub_(g * rate if plan.momentum else g.mul_(rate))
                continue
            (first, second), mean, square = plan.betas, *(m[name] for m in self.moments)
            mean.lerp_(g, 1 - first)
            square.mul_(second).addcmul_(g, g, value=1 - second)
            below = square.sqrt().div_(math.sqrt(1 - second ** (step + 1))).add_(ADAM_EPS)
            w.addcdiv_(mean * rate, below, value=-1 / (1 - first ** (step + 1)))

    def _look(self, recent: list[list[float]]) -> None:
        """Take the losses in, and what diverged out of the stack."""
        kept = []
        for place, (member, losses) in enumerate(zip(self.members, recent, strict=True)):
            seen = self.losses[member]
            seen += losses
            bad = [i for i, loss in enumerate(seen) if self.plan.diverged(loss, seen[0])]
            if bad:
                self.outcomes[member] = Outcome(None, bad[0] + 1)
            else:
                kept.append(place)
        if len(kept) < len(self.members):
            self._keep(kept)

    def _keep(self, places: list[int]) -> None:
        index = torch.tensor(places, dtype=torch.long, device=self.plan.device)
        self.members = [self.members[place] for place in places]
        self.lrs = self.lrs[index]
        for held in (self.weights, self.constants, self.factors, *self.moments):
            held.update({name: t[index] for name, t in held.items()})

    @torch.no_grad()
    def _finish(self) -> None:
        final: list[float | None] = [None] * len(self.members)
        if self.plan.evaluate and self.members:
            self.module.eval()
            batches = on(self.plan, self.plan.evaluate)
            total = torch.stack([self._losses(self.weights, batch) for batch in batches])
            final = total.mean(0).tolist()
        for member, loss in zip(self.members, final, strict=True):
            self.outcomes[member] = self.plan.outcome(self.losses[member], loss)
