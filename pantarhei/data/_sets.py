"""The named data sets: what each is, which files hold it, where those may lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from pantarhei.data import _read
from pantarhei.data.events import Events, read_events
from pantarhei.errors import RequestError, nearest


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with classes: ``*_images`` (N, H, W) or (N, H, W, 3) uint8, ``*_labels`` (N,) int64.

    ``source`` names the copy ("JPEG-75 copy" belongs beside every figure made with it).
    """

    name: str
    source: str
    classes: tuple[str, ...]
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures of any size: ``images`` are (H, W) grey or (H, W, 3) RGB uint8 arrays.

    ``lossless`` tells for each whether it is stored here without loss; one that came as a JPEG file
    carries artefacts of its own (halve its size before using it as a clean target).
    """

    name: str
    source: str
    names: tuple[str, ...]
    images: tuple[NDArray[np.uint8], ...]
    lossless: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Location:
    """Where a data set was found, or what would bring it."""

    name: str
    where: str
    content: str
    found: bool


Dataset = Labelled | Images | Events
LabelledName = Literal["digits", "mnist", "fashion_mnist", "cifar10"]
ImagesName = Literal[
    "photographs",
    "photographs_gray",
    "images_train",
    "images_train_color",
    "images_test",
    "classic5",
    "live1",
    "set5",
    "set14",
]

EventsName = Literal["bitcoin_otc", "bitcoin_alpha", "uci_messages"]


@dataclass(frozen=True)
class _Copy:
    """One form a data set comes in: its files, and the reader of their paths."""

    files: tuple[str, ...]
    read: Callable[[str, tuple[Path, ...]], Dataset]
    # Address of the folder that holds the files, tried in order, and each file's MD5.
    addresses: tuple[str, ...] = ()
    md5: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Set:
    """A data set: in words, the folder its files lie in, and the copies, best first."""

    content: str
    folder: str = ""
    copies: tuple[_Copy, ...] = ()
    bundled: Callable[[str], Dataset] | None = None


_Found = tuple[_Copy, tuple[Path, ...]]


def names() -> tuple[str, ...]:
    """Return the names that :func:`load` knows."""
    return tuple(_SETS)


@overload
def load(
    name: LabelledName, path: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Labelled: ...
@overload
def load(
    name: ImagesName, path: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Images: ...
@overload
def load(
    name: EventsName, path: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Events: ...
def load(
    name: str, path: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Dataset:
    """Load a data set by name.

    ``path`` (a file of the set, its folder, or the folder above) is the only place looked at when
    given. Otherwise: ``PANTARHEI_DATA``, the user's cache, and unless ``download`` is False the
    set's public address.

    Raises :class:`RequestError` for an unknown name, for a file that is damaged or something else
    than its name says, and where the set is nowhere: the sentence says what to put where.

    >>> digits = load("digits")
    >>> digits.train_images.shape, digits.test_images.shape, digits.source
    ((1437, 8, 8), (360, 8, 8), 'scikit-learn')
    """
    known = _known(name)
    if known.bundled is not None:
        return known.bundled(name)
    found = _look(known.copies, _places(known)) if path is None else _given(name, known, Path(path))
    if found is not None:
        copy, files = found
        return copy.read(name, files)
    if download:
        for copy in known.copies:
            if copy.addresses:
                return copy.read(name, _download(name, known, copy))
    raise RequestError(f"Data set '{name}' is not on this machine: {_remedy(known)}.")


def located() -> tuple[Location, ...]:
    """Tell for each data set where it was found, without reading or downloading it."""
    rows = []
    for name, known in _SETS.items():
        found = _look(known.copies, _places(known))
        if known.bundled is not None:
            where = "comes with the installed packages"
        elif found is not None:
            where = str(found[1][0].parent)
        elif any(copy.addresses for copy in known.copies):
            where = "not here: downloaded when first loaded"
        else:
            where = f"not here: {_remedy(known)}"
        rows.append(Location(name, where, known.content, bool(found or known.bundled)))
    return tuple(rows)


def cache() -> Path:
    """Return the folder that keeps downloads: in ``PANTARHEI_HOME`` or the user's cache."""
    named = os.environ.get("PANTARHEI_HOME")
    if named:
        return Path(named) / "data"
    import platformdirs

    folder = platformdirs.user_cache_path("pantarhei")
    if not folder.is_absolute():
        raise RequestError("This user has no home folder: set PANTARHEI_HOME to a folder to use.")
    return folder / "data"


