"""Attention as three nested operations, each the derivative of the one before, and the choice of
who computes them.

    ebwm::attention                   q, K, V [, k*, v*]        -> O, L
    ebwm::attention_gradient          G, the same, O, L         -> dQ, dK, dV [, dk*, dv*]
    ebwm::attention_double_backward   A, B, C [, b*, c*], ...   -> gG, gQ, gK, gV [, gk*, gv*]
    ebwm::attention_tangent           Q., K., V. [, k*., v*.]   -> O., for forward mode

The backward of each is the next one; the last has none: a third derivative raises.

O and L enter the second and third as constants: the formulas (attention/reference.py) hold what
depends on them. Registered with torch.library, since nested autograd.Functions are differentiated
wrongly under torch.compile; under torch.func and forward mode transforms.py takes over. An
operation's result is a tensor, so what does not exist is empty.

Backends: "triton" (attention/triton_backend.py; a GPU, or Triton's interpreter) and "reference"
(plain PyTorch).
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from ebwm_kernels.attention import reference
from ebwm_kernels.attention.definition import attention_definition
from ebwm_kernels.attention.implementation import Implementation
from ebwm_kernels.attention.reference import Cotangents
from ebwm_kernels.attention.transforms import DoubleBackward, Gradient, attend_under_transforms
from ebwm_kernels.attention.tuning import MAX_HEAD_DIMENSION, architecture_of
from ebwm_kernels.attention.visibility import Shape
from ebwm_kernels.autograd_rules import (
    is_traced_without_graph,
    needs_grad,
    refuse_graph,
    refuse_kept_graph,
    transforms_active,
    without_autocast,
)

BACKENDS = ("auto", "triton", "reference")
# Matrix products of (queries, keys, d) that a backend makes at each level: without and with
# gradients of K and V; the last without and with cotangents on these. Triton computes the weights
# again in each pass (design: docs/kernels.md).
PRODUCTS = {
    "reference": {
        "forward": 2,
        "gradient": (3, 5),
        "double_backward": (8, 12),
        "tangent": (3, 5),
    },
    "triton": {
        "forward": 2,
        "gradient": (3, 7),
        "double_backward": (13, 20),
        "tangent": (3, 5),
    },
}


def resolve_backend(
    backend: str, device: torch.device, dtype: torch.dtype, head_dimension: int, operation: str
) -> str:
    """ "triton" or "reference" for such tensors.

    Raises ValueError for a backend that is unknown or cannot run them.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{operation}: backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "reference":
        return backend
    obstacle = why_not_triton(device, dtype, head_dimension)
    if backend == "auto":
        return "triton" if obstacle is None and device.type == "cuda" else "reference"
    if obstacle:
        raise ValueError(
            f"{operation}: backend triton cannot run {dtype}, head dimension {head_dimension} on "
            f"{device}: {obstacle}; "
            "use backend auto or reference"
        )
    return backend


TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def why_not_triton(device: torch.device, dtype: torch.dtype, head_dimension: int) -> str | None:
    """What keeps the Triton kernels from running such tensors, or None."""
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if head_dimension > MAX_HEAD_DIMENSION.get(dtype, 256):
        return f"head dimensions up to {MAX_HEAD_DIMENSION.get(dtype, 256)} are supported for it"
    if os.environ.get("TRITON_INTERPRET") == "1":
        if dtype not in (torch.float16, torch.float32, torch.float64):
            return "Triton's interpreter multiplies float16, float32 and float64 only"
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return "it needs an NVIDIA GPU (or TRITON_INTERPRET=1)"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "supported are float16, bfloat16 and float32"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "it needs compute capability 8.0 or newer"
    if architecture_of(capability) is None:
        return (
            f"no tiles have been compiled for compute capability {capability[0]}.{capability[1]} "
            "(8.x, 9.0, 10.0, 10.3 and 12.x have some)"
        )
    return None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    shape: Shape,
    backend: str,
) -> Tensor:
    """Output (B, H, S, d of values) of attention in which a query may see keys of its own; backend
    resolved.
    """
    tensors = (q, k, v, k_self, v_self, first_visible)
    if transforms_active():
        if torch.compiler.is_compiling():  # which differentiates nested Functions wrongly
            return attention_definition(*tensors, shape)
        rest = (*shape, backend)
        return attend_under_transforms(*tensors, rest)  # pyright: ignore[reportCallIssue]
    return torch.ops.ebwm.attention(*tensors, *shape, backend)[0]


