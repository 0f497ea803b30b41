"""No kill loses work, no failed write loses a checkpoint, no bad number enters the weights, no lost
process goes unnoticed.
"""

import json
import signal
import socket
import threading
import time

import pytest
import torch
from gates import Gate
from training_runs import end, same

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.faults import Faults


@pytest.fixture(scope="module")
def reference(runs):
    return runs.run("whole", afresh=True)


def finished_as(runs, name, whole="whole"):
    assert runs.rows(name) == runs.rows(whole)
    assert same(runs.state(name), runs.state(whole)) == []


@pytest.mark.parametrize(
    "fault",
    [
        "kill@step=5",
        pytest.param("kill@evaluation=1", marks=pytest.mark.soak),
        "kill@io=7",
        pytest.param("kill@save=2", marks=pytest.mark.soak),
        *(
            pytest.param(f"kill@io={n}", marks=pytest.mark.soak)
            for n in (1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 14, 16, 18)
        ),
        *(pytest.param(f"kill@step={n}", marks=pytest.mark.soak) for n in (0, 1, 3, 6, 7)),
    ],
)
def test_a_run_killed_anywhere_ends_as_if_nothing_had_happened(runs, reference, fault):
    name = fault.replace("@", "_").replace("=", "_")
    runs.run(name, variables={"EBWM_FAULTS": fault}, expect=-signal.SIGKILL)
    runs.run(name, flags=("--resume",))
    finished_as(runs, name)


def test_a_run_killed_while_it_loads_is_resumed_again(runs, reference):
    runs.run("kill_load", variables={"EBWM_FAULTS": "kill@step=5"}, expect=-signal.SIGKILL)
    runs.run(
        "kill_load",
        flags=("--resume",),
        variables={"EBWM_FAULTS": "kill@load=1"},
        expect=-signal.SIGKILL,
    )
    runs.run("kill_load", flags=("--resume",))
    finished_as(runs, "kill_load")


@pytest.mark.parametrize(
    "number",
    [
        4,
        *(
            pytest.param(n, marks=pytest.mark.soak)
            for n in (1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14)  # all of the first save's
        ),
    ],
)
def test_whichever_write_sync_or_rename_fails_training_goes_on_and_a_checkpoint_can_be_loaded(
    runs, reference, number
):
    name = f"io_{number}"
    output = runs.run(name, variables={"EBWM_FAULTS": f"enospc@io={number}"})
    assert "No space left on device" in output
    is_published = number > 12  # the rename; what fails after it undoes nothing
    assert output.count("the checkpoint could not be written") == (not is_published)
    assert output.count("warning: ") == 1
    events = (runs.folder / name / "events.jsonl").read_text().splitlines()
    steps = [event["step"] for event in map(json.loads, events) if event["event"] == "save"]
    assert steps == ([3, 6, 8] if is_published else [6, 8])
    assert runs.rows(name) == runs.rows("whole")
    runs.run(name, flags=("--resume",))  # what is there loads
    assert not list((runs.folder / name / "checkpoints").glob(".staging-step*"))


def test_a_slow_disk_does_not_stop_the_steps(runs, reference):
    """The save of step 3 takes longer than the steps that are left; they are made meanwhile."""
    gate = Gate(runs.folder / "slow.gate", "save=1")
    process = runs.start(
        "slow",
        variables={"EBWM_FAULTS": gate.fault},
        overrides={"checkpoint.every_steps": 3, "train.max_steps": 5, "evaluation.every_steps": 0},
    )
    steps = []
    try:
        gate.wait_until_reached(process)
        deadline = time.monotonic() + 120
        while 5 not in steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            steps = [row["step"] for row in runs.rows("slow")]
        published = (runs.folder / "slow" / "checkpoints" / "step_000003").exists()
        gate.open()
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 0 and "step 5/5" in output, output[-3000:]
    assert 5 in steps and not published


@pytest.mark.parametrize(
    "stage, processes",
    [
        (0, 1),
        pytest.param(0, 2, marks=pytest.mark.soak),
        pytest.param(1, 2, marks=pytest.mark.soak),
        (3, 2),
    ],
)
def test_a_step_whose_gradients_are_not_finite_on_one_rank_is_skipped_by_all(
    runs, reference, stage, processes
):
    name = f"nan_{stage}_{processes}"
    overrides = {
        "deepspeed.zero_stage": stage,
        "refinement.recompute": "block" if stage == 3 else "none",
    }
    output = runs.run(
        name,
        variables={"EBWM_FAULTS": f"nan@step=2,rank={processes - 1}"},
        processes=processes,
        overrides=overrides,
    )
    assert "step 3 was skipped" in output and "step 8/8" in output
    (skipped,) = [
        e
        for e in map(json.loads, (runs.folder / name / "events.jsonl").read_text().splitlines())
        if e["event"] == "skipped"
    ]
    assert skipped["step"] == 3 and len(skipped["samples"]) == 4
    rows = {row["step"]: row for row in runs.rows(name) if "split" not in row}
    whole = {row["step"]: row for row in runs.rows("whole") if "split" not in row}
    assert rows[3]["grad_norm"] is None and rows[2]["loss"] == pytest.approx(
        whole[2]["loss"], rel=1e-6
    )
    assert all(row["loss"] is not None for step, row in rows.items() if step != 3)
    state = runs.state(name)
    assert all(torch.isfinite(tensor).all() for file in state.values() for tensor in file.values())


