"""The blocks: RMSNorm, rotary attention and SwiGLU, on two streams that share every weight.

    observed  o_1 .. o_S   ordinary causal self-attention; yields K and V per layer (a prefill)
    predicted p_1 .. p_S   p_t attends to o_1 .. o_t and to itself, given those K and V

In a sequence of groups of P positions, read "group" for each of them: the observed stream is
block-causal, and p_t attends to all observed groups up to its own and to its group's candidates.
Conditions of a group, such as an action, are further rows of its observed group (conditions.py).

Legend: B batch, S positions, D width, H heads, H_kv key/value heads, d head dimension.
Source: Energy-Based Transformers, arXiv 2507.02092; blocks as in Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebwm_kernels import energy_attention, observed_attention, rms_norm, swiglu
from ebwm_kernels.attention.first_order import (
    KNOWS_NO_GROUPS,
    resolve_observed_backend,
    why_not_flash_attn,
)
from ebwm_kernels.attention.ops import (
    reads_positions_first,
    resolve_backend,
    why_not_triton,
)
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig
from ebwm_scale.model.rotary import Rotary


class Modulation(NamedTuple):
    """Shift, scale and gate of a block's attention, then of its feed-forward; each (D,).

    Source: adaLN, arXiv 2212.09748.
    """

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    feed_forward_shift: Tensor
    feed_forward_scale: Tensor
    feed_forward_gate: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + epsilon) * weight, arXiv 1910.07467."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class Attention(nn.Module):
    """Attention of both streams, with the same projections.

    group_size: positions per group. num_conditions: further ones in the observed stream.
    """

    def __init__(self, config: ModelConfig, group_size: int = 1, num_conditions: int = 0):
        super().__init__()
        sizes = model_sizes(config)
        self.group_size = group_size
        self.context_group = group_size + num_conditions
        self.num_heads = sizes.num_heads
        self.num_kv_heads = sizes.num_kv_heads
        self.head_dimension = sizes.head_dimension
        self.backend = config.attention_backend
        self.observed_backend = config.observed_backend
        self.wq = nn.Linear(sizes.width, sizes.width, bias=False)
        self.wk = nn.Linear(sizes.width, sizes.kv_width, bias=False)
        self.wv = nn.Linear(sizes.width, sizes.kv_width, bias=False)
        self.wo = nn.Linear(sizes.width, sizes.width, bias=False)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """(K, V), each (B, H_kv, S, d), of rows x (B, S, D)."""
        values = self._split_heads(self.wv(x))
        if self._heads_first(x):
            values = values.contiguous()
        return self._rotate(self.wk(x), rotary), values

    def forward_observed(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        rotary: Rotary,
        first_visible: Tensor | None = None,
    ) -> Tensor:
        """Causal self-attention of the observed stream (B, S, D); first order only."""
        q = self._rotate(self.wq(x), rotary)
        attended = observed_attention(
            q,
            keys,
            values,
            group_size=self.context_group,
            first_visible=first_visible,
            backend=self.observed_backend,
        )
        return self.wo(attended.transpose(1, 2).flatten(2))

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
        q = self._rotate(self.wq(p), rotary)
        k_self = self._per_query_head(self._rotate(self.wk(p), rotary))
        v_self = self._per_query_head(self._split_heads(self.wv(p)))
        attended = energy_attention(
            q,
            k_self,
            v_self,
            *context,
            context_offset=offset,
            group_size=self.group_size,
            context_group=self.context_group,
            first_visible=first_visible,
            backend=self.backend,
        )
        return self.wo(attended.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """(B, S, H d) -> (B, H, S, d), a view."""
        return x.unflatten(-1, (-1, self.head_dimension)).transpose(1, 2)

    def _rotate(self, x: Tensor, rotary: Rotary) -> Tensor:
        """(B, S, H d) -> (B, H, S, d), rotated, as attention reads it."""
        return rotary.rotate(self._split_heads(x), heads_first=self._heads_first(x))

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


class FeedForward(nn.Module):
    """SwiGLU, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        sizes = model_sizes(config)
        self.w1 = nn.Linear(sizes.width, sizes.feed_forward_width, bias=False)
        self.w2 = nn.Linear(sizes.feed_forward_width, sizes.width, bias=False)
        self.w3 = nn.Linear(sizes.width, sizes.feed_forward_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside a residual."""

    def __init__(self, config: ModelConfig, group_size: int = 1, num_conditions: int = 0):
        super().__init__()
        width = model_sizes(config).width
        self.attention_norm = RMSNorm(width, config.norm_epsilon)
        self.attention = Attention(config, group_size, num_conditions)
        self.ffn_norm = RMSNorm(width, config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def keys_values(
        self, o: Tensor, rotary: Rotary, modulation: Modulation | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the predicted stream reads of this layer: (K, V), each (B, H_kv, S, d)."""
        return self.attention.keys_values(self._attention_input(o, modulation), rotary)

    def forward_observed(
        self,
        o: Tensor,
        keys: Tensor,
        values: Tensor,
        rotary: Rotary,
        modulation: Modulation | None = None,
        first_visible: Tensor | None = None,
    ) -> Tensor:
        """The observed stream (B, S, D) through the block, its keys and values given."""
        normed = self._attention_input(o, modulation)
        attended = self.attention.forward_observed(normed, keys, values, rotary, first_visible)
        return self._add_residuals(o, attended, modulation)

    def forward_predicted(
        self,
        p: Tensor,
        context: tuple[Tensor, Tensor],
        rotary: Rotary,
        offset: int,
        modulation: Modulation | None = None,
        first_visible: Tensor | None = None,
    ) -> Tensor:
        """The predicted stream (B, S, D) through the block."""
        normed = self._attention_input(p, modulation)
        attended = self.attention.forward_predicted(normed, context, rotary, offset, first_visible)
        return self._add_residuals(p, attended, modulation)

    def _attention_input(self, x: Tensor, modulation: Modulation | None) -> Tensor:
        x = self.attention_norm(x)
        if modulation is None:
            return x
        return modulate(x, modulation.attention_shift, modulation.attention_scale)

    def _add_residuals(self, x: Tensor, attended: Tensor, modulation: Modulation | None) -> Tensor:
        """What the attention adds, then what the feed-forward adds."""
        if modulation is None:
            x = x + attended
            return x + self.feed_forward(self.ffn_norm(x))
        x = x + modulation.attention_gate * attended
        normed = modulate(
            self.ffn_norm(x), modulation.feed_forward_shift, modulation.feed_forward_scale
        )
        return x + modulation.feed_forward_gate * self.feed_forward(normed)


def attention_paths(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_groups: bool = False,
    has_documents: bool = False,
) -> dict[str, str]:
    """Which code computes each stream's attention, and why not another: said at a run's start.

    has_groups: whether the observed stream is block-causal. has_documents: whether attention stops
    at documents (data.mask_documents).

    Raises ValueError where the configuration forces a backend that cannot run.
    """
    d = model_sizes(config).head_dimension
    observed = resolve_observed_backend(
        config.observed_backend,
        device,
        dtype,
        d,
        is_masked=has_groups,
        has_documents=has_documents,
    )
    if observed == "flash_attn" and has_documents:
        observed += " (a sequence per document)"
    obstacle = why_not_flash_attn(device, dtype, d)
    if config.observed_backend == "auto" and obstacle is None and has_groups:
        obstacle = KNOWS_NO_GROUPS
    if config.observed_backend == "auto" and obstacle:
        observed += f" (flash_attn: {obstacle})"
    paths = {"observed": observed}
    if config.kind == "energy":
        predicted = resolve_backend(
            config.attention_backend, device, dtype, d, "model.attention_backend"
        )
        obstacle = why_not_triton(device, dtype, d)
        if config.attention_backend == "auto" and obstacle:
            predicted += f" (triton: {obstacle})"
        paths["predicted"] = predicted
    return paths


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def initialize_released(module: nn.Module) -> None:
    """The released initialisation: Xavier normal for every Linear, zero biases.

    Embeddings stay N(0, 1) and norms stay 1.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_normal_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
