"""The Triton kernels of RMSNorm: a program holds whole rows. Formulas and letters: pointwise.py.

    _norm_forward     x [+ u] -> y [, x + u]            reads 1 [2], writes 1 [2]
    _norm_gradient    g, x [, cotangent of x + u] -> dx [, dw, dshift]
    _norm_second      a, g, x -> dg, dx [, dw]

Tensors are (rows, D), contiguous; W and SHIFT (D,). DW and DSHIFT are (programs, D) sums over the
rows of a program, which takes TILES tiles one after the other.
"""

# Triton compiles these functions: its annotations say otherwise, as in attention/row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# A size that is 1 or a multiple of 16 would become part of a program: one program serves all.
ANY_SIZE = ["rows", "epsilon"]


@triton.jit
def _places(tile, rows, D: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """(addresses of a tile's numbers, which of them exist)."""
    row = tile.to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BC)
    exists = (row < rows)[:, None] & (column < D)[None, :]
    return row[:, None] * D + column[None, :], exists


@triton.jit
def _of_columns(W, D: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    column = tl.arange(0, BC)
    return tl.load(W + column, mask=column < D, other=0.0).to(ACC)[None, :]


@triton.jit
def _put_sums(SUMS, sums, D: tl.constexpr, BC: tl.constexpr):
    column = tl.arange(0, BC)
    place = tl.program_id(0).to(tl.int64) * D + column
    tl.store(SUMS + place, sums, mask=column < D)


@triton.jit
def _inverse_rms(x, epsilon, D: tl.constexpr):
    """r of rows x, (BR, 1)."""
    return (1.0 / tl.sqrt(tl.sum(x * x, 1) / D + epsilon))[:, None]


@triton.jit
def _mean(x, D: tl.constexpr):
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit(do_not_specialize=ANY_SIZE)
def _norm_forward(
    X,
    U,
    W,
    SHIFT,
    TOTAL,
    Y,
    rows,
    epsilon,
    D: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    place, exists = _places(tl.program_id(0), rows, D, BR, BC)
    x = tl.load(X + place, mask=exists, other=0.0).to(ACC)
    if HAS_U:
        x += tl.load(U + place, mask=exists, other=0.0).to(ACC)
        total = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + place, total, mask=exists)
        x = total.to(ACC)  # what the backward will read
    y = x * _inverse_rms(x, epsilon, D) * _of_columns(W, D, BC, ACC)
    if HAS_SHIFT:
        y += _of_columns(SHIFT, D, BC, ACC)
    tl.store(Y + place, y.to(Y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=ANY_SIZE)
def _norm_gradient(
    G,
    X,
    W,
    OF_TOTAL,
    DX,
    DW,
    DSHIFT,
    rows,
    epsilon,
    D: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    WITH_SHIFT: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    w = _of_columns(W, D, BC, ACC)
    weight_sums = tl.zeros([BC], ACC)
    shift_sums = tl.zeros([BC], ACC)
    for step in range(TILES):
        place, exists = _places(tl.program_id(0) * TILES + step, rows, D, BR, BC)
        g = tl.load(G + place, mask=exists, other=0.0).to(ACC)
        x = tl.load(X + place, mask=exists, other=0.0).to(ACC)
        r = _inverse_rms(x, epsilon, D)
        n = r * x
        h = g * w
        dx = r * (h - n * _mean(h * n, D))
        if HAS_TOTAL:
            dx += tl.load(OF_TOTAL + place, mask=exists, other=0.0).to(ACC)
        tl.store(DX + place, dx.to(DX.dtype.element_ty), mask=exists)
        if WITH_WEIGHT:
            weight_sums += tl.sum(g * n, 0)
        if WITH_SHIFT:
            shift_sums += tl.sum(g, 0)
    if WITH_WEIGHT:
        _put_sums(DW, weight_sums, D, BC)
    if WITH_SHIFT:
        _put_sums(DSHIFT, shift_sums, D, BC)


@triton.jit(do_not_specialize=ANY_SIZE)
def _norm_second(
    A,
    G,
    X,
    W,
    DG,
    DX,
    DW,
    rows,
    epsilon,
    D: tl.constexpr,
    WITH_WEIGHT: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    w = _of_columns(W, D, BC, ACC)
    weight_sums = tl.zeros([BC], ACC)
    for step in range(TILES):
        place, exists = _places(tl.program_id(0) * TILES + step, rows, D, BR, BC)
        a = tl.load(A + place, mask=exists, other=0.0).to(ACC)
        g = tl.load(G + place, mask=exists, other=0.0).to(ACC)
        x = tl.load(X + place, mask=exists, other=0.0).to(ACC)
        r = _inverse_rms(x, epsilon, D)
        n = r * x
        h = g * w
        a_n = _mean(a * n, D)
        h_n = _mean(h * n, D)
        a_h = _mean(a * h, D)
        t = r * (a - n * a_n)
        tl.store(DG + place, (w * t).to(DG.dtype.element_ty), mask=exists)
        dx = -r * r * (h * a_n + a * h_n + n * (a_h - 3.0 * a_n * h_n))
        tl.store(DX + place, dx.to(DX.dtype.element_ty), mask=exists)
        if WITH_WEIGHT:
            weight_sums += tl.sum(g * t, 0)
    if WITH_WEIGHT:
        _put_sums(DW, weight_sums, D, BC)
