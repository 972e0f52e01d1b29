"""Which blocks a network can do without, and what skipping them does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zoo import check, hugging, no_trace

import pantarhei as pr
from pantarhei.elastic import Choice
from pantarhei.elastic.blocks import Stage, find_stages, first_tensor
from pantarhei.errors import RequestError


class Mlp(nn.Module):
    """A residual block; ``skip`` says what goes around it."""

    def __init__(self, n: int = 8, skip: str = "sum", out: int | None = None) -> None:
        super().__init__()
        self.a, self.b, self.skip = nn.Linear(n, 2 * n), nn.Linear(2 * n, out or n), skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return {"sum": lambda: x + y, "relu": lambda: (y + x).relu(), "none": lambda: y,
                "scaled": lambda: 0.5 * x + y, "product": lambda: x * y,
                "identity": lambda: x.clone()}[self.skip]()  # fmt: skip


def stages_of(*blocks: nn.Module, exits: tuple[str, ...] = ()) -> tuple[list[Stage], dict]:
    found, why, _ = find_stages(nn.Sequential(*blocks).eval(), (torch.randn(2, 8),), {}, exits)
    return found, why


def test_residual_blocks_are_found() -> None:
    found, why = stages_of(Mlp(), Mlp(skip="relu"), Mlp())
    assert found == [Stage("", ("0", "1", "2"), ("0", "1", "2"))]
    assert not why


@pytest.mark.parametrize("skip", ["none", "scaled", "product", "identity"])
def test_other_blocks_run(skip: str) -> None:
    found, why = stages_of(Mlp(), Mlp(skip=skip), Mlp(), Mlp())
    assert found == [Stage("", ("1", "2", "3"), ("2", "3"))]
    assert why == {"1": "it has no residual path around it"}


def test_a_change_of_shape_starts_a_stage() -> None:
    found, why = stages_of(Mlp(), Mlp(), Mlp(skip="none", out=12), Mlp(12), Mlp(12))
    assert [s.blocks for s in found] == [("0", "1"), ("2", "3", "4")]
    assert [s.name for s in found] == ["0", "2"]
    assert why["2"] == "it turns shape (8,) into (12,)"


def test_innermost_blocks_count() -> None:
    pairs = [nn.Sequential(Mlp(), Mlp()) for _ in range(2)]
    found, _ = stages_of(*pairs)
    assert [s.blocks for s in found] == [("0.0", "0.1"), ("1.0", "1.1")]
    model, x = nn.Sequential(*pairs).eval(), torch.randn(2, 8)
    check(model, pr.elastic(model, x, depth=(1, 2)), x)


def test_depth_keeps_the_first_blocks() -> None:
    stage = Stage("s", ("0", "1", "2", "3"), ("1", "2", "3"))
    assert stage.smallest == 1
    assert [stage.skipped(d) for d in (4, 3, 1)] == [(), ("3",), ("1", "2", "3")]
    assert Stage("s", ("0", "1"), ("0", "1")).smallest == 1


def test_shared_blocks_and_blocks_with_exits_run() -> None:
    shared = Mlp()
    _, why = stages_of(shared, shared, Mlp())
    assert why["0"] == "it runs more than once or not at all"
    _, why = stages_of(Mlp(), Mlp(), exits=("1.a",))
    assert why == {"1": "an exit is inside it"}


def test_blocks_that_return_more_than_they_pass_on() -> None:
    class Pair(Mlp):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = super().forward(x)
            return y, y.mean()

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Pair(), Pair()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x, _ = block(x)
            return x

    with pytest.raises(RequestError, match=r"'blocks\.0': it returns more than the tensor"):
        pr.elastic(Chain(), torch.randn(2, 8), depth=(1, 2))


def test_networks_without_residual_blocks_say_why() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(RequestError, match=r"'0': it has no residual path around it"):
        pr.elastic(model, torch.randn(2, 8), depth=(1, 2))
    with pytest.raises(RequestError, match="No list of residual blocks"):
        pr.elastic(nn.Linear(8, 8), torch.randn(2, 8), depth=(1, 2))


@pytest.mark.parametrize(
    ("depth", "words"),
    [((0, 1), "from 1 to 3"), ((1, 4), "from 1 to 3"), ((0.5, 1.5), "from 1 to 3"), (2, "tuple"),
     ((1, 0.5), "from 1 to 3"), ((True,), "tuple"), ((), "tuple"), ({"1": (1,)}, "not a stage"),
     ({"": (1, 5)}, "from 1 to 3"), (pr.elastic.Sized((1, 2)), "not Sized")],
)  # fmt: skip
def test_depths_that_make_no_sense(depth: object, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        pr.elastic(nn.Sequential(Mlp(), Mlp(), Mlp()), torch.randn(2, 8), depth=depth)


def test_each_stage_by_name() -> None:
    model, inputs, _ = hugging("resnet")
    names = [f"resnet.encoder.stages.{i}.layers" for i in (0, 1)]
    net = pr.elastic(model, inputs, depth={names[0]: (1, 2), names[1]: (1, 2, 3)})
    assert list(net.space.axes) == [f"depth.{name}" for name in names]
    assert len(net.space) == 6
    check(model, net, choices=list(net.space), **inputs)


def test_skipped_blocks_get_no_gradient() -> None:
    model = nn.Sequential(Mlp(), Mlp(), Mlp())
    net = pr.elastic(model, torch.randn(2, 8), depth=(1, 2, 3))
    net(torch.randn(2, 8), Choice(depth=2)).sum().backward()
    grads = [block.a.weight.grad for block in model]
    assert grads[2] is None
    assert all(g.abs().sum() > 0 for g in grads[:2])


class Lockstep(nn.Module):
    """Code that pairs blocks by their place in a list: taking one out would shift the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp(skip="none"), Mlp(), Mlp()])
        self.scales = nn.ParameterList(torch.full((1,), float(i + 1)) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=False):
            x = block(x) * scale
        return x


class ByNumber(Lockstep):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = self.blocks[i](x)
        return x


@pytest.mark.parametrize("cls", [Lockstep, ByNumber])
def test_lists_that_must_keep_their_length(cls: type[nn.Module]) -> None:
    model, x = cls().eval(), torch.randn(2, 8)
    net = pr.elastic(model, x, depth=(1, 2, 3), width=(0.5, 1.0))
    check(model, net, x, choices=list(net.space))
    sub = net.extract(Choice(depth=1, width=0.5))
    assert len(sub.blocks) == 4
    assert no_trace(sub)
    assert torch.equal(torch.export.export(sub, (x,)).module()(x), sub(x))


def test_first_tensor() -> None:
    from dataclasses import dataclass

    @dataclass
    class Output:
        logits: Tensor
        extra: int = 0

    x = torch.ones(1)
    for value in (x, (x, None), [x], {"a": x, "b": 1}, Output(x)):
        assert first_tensor(value) is x
    for value in (None, 3, (), (None, x), "x"):
        assert first_tensor(value) is None
