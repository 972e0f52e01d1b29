"""Image files in and out: what enhancement needs of them, and nothing of theirs lost.

A :class:`Picture` holds the samples as they lie in the file (not turned by EXIF, so that the JPEG
block grid starts at the first pixel), the luma the network works on, and the tags that travel with
the pixels. Only luma is enhanced. In the full-range BT.601 of JPEG

    R = Y + 1.402 Cr,   G = Y - 0.344136 Cb - 0.714136 Cr,   B = Y + 1.772 Cb

a change of Y at fixed chroma is the same change of R, G and B, so :meth:`Picture.with_luma` adds
the difference of the lumas to the samples: chroma, alpha and the low bits of 16-bit pictures stay,
and a luma that has not changed gives the picture back exactly. For a JPEG, Y is the codec's own
plane, decoded without a detour over RGB. CMYK counts as (255-C, 255-M, 255-Y), whose luma is the Y
of an Adobe YCCK file, with K as a second plane.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pantarhei.errors import RequestError

Mode = Literal["L", "LA", "RGB", "RGBA", "CMYK"]
Format = Literal["png", "jpeg", "webp"]
Samples = NDArray[np.uint8] | NDArray[np.uint16]

SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".tif", ".tiff"}
                     | {".bmp", ".dib"})  # fmt: skip
"""Names that are taken from a folder; a file named by the user is tried whatever its name."""

SUFFIX: dict[Format, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""What an output is called; CMYK as "png" becomes ".tif", see :func:`suffix_for`."""

MAX_PIXELS = 150_000_000
"""Default limit on width x height, checked on the header before anything is decoded."""

# Only these parsers can be reached by a hostile file.
_PLUGINS = (JpegImagePlugin, PngImagePlugin, WebPImagePlugin, TiffImagePlugin, BmpImagePlugin)
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
_CHANNELS: dict[Mode, int] = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
_ROWS = 256  # conversions go by this many rows, so that temporaries stay small
# PNG chunks that say how the samples are to be shown; they are copied byte for byte.
_PNG_COLOUR = (b"cHRM", b"gAMA", b"sRGB", b"cICP")


@dataclass(frozen=True)
class Tags:
    """What a file says about its pixels. ``exif`` is the TIFF structure without ``Exif\\0\\0``."""

    exif: bytes = b""
    icc: bytes = b""
    xmp: bytes = b""
    dpi: tuple[float, float] | None = None
    png: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Picture:
    """Samples, their luma, and the tags that belong to them.

    ``pixels`` (H, W, C) are uint8 or uint16; ``luma`` (H, W) has the same type. ``note`` says in a
    few words what reading had to change ("palette expanded").

    >>> grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    >>> picture = Picture.of(grey)
    >>> picture.mode, picture.bits
    ('L', 8)
    >>> bool((picture.with_luma(grey + 1).array() == grey + 1).all())
    True
    """

    pixels: Samples
    mode: Mode
    luma: Samples
    tags: Tags = field(default_factory=Tags)
    jpeg: bool = False
    note: str = ""

    @classmethod
    def of(cls, image: NDArray[Any] | Image.Image) -> Picture:
        """Take an array (H, W) or (H, W, 1..4) of uint8 or uint16, or a Pillow image.

        One channel is grey, two grey and alpha, three RGB, four RGBA.
        """
        if isinstance(image, Image.Image):
            return _from_pillow(image, _tags(image, ()))
        array = np.asarray(image)
        modes: tuple[Mode, ...] = ("L", "LA", "RGB", "RGBA")
        channels = 1 if array.ndim == 2 else array.shape[-1] if array.ndim == 3 else 0
        if array.dtype not in (np.uint8, np.uint16) or not 1 <= channels <= 4 or not array.size:
            raise RequestError(
                f"an array of shape {array.shape} and type {array.dtype} is not a picture: give "
                "uint8 or uint16 of shape (height, width) or (height, width, 1 to 4)."
            )
        pixels = array[:, :, None] if array.ndim == 2 else array
        return cls(pixels, modes[channels - 1], _luma(pixels, modes[channels - 1]))

    @property
    def bits(self) -> int:
        """Bits per sample: 8 or 16."""
        return self.pixels.dtype.itemsize * 8

    @property
    def planes(self) -> tuple[Samples, ...]:
        """What is enhanced, each (H, W): luma, and for CMYK that is not all paper also K."""
        if self.mode != "CMYK" or not self.pixels[:, :, 3].any():
            return (self.luma,)
        return self.luma, 255 - self.pixels[:, :, 3]

    def with_luma(self, luma: Samples, black: Samples | None = None) -> Picture:
        """Return the picture with another luma (H, W), and for CMYK another second plane."""
        pixels = self.pixels.copy()
        top = np.iinfo(pixels.dtype).max
        colours = 1 if self.mode in ("L", "LA") else 3
        sign = -1 if self.mode == "CMYK" else 1  # ink darkens
        for start in range(0, len(pixels), _ROWS):
            rows = slice(start, start + _ROWS)
            change = luma[rows].astype(np.int32) - self.luma[rows]
            changed = pixels[rows, :, :colours] + sign * change[:, :, None]
            pixels[rows, :, :colours] = changed.clip(0, top)
        if black is not None:
            pixels[:, :, 3] = 255 - black
        return replace(self, pixels=pixels, luma=luma)

    def array(self) -> Samples:
        """Return the samples: (H, W) for grey, else (H, W, C)."""
        return self.pixels[:, :, 0] if self.mode == "L" else self.pixels

    def save(self, path: str | os.PathLike[str], format: Format = "png") -> None:
        """Write the picture and its tags; see :func:`write`."""
        write(self, Path(path), format)


