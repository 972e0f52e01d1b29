"""Signal propagation against closed forms, dense algebra and many-digit arithmetic."""

from __future__ import annotations

import copy
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.errors import RequestError
from pantarhei.fit import Batches, fit
from pantarhei.probes import signal
from pantarhei.probes.kernel_drift import KernelDrift
from pantarhei.probes.propagation import Propagation
from pantarhei.probes.tangent_kernel import drift, ntk
from pantarhei.probes.watch import Watch

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def stack(width, depth, *, gain=1.0, orthogonal=True, activation=None, bias=0.0):
    layers = []
    for _ in range(depth):
        layer = nn.Linear(width, width, dtype=DOUBLE)
        if orthogonal:
            nn.init.orthogonal_(layer.weight, gain)
        else:
            nn.init.normal_(layer.weight, std=gain / width**0.5)
        nn.init.normal_(layer.bias, std=bias) if bias else nn.init.zeros_(layer.bias)
        layers += [layer] if activation is None else [layer, activation()]
    return nn.Sequential(*layers)


def mse(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


# Jacobians


def test_orthogonal_deep_linear_network_is_an_isometry():
    net, x = stack(20, 100), torch.randn(3, 20)
    for k in (None, 2):
        values = signal.jacobian_singular_values(net, x, k, dtype=DOUBLE)
        torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-12, atol=0)
    spectrum = signal.product_spectrum(net)
    torch.testing.assert_close(spectrum, torch.ones(20, dtype=DOUBLE), rtol=1e-12, atol=0)


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
    )


@pytest.mark.parametrize(
    ("net", "x"),
    [
        (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), torch.randn(4, 6)),
        (nn.Sequential(nn.Linear(3, 9), nn.GELU(), nn.Linear(9, 7)), torch.randn(4, 3)),
        (convnet(), torch.randn(3, 2, 6, 6)),
        (nn.Softplus(), torch.randn(3, 4)),
    ],
    ids=["reverse", "forward", "convnet", "no weights"],
)
def test_jacobian_is_autograds(net, x):
    found = signal.input_jacobian(net, x, dtype=DOUBLE)
    plain = copy.deepcopy(net).to(DOUBLE).eval()
    for row, one in zip(found, x.to(DOUBLE), strict=True):
        slow = torch.autograd.functional.jacobian(lambda z: plain(z[None])[0].flatten(), one)
        torch.testing.assert_close(row, slow.flatten(1), rtol=1e-12, atol=1e-12)
    values = signal.jacobian_singular_values(net, x, dtype=DOUBLE)
    torch.testing.assert_close(values, torch.linalg.svdvals(found))
    numeric = (plain(x.to(DOUBLE) + 1e-6) - plain(x.to(DOUBLE) - 1e-6)).flatten(1) / 2e-6
    torch.testing.assert_close(found.sum(2), numeric, rtol=1e-6, atol=1e-8)


def test_largest_singular_values_without_the_jacobian():
    net = stack(60, 6, gain=1.5, orthogonal=False, activation=nn.Tanh)
    x = torch.randn(4, 60)
    whole = signal.jacobian_singular_values(net, x, dtype=DOUBLE)
    few = signal.jacobian_singular_values(net, x, 3, dtype=DOUBLE, tol=1e-10)
    torch.testing.assert_close(few, whole[:, :3], rtol=1e-9, atol=0)


def test_values_that_occur_several_times_are_all_found():
    values = torch.tensor([3.0, 3.0, 3.0] + [1.0] * 17 + [0.0] * 10, dtype=DOUBLE)
    net = nn.Linear(30, 30, bias=False)
    with torch.no_grad():
        q, r = (torch.linalg.qr(torch.randn(30, 30, dtype=DOUBLE))[0] for _ in range(2))
        net.weight.copy_(q * values @ r)
    few = signal.jacobian_singular_values(net, torch.randn(2, 30), 4, dtype=DOUBLE)
    torch.testing.assert_close(few, values[:4].expand(2, 4), rtol=1e-6, atol=0)


