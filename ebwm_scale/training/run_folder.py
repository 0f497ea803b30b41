"""A run's folder: metrics.jsonl, events.jsonl, quarantine.jsonl, the console lines and trackers
(training/tracking/). Rank 0 writes; every step appears once.

A disk that is full, or takes no files any more, costs the run nothing here: rows wait in memory,
with one warning, and are written with the next one that can be.
"""

from __future__ import annotations

import datetime
import json
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ebwm_scale.config.schema import Config
from ebwm_scale.core.console import say
from ebwm_scale.core.disk import RowLog, remove_if_empty, replace_text, replacement
from ebwm_scale.core.errors import CheckpointError, ConfigError
from ebwm_scale.core.faults import Faults
from ebwm_scale.core.ownership import Ownership
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.core.redaction import redacted
from ebwm_scale.core.rows import Rows
from ebwm_scale.core.world import World
from ebwm_scale.training.tracking import Tracker, Trackers, check_trackers
from ebwm_scale.training.tracking.tensorboard import TensorBoard
from ebwm_scale.training.tracking.weights_and_biases import WeightsAndBiases

PAUSE_S = 5.0  # before what could not be written at the end is tried once more


class RunFolder:
    """On ranks other than 0 nothing is written; on rank 0 nothing before take()."""

    def __init__(
        self, path: Path, config: Config, world: World, faults: Faults, ownership: Ownership
    ):
        self.path = path
        self.config = config
        self.world = world
        self.faults, self.ownership = faults, ownership
        self.is_main = world.is_main
        self._logs = {
            name: RowLog(path / f"{name}.jsonl", faults)
            for name in ("metrics", "events", "quarantine")
        }
        self._warned = False
        self._num_rows = 0  # of metrics.jsonl
        self._trackers = Trackers([], self.warn, self.say)

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def take(self) -> None:
        """Become the process that writes here. On every rank: CheckpointError while another one
        lives that does, ConfigError where the folder cannot be written."""
        problem = None
        if self.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self.ownership.take()
                self._replace("config.yaml", self.config.to_yaml())
                self._trackers = Trackers(_trackers(self), self.warn, self.say)
            except OSError as error:
                reason = error.strerror or error
                problem = ConfigError(
                    f"{self.path} cannot be written ({reason}): free some space or mend its "
                    "permissions, or name another folder with --run-dir"
                )
            except (CheckpointError, ConfigError) as error:
                problem = error
            if problem is not None:
                self.ownership.release(unsaved=False)
                remove_if_empty(self.path)  # a refused run leaves no folder behind
        for of_rank in self.world.all_gather_object(problem):
            if of_rank is not None:
                raise of_rank

    def leave_if_taken_over(self) -> None:
        """End this process if a later one writes here: a node that was taken for dead, and its run
        started elsewhere, may come back."""
        self.ownership.leave_if_taken_over()

    def metrics(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite are written as null, since JSON has no word
        for them."""
        if self.is_main:
            self.leave_if_taken_over()
            row = _finite(row)
            self._append("metrics", row)
            self._trackers.log(self._num_rows, row)
            self._num_rows += 1

    def event(self, name: str, **fields: Any) -> None:
        if self.is_main:
            row = {"time": _now(), "event": name, **redacted(fields)}
            self._append("events", _finite(row))

    def quarantine(self, row: dict[str, Any]) -> None:
        if self.is_main:
            self._append("quarantine", redacted(row))

    def say(self, text: str) -> None:
        if self.is_main:
            say(text)

    def warn(self, text: str, **fields: Any) -> None:
        """One clear line on stderr, and an event."""
        if self.is_main:
            text = redacted(text)
            say(f"warning: {text}", error=True)
            self.event("warning", message=text, **fields)

    def write(self, name: str, value: Any) -> None:
        """A file of its own, or a warning."""
        if self.is_main:
            try:
                self._replace(name, json.dumps(value, indent=1, ensure_ascii=False))
            except OSError as error:
                self.warn(f"{self.path / name} could not be written ({error.strerror or error})")

    def rows_are_written(self) -> bool:
        """Whether every row so far is on disk, after another try and, if need be, a pause and one
        more; says on stderr what is not. True on ranks other than 0."""
        problems = self._flush()
        if problems:
            time.sleep(PAUSE_S)
            problems = self._flush()
        for name, error in problems.items():
            log = self._logs[name]
            say(
                f"warning: {len(log.waiting)} rows of {log.path} are NOT written "
                f"({error.strerror or error})",
                error=True,
            )
        return not problems

    def truncate_metrics(self, step: int) -> int | None:
        """Drop metric rows beyond `step`, which a resumed run logs again, and unreadable lines.

        Returns the last validated step that stays. Where they are the last ones, as ever, the file
        is cut, which needs no space; one row at a time is in memory. The trackers follow.
        """
        path = self.path / "metrics.jsonl"
        rows = Rows(path)
        validated = None
        self._num_rows = 0
        end = 0
        is_in_one_piece = True
        for start, line, row in _rows_until(rows, step):
            is_in_one_piece = is_in_one_piece and start == end
            end = start + len(line)
            self._num_rows += 1
            if row.get("split") == "validation":
                validated = row["step"]
        if self.is_main and not is_in_one_piece:
            self.faults.through("write", _keep_rows_until, path, step)
        elif self.is_main and path.exists() and end < path.stat().st_size:
            self.faults.through("write", os.truncate, path, end)
        # a killed process leaves a torn end; every other line of no use is worth a word
        if rows.unreadable > rows.torn:
            self.warn(rows.in_words())
        if self.is_main:
            self._trackers.catch_up(lambda: (row for _, _, row in _rows_until(rows, step)), step)
        return validated

    def close(self, *, unsaved: bool = False) -> None:
        """unsaved: the last save has failed."""
        self._trackers.finish()
        self._flush()
        self.ownership.release(unsaved=unsaved)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self._logs[name].add(row)
        problems = self._flush()
        if problems and not self._warned:
            self._warned = True
            name, error = next(iter(problems.items()))
            self.warn(
                f"{self._logs[name].path} could not be written ({error.strerror or error}); "
                "rows are kept and written as soon as that can be; free some space"
            )

    def _flush(self) -> dict[str, OSError]:
        """Write all that waits; the errors of logs that still have something waiting."""
        if not self.is_main:
            return {}
        problems = {name: log.flush() for name, log in self._logs.items()}
        return {name: error for name, error in problems.items() if error is not None}

    def _replace(self, name: str, text: str) -> None:
        self.faults.through("write", replace_text, self.path / name, text)


def _trackers(run: RunFolder) -> list[Tracker]:
    """Those that are asked for; the packages were looked for before (check_trackers)."""
    check_trackers(run.config)
    trackers: list[Tracker] = []
    if run.config.logging.tensorboard:
        trackers.append(TensorBoard(run.path))
    started = None if run.config.logging.wandb == "off" else _start_wandb(run)
    return trackers if started is None else [*trackers, started]


def _start_wandb(run: RunFolder) -> WeightsAndBiases | None:
    """A W&B run that keeps its id over resumes, or None: W&B cannot start it, which is a warning.
    No service that is down ends a training; metrics.jsonl has every row.
    """
    path, config = run.path, run.config
    settings = config.logging
    identity = path / "wandb_id"
    if not identity.exists():
        run._replace(identity.name, uuid.uuid4().hex[:12])
    name = identity.read_text().strip()
    is_offline = settings.wandb == "offline"
    try:
        import wandb

        started = wandb.init(
            project=settings.wandb_project,
            name=settings.run_name or path.name,
            id=name,
            resume="allow",
            mode="offline" if is_offline else "online",
            dir=str(path),
            config=redacted(config.to_dict()),
        )
        return WeightsAndBiases(started, path / "wandb", name, is_offline=is_offline)
    except Exception as error:  # noqa: BLE001  whatever its network, key or disk raises
        run.warn(
            f"logging.wandb is {settings.wandb}, but W&B did not start "
            f"({type(error).__name__}: {shorten(error, 300)}); this start goes on without it, and "
            "metrics.jsonl has every row. To track it: stop it, mend that, and run the same "
            "command with --resume"
        )
        return None


def _rows_until(rows: Rows, step: int) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """(where its line starts, the line, the row) of whole rows up to a step."""
    for start, line, row in rows.located():
        logged = row.get("step")
        if isinstance(logged, int) and logged <= step and line.endswith(b"\n"):
            yield start, line, row


def _keep_rows_until(path: Path, step: int) -> None:
    copy_metrics_until(path, path, step)


def copy_metrics_until(source: Path, target: Path, step: int) -> None:
    """Write the whole rows of a metrics.jsonl up to a step into `target`, which may be itself."""
    with replacement(target) as temporary, open(temporary, "wb") as file:
        file.writelines(line for _, line, _ in _rows_until(Rows(source), step))


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
