"""Mixtures whose sources run out: which share each source has in which block, and from where on.

    blocks of MIX_LENGTH   0 ......... 11 | 12            | 13 ........ 40 | 41 ...
    web                    700 each       | 724           | 1024 each      | ...
    books, 3,700 samples   300 each       | 100, its last | none           | none

A source that has given its last sample is made up for by the others, in proportion to their
weights. The phases follow from weights and limits alone, so an order of them is a pure function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ebwm_scale.core.errors import ConfigError

MIX_LENGTH = 1024


@dataclass(frozen=True)
class Phase:
    """Blocks from `first` on in which each source has `counts` positions.

    starts: positions of each source before the phase.
    """

    first: int
    counts: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Phases:
    """num_positions: of the mixture before its sources are spent; None where one has no limit.

    Behind them the sources go on as if there were none: what is read ahead is never used.
    """

    phases: tuple[Phase, ...]
    num_positions: int | None

    def at(self, block: int) -> Phase:
        """The phase of a block."""
        found = self.phases[0]
        for phase in self.phases:
            if phase.first > block:
                break
            found = phase
        return found


def phases_of(weights: Sequence[float], limits: Sequence[int | None]) -> Phases:
    """limits: samples that each source may give in all; None: as many as are wanted."""
    # samples that are left of each source with a limit
    left = {k: limit for k, limit in enumerate(limits) if limit is not None}
    starts = [0] * len(weights)
    phases: list[Phase] = []
    block = 0
    while len(left) < len(weights) or sum(left.values()) >= MIX_LENGTH:
        counts = _counts(weights, left)
        phases.append(Phase(block, tuple(counts), tuple(starts)))
        giving = [k for k in left if counts[k]]
        if not giving:
            return Phases(tuple(phases), None)
        num_blocks = min(left[k] // counts[k] for k in giving)
        for k, count in enumerate(counts):
            starts[k] += num_blocks * count
        for k in left:
            left[k] -= num_blocks * counts[k]
        block += num_blocks
    phases.append(Phase(block, tuple(shares(weights)), tuple(starts)))
    return Phases(tuple(phases), block * MIX_LENGTH)


def _counts(weights: Sequence[float], left: dict[int, int]) -> list[int]:
    """Of one block: shares by weight, none above what its source has left."""
    counts = [0] * len(weights)
    fixed = [k for k, limit in left.items() if limit == 0]
    while True:
        free = [k for k in range(len(weights)) if k not in fixed]
        total = MIX_LENGTH - sum(counts[k] for k in fixed)
        for k, count in zip(free, shares([weights[k] for k in free], total)):
            counts[k] = count
        short = [k for k in free if k in left and left[k] < counts[k]]
        if not short:
            return counts
        for k in short:
            counts[k] = left[k]
        fixed += short


def shares(weights: Sequence[float], total: int = MIX_LENGTH) -> list[int]:
    """Positions of each source in a block of `total`: at least one, in proportion to the weights up
    to rounding (largest remainder); where there are fewer positions than sources, some have none.
    """
    if len(weights) > MIX_LENGTH:
        raise ConfigError(f"data.sources has {len(weights)} entries: at most {MIX_LENGTH}")
    lowest = 1 if len(weights) <= total else 0
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    counts = np.maximum(lowest, np.floor(exact)).astype(int)
    while counts.sum() < total:
        counts[np.argmax(exact - counts)] += 1
    while counts.sum() > total:  # many tiny sources were raised to one
        counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
    return counts.tolist()
