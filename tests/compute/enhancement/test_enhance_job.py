from __future__ import annotations

import csv
import hashlib
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage import data as skimage_data

from pantarhei.compute.enhancement import job
from pantarhei.compute.enhancement.job import Result, enhance, exit_code, plan, run_job, within
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.routing import Calibration
from pantarhei.compute.enhancement.shipped import SHIPPED, save_model
from pantarhei.compute.enhancement.tiles import Enhancer
from pantarhei.errors import RequestError

CALIBRATION = Calibration(
    thresholds=(0.0, 0.5, 1.1),
    gain=(0.30, 0.45, 0.50),
    share=(0.4, 0.6, 1.0),
    last_gain=0.5,
    chosen=0.5,
)


@pytest.fixture(scope="module")
def net() -> NestedUNet:
    """An untrained network that changes what it is given visibly."""
    torch.manual_seed(0)
    made = NestedUNet(levels=3, width=4)
    for module in made.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return made


@pytest.fixture(scope="module")
def model(net: NestedUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_model(path, net, CALIBRATION)
    return path


def picture(path: Path, size: tuple[int, int] = (40, 24), seed: int = 0, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = (128 + 90 * np.sin(x / 5 + seed)[..., None] * np.cos(y / 4)[..., None]) + draw.normal(
        0, 5, (size[1], size[0], 3)
    )
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, **options)
    return path


def run(inputs: list[Path], out: Path, net: NestedUNet, **options: object) -> list[Result]:
    options = {"exit": 1, "quiet": True} | options
    return run_job(inputs, out, model=net, **options)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


# ---- one picture -----------------------------------------------------------------------------


def test_arrays_pillow_images_and_files_give_the_same(net: NestedUNet, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png")
    pixels = np.asarray(Image.open(path))
    from_file = enhance(path, net, exit=2)
    from_array = enhance(pixels, net, exit=2)
    from_pillow = enhance(Image.open(path), net, exit=2)
    assert np.array_equal(from_file.array(), from_array.array())
    assert np.array_equal(from_file.array(), from_pillow.array())
    assert not np.array_equal(from_file.array(), pixels)
    assert (from_file.exit, from_file.exits) == (2, 2)
    assert from_file.macs >= net.macs(24, 40, 2)
    assert from_file.share == from_file.macs / net.macs(24, 40, 2)
    from_file.save(tmp_path / "b.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), from_file.array())


def test_only_luma_changes(net: NestedUNet, tmp_path: Path) -> None:
    pixels = np.asarray(Image.open(picture(tmp_path / "a.png"))) // 2 + 60
    alpha = np.arange(24 * 40, dtype=np.uint8).reshape(24, 40, 1)
    after = enhance(np.concatenate([pixels, alpha], axis=2), net, exit=1).array().astype(int)
    assert np.array_equal(after[:, :, 3:], alpha)
    change = after[:, :, :3] - pixels
    assert change.any()
    assert np.array_equal(change[:, :, 0], change[:, :, 1])
    assert np.array_equal(change[:, :, 0], change[:, :, 2])


def test_16_bit_pictures_are_enhanced_at_their_depth(net: NestedUNet) -> None:
    deep = np.random.default_rng(0).integers(20_000, 40_000, (24, 40), dtype=np.uint16)
    after = enhance(deep, net, exit=1).array()
    assert after.dtype == np.uint16
    assert len(np.unique(after % 257)) > 100  # not 8-bit values in disguise


def test_a_shifted_grid_is_found(net: NestedUNet) -> None:
    """A crop off the block grid gives the crop of what the whole gives, near enough inside."""
    draw = np.random.default_rng(3)
    y, x = np.mgrid[:96, :96]
    smooth = 120 + 0.4 * x + 0.3 * y + draw.normal(0, 0.6, (96, 96))
    blocks = draw.integers(-9, 9, (12, 12)).repeat(8, 0).repeat(8, 1)
    grey = (smooth + blocks).clip(0, 255).astype(np.uint8)
    enhancer, _ = job.prepare(net, exit=1)
    assert job._grid(grey, enhancer) == (0, 0)
    assert job._grid(grey[3:, 6:], enhancer) == (3, 6)
    done = enhance(grey[3:, 6:], net, exit=1)
    assert done.array().shape == (93, 90)
    whole = enhance(grey, net, exit=1).array()[3:, 6:]
    assert np.abs(done.array()[40:, 40:].astype(int) - whole[40:, 40:]).max() <= 1


def test_both_planes_of_cmyk_are_enhanced_at_one_exit(net: NestedUNet, tmp_path: Path) -> None:
    ink = Image.open(picture(tmp_path / "a.png")).convert("CMYK")
    ink = Image.merge("CMYK", [*ink.split()[:3], ink.getchannel(1)])
    before = np.asarray(ink).astype(int)
    after = enhance(ink, net, exit=1).array().astype(int)
    change = after - before
    assert change[:, :, 3].any() and change[:, :, 0].any()
    inside = ((after > 0) & (after < 255))[:, :, :3].all(2)
    assert np.array_equal(change[inside][:, 0], change[inside][:, 1])


@pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped model has not been trained yet")
@pytest.mark.parametrize("quality", [10, 30])
def test_the_shipped_model_repairs_a_photograph(tmp_path: Path, quality: int) -> None:
    raw = skimage_data.astronaut()[:256, :256]
    Image.fromarray(raw).save(tmp_path / "a.jpg", quality=quality)
    done = enhance(tmp_path / "a.jpg")

    def error(pixels: np.ndarray) -> float:
        weights = np.array([0.299, 0.587, 0.114])
        return float(np.square((pixels.astype(float) - raw) @ weights).mean())

    before = error(np.asarray(Image.open(tmp_path / "a.jpg")))
    assert 10 * np.log10(before / error(done.array())) > 0.3  # dB


# ---- how the exit is chosen ------------------------------------------------------------------


def test_budgets_use_the_calibration() -> None:
    assert within(CALIBRATION, 0.6) == within(CALIBRATION, "60%") == 0.5
    assert within(CALIBRATION, "0.06dB") == 0.5
    assert within(CALIBRATION, "0 dB") == 1.1
    with pytest.raises(RequestError, match=r"first exit alone takes 0\.4"):
        within(CALIBRATION, 0.1)
    for wrong in ("much", 0, -0.5, 1.5, "200%", "-1dB", float("nan"), "", "nandb"):
        with pytest.raises(RequestError, match="50%"):
            within(CALIBRATION, wrong)


def test_the_model_s_threshold_is_used_unless_another_is_given(
    model: Path, net: NestedUNet
) -> None:
    assert job.prepare(model)[1] == job.Route(threshold=0.5)
    assert job.prepare(model, budget=1.0)[1] == job.Route(threshold=1.1)
    assert job.prepare(model, threshold=0.7)[1] == job.Route(threshold=0.7)
    assert job.prepare(model, exit=2)[1] == job.Route(exit=2)
    with pytest.raises(RequestError, match="exclude each other"):
        job.prepare(model, exit=2, budget=0.5)
    with pytest.raises(RequestError, match="no calibration"):
        job.prepare(net)
    with pytest.raises(RequestError, match="exits 1 to 2"):
        job.prepare(model, exit=3)
    with pytest.raises(RequestError, match="not a quality"):
        job.prepare(model, threshold=float("nan"))
    with pytest.raises(RequestError, match="does not exist"):
        job.prepare(model.with_name("none.safetensors"))
    with pytest.raises(RequestError, match="auto, cpu or cuda"):
        job.prepare(model, device="tpu")


# ---- files and folders -----------------------------------------------------------------------


def test_a_folder_s_tree_is_repeated(net: NestedUNet, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    picture(source / "a.JPG", format="JPEG", quality=30)
    picture(source / "deep" / "er" / "b.webp")
    (source / "notes.txt").write_text("no picture")
    picture(source / ".hidden.jpg")
    before = contents(source)
    results = run([source], out, net)
    assert exit_code(results) == 0
    assert set(contents(out)) == {"a.png", "deep/er/b.png", "report.csv", "report.json"}
    assert contents(source) == before


def test_several_inputs_keep_apart(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        picture(folder / "a.jpg")
    items = plan([first, second, first / "a.jpg"], tmp_path / "out")
    assert [str(i.target.relative_to(tmp_path / "out")) for i in items] == ["one/a", "two/a"]


def test_names_that_would_collide_are_told_apart(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for name in ("a.jpg", "a.png", "A.webp", "b.jpg", "a.jpg.jpg"):
        picture(source / name)
    other = picture(tmp_path / "more" / "b.jpg")
    names = {
        str(i.source.relative_to(tmp_path)): i.target.name
        for i in plan([*sorted(source.iterdir()), other], tmp_path / "out")
    }
    assert len({n.casefold() for n in names.values()}) == len(names) == 6
    assert names["in/a.png"] == "a.png" and names["in/A.webp"] == "A.webp"
    assert names["in/b.jpg"] == "b.jpg" and names["more/b.jpg"] == "b.jpg-2"
    again = plan([*sorted(source.iterdir()), other], tmp_path / "out")
    assert {str(i.source.relative_to(tmp_path)): i.target.name for i in again} == names


def test_out_inside_the_input_is_not_read_again(net: NestedUNet, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    out = tmp_path / "better"
    assert len(run([tmp_path], out, net)) == 1
    assert len(run([tmp_path], out, net, overwrite=True)) == 1
    assert set(contents(out)) == {"a.png", "report.csv", "report.json"}


def test_existing_outputs_need_overwrite(net: NestedUNet, tmp_path: Path) -> None:
    source, out = picture(tmp_path / "a.jpg"), tmp_path / "out"
    run([source], out, net)
    (out / "a.png").write_bytes(b"mine")
    results = run([source], out, net)
    assert exit_code(results) == 1 and "--overwrite" in results[0].error
    assert (out / "a.png").read_bytes() == b"mine"
    assert exit_code(run([source], out, net, overwrite=True)) == 0
    assert Image.open(out / "a.png").size == (40, 24)


@pytest.mark.parametrize("way", ["same folder", "link to file", "hard link", "linked folder"])
def test_an_input_is_never_overwritten(net: NestedUNet, tmp_path: Path, way: str) -> None:
    source = picture(tmp_path / "in" / "a.png")
    out = tmp_path / "out"
    if way == "same folder":
        out = source.parent
    elif way == "linked folder":
        out.symlink_to(source.parent)
    else:
        out.mkdir()
        link = os.symlink if way == "link to file" else os.link
        link(source, out / "a.png")
    before = source.read_bytes()
    results = run([source], out, net, overwrite=True)
    assert "would replace the input" in results[0].error
    assert source.read_bytes() == before


def test_a_result_that_is_another_input_is_refused(net: NestedUNet, tmp_path: Path) -> None:
    first, second = picture(tmp_path / "in" / "a.jpg"), picture(tmp_path / "out" / "a.png", seed=1)
    before = second.read_bytes()
    results = run([first.parent, second], tmp_path / "out", net, overwrite=True)
    assert second.read_bytes() == before
    assert exit_code(results) == 1


@pytest.mark.parametrize("format, name", [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(net: NestedUNet, tmp_path: Path, format: str, name: str) -> None:
    source = picture(tmp_path / "a.jpg", quality=20)
    (result,) = run([source], tmp_path / "out", net, format=format)
    assert result.output is not None
    written = Image.open(result.output)
    assert written.format == name
    wanted = enhance(source, net, exit=1).array().astype(int)
    assert np.abs(np.asarray(written).astype(int) - wanted).mean() <= (0 if name == "PNG" else 4)


def test_orientation_is_kept_and_the_grid_with_it(net: NestedUNet, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[274] = 6
    turned = picture(tmp_path / "turned.jpg", exif=tags, quality=25)
    plain = picture(tmp_path / "plain.jpg", quality=25)
    run([turned, plain], tmp_path / "out", net)
    with_tag = Image.open(tmp_path / "out" / "turned.png")
    without = Image.open(tmp_path / "out" / "plain.png")
    assert np.array_equal(np.asarray(with_tag), np.asarray(without))
    assert ImageOps.exif_transpose(with_tag).size == (24, 40)


# ---- what goes wrong -------------------------------------------------------------------------


def hostile(folder: Path) -> dict[str, str]:
    """Make files that cannot be done; return what is said about each."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = picture(folder / "cut.jpg", quality=60).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.jpg").write_text("this is a letter to my aunt")
    header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))
        + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"
    )  # fmt: skip
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "round").symlink_to(folder)
    return {
        "cut.jpg": "cannot be decoded",
        "empty.png": "is empty",
        "words.jpg": "is not a JPEG",
        "bomb.png": "raise --max-pixels",
        "pipe.jpg": "not a regular file",
        "loop.jpg": "cannot be opened",
    }


def test_bad_files_cost_one_line_each_and_the_rest_goes_on(
    net: NestedUNet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    wrong = hostile(source)
    Image.new("RGB", (16, 16), "red").save(source / "really_a.jpg", "PNG")
    picture(source / "z.jpg")
    results = {Path(r.input).name: r for r in run([source], out, net)}
    assert set(results) == {*wrong, "really_a.jpg", "z.jpg"}
    assert results["z.jpg"].done and results["really_a.jpg"].done
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(wrong)
    for name, said in wrong.items():
        assert said in results[name].error
        (line,) = (ln for ln in lines if f"{name}'" in ln)
        assert line == results[name].error
    assert exit_code(list(results.values())) == 1
    assert {p.name for p in out.iterdir()} == {"really_a.png", "z.png", "report.csv", "report.json"}


def test_a_defect_costs_one_file_only(
    net: NestedUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Enhancer.__call__

    def fails_once(self: Enhancer, plane: np.ndarray, **options: object) -> object:
        if plane.shape == (16, 16):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(self, plane, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Enhancer, "__call__", fails_once)
    picture(tmp_path / "in" / "a.jpg", (16, 16))
    picture(tmp_path / "in" / "b.jpg")
    first, second = run([tmp_path / "in"], tmp_path / "out", net)
    assert "RuntimeError" in first.error and "\n" not in first.error
    assert second.done


def test_an_unwritable_target_is_that_file_s_failure(net: NestedUNet, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    picture(source / "sub" / "a.jpg")
    picture(source / "b.jpg")
    out.mkdir()
    (out / "sub").write_text("a file where a folder should be")
    results = {Path(r.input).name: r for r in run([source], out, net)}
    assert "could not be written" in results["a.jpg"].error
    assert results["b.jpg"].done


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(net: NestedUNet, tmp_path: Path) -> None:
    secret = picture(tmp_path / "in" / "a.jpg")
    picture(tmp_path / "in" / "b.jpg")
    secret.chmod(0)
    first, second = run([tmp_path / "in"], tmp_path / "out", net)
    assert "cannot be opened" in first.error and second.done


def test_an_interruption_keeps_the_report_and_leaves_nothing_half_written(
    net: NestedUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "in" / name)
    real = job.improve

    def stopped(shown: job.Picture, *rest: object) -> object:
        if (tmp_path / "out" / "a.png").exists():
            raise KeyboardInterrupt
        return real(shown, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(job, "improve", stopped)
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path / "in"], tmp_path / "out", net)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.png", "report.csv", "report.json"}
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())) == 1


def test_wrong_requests(net: NestedUNet, tmp_path: Path) -> None:
    source = picture(tmp_path / "in" / "a.jpg")
    out = tmp_path / "out"

    def refused(match: str, *arguments: object, **options: object) -> None:
        with pytest.raises(RequestError, match=match):
            run(*arguments, net, **options)  # type: ignore[arg-type]
        assert not out.exists()

    refused("no input was given", [], out)
    refused("does not exist", [tmp_path / "none.jpg"], out)
    refused("is a file", [source], source)
    refused("looks like a file", [source], tmp_path / "new.png")
    refused("both input and output", [source.parent], source.parent)
    refused("png, jpeg or webp", [source], out, format="gif")
    refused("positive", [source], out, max_pixels=0)
    refused("exits 1 to 2", [source], out, exit=9)
    (tmp_path / "bare").mkdir()
    refused("holds no image", [tmp_path / "bare"], out)
    # One missing among others is that one's failure.
    results = run([tmp_path / "none.jpg", source], out, net)
    assert [r.done for r in results] == [False, True]


# ---- the report ------------------------------------------------------------------------------


def test_the_report(model: Path, net: NestedUNet, tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    picture(source / "a.jpg", quality=10)
    (source / "b.jpg").write_text("no")
    results = run_job([source], out, model=model, threshold=1.1, quiet=True)
    written = json.loads((out / "report.json").read_text())
    assert written == [r.to_json() for r in results]
    good, bad = written
    assert good["done"] and (good["exit"], good["exits"]) == (2, 2)
    assert (good["width"], good["height"]) == (40, 24)
    assert good["milliseconds"] > 0 and good["macs"] > net.macs(24, 40, 2)
    assert 0 <= good["quality_before"] <= 1 and 0 <= good["quality_after"] <= 1
    assert good["quality_before"] != good["quality_after"]
    assert not bad["done"] and bad["exit"] is None and "b.jpg" in bad["error"]
    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["input"] for row in rows] == [good["input"], bad["input"]]
    assert rows[0]["exit"] == "2" and rows[1]["exit"] == ""
    assert all(len(r.row()) == len(job.COLUMNS) for r in results)


def test_names_that_no_terminal_can_show(net: NestedUNet, tmp_path: Path) -> None:
    names = [b"bad\xff.jpg", b"line\nbreak.jpg", "ü 日本.jpg".encode()]
    good = picture(tmp_path / "x.jpg").read_bytes()
    folder = tmp_path / "in"
    folder.mkdir()
    for name in names:
        (folder / os.fsdecode(name)).write_bytes(good)
    (folder / "esc\x1b[31m.jpg").write_bytes(b"no picture at all")
    results = run([folder], tmp_path / "out", net)
    assert sum(r.done for r in results) == 3
    text = (tmp_path / "out" / "report.json").read_text("utf-8")
    assert "ü 日本.jpg" in text and "\\u001b" not in text
    assert (tmp_path / "out" / os.fsdecode(b"bad\xff.png")).exists()


_PROCESS = """
import sys
from pantarhei.compute.enhancement.job import exit_code, run_job
sys.exit(exit_code(run_job(sys.argv[3:], sys.argv[1], model=sys.argv[2])))
"""


def test_as_a_process_without_a_terminal(model: Path, tmp_path: Path) -> None:
    picture(tmp_path / "in" / "a.jpg")
    (tmp_path / "in" / "b.jpg").write_text("no")
    arguments = [str(tmp_path / "out"), str(model), str(tmp_path / "in")]
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "b.jpg" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "a.png").exists()
