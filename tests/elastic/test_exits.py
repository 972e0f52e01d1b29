"""Leaving early: exits as choices, per-input runs, policies, budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import check, hugging, same, snapshot, unchanged

import pantarhei as pr
from pantarhei.cost import profile
from pantarhei.elastic import (
    Choice,
    Confidence,
    ElasticNet,
    Entropy,
    Gate,
    Patience,
    PooledHead,
    calibrate,
)
from pantarhei.errors import RequestError

NAMES = ("1", "3", "5")


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in ((3, 6), (6, 8), (8, 8), (8, 12)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))


def exiting(**options: Any) -> ElasticNet:
    return pr.elastic(convnet(), images(2), **({"exits": NAMES} | options))


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def middle(net: ElasticNet, **inputs: Tensor) -> float:
    """A confidence that about half of the examples reach at each exit."""
    scores = Confidence(0).score(net.all_exits(**inputs)[0].detach()).sort().values
    return float(scores[len(scores) // 2 - 1 : len(scores) // 2 + 1].mean())


# --- exits as choices -------------------------------------------------------------------------


def test_static_exits() -> None:
    net = exiting(width=(0.5, 1.0))
    x = images(2)
    check(net.model, net, x, choices=[c for c in net.space if c["width"] < 1 or c["exit"] == 1])
    with torch.no_grad():
        answers = net.all_exits(x)
        assert len(answers) == 4
        for exit, answer in enumerate(answers, 1):
            assert torch.equal(net(x, Choice(exit=exit, width=1.0)), answer)
            features = net.model[: 2 * exit](x) if exit < 4 else None
            wanted = net.heads[exit - 1](features) if exit < 4 else net.model(x)
            assert torch.equal(answer, wanted)


def test_an_exit_is_extracted_with_what_it_needs_and_a_free_batch() -> None:
    net = exiting(width=(0.5, 1.0))
    sub = net.extract(Choice(width=0.5, exit=2))
    names = {name for name, _ in sub.named_parameters()}
    assert sum("head" in name for name in names) == 4
    assert len(names) == 4 + 4  # two convolutions and one head
    for n in (1, 2, 5):
        x = images(n)
        with torch.no_grad():
            torch.testing.assert_close(sub(x), net(x, Choice(width=0.5, exit=2)))
    assert not sub.training
    sub.train().eval()


def test_layers_after_an_exit_do_not_run() -> None:
    net = exiting()
    seen: list[str] = []
    for name, module in net.model.named_children():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    net(images(2), Choice(exit=2))
    assert seen == ["0", "1", "2", "3"]


def test_training_an_exit_reaches_its_head_and_its_prefix() -> None:
    net = exiting().train()
    net(images(2), Choice(exit=2)).sum().backward()
    touched = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.split(".")[0] + "." + n.split(".")[1] for n in touched} == {
        "model.0", "model.2", "heads.1",
    }  # fmt: skip


def test_given_heads_are_used_and_left_in_their_mode() -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    net = pr.elastic(convnet(), images(2), exits={"3": None, "1": head.eval()})
    assert net.exits == ("1", "3")  # in the order in which they run
    assert net.heads[0] is head
    assert not head.training
    assert isinstance(net.heads[1], PooledHead)
    assert net.heads[1].training == net.model.training
    head[0].eval()
    with torch.no_grad():
        x = images(2)
        assert torch.equal(net(x, Choice(exit=1)), head(net.model[:2](x)))


def test_heads_follow_the_width() -> None:
    net = exiting(width=(0.5, 1.0))
    assert net.cost(Choice(width=0.5, exit=1)).params == (3 * 9 + 1) * 3 + 2 * 3 + 4 * 3 + 4


# --- per-input runs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "resnet", "vit", "bert", "swin", "gpt2"])
def test_a_batch_runs_as_its_examples_do_one_by_one(name: str) -> None:
    if name == "convnet":
        net, inputs = exiting(), {"input": images(12)}
    else:
        model, example, _ = hugging(name)
        exits = {
            "resnet": ("resnet.encoder.stages.0", "resnet.encoder.stages.1.layers.0"),
            "vit": ("vit.layers.0", "vit.layers.1"),
            "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
            "swin": ("swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0"),
            "gpt2": ("transformer.h.0", "transformer.h.1"),
        }[name]
        heads: Any = exits
        if name == "gpt2":
            heads = {e: nn.Linear(16, 40) for e in exits}
        net = pr.elastic(model, example, exits=heads, width=(0.5, 1.0))
        torch.manual_seed(1)
        inputs = {
            k: torch.randint(3, 40, (12, 7)) if k == "input_ids" else
            (torch.arange(7) < torch.randint(3, 8, (12, 1))).long() if k == "attention_mask" else
            torch.randn(12, 3, 32, 32) for k in example
        }  # fmt: skip
    policy = Confidence(middle(net, **inputs))
    run = net.adaptive(**inputs, policy=policy)
    assert len(set(run.exit.tolist())) > 1
    singles = [
        net.adaptive(**{k: v[i : i + 1] for k, v in inputs.items()}, policy=policy)
        for i in range(12)
    ]
    assert run.exit.tolist() == [int(s.exit) for s in singles]
    assert run.macs.tolist() == [int(s.macs) for s in singles]
    torch.testing.assert_close(run.logits, torch.cat([s.logits for s in singles]),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    # and each answer is that of its exit, run alone
    full = net.all_exits(**inputs)
    for i, exit in enumerate(run.exit.tolist()):
        answer = full[exit - 1]
        wanted = (answer if isinstance(answer, Tensor) else answer.logits)[i]
        torch.testing.assert_close(run.logits[i], wanted, rtol=1e-5, atol=1e-5)


def test_examples_that_left_are_not_computed() -> None:
    net, x = exiting(), images(12)
    rows: dict[str, int] = {}
    for name, module in net.model.named_children():
        module.register_forward_hook(lambda m, a, out, name=name: rows.update({name: len(out)}))
    net.adaptive(x, lambda answers: torch.arange(len(answers[-1])) < len(answers) + 1)
    assert [rows[n] for n in ("0", "2", "4", "6")] == [12, 10, 7, 3]


def test_macs_of_a_run_are_those_of_what_ran() -> None:
    net, x = exiting(width=(0.5, 1.0)), images(6)
    for choice in (Choice(width=0.5), Choice(width=1.0)):
        costs = net.exit_macs(choice)
        assert costs == sorted(costs)
        for exit in (1, 2, 3, 4):

            def leave(answers: list[Tensor], exit: int = exit) -> Tensor:
                return torch.full((len(answers[-1]),), len(answers) == exit)

            run = net.adaptive(x, leave, choice)
            assert run.exit.tolist() == [exit] * 6
            assert run.macs.tolist() == [costs[exit - 1]] * 6

            class Run(nn.Module):
                def forward(self, x: Tensor, net: Any, leave: Any, choice: Choice) -> Tensor:
                    return net.adaptive(x, leave, choice).logits

            assert profile(Run(), x, net, leave, choice).macs == 6 * costs[exit - 1]


def test_all_leave_and_nobody_leaves() -> None:
    net, x = exiting(), images(5)
    with torch.no_grad():
        first, *_, last = net.all_exits(x)
    run = net.adaptive(x, Confidence(0.0))
    assert run.exit.tolist() == [1] * 5
    assert torch.equal(run.logits, first)
    run = net.adaptive(x, Confidence(2.0))
    assert run.exit.tolist() == [4] * 5
    assert torch.equal(run.logits, last)
    assert net.adaptive(x[:1], Confidence(2.0)).exit.tolist() == [4]


def test_a_run_changes_nothing_and_is_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(),
                          nn.Linear(4 * 36, 3))  # fmt: skip
    net = pr.elastic(model, images(2), exits=("1",), width=(0.5, 1.0))
    before = snapshot(model)
    assert model.training
    runs = [net.adaptive(images(8), Confidence(0.4)).logits for _ in range(2)]
    assert torch.equal(*runs)
    calibrate(net, [images(8)], macs=0.95)
    assert unchanged(before, model)
    # statistics measured for a choice are used, in whatever mode the network is
    net.recalibrate(Choice(width=0.5), [images(8, 1)])
    got = net.adaptive(images(8), Confidence(2.0), Choice(width=0.5)).logits
    with torch.no_grad():
        assert torch.equal(got, net.eval()(images(8), Choice(width=0.5)))


def test_an_exit_after_a_block_that_is_skipped() -> None:
    model, inputs, _ = hugging("vit")
    net = pr.elastic(model, inputs, exits=("vit.layers.0", "vit.layers.1"), depth=(1, 2, 3))
    with torch.no_grad():
        hidden = model.vit(**inputs, output_hidden_states=True).hidden_states[1]
        assert torch.equal(net(**inputs, choice=Choice(depth=1, exit=2)), net.heads[1](hidden))
        run = net.adaptive(**inputs, policy=Confidence(2.0), choice=Choice(depth=1))
        assert same(run.logits, net(**inputs, choice=Choice(depth=1, exit=3)).logits)


# --- policies ---------------------------------------------------------------------------------


def test_scores() -> None:
    logits = torch.randn(50, 7, dtype=torch.float64)
    p = logits.softmax(-1)
    torch.testing.assert_close(Confidence(0).score(logits).double(), p.max(-1).values)
    torch.testing.assert_close(Entropy(0).score(logits).double(), (p * p.log()).sum(-1))
    assert Entropy(0.69)([torch.tensor([[0.0, 0.0]])]).tolist() == [False]
    assert Entropy(0.70)([torch.tensor([[0.0, 0.0]])]).tolist() == [True]  # ln 2 = 0.693...


def test_a_threshold_for_each_exit() -> None:
    net, x = exiting(), images(6)
    assert net.adaptive(x, Confidence((2.0, 0.0, 2.0))).exit.tolist() == [2] * 6
    assert net.adaptive(x, Entropy((-1.0, -1.0, 9.0))).exit.tolist() == [3] * 6
    with pytest.raises(RequestError, match="exit 2 has none"):
        net.adaptive(x, Confidence((2.0,)))


def test_patience_counts_votes_in_a_row() -> None:
    def votes(*classes: int) -> list[Tensor]:
        return [nn.functional.one_hot(torch.tensor([c]), 3).float() for c in classes]

    policy = Patience(3)
    assert [bool(policy(votes(*v))) for v in ((1, 1), (1, 1, 1), (0, 1, 1, 1), (1, 1, 0, 1))] == [
        False, True, True, False,
    ]  # fmt: skip
    net, x = exiting(), images(12)
    run, answers = net.adaptive(x, Patience(2)), net.all_exits(x)[:3]
    classes = torch.stack([a.argmax(-1) for a in answers])
    for i, exit in enumerate(run.exit.tolist()):
        agree = [e for e in (2, 3) if classes[e - 1, i] == classes[e - 2, i]]
        assert exit == (agree[0] if agree else 4)


def test_a_gate_learns_whom_to_trust() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (400,))
    sure = torch.rand(400) < 0.5
    guess = torch.where(sure, labels, (labels + 1) % 3)
    strength = torch.where(sure, 4.0, 0.5)
    logits = nn.functional.one_hot(guess, 3) * strength[:, None] + 0.1 * torch.randn(400, 3)
    gate = Gate(1).fit([logits], labels)
    assert (gate([logits]) == sure).float().mean() > 0.98
    assert gate.score(logits, 1)[sure].mean() > 0.95
    # as a policy
    net, x = exiting(), images(12)
    classes = net.model(x).argmax(-1)
    gate = Gate(3).fit([a.detach() for a in net.all_exits(x)[:3]], classes)
    run = net.adaptive(x, gate)
    assert ((run.exit >= 1) & (run.exit <= 4)).all()


def test_a_function_is_a_policy() -> None:
    net, x = exiting(), images(4)
    run = net.adaptive(x, lambda answers: torch.arange(len(answers[-1])) == 0)
    assert run.exit.tolist() == [1, 2, 3, 4]
    assert net.adaptive(x, policy=lambda a: a[-1][:, 0] > 1e9).exit.tolist() == [4] * 4


@pytest.mark.parametrize("macs", [0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("policy", [Confidence, Entropy])
def test_calibration_keeps_the_budget(macs: float, policy: type) -> None:
    net, data = exiting(width=(0.5, 1.0)), [images(32, s) for s in range(3)]
    for choice in (None, Choice(width=0.5)):
        found = calibrate(net, data, macs, policy, choice)
        full = net.exit_macs(choice)[-1]
        runs = [net.adaptive(x, found, choice=choice).macs for x in data]
        spent = torch.cat(runs).double() / full
        assert spent.mean() <= macs
        # the strictest that does: the next stricter threshold would not
        with torch.no_grad():
            exits = [net.all_exits(x, choice=choice)[:-1] for x in data]
        answers = torch.cat([torch.stack([found.score(a) for a in e], 1) for e in exits])
        own = found.threshold if policy is Confidence else -found.threshold
        above = answers[answers > own]
        if len(above):
            stricter = policy(float(above.min()) if policy is Confidence else -float(above.min()))
            runs = [net.adaptive(x, stricter, choice=choice).macs for x in data]
            spent = torch.cat(runs).double()
            assert (spent / full).mean() > macs


def test_calibration_reads_keywords_and_labels() -> None:
    model, inputs, _ = hugging("bert")
    net = pr.elastic(model, inputs, exits=("bert.encoder.layer.0",))
    batch = {**inputs, "labels": torch.tensor([0, 1])}
    policy = calibrate(net, [batch], macs=0.8)
    assert net.adaptive(**inputs, policy=policy).macs.double().mean() <= 0.8 * net.exit_macs()[-1]
    plain = exiting()
    assert calibrate(plain, [(images(4), torch.zeros(4))], 0.7) == calibrate(
        plain, [images(4)], 0.7
    )


# --- refusals ---------------------------------------------------------------------------------


def test_requests_that_cannot_be_served() -> None:
    net, x = exiting(), images(4)
    with pytest.raises(RequestError, match="has no exits"):
        pr.elastic(convnet(), x, width=(0.5, 1.0)).adaptive(x, Confidence(0.5))
    with pytest.raises(RequestError, match="has no exits"):
        calibrate(pr.elastic(convnet(), x, width=(0.5, 1.0)), [x], 0.5)
    with pytest.raises(RequestError, match="needs a policy"):
        net.adaptive(x)
    with pytest.raises(RequestError, match="at least one example"):
        net.adaptive(x[:0], Confidence(0.5))
    with pytest.raises(RequestError, match="no data"):
        calibrate(net, [], 0.5)
    with pytest.raises(RequestError, match="first exit alone costs"):
        calibrate(net, [x], 0.01)
    for budget in (0, -1, float("nan")):
        with pytest.raises(RequestError, match="no budget"):
            calibrate(net, [x], budget)
    for answer in (True, torch.ones(4), torch.ones(3, dtype=torch.bool), None):
        with pytest.raises(RequestError, match=r"boolean tensor .* each of the 4 examples"):
            net.adaptive(x, lambda _, answer=answer: answer)


def test_exits_where_the_batch_cannot_shrink() -> None:
    class Outside(nn.Module):  # the sum around the exit's module holds on to the whole batch
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x + self.b(self.a(x)))

    for n in (1, 2, 3):
        with pytest.raises(RequestError, match=r"After the exit 'a' .* smaller batch"):
            pr.elastic(Outside(), torch.randn(n, 8), exits=("a",))

    class Twice(Outside):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(self.a(x))))

    with pytest.raises(RequestError, match="'a' runs more than once"):
        pr.elastic(Twice(), torch.randn(2, 8), exits=("a",))

    class Unused(Outside):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(x))

    with pytest.raises(RequestError, match="'a' passes on no tensor"):
        pr.elastic(Unused(), torch.randn(2, 8), exits=("a",))


def test_exits_of_networks_that_are_no_classifiers_need_heads() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1))
    with pytest.raises(RequestError, match=r"head is built only for \(batch, classes\)"):
        pr.elastic(model, images(2), exits=("1",))
    net = pr.elastic(model, images(2), exits={"1": nn.Conv2d(8, 3, 1)})
    run = net.adaptive(images(4), lambda a: torch.arange(len(a[-1])) % 2 == 0)
    assert run.logits.shape == (4, 3, 8, 8)
    assert run.exit.tolist() == [1, 2, 1, 2]


def test_pooled_head() -> None:
    x = torch.randn(2, 5, 3, 3)
    head = PooledHead(5, 7, channels_last=False)
    wanted = head.linear(head.norm(x.flatten(2).mean(2)))
    torch.testing.assert_close(head(x), wanted)
    tokens = x.flatten(2).transpose(1, 2)
    head.channels_last = True
    torch.testing.assert_close(head(tokens), wanted)
    assert head(torch.randn(2, 5)).shape == (2, 7)
