"""A learned distribution over exits: exact in float64, and where it ends."""

import math

import pytest
import torch
from plain_autograd import B, build, compare
from test_candidates import compare as compare_candidates

from ebwm_scale.checkpoint.released_ebt import hparams_of
from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.planning.parameters import count_parameters
from ebwm_scale.refinement import loop as refinement_loop
from ebwm_scale.refinement.exits import exit_objective, exit_summary
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.reporting.exits import exit_sentences
from ebwm_scale.training.optimizer import parameter_groups

CASES = {
    "probabilities": {},
    "mirror_from_zeros": {"state": {"initial": "zeros"}, "refinement": {"update": "mirror"}},
    "workspace_with_momentum_and_penalty": {
        "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
        "state": {"workspace": 6, "map_scale": 7.0, "initial": "zeros"},
        "refinement": {
            "step_size": 0.2,
            "update": "mirror",
            "momentum": 0.5,
            "spectral_penalty": 2.0,
        },
    },
    "block_recomputed_in_tiles": {"refinement": {"recompute": "block", "tile_rows": 3}},
    "encoded_again": {"state": {"workspace": 6}, "refinement": {"reencode": "all"}},
    "frames": {"kind": "embedding", "refinement": {"exit_entropy": 0.0}},
}


def with_exits(case, graph, **refinement):
    options = dict(CASES[case])
    choices = {"loss_weights": "exits", "num_steps": 3, "graph": graph}
    options["refinement"] = options.get("refinement", {}) | choices | refinement
    model, observed, targets = build(**options)
    assert model.exit_logits is not None
    with torch.no_grad():  # no step is worth what another is
        model.exit_logits.copy_(torch.linspace(-0.7, 1.1, len(model.exit_logits)) ** 2)
    return model, observed, targets


@pytest.mark.parametrize("num_steps", [3, 2])
@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("case", CASES)
def test_learned_exits_are_exact(case, graph, num_steps):
    compare(*with_exits(case, graph), num_steps=num_steps)


def test_learned_exits_are_exact_where_the_graph_goes_through_the_last_steps():
    arguments = with_exits("mirror_from_zeros", "full", num_steps=4, backprop_steps=2)
    compare(*arguments, num_steps=4)


def test_learned_exits_are_exact_with_candidates(monkeypatch):
    """The reference of candidates takes the distribution as its list, whose gradient is by hand."""
    model, observed, targets = with_exits("mirror_from_zeros", "full", candidates=4)
    logits = model.exit_logits.detach().clone()
    draws = {"sample_ids": torch.tensor([4, 9, 2]), "source": NoiseSource(5, 6)}
    output = model(observed, targets, **draws)
    output.loss.backward()
    q = logits.softmax(-1).requires_grad_()
    losses = output.loss_per_step
    (q * losses).sum().add(0.1 * (q * (q * 3).log()).sum()).backward()
    by_hand = q.detach() * (q.grad - (q.detach() * q.grad).sum())
    torch.testing.assert_close(model.exit_logits.grad, by_hand)
    fixed, *_ = build(
        state={"initial": "zeros"},
        refinement={
            "update": "mirror",
            "candidates": 4,
            "num_steps": 3,
            "graph": "full",
            "loss_weights": logits.softmax(-1).tolist(),
        },
    )
    compare_candidates(fixed, observed, targets)
    fixed.zero_grad()
    fixed(observed, targets, **draws).loss.backward()
    gradients = dict(model.named_parameters())
    for name, parameter in fixed.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad)


def test_the_comparison_notices_logits_without_a_gradient(monkeypatch):
    """Breaks it on purpose: the loss and all other gradients stay right."""
    monkeypatch.setattr(
        refinement_loop,
        "exit_objective",
        lambda logits, *rest: exit_objective(logits.detach() + 0 * logits, *rest),
    )
    with pytest.raises(AssertionError):
        compare(*with_exits("mirror_from_zeros", "detach"), num_steps=3)


def test_the_comparison_notices_steps_that_are_weighted_alike(monkeypatch):
    """Breaks it on purpose: the loss's value and the logits' gradient stay right."""
    monkeypatch.setattr(refinement_loop, "with_exit_weights", lambda config, logits, n: config)
    with pytest.raises(AssertionError):
        compare(*with_exits("mirror_from_zeros", "detach"), num_steps=3)


def test_the_distribution_ends_where_losses_say():
    """q is proportional to exp(-loss / entropy): by descent of its objective."""
    model, *_ = with_exits("probabilities", "detach", exit_entropy=0.2)
    losses = [torch.tensor(value, dtype=torch.float64) for value in (0.5, 0.3, 0.35)]
    logits = model.exit_logits
    for _ in range(3000):
        (gradient,) = torch.autograd.grad(
            exit_objective(logits, losses, model.config.refinement), logits
        )
        with torch.no_grad():
            logits -= 5 * gradient
    expected = (-torch.stack(losses) / 0.2).softmax(-1)
    torch.testing.assert_close(logits.softmax(-1).detach(), expected, rtol=1e-4, atol=0)


def test_evaluation_gives_the_expected_loss_and_says_the_expected_exit():
    model, observed, targets = with_exits("mirror_from_zeros", "detach")
    output = model.eval()(observed, targets, sample_ids=torch.arange(B), source=NoiseSource(1, 2))
    q = model.exit_logits.detach().softmax(-1)
    torch.testing.assert_close(output.loss, (q * output.loss_per_step).sum())
    summary = exit_summary(model.exit_logits)
    by_hand = sum((i + 1) * float(share) for i, share in enumerate(q))
    assert summary["expected_step"] == pytest.approx(by_hand)
    (sentence,) = exit_sentences({"exits": summary})
    assert f"after {by_hand:.2f} steps" in sentence and exit_sentences({}) == []


def test_a_fresh_model_has_no_preference_and_its_own_rate():
    model, *_ = build(refinement={"loss_weights": "exits", "num_steps": 4})
    torch.nn.init.zeros_(model.exit_logits)
    assert exit_summary(model.exit_logits)["probabilities"] == [0.25] * 4
    assert count_parameters(model)["exits"] == 4
    *_, group = parameter_groups(model, model.config)
    assert group["params"][0] is model.exit_logits
    assert (group["rate_scale"], group["weight_decay"]) == (10.0, 0.0)
    assert math.isclose(exit_summary(model.exit_logits)["expected_step"], 2.5)
    assert build()[0].exit_logits is None


@pytest.mark.parametrize(
    "sections, said",
    [
        ({"refinement": {"loss_weights": "exits", "num_steps": 1}}, "there is one exit"),
        ({"refinement": {"loss_weights": "exits", "loss": "last"}}, "with refinement.loss last"),
        ({"refinement": {"exit_entropy": 0.2}}, "exit_entropy is 0.2 with .*loss_weights None"),
        (
            {"refinement": {"loss_weights": "exits"}, "model": {"kind": "baseline"}},
            "a baseline takes no steps",
        ),
    ],
)
def test_exits_that_mean_nothing_are_refused(sections, said):
    with pytest.raises(ConfigError, match=said):
        config_from_dict(sections)


def test_the_released_code_has_no_exits():
    config = config_from_dict({"refinement": {"loss_weights": "exits"}})
    with pytest.raises(ConfigError, match="loss_weights"):
        hparams_of(config)
