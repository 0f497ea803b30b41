"""attempts.jsonl of a run folder: when each attempt at the run began and ended, with what, and when
to give up.

    {"event": "begin", "attempt": 2, "job": "1234", "restart": 1, "host": "node7", "nodes": 2,
     "tasks": 16, "step": 400, "code": "0.1.0 1a2b3c4"}
    {"event": "end", "attempt": 2, "exit_code": 75, "outcome": "interrupted", "step": 900,
     "verdict": "again", "reason": "..."}

Each is one line of the file.

`step` is that of the newest checkpoint. An attempt without an end was lost with its node; the next
one writes its end. An attempt that published no new checkpoint made no progress. Two of these in a
row within a job, and the job gives up: what broke it will break it again. An attempt whose last
save failed (the run folder then holds a file `unsaved`) counts as one without progress, whatever it
published before. An interruption from outside (preemption, scancel --signal) long before the time
limit is not the job's doing and does not count. A `signal` row says that the batch step was told to
end, in case it is ended before it can write the rest; whatever its tasks end with then is an
interruption. Rows that cannot be written (a full disk) wait in memory, with one warning, and are
written with the next one that can be.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_scale.core.console import say
from ebwm_scale.core.disk import RowLog, remove_quietly, sync
from ebwm_scale.core.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_NOT_FINITE,
    EXIT_RUN_AGAIN,
)
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.ownership import UNSAVED
from ebwm_scale.core.rows import Rows

FRUITLESS_LIMIT = 2  # attempts in a row without progress
EXTERNAL_S = 600  # an interruption with more than this left of the time limit came from outside
INTERRUPTIONS = {
    EXIT_RUN_AGAIN,
    *(128 + number for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)),
}  # before its handlers stood, too


@dataclass(frozen=True)
class Verdict:
    """What to do next: done, again, or give up; and why."""

    what: str
    reason: str


class Attempts:
    """One attempt of `job` at the run in `folder`: begin() it, run, end() it."""

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job
        self.log = RowLog(folder / "attempts.jsonl", Faults(os.environ.get("EBWM_FAULTS"), -1))
        self.warned = False
        self.number, self.first_step = 0, None

    def begin(self, **facts: Any) -> Verdict:
        """Write the begin row.

        `give up` if earlier attempts of this job have used up the limit, a node failure included.
        """
        remove_quietly(self.folder / UNSAVED)  # of an attempt that has its end
        rows = self._rows()
        before = open_attempt(rows)
        if before is not None:
            told = next(
                (
                    row["signal"]
                    for row in reversed(rows)
                    if row["event"] == "signal" and row["attempt"] == before["attempt"]
                ),
                None,
            )
            host = before.get("host")
            if told:
                reason = f"{told} to the job on {host}, and its end came before the tasks'"
            else:
                reason = (
                    f"lost on {host}: the node failed, or the job was killed before it could say "
                    "why"
                )
            self._append(
                {
                    "event": "end",
                    "attempt": before["attempt"],
                    "job": before["job"],
                    "exit_code": None,
                    "outcome": "interrupted" if told else "lost",
                    "step": newest_step(self.folder),
                    "progress": _above(newest_step(self.folder), before["step"]),
                    "counts": told is None,
                    "verdict": "again",
                    "reason": reason,
                }
            )
        fruitless = self.fruitless()
        self.number = 1 + max((row["attempt"] for row in rows), default=0)
        self.first_step = newest_step(self.folder)
        if len(fruitless) >= FRUITLESS_LIMIT:
            self._append(
                {
                    "event": "end",
                    "attempt": fruitless[-1]["attempt"],
                    "job": self.job,
                    "exit_code": None,
                    "outcome": "gave up",
                    "step": self.first_step,
                    "progress": False,
                    "counts": False,
                    "verdict": "give up",
                    "reason": self._why(fruitless),
                }
            )
            return Verdict("give up", self._why(fruitless))
        self._append(
            {
                "event": "begin",
                "attempt": self.number,
                "job": self.job,
                "step": self.first_step,
                **facts,
            }
        )
        return Verdict("again", "")

    def signalled(self, name: str) -> None:
        """Note at once that the batch step itself was signalled: a preemption without grace time
        leaves no time for more.
        """
        self._append({"event": "signal", "attempt": self.number, "job": self.job, "signal": name})

    def end(self, code: int, *, seconds_left: float | None = None, detail: str = "") -> Verdict:
        """Write the end row of an exit code (128 + n: signal n) and return what to do.

        seconds_left: until the time limit, None if there is none.
        """
        rows = self._rows()
        if any(row["attempt"] > self.number for row in rows):
            return Verdict("again", "a later attempt has begun: this one was taken for lost")
        told = any(row["event"] == "signal" and row["attempt"] == self.number for row in rows)
        step = newest_step(self.folder)
        progress = _above(step, self.first_step)
        counts = True
        what = "again"
        outcome = "crashed"
        reason = f"{meaning(code)}{': ' if detail else ''}{detail}"
        if code == EXIT_FINISHED:
            outcome, what = "finished", "done"
        elif code in (EXIT_BAD_INPUT, EXIT_NOT_FINITE):
            outcome, what = "stopped", "give up"
        elif code == EXIT_FAILED and (self.folder / UNSAVED).exists():
            outcome, progress = "not saved", False
            reason = (
                "exit code 1 (the last save failed; the newest checkpoint is "
                f"{'none' if step is None else f'step {step}'}){': ' if detail else ''}{detail}"
            )
        elif (
            code in INTERRUPTIONS or told
            # told: without a grace time one task may be killed before another has saved, which then
            # ends with 77
        ):
            outcome = "interrupted"
            counts = seconds_left is not None and seconds_left < EXTERNAL_S
        row = {
            "event": "end",
            "attempt": self.number,
            "job": self.job,
            "exit_code": code,
            "outcome": outcome,
            "step": step,
            "progress": progress,
            "counts": counts,
            "verdict": what,
            "reason": reason,
        }
        fruitless = self.fruitless(row)
        if what == "again" and counts and len(fruitless) >= FRUITLESS_LIMIT:
            row.update(verdict="give up", reason=self._why(fruitless))
        self._append(row)
        return Verdict(row["verdict"], row["reason"])

    def fruitless(self, *further: dict) -> list[dict]:
        """The ends of this job's last attempts, back to the last one with progress, that count and
        made none.
        """
        found = []
        for row in reversed([*self._rows(), *further]):
            if row["event"] != "end":
                continue
            if row["job"] != self.job or row["progress"] or row["outcome"] == "gave up":
                break
            if row["counts"]:
                found.append(row)
        return found[::-1]

    def _why(self, fruitless: list[dict]) -> str:
        step = fruitless[-1]["step"]
        return (
            f"gave up: {len(fruitless)} attempts in a row ended without a checkpoint beyond "
            f"{'the start' if step is None else f'step {step}'}; the last one: "
            f"{fruitless[-1]['reason']}"
        )

    def _rows(self) -> list[dict]:
        """What the file holds, and what waits to be written to it."""
        return [*read_attempts(self.folder), *map(json.loads, self.log.waiting)]

    def _append(self, row: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.log.add({"time": now, **row})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            problem = self.log.flush()
            if problem is None:
                sync(self.log.path)
        except OSError as error:
            problem = error
        if problem is not None and not self.warned:
            self.warned = True
            say(
                f"warning: {self.log.path} could not be written ({problem.strerror or problem}); "
                "rows are kept and written as soon as that can be",
                error=True,
            )


def read_attempts(folder: Path) -> list[dict]:
    """Rows of attempts.jsonl, without unreadable lines; [] where there is none."""
    return list(Rows(folder / "attempts.jsonl"))


def open_attempt(rows: list[dict]) -> dict | None:
    """The begin row of the last attempt, if it has no end."""
    last = next((row for row in reversed(rows) if row["event"] != "signal"), None)
    return last if last is not None and last["event"] == "begin" else None


def newest_step(folder: Path) -> int | None:
    """Of the published checkpoints; also where `latest` could not be written after the last one."""
    checkpoints = folder / "checkpoints"
    steps = [step_of(path.name) for path in checkpoints.glob("step_*")]
    try:
        steps.append(step_of((checkpoints / "latest").read_text(encoding="utf-8").strip()))
    except (OSError, ValueError):
        pass  # none yet, or damaged: the folders are what counts
    return max((step for step in steps if step is not None), default=None)


def step_of(name: str) -> int | None:
    """Of a checkpoint folder's name; None for any other."""
    match = re.fullmatch(r"step_(\d{6,})", name)
    return int(match[1]) if match else None


def meaning(code: int) -> str:
    known = {
        0: "finished",
        2: "bad configuration or data",
        75: "saved, wants to be run again",
        76: "gradients were not finite several steps in a row",
        77: "a process hung or died",
        130: "interrupted in start-up",
        138: "signalled in start-up",
        143: "terminated in start-up",
    }
    if code in known:
        return f"exit code {code} ({known[code]})"
    if 128 < code < 160:
        return f"exit code {code} (a process was killed by {signal.Signals(code - 128).name})"
    return f"exit code {code}"


def _above(step: int | None, before: int | None) -> bool:
    return step is not None and (before is None or step > before)
