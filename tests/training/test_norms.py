"""Norms of gradients, weights and updates: what they are, and every ZeRO stage says the same."""

import pytest
import torch
from training_runs import Runs

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.reporting.numbers import show
from ebwm_scale.training.norms import KINDS, parts_of
from ebwm_scale.world_model import WorldModel

MEASURED = {
    "logging.norms_every_steps": 2,
    "train.max_steps": 4,
    "evaluation.every_steps": 0,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 9,
    "optimizer.gradient_clipping": 0.2,
    "model.qk_norm": True,
}


def norms(runs: Runs, name: str) -> dict[int, dict]:
    return {row["step"]: row["norms"] for row in runs.rows(name) if "norms" in row}


@pytest.fixture(scope="module")
def measured(runs):
    runs.run("measured", overrides=MEASURED)
    return norms(runs, "measured")


def test_every_parameter_counts_for_a_kind_and_those_of_blocks_for_their_layer():
    sizes = {"num_layers": 2, "width": 16, "num_heads": 2, "vocabulary_size": 11, "qk_norm": True}
    model = WorldModel(config_from_dict({"model": {**sizes, "conditioning": "adaln"}}))
    found = {name: parts_of(name) for name, _ in model.named_parameters()}
    assert found["network.layers.1.attention.q_norm.weight"] == ["layer_1", "norms"]
    assert found["network.layers.0.feed_forward.w2.weight"] == ["layer_0", "feed_forward"]
    assert found["network.modulations.1.bias"] == ["layer_1", "conditioning"]
    assert found["network.head.weight"] == ["head"]
    assert {parts[-1] for parts in found.values()} == {
        *("norms", "attention", "feed_forward", "embeddings", "output"),
        *("conditioning", "step_size", "head"),
    }


def test_kinds_and_their_norms_add_up_to_the_whole(runs, measured):
    """To grad_norm, which is that of all gradients before they are clipped, and to the weights of
    the checkpoint that the step started from.
    """
    assert sorted(measured) == [2, 4]
    rows = {row["step"]: row for row in runs.rows("measured") if "split" not in row}
    for step, found in measured.items():
        groups = {part: values for part, values in found.items() if not part.startswith("layer_")}
        assert all(set(values) == set(KINDS) for values in found.values())
        total = sum(values["gradient"] ** 2 for values in groups.values()) ** 0.5
        assert total == pytest.approx(rows[step]["grad_norm"], rel=1e-5)
        assert total > 0.3  # so that it was clipped
        assert 0 < groups["attention"]["update"] < groups["attention"]["weight"]
    assert rows[1].get("norms") is None


@pytest.mark.parametrize(
    "processes, stage, precision",
    [
        pytest.param(2, 0, "fp32", marks=pytest.mark.soak),
        pytest.param(2, 1, "fp32", marks=pytest.mark.soak),
        pytest.param(2, 2, "fp32", marks=pytest.mark.soak),
        pytest.param(2, 3, "fp32", marks=pytest.mark.soak),
        pytest.param(1, 0, "bf16", marks=pytest.mark.soak),
        pytest.param(2, 3, "bf16", marks=pytest.mark.soak),
    ],
)
@pytest.mark.multiprocess
def test_every_stage_says_the_same(runs, measured, processes, stage, precision):
    name = f"stage_{stage}_{precision}_{processes}"
    overrides = {
        **MEASURED,
        "deepspeed.zero_stage": stage,
        "train.precision": precision,
        "refinement.recompute": "block" if stage == 3 else "none",
    }
    runs.run(name, overrides=overrides, processes=processes)
    tolerance = 1e-4 if precision == "fp32" else 0.1
    for step, found in norms(runs, name).items():
        for part, values in measured[step].items():
            assert found[part] == pytest.approx(values, rel=tolerance, abs=1e-6), (step, part)


def test_norms_of_steps_without_a_row_are_refused():
    with pytest.raises(ConfigError, match="must be a multiple of logging.every_steps 4"):
        config_from_dict({"logging": {"every_steps": 4, "norms_every_steps": 6}})


@pytest.mark.soak
def test_measuring_changes_no_step(runs, measured):
    runs.run("plain", overrides={**MEASURED, "logging.norms_every_steps": 0})
    rows = [{**row, "norms": None} for row in runs.rows("measured")]
    assert [{**row, "norms": None} for row in runs.rows("plain")] == rows
    state, plain = runs.state("measured"), runs.state("plain")
    for file, tensors in state.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, plain[file][name])


def test_the_report_of_a_run_draws_the_norms_of_its_layers(runs, measured):
    page = (runs.folder / "measured" / "report.html").read_text()
    last = measured[4]
    norms = {part: values["gradient"] for part, values in last.items() if "layer_" in part}
    low = min(norms, key=lambda part: norms[part])
    assert "Gradient norms by layer" in page and "Update norms by layer" in page
    assert f"{show(norms[low])} in layer {low.removeprefix('layer_')}" in page
