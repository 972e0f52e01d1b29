"""Weights as distributions: ensembles of networks, their scores, and what mattered to them.

A forecast of a regression is a :class:`Predictive`: the mean and variance of every member, from
which follow the total variance, its aleatoric and epistemic parts, quantiles and scores.
"""

from pantarhei.bayes.attribution import integrated_gradients
from pantarhei.bayes.ensemble import Ensemble, fit_ensemble, perturbed
from pantarhei.bayes.gaussian import Gaussian, GaussianHead, beta_nll, gaussian_loss
from pantarhei.bayes.predictive import Predictive
from pantarhei.bayes.prior import Prior

__all__ = [
    "Ensemble",
    "Gaussian",
    "GaussianHead",
    "Predictive",
    "Prior",
    "beta_nll",
    "fit_ensemble",
    "gaussian_loss",
    "integrated_gradients",
    "perturbed",
]
