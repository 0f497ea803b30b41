"""Rows of d numbers inside a Triton kernel, as tuples of tiles that lie beside each other, and the
few products attention makes of them.

A row of DP columns is DP / PART tiles of PART: a tile has a power of two of columns, which 96 and
192 are not; and three TF32 passes over 128 columns at once do not fit the registers. D of the DP
columns are in memory, the rest is zero. ACC is the type of sums, PRECISION tl.dot's
input_precision.
"""

# Triton compiles these functions and Python never runs them: a loop over tl.static_range is
# unrolled, a call of another kernel returns, and a default becomes a constexpr. Triton's own
# annotations say otherwise.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(
    pointer,
    first_row,
    rows,
    num_rows,
    part: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
):
    """(addresses, mask) of one part of rows from first_row on in a (.., D) tensor: nothing beyond
    num_rows and D.
    """
    columns = part * PART + tl.arange(0, PART)
    mask = rows[:, None] < num_rows
    if D != DP:
        mask = mask & (columns[None, :] < D)
    return pointer + first_row * D + rows[:, None] * D + columns[None, :], mask


@triton.jit
def rows_of(
    pointer, first_row, rows, num_rows, D: tl.constexpr, DP: tl.constexpr, PART: tl.constexpr
):
    """Rows of a (.., D) tensor from first_row on, in parts (len(rows), PART); zeros beyond num_rows
    and D.
    """
    parts = ()
    for part in tl.static_range(DP // PART):
        addresses, mask = _place(pointer, first_row, rows, num_rows, part, D, DP, PART)
        parts += (tl.load(addresses, mask=mask, other=0.0),)
    return parts


@triton.jit
def put(
    pointer,
    first_row,
    rows,
    num_rows,
    parts,
    D: tl.constexpr,
    DP: tl.constexpr,
    PART: tl.constexpr,
    factor: tl.constexpr = 1.0,  # pyright: ignore[reportArgumentType]
):
    """Write factor * parts where rows_of would read them."""
    for part in tl.static_range(DP // PART):
        addresses, mask = _place(pointer, first_row, rows, num_rows, part, D, DP, PART)
        tl.store(addresses, (parts[part] * factor).to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def row_of(pointer, row, D: tl.constexpr, DP: tl.constexpr, PART: tl.constexpr):
    """One row of a (.., D) tensor, in parts (1, PART)."""
    parts = ()
    for part in tl.static_range(DP // PART):
        columns = part * PART + tl.arange(0, PART)
        parts += (tl.load(pointer + row * D + columns, mask=columns < D, other=0.0)[None, :],)
    return parts


@triton.jit
def zeros(num_rows: tl.constexpr, DP: tl.constexpr, PART: tl.constexpr, ACC: tl.constexpr):
    parts = ()
    for _part in tl.static_range(DP // PART):
        parts += (tl.zeros([num_rows, PART], ACC),)
    return parts


@triton.jit
def scores(left, right, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """left right': every row of the one with every row of the other."""
    total = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION).to(ACC)
    for part in tl.static_range(1, len(left)):
        total += tl.dot(left[part], tl.trans(right[part]), input_precision=PRECISION).to(ACC)
    return total


@triton.jit
def add_mix(total, weights, rows, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """total + weights rows."""
    parts = ()
    for part in tl.static_range(len(rows)):
        parts += (
            total[part]
            + tl.dot(weights.to(rows[part].dtype), rows[part], input_precision=PRECISION).to(ACC),
        )
    return parts


@triton.jit
def row_dot(left, right, ACC: tl.constexpr):
    """Every row of the one with the same row of the other."""
    total = tl.sum(left[0].to(ACC) * right[0].to(ACC), 1)
    for part in tl.static_range(1, len(left)):
        total += tl.sum(left[part].to(ACC) * right[part].to(ACC), 1)
    return total


@triton.jit
def scaled(rows, factors, ACC: tl.constexpr):
    """Every row times its own factor."""
    parts = ()
    for part in tl.static_range(len(rows)):
        parts += (factors[:, None] * rows[part].to(ACC),)
    return parts


@triton.jit
def add_scaled(total, rows, factors, ACC: tl.constexpr):
    """total + every row times its own factor."""
    parts = ()
    for part in tl.static_range(len(rows)):
        parts += (total[part] + factors[:, None] * rows[part].to(ACC),)
    return parts
