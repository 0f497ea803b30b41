"""The Triton kernels of the second order in which a program owns a tile of query rows.

    kernel            what it computes                               products per tile of keys
    _tangent          mu, gG, phi, D; or the tangent of O alone      3, with B and C 5
    _second_own       gk*, gv*, z*, ds* of a single own key          none
    _second_query     gQ                                             4, with B and C 7, or 9;
                                                                     one more if JOINT

Letters and layouts are those of query_kernels.py. KEYS says that there are cotangents B, C on the
context's dK, dV; on those of own keys there always are. JOINT says that the ordinary backward of
the loss's gradient gO on O is part of it (joint.py): rho = rowsum(gO O), Y = P (gO V' - rho).

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
    has_whole_tiles,
    my_rows,
    own_keys,
    steps_over,
    tile_at,
    tiles_of,
)
from ebwm_kernels.attention.query_kernels import weights_of
from ebwm_kernels.attention.row_tiles import (
    LOG2_E,
    add_mix,
    add_scaled,
    add_sums,
    head_of,
    load,
    mean_row,
    no_sums,
    put_statistic,
    row_dot,
    rows_of,
    scaled,
    scores,
    statistic,
    store,
    sums_of,
    zeros,
)
from ebwm_kernels.attention.spoiled_rows import second_again, tangent_again


@triton.jit
def _tangent_over(
    q,
    a,
    K,
    V,
    B,
    CV,
    num_keys,
    tiles,
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
    WHOLE: tl.constexpr,
    LOWER: tl.constexpr,
    KEYS: tl.constexpr,
):
    """mu + rowsum(P Sdot) and moved + (P Sdot) V + P C over these tiles of keys, Sdot without its
    centre.
    """
    for EDGES in tl.static_range(not WHOLE, 2):
        start, end = steps_over(tiles, EDGES, LOWER)
        for step in range(start, end, BN):
            first_key = tile_at(step, tiles, EDGES, LOWER)
            k = rows_of(K, first_key, num_keys, BN, HEAD, not EDGES)
            v = rows_of(V, first_key, num_keys, BN, VALUE, not EDGES)
            p = weights_of(q, k, normalizer, first_key, first, last, factor, HEAD, BN, LOWER, EDGES)
            sd = scores(a, k, HEAD)
            if KEYS:
                sd += scores(q, rows_of(B, first_key, num_keys, BN, HEAD, not EDGES), HEAD)
                c = rows_of(CV, first_key, num_keys, BN, VALUE, not EDGES)
                moved = add_mix(moved, p, c, HEAD)
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
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    place, rows = (sample, head, row), row + tl.arange(0, BM)
    k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
    v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
    b_head, c_head = k_head, v_head
    if KEYS:
        b_head = head_of(B, AT.B, sample, head // sharing, HEAD)
        c_head = head_of(CV, AT.CV, sample, head // sharing, VALUE)
    start, end, first, last = context_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    common, common_end = common_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    WHOLE: tl.constexpr = has_whole_tiles(HEAD.precision)
    tiles = tiles_of(start, end, common, common_end, BN, WHOLE)
    a = load(A, AT.A, place, S, BM, HEAD)
    centre = row_dot(a, mean_row(k_head, common, common_end, HEAD), HEAD) * scale
    q = load(Q, AT.Q, place, S, BM, HEAD)
    normalizer = statistic(L + own, rows, S) * LOG2_E
    if OWN and not MASK.groups:
        k_self = load(KO, AT.KO, place, S, BM, HEAD)
        p_own = tl.exp2(row_dot(q, k_self, HEAD) * factor - normalizer)
        sd_own = row_dot(a, k_self, HEAD) + row_dot(q, load(BO, AT.BO, place, S, BM, HEAD), HEAD)
        mu = p_own * (sd_own * scale - centre)
        moved = scaled(load(VO, AT.VO, place, S, BM, VALUE), mu, HEAD)
        moved = add_scaled(moved, load(CO, AT.CO, place, S, BM, VALUE), p_own, HEAD)
    else:
        mu = tl.zeros([BM], HEAD.acc)
        moved = zeros(BM, VALUE)
    mu, moved = _tangent_over(
        q, a, k_head, v_head, b_head, c_head, C, tiles, first, last,
        normalizer, centre, mu, moved, factor, scale, HEAD, VALUE, BN, WHOLE, MASK.lower, KEYS,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        tiles = tiles_of(start, end, start, start, BN, False)
        k_own, v_own = (
            head_of(KO, AT.KO, sample, head, HEAD),
            head_of(VO, AT.VO, sample, head, VALUE),
        )
        b_own, c_own = (
            head_of(BO, AT.BO, sample, head, HEAD),
            head_of(CO, AT.CO, sample, head, VALUE),
        )
        mu, moved = _tangent_over(
            q, a, k_own, v_own, b_own, c_own, S, tiles, first, last,
            normalizer, centre, mu, moved, factor, scale, HEAD, VALUE, BN, False, True, True,
        )  # fmt: skip
    out = load(O, AT.O, place, S, BM, VALUE)
    moved = add_scaled(moved, out, -mu, HEAD)
    store(GG, AT.GG, place, S, moved, BM, VALUE)
    if SECOND:
        g = load(G, AT.G, place, S, BM, VALUE)
        put_statistic(MU + own, rows, S, mu + centre)
        put_statistic(PHI + own, rows, S, row_dot(moved, g, HEAD))
        put_statistic(DELTA + own, rows, S, row_dot(out, g, HEAD))
    if MASK.causal or MASK.lower or MASK.groups:
        tangent_again(
            Q, K, V, KO, VO, FIRST, O, L, G, A, B, CV, BO, CO, GG, MU, PHI, DELTA, AT, S, C,
            offset, group_size, context_group, sharing, heads, all_heads, heads_at_once, scale,
            factor, HEAD, VALUE, MASK, OWN, KEYS, SECOND, BM, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def _second_own(
    Q,
    KO,
    VO,
    O,
    L,
    G,
    GO,
    A,
    BO,
    CO,
    MU,
    PHI,
    DELTA,
    RHO,
    GKO,
    GVO,
    Z,
    DS,
    AT,
    S,
    heads,
    all_heads,
    heads_at_once,
    scale,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    JOINT: tl.constexpr,
    BM: tl.constexpr,
):
    """A single own key's column: gk* = s (z* q + ds* A), gv* = p* (sd* - mu) G, and z*, ds* for gQ.

    JOINT: z* + y* in place of z*, gv* + p* gO, and rho for the kernels after it. Groups of own keys
    have _second_key instead.
    """
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    place, rows = (sample, head, row), row + tl.arange(0, BM)
    q, a = load(Q, AT.Q, place, S, BM, HEAD), load(A, AT.A, place, S, BM, HEAD)
    g, k_self = load(G, AT.G, place, S, BM, VALUE), load(KO, AT.KO, place, S, BM, HEAD)
    p_own = tl.exp2(row_dot(q, k_self, HEAD) * factor - statistic(L + own, rows, S) * LOG2_E)
    sd_own = row_dot(a, k_self, HEAD) + row_dot(q, load(BO, AT.BO, place, S, BM, HEAD), HEAD)
    dp_own = row_dot(g, load(VO, AT.VO, place, S, BM, VALUE), HEAD) - statistic(
        DELTA + own, rows, S
    )
    ds = p_own * dp_own
    pd = p_own * (sd_own * scale - statistic(MU + own, rows, S))
    e_own = row_dot(g, load(CO, AT.CO, place, S, BM, VALUE), HEAD) - statistic(PHI + own, rows, S)
    z = pd * dp_own + p_own * e_own
    g_v_self = scaled(g, pd, HEAD)
    if JOINT:
        g_out = load(GO, AT.GO, place, S, BM, VALUE)
        rho = row_dot(g_out, load(O, AT.O, place, S, BM, VALUE), HEAD)
        put_statistic(RHO + own, rows, S, rho)
        z += p_own * (row_dot(g_out, load(VO, AT.VO, place, S, BM, VALUE), HEAD) - rho)
        g_v_self = add_scaled(g_v_self, g_out, p_own, HEAD)
    g_k_self = add_scaled(scaled(q, scale * z, HEAD), a, scale * ds, HEAD)
    store(GKO, AT.GKO, place, S, g_k_self, BM, HEAD)
    store(GVO, AT.GVO, place, S, g_v_self, BM, VALUE)
    put_statistic(Z + own, rows, S, z)
    put_statistic(DS + own, rows, S, ds)


@triton.jit
def _second_over(
    q,
    a,
    g,
    g_out,
    K,
    V,
    B,
    CV,
    num_keys,
    tiles,
    first,
    last,
    normalizer,
    mu,
    phi,
    delta,
    rho,
    gq,
    left_over,
    factor,
    scale,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,
    LOWER: tl.constexpr,
    KEYS: tl.constexpr,
    JOINT: tl.constexpr,
):
    """gq + Z K + dS B and left_over + rowsum(Z) over these tiles of keys; JOINT: Z + Y for Z."""
    # Four bytes and more than 96 columns: the registers do not hold all rows of a key at once. What
    # C and dS multiply has a loop of its own then, and P and dS are computed again, two products.
    apart: tl.constexpr = (
        KEYS and HEAD.padded > 96 and K[0].dtype.element_ty.primitive_bitwidth > 16
    )
    for EDGES in tl.static_range(not WHOLE, 2):
        start, end = steps_over(tiles, EDGES, LOWER)
        for step in range(start, end, BN):
            first_key = tile_at(step, tiles, EDGES, LOWER)
            k = rows_of(K, first_key, num_keys, BN, HEAD, not EDGES)
            p = weights_of(q, k, normalizer, first_key, first, last, factor, HEAD, BN, LOWER, EDGES)
            sd = scores(a, k, HEAD)
            if KEYS:  # in this order: others cost up to hundreds of registers
                b = rows_of(B, first_key, num_keys, BN, HEAD, not EDGES)
                sd += scores(q, b, HEAD)
            v = rows_of(V, first_key, num_keys, BN, VALUE, not EDGES)
            ds = p * (scores(g, v, HEAD) - delta[:, None])
            if KEYS and not apart:
                gq = add_mix(gq, ds, b, HEAD)
            z = ds * (sd * scale - mu[:, None]) - p * phi[:, None]
            if JOINT:
                z += p * (scores(g_out, v, HEAD) - rho[:, None])
            if KEYS and not apart:
                c = rows_of(CV, first_key, num_keys, BN, VALUE, not EDGES)
                z += p * scores(g, c, HEAD)
            z = z.to(K[0].dtype.element_ty)
            left_over = add_sums(left_over, z, HEAD)
            gq = add_mix(gq, z, k, HEAD)
    if apart:
        start, end, _, _ = tiles
        for first_key in range(start, end, BN):
            k = rows_of(K, first_key, num_keys, BN, HEAD)
            p = weights_of(q, k, normalizer, first_key, first, last, factor, HEAD, BN, LOWER, True)
            ds = p * (scores(g, rows_of(V, first_key, num_keys, BN, VALUE), HEAD) - delta[:, None])
            gq = add_mix(gq, ds, rows_of(B, first_key, num_keys, BN, HEAD), HEAD)
            z = p * scores(g, rows_of(CV, first_key, num_keys, BN, VALUE), HEAD)
            z = z.to(K[0].dtype.element_ty)
            left_over = add_sums(left_over, z, HEAD)
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
    GO,
    A,
    B,
    CV,
    BO,
    CO,
    MU,
    PHI,
    DELTA,
    RHO,
    Z,
    DS,
    GQ,
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
    KEYS: tl.constexpr,
    JOINT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """gQ = s (Z K + dS B + z* k* + ds* b*); Z of a row sums to zero, see _gradient_query.

    JOINT: s (Y K + y* k*) is added, of which the same holds; z* + y* comes from _second_own.
    """
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    place, rows = (sample, head, row), row + tl.arange(0, BM)
    k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
    v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
    b_head, c_head = k_head, v_head
    if KEYS:
        b_head = head_of(B, AT.B, sample, head // sharing, HEAD)
        c_head = head_of(CV, AT.CV, sample, head // sharing, VALUE)
    start, end, first, last = context_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    common, common_end = common_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    # Beyond 96 columns Q, A and G leave no registers for a second loop with two ends per row.
    FITS: tl.constexpr = not MASK.lower or HEAD.padded <= 96
    WHOLE: tl.constexpr = FITS and has_whole_tiles(HEAD.precision)
    tiles = tiles_of(start, end, common, common_end, BN, WHOLE)
    q, a = load(Q, AT.Q, place, S, BM, HEAD), load(A, AT.A, place, S, BM, HEAD)
    g = load(G, AT.G, place, S, BM, VALUE)
    normalizer, mu = statistic(L + own, rows, S) * LOG2_E, statistic(MU + own, rows, S)
    phi, delta = statistic(PHI + own, rows, S), statistic(DELTA + own, rows, S)
    g_out, rho = g, delta
    if JOINT:
        g_out, rho = load(GO, AT.GO, place, S, BM, VALUE), statistic(RHO + own, rows, S)
    gq, left_over = zeros(BM, HEAD), no_sums(BM, HEAD)
    gq, left_over = _second_over(
        q, a, g, g_out, k_head, v_head, b_head, c_head, C, tiles, first, last,
        normalizer, mu, phi, delta, rho,
        gq, left_over, factor, scale, HEAD, VALUE, BN, WHOLE, MASK.lower, KEYS, JOINT,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        tiles = tiles_of(start, end, start, start, BN, False)
        k_own, v_own = (
            head_of(KO, AT.KO, sample, head, HEAD),
            head_of(VO, AT.VO, sample, head, VALUE),
        )
        b_own, c_own = (
            head_of(BO, AT.BO, sample, head, HEAD),
            head_of(CO, AT.CO, sample, head, VALUE),
        )
        gq, left_over = _second_over(
            q, a, g, g_out, k_own, v_own, b_own, c_own, S, tiles, first, last,
            normalizer, mu, phi, delta, rho,
            gq, left_over, factor, scale, HEAD, VALUE, BN, False, True, True, False,
        )  # fmt: skip
    elif OWN:  # in the epilogue: nothing of it lives through the loop
        z_own = statistic(Z + own, rows, S)
        left_over += z_own[:, None]
        gq = add_scaled(gq, load(KO, AT.KO, place, S, BM, HEAD), z_own, HEAD)
        gq = add_scaled(gq, load(BO, AT.BO, place, S, BM, HEAD), statistic(DS + own, rows, S), HEAD)
    gq = add_scaled(gq, mean_row(k_head, common, common_end, HEAD), -sums_of(left_over), HEAD)
    store(GQ, AT.GQ, place, S, gq, BM, HEAD, scale)
    if MASK.causal or MASK.lower or MASK.groups:
        second_again(
            Q, K, V, KO, VO, FIRST, L, G, GO, A, B, CV, BO, CO, MU, PHI, DELTA, RHO, Z, DS, GQ, AT,
            S, C, offset, group_size, context_group, sharing, heads, all_heads, heads_at_once,
            scale, factor, HEAD, VALUE, MASK, OWN, KEYS, JOINT, BM, BN,
        )  # fmt: skip
