"""Which tokens of a sample are scored, and how hard it is: members beside `tokens.npy`.

    scored.npy       uint8 (block_length - group_size,): 1 where a target counts, 0 where it does
                     not; without this member all targets count
    difficulty.npy   uint32 (1,): how hard the sample is, in the unit of whoever made it

From the shard to the model the mask travels inside the tokens, so that whatever moves samples
around (workers, replay, streams) moves it along: a token t that is not scored as a target is
carried as -1 - t. `plain_tokens` gives the tokens back.
"""

from __future__ import annotations

import numpy as np

MEMBERS = ("difficulty", "scored")  # what a manifest may list, in this order
_HIGHEST = 2**62  # of a token: beyond any vocabulary, and its mark still fits into 64 bits


def mark_unscored(tokens: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """int64 tokens (block_length,), those that are not scored as -1 - t.

    scored: uint8 (targets,), of the last tokens. ValueError for a mask that is none.
    """
    if scored.max() > 1:
        raise ValueError(f"scored.npy holds {scored.max()}: expected 0 or 1")
    if not scored.any():
        raise ValueError("scored.npy holds no 1: expected at least one target that counts")
    if tokens.max() > _HIGHEST:
        raise ValueError(f"holds token {tokens.max()}: more than any vocabulary has")
    marked = tokens.astype(np.int64)
    targets = marked[len(tokens) - len(scored) :]
    targets[scored == 0] = -1 - targets[scored == 0]
    return marked


def mark_padding(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """The same of a block of best-fit packing: a second end of sequence in a row is padding."""
    is_end = tokens == eos_id
    return mark_unscored(tokens, (~(is_end[:-1] & is_end[1:])).astype(np.uint8))


def plain_tokens(sequences: np.ndarray) -> np.ndarray:
    """The tokens of samples as read, without the marks; of the same shape."""
    if sequences.dtype.kind == "u":
        return sequences
    return np.where(sequences < 0, -1 - sequences, sequences)


def num_scored(sequence: np.ndarray, group_size: int) -> int:
    """How many targets of a sample as read are scored."""
    return int((sequence[group_size:] >= 0).sum())
