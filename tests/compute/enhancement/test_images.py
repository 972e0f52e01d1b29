from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from pantarhei.compute.enhancement.images import Picture, read, suffix_for, write
from pantarhei.errors import RequestError

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
DPI = (300.0, 300.0)


def scene(height: int, width: int, channels: int, top: int = 255) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    planes = [(np.sin(x / (5 + c)) + np.cos(y / (7 + c)) + 2) / 4 * top for c in range(channels)]
    return np.stack(planes, axis=2).astype(np.uint8 if top == 255 else np.uint16)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274], tags[271] = orientation, "Maker"
    return tags.tobytes()


def png16(path: Path, array: np.ndarray, *chunks: tuple[bytes, bytes]) -> None:
    """Write a 16-bit PNG the plain way, so that the library's writer does not test its reader."""
    height, width, channels = array.shape

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# ---- colour and luma -------------------------------------------------------------------------


def test_luma_of_a_jpeg_is_the_codec_s_own_plane(tmp_path: Path) -> None:
    Image.fromarray(scene(40, 56, 3)).save(tmp_path / "a.jpg", quality=30)
    raw = Image.open(tmp_path / "a.jpg")
    raw.draft("YCbCr", None)
    picture = read(tmp_path / "a.jpg")
    assert picture.jpeg and picture.mode == "RGB"
    assert np.array_equal(picture.luma, np.asarray(raw)[:, :, 0])
    # ... which a detour over rounded RGB would not give:
    detour = np.asarray(Image.open(tmp_path / "a.jpg").convert("YCbCr"))[:, :, 0]
    assert not np.array_equal(picture.luma, detour)


def test_luma_weights_are_bt601_full_range() -> None:
    primaries = np.diag([255, 255, 255]).astype(np.uint8)[None]
    assert Picture.of(primaries).luma.tolist() == [[76, 150, 29]]
    wide = np.diag([65535] * 3).astype(np.uint16)[None]
    assert Picture.of(wide).luma.tolist() == [[19595, 38469, 7471]]


@settings(max_examples=30, deadline=None)
@given(
    arrays(np.uint8, (6, 5, 4), elements=st.integers(60, 190)),
    arrays(np.int16, (6, 5), elements=st.integers(-60, 60)),
)
def test_a_new_luma_keeps_chroma_and_alpha(pixels: np.ndarray, change: np.ndarray) -> None:
    picture = Picture.of(pixels)
    after = picture.with_luma((picture.luma + change).astype(np.uint8)).array()
    assert np.array_equal(after[:, :, 3], pixels[:, :, 3])
    before = pixels.astype(int)
    for first, second in ((0, 1), (2, 1)):  # R-G and B-G are functions of Cb and Cr alone
        assert np.array_equal(
            after[:, :, first].astype(int) - after[:, :, second],
            before[:, :, first] - before[:, :, second],
        )
    y = after[:, :, :3] @ np.array([0.299, 0.587, 0.114])
    assert np.abs(y - (picture.luma + change)).max() <= 0.51


def test_the_same_luma_gives_the_picture_back_and_leaves_the_first_alone() -> None:
    pixels = scene(20, 30, 3, 65535)
    picture = Picture.of(pixels)
    assert np.array_equal(picture.with_luma(picture.luma).array(), pixels)
    picture.with_luma(np.zeros_like(picture.luma))
    assert np.array_equal(picture.array(), pixels)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("top", [255, 65535])
