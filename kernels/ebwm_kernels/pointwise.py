"""RMSNorm and SwiGLU with closed forms of the first and second order: what is kept is the input,
not a dozen intermediates.

    RMSNorm   y = w n,  n = r x,  r = (mean x^2 + eps)^-1/2;    h = g w
              dx = r (h - n mean(h n))      dw = sum g n
        cotangent a of dx, with t = r (a - n mean(a n)):
              dg = w t      dw = sum g t
              dx = -r^2 (h mean(a n) + a mean(h n) + n (mean(a h) - 3 mean(a n) mean(h n)))
    SwiGLU    y = silu(u) v,  s = sigmoid(u)
              silu' = s (1 + u (1 - s)),  silu'' = s (1 - s) (2 + u (1 - 2 s))
              du = g v silu'      dv = g silu
        cotangents a of du, b of dv:
              dg = a v silu' + b silu      du = a g v silu'' + b g silu'      dv = a g silu'

Means run over the last dimension, sums over all rows. Half precisions are computed in float32. When
gradients of weights exist, and that a third derivative raises: autograd_rules.py.

Under torch.compile, torch.func's transforms and forward mode the definitions run instead, in plain
operations: they are right to any order in every mode, and keep their intermediates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_kernels.autograd_rules import (
    is_mapped,
    needs_grad,
    refuse_graph,
    transforms_active,
    without_autocast,
)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, twice differentiable.

    x (..., D), weight (D,) -> (..., D).
    """
    # nested autograd.Functions are not traced; the compiler fuses the definition, to any order
    if torch.compiler.is_compiling() or transforms_active():
        return rms_norm_reference(x, weight, epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The definition, in float32 for half precisions."""
    wide, w = _wide(x, weight)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * w).to(x.dtype)


def _rms_norm_gradient_reference(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(dx, dw) in plain differentiable operations."""
    g, wide, w = _wide(grad, x, weight)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    n = r * wide
    h = g * w
    grad_x = r * (h - n * (h * n).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (g * n).reshape(-1, len(weight)).sum(0).to(weight.dtype)


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """silu(u) * v elementwise, twice differentiable; u, v of one shape."""
    if torch.compiler.is_compiling() or transforms_active():
        return swiglu_reference(u, v)
    return _SwiGLU.apply(u, v)


def swiglu_reference(u: Tensor, v: Tensor) -> Tensor:
    """The definition, in float32 for half precisions."""
    wide_u, wide_v = _wide(u, v)
    return (wide_u * wide_u.sigmoid() * wide_v).to(u.dtype)


def _swiglu_gradient_reference(grad: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(du, dv) in plain differentiable operations."""
    g, wide_u, wide_v = _wide(grad, u, v)
    s = wide_u.sigmoid()
    grad_u = g * wide_v * s * (1 + wide_u * (1 - s))
    return grad_u.to(u.dtype), (g * wide_u * s).to(v.dtype)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def _is_transformed(*cotangents: Tensor) -> bool:
    """Whether a backward is mapped or differentiated forwards, of an operation that was not."""
    return transforms_active() or any(is_mapped(u) for u in cotangents)


def _pull_back(
    function: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    inputs: tuple[Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients of the inputs for cotangents of a function in plain operations, last ones."""
    leaves = [u.detach().requires_grad_() for u in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    return torch.autograd.grad(outputs, leaves, cotangents)


def _inverse_rms(x: Tensor, epsilon: float) -> Tensor:
    """r (..., 1)."""
    return (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        .square_()
        .div_(x.shape[-1])
        .add_(epsilon)
        .rsqrt_()
    )


def _mean(product: Tensor, weight: Tensor) -> Tensor:
    """Mean of weight * product over the last dimension (..., 1), without a second tensor of their
    size.
    """
    return (product @ weight).div_(weight.shape[0]).unsqueeze(-1)


def _sum_rows(rows: Tensor, product: Tensor) -> Tensor:
    """Sum of rows (..., 1) * product (..., D) over all rows: (D,)."""
    return torch.mv(product.flatten(0, -2).T, rows.flatten())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        wide, w = _wide(x, weight)
        return (wide * _inverse_rms(wide, epsilon)).mul_(w).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        with_weight = needs_grad(ctx, 1)
        with_graph = torch.is_grad_enabled()
        # The closed form has no graph of the weight's gradient, and no batched or dual cotangent.
        if (with_graph and with_weight) or _is_transformed(grad):
            return *_rms_norm_gradient_reference(grad, x, weight, ctx.epsilon), None
        if not with_graph:
            return *_rms_norm_gradient(grad, x, weight, ctx.epsilon, with_weight=with_weight), None
        return _RMSNormGradient.apply(grad, x, weight, ctx.epsilon), None, None


class _RMSNormGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x, weight, epsilon):
        ctx.save_for_backward(grad, x, weight)
        ctx.epsilon = epsilon
        return _rms_norm_gradient(grad, x, weight, epsilon, with_weight=False)[0]

    @staticmethod
    def backward(ctx, a):
        refuse_graph("rms_norm")
        grad, x, weight = ctx.saved_tensors
        if _is_transformed(a):

            def definition(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor]:
                return (_rms_norm_gradient_reference(grad, x, weight, ctx.epsilon)[0],)

            return *_pull_back(definition, (grad, x, weight), (a,)), None
        return *_rms_norm_second(a, grad, x, weight, ctx.epsilon, ctx.needs_input_grad[2]), None


@without_autocast
def _rms_norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, *, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    g, wide, w = _wide(grad, x, weight)
    r, gx = _inverse_rms(wide, epsilon), g * wide
    grad_weight = _sum_rows(r, gx).to(weight.dtype) if with_weight else None
    along = _mean(gx, w).mul_(r).mul_(r)  # n mean(h n) = x r^2 mean(h x)
    return torch.mul(g, w, out=gx).addcmul_(wide, along, value=-1).mul_(r).to(x.dtype), grad_weight


@without_autocast
def _rms_norm_second(
    a: Tensor, grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dg, dx, dw) of a cotangent a on the gradient with respect to x."""
    g, wide, w, a = _wide(grad, x, weight, a)
    r, gx, ga = _inverse_rms(wide, epsilon), g * wide, g * a
    a_n = (a * wide).mean(-1, keepdim=True).mul_(r)
    h_n, a_h = _mean(gx, w).mul_(r), _mean(ga, w)
    grad_weight = None
    if with_weight:  # sum g t
        grad_weight = (_sum_rows(r, ga) - _sum_rows(r.square() * a_n, gx)).to(weight.dtype)
    grad_grad = torch.addcmul(a, wide, r * a_n, value=-1).mul_(r).mul_(w)
    h, minus_r2 = torch.mul(g, w, out=gx), -r * r
    grad_x = (
        (wide * ((a_h - 3 * a_n * h_n) * r * minus_r2))
        .addcmul_(a, h_n * minus_r2)
        .addcmul_(h, a_n * minus_r2)
    )
    return grad_grad.to(grad.dtype), grad_x.to(x.dtype), grad_weight


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, v):
        ctx.save_for_backward(u, v)
        return F.silu(u).mul_(v)

    @staticmethod
    def backward(ctx, grad):
        u, v = ctx.saved_tensors
        if _is_transformed(grad):
            return _swiglu_gradient_reference(grad, u, v)
        return (_SwiGLUGradient.apply if torch.is_grad_enabled() else _swiglu_gradient)(grad, u, v)


class _SwiGLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, u, v):
        ctx.save_for_backward(grad, u, v)
        return _swiglu_gradient(grad, u, v)

    @staticmethod
    def backward(ctx, a, b):
        refuse_graph("swiglu")
        grad, u, v = ctx.saved_tensors
        if _is_transformed(a, b):
            return _pull_back(_swiglu_gradient_reference, (grad, u, v), (a, b))
        g, u, v, a, b = _wide(grad, u, v, a, b)
        a_first = torch.ops.aten.silu_backward(a, u)  # a silu'
        grad_g = F.silu(u).mul_(b).addcmul_(a_first, v)
        s = u.sigmoid()
        second = torch.addcmul(u.new_full((), 2.0), u, torch.rsub(s, 1, alpha=2)).mul_(a).mul_(v)
        grad_u = (
            torch.ops.aten.sigmoid_backward(second, s)
            .add_(torch.ops.aten.silu_backward(b, u))
            .mul_(g)
        )
        return tuple(t.to(grad.dtype) for t in (grad_g, grad_u, a_first.mul_(g)))


def _swiglu_gradient(grad: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    g, wide_u, wide_v = _wide(grad, u, v)
    return torch.ops.aten.silu_backward(g * wide_v, wide_u).to(u.dtype), F.silu(wide_u).mul_(g).to(
        v.dtype
    )
