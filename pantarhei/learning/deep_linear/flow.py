r"""Gradient flow and gradient descent of deep linear networks, on correlations alone.

A step costs what the weights cost, whatever the number of samples; leading axes of the weights are
independent trainings (seeds, learning rates), done together. Float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.learning.deep_linear.correlations import Correlations

Array = NDArray[np.float64]
Weights = nn.Module | Sequence[Tensor] | Sequence[Array]


class DeepLinearNet(nn.Module):
    r"""A stack of linear layers without biases: :math:`\hat y = W^n \cdots W^1 x`.

    ``DeepLinearNet(64, 32, 10)`` has the n = 2 weight matrices (32, 64) and (10, 32). A module like
    any other; weights start as ``nn.Linear`` starts them.

    >>> net = DeepLinearNet(4, 3, 2)
    >>> x = torch.randn(5, 4, dtype=torch.float64)
    >>> torch.allclose(net(x), x @ net.product().T)
    True
    """

    def __init__(
        self,
        *widths: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise RequestError(f"A network of widths {widths} has no layer: give two or more.")
        self.layers = nn.Sequential(
            *(nn.Linear(i, o, bias=False, dtype=dtype, device=device) for i, o in pairwise(widths))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs (..., N3) of inputs (..., N1)."""
        return self.layers(x)

    def product(self) -> Tensor:
        """Return the end-to-end map (N3, N1)."""
        return product(linear_weights(self))


@dataclass(frozen=True)
class Trajectory:
    """A training as the modes see it.

    Attributes:
        times: (T,) time, or the step number of a descent.
        u: (T, batch..., K) strength of each mode of the data in the end-to-end map.
        loss: (T, batch...) the loss 1/(2P) sum |y - W x|^2.
        weights: The matrices at the end, each (batch..., out, in).
        products: (T, batch..., N3, N1) end-to-end maps, or None unless they were asked for.
    """

    times: Array
    u: Array
    loss: Array
    weights: list[Array]
    products: Array | None = None


def linear_weights(model: Weights) -> list[Tensor]:
    """Return a model's matrices, first layer first, as float64 tensors (..., out, in).

    ``model`` is a module whose only weights are ``nn.Linear`` layers without biases, in the order
    of its modules, or the matrices themselves.

    Raises :class:`RequestError` for biases, other weights, and shapes that do not follow each
    other.
    """
    if isinstance(model, nn.Module):
        layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        known = {id(layer.weight) for layer in layers}
        for name, parameter in model.named_parameters():
            if id(parameter) not in known:
                raise RequestError(
                    f"'{name}' is no weight of a linear layer: the theory is of linear layers "
                    "without biases; give a DeepLinearNet or the matrices."
                )
        matrices = [layer.weight.detach() for layer in layers]
    else:
        matrices = [torch.as_tensor(w).detach() for w in model]
    matrices = [w.to(torch.float64) for w in matrices]
    if not matrices or any(w.dim() < 2 for w in matrices):
        raise RequestError("A deep linear network is one or more (out, in) matrices: give them.")
    for below, above in pairwise(matrices):
        if below.shape[-2] != above.shape[-1]:
            raise RequestError(
                f"Weights of shapes {tuple(below.shape)} and {tuple(above.shape)} do not follow "
                "each other: give (out, in) matrices, first layer first."
            )
    return matrices


def product(weights: Sequence[Tensor]) -> Tensor:
    """Return the end-to-end map W^n ... W^1, multiplied from the narrower end."""
    ordered = list(weights)
    if ordered[0].shape[-1] < ordered[-1].shape[-2]:
        out = ordered[0]
        for w in ordered[1:]:
            out = w @ out
        return out
    out = ordered[-1]
    for w in reversed(ordered[:-1]):
        out = out @ w
    return out


