r"""Learning curves predicted from data and initial weights, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import exprel

from pantarhei.errors import RequestError
from pantarhei.learning.deep_linear import closed_forms
from pantarhei.learning.deep_linear.correlations import Correlations, Modes
from pantarhei.learning.deep_linear.flow import Weights, gradient_flow, linear_weights, product

Array = NDArray[np.float64]
Kind = Literal["exact", "projected", "simulated"]

_DECOUPLED = 1e-6  # of the strongest entry: what may stand beside the diagonal


@dataclass(frozen=True, eq=False)
class Prediction:
    """Predicted strengths of the modes over time, for one or several initial weights.

    Attributes:
        times: (T,).
        u: (T, draws, K) strengths in the end-to-end map; draws is 1 for a single start.
        u_alone: The same had no mode a competitor: the optimistic side of the error bars. It is
            ``u`` itself where the prediction is exact.
        modes: The modes that are learned.
        data: The correlations predicted from.
        kind: ``"exact"`` (the closed form holds for this start), ``"projected"`` (two layers from a
            dense start, each mode from the part of it that grows) or ``"simulated"`` (gradient flow
            on the correlations).
        products: (T, draws, N3, N1) end-to-end maps, where they are known: of one layer, and
            simulated. Losses are then exact for starts that are not decoupled, too.
    """

    times: Array
    u: Array
    u_alone: Array
    modes: Modes
    data: Correlations
    kind: Kind
    products: Array | None = None

    def loss(self) -> Array:
        r"""Return the loss (T, draws) of the data predicted from.

        .. math:: L = \tfrac12 \sum_\alpha \lambda_\alpha (s_\alpha/\lambda_\alpha - u_\alpha)^2
                      + L_{\min}

        with :math:`\lambda = 1` for whitened inputs.
        """
        return self.loss_on(self.data)

    def loss_on(self, other: Correlations) -> Array:
        r"""Return the loss (T, draws) of other data, such as a validation set, along the way.

        With :math:`W(t) = U u(t) V^T` it needs the other data's correlations along the modes alone.
        """
        if other.sigma31.shape != self.data.sigma31.shape:
            raise RequestError(
                f"These data have correlations of shape {other.sigma31.shape} and the prediction "
                f"{self.data.sigma31.shape}: give the same inputs and targets."
            )
        if self.products is not None:
            return other.loss(self.products)
        along = np.einsum("ik,ij,jk->k", self.modes.U, other.sigma31, self.modes.V, optimize=True)
        power = np.einsum("ik,ij,jk->k", self.modes.V, other.sigma11, self.modes.V, optimize=True)
        return other.power / 2 - self.u @ along + self.u**2 @ power / 2

    def band(self, low: float = 0.1, high: float = 0.9) -> tuple[Array, Array, Array]:
        """Return the error bars (T, K) of the strengths: low, median, high.

        Over several draws: quantiles. Of one dense start: the predictions with and without
        competition between the modes, between which the truth lies until they are learned.
        """
        if self.u.shape[1] > 1:
            low_, middle, high_ = np.quantile(self.u, [low, 0.5, high], axis=1)
            return low_, middle, high_
        one, alone = self.u[:, 0], self.u_alone[:, 0]
        return np.minimum(one, alone), one, np.maximum(one, alone)

    def time_to(self, share: float = 0.5) -> Array:
        """Return when (draws, K) each mode first has ``share`` of its final strength.

        0 where a start has it already, infinite where the times do not reach so far or the mode is
        never learned (its target is 0, or no part of the start grows). A mode that starts with the
        wrong sign counts from the start all the same. Interpolated linearly between the times.
        """
        return time_to(self.times, self.u, self.modes.target, share)

    @property
    def order(self) -> NDArray[np.intp]:
        """Modes in the order in which they are learned (by the median half time)."""
        return np.argsort(np.median(self.time_to(0.5), 0), kind="stable")

    def plateaus(self) -> list[tuple[float, float]]:
        """Return the spans of time in which the median loss waits for the next mode.

        From when a mode has 90 % of its strength until the next one to be learned has 10 %, where
        the second comes after the first; the first plateau begins at 0.
        """
        start, end = (np.median(self.time_to(share), 0) for share in (0.1, 0.9))
        out, since = [], 0.0
        for k in self.order:
            if not np.isfinite(start[k]):
                break
            if start[k] > since:
                out.append((since, float(start[k])))
            since = max(since, float(end[k]))
        return out

    def stopping_time(self, validation: Correlations | None = None, share: float = 0.01) -> float:
        """Return when to stop: where the validation loss is least, or the loss nearly is.

        Without validation data: the first time at which no more than ``share`` of the learnable
        loss is left. Infinite where that lies beyond the times.
        """
        if validation is not None:
            curve = np.median(self.loss_on(validation), 1)
            return float(self.times[int(np.argmin(curve))])
        excess = np.median(self.loss(), 1) - self.data.floor
        reached = np.flatnonzero(excess <= share * (self.data.power / 2 - self.data.floor))
        return float(self.times[reached[0]]) if len(reached) else np.inf

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row for each time: t, the loss, and u_1, u_1_low, u_1_high, u_2, ..."""
        low, middle, high = self.band()
        loss = np.median(self.loss(), 1)
        for i, t in enumerate(self.times):
            row: dict[str, Any] = {"t": float(t), "loss": float(loss[i])}
            for k in range(middle.shape[1]):
                for name, values in (("", middle), ("_low", low), ("_high", high)):
                    row[f"u_{k + 1}{name}"] = float(values[i, k])
            yield row


