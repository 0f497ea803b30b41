"""What a step of a world is conditioned on beside its frames: actions, proprioception, any vector.

A clip of F frames has F - 1 steps. A condition is a member of each sample beside its frames:

    NAME.npy    continuous: float32 (F - 1, width); discrete: uint32 (F - 1, width), each value
                below num_values. Row t belongs to frame t: the action taken there, which leads to
                frame t + 1, or what was sensed there.

What came of a step is kept beside, and is no condition, since it is not known beforehand:

    reward.npy      float32 (F - 1,)
    terminated.npy  uint8 (F - 1,): 1 where the episode ended in a terminal state at frame t + 1

The manifest lists conditions in order, with the statistics of the training steps, and outcomes by
name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

KINDS = ("continuous", "discrete")
OUTCOMES = ("reward", "terminated")  # what a manifest may list, in this order
MAX_WIDTH = 65_536
MAX_VALUES = 2**24
MAX_CONDITIONS = 64
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_TAKEN = ("frames", "clip", "tokens", "scored", "difficulty", *OUTCOMES)


@dataclass(frozen=True, eq=False)
class Condition:
    """One of a dataset's conditions.

    kind: of KINDS. width: numbers (continuous) or values (discrete, mostly 1) of a step.
    num_values: of a discrete one, 0 for the others; the same for all its columns. mean, std:
    float32 (width,) statistics of the training steps, of no columns for a discrete one.
    """

    name: str
    kind: str
    width: int
    num_values: int
    mean: np.ndarray
    std: np.ndarray

    @property
    def is_discrete(self) -> bool:
        return self.kind == "discrete"

    @property
    def field(self) -> str:
        """The member of a sample."""
        return f"{self.name}.npy"

    @property
    def dtype(self) -> str:
        """As stored, in numpy's words."""
        return "<u4" if self.is_discrete else "<f4"

    def describe(self) -> dict[str, Any]:
        """Its entry in a manifest."""
        if self.is_discrete:
            return {
                "name": self.name,
                "kind": self.kind,
                "width": self.width,
                "num_values": self.num_values,
            }
        return {
            "name": self.name,
            "kind": self.kind,
            "width": self.width,
            "mean": [float(f"{v:.7g}") for v in self.mean],
            "std": [float(f"{v:.7g}") for v in self.std],
        }

    def problem(self, values: np.ndarray) -> str | None:
        """What is wrong with stored values (steps, width), in words."""
        if self.is_discrete:
            highest = int(values.max(initial=0))
            if highest < self.num_values:
                return None
            return f"holds {highest}: must be below its {self.num_values} values"
        return None if np.isfinite(values).all() else "holds numbers that are not finite"


def read_conditions(entries: list[Any]) -> tuple[Condition, ...]:
    """The conditions that a manifest lists; ValueError names the entry, and says what it must be.

    Numbers of a continuous condition are finite, its std above 0.
    """
    if len(entries) > MAX_CONDITIONS:
        raise ValueError(f"lists {len(entries)}: at most {MAX_CONDITIONS}")
    conditions = tuple(_condition(entry, f"[{i}]") for i, entry in enumerate(entries))
    names = [condition.name for condition in conditions]
    if len(set(names)) < len(names):
        raise ValueError(f"names are {', '.join(names)}: each must be there once")
    return conditions


def name_problem(name: Any) -> str | None:
    """Why this cannot name a condition; None where it can."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return "expected small letters, digits and _, a letter first, at most 64"
    if name in _TAKEN:
        return f"is taken: none of {', '.join(_TAKEN)}"
    return None


def _condition(entry: Any, where: str) -> Condition:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no object")
    name: Any = entry.get("name")
    kind: Any = entry.get("kind")
    width: Any = entry.get("width")
    problem = name_problem(name)
    if problem is not None:
        raise ValueError(f"{where}.name: {problem}")
    if kind not in KINDS:
        raise ValueError(f"{where}.kind: expected one of {', '.join(KINDS)}")
    if not _is_whole(width, 1, MAX_WIDTH):
        raise ValueError(f"{where}.width: expected a whole number from 1 to {MAX_WIDTH}")
    if kind == "discrete":
        count: Any = entry.get("num_values")
        if not _is_whole(count, 1, MAX_VALUES):
            raise ValueError(f"{where}.num_values: expected a whole number from 1 to {MAX_VALUES}")
        nothing = np.zeros(0, np.float32)
        return Condition(name, kind, width, count, nothing, nothing)
    mean, std = (_numbers(entry.get(key), width, f"{where}.{key}") for key in ("mean", "std"))
    if not (std > 0).all():
        raise ValueError(f"{where}.std: expected numbers above 0")
    return Condition(name, kind, width, 0, mean, std)


def _is_whole(value: Any, lowest: int, highest: int) -> bool:
    return type(value) is int and lowest <= value <= highest


def _numbers(values: Any, width: int, where: str) -> np.ndarray:
    expected = f"{where}: expected {width} finite numbers"
    if not isinstance(values, list) or len(values) != width:
        raise ValueError(expected)
    if any(type(value) not in (int, float) for value in values):
        raise ValueError(expected)
    try:
        numbers = np.array(values, np.float64)
    except OverflowError:
        raise ValueError(expected) from None
    if not (np.abs(numbers) <= np.finfo(np.float32).max).all():
        raise ValueError(expected)
    return numbers.astype(np.float32)


def check_values(condition: Condition, values: np.ndarray) -> np.ndarray:
    """The values of a sample's member; ValueError for what may not stand there."""
    problem = condition.problem(values)
    if problem is not None:
        raise ValueError(f"{condition.field} {problem}")
    return values


def check_outcome(name: str, values: np.ndarray) -> np.ndarray:
    """The values of an outcome's member; ValueError for what may not stand there."""
    if name == "reward" and not np.isfinite(values).all():
        raise ValueError("reward.npy holds numbers that are not finite")
    if name == "terminated" and values.max(initial=0) > 1:
        raise ValueError(f"terminated.npy holds {values.max()}: expected 0 or 1")
    return values


def shorter(conditions: Mapping[str, np.ndarray], num_steps: int) -> dict[str, np.ndarray]:
    """The first steps of each condition."""
    return {name: values[:num_steps] for name, values in conditions.items()}
