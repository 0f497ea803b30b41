"""A graph through the last steps alone: exact in float64, and cheap in front of them.

The reference (plain_autograd.py) detaches the state and the workspace where the graph begins, and
scores the steps from there.
"""

from unittest import mock

import pytest
import torch
from plain_autograd import ALL_TERMS, B, build, compare, gradients

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.refinement.loop import total_loss
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.step_plan import plan_steps

MIRROR_FROM_ZEROS = {"state": {"initial": "zeros"}, "refinement": {"update": "mirror"}}


@pytest.mark.parametrize("loss", ["every", "last", "rising"])
@pytest.mark.parametrize("num_steps, backprop_steps", [(4, 2), (3, 1), (2, 3)])
@pytest.mark.parametrize(
    "name, options",
    {
        "probabilities": {},
        "logits": {"refinement": {"update": "logits"}},
        "mirror_from_zeros": MIRROR_FROM_ZEROS,
        "probabilities_from_zeros": {"state": {"initial": "zeros"}},
        "noisy_and_clamped": {
            "refinement": {"noise": 0.5, "change_clamp": 4.0, "step_size_random_factor": 2.0}
        },
        "workspace": {
            "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
            "state": {"workspace": 6, "initial": "zeros", "map_scale": 7.0},
            "refinement": {"update": "mirror", "step_size": 0.2},
        },
        "encoded_again": {
            "model": {"energy_head": ALL_TERMS},
            "state": {"workspace": 6, "initial": "zeros"},
            "refinement": {"reencode": "all", "update": "mirror"},
        },
        "every_other_step_again": {"refinement": {"reencode": 1, "reencode_every": 2}},
        "step_recomputed": {"refinement": {"recompute": "step"}},
        "block_recomputed_in_tiles": {
            "model": {"conditioning": "adaln"},
            "refinement": {"recompute": "block", "tile_rows": 3},
        },
        "frames": {"kind": "embedding", "model": {"conditioning": "time_embed"}},
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_graph_through_the_last_steps_is_exact(name, options, num_steps, backprop_steps, loss):
    choices = {"loss": loss} if loss != "rising" else {"loss_weights": "rising"}
    refinement = {
        "num_steps": max(num_steps, backprop_steps + 1),
        "graph": "full",
        "backprop_steps": backprop_steps,
        **options.get("refinement", {}),
        **choices,
    }
    compare(*build(**{**options, "refinement": refinement}), num_steps=num_steps)


@pytest.mark.parametrize("options", [{}, MIRROR_FROM_ZEROS], ids=["noise", "zeros"])
def test_the_comparison_notices_a_graph_that_begins_one_step_late(monkeypatch, options):
    """Breaks the mechanism on purpose: the losses stay right."""
    refinement = {"num_steps": 4, "graph": "full", "backprop_steps": 2}
    refinement |= options.get("refinement", {})
    model, observed, targets = build(**{**options, "refinement": refinement})
    space = type(model.state_space())
    right = space.embed
    monkeypatch.setattr(space, "embed", lambda self, x: right(self, x.detach()))
    with pytest.raises(AssertionError):
        compare(model, observed, targets, num_steps=4)


def test_steps_in_front_of_the_graph_build_none():
    """They take their inner gradient to first order, as evaluation does."""
    model, observed, targets = build(
        refinement={"num_steps": 5, "graph": "full", "backprop_steps": 2}
    )
    with mock.patch("torch.autograd.grad", side_effect=torch.autograd.grad) as inner:
        model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(1, 2))
    created = [bool(call.kwargs.get("create_graph")) for call in inner.call_args_list]
    assert created == [False, False, False, True, True]


def test_fewer_steps_than_the_graph_goes_through_are_all_differentiated():
    found = []
    for backprop_steps in (3, None):
        model, observed, targets = build(
            refinement={"num_steps": 4, "graph": "full", "backprop_steps": backprop_steps}
        )
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2), "num_steps": 3}
        found.append(gradients(model, model(observed, targets, **options).loss))
    for name, gradient in found[0].items():
        assert gradient is None or torch.equal(gradient, found[1][name]), name


def test_the_loss_is_that_of_the_differentiated_steps():
    config = RefinementConfig(graph="full", num_steps=5, backprop_steps=2)
    losses = [torch.tensor(float(i)) for i in range(5)]
    assert total_loss(losses, config).item() == 3.5
    rising = config.replace(loss_weights="rising")
    assert total_loss(losses, rising).item() == pytest.approx((16 * 3 + 25 * 4) / 41)
    plan = plan_steps(rising, range(5), training=True)
    assert [step.loss_weight for step in plan] == pytest.approx([0, 0, 0, 16 / 41, 25 / 41])


@pytest.mark.parametrize(
    "refinement, said",
    [
        ({"graph": "detach", "backprop_steps": 1}, "refinement.graph detach: only a graph through"),
        ({"graph": "full", "backprop_steps": 2}, "must be below refinement.num_steps 2"),
        ({"graph": "full", "backprop_steps": 0}, "refinement.backprop_steps"),
    ],
)
def test_a_graph_that_cannot_be_cut_off_is_refused(refinement, said):
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"refinement": refinement})


@pytest.mark.parametrize(
    "options",
    [{}, MIRROR_FROM_ZEROS, {"kind": "embedding"}],
    ids=["probabilities", "mirror", "frames"],
)
def test_one_step_under_full_is_that_of_detach_to_the_bit_and_keeps_no_graph(options):
    """There is no further step for a graph to reach, so the cheaper passes serve it."""
    found = []
    for graph in ("full", "detach"):
        refinement = {"num_steps": 1, "graph": graph, "loss": "every"}
        refinement |= options.get("refinement", {})
        model, observed, targets = build(**{**options, "refinement": refinement})
        (step,) = plan_steps(model.config.refinement, range(1), training=True)
        assert step.needs_graph and not step.keep_graph
        output = model(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(1, 2))
        found.append(gradients(model, output.loss))
    full, detach = found
    assert any(gradient is not None for gradient in full.values())
    for name, gradient in full.items():
        assert gradient is detach[name] is None or torch.equal(gradient, detach[name]), name
