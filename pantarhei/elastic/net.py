"""Any network as a space of sub-networks: ``elastic`` wraps a module, a choice says what runs."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from pantarhei.cost import Cost, latency_ms
from pantarhei.elastic.blocks import Stage, find_stages
from pantarhei.elastic.bodies import Bodies, Body, Plan
from pantarhei.elastic.exits import Adaptive, Exits, Policy, Root, run_adaptive
from pantarhei.elastic.space import Choice, Space, Value
from pantarhei.elastic.structure import (
    Structure,
    as_call,
    inputs_only,
    named_tensors,
    preserved,
    skeleton,
)
from pantarhei.elastic.trace import Group, Seen, tensors_in
from pantarhei.errors import RequestError, nearest

Axis: TypeAlias = "Sequence[Value] | Mapping[str, Sequence[Value]] | Sized"
_KINDS = ("heads", "mlp", "width")  # the order in which axes claim groups; width takes what is left


@dataclass(frozen=True)
class Sized:
    """Values for the width of channel groups, and how they are rounded.

    ``ratios``: shares of a group's units, or a mapping from name patterns to ratios (one axis for
    each pattern). ``per_group``: one axis for each group instead of one ratio for all. A kept width
    is rounded to a multiple of ``divisor`` units, and is at least ``floor``.

    >>> Sized((0.25, 0.5, 1.0), divisor=8).kept(0.25, 48)
    16
    """

    ratios: Sequence[Value] | Mapping[str, Sequence[Value]]
    per_group: bool = False
    divisor: int = 1
    floor: int = 1

    def kept(self, ratio: float, size: int) -> int:
        """Return how many of ``size`` units a ratio keeps."""
        if ratio >= 1:
            return size
        rounded = math.floor(ratio * size / self.divisor + 0.5) * self.divisor
        return min(size, max(rounded, self.floor, 1))


def _pass_on(nones: int | None) -> nn.Module:
    """Return what stands for a skipped block: it hands on its first argument in the block's form.

    ``nones``: how many of them follow in a tuple; without, the argument is handed on by itself. A
    plain graph, so that a network can be extracted with it.
    """
    graph = torch.fx.Graph()
    x, *_ = (graph.placeholder(name) for name in ("x", "*rest", "**named"))
    graph.output(x if nones is None else (x, *[None] * nones))
    return torch.fx.GraphModule(nn.Module(), graph)


class ElasticNet(nn.Module):
    """A network and the space of its sub-networks; made by :func:`elastic`.

    ``model`` is the module given, untouched: its parameters are the shared weights. ``space`` is
    the grid of choices, ``groups`` the channel groups by name, ``stages`` the lists of blocks whose
    depth can change, ``fixed`` why the rest cannot change. Calls are safe from several threads.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        axes: Mapping[str, Axis | None],
        exits: Exits | None,
        norm: str,
        rescale: str | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList(exits.heads if exits else [])
        self.exits = exits.names if exits else ()
        self.example = as_call(example_inputs)
        self.axes, self.norm, self.rescale = dict(axes), norm, rescale
        root = self.root()
        self._structure = Structure(root, *self.example)
        assert self.layout  # noted now: what is replaced later is noticed
        self.batch = _batch_size(*self.example)
        self._stages(axes.get("depth"))
        self._axes_of_groups: dict[str, tuple[str, Sized]] = {}
        offered = self._claim(axes)
        self._structure.fit_code(root, self._smallest_units, self._axis_of)
        self.groups: dict[str, Group] = dict(self._structure.groups)
        offered = self._kept_axes(axes, offered)
        offered |= self._depth_axes(axes.get("depth"))
        if self.exits:
            offered["exit"] = tuple(range(1, len(self.exits) + 2))
        self.space = Space(offered)
        self.fixed: dict[str, str] = {
            name.removeprefix("model."): why for name, why in self._structure.fixed.items()
        } | self._unskippable
        self._plans: OrderedDict[Choice | None, Plan] = OrderedDict()
        self.statistics: dict[Choice, dict[str, Tensor]] = {}
        self.switched = nn.ParameterDict()
        self._switched_keys: dict[Choice, dict[str, str]] = {}
        self._carriers: frozenset[tuple[str, str, int]] = frozenset()
        if norm == "switchable":
            self._switch_norms()

    # --- what was found -----------------------------------------------------------------------

    def root(self) -> Root:
        """Return the model and its heads under one roof."""
        return Root(self.model, self.heads, self.exits)

    def _stages(self, depth: Axis | None) -> None:
        self.stages: dict[str, Stage] = {}
        self._unskippable: dict[str, str] = {}
        self.stand_ins: dict[str, nn.Module] = {}
        if depth is None:
            return
        body = skeleton(self.model).eval()
        stages, self._unskippable, forms = find_stages(body, *self.example, self.exits)
        self.stages = {s.name: s for s in stages}
        self.stand_ins = {block: _pass_on(nones) for block, nones in forms.items()}

    def _claim(self, axes: Mapping[str, Axis | None]) -> dict[str, tuple[Value, ...]]:
        """Assign groups to axes; return the values each axis offers."""
        offered: dict[str, tuple[Value, ...]] = {}
        for kind in _KINDS:
            wanted = axes.get(kind)
            if wanted is None:
                continue
            sized = wanted if isinstance(wanted, Sized) else Sized(wanted)
            mine = [
                g
                for g in self._structure.groups.values()
                if g.name not in self._axes_of_groups and (kind == "width" or g.kind == kind)
            ]
            patterns: Mapping[str, Sequence[Value]]
            if isinstance(sized.ratios, Mapping):
                patterns = sized.ratios
            elif sized.per_group:
                patterns = {g.name.removeprefix("model."): sized.ratios for g in mine}
            else:
                patterns = {"": sized.ratios}
            for pattern, ratios in patterns.items():
                _check_ratios(kind, ratios)
                named = [
                    g
                    for g in mine
                    if g.name not in self._axes_of_groups
                    and (not pattern or fnmatch.fnmatch(g.name.removeprefix("model."), pattern))
                ]
                if not named:
                    raise self._no_group(kind, pattern, [g.name for g in mine])
                axis = f"{kind}.{pattern}" if pattern else kind
                offered[axis] = tuple(float(r) for r in ratios)
                for group in named:
                    self._axes_of_groups[group.name] = (axis, sized)
        return offered

    def _no_group(self, kind: str, pattern: str, known: Sequence[str]) -> RequestError:
        known = [name.removeprefix("model.") for name in known]
        why = [
            f"'{name.removeprefix('model.')}' cannot change: {reason}"
            for name, reason in sorted(self._structure.fixed.items(), key=_is_output)
            if not pattern or fnmatch.fnmatch(name.removeprefix("model."), pattern)
        ]
        return RequestError(
            f"No {kind} group of this network matches '{pattern or kind}' (it has: "
            f"{', '.join(known[:12]) or 'none'}{'; ' if why else ''}{'; '.join(why[:3])}): "
            f"name one of them or leave {kind}= out.{nearest(pattern, known)}"
        )

    def _kept_axes(
        self, axes: Mapping[str, Axis | None], offered: dict[str, tuple[Value, ...]]
    ) -> dict[str, tuple[Value, ...]]:
        """Return the axes that still have a group; raises when nothing is left of a named one."""
        alive = {axis for n, (axis, _) in self._axes_of_groups.items() if n in self.groups}
        for axis in offered.keys() - alive:
            kind, _, pattern = axis.partition(".")
            wanted = axes[kind]
            every = isinstance(wanted, Sized) and wanted.per_group
            if not every or not any(_under(a, kind) for a in alive):
                raise self._no_group(kind, pattern, [n for n in self.groups if not pattern])
        return {axis: values for axis, values in offered.items() if axis in alive}

    def _axis_of(self, group: Group) -> str:
        return self._axes_of_groups[group.name][0]

    def _smallest_units(self, group: Group) -> int:
        if group.name not in self._axes_of_groups:
            return group.size
        axis, sized = self._axes_of_groups[group.name]
        pattern = axis.partition(".")[2]
        ratios = sized.ratios
        if isinstance(ratios, Mapping):
            ratios = ratios[pattern]
        return sized.kept(float(min(ratios)), group.size)

    def _depth_axes(self, depth: Axis | None) -> dict[str, tuple[Value, ...]]:
        if depth is None:
            return {}
        if isinstance(depth, Sized):
            raise RequestError("depth= takes numbers of blocks or ratios, not Sized: give a tuple.")
        if not self.stages:
            why = "; ".join(f"'{b}': {r}" for b, r in list(self._unskippable.items())[:3])
            raise RequestError(
                "No list of residual blocks was found whose depth could change"
                f"{' (' + why + ')' if why else ''}: leave depth= out."
            )
        if isinstance(depth, Mapping):
            for name in depth:
                if name not in self.stages:
                    raise RequestError(
                        f"'{name}' is not a stage of this network (it has: "
                        f"{', '.join(self.stages)}).{nearest(name, self.stages)}"
                    )
                _check_depths(depth[name], [self.stages[name]])
            return {f"depth.{name}": tuple(values) for name, values in depth.items()}
        _check_depths(depth, self.stages.values())
        return {"depth": tuple(depth)}

    # --- what a choice means ------------------------------------------------------------------

    def plan(self, choice: Choice | None = None) -> Plan:
        """Return what ``choice`` means: units kept, views, attributes, skipped blocks and exit."""
        if choice is not None and not isinstance(choice, Choice):
            choice = self.space.complete(choice)  # a plain mapping, which has no hash
        plan = self._plans.get(choice)
        if plan is not None:
            return plan
        given, choice = choice, self.space.complete(choice)
        plan = self._plans.get(choice)
        if plan is not None:
            self._plans[given] = plan
            return plan
        keep = self._units_kept(choice)
        skipped: list[str] = []
        for name, stage in self.stages.items():
            value = choice.get(f"depth.{name}", choice.get("depth"))
            if value is not None:
                skipped += stage.skipped(_depth(value, stage))
        alive = self._structure.alive(keep)
        at = int(choice["exit"]) - 1 if self.exits else len(self.exits)
        plan = Plan(
            choice,
            keep,
            self._structure.cuts(alive),
            self._structure.values(alive, keep),
            tuple(skipped),
            at if at < len(self.exits) else None,
            self._structure.input_scales(alive) if self.rescale else {},
        )
        self._plans[choice] = plan
        if len(self._plans) > 4096:
            self._plans.popitem(last=False)
        return plan

    def _units_kept(self, choice: Choice) -> dict[str, int]:
        keep = {}
        for name, group in self.groups.items():
            if name in self._axes_of_groups:
                axis, sized = self._axes_of_groups[name]
                keep[name] = sized.kept(choice[axis], group.size)
        return keep

    def cost(self, choice: Choice | None = None) -> Cost:
        """Return what one example costs under ``choice``, without running anything.

        Multiply-accumulates of convolutions and matrix products at the size of the example inputs;
        parameters and bytes are those of the extracted network.
        """
        choice = self.space.complete(choice)
        plan = self.plan(choice)
        alive = self._structure.alive(plan.keep)
        macs = self._structure.macs(alive, self._runs(plan)) // self.batch
        params = size = 0
        switched, live = self._switched_names(choice), self.tensors()
        for name, tensor in self._structure.tensors.items():
            if not self._survives(name, plan):
                continue
            shape = switched[name].shape if name in switched else self._structure.shape(name, alive)
            params += math.prod(shape) if isinstance(tensor, nn.Parameter) else 0
            size += math.prod(shape) * live[name].element_size()
        return Cost(macs, params, size)

    def exit_macs(self, choice: Choice | None = None) -> list[int]:
        """Return, for leaving at each exit in turn, the MACs with every head on the way counted."""
        plan = self.plan(choice)
        if not plan.exit_macs:
            alive = self._structure.alive(plan.keep)
            plan.exit_macs[:] = [
                self._structure.macs(alive, self._runs(plan, at, all_heads=True)) // self.batch
                for at in range(len(self.exits) + 1)
            ]
        return list(plan.exit_macs)

    def _head_start(self, at: int) -> int:
        ended = self._structure.ended
        return next(i for i, name in enumerate(ended) if _under(name, f"heads.{at}"))

    def _runs(
        self, plan: Plan, at: int | None = None, all_heads: bool = False
    ) -> Callable[[Seen], bool]:
        """Return the test whether a counted operation runs: not skipped, and before the exit."""
        at = at if at is not None else plan.exit if plan.exit is not None else len(self.exits)
        stop = self._head_start(at) if at < len(self.exits) else math.inf
        passed = range(at + 1) if all_heads else (at,)
        heads = [f"heads.{k}" for k in passed if k < len(self.exits)]
        gone = [f"model.{b}" for b in plan.skipped]

        def runs(seen: Seen) -> bool:
            if seen.module.startswith("heads."):
                return any(_under(seen.module, h) for h in heads)
            return seen.call < stop and not any(_under(seen.module, b) for b in gone)

        return runs

    def _survives(self, name: str, plan: Plan) -> bool:
        """Say whether the extracted network has this parameter or buffer."""
        places = [f"{path}.{slot}" for path, slot in self.slots[name]]
        if all(any(_under(p, f"model.{b}") for b in plan.skipped) for p in places):
            return False
        if plan.exit is None:
            return not name.startswith("heads.")
        if name.startswith("heads."):
            return _under(name, f"heads.{plan.exit}")
        return self._structure.first_use.get(name, math.inf) < self._head_start(plan.exit)

    # --- running ------------------------------------------------------------------------------

    def forward(self, *args: Any, choice: Choice | None = None, **kwargs: Any) -> Any:
        """Run the sub-network that ``choice`` selects: ``net(x, choice)`` or ``choice=choice``.

        The model's own forward runs on views of its weights: nothing is copied (but where kept
        channels are not contiguous, after a concatenation, say), and gradients reach the full
        weights. Without a choice the largest one runs. A choice with an exit returns what the
        exit's head gives.
        """
        args, choice = _split_choice(args, choice)
        plan = self.plan(choice)
        try:
            with self.body(plan) as body:
                return self._bodies.lend(body, body.run(args, kwargs, plan.exit))
        except _OF_INPUTS as error:
            self._explain(error, args, kwargs)
            raise

    def body(self, plan: Plan, evaluate: bool = False) -> AbstractContextManager[Body]:
        """Lend the module tree bound to a choice: see :mod:`pantarhei.elastic.bodies`."""
        return self._bodies.borrow(self, plan, evaluate)

    def new_body(self) -> Body:
        """Return a copy of the module tree; raises when its modules are no longer those traced."""
        if list(self.root_modules()) != self.layout:
            known = dict(self.layout)
            other = next(
                (p for p, m in self.root_modules() if known.pop(p, None) is not m), None
            ) or next(iter(known))
            raise RequestError(
                f"The module '{other.removeprefix('model.')}' was replaced, added or removed after "
                "elastic() had read the network: call elastic() again."
            )
        return Body(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ElasticNet:
        """Move what modules do not know of along with the parameters."""
        super()._apply(fn, recurse)
        self.statistics = {
            choice: {name: fn(t) for name, t in stats.items()}
            for choice, stats in self.statistics.items()
        }
        self.example = tree_map(lambda v: fn(v) if isinstance(v, Tensor) else v, self.example)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the pool of bodies out of copies and pickles."""
        own = ("_bodies", "places", "layout")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def root_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules of the model and its heads, with their paths under one roof."""
        for part in ("model", "heads"):
            for path, module in getattr(self, part).named_modules():
                yield (f"{part}.{path}" if path else part), module

    def tensors(self) -> dict[str, Tensor]:
        """Return the present parameters and buffers: ``to`` and assignments may replace them."""
        return {name: table[slot] for name, (table, slot) in self.places.items()}

    @property
    def slots(self) -> dict[str, list[tuple[str, str]]]:
        """The (module, name)s under which each parameter and buffer is found."""
        return self._structure.slots

    @cached_property
    def layout(self) -> list[tuple[str, nn.Module]]:
        """The modules that were traced."""
        return list(self.root_modules())

    @cached_property
    def places(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Where each parameter and buffer is kept: a module's table, and its name there."""
        modules = dict(self.layout)
        places: dict[str, tuple[dict[str, Any], str]] = {}
        for name, slots in self.slots.items():
            path, slot = slots[0]
            m = modules[path]
            places[name] = (m._parameters if slot in m._parameters else m._buffers, slot)
        return places

    def own_places(self, choice: Choice, evaluate: bool) -> dict[str, tuple[dict[str, Any], str]]:
        """Where the tensors are kept that are a choice's own: switched norms, statistics."""
        table: dict[str, Any] = self.switched._parameters
        own = {name: (table, key) for name, key in self._switched_keys.get(choice, {}).items()}
        statistics = self.statistics_of(choice, evaluate) or {}
        return own | {name: (statistics, name) for name in statistics}

    def statistics_of(self, choice: Choice, evaluate: bool) -> dict[str, Tensor] | None:
        """Return the BatchNorm statistics that were measured for a choice and are used now."""
        return self.statistics.get(choice) if evaluate or not self.training else None

    @cached_property
    def _bodies(self) -> Bodies:
        return Bodies()

    def all_exits(self, *args: Any, choice: Choice | None = None, **kwargs: Any) -> list[Any]:
        """Return the outputs of every exit's head and of the whole network, in one pass."""
        args, choice = _split_choice(args, choice)
        plan = self.plan(choice)
        try:
            with self.body(plan) as body:
                return self._bodies.lend(body, body.run_all(args, kwargs))
        except _OF_INPUTS as error:
            self._explain(error, args, kwargs)
            raise

    def adaptive(
        self, *args: Any, policy: Policy | None = None, choice: Choice | None = None, **kwargs: Any
    ) -> Adaptive:
        """Run each example as far as ``policy`` asks; see :mod:`pantarhei.elastic.exits`.

        Examples that leave are taken out of the batch, so what follows computes only the rest.
        Runs in evaluation mode. ``net.adaptive(x, policy)`` and keywords both work.
        """
        args, choice = _split_choice(args, choice)
        if args and policy is None and callable(args[-1]):
            args, policy = args[:-1], args[-1]
        if not self.exits:
            raise RequestError("This network has no exits: make it elastic with exits=(...) first.")
        if policy is None:
            raise RequestError("adaptive() needs a policy: pass Confidence(0.9), for instance.")
        plan = self.plan(choice)
        macs = self.exit_macs(plan.choice)
        try:
            with self.body(plan, evaluate=True) as body:
                return run_adaptive(body, args, kwargs, policy, macs, self._carriers)
        except _OF_INPUTS as error:
            self._explain(error, args, kwargs)
            raise

    def _explain(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise one clear sentence where inputs that differ from the example inputs failed.

        Only after a failure: many networks run at other sizes than the one they were read with.
        """
        if isinstance(error, RequestError | torch.OutOfMemoryError):
            return
        example, known = tree_flatten_with_path(self.example)
        given, asked = tree_flatten_with_path((args, kwargs))
        if known != asked:
            return  # called in another way: Python's own error names the argument
        for (path, wanted), (_, value) in zip(example, given, strict=True):
            if not (isinstance(wanted, Tensor) and isinstance(value, Tensor)):
                continue
            same = value.dtype.is_floating_point == wanted.dtype.is_floating_point
            if value.shape[1:] == wanted.shape[1:] and value.dim() == wanted.dim() and same:
                continue
            kinds = [f"{t.dtype}".removeprefix("torch.") for t in (value, wanted)]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise RequestError(
                f"This network does not run on input{keystr(path[1:])} of shape "
                f"{tuple(value.shape)} ({kinds[0]}): give it the shape of the example inputs of "
                f"elastic(), {tuple(wanted.shape)} ({kinds[1]}), where the first size is free "
                f"({reason[:200]})."
            ) from error

    def latency(
        self, choice: Choice | None = None, *args: Any, repeats: int = 10, **kwargs: Any
    ) -> float:
        """Return the median milliseconds of a call in evaluation mode (default: example inputs)."""
        args, kwargs = (args, kwargs) if args or kwargs else self.example
        choice = self.space.complete(choice)
        plan = self.plan(choice)
        with torch.no_grad(), self.body(plan, evaluate=True) as body:
            return latency_ms(body.run, args, kwargs, plan.exit, repeats=repeats)

    # --- normalisation ------------------------------------------------------------------------

    def _norm_modules(self) -> Iterator[tuple[str, nn.modules.batchnorm._NormBase]]:
        for path, module in self.root_modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                yield path, module

    def recalibrate(
        self, choice: Choice | None, batches: Iterable[Any], limit: int | None = 50
    ) -> None:
        """Measure the BatchNorm statistics of one sub-network and keep them for it.

        Statistics gathered while many widths train belong to none of them (SortedNet sheet,
        BatchNorm, strategy a): the running mean and variance start anew and become the cumulative
        average over at most ``limit`` batches in training mode, with weights frozen. Each batch is
        a tensor, a tuple whose first element is the input, or a dict of keywords. The statistics
        are used in evaluation mode and saved with the network; the full model's own stay.
        """
        choice = self.space.complete(choice)
        plan = self.plan(choice)
        norms = dict(self._norm_modules())
        if not norms:
            return
        fresh: dict[str, Tensor] = {}
        with self.body(plan, evaluate=True) as body, torch.no_grad():
            for path in norms:
                m = body.index[path]
                assert isinstance(m, nn.modules.batchnorm._NormBase)
                assert m.running_mean is not None and m.running_var is not None
                stats = {
                    "running_mean": torch.zeros_like(m.running_mean),
                    "running_var": torch.ones_like(m.running_var),
                    "num_batches_tracked": torch.zeros_like(m.running_mean[0], dtype=torch.long),
                }
                m._buffers.update(stats)
                fresh |= {f"{path}.{slot}": t for slot, t in stats.items()}
                m.train()
                m.momentum = None  # cumulative average
            seen = 0
            for batch in batches:
                if limit is not None and seen >= limit:
                    break
                args, kwargs = as_call(inputs_only(batch))
                body.run(args, kwargs, plan.exit)
                seen += 1
            for path, m in norms.items():
                body.index[path].momentum = m.momentum  # type: ignore[assignment]
                for slot in ("running_mean", "running_var", "num_batches_tracked"):
                    body.index[path]._buffers[slot] = None
        if not seen:
            raise RequestError("recalibrate() was given no batch: give at least one.")
        self.statistics[choice] = fresh

    def _switch_norms(self) -> None:
        """Give every choice its own affine and statistics (strategy b; for small grids)."""
        if len(self.space) > 256:
            raise RequestError(
                f"norm='switchable' keeps statistics for each of the {len(self.space)} choices: "
                "offer at most 256, or use norm='shared' and recalibrate what you choose."
            )
        for choice in self.space:
            keys = self._switched_keys[choice] = {}
            alive_cuts = self.plan(choice).cuts
            for path, module in self._norm_modules():
                for slot in ("weight", "bias", "running_mean", "running_var"):
                    tensor = getattr(module, slot)
                    if tensor is None:
                        continue
                    for cut in alive_cuts.get(f"{path}.{slot}", ()):
                        tensor = cut(tensor)
                    key = keys[f"{path}.{slot}"] = f"{choice}|{path}.{slot}".replace(".", ":")
                    own = tensor.detach().clone()
                    self.switched[key] = nn.Parameter(own, requires_grad=slot in ("weight", "bias"))

    def _switched_names(self, choice: Choice) -> dict[str, Tensor]:
        own = {
            name: self.switched[key] for name, key in self._switched_keys.get(choice, {}).items()
        }
        return {name: p if p.requires_grad else p.data for name, p in own.items()}

    # --- leaving the library ------------------------------------------------------------------

    def extract(self, choice: Choice | None = None) -> nn.Module:
        """Return the sub-network as a plain module with its own weights and no trace of this one.

        It is of the model's own class, trains, saves, compiles and exports by itself; statistics
        that :meth:`recalibrate` measured for the choice go along. A choice that leaves at an exit
        has no class of its own: it is returned as the ``torch.export`` graph of the part that runs,
        for evaluation, with a free batch size.
        """
        choice = self.space.complete(choice)
        plan = self.plan(choice)
        live = self.tensors()
        with self.body(plan, evaluate=True) as body:
            plain = _own_weights(body, {name for name, t in live.items() if t.requires_grad})
        if plan.exit is not None:
            return plain.export(*self.example, plan.exit)
        for path, module in self.root_modules():
            if path in plain.index:
                plain.index[path].training = module.training
        if plan.skipped and self._droppable:
            _drop_blocks(plain.model, plan.skipped)
        return plain.model

    @cached_property
    def _droppable(self) -> bool:
        """Whether skipped blocks can leave their lists, without the code missing them."""
        args, kwargs = self.example
        choice = self.space.smallest.replace(
            **({"exit": len(self.exits) + 1} if self.exits else {})
        )
        plan = self.plan(choice)
        with torch.no_grad(), self.body(plan, evaluate=True) as body:
            wanted = tensors_in(body.run(args, kwargs, None))
            short = _own_weights(body, set()).model
            _drop_blocks(short, plan.skipped)
            try:
                found = tensors_in(short(*args, **kwargs))
            except Exception:  # whatever the model's code raises when it looks for the block
                return False
        return len(found) == len(wanted) and all(
            a.shape == b.shape and bool(torch.isclose(a, b, 1e-3, 1e-4, equal_nan=True).all())
            for a, b in zip(found, wanted, strict=True)
        )

    def __repr__(self) -> str:
        return f"ElasticNet({type(self.model).__name__}, {self.space!r})"


def elastic(
    model: nn.Module,
    example_inputs: Any,
    *,
    width: Axis | None = None,
    depth: Axis | None = None,
    heads: Axis | None = None,
    mlp: Axis | None = None,
    exits: Any = None,
    norm: str = "shared",
    rescale: str | None = None,
) -> ElasticNet:
    """Make any network a space of sub-networks, without a change to its code.

    Args:
        model: any module; it is not changed, and its parameters become the shared weights.
        example_inputs: a tensor, a tuple of arguments or a dict of keywords that ``model`` accepts.
        width: ratios for every channel group that no other axis claims; a mapping from name
            patterns to ratios; or :class:`Sized` for rounding and one axis per group.
        heads: ratios for attention heads (whole key-value groups in grouped-query attention).
        mlp: ratios for the hidden units between two linear layers.
        depth: numbers of blocks (ints) or ratios (floats) for every stage of residual blocks, or a
            mapping from stage names to them.
        exits: names of modules after which the network can end, or a mapping from names to heads;
            heads that are not given are built (pooling and a linear layer to the model's outputs).
        norm: "shared" BatchNorm statistics (recalibrate what you choose), or "switchable": own
            statistics and affine for every choice of a small grid.
        rescale: "sqrt" multiplies a layer's weight by sqrt(n / k) when k of its n inputs are kept
            (DyLoRA, arXiv 2210.07558), or None.

    A sub-network is the model's own forward on views of its weights: theta(b) keeps what survives
    truncation along every axis (SortedNet, arXiv 2309.00255), and smaller choices are nested in
    larger ones. Raises :class:`RequestError` when the model cannot run on the example inputs, when
    nothing of what is asked for can change, and for values that make no sense.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> net = elastic(model, torch.ones(1, 4), width=(0.25, 0.5, 1.0))
    >>> small = Choice(width=0.25)
    >>> net.cost(small).macs, net.cost().macs
    (14, 56)
    >>> x = torch.randn(5, 4)
    >>> bool((net(x, small) == net.extract(small)(x)).all())
    True
    """
    if norm not in ("shared", "switchable"):
        raise RequestError(f"norm={norm!r} is unknown: use 'shared' or 'switchable'.")
    if rescale not in (None, "sqrt"):
        raise RequestError(f"rescale={rescale!r} is unknown: use 'sqrt' or None.")
    if not isinstance(model, nn.Module):
        raise RequestError(f"{type(model).__name__} is no torch.nn.Module: give a module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise RequestError(
            "A TorchScript module does not show its operations to Python: give the module that it "
            "was scripted or traced from."
        )
    if any(is_lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise RequestError("The model has lazy parameters without a shape: run it once first.")
    args, kwargs = as_call(example_inputs)
    axes = {"width": width, "depth": depth, "heads": heads, "mlp": mlp}
    if all(a is None for a in (*axes.values(), exits or None)):
        raise RequestError(
            "Nothing to make elastic: name at least one of width, depth, heads, mlp, exits."
        )
    with preserved(model):
        found = Exits.find(model, args, kwargs, exits) if exits else None
        net = ElasticNet(model, example_inputs, axes, found, norm, rescale)
        net.training = net.heads.training = model.training
        if found:
            found.check_batches(net)
    return net


# What a forward raises on inputs that it cannot take.
_OF_INPUTS = (RuntimeError, ValueError, TypeError, IndexError)


def _split_choice(
    args: tuple[Any, ...], choice: Choice | None
) -> tuple[tuple[Any, ...], Choice | None]:
    if args and isinstance(args[-1], Choice):
        if choice is not None:
            raise RequestError("Two choices were given: pass one, by position or as choice=.")
        return args[:-1], args[-1]
    return args, choice


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    return tensors[0].shape[0] if tensors else 1


def _is_output(item: tuple[str, str]) -> bool:
    return item[1].endswith("the output")


def _under(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + ".")


def _check_ratios(kind: str, ratios: Any) -> None:
    if not _numbers(ratios) or not all(0 < r <= 1 for r in ratios):
        raise RequestError(
            f"{kind}={ratios!r} is not a set of ratios: give a tuple of numbers above 0 and at "
            "most 1."
        )


def _check_depths(depths: Any, stages: Iterable[Stage]) -> None:
    longest = max(len(stage.blocks) for stage in stages)
    if not _numbers(depths) or not (
        all(isinstance(d, int) and 1 <= d <= longest for d in depths)
        or all(isinstance(d, float) and 0 < d <= 1 for d in depths)
    ):
        raise RequestError(
            f"depth={depths!r} is not a set of depths: give a tuple of numbers of blocks from 1 to "
            f"{longest}, or of ratios above 0 and at most 1 (as floats)."
        )


def _numbers(values: Any) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) > 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )


def _depth(value: Value, stage: Stage) -> int:
    """Return the blocks of a stage that a depth (a number of blocks, or a ratio) keeps."""
    n = len(stage.blocks)
    wanted = math.ceil(value * n - 1e-9) if isinstance(value, float) else value
    return min(n, max(wanted, stage.smallest))


def _own_weights(body: Root, trainable: set[str]) -> Root:
    """Copy a bound skeleton into a module with contiguous parameters of its own."""
    tensors, slots = named_tensors(body)
    memo: dict[int, Any] = {}
    for module in body.modules():
        for tensor in vars(module).values():
            if isinstance(tensor, Tensor):  # what code computes and keeps (weight_norm, say)
                memo[id(tensor)] = tensor.detach().clone()
    for name, tensor in tensors.items():
        path, slot = slots[name][0]
        parameter = slot in body.index[path]._parameters
        own = tensor.detach().clone(memory_format=torch.contiguous_format)
        memo[id(tensor)] = nn.Parameter(own, name in trainable) if parameter else own
    model, heads = copy.deepcopy((body.model, body.heads), memo)
    return Root(model, heads, body.exits)


def _drop_blocks(model: nn.Module, blocks: Sequence[str]) -> None:
    """Take skipped blocks out of the lists that hold them."""
    modules = dict(model.named_modules())
    for block in reversed(blocks):  # from the end, so that positions in a list stay valid
        parent, _, child = block.rpartition(".")
        holder = modules[parent]
        assert isinstance(holder, (nn.ModuleList, nn.Sequential))
        del holder[list(holder._modules).index(child)]
