"""Attention within reach (`model.reach`): on a grid, a cell sees cells that are at most so many
rows and columns away, in its own group and in every group that it sees at all.

What a block does to a cell then depends on its neighbourhood alone, wherever that is and however
large the grid, so that what is learned on small grids may hold on larger ones (docs/reasoning.md,
larger mazes). Each refinement step carries what is known some cells further. Conditions of a group
(conditions.py) lie on no cell: they see all rows and are seen by all.

Plain PyTorch, which computes all scores and sets those out of reach to -inf: differentiable as
often as one likes.

Legend: B batch, S rows, C context keys, P cells and A conditions of a group, H heads, H_kv
key/value heads, d head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ebwm_kernels.attention.visibility import Shape, visible_keys


class Reach(NamedTuple):
    """cells: how many rows and columns away. grid: (rows, columns) of a group's cells.
    num_conditions: A, rows behind the cells of an observed group.
    """

    cells: int
    grid: tuple[int, int]
    num_conditions: int = 0

    @property
    def group_size(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def context_group(self) -> int:
        return self.group_size + self.num_conditions

    def near(self, device: torch.device) -> Tensor:
        """Which rows of an observed group see which of its keys: bool (P + A, P + A)."""
        cell = torch.arange(self.context_group, device=device)
        row, column = cell // self.grid[1], cell % self.grid[1]
        far_rows = (row[:, None] - row).abs() > self.cells
        far_columns = (column[:, None] - column).abs() > self.cells
        is_cell = cell < self.group_size
        return ~(far_rows | far_columns) | ~is_cell[:, None] | ~is_cell

    def near_own(self, device: torch.device) -> Tensor:
        """Which cells of a group see which others: bool (P, P)."""
        return self.near(device)[: self.group_size, : self.group_size]

    def near_context(self, num_keys: int, device: torch.device) -> Tensor:
        """Which rows of a group have which context keys within reach: bool (P + A, C), of groups
        that may not be visible yet.
        """
        keys = torch.arange(num_keys, device=device) % self.context_group
        return self.near(device)[:, keys]

    def observed(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention (B, H, S, d) of the observed stream's rows; keys and values (B, H_kv, S, d)."""
        return attend_within(q, keys, values, self._seen(q, keys, 0, self.context_group))

    def predicted(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        offset: int,
        own: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attention (B, H, S, d) of candidates for whole groups.

        keys, values (B, H_kv, C, d): the context's, of which `offset` are in front of the first
        group's own. own: the candidates' keys and values (B, H, S, d), where they see themselves.
        """
        seen = self._seen(q, keys, offset, self.group_size)
        return attend_within(q, keys, values, seen, own, self.near_own(q.device))

    def _seen(self, q: Tensor, keys: Tensor, offset: int, group_size: int) -> Tensor:
        """Which context keys rows see, in groups of `group_size`: bool (S, C)."""
        num_rows, num_keys = q.shape[2], keys.shape[2]
        shape = Shape(1.0, offset, True, group_size, self.context_group)
        visible = visible_keys(num_rows, num_keys, None, shape, q.device)
        cell = torch.arange(num_rows, device=q.device) % group_size
        return visible & self.near_context(num_keys, q.device)[cell]


def reach_of(
    cells: int | None, grid: tuple[int, int] | None, num_conditions: int = 0
) -> Reach | None:
    """None without `model.reach`. ValueError where the rows lie on no grid."""
    if cells is None:
        return None
    if grid is None:
        raise ValueError(
            f"model.reach is {cells}, but the data's positions are cells of no grid: "
            "leave it out, or take a dataset of a task on a grid or of a world"
        )
    return Reach(cells, grid, num_conditions)


def attend_within(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    own: tuple[Tensor, Tensor] | None = None,
    near_own: Tensor | None = None,
) -> Tensor:
    """(B, H, S, d) of rows q over context keys and values (B, H_kv, C, d), of which each sees some.

    seen: bool (S, C). own: further keys and values (B, H, S, d), of which a row sees those of its
    group that near_own (P, P) says. Each row sees at least one key.
    """
    q = q * q.shape[-1] ** -0.5
    keys, values = (_per_head(x, q.shape[1]) for x in (keys, values))
    scores = (q @ keys.mT).masked_fill(~seen, -torch.inf)
    if own is None or near_own is None:
        return scores.softmax(-1) @ values
    size = len(near_own)
    of_groups, own_keys, own_values = (x.unflatten(2, (-1, size)) for x in (q, *own))
    own_scores = (of_groups @ own_keys.mT).masked_fill(~near_own, -torch.inf)
    weights = torch.cat([scores, own_scores.flatten(2, 3)], -1).softmax(-1)
    of_own = weights[..., -size:].unflatten(2, (-1, size)) @ own_values
    return weights[..., :-size] @ values + of_own.flatten(2, 3)


def _per_head(x: Tensor, num_heads: int) -> Tensor:
    """(B, H_kv, C, d) for each head that shares it: (B, H, C, d)."""
    shared_by = num_heads // x.shape[1]
    return x if shared_by == 1 else x.repeat_interleave(shared_by, 1)
