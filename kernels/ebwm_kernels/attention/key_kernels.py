"""The Triton kernels of attention in which a program owns a tile of keys.

    kernel          what it computes     products per tile of rows
    _gradient_key   dK, dV               4
    _second_key     gK, gV               6, with B and C 8; two more if JOINT

The letters and layouts are those of query_kernels.py. OWN says that the keys are the queries' own,
in groups (dk*, dv*, gk*, gv*): K, V, B, C are then the own keys' tensors and every head has its
own. JOINT is that of second_query_kernels.py. Tiles are (keys, rows). No other program writes to
these keys, so there are no atomics.
"""

# As in row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ebwm_kernels.attention.intervals import (
    SIZES,
    common_rows,
    has_whole_tiles,
    head_and_row,
    inside,
    my_keys,
    rows_of_keys,
    steps_over,
    tile_at,
    tiles_of,
)
from ebwm_kernels.attention.row_tiles import (
    LOG2_E,
    add_mix,
    load,
    scores,
    statistic,
    store,
    zeros,
)
from ebwm_kernels.attention.spoiled_keys import gradient_again, second_again


@triton.jit
def _weights(
    k,
    q,
    normalizer,
    rows,
    first,
    last,
    factor,
    HEAD: tl.constexpr,
    LOWER: tl.constexpr,
    EDGES: tl.constexpr,
):
    """P' of a tile, exp(score - L) where a pair exists and 0 elsewhere; all exist but at EDGES."""
    p = tl.exp2(scores(k, q, HEAD) * factor - normalizer[None, :])
    if EDGES:
        p = tl.where(inside(rows, first, last, LOWER), p, 0.0)
    return p


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
    """dK = s dS' Q, dV = P' G, over all heads that share the keys."""
    sample, key_head, key = my_keys(C, heads, all_heads, heads_at_once, BN)
    seen = (sample, key_head, key)
    start, end, first, last = rows_of_keys(
        LAST_ROW, sample, key, S, C, offset, group_size, context_group, MASK, OWN, BN
    )
    LOWER: tl.constexpr = MASK.causal or OWN
    WHOLE: tl.constexpr = not OWN and has_whole_tiles(HEAD.precision)
    common, common_end = start, start
    if WHOLE:
        common, common_end = common_rows(
            LAST_ROW, sample, key, S, C, offset, group_size, context_group, BN, MASK
        )
    tiles = tiles_of(start, end, common, common_end, BM, WHOLE)
    k, v = load(K, AT.K, seen, C, BN, HEAD), load(V, AT.V, seen, C, BN, VALUE)
    dk, dv = zeros(BN, HEAD), zeros(BN, VALUE)
    for EDGES in tl.static_range(not WHOLE, 2):
        start, end = steps_over(tiles, EDGES, LOWER)
        num_steps = tl.cdiv(tl.maximum(end - start, 0), BM)
        for step in range(sharing * num_steps):
            head, row = head_and_row(step, num_steps, key_head, sharing, start, SHARED, BM)
            row = tile_at(row, tiles, EDGES, LOWER)
            place, rows = (sample, head, row), row + tl.arange(0, BM)
            own = (sample * (heads * sharing) + head) * S
            q = load(Q, AT.Q, place, S, BM, HEAD, not EDGES)
            g = load(G, AT.G, place, S, BM, VALUE, not EDGES)
            normalizer = statistic(L + own, rows, S) * LOG2_E
            delta = statistic(DELTA + own, rows, S)
            p = _weights(k, q, normalizer, rows, first, last, factor, HEAD, LOWER, EDGES)
            dv = add_mix(dv, p, g, HEAD)
            ds = p * (scores(v, g, HEAD) - delta[None, :])
            dk = add_mix(dk, ds, q, HEAD)
    store(DK, AT.DK, seen, C, dk, BN, HEAD, scale)
    store(DV, AT.DV, seen, C, dv, BN, VALUE)
    if MASK.causal or MASK.lower or OWN:
        gradient_again(
            Q, K, V, LAST_ROW, L, G, DELTA, DK, DV, AT, S, C, offset, group_size, context_group,
            sharing, heads, all_heads, heads_at_once, scale, factor, HEAD, VALUE, MASK, OWN,
            SHARED, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _second_key(
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
    """gK = s (Z' Q + dS' A), gV = (P (Sdot - mu))' G, over all heads that share the keys.

    JOINT: s Y' Q and P' gO are added.
    """
    sample, key_head, key = my_keys(C, heads, all_heads, heads_at_once, BN)
    seen = (sample, key_head, key)
    start, end, first, last = rows_of_keys(
        LAST_ROW, sample, key, S, C, offset, group_size, context_group, MASK, OWN, BN
    )
    LOWER: tl.constexpr = MASK.causal or OWN
    # Beyond 96 columns K, V, B and C leave no registers for a second loop.
    FITS: tl.constexpr = not KEYS or HEAD.padded <= 96
    WHOLE: tl.constexpr = FITS and not OWN and has_whole_tiles(HEAD.precision)
    common, common_end = start, start
    if WHOLE:
        common, common_end = common_rows(
            LAST_ROW, sample, key, S, C, offset, group_size, context_group, BN, MASK
        )
    tiles = tiles_of(start, end, common, common_end, BM, WHOLE)
    k, v = load(K, AT.K, seen, C, BN, HEAD), load(V, AT.V, seen, C, BN, VALUE)
    if KEYS:
        b, c = load(B, AT.B, seen, C, BN, HEAD), load(CV, AT.CV, seen, C, BN, VALUE)
    gk, gv = zeros(BN, HEAD), zeros(BN, VALUE)
    for EDGES in tl.static_range(not WHOLE, 2):
        start, end = steps_over(tiles, EDGES, LOWER)
        num_steps = tl.cdiv(tl.maximum(end - start, 0), BM)
        for step in range(sharing * num_steps):
            head, row = head_and_row(step, num_steps, key_head, sharing, start, SHARED, BM)
            row = tile_at(row, tiles, EDGES, LOWER)
            place, rows = (sample, head, row), row + tl.arange(0, BM)
            own = (sample * (heads * sharing) + head) * S
            q = load(Q, AT.Q, place, S, BM, HEAD, not EDGES)
            a = load(A, AT.A, place, S, BM, HEAD, not EDGES)
            normalizer, mu = statistic(L + own, rows, S) * LOG2_E, statistic(MU + own, rows, S)
            phi, delta = statistic(PHI + own, rows, S), statistic(DELTA + own, rows, S)
            p = _weights(k, q, normalizer, rows, first, last, factor, HEAD, LOWER, EDGES)
            sd = scores(k, a, HEAD)
            if KEYS:
                sd += scores(b, q, HEAD)
            sd = sd * scale - mu[None, :]
            g = load(G, AT.G, place, S, BM, VALUE, not EDGES)
            gv = add_mix(gv, p * sd, g, HEAD)
            ds = p * (scores(v, g, HEAD) - delta[None, :])
            gk = add_mix(gk, ds, a, HEAD)
            z = ds * sd - p * phi[None, :]
            if JOINT:
                g_out = load(GO, AT.GO, place, S, BM, VALUE, not EDGES)
                gv = add_mix(gv, p, g_out, HEAD)
                z += p * (scores(v, g_out, HEAD) - statistic(RHO + own, rows, S)[None, :])
            if KEYS:
                z += p * scores(c, g, HEAD)
            gk = add_mix(gk, z, q, HEAD)
    store(GK, AT.GK, seen, C, gk, BN, HEAD, scale)
    store(GV, AT.GV, seen, C, gv, BN, VALUE)
    if MASK.causal or MASK.lower or OWN:
        second_again(
            Q, K, V, LAST_ROW, L, G, GO, A, B, CV, MU, PHI, DELTA, RHO, GK, GV, AT, S, C, offset,
            group_size, context_group, sharing, heads, all_heads, heads_at_once, scale, factor,
            HEAD, VALUE, MASK, OWN, SHARED, KEYS, JOINT, BM, BN,
        )  # fmt: skip
