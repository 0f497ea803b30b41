"""Jobs through submitit.

What is pickled is the run's folder and nothing else; the run's text is in its config.yaml, never in
a script.

On Slurm the pickled function runs in the batch step (no srun around it) and starts the run's tasks
as slurm/job.sh does: ebwm_scale/cluster/job.py. A sweep is one job array. Locally a background
process makes the runs one after the other, or `parallel` of them at a time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebwm_scale.cluster.job import ROOT, attempt, attempts_until_the_end, train_command
from ebwm_scale.cluster.request import check_option, read_request, save_request
from ebwm_scale.cluster.slurm import allocation, leave_job
from ebwm_scale.core.errors import ConfigError, UserError
from ebwm_scale.core.plain_text import one_line, shown

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
        code = ended.finish()
        if ended.verdict.what == "again":
            os._exit(code)  # without a result: the next attempt writes it
        if ended.verdict.what == "give up":
            raise RunFailed(f"{self.run_dir}: {ended.verdict.reason}")
        return ended.verdict.reason


@dataclass(frozen=True)
class LocalRuns:
    """Runs on this machine, one after the other; the next one also starts after a failed one."""

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
    paths = [one_line("the run folder", path.resolve()) for path in run_dirs]
    logs = fresh_folder(folder.resolve())
    executor = executor_for(folder, resources, logs=logs)
    if resources.cluster == "local":
        parts = [
            tuple(paths[first :: resources.parallel])
            for first in range(min(resources.parallel, len(paths)))
        ]
        by_run = {}
        for number, part in enumerate(parts):
            gpus = resources.gpus_per_node
            executor.update_parameters(visible_gpus=list(range(number * gpus, (number + 1) * gpus)))
            with in_the_background(logs):
                job = executor.submit(LocalRuns(part, resources.tasks_per_node, allow_pipe))
            by_run |= dict.fromkeys(part, job.job_id)
        jobs = [by_run[path] for path in paths]
    elif len(paths) == 1:
        jobs = [executor.submit(SlurmRun(paths[0], allow_pipe)).job_id]
    else:
        with executor.batch():
            array = [executor.submit(SlurmRun(path, allow_pipe)) for path in paths]
        jobs = [job.job_id for job in array]
        # squeue then shows the run's name; a Slurm that refuses loses nothing but that.
        for job, path in zip(jobs, run_dirs):
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", f"JobName={path.name}"], capture_output=True
            )
    for path, job in zip(run_dirs, jobs):
        request = read_request(path)
        request["jobs"] = [*request.get("jobs", []), job]
        save_request(path, request)
    return jobs


@contextlib.contextmanager
def in_the_background(logs: Path):
    """Processes started inside outlive the terminal, and hold neither it nor a pipe: they ignore
    SIGHUP and write to local.log."""
    log = logs / "local.log"
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (0, 1, 2)]
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
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


def fresh_folder(folder: Path) -> Path:
    """submitit, submitit-2 and so on: a new folder for the pickles of a submission, which its jobs
    load. In a folder that was there before, which may have come from elsewhere, a pickle could lie
    ready under the name of the next job."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / ("submitit" if number == 1 else f"submitit-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("counting does not end")


