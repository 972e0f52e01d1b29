"""Parametrisations: the table, both forms, agreement with mup, and every kind of network."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pantarhei.errors import RequestError
from pantarhei.learning.families import Networks, Transformers
from pantarhei.learning.parametrization import base_shapes, lazy, parametrize, random_features


def mlp(width: int, depth: int = 1) -> nn.Module:
    hidden = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), *hidden, nn.Linear(width, 3))


class ConvNet(nn.Module):
    def __init__(self, width: int, depth: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width),
                nn.Tanh(),
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.Conv2d(width, width, 1),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        h = self.stem(x.view(-1, 2, 4, 4))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h.mean((2, 3)))


class ResNet(nn.Module):
    """Post-activation, with batch norms and a projection: branches end in a norm."""

    def __init__(self, width: int, depth: int = 2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.BatchNorm2d(width))
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleDict(
                    {
                        "conv": nn.Conv2d(w // 2 if i == 0 and s else w, w, 3, padding=1),
                        "norm": nn.BatchNorm2d(w),
                        "skip": nn.Conv2d(w // 2, w, 1) if i == 0 and s else nn.Identity(),
                    }
                )
                for i in range(depth)
            )
            for s, w in enumerate((width, 2 * width))
        )
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x):
        h = self.stem(x.view(-1, 2, 4, 4))
        for stage in self.stages:
            for block in stage:
                h = torch.tanh(block["skip"](h) + block["norm"](block["conv"](h)))
        return self.head(h.mean((2, 3)))


class Transformer(nn.Module):
    """Tied embeddings, learned positions, multi-head attention, norms and biases."""

    def __init__(self, width: int, depth: int = 2):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.position = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln": nn.LayerNorm(width),
                    "attention": nn.MultiheadAttention(width, 2, batch_first=True),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(),
                        nn.Linear(2 * width, width),
                    ),
                }
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 7)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed((x[:, :5] * 3).long().abs() % 7) + self.position
        for block in self.blocks:
            z = block["ln"](h)
            h = h + block["attention"](z, z, z, need_weights=False)[0]
            h = h + block["mlp"](h)
        return self.head(self.norm(h))[:, -1, :3]


ZOO = {
    "mlp": (mlp, ()),
    "convnet": (ConvNet, ("blocks.*.3",)),
    "convnet, hooks": (ConvNet, ("blocks.*",)),
    "resnet": (ResNet, ("stages.*.*.norm",)),
    "transformer": (Transformer, ("blocks.*.attention", "blocks.*.mlp.3")),
}
KINDS_OF = [
    (name, kind)
    for kind in ("sp", "ntp", "mup", "depth-mup")
    for name, (_, branches) in ZOO.items()
    if kind != "depth-mup" or branches
]
HUGGING = {
    "gpt2": Transformers("gpt2", heads=2, config={"vocab_size": 11, "n_positions": 8}),
    "gpt2, more heads": Transformers(
        "gpt2", head_size=8, config={"vocab_size": 11, "n_positions": 8}
    ),
    "bert": Transformers("bert", heads=2, config={"vocab_size": 11, "max_position_embeddings": 8}),
}


def build(factory, width, depth, seed=0):
    torch.manual_seed(seed)
    return factory(width=width, depth=depth).double()


def output(model, x):
    if hasattr(model, "config"):
        ids = (x[:, :6] * 4).long().abs() % 11
        return model(ids).logits[:, -1, :3]
    return model(x)


def trajectory(parametrized, steps=4, lr=0.02, **options):
    """Outputs before every step of training on fixed data."""
    torch.manual_seed(5)
    x, y = torch.randn(12, 32, dtype=torch.float64), torch.randint(3, (12,))
    if isinstance(parametrized.model, nn.Sequential):
        x = x[:, :6]
    optimizer = parametrized.optimizer(lr, **options)
    outputs = []
    for _ in range(steps):
        f = output(parametrized.model, x)
        outputs.append(f.detach().clone())
        optimizer.zero_grad()
        F.cross_entropy(f, y).backward()
        optimizer.step()
    return torch.stack(outputs)


def both_forms(factory, branches, width, depth, kind, optimizer, base, init="own", **options):
    found = []
    for form in ("effective", "multiplier"):
        model = build(factory, width, depth)
        torch.manual_seed(2)
        parametrized = parametrize(
            model, build(factory, *base, seed=1), kind=kind, optimizer=optimizer, form=form,
            init=init, branches=branches,
        )  # fmt: skip
        found.append(trajectory(parametrized, **options))
    return found


@pytest.mark.parametrize(("name", "kind"), [pair for pair in KINDS_OF if pair[1] != "sp"])
@pytest.mark.parametrize("optimizer", ("sgd", "adam", "adamw"))
def test_both_forms_follow_the_same_function_trajectory(name, kind, optimizer):
    factory, branches = ZOO[name]
    options = {"weight_decay": 0.1} if optimizer == "adamw" else {}
    if optimizer == "sgd":
        options |= {"momentum": 0.9, "weight_decay": 0.01}
    effective, multiplier = both_forms(
        factory, branches, 16, 4, kind, optimizer, (8, 4 if name == "mlp" else 2), **options
    )
    assert (effective[-1] - effective[0]).abs().max() > 1e-3
    torch.testing.assert_close(effective, multiplier, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", HUGGING)
@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
def test_both_forms_agree_on_hugging_face_models(name, optimizer):
    pytest.importorskip("transformers")
    family = HUGGING[name]
    kind = "mup" if name == "bert" else "depth-mup"
    effective, multiplier = both_forms(
        family, family.branches, 32, 4, kind, optimizer, (16, 2), steps=3
    )
    assert (effective[-1] - effective[0]).abs().max() > 1e-4
    torch.testing.assert_close(effective, multiplier, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "kind"), KINDS_OF)
def test_at_the_bases_sizes_nothing_changes(name, kind):
    factory, branches = ZOO[name]
    model, base = build(factory, 8, 2), build(factory, 8, 2)
    before = copy.deepcopy(model)
    found = parametrize(model, base, kind=kind, optimizer="adam", branches=branches)
    assert {s.lr for s in found.scalings.values()} == {1.0}
    x = torch.randn(4, 32, dtype=torch.float64)[:, : 6 if name == "mlp" else 32]
    torch.testing.assert_close(model(x), before(x), rtol=1e-12, atol=1e-12)


def test_the_absolute_table():
    """The published table with r the dimensions themselves: N, D, and L branches."""
    n, d, depth = 32, 6, 4
    family = Networks(inputs=d, outputs=3, skip=True)
    expect = {
        # effective weights: (initial variance, SGD's rate, Adam's rate) of input, hidden, output
        "ntp": [
            (1 / d, 1 / d, (d * n) ** -0.5),
            (1 / n, 1 / n, n**-1.5),
            (1 / n, 1 / n, 1 / n),
        ],
        "mup": [(1 / d, n / d, d**-0.5), (1 / n, 1.0, 1 / n), (1 / n**2, 1 / n, 1 / n)],
        "sp": [(1 / d, 1, 1), (1 / n, 1, 1), (1 / n, 1, 1)],
        # folded into the branch's last map: variance and SGD's rate / L, Adam's rate / L
        "depth-mup": [
            (1 / d, n / d, d**-0.5),
            (1 / n / depth, 1 / depth, 1 / n / depth),
            (1 / n**2, 1 / n, 1 / n),
        ],
    }
    for kind, rows in expect.items():
        options = {"roles": family.roles, "kind": kind, "branches": family.branches}
        sgd = parametrize(family(n, depth), optimizer="sgd", **options).scalings
        adam = parametrize(family(n, depth), optimizer="adam", **options).scalings
        names = ("stem.weight", "blocks.2.1.weight", "head.weight")
        for name, (variance, of_sgd, of_adam) in zip(names, rows, strict=True):
            fan_in = d if name == "stem.weight" else n
            assert sgd[name].fan_in == fan_in
            assert sgd[name].init ** 2 == pytest.approx(variance), (kind, name)
            assert sgd[name].lr == pytest.approx(of_sgd), (kind, name)
            assert adam[name].lr == pytest.approx(of_adam), (kind, name)


def test_in_the_multiplier_form_sgd_has_one_rate():
    """gamma^2 eta_0: N eta_0 under muP and eta_0 under NTP, for every layer."""
    family = Networks(inputs=6, outputs=3)
    for kind, rate in (("mup", 32.0), ("ntp", 1.0)):
        found = parametrize(family(32, 3), roles=family.roles, kind=kind, form="multiplier")
        assert {s.lr for s in found.scalings.values()} == {rate}
        draws = torch.cat([p.detach().flatten() for p in found.model.parameters()])
        assert draws.std().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("optimizer", ("sgd", "adam"))
def test_the_mup_package_gives_the_same_rates_and_initial_sizes(optimizer):
    mup = pytest.importorskip("mup")

    def theirs(width):
        return nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU(),
            mup.MuReadout(2 * width, 3),
        )  # fmt: skip

    def ours(width):
        return nn.Sequential(
            nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 2 * width), nn.ReLU(),
            nn.Linear(2 * width, 3),
        )  # fmt: skip

    def standard(width, model):
        # the base's initial sizes: N(0, 1/fan_in) at width 16
        return [0.0 if p.dim() < 2 else p.shape[1] ** -0.5 for p in model(width).parameters()]

    width, base = 256, 16
    model = theirs(width)
    mup.set_base_shapes(model, theirs(base), delta=theirs(2 * base))
    for p, std in zip(model.parameters(), standard(base, theirs), strict=True):
        if p.dim() >= 2:
            mup.init.normal_(p, std=std)
    make = mup.MuSGD if optimizer == "sgd" else mup.MuAdam
    group_of = {
        id(p): g for g in make(model.parameters(), lr=1.0).param_groups for p in g["params"]
    }
    torch.manual_seed(0)
    found = parametrize(ours(width), ours(base), optimizer=optimizer, init="normal")
    rows = zip(
        model.named_parameters(),
        found.model.named_parameters(),
        standard(base, ours),
        strict=True,
    )
    for (name, p), (_, q), std in rows:
        # Their readout divides by the width ratio, so its weight is r times the effective one.
        readout = width / base if name == "4.weight" else 1.0
        rate = group_of[id(p)]["lr"] / (readout**2 if optimizer == "sgd" else readout)
        assert found.scalings[name].lr == pytest.approx(rate), name
        if p.dim() >= 2:
            wanted = std * p.infshape.width_mult() ** -0.5 if p.infshape.ninf() == 2 else std
            wanted = wanted / readout
            assert p.std().item() / readout == pytest.approx(wanted, rel=0.06), name
            assert q.std().item() == pytest.approx(wanted, rel=0.06), name


def test_attention_logits_are_scaled_by_the_head_size():
    """1/d_head, equal to 1/sqrt(d_head) at the base; more heads of one size change nothing."""
    x = torch.randn(2, 5, 32, dtype=torch.float64)

    class Attention(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.mix = nn.MultiheadAttention(width, heads, batch_first=True)

        def forward(self, x):
            return self.mix(x, x, x)[1]

    torch.manual_seed(0)
    model = Attention(32, 2).double()
    plain = copy.deepcopy(model)
    parametrize(model, Attention(8, 2).double(), form="effective", init="normal")
    with torch.no_grad():
        plain.mix.in_proj_weight.copy_(model.mix.parametrizations.in_proj_weight.original)
        plain.mix.in_proj_bias.copy_(model.mix.parametrizations.in_proj_bias.original)
        plain.mix.in_proj_weight[:32] *= (16 / 4) ** -0.5
    torch.testing.assert_close(model(x), plain(x))
    more = parametrize(Attention(32, 8).double(), Attention(8, 2).double(), init="normal").model
    assert not hasattr(more.mix, "parametrizations")


def test_hugging_face_attention_is_scaled():
    pytest.importorskip("transformers")
    family = HUGGING["gpt2"]
    model, base = family(32, 2), family(8, 1)
    parametrize(model, base, branches=family.branches)
    assert model.transformer.h[1].attn.scaling == pytest.approx(1 / 16 * 4**0.5)
    absolute = parametrize(
        family(32, 2), roles={"*wte*": "input", "*wpe*": "input", "*": "hidden"}
    ).model
    assert absolute.transformer.h[1].attn.scaling == pytest.approx(1 / 16)
    hidden = family(32, 2)
    with pytest.raises(RequestError, match="head size"):
        parametrize(hidden, base_shapes(base))


def test_hand_written_attention_gets_a_hook_on_its_queries():
    class Attention(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.q = nn.Linear(width, width)
            self.head = nn.Linear(width, 2)

        def forward(self, x):
            return self.q(x)

    torch.manual_seed(0)
    x, model, base = torch.randn(3, 16), Attention(16), Attention(4)
    with_hook = copy.deepcopy(model)
    parametrize(model, base)
    parametrize(with_hook, base, queries={"q": 4.0})
    torch.testing.assert_close(with_hook(x), 0.5 * model(x))
    with pytest.raises(RequestError, match="queries"):
        parametrize(Attention(16), Attention(4), queries={"query": 4.0})


def test_tied_embeddings_are_multiplied_as_an_output():
    model = Transformer(32)
    plain = copy.deepcopy(model)
    found = parametrize(model, Transformer(8), kind="mup", init="normal", optimizer="adam")
    assert model.head.weight is model.embed.weight
    assert found.scalings["embed.weight"].role == "input"
    assert found.scalings["embed.weight"].lr == 1.0
    plain.load_state_dict(model.state_dict(), strict=False)
    h = torch.randn(3, 32)
    torch.testing.assert_close(model.head(h), F.linear(h, model.embed.weight) / 4)


def test_weight_decay_per_step_is_the_same_everywhere():
    found = parametrize(mlp(64), mlp(8), optimizer="adamw")
    groups = found.groups(0.1, weight_decay=0.5)
    assert len(groups) > 1
    assert [g["lr"] * g["weight_decay"] for g in groups] == pytest.approx([0.05] * len(groups))
    assert len({id(p) for g in groups for p in g["params"]}) == len(list(mlp(8).parameters()))


def test_own_initialisation_keeps_the_draws_and_takes_the_bases_size():
    torch.manual_seed(0)
    model, base = mlp(256), mlp(32)
    before = copy.deepcopy(model)
    found = parametrize(model, base, kind="mup")
    there = dict(base.named_parameters())
    for (name, p), (_, q) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        ratio = (p / q).flatten()
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
        wanted = found.scalings[name].init * there[name].square().mean().sqrt()
        torch.testing.assert_close(p.square().mean().sqrt(), wanted)
    assert found.scalings["4.weight"].init == pytest.approx(1 / 8)
    assert found.scalings["2.weight"].init == pytest.approx(8**-0.5)
    zero = parametrize(mlp(64), base, zero_output=True).model
    assert zero[4].weight.abs().max() == 0 and zero[2].weight.abs().max() > 0


def test_gains_are_kept_apart_from_the_width():
    torch.manual_seed(0)
    found = parametrize(
        mlp(256), mlp(16), init="normal", gain=lambda name: 3.0 if name[0] == "2" else 1.0
    )
    assert found.model[2].weight.std().item() == pytest.approx(3 / 16, rel=0.02)
    assert found.model[0].weight.std().item() == pytest.approx(6**-0.5, rel=0.1)
    assert found.model[4].weight.std().item() == pytest.approx(16**0.5 / 256, rel=0.1)
    assert found.model[2].bias.abs().max() == 0


def test_depth_is_counted_in_branches_and_adams_rate_falls_in_the_blocks():
    model, base = build(Transformer, 16, 8), build(Transformer, 16, 2)
    branches = ("blocks.*.attention", "blocks.*.mlp.3")
    found = parametrize(model, base, kind="depth-mup", optimizer="adam", branches=branches)
    rates = {name: s.lr for name, s in found.scalings.items()}
    assert rates["blocks.7.mlp.1.weight"] == pytest.approx(0.5)
    assert rates["blocks.7.ln.weight"] == pytest.approx(0.5)
    assert rates["blocks.0.mlp.3.weight"] == pytest.approx(0.25)  # folded as well
    assert rates["embed.weight"] == rates["norm.weight"] == 1.0
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    attention = model.blocks[0]["attention"]
    torch.testing.assert_close(attention(x, x, x)[0], 0.5 * attention.forward(x, x, x)[0])
    free = parametrize(
        build(Transformer, 16, 8), base, kind="depth-mup", branches=branches, branch_exponent=1.0
    )
    assert free.scalings["blocks.0.mlp.3.weight"].init == pytest.approx(0.25)


def test_random_features_train_the_output_alone():
    found = random_features(parametrize(mlp(16), mlp(8), form="multiplier"))
    trained = {n for n, p in found.model.named_parameters() if p.requires_grad}
    assert trained == {"4.parametrizations.weight.original", "4.bias"}
    assert sum(len(g["params"]) for g in found.groups(0.1)) == 2
    with pytest.raises(RequestError, match="no output weight"):
        random_features(parametrize(mlp(8), mlp(8)))
    random_features(parametrize(mlp(8), mlp(8), delta=mlp(16)))


def test_lazy_training_moves_weights_by_one_over_the_scale():
    """f moves as much, the weights by 1/alpha, and f approaches its linearisation."""
    moved, outputs = [], []
    for alpha in (1.0, 10.0, 100.0, 1000.0):
        torch.manual_seed(0)
        control = lazy(parametrize(mlp(16).double(), mlp(8).double()), alpha)
        start = nn.utils.parameters_to_vector(control.model.parameters()).detach()
        torch.manual_seed(1)
        x, y = torch.randn(8, 6).double(), torch.randn(8, 3).double()
        optimizer = control.optimizer(0.05)
        assert control.model(x).abs().max() == 0
        for _ in range(20):
            optimizer.zero_grad()
            (0.5 * (control.model(x) - y).square().sum(1).mean()).backward()
            optimizer.step()
        end = nn.utils.parameters_to_vector(control.model.parameters()).detach()
        moved.append((end - start).norm().item())
        outputs.append(control.model(x).detach())
    assert moved[2] / moved[3] == pytest.approx(10.0, rel=0.05)
    far = (outputs[2] - outputs[3]).norm()
    assert far < 0.2 * (outputs[1] - outputs[3]).norm()
    assert outputs[3].norm() > 0.1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "needs a base model"),
        ({"kind": "mu-p", "roles": {"*": "hidden"}}, "Did you mean 'mup'"),
        ({"optimizer": "lion", "roles": {"*": "hidden"}}, "optimizer='lion'"),
        ({"roles": {"*": "middle"}}, "role='middle'"),
        ({"roles": {"layer*": "hidden"}}, "no parameter is called 'layer"),
        ({"roles": {"0.*": "input"}}, "no rule of roles="),
        ({"roles": {"*": "hidden"}, "init": "own"}, "init='own'"),
        ({"base": {"0.weight": [8, 6]}}, "the base has no parameter"),
        ({"base": {k: [*v, 1] for k, v in base_shapes(mlp(8)).items()}}, "same architecture"),
        ({"base": mlp(8, depth=2)}, None),
        ({"base": mlp(8), "kind": "depth-mup"}, "residual branches"),
        ({"base": mlp(8), "kind": "depth-mup", "branches": ["blocks.*"]}, "no module is called"),
    ],
)
def test_bad_requests_are_one_sentence_and_leave_the_model_alone(arguments, sentence):
    model = mlp(16)
    before = copy.deepcopy(model.state_dict())
    if sentence is None:
        sentence = "same architecture|the base has no parameter|cannot be told"
        model = mlp(16, depth=3)
        before = copy.deepcopy(model.state_dict())
    with pytest.raises(RequestError, match=sentence) as caught:
        parametrize(model, **arguments)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_roles_that_shapes_cannot_tell_are_asked_for():
    class Own(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.mix = nn.Parameter(torch.ones(3, width))

    with pytest.raises(RequestError, match="'mix' of shape"):
        parametrize(Own(8), Own(4))
    found = parametrize(Own(8), Own(4), roles={"mix": "output"})
    assert found.scalings["mix"].init == pytest.approx(0.5)
    with pytest.raises(RequestError, match="already"):
        parametrize(parametrize(mlp(8), mlp(4), form="multiplier").model, mlp(4), form="multiplier")


def test_base_shapes_come_from_json_and_the_meta_device():
    shapes = json.loads(json.dumps(base_shapes(mlp(8))))
    with torch.device("meta"):
        meta = mlp(8)
    torch.manual_seed(0)
    one = parametrize(mlp(32), shapes, init="normal").scalings
    two = parametrize(mlp(32), meta).scalings
    assert one == two == parametrize(mlp(32), mlp(8)).scalings
    with pytest.raises(RequestError, match="init='own'"):
        parametrize(mlp(32), meta, init="own")
