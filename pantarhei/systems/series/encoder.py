"""From windows to the numbers that a network sees: chosen, standardised, with marks for gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pantarhei.data.series import Layout, Scaler, Windows
from pantarhei.errors import RequestError, nearest


@dataclass(frozen=True)
class Encoder:
    """Turns past (B, history, F) and future (B, horizon, C) into inputs (B, D) of a network.

    The cells of the chosen sensors and controls, standardised; a missing one becomes 0, the mean of
    training. Behind them stands for each sensor the share of its cells that are missing: a sensor
    that drops out is marked. ``owners`` names for each input its sensor and its frame: 0 is the
    last one seen, -1 the one before, +1 the first to come; None for the share that is missing.
    """

    layout: Layout
    history: int
    horizon: int
    owners: tuple[tuple[str, int | None], ...]
    past: Tensor  # chosen cells of the flattened past and future
    future: Tensor
    mean: Tensor
    sd: Tensor
    share: Tensor  # (cells, groups)

    @classmethod
    def of(
        cls,
        layout: Layout,
        windows: Windows,
        groups: Sequence[str] | None = None,
        *,
        all_lags: bool = False,
    ) -> Encoder:
        """Take scales from training windows, and the cells of ``groups``: all unless named.

        ``all_lags`` shows every frame of every input, for networks that read a sequence.

        Raises :class:`RequestError` for a group that is not in the layout, and for no group.
        """
        controls = [f.group for f in layout.controls for _ in f.names]
        known = list(dict.fromkeys([*layout.groups, *controls]))
        chosen = known if groups is None else list(dict.fromkeys(groups))
        for name in chosen:
            if name not in known:
                raise RequestError(
                    f"There is no sensor '{name}': choose of {', '.join(known)}."
                    f"{nearest(name, known)}"
                )
        if not chosen:
            raise RequestError("A forecast needs one sensor or more to look at.")
        owner = np.empty(sum(len(f.names) for f in layout.inputs), object)
        for name, columns in layout.groups.items():
            owner[list(columns)] = name
        seen = layout.seen(windows.history) | all_lags
        back = [(name, i - windows.history + 1) for i in range(windows.history) for name in owner]
        ahead = [(name, i + 1) for i in range(windows.horizon) for name in controls]
        keep_back = np.array([n in chosen for n, _ in back], bool) & seen.ravel()
        keep_ahead = np.array([n in chosen for n, _ in ahead], bool)
        scales = [
            Scaler.of([getattr(frames, part) for frames in windows.frames])
            for part in ("inputs", "controls")
        ]
        past, future = (torch.from_numpy(np.flatnonzero(k)) for k in (keep_back, keep_ahead))
        mean, sd = (
            torch.cat(
                [
                    torch.from_numpy(np.tile(getattr(scale, part), repeat))[index]
                    for scale, repeat, index in zip(
                        scales, (windows.history, windows.horizon), (past, future), strict=True
                    )
                ]
            )
            for part in ("mean", "sd")
        )
        cells = [(*back, *ahead)[i] for i in np.flatnonzero(np.r_[keep_back, keep_ahead])]
        own = torch.tensor([[name == group for group in chosen] for name, _ in cells]).float()
        marks = tuple((group, None) for group in chosen)
        return cls(
            layout, windows.history, windows.horizon, (*cells, *marks), past, future, mean, sd,
            own / own.sum(0).clamp(min=1),
        )  # fmt: skip

    def __call__(self, past: Tensor, future: Tensor) -> Tensor:
        """Return the inputs (B, D) of windows."""
        cells = torch.cat([past.flatten(1)[:, self.past], future.flatten(1)[:, self.future]], 1)
        scaled = (cells - self.mean) / self.sd
        missing = torch.isnan(scaled)
        return torch.cat([scaled.nan_to_num(0.0), missing.float() @ self.share], 1)

    def __len__(self) -> int:
        return len(self.owners)
