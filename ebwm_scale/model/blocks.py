"""The blocks: RMSNorm, rotary attention and SwiGLU, on two streams that share every weight.

    observed  o_1 .. o_S   ordinary causal self-attention; yields K and V per layer (a prefill)
    predicted p_1 .. p_S   p_t attends to o_1 .. o_t and to itself, given those K and V

Without model.own_keys p_t attends to o_1 .. o_t alone: what a candidate is reaches the energy
through the residuals, the queries and the feed-forward. That spares its keys and values, two of
seven products.

In a sequence of groups of P positions, read "group" for each of them: the observed stream is
block-causal, and p_t attends to all observed groups up to its own and to its group's candidates.
Conditions of a group, such as an action, are further rows of its observed group (conditions.py).

Legend: B batch, S positions, D width, H heads, H_kv key/value heads, d head dimension.
Source: Energy-Based Transformers, arXiv 2507.02092; blocks as in Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

from torch import Tensor, nn

from ebwm_kernels import swiglu, swiglu_halves
from ebwm_scale.config.resolved import model_sizes
from ebwm_scale.config.schema import ModelConfig
from ebwm_scale.model.attention import Attention
from ebwm_scale.model.fused import is_fused, joined_product
from ebwm_scale.model.norm import Modulation, RMSNorm
from ebwm_scale.model.rotary import Rotary


class FeedForward(nn.Module):
    """SwiGLU, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        sizes = model_sizes(config)
        self.w1 = nn.Linear(sizes.width, sizes.feed_forward_width, bias=False)
        self.w2 = nn.Linear(sizes.feed_forward_width, sizes.width, bias=False)
        self.w3 = nn.Linear(sizes.width, sizes.feed_forward_width, bias=False)
        self.backend = config.attention_backend

    def forward(self, x: Tensor) -> Tensor:
        if is_fused(self.backend, x):
            return self.w2(swiglu_halves(joined_product(x, self.w1, self.w3), backend=self.backend))
        return self.w2(swiglu(self.w1(x), self.w3(x), backend="reference"))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and beside a residual."""

    def __init__(
        self,
        config: ModelConfig,
        group_size: int = 1,
        num_conditions: int = 0,
        grid: tuple[int, int] | None = None,
    ):
        super().__init__()
        width = model_sizes(config).width
        self.attention_norm = RMSNorm(width, config.norm_epsilon, config.attention_backend)
        self.attention = Attention(config, group_size, num_conditions, grid)
        self.ffn_norm = RMSNorm(width, config.norm_epsilon, config.attention_backend)
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

    def observed_with_keys(
        self,
        o: Tensor,
        rotary: Rotary,
        modulation: Modulation | None = None,
        first_visible: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(K, V, the observed stream behind the block): `keys_values` and `forward_observed`.

        Fused, the stream is normed once and one product makes queries, keys and values of it.
        """
        if is_fused(self.attention.backend, o):
            o, normed = self._attention_input_beside(o, modulation)
            keys, values, attended = self.attention.observed_with_keys(
                normed, rotary, first_visible
            )
            return keys, values, self._add_residuals(o, attended, modulation)
        keys, values = self.keys_values(o, rotary, modulation)
        behind = self.forward_observed(o, keys, values, rotary, modulation, first_visible)
        return keys, values, behind

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
        p, normed = self._attention_input_beside(p, modulation)
        attended = self.attention.forward_predicted(normed, context, rotary, offset, first_visible)
        return self._add_residuals(p, attended, modulation)

    def _attention_input(self, x: Tensor, modulation: Modulation | None) -> Tensor:
        if modulation is None:
            return self.attention_norm(x)
        return self.attention_norm(x, modulation.attention_shift, modulation.attention_scale)

    def _attention_input_beside(
        self, x: Tensor, modulation: Modulation | None
    ) -> tuple[Tensor, Tensor]:
        """(x, `_attention_input` of it), see RMSNorm.beside."""
        if modulation is None:
            return self.attention_norm.beside(x)
        return self.attention_norm.beside(x, modulation.attention_shift, modulation.attention_scale)

    def _add_residuals(self, x: Tensor, attended: Tensor, modulation: Modulation | None) -> Tensor:
        """What the attention adds, then what the feed-forward adds."""
        if modulation is None:
            x, normed = self.ffn_norm.of_sum(x, attended)
            return x + self.feed_forward(normed)
        x, normed = self.ffn_norm.of_sum(
            x,
            modulation.attention_gate * attended,
            modulation.feed_forward_shift,
            modulation.feed_forward_scale,
        )
        return x + modulation.feed_forward_gate * self.feed_forward(normed)


def initialize_released(module: nn.Module) -> None:
    """The released initialisation: Xavier normal for every Linear, zero biases.

    Embeddings stay N(0, 1) and norms stay 1.
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_normal_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
