"""The attention of this package as Triton kernels; the formulas and their letters are those of
attention/reference.py.

The products per tile are in brackets where there are cotangents B, C on dK, dV.

    kernel            work of a program                           products per tile
    _forward          query rows, all their keys                  2
    _gradient_query   query rows: D, dQ, dk*, dv*                 3
    _gradient_key     keys, all the queries that see them: dK, dV 4
    _tangent          query rows: mu, gG, phi, D                  3 (5)
    _second_own       query rows, own keys only: gk*, gv*, z*, ds*
    _second_query     query rows: gQ                              4 (7)
    _second_key       keys: gK, gV                                6 (8)

A row's phi is G . gG: no second pass over the keys for statistics. No kernel writes where another
program writes, so there are no atomics and results are the same every time. The online softmax
starts with a query's own key, so that no row is ever without a weight.

Legend: B batch, H query heads, H_kv key heads, S queries, C keys, d head dimension. Tensors are
contiguous: (B H S, d) for what belongs to queries, (B H_kv C, d) for keys and values, (B H S) for
statistics, which are float32 (float64 in tests: ACC). DP is d padded (padded_for); rows are held in
DP / PART parts of PART columns (attention/row_tiles.py). Scores are multiplied by scale log2(e), so
that exp2 serves; L is kept in natural units. PRECISION is tl.dot's input_precision.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebwm_kernels.attention.reference import Cotangents, wide_dtype
from ebwm_kernels.attention.row_tiles import (
    add_mix,
    add_scaled,
    put,
    row_dot,
    row_of,
    rows_of,
    scaled,
    scores,
    zeros,
)
from ebwm_kernels.attention.tuning import Tile, padded_for, part_for, tile_for
from ebwm_kernels.attention.visibility import Shape

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def _statistic(pointer, first_row, rows, num_rows):
    return tl.load(pointer + first_row + rows, mask=rows < num_rows, other=0.0)


@triton.jit
def _visible(rows, keys, C, offset, CAUSAL: tl.constexpr):
    """Which (row, key) pairs exist; rows and keys broadcast against each other."""
    if CAUSAL:
        return (keys <= rows + offset) & (keys < C)
    return (rows >= 0) & (keys < C)


@triton.jit
def _weights(
    left,
    right,
    normalizer,
    visible,
    factor: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P of a tile, exp(score - L) where a pair exists and 0 elsewhere: of (q, k), or its transpose
    of (k, q).
    """
    return tl.where(
        visible, tl.exp2(scores(left, right, ACC, PRECISION) * factor - normalizer), 0.0
    )


