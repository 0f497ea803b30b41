"""What a program that owns a tile of query rows does where a number that it wrote is not finite:
the same formulas, one key at a time (one_by_one.py).

Each of these is the end of the kernel that it is named after, and given all that the kernel is: it
works its place out again, so that nothing of it is held in registers while the kernel runs. For the
same reason it is a function of its own to the compiler.
"""

# As in row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ebwm_kernels.attention.intervals import context_keys, my_rows, own_keys
from ebwm_kernels.attention.one_by_one import (
    gradient_one_by_one,
    is_spoiled,
    mixed_one_by_one,
    part_of,
    second_one_by_one,
    tangent_one_by_one,
    weights_of_one,
)
from ebwm_kernels.attention.row_tiles import (
    LOG2_E,
    add_scaled,
    head_of,
    load,
    put_statistic,
    row_dot,
    statistic,
    store,
    zeros,
)


@triton.jit(noinline=True)
def mix_again(
    Q,
    K,
    V,
    KO,
    VO,
    FIRST,
    O,
    L,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """O of a tile of rows, each from what it sees alone."""
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    if is_spoiled(O, AT.O, (sample, head, row), S, BM, VALUE):
        k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
        v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
        PART: tl.constexpr = part_of(HEAD.padded, VALUE.padded)
        for part in range(row, tl.minimum(row + BM, S), PART):
            place, rows = (sample, head, part), part + tl.arange(0, PART)
            normalizer = statistic(L + own, rows, S) * LOG2_E
            q, mixed = load(Q, AT.Q, place, S, PART, HEAD), zeros(PART, VALUE)
            start, end, first, last = context_keys(
                FIRST, sample, part, S, C, offset, group_size, context_group, PART, MASK
            )
            mixed = mixed_one_by_one(
                q, k_head, v_head, C, start, end, first, last,
                normalizer, mixed, factor, HEAD, VALUE, MASK.lower,
            )  # fmt: skip
            if OWN and MASK.groups:
                start, end, first, last = own_keys(part, S, group_size, PART)
                k_own, v_own = (
                    head_of(KO, AT.KO, sample, head, HEAD),
                    head_of(VO, AT.VO, sample, head, VALUE),
                )
                mixed = mixed_one_by_one(
                    q, k_own, v_own, S, start, end, first, last,
                    normalizer, mixed, factor, HEAD, VALUE, True,
                )  # fmt: skip
            elif OWN:
                k_self = load(KO, AT.KO, place, S, PART, HEAD)
                p_own = weights_of_one(q, k_self, normalizer, factor, HEAD)
                mixed = add_scaled(mixed, load(VO, AT.VO, place, S, PART, VALUE), p_own, HEAD)
            store(O, AT.O, place, S, mixed, PART, VALUE)


@triton.jit(noinline=True)
def gradient_again(
    Q,
    K,
    V,
    KO,
    VO,
    FIRST,
    O,
    L,
    G,
    DQ,
    DKO,
    DVO,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dQ of a tile of rows, each from what it sees alone."""
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    if is_spoiled(DQ, AT.DQ, (sample, head, row), S, BM, HEAD):
        k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
        v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
        PART: tl.constexpr = part_of(HEAD.padded, VALUE.padded)
        for part in range(row, tl.minimum(row + BM, S), PART):
            place, rows = (sample, head, part), part + tl.arange(0, PART)
            q, g = load(Q, AT.Q, place, S, PART, HEAD), load(G, AT.G, place, S, PART, VALUE)
            normalizer = statistic(L + own, rows, S) * LOG2_E
            delta = row_dot(load(O, AT.O, place, S, PART, VALUE), g, HEAD)
            start, end, first, last = context_keys(
                FIRST, sample, part, S, C, offset, group_size, context_group, PART, MASK
            )
            dq = gradient_one_by_one(
                q, g, k_head, v_head, C, start, end, first, last,
                normalizer, delta, zeros(PART, HEAD), factor, HEAD, VALUE, MASK.lower,
            )  # fmt: skip
            if OWN and MASK.groups:
                start, end, first, last = own_keys(part, S, group_size, PART)
                k_own, v_own = (
                    head_of(KO, AT.KO, sample, head, HEAD),
                    head_of(VO, AT.VO, sample, head, VALUE),
                )
                dq = gradient_one_by_one(
                    q, g, k_own, v_own, S, start, end, first, last,
                    normalizer, delta, dq, factor, HEAD, VALUE, True,
                )  # fmt: skip
            elif OWN:
                k_self = load(KO, AT.KO, place, S, PART, HEAD)
                ds_own = row_dot(g, load(VO, AT.VO, place, S, PART, VALUE), HEAD) - delta
                ds_own = ds_own * weights_of_one(q, k_self, normalizer, factor, HEAD)
                dq = add_scaled(dq, k_self, ds_own, HEAD)
            store(DQ, AT.DQ, place, S, dq, PART, HEAD, scale)


@triton.jit(noinline=True)
def tangent_again(
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
    """gG, mu and phi of a tile of rows, each from what it sees alone."""
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    if is_spoiled(GG, AT.GG, (sample, head, row), S, BM, VALUE):
        k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
        v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
        b_head, c_head = k_head, v_head
        if KEYS:
            b_head = head_of(B, AT.B, sample, head // sharing, HEAD)
            c_head = head_of(CV, AT.CV, sample, head // sharing, VALUE)
        PART: tl.constexpr = part_of(HEAD.padded, VALUE.padded)
        for part in range(row, tl.minimum(row + BM, S), PART):
            place, rows = (sample, head, part), part + tl.arange(0, PART)
            normalizer = statistic(L + own, rows, S) * LOG2_E
            q, a = load(Q, AT.Q, place, S, PART, HEAD), load(A, AT.A, place, S, PART, HEAD)
            start, end, first, last = context_keys(
                FIRST, sample, part, S, C, offset, group_size, context_group, PART, MASK
            )
            mu, moved = tangent_one_by_one(
                q, a, k_head, v_head, b_head, c_head, C, start, end, first, last,
                normalizer, tl.zeros([PART], HEAD.acc), zeros(PART, VALUE), factor, scale,
                HEAD, VALUE, MASK.lower, KEYS,
            )  # fmt: skip
            if OWN and MASK.groups:
                start, end, first, last = own_keys(part, S, group_size, PART)
                k_own, v_own = (
                    head_of(KO, AT.KO, sample, head, HEAD),
                    head_of(VO, AT.VO, sample, head, VALUE),
                )
                b_own, c_own = (
                    head_of(BO, AT.BO, sample, head, HEAD),
                    head_of(CO, AT.CO, sample, head, VALUE),
                )
                mu, moved = tangent_one_by_one(
                    q, a, k_own, v_own, b_own, c_own, S, start, end, first, last,
                    normalizer, mu, moved, factor, scale, HEAD, VALUE, True, True,
                )  # fmt: skip
            elif OWN:
                k_self = load(KO, AT.KO, place, S, PART, HEAD)
                p_own = weights_of_one(q, k_self, normalizer, factor, HEAD)
                sd_own = row_dot(a, k_self, HEAD)
                sd_own += row_dot(q, load(BO, AT.BO, place, S, PART, HEAD), HEAD)
                weighted = p_own * (sd_own * scale)
                mu += weighted
                moved = add_scaled(moved, load(VO, AT.VO, place, S, PART, VALUE), weighted, HEAD)
                moved = add_scaled(moved, load(CO, AT.CO, place, S, PART, VALUE), p_own, HEAD)
            moved = add_scaled(moved, load(O, AT.O, place, S, PART, VALUE), -mu, HEAD)
            store(GG, AT.GG, place, S, moved, PART, VALUE)
            if SECOND:
                g = load(G, AT.G, place, S, PART, VALUE)
                put_statistic(MU + own, rows, S, mu)
                put_statistic(PHI + own, rows, S, row_dot(moved, g, HEAD))


@triton.jit(noinline=True)
def second_again(
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
    """gQ of a tile of rows, each from what it sees alone."""
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    if is_spoiled(GQ, AT.GQ, (sample, head, row), S, BM, HEAD):
        k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
        v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
        b_head, c_head = k_head, v_head
        if KEYS:
            b_head = head_of(B, AT.B, sample, head // sharing, HEAD)
            c_head = head_of(CV, AT.CV, sample, head // sharing, VALUE)
        PART: tl.constexpr = part_of(HEAD.padded, VALUE.padded)
        for part in range(row, tl.minimum(row + BM, S), PART):
            place, rows = (sample, head, part), part + tl.arange(0, PART)
            normalizer, mu = statistic(L + own, rows, S) * LOG2_E, statistic(MU + own, rows, S)
            phi, delta = statistic(PHI + own, rows, S), statistic(DELTA + own, rows, S)
            q, a = load(Q, AT.Q, place, S, PART, HEAD), load(A, AT.A, place, S, PART, HEAD)
            g = load(G, AT.G, place, S, PART, VALUE)
            g_out, rho = g, delta
            if JOINT:
                g_out, rho = load(GO, AT.GO, place, S, PART, VALUE), statistic(RHO + own, rows, S)
            start, end, first, last = context_keys(
                FIRST, sample, part, S, C, offset, group_size, context_group, PART, MASK
            )
            gq = second_one_by_one(
                q, a, g, g_out, k_head, v_head, b_head, c_head, C, start, end, first, last,
                normalizer, mu, phi, delta, rho, zeros(PART, HEAD), factor, scale,
                HEAD, VALUE, MASK.lower, KEYS, JOINT,
            )  # fmt: skip
            if OWN and MASK.groups:
                start, end, first, last = own_keys(part, S, group_size, PART)
                k_own, v_own = (
                    head_of(KO, AT.KO, sample, head, HEAD),
                    head_of(VO, AT.VO, sample, head, VALUE),
                )
                b_own, c_own = (
                    head_of(BO, AT.BO, sample, head, HEAD),
                    head_of(CO, AT.CO, sample, head, VALUE),
                )
                gq = second_one_by_one(
                    q, a, g, g_out, k_own, v_own, b_own, c_own, S, start, end, first, last,
                    normalizer, mu, phi, delta, rho, gq, factor, scale, HEAD, VALUE, True, True,
                    False,
                )  # fmt: skip
            elif OWN:
                z_own, ds_own = statistic(Z + own, rows, S), statistic(DS + own, rows, S)
                gq = add_scaled(gq, load(KO, AT.KO, place, S, PART, HEAD), z_own, HEAD)
                gq = add_scaled(gq, load(BO, AT.BO, place, S, PART, HEAD), ds_own, HEAD)
            store(GQ, AT.GQ, place, S, gq, PART, HEAD, scale)
