"""Rows of d numbers inside a Triton kernel, as tuples of tiles that lie beside each other, and the
few products attention makes of them.

A row of `padded` columns is padded / part tiles of `part`: a tile has a power of two of columns,
which 96 and 192 are not; and three TF32 passes over 128 columns at once do not fit the registers.
d of the padded columns are in memory, the rest is zero.

A head of a tensor (B, H, S, d) is its first row's address and the step from a row to the next: the
tensor lies where it likes, as long as each row is in one piece.
"""

# Triton compiles these functions and Python never runs them: a loop over tl.static_range is
# unrolled, a call of another kernel returns, a default becomes a constexpr, and a constexpr that is
# a NamedTuple has its fields. Triton's own annotations say otherwise.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

# Scores are multiplied by it where exponentials are taken, so that exp2 serves.
LOG2_E = tl.constexpr(math.log2(math.e))


class Head(NamedTuple):
    """How a kernel holds the rows of a head and multiplies them."""

    d: int  # columns in memory
    padded: int  # columns of a tile's rows together
    part: int  # columns of one tile
    align: int  # columns that every row's place is a multiple of
    acc: Any  # the type of sums and statistics: float32, and float64 in tests
    precision: str  # of tl.dot: its input_precision
    sum_columns: int  # of the product that sums rows: add_sums; 1 where it is no product


class Strides(NamedTuple):
    """Steps of a tensor (B, H, S, d).

    batch, head: in units of 1/16 of HEAD.align columns. Triton compiles a number that is 1, or a
    multiple of 16, into a program; these are all multiples of 16, so that one program serves all.
    row: in columns, and compiled in: addresses of a tile's rows that are known to the compiler
    save up to 30 registers. A model has one or two.
    """

    batch: int
    head: int
    row: tl.constexpr


@triton.jit
def head_of(pointer, strides, sample, head, HEAD: tl.constexpr):
    """A head of a tensor: (address of its first row, columns from a row to the next)."""
    start = sample * (strides.batch // 16).to(tl.int64) + head * (strides.head // 16).to(tl.int64)
    return pointer + start * HEAD.align, strides.row


@triton.jit
def _place(head, first_row, num_rows, part: tl.constexpr, COUNT: tl.constexpr, HEAD: tl.constexpr):
    """(addresses, mask) of one part of rows first_row .. first_row + COUNT - 1 of a head: nothing
    beyond num_rows and d.
    """
    rows = first_row + tl.arange(0, COUNT)
    columns = part * HEAD.part + tl.arange(0, HEAD.part)
    mask = rows[:, None] < num_rows
    if HEAD.d != HEAD.padded:
        mask = mask & (columns[None, :] < HEAD.d)
    return head[0] + rows[:, None] * head[1] + columns[None, :], mask


@triton.jit
def rows_of(
    head,
    first_row,
    num_rows,
    COUNT: tl.constexpr,
    HEAD: tl.constexpr,
    ALL=False,
):
    """Rows first_row .. first_row + COUNT - 1 of a head, in parts (COUNT, part); zeros beyond
    num_rows and d. ALL where no row is beyond num_rows.
    """
    parts = ()
    for part in tl.static_range(HEAD.padded // HEAD.part):
        addresses, mask = _place(head, first_row, num_rows, part, COUNT, HEAD)
        if ALL and HEAD.d == HEAD.padded:
            rows = tl.load(addresses)
        else:
            rows = tl.load(addresses, mask=mask, other=0.0)
        parts += (rows,)
    return parts


@triton.jit
def put(head, first_row, num_rows, parts, COUNT: tl.constexpr, HEAD: tl.constexpr, factor=1.0):
    """Write factor * parts where rows_of would read them."""
    for part in tl.static_range(HEAD.padded // HEAD.part):
        addresses, mask = _place(head, first_row, num_rows, part, COUNT, HEAD)
        tl.store(addresses, (parts[part] * factor).to(head[0].dtype.element_ty), mask=mask)


@triton.jit
def load(
    pointer,
    strides,
    place,
    num_rows,
    COUNT: tl.constexpr,
    HEAD: tl.constexpr,
    ALL=False,
):
    """rows_of a tensor, where place is (sample, head, first row)."""
    head = head_of(pointer, strides, place[0], place[1], HEAD)
    return rows_of(head, place[2], num_rows, COUNT, HEAD, ALL)


@triton.jit
def store(
    pointer,
    strides,
    place,
    num_rows,
    parts,
    COUNT: tl.constexpr,
    HEAD: tl.constexpr,
    factor=1.0,
):
    """Write factor * parts where `load` would read them."""
    head = head_of(pointer, strides, place[0], place[1], HEAD)
    put(head, place[2], num_rows, parts, COUNT, HEAD, factor)


@triton.jit
def statistic(pointer, rows, num_rows):
    """One number for each of the rows of a head, whose first one pointer is at; zero beyond
    num_rows.
    """
    return tl.load(pointer + rows, mask=rows < num_rows, other=0.0)


@triton.jit
def put_statistic(pointer, rows, num_rows, numbers):
    """Write numbers where `statistic` would read them."""
    tl.store(pointer + rows, numbers, mask=rows < num_rows)


@triton.jit
def mean_row(head, start, end, HEAD: tl.constexpr):
    """The mean of a head's rows start .. end - 1, of the first 16 where they are more, in parts
    (1, part); zeros where there are none. No other row is read.
    """
    count = tl.maximum(tl.minimum(end - start, 16), 1).to(HEAD.acc)
    rows = rows_of(head, start, end, 16, HEAD)
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
def no_sums(num_rows: tl.constexpr, HEAD: tl.constexpr):
    """Sums of rows to start with: (num_rows, HEAD.sum_columns), which are all alike."""
    columns: tl.constexpr = HEAD.sum_columns
    return tl.zeros([num_rows, columns], HEAD.acc)


@triton.jit
def add_sums(total, weights, HEAD: tl.constexpr):
    """total + sums of the rows of weights, which are of the inputs' type.

    As a product with ones: half precisions come in pairs in a register, which a sum would take
    apart, number by number. float32 has nothing to take apart.
    """
    if HEAD.sum_columns > 1:
        ones = tl.full([weights.shape[1], HEAD.sum_columns], 1.0, weights.dtype)
        total += tl.dot(weights, ones, input_precision=HEAD.precision).to(HEAD.acc)
    else:
        total += tl.sum(weights.to(HEAD.acc), 1)[:, None]
    return total


@triton.jit
def sums_of(total):
    """The sum of each row, (num_rows,)."""
    return tl.sum(total, 1) / total.shape[1]


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
