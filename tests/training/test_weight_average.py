"""The average of the weights: what it is, and that no stop, stage or number of processes changes
it.
"""

import signal

import pytest
import torch
from training_runs import same

from ebwm_scale import think
from ebwm_scale.checkpoint.convert import export_run, import_run
from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.checkpoint.reader import CheckpointReader
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import CheckpointError, ConfigError
from ebwm_scale.core.world import World
from ebwm_scale.data.loading.observation import Observation
from ebwm_scale.data.loading.opening import open_splits
from ebwm_scale.training.validation import validate
from ebwm_scale.training.weight_average import WeightAverage

DECAY = 0.4
AVERAGED = {
    "train.ema": DECAY,
    "train.max_steps": 6,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 9,
    "evaluation.every_steps": 0,
}


def newest(folder) -> CheckpointReader:
    checkpoints = folder / "checkpoints"
    return CheckpointReader(checkpoints / (checkpoints / "latest").read_text().strip())


@pytest.fixture(scope="module")
def averaged(runs):
    runs.run("averaged", overrides=AVERAGED)
    return runs.folder / "averaged"


def test_an_average_forgets_its_first_weights_at_once_and_then_keeps_its_decay():
    weights = [torch.tensor([1.0, -2.0]).double() * n for n in range(40)]
    average = WeightAverage(0.7)
    average.begin({"w": weights[0]})
    expected = weights[0].clone()
    for n, value in enumerate(weights[1:]):
        average.update({"w": value})
        decay = min(0.7, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(average.values["w"], expected, rtol=1e-14, atol=0)
    assert decay == 0.7 and average.updates == 39


def test_a_run_averages_the_weights_after_each_of_its_updates(averaged):
    saved = [CheckpointReader(f) for f in sorted((averaged / "checkpoints").glob("step_*"))]
    assert len(saved) == 6
    expected = saved[0].weights("ema")
    for n, reader in enumerate(saved[1:], start=1):
        decay = min(DECAY, (1 + n) / (10 + n))
        weights = reader.weights()
        found = reader.weights("ema")
        for name in weights:
            expected[name] = decay * expected[name].double() + (1 - decay) * weights[name].double()
            torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(weights["step_size"], found["step_size"])


@pytest.fixture(scope="module")
def plain(runs):
    runs.run("plain", overrides={**AVERAGED, "train.ema": None})
    return runs.folder / "plain"


def test_averaging_changes_no_step_and_a_killed_run_ends_with_the_same_average(
    runs, averaged, plain
):
    assert runs.rows("plain") == runs.rows("averaged")
    faults = {"EBWM_FAULTS": "kill@step=4"}
    runs.run("killed", overrides=AVERAGED, variables=faults, expect=-signal.SIGKILL)
    runs.run("killed", overrides=AVERAGED, flags=("--resume",))
    assert same(runs.state("killed"), runs.state("averaged")) == []


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([(1, 0), (2, 1)], marks=pytest.mark.soak),
        pytest.param([(1, 0), (2, 1), (2, 3), (1, 2)], marks=pytest.mark.soak),
    ],
    ids=len,
)
def test_an_average_goes_through_numbers_of_processes_and_stages(runs, averaged, parts):
    """parts: (processes, ZeRO stage) of each start; a part ends after one step."""
    name = f"elastic_{len(parts)}"
    for index, (processes, stage) in enumerate(parts):
        last = index + 1 == len(parts)
        overrides = {
            **AVERAGED,
            "deepspeed.zero_stage": stage,
            "refinement.recompute": "block" if stage == 3 else "none",
            **({} if last else {"train.max_minutes": 1e-6}),
        }
        flags = ("--resume",) if index else ()
        expect = 0 if last else 75
        runs.run(name, processes=processes, overrides=overrides, flags=flags, expect=expect)
    ours, theirs = newest(runs.folder / name), newest(averaged)
    for parameter, expected in theirs.weights("ema").items():
        found = ours.read(parameter, "ema").view_as(expected)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), parameter
    weights = theirs.read("state_map")  # it is not the weights themselves
    assert (theirs.read("state_map", "ema") - weights).abs().max() > 1e-3 * weights.abs().max()


