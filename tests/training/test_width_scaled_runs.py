"""Width transfer in runs: a conversion and a resume carry it, every ZeRO stage trains alike, and
what would lose it is refused.
"""

import json

import pytest
from released_cases import SILENT
from training_runs import same

from ebwm_scale import load_checkpoint
from ebwm_scale.checkpoint.convert import export_run, import_run
from ebwm_scale.checkpoint.convert_released import export_released
from ebwm_scale.checkpoint.reader import CheckpointReader, check_same_run, saved_config
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import CheckpointError, ConfigError

SCALED = {
    "model.parametrization": "width_scaled",
    "model.base_width": 16,
    "model.base_num_heads": 2,
    "train.max_steps": 4,
    "checkpoint.every_steps": 2,
    "evaluation.every_steps": 0,
}


@pytest.fixture(scope="module")
def whole(runs):
    """A finished run whose checkpoint of step 2 is there."""
    runs.run("wide", overrides=SCALED)
    return runs.folder / "wide"


@pytest.fixture(scope="module")
def converted(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "step_2"
    export_run(whole / "checkpoints" / "step_000002", folder, training=True, **SILENT)
    return folder


def test_a_converted_and_resumed_run_ends_with_the_bits_of_the_whole_one(runs, whole, converted):
    import_run(
        converted,
        runs.folder / "moved",
        overrides=[f"data.manifest={runs.manifest}"],
        **SILENT,
    )
    runs.run("moved", overrides=SCALED, flags=("--resume",))
    ours, theirs = (
        CheckpointReader(folder / "checkpoints" / "step_000004")
        for folder in (runs.folder / "moved", whole)
    )
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert same(ours.weights(kind), theirs.weights(kind)) == []


def test_a_converted_folder_says_what_it_was_trained_with(whole, converted):
    for_transformers = json.loads((converted / "config.json").read_text())["ebwm"]
    for config in (saved_config(converted), config_from_dict(for_transformers)):
        assert config.model.parametrization == "width_scaled"
        assert (config.model.base_width, config.model.base_num_heads) == (16, 2)
    ours, _ = load_checkpoint(converted)
    theirs, _ = load_checkpoint(whole / "checkpoints" / "step_000002")
    assert same(ours.state_dict(), theirs.state_dict()) == []


@pytest.mark.parametrize(
    "key, value", [("parametrization", "standard"), ("base_width", 8), ("base_num_heads", 1)]
)
def test_a_resume_that_would_change_it_is_refused(whole, key, value):
    config = saved_config(whole)
    other = config.replace(model=config.model.replace(**{key: value}))
    with pytest.raises(CheckpointError, match=f"model.{key} was .*, is {value}"):
        check_same_run(config, other)


def test_the_released_layout_which_has_no_place_for_it_is_refused(converted, tmp_path):
    target = tmp_path / "released.ckpt"
    with pytest.raises(ConfigError, match="model.parametrization is width_scaled"):
        export_released(converted, target, **SILENT)
    assert not target.exists()


@pytest.mark.soak
def test_every_stage_of_zero_trains_alike(runs):
    recompute = {**SCALED, "refinement.recompute": "block"}
    for stage in range(4):
        runs.run(f"wide_{stage}", overrides={**recompute, "deepspeed.zero_stage": stage})
        for key, losses in runs.losses("wide_0").items():
            assert runs.losses(f"wide_{stage}")[key] == pytest.approx(losses, rel=1e-6)
