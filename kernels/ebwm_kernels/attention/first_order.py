"""Causal self-attention of the observed stream.

It is never differentiated twice, so any first-order kernel serves.

flash-attn where it is installed, on a GPU, in half precision; PyTorch's
scaled_dot_product_attention otherwise.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

OBSERVED_BACKENDS = ("auto", "flash_attn", "sdpa")
MAX_HEAD_DIMENSION = 256


def observed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group_size: int = 1,
    first_visible: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Output (B, H, S, d) of causal self-attention: q (B, H, S, d), k and v (B, H_kv, S, d) with H
    % H_kv == 0. Differentiable once.

    backend: "flash_attn", "sdpa" or "auto". Raises ValueError for one that is unknown or cannot run
    these tensors.
    """
    if group_size != 1 or first_visible is not None or window is not None:
        raise NotImplementedError
    if resolve_observed_backend(backend, q.device, q.dtype, q.shape[-1]) == "flash_attn":
        from flash_attn import flash_attn_func

        return flash_attn_func(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True
        ).transpose(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def resolve_observed_backend(
    backend: str, device: torch.device, dtype: torch.dtype, head_dimension: int
) -> str:
    """ "flash_attn" or "sdpa"."""
    if backend not in OBSERVED_BACKENDS:
        raise ValueError(
            f"observed_attention: backend is {backend!r}; allowed: {', '.join(OBSERVED_BACKENDS)}"
        )
    if backend == "sdpa":
        return backend
    obstacle = why_not_flash_attn(device, dtype, head_dimension)
    if obstacle and backend == "flash_attn":
        raise ValueError(
            f"observed_attention: backend flash_attn cannot run {dtype}, head dimension "
            f"{head_dimension} on {device}: {obstacle}; "
            "use backend auto or sdpa"
        )
    return "sdpa" if obstacle else "flash_attn"


def why_not_flash_attn(device: torch.device, dtype: torch.dtype, head_dimension: int) -> str | None:
    """What keeps flash-attn from running such tensors, or None.

    Source of its limits: flash-attn 2.8, README.
    """
    if device.type != "cuda":
        return "it needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed (pip install flash-attn)"
    if dtype not in (torch.float16, torch.bfloat16):
        return "it takes float16 and bfloat16"
    if head_dimension > MAX_HEAD_DIMENSION or head_dimension % 8:
        return f"head dimensions that are multiples of 8 up to {MAX_HEAD_DIMENSION} are supported"
    return None
