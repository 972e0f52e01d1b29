"""Sweeps: together and alone, divergence, resuming; optima, regrets, verdicts; consistency."""

from __future__ import annotations

import functools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.files import read_json
from pantarhei.learning import lr_transfer
from pantarhei.learning.families import Networks, Transformers
from pantarhei.learning.lr_transfer import Size, Sweep, best_rate, consistency, lr_sweep, power_law
from pantarhei.learning.parametrization import lazy, random_features

torch.manual_seed(0)
X, Y = torch.randn(96, 5).double(), torch.randint(3, (96,))


def batches(n):
    rows = slice(16 * (n % 6), 16 * (n % 6 + 1))
    return X[rows], Y[rows]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]), {"rows": float(len(batch[1]))}


def mlp(width, depth=1):
    family = Networks(inputs=5, outputs=3, activation=nn.Tanh)
    return family(width, depth).double()


class Normed(nn.Module):
    """Dropout off, batch norm on, a frozen parameter: what a stack must carry along."""

    def __init__(self, width):
        super().__init__()
        self.stem, self.norm = nn.Linear(5, width), nn.BatchNorm1d(width)
        self.shift = nn.Parameter(torch.randn(width), requires_grad=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.stem(x)) + self.shift))


def sweep(factory=mlp, **changes):
    settings = {"widths": (4, 8), "grid": (0.1, 0.4, 1.6), "steps": 12, "seeds": 2, "quiet": True}
    return lr_sweep(factory, batches, cross_entropy, **{**settings, **changes})


@pytest.mark.parametrize("kind", ("mup", "ntp"))
@pytest.mark.parametrize(
    "training",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.03, "grid": (0.02, 0.1)},
        {"optimizer": "adam", "weight_decay": 0.03, "grid": (0.01, 0.1)},
        {"optimizer": "adamw", "weight_decay": 0.3, "betas": (0.8, 0.99), "grid": (0.01, 0.1)},
    ],
)
def test_together_is_one_by_one(kind, training):
    evaluate = [batches(0), batches(3)]
    found = [sweep(kind=kind, evaluate=evaluate, together=way, **training) for way in (True, False)]
    losses = [s.losses() for s in found]
    assert np.isfinite(losses[0]).all() and losses[0].std() > 1e-3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
    for one, two in zip(found[0].rows, found[1].rows, strict=True):
        assert one["steps"] == two["steps"]
        np.testing.assert_allclose(one["curve"], two["curve"], rtol=1e-9)


@pytest.mark.parametrize("control", [None, random_features, functools.partial(lazy, scale=10.0)])
def test_together_is_one_by_one_with_buffers_and_controls(control):
    def factory(width):
        return Normed(width).double()

    found = [
        sweep(factory, control=control, evaluate=[batches(1)], together=way).losses()
        for way in (True, False)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)


