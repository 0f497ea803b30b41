"""The Triton kernels of the second order in which a program owns a tile of query rows.

    kernel            what it computes                               products per tile of keys
    _tangent          mu, gG, phi, D; or the tangent of O alone      3, with B and C 5
    _second_own       gk*, gv*, z*, ds* of a single own key          none
    _second_query     gQ                                             4, with B and C 7

Letters and layouts are those of query_kernels.py. KEYS says that there are cotangents B, C on the
context's dK, dV; on those of own keys there always are.

A row's phi is G . gG: no second pass over the keys for statistics.
"""

# As in row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ebwm_kernels.attention.intervals import (
    SIZES,
    common_keys,
    context_keys,
    inside,
    my_rows,
    own_keys,
)
from ebwm_kernels.attention.query_kernels import LOG2_E, weights_of
from ebwm_kernels.attention.row_tiles import (
    add_mix,
    add_scaled,
    mean_row,
    put,
    put_statistic,
    row_dot,
    rows_of,
    scaled,
    scores,
    statistic,
    zeros,
)


@triton.jit
def _tangent_over(
    q,
    a,
    K,
    V,
    B,
    CV,
    base,
    num_keys,
    start,
    end,
    first,
    last,
    normalizer,
    centre,
    mu,
    moved,
    factor,
    scale,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BN: tl.constexpr,
    LOWER: tl.constexpr,
    KEYS: tl.constexpr,
):
    """mu + rowsum(P Sdot) and moved + (P Sdot) V + P C over keys start .. end - 1, Sdot without its
    centre.
    """
    for first_key in range(start, end, BN):
        keys = first_key + tl.arange(0, BN)
        k, v = rows_of(K, base, keys, num_keys, HEAD), rows_of(V, base, keys, num_keys, VALUE)
        p = weights_of(q, k, normalizer, inside(keys, first, last, LOWER), factor, HEAD)
        sd = scores(a, k, HEAD)
        if KEYS:
            sd += scores(q, rows_of(B, base, keys, num_keys, HEAD), HEAD)
            moved = add_mix(moved, p, rows_of(CV, base, keys, num_keys, VALUE), HEAD)
        weighted = p * (sd * scale - centre[:, None])
        mu += tl.sum(weighted, 1)
        moved = add_mix(moved, weighted, v, HEAD)
    return mu, moved


