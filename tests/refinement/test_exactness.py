"""Every combination of the refinement's choices is the papers' algorithm, to second order, in
float64: against plain_autograd.py.
"""

import itertools

import pytest
from plain_autograd import ALL_TERMS, CONDITIONINGS, CONTENT, build, compare


@pytest.mark.parametrize(
    "graph, loss, update",
    itertools.product(
        ("detach", "truncate", "full"), ("every", "last"), ("probabilities", "logits", "mirror")
    ),
)
@pytest.mark.parametrize("predicted_input", ["state", "anchored"])
def test_every_combination_of_graph_loss_and_update_is_exact(graph, loss, update, predicted_input):
    for conditioning in CONDITIONINGS:
        compare(
            *build(
                model={"conditioning": conditioning, "predicted_input": predicted_input},
                refinement={"graph": graph, "loss": loss, "update": update},
            ),
            whole_gradient=2e-12,  # rounding: 1.04e-12 with mirror steps through the full graph
        )


@pytest.mark.parametrize(
    "graph, loss", itertools.product(("detach", "truncate", "full"), ("every", "last"))
)
@pytest.mark.parametrize(
    "name, options",
    {
        "grouped_heads": {"model": {"num_kv_heads": 2}},
        "one_key_head": {"model": {"num_kv_heads": 1}},
        "tied": {"state": {"tie_embedding": True}},
        "scaled_map": {"state": {"map_scale": 7.0}},
        "zeros": {"state": {"initial": "zeros"}},
        "wide": {"model": {"feed_forward_width": 24}},
        "randomised": {
            "refinement": {"step_size_random_factor": 2.0, "noise": 0.7, "num_steps": 3}
        },
        "three_steps_one_landscape": {
            "model": {"conditioning": "time_embed"},
            "refinement": {"num_steps": 3, "landscapes": "one"},
        },
        "tiles_of_one_sample": {"refinement": {"tile_rows": 5, "num_steps": 3}},
        "tiles_of_two_samples": {"refinement": {"tile_rows": 12}},
        "parts_of_samples": {
            "refinement": {"tile_rows": 2, "step_size_random_factor": 2.0, "noise": 0.7}
        },
        "parts_with_landscapes": {
            "model": {"conditioning": "time_embed", "predicted_input": "anchored"},
            "refinement": {"tile_rows": 3, "num_steps": 3},
        },
        "parts_of_frames": {
            "kind": "embedding",
            "model": {"conditioning": "adaln"},
            "refinement": {"tile_rows": 2},
        },
        "parts_scaled_and_tied": {
            "state": {"map_scale": 7.0, "tie_embedding": True},
            "refinement": {"tile_rows": 4, "update": "logits"},
        },
        "checkpoint_step": {"refinement": {"recompute": "step"}},
        "checkpoint_block": {"refinement": {"recompute": "block"}},
        "blocks_in_parts_of_samples": {
            "model": {"conditioning": "adaln", "num_kv_heads": 2},
            "refinement": {"recompute": "block", "tile_rows": 3},
        },
        "blocks_with_time_embed": {
            "model": {"conditioning": "time_embed", "predicted_input": "anchored"},
            "refinement": {"recompute": "block", "num_steps": 3},
        },
        "blocks_of_frames": {
            "kind": "embedding",
            "model": {"conditioning": "predicted_only"},
            "refinement": {"recompute": "block"},
        },
        "clamped": {"refinement": {"change_clamp": 5.0, "state_clamp": 4.0, "num_steps": 3}},
        "change_clamped": {"refinement": {"change_clamp": 4.0, "tile_rows": 3}},
        "clamped_logits": {
            "refinement": {"update": "logits", "change_clamp": 0.3, "state_clamp": 0.8}
        },
        "clamped_mirror": {
            "refinement": {
                "update": "mirror",
                "change_clamp": 4.0,
                "state_clamp": 6.0,
                "step_size_random_factor": 2.0,
            }
        },
        "clamped_frames": {
            "kind": "embedding",
            "refinement": {"change_clamp": 0.8, "state_clamp": 1.2},
        },
        "frames": {"kind": "embedding"},
        "frames_from_the_last": {"kind": "embedding", "state": {"initial": "most_recent"}},
        "frames_randomised": {
            "kind": "embedding",
            "model": {"conditioning": "adaln"},
            "refinement": {"step_size_random_factor": 2.0, "noise": 0.1},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_option_is_exact(graph, loss, name, options):
    options = {
        **options,
        "refinement": {**options.get("refinement", {}), "graph": graph, "loss": loss},
    }
    compare(*build(**options), num_steps=options["refinement"].get("num_steps", 2))


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "quadratic": {"model": {"energy_head": ["quadratic"]}},
        "bilinear": {"model": {"energy_head": ["bilinear"]}, "state": {"map_scale": 7.0}},
        "context": {"model": {"energy_head": ["linear", "context"]}},
        "direct": {"model": {"energy_head": ["direct"]}, "state": {"map_scale": 7.0}},
        "direct_with_others": {
            "model": {
                "energy_head": ["direct", "bilinear", "context"],
                "predicted_layers": 1,
                "predicted_input": "anchored",
                "conditioning": "adaln",
            },
            "refinement": {"recompute": "block", "tile_rows": 4},
        },
        "all_terms_of_adaln": {"model": {"energy_head": ALL_TERMS, "conditioning": "adaln"}},
        "shallow": {"model": {"predicted_layers": 1, "predicted_input": "anchored"}},
        "shallow_without_anchor": {"model": {"predicted_layers": 1}},
        "shallow_time_embed": {
            "model": {
                "predicted_layers": 2,
                "num_layers": 3,
                "predicted_input": "anchored",
                "conditioning": "time_embed",
                "energy_head": ["linear", "context"],
            },
        },
        "shallow_predicted_only_in_tiles": {
            "model": {
                "predicted_layers": 1,
                "predicted_input": "anchored",
                "conditioning": "predicted_only",
                "energy_head": ALL_TERMS,
                "num_kv_heads": 2,
            },
            "refinement": {"tile_rows": 3, "update": "mirror", "noise": 0.3},
        },
        "step_recomputed": {
            "model": {"predicted_layers": 1, "energy_head": ["linear", "bilinear", "context"]},
            "refinement": {"recompute": "step"},
        },
        "block_recomputed": {
            "model": {"energy_head": ALL_TERMS, "conditioning": "adaln"},
            "refinement": {"recompute": "block"},
        },
        "block_recomputed_shallow": {
            "model": {
                "num_layers": 4,
                "predicted_layers": 2,
                "predicted_input": "anchored",
                "energy_head": ["bilinear", "context"],
                "conditioning": "time_embed",
            },
            "refinement": {"recompute": "block", "tile_rows": 3},
        },
        "block_recomputed_with_context_alone": {
            "model": {"predicted_layers": 1, "energy_head": ["linear", "context"]},
            "refinement": {"recompute": "block", "num_steps": 3},
        },
        "frames": {
            "kind": "embedding",
            "model": {
                "energy_head": ALL_TERMS,
                "predicted_layers": 1,
                "predicted_input": "anchored",
                "conditioning": "adaln_zero",
            },
            "state": {"initial": "zeros"},
        },
        "rising": {
            "refinement": {"loss_weights": "rising", "num_steps": 3},
            "model": {"energy_head": ["bilinear"], "predicted_layers": 1},
        },
        "given_weights": {"refinement": {"loss_weights": [3, 0, 1], "num_steps": 3}},
        "zeros_probabilities": {"state": {"initial": "zeros"}, "refinement": {"num_steps": 3}},
        "zeros_logits": {
            "state": {"initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "logits", "change_clamp": 0.3, "state_clamp": 0.8},
            "model": {"energy_head": ["bilinear", "context"]},
        },
        "zeros_mirror_tied": {
            "state": {"initial": "zeros", "tie_embedding": True},
            "refinement": {"update": "mirror", "tile_rows": 4},
            "model": {"energy_head": ["bilinear", "context"], "predicted_layers": 1},
        },
        "zeros_mirror_three_steps": {
            "state": {"initial": "zeros"},
            "refinement": {"update": "mirror", "num_steps": 3, "loss_weights": [2, 1, 1]},
        },
        "zeros_mirror_clamped": {
            "state": {"initial": "zeros"},
            "refinement": {"update": "mirror", "change_clamp": 1.0, "state_clamp": 1.5},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_heads_shallow_streams_and_weights_are_exact(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    compare(*build(**options), num_steps=options["refinement"].get("num_steps", 2))


@pytest.mark.parametrize("graph", ["detach", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "shallow": {
            "model": {"energy_head": ["linear", "direct"], "predicted_layers": 1},
            "state": {"initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "mirror", "tile_rows": 3},
        },
        "shared_keys": {
            "model": {"num_kv_heads": 2, "qk_norm": True, "conditioning": "adaln"},
            "refinement": {"recompute": "step", "loss": "last"},
        },
        "block_recomputed": {
            "model": {"conditioning": "time_embed", "energy_head": ALL_TERMS},
            "refinement": {"recompute": "block", "tile_rows": 6},
        },
        "workspace": {
            "model": {"energy_head": CONTENT, "predicted_input": "anchored"},
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"num_steps": 3, "reencode": 1},
        },
        "frames": {"kind": "embedding", "state": {"initial": "most_recent"}},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_candidates_that_attend_to_the_context_alone_are_exact(graph, name, options):
    model = {**options.get("model", {}), "own_keys": False}
    refinement = {**options.get("refinement", {}), "graph": graph}
    options = {**options, "model": model, "refinement": refinement}
    compare(*build(**options), num_steps=refinement.get("num_steps", 2))


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "all": {"refinement": {"reencode": "all"}},
        "all_last": {"refinement": {"reencode": "all", "loss": "last", "num_steps": 3}},
        "last_block": {
            "model": {"predicted_layers": 1, "predicted_input": "anchored", "energy_head": CONTENT},
            "refinement": {"reencode": 1, "num_steps": 3, "loss_weights": "rising"},
        },
        "fewer_than_predicted": {
            "model": {"num_layers": 3, "predicted_layers": 2, "predicted_input": "anchored"},
            "refinement": {"reencode": 1, "update": "mirror"},
            "state": {"initial": "zeros"},
        },
        "time_embed": {
            "model": {
                "conditioning": "time_embed",
                "predicted_input": "anchored",
                "predicted_layers": 1,
            },
            "refinement": {"reencode": "all", "num_steps": 3},
        },
        "adaln_last_block": {
            "model": {"conditioning": "adaln", "num_kv_heads": 2},
            "refinement": {"reencode": 1, "num_steps": 3, "loss_weights": [2, 0, 1]},
        },
        "every_other": {
            "model": {"energy_head": CONTENT},
            "refinement": {"reencode": "all", "reencode_every": 2, "num_steps": 4},
        },
        "every_other_last_block": {
            "model": {"num_layers": 3},
            "refinement": {"reencode": 2, "reencode_every": 2, "num_steps": 3, "update": "mirror"},
        },
        "every_other_weighted": {
            "refinement": {
                "reencode": "all",
                "reencode_every": 2,
                "num_steps": 3,
                "loss_weights": [1, 0, 3],
            },
        },
        "tiles_of_samples": {
            "state": {"map_scale": 7.0, "tie_embedding": True},
            "refinement": {"reencode": "all", "tile_rows": 5, "noise": 0.3, "update": "logits"},
        },
        "step_recomputed": {"refinement": {"reencode": "all", "recompute": "step"}},
        "block_recomputed": {
            "model": {
                "num_layers": 3,
                "predicted_layers": 2,
                "predicted_input": "anchored",
                "energy_head": CONTENT,
                "conditioning": "adaln",
            },
            "refinement": {"reencode": "all", "recompute": "block", "tile_rows": 6},
        },
        "last_block_recomputed": {
            "model": {"num_layers": 3, "predicted_layers": 2, "predicted_input": "anchored"},
            "refinement": {"reencode": 1, "recompute": "block", "num_steps": 3},
        },
        "last_blocks_recomputed_around_a_shallow_stream": {
            "model": {"num_layers": 3, "predicted_layers": 1, "predicted_input": "anchored"},
            "refinement": {"reencode": 2, "recompute": "block"},
        },
        "frames": {
            "kind": "embedding",
            "model": {"predicted_input": "anchored"},
            "refinement": {"reencode": "all", "num_steps": 3},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_observed_stream_that_is_encoded_again_is_exact(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    compare(*build(**options), num_steps=options["refinement"].get("num_steps", 2))


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "plain": {"model": {"loops": 3}},
        "direct_from_zeros": {
            "model": {
                "loops": 3,
                "predicted_layers": 1,
                "predicted_input": "anchored",
                "own_keys": False,
                "energy_head": ["direct"],
            },
            "state": {"initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "mirror", "tile_rows": 3},
        },
        "all_terms_of_adaln": {
            "model": {"loops": 2, "conditioning": "adaln", "energy_head": ALL_TERMS},
            "refinement": {"recompute": "step", "loss": "last"},
        },
        "time_embed_by_block": {
            "model": {"loops": 2, "conditioning": "time_embed", "num_kv_heads": 2},
            "refinement": {"recompute": "block", "num_steps": 3},
        },
        "encoded_again": {
            "model": {"loops": 2, "predicted_input": "anchored"},
            "state": {"workspace": 6},
            "refinement": {"reencode": "all", "num_steps": 3},
        },
        "last_block_encoded_again_by_block": {
            "model": {"loops": 3, "energy_head": CONTENT},
            "refinement": {"reencode": 1, "num_steps": 3, "recompute": "block"},
        },
        "frames": {"kind": "embedding", "model": {"loops": 2, "predicted_layers": 1}},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_observed_stream_that_is_read_several_times_is_exact(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    compare(*build(**options), num_steps=options["refinement"].get("num_steps", 2))


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize(
    "name, options",
    {
        "plain": {"state": {"workspace": 6}, "refinement": {"num_steps": 3}},
        "bilinear": {
            "model": {"energy_head": CONTENT, "predicted_input": "anchored"},
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"num_steps": 3, "workspace_step_size": 0.5, "loss_weights": "rising"},
        },
        "last_mirror_in_tiles": {
            "model": {"energy_head": ["bilinear"], "predicted_layers": 1},
            "state": {"workspace": 20, "initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "mirror", "loss": "last", "tile_rows": 3},
        },
        "noise_and_logits": {
            "state": {"workspace": 4, "workspace_initial": "random_noise"},
            "refinement": {"update": "logits", "noise": 0.3, "step_size_random_factor": 2.0},
        },
        "step_recomputed": {
            "model": {"energy_head": CONTENT, "conditioning": "adaln"},
            "state": {"workspace": 6},
            "refinement": {"recompute": "step"},
        },
        "block_recomputed": {
            "model": {
                "energy_head": ALL_TERMS,
                "conditioning": "adaln",
                "predicted_layers": 1,
                "predicted_input": "anchored",
            },
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"recompute": "block", "num_steps": 3},
        },
        "encoded_again": {
            "model": {"energy_head": CONTENT},
            "state": {"workspace": 6},
            "refinement": {"reencode": "all", "num_steps": 3},
        },
        "encoded_again_by_block": {
            "model": {"energy_head": CONTENT, "conditioning": "time_embed"},
            "state": {"workspace": 6, "workspace_initial": "random_noise"},
            "refinement": {"reencode": 1, "recompute": "block"},
        },
        "frames": {
            "kind": "embedding",
            "model": {"energy_head": ["bilinear"]},
            "state": {"workspace": 6},
            "refinement": {"num_steps": 3, "reencode": "all", "reencode_every": 2},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_workspace_is_exact(graph, name, options):
    options = {**options, "refinement": {**options.get("refinement", {}), "graph": graph}}
    model, observed, targets = build(**options)
    compare(model, observed, targets, num_steps=options["refinement"].get("num_steps", 2))
    if graph == "full":
        assert model.workspace_step_size.grad.abs() > 0
