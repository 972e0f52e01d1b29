from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.data.simulate.translation import Translation
from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.rollout import correlation_time, persistence, radial_spectrum, relative_l2, rollout
from pantarhei.systems import forecaster as fc
from pantarhei.systems.fno import FNO
from pantarhei.systems.forecaster import FieldForecaster, build, warmup_cosine
from pantarhei.systems.sinenet import SineNet

DATA = Translation(size=16, shift_x=1, waves=2, frames=8).simulate(range(12))


class Roll(nn.Module):
    """The exact one-step map in normalised units (the mean is nearly zero, but not quite)."""

    def __init__(self, mean, sd, decay=0.98):
        super().__init__()
        self.own = nn.Parameter(torch.zeros(()))
        self.mean, self.sd, self.decay = mean, sd, decay

    def forward(self, x, *told):
        physical = x * self.sd + self.mean
        return (self.decay * physical.roll(1, 3) - self.mean) / self.sd + self.own


def oracle(**options):
    made = FieldForecaster.of(nn.Identity(), DATA, range(8), history=1, **options)
    made.model = Roll(float(made.statistics.mean[0]), float(made.statistics.sd[0]))
    return made


def test_an_oracle_has_no_error_in_physical_units():
    found = oracle().evaluate(DATA, range(12), keep="all")
    assert found.scores["relative_l2"].shape == (12, 7, 1)
    assert found.scores["relative_l2"].max() < 1e-4
    assert found.scores["correlation"].min() > 0.999
    torch.testing.assert_close(found.kept, DATA.tensor()[:, 1:], atol=1e-4, rtol=1e-4)
    forecast = oracle().forecast(DATA.tensor([3], 0, 1), 7)
    torch.testing.assert_close(forecast.kept, DATA.tensor([3], 1), atol=1e-4, rtol=1e-4)


def test_more_cases_than_a_batch_and_some_that_blow_up(monkeypatch):
    monkeypatch.setattr(fc, "_BATCH", 5)
    found = oracle().evaluate(DATA, range(12), 3)
    assert found.scores["relative_l2"].shape == (12, 3, 1) and found.blown == 0
    wild = oracle()
    wild.model = Roll(0.0, 1.0, decay=30.0)
    found = wild.evaluate(DATA, range(12), limit=200.0)
    assert found.blown == 12 and found.scores["relative_l2"].shape[0] == 12


def test_training_learns_and_one_seed_gives_one_model(tmp_path):
    def trained():
        torch.manual_seed(0)
        net = SineNet(2, 1, waves=2, width=6, mult=1.5, levels=2, padding="circular")
        made = FieldForecaster.of(net, DATA, range(8), history=2)
        before = made.evaluate(DATA, [10, 11]).scores["relative_l2"].mean()
        result = made.train(DATA, range(8), [8, 9], steps=60, batch_size=8, lr=3e-3, seed=1,
                            schedule="cosine", device="cpu", quiet=True)  # fmt: skip
        return made, before, result

    made, before, result = trained()
    found = made.evaluate(DATA, [10, 11])
    assert found.scores["relative_l2"].mean() < 0.7 * before
    assert result.best is not None and result.best_step is not None
    again, _, _ = trained()
    x = torch.randn(1, 2, 16, 16)
    assert torch.equal(made.model(x), again.model(x))
    made.save(tmp_path / "saved")
    loaded = FieldForecaster.load(tmp_path / "saved")
    assert torch.equal(loaded.model(x), made.model(x))
    assert loaded.channels == ("u",) and loaded.history == 2 and loaded.dt == 1.0
    scores = loaded.evaluate(DATA, [10, 11]).scores["relative_l2"]
    assert torch.equal(scores, found.scores["relative_l2"])
    with pytest.raises(RequestError, match="there already"):
        made.save(tmp_path / "saved")


def test_parameters_and_masks_reach_the_model():
    data = Trajectories.of(DATA.tensor().numpy(), channels=("u",), parameters=np.arange(12.0),
                           mask=np.ones((16, 16)))  # fmt: skip
    seen = []

    class Watching(Roll):
        def forward(self, x, parameters, mask):
            seen.append((parameters, mask))
            return super().forward(x)

    made = FieldForecaster.of(Watching(0.0, 1.0), data, range(8), history=1,
                              given=("parameters", "mask"))  # fmt: skip
    made.evaluate(data, [4, 7], 1)
    assert seen[0][0].tolist() == [[4.0], [7.0]] and seen[0][1].shape == (2, 16, 16)
    made.train(data, range(8), steps=1, batch_size=4, quiet=True, device="cpu")
    assert seen[-1][0].shape == (4, 1)
    with pytest.raises(RequestError, match="data hold none"):
        made.evaluate(DATA, [0], 1)


