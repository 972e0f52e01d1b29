r"""Width sweeps of ReLU students: random features by exact flow, both layers by gradient descent.

A student of width :math:`N_h` sees :math:`h = \mathrm{relu}(W_1 x)/\sqrt{N_h}` with random
:math:`W_1 \sim N(0, 1/N_i)`. With the first layer fixed it is a linear student of its features, and
the errors at every time follow from one singular value decomposition: nothing is stepped, and any
time, long or short, costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.learning.generalization.bounds import complexity, norm_cap

if TYPE_CHECKING:
    from pantarhei.progress import Progress

_NUMBERS = 2**27  # that the features of the seeds done at once may hold


class Task(NamedTuple):
    """Training and test data: inputs (..., P, N_i), targets (..., P, q), and the same for testing.

    ``noise`` is a variance to be added to the test error, for test targets that hold none.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    noise: float = 0.0

    def one(self, number: int) -> Task:
        """Return one of the data sets of a task that has several."""
        x, y, x_test, y_test = (part[number] for part in self[:4])
        return Task(x, y, x_test, y_test, self.noise)


def relu_teacher(
    seeds: int,
    examples: int = 300,
    snr: float = 10.0,
    *,
    inputs: int = 50,
    hidden: int = 30,
    tests: int = 2000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Task:
    r"""Return data of ``seeds`` two-layer ReLU teachers, each with examples of its own.

    :math:`y = \bar v \cdot \mathrm{relu}(\bar W x)` of normal inputs, standardised over each
    teacher's test inputs, plus noise of variance 1/SNR on the training targets; the test targets
    are free of noise, and the task says how much to add.

    >>> task = relu_teacher(2, examples=10, tests=20)
    >>> task.x.shape, task.y.shape, task.y_test.shape
    (torch.Size([2, 10, 50]), torch.Size([2, 10, 1]), torch.Size([2, 20, 1]))
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(seeds, *shape, generator=generator, dtype=dtype)

    x, x_test = normal(examples, inputs), normal(tests, inputs)
    first, second = normal(hidden, inputs) / math.sqrt(inputs), normal(hidden, 1)
    y, y_test = (torch.relu(part @ first.mT) @ second for part in (x, x_test))
    mean, std = y_test.mean(1, keepdim=True), y_test.std(1, keepdim=True)
    y = (y - mean) / std + normal(examples, 1) / math.sqrt(snr)
    return Task(x, y, x_test, (y_test - mean) / std, 1 / snr)


@dataclass(frozen=True, eq=False)
class WidthSweep:
    """Errors of students of several widths (W), several seeds (S), at several times (T).

    ``train`` and ``test`` are mean squared errors (W, S, T), ``norm`` the readout's (W, S, T);
    ``smallest`` (W, S) and ``rank`` (W, S) the smallest non-zero eigenvalue of the features' Gram
    matrix and their number, ``trace`` (W, S) its trace, ``targets_norm`` (S,) that of the training
    targets. ``spectra`` holds each width's eigenvalues (S, min(P, N_h)).
    """

    widths: tuple[int, ...]
    times: NDArray[np.float64]
    examples: int
    train: NDArray[np.float64]
    test: NDArray[np.float64]
    norm: NDArray[np.float64]
    smallest: NDArray[np.float64]
    rank: NDArray[np.int64]
    trace: NDArray[np.float64]
    targets_norm: NDArray[np.float64]
    spectra: tuple[NDArray[np.float64], ...]

    @property
    def best(self) -> NDArray[np.float64]:
        """The smallest test error over time (W, S)."""
        return np.asarray(self.test.min(-1))

    @property
    def final(self) -> NDArray[np.float64]:
        """The test error at the last time (W, S)."""
        return np.asarray(self.test[..., -1])

    @property
    def overtraining(self) -> NDArray[np.float64]:
        """What training to the end costs: E(T) - min over t of E(t), (W, S)."""
        return self.final - self.best

    @property
    def gap(self) -> NDArray[np.float64]:
        """Test minus training error at the last time (W, S)."""
        return self.final - np.asarray(self.train[..., -1])

    def bounds(self, weight_scale: float = 1.0) -> dict[str, NDArray[np.float64]]:
        """Return the complexity terms at the last time (W, S): plain, conditioned, capped.

        See :class:`~.bounds.Bounds`; the start is taken as 0 in the capped one.
        """
        allowed = weight_scale * np.sqrt(np.array(self.widths, dtype=np.float64))[:, None]
        cap = norm_cap(float(self.times[-1]), self.targets_norm, self.smallest)
        return {
            "plain": complexity(allowed, self.trace, self.examples),
            "conditioned": complexity(self.norm[..., -1], self.trace, self.examples),
            "capped": complexity(cap, self.trace, self.examples),
        }

    def rows(self) -> list[dict[str, float]]:
        """Return a row a width, medians over the seeds: near P features a mean means little."""
        columns = {
            "best": self.best,
            "final": self.final,
            "overtraining": self.overtraining,
            "train": self.train[..., -1],
            "gap": self.gap,
            "norm": self.norm[..., -1],
            "smallest eigenvalue": self.smallest,
            "rank": self.rank,
            **{f"{name} bound": values for name, values in self.bounds().items()},
        }
        found = {name: np.median(values, 1) for name, values in columns.items()}
        return [
            {"width": width, **{name: float(values[i]) for name, values in found.items()}}
            for i, width in enumerate(self.widths)
        ]


def width_sweep(
    task: Task,
    widths: Sequence[int],
    times: Sequence[float] | NDArray[np.float64],
    *,
    seeds: int | None = None,
    start: float = 0.0,
    center: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> WidthSweep:
    r"""Return the errors of random-feature students of every width at every time.

    Gradient flow on half the summed squared error from readout weights of variance ``start``:

    .. math:: v(t) = V\Big[(1 - e^{-\Lambda t})\,\Lambda^{-1/2} U^T y + e^{-\Lambda t} V^T v(0)\Big]
              + (1 - VV^T)\,v(0),\qquad H = U \Lambda^{1/2} V^T.

    Args:
        task: Data with a leading axis: each gets a first layer of its own. Data without one: the
            same data for ``seeds`` first layers.
        widths: Numbers of ReLUs.
        times: In units of that flow; features have norm of order 1.
        start: Variance of the initial readout weights.
        center: Subtract the features' training mean, which removes the one large outlier that a
            ReLU's positive mean puts into the spectrum.
        seed: Of the first layers.
        progress: Advanced by one for each width.

    >>> sweep = width_sweep(relu_teacher(2, 30, tests=50), [10, 30], [0.0, 1.0, 1e5])
    >>> sweep.test.shape, sweep.rank.tolist()
    ((2, 2, 3), [[10, 10], [30, 30]])
    """
    task, count = _batched(task, seeds)
    if not widths or min(widths) < 1:
        raise RequestError("widths must be positive numbers of hidden units: give at least one.")
    t = torch.as_tensor(np.asarray(times, dtype=np.float64).reshape(-1), device=device)
    if not len(t) or not bool((t >= 0).all()) or bool((t.diff() < 0).any()):
        raise RequestError("times must be at least one, not negative, and sorted.")
    found: list[dict[str, Tensor]] = []
    for number, width in enumerate(widths):
        size = task.x_test.shape[-2] * (width + task.y.shape[-1] * len(t))
        together = max(1, min(count, _NUMBERS // max(1, size)))
        parts = []
        for first in range(0, count, together):
            some = [part[first : first + together].to(device, torch.float64) for part in task[:4]]
            layers = _layers(range(first, first + len(some[0])), width, some[0].shape[-1], seed)
            h, h_test = (
                torch.relu(x @ layers.to(device).mT) / math.sqrt(width) for x in (some[0], some[2])
            )
            if center:
                mean = h.mean(1, keepdim=True)
                h, h_test = h - mean, h_test - mean
            generator = torch.Generator().manual_seed(_mixed(seed, number, first))
            v0 = math.sqrt(start) * torch.randn(
                len(h), width, some[1].shape[-1], generator=generator, dtype=torch.float64
            ).to(device)
            parts.append(_exact_flow(h, some[1], h_test, some[3], t, v0, task.noise))
        found.append({name: torch.cat([p[name] for p in parts]).cpu() for name in parts[0]})
        if progress is not None:
            progress.advance(note=f"width {width}")
    stacked: dict[str, Any] = {
        name: torch.stack([width[name] for width in found]).numpy()
        for name in ("train", "test", "norm", "smallest", "rank", "trace")
    }
    return WidthSweep(
        tuple(widths),
        t.cpu().numpy(),
        task.x.shape[-2],
        targets_norm=torch.linalg.vector_norm(task.y, dim=(1, 2)).cpu().double().numpy(),
        spectra=tuple(width["spectrum"].numpy() for width in found),
        **stacked,
    )


def _exact_flow(
    h: Tensor, y: Tensor, h_test: Tensor, y_test: Tensor, t: Tensor, v0: Tensor, noise: float
) -> dict[str, Tensor]:
    """Follow the flow of a batch of problems: features (S, P, W), targets (S, P, q)."""
    left, singular, right = torch.linalg.svd(h, full_matrices=False)
    eps = torch.finfo(h.dtype).eps
    there = singular > singular[:, :1] * max(h.shape[-2:]) * eps
    safe = torch.where(there, singular, 1.0)
    rate = torch.where(there, singular**2, 0.0)[..., None, None]  # (S, K, 1, 1)
    seen = left.mT @ y  # (S, K, q)
    begun = right @ v0
    unmoved = v0 - right.mT @ begun
    aim = torch.where(there[..., None], seen / safe[..., None], 0.0)[..., None]
    modes = -torch.expm1(-rate * t) * aim + torch.exp(-rate * t) * begun[..., None]  # (S, K, q, T)
    outputs = y.shape[-1]
    missed = seen[..., None] - singular[..., None, None] * modes
    unseen = (y**2).sum((1, 2)) - (seen**2).sum((1, 2))
    train = ((missed**2).sum((1, 2)) + unseen.clamp(min=0)[:, None]) / (y.shape[1] * outputs)
    predicted = (h_test @ right.mT) @ modes.flatten(2)  # (S, Q, qT)
    predicted = predicted.unflatten(2, (outputs, len(t))) + (h_test @ unmoved)[..., None]
    test = ((predicted - y_test[..., None]) ** 2).mean((1, 2)) + noise
    return {
        "train": train,
        "test": test,
        "norm": ((modes**2).sum((1, 2)) + (unmoved**2).sum((1, 2))[:, None]).sqrt(),
        "smallest": torch.where(there, singular, torch.inf).amin(1) ** 2,
        "rank": there.sum(1),
        "trace": (singular**2).sum(1),
        "spectrum": singular**2,
    }


def _batched(task: Task, seeds: int | None) -> tuple[Task, int]:
    """Return the task with a leading axis, and how long that is."""
    x, y, x_test, y_test = (torch.as_tensor(part) for part in task[:4])
    if y.dim() == x.dim() - 1:
        y, y_test = y[..., None], y_test[..., None]
    for name, inputs, targets in (("training", x, y), ("test", x_test, y_test)):
        if inputs.shape[:-1] != targets.shape[:-1] or inputs.dim() not in (2, 3):
            raise RequestError(
                f"the {name} inputs have shape {tuple(inputs.shape)} and the targets "
                f"{tuple(targets.shape)}: give a target for each example."
            )
        if not (inputs.isfinite().all() and targets.isfinite().all()):
            raise RequestError(f"the {name} data hold values that are not finite: remove them.")
    parts = [x, y, x_test, y_test]
    if x.dim() == 2:
        parts = [part.expand(seeds or 1, *part.shape) for part in parts]
    elif seeds not in (None, len(x)):
        raise RequestError(f"the task holds {len(x)} data sets: seeds={seeds} contradicts that.")
    return Task(parts[0], parts[1], parts[2], parts[3], task.noise), len(parts[0])


def _layers(numbers: range, width: int, inputs: int, seed: int) -> Tensor:
    """Return first layers (S, W, N_i), each from its own number."""
    return torch.stack(
        [
            torch.randn(
                width,
                inputs,
                generator=torch.Generator().manual_seed(_mixed(seed, width, number)),
                dtype=torch.float64,
            )
            / math.sqrt(inputs)
            for number in numbers
        ]
    )


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class TwoLayer(nn.Module):
    r"""The student whose two layers are both trained.

    :math:`V\,\mathrm{relu}(W_1 x/\sqrt{N_i})/\sqrt{N_h}` with :math:`W_1 \sim N(0, 1)` and
    :math:`V = 0` at the start: the random features of :func:`width_sweep`, with both layers' rates
    independent of the width and of the number of inputs.

    >>> TwoLayer(3, 8, 2)(torch.ones(5, 3)).abs().max().item()
    0.0
    """

    def __init__(self, inputs: int, width: int, outputs: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width, bias=False)
        self.readout = nn.Linear(width, outputs, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(math.sqrt(inputs) * _layers(range(1), width, inputs, seed)[0])
            self.readout.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return predictions (..., q)."""
        return self.readout(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Return the features (..., N_h)."""
        size = math.sqrt(self.first.in_features * self.first.out_features)
        return torch.relu(self.first(x)) / size


class Course(NamedTuple):
    """Errors of one training: ``steps`` (T,), ``train`` and ``test`` (T,)."""

    steps: NDArray[np.int64]
    train: NDArray[np.float64]
    test: NDArray[np.float64]
    model: nn.Module

    @property
    def overtraining(self) -> float:
        """What training to the end costs: E(T) - min over t of E(t)."""
        return float(self.test[-1] - self.test.min())


def train_both_layers(
    task: Task,
    width: int,
    steps: int,
    *,
    lr: float | None = None,
    points: int = 60,
    seed: int = 0,
    device: str | torch.device = "cpu",
    quiet: bool = True,
) -> Course:
    r"""Train both layers of a ReLU student by full-batch gradient descent.

    The loss is the mean squared error. Errors are measured at ``points`` steps spaced evenly in
    their logarithm. ``lr`` is by default a quarter of the stability limit of the first moment,
    :math:`\frac14 \cdot 2/l_{\max}` with :math:`l_{\max}` that of :math:`\frac{2}{Pq} H H^T`.

    >>> course = train_both_layers(relu_teacher(1, 20, tests=30).one(0), 4, steps=20)
    >>> bool(course.train[-1] < course.train[0])
    True
    """
    from pantarhei.fit import fit

    batched, count = _batched(task, None)
    if count != 1:
        raise RequestError("train_both_layers trains on one data set: give it without an axis.")
    x, y, x_test, y_test = (part[0].to(device, torch.float32) for part in batched[:4])
    model = TwoLayer(x.shape[1], width, y.shape[1], seed).to(device)
    if lr is None:
        largest = torch.linalg.matrix_norm(model.hidden(x).detach(), 2) ** 2 * 2 / y.numel()
        lr = float(0.5 / largest)
    wanted = set(np.unique(np.geomspace(1, steps, points).round().astype(int)).tolist())

    def errors(model: nn.Module) -> tuple[float, float]:
        with torch.no_grad():
            return tuple(  # type: ignore[return-value]
                float(((model(a) - b) ** 2).mean()) for a, b in ((x, y), (x_test, y_test))
            )

    seen = [(0, *errors(model))]

    def watch(step: Any) -> None:
        if step.number in wanted:
            seen.append((step.number, *errors(step.model)))

    fit(
        model,
        lambda n: (x, y),
        lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean(),
        steps=steps,
        optimizer=torch.optim.SGD,
        lr=lr,
        seed=seed,
        precision="32",
        device=device,
        quiet=quiet,
        label=f"width {width}",
        on_step=watch,
        log_every=steps,
    )
    numbers, train, test = (np.array(column) for column in zip(*seen, strict=True))
    return Course(numbers, train, test + task.noise, model)
