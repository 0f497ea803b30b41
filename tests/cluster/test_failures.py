"""A real Slurm: tasks and nodes that die, jobs that get nowhere, sweeps through submitit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster_jobs import AWKWARD, ROOT, SECRET, holding_secret, same


@pytest.fixture(scope="module")
def unbroken(jobs):
    job = jobs.submit("unbroken")
    jobs.finished("unbroken", job)
    return "unbroken"


@pytest.fixture(scope="module")
def sweep(jobs):
    """Three runs, one of them on data that is not there yet: the launch command's output and the
    sweep's folder.
    """
    folder, later = jobs.folder / "sweep", jobs.folder / "later"
    output = launch(
        jobs,
        "--config",
        str(jobs.configuration("sweep")),
        "--gpus-per-node",
        "0",
        "--set",
        "train.max_steps=4",
        f"logging.run_name={AWKWARD}",
        "--sweep",
        f"data.manifest={jobs.manifest},{jobs.manifest.parent}/../shards/manifest.json,{later}/manifest.json",
        "--run-dir",
        str(folder),
        "--slurm",
        "nodelist=127.0.0.6",
    )
    frozen = {
        path.name: (path / "config.yaml").read_text()
        for path in folder.iterdir()
        if (path / "launch.json").exists()
    }
    return output, folder, later, frozen


def launch(jobs, *arguments: str, expect: int = 0) -> str:
    jobs.faults("launch", "")
    done = subprocess.run(
        [sys.executable, "-m", "ebwm_scale.launch", *arguments],
        env={**jobs.slurm.environment, **jobs.variables("launch")},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == expect, done.stdout
    return done.stdout


def ends_of(jobs, name) -> list[dict]:
    return [row for row in jobs.attempts(name) if row["event"] == "end"]


@pytest.mark.soak
@pytest.mark.parametrize("rank", [1, 0])
def test_kill_9_of_a_slurmd_ends_the_attempt_and_the_requeued_job_finishes_bitwise_equal(
    jobs, unbroken, sweep, rank
):
    """All ranks hang in step 3, so nothing but Slurm can end the attempt; the second one has no
    fault. Rank 0's node holds the batch step too.
    """
    name, node = f"node_lost_{rank}", ("127.0.0.3", "127.0.0.4")[rank]
    job = jobs.submit(name, "--nodelist=127.0.0.[3-4]", faults="hang@step=3")
    jobs.until_step(name, job, 3)
    jobs.faults(name, "")
    orphan = jobs.tasks_of(job)[rank]
    jobs.slurm.kill_node(node)
    jobs.until(
        name, job, lambda: jobs.slurm.restarts(job) == 1, "the requeue after the node failure", 90
    )
    jobs.slurm.start_node(node)
    jobs.finished(name, job)
    lost, finished = ends_of(jobs, name)
    assert (
        lost["outcome"] in ("lost", "interrupted")
        and lost["exit_code"] is None
        and finished["outcome"] == "finished"
    )
    assert jobs.rows(name) == jobs.rows(unbroken)
    assert same(jobs.state(name), jobs.state(unbroken)) == []
    if Path(f"/proc/{orphan}").exists():  # its slurmd came back with no job for it
        os.kill(orphan, signal.SIGKILL)


@pytest.mark.parametrize(
    "other", ["slow@step=3,seconds=3", pytest.param("hang@step=3", marks=pytest.mark.soak)]
)
def test_kill_9_of_a_task_ends_the_attempt_promptly_and_the_requeued_job_finishes_bitwise_equal(
    jobs, unbroken, other
):
    """The other task notices by itself, or is stuck."""
    name = f"task_lost_{other[:4]}"
    job = jobs.submit(name, faults=other)
    jobs.until_step(name, job, 3)
    jobs.faults(name, "")
    killed = time.monotonic()
    os.kill(jobs.tasks_of(job)[1], signal.SIGKILL)
    jobs.until(name, job, lambda: jobs.slurm.restarts(job) == 1, "the requeue", 60)
    assert time.monotonic() - killed < 45
    jobs.finished(name, job)
    crashed, finished = ends_of(jobs, name)
    assert (
        crashed["outcome"] == "crashed"
        and crashed["exit_code"] == 137
        and crashed["progress"]
        and finished["outcome"] == "finished"
    )
    assert jobs.rows(name) == jobs.rows(unbroken)
    assert same(jobs.state(name), jobs.state(unbroken)) == []


def test_a_job_that_makes_no_progress_twice_gives_up_and_says_why(jobs):
    job = jobs.submit("loop", faults="kill@start=1", nodes=1)
    assert jobs.slurm.wait(job, 120) == ["FAILED"], jobs.output("loop")
    assert jobs.slurm.restarts(job) == 1
    first, second = ends_of(jobs, "loop")
    assert (first["verdict"], second["verdict"]) == ("again", "give up")
    reason = (
        "gave up: 2 attempts in a row ended without a checkpoint beyond the start; the last one: "
        "exit code 137"
    )
    assert second["reason"].startswith(reason) and reason in jobs.output("loop")


def test_a_mistake_in_the_configuration_is_not_tried_twice(jobs):
    job = jobs.submit("mistake", nodes=1, arguments=("--set", "train.max_stepz=5"))
    assert jobs.slurm.wait(job, 60) == ["FAILED"] and jobs.slurm.restarts(job) == 0
    assert "max_stepz" in jobs.output("mistake") and "max_steps" in jobs.output("mistake")


@pytest.mark.soak
def test_a_sweep_shows_the_failed_run_and_resubmission_finishes_it(jobs, sweep):
    output, folder, later, frozen = sweep
    assert output.count("job ") == 3 and len(frozen) == 3
    array = output.split()[1].split("_")[0].rstrip(":")
    states = jobs.slurm.wait(array, 180)
    assert sorted(states) == ["COMPLETED", "COMPLETED", "FAILED"]
    status = launch(jobs, "--status", str(folder), expect=1)
    (failed,) = [line for line in status.splitlines() if " failed " in line and "/4" in line]
    name = failed.split()[0]
    assert (
        "2 finished, 1 failed" in status
        and "later" in name
        and "exit code 2" in failed
        and f"--resubmit {folder}" in status
    )
    for run in folder.iterdir():
        if (run / "launch.json").exists():
            assert (
                yaml.safe_load((run / "config.yaml").read_text())["logging"]["run_name"] == AWKWARD
            )
            assert json.loads((run / "launch.json").read_text())["code"].startswith("0.")
    later.symlink_to(jobs.manifest.parent)
    again = launch(jobs, "--resubmit", str(folder))
    assert again.count("job ") == 1 and name in again
    assert jobs.slurm.wait(again.split()[1].rstrip(":"), 120) == ["COMPLETED"]
    assert "3 finished" in launch(jobs, "--status", str(folder))
    assert "no run has failed" in launch(jobs, "--resubmit", str(folder))


def test_configuration_and_code_version_stand_in_run_folders_and_scripts_hold_no_text_of_the_user(
    jobs, sweep
):
    _, folder, _, frozen = sweep
    for name, text in frozen.items():
        assert (
            yaml.safe_load(text)["logging"]["run_name"] == AWKWARD
            and yaml.safe_load(text)["train"]["max_steps"] == 4
        )
        assert json.loads((folder / name / "launch.json").read_text())["code"]
    scripts = list((folder / "submitit").glob("*.sh"))
    assert scripts and not any("pwned" in path.read_text() for path in scripts)
    assert not list(ROOT.glob("pwned")) and not list(jobs.folder.rglob("pwned"))


def test_the_launcher_refuses_a_folder_that_holds_a_sweep_and_a_batch_that_does_not_divide(
    jobs, sweep
):
    _, folder, _, _ = sweep
    config = str(jobs.folder / "sweep.yaml")
    assert "already holds a sweep" in launch(
        jobs,
        "--config",
        config,
        "--sweep",
        "train.seed=1,2",
        "--run-dir",
        str(folder),
        "--gpus-per-node",
        "0",
        expect=2,
    )
    assert "does not divide over 8 processes" in launch(
        jobs, "--config", config, "--run-dir", str(jobs.folder / "never"), expect=2
    )
    assert not (jobs.folder / "never").exists()


def test_a_dry_run_prints_the_job_script_and_has_slurm_check_it(jobs):
    config = str(jobs.configuration("dry", {"train.global_batch_size": 32}))
    output = launch(
        jobs,
        "--config",
        config,
        "--nodes",
        "4",
        "--gpus-per-node",
        "8",
        "--sweep",
        "train.seed=1,2",
        "--run-dir",
        str(jobs.folder / "dry"),
        "--dry-run",
    )
    for line in (
        "#SBATCH --requeue",
        "#SBATCH --signal=USR1@300",
        "#SBATCH --open-mode=append",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --array=0-1%2",
    ):
        assert line in output
    assert "to start at" in output and not (jobs.folder / "dry").exists()


def test_no_secret_is_in_run_folders_logs_or_job_scripts(jobs, sweep, unbroken):
    assert holding_secret(jobs.folder) == []
    scripts = [path for name in ("script", "slurm_script") for path in jobs.slurm.root.rglob(name)]
    assert scripts and not any(SECRET in path.read_text() for path in scripts)
