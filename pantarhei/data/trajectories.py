r"""Trajectories on grids: one array format, readers of what users have, windows for training.

The format, in HDF5 (``.h5``, ``.hdf5``), Zarr (a folder ``.zarr``) and ``.npz`` alike:

=============  ======================  ============================================================
``states``     (case, time, C, *space)  floating point; a series of sensors has no space axes
``parameters`` (case, P)               what distinguishes the cases (optional)
``mask``       (1 or case, *space)     1 where there is fluid, 0 in an obstacle (optional)
``lengths``    (case,)                 valid frames of each case, where they differ (optional)
``meta``       JSON, UTF-8             an attribute of the HDF5 file or the Zarr group, an array of
                                       bytes in ``.npz``
=============  ======================  ============================================================

``meta`` has ``format`` ("pantarhei-trajectories"), ``version`` (1), ``dt``, ``channels``,
``units``, ``spacing`` (of the grid, one number per space axis), ``parameter_names``, ``name`` and
``settings`` (of the solver). A folder of such files that agree in these is one set, its cases in
the order of the files' names. Time steps are uniform. States are read by slices, so that a set may
be larger than memory: HDF5 and Zarr through h5py and zarr (``pip install 'pantarhei[fields]'``),
``.npz`` by mapping the file.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pantarhei.data import _hdf5, _zarr
from pantarhei.data._read import DAMAGE, MOST_AT_ONCE, guarded, member, needed, npy_header, whole
from pantarhei.errors import RequestError
from pantarhei.files import atomic

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.floating[Any]]
Read = Callable[[int, int, int], Array]
"""``read(case, start, stop)`` returns frames (stop - start, C, *space)."""

FORMAT, VERSION = "pantarhei-trajectories", 1
_HDF5 = (".h5", ".hdf5", ".hdf")
_WRITTEN = ".npz, .h5, .hdf5 or .zarr"


@dataclass(frozen=True, eq=False)
class Trajectories:
    """A set of trajectories, read when asked for.

    ``shape`` is (case, time, C, *space), ``dt`` the time between frames, ``spacing`` the grid's,
    ``parameters`` (case, P), ``mask`` (1 or case, *space), ``lengths`` (case,) the valid frames.

    >>> data = Trajectories.of(np.zeros((4, 10, 2, 8, 8)), channels=("u", "v"), dt=0.1)
    >>> data.shape, data.frames(3, 2, 5).shape, data.channels
    ((4, 10, 2, 8, 8), (3, 2, 8, 8), ('u', 'v'))
    """

    shape: tuple[int, ...]
    read: Read
    channels: tuple[str, ...]
    dt: float = 1.0
    units: tuple[str, ...] = ()
    spacing: tuple[float, ...] = ()
    parameters: Array | None = None
    parameter_names: tuple[str, ...] = ()
    mask: NDArray[np.bool_] | None = None
    lengths: NDArray[np.int64] | None = None
    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        cases, frames, channels, *space = self._checked_shape()
        for what, got, wanted in (
            ("channel names", len(self.channels), (channels,)),
            ("units", len(self.units), (0, channels)),
            ("numbers in spacing", len(self.spacing), (0, len(space))),
            ("rows of parameters", cases if self.parameters is None else len(self.parameters),
             (cases,)),
            ("parameter names", len(self.parameter_names),
             (0 if self.parameters is None else self.parameters.shape[1],)),
            ("masks", 1 if self.mask is None else len(self.mask), (1, cases)),
            ("lengths", cases if self.lengths is None else len(self.lengths), (cases,)),
        ):  # fmt: skip
            if got not in wanted:
                raise RequestError(
                    f"Trajectories of shape {self.shape} come with {wanted[-1]} {what}, not {got}."
                )
        if self.mask is not None and self.mask.shape[1:] != tuple(space):
            raise RequestError(
                f"A mask of shape {self.mask.shape} does not fit the grid {tuple(space)}."
            )
        if not (math.isfinite(self.dt) and self.dt > 0):
            raise RequestError(f"dt={self.dt}: the time between frames is positive.")
        if self.parameters is not None and not np.isfinite(self.parameters).all():
            raise RequestError("The parameters hold a value that is not finite: repair it.")
        if self.lengths is not None and not (
            (self.lengths >= 1).all() and (self.lengths <= frames).all()
        ):
            raise RequestError(f"Lengths are between 1 and the {frames} frames that there are.")

    def _checked_shape(self) -> tuple[int, ...]:
        if len(self.shape) < 3 or 0 in self.shape:
            raise RequestError(
                f"Trajectories are (case, time, channel, *space), and none of these is empty; "
                f"these have shape {self.shape}."
            )
        return self.shape

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def of(
        cls,
        states: ArrayLike | Sequence[ArrayLike],
        *,
        channels: Sequence[str] = (),
        dt: float | None = None,
        times: ArrayLike | None = None,
        parameters: ArrayLike | None = None,
        parameter_names: Sequence[str] = (),
        mask: ArrayLike | None = None,
        units: Sequence[str] = (),
        spacing: Sequence[float] = (),
        name: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> Trajectories:
        """Make a set of arrays in memory: one (case, time, C, *space), or a list of (time, ...).

        In the list cases may differ in length. ``times`` instead of ``dt`` must be uniform. Names
        are made up where they are not given; one parameter may be (case,).

        Raises :class:`RequestError` for values that are not finite, times that are not uniform or
        do not ascend, and shapes that do not fit.
        """
        arrays, lengths = _ragged(states)
        table = None if parameters is None else np.asarray(parameters, float)
        table = table[:, None] if table is not None and table.ndim == 1 else table
        made = cls(
            shape=arrays.shape,
            read=lambda case, start, stop: arrays[case, start:stop],
            channels=tuple(channels) or tuple(f"c{i}" for i in range(_channels(arrays.shape))),
            dt=uniform(times) if times is not None else 1.0 if dt is None else float(dt),
            parameters=table,
            parameter_names=tuple(parameter_names)
            or tuple(f"p{i}" for i in range(0 if table is None else table.shape[1])),
            mask=None if mask is None else _masks(np.asarray(mask), arrays.ndim - 3),
            lengths=lengths,
            units=tuple(units),
            spacing=tuple(spacing),
            name=name,
            settings=settings or {},
        )
        for case in range(len(made)):
            made.frames(case)
        return made

    def length(self, case: int) -> int:
        """Return the number of valid frames of a case."""
        return self.shape[1] if self.lengths is None else int(self.lengths[case])

    def frames(self, case: int, start: int = 0, stop: int | None = None) -> Array:
        """Return frames (stop - start, C, *space) of one case; what is not finite is refused."""
        length = self.length(case)
        stop = length if stop is None else stop
        if not (0 <= case < len(self) and 0 <= start < stop <= length):
            raise RequestError(
                f"Case {case} of {len(self)} has {length} frames: {start} to {stop} are not there."
            )
        try:
            found = self.read(case, start, stop)
        except DAMAGE as error:  # that opening did not meet
            reason = " ".join(str(error).split())[:200]
            raise RequestError(
                f"Frames {start} to {stop} of case {case} of '{self.name}' cannot be read "
                f"({reason}): get the file again, or leave the case out."
            ) from error
        if not np.isfinite(found).all():
            bad = int(np.argwhere(~np.isfinite(found).reshape(len(found), -1).all(1))[0, 0])
            raise RequestError(
                f"Frame {start + bad} of case {case} of '{self.name}' holds a "
                "value that is not finite: leave the case out, or repair it."
            )
        return found

    def tensor(
        self,
        cases: Sequence[int] | NDArray[np.integer[Any]] | None = None,
        start: int = 0,
        stop: int | None = None,
        *,
        repeat_last: bool = False,
    ) -> Tensor:
        """Return (n, stop - start, C, *space) in float32, whole in memory.

        A case that is shorter is refused, or continued by its last frame (``repeat_last``).
        """
        import torch

        stop = self.shape[1] if stop is None else stop
        chosen = range(len(self)) if cases is None else [int(c) for c in cases]
        out = np.empty((len(chosen), stop - start, *self.shape[2:]), np.float32)
        for row, case in enumerate(chosen):
            end = min(stop, self.length(case)) if repeat_last else stop
            found = self.frames(case, start, end)
            out[row, : len(found)] = found
            out[row, len(found) :] = found[-1]
        return torch.from_numpy(out)

    def masks(self) -> NDArray[np.bool_]:
        """Return the mask of each case, (case, *space); all ones where there is none."""
        if self.mask is None:
            return np.ones((len(self), *self.shape[3:]), bool)
        return np.broadcast_to(self.mask, (len(self), *self.mask.shape[1:]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set to ``path``, ``.npz``, ``.h5``, ``.hdf5`` or ``.zarr``, whole or not."""
        target = Path(path)
        if target.suffix not in (".npz", ".zarr", *_HDF5):
            raise RequestError(f"'{path}': trajectories are written to {_WRITTEN}.")
        if target.exists():
            raise RequestError(f"'{path}' is there already: name a new one.")
        parts = {"parameters": self.parameters, "mask": self.mask, "lengths": self.lengths}
        arrays = {name: part for name, part in parts.items() if part is not None}
        if target.suffix == ".zarr":
            needed("zarr", "Zarr", "fields")
            cases = (self._padded(case) for case in range(len(self)))
            with atomic(target, folder=True) as temporary:
                _zarr.write(temporary, self._meta(), arrays, self.shape, cases)
            return
        h5py = _hdf5.library() if target.suffix in _HDF5 else None
        with atomic(target) as temporary:
            if h5py is None:
                self._write_npz(temporary, arrays)
            else:
                with h5py.File(temporary, "w") as file:
                    file.attrs["meta"] = json.dumps(self._meta())
                    first = self._padded(0)
                    chunks = (1, 1, *self.shape[2:])
                    states = file.create_dataset("states", self.shape, first.dtype, chunks=chunks)
                    for case in range(len(self)):
                        states[case] = self._padded(case)
                    for name, part in arrays.items():
                        file.create_dataset(name, data=part)

    def _write_npz(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write what ``np.savez`` would, one case after another."""
        meta = np.frombuffer(json.dumps(self._meta()).encode(), np.uint8)
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in {"meta": meta, **arrays}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, part, allow_pickle=False)
            with archive.open("states.npy", "w", force_zip64=True) as member:
                first = self._padded(0)
                header = np.lib.format.header_data_from_array_1_0(first)
                header |= {"shape": self.shape, "fortran_order": False}
                np.lib.format.write_array_header_1_0(member, header)
                for case in range(len(self)):
                    found = self._padded(case) if case else first
                    member.write(np.ascontiguousarray(found, first.dtype).tobytes())

    def _padded(self, case: int) -> Array:
        found = self.frames(case)
        missing = self.shape[1] - len(found)
        return np.concatenate([found, found[-1:].repeat(missing, 0)]) if missing else found

    def _meta(self) -> dict[str, Any]:
        keys = ("dt", "channels", "units", "spacing", "parameter_names", "name", "settings")
        return {"format": FORMAT, "version": VERSION} | {key: getattr(self, key) for key in keys}


def concatenate(sets: Sequence[Trajectories]) -> Trajectories:
    """Join sets of the same channels, grid and time step into one, still read when asked for.

    >>> one = Trajectories.of(np.zeros((2, 3, 1, 4)))
    >>> concatenate([one, one]).shape
    (4, 3, 1, 4)
    """
    if not sets:
        raise RequestError("There is no set of trajectories to join: name one or more.")
    first, frames = sets[0], max(s.shape[1] for s in sets)
    for other in sets:
        same = other.shape[2:] == first.shape[2:] and other.channels == first.channels
        if not same or not math.isclose(other.dt, first.dt, rel_tol=1e-6):
            raise RequestError(
                f"Sets that are joined agree in channels, grid and time step, but "
                f"{first.channels} on {first.shape[3:]} at dt {first.dt:g} stands beside "
                f"{other.channels} on {other.shape[3:]} at dt {other.dt:g}."
            )
    ends = list(accumulate(len(s) for s in sets))

    def read(case: int, start: int, stop: int) -> Array:
        which = bisect_right(ends, case)
        return sets[which].read(case - (ends[which - 1] if which else 0), start, stop)

    def joined(name: str, whole: Callable[[Trajectories], Any]) -> Any:
        parts = [getattr(s, name) for s in sets]
        return None if all(p is None for p in parts) else np.concatenate([whole(s) for s in sets])

    shared = first.mask is not None and all(
        s.mask is not None and len(s.mask) == 1 and np.array_equal(s.mask, first.mask) for s in sets
    )
    return replace(
        first,
        shape=(ends[-1], frames, *first.shape[2:]),
        read=read,
        parameters=joined("parameters", lambda s: s.parameters),
        mask=first.mask if shared else joined("mask", Trajectories.masks),
        lengths=None
        if all(s.lengths is None and s.shape[1] == frames for s in sets)
        else np.array([s.length(case) for s in sets for case in range(len(s))], np.int64),
    )


def open_trajectories(path: str | os.PathLike[str]) -> Trajectories:
    """Open a set by what is found at ``path``; states are read later, by slices.

    A file or Zarr group in the format above, a folder of such, an HDF5 file of PDEArena or
    PDEBench, a Zarr group of PDEArena, or a folder of CFDBench cases. A damaged, foreign or
    missing one raises :class:`RequestError`.
    """
    from pantarhei.data import layouts

    place = Path(path)
    if place.is_dir() and not _zarr.is_group(place):
        kinds = (".npz", ".zarr", *_HDF5)
        inside = [p for p in place.iterdir() if p.suffix in kinds and not p.name.startswith(".")]
        if inside:
            return concatenate([open_trajectories(file) for file in sorted(inside)])
        if any(place.glob("**/case.json")):
            return layouts.cfdbench(place)
        raise RequestError(f"'{path}' holds no {_WRITTEN}: name another folder.")
    if not place.exists():
        raise RequestError(f"'{path}' does not exist: check the path.")
    data = _open(place)

    def read(case: int, start: int, stop: int) -> Array:
        try:
            return data.read(case, start, stop)
        except DAMAGE as error:  # which file of a folder it was
            raise ValueError(f"'{place}': {error}") from error

    return replace(data, read=read)


def _open(place: Path) -> Trajectories:
    from pantarhei.data import layouts

    if place.is_dir():
        return _open_zarr(place)
    if place.suffix == ".npz" and place.is_file():
        return _open_npz(place)
    with guarded(place):
        file = _hdf5.opened(place)
        if "meta" in file.attrs:
            return _open_hdf5(place, file)
        groups = [mode for mode in ("train", "valid", "test") if _hdf5.holds(file, mode)]
        if groups:
            return layouts.read_pdearena(place, _hdf5.member(file, groups[0]))
        return layouts.read_pdebench(place, file)


def _channels(shape: tuple[int, ...]) -> int:
    return shape[2] if len(shape) > 2 else 0


def _ragged(states: Any) -> tuple[Array, NDArray[np.int64] | None]:
    """Return (case, time, ...) and, for a list of cases of different lengths, the lengths."""
    listed = isinstance(states, Sequence) and len(states) and hasattr(states[0], "shape")
    cases = [np.asarray(s) for s in states] if listed else []
    if len({len(s) for s in cases if s.ndim}) <= 1:
        arrays, lengths = np.asarray(states if not listed else np.stack(cases)), None
    else:
        if len({s.shape[1:] for s in cases}) != 1:
            shapes = sorted({s.shape[1:] for s in cases})
            raise RequestError(f"All cases have the same channels and grid, not {shapes}.")
        lengths = np.array([len(s) for s in cases], np.int64)
        arrays = np.stack(
            [np.concatenate([s, s[-1:].repeat(lengths.max() - len(s), 0)]) for s in cases]
        )
    if arrays.dtype.kind not in "fiu":
        raise RequestError(f"States are numbers, not {arrays.dtype}.")
    return arrays if arrays.dtype.kind == "f" else arrays.astype(np.float64), lengths


def uniform(times: ArrayLike) -> float:
    """Return the time step of times that ascend uniformly."""
    t = np.asarray(times, np.float64)
    steps = np.diff(t)
    if t.ndim != 1 or len(t) < 2 or not np.isfinite(t).all() or not (steps > 0).all():
        raise RequestError("Times ascend, are finite, and there are two or more of them.")
    if np.abs(steps - steps.mean()).max() > 1e-3 * steps.mean():
        raise RequestError(
            f"The time steps are not uniform ({steps.min():g} to {steps.max():g}): interpolate the "
            "states to uniform times first."
        )
    return float(steps.mean())


def _masks(mask: NDArray[Any], space: int) -> NDArray[np.bool_]:
    return (mask[None] if mask.ndim == space else mask).astype(bool)


def _described(meta: Any) -> dict[str, Any]:
    """Return the fields that ``meta`` holds, checked; text, or what it stands for."""
    found = json.loads(meta) if isinstance(meta, str | bytes) else meta
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("its meta does not say that these are trajectories")
    if found.get("version") != VERSION:
        raise ValueError(f"version {found.get('version')!r} of the format is not known here")
    names = ("channels", "units", "parameter_names")
    return {
        "dt": float(found["dt"]),
        "name": str(found.get("name", "")),
        "settings": dict(found.get("settings", {})),
        "spacing": tuple(map(float, found.get("spacing", ()))),
        **{key: tuple(map(str, found.get(key, ()))) for key in names},
    }


def _assembled(arrays: Mapping[str, Any], meta: dict[str, Any]) -> Trajectories:
    states = arrays["states"]
    if states.dtype.kind != "f":
        raise ValueError(f"states are {states.dtype}")
    kinds = {"parameters": np.float64, "mask": np.bool_, "lengths": np.int64}
    parts: dict[str, Any] = {
        name: whole(arrays[name], name).astype(kind)
        for name, kind in kinds.items()
        if name in arrays
    }
    if "parameters" in parts and parts["parameters"].ndim != 2:
        raise ValueError("parameters are not (case, P)")
    return Trajectories(
        shape=tuple(states.shape),
        read=lambda case, start, stop: np.asarray(states[case, start:stop]),
        **parts,
        **meta,
    )


_ARRAYS = ("states", "parameters", "mask", "lengths")


def _open_npz(path: Path) -> Trajectories:
    with guarded(path):
        names = ("meta", *_ARRAYS)
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in names if f"{name}.npy" in archive.namelist()]
        if not {"states", "meta"} <= set(inside):
            raise ValueError("no states and meta inside")
        arrays = {name: _mapped(path, name) for name in inside}
        return _assembled(arrays, _described(arrays["meta"].astype(np.uint8).tobytes()))


def _mapped(path: Path, name: str) -> NDArray[Any]:
    """Map an array of a ``.npz`` where it is stored as it is; unpack one that is compressed."""
    with zipfile.ZipFile(path) as archive:
        about = archive.getinfo(f"{name}.npy")
        if about.compress_type != zipfile.ZIP_STORED:
            if about.file_size > MOST_AT_ONCE:
                raise ValueError(f"'{name}' is compressed and too large: save it uncompressed")
            return member(archive, name)
        with archive.open(about) as stream:
            shape, fortran, dtype = npy_header(stream, name, about.file_size)
            begin = stream.tell()
    with path.open("rb") as file:  # the local header's own lengths say where the member begins
        file.seek(about.header_offset + 26)
        before, extra = np.frombuffer(file.read(4), "<u2").tolist()
    offset = about.header_offset + 30 + before + extra + begin
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _open_hdf5(path: Path, file: Any) -> Trajectories:
    held = [name for name in _ARRAYS if _hdf5.holds(file, name)]
    arrays = {name: _hdf5.dataset(file, name) for name in held}
    return _assembled(arrays, _described(file.attrs["meta"]))


def _open_zarr(path: Path) -> Trajectories:
    from pantarhei.data import layouts

    with guarded(path):
        group = _zarr.Group(path)
        if "meta" not in group.attributes:
            return layouts.read_pdearena_zarr(path, group)
        arrays = {name: group[name] for name in _ARRAYS if name in group}
        return _assembled(arrays, _described(group.attributes["meta"]))
