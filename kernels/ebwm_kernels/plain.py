"""RMSNorm and SwiGLU, and their gradients, as their definitions: plain differentiable operations,
right to any order in every mode. What runs in their place is in pointwise.py and fused/.

Half precisions are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The definition, in float32 for half precisions."""
    wide, w = widened(x, weight)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * w).to(x.dtype)


def rms_norm_gradient_reference(
    grad: Tensor, x: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(dx, dw) in plain differentiable operations."""
    g, wide, w = widened(grad, x, weight)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    n = r * wide
    h = g * w
    grad_x = r * (h - n * (h * n).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (g * n).reshape(-1, len(weight)).sum(0).to(weight.dtype)


def swiglu_reference(u: Tensor, v: Tensor) -> Tensor:
    """The definition, in float32 for half precisions."""
    wide_u, wide_v = widened(u, v)
    return (wide_u * wide_u.sigmoid() * wide_v).to(u.dtype)


def swiglu_gradient_reference(grad: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(du, dv) in plain differentiable operations."""
    g, wide_u, wide_v = widened(grad, u, v)
    s = wide_u.sigmoid()
    grad_u = g * wide_v * s * (1 + wide_u * (1 - s))
    return grad_u.to(u.dtype), (g * wide_u * s).to(v.dtype)


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors)


def pull_back(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Gradients of the inputs for cotangents of a function in plain operations, last ones."""
    leaves = [u.detach().requires_grad_() for u in inputs]
    with torch.enable_grad():
        outputs = function(*leaves)
    return torch.autograd.grad(outputs, leaves, cotangents)
