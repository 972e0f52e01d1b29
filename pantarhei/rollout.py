r"""Running a learned system forward in time, training it for that, and measuring the horizon.

A model takes the last ``h`` states of ``B`` trajectories and returns the next one. States are
(B, C, \*space), C channels on a grid of any number of dimensions, or (B, C): a series of sensors.
:func:`stream` feeds predictions back, one state after another, and holds only the last ``h`` of
them, so that the length of the horizon costs no memory; :func:`rollout` keeps what the caller asks
for and measures every step; :func:`forecast_loss` is the loss of :func:`pantarhei.fit.fit` that
trains a model for it. Each metric over the horizon is defined here, once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pantarhei._fit_loss import Loss
from pantarhei.errors import RequestError

Layout = Literal["channels", "window"]
Metric = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Frame:
    r"""One predicted state.

    ``step`` counts from 1. ``state`` is (B, C, \*space), the mean over members where there are
    several; ``members`` then holds each, (M, B, C, \*space). ``blown_at`` (B,) is the step at
    which a trajectory left the finite range, 0 for one that has not; from there on it is NaN.
    """

    step: int
    state: Tensor
    members: Tensor | None
    blown_at: Tensor


def stream(
    model: Callable[..., Any] | Sequence[Callable[..., Any]],
    start: Tensor,
    steps: int | None = None,
    *,
    given: Sequence[Any] = (),
    controls: Tensor | Callable[[int], Tensor] | None = None,
    truth: Tensor | Callable[[int], Tensor] | None = None,
    forced: int = 0,
    memory: Any = None,
    layout: Layout = "channels",
    feedback: Literal["own", "mean"] = "own",
    limit: float = math.inf,
    grad: bool = False,
) -> Iterator[Frame]:
    r"""Yield the states that follow ``start``, one at a time; nothing older than ``h`` is held.

    .. math:: \hat u_{t+1} = f(\hat u_{t-h+1}, \dots, \hat u_t;\; m_t, c_t, g)

    The model is called as ``model(past, memory, control, *given)``, of which the middle two are
    there only where they were given.

    Args:
        model: A callable, or a sequence of them: an ensemble (or draws from a posterior), whose
            members all start from ``start``.
        start: The true states to begin with, (B, h, C, \*space).
        steps: How many states to predict; None goes on until the caller stops or all blew up.
        given: What every step is told: parameters, a mask, coordinates.
        controls: What is known beforehand about each step: ``controls[:, t - 1]`` of
            (B, steps, ...), or a function of the step's number t, counted from 1.
        truth: The true states, ``truth[:, t - 1]`` or a function of t; needed by ``forced``.
        forced: The first so many predictions are replaced by the truth before they are fed back
            (teacher forcing). ``steps`` or more: one-step predictions all the way.
        memory: Initial hidden state of a recurrent model, which then returns ``(next, memory)``;
            for an ensemble a sequence with one for each member.
        layout: How the model sees the past: ``"channels"`` stacks it to (B, h C, \*space), which
            for h = 1 is the state itself; ``"window"`` leaves (B, h, C, \*space).
        feedback: Members of an ensemble go on from their ``"own"`` states, or from the ``"mean"``.
        limit: A trajectory has blown up when a value is not finite, or this large or larger.
        grad: Keep the graph for derivatives; memory then grows with the steps.

    Raises:
        RequestError: For a start that is not finite, shapes that do not fit, too few controls or
            true states for the steps, and a model that returns another shape than a state's.

    >>> decay = lambda past: 0.5 * past
    >>> [frame.state.item() for frame in stream(decay, torch.ones(1, 1, 1), 3)]
    [0.5, 0.25, 0.125]
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    members = len(models)
    if not models:
        raise RequestError("An ensemble has at least one member: give a model, or several.")
    memories = None if memory is None else list(memory) if members > 1 else [memory]
    if memories is not None and len(memories) != members:
        raise RequestError(f"{members} members need {members} memories, not {len(memories)}.")
    _check_start(start, steps)
    for name, series in (("controls", controls), ("truth", truth)):
        if isinstance(series, Tensor):
            taught = forced if steps is None else min(forced, steps)
            _check_series(name, series, start, steps if name == "controls" else taught)
    if forced and truth is None:
        raise RequestError(f"forced={forced} feeds true states back: give them as truth.")
    if layout not in ("channels", "window") or feedback not in ("own", "mean"):
        raise RequestError(
            f"layout={layout!r}, feedback={feedback!r}: layout is 'channels' or 'window', feedback "
            "is 'own' or 'mean'."
        )
    control, true = _as_function(controls), _as_function(truth)

    def run() -> Iterator[Frame]:
        pasts = [start] * members
        alive = torch.ones(len(start), dtype=torch.bool, device=start.device)
        blown_at = torch.zeros(len(start), dtype=torch.long, device=start.device)
        like_state = (len(start),) + (1,) * (start.dim() - 2)
        for t in itertools.count(1) if steps is None else range(1, steps + 1):
            told = (*(() if control is None else (control(t),)), *given)
            with torch.set_grad_enabled(grad and torch.is_grad_enabled()):
                found = []
                for i, one in enumerate(models):
                    past = pasts[i].flatten(1, 2) if layout == "channels" else pasts[i]
                    out = one(past, *(() if memories is None else (memories[i],)), *told)
                    if memories is not None:
                        out, memories[i] = out
                    found.append(_checked(out, start))
                predicted = torch.stack(found)
                # a comparison with NaN is false, so that this one catches it as well
                fine = (predicted.detach().abs() < limit).transpose(0, 1).flatten(1).all(1)
                blown_at = torch.where(alive & ~fine, t, blown_at)
                alive = alive & fine
                going = alive.view(like_state)
                predicted = torch.where(going, predicted, math.nan)
                state = predicted.mean(0) if members > 1 else predicted[0]
                fed = [state if feedback == "mean" else predicted[i] for i in range(members)]
                if true is not None and t <= forced:
                    fed = [true(t).to(start)] * members
                # what blew up stays where it was: the others' batch keeps its shape
                pasts = [
                    torch.cat([p[:, 1:], torch.where(going, f, p[:, -1])[:, None]], 1)
                    for p, f in zip(pasts, fed, strict=True)
                ]
            yield Frame(t, state, predicted if members > 1 else None, blown_at)
            if not alive.any():
                return

    return run()


