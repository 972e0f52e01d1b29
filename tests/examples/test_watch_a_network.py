"""The tutorial's script, run as a process on the reader's network and data."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "watch_a_network.py"
FACTORY = """
from torch import nn

def make(shape, outputs):
    return nn.Sequential(nn.Linear(shape[0], 12), nn.Tanh(), nn.Linear(12, outputs))

def dead(shape, outputs):
    net = nn.Sequential(nn.Linear(shape[0], 12), nn.ReLU(), nn.Linear(12, outputs))
    nn.init.constant_(net[0].bias, -50.0)
    return net
"""


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(folder):
    with (folder / "probes.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


def files(tmp_path, **arrays):
    np.savez(tmp_path / "mine.npz", **arrays)
    (tmp_path / "net.py").write_text(FACTORY)
    return ["--data", tmp_path / "mine.npz", "--out", tmp_path / "out"]


def test_digits_and_the_convnet(tmp_path):
    out = tmp_path / "out"
    done = run("--steps", 4, "--every", 2, "--examples", 24, "--start", "critical", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "sharpness: " in done.stdout and "kernel: " in done.stdout and "signal: " in done.stdout
    assert (out / "watch.png").stat().st_size > 0
    table = rows(out)
    assert [row["step"] for row in table] == [0, 2, 4]
    assert table[0]["kernel_drift"] == 0 and min(r["kernel_drift"] for r in table[1:]) > 0.01
    assert table[1]["threshold"] == pytest.approx(2 / 0.1) and "threshold" not in table[0]
    assert {"forward_conv1", "backward_head", "zeros_act2", "jacobian_median"} <= set(table[0])


def test_own_network_and_targets(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 5))
    more = files(tmp_path, x=x, y=np.sin(x[:, :2]))
    done = run("--model", f"{tmp_path / 'net.py'}:make", "--optimizer", "adam", "--lr", 0.01,
               "--steps", 6, "--every", 3, "--batch", 20, *more)  # fmt: skip
    assert done.returncode == 0, done.stderr
    table = rows(tmp_path / "out")
    assert table[1]["threshold"] == pytest.approx(38 / 0.01) and "forward_2" in table[0]


def test_dead_units_are_told(tmp_path):
    x = np.random.default_rng(0).normal(size=(40, 5))
    more = files(tmp_path, x=x, y=np.arange(40) % 3)
    done = run("--model", f"{tmp_path / 'net.py'}:dead", "--steps", 2, "--every", 1, *more)
    assert done.returncode == 0, done.stderr
    assert "layer '1': 100% of its outputs are zero" in done.stdout


def test_a_bad_request_ends_with_one_sentence(tmp_path):
    more = files(tmp_path, x=np.zeros((3, 2)), y=np.zeros(4, int))
    done = run("--model", f"{tmp_path / 'net.py'}:make", *more)
    assert done.returncode == 2 and "give as many" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
