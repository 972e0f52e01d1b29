"""``pantarhei forecast`` on arrays of one's own: what it writes, compares and refuses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from PIL import Image

from pantarhei import cli
from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError
from pantarhei.systems.forecaster import FieldForecaster
from pantarhei.systems.neuralop_fno import neuralop


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Call the command line in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def invoke(*words):
        code = cli.main(["forecast", *map(str, words)])
        return code, *capsys.readouterr()

    return invoke


def waves(cases=8, frames=9, size=(16, 16), seed=0, **about):
    """Waves that travel one cell a frame: persistence is wrong, a shift is right."""
    rng = np.random.default_rng(seed)
    x = [2 * np.pi * np.arange(n) / n for n in size]
    phases = rng.uniform(0, 2 * np.pi, (cases, 1, 2, *(1,) * len(size)))
    shift = 2 * np.pi / size[0] * np.arange(frames).reshape(1, -1, 1, *(1,) * len(size))
    grid = np.meshgrid(*x, indexing="ij")
    states = np.sin(grid[0] - shift + phases) + 0.1 * rng.normal(size=(cases, 1, 2, *size))
    return Trajectories.of(states.astype(np.float32), channels=("u", "v"), dt=0.5, **about)


SMALL = ("--steps", 3, "--members", 2, "--parameters", 30_000, "--history", 1, "--device", "cpu")


def test_it_forecasts_arrays_of_ones_own(call, tmp_path):
    waves().save(tmp_path / "mine.npz")
    code, out, _ = call("mine.npz", *SMALL, "--horizon", 4, "--baseline", "unet", "--out", "found",
                        "--json")  # fmt: skip
    told = json.loads(out)
    assert code == 0
    names = [row["model"] for row in told["table"]]
    assert names == ["sinenet", "unet", "persistence", "training mean"]
    rows = list(csv.DictReader((tmp_path / "found" / "errors.csv").open()))
    assert [float(row["time"]) for row in rows] == [0.5, 1.0, 1.5, 2.0]
    with np.load(tmp_path / "found" / "forecast.npz") as kept:
        truth, shown, low, high, cases = (
            kept[k] for k in ("truth", "forecast", "low", "high", "cases")
        )
        assert truth.shape == shown.shape == (len(cases), 4, 2, 16, 16)
        assert (low <= shown).all() and (shown <= high).all()
        inside = (low <= truth) & (truth <= high)
    np.testing.assert_allclose(
        inside.mean((0, 2, 3, 4)), [float(row["coverage"]) for row in rows], atol=1e-6
    )
    # the errors are of what was written, in units of the training data's deviation
    data = waves()
    one = FieldForecaster.load(tmp_path / "found" / "model-0")
    sd = one.statistics.sd.reshape(1, 1, 2, 1, 1)
    error = np.sqrt((((shown - truth) / sd) ** 2).mean((3, 4))).mean((0, 2))
    np.testing.assert_allclose(error, [float(row["sinenet"]) for row in rows], rtol=1e-4)
    start = data.tensor(cases, 0, 1)
    member = one.forecast(start, 4).kept
    other = FieldForecaster.load(tmp_path / "found" / "model-1").forecast(start, 4).kept
    np.testing.assert_allclose((member + other) / 2, shown, rtol=1e-4, atol=1e-5)
    with Image.open(tmp_path / "found" / "forecast.gif") as film:
        assert film.n_frames == 4
    for name in ("errors", "frames"):
        assert (tmp_path / "found" / f"{name}.png").stat().st_size > 5000


def test_the_naive_forecasts_are_what_they_say(call, tmp_path):
    data = waves()
    data.save(tmp_path / "mine.npz")
    other = waves(cases=3, seed=9)
    other.save(tmp_path / "test.npz")
    code, out, _ = call("mine.npz", *SMALL, "--horizon", 2, "--test", "test.npz", "--out", "found",
                        "--model", "fno", "--json")  # fmt: skip
    told = json.loads(out)
    assert code == 0 and told["tested on"] == 3 and told["trained on"] + told["calibrated on"] == 8
    rows = {row["model"]: row for row in told["table"]}
    sd = FieldForecaster.load(tmp_path / "found" / "model-0").statistics.sd.reshape(1, 2, 1, 1)
    states = other.tensor(None, 0, 3).numpy()
    gap = (states[:, 0] - states[:, 2]) / sd
    expected = np.sqrt((gap**2).mean((2, 3))).mean()
    assert rows["persistence"]["step 2"] == pytest.approx(expected, rel=1e-4)
    assert rows["persistence"]["skill over persistence"] == 0
    assert rows["training mean"]["parameters"] is None


@pytest.mark.parametrize("size", [(32,), (8, 8, 8)])
def test_one_and_three_dimensions(call, tmp_path, size):
    waves(size=size, cases=4, frames=4).save(tmp_path / "mine.npz")
    code, _, err = call("mine.npz", *SMALL, "--horizon", 2, "--out", "found", "--json",
                        "--padding", "circular")  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "found" / "forecast.gif").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("none.npz",), "does not exist"),
        (("mine.npz", "--model", "sinnet"), "Did you mean 'sinenet'"),
        (("mine.npz", "--horizon", 30), "the shortest has 9"),
        (("mine.npz", "--coverage", 1.5), "--coverage"),
        (("mine.npz", "--padding", "mirror"), "choose zeros or circular"),
        (("mine.npz", "--out", "."), "new folder"),
        (("two.npz",), "2 trajectories"),
        (("mine.csv",), "forecast-series mine.csv"),
        (("mine.npz", "--parameters", 10), "or more"),
        (("mine.npz", "--test", "other.npz"), "sets of the same"),
        (("series.npz",), "without a grid"),
        (("line.npz", "--model", "auto-deeponet"), "two axes: these have 1 axes"),
        (("mine.npz", "--baseline", "auto-edeeponet"), "0 parameters that differ"),
        (("small.npz", "--model", "auto-deeponet-cnn"), "too small"),
        (("told.npz", "--test", "mine.npz"), "or --no-tell"),
    ],
)
def test_bad_requests_are_one_sentence(call, tmp_path, words, sentence):
    waves().save(tmp_path / "mine.npz")
    waves(cases=2).save(tmp_path / "two.npz")
    waves(size=(8, 8)).save(tmp_path / "other.npz")
    waves(size=(8, 8), cases=3).save(tmp_path / "small.npz")
    waves(size=(16,)).save(tmp_path / "line.npz")
    waves(parameters=np.arange(8.0), parameter_names=("speed",)).save(tmp_path / "told.npz")
    Trajectories.of(np.zeros((4, 9, 2))).save(tmp_path / "series.npz")
    code, _, err = call(*words)
    assert code == 2 and sentence in err and len(err.strip().splitlines()) == 1


def test_models_are_told_the_parameters_that_differ_and_the_mask(call, tmp_path):
    mask = np.ones((8, 16, 16))
    mask[::2, :4] = 0
    table = np.stack([np.full(8, 3.0), np.arange(8.0)], 1)
    waves(parameters=table, parameter_names=("gravity", "speed"), mask=mask).save(
        tmp_path / "mine.npz"
    )
    words = ("mine.npz", *SMALL, "--horizon", 2, "--baseline", "unet", "--json",
             "--parameters", 300_000)  # fmt: skip
    code, out, err = call(*words, "--out", "found")
    told = json.loads(out)
    assert code == 0, err
    assert told["models are told"] == "speed, mask"
    one = FieldForecaster.load(tmp_path / "found" / "model-0")
    assert one.given == ("parameters", "mask") and one.model.columns == [1]
    assert one.model.way == "scalars"
    data = waves(parameters=table, mask=mask)
    with np.load(tmp_path / "found" / "forecast.npz") as kept:
        shown, cases = kept["forecast"], kept["cases"]
    start, given = data.tensor(cases, 0, 1), one.told(data, cases)
    other = FieldForecaster.load(tmp_path / "found" / "model-1")
    both = [m.forecast(start, 2, *given).kept for m in (one, other)]
    np.testing.assert_allclose(sum(both) / 2, shown, rtol=1e-4, atol=1e-5)
    code, out, _ = call(*words, "--no-tell", "--out", "untold")
    blind = json.loads(out)
    assert code == 0 and blind["models are told"] == "nothing but the frames"
    assert FieldForecaster.load(tmp_path / "untold" / "model-0").given == ()
    sizes = [{row["model"]: row["parameters"] for row in d["table"]} for d in (told, blind)]
    for size in sizes:  # channels, embeddings and maps into the blocks are all within the budget
        assert size["unet"] == pytest.approx(300_000, rel=0.03)
        assert size["sinenet"] == pytest.approx(300_000, rel=0.03)
    # embeddings of 82,432 weights do not fit into 30,000: it is told by planes
    code, out, err = call("mine.npz", *SMALL, "--horizon", 2, "--json", "--out", "small")
    assert code == 0, err
    assert json.loads(out)["table"][0]["parameters"] == pytest.approx(30_000, rel=0.06)
    assert FieldForecaster.load(tmp_path / "small" / "model-0").model.way == "channels"


def test_the_fno_of_neuraloperator_is_a_model_of_its_own(call, tmp_path):
    waves().save(tmp_path / "mine.npz")
    try:
        neuralop()
    except RequestError:
        code, _, err = call("mine.npz", *SMALL, "--model", "neuralop-fno")
        assert code == 2 and "pip install 'pantarhei[neuraloperator]'" in err
        pytest.skip("neuraloperator is not installed")
    code, out, err = call("mine.npz", *SMALL, "--horizon", 2, "--model", "neuralop-fno",
                          "--baseline", "fno", "--json", "--out", "found")  # fmt: skip
    assert code == 0, err
    assert [row["model"] for row in json.loads(out)["table"]][:2] == ["neuralop-fno", "fno"]
    one = FieldForecaster.load(tmp_path / "found" / "model-0")
    assert one.forecast(waves().tensor([0], 0, 1), 2).kept.isfinite().all()


@pytest.mark.parametrize(
    "name", ["auto-deeponet", "auto-edeeponet", "auto-deeponet-cnn", "auto-ffn"]
)
def test_deeponets_forecast_fields_of_any_channels_and_history(call, tmp_path, name):
    waves(parameters=np.arange(8.0), parameter_names=("speed",)).save(tmp_path / "mine.npz")
    code, out, err = call("mine.npz", "--model", name, *SMALL, "--history", 3, "--horizon", 2,
                          "--parameters", 300_000, "--json", "--out", "found")  # fmt: skip
    assert code == 0, err
    row = json.loads(out)["table"][0]
    assert row["model"] == name and row["parameters"] == pytest.approx(300_000, rel=0.02)
    assert FieldForecaster.load(tmp_path / "found" / "model-0").model.way == "points"


@pytest.mark.parametrize("name", ["sinenet", "unet", "dil-resnet", "fno", "ffno"])
def test_every_network_has_as_many_weights_as_are_asked_for(call, tmp_path, name):
    waves().save(tmp_path / "mine.npz")
    code, out, err = call("mine.npz", "--model", name, *SMALL, "--members", 1, "--horizon", 1,
                          "--steps", 1, "--parameters", 120_000, "--json")  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["table"][0]["parameters"] == pytest.approx(120_000, rel=0.05)
