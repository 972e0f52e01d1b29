"""What was found out about a network, and what a choice makes of it: views, attributes, costs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pantarhei.cost import without_fast_path
from pantarhei.elastic.trace import Group, Ids, Seen, Tracer, spoken, trace
from pantarhei.errors import RequestError

M = TypeVar("M", bound=nn.Module)
Keep = Mapping[str, int]  # group name -> units kept


@dataclass(frozen=True)
class Cut:
    """What remains of a tensor along one axis: a range, or an index where it is not contiguous."""

    axis: int
    start: int
    length: int
    index: Tensor | None = None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the view (or, for an index, the gathered copy) of ``tensor``."""
        if self.index is None:
            return tensor.narrow(self.axis, self.start, self.length)
        return tensor.index_select(self.axis, self.index.to(tensor.device))


@dataclass(frozen=True)
class Attribute:
    """A number that a module's code repeats: ``full`` of it becomes ``full * kept / size``.

    ``along``: a tensor axis whose kept length it follows, or None where it counts units.
    """

    module: str
    name: str
    full: int | tuple[int, ...]
    group: str | None = None
    along: tuple[str, int] | None = None


@dataclass
class _Failure(Exception):
    """A trial run that did not fit; ``module`` and ``step``: where it was first noticed."""

    module: str
    step: int
    reason: str


def named_tensors(root: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[tuple[str, str]]]]:
    """Return each parameter and buffer once by its first name, and all (module, name) it has."""
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    slots: dict[str, list[tuple[str, str]]] = {}
    for path, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                full = first.setdefault(id(tensor), f"{path}.{name}" if path else name)
                tensors.setdefault(full, tensor)
                slots.setdefault(full, []).append((path, name))
    return tensors, slots


def skeleton(root: M) -> M:
    """Return a copy of the module tree that shares every parameter and buffer with ``root``."""
    memo: dict[int, Any] = {
        id(t): t
        for m in root.modules()
        for t in (*m._parameters.values(), *m._buffers.values(), *vars(m).values())
        if isinstance(t, Tensor)
    }
    try:
        return copy.deepcopy(root, memo)
    except Exception as error:
        raise RequestError(
            f"The modules of the model cannot be copied ({str(error).splitlines()[0]}): an elastic "
            "network runs on a copy of the module tree, so keep open files, locks and streams out "
            "of it."
        ) from error


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read inputs given as one value, a tuple of arguments or a mapping of keywords."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def inputs_only(batch: Any) -> Any:
    """Return what the model reads of a batch: all keywords but labels, or the first element."""
    if isinstance(batch, Mapping):
        return {k: v for k, v in batch.items() if k != "labels"}
    return batch[0] if isinstance(batch, (tuple, list)) else batch


