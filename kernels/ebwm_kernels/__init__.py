"""ebwm_kernels: operations that are differentiable twice, each with a plain reference beside it.

Legend used throughout: B batch, H query heads, H_kv key/value heads, S query positions, C context
positions, d head dimension.
"""

from ebwm_kernels.attention.causal import causal_attention, cross_attention
from ebwm_kernels.attention.energy import energy_attention
from ebwm_kernels.attention.first_order import observed_attention
from ebwm_kernels.pointwise import (
    add_rms_norm,
    rms_norm,
    rms_norm_beside,
    swiglu,
    swiglu_halves,
)
from ebwm_kernels.vocabulary.autograd import (
    vocabulary_cross_entropy,
    vocabulary_descend,
    vocabulary_embed,
    vocabulary_step,
)
from ebwm_kernels.vocabulary.candidates import (
    Candidates,
    candidates_embed,
    candidates_loss,
    candidates_move,
    first_candidates,
)

__all__ = [
    "Candidates",
    "add_rms_norm",
    "candidates_embed",
    "candidates_loss",
    "candidates_move",
    "causal_attention",
    "cross_attention",
    "energy_attention",
    "first_candidates",
    "observed_attention",
    "rms_norm",
    "rms_norm_beside",
    "swiglu",
    "swiglu_halves",
    "vocabulary_cross_entropy",
    "vocabulary_descend",
    "vocabulary_embed",
    "vocabulary_step",
]
