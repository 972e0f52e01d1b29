"""High-dimensional dynamics of generalisation error: train and test error along gradient flow.

What each part is for:

- :mod:`.theory`: error curves, best stopping time, ridge, for alpha = P/N, SNR and INR;
- :mod:`.spectrum`: the laws under them: Marchenko-Pastur, your own inputs, any covariance;
- :mod:`.estimate`: ``stopping_time(X, y)`` and what it rests on, steps against time;
- :mod:`.flow`: the weights themselves without a step, also of deep linear students;
- :mod:`.random_features`: sweeps over the width of ReLU students;
- :mod:`.frozen`: the directions of any network that its training data leave alone;
- :mod:`.bounds`: complexity terms beside the true gap.

Advani and Saxe, arXiv 1710.03667 (journal version with Sompolinsky, Neural Networks 132, 2020).
"""

from pantarhei.learning.generalization.estimate import (
    SignalNoise,
    Stopping,
    signal_to_noise,
    signal_to_noise_from_errors,
    steps_of_time,
    stopping_time,
    time_of_steps,
)
from pantarhei.learning.generalization.flow import deep_flow, flow
from pantarhei.learning.generalization.spectrum import (
    FixedInputs,
    Spectrum,
    Terms,
    marchenko_pastur_density,
)
from pantarhei.learning.generalization.theory import (
    Parts,
    decompose,
    mode_errors,
    mode_time,
    optimal_time,
    ridge_error,
    test_error,
    train_error,
)

__all__ = [
    "FixedInputs",
    "Parts",
    "SignalNoise",
    "Spectrum",
    "Stopping",
    "Terms",
    "decompose",
    "deep_flow",
    "flow",
    "marchenko_pastur_density",
    "mode_errors",
    "mode_time",
    "optimal_time",
    "ridge_error",
    "signal_to_noise",
    "signal_to_noise_from_errors",
    "steps_of_time",
    "stopping_time",
    "test_error",
    "time_of_steps",
    "train_error",
]