class Structure:
    """The groups of a network and everything that follows from keeping some units of each.

    ``groups``: by name; ``fixed``: why a module's channels are not elastic.
    """

    def __init__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.tensors, self.slots = named_tensors(root)
        body = skeleton(root).eval()
        tracer, _ = trace(body, self.tensors, args, kwargs)
        modules = dict(body.named_modules())
        groups, self._unit, self.fixed = tracer.groups(modules)
        self.groups: dict[str, Group] = {g.name: g for g in groups}
        self.steps, self.ended = tracer.steps, tracer.ended
        self.counted, self.first_use = tracer.counted, tracer.first_use
        self._axes: dict[str, list[Ids]] = {
            name: [self._unit[ids] for ids in axes] for name, axes in tracer.labels.items()
        }
        elastic_units = {u for g in groups for u in g.units}
        self._elastic: dict[str, list[int]] = {}
        for name, axes in self._axes.items():
            touched = [d for d, u in enumerate(axes) if not elastic_units.isdisjoint(u.tolist())]
            if touched:
                self._elastic[name] = touched
        self.attributes = self._metadata(modules)
        # The axis each layer's own weight sums over; not a tied embedding's, nor a channel of its
        # own group (depthwise), which is not summed.
        grouped = {a.module for a in self.attributes if a.name == "groups"}
        self._inputs = {
            a.along[0]: a.along[1]
            for a in self.attributes
            if a.along and a.name in ("in_features", "in_channels", "nx")
            if len(self.slots[a.along[0]]) == 1 and a.module not in grouped
        }

    # --- counting -----------------------------------------------------------------------------

    def alive(self, keep: Keep) -> Ids:
        """Return for every unit whether it is kept."""
        alive = np.ones(int(self._unit.max()) + 1 if len(self._unit) else 0, dtype=bool)
        for name, kept in keep.items():
            alive[self.groups[name].units[kept:]] = False
        return alive

    def _length(self, size: int, ids: Ids | None, alive: Ids) -> int:
        """Return how much of an axis is kept; ``ids`` has that axis first."""
        if ids is None:
            return size
        kept = alive[self._unit[ids]]
        return int(kept.reshape(len(kept), -1).any(axis=1).sum())

    def macs(self, alive: Ids, runs: Callable[[Seen], bool]) -> int:
        """Return the multiply-accumulates of the counted operations that ``runs`` says run."""
        return sum(
            seen.scale * math.prod(self._length(n, ids, alive) for n, ids in seen.sizes)
            for seen in self.counted
            if runs(seen)
        )

    def shape(self, name: str, alive: Ids) -> tuple[int, ...]:
        """Return the shape that is left of a parameter or buffer."""
        shape = list(self.tensors[name].shape)
        for axis in self._elastic.get(name, ()):
            shape[axis] = int(alive[self._axes[name][axis]].sum())
        return tuple(shape)

    # --- views --------------------------------------------------------------------------------

    def cuts(self, alive: Ids) -> dict[str, tuple[Cut, ...]]:
        """Return, for every tensor that loses something, what remains along which axes."""
        found = {}
        for name, axes in self._elastic.items():
            cuts = []
            for axis in axes:
                kept = np.flatnonzero(alive[self._axes[name][axis]])
                if len(kept) == self.tensors[name].shape[axis]:
                    continue
                start, length = int(kept[0]), len(kept)
                run = kept[-1] - kept[0] + 1 == length
                index = None if run else torch.from_numpy(kept)
                cuts.append(Cut(axis, start, length, index))
            if cuts:
                found[name] = tuple(cuts)
        return found

    def input_scales(self, alive: Ids) -> dict[str, float]:
        """Return sqrt(n / k) for every layer's weight that keeps k of its n inputs."""
        found = {}
        for name, axis in self._inputs.items():
            kept, size = self.shape(name, alive)[axis], self.tensors[name].shape[axis]
            if kept < size:
                found[name] = math.sqrt(size / kept)
        return found

    # --- attributes ---------------------------------------------------------------------------

    def _metadata(self, modules: dict[str, nn.Module]) -> list[Attribute]:
        """Return the sizes that torch's own modules (and Hugging Face's Conv1D) repeat."""
        found: list[Attribute] = []
        places = {(path, slot): name for name, all_ in self.slots.items() for path, slot in all_}

        def follow(path: str, attribute: str, axis: int, slot: str = "weight") -> None:
            name = places.get((path, slot))
            if name in self._elastic and axis in self._elastic[name]:
                full = getattr(modules[path], attribute)
                found.append(Attribute(path, attribute, full, None, (name, axis)))

        for path, m in modules.items():
            if isinstance(m, nn.modules.conv._ConvNd):
                turned = int(m.transposed)
                follow(path, "out_channels", turned)
                follow(path, "in_channels", 1 - turned)
                if m.groups > 1:
                    if turned:
                        follow(path, "out_channels", 0)
                    else:
                        follow(path, "in_channels", 0)
                    follow(path, "groups", 0)
            elif isinstance(m, nn.Linear):
                follow(path, "out_features", 0)
                follow(path, "in_features", 1)
            elif type(m).__name__ == "Conv1D":
                follow(path, "nx", 0)
                follow(path, "nf", 1)
            elif isinstance(m, nn.Embedding):
                follow(path, "embedding_dim", 1)
            elif isinstance(m, nn.modules.batchnorm._NormBase):
                slot = "weight" if m.affine else "running_mean"
                follow(path, "num_features", 0, slot)
            elif isinstance(m, nn.GroupNorm):
                follow(path, "num_channels", 0)
                if m.num_groups > 1:
                    follow(path, "num_groups", 0)
            elif isinstance(m, (nn.LayerNorm, nn.RMSNorm)) and len(m.normalized_shape) == 1:
                follow(path, "normalized_shape", 0)
        return found

    def values(self, alive: Ids, keep: Keep) -> list[tuple[str, str, Any]]:
        """Return (module, attribute, value) for a choice."""
        found = []
        for a in self.attributes:
            if a.along is not None:
                name, axis = a.along
                kept, size = self.shape(name, alive)[axis], self.tensors[name].shape[axis]
            else:
                assert a.group is not None
                size = self.groups[a.group].size
                kept = keep.get(a.group, size)
            scaled = (
                tuple(v * kept // size for v in a.full)
                if isinstance(a.full, tuple)
                else a.full * kept // size
            )
            found.append((a.module, a.name, scaled))
        return found

    # --- trial --------------------------------------------------------------------------------

    def fit_code(
        self, root: nn.Module, smallest: Callable[[Group], int], axis: Callable[[Group], str]
    ) -> None:
        """Make the network's own code run at other widths, or give the groups up that cannot.

        Code that repeats a size (``self.num_heads``, ``normalized_shape``) is found by trial: the
        network runs with groups at their smallest, the sizes of module outputs, reshapes, slices
        and costed operations are compared with what the trace predicts, and where the two part, the
        module's integers that the group's sizes explain are scaled until they agree. What cannot be
        made to agree is removed from ``groups`` and explained in ``fixed``.
        """
        small = {g.name: smallest(g) for g in self.groups.values() if smallest(g) < g.size}
        axes = {name: axis(self.groups[name]) for name in small}
        with suppress(_Failure):
            for some in _mixtures(axes):
                self._trial(root, {name: small[name] for name in some})
            return
        beside: dict[str, dict[str, int]] = {}
        for name in small:
            try:
                beside[name] = self._adapt(root, self.groups[name], small, axes)
            except _Failure as failure:
                self._give_up(name, failure)
        together: dict[str, int] = {}
        for name in small:
            if name in self.groups:
                wider = together | {n: k for n, k in beside[name].items() if n in self.groups}
                try:
                    self._trial(root, wider)
                    together = wider
                except _Failure as failure:
                    self._give_up(name, failure)

    def _give_up(self, name: str, failure: _Failure) -> None:
        del self.groups[name]
        self.attributes = [a for a in self.attributes if a.group != name]
        self.fixed[name] = f"in {spoken(failure.module)}, {failure.reason}"

    def _adapt(
        self, root: nn.Module, group: Group, small: dict[str, int], axes: dict[str, str]
    ) -> dict[str, int]:
        """Find the attributes that follow ``group``; return the groups that have to go with it.

        Those are none but itself, or all of its axis that share a tensor's axis with it (the halves
        that code splits in the middle, say). Raises the first failure if neither works.
        """
        alone = {group.name: small[group.name]}
        before = list(self.attributes)
        try:
            self._repair(root, group, alone)
        except _Failure:
            bundle = {
                n: k
                for n, k in small.items()
                if n in self.groups and axes[n] == axes[group.name]
                if not set(self.groups[n].axes).isdisjoint(group.axes)
            }
            self.attributes = before
            if bundle.keys() == alone.keys():
                raise
            self._trial(root, bundle)
            return bundle
        return alone

    def _repair(self, root: nn.Module, group: Group, keep: dict[str, int]) -> None:
        """Scale attributes until a trial run fits, module by module; raises what remains."""
        modules = dict(root.named_modules())
        try:
            return self._trial(root, keep)
        except _Failure as first:
            failure = first
        while True:
            before = list(self.attributes)
            for candidates in self._candidates(modules, failure.module, group):
                self.attributes = before + candidates
                try:
                    return self._trial(root, keep)
                except _Failure as later:
                    if later.module != failure.module and later.step > failure.step:
                        failure = later  # this module is repaired; take the next one
                        break
            else:
                self.attributes = before
                raise failure

    def _candidates(
        self, modules: dict[str, nn.Module], path: str, group: Group
    ) -> Iterable[list[Attribute]]:
        """Offer sets of attributes of a module that the sizes of ``group`` explain."""
        known = {(a.module, a.name) for a in self.attributes}
        sizes = {self.tensors[name].shape[axis] for name, axis in group.axes} | {group.size}
        for where in (path, path.rpartition(".")[0]):
            exact, multiple = [], []
            for name, value in vars(modules[where]).items():
                numbers = value if isinstance(value, tuple) else (value,)
                if name.startswith("_") or (where, name) in known or not numbers:
                    continue
                if not all(type(v) is int and v > 0 for v in numbers):
                    continue
                attribute = Attribute(where, name, value, group.name)
                if all(v in sizes for v in numbers):
                    exact.append(attribute)
                elif all(v % group.size == 0 for v in numbers):
                    multiple.append(attribute)
            offers = [exact, exact + multiple, *([a] for a in exact + multiple)]
            yield from (offer for offer in offers if offer)

    def _trial(self, root: nn.Module, keep: Keep) -> None:
        """Try a choice, and one with 2 units for 1: an axis of 1 hides where it came from."""
        twos = {n: 2 if k == 1 and self.groups[n].size > 2 else k for n, k in keep.items()}
        self._run(root, twos)
        if twos != keep:
            self._run(root, keep)

    def _run(self, root: nn.Module, keep: Keep) -> None:
        """Run the network on a choice and compare the sizes of what happens with the trace."""
        body = skeleton(root).eval()
        modules = dict(body.named_modules())
        alive = self.alive(keep)
        bind(modules, self.slots, self.tensors, self.cuts(alive), self.values(alive, keep))
        tracer, error = Tracer({}), None
        try:
            with torch.no_grad(), without_fast_path(), tracer.watch(body), tracer:
                body(*self.args, **self.kwargs)
        except Exception as raised:
            error = raised
        pairs = zip(self.steps, tracer.steps, strict=False)
        for number, ((_, planned), (module, found)) in enumerate(pairs):
            wanted = [[self._length(n, ids, alive) for n, ids in s.sizes] for s in planned]
            shapes = [[n for n, _ in s.sizes] for s in found]
            same = [s.scale for s in planned] == [s.scale for s in found]
            # An axis of size 1 may be anywhere: einsum moves it.
            if not same or _without_ones(wanted) != _without_ones(shapes):
                reason = f"its code gives {_spelled(shapes)} where {_spelled(wanted)} was expected"
                raise _Failure(module, number, reason)
        if error is not None:
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"its code is tied to the full size ({text})"
            raise _Failure(tracer.stack[-1], len(tracer.steps), reason) from error
        if len(tracer.steps) != len(self.steps):
            raise _Failure("", len(tracer.steps), "its code does other things at another size")


def _without_ones(shapes: list[list[int]]) -> list[list[int]]:
    return [[n for n in shape if n != 1] for shape in shapes]


def _spelled(shapes: list[list[int]]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes) or "no tensor"


def _mixtures(axes: Mapping[str, str]) -> list[list[str]]:
    """Return sets of groups to try at their smallest: all, and such that any two axes are parted.

    Numbered in binary, two axes differ in a digit: the axes with that digit, and those without it.
    """
    numbers = {axis: i for i, axis in enumerate(dict.fromkeys(axes.values()))}
    found = [list(axes)]
    for digit in range((len(numbers) - 1).bit_length()):
        for one in (0, 1):
            found.append([n for n, a in axes.items() if numbers[a] >> digit & 1 == one])
    return found


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back what running a model changes in its buffers."""
    saved = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def cut_down(tensor: Tensor, cuts: Iterable[Cut], scale: float | None) -> Tensor:
    """Return what is left of a tensor, times ``scale``."""
    for cut in cuts:
        tensor = cut(tensor)
    return tensor if scale is None else tensor * scale


def bind(
    modules: dict[str, nn.Module],
    slots: Mapping[str, list[tuple[str, str]]],
    tensors: Mapping[str, Tensor],
    cuts: Mapping[str, tuple[Cut, ...]],
    values: Iterable[tuple[str, str, Any]],
    scales: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Point a skeleton's parameters, buffers and attributes at a choice; return what was bound."""
    bound = {}
    for name, places in slots.items():
        tensor = bound[name] = cut_down(tensors[name], cuts.get(name, ()), scales.get(name))
        for path, slot in places:
            module = modules[path]
            table = module._parameters if slot in module._parameters else module._buffers
            table[slot] = tensor  # type: ignore[assignment]
    for path, attribute, value in values:
        modules[path].__dict__[attribute] = value  # a plain number: nothing to register
    return bound
