r"""From the theory to your model: critical initialisation, rates a layer, wide-limit prediction.

:func:`critical_init_` and :func:`parameter_groups` walk the modules of any model; what they need
from the theory they take from :func:`pantarhei.probes.critical_point`. :class:`InfiniteWidth`
predicts what the wide limit of a multilayer perceptron learns, on your arrays, in closed form.
Equations: "The Principles of Deep Learning Theory", chapters 5, 9 and 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.recursions import Schedule, _per_layer, _variances
from pantarhei.probes.mean_field import (
    Activation,
    CriticalPoint,
    Function,
    critical_point,
    susceptibilities,
)

# What torch.nn calls an activation, by what a module of it computes; those without a fixed function
# of one number (softmax, GLU, the random leaky ReLU) are no activations of the theory.
_ACTIVATIONS = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU,
    nn.Softplus, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.ReLU6, nn.Hardswish, nn.Hardsigmoid,
    nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LayerInit:
    """What a layer was given: its name, fan-in, and the variances C_b and C_W (per fan-in)."""

    name: str
    fan_in: int
    C_b: float
    C_W: float


def critical_init_(
    model: nn.Module,
    activation: Activation | Function | str | None = None,
    *,
    gamma: float = 0.0,
    x2: float = 1.0,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[LayerInit]:
    r"""Initialise a model critically, in place, so that depth neither kills nor blows up signals.

    Every ``nn.Linear`` and convolution gets weights of variance C_W / fan-in and biases of variance
    C_b, C_b and C_W being the critical ones of its activation. The first one's weights are such
    that its kernel is where it belongs: K* for the half-stable class (GELU, SiLU), what an input
    normalised to x.x / n_0 = 1 would give otherwise. Layers count in the order in which the model
    holds them; other parameters (norms, embeddings) are left as they are.

    Args:
        model: Any module.
        activation: What stands between the layers; found among the model's modules unless given.
        gamma: Strength of residual branches :math:`z' = \gamma z + b + W\sigma(z)`.
        x2: Mean square of the inputs' entries, 1 for standardised ones.
        scale: Factor on C_W of every layer, for experiments off criticality.
        generator: Of the draws; on the parameters' device.

    Returns a :class:`LayerInit` for each layer, in order. Raises :class:`RequestError` where the
    activation is not found, not one, or has no critical point, and before anything is changed.

    >>> net = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 3))
    >>> [(row.name, row.fan_in, row.C_b, row.C_W) for row in critical_init_(net)]
    [('0', 8, 0.0, 2.0), ('2', 100, 0.0, 2.0)]
    """
    layers = weighted_layers(model)
    act = Activation(activation if activation is not None else find_activation(model))
    point = _critical(act, gamma)
    if not x2 > 0 or not scale > 0:
        raise RequestError(f"x2={x2} and scale={scale} must be positive.")
    C_b, C_W = point.C_b or 0.0, (point.C_W or 0.0) * scale
    # A residual stream enters without a branch of its own: the first layer carries all variance.
    first = C_W / (1 - gamma**2)
    if point.universality == "half-stable":
        first = ((point.K or 0.0) - C_b) * scale
    rows = []
    with torch.no_grad():
        for index, (name, layer) in enumerate(layers):
            fan_in = layer.weight[0].numel()
            row = LayerInit(name, fan_in, C_b, C_W if index else first / x2)
            layer.weight.normal_(0, math.sqrt(row.C_W / fan_in), generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, math.sqrt(C_b), generator=generator)
            rows.append(row)
    return rows


def rates(
    activation: Activation | Function | str,
    layers: int,
    *,
    lambda_b: float = 1.0,
    lambda_W: float = 1.0,
) -> tuple[list[float], list[float]]:
    r"""Return the learning-rate factors of biases and weights that make all layers count alike.

    Layer l's share of the tangent kernel of the output is then of the same order for every l:

    - scale-invariant (and half-stable, where the kernel is constant as well):
      :math:`\lambda_b^{(l)} = \lambda_b/L, \ \lambda_W^{(l)} = \lambda_W/L`;
    - K* = 0: :math:`\lambda_b^{(l)} = \lambda_b\, l^{-p} L^{p-1}, \ \lambda_W^{(l)} = \lambda_W
      (L/l)^{p-1}` with p = b1/a1 (1 for odd activations);
    - K* = 0 without a Taylor series at 0 (ELU): the shares themselves are made equal,
      :math:`\lambda_W^{(l)} = \lambda_W /
      (L\langle\sigma^2\rangle_{l-1} \prod_{l'\ge l}\chi_\perp)`, for biases without
      :math:`\langle\sigma^2\rangle`.

    A weight's own rate is lambda_W / fan-in.

    >>> rates("tanh", 4)
    ([1.0, 0.5, 0.3333333333333333, 0.25], [1.0, 1.0, 1.0, 1.0])
    """
    act = Activation(activation)
    point, L = _critical(act, 0.0), layers
    if point.universality != "K*=0":
        return [lambda_b / L] * L, [lambda_W / L] * L
    if point.a1 is None or point.b1 is None:
        return _equal_shares(act, point, L, lambda_b, lambda_W)
    p = point.b1 / point.a1
    return (
        [lambda_b * l**-p * L ** (p - 1) for l in range(1, L + 1)],  # noqa: E741
        [lambda_W * (L / l) ** (p - 1) for l in range(1, L + 1)],  # noqa: E741
    )


def parameter_groups(
    model: nn.Module,
    lr: float,
    activation: Activation | Function | str | None = None,
    *,
    lambda_b: float = 1.0,
    lambda_W: float = 1.0,
) -> list[dict[str, Any]]:
    r"""Return parameter groups for ``torch.optim.SGD`` with the rates of :func:`rates`.

    Biases of layer l get ``lr`` :math:`\lambda_b^{(l)}`, weights ``lr`` :math:`\lambda_W^{(l)}` /
    fan-in; a group a tensor, with its ``name``. Parameters of other modules keep ``lr``. These are
    rates for SGD, momentum included: Adam divides the size of the gradient out, so that its rule
    is another one. ``lr`` should stay below 2 over the largest eigenvalue of the tangent kernel of
    the data (:meth:`InfiniteWidth.largest_rate`).

    >>> net = nn.Sequential(nn.Linear(8, 100), nn.Tanh(), nn.Linear(100, 3))
    >>> [(g["name"], round(g["lr"], 4)) for g in parameter_groups(net, 1.0)]
    [('0.weight', 0.125), ('0.bias', 1.0), ('2.weight', 0.01), ('2.bias', 0.5)]
    """
    layers = weighted_layers(model)
    act = activation if activation is not None else find_activation(model)
    biases, weights = rates(act, len(layers), lambda_b=lambda_b, lambda_W=lambda_W)
    factor: dict[nn.Parameter, float] = {}
    for (_, layer), b, W in zip(layers, biases, weights, strict=True):
        factor[layer.weight] = W / layer.weight[0].numel()
        if layer.bias is not None:
            factor[layer.bias] = b
    return [
        {"params": [parameter], "lr": lr * factor.get(parameter, 1.0), "name": name}
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def weighted_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the linear layers and convolutions of a model by name, in the order it holds them."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, _WEIGHTED)]
    for name, layer in found:
        if isinstance(layer.weight, nn.parameter.UninitializedParameter):
            raise RequestError(f"Layer '{name}' is lazy: run the model once on an example first.")
    if not found:
        raise RequestError("The model holds no nn.Linear and no convolution to initialise.")
    # A weight that two layers share is one layer's.
    return list({id(layer.weight): (name, layer) for name, layer in reversed(found)}.values())[::-1]


def find_activation(model: nn.Module) -> nn.Module:
    """Return the model's activation module; several kinds, or none, raise :class:`RequestError`."""
    found = {repr(m): m for m in model.modules() if isinstance(m, _ACTIVATIONS)}
    if len(found) != 1:
        saw = f"has several ({', '.join(sorted(found))})" if found else "has none as a module"
        raise RequestError(
            f"The activation cannot be told, because the model {saw}: name it, as in "
            "activation='gelu'."
        )
    return next(iter(found.values()))


