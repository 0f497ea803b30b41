"""How the reference sees the tensors of a call: by the heads that share keys, in the precision of
sums, keys and values as the columns of a row.
"""

from __future__ import annotations

from typing import TypeVar, overload

import torch
from torch import Tensor

from ebwm_kernels.attention.row_blocks import Columns
from ebwm_kernels.attention.tensors import (
    Gradients,
    SecondGradients,
    empty_gradient,
    wide_dtype,
)
from ebwm_kernels.attention.visibility import Shape

Result = TypeVar("Result", Gradients, SecondGradients)


@overload
def by_key_head(x: Tensor, k: Tensor) -> Tensor: ...
@overload
def by_key_head(x: Tensor | None, k: Tensor) -> Tensor | None: ...
def by_key_head(x: Tensor | None, k: Tensor) -> Tensor | None:
    """(B, H, S, n) -> (B, H_kv, group, S, n) in the precision of sums: a view, but of half
    precisions.
    """
    if x is None:
        return None
    key_heads = k.shape[1]
    grouped = x.unflatten(1, (key_heads, x.shape[1] // key_heads))
    return grouped.to(wide_dtype(x.dtype))


def statistics_by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """(B, H, S) -> (B, H_kv, group, S, 1)."""
    return by_key_head(x.unsqueeze(-1), k)


@overload
def flat_keys(x: Tensor) -> Tensor: ...
@overload
def flat_keys(x: Tensor | None) -> Tensor | None: ...
def flat_keys(x: Tensor | None) -> Tensor | None:
    """(B, H_kv, C, d) -> (B * H_kv, C, d) in the precision of sums: a view if heads come first."""
    if x is None:
        return None
    return x.to(wide_dtype(x.dtype)).flatten(0, 1)


def columns(context: Tensor | None, own: Tensor | None, shape: Shape, k: Tensor) -> Columns:
    """What belongs to the columns of a row; own keys are among them with groups only."""
    with_groups = shape.group_size > 1
    return Columns(flat_keys(context), by_key_head(own, k) if with_groups else None)


def one_per_row(own: Tensor | None, k: Tensor, shape: Shape) -> Tensor | None:
    """What belongs to own keys that are one per row: without groups."""
    return by_key_head(own, k) if shape.group_size == 1 else None


@overload
def wide_gradient(x: Tensor) -> Tensor: ...
@overload
def wide_gradient(x: Tensor | None) -> Tensor | None: ...
def wide_gradient(x: Tensor | None) -> Tensor | None:
    """Memory for the gradient of x, lying like it, in the precision of sums."""
    if x is None:
        return None
    empty = empty_gradient(x)
    return torch.empty_like(empty, dtype=wide_dtype(x.dtype))


@overload
def zeroed(x: Tensor) -> Tensor: ...
@overload
def zeroed(x: Tensor | None) -> Tensor | None: ...
def zeroed(x: Tensor | None) -> Tensor | None:
    """The same memory, filled with zeros."""
    return None if x is None else x.zero_()


def rounded(result: Result, dtype: torch.dtype) -> Result:
    """Gradients in the precision of the call's tensors."""
    return result._make(None if x is None else x.to(dtype) for x in result)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Row-wise inner product (..., 1)."""
    return (x * y).sum(-1, keepdim=True)
