"""The few questions to Slurm, and the one request: requeue.

All through its command-line programs.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.processes import number

PORTS = range(20000, 30000)  # below the range that systems hand out by themselves
QUESTION_S = 60


# Kept of a job's variables where another job is submitted from inside it: which Slurm is asked, and
# the token by which sites without munge know the user. All others describe the outer job, and
# sbatch would hand them to the new one, whose srun obeys them.
KEPT = ("SLURM_CONF", "SLURM_JWT")

# What srun takes for its own options, and a job may have from the one that it was submitted from.
OF_OUTER_JOB = re.compile(
    "SLURM_(NTASKS.*|NPROCS|CPUS_PER_TASK|MEM_PER_.*|CPU_BIND.*|MEM_BIND.*|DISTRIBUTION|GPUS_PER_TASK)"
)


@dataclass(frozen=True)
class Allocation:
    """What a job's batch step was given."""

    job: str
    restart: int
    tasks_on_nodes: tuple[int, ...]  # one number per node
    cpus_per_task: int
    node_list: str
    why_tasks: str  # where the numbers of tasks come from
    gpus_per_node: int = 0

    @property
    def num_nodes(self) -> int:
        return len(self.tasks_on_nodes)

    @property
    def num_tasks(self) -> int:
        return sum(self.tasks_on_nodes)

    @property
    def tasks_per_node(self) -> int:
        """On the node with the most."""
        return max(self.tasks_on_nodes)

    def ports(self) -> Iterator[int]:
        """To try for the rendezvous; the first one is another for each job, and for each attempt of
        it.
        """
        first = int(self.job) + 1009 * self.restart
        return (PORTS[(first + number) % len(PORTS)] for number in range(len(PORTS)))


def allocation(environment: Mapping[str, str] = os.environ) -> Allocation | None:
    """The allocation this process runs in; None outside a job.

    One task per GPU. Whoever asks sbatch for --ntasks-per-node or --ntasks gets these: on nodes
    without GPUs, the only way to several tasks.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    if not re.fullmatch("[0-9]{1,12}", environment["SLURM_JOB_ID"]):
        raise ConfigError(f"SLURM_JOB_ID is {shown(environment['SLURM_JOB_ID'])}: no job's id")
    own = {key: value for key, value in environment.items() if key not in inherited(environment)}
    asked = counts_of_nodes(own, "SLURM_NTASKS_PER_NODE")
    nodes = number(own, "SLURM_JOB_NUM_NODES", len(asked) or 1)
    gpus = gpus_of_node(own)
    total = number(own, "SLURM_NTASKS", 0)
    if asked:
        if len(set(asked)) == 1:
            asked = asked[:1] * nodes
        if len(asked) != nodes:
            raise ConfigError(
                f"SLURM_NTASKS_PER_NODE is {shown(own['SLURM_NTASKS_PER_NODE'])}, tasks for "
                f"{len(asked)} nodes, but the job has {nodes}; ask sbatch for --ntasks-per-node"
            )
        tasks, why = tuple(asked), "--ntasks-per-node"
    elif total:
        if total % nodes:
            raise ConfigError(
                f"--ntasks {total} does not divide over {nodes} nodes; ask for --ntasks-per-node, "
                "or for neither: one task per GPU then"
            )
        tasks, why = (total // nodes,) * nodes, "--ntasks"
    elif gpus:
        tasks, why = (gpus,) * nodes, f"{gpus} GPUs on a node"
    else:
        tasks, why = (1,) * nodes, "no GPU on a node"
    cpus = number(own, "SLURM_CPUS_PER_TASK", 0)
    cpus = cpus or max(1, number(own, "SLURM_CPUS_ON_NODE", 1) // max(tasks))
    return Allocation(
        job=own["SLURM_JOB_ID"],
        restart=number(own, "SLURM_RESTART_COUNT", 0),
        tasks_on_nodes=tasks,
        cpus_per_task=cpus,
        node_list=own.get("SLURM_JOB_NODELIST", ""),
        why_tasks=why,
        gpus_per_node=gpus,
    )


def idle_gpus(tasks_per_node: int, gpus_per_node: int) -> str | None:
    """A warning where GPUs are paid for and not used; None where there is none to give."""
    if tasks_per_node >= gpus_per_node:
        return None
    return (
        f"warning: {tasks_per_node} task{'' if tasks_per_node == 1 else 's'} for {gpus_per_node} "
        f"GPUs on a node: {gpus_per_node - tasks_per_node} stay idle. Ask for as many tasks as "
        f"GPUs (--ntasks-per-node={gpus_per_node}), or for fewer GPUs"
    )


def counts_of_nodes(environment: Mapping[str, str], name: str) -> list[int]:
    """One number per node: "4", "4(x2)", "4(x2),3"; [] where the variable is absent or empty."""
    text, counts = environment.get(name, "").strip(), []
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part.strip())
        if match is None or int(match[1]) == 0:
            raise ConfigError(
                f"{name} is {shown(text)}: must be like 4, 4(x2) or 4(x2),3, and no 0"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def gpus_of_node(environment: Mapping[str, str]) -> int:
    """SLURM_GPUS_ON_NODE, which some versions write as a count and others with its kind: "8",
    "gpu:4", "gpu:a100:2(S:0-1),gpu:h100:2"."""
    text, gpus = environment.get("SLURM_GPUS_ON_NODE", "").strip(), 0
    for part in re.split(r",(?![^(]*\))", text) if text else ():
        match = re.fullmatch(r"(?:[\w.-]+:)*(\d{1,6})(?:\([^()]*\))?", part.strip())
        if match is None:
            raise ConfigError(
                f"SLURM_GPUS_ON_NODE is {shown(text)}: must be like 4, gpu:4 or gpu:a100:4"
            )
        gpus += int(match[1])
    return gpus


def inherited(environment: Mapping[str, str] = os.environ) -> set[str]:
    """Variables that the shell of another job gave to this one on a plain `sbatch`, and that say
    nothing about this job.

    Slurm itself writes SLURM_TASKS_PER_NODE. Numbers of tasks that contradict it were asked for
    elsewhere; then so were the others of their kind. A list of CPUs to bind to is a step's: sbatch
    has no such option.
    """
    granted = counts_of_nodes(environment, "SLURM_TASKS_PER_NODE")
    per_node = counts_of_nodes(environment, "SLURM_NTASKS_PER_NODE")
    asked = number(environment, "SLURM_NTASKS", 0)
    if granted and ((per_node and max(per_node) != max(granted)) or asked not in (0, sum(granted))):
        return {name for name in environment if OF_OUTER_JOB.fullmatch(name)}
    if "SLURM_CPU_BIND_LIST" in environment:
        return {name for name in environment if name.startswith("SLURM_CPU_BIND")}
    return set()


def leave_job(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make ready to submit: nothing of a job around this process reaches the new one. slurm/job.sh
    does the same."""
    for name in [name for name in environment if name.startswith("SLURM_") and name not in KEPT]:
        del environment[name]


