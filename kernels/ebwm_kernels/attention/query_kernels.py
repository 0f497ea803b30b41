"""The Triton kernels of the first order in which a program owns a tile of query rows.

    kernel            what it computes      products per tile of keys
    _forward          O, L                  2
    _gradient_query   D, dQ, dk*, dv*       3

Formulas and letters: attention/reference.py. Each has a loop over tiles of context keys in a
function of its own (.._over). A group of own keys is the same loop once more, over K*, V* and the
keys of the groups that the tile's rows belong to. A single own key is no tile but a column, where
it costs no registers in the loop: in the prologue or the epilogue.

Tensors are (B, H, S, d) for what belongs to queries, (B, H_kv, C, d) for keys and values, and lie
as AT says, by their names: row_tiles.Strides. Contiguous are (B, H, S) for statistics, (B, S) for
FIRST, the first visible key. Scores are multiplied by scale log2(e), so that exp2 serves; L is
kept in natural units.

K, V and the like are heads (row_tiles.head_of) in the functions, and tensors in the kernels.
Constants: HEAD (row_tiles.Head), MASK (intervals.Mask), OWN where queries have own keys, BM rows
and BN keys of a tile.
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
    inside,
    my_rows,
    own_keys,
    steps_over,
    tile_at,
    tiles_of,
)
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
from ebwm_kernels.attention.spoiled_rows import gradient_again, mix_again


@triton.jit
def weights_of(
    q,
    k,
    normalizer,
    first_key,
    first,
    last,
    factor,
    HEAD: tl.constexpr,
    BN: tl.constexpr,
    LOWER: tl.constexpr,
    EDGES: tl.constexpr,
):
    """P of a tile, exp(score - L) where a pair exists and 0 elsewhere; all exist but at EDGES."""
    p = tl.exp2(scores(q, k, HEAD) * factor - normalizer[:, None])
    if EDGES:
        p = tl.where(inside(first_key + tl.arange(0, BN), first, last, LOWER), p, 0.0)
    return p


# ------------------------------------------------------------------------------------------ forward


@triton.jit
def _softmax_over(
    q,
    K,
    V,
    num_keys,
    tiles,
    first,
    last,
    row_max,
    total,
    mixed,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,
    LOWER: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """The online softmax over these tiles of keys; EMPTY where a row may have met none yet."""
    for EDGES in tl.static_range(not WHOLE, 2):
        start, end = steps_over(tiles, EDGES, LOWER)
        for step in range(start, end, BN):
            first_key = tile_at(step, tiles, EDGES, LOWER)
            k = rows_of(K, first_key, num_keys, BN, HEAD, not EDGES)
            v = rows_of(V, first_key, num_keys, BN, VALUE, not EDGES)
            score = scores(q, k, HEAD) * factor
            if EDGES:
                keys = first_key + tl.arange(0, BN)
                score = tl.where(inside(keys, first, last, LOWER), score, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(score, 1))
            finite_max = new_max
            if EMPTY and EDGES:
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
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    place, rows = (sample, head, row), row + tl.arange(0, BM)
    k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
    v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
    start, end, first, last = context_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    common, common_end = common_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    WHOLE: tl.constexpr = has_whole_tiles(HEAD.precision)
    tiles = tiles_of(start, end, common, common_end, BN, WHOLE)
    q = load(Q, AT.Q, place, S, BM, HEAD)
    if OWN and not MASK.groups:
        row_max = row_dot(q, load(KO, AT.KO, place, S, BM, HEAD), HEAD) * factor
        total = tl.full([BM], 1.0, HEAD.acc)
        mixed = scaled(load(VO, AT.VO, place, S, BM, VALUE), total, HEAD)
    else:
        row_max = tl.full([BM], float("-inf"), HEAD.acc)
        total = tl.zeros([BM], HEAD.acc)
        mixed = zeros(BM, VALUE)
    EMPTY: tl.constexpr = MASK.lower and (MASK.groups or not OWN)
    row_max, total, mixed = _softmax_over(
        q, k_head, v_head, C, tiles, first, last,
        row_max, total, mixed, factor, HEAD, VALUE, BN, WHOLE, MASK.lower, EMPTY,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        tiles = tiles_of(start, end, start, start, BN, False)
        k_own, v_own = (
            head_of(KO, AT.KO, sample, head, HEAD),
            head_of(VO, AT.VO, sample, head, VALUE),
        )
        row_max, total, mixed = _softmax_over(
            q, k_own, v_own, S, tiles, first, last,
            row_max, total, mixed, factor, HEAD, VALUE, BN, False, True, EMPTY,
        )  # fmt: skip
    if EMPTY:
        total = tl.where(total > 0, total, 1.0)  # no key at all: O = 0, L = -inf
    store(O, AT.O, place, S, scaled(mixed, 1 / total, HEAD), BM, VALUE)
    put_statistic(L + own, rows, S, (row_max + tl.log2(total)) / LOG2_E)
    if MASK.causal or MASK.lower or MASK.groups:
        mix_again(
            Q, K, V, KO, VO, FIRST, O, L, AT, S, C, offset, group_size, context_group, sharing,
            heads, all_heads, heads_at_once, scale, factor, HEAD, VALUE, MASK, OWN, BM, BN,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------- gradient


@triton.jit
def _gradient_over(
    q,
    g,
    K,
    V,
    num_keys,
    tiles,
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
    WHOLE: tl.constexpr,
    LOWER: tl.constexpr,
):
    """dq + dS K and left_over + rowsum(dS) over these tiles of keys."""
    for EDGES in tl.static_range(not WHOLE, 2):
        start, end = steps_over(tiles, EDGES, LOWER)
        for step in range(start, end, BN):
            first_key = tile_at(step, tiles, EDGES, LOWER)
            k = rows_of(K, first_key, num_keys, BN, HEAD, not EDGES)
            v = rows_of(V, first_key, num_keys, BN, VALUE, not EDGES)
            p = weights_of(q, k, normalizer, first_key, first, last, factor, HEAD, BN, LOWER, EDGES)
            ds = (p * (scores(g, v, HEAD) - delta[:, None])).to(K[0].dtype.element_ty)
            left_over = add_sums(left_over, ds, HEAD)
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
    """dQ = s (dS K + ds* k*), dk* = s ds* q, dv* = p* G, and D for the kernels after it; dk* and
    dv* of a group come from _gradient_key.

    A row of dS sums to zero, as rounded for the product it does not: what is left over takes its
    share of a mean key away again.
    """
    sample, head, own, row = my_rows(S, heads, all_heads, heads_at_once, BM)
    place, rows = (sample, head, row), row + tl.arange(0, BM)
    k_head = head_of(K, AT.K, sample, head // sharing, HEAD)
    v_head = head_of(V, AT.V, sample, head // sharing, VALUE)
    start, end, first, last = context_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    common, common_end = common_keys(
        FIRST, sample, row, S, C, offset, group_size, context_group, BM, MASK
    )
    WHOLE: tl.constexpr = has_whole_tiles(HEAD.precision)
    tiles = tiles_of(start, end, common, common_end, BN, WHOLE)
    q, g = load(Q, AT.Q, place, S, BM, HEAD), load(G, AT.G, place, S, BM, VALUE)
    normalizer = statistic(L + own, rows, S) * LOG2_E
    delta = row_dot(load(O, AT.O, place, S, BM, VALUE), g, HEAD)
    put_statistic(DELTA + own, rows, S, delta)
    if OWN and not MASK.groups:  # in the prologue: what it loads is dead before the loop
        k_self = load(KO, AT.KO, place, S, BM, HEAD)
        p_own = tl.exp2(row_dot(q, k_self, HEAD) * factor - normalizer)
        ds_own = p_own * (row_dot(g, load(VO, AT.VO, place, S, BM, VALUE), HEAD) - delta)
        store(DKO, AT.DKO, place, S, scaled(q, ds_own * scale, HEAD), BM, HEAD)
        store(DVO, AT.DVO, place, S, scaled(g, p_own, HEAD), BM, VALUE)
        dq, left_over = scaled(k_self, ds_own, HEAD), no_sums(BM, HEAD) + ds_own[:, None]
    else:
        dq, left_over = zeros(BM, HEAD), no_sums(BM, HEAD)
    dq, left_over = _gradient_over(
        q, g, k_head, v_head, C, tiles, first, last,
        normalizer, delta, dq, left_over, factor, HEAD, VALUE, BN, WHOLE, MASK.lower,
    )  # fmt: skip
    if OWN and MASK.groups:
        start, end, first, last = own_keys(row, S, group_size, BM)
        tiles = tiles_of(start, end, start, start, BN, False)
        k_own, v_own = (
            head_of(KO, AT.KO, sample, head, HEAD),
            head_of(VO, AT.VO, sample, head, VALUE),
        )
        dq, left_over = _gradient_over(
            q, g, k_own, v_own, S, tiles, first, last,
            normalizer, delta, dq, left_over, factor, HEAD, VALUE, BN, False, True,
        )  # fmt: skip
    dq = add_scaled(dq, mean_row(k_head, common, common_end, HEAD), -sums_of(left_over), HEAD)
    store(DQ, AT.DQ, place, S, dq, BM, HEAD, scale)
    if MASK.causal or MASK.lower or MASK.groups:
        gradient_again(
            Q, K, V, KO, VO, FIRST, O, L, G, DQ, DKO, DVO, DELTA, AT, S, C, offset, group_size,
            context_group, sharing, heads, all_heads, heads_at_once, scale, factor, HEAD, VALUE,
            MASK, OWN, BM, BN,
        )  # fmt: skip
