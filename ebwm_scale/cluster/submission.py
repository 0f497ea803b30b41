"""Jobs through submitit. What is pickled is the run's folder and nothing else; the run's text is in its config.yaml, never in a script.

On Slurm the pickled function runs in the batch step (no srun around it) and starts the run's tasks as slurm/job.sh does: ebwm_scale/cluster/job.py.
A sweep is one job array. Locally a background process makes the runs one after the other, or `parallel` of them at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Sequence

from ..errors import ConfigError, UserError
from .job import ROOT, attempt, attempts_until_the_end, train_command
from .slurm import allocation

FOREVER_MIN = 60 * 24 * 365


@dataclass(frozen=True)
class Resources:
    cluster: str
    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    minutes: int
    parallel: int
    slurm: tuple[str, ...] = ()  # further options of sbatch, "partition=gpu"


class RunFailed(Exception):
    """Ends a submitit job as failed; the reason stands in attempts.jsonl."""


@dataclass(frozen=True)
class SlurmRun:
    """One attempt at a run, in a job's batch step."""

    run_dir: str
    allow_pipe: bool = False  # from launch's command line: no file of the run can give it

    def __call__(self) -> str:
        ended = attempt(_command(self.run_dir, self.allow_pipe), Path(self.run_dir), allocation())
        code = ended.leave()
        if ended.verdict.what == "again":
            os._exit(code)  # without a result: the next attempt writes it
        if ended.verdict.what == "give up":
            raise RunFailed(f"{self.run_dir}: {ended.verdict.reason}")
        return ended.verdict.reason


@dataclass(frozen=True)
class LocalRuns:
    """Runs on this machine, one after the other; a failed one does not keep the next from starting."""

    run_dirs: tuple[str, ...]
    num_tasks: int
    allow_pipe: bool = False

    def __call__(self) -> str:
        failed = []
        for run_dir in self.run_dirs:
            try:
                ended = attempts_until_the_end(
                    _command(run_dir, self.allow_pipe), Path(run_dir), num_tasks=self.num_tasks
                )
            except UserError as error:
                failed.append(f"{run_dir}: {error}")
                continue
            if ended.verdict.what != "done":
                failed.append(f"{run_dir}: {ended.verdict.reason}")
            if ended.signalled:
                break
        if failed:
            raise RunFailed("; ".join(failed))
        return "finished"


