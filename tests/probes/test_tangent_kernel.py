"""The tangent kernel against dense Jacobians, closed forms and finite differences."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.probes import tangent_kernel as tk
from pantarhei.probes.curvature import GaussNewton
from pantarhei.probes.eigen import lanczos

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
def test_blocks_are_the_whole(name):
    model, inputs = models()[name]()
    inputs = rows(inputs, slice(0, 3))
    others = rows(inputs, slice(0, 2))
    for kind, memory in (("full", 1), ("trace", 1), ("diagonal", 40_000), (1, 10_000)):
        whole = tk.ntk(model, inputs, kind=kind, dtype=DOUBLE)
        blocks = tk.ntk(model, inputs, kind=kind, dtype=DOUBLE, memory=memory)
        torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)
        blocks = tk.ntk(model, inputs, others, kind=kind, dtype=DOUBLE, memory=memory)
        torch.testing.assert_close(blocks, whole[:, :2], rtol=1e-12, atol=1e-12)


def test_layers_explain_what_they_should():
    """All but these few weights are contracted: else the layers' way would be no way at all."""
    left = {
        "mlp": set(),
        "convnet": set(),
        "in place": {"scale"},
        "tied": {"embed.weight", "mix.weight", "mix.bias"},
        "frames": set(),
        "lstm": {f"cell.{w}_{s}_l0" for w in ("weight", "bias") for s in ("ih", "hh")},
    }
    for name, expected_left in left.items():
        model, inputs = models()[name]()
        outputs = tk.Outputs(model, inputs, dtype=DOUBLE)
        rates = tk._rates(None, outputs)
        pulled, _ = tk._pulled(outputs, "full")
        rows_of = tk._Rows(outputs, rates, pulled, layers=True)
        named = {n for n, _ in model.named_parameters() if not n.startswith("spare")}
        assert named - set(rows_of.backprop.factors(slice(0, 5))) == expected_left


