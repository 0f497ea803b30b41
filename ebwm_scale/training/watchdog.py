"""A hung or dead process ends the run within a bound, with the stacks of all threads and the
process named: exit code 77.

The loop says where it is (`heartbeat`). A thread of each process watches that; after `limit_s`
without a heartbeat, or when a collective fails because another process is gone, the process writes
how far it has come, looks at what the others wrote, and exits. The one that has come least far is
the one the others waited for; one that writes nothing is dead.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from pathlib import Path

from ebwm_scale.core.console import say
from ebwm_scale.core.disk import remove_quietly, replace_text
from ebwm_scale.core.errors import EXIT_RANK_LOST
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.running_time import RunningTime

GATHER_S = 3.0  # for the reports of the others


class Watchdog:
    """limit_s 0: no watching for hangs; `lost` works all the same."""

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world_size: int,
        limit_s: float,
        faults: Faults | None = None,
    ):
        self.faults = faults or Faults(None, rank)
        self.folder = folder / "watch"
        self.rank = rank
        self.world_size = world_size
        self.limit_s = limit_s
        self.count = 0
        self.where = "start"
        self.stopped = threading.Event()
        remove_quietly(self._report_path(rank))  # of an earlier attempt in this folder
        if limit_s:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def heartbeat(self, where: str) -> None:
        """The loop has come to `where`."""
        self.count, self.where = self.count + 1, where

    def stop(self) -> None:
        self.stopped.set()

    def lost(self, reason: str) -> None:
        """Report, name the process that is to blame, and leave with 77. Does not return."""
        self.stopped.set()
        try:
            self.faults.through("write", self._write_report, reason)
            verdict = self._verdict()
        except OSError as error:
            verdict = f"no report could be written: {error}"
        say(
            f"rank {self.rank}: {reason} at {self.where}. {verdict} Stacks of all threads: "
            f"{self.folder}/stacks_rank_*.txt. "
            "Run again with --resume",
            error=True,
            every_rank=True,
        )
        os._exit(EXIT_RANK_LOST)

    def _write_report(self, reason: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"stacks_rank_{self.rank}.txt", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        mine = {"count": self.count, "where": self.where, "reason": reason}
        replace_text(self._report_path(self.rank), json.dumps(mine))

    def _watch(self) -> None:
        """Time in which this thread did not run does not count: whoever wakes from a suspension
        gets what was left of the limit."""
        every_s = min(1.0, self.limit_s / 4)
        running = RunningTime(every_s)
        seen = self.count
        still_s = 0.0
        while not self.stopped.wait(every_s):
            still_s += running.passed()
            if self.count != seen:
                seen, still_s = self.count, 0.0
            elif still_s > self.limit_s:
                self.lost(f"nothing has moved for {self.limit_s:g} s")

    def _verdict(self) -> str:
        deadline = time.monotonic() + GATHER_S
        reports: dict[int, dict] = {}
        while len(reports) < self.world_size and time.monotonic() < deadline:
            for rank in range(self.world_size):
                if rank not in reports and self._report_path(rank).exists():
                    reports[rank] = json.loads(self._report_path(rank).read_text(encoding="utf-8"))
            time.sleep(0.05)
        silent = [rank for rank in range(self.world_size) if rank not in reports]
        if silent:
            return f"Dead, or too stuck to say so: rank {', '.join(map(str, silent))}."
        behind = min(reports, key=lambda rank: reports[rank]["count"])
        if self.world_size == 1 or len({report["count"] for report in reports.values()}) == 1:
            return (
                "All ranks stand at the same place: the collective itself hangs, or this rank is "
                "alone."
            )
        return f"The others waited for rank {behind}, which is at {reports[behind]['where']}."

    def _report_path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank}.json"