# ---- reading ---------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Picture:
    """Read one image file, whatever it is called, or raise :class:`RequestError`.

    JPEG, PNG, WebP, TIFF and BMP with one picture (a camera's MPO: its first); 8 and 16 bit; grey,
    colour, CMYK, palette, bilevel; each with or without alpha. The size is checked against
    ``max_pixels`` before any pixel is decoded. The file is opened for reading only, and only if it
    is a regular file.
    """
    with _opened(path) as file, _one_sentence(path):
        image = _identify(file)
        _check_size(image, max_pixels)
        colour = _png_colour(file) if image.format == "PNG" else ()
        tags = _tags(image, colour)
        wide = _sixteen_bit(image, file)
        if wide is not None:
            return Picture(*wide, tags=tags)
        return _from_pillow(_decoded(image, file), tags)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        handle = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"'{path}' cannot be opened ({reason}): check the path.") from error
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        os.close(handle)
        raise RequestError(f"'{path}' is not a regular file: give an image file.")
    with os.fdopen(handle, "rb") as file:
        if about.st_size == 0:
            raise RequestError(f"'{path}' is empty: restore it from a copy.")
        yield file


@contextmanager
def _one_sentence(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged file into one sentence with its name."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RequestError as error:
        raise RequestError(f"'{path}' {error}") from error
    except MemoryError as error:
        raise RequestError(f"'{path}' does not fit into memory: lower --max-pixels.") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"'{path}' cannot be decoded ({reason}): it is damaged, restore it from a copy."
        ) from error


def _identify(file: IO[bytes]) -> ImageFile.ImageFile:
    """Read the header, by the file's first bytes.

    ``Image.open`` would apply its process-wide pixel limit instead of this call's.
    """
    file.seek(0)
    prefix, reason = file.read(16), None
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        # A text instead of True means that this Pillow was built without the format's library.
        if accept is not None and accept(prefix) is not True:
            continue
        file.seek(0)
        try:
            image = factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            reason = error
            continue
        if isinstance(image, ImageFile.ImageFile):
            return image
    if reason is not None:
        raise RequestError(f"has a damaged header ({reason}): restore it from a copy.")
    raise RequestError("is not a JPEG, PNG, WebP, TIFF or BMP image: convert it or leave it out.")


