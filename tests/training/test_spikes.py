"""A loss spike is found, undone and kept from coming again: recorded, bounded, and the same whether
or not the run is killed meanwhile, and on any number of processes.
"""

import json
import math
import signal

import numpy as np
import pytest
from training_runs import same

from ebwm_scale.config.batch_ramp import BatchRamp
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.data.loading.batches import _Requests
from ebwm_scale.data.loading.skipped import merged, positions_of
from ebwm_scale.training.spikes import SpikeWatch

WATCHED = {
    "train.spike_deviations": 30.0,
    "train.spike_window": 3,
    "train.max_rollbacks": 2,
    "train.max_steps": 9,
    "evaluation.every_steps": 0,
}
# Two batches next to each other, and a third after the run has gone back as often as it may.
FAULTS = "spike@batch=5,times=2; spike@batch=9"


def events(runs, name, event="spike") -> list[dict]:
    lines = (runs.folder / name / "events.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def training_losses(runs, name) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in runs.rows(name) if "split" not in row}


def watch(**options) -> SpikeWatch:
    return SpikeWatch(config_from_dict({"train": options}).train)


def test_a_spike_is_a_loss_far_above_a_full_window_and_does_not_enter_it():
    spikes = watch(spike_deviations=4.0, spike_window=4)
    assert spikes.judge(90.0) is None  # nothing to hold it against
    for loss in (5.0, 5.2, 4.8, 5.0):
        assert spikes.judge(loss) is None
    deviation = math.sqrt(0.02)
    spike = spikes.judge(5.0 + 4.1 * deviation)
    assert spike.mean == 5.0 and spike.deviation == pytest.approx(deviation)
    assert spikes.judge(5.0 + 3.9 * deviation) is None
    assert list(spikes.losses)[:3] == [5.2, 4.8, 5.0]
    assert spikes.judge(math.nan) is None and watch().judge(1e9) is None


def test_what_is_skipped_is_a_pure_function_of_the_number_of_a_sample():
    skipped = merged([[8, 12], [20, 24], [12, 16], [4, 4]])
    assert skipped == ((8, 16), (20, 24))
    positions = positions_of(0, 40, skipped)
    left = [p for p in range(52) if not (8 <= p < 16 or 20 <= p < 24)]
    assert positions.tolist() == left[:40]
    assert positions_of(17, 9, skipped).tolist() == left[17:26]


@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_around_a_skipped_one_are_those_of_the_order(world_size):
    class Order:
        def samples(self, first, count):
            return 1000 + np.arange(first, first + count)

    taken = []
    for rank in range(world_size):
        requests = _Requests(
            Order(),
            ramp=BatchRamp((), 8),
            micro_batch_size=4,
            rank=rank,
            world_size=world_size,
            first_step=1,
            skipped=((8, 16), (24, 32)),
        )
        for _, (ids, positions) in zip(range(4), requests):
            assert (ids == 1000 + positions).all()
            taken += positions.tolist()
    expected = [*range(16, 24), *range(32, 48)]
    assert sorted(taken)[: len(expected) - 8] == expected[:16]


@pytest.fixture(scope="module")
def spiked(runs):
    return runs.run("spiked", overrides=WATCHED, variables={"EBWM_FAULTS": FAULTS})


def test_a_run_goes_back_leaves_the_samples_out_and_shows_it(runs, spiked):
    first, second, third = events(runs, "spiked")
    assert [spike["step"] for spike in (first, second, third)] == [6, 6, 8]
    assert [spike["back_to"] for spike in (first, second, third)] == [3, 3, None]
    assert [step for step, _ in first["undone"]] == [4, 5, 6]
    assert first["undone"][-1][1] == first["loss"] > 100 * first["mean"]
    losses = training_losses(runs, "spiked")
    assert list(losses) == list(range(1, 10))
    assert max(losses[step] for step in range(1, 8)) < 100 < losses[8]
    samples = [set(spike["samples"]) for spike in (first, second, third)]
    assert [len(of_spike) for of_spike in samples] == [4, 4, 4]
    assert not samples[0] & samples[1]
    assert "going back to step 3 (2 of 2 times)" in spiked
    assert "gone back train.max_rollbacks 2 times, and goes on" in spiked
    newest = runs.folder / "spiked" / "checkpoints" / "step_000009" / "trainer.json"
    saved = json.loads(newest.read_text())["spikes"]
    assert saved["skipped"] == [[20, 28]] and saved["rollbacks"] == 2
    page = (runs.folder / "spiked" / "report.html").read_text()
    assert "went back 2 times" in page


def test_a_run_killed_after_it_went_back_is_bit_for_bit_the_whole_one(runs, spiked):
    """Batch 7 is met first after the second time, before any save that knows of the first."""
    killed = {"EBWM_FAULTS": f"{FAULTS}; kill@batch=7"}
    runs.run("killed", overrides=WATCHED, variables=killed, expect=-signal.SIGKILL)
    assert len(events(runs, "killed")) == 2
    runs.run("killed", overrides=WATCHED, flags=("--resume",), variables={"EBWM_FAULTS": FAULTS})
    assert same(runs.state("killed"), runs.state("spiked")) == []
    assert runs.rows("killed") == runs.rows("spiked")


@pytest.mark.multiprocess
@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_several_processes_skip_the_same_at_every_stage(runs, spiked, stage):
    name = f"two_{stage}"
    overrides = {
        **WATCHED,
        "deepspeed.zero_stage": stage,
        "refinement.recompute": "block" if stage == 3 else "none",
        "train.ema": 0.9,
    }
    variables = {"EBWM_FAULTS": FAULTS}
    runs.run(name, overrides=overrides, processes=2, variables=variables)
    ours, theirs = training_losses(runs, name), training_losses(runs, "spiked")
    assert ours == pytest.approx(theirs, rel=1e-5)
    for mine, other in zip(events(runs, name), events(runs, "spiked"), strict=True):
        assert mine["samples"] == other["samples"] and mine["back_to"] == other["back_to"]


def test_a_stream_that_cannot_be_read_again_is_refused():
    with pytest.raises(ConfigError, match=r"train.spike_deviations is 6.0 with data.stream"):
        config_from_dict(
            {
                "train": {"spike_deviations": 6.0},
                "data": {"stream": ["a.tar"], "manifest": "m.json"},
            }
        )
