"""The closed forms of planning/memory.py against what a real training step keeps."""

import pytest
from real_steps import CONDITIONS, FRAMES, SAMPLES, configuration, training_step

from ebwm_scale.planning.live_bytes import LiveBytes
from ebwm_scale.planning.memory import memory_estimate
from ebwm_scale.planning.parameters import count_parameters
from ebwm_scale.world_model import WorldModel

# The peak of all parts at once is an upper bound; what is measured leaves out the optimizer, which
# a step does not touch.
MEMORY_CASES = {
    "text": {"refinement": {"num_steps": 3}},
    "text, step recomputed": {"refinement": {"num_steps": 2, "checkpoint": "step"}},
    "text, in tiles": {"refinement": {"num_steps": 3, "tile_rows": 32}},
    "text, in parts of samples": {
        "refinement": {"num_steps": 3, "tile_rows": 16},
        "model": {"conditioning": "time_embed"},
    },
    "text, logits": {"refinement": {"update": "logits"}},
    "text, a block at a time": {
        "refinement": {"num_steps": 3, "checkpoint": "block"},
        "model": {"num_layers": 6},
    },
    "text, clamped": {"refinement": {"num_steps": 3, "change_clamp": 5.0, "state_clamp": 9.0}},
    "text, full and clamped": {
        "refinement": {"graph": "full", "change_clamp": 5.0, "state_clamp": 9.0}
    },
    "text, mirror": {"refinement": {"update": "mirror", "num_steps": 3}},
    "groups": {"data": {"group_size": 16}, "refinement": {"num_steps": 3}},
    "grids within reach": {
        "data": {"group_size": 16, "grid": [4, 4]},
        "model": {"reach": 1, "num_layers": 4},
        "refinement": {"num_steps": 3},
    },
    "grids within reach, full": {
        "data": {"group_size": 16, "grid": [4, 4]},
        "model": {"reach": 1, "num_layers": 4, "predicted_layers": 1},
        "refinement": {"num_steps": 3, "graph": "full", "reencode": "all"},
    },
    "grids within reach, a block at a time": {
        "data": {"group_size": 16, "grid": [4, 4]},
        "model": {"reach": 1, "num_layers": 6},
        "refinement": {"recompute": "block"},
    },
    "baseline of grids within reach": {
        "data": {"group_size": 16, "grid": [4, 4]},
        "model": {"reach": 1, "kind": "baseline", "num_layers": 4},
    },
    "world": {"data": {"group_size": 4, "conditions": CONDITIONS}, "state": FRAMES},
    "baseline of a world": {
        "data": {"group_size": 4, "conditions": CONDITIONS},
        "state": FRAMES,
        "model": {"kind": "baseline", "predicts": "change"},
    },
    "text, full": {"refinement": {"graph": "full"}},
    "text, normed heads, soft cap and z-loss": {
        "model": {"qk_norm": True, "num_layers": 4, "logit_softcap": 30.0},
        "train": {"z_loss": 1e-4},
        "refinement": {"num_steps": 3},
    },
    "text, shallow with all terms": {
        "model": {
            "num_layers": 4,
            "predicted_layers": 1,
            "predicted_input": "anchored",
            "energy_head": ["linear", "quadratic", "bilinear", "context"],
        },
    },
    "text, the context alone": {
        "model": {
            "num_layers": 4,
            "own_keys": False,
            "qk_norm": True,
            "energy_head": ["linear", "direct"],
        },
    },
    "text, shallow, a block at a time": {
        "model": {
            "num_layers": 6,
            "predicted_layers": 2,
            "predicted_input": "anchored",
            "energy_head": ["bilinear", "context"],
        },
        "refinement": {"recompute": "block"},
    },
    "text, mirror from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "num_steps": 3},
    },
    "text, one mirror step from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "num_steps": 1},
    },
    "text, candidates": {"refinement": {"candidates": 64, "num_steps": 3}},
    "text, candidates from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"candidates": 200, "num_steps": 3, "update": "mirror"},
    },
    "text, candidates, full": {
        "state": {"initial": "zeros"},
        "refinement": {"candidates": 64, "num_steps": 3, "update": "mirror", "graph": "full"},
    },
    "text, candidates of logits from noise, full": {
        "refinement": {"candidates": 64, "update": "logits", "graph": "full"},
    },
    "text, encoded again": {
        "refinement": {"reencode": "all", "num_steps": 3},
        "model": {"num_layers": 4},
    },
    "text, encoded again, full": {
        "refinement": {"reencode": 2, "num_steps": 3, "graph": "full"},
        "model": {"num_layers": 4},
    },
    "text, read three times": {
        "refinement": {"num_steps": 1, "update": "mirror"},
        "model": {"loops": 3, "num_layers": 2, "predicted_layers": 1},
        "state": {"initial": "zeros"},
    },
    "text, read twice, full": {
        "refinement": {"num_steps": 2, "graph": "full"},
        "model": {"loops": 2},
    },
    "text, read three times, blocks recomputed": {
        "refinement": {"num_steps": 2, "recompute": "block"},
        "model": {"loops": 3},
    },
    "text, workspace": {
        "model": {"energy_head": ["bilinear", "context"]},
        "state": {"workspace": 64},
        "refinement": {"num_steps": 3, "graph": "full"},
    },
    "text, last two of full": {
        "model": {"energy_head": ["bilinear", "context"]},
        "state": {"workspace": 64},
        "refinement": {"num_steps": 6, "graph": "full", "backprop_steps": 2},
    },
    "text, last two of full mirror from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"num_steps": 6, "graph": "full", "backprop_steps": 2, "update": "mirror"},
    },
    "text, last two of full encoded again": {
        "refinement": {"reencode": 2, "num_steps": 5, "graph": "full", "backprop_steps": 2},
        "model": {"num_layers": 4},
    },
    "text, accept": {"refinement": {"update": "mirror", "accept": "lower", "num_steps": 3}},
    "text, accept from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "accept": "lower", "num_steps": 3},
    },
    "text, accept, logits": {"refinement": {"update": "logits", "accept": "lower"}},
    "text, accept, full": {
        "refinement": {"update": "mirror", "accept": "lower", "num_steps": 3, "graph": "full"},
    },
    "frames, accept": {"state": FRAMES, "refinement": {"accept": "lower"}},
    "text, momentum from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "momentum": 0.5, "num_steps": 3},
    },
    "text, momentum and penalty, full": {
        "state": {"workspace": 64},
        "refinement": {
            "update": "mirror",
            "momentum": 0.5,
            "spectral_penalty": 1.0,
            "num_steps": 3,
            "graph": "full",
        },
    },
    "text, levels": {"refinement": {"level_weight": 0.1, "num_steps": 3}},
    "text, levels from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "level_weight": 0.1, "num_steps": 3},
    },
    "text, levels, full": {
        "refinement": {"update": "mirror", "level_weight": 0.1, "num_steps": 3, "graph": "full"},
    },
    "frames, levels": {"state": FRAMES, "refinement": {"level_weight": 0.1}},
    "text, decay": {"refinement": {"update": "mirror", "decay": 0.2, "num_steps": 3}},
    "text, decay of logits": {"refinement": {"update": "logits", "decay": 0.2, "num_steps": 3}},
    "text, decay from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "decay": 0.2, "num_steps": 3},
    },
    "text, decay, full": {
        "state": {"workspace": 64},
        "refinement": {"update": "mirror", "decay": 0.2, "num_steps": 3, "graph": "full"},
    },
    "frames, decay": {"state": FRAMES, "refinement": {"decay": 0.2, "graph": "full"}},
    "frames, last two of full": {
        "state": FRAMES,
        "refinement": {"num_steps": 5, "graph": "full", "backprop_steps": 2},
    },
    "text, every other step encoded again": {
        "refinement": {"reencode": "all", "reencode_every": 2, "num_steps": 3},
    },
    "frames, shallow": {
        "model": {
            "num_layers": 4,
            "predicted_layers": 2,
            "predicted_input": "anchored",
            "energy_head": ["bilinear", "context"],
        },
        "state": FRAMES,
    },
    "frames, adaln": {"model": {"conditioning": "adaln"}, "state": FRAMES},
    "baseline": {"model": {"kind": "baseline"}},
    "looped": {"model": {"kind": "baseline", "loops": 3}},
    "looped, every loop scored": {
        "model": {"kind": "baseline", "loops": 3, "loop_loss": "every"},
    },
    "baseline of frames": {"model": {"kind": "baseline"}, "state": FRAMES},
    "released baseline of frames": {
        "model": {"kind": "baseline", "output": "two_linear"},
        "state": FRAMES,
    },
}


