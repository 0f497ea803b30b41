"""RMSNorm's passes by the kernels of norm_kernels.py, for pointwise.py's functions."""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from ebwm_kernels.fused import launches
from ebwm_kernels.fused.launches import num_tiles, ready, whole_rows, wide_dtype
from ebwm_kernels.fused.norm_kernels import _norm_forward, _norm_gradient, _norm_second

# Parts that a sum over all rows is written in: enough programs for every GPU.
SUM_PARTS = 512


def forward(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    shift: Tensor | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, x + added) of x (.., D); the second is x itself where nothing is added."""
    x = ready(x)
    width = x.shape[-1]
    added = None if added is None else ready(added)
    total = x if added is None else torch.empty_like(x)
    y = torch.empty_like(x)
    tile = whole_rows(width)
    rows = x.numel() // width
    launches.launch(
        _norm_forward,
        num_tiles(rows, tile.rows),
        {"X": x, "U": added, "W": weight, "SHIFT": shift},
        {"TOTAL": None if added is None else total, "Y": y},
        tile=tile,
        rows=rows,
        epsilon=epsilon,
        D=width,
        HAS_U=added is not None,
        HAS_SHIFT=shift is not None,
        ACC=_acc(x),
    )
    return y, total


def gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    with_weight: bool,
    with_shift: bool = False,
    of_total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, dw, dshift): dx with of_total added, a cotangent on x itself."""
    grad, x = ready(grad), ready(x)
    dx = torch.empty_like(x)
    sums, run = _over_rows(x, weight, epsilon, with_sums=with_weight or with_shift)
    dw = sums() if with_weight else None
    dshift = sums() if with_shift else None
    run(
        _norm_gradient,
        {"G": grad, "X": x, "W": weight, "OF_TOTAL": None if of_total is None else ready(of_total)},
        {"DX": dx, "DW": dw, "DSHIFT": dshift},
        HAS_TOTAL=of_total is not None,
        WITH_WEIGHT=with_weight,
        WITH_SHIFT=with_shift,
    )
    return dx, _total(dw, weight.dtype), _total(dshift, weight.dtype)


def second(
    a: Tensor, grad: Tensor, x: Tensor, weight: Tensor, epsilon: float, *, with_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dg, dx, dw) of a cotangent a on dx."""
    a, grad, x = ready(a), ready(grad), ready(x)
    dg, dx = torch.empty_like(grad), torch.empty_like(x)
    sums, run = _over_rows(x, weight, epsilon, with_sums=with_weight)
    dw = sums() if with_weight else None
    run(
        _norm_second,
        {"A": a, "G": grad, "X": x, "W": weight},
        {"DG": dg, "DX": dx, "DW": dw},
        WITH_WEIGHT=with_weight,
    )
    return dg, dx, _total(dw, weight.dtype)


def _over_rows(x: Tensor, weight: Tensor, epsilon: float, *, with_sums: bool):
    """(what makes memory for sums over rows, what runs a kernel over all rows)."""
    width = x.shape[-1]
    tile = whole_rows(width)
    rows = x.numel() // width
    tiles_in_all = num_tiles(rows, tile.rows)
    tiles = 1
    if with_sums:
        # A power of two, since it is part of a program: a model's batches need one or two.
        tiles = launches.next_power_of_two(num_tiles(tiles_in_all, SUM_PARTS))
    programs = num_tiles(tiles_in_all, tiles)
    acc = wide_dtype(x, weight)

    def sums() -> Tensor:
        return torch.empty(programs, width, dtype=acc, device=x.device)

    run = partial(_run, tile, programs, rows, epsilon, width, tiles, _acc(x, weight))
    return sums, run


def _run(tile, programs, rows, epsilon, width, tiles, acc, kernel, reads, writes, **flags) -> None:
    launches.launch(
        kernel,
        programs,
        reads,
        writes,
        tile=tile,
        rows=rows,
        epsilon=epsilon,
        D=width,
        TILES=tiles,
        ACC=acc,
        **flags,
    )


def _acc(*tensors: Tensor):
    return tl.float64 if wide_dtype(*tensors) == torch.float64 else tl.float32


def _total(parts: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parts is None else parts.sum(0).to(dtype)
