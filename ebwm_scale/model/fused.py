"""Where a stream's pointwise operations run in Triton, and projections as one product."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebwm_kernels.fused.launches import runs_fused


def is_fused(backend: str, x: Tensor) -> bool:
    """Whether norms, activations and rotations of such a stream run in Triton, and its projections
    as one product; plain PyTorch keeps the released forms to the bit.
    """
    if torch.compiler.is_compiling():
        return False
    return runs_fused(backend, x, "model.attention_backend")


def joined_product(x: Tensor, *linears: nn.Linear) -> Tensor:
    """What the linears make of x, beside each other, by one product.

    Weights that ZeRO stage 3 has split are gathered by their own modules: one by one.
    """
    weights = [linear.weight for linear in linears]
    if any(hasattr(weight, "ds_id") for weight in weights):
        return torch.cat([linear(x) for linear in linears], -1)
    return F.linear(x, torch.cat(weights))
