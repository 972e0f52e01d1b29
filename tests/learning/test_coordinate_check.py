"""Coordinate checks: the slopes that theory gives, on width and on depth; what fails is named."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.learning.coordinate_check import coord_check
from pantarhei.learning.families import Networks, Transformers
from pantarhei.learning.lr_transfer import power_law
from pantarhei.learning.parametrization import parametrize
from pantarhei.probes.tangent_kernel import ntk

G = torch.Generator().manual_seed(0)
X = torch.randn(32, 8, generator=G)
Y = torch.randint(4, (32,), generator=G)
WIDTHS = (64, 256, 1024)


def batches(n):
    return X, Y


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def check(factory=None, **changes):
    family = factory or Networks(inputs=8, outputs=4, activation=nn.Tanh)
    settings = {"widths": WIDTHS, "lr": 0.1, "seeds": 4, "steps": 3}
    if isinstance(family, Networks):
        settings["roles"] = family.roles
    return coord_check(family, batches, loss, **{**settings, **changes})


HIDDEN = ("blocks.0.1", "blocks.1.1", "head")


def test_mup_with_sgd_moves_every_layer_alike():
    found = check(lr=1.0)
    assert [layer.name for layer in found.layers] == [*HIDDEN, "output"]
    for layer in found.layers:
        assert abs(layer.change[0]) < 0.1, layer
    for name in HIDDEN:
        assert abs(found.layer(name).initial[0]) < 0.05
    assert found.layer("output").initial[0] == pytest.approx(-0.5, abs=0.12)
    assert found.passes


def test_ntp_with_sgd_is_lazy():
    found = check(kind="ntp", lr=1.0)
    for name in HIDDEN:
        assert found.layer(name).change[0] == pytest.approx(-0.5, abs=0.1)
        assert abs(found.layer(name).initial[0]) < 0.05
    assert abs(found.layer("output").change[0]) < 0.15
    assert abs(found.layer("output").initial[0]) < 0.15
    assert not found.passes
    assert all("no feature learning" in p for p in found.problems) and len(found.problems) == 3


def test_standard_parametrisation_blows_up():
    found = check(kind="sp", lr=0.1)
    assert found.layer("output").change[0] > 0.5
    assert any("output grows" in problem for problem in found.problems)


@pytest.mark.parametrize("optimizer", ("adam", "adamw"))
def test_adam(optimizer):
    mup = check(optimizer=optimizer, lr=0.01)
    assert mup.passes and max(abs(layer.change[0]) for layer in mup.layers) < 0.15
    ntp = check(optimizer=optimizer, kind="ntp", lr=0.02)
    for name in HIDDEN:
        assert ntp.layer(name).change[0] == pytest.approx(-0.5, abs=0.1)
    assert abs(ntp.layer("output").change[0]) < 0.15
    assert not check(optimizer=optimizer, kind="sp", lr=0.01).passes


def test_a_model_with_a_base_passes_and_the_same_rates_without_mup_do_not():
    class ConvNet(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv1d(1, width, 3, padding=1), nn.Tanh(), nn.Conv1d(width, width, 3, padding=1)
            )
            self.norm, self.head = nn.GroupNorm(1, width), nn.Linear(width, 4)

        def forward(self, x):
            return self.head(self.norm(self.body(x[:, None])).mean(2))

    widths = (8, 32, 128)
    assert check(ConvNet, widths=widths, optimizer="adam", lr=0.005).passes
    assert not check(ConvNet, widths=widths, optimizer="adam", lr=0.005, kind="sp").passes


@pytest.mark.parametrize("architecture", ("gpt2", "bert"))
def test_transformers_pass_under_mup(architecture):
    """Heads grow, embeddings are tied; a width is a multiple of the number of heads."""
    pytest.importorskip("transformers")
    positions = {"gpt2": "n_positions", "bert": "max_position_embeddings"}[architecture]
    family = Transformers(architecture, heads=2, config={"vocab_size": 16, positions: 8})
    ids = torch.randint(16, (8, 8), generator=torch.Generator().manual_seed(0))

    def next_token(model, batch):
        logits = model(batch).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    found = {
        kind: coord_check(
            functools.partial(family, depth=1), lambda n: ids, next_token, widths=(16, 64, 256),
            kind=kind, optimizer="adam", lr=0.004, seeds=2, tolerance=0.25,
        )
        for kind in ("mup", "sp")
    }  # fmt: skip
    assert found["mup"].passes, found["mup"].problems
    assert found["sp"].layer("output").change[0] > found["mup"].layer("output").change[0] + 0.3


@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
def test_depth(optimizer):
    family = Networks(inputs=8, outputs=4, skip=True, activation=nn.Tanh)
    depths = (4, 16, 64)
    lr = {"sgd": 0.5, "adam": 0.01}[optimizer]
    settings = {
        "widths": (64,), "depths": depths, "optimizer": optimizer, "lr": lr, "seeds": 3,
        "branches": family.branches,
    }  # fmt: skip
    found = check(family, kind="depth-mup", **settings)
    assert "head" in {layer.name for layer in found.layers}
    assert found.passes, found.problems
    plain = check(family, kind="mup", **settings)
    assert not plain.passes
    assert plain.layer("head").change[0] > 0.5


def test_the_last_block_is_compared_by_its_place():
    family = Networks(inputs=8, outputs=4, skip=True)
    found = check(
        family, widths=(16,), depths=(2, 4, 8), kind="depth-mup", branches=family.branches
    )
    names = [layer.name for layer in found.layers]
    assert names == ["blocks.0.1", "blocks.-1.1", "head", "output"]


def test_signals_stay_bounded_in_depth_under_depth_mup_alone():
    """ReLU, N(0, 1/N): the variance grows by 1 + 1/(2L) a block, to e^(1/2); else 1.5^L."""
    family = Networks(inputs=8, outputs=4, skip=True)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def growth(depth, kind):
        ratios = []
        for seed in range(6):
            torch.manual_seed(seed)
            model = family(256, depth)
            parametrize(model, roles=family.roles, kind=kind, branches=family.branches)
            h = first = model.stem(x)
            for block in model.blocks:
                h = h + block(h)
            ratios.append(float(h.var() / first.var()))
        return np.mean(ratios)

    bounded = [growth(depth, "depth-mup") for depth in (2, 8, 32)]
    for depth, value in zip((2, 8, 32), bounded, strict=True):
        assert value == pytest.approx((1 + 1 / (2 * depth)) ** depth, rel=0.1)
    assert bounded[-1] < 1.1 * np.exp(0.5)
    assert growth(8, "mup") == pytest.approx(1.5**8, rel=0.15)
    assert growth(32, "mup") > 1e5


@pytest.mark.parametrize("kind", ("mup", "ntp"))
def test_the_kernel_moves_under_mup_and_stays_under_ntp(kind):
    family = Networks(inputs=8, outputs=1, activation=nn.Tanh)
    y = torch.randn(32, 1, generator=torch.Generator().manual_seed(1))
    moved = []
    for width in WIDTHS:
        changes = []
        for seed in range(3):
            torch.manual_seed(seed)
            start = parametrize(family(width), roles=family.roles, kind=kind)
            rates = {name: s.lr for name, s in start.scalings.items()}
            before = ntk(start.model, X, kind=0, rates=rates)
            optimizer = start.optimizer(0.5)
            for _ in range(20):
                optimizer.zero_grad()
                (0.5 * (start.model(X) - y).square().mean()).backward()
                optimizer.step()
            change = ntk(start.model, X, kind=0, rates=rates) - before
            changes.append(float(change.norm() / before.norm()))
        moved.append(np.mean(changes))
    slope = power_law(WIDTHS, moved)[1]
    if kind == "mup":
        assert abs(slope) < 0.15 and moved[-1] > 0.05
    else:
        assert slope < -0.4 and moved[-1] < 0.5 * moved[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"widths": (8, 16)}, "three sizes"),
        ({"widths": (8, 16, 32), "depths": (1, 2)}, "one axis"),
        ({"widths": ()}, "no size"),
    ],
)
def test_bad_requests_are_one_sentence(changes, sentence):
    with pytest.raises(RequestError, match=sentence):
        check(**changes)
