"""Writing whole sets of simulations: in shards, resumable, the same on every machine."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pantarhei.data.recordings import write_recording
from pantarhei.data.simulate import Simulator
from pantarhei.data.simulate.combustor import Combustor
from pantarhei.errors import RequestError, nearest
from pantarhei.files import read_json, write_json
from pantarhei.progress import progress
from pantarhei.runs import parse_setting

SIMULATORS = {
    "translation": "pantarhei.data.simulate.translation:Translation",
    "smoke": "pantarhei.data.simulate.smoke:Smoke",
    "shallow-water": "pantarhei.data.simulate.shallow_water:ShallowWater",
    "compressible": "pantarhei.data.simulate.compressible:Compressible",
    "cavity": "pantarhei.data.simulate.flow.simulators:Cavity",
    "cylinder": "pantarhei.data.simulate.flow.simulators:Cylinder",
    "tube": "pantarhei.data.simulate.flow.simulators:Tube",
    "dam": "pantarhei.data.simulate.flow.simulators:Dam",
    "combustor": "pantarhei.data.simulate.combustor:Combustor",
}
"""Where each simulator lies; a new one is a line here."""


def simulator(name: str, changes: Mapping[str, Any] | None = None) -> Any:
    """Make a simulator by name, with its own settings but for ``changes`` (values may be text).

    >>> simulator("smoke", {"size": "32"}).size
    32
    """
    if name not in SIMULATORS:
        raise RequestError(
            f"Unknown simulator '{name}': choose one of {', '.join(SIMULATORS)}."
            f"{nearest(name, SIMULATORS)}"
        )
    module, _, kind = SIMULATORS[name].partition(":")
    made = getattr(importlib.import_module(module), kind)
    defaults: dict[str, Any] = {f.name: f.default for f in fields(made)}
    settings = {}
    for key, value in (changes or {}).items():
        if key not in defaults:
            raise RequestError(
                f"'{name}' has no setting '{key}': choose one of {', '.join(defaults)}."
                f"{nearest(key, defaults)}"
            )
        settings[key] = parse_setting(key, value, defaults[key])
    return made(**settings)


def write(
    simulation: Simulator | Combustor,
    folder: str | os.PathLike[str],
    cases: int,
    *,
    shard: int = 64,
    seed: int = 0,
    device: str = "cpu",
    suffix: str = ".npz",
    quiet: bool = False,
) -> list[Path]:
    """Simulate ``cases`` cases into ``folder``, ``shard`` of them a file; return the files.

    A file appears whole or not at all, so that a killed call that is made again goes on with those
    that are missing; one with other settings, another seed or another number of cases is refused.
    :func:`pantarhei.data.trajectories.open_trajectories` opens the folder as one set. Recordings
    of sensors are a file each, ``.npz`` alone, and simulated ``shard`` together;
    :func:`pantarhei.data.recordings.read_recordings` reads them.

    Raises :class:`RequestError` for a folder that holds something else, and for wrong numbers.
    """
    if cases < 1 or shard < 1 or seed < 0:
        raise RequestError(
            f"cases={cases}, shard={shard}, seed={seed}: simulate 1 case or more, 1 or more a "
            "file, from a seed that is not negative."
        )
    if suffix not in (".npz", ".h5", ".zarr"):
        raise RequestError(f"Trajectories are written as .npz, .h5 or .zarr, not '{suffix}'.")
    if isinstance(simulation, Combustor) and suffix != ".npz":
        raise RequestError(f"Recordings are written as .npz, not '{suffix}'.")
    place = Path(folder)
    settings: Any = simulation
    config = {
        "simulator": f"{type(simulation).__module__}:{type(simulation).__qualname__}",
        "settings": asdict(settings),
        "seed": seed,
        "cases": cases,
        "shard": shard,
        "suffix": suffix,
    }
    _claim(place, config)
    files = []
    with progress(cases, "simulating", quiet) as bar:
        for first in range(0, cases, shard):
            chosen = range(first, min(first + shard, cases))
            if isinstance(simulation, Combustor):
                files += _write_runs(simulation, place, chosen, seed)
            else:
                files.append(place / f"cases-{first:06d}{suffix}")
                if not files[-1].exists():
                    simulation.simulate(chosen, seed, device).save(files[-1])
            bar.advance(len(chosen))
    return files


def _write_runs(simulation: Combustor, place: Path, chosen: range, seed: int) -> list[Path]:
    files = [place / f"run-{case:06d}.npz" for case in chosen]
    missing = [file for file in files if not file.exists()]
    if missing:
        for file, recording in zip(files, simulation.simulate(chosen, seed), strict=True):
            if file in missing:
                write_recording(recording, file)
    return files


def _claim(place: Path, config: dict[str, Any]) -> None:
    """Take a folder that is new, or that was begun for the same set."""
    about = place / "simulation.json"
    if place.exists() and not place.is_dir():
        raise RequestError(f"'{place}' is a file: name a folder.")
    if about.exists():
        before = read_json(about)
        if before != config:
            different = [
                k for k in config if not isinstance(before, dict) or before.get(k) != config[k]
            ]
            raise RequestError(
                f"'{place}' was begun with other {', '.join(different)}: name another folder."
            )
        return
    if place.exists() and any(not p.name.startswith(".tmp-") for p in place.iterdir()):
        raise RequestError(f"'{place}' holds other files: name a new folder.")
    write_json(about, config)
