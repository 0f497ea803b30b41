"""Submitting from inside another job, and running in the shell of one: a real Slurm."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_jobs import ROOT

from ebwm_scale.cluster.slurm import KEPT, leave_job

# The shell of a small allocation: one CPU, one task, 100 MB.
SALLOC = ("salloc", "--quiet", "-n1", "-c1", "--mem-per-cpu=100")
SRUN = ("srun", "--quiet", "-n1", "-c1", "--mem-per-cpu=100", "--cpu-bind=none")


def inside(jobs, name: str, *command, outer=SALLOC, expect: int = 0) -> str:
    """Output of a command in the shell of another job, or outside any (outer empty)."""
    jobs.faults(name, "")
    done = subprocess.run(
        [*outer, "bash", "-c", shlex.join(str(part) for part in command)],
        env={**jobs.slurm.environment, **jobs.variables(name)},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=240,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def launch(jobs, name: str, *arguments: str) -> tuple:
    overrides = {"train.max_steps": 2, "train.global_batch_size": 8}
    config = jobs.configuration(name, overrides)
    folder = ("--config", config, "--run-dir", jobs.folder / name)
    return (sys.executable, "-m", "ebwm_scale.launch", *folder, *arguments)


def begun(jobs, name: str) -> dict:
    """The begin row of the run's first attempt."""
    path, deadline = jobs.folder / name / "attempts.jsonl", time.monotonic() + 90
    while not path.exists() or not path.read_text().endswith("\n"):
        assert time.monotonic() < deadline, jobs.output(name)
        time.sleep(0.2)
    return json.loads(path.read_text().splitlines()[0])


def test_the_variables_that_stay_are_the_same_in_python_and_in_the_scripts():
    text = (ROOT / "slurm" / "job.sh").read_text()
    (names,) = re.findall(r"^ +(SLURM_\w+(?: \| SLURM_\w+)*)\) ;;$", text, re.MULTILINE)
    assert tuple(names.split(" | ")) == KEPT
    environment = {"SLURM_CONF": "/x", "SLURM_NTASKS": "1", "SLURM_ARRAY_TASK_ID": "3", "A": "b"}
    leave_job(environment)
    assert environment == {"SLURM_CONF": "/x", "A": "b"}


@pytest.mark.parametrize("outer", [(), SALLOC, SRUN], ids=["outside", "salloc", "srun"])
def test_a_launch_from_inside_a_job_gets_what_one_from_outside_gets(jobs, outer):
    """b26: one task of eight, silently. The virtual nodes are given whole, so that there are 8
    GPUs."""
    name = f"launched_{outer[0] if outer else 'outside'}"
    arguments = ("--nodes", "1", "--gpus-per-node", "2", "--minutes", "10")
    inside(jobs, name, *launch(jobs, name, *arguments), outer=outer)
    assert begun(jobs, name)["tasks"] == 8
    job = json.loads((jobs.folder / name / "launch.json").read_text())["jobs"][0]
    jobs.slurm.command("scancel", job)
    jobs.slurm.wait(job, 60)


