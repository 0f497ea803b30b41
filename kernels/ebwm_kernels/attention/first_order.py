"""Causal self-attention of the observed stream, block-causal with groups.

It is never differentiated twice, so any first-order kernel serves:

    flash_attn  where it is installed, on a GPU, in half precision: causal, packed documents
                (sequences of their own lengths), and windows
    flex        PyTorch's FlexAttention, compiled, on a GPU: groups, any first keys and windows,
                with whole blocks skipped
    sdpa        PyTorch's scaled_dot_product_attention: causal, or with one boolean mask
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F

from ebwm_kernels.attention.packed_documents import Documents, documents_of
from ebwm_kernels.attention.visibility import (
    Shape,
    check_groups,
    first_visible_keys,
    last_visible,
    score_scale,
    visible_keys,
)

OBSERVED_BACKENDS = ("auto", "flash_attn", "flex", "sdpa")
MAX_HEAD_DIMENSION = 256
KNOWS_NO_GROUPS = "it knows no groups, and of first_visible packed documents alone"


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

    group_size: a row sees its own group of so many rows and all earlier ones (a frame's tokens; 1:
    causal). first_visible: (B, S) integers that do not decrease along S: the first row that a row
    sees, the start of its document. window: at most so many rows, the last that it sees.

    backend: "flash_attn" (no groups, and first_visible of documents only), "flex", "sdpa", or
    "auto": flash_attn where it can run; for groups, first_visible or a window flex on a GPU; else
    sdpa. The flash_attn and flex paths were never run on a GPU: what they are given is tested on a
    CPU. With a mask, sdpa holds (B, S, S) booleans. Raises ValueError for groups, first keys or a
    window that do not fit, and for a backend that is unknown or cannot run these tensors.
    """
    operation = "observed_attention"
    num_rows, d = q.shape[2:]
    check_groups(operation, num_rows, 0, group_size, group_size)
    shape = Shape(score_scale(None, d), 0, True, group_size, group_size)
    first = first_visible_keys(operation, q, num_rows, first_visible, window, shape, own=False)
    documents = None
    if first_visible is not None and _asks_for_documents(backend, q, group_size):
        documents = documents_of(first_visible)
    chosen = resolve_observed_backend(
        backend,
        q.device,
        q.dtype,
        d,
        is_masked=group_size > 1 or (first_visible is not None and documents is None),
        is_windowed=window is not None,
        has_documents=documents is not None,
    )
    shares_heads = q.shape[1] != k.shape[1]
    if chosen == "flash_attn" and documents is not None:
        return _flash_attn_documents(q, k, v, documents, window)
    if chosen == "flash_attn":
        return _flash_attn(q, k, v, window)
    if chosen == "flex" and (group_size > 1 or first is not None):
        return _flex(q, k, v, first, shape)
    if group_size == 1 and first is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shares_heads)
    mask = visible_keys(num_rows, num_rows, first, shape, q.device)
    if first is not None:
        mask = mask[:, None]  # the same for all heads
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shares_heads)


def _asks_for_documents(backend: str, q: Tensor, group_size: int) -> bool:
    """Whether flash-attn may run, so that it is worth waiting for the documents' lengths."""
    if backend not in ("auto", "flash_attn") or group_size > 1 or torch.compiler.is_compiling():
        return False
    return why_not_flash_attn(q.device, q.dtype, q.shape[-1]) is None


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = (u.transpose(1, 2) for u in (q, k, v))
    return flash_attn_func(q, k, v, causal=True, **_flash_window(window)).transpose(1, 2)


def _flash_attn_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None
) -> Tensor:
    """All rows of all samples one behind the other, (B S, H, d), a sequence per document."""
    from flash_attn import flash_attn_varlen_func

    batch, _, num_rows, _ = q.shape
    q, k, v = (u.transpose(1, 2).flatten(0, 1) for u in (q, k, v))
    attended = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=documents.bounds,
        cu_seqlens_k=documents.bounds,
        max_seqlen_q=documents.longest,
        max_seqlen_k=documents.longest,
        causal=True,
        **_flash_window(window),
    )
    return attended.unflatten(0, (batch, num_rows)).transpose(1, 2)


def _flash_window(window: int | None) -> dict[str, tuple[int, int]]:
    """flash-attn counts the keys to the left of the row's own, and to its right."""
    return {} if window is None else {"window_size": (window - 1, 0)}


def _flex(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, shape: Shape) -> Tensor:
    """FlexAttention with the rows' bounds as its mask."""
    num_rows = q.shape[2]
    rows = torch.arange(num_rows, device=q.device)
    last = last_visible(rows, num_rows, shape)

    def sees(batch, head, row, key):
        visible = key < last[row]
        if first is not None:
            visible = visible & (key >= first[batch, row])
        return visible

    batch = None if first is None else q.shape[0]
    flex_attention, create_block_mask = _compiled_flex()
    mask = create_block_mask(sees, batch, None, num_rows, num_rows, device=q.device)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


@functools.cache
def _compiled_flex():
    """Uncompiled, FlexAttention holds every score."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


def resolve_observed_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dimension: int,
    *,
    is_masked: bool = False,
    is_windowed: bool = False,
    has_documents: bool = False,
) -> str:
    """ "flash_attn", "flex" or "sdpa". is_masked: whether there are groups, or first visible rows
    that are no documents'. has_documents: whether they are documents'.

    Raises ValueError for a backend that is unknown or cannot run them.
    """
    if backend not in OBSERVED_BACKENDS:
        raise ValueError(
            f"observed_attention: backend is {backend!r}; allowed: {', '.join(OBSERVED_BACKENDS)}"
        )
    no_flash = why_not_flash_attn(device, dtype, head_dimension)
    if is_masked and no_flash is None:
        no_flash = KNOWS_NO_GROUPS
    no_flex = why_not_flex(device, dtype, head_dimension)
    obstacles = {"flash_attn": no_flash, "flex": no_flex, "sdpa": None}
    if backend != "auto":
        if obstacles[backend] is None:
            return backend
        raise ValueError(
            f"observed_attention: backend {backend} cannot run {dtype}, head dimension "
            f"{head_dimension} on {device}: {obstacles[backend]}; "
            "use backend auto or sdpa"
        )
    if no_flash is None:
        return "flash_attn"
    if (is_masked or is_windowed or has_documents) and no_flex is None:
        return "flex"
    return "sdpa"


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


def why_not_flex(device: torch.device, dtype: torch.dtype, head_dimension: int) -> str | None:
    """What keeps FlexAttention from running such tensors, or None."""
    if device.type != "cuda":
        return "it needs a GPU"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "it takes float16, bfloat16 and float32"
    if head_dimension < 16 or head_dimension > MAX_HEAD_DIMENSION:
        return f"head dimensions from 16 to {MAX_HEAD_DIMENSION} are supported"
    return None
