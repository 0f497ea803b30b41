"""Wanting to stop: a signal or the time limit raises a flag, the loop polls it, all ranks save the
same step and leave with code 75.

Signals are noticed by a thread, through the wake-up descriptor that the interpreter's C handler
writes to: a second one ends the process also while the main thread waits inside a collective, where
no Python handler would run. This file imports no torch, so that the flag can stand before the
imports that take seconds: before that a signal would end one rank alone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

from ebwm_scale.core.console import say
from ebwm_scale.core.errors import EXIT_FAILED

if TYPE_CHECKING:
    from ebwm_scale.core.world import World

# where preemption has no grace time Slurm sends SIGTERM and the SIGUSR1 of --signal together; both
# say the same
ONE_ENDING_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Raised by the first signal, or max_minutes after it was made; a second signal leaves at once.

    at_once: what to say where the first signal leaves at once too, with nothing to save
    (--dry-run).
    """

    def __init__(self, at_once: str | None = None) -> None:
        self.at_once = at_once
        self.reason: str | None = None
        self.signalled = 0.0  # when the first signal came
        self.start = time.monotonic()
        self.max_minutes: float | None = None
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        os.register_at_fork(
            after_in_child=lambda: signal.set_wakeup_fd(-1)
        )  # what a loader worker receives is not ours
        threading.Thread(target=self._listen, args=(reader,), daemon=True, name="signals").start()
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: None)

    def stop_requested(self, world: World, *, time_limit: bool = True) -> str | None:
        """Why to stop, if any rank wants to; every rank must call it at the same place.

        time_limit False: signals only. A process that has not made a step yet does not stop for
        train.max_minutes, or it never would.
        """
        limit = self.max_minutes if time_limit else None
        if self.reason is None and limit is not None and time.monotonic() - self.start > 60 * limit:
            self.reason = "train.max_minutes"
        if not world.any(self.reason is not None):
            return None
        return self.reason or "another rank was signalled"

    def ignore(self) -> None:
        """From here on signals change nothing: the exit code is known, and the interpreter's own
        end would take its handlers away.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                if (
                    number not in SIGNALS
                ):  # the interpreter writes every signal that has a Python handler
                    continue
                if self.at_once is not None:
                    self._leave(f"{signal.Signals(number).name}: {self.at_once}")
                if {self.reason, signal.Signals(number).name} == {
                    "SIGUSR1",
                    "SIGTERM",
                } and time.monotonic() - self.signalled < ONE_ENDING_S:
                    continue
                if self.reason is not None and self.reason.startswith("SIG"):
                    self._leave(
                        f"{signal.Signals(number).name} after {self.reason}: "
                        "leaving at once, unsaved"
                    )
                self.reason, self.signalled = signal.Signals(number).name, time.monotonic()

    def _leave(self, text: str) -> None:
        """End the process with one line, whatever the main thread is doing."""
        say(text, error=True, every_rank=True)
        os._exit(EXIT_FAILED)
