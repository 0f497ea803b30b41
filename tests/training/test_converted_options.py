"""Conversion of runs with normed heads, capped logits and schedule-free AdamW: the weights, their
average, and everything that a run goes on from.
"""

import pytest
import torch
from training_runs import same

from ebwm_scale import think
from ebwm_scale.checkpoint.convert import export_run, import_run
from ebwm_scale.checkpoint.load import load_checkpoint
from ebwm_scale.checkpoint.reader import CheckpointReader
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig

CAP = 3.0
OPTIONS = {
    "model.qk_norm": True,
    "model.logit_softcap": CAP,
    "optimizer.name": "schedule_free",
    "schedule.kind": "constant",
    "train.max_steps": 5,
    "evaluation.every_steps": 0,
}
SILENT = {"say": lambda _: None}


@pytest.fixture(scope="module", params=["energy", pytest.param("baseline", marks=pytest.mark.soak)])
def converted(request, runs):
    """(name of a finished run, its reader, overrides)."""
    overrides = {**OPTIONS, "model.kind": request.param}
    if request.param == "baseline":
        overrides["model.predicted_input"] = "state"
    name = f"options_{request.param}"
    runs.run(name, overrides=overrides)
    newest = runs.folder / name / "checkpoints" / "step_000005"
    return name, CheckpointReader(newest), overrides


@pytest.mark.parametrize("weights", ["trained", "ema"])
def test_a_folder_holds_the_weights_or_their_average_and_predicts_as_the_run_does(
    runs, converted, tmp_path, weights
):
    name, reader, _ = converted
    export_run(runs.folder / name, tmp_path / "model", weights=weights, **SILENT)
    model, config = load_checkpoint(tmp_path / "model")
    expected = reader.weights("ema" if weights == "ema" else "weight")
    assert same(dict(model.state_dict()), expected) == []
    other = reader.weights("weight" if weights == "ema" else "ema")
    assert len(same(other, expected)) == len(expected)  # all of them are averaged
    assert any(".q_norm." in parameter for parameter in expected)
    assert config.model.qk_norm and config.model.logit_softcap == CAP

    ids = torch.arange(10).view(2, 5)
    thinking = ThinkingConfig(seed=config.train.seed)
    of_run, _ = load_checkpoint(runs.folder / name, weights=weights)
    with torch.no_grad():
        states = last_states(model, ids, thinking)
        assert torch.equal(states, last_states(of_run, ids, thinking))
    assert 0 < states.abs().max() < CAP


def test_the_average_is_asked_for_by_name_and_the_command_says_so(
    runs, converted, tmp_path, capsys
):
    name, _, _ = converted
    lines = []
    export_run(runs.folder / name, tmp_path / "plain", say=lines.append)
    assert any("--weights ema" in line for line in lines)
    lines.clear()
    export_run(runs.folder / name, tmp_path / "average", weights="ema", say=lines.append)
    assert not any("--weights ema" in line for line in lines)
    capsys.readouterr()
    outputs = []
    for folder, weights in ((runs.folder / name, "ema"), (tmp_path / "average", "trained")):
        arguments = [str(folder), "--weights", weights, "--prompt", "ab", "--max-new", "2"]
        assert think.main(arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_run_that_went_through_a_folder_goes_on_bit_for_bit(runs, converted, tmp_path):
    """With both sequences of schedule-free AdamW, and from its third step."""
    name, reader, overrides = converted
    again = f"{name}_again"
    third = runs.folder / name / "checkpoints" / "step_000003"
    export_run(third, tmp_path / "moved", training=True, **SILENT)
    manifest = f"data.manifest={runs.manifest}"
    import_run(tmp_path / "moved", runs.folder / again, overrides=[manifest], **SILENT)
    imported = CheckpointReader(runs.folder / again / "checkpoints" / "step_000003")
    for kind in ("weight", "z", "ema", "exp_avg_sq"):
        assert reader.holds(kind) and imported.holds(kind)
        assert same(imported.weights(kind), CheckpointReader(third).weights(kind)) == []
    runs.run(again, overrides=overrides, flags=("--resume",))
    assert same(runs.state(again), runs.state(name)) == []
    after = [row for row in runs.rows(name) if row["step"] > 3]
    assert [row for row in runs.rows(again) if row["step"] > 3] == after and len(after) >= 2


@pytest.mark.soak
def test_a_run_may_begin_with_the_average_of_another(runs, converted, tmp_path):
    name, reader, overrides = converted
    export_run(runs.folder / name, tmp_path / "average", weights="ema", **SILENT)
    manifest = f"data.manifest={runs.manifest}"
    begun = runs.folder / f"{name}_begun"
    import_run(tmp_path / "average", begun, overrides=[manifest], **SILENT)
    assert (
        same(
            CheckpointReader(begun / "checkpoints" / "step_000000").weights(), reader.weights("ema")
        )
        == []
    )
    assert "resumed at step 0" in runs.run(begun.name, overrides=overrides, flags=("--resume",))


@pytest.mark.soak
def test_transformers_reads_a_folder_with_these_options(runs, converted, tmp_path):
    pytest.importorskip("transformers", reason="the package transformers is not installed")
    from ebwm_scale.integrations.transformers import EbwmModel

    name, _, _ = converted
    export_run(runs.folder / name, tmp_path / "model", weights="ema", **SILENT)
    model, config = load_checkpoint(tmp_path / "model")
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        expected = last_states(model, ids, ThinkingConfig(seed=config.train.seed))
    found = EbwmModel.from_pretrained(tmp_path / "model")
    assert torch.equal(found(input_ids=ids).logits, expected)