@dataclass(frozen=True)
class Forecast:
    r"""What :func:`rollout` returns.

    ``kept`` are the states asked for, (B, K, C, \*space), of the steps ``steps`` (or the list of
    what a function kept); ``members`` (M, B, K, ...) of an ensemble. ``scores`` has a tensor
    (B, T, ...) for each metric and monitor, T the steps that were run. ``blown_at`` (B,): 0, or the
    step at which a trajectory blew up. Everything lies on the CPU.
    """

    kept: Any
    members: Tensor | None
    steps: tuple[int, ...]
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    blown_at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    @property
    def blown(self) -> int:
        """How many trajectories blew up."""
        return int((self.blown_at > 0).sum())

    def rows(self, dt: float = 1.0) -> list[dict[str, float]]:
        """Return a row per step: time, the scores' means, and how many trajectories had blown up.

        The means are over the trajectories that had not.
        """
        length = max((s.shape[1] for s in self.scores.values()), default=0)
        rows = []
        for t in range(length):
            row: dict[str, float] = {"step": t + 1, "time": (t + 1) * dt}
            row |= {name: float(s[:, t].nanmean()) for name, s in self.scores.items()}
            row["blown"] = int(((self.blown_at > 0) & (self.blown_at <= t + 1)).sum())
            rows.append(row)
        return rows

    def mean(self, name: str) -> float:
        """Return the mean of a score over trajectories and steps; inf where one blew up."""
        return math.inf if self.blown else float(self.scores[name].mean())


