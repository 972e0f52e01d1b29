r"""Exact learning dynamics of deep linear networks (Saxe, McClelland and Ganguli, arXiv 1312.6120).

From the correlations of a data set and the initial weights to the learning curves, without
training::

    from pantarhei.learning import deep_linear as dl

    white, transform = dl.whiten(inputs)
    data = dl.Correlations.of(white, targets)
    predicted = dl.predict(data, net, tau=data.tau(lr=0.05, loss="mse"))  # time in steps
    predicted.time_to(0.5), predicted.order, predicted.stopping_time()

``closed_forms`` has the solutions mode by mode, ``flow`` the simulators on correlations alone,
``sweeps`` the experiments over depth and gain.
"""

from pantarhei.learning.deep_linear.closed_forms import (
    best_rate,
    chain,
    depth_curve,
    depth_time,
    hessian_eigenvalues,
    hyperbolic,
    hyperbolic_layers,
    hyperbolic_time,
    infinite_depth_curve,
    infinite_depth_time,
    logistic,
    logistic_time,
    stability_bound,
)
from pantarhei.learning.deep_linear.correlations import Correlations, Modes, whiten
from pantarhei.learning.deep_linear.flow import (
    DeepLinearNet,
    Trajectory,
    gradient_descent,
    gradient_flow,
    product,
    steps_to,
)
from pantarhei.learning.deep_linear.prediction import Prediction, predict, project, time_to

__all__ = [
    "Correlations",
    "DeepLinearNet",
    "Modes",
    "Prediction",
    "Trajectory",
    "best_rate",
    "chain",
    "depth_curve",
    "depth_time",
    "gradient_descent",
    "gradient_flow",
    "hessian_eigenvalues",
    "hyperbolic",
    "hyperbolic_layers",
    "hyperbolic_time",
    "infinite_depth_curve",
    "infinite_depth_time",
    "logistic",
    "logistic_time",
    "predict",
    "product",
    "project",
    "stability_bound",
    "steps_to",
    "time_to",
    "whiten",
]