def test_jacobian_of_a_transformer_by_its_embeddings():
    transformers = pytest.importorskip("transformers", reason="needs pantarhei[transformers]")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(20, (3, 4))
    embedded = model.transformer.wte(tokens).detach()
    read = lambda result: result.logits[:, -1]  # noqa: E731
    found = signal.input_jacobian(model, {"inputs_embeds": embedded}, read=read, dtype=DOUBLE)
    assert found.shape == (3, 20, 32)
    plain = copy.deepcopy(model).to(DOUBLE).eval()
    at = embedded.to(DOUBLE).requires_grad_()
    slow = torch.autograd.grad(plain(inputs_embeds=at).logits[:, -1, 7].sum(), at)[0]
    torch.testing.assert_close(found[:, 7], slow.flatten(1), rtol=1e-9, atol=1e-12)
    with pytest.raises(RequestError, match="inputs_embeds"):
        signal.input_jacobian(model, {"input_ids": tokens}, read=read)


def test_share_in_band():
    values = torch.tensor([[20.0, 10.0, 0.1, 0.09], [1.0, 1.0, 1.0, 1.0]])
    assert signal.share_in_band(values).tolist() == [0.5, 1.0]


# spectra and conserved quantities


@pytest.mark.parametrize(("depth", "width"), [(30, 6), (80, 4)])
def test_product_spectrum_to_the_last_order_of_magnitude(depth, width):
    weights = [torch.randn(width, width, dtype=DOUBLE) / width**0.5 for _ in range(depth)]
    with mpmath.workdps(150):
        product = mpmath.eye(width)
        for w in weights:
            product = mpmath.matrix(w.tolist()) * product
        exact = sorted((float(s) for s in mpmath.svd_r(product, compute_uv=False)), reverse=True)
    found = signal.product_spectrum(weights)
    assert exact[0] / exact[-1] > 1e17  # out of reach of the product itself
    torch.testing.assert_close(found, torch.tensor(exact, dtype=DOUBLE), rtol=1e-10, atol=0)


@pytest.mark.parametrize("sizes", [(7, 3, 5, 6), (4, 9, 6), (5, 5), (3, 8, 2, 8, 4)])
def test_product_spectrum_is_numpys(sizes):
    weights = [torch.randn(b, a, dtype=DOUBLE) for a, b in itertools.pairwise(sizes)]
    product = np.linalg.multi_dot([w.numpy() for w in reversed(weights)] + [np.eye(sizes[0])])
    exact = np.linalg.svd(product, compute_uv=False)
    found = signal.product_spectrum(weights).numpy()
    np.testing.assert_allclose(found, exact, rtol=1e-12, atol=1e-12 * exact[0])


def test_product_spectrum_of_hard_cases():
    zero = [torch.randn(3, 3), torch.zeros(3, 3)]
    assert signal.product_spectrum(zero).tolist() == [0.0, 0.0, 0.0]
    rising = [torch.diag(torch.tensor([1e-8, 1e-4, 1.0], dtype=DOUBLE))] * 5
    expected = torch.tensor([1.0, 1e-20, 1e-40], dtype=DOUBLE)
    torch.testing.assert_close(signal.product_spectrum(rising), expected, rtol=1e-12, atol=0)


def flow(weights, target, rate, steps):
    for _ in range(steps):
        loss = (target - weights[2] @ weights[1] @ weights[0]).square().sum() / 2
        grads = torch.autograd.grad(loss, weights)
        weights = [
            (w - rate * g).detach().requires_grad_() for w, g in zip(weights, grads, strict=True)
        ]
    return weights


def test_conserved_quantity_drifts_at_the_order_of_the_rate():
    start = [torch.randn(4, 3), torch.randn(5, 4), torch.randn(2, 5)]
    start = [(w.to(DOUBLE) / 2).requires_grad_() for w in start]
    target, before = torch.randn(2, 3, dtype=DOUBLE), signal.conserved(start)
    torch.testing.assert_close(
        before[0], (start[1].mT @ start[1] - start[0] @ start[0].mT).detach()
    )
    drifts, moved = [], []
    for rate, steps in ((0.01, 100), (0.001, 1000)):
        end = flow(start, target, rate, steps)
        pairs = zip(signal.conserved(end), before, strict=True)
        drifts.append(max(float((a - b).norm()) for a, b in pairs))
        moved.append(float((end[0] - start[0]).norm().detach()))
    assert min(moved) > 0.1
    assert drifts[0] / drifts[1] == pytest.approx(10, rel=0.15)


# moments


