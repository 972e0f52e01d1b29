"""The FNO of neuraloperator: what it shares with ours, and that it is kept."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.systems.fno import FNO
from pantarhei.systems.forecaster import FieldForecaster, build
from pantarhei.systems.neuralop_fno import NeuralopFNO, neuralop


@pytest.fixture
def library():
    return pytest.importorskip("neuralop", reason="neuraloperator is not installed").models


def with_our_weights(library, ours, activation):
    """Their FNO with the weights of ours, and one more block that hands on what it gets."""
    width, modes, layers = (ours.arguments[k] for k in ("width", "modes", "layers"))
    space = ours.arguments["space"]
    theirs = library.FNO(
        n_modes=(*(2 * modes,) * (space - 1), 2 * modes - 2),  # of the last axis they keep n/2 + 1
        in_channels=ours.arguments["in_ch"],
        out_channels=ours.arguments["out_ch"],
        hidden_channels=width,
        n_layers=layers + 1,  # after their last block there is no activation
        lifting_channel_ratio=0,
        projection_channel_ratio=ours.arguments["hidden"] / width,
        positional_embedding=None,
        non_linearity=activation,
        use_channel_mlp=False,
    )
    blocks = theirs.fno_blocks
    with torch.no_grad():
        pairs = [(theirs.lifting.fcs[0], ours.lift)]
        pairs += list(zip(theirs.projection.fcs, (ours.project[0], ours.project[2]), strict=True))
        for own, other in pairs:
            own.weight.copy_(other.weight.flatten(2))
            own.bias.copy_(other.bias)
        for layer in range(layers):
            weights = ours.spectral[layer].weights  # a block for each choice of signs
            if space == 2:  # they keep both signs in one block, the negative ones first
                weights = torch.cat([weights[1], weights[0]], 2)[None]
            blocks.convs[layer].weight.tensor.copy_(weights[0])
            blocks.convs[layer].bias.copy_(ours.pointwise[layer].bias.view(-1, *(1,) * space))
            blocks.fno_skips[layer].conv.weight.copy_(ours.pointwise[layer].weight.flatten(2))
        blocks.convs[layers].weight.tensor.zero_()
        blocks.convs[layers].bias.zero_()
        blocks.fno_skips[layers].conv.weight.copy_(torch.eye(width)[..., None])
    return theirs


@pytest.mark.parametrize(("space", "size"), [(1, (24,)), (2, (16, 20))])
def test_theirs_is_ours_where_a_second_activation_changes_nothing(
    library, monkeypatch, space, size
):
    torch.manual_seed(0)
    ours = FNO(3, 2, width=8, modes=4, layers=3, hidden=16, space=space)
    x = torch.randn(2, 3, *size)
    smooth = with_our_weights(library, ours, F.gelu)(x) - ours(x)
    theirs = with_our_weights(library, ours, F.relu)
    monkeypatch.setattr(F, "gelu", lambda x, approximate="none": F.relu(x))
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)
    assert smooth.abs().max() > 1e-3  # with GELU they apply it twice in every layer


def test_a_forecaster_of_it_is_trained_saved_and_loaded(library, tmp_path):
    rng = np.random.default_rng(0)
    data = Trajectories.of(rng.normal(size=(4, 5, 2, 16, 16)), parameters=rng.normal(5, 2, (4, 1)))
    torch.manual_seed(0)
    net = build("told", net="neuralop-fno", columns=[0], in_ch=2, out_ch=2, width=4, modes=3)
    one = FieldForecaster.of(net, data, [0, 1], history=1, given=("parameters",))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one.train(data, [0, 1], steps=2, batch_size=2, quiet=True, device="cpu", precision="bf16")
    assert any(v.is_complex() and not torch.equal(v, before[k])
               for k, v in net.state_dict().items())  # fmt: skip
    one.save(tmp_path / "one")
    again = FieldForecaster.load(tmp_path / "one")
    start, told = data.tensor([2, 3])[:, :1], one.told(data, [2, 3])
    assert torch.equal(again.forecast(start, 3, *told).kept, one.forecast(start, 3, *told).kept)


@pytest.mark.parametrize("space", [1, 3])
def test_other_numbers_of_axes(library, space):
    net = NeuralopFNO(2, 1, width=4, modes=3, layers=2, space=space)
    assert net(torch.zeros(1, 2, *(8,) * space)).shape == (1, 1, *(8,) * space)


def test_without_the_library_one_sentence_says_what_to_install(monkeypatch):
    neuralop.cache_clear()
    monkeypatch.setitem(sys.modules, "neuralop.models", None)
    with pytest.raises(RequestError, match=r"pip install 'pantarhei\[neuraloperator\]'"):
        build("neuralop-fno", in_ch=1, out_ch=1)
    with pytest.raises(RequestError, match="1 to 3 axes"):
        build("neuralop-fno", in_ch=0, out_ch=1)
    neuralop.cache_clear()
