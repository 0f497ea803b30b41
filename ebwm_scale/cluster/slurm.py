"""The few questions to Slurm, and the one request: requeue. All through its command-line programs."""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from typing import Iterator, Mapping

from ..errors import ConfigError

PORTS = range(20000, 30000)  # below the range that systems hand out by themselves
QUESTION_S = 60


@dataclass(frozen=True)
class Allocation:
    """What a job's batch step was given."""

    job: str
    restart: int
    num_nodes: int
    tasks_per_node: int
    cpus_per_task: int
    node_list: str
    why_tasks: str  # where tasks_per_node comes from

    @property
    def num_tasks(self) -> int:
        return self.num_nodes * self.tasks_per_node

    def ports(self) -> Iterator[int]:
        """To try for the rendezvous; the first one is another for each job, and for each attempt of it."""
        first = int(self.job) + 1009 * self.restart
        return (PORTS[(first + number) % len(PORTS)] for number in range(len(PORTS)))


def allocation(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """The allocation this process runs in; None outside a job.

    One task per GPU. Whoever asks sbatch for --ntasks-per-node or --ntasks gets these: on nodes without GPUs, the only way to several tasks.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", "1"))
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if environment.get("SLURM_NTASKS_PER_NODE"):
        tasks, why = int(environment["SLURM_NTASKS_PER_NODE"]), "--ntasks-per-node"
    elif environment.get("SLURM_NTASKS"):
        total = int(environment["SLURM_NTASKS"])
        if total % nodes:
            raise ConfigError(
                f"--ntasks {total} does not divide over {nodes} nodes; ask for --ntasks-per-node, or for neither: one task per GPU then"
            )
        tasks, why = total // nodes, "--ntasks"
    elif gpus:
        tasks, why = gpus, f"{gpus} GPUs on a node"
    else:
        tasks, why = 1, "no GPU on a node"
    cpus = int(
        environment.get("SLURM_CPUS_PER_TASK")
        or max(1, int(environment.get("SLURM_CPUS_ON_NODE") or 1) // tasks)
    )
    return Allocation(
        environment["SLURM_JOB_ID"],
        int(environment.get("SLURM_RESTART_COUNT") or 0),
        nodes,
        tasks,
        cpus,
        environment.get("SLURM_JOB_NODELIST", ""),
        why,
    )


def hostnames(node_list: str) -> list[str]:
    return _ask("scontrol", "show", "hostnames", node_list).split()


@dataclass(frozen=True)
class JobState:
    """state COMPLETING: Slurm is ending the job, and does not say why; timed_out: because its time is over."""

    state: str
    restarts: int
    seconds_left: float | None  # None: no limit
    timed_out: bool


def job_state(job: str) -> JobState | None:
    """None if Slurm does not know it (any more), or does not answer."""
    try:
        text = _ask("scontrol", "show", "job", "--oneliner", job)
    except (OSError, subprocess.SubprocessError):
        return None
    facts = {
        key: match[1]
        for key in ("JobState", "Restarts", "StartTime", "EndTime", "TimeLimit")
        if (match := re.search(rf"\b{key}=(\S+)", text))
    }
    if not {"JobState", "Restarts"} <= facts.keys():
        return None
    start, end, limit = (
        _seconds_of(facts.get("StartTime", "")),
        _seconds_of(facts.get("EndTime", "")),
        _limit_s(facts.get("TimeLimit", "")),
    )
    return JobState(
        facts["JobState"],
        int(facts["Restarts"]),
        None if start is None or limit is None else start + limit - time.time(),
        facts["JobState"] == "TIMEOUT"
        or (
            None not in (start, end, limit)
            and end - start >= limit
            and time.time() >= start + limit
        ),
    )


def requeue(job: str, restart: int) -> str | None:
    """Put the job back into the queue; None when done, otherwise why not.

    Only if Slurm still holds this attempt for the running one: after a node failure or a preemption it has requeued the job itself, and
    a second request would end the attempt that runs by then. What was cancelled stays so.
    """
    now = job_state(job)
    if now is None:
        return "Slurm does not answer"
    if now.restarts != restart or now.state in ("PENDING", "REQUEUED"):
        return "Slurm has requeued it already"
    if now.state != "RUNNING" and not now.timed_out:
        return f"Slurm is ending the job itself ({now.state}): it was cancelled, or it is put back into the queue without our asking"
    try:
        _ask("scontrol", "requeue", job)
    except subprocess.CalledProcessError as error:
        return f"scontrol requeue: {error.stderr.strip()}"
    return None


def queue() -> dict[str, str]:
    """State of each of this user's jobs that Slurm remembers, by job id; array tasks under both their ids. {} where there is no Slurm."""
    try:
        lines = _ask(
            "squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%A|%T"
        ).splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return {job: state for line in lines for *jobs, state in [line.split("|")] for job in jobs}


def _ask(*command: str) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=QUESTION_S
    ).stdout


def _seconds_of(stamp: str) -> float | None:
    try:
        return time.mktime(time.strptime(stamp, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def _limit_s(text: str) -> float | None:
    """[days-]hours:minutes:seconds, or UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    return (
        None
        if match is None
        else sum(int(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1)))
    )