@pytest.mark.filterwarnings("error")
def test_a_transformer_trains_together():
    pytest.importorskip("transformers")
    family = Transformers("gpt2", heads=2, config={"vocab_size": 8, "n_positions": 6})
    ids = torch.randint(8, (4, 6), generator=torch.Generator().manual_seed(0))

    def next_token(model, batch):
        return F.cross_entropy(model(batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    found = [
        lr_sweep(
            family, lambda n: ids, next_token, widths=(8, 16), depths=(2,), grid=(0.003, 0.03),
            steps=3, seeds=1, kind="depth-mup", optimizer="adam", quiet=True, together=way,
        ).losses()
        for way in (True, False)
    ]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_depth_is_swept_with_its_branches():
    family = Networks(inputs=5, outputs=3, skip=True)

    def factory(depth):
        return family(8, depth).double()

    factory.branches = family.branches
    for kind in ("depth-mup", "mup"):
        found = [
            sweep(factory, widths=(), depths=(1, 4), kind=kind, together=way).losses()
            for way in (True, False)
        ]
        np.testing.assert_allclose(found[0], found[1], rtol=1e-9)
    both = sweep(lambda width, depth: family(width, depth).double(), depths=(1, 2))
    assert [str(size) for size in both.sizes][::3] == ["width 4, depth 1", "width 8, depth 2"]


@pytest.mark.parametrize("together", (True, False))
def test_divergence_is_missing_and_early(together):
    """Gradient descent on a quadratic diverges iff eta > 2/lambda; here lambda is 4."""

    class Point(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.w = nn.Parameter(torch.ones(width, dtype=torch.float64))

        def forward(self):
            return self.w

    found = lr_sweep(
        Point, lambda n: n, lambda model, _: 2 * model().square().sum(),
        widths=(3,), grid=(0.49, 0.51, 1.0, 1e200), steps=60, roles={"w": "fixed"}, seeds=1,
        together=together, quiet=True, limit=3.0,
    )  # fmt: skip
    losses = found.losses()[0, :, 0]
    assert np.isfinite(losses[0]) and np.isnan(losses[1:]).all()
    steps = [row["steps"] for row in found.rows]
    assert steps[0] == 60 and steps[2] == 2 and steps[3] == 2 and 2 < steps[1] < 30
    best = found.optima()[0]
    assert best.lr == 0.49 and best.at_edge
    assert found.regret(1) == (math.inf,)


def test_a_training_that_ends_above_its_start_is_missing():
    found = sweep(grid=(0.1, 60.0), limit=1e9, steps=30, kind="sp")
    assert np.isnan(found.losses()[:, 1]).all() and np.isfinite(found.losses()[:, 0]).all()


def test_what_cannot_run_together_runs_alone_and_says_so():
    class Branching(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.head = nn.Linear(5, width).double(), nn.Linear(width, 3).double()

        def forward(self, x):
            h = self.stem(x)
            return self.head(h if h.sum().item() > 0 else -h)

    with pytest.warns(UserWarning, match="one by one"):
        found = sweep(Branching)
    alone = sweep(Branching, together=False)
    assert np.array_equal(found.losses(), alone.losses())
    with pytest.raises(RequestError, match="leave together out"):
        sweep(Branching, together=True)


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    file = tmp_path / "sweep.json"
    whole = sweep()
    calls = []
    train = lr_transfer.train_together

    def dies(starts, grid, plan):
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(starts, grid, plan)

    monkeypatch.setattr(lr_transfer, "train_together", dies)
    with pytest.raises(KeyboardInterrupt):
        sweep(checkpoint=file)
    assert {row["width"] for row in read_json(file)["rows"]} == {4}
    resumed = sweep(checkpoint=file)
    assert len(calls) == 3
    assert resumed.to_json() == whole.to_json()
    assert sweep(checkpoint=file).to_json() == whole.to_json() and len(calls) == 3
    assert Sweep.from_json(json.loads(file.read_text())).transfer() == whole.transfer()
    with pytest.raises(RequestError, match="another settings"):
        sweep(checkpoint=file, steps=13)
    with pytest.raises(RequestError, match="another grid"):
        sweep(checkpoint=file, grid=(0.1, 0.4))


def test_neither_the_random_state_nor_the_data_order_depends_on_the_sweep():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = sweep()
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(8)
    assert sweep().to_json() == first.to_json()
    losses = first.losses()
    assert (losses[:, :, 0] != losses[:, :, 1]).all()


def made(table, grid=(0.5, 1.0, 2.0, 4.0), widths=(8, 16, 32)):
    rows = [
        {"width": n, "depth": None, "lr": lr, "seed": 0, "loss": loss}
        for n, losses in zip(widths, table, strict=True)
        for lr, loss in zip(grid, losses, strict=True)
    ]
    return Sweep(tuple(Size(n, None) for n in widths), grid, 1, {}, rows)


def test_the_parabola_finds_the_vertex_exactly():
    logs = np.array([-1.0, 0.0, 1.0, 3.0])
    best = best_rate(Size(8, None), 2.0**logs, 0.5 + (logs - 0.3) ** 2)
    assert best.vertex == pytest.approx(0.3) and best.index == 1
    missing = best_rate(Size(8, None), 2.0**logs, [0.3, 0.2, math.nan, 0.4])
    assert missing.vertex == 0.0 and not missing.at_edge
    none = best_rate(Size(8, None), 2.0**logs, [math.nan] * 4)
    assert none.lr is None and none.index is None


@pytest.mark.parametrize(
    ("table", "verdict", "word"),
    [
        ([[3, 2, 3, 4], [3, 1.9, 2, 4], [3, 1.8, 1.79, 4]], "transfers", "costs at most 0.6 %"),
        ([[3, 2, 3, 4], [3, 1.9, 2, 4], [3, 1.9, 1.79, 4]], "does not transfer", "costs 6.1 %"),
        ([[3, 2, 3, 4], [3, 2, 2, 1.99], [3, 2, 1, 1.5]], "does not transfer", "factor of 2^2"),
        ([[3, 2, 3, 4], [3, 2, 3, 4], [3, None, 3, 4]], "does not transfer", "diverged"),
        ([[3, 2, 3, 4], [3, 2, 3, 4], [None] * 4], "does not transfer", "every rate"),
        ([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]], "cannot tell", "grid's last"),
        ([[None] * 4, [1, 2, 3, 4], [1, 2, 3, 4]], "cannot tell", "every rate diverged"),
        ([[2, 1, 3, 4], [2, 1, 3, 4], [1, 1.01, 3, 4]], "cannot tell", "width 32"),
    ],
)
def test_the_verdict(table, verdict, word):
    found = made(table).transfer()
    assert found.verdict == verdict and word in found.reason
    json.dumps(found.to_json(), allow_nan=False)


def test_regret_shift_and_exponent():
    found = made([[3, 2, 3, 4], [5, 4, 3, 4], [9, 8, 7, 5]]).transfer()
    assert found.shift == (0.0, 1.0, 2.0)
    assert found.regret == pytest.approx((0.0, 4 / 3 - 1, 8 / 5 - 1))
    grid = tuple(2.0**k for k in range(-3, 6))
    rates = [
        [(math.log2(lr) - 1.5 * math.log2(n / 8)) ** 2 + 1 for lr in grid] for n in (8, 16, 32)
    ]
    a, error = made(rates, grid).transfer().exponent
    assert a == pytest.approx(1.5) and error == pytest.approx(0.0, abs=1e-9)


def test_power_laws():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    a, p, error = power_law([*x, 0.0], [*(3 * x**-0.5), 1.0])
    assert (a, p, error) == pytest.approx((3, -0.5, 0), abs=1e-9)
    from scipy import stats

    rng = np.random.default_rng(0)
    noisy = x**0.7 * np.exp(0.1 * rng.normal(size=4))
    other = stats.linregress(np.log(x), np.log(noisy))
    assert power_law(x, noisy)[1:] == pytest.approx((other.slope, other.stderr))
    assert math.isnan(power_law([1, 1], [2, 3])[1]) and math.isnan(power_law([1, 2], [2, 3])[2])


def test_consistency_tells_growing_from_constant_errors():
    sizes, times = np.array([64, 128, 256, 512]), np.arange(1, 50.0)
    rng = np.random.default_rng(1)
    wiggle = 1 + 0.02 * rng.normal(size=(4, 3, 49))
    curve = 2 + np.sin(times / 9)
    constant = consistency(sizes, times, curve * (1 + 8 / sizes)[:, None, None] * wiggle)
    assert constant.super_consistent and abs(constant.in_time[1]) < 0.3
    grows = consistency(sizes, times, curve * (1 + 4 / sizes[:, None] * times**0.5))
    assert not grows.super_consistent
    late = consistency(sizes, times, curve * (1 + 1e-4 / sizes[:, None] * times**0.5))
    assert late.in_time[1] == pytest.approx(0.5, abs=1e-3)
    level = 1 + 8 / sizes
    np.testing.assert_allclose(
        consistency(sizes, times, curve * level[:, None]).cv, level.std() / level.mean()
    )
    shuffled = consistency(sizes[::-1], times, (curve * level[:, None])[::-1])
    np.testing.assert_allclose(shuffled.spread, level[0] / level[-1])
    json.dumps(grows.to_json(), allow_nan=False)
    for bad in (np.ones((3, 49)), np.full((4, 49), np.nan)):
        with pytest.raises(RequestError, match="curve"):
            consistency(sizes, times, bad)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"widths": ()}, "widths= or depths="),
        ({"widths": (8, 4)}, "ascending"),
        ({"grid": (1.0,)}, "ascending positive rates"),
        ({"grid": (0.0, 1.0)}, "ascending positive rates"),
        ({"seeds": 0}, "seeds=0"),
        ({"steps": 0}, "steps=0"),
        ({"depths": (2, 4), "kind": "depth-mup"}, "residual branches"),
        ({"factory": lambda size: mlp(size)}, "cannot be called with width=4"),
        ({"factory": lambda width: "net"}, "returned str"),
    ],
)
def test_bad_requests_are_one_sentence(changes, sentence):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match=sentence):
            sweep(**changes)
