"""The course of the learning rate, in optimizer steps: what the section `schedule` means.

    schedule = rate_schedule(config)
    schedule.factor(step)           on the peak, at optimizer step `step` (0-based)
    schedule.last_stable            wsd: the step whose checkpoint a longer run can go on from

Keys in tokens are turned into steps of global_batch_size * context_length positions (in a ramp of
its batches), rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ebwm_scale.config import resolved
from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.schema import Config
from ebwm_scale.config.sizes import DECAYING

# (share of the decay that is over) -> share of the way down that is left
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "one_minus_sqrt": lambda progress: 1 - math.sqrt(progress),
}


@dataclass(frozen=True)
class RateSchedule:
    """A linear warm-up over `warmup` steps, then the peak, and from `decay_start` to `decay_end`
    the way down to `final_ratio` along `shape`.

    decay_start, decay_end: None where the rate does not decay to an end (inverse_sqrt, constant).
    """

    kind: str
    warmup: int
    decay_start: int | None
    decay_end: int | None
    shape: str
    final_ratio: float

    def factor(self, step: int) -> float:
        """Factor on the peak at optimizer step `step` (0-based)."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.kind == "inverse_sqrt":
            # 1 at the warm-up's last step
            return max(self.final_ratio, math.sqrt(max(1, self.warmup) / (step + 1)))
        if self.decay_start is None or self.decay_end is None or step < self.decay_start:
            return 1.0
        decaying_steps = max(1, self.decay_end - self.decay_start)
        progress = min(1.0, (step - self.decay_start) / decaying_steps)
        return self.final_ratio + (1 - self.final_ratio) * SHAPES[self.shape](progress)

    @property
    def last_stable(self) -> int | None:
        """Of wsd: how many steps are made before the decay begins."""
        return self.decay_start if self.kind == "wsd" else None


def rate_schedule(config: Config) -> RateSchedule:
    """Raises ConfigError where a key in tokens needs a context length that is not known yet."""
    schedule = config.schedule
    warmup = _steps(config, "warmup")
    if schedule.kind not in DECAYING:
        return RateSchedule(schedule.kind, warmup, None, None, "linear", schedule.final_ratio)
    end = _steps(config, "decay")
    start = warmup
    shape = schedule.kind
    if schedule.kind == "wsd":
        start = max(warmup, end - _steps(config, "cooldown", default=max(1, end // 10)))
        shape = schedule.cooldown_shape
    return RateSchedule(schedule.kind, warmup, start, end, shape, schedule.final_ratio)


def is_known(config: Config) -> bool:
    """Whether rate_schedule(config) can be had: tokens need the data's context length."""
    schedule = config.schedule
    tokens = (schedule.warmup_tokens, schedule.decay_tokens, schedule.cooldown_tokens)
    return config.data.context_length is not None or tokens == (None, None, None)


def schedule_problems(config: Config) -> list[str]:
    """Every problem of the section `schedule`, one sentence each.

    Those that need the number of positions of a sample are found once it is known.
    """
    schedule = config.schedule
    problems = []
    for part in ("warmup", "decay", "cooldown"):
        steps, tokens = getattr(schedule, f"{part}_steps"), getattr(schedule, f"{part}_tokens")
        if steps is not None and tokens is not None:
            problems.append(
                f"schedule.{part}_steps is {steps} and schedule.{part}_tokens {tokens}: "
                "set one of the two to null"
            )
    unused = [] if schedule.kind == "wsd" else ["cooldown_steps", "cooldown_tokens"]
    if schedule.kind not in DECAYING:
        unused += ["decay_steps", "decay_tokens"]
    for key in unused:
        value = getattr(schedule, key)
        if value is not None:
            problems.append(
                f"schedule.{key} is {value} with schedule.kind {schedule.kind}, "
                "which does not read it: leave it out, or set it to null"
            )
    if schedule.cooldown_shape != "linear" and schedule.kind != "wsd":
        problems.append(
            f"schedule.cooldown_shape is {schedule.cooldown_shape} with schedule.kind "
            f"{schedule.kind}, which does not read it: leave it out, or use wsd"
        )
    if problems or not is_known(config):
        return problems
    return _problems_in_steps(config)


def _problems_in_steps(config: Config) -> list[str]:
    found = rate_schedule(config)
    if found.decay_end is None or found.warmup >= config.train.max_steps:
        return []
    if found.warmup > found.decay_end:
        too_late = (
            f"{_named(config, 'warmup')} is {found.warmup}: must be at most "
            f"{_named(config, 'decay')} {found.decay_end}, "
            "or the learning rate falls to its end at once after the warm-up"
        )
        return [too_late]
    if found.kind == "wsd":
        cooldown = _steps(config, "cooldown", default=max(1, found.decay_end // 10))
        if found.warmup + cooldown > found.decay_end:
            too_long = (
                f"{_named(config, 'cooldown')} is {cooldown}: with {_named(config, 'warmup')} "
                f"{found.warmup} in front of it, it must be at most "
                f"{found.decay_end - found.warmup} to end at {_named(config, 'decay')} "
                f"{found.decay_end}"
            )
            return [too_long]
    return []


def _named(config: Config, part: str) -> str:
    """The key that a part of the schedule comes from; one in tokens is counted in steps."""
    if getattr(config.schedule, f"{part}_tokens") is None:
        return f"schedule.{part}_steps"
    return f"schedule.{part}_tokens in steps"


def _steps(config: Config, part: str, *, default: int | None = None) -> int:
    """A part of the schedule in steps, from its key in steps or the one in tokens."""
    tokens = getattr(config.schedule, f"{part}_tokens")
    if tokens is not None:
        samples = math.ceil(tokens / resolved.context_length(config))
        return BatchRamp.of(config.train).steps_for(samples)
    steps = getattr(config.schedule, f"{part}_steps")
    if steps is None and default is not None:
        return default
    return resolved.known_after_loading(steps, f"schedule.{part}_steps")
