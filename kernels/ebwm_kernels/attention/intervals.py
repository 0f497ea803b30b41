"""Which keys a query row sees, and which rows see a key, inside a Triton kernel.

A row sees an interval of context keys, and its group's interval of own keys; a key is seen by an
interval of rows. Both ends never decrease from one row, or key, to the next, so that a tile knows
from its first and last row which tiles of the other side it meets at all.

    last key of row t     min(C, (t // n + 1) m + offset)     n queries and m observed keys a group
    first key of row t    FIRST[t], or 0
    first row of key j    max(0, j - offset) // m n
    last row of key j     LAST_ROW[j], or S
    own keys              the n of the row's own group, and the other way round

"Last" is one past the last throughout. Groups are a flag of their own, so that groups of one pay
for no division. Functions that take BM or BN return the interval of that tile (start, end) and
those of its rows or keys one by one (first, last).
"""

# As in row_tiles.py. A return in a branch does not end the function for the compiler: there is one
# at the end.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Sizes that are never compiled in: one program serves all, and it is the one that tests compile.
SIZES = (
    "S",
    "C",
    "offset",
    "group_size",
    "context_group",
    "sharing",  # query heads per key head
    "heads",  # heads per sample: of queries, or of keys where a program owns keys
    "all_heads",  # of all samples: num_programs / tiles per head
    "heads_at_once",
)


class Mask(NamedTuple):
    """What limits a row's context keys; sizes come at run time."""

    causal: bool  # a last key per row
    groups: bool  # n or m is not one
    lower: bool  # a first key per row


@triton.jit
def head_and_tile(num_tiles, all_heads, heads_at_once):
    """(head, tile) of this program, tile 0 of all heads first.

    Tile 0 should be the longest, so that no long program starts last. Heads come in batches whose
    keys stay in the GPU's cache together.
    """
    program = tl.program_id(0)
    first_head = program // (num_tiles * heads_at_once) * heads_at_once
    width = tl.minimum(heads_at_once, all_heads - first_head)
    place = program - first_head * num_tiles
    return (first_head + place % width).to(tl.int64), place // width


@triton.jit
def my_rows(S, heads, all_heads, heads_at_once, BM: tl.constexpr):
    """(sample, head in it, where the head's statistics start, first row) of this program: the last
    rows come first, since they see most keys.
    """
    num_tiles = tl.cdiv(S, BM)
    head, tile = head_and_tile(num_tiles, all_heads, heads_at_once)
    sample = head // heads
    return sample, head - sample * heads, head * S, (num_tiles - 1 - tile) * BM


# ---------------------------------------------------------------------------------- tiles of a loop


@triton.constexpr_function
def has_whole_tiles(precision):
    """Whether tiles that all rows see in full have a loop of their own, without masks.

    Not where float32 is multiplied in three passes: masks are little beside them, and registers
    are short.
    """
    return precision == "ieee"


@triton.jit
def tiles_of(start, end, common, common_end, SIZE: tl.constexpr, WHOLE: tl.constexpr):
    """The tiles of SIZE places that cover start .. end - 1: (start, end, where the whole ones
    begin, and end). Whole are those in common .. common_end - 1, the places that all rows see.
    """
    if WHOLE:
        whole_end = start + tl.maximum(tl.minimum(common_end, end) - start, 0) // SIZE * SIZE
        whole = start + tl.cdiv(tl.maximum(common - start, 0), SIZE) * SIZE
        whole = tl.minimum(whole, whole_end)
    else:
        whole, whole_end = start, start
    return start, end, whole, whole_end


@triton.jit
def steps_over(tiles, EDGES: tl.constexpr, LOWER: tl.constexpr):
    """(start, end) of the loop over the whole tiles, or over those at the EDGES: behind them, and
    with LOWER before them as well.
    """
    start, end, whole, whole_end = tiles
    if not EDGES:
        first, last = whole, whole_end
    elif LOWER:
        first, last = start, end - (whole_end - whole)
    else:
        first, last = whole_end, end
    return first, last


@triton.jit
def tile_at(step, tiles, EDGES: tl.constexpr, LOWER: tl.constexpr):
    """The first place of the tile of a step of this loop."""
    place = step
    if EDGES and LOWER:
        _, _, whole, whole_end = tiles
        place += tl.where(step < whole, 0, whole_end - whole)
    return place


@triton.jit
def inside(places, first, last, LOWER: tl.constexpr):
    """(tile rows, places): whether a place lies in the interval of the tile's row; without LOWER
    every interval is known to start early enough. An end that all rows share comes as one number
    (1,), which is compared once per place.
    """
    found = places[None, :] < last[:, None]
    if LOWER:
        found = found & (places[None, :] >= first[:, None])
    return found


# ------------------------------------------------------------------------------------ keys of a row


@triton.jit
def _first_key(FIRST, sample, rows, S, MASK: tl.constexpr):
    """The first context key of rows, which are one or many."""
    if MASK.lower:
        first = tl.load(FIRST + sample * S + rows, mask=rows < S, other=0)
    else:
        first = rows * 0
    return first


