"""The tangent kernel against dense Jacobians, closed forms and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pantarhei.probes import tangent_kernel as tk

DOUBLE = torch.float64
KINDS = ("full", "diagonal", "trace", "pseudo", 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class InPlace(nn.Module):
    """In-place operations, a layer called twice, a weight outside any layer, one that is unused."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.act, self.spare = nn.ReLU(inplace=True), nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        h = self.act(self.first(x))
        h = self.again(h) * self.scale
        h += 1.0
        return self.last(self.again(torch.tanh(h)))


class Tied(nn.Module):
    """A weight that is used by a layer, by another layer and by hand."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(4)

    def forward(self, tokens):
        h = self.norm(self.mix(self.embed(tokens)))
        h = h + torch.sin(h @ self.mix.weight)
        return self.head(h)[:, -1, :3]


class Frames(nn.Module):
    """Convolutions over time, strided, dilated and grouped; an embedding with padding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.conv = nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2)
        self.grouped, self.norm = nn.Conv1d(6, 6, 3, groups=3, padding="same"), nn.GroupNorm(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        h = torch.tanh(self.conv(self.embed(tokens).mT))
        return self.head(self.norm(self.grouped(h)).mean(2))


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip


def bert():
    transformers = pytest.importorskip("transformers", reason="needs pantarhei[transformers]")
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=12, max_position_embeddings=8, num_labels=3,
        )
    )  # fmt: skip


def models():
    tokens = torch.randint(1, 7, (5, 4))
    padded = torch.randint(0, 9, (5, 6))
    text = {"input_ids": tokens, "attention_mask": (torch.rand(5, 4) < 0.8).long()}
    text["attention_mask"][:, 0] = 1
    mlp = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return {
        "mlp": lambda: (mlp, torch.randn(5, 5)),
        "convnet": lambda: (trained_statistics(convnet()), torch.randn(5, 2, 6, 6)),
        "in place": lambda: (InPlace(), torch.randn(5, 5)),
        "tied": lambda: (Tied(), tokens),
        "frames": lambda: (Frames(), padded),
        "lstm": lambda: (Recurrent(), torch.randn(5, 4, 3)),
        "transformer": lambda: (bert(), text),
    }


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


def trained_statistics(model):
    for _ in range(3):
        model(torch.randn(8, 2, 6, 6) * 2 + 1)
    return model


def rows(inputs, chosen):
    if isinstance(inputs, dict):
        return {name: t[chosen] for name, t in inputs.items()}
    return inputs[chosen]


def jacobian(model, inputs):
    """Return the Jacobian (n, o, size), slowly: an input and an output at a time."""
    model = copy.deepcopy(model).to(DOUBLE).eval()
    weights = [p for p in model.parameters() if p.requires_grad]
    found = []
    for i in range(len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)):
        one = rows(inputs, slice(i, i + 1))
        if isinstance(one, dict):
            output = model(**one).logits[0]
        else:
            output = model(one.to(DOUBLE) if one.is_floating_point() else one)[0]
        for value in output:
            grads = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            flat = [
                torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)
            ]
            found.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(found).view(-1, len(output), sum(w.numel() for w in weights))


def expected(j, other, kind, rates=1.0):
    full = torch.einsum("iap,jbp->ijab", j * rates, other)
    if kind == "full":
        return full
    if kind == "diagonal":
        return full.diagonal(dim1=2, dim2=3)
    if kind == "trace":
        return full.diagonal(dim1=2, dim2=3).mean(2)
    if kind == "pseudo":
        return full.sum((2, 3)) / full.shape[2]
    return full[:, :, kind, kind]


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("method", ["layers", "contraction", "products"])
def test_every_kind_is_the_dense_product(name, method):
    model, inputs = models()[name]()
    j = jacobian(model, inputs)
    others = rows(inputs, slice(1, 4))
    for kind in KINDS:
        found = tk.ntk(model, inputs, kind=kind, method=method, dtype=DOUBLE)
        torch.testing.assert_close(found, expected(j, j, kind), rtol=1e-10, atol=1e-10)
        found = tk.ntk(model, inputs, others, kind=kind, method=method, dtype=DOUBLE)
        torch.testing.assert_close(found, expected(j, j[1:4], kind), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", models())
def test_rates_weigh_every_parameter(name):
    model, inputs = models()[name]()
    j = jacobian(model, inputs)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rates = {
        n: (torch.rand_like(p) if k % 2 else float(k % 4)) for k, (n, p) in enumerate(named.items())
    }
    flat = torch.cat([torch.as_tensor(rates[n]).expand_as(p).flatten() for n, p in named.items()])
    for method in ("layers", "contraction", "products"):
        for kind in ("full", "trace"):
            found = tk.ntk(model, inputs, kind=kind, rates=rates, dtype=DOUBLE, method=method)
            torch.testing.assert_close(
                found, expected(j, j, kind, flat.to(DOUBLE)), rtol=1e-10, atol=1e-10
            )


@pytest.mark.parametrize("name", models())
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_whole(name, kind):
    model, inputs = models()[name]()
    whole = tk.ntk(model, inputs, kind=kind, dtype=DOUBLE)
    for memory in (1, 40_000):
        blocks = tk.ntk(model, inputs, kind=kind, dtype=DOUBLE, memory=memory)
        torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)
        others = rows(inputs, slice(0, 2))
        blocks = tk.ntk(model, inputs, others, kind=kind, dtype=DOUBLE, memory=memory)
        torch.testing.assert_close(blocks, whole[:, :2], rtol=1e-12, atol=1e-12)
