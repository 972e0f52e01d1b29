"""SortedNet's exact checks: reach, share, accumulation, summation, and the linear closed form."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pantarhei.compute.sorted_training import sorted_fit, touched_only
from pantarhei.data import load
from pantarhei.elastic.net import elastic
from pantarhei.elastic.samplers import Cycle, DistilledLoss, SampledLoss, Sandwich
from pantarhei.elastic.space import Choice
from pantarhei.errors import RequestError
from pantarhei.fit import Batches

WIDTHS = (0.25, 0.5, 0.75, 1.0)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = (
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Residual(nn.Module):
    """A residual MLP: stem, blocks, norm, head."""

    def __init__(self, width=8, depth=3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(6, width), nn.Linear(width, 3)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x))))


def grid(model=None, **kwargs):
    return elastic(model or Residual(), torch.zeros(1, 6), width=WIDTHS, depth=(1, 2, 3), **kwargs)


def data(n=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def gradients(net, drawn, loss=None):
    net.zero_grad(set_to_none=True)
    (loss or SampledLoss())(net, drawn).backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in net.model.named_parameters()
    }


# --- the sheet's exact checks ------------------------------------------------------------------


@pytest.mark.parametrize("choice", [Choice(width=0.25, depth=3), Choice(width=0.75, depth=1)])
def test_gradient_reaches_the_drawn_prefix_and_nothing_else(choice):
    net = grid()
    grads = gradients(net, (data(), choice))
    kept = round(8 * choice["width"])
    assert torch.count_nonzero(grads["stem.weight"][kept:]) == 0
    assert torch.count_nonzero(grads["head.weight"][:, kept:]) == 0
    assert torch.count_nonzero(grads["stem.weight"][:kept]) > 0
    for k in range(3):
        own = grads[f"blocks.{k}.down.weight"]
        assert torch.count_nonzero(own[kept:]) == 0 and torch.count_nonzero(own[:, kept:]) == 0
        assert (torch.count_nonzero(own) > 0) == (k < choice["depth"])
    # inside, it is the gradient of the extracted network
    plain = grid().extract(choice)
    F.cross_entropy(plain(data()[0]), data()[1]).backward()
    torch.testing.assert_close(grads["stem.weight"][:kept], plain.stem.weight.grad)
    torch.testing.assert_close(grads["head.weight"][:, :kept], plain.head.weight.grad)


def test_summation_is_the_mean_of_single_gradients():
    net = grid()
    together = gradients(net, (data(), list(net.space)))
    single = [gradients(net, (data(), choice)) for choice in net.space]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.stack([g[name] for g in single]).mean(0))


def test_summation_over_depths_is_the_loss_of_one_pass():
    """SoFT (Sorted LLaMA): every depth reads the one pass through the shared norm and head."""
    (x, y), deep = data(), Residual(depth=5)
    net = elastic(Residual(depth=5), x[:1], depth=(1, 2, 3, 4, 5))
    summed = gradients(net, ((x, y), list(net.space)))
    hidden, losses = deep.stem(x), []
    for block in deep.blocks:
        hidden = block(hidden)
        losses.append(F.cross_entropy(deep.head(deep.norm(hidden)), y))
    torch.stack(losses).mean().backward()
    for name, p in deep.named_parameters():
        torch.testing.assert_close(summed[name], p.grad)


def test_accumulating_shards_of_one_choice_is_the_large_batch():
    x, y = data(32)
    choice = Choice(width=0.5, depth=2)
    shards = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)]
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.5), "steps": 1, "quiet": True}
    one, two = grid(), grid()
    sorted_fit(one, lambda n: shards[n % 4], sampler=Cycle([choice]), g_acc=4, **sgd)
    sorted_fit(two, lambda n: (x, y), sampler=Cycle([choice]), **sgd)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(one.model.stem.weight, grid().model.stem.weight)


def test_smaller_choices_are_nested_in_storage_and_cheaper():
    net = grid()
    stem = net.model.stem.weight
    for small in net.space:
        for large in net.space:
            if not small <= large:
                continue
            assert net.cost(small).macs <= net.cost(large).macs
            assert net.cost(small).params <= net.cost(large).params
    for choice in net.space:
        view = stem
        for cut in net.plan(choice).cuts.get("model.stem.weight", ()):
            view = cut(view)
        assert view.untyped_storage().data_ptr() == stem.untyped_storage().data_ptr()
        assert view.storage_offset() == 0 and view.shape[0] == round(8 * choice["width"])


def linear_case(sampler=None):
    """Train the sheet's linear autoencoder; return |cos| per column and excess per slice."""
    torch.manual_seed(0)
    n, d = 8, 5
    spectrum = torch.tensor([9.0, 6, 4, 2.5, 1.5, 0.8, 0.4, 0.2])
    basis = torch.linalg.qr(torch.randn(n, n))[0]
    # rows sqrt(lambda_k) u_k: their summed squared error is tr[(I - DE) C (I - DE)^T]
    x = spectrum.sqrt()[:, None] * basis.T
    model = nn.Sequential(nn.Linear(n, d, bias=False), nn.Linear(d, n, bias=False))
    net, _ = sorted_fit(
        model,
        lambda step: (x,),
        lambda outputs, batch: (outputs - batch[0]).square().sum(),
        width=tuple((k + 1) / d for k in range(d)),
        sampler=sampler,
        g_acc=2,
        steps=3000,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-2),
        schedule="cosine",
        quiet=True,
    )
    columns = F.normalize(model[1].weight.detach(), dim=0)
    cosines = (columns * basis[:, :d]).sum(0).abs()
    with torch.no_grad():
        errors = torch.stack([(net(x, c) - x).square().sum() for c in net.space])
    return cosines, errors - torch.stack([spectrum[k + 1 :].sum() for k in range(d)])


