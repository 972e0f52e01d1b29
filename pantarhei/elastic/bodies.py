"""What calls of an elastic network run on: copies of the module tree that share its weights.

A *body* is bound to one choice: its parameters and buffers are views of the full ones, its numbers
are the choice's. Each call has a body to itself, so that calls can overlap in threads and
checkpointing can run modules again. A body whose choice comes back stays bound, and is taken as it
is when a look at the model shows that nothing has changed since: the same tensors with the same
memory, the same numbers, flags and hooks. That look, at what the choice runs and at nothing else,
is what switching to a sub-network costs.
"""

from __future__ import annotations

import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pantarhei.elastic.exits import Root
from pantarhei.elastic.space import Choice
from pantarhei.elastic.structure import Cut, bind, cut_down, skeleton
from pantarhei.elastic.trace import tensors_in

if TYPE_CHECKING:
    from pantarhei.elastic.net import ElasticNet

MODULES = 32_000
"""Modules in bodies that stay bound, 4 kB each: 170 choices of a network of 186 modules. Only as
many are made as choices that come back; beyond, the one that has waited longest is bound anew."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class Plan:
    """All that a choice means for the network, worked out once."""

    choice: Choice
    keep: dict[str, int]
    cuts: dict[str, tuple[Cut, ...]]
    values: list[tuple[str, str, Any]]
    skipped: tuple[str, ...]
    exit: int | None
    scales: dict[str, float]
    exit_macs: list[int] = field(default_factory=list)  # filled when they are first asked for


_GONE = (KeyError, RuntimeError)  # a tensor is no longer there, or has no memory in a transform
Key: TypeAlias = tuple[Plan, bool, bool, bool]  # evaluate? net.training? with gradients?


class _Twin:
    """A module of a body and the module that it copies, by their attributes."""

    def __init__(self, copy: nn.Module, module: nn.Module) -> None:
        self.copy, self.own, self.theirs = copy, vars(copy), vars(module)
        kinds = (bool, int, float, str, tuple, type(None))
        self.plain = tuple(name for name, v in self.theirs.items() if type(v) in kinds)
        self.read = operator.itemgetter(*self.plain)
        self.hooks = [self.theirs[name] for name in _HOOKS]
        self.parts = self.theirs["_modules"].values()
        self.came = self._came()

    def _came(self) -> tuple[Any, ...]:
        return (len(self.theirs), *map(tuple, self.hooks), *self.parts)

    def follow(self) -> bool:
        """Take over numbers, flags and text; False where attributes, hooks or parts changed."""
        if self._came() != self.came:
            return False
        now = self.read(self.theirs)
        if self.read(self.own) != now:
            self.own.update(zip(self.plain, now, strict=True))
        return True


class _Again(NamedTuple):
    """A tensor that is no lasting view of the full one: it is cut anew for each call."""

    source: int
    cuts: tuple[Cut, ...]
    scale: float | None
    places: list[int]


class _Seen(NamedTuple):
    """The model as it was when a body was bound, in lists that compare without a Python loop."""

    # the full tensors: where they are kept, which they were, and where their memory began
    tables: list[Mapping[str, Any]]
    slots: list[str]
    tensors: list[Tensor]
    memory: list[int]
    statistics: Mapping[str, Tensor] | None
    # numbers and flags of the body's modules and of those they copy; attributes; hooks; parts
    readers: Sequence[Callable[[Any], Any]]
    attributes: list[dict[str, Any]]
    values: list[Any]
    theirs: list[dict[str, Any]]
    sizes: list[int]
    unhooked: list[Any]
    hooks: list[Any]
    hooked: list[tuple[int, ...]]
    parts: list[Any]
    children: list[list[nn.Module | None]]
    again: list[_Again]

    def same_tensors(self) -> bool:
        """Say whether the full tensors are still the same, in the same memory."""
        now = list(map(operator.getitem, self.tables, self.slots))
        # the body's views keep the memory alive: no other tensor can have come to lie there
        return (
            all(map(operator.is_, now, self.tensors))
            and list(map(Tensor.data_ptr, now)) == self.memory
        )

    def lasts(self, statistics: Mapping[str, Tensor] | None) -> bool:
        """Say whether the model is still the same, as far as the choice runs it."""
        return (
            statistics is self.statistics
            and self.same_tensors()
            and list(map(operator.call, self.readers, self.attributes)) == self.values
            and list(map(len, self.theirs)) == self.sizes
            and not any(self.unhooked)
            and list(map(tuple, self.hooks)) == self.hooked
            and list(map(list, self.parts)) == self.children
        )


class Body(Root):
    """A copy of the module tree that shares its tensors; ``lent``: autograd may run it again."""

    def __init__(self, net: ElasticNet) -> None:
        root = skeleton(net.root())
        super().__init__(root.model, root.heads, root.exits)
        self.lent = False
        self.key: Key | None = None
        self.seen: _Seen | None = None
        self.twins = [
            _Twin(self.index[path], module)
            for path, module in net.root_modules()
            if path in self.index
        ]
        # what the modules that run hold, and where in the model a replaced buffer belongs
        self.tables: list[dict[str, Any]] = []
        self.slots: list[str] = []
        self.held: list[Any] = []
        self.homes: list[tuple[dict[str, Any], str] | None] = []

    def bind(self, net: ElasticNet, key: Key, remember: bool) -> bool:
        """Bind to a choice; False where the model has changed so that it takes a new copy."""
        if not all(twin.follow() for twin in self.twins):
            return False
        plan, evaluate, *_ = key
        own = net.own_places(plan.choice, evaluate)
        places = {**net.places, **own}
        tensors = {name: table[slot] for name, (table, slot) in places.items()}
        frozen = {n: t.data for n, t in tensors.items() if n in own and not t.requires_grad}
        cuts = {name: cuts for name, cuts in plan.cuts.items() if name not in own}
        with _lasting():
            bound = bind(
                self.index, net.slots, {**tensors, **frozen}, cuts, plan.values, plan.scales
            )
        for block, stand_in in net.stand_ins.items():
            parent, _, child = f"model.{block}".rpartition(".")
            whole = self.index[f"model.{block}"]
            self.index[parent]._modules[child] = stand_in if block in plan.skipped else whole
        if evaluate:
            self.eval()
        runs = set(self.modules())
        spots = self._hold(net, bound, places, cuts.keys() | own.keys(), runs)
        self.key, self.seen = key, None
        if remember:
            self._remember(net, plan, places, tensors, cuts, spots, runs)
        return True

    def _hold(
        self,
        net: ElasticNet,
        bound: Mapping[str, Tensor],
        places: Mapping[str, tuple[dict[str, Any], str]],
        other: set[str],
        runs: set[nn.Module],
    ) -> dict[str, list[int]]:
        """Note what the modules that run hold; return the positions of each tensor."""
        self.tables, self.slots, self.held, self.homes = [], [], [], []
        spots: dict[str, list[int]] = {}
        for name, slots in net.slots.items():
            for path, slot in slots:
                module = self.index[path]
                if module in runs:
                    spots.setdefault(name, []).append(len(self.held))
                    buffer = slot not in module._parameters
                    self.tables.append(module._buffers if buffer else module._parameters)
                    self.slots.append(slot)
                    self.held.append(bound[name])
                    self.homes.append(places[name] if buffer and name not in other else None)
        return spots

    def _remember(
        self,
        net: ElasticNet,
        plan: Plan,
        places: Mapping[str, tuple[dict[str, Any], str]],
        tensors: Mapping[str, Tensor],
        cuts: Mapping[str, tuple[Cut, ...]],
        spots: Mapping[str, list[int]],
        runs: set[nn.Module],
    ) -> None:
        """Note the model as it is, so that the next call can see whether the body still fits."""
        assert self.key is not None
        _, evaluate, _, gradients = self.key
        whole = [tensors[name] for name in spots]
        if not all(type(t) in (Tensor, nn.Parameter) for t in whole):
            return  # the memory of a tensor subclass says nothing
        try:
            memory = [t.data_ptr() for t in whole]
        except RuntimeError:  # inside a transform of torch.func
            return
        if not all(memory):
            return  # on the meta device, or empty
        again = []
        for at, name in enumerate(spots):
            mine, scale = cuts.get(name, ()), plan.scales.get(name)
            copied = scale is not None or any(cut.index is not None for cut in mine)
            if copied or (mine and gradients):
                again.append(_Again(at, mine, scale, spots[name]))
        twins = [twin for twin in self.twins if twin.copy in runs]
        readers = [twin.read for twin in twins for _ in range(2)]
        attributes = [d for twin in twins for d in (twin.own, twin.theirs)]
        hooks = [hooks for twin in twins for hooks in twin.hooks]
        parts = [twin.parts for twin in twins if twin.parts]
        self.seen = _Seen(
            tables=[places[name][0] for name in spots],
            slots=[places[name][1] for name in spots],
            tensors=whole,
            memory=memory,
            statistics=net.statistics_of(plan.choice, evaluate),
            readers=readers,
            attributes=attributes,
            values=list(map(operator.call, readers, attributes)),
            theirs=[twin.theirs for twin in twins],
            sizes=[len(twin.theirs) for twin in twins],
            unhooked=[h for h in hooks if not h],
            hooks=[h for h in hooks if h],
            hooked=[tuple(h) for h in hooks if h],
            parts=parts,
            children=list(map(list, parts)),
            again=again,
        )

    def take(self, statistics: Mapping[str, Tensor] | None) -> bool:
        """Make a bound body ready for a call; False where it has to be bound anew."""
        try:
            if self.seen is None or not self.seen.lasts(statistics):
                return False
        except _GONE:
            return False
        for again in self.seen.again:
            tensor = cut_down(self.seen.tensors[again.source], again.cuts, again.scale)
            for at in again.places:
                self.tables[at][self.slots[at]] = self.held[at] = tensor
        return True

    def outlived(self) -> bool:
        """Say whether it holds on to tensors that the model has no longer."""
        try:
            return self.seen is not None and not self.seen.same_tensors()
        except _GONE:
            return True

    def let_go(self) -> None:
        """Hold nothing, so that memory which the model has left is free."""
        self.seen = None
        for table, slot in zip(self.tables, self.slots, strict=True):
            table[slot] = None
        self.held = [None] * len(self.held)

    def settle(self) -> None:
        """Keep a buffer that the forward pass replaced (rather than changed) where it belongs."""
        now = list(map(dict.get, self.tables, self.slots))
        if all(map(operator.is_, now, self.held)):
            return
        self.seen = None
        for tensor, held, home in zip(now, self.held, self.homes, strict=True):
            if home is not None and tensor is not None and tensor is not held:
                table, slot = home
                table[slot] = tensor


@contextmanager
def _lasting() -> Iterator[None]:
    """Make views that can be used after inference mode, with gradients where they are on now."""
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        yield


class _Lease:
    """Gives a body back when nothing can run it any more.

    It hangs on the autograd graph of a call's outputs: checkpointing runs modules again in the
    backward pass, and until then the body has to stay as it was.
    """

    def __init__(self, bodies: Bodies, body: Body) -> None:
        self.bodies, self.body = bodies, body

    def __del__(self) -> None:
        self.bodies.give_back(self.body)


class Bodies:
    """The idle bodies of a network: those bound to a choice by key, oldest first, and the rest.

    A choice that is seen for the first time is bound to whatever body is idle; one that comes back
    gets its own. Nothing is locked: each operation on the pools is atomic, and a body that two
    threads want goes to one of them.
    """

    def __init__(self) -> None:
        self.bound: OrderedDict[Key, deque[Body]] = OrderedDict()
        self.loose: deque[Body] = deque()
        self.known: set[Key] = set()

    @contextmanager
    def borrow(self, net: ElasticNet, plan: Plan, evaluate: bool = False) -> Iterator[Body]:
        """Lend a body bound to a choice; one on which a call failed does not come back."""
        body = self._take(net, (plan, evaluate, net.training, torch.is_grad_enabled()))
        yield body
        body.settle()
        if not body.lent:
            self.give_back(body)

    def lend(self, body: Body, output: Any) -> Any:
        """Keep a body from other calls as long as the backward pass of its output may run it."""
        graph = [t.grad_fn for t in tensors_in(output) if t.grad_fn is not None]
        if graph:
            body.lent = True
            lease = _Lease(self, body)
            for node in graph:
                node.metadata["pantarhei"] = lease  # type: ignore[index]  # a property
        return output

    def give_back(self, body: Body) -> None:
        """Take an idle body into the pool."""
        body.lent = False
        if body.seen is None or body.key is None:
            self.loose.append(body)
            return
        self.bound.setdefault(body.key, deque()).append(body)
        with suppress(KeyError):  # dropped in between
            self.bound.move_to_end(body.key)

    def _take(self, net: ElasticNet, key: Key) -> Body:
        body = _last(self.bound.get(key))
        if body is not None and body.take(net.statistics_of(key[0].choice, key[1])):
            return body
        if body is not None and body.outlived():
            self._let_all_go()
        remember = key in self.known
        if len(self.known) > MODULES:
            self.known.clear()
        self.known.add(key)
        while True:
            body = body or _last(self.loose) or self._oldest(net) or net.new_body()
            if body.bind(net, key, remember):
                return body
            body = None

    def _let_all_go(self) -> None:
        """Let go of weights that were replaced; otherwise idle bodies would keep them in memory."""
        for key in list(self.bound):
            idle = self.bound.pop(key, None)
            while (body := _last(idle)) is not None:
                body.let_go()
                self.loose.append(body)

    def _oldest(self, net: ElasticNet) -> Body | None:
        """Return the body that has waited longest if no more may be made."""
        keys = list(self.bound)
        if sum(len(self.bound.get(key, ())) for key in keys) < MODULES // len(net.layout):
            return None
        for key in keys:
            idle = self.bound.get(key)
            body = _last(idle)
            if not idle:
                self.bound.pop(key, None)
            if body is not None:
                return body
        return None


def _last(idle: deque[Body] | None) -> Body | None:
    try:
        return idle.pop() if idle else None
    except IndexError:  # another thread was first
        return None
