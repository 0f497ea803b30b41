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

On an NVIDIA GPU each pass is one Triton kernel (fused/). `backend` says otherwise: "auto", "triton"
or "reference", which is the plain PyTorch here; a forced one that cannot run raises ValueError.
"""

from __future__ import annotations

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
from ebwm_kernels.fused.launches import runs_fused
from ebwm_kernels.plain import (
    pull_back,
    rms_norm_gradient_reference,
    rms_norm_reference,
    swiglu_gradient_reference,
    swiglu_reference,
    widened,
)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) [+ shift] over the last dimension, twice
    differentiable.

    x (..., D), weight and shift (D,) -> (..., D).
    """
    # nested autograd.Functions are not traced; the compiler fuses the definition, to any order
    if torch.compiler.is_compiling() or transforms_active():
        return _shifted(rms_norm_reference(x, weight, epsilon), shift)
    if runs_fused(backend, x, "rms_norm", x.shape[-1]):
        from ebwm_kernels.fused import functions

        return functions.rms_norm(x, weight, epsilon, shift)
    return _shifted(_RMSNorm.apply(x, weight, epsilon), shift)


def add_rms_norm(
    x: Tensor,
    added: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(total, rms_norm of it), total = x + added: a residual and the norm behind it, in one pass
    over both on a GPU.

    x and added (..., D), of one dtype.
    """
    if torch.compiler.is_compiling() or transforms_active():
        total = x + added
        return total, _shifted(rms_norm_reference(total, weight, epsilon), shift)
    same_dtype = x.dtype == added.dtype
    if same_dtype and runs_fused(backend, x, "add_rms_norm", x.shape[-1]):
        from ebwm_kernels.fused import functions

        return functions.add_rms_norm(x, added, weight, epsilon, shift)
    total = x + added
    return total, rms_norm(total, weight, epsilon, shift=shift, backend=backend)


def rms_norm_beside(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x, rms_norm of it), for a residual past the norm: on a GPU the gradients of this x and of
    the norm are added where the latter is computed.
    """
    is_plain = torch.compiler.is_compiling() or transforms_active()
    if not is_plain and runs_fused(backend, x, "rms_norm", x.shape[-1]):
        from ebwm_kernels.fused import functions

        return functions.rms_norm_beside(x, weight, epsilon, shift)
    return x, rms_norm(x, weight, epsilon, shift=shift, backend=backend)


def _shifted(y: Tensor, shift: Tensor | None) -> Tensor:
    return y if shift is None else y + shift


def swiglu(u: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(u) * v elementwise, twice differentiable; u, v of one shape."""
    if torch.compiler.is_compiling() or transforms_active():
        return swiglu_reference(u, v)
    if u.dtype == v.dtype and runs_fused(backend, u, "swiglu"):
        from ebwm_kernels.fused import functions

        return functions.swiglu_of(u, v)
    return _SwiGLU.apply(u, v)


def swiglu_halves(both: Tensor, *, backend: str = "auto") -> Tensor:
    """`swiglu` of the two halves u and v of one tensor (..., 2 F), as one product gives them."""
    is_plain = torch.compiler.is_compiling() or transforms_active()
    if not is_plain and runs_fused(backend, both, "swiglu"):
        from ebwm_kernels.fused import functions

        return functions.swiglu_of(both)
    return swiglu(*both.chunk(2, -1), backend="reference")


def _is_transformed(*cotangents: Tensor) -> bool:
    """Whether a backward is mapped or differentiated forwards, of an operation that was not."""
    return transforms_active() or any(is_mapped(u) for u in cotangents)


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
        wide, w = widened(x, weight)
        return (wide * _inverse_rms(wide, epsilon)).mul_(w).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        with_weight = needs_grad(ctx, 1)
        with_graph = torch.is_grad_enabled()
        # The closed form has no graph of the weight's gradient, and no batched or dual cotangent.
        if (with_graph and with_weight) or _is_transformed(grad):
            return *rms_norm_gradient_reference(grad, x, weight, ctx.epsilon), None
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
                return (rms_norm_gradient_reference(grad, x, weight, ctx.epsilon)[0],)

            return *pull_back(definition, (grad, x, weight), (a,)), None
        return *_rms_norm_second(a, grad, x, weight, ctx.epsilon, ctx.needs_input_grad[2]), None


@without_autocast
def _rms_norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, *, with_weight: bool
) -> tuple[Tensor, Tensor | None]:
    g, wide, w = widened(grad, x, weight)
    r, gx = _inverse_rms(wide, epsilon), g * wide
    grad_weight = _sum_rows(r, gx).to(weight.dtype) if with_weight else None
    along = _mean(gx, w).mul_(r).mul_(r)  # n mean(h n) = x r^2 mean(h x)
    return torch.mul(g, w, out=gx).addcmul_(wide, along, value=-1).mul_(r).to(x.dtype), grad_weight


@without_autocast
def _rms_norm_second(
    a: Tensor, grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dg, dx, dw) of a cotangent a on the gradient with respect to x."""
    g, wide, w, a = widened(grad, x, weight, a)
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
            return swiglu_gradient_reference(grad, u, v)
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
            return pull_back(swiglu_gradient_reference, (grad, u, v), (a, b))
        g, u, v, a, b = widened(grad, u, v, a, b)
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
    g, wide_u, wide_v = widened(grad, u, v)
    return torch.ops.aten.silu_backward(g * wide_v, wide_u).to(u.dtype), F.silu(wide_u).mul_(g).to(
        v.dtype
    )
