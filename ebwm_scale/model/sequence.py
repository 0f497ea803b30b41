"""Sequences cut over processes: each holds neighbouring positions of every sample.

    process r of n      positions r L .. (r + 1) L - 1 of the S = n L of a sample
    rows on their own   embeddings, norms, feed-forwards, heads, the vocabulary step: as ever
    attention           (L positions, H heads) -- exchange --> (S positions, H / n heads), and back

The exchange is a permutation of numbers over processes, so its derivative is the way back, of any
order: the double backward needs nothing else. All processes of a group have to call each exchange,
forward and backward, in one order; they do, since they run the same program on parts of one shape.

A landscape's token (time_embed) stands in front of position 0. Every process carries a copy, as its
rows come from one tensor; the first one's alone is seen, and so gets a gradient.

    group = SequenceGroup(process_group, rank=r, size=n)
    with cut(network, group.part(num_positions=S, front=0)):
        ...                                            # the network takes rows of L positions

Source: the exchange of DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ebwm_scale.core.errors import DataError
from ebwm_scale.model.rotary import Rotary

WEIGHTS = 8191  # of tokens in a checksum, by position: a prime


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share each sample; rank: this one's place among them."""

    processes: dist.ProcessGroup
    rank: int
    size: int

    def part(self, num_positions: int, front: int) -> SequencePart:
        """This process's part of samples of so many positions; front: rows in front of them.

        ValueError where the processes do not divide the positions.
        """
        if num_positions % self.size:
            raise ValueError(
                f"a sample has {num_positions} positions for {self.size} processes: "
                "their number must divide the positions"
            )
        return SequencePart(self, num_positions // self.size, front)

    def require_same(self, sequences: Tensor, sample_ids: Tensor) -> None:
        """DataError on every process unless all of them were given the same tokens (B, S) of the
        same samples (B,): parts of different samples would train without a word.
        """
        weights = torch.arange(sequences.shape[1], device=sequences.device) % WEIGHTS + 1
        found = torch.stack([sample_ids.sum().to(sequences.device), (sequences * weights).sum()])
        ends = torch.cat([found, -found])
        dist.all_reduce(ends, dist.ReduceOp.MAX, group=self.processes)
        highest, lowest = ends.view(2, 2)
        if not torch.equal(highest, -lowest):
            raise DataError(
                f"the {self.size} processes that share a sequence (parallel.sequence) were given "
                f"different tokens; samples {sample_ids.tolist()} on the one that says this: make "
                "sure that all of them read the same files (tools/verify_shards.py)"
            )


@dataclass(frozen=True)
class SequencePart:
    """The `length` neighbouring positions that this process has of each sample.

    front: rows in front of the first position, which every process carries.
    """

    group: SequenceGroup
    length: int
    front: int

    @property
    def first(self) -> int:
        """The first of them, counted from the start of the sample."""
        return self.group.rank * self.length

    def own(self, whole: Tensor) -> Tensor:
        """Those of (B, S, ...)."""
        return whole[:, self.first : self.first + self.length]

    def observed_rotary(self, whole: Rotary) -> Rotary:
        """Rotations of the observed rows of this process, of those of (front + S) rows."""
        first = self.front + self.first
        own = whole.factors[first : first + self.length]
        return Rotary(torch.cat([whole.factors[: self.front], own]))

    def rows_of_all(self, whole: Tensor, positions: slice) -> Tensor:
        """Of (B, S, ...) what stands at the same positions of each part, (B, n s, ...)."""
        parts = whole.unflatten(1, (self.group.size, self.length))
        return parts[:, :, positions].flatten(1, 2)

    def offset_of(self, rank: int, offset: int) -> int:
        """Keys in front of a process's rows, where there are `offset` in front of this one's."""
        return offset + (rank - self.group.rank) * self.length

    def into_heads(self, x: Tensor) -> Tensor:
        """(B, H, s, d) of every process -> (B, H / n, n s, d), one process's rows behind another's.

        Differentiable as often as one likes.
        """
        parts = x.unflatten(1, (self.group.size, -1)).movedim(1, 0)
        return _Exchange.apply(parts, self.group.processes).movedim(0, 2).flatten(2, 3)

    def into_positions(self, x: Tensor) -> Tensor:
        """The way back: (B, H / n, n s, d) -> (B, H, s, d)."""
        parts = x.unflatten(2, (self.group.size, -1)).movedim(2, 0)
        return _Exchange.apply(parts, self.group.processes).movedim(0, 1).flatten(1, 2)

    def observed_into_heads(self, x: Tensor) -> Tensor:
        """`into_heads` of observed rows: (B, H, front + L, d) -> (B, H / n, front + S, d)."""
        heads = self.into_heads(x)
        if self.front == 0:
            return heads
        parts = heads.unflatten(2, (self.group.size, -1))
        rest = parts[:, :, :, self.front :].flatten(2, 3)
        return torch.cat([parts[:, :, 0, : self.front], rest], 2)

    def observed_into_positions(self, x: Tensor) -> Tensor:
        """The way back: (B, H / n, front + S, d) -> (B, H, front + L, d)."""
        if self.front > 0:
            rest = x[:, :, self.front :].unflatten(2, (self.group.size, -1))
            copies = x[:, :, None, : self.front].expand(-1, -1, self.group.size, -1, -1)
            x = torch.cat([copies, rest], 3).flatten(2, 3)
        return self.into_positions(x)


class _Exchange(torch.autograd.Function):
    """x (n, ...): its i-th part goes to process i, and what comes from it stands there.

    Twice that is where it began, so the transposed map, the derivative, is the map itself.
    """

    @staticmethod
    def forward(ctx, x: Tensor, processes: dist.ProcessGroup) -> Tensor:
        ctx.processes = processes
        x = x.contiguous()
        found = torch.empty_like(x)
        dist.all_to_all_single(found, x, group=processes)
        return found

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Exchange.apply(grad, ctx.processes), None


@contextlib.contextmanager
def cut(network, part: SequencePart | None) -> Iterator[None]:
    """Within it a network takes rows of this part of each sample; None: of whole samples."""
    if part is None:
        yield
        return
    readers = [network, *(layer.attention for layer in network.layers)]
    for reader in readers:
        reader.part = part
    try:
        yield
    finally:
        for reader in readers:
            reader.part = None
