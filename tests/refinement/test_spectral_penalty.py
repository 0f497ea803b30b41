"""The penalty on steps that do not shrink is exact in float64, and shrinks them."""

import itertools

import pytest
import test_grouped_refinement as grouped
import torch
from plain_autograd import B, build, compare

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.refinement.loop import refine
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.refinement.sampling import TrainingNoise
from ebwm_scale.refinement.spectral_penalty import SpectralPenalty

ZEROS = {"state": {"initial": "zeros"}}
WORKSPACE = {
    "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
    "state": {"workspace": 6, "map_scale": 7.0, "initial": "zeros"},
    "refinement": {"step_size": 0.2},
}
CASES = {
    "mirror": {},
    "mirror_from_zeros": ZEROS,
    "workspace": WORKSPACE,
    "workspace_with_momentum_damping_and_decay": WORKSPACE
    | {"refinement": {"step_size": 0.2, "decay": 0.3, "momentum": 0.5, "damping": 0.5}},
    "random_noisy_and_clamped": {
        "refinement": {"step_size_random_factor": 2.0, "noise": 0.5, "change_clamp": 4.0}
    },
    "decay_from_noise": {"refinement": {"decay": 0.3, "step_size_random_factor": 2.0}},
    "block_recomputed_in_tiles": {"refinement": {"recompute": "block", "tile_rows": 3}},
    "step_recomputed": {"refinement": {"recompute": "step", "loss_weights": [1, 0, 2]}},
    "encoded_again": {"state": {"workspace": 6}, "refinement": {"reencode": "all"}},
    "every_other_step_again": {"refinement": {"reencode": "all", "reencode_every": 2}},
    "frames": {"kind": "embedding", "refinement": {"decay": 0.2, "update": "probabilities"}},
}


def penalised(case, graph, **refinement):
    options = dict(CASES[case])
    choices = {"spectral_penalty": 3.0, "spectral_bound": 0.3, "num_steps": 3, "graph": graph}
    own = options.get("refinement", {})
    options["refinement"] = {"update": "mirror"} | own | choices | refinement
    return options


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("case", CASES)
def test_the_penalty_is_exact(case, graph):
    compare(*build(**penalised(case, graph)), num_steps=3)


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
def test_the_penalty_is_exact_where_the_last_step_is_scored_alone(graph):
    compare(*build(**penalised("mirror_from_zeros", graph, loss="last")), num_steps=3)


@pytest.mark.parametrize("case", ["mirror_from_zeros", "workspace"])
def test_the_penalty_is_exact_where_the_graph_goes_through_the_last_steps(case):
    options = penalised(case, "full", num_steps=4, backprop_steps=2, momentum=0.4)
    compare(*build(**options), num_steps=4)


@pytest.mark.parametrize("graph", ["detach", "full"])
def test_rows_of_a_group_have_one_ratio(graph):
    options = penalised("workspace", graph) | {"data": grouped.GRID}
    options["refinement"] = options["refinement"] | {"tile_rows": 4}
    grouped.compare(*grouped.build(**options), num_steps=3)


@pytest.mark.parametrize("graph", ["detach", "full"])
def test_the_comparison_notices_a_move_that_loses_its_gradient(monkeypatch, graph):
    """Breaks it on purpose: the penalty's value stays right."""
    right = SpectralPenalty.of_step

    def broken(self, step, motion, factor, workspace_move):
        return right(self, step, motion.detach() + 0 * motion, factor, workspace_move)

    monkeypatch.setattr(SpectralPenalty, "of_step", broken)
    with pytest.raises(AssertionError):
        compare(*build(**penalised("mirror_from_zeros", graph)), num_steps=3)


def test_the_comparison_notices_a_penalty_that_is_not_back_propagated(monkeypatch):
    """Breaks it on purpose: the loss's value stays right."""
    right = SpectralPenalty.of_step

    def broken(self, *arguments):
        term = right(self, *arguments)
        return None if term is None else term.detach()

    monkeypatch.setattr(SpectralPenalty, "of_step", broken)
    with pytest.raises(AssertionError):
        compare(*build(**penalised("workspace", "full")), num_steps=3)


def test_evaluation_knows_no_penalty():
    losses = []
    for weight in (0.0, 3.0):
        model, observed, targets = build(
            **penalised("workspace", "full", spectral_penalty=weight, spectral_bound=0.8)
        )
        options = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
        losses.append(model.eval()(observed, targets, **options).loss)
    assert torch.equal(*losses)


def test_descending_the_penalty_shortens_later_moves():
    """What it is for: a few steps along its gradient, which outweighs the loss's here."""
    weight = 1000.0
    options = penalised("mirror_from_zeros", "full", spectral_penalty=weight, spectral_bound=0.1)
    model, observed, targets = build(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 / weight)
    before = ratio_of_moves(model, observed)
    for _ in range(10):
        draws = {"sample_ids": torch.arange(B), "source": NoiseSource(1, 2)}
        optimizer.zero_grad()
        model.train()(observed, targets, **draws).loss.backward()
        optimizer.step()
    assert ratio_of_moves(model, observed) < 0.9 * before


def ratio_of_moves(model, observed):
    """Mean ratio of the third move to the second, of logits."""
    config = model.config.refinement
    shape = (*observed.shape, model.state_size)
    noise = TrainingNoise(
        NoiseSource(1, 2), config, torch.arange(B), shape, kind="zeros", dtype=torch.float64
    )
    states = [torch.zeros(shape, dtype=torch.float64)]
    with torch.no_grad():
        refine(
            model,
            model.embed_observed(observed),
            None,
            config=config,
            landscapes=model.landscapes(3),
            noise=noise,
            training=False,
            record=lambda record: states.append(record.state),
        )
    moves = [(b - a).norm(dim=-1) for a, b in itertools.pairwise(states)]
    return float((moves[2] / moves[1]).mean())


@pytest.mark.parametrize(
    "refinement, said",
    [
        ({"spectral_penalty": 1.0}, "spectral_penalty is 1.0 with refinement.update prob"),
        ({"spectral_penalty": 1.0, "update": "logits"}, "with refinement.update logits"),
        (
            {"spectral_penalty": 1.0, "update": "mirror", "num_steps": 1},
            "spectral_penalty is 1.0 with refinement.num_steps 1",
        ),
        ({"spectral_bound": 0.5}, "spectral_bound is 0.5 without"),
    ],
)
def test_a_penalty_that_means_nothing_is_refused(refinement, said):
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"refinement": refinement})
