"""The closed forms of planning/flops.py against what a real training step computes."""

import pytest
import torch
from real_steps import CONDITIONS, FRAMES, SAMPLES, Counted, configuration, training_step

from ebwm_kernels.attention import row_blocks as attention_blocks
from ebwm_scale.planning.flops import model_flops, step_flops
from ebwm_scale.planning.parameters import count_parameters
from ebwm_scale.world_model import WorldModel

FLOP_CASES = {
    "one step": {"refinement": {"num_steps": 1}},
    "every step detached": {"refinement": {"num_steps": 3}},
    "last of detached steps": {"refinement": {"num_steps": 2, "loss": "last"}},
    "truncate": {"refinement": {"num_steps": 3, "graph": "truncate", "loss": "last"}},
    "truncate, loss of every step": {"refinement": {"num_steps": 2, "graph": "truncate"}},
    "full": {"refinement": {"num_steps": 3, "graph": "full", "loss": "last"}},
    "full, loss of every step": {"refinement": {"num_steps": 2, "graph": "full"}},
    "one step of full": {"refinement": {"num_steps": 1, "graph": "full"}},
    "one step of full, zeros, mirror": {
        "state": {"initial": "zeros"},
        "model": {"energy_head": ["linear", "bilinear"]},
        "refinement": {"num_steps": 1, "graph": "full", "update": "mirror"},
    },
    "last of full, zeros, mirror, workspace": {
        "state": {"initial": "zeros", "workspace": 5},
        "model": {"energy_head": ["linear", "bilinear"]},
        "refinement": {"num_steps": 3, "graph": "full", "backprop_steps": 1, "update": "mirror"},
    },
    "last two of full": {
        "refinement": {"num_steps": 4, "graph": "full", "backprop_steps": 2},
    },
    "last two of full, zeros, mirror": {
        "state": {"initial": "zeros", "workspace": 5},
        "model": {"energy_head": ["linear", "bilinear"]},
        "refinement": {"num_steps": 4, "graph": "full", "backprop_steps": 2, "update": "mirror"},
    },
    "last of full, encoded again, block recomputed": {
        "refinement": {
            "num_steps": 3,
            "graph": "full",
            "backprop_steps": 1,
            "reencode": 1,
            "recompute": "block",
        },
    },
    "truncate, block recomputed, shallow": {
        "refinement": {"num_steps": 3, "graph": "truncate", "recompute": "block"},
        "model": {"num_layers": 3, "predicted_layers": 2, "energy_head": ["bilinear"]},
    },
    "last two of full frames": {
        "state": FRAMES,
        "refinement": {"num_steps": 4, "graph": "full", "backprop_steps": 2, "loss": "last"},
    },
    "grouped-query": {"model": {"num_kv_heads": 2}},
    "one block": {"model": {"num_layers": 1}},
    "tied": {"state": {"tie_embedding": True}},
    "anchored": {"model": {"predicted_input": "anchored"}},
    "normed heads": {"model": {"qk_norm": True}},
    "no own keys": {
        "model": {"own_keys": False, "num_kv_heads": 2, "energy_head": ["linear", "direct"]}
    },
    "no own keys, block recomputed": {
        "model": {"own_keys": False},
        "refinement": {"recompute": "block"},
    },
    "soft cap": {"model": {"logit_softcap": 3.0}, "refinement": {"num_steps": 3}},
    "z-loss": {"train": {"z_loss": 1e-3}, "refinement": {"num_steps": 3}},
    "logits": {"refinement": {"update": "logits", "num_steps": 3, "graph": "truncate"}},
    "logits, every step": {"refinement": {"update": "logits"}},
    "mirror": {"refinement": {"update": "mirror", "num_steps": 3}, "state": {"map_scale": 3.0}},
    "noise": {"refinement": {"noise": 0.1, "num_steps": 3}},
    "time_embed": {"model": {"conditioning": "time_embed"}},
    "time_embed, unused contexts": {
        "model": {"conditioning": "time_embed"},
        "refinement": {"graph": "truncate", "num_steps": 3},
    },
    "time_embed, one landscape": {
        "model": {"conditioning": "time_embed"},
        "refinement": {"landscapes": "one"},
    },
    "adaln": {"model": {"conditioning": "adaln"}},
    "adaln, unused contexts": {
        "model": {"conditioning": "adaln"},
        "refinement": {"graph": "truncate", "loss": "last"},
    },
    "predicted_only": {
        "model": {"conditioning": "predicted_only"},
        "refinement": {"graph": "full", "loss": "last"},
    },
    "checkpoint step": {"refinement": {"recompute": "step"}},
    "checkpoint step, adaln": {
        "refinement": {"recompute": "step", "graph": "truncate"},
        "model": {"conditioning": "adaln"},
    },
    "checkpoint block": {"refinement": {"recompute": "block", "graph": "full"}},
    "checkpoint block, adaln": {
        "refinement": {"recompute": "block"},
        "model": {"conditioning": "adaln"},
    },
    "all terms": {"model": {"energy_head": ["linear", "quadratic", "bilinear", "context"]}},
    "terms without linear, adaln": {
        "model": {"energy_head": ["quadratic"], "conditioning": "adaln"},
        "refinement": {"graph": "truncate", "loss": "last"},
    },
    "shallow": {
        "model": {"num_layers": 3, "predicted_layers": 1, "predicted_input": "anchored"},
    },
    "shallow, context, time_embed": {
        "model": {
            "num_layers": 3,
            "predicted_layers": 2,
            "predicted_input": "anchored",
            "conditioning": "time_embed",
            "energy_head": ["linear", "context"],
        },
    },
    "shallow, predicted_only": {
        "model": {"predicted_layers": 1, "conditioning": "predicted_only"},
        "refinement": {"recompute": "block"},
    },
    "all terms, step recomputed": {
        "model": {"energy_head": ["linear", "quadratic", "bilinear", "context"]},
        "refinement": {"recompute": "step"},
    },
    "all terms, block recomputed": {
        "model": {
            "num_layers": 3,
            "predicted_layers": 2,
            "energy_head": ["linear", "quadratic", "bilinear", "context"],
        },
        "refinement": {"recompute": "block"},
    },
    "weights": {"refinement": {"loss_weights": [1, 0, 2], "num_steps": 3}},
    "encoded again": {"refinement": {"reencode": "all", "num_steps": 3}},
    "encoded again, truncate": {
        "refinement": {"reencode": "all", "graph": "truncate", "num_steps": 3},
        "model": {"energy_head": ["linear", "context"]},
    },
    "last block again, full": {
        "refinement": {"reencode": 1, "graph": "full", "num_steps": 3},
        "model": {"num_layers": 3, "predicted_layers": 1, "predicted_input": "anchored"},
    },
    "last blocks again, adaln": {
        "refinement": {"reencode": 2, "num_steps": 3, "loss_weights": [1, 0, 2]},
        "model": {"num_layers": 3, "conditioning": "adaln"},
    },
    "last block again, time_embed, block recomputed": {
        "refinement": {"reencode": 1, "recompute": "block"},
        "model": {"conditioning": "time_embed", "energy_head": ["linear", "context"]},
    },
    "every other step again": {
        "refinement": {"reencode": 1, "reencode_every": 2, "num_steps": 4},
    },
    "every other step again, truncate": {
        "refinement": {"reencode": 1, "reencode_every": 2, "num_steps": 3, "graph": "truncate"},
    },
    "read three times": {
        "refinement": {"num_steps": 1},
        "model": {"loops": 3, "own_keys": False, "energy_head": ["direct"], "predicted_layers": 1},
    },
    "read twice, adaln, full": {
        "refinement": {"graph": "full"},
        "model": {"loops": 2, "conditioning": "adaln", "energy_head": ["linear", "context"]},
    },
    "read twice, block recomputed, truncate": {
        "refinement": {"recompute": "block", "graph": "truncate"},
        "model": {"loops": 2, "num_layers": 3},
    },
    "read twice, last blocks again, full": {
        "refinement": {"reencode": 2, "num_steps": 3, "graph": "full"},
        "model": {"loops": 2, "num_layers": 3, "conditioning": "time_embed"},
    },
    "workspace": {"state": {"workspace": 5}, "refinement": {"num_steps": 3}},
    "workspace, bilinear, full": {
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5},
        "refinement": {"num_steps": 3, "graph": "full"},
    },
    "workspace, bilinear, truncate": {
        "model": {"energy_head": ["bilinear"]},
        "state": {"workspace": 5, "workspace_initial": "random_noise"},
        "refinement": {"num_steps": 3, "graph": "truncate", "loss": "last"},
    },
    "accept only if lower": {
        "model": {"conditioning": "adaln"},
        "refinement": {"accept": "lower", "update": "mirror", "num_steps": 3},
    },
    "accept only if lower, workspace, full": {
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5, "initial": "zeros"},
        "refinement": {"accept": "lower", "update": "mirror", "num_steps": 3, "graph": "full"},
    },
    "accept only if lower, block recomputed": {
        "state": {"workspace": 5},
        "refinement": {"accept": "lower", "update": "logits", "recompute": "block"},
    },
    "accept only if lower, frames": {"state": FRAMES, "refinement": {"accept": "lower"}},
    "penalty, momentum": {
        "refinement": {"spectral_penalty": 1.0, "momentum": 0.5, "update": "mirror"},
    },
    "penalty, workspace": {
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5, "initial": "zeros"},
        "refinement": {"spectral_penalty": 1.0, "update": "mirror", "num_steps": 3},
    },
    "penalty, workspace, full": {
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5, "initial": "zeros"},
        "refinement": {
            "spectral_penalty": 1.0,
            "update": "mirror",
            "num_steps": 3,
            "graph": "full",
        },
    },
    "levels of one step, adaLN": {
        "model": {"conditioning": "adaln"},
        "refinement": {"level_weight": 0.1, "num_steps": 1},
    },
    "levels, undone steps": {
        "refinement": {"level_weight": 0.1, "accept": "lower", "update": "mirror"}
    },
    "levels": {"refinement": {"level_weight": 0.1, "num_steps": 3}},
    "levels, from zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"level_weight": 0.1, "num_steps": 3, "update": "mirror"},
    },
    "levels, full": {"refinement": {"level_weight": 0.1, "update": "logits", "graph": "full"}},
    "levels, other terms": {
        "model": {"energy_head": ["quadratic", "bilinear", "direct", "context"]},
        "refinement": {"level_weight": 0.1, "num_steps": 3},
    },
    "levels, workspace, last two of full": {
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5, "initial": "zeros"},
        "refinement": {
            "level_weight": 0.1,
            "num_steps": 3,
            "update": "mirror",
            "graph": "full",
            "backprop_steps": 2,
        },
    },
    "levels, workspace": {
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5},
        "refinement": {"level_weight": 0.1, "num_steps": 3},
    },
    "levels, workspace, penalty": {
        "model": {"energy_head": ["bilinear", "direct"]},
        "state": {"workspace": 5, "initial": "zeros"},
        "refinement": {
            "level_weight": 0.1,
            "spectral_penalty": 1.0,
            "num_steps": 3,
            "update": "mirror",
        },
    },
    "levels, workspace, encoded again": {
        "model": {"energy_head": ["bilinear"]},
        "state": {"workspace": 5},
        "refinement": {"level_weight": 0.1, "num_steps": 3, "reencode": "all", "graph": "full"},
    },
    "levels, block recomputed": {"refinement": {"level_weight": 0.1, "recompute": "block"}},
    "levels of frames": {"state": FRAMES, "refinement": {"level_weight": 0.1}},
    "momentum of frames": {"state": FRAMES, "refinement": {"momentum": 0.5, "graph": "full"}},
    "workspace, encoded again": {
        "state": {"workspace": 5},
        "refinement": {"num_steps": 3, "reencode": "all", "graph": "full"},
    },
    "workspace, step recomputed": {
        "model": {"energy_head": ["bilinear"]},
        "state": {"workspace": 5},
        "refinement": {"recompute": "step", "graph": "full"},
    },
    "workspace, block recomputed": {
        "model": {"energy_head": ["bilinear"]},
        "state": {"workspace": 5},
        "refinement": {"recompute": "block", "graph": "full"},
    },
    "frames encoded again": {"state": FRAMES, "refinement": {"reencode": "all"}},
    "zeros": {"state": {"initial": "zeros"}},
    "zeros, logits": {"state": {"initial": "zeros"}, "refinement": {"update": "logits"}},
    "zeros, mirror": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "num_steps": 3},
    },
    "zeros, mirror, truncate": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "graph": "truncate", "loss": "last"},
    },
    "zeros, mirror, weights": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "num_steps": 3, "loss_weights": [1, 0, 2]},
    },
    "zeros, full": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "graph": "full", "loss": "last"},
    },
    "candidates": {"refinement": {"candidates": 4, "num_steps": 3}},
    "candidates from zeros": {
        "state": {"initial": "zeros", "map_scale": 3.0},
        "refinement": {"candidates": 4, "num_steps": 3, "update": "mirror"},
    },
    "candidates, full": {
        "state": {"initial": "zeros"},
        "refinement": {"candidates": 4, "num_steps": 3, "graph": "full", "loss": "last"},
    },
    "candidates, full, logits from noise": {
        "refinement": {"candidates": 3, "graph": "full", "update": "logits", "state_clamp": 3.0},
    },
    "candidates, truncate": {
        "refinement": {"candidates": 4, "num_steps": 3, "graph": "truncate", "loss": "last"},
    },
    "candidates, weights": {
        "refinement": {"candidates": 4, "num_steps": 3, "loss_weights": [0, 1, 2]},
    },
    "candidates, encoded again, block recomputed": {
        "refinement": {"candidates": 4, "reencode": "all", "recompute": "block"},
    },
    "candidates, the last steps of full": {
        "refinement": {
            "candidates": 4,
            "num_steps": 4,
            "graph": "full",
            "backprop_steps": 2,
            "update": "mirror",
        },
    },
    "more candidates than tokens": {"refinement": {"candidates": 11, "num_steps": 3}},
    "candidates of groups": {"data": {"group_size": 3}, "refinement": {"candidates": 4}},
    "groups": {"data": {"group_size": 3}, "model": {"num_kv_heads": 2}},
    "groups, block recomputed": {
        "data": {"group_size": 3},
        "model": {"predicted_layers": 1, "energy_head": ["bilinear", "context"]},
        "refinement": {"recompute": "block"},
    },
    "baseline of groups": {"data": {"group_size": 3}, "model": {"kind": "baseline"}},
    "world": {"state": FRAMES, "data": {"group_size": 3, "conditions": CONDITIONS}},
    "world, block recomputed, encoded again": {
        "state": FRAMES,
        "data": {"group_size": 3, "conditions": CONDITIONS},
        "model": {"energy_head": ["bilinear", "context"]},
        "refinement": {"recompute": "block", "reencode": 1},
    },
    "baseline of a world": {
        "state": FRAMES,
        "data": {"group_size": 3, "conditions": CONDITIONS},
        "model": {"kind": "baseline", "predicts": "change"},
    },
    "frames": {"state": FRAMES, "refinement": {"num_steps": 3}},
    "frames, full": {
        "state": FRAMES | {"initial": "most_recent"},
        "refinement": {"graph": "full", "loss": "last", "num_steps": 3},
    },
    "frames, truncate, time_embed": {
        "state": FRAMES,
        "refinement": {"graph": "truncate"},
        "model": {"conditioning": "time_embed"},
    },
    "baseline": {"model": {"kind": "baseline", "num_kv_heads": 1}},
    "looped": {"model": {"kind": "baseline", "loops": 3}},
    "looped, every loop scored": {
        "model": {"kind": "baseline", "loops": 3, "loop_loss": "every"},
    },
    "looped, frames, every loop scored": {
        "model": {
            "kind": "baseline",
            "loops": 2,
            "loop_loss": "every",
            "output": "two_linear",
        },
        "state": FRAMES,
    },
    "baseline of frames": {"model": {"kind": "baseline"}, "state": FRAMES},
    "released baseline of frames": {
        "model": {"kind": "baseline", "output": "two_linear"},
        "state": FRAMES,
    },
}


