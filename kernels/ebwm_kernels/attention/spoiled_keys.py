"""What a program that owns a tile of keys does where a number that it wrote is not finite: the same
formulas, one row at a time. See spoiled_rows.py.

What spoils dV spoils dS as well, and what spoils gV spoils Z: dK and gK tell.
"""

# As in row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ebwm_kernels.attention.intervals import head_and_row, my_keys, rows_of_keys
from ebwm_kernels.attention.one_by_one import (
    add_seen,
    is_spoiled,
    part_of,
    sees_one,
    weights_of_one,
)
from ebwm_kernels.attention.row_tiles import LOG2_E, load, row_dot, store, zeros


@triton.jit(noinline=True)
def gradient_again(
    Q,
    K,
    V,
    LAST_ROW,
    L,
    G,
    DELTA,
    DK,
    DV,
    AT,
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
    """dK, dV of a tile of keys, each from the rows that see it alone."""
    sample, key_head, key = my_keys(C, heads, all_heads, heads_at_once, BN)
    if is_spoiled(DK, AT.DK, (sample, key_head, key), C, BN, HEAD):
        PART: tl.constexpr = part_of(HEAD.padded, VALUE.padded)
        for part in range(key, tl.minimum(key + BN, C), PART):
            seen = (sample, key_head, part)
            start, end, first, last = rows_of_keys(
                LAST_ROW, sample, part, S, C, offset, group_size, context_group, MASK, OWN, PART
            )
            LOWER: tl.constexpr = MASK.causal or OWN
            k, v = load(K, AT.K, seen, C, PART, HEAD), load(V, AT.V, seen, C, PART, VALUE)
            dk, dv = zeros(PART, HEAD), zeros(PART, VALUE)
            num_rows = tl.maximum(end - start, 0)
            for step in range(sharing * num_rows):
                head, row = head_and_row(step, num_rows, key_head, sharing, start, SHARED, 1)
                sees = sees_one(row, first, last, LOWER)
                place, own = (sample, head, row), (sample * (heads * sharing) + head) * S + row
                q, g = load(Q, AT.Q, place, S, 1, HEAD), load(G, AT.G, place, S, 1, VALUE)
                p = weights_of_one(k, q, tl.load(L + own) * LOG2_E, factor, HEAD)
                dv = add_seen(dv, g, p, sees, VALUE)
                ds = p * (row_dot(v, g, VALUE) - tl.load(DELTA + own))
                dk = add_seen(dk, q, ds, sees, HEAD)
            store(DK, AT.DK, seen, C, dk, PART, HEAD, scale)
            store(DV, AT.DV, seen, C, dv, PART, VALUE)


@triton.jit(noinline=True)
def second_again(
    Q,
    K,
    V,
    LAST_ROW,
    L,
    G,
    GO,
    A,
    B,
    CV,
    MU,
    PHI,
    DELTA,
    RHO,
    GK,
    GV,
    AT,
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
    JOINT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """gK, gV of a tile of keys, each from the rows that see it alone."""
    sample, key_head, key = my_keys(C, heads, all_heads, heads_at_once, BN)
    if is_spoiled(GK, AT.GK, (sample, key_head, key), C, BN, HEAD):
        PART: tl.constexpr = part_of(HEAD.padded, VALUE.padded)
        for part in range(key, tl.minimum(key + BN, C), PART):
            seen = (sample, key_head, part)
            start, end, first, last = rows_of_keys(
                LAST_ROW, sample, part, S, C, offset, group_size, context_group, MASK, OWN, PART
            )
            LOWER: tl.constexpr = MASK.causal or OWN
            k, v = load(K, AT.K, seen, C, PART, HEAD), load(V, AT.V, seen, C, PART, VALUE)
            if KEYS:
                b, c = load(B, AT.B, seen, C, PART, HEAD), load(CV, AT.CV, seen, C, PART, VALUE)
            gk, gv = zeros(PART, HEAD), zeros(PART, VALUE)
            num_rows = tl.maximum(end - start, 0)
            for step in range(sharing * num_rows):
                head, row = head_and_row(step, num_rows, key_head, sharing, start, SHARED, 1)
                sees = sees_one(row, first, last, LOWER)
                place, own = (sample, head, row), (sample * (heads * sharing) + head) * S + row
                q, a = load(Q, AT.Q, place, S, 1, HEAD), load(A, AT.A, place, S, 1, HEAD)
                g = load(G, AT.G, place, S, 1, VALUE)
                p = weights_of_one(k, q, tl.load(L + own) * LOG2_E, factor, HEAD)
                sd, e = row_dot(k, a, HEAD), -tl.load(PHI + own)
                if KEYS:
                    sd += row_dot(b, q, HEAD)
                    e += row_dot(c, g, VALUE)
                sd = sd * scale - tl.load(MU + own)
                gv = add_seen(gv, g, p * sd, sees, VALUE)
                if JOINT:
                    g_out = load(GO, AT.GO, place, S, 1, VALUE)
                    gv = add_seen(gv, g_out, p, sees, VALUE)
                    e += row_dot(v, g_out, VALUE) - tl.load(RHO + own)
                ds = p * (row_dot(v, g, VALUE) - tl.load(DELTA + own))
                gk = add_seen(gk, a, ds, sees, HEAD)
                gk = add_seen(gk, q, ds * sd + p * e, sees, HEAD)
            store(GK, AT.GK, seen, C, gk, PART, HEAD, scale)
            store(GV, AT.GV, seen, C, gv, PART, VALUE)
