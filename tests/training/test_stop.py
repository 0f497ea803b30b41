"""Where a stop is noticed: in start-up, between micro-batches, in an evaluation; a second signal
leaves at once, wherever the process is.
"""

import json
import signal
import time

import pytest
from gates import Gate
from training_runs import end, same


@pytest.fixture(scope="module")
def reference(runs):
    return runs.run("whole", afresh=True, overrides={"train.micro_batch_size": 1})


def signalled(runs, name, *, at, numbers=(signal.SIGUSR1,), released=True, **options):
    """Start a run and send it signals while it waits at a place (of core/faults.py); (exit code,
    output, seconds from the last signal to the end). Not released: it would wait for ever.
    """
    gate = Gate(runs.folder / f"{name}.gate", at)
    process = runs.start(name, variables={"EBWM_FAULTS": gate.fault}, **options)
    try:
        gate.wait_until_reached(process)
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.5)  # to be heard before the next one: two that wait come in any order
        start = time.monotonic()
        if released:
            gate.open()
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    return process.returncode, output, time.monotonic() - start


def handler_stands(process):
    """The process catches SIGUSR1 (bit 9 of SigCgt)."""
    try:
        with open(f"/proc/{process.pid}/status") as file:
            return bool(
                int(next(line for line in file if line.startswith("SigCgt")).split()[1], 16) >> 9
                & 1
            )
    except (OSError, StopIteration):
        return False


def finished_as_whole(runs, name, **options):
    runs.run(name, flags=("--resume",), **options)
    assert runs.rows(name) == runs.rows("whole")
    assert same(runs.state(name), runs.state("whole")) == []


def test_a_signal_while_torch_is_imported_stops_before_the_model_is_built(runs, reference):
    overrides = {"train.micro_batch_size": 1}
    process, deadline = (
        runs.start("early", overrides=overrides, afresh=True),
        time.monotonic() + 120,
    )
    try:
        while not handler_stands(process) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    code = process.returncode
    assert code == 75 and "stopped before the model was built (SIGUSR1)" in output
    assert not (runs.folder / "early" / "checkpoints").exists()


def test_between_two_micro_batches_the_step_is_given_up_and_done_again(runs, reference):
    """The signal comes before step 6's first micro-batch, so its second one is not begun: what is
    saved is step 5.
    """
    overrides = {"train.micro_batch_size": 1}
    code, output, _ = signalled(runs, "between", at="step=5", overrides=overrides)
    assert code == 75 and "stopped at step 5 (SIGUSR1)" in output
    finished_as_whole(runs, "between", overrides=overrides)


def test_an_evaluation_is_given_up_its_step_is_saved_and_the_resumed_run_makes_up_for_it(
    runs, reference
):
    """Evaluation 1 belongs to step 4.

    The row is missing at the stop, and there in the end, once and in its place.
    """
    overrides = {"train.micro_batch_size": 1}
    code, output, _ = signalled(runs, "evaluating", at="evaluation=1", overrides=overrides)
    assert code == 75 and "stopped at step 4 (SIGUSR1)" in output
    assert not any(row.get("split") for row in runs.rows("evaluating"))
    finished_as_whole(runs, "evaluating", overrides=overrides)


@pytest.mark.soak
def test_the_last_evaluation_too_and_the_best_checkpoint_is_known_in_the_end(runs, reference):
    overrides = {"train.micro_batch_size": 1}
    code, output, _ = signalled(runs, "last", at="evaluation=2", overrides=overrides)
    assert code == 75 and "stopped at step 8 (SIGUSR1)" in output
    finished_as_whole(runs, "last", overrides=overrides)
    loss = lambda name: json.loads(
        (runs.folder / name / "checkpoints" / "step_000008" / "trainer.json").read_text()
    )["validation_loss"]
    assert loss("last") == loss("whole") is not None


@pytest.mark.parametrize(
    "first, second",
    [
        (signal.SIGTERM, signal.SIGTERM),
        pytest.param(signal.SIGUSR1, signal.SIGUSR1, marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, signal.SIGINT, marks=pytest.mark.soak),
    ],
)
def test_a_second_signal_leaves_at_once_and_unsaved(runs, first, second):
    name = f"twice_{second.name}"
    code, output, seconds = signalled(
        runs, name, at="step=2", numbers=(first, second), released=False
    )
    assert code == 1 and seconds < 60  # the step hangs for ever
    assert (
        f"{second.name} after {first.name}: leaving at once, unsaved" in output
        and not (runs.folder / name / "checkpoints").exists()
    )


@pytest.mark.parametrize(
    "first, second",
    [
        (signal.SIGTERM, signal.SIGUSR1),
        pytest.param(signal.SIGUSR1, signal.SIGTERM, marks=pytest.mark.soak),
    ],
)
def test_sigterm_and_sigusr1_together_are_one_ending(runs, first, second):
    """As Slurm sends them where preemption has no grace time."""
    name = f"together_{first.name}"
    code, output, _ = signalled(runs, name, at="step=2", numbers=(first, second))
    assert code == 75 and f"stopped at step 3 ({first.name})" in output


def test_a_process_whose_run_was_taken_over_writes_nothing_more(runs):
    """What a node that comes back from the dead would do to the run that went on elsewhere."""
    gate = Gate(runs.folder / "taken.gate", "step=2")
    process = runs.start("taken", variables={"EBWM_FAULTS": gate.fault})
    try:
        gate.wait_until_reached(process)
        (runs.folder / "taken" / "owner").write_text("another")
        gate.open()
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 77 and "was taken over by the process another" in output
    assert [row["step"] for row in runs.rows("taken")] == [1, 2] and not (
        runs.folder / "taken" / "checkpoints"
    ).exists()
