"""The commands, as a user calls them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pantarhei import cli
from pantarhei.learning.commands.effective_theory import app
from pantarhei.probes.mean_field import critical_point

MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 300), nn.LayerNorm(300), nn.GELU(), nn.Linear(300, 300))

def wrong():
    return 3
"""


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """Call the command line in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(MODEL)
    if not any(group.name == "effective-theory" for group in cli.app.registered_groups):
        cli.app.add_typer(app)

    def invoke(*arguments):
        code = cli.main(["effective-theory", *map(str, arguments)])
        return code, *capsys.readouterr()

    return invoke


def test_analyse(call):
    code, out, _ = call("analyse", "gelu", "sigmoid", "torch:tanh", "--json")
    rows = {row["activation"]: row for row in json.loads(out)["table"]}
    assert code == 0
    assert rows["gelu"]["C_b"] == pytest.approx(0.17292239, abs=1e-8)
    assert rows["sigmoid"]["class"] == "none" and rows["sigmoid"]["C_b"] is None
    assert rows["torch:tanh"]["a1"] == -2
    code, out, _ = call("analyse", "relu", "--gamma", 0.5, "--out", "found")
    assert code == 0 and "scale-invariant" in out and "1.5" in out
    assert call("analyse", "relu", "--out", "found")[0] == 2


def test_init_writes_critical_weights(call, tmp_path):
    code, out, _ = call("init", "mynet.py:build", "--out", "w.safetensors", "--json")
    told, point = json.loads(out), critical_point("gelu")
    assert code == 0 and told["activation"] == "gelu" and told["left as they were"] == "1"
    weights = load_file(tmp_path / "w.safetensors")
    second = weights["3.weight"]
    assert float(second.var()) * 300 == pytest.approx(point.C_W, rel=0.03)
    assert torch.equal(weights["1.weight"], torch.ones(300))
    assert told["table"][1]["std of weights"] == pytest.approx((point.C_W / 300) ** 0.5)
    assert told["table"][1]["SGD rate of weights"] == pytest.approx(1 / 2 / 300)
    model = nn.Sequential(nn.Linear(4, 300), nn.LayerNorm(300), nn.GELU(), nn.Linear(300, 300))
    model.load_state_dict(weights)
    code, _, err = call("init", "mynet:build", "--out", "w.safetensors")
    assert code == 2 and "exists already" in err


def test_vertex(call, tmp_path):
    code, out, _ = call("vertex", "relu", "--layers", 3, "--networks", 50, "--json")
    rows = json.loads(out)["table"]
    assert code == 0 and [row["V"] for row in rows] == pytest.approx([0, 20, 40])
    assert rows[2]["V error"] > 0 and rows[2]["P"] == 0
    code, out, _ = call("vertex", "tanh", "--layers", 4, "--out", "v")
    assert code == 0 and (tmp_path / "v" / "vertices.png").stat().st_size > 10_000
    assert "Theta" in out


def test_advise(call):
    code, out, _ = call("advise", "relu", "--outputs", 10, "--depth", 8, "--json")
    told = json.loads(out)
    assert code == 0 and told["width"] == 500 and told["C_W"] == 2
    code, out, _ = call("advise", "gelu", "--depth", 2, "--width", 50, "--networks", 200)
    assert code == 0 and "measured" in out and "3.562" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("advise", "sigmoid"), "no critical point"),
        (("advise", "tahn"), "Did you mean 'tanh'"),
        (("vertex", "relu", "--width", 1, "--networks", 5), "at least 2"),
        (("init", "mynet:nothing"), "cannot be imported"),
        (("init", "mynet"), "module:function"),
        (("init", "mynet:wrong"), "not a torch.nn.Module"),
        (("init", "mynet:build", "--out", "w.pt"), "choose .safetensors"),
        (("vertex", "relu", "--out", "."), "new folder"),
    ],
)
def test_bad_requests_are_one_sentence(call, arguments, sentence):
    code, _, err = call(*arguments)
    assert code == 2 and sentence in err and len(err.strip().splitlines()) == 1
