"""Attention as its definition in plain operations: a softmax over the scores of what a query sees.

For tests and readers, and for torch.func's transforms under torch.compile, which drop what a custom
operator is not told (ops.py): differentiable to any order in every mode. Its scores are S x C, and
S x S for own keys, in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebwm_kernels.attention.visibility import Shape, same_group, visible_keys
from ebwm_kernels.autograd_rules import without_autocast


@without_autocast
def attention_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_self: Tensor | None,
    v_self: Tensor | None,
    first_visible: Tensor | None,
    shape: Shape,
) -> Tensor:
    """Output (B, H, S, d of values); tensors as in `ops.attend`. Half precisions are computed in
    float32.
    """
    S, C = q.shape[2], k.shape[2]
    num_heads, num_key_heads = q.shape[1], k.shape[1]

    def by_key_head(x: Tensor) -> Tensor:
        """(B, H, S, n) -> (B, H_kv, H / H_kv, S, n)."""
        return _wide(x).unflatten(1, (num_key_heads, num_heads // num_key_heads))

    queries = by_key_head(q)
    keys = _wide(k).unsqueeze(2)
    values = _wide(v).unsqueeze(2)
    visible = visible_keys(S, C, first_visible, shape, q.device)
    if first_visible is not None:
        visible = visible[:, None, None]  # the same for all heads
    scores = (shape.scale * queries @ keys.mT).masked_fill(~visible, float("-inf"))
    if k_self is None or v_self is None:
        return (scores.softmax(-1) @ values).flatten(1, 2).to(q.dtype)
    own_visible = same_group(S, shape.group_size, q.device)
    own_scores = shape.scale * queries @ by_key_head(k_self).mT
    own_scores = own_scores.masked_fill(~own_visible, float("-inf"))
    weights = torch.cat([own_scores, scores], -1).softmax(-1)
    mixed = weights[..., S:] @ values + weights[..., :S] @ by_key_head(v_self)
    return mixed.flatten(1, 2).to(q.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