@pytest.mark.soak
def test_an_average_that_a_resume_switches_on_begins_with_the_weights(runs):
    runs.run("later", overrides={**AVERAGED, "train.ema": None, "train.max_steps": 2})
    overrides = {**AVERAGED, "train.max_steps": 3, "schedule.decay_steps": 2}
    output = runs.run("later", overrides=overrides, flags=("--resume",))
    assert "train.ema was None, is 0.4" in output
    before, after = (
        CheckpointReader(runs.folder / "later" / "checkpoints" / f"step_00000{n}") for n in (2, 3)
    )
    decay = min(DECAY, 3 / 12)
    expected = decay * before.read("step_size") + (1 - decay) * after.read("step_size")
    torch.testing.assert_close(after.read("step_size", "ema"), expected)


def test_the_average_is_loaded_thought_with_and_converted(averaged, tmp_path, capsys):
    model, _ = load_checkpoint(averaged, weights="ema")
    expected = newest(averaged).weights("ema")
    assert same(dict(model.state_dict()), expected) == []
    export_run(averaged, tmp_path / "ema", weights="ema", say=lambda _: None)
    converted, _ = load_checkpoint(tmp_path / "ema")
    assert same(dict(converted.state_dict()), expected) == []
    capsys.readouterr()
    outputs = []
    arguments = ["--prompt", "ab", "--max-new", "2", "--weights"]
    for checkpoint, weights in ((averaged, "ema"), (tmp_path / "ema", "trained")):
        assert think.main([str(checkpoint), *arguments, weights]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_converted_run_goes_on_with_its_average(averaged, tmp_path):
    export_run(averaged, tmp_path / "whole", training=True, say=lambda _: None)
    import_run(tmp_path / "whole", tmp_path / "again", say=lambda _: None)
    assert same(newest(tmp_path / "again").weights("ema"), newest(averaged).weights("ema")) == []


def test_where_there_is_no_average_it_is_said_in_one_line(averaged, plain, tmp_path):
    with pytest.raises(CheckpointError, match="holds no average of the weights"):
        load_checkpoint(plain, weights="ema")
    with pytest.raises(CheckpointError, match="holds no average of the weights"):
        export_run(plain, tmp_path / "no", weights="ema", say=lambda _: None)
    with pytest.raises(ConfigError, match="--weights ema with --training"):
        export_run(averaged, tmp_path / "no", weights="ema", training=True, say=lambda _: None)
    export_run(averaged, tmp_path / "one", say=lambda _: None)
    with pytest.raises(CheckpointError, match="is a converted folder, which holds one set"):
        load_checkpoint(tmp_path / "one", weights="ema")
    assert not (tmp_path / "no").exists()


VALIDATED = {**AVERAGED, "evaluation.every_steps": 3, "evaluation.max_samples": 8}


def validation_losses(runs, name) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in runs.rows(name) if "split" in row}


@pytest.fixture(scope="module")
def validated(runs):
    runs.run("validated", overrides={**VALIDATED, "evaluation.weights": "ema"})
    return runs.folder / "validated"


def test_a_run_may_validate_its_average_which_changes_no_step(runs, validated, averaged):
    """The loss of the average that its last checkpoint holds; the state is that of other runs."""
    assert same(runs.state("validated"), runs.state("averaged")) == []
    model, config = load_checkpoint(validated, weights="ema")
    trained, _ = load_checkpoint(validated)
    splits = open_splits([(config.data.manifest, 1.0)], ("validation",), verify="sizes")
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    observe = Observation(splits["validation"].manifest, world.device)
    losses = [
        validate(m, splits["validation"], config, world, observe, context_length=16, batch_size=4)
        for m in (model, trained)
    ]
    found = validation_losses(runs, "validated")
    assert sorted(found) == [3, 6]
    assert found[6] == pytest.approx(losses[0]["loss"], rel=1e-6)
    assert abs(found[6] - losses[1]["loss"]) > 1e-3


@pytest.mark.multiprocess
@pytest.mark.soak
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_validated_average_is_the_same_at_every_stage(runs, validated, stage):
    overrides = {
        **VALIDATED,
        "evaluation.weights": "ema",
        "deepspeed.zero_stage": stage,
        "refinement.recompute": "block" if stage == 3 else "none",
    }
    runs.run(f"validated_{stage}", overrides=overrides, processes=2)
    expected = validation_losses(runs, "validated")
    assert validation_losses(runs, f"validated_{stage}") == pytest.approx(expected, rel=1e-4)


def test_an_average_that_is_not_kept_cannot_be_validated():
    with pytest.raises(ConfigError, match="evaluation.weights is ema without train.ema"):
        config_from_dict({"evaluation": {"weights": "ema"}})
