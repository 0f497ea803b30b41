"""RMSNorm and SwiGLU with closed forms of the first and second order: what is kept is the input, not a dozen intermediates.

    RMSNorm   y = w n,  n = r x,  r = (mean x^2 + eps)^-1/2;    h = g w
              dx = r (h - n mean(h n))                                                   dw = sum g n
        cotangent a of dx, with t = r (a - n mean(a n)):
              dg = w t      dw = sum g t      dx = -r^2 (h mean(a n) + a mean(h n) + n (mean(a h) - 3 mean(a n) mean(h n)))
    SwiGLU    y = silu(u) v,  silu' = s (1 + u (1 - s)),  silu'' = s (1 - s) (2 + u (1 - 2 s)),  s = sigmoid(u)
              du = g v silu'      dv = g silu
        cotangents a of du, b of dv:
              dg = a v silu' + b silu      du = a g v silu'' + b g silu'      dv = a g silu'

Means run over the last dimension, sums over all rows. Half precisions are computed in float32. When gradients of weights exist, and that
a third derivative raises: contract.py.
"""
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import is_inner_gradient, refuse_graph


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension: x (..., D), weight (D,) -> (..., D); twice differentiable."""
    return _RMSNorm.apply(x, weight, epsilon)


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def swiglu(u: Tensor, v: Tensor) -> Tensor:
    """silu(u) * v elementwise, twice differentiable; u, v of one shape."""
    return _SwiGLU.apply(u, v)


def swiglu_reference(u: Tensor, v: Tensor) -> Tensor:
    return u * u.sigmoid() * v


def _mean(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).mean(-1, keepdim=True)


def _sum_rows(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).flatten(0, -2).sum(0)


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def _normalize(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    r = torch.rsqrt(_mean(x, x) + epsilon)
    return r, x * r


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        ctx.save_for_backward(x, weight)
        ctx.epsilon = epsilon
        wide, w = _wide(x, weight)
        return _normalize(wide, epsilon)[1].mul_(w).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        if is_inner_gradient():
            return _RMSNormGradient.apply(grad, x, weight, ctx.epsilon), None, None
        g, wide, w = _wide(grad, x, weight)
        r, n = _normalize(wide, ctx.epsilon)
        grad_weight = _sum_rows(g, n).to(weight.dtype) if ctx.needs_input_grad[1] else None
        h = g * w
        return torch.addcmul(h, n, _mean(h, n), value=-1).mul_(r).to(x.dtype), grad_weight, None


class _RMSNormGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, x, weight, epsilon):
        ctx.save_for_backward(grad, x, weight)
        ctx.epsilon = epsilon
        g, wide, w = _wide(grad, x, weight)
        r, n = _normalize(wide, epsilon)
        h = g * w
        return torch.addcmul(h, n, _mean(h, n), value=-1).mul_(r).to(x.dtype)

    @staticmethod
    def backward(ctx, a):
        refuse_graph("rms_norm")
        grad, x, weight = ctx.saved_tensors
        g, wide, w, a = _wide(grad, x, weight, a)
        r, n = _normalize(wide, ctx.epsilon)
        h = g * w
        a_n, h_n, a_h = _mean(a, n), _mean(h, n), _mean(a, h)
        tangent = torch.addcmul(a, n, a_n, value=-1).mul_(r)
        grad_weight = _sum_rows(g, tangent).to(weight.dtype) if ctx.needs_input_grad[2] else None
        grad_x = (n.mul_(a_h - 3 * a_n * h_n).addcmul_(h, a_n).addcmul_(a, h_n)).mul_(-r * r)
        return tangent.mul_(w).to(grad.dtype), grad_x.to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, v):
        ctx.save_for_backward(u, v)
        return F.silu(u).mul_(v)

    @staticmethod
    def backward(ctx, grad):
        u, v = ctx.saved_tensors
        if is_inner_gradient():
            return _SwiGLUGradient.apply(grad, u, v)
        return _swiglu_gradient(grad, u, v)


class _SwiGLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, u, v):
        ctx.save_for_backward(grad, u, v)
        return _swiglu_gradient(grad, u, v)

    @staticmethod
    def backward(ctx, a, b):
        refuse_graph("swiglu")
        grad, u, v = ctx.saved_tensors
        g, u, v, a, b = _wide(grad, u, v, a, b)
        s = u.sigmoid()
        rest = 1 - s
        silu, first = u * s, _first(u, s, rest)
        second = torch.addcmul(u.new_full((), 2.0), u, rest - s).mul_(s).mul_(rest)
        a_first = a * first
        grad_g = torch.addcmul(b * silu, a_first, v)
        grad_u = second.mul_(a).mul_(v).addcmul_(b, first).mul_(g)
        return tuple(t.to(grad.dtype) for t in (grad_g, grad_u, a_first.mul_(g)))


def _first(u: Tensor, s: Tensor, rest: Tensor) -> Tensor:
    """silu'(u) = s + u s (1 - s)."""
    return torch.addcmul(s, u * s, rest)


def _swiglu_gradient(grad: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    g, wide_u, wide_v = _wide(grad, u, v)
    s = wide_u.sigmoid()
    return _first(wide_u, s, 1 - s).mul_(g).mul_(wide_v).to(u.dtype), (wide_u * s).mul_(g).to(v.dtype)
