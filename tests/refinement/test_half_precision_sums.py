"""Gradients of half-precision weights and of the context's keys and values are summed in float32:
their error does not grow with the number of tiles. Float32 sums are autograd's own, to the bit.
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
        assert leaf.grad is None and leaf.leaf.grad_buffer.dtype == torch.float32
    backward.as_loss(torch.zeros(())).backward()
    assert leaf.leaf.grad_buffer is None and module[0].grad.dtype == torch.bfloat16
