r"""A combustor that may start to scream: one acoustic mode, driven by noise, whose growth drifts.

The mode's pressure (bar) obeys the Van der Pol equation with white noise

.. math:: \ddot p - (2\nu(t) - \kappa p^2)\,\dot p + \omega_0^2 p = \xi(t),
          \qquad \langle\xi\xi'\rangle = \Gamma\,\delta,

integrated by the semi-implicit Euler-Maruyama scheme, 80 steps to a period (first order in the
step; its oscillator is symplectic, so that only the damping and the noise change the energy).
Averaged over a period, the amplitude is a diffusion with the stationary density

.. math:: P(A) \propto A\exp\Bigl[\tfrac{4\omega_0^2}{\Gamma}
          \Bigl(\tfrac{\nu A^2}{2} - \tfrac{\kappa A^4}{32}\Bigr)\Bigr],

which is what tests hold it against: noise of variance :math:`\Gamma/(2\omega_0^2|\nu|)` where the
mode is quiet (:math:`\nu<0`), a limit cycle of :math:`\sqrt{8\nu/\kappa}` where it is not. The
envelope forgets within :math:`1/|\nu|`: the precursor of an instability.

The stand around it (growth rate, schedule, sensors) is invented for this library; only the
equation of the mode is standard (stochastic averaging: Noiray and Schuermans 2013).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pantarhei.data.series import Recording, Signal
from pantarhei.errors import RequestError

Array = NDArray[np.float64]

KAPPA = 4.8  # 1/(bar^2 s)
GAMMA = 40.0  # Gamma / omega_0^2, bar^2/s
_STEPS = 80  # of the integration, to a period
_KEPT = 10  # samples to a period
_SLOW = 100.0  # Hz: slow sensors, commands and the growth rate
_OH_DELAY = 3  # samples: 0.3 ms at 1 kHz


@dataclass(frozen=True)
class Simulation:
    """What was simulated: ``recordings``, and the ``growth`` rates behind them, (R, K) at 100 Hz.

    A recording has ``p`` (bar) and ``light`` (OH*), 10 samples to a period; ``pressure`` (bar),
    ``mixture`` and ``temperature`` (K) as slow sensors measure them, and the commands
    ``pressure_set`` and ``mixture_set``, all at 100 Hz.
    """

    recordings: tuple[Recording, ...]
    growth: Array


def mode(
    growth: ArrayLike,
    rng: np.random.Generator | Sequence[np.random.Generator],
    *,
    f0: float = 1000.0,
    kappa: float = KAPPA,
    gamma: float = GAMMA,
    every: float = 0.01,
    start: ArrayLike = 0.0,
) -> NDArray[np.float32]:
    """Integrate the mode for runs of given growth rates; return p, (R, samples), 10 to a period.

    Args:
        growth: nu in 1/s, (R, K): constant over each of K stretches of ``every`` seconds.
        rng: One generator for all runs, or one for each, by which a run does not depend on others.
        f0: Frequency in Hz.
        kappa: Nonlinear damping, 1/(bar^2 s).
        gamma: Intensity of the noise over omega_0^2, bar^2/s.
        every: Seconds; a whole number of sampling intervals.
        start: Pressure at the beginning, bar, for each run.

    Raises :class:`RequestError` where ``every`` is no whole number of samples.

    >>> quiet = mode(np.full((3, 50), -40.0), np.random.default_rng(0))
    >>> quiet.shape, bool(quiet.std() < 1)
    ((3, 5000), True)
    """
    nu = np.atleast_2d(np.asarray(growth, np.float64))
    samples = every * f0 * _KEPT
    if not f0 > 0 or samples < 1 or abs(samples - round(samples)) > 1e-6:
        raise RequestError(f"{every:g} s is no whole number of samples at {_KEPT * f0:g} Hz.")
    runs, h, omega = len(nu), 1 / (_STEPS * f0), 2 * math.pi * f0
    inner = _STEPS // _KEPT
    # In units in which h kappa x^2 is x^2, and with u = h v, a step is seven array operations.
    unit = math.sqrt(h * kappa)
    x = np.broadcast_to(np.asarray(start, np.float64), (runs,)) * unit
    u, t = np.zeros(runs), np.empty(runs)
    stiff, kick = (h * omega) ** 2, h * omega * math.sqrt(gamma * h) * unit
    kept = np.empty((nu.shape[1] * round(samples), runs), np.float32)
    multiply, subtract, add = np.multiply, np.subtract, np.add
    place = 0
    for k in range(nu.shape[1]):
        gain = 1 + 2 * h * nu[:, k]
        for noise in _noise(rng, runs, round(samples) * inner, kick):
            for n in noise:
                multiply(x, x, t)
                subtract(gain, t, t)
                multiply(u, t, u)
                multiply(x, stiff, t)
                subtract(u, t, u)
                add(u, n, u)
                add(x, u, x)
            kept[place] = x
            place += 1
    kept /= np.float32(unit)
    return np.ascontiguousarray(kept.T)


def combustor(
    runs: int,
    seconds: float = 40.0,
    seed: int = 0,
    *,
    first: int = 0,
    f0: float = 1000.0,
    base: float = -22.0,
) -> Simulation:
    r"""Simulate runs of a test stand, together; run number r depends on ``seed`` and r alone.

    Every 5 s the stand gets new set points, of chamber pressure U(50, 80) bar and mixture ratio
    U(3, 6), and follows them with a lag of 1 s. The hydrogen's temperature is
    T = 45 + 15 U(-1, 1) + 5 sin(2 pi t / 30 s + phase) K. With ph = (p-65)/15, rh = (r-4.5)/1.5 and
    th = (T-45)/15 the growth rate in 1/s is

    .. math:: \nu = \mathrm{base} + 26\,ph + 18\,rh + 12\,ph\,rh - 10\,th + \delta + w,

    where delta ~ N(0, 12^2) is hidden and the run's own, and w is an Ornstein-Uhlenbeck process of
    0.5 s and standard deviation 4. OH* is 0.3 p(t - 0.3 periods) + 0.8 N(0, 1); slow sensors have
    noise of 0.1 bar, 0.03 and 0.3 K.

    Args:
        runs: How many.
        seconds: Of each; whole tenths.
        seed: Of all random numbers.
        first: Number of the first run: runs made in parts are the runs made at once.
        f0: Frequency of the mode, Hz. All slow times stay as they are.
        base: Growth rate in the middle of the operating range; higher, and more runs scream.

    >>> made = combustor(2, seconds=0.5)
    >>> made.growth.shape, len(made.recordings[0].signals["p"].values)
    ((2, 50), 5000)
    """
    steps = round(seconds * _SLOW)
    if runs < 1 or steps < 10 or first < 0:
        raise RequestError(f"{runs} runs of {seconds:g} s from number {first}: too little to make.")
    seeds = [np.random.SeedSequence([seed, first + r]).spawn(2) for r in range(runs)]
    stands = [_Stand.draw(np.random.default_rng(s), steps, base) for s, _ in seeds]
    generators = [np.random.default_rng(s) for _, s in seeds]
    growth = np.stack([stand.growth for stand in stands])
    pressure = mode(growth, generators, f0=f0, every=1 / _SLOW)
    recordings = tuple(
        _record(f"run{first + r:03d}", stand, p, rng, f0 * _KEPT)
        for r, (stand, p, rng) in enumerate(zip(stands, pressure, generators, strict=True))
    )
    return Simulation(recordings, growth)


@dataclass(frozen=True)
class Combustor:
    """The settings of :func:`combustor`, for sets of runs that are written to a folder.

    >>> [run.name for run in Combustor(seconds=0.5).simulate(range(3, 5))]
    ['run003', 'run004']
    """

    seconds: float = 40.0
    f0: float = 1000.0
    base: float = -22.0

    def simulate(
        self, cases: Sequence[int], seed: int = 0, device: object = "cpu"
    ) -> tuple[Recording, ...]:
        """Return the runs of consecutive numbers ``cases``; always made on the CPU."""
        made = combustor(len(cases), self.seconds, seed, first=cases[0], f0=self.f0, base=self.base)
        return made.recordings


def limit_cycle(growth: float, kappa: float = KAPPA) -> float:
    """Return the amplitude of the noiseless oscillation, bar: 0 where it is damped.

    >>> limit_cycle(60.0)
    10.0
    """
    return math.sqrt(8 * max(growth, 0.0) / kappa)


def stationary_moment(
    growth: float, power: int = 2, kappa: float = KAPPA, gamma: float = GAMMA
) -> float:
    """Return the mean of A^power under the stationary density of the amplitude, by quadrature.

    >>> round(stationary_moment(-40.0), 3), round(stationary_moment(60.0), 1)  # bar^2
    (0.493, 100.0)
    """
    reach = math.sqrt(gamma / (2 * abs(growth) + 2 * math.sqrt(gamma * kappa / 8)))
    a = np.linspace(0, 3 * limit_cycle(growth, kappa) + 12 * reach, 200_001)[1:]
    log = np.log(a) + 4 / gamma * (growth * a**2 / 2 - kappa * a**4 / 32)
    weight = np.exp(log - log.max())
    return float((a**power * weight).sum() / weight.sum())


@dataclass(frozen=True)
class _Stand:
    """A run's slow side at 100 Hz: what was commanded, what came of it, the growth rate."""

    commands: Array  # (2, K)
    slow: Array  # (3, K): pressure, mixture, temperature as sensors read them
    growth: Array  # (K,)

    @classmethod
    def draw(cls, rng: np.random.Generator, steps: int, base: float) -> _Stand:
        dt = 1 / _SLOW
        t = dt * np.arange(steps)
        holds = math.ceil(steps * dt / 5)
        points = rng.uniform([50.0, 3.0], [80.0, 6.0], (holds, 2))
        commands = points[np.minimum((t / 5).astype(int), holds - 1)].T
        p, r = _lag(commands, dt / 1.0)
        temperature = (
            45 + 15 * rng.uniform(-1, 1) + 5 * np.sin(2 * np.pi * (t / 30 + rng.uniform()))
        )
        hidden, keep = rng.normal(0, 12), math.exp(-dt / 0.5)
        kicks = 4 * math.sqrt(1 - keep**2) * rng.standard_normal((1, steps))
        kicks[0, 0] = 4 * rng.standard_normal()
        wander = _recursion(kicks, keep)[0]
        ph, rh, th = (p - 65) / 15, (r - 4.5) / 1.5, (temperature - 45) / 15
        growth = base + 26 * ph + 18 * rh + 12 * ph * rh - 10 * th + hidden + wander
        noise = np.array([[0.1], [0.03], [0.3]]) * rng.standard_normal((3, steps))
        return cls(commands, np.stack([p, r, temperature]) + noise, growth)


