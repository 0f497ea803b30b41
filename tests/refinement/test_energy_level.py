"""The term that asks the energy for its level is exact in float64, and teaches it to judge."""

import pytest
import test_grouped_refinement as grouped
import torch
from plain_autograd import B, build, compare

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.refinement.energy_level import EnergyLevel
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.step_plan import plan_steps

CASES = {
    "probabilities": {},
    "logits": {"refinement": {"update": "logits"}},
    "mirror": {"refinement": {"update": "mirror"}},
    "mirror_from_zeros": {
        "state": {"initial": "zeros"},
        "refinement": {"update": "mirror", "loss_weights": "rising"},
    },
    "noisy_and_clamped": {
        "refinement": {"step_size_random_factor": 2.0, "noise": 0.5, "change_clamp": 4.0}
    },
    "workspace": {
        "model": {"energy_head": ["direct", "bilinear"], "predicted_input": "anchored"},
        "state": {"workspace": 6, "map_scale": 7.0, "initial": "zeros"},
        "refinement": {"update": "mirror", "momentum": 0.5, "damping": 0.5, "step_size": 0.2},
    },
    "step_recomputed": {"refinement": {"recompute": "step", "loss_weights": [1, 0, 2]}},
    "block_recomputed_in_tiles": {"refinement": {"recompute": "block", "tile_rows": 3}},
    "encoded_again": {"state": {"workspace": 6}, "refinement": {"reencode": "all"}},
    "with_the_other_penalty": {
        "refinement": {"update": "mirror", "spectral_penalty": 2.0, "spectral_bound": 0.3}
    },
    "undone_steps": {"refinement": {"accept": "lower", "update": "mirror"}},
    "z_loss": {"z_loss": 0.3, "refinement": {"update": "mirror", "loss": "last"}},
    "frames": {"kind": "embedding", "model": {"conditioning": "adaln"}},
}


def levelled(case, graph, **refinement):
    options = dict(CASES[case])
    choices = {"level_weight": 0.7, "num_steps": 3, "graph": graph}
    options["refinement"] = options.get("refinement", {}) | choices | refinement
    return options


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_term_is_exact(case, graph):
    compare(*build(**levelled(case, graph)), num_steps=3)


@pytest.mark.parametrize("graph", ["detach", "full"])
def test_it_is_exact_where_the_last_step_is_scored_alone(graph):
    compare(
        *build(**levelled("mirror_from_zeros", graph, loss="last", loss_weights=None)), num_steps=3
    )


@pytest.mark.parametrize("graph", ["detach", "full"])
@pytest.mark.parametrize("case", ["probabilities", "logits", "mirror_from_zeros", "frames"])
def test_a_single_step_has_the_level_of_where_it_ends(case, graph):
    options = levelled(case, graph, num_steps=1, loss_weights=None)
    compare(*build(**options), num_steps=1)


def test_it_is_exact_where_the_graph_goes_through_the_last_steps():
    options = levelled("mirror_from_zeros", "full", num_steps=4, backprop_steps=2)
    compare(*build(**options), num_steps=4)


@pytest.mark.parametrize("graph", ["detach", "full"])
@pytest.mark.parametrize("kind", ["vocabulary", "embedding"])
def test_rows_of_a_group_have_one_level(kind, graph):
    case = "workspace" if kind == "vocabulary" else "frames"
    options = levelled(case, graph, tile_rows=4) | {"kind": kind, "data": grouped.GRID}
    if kind == "embedding":
        options["model"] = {}
    grouped.compare(*grouped.build(**options), num_steps=3)


def test_positions_that_are_not_scored_have_no_level():
    """What stands behind the only scored position changes nothing."""
    model, observed, targets = build(**levelled("mirror", "detach"))
    model.train()
    targets = targets.clone()  # it shares memory with the observed tokens
    targets[:, 1:] = -100
    changed = observed.clone()
    changed[:, 1:] = (observed[:, 1:] + 1) % 13
    options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
    losses = [model(tokens, targets, **options).loss for tokens in (observed, changed)]
    torch.testing.assert_close(*losses)


def broken_term(monkeypatch, change):
    right = EnergyLevel.of_state
    monkeypatch.setattr(EnergyLevel, "of_state", lambda self, *given: change(right, self, *given))


@pytest.mark.parametrize("graph", ["detach", "full"])
def test_the_comparison_notices_a_level_that_loses_its_gradient(monkeypatch, graph):
    """Breaks it on purpose: the term's value stays right."""
    broken_term(monkeypatch, lambda right, self, energy, c: right(self, energy.detach(), c))
    with pytest.raises(AssertionError):
        compare(*build(**levelled("mirror_from_zeros", graph)), num_steps=3)


def test_the_comparison_notices_an_end_that_is_left_out(monkeypatch):
    """Breaks it on purpose: the energy of the last state alone."""
    monkeypatch.setattr(EnergyLevel, "at_end", staticmethod(lambda step: False))
    with pytest.raises(AssertionError):
        compare(*build(**levelled("mirror_from_zeros", "detach")), num_steps=3)


def test_the_comparison_notices_a_loss_that_is_not_taken_as_given(monkeypatch):
    """Breaks it on purpose: with a gradient through the state's own loss."""
    monkeypatch.setattr(EnergyLevel, "costs", EnergyLevel.costs.__wrapped__)
    with pytest.raises(AssertionError):
        compare(*build(**levelled("mirror_from_zeros", "full")), num_steps=3)


def test_evaluation_knows_no_term():
    losses = []
    for weight in (0.0, 3.0):
        model, observed, targets = build(**levelled("workspace", "full", level_weight=weight))
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
        losses.append(model.eval()(observed, targets, **options).loss)
    assert torch.equal(*losses)


def test_every_state_that_a_differentiated_step_starts_from_or_ends_at_has_a_term():
    config = config_from_dict(
        {"refinement": {"num_steps": 4, "level_weight": 1.0, "graph": "full"}}
    )
    for graph, expected in (("detach", [1, 2, 3]), ("truncate", [3]), ("full", [1, 2, 3])):
        refinement = config.refinement.model_copy(update={"graph": graph})
        plan = plan_steps(refinement, [0] * 4, training=True)
        assert [step.index for step in plan if EnergyLevel.at_start(step)] == expected, graph
        assert [step.index for step in plan if EnergyLevel.at_end(step)] == [3], graph


def test_descending_the_term_brings_energies_to_their_losses():
    """What it is for: a few steps along its gradient, which outweighs the loss's here."""
    weight = 100.0
    model, observed, targets = build(**levelled("mirror", "detach", level_weight=weight))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002 / weight)
    terms = []
    for _ in range(12):
        draws = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
        optimizer.zero_grad()
        output = model.train()(observed, targets, **draws)
        loss = sum(float(step) for step in output.loss_per_step) / 3
        terms.append(float(output.loss.detach()) - loss)
        output.loss.backward()
        optimizer.step()
    assert 0 < terms[-1] < 0.8 * terms[0], terms


@pytest.mark.parametrize(
    "refinement, message",
    [
        ({"candidates": 4}, "level_weight is 0.5 with refinement.candidates 4"),
        ({"level_weight": -1.0}, "level_weight"),
    ],
)
def test_what_has_no_level_is_refused(refinement, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict({"refinement": {"level_weight": 0.5, **refinement}})
