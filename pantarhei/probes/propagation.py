"""Signal propagation, as a probe to attach to a training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pantarhei.errors import RequestError
from pantarhei.probes._objective import Loss
from pantarhei.probes._outputs import Read, calls
from pantarhei.probes.signal import (
    Layers,
    jacobian_singular_values,
    layer_moments,
    share_in_band,
    weighted_or_active,
)


class Propagation:
    r"""How large signals and gradients are in each layer, and the input-output Jacobian.

    Called on a model, a loss and batches it returns, for each layer,

    ``forward_<layer>``, ``backward_<layer>``, ``zeros_<layer>``
        the second moments of its output and of the loss's gradient there, and the share of outputs
        that are exactly zero (:func:`layer_moments`);

    and of the Jacobians of the first ``inputs`` inputs (none with 0), all their singular values,

    ``jacobian_largest``, ``jacobian_median``, ``jacobian_smallest``, ``jacobian_in_band``
        means over the inputs; the last is the share of the values in ``band``.

    A row costs a forward and a backward pass, and one backward pass of ``inputs`` inputs for each
    output.

    Args:
        layers: ``layers(name, module)`` says which; default those with weights, and
            activations that are modules.
        inputs: How many inputs the Jacobians are taken of.
        band: Of singular values that count as neither vanishing nor exploding.
        wrt, read: As for :func:`input_jacobian`.
        dtype: Work on copies in this precision.

    >>> net = nn.Sequential(nn.Linear(3, 3, bias=False))
    >>> _ = nn.init.orthogonal_(net[0].weight)
    >>> row = Propagation()(net, lambda m, b: m(b).sum(), torch.ones(2, 3))
    >>> round(row["forward_0"], 3), row["backward_0"], round(row["jacobian_smallest"], 3)
    (1.0, 1.0, 1.0)
    """

    def __init__(
        self,
        *,
        layers: Layers | None = None,
        inputs: int = 16,
        band: tuple[float, float] = (0.1, 10.0),
        wrt: int | str | None = None,
        read: Read | None = None,
        dtype: torch.dtype | None = None,
    ):
        if inputs < 0:
            raise RequestError(f"inputs={inputs}: choose how many, or 0 for no Jacobian.")
        self.layers, self.inputs, self.band = layers or weighted_or_active, inputs, band
        self._options: dict[str, Any] = {"wrt": wrt, "read": read, "dtype": dtype}

    def __call__(self, model: nn.Module, loss: Loss, *batches: Any) -> dict[str, float]:
        """Measure at the model's weights now."""
        dtype = self._options["dtype"]
        row: dict[str, float] = {}
        for m in layer_moments(model, loss, *batches, layers=self.layers, dtype=dtype):
            row |= {
                f"forward_{m.layer}": m.forward,
                f"backward_{m.layer}": m.backward,
                f"zeros_{m.layer}": m.zeros,
            }
        if self.inputs:
            call = pytree.tree_map_only(
                Tensor, lambda t: t[: self.inputs], calls(model, loss, *batches)
            )
            values = jacobian_singular_values(model, call, **self._options)
            row |= {
                "jacobian_largest": float(values[:, 0].mean()),
                "jacobian_median": float(values.median(1).values.mean()),
                "jacobian_smallest": float(values[:, -1].mean()),
                "jacobian_in_band": float(share_in_band(values, *self.band).mean()),
            }
        return row