def predict(
    data: Correlations,
    weights: Weights,
    times: ArrayLike | None = None,
    *,
    tau: float = 1.0,
    approximate: bool = False,
    simulate: bool = False,
) -> Prediction:
    r"""Predict how a (deep) linear network learns ``data`` from ``weights``.

    One layer is exact for any start and any inputs (where these are neither white nor commuting,
    its modes are the principal directions of the inputs). So are two or more layers from a
    decoupled start (:func:`pantarhei.learning.initializers.balanced_`), with the strengths that the
    layers have there. Two layers from a dense small start are *projected* (:func:`project`): an
    excellent approximation after the brief phase in which they align. Deeper dense starts have no
    closed form and are simulated on the correlations, as is everything with ``simulate``.

    Args:
        data: Correlations of inputs and targets; of white inputs unless there is one layer.
        weights: The initial weights: a model, or matrices (draws..., out, in).
        times: Increasing times from 0 on, in the unit of ``tau``; by default 200 until the slowest
            mode (of those above 1 % of the strongest) is learned.
        tau: Time constant; ``data.tau(lr, "mse")`` makes the unit a step of descent.
        approximate: Go on with a warning where the inputs are not white.
        simulate: Integrate the flow even where a closed form holds.

    Raises :class:`RequestError` where more than one layer has inputs that are not white, or shapes
    do not fit.

    >>> data = Correlations.of_map(np.diag([2.0, 1.0]))
    >>> start = 1e-3 * np.random.default_rng(0).normal(size=(2, 8, 8))
    >>> predicted = predict(data, [start[0][:, :2], start[1][:2]])
    >>> predicted.kind, predicted.order.tolist()
    ('projected', [0, 1])
    """
    matrices = linear_weights(weights)
    if (matrices[-1].shape[-2], matrices[0].shape[-1]) != data.sigma31.shape:
        raise RequestError(
            f"The weights map {matrices[0].shape[-1]} inputs to {matrices[-1].shape[-2]} outputs "
            f"and the data have {data.sigma31.shape[1]} and {data.sigma31.shape[0]}."
        )
    if len(matrices) == 1:
        return _one_layer(matrices[0], data, times, tau)
    modes = data.modes(approximate)
    strengths, kind = _strengths(matrices, modes)
    if simulate or kind == "simulated":
        return _simulated(matrices, data, modes, times, tau)
    alone = strengths if kind == "exact" else project(matrices, modes, competition=False)
    tau_modes = _tau(modes, tau)
    t = _default_times(strengths, modes, tau_modes) if times is None else _times(times)

    def curve(a0: Array) -> Array:
        return closed_forms.chain(t, modes.target, a0, tau_modes)

    u = curve(strengths)
    return Prediction(t, u, u if kind == "exact" else curve(alone), modes, data, kind)