def test_linear_case_sorts_the_principal_directions():
    cosines, excess = linear_case()
    assert (cosines > 0.999).all()
    assert (excess < 1e-3).all()


def test_linear_case_ordinary_training_does_not_sort():
    cosines, excess = linear_case(Cycle([Choice(width=1.0)]))
    assert excess[-1] < 1e-3  # the full network is as good
    assert cosines.min() < 0.9 and (excess[:-1] > 0.1).all()


def test_batch_statistics_are_the_analytic_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    net = elastic(model, torch.zeros(2, 6), width=(0.5, 1.0))
    mean, root = torch.randn(6), torch.randn(6, 6)
    batches = [mean + torch.randn(2000, 6) @ root.T for _ in range(30)]
    choice = Choice(width=0.5)
    net.recalibrate(choice, batches)
    norm = net.eval().extract(choice)[1]
    weight, bias = model[0].weight[:4].detach(), model[0].bias[:4].detach()
    variance = (weight @ root).square().sum(1)
    sigma = (variance / 60_000).sqrt()
    assert ((norm.running_mean - (weight @ mean + bias)).abs() < 5 * sigma).all()
    torch.testing.assert_close(norm.running_var, variance, rtol=0.04, atol=0)


def test_recalibrating_the_full_network_keeps_its_accuracy():
    torch.manual_seed(0)
    digits = load("digits")
    x = torch.from_numpy(digits.train_images).float()[:, None] / 255
    y = torch.from_numpy(digits.train_labels)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    batches = Batches(x, y, batch_size=64)
    net = elastic(model, x[:1], width=(0.5, 1.0))
    only = Cycle([net.space.largest])  # its running statistics belong to it
    sorted_fit(net, batches, steps=400, lr=1e-2, sampler=only, recalibrate=0, schedule="cosine",
               quiet=True)  # fmt: skip
    net.eval()

    def points():
        with torch.no_grad():
            return 100 * (net(x).argmax(-1) == y).double().mean().item()

    before = points()
    net.recalibrate(None, [batches(n)[0] for n in range(20)])
    assert net.statistics and abs(points() - before) <= 0.2 and before > 90


# --- touched_only ------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
    "single": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2, 5]], ids=["prefix", "scattered"])
def test_a_step_is_that_of_an_optimizer_on_the_slice(make, rows):
    generator = torch.Generator().manual_seed(0)
    full = nn.Parameter(torch.randn(6, 4, 3, generator=generator))
    bias = nn.Parameter(torch.randn(6, generator=generator))
    small, small_bias = (nn.Parameter(t[rows].detach().clone()) for t in (full[:, :2], bias))
    before = full.detach().clone()
    ours, theirs = touched_only(make([full, bias])), make([small, small_bias])
    for _ in range(5):
        grad = torch.randn(3, 2, 3, generator=generator)
        full.grad, bias.grad = torch.zeros_like(full), torch.zeros_like(bias)
        full.grad[rows, :2], bias.grad[rows] = grad, grad[:, 0, 0]
        small.grad, small_bias.grad = grad.clone(), grad[:, 0, 0].clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(full[rows][:, :2], small)
    torch.testing.assert_close(bias[rows], small_bias)
    outside = torch.ones_like(full, dtype=torch.bool)
    outside[rows, :2] = False
    assert torch.equal(full[outside], before[outside])
    assert full.grad.shape == full.shape and full.is_leaf
    for name, value in ours.state[full].items():
        if value.dim():
            assert value.shape == full.shape and torch.count_nonzero(value[outside]) == 0
            torch.testing.assert_close(value[rows][:, :2], theirs.state[small][name])


def test_a_step_on_everything_is_the_ordinary_step():
    one, two = nn.Linear(5, 4), nn.Linear(5, 4)
    two.load_state_dict(one.state_dict())
    ours = touched_only(torch.optim.AdamW(one.parameters(), lr=0.1))
    theirs = torch.optim.AdamW(two.parameters(), lr=0.1)
    for seed in range(3):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
        for model, optimizer in ((one, ours), (two, theirs)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_gradient_that_is_zero_everywhere_changes_nothing():
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = touched_only(torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5))
    weight.grad = torch.zeros(3, 2)
    optimizer.step()
    assert torch.equal(weight.data, torch.ones(3, 2)) and not optimizer.state[weight]
    scalar = nn.Parameter(torch.tensor(1.0))
    optimizer.add_param_group({"params": [scalar]})
    scalar.grad = torch.tensor(1.0)
    optimizer.step()
    assert scalar < 1


