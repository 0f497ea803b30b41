"""The tasks of one attempt: srun over an allocation, or plain processes on this machine.

Each rank writes logs/rank_0000.log of the run folder.

When the first task has ended, the others get GRACE_S to end too, then they are ended: a task that
died takes the attempt with it, while those that have saved together also leave together. The exit
code is the largest one, 128 + n for a task that signal n ended.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ebwm_scale.cluster.slurm import PORTS, Allocation, hostnames, inherited
from ebwm_scale.core.errors import UserError
from ebwm_scale.core.running_time import RunningTime

GRACE_S = 30
LOOK_S = 0.1


class SlurmTasks:
    """srun in a session of its own, so that a signal to the batch step does not make it end the
    tasks while they save.
    """

    def __init__(self, allocation: Allocation, command: Sequence[str], logs: Path):
        host = hostnames(allocation.node_list)[0]
        self.variables = {
            "MASTER_ADDR": host,
            "MASTER_PORT": str(_free_port(allocation.ports())),
            "LOCAL_WORLD_SIZE": str(allocation.tasks_per_node),
        }
        self.command = [*srun_options(allocation, logs), *command]
        logs.mkdir(parents=True, exist_ok=True)
        foreign = inherited()
        own = {key: value for key, value in os.environ.items() if key not in foreign}
        self.process = subprocess.Popen(
            self.command, env={**own, **self.variables}, start_new_session=True
        )

    def wait(self) -> int:
        code = self.process.wait()
        return code if code >= 0 else 128 - code

    def send(self, number: int) -> None:
        """Slurm signals the tasks itself."""


def srun_options(allocation: Allocation, logs: Path) -> list[str]:
    log = str(logs).replace("%", "%%") + "/rank_%4t.log"  # srun reads % in file names
    even = [f"--ntasks-per-node={allocation.tasks_per_node}"]
    if len(set(allocation.tasks_on_nodes)) > 1:
        even = []  # srun then lays them out as it laid out the job
    return [
        "srun",
        f"--nodes={allocation.num_nodes}",
        f"--ntasks={allocation.num_tasks}",
        *even,
        f"--cpus-per-task={allocation.cpus_per_task}",
        f"--wait={GRACE_S}",
        "--kill-on-bad-exit=0",
        "--open-mode=append",
        f"--output={log}",
        f"--error={log}",
    ]


class LocalTasks:
    """The same on one machine without Slurm."""

    def __init__(self, num_tasks: int, command: Sequence[str], logs: Path):
        self.command, self.processes = list(command), []
        logs.mkdir(parents=True, exist_ok=True)
        place = {
            "WORLD_SIZE": str(num_tasks),
            "LOCAL_WORLD_SIZE": str(num_tasks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port([0])),
        }
        for rank in range(num_tasks):
            with open(logs / f"rank_{rank:04d}.log", "ab") as log:
                self.processes.append(
                    subprocess.Popen(
                        self.command,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )

    def wait(self, timeout: float = float("inf")) -> int:
        """timeout: seconds after which all are ended, without those in which this machine was
        suspended."""
        running = RunningTime(LOOK_S)
        waited_s = 0.0
        grace_s = 0.0
        while any(process.poll() is None for process in self.processes):
            passed_s = running.passed()
            waited_s += passed_s
            if any(process.returncode is not None for process in self.processes):
                grace_s += passed_s
            if waited_s > timeout or grace_s > GRACE_S:
                self.send(signal.SIGKILL)
            time.sleep(LOOK_S)
        return max(
            code if code >= 0 else 128 - code
            for code in (process.returncode for process in self.processes)
        )

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def last_words(logs: Path) -> str:
    """The last line of those logs that do not end like rank 0's: usually where an error is."""
    lines = {}
    for path in sorted(logs.glob("rank_*.log")):
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            text = [
                line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()
            ]
        if text:
            lines.setdefault(text[-1].strip()[:300], path.name)
    return "; ".join(f"{name} ends with {line!r}" for line, name in list(lines.items())[:3])


def printed(command: Sequence[str]) -> str:
    return shlex.join(command)


def _free_port(candidates: Iterable[int]) -> int:
    """The first of them that nothing listens on here; the batch step runs on the node of rank 0.

    0: the system's choice.
    """
    for port in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise UserError(
        f"no free port between {PORTS[0]} and {PORTS[-1]} on {socket.gethostname()} for the tasks "
        "to meet at; end what holds them"
    )
