"""attempts.jsonl, when a job gives up; names and folders of sweeps; runs on a machine without
Slurm. No Slurm here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cluster_jobs import AWKWARD, ROOT, SECRET, Jobs, holding_secret

from ebwm_scale.cluster.attempts import Attempts, read_attempts
from ebwm_scale.cluster.sweep import expand, split_values
from ebwm_scale.core.errors import ConfigError


def play(
    folder: Path, *history: tuple[int | None, int | None], job: str = "1", left: float | None = None
) -> str:
    """Attempts of (step saved, exit code or None for a lost one); the last verdict."""
    what = ""
    for step, code in history:
        attempts = Attempts(folder, job)
        what = attempts.begin().what
        if what == "give up":
            break
        if step is not None:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / "checkpoints" / "latest").write_text(f"step_{step:06d}\n")
        if code is not None:
            what = attempts.end(code, seconds_left=left).what
    return what


@pytest.mark.parametrize(
    "history, left, expected",
    [
        ([(None, 137)], None, "again"),
        ([(None, 137), (None, 1)], None, "give up"),
        ([(3, 137), (3, 137)], None, "again"),
        ([(3, 137), (3, 137), (3, 137)], None, "give up"),
        ([(3, 1), (3, 1), (6, 1), (6, 1)], None, "again"),
        ([(None, None), (None, None), (None, None)], None, "give up"),
        ([(None, None), (4, None), (4, None), (8, 0)], None, "done"),
        ([(3, 75)] * 5, 5000, "again"),
        ([(3, 75)] * 3, 100, "give up"),
        ([(3, 1), (3, 1), (3, 75), (3, 1)], 5000, "give up"),
        ([(None, 2)], None, "give up"),
        ([(5, 76)], None, "give up"),
        ([(8, 0)], None, "done"),
        ([(3, 138)], 5000, "again"),
    ],
)
def test_two_attempts_in_a_row_without_progress_are_the_limit_interruptions_from_outside_count_not(
    tmp_path, history, left, expected
):
    assert play(tmp_path, *history, left=left) == expected


def test_a_new_job_in_the_same_folder_may_try_again(tmp_path):
    assert play(tmp_path, (None, 1), (None, 1)) == "give up"
    assert play(tmp_path, (None, 1), job="2") == "again"


def test_an_attempt_that_was_taken_for_lost_has_no_say_when_it_comes_back(tmp_path):
    old, new = Attempts(tmp_path, "1"), Attempts(tmp_path, "1")
    old.begin()
    new.begin()
    before = read_attempts(tmp_path)
    assert old.end(1).what == "again" and read_attempts(tmp_path) == before


def test_a_preemption_that_ends_the_batch_step_before_it_can_write_its_end_does_not_count(tmp_path):
    for _ in range(4):
        attempts = Attempts(tmp_path, "1")
        assert attempts.begin().what == "again"
        attempts.signalled("SIGTERM")
    ends = [row for row in read_attempts(tmp_path) if row["event"] == "end"]
    assert [row["outcome"] for row in ends] == ["interrupted"] * 3 and not any(
        row["counts"] for row in ends
    )


@pytest.mark.parametrize("code", [77, 137, 1])
def test_tasks_that_are_killed_after_the_job_was_told_to_end_are_an_interruption(tmp_path, code):
    for told in (True, True, True, False):
        attempts = Attempts(tmp_path, "1")
        assert attempts.begin().what == "again"
        if told:
            attempts.signalled("SIGTERM")
        assert attempts.end(code, seconds_left=3600).what == "again"
    ends = [row for row in read_attempts(tmp_path) if row["event"] == "end"]
    assert [row["outcome"] for row in ends] == ["interrupted"] * 3 + ["crashed"] and [
        row["counts"] for row in ends
    ] == [False] * 3 + [True]


@pytest.mark.parametrize("told", [False, True])
def test_an_attempt_whose_last_save_failed_made_no_progress_whatever_it_published(tmp_path, told):
    """Also after a signal from outside, which otherwise excuses an end."""
    for number in (1, 2):
        attempts = Attempts(tmp_path, "1")
        assert attempts.begin().what == "again"
        assert not (tmp_path / "unsaved").exists()  # of the attempt before
        (tmp_path / "checkpoints" / f"step_{number:06d}").mkdir(parents=True)
        if told:
            attempts.signalled("SIGTERM")
        (tmp_path / "unsaved").touch()  # as train.py leaves the folder
        verdict = attempts.end(1, seconds_left=5000)
    assert verdict.what == "give up" and "without a checkpoint" in verdict.reason
    ends = [row for row in read_attempts(tmp_path) if row["event"] == "end"]
    assert [row["outcome"] for row in ends] == ["not saved", "not saved"]
    assert "the last save failed; the newest checkpoint is step 1" in ends[0]["reason"]
    assert [row["progress"] for row in ends] == [False, False]


def test_a_checkpoint_is_progress_also_where_its_name_could_not_be_written_to_latest(tmp_path):
    attempts = Attempts(tmp_path, "1")
    attempts.begin()
    for step in (3, 6):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    attempts.end(1)
    assert read_attempts(tmp_path)[-1]["progress"] and read_attempts(tmp_path)[-1]["step"] == 6


def test_attempts_that_cannot_be_written_are_judged_all_the_same_and_written_later(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("EBWM_FAULTS", "enospc@write=1,times=2")
    attempts = Attempts(tmp_path, "1")
    assert attempts.begin().what == "again" and read_attempts(tmp_path) == []
    attempts.signalled("SIGTERM")
    assert attempts.end(137, seconds_left=5000).what == "again"
    rows = read_attempts(tmp_path)
    assert [row["event"] for row in rows] == ["begin", "signal", "end"]
    assert rows[-1]["outcome"] == "interrupted" and not rows[-1]["counts"]
    assert capfd.readouterr().err.count("could not be written") == 1


def test_a_sweep_is_every_combination_under_readable_names():
    runs = expand(["train.seed=1,2", "model.size=xxs,xs"])
    assert [run.name for run in runs] == [
        "seed=1_size=xxs",
        "seed=1_size=xs",
        "seed=2_size=xxs",
        "seed=2_size=xs",
    ]
    assert runs[1].overrides == ("train.seed=1", "model.size=xs")
    assert [run.name for run in expand(["a.x=1,2", "b.x=3"])] == ["a.x=1_b.x=3", "a.x=2_b.x=3"]
    assert [run.name for run in expand(["data.manifest=p/one/m.json,p/two/m.json"])] == [
        "manifest=one-m.json",
        "manifest=two-m.json",
    ]


def test_a_sweep_file_names_sets_of_overrides_and_crosses_with_keys(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "form:\n  baseline: [model.kind=baseline]\n  energy: [model.kind=energy, "
        "'refinement.schedule.noise=[[0, 1], [1, 0]]']\n"
    )
    runs = expand(["train.seed=1,2"], str(file))
    assert [run.name for run in runs] == [
        "form=baseline_seed=1",
        "form=baseline_seed=2",
        "form=energy_seed=1",
        "form=energy_seed=2",
    ]
    assert runs[2].overrides == (
        "model.kind=energy",
        "refinement.schedule.noise=[[0, 1], [1, 0]]",
        "train.seed=1",
    )
    assert dict(runs[3].labels) == {"form": "energy", "seed": "2"}


def test_combinations_are_no_axis_and_reach_the_runs_that_have_all_their_names_last(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "size:\n  w32: [model.width=32, optimizer.learning_rate=1]\n  w64: "
        "[model.width=64]\nform:\n  transformer++: [model.kind=baseline]\n  energy: "
        "[model.kind=energy]\n"
        "combinations:\n  form=transformer++ size=w32: [optimizer.learning_rate=2]\n  size=w64: "
        "[train.seed=7]\n"
    )
    runs = {run.name: run.overrides for run in expand([], str(file))}
    assert runs == {
        "size=w32_form=transformer++": (
            "model.width=32",
            "optimizer.learning_rate=1",
            "model.kind=baseline",
            "optimizer.learning_rate=2",
        ),
        "size=w32_form=energy": (
            "model.width=32",
            "optimizer.learning_rate=1",
            "model.kind=energy",
        ),
        "size=w64_form=transformer++": ("model.width=64", "model.kind=baseline", "train.seed=7"),
        "size=w64_form=energy": ("model.width=64", "model.kind=energy", "train.seed=7"),
    }


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", "maps each axis"),
        (
            "form: {a: [b.c=1]}\ncombinations: {form=b: [d.e=1]}",
            "names form=b, which is not there; there are form=a",
        ),
        ("form: {a: [b.c=1]}\ncombinations: [a]", "must map names"),
        ("form: {a: model.kind=baseline}", "must be a list"),
        ("form: []", "must map names"),
        ("form: [", "not valid YAML"),
    ],
)
def test_a_sweep_file_that_means_nothing_is_refused(tmp_path, content, message):
    (tmp_path / "sweep.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        expand([], str(tmp_path / "sweep.yaml"))


def test_commas_in_quotes_and_brackets_separate_nothing_and_awkward_text_stays_as_it_is():
    assert split_values("[[0,1],[1,2]],[]") == ["[[0,1],[1,2]]", "[]"] and split_values(
        "'a,b',it's"
    ) == ["'a,b'", "it's"]
    (run,) = expand([f"logging.run_name={AWKWARD}"])
    assert run.overrides == (f"logging.run_name={AWKWARD}",) and set(run.name) <= set(
        "abcdefghijklmnopqrstuvwxyzHOME_=-"
    )


@pytest.mark.parametrize(
    "sweep, message",
    [(["train.seed"], "expected section.key=value"), (["a.b=1", "a.b=2"], "names a key twice")],
)
def test_a_sweep_that_means_nothing_is_refused(sweep, message):
    with pytest.raises(ConfigError, match=message):
        expand(sweep)


def test_launch_without_slurm_goes_on_after_a_killed_task_and_status_shows_it(tmp_path, dataset):
    """Two tasks; rank 1 is killed before the first step, each time, and the run gives up; without
    the fault it finishes.
    """
    pytest.importorskip("submitit", reason="the extra `cluster` is not installed")
    helper = Jobs(None, tmp_path, dataset)
    config = helper.configuration("local")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_API_KEY": SECRET,
        "EBWM_FAULTS": "kill@start=1,rank=1",
    }

    def launch(*arguments, expect=0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ebwm_scale.launch", *arguments],
            env=environment,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=60,
        )
        assert done.returncode == expect, done.stdout
        return done.stdout

    folder = tmp_path / "local"
    assert "submitted" in launch(
        "--config",
        str(config),
        "--cluster",
        "local",
        "--tasks-per-node",
        "2",
        "--run-dir",
        str(folder),
        "--set",
        f"logging.run_name={AWKWARD}",
    )
    assert not any(
        row["event"] == "end" for row in read_attempts(folder)
    )  # it runs in the background: the launcher's pipe has ended before it
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not (
        read_attempts(folder) and read_attempts(folder)[-1].get("verdict") in ("done", "give up")
    ):
        time.sleep(0.5)
    ends = [row for row in read_attempts(folder) if row["event"] == "end"]
    assert [row["outcome"] for row in ends] == ["crashed", "crashed"], (
        tmp_path / "local" / "logs" / "rank_0000.log"
    ).read_text()[-2000:]
    assert "gave up: 2 attempts" in ends[-1]["reason"] and not ends[-1]["progress"]
    assert "1 failed" in launch("--status", str(folder), expect=1)
    environment["EBWM_FAULTS"] = ""
    launch("--resubmit", str(folder), "--set", "train.max_steps=5")
    while time.monotonic() < deadline and read_attempts(folder)[-1].get("verdict") != "done":
        time.sleep(0.5)
    assert "1 finished" in launch("--status", str(folder)) and "5/5" in launch(
        "--status", str(folder)
    )
    assert yaml.safe_load((folder / "config.yaml").read_text())["logging"]["run_name"] == AWKWARD
    assert (
        holding_secret(tmp_path) == [] and json.loads((folder / "launch.json").read_text())["jobs"]
    )
