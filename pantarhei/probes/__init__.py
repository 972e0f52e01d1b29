"""Instruments for a network as it learns: curvature, tangent kernel, signal propagation.

An instrument that needs the loss is called on a model, a loss and batches, ``loss(model, batch)``
being what ``pantarhei.fit`` takes; one that needs the outputs alone, on a model and its inputs. All
leave the model as it was. :class:`Watch` attaches any of them to a training. Names are imported
when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pantarhei.probes._objective import Objective as Objective
    from pantarhei.probes.curvature import GaussNewton as GaussNewton
    from pantarhei.probes.curvature import Hessian as Hessian
    from pantarhei.probes.curvature import Operator as Operator
    from pantarhei.probes.curvature import Preconditioned as Preconditioned
    from pantarhei.probes.curvature import Residual as Residual
    from pantarhei.probes.curvature import learning_rates as learning_rates
    from pantarhei.probes.curvature import preconditioner as preconditioner
    from pantarhei.probes.density import Density as Density
    from pantarhei.probes.density import spectral_density as spectral_density
    from pantarhei.probes.eigen import Eigen as Eigen
    from pantarhei.probes.eigen import lanczos as lanczos
    from pantarhei.probes.eigen import power_iteration as power_iteration
    from pantarhei.probes.kernel_drift import KernelDrift as KernelDrift
    from pantarhei.probes.mean_field import Activation as Activation
    from pantarhei.probes.mean_field import critical_gain as critical_gain
    from pantarhei.probes.mean_field import critical_point as critical_point
    from pantarhei.probes.mean_field import susceptibilities as susceptibilities
    from pantarhei.probes.propagation import Propagation as Propagation
    from pantarhei.probes.sharpness import Sharpness as Sharpness
    from pantarhei.probes.signal import correlation_length as correlation_length
    from pantarhei.probes.signal import jacobian_singular_values as jacobian_singular_values
    from pantarhei.probes.signal import layer_moments as layer_moments
    from pantarhei.probes.signal import product_spectrum as product_spectrum
    from pantarhei.probes.stability import Edge as Edge
    from pantarhei.probes.stability import edge_of_stability as edge_of_stability
    from pantarhei.probes.stability import step_curvature as step_curvature
    from pantarhei.probes.stability import threshold as threshold
    from pantarhei.probes.tangent_kernel import TangentKernel as TangentKernel
    from pantarhei.probes.tangent_kernel import ntk as ntk
    from pantarhei.probes.trace import Trace as Trace
    from pantarhei.probes.trace import hutch_pp as hutch_pp
    from pantarhei.probes.trace import hutchinson as hutchinson
    from pantarhei.probes.watch import Probe as Probe
    from pantarhei.probes.watch import Watch as Watch
    from pantarhei.probes.watch import subset as subset

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
