"""The blocks: RMSNorm, rotary attention and SwiGLU, evaluated on two streams that share every weight.

    observed  o_1 .. o_S   ordinary causal self-attention; yields K and V per layer (a decoder's prefill)
    predicted p_1 .. p_S   p_t attends to o_1 .. o_t and to itself, given those K and V (`energy_attention`)

Legend: B batch, S positions, D width, H heads, H_kv key/value heads, d head dimension.
Source: Energy-Based Transformers, arXiv 2507.02092; blocks as in Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebwm_kernels import energy_attention, observed_attention, rms_norm, swiglu
from ebwm_kernels.attention_ops import resolve_backend, why_not_triton
from ebwm_kernels.observed_attention import resolve_observed_backend, why_not_flash_attn

from ..config import ModelConfig


class Modulation(NamedTuple):
    """Shift, scale and gate of a block's attention, then of its feed-forward (adaLN, arXiv 2212.09748); each (D,)."""

    attention_shift: Tensor
    attention_scale: Tensor
    attention_gate: Tensor
    feed_forward_shift: Tensor
    feed_forward_scale: Tensor
    feed_forward_gate: Tensor


class Rotary(NamedTuple):
    """Rotation of adjacent pairs by position (RoPE, arXiv 2104.09864): a pair is a complex number, its rotation a factor.

    factors: real and imaginary parts, (S, d / 2, 2).
    """

    factors: Tensor

    def rotate(self, x_BHSd: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # the definition, for the compiler to fuse
            return _rotated(x_BHSd, self.factors)
        return _Rotation.apply(x_BHSd, torch.view_as_complex(self.factors), True)

    def slice(self, start: int, count: int) -> "Rotary":
        return Rotary(self.factors[start : start + count])


class _Rotation(torch.autograd.Function):
    """Linear, so that its derivative of any order is the rotation by the opposite angle, and nothing but the table is kept.

    The result is laid out heads first, as attention takes it, that of the derivative positions first, as the projections take it.
    """

    @staticmethod
    def forward(ctx, x_BHSd, factors, heads_first):
        ctx.factors, ctx.heads_first = factors, heads_first
        wide = x_BHSd.to(torch.float64 if x_BHSd.dtype == torch.float64 else torch.float32)
        wide = wide if wide.stride(-1) == 1 else wide.contiguous()
        out = (
            torch.empty_like(wide, memory_format=torch.contiguous_format)
            if heads_first
            else torch.empty_like(
                wide.transpose(1, 2), memory_format=torch.contiguous_format
            ).transpose(1, 2)
        )
        torch.mul(_pairs(wide), factors, out=_pairs(out))
        return out.to(x_BHSd.dtype)

    @staticmethod
    def backward(ctx, grad):
        return _Rotation.apply(grad, ctx.factors.conj(), not ctx.heads_first), None, None


def _rotated(x_BHSd: Tensor, factors: Tensor) -> Tensor:
    """The same in real arithmetic and plain operations."""
    even, odd = x_BHSd.to(factors.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = factors.unbind(-1)
    return (
        torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1)
        .flatten(-2)
        .to(x_BHSd.dtype)
    )


def _pairs(x: Tensor) -> Tensor:
    """Adjacent pairs of the last dimension as complex numbers."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class RotaryTable(nn.Module):
    """Factors of positions 0 .. n - 1, computed in float64, kept per device in double or single precision (also for low precision)."""

    def __init__(self, head_dimension: int, theta: float):
        super().__init__()
        self.head_dimension, self.theta = head_dimension, theta
        self._tables: dict[tuple, Rotary] = {}

    def forward(self, num_positions: int, like: Tensor) -> Rotary:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (dtype, like.device)
        if key not in self._tables or len(self._tables[key].factors) < num_positions:
            frequencies = self.theta ** (
                -torch.arange(0, self.head_dimension, 2, dtype=torch.float64) / self.head_dimension
            )
            angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
            factors = torch.stack([angles.cos(), angles.sin()], -1)
            self._tables[key] = Rotary(factors.to(like.device, dtype))
        return self._tables[key].slice(0, num_positions)


class RMSNorm(nn.Module):
    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.epsilon)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dimension = config.width // config.num_heads
        self.backend, self.observed_backend = config.attention_backend, config.observed_backend
        self.wq = nn.Linear(config.width, config.width, bias=False)
        self.wk = nn.Linear(config.width, self.num_kv_heads * self.head_dimension, bias=False)
        self.wv = nn.Linear(config.width, self.num_kv_heads * self.head_dimension, bias=False)
        self.wo = nn.Linear(config.width, config.width, bias=False)

    def keys_values(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        return rotary.rotate(self._heads(self.wk(x))), self._heads(self.wv(x)).contiguous()

    def observe(self, x: Tensor, keys: Tensor, values: Tensor, rotary: Rotary) -> Tensor:
        """Causal self-attention of the observed stream; first order only."""
        q = rotary.rotate(self._heads(self.wq(x)))
        seen = observed_attention(q, keys, values, backend=self.observed_backend)
        return self.wo(seen.transpose(1, 2).flatten(2))

    def predict(
        self, p: Tensor, context: tuple[Tensor, Tensor], rotary: Rotary, offset: int
    ) -> Tensor:
        """The predicted stream, given the observed keys and values (B, H_kv, C, d); differentiable twice."""
        q = rotary.rotate(self._heads(self.wq(p)))
        k_self, v_self = self.keys_values(p, rotary)
        if self.num_kv_heads != self.num_heads:
            k_self, v_self = (
                u.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
                for u in (k_self, v_self)
            )
        seen = energy_attention(
            q, k_self, v_self, *context, context_offset=offset, backend=self.backend
        )
        return self.wo(seen.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dimension)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.width, config.feed_forward_width, bias=False)
        self.w2 = nn.Linear(config.feed_forward_width, config.width, bias=False)
        self.w3 = nn.Linear(config.width, config.feed_forward_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.width, config.norm_epsilon)
        self.feed_forward = FeedForward(config)

    def keys_values(
        self, o: Tensor, rotary: Rotary, modulation: Modulation | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the predicted stream needs of this layer: (K, V), each (B, H_kv, S, d)."""
        return self.attention.keys_values(self._attention_input(o, modulation), rotary)

    def observe(
        self,
        o: Tensor,
        keys: Tensor,
        values: Tensor,
        rotary: Rotary,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """The observed stream (B, S, D) through the block, its keys and values given."""
        return self._finish(
            o,
            self.attention.observe(self._attention_input(o, modulation), keys, values, rotary),
            modulation,
        )

    def predict(
        self,
        p: Tensor,
        context: tuple[Tensor, Tensor],
        rotary: Rotary,
        offset: int,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """The predicted stream (B, S, D) through the block."""
        return self._finish(
            p,
            self.attention.predict(self._attention_input(p, modulation), context, rotary, offset),
            modulation,
        )

    def _attention_input(self, x: Tensor, modulation: Modulation | None) -> Tensor:
        x = self.attention_norm(x)
        return (
            x
            if modulation is None
            else modulate(x, modulation.attention_shift, modulation.attention_scale)
        )

    def _finish(self, x: Tensor, attended: Tensor, modulation: Modulation | None) -> Tensor:
        if modulation is None:
            x = x + attended
            return x + self.feed_forward(self.ffn_norm(x))
        x = x + modulation.attention_gate * attended
        normed = modulate(
            self.ffn_norm(x), modulation.feed_forward_shift, modulation.feed_forward_scale
        )
        return x + modulation.feed_forward_gate * self.feed_forward(normed)


def attention_paths(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, str]:
    """Which code computes each stream's attention, and why not another: said once at the start of a run.

    Raises ValueError where the configuration forces a backend that cannot run.
    """
    d = config.width // config.num_heads
    observed = resolve_observed_backend(config.observed_backend, device, dtype, d)
    obstacle = why_not_flash_attn(device, dtype, d)
    paths = {
        "observed": observed
        + (f" (flash_attn: {obstacle})" if config.observed_backend == "auto" and obstacle else "")
    }
    if config.kind == "energy":
        predicted = resolve_backend(
            config.attention_backend, device, dtype, d, "model.attention_backend"
        )
        obstacle = why_not_triton(device, dtype, d)
        paths["predicted"] = predicted + (
            f" (triton: {obstacle})" if config.attention_backend == "auto" and obstacle else ""
        )
    return paths


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def initialize_released(module: nn.Module) -> None:
    """The released initialisation: Xavier normal for every Linear, zero biases; embeddings stay N(0, 1), norms stay 1."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_normal_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