@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory_estimate_is_near_the_peak_of_live_tensors(case):
    options = MEMORY_CASES[case]
    model = {"width": 64, "feed_forward_width": 96, "num_layers": 2} | options.get("model", {})
    config = configuration(**(options | {"model": model}), context_length=32, vocabulary_size=4000)
    accumulating = config.replace(train=config.train.replace(global_batch_size=2 * SAMPLES))
    estimate = memory_estimate(accumulating, world_size=1, micro_batch=SAMPLES)
    measured = training_step(config, LiveBytes()).peak / 2**30
    # A shallow stream's lower blocks get their gradients when the states are gone: parts whose
    # peaks lie further apart are added up.
    # Of frames this small the estimate is 14 % low; with conditions between them as well.
    is_far = case.startswith(("text, shallow", "world", "frames, accept", "frames, levels"))
    tolerance = 0.2 if is_far else 0.12
    assert estimate["total"] - estimate["optimizer"] == pytest.approx(measured, rel=tolerance)


def test_the_float32_sums_of_a_bfloat16_model_are_counted():
    """A step of a bfloat16 model holds float32 sums of its gradients (deferred_backward.py)."""
    model = {"width": 64, "feed_forward_width": 96, "num_layers": 6}
    options = {"context_length": 32, "vocabulary_size": 4000, "model": model}
    refinement = {"num_steps": 3, "recompute": "block"}
    config = configuration(train={"precision": "bf16"}, refinement=refinement, **options)
    measured = training_step(config, LiveBytes(), lambda c: WorldModel(c).bfloat16()).peak / 2**30
    accumulating = config.replace(train=config.train.replace(global_batch_size=2 * SAMPLES))
    estimate = memory_estimate(accumulating, world_size=1, micro_batch=SAMPLES)
    # the copy that an update works on, which a step does not touch
    copy = 4 * count_parameters(WorldModel(config))["total"] / 2**30
    counted = estimate["total"] - estimate["optimizer"] - copy
    assert counted == pytest.approx(measured, rel=0.16)


