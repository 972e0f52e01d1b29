r"""A flow model in physical units: parameters standardised, velocities scaled, around any of them.

A :class:`Surrogate` holds what a model needs besides its weights (which parameters it sees, their
mean and scale, the unit of velocity) as buffers, so that a saved one answers as it did.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pantarhei.data.trajectories import Trajectories
from pantarhei.errors import RequestError, nearest
from pantarhei.systems import _saved
from pantarhei.systems.flow import model
from pantarhei.systems.parameters import ParameterScale


class Surrogate(nn.Module):
    """A flow model that takes and returns m/s, with the parameters as the trajectories hold them.

    ``step(field, parameters, mask)`` for autoregressive models, ``frame(t, parameters)`` for the
    others. A model of u alone leaves the other channels of a field as they are. :meth:`save` and
    :meth:`load` keep it in a folder of safetensors and JSON.

    Args:
        net: One of :mod:`pantarhei.systems.flow`, or yours with ``channels`` and ``step(field,
            omega, mask)`` or ``predict_frame(t, omega)``.
        columns: Which columns of the parameters it sees.
        scale: Standardises these.
        unit: m/s that are 1 to the model, or the column of a velocity that scales its own case.
    """

    unit: Tensor

    def __init__(
        self, net: Any, columns: Sequence[int], scale: ParameterScale, unit: float | int = 1.0
    ) -> None:
        super().__init__()
        self.net, self.scale, self.columns = net, scale, list(columns)
        self.unit_column = unit if isinstance(unit, int) else None
        self.register_buffer("unit", torch.tensor(1.0 if isinstance(unit, int) else unit))

    @classmethod
    def of(
        cls,
        net: Any,
        data: Trajectories,
        cases: Sequence[int],
        *,
        inputs: Sequence[str] | None = None,
        constants: Literal["fitted", "published"] = "fitted",
        fields: Literal["constant", "velocity", "none"] = "constant",
    ) -> Surrogate:
        """Fit the scales to the training ``cases`` of ``data``.

        ``inputs`` names the parameters the model sees (:func:`inputs_of` unless given; with
        ``fields="velocity"``, where each case is scaled by its own velocity, the dimensionless ones
        say all that is left). ``constants="published"`` and ``fields="none"`` are CFDBench's.
        """
        names = tuple(inputs) if inputs is not None else inputs_of(data)
        columns = columns_of(data, names)
        assert data.parameters is not None
        table = data.parameters[np.asarray(cases)][:, columns]
        published = constants == "published"
        scale = ParameterScale.published(names) if published else ParameterScale.of(table)
        unit: float | int = 1.0
        if fields == "velocity":
            unit = columns_of(data, ["velocity"])[0]
        elif fields == "constant":
            squares = [np.square(data.frames(int(c)), dtype=np.float64).mean() for c in cases]
            unit = float(np.sqrt(np.mean(squares))) or 1.0
        return cls(net, columns, scale, unit)

    @property
    def channels(self) -> int:
        """How many channels the model predicts: u, or u and v."""
        return int(self.net.channels)

    @property
    def steps_forward(self) -> bool:
        """Whether the model goes from frame to frame, rather than answering for a time."""
        return hasattr(self.net, "step")

    def step(self, field: Tensor, parameters: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the next frame (B, C, R, W); mask (B, R, W) or (B, 1, R, W)."""
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        unit, omega = self._unit(parameters, 4), self._omega(parameters)
        seen = field[:, : self.channels]
        out = self.net.step(seen / unit, omega, mask) * unit
        return out if seen.shape == field.shape else torch.cat([out, field[:, self.channels :]], 1)

    forward = step

    def step_at(
        self, field: Tensor, parameters: Tensor, points: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Return the next velocities (B, Q, channels) at points (Q, 2), of models that can."""
        unit = self._unit(parameters, 4)
        seen = field[:, : self.channels] / unit
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        found: Tensor = self.net.at(seen, self._omega(parameters), points, mask)
        return found * (unit if unit.dim() == 0 else unit[:, 0])

    def frame(self, t: Tensor, parameters: Tensor) -> Tensor:
        """Return frame t (B,) of each case, (B, channels, R, W)."""
        found: Tensor = self.net.predict_frame(t, self._omega(parameters))
        return found * self._unit(parameters, 4)

    def at(self, points: Tensor, t: Tensor, parameters: Tensor) -> Tensor:
        """Return velocities (B, Q, channels) at points (Q, 2) or (B, Q, 2) of frame t."""
        found: Tensor = self.net.predict(points, t, self._omega(parameters))
        return found * self._unit(parameters, 3)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write weights, scales and what the model is made of to a new folder."""
        about = {
            "model": getattr(self.net, "arguments", None),
            "columns": self.columns,
            "unit_column": self.unit_column,
        }
        _saved.save(_saved.new_folder(folder), "surrogate", self.state_dict(), about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], net: Any = None) -> Surrogate:
        """Read a saved surrogate, on the CPU and in evaluation mode.

        A net that :func:`pantarhei.systems.flow.model` did not make is given again, as ``net``.
        """

        def restore(about: dict[str, Any], tensors: dict[str, Tensor]) -> Surrogate:
            if net is None and about["model"] is None:
                raise RequestError(
                    f"'{folder}' was saved around a net that pantarhei.systems.flow.model did not "
                    "make: give it as net=."
                )
            columns = [int(column) for column in about["columns"]]
            unset = ParameterScale(torch.zeros(len(columns)), torch.ones(len(columns)))
            column = about["unit_column"]
            made = model(**about["model"]) if net is None else net
            found = cls(made, columns, unset, 1.0 if column is None else int(column))
            found.load_state_dict(tensors)
            return found.eval()

        return _saved.load(folder, "surrogate", restore)

    def _omega(self, parameters: Tensor) -> Tensor:
        out: Tensor = self.scale(parameters[:, self.columns])
        return out

    def _unit(self, parameters: Tensor, dims: int) -> Tensor:
        if self.unit_column is None:
            return self.unit
        return parameters[:, self.unit_column].view(-1, *(1,) * (dims - 1))


def inputs_of(data: Trajectories) -> tuple[str, ...]:
    """Return the problem's own parameters: those before its derived numbers and the grid's.

    Of a set from elsewhere, all.
    """
    derived = set(data.settings.get("derived", ())) | {"dx", "dy", "interval", "subset"}
    return tuple(name for name in data.parameter_names if name not in derived)


def columns_of(data: Trajectories, names: Sequence[str]) -> list[int]:
    """Return the columns of parameters by name; an unknown one raises :class:`RequestError`."""
    known = list(data.parameter_names)
    for name in names:
        if name not in known:
            raise RequestError(
                f"'{data.name}' has no parameter '{name}': choose among "
                f"{', '.join(known) or 'none'}.{nearest(name, known)}"
            )
    if not names:
        raise RequestError("A flow model sees one operating parameter or more: name them.")
    return [known.index(name) for name in names]
