"""A throw-away real Slurm in one folder: munged, slurmctld and several slurmd of virtual nodes,
without systemd, /etc or /var.

    python tests/cluster/minislurm.py DIR

starts it, prints `export ...` lines and stays until SIGTERM or SIGINT. Needs root and the packages
PACKAGES (Debian, Ubuntu). Node names are loopback addresses, so that rendezvous works; GPUs are
null devices, so that a job is given CUDA_VISIBLE_DEVICES without there being a GPU. Partition
`high` preempts `main` with a grace time, and `harsh` without.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
FINAL = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

# There is no accounting database: enough of sacct for what submitit asks, from squeue.
SACCT = r"""#!/bin/bash
ids=()
while [ $# -gt 0 ]; do
    case "$1" in
        -j|--jobs) ids+=("$2"); shift;;
        -j*) ids+=("${1#-j}");;
        --jobs=*) ids+=("${1#*=}");;
    esac
    shift
done
echo "JobID|State|NodeList"
for j in "${ids[@]}"; do
    squeue --array --states=all --noheader --jobs="$j" --format='%i|%T|%N' 2>/dev/null
done
exit 0
"""

CONFIGURATION = """\
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/sock,cred_expire=5
CredType=cred/munge
SlurmctldPort={port}
FirstJobId={first_job}
SlurmctldPidFile={root}/ctld/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool-%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=10
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=3600
MessageTimeout=30
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=harsh Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=high Nodes=ALL Default=NO MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class MiniSlurm:
    def __init__(
        self, root: Path, *, nodes: int = 2, cpus: int = 64, memory_mb: int = 512000, gpus: int = 8
    ):
        self.root, self.nodes = (
            Path(root).resolve(),
            [f"127.0.0.{number + 1}" for number in range(nodes)],
        )
        self.cpus, self.memory_mb, self.gpus = cpus, memory_mb, gpus
        self.ports: list[int] = []
        self.configuration = self.root / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen] = {}

    @property
    def environment(self) -> dict[str, str]:
        """For the programs of this Slurm, and nothing of a Slurm around it."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))
        }
        return {
            **kept,
            "SLURM_CONF": str(self.configuration),
            "PATH": f"{self.root}/bin:/usr/sbin:/usr/bin:" + kept.get("PATH", ""),
        }

    def start(self, timeout: float = 30) -> MiniSlurm:
        self._write()
        socket_path = self.root / "munge/sock"
        self._spawn(
            "munged",
            "/usr/sbin/munged",
            "--foreground",
            f"--socket={socket_path}",
            f"--key-file={self.root}/munge/key",
            "--force",
            f"--pid-file={self.root}/munge/munged.pid",
            f"--log-file={self.root}/munge/munged.log",
            f"--seed-file={self.root}/munge/seed",
            "--num-threads=2",
        )
        self._until(socket_path.exists, timeout, "munged's socket")
        self._spawn("slurmctld", "/usr/sbin/slurmctld", "-D", "-c", "-f", str(self.configuration))
        for node in self.nodes:
            self.start_node(node)
        self._until(
            lambda: (
                sorted(
                    self.command(
                        "sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False
                    ).split()
                )
                == sorted(self.nodes)
            ),
            timeout,
            "idle nodes",
        )
        return self

    def start_node(self, node: str) -> None:
        self._spawn(
            f"slurmd-{node}",
            "/usr/sbin/slurmd",
            "-D",
            "-c",
            "-N",
            node,
            "-f",
            str(self.configuration),
        )

    def kill_node(self, node: str) -> None:
        """kill -9 of its slurmd."""
        daemon = self.daemons.pop(f"slurmd-{node}")
        daemon.kill()
        daemon.wait()

    def stop(self) -> None:
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            self.command("scancel", "-u", "root", check=False)
            end = time.monotonic() + 15
            while self.command("squeue", "-h", check=False) and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in self.daemons.values():
            if daemon.poll() is None:
                daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        self._reap()

    __enter__ = start

    def __exit__(self, *_) -> None:
        self.stop()

    def command(
        self, *arguments, check: bool = True, variables: dict[str, str] | None = None, **options
    ) -> str:
        """Output of a program run against this Slurm."""
        done = subprocess.run(
            [str(argument) for argument in arguments],
            env={**self.environment, **(variables or {})},
            text=True,
            capture_output=True,
            timeout=120,
            **options,
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{arguments}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout.strip()

    def submit(self, *arguments, **options) -> str:
        """sbatch; the job id."""
        return self.command("sbatch", "--parsable", *arguments, **options).split(";")[0]

    def states(self, job: str) -> list[str]:
        return self.command(
            "squeue", "--array", "--states=all", "-h", "-j", job, "-o", "%T", check=False
        ).split()

    def restarts(self, job: str) -> int:
        return int(
            self.command("scontrol", "show", "job", "--oneliner", job)
            .partition("Restarts=")[2]
            .split()[0]
        )

    def wait(self, job: str, timeout: float = 120) -> list[str]:
        """Until a job (each of an array) is over; its states."""
        end = time.monotonic() + timeout
        while True:
            states = self.states(job)
            if states and all(state in FINAL for state in states):
                return states
            if time.monotonic() > end:
                raise TimeoutError(f"job {job} is {states} after {timeout} s")
            time.sleep(0.2)

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.root,
            )

    def _until(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        end = time.monotonic() + timeout
        while not done():
            for name, daemon in list(self.daemons.items()):
                if daemon.poll() is not None:
                    self.stop()
                    raise RuntimeError(f"{name} ended with {daemon.returncode}: {self.root}/log")
            if time.monotonic() > end:
                self.stop()
                raise TimeoutError(f"no {what}: {self.root}/log")
            time.sleep(0.1)

    def _write(self) -> None:
        root = self.root
        for name in (
            "munge",
            "ctld",
            "log",
            "dev",
            "bin",
            *(f"spool-{node}" for node in self.nodes),
        ):
            (root / name).mkdir(parents=True, exist_ok=True)
        root.chmod(0o755)
        (root / "munge").chmod(0o755)
        (root / "ctld").chmod(0o700)
        (root / "munge/key").write_bytes(os.urandom(128))
        (root / "munge/key").chmod(0o400)
        port, *ports = _free_ports(1 + len(self.nodes))
        gpus = f" Gres=gpu:a100:{self.gpus}" if self.gpus else ""
        nodes = "\n".join(
            f"NodeName={node} NodeHostname=localhost NodeAddr={node} Port={port} CPUs={self.cpus} "
            f"RealMemory={self.memory_mb}{gpus} "
            "State=UNKNOWN"
            for node, port in zip(self.nodes, ports)
        )
        # Jobs of two clusters on one machine must not share an id: ports for the rendezvous follow
        # from it.
        self.configuration.write_text(
            CONFIGURATION.format(root=root, port=port, nodes=nodes, first_job=64 * port)
        )
        lines = (
            [
                f"NodeName={node} Name=gpu Type=a100 File={root}/dev/nvidia[0-{self.gpus - 1}]"
                for node in self.nodes
            ]
            if self.gpus
            else []
        )
        (root / "gres.conf").write_text("\n".join(["AutoDetect=off", *lines, ""]))
        for number in range(self.gpus):  # character devices, or CUDA_VISIBLE_DEVICES is not set
            if not (root / f"dev/nvidia{number}").exists():
                os.mknod(root / f"dev/nvidia{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (root / "bin/sacct").write_text(SACCT)
        (root / "bin/sacct").chmod(0o755)

    def _reap(self) -> None:
        """End by pid what is left of this Slurm: everything that was started with its
        configuration.
        """
        mark = f"SLURM_CONF={self.configuration}".encode()
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                try:
                    if mark in (folder / "environ").read_bytes().split(b"\0"):
                        os.kill(int(folder.name), signal.SIGKILL)
                except OSError:
                    continue


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with MiniSlurm(Path(sys.argv[1])) as slurm:
        print(f"export SLURM_CONF={slurm.configuration} PATH={slurm.root}/bin:$PATH", flush=True)
        signal.pause()
