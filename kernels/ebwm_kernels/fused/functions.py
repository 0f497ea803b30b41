"""The autograd functions around the fused kernels of RMSNorm and SwiGLU: what each keeps, and which
kernel its backward is. pointwise.py chooses between them and plain PyTorch.

    norm        x [+ added] -> y [, total]      total = x + added, y = norm(total) w [+ shift]
    swiglu      u, v, or both in one tensor     -> silu(u) v

Each returns its input as well, under another name, and its backward reads that: so what the second
order adds to the input's gradient arrives at the same node as the rest, and one kernel adds it.

As everywhere (autograd_rules.py): gradients of weights only where they are asked for, a third
derivative raises, and where a transform or create_graph asks for what has no closed form here, the
definitions run in plain operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.autograd_rules import (
    is_mapped,
    needs_grad,
    refuse_graph,
    transforms_active,
    without_autocast,
)
from ebwm_kernels.fused import norm, swiglu
from ebwm_kernels.fused.launches import ready
from ebwm_kernels.plain import (
    pull_back,
    rms_norm_gradient_reference,
    swiglu_gradient_reference,
)

rms_norm_gradient_reference = without_autocast(rms_norm_gradient_reference)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, shift: Tensor | None) -> Tensor:
    """y (.., D)."""
    return _Norm.apply(x, weight, None, shift, epsilon)[1]


def rms_norm_beside(
    x: Tensor, weight: Tensor, epsilon: float, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x, y): gradients on this x are added by the kernel that computes the norm's."""
    return _Norm.apply(x, weight, None, shift, epsilon)


def add_rms_norm(
    x: Tensor, added: Tensor, weight: Tensor, epsilon: float, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(total, y), (.., D) both; x and added of one dtype."""
    return _Norm.apply(x, weight, added, shift, epsilon)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, added, shift, epsilon):
        ctx.set_materialize_grads(False)
        y, total = norm.forward(x, weight, epsilon, shift, added)
        ctx.epsilon, ctx.has_added, ctx.has_shift = epsilon, added is not None, shift is not None
        if added is None:
            total = x.view_as(x)
        ctx.save_for_backward(total, weight)
        return total, y

    @staticmethod
    def backward(ctx, of_total, grad):
        if grad is None:
            return of_total, None, of_total if ctx.has_added else None, None, None
        x, weight = ctx.saved_tensors
        # needs_grad counts tensors: x, weight [, added] [, shift]
        with_weight = needs_grad(ctx, 1)
        with_shift = ctx.has_shift and needs_grad(ctx, 2 + ctx.has_added)
        with_graph = torch.is_grad_enabled()
        dw = dshift = None
        if (with_graph and (with_weight or with_shift)) or _is_transformed(grad, of_total):
            dx, dw = rms_norm_gradient_reference(grad, x, weight, ctx.epsilon)
            dx = dx if of_total is None else dx + of_total
            dshift = grad.reshape(-1, len(weight)).sum(0) if ctx.has_shift else None
        elif with_graph:
            dx = _NormGradient.apply(grad, of_total, x, weight, ctx.epsilon)
        else:
            dx, dw, dshift = norm.gradient(
                grad,
                x,
                weight,
                ctx.epsilon,
                with_weight=with_weight,
                with_shift=with_shift,
                of_total=of_total,
            )
        return dx, dw, dx if ctx.has_added else None, dshift, None


class _NormGradient(torch.autograd.Function):
    """dx of a cotangent on y, with the cotangent on x itself added where there is one."""

    @staticmethod
    def forward(ctx, grad, of_total, x, weight, epsilon):
        ctx.save_for_backward(grad, x, weight)
        ctx.epsilon, ctx.has_total = epsilon, of_total is not None
        return norm.gradient(grad, x, weight, epsilon, with_weight=False, of_total=of_total)[0]

    @staticmethod
    def backward(ctx, a):
        refuse_graph("rms_norm")
        grad, x, weight = ctx.saved_tensors
        of_total = a if ctx.has_total else None
        if _is_transformed(a):

            def definition(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor]:
                return (rms_norm_gradient_reference(grad, x, weight, ctx.epsilon)[0],)

            dg, dx, dw = pull_back(definition, (grad, x, weight), (a,))
            return dg, of_total, dx, dw, None
        with_weight = ctx.needs_input_grad[3]
        dg, dx, dw = norm.second(a, grad, x, weight, ctx.epsilon, with_weight=with_weight)
        return dg, of_total, dx, dw, None


def swiglu_of(*parts: Tensor) -> Tensor:
    """silu(u) v: parts are u and v, of one dtype and shape, or one tensor (.., 2 F) of both."""
    return _SwiGLU.apply(*parts)[0]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *parts):
        ctx.set_materialize_grads(False)
        parts = tuple(x.view_as(x) for x in parts)
        ctx.save_for_backward(*parts)
        return swiglu.forward(*_two(parts)), *parts

    @staticmethod
    def backward(ctx, grad, *of_parts):
        if grad is None:
            return of_parts
        parts = ctx.saved_tensors
        if _is_transformed(grad, *of_parts):
            found = _as_parts(parts, *swiglu_gradient_reference(grad, *_two(parts)))
        elif torch.is_grad_enabled():
            found = _SwiGLUGradient.apply(grad, *parts)
            found = found if isinstance(found, tuple) else (found,)
        elif None in of_parts:
            found = _swiglu_gradient(grad, parts)
        else:
            return _swiglu_gradient(grad, parts, _two(of_parts))
        return tuple(x if more is None else x + more for x, more in zip(found, of_parts))


class _SwiGLUGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, *parts):
        ctx.save_for_backward(grad, *parts)
        found = _swiglu_gradient(grad, parts)
        if len(found) == 1:
            return found[0]
        return found

    @staticmethod
    def backward(ctx, *cotangents):
        refuse_graph("swiglu")
        grad, *rest = ctx.saved_tensors
        parts = tuple(rest)
        if _is_transformed(*cotangents):

            def definition(grad: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
                return _as_parts(parts, *swiglu_gradient_reference(grad, *_two(parts)))

            return pull_back(definition, (grad, *parts), cotangents)
        made, du, dv = _memory_for(parts)
        dg = swiglu.second(*_two(cotangents), grad, *_two(parts), du, dv)
        return dg, *made


def _swiglu_gradient(
    grad: Tensor, parts: tuple[Tensor, ...], more: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, ...]:
    made, du, dv = _memory_for(parts)
    swiglu.gradient(grad, *_two(parts), du, dv, more)
    return made


def _two(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """(u, v), as the kernels read them."""
    if len(parts) == 1:
        return swiglu.halves(ready(parts[0]))
    return ready(parts[0]), ready(parts[1])


def _memory_for(parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(tensors like the parts, their u, their v)."""
    made = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in parts)
    if len(made) == 1:
        u, v = swiglu.halves(made[0])
    else:
        u, v = made
    return made, u, v


def _as_parts(parts: tuple[Tensor, ...], u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([u, v], -1),) if len(parts) == 1 else (u, v)


def _is_transformed(*cotangents: Tensor | None) -> bool:
    """Whether a backward is mapped or differentiated forwards, of an operation that was not."""
    return transforms_active() or any(is_mapped(u) for u in cotangents)
