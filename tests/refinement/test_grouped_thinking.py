"""Thinking on sequences of groups: the cache grows by groups, a candidate is a whole group, and its
rows stop and win together.
"""

import pytest
import torch
from test_grouped_refinement import GRID, WIDE, V, build

from ebwm_scale.core.errors import UserError
from ebwm_scale.inference.energy_functions import SequenceEnergy
from ebwm_scale.inference.generation import Session, continue_texts
from ebwm_scale.inference.initial_states import SequenceSampler
from ebwm_scale.inference.scoring import last_states
from ebwm_scale.inference.thinking import ThinkingConfig, lowest, think
from ebwm_scale.model import closed_form, kv_cache

CASES = {
    "plain": {},
    "grid": {
        "data": GRID,
        "model": {
            "num_kv_heads": 1,
            "predicted_input": "anchored",
            "predicted_layers": 1,
            "energy_head": ["linear", "quadratic", "bilinear", "context"],
        },
    },
    "adaln": {"model": {"conditioning": "adaln", "predicted_input": "anchored"}},
    "reach": {"data": WIDE, "model": {"reach": 1, "num_kv_heads": 1}},
    "reach, context alone": {"data": WIDE, "model": {"reach": 1, "own_keys": False}},
    "no own keys": {"data": GRID, "model": {"own_keys": False, "num_kv_heads": 1}},
    "frames": {"kind": "embedding", "state": {"initial": "most_recent"}},
}


def model_of(name, **more):
    options = {**CASES[name], **more}
    data = {**options.get("data", {})}
    data["context_length"] = 3 * data.get("group_size", 3)
    model, observed, targets = build(**{**options, "data": data}, num_groups=3)
    return model.eval(), observed, targets


def gradients(name, num_groups=(2, 1, 3), num_candidates=2):
    """(closed form on the cache, autograd over the whole uncached network) of dE / d candidates,
    each (prompts, K P, D), of prompts of different numbers of groups.
    """
    model, observed, _ = model_of(name)
    network = model.network
    size = network.group_size
    landscape = network.num_landscapes - 1
    lengths = [size * n for n in num_groups]
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, num_candidates * size, 16, generator=generator, dtype=torch.float64)
    cache = kv_cache.LandscapeKVCache(network, 3 * size, landscape)
    cache.prefill(model.embed_observed(observed).detach(), torch.tensor(lengths))
    energy, closed = cache.energy_and_gradient(x, landscape)
    assert torch.equal(energy, cache.energy(x, landscape))
    plain = torch.zeros_like(x)
    for b, length in enumerate(lengths):
        seen = model.embed_observed(observed[b : b + 1, :length]).detach()
        context = network.encode_context(seen, landscape)
        for k in range(num_candidates):
            own = slice(k * size, (k + 1) * size)
            rows = torch.zeros(1, length, 16, dtype=torch.float64)
            rows[0, -size:] = x[b, own]
            rows.requires_grad_()
            last = network.energy(rows, context, landscape)[0, -size:]
            torch.testing.assert_close(last, energy[b, own], rtol=1e-12, atol=1e-12)
            plain[b, own] = torch.autograd.grad(last.sum(), rows)[0][0, -size:]
    return closed, plain


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_gradient_of_a_group_is_that_of_plain_autograd(name):
    closed, plain = gradients(name)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(closed, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("piece", ["_of_own", "_to_own", "own_scores"])
def test_a_closed_form_that_is_a_little_wrong_for_groups_is_seen(piece, monkeypatch):
    right = getattr(closed_form, piece)
    backward = kv_cache.block_backward

    def wrong(*arguments):
        monkeypatch.setattr(closed_form, piece, lambda *a: right(*a) * (1 + 1e-6))
        try:
            return backward(*arguments)
        finally:
            monkeypatch.setattr(closed_form, piece, right)

    monkeypatch.setattr(kv_cache, "block_backward", wrong)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*gradients("plain"), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*CASES, "baseline"])
def test_a_session_of_groups_predicts_what_the_whole_sequence_says(name):
    """Prompts of one and two groups, then one more: as without a cache, group by group."""
    more = {}
    if name == "baseline":
        name, more = "plain", {"model": {"kind": "baseline"}}
    model, observed, _ = model_of(name, **more)
    size = model.network.group_size
    config = ThinkingConfig(seed=3)
    ids = torch.zeros(2, dtype=torch.int64)  # as last_states draws
    prompts = [observed[0, :size], observed[1, : 2 * size]]
    session = Session(model, prompts, config, sample_ids=ids)
    for _ in range(2):
        prediction = session.predict()
        assert prediction.state.shape == (2, size, model.state_size)
        for row, state in zip(session.rows, prediction.state):
            with torch.no_grad():
                uncached = last_states(model, row[None], config)[0, -size:]
            torch.testing.assert_close(state.double(), uncached.double(), rtol=1e-5, atol=1e-6)
        session.accept(torch.stack([observed[0, size : 2 * size], observed[1, 2 * size :]]))
    assert session.rows[1].shape[0] == size  # it outgrew the context: one of three groups is left


def thought_on(model, observed, **options):
    config = ThinkingConfig(**options)
    noise = SequenceSampler(model, 3, torch.arange(len(observed)), observed.shape[1])
    function = SequenceEnergy(model, model.embed_observed(observed))
    return think(model, function, noise.initial(None), config, noise=noise)


def test_the_rows_of_a_group_stop_and_go_back_together():
    model, observed, _ = model_of("grid", refinement={"update": "mirror", "step_size": 9.0})
    thought = thought_on(model, observed, num_steps=6, accept_only_if_lower=True, tolerance=1e-3)
    for of_rows in (thought.steps, thought.accepted, thought.energy):
        of_groups = of_rows.unflatten(1, (-1, 4))
        assert torch.equal(of_groups, of_groups[..., :1].expand_as(of_groups))
    assert len(thought.steps.unique()) > 1  # groups differ
    assert (thought.trace.diff(dim=0) <= 1e-12).all()


def test_the_best_of_several_starts_is_a_whole_group():
    model, observed, _ = model_of("plain")
    prompts = [observed[0], observed[1]]
    several = Session(model, prompts, ThinkingConfig(seed=3, num_starts=4)).predict()
    state, energy, start = lowest(several.thought, 3)
    assert torch.equal(state, several.state) and several.thought.state.shape == (2, 12, V)
    for b, best in enumerate(start.tolist()):
        assert energy[b] == several.thought.energy[b].min()
        own = slice(3 * best, 3 * best + 3)
        assert torch.equal(several.thought.state[b, own], state[b])


def test_what_is_no_whole_group_is_refused():
    model, observed, _ = model_of("plain")
    with pytest.raises(UserError, match="a prompt has 4 positions.*groups of 3"):
        Session(model, [observed[0, :4]])
    with pytest.raises(UserError, match="answers and not texts"):
        next(continue_texts(model, [observed[0]], 3))
