"""Time in which this process ran.

A process that was suspended (SIGSTOP, scontrol suspend, a closed lid, a paused virtual machine)
finds on waking that the clock has gone on. What waits for others with a limit must not take that
for their silence.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class RunningTime:
    """Sums the time between looks. Whoever looks every `every_s` seconds misses looks only while
    not running, so a longer gap counts as 2 every_s."""

    def __init__(self, every_s: float, *, clock: Callable[[], float] = time.monotonic):
        self.every_s, self.clock = every_s, clock
        self.last = clock()

    def passed(self) -> float:
        """Seconds since the last look, without those in which this process did not run."""
        now = self.clock()
        gap, self.last = now - self.last, now
        return min(gap, 2 * self.every_s)
