"""Whole runs of train.py: resume is exact, processes do not matter, signals save, every optional
part changes no loss.
"""

import json
import signal

import pytest
import tracked_rows
from training_runs import same

import ebwm_scale

S2 = {
    "refinement.graph": "truncate",
    "refinement.loss": "last",
    "refinement.num_steps": 3,
    "refinement.min_num_steps": 2,
    "refinement.noise": 1.0,
    "refinement.step_size_random_factor": 2.0,
    "refinement.replay": True,
    "refinement.replay_capacity": 8,
    "refinement.landscapes": "one",
}
ALGORITHM_1 = {"refinement.graph": "full", "refinement.loss": "last"}


@pytest.fixture(scope="module")
def reference(runs):
    return runs.run("reference", afresh=True)


def test_a_run_prints_what_happens_and_leaves_the_documented_folder(runs, reference):
    assert (
        "step 8/8" in reference
        and "validation at step 8" in reference
        and "report.html" in reference.splitlines()[-1]
    )
    assert (
        "attention of the observed stream: sdpa (flash_attn: it needs a GPU), the predicted "
        "stream: reference (triton: " in reference
    )
    folder = runs.folder / "reference"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "checkpoints/latest",
        "report.html",
        "samples.json",
        "summary.json",
    ):
        assert (folder / name).exists(), name
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert {
        "step",
        "tokens_seen",
        "loss",
        "loss_per_step",
        "energy_per_step",
        "grad_norm",
        "learning_rate",
        "step_size",
        "step_time_s",
        "tokens_per_s",
        "model_tflops",
        "mfu",
        "peak_memory_gib",
    } <= set(row)
    assert (
        next(
            e["event"] for e in map(json.loads, (folder / "events.jsonl").read_text().splitlines())
        )
        == "start"
    )
    assert len(list((folder / "checkpoints").glob("step_*"))) == 2  # keep_last
    model, config = ebwm_scale.load_checkpoint(folder)
    assert config.data.context_length == 16 and not model.training


@pytest.mark.parametrize("kind", ["S1", "S2 with replay"])
def test_resume_after_kill_is_bitwise_equal(runs, reference, kind):
    whole, broken, overrides = (
        ("reference", "killed", {}) if kind == "S1" else ("s2", "s2_killed", S2)
    )
    if kind != "S1":
        runs.run(whole, overrides=overrides)
    code = runs.interrupt(broken, signal.SIGKILL, after="step 5/8", overrides=overrides)
    assert code == -signal.SIGKILL
    output = runs.run(broken, overrides=overrides, flags=("--resume",))
    assert "resumed at step 3" in output
    assert runs.rows(broken) == runs.rows(whole)
    assert same(runs.state(broken), runs.state(whole)) == []


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.soak), signal.SIGINT]
)
def test_a_signal_saves_leaves_with_75_and_resumes_exactly(runs, reference, number):
    name = f"signal_{number.name}"
    assert runs.interrupt(name, number, after="step 2/8") == 75
    assert (runs.folder / name / "checkpoints" / "latest").exists()
    runs.run(name, flags=("--resume",))
    assert runs.rows(name) == runs.rows("reference")
    assert same(runs.state(name), runs.state("reference")) == []


def test_the_time_limit_does_the_same(runs):
    assert "train.max_minutes" in runs.run(
        "limited", expect=75, overrides={"train.max_minutes": 1e-6}
    )
    assert runs.rows("limited")[-1]["step"] == 1


def close(left, right, tolerance):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key] == pytest.approx(right[key], rel=tolerance, abs=0), key


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("S1", {}),
        pytest.param("S2", S2, marks=pytest.mark.soak),
        pytest.param("Algorithm 1", ALGORITHM_1, marks=pytest.mark.soak),
        pytest.param("baseline", {"model.kind": "baseline"}, marks=pytest.mark.soak),
    ],
)
def test_two_processes_and_accumulation_give_the_losses_of_one(runs, name, overrides):
    one, two, accumulated = (
        f"{name} {what}".replace(" ", "_") for what in ("one", "two", "accumulated")
    )
    runs.run(one, overrides=overrides)
    runs.run(two, overrides=overrides, processes=2)
    close(runs.losses(two), runs.losses(one), 1e-6)
    runs.run(accumulated, overrides={**overrides, "train.micro_batch_size": 2})
    close(runs.losses(accumulated), runs.losses(one), 1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_give_the_losses_of_stage_0_and_resume_exactly(runs, reference, stage):
    overrides, name = {"deepspeed.zero_stage": stage}, f"zero_{stage}"
    runs.run(name, overrides=overrides, processes=2)
    close(runs.losses(name), runs.losses("reference"), 1e-6)
    runs.interrupt(
        f"{name}_killed", signal.SIGKILL, after="step 5/8", overrides=overrides, processes=2
    )
    runs.run(f"{name}_killed", overrides=overrides, processes=2, flags=("--resume",))
    assert runs.rows(f"{name}_killed") == runs.rows(name)
    model, _ = ebwm_scale.load_checkpoint(runs.folder / name)
    whole, _ = ebwm_scale.load_checkpoint(runs.folder / "reference")
    for (key, ours), (_, theirs) in zip(model.state_dict().items(), whole.state_dict().items()):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max() + 1e-7, key


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.soak), 2])
def test_bf16_trains_and_stays_near_fp32(runs, reference, stage):
    name = f"bf16_{stage}"
    runs.run(name, overrides={"train.precision": "bf16", "deepspeed.zero_stage": stage})
    ours, theirs = runs.losses(name), runs.losses("reference")
    assert max(abs(a - b) for key in theirs for a, b in zip(ours[key], theirs[key])) < 0.1
    ebwm_scale.load_checkpoint(runs.folder / name)


