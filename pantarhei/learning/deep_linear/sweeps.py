r"""Experiments over depth (learning time, best rate) and gain (Jacobians), by initial weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError, nearest
from pantarhei.learning.deep_linear.correlations import Correlations
from pantarhei.learning.deep_linear.flow import DeepLinearNet, linear_weights, steps_to
from pantarhei.learning.initializers import balanced, haar, initialize_, pretrain_
from pantarhei.probes.mean_field import Activation
from pantarhei.probes.signal import jacobian_singular_values, share_in_band

STARTS = ("orthogonal", "gaussian", "decoupled", "pretrained")


def graded(size: int, low: float, high: float, generator: torch.Generator | None) -> Correlations:
    """Return a task with whitened inputs whose singular values are evenly spaced, in random bases.

    >>> graded(4, 0.5, 2.0, None).modes().s.round(6).tolist()
    [2.0, 1.5, 1.0, 0.5]
    """
    u, v = haar(size, size, generator), haar(size, size, generator)
    s = torch.linspace(low, high, size, dtype=torch.float64)
    return Correlations.of_map((u * s @ v.T).numpy())


def start_weights(
    start: str,
    widths: Sequence[int],
    data: Correlations,
    generator: torch.Generator | None,
    *,
    gain: float = 1.0,
    u0: float = 0.5,
) -> list[Tensor]:
    """Return the weights of a deep linear network at one of :data:`STARTS`.

    ``gain`` is that of orthogonal, Gaussian and read-out weights, ``u0`` the end-to-end strength of
    every mode of a decoupled start.
    """
    if start not in STARTS:
        raise RequestError(
            f"'{start}' is not a start: choose {', '.join(STARTS)}.{nearest(start, STARTS)}"
        )
    if start == "decoupled":
        modes = data.modes()
        return balanced(widths, modes.U, modes.V, u0, generator=generator)
    net = DeepLinearNet(*widths)
    scheme = "gaussian" if start == "gaussian" else "orthogonal"
    initialize_(net, scheme, gain=gain, generator=generator)  # type: ignore[arg-type]
    if start == "pretrained" and len(widths) > 2:
        power, v = np.linalg.eigh(data.sigma11)
        # as many inputs as dimensions, with exactly this correlation
        inputs = np.sqrt(np.maximum(power, 0) * len(power))[:, None] * v.T
        pretrain_(net, torch.from_numpy(inputs), generator=generator)
    return linear_weights(net)


def depth_sweep(
    data: Correlations,
    depths: Iterable[int],
    starts: Iterable[str],
    rates: Sequence[float],
    *,
    width: int | None = None,
    seeds: int = 3,
    error: float = 0.02,
    max_steps: int = 1000,
    gain: float = 1.0,
    u0: float = 0.5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    done: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Measure how many steps of descent a deep linear network needs, each at its best rate.

    For every depth (weight matrices) and start: all rates and seeds are trained side by side; of
    each seed the rate that arrives first is its best. Rows have ``start``, ``n``, ``seed``,
    ``steps`` (infinite where no rate arrived within ``max_steps``) and ``rate`` (then nan).

    Args:
        data: The task. Hidden layers have ``width`` units, by default as many as inputs.
        rates: Learning rates of the half-mean loss, the same for every depth.
        error: Share of the learnable loss that is left when a training has arrived.
        done: Called with every row as it is measured.
    """
    n3, n1 = data.sigma31.shape
    rows = []
    for start in starts:
        for n in depths:
            widths = (n1, *((width or n1,) * (n - 1)), n3)
            generator = torch.Generator().manual_seed(seed)
            drawn = [
                start_weights(start, widths, data, generator, gain=gain, u0=u0)
                for _ in range(seeds)
            ]
            stacked = [torch.stack(ws)[:, None].to(device) for ws in zip(*drawn, strict=True)]
            steps = steps_to(
                stacked,
                data,
                torch.tensor(rates, dtype=torch.float64, device=device),
                error=error,
                max_steps=max_steps,
                first=1,
            )
            for number, by_rate in enumerate(steps):
                best = int(by_rate.argmin())
                arrived = math.isfinite(by_rate[best])
                rows.append(
                    {
                        "start": start,
                        "n": n,
                        "seed": number,
                        "steps": float(by_rate[best]),
                        "rate": rates[best] if arrived else math.nan,
                    }
                )
                done(rows[-1])
    return rows


class Stack(nn.Sequential):
    r"""A deep network of one width, :math:`x^{l+1} = g\,W^l \varphi(x^l)`, the gain in the weights.

    ``phi`` is anything that :class:`pantarhei.probes.mean_field.Activation` takes.

    >>> len(Stack("tanh", width=5, depth=3))
    6
    """

    def __init__(
        self,
        phi: Any,
        width: int,
        depth: int,
        *,
        start: str = "orthogonal",
        gain: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if width < 1 or depth < 1:
            raise RequestError(f"A network of width {width} and depth {depth} has no weights.")
        activation = Activation(phi)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [_Elementwise(activation)]
            layers += [nn.Linear(width, width, bias=False, dtype=torch.float64)]
        super().__init__(*layers)
        initialize_(self, start, gain=gain, generator=generator)  # type: ignore[arg-type]
        self.to(device)


class _Elementwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def gain_sweep(
    phi: Any,
    gains: Iterable[float],
    starts: Iterable[str] = ("orthogonal", "gaussian"),
    *,
    width: int = 200,
    depth: int = 100,
    seeds: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    done: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    r"""Measure the input-output Jacobian of deep networks against the gain.

    One standard normal input for each seed, network and start; the singular values of
    :math:`J = \partial x^{N_l}/\partial x^1`. Rows have ``start``, ``gain``, ``seed``, ``share``
    (of singular values in [0.1, 10]), ``median``, ``smallest``, ``largest``, ``variance`` (mean
    square of the last layer) and ``values`` (all of them, as a list).
    """
    rows = []
    for start in starts:
        for gain in gains:
            generator = torch.Generator().manual_seed(seed)
            for number in range(seeds):
                net = Stack(
                    phi, width, depth, start=start, gain=gain, generator=generator, device=device
                )
                x = torch.randn(1, width, dtype=torch.float64, generator=generator).to(device)
                values = jacobian_singular_values(net, x)[0]
                with torch.no_grad():
                    variance = float(net(x).square().mean())
                rows.append(
                    {
                        "start": start,
                        "gain": gain,
                        "seed": number,
                        "share": float(share_in_band(values)),
                        "median": float(values.median()),
                        "smallest": float(values[-1]),
                        "largest": float(values[0]),
                        "variance": variance,
                        "values": values.tolist(),
                    }
                )
                done(rows[-1])
    return rows


def layer_spectra(net: Stack, x: Tensor) -> Tensor:
    r"""Return the singular values (depth, width) of each layer's :math:`g\,W^l D_l` at one input.

    :math:`D_l = \mathrm{diag}\,\varphi'(x^l)`; the Jacobian is their product.
    """
    out = []
    with torch.no_grad():
        layers = list(net)
        for phi, linear in zip(layers[::2], layers[1::2], strict=True):
            out.append(jacobian_singular_values(nn.Sequential(phi, linear), x)[0])
            x = linear(phi(x))
    return torch.stack(out)
