"""Models on disk: what is written is what is read, and nothing else is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pantarhei import data
from pantarhei.compute.enhancement import shipped
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.routing import Calibration
from pantarhei.errors import RequestError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    calibration = Calibration((0.0, 1.0), (0.1, 0.2), (0.5, 1.0), 0.2, 1.0)
    path = tmp_path / "mine.v2.safetensors"
    shipped.save_model(path, NestedUNet(levels=3, width=4), calibration, {"by": "a test"})
    return path


def test_a_model_comes_back_as_it_was(saved: Path):
    torch.manual_seed(0)
    net = NestedUNet(levels=3, width=4)
    for name in (saved, saved.with_suffix(".json"), saved.with_suffix("")):
        loaded = shipped.load_model(name)
        assert loaded.model.config == net.config and not loaded.model.training
        for key, value in net.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[key], value)
        assert loaded.calibration is not None and loaded.calibration.chosen == 1.0


def test_a_model_without_calibration(tmp_path: Path):
    shipped.save_model(tmp_path / "plain", NestedUNet(levels=2, width=2))
    assert shipped.load_model(tmp_path / "plain").calibration is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("config"), "describe a network"),
        (lambda d: d["config"].update(levels=10**6), "describe a network"),
        (lambda d: d["config"].update(width=10**9), "describe a network"),
        (lambda d: d["config"].update(width="4"), "describe a network"),
        (lambda d: d["config"].update(levels=-1), "describe a network|cannot be built"),
        (lambda d: d["config"].update(colour=True), "describe a network"),
        (lambda d: d["config"].update(width=8), "does not hold the weights"),
        (lambda d: d["calibration"].pop("gain"), "calibrate again"),
        (lambda d: d.update(calibration=[1]), "calibrate again"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(saved: Path, change, message: str):
    sidecar = saved.with_suffix(".json")
    document = json.loads(sidecar.read_text())
    change(document)
    sidecar.write_text(json.dumps(document))
    with pytest.raises(RequestError, match=message):
        shipped.load_model(saved)


def test_a_description_that_is_no_object_is_refused(saved: Path):
    saved.with_suffix(".json").write_text("[1, 2]")
    with pytest.raises(RequestError, match="describe a network"):
        shipped.load_model(saved)


def test_damaged_or_missing_weights_are_refused(saved: Path):
    whole = saved.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        saved.write_bytes(content)
        with pytest.raises(RequestError, match="does not hold the weights"):
            shipped.load_model(saved)
    saved.unlink()
    with pytest.raises(RequestError, match="does not exist"):
        shipped.load_model(saved)
    with pytest.raises(RequestError, match="does not exist"):
        shipped.load_model(saved.parent / "absent")


def test_weights_that_are_not_finite_are_refused(saved: Path):
    tensors = load_file(saved)
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, saved)
    with pytest.raises(RequestError, match="not finite"):
        shipped.load_model(saved)


def test_the_training_command_writes_a_calibrated_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    photographs = data.load("photographs")
    small = tuple(np.ascontiguousarray(image[:96, :96]) for image in photographs.images)
    pictures = data.Images(
        "images_train_color", "a test", photographs.names, small, (True,) * len(small)
    )
    monkeypatch.setattr(data, "load", lambda name: pictures)
    out = tmp_path / "weights" / "new.safetensors"
    shipped.train_shipped(
        out, levels=3, width=4, steps=3, batch=2, size=32, checkpoint=tmp_path / "checkpoint",
        lr=1e-3, seed=0, device="cpu",
    )  # fmt: skip
    loaded = shipped.load_model(out)
    assert loaded.calibration is not None and len(loaded.calibration.thresholds) == 202
    about = json.loads(out.with_suffix(".json").read_text())["about"]
    assert about["recipe"]["steps"] == 3 and "9 images" in about["data"]


@pytest.mark.skipif(not shipped.SHIPPED.exists(), reason="the shipped model is not trained yet")
def test_the_shipped_model_enhances_and_is_small():
    from pantarhei.compute.enhancement.metrics import psnr
    from pantarhei.compute.enhancement.training import centre, raw_luma
    from pantarhei.data.simulate.codecs import jpeg_file_roundtrip

    assert shipped.SHIPPED.stat().st_size <= 5e6
    loaded = shipped.load_shipped()
    assert loaded.calibration is not None
    planes = raw_luma(data.load("photographs"))
    raw = torch.stack([centre(planes[n], 256) for n in ("astronaut", "coffee")])
    for quality in (10, 30, 50):
        compressed = jpeg_file_roundtrip(raw, quality)
        routed = loaded.model.dynamic(compressed, loaded.calibration.chosen)
        assert float((psnr(routed.output, raw) - psnr(compressed, raw)).mean()) > 0.2
