"""The worked example, run as a process on small folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers", reason="needs pantarhei[transformers]")
pytest.importorskip("onnxruntime", reason="needs pantarhei[onnx]")
pytest.importorskip("onnxscript", reason="needs pantarhei[onnx]")

SCRIPT = Path(__file__).parents[2] / "examples" / "elastic_image_folder.py"


def run(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def make(folder, classes=2, images=8):
    rng = np.random.default_rng(0)
    for label in range(classes):
        place = folder / f"class {label}"
        place.mkdir(parents=True)
        for i in range(images):
            pixels = rng.integers(0, 100, (20 + i, 24, 3)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i}.png")


def test_a_folder_with_bad_files_gives_a_checked_onnx_file(tmp_path):
    make(tmp_path / "images")
    (tmp_path / "images" / "class 0" / "broken.jpg").write_bytes(b"not an image")
    (tmp_path / "images" / "class 0" / "empty.png").touch()
    (tmp_path / "images" / "notes").mkdir()
    (tmp_path / "images" / "notes" / "read me.txt").write_text("nothing to see")
    done = run(tmp_path / "images", "--steps", 2, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "16 images of 2 classes" in done.stdout and "ONNX and PyTorch differ by" in done.stdout
    for name in ("broken.jpg", "empty.png", "read me.txt"):
        assert f"{name}': " in done.stderr
    for name in ("picked.onnx", "frontier.csv", "frontier.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0

    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "out" / "picked.onnx")
    for n in (1, 5):
        (scores,) = session.run(None, {"pixel_values": np.zeros((n, 3, 32, 32), np.float32)})
        assert scores.shape == (n, 2)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "is not a folder"),
        (["images", "--model", "nowhere"], "with a model"),
        (["one"], "two classes at least"),
    ],
)
def test_bad_requests_end_with_one_sentence(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "images")
    make(tmp_path / "one", classes=1)
    done = run(*arguments)
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
