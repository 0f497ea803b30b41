"""Launches and bytes of a training step on a GPU, counted on the meta device, stay within what was
promised; and the count notices a pass more.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ebwm_kernels.attention import launches as attention_launches
from ebwm_kernels.attention import ops as attention_ops
from ebwm_kernels.attention import triton_backend
from ebwm_kernels.attention.ops import TRITON_INSTALLED
from ebwm_kernels.attention.tensors import Cotangents, Inputs
from ebwm_kernels.attention.visibility import Shape
from ebwm_scale.config.load import load_config
from ebwm_scale.planning.gpu_time import asked
from ebwm_scale.planning.hardware import MACHINES
from ebwm_scale.planning.step_count import ATTENTION_LAUNCHES, count_graphed_step, count_step

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from count_step import FORMS, configuration

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="triton is not installed")


MEDIUM = ["model.size=medium", "model.vocabulary_size=50277", "data.context_length=1024"]


def counted(size, *options, sequence=1024, vocabulary=50277, batch=8, count=count_step):
    given = SimpleNamespace(
        sequence=sequence,
        vocabulary=vocabulary,
        num_refinement_steps=2,
        tile_rows=None,
        set=list(options),
    )
    return count(load_config(None, configuration(given, size)), batch)


def test_a_step_of_medium_stays_within_its_launches_and_bytes():
    """Before the fused operations and tiles of 4 GiB it was 85391 launches and 727 GB
    (results/count_step_before.json).
    """
    count = counted("medium")
    assert count.total.launches <= 7_000
    assert count.pointwise.bytes <= 170e9
    assert count.total.flops == pytest.approx(61.2e12, rel=0.01)
    planned = asked(load_config(None, [*MEDIUM, "train.precision=bf16"]), MACHINES["h100"], 8)
    assert planned.launches == pytest.approx(count.total.launches, rel=0.02)
    assert planned.pointwise_bytes == pytest.approx(count.pointwise.bytes, rel=0.03)


def test_what_the_joint_pass_of_attention_saves_is_what_the_page_says(monkeypatch):
    """kernels/ebwm_kernels/attention/joint.py: counted with it and without."""
    joint = counted("medium")
    monkeypatch.setattr(attention_ops, "may_join", lambda *_, **__: False)
    apart = counted("medium")
    shown = [
        f"{one.total.launches} launches, {one.pointwise.bytes / 1e9:.1f} GB and "
        f"{one.total.flops / 1e12:.1f} TFLOP"
        for one in (apart, joint)
    ]
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"from {shown[0]} to {shown[1].replace(' launches', '')}" in text
    assert apart.total.launches - joint.total.launches == 7 * 24 * 2  # layers, steps


# Gigabytes of pointwise traffic of a step of xxs; in plain PyTorch 131, 137, 78, 93, 176, 141, 87,
# 108.
BOUNDS = {
    "logits": 58,
    "clamped": 47,
    "z-loss": 47,
    "full graph": 54,
    "full graph, logits": 87,
    "full graph, clamped": 54,
    "64 candidates": 36,
    "64 candidates, clamped": 40,
}


@pytest.mark.parametrize("form", BOUNDS)
def test_other_steps_than_the_default_stay_within_their_bytes(form):
    """results/count_forms_before.json, results/count_forms.json: of medium."""
    count = counted("xxs", *FORMS[form])
    assert count.pointwise.bytes <= BOUNDS[form] * 1e9
    assert count.total.launches <= 2000


def test_what_moves_candidates_alone_costs_next_to_nothing():
    """Plain operations on the K columns of each row: their bytes grow with K."""
    few, many = (
        counted("xxs", f"refinement.candidates={number}").pointwise.bytes for number in (64, 128)
    )
    assert 0 < many - few < 0.03 * few


def test_transformer_plus_plus_is_not_held_back():
    """It was 3405 launches and 82 GB (results/count_baseline_before.json)."""
    count = counted("medium", "model.kind=baseline")
    assert count.total.launches <= 800
    assert count.pointwise.bytes <= 21e9
    assert count.operations["softmax_rows"].launches == 1


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["refinement.num_steps=3"],
        ["refinement.recompute=block"],
        ["refinement.recompute=step"],
        ["model.kind=baseline"],
    ],
    ids=lambda options: options[0] if options else "default",
)
def test_the_planner_asks_a_gpu_for_what_is_counted(options):
    """Sizes that its closed forms were not fitted to."""
    given = ["model.num_layers=4", "model.width=640", "model.num_heads=10"]
    given += ["model.vocabulary_size=20000", "data.context_length=640", "train.precision=bf16"]
    given += ["model.attention_backend=triton", *options]
    config = load_config(None, given)
    count = count_step(config, 5)
    found = asked(config, MACHINES["h100"], 5)
    assert found.launches == pytest.approx(count.total.launches, rel=0.03)
    assert found.pointwise_bytes == pytest.approx(count.pointwise.bytes, rel=0.05)


def test_a_graph_of_the_step_leaves_few_launches():
    """What is left draws noise, copies it into the recording, and hands gradients out."""
    count = counted("medium", count=count_graphed_step)
    assert count.total.launches <= 500
    assert count.operations["graph_replay"].launches == 1
    noise = count.operations["normal_"].launches
    assert noise == 8 * 1024 // 64
    assert count.total.launches > noise + 20


def test_a_step_that_is_not_recorded_has_no_launches_with_a_graph():
    small = {"sequence": 64, "vocabulary": 100, "batch": 2, "count": count_graphed_step}
    with pytest.raises(ValueError, match="more rows than a tile of 100"):
        counted("xxs", "refinement.tile_rows=100", **small)


def test_what_is_counted_grows_by_the_passes_that_plain_pytorch_makes(monkeypatch):
    """xxs, where each norm, activation and rotation is plain again."""
    fused = counted("xxs", sequence=512, vocabulary=1000, batch=4)
    monkeypatch.setattr("ebwm_scale.model.fused.runs_fused", lambda *x: False)
    plain = counted("xxs", sequence=512, vocabulary=1000, batch=4)
    assert plain.total.launches > fused.total.launches + 300
    assert plain.pointwise.bytes > 1.2 * fused.pointwise.bytes
    assert plain.total.flops == fused.total.flops


def test_attention_launches_as_many_programs_as_are_counted(monkeypatch):
    launched = []
    monkeypatch.setattr(attention_launches, "launch", lambda kernel, *_: launched.append(kernel))
    x = torch.zeros(1, 2, 3, 16)
    inputs, shape = Inputs(x, x, x, x, x, None), Shape(1.0, 0, True, 1, 1)

    def during(level):
        launched.clear()
        result = level()
        return result, len(launched)

    output, of_forward = during(lambda: triton_backend.forward(inputs, shape))
    counts = {"attention": of_forward}
    for with_keys in (False, True):
        _, launches = during(
            lambda: triton_backend.gradient(x, inputs, output, shape, with_keys=with_keys)
        )
        assert launches == ATTENTION_LAUNCHES["attention_gradient"] + with_keys
    cotangents = Cotangents(x, None, None, x, x)
    _, counts["attention_double_backward"] = during(
        lambda: triton_backend.double_backward(cotangents, x, inputs, output, shape)
    )
    (_, statistics), counts["attention_double_backward_up"] = during(
        lambda: triton_backend.double_backward_up(cotangents, x, inputs, output, shape)
    )
    for with_keys in (False, True):
        _, launches = during(
            lambda: triton_backend.double_backward_down(
                cotangents, x, x, statistics, inputs, output, shape, with_keys=with_keys
            )
        )
        assert launches == ATTENTION_LAUNCHES["attention_double_backward_down"] + with_keys
    counts["attention_double_backward_down"] = 2
    counts["attention_gradient"] = 1
    assert counts == ATTENTION_LAUNCHES
