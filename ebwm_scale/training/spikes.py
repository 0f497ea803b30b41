"""Loss spikes: found as they happen, undone by going back, and kept from coming again.

    loss of a step > mean + train.spike_deviations * deviation      of the train.spike_window losses
                                                                    of the steps before

Then the run goes back to its newest checkpoint from before the last train.spike_skip_steps steps,
and leaves their samples out of the order of data (data/loading/skipped.py), at most
train.max_rollbacks times. A spike is not added to the losses that others are held against.

Everything here follows from losses that are the same on all ranks, and is a part of checkpoints. So
a run that is killed after it went back, and resumed, meets the same spike and does the same.
Source: skipping the batches around a spike is PaLM's way, arXiv 2204.02311, section 5.1.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ebwm_scale.config.schema import TrainConfig
from ebwm_scale.core.errors import CheckpointError
from ebwm_scale.data.loading.skipped import Ranges, merged

SMALLEST_SHARE = 1e-3  # of the mean: a curve that is flat to rounding has no spikes


@dataclass(frozen=True)
class Spike:
    """A loss, and what the losses before it were."""

    loss: float
    mean: float
    deviation: float

    def describe(self) -> str:
        return (
            f"its loss {self.loss:.4g} is {(self.loss - self.mean) / self.deviation:.3g} "
            f"deviations above {self.mean:.4g}, the mean of the losses before it"
        )


class SpikeWatch:
    """Of one run. skipped: what it leaves out of its data. rollbacks: how often it went back."""

    def __init__(self, train: TrainConfig):
        self.limit = train.spike_deviations
        self.losses: deque[float] = deque(maxlen=train.spike_window)
        self.skipped: Ranges = ()
        self.rollbacks = 0

    @property
    def is_on(self) -> bool:
        return self.limit is not None

    def judge(self, loss: float) -> Spike | None:
        """Whether a step's loss, the mean over all ranks, is a spike; else it is remembered."""
        if self.limit is None or not math.isfinite(loss):
            return None
        if len(self.losses) == self.losses.maxlen:
            mean = statistics.fmean(self.losses)
            deviation = max(statistics.pstdev(self.losses), SMALLEST_SHARE * abs(mean))
            if loss > mean + self.limit * deviation:
                return Spike(loss, mean, deviation)
        self.losses.append(loss)
        return None

    def skip(self, start: int, stop: int) -> None:
        """Leave positions of the data's order out from now on."""
        self.skipped = merged([*self.skipped, (start, stop)])

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "skipped": [list(part) for part in self.skipped],
            "rollbacks": self.rollbacks,
        }

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Of a checkpoint; {} of one from before there were any. CheckpointError if damaged."""
        try:
            losses = [float(loss) for loss in values.get("losses", ())]
            self.skipped = merged(values.get("skipped", ()))
            self.rollbacks = int(values.get("rollbacks", 0))
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's list of skipped samples is damaged ({type(error).__name__}: "
                f"{error}); resume from an earlier checkpoint"
            ) from None
        self.losses.clear()
        self.losses.extend(losses)

    def go_back(self, values: Mapping[str, Any]) -> None:
        """Take the losses of an earlier checkpoint, and keep what was learned since."""
        skipped, rollbacks = self.skipped, self.rollbacks
        self.load_state_dict(values)
        self.skipped = merged([*self.skipped, *skipped])
        self.rollbacks = rollbacks