def _is_transformed() -> bool:
    """Whether transforms.py takes over: the operators below would drop tangents without a word."""
    return not torch.compiler.is_compiling() and transforms_active()


def _implementation(backend: str) -> Implementation:
    if backend == "triton":
        from ebwm_kernels.attention import triton_backend

        return triton_backend
    return reference


def _empty_for_none(result: Tensor | None, like: Tensor) -> Tensor:
    """A result of an operation: empty in place of None."""
    return like.new_empty(0) if result is None else result


# ------------------------------------------------------------------------------------------ forward


@custom_op("ebwm::attention", mutates_args=())
@without_autocast
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    scale: float,
    offset: int,
    causal: bool,
    group_size: int,
    context_group: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = Shape(scale, offset, causal, group_size, context_group)
    return _implementation(backend).forward(q, k, v, k_self, v_self, first_visible, shape)


@_attention.register_fake
def _(
    q,
    k,
    v,
    k_self,
    v_self,
    first_visible,
    scale,
    offset,
    causal,
    group_size,
    context_group,
    backend,
):
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(q.shape[:-1], dtype=reference.wide_dtype(q.dtype))


def _setup_attention(ctx, inputs, output):
    q, k, v, k_self, v_self, first_visible, *ctx.rest = inputs
    ctx.save_for_backward(q, k, v, k_self, v_self, first_visible, *output)
    ctx.set_materialize_grads(False)


def _backward_attention(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    q, k, v, k_self, v_self, first_visible, out, log_normalizer = (
        ctx.saved_tensors
    )  # read once: a checkpoint recomputes for each reading
    with_keys = needs_grad(ctx, 1) or needs_grad(ctx, 2)
    tensors = (
        grad,
        q,
        k,
        v,
        k_self,
        v_self,
        first_visible,
        out.detach(),
        log_normalizer.detach(),
    )
    if _is_transformed():
        result = Gradient.apply(*tensors, (*ctx.rest, with_keys))
    else:
        result = torch.ops.ebwm.attention_gradient(
            *tensors, *ctx.rest, with_keys, is_traced_without_graph()
        )
    dq, dk, dv, dk_self, dv_self = result
    own = (None, None) if k_self is None else (dk_self, dv_self)
    return dq, *((dk, dv) if with_keys else (None, None)), *own, *(None,) * 7


register_autograd("ebwm::attention", _backward_attention, setup_context=_setup_attention)


# ------------------------------------------------------------------------------------- its gradient


@custom_op("ebwm::attention_gradient", mutates_args=())
@without_autocast
def _gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    scale: float,
    offset: int,
    causal: bool,
    group_size: int,
    context_group: int,
    backend: str,
    with_keys: bool,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if compiled:
        refuse_kept_graph("attention")
    dq, dk, dv, dk_self, dv_self = _implementation(backend).gradient(
        grad,
        q,
        k,
        v,
        k_self,
        v_self,
        first_visible,
        out,
        log_normalizer,
        Shape(scale, offset, causal, group_size, context_group),
        with_keys=with_keys,
    )
    return (
        dq,
        _empty_for_none(dk, dq),
        _empty_for_none(dv, dq),
        _empty_for_none(dk_self, dq),
        _empty_for_none(dv_self, dq),
    )


@_gradient.register_fake
def _(
    grad,
    q,
    k,
    v,
    k_self,
    v_self,
    first_visible,
    out,
    log_normalizer,
    scale,
    offset,
    causal,
    group_size,
    context_group,
    backend,
    with_keys,
    compiled,
):
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape if with_keys else 0),
        v.new_empty(v.shape if with_keys else 0),
        q.new_empty(0 if k_self is None else k_self.shape),
        q.new_empty(0 if v_self is None else v_self.shape),
    )


