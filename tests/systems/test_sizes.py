"""Widths solved for a budget, against counting every width."""

from __future__ import annotations

import pytest
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.systems.dilated_resnet import DilatedResNet
from pantarhei.systems.fno import FNO
from pantarhei.systems.sizes import weight_count, width_for

BUILDERS = {
    "dil-resnet": lambda width: DilatedResNet(2, 1, width, blocks=1),
    "fno": lambda width: FNO(2, 1, width, modes=3, layers=2),
    "linear": lambda width: nn.Linear(9, width),
}


@pytest.mark.parametrize("budget", [900, 5_000, 20_001])
@pytest.mark.parametrize("name", BUILDERS)
def test_the_width_is_the_nearest_of_all(name, budget):
    build = BUILDERS[name]
    found = width_for(budget, build)
    gaps = {w: abs(weight_count(build(w)) - budget) for w in range(1, found + 3)}
    assert gaps[found] == min(gaps.values())


def test_weights_are_real_numbers_that_are_trained():
    net = FNO(3, 2, width=4, modes=5, layers=2, hidden=7)
    spectral, pointwise = 2 * 2 * (2 * 4 * 4 * 5 * 5), 2 * (4 * 4 + 4)
    ends = (3 * 4 + 4) + (4 * 7 + 7) + (7 * 2 + 2)
    assert weight_count(net) == spectral + pointwise + ends
    net.lift.requires_grad_(False)
    assert weight_count(net) == spectral + pointwise + ends - (3 * 4 + 4)


def test_a_budget_that_nothing_reaches():
    with pytest.raises(RequestError, match="has 10 weights: a budget of 3"):
        width_for(3, BUILDERS["linear"])
