"""Forecasters that are told how far ahead to look."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.systems.forecaster import FieldForecaster
from pantarhei.systems.sinenet import SineNet


def moving(cases=24, frames=8, n=32, seed=0, **about):
    """Waves that move by two cells a frame: where they will be depends on the lead alone."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi, (2, cases, 1, 1))
    x = 2 * np.pi * (np.arange(n) - 2 * np.arange(frames)[:, None]) / n
    states = np.sin(x + phase[0]) + 0.5 * np.sin(2 * x + phase[1])
    return Trajectories.of(states[:, :, None].astype(np.float32), channels=("u",), **about)


class Shift(nn.Module):
    """The exact map of :func:`moving` by whole leads, whose parameters come before the lead."""

    def __init__(self, columns=1):
        super().__init__()
        self.own, self.columns, self.seen = nn.Parameter(torch.zeros(())), columns, []

    def forward(self, x, told, *mask):
        assert told.shape == (len(x), self.columns)
        self.seen.append((told, *mask))
        lead = told[:, -1].round().long()
        moved = [one.roll(2 * int(n), -1) for one, n in zip(x[:, -1:], lead, strict=True)]
        return torch.stack(moved) + self.own


def test_an_oracle_is_right_at_every_lead_and_step():
    data = moving()
    one = FieldForecaster.of(Shift(), data, range(18), history=1, given=("lead",))
    found = one.evaluate_leads(data, range(24), keep="all")
    assert found.steps == tuple(range(1, 8)) and found.blown == 0
    torch.testing.assert_close(found.kept, data.tensor()[:, 1:], atol=1e-5, rtol=1e-4)
    assert found.scores["relative_l2"].shape == (24, 7, 1)
    assert found.scores["relative_l2"].max() < 1e-4 < 0.5 < found.scores["correlation"].min()
    assert one.evaluate(data, range(24)).scores["relative_l2"].max() < 1e-4  # repeated steps
    some = one.evaluate_leads(data, [3, 20], [5, 2], keep="all")
    torch.testing.assert_close(some.kept, found.kept[[3, 20]][:, [4, 1]])
    start = data.tensor([7], 2, 3)
    chosen = one.forecast_leads(start, [1, 4.0])
    torch.testing.assert_close(chosen, data.tensor([7])[:, [3, 6]], atol=1e-5, rtol=1e-4)
    twice = one.forecast(start, 2, *one.told(data, [7], lead=2)).kept
    torch.testing.assert_close(twice, data.tensor([7])[:, [4, 6]], atol=1e-5, rtol=1e-4)


def test_the_lead_comes_after_the_cases_own_parameters_and_the_mask_stays_apart():
    data = moving(parameters=np.arange(24.0) + 5, mask=np.ones((24, 32), bool))
    given = ("mask", "lead", "parameters")
    one = FieldForecaster.of(Shift(columns=2), data, range(18), history=1, given=given)
    one.evaluate_leads(data, [4, 9], [3])
    told, mask = one.model.seen[-1]
    assert told.tolist() == [[9.0, 3.0], [14.0, 3.0]] and mask.shape == (2, 32)
    one.train(data, range(18), steps=2, batch_size=4, leads=2, quiet=True, device="cpu")
    told, _ = one.model.seen[-1]
    assert set(told[:, 1].tolist()) <= {1.0, 2.0} and (told[:, 0] >= 5).all()
    with pytest.raises(RequestError, match="is told mask, parameters beside the lead, and got par"):
        one.forecast_leads(data.tensor([0], 0, 1), [1], parameters=torch.ones(1, 1))


def trained(given, seed=0):
    data = moving()
    torch.manual_seed(seed)
    net = SineNet(1, 1, waves=1, width=8, levels=3, mult=1.5, padding="circular", space=1,
                  conditions=len(given))  # fmt: skip
    one = FieldForecaster.of(net, data, range(18), history=1, given=given)
    one.train(data, range(18), range(18, 20), steps=150, batch_size=32, lr=5e-3, leads=5,
              schedule="cosine", quiet=True, device="cpu")  # fmt: skip
    return one, data


def test_a_network_that_is_told_the_lead_beats_one_that_is_not(tmp_path):
    (told, data), (blind, _) = trained(("lead",)), trained(())
    held, aims = range(20, 24), range(1, 6)
    ours = told.evaluate_leads(data, held, aims)
    assert ours.mean("relative_l2") < 0.5 * blind.evaluate_leads(data, held, aims).mean(
        "relative_l2"
    )
    told.save(tmp_path / "one")
    again = FieldForecaster.load(tmp_path / "one")
    start = data.tensor(held, 0, 1)
    assert torch.equal(again.forecast_leads(start, [1, 3]), told.forecast_leads(start, [1, 3]))


def test_ragged_cases_are_compared_as_far_as_the_shortest_goes():
    data = dataclasses.replace(moving(cases=3), lengths=np.array([8, 4, 6]))
    one = FieldForecaster.of(Shift(), data, [0, 1, 2], history=2, given=("lead",))
    assert one.evaluate_leads(data, [0, 1]).steps == (1, 2)
    assert one.evaluate_leads(data, [0, 2]).steps == (1, 2, 3, 4)
    for wrong in ([0], [3], []):
        with pytest.raises(RequestError, match="Choose among 1 to 2"):
            one.evaluate_leads(data, [0, 1], wrong)


def test_what_blows_up_is_counted():
    data = moving(cases=2)
    one = FieldForecaster.of(Shift(), data, [0], history=1, given=("lead",))
    one.model.own.data.fill_(torch.nan)
    found = one.evaluate_leads(data, [0, 1], [2])
    assert found.blown == 2 and found.mean("relative_l2") == float("inf")
