"""`sbatch slurm/pretrain_nlp.sh` against a real Slurm: it trains what one process trains, and
survives limits, preemption and signals.
"""

from __future__ import annotations

import json
import subprocess
import time

import pytest
import yaml
from cluster_jobs import AWKWARD, ROOT, SECRET, holding_secret, same

import ebwm_scale

SLOW = "slow@step=3,seconds=4"  # time for a signal to arrive between two known steps


@pytest.fixture(scope="module")
def unbroken(jobs):
    """2 nodes with one task each, never disturbed, tracked by W&B where that is installed."""
    job = jobs.submit("unbroken")
    jobs.finished("unbroken", job)
    assert jobs.slurm.restarts(job) == 0
    return "unbroken"


@pytest.fixture(scope="module")
def limited(jobs):
    """Submitted before the others: it mostly sleeps.

    Slurm looks at limits every 30 s, so the signal comes 20 to 50 s after the start.
    """
    faults = "; ".join(f"slow@step={step},seconds=6" for step in range(1, 8))
    return jobs.submit("limited", "--time=1", "--signal=USR1@10", faults=faults, nodes=1)


@pytest.fixture(scope="module")
def one(runs):
    runs.run("one")
    return runs


def broken_but_equal(jobs, name, job, rows, state, *, reason):
    """reason None: an end without a grace time, which may come before the step is saved (None), or
    reach one task before the other notices (77).
    """
    jobs.finished(name, job)
    assert jobs.slurm.restarts(job) >= 1
    ends = [row for row in jobs.attempts(name) if row["event"] == "end"]
    assert (
        [row["outcome"] for row in ends][-1] == "finished"
        and ends[0]["exit_code"] in ((75,) if reason else (75, 77, None))
        and ends[0]["progress"]
    ), ends
    assert ends[0]["outcome"] == "interrupted"
    events = [
        json.loads(line) for line in (jobs.folder / name / "events.jsonl").read_text().splitlines()
    ]
    first = next(event["reason"] for event in events if event["event"] == "signal")
    assert first == reason or reason is None
    assert jobs.rows(name) == rows
    assert same(jobs.state(name), state) == []


def test_two_nodes_with_two_tasks_train_as_one_process_does_and_text_arrives_as_typed(
    jobs, limited, one
):
    """With the shipped slurm/site.sh.

    The override has spaces, quotes, $(), backquotes and a newline.
    """
    variables = {
        **jobs.variables("four"),
        "EBWM_SITE": str(ROOT / "slurm" / "site.sh"),
        "VIRTUAL_ENV": "the test's own",
    }
    job = jobs.slurm.submit(
        "--nodes=2",
        "--ntasks-per-node=2",
        f"--output={jobs.folder}/four.out",
        "slurm/pretrain_nlp.sh",
        jobs.configuration("four"),
        "--run-dir",
        jobs.folder / "four",
        "--set",
        f"logging.run_name={AWKWARD}",
        cwd=ROOT,
        variables=variables,
    )
    jobs.finished("four", job)
    four, alone = jobs.rows("four"), one.rows("one")
    assert [(row["step"], row.get("split")) for row in four] == [
        (row["step"], row.get("split")) for row in alone
    ] and len(alone) == 10
    for ours, theirs in zip(four, alone):
        assert ours["loss_per_step"] == pytest.approx(theirs["loss_per_step"], rel=1e-6, abs=0)
    assert "2 nodes" in jobs.output("four") and "with 2 tasks each" in jobs.output("four")
    assert sorted(path.name for path in (jobs.folder / "four" / "logs").iterdir()) == [
        f"rank_{rank:04d}.log" for rank in range(4)
    ]
    assert (
        yaml.safe_load((jobs.folder / "four" / "config.yaml").read_text())["logging"]["run_name"]
        == AWKWARD
    )
    start = json.loads((jobs.folder / "four" / "events.jsonl").read_text().splitlines()[0])
    assert f"logging.run_name={AWKWARD}" in start["command"]
    assert not list(ROOT.glob("pwned")) and not list(jobs.folder.rglob("pwned"))
    ebwm_scale.load_checkpoint(jobs.folder / "four")


