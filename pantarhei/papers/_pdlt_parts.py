"""Many multilayer perceptrons trained at once: one batched matrix product a layer for all of them.

Each network of a batch has its own weights and its own learning rate; the sum of their losses is
differentiated, which gives every network its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pantarhei.learning.effective_theory.training import rates
from pantarhei.probes.mean_field import Activation, CriticalPoint


@dataclass
class Networks:
    """B multilayer perceptrons: weights (B, n_l, n_{l-1}) and biases (B, 1, n_l) of every layer."""

    activation: Activation
    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def critical(
        cls,
        activation: Activation,
        point: CriticalPoint,
        widths: tuple[int, ...],
        scales: Tensor,
        generator: torch.Generator,
    ) -> Networks:
        """Draw a network for each of ``scales`` (B,), the factor on the critical C_W.

        The first layer puts an input with x.x / n_0 = 1 on K* where that is not 0, as
        :func:`~pantarhei.learning.effective_theory.training.critical_init_` does.
        """
        assert point.C_b is not None and point.C_W is not None
        weights, biases = [], []
        for layer in range(1, len(widths)):
            fan_in, n = widths[layer - 1 : layer + 1]
            C_W = point.C_W
            if layer == 1 and point.universality == "half-stable" and point.K:
                C_W = point.K - point.C_b
            deviation = (scales * C_W / fan_in).sqrt()[:, None, None]
            weights.append(deviation * torch.randn(len(scales), n, fan_in, generator=generator))
            bias = torch.randn(len(scales), 1, n, generator=generator)
            biases.append(point.C_b**0.5 * bias)
        return cls(activation, weights, biases)

    @classmethod
    def initialised(
        cls,
        activation: Activation,
        init: Callable[[nn.Linear], object],
        widths: tuple[int, ...],
        networks: int,
        seed: int,
    ) -> Networks:
        """Draw networks as PyTorch does, then let ``init`` change each layer."""
        weights, biases = [], []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for fan_in, n in pairwise(widths):
                layers = [nn.Linear(fan_in, n) for _ in range(networks)]
                for layer in layers:
                    init(layer)
                weights.append(torch.stack([layer.weight.detach() for layer in layers]))
                biases.append(torch.stack([layer.bias.detach()[None] for layer in layers]))
        return cls(activation, weights, biases)

    def to(self, device: torch.device, dtype: torch.dtype) -> Networks:
        """Move to a device and precision, ready to be differentiated."""
        for tensors in (self.weights, self.biases):
            tensors[:] = [t.to(device, dtype).requires_grad_() for t in tensors]
        return self

    def preactivations(self, x: Tensor) -> list[Tensor]:
        """Return z of every layer, (B, N, n_l), for inputs (N, n_0)."""
        s = x.expand(len(self.weights[0]), -1, -1)
        out = []
        for W, b in zip(self.weights, self.biases, strict=True):
            out.append(torch.baddbmm(b, s, W.mT))
            s = self.activation(out[-1])
        return out

    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the norms (L, B) of the gradients of the loss by each layer's preactivations."""
        z = self.preactivations(x)
        loss = cross_entropy(z[-1], y).sum()
        return torch.stack([g.square().sum((1, 2)).sqrt() for g in torch.autograd.grad(loss, z)])

    def weight_gradients(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the norms (L, B) of the gradients by each layer's weights."""
        loss = cross_entropy(self.preactivations(x)[-1], y).sum()
        found = torch.autograd.grad(loss, self.weights)
        return torch.stack([g.square().sum((1, 2)).sqrt() for g in found])

    def step(self, loss: Tensor, weight_rates: list[Tensor], bias_rates: list[Tensor]) -> None:
        """Descend the gradients of the summed losses, each network and layer at its own rate."""
        parameters = [*self.weights, *self.biases]
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g, rate in zip(parameters, gradients, weight_rates + bias_rates, strict=True):
                p.addcmul_(g, rate[:, None, None], value=-1)

    def tangent_kernel(self, x: Tensor, lambda_b: list[float], lambda_W: list[float]) -> Tensor:
        r"""Return the tangent kernel (B, N, N) of the only output, by its layers.

        :math:`H(x, x') = \sum_l \delta_l\cdot\delta_l' (\lambda_b^{(l)}
        + \lambda_W^{(l)} \sigma_{l-1}\cdot\sigma_{l-1}' / n_{l-1})`.
        """
        z = self.preactivations(x)
        deltas = torch.autograd.grad(z[-1].sum(), z)
        with torch.no_grad():
            inputs = [x.expand(len(z[0]), -1, -1), *(self.activation(v) for v in z[:-1])]
            total = torch.zeros(len(z[0]), len(x), len(x), dtype=x.dtype, device=x.device)
            for s, d, b, W in zip(inputs, deltas, lambda_b, lambda_W, strict=True):
                total += (d @ d.mT) * (b + W / s.shape[-1] * (s @ s.mT))
        return total


def kaiming_(layer: nn.Linear, nonlinearity: str) -> None:
    """Draw a layer by He's rule for what follows it, as people do by hand; no biases."""
    # torch has no gain of its own for GELU: it is given ReLU's
    known: Any = nonlinearity if nonlinearity in ("relu", "tanh") else "relu"
    nn.init.kaiming_normal_(layer.weight, nonlinearity=known)
    nn.init.zeros_(layer.bias)


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of every network: logits (B, N, classes), y (N,)."""
    each = F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), reduction="none")
    return each.view(len(logits), -1).mean(1)


def accuracy(networks: Networks, x: Tensor, y: Tensor) -> Tensor:
    """Return every network's accuracy; one whose outputs are not finite has none."""
    with torch.no_grad():
        logits = networks.preactivations(x)[-1]
    right = (logits.argmax(-1) == y).to(torch.float64).mean(1)
    return torch.where(logits.isfinite().flatten(1).all(1), right, 0.0)


def kernel_change(
    activation: Activation,
    point: CriticalPoint,
    width: int,
    depth: int,
    x: Tensor,
    y: Tensor,
    *,
    networks: int,
    target: float,
    steps: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    r"""Train networks to a loss and return how far the tangent kernel of each has moved.

    Full-batch gradient descent on half the mean squared error with the rates that make layers count
    alike, and an eta of half of 1 / (largest eigenvalue of H/N) of each network. A network stops
    once its loss is ``target`` of what it was; the relative change is
    :math:`\lVert H - H_0\rVert / \lVert H_0\rVert` over the inputs then. Returns the changes and
    whether the target was reached, (B,) each.
    """
    lambda_b, lambda_W = rates(activation, depth)
    widths = (x.shape[1], *[width] * (depth - 1), 1)
    scales = torch.ones(networks)
    nets = Networks.critical(activation, point, widths, scales, generator).to(x.device, x.dtype)
    start = nets.tangent_kernel(x, lambda_b, lambda_W)
    eta = 0.5 * len(x) / torch.linalg.eigvalsh(start)[:, -1]
    going = torch.ones(networks, dtype=torch.bool, device=x.device)
    goal = None
    for _ in range(steps):
        losses = (nets.preactivations(x)[-1][..., 0] - y).square().mean(1) / 2
        goal = target * losses.detach() if goal is None else goal
        going &= losses.detach() > goal
        if not bool(going.any()):
            break
        moving = torch.where(going, eta, 0.0)
        fan_in = [W.shape[2] for W in nets.weights]
        nets.step(
            losses.sum(),
            [moving * W / n for W, n in zip(lambda_W, fan_in, strict=True)],
            [moving * b for b in lambda_b],
        )
    change = (nets.tangent_kernel(x, lambda_b, lambda_W) - start).flatten(1).norm(dim=1)
    return change / start.flatten(1).norm(dim=1), ~going
