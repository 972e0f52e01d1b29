"""Lossy image codecs as functions: what a picture looks like after it was compressed.

All share one shape: ``codec(images, quality) -> images``, with images (B, C, H, W) in [0, 1] and
``quality`` an integer or one per image; results lie on the 8-bit lattice k/255.

Colour is full-range YCbCr by ITU-R BT.601, as in JPEG files (JFIF): grey pictures are their own
luma. This is the library's one convention; figures for the studio-range Y (16..235) that part of
the literature uses differ by 0.7 to 1.3 dB on colour images.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pantarhei.errors import RequestError

# ITU-T T.81 (JPEG), Annex K, table K.1: luminance quantisation at quality 50.
_LUMA_50 = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101
72 92 95 98 112 100 103 99
"""


def rgb_to_ycbcr(rgb: Tensor) -> Tensor:
    """Convert (..., 3, H, W) RGB in [0, 1] to full-range YCbCr in [0, 1] (BT.601, JFIF).

    >>> rgb_to_ycbcr(torch.ones(3, 1, 1)).flatten().tolist()
    [1.0, 0.5, 0.5]
    """
    r, g, b = rgb.unbind(-3)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([y, (b - y) / 1.772 + 0.5, (r - y) / 1.402 + 0.5], -3)


def ycbcr_to_rgb(ycbcr: Tensor) -> Tensor:
    """Convert back from :func:`rgb_to_ycbcr`; the result is not clamped."""
    y, cb, cr = ycbcr.unbind(-3)
    r, b = y + 1.402 * (cr - 0.5), y + 1.772 * (cb - 0.5)
    return torch.stack([r, (y - 0.299 * r - 0.114 * b) / 0.587, b], -3)


def luma(image: Tensor) -> Tensor:
    """Return the (B, 1, H, W) luma of (B, 1 or 3, H, W) images in [0, 1]."""
    return image if image.shape[-3] == 1 else rgb_to_ycbcr(image)[..., :1, :, :]


def to_eight_bit(image: Tensor) -> Tensor:
    """Clamp to [0, 1] and round to the 8-bit lattice k/255.

    >>> to_eight_bit(torch.tensor([-1.0, 0.501, 2.0]) ).mul(255).tolist()
    [0.0, 128.0, 255.0]
    """
    return (image.clamp(0, 1) * 255).round() / 255


def _check(images: Tensor, quality: int | Tensor, low: int, high: int, name: str) -> Tensor:
    """Return ``quality`` as (B,) integers on the CPU after checking both arguments."""
    if images.dim() != 4 or not images.is_floating_point():
        raise RequestError(
            f"images of shape {tuple(images.shape)} and type {images.dtype} cannot be compressed: "
            "give floating-point (batch, channels, height, width) in [0, 1]."
        )
    each = torch.as_tensor(quality).expand(len(images)).cpu()
    if len(each) and not bool(((each >= low) & (each <= high)).all()):
        raise RequestError(f"{name} {quality} is out of range: use {low} to {high}.")
    return each