class Mixing(nn.Module):
    """A model whose outputs depend on the whole batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x):
        h = self.layer(x)
        return h - h.mean(0) / 2


def test_each_input_is_taken_by_itself():
    model, x = Mixing(), torch.randn(4, 5)
    j = jacobian(model, x)
    found = tk.ntk(model, x, dtype=DOUBLE)
    torch.testing.assert_close(found, expected(j, j, "full"), rtol=1e-10, atol=1e-10)


def test_linear_model_is_the_gram_matrix():
    x, others = torch.randn(6, 4, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    model = nn.Linear(4, 2, bias=False).double()
    full = torch.einsum("ij,ab->ijab", x @ x.T, torch.eye(2, dtype=DOUBLE))
    torch.testing.assert_close(tk.ntk(model, x), full, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(tk.ntk(model, x, others, kind="trace"), x @ others.T)
    torch.testing.assert_close(tk.ntk(nn.Linear(4, 2).double(), x, kind="trace"), x @ x.T + 1)


class TwoLayer(nn.Module):
    """f = a^T B x / (gamma sqrt(N D)): the solvable case of the lr-transfer sheet."""

    def __init__(self, width, inputs, gamma):
        super().__init__()
        self.a = nn.Parameter(torch.randn(width, dtype=DOUBLE))
        self.b = nn.Parameter(torch.randn(width, inputs, dtype=DOUBLE))
        self.scale = gamma * (width * inputs) ** 0.5

    def forward(self, x):
        return (x @ self.b.T @ self.a / self.scale)[:, None]


def test_two_layer_linear_network_has_its_closed_form():
    width, inputs, gamma = 7, 4, 3.0
    model, x = TwoLayer(width, inputs, gamma), torch.randn(5, inputs, dtype=DOUBLE)
    a, b = model.a.detach(), model.b.detach()
    metric = (a @ a * torch.eye(inputs, dtype=DOUBLE) + b.T @ b) / (width * inputs)
    for method in ("layers", "contraction", "products"):
        kernel = tk.ntk(model, x, rates=gamma**2, kind="trace", method=method)
        torch.testing.assert_close(kernel, x @ metric @ x.T, rtol=1e-12, atol=1e-12)
    whitened = tk.ntk(model, torch.eye(inputs, dtype=DOUBLE), rates=gamma**2, kind=0)
    top = (a @ a + torch.linalg.svdvals(b)[0] ** 2) / (width * inputs)
    torch.testing.assert_close(tk.eigenvalues(whitened)[0], top)


def test_top_eigenvalue_over_n_is_that_of_gauss_newton():
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(6, 5)
    target = torch.randn(6, 2, dtype=DOUBLE)

    def loss(m, batch):
        return (m(batch) - target).square().sum() / (2 * 6)

    gauss_newton = GaussNewton(model, loss, x, dtype=DOUBLE)
    kernel = tk.TangentKernel(model, x, dtype=DOUBLE)
    top = lanczos(kernel, 3, tol=1e-9).values / 6
    exact = tk.eigenvalues(tk.ntk(model, x, dtype=DOUBLE))[:3] / 6
    torch.testing.assert_close(top, exact, rtol=1e-10, atol=0)
    found = torch.linalg.eigvalsh(gauss_newton.dense()).flip(0)[:3]
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["convnet", "tied", "lstm", "transformer"])
def test_products_are_those_of_the_dense_kernel(name):
    model, inputs = models()[name]()
    rates = {n: 0.5 + k for k, (n, _) in enumerate(model.named_parameters())}
    dense = tk.matrix(tk.ntk(model, inputs, rates=rates, dtype=DOUBLE))
    vectors = torch.randn(len(dense), 3, dtype=DOUBLE)
    for rows_at_a_time in (None, 2):
        kernel = tk.TangentKernel(model, inputs, rates=rates, dtype=DOUBLE, rows=rows_at_a_time)
        torch.testing.assert_close(kernel @ vectors, dense @ vectors, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(kernel @ vectors[:, 0], dense @ vectors[:, 0])
        assert kernel.products == 4 and kernel.size == len(dense)
    torch.testing.assert_close(kernel.dense(), dense, rtol=1e-9, atol=1e-9)


def test_rates_in_every_form():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected_kernel = tk.ntk(model, x, rates={"weight": 0.5, "bias": 2.0})
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 2.0}], lr=1.0
    )
    flat = torch.tensor([0.5] * 6 + [2.0] * 2)
    for rates in (optimizer, flat, lambda name, p: 0.5 if p.dim() == 2 else 2.0):
        torch.testing.assert_close(tk.ntk(model, x, rates=rates), expected_kernel)
    chosen = tk.ntk(model, x, parameters=lambda name, p: name == "bias")
    torch.testing.assert_close(chosen, torch.eye(2).expand(4, 4, 2, 2))
    torch.testing.assert_close(tk.ntk(model, x, rates={"weight": 0.0, "bias": 1.0}), chosen)
    torch.testing.assert_close(tk.ntk(model, x, rates=0.0), torch.zeros(4, 4, 2, 2))


def test_rates_keep_double_precision():
    x = torch.ones(1, 3, dtype=DOUBLE)
    model = nn.Linear(3, 1, bias=False).double()
    for method in ("layers", "contraction", "products"):
        assert float(tk.ntk(model, x, rates=0.7, method=method)) == pytest.approx(2.1, rel=1e-15)
    square = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    plain, weighed = (tk.differential(square, x[:, :1], rates=r) for r in (1.0, 0.7))
    assert float(weighed / plain) == pytest.approx(0.49, rel=1e-14)


def test_frozen_weights_do_not_count():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    chosen = tk.ntk(model, x, parameters=lambda name, p: name.startswith("2"))
    model[0].requires_grad_(False)
    torch.testing.assert_close(tk.ntk(model, x), chosen)
    h = torch.tanh(model[0](x)).detach()
    torch.testing.assert_close(tk.ntk(model, x, kind=1), h @ h.T + 1)


def brute_differential(model, x, rates):
    """Return dNTK (n, n, n, o, o, o) from the Hessian of each output, all in autograd."""
    weights = tuple(model.parameters())
    sizes = [w.numel() for w in weights]

    def outputs(flat, one):
        named = {
            name: part.view_as(w)
            for (name, w), part in zip(model.named_parameters(), flat.split(sizes), strict=True)
        }
        return torch.func.functional_call(model, named, (one[None],))[0]

    flat = torch.cat([w.detach().flatten() for w in weights])
    slopes = torch.stack(
        [torch.autograd.functional.jacobian(lambda f, i=i: outputs(f, i), flat) for i in x]
    )
    bends = [
        torch.stack(
            [
                torch.autograd.functional.hessian(lambda f, i=i, a=a: outputs(f, i)[a], flat)
                for a in range(slopes.shape[1])
            ]
        )
        for i in x
    ]
    weighted = slopes * rates
    return torch.einsum("iapq,jbp,kcq->ijkabc", torch.stack(bends), weighted, weighted)


def tiny():
    return nn.Sequential(
        nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)
    ).double()


def test_differential_is_the_third_derivative():
    model, x = tiny(), torch.randn(3, 2, dtype=DOUBLE)
    rates = torch.rand(sum(p.numel() for p in model.parameters()), dtype=DOUBLE)
    brute = brute_differential(model, x, rates)
    found = tk.differential(model, x, rates=rates, block=5)
    torch.testing.assert_close(found, brute, rtol=1e-10, atol=1e-12)
    others = tk.differential(model, x[:1], x[1:], rates=rates)
    torch.testing.assert_close(others, brute[:1, 1:, 1:], rtol=1e-10, atol=1e-12)


def test_differential_is_the_kernels_velocity_along_a_gradient_step():
    model, x = tiny(), torch.randn(3, 2, dtype=DOUBLE)
    target = torch.randn(3, 2, dtype=DOUBLE)
    rates = {name: 0.3 + 0.2 * k for k, (name, _) in enumerate(model.named_parameters())}
    output = model(x)
    slope = (output - target).detach()  # of the loss 1/2 |f - y|^2 by the outputs
    (output - target).square().sum().div(2).backward()

    def stepped(eta):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for (name, p), q in zip(moved.named_parameters(), model.parameters(), strict=True):
                p -= eta * rates[name] * q.grad
        return tk.ntk(moved, x, rates=rates)

    eta = 1e-4
    velocity = (stepped(eta) - stepped(-eta)) / (2 * eta)
    d = tk.differential(model, x, rates=rates)
    along = torch.einsum("ijkabc,kc->ijab", d, slope)
    predicted = -(along + along.permute(1, 0, 3, 2))
    torch.testing.assert_close(velocity, predicted, rtol=1e-6, atol=1e-6)
    assert predicted.abs().max() > 0.01


def test_measures_of_kernels():
    labels = torch.tensor([0, 0, 1, 1, 2])
    perfect = (labels[:, None] == labels).double()
    assert float(tk.alignment(perfect, labels)) == pytest.approx(1.0)
    shifted = 3 * perfect + 5.0  # centring removes the constant
    assert float(tk.alignment(shifted, labels)) == pytest.approx(1.0)
    assert float(tk.alignment(shifted, labels, centred=False)) < 0.9
    y = torch.randn(5, dtype=DOUBLE)
    assert float(tk.alignment(torch.outer(y, y), y)) == pytest.approx(1.0)
    full = torch.einsum("ij,ab->ijab", perfect, torch.eye(3, dtype=DOUBLE))
    assert float(tk.alignment(full, labels)) == pytest.approx(1.0)
    h = torch.eye(5, dtype=DOUBLE) - 0.2
    k = torch.randn(5, 5, dtype=DOUBLE)
    k = k @ k.T
    centred, target = h @ k @ h, h @ perfect @ h
    slow = (centred * target).sum() / centred.norm() / target.norm()
    torch.testing.assert_close(tk.alignment(k, labels), slow)
    assert float(tk.drift(3 * k, k)) == pytest.approx(2.0)
    assert float(tk.kernel_distance(3 * k, k)) == pytest.approx(0.0, abs=1e-15)
    slow = 1 - (k * perfect).sum() / k.norm() / perfect.norm()
    torch.testing.assert_close(tk.kernel_distance(k, perfect), slow)
    other = h @ perfect @ h
    slow = 1 - (centred * other).sum() / centred.norm() / other.norm()
    torch.testing.assert_close(tk.kernel_distance(k + 7, perfect, centred=True), slow)
    pairs = torch.einsum("ij,ab->ijab", k + 7, torch.ones(2, 2, dtype=DOUBLE))
    others = torch.einsum("ij,ab->ijab", perfect, torch.ones(2, 2, dtype=DOUBLE))
    torch.testing.assert_close(tk.kernel_distance(pairs, others, centred=True), slow)
    by_output = torch.stack([k, perfect], 2)
    values = tk.eigenvalues(by_output)
    torch.testing.assert_close(values[1], torch.tensor([2.0, 2, 1, 0, 0], dtype=DOUBLE))
    torch.testing.assert_close(values[0], torch.linalg.eigvalsh(k).flip(0))


def test_the_model_is_left_as_it_was():
    model, x = trained_statistics(convnet()), torch.randn(4, 2, 6, 6)
    model.train()
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    tk.ntk(model, x, dtype=DOUBLE)
    tk.differential(
        nn.Sequential(model, nn.Flatten())[:1], x[:1], parameters=lambda n, p: p.dim() == 1
    )
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training and not model[0].training and model[1].training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_compiled_model_is_measured_as_it_is():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    torch.testing.assert_close(tk.ntk(torch.compile(model), x), tk.ntk(model, x))


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda m, x: tk.ntk(m, (x, x)), "does not take these inputs"),
        (lambda m, x: tk.ntk(m, x, x[:, :2]), "does not take these inputs"),
        (lambda m, x: tk.ntk(m, x, kind="trase"), "Did you mean 'trace'"),
        (lambda m, x: tk.ntk(m, x, kind=2), "choose 0 to 1"),
        (lambda m, x: tk.ntk(m, x, method="layer"), "Did you mean 'layers'"),
        (lambda m, x: tk.ntk(m, x, memory=0), "number of bytes"),
        (lambda m, x: tk.ntk(m, x, rates={"weight": 1.0}), "'bias' has no rate"),
        (lambda m, x: tk.ntk(m, x, rates={"weight": 1, "bias": 1, "bia": 1}), "'bia' is no weight"),
        (lambda m, x: tk.ntk(m, x, rates={"weight": -1.0, "bias": 1.0}), "not negative"),
        (lambda m, x: tk.ntk(m, x, rates={"weight": torch.ones(3), "bias": 1.0}), "same shape"),
        (lambda m, x: tk.ntk(m, x, read=lambda y: y.sum()), "row for each input"),
        (lambda m, x: tk.ntk(m, x, parameters=lambda n, p: False), "no trainable parameter"),
        (lambda m, x: tk.ntk(m.requires_grad_(False), x), "no trainable parameter"),
        (lambda m, x: tk.ntk(nn.LSTM(3, 2), x), "pick the tensor of outputs with read="),
        (lambda m, x: tk.eigenvalues(torch.ones(2, 3)), "leave others= out"),
        (lambda m, x: tk.drift(torch.ones(2, 2), torch.ones(3, 3)), "cannot be compared"),
        (lambda m, x: tk.alignment(torch.eye(2), torch.tensor([1, 1])), "all the same"),
        (lambda m, x: tk.alignment(torch.ones(2, 2), torch.tensor([1, 2])), "does not vary"),
        (lambda m, x: tk.drift(torch.eye(2), torch.zeros(2, 2)), "is zero"),
        (lambda m, x: tk.kernel_distance(torch.eye(2), torch.zeros(2, 2)), "is zero"),
        (lambda m, x: tk.alignment(torch.eye(2), torch.tensor([1, 2, 3])), "do not fit"),
        (lambda m, x: tk.TangentKernel(m, x, rows=0), "at least 1"),
        (lambda m, x: tk.TangentKernel(m, x) @ torch.ones(3), "does not fit"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_sentence(ask, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        ask(nn.Linear(3, 2), torch.randn(4, 3))
    assert "\n" not in str(caught.value)
