"""Forecasts of sensor series with their uncertainty: networks, baselines, alarms, sensors."""

from pantarhei.systems.series.alarms import alarm_table, event_leads, onset_auc, onsets
from pantarhei.systems.series.baselines import linear, persistence, recurrent
from pantarhei.systems.series.encoder import Encoder
from pantarhei.systems.series.forecaster import (
    Forecaster,
    Stream,
    convolutional,
    train_forecaster,
)
from pantarhei.systems.series.scoring import bootstrap_by_run, lead_curve, score
from pantarhei.systems.series.sensors import ablate, attribute, break_sensor

__all__ = [
    "Encoder",
    "Forecaster",
    "Stream",
    "ablate",
    "alarm_table",
    "attribute",
    "bootstrap_by_run",
    "break_sensor",
    "convolutional",
    "event_leads",
    "lead_curve",
    "linear",
    "onset_auc",
    "onsets",
    "persistence",
    "recurrent",
    "score",
    "train_forecaster",
]
