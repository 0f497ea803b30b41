"""Attention as three nested operations, each the derivative of the one before, and the choice of
who computes them.

    ebwm::attention                   q, K, V [, k*, v*]        -> O, L
    ebwm::attention_gradient          G, the same, O, L         -> dQ, dK, dV [, dk*, dv*]
    ebwm::attention_double_backward   A, B, C [, b*, c*], ...   -> gG, gQ, gK, gV [, gk*, gv*]
    ebwm::attention_tangent           Q., K., V. [, k*., v*.]   -> O., for forward mode

The backward of each is the next one; the last has none: a third derivative raises. In Triton the
last waits for the ordinary backward where both come (joint.py).

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
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from ebwm_kernels.attention import reference
from ebwm_kernels.attention.definition import attention_definition
from ebwm_kernels.attention.implementation import Implementation
from ebwm_kernels.attention.joint import (
    first_half,
    joined_backward,
    may_join,
    take_waiting,
    wait_for,
)
from ebwm_kernels.attention.schema import (
    COTANGENTS,
    INPUTS,
    NUM_INPUTS,
    NUM_REST,
    OUTPUT,
    REST,
    empty_for_none,
    parts_of,
)
from ebwm_kernels.attention.tensors import (
    Cotangents,
    Inputs,
    Output,
    empty_gradient,
    empty_output,
    wide_dtype,
)
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


def reads_positions_first(
    backend: str, device: torch.device, dtype: torch.dtype, head_dimension: int
) -> bool:
    """Whether attention reads keys and values that lie positions first (attention/tensors.py) where
    they are, as Triton does.

    The reference copies them at every level: who calls it often gives them heads first.
    """
    if backend != "auto":
        return backend == "triton"
    return device.type == "cuda" and why_not_triton(device, dtype, head_dimension) is None


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


def attend(inputs: Inputs, shape: Shape, backend: str) -> Tensor:
    """Output (B, H, S, d of values) of attention in which a query may see keys of its own, lying
    positions first; backend resolved.
    """
    if transforms_active():
        if torch.compiler.is_compiling():  # which differentiates nested Functions wrongly
            return attention_definition(*inputs, shape)
        return attend_under_transforms(inputs, (*shape, backend))
    return torch.ops.ebwm.attention(*inputs, *shape, backend)[0]


def _is_transformed() -> bool:
    """Whether transforms.py takes over: the operators below would drop tangents without a word."""
    return not torch.compiler.is_compiling() and transforms_active()


def _implementation(backend: str) -> Implementation:
    if backend == "triton":
        from ebwm_kernels.attention import triton_backend

        return triton_backend
    return reference


def _shape_and_backend(rest: Sequence) -> tuple[Shape, Implementation]:
    *numbers, backend = rest
    return Shape(*numbers), _implementation(backend)


# ------------------------------------------------------------------------------------------ forward


@custom_op("ebwm::attention", mutates_args=(), schema=f"({INPUTS}, {REST}) -> (Tensor, Tensor)")
@without_autocast
def _attention(*arguments):
    shape, implementation = _shape_and_backend(arguments[NUM_INPUTS:])
    return tuple(implementation.forward(Inputs(*arguments[:NUM_INPUTS]), shape))


@_attention.register_fake
def _(q, k, v, *_rest):
    return empty_output(q, v.shape[-1]), q.new_empty(q.shape[:-1], dtype=wide_dtype(q.dtype))


def _setup_attention(ctx, inputs, output):
    ctx.rest = inputs[NUM_INPUTS:]
    ctx.save_for_backward(*inputs[:NUM_INPUTS], *output)
    ctx.set_materialize_grads(False)


def _backward_attention(ctx, grad, _):
    waiting = take_waiting(ctx)
    if grad is None and not waiting:
        return (None,) * (NUM_INPUTS + NUM_REST)
    # read once: a checkpoint recomputes for each reading
    *inputs, out, log_normalizer = ctx.saved_tensors
    with_keys = needs_grad(ctx, 1) or needs_grad(ctx, 2)
    output = (out.detach(), log_normalizer.detach())
    if waiting:
        saved = (*inputs, *output)
        result = joined_backward(waiting, grad, saved, ctx.rest, with_keys=with_keys)
    elif _is_transformed():
        result = Gradient.apply(grad, *inputs, *output, (*ctx.rest, with_keys))
    else:
        joins = may_join(Inputs(*inputs), ctx.rest, with_keys=with_keys)
        output = (out, output[1]) if joins else output
        numbers = (*ctx.rest, with_keys, is_traced_without_graph())
        result = torch.ops.ebwm.attention_gradient(grad, *inputs, *output, *numbers)
        if joins:
            wait_for(result[0], ctx)
    dq, dk, dv, dk_self, dv_self = result
    own = (None, None) if inputs[3] is None else (dk_self, dv_self)
    keys = (dk, dv) if with_keys else (None, None)
    return dq, *keys, *own, None, *(None,) * NUM_REST


register_autograd("ebwm::attention", _backward_attention, setup_context=_setup_attention)


# ------------------------------------------------------------------------------------- its gradient


@custom_op(
    "ebwm::attention_gradient",
    mutates_args=(),
    schema=f"(Tensor grad, {INPUTS}, {OUTPUT}, {REST}, bool with_keys, bool compiled)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _gradient(grad, *arguments):
    *inputs_and_rest, with_keys, compiled = arguments
    if compiled:
        refuse_kept_graph("attention")
    inputs, output, rest = parts_of(inputs_and_rest)
    shape, implementation = _shape_and_backend(rest)
    result = implementation.gradient(grad, inputs, output, shape, with_keys=with_keys)
    return empty_for_none(result, result.q)


@_gradient.register_fake
def _(_grad, q, k, v, k_self, v_self, *rest):
    with_keys = rest[-2]
    keys = (k, v) if with_keys else (None, None)
    tensors = (q, *keys, k_self, v_self)
    return empty_for_none((None if x is None else empty_gradient(x) for x in tensors), q)


def _setup_gradient(ctx, inputs, output):
    *tensors_and_numbers, _with_keys, _compiled = inputs
    ctx.rest = tensors_and_numbers[-NUM_REST:]
    ctx.save_for_backward(*tensors_and_numbers[:-NUM_REST])
    ctx.set_materialize_grads(False)


def _backward_gradient(ctx, a, b, c, b_self, c_self):
    refuse_graph("attention")
    num_arguments = 1 + NUM_INPUTS + len(Output._fields) + NUM_REST + 2
    if all(u is None for u in (a, b, c, b_self, c_self)):
        return (None,) * num_arguments
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
    cotangents = Cotangents(a, b, c, b_self, c_self)
    g_grad = first_half(ctx, cotangents, saved[0], saved[1:], ctx.rest)
    if g_grad is not None:
        return g_grad, *(None,) * (num_arguments - 1)
    if _is_transformed():
        result = DoubleBackward.apply(*tensors, tuple(ctx.rest))
    else:
        result = torch.ops.ebwm.attention_double_backward(*tensors, *ctx.rest)
    g_grad, g_q, g_k, g_v, g_k_self, g_v_self = result
    own = (None, None) if k_self is None else (g_k_self, g_v_self)
    return g_grad, g_q, g_k, g_v, *own, *(None,) * (num_arguments - 6)


def _or_zeros(cotangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if cotangent is None else cotangent


register_autograd("ebwm::attention_gradient", _backward_gradient, setup_context=_setup_gradient)


# ---------------------------------------------------------------------------------- double backward


@custom_op(
    "ebwm::attention_double_backward",
    mutates_args=(),
    schema=f"({COTANGENTS}, Tensor grad, {INPUTS}, {OUTPUT}, {REST})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@without_autocast
def _double_backward(a, b, c, b_self, c_self, grad, *arguments):
    inputs, output, rest = parts_of(arguments)
    shape, implementation = _shape_and_backend(rest)
    cotangents = Cotangents(a, b, c, b_self, c_self)
    result = implementation.double_backward(cotangents, grad, inputs, output, shape)
    return empty_for_none(result, result.q)


@_double_backward.register_fake
def _(_a, _b, _c, _b_self, _c_self, grad, q, k, v, k_self, v_self, *_rest):
    tensors = (grad, q, k, v, k_self, v_self)
    return empty_for_none((None if x is None else empty_gradient(x) for x in tensors), q)


# -------------------------------------------------------------------------------------- the tangent


@custom_op(
    "ebwm::attention_tangent",
    mutates_args=(),
    schema=f"({COTANGENTS}, {INPUTS}, {OUTPUT}, {REST}) -> Tensor",
)
@without_autocast
def _tangent(a, b, c, b_self, c_self, *arguments):
    inputs, output, rest = parts_of(arguments)
    shape, implementation = _shape_and_backend(rest)
    return implementation.tangent(Cotangents(a, b, c, b_self, c_self), inputs, output, shape)


@_tangent.register_fake
def _(_a, _b, _c, _b_self, _c_self, q, _k, v, *_rest):
    return empty_output(q, v.shape[-1])