def jpeg_table(quality: int | Tensor) -> Tensor:
    """Return the (..., 8, 8) luma quantisation steps of baseline JPEG for ``quality`` 1..100.

    ``clip(floor((Q50 S + 50) / 100), 1, 255)``, ``S = floor(5000 / q)`` below 50, ``200 - 2 q``
    from there (Annex K table, the scaling of the Independent JPEG Group).

    >>> jpeg_table(50)[0].tolist()
    [16.0, 11.0, 10.0, 16.0, 24.0, 40.0, 51.0, 61.0]
    >>> jpeg_table(100).unique().tolist()
    [1.0]
    """
    q = torch.as_tensor(quality)
    scale = torch.where(q < 50, 5000 // q, 200 - 2 * q)[..., None, None]
    base = torch.tensor([int(v) for v in _LUMA_50.split()], device=q.device).reshape(8, 8)
    return ((base * scale + 50) // 100).clamp(1, 255).float()


def dct_basis(n: int = 8) -> Tensor:
    """Return the (n, n) float64 orthonormal DCT-II basis, one frequency a row."""
    k = torch.arange(n, dtype=torch.float64)
    rows = torch.cos(torch.pi * (2 * k + 1) * k[:, None] / (2 * n)) * (2 / n) ** 0.5
    rows[0] /= 2**0.5
    return rows


@torch.no_grad()
def jpeg_luma(images: Tensor, quality: int | Tensor) -> Tensor:
    """Compress luma images (B, 1, H, W) as baseline JPEG does; entropy coding loses nothing.

    Each 8x8 block of ``255 x - 128``: orthonormal DCT, divide by the table of ``quality`` (an
    integer 1..100, or one per image), round, multiply, inverse DCT, add 128, round and clip to
    8 bit. Sizes that are not whole blocks are continued by replication, as encoders do. The grid
    starts at pixel (0, 0). Runs on any device; float64 input is computed in float64, other types
    in float32.

    >>> flat = torch.full((1, 1, 16, 16), 100 / 255)
    >>> torch.equal(jpeg_luma(flat, 10), jpeg_luma(jpeg_luma(flat, 10), 10))
    True
    """
    each = _check(images, quality, 1, 100, "JPEG quality")
    batch, channels, height, width = images.shape
    if channels != 1:
        raise RequestError(f"images of {channels} channels have no single luma: use luma(images).")
    kind = torch.float64 if images.dtype == torch.float64 else torch.float32
    basis = dct_basis().to(images.device, kind)
    table = jpeg_table(each).to(images.device, kind)[:, None, None]
    pixels = (images.to(kind).clamp(0, 1) * 255).round() - 128
    pixels = F.pad(pixels, (0, -width % 8, 0, -height % 8), mode="replicate")
    rows, columns = pixels.shape[-2] // 8, pixels.shape[-1] // 8
    blocks = pixels.reshape(batch, rows, 8, columns, 8).transpose(2, 3)
    coefficients = basis @ blocks @ basis.T
    blocks = basis.T @ ((coefficients / table).round() * table) @ basis
    pixels = blocks.transpose(2, 3).reshape(batch, 1, rows * 8, columns * 8)
    pixels = (pixels[..., :height, :width] + 128).round().clamp(0, 255)
    return (pixels / 255).to(images.dtype)


def _to_array(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(C, H, W) in [0, 1] -> (H, W) or (H, W, 3) uint8."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return np.ascontiguousarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())


def _from_array(array: np.ndarray[Any, Any], like: Tensor) -> Tensor:
    """(H, W) or (H, W, 3) uint8 -> (C, H, W) in [0, 1], of the type and device of ``like``."""
    pixels = torch.from_numpy(np.array(array)).reshape(*array.shape[:2], -1).permute(2, 0, 1)
    return pixels.to(like.device, like.dtype) / 255


def jpeg_bytes(image: Tensor, quality: int, subsampling: int = 2) -> bytes:
    """Return the JPEG file of one (1 or 3, H, W) image; ``subsampling`` 0 = 4:4:4, 2 = 4:2:0."""
    file = io.BytesIO()
    Image.fromarray(_to_array(image)).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


def jpeg_file_roundtrip(images: Tensor, quality: int | Tensor, subsampling: int = 2) -> Tensor:
    """Write and read a real JPEG file (Pillow, libjpeg) for each grey or RGB image.

    ``images`` (B, 1 or 3, H, W) in [0, 1]; ``subsampling`` of the colour as in
    :func:`jpeg_bytes`. Runs on the CPU, one image after the other.

    >>> x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> bool((jpeg_file_roundtrip(x, 90) - jpeg_luma(x, 90)).abs().max() < 0.02)
    True
    """
    each = _check(images, quality, 1, 100, "JPEG quality")
    if images.shape[1] not in (1, 3):
        raise RequestError(f"images of {images.shape[1]} channels cannot be JPEG: give 1 or 3.")
    results = []
    for image, q in zip(images, each.tolist(), strict=True):
        with Image.open(io.BytesIO(jpeg_bytes(image, q, subsampling))) as read:
            results.append(_from_array(np.asarray(read), image))
    return torch.stack(results) if results else images.clone()


def hevc_intra(images: Tensor, quality: int | Tensor, preset: str = "medium") -> Tensor:
    """Encode and decode each luma image as one HEVC intra picture at the fixed QP ``quality``.

    ``images`` (B, 1, H, W) in [0, 1]; QP 0..51, larger is worse (the paper: 22, 27, 32, 37, 42).
    Encoder: x265 through PyAV (``pip install 'pantarhei[hevc]'``), 4:0:0, main still picture,
    I-frame QP equal to ``quality``. It is not the reference encoder HM: sizes differ by some
    percent, the tools (transforms, prediction, deblocking, SAO) are those of the standard. The
    smallest transform block is 4x4: assess with ``TchebichefQuality(n=4)``.
    """
    each = _check(images, quality, 0, 51, "HEVC QP")
    if images.shape[1] != 1:
        raise RequestError("HEVC intra is offered for luma only: use luma(images).")
    try:
        import av
    except ImportError as error:
        raise RequestError(
            "HEVC needs an encoder that is not installed: pip install 'pantarhei[hevc]'."
        ) from error
    results = [
        _from_array(_hevc_picture(av, _to_array(image), qp, preset), image)
        for image, qp in zip(images, each.tolist(), strict=True)
    ]
    return torch.stack(results) if results else images.clone()


def _hevc_picture(av: Any, pixels: np.ndarray[Any, Any], qp: int, preset: str) -> Any:
    """Send one (H, W) uint8 picture through x265 and back."""
    height, width = pixels.shape
    # x265 wants whole 8x8 blocks and at least one coding-tree unit.
    down, right = (max(-size % 8, 64 - size) for size in (height, width))
    whole = np.ascontiguousarray(np.pad(pixels, ((0, down), (0, right)), mode="edge"))
    encoder = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height = whole.shape[1], whole.shape[0]
    encoder.pix_fmt, encoder.time_base = "gray", Fraction(1, 25)
    # ipratio=1 keeps x265 from coding I-frames finer than the QP asked for.
    fixed = f"qp={qp}:keyint=1:ipratio=1:log-level=none:pools=none:frame-threads=1"
    encoder.options = {"x265-params": fixed, "preset": preset}
    packets = encoder.encode(av.VideoFrame.from_ndarray(whole, format="gray"))
    packets += encoder.encode(None)
    decoder = av.CodecContext.create("hevc", "r")
    frames = [frame for packet in packets for frame in decoder.decode(packet)]
    frames += decoder.decode(None)
    return frames[0].to_ndarray()[:height, :width]
