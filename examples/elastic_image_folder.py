"""Make a Hugging Face image classifier elastic and train it on a folder of your own images.

    python examples/elastic_image_folder.py [FOLDER] [--model PATH] [--budget 0.5] [--out OUT]

FOLDER holds one folder of images for each class; without it a small one is made from scikit-learn's
digits. PATH is a folder that ``transformers`` can load (``from_pretrained``); without it a small
ResNet is built from its configuration. The sub-network picked for the budget (a share of the full
network's multiply-accumulates) is exported to ONNX and checked against PyTorch.

Needs ``pip install 'pantarhei[transformers,onnx]'``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import pantarhei as pr
from pantarhei.compute.sorted_training import sorted_fit
from pantarhei.errors import RequestError
from pantarhei.fit import Batches


def make_folder(folder: Path, per_class: int = 60) -> None:
    """Write scikit-learn's digits as PNG files, one folder a class."""
    digits = pr.data.load("digits")
    for label, name in enumerate(digits.classes):
        (folder / name).mkdir(parents=True)
        for i in np.flatnonzero(digits.train_labels == label)[:per_class]:
            image = Image.fromarray(digits.train_images[i]).resize((32, 32), Image.BICUBIC)
            image.save(folder / name / f"{i:04}.png")


def read_folder(folder: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Return images (N, 3, size, size) in 0..1, labels (N,) and class names; report bad files."""
    if not folder.is_dir():
        raise RequestError(f"'{folder}' is not a folder: name one with a folder for each class.")
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    images, labels, used = [], [], []
    for name in classes:
        found = []
        for path in sorted(p for p in (folder / name).rglob("*") if p.is_file()):
            try:
                with Image.open(path) as image:
                    found.append(np.asarray(image.convert("RGB").resize((size, size))))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                reason = str(error).replace(str(path), "the file")
                print(f"skipped '{path}': {reason}", file=sys.stderr)
        if found:
            labels += [len(used)] * len(found)
            images += found
            used.append(name)
    if len(used) < 2:
        raise RequestError(
            f"'{folder}' has readable images for {len(used)} classes: put those of each class into "
            "a folder of its own, two classes at least."
        )
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.tensor(labels), used


def split(labels: Tensor, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Return the positions to train on and to test on: at least one test image of each class."""
    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for label in labels.unique():
        mine = torch.nonzero(labels == label).flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)]
        held = max(1, round(share * len(mine)))
        test.append(mine[:held])
        train.append(mine[held:] if len(mine) > 1 else mine)
    return torch.cat(train), torch.cat(test)


def build(path: Path | None, classes: list[str]) -> nn.Module:
    """Load a classifier from ``path``, or build a small ResNet."""
    try:
        import transformers
    except ImportError as error:
        raise RequestError("Run: pip install 'pantarhei[transformers,onnx]'.") from error
    transformers.utils.logging.set_verbosity_error()
    if path is not None:
        if not path.is_dir():
            raise RequestError(f"'{path}' is not a folder with a model: give one, or leave it out.")
        return transformers.AutoModelForImageClassification.from_pretrained(
            path, num_labels=len(classes), ignore_mismatched_sizes=True
        )
    config = transformers.ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=len(classes),
    )
    return transformers.ResNetForImageClassification(config)


class Scores(nn.Module):
    """A classifier that returns its scores alone: what an exported file should return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return scores (B, classes)."""
        return self.model(pixel_values).logits


def export(model: nn.Module, example: Tensor, path: Path) -> float:
    """Write ``model`` as ONNX; return the largest difference between its output and PyTorch's."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise RequestError("Run: pip install 'pantarhei[transformers,onnx]'.") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it only misses torchvision
    plain = Scores(model).eval()
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        plain,
        (example,),
        path,
        dynamo=True,
        dynamic_shapes={"pixel_values": {0: batch}},
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    (theirs,) = session.run(None, {name: example.numpy()})
    with torch.no_grad():
        ours = plain(example).numpy()
    return float(np.abs(ours - theirs).max())


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="one folder of images for each class")
    parser.add_argument("--model", type=Path, help="folder of a transformers image classifier")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the full MACs")
    parser.add_argument("--size", type=int, default=32, help="images are resized to this")
    parser.add_argument("--steps", type=int, default=150, help="updates")
    parser.add_argument("--out", type=Path, default=Path("elastic-image-folder"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if options.folder is None:
            make_folder(Path(temporary))
        pixels, labels, classes = read_folder(options.folder or Path(temporary), options.size)

    train, test = split(labels)
    mean, deviation = pixels[train].mean((0, 2, 3)), pixels[train].std((0, 2, 3)) + 1e-6
    pixels = (pixels - mean[:, None, None]) / deviation[:, None, None]
    model = build(options.model, classes)

    # 1. elastic, without a change to the model's code; 2. one training of all sub-networks
    net = pr.elastic(model, pixels[:2], width=(0.25, 0.5, 0.75, 1.0), depth=(1, 2))
    print(f"{len(labels)} images of {len(classes)} classes; {net}")
    batches = Batches(pixels[train], labels[train], batch_size=min(32, len(train)))
    sorted_fit(
        net, batches, g_acc=2, steps=options.steps, lr=2e-3, schedule="cosine",
        warmup=options.steps // 10,
    )  # fmt: skip

    # 3. measure every sub-network, pick by budget: no search
    front = pr.frontier(
        net, [(pixels[test], labels[test])], recalibrate=[batches(n) for n in range(10)]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    front.to_csv(options.out / "frontier.csv")
    choice = front.under(macs=options.budget * front.full.cost.macs)
    front.plot(options.out / "frontier", named={"picked": choice})
    for label, point in (("full", front.full), ("picked", front[choice])):
        print(f"{label:6} [{point.choice}] accuracy {point.quality:.1%}, {point.cost}")

    # 4. a plain module, exported and checked
    difference = export(net.eval().extract(choice), pixels[test][:4], options.out / "picked.onnx")
    print(f"ONNX and PyTorch differ by {difference:.1e} at most; files are in '{options.out}'")
    if not difference < 1e-3:
        raise RequestError("The exported network does not compute what PyTorch does.")


if __name__ == "__main__":
    try:
        main()
    except RequestError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
