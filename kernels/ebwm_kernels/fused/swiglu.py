"""SwiGLU's passes in Triton. Formulas and letters: pointwise.py.

    _swiglu_forward     u, v -> silu(u) v           reads 2, writes 1
    _swiglu_gradient    g, u, v [, cotangents on u and v themselves, which are added] -> du, dv
                                                    reads 3 [5], writes 2
    _swiglu_second      a, b, g, u, v -> dg, du, dv reads 5, writes 3

u and v may be the halves of one tensor (.., 2 F), as one product gives them, and du, dv are halves
of one tensor then.
"""

# Triton compiles the kernels: its annotations say otherwise, as in attention/row_tiles.py.
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ebwm_kernels.fused import launches
from ebwm_kernels.fused.launches import num_tiles, parts_of_rows, ready, wide_dtype

ANY_SIZE = ["rows"]


@triton.jit
def _places(rows, F: tl.constexpr, STRIDE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """(addresses in contiguous rows, in rows STRIDE apart, which numbers exist)."""
    COLUMN_TILES: tl.constexpr = (F + BC - 1) // BC
    tile = tl.program_id(0)
    row = (tile // COLUMN_TILES).to(tl.int64) * BR + tl.arange(0, BR)
    column = (tile % COLUMN_TILES) * BC + tl.arange(0, BC)
    exists = (row < rows)[:, None] & (column < F)[None, :]
    return (
        row[:, None] * F + column[None, :],
        row[:, None] * STRIDE + column[None, :],
        exists,
    )


@triton.jit
def _load(X, place, exists, ACC: tl.constexpr):
    return tl.load(X + place, mask=exists, other=0.0).to(ACC)


@triton.jit
def _store(X, place, x, exists):
    tl.store(X + place, x.to(X.dtype.element_ty), mask=exists)


@triton.jit
def _sigmoid(u):
    return 1.0 / (1.0 + tl.exp(-u))


@triton.jit(do_not_specialize=ANY_SIZE)
def _swiglu_forward(
    U,
    V,
    Y,
    rows,
    F: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    place, strided, exists = _places(rows, F, STRIDE, BR, BC)
    u = _load(U, strided, exists, ACC)
    v = _load(V, strided, exists, ACC)
    _store(Y, place, u * _sigmoid(u) * v, exists)


@triton.jit(do_not_specialize=ANY_SIZE)
def _swiglu_gradient(
    G,
    U,
    V,
    OF_U,
    OF_V,
    DU,
    DV,
    rows,
    F: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_MORE: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    place, strided, exists = _places(rows, F, STRIDE, BR, BC)
    g = _load(G, place, exists, ACC)
    u = _load(U, strided, exists, ACC)
    v = _load(V, strided, exists, ACC)
    s = _sigmoid(u)
    du = g * v * (s * (1.0 + u * (1.0 - s)))
    dv = g * (u * s)
    if HAS_MORE:
        du += _load(OF_U, strided, exists, ACC)
        dv += _load(OF_V, strided, exists, ACC)
    _store(DU, strided, du, exists)
    _store(DV, strided, dv, exists)


@triton.jit(do_not_specialize=ANY_SIZE)
def _swiglu_second(
    A,
    B,
    G,
    U,
    V,
    DG,
    DU,
    DV,
    rows,
    F: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    place, strided, exists = _places(rows, F, STRIDE, BR, BC)
    a = _load(A, strided, exists, ACC)
    b = _load(B, strided, exists, ACC)
    g = _load(G, place, exists, ACC)
    u = _load(U, strided, exists, ACC)
    v = _load(V, strided, exists, ACC)
    s = _sigmoid(u)
    first = s * (1.0 + u * (1.0 - s))
    second = s * (1.0 - s) * (2.0 + u * (1.0 - 2.0 * s))
    _store(DG, place, a * v * first + b * (u * s), exists)
    _store(DU, strided, g * (a * v * second + b * first), exists)
    _store(DV, strided, a * g * first, exists)


def forward(u: Tensor, v: Tensor) -> Tensor:
    """silu(u) v, (.., F); u, v: contiguous, or the halves of one contiguous tensor."""
    y = u.new_empty(u.shape)
    _run(_swiglu_forward, u, {"U": u, "V": v}, {"Y": y})
    return y


def gradient(
    grad: Tensor,
    u: Tensor,
    v: Tensor,
    du: Tensor,
    dv: Tensor,
    more: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Into du and dv, which lie as u and v. more: cotangents on u and v, lying so, to be added."""
    of_u, of_v = more or (None, None)
    _run(
        _swiglu_gradient,
        u,
        {"G": ready(grad), "U": u, "V": v, "OF_U": of_u, "OF_V": of_v},
        {"DU": du, "DV": dv},
        {"HAS_MORE": more is not None},
    )


def second(
    a: Tensor, b: Tensor, grad: Tensor, u: Tensor, v: Tensor, du: Tensor, dv: Tensor
) -> Tensor:
    """dg of cotangents a on du and b on dv; du and dv are written. All but grad lie as u and v."""
    grad = ready(grad)
    dg = torch.empty_like(grad)
    _run(
        _swiglu_second,
        u,
        {"A": a, "B": b, "G": grad, "U": u, "V": v},
        {"DG": dg, "DU": du, "DV": dv},
    )
    return dg


def halves(both: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v) of a tensor (.., 2 F)."""
    u, v = both.chunk(2, -1)
    return u, v


def _run(
    kernel,
    u: Tensor,
    reads: dict[str, Tensor | None],
    writes: dict[str, Tensor | None],
    constants: dict[str, Any] | None = None,
) -> None:
    width = u.shape[-1]
    rows = u.numel() // width
    tile = parts_of_rows(width)
    launches.launch(
        kernel,
        num_tiles(rows, tile.rows) * num_tiles(width, tile.columns),
        reads,
        writes,
        tile=tile,
        rows=rows,
        F=width,
        STRIDE=width if u.is_contiguous() else 2 * width,
        ACC=tl.float64 if wide_dtype(u) == torch.float64 else tl.float32,
        **(constants or {}),
    )