def hostnames(node_list: str) -> list[str]:
    return _ask("scontrol", "show", "hostnames", node_list).split()


@dataclass(frozen=True)
class JobState:
    """state COMPLETING: Slurm is ending the job, and does not say why; timed_out: because its time
    is over.
    """

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
    start = _seconds_of(facts.get("StartTime", ""))
    end = _seconds_of(facts.get("EndTime", ""))
    limit = _limit_s(facts.get("TimeLimit", ""))
    left_s = None
    timed_out = facts["JobState"] == "TIMEOUT"
    if start is not None and limit is not None:
        left_s = start + limit - time.time()
        if end is not None and end - start >= limit and left_s <= 0:
            timed_out = True
    return JobState(facts["JobState"], int(facts["Restarts"]), left_s, timed_out)


def requeue(job: str, restart: int) -> str | None:
    """Put the job back into the queue; None when done, otherwise why not.

    Only if Slurm still holds this attempt for the running one: after a node failure or a preemption
    it has requeued the job itself, and a second request would end the attempt that runs by then.
    What was cancelled stays so.
    """
    now = job_state(job)
    if now is None:
        return "Slurm does not answer"
    if now.restarts != restart or now.state in ("PENDING", "REQUEUED"):
        return "Slurm has requeued it already"
    if now.state != "RUNNING" and not now.timed_out:
        return (
            f"Slurm is ending the job itself ({now.state}): it was cancelled, or it is put back "
            "into the queue without our asking"
        )
    try:
        _ask("scontrol", "requeue", job)
    except subprocess.CalledProcessError as error:
        return f"scontrol requeue: {error.stderr.strip()}"
    return None


def queue() -> dict[str, str]:
    """State of each of this user's jobs that Slurm remembers, by job id; array tasks under both
    their ids. {} where there is no Slurm.
    """
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
    if match is None:
        return None
    return sum(int(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1)))
