"""What changes over a training: learning rates, and the refinement's step size, number of steps and noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Config, Points, ScheduleConfig
from ..refinement.noise import NoiseSource, Purpose


def learning_rate_factor(step: int, schedule: ScheduleConfig) -> float:
    """Factor on the peak at optimizer step `step` (0-based): linear warm-up, then a cosine to final_ratio."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    progress = min(
        1.0, (step - schedule.warmup_steps) / max(1, schedule.decay_steps - schedule.warmup_steps)
    )
    return schedule.final_ratio + (1 - schedule.final_ratio) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def interpolate(points: Points, progress: float, default: float) -> float:
    """The value at `progress` of straight lines through (progress, value) points; flat outside, `default` without points."""
    if not points:
        return default
    if progress <= points[0][0]:
        return points[0][1]
    for (start, low), (end, high) in zip(points, points[1:]):
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
    """The schedules at optimizer step `step`; a number of steps that is random is drawn once for the whole global batch."""
    rules, progress = config.refinement, step / max(1, config.train.max_steps)
    most = min(
        rules.num_steps, round(interpolate(rules.schedule.num_steps, progress, rules.num_steps))
    )
    least = min(rules.min_num_steps, most)
    return RefinementPoint(
        num_steps=most if least == most else source.integer(least, most, purpose=Purpose.NUM_STEPS),
        step_size_scale=interpolate(rules.schedule.step_size, progress, 1.0),
        noise_scale=interpolate(rules.schedule.noise, progress, 1.0),
    )
