"""Softmax and cross-entropy of rows of states: in place where nothing else reads them."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # target of a row that does not count
# of logits per chunk in vocabulary_cross_entropy: large enough for efficient products, small
# beside W
CHUNK_BYTES = 16 * 2**20


def _softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Row-wise; `out` may be x."""
    return torch.softmax(x, -1) if out is None else torch.softmax(x, -1, out=out)


class CrossEntropyRows:
    """The cross-entropy of rows.

    target: (rows,) with 0 where none is; share: 1 / count, or 0 there.
    """

    def __init__(self, targets: Tensor, count: Tensor | float | None, dtype: torch.dtype):
        counted = (targets != IGNORE).to(dtype)
        self.target = targets.clamp(min=0)
        count = (
            counted.sum()
            if count is None
            else torch.as_tensor(count, dtype=dtype, device=targets.device)
        )
        self.share = counted / count.clamp(min=1)

    def softmax(self, logits: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
        """(p = softmax(logits), loss): what the loss needs of the logits is read before they are
        overwritten.
        """
        largest, of_target = logits.amax(-1), logits.gather(-1, self.target[:, None]).squeeze(-1)
        p = _softmax(logits, out=logits if in_place else None)
        log_normalizer = largest - p.amax(-1).log()  # the largest p is 1 / sum exp(x - max)
        return p, ((log_normalizer - of_target) * self.share).sum()

    def to_residual_(self, probabilities: Tensor) -> Tensor:
        """(p - onehot(y)) share, in place of p."""
        probabilities.scatter_add_(
            -1, self.target[:, None], probabilities.new_full((), -1.0).expand(len(probabilities), 1)
        )
        return probabilities.mul_(self.share[:, None])

    def rounded_residual(self, probabilities: Tensor, dtype: torch.dtype) -> Tensor:
        """p - onehot(target), rounded to a half precision after the subtraction."""
        target = self.target[:, None]
        return probabilities.to(dtype).scatter_(
            -1, target, (probabilities.gather(-1, target) - 1).to(dtype)
        )
