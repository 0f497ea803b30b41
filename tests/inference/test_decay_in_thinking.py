"""With decay, thinking compares the energy that its steps descend: decay's terms too."""

import itertools

import pytest
import torch
from thinking_cases import CASES, LENGTH, SEED, model_of, prompt_of

from ebwm_scale.inference import thinking
from ebwm_scale.inference.energy_functions import SequenceEnergy, of_groups
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think
from ebwm_scale.refinement.decay import decay_energy

GROUPS = {"data": {"context_length": LENGTH, "group_size": 3}}


def thoughts(model, num_steps, **choices):
    """Of every position of a sequence, after 1 .. num_steps steps: (total, states)."""
    prompt = prompt_of(model, 6)[None]
    found = []
    for steps in range(1, num_steps + 1):
        config = ThinkingConfig(num_steps=steps, seed=SEED, **choices)
        noise = SequenceSampler(model, SEED, torch.tensor([0]), 6)
        function = SequenceEnergy(model, model.embed_observed(prompt))
        thought = think(model, function, noise.initial(None), config, noise=noise)
        added = decay_energy(model, thought.state, None)
        assert thought.energy is not None
        total = thought.energy + of_groups(added, model.network.group_size)
        found.append((total, thought))
    return found


@pytest.mark.parametrize("case", ["decay", "decay of logits", "decay in groups"])
def test_no_accepted_step_raises_the_energy_with_decay(case):
    changes = GROUPS if case == "decay in groups" else {}
    options = CASES[case.removesuffix(" in groups")]
    refinement = options["refinement"] | {"step_size": 40.0, "decay": 0.6}
    model = model_of(options, refinement=refinement, **changes)
    found = thoughts(model, 6, accept_only_if_lower=True)
    for (before, _), (after, _) in itertools.pairwise(found):
        assert (after <= before + 1e-12).all()
    last = found[-1][1]
    assert 0 < last.accepted.sum() < last.steps.sum()  # some are taken, and some are not


@pytest.mark.parametrize("with_terms", [True, False])
def test_steps_that_mostly_decay_are_accepted_for_what_decay_gains(monkeypatch, with_terms):
    """Breaks the comparison on purpose: the network's energy alone knows nothing of the gain."""
    model = model_of(CASES["decay"], refinement=CASES["decay"]["refinement"] | {"step_size": 0.01})
    if not with_terms:
        monkeypatch.setattr(
            thinking, "_added_by_decay", lambda model, x, z, energy: torch.zeros_like(energy)
        )
    _, thought = thoughts(model, 3, accept_only_if_lower=True)[-1]
    assert bool((thought.accepted == thought.steps).all()) == with_terms


@pytest.mark.parametrize("accept_only_if_lower", [False, True])
def test_a_shorter_step_forgets_less(accept_only_if_lower):
    """Thinking with half of the step size takes half of the step along every term."""
    model = model_of(CASES["decay"])
    alpha = float(model.step_size.detach())
    states = {}
    for factor in (1e-9, 0.5, 1.0):
        choices = {"step_size": factor * alpha, "accept_only_if_lower": accept_only_if_lower}
        states[factor] = thoughts(model, 1, **choices)[0][1].state
    moved = states[1.0] - states[1e-9]
    halfway = states[0.5] - states[1e-9]
    taken = moved.abs().amax(-1) > 1e-6
    assert taken.any()
    torch.testing.assert_close(halfway[taken], moved[taken] / 2, rtol=1e-6, atol=1e-8)