class InfiniteWidth:
    r"""The infinitely wide multilayer perceptron: what it predicts, trained or Bayesian.

    Full-batch gradient descent on :math:`\tfrac12\sum (z-y)^2` with rate :math:`\eta` moves it
    linearly, with the frozen tangent kernel :math:`\Theta` of the output layer:

    .. math:: z_t(X) = y + (1-\eta\Theta)^t (z_0 - y), \qquad
              z_t(x) = z_0(x) - \Theta_{xX}\Theta^{-1}\bigl(1 - (1-\eta\Theta)^t\bigr)(z_0 - y)

    and the Bayesian posterior of its outputs is that of a Gaussian process with kernel K:
    :math:`K_{xX}K^{-1}y` with covariance :math:`K_{xx} - K_{xX}K^{-1}K_{Xx}`.

    Args:
        activation: Any elementwise torch function, or a name.
        layers: L, the output layer included.
        C_b, C_W: Variances; the activation's critical ones unless given.
        lambda_b, lambda_W: Learning-rate factors, one number or one a layer.
        gamma: Strength of the residual branch.

    >>> x = torch.linspace(-1, 1, 5)[:, None]
    >>> wide = InfiniteWidth("relu", 3, C_b=0.1, C_W=2.0)
    >>> mean, variance = wide.bayes(x, x.abs(), x)
    >>> torch.allclose(mean, x.abs().double()), bool(variance.abs().max() < 1e-8)
    (True, True)
    """

    def __init__(
        self,
        activation: Activation | Function | str,
        layers: int,
        *,
        C_b: float | None = None,
        C_W: float | None = None,
        lambda_b: Schedule = 1.0,
        lambda_W: Schedule = 1.0,
        gamma: float = 0.0,
    ) -> None:
        self.activation, self.layers, self.gamma = Activation(activation), layers, gamma
        self.C_b, self.C_W = _variances(self.activation, gamma, C_b, C_W)
        self._rates = _per_layer(lambda_b, layers), _per_layer(lambda_W, layers)

    def kernels(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return the output layer's K and :math:`\Theta` (N, M) between ``x`` and ``other``.

        The inputs are (N, n_0) and (M, n_0); without ``other`` it is ``x`` with itself.
        """
        a = _matrix("x", x)
        b = a if other is None else _matrix("other", other)
        if a.shape[1] != b.shape[1]:
            raise RequestError(f"The inputs have {a.shape[1]} and {b.shape[1]} entries a row.")
        act, n = self.activation, a.shape[1]
        gram, rows, columns = a @ b.T / n, a.square().mean(1), b.square().mean(1)
        biases, weights = self._rates
        K, rows, columns = (self.C_b + self.C_W * g for g in (gram, rows, columns))
        Theta = biases[0] + weights[0] * gram
        for bias, weight in zip(biases[1:], weights[1:], strict=True):
            s, d = act.pairs(K, rows, columns), act.pairs(K, rows, columns, order=1)
            Theta = bias + weight * s + (self.gamma**2 + self.C_W * d) * Theta
            K = self._next(K, s)
            rows, columns = (
                self._next(v, act.average(lambda z: act(z) ** 2, v)) for v in (rows, columns)
            )
        return K, Theta

    def _next(self, K: Tensor, s: Tensor) -> Tensor:
        return self.gamma**2 * K + self.C_b + self.C_W * s

    def descend(
        self,
        x: Tensor,
        y: Tensor,
        test: Tensor,
        *,
        eta: float,
        steps: Tensor | Sequence[float] | float,
        start: Tensor | None = None,
        test_start: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        r"""Return the outputs on ``x`` and on ``test`` after each of ``steps`` steps of descent.

        Args:
            x, y: Training inputs (N, n_0) and targets (N, n_L).
            test: Inputs (M, n_0).
            eta: Rate for the loss :math:`\tfrac12\sum(z-y)^2`; for a mean over N examples and
                outputs give eta over their number. Above :meth:`largest_rate` it diverges.
            steps: Numbers of steps t, (S,), whole; infinity is the end of training.
            start, test_start: Outputs of your own network before training, (N, n_L) and (M, n_L);
                unless given, the mean over networks, 0.

        Returns (S, N, n_L) and (S, M, n_L).
        """
        x, y, test = _matrix("x", x), _matrix("y", y), _matrix("test", test)
        if len(x) != len(y):
            raise RequestError(f"x has {len(x)} rows and y {len(y)}: give a target for each input.")
        if (start is None) != (test_start is None):
            raise RequestError("Give both start and test_start, or neither.")
        z0 = torch.zeros_like(y) if start is None else _matrix("start", start)
        t0 = y.new_zeros(len(test), y.shape[1])
        t0 = t0 if test_start is None else _matrix("test_start", test_start)
        t = torch.atleast_1d(torch.as_tensor(steps, dtype=torch.float64))
        if bool(((t < 0) | (t.isfinite() & (t != t.round()))).any()) or bool(t.isnan().any()):
            raise RequestError("steps are whole numbers, 0 or more, or infinity.")
        values, basis = torch.linalg.eigh(self.kernels(x)[1])
        if eta * float(values[-1]) >= 2:
            raise RequestError(
                f"eta={eta} is too large: it diverges from {2 / float(values[-1]):.4g} on."
            )
        kept = values > 1e-13 * values[-1]
        left = _descended(eta * torch.where(kept, values, 0.0), t[:, None])
        moved = basis.T @ (z0 - y)
        train = z0 - basis @ (left[:, :, None] * moved)
        share = torch.where(kept, left / values.clamp(min=1e-300), 0.0)
        weights = self.kernels(test, x)[1] @ basis
        return train, t0 - weights @ (share[:, :, None] * moved)

    def bayes(
        self, x: Tensor, y: Tensor, test: Tensor, *, noise: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Return the posterior mean (M, n_L) and variance (M,) at ``test``, given ``x`` and ``y``.

        ``noise`` is the variance of the targets' noise; a singular kernel needs some.
        """
        x, y, test = _matrix("x", x), _matrix("y", y), _matrix("test", test)
        if len(x) != len(y):
            raise RequestError(f"x has {len(x)} rows and y {len(y)}: give a target for each input.")
        K = self.kernels(x)[0]
        root, failed = torch.linalg.cholesky_ex(K + noise * torch.eye(len(K), dtype=K.dtype))
        if int(failed) or float(root.diag().min()) ** 2 < 1e-13 * float(K.diag().max()):
            raise RequestError(
                "The kernel of the training inputs is singular (repeated rows?): give noise > 0."
            )
        cross = torch.linalg.solve_triangular(root, self.kernels(x, test)[0], upper=False)
        own = self._diagonal(test)
        mean = cross.T @ torch.linalg.solve_triangular(root, y, upper=False)
        return mean, own - cross.square().sum(0)

    def _diagonal(self, x: Tensor) -> Tensor:
        act = self.activation
        K = self.C_b + self.C_W * x.square().mean(1)
        for _ in range(self.layers - 1):
            K = self._next(K, act.average(lambda z: act(z) ** 2, K))
        return K

    def largest_rate(self, x: Tensor) -> float:
        r"""Return :math:`2/\lambda_{max}(\Theta)` on ``x``, from which on descent diverges."""
        return 2 / float(torch.linalg.eigvalsh(self.kernels(x)[1])[-1])


def _descended(rate: Tensor, t: Tensor) -> Tensor:
    """Return 1 - (1 - rate)^t, to full precision for small rates, and its limit at t = infinity."""
    small = -torch.expm1(t * torch.log1p(-rate.clamp(max=0.5)))
    sign = torch.where((rate > 1) & (t % 2 == 1), -1.0, 1.0)
    large = 1 - sign * (1 - rate).abs() ** t
    return torch.where(rate > 0.5, large, torch.where(rate > 0, small, 0.0))


def _critical(act: Activation, gamma: float) -> CriticalPoint:
    point = critical_point(act, gamma)
    if point.universality == "none":
        raise RequestError(
            f"'{act.name}' has no critical point: {point.reason}; take another activation, such as "
            "gelu, tanh or relu."
        )
    return point


def _equal_shares(
    act: Activation, point: CriticalPoint, L: int, lambda_b: float, lambda_W: float
) -> tuple[list[float], list[float]]:
    C_b, C_W = point.C_b or 0.0, point.C_W or 1.0
    K, squares, slopes = C_b + C_W, [1.0], []
    for _ in range(L - 1):
        squares.append(float(act.average(lambda z: act(z) ** 2, K)))
        slopes.append(float(susceptibilities(act, K, C_W)[1]))
        K = C_b + C_W * squares[-1]
    later = [math.prod(slopes[l:]) for l in range(L)]  # noqa: E741
    return (
        [lambda_b / (L * c) for c in later],
        [lambda_W / (L * s * c) for s, c in zip(squares, later, strict=True)],
    )


def _matrix(name: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values)
    if values.ndim != 2 or not len(values) or not bool(torch.isfinite(values).all()):
        raise RequestError(f"{name} must be a finite matrix with one example a row.")
    return values.to("cpu", torch.float64)
