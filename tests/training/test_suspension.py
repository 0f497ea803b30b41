"""Processes that were suspended (SIGSTOP; the same to them: scontrol suspend, a closed lid, a
paused virtual machine) go on when they wake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import ROOT, end, free_port

from ebwm_scale.cluster import tasks as cluster_tasks
from ebwm_scale.core.running_time import RunningTime

LIMIT_S = 9.0
SUSPENDED_S = 11.0


def place(rank: int, size: int, port: str) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }


def suspend(processes) -> None:
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(SUSPENDED_S)
    for process in processes:
        process.send_signal(signal.SIGCONT)


def until_asleep(processes) -> None:
    """Until the main threads have used no processor time for a second: they are in the fault's
    sleep."""
    used, since = None, time.monotonic()
    while time.monotonic() - since < 1.0:
        now = [
            Path(f"/proc/{p.pid}/task/{p.pid}/stat").read_text().split()[13:15] for p in processes
        ]
        if now != used:
            used, since = now, time.monotonic()
        time.sleep(0.05)


@pytest.mark.parametrize(
    "looks, passed",
    [
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]),
        ([1.5, 2.5], [1.5, 1.0]),  # late, as threads are
        ([1.0, 3601.0, 3602.0], [1.0, 2.0, 1.0]),  # an hour's sleep
    ],
)
def test_time_in_which_nobody_looked_does_not_count(looks, passed):
    times = iter([0.0, *looks])
    running = RunningTime(1.0, clock=lambda: next(times))
    assert [running.passed() for _ in looks] == passed


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_run_that_was_suspended_for_longer_than_a_hang_may_take_finishes(runs, size):
    name, port = f"suspended_{size}", str(free_port())
    variables = {"EBWM_FAULTS": "slow@step=4,seconds=14"}  # on waking still in it
    processes = [
        runs.start(
            name,
            variables={**variables, **place(rank, size, port)},
            overrides={"train.hang_minutes": LIMIT_S / 60, "evaluation.every_steps": 100},
        )
        for rank in range(size)
    ]
    try:
        metrics, deadline = runs.folder / name / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 4):
            assert processes[0].poll() is None, processes[0].communicate()[0][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        until_asleep(processes)
        suspend(processes)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * size, outputs[0][-3000:]
    finally:
        for process in processes:
            end(process)
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert max(row["step"] for row in rows) == 8


COLLECTIVE = """
import datetime, sys, time
from ebwm_scale.training import distributed
distributed.TIMEOUT = datetime.timedelta(seconds=6)
world = distributed.init_distributed()
world.leave_hangs_to_the_watchdog()
print("joined", flush=True)
time.sleep(3 * world.rank)      # rank 0 waits for rank 1 when both are suspended
print("values", world.all_gather_object(world.rank), flush=True)
"""


@pytest.mark.soak
def test_a_collective_that_was_suspended_goes_on():
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COLLECTIVE],
            env={
                **os.environ,
                **place(rank, 2, port),
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            while "joined" not in (line := process.stdout.readline()):
                assert line, "ended before it had joined"
        time.sleep(1)
        suspend(processes)
        for process in processes:
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 0 and "values [0, 1]" in output, output[-3000:]
    finally:
        for process in processes:
            end(process)


WAITING = """
import sys, time
from pathlib import Path
from ebwm_scale.cluster import tasks
tasks.GRACE_S = 4
sleep = "import os, time; time.sleep(0 if os.environ['RANK'] == '0' else 3)"
command = [sys.executable, "-c", sleep]
started = tasks.LocalTasks(2, command, Path(sys.argv[1]))
print("started", flush=True)
print("code", started.wait(), flush=True)
"""


def test_tasks_that_are_still_saving_when_all_are_suspended_are_not_ended_for_it(tmp_path):
    """Rank 0 has ended, and rank 1 has 4 s for its own end: it needs 3, and 11 s of suspension
    between."""
    assert cluster_tasks.GRACE_S == 30
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert "started" in process.stdout.readline()
        time.sleep(1)
        waited = [process.pid, *children(process.pid)]
        for pid in waited:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(SUSPENDED_S)
        for pid in waited:
            os.kill(pid, signal.SIGCONT)
        assert "code 0" in process.communicate(timeout=30)[0]
    finally:
        end(process)


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]
