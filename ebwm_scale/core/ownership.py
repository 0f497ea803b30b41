"""Who may write to a run folder: one process at a time, the one that `owner` names.

    {"host": "node7", "pid": 4242, "started": "88117", "machine": "...", "job": "1234",
     "restart": 0, "since": "2026-01-31T12:00:00+00:00", "token": "..."}

The owner touches the file every HEARTBEAT_S. A newcomer is refused while the owner lives, and takes
the folder over once it does not, without anybody's help: requeued jobs must go on by themselves.
The owner is over

    where the file is gone: it has left
    where it is an earlier start of the same Slurm job: Slurm had ended it, or given up its node
    on the same machine, where no process has its number and its start time
    elsewhere, where its file has not been touched for LEASE_S while the newcomer looked on; clocks
    of two machines are never compared

A process that was taken for dead and comes back finds another name in the file, and leaves.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from ebwm_scale.core.console import say
from ebwm_scale.core.disk import remove_quietly, replace_text
from ebwm_scale.core.errors import EXIT_RANK_LOST, CheckpointError
from ebwm_scale.core.faults import Faults

HEARTBEAT_S = 5.0
LEASE_S = 30.0  # without a heartbeat; six of them
NUM_LOOKS = 30  # of a newcomer, over that time
SETTLE_S = 0.2  # for another newcomer that has found the same owner to be over
NAME = "owner"
UNSAVED = "unsaved"  # what `owner` is called once its process has left without its last save


class Ownership:
    """Of one run folder, by rank 0 of this start."""

    def __init__(self, folder: Path, faults: Faults):
        self.folder = folder
        self.path = folder / NAME
        self.faults = faults
        self.token = uuid.uuid4().hex
        self.job = os.environ.get("SLURM_JOB_ID", "")
        self.restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self.held = threading.Event()
        # the owner that was watched to its end, by token and last sign of life
        self.over: tuple[str | None, int | None] | None = None

    def refuse_if_in_use(self, *, watch_aloud: bool = True) -> None:
        """CheckpointError while another process that lives owns the folder. Writes nothing."""
        try:
            owner = self._read()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({error.strerror or error}), so whether another "
                "process writes there is not known; mend that, or name another folder with "
                "--run-dir"
            ) from None
        if owner is None or owner.get("token") == self.token or self._is_over(owner, watch_aloud):
            return
        raise CheckpointError(
            f"{self.folder} is in use by {described(owner)}, since {owner.get('since', '?')}: "
            "wait for it, end it, or name another folder with --run-dir"
        )

    def take(self) -> None:
        """Own the folder from here on; CheckpointError if another process does, OSError where
        that cannot be written."""
        self.refuse_if_in_use()
        record = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "machine": machine(),
            "job": self.job,
            "restart": self.restart,
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "token": self.token,
        }
        self.faults.through("write", replace_text, self.path, json.dumps(record))
        time.sleep(SETTLE_S)
        self.refuse_if_in_use()  # the later of two newcomers has it
        remove_quietly(self.folder / UNSAVED)
        self.held.set()
        atexit.register(self.release, unsaved=False)  # also when an error ends this process
        threading.Thread(target=self._heartbeat, daemon=True, name="heartbeat").start()

    def leave_if_taken_over(self) -> None:
        """End this process if another one has taken the folder; nothing before take()."""
        if not self.held.is_set():
            return
        try:
            owner = self._read()
        except OSError:
            return  # a disk that does not answer is nobody's taking over
        if owner is not None and owner.get("token") != self.token:
            say(
                f"{self.folder} was taken over by the process {described(owner)}; this one ends "
                "and writes nothing more",
                error=True,
                every_rank=True,
            )
            os._exit(EXIT_RANK_LOST)

    def release(self, *, unsaved: bool) -> None:
        """Leave the folder to whoever comes. unsaved: the work since the newest checkpoint is lost;
        said by a rename, for which a full disk has room."""
        if not self.held.is_set():
            return
        self.held.clear()
        if not unsaved:
            remove_quietly(self.path)
            return
        try:
            os.replace(self.path, self.folder / UNSAVED)
        except OSError:
            pass  # then the attempt counts as any that ended with this code

    def _heartbeat(self) -> None:
        while self.held.is_set():
            self.leave_if_taken_over()
            try:
                os.utime(self.path)
            except OSError:
                pass  # a file system that does not answer now may do so before the lease is over
            time.sleep(HEARTBEAT_S)

    def _read(self) -> dict[str, Any] | None:
        """What the file says; None where there is none. A text of another release is its host."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("restart"), int):
            return record
        return {"host": text[:80]}

    def _is_over(self, owner: dict[str, Any], watch_aloud: bool) -> bool:
        if self.job and owner.get("job") == self.job and owner["restart"] < self.restart:
            return True
        if owner.get("machine") == machine():
            return not lives(owner.get("pid"), owner.get("started"))
        heartbeat = self._last_heartbeat()
        if self.over == (owner.get("token"), heartbeat):
            return True
        if watch_aloud:
            say(
                f"{self.folder} was in use by {described(owner)}; waiting {LEASE_S:g} s for a sign "
                "of life"
            )
        for _ in range(NUM_LOOKS):  # counted, not timed: both may have been suspended meanwhile
            time.sleep(LEASE_S / NUM_LOOKS)
            now = self._last_heartbeat()
            if now is None:
                return True
            if now != heartbeat:
                return False
        self.over = (owner.get("token"), heartbeat)
        return True

    def _last_heartbeat(self) -> int | None:
        """When the file was touched, by the clock of the disk's machine; opened, since a network
        file system asks its server only then."""
        try:
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None


def described(owner: dict[str, Any]) -> str:
    """HOST PID, and the job where there is one."""
    job = owner.get("job")
    return " ".join(
        str(part)[:80] for part in (owner.get("host", "?"), owner.get("pid", "")) if part != ""
    ) + (f" (job {str(job)[:20]})" if job else "")


def machine() -> str:
    """Two processes for which this is the same see each other's process numbers."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass  # not Linux: the host's name has to do
    return " ".join(parts)


def started(pid: int) -> str | None:
    """When the process began, in the kernel's ticks since it did; None where that cannot be known,
    "" where there is no such process, or only its exit code."""
    if not Path("/proc/self/stat").exists():
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def lives(pid: Any, since: str | None) -> bool:
    """Whether the process that had this number and start time is there, on this machine."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    now = started(pid)
    if now is not None:
        return now != "" and since in (None, now)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
