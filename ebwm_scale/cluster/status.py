"""What has become of runs that were launched: one line each, from their folders and the queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_scale.cluster.attempts import newest_step, read_attempts
from ebwm_scale.cluster.request import read_request, read_runs_of_sweep
from ebwm_scale.cluster.slurm import queue
from ebwm_scale.config.load import load_config
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.core.rows import Rows

UNFINISHED = ("failed", "lost")  # what --resubmit starts again


@dataclass(frozen=True)
class RunStatus:
    folder: Path
    state: str  # waiting, running, requeued, finished, failed, lost
    attempts: int
    step: int | None  # logged last
    max_steps: int
    loss: float | None
    job: str
    note: str


def runs_in(folder: Path) -> list[Path]:
    """Run folders of a sweep, or the folder of a single run."""
    if (folder / "launch.json").exists():
        return [folder]
    if (folder / "sweep.json").exists():
        return [folder / name for name in read_runs_of_sweep(folder)]
    raise UserError(
        f"{folder} holds neither a run nor a sweep of python -m ebwm_scale.launch (no "
        "launch.json, no sweep.json)"
    )


def status_of(folder: Path) -> list[RunStatus]:
    known = queue()
    return [_status(run, known) for run in runs_in(folder)]


def _row(run: RunStatus) -> tuple[str, ...]:
    return (
        printable(run.folder.name),
        run.state,
        f"{run.step or 0}/{run.max_steps}",
        "" if run.loss is None else f"{run.loss:.4f}",
        str(run.attempts),
        run.job,
        printable(run.note),
    )


def table(runs: list[RunStatus]) -> str:
    rows = [("run", "state", "step", "loss", "attempts", "job", "")]
    rows += [_row(run) for run in runs]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[6]]).rstrip()
        for row in rows
    ]
    counts = {
        state: sum(run.state == state for run in runs)
        for state in dict.fromkeys(run.state for run in runs)
    }
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])


def _status(folder: Path, known: dict[str, str]) -> RunStatus:
    request = read_request(folder)
    rows = read_attempts(folder)
    job = (request.get("jobs") or ["none"])[-1]
    state, note = _state(folder, request, rows, job, known)
    step, loss = _last_logged(folder)
    return RunStatus(
        folder,
        state,
        len({row["attempt"] for row in rows}),
        step,
        load_config(folder / "config.yaml").train.max_steps,
        loss,
        job,
        note,
    )


def _state(
    folder: Path, request: dict[str, Any], rows: list[dict], job: str, known: dict[str, str]
) -> tuple[str, str]:
    submitted = len(request.get("jobs", []))
    rows = rows[request.get("rows_before", 0) :]  # since it was submitted last
    local = request["cluster"] == "local"
    queued = known.get(job, "")
    if local:
        queued = "RUNNING" if _alive(job) else ""
    last = next((row for row in reversed(rows) if row["event"] != "signal"), None)
    if submitted == 0:
        return "lost", "was prepared, but not submitted"
    if last is not None and last["event"] == "end" and last["verdict"] != "again":
        return ("finished", "") if last["verdict"] == "done" else ("failed", last["reason"])
    if queued in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING"):
        return ("waiting", "") if last is None else ("requeued", last.get("reason", ""))
    if queued in ("RUNNING", "COMPLETING", "SUSPENDED"):
        if local and last is None:
            return "waiting", ""
        has_begun = last is not None and len(rows) > 1
        return "running", f"from step {newest_step(folder) or 0}" if has_begun else ""
    if last is None:
        why = f": {queued}" if queued else ""
        logs = f"{folder.parent}/submitit* or {folder}/submitit*"
        return "lost", f"never began{why}; see the log in {logs}"
    why = f" ({queued})" if queued else ""
    reason = last.get("reason") or "ended without a word"
    return "lost", f"{reason}{why}; not in the queue any more"


def _alive(job: str) -> bool:
    """Whether a local job's process is there, on this machine."""
    try:
        arguments = Path(f"/proc/{job}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in arguments


def _last_logged(folder: Path) -> tuple[int | None, float | None]:
    step = loss = None
    for row in Rows(folder / "metrics.jsonl"):
        if "split" not in row and isinstance(row.get("step"), int):
            step, loss = row["step"], row.get("loss")
    return step, loss
