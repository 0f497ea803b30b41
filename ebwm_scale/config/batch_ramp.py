"""Batches that grow during a run (train.batch_ramp).

    batch_ramp: [[100, 32], [200, 64]], global_batch_size: 128

    step        0 .. 99     100 .. 299     300 ..
    sequences   32          64             128
    samples     0 .. 3199   3200 .. 15999  16000 ..     of the order of data, without a gap

So which samples a step holds is a pure function of its number, and a run's place in its data is
its step, as without a ramp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ebwm_scale.config.schema import TrainConfig


@dataclass(frozen=True)
class BatchRamp:
    """pieces: (steps, sequences per step), one after the other; final: of all later steps."""

    pieces: tuple[tuple[int, int], ...]
    final: int

    @classmethod
    def of(cls, train: TrainConfig) -> BatchRamp:
        return cls(train.batch_ramp, train.global_batch_size)

    @property
    def sizes(self) -> list[int]:
        """Every number of sequences that a step may have."""
        return [size for _, size in self.pieces] + [self.final]

    def size(self, step: int) -> int:
        """Sequences of step `step` (0-based)."""
        for steps, size in self.pieces:
            if step < steps:
                return size
            step -= steps
        return self.final

    def samples_before(self, step: int) -> int:
        """Sequences of all steps in front of step `step`."""
        total = 0
        for steps, size in self.pieces:
            taken = min(step, steps)
            total += taken * size
            step -= taken
        return total + step * self.final

    def steps_for(self, samples: int) -> int:
        """The fewest steps with at least so many sequences."""
        made = 0
        for steps, size in self.pieces:
            if samples <= steps * size:
                return made + math.ceil(samples / size)
            samples -= steps * size
            made += steps
        return made + math.ceil(max(0, samples) / self.final)

    def steps_of_sizes(self, num_steps: int) -> list[int]:
        """How many of the first steps have each of `sizes`."""
        counts = []
        left = num_steps
        for steps, _ in self.pieces:
            counts.append(min(left, steps))
            left -= counts[-1]
        return [*counts, left]

    def describe(self) -> str:
        """ "32 (100 steps), 64 (200 steps), 128", for a person."""
        parts = [f"{size:,} ({steps:,} steps)" for steps, size in self.pieces]
        return ", ".join([*parts, f"{self.final:,}"])