def test_every_kind_survives_png(tmp_path: Path, channels: int, mode: str, top: int) -> None:
    pixels = scene(300, 41, channels, top)
    picture = Picture.of(pixels)
    write(picture, tmp_path / "a.png")
    back = read(tmp_path / "a.png")
    assert (back.mode, back.bits) == (mode, 8 if top == 255 else 16)
    assert np.array_equal(back.pixels, pixels)
    assert Image.open(tmp_path / "a.png").size == (41, 300)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_16_bits_of_a_foreign_png_are_read(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(channels).integers(0, 65536, (9, 7, channels), dtype=np.uint16)
    png16(tmp_path / "a.png", pixels)
    picture = read(tmp_path / "a.png")
    assert picture.bits == 16
    assert np.array_equal(picture.pixels, pixels)


@pytest.mark.parametrize("channels, mode", [(1, "LA"), (3, "RGBA")])
def test_the_transparent_colour_of_a_16_bit_png_becomes_alpha(
    tmp_path: Path, channels: int, mode: str
) -> None:
    pixels = np.full((4, 4, channels), 700, np.uint16)
    pixels[0, 0] = 513
    png16(tmp_path / "a.png", pixels, (b"tRNS", struct.pack(f">{channels}H", *[513] * channels)))
    picture = read(tmp_path / "a.png")
    assert picture.mode == mode
    assert picture.pixels[0, 0, -1] == 0
    assert picture.pixels[1, 1, -1] == 65535


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_16_bit_grey_tiff_keeps_its_bits(tmp_path: Path, order: str) -> None:
    pixels = scene(12, 10, 1, 65535)[:, :, 0]

    def tag(number: int, kind: int, count: int, value: int) -> bytes:
        layout, values = ("HH", (value, 0)) if kind == 3 else ("I", (value,))
        return struct.pack(f"{order}HHI{layout}", number, kind, count, *values)

    entries = [(256, 3, 1, 10), (257, 3, 1, 12), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1),
               (273, 4, 1, 8), (277, 3, 1, 1), (278, 3, 1, 12), (279, 4, 1, 240)]  # fmt: skip
    data = pixels.astype(f"{order}u2").tobytes()
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    body = b"".join(tag(*e) for e in entries)
    directory = struct.pack(f"{order}H", len(entries)) + body + struct.pack(f"{order}I", 0)
    (tmp_path / "a.tif").write_bytes(head + data + directory)
    assert np.array_equal(read(tmp_path / "a.tif").array(), pixels)


