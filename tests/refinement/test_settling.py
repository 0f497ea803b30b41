"""Thinking stops where a step changes no probability by more than `settled`: at that state and not
before, for all rows of a group together, and by the rows that are asked for.
"""

import pytest
import torch
from plain_autograd import build as build_positions
from test_grouped_refinement import GRID
from test_grouped_refinement import build as build_groups

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.evaluation.answers import Instances, answers, see_answers
from ebwm_scale.inference import thinking
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, think

CASES = {
    "one position at a time": None,
    "grids": {"data": GRID},
    "workspace": {
        "data": GRID,
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5},
    },
    "frames": {"kind": "embedding", "state": {"initial": "most_recent"}},
}
MOST = 9


def build(case="grids"):
    options = CASES[case]
    model, observed, targets = build_positions() if options is None else build_groups(**options)
    return model.eval(), observed, targets


def thought(model, observed, asked=None, **options):
    config = ThinkingConfig(seed=3, **options)
    noise = SequenceSampler(model, 3, torch.arange(len(observed)), observed.shape[1])
    function = SequenceEnergy(model, model.embed_observed(observed))
    frames = observed if model.config.state.kind == "embedding" else None
    return think(model, function, noise.initial(frames), config, noise=noise, asked=asked)


def after_each(model, observed):
    """What each row predicts after 0, 1, .. MOST steps, (MOST + 1, B, K, size)."""
    states = [thought(model, observed, num_steps=n).state for n in range(1, MOST + 1)]
    noise = SequenceSampler(model, 3, torch.arange(len(observed)), observed.shape[1])
    frames = observed if model.config.state.kind == "embedding" else None
    return torch.stack([noise.initial(frames).to(states[0].dtype), *states])


def first_settled(model, states, settled, asked):
    """By hand: the step of each row after which its group moves no more."""
    said = states if model.config.state.kind == "embedding" else states.softmax(-1)
    change = (said[1:] - said[:-1]).abs().amax(-1) * asked
    size = model.network.group_size
    steps = torch.zeros(change.shape[1:], dtype=torch.int64)
    for row in range(change.shape[1]):
        for place in range(change.shape[2]):
            first = place // size * size
            of_group = change[:, row, first : first + size].amax(1)
            still = (of_group <= settled).nonzero()
            steps[row, place] = int(still[0]) + 1 if len(still) else MOST
    return steps


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_stop_at_the_first_step_that_hardly_changes_them(case, some):
    model, observed, _ = build(case)
    states = after_each(model, observed)
    asked = torch.ones(states.shape[1:3], dtype=torch.bool)
    if some:
        asked[:, ::2] = False
    changes = (states[1:] - states[:-1]).abs()
    if model.config.state.kind == "vocabulary":
        changes = (states.softmax(-1)[1:] - states.softmax(-1)[:-1]).abs()
    settled = float(changes.amax(-1).median())
    expected = first_settled(model, states, settled, asked)
    got = thought(model, observed, asked if some else None, num_steps=MOST, settled=settled)
    assert torch.equal(got.steps, expected)
    assert 1 <= int(expected.min()) < MOST and len(expected.unique()) > 1
    rows = torch.arange(expected.shape[0])[:, None]
    places = torch.arange(expected.shape[1])
    at_stop = states[expected, rows, places]
    torch.testing.assert_close(got.state, at_stop, rtol=1e-10, atol=1e-12)


def test_a_change_of_nothing_is_asked_for_by_zero():
    model, observed, _ = build()
    plain = thought(model, observed, num_steps=4)
    never = thought(model, observed, num_steps=4, settled=0.0)
    assert torch.equal(never.steps, plain.steps)
    torch.testing.assert_close(never.state, plain.state, rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match="settled is -0.1: must be 0 or more"):
        ThinkingConfig(settled=-0.1)


def test_rows_that_stop_one_by_one_within_a_group_are_seen(monkeypatch):
    """Breaks the group on purpose."""
    model, observed, _ = build()
    states = after_each(model, observed)
    said = states.softmax(-1)
    settled = float((said[1:] - said[:-1]).abs().amax(-1).median())
    expected = first_settled(model, states, settled, torch.ones(states.shape[1:3]))
    monkeypatch.setattr(thinking, "_largest_of_group", lambda values, group_size: values)
    got = thought(model, observed, num_steps=MOST, settled=settled)
    assert not torch.equal(got.steps, expected)


@pytest.mark.parametrize("model", [{}, {"kind": "baseline", "loops": 2}])
def test_answers_in_one_pass_are_those_of_each_number_of_steps_alone(model):
    built, observed, targets = build_groups(model=model, data=GRID)
    batch = Instances(torch.arange(len(observed)), observed, targets)
    seen = {}
    see_answers(built.eval(), batch, [1, 3, 4], lambda n, logits: seen.update({n: logits.clone()}))
    alone = {answer.num_steps: answer.logits for answer in answers(built, batch, [1, 3, 4])}
    assert list(seen) == list(alone) == [1, 3, 4]
    for number, logits in alone.items():
        assert torch.equal(seen[number], logits)