def _known(name: str) -> _Set:
    if name not in _SETS:
        raise RequestError(
            f"Unknown data set '{name}': `pantarhei data` lists them.{nearest(name, _SETS)}"
        )
    return _SETS[name]


def _places(known: _Set) -> Iterator[Path]:
    if shared := os.environ.get("PANTARHEI_DATA"):
        yield from (Path(shared) / known.folder, Path(shared))
    yield cache() / known.folder


def _given(name: str, known: _Set, path: Path) -> _Found:
    if not path.exists():
        raise RequestError(f"'{path}' does not exist: check the path of data set '{name}'.")
    if path.is_dir():
        found = _look(known.copies, (path, path / known.folder))
    else:
        found = _look([copy for copy in known.copies if path.name in copy.files], (path.parent,))
    if found is None:
        raise RequestError(f"'{path}' does not hold data set '{name}': it needs {_wanted(known)}.")
    return found


def _look(copies: Sequence[_Copy], places: Iterable[Path]) -> _Found | None:
    for place in places:
        for copy in copies:
            files = tuple(place / name for name in copy.files)
            if all(file.is_file() for file in files):
                return copy, files
    return None


def _wanted(known: _Set) -> str:
    return ", or ".join(" and ".join(copy.files) for copy in known.copies)


def _remedy(known: _Set) -> str:
    return (
        f"put {_wanted(known)} into a folder '{known.folder}' in the one that PANTARHEI_DATA names"
    )


def _download(name: str, known: _Set, copy: _Copy) -> tuple[Path, ...]:
    """Fetch the copy's files into the cache, each checked, each appearing whole."""
    import logging

    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    folder = cache() / known.folder
    reason = ""
    for address in copy.addresses:
        try:
            for file in copy.files:
                pooch.retrieve(
                    address + file,
                    known_hash=f"md5:{copy.md5[file]}",
                    fname=file,
                    path=folder,
                    downloader=pooch.HTTPDownloader(timeout=30),
                )
            return tuple(folder / file for file in copy.files)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors, a hash a ValueError
            reason = f"{type(error).__name__} from {address}"
    raise RequestError(f"Data set '{name}' could not be downloaded ({reason}): {_remedy(known)}.")


_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def _labelled(
    name: str, source: str, classes: tuple[str, ...], arrays: Mapping[str, NDArray[Any]], path: Path
) -> Labelled:
    with _read.guarded(path):
        for part in ("train", "test"):
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
            if images.dtype != np.uint8 or len(images) != len(labels) or not len(labels):
                raise ValueError(f"{len(images)} {part} images and {len(labels)} labels")
            if labels.min() < 0 or labels.max() >= len(classes):
                raise ValueError(f"{part} labels outside 0 to {len(classes) - 1}")
    return Labelled(
        name,
        source,
        classes,
        arrays["train_images"],
        arrays["train_labels"].astype(np.int64),
        arrays["test_images"],
        arrays["test_labels"].astype(np.int64),
    )


_MNIST_SHAPES: Mapping[str, tuple[int | None, ...]] = {
    "train_images": (None, 28, 28),
    "train_labels": (None,),
    "test_images": (None, 28, 28),
    "test_labels": (None,),
}
_IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def _mnist_npz(classes: tuple[str, ...], name: str, paths: tuple[Path, ...]) -> Labelled:
    arrays: dict[str, NDArray[Any]] = _read.npz(paths[0], _MNIST_SHAPES)
    if len(paths) > 1:  # this copy is sorted by class; the file beside it has the original order
        orders = _read.npz(paths[1], {"train_order": (None,), "test_order": (None,)})
        with _read.guarded(paths[1]):
            for key in arrays:
                order = orders[f"{key.partition('_')[0]}_order"].astype(np.int64)
                if not np.array_equal(np.sort(order), np.arange(len(arrays[key]))):
                    raise ValueError("not an order of the images beside it")
                arrays[key] = arrays[key][order]
    return _labelled(name, "original pixels", classes, arrays, paths[0])