def test_grey_jpeg_stays_grey(tmp_path: Path) -> None:
    Image.fromarray(scene(16, 16, 1)[:, :, 0]).save(tmp_path / "a.jpg", quality=40)
    picture = read(tmp_path / "a.jpg")
    assert picture.mode == "L" and picture.array().ndim == 2
    write(picture, tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").mode == "L"


def test_a_jpeg_that_holds_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    Image.fromarray(scene(16, 24, 3)).save(tmp_path / "a.jpg", quality=90, keep_rgb=True)
    picture = read(tmp_path / "a.jpg")
    assert np.array_equal(picture.pixels, np.asarray(Image.open(tmp_path / "a.jpg")))


def test_palette_bilevel_and_transparent_colours_are_expanded(tmp_path: Path) -> None:
    rgb = Image.fromarray(scene(16, 16, 3))
    rgb.quantize(16).save(tmp_path / "p.png")
    assert read(tmp_path / "p.png").mode == "RGB" and "palette" in read(tmp_path / "p.png").note
    rgb.convert("1").save(tmp_path / "b.png")
    bilevel = read(tmp_path / "b.png")
    assert bilevel.mode == "L" and set(np.unique(bilevel.pixels)) == {0, 255}
    rgb.save(tmp_path / "t.png", transparency=rgb.getpixel((3, 4)))
    keyed = read(tmp_path / "t.png")
    assert keyed.mode == "RGBA" and keyed.pixels[4, 3, 3] == 0
    rgb.quantize(16).save(tmp_path / "tp.png", transparency=0)
    assert read(tmp_path / "tp.png").mode == "RGBA"


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_stays_cmyk_with_its_colours(tmp_path: Path, suffix: str) -> None:
    ink = Image.fromarray(scene(32, 24, 4), "CMYK")
    ink.save(tmp_path / f"a.{suffix}", icc_profile=ICC)
    picture = read(tmp_path / f"a.{suffix}")
    decoded = np.asarray(Image.open(tmp_path / f"a.{suffix}"))  # Pillow undoes Adobe's inversion
    assert picture.mode == "CMYK" and len(picture.planes) == 2
    assert np.array_equal(picture.pixels, decoded)
    assert suffix_for(picture, "png") == ".tif"
    write(picture, tmp_path / "b.tif")
    back = Image.open(tmp_path / "b.tif")
    assert back.mode == "CMYK" and back.info["icc_profile"] == ICC
    assert np.array_equal(np.asarray(back), decoded)


def test_brighter_luma_takes_ink_away() -> None:
    pixels = np.full((8, 8, 4), 100, np.uint8)
    picture = Picture.of(Image.fromarray(pixels, "CMYK"))
    luma, black = picture.planes
    assert (luma == 155).all() and (black == 155).all()
    brighter = picture.with_luma(luma + 5, black - 7).array()
    assert brighter[0, 0].tolist() == [95, 95, 95, 107]


# ---- tags ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_tags_travel(tmp_path: Path, format: str) -> None:
    source = tmp_path / "a.jpg"
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>'
    Image.fromarray(scene(24, 40, 3)).save(
        source, quality=50, exif=exif(6), icc_profile=ICC, dpi=DPI, xmp=xmp
    )
    picture = read(source)
    target = tmp_path / f"b{suffix_for(picture, format)}"  # type: ignore[arg-type]
    write(picture, target, format)  # type: ignore[arg-type]
    back = Image.open(target)
    assert back.info["icc_profile"] == ICC
    assert back.getexif()[274] == 6 and back.getexif()[271] == "Maker"
    assert back.info["exif"].removeprefix(b"Exif\0\0") == exif(6).removeprefix(b"Exif\0\0")
    if format != "webp":  # has no place for a resolution
        assert back.info["dpi"] == pytest.approx(DPI, abs=0.01)
    assert (back.info.get("xmp") or back.info["XML:com.adobe.xmp"].encode()) == xmp


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_oriented_picture_displays_the_same(tmp_path: Path, orientation: int) -> None:
    Image.fromarray(scene(24, 40, 3)).save(tmp_path / "a.jpg", quality=90, exif=exif(orientation))
    picture = read(tmp_path / "a.jpg")
    assert picture.pixels.shape == (24, 40, 3)  # as stored: the codec's grid is at the corner
    write(picture, tmp_path / "b.png")
    shown, wanted = (
        np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / n))).astype(int)
        for n in ("b.png", "a.jpg")
    )
    assert shown.shape == wanted.shape
    assert np.abs(shown - wanted).max() <= 2


def test_an_oriented_tiff_is_turned_once(tmp_path: Path) -> None:
    Image.fromarray(scene(24, 40, 3)).save(tmp_path / "a.tif", exif=exif(6), dpi=DPI)
    write(read(tmp_path / "a.tif"), tmp_path / "b.png")
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.tif")))
    back = Image.open(tmp_path / "b.png")
    assert 274 not in back.getexif() and back.getexif()[271] == "Maker"
    assert np.array_equal(np.asarray(back), wanted)
    assert back.info["dpi"] == pytest.approx(DPI, abs=0.01)


def test_16_bit_png_keeps_its_tags(tmp_path: Path) -> None:
    data = exif(3).removeprefix(b"Exif\0\0")
    png16(
        tmp_path / "a.png",
        scene(8, 8, 3, 65535),
        (b"gAMA", struct.pack(">I", 45455)),
        (b"iCCP", b"x\0\0" + zlib.compress(ICC)),
        (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
        (b"eXIf", data),
    )
    picture = read(tmp_path / "a.png")
    write(picture, tmp_path / "b.png")
    info = Image.open(tmp_path / "b.png").info
    assert info["icc_profile"] == ICC and info["gamma"] == pytest.approx(0.45455)
    assert info["dpi"] == pytest.approx(DPI, abs=0.01)
    assert info["exif"].removeprefix(b"Exif\0\0") == data


# ---- what cannot be done ---------------------------------------------------------------------


def failure(path: Path, max_pixels: int = 10**7) -> str:
    with pytest.raises(RequestError) as caught:
        read(path, max_pixels)
    text = str(caught.value)
    assert text.startswith(f"'{path}' ") and "\n" not in text
    return text


def bomb(kind: str, side: int) -> bytes:
    if kind == "png":
        data = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + data
        head = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 0) + b"IDAT" + b"\x35\xaf\x06\x1e"
    if kind == "bmp":
        return b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, side, side, 1, 24, *[0] * 6)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", min(side, 65535), min(side, 65535))
    return bytes(data)


