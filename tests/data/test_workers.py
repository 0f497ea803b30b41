"""Tasks in processes of their own: a crash or a standstill costs one task, and is named."""

import gc
import os
import select
import signal
import subprocess
import sys
import time

import pytest

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare import workers
from ebwm_scale.data.prepare.workers import each_in_a_process


def run(function, tasks=(1, 2, 3), **options):
    return {outcome.task: outcome for outcome in each_in_a_process(tasks, function, **options)}


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.multiprocess
def test_every_task_has_its_result_however_large(count):
    outcomes = run(lambda task, moved: bytes(task * 10**6), workers=count)
    assert {task: len(o.result) for task, o in outcomes.items()} == {
        1: 10**6,
        2: 2 * 10**6,
        3: 3 * 10**6,
    }
    assert not any(outcome.problem for outcome in outcomes.values())


def fails(task, moved):
    if task == 1:
        raise DataError("line one\nline two")
    if task == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == 3:
        os._exit(9)
    return task


@pytest.mark.multiprocess
def test_what_becomes_of_a_task_that_fails_is_said_in_one_line():
    outcomes = run(fails, tasks=(1, 2, 3, 4), workers=2)
    assert outcomes[1].problem == "line one line two"
    assert outcomes[2].problem == "the decoder ended with SIGSEGV"
    assert outcomes[3].problem == "the decoder ended with exit code 9"
    assert outcomes[4].result == 4


STILL_S = 4  # longer than a busy machine leaves a process waiting for its turn


def slow_but_moving(task, moved):
    for _ in range(15 * STILL_S):  # longer than it may stand still
        time.sleep(0.1)
        moved()
    return "done"


def stuck(task, moved):
    moved()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


@pytest.mark.multiprocess
def test_a_worker_that_does_not_move_is_named_and_ended_and_a_slow_one_is_not():
    start = time.monotonic()
    task = lambda t, moved: (stuck if t == 2 else slow_but_moving)(t, moved)
    outcomes = run(task, workers=3, still_s=STILL_S)
    assert time.monotonic() - start < 60
    assert outcomes[1].result == outcomes[3].result == "done"
    said = f"did not move for {STILL_S} s (after 1 steps) and was ended"
    assert said in outcomes[2].problem
    pid = int(outcomes[2].problem.split("worker process ")[1].split()[0])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.multiprocess
def test_time_in_which_the_parent_itself_was_stopped_does_not_count(monkeypatch):
    class Clock:
        """Jumps by an hour at the third look, as after a suspension."""

        looks = 0

        def monotonic(self):
            self.looks += 1
            return time.monotonic() + 3600 * (self.looks >= 3)

    clock = Clock()
    monkeypatch.setattr(workers, "time", clock)

    def takes_a_while(task, moved):
        time.sleep(2)
        return "done"

    outcomes = run(takes_a_while, tasks=(1,), still_s=10)
    assert clock.looks >= 3 and outcomes[1].result == "done"


@pytest.mark.multiprocess
def test_leaving_early_ends_the_workers():
    outcomes = each_in_a_process((1, 2), lambda t, m: t if t == 1 else time.sleep(600), workers=2)
    assert next(outcomes).task == 1
    start = time.monotonic()
    outcomes.close()
    assert time.monotonic() - start < 10


class Lingers:
    """Like a decoder with threads: to free it in another process than its own waits for ever."""

    def __init__(self):
        self.cycle, self.pid = self, os.getpid()

    def __del__(self):
        if os.getpid() != self.pid:
            time.sleep(600)


@pytest.mark.multiprocess
def test_what_the_parent_left_behind_is_not_freed_in_a_worker():
    gc.disable()
    try:
        Lingers()
        outcomes = run(lambda task, moved: gc.collect() >= 0, tasks=(1,), still_s=5)
    finally:
        gc.enable()
    gc.collect()
    assert outcomes[1].result is True


ORPHANS = """
import os, sys, time
from ebwm_scale.data.prepare.workers import each_in_a_process

def work(task, moved):
    print(os.getpid(), flush=True)
    while True:
        moved()
        time.sleep(0.01)

list(each_in_a_process([1], work))
"""


def test_a_worker_whose_parent_was_killed_ends_by_itself():
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait(timeout=30)
    ended, _, _ = select.select([parent.stdout], [], [], 30)  # closed when the worker has ended
    if not ended:
        os.kill(worker, signal.SIGKILL)
    assert ended and parent.stdout.read() == ""
