"""The best evaluation so far, by checkpoint.best: {metric, mode}.

    step        100     200     300     400
    metric      3.1     2.9     3.0     2.8         mode min
    best        100     200     200     400         saved at once, `checkpoints/best` names it

What is best is a part of each checkpoint (trainer.json), so a resumed run goes on from the best of
the steps that it goes on from. Every rank has one; they agree, since rank 0's number is the one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ebwm_scale.config.schema import BestConfig
from ebwm_scale.core.world import World


class BestCheckpoint:
    """step, value: of the best evaluation; step None before the first, and without wanted.

    warn: one line.
    """

    def __init__(self, wanted: BestConfig | None, world: World, warn: Callable[[str], None]):
        self.wanted = wanted
        self.world = world
        self.warn = warn
        self.step: int | None = None
        self.value = math.nan
        self._is_missing = False

    def see(self, step: int, row: dict[str, Any], *, is_whole: bool) -> None:
        """Hear of a validation row. is_whole: all that is ever evaluated is in it."""
        if self.wanted is None:
            return
        value = self.world.broadcast_object(value_at(row, self.wanted.metric))
        if value is None:
            if is_whole and not self._is_missing:
                self._is_missing = True
                self.warn(
                    f"checkpoint.best.metric is {self.wanted.metric}, which this evaluation does "
                    f"not have: {', '.join(numbers_of(row))}"
                )
            return
        if math.isfinite(value) and (self.step is None or self._is_better(value)):
            self.step, self.value = step, value

    def state_dict(self) -> dict[str, Any] | None:
        """For trainer.json; None where nothing was asked for, or nothing evaluated yet."""
        if self.wanted is None or self.step is None:
            return None
        return {**self.wanted.model_dump(), "step": self.step, "value": self.value}

    def load_state_dict(self, saved: dict[str, Any] | None) -> None:
        """Go on from a checkpoint's, unless it is of another metric or mode: then nothing was best
        so far.
        """
        self.step, self.value = None, math.nan
        if self.wanted is None or saved is None:
            return
        if self.wanted.model_dump() == {key: saved.get(key) for key in ("metric", "mode")}:
            self.step, self.value = saved["step"], saved["value"]

    def _is_better(self, value: float) -> bool:
        assert self.wanted is not None, "see() has asked"
        return value < self.value if self.wanted.mode == "min" else value > self.value


def value_at(row: dict[str, Any], path: str) -> float | None:
    """A number of a nested row; None where there is none. A name of a metric may hold a /."""
    value: Any = row
    while path:
        if not isinstance(value, dict):
            return None
        if path in value:
            value, path = value[path], ""
        else:
            first, _, path = path.partition("/")
            if not path or first not in value:
                return None
            value = value[first]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


def numbers_of(row: dict[str, Any], prefix: str = "") -> list[str]:
    """Paths of all numbers of a nested row."""
    found = []
    for key, value in row.items():
        if isinstance(value, dict):
            found += numbers_of(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found.append(f"{prefix}{key}")
    return found
