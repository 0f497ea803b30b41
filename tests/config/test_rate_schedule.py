"""Schedules of the learning rate: their courses, in steps or tokens, and what is refused."""

import math

import pytest

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.rate_schedule import rate_schedule
from ebwm_scale.core.errors import ConfigError


def configured(schedule: dict, *, max_steps: int = 100, **sections):
    return config_from_dict({"schedule": schedule, "train": {"max_steps": max_steps}, **sections})


def factors(schedule: dict, steps, **options) -> list[float]:
    found = rate_schedule(configured(schedule, **options))
    return [found.factor(step) for step in steps]


def test_without_a_kind_the_rate_is_bit_for_bit_the_cosine_of_before():
    for warmup, end, final in ((10, 110, 0.1), (0, 97, 0.0), (3, 1000, 1 / 3), (7, 7, 0.2)):
        keys = {"warmup_steps": warmup, "decay_steps": end, "final_ratio": final}
        expected = []
        for step in range(130):
            progress = min(1.0, (step - warmup) / max(1, end - warmup))
            cosine = final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
            expected.append((step + 1) / warmup if step < warmup else cosine)
        assert factors(keys, range(130), max_steps=1000) == expected
        assert factors({"kind": "cosine", **keys}, range(130), max_steps=1000) == expected


def test_each_kind_takes_its_course_after_the_same_warm_up():
    steps = (0, 9, 10, 55, 90, 95, 100, 200)
    for kind, expected in {
        "linear": [0.1, 1, 1, 0.6, 0.2 + 0.8 / 9, 0.2 + 0.4 / 9, 0.2, 0.2],
        "wsd": [0.1, 1, 1, 1, 1, 0.6, 0.2, 0.2],
        "constant": [0.1, 1, 1, 1, 1, 1, 1, 1],
    }.items():
        found = factors({"kind": kind, "warmup_steps": 10, "final_ratio": 0.2}, steps)
        assert found == pytest.approx(expected), kind


def test_the_inverse_square_root_goes_on_from_the_warm_up_without_a_jump():
    keys = {"kind": "inverse_sqrt", "warmup_steps": 10, "final_ratio": 0.0}
    found = factors(keys, (0, 9, 10, 39, 999))
    assert found == pytest.approx([0.1, 1, (10 / 11) ** 0.5, 0.5, 0.1])


def test_the_inverse_square_root_ends_at_its_floor_and_needs_no_warm_up():
    keys = {"kind": "inverse_sqrt", "warmup_steps": 0, "final_ratio": 0.5}
    assert factors(keys, (0, 1, 3, 99)) == pytest.approx([1, 0.5**0.5, 0.5, 0.5])


@pytest.mark.parametrize("shape, middle", [("linear", 0.5), ("cosine", 0.5)])
def test_a_cooldown_has_the_shape_that_is_asked_for(shape, middle):
    keys = {"kind": "wsd", "warmup_steps": 0, "cooldown_steps": 40, "final_ratio": 0.0}
    found = factors({**keys, "cooldown_shape": shape}, (59, 60, 70, 80, 90, 100))
    assert found[:2] == [1, 1] and found[3] == pytest.approx(middle) and found[5] == 0
    quarter = {"linear": 0.75, "cosine": 0.5 + 0.5**1.5}[shape]
    assert found[2] == pytest.approx(quarter) and found[4] == pytest.approx(1 - quarter)
    root = factors({**keys, "cooldown_shape": "one_minus_sqrt"}, (60, 70, 100))
    assert root == pytest.approx([1, 0.5, 0])


def test_tokens_are_steps_of_the_global_batch_rounded_up():
    tokens = {"kind": "wsd", "warmup_tokens": 1000, "decay_tokens": 12800, "cooldown_tokens": 2560}
    steps = {"kind": "wsd", "warmup_steps": 8, "decay_steps": 100, "cooldown_steps": 20}
    sections = {"data": {"context_length": 16}}
    config = config_from_dict(
        {"schedule": tokens, "train": {"global_batch_size": 8, "max_steps": 100}, **sections}
    )
    assert config.schedule.warmup_steps is None and config.schedule.decay_steps is None
    assert rate_schedule(config) == rate_schedule(configured(steps))
    # what a run folder holds reads back as the same
    assert rate_schedule(config_from_dict(config.to_dict())) == rate_schedule(config)


def test_tokens_need_the_context_length_and_are_checked_once_it_is_known():
    schedule = {"warmup_tokens": 1000, "decay_tokens": 500}
    config = configured(schedule)
    with pytest.raises(ConfigError, match="data.context_length is absent"):
        rate_schedule(config)
    with pytest.raises(ConfigError, match="schedule.warmup_tokens in steps is 8: must be at most"):
        configured(schedule, data={"context_length": 1})


@pytest.mark.parametrize(
    "schedule, part",
    [
        ({"warmup_steps": 5, "warmup_tokens": 7}, "warmup_steps is 5 and schedule.warmup_tokens 7"),
        ({"kind": "constant", "decay_steps": 7}, "decay_steps is 7 with schedule.kind constant"),
        ({"cooldown_steps": 7}, "cooldown_steps is 7 with schedule.kind cosine"),
        ({"cooldown_shape": "cosine"}, "cooldown_shape is cosine with schedule.kind cosine"),
        (
            {"kind": "wsd", "warmup_steps": 50, "cooldown_steps": 60},
            "is 60: with schedule.warmup_steps 50 in front of it, it must be at most 50 to end",
        ),
        ({"kind": "linear", "warmup_steps": 60, "decay_steps": 50}, "warmup_steps is 60"),
        ({"kind": "step"}, "schedule.kind"),
    ],
)
def test_what_no_schedule_means_is_refused_in_one_line(schedule, part):
    with pytest.raises(ConfigError) as caught:
        configured({"warmup_steps": 0, **schedule})
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_only_wsd_has_a_step_to_go_on_from():
    assert rate_schedule(configured({"kind": "wsd", "warmup_steps": 5})).last_stable == 90
    for kind in ("cosine", "linear", "inverse_sqrt", "constant"):
        assert rate_schedule(configured({"kind": kind, "warmup_steps": 5})).last_stable is None
