"""Attention of the predicted stream: every query sees a causal context and one key of its own,
under a single softmax.

    p_t attends to  o_1 .. o_(t + offset)  and to itself:
        softmax([q_t k_1, .., q_t k_(t + offset), q_t k*_t]) [v_1, .., v*_t]

The observed stream never enters as a query. The inner gradient of a refinement step runs through q,
k* and v* only, and the context's keys and values collect their gradients in the outer backward
(autograd_rules.py). Formulas: attention/reference.py; levels: attention/ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.attention.ops import attend, resolve_backend
from ebwm_kernels.attention.reference import Shape, score_scale


def energy_attention(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    *,
    scale: float | None = None,
    context_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Output (B, H, S, d) of the predicted stream's attention, differentiable twice with respect to
    all five tensors.

    q, k_self, v_self: (B, H, S, d); k_context, v_context: (B, H_kv, C, d) with H % H_kv == 0; one
    floating dtype and device. Query t sees context keys j <= t + context_offset, and its own key.
    scale: default d ** -0.5. backend: "triton", "reference", or "auto": Triton for float16,
    bfloat16 and float32 on an NVIDIA GPU, else the reference.

    A third derivative raises RuntimeError. Raises ValueError for shapes, dtypes or a backend that
    do not fit.
    """
    _check(q, k_self, v_self, k_context, v_context, context_offset)
    shape = Shape(score_scale(scale, q.shape[-1]), context_offset, True)
    return attend(
        q,
        k_context,
        v_context,
        k_self,
        v_self,
        shape,
        resolve_backend(backend, q.device, q.dtype, q.shape[-1], "energy_attention"),
    )


def energy_attention_definition(
    q: Tensor,
    k_self: Tensor,
    v_self: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    *,
    scale: float | None = None,
    context_offset: int = 0,
) -> Tensor:
    """The definition in plain operations, for tests and readers."""
    scale = score_scale(scale, q.shape[-1])
    keys, values = (
        u.repeat_interleave(q.shape[1] // u.shape[1], 1) for u in (k_context, v_context)
    )
    scores = scale * q @ keys.transpose(-1, -2)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(
        context_offset + 1
    )
    own = scale * (q * k_self).sum(-1, keepdim=True)
    weights = torch.cat([own, scores.masked_fill(future, float("-inf"))], -1).softmax(-1)
    return weights[..., 1:] @ values + weights[..., :1] * v_self


def _check(
    q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor, offset: int
) -> None:
    check_tensors(
        "energy_attention",
        {
            "q": q,
            "k_self": k_self,
            "v_self": v_self,
            "k_context": k_context,
            "v_context": v_context,
        },
    )
    for name, tensor in (("k_self", k_self), ("v_self", v_self)):
        if tensor.shape != q.shape:
            raise ValueError(
                f"energy_attention: {name} has shape {tuple(tensor.shape)}, q has "
                f"{tuple(q.shape)}; they must be equal"
            )
    check_keys("energy_attention", q, {"k_context": k_context, "v_context": v_context}, offset)


def check_tensors(operation: str, tensors: dict[str, Tensor]) -> None:
    """Four dimensions, one floating dtype, one device. Raises ValueError."""
    q = tensors["q"]
    for name, tensor in tensors.items():
        if tensor.ndim != 4:
            raise ValueError(
                f"{operation}: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions "
                "(batch, heads, positions, head dimension)"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device or not q.dtype.is_floating_point:
            raise ValueError(
                f"{operation}: {name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on "
                f"{q.device}; "
                "all must share one floating dtype and one device"
            )


def check_keys(operation: str, q: Tensor, context: dict[str, Tensor], offset: int) -> None:
    """Keys and values (B, H_kv, C, d) that fit the queries, at least one of them.

    Raises ValueError.
    """
    (k_name, k), (v_name, v) = context.items()
    B, H, _, d = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != d:
        raise ValueError(
            f"{operation}: {k_name} has shape {tuple(k.shape)} and {v_name} {tuple(v.shape)}; "
            f"q {tuple(q.shape)} needs both to be ({B}, H_kv, C, {d})"
        )
    if k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(
            f"{operation}: {k.shape[1]} key/value heads for {H} query heads; must divide them"
        )
    if k.shape[2] == 0:
        raise ValueError(
            f"{operation}: {k_name} has shape {tuple(k.shape)}; at least one key is needed"
        )
    if offset < 0:
        raise ValueError(f"{operation}: context_offset is {offset}; must be 0 or more")
