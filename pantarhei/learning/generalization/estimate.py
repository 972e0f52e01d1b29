r"""From data to a prediction: signal and noise, when to stop, what the test error will be.

:func:`stopping_time` is the one most people want: ``stopping_time(X, y).time``, or ``.steps`` for a
learning rate, or the stopped model itself (``.predict``). Features of a frozen network, or the
Jacobian of any network (:mod:`~.frozen`), are inputs like any others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from pantarhei.errors import RequestError
from pantarhei.learning.generalization.flow import pair
from pantarhei.learning.generalization.spectrum import (
    Array,
    FixedInputs,
    Law,
    _not_negative,
    _numbers,
    _positive,
    as_law,
)
from pantarhei.learning.generalization.theory import optimal_time

# The loss whose gradient is taken, as a multiple of half the summed squared error.
Loss = Literal["mean", "sum", "half_mean", "half_sum"]


@dataclass(frozen=True)
class SignalNoise:
    """Variances of what the inputs explain of a target and of what they do not.

    ``signal`` is that of the teacher's part for inputs of unit mean square (or, fitted from error
    curves, of teacher and initial weights together), ``noise`` that of the rest.
    """

    signal: float
    noise: float

    @property
    def snr(self) -> float:
        """Signal over noise; infinity without noise."""
        return self.signal / self.noise if self.noise > 0 else np.inf


def signal_to_noise(inputs: ArrayLike, targets: ArrayLike, intercept: bool = True) -> SignalNoise:
    r"""Estimate signal and noise by the marginal likelihood of ``targets`` (P,) or (P, q).

    With a teacher alike in all directions, :math:`y` has the covariance
    :math:`\sigma_w^2 X^T X + \sigma_\epsilon^2`. In the eigenbasis the likelihood is a sum over
    modes; the noise has its maximum in closed form, and the ratio is found on a grid in
    :math:`\ln \mathrm{SNR}` and refined. Inputs are scaled to a mean square norm of 1, so that the
    ratio is that of the two parts of the targets' variance.

    A signal of 0 says that the inputs explain nothing; noise of 0, that they explain everything
    (fewer examples than inputs, perhaps).

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(400, 200)) / np.sqrt(200)
    >>> y = x @ rng.normal(size=200) * 2 + rng.normal(size=400)
    >>> found = signal_to_noise(x, y)
    >>> bool(2.5 < found.snr < 6), bool(0.7 < found.noise < 1.3)
    (True, True)
    """
    x, y, scale, _, _ = _prepared(inputs, targets, intercept)
    law = FixedInputs(x / scale)
    return _likeliest(law, _projected(law, x / scale, y), y, len(x) - intercept)


def _projected(law: FixedInputs, x: Array, y: Array) -> Array:
    """Return the targets along the left singular vectors of ``x``: (K, q)."""
    drive = law.basis.T @ (x.T @ y.reshape(len(y), -1))
    return np.asarray(drive / np.sqrt(law.eigenvalues)[:, None])


def _likeliest(law: FixedInputs, along: Array, y: Array, freedom: int) -> SignalNoise:
    from scipy.optimize import minimize_scalar

    rate, seen = law.eigenvalues[:freedom], (along[:freedom] ** 2).mean(1)
    total = float((y.reshape(len(y), -1) ** 2).mean(1).sum())
    if total == 0:
        raise RequestError("targets do not vary: there is nothing to predict.")
    unseen = max(0.0, total - float(seen.sum()))

    def noise(log_snr: Array | float) -> Array:
        snr = np.exp(np.asarray(log_snr))[..., None]
        return np.asarray(((seen / (1 + snr * rate)).sum(-1) + unseen) / freedom)

    def surprise(log_snr: Array | float) -> Array:
        spread = np.log1p(np.exp(np.asarray(log_snr))[..., None] * rate).sum(-1)
        return np.asarray(spread + freedom * np.log(noise(log_snr)))

    grid = np.linspace(-14, 14, 225)
    best = int(surprise(grid).argmin())
    if best == 0:
        return SignalNoise(0.0, total / freedom)
    if best == len(grid) - 1:
        return SignalNoise(float((seen / rate).mean()), 0.0)
    refined = minimize_scalar(
        surprise, bounds=(grid[best - 1], grid[best + 1]), method="bounded", options={"xatol": 1e-9}
    )
    level = float(noise(refined.x))
    return SignalNoise(float(np.exp(refined.x)) * level, level)


def signal_to_noise_from_errors(
    times: ArrayLike,
    law: Law | ArrayLike,
    *,
    test: ArrayLike | None = None,
    train: ArrayLike | None = None,
) -> SignalNoise:
    r"""Estimate signal and noise from measured error curves (T,), test or training error or both.

    Both are linear in the two variances, :math:`E(t) = S\,a(t) + \sigma_\epsilon^2\,c(t)` with
    :math:`S = \sigma_w^2 (1 + \mathrm{INR})`, so they are the non-negative least-squares solution
    (relative errors). ``law`` is alpha, or the spectrum of the inputs.

    >>> from pantarhei.learning.generalization.theory import train_error
    >>> t = np.array([0.1, 1.0, 10.0])
    >>> found = signal_to_noise_from_errors(t, 2.0, train=3.0 * train_error(t, 2.0, snr=6.0))
    >>> round(found.signal, 6), round(found.noise, 6)
    (3.0, 0.5)
    """
    from scipy.optimize import nnls

    t = _not_negative("times", times, infinite=True).reshape(-1)
    law = as_law(law, float(np.where(np.isinf(t), 0.0, t).max(initial=0.0)))
    rows, values = [], []
    for name, curve, terms in (("test", test, law.test), ("train", train, law.train)):
        if curve is None:
            continue
        measured = _positive(name, curve).reshape(-1)
        if len(measured) != len(t):
            raise RequestError(f"{name} has {len(measured)} errors for {len(t)} times.")
        signal, _, noise = terms(t)
        rows.append(np.stack([signal, noise], 1) / measured[:, None])
        values.append(np.ones(len(t)))
    if not rows or sum(map(len, values)) < 2:
        raise RequestError("two measured errors at least are needed: give test=, train= or both.")
    (signal, noise), _ = nnls(np.concatenate(rows), np.concatenate(values))
    return SignalNoise(float(signal), float(noise))


def time_of_steps(
    steps: ArrayLike,
    lr: ArrayLike,
    examples: int,
    loss: Loss = "mean",
    *,
    outputs: int = 1,
    batch_size: int | None = None,
    epochs: bool = False,
) -> Array:
    r"""Return the time :math:`t/\tau` after ``steps`` of gradient descent on raw inputs.

    :math:`t = \mathrm{lr} \cdot \mathrm{steps} \cdot f`, where the loss is :math:`f` times half the
    summed squared error of all P examples: ``"mean"`` (torch's MSELoss, also the mean over
    ``outputs``) has :math:`f = 2/(Pq)`, ``"half_mean"`` :math:`1/P`, ``"sum"`` 2, ``"half_sum"``
    (the paper's) 1. Minibatches of ``batch_size`` follow the same flow on average; for the sums
    only the batch is summed, so :math:`f` is B/P of that. With ``epochs`` the count is of passes
    over the data. Holds while lr is small against the stability limit :math:`2/(f l_+)`.

    >>> time_of_steps(1000, lr=0.1, examples=50), time_of_steps(3, 0.01, 50, "half_sum")
    (array(4.), array(0.03))
    """
    return np.asarray(
        _not_negative("steps", steps, infinite=True)
        * _per_step(lr, examples, loss, outputs, batch_size, epochs)
    )


def steps_of_time(
    t: ArrayLike,
    lr: ArrayLike,
    examples: int,
    loss: Loss = "mean",
    *,
    outputs: int = 1,
    batch_size: int | None = None,
    epochs: bool = False,
) -> Array:
    """Return how many steps (or epochs) take the time ``t``: :func:`time_of_steps` turned round."""
    return np.asarray(
        _not_negative("t", t, infinite=True)
        / _per_step(lr, examples, loss, outputs, batch_size, epochs)
    )


def _per_step(
    lr: ArrayLike, examples: int, loss: Loss, outputs: int, batch_size: int | None, epochs: bool
) -> Array:
    factors = {
        "mean": 2 / (examples * outputs),
        "half_mean": 1 / examples,
        "sum": 2.0,
        "half_sum": 1.0,
    }
    if loss not in factors:
        raise RequestError(f"Unknown loss '{loss}': choose {', '.join(factors)}.")
    batch = examples if batch_size is None else batch_size
    if not 1 <= batch <= examples:
        raise RequestError(f"batch_size={batch} does not fit {examples} examples.")
    factor = factors[loss] * (batch / examples if loss.endswith("sum") else 1.0)
    return np.asarray(_positive("lr", lr) * factor * (examples / batch if epochs else 1.0))


@dataclass(frozen=True, eq=False)
class Stopping:
    """When to stop a linear student of the data, and what to expect; from :func:`stopping_time`.

    ``time`` is the predicted best one in the paper's units (inputs of unit mean square norm; 0
    where the inputs explain nothing, infinity without noise), ``raw_time`` the same for the inputs
    as they came, ``steps`` that in steps of gradient descent (None without ``lr``), ``penalty`` the
    ridge penalty that does the same work (1/SNR, for the inputs as they came). ``alpha`` is
    examples over inputs. ``coef`` (N,) or (N, q) and ``intercept`` are the student stopped there,
    found without a step.
    """

    time: float
    raw_time: float
    steps: float | None
    signal: float
    noise: float
    inr: float
    penalty: float
    alpha: float
    scale: float
    law: FixedInputs
    coef: Array
    intercept: Array

    @property
    def snr(self) -> float:
        """Signal over noise."""
        return SignalNoise(self.signal, self.noise).snr

    def predict(self, inputs: ArrayLike) -> Array:
        """Return the stopped student's predictions for ``inputs`` (P, N)."""
        return np.asarray(_numbers("inputs", inputs) @ self.coef + self.intercept)

    def errors(self, t: ArrayLike) -> tuple[Array, Array]:
        """Return the expected (training, test) errors at times ``t``, in the targets' units²."""
        train, test = self.law.train(t), self.law.test(t)
        start = self.inr * self.signal

        def total(terms: tuple[Array, Array, Array]) -> Array:
            signal, initial, noise = terms
            return np.asarray(self.signal * signal + start * initial + self.noise * noise)

        return total(train), total(test)