def rollout(
    model: Callable[..., Any] | Sequence[Callable[..., Any]],
    start: Tensor,
    steps: int,
    *,
    truth: Tensor | Callable[[int], Tensor] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    monitors: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    keep: Literal["all", "last", "none"] | int | Callable[[Frame], Any] = "all",
    decode: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Forecast:
    """Run a model forward without gradients, in evaluation mode, and measure it.

    Args:
        model: As in :func:`stream`, like ``start``, ``steps`` and ``options``.
        start: The true states to begin with.
        steps: How many states to predict.
        truth: True states in the model's units, compared step by step.
        metrics: ``name: function(forecast, truth)`` of (B, C, *space) each, per trajectory:
            (B, ...). Needs ``truth``.
        monitors: ``name: function(forecast)``, for what needs no truth (conservation, spectra).
        keep: Which states to keep: all, the last, none, every k-th (an integer), or a function of
            a :class:`Frame` whose results are kept (None is not).
        decode: From the model's units to physical ones, before measuring and keeping
            (:meth:`pantarhei.data.trajectories.Statistics.restore`).
        options: Those of :func:`stream`.

    >>> truth = 0.5 ** torch.arange(1, 4).view(1, 3, 1)
    >>> found = rollout(lambda past: 0.5 * past, torch.ones(1, 1, 1), 3, truth=truth,
    ...                 metrics={"nmse": nmse}, keep="last")
    >>> found.kept.tolist(), found.scores["nmse"].tolist(), found.blown
    ([[[0.125]]], [[0.0, 0.0, 0.0]], 0)
    """
    if metrics and truth is None:
        raise RequestError(f"The metrics {', '.join(metrics)} need the true states: give truth.")
    if isinstance(truth, Tensor):
        _check_series("truth", truth, start, steps if metrics else 0)
    if isinstance(keep, int) and keep < 1:
        raise RequestError(f"keep={keep}: keep every k-th state with k of at least 1.")
    true, shown = _as_function(truth), decode or (lambda x: x)
    scores: dict[str, list[Tensor]] = {name: [] for name in (*(metrics or {}), *(monitors or {}))}
    kept: list[Any] = []
    members: list[Tensor] = []
    numbers: list[int] = []
    frame = None
    with torch.no_grad(), _evaluating(model):
        for frame in stream(model, start, steps, truth=truth, **options):
            state = shown(frame.state)
            if metrics and true is not None:
                target = shown(true(frame.step).to(start))
                for name, metric in metrics.items():
                    scores[name].append(metric(state, target))
            for name, monitor in (monitors or {}).items():
                scores[name].append(monitor(state))
            if callable(keep):
                result = keep(frame)
                if result is not None:
                    kept.append(result)
                    numbers.append(frame.step)
            elif keep == "all" or (isinstance(keep, int) and frame.step % keep == 0):
                kept.append(state.cpu())
                numbers.append(frame.step)
                if frame.members is not None:
                    members.append(torch.stack([shown(m) for m in frame.members]).cpu())
        assert frame is not None  # steps is at least 1
        if keep == "last":
            kept, numbers = [shown(frame.state).cpu()], [frame.step]
            if frame.members is not None:
                members = [torch.stack([shown(m) for m in frame.members]).cpu()]
    stacked = kept if callable(keep) else torch.stack(kept, 1) if kept else None
    return Forecast(
        stacked,
        torch.stack(members, 2) if members else None,
        tuple(numbers),
        {name: torch.stack(values, 1).cpu() for name, values in scores.items()},
        frame.blown_at.cpu(),
    )


def persistence(past: Tensor, *_: Any) -> Tensor:
    """Forecast the last state again; for ``layout="window"``, (B, h, C, *space)."""
    return past[:, -1]


def forecast_loss(
    error: Metric | None = None,
    *,
    steps: int = 1,
    pushforward: int = 0,
    noise: float = 0.0,
    controlled: bool = False,
    layout: Layout = "channels",
) -> Loss:
    r"""Return ``loss(model, batch)`` for :func:`pantarhei.fit.fit`: the error of the next states.

    A batch is ``(past, targets, *given)``: (B, h, C, \*space), (B, k, C, \*space) and what every
    step is told (with ``controlled`` the first of these are controls, (B, k, ...)). With
    p = ``pushforward`` and n = ``steps``, k is at least p + n:

    .. math:: \frac1n \sum_{t=p+1}^{p+n} \overline{\mathrm{error}(\hat u_t, u_t)},

    one-step training for p = 0, n = 1; multi-step training, with gradients through all steps, for
    n > 1; push-forward training (Brandstetter, Worrall and Welling, arXiv 2202.03376) for p > 0,
    whose first p steps carry no gradient, so that the model learns to go on from its own errors.
    ``noise`` is the standard deviation of Gaussian noise added to ``past`` (Sanchez-Gonzalez and
    others, arXiv 2002.09405). ``error`` is :func:`relative_l2` unless given.

    >>> past, targets = torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4)
    >>> forecast_loss()(lambda x: 0.5 * x, (past, targets)).item()
    0.5
    """
    if steps < 1 or pushforward < 0 or not noise >= 0:
        raise RequestError(
            f"steps={steps}, pushforward={pushforward}, noise={noise}: choose 1 or more steps, and "
            "a push-forward and a noise that are not negative."
        )
    measure = error or relative_l2

    def loss(model: Any, batch: Any) -> Tensor:
        past, targets, *given = batch
        if targets.shape[1] < pushforward + steps:
            raise RequestError(
                f"The loss compares {pushforward} + {steps} steps, the batch has "
                f"{targets.shape[1]}: draw windows with a horizon of {pushforward + steps}."
            )
        controls = given.pop(0) if controlled else None
        if noise:
            past = past + noise * torch.randn_like(past)
        for first, count, grad in ((0, pushforward, False), (pushforward, steps, True)):
            if count:
                told = None if controls is None else controls[:, first : first + count]
                frames = stream(
                    model, past, count, given=given, controls=told, layout=layout, grad=grad
                )
                states = torch.stack([frame.state for frame in frames], 1)
                past = torch.cat([past, states], 1)[:, -past.shape[1] :]
        aims = targets[:, pushforward : pushforward + states.shape[1]]
        return measure(states.flatten(0, 1), aims.flatten(0, 1)).mean()

    return loss


def relative_l2(forecast: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return :math:`\lVert p - y\rVert_2 / \lVert y\rVert_2` over space: (N, C).

    No constant in the denominator: a channel that is zero everywhere gives inf or NaN. ``mask``
    (broadcast against the states) weighs the cells.

    >>> y = torch.randn(2, 3, 8, 8)
    >>> relative_l2(torch.zeros_like(y), y).unique().tolist()
    [1.0]
    """
    gap, size = _masked(mask, forecast - truth, truth)
    return gap.flatten(2).norm(dim=2) / size.flatten(2).norm(dim=2)


def nmse(forecast: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return :math:`\overline{(p - y)^2} / \overline{y^2}` over channels and space, (N,).

    >>> nmse(torch.zeros(1, 2, 5), torch.full((1, 2, 5), 3.0)).item()
    1.0
    """
    gap, size = _masked(mask, forecast - truth, truth)
    return gap.square().flatten(1).sum(1) / size.square().flatten(1).sum(1)


def nrmse(forecast: Tensor, truth: Tensor, scale: Tensor | float) -> Tensor:
    r"""Return :math:`\sqrt{\overline{(p - y)^2}} / \mathrm{scale}` over space, (N, C).

    ``scale``: a number, or one for each channel, (C,): the standard deviation of the training data.

    >>> nrmse(torch.zeros(1, 1, 4), torch.full((1, 1, 4), 2.0), 4.0).item()
    0.5
    """
    return (forecast - truth).square().flatten(2).mean(2).sqrt() / scale


def correlation(forecast: Tensor, truth: Tensor) -> Tensor:
    """Return Pearson's correlation over space, (N, C); NaN where a channel is constant.

    >>> y = torch.arange(4.0).view(1, 1, 4)
    >>> round(correlation(3 * y + 1, y).item(), 6), round(correlation(-y, y).item(), 6)
    (1.0, -1.0)
    """
    p, y = (x.flatten(2) - x.flatten(2).mean(2, keepdim=True) for x in (forecast, truth))
    return (p * y).sum(2) / (p.norm(dim=2) * y.norm(dim=2))


def correlation_time(correlations: Tensor, dt: float = 1.0, threshold: float = 0.8) -> Tensor:
    """Return when the correlation first falls below ``threshold``: (B,) of (B, T), step 1 first.

    Between steps it is interpolated linearly, from 1 at time 0; a trajectory that never falls below
    gets ``T dt``, one that is not finite counts as fallen.

    >>> correlation_time(torch.tensor([[1.0, 0.6], [1.0, 1.0]])).round(decimals=4).tolist()
    [1.5, 2.0]
    """
    ones = correlations.new_ones(len(correlations), 1)
    values = torch.cat([ones, correlations.nan_to_num(-1.0)], 1)
    below = values < threshold
    first = below.int().argmax(1).clamp(min=1)[:, None]
    after, before = values.gather(1, first)[:, 0], values.gather(1, first - 1)[:, 0]
    fallen = first[:, 0] - 1 + (before - threshold) / (before - after)
    never = correlations.shape[1] * torch.ones_like(fallen)
    return dt * torch.where(below.any(1), fallen, never)


def radial_spectrum(states: Tensor) -> Tensor:
    r"""Return the energy in each shell of wavenumbers, (N, C, K), of periodic (N, C, \*space).

    .. math:: E_\kappa = \frac{1}{n^2}\sum_{\kappa - 1/2 \le |k| < \kappa + 1/2} |\hat u_k|^2,

    k in whole waves per domain along each axis, n the number of cells; the sum over all shells is
    the mean of :math:`u^2` (Parseval), so nothing in the corners is left out.

    >>> x = torch.arange(16) / 16 * 2 * math.pi
    >>> radial_spectrum(torch.cos(3 * x).view(1, 1, 16)).argmax().item()
    3
    """
    space = states.shape[2:]
    power = torch.fft.fftn(states, dim=tuple(range(2, states.dim()))).abs().square()
    axes = [torch.fft.fftfreq(n, 1 / n, device=states.device) for n in space]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0).round().long()
    out = power.new_zeros(*states.shape[:2], int(radius.max()) + 1)
    power = power.flatten(2) / math.prod(space) ** 2
    return out.index_add_(2, radius.flatten(), power)


def conservation_error(
    states: Tensor,
    start: Tensor,
    quantity: Callable[[Tensor], Tensor] = lambda x: x.flatten(2).mean(2),
) -> Tensor:
    r"""Return :math:`|Q(u_t) - Q(u_0)| / |Q(u_0)|`; Q is the mean over space unless given, (N, C).

    >>> conservation_error(torch.full((1, 1, 4), 1.5), torch.ones(1, 1, 4)).item()
    0.5
    """
    before = quantity(start)
    return (quantity(states) - before).abs() / before.abs()


def _masked(mask: Tensor | None, *fields: Tensor) -> tuple[Tensor, ...]:
    return fields if mask is None else tuple(field * mask for field in fields)


def _as_function(series: Tensor | Callable[[int], Tensor] | None) -> Callable[[int], Tensor] | None:
    if isinstance(series, Tensor):
        return lambda t: series[:, t - 1]
    return series


def _check_start(start: Tensor, steps: int | None) -> None:
    if start.dim() < 3 or 0 in start.shape:
        raise RequestError(
            f"start is (trajectory, past, channel, *space), and none of these is empty; it has "
            f"shape {tuple(start.shape)}."
        )
    if steps is not None and steps < 1:
        raise RequestError(f"steps={steps}: predict at least one state.")
    bad = ~torch.isfinite(start).flatten(1).all(1)
    if bad.any():
        raise RequestError(
            f"The start of trajectory {int(bad.nonzero()[0])} is not finite: leave it out, or "
            "repair it."
        )


def _check_series(name: str, series: Tensor, start: Tensor, steps: int | None) -> None:
    wrong = name == "truth" and series.shape[2:] != start.shape[2:]
    if series.dim() < 2 or len(series) != len(start) or wrong:
        raise RequestError(
            f"{name} of shape {tuple(series.shape)} does not fit a start of {tuple(start.shape)}: "
            "give (trajectory, step, ...) of the same trajectories."
        )
    if steps is None or series.shape[1] < steps:
        raise RequestError(
            f"{name} has {series.shape[1]} steps, fewer than the "
            f"{'unlimited' if steps is None else steps} to predict: give more, or predict fewer."
        )


def _checked(out: Any, start: Tensor) -> Tensor:
    wanted = (len(start), *start.shape[2:])
    if not isinstance(out, Tensor) or out.shape != wanted:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise RequestError(
            f"The model returned {shape} where the next state is {wanted}: see whether layout is "
            "the one it takes, and whether it has a memory."
        )
    return out.to(start.dtype)


class _evaluating:
    """Put the modules among some models into evaluation mode, and back."""

    def __init__(self, model: Any) -> None:
        models = model if isinstance(model, Sequence) else [model]
        modules = [m for m in models if isinstance(m, nn.Module)]
        self.training = [part for m in modules for part in m.modules() if part.training]

    def __enter__(self) -> None:
        for module in self.training:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module in self.training:
            module.training = True
