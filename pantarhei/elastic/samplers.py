"""Which sub-networks a training step trains: samplers are data, a trainer is not needed.

A sampler is a callable ``sampler(n)`` that returns the :class:`~pantarhei.elastic.space.Choice`
(or the list of choices) of draw ``n``. It holds no state and depends on ``(seed, n)`` alone, so it
is the same on every rank, survives a resume and pickles. ``Drawn(batches, sampler)`` joins it to
batches and :class:`SampledLoss` turns any criterion into a loss over what was drawn; accumulating
gradients over several draws (SortedNet's ``g_acc``) is the ``accumulate`` of
:func:`pantarhei.fit.fit`.

| training | sampler | loss |
| --- | --- | --- |
| SortedNet (arXiv 2309.00255) | :class:`Uniform`, one choice a draw | :class:`SampledLoss` |
| SortedNet, summation; SoFT (2309.08968) | :class:`Every` | :class:`SampledLoss` |
| slimmable networks (1812.08928) | :class:`Every` over a few | :class:`SampledLoss` |
| universally slimmable (1903.05134) | :class:`Sandwich` | :class:`DistilledLoss` |
| progressive shrinking (1908.09791) | :class:`Progressive` | either |
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pantarhei.elastic.space import Choice, Space, Value
from pantarhei.errors import RequestError

Sampler: TypeAlias = Callable[[int], "Choice | list[Choice]"]
Forward: TypeAlias = Callable[[Any, Any, Choice], Any]
Criterion: TypeAlias = Callable[[Any, Any], Tensor]

TABLE_LIMIT = 100_000
"""The largest space whose costs are tabulated to weight every choice."""


def _generator(seed: int, n: int) -> random.Random:
    """Return the random numbers of draw ``n``: a text seed is hashed, so draws are independent."""
    return random.Random(f"{seed}:{n}")


@dataclass(frozen=True)
class Uniform:
    """Every choice of the grid with the same probability: SortedNet's P_B.

    Along an axis with values 1..d, unit u is trained in a share (d - u + 1) / d of the draws; this
    is what sorts the units by importance (SortedNet sheet, "Gradient reach").

    >>> sampler = Uniform(Space({"depth": (1, 2, 3), "width": (0.5, 1.0)}), seed=1)
    >>> sampler(7) == sampler(7), sampler(7) in sampler.space
    (True, True)
    """

    space: Space
    seed: int = 0

    def __call__(self, n: int) -> Choice:
        """Return the choice of draw ``n``."""
        generator = _generator(self.seed, n)
        # A uniform point of a product is a uniform value on each axis; this needs no len(space),
        # which may be astronomically large.
        return Choice({name: generator.choice(v) for name, v in self.space.axes.items()})


@dataclass(frozen=True)
class PerAxis:
    """Each axis on its own, with weights for its values (axes left out are uniform).

    >>> space = Space({"depth": (1, 2), "width": (0.5, 1.0)})
    >>> only_wide = PerAxis(space, {"width": (0, 1)})
    >>> {only_wide(n)["width"] for n in range(20)}
    {1.0}

    Raises :class:`RequestError` for an unknown axis or weights that do not match its values.
    """

    space: Space
    weights: Mapping[str, Sequence[float]]
    seed: int = 0

    def __post_init__(self) -> None:
        for name, weights in self.weights.items():
            if name not in self.space.axes:
                raise RequestError(
                    f"Weights name the axis '{name}', which the space does not have "
                    f"(it has: {', '.join(self.space.axes)})."
                )
            _check_weights(weights, len(self.space.axes[name]), f"axis '{name}'")

    def __call__(self, n: int) -> Choice:
        """Return the choice of draw ``n``."""
        generator = _generator(self.seed, n)
        return Choice(
            {
                name: generator.choices(values, self.weights.get(name))[0]
                for name, values in self.space.axes.items()
            }
        )


@dataclass(frozen=True)
class Weighted:
    """One of ``choices``, drawn with probability proportional to ``weights``."""

    choices: Sequence[Choice]
    weights: Sequence[float]
    seed: int = 0
    _cumulative: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check_weights(self.weights, len(self.choices), "list of choices")
        object.__setattr__(self, "_cumulative", tuple(itertools.accumulate(self.weights)))

    def __call__(self, n: int) -> Choice:
        """Return the choice of draw ``n``."""
        return _generator(self.seed, n).choices(self.choices, cum_weights=self._cumulative)[0]


def by_cost(
    space: Space, cost: Callable[[Choice], float], power: float = 1.0, seed: int = 0
) -> Weighted:
    """Draw choices with probability proportional to ``cost(choice) ** power``.

    ``power=1`` spends the training on large sub-networks, ``power=-1`` gives each the same expected
    compute, ``0`` is uniform. For an elastic network: ``cost=lambda c: net.cost(c).macs``.

    >>> space = Space({"width": (0.25, 1.0)})
    >>> by_cost(space, lambda c: c["width"]).weights
    (0.25, 1.0)

    Raises :class:`RequestError` for a space too large to tabulate, or a cost that is not positive.
    """
    size = math.prod(len(values) for values in space.axes.values())
    if size > TABLE_LIMIT:
        raise RequestError(
            f"The space has {size:.3g} choices, too many to weight one by one: "
            "use Weighted over space.sample(n), or PerAxis."
        )
    choices = tuple(space)
    costs = [float(cost(choice)) for choice in choices]
    if not all(math.isfinite(c) and c > 0 for c in costs):
        raise RequestError("A choice has a cost that is not a positive number: check `cost`.")
    return Weighted(choices, tuple(c**power for c in costs), seed)


@dataclass(frozen=True)
class Sandwich:
    """The largest choice, ``k`` random ones and the smallest, in this order, in every draw.

    The sandwich rule of universally slimmable networks (arXiv 1903.05134), which trains the bounds
    of the space in each step. The largest comes first because it teaches the others in
    :class:`DistilledLoss`.

    >>> [str(c) for c in Sandwich(Space({"width": (0.25, 0.5, 1.0)}), k=0)(0)]
    ['width=1', 'width=0.25']
    """

    space: Space
    k: int = 2
    seed: int = 0

    def __call__(self, n: int) -> list[Choice]:
        """Return the choices of draw ``n``."""
        generator = _generator(self.seed, n)
        drawn = [
            Choice({name: generator.choice(v) for name, v in self.space.axes.items()})
            for _ in range(self.k)
        ]
        return [self.space.largest, *drawn, self.space.smallest]


@dataclass(frozen=True)
class Cycle:
    """The choices of a fixed list, one after the other, again and again.

    With ``accumulate=len(choices)`` each update averages over the list: summation mode in the
    memory of one sub-network, each on a mini-batch of its own.
    """

    choices: Sequence[Choice]

    def __post_init__(self) -> None:
        _check_some(self.choices)

    def __call__(self, n: int) -> Choice:
        """Return the choice of draw ``n``."""
        return self.choices[n % len(self.choices)]


@dataclass(frozen=True)
class Every:
    """All the choices of a list (or a small space) in every draw: SortedNet's summation mode.

    L = (1 / |B|) sum_b L_b, all on the same mini-batch.
    """

    choices: Iterable[Choice]

    def __post_init__(self) -> None:
        object.__setattr__(self, "choices", tuple(self.choices))
        _check_some(self.choices)

    def __call__(self, n: int) -> list[Choice]:
        """Return all choices, whatever ``n`` is."""
        return list(self.choices)


@dataclass(frozen=True)
class Progressive:
    """Progressive shrinking (Once-for-all, arXiv 1908.09791): values open as training goes on.

    ``opens[axis] = (n1, n2, ...)``: the second largest value of the axis may be drawn from draw
    ``n1`` on, the third largest from ``n2`` on, and so on; an axis left out is open from the start.
    Among the open values the draw is uniform. :meth:`evenly` makes such a schedule.

    >>> sampler = Progressive(Space({"width": (0.25, 0.5, 1.0)}), {"width": (100, 200)})
    >>> [sorted({sampler(n)["width"] for n in r}) for r in (range(100), range(200, 260))]
    [[1.0], [0.25, 0.5, 1.0]]

    Raises :class:`RequestError` for an unknown axis or a schedule of the wrong length.
    """

    space: Space
    opens: Mapping[str, Sequence[int]]
    seed: int = 0

    def __post_init__(self) -> None:
        for name, starts in self.opens.items():
            values = self.space.axes.get(name, ())
            if len(starts) != len(values) - 1 or list(starts) != sorted(starts):
                raise RequestError(
                    f"The axis '{name}' has {len(values)} values, so its schedule needs "
                    f"{max(0, len(values) - 1)} rising draw numbers; it has {list(starts)}."
                )

    @classmethod
    def evenly(
        cls, space: Space, draws: int, order: Sequence[str] | None = None, seed: int = 0
    ) -> Progressive:
        """Open the axes one after the other (in ``order``), evenly spread over ``draws`` draws.

        The first part trains the largest network alone; the last value has opened before the end.
        """
        names = [name for name in (order or space.axes) for _ in space.axes[name][1:]]
        opens: dict[str, list[int]] = {name: [] for name in space.axes}
        for position, name in enumerate(names, start=1):
            opens[name].append(position * draws // (len(names) + 1))
        return cls(space, opens, seed)

    def available(self, n: int) -> dict[str, tuple[Value, ...]]:
        """Return the values of each axis that are open at draw ``n``."""
        return {
            name: values[-1 - sum(start <= n for start in self.opens[name]) :]
            if name in self.opens
            else values
            for name, values in self.space.axes.items()
        }

    def __call__(self, n: int) -> Choice:
        """Return the choice of draw ``n``."""
        generator = _generator(self.seed, n)
        return Choice({name: generator.choice(v) for name, v in self.available(n).items()})


@dataclass(frozen=True)
class Drawn:
    """Batches with the choices to train on them: draw ``n`` is ``(batches(n), sampler(n))``.

    >>> Drawn(lambda n: n * 10, Cycle([Choice(width=0.5), Choice(width=1.0)]))(3)
    (30, Choice({'width': 1.0}))
    """

    batches: Callable[[int], Any]
    sampler: Sampler

    def __call__(self, n: int) -> tuple[Any, Choice | list[Choice]]:
        """Return draw ``n``."""
        return self.batches(n), self.sampler(n)


def forward(net: Any, batch: Any, choice: Choice) -> Any:
    """Run sub-network ``choice`` on the inputs of a batch.

    A mapping is passed as keywords, the first of a tuple or list is the input, anything else is.
    """
    if isinstance(batch, Mapping):
        return net(**batch, choice=choice)
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return net(inputs, choice=choice)


def logits(outputs: Any) -> Tensor:
    """Return the tensor of scores in what a network returned (a tensor, ``.logits``, a tuple)."""
    if isinstance(outputs, Tensor):
        return outputs
    found = getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, Mapping):
        found = outputs.get("logits")
    if found is None and isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise RequestError(
            f"The network returned {type(outputs).__name__}, in which no logits were found: "
            "give a criterion (or metric) that reads it."
        )
    return found


def cross_entropy(outputs: Any, batch: Any) -> Tensor:
    """Return the mean cross-entropy for batches ``(inputs, labels)`` or ``{..., "labels": ...}``.

    Half-precision scores are taken in float32.
    """
    return F.cross_entropy(logits(outputs).float(), labels(batch))


def labels(batch: Any) -> Tensor:
    """Return the labels of a batch: the value ``"labels"`` of a mapping, the last of a tuple."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[-1]
    raise RequestError(
        "The batch carries no labels: make it (inputs, labels) or a mapping with 'labels'."
    )


