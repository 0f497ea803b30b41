"""Thinking and continuing under conditions: the cache holds them behind each frame, and predicts
what the whole sequence says.
"""

import pytest
import torch
from test_conditions import FRAME, GRID, LINE, build

from ebwm_scale.core.errors import UserError
from ebwm_scale.inference.generation import Session, candidate_energies, continue_states
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig
from ebwm_scale.model import kv_cache

WIDE = {
    "num_kv_heads": 1,
    "predicted_input": "anchored",
    "predicted_layers": 1,
    "energy_head": ["linear", "quadratic", "bilinear", "context"],
}
CASES = {
    "frame": {"data": FRAME},
    "line": {"data": LINE, "model": {"conditioning": "adaln", "predicted_input": "anchored"}},
    "grid": {"data": GRID, "model": WIDE, "state": {"initial": "most_recent"}},
    "within_reach": {"data": GRID, "model": {"reach": 0, "num_kv_heads": 1}},
}
BEYOND_CACHE = {
    "encoded_again": {"data": GRID, "refinement": {"reencode": "all"}},
    "workspace": {
        "data": LINE,
        "model": {"energy_head": ["linear", "bilinear"]},
        "state": {"workspace": 5},
    },
    "baseline": {"data": GRID, "model": {"kind": "baseline", "predicts": "change"}},
}


def model_of(options, num_groups=3):
    size = options["data"].get("group_size", 1)
    data = {**options["data"], "context_length": 3 * size}
    model, observed, _, conditions = build(**{**options, "data": data}, num_groups=num_groups)
    return model.eval(), observed, conditions


def part(conditions, row, frames):
    return {name: values[row, frames] for name, values in conditions.items()}


def batched(parts):
    return {name: torch.stack([each[name] for each in parts]) for name in parts[0]}


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_gradient_under_conditions_is_that_of_plain_autograd(name):
    model, observed, conditions = model_of(CASES[name])
    network = model.network
    size, whole = network.group_size, network.context_group
    landscape = network.num_landscapes - 1
    num_groups = [2, 1, 3]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 2 * size, 16, generator=generator, dtype=torch.float64)
    cache = kv_cache.LandscapeKVCache(network, 3 * whole, landscape)
    stream = model.embed_observed(observed, conditions).detach()
    cache.prefill(stream, torch.tensor([n * whole for n in num_groups]))
    energy, closed = cache.energy_and_gradient(x, landscape)
    for b, n in enumerate(num_groups):
        context = network.encode_context(stream[b : b + 1, : n * whole], landscape)
        for k in range(2):
            own = slice(k * size, (k + 1) * size)
            rows = torch.zeros(1, n * size, 16, dtype=torch.float64)
            rows[0, -size:] = x[b, own]
            rows.requires_grad_()
            last = network.energy(rows, context, landscape)[0, -size:]
            torch.testing.assert_close(last, energy[b, own], rtol=1e-12, atol=1e-12)
            plain = torch.autograd.grad(last.sum(), rows)[0][0, -size:]
            assert plain.abs().max() > 1e-3
            torch.testing.assert_close(closed[b, own], plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*CASES, *BEYOND_CACHE])
def test_a_session_under_conditions_predicts_what_the_whole_sequence_says(name):
    """Prompts of one and two frames, then one more: as without a cache, frame by frame."""
    model, observed, conditions = model_of({**CASES, **BEYOND_CACHE}[name])
    size = model.network.group_size
    config = ThinkingConfig(seed=3)
    prompts = [observed[0, :size], observed[1, : 2 * size]]
    given = [part(conditions, 0, slice(0, 1)), part(conditions, 1, slice(0, 2))]
    ids = torch.zeros(2, dtype=torch.int64)  # as last_states draws
    session = Session(model, prompts, config, sample_ids=ids, conditions=given)
    for _ in range(2):
        state = session.predict().state.reshape(2, size, -1)
        for row, own, predicted in zip(session.rows, session.conditions, state):
            with torch.no_grad():
                uncached = last_states(model, row[None], config, batched([own]))[0, -size:]
            torch.testing.assert_close(predicted.double(), uncached.double(), rtol=1e-5, atol=1e-6)
        frames = torch.stack([observed[0, size : 2 * size], observed[1, 2 * size : 3 * size]])
        further = [part(conditions, 0, slice(1, 2)), part(conditions, 1, slice(2, 3))]
        further = {key: values[:, 0] for key, values in batched(further).items()}
        session.accept(frames if size > 1 else frames[:, 0], further)
    # The second row outgrew the context: one of three frames is left, with its own conditions.
    assert session.rows[1].shape[0] == size
    for key, values in session.conditions[1].items():
        torch.testing.assert_close(values, conditions[key][1, 2:3])


def test_a_continuation_goes_where_its_actions_lead():
    model, observed, conditions = model_of(CASES["grid"])
    start = [observed[0, :4]]
    whole = [part(conditions, 0, slice(None))]
    ahead = continue_states(model, start, 3, conditions=whole)
    assert ahead.shape == (1, 12, 7)
    changed = {name: values.clone() for name, values in whole[0].items()}
    changed["action"][1] += 1
    other = continue_states(model, start, 3, conditions=[changed])
    torch.testing.assert_close(other[:, :4], ahead[:, :4])
    assert ((other[:, 4:] - ahead[:, 4:]).abs().amax(-1) > 1e-6).all()


def test_energies_of_candidates_read_the_actions():
    model, observed, conditions = model_of(CASES["grid"])
    given = part(conditions, 0, slice(None))
    candidates = model.state_space().embed(observed[1:2, :8].clone()).vectors[0].detach()
    energies = candidate_energies(model, observed[0], candidates, given)
    given = {**given, "action": given["action"] + 1}
    others = candidate_energies(model, observed[0], candidates, given)
    assert energies.shape == (2,) and ((energies - others).abs() > 1e-6).all()


def test_conditions_that_are_missing_or_too_few_are_refused():
    model, observed, conditions = model_of(CASES["grid"])
    whole = part(conditions, 0, slice(None))
    with pytest.raises(UserError, match="conditions are none; this model continues from a frame"):
        Session(model, [observed[0]])
    with pytest.raises(UserError, match="condition action is given for 2 frames of 3"):
        Session(model, [observed[0]], conditions=[{**whole, "action": whole["action"][:2]}])
    session = Session(model, [observed[0]], conditions=[whole])
    with pytest.raises(UserError, match="conditions are action; this model continues"):
        session.accept(observed[:1, :4], {"action": conditions["action"][:1, 0]})
