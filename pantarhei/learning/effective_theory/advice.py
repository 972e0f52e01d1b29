r"""How wide and how deep: aspect ratio, entropy, and how far from Gaussian a network is.

The leading finite-width effects all grow as the aspect ratio :math:`r = L/n`: at criticality
:math:`v = V/(nG^2) = \nu r`. Too small an r and the network is its infinite-width limit, which
learns no features; too large and it differs from run to run. "The Principles of Deep Learning
Theory", appendix A, takes the r that lets groups of outputs tell most about each other.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.learning.effective_theory.monte_carlo import measure
from pantarhei.learning.effective_theory.recursions import vertices
from pantarhei.learning.effective_theory.training import weighted_layers
from pantarhei.probes.mean_field import Activation, CriticalPoint, Function, critical_point


def entropy(G: float, v: float | Tensor, neurons: int) -> Tensor:
    r"""Return the entropy in nats of m neurons of a nearly Gaussian layer.

    .. math:: S = \tfrac m2 \ln 2\pi e G - \tfrac{m^2 + 2m}{16} v^2 + O(1/n^3)

    with variance G and :math:`v = V/(nG^2)`.

    >>> round(float(entropy(1.0, 0.0, 1)), 6)
    1.418939
    """
    v = torch.as_tensor(v, dtype=torch.float64)
    m = neurons
    return m / 2 * math.log(2 * math.pi * math.e * G) - (m * m + 2 * m) / 16 * v**2


def mutual_information(v: float | Tensor, first: int, second: int) -> Tensor:
    r"""Return the mutual information in nats of two groups of neurons of one layer.

    .. math:: I = \tfrac{m_1 m_2}{8} v^2 (1 - c v), \qquad c = \tfrac{20 + 3(m_1 + m_2)}{6}

    It is largest at v* = 2/(3 c) = 4/(20 + 3 (m_1 + m_2)), which is what :func:`optimal_ratio` asks
    for; beyond, the expansion in v no longer holds.
    """
    v = torch.as_tensor(v, dtype=torch.float64)
    c = (20 + 3 * (first + second)) / 6
    return first * second / 8 * v**2 * (1 - c * v)


def optimal_ratio(nu: float, outputs: int) -> float:
    r"""Return the aspect ratio :math:`r^* = L/n = \frac{4}{20 + 3 n_L} / \nu`.

    A rule of thumb, right up to a factor of order 1: it sees neither data nor optimiser.

    >>> [round(optimal_ratio(nu, 1), 4) for nu in (5, 2 / 3)]  # ReLU, tanh
    [0.0348, 0.2609]
    """
    if not nu > 0 or outputs < 1:
        raise RequestError(f"nu={nu} must be positive and outputs={outputs} at least 1.")
    return 4 / (20 + 3 * outputs) / nu


@dataclass(frozen=True)
class Advice:
    r"""What :func:`advise` says.

    Attributes:
        critical: The activation's critical point, with nu.
        outputs, gamma: As asked.
        ratio: r*, the best depth over width.
        depth, width: As asked, or what r* makes of the other; None where neither was given.
        non_gaussianity: :math:`v = \nu L/n` at that depth and width; None without.
        resummed: :math:`e^{\nu L/n} - 1`, its value beyond leading order for the scale-invariant
            class; None in other classes.
        sentences: The advice in words.
    """

    critical: CriticalPoint
    outputs: int
    gamma: float
    ratio: float
    depth: int | None
    width: int | None
    non_gaussianity: float | None
    resummed: float | None
    sentences: tuple[str, ...]


def advise(
    activation: Activation | Function | str,
    outputs: int = 1,
    *,
    depth: int | None = None,
    width: int | None = None,
    gamma: float = 0.0,
    cubic: bool = True,
) -> Advice:
    """Say how wide and deep a network with this activation should be and how to initialise it.

    Args:
        activation: Any elementwise torch function, or a name.
        outputs: n_L.
        depth: L; with it alone the width that suits it is worked out.
        width: n; with it alone the depth that suits it; with both, the pair is judged.
        gamma: Strength of the residual branch.
        cubic: Whether the cubic vertex counts in nu (see :func:`~pantarhei.probes.critical_point`).

    >>> told = advise("relu", outputs=10, depth=8)
    >>> told.width, round(told.ratio, 3)
    (500, 0.016)
    >>> advise("tanh", outputs=1, width=100).depth
    26
    """
    for name, value in (("depth", depth), ("width", width), ("outputs", outputs)):
        if value is not None and value < 1:
            raise RequestError(f"{name}={value} must be at least 1.")
    act = Activation(activation)
    point = critical_point(act, gamma, cubic=cubic)
    if point.nu is None:
        raise RequestError(
            f"'{act.name}' has no critical point: {point.reason}; deep networks with it are not "
            "trainable whatever their width. Take gelu, tanh or relu."
        )
    ratio = optimal_ratio(point.nu, outputs)
    sentences = [_initialisation(act, point, gamma)]
    if width is not None and depth is not None:
        sentences.append(_judgement(depth / width / ratio))
    elif depth is not None:
        width = max(1, round(depth / ratio))
        sentences.append(f"For depth {depth}, take a width of about {width}.")
    elif width is not None:
        depth = max(1, round(width * ratio))
        sentences.append(f"For width {width}, take a depth of about {depth}.")
    v = resummed = None
    if width and depth:
        v = point.nu * depth / width
        sentences.append(f"Relative fluctuations from run to run: v = nu L/n = {v:.3g}.")
        if point.universality == "scale-invariant":
            resummed = math.expm1(v)
        if v > 0.5:
            sentences.append("v is not small: the leading order underestimates what happens.")
    return Advice(point, outputs, gamma, ratio, depth, width, v, resummed, tuple(sentences))


def _initialisation(act: Activation, point: CriticalPoint, gamma: float) -> str:
    kernel = "" if not point.K else f", inputs scaled such that the first kernel is {point.K:.4g}"
    branch = f" beside a residual branch of {gamma:g}" if gamma else ""
    return (
        f"Initialise {act.name}{branch} with Var W = {point.C_W:.6g} / fan-in and "
        f"Var b = {point.C_b:.6g}{kernel}."
    )


def _judgement(excess: float) -> str:
    if excess > 2:
        return f"Too deep for its width, {excess:.2g} times r*: widen it, or use residual branches."
    if excess < 0.5:
        return f"Wide for its depth, {excess:.2g} times r*: close to its infinite-width limit."
    return f"Depth over width is {excess:.2g} times r*: balanced."


@dataclass(frozen=True)
class NonGaussianity:
    """v = V/(n G^2) of one layer: its name, neurons, variance G, the value and standard error."""

    name: str
    neurons: int
    G: float
    v: float
    error: float


def non_gaussianity(
    model: nn.Module,
    inputs: Tensor,
    *,
    networks: int = 100,
    init: Callable[[nn.Module], object] | None = None,
    trained: bool = False,
    seed: int = 0,
) -> list[NonGaussianity]:
    r"""Measure how far from Gaussian the preactivations of a real model are, layer by layer.

    The model is initialised again ``networks`` times and its linear layers and convolutions are
    watched; for every input (and place of a convolution)

    .. math:: v = \frac{V}{nG^2} = \frac{E\,\overline{z_i^2 z_j^2}}{(E\,\overline{z^2})^2} - 1

    with the bar a mean over distinct neurons and E one over networks; the mean over inputs is
    returned, with the standard error over networks. With ``trained`` the model stays as it is, and
    v is a third of the excess kurtosis of the neurons at one input: 0 for a random network, in
    which neurons of one layer are Gaussian given the layer before, and not for one whose training
    has made them so. Its error is that over inputs.

    Args:
        model: Any module; a copy is worked on, in evaluation mode.
        inputs: A batch of inputs.
        networks: How often to initialise; 2 at least.
        init: Initialises the model; every module's own ``reset_parameters`` unless given.
        trained: Whether to measure the model itself over its neurons.
        seed: Of the initialisations.
    """
    if not trained and networks < 2:
        raise RequestError(f"networks={networks}: an ensemble has at least 2.")
    model = copy.deepcopy(model).eval()
    names = [name for name, _ in weighted_layers(model)]
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    neurons: dict[str, int] = {}
    with torch.random.fork_rng(), torch.no_grad(), _watched(model, rows, neurons, trained):
        torch.manual_seed(seed)
        for _ in range(1 if trained else networks):
            if not trained:
                (init or _reset)(model)
            model(inputs)
    return [
        NonGaussianity(name, neurons[name], *_four_point(torch.stack(rows[name]), trained))
        for name in names
        if rows[name]
    ]


@contextlib.contextmanager
def _watched(
    model: nn.Module, rows: dict[str, list[Tensor]], neurons: dict[str, int], trained: bool
) -> Iterator[None]:
    """Have every layer append its means over (pairs of) neurons, (2, places), to its rows."""

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        axis = -1 if isinstance(layer, nn.Linear) else 1

        def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            square = out.detach().double().square().movedim(axis, -1).flatten(0, -2)
            n = neurons[name] = square.shape[-1]
            total, fourth = square.sum(-1), square.square().sum(-1)
            both = fourth / (3 * n) if trained else (total**2 - fourth) / max(1, n * (n - 1))
            rows[name].append(torch.stack([total / n, both]))

        return hook

    hooks = [m.register_forward_hook(watch(name, m)) for name, m in weighted_layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _four_point(rows: Tensor, trained: bool) -> tuple[float, float, float]:
    """Return G, v and its error from means (networks, 2, places)."""
    G, both = rows.mean(0)
    v = both / G**2 - 1
    if trained:
        # Over n neurons of a Gaussian, E z^4 / (3 (mean z^2)^2) is n / (n + 2): no correction is
        # made, since the error over inputs does not resolve it where it matters.
        return float(G.mean()), float(v.mean()), float(v.std() / max(1, len(v) - 1) ** 0.5)
    influence = ((rows[:, 1] - 2 * G * rows[:, 0]) / G**2).mean(1)
    return float(G.mean()), float(v.mean()), float(influence.std() / len(rows) ** 0.5)


def _reset(model: nn.Module) -> None:
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def sweep(
    activation: Activation | Function | str,
    widths: Sequence[int],
    depth: int,
    *,
    networks: int = 20_000,
    x2: float = 1.0,
    gamma: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    quiet: bool = True,
) -> list[dict[str, float]]:
    r"""Measure V/(n G^2) of critical random networks over width and depth, theory beside it.

    One chain of layers gives every depth up to ``depth``, so that the cost is that of the deepest.
    Each row holds ``width``, ``layer``, ``ratio`` ((l - 1)/n), theory's ``K``, ``G``, ``V``, errors
    ``G_error``, ``V_error``, ``measured`` (V/(n G^2)) with ``error``, ``theory`` (the recursion's
    V/(n K^2)) and ``resummed``: the exact (1 + nu/n)^(l-1) - 1 of the scale-invariant class, which
    is e^{nu l/n} - 1 for wide networks; elsewhere equal to ``theory``.

    >>> rows = sweep("relu", (50,), 4, networks=4000)
    >>> rows[-1]["layer"], round(rows[-1]["theory"], 3), round(rows[-1]["resummed"], 3)
    (4, 0.3, 0.331)
    """
    act = Activation(activation)
    point = critical_point(act, gamma)
    theory = vertices(act, depth, x2, gamma=gamma)
    rows = []
    for width in widths:
        found = measure(
            act, (width,) * depth, x2, networks=networks, gamma=gamma, seed=seed, device=device,
            quiet=quiet,
        )  # fmt: skip
        G, V = found["G"], found["V"]
        leading = theory.V / (width * theory.K**2)
        resummed = leading
        if point.universality == "scale-invariant" and not gamma and point.nu is not None:
            resummed = (1 + point.nu / width) ** torch.arange(depth) - 1
        for l in range(depth):  # noqa: E741
            rows.append(
                {
                    "width": width,
                    "layer": l + 1,
                    "ratio": l / width,
                    "K": float(theory.K[l]),
                    "G": float(G[l]),
                    "G_error": float(found.errors["G"][l]),
                    "V": float(V[l]),
                    "V_error": float(found.errors["V"][l]),
                    "measured": float(V[l] / (width * G[l] ** 2)),
                    "error": float(found.errors["V"][l] / (width * G[l] ** 2)),
                    "theory": float(leading[l]),
                    "resummed": float(resummed[l]),
                }
            )
    return rows
