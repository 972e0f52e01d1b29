"""The elastic network itself: views, gradients, state, normalisation, refusals."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo import UNet, check, hugging, inside, leaves, same, snapshot, unchanged

import pantarhei as pr
from pantarhei.cost import profile
from pantarhei.elastic import Choice, Confidence, Sized, elastic
from pantarhei.errors import RequestError

SMALL = Choice(width=0.5)


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# --- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [convnet, lambda: UNet("batch")])
def test_gradients_land_in_the_full_weights(build: object) -> None:
    model, x = build().train(), images()
    net = pr.elastic(model, x, width=(0.5, 1.0))
    sub = net.extract(SMALL)
    sum(t.square().sum() for t in leaves(net(x, SMALL))).backward()
    sum(t.square().sum() for t in leaves(sub(x))).backward()
    for (name, full), own in zip(model.named_parameters(), sub.parameters(), strict=True):
        mask = inside(net, SMALL, name)
        assert torch.equal(full.grad[mask].view(own.shape), own.grad), name
        assert not full.grad[~mask].any(), name


def test_training_moves_the_statistics_of_the_prefix_only() -> None:
    model, x = convnet().train(), images()
    net = pr.elastic(model, x, width=(0.5, 1.0))
    sub = net.extract(SMALL)
    before = copy.deepcopy(model[1].running_mean)
    net(x, SMALL), sub(x)
    assert torch.equal(model[1].running_mean[:4], sub[1].running_mean)
    assert torch.equal(model[1].running_mean[4:], before[4:])
    assert not torch.equal(model[1].running_mean[:4], before[:4])
    assert model[1].num_batches_tracked == 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.again = convnet()[:9], True

        def forward(self, x: Tensor) -> Tensor:
            if not self.again:
                return self.body(x)
            return checkpoint(self.body, x, use_reentrant=reentrant)

    model, x = Checkpointed().eval(), images().requires_grad_()
    net = pr.elastic(model, x.detach(), width=(0.25, 0.5, 1.0))
    # Several sub-networks run before any goes back: each must be run again as it was.
    outputs = [net(x, choice).square().sum() for choice in net.space]
    sum(outputs).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.again = False  # seen by the bodies that exist already
    sum(net(x, choice).square().sum() for choice in net.space).backward()
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_hugging_face_checkpointing_switched_on_later() -> None:
    model, inputs, _ = hugging("bert")
    net = pr.elastic(model, inputs, width=(0.5, 1.0))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    net.train()
    net(**inputs, choice=SMALL).logits.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss = net(**inputs, choice=SMALL).logits.sum()
    net(**inputs)
    loss.backward()
    for name, p in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(p.grad, grads[name], msg=name)


def test_rescaling_makes_up_for_missing_inputs() -> None:
    """DyLoRA (arXiv 2210.07558): a layer that keeps k of n inputs is multiplied by sqrt(n / k)."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(3, 4)
    net = pr.elastic(model, x, width=(0.5, 1.0), rescale="sqrt")
    got = net(x, SMALL)
    hidden = (x @ model[0].weight[:4].T + model[0].bias[:4]).relu()
    torch.testing.assert_close(got, hidden @ model[2].weight[:, :4].T * 2**0.5 + model[2].bias)
    assert torch.equal(net(x), model(x))
    assert torch.equal(got, net.extract(SMALL)(x))
    with pytest.raises(RequestError, match="rescale='cube' is unknown"):
        pr.elastic(model, x, width=(0.5, 1.0), rescale="cube")


def test_extraction_after_a_backward_pass() -> None:
    """A body from the pool holds views with a history, also in blocks that are skipped now."""
    model, inputs, _ = hugging("vit")
    net = pr.elastic(model, inputs, width=(0.5, 1.0), depth=(1, 3))
    net(**inputs, choice=net.space.largest).logits.sum().backward()
    choice = Choice(width=0.5, depth=1)
    net(**inputs, choice=choice).logits.sum().backward()
    sub = net.extract(choice)
    with torch.no_grad():
        assert same(sub(**inputs), net(**inputs, choice=choice))
    assert all(p.is_leaf and p.requires_grad for p in sub.parameters())


