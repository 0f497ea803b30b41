"""Damped steps are exact in float64: alpha, beta and decay of step i = 1, 2, .. over i ** p, or
those of step i > k times (k / i) ** p.
"""

import pytest
from plain_autograd import build, compare

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.config.schema import RefinementConfig
from ebwm_scale.core.errors import ConfigError
from ebwm_scale.refinement import step_plan
from ebwm_scale.refinement.step_plan import plan_steps

WORKSPACE = {
    "model": {"energy_head": ["linear", "bilinear"], "predicted_input": "anchored"},
    "state": {"workspace": 6, "map_scale": 7.0, "initial": "zeros"},
    "refinement": {"step_size": 0.2, "update": "mirror"},
}
CASES = {
    "probabilities": {},
    "logits": {"refinement": {"update": "logits"}},
    "mirror_from_zeros": {"state": {"initial": "zeros"}, "refinement": {"update": "mirror"}},
    "workspace": WORKSPACE,
    "workspace_with_decay": WORKSPACE | {"refinement": WORKSPACE["refinement"] | {"decay": 0.3}},
    "random_and_clamped": {
        "refinement": {"step_size_random_factor": 2.0, "noise": 0.5, "change_clamp": 4.0}
    },
    "block_recomputed_in_tiles": {"refinement": {"recompute": "block", "tile_rows": 3}},
    "encoded_again": {"state": {"workspace": 6}, "refinement": {"reencode": "all"}},
    "frames": {"kind": "embedding", "refinement": {"decay": 0.2}},
    "after_the_second": WORKSPACE
    | {"refinement": WORKSPACE["refinement"] | {"damping_after": 2, "decay": 0.3}},
}


@pytest.mark.parametrize("graph", ["detach", "truncate", "full"])
@pytest.mark.parametrize("case", CASES)
def test_damped_steps_are_exact(case, graph):
    refinement = {"damping": 1.5, "num_steps": 3, "graph": graph}
    options = dict(CASES[case])
    options["refinement"] = options.get("refinement", {}) | refinement
    compare(*build(**options), num_steps=3)


def test_damped_steps_are_exact_where_the_graph_goes_through_the_last_ones():
    refinement = {"damping": 1.0, "num_steps": 4, "graph": "full", "backprop_steps": 2}
    options = dict(WORKSPACE)
    options["refinement"] = WORKSPACE["refinement"] | refinement
    compare(*build(**options), num_steps=4)


@pytest.mark.parametrize("case", ["mirror_from_zeros", "workspace", "after_the_second"])
def test_the_comparison_notices_a_step_that_is_not_damped(monkeypatch, case):
    monkeypatch.setattr(step_plan, "step_scale", lambda config, index: 1.0)
    options = dict(CASES[case])
    refinement = {"damping": 1.0, "num_steps": 3, "graph": "full"}
    options["refinement"] = options["refinement"] | refinement
    with pytest.raises(AssertionError):
        compare(*build(**options), num_steps=3)


def test_steps_shorten_by_their_number_whatever_their_count():
    config = RefinementConfig(damping=1.0)
    for count in (2, 5):
        plan = plan_steps(config, range(count), training=True)
        assert [step.scale for step in plan] == [1 / (i + 1) for i in range(count)]
    assert {step.scale for step in plan_steps(RefinementConfig(), range(5), training=True)} == {1.0}


def test_the_first_steps_keep_their_length_and_those_beyond_them_shorten():
    config = RefinementConfig(damping=2.0, damping_after=3)
    plan = plan_steps(config, range(6), training=False)
    assert [step.scale for step in plan] == [1, 1, 1, (4 / 3) ** -2, (5 / 3) ** -2, 0.25]


def test_with_all_trained_steps_at_full_length_training_does_not_know_of_damping():
    damped = RefinementConfig(num_steps=3, damping=3.0, damping_after=3)
    equal = RefinementConfig(num_steps=3)
    assert plan_steps(damped, range(3), training=True) == plan_steps(equal, range(3), training=True)


@pytest.mark.parametrize("given", [{"damping": -1.0}, {"damping": 1.0, "damping_after": 0}])
def test_a_damping_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match=r"refinement\.damping"):
        config_from_dict({"refinement": given})


def test_steps_that_damping_shall_spare_are_refused_where_nothing_is_damped():
    with pytest.raises(ConfigError, match=r"damping_after is 3 with refinement\.damping 0"):
        config_from_dict({"refinement": {"damping_after": 3}})
