"""Blocks of query rows for attention/reference.py: which columns their rows see, and the products
over these.

Columns of a block are the context keys that any of its rows sees, and, with groups, the own keys of
a row's group behind them. Scores, weights and what is made of them are (N, group * rows, columns):
where own keys are one per row (groups of 1), they are not columns; reference.py holds them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ebwm_kernels.attention.visibility import Shape, last_visible, last_visible_of

# query rows of a block: a block of scores stays in a CPU's cache, and few of its columns are in the
# future
ROWS = 64


class Columns(NamedTuple):
    """What belongs to the columns of a block's rows: keys, values, cotangents on these, gradients.

    context: (N, C, d), or None: zero. own: (B, H_kv, group, S, d) with groups, else None. Sums over
    rows, which are written where a gradient lies, have (B, H_kv, C, d) in place of (N, C, d).
    """

    context: Tensor | None
    own: Tensor | None

    @property
    def exist(self) -> bool:
        return self.context is not None or self.own is not None


class Block:
    """Query rows first .. last - 1 of every head, and context keys first_key .. last_key - 1.

    Heads that share keys share one product. Rows belong to whole groups, or to a part of one. What
    belongs to queries comes as (B, H_kv, group, S, n), in any layout.
    """

    def __init__(
        self, first: int, last: int, first_visible: Tensor | None, C: int, shape: Shape, buffers
    ):
        self.first = first
        self.last = last
        self.shape = shape
        self.buffers: dict[str, Tensor] = buffers
        self.last_key = last_visible_of(last - 1, C, shape)
        self.first_key = 0
        # Keys before `late_from` are too late for no row, those from `early_to` on too early for
        # none.
        self.late_from = last_visible_of(first, C, shape)
        self.early_to = 0
        self.is_blind = False  # whether no row sees any context
        self.first_visible = None
        if first_visible is not None:
            self.first_visible = first_visible[:, first:last]
            least, largest = torch.stack(self.first_visible.aminmax()).tolist()
            # One hidden column rather than none: a maximum needs one.
            self.is_blind = least >= self.last_key
            self.first_key = min(least, self.last_key - 1)
            self.early_to = min(largest, self.last_key)

    @property
    def num_context(self) -> int:
        return self.last_key - self.first_key

    def rows(self, x: Tensor) -> Tensor:
        """(B, H_kv, group, S, n) -> (N, group * rows, n), a copy where x is not heads first."""
        return x[..., self.first : self.last, :].flatten(0, 1).flatten(1, 2)

    def write(self, x: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """The inverse: put factor * (N, group * rows, n) where they belong."""
        place = x[..., self.first : self.last, :]
        rows = rows.view(place.shape)
        place.copy_(rows) if factor == 1 else torch.mul(rows, factor, out=place)

    def add(self, x: Tensor, rows: Tensor, factor: float) -> None:
        place = x[..., self.first : self.last, :]
        place.add_(rows.view(place.shape), alpha=factor)

    def scratch(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """Memory that the next block uses again: it is still in the cache, and the allocator's
        holes stay few.
        """
        buffer, numel = self.buffers.get(name), shape.numel()
        if buffer is None or buffer.numel() < numel:
            buffer = self.buffers[name] = like.new_empty(numel)
        return buffer[:numel].view(shape)

    def against(self, name: str, rows: Tensor, keys: Columns) -> Tensor:
        """rows @ keys' (N, group * rows, columns): every row with each of its columns."""
        if keys.own is None:
            assert keys.context is not None
            return self._product(name, rows, self._seen(keys.context).mT)
        num_columns = self.num_context + self.shape.group_size
        products = self.scratch(name, torch.Size((*rows.shape[:2], num_columns)), rows)
        of_context = products[..., : self.num_context]
        if keys.context is None:
            of_context.zero_()
        else:
            torch.bmm(rows, self._seen(keys.context).mT, out=of_context)
        own_rows = self._by_group(rows)
        torch.bmm(own_rows, self._own(keys.own).mT, out=self._of_own(products))
        return products

    def mix(self, name: str, weights: Tensor, values: Columns) -> Tensor:
        """weights @ values (N, group * rows, d): each row's sum over its columns."""
        if values.own is None:
            assert values.context is not None
            return self._product(name, weights, self._seen(values.context))
        if values.context is None:
            shape = torch.Size((*weights.shape[:2], values.own.shape[-1]))
            mixed = self.scratch(name, shape, weights).zero_()
        else:
            of_context = weights[..., : self.num_context]
            mixed = self._product(name, of_context, self._seen(values.context))
        self._by_group(mixed).baddbmm_(self._of_own(weights), self._own(values.own))
        return mixed

    def collect(self, into: Columns, weights: Tensor, rows: Tensor, factor: float = 1.0) -> None:
        """into += factor * weights' @ rows: each column's sum over the rows that see it."""
        if into.context is not None and not self.is_blind:
            of_context = weights
            if into.own is not None:
                of_context = weights[..., : self.num_context]
            sums = self._product("keys", of_context.mT, rows)
            place = into.context[:, :, self.seen]
            place.add_(sums.view(place.shape), alpha=factor)
        if into.own is not None:
            own_sums = torch.bmm(self._of_own(weights).mT, self._by_group(rows))
            place = into.own[..., self.own_places, :]
            place.add_(own_sums.view(place.shape), alpha=factor)

    def _product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left @ right in scratch memory."""
        shape = torch.Size((*left.shape[:2], right.shape[2]))
        return torch.bmm(left, right, out=self.scratch(name, shape, right))

    def scores(self, rows: Tensor, keys: Columns) -> Tensor:
        """scale * q K' (N, group * rows, columns) of these rows, -inf where one does not see."""
        return self._mask(self.against("P", rows, keys).mul_(self.shape.scale))

    def weights(self, rows: Tensor, keys: Columns, log_normalizer: Tensor) -> Tensor:
        """P (N, group * rows, columns) = exp(scale * q K' - L), 0 where a row does not see."""
        scores = self.against("P", rows, keys)
        torch.add(-self.rows(log_normalizer), scores, alpha=self.shape.scale, out=scores)
        return self._mask(scores).exp_()

    def _mask(self, scores: Tensor) -> Tensor:
        """scores (N, group * rows, columns) with -inf for context that is too late or too early."""
        num_rows = self.last - self.first
        late_from = max(self.late_from, self.first_key)
        if late_from < self.last_key:
            by_head = scores.unflatten(1, (-1, num_rows))
            late = by_head[..., late_from - self.first_key : self.num_context]
            late.masked_fill_(self._too_late(late_from, scores.device), float("-inf"))
        if self.early_to > self.first_key:
            by_head = scores.unflatten(1, (-1, num_rows))
            early = by_head[..., : self.early_to - self.first_key]
            early.masked_fill_(self._too_early(scores), float("-inf"))
        return scores

    def _too_late(self, late_from: int, device: torch.device) -> Tensor:
        """(rows, columns late_from .. last_key - 1)."""
        if self.shape.group_size == 1 and self.shape.context_group == 1:  # one step per row
            size = (self.last - self.first, self.last_key - late_from)
            hidden = torch.ones(size, dtype=torch.bool, device=device)
            return hidden.triu(self.late_from - late_from)
        columns = torch.arange(late_from, self.last_key, device=device)
        rows = torch.arange(self.first, self.last, device=device)
        return columns >= last_visible(rows, self.last_key, self.shape)[:, None]

    def _too_early(self, scores: Tensor) -> Tensor:
        """(N, 1, rows, columns first_key .. early_to - 1)."""
        assert self.first_visible is not None
        columns = torch.arange(self.first_key, self.early_to, device=scores.device)
        hidden = columns < self.first_visible[..., None]
        key_heads = scores.shape[0] // hidden.shape[0]
        return hidden.repeat_interleave(key_heads, 0)[:, None]

    @property
    def seen(self) -> slice:
        """Which context keys some row sees."""
        return slice(self.first_key, self.last_key)

    def _seen(self, context: Tensor) -> Tensor:
        """The context keys that are seen, (N, num_context, d); a zero in place of none."""
        if self.is_blind:
            return context.new_zeros(context.shape[0], 1, context.shape[2])
        return context[:, self.seen]

    @property
    def own_places(self) -> slice:
        """Where the own keys of the block's groups are."""
        size = self.shape.group_size
        return slice(self.first // size * size, -(-self.last // size) * size)

    def _own(self, own: Tensor) -> Tensor:
        """Own keys of the block's groups, (N * group * groups, group_size, d)."""
        groups = own[..., self.own_places, :]
        return groups.reshape(-1, self.shape.group_size, own.shape[-1])

    def _by_group(self, rows: Tensor) -> Tensor:
        """(N, group * rows, n) -> (N * group * groups, rows of a group, n)."""
        rows_of_a_group = min(self.last - self.first, self.shape.group_size)
        return rows.reshape(-1, rows_of_a_group, rows.shape[-1])

    def _of_own(self, x: Tensor) -> Tensor:
        """The columns of own keys, (N * group * groups, rows of a group, group_size)."""
        own = x[..., self.num_context :]
        rows_of_a_group = min(self.last - self.first, self.shape.group_size)
        return own.view(-1, rows_of_a_group, self.shape.group_size)


def blocks(
    num_rows: int,
    num_keys: int,
    first_visible: Tensor | None,
    shape: Shape,
    size: int | None = None,
) -> Iterator[Block]:
    """The rows in blocks of about `size`, or ROWS."""
    buffers: dict[str, Tensor] = {}
    # The last block comes first: it sees most, so its buffers fit all.
    for first, last in reversed(block_rows(num_rows, shape.group_size, size)):
        yield Block(first, last, first_visible, num_keys, shape, buffers)


def block_rows(num_rows: int, group_size: int, size: int | None = None) -> list[tuple[int, int]]:
    """(first, last) of every block: as many whole groups as fit into `size` rows (ROWS), or equal
    parts of one group that does not fit.
    """
    size = ROWS if size is None else size
    if group_size <= size:
        step = size // group_size * group_size
        return [(first, min(first + step, num_rows)) for first in range(0, num_rows, step)]
    parts = -(-group_size // size)
    step = -(-group_size // parts)
    bounds = []
    for group in range(0, num_rows, group_size):
        end = group + group_size
        bounds += [(first, min(first + step, end)) for first in range(group, end, step)]
    return bounds