def test_layer_moments_are_what_hooks_on_the_plain_model_see():
    net, x, y = convnet().train(), torch.randn(5, 2, 6, 6), torch.randn(5, 5)
    rows = signal.layer_moments(net, mse, (x, y))
    plain, h, kept = copy.deepcopy(net).eval(), x, []
    for layer in plain:
        h = layer(h)
        h.retain_grad()
        kept.append(h)
    nn.functional.mse_loss(h, y).backward()
    assert [r.kind for r in rows] == [type(m).__name__ for m in net]
    for row, h in zip(rows, kept, strict=True):
        assert row.forward == pytest.approx(float(h.detach().square().mean()), rel=1e-5)
        assert row.mean == pytest.approx(float(h.detach().mean()), rel=1e-4, abs=1e-6)
        assert row.backward == pytest.approx(float(h.grad.square().mean()), rel=1e-5)
    assert net.training and not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_layer_moments_with_in_place_operations_and_repeated_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x):
            return self.act(self.layer(self.act(self.layer(x))))

    net, x = Twice(), torch.randn(6, 4)
    rows = signal.layer_moments(net, lambda m, b: m(b).sum(), x)
    assert [r.layer for r in rows] == ["layer", "act", "layer#2", "act#2"]
    a = net.layer(x)
    b = net.layer(a.relu())
    a.retain_grad()
    b.retain_grad()
    b.relu().sum().backward()
    for row, h in ((rows[0], a), (rows[2], b)):
        assert row.forward == pytest.approx(float(h.detach().square().mean()), rel=1e-5)
        assert row.backward == pytest.approx(float(h.grad.square().mean()), rel=1e-5)
    assert rows[3].zeros == pytest.approx(float((b <= 0).double().mean()))


def test_several_batches_are_averaged_and_frozen_layers_have_no_gradient():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].requires_grad_(False)
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    both = signal.layer_moments(net, mse, (x[0], y[0]), (x[1], y[1]))
    one, two = (signal.layer_moments(net, mse, (x[i], y[i])) for i in (0, 1))
    assert both[2].forward == pytest.approx((one[2].forward + two[2].forward) / 2)
    assert math.isnan(both[0].backward) and both[2].backward > 0


def test_forward_moments_follow_the_mean_field_recursion():
    net, x = stack(2000, 3, gain=1.4, orthogonal=False, activation=nn.Tanh), torch.randn(8, 2000)
    rows = signal.layer_moments(net, lambda m, b: m(b).sum(), x, dtype=DOUBLE)
    z = torch.linspace(-8, 8, 4001, dtype=DOUBLE)
    weight = torch.exp(-(z**2) / 2)
    q = 1.4**2 * float(x.square().mean())
    for row in rows[::2]:
        assert row.forward == pytest.approx(q, rel=0.03)
        q = 1.4**2 * float((torch.tanh(q**0.5 * z).square() * weight).sum() / weight.sum())


# correlation length


def test_fit_finds_a_decay_exactly():
    depth = np.arange(12.0)
    length, limit, error = signal._decay(0.3 + 0.6 * np.exp(-depth / 2.5), None)
    assert (length, limit) == (pytest.approx(2.5, rel=1e-6), pytest.approx(0.3, rel=1e-6))
    assert error < 1e-9
    length, limit, _ = signal._decay(1 - 0.6 * np.exp(-depth / 4.0), 1.0)
    assert (length, limit) == (pytest.approx(4.0, rel=1e-6), 1.0)
    assert signal._decay(np.full(9, 0.4), None)[0] == math.inf


def test_correlation_length_is_that_of_the_ordered_phase():
    gain, bias, width = 1.2, 0.5, 1500
    net = stack(width, 14, gain=gain, orthogonal=False, activation=nn.Tanh, bias=bias)
    x, near = torch.randn(2, 6, width, dtype=DOUBLE)
    others = x + 0.2 * near  # the rate is chi where the two are nearly alike
    z = torch.linspace(-8, 8, 4001, dtype=DOUBLE)
    weight = torch.exp(-(z**2) / 2)
    weight /= weight.sum()
    q = 1.0
    for _ in range(200):
        q = bias**2 + gain**2 * float((torch.tanh(q**0.5 * z).square() * weight).sum())
    chi = gain**2 * float((torch.cosh(q**0.5 * z) ** -4 * weight).sum())
    assert chi < 1
    found = signal.correlation_length(net, x, others, limit=1.0, skip=3)
    assert found.length == pytest.approx(-1 / math.log(chi), rel=0.1)
    assert found.layers[0] == "6" and len(found.correlation) == 11
    a, b = x, others
    for layer in net[:7]:
        a, b = layer(a), layer(b)
    cosine = torch.cosine_similarity(a, b).mean().detach()
    torch.testing.assert_close(found.correlation[0], cosine)


