"""The forecaster: what enters it, closed forms of its paths, baselines, and a user's own series."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from pantarhei.bayes import Ensemble
from pantarhei.bayes.gaussian import Gaussian
from pantarhei.data.series import (
    Amplitude,
    Decay,
    Frames,
    Last,
    Layout,
    Mean,
    Product,
    Raw,
    Recording,
    Scaler,
    Signal,
    Spectrum,
    Windows,
)
from pantarhei.errors import RequestError
from pantarhei.systems.series import (
    Encoder,
    Forecaster,
    Stream,
    convolutional,
    lead_curve,
    linear,
    persistence,
    recurrent,
    score,
    train_forecaster,
)
from pantarhei.systems.series.forecaster import Perceptron

LAYOUT = Layout(
    1.0,
    inputs=(Last("y"), Last("z"), Last("w", lags=1)),
    controls=(Last("u"),),
    targets=(Last("y"),),
)
FAST = {
    "epochs": 25, "batch_size": 32, "members": 3, "hidden": (8,), "lr": 0.02, "quiet": True,
    "device": "cpu",
}  # fmt: skip


def runs(count=6, length=240, seed=0):
    """y' = .8 y + .5 u + noise, whose noise grows with z; w says nothing."""
    rng = np.random.default_rng(seed)
    found = []
    for r in range(count):
        u = np.repeat(rng.normal(size=length // 6 + 1), 6)[:length]
        z, w = rng.uniform(0, 1, (2, length))
        y = np.zeros(length)
        for t in range(1, length):
            noise = (0.05 + 0.3 * (z[t - 1] > 0.5)) * rng.normal()
            y[t] = 0.8 * y[t - 1] + 0.5 * u[t] + noise
        signals = {"y": y, "z": z, "w": w, "u": u}
        found.append(Recording(f"r{r}", {k: Signal(v, rate=1.0) for k, v in signals.items()}))
    return found


@pytest.fixture(scope="module")
def data():
    frames = LAYOUT.all_frames(runs())
    return Windows(frames[:4], 3, 4), Windows(frames[4:], 3, 4)


@pytest.fixture(scope="module")
def trained(data):
    return train_forecaster(LAYOUT, data[0], seed=1, **FAST)


def test_inputs_are_the_chosen_cells_standardised_and_gaps_are_marked(data):
    encoder = Encoder.of(LAYOUT, data[0])
    past, future, _ = data[0].batch(torch.tensor([5, 9]))
    x = encoder(past, future)
    expected = [(n, lag) for lag in (-2, -1) for n in ("y", "z")]
    expected += [("y", 0), ("z", 0), ("w", 0)] + [("u", i) for i in (1, 2, 3, 4)]
    assert encoder.owners == (*expected, *((n, None) for n in ("y", "z", "w", "u")))
    scale = Scaler.of([f.inputs for f in data[0].frames])
    assert torch.allclose(x[:, 0], (past[:, 0, 0] - scale.mean[0]) / scale.sd[0])
    assert torch.allclose(x[:, 6], (past[:, 2, 2] - scale.mean[2]) / scale.sd[2])
    control = Scaler.of([f.controls for f in data[0].frames])
    assert torch.allclose(x[:, 8], (future[:, 1, 0] - control.mean[0]) / control.sd[0])
    assert (x[:, -4:] == 0).all()
    past[0, 1, 1] = torch.nan
    gap = encoder(past, future)
    assert gap[0, 3] == 0 and gap[0, 12] == pytest.approx(1 / 3) and (gap[1] == x[1]).all()
    some = Encoder.of(LAYOUT, data[0], ["u", "w"])
    assert some.owners[:2] == (("w", 0), ("u", 1)) and len(some) == 7
    assert len(Encoder.of(LAYOUT, data[0], ["w"], all_lags=True)) == 4
    with pytest.raises(RequestError, match="no sensor 'x'"):
        Encoder.of(LAYOUT, data[0], ["x"])
    with pytest.raises(RequestError, match="one sensor or more"):
        Encoder.of(LAYOUT, data[0], [])


def test_scales_do_not_know_the_test_runs(data):
    more = Windows([*data[0].frames, *data[1].frames], 3, 4)
    assert not torch.equal(Encoder.of(LAYOUT, data[0]).mean, Encoder.of(LAYOUT, more).mean)


def test_the_network_beats_persistence_and_knows_where_it_is_noisy(data, trained):
    train, test = data
    told, (_, _, y) = trained.forecast(test), test.tensors()
    assert told.means.shape == (3, len(test), 4, 1)
    first = score(told[:, 0], y[:, 0])
    still = score(persistence(train, test, range(1, 5))[:, 0], y[:, 0])
    assert first["rmse"] < 0.7 * still["rmse"] and first["nll"] < still["nll"] - 0.2
    loud = test.batch(torch.arange(len(test)))[0][:, -1, 1] > 0.5
    sd = told.aleatoric[:, 0, 0].sqrt()
    assert sd[loud].median() > 1.3 * sd[~loud].median()
    rows = lead_curve(told, y, trained.leads, 1.0)
    assert [row["seconds"] for row in rows] == [1.0, 2.0, 3.0, 4.0]
    assert rows[0]["rmse"] < rows[3]["rmse"]


def test_the_same_seed_is_the_same_forecast_and_lazy_windows_are_too(data, monkeypatch):
    def train():
        found = train_forecaster(LAYOUT, data[0], seed=1, **{**FAST, "epochs": 3})
        return found.forecast(data[1]).means

    told, again = train(), train()
    monkeypatch.setattr("pantarhei.systems.series.forecaster._IN_MEMORY", 0)
    assert torch.equal(told, again) and torch.allclose(told, train(), atol=1e-4)


def test_the_future_enters_only_through_the_planned_controls(data, trained):
    """Whatever a run does after t, the forecast at t stays; other plans change it."""
    run = runs(1, seed=9)[0]
    cut = 60.0
    late = {n: s.time_of(np.arange(len(s.values))) > cut for n, s in run.signals.items()}

    def forecast(*names):
        signals = dict(run.signals)
        for name in names:
            signals[name] = Signal(np.where(late[name], 50.0, signals[name].values), rate=1.0)
        windows = Windows([LAYOUT.frames(Recording("x", signals))], 3, 4)
        k = int(torch.nonzero(windows.times == cut)[0, 0])
        return trained.forecast(windows)[k]

    told, same, other = forecast(), forecast("y", "z", "w"), forecast("u")
    assert torch.equal(told.means, same.means) and torch.equal(told.variances, same.variances)
    assert (told.mean - other.mean).abs().max() > 0.1


class Order1(nn.Module):
    """mean = phi x_last, variance s^2, of inputs whose last lag of y is column 0."""

    def __init__(self, phi, sd):
        super().__init__()
        self.phi, self.log = nn.Parameter(torch.tensor(phi)), nn.Parameter(torch.tensor(sd).log())

    def forward(self, x):
        mean = self.phi * x[:, :1]
        return Gaussian(mean, torch.exp(2 * self.log).expand_as(mean))


def test_paths_of_linear_autoregressions_have_the_closed_form_mean_and_variance():
    layout = Layout(1.0, inputs=(Last("y", lags=1),), targets=(Last("y", lags=1),))
    y = np.linspace(-2, 2, 8, dtype=np.float32)[:, None]
    windows = Windows([Frames("a", y[:, 0].astype(float), y, y[:, :0], y)], 2, 5)
    encoder = Encoder.of(layout, Windows(windows.frames, 2, 1))
    target = Scaler.of([y])
    phis, sds = (0.9, -0.5), (0.3, 0.1)
    ensemble = Ensemble([Order1(p, s) for p, s in zip(phis, sds, strict=True)])
    forecaster = Forecaster(encoder, target, ensemble, (1,), "autoregressive", (0,))
    told = forecaster.forecast(windows, paths=20_000, seed=3)
    now = (windows.present[:, 0] - target.mean[0]) / target.sd[0]
    for j, (phi, sd) in enumerate(zip(phis, sds, strict=True)):
        for k in range(1, 6):
            mean = target.mean[0] + target.sd[0] * phi**k * now
            variance = (target.sd[0] * sd) ** 2 * (1 - phi ** (2 * k)) / (1 - phi**2)
            assert torch.allclose(told.means[j, :, k - 1, 0], mean, atol=0.02)
            assert told.variances[j, :, k - 1, 0].mean().item() == pytest.approx(variance, rel=0.03)
    some = forecaster.forecast(windows, leads=(2, 5), paths=20_000, seed=3)
    assert torch.allclose(some.means, told.means[:, :, [1, 4]], atol=1e-5)
    with pytest.raises(RequestError, match="two paths"):
        forecaster.forecast(windows, paths=1)


def test_an_autoregressive_forecaster_learns_the_process_and_uses_later_controls(data):
    train, test = data
    found = train_forecaster(LAYOUT, train, mode="autoregressive", seed=2, **FAST)
    told, (_, _, y) = found.forecast(test, paths=40), test.tensors()
    rows = lead_curve(told, y, range(1, 5))
    still = persistence(train, test, range(1, 5))
    for k, row in enumerate(rows):
        assert row["rmse"] < 0.8 * score(still[:, k], y[:, k])["rmse"]
        assert 0.75 < row["coverage"] < 1.0
    blind = Layout(1.0, LAYOUT.inputs[1:], LAYOUT.controls, LAYOUT.targets)
    frames = blind.all_frames(runs(2))
    with pytest.raises(RequestError, match="not among the inputs"):
        train_forecaster(blind, Windows(frames, 3, 4), mode="autoregressive", **FAST)
    with pytest.raises(RequestError, match="autoregressive forecaster, not a direct"):
        next(train_forecaster(LAYOUT, train, **{**FAST, "epochs": 1}).draw(test))


def test_the_linear_baseline_is_the_best_linear_model_and_persistence_the_present(data):
    train, test = data
    told, (_, _, y) = linear(LAYOUT, train, test, (1, 2)), test.tensors()
    rows = score(told[:, 0], y[:, 0])
    assert rows["rmse"] == pytest.approx(np.sqrt((0.05**2 + 0.35**2) / 2), rel=0.15)
    assert 0.9 < rows["z_sd"] < 1.1
    still = persistence(train, test, (3,))
    assert torch.equal(still.mean[:, 0, 0], test.present[:, 0])
    (_, _, before) = train.tensors()
    missed = ((before[:, 2, 0] - train.present[:, 0]) ** 2).mean()
    assert still.variance[0, 0, 0].item() == pytest.approx(missed.item())


@pytest.mark.filterwarnings("ignore:members train one by one")
def test_a_recurrent_network_and_a_users_own(data):
    train, test = data
    (_, _, y) = test.tensors()
    gru = train_forecaster(
        LAYOUT, train, network=recurrent(LAYOUT, 3, hidden=8), all_lags=True, seed=0,
        **{**FAST, "members": 1, "anchored": False},
    )  # fmt: skip
    still = score(persistence(train, test, (1,))[:, 0], y[:, 0])
    assert score(gru.forecast(test)[:, 0], y[:, 0])["rmse"] < 0.8 * still["rmse"]

    class Mine(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.layer = nn.Linear(inputs, 2 * outputs)

        def forward(self, x):
            mean, log = self.layer(x).chunk(2, 1)
            return mean, log.exp()

    mine = train_forecaster(LAYOUT, train, network=Mine, leads=(1, 4), perturb=0.3, **FAST)
    told = mine.forecast(test)
    assert told.means.shape[2] == 2 and score(told[:, 0], y[:, 0])["rmse"] < still["rmse"]
    with pytest.raises(RequestError, match="whose past it reads"):
        recurrent(LAYOUT, 3, ["u"])


def test_a_stream_says_what_the_windows_say(data, trained):
    frames = data[1].frames[0]
    stream, told = Stream(trained), trained.forecast(data[1])
    for k in range(6):
        planned = frames.controls[k + 1 : k + 5]
        found = stream.update(frames.inputs[k], planned)
        if k < 2:
            assert found is None
        else:
            assert torch.allclose(found.means, told.means[:, k - 2], atol=1e-5)
    with pytest.raises(RequestError, match=r"give \(4, 1\)"):
        stream.update(frames.inputs[0], planned[:2])


def test_leads_and_windows_that_do_not_fit_are_refused(data, trained):
    for leads, reason in (((0, 1), "ascending"), ((2, 1), "ascending"), ((9,), "beyond")):
        with pytest.raises(RequestError, match=reason):
            train_forecaster(LAYOUT, data[0], leads=leads, **FAST)
    with pytest.raises(RequestError, match="looks 3 frames back"):
        trained.forecast(Windows(data[1].frames, 5, 4))


def test_convolutions_read_how_loud_a_raw_signal_is():
    """The next value is the loudness of the signal, of which no single sample tells."""
    rng = np.random.default_rng(0)
    raw = Raw("p", 64)
    layout = Layout(1.0, inputs=(Last("w"), raw, Last("y")), targets=(Last("y"),))
    frames = []
    for r in range(3):
        loud = rng.uniform(0.2, 2, 150)
        p = np.repeat(loud, 64) * np.sin(np.arange(150 * 64) * 1.3 + rng.uniform(0, 6))
        y, w = np.r_[0, loud[:-1]], rng.normal(size=150)
        signals = {"p": Signal(p, rate=64.0, start=-1 + 1 / 64), "y": Signal(y, rate=1.0)}
        signals["w"] = Signal(w, rate=1.0)
        frames.append(layout.frames(Recording(f"{r}", signals)))
    train, test = Windows(frames[:2], 2, 1), Windows(frames[2:], 2, 1)
    y = test.tensors()[2][:, 0]
    found = {}
    for name, network in (("conv", convolutional(layout, 2, raw, hidden=(8,))), ("mlp", None)):
        one = train_forecaster(layout, train, network=network, **{**FAST, "epochs": 60})
        found[name] = score(one.forecast(test)[:, 0], y)["rmse"]
    assert found["conv"] < 0.15 and found["conv"] < 0.5 * found["mlp"]
    x = torch.zeros(1, len(Encoder.of(layout, train)))
    x[0, convolutional(layout, 2, raw)(x.shape[1], 1).signal] = 1.0
    owners = Encoder.of(layout, train).owners
    assert {owners[i] for i in torch.nonzero(x[0])[:, 0]} == {("p", 0)}
    for bad, reason in ((Raw("q", 64), "not among the inputs"), (Last("w"), "64 samples")):
        with pytest.raises(RequestError, match=reason):
            convolutional(layout, 2, bad)


def test_a_saved_forecaster_says_what_it_said(data, trained, tmp_path):
    test = data[-1]
    trained.save(tmp_path / "model")
    again = Forecaster.load(tmp_path / "model")
    one, two = trained.forecast(test), again.forecast(test)
    assert torch.equal(one.means, two.means) and torch.equal(one.variances, two.variances)
    assert again.encoder.layout == trained.encoder.layout and again.leads == trained.leads
    assert again.encoder.owners == trained.encoder.owners
    with pytest.raises(RequestError, match="there already"):
        trained.save(tmp_path / "model")
    about = tmp_path / "model" / "forecaster.json"
    text = about.read_text()
    for damage, reason in (
        ("{}", "not a saved forecaster"),
        ("[]", "not a saved forecaster"),
        (text.replace('"Last"', '"Lost"'), "no layout of features"),
        (text.replace('"channel"', '"chanel"'), "no layout of features"),
        (text.replace('"members": ', '"members": 9'), "not the weights of 9"),
    ):
        assert damage != text
        about.write_text(damage)
        with pytest.raises(RequestError, match=reason):
            Forecaster.load(tmp_path / "model")


def test_every_feature_and_both_modes_are_kept(tmp_path):
    features = (
        Last("a", hold=2.0), Mean("b", lags=2), Amplitude("c", band=(5.0, 9.0), sensor="s"),
        Spectrum("c", centre=7.0, bins=3), Decay("c", 5.0), Raw("d", 4), Product("a", "b"),
    )  # fmt: skip
    layout = Layout(0.5, features, (Last("e"),), (Last("a", hold=2.0),), warmup=1.5)
    text = json.dumps(layout.to_json(), allow_nan=False)
    assert Layout.from_json(json.loads(text)) == layout

    class Mine:
        names, group, lags = ("x",), "x", None

    with pytest.raises(RequestError, match=r"of your own \(Mine\) is not kept"):
        Layout(0.5, (Mine(),)).to_json()


def test_networks_of_ones_own_are_given_again(data, tmp_path):
    train, test = data

    def network(inputs, outputs):
        return Perceptron(inputs, outputs, hidden=(5,))

    class Own(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.inside = network(inputs, outputs)

        def forward(self, x):
            return self.inside(x)

    for make in (network, Own):
        made = train_forecaster(LAYOUT, train, members=2, epochs=1, network=make, leads=(1, 3),
                                device="cpu", quiet=True)  # fmt: skip
        made.save(tmp_path / make.__name__)
    assert torch.equal(
        Forecaster.load(tmp_path / "network").ensemble.stacked.line.weight,
        Forecaster.load(tmp_path / "network", network).ensemble.stacked.line.weight,
    )
    with pytest.raises(RequestError, match="give network="):
        Forecaster.load(tmp_path / "Own")
    again = Forecaster.load(tmp_path / "Own", Own)
    assert torch.equal(again.forecast(test).means, made.forecast(test).means)
