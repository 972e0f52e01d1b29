"""Choices and the space they live in: which part of a network runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from pantarhei.errors import RequestError, nearest

Value: TypeAlias = float | int


class Choice(Mapping[str, Value]):
    """One sub-network: a value for each axis (``width=0.5``, ``depth=2``, ``exit=1`` ...).

    Immutable, hashable and independent of the order in which axes are named. Choices over the same
    axes are partially ordered: ``a <= b`` when every value of ``a`` is at most that of ``b``, and
    then the weights of ``a`` are a subset of those of ``b`` (SortedNet: b <= b' component-wise
    implies that theta(b) is contained in theta(b')).

    >>> small, wide = Choice(depth=1, width=0.5), Choice(width=1.0, depth=1)
    >>> small <= wide, wide <= small, small == Choice(width=0.5, depth=1)
    (True, False, True)
    >>> print(small)
    depth=1 width=0.5
    >>> Choice.from_json(small.to_json()) == small
    True
    """

    __slots__ = ("_hash", "_items")
    _items: tuple[tuple[str, Value], ...]
    _hash: int

    def __init__(self, values: Mapping[str, Value] | None = None, /, **axes: Value) -> None:
        items = {**(values or {}), **axes}
        for name, value in items.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise RequestError(
                    f"The axis '{name}' of a choice is {value!r}: give it a finite number."
                )
        object.__setattr__(self, "_items", tuple(sorted(items.items())))
        object.__setattr__(self, "_hash", hash(self._items))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a Choice is immutable: make another one with replace()")

    def __getitem__(self, axis: str) -> Value:
        for name, value in self._items:
            if name == axis:
                return value
        raise KeyError(axis)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and self._items == other._items

    def __le__(self, other: Choice) -> bool:
        same_axes = len(self) == len(other) and all(name in other for name in self)
        return same_axes and all(value <= other[name] for name, value in self._items)

    def __lt__(self, other: Choice) -> bool:
        return self != other and self <= other

    def __ge__(self, other: Choice) -> bool:
        return other <= self

    def __gt__(self, other: Choice) -> bool:
        return other < self

    def __reduce__(self) -> tuple[type[Choice], tuple[dict[str, Value]]]:
        return Choice, (dict(self._items),)

    def __str__(self) -> str:
        return " ".join(f"{name}={value:g}" for name, value in self._items) or "full"

    def __repr__(self) -> str:
        return f"Choice({dict(self._items)!r})"

    def replace(self, **axes: Value) -> Choice:
        """Return this choice with some values changed."""
        return Choice(dict(self._items), **axes)

    def to_json(self) -> str:
        """Return the choice as a JSON object."""
        return json.dumps(dict(self._items))

    @classmethod
    def from_json(cls, text: str) -> Choice:
        """Read what :meth:`to_json` wrote; anything else raises :class:`RequestError`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise RequestError(f"{text!r} is not a choice in JSON ({error}).") from error
        if not isinstance(values, dict):
            raise RequestError(f"{text!r} is not a choice: write a JSON object of axis and value.")
        return cls(values)


class Space:
    """The grid of all choices: the product of the values offered along each axis.

    >>> space = Space({"width": (0.5, 1.0), "depth": (1, 2, 3)})
    >>> len(space), str(space.smallest), str(space.largest)
    (6, 'depth=1 width=0.5', 'depth=3 width=1')
    >>> [str(c) for c in space.chain(3)]
    ['depth=1 width=0.5', 'depth=2 width=0.5', 'depth=3 width=1']
    >>> Choice(width=0.5, depth=2) in space
    True
    """

    def __init__(self, axes: Mapping[str, Sequence[Value]]) -> None:
        for name, values in axes.items():
            if len(values) == 0:
                raise RequestError(f"The axis '{name}' offers no value: name at least one.")
        self.axes: dict[str, tuple[Value, ...]] = {
            name: tuple(sorted(set(values))) for name, values in sorted(axes.items())
        }

    @property
    def size(self) -> int:
        """The number of choices; ``len`` gives the same where it fits a machine word."""
        return math.prod(len(values) for values in self.axes.values())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Choice:
        """Return choice ``index`` of the iteration order (the last axis varies fastest)."""
        if not -self.size <= index < self.size:
            raise IndexError(index)
        index %= self.size
        values: dict[str, Value] = {}
        for name, offered in reversed(self.axes.items()):
            index, position = divmod(index, len(offered))
            values[name] = offered[position]
        return Choice(values)

    def __iter__(self) -> Iterator[Choice]:
        return (self[index] for index in range(self.size))

    def __contains__(self, choice: object) -> bool:
        return (
            isinstance(choice, Choice)
            and set(choice) == set(self.axes)
            and all(value in self.axes[name] for name, value in choice.items())
        )

    @property
    def smallest(self) -> Choice:
        """The choice with the smallest value on every axis."""
        return Choice({name: values[0] for name, values in self.axes.items()})

    @property
    def largest(self) -> Choice:
        """The choice with the largest value on every axis."""
        return Choice({name: values[-1] for name, values in self.axes.items()})

    def complete(self, choice: Choice | None) -> Choice:
        """Return ``choice`` with every axis it leaves out at its largest value.

        Raises :class:`RequestError` for an axis or a value that this space does not offer.
        """
        if choice is None:
            return self.largest
        if not isinstance(choice, Mapping):
            raise RequestError(f"{choice!r} is no choice: pass one such as Choice(width=0.5).")
        choice = choice if isinstance(choice, Choice) else Choice(choice)
        for name, value in choice.items():
            if name not in self.axes:
                known = ", ".join(self.axes) or "none"
                raise RequestError(
                    f"The choice '{choice}' names the axis '{name}', which this network does not "
                    f"have (it has: {known}).{nearest(name, self.axes)}"
                )
            if value not in self.axes[name]:
                near = min(self.axes[name], key=lambda offered: abs(offered - value))
                offered = ", ".join(f"{v:g}" for v in self.axes[name])
                raise RequestError(
                    f"The choice '{choice}' asks for {name}={value:g}, outside the space "
                    f"({name}: {offered}); the nearest is {near:g}."
                )
        # values equal to an offered one are taken in its own type, so that 1 and 1.0 are one choice
        return Choice(
            {
                name: values[values.index(choice[name])] if name in choice else values[-1]
                for name, values in self.axes.items()
            }
        )

    def sample(self, n: int, seed: int = 0) -> list[Choice]:
        """Draw ``n`` choices uniformly, with replacement; the same seed gives the same choices."""
        generator = random.Random(seed)
        return [self[generator.randrange(self.size)] for _ in range(n)]

    def neighbours(self, choice: Choice) -> list[Choice]:
        """Return the choices one step away along one axis."""
        found = []
        for name, values in self.axes.items():
            position = values.index(choice[name])
            for step in (position - 1, position + 1):
                if 0 <= step < len(values):
                    found.append(choice.replace(**{name: values[step]}))
        return found

    def chain(self, n: int) -> list[Choice]:
        """Return ``n`` nested choices from the smallest to the largest, evenly spread."""
        if n < 2:
            return [self.largest] * n
        return [
            Choice(
                {
                    name: values[i * (len(values) - 1) // (n - 1)]
                    for name, values in self.axes.items()
                }
            )
            for i in range(n)
        ]

    def __repr__(self) -> str:
        axes = ", ".join(
            f"{name}: {'/'.join(f'{v:g}' for v in values)}" for name, values in self.axes.items()
        )
        return f"Space({self.size:,} choices; {axes})"
