"""Spaces of Gymnasium as columns: actions as amounts or as ids, observations by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import shorten


class ActionSpace:
    """How actions of a space become rows: floats of a Box as they are, others as ids from 0 on.

    space: Box, Discrete, MultiDiscrete or MultiBinary. Raises DataError for others.
    """

    def __init__(self, space: Any, where: str):
        self.space = space
        self.kind = type(space).__name__
        if self.kind == "Discrete":
            self.num_values = int(space.n)
            self.start: Any = int(space.start)
        elif self.kind == "MultiDiscrete":
            self.num_values = int(np.max(space.nvec))
            self.start = np.asarray(getattr(space, "start", 0)).reshape(-1)
        elif self.kind == "MultiBinary":
            self.num_values, self.start = 2, 0
        elif self.kind == "Box":
            self.num_values, self.start = 0, 0
        else:
            raise DataError(
                f"{where} are of {shorten(space, 80)}: read are Box, Discrete, MultiDiscrete and "
                "MultiBinary"
            )

    def ids(self, actions: Any, where: str) -> tuple[np.ndarray, int]:
        """(rows (T, width), number of values or 0) of T actions."""
        rows = np.asarray(actions)
        if rows.dtype.kind not in "biuf":
            raise DataError(f"{where}: action is {rows.dtype}: expected numbers")
        rows = rows.reshape(len(rows), -1)
        if self.num_values == 0:
            return (rows if rows.dtype.kind == "f" else rows.astype(np.float64)), 0
        return rows.astype(np.int64) - self.start, self.num_values
