"""Decay is exact in float64, and is the step of an energy."""

import pytest
import torch
from plain_autograd import B, S, V, build, compare

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.model.states import EmbeddedState
from ebwm_scale.refinement.decay import decay_energy

WORKSPACE = {
    "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
    "state": {"workspace": 6, "map_scale": 7.0},
    "refinement": {"step_size": 0.2},
}


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("update", ["mirror", "logits"])
@pytest.mark.parametrize("initial", ["zeros", "random_noise"])
@pytest.mark.parametrize(
    "name, options",
    {
        "alone": {},
        "workspace": WORKSPACE,
        "random_step_sizes": {"refinement": {"step_size_random_factor": 2.0}},
        "noisy_and_clamped": {
            "refinement": {"noise": 0.5, "change_clamp": 4.0, "state_clamp": 6.0},
        },
        "in_tiles_block_recomputed": {"refinement": {"tile_rows": 3, "recompute": "block"}},
        "encoded_again": {
            "state": {"workspace": 6},
            "refinement": {"reencode": "all", "loss_weights": "rising"},
        },
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_decay_is_exact(name, options, initial, update, graph):
    options = {
        **options,
        "state": {**options.get("state", {}), "initial": initial},
        "refinement": {
            **options.get("refinement", {}),
            "decay": 0.3,
            "num_steps": 3,
            "graph": graph,
            "update": update,
        },
    }
    compare(*build(**options), num_steps=3)


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("initial", ["zeros", "most_recent"])
def test_decay_of_frames_is_exact(graph, initial):
    refinement = {"decay": 0.3, "num_steps": 3, "graph": graph}
    compare(
        *build(kind="embedding", state={"initial": initial}, refinement=refinement), num_steps=3
    )


@pytest.mark.parametrize("initial", ["zeros", "random_noise"])
def test_decay_is_exact_where_the_graph_goes_through_the_last_steps(initial):
    refinement = {"decay": 0.3, "num_steps": 4, "graph": "full", "backprop_steps": 2}
    model, observed, targets = build(
        model=WORKSPACE["model"],
        state=WORKSPACE["state"] | {"initial": initial},
        refinement=WORKSPACE["refinement"] | refinement | {"update": "mirror"},
    )
    compare(model, observed, targets, num_steps=4)


@pytest.mark.parametrize("graph, initial", [("detach", "zeros"), ("full", "random_noise")])
def test_the_comparison_notices_a_state_that_does_not_decay(monkeypatch, graph, initial):
    monkeypatch.setattr(EmbeddedState, "decayed", lambda self, kept: self)
    refinement = {"decay": 0.3, "num_steps": 3, "graph": graph, "update": "mirror"}
    with pytest.raises(AssertionError):
        compare(*build(state={"initial": initial}, refinement=refinement), num_steps=3)


@pytest.mark.parametrize("update", ["mirror", "logits"])
def test_decay_is_the_step_of_an_energy(update):
    """By plain autograd: of the logits themselves, or with respect to probabilities (mirror)."""
    model, *_ = build(
        state={"workspace": 6},
        refinement={"decay": 0.3, "update": update, "workspace_step_size": 0.7},
    )
    x = torch.randn(B, S, V, dtype=torch.float64, requires_grad=True)
    z = torch.randn(B, S, 6, dtype=torch.float64, requires_grad=True)
    of_x, of_z = torch.autograd.grad(decay_energy(model, x, z).sum(), (x, z))
    torch.testing.assert_close(z - 0.7 * of_z, (1 - 0.3) * z)
    if update == "mirror":  # the same gradient through the softmax, up to a constant of the row
        p = x.softmax(-1)
        kept = p * (x - (p * x).sum(-1, keepdim=True))
        torch.testing.assert_close(model.step_size * of_x, 0.3 * kept)
    else:
        torch.testing.assert_close(x - model.step_size * of_x, (1 - 0.3) * x)


def test_an_embedded_frame_decays_along_its_energy():
    model, *_ = build(kind="embedding", refinement={"decay": 0.3})
    x = torch.randn(B, S, 7, dtype=torch.float64, requires_grad=True)
    (of_x,) = torch.autograd.grad(decay_energy(model, x, None).sum(), x)
    torch.testing.assert_close(x - model.step_size * of_x, (1 - 0.3) * x)


@pytest.mark.parametrize(
    "refinement, said",
    [
        ({"decay": 0.2}, "refinement.decay is 0.2 with refinement.update probabilities"),
        ({"decay": 1.0, "update": "mirror"}, "refinement.decay"),
    ],
)
def test_a_decay_that_means_nothing_is_refused(refinement, said):
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"refinement": refinement})
