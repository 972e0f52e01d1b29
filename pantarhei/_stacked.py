"""One network with many sets of weights, run at once: what ensembles and sweeps train on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pantarhei._fit_loss import Loss, scalar

# What running a network under vmap raises where it cannot run so.
UNSTACKABLE = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError)


def call_members(
    module: nn.Module, tensors: Mapping[str, Tensor], *args: Any, in_dims: Any = None
) -> Any:
    """Call ``module`` on ``args`` with each of the stacked weights and buffers, (M, ...) each.

    ``in_dims`` says, for each argument as ``vmap`` does, which dimension goes over the members;
    all members get the same where it is None. What comes back has the members first.
    """

    def one(tensors: Mapping[str, Tensor], *args: Any) -> Any:
        return functional_call(module, dict(tensors), args)

    dims = (0, *(in_dims or (None,) * len(args)))
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no batching rule
        return vmap(one, dims, randomness="different")(dict(tensors), *args)


class WithLoss(nn.Module):
    """``loss(model, batch)`` as a module, so that a functional call replaces the weights in it."""

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Any) -> Tensor:
        """Return the loss."""
        return scalar(self.loss(self.model, batch))