@pytest.mark.parametrize("case", FLOP_CASES)
def test_flops_are_what_a_real_step_computes(case, monkeypatch):
    monkeypatch.setattr(
        attention_blocks, "ROWS", 1
    )  # blocks of one query compute the pairs that exist and no others
    config = configuration(**FLOP_CASES[case])
    counted = training_step(config, Counted()).flops
    parts = step_flops(config, samples=SAMPLES)
    attention = {
        part: parts.get(part, 0.0) for part in ("attention_observed", "attention_predicted")
    }
    if config.model.kind == "baseline":
        attention["attention_observed"] = parts["attention"]
    if (
        config.refinement.recompute == "none"
    ):  # otherwise recomputation holds both products and attention
        assert attention == {
            "attention_observed": counted["observed"],
            "attention_predicted": counted["predicted"],
        }
    assert sum(parts.values()) == sum(counted.values())


def test_flops_follow_the_number_of_steps_of_a_training_step(monkeypatch):
    monkeypatch.setattr(attention_blocks, "ROWS", 1)
    config = configuration(refinement={"num_steps": 3}, model={"conditioning": "time_embed"})
    counted = training_step(config, Counted(), num_steps=2).flops
    assert sum(step_flops(config, samples=SAMPLES, num_steps=2).values()) == sum(counted.values())