def executor_for(folder: Path, resources: Resources, *, logs: Path):
    """The submitit executor of these resources. logs: where it keeps pickles and logs; need not
    exist yet."""
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "ebwm_scale.launch needs the package submitit: pip install -c constraints.txt "
            "'ebwm_scale[cluster]'; sbatch slurm/pretrain_nlp.sh works without it"
        ) from None
    one_line("the run folder", logs)
    if resources.cluster == "local":
        executor = submitit.LocalExecutor(folder=logs)
        executor.update_parameters(timeout_min=FOREVER_MIN, gpus_per_node=resources.gpus_per_node)
        return executor
    options: dict[str, str] = {}
    for option in resources.slurm:
        check_option("--slurm", option)
        name, _, value = option.partition("=")
        options[name] = value
    setup = setup_lines(folder)
    leave_job()
    apply_site(folder)
    # These variables win over what a script says, and so would win over the command line.
    for key in options:
        os.environ.pop(f"SBATCH_{key.upper().replace('-', '_')}", None)
    try:
        executor = submitit.SlurmExecutor(folder=logs)
    except RuntimeError:
        raise ConfigError(
            "--cluster slurm: there is no srun on this machine; use --cluster local, or log in "
            "where jobs are submitted"
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
            job_name=one_line("the job's name", f"ebwm-{folder.name}"[:60]),
            nodes=resources.nodes,
            time=resources.minutes,
            array_parallelism=resources.parallel,
            use_srun=False,
            stderr_to_stdout=True,
            additional_parameters=extra,
            setup=setup,
            **whole_nodes(options),
            **({"gpus_per_node": resources.gpus_per_node} if resources.gpus_per_node else {}),
        )
    return executor


def whole_nodes(options: Mapping[str, str]) -> dict[str, Any]:
    """All memory of nodes without other jobs, unless --slurm asks for a part: sbatch takes one way
    of asking only."""
    asked: dict[str, Any] = {}
    if not any(name in options for name in ("mem", "mem-per-gpu", "mem-per-cpu")):
        asked["mem"] = "0"
    if not any(name in options for name in ("exclusive", "oversubscribe")):
        asked["exclusive"] = True
    return asked


def setup_lines(folder: Path) -> list[str]:
    """The job's environment, as slurm/job.sh makes it.

    Paths of this checkout are the only text from outside, and quoted.
    """
    here = shlex.quote(one_line("the current directory", os.getcwd()))
    root = shlex.quote(one_line("the checkout's path", ROOT))
    return [
        f"cd {root}",
        f". {shlex.quote(str(site_file(folder)))}",
        "ebwm_environment",
        f"cd {here}",
        f"export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def apply_site(folder: Path) -> None:
    """Take over SBATCH_ variables that slurm/site.sh exports."""
    site = site_file(folder)
    done = subprocess.run(
        ["bash", "-c", 'cd "$1" && . "$2" && env -0', "bash", str(ROOT), str(site)],
        capture_output=True,
        timeout=60,
    )
    if done.returncode:
        raise ConfigError(
            f"{site} ends with an error: {done.stderr.decode(errors='replace').strip()}"
        )
    for entry in done.stdout.decode(errors="surrogateescape").split("\0"):
        key, _, value = entry.partition("=")
        if key.startswith("SBATCH_"):
            os.environ[key] = value


def site_file(folder: Path) -> Path:
    """slurm/site.sh of this checkout, or the file that the user's EBWM_SITE names: it is run by a
    shell, so never one out of a run folder."""
    named = os.environ.get("EBWM_SITE")
    if not named:
        return ROOT / "slurm" / "site.sh"
    one_line("EBWM_SITE", named)
    if not Path(named).is_absolute():
        raise ConfigError(
            f"EBWM_SITE is {shown(named)}: must be an absolute path, since it is read from more "
            "than one directory"
        )
    path = Path(named).resolve()
    if not path.is_file():
        raise ConfigError(f"EBWM_SITE is {shown(named)}: there is no such file")
    if path.is_relative_to(folder.resolve()):
        raise ConfigError(
            f"EBWM_SITE is {shown(named)}, a file of the folder that is submitted: a shell would "
            "run it. Copy it elsewhere if you trust it"
        )
    return path


def _command(run_dir: str, allow_pipe: bool) -> list[str]:
    """train.py on the run's own configuration, from where the run was launched: data paths may be
    relative to that.
    """
    request = read_request(Path(run_dir))
    os.chdir(request["directory"])
    accept = request.get("accept_new_rate") is True
    return train_command(
        str(Path(run_dir, "config.yaml")),
        (),
        Path(run_dir),
        accept_new_rate=accept,
        allow_pipe=allow_pipe,
    )
