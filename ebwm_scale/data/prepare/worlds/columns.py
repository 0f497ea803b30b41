"""A source's columns -> the steps between its frames: which row belongs to which step, and what may
stand there.

    frames    o_0  o_1  o_2 ... o_T     T + 1 frames, T steps: step t leads from o_t to o_(t+1)

    rows      T         row t is step t                                        (Minari, our records)
              T + 1     row t is what stands at frame t; the last one leads nowhere, and is left out
                        (LeRobot, stable-worldmodel)
              T + 1,    row 0 is missing: NaN, or the lowest integer, which NaN is cast to. Then
              shifted   a_t stands at t + 1, beside the frame that it led to, so row 0 is left out
                        (what stands beside a reset: TD-MPC2, rewards of stable-worldmodel)

With T + 1 rows a last row may be missing, as stable-worldmodel has it. A missing row anywhere else
is refused. Where a column cannot be NaN, the user says that it is shifted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.conditions import MAX_VALUES, MAX_WIDTH

_DISCRETE = "biu"  # numpy's kinds: booleans and integers


@dataclass(frozen=True)
class RawEpisode:
    """An episode as its source has it.

    frames: (T + 1, height, width[, colours]) of any image type. columns: of the wanted names, T or
    T + 1 rows each. num_values: of discrete columns, where the source knows it.
    """

    name: str
    frames: np.ndarray
    columns: Mapping[str, np.ndarray]
    num_values: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ColumnConfig:
    """How columns become steps.

    shifted: names whose row t + 1 belongs to step t. continuous: names of integers that are
    numbers, and no ids.
    """

    conditions: tuple[str, ...] = ("action",)
    shifted: tuple[str, ...] = ()
    continuous: tuple[str, ...] = ()


def steps_of(
    values: np.ndarray, name: str, num_frames: int, where: str, *, shifted: bool
) -> tuple[np.ndarray, bool]:
    """(the rows of the T = num_frames - 1 steps, whether they were shifted in the source).

    where: the episode, for messages. Raises DataError for rows that are missing or too many.
    """
    num_steps = num_frames - 1
    if values.ndim == 0 or len(values) not in (num_steps, num_frames):
        rows = 0 if values.ndim == 0 else len(values)
        raise DataError(
            f"{where}: {name} has {rows} rows for {num_frames} frames: expected one for each of "
            f"the {num_steps} steps between them, or for each frame"
        )
    if values.dtype.kind not in _DISCRETE + "f":
        raise DataError(f"{where}: {name} is {values.dtype}: expected numbers")
    rows = values.reshape(len(values), -1)
    if not 1 <= rows.shape[1] <= MAX_WIDTH:
        raise DataError(f"{where}: {name} has {rows.shape[1]} numbers a step: expected 1 or more")
    if len(rows) == num_frames:
        missing = _missing(rows)
        shifted = shifted or bool(missing[0])
        rows = rows[1:] if shifted else rows[:-1]
    elif shifted:
        raise DataError(
            f"{where}: {name} has {len(rows)} rows for {num_frames} frames: only a column with a "
            f"row for each frame can be shifted; leave {name} out of --shifted"
        )
    _refuse_missing(rows, name, where, int(shifted))
    return rows, shifted


def _missing(rows: np.ndarray) -> np.ndarray:
    """Which rows hold nothing."""
    if rows.dtype.kind == "f":
        return np.asarray(np.isnan(rows).all(axis=1))
    if rows.dtype.kind == "i":
        return np.asarray((rows == np.iinfo(rows.dtype).min).all(axis=1))
    return np.zeros(len(rows), bool)


def _refuse_missing(rows: np.ndarray, name: str, where: str, first: int) -> None:
    """DataError for a number that is none; first: how many rows of the source stand before."""
    if rows.dtype.kind == "f":
        wrong = ~np.isfinite(rows)
    else:
        wrong = np.repeat(_missing(rows)[:, None], rows.shape[1], axis=1)
    if wrong.any():
        step, column = np.argwhere(wrong)[0].tolist()
        raise DataError(
            f"{where}, step {step}: {name} is {rows[step, column]} in column {column} (row "
            f"{step + first} of the source): expected a number; only the row beside the first or "
            "the last frame may be missing, as a whole"
        )


@dataclass(frozen=True)
class Kind:
    """What a condition is, over all episodes. num_values: 0 for a continuous one."""

    is_discrete: bool
    width: int
    num_values: int


def kind_of(rows: np.ndarray, name: str, where: str, config: ColumnConfig, known: int) -> Kind:
    """The kind of an episode's rows (T, width). known: its number of values, 0 where nobody says.

    Integers are discrete. Raises DataError for ids out of range.
    """
    width = rows.shape[1]
    if rows.dtype.kind == "f" or name in config.continuous:
        return Kind(False, width, 0)
    if rows.dtype.kind == "b":
        known = 2
    lowest, highest = min(rows.min().item(), 0), int(rows.max())
    if lowest < 0 or highest >= (known or MAX_VALUES):
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"{where}: {name} is the integer {wrong}: values of a discrete condition are from 0 to "
            f"{(known or MAX_VALUES) - 1}; if they are amounts, name it with --continuous"
        )
    return Kind(True, width, known or highest + 1)


def common_kind(name: str, kinds: Sequence[tuple[str, Kind]]) -> Kind:
    """The kind of all episodes; DataError for one of another width or type. kinds: with the name of
    the episode.
    """
    first_where, first = kinds[0]
    for where, kind in kinds[1:]:
        if kind.width != first.width:
            raise DataError(
                f"{where}: {name} has {kind.width} numbers a step, {first_where} has "
                f"{first.width}: all episodes of a dataset have one width; leave the others out, "
                f"or name another column with --map {name}=KEY"
            )
        if kind.is_discrete != first.is_discrete:
            raise DataError(
                f"{where}: {name} holds {_word(kind)}, {first_where} {_word(first)}; name it with "
                "--continuous to take all as amounts"
            )
    return Kind(first.is_discrete, first.width, max(kind.num_values for _, kind in kinds))


def _word(kind: Kind) -> str:
    return "integers" if kind.is_discrete else "fractions"


def stored(rows: np.ndarray, kind: Kind, name: str, where: str) -> np.ndarray:
    """Rows as a sample stores them: uint32 ids or float32 numbers."""
    if kind.is_discrete:
        return rows.astype("<u4")
    with np.errstate(over="ignore"):
        numbers = rows.astype("<f4")
    if not np.isfinite(numbers).all():
        step = int(np.argwhere(~np.isfinite(numbers))[0, 0])
        raise DataError(f"{where}, step {step}: {name} is beyond what 32 bits hold")
    return numbers


def outcome(rows: np.ndarray, name: str, where: str) -> np.ndarray:
    """The rows (T, 1) of a reward or an end as a sample stores them, (T,)."""
    if rows.shape[1] != 1:
        raise DataError(f"{where}: {name} has {rows.shape[1]} numbers a step: expected 1")
    if name == "reward":
        return stored(rows[:, 0], Kind(False, 1, 0), name, where)
    flags = rows[:, 0]
    if not np.isin(flags, (0, 1)).all():
        raise DataError(f"{where}: {name} holds {flags.max()}: expected 0 or 1")
    return flags.astype(np.uint8)