def soft_cross_entropy(student: Any, teacher: Any) -> Tensor:
    """Return -sum softmax(teacher) log softmax(student), over the last dimension, averaged."""
    target = logits(teacher).float().softmax(-1).flatten(0, -2)
    return F.cross_entropy(logits(student).float().flatten(0, -2), target)


@dataclass(frozen=True)
class SampledLoss:
    """Turn ``criterion(outputs, batch)`` into a loss over ``(batch, choice or choices)``.

    Returns the mean over the drawn choices, L = (1/|b|) sum_b criterion(f(x; theta(b)), batch), in
    the form :func:`pantarhei.fit.fit` expects. ``run(net, batch, choice)`` computes the outputs.

    >>> loss = SampledLoss(lambda outputs, batch: outputs.sum())
    >>> double = lambda x, choice: x * choice["width"]
    >>> loss(double, (torch.ones(2), [Choice(width=1), Choice(width=2)]))
    tensor(3.)
    """

    criterion: Criterion = cross_entropy
    run: Forward = forward

    def __call__(self, net: Any, drawn: tuple[Any, Choice | list[Choice]]) -> Tensor:
        """Return the loss of what was drawn."""
        batch, choices = drawn
        if isinstance(choices, Choice):
            return self.criterion(self.run(net, batch, choices), batch)
        losses = [self.criterion(self.run(net, batch, choice), batch) for choice in choices]
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class DistilledLoss:
    """In-place distillation (arXiv 1903.05134): the first choice learns from the data and teaches.

    L = (1/|b|) [ criterion(y_1, batch) + sum_{i > 1} soft(y_i, stop_gradient(y_1)) ]

    :class:`Sandwich` puts the largest choice first. ``soft(student, teacher)`` compares outputs;
    the default is the cross-entropy to the teacher's softmax.
    """

    criterion: Criterion = cross_entropy
    soft: Callable[[Any, Any], Tensor] = soft_cross_entropy
    run: Forward = forward

    def __call__(self, net: Any, drawn: tuple[Any, Choice | list[Choice]]) -> Tensor:
        """Return the loss of what was drawn."""
        batch, choices = drawn
        teacher, *students = [choices] if isinstance(choices, Choice) else choices
        taught = self.run(net, batch, teacher)
        soft_labels = logits(taught).detach()
        losses = [self.criterion(taught, batch)]
        losses += [self.soft(self.run(net, batch, choice), soft_labels) for choice in students]
        return torch.stack(losses).mean()


def _check_weights(weights: Sequence[float], expected: int, what: str) -> None:
    usable = all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
    if len(weights) != expected or not usable:
        raise RequestError(
            f"The weights for the {what} must be {expected} numbers >= 0 with a positive sum; "
            f"they are {list(weights)}."
        )


def _check_some(choices: Iterable[Choice]) -> None:
    if not any(True for _ in choices):
        raise RequestError("A sampler over a list of choices needs at least one choice.")
