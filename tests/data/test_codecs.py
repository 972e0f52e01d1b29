"""The codecs against published PSNRs, real files and their own definitions."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as photographs

from pantarhei.compute.enhancement.metrics import psnr
from pantarhei.data.simulate.codecs import (
    dct_basis,
    hevc_intra,
    jpeg_file_roundtrip,
    jpeg_luma,
    jpeg_table,
    luma,
    rgb_to_ycbcr,
    to_eight_bit,
    ycbcr_to_rgb,
)
from pantarhei.errors import RequestError

DATA = Path(os.environ.get("PANTARHEI_DATA", Path(__file__).parents[3] / "shared" / "data"))
CLASSIC5 = DATA / "images_test" / "classic5.zip"


def camera() -> torch.Tensor:
    return torch.from_numpy(photographs.camera().copy())[None, None].float() / 255


@pytest.mark.skipif(not CLASSIC5.exists(), reason=f"needs {CLASSIC5} (set PANTARHEI_DATA)")
def test_classic5_has_the_published_jpeg_psnrs():
    with zipfile.ZipFile(CLASSIC5) as archive:
        images = [Image.open(archive.open(name)).convert("L") for name in archive.namelist()]
    measured = []
    for quality in (10, 20, 30, 40, 50):
        values = []
        for image in images:
            raw = torch.from_numpy(np.array(image))[None, None].float() / 255
            values.append(float(psnr(jpeg_luma(raw, quality), raw)))
        measured.append(sum(values) / len(values))
    assert np.round(measured, 2).tolist() == [27.82, 30.12, 31.48, 32.43, 33.20]


@pytest.mark.parametrize("quality", [10, 30, 50, 90])
def test_the_simulator_is_what_libjpeg_does(quality: int):
    raw = camera()[..., :250, :300]
    ours, theirs = jpeg_luma(raw, quality), jpeg_file_roundtrip(raw, quality)
    # libjpeg's integer DCT differs by rounding; a coefficient that lies on a tie may flip.
    assert ((ours - theirs).abs() * 255 < 1.5).double().mean() > 0.97
    assert float(psnr(ours, theirs)) > 50
    assert abs(float(psnr(ours, raw) - psnr(theirs, raw))) < 0.02


@pytest.mark.parametrize("quality", [5, 10, 50, 95])
def test_compressing_again_changes_almost_nothing(quality: int):
    once = jpeg_luma(camera(), quality)
    assert float(psnr(jpeg_luma(once, quality), once)) > 45


def test_a_batch_of_mixed_qualities_is_the_images_one_by_one():
    raw = torch.rand(3, 1, 37, 50, generator=torch.Generator().manual_seed(1))
    together = jpeg_luma(raw, torch.tensor([10, 50, 95]))
    for image, quality, result in zip(raw, (10, 50, 95), together, strict=True):
        assert torch.equal(jpeg_luma(image[None], quality)[0], result)


def test_double_precision_agrees_with_single():
    raw = camera()[..., :64, :64]
    difference = jpeg_luma(raw, 30).double() - jpeg_luma(raw.double(), 30)
    assert (difference.abs() < 0.5 / 255).double().mean() > 0.999


def test_the_dct_is_orthonormal():
    basis = dct_basis()
    assert torch.allclose(basis @ basis.T, torch.eye(8, dtype=torch.float64), atol=1e-14)


def test_quantisation_tables_of_pillow():
    for quality in (1, 10, 49, 50, 51, 75, 100):
        # Pillow only writes the table into a file: read it back from one.
        import io

        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
        table = np.array(Image.open(file).quantization[0]).reshape(8, 8)
        assert jpeg_table(quality).int().tolist() == table.tolist()


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    quality=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_any_size_stays_on_the_eight_bit_lattice(height: int, width: int, quality: int, seed: int):
    raw = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    result = jpeg_luma(raw, quality)
    assert result.shape == raw.shape
    assert torch.equal(result, to_eight_bit(result))


def test_colour_conversion_is_that_of_jpeg_files():
    rgb = torch.from_numpy(photographs.astronaut().copy()).permute(2, 0, 1).float() / 255
    theirs = np.array(Image.fromarray(photographs.astronaut()).convert("YCbCr"))
    ours = (rgb_to_ycbcr(rgb) * 255).round().permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs.astype(float))[..., 0].max() <= 1
    # libjpeg centres colour at 128, the real-valued convention at 127.5.
    assert np.abs(ours - theirs.astype(float))[..., 1:].max() <= 2
    assert torch.allclose(ycbcr_to_rgb(rgb_to_ycbcr(rgb)), rgb, atol=1e-5)
    grey = torch.full((1, 3, 2, 2), 0.4)
    assert torch.allclose(luma(grey), grey[:, :1])


def test_colour_files_come_back_in_colour():
    rgb = torch.from_numpy(photographs.astronaut().copy()).permute(2, 0, 1)[None].float() / 255
    result = jpeg_file_roundtrip(rgb, 95, subsampling=0)
    assert result.shape == rgb.shape
    assert (result - rgb).abs().mean() * 255 < 3


@pytest.mark.parametrize("bad", [0, 101])
def test_a_quality_that_does_not_exist_is_refused(bad: int):
    with pytest.raises(RequestError, match="1 to 100"):
        jpeg_luma(torch.rand(1, 1, 8, 8), bad)
    with pytest.raises(RequestError, match="0 to 51"):
        hevc_intra(torch.rand(1, 1, 8, 8), 52)


@pytest.mark.parametrize("shape", [(8, 8), (1, 3, 8, 8)])
def test_images_of_the_wrong_shape_are_refused(shape: tuple[int, ...]):
    with pytest.raises(RequestError):
        jpeg_luma(torch.rand(shape), 50)


def test_hevc_falls_with_qp_and_keeps_any_size():
    pytest.importorskip("av", reason="needs the extra 'hevc'")
    raw = camera()[..., 100:230, 100:201]
    qps = torch.tensor([22, 27, 32, 37, 42])
    decoded = hevc_intra(raw.expand(5, -1, -1, -1), qps)
    quality = psnr(decoded, raw.expand(5, -1, -1, -1))
    assert (quality.diff() < -2).all()
    assert 40 < float(quality[0]) < 50 and 28 < float(quality[-1]) < 36
    assert hevc_intra(raw[..., :3, :70], 30).shape == (1, 1, 3, 70)


def test_hevc_without_its_encoder_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(RequestError, match=r"pantarhei\[hevc\]"):
        hevc_intra(torch.rand(1, 1, 8, 8), 30)
