"""ebwm_kernels: operations that are differentiable twice, each with a plain reference beside it.

Legend used throughout: B batch, H query heads, H_kv key/value heads, S query positions, C context positions, d head dimension.
"""

from .causal_attention import causal_attention
from .energy_attention import energy_attention
from .observed_attention import observed_attention
from .pointwise import rms_norm, swiglu
from .vocabulary import (
    vocabulary_cross_entropy,
    vocabulary_descend,
    vocabulary_embed,
    vocabulary_step,
)

__all__ = [
    "causal_attention",
    "energy_attention",
    "observed_attention",
    "rms_norm",
    "swiglu",
    "vocabulary_cross_entropy",
    "vocabulary_descend",
    "vocabulary_embed",
    "vocabulary_step",
]
