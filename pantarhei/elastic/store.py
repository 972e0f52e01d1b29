"""A whole elastic network on disk: weights in safetensors, everything else in JSON, no pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pantarhei import files
from pantarhei.elastic.net import ElasticNet, Sized, elastic
from pantarhei.elastic.space import Choice
from pantarhei.errors import RequestError

FORMAT = 1
WEIGHTS, DESCRIPTION = "weights.safetensors", "elastic.json"


def save(net: ElasticNet, folder: str | os.PathLike[str]) -> None:
    """Write an elastic network to a folder: shared weights, exit heads, axes, BatchNorm statistics.

    The example inputs go along, so that :func:`load` needs only the model's code. The two files are
    replaced one after the other, the description last: a folder without one is no saved network.
    Raises :class:`RequestError` when the folder cannot be written, or when the example inputs hold
    something that JSON cannot.
    """
    tensors = {f"weights/{n}": t for n, t in net.tensors().items()}
    for number, (_, statistics) in enumerate(net.statistics.items()):
        tensors |= {f"statistics/{number}/{n}": t for n, t in statistics.items()}
    tensors |= {f"switched/{n}": p for n, p in net.switched.items()}
    leaves, _ = tree_flatten(net.example)
    tensors |= {f"example/{i}": v for i, v in enumerate(leaves) if isinstance(v, Tensor)}
    description = {
        "format": FORMAT,
        "model": type(net.model).__name__,
        "axes": {name: _plain(axis) for name, axis in net.axes.items()},
        "norm": net.norm,
        "rescale": net.rescale,
        "exits": list(net.exits),
        "statistics": [dict(choice) for choice in net.statistics],
        "example": _spell(net.example),
    }
    target = Path(folder)
    with files.atomic(target / WEIGHTS) as temporary:
        # Views of one storage (tied heads, transposed buffers) must not be written as such.
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, temporary)
    files.write_json(target / DESCRIPTION, description)


def load(
    folder: str | os.PathLike[str],
    model: nn.Module,
    heads: Sequence[nn.Module] | None = None,
) -> ElasticNet:
    """Read what :func:`save` wrote into a freshly built ``model`` of the same architecture.

    ``heads``: the exits' heads in their order, where they were not built by the library. The
    weights of ``model`` are overwritten. Raises :class:`RequestError` for a folder that is no saved
    network, a corrupt file, or a model that does not fit.

    >>> import tempfile
    >>> from pantarhei.elastic import elastic
    >>> build = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> net, folder = elastic(build(), torch.ones(1, 4), width=(0.5, 1.0)), tempfile.mkdtemp()
    >>> save(net, folder)
    >>> x, small = torch.randn(2, 4), Choice(width=0.5)
    >>> bool((load(folder, build())(x, small) == net(x, small)).all())
    True
    """
    source = Path(folder)
    description = files.read_json(source / DESCRIPTION)
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise RequestError(
            f"'{source / DESCRIPTION}' is not format {FORMAT} of a saved elastic network: "
            "save it again with this version."
        )
    tensors = _read(source / WEIGHTS)
    try:
        names = description["exits"]
        given = dict(zip(names, heads, strict=True)) if heads is not None else tuple(names)
        net = elastic(
            model,
            _unspell(description["example"], tensors),
            **{name: _axis(axis) for name, axis in description["axes"].items()},
            exits=given or None,
            norm=description["norm"],
            rescale=description["rescale"],
        )
        choices = [Choice(values) for values in description["statistics"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(
            f"'{source / DESCRIPTION}' is damaged ({type(error).__name__}: {error}): restore it or "
            "save the network again."
        ) from error
    _fill(net.tensors(), tensors, "weights/", type(model).__name__, source)
    _fill(dict(net.switched.items()), tensors, "switched/", type(model).__name__, source)
    for number, choice in enumerate(choices):
        head = f"statistics/{number}/"
        net.statistics[net.space.complete(choice)] = {
            name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)
        }
    return net


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise RequestError(f"'{path}' does not exist: check the folder.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(
            f"'{path}' is not a readable safetensors file ({error}): restore it or save again."
        ) from error


def _fill(
    places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], head: str, model: str, path: Path
) -> None:
    saved = {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}
    if saved.keys() != places.keys():
        odd = sorted(saved.keys() ^ places.keys())[0].removeprefix("model.")
        raise RequestError(
            f"The network saved in '{path}' and this {model} differ in '{odd}': build the model "
            "with the settings it was saved with."
        )
    for name, place in places.items():
        if saved[name].shape != place.shape:
            raise RequestError(
                f"'{name.removeprefix('model.')}' has shape {tuple(saved[name].shape)} in '{path}' "
                f"and {tuple(place.shape)} in this {model}: build it with the same settings."
            )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(saved[name])


def _plain(axis: Any) -> Any:
    if isinstance(axis, Sized):
        return {"sized": asdict(axis)}
    return {"ratios": axis} if isinstance(axis, Mapping) else axis


def _axis(plain: Any) -> Any:
    if isinstance(plain, dict):
        if "sized" in plain:
            return Sized(**plain["sized"])
        return plain["ratios"]
    return plain


def _spell(inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """Write example inputs as JSON; a tensor becomes its number in the weights file."""
    leaves, form = tree_flatten(inputs)
    values = [
        {"tensor": i} if isinstance(v, Tensor) else {"value": v} for i, v in enumerate(leaves)
    ]
    if not all("tensor" in v or isinstance(v["value"], str | int | float | None) for v in values):
        raise RequestError(
            "The example inputs hold something other than tensors, numbers and text: make the "
            "network elastic with plain inputs before saving it."
        )
    args, kwargs = tree_unflatten(values, form)
    return {"args": list(args), "kwargs": kwargs}


def _unspell(spelled: Any, tensors: Mapping[str, Tensor]) -> Any:
    def read(value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"tensor"}:
                return tensors[f"example/{value['tensor']}"]
            if value.keys() == {"value"}:
                return value["value"]
            return {k: read(v) for k, v in value.items()}
        return [read(v) for v in value] if isinstance(value, list) else value

    args, kwargs = read(spelled["args"]), read(spelled["kwargs"])
    if args and kwargs:
        raise RequestError("Saved example inputs mix arguments and keywords: save again.")
    return kwargs or tuple(args)
