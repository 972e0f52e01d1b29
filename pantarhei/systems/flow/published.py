"""CFDBench's data as its published loaders saw them, faults included, for an honest re-measurement.

Nothing here is the default. The models' and the test's own faults are switches where they belong:
``published=True`` (:mod:`.point_models`), ``sees_mask=False`` (:class:`.FNO`),
``constants="published"`` (:class:`.Surrogate`), ``off_by_one=True`` (:func:`.multi_step`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pantarhei.data.simulate.flow.liquid import BOX
from pantarhei.data.trajectories import Trajectories
from pantarhei.systems.flow.surrogate import columns_of


def as_published(data: Trajectories) -> Trajectories:
    """Return ``data`` with the faults of the published loader for its problem, by its name.

    - ``dam``: the obstacle is in no mask, and height and width are the outer box's, the same for
      every case, so that geometry is invisible at the first frame;
    - ``cylinder``: the mask's circle lies where the corner's coordinates say, not the centre's,
      that is the distances from inlet and wall too far to the right and up;
    - other problems are returned as they are.

    The states stay as they are.
    """
    if data.parameters is None or data.name not in ("dam", "cylinder"):
        return data
    table = data.parameters.copy()
    if data.name == "dam":
        table[:, columns_of(data, ["height", "width"])] = BOX
        return replace(data, parameters=table, mask=np.ones((len(data), *data.shape[3:]), bool))
    columns = columns_of(data, ["center_x", "center_y", "radius", "dx", "dy"])
    cx, cy, radius, dx, dy = (table[:, c, None, None] for c in columns)
    rows, width = data.shape[3:]
    x, y = (np.arange(width) + 0.5) * dx, (np.arange(rows)[:, None] + 0.5) * dy
    return replace(data, mask=np.hypot(x - 2 * cx, y - 2 * cy) > radius)


def until_steady(data: Trajectories, threshold: float = 1e-3) -> Trajectories:
    """End each case at the first frame whose mean change of speed from the last is below threshold.

    CFDBench trains on what comes before (not for the dam). The threshold is in m/s per frame, so
    that the number of frames depends on the units: a slow case ends at once. Two frames stay.

    >>> import numpy as np
    >>> still = Trajectories.of(np.zeros((1, 9, 2, 4, 4)), channels=("u", "v"))
    >>> until_steady(still).length(0)
    2
    """
    lengths = []
    for case in range(len(data)):
        speed = np.hypot(*np.moveaxis(data.frames(case)[:, :2], 1, 0))
        change = np.abs(np.diff(speed, axis=0)).mean((1, 2))
        steady = np.flatnonzero(change < threshold)
        lengths.append(max(2, int(steady[0]) + 1) if len(steady) else len(speed))
    return replace(data, lengths=np.array(lengths, np.int64))
