"""FLOPs of the attention operations, for torch.utils.flop_counter: import this before counting.

    import ebwm_kernels.attention.flops
    with torch.utils.flop_counter.FlopCounterMode() as counter: ...

Counted are the products of the (query, key) pairs that exist: what groups, windows and documents
hide is not. On the meta device and for fake tensors the values of first_visible are unknown, and
nothing is hidden by it. Own keys count with groups only: one per row needs no product.

A module of its own because PyTorch's counter imports Triton, 60 MiB that a process on a CPU has no
use for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ebwm_kernels.attention.ops import PRODUCTS
from ebwm_kernels.attention.visibility import Shape, hidden_pairs, visible_pairs

# Of ops.PRODUCTS, those whose inner or outer dimension is that of values; the others have that of
# keys.
VALUE_PRODUCTS = {
    "reference": {
        "forward": 1,
        "gradient": (1, 2),
        "double_backward": (3, 5),
        "tangent": (1, 2),
    },
    "triton": {
        "forward": 1,
        "gradient": (1, 3),
        "double_backward": (4, 7),
        "tangent": (1, 2),
    },
}


# The halves of Triton's double backward (joint.py): products and those of values among them, the
# second without and with gradients of K and V, and what the ordinary backward adds, all of values.
UP = (3, 1)
DOWN = ((4, 1), (10, 3))
DOWN_JOINT = (1, 3)


def _flops(
    products: int,
    value_products: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    first_visible: Tensor | None,
    shape: Shape,
) -> int:
    batch, heads, num_queries, d = q.shape
    num_keys = k.shape[2]
    pairs = batch * visible_pairs(num_queries, num_keys, *shape[1:])
    if first_visible is not None and not _is_unknown(first_visible):
        pairs -= hidden_pairs(first_visible, num_keys, shape)
    if k_self is not None and shape.group_size > 1:
        pairs += batch * num_queries * shape.group_size
    numbers = (products - value_products) * d + value_products * v.shape[-1]
    return 2 * heads * pairs * numbers


def _is_unknown(x: Tensor) -> bool:
    return x.is_meta or isinstance(x, FakeTensor)


@register_flop_formula(torch.ops.ebwm.attention, get_raw=True)
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
    out_val=None,
):
    shape = Shape(scale, offset, causal, group_size, context_group)
    products = PRODUCTS[backend]["forward"]
    value_products = VALUE_PRODUCTS[backend]["forward"]
    return _flops(products, value_products, q, k, v, k_self, first_visible, shape)


@register_flop_formula(torch.ops.ebwm.attention_gradient, get_raw=True)
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
    out_val=None,
):
    shape = Shape(scale, offset, causal, group_size, context_group)
    products = PRODUCTS[backend]["gradient"][with_keys]
    value_products = VALUE_PRODUCTS[backend]["gradient"][with_keys]
    return _flops(products, value_products, q, k, v, k_self, first_visible, shape)


@register_flop_formula(torch.ops.ebwm.attention_double_backward, get_raw=True)
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
    out_val=None,
):
    shape = Shape(scale, offset, causal, group_size, context_group)
    products = PRODUCTS[backend]["double_backward"][b is not None]
    value_products = VALUE_PRODUCTS[backend]["double_backward"][b is not None]
    return _flops(products, value_products, q, k, v, k_self, first_visible, shape)


@register_flop_formula(torch.ops.ebwm.attention_double_backward_up, get_raw=True)
def _(
    a,
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
    out_val=None,
):
    shape = Shape(scale, offset, causal, group_size, context_group)
    return _flops(*UP, q, k, v, k_self, first_visible, shape)


@register_flop_formula(torch.ops.ebwm.attention_double_backward_down, get_raw=True)
def _(
    a,
    b_self,
    c_self,
    grad,
    mu,
    phi,
    delta,
    g_out,
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
    *,
    out_val=None,
):
    shape = Shape(scale, offset, causal, group_size, context_group)
    products, value_products = DOWN[with_keys]
    if g_out is not None:
        more = DOWN_JOINT[with_keys]
        products, value_products = products + more, value_products + more
    return _flops(products, value_products, q, k, v, k_self, first_visible, shape)


@register_flop_formula(torch.ops.ebwm.attention_tangent, get_raw=True)
def _(
    a,
    b,
    c,
    b_self,
    c_self,
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
    out_val=None,
):
    shape = Shape(scale, offset, causal, group_size, context_group)
    products = PRODUCTS[backend]["tangent"][b is not None]
    value_products = VALUE_PRODUCTS[backend]["tangent"][b is not None]
    return _flops(products, value_products, q, k, v, k_self, first_visible, shape)
