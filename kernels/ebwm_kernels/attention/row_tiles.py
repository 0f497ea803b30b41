"""Rows of d numbers inside a Triton kernel, as tuples of tiles that lie beside each other, and the
few products attention makes of them.

A row of `padded` columns is padded / part tiles of `part`: a tile has a power of two of columns,
which 96 and 192 are not; and three TF32 passes over 128 columns at once do not fit the registers.
d of the padded columns are in memory, the rest is zero.
"""

# Triton compiles these functions and Python never runs them: a loop over tl.static_range is
# unrolled, a call of another kernel returns, a default becomes a constexpr, and a constexpr that is
# a NamedTuple has its fields. Triton's own annotations say otherwise.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Head(NamedTuple):
    """How a kernel holds the rows of a head and multiplies them."""

    d: int  # columns in memory
    padded: int  # columns of a tile's rows together
    part: int  # columns of one tile
    acc: Any  # the type of sums and statistics: float32, and float64 in tests
    precision: str  # of tl.dot: its input_precision


@triton.jit
def _place(pointer, first_row, rows, num_rows, part: tl.constexpr, HEAD: tl.constexpr):
    """(addresses, mask) of one part of rows from first_row on in a (.., d) tensor: nothing beyond
    num_rows and d.
    """
    columns = part * HEAD.part + tl.arange(0, HEAD.part)
    mask = rows[:, None] < num_rows
    if HEAD.d != HEAD.padded:
        mask = mask & (columns[None, :] < HEAD.d)
    return pointer + first_row * HEAD.d + rows[:, None] * HEAD.d + columns[None, :], mask


@triton.jit
def rows_of(pointer, first_row, rows, num_rows, HEAD: tl.constexpr):
    """Rows of a (.., d) tensor from first_row on, in parts (len(rows), part); zeros beyond num_rows
    and d.
    """
    parts = ()
    for part in tl.static_range(HEAD.padded // HEAD.part):
        addresses, mask = _place(pointer, first_row, rows, num_rows, part, HEAD)
        parts += (tl.load(addresses, mask=mask, other=0.0),)
    return parts


@triton.jit
def put(
    pointer,
    first_row,
    rows,
    num_rows,
    parts,
    HEAD: tl.constexpr,
    factor=1.0,
):
    """Write factor * parts where rows_of would read them."""
    for part in tl.static_range(HEAD.padded // HEAD.part):
        addresses, mask = _place(pointer, first_row, rows, num_rows, part, HEAD)
        tl.store(addresses, (parts[part] * factor).to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def statistic(pointer, first_row, rows, num_rows):
    """One number for each of the rows; zero beyond num_rows."""
    return tl.load(pointer + first_row + rows, mask=rows < num_rows, other=0.0)


@triton.jit
def put_statistic(pointer, first_row, rows, num_rows, numbers):
    """Write numbers where `statistic` would read them."""
    tl.store(pointer + first_row + rows, numbers, mask=rows < num_rows)


@triton.jit
def mean_row(pointer, first_row, start, end, HEAD: tl.constexpr):
    """The mean of rows start .. end - 1, of the first 16 where they are more, in parts (1, part);
    zeros where there are none. No other row is read.
    """
    count = tl.maximum(tl.minimum(end - start, 16), 1).to(HEAD.acc)
    rows = rows_of(pointer, first_row, start + tl.arange(0, 16), end, HEAD)
    parts = ()
    for part in tl.static_range(len(rows)):
        parts += ((tl.sum(rows[part].to(HEAD.acc), 0) / count)[None, :],)
    return parts


@triton.jit
def zeros(num_rows: tl.constexpr, HEAD: tl.constexpr):
    columns: tl.constexpr = HEAD.part
    parts = ()
    for _part in tl.static_range(HEAD.padded // HEAD.part):
        parts += (tl.zeros([num_rows, columns], HEAD.acc),)
    return parts


@triton.jit
def scores(left, right, HEAD: tl.constexpr):
    """left right': every row of the one with every row of the other."""
    total = tl.dot(left[0], tl.trans(right[0]), input_precision=HEAD.precision).to(HEAD.acc)
    for part in tl.static_range(1, len(left)):
        product = tl.dot(left[part], tl.trans(right[part]), input_precision=HEAD.precision)
        total += product.to(HEAD.acc)
    return total


@triton.jit
def add_mix(total, weights, rows, HEAD: tl.constexpr):
    """total + weights rows."""
    parts = ()
    for part in tl.static_range(len(rows)):
        weights_ = weights.to(rows[part].dtype)
        product = tl.dot(weights_, rows[part], input_precision=HEAD.precision)
        parts += (total[part] + product.to(HEAD.acc),)
    return parts


@triton.jit
def row_dot(left, right, HEAD: tl.constexpr):
    """Every row of the one with the same row of the other."""
    total = tl.sum(left[0].to(HEAD.acc) * right[0].to(HEAD.acc), 1)
    for part in tl.static_range(1, len(left)):
        total += tl.sum(left[part].to(HEAD.acc) * right[part].to(HEAD.acc), 1)
    return total


@triton.jit
def scaled(rows, factors, HEAD: tl.constexpr):
    """Every row times its own factor."""
    parts = ()
    for part in tl.static_range(len(rows)):
        parts += (factors[:, None] * rows[part].to(HEAD.acc),)
    return parts


@triton.jit
def add_scaled(total, rows, factors, HEAD: tl.constexpr):
    """total + every row times its own factor."""
    parts = ()
    for part in tl.static_range(len(rows)):
        parts += (total[part] + factors[:, None] * rows[part].to(HEAD.acc),)
    return parts
