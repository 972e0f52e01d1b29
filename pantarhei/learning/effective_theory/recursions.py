r"""From layer to layer: the kernel, the tangent kernel and their leading finite-width vertices.

The network is :math:`z^{(1)} = b + Wx`, :math:`z^{(l+1)} = \gamma z^{(l)} + b + W\sigma(z^{(l)})`
with Var b = C_b and Var W = C_W / fan-in; a gradient step is
:math:`\theta \leftarrow \theta - \eta\lambda\nabla`, :math:`\lambda` being lambda_b for a bias and
lambda_W / fan-in for a weight. Equations: "The Principles of Deep Learning Theory", chapters 4, 5,
8 and 11; the cubic vertex T is this library's addition.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pantarhei.errors import RequestError
from pantarhei.probes.mean_field import Activation, Function, critical_point

Schedule = float | Sequence[float] | Tensor


@dataclass(frozen=True)
class Vertices:
    r"""Statistics of every layer of random networks at one input, to leading order in 1/width.

    Each is a tensor (L,) + the shape of ``x2``; entry l - 1 belongs to layer l. With n the width of
    the layer before, :math:`\Delta H = H - E H`, and :math:`\widehat{dH}` the differential of the
    tangent kernel:

    - ``K``, ``G1``: :math:`E z_i^2 = K + G_1/n`; ``Theta``: :math:`E H_{ii}`, both at n = infinity;
    - ``V``: :math:`E[z_i^2 z_j^2]_c = V/n` for :math:`i \ne j` and 3 V/n for i = j;
    - ``T``: :math:`E z_i z_j^2 = T/n` for :math:`i \ne j` (0 without a residual branch);
    - ``D``, ``F``: :math:`E z_i z_j \Delta H_{kl}
      = (\delta_{ij}\delta_{kl} D + (\delta_{ik}\delta_{jl} + \delta_{il}\delta_{jk}) F)/n`;
    - ``A``, ``B``: the same for :math:`E \Delta H_{ij} \Delta H_{kl}`;
    - ``P``, ``Q``: :math:`E\,\widehat{dH}_{012} z_3 = (\delta_{03}\delta_{12} P
      + (\delta_{01}\delta_{23} + \delta_{02}\delta_{13}) Q)/n`.

    G1 and D to Q are None with a residual branch: the book gives them without.
    """

    K: Tensor
    Theta: Tensor
    V: Tensor
    T: Tensor
    G1: Tensor | None
    D: Tensor | None
    F: Tensor | None
    A: Tensor | None
    B: Tensor | None
    P: Tensor | None
    Q: Tensor | None

    @property
    def feature_learning(self) -> Tensor:
        r"""The dimensionless strength of feature learning at each layer, over n still.

        The larger of :math:`|P| K/\Theta^2` and :math:`|Q| K/\Theta^2`; divided by n it is how far
        learning at order one moves the tangent kernel, and grows as L/n.
        """
        if self.P is None or self.Q is None:
            raise RequestError("Vertices with a residual branch have no P and Q: use gamma=0.")
        return torch.maximum(self.P.abs(), self.Q.abs()) * self.K / self.Theta**2


def vertices(
    activation: Activation | Function | str,
    layers: int,
    x2: float | Tensor = 1.0,
    *,
    C_b: float | None = None,
    C_W: float | None = None,
    widths: Sequence[int] | None = None,
    lambda_b: Schedule = 1.0,
    lambda_W: Schedule = 1.0,
    gamma: float = 0.0,
    cubic: bool = True,
) -> Vertices:
    r"""Compute the :class:`Vertices` of every layer.

    With all on the right at layer l, lambda at layer l + 1 and :math:`r = n_l/n_{l-1}`:

    .. math::
        K' &= \gamma^2 K + C_b + C_W\langle\sigma^2\rangle, \qquad
        \Theta' = \lambda_b + \lambda_W\langle\sigma^2\rangle + \chi_\perp\Theta \\
        V' &= C_W^2(\langle\sigma^4\rangle - \langle\sigma^2\rangle^2)
              + 2\gamma^2 C_W\langle\sigma^2(z^2-K)\rangle + r\chi_\parallel^2 V
              + 2 C_W\chi_\parallel\langle(\sigma^2)'\rangle T \\
        T' &= \gamma\chi_\parallel T + \gamma C_W\langle z\sigma^2\rangle \\
        G_1' &= r\bigl(\chi_\parallel G_1 + \tfrac{C_W V}{8K^4}
                \langle\sigma^2(z^4-6Kz^2+3K^2)\rangle\bigr) \\
        F' &= C_W^2\langle\sigma^2\sigma'^2\rangle\Theta + r\chi_\parallel^2 F \\
        D' &= \tfrac{\lambda_W}{C_W}V' + C_W^2(\langle\sigma^2\sigma'^2\rangle
              - \langle\sigma^2\rangle\langle\sigma'^2\rangle)\Theta
              + r(2h\chi_\parallel\Theta V + \chi_\parallel\chi_\perp D) \\
        B' &= C_W^2\langle\sigma'^4\rangle\Theta^2 + r\chi_\perp^2 B \\
        A' &= C_W^2(\langle\sigma'^4\rangle - \langle\sigma'^2\rangle^2)\Theta^2
              + r(\chi_\perp^2 A + 4h^2\Theta^2 V + 4h\chi_\perp\Theta D)
              + 2\tfrac{\lambda_W}{C_W}D' - \tfrac{\lambda_W^2}{C_W^2}V' \\
        P' &= C_W^2\langle\sigma\sigma''\sigma'^2\rangle\Theta^2
              + r(C_W\chi_\perp\langle\sigma\sigma''\rangle B + \chi_\parallel\chi_\perp P) \\
        Q' &= C_W^2\langle\sigma\sigma''\sigma'^2\rangle\Theta^2 + \tfrac{\lambda_W}{C_W}F'
              + r(2h\chi_\parallel\Theta F + \chi_\parallel\chi_\perp Q)

    Second derivatives are integrated by parts, so that the delta function at a kink counts: what a
    network with that kink slightly rounded would show. (Automatic differentiation does not see it;
    it is multiplied by sigma at the kink, 0 for ReLU.)

    Args:
        activation: Any elementwise torch function, or a name.
        layers: L, the output layer included.
        x2: x.x / n_0 of the input; a tensor for several inputs, each on its own.
        C_b, C_W: Variances; the activation's critical ones unless given.
        widths: n_1 .. n_{L-1} of the hidden layers; all equal unless given.
        lambda_b, lambda_W: Learning-rate factors, one number or one a layer.
        gamma: Strength of the residual branch.
        cubic: Whether T acts on V. The book's residual formula is that without.

    Raises :class:`RequestError` for sizes that do not fit, and for an activation without a critical
    point when C_W is not given.

    >>> relu = vertices("relu", 4, lambda_b=0.7, lambda_W=1.3)
    >>> [round(float(v), 9) for v in relu.V]
    [0.0, 20.0, 40.0, 60.0]
    >>> [round(float(a), 2) for a in relu.A]
    [0.0, 17.65, 83.05, 226.3]
    """
    act = Activation(activation)
    C_b, C_W = _variances(act, gamma, C_b, C_W)
    ratios = _ratios(layers, widths, gamma)
    rates_b, rates_W = (_per_layer(s, layers) for s in (lambda_b, lambda_W))
    x2 = torch.as_tensor(x2, dtype=torch.float64)
    if not bool((x2 > 0).all()):
        raise RequestError("x2 = x.x / n_0 must be positive: an input of zeros has no signal.")
    zero = torch.zeros_like(x2)
    state = {name: zero for name in ("V", "T", "G1", "D", "F", "A", "B", "P", "Q")}
    state |= {"K": C_b + C_W * x2, "Theta": rates_b[0] + rates_W[0] * x2}
    history = [state]
    for layer in range(1, layers):
        state = _next(
            act,
            state,
            C_b,
            C_W,
            rates_b[layer],
            rates_W[layer],
            ratios[layer - 1],
            gamma,
            cubic,
        )
        history.append(state)
    found = {name: torch.stack([state[name] for state in history]) for name in state}
    if gamma:
        found |= dict.fromkeys(("G1", "D", "F", "A", "B", "P", "Q"))  # type: ignore[arg-type]
    return Vertices(**found)


def _next(
    act: Activation,
    at: dict[str, Tensor],
    C_b: float,
    C_W: float,
    lambda_b: float,
    lambda_W: float,
    r: float,
    gamma: float,
    cubic: bool,
) -> dict[str, Tensor]:
    K, Theta, V, D, F = (at[name] for name in ("K", "Theta", "V", "D", "F"))

    def integrands(z: Tensor) -> Tensor:
        k, s, d = K[..., None], act(z), act.derivative(z)
        zsd, s2, d2, w = z * s * d / k, s * s, d * d, z * z - k
        quartic = s2 * (z**4 - 6 * k * z * z + 3 * k * k)
        return torch.stack(
            [s2, s2 * s2, d2, d2 * d2, s2 * d2, zsd, zsd * d2, d2 * w, s2 * w, z * s2, quartic]
        )

    (s2, s4, d2, d4, s2d2, zsd, zsd3, d2w, s2w, zs2, quartic) = act.average(integrands, K)
    parallel, perpendicular = gamma**2 + C_W * zsd, gamma**2 + C_W * d2
    h, curved, curved3 = C_W * d2w / (4 * K**2), zsd - d2, (zsd3 - d4) / 3
    if act.slopes is not None:  # exactly 0, not to rounding
        h, curved, curved3, quartic = (torch.zeros_like(K) for _ in range(4))
    ratio = lambda_W / C_W
    new = {
        "K": gamma**2 * K + C_b + C_W * s2,
        "Theta": lambda_b + lambda_W * s2 + perpendicular * Theta,
        "T": gamma * parallel * at["T"] + gamma * C_W * zs2,
        "G1": r * (parallel * at["G1"] + C_W * V / (8 * K**4) * quartic),
        "V": C_W**2 * (s4 - s2**2) + 2 * gamma**2 * C_W * s2w + r * parallel**2 * V,
        "F": C_W**2 * s2d2 * Theta + r * parallel**2 * F,
        "B": C_W**2 * d4 * Theta**2 + r * perpendicular**2 * at["B"],
    }
    if cubic:
        # By parts, the average of (sigma^2)' is that of z sigma^2 / K.
        new["V"] = new["V"] + 2 * C_W * parallel * zs2 / K * at["T"]
    new["D"] = (
        ratio * new["V"]
        + C_W**2 * (s2d2 - s2 * d2) * Theta
        + r * (2 * h * parallel * Theta * V + parallel * perpendicular * D)
    )
    new["A"] = (
        C_W**2 * (d4 - d2**2) * Theta**2
        + r * (perpendicular**2 * at["A"] + 4 * h * Theta * (h * Theta * V + perpendicular * D))
        + 2 * ratio * new["D"]
        - ratio**2 * new["V"]
    )
    new["P"] = C_W**2 * curved3 * Theta**2 + r * perpendicular * (
        C_W * curved * at["B"] + parallel * at["P"]
    )
    new["Q"] = (
        C_W**2 * curved3 * Theta**2
        + ratio * new["F"]
        + r * (2 * h * parallel * Theta * F + parallel * perpendicular * at["Q"])
    )
    return new


@dataclass(frozen=True)
class JointVertices:
    r"""Statistics of every layer at M inputs jointly, to leading order in 1/width.

    ``K`` and ``Theta`` are (L, M, M); ``V`` is (L, M, M, M, M), where
    :math:`E[z_{i1} z_{i2} z_{j3} z_{j4}]_c = V_{(12)(34)}/n` for neurons :math:`i \ne j`, or None.
    """

    K: Tensor
    Theta: Tensor
    V: Tensor | None


def joint_vertices(
    activation: Activation | Function | str,
    layers: int,
    inputs: Tensor,
    *,
    C_b: float | None = None,
    C_W: float | None = None,
    widths: Sequence[int] | None = None,
    lambda_b: Schedule = 1.0,
    lambda_W: Schedule = 1.0,
    gamma: float = 0.0,
    four_point: bool = True,
) -> JointVertices:
    r"""Compute kernel, tangent kernel and four-point vertex at several inputs jointly.

    .. math::
        K'_{12} &= \gamma^2 K_{12} + C_b + C_W\langle\sigma_1\sigma_2\rangle, \qquad
        \Theta'_{12} = \lambda_b + \lambda_W\langle\sigma_1\sigma_2\rangle
          + (\gamma^2 + C_W\langle\sigma'_1\sigma'_2\rangle)\Theta_{12} \\
        V'_{(12)(34)} &= C_W^2\bigl(\langle\sigma_1\sigma_2\sigma_3\sigma_4\rangle
          - \langle\sigma_1\sigma_2\rangle\langle\sigma_3\sigma_4\rangle\bigr)
          + r \sum_{abcd} J_{12}^{ab} V_{(ab)(cd)} J_{34}^{cd}

    with :math:`J_{12}^{ab} = C_W\,\partial\langle\sigma_1\sigma_2\rangle/\partial K_{ab}`, which is
    the book's expression with indices raised by the inverse of K, but needs no inverse and so holds
    for repeated inputs too. V without residual branch only.

    Args:
        activation: Any elementwise torch function, or a name.
        layers: L, the output layer included.
        inputs: (M, n_0).
        C_b, C_W: Variances; the activation's critical ones unless given.
        widths: n_1 .. n_{L-1} of the hidden layers; all equal unless given.
        lambda_b, lambda_W: Learning-rate factors, one number or one a layer.
        gamma: Strength of the residual branch.
        four_point: Whether to compute V, whose cost grows as M^4: for a few inputs.

    >>> found = joint_vertices("relu", 3, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    >>> round(found.K[-1, 0, 0].item(), 9), round(found.V[-1, 0, 0, 0, 0].item(), 6)
    (2.0, 40.0)
    """
    act = Activation(activation)
    C_b, C_W = _variances(act, gamma, C_b, C_W)
    ratios = _ratios(layers, widths, gamma)
    rates_b, rates_W = (_per_layer(s, layers) for s in (lambda_b, lambda_W))
    if inputs.ndim != 2 or not bool(torch.isfinite(inputs).all()):
        raise RequestError("inputs must be a finite matrix with one input a row.")
    if four_point and gamma:
        raise RequestError("V at several inputs has no residual branch: pass four_point=False.")
    if four_point and len(inputs) > 16:
        raise RequestError(
            f"V of {len(inputs)} inputs is too large: give at most 16, or four_point=False."
        )
    x = inputs.to("cpu", torch.float64)
    gram = x @ x.T / x.shape[1]
    K, Theta = C_b + C_W * gram, rates_b[0] + rates_W[0] * gram
    V = torch.zeros(4 * (len(x),), dtype=torch.float64) if four_point else None
    history = [(K, Theta, V)]
    for layer in range(1, layers):
        diagonal = K.diag()
        s = act.pairs(K, diagonal, diagonal)
        d = act.pairs(K, diagonal, diagonal, order=1)
        if V is not None:
            V = _next_four_point(act, K, s, d, V, ratios[layer - 1]) * C_W**2
        Theta = rates_b[layer] + rates_W[layer] * s + (gamma**2 + C_W * d) * Theta
        K = gamma**2 * K + C_b + C_W * s
        history.append((K, Theta, V))
    kernels, tangents, fours = zip(*history, strict=True)
    return JointVertices(
        torch.stack(kernels), torch.stack(tangents), torch.stack(fours) if four_point else None
    )


def _next_four_point(
    act: Activation, K: Tensor, s: Tensor, d: Tensor, V: Tensor, r: float
) -> Tensor:
    m = len(K)
    # z_1 s'_1 s_2 by parts: K_11 <s''_1 s_2> + K_12 <s'_1 s'_2>
    blocks = torch.stack(
        [torch.stack([K.diag()[:, None].expand(m, m), K], -1),
         torch.stack([K, K.diag()[None].expand(m, m)], -1)], -1
    )  # fmt: skip
    mixed = act.joint_average(
        lambda z: z[..., 0] * act.derivative(z[..., 0]) * act(z[..., 1]), blocks
    )
    bent = (mixed - K * d) / K.diag()[:, None]  # <s''_1 s_2>
    eye = torch.eye(m, dtype=torch.float64)
    # d<s1 s2> = <s'1 s'2> dK_12 + <s''1 s2> dK_11 / 2 + <s1 s''2> dK_22 / 2
    jacobian = torch.einsum("ij,ia,jb->ijab", d, eye, eye)
    jacobian = jacobian + torch.einsum("ij,ia,ib->ijab", bent, eye, eye) / 2
    jacobian = jacobian + torch.einsum("ji,ja,jb->ijab", bent, eye, eye) / 2
    spread = torch.einsum("ijab,abcd,klcd->ijkl", jacobian, V, jacobian)
    return _fourth_moments(act, K) - torch.einsum("ij,kl->ijkl", s, s) + r * spread


def _fourth_moments(act: Activation, K: Tensor) -> Tensor:
    """Return <s_1 s_2 s_3 s_4> for all inputs; each set of distinct inputs is integrated once."""
    m = len(K)
    out = torch.zeros(4 * (m,), dtype=torch.float64)
    for size in range(1, min(4, m) + 1):
        chosen = torch.tensor(list(itertools.combinations(range(m), size)))
        blocks = K[chosen[:, :, None], chosen[:, None, :]]
        for powers in itertools.product(range(1, 5), repeat=size):
            if sum(powers) != 4:
                continue
            moments = act.joint_average(functools.partial(_power, act, powers), blocks)
            places = chosen.repeat_interleave(torch.tensor(powers), dim=1)
            for order in set(itertools.permutations(range(4))):
                out[tuple(places[:, list(order)].T)] = moments
    return out


def _power(act: Activation, powers: Sequence[int], z: Tensor) -> Tensor:
    return (act(z) ** torch.tensor(powers, dtype=torch.float64)).prod(-1)


def _variances(
    act: Activation, gamma: float, C_b: float | None, C_W: float | None
) -> tuple[float, float]:
    if C_W is None:
        found = critical_point(act, gamma)
        if found.C_W is None or found.C_b is None:
            raise RequestError(
                f"'{act.name}' has no critical point ({found.reason}): give C_b and C_W."
            )
        return (found.C_b if C_b is None else C_b), found.C_W
    if C_W <= 0 or (C_b or 0) < 0:
        raise RequestError(f"C_W={C_W} must be positive and C_b={C_b} not negative: variances.")
    return C_b or 0.0, C_W


def _ratios(layers: int, widths: Sequence[int] | None, gamma: float) -> list[float]:
    """Return n_l / n_{l-1} for l = 1 .. L-1; the first, with n_0, multiplies zeros."""
    if layers < 1:
        raise RequestError(f"layers={layers}: a network has at least 1.")
    if widths is None:
        return [1.0] * (layers - 1)
    if len(widths) != layers - 1 or min(widths, default=1) < 1:
        raise RequestError(
            f"widths has {len(widths)} entries: give n_1 to n_{layers - 1}, those of the "
            f"{layers - 1} hidden layers, all positive."
        )
    if gamma and len(set(widths)) > 1:
        raise RequestError("A residual branch needs equal widths, but widths has different ones.")
    return [1.0] + [b / a for a, b in itertools.pairwise(widths)]


def _per_layer(schedule: Schedule, layers: int) -> list[float]:
    values = [float(v) for v in schedule] if isinstance(schedule, Sequence | Tensor) else None
    if values is None:
        return [float(schedule)] * layers  # type: ignore[arg-type]
    if len(values) != layers:
        raise RequestError(f"A learning-rate factor has {len(values)} entries for {layers} layers.")
    return values
