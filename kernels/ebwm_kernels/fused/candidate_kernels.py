"""The Triton kernels of a first step that chooses candidates: passes over x_1 (rows, V).

    _choose_rows      x, the K-th largest number of a row -> the K tokens, ascending; m and s of
                      the others: their largest number and their sum of exp(x - m)
    _rest_gradient    exp(x - m) / s grad_tail + onehot(y) grad_target, rounded

Of numbers equal to the K-th largest the lowest tokens are chosen; a NaN is larger than every
number. What they compute in plain code: vocabulary/candidates.py.
"""

# Triton compiles the kernels: its annotations say otherwise, as in attention/row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebwm_kernels.fused import launches
from ebwm_kernels.fused.launches import num_tiles
from ebwm_kernels.fused.vocabulary import TILE, sums_of
from ebwm_kernels.fused.vocabulary_kernels import LOWEST, tile_of_a_row


@triton.jit
def _choose_rows(
    X,
    LEAST,
    MISSING,
    IDS,
    NORMALIZER,
    V: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
):
    """LEAST: the K-th largest of a row; MISSING: how many of those equal to it are chosen."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BC)
    least = tl.load(LEAST + row).to(ACC)
    missing = tl.load(MISSING + row).to(tl.int32)
    least_is_nan = tl.where(least != least, 1, 0)
    largest = tl.full([BC], LOWEST, ACC)
    total = tl.zeros([BC], ACC)
    equal_before = tl.zeros([], tl.int32)
    chosen_before = tl.zeros([], tl.int32)
    for start in range(0, V, BC):
        exists = start + column < V
        x = tl.load(X + row * V + start + column, mask=exists, other=LOWEST).to(ACC)
        # 1 or 0: of numbers that do not exist neither
        larger = tl.where(x > least, 1, tl.where(x != x, 1 - least_is_nan, 0))
        equal = tl.where(x == least, 1, tl.where(x != x, least_is_nan, 0))
        larger = tl.where(exists, larger, 0)
        equal = tl.where(exists, equal, 0)
        number = equal_before + tl.cumsum(equal, 0)
        chosen = tl.where(number <= missing, larger + equal, larger)
        place = chosen_before + tl.cumsum(chosen, 0) - 1
        is_chosen = (chosen > 0) & (place < K)
        tl.store(IDS + row * K + place, (start + column).to(tl.int64), mask=is_chosen)
        equal_before += tl.sum(equal, 0)
        chosen_before += tl.sum(chosen, 0)
        rest = exists & (chosen == 0)
        x = tl.where(rest, x, LOWEST)
        higher = tl.maximum(largest, x)
        total = total * tl.exp(largest - higher) + tl.where(rest, tl.exp(x - higher), 0.0)
        largest = higher
    m = tl.max(largest, 0)
    tl.store(NORMALIZER + 2 * row, m)
    tl.store(NORMALIZER + 2 * row + 1, tl.sum(total * tl.exp(largest - m), 0))


@triton.jit
def _rest_gradient(
    X,
    NORMALIZER,
    TARGET,
    OF_TAIL,
    OF_TARGET,
    ROUNDED,
    V: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
):
    """Also where candidates are, whose gradients are put there afterwards."""
    row, column, exists = tile_of_a_row(V, COLUMN_TILES, BC)
    place = row * V + column
    m = tl.load(NORMALIZER + 2 * row).to(ACC)
    s = tl.load(NORMALIZER + 2 * row + 1).to(ACC)
    x = tl.load(X + place, mask=exists, other=LOWEST).to(ACC)
    dx = tl.exp(x - m) / s * tl.load(OF_TAIL + row).to(ACC)
    if HAS_TARGET:
        target = tl.load(TARGET + row).to(tl.int32)
        dx = tl.where(column == target, dx + tl.load(OF_TARGET + row).to(ACC), dx)
    tl.store(ROUNDED + place, dx.to(ROUNDED.dtype.element_ty), mask=exists)


def choose_rows(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(the tokens of the `count` largest numbers of each row of x (rows, V), ascending: (rows,
    count) int64; m and s of the others, (rows, 2)). count: below V.
    """
    values = x.topk(count, dim=-1, sorted=True).values
    least = values[:, -1].contiguous()
    is_nan, least_is_nan = values.isnan(), least.isnan()[:, None]
    larger = (values > least[:, None]) | (is_nan & ~least_is_nan)
    missing = (count - larger.sum(-1)).to(torch.int32)
    ids = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    normalizer = torch.empty(len(x), 2, dtype=x.dtype, device=x.device)
    launches.launch(
        _choose_rows,
        len(x),
        {"X": x, "LEAST": least, "MISSING": missing},
        {"IDS": ids, "NORMALIZER": normalizer},
        tile=TILE,
        V=x.shape[1],
        K=count,
        ACC=sums_of(x.dtype),
    )
    return ids, normalizer


def rest_gradient(
    x: Tensor,
    normalizer: Tensor,
    target: Tensor | None,
    of_tail: Tensor,
    of_target: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of x (rows, V) but for its candidates', in dtype, from those of T and of the
    targets' numbers (rows,).
    """
    num_rows, size = x.shape
    rounded = torch.empty_like(x, dtype=dtype)
    column_tiles = num_tiles(size, TILE.columns)
    reads = {"X": x, "NORMALIZER": normalizer, "TARGET": target}
    launches.launch(
        _rest_gradient,
        num_rows * column_tiles,
        reads | {"OF_TAIL": of_tail, "OF_TARGET": of_target},
        {"ROUNDED": rounded},
        tile=TILE,
        V=size,
        COLUMN_TILES=column_tiles,
        HAS_TARGET=target is not None,
        ACC=sums_of(x.dtype),
    )
    return rounded
