"""Rotary positions in Triton, from where a projection wrote its rows to where attention reads them.

    split    (B, S, (H_q + H_k + H_v) d) -> q, k, v (B, H, S, d): q and k rotated, v as it is
    join     its transpose: three cotangents -> one, rotated by the opposite angle

Both are linear, and each is the other's derivative, of any order: nothing is kept but the table of
angles. q, k and v lie positions first, so that attention reads and writes them where they are, and
one product serves the three projections. Each pass reads and writes its numbers once.
H_q and H_v may be 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebwm_kernels.autograd_rules import is_mapped, transforms_active
from ebwm_kernels.fused import launches
from ebwm_kernels.fused.launches import Tile, next_power_of_two, num_tiles, ready, warps_for

Heads = tuple[Tensor, Tensor, Tensor]


class HeadCounts(NamedTuple):
    """Heads of queries, keys and values, which lie beside each other in a projection's rows."""

    q: int
    k: int
    v: int


def split_rotated(rows: Tensor, factors: Tensor, counts: HeadCounts) -> Heads:
    """q, k and v of rows (B, S, heads d); differentiable as often as one likes.

    factors: cosine and sine of every pair's angle, (S, d / 2, 2), float32 or float64.
    """
    if transforms_active() or torch.compiler.is_compiling():
        return split_reference(rows, factors, counts)
    return _Split.apply(rows, factors, counts)


def split_reference(rows: Tensor, factors: Tensor, counts: HeadCounts) -> Heads:
    """The same in plain operations."""
    d = 2 * factors.shape[1]
    q, k, v = rows.unflatten(-1, (-1, d)).transpose(1, 2).split(counts, 1)
    return _turned(q, factors), _turned(k, factors), v


def join_reference(q: Tensor, k: Tensor, v: Tensor, factors: Tensor) -> Tensor:
    """The transpose of `split_reference`: (B, S, heads d)."""
    back = torch.stack([factors[..., 0], -factors[..., 1]], -1)
    heads = torch.cat([_turned(q, back), _turned(k, back), v], 1)
    return heads.transpose(1, 2).flatten(2)


def _turned(x_BHSd: Tensor, factors: Tensor) -> Tensor:
    even, odd = x_BHSd.to(factors.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = factors.unbind(-1)
    pairs = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
    return pairs.flatten(-2).to(x_BHSd.dtype)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, factors, counts):
        ctx.factors, ctx.counts = factors, counts
        batch, num_positions, _ = rows.shape
        d = 2 * factors.shape[1]
        # queries apart: keys and values of a context are kept when they are gone
        q = rows.new_empty(batch, num_positions, counts.q, d).transpose(1, 2)
        keys_values = rows.new_empty(batch, num_positions, counts.k + counts.v, d).transpose(1, 2)
        k, v = keys_values.split(counts[1:], 1)
        _turn(q, k, v, ready(rows), factors, join=False)
        return q, k, v

    @staticmethod
    def backward(ctx, q, k, v):
        if transforms_active() or any(is_mapped(x) for x in (q, k, v)):
            return join_reference(q, k, v, ctx.factors), None, None
        return _Join.apply(q, k, v, ctx.factors, ctx.counts), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, factors, counts):
        ctx.factors, ctx.counts = factors, counts
        batch, _, num_positions, d = q.shape
        rows = q.new_empty(batch, num_positions, sum(counts) * d)
        q, k, v = _in_one_piece(q), _in_one_piece(k), _in_one_piece(v)
        _turn(q, k, v, rows, factors, join=True)
        return rows

    @staticmethod
    def backward(ctx, rows):
        if transforms_active() or is_mapped(rows):
            return *split_reference(rows, ctx.factors, ctx.counts), None, None
        return *_Split.apply(rows, ctx.factors, ctx.counts), None, None


def _in_one_piece(x: Tensor) -> Tensor:
    """A tensor (B, H, S, d) each of whose rows is in one piece."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def _turn(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, factors: Tensor, *, join: bool) -> None:
    import triton.language as tl

    from ebwm_kernels.fused.rotation_kernel import _turn_heads

    batch, _, num_positions, d = k.shape
    heads = q.shape[1] + k.shape[1] + v.shape[1]
    columns = max(2, next_power_of_two(d))
    head_rows = min(next_power_of_two(heads), max(1, 1024 // columns))
    tile = Tile(head_rows, columns, warps_for(head_rows * columns))
    of_heads: dict[str, Tensor | None] = {"Q": q, "K": k, "V": v}
    for name, x in of_heads.items():
        if x is not None and x.numel() == 0:
            of_heads[name] = None
    of_rows: dict[str, Tensor | None] = {"ROWS": rows}
    steps = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        steps[f"{name}_batch"] = x.stride(0)
        steps[f"{name}_position"] = x.stride(2)
        steps[f"{name}_head"] = x.stride(1)
    reads = {**(of_heads if join else of_rows), "FACTORS": factors}
    launches.launch(
        _turn_heads,
        batch * num_positions * num_tiles(heads, head_rows),
        reads,
        of_rows if join else of_heads,
        tile=tile,
        S=num_positions,
        **steps,
        HQ=q.shape[1],
        HK=k.shape[1],
        HV=v.shape[1],
        D=d,
        JOIN=join,
        ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
    )
