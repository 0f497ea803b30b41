"""RMSNorm and SwiGLU equal their definitions to second order in float64, and refuse a third."""

import pytest
import torch

from ebwm_kernels import pointwise

CASES = {
    "rms_norm": (
        lambda x, w: pointwise.rms_norm(x, w, 1e-5),
        lambda x, w: pointwise.rms_norm_reference(x, w, 1e-5),
        [(3, 5, 8), (8,)],
        1,
    ),
    "rms_norm_tiny_input": (
        lambda x, w: pointwise.rms_norm(x * 1e-3, w, 1e-5),
        lambda x, w: pointwise.rms_norm_reference(x * 1e-3, w, 1e-5),
        [(4, 8), (8,)],
        1,
    ),
    "swiglu": (pointwise.swiglu, pointwise.swiglu_reference, [(3, 5, 8), (3, 5, 8)], 2),
}


def second_order(function, shapes, num_inner):
    generator = torch.Generator().manual_seed(1)
    inputs = [
        (3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in shapes
    ]
    out = function(*inputs)
    inner = torch.autograd.grad(out.sin().sum(), inputs[:num_inner], create_graph=True)
    loss = out.square().sum() + sum((g.cos() * (i + 1)).sum() for i, g in enumerate(inner))
    return out, inner, loss, inputs


@pytest.mark.parametrize("name", CASES)
def test_value_inner_gradient_and_second_order_gradients_equal_plain_autograd(name):
    ours, reference, shapes, num_inner = CASES[name]
    (out, inner, loss, inputs), (out_r, inner_r, loss_r, inputs_r) = (
        second_order(ours, shapes, num_inner),
        second_order(reference, shapes, num_inner),
    )
    torch.testing.assert_close(out, out_r, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(inner, inner_r, rtol=1e-11, atol=1e-13)
    assert all(g.requires_grad for g in inner)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs),
        torch.autograd.grad(loss_r, inputs_r),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", CASES)
def test_first_order_gradients_equal_plain_autograd(name):
    ours, reference, shapes, _ = CASES[name]
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    torch.testing.assert_close(
        torch.autograd.grad(ours(*inputs).sin().sum(), inputs),
        torch.autograd.grad(reference(*inputs).sin().sum(), inputs),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_third_derivative_raises(name):
    ours, _, shapes, num_inner = CASES[name]
    *_, loss, inputs = second_order(ours, shapes, num_inner)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(loss, inputs, create_graph=True)


def test_a_weight_gradient_under_create_graph_can_be_differentiated_again():
    """Hessian-vector products and inner loops of meta-learning run over all parameters."""
    results = []
    for function in (pointwise.rms_norm, pointwise.rms_norm_reference):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        w = torch.ones(8, dtype=torch.float64, requires_grad=True)
        inner = torch.autograd.grad(function(x, w, 1e-5).sin().sum(), [x, w], create_graph=True)
        assert all(g.requires_grad for g in inner)
        results.append(torch.autograd.grad(sum(g.cos().sum() for g in inner), [x, w]))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


def test_the_comparison_notices_a_wrong_coefficient(monkeypatch):
    """r a thousandth too large: value, first and second order all differ from plain autograd."""
    right = pointwise._inverse_rms
    monkeypatch.setattr(pointwise, "_inverse_rms", lambda x, epsilon: right(x, epsilon) * 1.001)
    with pytest.raises(AssertionError):
        test_value_inner_gradient_and_second_order_gradients_equal_plain_autograd("rms_norm")
