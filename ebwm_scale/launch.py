"""Submit runs through submitit: single jobs, jobs of many nodes, sweeps as job arrays; on Slurm, or
in the background of this machine.

    ebwm launch --config configs/nlp/anchored.yaml --nodes 4 --gpus-per-node 8
    ebwm launch --config configs/nlp/anchored.yaml --run-dir runs/sizes
                --sweep train.seed=1,2,3 model.size=xxs,xs
    ebwm launch --status runs/sizes         one line per run; exit code 1 if any failed or was lost
    ebwm launch --resubmit runs/sizes       those again, from their newest checkpoints; --set
                                            changes their configuration

A run's folder holds its resolved configuration and the code version before it is submitted, and the
run reads that configuration: what is edited later does not reach it. Jobs are preempted, requeued
and given up as docs/cluster.md says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ebwm_scale.cluster.attempts import read_attempts
from ebwm_scale.cluster.request import check_option, options_for_resubmission, read_request
from ebwm_scale.cluster.slurm import idle_gpus
from ebwm_scale.cluster.status import UNFINISHED, status_of, table
from ebwm_scale.cluster.submission import Resources, executor_for, submit
from ebwm_scale.cluster.sweep import Run, check_new, expand, prepare, write_request
from ebwm_scale.config.checks import batch_arithmetic
from ebwm_scale.config.load import load_config
from ebwm_scale.config.permissions import add_permissions, refuse_unpermitted
from ebwm_scale.config.sequence_checks import num_readers
from ebwm_scale.core.arguments import ArgumentParser, add_config, add_overrides, command
from ebwm_scale.core.errors import EXIT_FAILED, EXIT_FINISHED, ConfigError
from ebwm_scale.core.plain_text import one_line, shown
from ebwm_scale.core.run_location import check_folder


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    add_config(what)
    what.add_argument("--status", type=Path, metavar="DIR", help="of a sweep or a run")
    what.add_argument(
        "--resubmit", type=Path, metavar="DIR", help="the failed and lost runs of a sweep, or a run"
    )
    add_overrides(parser)
    parser.add_argument(
        "--sweep",
        action="extend",
        nargs="+",
        default=[],
        metavar="SECTION.KEY=VALUE,VALUE",
        help="every combination of all values",
    )
    parser.add_argument(
        "--sweep-file",
        metavar="FILE",
        help="YAML with named sets of overrides, crossed with --sweep; see "
        "ebwm_scale/cluster/sweep.py",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=None,
        metavar="DIR",
        help="of the run, or above the runs of a sweep; default: runs/<configuration>",
    )
    parser.add_argument("--nodes", type=int, default=None, help="default: 1")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        default=None,
        help="one task each; default: 8 on Slurm, this machine's with --cluster local",
    )
    parser.add_argument(
        "--tasks-per-node", type=int, default=None, help="default: one per GPU, one without GPUs"
    )
    parser.add_argument("--cluster", choices=["slurm", "local"], default="slurm")
    parser.add_argument(
        "--minutes", type=int, default=None, help="Slurm's time limit of an attempt; default: 1440"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=None,
        help="runs of a sweep at a time; default: 64 on Slurm, 1 locally",
    )
    parser.add_argument(
        "--slurm",
        action="extend",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE",
        help="further options of sbatch: partition=gpu qos=high; with --resubmit in place of "
        "launch.json's",
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="with --resubmit: start in the current directory, also if the runs were launched from "
        "another",
    )
    parser.add_argument(
        "--accept-new-rate",
        action="store_true",
        help="with --resubmit: as in train.py, where --set raises the learning rate",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the runs and the job script, have Slurm check it; submit and write nothing",
    )
    add_permissions(parser)
    options = parser.parse_args(arguments)
    if options.status is not None:
        return show(options.status)
    if options.resubmit is not None:
        return resubmit(
            options.resubmit,
            options.overrides,
            slurm=options.slurm,
            here=options.here,
            accept_new_rate=options.accept_new_rate,
            allow_pipe=options.allow_pipe,
        )
    return launch(options)


def launch(options: argparse.Namespace) -> int:
    resources = resources_of(options)
    sweeps = bool(options.sweep or options.sweep_file)
    folder = options.run_dir or Path("runs") / (
        Path(options.config).stem + ("-sweep" if sweeps else "")
    )
    one_line("--config", options.config)
    runs = expand(options.sweep, options.sweep_file) if sweeps else [Run("", ())]
    for run in runs:
        one_line("the run folder", folder / run.name)
        if "/" in run.name:
            raise ConfigError(
                f"the run {shown(run.name)} would not be a folder directly in {folder}: name the "
                "sweep's axes without /"
            )
    for run in runs:  # all of them, before anything is written
        config = load_config(options.config, [*options.overrides, *run.overrides])
        refuse_unpermitted(config, allow_pipe=options.allow_pipe)
        batch_arithmetic(
            config.train,
            num_readers(config, resources.nodes * resources.tasks_per_node),
            paired=config.refinement.replay,
        )
    if options.dry_run:
        return dry_run(folder, runs, resources)
    check_folder(folder, resume=True)
    if (folder / "sweep.json").exists():
        raise ConfigError(
            f"{folder} already holds a sweep: look at it with --status, go on with it with "
            "--resubmit, or name another --run-dir"
        )
    for run in runs:
        check_new(folder / run.name)
    # refuses what it cannot submit
    executor_for(folder, resources, logs=folder.resolve() / "submitit")
    request = {
        "cluster": resources.cluster,
        "directory": str(Path.cwd()),
        "resources": vars(resources),
        "jobs": [],
    }
    for run in runs:
        prepare(
            folder / run.name,
            config_file=options.config,
            overrides=[*options.overrides, *run.overrides],
            request=request,
        )
    if sweeps:
        content = {
            "sweep": options.sweep,
            "file": options.sweep_file,
            "runs": [run.name for run in runs],
            "labels": [dict(run.labels) for run in runs],
        }
        (folder / "sweep.json").write_text(
            json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8"
        )
    folders = [folder / run.name for run in runs]
    jobs = submit(folder, folders, resources, allow_pipe=options.allow_pipe)
    report(folder, folders, jobs)
    return EXIT_FINISHED


def resubmit(
    folder: Path,
    overrides: Sequence[str],
    *,
    slurm: Sequence[str],
    here: bool,
    accept_new_rate: bool,
    allow_pipe: bool,
) -> int:
    """The failed and lost runs again, each in its folder. What launch.json says is used as far as
    request.py allows."""
    for option in slurm:
        check_option("--slurm", option)
    runs = [run.folder for run in status_of(folder) if run.state in UNFINISHED]
    if not runs:
        print(f"{folder}: no run has failed or was lost; nothing to submit")
        return EXIT_FINISHED
    configs = [load_config(run / "config.yaml", overrides) for run in runs]
    for config in configs:
        refuse_unpermitted(config, allow_pipe=allow_pipe)
    requests = [read_request(run) for run in runs]
    for run, request in zip(runs, requests):
        if request["directory"] != str(Path.cwd()) and not here:
            raise ConfigError(
                f"{run / 'launch.json'} says that the run starts in "
                f"{shown(request['directory'], 300)}, and this is "
                f"{Path.cwd()}: say --resubmit there, or with --here to start it here; relative "
                "paths count from there"
            )
        options = options_for_resubmission(run, request, slurm)
        request["directory"] = str(Path.cwd())
        request["resources"] = {**request["resources"], "slurm": list(options)}
    resources = requests[0]["resources"]
    resources = Resources(**{**resources, "slurm": tuple(resources["slurm"])})
    for run, config, request in zip(runs, configs, requests):
        write_request(
            run,
            config,
            {
                **request,
                "overrides": [*request.get("overrides", []), *overrides],
                "rows_before": len(read_attempts(run)),
                "accept_new_rate": accept_new_rate,
            },
        )
    report(folder, runs, submit(folder, runs, resources, allow_pipe=allow_pipe))
    return EXIT_FINISHED


def show(folder: Path) -> int:
    runs = status_of(folder)
    print(table(runs))
    failed = any(run.state in UNFINISHED for run in runs)
    if failed:
        print(f"again: python -m ebwm_scale.launch --resubmit {shlex.quote(str(folder))}")
    return EXIT_FAILED if failed else EXIT_FINISHED


def dry_run(folder: Path, runs: Sequence[Run], resources: Resources) -> int:
    for run in runs:
        print(f"# run {folder / run.name}  {shlex.join(run.overrides)}")
    if resources.cluster == "local":
        print(
            f"# in the background of this machine, {resources.parallel} at a time, "
            f"{resources.tasks_per_node} tasks each"
        )
        return EXIT_FINISHED
    executor = executor_for(folder, resources, logs=folder.resolve() / "submitit")
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)  # what submitit sets for an array
    script = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    print(script)
    done = subprocess.run(
        ["sbatch", "--test-only"],
        input=script,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(f"# sbatch --test-only says:\n{done.stdout.strip()}")
    return EXIT_FAILED if done.returncode else EXIT_FINISHED


def resources_of(options: argparse.Namespace) -> Resources:
    local = options.cluster == "local"
    if local:
        for name, value in (
            ("--nodes", options.nodes),
            ("--minutes", options.minutes),
            ("--slurm", options.slurm),
        ):
            if value and value != 1:
                raise ConfigError(
                    f"{name} is for --cluster slurm: a local run has one node and no time limit "
                    "but train.max_minutes; leave it out"
                )
    gpus = 8
    if options.gpus_per_node is not None:
        gpus = options.gpus_per_node
    elif local:
        gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    tasks = options.tasks_per_node or gpus or 1
    for name, value, least in (
        ("--nodes", options.nodes, 1),
        ("--gpus-per-node", gpus, 0),
        ("--tasks-per-node", tasks, 1),
        ("--minutes", options.minutes, 1),
        ("--parallel", options.parallel, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(f"{name} is {value}: must be {least} or more")
    for option in options.slurm:
        check_option("--slurm", option)
    warning = idle_gpus(tasks, gpus)
    if warning:
        print(warning, file=sys.stderr)
    return Resources(
        options.cluster,
        options.nodes or 1,
        gpus,
        tasks,
        options.minutes or 1440,
        options.parallel or (1 if local else 64),
        tuple(options.slurm),
    )


def report(folder: Path, runs: Sequence[Path], jobs: Sequence[str]) -> None:
    for run, job in zip(runs, jobs):
        print(f"job {job}: {run}")
    print(
        "submitted; look at it with: python -m ebwm_scale.launch --status "
        f"{shlex.quote(str(folder))}"
    )


if __name__ == "__main__":
    sys.exit(main())