def _check_size(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise RequestError(f"has no pixels ({width}x{height}): restore it from a copy.")
    if width * height > max_pixels:
        raise RequestError(
            f"claims {width}x{height} pixels, above the limit of {max_pixels:,}: "
            "raise --max-pixels if you trust it."
        )
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise RequestError(f"has {frames} frames or pages: split it and give one picture a file.")


def _decoded(image: ImageFile.ImageFile, file: IO[bytes]) -> Image.Image:
    """Decode; a colour JPEG into the codec's own YCbCr."""
    if isinstance(image, JpegImagePlugin.JpegImageFile) and image.mode == "RGB":
        image.draft("YCbCr", None)
        try:
            image.load()
        except OSError:  # RGB inside: there is no YCbCr to hand out
            image = _identify(file)
    image.load()
    return image


def _sixteen_bit(
    image: ImageFile.ImageFile, file: IO[bytes]
) -> tuple[Samples, Mode, Samples] | None:
    """Return 16-bit samples where Pillow by itself would cut colour to 8 bit, else None.

    Pillow unpacks 16-bit colour to its upper bytes. Read as of the other byte order the same data
    give the lower bytes, so two decodings give both. A grey-alpha PNG has four bytes a pixel, which
    is one RGBA read.
    """
    layouts = _layouts(image)
    deep = isinstance(image, TiffImagePlugin.TiffImageFile) and max(image.tag_v2.get(258, (1,))) > 8
    if image.mode[0] in "IF" or not (deep or any(";16" in layout for layout in layouts)):
        return None
    layout = layouts.pop() if len(layouts) == 1 else ""
    if layout == "LA;16B":
        four = _unpacked(image, "RGBA")
        return _wide(_joined(four[:, :, 0::2], four[:, :, 1::2]), "LA")
    found = re.fullmatch(r"(RGBA?);16([BLN])", layout)
    if found is None:
        raise RequestError("has 16-bit samples in an unusual order: convert it to a 16-bit PNG.")
    little = found[2] == "L" or (found[2] == "N" and np.little_endian)
    other = f"{found[1]};16{'B' if little else 'L'}"
    pixels = _joined(_unpacked(image, layout), _unpacked(_identify(file), other))
    key = image.info.get("transparency")
    if found[1] == "RGB" and isinstance(key, tuple):
        return _wide(_with_alpha(pixels, (pixels != np.array(key)).any(2)), "RGBA")
    return _wide(pixels, "RGBA" if found[1] == "RGBA" else "RGB")


def _joined(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return np.stack([lower, upper], axis=-1).view("<u2")[..., 0].astype(np.uint16)


def _wide(pixels: NDArray[np.uint16], mode: Mode) -> tuple[Samples, Mode, Samples]:
    return pixels, mode, _luma(pixels, mode)


def _layouts(image: ImageFile.ImageFile) -> set[str]:
    """Return how the file's samples are laid out, in each of its parts."""
    arguments = [part[3] for part in image.tile]
    found = {p[0] if isinstance(p, tuple) and p else p for p in arguments}
    return {layout for layout in found if isinstance(layout, str)}


def _unpacked(image: ImageFile.ImageFile, raw: str) -> NDArray[np.uint8]:
    """Decode with another description of the samples."""
    image.tile = [
        ImageFile._Tile(*part[:3], (raw, *part[3][1:]) if isinstance(part[3], tuple) else raw)
        for part in image.tile
    ]
    image.load()
    return np.asarray(image)


def _from_pillow(image: Image.Image, tags: Tags) -> Picture:
    """Turn a decoded image into a picture, expanding what has no plain samples."""
    mode, note = image.mode, ""
    jpeg = image.format in ("JPEG", "MPO")
    if image.format == "MPO":
        note = "first picture of several"
    if mode == "YCbCr":
        # np.asarray of one band copies that band only.
        luma = np.asarray(image.getchannel(0))
        return Picture(np.asarray(image.convert("RGB")), "RGB", luma, tags, jpeg, note)
    if mode.startswith("I;16"):
        return _grey16(image, tags)
    if mode not in _CHANNELS or "transparency" in image.info:
        image, note = _expanded(image)
    pixels = np.asarray(image)
    pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
    plain: Mode = image.mode  # type: ignore[assignment]
    return Picture(pixels, plain, _luma(pixels, plain), tags, jpeg, note)


def _grey16(image: Image.Image, tags: Tags) -> Picture:
    grey = np.asarray(image).astype(np.uint16)[:, :, None]  # astype: I;16B is big-endian
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return Picture(grey, "L", grey[:, :, 0], tags)
    return Picture(_with_alpha(grey, grey[:, :, 0] != key), "LA", grey[:, :, 0], tags)


def _with_alpha(pixels: NDArray[np.uint16], opaque: NDArray[np.bool_]) -> NDArray[np.uint16]:
    alpha = np.where(opaque, np.uint16(65535), np.uint16(0))
    return np.concatenate([pixels, alpha[:, :, None]], axis=2)


def _expanded(image: Image.Image) -> tuple[Image.Image, str]:
    """Give palettes, bilevel, one transparent colour and premultiplied alpha plain samples."""
    see_through = "transparency" in image.info
    targets = {
        "1": ("LA" if see_through else "L", "bilevel became grey"),
        "L": ("LA", ""),
        "RGB": ("RGBA", ""),
        "P": ("RGBA" if see_through else "RGB", "palette became colour"),
        "PA": ("RGBA", "palette became colour"),
        "La": ("LA", ""),
        "RGBa": ("RGBA", ""),
        "RGBX": ("RGB", ""),
    }
    if image.mode not in targets:
        raise RequestError(
            f"has samples of a kind that is not enhanced ({image.mode}): convert it to 8 or 16 bit "
            "grey, RGB or CMYK."
        )
    target, note = targets[image.mode]
    if image.mode == "1" and see_through:
        image = image.convert("L")
    return image.convert(target), note


def _luma(pixels: Samples, mode: Mode) -> Samples:
    """Return Y (H, W) of full-range BT.601, rounded to the samples' type."""
    if mode in ("L", "LA"):
        return pixels[:, :, 0]
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    luma = np.empty(pixels.shape[:2], pixels.dtype)
    for start in range(0, len(pixels), _ROWS):
        colours = pixels[start : start + _ROWS, :, :3].astype(np.float32)
        y = (255 - colours if mode == "CMYK" else colours) @ weights
        luma[start : start + _ROWS] = np.rint(y)
    return luma


# ---- tags ------------------------------------------------------------------------------------


def _tags(image: Image.Image, png: tuple[tuple[bytes, bytes], ...]) -> Tags:
    info = image.info
    exif = _descriptive(image) if image.format == "TIFF" else _bytes(info.get("exif"))
    return Tags(
        exif=exif.removeprefix(b"Exif\0\0"),
        icc=_bytes(info.get("icc_profile")),
        xmp=_bytes(info.get("xmp") or info.get("XML:com.adobe.xmp")),
        dpi=_dpi(info.get("dpi")),
        png=png,
    )


def _bytes(value: Any) -> bytes:
    return value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else b""


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(v) for v in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    sane = all(0 < v < 1e6 for v in (across, down))
    return (across, down) if sane else None


def _descriptive(image: Image.Image) -> bytes:
    """Return as EXIF what a TIFF's own directory says about the picture (not how it is stored)."""
    # description, make, model, software, date, artist, copyright; the EXIF and GPS directories
    kept, source = Image.Exif(), image.getexif()
    for tag in (270, 271, 272, 305, 306, 315, 33432):
        if tag in source:
            kept[tag] = source[tag]
    for directory in (34665, 34853):
        if values := source.get_ifd(directory):
            kept.get_ifd(directory).update(values)
    # The orientation stays out: Pillow has turned a TIFF's pixels upright while decoding.
    return kept.tobytes() if len(kept) or kept._ifds else b""


def _png_colour(file: IO[bytes]) -> tuple[tuple[bytes, bytes], ...]:
    """Return the chunks before the pixels that say how colours are meant."""
    file.seek(8)
    found: list[tuple[bytes, bytes]] = []
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name in (b"IDAT", b"IEND"):
            break
        if name in _PNG_COLOUR and length <= 64 and name not in dict(found):
            found.append((name, file.read(length)))
            file.seek(4, os.SEEK_CUR)
        else:
            file.seek(length + 4, os.SEEK_CUR)
    return tuple(found)


# ---- writing ---------------------------------------------------------------------------------


def suffix_for(picture: Picture, format: Format) -> str:
    """Return the suffix a picture is written with: PNG cannot hold CMYK, which becomes TIFF.

    >>> suffix_for(Picture.of(np.zeros((8, 8), np.uint8)), "jpeg")
    '.jpg'
    """
    if format == "png" and picture.mode == "CMYK":
        return ".tif"
    return SUFFIX[format]


def write(picture: Picture, path: Path, format: Format = "png") -> None:
    """Write ``picture`` to ``path`` with its tags (the caller makes it atomic).

    ``"png"`` loses nothing (deflated TIFF for CMYK); ``"jpeg"`` is quality 95 without chroma
    subsampling, ``"webp"`` quality 95. What a format cannot hold raises :class:`RequestError`.
    """
    _check_format(picture, format)
    tags = picture.tags
    if picture.bits == 16:
        _write_png16(picture, path)
        return
    image = Image.fromarray(np.ascontiguousarray(picture.array()), picture.mode)
    options: dict[str, Any] = {"icc_profile": tags.icc} if tags.icc else {}
    if tags.dpi is not None:
        options["dpi"] = tags.dpi
    if tags.exif:
        options["exif"] = b"Exif\0\0" + tags.exif
    name = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF"}[
        suffix_for(picture, format)
    ]
    if name == "PNG":
        options["pnginfo"] = _png_info(tags)
    elif tags.xmp and name != "TIFF":
        options["xmp"] = tags.xmp
    if name == "JPEG":
        options |= {"quality": 95, "subsampling": 0}
    elif name == "WEBP":
        options |= {"quality": 95, "method": 4}
    elif name == "TIFF":
        options |= {"compression": "tiff_adobe_deflate"}
    try:
        image.save(path, name, **options)
    except (ValueError, struct.error) as error:
        raise RequestError(
            f"could not be written as {name} ({error}): use --format png."
        ) from error


def _check_format(picture: Picture, format: Format) -> None:
    if format == "png":
        return
    name = {"jpeg": "JPEG", "webp": "WebP"}[format]
    limit = {"jpeg": 65_500, "webp": 16_383}[format]
    height, width = picture.luma.shape
    lacking = None
    if picture.bits == 16:
        lacking = "16-bit samples"
    elif format == "jpeg" and picture.mode in ("LA", "RGBA"):
        lacking = "transparency"
    elif format == "webp" and picture.mode == "CMYK":
        lacking = "CMYK"
    elif max(height, width) > limit:
        lacking = f"{width}x{height} pixels"
    if lacking:
        raise RequestError(f"has {lacking}, which {name} cannot hold: use --format png.")


def _png_info(tags: Tags) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for name, data in tags.png:
        info.add(name, data)
    if tags.xmp:
        info.add_itxt("XML:com.adobe.xmp", tags.xmp.decode("utf-8", "replace"))
    return info


def _write_png16(picture: Picture, path: Path) -> None:
    """Write a PNG of 16-bit samples, which Pillow can only do for grey without alpha."""
    pixels, tags = picture.pixels, picture.tags
    height, width, channels = pixels.shape
    colour_type = {"L": 0, "LA": 4, "RGB": 2, "RGBA": 6}[picture.mode]
    with path.open("wb") as file:

        def chunk(name: bytes, data: bytes) -> None:
            check = zlib.crc32(name + data)
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", check))

        file.write(b"\x89PNG\r\n\x1a\n")
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
        for name, data in tags.png:
            if not (name == b"sRGB" and tags.icc):  # one of the two only
                chunk(name, data)
        if tags.icc:
            chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(tags.icc))
        if tags.dpi is not None:
            across, down = (round(v / 0.0254) for v in tags.dpi)
            chunk(b"pHYs", struct.pack(">IIB", across, down, 1))
        if tags.exif:
            chunk(b"eXIf", tags.exif)
        if tags.xmp:
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + tags.xmp)
        for data in _deflated(pixels, 2 * channels):
            chunk(b"IDAT", data)
        chunk(b"IEND", b"")


