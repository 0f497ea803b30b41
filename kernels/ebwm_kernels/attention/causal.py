"""Causal, block-causal, bidirectional and cross-attention with a correct double backward, for
whoever differentiates twice through a transformer.

Gradient penalties, meta-learning, Hessian-vector products and energies of whole sequences need
exactly this, and fused attention elsewhere has no double backward or a wrong one. The inner
gradient covers q, k and v. Who sees what: attention/visibility.py; formulas:
attention/reference.py; levels: attention/ops.py.
"""

from __future__ import annotations

from torch import Tensor

from ebwm_kernels.attention.definition import attention_definition
from ebwm_kernels.attention.energy import check_keys, check_tensors
from ebwm_kernels.attention.ops import attend, resolve_backend
from ebwm_kernels.attention.tensors import Inputs
from ebwm_kernels.attention.visibility import (
    Shape,
    check_groups,
    first_visible_keys,
    score_scale,
)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    context_offset: int = 0,
    group_size: int = 1,
    context_group: int | None = None,
    first_visible: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Output (B, H, S, d_v) of softmax attention, differentiable twice with respect to q, k and v.

    q: (B, H, S, d); k: (B, H_kv, C, d); v: (B, H_kv, C, d_v) with H % H_kv == 0; one floating dtype
    and device. scale: default d ** -0.5. backend: as in energy_attention.

    Query t, of group g = t // group_size, sees the keys j with first_visible[b, t] <= j <
    (g + 1) context_group + context_offset: causal attention with groups of 1 (j <= t +
    context_offset), block-causal with larger ones, bidirectional inside a group. With causal=False
    it sees all keys from first_visible on.
    group_size divides S; context_group (default group_size): keys per group. first_visible: (B, S)
    integers that do not decrease along S (None: all 0). window: at most so many keys, the last that
    the row sees. Every row must see a key; this is checked on a CPU only, and elsewhere a row
    without keys gets zeros.

    A third derivative raises RuntimeError. Raises ValueError for shapes, dtypes, groups, first keys
    or a backend that do not fit.
    """
    group = group_size if context_group is None else context_group
    shape = Shape(score_scale(scale, q.shape[-1]), context_offset, causal, group_size, group)
    return _attention("causal_attention", q, k, v, first_visible, window, shape, backend)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Output (B, H, S, d_v) of attention in which every query sees every key, differentiable twice
    with respect to q, k and v.

    q: (B, H, S, d); k: (B, H_kv, C, d); v: (B, H_kv, C, d_v) with H % H_kv == 0; C may differ from
    S; one floating dtype and device. scale: default d ** -0.5. backend: as in energy_attention.

    A third derivative raises RuntimeError. Raises ValueError for shapes, dtypes or a backend that
    do not fit.
    """
    shape = Shape(score_scale(scale, q.shape[-1]), 0, False)
    return _attention("cross_attention", q, k, v, None, None, shape, backend)


def _attention(
    operation: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_visible: Tensor | None,
    window: int | None,
    shape: Shape,
    backend: str,
) -> Tensor:
    check_tensors(operation, {"q": q, "k": k, "v": v})
    check_keys(operation, q, {"k": k, "v": v})
    check_groups(operation, q.shape[2], shape.offset, shape.group_size, shape.context_group)
    first = first_visible_keys(operation, q, k.shape[2], first_visible, window, shape, own=False)
    widest = max(q.shape[-1], v.shape[-1])
    backend = resolve_backend(backend, q.device, q.dtype, widest, operation)
    return attend(Inputs(q, k, v, None, None, first), shape, backend)


def causal_attention_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    context_offset: int = 0,
    group_size: int = 1,
    context_group: int | None = None,
    first_visible: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The definition in plain operations, for tests and readers."""
    group = group_size if context_group is None else context_group
    shape = Shape(score_scale(scale, q.shape[-1]), context_offset, causal, group_size, group)
    first = first_visible_keys("definition", q, k.shape[2], first_visible, window, shape, own=False)
    return attention_definition(q, k, v, None, None, first, shape)