def test_recomputation_is_a_part_of_its_own():
    plain, again = (
        step_flops(configuration(refinement={"recompute": mode}), samples=SAMPLES)
        for mode in ("none", "step")
    )
    assert "recomputation" not in plain
    assert {part: value for part, value in again.items() if part != "recomputation"} == plain
    assert model_flops(again) == model_flops(plain) == sum(plain.values()) < sum(again.values())


def test_parameters_are_counted_once_and_none_is_left_out():
    config = configuration(model={"conditioning": "adaln"})
    model = WorldModel(config)
    counts = count_parameters(model)
    assert (
        counts["total"]
        == sum(p.numel() for p in model.parameters())
        == sum(counts.values()) - counts["total"]
    )
    assert list(counts) == [
        "token_embedding",
        "state_map",
        "blocks",
        "conditioning",
        "norm_and_head",
        "step_size",
        "total",
    ]
    assert counts["blocks"] == 2 * (4 * 16**2 + 3 * 16 * 24 + 2 * 16)
    assert counts["conditioning"] == 2 * 16 + 2 * (16 * 96 + 96) + 16 * 32 + 32
    tied = count_parameters(WorldModel(configuration(state={"tie_embedding": True})))
    assert "state_map" not in tied and tied["token_embedding"] == 11 * 16
    assert list(
        count_parameters(WorldModel(configuration(model={"kind": "baseline"}, state=FRAMES)))
    ) == ["frame_projection", "blocks", "norm_and_head", "output", "total"]


def test_an_unknown_parameter_is_not_counted_in_silence():
    model = WorldModel(configuration())
    model.network.register_parameter("novelty", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(KeyError, match="network.novelty"):
        count_parameters(model)
