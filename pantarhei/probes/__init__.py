"""Instruments for a network as it learns: curvature, tangent kernel, signal propagation.

Every instrument is called on a model, a loss and batches, ``loss(model, batch)`` being what
``pantarhei.fit`` takes, and leaves the model as it was. Names are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

# name: the module that defines it
_NAMES = {
    "Activation": "mean_field",
    "critical_gain": "mean_field",
    "critical_point": "mean_field",
    "susceptibilities": "mean_field",
    "GaussNewton": "curvature",
    "Density": "density",
    "Edge": "stability",
    "edge_of_stability": "stability",
    "Eigen": "eigen",
    "Hessian": "curvature",
    "Objective": "_objective",
    "Operator": "curvature",
    "Preconditioned": "curvature",
    "Probe": "watch",
    "Residual": "curvature",
    "Sharpness": "sharpness",
    "Trace": "trace",
    "Watch": "watch",
    "hutch_pp": "trace",
    "hutchinson": "trace",
    "lanczos": "eigen",
    "KernelDrift": "kernel_drift",
    "Propagation": "propagation",
    "TangentKernel": "tangent_kernel",
    "ntk": "tangent_kernel",
    "jacobian_singular_values": "signal",
    "layer_moments": "signal",
    "correlation_length": "signal",
    "product_spectrum": "signal",
    "learning_rates": "curvature",
    "power_iteration": "eigen",
    "spectral_density": "density",
    "step_curvature": "stability",
    "subset": "watch",
    "threshold": "stability",
    "preconditioner": "curvature",
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(_NAMES)
