"""A network as a space of sub-networks: axes, choices, views, extraction, exits, frontier, search.

``pantarhei.elastic`` is this package and, called, its main function:
``pantarhei.elastic(model, example_inputs, width=(0.5, 1.0))``.
"""

from __future__ import annotations

from pantarhei.elastic.exits import (
    Adaptive,
    Confidence,
    Entropy,
    Gate,
    Patience,
    PooledHead,
    calibrate,
)
from pantarhei.elastic.frontier import Frontier, accuracy, frontier
from pantarhei.elastic.net import ElasticNet, Sized, elastic
from pantarhei.elastic.space import Choice, Space
from pantarhei.elastic.store import load, save

__all__ = [
    "Adaptive",
    "Choice",
    "Confidence",
    "ElasticNet",
    "Entropy",
    "Frontier",
    "Gate",
    "Patience",
    "PooledHead",
    "Sized",
    "Space",
    "accuracy",
    "calibrate",
    "elastic",
    "frontier",
    "load",
    "save",
]
