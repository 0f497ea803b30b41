"""What changes over a training: learning rates, and the refinement's step size, number of steps and
noise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from ebwm_scale.config import resolved
from ebwm_scale.config.rate_schedule import rate_schedule
from ebwm_scale.config.schema import Config, Points, ScheduleConfig
from ebwm_scale.refinement.noise import NoiseSource, Purpose


def learning_rate(config: Config, step: int) -> float:
    """The model's learning rate at optimizer step `step` (0-based)."""
    return resolved.peak_learning_rate(config.optimizer) * rate_schedule(config).factor(step)


@dataclass(frozen=True)
class RateChange:
    """The learning rate of one step under the configuration of a checkpoint, and under the one that
    goes on from it.

    Of several rates, the one that is raised most.
    """

    step: int
    before: float
    now: float
    whose: str = "learning rate"

    @classmethod
    def of(cls, before: Config, now: Config, step: int) -> RateChange:
        change = cls(step, learning_rate(before, step), learning_rate(now, step))
        if before.optimizer.name != "muon" or now.optimizer.name != "muon":
            return change
        muon_before, muon_now = (
            resolved.muon_learning_rate(config.optimizer) * rate_schedule(config).factor(step)
            for config in (before, now)
        )
        if muon_now * change.before <= change.now * muon_before:
            return change
        return cls(step, muon_before, muon_now, "Muon's learning rate")

    @property
    def changed(self) -> bool:
        return not math.isclose(self.before, self.now, rel_tol=1e-6)

    @property
    def raised(self) -> bool:
        """Whether it is worth asking: a hundredth more is what a few further steps do."""
        return self.now > 1.01 * self.before

    def describe(self) -> str:
        return (
            f"{self.whose} at step {self.step}: it was to be {self.before:.3e}, "
            f"is now {self.now:.3e}"
        )

    def refusal(self, before: Config, now: Config) -> str:
        """Why the run does not go on by itself, and what to do."""
        keep = []
        for section, keys in (
            ("optimizer", ("learning_rate", "muon_learning_rate")),
            ("schedule", ScheduleConfig.model_fields),
        ):
            for key in keys:
                old = getattr(getattr(before, section), key)
                new = getattr(getattr(now, section), key)
                if old != new:
                    keep.append(f"{section}.{key}={'null' if old is None else old}")
        times = self.now / self.before if self.before > 0 else math.inf
        ways = ["accept it with --accept-new-rate"]
        stable = rate_schedule(before).last_stable
        if stable is not None and stable < self.step:
            ways.append(f"go on from step {stable}, before the decay, with --extend")
        ways.append(f"keep the schedule with --set {' '.join(keep)}")
        return f"{self.describe()}, {times:.3g} times as much: {', or '.join(ways)}"


def describe_schedule_changes(before: Config, now: Config, step: int) -> list[str]:
    """A line for each schedule of the refinement whose value at `step` is another than it was to
    be: they run over train.max_steps.
    """
    lines = []
    for name in ("step_size", "num_steps", "noise"):
        values = []
        for config in (before, now):
            default = float(config.refinement.num_steps) if name == "num_steps" else 1.0
            points = getattr(config.refinement.schedule, name)
            values.append(interpolate(points, step / max(1, config.train.max_steps), default))
        if not math.isclose(*values, rel_tol=1e-6):
            lines.append(
                f"refinement.schedule.{name} at step {step}: it was to be {values[0]:.4g}, "
                f"is now {values[1]:.4g}"
            )
    return lines


def unusual_schedule(config: Config) -> list[str]:
    """A line for each way in which the learning rate does not do what a schedule is for."""
    schedule = rate_schedule(config)
    steps = config.train.max_steps
    reached = f"at {100 * schedule.factor(steps - 1):.3g} % of the peak learning rate"
    if schedule.warmup >= steps:
        ends_in_warmup = (
            f"{_key(config, 'warmup', schedule.warmup)} is not below train.max_steps {steps}: "
            f"the run ends in the warm-up, {reached}"
        )
        return [ends_in_warmup]
    end = 0 if schedule.decay_end is None else schedule.decay_end
    if end > steps and schedule.factor(steps - 1) > schedule.final_ratio + 0.01:
        ends_early = (
            f"{_key(config, 'decay', end)} is above train.max_steps {steps}: the run ends {reached}"
        )
        return [ends_early]
    return []


def _key(config: Config, part: str, steps: int) -> str:
    """A part of the schedule by its key and in steps, as it was given."""
    tokens = getattr(config.schedule, f"{part}_tokens")
    if tokens is None:
        return f"schedule.{part}_steps {steps}"
    return f"schedule.{part}_tokens {tokens} ({steps} steps)"


def interpolate(points: Points, progress: float, default: float) -> float:
    """The value at `progress` of straight lines through (progress, value) points; flat outside,
    `default` without points.
    """
    if not points:
        return default
    if progress <= points[0][0]:
        return points[0][1]
    for (start, low), (end, high) in itertools.pairwise(points):
        if progress <= end:
            return low + (high - low) * (progress - start) / (end - start) if end > start else high
    return points[-1][1]


@dataclass(frozen=True)
class RefinementPoint:
    """The refinement of one training step."""

    num_steps: int
    step_size_scale: float
    noise_scale: float


def refinement_point(config: Config, step: int, source: NoiseSource) -> RefinementPoint:
    """The schedules at optimizer step `step`; a number of steps that is random is drawn once for
    the whole global batch.
    """
    refinement = config.refinement
    schedule = refinement.schedule
    progress = step / max(1, config.train.max_steps)
    scheduled = round(interpolate(schedule.num_steps, progress, refinement.num_steps))
    most = min(refinement.num_steps, scheduled)
    least = min(resolved.min_num_steps(refinement), most)
    num_steps = most
    if least < most:
        num_steps = source.integer(least, most, purpose=Purpose.NUM_STEPS)
    return RefinementPoint(
        num_steps=num_steps,
        step_size_scale=interpolate(schedule.step_size, progress, 1.0),
        noise_scale=interpolate(schedule.noise, progress, 1.0),
    )
