"""Rotary attention of both streams, with the same projections.

    observed    causal self-attention, once per context; yields keys and values
    predicted   candidates that attend to these and to themselves, in every refinement step

Legend: B batch, S positions, D width, H heads, H_kv key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ebwm_kernels import causal_attention, energy_attention, observed_attention
from ebwm_kernels.attention.ops import reads_positions_first
from ebwm_kernels.fused.rotation import HeadCounts, split_rotated
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig
from ebwm_scale.model.fused import is_fused, joined_product
from ebwm_scale.model.norm import RMSNorm
from ebwm_scale.model.reach import reach_of
from ebwm_scale.model.rotary import Rotary
from ebwm_scale.model.sequence import SequencePart


class Attention(nn.Module):
    """Attention of both streams, with the same projections.

    With model.qk_norm each head of queries and keys is normed in front of its rotation, so that
    scores are bounded by sqrt(d) times the norms' weights (arXiv 2010.04245, 2302.05442).

    group_size: positions per group. num_conditions: further ones in the observed stream.
    Of a sequence cut over processes, rows are those of `part`, and keys and values those of all
    positions and of this process's share of the heads (sequence.py).
    With model.reach, rows that lie on a grid see what is near alone (reach.py).
    """

    part: SequencePart | None = None

    def __init__(
        self,
        config: ModelConfig,
        group_size: int = 1,
        num_conditions: int = 0,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        sizes = model_sizes(config)
        self.group_size = group_size
        self.context_group = group_size + num_conditions
        self.reach = reach_of(config.reach, grid, num_conditions)
        self.own_keys = config.own_keys
        self.num_heads = sizes.num_heads
        self.num_kv_heads = sizes.num_kv_heads
        self.head_dimension = sizes.head_dimension
        self.backend = config.attention_backend
        self.observed_backend = config.observed_backend
        self.wq = nn.Linear(sizes.width, sizes.width, bias=False)
        self.wk = nn.Linear(sizes.width, sizes.kv_width, bias=False)
        self.wv = nn.Linear(sizes.width, sizes.kv_width, bias=False)
        self.wo = nn.Linear(sizes.width, sizes.width, bias=False)
        self.q_norm = None
        self.k_norm = None
        if config.qk_norm:
            of_heads = (sizes.head_dimension, config.norm_epsilon, config.attention_backend)
            self.q_norm = RMSNorm(*of_heads)
            self.k_norm = RMSNorm(*of_heads)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """(K, V), each (B, H_kv, S, d), of rows x (B, S, D)."""
        if self.q_norm is None and is_fused(self.backend, x):
            counts = HeadCounts(0, self.num_kv_heads, self.num_kv_heads)
            rows = joined_product(x, self.wk, self.wv)
            _, keys, values = split_rotated(rows, rotary.factors, counts)
            return self._of_all_positions(keys), self._of_all_positions(values)
        values = self._split_heads(self.wv(x))
        if self._heads_first(x):
            values = values.contiguous()
        keys = self._rotate(self.wk(x), self.k_norm, rotary)
        return self._of_all_positions(keys), self._of_all_positions(values)

    def forward_observed(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        rotary: Rotary,
        first_visible: Tensor | None = None,
    ) -> Tensor:
        """Causal self-attention of the observed stream (B, S, D); first order only."""
        return self._attend_observed(self._queries(x, rotary), keys, values, first_visible)

    def observed_with_keys(
        self, x: Tensor, rotary: Rotary, first_visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(K, V, `forward_observed`) of rows x (B, S, D), by one product."""
        q, keys, values = self._queries_keys_values(x, rotary)
        keys, values = self._of_all_positions(keys), self._of_all_positions(values)
        return keys, values, self._attend_observed(q, keys, values, first_visible)

    def _attend_observed(
        self, q: Tensor, keys: Tensor, values: Tensor, first_visible: Tensor | None
    ) -> Tensor:
        if self.reach is not None:
            attended = self.reach.observed(q, keys, values)
            return self.wo(attended.transpose(1, 2).flatten(2))
        attended = observed_attention(
            self._of_all_positions(q),
            keys,
            values,
            group_size=self.context_group,
            first_visible=first_visible,
            backend=self.observed_backend,
        )
        if self.part is not None:
            attended = self.part.observed_into_positions(attended)
        return self.wo(attended.transpose(1, 2).flatten(2))

    def _of_all_positions(self, x: Tensor) -> Tensor:
        """Observed rows (B, H, S, d), as attention takes them."""
        return x if self.part is None else self.part.observed_into_heads(x)

    def forward_predicted(
        self,
        p: Tensor,
        context: tuple[Tensor, Tensor],
        rotary: Rotary,
        offset: int,
        first_visible: Tensor | None = None,
    ) -> Tensor:
        """The predicted stream (B, S, D); differentiable twice.

        context: the observed keys and values (B, H_kv, C, d). first_visible: see Context.
        """
        if self.own_keys:
            own = self._queries_keys_values(p, rotary)
        else:
            own = (self._queries(p, rotary),)
        if self.part is None:
            attended = self._attend_predicted(own, context, offset, first_visible)
        else:
            attended = self._attend_cut(self.part, own, context, offset, first_visible)
        return self.wo(attended.transpose(1, 2).flatten(2))

    def _attend_predicted(
        self,
        own: Sequence[Tensor],
        context: tuple[Tensor, Tensor],
        offset: int,
        first_visible: Tensor | None,
    ) -> Tensor:
        """(B, H, S, d) of the predicted rows' own queries, and of their keys and values where they
        have some.
        """
        q, *keys_values = own
        keys_values = [self._per_query_head(x) for x in keys_values]
        if self.reach is not None:
            own_keys_values = (keys_values[0], keys_values[1]) if keys_values else None
            return self.reach.predicted(q, *context, offset, own_keys_values)
        attend: Callable[..., Tensor] = energy_attention if keys_values else causal_attention
        return attend(
            q,
            *keys_values,
            *context,
            context_offset=offset,
            group_size=self.group_size,
            context_group=self.context_group,
            first_visible=first_visible,
            backend=self.backend,
        )

    def _attend_cut(
        self,
        part: SequencePart,
        own: Sequence[Tensor],
        context: tuple[Tensor, Tensor],
        offset: int,
        first_visible: Tensor | None,
    ) -> Tensor:
        """`_attend_predicted` of a sequence cut over processes, given and returned for the rows of
        this one.

        A tile has the same positions of every part: rows that are neighbours within a part alone.
        So each part is attended with its own offset, unless the tile is all of them.
        """
        num_rows = own[0].shape[2]
        own = [part.into_heads(x) for x in own]
        if num_rows == part.length:
            attended = self._attend_predicted(own, context, part.front, first_visible)
            return part.into_positions(attended)
        attended_parts = []
        for rank in range(part.group.size):
            rows = slice(rank * num_rows, (rank + 1) * num_rows)
            first = part.offset_of(rank, offset)
            keys, values = (x[:, :, : first + num_rows] for x in context)
            of_rank = [x[:, :, rows] for x in own]
            starts = None if first_visible is None else first_visible[:, rows]
            attended_parts.append(self._attend_predicted(of_rank, (keys, values), first, starts))
        return part.into_positions(torch.cat(attended_parts, 2))

    def _queries(self, x: Tensor, rotary: Rotary) -> Tensor:
        """q (B, H, S, d) of rows x (B, S, D), rotated."""
        if self.q_norm is None and is_fused(self.backend, x):
            counts = HeadCounts(self.num_heads, 0, 0)
            return split_rotated(self.wq(x), rotary.factors, counts)[0]
        return self._rotate(self.wq(x), self.q_norm, rotary)

    def _queries_keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, S, d), k and v (B, H_kv, S, d) of rows x (B, S, D); q and k are rotated."""
        if self.q_norm is None and is_fused(self.backend, x):
            counts = HeadCounts(self.num_heads, self.num_kv_heads, self.num_kv_heads)
            rows = joined_product(x, self.wq, self.wk, self.wv)
            return split_rotated(rows, rotary.factors, counts)
        q = self._rotate(self.wq(x), self.q_norm, rotary)
        k = self._rotate(self.wk(x), self.k_norm, rotary)
        return q, k, self._split_heads(self.wv(x))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, S, H d) -> (B, H, S, d), a view."""
        return x.unflatten(-1, (-1, self.head_dimension)).transpose(1, 2)

    def _rotate(self, x: Tensor, norm: RMSNorm | None, rotary: Rotary) -> Tensor:
        """(B, S, H d) -> (B, H, S, d), normed where there is a norm, and rotated, as attention
        reads it.
        """
        heads = self._split_heads(x)
        if norm is not None:  # a head's numbers lie side by side in front of the transposition
            heads = norm(x.unflatten(-1, (-1, self.head_dimension))).transpose(1, 2)
        return rotary.rotate(heads, heads_first=self._heads_first(x))

    def _heads_first(self, x: Tensor) -> bool:
        """Whether attention would copy what lies as a projection gives it, at every level."""
        return not reads_positions_first(self.backend, x.device, x.dtype, self.head_dimension)

    def _per_query_head(self, x: Tensor) -> Tensor:
        """Own keys or values (B, H_kv, S, d) -> (B, H, S, d), lying as they do."""
        if self.num_kv_heads == self.num_heads:
            return x
        heads_sharing = self.num_heads // self.num_kv_heads
        if x.is_contiguous():
            return x.repeat_interleave(heads_sharing, 1)
        return x.transpose(1, 2).repeat_interleave(heads_sharing, 2).transpose(1, 2)