def stopping_time(
    inputs: ArrayLike,
    targets: ArrayLike,
    *,
    covariance: ArrayLike | float | Literal["shrunk"] = "shrunk",
    snr: float | None = None,
    inr: float = 0.0,
    intercept: bool = True,
    lr: float | None = None,
    loss: Loss = "mean",
    batch_size: int | None = None,
) -> Stopping:
    r"""Predict from data when a linear model trained by gradient descent should stop.

    Signal and noise come from :func:`signal_to_noise`; the expected test error at these inputs
    (:class:`~.spectrum.FixedInputs`) is then minimised over time. No validation set is set aside
    and nothing is trained. It assumes a linear teacher alike in all directions: standardise the
    inputs, unless their scales mean something.

    Args:
        inputs: (P, N), an example a row; or the features of a frozen network.
        targets: (P,) or (P, q).
        covariance: Of the inputs to come, as in :class:`~.spectrum.FixedInputs` and in the units of
            ``inputs``. ``"shrunk"``: these inputs' own, shrunk towards the identity by the
            Ledoit-Wolf intensity; 0 predicts for new targets at the same inputs, 1 for inputs alike
            in all directions (the paper's).
        snr: The signal-to-noise ratio, where it is known.
        inr: Variance of the weights at which training will start, over the teacher's.
        intercept: Whether the model has one (it is taken as learnt at once).
        lr: Learning rate for ``steps``; one that would diverge is refused.
        loss: What gradient descent descends, as in :func:`time_of_steps`.
        batch_size: Of its batches; all examples by default.

    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.normal(size=(200, 100)), rng.normal(size=100)
    >>> y = x @ w + rng.normal(size=200) * 5
    >>> stop = stopping_time(x, y, lr=0.01)
    >>> round(stop.time, 1), round(stop.steps)
    (2.4, 243)
    >>> stop.predict(x).shape
    (200,)
    """
    x, y, scale, center, offset = _prepared(inputs, targets, intercept)
    law = FixedInputs(x / scale, _covariance(covariance, x, scale))
    along = _projected(law, x / scale, y)
    if snr is None:
        found = _likeliest(law, along, y, len(x) - intercept)
    else:
        ratio, total = float(_positive("snr", snr)), float((y**2).mean())
        found = SignalNoise(total * ratio / (1 + ratio), total / (1 + ratio))
    time = float(optimal_time(law, found.snr, inr)) if found.signal else 0.0
    raw_time = time / scale**2
    steps = None
    if lr is not None:
        outputs = along.shape[1]
        rate = float(_per_step(lr, len(x), loss, outputs, batch_size, False))
        largest = float(law.eigenvalues.max()) * scale**2
        stable = 2 / (rate * largest) * lr
        if lr >= stable:
            raise RequestError(
                f"lr={lr:g} diverges on these inputs: choose one below {stable:.3g}."
            )
        steps = raw_time / rate
    learnt = -np.expm1(-law.eigenvalues * time) / np.sqrt(law.eigenvalues)
    coef = (law.basis @ (learnt[:, None] * along) / scale).reshape(-1, *y.shape[1:])
    return Stopping(
        time=time,
        raw_time=raw_time,
        steps=steps,
        signal=found.signal,
        noise=found.noise,
        inr=inr,
        penalty=scale**2 * (np.inf if found.signal == 0 else found.noise / found.signal),
        alpha=float(law.alpha),
        scale=scale,
        law=law,
        coef=coef,
        intercept=offset - center @ coef,
    )


