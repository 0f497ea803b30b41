"""Gradients of half-precision weights and of the context's keys and values are summed in float32,
over tiles and over the two levels: their error does not grow with the number of addends. Float32
sums are autograd's own, to the bit.
"""

import functools

import pytest
import torch

from ebwm_scale.config.load import config_from_dict
from ebwm_scale.refinement import deferred_backward
from ebwm_scale.refinement.deferred_backward import DeferredBackward, StepwiseBackward
from ebwm_scale.refinement.noise import NoiseSource
from ebwm_scale.world_model import WorldModel

SAMPLES, POSITIONS, VOCABULARY = 2, 64, 13


def summed_in_terms(dtype, num_terms):
    """The gradient that a tensor collects from many terms, each with its own backward."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.rand(num_terms, 50, generator=generator, dtype=torch.float64).bfloat16()
    source = torch.ones(50, dtype=dtype, requires_grad=True)
    shared = DeferredBackward()
    leaf = shared.detach(source * 1)
    for factor in factors:
        (leaf * factor.to(dtype)).sum().backward()
    shared.backward()
    return source.grad.double()


def rounding(num_terms):
    """The largest relative error of a bfloat16 sum, in units of bfloat16's own rounding."""
    exact = summed_in_terms(torch.float64, num_terms)
    difference = (summed_in_terms(torch.bfloat16, num_terms) - exact).abs()
    return float((difference / exact).max()) / (torch.finfo(torch.bfloat16).eps / 2)


def test_a_sum_of_any_number_of_terms_is_rounded_once():
    assert max(rounding(num_terms) for num_terms in (2, 50, 1000)) <= 1.01


def two_levels(outer, inner, x, c, d):
    """A term's loss of y = x W and of an inner gradient y W': W is read at both levels."""
    y = x @ outer
    return ((y @ inner.mT) * c).sum() + (y * d).sum()


def drawn_terms(num_terms):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 24, generator=generator).bfloat16()
    terms = [
        [torch.randn(6, 24, generator=generator).bfloat16() for _ in range(3)]
        for _ in range(num_terms)
    ]
    return weight, terms


def summed_over_levels(dtype=torch.bfloat16, num_terms=5):
    """The gradient that a weight collects from terms that read it twice each."""
    weight, terms = drawn_terms(num_terms)
    module = torch.nn.ParameterList([weight.to(dtype)])
    backward = StepwiseBackward()
    with backward.parameters_as_leaves(module):
        for term in terms:
            two_levels(module[0], module[0], *(u.to(dtype) for u in term)).backward()
    backward.as_loss(torch.zeros((), dtype=dtype)).backward()
    return module[0].grad


def summed_by_hand(num_terms=5):
    """The same addends, each as its product gives it, summed in float32 and rounded once."""
    weight, terms = drawn_terms(num_terms)
    total = torch.zeros(weight.shape)
    for term in terms:
        outer, inner = (weight.clone().requires_grad_() for _ in range(2))
        two_levels(outer, inner, *term).backward()
        assert outer.grad is not None and inner.grad is not None
        total += outer.grad.float() + inner.grad.float()
    return total.bfloat16()


def test_the_levels_of_a_term_are_summed_in_float32_too():
    """To the bit, and no further from float64 than any sum in float32."""
    ours, plain = summed_over_levels(), summed_by_hand()
    assert torch.equal(ours, plain)
    exact = summed_over_levels(torch.float64)
    assert (ours.double() - exact).norm() / exact.norm() < torch.finfo(torch.bfloat16).eps


def test_levels_that_meet_in_bfloat16_would_be_noticed(monkeypatch):
    """What was done before: a term's addends met in bfloat16, its sum was added in float32."""

    def later(leaf):
        if leaf.dtype == torch.bfloat16:
            leaf.register_post_accumulate_grad_hook(widen)
        return leaf

    def widen(leaf):
        total = leaf.grad.float() + sums.get(id(leaf), 0)
        sums[id(leaf)] = total
        leaf.grad = None

    sums = {}
    monkeypatch.setattr(deferred_backward, "summed_in_fp32", later)
    monkeypatch.setattr(deferred_backward, "_take_sum", lambda leaf: sums.pop(id(leaf)))
    before, now = summed_over_levels(), summed_by_hand()
    monkeypatch.undo()
    exact = summed_over_levels(torch.float64)
    assert (before.double() - exact).norm() > 1.03 * (now.double() - exact).norm()


