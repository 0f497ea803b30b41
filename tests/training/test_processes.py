"""One process or several: every count comes from one place, and two runs of one machine do not meet
at one port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import ROOT, end

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.processes import Place, find_place

STEP = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, Place(0, 1, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, Place(0, 1, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": ""}, Place(0, 1, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place(1, 2, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_NTASKS": "8"}, Place(0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "SLURM_LOCALID": "1", **STEP}, Place(5, 8, 1)),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1", **STEP}, Place(3, 4, 1)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "4"}, Place(3, 4, 0)),
        # srun --ntasks=1 inside an allocation of four tasks
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}
            | {"SLURM_NTASKS": "1"},
            Place(0, 1, 0),
        ),
    ],
)
def test_a_process_knows_its_place_from_its_launcher(environment, place):
    assert find_place(environment) == place


@pytest.mark.parametrize(
    "environment, message",
    [
        # the shell of salloc; the same as an interactive step; a batch script
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, "For one process: SLURM_NTASKS=1 python"),
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
            | {"SLURM_STEP_ID": "4294967290"},
            "For one process: SLURM_NTASKS=1 python",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "For one process: SLURM_NTASKS=1 python"),
        ({"WORLD_SIZE": "4"}, "RANK is absent and WORLD_SIZE 4"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK is 4 and WORLD_SIZE 4"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE absent"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK is 'one' in the environment"),
        ({"SLURM_NTASKS": "-3"}, "SLURM_NTASKS is '-3' in the environment"),
    ],
)
def test_an_environment_that_names_processes_nobody_started_is_refused_with_a_way_out(
    environment, message
):
    with pytest.raises(ConfigError) as refusal:
        find_place(environment)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_nothing_else_counts_processes():
    """Which variables hold a count of processes is known in core/processes.py, and in slurm.py for
    a job's allocation.
    """
    counting = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    allowed = {"core/processes.py", "slurm.py"}
    found = set()
    for path in (ROOT / "ebwm_scale").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name in counting:
            if f'"{name}"]' in text or f'get("{name}"' in text:
                found.add(path.name)
    assert found <= allowed, found


def test_in_the_shell_of_an_allocation_train_says_how_to_run_one_process(runs):
    variables = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3"}
    output = runs.run("shell", variables=variables, flags=("--dry-run",), expect=2)
    assert "SLURM_NTASKS is 3" in output and "Traceback" not in output
    assert "For one process: SLURM_NTASKS=1 python ebwm_scale/train.py" in output
    assert not (runs.folder / "shell").exists()
    alone = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}
    runs.run("shell", variables=alone, overrides={"train.max_steps": 1})


def test_tasks_of_srun_without_an_address_are_told_how_to_get_one_and_how_to_run_one(runs):
    variables = {**STEP, "SLURM_PROCID": "0"}
    output = runs.run("addressless", variables=variables, expect=2)
    assert "MASTER_ADDR is not set: 4 processes need an address to meet at" in output
    assert "for one process: srun --ntasks=1 python" in output and "Traceback" not in output


@pytest.fixture
def taken_port():
    """A port that someone listens on, as another run on this machine does."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


def test_one_process_needs_no_port_of_its_own(runs, taken_port):
    """Exported by a shell, or given by a launcher to the only process that it starts."""
    exported = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken_port}
    launched = {**exported, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, variables in (("exported", exported), ("launched", launched)):
        runs.run(name, variables=variables, overrides={"train.max_steps": 1})


def test_a_port_in_use_is_one_line_that_says_what_to_pass(runs, taken_port):
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    output = runs.run("taken", variables={**variables, "MASTER_PORT": taken_port}, expect=2)
    (line,) = [line for line in output.splitlines() if "is in use" in line]
    assert f"port {taken_port}" in line and "deepspeed --master_port 29501" in line
    assert "Traceback" not in output and not (runs.folder / "taken").exists()


@pytest.mark.soak
def test_under_the_deepspeed_launcher_a_port_in_use_ends_all_processes_with_2(runs, taken_port):
    program = Path(sys.executable).parent / "deepspeed"
    train = runs.command("deepspeed")[1:]
    environment = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}
    process = subprocess.Popen(
        [program, "--num_gpus=2", f"--master_port={taken_port}", *train],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        cwd=runs.folder,
    )
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        end(process)
    assert process.returncode == 2, output[-3000:]
    assert "deepspeed --master_port 29501" in output and "Traceback" not in output, output[-3000:]
