"""Wanting to stop: a signal or the time limit raises a flag, the loop polls it, all ranks save the same step and leave with code 75."""
from __future__ import annotations

import os
import signal
import time

from ..errors import EXIT_FAILED
from .distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Handlers only set a flag; a second signal leaves at once."""

    def __init__(self, max_minutes: float | None):
        self.reason: str | None = None
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        if self.reason is not None:
            os._exit(EXIT_FAILED)
        self.reason = signal.Signals(number).name

    def wanted(self, world: World) -> str | None:
        """Why to stop, if any rank wants to; every rank must call it at the same place."""
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "train.max_minutes"
        if not world.any(self.reason is not None):
            return None
        return self.reason or "another rank was signalled"