@pytest.mark.parametrize(
    "outer, by_script", [(SALLOC, True), (SRUN, True), (SALLOC, False)], ids=str
)
def test_no_variable_of_the_outer_job_reaches_the_new_one(jobs, tmp_path, outer, by_script):
    """By the script, which leaves the job once SLURM_JOB_ID is gone, and by the launcher's
    executor; seen by an sbatch that notes its environment."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(
        f"#!/bin/bash\nenv | grep ^SLURM_ > {tmp_path}/seen\necho Submitted batch job 1\n"
    )
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    name = f"seen_{outer[0]}_{by_script}"
    command = launch(jobs, name, "--nodes", "1", "--gpus-per-node", "0")
    if by_script:
        config = jobs.configuration(name)
        command = ("env", "-u", "SLURM_JOB_ID", ROOT / "slurm" / "pretrain_nlp.sh", config)
    # The path is set inside: srun and salloc themselves are the real ones.
    first = ("env", f"PATH={tmp_path}/bin:{jobs.variables(name)['PATH']}", "SLURM_ARRAY_JOB_ID=9")
    inside(jobs, name, *first, *command, outer=outer)
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line.partition("=")[0] for line in seen] == ["SLURM_CONF"], seen


def test_a_plain_sbatch_inside_a_job_gets_one_task_per_gpu_and_says_what_it_did_not_use(jobs):
    name = "plain"
    config = jobs.configuration(
        name, {"train.max_steps": 2, "train.global_batch_size": 8, "evaluation.every_steps": 100}
    )
    options = ("--nodes=1", "--gpus-per-node=8", f"--output={jobs.folder}/{name}.out", "--wait")
    script = ("slurm/pretrain_nlp.sh", config, "--run-dir", jobs.folder / name)
    output = inside(jobs, name, "timeout", "60", "sbatch", "--parsable", *options[:-1], *script)
    assert begun(jobs, name)["tasks"] == 8
    assert "not used, since they describe the job from which" in jobs.output(name)
    job = output.split()[-1]
    jobs.slurm.command("scancel", job)
    jobs.slurm.wait(job, 60)


def test_the_script_inside_a_job_says_that_it_runs_and_does_not_submit(jobs):
    """With sbatch's options behind --, which it says it does not use; and that GPUs stay idle."""
    name = "in_shell"
    config = jobs.configuration(name, {"train.max_steps": 2})
    outer = ("salloc", "--quiet", "-N1", "-n1", "-c1", "--gpus-per-node=2")
    before = jobs.slurm.command("squeue", "-h", "--states=all", "-o", "%i").split()
    script = ("bash", "slurm/pretrain_nlp.sh", config, "--run-dir", jobs.folder / name)
    output = inside(jobs, name, *script, "--", "--partition=x", outer=outer)
    assert "the training runs here, in the nodes of that job, and nothing is submitted" in output
    assert "not used, since they are for sbatch: --partition=x" in output
    assert "env -u SLURM_JOB_ID slurm/pretrain_nlp.sh" in output
    after = jobs.slurm.command("squeue", "-h", "--states=all", "-o", "%i").split()
    assert len(after) == len(before) + 1  # salloc's own
    assert max(row["step"] for row in jobs.rows(name)) == 2
    assert begun(jobs, name)["tasks"] == 1


def test_idle_gpus_are_warned_of_in_the_job_and_at_the_launch(jobs):
    name = "idle"
    overrides = {"train.max_steps": 2, "evaluation.every_steps": 100}
    job = jobs.submit(name, "--gpus-per-node=8", overrides=overrides, nodes=1, tasks=1)
    jobs.finished(name, job)
    warning = "warning: 1 task for 8 GPUs on a node: 7 stay idle"
    assert warning in jobs.output(name)
    options = ("--nodes", "1", "--gpus-per-node", "8", "--tasks-per-node", "1", "--dry-run")
    assert warning in inside(jobs, "idle_launch", *launch(jobs, "idle_launch", *options), outer=())


def test_options_behind_the_script_are_refused_by_a_job_that_sbatch_started(jobs):
    job = jobs.submit("behind", nodes=1, arguments=("--", "--partition=high"))
    assert jobs.slurm.wait(job, 60) == ["FAILED"] and jobs.slurm.restarts(job) == 0
    assert "sbatch --partition=high slurm/pretrain_nlp.sh" in jobs.output("behind")
    assert not Path(jobs.folder / "behind").exists()


def test_in_the_shell_of_an_allocation_train_names_srun_and_one_process(jobs):
    name = "counted"
    train = (sys.executable, ROOT / "ebwm_scale" / "train.py", "--config", jobs.configuration(name))
    run_dir = ("--run-dir", jobs.folder / name, "--set", "train.max_steps=1")
    outer = ("salloc", "--quiet", "-n2", "-c1")
    output = inside(jobs, name, *train, *run_dir, outer=outer, expect=2)
    assert "SLURM_NTASKS is 2" in output and "For one process: SLURM_NTASKS=1 python" in output
    inside(jobs, name, "env", "SLURM_NTASKS=1", *train, *run_dir, outer=outer)
    assert max(row["step"] for row in jobs.rows(name)) == 1
