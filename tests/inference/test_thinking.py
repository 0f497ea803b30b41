"""Thinking with a cache is thinking without one; what is rejected stays, what stops has arrived,
and the observed stream is computed once.
"""

import dataclasses

import pytest
import torch
from thinking_cases import CASES, LENGTH, SEED, TEXT, VIDEO, model_of, prompt_of, uncached

from ebwm_scale.core.errors import ConfigError, UserError
from ebwm_scale.inference.energy_functions import CachedEnergy, SequenceEnergy
from ebwm_scale.inference.generation import (
    Sampling,
    Session,
    candidate_energies,
    continue_states,
    continue_texts,
)
from ebwm_scale.inference.initial_states import NextPositionSampler, SequenceSampler
from ebwm_scale.inference.thinking import ThinkingConfig, lowest, think
from ebwm_scale.model import kv_cache
from ebwm_scale.model.workspace import WorkspaceState


@pytest.mark.parametrize("case", CASES)
def test_cached_and_uncached_predictions_agree_to_1e_10_while_the_prompt_grows(case):
    model = model_of(CASES[case])
    prompts = [prompt_of(model, length, seed=length) for length in (4, 1, 6)]
    session = Session(model, prompts, ThinkingConfig(seed=SEED))
    for step in range(3):
        got = session.predict().state
        for row, prompt in enumerate(prompts):
            expected = uncached(model, prompt, sample_id=row)
            assert torch.allclose(got[row], expected, rtol=1e-10, atol=1e-10), (row, step)
        chosen = got.argmax(-1) if model.config.state.kind == "vocabulary" else got
        prompts = [torch.cat([prompt, new[None]]) for prompt, new in zip(prompts, chosen)]
        session.accept(chosen)


@pytest.mark.parametrize("accept_only_if_lower", [False, True])
@pytest.mark.parametrize("case", ["encoded again", "workspace"])
def test_thinking_over_all_positions_takes_the_best_start_of_the_last(accept_only_if_lower, case):
    """A start is what it is alone, and energies are those of its own context."""
    model = model_of(CASES[case])
    prompts = [prompt_of(model, length, seed=length) for length in (4, 2)]
    config = ThinkingConfig(
        seed=SEED, num_starts=2, num_steps=4, accept_only_if_lower=accept_only_if_lower
    )
    prediction = Session(model, prompts, config).predict()
    thought = prediction.thought
    assert thought.trace.shape == (5, 2, 2) and thought.steps.eq(4).all()
    for row, prompt in enumerate(prompts):
        for start in range(2):
            noise = SequenceSampler(model, SEED, torch.tensor([row]), len(prompt), start)
            alone = think(
                model,
                SequenceEnergy(model, model.embed_observed(prompt[None])),
                noise.initial(None),
                dataclasses.replace(config, num_starts=1),
                noise=noise,
            )
            torch.testing.assert_close(alone.trace[:, 0, -1], thought.trace[:, row, start])
            torch.testing.assert_close(alone.energy[0, -1], thought.energy[row, start])
            torch.testing.assert_close(alone.state[0, -1], thought.state[row, start])
    assert torch.equal(prediction.energy, thought.energy.amin(1))


def test_a_cache_refuses_a_model_whose_contexts_are_encoded_again():
    model = model_of(CASES["encoded again"])
    cache = kv_cache.KVCache(model.network, LENGTH)
    cache.prefill(model.embed_observed(prompt_of(model, 3)[None]), torch.tensor([3]))
    noise = NextPositionSampler(model, SEED, torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="think over the whole sequence"):
        think(model, CachedEnergy(cache), noise.initial(None), ThinkingConfig(), noise=noise)


