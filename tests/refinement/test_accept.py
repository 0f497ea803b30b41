"""Rows whose energy a step does not lower keep their state: exact in float64, in training and in
thinking alike.
"""

import pytest
import test_grouped_refinement as grouped
import torch
from plain_autograd import B, S, build, compare

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.evaluation.answers import Instances, answers, see_answers
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think
from ebwm_scale.refinement import acceptance
from ebwm_scale.refinement.acceptance import Acceptance
from ebwm_scale.refinement.noise import NoiseSource

BILINEAR = {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"}
WORKSPACE = {
    "model": BILINEAR,
    "state": {"workspace": 6, "map_scale": 7.0, "initial": "zeros"},
    "refinement": {"step_size": 8.0, "workspace_step_size": 12.0},
}
CASES = {
    "mirror": {},
    "mirror_from_zeros": {"state": {"initial": "zeros"}},
    "logits": {"refinement": {"update": "logits", "step_size": 15.0}},
    "workspace": WORKSPACE,
    "workspace_with_momentum_damping_and_decay": WORKSPACE
    | {"refinement": WORKSPACE["refinement"] | {"decay": 0.3, "momentum": 0.5, "damping": 0.5}},
    "random_and_clamped": {"refinement": {"step_size_random_factor": 2.0, "change_clamp": 4.0}},
    "block_recomputed_in_tiles": {"refinement": {"recompute": "block", "tile_rows": 3}},
    "step_recomputed": {"refinement": {"recompute": "step", "loss_weights": "rising"}},
    "encoded_again": {
        "model": BILINEAR,
        "state": {"workspace": 6},
        "refinement": {"reencode": "all", "workspace_step_size": 12.0},
    },
    "time_embed": {"model": {"conditioning": "time_embed"}},
    "frames": {
        "kind": "embedding",
        "refinement": {"update": "probabilities", "decay": 0.1, "step_size": 40.0},
    },
}


def accepting(case, graph, **refinement):
    options = dict(CASES[case])
    choices = {"accept": "lower", "num_steps": 4, "graph": graph}
    own = {"update": "mirror", "step_size": 6.0} | options.get("refinement", {})
    options["refinement"] = own | choices | refinement
    return options


@pytest.fixture
def decisions(monkeypatch):
    """What training decides, for every step and tile."""
    seen = []
    right = Acceptance.decide

    def noted(self, *arguments):
        seen.append(right(self, *arguments))
        return seen[-1]

    monkeypatch.setattr(Acceptance, "decide", noted)
    return seen


def some_are_taken(decisions):
    taken = torch.cat([part.flatten() for part in decisions])
    return bool(taken.any()) and not bool(taken.all())


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("case", CASES)
def test_rows_that_stay_are_exact(case, graph, decisions):
    compare(*build(**accepting(case, graph)), num_steps=4)
    assert some_are_taken(decisions)


@pytest.mark.parametrize("case", ["mirror_from_zeros", "workspace"])
def test_rows_that_stay_are_exact_where_the_graph_goes_through_the_last_steps(case, decisions):
    compare(*build(**accepting(case, "full", backprop_steps=2)), num_steps=4)
    assert some_are_taken(decisions)


@pytest.mark.parametrize("graph", ["detach", "full"])
def test_the_rows_of_a_group_stay_together(graph, decisions):
    options = accepting("mirror", graph, tile_rows=4) | {"data": grouped.GRID}
    grouped.compare(*grouped.build(**options), num_steps=4)
    assert some_are_taken(decisions)
    for taken in decisions:
        of_groups = taken.unflatten(1, (-1, 4))
        assert torch.equal(of_groups.any(-1), of_groups.all(-1))


@pytest.mark.parametrize("broken", ["rule", "share"])
def test_the_comparison_notices_another_rule(monkeypatch, broken):
    """Breaks it on purpose: every step is taken, or a row that stays goes on with whole steps."""
    if broken == "rule":
        monkeypatch.setattr(acceptance, "is_taken", lambda fall: fall == fall)
    else:
        right = Acceptance.decide

        def forgets(self, *arguments):
            taken = right(self, *arguments)
            self.shrunk = torch.ones_like(self.shrunk)
            return taken

        monkeypatch.setattr(Acceptance, "decide", forgets)
    with pytest.raises(AssertionError):
        compare(*build(**accepting("mirror_from_zeros", "full")), num_steps=4)


@pytest.mark.parametrize(
    "case", ["mirror", "workspace_with_momentum_damping_and_decay", "encoded_again", "time_embed"]
)
def test_thinking_decides_as_training_does(case, decisions):
    """Without being asked to, and evaluation too: the same states and the same number of steps."""
    model, observed, targets = build(**accepting(case, "full"))
    ids = torch.arange(B)
    output = model.eval()(
        observed,
        targets,
        sample_ids=ids,
        source=NoiseSource(model.config.train.seed, 0),
        keep_state=torch.float64,
    )
    taken = torch.stack(decisions)
    assert some_are_taken(decisions)
    seed = model.config.train.seed
    noise = SequenceSampler(model, seed, ids, S)
    function = SequenceEnergy(model, model.embed_observed(observed))
    x = noise.initial(None)
    thought = think(model, function, x, ThinkingConfig(seed=seed), noise=noise)
    if model.config.state.initial == "zeros":  # evaluation's numbers have an address of their own
        torch.testing.assert_close(thought.state, output.state, rtol=1e-9, atol=1e-10)
        assert torch.equal(thought.accepted, taken.sum(0))
    assert 0 < thought.accepted.sum() < thought.steps.sum()


def test_each_number_of_steps_is_seen_in_one_pass():
    model, observed, targets = build(**accepting("workspace", "full"))
    batch = Instances(torch.arange(B), observed, targets)
    seen = {}
    see_answers(model.eval(), batch, [1, 3], lambda n, logits: seen.update({n: logits.clone()}))
    for answer in answers(model, batch, [1, 3]):
        assert torch.equal(seen[answer.num_steps], answer.logits)


@pytest.mark.parametrize(
    "refinement, said",
    [
        ({}, "accept is lower with refinement.update probabilities"),
        ({"update": "mirror", "noise": 0.1}, "accept is lower with refinement.noise 0.1"),
        ({"update": "mirror", "state_clamp": 2.0}, "with refinement.state_clamp 2.0"),
        ({"update": "mirror", "candidates": 4}, "with refinement.candidates 4"),
        ({"update": "mirror", "compile": True}, "with refinement.compile"),
    ],
)
def test_what_cannot_stay_is_refused(refinement, said):
    with pytest.raises(ConfigError, match=said):
        config_from_dict({"refinement": {"accept": "lower"} | refinement})