def gradient_flow(
    model: Weights,
    data: Correlations,
    times: ArrayLike,
    *,
    tau: float = 1.0,
    solver: str = "DOP853",
    rtol: float = 1e-10,
    keep_products: bool = False,
) -> Trajectory:
    r"""Integrate the gradient flow of a deep linear network at the ``times``.

    .. math:: \tau \dot W^l = (W^n \cdots W^{l+1})^T\,[\Sigma_{31} - W\,\Sigma_{11}]\,
              (W^{l-1} \cdots W^1)^T, \qquad W = W^n \cdots W^1

    Along it :math:`W^{l+1\,T}W^{l+1} - W^lW^{l\,T}` is conserved, whatever the data.

    Args:
        model: A :class:`DeepLinearNet`, a module of linear layers, or matrices (batch..., out, in).
            It is left as it is.
        data: Its correlations.
        times: (T,) increasing times from 0 on, in the unit of ``tau``.
        tau: Time constant; :meth:`Correlations.tau` gives it in steps.
        solver: Method of ``scipy.integrate.solve_ivp``: "DOP853", "RK45", "LSODA", ...
        rtol: Its relative tolerance. One step size serves all trainings of the batch.
        keep_products: Return the end-to-end maps as well.

    Raises :class:`RequestError` where shapes do not fit or the integration fails.

    >>> data = Correlations.of_map(np.diag([2.0, 1.0]))
    >>> start = [0.1 * np.eye(2), 0.1 * np.eye(2)]
    >>> gradient_flow(start, data, [0, 2, 20]).u.round(4).tolist()
    [[0.01, 0.01], [1.8748, 0.3555], [2.0, 1.0]]
    """
    weights = _batched(linear_weights(model), data)
    t = np.asarray(times, dtype=np.float64)
    if t.ndim != 1 or not len(t) or t[0] < 0 or (np.diff(t) <= 0).any():
        raise RequestError("times must be one increasing sequence from 0 on: sort them.")
    shapes = [w.shape for w in weights]
    sizes = [w.numel() for w in weights]
    descent = _Descent(data, weights[0].device)

    def unpack(flat: Array) -> list[Tensor]:
        parts = torch.from_numpy(flat).to(weights[0].device).split(sizes)
        return [p.view(shape) for p, shape in zip(parts, shapes, strict=True)]

    def derivative(_: float, flat: Array) -> Array:
        steps = descent.direction(unpack(flat))
        return torch.cat([g.reshape(-1) for g in steps]).cpu().numpy() / tau

    start = torch.cat([w.reshape(-1) for w in weights]).cpu().numpy()
    later = t[t > 0]
    states = np.broadcast_to(start, (len(t), len(start)))
    if len(later):
        # The finest scale is that of the smallest start, which decides when a mode escapes.
        atol = rtol * 1e-3 * max(float(np.abs(start).max()), 1e-12)
        done = solve_ivp(derivative, (0, t[-1]), start, solver, later, rtol=rtol, atol=atol)
        if not done.success or not np.isfinite(done.y).all():
            raise RequestError(
                f"The flow could not be integrated to t={t[-1]:g} ({done.message}): start from "
                "finite weights, or ask for earlier times."
            )
        states = np.concatenate([states[: len(t) - len(later)], done.y.T])
    record = _Record(data, keep_products)
    for time, state in zip(t, states, strict=True):
        record.add(float(time), product(unpack(np.ascontiguousarray(state))))
    return record.trajectory(unpack(states[-1].copy()))


def gradient_descent(
    model: Weights,
    data: Correlations,
    rate: float | Array | Tensor,
    steps: int,
    *,
    every: int = 1,
    keep_products: bool = False,
) -> Trajectory:
    r"""Take full-batch gradient steps: :math:`W^l \leftarrow W^l + \mathrm{rate}\cdot\tau\dot W^l`.

    ``rate`` is a number or has the shape of the weights' leading axes: many rates at once. It is
    the rate for the loss 1/(2P) sum |y - Wx|^2 (``"half-mean"``). ``every`` steps are between
    records. Other arguments as in :func:`gradient_flow`, whose curves it follows at time
    rate * step for small rates.

    Raises :class:`RequestError` where the weights grow without bound; n layers that learn a mode s
    are stable below the rate 2/(n s^(2-2/n)).
    """
    weights = _batched(linear_weights(model), data)
    rates = torch.as_tensor(rate, dtype=torch.float64, device=weights[0].device)
    batch = torch.broadcast_shapes(rates.shape, weights[0].shape[:-2])
    weights = [w.expand(batch + w.shape[-2:]) for w in weights]
    descent = _Descent(data, weights[0].device)
    record = _Record(data, keep_products)
    record.add(0, product(weights))
    for step in range(1, steps + 1):
        weights = descent.step(weights, rates[..., None, None])
        if step % every == 0 or step == steps:
            now = product(weights)
            if not bool(torch.isfinite(now).all()):
                s = float(np.linalg.norm(data.least_squares, 2))
                bound = 2 / (len(weights) * s ** (2 - 2 / len(weights)))
                raise RequestError(
                    f"Descent diverged by step {step} at rate {float(rates.max()):.3g}: near the "
                    f"solution {len(weights)} layers of whitened inputs are stable below "
                    f"{bound:.3g}; lower the rate."
                )
            record.add(step, now)
    return record.trajectory(weights)


