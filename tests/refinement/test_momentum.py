"""Steps with momentum are exact in float64: each goes on with a share of the one before."""

import pytest
import torch
from plain_autograd import B, S, build, compare

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.inference import thinking
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think
from ebwm_scale.refinement import moving
from ebwm_scale.refinement.decay import decay_energy
from ebwm_scale.refinement.momentum import carried_from, motion_of
from ebwm_scale.refinement.noise import NoiseSource

WORKSPACE = {
    "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
    "state": {"workspace": 6, "map_scale": 7.0, "initial": "zeros"},
    "refinement": {"step_size": 0.2, "update": "mirror"},
}
CASES = {
    "probabilities": {},
    "probabilities_from_zeros": {"state": {"initial": "zeros"}},
    "logits": {"refinement": {"update": "logits"}},
    "mirror": {"refinement": {"update": "mirror"}},
    "mirror_from_zeros": {"state": {"initial": "zeros"}, "refinement": {"update": "mirror"}},
    "workspace": WORKSPACE,
    "workspace_damped_with_decay": WORKSPACE
    | {"refinement": WORKSPACE["refinement"] | {"decay": 0.3, "damping": 0.5}},
    "random_noisy_and_clamped": {
        "refinement": {"step_size_random_factor": 2.0, "noise": 0.5, "change_clamp": 4.0}
    },
    "block_recomputed_in_tiles": {"refinement": {"recompute": "block", "tile_rows": 3}},
    "step_recomputed": {"refinement": {"recompute": "step", "loss_weights": "rising"}},
    "encoded_again": {"state": {"workspace": 6}, "refinement": {"reencode": "all"}},
    "time_embed": {"model": {"conditioning": "time_embed"}},
    "frames": {"kind": "embedding", "refinement": {"decay": 0.2}},
}


def with_momentum(case, graph, **refinement):
    options = dict(CASES[case])
    choices = {"momentum": 0.6, "num_steps": 3, "graph": graph}
    options["refinement"] = options.get("refinement", {}) | choices | refinement
    return options


@pytest.mark.parametrize("loss", ["every", "last"])
@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("case", CASES)
def test_steps_with_momentum_are_exact(case, graph, loss):
    refinement = {"loss": loss}
    if loss == "last":
        refinement["loss_weights"] = None
    compare(*build(**with_momentum(case, graph, **refinement)), num_steps=3)


@pytest.mark.parametrize("case", ["mirror_from_zeros", "workspace", "logits", "frames"])
def test_momentum_is_exact_where_the_graph_goes_through_the_last_steps(case):
    options = with_momentum(case, "full", num_steps=4, backprop_steps=2)
    compare(*build(**options), num_steps=4)


@pytest.mark.parametrize("graph", ["detach", "full"])
@pytest.mark.parametrize("case", ["mirror_from_zeros", "workspace", "frames"])
def test_the_comparison_notices_a_step_that_goes_on_with_nothing(monkeypatch, case, graph):
    monkeypatch.setattr(moving, "carried_from", lambda motion, momentum: None)
    with pytest.raises(AssertionError):
        compare(*build(**with_momentum(case, graph)), num_steps=3)


def test_the_comparison_notices_a_motion_whose_graph_is_lost(monkeypatch):
    """Breaks the second order on purpose: losses and states stay right."""
    monkeypatch.setattr(moving, "motion_of", lambda *arguments: motion_of(*arguments).detach())
    with pytest.raises(AssertionError):
        compare(*build(**with_momentum("mirror_from_zeros", "full")), num_steps=3)


def test_a_restarted_sample_starts_at_rest():
    """Its first step is that of a model without momentum, whatever moved it when it was stored."""
    found = {}
    for momentum in (0.0, 0.6):
        refinement = {"momentum": momentum, "num_steps": 2, "update": "mirror", "replay": True}
        model, observed, targets = build(refinement=refinement)
        stored = torch.randn(1, S, model.state_size, dtype=torch.float64)
        options = {"source": NoiseSource(1, 2), "keep_state": torch.float64}
        for num_steps in (1, 2):
            found[momentum, num_steps] = model.train()(
                observed,
                targets,
                sample_ids=torch.arange(B),
                num_steps=num_steps,
                restart=(torch.tensor([1]), stored.clone()),
                **options,
            ).state
    assert torch.equal(found[0.0, 1], found[0.6, 1])
    assert not torch.allclose(found[0.0, 2], found[0.6, 2])


def test_steps_with_momentum_and_decay_end_where_the_energy_with_decay_has_its_minimum():
    """A constant slope of E, by hand: there the slope of what decay adds is its opposite."""
    refinement = {"momentum": 0.5, "decay": 0.2, "update": "logits", "step_size": 0.7}
    model, *_ = build(refinement=refinement)
    slope = torch.randn(1, 1, 5, dtype=torch.float64)
    x = torch.zeros_like(slope)
    motion = None
    for _ in range(200):
        motion = motion_of(slope, torch.tensor(0.7), carried_from(motion, 0.5), torch.float64)
        x = (1 - 0.2) * x + motion
    x.requires_grad_()
    (of_decay,) = torch.autograd.grad(decay_energy(model, x, None).sum(), x)
    torch.testing.assert_close(of_decay, -slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rests", [True, False])
def test_thinking_goes_on_from_rest_where_a_step_was_undone(monkeypatch, rests):
    """By hand, one row at a time: motion is kept where a step was taken and forgotten where not."""
    options = with_momentum("mirror_from_zeros", "detach", step_size=60.0)
    model, observed, _ = build(**options)
    model.eval()
    if not rests:  # breaks the rule on purpose
        monkeypatch.setattr(thinking, "at_rest_where", lambda undone, motion: motion)
    noise = SequenceSampler(model, 3, torch.arange(B), S)
    config = ThinkingConfig(seed=3, num_steps=6, accept_only_if_lower=True)
    function = SequenceEnergy(model, model.embed_observed(observed))
    thought = think(model, function, noise.initial(None), config, noise=noise)
    assert 0 < thought.accepted.sum() < thought.steps.sum()

    space = model.state_space()
    x = torch.zeros(B, S, model.state_size, dtype=torch.float64)
    motion = torch.zeros(B, S, space.weight.shape[1], dtype=torch.float64)
    scale = torch.ones(B, S, 1, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(6):
            energy, gradient, _ = function.with_gradient(space.embed(x).vectors, 0)
            motion = 0.6 * motion - model.step_size * scale * gradient
            proposal = x + motion @ space.weight.T
            lower = (function(space.embed(proposal).vectors, 0) < energy)[..., None]
            x = torch.where(lower, proposal, x)
            motion = torch.where(lower, motion, 0)
            scale = torch.where(lower, scale, scale / 2)
    same = torch.allclose(thought.state, x, rtol=1e-9, atol=1e-10)
    assert same == rests


@pytest.mark.parametrize(
    "refinement, said",
    [
        ({"momentum": 0.5, "num_steps": 1}, "refinement.momentum is 0.5 with .*num_steps 1"),
        ({"momentum": 1.0}, "refinement.momentum"),
    ],
)
def test_a_momentum_that_means_nothing_is_refused(refinement, said):
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"refinement": refinement})
