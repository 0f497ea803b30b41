"""What an explorer shows of a text is what `ebwm think` computes: tokens, probabilities and
energies of every step, for every way of thinking.
"""

import dataclasses
import itertools

import pytest
import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.inference.generation import (
    Sampling,
    Session,
    candidate_energies,
    continue_texts,
)
from ebwm_scale.inference.step_by_step import continued, look
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.world_model import WorldModel

VOCABULARY, LENGTH = 40, 12
PROMPT = torch.tensor([3, 14, 15, 9, 2, 6])


def model_of(state=None, refinement=None, data=None, **model):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "width": 32, "num_heads": 2, "vocabulary_size": VOCABULARY}
    config = config_from_dict(
        {
            "model": {**sizes, **model},
            "state": {"initial": "random_noise", **(state or {})},
            "refinement": {"step_size": 5.0, "num_steps": 3, **(refinement or {})},
            "data": {"context_length": LENGTH, **(data or {})},
        }
    )
    return WorldModel(config).double().eval()


WAYS = {
    "as trained": ThinkingConfig(),
    "more steps": ThinkingConfig(num_steps=6, step_size=2.0),
    "starts": ThinkingConfig(num_starts=3),
    "noise": ThinkingConfig(noise=0.3),
    "only if lower": ThinkingConfig(num_steps=5, step_size=400.0, accept_only_if_lower=True),
    "tolerance": ThinkingConfig(num_steps=6, step_size=0.02, tolerance=0.02, num_starts=2),
    "settled": ThinkingConfig(num_steps=6, step_size=0.02, settled=0.01),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_number_is_that_of_thinking(way):
    model, config = model_of(), WAYS[way]
    count = 10 if way == "as trained" else 3  # 10: beyond the context, so that the window moves
    tokens = continued(model, PROMPT, count, config)
    views = look(model, tokens, len(PROMPT), config)
    told = list(continue_texts(model, [PROMPT], count, config=config))
    assert tokens.tolist() == PROMPT.tolist() + [int(token) for token, _ in told]
    assert len(views) == len(told) == count
    session = Session(model, [PROMPT], config)
    for place, view in enumerate(views, start=len(PROMPT)):
        prediction = session.predict()
        thought, start = prediction.thought, int(prediction.start)
        steps = int(thought.steps[0, start])
        assert (view.steps, view.start) == (steps, start)
        assert view.accepted == int(thought.accepted[0, start])
        expected = prediction.state[0].softmax(-1)[view.candidates]
        assert view.moments[-1].probabilities == pytest.approx(expected.tolist(), abs=1e-7)
        energies = [moment.energy for moment in view.moments]
        told_energies = [*thought.trace[:steps, 0, start].tolist(), float(prediction.energy)]
        assert energies == pytest.approx(told_energies, abs=1e-7)
        assert view.candidates[0] == int(prediction.state[0].argmax())
        assert int(tokens[place]) in view.candidates
        session.accept(tokens[place : place + 1])


def test_a_moment_is_where_fewer_steps_end_and_one_more_is_where_one_more_ends():
    model, config = model_of(), ThinkingConfig(num_steps=4)
    tokens = torch.cat([PROMPT, torch.tensor([7])])
    (view,) = look(model, tokens, len(PROMPT), config)
    assert [moment.num_steps for moment in view.moments] == [0, 1, 2, 3, 4]
    for moment in [*view.moments[1:], view.one_more]:
        fewer = dataclasses.replace(config, num_steps=moment.num_steps)
        prediction = Session(model, [PROMPT], fewer).predict()
        expected = prediction.state[0].softmax(-1)[view.candidates].tolist()
        assert moment.probabilities == pytest.approx(expected, abs=1e-7)
    assert view.one_more.num_steps == 5
    assert view.one_more.probabilities != pytest.approx(view.moments[-1].probabilities, abs=1e-4)
    (other,) = look(model, tokens, len(PROMPT), dataclasses.replace(config, seed=1))
    assert other.moments[-1].probabilities != view.moments[-1].probabilities


def test_positions_of_the_prompt_see_what_stands_before_them():
    model = model_of()
    views = look(model, PROMPT, 2)
    assert len(views) == len(PROMPT) - 2
    for place, view in enumerate(views, start=2):
        alone = Session(model, [PROMPT[:place]]).predict().state[0].softmax(-1)
        expected = alone[view.candidates].tolist()
        assert view.moments[-1].probabilities == pytest.approx(expected, abs=1e-7)
        assert int(PROMPT[place]) in view.candidates


def test_a_masked_document_sees_its_own_tokens_alone():
    model = model_of(data={"mask_documents": True, "eos_id": 0})
    text = torch.tensor([3, 14, 0, 9, 2, 6])
    views = look(model, text, 1)
    session = Session(model, [text[:1]])
    for place, view in enumerate(views, start=1):
        expected = session.predict().state[0].softmax(-1)[view.candidates].tolist()
        assert view.moments[-1].probabilities == pytest.approx(expected, abs=1e-7)
        session.accept(text[place : place + 1])


def test_energies_of_certain_tokens_and_the_lines_between_them():
    model = model_of()
    (view,) = look(model, torch.cat([PROMPT, torch.tensor([7])]), len(PROMPT))
    weight = model.state_space().weight
    expected = candidate_energies(model, PROMPT, weight[view.candidates])
    assert view.certain == pytest.approx(expected.tolist(), abs=1e-7)
    assert len(view.lines) == 3
    for number, line in enumerate(view.lines, start=1):
        assert (line.start, line.end) == (view.candidates[0], view.candidates[number])
        assert line.energies[0] == pytest.approx(view.certain[0], abs=1e-7)
        assert line.energies[-1] == pytest.approx(view.certain[number], abs=1e-7)
        middle = (weight[line.start] + weight[line.end])[None] / 2
        half = candidate_energies(model, PROMPT, middle)
        assert line.energies[8] == pytest.approx(float(half), abs=1e-7)


def test_the_strip_counts_the_steps_until_nothing_moves():
    model = model_of()
    views = look(model, PROMPT, 1, ThinkingConfig(num_steps=4, step_size=0.02), settled=0.01)
    counts = []
    for place in range(1, len(PROMPT)):
        rules = ThinkingConfig(num_steps=8, step_size=0.02, settled=0.01)
        thought = Session(model, [PROMPT[:place]], rules).predict().thought
        counts.append(int(thought.steps))
    assert [view.settles_after for view in views] == counts
    assert len(set(counts)) > 1
    assert [view.settles_after for view in look(model, PROMPT, 4)] == [None, None]


def test_models_that_no_cache_holds_are_seen_too():
    model = model_of(refinement={"reencode": "all"})
    config = ThinkingConfig(num_starts=2)
    tokens = torch.cat([PROMPT, torch.tensor([7])])
    (view,) = look(model, tokens, len(PROMPT), config)
    prediction = Session(model, [PROMPT], config).predict()
    expected = prediction.state[0].softmax(-1)[view.candidates].tolist()
    assert view.moments[-1].probabilities == pytest.approx(expected, abs=1e-7)
    assert view.certain is None and view.lines == []


def test_a_baseline_has_one_moment_and_candidates_can_be_asked_for():
    model = model_of(kind="baseline")
    tokens = continued(model, PROMPT, 3)
    views = look(model, tokens, len(PROMPT), also=[[1, 2], [3], []])
    assert {1, 2} <= set(views[0].candidates) and 3 in views[1].candidates
    session = Session(model, [PROMPT])
    for place, view in enumerate(views, start=len(PROMPT)):
        (moment,) = view.moments
        expected = session.predict().state[0].softmax(-1)[view.candidates].tolist()
        assert moment.probabilities == pytest.approx(expected, abs=1e-7)
        assert moment.energy is None and view.one_more is None and view.steps is None
        session.accept(tokens[place : place + 1])


@pytest.mark.parametrize("way", WAYS)
def test_watched_states_end_where_thinking_ends(way):
    model, config = model_of(), WAYS[way]
    seen = []
    prediction = Session(model, [PROMPT], config).predict(lambda n, x: seen.append((n, x.clone())))
    assert [number for number, _ in seen] == list(range(len(seen)))
    assert torch.equal(seen[-1][1], prediction.thought.state)
    if way == "only if lower":
        kept = [torch.equal(a, b) for (_, a), (_, b) in itertools.pairwise(seen)]
        assert kept.count(False) == int(prediction.thought.accepted) < len(kept)


def test_sampled_tokens_are_those_of_thinking():
    model, sampling = model_of(), Sampling(temperature=1.5, seed=4)
    told = continue_texts(model, [PROMPT], 6, sampling=sampling)
    expected = [int(token) for token, _ in told]
    tokens = continued(model, PROMPT, 6, sampling=sampling)
    assert tokens[len(PROMPT) :].tolist() == expected
