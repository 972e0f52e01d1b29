"""The directions of a network's weights that its training data move, and those they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.probes._objective import Loss, bare
from pantarhei.probes._outputs import Outputs, calls
from pantarhei.probes.tangent_kernel import matrix, ntk


@dataclass(frozen=True)
class Movement:
    """How far weights moved, inside and outside the directions that the data reach (norms)."""

    inside: float
    outside: float

    @property
    def share_outside(self) -> float:
        """The part of the squared movement that lies outside, 0 for weights that did not move."""
        total = self.inside**2 + self.outside**2
        return self.outside**2 / total if total else 0.0


class DataSubspace:
    r"""The span of a network's Jacobian on its training data, at its present weights.

    Linearised, :math:`f_\theta(x) \approx f_{\theta_0}(x) + J(x)\,(\theta - \theta_0)`, gradient
    descent moves the weights only within the span of the rows of :math:`J` (an output of an example
    is a row), whatever the loss. For a model that is linear in its trainable weights this is exact;
    for others the movement outside tells how far training has left the linear regime.

    The eigenvalues are those of the tangent kernel :math:`J J^T`
    (:func:`~pantarhei.probes.tangent_kernel.ntk`); projections take one product with :math:`J` and
    one with its transpose, so the Jacobian is never held.

    Args:
        model, loss, batches, parameters, dtype: As for every instrument
            (:class:`~pantarhei.probes._objective.Objective`); double precision by default. The loss
            calls the model once, and its outputs have a row for each example.
        memory: Bytes that computing the kernel may take at a time.
        tolerance: Eigenvalues below this share of the largest count as zero; default
            rows x machine precision.

    Attributes:
        rank: Number of directions that data reach.
        size: Number of trainable weights; ``size - rank`` directions are frozen.
        eigenvalues: (rank,), largest first, of :math:`J J^T`: the rates at which gradient flow on
            half the summed squared error learns.
        smallest: The last of them; its inverse is the time after which noise is fitted.

    >>> net = nn.Linear(5, 1, bias=False).double()
    >>> x, y = torch.randn(3, 5).double(), torch.randn(3, 1).double()
    >>> space = DataSubspace(net, lambda m, b: ((m(b[0]) - b[1]) ** 2).mean(), (x, y))
    >>> space.rank, space.size
    (3, 5)
    >>> frozen = space.outside(torch.ones(5).double())
    >>> bool((x @ frozen).abs().max() < 1e-12)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *batches: Any,
        parameters: Callable[[str, nn.Parameter], bool] | None = None,
        dtype: torch.dtype | None = torch.float64,
        memory: int = 2**30,
        tolerance: float | None = None,
    ) -> None:
        call = calls(model, loss, *batches)
        outputs = Outputs(model, call, parameters=parameters, dtype=dtype)
        self.objective = outputs.objective
        self.size = self.objective.size
        self._start = self.objective.vector()

        def network(vector: Tensor) -> Tensor:
            return outputs(self.objective.unflatten(vector)).reshape(-1)

        self._network = network
        value, self._pull, *_ = torch.func.vjp(network, self._start)
        gram = matrix(ntk(model, call, parameters=parameters, dtype=dtype, memory=memory))
        eigenvalues, vectors = torch.linalg.eigh(gram)
        share = tolerance or len(value) * torch.finfo(gram.dtype).eps
        there = eigenvalues > eigenvalues[-1] * share
        if not there.any():
            raise RequestError("the outputs do not depend on the weights here: nothing can move.")
        self.eigenvalues = eigenvalues[there].flip(0)
        self._vectors = vectors[:, there].flip(1)
        self.rank = len(self.eigenvalues)
        self.smallest = float(self.eigenvalues[-1])

    def inside(self, vector: Tensor) -> Tensor:
        r"""Project a vector (size,) on the directions that data reach: :math:`J^+ J` of it."""
        vector = vector.to(self._start)
        if vector.shape != self._start.shape:
            raise RequestError(
                f"a vector of shape {tuple(vector.shape)} does not fit the {self.size} weights."
            )
        seen = torch.func.jvp(self._network, (self._start,), (vector,))[1]
        solved = self._vectors @ ((self._vectors.T @ seen) / self.eigenvalues)
        (found,) = self._pull(solved)
        return found.detach()

    def outside(self, vector: Tensor) -> Tensor:
        """Return the part of a vector (size,) that no training example reaches."""
        return vector.to(self._start) - self.inside(vector)

    def movement(self, model: nn.Module) -> Movement:
        """Return how ``model``, trained meanwhile, moved from the weights this was made at."""
        now = {
            name: p.detach().to(self._start)
            for name, p in bare(model).named_parameters()
            if name in self.objective.params
        }
        if missing := set(self.objective.names) - set(now):
            raise RequestError(f"the model has no parameter '{min(missing)}': give the same one.")
        moved = self.objective.flatten(now) - self._start
        inside = self.inside(moved)
        return Movement(float(inside.norm()), float((moved - inside).norm()))

    def features(self) -> Tensor:
        """Return inputs (rows, rank) of a linear student that learns as the linearised network.

        They have the Jacobian's Gram matrix; ``stopping_time(space.features(), y - f0,
        intercept=False)`` predicts when the linearised network should stop.
        """
        return self._vectors * self.eigenvalues.sqrt()