def submit(
    folder: Path, run_dirs: Sequence[Path], resources: Resources, *, allow_pipe: bool = False
) -> list[str]:
    """Submit the prepared runs; writes each one's job id into its launch.json and returns them."""
    executor = executor_for(folder, resources, name=f"ebwm-{folder.name}")
    paths = [str(path.resolve()) for path in run_dirs]
    if resources.cluster == "local":
        parts = [
            tuple(paths[first :: resources.parallel])
            for first in range(min(resources.parallel, len(paths)))
        ]
        by_run = {}
        for number, part in enumerate(parts):
            gpus = resources.gpus_per_node
            executor.update_parameters(visible_gpus=list(range(number * gpus, (number + 1) * gpus)))
            with in_the_background(folder):
                job = executor.submit(LocalRuns(part, resources.tasks_per_node, allow_pipe))
            by_run |= {path: job.job_id for path in part}
        jobs = [by_run[path] for path in paths]
    elif len(paths) == 1:
        jobs = [executor.submit(SlurmRun(paths[0], allow_pipe)).job_id]
    else:
        with executor.batch():
            array = [executor.submit(SlurmRun(path, allow_pipe)) for path in paths]
        jobs = [job.job_id for job in array]
        for job, path in zip(
            jobs, run_dirs
        ):  # squeue then shows the run's name; a Slurm that refuses loses nothing but that
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", f"JobName={path.name}"], capture_output=True
            )
    for path, job in zip(run_dirs, jobs):
        request = json.loads((path / "launch.json").read_text(encoding="utf-8"))
        request["jobs"] = [*request.get("jobs", []), job]
        (path / "launch.json").write_text(
            json.dumps(request, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    return jobs


@contextlib.contextmanager
def in_the_background(folder: Path):
    """Processes started inside outlive the terminal, and hold neither it nor a pipe: they ignore SIGHUP and write to submitit/local.log."""
    log = folder / "submitit" / "local.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    kept, hangup = (
        [os.dup(number) for number in (0, 1, 2)],
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    try:
        with open(os.devnull, "rb") as nothing, open(log, "ab") as file:
            for source, number in ((nothing, 0), (file, 1), (file, 2)):
                os.dup2(source.fileno(), number)
        yield
    finally:
        for number, copy in enumerate(kept):
            os.dup2(copy, number)
            os.close(copy)
        signal.signal(signal.SIGHUP, hangup)


def executor_for(folder: Path, resources: Resources, *, name: str):
    """The submitit executor of these resources."""
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "ebwm_scale.launch needs the package submitit: pip install -c constraints.txt 'ebwm_scale[cluster]'; "
            "sbatch slurm/pretrain_nlp.sh works without it"
        ) from None
    logs = folder.resolve() / "submitit"
    if resources.cluster == "local":
        executor = submitit.LocalExecutor(folder=logs)
        executor.update_parameters(timeout_min=FOREVER_MIN, gpus_per_node=resources.gpus_per_node)
        return executor
    apply_site()
    options = dict(option.partition("=")[::2] for option in resources.slurm)
    for key in (
        options
    ):  # these variables win over what a script says, and so would win over the command line
        os.environ.pop(f"SBATCH_{key.upper().replace('-', '_')}", None)
    try:
        executor = submitit.SlurmExecutor(folder=logs)
    except RuntimeError:
        raise ConfigError(
            "--cluster slurm: there is no srun on this machine; use --cluster local, or log in where jobs are submitted"
        ) from None
    extra: dict[str, Any] = {
        "requeue": True,
        "signal": "USR1@300",
        **{key: value or True for key, value in options.items()},
    }
    if resources.tasks_per_node != resources.gpus_per_node:
        extra["ntasks-per-node"] = resources.tasks_per_node
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executor.update_parameters(
            job_name=name[:60],
            nodes=resources.nodes,
            time=resources.minutes,
            mem="0",
            exclusive=True,
            array_parallelism=resources.parallel,
            use_srun=False,
            stderr_to_stdout=True,
            additional_parameters=extra,
            setup=setup_lines(),
            **({"gpus_per_node": resources.gpus_per_node} if resources.gpus_per_node else {}),
        )
    return executor


def setup_lines() -> list[str]:
    """The job's environment, as slurm/job.sh makes it. Paths of this checkout are the only text from outside, and quoted."""
    here, root = shlex.quote(os.getcwd()), shlex.quote(str(ROOT))
    return [
        f"cd {root}",
        f". {shlex.quote(str(site_file()))}",
        "ebwm_environment",
        f"cd {here}",
        f"export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def apply_site() -> None:
    """Take over SBATCH_ variables that slurm/site.sh exports."""
    done = subprocess.run(
        ["bash", "-c", 'cd "$1" && . "$2" && env -0', "bash", str(ROOT), str(site_file())],
        capture_output=True,
        timeout=60,
    )
    if done.returncode:
        raise ConfigError(
            f"{site_file()} ends with an error: {done.stderr.decode(errors='replace').strip()}"
        )
    for entry in done.stdout.decode(errors="surrogateescape").split("\0"):
        key, _, value = entry.partition("=")
        if key.startswith("SBATCH_"):
            os.environ[key] = value


def site_file() -> Path:
    return Path(os.environ.get("EBWM_SITE", ROOT / "slurm" / "site.sh")).resolve()


def _command(run_dir: str, allow_pipe: bool) -> list[str]:
    """train.py on the run's own configuration, from where the run was launched: data paths may be relative to that."""
    os.chdir(json.loads(Path(run_dir, "launch.json").read_text(encoding="utf-8"))["directory"])
    return train_command(
        str(Path(run_dir, "config.yaml")), (), Path(run_dir), allow_pipe=allow_pipe
    )
