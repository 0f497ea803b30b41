"""The Triton kernels of the first order in which a program owns a tile of query rows.

    kernel            what it computes      products per tile of keys
    _forward          O, L                  2
    _gradient_query   D, dQ, dk*, dv*       3

Formulas and letters: attention/reference.py. Each has a loop over tiles of context keys in a
function of its own (.._over). A group of own keys is the same loop once more, over K*, V* and the
keys of the groups that the tile's rows belong to. A single own key is no tile but a column, where
it costs no registers in the loop: in the prologue or the epilogue.

Tensors are contiguous: (B H S, d) for what belongs to queries, (B H_kv C, d) for keys and values,
(B H S) for statistics, (B S) for FIRST, the first visible key. Scores are multiplied by scale
log2(e), so that exp2 serves; L is kept in natural units.

Constants: HEAD (row_tiles.Head), MASK (intervals.Mask), OWN where queries have own keys, BM rows
and BN keys of a tile.
"""

# As in row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math

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

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def weights_of(q, k, normalizer, visible, factor, HEAD: tl.constexpr):
    """P of a tile, exp(score - L) where a pair exists and 0 elsewhere."""
    score = scores(q, k, HEAD) * factor
    return tl.where(visible, tl.exp2(score - normalizer[:, None]), 0.0)


# ------------------------------------------------------------------------------------------ forward


@triton.jit
def _softmax_over(
    q,
    K,
    V,
    base,
    num_keys,
    start,
    end,
    first,
    last,
    row_max,
    total,
    mixed,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BN: tl.constexpr,
    LOWER: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """The online softmax over keys start .. end - 1; EMPTY where a row may have met none yet."""
    for first_key in range(start, end, BN):
        keys = first_key + tl.arange(0, BN)
        k, v = rows_of(K, base, keys, num_keys, HEAD), rows_of(V, base, keys, num_keys, VALUE)
        score = scores(q, k, HEAD) * factor
        score = tl.where(inside(keys, first, last, LOWER), score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        finite_max = new_max
        if EMPTY:
            finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight, shrink = tl.exp2(score - finite_max[:, None]), tl.exp2(row_max - finite_max)
        total = total * shrink + tl.sum(weight, 1)
        mixed = add_mix(scaled(mixed, shrink, HEAD), weight, v, HEAD)
        row_max = new_max
    return row_max, total, mixed


@triton.jit(do_not_specialize=SIZES)
def _forward(
    Q,
    K,
    V,
    KO,
    VO,
    FIRST,
    O,
    L,
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
    head, row = my_rows(S, all_heads, heads_at_once, BM)
    own, seen = head * S, head // sharing * C
    rows = row + tl.arange(0, BM)
    start, end, first, last = context_keys(
        FIRST, head, heads, row, S, C, offset, group_size, context_group, BM, MASK
    )
    q = rows_of(Q, own, rows, S, HEAD)
    if OWN and not MASK.groups:
        row_max = row_dot(q, rows_of(KO, own, rows, S, HEAD), HEAD) * factor
        total = tl.full([BM], 1.0, HEAD.acc)
        mixed = scaled(rows_of(VO, own, rows, S, VALUE), total, HEAD)
    else:
        row_max = tl.full([BM], float("-inf"), HEAD.acc)
        total = tl.zeros([BM], HEAD.acc)
        mixed = zeros(BM, VALUE)
    EMPTY: tl.constexpr = MASK.lower and (MASK.groups or not OWN)
    row_max, total, mixed = _softmax_over(
        q, K, V, seen, C, start, end, first, last,
        row_max, total, mixed, factor, HEAD, VALUE, BN, MASK.lower, EMPTY,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        row_max, total, mixed = _softmax_over(
            q, KO, VO, own, S, start, end, first, last,
            row_max, total, mixed, factor, HEAD, VALUE, BN, True, EMPTY,
        )  # fmt: skip
    if EMPTY:
        total = tl.where(total > 0, total, 1.0)  # no key at all: O = 0, L = -inf
    put(O, own, rows, S, scaled(mixed, 1 / total, HEAD), VALUE)
    put_statistic(L, own, rows, S, (row_max + tl.log2(total)) / LOG2_E)


# ----------------------------------------------------------------------------------------- gradient


@triton.jit
def _gradient_over(
    q,
    g,
    K,
    V,
    base,
    num_keys,
    start,
    end,
    first,
    last,
    normalizer,
    delta,
    dq,
    left_over,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BN: tl.constexpr,
    LOWER: tl.constexpr,
):
    """dq + dS K and left_over + rowsum(dS) over keys start .. end - 1."""
    for first_key in range(start, end, BN):
        keys = first_key + tl.arange(0, BN)
        k, v = rows_of(K, base, keys, num_keys, HEAD), rows_of(V, base, keys, num_keys, VALUE)
        p = weights_of(q, k, normalizer, inside(keys, first, last, LOWER), factor, HEAD)
        ds = (p * (scores(g, v, HEAD) - delta[:, None])).to(K.dtype.element_ty)
        left_over += tl.sum(ds.to(HEAD.acc), 1)
        dq = add_mix(dq, ds, k, HEAD)
    return dq, left_over


@triton.jit(do_not_specialize=SIZES)
def _gradient_query(
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
    """dQ = s (dS K + ds* k*), dk* = s ds* q, dv* = p* G, and D for the kernels after it; dk* and
    dv* of a group come from _gradient_key.

    A row of dS sums to zero, as rounded for the product it does not: what is left over takes its
    share of a mean key away again.
    """
    head, row = my_rows(S, all_heads, heads_at_once, BM)
    own, seen = head * S, head // sharing * C
    rows = row + tl.arange(0, BM)
    start, end, first, last = context_keys(
        FIRST, head, heads, row, S, C, offset, group_size, context_group, BM, MASK
    )
    q, g = rows_of(Q, own, rows, S, HEAD), rows_of(G, own, rows, S, VALUE)
    normalizer = statistic(L, own, rows, S) * LOG2_E
    delta = row_dot(rows_of(O, own, rows, S, VALUE), g, HEAD)
    put_statistic(DELTA, own, rows, S, delta)
    if OWN and not MASK.groups:  # in the prologue: what it loads is dead before the loop
        k_self = rows_of(KO, own, rows, S, HEAD)
        p_own = tl.exp2(row_dot(q, k_self, HEAD) * factor - normalizer)
        ds_own = p_own * (row_dot(g, rows_of(VO, own, rows, S, VALUE), HEAD) - delta)
        put(DKO, own, rows, S, scaled(q, ds_own * scale, HEAD), HEAD)
        put(DVO, own, rows, S, scaled(g, p_own, HEAD), VALUE)
        dq, left_over = scaled(k_self, ds_own, HEAD), ds_own
    else:
        dq, left_over = zeros(BM, HEAD), tl.zeros([BM], HEAD.acc)
    dq, left_over = _gradient_over(
        q, g, K, V, seen, C, start, end, first, last,
        normalizer, delta, dq, left_over, factor, HEAD, VALUE, BN, MASK.lower,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        dq, left_over = _gradient_over(
            q, g, KO, VO, own, S, start, end, first, last,
            normalizer, delta, dq, left_over, factor, HEAD, VALUE, BN, True,
        )  # fmt: skip
    start, end = common_keys(
        FIRST, head, heads, row, S, C, offset, group_size, context_group, BM, MASK
    )
    dq = add_scaled(dq, mean_row(K, seen, start, end, HEAD), -left_over, HEAD)
    put(DQ, own, rows, S, dq, HEAD, scale)