def test_a_cache_refuses_a_model_with_a_workspace():
    model = model_of(CASES["workspace"])
    cache = kv_cache.KVCache(model.network, LENGTH)
    cache.prefill(model.embed_observed(prompt_of(model, 3)[None]), torch.tensor([3]))
    noise = NextPositionSampler(model, SEED, torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(ValueError, match="think over the whole sequence"):
        think(model, CachedEnergy(cache), noise.initial(None), ThinkingConfig(), noise=noise)


def test_a_rejected_step_leaves_the_workspace_as_it_is(monkeypatch):
    """Every step goes uphill in z alone, so none is accepted: the energy stays the first one."""
    model = model_of(CASES["workspace"])
    prompt = prompt_of(model, 4)
    config = ThinkingConfig(seed=SEED, num_steps=2, accept_only_if_lower=True, step_size=1e-12)
    noise = SequenceSampler(model, SEED, torch.tensor([0]), 4)
    function = SequenceEnergy(model, model.embed_observed(prompt[None]))
    right = WorkspaceState.change
    monkeypatch.setattr(
        WorkspaceState, "change", lambda self, grad, dtype, *_: right(self, grad, dtype, -0.1)
    )
    thought = think(model, function, noise.initial(None), config, noise=noise)
    assert thought.accepted.eq(0).all()
    assert torch.equal(thought.trace[0], thought.energy)


def test_thinking_that_forgets_the_workspace_is_seen(monkeypatch):
    model = model_of(CASES["workspace"])
    prompt = prompt_of(model, 4)
    right = uncached(model, prompt)
    monkeypatch.setattr(WorkspaceState, "update", lambda self, z, *rest: z)
    got = Session(model, [prompt], ThinkingConfig(seed=SEED)).predict().state[0]
    assert not torch.allclose(got, right, atol=1e-6)


def test_thinking_that_forgets_to_encode_again_is_seen(monkeypatch):
    model = model_of(CASES["encoded again"])
    prompt = prompt_of(model, 4)
    monkeypatch.setattr(SequenceEnergy, "begin_step", lambda *_: False)
    got = Session(model, [prompt], ThinkingConfig(seed=SEED)).predict().state[0]
    assert not torch.allclose(got, uncached(model, prompt), atol=1e-6)


@pytest.mark.parametrize("lost", ["input", "last pass"])
def test_a_cache_that_reads_otherwise_than_training_is_seen(monkeypatch, lost):
    model = model_of(CASES["looped"])
    prompt = prompt_of(model, 4)
    right = uncached(model, prompt)
    if lost == "input":
        cache = kv_cache.LandscapeKVCache
        monkeypatch.setattr(cache, "_begins_again", lambda self, index: False)
    session = Session(model, [prompt], ThinkingConfig(seed=SEED))
    if lost == "last pass":
        for context in session.cache.contexts.values():
            context.first_predicted -= len(model.network.layers)
    assert not torch.allclose(session.predict().state[0], right, atol=1e-6)


@pytest.mark.parametrize("state", [TEXT, VIDEO])
def test_a_baseline_with_a_cache_agrees_too(state):
    model = model_of(
        state, model={"kind": "baseline", "vocabulary_size": 31 if state is TEXT else None}
    )
    prompts = [prompt_of(model, length, seed=length) for length in (4, 2)]
    session = Session(model, prompts)
    for _ in range(3):
        got = session.predict().state
        for row, prompt in enumerate(prompts):
            assert torch.allclose(
                got[row],
                model.output(model.network(model.embed_observed(prompt[None])))[0, -1].float(),
                atol=1e-6,
            )
        chosen = got.argmax(-1) if state is TEXT else got.double()
        prompts = [torch.cat([prompt, new[None]]) for prompt, new in zip(prompts, chosen)]
        session.accept(chosen)


def test_a_cache_that_is_wrong_is_seen():
    model = model_of(TEXT)
    session = Session(model, [prompt_of(model, 5)], ThinkingConfig(seed=SEED))
    session.cache.get(0).lengths += 1  # one entry too many
    assert not torch.allclose(
        session.predict().state[0], uncached(model, prompt_of(model, 5)), atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precisions_follow_float64(dtype):
    model = model_of(CASES["adaln"])
    prompt, x = (
        prompt_of(model, 5),
        torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    )
    found = []
    for d in (torch.float64, dtype):
        cache = kv_cache.LandscapeKVCache(model.to(d).network, LENGTH, 0)
        cache.prefill(model.embed_observed(prompt[None]), torch.tensor([5]))
        found.append(cache.energy_and_gradient(x.to(d), 0)[1].double())
    assert (found[1] - found[0]).norm() < {torch.bfloat16: 0.05, torch.float32: 1e-5}[
        dtype
    ] * found[0].norm()


def test_the_observed_stream_is_computed_once_whatever_the_steps_and_starts(monkeypatch):
    model = model_of(TEXT)
    calls = []
    for layer in model.network.layers:
        real = layer.keys_values
        monkeypatch.setattr(
            layer, "keys_values", lambda *a, real=real: calls.append(a[0].shape[1]) or real(*a)
        )
    append = kv_cache.LandscapeKVCache.append
    monkeypatch.setattr(
        kv_cache.LandscapeKVCache,
        "append",
        lambda self, observed: calls.append("one more") or append(self, observed),
    )
    session = Session(
        model,
        [prompt_of(model, 4), prompt_of(model, 2)],
        ThinkingConfig(num_steps=7, num_starts=3, accept_only_if_lower=True),
    )
    session.predict(), session.predict()
    session.accept(torch.tensor([1, 2]))
    session.predict()
    assert calls == [4, 4, 4, "one more"] and session.positions_computed == 6 + 2


@pytest.mark.parametrize("case", ["default", "time_embed", "logits", "video", "video, most recent"])
def test_accept_only_if_lower_never_raises_an_energy_and_never_changes_a_rejected_state(case):
    model = model_of(
        CASES[case],
        refinement={"step_size": 400.0, "landscapes": "one", **CASES[case].get("refinement", {})},
    )
    prompts = [prompt_of(model, 5, seed=s) for s in range(6)]
    config = ThinkingConfig(num_steps=6, accept_only_if_lower=True, seed=SEED, num_starts=2)
    session = Session(model, prompts, config)
    states = [session.predict()]
    thought = states[0].thought
    assert (thought.trace[1:] <= thought.trace[:-1] + 1e-12).all() and torch.allclose(
        thought.trace[-1], thought.energy
    )
    if (
        case != "video, most recent"
    ):  # a step of 400 is often too long; there, the energy falls without end
        assert (thought.accepted < thought.steps).any()
    # One step longer: where it was rejected the state is bit for bit the same.
    longer = Session(model, prompts, dataclasses.replace(config, num_steps=7)).predict().thought
    same = longer.accepted == thought.accepted
    assert torch.equal(longer.state[same], thought.state[same])
    assert (~same).any() or same.all()
    assert (longer.energy[~same] < thought.energy[~same]).all()


def test_langevin_noise_moves_and_rejection_undoes_it():
    model = model_of(TEXT)
    config = ThinkingConfig(num_steps=4, noise=5.0, accept_only_if_lower=True, step_size=1e-3)
    thought = (
        Session(model, [prompt_of(model, 5, seed=s) for s in range(6)], config).predict().thought
    )
    start = NextPositionSampler(model, config.seed, torch.arange(6), torch.full((6,), 4)).initial(
        None
    )
    unmoved = thought.accepted == 0
    assert (
        unmoved.any()
        and torch.equal(thought.state[unmoved], start[unmoved])
        and (thought.trace[1:] <= thought.trace[:-1] + 1e-12).all()
    )
    plain = Session(model, [prompt_of(model, 5)], ThinkingConfig(num_steps=4)).predict().state
    noisy = (
        Session(model, [prompt_of(model, 5)], ThinkingConfig(num_steps=4, noise=1.0))
        .predict()
        .state
    )
    assert not torch.allclose(plain, noisy)


@pytest.mark.parametrize("case", ["default", "video"])
def test_early_stopping_saves_steps_and_gives_what_running_on_gives_within_its_tolerance(case):
    model = model_of(CASES[case], refinement={"step_size": 2.0, "landscapes": "one"})
    prompts = [prompt_of(model, 5, seed=s) for s in range(8)]
    on = (
        Session(model, prompts, ThinkingConfig(num_steps=40, accept_only_if_lower=True, seed=SEED))
        .predict()
        .thought
    )
    tolerance = 1e-3
    stopped = (
        Session(
            model,
            prompts,
            ThinkingConfig(num_steps=40, accept_only_if_lower=True, tolerance=tolerance, seed=SEED),
        )
        .predict()
        .thought
    )
    assert (stopped.steps < 40).any() and (stopped.steps <= on.steps).all()
    taken = stopped.steps[:, 0]
    for row in range(len(prompts)):
        assert torch.equal(
            stopped.trace[: taken[row], row], on.trace[: taken[row], row]
        )  # the same path up to there
        if taken[row] < 40:
            assert (
                stopped.trace[taken[row] - 1, row] - stopped.energy[row] <= tolerance
                and (
                    stopped.trace[1 : taken[row], row]
                    < stopped.trace[: taken[row] - 1, row] - tolerance
                ).all()
            )


@pytest.mark.parametrize("config", [{}, {"num_starts": 3}, {"accept_only_if_lower": True}])
def test_leaving_out_the_final_energy_changes_no_state(config):
    model = model_of(TEXT)
    prompts = [prompt_of(model, 5, seed=s) for s in range(4)]
    measured, lean = (
        Session(model, prompts, ThinkingConfig(seed=SEED, **config), energies=energies).predict()
        for energies in (True, False)
    )
    assert torch.equal(measured.state, lean.state) and torch.equal(
        measured.thought.steps, lean.thought.steps
    )
    assert (lean.energy is None) == (not config) and len(lean.thought.trace) == len(
        measured.thought.trace
    ) - (not config)


def test_of_several_starts_the_lowest_energy_is_kept_and_the_first_is_the_usual_one():
    model = model_of(TEXT)
    prompts = [prompt_of(model, 5, seed=s) for s in range(4)]
    one, four = (
        Session(model, prompts, ThinkingConfig(num_starts=n, seed=SEED)).predict() for n in (1, 4)
    )
    assert torch.allclose(four.thought.state[:, 0], one.state, atol=1e-12) and torch.equal(
        four.energy, four.thought.energy.min(1).values
    )
    assert (four.energy <= one.energy + 1e-12).all() and (four.energy < one.energy).any()
    state, energy, start = lowest(four.thought)
    assert torch.equal(state, four.thought.state[torch.arange(4), start])


@pytest.mark.parametrize("case", ["default", "time_embed", "video"])
def test_every_position_of_a_sequence_at_once_is_each_prefix_on_its_own(case):
    model = model_of(CASES[case])
    prompt, config = (
        prompt_of(model, 6),
        ThinkingConfig(num_steps=3, accept_only_if_lower=True, tolerance=1e-6, seed=SEED),
    )
    noise = SequenceSampler(model, config.seed, torch.tensor([0]), 6)
    score = SequenceEnergy(model, model.embed_observed(prompt[None]))
    whole = think(model, score, noise.initial(None), config, noise=noise)
    for t in range(6):
        alone = Session(model, [prompt[: t + 1]], config).predict().thought
        assert (
            torch.allclose(whole.state[0, t], alone.state[0, 0], atol=1e-9)
            and whole.steps[0, t] == alone.steps[0, 0]
        )


def test_a_row_that_fills_the_context_goes_on_with_its_later_half():
    model = model_of(TEXT)
    prompt = prompt_of(model, LENGTH + 5)
    session = Session(model, [prompt], ThinkingConfig(seed=SEED))
    assert torch.equal(session.rows[0], prompt[-LENGTH:])
    session.accept(torch.tensor([3]))
    assert len(session.rows[0]) == LENGTH // 2
    assert torch.allclose(
        session.predict().state[0],
        uncached(model, torch.cat([prompt, torch.tensor([3])])[-(LENGTH // 2) :]),
        atol=1e-10,
    )
    tokens = [int(t) for t, _ in continue_texts(model, [prompt], 30)]
    assert len(tokens) == 30


def test_prompts_are_continued_independently_of_each_other():
    model = model_of(TEXT)
    prompts = [prompt_of(model, n, seed=n) for n in (3, 7)]
    together = [
        t.tolist() for t, _ in continue_texts(model, prompts, 5, config=ThinkingConfig(seed=SEED))
    ]
    assert [t[0] for t in together] == [
        int(t) for t, _ in continue_texts(model, prompts[:1], 5, config=ThinkingConfig(seed=SEED))
    ]


def test_generation_ends_when_every_row_has_ended():
    model = model_of(TEXT)
    first = int(next(continue_texts(model, [prompt_of(model, 3)], 1))[0])
    assert len(list(continue_texts(model, [prompt_of(model, 3)], 9, end=first))) == 1


def test_clips_are_continued_from_their_own_predictions():
    model = model_of(VIDEO)
    prompt = prompt_of(model, 3)
    states = continue_states(model, [prompt], 3, config=ThinkingConfig(seed=SEED))[0]
    grown = prompt
    for state in states:
        assert torch.allclose(state, uncached(model, grown), atol=1e-9)
        grown = torch.cat([grown, state[None]])


def test_candidate_energies_are_the_networks():
    model = model_of(CASES["time_embed"])
    prompt, candidates = prompt_of(model, 4), torch.randn(3, 32, dtype=torch.float64)
    observed = model.embed_observed(prompt.expand(3, -1))
    landscape = model.network.num_landscapes - 1
    expected = model.network.energy(
        candidates[:, None].expand(-1, 4, -1),
        model.network.encode_context(observed, landscape),
        landscape,
    )[:, -1]
    assert torch.allclose(
        candidate_energies(model, prompt, candidates).double(), expected, atol=1e-6
    )


def test_sampling_keeps_what_it_says():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert Sampling().distribution(logits).tolist() == [[1, 0, 0, 0]]
    assert torch.allclose(Sampling(1.0).distribution(logits), logits.exp().double(), atol=1e-6)
    assert torch.allclose(
        Sampling(1.0, top_k=2).distribution(logits),
        torch.tensor([[0.625, 0.375, 0, 0]]).double(),
        atol=1e-6,
    )
    assert torch.allclose(
        Sampling(1.0, top_p=0.7).distribution(logits),
        torch.tensor([[0.625, 0.375, 0, 0]]).double(),
        atol=1e-6,
    )
    assert Sampling(0.5).distribution(logits)[0, 0] > 0.6
    for wrong in (dict(temperature=-1.0), dict(top_k=0), dict(top_p=1.5)):
        with pytest.raises(UserError):
            Sampling(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(num_steps=0),
        dict(num_starts=0),
        dict(noise=-1.0),
        dict(step_size=0.0),
        dict(tolerance=-1.0),
    ],
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ThinkingConfig(**wrong)


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="empty prompt"):
        Session(model_of(TEXT), [torch.zeros(0, dtype=torch.int64)])
