"""FLOPs of the attention operations, for torch.utils.flop_counter: import this before counting.

    import ebwm_kernels.attention.flops
    with torch.utils.flop_counter.FlopCounterMode() as counter: ...

A module of its own because PyTorch's counter imports Triton, 60 MiB that a process on a CPU has no
use for.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from ebwm_kernels.attention.ops import PRODUCTS, visible_pairs


def _flops(products: int, q_shape, k_shape, offset: int, causal: bool) -> int:
    batch, heads, queries, d = q_shape
    return 2 * products * batch * heads * visible_pairs(queries, k_shape[2], offset, causal) * d


@register_flop_formula(torch.ops.ebwm.attention)
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
    *,
    out_shape=None,
):
    return _flops(PRODUCTS[backend]["forward"], q, k, offset, causal)


@register_flop_formula(torch.ops.ebwm.attention_gradient)
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
    *,
    out_shape=None,
):
    return _flops(PRODUCTS[backend]["gradient"][with_keys], q, k, offset, causal)


@register_flop_formula(torch.ops.ebwm.attention_double_backward)
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
    *,
    out_shape=None,
):
    return _flops(PRODUCTS[backend]["double_backward"][b is not None], q, k, offset, causal)
