"""Thinking that moves a few tokens of each row is the same with a mask over all tokens, also where
some rows have candidates and others, whose first step was undone, do not yet.
"""

import itertools

import pytest
import torch
from test_thinking import LENGTH, SEED, TEXT, model_of, prompt_of

from ebwm_scale.inference import thinking_state
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think
from ebwm_scale.refinement.loop import MIN_STEP_SIZE

K = 5
STEP_SIZES = {"probabilities": 4.0, "logits": 5.0, "mirror": 1.0}


def problem(update="mirror", initial="random_noise"):
    """The step size is one that lowers some energies and raises others, and makes no prediction
    so certain that rounding decides.
    """
    model = model_of(
        TEXT
        | {
            "refinement": {
                "candidates": K,
                "num_steps": 3,
                "update": update,
                "step_size": STEP_SIZES[update],
            },
            "state": {"initial": initial},
        }
    )
    return model, torch.stack([prompt_of(model, LENGTH, seed) for seed in (1, 2, 3)])


def thought_of(model, observed, config):
    noise = SequenceSampler(model, SEED, torch.arange(len(observed)), observed.shape[1])
    energy_function = SequenceEnergy(model, model.embed_observed(observed))
    return think(model, energy_function, noise.initial(None), config, noise=noise)


@torch.no_grad()
def masked(model, observed, config):
    """(x, final energies, accepted): every row over all V tokens, by what the words say."""
    noise = SequenceSampler(model, SEED, torch.arange(len(observed)), observed.shape[1])
    energy_function = SequenceEnergy(model, model.embed_observed(observed))
    weight, update = model.state_space().weight, model.config.refinement.update
    x = noise.initial(None)
    mask = torch.ones_like(x, dtype=torch.bool)
    alpha = model.step_size.squeeze(0).clamp(min=MIN_STEP_SIZE) * torch.ones(*x.shape[:2], 1)
    active = torch.ones(x.shape[:2], dtype=torch.bool)
    accepted = torch.zeros(x.shape[:2], dtype=torch.int64)

    def probabilities(x, mask):
        return x.masked_fill(~mask, -torch.inf).softmax(-1)

    def energy_of(x, mask):
        return energy_function(probabilities(x, mask) @ weight, 0)

    for i in range(config.num_steps):
        before = energy_of(x, mask)
        noisy = x
        if config.noise:
            noisy = x + config.noise * noise.langevin(i) * mask
        p = probabilities(noisy, mask)
        _, gradient, _ = energy_function.with_gradient(p @ weight, 0)
        move = -alpha * gradient @ weight.T
        if update == "logits":
            move = p * (move - (p * move).sum(-1, keepdim=True))
        start = p if update == "probabilities" else noisy
        proposal = torch.where(mask, start + move, noisy)
        places = proposal.topk(K).indices
        first_mask = torch.zeros_like(mask).scatter_(-1, places, True)
        next_mask = torch.where(mask.all(-1, keepdim=True), first_mask, mask)
        after = energy_of(proposal, next_mask)
        assert ((after - before).abs() > 1e-7)[active].all(), "rounding would decide"
        taken = active.clone()
        if config.accept_only_if_lower:
            taken &= after < before
            alpha = torch.where((active & ~taken)[..., None], alpha / 2, alpha)
        accepted += taken
        x = torch.where(taken[..., None], proposal, x)
        mask = torch.where(taken[..., None], next_mask, mask)
        if config.tolerance is not None:
            active &= torch.where(taken, before - after, 0.0) > config.tolerance
    return x, energy_of(x, mask), accepted


@pytest.mark.parametrize("update", ["probabilities", "logits", "mirror"])
@pytest.mark.parametrize("noise, only_if_lower", itertools.product((0.0, 0.3), (False, True)))
def test_thinking_with_candidates_is_what_a_mask_says(update, noise, only_if_lower):
    model, observed = problem(update)
    config = ThinkingConfig(num_steps=5, noise=noise, accept_only_if_lower=only_if_lower, seed=SEED)
    thought = thought_of(model, observed, config)
    x, energy, accepted = masked(model, observed, config)
    assert torch.equal(thought.accepted, accepted)
    torch.testing.assert_close(thought.state, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(thought.energy, energy, rtol=1e-9, atol=1e-9)


def test_some_rows_have_candidates_while_others_have_none(monkeypatch):
    """So that the comparison above means something."""
    kinds = []
    right = thinking_state.ThinkingState.embed

    def noted(self, **options):
        kinds.append(None if self.has_candidates is None else self.has_candidates.float().mean())
        return right(self, **options)

    monkeypatch.setattr(thinking_state.ThinkingState, "embed", noted)
    model, observed = problem()
    thought_of(model, observed, ThinkingConfig(num_steps=5, accept_only_if_lower=True, seed=SEED))
    assert any(kind is not None and 0 < kind < 1 for kind in kinds)


def test_rows_that_stop_early_are_what_a_mask_says():
    model, observed = problem()
    config = ThinkingConfig(num_steps=8, accept_only_if_lower=True, tolerance=0.02, seed=SEED)
    thought = thought_of(model, observed, config)
    x, energy, accepted = masked(model, observed, config)
    assert thought.steps.min() < thought.steps.max()
    assert torch.equal(thought.accepted, accepted)
    torch.testing.assert_close(thought.state, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(thought.energy, energy, rtol=1e-9, atol=1e-9)


def test_thinking_that_forgets_the_candidates_is_seen(monkeypatch):
    """Breaks it on purpose: all tokens go on moving."""
    model, observed = problem()
    config = ThinkingConfig(num_steps=3, seed=SEED)
    x, _, _ = masked(model, observed, config)
    monkeypatch.setattr(thinking_state.ThinkingState, "chooses", lambda self: None)
    assert not torch.allclose(thought_of(model, observed, config).state, x, rtol=1e-3)