def _covariance(covariance: ArrayLike | float | str, x: Array, scale: float) -> ArrayLike | float:
    if isinstance(covariance, str):
        if covariance != "shrunk":
            raise RequestError(f"covariance is 'shrunk', a number or a matrix, not '{covariance}'.")
        from sklearn.covariance import ledoit_wolf_shrinkage

        return float(ledoit_wolf_shrinkage(x, assume_centered=True)) if x.shape[1] > 1 else 0.0
    if np.ndim(covariance) == 0:
        return float(np.asarray(covariance))
    return _numbers("covariance", covariance) / scale**2


def _prepared(
    inputs: ArrayLike, targets: ArrayLike, intercept: bool
) -> tuple[Array, Array, float, Array, Array]:
    """Return centred inputs and targets, the inputs' root mean square norm, and both means."""
    x, y = pair(inputs, targets)
    if len(x) < 3:
        raise RequestError(f"{len(x)} examples tell nothing about noise: give at least 3.")
    center, offset = x.mean(0) * intercept, y.mean(0) * intercept
    x, y = x - center, y - offset
    scale = float(np.sqrt((x**2).sum(1).mean()))
    if scale == 0:
        raise RequestError("inputs do not vary: there is nothing to learn from.")
    return x, y, scale, np.asarray(center), np.asarray(offset)
