"""Best-fit packing: documents that fit into a block stay whole, and leave as little room as can be.

    documents that fit     E [a a a E] [c E] . .      E: end of sequence, .: padding, which is E too
                           E [b b b b b b E]          and no target
    longer documents       E [d d d d d d d]          one after the other, cut where a block ends
                             d [d d E e e e e] ...    blocks share a token, as all blocks do

A block begins with the end of sequence before its first document, so every token of a document is a
target once. Within a bucket of the order (runs.py) documents are taken by falling size, each into
the block with the least room that takes it; the blocks of a bucket are then permuted. Two ends of
sequence side by side are padding: no document is empty.

Of the training split alone. Validation is packed as ever, so that its losses can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ebwm_scale.data.order import permutation
from ebwm_scale.data.prepare.packing import PackedSplit, token_dtype

BEST_FIT = "best_fit"
_KEY = 0x6562776D5F666974


@dataclass(frozen=True)
class BestFitSplit(PackedSplit):
    """A split whose documents are packed by best fit. eos_id: ends documents, and pads blocks."""

    eos_id: int
    seed: int

    @cached_property
    def blocks_per_bucket(self) -> np.ndarray:
        """int64 (buckets,)."""
        return np.array([plan.num_blocks for plan in self._plans()], dtype=np.int64)

    @property
    def num_blocks(self) -> int:
        return int(self.blocks_per_bucket.sum())

    @property
    def num_targets(self) -> int:
        """Every token of every document."""
        return self.num_tokens

    def facts(self) -> dict[str, Any]:
        """Waste: places in blocks that hold nothing, and documents that had to be cut."""
        return {
            "num_padding_tokens": self.num_blocks * self.context_length - self.num_targets,
            "num_cut_documents": sum(len(plan.long) for plan in self._plans()),
        }

    def blocks(self, first: int, end: int, counts: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        ends = np.cumsum(self.blocks_per_bucket)
        for bucket in range(self.runs.num_buckets):
            start = int(ends[bucket]) - int(self.blocks_per_bucket[bucket])
            if start >= end or int(ends[bucket]) <= first:
                continue
            documents = list(self.runs.bucket(self.rule, self.name, bucket))
            sizes = np.array([len(document) for document in documents], dtype=np.int64)
            plan = _Plan(sizes, self.context_length, (self.seed, bucket))
            for number in range(max(first - start, 0), min(end - start, plan.num_blocks)):
                tokens = plan.tokens(number, documents, self.eos_id)
                targets = tokens[1:]
                counts += np.bincount(targets, minlength=len(counts))
                yield self._padded(tokens), len(targets)

    def _padded(self, tokens: np.ndarray) -> np.ndarray:
        block = np.full(
            self.context_length + 1, self.eos_id, dtype=token_dtype(self.vocabulary_size)
        )
        block[: len(tokens)] = tokens
        return block

    def _plans(self) -> Iterator[_Plan]:
        for bucket in range(self.runs.num_buckets):
            sizes = self.runs.sizes(self.rule, self.name, bucket)
            yield _Plan(sizes, self.context_length, (self.seed, bucket))


class _Plan:
    """Which documents of a bucket stand in which block. sizes: with their ends of sequence."""

    def __init__(self, sizes: np.ndarray, context_length: int, place: tuple[int, int]):
        self.context_length = context_length
        self.long = np.flatnonzero(sizes > context_length)
        short = np.flatnonzero(sizes <= context_length)
        self.bins = [short[sorted(members)] for members in best_fit(sizes[short], context_length)]
        self._num_long_tokens = int(sizes[self.long].sum())
        self.num_blocks = len(self.bins) + -(-self._num_long_tokens // context_length)
        seed, bucket = place
        self.order = permutation(self.num_blocks, seed, (0, bucket, 0, 0), key=_KEY)
        self._long_stream: np.ndarray | None = None

    def tokens(self, number: int, documents: list[np.ndarray], eos_id: int) -> np.ndarray:
        """Of a block, in the permuted order, with the one before its first target; unpadded."""
        before = np.array([eos_id])
        place = int(self.order[number])
        if place < len(self.bins):
            return np.concatenate([before, *(documents[i] for i in self.bins[place])])
        if self._long_stream is None:
            self._long_stream = np.concatenate([before, *(documents[i] for i in self.long)])
        first = (place - len(self.bins)) * self.context_length
        return self._long_stream[first : first + self.context_length + 1]


def best_fit(sizes: np.ndarray, room: int) -> list[list[int]]:
    """The numbers of the documents in each block of so much room, by best fit, largest first.

    sizes: int64 (documents,), none above the room.
    """
    bins: list[list[int]] = []
    bins_with: dict[int, list[int]] = {}  # room that is left -> bins
    there_are = 0  # bit r: there are bins with room r
    for number in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[number])
        fitting = there_are >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            chosen = bins_with[left].pop()
            if not bins_with[left]:
                there_are ^= 1 << left
        else:
            chosen, left = len(bins), room
            bins.append([])
        bins[chosen].append(number)
        left -= size
        if left:
            bins_with.setdefault(left, []).append(chosen)
            there_are |= 1 << left
    return bins
