"""Options with a state go on from 1 to 2 to 4 processes, at other ZeRO stages, as if never cut:
batches that grow, what a spike has left out, schedule-free AdamW, averages of the weights.
"""

import json
from pathlib import Path

import pytest

from ebwm_scale.checkpoint.reader import CheckpointReader

PARTS = [(1, 0), (2, 3), (4, 1)]  # (processes, ZeRO stage) of each start
BASE = {
    "refinement.recompute": "block",  # stage 3 needs it
    "evaluation.every_steps": 0,
    "checkpoint.every_steps": 2,
}
RAMP = {"train.batch_ramp": [[3, 4], [2, 8]], "train.global_batch_size": 16}
WATCHED = {
    "train.spike_deviations": 30.0,
    "train.spike_window": 3,
    "train.max_rollbacks": 2,
    "checkpoint.every_steps": 3,
}
FREE = {"optimizer.name": "schedule_free", "schedule.kind": "constant"}
# name: (overrides, last step of each start, EBWM_FAULTS, what the optimizer's state holds)
OPTIONS = {
    # cut in the first piece, in the second, and gone on with into batches of full size
    "ramp": (RAMP, (2, 4, 7), "", ("exp_avg", "exp_avg_sq")),
    # one process goes back once; two go back again, to what one has saved; four leave both out
    "spikes": (WATCHED, (6, 8, 10), "spike@batch=5; spike@batch=7", ("exp_avg", "exp_avg_sq")),
    "schedule_free": (FREE, (2, 4, 6), "", ("z", "ema", "exp_avg_sq")),
    "ema": ({"train.ema": 0.4}, (2, 4, 6), "", ("ema", "exp_avg", "exp_avg_sq")),
}


def newest(folder) -> Path:
    checkpoints = folder / "checkpoints"
    return checkpoints / (checkpoints / "latest").read_text().strip()


def training_rows(runs, name: str) -> dict[int, dict]:
    return {row["step"]: row for row in runs.rows(name) if "split" not in row}


def left_out(folder) -> list:
    """Positions of the order of data that a run's newest checkpoint leaves out."""
    saved = json.loads((newest(folder) / "trainer.json").read_text())
    return saved.get("spikes", {}).get("skipped", [])


def spikes(folder) -> list[dict]:
    rows = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == "spike"]


@pytest.mark.multiprocess
@pytest.mark.soak
@pytest.mark.parametrize("option", OPTIONS)
def test_a_run_goes_on_with_two_and_four_processes_as_with_one(runs, option):
    overrides, ends, faults, kinds = OPTIONS[option]
    constant = option == "schedule_free"
    schedule = {} if constant else {"schedule.decay_steps": ends[-1]}
    overrides = {**BASE, **overrides, **schedule}
    variables = {"EBWM_FAULTS": faults}
    whole, cut = f"whole_{option}", f"cut_{option}"
    runs.run(whole, overrides={**overrides, "train.max_steps": ends[-1]}, variables=variables)
    for index, ((processes, stage), end) in enumerate(zip(PARTS, ends)):
        part = {"train.max_steps": end, "deepspeed.zero_stage": stage}
        runs.run(
            cut,
            processes=processes,
            overrides={**overrides, **part},
            flags=("--resume",) if index else (),
            variables=variables,
        )

    found = training_rows(runs, cut)
    assert list(found) == list(range(1, ends[-1] + 1))
    for step, row in training_rows(runs, whole).items():
        assert found[step]["loss_per_step"] == pytest.approx(row["loss_per_step"], rel=1e-4), step
        assert found[step]["tokens_seen"] == row["tokens_seen"]

    ours, theirs = (CheckpointReader(newest(runs.folder / name)) for name in (cut, whole))
    for kind in ("weight", *kinds):
        assert theirs.holds(kind)
        for name, numbers in theirs.weights(kind).items():
            difference = (ours.read(name, kind).view_as(numbers) - numbers).abs().max()
            assert difference <= 1e-3 * numbers.abs().max() + 1e-9, (kind, name)

    expected = [[20, 24], [28, 32]] if option == "spikes" else []
    assert left_out(runs.folder / cut) == left_out(runs.folder / whole) == expected
    for mine, other in zip(spikes(runs.folder / cut), spikes(runs.folder / whole), strict=True):
        assert mine["samples"] == other["samples"] and mine["back_to"] is not None
