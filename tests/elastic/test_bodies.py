"""Bound bodies are used again exactly as long as nothing in the model has changed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import UNet, leaves

import pantarhei as pr
from pantarhei.elastic import Choice, ElasticNet, bodies
from pantarhei.errors import RequestError

SMALL = Choice(width=0.5)


class Net(nn.Module):
    """Convolutions with BatchNorm, a concatenation (kept channels in two runs), dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.0)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.norm(self.a(x)), self.b(x).relu()], 1)
        return self.head(self.drop(y).mean((2, 3)))


def wrapped(**options: object) -> tuple[Net, ElasticNet, Tensor]:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        model.norm.running_mean.normal_()
    return model, pr.elastic(model, x, width=(0.5, 1.0), **options), x


@pytest.fixture
def binds(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """The choices that bodies were bound to, in order."""
    seen: list[Choice] = []
    bind = bodies.Body.bind

    def counted(body: bodies.Body, net: ElasticNet, key: bodies.Key, remember: bool) -> bool:
        seen.append(key[0].choice)
        return bind(body, net, key, remember)

    monkeypatch.setattr(bodies.Body, "bind", counted)
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_choices_that_come_back_are_not_bound_again(mode: Callable, binds: list[Choice]) -> None:
    _, net, x = wrapped()
    with mode():
        for _ in range(2):
            for choice in net.space:
                net(x, choice)
        binds.clear()
        for _ in range(3):
            for choice in net.space:
                net(x, choice)
    assert not binds


def step(model: Net, net: ElasticNet) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.enable_grad():
        net(torch.ones(2, 3, 6, 6)).square().sum().backward()
    optimizer.step()


def assign(model: Net, net: ElasticNet) -> None:
    model.a.weight.data = torch.randn_like(model.a.weight)


def replace(model: Net, net: ElasticNet) -> None:
    model.head.weight = nn.Parameter(torch.randn_like(model.head.weight))


def load(model: Net, net: ElasticNet) -> None:
    other = Net()
    other.norm.running_var.uniform_(1, 2)
    model.load_state_dict(other.state_dict())


def load_by_assignment(model: Net, net: ElasticNet) -> None:
    model.load_state_dict(Net().state_dict(), assign=True)


def there_and_back(model: Net, net: ElasticNet) -> None:
    model.to(torch.bfloat16)  # rounds
    model.to(torch.float32)


def train(model: Net, net: ElasticNet) -> None:
    model.train()


def one_layer_trains(model: Net, net: ElasticNet) -> None:
    model.norm.train()


def buffer(model: Net, net: ElasticNet) -> None:
    model.norm.running_mean = torch.ones(8)


def measure(model: Net, net: ElasticNet) -> None:
    net.recalibrate(SMALL, [torch.randn(8, 3, 6, 6)])


def measure_again(model: Net, net: ElasticNet) -> None:
    for seed in (1, 2):
        x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        net.recalibrate(SMALL, [x])
        with torch.no_grad():
            for _ in range(3):
                net(x, SMALL)


def number(model: Net, net: ElasticNet) -> None:
    model.norm.eps = 0.5


CHANGES = [step, assign, replace, load, load_by_assignment, there_and_back, train, buffer,
           one_layer_trains, measure, measure_again, number]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rescale", [None, "sqrt"])
def test_what_changes_in_the_model_is_seen(change: Callable, rescale: str | None) -> None:
    model, net, x = wrapped(rescale=rescale)
    net.eval()
    with torch.no_grad():
        before = [net(x, choice) for _ in range(3) for choice in net.space][-2:]
        change(model, net)
        for choice, old in zip(net.space, before, strict=True):
            plain = net.extract(choice)
            for _ in range(3):
                got = net(x, choice)
                assert torch.equal(got, plain(x))
            if choice == SMALL or change not in (measure, measure_again):
                assert not torch.equal(got, old)


def test_hooks_that_come_go_and_are_exchanged_are_seen() -> None:
    model, net, x = wrapped()
    seen: list[str] = []

    def run() -> list[str]:
        seen.clear()
        with torch.no_grad():
            for _ in range(3):
                net(x, SMALL)
        return list(seen)

    assert run() == []
    first = model.a.register_forward_hook(lambda *_: seen.append("first"))
    assert run() == ["first"] * 3
    first.remove()
    second = model.a.register_forward_hook(lambda *_: seen.append("second"))
    assert run() == ["second"] * 3
    second.remove()
    assert run() == []
    net(x, SMALL)
    model.head.register_full_backward_hook(lambda *_: seen.append("backward"))
    net(x, SMALL).sum().backward()
    assert seen == ["backward"]


def test_gradients_reach_the_weights_after_runs_without_them() -> None:
    model, net, x = wrapped()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(3):
                net(x, SMALL)
    for _ in range(3):
        model.zero_grad()
        net(x, SMALL).square().sum().backward()
        plain = net.extract(SMALL)
        plain(x).square().sum().backward()
        assert torch.equal(model.a.weight.grad[:4], plain.a.weight.grad)
        assert not model.a.weight.grad[4:].any()


def test_statistics_move_when_bound_in_inference_mode() -> None:
    """In-place changes of a view that was made in inference mode are an error outside of it."""
    model, net, x = wrapped()
    model.train()
    other = net.extract(SMALL)
    for mode in (torch.inference_mode, torch.inference_mode, torch.inference_mode, torch.no_grad):
        with mode():
            net(x, SMALL)
            other(x)
    assert torch.equal(model.norm.running_mean[:4], other.norm.running_mean)
    assert model.norm.num_batches_tracked == 4


def test_what_a_forward_pass_leaves_in_its_body_is_gone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.linear, self.out = 0, nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.out(self.linear(x)) * self.calls

    model, x = Counting(), torch.ones(1, 4)
    net = pr.elastic(model, x, width=(0.5, 1.0))
    with torch.no_grad():
        assert all(torch.equal(net(x), net(x)) for _ in range(4))
        model.calls = 2
        doubled = net(x)
        model.calls = 0
        assert torch.allclose(doubled, 3 * net(x))


def test_switched_norms_that_move_are_seen() -> None:
    _, net, x = wrapped(norm="switchable")
    net.eval()
    with torch.no_grad():
        before = [net(x, choice) for _ in range(3) for choice in net.space][-2:]
        for p in net.switched.values():
            p.data = p.data + 1
        for choice, old in zip(net.space, before, strict=True):
            assert torch.equal(net(x, choice), net.extract(choice)(x))
            assert not torch.equal(net(x, choice), old)


def test_a_module_that_is_replaced_is_an_error() -> None:
    model, net, x = wrapped()
    with torch.no_grad():
        for _ in range(3):
            net(x, SMALL)
        was, model.drop = model.drop, nn.ReLU()
        for _ in range(2):
            with pytest.raises(RequestError, match="'drop' was replaced"):
                net(x, SMALL)
        model.drop = was
        net(x, SMALL)
        model.head = nn.utils.parametrizations.weight_norm(model.head)
        with pytest.raises(RequestError, match="call elastic\\(\\) again"):
            net(x, SMALL)


def test_bodies_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    net = pr.elastic(model, torch.ones(1, 4), width=tuple(i / 16 for i in range(1, 17)))
    monkeypatch.setattr(bodies, "MODULES", 5 * len(net.layout))
    x = torch.randn(2, 4)
    with torch.no_grad():
        wanted = [net.extract(choice)(x) for choice in net.space]
        for _ in range(4):
            for choice, want in zip(net.space, wanted, strict=True):
                assert torch.equal(net(x, choice), want)
    pool = net._bodies
    assert sum(map(len, pool.bound.values())) + len(pool.loose) <= 6


def test_weights_that_were_replaced_are_not_kept_in_memory() -> None:
    model, net, x = wrapped()
    memory = np.zeros(tuple(model.head.weight.shape), dtype=np.float32)
    model.head.weight.data = torch.from_numpy(memory)
    alive = weakref.ref(memory)
    del memory
    with torch.no_grad():
        for _ in range(3):
            for choice in net.space:
                net(x, choice)
        gc.collect()
        assert alive() is not None
        model.head.weight.data = torch.randn_like(model.head.weight)
        assert torch.equal(net(x, SMALL), net.extract(SMALL)(x))
        gc.collect()
        assert alive() is None
        for choice in net.space:
            assert torch.equal(net(x, choice), net.extract(choice)(x))


def test_bodies_come_back_when_the_graph_is_gone() -> None:
    model, x = UNet("batch").train(), torch.randn(2, 3, 16, 16)
    net = pr.elastic(model, x, width=(0.5, 1.0))
    for _ in range(6):
        loss = leaves(net(x, SMALL))[0].sum()
        loss.backward()
    del loss
    gc.collect()
    pool = net._bodies
    assert 1 <= sum(map(len, pool.bound.values())) + len(pool.loose) <= 3


def test_transforms_see_their_own_tensors() -> None:
    """torch.func puts tensors of its own in place of the parameters for one call."""
    _, net, x = wrapped()
    weights = {n: p.detach() + 1 for n, p in net.named_parameters()}
    with torch.no_grad():
        for _ in range(3):
            before = net(x, SMALL)
        moved = torch.func.functional_call(net, weights, (x, SMALL))
        assert not torch.equal(moved, before)
        assert torch.equal(net(x, SMALL), before)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(net, weights, (x, SMALL)).square().sum()

    own = {n: p.detach() for n, p in net.named_parameters()}
    for _ in range(3):
        grads = torch.func.grad(loss)(own)
    net(x, SMALL).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
