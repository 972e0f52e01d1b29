from __future__ import annotations

import pytest
import torch

from pantarhei.errors import RequestError
from pantarhei.systems.misalignment import displacement, explained, misalignment
from pantarhei.systems.sinenet import SineNet


@pytest.mark.parametrize("shift", [(0, 0), (5, -3), (-8, 8)])
def test_a_known_shift_is_found_through_any_mixing_of_channels(shift):
    torch.manual_seed(0)
    skip = torch.randn(2, 3, 32, 32)
    mixed = torch.einsum("bchw,dc->bdhw", skip, torch.randn(5, 3)) + 2
    moved = mixed.roll(shift, (2, 3))
    assert displacement(skip, moved).tolist() == [list(map(float, shift))] * 2
    aligned = skip.roll(shift, (2, 3))
    assert explained(aligned, moved) == pytest.approx(1, abs=1e-5)
    if shift != (0, 0):
        assert explained(skip, moved) < 0.1


def test_it_is_sought_within_bounds_and_on_one_axis_too():
    skip = torch.randn(1, 2, 64)
    assert displacement(skip, skip.roll(10, 2)).tolist() == [[10.0]]
    assert abs(displacement(skip, skip.roll(30, 2)).item()) <= 16
    with pytest.raises(RequestError, match="share of the domain"):
        misalignment(SineNet(1, 1, waves=1, width=4, levels=1), torch.zeros(1, 1, 8, 8), largest=2)


def test_every_skip_of_every_wave_is_measured_in_cells_of_the_full_grid():
    torch.manual_seed(0)
    net = SineNet(1, 1, waves=2, width=4, levels=2)
    found = misalignment(net, torch.randn(3, 1, 16, 16))
    assert [(one.wave, one.level) for one in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for one in found:
        assert one.displacement.shape == (3, 2) and one.distance >= 0
        assert (one.displacement % 2**one.level == 0).all()
        assert 0 <= one.explained <= 1 and 0 <= one.explained_shifted <= 1
    assert not any(stage._forward_pre_hooks for wave in net.waves for stage in wave.up)
