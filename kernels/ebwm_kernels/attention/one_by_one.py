"""What a row does not see never reaches it, be it infinite or no number: isolation.py for the
Triton kernels.

A product of tiles multiplies every row by every key, and a weight of zero times an infinite key is
no number. A kernel asks once, behind its loop, whether what it wrote is finite. Where it is not, it
sums again, one key at a time (one row at a time, where it owns keys), and leaves out the pairs that
do not exist. So nothing is paid inside the loops, and a number that is infinite for those who see
it comes out as such.

In these sums no number is rounded to the inputs' precision, and no row's share is left over. They
take a part of the tile's rows or keys at a time, so that the loops before keep their registers.
"""

# As in row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from ebwm_kernels.attention.row_tiles import load, row_dot, rows_of

NUMBERS = 512  # of a tensor, that a program holds in these sums


@triton.constexpr_function
def part_of(padded, value_padded):
    """How many rows or keys are summed at a time; a tile has a multiple of them."""
    return min(16, NUMBERS // triton.next_power_of_2(max(padded, value_padded)))


@triton.jit
def is_spoiled(pointer, strides, place, num_rows, COUNT: tl.constexpr, HEAD: tl.constexpr):
    """Whether a number that this program stored there (row_tiles.store) is not finite.

    It is read again, since asking the registers would cost some.
    """
    tl.debug_barrier()  # other threads wrote it
    flaw = tl.zeros([1], HEAD.acc)
    parts = load(pointer, strides, place, num_rows, COUNT, HEAD)
    for part in tl.static_range(len(parts)):
        numbers = parts[part].to(HEAD.acc)
        flaw += tl.sum(numbers - numbers)  # zero, or no number
    return tl.max(tl.where(flaw != 0.0, 1, 0), 0) != 0


@triton.jit
def add_seen(total, rows, factors, sees, HEAD: tl.constexpr):
    """total + every row times its own factor where the pair exists. rows: a single one, or as many
    as factors.
    """
    parts = ()
    for part in tl.static_range(len(rows)):
        change = factors[:, None] * rows[part].to(HEAD.acc)
        parts += (total[part] + tl.where(sees[:, None], change, 0.0),)
    return parts


@triton.jit
def sees_one(place, first, last, LOWER: tl.constexpr):
    """Whether one place lies in the intervals of these rows or keys: intervals.inside."""
    found = place < last
    if LOWER:
        found = found & (place >= first)
    return found


@triton.jit
def weights_of_one(left, right, normalizer, factor, HEAD: tl.constexpr):
    """P of pairs that exist, of rows with one key or of keys with one row."""
    return tl.exp2(row_dot(left, right, HEAD) * factor - normalizer)


@triton.jit
def mixed_one_by_one(
    q,
    K,
    V,
    num_keys,
    start,
    end,
    first,
    last,
    normalizer,
    mixed,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    LOWER: tl.constexpr,
):
    """mixed + P V over keys start .. end - 1."""
    for key in range(start, end):
        sees = sees_one(key, first, last, LOWER)
        p = weights_of_one(q, rows_of(K, key, num_keys, 1, HEAD), normalizer, factor, HEAD)
        mixed = add_seen(mixed, rows_of(V, key, num_keys, 1, VALUE), p, sees, VALUE)
    return mixed


@triton.jit
def gradient_one_by_one(
    q,
    g,
    K,
    V,
    num_keys,
    start,
    end,
    first,
    last,
    normalizer,
    delta,
    dq,
    factor,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    LOWER: tl.constexpr,
):
    """dq + dS K over keys start .. end - 1."""
    for key in range(start, end):
        k = rows_of(K, key, num_keys, 1, HEAD)
        p = weights_of_one(q, k, normalizer, factor, HEAD)
        ds = p * (row_dot(g, rows_of(V, key, num_keys, 1, VALUE), VALUE) - delta)
        dq = add_seen(dq, k, ds, sees_one(key, first, last, LOWER), HEAD)
    return dq


@triton.jit
def tangent_one_by_one(
    q,
    a,
    K,
    V,
    B,
    CV,
    num_keys,
    start,
    end,
    first,
    last,
    normalizer,
    mu,
    moved,
    factor,
    scale,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    LOWER: tl.constexpr,
    KEYS: tl.constexpr,
):
    """mu + rowsum(P Sdot) and moved + (P Sdot) V + P C over keys start .. end - 1."""
    for key in range(start, end):
        sees = sees_one(key, first, last, LOWER)
        k = rows_of(K, key, num_keys, 1, HEAD)
        p = weights_of_one(q, k, normalizer, factor, HEAD)
        sd = row_dot(a, k, HEAD)
        if KEYS:
            sd += row_dot(q, rows_of(B, key, num_keys, 1, HEAD), HEAD)
            moved = add_seen(moved, rows_of(CV, key, num_keys, 1, VALUE), p, sees, VALUE)
        weighted = p * (sd * scale)
        mu += tl.where(sees, weighted, 0.0)
        moved = add_seen(moved, rows_of(V, key, num_keys, 1, VALUE), weighted, sees, VALUE)
    return mu, moved


@triton.jit
def second_one_by_one(
    q,
    a,
    g,
    g_out,
    K,
    V,
    B,
    CV,
    num_keys,
    start,
    end,
    first,
    last,
    normalizer,
    mu,
    phi,
    delta,
    rho,
    gq,
    factor,
    scale,
    HEAD: tl.constexpr,
    VALUE: tl.constexpr,
    LOWER: tl.constexpr,
    KEYS: tl.constexpr,
    JOINT: tl.constexpr,
):
    """gq + Z K + dS B over keys start .. end - 1; JOINT: Z + Y for Z."""
    for key in range(start, end):
        sees = sees_one(key, first, last, LOWER)
        k = rows_of(K, key, num_keys, 1, HEAD)
        p = weights_of_one(q, k, normalizer, factor, HEAD)
        v = rows_of(V, key, num_keys, 1, VALUE)
        ds = p * (row_dot(g, v, VALUE) - delta)
        sd = row_dot(a, k, HEAD)
        e = -phi
        if JOINT:
            e += row_dot(g_out, v, VALUE) - rho
        if KEYS:
            b = rows_of(B, key, num_keys, 1, HEAD)
            sd += row_dot(q, b, HEAD)
            gq = add_seen(gq, b, ds, sees, HEAD)
            e += row_dot(g, rows_of(CV, key, num_keys, 1, VALUE), VALUE)
        gq = add_seen(gq, k, ds * (sd * scale - mu) + p * e, sees, HEAD)
    return gq