def _record(
    name: str, stand: _Stand, p: NDArray[np.float32], rng: np.random.Generator, rate: float
) -> Recording:
    late = np.concatenate([np.zeros(_OH_DELAY, np.float32), p[:-_OH_DELAY]])
    light = 0.3 * late + 0.8 * rng.standard_normal(len(p), dtype=np.float32)
    slow = dict(zip(("pressure", "mixture", "temperature"), stand.slow, strict=True))
    commands = dict(zip(("pressure_set", "mixture_set"), stand.commands, strict=True))
    fast = {"p": Signal(p, rate=rate), "light": Signal(light.astype(np.float32), rate=rate)}
    return Recording(name, fast | {k: Signal(v, rate=_SLOW) for k, v in (slow | commands).items()})


def _lag(x: Array, step: float) -> Array:
    """Follow x with a first-order lag, from its first value: y' = (x - y) / tau."""
    keep = math.exp(-step)
    driven = (1 - keep) * x
    driven[:, 0] = x[:, 0]
    return _recursion(driven, keep)


def _recursion(x: Array, keep: float) -> Array:
    """Return y_k = keep y_(k-1) + x_k along the last axis."""
    from scipy.signal import lfilter

    found: Array = lfilter([1.0], [1.0, -keep], x, axis=-1)
    return found


def _noise(
    rng: np.random.Generator | Sequence[np.random.Generator], runs: int, steps: int, kick: float
) -> Array:
    """Return scaled normal numbers (samples, steps to a sample, R): one block at a time."""
    if isinstance(rng, np.random.Generator):
        drawn = rng.standard_normal((steps, runs), dtype=np.float32)
    else:
        drawn = np.stack([g.standard_normal(steps, dtype=np.float32) for g in rng], 1)
    return (kick * drawn.astype(np.float64)).reshape(-1, _STEPS // _KEPT, runs)
