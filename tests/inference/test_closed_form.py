"""The closed forms of the cache are the gradients of plain autograd."""

import pytest
import torch
from thinking_cases import CASES, LENGTH, model_of, prompt_of

from ebwm_scale.model import closed_form, energy_head, kv_cache


def gradients(model, lengths=(4, 1, 6), candidates=3):
    """(closed form, plain autograd over the whole uncached network) of dE/d candidates for prompts
    of different lengths; (prompts, candidates, D).
    """
    landscape = model.network.num_landscapes - 1
    generator = torch.Generator().manual_seed(5)
    prompts = [prompt_of(model, length, seed=length) for length in lengths]
    x = torch.randn(
        len(prompts), candidates, model.config.model.width, generator=generator, dtype=torch.float64
    )
    cache = kv_cache.LandscapeKVCache(model.network, LENGTH, landscape)
    with torch.no_grad():
        cache.prefill(
            torch.nn.utils.rnn.pad_sequence(
                [model.embed_observed(p[None])[0] for p in prompts], batch_first=True
            ),
            torch.tensor(lengths),
        )
    energy, gradient = cache.energy_and_gradient(x, landscape)
    assert torch.equal(energy, cache.energy(x, landscape))
    plain = torch.zeros_like(x)
    for b, prompt in enumerate(prompts):
        context = model.network.encode_context(
            model.embed_observed(prompt[None]).detach(), landscape
        )
        for k in range(candidates):
            rows = torch.zeros(1, len(prompt), x.shape[-1], dtype=torch.float64)
            rows[0, -1] = x[b, k]
            rows.requires_grad_()
            last = model.network.energy(rows, context, landscape)[0, -1]
            assert torch.allclose(last, energy[b, k], rtol=1e-12, atol=1e-12)
            plain[b, k] = torch.autograd.grad(last, rows)[0][0, -1]
    return gradient, plain


@pytest.mark.parametrize("case", CASES)
def test_the_closed_form_gradient_of_a_candidate_is_that_of_plain_autograd(case):
    closed, plain = gradients(model_of(CASES[case]))
    assert torch.allclose(closed, plain, rtol=1e-10, atol=1e-12) and plain.abs().max() > 1e-3


@pytest.mark.parametrize(
    "piece", ["norm_backward", "rotate", "_feed_forward_backward", "_attention_backward"]
)
def test_a_closed_form_that_is_a_little_wrong_is_seen(piece, monkeypatch):
    model = model_of(CASES["adaln"])
    backward, right = closed_form.block_backward, getattr(closed_form, piece)

    def wrong(*arguments):
        monkeypatch.setattr(closed_form, piece, lambda *a: right(*a) * (1 + 1e-6))
        try:
            return backward(*arguments)
        finally:
            monkeypatch.setattr(closed_form, piece, right)

    monkeypatch.setattr(kv_cache, "block_backward", wrong)
    closed, plain = gradients(model)
    assert not torch.allclose(closed, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_a_head_whose_closed_form_is_a_little_wrong_is_seen(which, monkeypatch):
    """which: the gradient through the predicted stream, or the one on the candidate itself."""
    right = energy_head.ContentTerms.gradients

    def wrong(*arguments):
        found = list(right(*arguments))
        found[which] = found[which] * (1 + 1e-6)
        return tuple(found)

    monkeypatch.setattr(energy_head.ContentTerms, "gradients", wrong)
    closed, plain = gradients(model_of(CASES["heads"]))
    assert not torch.allclose(closed, plain, rtol=1e-10, atol=1e-12)
