"""Initialisers: distributions, exact structure, and every kind of module they walk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from pantarhei.errors import RequestError
from pantarhei.learning import deep_linear as dl
from pantarhei.learning.initializers import (
    balanced,
    balanced_,
    haar,
    initialize_,
    kept_by_pretraining,
    pretrain_,
)
from pantarhei.probes.signal import conserved, product_spectrum


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_haar_is_uniform_and_qr_alone_is_not():
    """Of a Haar matrix the trace has mean 0 and variance 1; without the sign fix it is biased."""
    g = generator()
    traces = torch.stack([haar(4, 4, g).trace() for _ in range(4000)])
    assert abs(traces.mean()) < 0.06 and abs(traces.var() - 1) < 0.1
    plain = torch.linalg.qr(torch.randn(4000, 4, 4, dtype=torch.float64, generator=g))[0]
    assert plain.diagonal(dim1=1, dim2=2).sum(1).mean().abs() > 0.5
    corners = torch.stack([haar(5, 2, g)[0, 0] for _ in range(4000)])
    assert abs(corners.mean()) < 0.03 and abs(corners.square().mean() - 0.2) < 0.02


def test_products_of_orthogonal_layers_are_orthogonal_and_gaussian_ones_spread():
    deep = nn.Sequential(*(nn.Linear(30, 30) for _ in range(50)))
    initialize_(deep, "orthogonal", generator=generator())
    values = product_spectrum(deep)
    assert (values - 1).abs().max() < 1e-5
    initialize_(deep, "orthogonal", gain=1.1, generator=generator())
    assert (product_spectrum(deep) / 1.1**50 - 1).abs().max() < 1e-5
    initialize_(deep, "gaussian", generator=generator())
    values = product_spectrum(deep)
    assert values[0] / values[-1] > 1e10


def test_rectangular_layers_preserve_as_many_directions_as_there_are():
    for shape in ((7, 4), (4, 7)):
        layer = nn.Linear(*reversed(shape))
        initialize_(layer, gain=1.5)
        values = torch.linalg.svdvals(layer.weight.detach())
        torch.testing.assert_close(values, torch.full((4,), 1.5))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(6, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(6, 12, 5, padding=2, padding_mode="circular", groups=3),
        nn.Conv3d(4, 4, 3, padding=1, padding_mode="circular"),
    ],
)
def test_delta_orthogonal_convolutions_preserve_norms(layer):
    initialize_(layer, "orthogonal", gain=2.0, generator=generator())
    dims = layer.weight.dim() - 2
    x = torch.randn(2, layer.in_channels, *(6,) * dims)
    with torch.no_grad():
        assert layer(x).norm() == pytest.approx(2 * x.norm().item(), rel=1e-5)
    assert (layer.weight != 0).sum() == (layer.weight.flatten(2).abs().sum(2) > 0).sum()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(400, 100), (400,)),
        (nn.Conv2d(40, 60, 3), (40, 9, 9)),
        (nn.Conv2d(80, 60, 3, groups=2), (80, 9, 9)),
        (nn.ConvTranspose2d(80, 40, 4, stride=2), (80, 9, 9)),
    ],
)
def test_gaussian_weights_keep_the_size_of_a_signal(layer, shape):
    initialize_(layer, "gaussian", gain=1.5, generator=generator())
    x = torch.randn(20, *shape)
    with torch.no_grad():
        out = layer(x)
    if out.dim() == 4:  # away from the border
        out = out[..., 3:-3, 3:-3]
    assert out.square().mean() == pytest.approx(1.5**2, rel=0.1)


def test_every_gate_and_projection_is_orthogonal_by_itself():
    for module, names, size in (
        (nn.LSTM(8, 8, 2), ("weight_ih_l0", "weight_hh_l1"), 8),
        (nn.GRU(8, 8), ("weight_hh_l0",), 8),
        (nn.MultiheadAttention(8, 2), ("in_proj_weight",), 8),
    ):
        initialize_(module, generator=generator())
        for name in names:
            for block in getattr(module, name).detach().split(size):
                torch.testing.assert_close(block @ block.T, torch.eye(8), atol=1e-5, rtol=0)
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    done = initialize_(attention)
    assert done == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    assert attention.in_proj_bias.abs().max() == 0
    lstm = nn.LSTM(8, 6, proj_size=3)
    assert "weight_hr_l0" in initialize_(lstm)


def test_norms_embeddings_and_selection_are_left_and_shared_weights_done_once():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 9))
    net[3].weight = net[0].weight
    before = net[2].weight.clone()
    net[1].bias.data.fill_(3.0)
    assert initialize_(net, bias=None) == ["1.weight", "3.weight"]
    assert torch.equal(net[2].weight, before) and (net[1].bias == 3).all()
    net[1].weight.data.zero_()
    assert initialize_(net, select=lambda name, _: name == "3") == ["3.weight"]
    assert (net[1].weight == 0).all()
    twice = nn.Linear(4, 4)
    shared = nn.Sequential(twice, nn.Tanh(), twice)
    assert initialize_(shared) == ["0.weight"]


def test_transformers_conv1d_has_its_inputs_in_rows():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    layer = transformers.Conv1D(6, 300)
    assert initialize_(layer, "gaussian", generator=generator()) == ["weight"]
    assert layer.weight.std().item() * 300**0.5 == pytest.approx(1, rel=0.1)


def test_the_generator_alone_decides_and_precision_does_not():
    a, b = nn.Linear(5, 5), nn.Linear(5, 5).to(torch.bfloat16)
    initialize_(a, generator=generator(3))
    torch.manual_seed(99)
    initialize_(b, generator=generator(3))
    torch.testing.assert_close(a.weight.to(torch.bfloat16), b.weight)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: initialize_(nn.LazyLinear(3)), "no shape yet"),
        (lambda: initialize_(nn.Linear(3, 3, device="meta")), "meta device"),
        (lambda: initialize_(parametrizations.weight_norm(nn.Linear(3, 3))), "parametrisation"),
        (lambda: initialize_(nn.ReLU()), "no weight matrix"),
        (lambda: initialize_(nn.Linear(3, 3), "orthogonl"), "Did you mean 'orthogonal'"),
        (lambda: initialize_(nn.Linear(3, 3), gain=float("nan")), "finite"),
        (lambda: balanced((4, 2, 3), np.eye(3), np.eye(4)[:, :3], 0.1), "cannot hold 3 modes"),
        (lambda: balanced((4, 3, 3), np.eye(3), np.eye(3), 0.1), "are not modes"),
        (lambda: balanced((3, 3), np.eye(3), np.eye(3), -0.1), "not negative"),
        (lambda: balanced((3, 3), np.eye(3), np.eye(3)), "either"),
        (
            lambda: balanced_(
                nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 3)), np.eye(3), np.eye(3), 0.1
            ),
            "do not follow",
        ),
        (lambda: pretrain_(nn.Linear(3, 3), torch.ones(2, 3)), "too few linear layers"),
        (lambda: pretrain_(nn.Linear(3, 3), []), "no inputs"),
        (lambda: pretrain_(nn.Linear(3, 3), torch.ones(2, 3), last=True, method="x"), "limit or"),
        (
            lambda: pretrain_(nn.Linear(3, 3), torch.full((2, 3), torch.nan), last=True),
            "not finite",
        ),
    ],
)
def test_bad_requests(make, sentence):
    with pytest.raises(RequestError, match=sentence):
        make()


def test_balanced_weights_are_balanced_and_multiply_to_u0():
    rng = np.random.default_rng(0)
    data = dl.Correlations.of_map(rng.normal(size=(3, 5)))
    modes = data.modes()
    u0 = np.array([0.3, 0.2, 0.1])
    weights = balanced((5, 7, 4, 3), modes.U, modes.V, u0, generator=generator())
    whole = dl.product(weights).numpy()
    np.testing.assert_allclose(whole, modes.U * u0 @ modes.V.T, atol=1e-12)
    assert max(c.abs().max() for c in conserved(weights)) < 1e-12
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Linear(4, 3))
    balanced_(net, modes.U, modes.V, u0, generator=generator())
    for layer, weight in zip((net[0], net[2], net[3]), weights, strict=True):
        torch.testing.assert_close(layer.weight.detach().double(), weight, atol=1e-6, rtol=0)
        assert (layer.bias == 0).all()


POWER = (9.0, 4.0, 1.0, 0.25, 0.04)


def white_noise(rows=500):
    """Inputs with exactly the principal directions e_1, e_2, ... and these powers."""
    white, _ = dl.whiten(np.random.default_rng(0).normal(size=(rows, 5)))
    return torch.from_numpy(white * np.sqrt(POWER)).float()


def test_pretraining_keeps_the_principal_directions():
    net = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3), nn.Linear(3, 2))
    readout = net[2].weight.clone()
    assert pretrain_(net, white_noise(), generator=generator()) == ["0", "1"]
    product = (net[1].weight @ net[0].weight).detach()
    kept = product.T @ product
    torch.testing.assert_close(kept, torch.diag(torch.tensor([1.0, 1, 1, 0, 0])), atol=1e-4, rtol=0)
    assert torch.equal(net[2].weight, readout)


def test_descent_converges_to_the_limit():
    def projector(method, **options):
        net = nn.Sequential(nn.Linear(5, 3).double(), nn.Linear(3, 2).double())
        x = white_noise().double()
        pretrain_(net, x, method=method, generator=generator(), **options)
        w = net[0].weight.detach()
        return w.T @ w

    limit = projector("limit")
    assert (projector("descent", steps=4000) - limit).abs().max() < 0.01
    short = projector("descent", steps=40)  # the strongest direction first
    assert short[0, 0] > 0.9 and short[2, 2] < 0.1


def test_pretraining_sees_what_reaches_a_layer_through_the_network():
    net = nn.Sequential(
        nn.Linear(5, 5), nn.Dropout(0.9), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2)
    )
    x = white_noise()
    pretrain_(net, [x[:300], x[300:]], generator=generator())
    h = torch.tanh(net[0](x)).detach().double()
    top = torch.linalg.eigh(h.T @ h)[1][:, -4:]
    w = net[3].weight.detach().double()
    torch.testing.assert_close(w.T @ w, top @ top.T, atol=1e-4, rtol=0)
    assert net.training and net[1].training


def test_pretraining_follows_the_order_of_running():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(3, 2), nn.Linear(9, 9), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(self.first(x))

    assert pretrain_(Backwards(), white_noise()) == ["first"]
    assert pretrain_(Backwards(), white_noise(), last=True) == ["first", "last"]


def test_pretraining_is_a_decoupled_start_where_task_and_inputs_share_directions():
    x = white_noise().double().numpy()
    u, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    data = dl.Correlations.of(x, x[:, :3] @ (u * [1.0, 0.9, 0.8]).T)
    net = dl.DeepLinearNet(5, 5, 3, 3)
    pretrain_(net, torch.from_numpy(x), generator=generator())
    w1, w2, _ = (p.detach() for p in net.parameters())
    modes = data.modes()
    readout = 0.1 * torch.from_numpy(modes.U @ modes.V.T) @ (w2 @ w1).T
    predicted = dl.predict(data, [w1, w2, readout])
    assert predicted.kind == "exact"
    simulated = dl.gradient_flow([w1, w2, readout], data, predicted.times)
    np.testing.assert_allclose(predicted.u[:, 0], simulated.u, atol=1e-6)
    assert kept_by_pretraining(data, 3) == pytest.approx(1.0)


def test_the_share_that_pretraining_keeps():
    x = white_noise().double().numpy()
    data = dl.Correlations.of(x, x[:, [1, 4]] / np.sqrt([4.0, 0.04]) * [1.0, 2.0])
    kept = [kept_by_pretraining(data, width) for width in range(6)]
    np.testing.assert_allclose(kept, [0, 0, 0.2, 0.2, 0.2, 1.0], atol=1e-9)
    assert kept_by_pretraining(dl.Correlations.of(x, np.zeros(500)), 3) == 0.0