def _tau(modes: Modes, tau: float) -> Array:
    power = modes.power
    return np.divide(tau, power, out=np.full_like(power, np.inf), where=power > 0)


def _times(times: ArrayLike) -> Array:
    t = np.asarray(times, dtype=np.float64)
    if t.ndim != 1 or not len(t) or (np.diff(t) <= 0).any() or t[0] < 0:
        raise RequestError("times must be one increasing sequence from 0 on: sort them.")
    return t


def project(weights: Sequence[Any], modes: Modes, competition: bool = True) -> Array:
    r"""Return the strengths (2, draws, K) from which each mode of a dense two-layer start grows.

    In the modes' basis the start is a vector :math:`a` (column of W^1 V) and :math:`b` (row of
    U^T W^2) for each mode. While all are small, :math:`p = a + b` grows and :math:`a - b` decays,
    so the mode comes to point along p: its strengths are the projections of a and b on p, which
    keep :math:`|a|^2 - |b|^2`. Where stronger modes are learned first they push out what p shares
    with them: with ``competition`` p is orthogonalised against theirs (in a QR decomposition, the
    strongest first). A mode without a hidden unit left for it has strengths 0.
    """
    first, second = (np.asarray(w, dtype=np.float64) for w in weights)
    a = first @ modes.V  # (draws..., H, K)
    b = np.swapaxes(second, -1, -2) @ modes.U
    a, b = (x.reshape(-1, *x.shape[-2:]) for x in np.broadcast_arrays(a, b))
    p, m = a + b, a - b
    if competition:
        q, r = np.linalg.qr(p)
        found = min(p.shape[-2:])
        size = np.zeros((len(p), p.shape[-1]))
        size[:, :found] = np.abs(np.diagonal(r, axis1=-2, axis2=-1))
        direction = np.zeros_like(p)
        turned = np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None]
        direction[..., :found] = q[..., :found] * turned
    else:
        size = np.linalg.norm(p, axis=-2)
        direction = p / np.maximum(size, np.finfo(float).tiny)[:, None]
    along = (m * direction).sum(-2)
    return np.stack([(size + along) / 2, (size - along) / 2])


def time_to(times: Array, u: Array, target: Array, share: float) -> Array:
    """Return when (..., K) curves ``u`` (T, ..., K) first reach ``share`` of ``target`` (K,).

    0 where the first value is there already, infinite where none is or the target is 0.
    """
    level = share * target
    there = (u >= level) & (target > 0)
    first = there.argmax(0)
    never = ~there.any(0)
    after = np.take_along_axis(u, first[None], 0)[0]
    before = np.take_along_axis(u, np.maximum(first - 1, 0)[None], 0)[0]
    rise = np.where(after > before, after - before, 1.0)
    fraction = (level - before) / rise
    t0, t1 = times[np.maximum(first - 1, 0)], times[first]
    out = np.where(first == 0, np.where(there[0], times[0], np.inf), t0 + fraction * (t1 - t0))
    return np.where(never, np.inf, out)


def _strengths(matrices: Sequence[Any], modes: Modes) -> tuple[Array, Kind]:
    """Return each layer's strength in each mode (n, draws, K), and how far that can be trusted."""
    arrays = [np.asarray(w, dtype=np.float64) for w in matrices]
    found = _decoupled(arrays, modes)
    if found is not None:
        return found, "exact"
    if len(arrays) == 2:
        return project(arrays, modes), "projected"
    return np.zeros((len(arrays), 1, len(modes.s))), "simulated"


