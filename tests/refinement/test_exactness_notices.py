"""What the comparison of test_exactness.py would notice: each mechanism broken on purpose."""

import dataclasses

import pytest
import torch
from plain_autograd import CONTENT, B, build, compare
from torch.nn import functional as F

from ebwm_scale.model import attention, energy_head, states
from ebwm_scale.model.energy_transformer import EnergyTransformer
from ebwm_scale.refinement import block_recompute
from ebwm_scale.refinement import loop as refinement_loop
from ebwm_scale.refinement.noise import NoiseSource


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_comparison_notices_a_workspace_that_loses_a_gradient(monkeypatch, recompute):
    """Breaks it on purpose: its numbers stay right, dE/dw has no graph."""
    right = refinement_loop.inner_gradient

    def broken(*arguments, **options):
        energy, gradient, of_workspace = right(*arguments, **options)
        return energy, gradient, of_workspace.detach()

    monkeypatch.setattr(refinement_loop, "inner_gradient", broken)
    model, observed, targets = build(
        model={"energy_head": CONTENT},
        state={"workspace": 6},
        refinement={"graph": "full", "recompute": recompute},
    )
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


def test_the_comparison_notices_an_inner_gradient_that_runs_through_the_context(monkeypatch):
    """Breaks the candidate's own copy: energies of later rows would tell earlier ones the future.

    One layer, of which only keys and values are encoded: the observed stream's attention has no
    second order and would notice by itself.
    """
    model, observed, targets = build(model={"num_layers": 1}, refinement={"reencode": "all"})
    monkeypatch.setattr(torch.Tensor, "view_as", lambda self, other: self)
    sample_ids, source = torch.arange(B), NoiseSource(5, 6)
    broken = model(observed, targets, sample_ids=sample_ids, source=source).loss_per_step
    monkeypatch.undo()
    right = model(observed, targets, sample_ids=sample_ids, source=source).loss_per_step
    assert torch.equal(broken[0], right[0])
    assert not torch.allclose(broken[1], right[1], rtol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("lost", ["map", "predictions", "front"])
def test_the_comparison_notices_an_encoding_that_loses_a_gradient(monkeypatch, lost, recompute):
    """Breaks each way into a context that is encoded again: its numbers stay right."""
    model, observed, targets = build(refinement={"reencode": 1, "recompute": recompute})
    right = EnergyTransformer.add_predictions
    feedback = model.network.feedback

    def broken(self, stream, embedded, workspace):
        if lost == "front":
            stream = stream.map(torch.Tensor.detach)
        if lost == "predictions":
            embedded = embedded.detach()
        return right(self, stream, embedded, workspace)

    if lost == "map":
        monkeypatch.setattr(feedback, "forward", lambda e: F.linear(e, feedback.weight.detach()))
    monkeypatch.setattr(EnergyTransformer, "add_predictions", broken)
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


@pytest.mark.parametrize("lost", ["input", "gradient"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_comparison_notices_a_further_reading_that_loses_something(
    monkeypatch, lost, recompute
):
    """The input that is added again, or the gradient of the pass before."""
    model, observed, targets = build(model={"loops": 2}, refinement={"recompute": recompute})
    right = EnergyTransformer.start

    def broken(self, observed, *rest):
        stream = right(self, observed, *rest)
        if lost == "input":
            return dataclasses.replace(stream, rows=stream.rows - observed)
        return dataclasses.replace(stream, rows=observed + (stream.rows - observed).detach())

    monkeypatch.setattr(EnergyTransformer, "start", broken)
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


def test_the_comparison_notices_a_clamp_that_lets_gradients_through(monkeypatch):
    from ebwm_kernels.vocabulary import autograd as vocabulary

    right = vocabulary._step
    monkeypatch.setattr(vocabulary, "_step", lambda *a: (right(*a)[0], None))
    with pytest.raises(AssertionError):
        compare(*build(refinement={"change_clamp": 4.0}))


@pytest.mark.parametrize("checkpoint", ["none", "step", "block"])
def test_the_comparison_notices_an_inner_gradient_without_graph(monkeypatch, checkpoint):
    """Breaks the mechanism on purpose: the loss stays right, the parameter gradients do not."""
    right = refinement_loop.inner_gradient

    def broken(*arguments, **options):
        energy, gradient, of_workspace = right(*arguments, **options)
        return energy, gradient.detach() + 0 * energy.sum(), of_workspace

    monkeypatch.setattr(refinement_loop, "inner_gradient", broken)
    with pytest.raises(AssertionError):
        compare(*build(refinement={"recompute": checkpoint}))


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("term", ["quadratic", "bilinear", "context"])
def test_the_comparison_notices_a_term_whose_parameter_has_no_gradient(
    monkeypatch, term, recompute
):
    """Breaks a head on purpose: its energies stay right."""
    model, observed, targets = build(
        model={"energy_head": ["linear", term], "predicted_layers": 1},
        refinement={"recompute": recompute},
    )
    linear = getattr(model.network.content, term)
    monkeypatch.setattr(linear, "forward", lambda x: F.linear(x, linear.weight.detach()))
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_comparison_notices_a_direct_term_that_pulls_as_a_constant(monkeypatch, recompute):
    """Breaks the head on purpose: its energies stay right."""
    monkeypatch.setattr(energy_head.ContentTerms, "pull", lambda self, n, readout: n.detach())
    with pytest.raises(AssertionError):
        compare(
            *build(model={"energy_head": ["linear", "direct"]}, refinement={"recompute": recompute})
        )


def test_the_comparison_notices_queries_that_lose_a_gradient(monkeypatch):
    """Breaks attention to the context alone on purpose: its outputs stay right."""
    model, observed, targets = build(model={"own_keys": False})
    right = attention.causal_attention

    def broken(q, *rest, **options):
        return right(q.detach(), *rest, **options)

    monkeypatch.setattr(attention, "causal_attention", broken)
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


@pytest.mark.parametrize("lost", ["anchor", "readout"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_comparison_notices_a_context_that_loses_a_gradient(monkeypatch, lost, recompute):
    model, observed, targets = build(
        model={
            "energy_head": ["linear", "context"],
            "predicted_layers": 1,
            "predicted_input": "anchored",
        },
        refinement={"recompute": recompute},
    )
    right = model.network.context_of

    def broken(stream):
        context = right(stream)
        return dataclasses.replace(context, **{lost: getattr(context, lost).detach()})

    monkeypatch.setattr(model.network, "context_of", broken)
    with pytest.raises(AssertionError):
        compare(model, observed, targets)


def test_the_comparison_notices_a_uniform_start_that_forgets_the_map(monkeypatch):
    right = states.VocabularyState.embed_zeros

    def broken(self, shape):
        vectors = right(self, shape).vectors
        return right(self, shape)._replace(vectors=vectors.detach() + 0 * vectors)

    monkeypatch.setattr(states.VocabularyState, "embed_zeros", broken)
    with pytest.raises(AssertionError):
        compare(*build(state={"initial": "zeros", "map_scale": 7.0}))


def test_the_comparison_notices_a_block_that_does_not_bend(monkeypatch):
    """Breaks a sweep on purpose: the last block is taken for linear on the way up."""
    right = block_recompute._BlockwiseStep.backward
    monkeypatch.setattr(
        block_recompute._BlockwiseStep,
        "backward",
        lambda self, streams, gradients, *rest: right(
            self, streams, [*gradients[:-1], torch.zeros_like(gradients[-1])], *rest
        ),
    )
    with pytest.raises(AssertionError):
        compare(*build(refinement={"recompute": "block"}))


def test_the_comparison_notices_a_step_that_is_not_back_propagated(monkeypatch):
    """Breaks the gradients taken step by step: the loss stays right, a term is missing."""
    right, calls = refinement_loop.back_propagate, []
    monkeypatch.setattr(
        refinement_loop,
        "back_propagate",
        lambda pending, contexts: (
            calls.append(1) or (right(pending, contexts) if len(calls) != 1 else pending.clear())
        ),
    )
    with pytest.raises(AssertionError):
        compare(*build())
