"""Softmax and cross-entropy of rows of states: in place where nothing else reads them."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100  # target of a row that does not count
# Of logits per chunk in vocabulary_cross_entropy, if they were float32: large enough for efficient
# products, small beside W; on a GPU the fewer chunks, the fewer launches and sums of W's gradient.
CHUNK_BYTES = 16 * 2**20
GPU_CHUNK_BYTES = 4 * 2**30
GPU_SHARE = 16  # of a GPU's memory that a chunk's logits take, up to GPU_CHUNK_BYTES


def chunk_bytes(device: torch.device) -> int:
    """Bytes of a chunk's logits: on a GPU a sixteenth of its memory, at most GPU_CHUNK_BYTES.

    Not of what is free: the cut decides in which order gradients are added.
    """
    if device.type == "cpu":
        return CHUNK_BYTES
    if device.type != "cuda" or not torch.cuda.is_available():
        return GPU_CHUNK_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return min(GPU_CHUNK_BYTES, memory // GPU_SHARE)


def _softmax(x: Tensor, out: Tensor | None = None) -> Tensor:
    """Row-wise; `out` may be x."""
    return torch.softmax(x, -1) if out is None else torch.softmax(x, -1, out=out)


# Of rows that a mean is over. Where several processes share a sequence that is their share of the
# count, which may be below 1; without any rows the mean is 0.
LEAST_COUNT = 2.0**-20


class CrossEntropyRows:
    """The cross-entropy of rows, with the z-loss z_weight * logsumexp^2 of each.

    target: (rows,) with 0 where none is; share: 1 / count, or 0 there. z_term: the z-loss's part of
    the last loss, known after `softmax`.
    """

    def __init__(
        self,
        targets: Tensor,
        count: Tensor | float | None,
        dtype: torch.dtype,
        z_weight: float = 0.0,
    ):
        self.z_weight = z_weight
        self.z_term = torch.zeros((), dtype=dtype, device=targets.device)
        self.log_normalizer: Tensor | None = None
        counted = (targets != IGNORE).to(dtype)
        self.target = targets.clamp(min=0)
        count = (
            counted.sum()
            if count is None
            else torch.as_tensor(count, dtype=dtype, device=targets.device)
        )
        self.share = counted / count.clamp(min=LEAST_COUNT)

    def softmax(self, logits: Tensor, *, in_place: bool) -> tuple[Tensor, Tensor]:
        """(p = softmax(logits), loss): what the loss needs of the logits is read before they are
        overwritten.
        """
        largest, of_target = logits.amax(-1), logits.gather(-1, self.target[:, None]).squeeze(-1)
        p = _softmax(logits, out=logits if in_place else None)
        log_normalizer = largest - p.amax(-1).log()  # the largest p is 1 / sum exp(x - max)
        loss = ((log_normalizer - of_target) * self.share).sum()
        if self.z_weight:
            self.log_normalizer = log_normalizer
            self.z_term = self.z_weight * (log_normalizer.square() * self.share).sum()
            loss = loss + self.z_term
        return p, loss

    def to_residual_(self, probabilities: Tensor) -> Tensor:
        """(p - onehot(y)) share, in place of p; with a z-loss p times 1 + 2 w logsumexp."""
        if self.log_normalizer is not None:
            probabilities.mul_(1 + 2 * self.z_weight * self.log_normalizer[:, None])
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
