"""`pantarhei lr-transfer`: as a process, its files, its resuming, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pantarhei.errors import RequestError
from pantarhei.learning import lr_transfer_job as job
from pantarhei.learning.commands.lr_transfer import app

FACTORY = """
import torch
from torch import nn

def net(width=16, depth=1):
    hidden = [p for _ in range(depth) for p in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), *hidden, nn.Linear(width, 3))

class Residual(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(torch.relu(h))
        return self.head(h)

def residual(width=16, depth=1):
    return Residual(width, depth)

residual.branches = ("blocks.*",)

def tensors():
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 5, generator=g), torch.randint(3, (64,), generator=g)

def stream():
    x, y = tensors()
    return lambda n: (x, y)

def listed():
    x, y = tensors()
    return [(x[:32], y[:32]), (x[32:], y[32:])]

def nothing():
    return 3

def half(model, batch):
    return 0.5 * nn.functional.cross_entropy(model(batch[0]), batch[1])

def wrong(size):
    return net(size)

def breaks(width):
    raise RuntimeError("no memory")

def narrow(width):
    return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))

number = 3
"""


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("def net(:\n")
    x = np.random.default_rng(0).normal(size=(48, 5)).astype(np.float32)
    np.savez(tmp_path / "classes.npz", X=x, y=np.arange(48) % 3)
    np.savez(tmp_path / "numbers.npz", X=x, y=x[:, :3].astype(np.float64))
    rows = [",".join([*map(str, row), "abc"[i % 3]]) for i, row in enumerate(x)]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c,d,e,kind", *rows]) + "\n")
    (tmp_path / "bad.csv").write_text("a,b,c\n1,2\n")
    return tmp_path


SHORT = ("--widths", "4,8,16", "--grid", "2^-3..2^-1", "--steps", "4", "--seeds", "2")


def invoke(*arguments, data="classes.npz", factory="net.py:net"):
    result = CliRunner().invoke(app, [factory, "--data", data, *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_as_a_process_it_prints_the_rate_and_leaves_the_evidence(files):
    code = "from pantarhei.learning.commands.lr_transfer import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, "net.py:net", "--data", "table.csv", *SHORT, "--json",
         "--out", "found", "--target-width", "256", "--optimizer", "adam"],
        capture_output=True, text=True, check=True, cwd=files,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["lr"] in (0.125, 0.25, 0.5) and found["proxy"] == {"width": 4, "depth": None}
    assert found["verdict"] in ("transfers", "does not transfer", "cannot tell")
    assert len(found["sweep"]["rows"]) == 3 * 3 * 2
    factors = {g["factor"]: g["parameters"] for g in found["target_groups"]}
    assert factors == {
        4 / 256: ["2.weight", "4.weight"],
        1.0: ["0.weight", "0.bias", "2.bias", "4.bias"],
    }
    names = {path.name for path in (files / "found").iterdir()}
    assert names == {"sweep.json", "transfer.json", "sweep.png", "sweep.svg"}
    assert json.loads((files / "found" / "transfer.json").read_text()) == found


@pytest.mark.parametrize(
    ("data", "loss"),
    [
        ("classes.npz", "auto"),
        ("numbers.npz", "auto"),
        ("net.py:tensors", "cross-entropy"),
        ("net.py:stream", "net.py:half"),
        ("net.py:listed", "auto"),
    ],
)
def test_data_and_losses_of_every_form(data, loss):
    out = invoke(*SHORT, "--loss", loss, data=data).output
    assert "width 16" in out and "best rate" in out


def test_losses_are_chosen_by_the_targets():
    model = torch.nn.Linear(5, 3)
    classes, numbers = (job.load_task(f"{n}.npz", "auto", 16, 0) for n in ("classes", "numbers"))
    x, y = classes.batches(0)
    assert classes.loss(model, (x, y)) == torch.nn.functional.cross_entropy(model(x), y)
    x, y = numbers.batches(0)
    assert numbers.loss(model, (x, y)) == torch.nn.functional.mse_loss(model(x), y)
    table = job.load_task("table.csv", "auto", 48, 0)
    assert torch.equal(table.batches(0)[1].bincount(), torch.tensor([16, 16, 16]))


def test_depth_with_the_branches_that_the_factory_names():
    options = ("--widths", "8", "--depths", "1,2,4", "--kind", "depth-mup")
    found = invoke(*options, *SHORT[2:], "--json", factory="net.py:residual", data="net.py:stream")
    found = json.loads(found.stdout)
    assert [o["size"]["depth"] for o in found["optima"]] == [1, 2, 4]
    rates = {name: g["factor"] for g in found["target_groups"] for name in g["parameters"]}
    assert rates["blocks.3.weight"] == pytest.approx(0.25)


def test_it_resumes_and_overwrites_nothing(files):
    invoke(*SHORT, "--out", "found", "--json")
    before = (files / "found" / "sweep.json").read_text()
    with pytest.raises(RequestError, match="exists already"):
        invoke(*SHORT, "--out", "found")
    document = json.loads(before)
    document["rows"] = document["rows"][:6]
    (files / "found" / "sweep.json").write_text(json.dumps(document))
    invoke(*SHORT, "--out", "found", "--resume", "--json")
    assert (files / "found" / "sweep.json").read_text() == before
    with pytest.raises(RequestError, match="another settings"):
        invoke(*SHORT, "--out", "found", "--resume", "--momentum", "0.5")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"factory": "net.py"}, "form file.py:function"),
        ({"factory": "nets.py:net"}, "no file 'nets.py'"),
        ({"factory": "net.py:nett"}, "no function 'nett'"),
        ({"factory": "net.py:number"}, "no function 'number'"),
        ({"factory": "broken.py:net"}, "SyntaxError"),
        ({"factory": "not_there:net"}, "ModuleNotFoundError"),
        ({"factory": "net.py:wrong"}, "cannot be called with width=4"),
        ({"factory": "net.py:breaks"}, "no memory"),
        ({"factory": "net.py:narrow"}, r"cannot be trained on .*\(RuntimeError"),
        ({"data": "none.npz"}, "not a file"),
        ({"data": "none.csv"}, "not a file"),
        ({"data": "bad.csv"}, "Row 1"),
        ({"data": "net.py:nothing"}, "no batches"),
        ({"options": ("--loss", "hinge")}, "--loss 'hinge' is unknown"),
        ({"options": ("--grid", "1..")}, "--grid '1..'"),
        ({"options": ("--grid", "a,b")}, "--grid 'a,b'"),
        ({"options": ("--widths", "4,x")}, "--widths '4,x'"),
        ({"options": ("--widths", "8,4")}, "ascending"),
        ({"options": ("--kind", "depth-mup")}, "residual branches"),
        ({"options": ("--resume",)}, "--out"),
        ({"options": ("--resume", "--out", "nowhere")}, "nothing|no sweep.json"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(files, changes, sentence):
    options = (*SHORT, "--out", "found", *changes.pop("options", ()))
    if "--resume" in options and "nowhere" not in options:
        options = (*SHORT, "--resume")
    with pytest.raises(RequestError, match=sentence) as caught:
        invoke(*options, **changes)
    assert "\n" not in str(caught.value)
    assert not (files / "found").exists()
