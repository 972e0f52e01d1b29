from __future__ import annotations

import numpy as np
import pytest
import torch

from pantarhei.data.simulate.translation import Translation
from pantarhei.errors import RequestError


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (16, 3), (5, -7)])
def test_a_whole_shift_is_a_roll(dx, dy):
    found = Translation(size=32, shift_x=dx, shift_y=dy, decay=0.9, frames=4).simulate([0, 5])
    states = found.tensor()[:, :, 0]
    assert found.shape == (2, 4, 1, 32, 32) and found.channels == ("u",)
    for t in range(3):
        moved = 0.9 * torch.roll(states[:, t], (dy, dx), (1, 2))
        torch.testing.assert_close(states[:, t + 1], moved, atol=1e-5, rtol=0)
    torch.testing.assert_close(states[:, 0].std((1, 2), False), torch.ones(2))


def test_half_a_shift_twice_is_a_shift():
    half = Translation(shift_x=0.5, decay=0.9**0.5, frames=3).simulate([3]).tensor()
    whole = Translation(shift_x=1.0, decay=0.9, frames=2).simulate([3]).tensor()
    torch.testing.assert_close(half[:, ::2], whole, atol=1e-5, rtol=0)


def test_a_case_is_itself_in_any_company():
    one = Translation(size=16)
    alone = one.simulate([7], seed=1).frames(0)
    np.testing.assert_array_equal(alone, one.simulate([3, 7], seed=1).frames(1))
    assert not np.array_equal(alone, one.simulate([7], seed=2).frames(0))
    spectrum = np.abs(np.fft.fft2(alone[0, 0]))
    k = np.abs(np.fft.fftfreq(16, 1 / 16))
    assert spectrum[np.hypot(k[:, None], k) > 4.01].max() < 1e-3


@pytest.mark.parametrize("wrong", [{"size": 2}, {"waves": 16}, {"frames": 0}])
def test_wrong_settings(wrong):
    with pytest.raises(RequestError, match="at least 4 cells"):
        Translation(**wrong)
