"""The tensors of one call of attention: what every level is given, and how they lie in memory.

    (B, H, S, d)    what operations take and return
    (B, S, H, d)    what a projection makes of its rows, and reads: positions first

A transposed view of the second is an argument like any other: Triton reads and writes it where it
is, and so does the reference, but for keys and values, whose products it makes of (B H, S, d)
memory. Outputs lie positions first, since a projection follows. A gradient lies as its tensor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What every level is given.

    q: (B, H, S, d). k: (B, H_kv, C, d). v: (B, H_kv, C, d_v). k_self (B, H, S, d) and v_self
    (B, H, S, d_v): own keys, or both None. first_visible: (B, S) integers, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_self: Tensor | None
    v_self: Tensor | None
    first_visible: Tensor | None


class Output(NamedTuple):
    """What the first level returns: O (B, H, S, d_v), and L (B, H, S), the logarithm of the sum of
    a row's exponentiated scores, in the precision of statistics.
    """

    out: Tensor
    log_normalizer: Tensor


class Gradients(NamedTuple):
    """dQ, dK, dV, dk*, dv*; None is what was not asked for, or has no tensor."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    k_self: Tensor | None
    v_self: Tensor | None


class Cotangents(NamedTuple):
    """On dQ, dK, dV, dk*, dv*, shaped as these; dK and dV, or those of the own key, may both be
    None (zero). For forward mode: tangents of Q, K, V, k*, v*.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    k_self: Tensor | None
    v_self: Tensor | None


class SecondGradients(NamedTuple):
    """gG, gQ, gK, gV, gk*, gv*, the last two None without own keys."""

    grad: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    k_self: Tensor | None
    v_self: Tensor | None


class Statistics(NamedTuple):
    """What the first half of a double backward leaves for the second: mu, phi and D of each row,
    (B, H, S), in the precision of statistics (attention/reference.py).
    """

    mu: Tensor
    phi: Tensor
    delta: Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums and statistics: float32 for half precisions."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def empty_output(q: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, H, S, width) for queries (B, H, S, d), positions first."""
    batch, heads, rows, _ = q.shape
    # no transposed view: forward mode asks of a view that its tangent lies as it does
    strides = (rows * heads * width, width, heads * width, 1)
    return q.new_empty_strided((batch, heads, rows, width), strides, dtype=dtype)


def empty_gradient(x: Tensor) -> Tensor:
    """As x (B, H, S, d), and lying like it, where each row of x is in one piece."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x)
