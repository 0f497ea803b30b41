"""Rotary positions (RoPE, arXiv 2104.09864): adjacent pairs of numbers, rotated by position.

A pair is a complex number and its rotation a complex factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotary(NamedTuple):
    """The rotations of some positions. factors: real and imaginary parts, (S, d / 2, 2)."""

    factors: Tensor

    def rotate(self, x_BHSd: Tensor) -> Tensor:
        """x (B, H, S, d), rotated; differentiable as often as one likes."""
        if torch.compiler.is_compiling():  # the definition, for the compiler to fuse
            return _rotated(x_BHSd, self.factors)
        return _Rotation.apply(x_BHSd, torch.view_as_complex(self.factors), True)

    def slice(self, start: int, count: int) -> Rotary:
        return Rotary(self.factors[start : start + count])


class _Rotation(torch.autograd.Function):
    """Linear: its derivative of any order is the rotation by the opposite angle.

    So nothing but the table is kept. The result is laid out heads first, as attention takes it,
    that of the derivative positions first, as the projections take it.
    """

    @staticmethod
    def forward(ctx, x_BHSd, factors, heads_first):
        ctx.factors = factors
        ctx.heads_first = heads_first
        wide = x_BHSd.to(torch.float64 if x_BHSd.dtype == torch.float64 else torch.float32)
        if wide.stride(-1) != 1:
            wide = wide.contiguous()
        if heads_first:
            out = torch.empty_like(wide, memory_format=torch.contiguous_format)
        else:
            positions_first = wide.transpose(1, 2)
            out = torch.empty_like(positions_first, memory_format=torch.contiguous_format)
            out = out.transpose(1, 2)
        torch.mul(_pairs(wide), factors, out=_pairs(out))
        return out.to(x_BHSd.dtype)

    @staticmethod
    def backward(ctx, grad):
        return _Rotation.apply(grad, ctx.factors.conj(), not ctx.heads_first), None, None


def _rotated(x_BHSd: Tensor, factors: Tensor) -> Tensor:
    """The same in real arithmetic and plain operations."""
    even, odd = x_BHSd.to(factors.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = factors.unbind(-1)
    pairs = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
    return pairs.flatten(-2).to(x_BHSd.dtype)


def _pairs(x: Tensor) -> Tensor:
    """Adjacent pairs of the last dimension as complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class RotaryTable(nn.Module):
    """Rotations of positions 0 .. n - 1, computed in float64.

    Kept per device in double or single precision, in single also for half-precision inputs.
    """

    def __init__(self, head_dimension: int, theta: float):
        super().__init__()
        self.head_dimension = head_dimension
        self.theta = theta
        self._tables: dict[tuple, Rotary] = {}

    def forward(self, num_positions: int, like: Tensor) -> Rotary:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (dtype, like.device)
        if key not in self._tables or len(self._tables[key].factors) < num_positions:
            pair = torch.arange(0, self.head_dimension, 2, dtype=torch.float64)
            frequencies = self.theta ** (-pair / self.head_dimension)
            angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
            factors = torch.stack([angles.cos(), angles.sin()], -1)
            self._tables[key] = Rotary(factors.to(like.device, dtype))
        return self._tables[key].slice(0, num_positions)
