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

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ebwm_kernels.attention.ops import PRODUCTS
from ebwm_kernels.attention.schema import NUM_INPUTS, NUM_REST
from ebwm_kernels.attention.tensors import Inputs
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


def _flops_of(made: tuple[int, int], arguments: Sequence) -> int:
    """FLOPs of (products, those of values among them); arguments: an operation's from q on."""
    inputs = Inputs(*arguments[:NUM_INPUTS])
    rest = arguments[-NUM_REST:]
    q, k, v, k_self, _, first_visible = inputs
    return _flops(*made, q, k, v, k_self, first_visible, Shape(*rest[:-1]))


def _made(level: str, backend: str, with_keys: bool | None = None) -> tuple[int, int]:
    """(Products, those of values among them) of a level."""
    products, of_values = PRODUCTS[backend][level], VALUE_PRODUCTS[backend][level]
    if with_keys is None:
        return products, of_values
    return products[with_keys], of_values[with_keys]


@register_flop_formula(torch.ops.ebwm.attention, get_raw=True)
def _(*arguments, out_val=None):
    return _flops_of(_made("forward", arguments[-1]), arguments)


@register_flop_formula(torch.ops.ebwm.attention_gradient, get_raw=True)
def _(_grad, *arguments, out_val=None):
    *arguments, with_keys, _compiled = arguments
    return _flops_of(_made("gradient", arguments[-1], with_keys), arguments)


@register_flop_formula(torch.ops.ebwm.attention_double_backward, get_raw=True)
def _(_a, b, _c, _b_self, _c_self, _grad, *arguments, out_val=None):
    return _flops_of(_made("double_backward", arguments[-1], b is not None), arguments)


@register_flop_formula(torch.ops.ebwm.attention_double_backward_up, get_raw=True)
def _(_a, _b_self, _c_self, _grad, *arguments, out_val=None):
    return _flops_of(UP, arguments)


@register_flop_formula(torch.ops.ebwm.attention_double_backward_down, get_raw=True)
def _(_a, _b_self, _c_self, _grad, _mu, _phi, _delta, g_out, *arguments, out_val=None):
    *arguments, with_keys = arguments
    products, of_values = DOWN[with_keys]
    more = 0 if g_out is None else DOWN_JOINT[with_keys]
    return _flops_of((products + more, of_values + more), arguments)


@register_flop_formula(torch.ops.ebwm.attention_tangent, get_raw=True)
def _(_a, b, _c, _b_self, _c_self, *arguments, out_val=None):
    return _flops_of(_made("tangent", arguments[-1], b is not None), arguments)