def test_a_model_of_ones_own_is_saved_and_loaded_with_it(tmp_path):
    made = oracle()
    made.save(tmp_path / "own")
    with pytest.raises(RequestError, match="give it as model="):
        FieldForecaster.load(tmp_path / "own")
    loaded = FieldForecaster.load(tmp_path / "own", oracle().model)
    found = loaded.evaluate(DATA, [0], metrics={"l2": relative_l2})
    assert found.mean("l2") < 1e-4


def test_the_schedule_of_the_paper():
    factor = warmup_cosine(50, 5, 2e-4)
    rates = [2e-4 * factor(e / 50) for e in range(51)]
    assert rates[0] == pytest.approx(1e-7) and rates[5] == 2e-4 == max(rates)
    assert rates[50] == pytest.approx(1e-7) and rates[1] == pytest.approx(1e-7 + (2e-4 - 1e-7) / 5)
    assert factor(5.4 / 50) == factor(5 / 50)


def test_correlation_time_and_the_spectrum_of_the_error_as_the_page_says():
    rng = np.random.default_rng(0)
    data = Trajectories.of(rng.normal(size=(3, 6, 2, 16, 16)), dt=0.5)
    made = FieldForecaster.of(SineNet(2, 2, waves=1, width=4, levels=2), data, [0], history=1)
    found = made.evaluate(
        data, [1, 2], metrics={"spectrum": lambda p, y: radial_spectrum(p - y)}, keep="all"
    )
    gap = found.kept - data.tensor([1, 2])[:, 1:]
    torch.testing.assert_close(  # Parseval: every scale of the error is there
        found.scores["spectrum"].sum(-1), gap.square().mean((3, 4))
    )
    alike = made.evaluate(data, [1, 2]).scores["correlation"].mean(2)
    assert (correlation_time(alike, data.dt) < data.dt).all()  # noise is not forecast at all


def test_wrong_requests_are_one_sentence(tmp_path):
    made = oracle()
    other = Trajectories.of(DATA.tensor().numpy(), channels=("v",))
    with pytest.raises(RequestError, match="the data hold"):
        made.evaluate(other, [0])
    with pytest.raises(RequestError, match="starts from"):
        made.forecast(torch.zeros(1, 2, 1, 16, 16), 3)
    with pytest.raises(RequestError, match="Did you mean 'sinenet'"):
        build("sinnet")
    with pytest.raises(RequestError, match="does not exist"):
        FieldForecaster.load(tmp_path)
    FieldForecaster.of(SineNet(1, 1, waves=1, width=4, levels=1), DATA, [0], history=1).save(
        tmp_path / "a"
    )
    description = tmp_path / "a" / "forecaster.json"
    text = description.read_text()
    for damage in ("{}", json.dumps({**json.loads(text), "arguments": {"waves": 3}})):
        description.write_text(damage)
        with pytest.raises(RequestError, match="not a saved forecaster"):
            FieldForecaster.load(tmp_path / "a")
    description.write_text(text)
    (tmp_path / "a" / "weights.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(RequestError, match="not a saved forecaster"):
        FieldForecaster.load(tmp_path / "a")


def test_burgers_of_another_hand_is_forecast_better_than_by_persistence():
    path = Path(os.environ.get("PANTARHEI_DATA", "../shared/data")) / "pde_small/burgers_16.npz"
    if not path.exists():
        pytest.skip("the shared data are not on this machine")
    with np.load(path, allow_pickle=False) as found:
        states = np.concatenate([found["train"][:200], found["test"][:50]])[:, :, None]
    data = Trajectories.of(states, channels=("u",))
    training, test = range(200), range(200, 250)
    torch.manual_seed(0)
    made = FieldForecaster.of(FNO(1, 1, width=16, modes=8, space=1), data, training, history=1)
    made.train(data, training, steps=300, lr=5e-3, schedule="cosine", device="cpu", quiet=True)
    ours = made.evaluate(data, test).mean("relative_l2")
    start, truth = data.tensor(test)[:, :1], data.tensor(test)[:, 1:]
    stays = rollout(persistence, start, 16, truth=truth, metrics={"l2": relative_l2},
                    layout="window")  # fmt: skip
    assert ours < 0.2 * stays.mean("l2")
