"""Mixtures: several datasets as one, each with a weight; the order stays a pure function of (seed,
position).

    position          0 ............ 1023 | 1024 .......... 2047 | ...   blocks of MIX_LENGTH
    source            b a a c a a b a ... | a a b a c ...                n_k times source k in each,
                                                                         permuted
    place in source   the j-th k of block i is position i n_k + j of source k's own order

So every source has its exact share of each block, walks through its own epochs (every sample once
in each), and nothing has to be remembered. Sample ids count through the sources. Where sources have
limits (epochs, tokens), shares change as they run out: loading/budgets.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ebwm_scale.core.errors import ConfigError
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.format.content import Sample
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shards import INDEX_BYTES, SampleError, ShardedSplit, Verify, open_split
from ebwm_scale.data.loading.budgets import MIX_LENGTH, Phases, phases_of, shares
from ebwm_scale.data.order import SampleOrder, permutation

_KEY = 0x6562776D5F6D6978


class MixedOrder:
    """orders: one per source, in their sample ids; first_ids: of each source; phases: positions of
    each source in each block.
    """

    def __init__(
        self,
        orders: Sequence[SampleOrder],
        first_ids: Sequence[int],
        phases: Phases,
        *,
        seed: int,
    ):
        self.orders = list(orders)
        self.first_ids = list(first_ids)
        self.phases = phases
        self.seed = seed
        self._block: tuple[int, np.ndarray] | None = None

    def sample(self, position: int) -> int:
        return int(self.samples(position, 1)[0])

    def samples(self, start: int, count: int) -> np.ndarray:
        """The sample ids at positions start .. start + count - 1, int64 (count,)."""
        if start < 0 or count < 0:
            raise ValueError(f"start is {start}, count is {count}: both must be 0 or more")
        result, position = np.empty(count, dtype=np.int64), start
        while position < start + count:
            block, inside = divmod(position, MIX_LENGTH)
            sources = self.sources(block)
            taken = min(MIX_LENGTH - inside, start + count - position)
            phase = self.phases.at(block)
            part = result[position - start : position - start + taken]
            for source, (order, first_id, share, base) in enumerate(
                zip(self.orders, self.first_ids, phase.counts, phase.starts)
            ):
                here = sources[inside : inside + taken] == source
                before = int((sources[:inside] == source).sum())
                first = base + (block - phase.first) * share + before
                part[here] = first_id + order.samples(first, int(here.sum()))
            position += taken
        return result

    def sources(self, block: int) -> np.ndarray:
        """Which source each position of a block takes, (MIX_LENGTH,)."""
        if self._block is None or self._block[0] != block:
            counts = self.phases.at(block).counts
            labels = np.repeat(np.arange(len(counts)), counts)
            self._block = (
                block,
                labels[permutation(MIX_LENGTH, self.seed, (0, block, 0, 0), key=_KEY)],
            )
        return self._block[1]


class MixedSplit:
    """The samples of several splits, one after the other; the same interface as ShardedSplit.

    Raises ConfigError if they do not fit.
    """

    def __init__(self, parts: Sequence[ShardedSplit], weights: Sequence[float]):
        self.parts, self.weights = list(parts), list(weights)
        first = parts[0].manifest
        for part in parts[1:]:
            other = part.manifest
            different = [
                key
                for key, value in first.content.identity.items()
                if other.content.identity.get(key) != value
            ]
            if other.block_length != first.block_length:
                different.append("block_length")
            if different:
                raise ConfigError(
                    f"data.sources: {other.path} and {first.path} differ in "
                    f"{', '.join(different)}: sources of a mixture need the same tokenizer or "
                    "encoder and the same block length; make them with the same settings"
                )
        self.counts = shares(weights)
        self.limits: list[int | None] = [None] * len(parts)
        self.manifest, self.split = first, parts[0].split
        self._ends = np.cumsum([len(part) for part in parts])
        self.keep(window_shards=1)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def fingerprint(self) -> str:
        sources: list[list] = [
            [part.fingerprint, count] for part, count in zip(self.parts, self.counts)
        ]
        for source, limit in zip(sources, self.limits):
            if limit is not None:
                source.append(limit)
        return hashlib.sha256(canonical_json(sources)).hexdigest()

    def limit(self, limits: Sequence[int | None]) -> int | None:
        """Let each source give so many samples in all, None: as many as are wanted; returns how
        many the mixture has then, None without end.
        """
        self.limits = list(limits)
        return self._phases().num_positions

    def _phases(self) -> Phases:
        return phases_of(self.weights, self.limits)

    @property
    def num_targets(self) -> int:
        return sum(part.num_targets for part in self.parts)

    def describe(self) -> str:
        return "; ".join(part.describe() for part in self.parts)

    def read(self, sample_id: int) -> np.ndarray:
        """As ShardedSplit.read."""
        return self.read_sample(sample_id).states

    def read_sample(self, sample_id: int) -> Sample:
        """As ShardedSplit.read_sample."""
        part, inside = self._inside(sample_id)
        try:
            return self.parts[part].read_sample(inside)
        except SampleError as error:
            error.sample_id = sample_id
            raise

    def read_fields(self, sample_id: int) -> dict[str, bytes]:
        """As ShardedSplit.read_fields."""
        part, inside = self._inside(sample_id)
        return self.parts[part].read_fields(inside)

    def keep(self, *, window_shards: int) -> None:
        """As ShardedSplit.keep; the parts share one budget."""
        for part in self.parts:
            part.keep(window_shards=window_shards, index_budget=INDEX_BYTES // len(self.parts))

    def order(self, *, seed: int, window_shards: int) -> MixedOrder:
        orders = [
            SampleOrder(part.samples_per_shard, seed=seed, window_shards=window_shards, source=i)
            for i, part in enumerate(self.parts)
        ]
        return MixedOrder(orders, [0, *self._ends[:-1].tolist()], self._phases(), seed=seed)

    def after(self, sample_id: int) -> int:
        part, inside = self._inside(sample_id)
        return self._first(part) + self.parts[part].after(inside)

    def after_shard_of(self, sample_id: int) -> int:
        """The first sample of the next shard of the same source, counted around."""
        part, inside = self._inside(sample_id)
        return self._first(part) + self.parts[part].after_shard_of(inside)

    def evaluated(self, max_samples: int) -> np.ndarray:
        """The sample ids that evaluation takes: of each source its share of max_samples."""
        numbers = [
            min(len(part), max(1, round(max_samples * count / MIX_LENGTH)))
            for part, count in zip(self.parts, self.counts)
        ]
        return np.concatenate(
            [
                self._first(i) + part.evaluated(number)
                for i, (part, number) in enumerate(zip(self.parts, numbers))
            ]
        )

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _first(self, part: int) -> int:
        return int(self._ends[part]) - len(self.parts[part])

    def _inside(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < len(self):
            raise IndexError(f"sample {sample_id} of a mixture with {len(self)}")
        part = int(np.searchsorted(self._ends, sample_id, side="right"))
        return part, int(sample_id) - self._first(part)


def open_sources(
    sources: Sequence[tuple[str | Path | Manifest, float]],
    split: str,
    *,
    verify: Verify,
    report: Callable[[str], None] = print,
) -> ShardedSplit | MixedSplit:
    """One split of one dataset, or of a mixture of (manifest, weight)."""
    parts = [open_split(manifest, split, verify=verify, report=report) for manifest, _ in sources]
    return parts[0] if len(parts) == 1 else MixedSplit(parts, [weight for _, weight in sources])
