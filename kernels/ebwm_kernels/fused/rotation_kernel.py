"""The Triton kernel of rotary positions: see rotation.py.

A program takes some heads of one position. Where tensors lie is their own business: three pointers
with their steps for q, k and v, and the rows of a projection's output.
"""

# Triton compiles these functions: its annotations say otherwise, as in attention/row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

ANY_SIZE = ["S"]
ANY_SIZE += [f"{tensor}_{step}" for tensor in "qkv" for step in ("batch", "position", "head")]


@triton.jit
def _places(X, sample, position, head, column, of_batch, of_position, of_head):
    """Addresses of the numbers of heads of one position of X (B, H, S, d), which lies anyhow."""
    start = sample.to(tl.int64) * of_batch + position.to(tl.int64) * of_position
    return X + start + head[:, None].to(tl.int64) * of_head + column[None, :]


@triton.jit(do_not_specialize=ANY_SIZE)
def _turn_heads(
    Q,
    K,
    V,
    ROWS,
    FACTORS,
    S,
    q_batch,
    q_position,
    q_head,
    k_batch,
    k_position,
    k_head,
    v_batch,
    v_position,
    v_head,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    D: tl.constexpr,
    JOIN: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """ROWS (B S, (HQ + HK + HV) D) to q, k and v, or with JOIN back, by the opposite angle."""
    HEADS: tl.constexpr = HQ + HK + HV
    HEAD_TILES: tl.constexpr = (HEADS + BR - 1) // BR
    tile = tl.program_id(0)
    row = tile // HEAD_TILES
    sample = row // S
    position = row % S
    head = (tile % HEAD_TILES) * BR + tl.arange(0, BR)
    column = tl.arange(0, BC)
    in_row = (column < D)[None, :]
    is_q = (head < HQ)[:, None] & in_row
    is_k = ((head >= HQ) & (head < HQ + HK))[:, None] & in_row
    is_v = ((head >= HQ + HK) & (head < HEADS))[:, None] & in_row
    at_q = _places(Q, sample, position, head, column, q_batch, q_position, q_head)
    at_k = _places(K, sample, position, head - HQ, column, k_batch, k_position, k_head)
    at_v = _places(V, sample, position, head - HQ - HK, column, v_batch, v_position, v_head)
    in_rows = row.to(tl.int64) * (HEADS * D) + head[:, None] * D + column[None, :]
    exists = (head < HEADS)[:, None] & in_row
    if JOIN:
        x = tl.load(at_q, mask=is_q, other=0.0).to(ACC)
        x += tl.load(at_k, mask=is_k, other=0.0).to(ACC)
        x += tl.load(at_v, mask=is_v, other=0.0).to(ACC)
    else:
        x = tl.load(ROWS + in_rows, mask=exists, other=0.0).to(ACC)
    pair = tl.arange(0, BC // 2)
    at_pair = FACTORS + position.to(tl.int64) * D + 2 * pair
    turns = (head < HQ + HK)[:, None]
    cosine = tl.load(at_pair, mask=2 * pair < D, other=0.0).to(ACC)
    sine = tl.load(at_pair + 1, mask=2 * pair < D, other=0.0).to(ACC)
    if JOIN:
        sine = -sine
    cosine = tl.where(turns, cosine[None, :], 1.0)
    sine = tl.where(turns, sine[None, :], 0.0)
    even, odd = tl.split(tl.reshape(x, [BR, BC // 2, 2]))
    turned = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    x = tl.reshape(turned, [BR, BC])
    if JOIN:
        tl.store(ROWS + in_rows, x.to(ROWS.dtype.element_ty), mask=exists)
    else:
        tl.store(at_q, x.to(Q.dtype.element_ty), mask=is_q)
        tl.store(at_k, x.to(K.dtype.element_ty), mask=is_k)
        tl.store(at_v, x.to(V.dtype.element_ty), mask=is_v)