def _deflated(pixels: Samples, step: int) -> Iterator[bytes]:
    """Filter and compress rows; each row takes the filter with the smallest sum of differences."""
    packer = zlib.compressobj(6)
    above = np.zeros((1, pixels.shape[1] * step), np.uint8)
    for start in range(0, len(pixels), _ROWS):
        block = pixels[start : start + _ROWS]
        rows = np.ascontiguousarray(block, ">u2").view(np.uint8).reshape(len(block), -1)
        upper = np.concatenate([above, rows[:-1]])
        left, corner = (np.pad(r, ((0, 0), (step, 0)))[:, :-step] for r in (rows, upper))
        choices = np.stack([rows, rows - left, rows - upper, rows - _paeth(left, upper, corner)])
        best = np.abs(choices.view(np.int8).astype(np.int16)).sum(2, dtype=np.int64).argmin(0)
        kinds = np.array([0, 1, 2, 4], np.uint8)[best]
        filtered = choices[best, np.arange(len(rows))]
        yield packer.compress(np.column_stack([kinds, filtered]).tobytes())
        above = rows[-1:]
    yield packer.flush()


def _paeth(left: NDArray[Any], upper: NDArray[Any], corner: NDArray[Any]) -> NDArray[np.uint8]:
    """Return of left, upper and corner the one nearest to left + upper - corner (PNG, filter 4)."""
    a, b, c = (v.astype(np.int16) for v in (left, upper, corner))
    to_a, to_b, to_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest = np.where((to_a <= to_b) & (to_a <= to_c), a, np.where(to_b <= to_c, b, c))
    return nearest.astype(np.uint8)
