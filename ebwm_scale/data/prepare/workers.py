"""A process for each task: one that crashes, or stands still, costs its task and nothing else.

    parent   start --> wait for a result, an end, or too long without a move --> next task
    worker   function(task, moved), where moved() counts one step up in shared memory

Native decoders of files from anywhere can do both; no time-out inside a process would end them.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.forking import parents_objects_kept

STILL_S = 120.0  # without a move, until a worker is ended
LIMIT_S = 6 * 3600.0  # in all, of one task
_LOOK_EVERY_S = 0.5
_END_WITHIN_S = 5.0

Task = TypeVar("Task")


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its result, or in words why there is none."""

    task: Any
    result: Any = None
    problem: str | None = None


def each_in_a_process(
    tasks: Sequence[Task],
    function: Callable[[Task, Callable[[], None]], Any],
    *,
    workers: int = 1,
    still_s: float = STILL_S,
    limit_s: float = math.inf,
    what: str = "the decoder",
    look: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """The outcome of function(task, moved) for each task, as they end; up to `workers` at a time.

    what: does it, for messages of a crash. DataError and OSError in a function are problems, as are
    a crash, `still_s` seconds without a call of moved, and more than `limit_s` in all. Workers are
    ended when the iteration is left. look: is called about twice a second while they work.
    """
    waiting = deque(tasks)
    running: list[_Worker] = []
    look_every_s = min(_LOOK_EVERY_S, still_s / 4, limit_s / 4)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Worker(waiting.popleft(), function, what))
            multiprocessing.connection.wait([w.receiver for w in running], timeout=look_every_s)
            look()
            for worker in list(running):
                outcome = worker.outcome(still_s, limit_s, look_every_s)
                if outcome is not None:
                    running.remove(worker)
                    worker.end()
                    yield outcome
    finally:
        for worker in running:
            worker.end()


class _Worker:
    """A running task and when it moved last."""

    def __init__(self, task: Any, function: Callable, what: str):
        self.what = what
        context = multiprocessing.get_context("fork")
        self.task = task
        self.receiver, sender = context.Pipe(duplex=False)
        self._moves = context.RawValue("Q", 0)
        self._seen_moves = 0
        self._still_s = 0.0
        self._worked_s = 0.0
        self._looked_at = time.monotonic()
        self._process = context.Process(
            target=_work, args=(task, function, self._moves, sender, os.getpid()), daemon=True
        )
        with parents_objects_kept():
            self._process.start()
        sender.close()  # so that the worker's end is the end of what can be received

    def outcome(self, still_s: float, limit_s: float, look_every_s: float) -> Outcome | None:
        """What became of the task, if that is known by now."""
        if self.receiver.poll():
            try:
                return Outcome(self.task, *self.receiver.recv())
            except EOFError:
                return Outcome(self.task, problem=self._how_it_ended())
        now = time.monotonic()
        # Time in which this process did not run (suspended, asleep) is not held against a worker.
        passed_s = min(now - self._looked_at, 4 * look_every_s)
        self._still_s += passed_s
        self._worked_s += passed_s
        self._looked_at = now
        if self._moves.value != self._seen_moves:
            self._seen_moves = self._moves.value
            self._still_s = 0.0
        if self._worked_s >= limit_s:
            return Outcome(self.task, problem=f"took more than {limit_s:g} s and was ended")
        if self._still_s < still_s:
            return None
        return Outcome(
            self.task,
            problem=f"its worker process {self._process.pid} did not move for {still_s:g} s "
            f"(after {self._seen_moves} steps) and was ended",
        )

    def end(self) -> None:
        """End the process, finished or not."""
        self._process.kill()
        self._process.join(_END_WITHIN_S)  # one that the kernel does not let go is left behind
        self.receiver.close()

    def _how_it_ended(self) -> str:
        self._process.join(_END_WITHIN_S)
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"{self.what} ended with {signal.Signals(-code).name}"
        return f"{self.what} ended with exit code {code}"


def _work(task: Any, function: Callable, moves, sender, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us

    def moved() -> None:
        moves.value += 1
        if os.getppid() != parent:  # it was killed: nobody waits for what comes, or may end us
            os._exit(1)

    try:
        result = function(task, moved), None
    except (DataError, OSError) as error:
        result = None, " ".join(str(error).split())
    sender.send(result)