def _decoupled(arrays: Sequence[Array], modes: Modes) -> Array | None:
    """Follow the modes through the layers; None where a layer mixes them with anything else.

    Every layer must have the modes' directions before and behind it as pairs of singular vectors:
    W d = a d' and W^T d' = a d, from the v of the data to their u.
    """
    strengths, before = [], modes.V
    for number, w in enumerate(arrays, 1):
        image = w @ before
        if number < len(arrays):
            a = np.linalg.norm(image, axis=-2)
            behind = image / np.where(a > 0, a, 1.0)[..., None, :]
        else:
            behind = np.broadcast_to(modes.U, image.shape)
            a = (image * behind).sum(-2)
        back = np.swapaxes(w, -1, -2) @ behind
        off = np.abs(image - a[..., None, :] * behind).max(initial=0.0)
        off = max(off, np.abs(back - a[..., None, :] * before).max(initial=0.0))
        if off > _DECOUPLED * np.abs(a).max(initial=0.0):
            return None
        strengths.append(a)
        before = behind
    return np.stack(np.broadcast_arrays(*strengths)).reshape(len(arrays), -1, len(modes.s))


def _default_times(strengths: Array, modes: Modes, tau: Array) -> Array:
    """Return 200 times until the slowest mode that matters is nearly learned."""
    matters = modes.s > 0.01 * modes.s.max(initial=0.0)
    target, tau = modes.target[matters], tau[matters]
    a0 = strengths[..., matters]
    if not matters.any():
        return np.linspace(0, 1, 200)
    n = len(a0)
    if n == 1:
        last = closed_forms.depth_time(0.99 * target, target, np.minimum(a0[0], 0), 1, tau)
    elif n == 2:
        last = closed_forms.hyperbolic_time(0.99 * target, target, a0[0], a0[1], tau)
    else:
        u0 = np.clip(a0.prod(0), 1e-12, 0.5 * target)
        last = closed_forms.depth_time(0.99 * target, target, u0, n, tau)
    last = last[np.isfinite(last) & (last > 0)]
    return np.linspace(0, 1.2 * float(last.max(initial=0.0)) or 1.0, 200)


def _simulated(
    matrices: Sequence[Any], data: Correlations, modes: Modes, times: ArrayLike | None, tau: float
) -> Prediction:
    if times is None:
        # The strengths that equal layers would have at this size of the end-to-end map.
        size = np.sqrt((np.asarray(product(matrices)) ** 2).mean((-2, -1))).min()
        a0 = np.full((len(matrices), 1, len(modes.s)), max(size, 1e-12) ** (1 / len(matrices)))
        times = _default_times(a0, modes, _tau(modes, tau))
    run = gradient_flow(matrices, data, times, tau=tau, keep_products=True)
    assert run.products is not None
    return _of_products(run.times, run.products, modes, data, "simulated")


def _one_layer(weight: Any, data: Correlations, times: ArrayLike | None, tau: float) -> Prediction:
    r"""Solve the linear flow: :math:`W(t) = W_0 e^{-\Sigma_{11}t/\tau} + W^*(1 - e^{...})`."""
    modes = data.modes() if data.whitened or data.commuting else data.principal_modes()
    start = np.asarray(weight, dtype=np.float64)
    t = _times(
        _default_times(np.zeros((1, 1, len(modes.s))), modes, _tau(modes, tau))
        if times is None
        else times
    )
    power, q = np.linalg.eigh(data.sigma11)
    x = -np.maximum(power, 0.0) * (t[:, None] / tau)  # (T, N1)
    x = x.reshape(len(t), *(1,) * (start.ndim - 1), -1)
    aged = t.reshape(-1, *(1,) * start.ndim) / tau
    # (1 - e^{-pt}) / p is t exprel(-pt), which p = 0 does not disturb
    rotated = (start @ q) * np.exp(x) + (data.sigma31 @ q) * aged * exprel(x)
    return _of_products(t, rotated @ q.T, modes, data, "exact")


def _of_products(
    t: Array, products: Array, modes: Modes, data: Correlations, kind: Kind
) -> Prediction:
    products = products.reshape(len(t), -1, *products.shape[-2:])
    u = modes.strengths(products)
    return Prediction(t, u, u, modes, data, kind, products)
