"""Rotary positions (RoPE, arXiv 2104.09864): adjacent pairs of numbers, rotated by position.

A pair is a complex number and its rotation a complex factor. In a sequence of groups a position has
several coordinates, and each rotates pairs of its own (axial rotary positions):

    groups of 1            place in the sequence
    groups of P            (time, cell): the group's number, and the place in it
    groups on a grid       (time, row, column)

Conditions stand behind the cells (model/conditions.py): condition i of a group is its cell P + i,
on a grid the i-th of a row below the last one. So no patch has a condition's place, and each
condition has its own.

The first coordinate has the pairs that are left over. Only differences of coordinates reach an
attention's scores. So a shift of all groups in time changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Rotary(NamedTuple):
    """The rotations of some positions. factors: real and imaginary parts, (S, d / 2, 2)."""

    factors: Tensor

    def rotate(self, x_BHSd: Tensor, *, heads_first: bool = True) -> Tensor:
        """x (B, H, S, d), rotated; differentiable as often as one likes.

        heads_first: whether the result lies so, or positions first, as projections give and take.
        """
        if torch.compiler.is_compiling():  # the definition, for the compiler to fuse
            return _rotated(x_BHSd, self.factors)
        return _Rotation.apply(x_BHSd, torch.view_as_complex(self.factors), heads_first, False)

    def slice(self, start: int, count: int) -> Rotary:
        return Rotary(self.factors[start : start + count])


class _Rotation(torch.autograd.Function):
    """Linear: its derivative of any order is the rotation by the opposite angle.

    So nothing but the table is kept. The result is laid out as attention takes it, heads first or
    not, that of the derivative as the projections take it, and its derivative as attention's again.
    """

    @staticmethod
    def forward(ctx, x_BHSd, factors, heads_first, derivative_heads_first):
        ctx.factors = factors
        ctx.layouts = (derivative_heads_first, heads_first)
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
        return _Rotation.apply(grad, ctx.factors.conj(), *ctx.layouts), None, None, None


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

    group_size: positions per group. grid: (rows, columns) of a group's cells, where they are one.
    num_conditions: further positions behind each group, in the observed stream alone.
    Raises ValueError for a grid of another size, and for heads with fewer pairs than coordinates.
    """

    def __init__(
        self,
        head_dimension: int,
        theta: float,
        group_size: int = 1,
        grid: tuple[int, int] | None = None,
        num_conditions: int = 0,
    ):
        super().__init__()
        if grid is not None and grid[0] * grid[1] != group_size:
            raise ValueError(
                f"grid is {list(grid)} with group_size {group_size}: "
                "rows times columns must be the group size"
            )
        self.head_dimension = head_dimension
        self.theta = theta
        self.group_size = group_size
        self.grid = grid
        self.num_conditions = num_conditions
        num_axes = len(self.coordinates(torch.zeros(1, dtype=torch.int64)))
        if head_dimension // 2 < num_axes:
            raise ValueError(
                f"a head has {head_dimension} dimensions, {head_dimension // 2} rotated pairs: "
                f"positions have {num_axes} coordinates, so it needs at least {2 * num_axes}; "
                "use fewer heads or a larger width"
            )
        self._tables: dict[tuple, Rotary] = {}

    def forward(self, num_positions: int, like: Tensor) -> Rotary:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (dtype, like.device)
        if key not in self._tables or len(self._tables[key].factors) < num_positions:
            angles = self._angles(torch.arange(num_positions))
            factors = torch.stack([angles.cos(), angles.sin()], -1)
            self._tables[key] = Rotary(factors.to(like.device, dtype))
        return self._tables[key].slice(0, num_positions)

    def kept(self) -> list[Tensor]:
        """The tables as they are now; one that a longer sequence needs takes another's place."""
        return [table.factors for table in self._tables.values()]

    def of_states(self, first_group: int, num_positions: int, like: Tensor) -> Rotary:
        """Rotations of the states of groups from first_group on, conditions left out."""
        num_groups = first_group + num_positions // self.group_size
        whole = self(num_groups * self.context_group, like)
        first = first_group * self.context_group
        if self.num_conditions == 0:
            return whole.slice(first, num_positions)
        groups = whole.factors[first:].unflatten(0, (-1, self.context_group))
        return Rotary(groups[:, : self.group_size].flatten(0, 1))

    @property
    def context_group(self) -> int:
        """Positions of a group in the observed stream."""
        return self.group_size + self.num_conditions

    def coordinates(self, positions: Tensor) -> list[Tensor]:
        """The coordinates of positions (S,) of the observed stream, each (S,); see the top."""
        if self.context_group == 1:
            return [positions]
        time = positions // self.context_group
        cell = positions % self.context_group
        if self.grid is None:
            return [time, cell]
        rows, columns = self.grid
        is_condition = cell >= self.group_size
        row = torch.where(is_condition, rows, cell // columns)
        column = torch.where(is_condition, cell - self.group_size, cell % columns)
        return [time, row, column]

    def _angles(self, positions: Tensor) -> Tensor:
        """(S, d / 2) float64: every pair's angle at positions (S,)."""
        coordinates = self.coordinates(positions)
        num_pairs = self.head_dimension // 2
        of_each = num_pairs // len(coordinates)
        angles = []
        for axis, coordinate in enumerate(coordinates):
            dimension = 2 * of_each
            if axis == 0:
                dimension = 2 * (num_pairs - of_each * (len(coordinates) - 1))
            pair = torch.arange(0, dimension, 2, dtype=torch.float64)
            frequencies = self.theta ** (-pair / dimension)
            angles.append(coordinate.double()[:, None] * frequencies)
        return torch.cat(angles, 1)
