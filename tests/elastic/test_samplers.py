"""Samplers are data: deterministic, stateless, picklable; the losses are exact."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pantarhei.elastic import samplers
from pantarhei.elastic.space import Choice, Space
from pantarhei.errors import RequestError

SPACE = Space({"width": (0.25, 0.5, 0.75, 1.0), "depth": (1, 2, 3)})


def width_cost(choice):
    return choice["width"]


EVERY_KIND = [
    samplers.Uniform(SPACE, seed=3),
    samplers.PerAxis(SPACE, {"depth": (1, 0, 2)}, seed=3),
    samplers.by_cost(SPACE, width_cost, power=-1, seed=3),
    samplers.Sandwich(SPACE, k=2, seed=3),
    samplers.Cycle(SPACE.chain(3)),
    samplers.Every(SPACE),
    samplers.Progressive.evenly(SPACE, 100, order=("depth", "width"), seed=3),
]


@pytest.mark.parametrize("sampler", EVERY_KIND, ids=lambda s: type(s).__name__)
def test_a_draw_depends_on_seed_and_number_alone(sampler):
    in_order = [sampler(n) for n in range(50)]
    other = pickle.loads(pickle.dumps(sampler))
    assert [other(n) for n in reversed(range(50))] == in_order[::-1]
    drawn = [c for d in in_order for c in (d if isinstance(d, list) else [d])]
    assert all(c in SPACE for c in drawn)


def test_another_seed_draws_other_choices():
    one, two = samplers.Uniform(SPACE, 0), samplers.Uniform(SPACE, 1)
    assert [one(n) for n in range(50)] != [two(n) for n in range(50)]


def test_uniform_update_share_is_d_minus_u_plus_1_over_d():
    # SortedNet sheet, exact checks: unit u of d is updated in (d - u + 1) / d of the draws.
    d, draws = 8, 10_000
    sampler = samplers.Uniform(Space({"width": tuple(range(1, d + 1)), "depth": (1, 2)}), seed=0)
    drawn = torch.tensor([sampler(n)["width"] for n in range(draws)])
    for u in range(1, d + 1):
        expected = (d - u + 1) / d
        sigma = (expected * (1 - expected) / draws) ** 0.5
        assert abs((drawn >= u).float().mean() - expected) <= 4 * sigma


def test_uniform_is_uniform_over_the_grid_and_axes_are_independent():
    draws = 12_000
    counts = Counter(samplers.Uniform(SPACE, seed=5)(n) for n in range(draws))
    expected = draws / len(SPACE)
    chi2 = sum((counts[c] - expected) ** 2 / expected for c in SPACE)
    assert chi2 < 31.3  # 0.999 quantile of chi-square with 11 degrees of freedom


def test_uniform_needs_no_enumeration():
    huge = Space({f"a{i}": tuple(range(1, 9)) for i in range(40)})
    assert samplers.Uniform(huge)(3) in huge


def test_weights_by_cost_follow_the_power():
    sampler = samplers.by_cost(Space({"width": (0.25, 1.0)}), width_cost, power=1)
    share = sum(sampler(n)["width"] == 1.0 for n in range(5000)) / 5000
    assert abs(share - 0.8) < 4 * (0.8 * 0.2 / 5000) ** 0.5


def test_sandwich_holds_both_bounds_largest_first():
    for n in range(20):
        drawn = samplers.Sandwich(SPACE, k=3)(n)
        assert drawn[0] == SPACE.largest and drawn[-1] == SPACE.smallest and len(drawn) == 5


def test_progressive_starts_full_and_ends_with_everything_open():
    sampler = samplers.Progressive.evenly(SPACE, 600, order=("depth", "width"))
    assert {sampler(n) for n in range(100)} == {SPACE.largest}
    middle = {sampler(n) for n in range(210, 290)}
    assert {c["width"] for c in middle} == {1.0} and {c["depth"] for c in middle} == {1, 2, 3}
    assert {sampler(n) for n in range(600, 900)} == set(SPACE)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 400))
def test_progressive_only_opens(widths, depths, n):
    space = Space({"width": tuple(range(1, widths + 1)), "depth": tuple(range(1, depths + 1))})
    sampler = samplers.Progressive.evenly(space, 300)
    assert sampler(n) in space
    for now, later in pairwise((sampler.available(n), sampler.available(n + 1))):
        assert all(set(now[a]) <= set(later[a]) for a in space.axes)
    assert sampler.available(300) == space.axes


@pytest.mark.parametrize(
    "make",
    [
        lambda: samplers.PerAxis(SPACE, {"heads": (1,)}),
        lambda: samplers.PerAxis(SPACE, {"depth": (1, 1)}),
        lambda: samplers.PerAxis(SPACE, {"depth": (0, 0, 0)}),
        lambda: samplers.Weighted(SPACE.chain(2), (1, float("nan"))),
        lambda: samplers.by_cost(SPACE, lambda c: 0.0),
        lambda: samplers.by_cost(Space({str(i): (1, 2) for i in range(20)}), lambda c: 1.0),
        lambda: samplers.Cycle([]),
        lambda: samplers.Every([]),
        lambda: samplers.Progressive(SPACE, {"width": (10, 5, 20)}),
        lambda: samplers.Progressive(SPACE, {"nothing": (1,)}),
    ],
)
def test_bad_requests_are_refused_in_one_sentence(make):
    with pytest.raises(RequestError) as error:
        make()
    assert len(str(error.value)) > 20


class Sliced(torch.nn.Module):
    """A linear classifier that uses the first inputs only: the simplest elastic network."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 3)

    def forward(self, x, choice):
        keep = round(8 * choice["width"])
        return F.linear(x[:, :keep], self.linear.weight[:, :keep], self.linear.bias)