@pytest.mark.parametrize("factor", [1 / 3, 0.1])
def test_a_micro_batchs_factor_is_applied_before_the_rounding(factor):
    weight, terms = drawn_terms(1)
    module = torch.nn.ParameterList([weight])
    backward = StepwiseBackward()
    with backward.parameters_as_leaves(module):
        two_levels(module[0], module[0], *terms[0]).backward()
        total = module[0].grad.clone()
    (backward.as_loss(torch.zeros(())) * factor).backward()
    assert torch.equal(module[0].grad, (total * factor).bfloat16())


@functools.cache
def gradients(dtype, tile_rows):
    """Gradients of a small model whose weights are numbers of bfloat16, in the given precision."""
    torch.manual_seed(0)
    config = config_from_dict(
        {
            "model": {
                "size": "4xs",
                "num_layers": 2,
                "width": 16,
                "num_heads": 2,
                "feed_forward_width": 24,
                "vocabulary_size": VOCABULARY,
            },
            "refinement": {"num_steps": 2, "tile_rows": tile_rows},
            "data": {"context_length": POSITIONS},
            "train": {"global_batch_size": SAMPLES},
        }
    )
    model = WorldModel(config).bfloat16().to(dtype).train()
    tokens = torch.randint(VOCABULARY, (SAMPLES, POSITIONS + 1))
    model(
        tokens[:, :-1],
        tokens[:, 1:],
        sample_ids=torch.arange(SAMPLES),
        source=NoiseSource(3, 0),
    ).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(tile_rows):
    """Of a bfloat16 model's gradients in tiles from those of one tile: relative, the mean over its
    parameters. What a row computes is the same; what differs is the order of sums.
    """
    whole = gradients(torch.bfloat16, SAMPLES * POSITIONS)
    in_tiles = gradients(torch.bfloat16, tile_rows)
    errors = []
    for name, gradient in whole.items():
        assert in_tiles[name].dtype == torch.bfloat16
        difference = in_tiles[name].double() - gradient.double()
        errors.append(difference.norm() / gradient.double().norm())
    return float(torch.stack(errors).mean())


def test_the_error_of_a_models_gradients_does_not_grow_with_the_number_of_tiles():
    two_tiles = distance(SAMPLES * POSITIONS // 2)
    assert distance(SAMPLES * POSITIONS // 64) <= 1.3 * two_tiles


def test_sums_in_bfloat16_would_be_noticed(monkeypatch):
    """What was done before: autograd adds each term to a bfloat16 .grad."""
    gradients.cache_clear()
    monkeypatch.setattr(
        deferred_backward, "FULL_PRECISION", (torch.float32, torch.float64, torch.bfloat16)
    )
    assert rounding(1000) > 5
    two_tiles = distance(SAMPLES * POSITIONS // 2)
    assert distance(SAMPLES * POSITIONS // 64) > 2 * two_tiles
    gradients.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_sums_are_those_of_autograd_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(20, 50, generator=generator).to(dtype)
    plain = torch.ones(50, dtype=dtype, requires_grad=True)
    for factor in factors:
        (plain * factor).sum().backward()
    module = torch.nn.ParameterList([torch.ones(50, dtype=dtype)])
    backward = StepwiseBackward()
    with backward.parameters_as_leaves(module):
        for factor in factors:
            (module[0] * factor).sum().backward()
    backward.as_loss(torch.zeros((), dtype=dtype)).backward()
    assert torch.equal(module[0].grad, plain.grad)


def test_a_half_precision_parameter_keeps_no_sum_after_it_was_handed_out():
    module = torch.nn.ParameterList([torch.ones(5, dtype=torch.bfloat16)])
    backward = StepwiseBackward()
    with backward.parameters_as_leaves(module):
        leaf = module[0]
        leaf.sum().backward()
        assert leaf.grad.dtype == torch.float32
    backward.as_loss(torch.zeros(())).backward()
    assert leaf.grad is None and module[0].grad.dtype == torch.bfloat16