def test_scancel_usr1_saves_requeues_and_finishes_bitwise_equal_under_the_same_tracking_id(
    jobs, limited, unbroken
):
    tracked = {"logging.wandb": "offline"} if _has_wandb() else {}
    job = jobs.submit("signalled", faults=SLOW, overrides=tracked)
    jobs.until_step("signalled", job, 3)
    jobs.slurm.command("scancel", "--signal=USR1", job)
    broken_but_equal(
        jobs, "signalled", job, jobs.rows(unbroken), jobs.state(unbroken), reason="SIGUSR1"
    )
    if tracked:
        identity = (jobs.folder / "signalled" / "wandb_id").read_text().strip()
        folders = list((jobs.folder / "signalled" / "wandb").glob("offline-run-*"))
        assert len(folders) == 2 and all(folder.name.endswith(identity) for folder in folders)


@pytest.mark.soak
@pytest.mark.parametrize("partition, reason", [("main", "SIGUSR1"), ("harsh", None)])
def test_preemption_by_a_higher_partition_saves_requeues_and_finishes_bitwise_equal(
    jobs, limited, unbroken, partition, reason
):
    """harsh: no grace time, so SIGTERM comes right behind, and there is KillWait (5 s here) to save
    in; Slurm requeues by itself then, and may end the batch step before it has written what
    happened.
    """
    name = f"preempted_{partition}"
    job = jobs.submit(
        name, "--nodelist=127.0.0.[5-6]", f"--partition={partition}", faults=SLOW.replace("4", "2")
    )
    jobs.until_step(name, job, 3)
    urgent = jobs.slurm.submit(
        "--partition=high",
        "--nodes=2",
        "--nodelist=127.0.0.[5-6]",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 2",
    )
    jobs.until(name, job, lambda: jobs.slurm.restarts(job) == 1, "the preemption")
    assert jobs.slurm.wait(urgent, 60) == ["COMPLETED"]
    broken_but_equal(jobs, name, job, jobs.rows(unbroken), jobs.state(unbroken), reason=reason)


def test_the_time_limit_saves_requeues_and_finishes_bitwise_equal(jobs, limited, one):
    """One task here, so the reference is a run of one process without Slurm."""
    broken_but_equal(jobs, "limited", limited, one.rows("one"), one.state("one"), reason="SIGUSR1")


@pytest.mark.soak
def test_a_signal_in_start_up_is_no_failure(jobs, unbroken):
    """To one rank, before the model is built; nothing is there to be saved."""
    job = jobs.submit("early", faults="slow@start=1,seconds=3")
    jobs.until("early", job, lambda: len(jobs.tasks_of(job)) == 2, "both tasks")
    jobs.until(
        "early", job, lambda: _handles_usr1(jobs.tasks_of(job)[1]), "the second task's handler", 30
    )
    subprocess.run(["kill", "-USR1", str(jobs.tasks_of(job)[1])], check=True)
    jobs.finished("early", job)
    ends = [row for row in jobs.attempts("early") if row["event"] == "end"]
    assert [(row["exit_code"], row["verdict"]) for row in ends] == [
        (75, "again"),
        (0, "done"),
    ] and not ends[0]["counts"]
    assert jobs.rows("early") == jobs.rows(unbroken)


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(jobs):
    job = jobs.submit(
        "cancelled", faults="slow@step=3,seconds=1", nodes=1, overrides={"train.max_steps": 100}
    )
    jobs.until_step("cancelled", job, 3)
    jobs.slurm.command("scancel", job)
    assert jobs.slurm.wait(job, 60) == ["CANCELLED"]
    time.sleep(1)
    assert jobs.slurm.states(job) == ["CANCELLED"]


def test_no_secret_is_in_run_folders_logs_or_job_scripts(jobs, unbroken, limited):
    """Every job of this module had WANDB_API_KEY in its environment."""
    assert holding_secret(jobs.folder) == []
    scripts = list(jobs.slurm.root.rglob("script")) + list(jobs.slurm.root.rglob("slurm_script"))
    assert scripts and not any(SECRET in path.read_text() for path in scripts)


def _has_wandb() -> bool:
    try:
        import wandb  # noqa: F401
    except ImportError:
        return False
    return True


def _handles_usr1(pid: int) -> bool:
    """Whether a process has a handler for SIGUSR1 (signal 10), from /proc."""
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> 9 & 1)