@triton.jit
def _my_rows(S, BM: tl.constexpr):
    """(head, first row) of this program; rows that see most keys come first, so that no long
    program starts last.
    """
    num_blocks = tl.cdiv(S, BM)
    program = tl.program_id(0)
    first = (num_blocks - 1 - program % num_blocks) * BM
    return (program // num_blocks).to(tl.int64), first


@triton.jit
def _last_key(first, C, offset, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """One past the last key that rows first .. first + BM - 1 see."""
    if CAUSAL:
        return tl.minimum(C, first + BM + offset)
    return C


@triton.jit
def _first_row(first_key, offset, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """The first row, down to a multiple of BM, that sees first_key."""
    if CAUSAL:
        return tl.maximum(first_key - offset, 0) // BM * BM
    return 0


@triton.jit
def _forward(
    Q,
    K,
    V,
    KO,
    VO,
    O,
    L,
    S,
    C,
    offset,
    group,
    scale: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    head, first = _my_rows(S, BM)  # pyright: ignore[reportGeneralTypeIssues]
    own, seen = head * S, head // group * C
    rows = first + tl.arange(0, BM)
    factor: tl.constexpr = scale * LOG2_E
    q = rows_of(Q, own, rows, S, D, DP, PART)
    if OWN:
        row_max = row_dot(q, rows_of(KO, own, rows, S, D, DP, PART), ACC) * factor
        total = tl.full([BM], 1.0, ACC)
        mixed = scaled(rows_of(VO, own, rows, S, D, DP, PART), total, ACC)
    else:
        row_max = tl.full([BM], float("-inf"), ACC)
        total = tl.zeros([BM], ACC)
        mixed = zeros(BM, DP, PART, ACC)
    for first_key in range(0, _last_key(first, C, offset, BM, CAUSAL), BN):
        keys = first_key + tl.arange(0, BN)
        k, v = rows_of(K, seen, keys, C, D, DP, PART), rows_of(V, seen, keys, C, D, DP, PART)
        score = scores(q, k, ACC, PRECISION) * factor
        score = tl.where(
            _visible(rows[:, None], keys[None, :], C, offset, CAUSAL), score, float("-inf")
        )
        new_max = tl.maximum(row_max, tl.max(score, 1))
        weight, shrink = tl.exp2(score - new_max[:, None]), tl.exp2(row_max - new_max)
        total = total * shrink + tl.sum(weight, 1)
        mixed = add_mix(scaled(mixed, shrink, ACC), weight, v, ACC, PRECISION)
        row_max = new_max
    put(O, own, rows, S, scaled(mixed, 1 / total, ACC), D, DP, PART)
    tl.store(L + own + rows, (row_max + tl.log2(total)) / LOG2_E, mask=rows < S)


@triton.jit
def _gradient_query(
    Q,
    K,
    V,
    KO,
    VO,
    O,
    L,
    G,
    MEAN,
    DQ,
    DKO,
    DVO,
    DELTA,
    S,
    C,
    offset,
    group,
    scale: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dQ = s (dS K + ds* k*), dk* = s ds* q, dv* = p* G, and D for the kernels after it.

    A row of dS sums to zero, as rounded for the product it does not: what is left over takes its
    share of the mean key away again.
    """
    head, first = _my_rows(S, BM)  # pyright: ignore[reportGeneralTypeIssues]
    own, seen = head * S, head // group * C
    rows = first + tl.arange(0, BM)
    factor: tl.constexpr = scale * LOG2_E
    q, g = rows_of(Q, own, rows, S, D, DP, PART), rows_of(G, own, rows, S, D, DP, PART)
    normalizer = _statistic(L, own, rows, S) * LOG2_E
    delta = row_dot(rows_of(O, own, rows, S, D, DP, PART), g, ACC)
    tl.store(DELTA + own + rows, delta, mask=rows < S)
    if OWN:  # in the prologue: what it loads is dead before the loop
        k_self = rows_of(KO, own, rows, S, D, DP, PART)
        p_own = tl.exp2(row_dot(q, k_self, ACC) * factor - normalizer)
        ds_own = p_own * (row_dot(g, rows_of(VO, own, rows, S, D, DP, PART), ACC) - delta)
        put(DKO, own, rows, S, scaled(q, ds_own * scale, ACC), D, DP, PART)
        put(DVO, own, rows, S, scaled(g, p_own, ACC), D, DP, PART)
        dq, left_over = scaled(k_self, ds_own, ACC), ds_own
    else:
        dq, left_over = zeros(BM, DP, PART, ACC), tl.zeros([BM], ACC)
    for first_key in range(0, _last_key(first, C, offset, BM, CAUSAL), BN):
        keys = first_key + tl.arange(0, BN)
        k, v = rows_of(K, seen, keys, C, D, DP, PART), rows_of(V, seen, keys, C, D, DP, PART)
        p = _weights(
            q,
            k,
            normalizer[:, None],
            _visible(rows[:, None], keys[None, :], C, offset, CAUSAL),
            factor,
            ACC,
            PRECISION,
        )
        ds = (p * (scores(g, v, ACC, PRECISION) - delta[:, None])).to(Q.dtype.element_ty)
        left_over += tl.sum(ds.to(ACC), 1)
        dq = add_mix(dq, ds, k, ACC, PRECISION)
    dq = add_scaled(dq, row_of(MEAN, head // group, D, DP, PART), -left_over, ACC)
    put(DQ, own, rows, S, dq, D, DP, PART, scale)


@triton.jit
def _gradient_key(
    Q,
    K,
    V,
    L,
    G,
    DELTA,
    DK,
    DV,
    S,
    C,
    offset,
    group,
    scale: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dK = s dS' Q, dV = P' G, over all heads that share the keys; tiles are (keys, rows)."""
    num_blocks = tl.cdiv(C, BN)
    key_head, first_key = (
        (tl.program_id(0) // num_blocks).to(tl.int64),
        tl.program_id(0) % num_blocks * BN,
    )
    keys = first_key + tl.arange(0, BN)
    seen = key_head * C
    factor: tl.constexpr = scale * LOG2_E
    k, v = rows_of(K, seen, keys, C, D, DP, PART), rows_of(V, seen, keys, C, D, DP, PART)
    dk, dv = zeros(BN, DP, PART, ACC), zeros(BN, DP, PART, ACC)
    start = _first_row(first_key, offset, BM, CAUSAL)
    blocks_per_head = tl.cdiv(tl.maximum(S - start, 0), BM)
    for step in range(
        group * blocks_per_head
    ):  # one loop over heads and rows: two nested ones cost 40 registers
        own = (key_head * group + step // blocks_per_head) * S
        rows = start + step % blocks_per_head * BM + tl.arange(0, BM)
        q, g = rows_of(Q, own, rows, S, D, DP, PART), rows_of(G, own, rows, S, D, DP, PART)
        normalizer, delta = _statistic(L, own, rows, S) * LOG2_E, _statistic(DELTA, own, rows, S)
        visible = _visible(rows[None, :], keys[:, None], C, offset, CAUSAL) & (rows[None, :] < S)
        p = _weights(k, q, normalizer[None, :], visible, factor, ACC, PRECISION)
        dv = add_mix(dv, p, g, ACC, PRECISION)
        ds = p * (scores(v, g, ACC, PRECISION) - delta[None, :])
        dk = add_mix(dk, ds, q, ACC, PRECISION)
    put(DK, seen, keys, C, dk, D, DP, PART, scale)
    put(DV, seen, keys, C, dv, D, DP, PART)


@triton.jit
def _tangent(
    Q,
    K,
    V,
    KO,
    VO,
    O,
    L,
    G,
    A,
    B,
    CV,
    BO,
    CO,
    MEAN,
    GG,
    MU,
    PHI,
    DELTA,
    S,
    C,
    offset,
    group,
    scale: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """mu = rowsum(P Sdot), gG = (P Sdot) V + P C - mu O, phi = G . gG, and D = G . O for the
    kernels after it.

    Sdot loses s A . mean(K) per row, which is exact for any constant (sum P = 1) and keeps what
    keys have in common out of the rounding.
    """
    head, first = _my_rows(S, BM)  # pyright: ignore[reportGeneralTypeIssues]
    own, seen = head * S, head // group * C
    rows = first + tl.arange(0, BM)
    factor: tl.constexpr = scale * LOG2_E
    q, a = rows_of(Q, own, rows, S, D, DP, PART), rows_of(A, own, rows, S, D, DP, PART)
    normalizer = _statistic(L, own, rows, S) * LOG2_E
    centre = row_dot(a, row_of(MEAN, head // group, D, DP, PART), ACC) * scale
    if OWN:
        k_self = rows_of(KO, own, rows, S, D, DP, PART)
        p_own = tl.exp2(row_dot(q, k_self, ACC) * factor - normalizer)
        sd_own = (
            scale
            * (row_dot(a, k_self, ACC) + row_dot(q, rows_of(BO, own, rows, S, D, DP, PART), ACC))
            - centre
        )
        mu = p_own * sd_own
        moved = scaled(rows_of(VO, own, rows, S, D, DP, PART), mu, ACC)
        moved = add_scaled(moved, rows_of(CO, own, rows, S, D, DP, PART), p_own, ACC)
    else:
        mu = tl.zeros([BM], ACC)
        moved = zeros(BM, DP, PART, ACC)
    for first_key in range(0, _last_key(first, C, offset, BM, CAUSAL), BN):
        keys = first_key + tl.arange(0, BN)
        k, v = rows_of(K, seen, keys, C, D, DP, PART), rows_of(V, seen, keys, C, D, DP, PART)
        p = _weights(
            q,
            k,
            normalizer[:, None],
            _visible(rows[:, None], keys[None, :], C, offset, CAUSAL),
            factor,
            ACC,
            PRECISION,
        )
        sd = scores(a, k, ACC, PRECISION)
        if KEYS:
            sd += scores(q, rows_of(B, seen, keys, C, D, DP, PART), ACC, PRECISION)
            moved = add_mix(moved, p, rows_of(CV, seen, keys, C, D, DP, PART), ACC, PRECISION)
        weighted = p * (sd * scale - centre[:, None])
        mu += tl.sum(weighted, 1)
        moved = add_mix(moved, weighted, v, ACC, PRECISION)
    g, out = rows_of(G, own, rows, S, D, DP, PART), rows_of(O, own, rows, S, D, DP, PART)
    moved = add_scaled(moved, out, -mu, ACC)
    put(GG, own, rows, S, moved, D, DP, PART)
    tl.store(MU + own + rows, mu + centre, mask=rows < S)
    tl.store(PHI + own + rows, row_dot(moved, g, ACC), mask=rows < S)
    tl.store(DELTA + own + rows, row_dot(out, g, ACC), mask=rows < S)


@triton.jit
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
    scale: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
):
    """The own key's column: gk* = s (z* q + ds* A), gv* = p* (sd* - mu) G, and z*, ds* for gQ."""
    head, first = _my_rows(S, BM)  # pyright: ignore[reportGeneralTypeIssues]
    own = head * S
    rows = first + tl.arange(0, BM)
    q, a, g = (
        rows_of(Q, own, rows, S, D, DP, PART),
        rows_of(A, own, rows, S, D, DP, PART),
        rows_of(G, own, rows, S, D, DP, PART),
    )
    k_self, mu = rows_of(KO, own, rows, S, D, DP, PART), _statistic(MU, own, rows, S)
    p_own = tl.exp2((row_dot(q, k_self, ACC) * scale - _statistic(L, own, rows, S)) * LOG2_E)
    sd_own = scale * (
        row_dot(a, k_self, ACC) + row_dot(q, rows_of(BO, own, rows, S, D, DP, PART), ACC)
    )
    dP_minus_D = row_dot(g, rows_of(VO, own, rows, S, D, DP, PART), ACC) - _statistic(
        DELTA, own, rows, S
    )
    ds, pd = p_own * dP_minus_D, p_own * (sd_own - mu)
    z = pd * dP_minus_D + p_own * (
        row_dot(g, rows_of(CO, own, rows, S, D, DP, PART), ACC) - _statistic(PHI, own, rows, S)
    )
    put(GKO, own, rows, S, add_scaled(scaled(q, scale * z, ACC), a, scale * ds, ACC), D, DP, PART)
    put(GVO, own, rows, S, scaled(g, pd, ACC), D, DP, PART)
    tl.store(Z + own + rows, z, mask=rows < S)
    tl.store(DS + own + rows, ds, mask=rows < S)


@triton.jit
def _second_query(
    Q,
    K,
    V,
    KO,
    L,
    G,
    A,
    B,
    CV,
    BO,
    MEAN,
    MU,
    PHI,
    DELTA,
    Z,
    DS,
    GQ,
    S,
    C,
    offset,
    group,
    scale: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    OWN: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """gQ = s (Z K + dS B + z* k* + ds* b*); Z of a row sums to zero, see _gradient_query."""
    head, first = _my_rows(S, BM)  # pyright: ignore[reportGeneralTypeIssues]
    own, seen = head * S, head // group * C
    rows = first + tl.arange(0, BM)
    factor: tl.constexpr = scale * LOG2_E
    q, a, g = (
        rows_of(Q, own, rows, S, D, DP, PART),
        rows_of(A, own, rows, S, D, DP, PART),
        rows_of(G, own, rows, S, D, DP, PART),
    )
    normalizer, mu = _statistic(L, own, rows, S) * LOG2_E, _statistic(MU, own, rows, S)
    phi, delta = _statistic(PHI, own, rows, S), _statistic(DELTA, own, rows, S)
    gq, left_over = zeros(BM, DP, PART, ACC), tl.zeros([BM], ACC)
    for first_key in range(0, _last_key(first, C, offset, BM, CAUSAL), BN):
        keys = first_key + tl.arange(0, BN)
        k = rows_of(K, seen, keys, C, D, DP, PART)
        p = _weights(
            q,
            k,
            normalizer[:, None],
            _visible(rows[:, None], keys[None, :], C, offset, CAUSAL),
            factor,
            ACC,
            PRECISION,
        )
        sd = scores(a, k, ACC, PRECISION)
        if KEYS:  # in this order: others cost up to hundreds of registers
            b = rows_of(B, seen, keys, C, D, DP, PART)
            sd += scores(q, b, ACC, PRECISION)
        ds = p * (
            scores(g, rows_of(V, seen, keys, C, D, DP, PART), ACC, PRECISION) - delta[:, None]
        )
        if KEYS:
            gq = add_mix(gq, ds, b, ACC, PRECISION)
        z = ds * (sd * scale - mu[:, None]) - p * phi[:, None]
        if KEYS:
            z += p * scores(g, rows_of(CV, seen, keys, C, D, DP, PART), ACC, PRECISION)
        z = z.to(Q.dtype.element_ty)
        left_over += tl.sum(z.to(ACC), 1)
        gq = add_mix(gq, z, k, ACC, PRECISION)
    if OWN:  # in the epilogue: nothing of it lives through the loop
        z_own = _statistic(Z, own, rows, S)
        left_over += z_own
        gq = add_scaled(gq, rows_of(KO, own, rows, S, D, DP, PART), z_own, ACC)
        gq = add_scaled(
            gq, rows_of(BO, own, rows, S, D, DP, PART), _statistic(DS, own, rows, S), ACC
        )
    gq = add_scaled(gq, row_of(MEAN, head // group, D, DP, PART), -left_over, ACC)
    put(GQ, own, rows, S, gq, D, DP, PART, scale)


@triton.jit
def _second_key(
    Q,
    K,
    V,
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
    group,
    scale: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEYS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """gK = s (Z' Q + dS' A), gV = (P (Sdot - mu))' G, over all heads that share the keys.

    Tiles are (keys, rows).
    """
    num_blocks = tl.cdiv(C, BN)
    key_head, first_key = (
        (tl.program_id(0) // num_blocks).to(tl.int64),
        tl.program_id(0) % num_blocks * BN,
    )
    keys = first_key + tl.arange(0, BN)
    seen = key_head * C
    factor: tl.constexpr = scale * LOG2_E
    k, v = rows_of(K, seen, keys, C, D, DP, PART), rows_of(V, seen, keys, C, D, DP, PART)
    if KEYS:
        b, c = rows_of(B, seen, keys, C, D, DP, PART), rows_of(CV, seen, keys, C, D, DP, PART)
    gk, gv = zeros(BN, DP, PART, ACC), zeros(BN, DP, PART, ACC)
    start = _first_row(first_key, offset, BM, CAUSAL)
    blocks_per_head = tl.cdiv(tl.maximum(S - start, 0), BM)
    for step in range(
        group * blocks_per_head
    ):  # one loop over heads and rows: two nested ones cost 40 registers
        own = (key_head * group + step // blocks_per_head) * S
        rows = start + step % blocks_per_head * BM + tl.arange(0, BM)
        q, a = rows_of(Q, own, rows, S, D, DP, PART), rows_of(A, own, rows, S, D, DP, PART)
        normalizer, mu = _statistic(L, own, rows, S) * LOG2_E, _statistic(MU, own, rows, S)
        phi, delta = _statistic(PHI, own, rows, S), _statistic(DELTA, own, rows, S)
        visible = _visible(rows[None, :], keys[:, None], C, offset, CAUSAL) & (rows[None, :] < S)
        p = _weights(k, q, normalizer[None, :], visible, factor, ACC, PRECISION)
        sd = scores(k, a, ACC, PRECISION)
        if KEYS:
            sd += scores(b, q, ACC, PRECISION)
        sd = sd * scale - mu[None, :]
        g = rows_of(G, own, rows, S, D, DP, PART)
        gv = add_mix(gv, p * sd, g, ACC, PRECISION)
        ds = p * (scores(v, g, ACC, PRECISION) - delta[None, :])
        gk = add_mix(gk, ds, a, ACC, PRECISION)
        z = ds * sd - p * phi[None, :]
        if KEYS:
            z += p * scores(c, g, ACC, PRECISION)
        gk = add_mix(gk, z, q, ACC, PRECISION)
    put(GK, seen, keys, C, gk, D, DP, PART, scale)
    put(GV, seen, keys, C, gv, D, DP, PART)


# ----------------------------------------------------------------------------------------- launches


class _Launcher:
    """What every kernel of one call is given."""

    def __init__(self, q: Tensor, k: Tensor, shape: Shape, own: bool):
        self.batch, self.heads, self.num_rows, self.d = q.shape
        self.key_heads, self.num_keys = k.shape[1:3]
        self.shape, self.own, self.dtype, self.device = shape, own, q.dtype, q.device
        padded = padded_for(self.d)
        self.constants = {
            "scale": shape.scale,
            "D": self.d,
            "DP": padded,
            "PART": part_for(architecture(self.device), padded, self.dtype),
            "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        }

    def tile(self, kernel: str, with_keys: bool) -> Tile:
        return tile_for(
            kernel, architecture(self.device), self.constants["DP"], self.dtype, with_keys
        )

    def over_rows(self, kernel, *arguments, **constants) -> None:
        """One program per block of BM query rows of a head."""
        tile = self.tile(kernel.__name__, constants.get("KEYS", False))
        self._run(
            kernel,
            tile,
            _num_tiles(self.num_rows, tile.rows) * self.batch * self.heads,
            arguments,
            constants,
        )

    def over_keys(self, kernel, *arguments, **constants) -> None:
        """One program per block of BN keys of a key head."""
        tile = self.tile(kernel.__name__, constants.get("KEYS", False))
        self._run(
            kernel,
            tile,
            _num_tiles(self.num_keys, tile.keys) * self.batch * self.key_heads,
            arguments,
            constants,
        )

    def _run(self, kernel, tile: Tile, num_programs: int, arguments, constants) -> None:
        if num_programs == 0:
            return
        sizes = (self.num_rows, self.num_keys, self.shape.offset, self.heads // self.key_heads)
        tiles = {
            "BM": tile.rows,
            "BN": tile.keys,
            "CAUSAL": self.shape.causal,
            "PRECISION": _precision(self.dtype),
            **self.constants,
            **constants,
        }
        with (
            torch.cuda.device(self.device)
            if self.device.type == "cuda"
            else contextlib.nullcontext()
        ):
            if kernel is _second_own:
                names = ("scale", "D", "DP", "PART", "ACC", "BM")
                kernel[(num_programs,)](
                    *arguments, self.num_rows, **{n: tiles[n] for n in names}, num_warps=tile.warps
                )
            else:
                kernel[(num_programs,)](
                    *arguments, *sizes, **tiles, num_warps=tile.warps, num_stages=tile.stages
                )

    def like_rows(self) -> Tensor:
        return torch.empty(
            self.batch, self.heads, self.num_rows, self.d, dtype=self.dtype, device=self.device
        )

    def like_keys(self) -> Tensor:
        return torch.empty(
            self.batch, self.key_heads, self.num_keys, self.d, dtype=self.dtype, device=self.device
        )

    def mean(self, k: Tensor) -> Tensor:
        """The mean key of every key head (B, H_kv, d)."""
        return k.mean(2, dtype=wide_dtype(self.dtype))

    def statistic(self) -> Tensor:
        return torch.empty(
            self.batch, self.heads, self.num_rows, dtype=wide_dtype(self.dtype), device=self.device
        )


def _refuse_what_is_not_built(v: Tensor, k: Tensor, first_visible: Tensor | None, shape: Shape):
    if shape.group_size > 1 or shape.context_group > 1:
        raise ValueError(
            f"backend triton: group_size is {shape.group_size}, context_group "
            f"{shape.context_group}; it takes groups of 1: use backend reference"
        )
    if first_visible is not None:
        raise ValueError("backend triton: it takes no first_visible: use backend reference")
    if v.shape != k.shape:
        raise ValueError(
            f"backend triton: values of head dimension {v.shape[-1]} for keys of {k.shape[-1]}; "
            "it takes equal ones: use backend reference"
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    shape: Shape,
) -> tuple[Tensor, Tensor]:
    """As reference.forward."""
    _refuse_what_is_not_built(v, k, first_visible, shape)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    k_self, v_self = _contiguous(k_self), _contiguous(v_self)
    run = _Launcher(q, k, shape, k_self is not None)
    out, log_normalizer = run.like_rows(), run.statistic()
    run.over_rows(_forward, q, k, v, *_or(q, k_self, v_self), out, log_normalizer, OWN=run.own)
    return out, log_normalizer


def gradient(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
    *,
    with_keys: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As reference.gradient."""
    grad, out = grad.contiguous(), out.contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    k_self, v_self = _contiguous(k_self), _contiguous(v_self)
    run = _Launcher(q, k, shape, k_self is not None)
    dq, delta = run.like_rows(), run.statistic()
    dk_self, dv_self = (run.like_rows(), run.like_rows()) if run.own else (None, None)
    run.over_rows(
        _gradient_query,
        q,
        k,
        v,
        *_or(q, k_self, v_self),
        out,
        log_normalizer,
        grad,
        run.mean(k),
        dq,
        *_or(q, dk_self, dv_self),
        delta,
        OWN=run.own,
    )
    dk, dv = (run.like_keys(), run.like_keys()) if with_keys else (None, None)
    if with_keys:
        run.over_keys(_gradient_key, q, k, v, log_normalizer, grad, delta, dk, dv)
    return dq, dk, dv, dk_self, dv_self


def double_backward(
    cotangents: Cotangents,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """As reference.double_backward."""
    a = cotangents.query.contiguous()
    b, c = _contiguous(cotangents.key), _contiguous(cotangents.value)
    b_self, c_self = _contiguous(cotangents.k_self), _contiguous(cotangents.v_self)
    grad, out = grad.contiguous(), out.contiguous()
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    k_self, v_self = _contiguous(k_self), _contiguous(v_self)
    run = _Launcher(q, k, shape, k_self is not None)
    keys = b is not None
    g_grad, mu, phi, delta = run.like_rows(), run.statistic(), run.statistic(), run.statistic()
    mean = run.mean(k)
    run.over_rows(
        _tangent,
        q,
        k,
        v,
        *_or(q, k_self, v_self),
        out,
        log_normalizer,
        grad,
        a,
        *_or(q, b, c, b_self, c_self),
        mean,
        g_grad,
        mu,
        phi,
        delta,
        OWN=run.own,
        KEYS=keys,
    )
    g_k_self = g_v_self = z = ds = None
    if run.own:
        g_k_self, g_v_self, z, ds = (
            run.like_rows(),
            run.like_rows(),
            run.statistic(),
            run.statistic(),
        )
        run.over_rows(
            _second_own,
            q,
            k_self,
            v_self,
            log_normalizer,
            grad,
            a,
            b_self,
            c_self,
            mu,
            phi,
            delta,
            g_k_self,
            g_v_self,
            z,
            ds,
        )
    g_q = run.like_rows()
    run.over_rows(
        _second_query,
        q,
        k,
        v,
        *_or(q, k_self),
        log_normalizer,
        grad,
        a,
        *_or(q, b, c, b_self),
        mean,
        mu,
        phi,
        delta,
        *_or(mu, z, ds),
        g_q,
        OWN=run.own,
        KEYS=keys,
    )
    g_k, g_v = run.like_keys(), run.like_keys()
    run.over_keys(
        _second_key,
        q,
        k,
        v,
        log_normalizer,
        grad,
        a,
        *_or(q, b, c),
        mu,
        phi,
        delta,
        g_k,
        g_v,
        KEYS=keys,
    )
    return g_grad, g_q, g_k, g_v, g_k_self, g_v_self


def tangent(
    tangents: Cotangents,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    out: Tensor,
    log_normalizer: Tensor,
    shape: Shape,
) -> Tensor:
    """As reference.tangent."""
    raise ValueError("backend triton: forward mode is not built: use backend reference")


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the tuning table for a device."""
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return "sm_90"
    if (major, minor) == (8, 0):
        return "sm_80"
    return "sm_86"  # 8.6, 8.9 and 12.x have 99 KiB of shared memory per block


def _num_tiles(count: int, size: int) -> int:
    """How many tiles of `size` cover `count`."""
    return -(-count // size)


def _precision(dtype: torch.dtype) -> str:
    """float32 is multiplied in three TF32 passes (near float32), or in one where the user allows
    that for matrix products.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _or(placeholder: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Pointers for a kernel: something valid where a constant says that it is not read."""
    return tuple(placeholder if u is None else u for u in tensors)
