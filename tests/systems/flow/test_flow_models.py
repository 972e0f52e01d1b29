"""The nine flow models: sizes of the sheet's table, invariants, corrected and published faults."""

from __future__ import annotations

import pytest
import torch

from pantarhei.errors import RequestError
from pantarhei.systems.flow import IMAGE_MODELS, MODELS, POINT_MODELS, STEP_AT_POINTS, model
from pantarhei.systems.flow._layers import NormAct, at_points, grid_points
from pantarhei.systems.flow.image_models import FNO, ImageModel, UNet
from pantarhei.systems.sinenet import SineNet

# cavity, tube and dam, cylinder
SIZES = {
    "ffn": (71_701, 71_701, 72_001),
    "deeponet": (142_501, 142_501, 142_801),
    "auto-ffn": (1_102_401, 1_141_201, 1_141_801),
    "auto-deeponet": (551_901, 571_301, 571_601),
    "auto-edeeponet": (622_701, 642_101, 642_401),
    "auto-deeponet-cnn": (742_730, 742_730, 745_130),
    "resnet": (534_696, 534_696, 544_152),
    "unet": (1_095_038, 1_095_038, 1_095_362),
    "fno": (1_188_706, 1_188_706, 1_188_802),
}


@pytest.fixture(autouse=True)
def same_weights():
    torch.manual_seed(0)


def inputs(batch=3, channels=2, grid=(16, 16), parameters=5):
    mask = torch.ones(batch, 1, *grid)
    mask[:, :, 4:6, 3:5] = 0
    return torch.randn(batch, channels, *grid), torch.randn(batch, parameters), mask


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_published_models(name):
    channels = 2 if name in IMAGE_MODELS else 1
    for size, (grid, parameters) in zip(
        SIZES[name], (((64, 64), 5), ((66, 65), 5), ((66, 65), 8)), strict=True
    ):
        net = model(name, parameters, grid, channels)
        assert sum(p.numel() for p in net.parameters()) == size


@pytest.mark.parametrize("width", [7, 30])
def test_the_width_of_the_hidden_layers_can_be_chosen(width):
    net = model("auto-deeponet", 0, (16, 16), 3, history=2, width=width)
    hidden = 6 * (width + 1) * width + (width + 1) * 3 * width
    expected = (2 * 3 * 256 + 1) * width + (2 + 1) * width + 2 * hidden + 3
    assert sum(p.numel() for p in net.parameters()) == expected
    net, published = (
        model("auto-deeponet-cnn", 0, (16, 16), 3, **o) for o in ({"width": width}, {})
    )
    counts = [sum(p.numel() for p in n.out.parameters()) for n in (net, published)]
    assert counts == [513 * w + (w + 1) * w + 3 * (w + 1) for w in (width, 512)]
    assert net.step(torch.zeros(1, 3, 16, 16), torch.zeros(1, 0)).shape == (1, 3, 16, 16)


def test_norm_act_is_relu_between_standardising_and_back():
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    for net, axes in ((NormAct(), (2,)), (NormAct(whole=True), (1, 2))):
        mean, deviation = x.mean(axes, keepdim=True), x.std(axes, keepdim=True)
        expected = torch.relu((x - mean) / deviation) * deviation + mean
        torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", [n for n in MODELS if n not in POINT_MODELS])
def test_a_batch_equals_single_runs_of_step(name, channels):
    net = model(name, 5, (16, 16), channels).eval()
    field, omega, mask = inputs(channels=channels)
    together = net.step(field, omega, mask)
    assert together.shape == field.shape
    for i in range(3):
        one = slice(i, i + 1)
        alone = net.step(field[one], omega[one], mask[one])
        torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POINT_MODELS)
