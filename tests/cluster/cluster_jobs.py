"""A real Slurm on virtual nodes of this machine, and jobs on it as users submit them.

Skipped, with the reason, without root or apt.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from minislurm import FINAL, PACKAGES, MiniSlurm

ROOT = Path(__file__).resolve().parents[2]
SECRET = "0123456789abcdef0123456789abcdef01234567"  # as WANDB_API_KEY
AWKWARD = "a  b \"c\" 'd' $(touch pwned) `touch pwned` ${HOME} \\ * ; # & | é\nsecond line"

sys.path.append(str(ROOT / "tests" / "training"))
import training_runs  # noqa: E402

same = training_runs.same


def install_slurm() -> str | None:
    """Why there can be no Slurm here; None when there is one.

    Installs the packages where root and apt allow it.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of its own needs root on Linux"
    with open(Path(tempfile.gettempdir()) / "ebwm_install_slurm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes beside this one want the same
        if all(Path("/usr/sbin", name).exists() for name in ("slurmctld", "slurmd", "munged")):
            return None
        if shutil.which("apt-get") is None:
            return (
                f"a Slurm of its own needs the packages {', '.join(PACKAGES)}, and there is no "
                "apt-get"
            )
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-q"],
            ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES],
        ):
            try:
                subprocess.run(
                    command, env=quiet, check=True, capture_output=True, text=True, timeout=240
                )
            except (subprocess.SubprocessError, OSError) as error:
                return (
                    f"{' '.join(command)} failed: "
                    f"{(getattr(error, 'stderr', None) or str(error)).strip().splitlines()[-1]}"
                )
    return None


class Jobs:
    """sbatch slurm/pretrain_nlp.sh with the tiny configuration; a folder, a site file per job."""

    def __init__(self, slurm: MiniSlurm, folder: Path, manifest: Path):
        self.slurm, self.folder, self.manifest = slurm, folder, manifest

    def variables(self, name: str) -> dict[str, str]:
        path = os.pathsep.join(
            [
                f"{self.slurm.root}/bin",
                str(Path(sys.executable).parent),
                os.environ["PATH"],
                "/usr/sbin",
                "/usr/bin",
            ]
        )
        return {
            "EBWM_SITE": str(self.folder / f"{name}.site.sh"),
            "OMP_NUM_THREADS": "1",
            "WANDB_API_KEY": SECRET,
            "PATH": path,
            "PYTHONPATH": str(ROOT),
        }

    def faults(self, name: str, text: str) -> None:
        """Of every attempt that begins after this."""
        (self.folder / f"{name}.site.sh").write_text(
            f"ebwm_environment() {{ :; }}\nexport EBWM_FAULTS='{text}'\n"
        )

    def configuration(self, name: str, overrides: dict | None = None) -> Path:
        config = json.loads(json.dumps(training_runs.TINY))
        config["data"] = {"manifest": str(self.manifest)}
        for key, value in (overrides or {}).items():
            section, _, rest = key.partition(".")
            config.setdefault(section, {})[rest] = value
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        return self.folder / f"{name}.yaml"

    def submit(
        self,
        name: str,
        *sbatch_options: str,
        overrides: dict | None = None,
        arguments: tuple[str, ...] = (),
        faults: str = "",
        nodes: int = 2,
        tasks: int = 1,
    ) -> str:
        self.faults(name, faults)
        return self.slurm.submit(
            f"--nodes={nodes}",
            f"--ntasks-per-node={tasks}",
            f"--output={self.folder}/{name}.out",
            *sbatch_options,
            "slurm/pretrain_nlp.sh",
            self.configuration(name, overrides),
            "--run-dir",
            self.folder / name,
            *arguments,
            cwd=ROOT,
            variables=self.variables(name),
        )

    def until(
        self, name: str, job: str, done: Callable[[], bool], what: str, timeout: float = 120
    ) -> None:
        deadline = time.monotonic() + timeout
        while not done():
            over = [state for state in self.slurm.states(job) if state in FINAL]
            assert not over and time.monotonic() < deadline, (
                f"{what} has not come, the job is {self.slurm.states(job)}:\n{self.output(name)}"
            )
            time.sleep(0.05)

    def until_step(self, name: str, job: str, step: int, timeout: float = 120) -> None:
        """Until this step is in the metrics and its checkpoint, if one was due, is written."""
        due = step - step % training_runs.TINY["checkpoint"]["every_steps"]
        published = self.folder / name / "checkpoints" / f"step_{due:06d}"
        self.until(
            name,
            job,
            lambda: (
                any(row["step"] == step for row in self.rows(name))
                and (due == 0 or published.exists())
            ),
            f"step {step}",
            timeout,
        )

    def finished(self, name: str, job: str, timeout: float = 180) -> None:
        states = self.slurm.wait(job, timeout)
        assert states == ["COMPLETED"], self.output(name)

    def output(self, name: str) -> str:
        """What the job and its ranks have said."""
        logs = sorted((self.folder / name / "logs").glob("rank_*.log"))
        return "\n".join(
            f"--- {path.name}\n{path.read_text()[-3000:]}"
            for path in (self.folder / f"{name}.out", *logs)
            if path.exists()
        )

    def rows(self, name: str) -> list[dict]:
        if not (self.folder / name / "metrics.jsonl").exists():
            return []
        return training_runs.Runs.rows(self, name)

    def state(self, name: str) -> dict:
        return training_runs.Runs.state(self, name)

    def attempts(self, name: str) -> list[dict]:
        return [
            json.loads(line)
            for line in (self.folder / name / "attempts.jsonl").read_text().splitlines()
        ]

    def tasks_of(self, job: str) -> list[int]:
        """Process ids of the job's train.py tasks, by rank."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                variables = (
                    (folder / "environ").read_bytes().split(b"\0") if folder.name.isdigit() else ()
                )
                arguments = (folder / "cmdline").read_bytes() if variables else b""
            except OSError:
                continue
            place = dict(entry.split(b"=", 1) for entry in variables if b"=" in entry)
            if (
                place.get(b"SLURM_CONF") == str(self.slurm.configuration).encode()
                and place.get(b"SLURM_JOB_ID") == job.encode()
                and b"SLURM_STEP_ID" in place
                and b"train.py" in arguments
                and not arguments.startswith(b"srun")
            ):
                found[int(place[b"SLURM_PROCID"])] = int(folder.name)
        return [found[rank] for rank in sorted(found)]


def holding_secret(folder: Path) -> list[str]:
    """Files under a folder in which the secret stands."""
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