def test_memory_is_sharded_as_zero_does_it():
    def parts(*, world_size=4, stage=0, precision="bf16", offload="none"):
        config = configuration(
            deepspeed={"zero_stage": stage, "offload": offload}, train={"precision": precision}
        )
        memory = memory_estimate(config, world_size=world_size, micro_batch=SAMPLES)
        number = count_parameters(WorldModel(config))["total"] / 2**30
        return tuple(memory[part] / number for part in ("weights", "gradients", "optimizer"))

    assert parts(precision="fp32") == pytest.approx((4, 4, 8))
    assert parts() == pytest.approx((2, 2 + 4, 12))
    assert parts(stage=1) == pytest.approx((2, 2 + 1, 3))
    assert parts(stage=2) == pytest.approx((2, 0.5 + 1, 3))
    assert parts(stage=2, offload="optimizer") == pytest.approx((2, 0.5, 0))
    assert parts(stage=3) == pytest.approx((0.5, 0.5 + 1, 3))
    assert parts(stage=3, offload="parameters") == pytest.approx((0, 0.5, 0))


@pytest.mark.parametrize("conditioning", ["default", "time_embed"])
@pytest.mark.parametrize("update", ["probabilities", "mirror"])
def test_memory_does_not_grow_with_the_number_of_steps(conditioning, update):
    """Each step of a detached refinement is back-propagated before the next one starts."""
    peaks = []
    for num_steps in (2, 4):
        config = configuration(
            refinement={"num_steps": num_steps, "update": update},
            model={"width": 64, "num_layers": 2, "conditioning": conditioning},
            context_length=32,
            vocabulary_size=4000,
        )
        peaks.append(training_step(config, LiveBytes()).peak)
    assert peaks[1] < 1.1 * peaks[0]


def test_memory_of_a_graph_through_the_last_steps_does_not_grow_with_the_steps_in_front_of_them():
    peaks = []
    for num_steps in (3, 9):
        config = configuration(
            refinement={"num_steps": num_steps, "graph": "full", "backprop_steps": 2},
            model={"width": 64, "num_layers": 2},
            context_length=32,
            vocabulary_size=4000,
        )
        peaks.append(training_step(config, LiveBytes()).peak)
    assert peaks[1] < 1.02 * peaks[0]
