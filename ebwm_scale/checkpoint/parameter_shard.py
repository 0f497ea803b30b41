"""What a checkpoint asks of a running model, and what it gets: parameters in shards, whatever
trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENTUM = "momentum_buffer"  # of Muon's matrices, in place of the two moments
AVERAGE = "ema"  # of the weights, where train.ema or schedule-free AdamW keeps it
SEQUENCE = "z"  # of schedule-free AdamW, whose average x is kept as AVERAGE
OF_WEIGHTS = (AVERAGE, SEQUENCE)  # kinds that begin as the weights, and not as zeros
KINDS = ("weight", *MOMENTS, MOMENTUM, *OF_WEIGHTS)  # of numbers that a shard has


@dataclass(frozen=True)
class ParameterShard:
    """Numbers start .. start + n - 1 of the flattened parameter.

    values: kind -> (n,), views of what training works on.
    """

    name: str
    start: int
    values: dict[str, Tensor]


class TrainingState(Protocol):
    """A model in training, of which a checkpoint is written, and into which one is read."""

    module: nn.Module

    def shards(self) -> Iterator[ParameterShard]:
        """What this process owns: weights and moments; over all processes each exactly once."""
        ...

    def step_count(self) -> float:
        """Updates the optimizer has made, the same for all parameters; without skipped ones."""
        ...

    def load(self, read: Callable[[str, str], Tensor], step_count: float) -> None:
        """Take over all parameters, moments and averages: read(name, kind) -> the whole flattened
        float32 tensor.
        """
        ...
