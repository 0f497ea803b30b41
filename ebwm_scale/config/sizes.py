"""The published model sizes, and the defaults that depend on other keys."""

from __future__ import annotations

from ebwm_scale.config.schema import Config, ScheduleConfig

# (layers, width, heads); feed-forward width = width. Source: EBT, arXiv 2507.02092.
SIZES: dict[str, tuple[int, int, int]] = {
    "4xs": (2, 128, 2),
    "3xs": (4, 256, 4),
    "xxs": (6, 384, 6),
    "xs": (12, 384, 6),
    "small": (12, 768, 12),
    "medium": (24, 1024, 16),
    "large": (24, 1536, 16),
    "xl": (24, 2048, 32),
}
PEAK_LEARNING_RATES: dict[str, float] = {
    "4xs": 0.0024,
    "3xs": 0.0018,
    "xxs": 0.0012,
    "xs": 0.0009,
    "small": 0.0006,
    "medium": 0.0003,
    "large": 0.00025,
    "xl": 0.0002,
}

WARMUP_STEPS = 10_000
DECAYING = ("cosine", "linear", "wsd")  # kinds of schedule whose rate has an end


def resolve(config: Config) -> Config:
    """Fill the defaults that depend on other keys: the saved configuration says what ran."""
    model = config.model
    layers, width, heads = SIZES[model.size]
    model = model.replace(
        num_layers=_or(model.num_layers, layers),
        width=_or(model.width, width),
        num_heads=_or(model.num_heads, heads),
    )
    model = model.replace(
        num_kv_heads=_or(model.num_kv_heads, model.num_heads),
        feed_forward_width=_or(model.feed_forward_width, model.width),
        predicted_layers=_or(model.predicted_layers, model.num_layers),
    )
    refinement = config.refinement
    refinement = refinement.replace(
        min_num_steps=_or(refinement.min_num_steps, refinement.num_steps),
        learning_rate_multiplier=_or(refinement.learning_rate_multiplier, 3 * refinement.step_size),
        workspace_learning_rate_multiplier=_or(
            refinement.workspace_learning_rate_multiplier, 3 * refinement.workspace_step_size
        ),
    )
    rate = PEAK_LEARNING_RATES[model.size]
    if config.state.kind == "embedding":
        rate = rate / 3
    optimizer = config.optimizer
    if model.parametrization == "standard":  # others take the rate of their base, see checks.py
        optimizer = optimizer.replace(learning_rate=_or(optimizer.learning_rate, rate))
    return config.replace(
        model=model,
        refinement=refinement,
        optimizer=optimizer,
        schedule=_resolve_schedule(config.schedule, config.train.max_steps),
    )


def _resolve_schedule(schedule: ScheduleConfig, max_steps: int) -> ScheduleConfig:
    """What is given in tokens is known in steps with the data only (config/rate_schedule.py)."""
    if schedule.warmup_tokens is None:
        schedule = schedule.replace(warmup_steps=_or(schedule.warmup_steps, WARMUP_STEPS))
    if schedule.kind in DECAYING and schedule.decay_tokens is None:
        end: int = _or(schedule.decay_steps, max_steps)
        schedule = schedule.replace(decay_steps=end)
        if schedule.kind == "wsd" and schedule.cooldown_tokens is None:
            tenth = max(1, end // 10)
            schedule = schedule.replace(cooldown_steps=_or(schedule.cooldown_steps, tenth))
    return schedule


def _or(value, default):
    return default if value is None else value
