"""Under torch.autocast every operation keeps its own precision: the bits of outside."""

import contextlib

import pytest
import torch
from transform_cases import CASES, EVERY, KEY, QUERY, draw, summed, vocabulary_calls

from ebwm_kernels import autograd_rules, causal_attention


def autocast_numbers(name, context):
    """Output, inner gradient and second-order gradients, all computed within the context."""
    shapes, operation, _ = CASES[name]
    leaves = [u.float().requires_grad_() for u in draw(shapes)]
    with context:
        out = operation(*leaves)
        (inner,) = torch.autograd.grad(summed(lambda u: u)(out), leaves[:1], create_graph=True)
        return [out, inner, *torch.autograd.grad(inner.sin().sum(), leaves)]


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@EVERY
def test_results_under_autocast_are_those_outside_it_to_the_bit(name):
    inside, outside = (autocast_numbers(name, c) for c in (autocast(), contextlib.nullcontext()))
    for mine, theirs in zip(inside, outside):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


@pytest.mark.parametrize("name", vocabulary_calls(*draw([(3, 4), (6, 4)])))
def test_the_vocabulary_is_the_same_under_autocast(name):
    def numbers(context):
        hidden, weight = (u.float() for u in draw([(3, 4), (6, 4)]))
        leaf = weight.requires_grad_()
        with context:
            out = vocabulary_calls(hidden, weight.detach())[name](leaf)
            return [out, *torch.autograd.grad(out.sum(), leaf)]

    for mine, theirs in zip(numbers(autocast()), numbers(contextlib.nullcontext())):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs)


def test_tensors_of_two_precisions_are_refused_with_what_to_do():
    q, k, v = (u.float() for u in draw([QUERY, KEY, KEY]))
    with autocast(), pytest.raises(ValueError, match="autocast casts nothing here: cast them"):
        causal_attention(q, k.bfloat16(), v.bfloat16())


def test_autocast_inside_an_operation_is_noticed(monkeypatch):
    monkeypatch.setattr(autograd_rules.torch._C, "_is_any_autocast_enabled", lambda: False)
    with pytest.raises(AssertionError):
        test_results_under_autocast_are_those_outside_it_to_the_bit("rms_norm")
