"""Training, its --dry-run and the doctor refuse the same runs, in the same words, before anything
is written.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from preloaded import PreloadedRun
from training_runs import ROOT, TINY, end

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.run_location import check_folder
from ebwm_scale.training.dry_run import MEASURED_FLOPS, measure_step, part_of
from ebwm_scale.training.preflight import check_run

SHORT = {"evaluation.every_steps": 0, "evaluation.max_samples": 4, "checkpoint.every_steps": 0}


def configuration(dataset, **sections):
    values = {**TINY, "data": {"manifest": str(dataset)}}
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return config_from_dict(values)


def doctor(config: Path, run_dir: Path) -> tuple[int, str]:
    """Its exit code, and what it says."""
    command = ["-m", "ebwm_scale.doctor", "--config", str(config), "--run-dir", str(run_dir)]
    run = PreloadedRun(command, ROOT, {})
    output, _ = run.communicate(timeout=200)
    return run.wait(), output


REFUSED = {
    "context_above_the_dataset's": (
        {"data.context_length": 64},
        "data.context_length is 64: the shards of ",
    ),
    "kernels_that_cannot_run": (
        {"model.attention_backend": "triton"},
        "backend triton cannot run torch.float32",
    ),
    "data_of_another_kind": ({"state.kind": "embedding"}, "state.kind is embedding, but "),
    "deepspeed_that_it_refuses": (
        {"deepspeed.raw": {"zero_optimization": {"stage": 9}}},
        "deepspeed.raw: DeepSpeed refuses it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_dry_run_the_doctor_and_training_refuse_it_in_the_same_words(runs, name):
    overrides, part = REFUSED[name]
    name = re.sub(r"\W", "-", name)
    said = []
    for flags in ((), ("--dry-run",)):
        output = runs.run(name, overrides=overrides, flags=flags, expect=2)
        said.append(next(line for line in output.splitlines() if part in line))
        assert "Traceback" not in output
    assert said[0] == said[1]
    code, output = doctor(runs.folder / f"{name}.yaml", runs.folder / name)
    assert code == 2 and said[0] in output and "1 missing" in output
    assert not (runs.folder / name).exists()


PROBLEMS = [
    ({"data": {"context_length": 17}}, "the shards of "),
    ({"data": {"stream": ["a.tar"]}}, "data.stream names 1 shards for 2 processes"),
    ({"train": {"global_batch_size": 5}}, "does not divide over 2 processes"),
    ({"model": {"vocabulary_size": 7}}, "model.vocabulary_size is 7"),
    ({"deepspeed": {"raw": {"train_batch_size": 7}}}, "deepspeed.raw holds train_batch_size"),
    ({"deepspeed": {"raw": {"zero_optimization": 3}}}, "DeepSpeed refuses it"),
    ({"deepspeed": {"raw": {"fp16": {"enabled": "maybe"}}}}, "DeepSpeed refuses it"),
    ({"data": {"manifest": "nowhere/manifest.json"}}, "nowhere/manifest.json"),
]


@pytest.mark.parametrize("sections, part", PROBLEMS)
def test_each_problem_is_one_line_and_all_are_found_at_once(sections, part, dataset, tmp_path):
    sections = {**sections, "train": {**sections.get("train", {}), "micro_batch_size": None}}
    check = check_run(
        configuration(dataset, **sections), world_size=2, run_dir=tmp_path / "run", report=print
    )
    assert [text for _, text in check.problems if part in text], check.problems
    assert all("\n" not in text for _, text in check.problems)
    with pytest.raises(ConfigError, match=re.escape(part)):
        check.refuse()
    assert list(tmp_path.iterdir()) == []


def test_a_sound_run_is_not_refused_and_nothing_is_written(dataset, tmp_path):
    check = check_run(configuration(dataset), world_size=2, run_dir=tmp_path / "a" / "b")
    assert check.problems == [] and check.warnings == [] and check.config.data.context_length == 16
    assert (check.micro_batch, check.accumulation) == (2, 1) and list(tmp_path.iterdir()) == []


def unwritable(folder: Path) -> dict[str, Path]:
    (folder / "file").write_text("")
    (folder / "link").symlink_to(folder / "nothing")
    return {
        "a_file": folder / "file",
        "below_a_file": folder / "file" / "run",
        "a_link_to_nothing": folder / "link",
        "a_long_name": folder / ("x" * 300),
        "a_long_path": folder.joinpath(*["x" * 200] * 30),
        "proc": Path("/proc/run"),
    }


UNWRITABLE = (
    "a_file",
    "below_a_file",
    "a_link_to_nothing",
    "a_long_name",
    "a_long_path",
    "proc",
)


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_run_folder_that_cannot_be_written_is_one_line(name, tmp_path):
    path = unwritable(tmp_path)[name]
    before = sorted(tmp_path.iterdir())
    for resume in (False, True):
        with pytest.raises(ConfigError) as error:
            check_folder(path, resume=resume)
        assert "--run-dir" in str(error.value) and str(error.value).isprintable()
        assert len(str(error.value)) < 500
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_folder(tmp_path / "run", resume=False)


def test_the_run_folder_is_tried_before_the_data_is_read(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    config = configuration(dataset, data={"manifest": "nowhere"})
    check = check_run(config, world_size=1, run_dir=tmp_path / "file")
    assert [subject for subject, _ in check.problems] == ["run folder"]


WARNED = [
    ({"train": {"max_steps": 8}, "schedule": {"warmup_steps": 16}}, "at 50 % of the peak"),
    ({"train": {"max_steps": 8}, "schedule": {"warmup_steps": 8}}, "ends in the warm-up"),
    ({"schedule": {"decay_steps": 1000}}, "schedule.decay_steps 1000 is above train.max_steps 8"),
    ({"train": {"max_steps": 100_000_000}}, "epochs of"),
    ({"refinement": {"candidates": 10**6}}, "all of them move in every step"),
]


@pytest.mark.parametrize("sections, part", WARNED)
def test_what_is_hardly_meant_is_said(sections, part, dataset, tmp_path):
    check = check_run(configuration(dataset, **sections), world_size=1, run_dir=tmp_path / "run")
    assert check.problems == [] and len(check.warnings) == 1 and part in check.warnings[0][1]


def test_a_warm_up_that_ends_after_the_decay_is_refused():
    values = {"schedule": {"warmup_steps": 50, "decay_steps": 20}, "train": {"max_steps": 100}}
    with pytest.raises(ConfigError, match="schedule.warmup_steps is 50: must be at most"):
        config_from_dict(values)


def test_training_and_the_dry_run_say_warnings(runs):
    overrides = {**SHORT, "train.max_steps": 2, "schedule.warmup_steps": 40}
    for flags in (("--dry-run",), ()):
        output = runs.run("warned", overrides=overrides, flags=flags)
        assert "warning: schedule.warmup_steps 40 is not below train.max_steps 2" in output
    events = (runs.folder / "warned" / "events.jsonl").read_text()
    assert "the run ends in the warm-up, at 5 % of the peak" in events


def test_more_steps_on_a_resume_ask_before_they_raise_the_learning_rate(runs):
    runs.run("longer", overrides={**SHORT, "train.max_steps": 6})
    folder = runs.folder / "longer"
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    more = {**SHORT, "train.max_steps": 12}
    for flags in (("--resume",), ("--resume", "--dry-run")):
        output = runs.run("longer", overrides=more, flags=flags, expect=2)
        assert (
            "learning rate at step 6: it was to be 1.000e-03, is now 7.750e-03, 7.75 times as much:"
            " accept it with --accept-new-rate, or keep the schedule with"
            " --set schedule.decay_steps=6"
        ) in output
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    kept = {**SHORT, "train.max_steps": 8, "schedule.decay_steps": 6}
    assert "learning rate at step" not in runs.run("longer", overrides=kept, flags=("--resume",))
    output = runs.run("longer", overrides=more, flags=("--resume", "--accept-new-rate"))
    assert "learning rate at step 8: it was to be 1.000e-03, is now 4.719e-03" in output
    assert runs.rows("longer")[-1]["step"] == 12


def test_a_dry_run_measures_a_small_part_and_says_so(dataset, tmp_path, capsys):
    """A step of minutes: two thousand samples of a model with a large vocabulary."""
    large = configuration(
        dataset,
        model={"size": "small", "num_layers": 12, "width": 768, "num_heads": 12},
        train={"global_batch_size": 2048},
    )
    check = check_run(large, world_size=1, run_dir=tmp_path / "run")
    part = part_of(check.config, check.micro_batch, MEASURED_FLOPS)
    assert part.samples < 20 and part.factor > 100
    whole = part_of(check.config, check.micro_batch, float("inf"))
    assert (whole.samples, whole.factor) == (2048, 1.0)
    start = time.monotonic()
    seconds = measure_step(check.config, check.micro_batch, print)
    assert time.monotonic() - start < 60 and seconds > 10
    assert re.search(
        r"measuring a training step on this CPU: \d+ of 2048 samples, \d+ of 16 pos",
        capsys.readouterr().out,
    )


def test_of_one_sample_that_takes_long_some_positions_are_measured(dataset, tmp_path):
    config = configuration(dataset, data={"context_length": 16})
    check = check_run(config, world_size=1, run_dir=tmp_path / "run")
    part = part_of(check.config, 4, 1e6)
    assert part.samples == 1 and part.config.data.context_length < 16 and part.factor > 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_dry_run_answers_signals_at_once(runs, number):
    """While it measures: a step that would take minutes is in progress."""
    overrides = {"model.width": 2048, "model.num_layers": 24, "train.global_batch_size": 512}
    process = runs.start(f"signalled_{number}", overrides=overrides, flags=("--dry-run",))
    try:
        for line in process.stdout:
            if "measuring" in line:
                break
        time.sleep(0.5)
        process.send_signal(number)
        sent = time.monotonic()
        output, _ = process.communicate(timeout=60)
        seconds = time.monotonic() - sent
    finally:
        end(process)
    assert process.returncode == 1 and seconds < 15, output
    assert f"{number.name}: the dry run is given up; nothing was started" in output
    assert "Traceback" not in output


class FakeTracker:
    """What RunFolder asks of a W&B run."""

    def __init__(self):
        self.rows, self.metrics = [], []

    def define_metric(self, name, **options):
        self.metrics.append((name, options))

    def log(self, values, **options):
        self.rows.append((values, options))

    def finish(self):
        pass


def test_what_is_logged_again_after_a_resume_reaches_wandb(
    tmp_path, monkeypatch, capsys, open_run_folder
):
    """W&B drops rows whose `step=` is below its last one; the step is a metric of ours, and the x
    axis.
    """
    tracker = FakeTracker()
    wandb = type(sys)("wandb")
    wandb.init = lambda **options: tracker
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = open_run_folder(tmp_path / "run", config_from_dict({"logging": {"wandb": "offline"}}))
    for step in (1, 2, 1, 2, 3):
        folder.metrics({"step": step, "loss": 1.0})
    folder.close()
    assert [values["step"] for values, _ in tracker.rows] == [1, 2, 1, 2, 3]
    assert all(options == {} for _, options in tracker.rows)
    assert ("*", {"step_metric": "step"}) in tracker.metrics
    assert f"wandb sync {tmp_path / 'run' / 'wandb'}" in capsys.readouterr().out


def test_a_wandb_that_does_not_start_is_one_warning_and_the_run_goes_on(
    tmp_path, monkeypatch, capsys, open_run_folder
):
    """No network, no key, a server that is down: none of it is a reason to train nothing."""

    def refuse(**options):
        raise RuntimeError("Error communicating\nwith wandb: the network is unreachable")

    wandb = type(sys)("wandb")
    wandb.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = open_run_folder(tmp_path / "run", config_from_dict({"logging": {"wandb": "online"}}))
    folder.metrics({"step": 1, "loss": 1.0})
    folder.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "warning: logging.wandb is online, but W&B did not start (RuntimeError: "
    )
    assert "the network is unreachable" in line and "--resume" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("\n") == 1
