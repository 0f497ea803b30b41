"""energy_attention is its definition, to second order, for every shape; and it says no where it must."""
import pytest
import torch

from ebwm_kernels import energy_attention
from ebwm_kernels import energy_attention as function
from ebwm_kernels.energy_attention import ROWS, energy_attention_definition

SHAPES = [  # B, H, H_kv, S, C, d, offset
    (1, 1, 1, 1, 1, 4, 0), (2, 4, 4, 7, 7, 8, 0), (1, 4, 2, 5, 6, 4, 1), (2, 6, 1, 9, 9, 4, 0), (1, 2, 2, 3, 12, 4, 9), (1, 2, 1, ROWS + 9, ROWS + 9, 4, 0),
    (1, 1, 1, 4, 4, 4, 2),
]


def tensors(shape, seed=0, requires_grad=True):
    B, H, H_kv, S, C, d, _ = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(B, H, S, d)] * 3 + [(B, H_kv, C, d)] * 2
    return [torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_(requires_grad) for size in sizes]


def outer_loss(attention, inputs, offset):
    """A loss of the inner gradient and of the output, as a refinement step makes it."""
    out = attention(*inputs, context_offset=offset)
    inner = torch.autograd.grad((out.square() + out.sin()).sum(), inputs[:3], create_graph=True)
    return (out * out.detach().cos()).sum() + sum(((i + 1) * g.sin()).sum() for i, g in enumerate(inner)), inner


@pytest.mark.parametrize("shape", SHAPES)
def test_output_inner_gradient_and_all_second_order_gradients_equal_plain_autograd(shape):
    ours, plain = tensors(shape), tensors(shape)
    torch.testing.assert_close(energy_attention(*ours, context_offset=shape[-1]), energy_attention_definition(*plain, context_offset=shape[-1]))
    (loss, inner), (plain_loss, plain_inner) = outer_loss(energy_attention, ours, shape[-1]), outer_loss(energy_attention_definition, plain, shape[-1])
    for mine, theirs in zip(inner, plain_inner):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
        assert mine.requires_grad
    for mine, theirs in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(plain_loss, plain)):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_first_order_backward_reaches_all_five_inputs():
    ours, plain = tensors(SHAPES[2]), tensors(SHAPES[2])
    energy_attention(*ours, context_offset=1).square().sum().backward()
    energy_attention_definition(*plain, context_offset=1).square().sum().backward()
    for mine, theirs in zip(ours, plain):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_non_contiguous_inputs_and_a_given_scale():
    inputs = [u.detach().transpose(1, 2).contiguous().transpose(1, 2) for u in tensors(SHAPES[1])]
    torch.testing.assert_close(energy_attention(*inputs, scale=0.3), energy_attention_definition(*inputs, scale=0.3))


def test_large_scores_stay_finite():
    inputs = [u.detach() * 100 for u in tensors(SHAPES[1])]
    torch.testing.assert_close(energy_attention(*inputs), energy_attention_definition(*inputs))


def test_a_third_derivative_raises():
    inputs = tensors(SHAPES[1])
    loss, _ = outer_loss(energy_attention, inputs, 0)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)


def test_the_comparison_notices_a_wrong_second_order_term(monkeypatch):
    """Breaks the double backward on purpose (phi dropped) and expects the comparison above to see it."""
    import sys
    module = sys.modules["ebwm_kernels.energy_attention"]
    right = module._second_order
    monkeypatch.setattr(module, "_second_order", lambda a, b, c, *rest: (right(a, b, c, *rest)[0] * 1.001, *right(a, b, c, *rest)[1:]))
    with pytest.raises(AssertionError):
        # a gradient that depends on what flows back into G: the output's own cotangent
        ours, plain = tensors(SHAPES[1]), tensors(SHAPES[1])
        losses = [outer_loss(f, t, 0)[0] for f, t in ((function, ours), (energy_attention_definition, plain))]
        torch.testing.assert_close(torch.autograd.grad(losses[0], ours[0]), torch.autograd.grad(losses[1], plain[0]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change, message", [
    (lambda t: [t[0], t[1][:, :, :-1], *t[2:]], r"k_self has shape"),
    (lambda t: [*t[:3], t[3][:, :1].expand(-1, 3, -1, -1), t[4][:, :1].expand(-1, 3, -1, -1)], r"3 key/value heads for 4 query heads"),
    (lambda t: [t[0].float(), *t[1:]], r"must share one floating dtype"),
    (lambda t: [*t[:4], t[4][..., :2]], r"k_context has shape .* and v_context"),
    (lambda t: [t[0][0], *t[1:]], r"q has shape .*expected 4 dimensions"),
])
def test_what_does_not_fit_is_refused_before_any_work(change, message):
    with pytest.raises(ValueError, match=message):
        energy_attention(*change([u.detach() for u in tensors(SHAPES[1])]))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="allowed: auto, reference"):
        energy_attention(*tensors(SHAPES[1]), backend="cuda")
