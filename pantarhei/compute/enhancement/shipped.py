"""Trained models on disk: the one that ships with the package, and the user's own.

A model is two files: ``NAME.safetensors`` with the weights and ``NAME.json`` with the network's
shape, the calibrated thresholds and how it was trained. Neither can carry code.

    python -m pantarhei.compute.enhancement.shipped       # trains the shipped model again
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pantarhei import data
from pantarhei.compute.enhancement.nested_unet import NestedUNet
from pantarhei.compute.enhancement.routing import Calibration, calibrate, measure_exits
from pantarhei.compute.enhancement.training import CompressedCrops, exit_loss, fast_layout, raw_luma
from pantarhei.data.simulate.codecs import jpeg_file_roundtrip
from pantarhei.errors import RequestError
from pantarhei.files import atomic, read_json, write_json

SHIPPED = Path(__file__).parent / "weights" / "rbqe-small.safetensors"
QUALITIES = tuple(range(95, 0, -5))
_LARGEST = {"levels": 8, "width": 256}  # a file must not make us allocate what it likes


class Trained(NamedTuple):
    """A network in evaluation mode and, where the file has one, its calibration."""

    model: NestedUNet
    calibration: Calibration | None


def save_model(
    path: str | os.PathLike[str],
    net: NestedUNet,
    calibration: Calibration | None = None,
    about: dict[str, Any] | None = None,
) -> None:
    """Write ``net`` to ``path`` (``*.safetensors``) and its description to the JSON beside it.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "mine.safetensors"
    >>> save_model(path, NestedUNet(levels=3, width=4))
    >>> load_model(path).model.config["width"]
    4
    """
    weights, sidecar = _files(path)
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    with atomic(weights) as temporary:
        temporary.write_bytes(save(tensors))
    document: dict[str, Any] = {"network": "NestedUNet", "config": net.config}
    document["calibration"] = calibration.to_json() if calibration else None
    write_json(sidecar, document | {"about": about or {}})


def load_model(path: str | os.PathLike[str]) -> Trained:
    """Read a model that :func:`save_model` wrote; ``path`` names either file or their stem.

    Anything missing, damaged or not fitting raises :class:`RequestError`.
    """
    weights, sidecar = _files(path)
    document = read_json(sidecar)
    try:
        config = dict(document["config"])
        for name, largest in _LARGEST.items():
            if type(config[name]) is not int or config[name] > largest:
                raise ValueError(f"{name}={config[name]!r}")
        net = NestedUNet(**config)
        stored = document["calibration"]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"'{sidecar}' does not describe a network ({error}): restore it or train again."
        ) from error
    try:
        net.load_state_dict(load_file(weights))
    except FileNotFoundError as error:
        raise RequestError(f"'{weights}' does not exist: it belongs beside '{sidecar}'.") from error
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"'{weights}' does not hold the weights that '{sidecar.name}' describes ({reason}): "
            "restore both files or train again."
        ) from error
    if not all(bool(torch.isfinite(p).all()) for p in net.parameters()):
        raise RequestError(f"'{weights}' holds weights that are not finite: train again.")
    return Trained(net.eval(), Calibration.from_json(stored) if stored else None)


def load_shipped() -> Trained:
    """Return the model that comes with the package (``weights/rbqe-small``).

    It was made by :func:`train_shipped`; its JSON says from what.
    """
    return load_model(SHIPPED)


def _files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    stem = Path(path)
    if stem.suffix in (".safetensors", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def train_shipped(
    out: Annotated[Path, typer.Option(help="The weights file to write.")] = SHIPPED,
    levels: Annotated[int, typer.Option(help="Levels of the network: one exit fewer.")] = 5,
    width: Annotated[int, typer.Option(help="Channels.")] = 16,
    steps: Annotated[int, typer.Option(help="Updates.")] = 4000,
    batch: Annotated[int, typer.Option(help="Crops in an update.")] = 16,
    size: Annotated[int, typer.Option(help="Pixels of a crop's side.")] = 64,
    lr: Annotated[float, typer.Option(help="Largest learning rate (Adam, cosine).")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Decides weights and crops.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    checkpoint: Annotated[Path, typer.Option(help="Where a killed training resumes.")] = Path(
        "runs/shipped-model"
    ),
) -> None:
    """Train the model that ships: real JPEG files of quality 5..95, Berkeley images halved.

    Every tenth image is kept back and calibrates the thresholds.
    """
    from pantarhei.fit import fit

    pictures = data.load("images_train_color")
    planes = list(raw_luma(pictures).values())
    validation = planes[::10]
    training = [plane for index, plane in enumerate(planes) if index % 10]
    crops = CompressedCrops(
        training, size, batch, qualities=QUALITIES, seed=seed, codec=jpeg_file_roundtrip
    )
    torch.manual_seed(seed)
    net = NestedUNet(levels=levels, width=width)
    fit(
        fast_layout(net),
        crops,
        exit_loss(),
        steps=steps,
        optimizer=partial(torch.optim.Adam, fused=True),
        lr=lr,
        schedule="cosine",
        warmup=steps // 20,
        ema=0.999,
        seed=seed,
        precision="bf16",
        device=device,
        checkpoint=checkpoint,
        label="shipped model",
    )
    calibration = calibrate(measure_exits(net, validation, QUALITIES, codec=jpeg_file_roundtrip))
    about = {
        "data": f"{len(training)} images of {pictures.source}, luma, half size",
        "codec": "JPEG files (Pillow), quality 5, 10, ..., 95 mixed",
        "recipe": {"steps": steps, "batch": batch, "crop": size, "lr": lr, "seed": seed},
        "command": "python -m pantarhei.compute.enhancement.shipped",
    }
    save_model(out, net, calibration, about)
    chosen = calibration.thresholds.index(calibration.chosen)
    print(
        f"{out}: dPSNR {calibration.gain[chosen]:.3f} dB at {calibration.share[chosen]:.2f} of the "
        f"MACs (last exit {calibration.last_gain:.3f} dB), threshold {calibration.chosen:.3f}"
    )


if __name__ == "__main__":
    typer.run(train_shipped)