def _mnist_idx(classes: tuple[str, ...], name: str, paths: tuple[Path, ...]) -> Labelled:
    items = zip(_MNIST_SHAPES.items(), paths, strict=True)
    arrays = {key: _read.idx(path, shape) for (key, shape), path in items}
    return _labelled(name, "original pixels", classes, arrays, paths[0])


def _cifar(
    source: str, read: Callable[[Path], dict[str, Any]], name: str, paths: tuple[Path, ...]
) -> Labelled:
    return _labelled(name, source, _CIFAR, read(paths[0]), paths[0])


def _zipped(source: str, lossless: bool, name: str, paths: tuple[Path, ...]) -> Images:
    found: list[str] = []
    images: list[NDArray[np.uint8]] = []
    for path in paths:
        inside, pictures = _read.images(path)
        found += [f"{path.stem}/{one}" for one in inside] if len(paths) > 1 else inside
        images += pictures
    return Images(name, source, tuple(found), tuple(images), (lossless,) * len(images))


def _ratings(columns: Mapping[str, int], name: str, paths: tuple[Path, ...]) -> Events:
    """Read who rated whom, -10 to 10; the label tells whether the rating is positive."""
    found = read_events(paths[0], **columns)
    with _read.guarded(paths[0]):
        if found.weight is None or found.weight[0] != np.rint(found.weight[0]):
            raise ValueError("no column of ratings")
        label = (found.weight > 0).astype(np.int64)
    return replace(found, label=label, classes=("distrust", "trust"), name=name)


def _messages(name: str, paths: tuple[Path, ...]) -> Events:
    return replace(read_events(paths[0], source=0, target=1, time=2), name=name)


def _sklearn_digits(name: str) -> Labelled:
    """Read the 8 x 8 digits; the last 360 of the set's own order are for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = np.rint(raw.images * (255 / 16)).astype(np.uint8)
    labels = raw.target.astype(np.int64)
    return Labelled(
        name, "scikit-learn", _DIGITS, images[:-360], labels[:-360], images[-360:], labels[-360:]
    )


# The pictures that lie inside the installed packages, so that nothing is ever downloaded for them.
_COLOR = (
    ("skimage.data", "astronaut.png"),
    ("skimage.data", "chelsea.png"),
    ("skimage.data", "coffee.png"),
    ("skimage.data", "ihc.png"),
    ("skimage.data", "motorcycle_left.png"),
    ("skimage.data", "hubble_deep_field.jpg"),
    ("skimage.data", "retina.jpg"),
    ("skimage.data", "rocket.jpg"),
    ("sklearn.datasets.images", "china.jpg"),
    ("sklearn.datasets.images", "flower.jpg"),
)
_GRAY = (
    ("skimage.data", "brick.png"),
    ("skimage.data", "camera.png"),
    ("skimage.data", "cell.png"),
    ("skimage.data", "coins.png"),
    ("skimage.data", "grass.png"),
    ("skimage.data", "gravel.png"),
    ("skimage.data", "moon.png"),
)


def _photographs(gray: bool, name: str) -> Images:
    """Read the bundled colour photographs; ``gray``: the grey ones, then the others' luma."""
    members = _GRAY + _COLOR if gray else _COLOR
    found = [(f, resources.files(package).joinpath(f)) for package, f in members]
    # A later version of a package may bring fewer of them.
    found = [(file, content) for file, content in found if content.is_file()]
    if not found:
        raise RequestError(
            "The installed scikit-image brings no photographs: install scikit-image 0.24 or newer."
        )
    mode = "L" if gray else "RGB"
    images = tuple(_read.image(content.read_bytes(), mode) for _, content in found)
    stems = tuple(Path(file).stem for file, _ in found)
    lossless = tuple(file.endswith(".png") for file, _ in found)
    return Images(name, "scikit-image and scikit-learn", stems, images, lossless)


_MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
_FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
_SETS: dict[str, _Set] = {
    "digits": _Set("1,797 handwritten digits, 8x8 grey", bundled=_sklearn_digits),
    "photographs": _Set("photographs in colour", bundled=partial(_photographs, False)),
    "photographs_gray": _Set("photographs in grey", bundled=partial(_photographs, True)),
    "mnist": _Set(
        "70,000 handwritten digits, 28x28 grey",
        "mnist",
        (
            _Copy(("mnist.npz",), partial(_mnist_npz, _DIGITS)),
            _Copy(
                _IDX_FILES,
                partial(_mnist_idx, _DIGITS),
                (
                    "http://yann.lecun.com/exdb/mnist/",
                    "https://ossci-datasets.s3.amazonaws.com/mnist/",
                ),
                dict(zip(_IDX_FILES, _MNIST_MD5, strict=True)),
            ),
        ),
    ),
    "fashion_mnist": _Set(
        "70,000 articles of clothing, 28x28 grey",
        "fashion_mnist",
        (
            _Copy(("fashion_mnist.npz", "original_order.npz"), partial(_mnist_npz, _FASHION)),
            _Copy(
                _IDX_FILES,
                partial(_mnist_idx, _FASHION),
                ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
                dict(zip(_IDX_FILES, _FASHION_MD5, strict=True)),
            ),
        ),
    ),
    "cifar10": _Set(
        "60,000 pictures of ten things, 32x32 colour",
        "cifar10",
        (
            _Copy(
                ("cifar-10-binary.tar.gz",),
                partial(_cifar, "original pixels", _read.cifar_binary),
                ("https://www.cs.toronto.edu/~kriz/",),
                {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
            ),
            _Copy(("cifar10_jpeg.npz",), partial(_cifar, "JPEG-75 copy", _read.cifar_jpeg)),
        ),
    ),
    "images_train": _Set(
        "Train400: 400 grey crops 180x180 of Berkeley images",
        "images_train",
        (_Copy(("train400_gray.zip",), partial(_zipped, "from JPEG-95 sources", False)),),
    ),
    "images_train_color": _Set(
        "200 Berkeley images in colour",
        "images_train",
        (_Copy(("bsds500_train_color.zip",), partial(_zipped, "JPEG-95 files", False)),),
    ),
    "images_test": _Set(
        "53 test images: Set5, Set14, classic5, LIVE1",
        "images_test",
        (
            _Copy(
                ("set5.zip", "set14.zip", "classic5.zip", "live1.zip"),
                partial(_zipped, "lossless", True),
            ),
        ),
    ),
}
# SNAP's own files have no header and another order of columns than the copies that have one.
_SNAP = {"source": 0, "target": 1, "weight": 2, "time": 3}
for _name, _file, _content in (
    ("bitcoin_otc", "bitcoinotc", "35,592 ratings, who trusts whom on Bitcoin OTC"),
    ("bitcoin_alpha", "bitcoinalpha", "24,186 ratings, who trusts whom on Bitcoin Alpha"),
):
    _SETS[_name] = _Set(
        _content,
        "dynamic_graphs",
        tuple(
            _Copy((file,), partial(_ratings, _SNAP))
            for file in (
                f"{_name}.csv.gz",
                f"soc-sign-{_file}.csv.gz",
                f"soc-sign-{_file}.csv",
            )
        ),
    )
_SETS["uci_messages"] = _Set(
    "59,835 messages between 1,899 students",
    "dynamic_graphs",
    tuple(
        _Copy((file,), _messages)
        for file in ("collegemsg.txt.gz", "CollegeMsg.txt.gz", "CollegeMsg.txt")
    ),
)
for _name, _content in (
    ("classic5", "5 grey test images"),
    ("live1", "29 colour test images"),
    ("set5", "5 colour test images"),
    ("set14", "14 test images"),
):
    _copy = _Copy((f"{_name}.zip",), partial(_zipped, "lossless", True))
    _SETS[_name] = _Set(_content, "images_test", (_copy,))
