"""An exponential moving average of the weights, beside the training (train.ema).

    average <- d average + (1 - d) weights,   d = min(train.ema, (1 + n) / (10 + n))

after the n-th update, n counted from 0: the first weights are forgotten at once, whatever the
decay. Each process averages the float32 weights that it updates, so the average is partitioned as
they are. Skipped steps average nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """Of this process's part of the weights: parameter -> flat float32 numbers.

    decay: in (0, 1). updates: optimizer updates that were made, also before the average began.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.updates = 0
        self.values: dict[str, Tensor] = {}

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Start from these weights; they are copied."""
        self.values = {name: values.clone() for name, values in weights.items()}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after an update; the same parameters as at the begin."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names = list(self.values)
        torch._foreach_lerp_(
            [self.values[name] for name in names], [weights[name] for name in names], 1 - decay
        )
        self.updates += 1