@pytest.mark.parametrize("kind", ["png", "bmp", "jpeg"])
def test_a_gigantic_header_is_refused_before_decoding(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(bomb(kind, 60_000))
    limit = Image.MAX_IMAGE_PIXELS
    assert "raise --max-pixels" in failure(path)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_this_call_s_and_not_the_process_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (100, 100)).save(path)
    assert "100x100" in failure(path, 9_999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # a caller's own setting is not ours
    assert read(path, 10_000).pixels.shape == (100, 100, 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncation_is_one_sentence(tmp_path: Path, format: str) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(
        path, format
    )
    whole = path.read_bytes()
    for part in (0.02, 0.3, 0.7):
        path.write_bytes(whole[: int(part * len(whole))])
        failure(path)


def test_empty_mislabelled_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    assert "is empty" in failure(path)
    path.write_text("just words, quite a few of them, and no picture")
    assert "is not a JPEG" in failure(path)
    Image.new("L", (8, 8)).save(path, "PPM")  # a format whose parser is not offered
    assert "is not a JPEG" in failure(path)
    Image.new("L", (8, 8), 7).save(path, "PNG")
    assert (read(path).pixels == 7).all()
    Image.new("F", (8, 8)).save(path, "TIFF")
    assert "kind that is not enhanced" in failure(path)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(tmp_path: Path, format: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "green")]
    frames[0].save(tmp_path / "a.png", format, save_all=True, append_images=frames[1:])
    assert "3 frames" in failure(tmp_path / "a.png")


def test_a_camera_s_mpo_gives_its_main_picture(tmp_path: Path) -> None:
    main, small = Image.fromarray(scene(32, 32, 3)), Image.new("RGB", (32, 32))
    main.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[small])
    picture = read(tmp_path / "a.jpg")
    assert picture.jpeg and "first picture" in picture.note
    assert np.abs(picture.pixels.astype(int) - scene(32, 32, 3)).mean() < 12


def test_special_files_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "not a regular file" in failure(tmp_path / "pipe.jpg")
    assert "not a regular file" in failure(tmp_path)
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    assert "cannot be opened" in failure(tmp_path / "loop.jpg")
    assert "cannot be opened" in failure(tmp_path / "none.jpg")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP"]), st.data())
def test_no_damage_gets_through_as_anything_but_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, format: str, data: st.DataObject
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(scene(16, 16, 3)).save(buffer, format, exif=exif(6))
    raw = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damage") / "a.jpg"
    path.write_bytes(raw)
    try:
        picture = read(path, 10**6)
    except RequestError as error:
        assert str(path) in str(error)
    else:
        write(picture, path.with_suffix(".png"))


@pytest.mark.parametrize(
    "pixels, format, lacking",
    [
        (scene(8, 8, 4), "jpeg", "transparency"),
        (scene(8, 8, 3, 65535), "jpeg", "16-bit"),
        (scene(8, 8, 1, 65535), "webp", "16-bit"),
        (np.zeros((1, 20_000), np.uint8), "webp", "20000x1"),
    ],
)
def test_nothing_is_dropped_to_fit_a_format(
    tmp_path: Path, pixels: np.ndarray, format: str, lacking: str
) -> None:
    with pytest.raises(RequestError, match=f"{lacking}.*use --format png"):
        write(Picture.of(pixels), tmp_path / "a", format)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("array", [np.zeros((4, 4)), np.zeros((4, 4, 5), np.uint8), np.zeros(3)])
def test_arrays_that_are_no_pictures(array: np.ndarray) -> None:
    with pytest.raises(RequestError, match="uint8 or uint16"):
        Picture.of(array)


def test_a_hostile_text_chunk_is_refused_or_ignored(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * 30_000_000, zip=True)
    Image.new("L", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    failure(tmp_path / "a.png")
