"""Batches that grow: the order of data stays a pure function of the number of samples, whatever the
number of processes, and a stop changes nothing.
"""

import json
import signal

import numpy as np
import pytest
from training_runs import same

from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.checks import batch_arithmetic
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.rate_schedule import rate_schedule
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.data.loading.batches import _Requests

RAMP = BatchRamp(((3, 2), (2, 4)), 8)
RAMPED = {
    "train.batch_ramp": [[3, 2], [2, 4]],
    "train.global_batch_size": 8,
    "train.max_steps": 7,
    "checkpoint.every_steps": 2,
    "evaluation.every_steps": 0,
    "optimizer.gradient_clipping": 0.5,
}


def test_sizes_and_samples_of_a_ramp():
    assert [RAMP.size(step) for step in range(7)] == [2, 2, 2, 4, 4, 8, 8]
    before = [RAMP.samples_before(step) for step in range(8)]
    assert before == [0, 2, 4, 6, 10, 14, 22, 30]
    for samples in range(31):
        steps = RAMP.steps_for(samples)
        assert RAMP.samples_before(steps) >= samples
        assert steps == 0 or RAMP.samples_before(steps - 1) < samples
        assert sum(RAMP.steps_of_sizes(samples)) == samples
    assert RAMP.steps_of_sizes(4) == [3, 1, 0] and RAMP.steps_of_sizes(9) == [3, 2, 4]
    plain = BatchRamp((), 8)
    assert [plain.steps_for(n) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]


@pytest.mark.parametrize("world_size, micro", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("first_step", [0, 2, 4])
def test_every_step_takes_the_next_samples_of_the_order(world_size, micro, first_step):
    class Order:
        def samples(self, first, count):
            return np.arange(first, first + count)

    taken = {step: [] for step in range(first_step, 7)}
    for rank in range(world_size):
        requests = iter(
            _Requests(
                Order(),
                ramp=RAMP,
                micro_batch_size=micro,
                rank=rank,
                world_size=world_size,
                first_step=first_step,
            )
        )
        for step, of_step in taken.items():
            for _ in range(RAMP.size(step) // world_size // micro):
                of_step += next(requests)[0].tolist()
    for step, of_step in taken.items():
        assert of_step == list(range(RAMP.samples_before(step), RAMP.samples_before(step + 1)))


def test_a_schedule_in_tokens_counts_the_samples_of_the_ramp():
    train = {"batch_ramp": [[3, 2], [2, 4]], "global_batch_size": 8, "max_steps": 20}
    schedule = {"warmup_tokens": 5 * 11, "decay_tokens": 5 * 30}
    config = config_from_dict({"train": train, "schedule": schedule, "data": {"context_length": 5}})
    found = rate_schedule(config)
    assert (found.warmup, found.decay_end) == (5, 7)


def test_micro_batches_divide_every_batch_of_a_ramp():
    def train(**values):
        return config_from_dict(
            {"train": {"batch_ramp": [[3, 4], [2, 12]], "global_batch_size": 16, **values}}
        ).train

    assert batch_arithmetic(train(), 1) == (4, 4)
    assert batch_arithmetic(train(), 2) == (2, 4)
    with pytest.raises(ConfigError, match="batches of 4, which do not divide over 8 processes"):
        batch_arithmetic(train(), 8)
    with pytest.raises(ConfigError, match="micro_batch_size 8 does not divide the 4 samples"):
        batch_arithmetic(train(micro_batch_size=8), 1)
    with pytest.raises(ConfigError, match="batches must grow"):
        train(global_batch_size=8)
    with pytest.raises(ConfigError, match="train.batch_ramp is given with refinement.replay"):
        config_from_dict({"train": {"batch_ramp": [[1, 2]]}, "refinement": {"replay": True}})


@pytest.fixture(scope="module")
def ramped(runs):
    runs.run("ramped", overrides=RAMPED)
    return runs.folder / "ramped"


def test_a_ramped_run_counts_its_tokens_and_a_killed_one_is_bit_for_bit_the_whole(runs, ramped):
    """Killed in the second piece, and gone on with from the first."""
    rows = [row for row in runs.rows("ramped") if "split" not in row]
    seen = [row["tokens_seen"] for row in rows]
    lines = (ramped / "metrics.jsonl").read_text().splitlines()
    timed = {row["step"]: row for row in map(json.loads, lines) if "split" not in row}
    for step, row in timed.items():  # a step of 2 samples is a quarter of one of 8
        left = (RAMP.samples_before(7) - RAMP.samples_before(step)) / RAMP.size(step - 1)
        assert row["eta_s"] == pytest.approx(row["step_time_s"] * left)
    assert seen == [16 * RAMP.samples_before(step) for step in range(1, 8)]
    killed = {"EBWM_FAULTS": "kill@step=3"}
    runs.run("killed", overrides=RAMPED, variables=killed, expect=-signal.SIGKILL)
    runs.run("killed", overrides=RAMPED, flags=("--resume",))
    assert same(runs.state("killed"), runs.state("ramped")) == []
    assert runs.rows("killed") == runs.rows("ramped")
    saved = ramped / "checkpoints" / "step_000007" / "trainer.json"
    assert json.loads(saved.read_text())["data"]["step"] == 7


@pytest.mark.soak
def test_steps_of_a_ramp_are_those_of_runs_with_such_batches(runs, ramped):
    """The first piece is a run of small batches, to the bit: accumulation is no part of it."""
    small = {**RAMPED, "train.batch_ramp": [], "train.global_batch_size": 2, "train.max_steps": 7}
    runs.run("small", overrides=small)
    first = {key: losses for key, losses in runs.losses("ramped").items() if key[0] <= 3}
    assert {key: runs.losses("small")[key] for key in first} == first


@pytest.mark.multiprocess
@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_ramp_is_the_same_at_every_stage_of_two_processes(runs, ramped, stage):
    overrides = {
        **RAMPED,
        "deepspeed.zero_stage": stage,
        "deepspeed.offload": "optimizer" if stage == 2 else "none",
        "refinement.recompute": "block" if stage == 3 else "none",
    }
    name = f"ramped_{stage}"
    runs.run(name, overrides=overrides, processes=2)
    for key, losses in runs.losses("ramped").items():
        assert runs.losses(name)[key] == pytest.approx(losses, rel=1e-4)
