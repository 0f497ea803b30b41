"""Documents in a packed sequence: where each begins.

A document begins with the end-of-sequence token before it: that token sees no other document, and
its target is the document's first token. So each document's losses and gradients are those it would
have alone. The first document of a block begins with the block.

Nothing else restarts: attention knows positions by their differences (model/rotary.py).
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(tokens: Tensor, eos_id: int) -> Tensor:
    """(B, S) int32: the position where each token's document begins. tokens: (B, S)."""
    positions = torch.arange(tokens.shape[1], dtype=torch.int32, device=tokens.device)
    starts = torch.where(tokens == eos_id, positions, 0)
    return starts.cummax(1).values


def last_document(tokens: Tensor, eos_id: int) -> Tensor:
    """The document that the last of some tokens (S,) is in, as far as it goes."""
    start = int(document_starts(tokens[None], eos_id)[0, -1])
    return tokens[start:]
