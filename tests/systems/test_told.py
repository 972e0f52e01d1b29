"""Networks that are told parameters and masks: it reaches them, it helps, and it is kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.systems.forecaster import FieldForecaster, build
from pantarhei.systems.parameters import ParameterScale
from pantarhei.systems.sinenet import SineNet
from pantarhei.systems.told import Told

SINENET = {"waves": 2, "width": 8, "levels": 2, "mult": 1.4, "padding": "circular"}
NETS = {
    "sinenet": ("sinenet", SINENET),
    "unet": ("sinenet", SINENET | {"waves": 1, "as_channels": True, "wave_residual": False}),
    "dil-resnet": ("dil-resnet", {"width": 8, "blocks": 1, "padding": "circular"}),
    "fno": ("fno", {"width": 8, "modes": 5, "layers": 2}),
    "ffno": ("ffno", {"width": 8, "modes": 5, "layers": 2}),
    "auto-deeponet": ("auto-deeponet", {}),
    "auto-edeeponet": ("auto-edeeponet", {}),
    "auto-deeponet-cnn": ("auto-deeponet-cnn", {}),
    "auto-ffn": ("auto-ffn", {}),
}


def told(name, space=(16, 16), columns=(0,), mask=True, channels=1, history=1):
    net, arguments = NETS[name]
    torch.manual_seed(0)
    if name.startswith("auto"):
        size = {"channels": channels, "grid": space, "history": history}
    else:
        size = {"in_ch": channels * history, "out_ch": channels, "space": len(space)}
    return Told(net, columns, mask, **arguments, **size)


def moving(cases=24, frames=4, n=32, seed=0, unit=1.0):
    """Waves that move by 1, 2 or 3 cells a step: one frame does not say by what."""
    rng = np.random.default_rng(seed)
    speed, phase = 1 + np.arange(cases) % 3, rng.uniform(0, 2 * np.pi, (2, cases, 1, 1))
    x = 2 * np.pi * (np.arange(n) - speed[:, None, None] * np.arange(frames)[:, None]) / n
    states = np.sin(x + phase[0]) + 0.5 * np.sin(2 * x + phase[1])
    table = np.stack([np.full(cases, 7.0), unit * speed], 1)
    return Trajectories.of(
        states[:, :, None].astype(np.float32), parameters=table, parameter_names=("g", "speed")
    )


def one_step(name, given, seed=0):
    """Train on what is given, and return the error of one step on other cases."""
    data = moving()
    net = told(name, (32,), columns=(1,) if given else (), mask=False)
    if given:
        net.scale = ParameterScale.of(data.parameters[:18, [1]])
    one = FieldForecaster.of(net, data, range(18), history=1, given=given)
    one.train(data, range(18), steps=120, batch_size=27, lr=5e-3, schedule="cosine", quiet=True,
              device="cpu")  # fmt: skip
    return one.evaluate(data, range(18, 24), forced=3).mean("relative_l2")


@pytest.mark.parametrize("name", ["sinenet", "unet", "dil-resnet", "fno", "ffno"])
def test_a_model_that_is_told_the_speed_beats_one_that_is_not(name):
    assert one_step(name, ("parameters",)) < 0.5 * one_step(name, ())


@pytest.mark.parametrize("name", NETS)
def test_parameters_and_mask_reach_the_forecast(name):
    net = told(name, columns=(2, 0)).eval()
    net.scale = ParameterScale.of(np.array([[1.0, 10.0], [3.0, 30.0]]))
    x, table = torch.randn(2, 1, 16, 16), torch.tensor([[10.0, 5.0, 1.0], [30.0, 5.0, 3.0]])
    mask = torch.ones(2, 16, 16)
    mask[1, 4:8] = 0
    with torch.no_grad():
        out = net(x, table, mask)
        assert out.shape == x.shape
        seen = net(x, table * torch.tensor([1.0, 2.0, 1.0]), mask)
        assert torch.equal(seen, out)  # the second is none of its columns
        for column in (0, 2):
            changed = table.clone()
            changed[0, column] *= 2
            other = net(x, changed, mask)
            assert not torch.allclose(other[0], out[0], atol=1e-7)
            torch.testing.assert_close(other[1], out[1])
        blind = {"auto-deeponet", "auto-edeeponet", "auto-ffn"}  # as published: no mask inside
        assert torch.equal(net(x, table, torch.ones(2, 16, 16))[1], out[1]) == (name in blind)


def test_units_of_the_parameters_do_not_matter():
    net = told("fno", (32,), columns=(1,), mask=False)
    x = torch.randn(4, 1, 32)
    out = []
    for unit in (1.0, 1e-6):
        table = moving(cases=4, unit=unit).parameters
        net.scale = ParameterScale.of(table[:, [1]])
        out.append(net(x, torch.from_numpy(table).float()))
    torch.testing.assert_close(out[0], out[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sinenet", "unet", "fno", "auto-deeponet-cnn"])
def test_a_told_forecaster_is_kept_with_its_scale(name, tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.random((4, 16, 16)) < 0.8
    data = Trajectories.of(
        rng.normal(size=(4, 5, 2, 16, 16)), parameters=rng.normal(5, 2, (4, 2)), mask=mask
    )
    net = told(name, columns=(1,), channels=2, history=2)
    net.scale = ParameterScale.of(data.parameters[:, [1]])
    one = FieldForecaster.of(net, data, [0, 1], history=2, given=("parameters", "mask"))
    one.train(data, [0, 1], steps=2, batch_size=2, quiet=True, device="cpu")
    one.save(tmp_path / "one")
    again = FieldForecaster.load(tmp_path / "one")
    start, given = data.tensor([2, 3])[:, :2], one.told(data, [2, 3])
    found = again.forecast(start, 3, *given).kept
    assert torch.equal(found, one.forecast(start, 3, *given).kept)
    assert not torch.equal(found, again.forecast(start, 3, given[0] + 1, given[1]).kept)


def test_a_sinenet_with_a_mask_alone_takes_it_from_the_forecaster():
    rng = np.random.default_rng(0)
    data = Trajectories.of(rng.normal(size=(3, 4, 1, 8, 8)), mask=rng.random((3, 8, 8)) < 0.7)
    net = SineNet(1, 1, waves=1, width=4, levels=1, mask=True)
    one = FieldForecaster.of(net, data, [0], history=1, given=("mask",))
    assert one.evaluate(data, [0, 1]).scores["relative_l2"].shape == (2, 3, 1)


def test_a_deeponet_sees_its_whole_history_and_goes_on_from_the_last_frame():
    net = told("auto-deeponet", (8, 8), columns=(), mask=False, channels=2, history=3)
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    net(x).sum().backward()
    assert all((x.grad[:, c].abs() > 0).all() for c in range(6))
    for parameter in net.net.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(net(x), x[:, 4:])


def test_what_does_not_fit_is_one_sentence():
    net = told("fno")
    for given in ((), (torch.ones(2, 1),)):
        with pytest.raises(RequestError, match="is told 1 parameters and a mask"):
            net(torch.zeros(2, 1, 16, 16), *given)
    with pytest.raises(RequestError, match="Did you mean"):
        build("told", net="fnoo", in_ch=1, out_ch=1)
