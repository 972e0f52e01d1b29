"""Instruments for a network as it learns: curvature, tangent kernel, signal propagation.

An instrument that needs the loss is called on a model, a loss and batches, ``loss(model, batch)``
being what ``pantarhei.fit`` takes; one that needs the outputs alone, on a model and its inputs. All
leave the model as it was. :class:`Watch` attaches any of them to a training. Names are imported
when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# name: the module that defines it
_NAMES = {
    "Objective": "_objective",
    "GaussNewton": "curvature",
    "Hessian": "curvature",
    "Operator": "curvature",
    "Preconditioned": "curvature",
    "Residual": "curvature",
    "learning_rates": "curvature",
    "preconditioner": "curvature",
    "Eigen": "eigen",
    "lanczos": "eigen",
    "power_iteration": "eigen",
    "Trace": "trace",
    "hutch_pp": "trace",
    "hutchinson": "trace",
    "Density": "density",
    "spectral_density": "density",
    "Edge": "stability",
    "edge_of_stability": "stability",
    "step_curvature": "stability",
    "threshold": "stability",
    "Probe": "watch",
    "Watch": "watch",
    "subset": "watch",
    "Sharpness": "sharpness",
    "KernelDrift": "kernel_drift",
    "Propagation": "propagation",
    "TangentKernel": "tangent_kernel",
    "ntk": "tangent_kernel",
    "correlation_length": "signal",
    "jacobian_singular_values": "signal",
    "layer_moments": "signal",
    "product_spectrum": "signal",
    "Activation": "mean_field",
    "critical_gain": "mean_field",
    "critical_point": "mean_field",
    "susceptibilities": "mean_field",
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(_NAMES)
