"""Causal and bidirectional attention with a correct double backward, for whoever differentiates
twice through a transformer.

Gradient penalties, meta-learning, Hessian-vector products and energies of whole sequences need
exactly this, and fused attention elsewhere has no double backward or a wrong one. The inner
gradient covers q, k and v. Formulas: attention/reference.py; levels: attention/ops.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.attention.energy import check_keys, check_tensors
from ebwm_kernels.attention.ops import attend, resolve_backend
from ebwm_kernels.attention.reference import Shape, score_scale


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    context_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Output (B, H, S, d) of softmax attention, differentiable twice with respect to q, k and v.

    q: (B, H, S, d); k, v: (B, H_kv, C, d) with H % H_kv == 0; one floating dtype and device.
    Query t sees keys j <= t + context_offset, or all of them with causal=False.
    scale: default d ** -0.5. backend: as in energy_attention.

    A third derivative raises RuntimeError. Raises ValueError for shapes, dtypes or a backend that
    do not fit.
    """
    check_tensors("causal_attention", {"q": q, "k": k, "v": v})
    check_keys("causal_attention", q, {"k": k, "v": v}, context_offset)
    shape = Shape(score_scale(scale, q.shape[-1]), context_offset, causal)
    return attend(
        q,
        k,
        v,
        None,
        None,
        shape,
        resolve_backend(backend, q.device, q.dtype, q.shape[-1], "causal_attention"),
    )


def causal_attention_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    context_offset: int = 0,
) -> Tensor:
    """The definition in plain operations, for tests and readers."""
    scale = score_scale(scale, q.shape[-1])
    keys, values = (u.repeat_interleave(q.shape[1] // u.shape[1], 1) for u in (k, v))
    scores = scale * q @ keys.transpose(-1, -2)
    if causal:
        scores = scores.masked_fill(
            torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(
                context_offset + 1
            ),
            float("-inf"),
        )
    return scores.softmax(-1) @ values