def steps_to(
    model: Weights,
    data: Correlations,
    rate: float | Array | Tensor,
    *,
    error: float = 0.02,
    max_steps: int = 1000,
    first: int | None = None,
) -> Array:
    r"""Count the steps of descent until the learnable loss has fallen to the share ``error``.

    The share is :math:`(L - L_{\min}) / (L_{W=0} - L_{\min})`; for whitened inputs it is
    :math:`\|\Sigma_{31} - W\|^2 / \|\Sigma_{31}\|^2`. Trainings that arrive or diverge are computed
    no further. Returns steps of the batch's shape, infinite where ``max_steps`` did not suffice.

    ``first`` names an axis of the batch (that of the learning rates) along which only the first to
    arrive is wanted: the others stop with it, and stay infinite.
    """
    weights = _batched(linear_weights(model), data)
    rates = torch.as_tensor(rate, dtype=torch.float64, device=weights[0].device)
    batch = torch.broadcast_shapes(rates.shape, weights[0].shape[:-2])
    weights = [w.expand(batch + w.shape[-2:]).reshape(-1, *w.shape[-2:]) for w in weights]
    rates = rates.expand(batch).reshape(-1, 1, 1)
    descent = _Descent(data, weights[0].device)
    needed = data.floor + error * (data.power / 2 - data.floor)
    found = torch.full(batch, torch.inf, dtype=torch.float64, device=rates.device)
    flat, places = found.view(-1), torch.arange(found.numel(), device=rates.device)
    for step in range(max_steps + 1):
        loss = descent.loss(product(weights))
        arrived = loss <= needed
        flat[places[arrived]] = step
        going = ~arrived & torch.isfinite(loss)
        if first is not None and bool(arrived.any()):
            settled = torch.isfinite(found).any(first, keepdim=True).expand(batch)
            going &= ~settled.reshape(-1)[places]
        if not bool(going.all()):
            places, rates = places[going], rates[going]
            weights = [w[going] for w in weights]
        if not len(places) or step == max_steps:
            break
        weights = descent.step(weights, rates)
    return found.cpu().numpy()


class _Descent:
    """The downhill direction for one data set, on one device."""

    def __init__(self, data: Correlations, device: torch.device) -> None:
        self.sigma31 = torch.from_numpy(np.ascontiguousarray(data.sigma31)).to(device)
        self.sigma11 = (
            None
            if data.whitened
            else torch.from_numpy(np.ascontiguousarray(data.sigma11)).to(device)
        )
        self.power = data.power

    def direction(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Return minus the gradient for every matrix: 3 products a layer."""
        below: list[Tensor] = []  # W^{l-1} ... W^1
        for w in weights:
            below.append(w @ below[-1] if below else w)
        seen = below[-1] if self.sigma11 is None else below[-1] @ self.sigma11
        back = self.sigma31 - seen  # (W^n ... W^{l+1})^T times the error
        out = []
        for w, before in zip(reversed(weights[1:]), reversed(below[:-1]), strict=True):
            out.append(back @ before.mT)
            back = w.mT @ back
        out.append(back)
        return out[::-1]

    def step(self, weights: Sequence[Tensor], rates: Tensor) -> list[Tensor]:
        return [w + rates * g for w, g in zip(weights, self.direction(weights), strict=True)]

    def loss(self, product: Tensor) -> Tensor:
        seen = product if self.sigma11 is None else product @ self.sigma11
        return self.power / 2 + ((seen / 2 - self.sigma31) * product).sum((-2, -1))


class _Record:
    """What is kept of a training at the times asked for."""

    def __init__(self, data: Correlations, keep_products: bool) -> None:
        self.data, self.keep = data, keep_products
        if data.whitened or data.commuting:
            modes = data.modes()
            self.u, self.v = modes.U, modes.V
        else:  # the modes mix; their directions are those of Sigma31 all the same
            self.u, _, vt = np.linalg.svd(data.sigma31, full_matrices=False)
            self.v = vt.T
        self.rows: list[tuple[float, Array, Array, Array | None]] = []

    def add(self, time: float, now: Tensor) -> None:
        w = now.cpu().numpy()
        strengths = np.einsum("ik,...ij,jk->...k", self.u, w, self.v, optimize=True)
        self.rows.append((time, strengths, self.data.loss(w), w if self.keep else None))

    def trajectory(self, weights: Sequence[Tensor]) -> Trajectory:
        times, u, loss, products = zip(*self.rows, strict=True)
        return Trajectory(
            np.array(times, dtype=np.float64),
            np.stack(u),
            np.stack(loss),
            [w.cpu().numpy() for w in weights],
            np.stack(products) if self.keep else None,
        )


def _batched(weights: list[Tensor], data: Correlations) -> list[Tensor]:
    """Give all matrices the same leading axes, having checked that they fit the data."""
    ends = (weights[-1].shape[-2], weights[0].shape[-1])
    if ends != data.sigma31.shape:
        raise RequestError(
            f"The network maps {ends[1]} inputs to {ends[0]} outputs and the data have "
            f"{data.sigma31.shape[1]} and {data.sigma31.shape[0]}: give weights that fit."
        )
    batch = torch.broadcast_shapes(*(w.shape[:-2] for w in weights))
    return [w.expand(batch + w.shape[-2:]).contiguous() for w in weights]