def _setup_gradient(ctx, inputs, output):
    *tensors_and_numbers, _with_keys, _compiled = inputs
    ctx.save_for_backward(*tensors_and_numbers[:9])
    ctx.rest = tensors_and_numbers[9:]
    ctx.set_materialize_grads(False)


def _backward_gradient(ctx, a, b, c, b_self, c_self):
    refuse_graph("attention")
    if all(u is None for u in (a, b, c, b_self, c_self)):
        return (None,) * 17
    saved = ctx.saved_tensors
    q, k, v, k_self, v_self = saved[1:6]
    a = _or_zeros(a, q)
    if b is not None or c is not None:
        b = _or_zeros(b, k)
        c = _or_zeros(c, v)
    if k_self is not None:
        b_self = _or_zeros(b_self, k_self)
        c_self = _or_zeros(c_self, v_self)
    tensors = (a, b, c, b_self, c_self, *saved)
    if _is_transformed():
        result = DoubleBackward.apply(*tensors, tuple(ctx.rest))
    else:
        result = torch.ops.ebwm.attention_double_backward(*tensors, *ctx.rest)
    g_grad, g_q, g_k, g_v, g_k_self, g_v_self = result
    own = (None, None) if k_self is None else (g_k_self, g_v_self)
    return g_grad, g_q, g_k, g_v, *own, *(None,) * 11


def _or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if cotangent is None else cotangent


register_autograd("ebwm::attention_gradient", _backward_gradient, setup_context=_setup_gradient)


# ---------------------------------------------------------------------------------- double backward


@custom_op("ebwm::attention_double_backward", mutates_args=())
@without_autocast
def _double_backward(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    b_self: Tensor | None,
    c_self: Tensor | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    scale: float,
    offset: int,
    causal: bool,
    group_size: int,
    context_group: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    g_grad, g_q, g_k, g_v, g_k_self, g_v_self = _implementation(backend).double_backward(
        Cotangents(a, b, c, b_self, c_self),
        grad,
        q,
        k,
        v,
        k_self,
        v_self,
        first_visible,
        out,
        log_normalizer,
        Shape(scale, offset, causal, group_size, context_group),
    )
    return (
        g_grad,
        g_q,
        g_k,
        g_v,
        _empty_for_none(g_k_self, g_q),
        _empty_for_none(g_v_self, g_q),
    )


@_double_backward.register_fake
def _(
    a,
    b,
    c,
    b_self,
    c_self,
    grad,
    q,
    k,
    v,
    k_self,
    v_self,
    first_visible,
    out,
    log_normalizer,
    scale,
    offset,
    causal,
    group_size,
    context_group,
    backend,
):
    return (
        grad.new_empty(grad.shape),
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0 if k_self is None else k_self.shape),
        q.new_empty(0 if v_self is None else v_self.shape),
    )


# -------------------------------------------------------------------------------------- the tangent


@custom_op("ebwm::attention_tangent", mutates_args=())
@without_autocast
def _tangent(
    a: Tensor,
    b: Tensor | None,
    c: Tensor | None,
    b_self: Tensor | None,
    c_self: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    scale: float,
    offset: int,
    causal: bool,
    group_size: int,
    context_group: int,
    backend: str,
) -> Tensor:
    return _implementation(backend).tangent(
        Cotangents(a, b, c, b_self, c_self),
        q,
        k,
        v,
        k_self,
        v_self,
        first_visible,
        out,
        log_normalizer,
        Shape(scale, offset, causal, group_size, context_group),
    )


@_tangent.register_fake
def _(a, b, c, b_self, c_self, q, k, v, k_self, v_self, first_visible, out, *rest):
    return out.new_empty(out.shape)
