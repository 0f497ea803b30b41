"""Bad input: one clear line with the value, what is allowed and what to do; exit code 2, nothing
started, nothing lost.
"""

import json
import resource
import shutil
import subprocess

import pytest
from training_runs import same

from ebwm_scale.checkpoint.reader import find_latest, verify
from ebwm_scale.core.errors import CheckpointError

CASES = {
    "misspelt_key": (
        {"refinement.num_step": 3},
        ["refinement.num_step: unknown key", "did you mean refinement.num_steps?"],
    ),
    "wrong_type": ({"train.max_steps": "many"}, ["train.max_steps is 'many'", "a whole number"]),
    "batch_that_does_not_divide": (
        {"train.global_batch_size": 6, "train.micro_batch_size": 4},
        ["train.global_batch_size 6", "train.micro_batch_size 4"],
    ),
    "missing_manifest": ({"data.manifest": "nowhere/manifest.json"}, ["nowhere/manifest.json"]),
    "context_too_long": ({"data.context_length": 99}, ["data.context_length is 99", "16"]),
    "other_vocabulary": (
        {"model.vocabulary_size": 50277},
        ["model.vocabulary_size is 50277", "300"],
    ),
    "backend_that_cannot_run": (
        {"model.attention_backend": "triton"},
        ["backend triton cannot run torch.float32, head dimension 16 on cpu", "reference"],
    ),
    "heads_that_do_not_divide": ({"model.num_heads": 5}, ["model.num_heads 5"]),
}


@pytest.mark.parametrize("name", CASES)
def test_each_bad_configuration_is_one_clear_message(runs, name):
    overrides, parts = CASES[name]
    output = runs.run(name, overrides=overrides, expect=2)
    assert "Traceback" not in output
    for part in parts:
        assert part in output
    assert not (runs.folder / name / "metrics.jsonl").exists()


def test_set_takes_several_values_and_may_be_repeated(runs):
    flags = ("--set", "train.max_step=3", "model.size=huge", "--set", "optimizer.beta1=x")
    output = runs.run("set", flags=flags, expect=2)
    assert all(
        part in output
        for part in ("train.max_step", "model.size is 'huge'", "optimizer.beta1 is 'x'")
    )


def test_all_errors_are_reported_at_once(runs):
    output = runs.run(
        "several",
        overrides={"train.max_step": 3, "model.size": "huge", "optimizer.beta1": "x"},
        expect=2,
    )
    assert all(
        part in output
        for part in ("train.max_step", "model.size is 'huge'", "optimizer.beta1 is 'x'")
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_shard_is_named_before_the_start(runs, dataset, tmp_path, damage):
    folder = shutil.copytree(dataset.parent, tmp_path / "shards")
    shard = folder / json.loads(dataset.read_text())["splits"]["train"]["shards"][0]["path"]
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        content = content[:-700]
    else:
        content[1600] ^= 4
    shard.write_bytes(content)
    output = runs.run(
        f"shard_{damage}", overrides={"data.manifest": str(folder / "manifest.json")}, expect=2
    )
    assert shard.name in output and "Traceback" not in output


def test_an_existing_run_is_not_overwritten_and_another_configuration_is_refused(runs):
    runs.run("mine", overrides={"train.max_steps": 3})
    before = runs.rows("mine")
    assert "--resume" in runs.run("mine", overrides={"train.max_steps": 3}, expect=2)
    output = runs.run(
        "mine", overrides={"train.max_steps": 3, "model.width": 64}, flags=("--resume",), expect=2
    )
    assert "model.width was 32, is 64" in output
    assert runs.rows("mine") == before
    output = runs.run(
        "mine", overrides={"train.max_steps": 3, "train.seed": 1}, flags=("--resume",), expect=2
    )
    assert "train.seed was 33, is 1" in output


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(runs):
    runs.run("damaged", overrides={"train.max_steps": 6})
    checkpoints = runs.folder / "damaged" / "checkpoints"
    newest = checkpoints / "step_000006"
    file = newest / "state-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its hash"):
        verify(newest)
    warnings = []
    assert find_latest(checkpoints, warnings.append).step == 3
    assert len(warnings) == 1 and "step_000006" in warnings[0]
    output = runs.run("damaged", overrides={"train.max_steps": 6}, flags=("--resume",))
    assert "resumed at step 3" in output and "does not match its hash" in output
    assert verify(newest).step == 6


@pytest.mark.soak
def test_a_full_disk_while_saving_is_a_warning_and_training_goes_on(runs):
    """No file may grow beyond 60 kB: metrics fit, checkpoints do not."""
    command = runs.command("full_disk")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=240, preexec_fn=limit, cwd=runs.folder
    )
    assert result.stderr.count("the checkpoint could not be written") == 3, result.stderr[-3000:]
    assert result.stderr.count("training goes on") == 2  # it does not after the last one
    assert "step 8 is NOT saved, there is no checkpoint yet" in result.stderr
    assert result.returncode == 1
    assert runs.rows("full_disk")[-1]["step"] == 8
    assert list((runs.folder / "full_disk" / "checkpoints").iterdir()) == []
    runs.run("whole")
    assert runs.losses("full_disk") == runs.losses("whole")
    runs.run("full_disk", flags=("--resume",))  # nothing to resume from: it starts again, and saves
    assert same(runs.state("full_disk"), runs.state("whole")) == []


def test_a_loss_that_is_not_finite_stops_with_76(runs):
    output = runs.run(
        "diverges",
        overrides={"refinement.step_size": 1e38, "optimizer.learning_rate": 1e30},
        expect=76,
    )
    assert "stopped" in output and "learning_rate" in output
    assert not list((runs.folder / "diverges").glob("checkpoints/step_*"))


def test_dry_run_tells_the_plan_and_starts_nothing(runs):
    output = runs.run("dry", flags=("--dry-run",))
    for part in ("context_length: 16", "fingerprint", "GiB", "tokens", "FLOP"):
        assert part in output, output
    assert not (runs.folder / "dry").exists()