def batch(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 8, generator=generator), torch.arange(n) % 3


def gradient(loss, net, drawn):
    net.zero_grad()
    loss(net, drawn).backward()
    return net.linear.weight.grad.clone()


def test_summation_is_the_mean_of_single_gradients():
    net, data, choices = Sliced(), batch(), [Choice(width=w) for w in (0.25, 0.5, 1.0)]
    loss = samplers.SampledLoss()
    together = gradient(loss, net, (data, choices))
    alone = torch.stack([gradient(loss, net, (data, c)) for c in choices]).mean(0)
    torch.testing.assert_close(together, alone)


def test_gradient_is_zero_outside_the_drawn_prefix():
    grad = gradient(samplers.SampledLoss(), Sliced(), (batch(), Choice(width=0.5)))
    assert torch.count_nonzero(grad[:, 4:]) == 0 and torch.count_nonzero(grad[:, :4]) > 0


def test_distillation_teaches_the_rest_and_not_the_teacher():
    net, data = Sliced(), batch()
    large, small = Choice(width=1.0), Choice(width=0.25)
    loss = samplers.DistilledLoss()
    with torch.no_grad():
        taught, learnt = net(data[0], large), net(data[0], small)
    expected = F.cross_entropy(taught, data[1])
    expected = expected - (taught.softmax(-1) * learnt.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss(net, (data, [large, small])), expected / 2)
    # columns that only the teacher uses learn from the labels alone
    grad = gradient(loss, net, (data, [large, small]))
    hard = gradient(samplers.SampledLoss(), net, (data, large))
    torch.testing.assert_close(grad[:, 2:], hard[:, 2:] / 2)
    assert not torch.allclose(grad[:, :2], hard[:, :2] / 2)


def test_mappings_and_outputs_with_logits_are_read():
    class Named(Sliced):
        def forward(self, pixel_values, labels, choice):
            return {"logits": super().forward(pixel_values, choice)}

    net, (x, y) = Named(), batch()
    named = {"pixel_values": x, "labels": y}
    got = samplers.SampledLoss()(net, (named, Choice(width=0.5)))
    expected = F.cross_entropy(net(x, y, Choice(width=0.5))["logits"], y)
    torch.testing.assert_close(got, expected)
    with pytest.raises(RequestError, match="logits"):
        samplers.logits({"hidden": x})
    with pytest.raises(RequestError, match="labels"):
        samplers.labels([x])
