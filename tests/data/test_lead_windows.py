"""Windows whose target lies a drawn lead ahead: the draws' distribution, and what is in them."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from pantarhei.data.trajectories import Trajectories
from pantarhei.data.windows import Statistics, Windows, draw_leads
from pantarhei.errors import RequestError

LENGTHS = np.array([3, 9, 5, 7])


def shares(n, longest):
    """P(start, lead) within n frames, by adding up the definition."""
    found = {}
    for end in range(1, n):
        starts = range(max(0, end - longest), end)
        whole = sum(Fraction(1, s + 1) for s in starts)
        for s in starts:
            found[s, end - s] = Fraction(1, s + 1) / whole / (n - 1)
    assert sum(found.values()) == 1
    return found


@pytest.mark.parametrize("longest", [1, 3, 20])
def test_starts_and_leads_are_drawn_as_the_equation_says(longest):
    generator = torch.Generator().manual_seed(0)
    draws = 40_000
    frames = torch.tensor([2, 6, 9]).repeat_interleave(draws)
    start, lead = draw_leads(generator, frames, longest)
    for n in (2, 6, 9):
        own = frames == n
        expected = shares(n, longest)
        seen = {}
        for pair in zip(start[own].tolist(), lead[own].tolist(), strict=True):
            seen[pair] = seen.get(pair, 0) + 1
        assert set(seen) <= set(expected)
        for pair, share in expected.items():
            p = float(share)
            sd = (draws * p * (1 - p)) ** 0.5
            assert abs(seen.get(pair, 0) - draws * p) <= 4 * sd, (n, pair)


def ragged():
    """Frame t of case i holds 100 i + t, everywhere; the parameter is i."""
    case, time = np.arange(4)[:, None], np.arange(9)
    states = np.broadcast_to((100.0 * case + time)[:, :, None, None], (4, 9, 1, 6))
    data = Trajectories.of(states, parameters=np.arange(4.0), mask=np.ones((4, 6), bool))
    return dataclasses.replace(data, lengths=LENGTHS)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("history", [1, 2])
def test_the_target_is_the_frame_at_the_lead_and_never_beyond_the_case(in_memory, history):
    windows = Windows(ragged(), [3, 0, 1], history=history, batch_size=6, leads=5,
                      given=("parameters", "mask", "lead"), in_memory=in_memory)  # fmt: skip
    assert len(windows) == int((LENGTHS[[3, 0, 1]] - history).sum()) // 6
    leads, cases = [], []
    for n in range(40):
        past, target, told, mask = windows(n)
        assert past.shape == (6, history, 1, 6) and target.shape == (6, 1, 1, 6)
        assert told.shape == (6, 2) and mask.shape == (6, 6)
        case, lead = told.T.long()
        when = past[:, :, 0, 0] - 100 * case[:, None]
        assert torch.equal(target[:, 0, 0, 0] - past[:, -1, 0, 0], lead.float())
        assert (when >= 0).all() and torch.equal(when.diff(dim=1), torch.ones(6, history - 1))
        assert (when[:, -1] + lead < torch.from_numpy(LENGTHS)[case]).all()
        leads += lead.tolist()
        cases += case.tolist()
    assert set(leads) == set(range(1, 6)) and set(cases) == {0, 1, 3}
    again = Windows(ragged(), [3, 0, 1], history=history, batch_size=6, leads=5,
                    given=("lead",), in_memory=in_memory)  # fmt: skip
    assert torch.equal(again(39)[0], past) and torch.equal(again(39)[2][:, 0].long(), lead)


def test_an_epoch_has_each_case_as_often_as_it_has_frames_to_forecast():
    windows = Windows(ragged(), range(4), history=1, batch_size=20, leads=8, given=("parameters",))
    assert len(windows) == 1 and LENGTHS.sum() - 4 == 20
    for n in range(3):
        counts = torch.bincount(windows(n)[2][:, 0].long())
        assert counts.tolist() == (LENGTHS - 1).tolist()


def test_states_are_normalised_and_leads_are_not():
    data = ragged()
    statistics = Statistics.of(data, [1])
    past, target, lead = Windows(
        data, [1], history=1, batch_size=8, leads=8, given=("lead",), statistics=statistics
    )(0)
    gap = statistics.restore(target) - statistics.restore(past)
    torch.testing.assert_close(gap[:, 0, 0, 0], lead[:, 0], rtol=1e-4, atol=1e-3)


def test_wrong_leads_are_one_sentence():
    for wrong, sentence in (
        ({"leads": 0}, "1 or more"),
        ({"leads": 2, "horizon": 2}, "the horizon beside it 1"),
        ({"given": ("lead",)}, "how long it may be"),
    ):
        with pytest.raises(RequestError, match=sentence):
            Windows(ragged(), [1], history=1, batch_size=1, **wrong)