@triton.jit(do_not_specialize=SIZES)
def _tangent(
    Q,
    K,
    V,
    KO,
    VO,
    FIRST,
    O,
    L,
    G,
    A,
    B,
    CV,
    BO,
    CO,
    GG,
    MU,
    PHI,
    DELTA,
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
    KEYS: tl.constexpr,
    SECOND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """mu = rowsum(P Sdot), gG = (P Sdot) V + P C - mu O, and if SECOND phi = G . gG and D = G . O
    for the kernels after it. gG is the tangent of O where A, B, C, b*, c* are those of the inputs.

    Sdot loses s A . (a mean key) per row, which is exact for any constant (sum P = 1) and keeps
    what keys have in common out of the rounding.
    """
    head, row = my_rows(S, all_heads, heads_at_once, BM)
    own, seen = head * S, head // sharing * C
    rows = row + tl.arange(0, BM)
    start, end, first, last = context_keys(
        FIRST, head, heads, row, S, C, offset, group_size, context_group, BM, MASK
    )
    common, common_end = common_keys(
        FIRST, head, heads, row, S, C, offset, group_size, context_group, BM, MASK
    )
    a = rows_of(A, own, rows, S, HEAD)
    centre = row_dot(a, mean_row(K, seen, common, common_end, HEAD), HEAD) * scale
    q = rows_of(Q, own, rows, S, HEAD)
    normalizer = statistic(L, own, rows, S) * LOG2_E
    if OWN and not MASK.groups:
        k_self = rows_of(KO, own, rows, S, HEAD)
        p_own = tl.exp2(row_dot(q, k_self, HEAD) * factor - normalizer)
        sd_own = row_dot(a, k_self, HEAD) + row_dot(q, rows_of(BO, own, rows, S, HEAD), HEAD)
        mu = p_own * (sd_own * scale - centre)
        moved = scaled(rows_of(VO, own, rows, S, VALUE), mu, HEAD)
        moved = add_scaled(moved, rows_of(CO, own, rows, S, VALUE), p_own, HEAD)
    else:
        mu = tl.zeros([BM], HEAD.acc)
        moved = zeros(BM, VALUE)
    mu, moved = _tangent_over(
        q, a, K, V, B, CV, seen, C, start, end, first, last,
        normalizer, centre, mu, moved, factor, scale, HEAD, VALUE, BN, MASK.lower, KEYS,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        mu, moved = _tangent_over(
            q, a, KO, VO, BO, CO, own, S, start, end, first, last,
            normalizer, centre, mu, moved, factor, scale, HEAD, VALUE, BN, True, True,
        )  # fmt: skip
    out = rows_of(O, own, rows, S, VALUE)
    moved = add_scaled(moved, out, -mu, HEAD)
    put(GG, own, rows, S, moved, VALUE)
    if SECOND:
        g = rows_of(G, own, rows, S, VALUE)
        put_statistic(MU, own, rows, S, mu + centre)
        put_statistic(PHI, own, rows, S, row_dot(moved, g, HEAD))
        put_statistic(DELTA, own, rows, S, row_dot(out, g, HEAD))


@triton.jit(do_not_specialize=SIZES)
def _second_own(
    Q,
    KO,
    VO,
    L,
    G,
    A,
    BO,
    CO,
    MU,
    PHI,
    DELTA,
    GKO,
    GVO,
    Z,
    DS,
    S,
    all_heads,
    heads_at_once,
    scale,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BM: tl.constexpr,
):
    """A single own key's column: gk* = s (z* q + ds* A), gv* = p* (sd* - mu) G, and z*, ds* for gQ.

    Groups of own keys have _second_key instead.
    """
    head, row = my_rows(S, all_heads, heads_at_once, BM)
    own = head * S
    rows = row + tl.arange(0, BM)
    q, a = rows_of(Q, own, rows, S, HEAD), rows_of(A, own, rows, S, HEAD)
    g, k_self = rows_of(G, own, rows, S, VALUE), rows_of(KO, own, rows, S, HEAD)
    p_own = tl.exp2(row_dot(q, k_self, HEAD) * factor - statistic(L, own, rows, S) * LOG2_E)
    sd_own = row_dot(a, k_self, HEAD) + row_dot(q, rows_of(BO, own, rows, S, HEAD), HEAD)
    dp_own = row_dot(g, rows_of(VO, own, rows, S, VALUE), HEAD) - statistic(DELTA, own, rows, S)
    ds = p_own * dp_own
    pd = p_own * (sd_own * scale - statistic(MU, own, rows, S))
    e_own = row_dot(g, rows_of(CO, own, rows, S, VALUE), HEAD) - statistic(PHI, own, rows, S)
    z = pd * dp_own + p_own * e_own
    put(GKO, own, rows, S, add_scaled(scaled(q, scale * z, HEAD), a, scale * ds, HEAD), HEAD)
    put(GVO, own, rows, S, scaled(g, pd, HEAD), VALUE)
    put_statistic(Z, own, rows, S, z)
    put_statistic(DS, own, rows, S, ds)


@triton.jit
def _second_over(
    q,
    a,
    g,
    K,
    V,
    B,
    CV,
    base,
    num_keys,
    start,
    end,
    first,
    last,
    normalizer,
    mu,
    phi,
    delta,
    gq,
    left_over,
    factor,
    scale,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BN: tl.constexpr,
    LOWER: tl.constexpr,
    KEYS: tl.constexpr,
):
    """gq + Z K + dS B and left_over + rowsum(Z) over keys start .. end - 1."""
    for first_key in range(start, end, BN):
        keys = first_key + tl.arange(0, BN)
        k = rows_of(K, base, keys, num_keys, HEAD)
        p = weights_of(q, k, normalizer, inside(keys, first, last, LOWER), factor, HEAD)
        sd = scores(a, k, HEAD)
        if KEYS:  # in this order: others cost up to hundreds of registers
            b = rows_of(B, base, keys, num_keys, HEAD)
            sd += scores(q, b, HEAD)
        ds = p * (scores(g, rows_of(V, base, keys, num_keys, VALUE), HEAD) - delta[:, None])
        if KEYS:
            gq = add_mix(gq, ds, b, HEAD)
        z = ds * (sd * scale - mu[:, None]) - p * phi[:, None]
        if KEYS:
            z += p * scores(g, rows_of(CV, base, keys, num_keys, VALUE), HEAD)
        z = z.to(K.dtype.element_ty)
        left_over += tl.sum(z.to(HEAD.acc), 1)
        gq = add_mix(gq, z, k, HEAD)
    return gq, left_over


@triton.jit(do_not_specialize=SIZES)
def _second_query(
    Q,
    K,
    V,
    KO,
    VO,
    FIRST,
    L,
    G,
    A,
    B,
    CV,
    BO,
    CO,
    MU,
    PHI,
    DELTA,
    Z,
    DS,
    GQ,
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
    KEYS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """gQ = s (Z K + dS B + z* k* + ds* b*); Z of a row sums to zero, see _gradient_query."""
    head, row = my_rows(S, all_heads, heads_at_once, BM)
    own, seen = head * S, head // sharing * C
    rows = row + tl.arange(0, BM)
    start, end, first, last = context_keys(
        FIRST, head, heads, row, S, C, offset, group_size, context_group, BM, MASK
    )
    q, a = rows_of(Q, own, rows, S, HEAD), rows_of(A, own, rows, S, HEAD)
    g = rows_of(G, own, rows, S, VALUE)
    normalizer, mu = statistic(L, own, rows, S) * LOG2_E, statistic(MU, own, rows, S)
    phi, delta = statistic(PHI, own, rows, S), statistic(DELTA, own, rows, S)
    gq, left_over = zeros(BM, HEAD), tl.zeros([BM], HEAD.acc)
    gq, left_over = _second_over(
        q, a, g, K, V, B, CV, seen, C, start, end, first, last, normalizer, mu, phi, delta,
        gq, left_over, factor, scale, HEAD, VALUE, BN, MASK.lower, KEYS,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        gq, left_over = _second_over(
            q, a, g, KO, VO, BO, CO, own, S, start, end, first, last,
            normalizer, mu, phi, delta,
            gq, left_over, factor, scale, HEAD, VALUE, BN, True, True,
        )  # fmt: skip
    elif OWN:  # in the epilogue: nothing of it lives through the loop
        z_own = statistic(Z, own, rows, S)
        left_over += z_own
        gq = add_scaled(gq, rows_of(KO, own, rows, S, HEAD), z_own, HEAD)
        gq = add_scaled(gq, rows_of(BO, own, rows, S, HEAD), statistic(DS, own, rows, S), HEAD)
    start, end = common_keys(
        FIRST, head, heads, row, S, C, offset, group_size, context_group, BM, MASK
    )
    gq = add_scaled(gq, mean_row(K, seen, start, end, HEAD), -left_over, HEAD)
    put(GQ, own, rows, S, gq, HEAD, scale)
