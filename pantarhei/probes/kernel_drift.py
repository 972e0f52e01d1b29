"""The movement of the tangent kernel, as a probe to attach to a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pantarhei.errors import RequestError
from pantarhei.probes._objective import Loss
from pantarhei.probes._outputs import Read, calls
from pantarhei.probes.tangent_kernel import (
    GivenRates,
    Kind,
    Parameters,
    alignment,
    drift,
    eigenvalues,
    kernel_distance,
    ntk,
    varies,
)


class KernelDrift:
    r"""How far the tangent kernel has moved since the first call: how much features are learnt.

    Called on a model, a loss and batches it takes the kernel on the inputs that the loss calls the
    model with, and returns

    ``kernel_drift``, ``kernel_distance``
        :func:`drift` and centred :func:`kernel_distance` from the kernel of the first call: make
        that call before training, ``watch.record(model, 0)``;
    ``kernel_top``
        its largest eigenvalue over the number of inputs: the largest curvature of a mean of
        squared errors, and what bounds the learning rate;
    ``kernel_rank``
        :math:`(\mathrm{tr}\,\Theta)^2 / \lVert\Theta\rVert_F^2`, the number of directions that
        share the kernel;
    ``kernel_alignment``
        :func:`alignment` with the labels, where these are given. It and ``kernel_distance`` are
        left out of the row of a network that does not tell its inputs apart.

    A row costs one kernel, see :func:`ntk`: n forward and n o backward passes, or n of each with
    ``kind="pseudo"``. What was measured first is part of the state that a resumed watch finds.

    Args:
        kind, rates, parameters, read, dtype: As for :func:`ntk`, with ``"trace"`` as the default.
        inputs: What to measure on, rather than what the loss calls the model with.
        labels: ``labels(batch)`` returns the labels of a batch.

    >>> drifting, net = KernelDrift(labels=lambda batch: batch[1]), nn.Linear(2, 1)
    >>> batch = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [0.0]])
    >>> row = drifting(net, lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), batch)
    >>> sorted(row)
    ['kernel_alignment', 'kernel_distance', 'kernel_drift', 'kernel_rank', 'kernel_top']
    >>> row["kernel_drift"], round(row["kernel_top"], 3)  # [[6, 3], [3, 2]] / 2
    (0.0, 3.803)
    """

    def __init__(
        self,
        *,
        kind: Kind | int = "trace",
        inputs: Any = None,
        labels: Callable[[Any], Tensor] | None = None,
        rates: GivenRates | None = None,
        parameters: Parameters | None = None,
        read: Read | None = None,
        dtype: torch.dtype | None = None,
    ):
        if kind == "diagonal":
            raise RequestError("kind='diagonal' is a kernel for each output: choose one of them.")
        self.inputs, self.labels = inputs, labels
        self._options: dict[str, Any] = {
            "kind": kind, "rates": rates, "parameters": parameters, "read": read, "dtype": dtype
        }  # fmt: skip
        self._start: Tensor | None = None

    def __call__(self, model: nn.Module, loss: Loss, *batches: Any) -> dict[str, float]:
        """Measure at the model's weights now."""
        inputs = calls(model, loss, *batches) if self.inputs is None else self.inputs
        kernel = ntk(model, inputs, **self._options)
        start = self._start = kernel if self._start is None else self._start.to(kernel)
        values = eigenvalues(kernel)
        row = {
            "kernel_drift": float(drift(kernel, start)),
            "kernel_top": float(values[0]) / len(kernel),
            "kernel_rank": float(values.sum() ** 2 / values.square().sum()),
        }
        if not (varies(kernel) and varies(start)):
            return row
        row["kernel_distance"] = float(kernel_distance(kernel, start, centred=True))
        if self.labels is not None:
            labels = torch.cat([self.labels(batch) for batch in batches]).to(kernel.device)
            row["kernel_alignment"] = float(alignment(kernel, labels))
        return row

    def state_dict(self) -> dict[str, Tensor]:
        """Return the first kernel."""
        return {} if self._start is None else {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the first kernel of an earlier session."""
        self._start = state["start"]