def test_logging_evaluation_checkpoints_and_workers_change_no_loss(runs, reference):
    runs.run(
        "quiet",
        overrides={
            "logging.every_steps": 4,
            "evaluation.every_steps": 0,
            "checkpoint.every_steps": 0,
            "data.num_workers": 2,
        },
    )
    expected, quiet = runs.losses("reference"), runs.losses("quiet")
    assert set(quiet) == {(4, "train"), (8, "train"), (8, "validation")}
    assert quiet == {key: expected[key] for key in quiet}


def test_the_deepspeed_launcher_starts_the_same_run(runs, reference):
    import subprocess
    import sys
    from pathlib import Path

    command = runs.command("launched")
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators",
        "1",
        "--bind_cores_to_rank",
    ][:3]
    process = subprocess.run(
        [*launcher, *command[1:]], capture_output=True, text=True, timeout=240, cwd=runs.folder
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    close(runs.losses("launched"), runs.losses("reference"), 1e-6)


def test_resuming_a_finished_run_adds_nothing(runs, reference):
    before = runs.rows("reference")
    runs.run("reference", flags=("--resume",))
    assert runs.rows("reference") == before


def test_after_kill_9_and_resume_every_tracker_has_the_rows_of_metrics_jsonl(runs, reference):
    """Killed at step 7, resumed at 6: no row is dropped or doubled, no loss changes."""
    pytest.importorskip("wandb", reason="the extra `tracking` is not installed")
    pytest.importorskip("tensorboard", reason="the extra `tracking` is not installed")
    tracked = {"logging.wandb": "offline", "logging.tensorboard": True, "logging.profile": [8, 1]}
    faults = {"EBWM_FAULTS": "kill@step=7"}
    runs.run("tracked", expect=-signal.SIGKILL, overrides=tracked, variables=faults)
    folder = runs.folder / "tracked"
    identity = (folder / "wandb_id").read_text()
    runs.run("tracked", overrides=tracked, flags=("--resume",))
    assert (folder / "wandb_id").read_text() == identity
    assert len(list((folder / "wandb").glob(f"offline-run-*-{identity}"))) == 2
    assert runs.rows("tracked") == runs.rows("reference")
    expected = tracked_rows.of_metrics(folder)
    assert len(expected) == 10  # 8 steps and 2 evaluations
    assert tracked_rows.of_wandb(folder) == expected
    assert tracked_rows.of_tensorboard(folder) == tracked_rows.as_float32(expected)
    assert sorted(file.name for file in (folder / "profile").iterdir()) == [
        "steps_000008-000008_rank_0.memory.json",
        "steps_000008-000008_rank_0.trace.json.gz",
    ]


def test_a_run_shorter_than_the_logging_interval_has_a_report_and_bad_lines_do_not_stop_a_resume(
    runs,
):
    short = {"train.max_steps": 3, "logging.every_steps": 10, "evaluation.every_steps": 0}
    output = runs.run("short", overrides=short)
    folder = runs.folder / "short"
    assert f"finished; report: {folder / 'report.html'}" in output
    assert "shorter than logging.every_steps" in (folder / "report.html").read_text()
    for name in ("metrics.jsonl", "events.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b"\xff\n")
    output = runs.run("short", overrides=short | {"train.max_steps": 5}, flags=("--resume",))
    assert output.count("warning: metrics.jsonl: 1 unreadable line left out") == 1
    page = (folder / "report.html").read_text()
    assert "events.jsonl: 1 unreadable line left out" in page and "step 5 of 5" in page
    assert [row["step"] for row in runs.rows("short")] == [3, 5]