# --- state ------------------------------------------------------------------------------------


def test_wrapping_and_running_leave_the_model_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.steps = convnet(), 0
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.steps += 1
            self.seen += 1
            return self.body(x)

    model = Counting().train()
    model.body[1].eval()  # a frozen norm inside a model in training
    model.body[0].weight.requires_grad_(False)
    before = snapshot(model)
    net = pr.elastic(model, images(), width=(0.5, 1.0), exits=("body.2", "body.5"))
    assert unchanged(before, model)
    assert net.training
    net.extract(SMALL)
    net.cost(SMALL), net.exit_macs()
    net.latency(SMALL, repeats=1)
    before["tensors"]["seen"] = (model.seen, model.seen.clone())  # counts real runs
    assert unchanged(before, model)


def test_buffers_that_are_replaced_are_kept() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean = 0.5 * self.mean + 0.5 * x.mean()
            return self.b(self.a(x))

    model, x = Moving().train(), torch.ones(2, 4)
    net = pr.elastic(model, x, width=(0.5, 1.0))
    assert model.mean == 0
    net(x, SMALL), net(x)
    assert model.mean == 0.75


def test_threads_do_not_meet() -> None:
    model, x = convnet().eval(), images()
    net = pr.elastic(model, x, width=tuple(i / 8 for i in range(1, 9)))
    with torch.no_grad():
        alone = {choice: net(x, choice) for choice in net.space}
    ready = threading.Barrier(8)

    def work(choice: Choice) -> bool:
        ready.wait()
        with torch.no_grad():
            return all(
                torch.equal(net(x, c), alone[c])
                for _ in range(10)
                for c in (choice, net.space.largest, choice)
            )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, net.space))


def test_a_failing_forward_leaves_nothing_behind() -> None:
    model, x = convnet().eval(), images()
    net = pr.elastic(model, x, width=(0.5, 1.0), exits=("2",))
    with torch.no_grad():
        wanted = [net(x, choice) for choice in net.space]
    before = snapshot(model)
    for choice in net.space:
        for call in (net, net.all_exits):
            with pytest.raises(RequestError, match="example inputs"):
                call(torch.ones(1, 4, 8, 8), choice=choice)
    with pytest.raises(ZeroDivisionError):
        net.adaptive(x, lambda answers: 1 / 0)
    assert unchanged(before, model)
    with torch.no_grad():
        assert all(map(torch.equal, wanted, [net(x, choice) for choice in net.space]))


def test_attributes_and_hooks_set_later_are_followed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 2)).train()
    net = pr.elastic(model, torch.ones(2, 4), width=(0.5, 1.0))
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(net(x), net(x))
        model[1].p = 1.0
        assert torch.equal(net(x), model[2].bias.expand(3, 2))
        seen: list[int] = []
        handle = model[0].register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
        net(x, SMALL)
        handle.remove()
        net(x, SMALL)
    assert seen == [4]
    model[1].eval()
    assert not torch.equal(net(x), model[2].bias.expand(3, 2))


def test_state_moves_loads_and_copies() -> None:
    model, x = convnet().train(), images()
    net = pr.elastic(model, x, width=(0.5, 1.0), exits=("2",))
    net.recalibrate(SMALL, [x])
    net(x, SMALL).sum().backward()  # bodies hold views with a history
    full = net.space.complete(SMALL)
    net.eval()
    with torch.no_grad():
        wanted = {choice: net(x, choice) for choice in net.space}
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert all(torch.equal(twin(x, c), wanted[c]) for c in net.space)
            for p in twin.parameters():
                p.zero_()
            assert not twin(x).any()
        assert all(torch.equal(net(x, c), wanted[c]) for c in net.space)

        other = pr.elastic(convnet(), x, width=(0.5, 1.0), exits=("2",)).eval()
        for p in other.parameters():
            p.add_(1)
        other(x, SMALL)
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x), wanted[net.space.largest])

        net.to(torch.float64)
        got = net(x.double(), SMALL)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got.float(), wanted[full])
        sub = net.extract(SMALL)
        assert torch.equal(sub(x.double()), got)
        assert net.cost(SMALL).bytes == profile(sub, x.double()).bytes
        assert net.latency(SMALL, repeats=1) > 0
        net.to("meta")
        assert net(x.to("meta").double(), SMALL).shape == (4, 5)