@pytest.mark.parametrize("touched", [True, False])
def test_units_that_are_never_drawn_stay_as_they_are(touched):
    net = grid()
    before = copy.deepcopy(net.model.state_dict())
    # the largest first, so that there is momentum; then the smallest alone
    small, large = net.space.smallest, net.space.largest
    batches = Batches(*data(), batch_size=16)
    options = {"lr": 0.05, "weight_decay": 0.5, "quiet": True, "touched": touched}
    sorted_fit(net, batches, steps=4, sampler=Cycle([small]), **options)
    after = net.model.state_dict()
    unused = after["stem.weight"][2:] - before["stem.weight"][2:]
    assert (unused.abs().max() == 0) == touched
    assert not torch.equal(after["stem.weight"][:2], before["stem.weight"][:2])

    def after_one_large(steps):
        net = grid()
        choices = [large] + [small] * 9
        sorted_fit(net, batches, steps=steps, sampler=Cycle(choices), **options)
        return net.model.state_dict()

    one, ten = after_one_large(1), after_one_large(10)
    same = torch.equal(one["blocks.2.up.weight"], ten["blocks.2.up.weight"])
    assert same  # not run at depth 1: its gradient is missing and every optimizer skips it
    assert torch.equal(one["stem.weight"][2:], ten["stem.weight"][2:]) == touched


# --- sorted_fit --------------------------------------------------------------------------------


def accuracy(net, choice):
    x, y = data(400, seed=9)
    return (net(x, choice).argmax(-1) == y).float().mean().item()


def test_sorted_training_makes_every_prefix_work_and_ordinary_training_does_not():
    batches = Batches(*data(600), batch_size=32, seed=1)
    options = {"steps": 250, "lr": 1e-2, "quiet": True, "schedule": "cosine"}
    ours, _ = sorted_fit(grid(), batches, g_acc=2, **options)
    plain, _ = sorted_fit(grid(), batches, sampler=Cycle([ours.space.largest]), **options)
    small = [c for c in ours.space if c["width"] <= 0.5]
    gap = [accuracy(ours, c) - accuracy(plain, c) for c in small]
    assert sum(gap) / len(gap) > 0.1
    assert accuracy(ours, ours.space.largest) > accuracy(plain, ours.space.largest) - 0.1


def test_a_trained_model_is_fine_tuned_in_place_and_made_elastic_by_name():
    model = Residual()
    before = model.stem.weight.detach().clone()
    net, fit = sorted_fit(
        model, Batches(*data(), batch_size=8), width=(0.5, 1.0), steps=2, quiet=True
    )
    assert net.model is model and fit.step == 2 and not torch.equal(model.stem.weight, before)
    assert set(net.space.axes) == {"width"}


def test_modes_and_samplers():
    batches = Batches(*data(), batch_size=8)
    options = {"steps": 1, "quiet": True, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    net, _ = sorted_fit(grid(), batches, mode="sum", **options)
    start = grid()
    expected = gradients(start, (batches(0), list(start.space)))["stem.weight"]
    torch.testing.assert_close(start.model.stem.weight - net.model.stem.weight, expected)
    net, _ = sorted_fit(start, batches, DistilledLoss(), sampler=Sandwich(start.space), **options)
    with pytest.raises(RequestError, match="'random' or 'sum'"):
        sorted_fit(grid(), batches, mode="all", **options)
    with pytest.raises(RequestError, match="elastic already"):
        sorted_fit(grid(), batches, width=(0.5, 1.0), **options)
    wide = elastic(Residual(), torch.zeros(1, 6), width=[k / 80 for k in range(8, 81)])
    with pytest.raises(RequestError, match="73 sub-networks"):
        sorted_fit(wide, batches, mode="sum", **options)


def test_statistics_of_the_full_network_are_measured_after_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    batches = Batches(*data(256), batch_size=64)
    net, _ = sorted_fit(model, batches, width=(0.25, 1.0), steps=6, recalibrate=4, quiet=True)
    hidden = model[0](torch.cat([batches(n)[0] for n in range(4)]))
    torch.testing.assert_close(net.extract()[1].running_mean, hidden.mean(0).detach())


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path):
    batches = Batches(*data(), batch_size=8)
    options = {"steps": 6, "g_acc": 2, "quiet": True, "lr": 1e-2, "checkpoint_every": 2}
    whole, _ = sorted_fit(grid(), batches, checkpoint=tmp_path / "whole", **options)

    class Killed(Exception):
        pass

    def kill(step):
        if step.number == 5:
            raise Killed

    with pytest.raises(Killed):
        sorted_fit(grid(), batches, checkpoint=tmp_path / "part", on_step=kill, **options)
    again, fit = sorted_fit(grid(), batches, checkpoint=tmp_path / "part", **options)
    assert fit.step == 6
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