# attached to a training


def test_probes_on_a_training(tmp_path):
    x = torch.randn(48, 6)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    start = copy.deepcopy(net)

    def watch():
        probes = [KernelDrift(labels=lambda b: b[1]), Propagation(inputs=4)]
        return Watch(mse, (x, y), every=20, probes=probes, path=tmp_path / "probes.csv")

    first = watch()
    first.record(net, 0)
    settings = {"lr": 0.02, "quiet": True, "checkpoint": tmp_path / "fit"}
    fit(net, Batches(x, y, batch_size=16), mse, steps=40, on_step=first, **settings)
    again = watch()  # a later session goes on from the first kernel
    fit(net, Batches(x, y, batch_size=16), mse, steps=60, on_step=again, **settings)
    steps, drifts = again.series("kernel_drift")
    assert steps == [0, 20, 40, 60] and drifts[0] == 0.0 and drifts[1] < drifts[3]
    before, after = (ntk(m, x, kind="trace") for m in (start, net))
    assert drifts[3] == pytest.approx(float(drift(after, before)), rel=1e-4)
    top = float(torch.linalg.eigvalsh(after)[-1]) / 48
    assert again.series("kernel_top")[1][3] == pytest.approx(top, rel=1e-4)
    row = again.rows[-1]
    assert row["zeros_1"] == pytest.approx(float((net[0](x) <= 0).float().mean()))
    values = signal.jacobian_singular_values(net, x[:4])
    assert row["jacobian_largest"] == pytest.approx(float(values[:, 0].mean()), rel=1e-4)
    assert 0 < row["kernel_alignment"] < 1 and 1 <= row["kernel_rank"] <= 48


def test_kernel_probe_reads_the_inputs_off_the_loss():
    net, x = nn.Linear(3, 2), torch.randn(5, 3)
    y = torch.randn(5, 2)
    whole = KernelDrift()(net, mse, (x, y))
    parts = KernelDrift()(net, mse, (x[:2], y[:2]), (x[2:], y[2:]))
    given = KernelDrift(inputs=x)(net, lambda m, b: m(b).sum() + m(b).sum(), x)
    assert parts == pytest.approx(whole) and given == pytest.approx(whole)
    with pytest.raises(RequestError, match="give inputs="):
        KernelDrift()(net, lambda m, b: m(b).sum() + m(b).sum(), x)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda m, x: signal.jacobian_singular_values(m, x, 3), "choose 1 to 2"),
        (lambda m, x: signal.input_jacobian(nn.Embedding(5, 2), torch.arange(4)), "inputs_embeds"),
        (lambda m, x: signal.input_jacobian(m, x, wrt=1), "wrt=1 is not"),
        (lambda m, x: signal.input_jacobian(m, x, wrt="y"), "wrt='y' is not"),
        (lambda m, x: signal.input_jacobian(m, x[:0]), "rows"),
        (lambda m, x: signal.share_in_band(x, 2.0, 1.0), "is empty"),
        (lambda m, x: signal.product_spectrum(nn.ReLU()), "no nn.Linear"),
        (lambda m, x: signal.product_spectrum([x, x]), "do not chain"),
        (lambda m, x: signal.product_spectrum([x * math.nan]), "not finite"),
        (lambda m, x: signal.conserved([x[0]]), "must be matrices"),
        (lambda m, x: signal.layer_moments(m, mse, (x, x[:, :2]), layers=lambda n, m: False), "no"),
        (lambda m, x: signal.correlation_length(m, x, x), "too few"),
        (lambda m, x: signal.correlation_length(m, x, x[:2], layers=any_layer), "too few"),
        (lambda m, x: KernelDrift(kind="diagonal"), "choose one of them"),
        (lambda m, x: Propagation(inputs=-1), "inputs=-1"),
    ],
)  # fmt: skip
def test_bad_requests_are_one_sentence(ask, sentence):
    with pytest.raises(RequestError, match=sentence) as caught:
        ask(nn.Linear(3, 2), torch.randn(4, 3))
    assert "\n" not in str(caught.value)


def any_layer(name, module):
    return True