# --- choices ----------------------------------------------------------------------------------


def test_switching_copies_nothing() -> None:
    """At any choice a contiguous tensor is a view: it sees a change of the full weights at once."""
    model, x = convnet().eval(), images()
    net = pr.elastic(model, x, width=(0.25, 0.5, 1.0))
    for choice in net.space:
        with net.body(net.plan(choice)) as body:
            views = [*body.model.parameters(), *body.model.buffers()]
        whole = [*model.parameters(), *model.buffers()]
        for view, full in zip(views, whole, strict=True):
            assert view.data_ptr() == full.data_ptr()
            assert view.untyped_storage().nbytes() == full.untyped_storage().nbytes()


def test_sizes_are_rounded() -> None:
    model, x = convnet().eval(), images()
    net = pr.elastic(model, x, width=Sized((0.1, 0.6, 1.0), divisor=4, floor=3))
    widths = [[net.plan(c).keep[g] for g in net.groups] for c in net.space]
    assert widths == [[3, 3], [4, 8], [8, 12]]
    check(model, net, x)


def test_named_groups() -> None:
    model, x = convnet().eval(), images()
    net = pr.elastic(model, x, width={"0": (0.5, 1.0), "[1-9]*": (0.25, 1.0)})
    assert net.space.axes == {"width.0": (0.5, 1.0), "width.[1-9]*": (0.25, 1.0)}
    check(model, net, x)
    net = pr.elastic(model, x, width={"6": (0.5, 1.0)})
    assert set(net.plan(net.space.smallest).keep) == {"model.6"}


def test_choices_by_position_and_keyword() -> None:
    model, x = convnet().eval(), images()
    net = pr.elastic(model, x, width=(0.5, 1.0))
    with torch.no_grad():
        assert torch.equal(net(x, SMALL), net(input=x, choice=SMALL))
        assert torch.equal(net(x, SMALL), net(x, choice=dict(SMALL)))
    assert net.cost({"width": 0.5}) == net.cost(SMALL)
    with pytest.raises(RequestError, match=r"0\.5 is no choice"):
        net(x, choice=0.5)
    with pytest.raises(RequestError, match="Two choices"):
        net(x, SMALL, choice=SMALL)


def test_outputs_may_be_data_classes() -> None:
    @dataclass
    class Output:
        logits: Tensor
        features: Tensor

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, *, x: Tensor) -> Output:
            h = self.a(x)
            return Output(self.c(self.b(h).relu()), h)

    model, x = Wrapped().eval(), torch.randn(3, 4)
    net = pr.elastic(model, {"x": x}, width=(0.5, 1.0))
    assert list(net.groups) == ["model.b"]  # what comes out keeps its size
    got = net(x=x, choice=SMALL)
    assert isinstance(got, Output)
    assert torch.equal(got.logits, net.extract(SMALL)(x=x).logits)


# --- normalisation ----------------------------------------------------------------------------


def test_recalibration_is_that_of_the_extracted_network() -> None:
    model, batches = convnet().train(), [(images(8, s), None) for s in range(3)]
    net = pr.elastic(model, images(), width=(0.5, 1.0))
    before = snapshot(model)
    sub = net.extract(SMALL)
    for module in sub.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for x, _ in batches:
            sub.train()(x)
    net.recalibrate(SMALL, batches)
    assert unchanged(before, model)
    x = images(4, 9)
    with torch.no_grad():
        assert torch.equal(net.eval()(x, SMALL), sub.eval()(x))
        assert torch.equal(net.extract(SMALL).eval()(x), sub(x))
        assert torch.equal(net(x), model(x))  # the full network's own statistics stay
        assert torch.equal(net.train().extract(SMALL).eval()(x), sub(x))


