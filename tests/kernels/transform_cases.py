"""What the tests of transforms and of autocast share: small operations beside their definitions."""

import pytest
import torch

from ebwm_kernels import (
    causal_attention,
    energy_attention,
    rms_norm,
    swiglu,
    vocabulary_cross_entropy,
    vocabulary_descend,
    vocabulary_embed,
    vocabulary_step,
)
from ebwm_kernels.attention.causal import causal_attention_definition
from ebwm_kernels.attention.energy import energy_attention_definition
from ebwm_kernels.pointwise import rms_norm_reference, swiglu_reference

B, S, C, D, D_V = 2, 4, 5, 3, 2
QUERY, OWN_VALUE, KEY, VALUE = (B, 4, S, D), (B, 4, S, D_V), (B, 2, C, D), (B, 2, C, D_V)
DOCUMENTS = torch.tensor([[0, 0, 2, 2], [0, 0, 0, 0]])


def with_options(function, **options):
    return lambda *tensors, **more: function(*tensors, **options, **more)


def attention_pair(shapes, operation, definition, **options):
    return shapes, with_options(operation, **options), with_options(definition, **options)


ENERGY = [QUERY, QUERY, OWN_VALUE, KEY, VALUE]
CASES = {  # shapes of the inputs, the operation, its definition
    "energy": attention_pair(
        ENERGY, energy_attention, energy_attention_definition, context_offset=1
    ),
    "energy in groups, two documents": attention_pair(
        ENERGY,
        energy_attention,
        energy_attention_definition,
        group_size=2,
        first_visible=DOCUMENTS,
    ),
    "causal": attention_pair(
        [QUERY, KEY, VALUE], causal_attention, causal_attention_definition, window=2
    ),
    "bidirectional": attention_pair(
        [QUERY, KEY, VALUE], causal_attention, causal_attention_definition, causal=False
    ),
    "rms_norm": (
        [(B, S, D), (D,)],
        with_options(rms_norm, epsilon=1e-5),
        with_options(rms_norm_reference, epsilon=1e-5),
    ),
    "swiglu": ([(B, S, D), (B, S, D)], swiglu, swiglu_reference),
}
ATTENTION = [name for name in CASES if name not in ("rms_norm", "swiglu")]
EVERY = pytest.mark.parametrize("name", CASES)


def draw(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes)


def summed(function):
    return lambda *tensors: function(*tensors).sin().sum()


def vocabulary_calls(hidden, weight):
    targets = torch.tensor([1, 0, 2])
    probabilities = torch.full((3, len(weight)), 1 / len(weight), dtype=weight.dtype)
    return {
        "vocabulary_embed": lambda w: vocabulary_embed(probabilities, w)[1],
        "vocabulary_descend": lambda w: vocabulary_descend(w, hidden, targets)[1],
        "vocabulary_step": lambda w: vocabulary_step(probabilities, w, hidden, targets)[1],
        "vocabulary_cross_entropy": lambda w: vocabulary_cross_entropy(hidden, w, targets),
    }