def test_steps_skipped_in_a_row_end_the_run_with_76_before_anything_bad_is_saved(runs):
    faults = "; ".join(f"nan@step={n}" for n in (4, 5, 6))
    output = runs.run("nan_for_ever", variables={"EBWM_FAULTS": faults}, expect=76)
    assert (
        "stopped after 3 steps in a row without finite gradients. The last checkpoint (step 3"
        in output
        or "(step 6)" in output
    )
    runs.run("nan_for_ever", flags=("--resume",))


def test_a_hung_rank_ends_the_run_with_77_and_is_named_with_its_stack(runs):
    output = runs.run(
        "hung",
        variables={"EBWM_FAULTS": "hang@step=3,rank=1"},
        processes=2,
        afresh=True,
        overrides={"train.hang_minutes": 0.15},
        expect=1,
    )
    assert "The others waited for rank 1" in output and "exitcode  : 77" in output
    stacks = (runs.folder / "hung" / "watch" / "stacks_rank_1.txt").read_text()
    assert "core/faults.py" in stacks and "in train_step" in stacks


def test_a_dead_rank_ends_the_others_with_77_and_is_named(runs):
    """Without a launcher that would end them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = lambda rank: {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "EBWM_FAULTS": "kill@step=3,rank=1",
    }
    processes = [runs.start("dead", variables=place(rank)) for rank in range(2)]
    try:
        output = processes[0].communicate(timeout=240)[0]
        assert processes[1].wait(60) == -signal.SIGKILL
        assert processes[0].returncode == 77, output[-3000:]
        assert "a collective failed" in output and "Dead, or too stuck to say so: rank 1." in output
    finally:
        for process in processes:
            end(process)
    assert "step 8/8" in runs.run("dead", processes=2, flags=("--resume",))


def test_one_run_goes_through_1_2_4_1_processes_and_stages_0_1_3_2(runs, reference):
    """A part ends after one step, by its time limit; the last one finishes."""
    parts = [(1, 0, "none"), (2, 1, "step"), (4, 3, "block"), (1, 2, "none")]
    for index, (processes, stage, checkpoint) in enumerate(parts):
        last = index + 1 == len(parts)
        overrides = {
            "deepspeed.zero_stage": stage,
            "refinement.recompute": checkpoint,
            **({} if last else {"train.max_minutes": 1e-6}),
        }
        output = runs.run(
            "elastic",
            processes=processes,
            overrides=overrides,
            flags=("--resume",) if index else (),
            expect=0 if last else 75,
        )
        if index:
            assert (
                f"resumed at step {index} of 8" in output
                and f"the number of processes was {parts[index - 1][0]}, is {processes}" in output
            )
    ours, theirs = runs.losses("elastic"), runs.losses("whole")
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6), key


def test_the_best_one_and_milestones_are_kept_beside_the_last(runs):
    runs.run(
        "kept",
        overrides={
            "checkpoint.every_steps": 1,
            "checkpoint.keep_last": 1,
            "checkpoint.milestone_every_steps": 3,
            "evaluation.every_steps": 2,
        },
    )
    checkpoints = runs.folder / "kept" / "checkpoints"
    losses = {
        row["step"]: row["loss"] for row in runs.rows("kept") if row.get("split") == "validation"
    }
    best = (checkpoints / "best").read_text().strip()
    assert best == f"step_{min(losses, key=losses.get):06d}"
    assert {folder.name for folder in checkpoints.glob("step_*")} == {
        best,
        "step_000003",
        "step_000006",
        "step_000008",
    }


def test_strict_takes_no_earlier_checkpoint_for_a_damaged_one(runs):
    runs.run("strict")
    newest = runs.folder / "strict" / "checkpoints" / "step_000008" / "trainer.json"
    newest.write_bytes(newest.read_bytes()[:-3])
    output = runs.run("strict", flags=("--resume", "--strict"), expect=2)
    assert "truncated" in output and "--strict takes no earlier checkpoint" in output
    assert "resumed at step 6" in runs.run("strict", flags=("--resume",))


@pytest.mark.parametrize(
    "text",
    ["explode@step=3", "kill@step", "kill@lunch=1", "kill@step=1,colour=2", "kill@step=1,until=a"],
)
def test_a_fault_that_does_not_exist_is_refused(text):
    with pytest.raises(ConfigError, match="is no fault; expected action@place=number"):
        Faults(text, 0)


def test_a_process_waits_until_a_file_is_there(tmp_path):
    """Also where the path has spaces."""
    gate = Gate(tmp_path / "a gate", "step = 2")
    waiting = threading.Thread(target=Faults(gate.fault, 0).at, args=("step", 2), daemon=True)
    waiting.start()
    while not gate.reached.exists():
        time.sleep(0.01)
    assert waiting.is_alive()
    gate.open()
    waiting.join(30)
    assert not waiting.is_alive()


def test_without_the_variable_nothing_is_injected():
    assert (
        Faults(None, 0).at("step", 1) is None
        and Faults("nan@step=2,rank=1", 0).at("step", 2) is None
    )
    assert Faults("nan@step=2,rank=1", 1).at("step", 2) == "nan"
