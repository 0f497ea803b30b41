"""A run as it is now: rows are read as they are written, and nothing is written into the run.

    run = LiveRun(folder)
    run.look()              reads what is new
    run.training, run.validation, run.last_save, run.state()

What is kept is the newest row of each kind, a few losses and counts, whatever the run's length.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebwm_scale.config.strict_yaml import parse_yaml
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.ownership import LEASE_S, described, lives, machine
from ebwm_scale.core.rows import MAX_LINE
from ebwm_scale.reporting.curves import number

NUM_LOSSES = 60  # newest ones, for a line that shows where they go
SMALL_FILE = 2**18  # bytes of config.yaml, of owner


class GrowingRows:
    """The objects of a .jsonl file that were not read yet; a file that became shorter was cut by a
    resume, and is read again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._end = 0

    def new(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._end:
                    self._end = 0
                file.seek(self._end)
                while (line := file.readline(MAX_LINE)).endswith(b"\n"):
                    self._end += len(line)
                    row = _object(line)
                    if row is not None:
                        yield row
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read: {error.strerror or error}; check the disk"
            ) from None


class LiveRun:
    """One run folder. look() brings everything up to date.

    training, validation: the newest row of each, empty before the first. losses: newest last.
    num_skipped: steps that updated nothing; num_warnings, last_warning; last_save: (step, seconds
    since then) of the newest checkpoint; best: the step of the best one.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such run folder; give the folder that train.py writes (--run-dir)"
            )
        self.folder = folder
        self.config = _mapping(folder / "config.yaml")
        self.training: dict[str, Any] = {}
        self.validation: dict[str, Any] = {}
        self.losses: deque[float] = deque(maxlen=NUM_LOSSES)
        self.num_skipped = 0
        self.num_warnings = 0
        self.last_warning = ""
        self.last_event: dict[str, Any] = {}
        self._metrics = GrowingRows(folder / "metrics.jsonl")
        self._events = GrowingRows(folder / "events.jsonl")

    def look(self) -> bool:
        """Read what is new; whether there was anything."""
        is_new = False
        if not self.config:
            self.config = _mapping(self.folder / "config.yaml")
        for row in self._metrics.new():
            is_new = True
            if row.get("split") == "validation":
                self.validation = row
            elif row.get("split") is None and isinstance(row.get("step"), int):
                if row["step"] <= self.training.get("step", -1):
                    self.losses.clear()  # steps that are made again after a resume
                self.training = row
                self.losses.append(number(row.get("loss")))
        for event in self._events.new():
            is_new = True
            name = event.get("event")
            self.num_skipped += name == "skipped"
            if name == "warning":
                self.num_warnings += 1
                self.last_warning = str(event.get("message", ""))
            else:
                self.last_event = event
        return is_new

    def setting(self, section: str, key: str) -> Any:
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def max_steps(self) -> int | None:
        steps = self.setting("train", "max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def last_save(self) -> tuple[int, float] | None:
        """(step, seconds ago) of the newest published checkpoint."""
        found = []
        for folder in (self.folder / "checkpoints").glob("step_*"):
            step = folder.name.removeprefix("step_")
            try:
                found.append((int(step), max(0.0, time.time() - folder.stat().st_mtime)))
            except (ValueError, OSError):
                continue  # no checkpoint of ours, or removed meanwhile
        return max(found, default=None)

    @property
    def best(self) -> int | None:
        """The step of the checkpoint that `best` names."""
        try:
            name = (self.folder / "checkpoints" / "best").read_text(errors="replace").strip()
            return int(name.removeprefix("step_"))
        except (ValueError, OSError):
            return None

    @property
    def is_over(self) -> bool:
        """Whether no process trains here any more."""
        return not self.state().startswith("running")

    def state(self) -> str:
        """In words: running, and where; finished; stopped; or gone without a word."""
        owner = self.folder / "owner"
        record = _mapping(owner)
        event = str(self.last_event.get("event", ""))
        if record:
            where = described(record)
            if record.get("machine") == machine():
                if lives(record.get("pid"), record.get("started")):
                    return f"running: {where}"
                return f"gone without a word: {where} is no process any more; --resume goes on"
            silent = _age(owner)
            if silent is not None and silent < LEASE_S:
                return f"running: {where}"
            if silent is not None:
                return f"not heard of for {silent:.0f} s: {where}"
        if event == "finish":
            return "finished"
        if event == "signal":
            return f"stopped ({self.last_event.get('reason')}); --resume goes on"
        if event == "not_finite":
            return "stopped: gradients were not finite several steps in a row"
        return "no process trains here"


def share_gained(losses: list[float]) -> float:
    """How far refinement lowers a loss: 1 - last / first; NaN where there is no such ratio."""
    if len(losses) < 2 or not losses[0] > 0:
        return math.nan
    return 1 - losses[-1] / losses[0]


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None  # torn by a kill: `ebwm report` counts such lines
    return value if isinstance(value, dict) else None


def _mapping(path: Path) -> dict[str, Any]:
    """A small file of YAML or JSON; empty where it cannot be read."""
    try:
        if path.stat().st_size > SMALL_FILE:
            return {}
        value = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except (OSError, ValueError, UserError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
