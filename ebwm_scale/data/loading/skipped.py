"""Samples that a run leaves out of its order of data, after its loss has spiked.

    position in the order    0 . . . . [a . . b) . . . [c . d) . . .
    n-th sample trained on   0 1 2 3 4          5 6 7         8 9

So which samples a step holds is a pure function of its number and of this list, and the list is
saved. Ranges are whole batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) of positions, rising and apart from each other."""


def merged(ranges: Iterable[Sequence[int]]) -> Ranges:
    """The same positions in rising ranges that do not touch."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        elif start < stop:
            result.append((start, stop))
    return tuple(result)


def position_of(number: int, skipped: Ranges) -> int:
    """Where in the order the number-th sample stands that is trained on."""
    position = number
    for start, stop in skipped:
        if start > position:
            break
        position += stop - start
    return position


def positions_of(first: int, count: int, skipped: Ranges) -> np.ndarray:
    """`position_of` first .. first + count - 1, (count,) int64."""
    if not skipped:
        return np.arange(first, first + count, dtype=np.int64)
    return np.array([position_of(n, skipped) for n in range(first, first + count)], np.int64)
