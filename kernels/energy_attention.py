"""Attention of the predicted stream: every query sees a causal context and one key of its own, under a single softmax.

    p_t attends to  o_1 .. o_(t + offset)  and to itself:   softmax([q_t k_1, .., q_t k_(t + offset), q_t k*_t]) [v_1, .., v*_t]

The observed stream never enters as a query, so its keys and values are ordinary first-order tensors: the inner gradient of a
refinement step runs through q, k* and v* only, and the context's keys and values collect their gradients in the outer pass.
"""
from __future__ import annotations

import torch
from torch import Tensor

BACKENDS = ("auto", "reference")


def energy_attention(q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor, *,
                     scale: float | None = None, context_offset: int = 0, backend: str = "auto") -> Tensor:
    """Output (B, H, S, d) of the predicted stream's attention, differentiable twice with respect to all five tensors.

    q, k_self, v_self: (B, H, S, d); k_context, v_context: (B, H_kv, C, d) with H % H_kv == 0; one floating dtype and device.
    Query t sees context keys j <= t + context_offset, and its own key. scale: default d ** -0.5.
    Raises ValueError for shapes, dtypes or a backend that do not fit.
    """
    _check(q, k_self, v_self, k_context, v_context, context_offset, backend)
    return _reference(q, k_self, v_self, k_context, v_context, q.shape[-1] ** -0.5 if scale is None else scale, context_offset)


def _reference(q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor, scale: float, offset: int) -> Tensor:
    B, H, S, d = q.shape
    H_kv, C = k_context.shape[1:3]
    queries = (q * scale).view(B, H_kv, H // H_kv * S, d)       # the heads of a group share their keys: one longer product
    scores = (queries @ k_context.transpose(-1, -2)).view(B, H, S, C)
    future = torch.ones(S, C, dtype=torch.bool, device=q.device).triu(offset + 1)
    scores = scores.masked_fill(future, float("-inf"))
    own = (q * k_self).sum(-1, keepdim=True) * scale
    weights = torch.cat([own, scores], -1).softmax(-1)
    seen = weights[..., 1:].reshape(B, H_kv, H // H_kv * S, C) @ v_context
    return seen.view(B, H, S, d) + weights[..., :1] * v_self


def _check(q: Tensor, k_self: Tensor, v_self: Tensor, k_context: Tensor, v_context: Tensor, offset: int, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"energy_attention: backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    own = {"q": q, "k_self": k_self, "v_self": v_self}
    context = {"k_context": k_context, "v_context": v_context}
    for name, tensor in {**own, **context}.items():
        if tensor.ndim != 4:
            raise ValueError(f"energy_attention: {name} has shape {tuple(tensor.shape)}; expected 4 dimensions (batch, heads, positions, head dimension)")
        if tensor.dtype != q.dtype or tensor.device != q.device or not q.dtype.is_floating_point:
            raise ValueError(f"energy_attention: {name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}; "
                             "all five must share one floating dtype and one device")
    for name, tensor in own.items():
        if tensor.shape != q.shape:
            raise ValueError(f"energy_attention: {name} has shape {tuple(tensor.shape)}, q has {tuple(q.shape)}; they must be equal")
    B, H, S, d = q.shape
    if k_context.shape != v_context.shape or k_context.shape[0] != B or k_context.shape[3] != d:
        raise ValueError(f"energy_attention: k_context has shape {tuple(k_context.shape)} and v_context {tuple(v_context.shape)}; "
                         f"q {tuple(q.shape)} needs both to be ({B}, H_kv, C, {d})")
    if k_context.shape[1] == 0 or H % k_context.shape[1]:
        raise ValueError(f"energy_attention: {k_context.shape[1]} key/value heads for {H} query heads; must divide them")
    if offset < 0:
        raise ValueError(f"energy_attention: context_offset is {offset}; must be 0 or more")