def test_a_batch_equals_single_runs_of_predict(name):
    net, omega, t = model(name, 5), torch.randn(3, 5), torch.tensor([0.0, 3.0, 90.0])
    points = torch.rand(7, 2) * 63
    together = net.predict(points, t, omega)
    assert together.shape == (3, 7, 2)
    for i in range(3):
        for q in range(7):  # one query at a time: the slow, obvious way
            alone = net.predict(points[q : q + 1], t[i : i + 1], omega[i : i + 1])
            torch.testing.assert_close(together[i, q], alone[0, 0], rtol=1e-4, atol=1e-5)
    each = net.predict(points.expand(3, 7, 2), t, omega)
    torch.testing.assert_close(each, together)
    frame = net.predict_frame(t, omega)
    at_cell = net.predict(torch.tensor([[2.0, 9.0]]), t, omega)[:, 0]
    torch.testing.assert_close(frame[:, :, 2, 9], at_cell, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", POINT_MODELS | STEP_AT_POINTS)
def test_permuted_queries_give_permuted_answers(name):
    net, omega, order = model(name, 5, (16, 16)), torch.randn(2, 5), torch.randperm(9)
    points = torch.rand(9, 2) * 15
    if name in POINT_MODELS:
        answers = [net.predict(p, torch.ones(2), omega) for p in (points, points[order])]
    else:
        field = inputs(2)[0]
        answers = [net.at(field, omega, p) for p in (points, points[order])]
    torch.testing.assert_close(answers[0][:, order], answers[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEP_AT_POINTS)
def test_the_whole_frame_equals_its_points(name):
    net, (field, omega, mask) = model(name, 5, (16, 16)), inputs()
    whole = net.step(field, omega, mask)
    points = torch.tensor([[0.0, 0.0], [5.0, 11.0], [15.0, 15.0]])
    some = net.at(field, omega, points, mask)
    rows, columns = points.long().unbind(1)
    torch.testing.assert_close(whole[:, :, rows, columns].mT, some, rtol=1e-4, atol=1e-5)


def test_published_deeponet_lets_queries_meet():
    points, t, omega = torch.rand(7, 2) * 63, torch.ones(2), torch.randn(2, 5)
    net = model("deeponet", 5, published=True)
    whole, part = net.predict(points, t, omega), net.predict(points[:3], t, omega)
    assert not torch.allclose(whole[:, :3], part, rtol=1e-2)


def test_published_auto_ffn_pairs_frames_with_the_wrong_queries():
    net, (field, omega, _) = model("auto-ffn", 5, (16, 16), published=True), inputs(2)
    changes = net.step(field, omega) - field
    single = torch.cat(
        [net.step(field[i : i + 1], omega[i : i + 1]) - field[i : i + 1] for i in (0, 1)]
    )
    assert not torch.allclose(changes, single, atol=1e-5)
    # entry (b, k) of the batch saw frame (b K + k) mod B: with B = 2 columns alternate
    torch.testing.assert_close(changes[0, :, :, 0::2], single[0, :, :, 0::2], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(changes[0, :, :, 1::2], single[1, :, :, 1::2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_masked_cells_are_zero(name):
    field, omega, mask = inputs()
    out = model(name, 5).eval().step(field, omega, mask)
    assert (out[(mask == 0).expand_as(out)] == 0).all()
    assert (out[(mask == 1).expand_as(out)] != 0).any()


def test_published_fno_ignores_the_mask():
    field, omega, mask = inputs()
    net = FNO(5, sees_mask=False)
    assert torch.equal(net.step(field, omega, mask), net.step(field, omega))


LAST = {
    "auto-ffn": "net.layers.8",
    "auto-deeponet": "branch.layers.7",
    "auto-edeeponet": "field_branch.layers.7",
    "auto-deeponet-cnn": "out.layers.2",
    "unet": "out",
}


@pytest.mark.parametrize("name", [*LAST, "resnet"])
def test_a_zero_last_layer_makes_the_identity(name):
    net = model(name, 5, (16, 16)).eval()
    last = [net.blocks[-1].conv2, net.blocks[-1].around] if name == "resnet" else []
    for module in last or [net.get_submodule(LAST[name])]:
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    field, omega, _ = inputs()
    assert torch.equal(net.step(field, omega), field)


def test_any_image_network_becomes_a_flow_model():
    field, omega, mask = inputs()
    net = SineNet(8, 2, waves=2, width=4, levels=2)
    out = ImageModel(net, 5).step(field, omega, mask)
    whole = torch.cat([field, mask, omega[:, :, None, None].expand(-1, -1, 16, 16)], 1)
    torch.testing.assert_close(out, (field + net(whole)) * mask)
    bare = ImageModel(net, 5, residual=False).step(field, omega, mask)
    torch.testing.assert_close(bare, net(whole) * mask)


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_grids_that_are_no_power_of_two_serve(name):
    field, omega, mask = inputs(1, grid=(22, 33))
    assert model(name, 5).eval().step(field, omega, mask).shape == field.shape


def test_unet_forecasts_a_frame_with_the_statistics_of_training():
    net, (field, omega, mask) = UNet(5), inputs()
    net.train().step(field, omega, mask)
    alone = net.eval().step(field[:1], omega[:1], mask[:1])
    torch.testing.assert_close(alone, net.step(field, omega, mask)[:1], rtol=1e-4, atol=1e-5)


def test_points_between_cells_are_interpolated():
    row, column = grid_points((5, 4)).T
    field = (2 * row - 3 * column + 1).view(1, 1, 5, 4)  # bilinear is exact for a plane
    points = torch.rand(9, 2) * torch.tensor([4.0, 3.0])
    expected = 2 * points[:, 0] - 3 * points[:, 1] + 1
    torch.testing.assert_close(at_points(field, points)[0, :, 0], expected)
    outside = at_points(field, torch.tensor([[-2.0, 9.0]]))
    assert float(outside) == float(field[0, 0, 0, 3])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: model("unett", 5), "Did you mean 'unet'"),
        (lambda: model("unet", 5, channels=0), r"choose 1 \(u\), 2"),
        (lambda: model("unet", 5).step(torch.ones(1, 1, 8, 8), torch.ones(1, 5)), "takes"),
        (lambda: model("unet", 5).step(torch.ones(1, 2, 8, 8), torch.ones(1, 4)), "5 parameters"),
        (lambda: model("ffn", 5).predict(torch.ones(1, 2), torch.ones(2), torch.ones(1, 5)), "5"),
        (lambda: model("auto-ffn", 5).step(torch.ones(1, 2, 8, 8), torch.ones(1, 5)), "made for"),
        (lambda: model("auto-deeponet-cnn", 5, (8, 8)), "too small"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(call, sentence):
    with pytest.raises(RequestError, match=sentence):
        call()