def test_recalibration_finds_the_moments_of_the_output() -> None:
    """y = W x with x ~ N(0, I): each of y's components has mean b and variance |w|^2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    net = pr.elastic(model, torch.ones(2, 6), width=(0.5, 1.0))
    net.recalibrate(SMALL, (torch.randn(4096, 6) for _ in range(100)), limit=30)
    stats = net.statistics[SMALL]
    weight = model[0].weight[:4].detach()
    mean, var = stats["model.1.running_mean"], stats["model.1.running_var"]
    torch.testing.assert_close(mean, model[0].bias[:4].detach(), atol=0.01, rtol=0)
    torch.testing.assert_close(var, weight.square().sum(1), rtol=0.02, atol=0)
    assert stats["model.1.num_batches_tracked"] == 30
    with torch.no_grad():
        out = net(torch.randn(4096, 6), SMALL)  # relu of a standard normal has mean 1/sqrt(2 pi)
    wanted = model[3].weight[:, :4].sum(1) * 0.39894 + model[3].bias
    torch.testing.assert_close(out.mean(0), wanted.detach(), atol=0.02, rtol=0)


def test_recalibration_needs_a_batch_and_a_choice_of_the_space() -> None:
    net = pr.elastic(convnet(), images(), width=(0.5, 1.0))
    with pytest.raises(RequestError, match="no batch"):
        net.recalibrate(SMALL, [])
    with pytest.raises(RequestError, match="outside the space"):
        net.recalibrate(Choice(width=0.3), [images()])
    assert not net.statistics


def test_switchable_norms_are_separate_and_train() -> None:
    model, x = convnet().train(), images()
    net = pr.elastic(model, x, width=(0.5, 1.0), norm="switchable")
    before = snapshot(model)
    assert len(net.switched) == 2 * 3 * 4
    with torch.no_grad():
        full = net.eval()(x)
    own = [p for p in net.switched.values() if p.requires_grad]
    optimizer = torch.optim.SGD(own, 0.1)
    net.train()
    for _ in range(2):
        optimizer.zero_grad()
        net(x, SMALL).square().sum().backward()
        for name, p in net.switched.items():  # the affine parameters of this choice learn
            mine = name.startswith("width=0:5|") and p.requires_grad
            assert (p.grad is not None and bool(p.grad.any())) == mine, name
        optimizer.step()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.grad is None
    for name, (tensor, old) in before["tensors"].items():
        assert torch.equal(tensor, old) or "num_batches" in name, name
    net.eval()
    with torch.no_grad():
        assert torch.equal(net(x), full)
        for choice in net.space:
            sub = net.extract(choice)
            assert torch.equal(net(x, choice), sub(x))
            assert net.cost(choice).params == profile(sub, x).params
        assert not torch.equal(net.extract(SMALL)[1].running_mean, model[1].running_mean[:4])
        assert not torch.equal(net.extract(SMALL)[1].weight, model[1].weight[:4])


def test_switchable_norms_are_for_small_grids() -> None:
    widths = tuple(i / 300 for i in range(1, 301))
    with pytest.raises(RequestError, match="at most 256"):
        pr.elastic(convnet(), images(), width=widths, norm="switchable")


# --- cost and latency -------------------------------------------------------------------------


def test_cost_needs_no_run_and_grows() -> None:
    model, x = convnet(), images()
    net = pr.elastic(model, x, width=(0.25, 0.5, 0.75, 1.0))

    def forbidden(*_: object) -> None:
        raise AssertionError("cost() ran the model")

    model.register_forward_pre_hook(forbidden)
    costs = [net.cost(choice) for choice in net.space]
    assert all(a.macs < b.macs and a.params < b.params for a, b in itertools.pairwise(costs))
    # by hand, at width 0.5: 3->4 3x3 on 8x8, depthwise 3x3 and 4->6 1x1 on 6x6, 6->5
    assert costs[1].macs == 64 * 27 * 4 + 36 * 9 * 4 + 36 * 4 * 6 + 6 * 5


def test_latency_is_that_of_the_choice() -> None:
    model, x = convnet().train(), images()
    net = pr.elastic(model, x, width=(0.5, 1.0))
    seen: list[tuple[int, bool]] = []
    model[3].register_forward_hook(lambda m, a, out: seen.append((out.shape[1], m.training)))
    assert net.latency(SMALL, repeats=2) > 0
    assert set(seen) == {(4, False)}
    assert model.training


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Nothing to make elastic"),
        ({"width": (0.0, 1.0)}, "above 0"),
        ({"width": (0.5, 1.5)}, "at most 1"),
        ({"width": (float("nan"),)}, "at most 1"),
        ({"width": 0.5}, "tuple"),
        ({"width": ()}, "tuple"),
        ({"width": "half"}, "tuple"),
        ({"width": ("a",)}, "tuple"),
        ({"width": {"3": (0.5,), "layer": (0.5,)}}, r"matches '3' \(it has: 0, 6\)"),
        ({"width": {"00": (0.5,)}}, "Did you mean '0'?"),
        ({"heads": (0.5, 1.0)}, r"No heads group .*it has: none"),
        ({"norm": "none", "width": (0.5,)}, "'shared' or 'switchable'"),
        ({"exits": ("22",)}, "Did you mean '2'?"),
        ({"exits": 3}, "tuple of names"),
        ({"exits": (3,)}, "tuple of names"),
        ({"exits": "5", "depth": (1, 2)}, "No list of residual blocks"),
    ],
)
def test_requests_that_make_no_sense(options: dict, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        pr.elastic(convnet(), images(), **options)
    assert "\n" not in str(caught.value)


def test_choices_outside_the_space() -> None:
    net = pr.elastic(convnet(), images(), width=(0.5, 1.0))
    for call in (net.cost, net.extract, net.plan, lambda c: net(images(), c), net.latency):
        with pytest.raises(RequestError, match=r"width=0\.4, outside .*nearest is 0\.5"):
            call(Choice(width=0.4))
        with pytest.raises(RequestError, match=r"'widht'.* Did you mean 'width'\?"):
            call(Choice(widht=0.5))


def test_what_cannot_be_wrapped() -> None:
    x = torch.ones(1, 4)
    with pytest.raises(RequestError, match="give a module"):
        pr.elastic(torch.relu, x, width=(0.5, 1.0))
    with pytest.raises(RequestError, match="lazy"):
        pr.elastic(nn.Sequential(nn.LazyLinear(3)), x, width=(0.5, 1.0))
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(RequestError, match="TorchScript"):
        pr.elastic(torch.jit.script(model), x, width=(0.5, 1.0))
    model.lock = threading.Lock()
    with pytest.raises(RequestError, match=r"cannot be copied .*locks"):
        pr.elastic(model, x, width=(0.5, 1.0))


def test_an_axis_without_any_group_left_says_why() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, 8))

    with pytest.raises(RequestError, match=r"none; 'a' cannot change: .* 1x8 where 2x4"):
        pr.elastic(Fixed(), torch.ones(2, 4), width=(0.5, 1.0))


@pytest.mark.parametrize("call", ["net", "all_exits", "adaptive"])
def test_inputs_that_do_not_fit_are_one_sentence(call):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    net = elastic(model, torch.randn(2, 3, 4), width=(0.5, 1.0), exits={"1": nn.Linear(8, 3)})
    run = {
        "net": net,
        "all_exits": net.all_exits,
        "adaptive": lambda x: net.adaptive(x, Confidence(0.5)),
    }[call]
    run(torch.randn(5, 4, 3))  # not the example's shape, but the network runs on it
    for wrong in (torch.randn(2, 3, 5), torch.randn(2, 3, 4, 2), torch.ones(2, 3, 4).long()):
        with pytest.raises(RequestError, match=r"example inputs of elastic\(\), \(2, 3, 4\)"):
            run(wrong)
    with pytest.raises((TypeError, AttributeError, RequestError)):
        run("text")


def test_the_networks_own_errors_pass():
    class Refuses(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x, wanted=True):
            if not wanted:
                raise ValueError("mine")
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(2, 4)
    net = elastic(Refuses(), {"x": x, "wanted": True}, width=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"^mine$"):
        net(x=x, wanted=False)
    with pytest.raises(RequestError, match=r"input\['x'\] of shape \(2, 5\)"):
        net(x=torch.randn(2, 5), wanted=True)