@triton.jit
def _last_key(rows, C, offset, group_size, context_group, MASK: tl.constexpr):
    """One past the last context key of rows, which are one or many; of all if not causal."""
    if not MASK.causal:
        last = C
    elif MASK.groups:
        last = tl.minimum(C, (rows // group_size + 1) * context_group + offset)
    else:
        last = tl.minimum(C, rows + 1 + offset)
    return last


@triton.jit
def context_keys(
    FIRST,
    sample,
    row,
    S,
    C,
    offset,
    group_size,
    context_group,
    BM: tl.constexpr,
    MASK: tl.constexpr,
):
    """(start, end, first, last) of the context keys that rows row .. row + BM - 1 see."""
    rows = row + tl.arange(0, BM)
    first = _first_key(FIRST, sample, rows, S, MASK)
    last = _last_key(rows, C, offset, group_size, context_group, MASK)
    if not MASK.causal:
        last = tl.zeros([1], tl.int32) + C
    start = _first_key(FIRST, sample, row, S, MASK)
    final_row = tl.minimum(row + BM, S) - 1
    end = _last_key(final_row, C, offset, group_size, context_group, MASK)
    return start, end, first, last


@triton.jit
def common_keys(
    FIRST,
    sample,
    row,
    S,
    C,
    offset,
    group_size,
    context_group,
    BM: tl.constexpr,
    MASK: tl.constexpr,
):
    """(start, end) of the context keys that every one of these rows sees; there may be none."""
    final_row = tl.minimum(row + BM, S) - 1
    start = _first_key(FIRST, sample, final_row, S, MASK)
    return start, _last_key(row, C, offset, group_size, context_group, MASK)


@triton.jit
def own_keys(row, S, group_size, BM: tl.constexpr):
    """(start, end, first, last) of the own keys that rows row .. row + BM - 1 see: their groups'.

    S is a multiple of group_size.
    """
    first = (row + tl.arange(0, BM)) // group_size * group_size
    final_row = tl.minimum(row + BM, S) - 1
    end = (final_row // group_size + 1) * group_size
    return row // group_size * group_size, end, first, first + group_size


# ------------------------------------------------------------------------------------ rows of a key


@triton.jit
def _first_row(keys, offset, group_size, context_group, MASK: tl.constexpr):
    """The first row whose last key lies beyond keys, which are one or many."""
    if not MASK.causal:
        first = keys * 0
    elif MASK.groups:
        first = tl.maximum(keys - offset, 0) // context_group * group_size
    else:
        first = tl.maximum(keys - offset, 0)
    return first


@triton.jit
def rows_of_context(
    LAST_ROW,
    sample,
    key,
    S,
    C,
    offset,
    group_size,
    context_group,
    BN: tl.constexpr,
    MASK: tl.constexpr,
):
    """(start, end, first, last) of the rows that see context keys key .. key + BN - 1."""
    keys = key + tl.arange(0, BN)
    first = _first_row(keys, offset, group_size, context_group, MASK)
    start = _first_row(key, offset, group_size, context_group, MASK)
    if MASK.lower:
        last = tl.load(LAST_ROW + sample * C + keys, mask=keys < C, other=0)
        end = tl.load(LAST_ROW + sample * C + tl.minimum(key + BN, C) - 1)
    else:
        last = tl.zeros([1], tl.int32) + S
        end = S
    return start, end, first, last


@triton.jit
def common_rows(
    LAST_ROW,
    sample,
    key,
    S,
    C,
    offset,
    group_size,
    context_group,
    BN: tl.constexpr,
    MASK: tl.constexpr,
):
    """(start, end) of the rows that see every one of these context keys; there may be none."""
    start = _first_row(tl.minimum(key + BN, C) - 1, offset, group_size, context_group, MASK)
    end = S
    if MASK.lower:
        end = tl.load(LAST_ROW + sample * C + key)
    return start, end


@triton.jit
def rows_of_own(key, S, group_size, BN: tl.constexpr):
    """(start, end, first, last) of the rows that see own keys key .. key + BN - 1."""
    return own_keys(key, S, group_size, BN)


@triton.jit
def my_keys(C, heads, all_heads, heads_at_once, BN: tl.constexpr):
    """(sample, key head in it, first key) of this program: the first keys come first, most rows
    see them.
    """
    key_head, tile = head_and_tile(tl.cdiv(C, BN), all_heads, heads_at_once)
    sample = key_head // heads
    return sample, key_head - sample * heads, tile * BN


@triton.jit
def rows_of_keys(
    LAST_ROW,
    sample,
    key,
    S,
    C,
    offset,
    group_size,
    context_group,
    MASK: tl.constexpr,
    OWN: tl.constexpr,
    BN: tl.constexpr,
):
    """(start, end, first, last) of the rows that see keys key .. key + BN - 1."""
    if OWN:
        start, end, first, last = rows_of_own(key, S, group_size, BN)
    else:
        start, end, first, last = rows_of_context(
            LAST_ROW, sample, key, S, C, offset, group_size, context_group, BN, MASK
        )
    return start, end, first, last


@triton.jit
def head_and_row(step, tiles, key_head, sharing, start, SHARED: tl.constexpr, BM: tl.constexpr):
    """(query head, first row) of a step of the one loop over heads and rows: two nested loops cost
    40 registers. Without SHARED keys there is nothing to divide. Heads are those of a sample.
    """
    if SHARED:
        head, row = key_head * sharing + step // tiles, start + step % tiles * BM
    else:
        head, row = key_head, start + step * BM
    return head, row
