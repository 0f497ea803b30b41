"""The Triton kernels of attention in which a program owns a tile of keys.

    kernel          what it computes     products per tile of rows
    _gradient_key   dK, dV               4
    _second_key     gK, gV               6, with B and C 8

The letters and layouts are those of query_kernels.py. OWN says that the keys are the queries' own,
in groups (dk*, dv*, gk*, gv*): K, V, B, C are then the own keys' tensors and every head has its
own. Tiles are (keys, rows). No other program writes to these keys, so there are no atomics.
"""

# As in row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ebwm_kernels.attention.intervals import (
    SIZES,
    head_and_tile,
    inside,
    rows_of_context,
    rows_of_own,
)
from ebwm_kernels.attention.query_kernels import LOG2_E
from ebwm_kernels.attention.row_tiles import add_mix, put, rows_of, scores, statistic, zeros


@triton.jit
def _my_keys(C, all_heads, heads_at_once, BN: tl.constexpr):
    """(key head, first key) of this program: the first keys come first, most rows see them."""
    key_head, tile = head_and_tile(tl.cdiv(C, BN), all_heads, heads_at_once)
    return key_head, tile * BN


@triton.jit
def _rows_of_keys(
    LAST_ROW,
    key_head,
    heads,
    key,
    S,
    C,
    offset,
    group_size,
    context_group,
    MASK: tl.constexpr,
    OWN: tl.constexpr,
    BN: tl.constexpr,
):
    if OWN:
        start, end, first, last = rows_of_own(key, S, group_size, BN)
    else:
        start, end, first, last = rows_of_context(
            LAST_ROW, key_head // heads, key, S, C, offset, group_size, context_group, BN, MASK
        )
    return start, end, first, last


@triton.jit
def _head_and_row(step, tiles, key_head, sharing, start, SHARED: tl.constexpr, BM: tl.constexpr):
    """(query head, first row) of a step of the one loop over heads and rows: two nested loops cost
    40 registers. Without SHARED keys there is nothing to divide.
    """
    if SHARED:
        head, row = key_head * sharing + step // tiles, start + step % tiles * BM
    else:
        head, row = key_head, start + step * BM
    return head, row


@triton.jit
def _weights(k, q, normalizer, visible, factor, HEAD: tl.constexpr):
    """P' of a tile, exp(score - L) where a pair exists and 0 elsewhere."""
    score = scores(k, q, HEAD) * factor
    return tl.where(visible, tl.exp2(score - normalizer[None, :]), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _gradient_key(
    Q,
    K,
    V,
    LAST_ROW,
    L,
    G,
    DELTA,
    DK,
    DV,
    S,
    C,
    offset,
    group_size,
    context_group,
    sharing,
    heads,
    all_heads,
    heads_at_once,
    scale,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    MASK: tl.constexpr,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dK = s dS' Q, dV = P' G, over all heads that share the keys."""
    key_head, key = _my_keys(C, all_heads, heads_at_once, BN)
    keys = key + tl.arange(0, BN)
    seen = key_head * C
    start, end, first, last = _rows_of_keys(
        LAST_ROW, key_head, heads, key, S, C, offset, group_size, context_group, MASK, OWN, BN
    )
    LOWER: tl.constexpr = MASK.causal or OWN
    k, v = rows_of(K, seen, keys, C, HEAD), rows_of(V, seen, keys, C, VALUE)
    dk, dv = zeros(BN, HEAD), zeros(BN, VALUE)
    tiles = tl.cdiv(tl.maximum(end - start, 0), BM)
    for step in range(sharing * tiles):
        head, row = _head_and_row(step, tiles, key_head, sharing, start, SHARED, BM)
        own = head * S
        rows = row + tl.arange(0, BM)
        q, g = rows_of(Q, own, rows, S, HEAD), rows_of(G, own, rows, S, VALUE)
        normalizer, delta = statistic(L, own, rows, S) * LOG2_E, statistic(DELTA, own, rows, S)
        p = _weights(k, q, normalizer, inside(rows, first, last, LOWER), factor, HEAD)
        dv = add_mix(dv, p, g, HEAD)
        ds = p * (scores(v, g, HEAD) - delta[None, :])
        dk = add_mix(dk, ds, q, HEAD)
    put(DK, seen, keys, C, dk, HEAD, scale)
    put(DV, seen, keys, C, dv, VALUE)


@triton.jit(do_not_specialize=SIZES)
def _second_key(
    Q,
    K,
    V,
    LAST_ROW,
    L,
    G,
    A,
    B,
    CV,
    MU,
    PHI,
    DELTA,
    GK,
    GV,
    S,
    C,
    offset,
    group_size,
    context_group,
    sharing,
    heads,
    all_heads,
    heads_at_once,
    scale,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    MASK: tl.constexpr,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    KEYS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """gK = s (Z' Q + dS' A), gV = (P (Sdot - mu))' G, over all heads that share the keys."""
    key_head, key = _my_keys(C, all_heads, heads_at_once, BN)
    keys = key + tl.arange(0, BN)
    seen = key_head * C
    start, end, first, last = _rows_of_keys(
        LAST_ROW, key_head, heads, key, S, C, offset, group_size, context_group, MASK, OWN, BN
    )
    LOWER: tl.constexpr = MASK.causal or OWN
    k, v = rows_of(K, seen, keys, C, HEAD), rows_of(V, seen, keys, C, VALUE)
    if KEYS:
        b, c = rows_of(B, seen, keys, C, HEAD), rows_of(CV, seen, keys, C, VALUE)
    gk, gv = zeros(BN, HEAD), zeros(BN, VALUE)
    tiles = tl.cdiv(tl.maximum(end - start, 0), BM)
    for step in range(sharing * tiles):
        head, row = _head_and_row(step, tiles, key_head, sharing, start, SHARED, BM)
        own = head * S
        rows = row + tl.arange(0, BM)
        q, a = rows_of(Q, own, rows, S, HEAD), rows_of(A, own, rows, S, HEAD)
        normalizer, mu = statistic(L, own, rows, S) * LOG2_E, statistic(MU, own, rows, S)
        phi, delta = statistic(PHI, own, rows, S), statistic(DELTA, own, rows, S)
        p = _weights(k, q, normalizer, inside(rows, first, last, LOWER), factor, HEAD)
        sd = scores(k, a, HEAD)
        if KEYS:
            sd += scores(b, q, HEAD)
        sd = sd * scale - mu[None, :]
        g = rows_of(G, own, rows, S, VALUE)
        gv = add_mix(gv, p * sd, g, HEAD)
        ds = p * (scores(v, g, HEAD) - delta[None, :])
        gk = add_mix(gk, ds, a, HEAD)
        z = ds * sd - p * phi[None, :]
        if KEYS:
            z += p * scores(c, g, HEAD)
        gk = add_mix(gk, z, q, HEAD)
    put(GK, seen, keys, C, gk, HEAD, scale)
    put(GV, seen, keys, C, gv, VALUE)
