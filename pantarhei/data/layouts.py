"""Trajectories in the layouts of PDEArena, PDEBench and CFDBench, opened as they lie.

Nothing is converted: states are read by slices when asked for. What the files say about themselves
(time step, spacing, parameters) is kept; what they do not say stays at its default.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pantarhei.data import _zarr
from pantarhei.data._hdf5 import dataset, holds, member, opened
from pantarhei.data._read import guarded, whole
from pantarhei.data.trajectories import (
    Array,
    Read,
    Trajectories,
    concatenate,
    uniform,
)
from pantarhei.errors import RequestError


def pdearena(paths: Sequence[str | os.PathLike[str]], mode: str = "train") -> Trajectories:
    """Open PDEArena's Navier-Stokes HDF5 files: ``u``, ``vx``, ``vy`` (case, time, H, W).

    They lie in a group ``mode`` (train, valid or test); ``buo_y`` becomes a parameter and ``dt``
    the time step where they are there.
    """
    sets = []
    for path in paths:
        with guarded(Path(path)):
            sets.append(read_pdearena(Path(path), member(opened(Path(path)), mode)))
    return concatenate(sets)


def pdearena_zarr(path: str | os.PathLike[str], first: int = 0, every: int = 1) -> Trajectories:
    """Open PDEArena's shallow water, a Zarr group: ``pres``, ``u``, ``v``, as xarray writes it.

    pres is (case, time, H, W), u and v have an axis of one level before the last two; channels in
    this order. Of the frames each ``every``-th is seen, from ``first`` on (SineNet's: 4 and 8, two
    days). dt is in the units of the stored ``time``, which ``settings`` name; 1 without.
    """
    with guarded(Path(path)):
        return read_pdearena_zarr(Path(path), _zarr.Group(Path(path)), first, every)


def pdebench(path: str | os.PathLike[str]) -> Trajectories:
    """Open a PDEBench HDF5 file, of any of its three layouts.

    Compressible flow: ``density``, ``pressure``, ``Vx``, ``Vy``, ``Vz``, each (case, time, *space);
    one-dimensional equations: ``tensor`` (case, time, x); diffusion-reaction and shallow water:
    groups ``0000``, ... with ``data`` (time, *space, channel). dt and spacing come from the stored
    coordinates.
    """
    with guarded(Path(path)):
        return read_pdebench(Path(path), opened(Path(path)))


def cfdbench(folder: str | os.PathLike[str]) -> Trajectories:
    """Open CFDBench cases: every folder below ``folder`` with ``u.npy``, ``v.npy``, ``case.json``.

    The arrays are (time, H, W) and are mapped, not read. The parameters are the numbers of
    ``case.json`` that all cases have, in alphabetical order. The files hold no time step: dt is 1.
    """
    places = sorted(p.parent for p in Path(folder).glob("**/case.json"))
    if not places:
        raise RequestError(f"'{folder}' holds no case.json: name a folder of CFDBench cases.")
    sets = []
    facts: list[dict[str, float]] = []
    for place in places:
        with guarded(place):
            if not all((place / name).is_file() for name in ("u.npy", "v.npy", "case.json")):
                raise ValueError("u.npy, v.npy or case.json is missing, or not a file")
            u, v = (np.load(place / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in "uv")
            if u.shape != v.shape or u.ndim != 3 or u.dtype.kind != "f":
                raise ValueError(f"u.npy is {u.dtype}{u.shape}, v.npy {v.dtype}{v.shape}")
            case = json.loads((place / "case.json").read_text("utf-8"))
            if not isinstance(case, dict):
                raise ValueError("case.json holds no names with numbers")
            facts.append({k: float(x) for k, x in case.items() if isinstance(x, int | float)})
        sets.append(
            Trajectories((1, len(u), 2, *u.shape[1:]), _stacked((u[None], v[None])), ("u", "v"))
        )
    names = sorted(set(facts[0]).intersection(*facts))
    values = np.array([[fact[name] for name in names] for fact in facts]) if names else None
    return replace(
        concatenate(sets),
        units=("m/s", "m/s"),
        parameters=values,
        parameter_names=tuple(names),
        name=Path(folder).name,
    )


def read_pdearena(path: Path, group: Any) -> Trajectories:
    """Read an open group ``train``, ``valid`` or ``test`` of PDEArena."""
    names = [name for name in ("u", "vx", "vy") if holds(group, name)]
    arrays = [dataset(group, name) for name in names]
    if not names or len({a.shape for a in arrays}) != 1 or arrays[0].ndim != 4:
        raise ValueError("no u, vx, vy of one shape (case, time, H, W)")
    cases, frames, *space = arrays[0].shape
    buoyancy = _numbers(group, "buo_y") if holds(group, "buo_y") else None
    dt = _numbers(group, "dt") if holds(group, "dt") else np.ones(1)
    if not np.allclose(dt, dt[0], rtol=1e-3):
        raise ValueError("its cases differ in their time step")
    spacing = [float(_numbers(group, name)[0]) for name in ("dx", "dy") if holds(group, name)]
    return Trajectories(
        (cases, frames, len(names), *space),
        _stacked(arrays),
        tuple({"u": "smoke"}.get(name, name) for name in names),
        dt=float(dt[0]),
        spacing=tuple(spacing) if len(spacing) == len(space) else (),
        parameters=None if buoyancy is None else buoyancy.astype(np.float64)[:, None],
        parameter_names=() if buoyancy is None else ("buoyancy",),
        name=path.name,
    )


def read_pdearena_zarr(
    path: Path, group: _zarr.Group, first: int = 0, every: int = 1
) -> Trajectories:
    """Read an open Zarr group of PDEArena."""
    if not all(name in group for name in ("pres", "u", "v")):
        raise ValueError("neither meta nor pres, u and v inside")
    arrays = [group[name] for name in ("pres", "u", "v")]
    cases, frames, *space = arrays[0].shape
    level = (cases, frames, 1, *space)
    if len(space) != 2 or any(a.shape != level for a in arrays[1:]):
        raise ValueError(f"pres is {arrays[0].shape}, u and v are {[a.shape for a in arrays[1:]]}")
    if any(a.dtype.kind != "f" or {"scale_factor", "add_offset"} & {*a.attrs} for a in arrays):
        raise ValueError("its numbers are packed: write them as floating point with xarray first")
    if not 0 <= first < frames or every < 1:
        raise RequestError(f"first={first}, every={every}: there are {frames} frames.")
    step, settings = 1.0, {}
    if "time" in group and (time := group["time"]).shape == (frames,):
        step, settings = uniform(whole(time, "time")), {"time": str(time.attrs.get("units", ""))}

    def read(case: int, start: int, stop: int) -> Array:
        seen = slice(first + start * every, first + (stop - 1) * every + 1, every)
        pressure, *velocity = (np.asarray(array[case, seen]) for array in arrays)
        return np.concatenate([pressure[:, None], *velocity], 1)

    return Trajectories(
        (cases, len(range(first, frames, every)), 3, *space),
        read,
        ("pres", "u", "v"),
        dt=step * every,
        name=path.name,
        settings=settings,
    )


def read_pdebench(path: Path, file: Any) -> Trajectories:
    """Read an open file in one of PDEBench's layouts."""
    numbered = sorted(key for key in file if key.isdecimal())
    if numbered:
        first = member(file, numbered[0])
        datasets = [dataset(member(file, key), "data", 1) for key in numbered]
        frames, *space, channels = datasets[0].shape
        if any(d.shape != datasets[0].shape for d in datasets):
            raise ValueError("its groups differ in shape")

        def last_axis_first(case: int, start: int, stop: int) -> Array:
            return np.moveaxis(datasets[case][start:stop], -1, 1)

        read: Read = last_axis_first
        names = tuple(f"u{i}" for i in range(channels))
        shape = (len(numbered), frames, channels, *space)
        axes = ("x", "y", "z")[: len(space)]
        where = member(first, "grid") if holds(first, "grid") else first
        coordinates = {axis: _numbers(where, axis) for axis in ("t", *axes) if holds(where, axis)}
    else:
        known = ("density", "pressure", "Vx", "Vy", "Vz", "tensor")
        names = tuple(name for name in known if holds(file, name))
        arrays = [dataset(file, name) for name in names]
        if not names or len({a.shape for a in arrays}) != 1 or arrays[0].ndim < 3:
            raise ValueError("none of the layouts of PDEArena and PDEBench")
        read = _stacked(arrays)
        cases, frames, *space = arrays[0].shape
        names = tuple("u" if name == "tensor" else name for name in names)
        shape = (cases, frames, len(names), *space)
        axes = ("x", "y", "z")[: len(space)]
        stored = {axis: f"{axis}-coordinate" for axis in ("t", *axes)}
        coordinates = {
            axis: _numbers(file, name) for axis, name in stored.items() if holds(file, name)
        }
    steps = {axis: uniform(values) for axis, values in coordinates.items()}
    return Trajectories(
        shape,
        read,
        names,
        dt=steps.get("t", 1.0),
        spacing=tuple(steps[a] for a in axes) if set(axes) <= set(steps) else (),
        name=path.name,
    )


def _numbers(group: Any, name: str) -> Array:
    """Return all of a small array of one axis, or a single number as one."""
    return whole(dataset(group, name), name).reshape(-1)


def _stacked(arrays: Sequence[Any]) -> Read:
    """Read one channel from each array of (case, time, *space)."""

    def read(case: int, start: int, stop: int) -> Array:
        return np.stack([np.asarray(array[case, start:stop]) for array in arrays], 1)

    return read
