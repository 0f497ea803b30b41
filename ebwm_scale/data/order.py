"""The order of the samples: a pure function (seed, epoch, position) -> sample id.

    stream position   0 ........................ n-1 | n ....................... 2n-1 | 2n ...
                      epoch 0                        | epoch 1                        | ...
    inside an epoch   [ window 0 ][ window 1 ] ...     the shards, permuted, in windows of K;
                                                       each window's samples permuted

Nothing is drawn from a generator that has a history: each permutation comes from a Philox stream
whose key and counter are made of (seed, epoch, window). So position 10^9 costs as much as position
0, and rank, world size, accumulation and worker count can only cut the order, never change it. The
permutation sorts raw 64-bit Philox output, which is fixed by the algorithm; numpy may change what
Generator.permutation returns between releases.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_KEY = 0x6562776D5F6F7264  # sets this use of Philox apart from any other with the same seed
# What a stream permutes: the last word of the counter, plus _KINDS for each source before this one.
_SHARDS = 0
_SAMPLES = 1
_KINDS = 2


class SampleOrder:
    """Every sample exactly once per epoch, in an order that depends on nothing but the arguments.

    samples_per_shard: number of samples of each shard, in the manifest's order; sample ids count
    through the shards. seed: 0 or more, below 2^64.  window_shards: samples are permuted inside
    windows of this many shards; memory is proportional to one window.  source: sources of a mixture
    are permuted independently (data/loading/mixture.py). Raises ValueError for arguments outside
    these bounds or without any sample.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int] | np.ndarray,
        *,
        seed: int,
        window_shards: int,
        source: int = 0,
    ):
        sizes = np.asarray(samples_per_shard, dtype=np.int64)
        if sizes.ndim != 1 or sizes.sum() <= 0 or (sizes < 0).any():
            raise ValueError(
                f"samples_per_shard is {samples_per_shard!r}: at least one shard must have "
                "samples, and none fewer than 0"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: must be in [0, 2^64)")
        if window_shards < 1:
            raise ValueError(f"window_shards is {window_shards}: must be at least 1")
        self.seed = seed
        self.window_shards = window_shards
        self.source = source
        self.num_samples = int(sizes.sum())
        self._sizes = sizes
        self._first_ids = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._epoch: int | None = None
        self._window: tuple[int, int] | None = None  # (epoch, window) of the cached permutation

    def sample(self, position: int) -> int:
        """The sample id at a global stream position >= 0; its epoch is position // num_samples."""
        return int(self.samples(position, 1)[0])

    def samples(self, start: int, count: int) -> np.ndarray:
        """The sample ids at positions start .. start + count - 1, int64 (count,)."""
        if start < 0 or count < 0:
            raise ValueError(f"start is {start}, count is {count}: both must be 0 or more")
        pieces = []
        position = start
        end = start + count
        while position < end:
            epoch, inside = divmod(position, self.num_samples)
            self._load_epoch(epoch)
            window = int(np.searchsorted(self._window_starts, inside, side="right")) - 1
            ids = self._window_ids(epoch, window)
            first = inside - int(self._window_starts[window])
            piece = ids[first : first + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def _load_epoch(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        self._shards = self._permutation(len(self._sizes), (0, 0, epoch, _SHARDS))
        ends = np.cumsum(self._sizes[self._shards])
        last_of_window = (
            np.minimum(
                np.arange(self.window_shards, len(ends) + self.window_shards, self.window_shards),
                len(ends),
            )
            - 1
        )
        self._window_starts = np.concatenate([[0], ends[last_of_window][:-1]])
        self._epoch = epoch

    def _window_ids(self, epoch: int, window: int) -> np.ndarray:
        if self._window != (epoch, window):
            shards = self._shards[window * self.window_shards : (window + 1) * self.window_shards]
            ids = np.concatenate(
                [
                    np.arange(
                        self._first_ids[s], self._first_ids[s] + self._sizes[s], dtype=np.int64
                    )
                    for s in shards
                ]
            )
            self._ids = ids[self._permutation(len(ids), (0, window, epoch, _SAMPLES))]
            self._window = (epoch, window)
        return self._ids

    def _permutation(self, count: int, counter: tuple[int, int, int, int]) -> np.ndarray:
        zero, window, epoch, kind = counter
        own = (zero, window, epoch, kind + _KINDS * self.source)
        return permutation(count, self.seed, own, key=_KEY)


def permutation(
    count: int, seed: int, counter: tuple[int, int, int, int], *, key: int
) -> np.ndarray:
    """A permutation of range(count).

    The first word of the counter runs while numbers are drawn, so it starts at 0.
    """
    generator = np.random.Philox(
        key=np.array([seed, key], dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
    )
    return np.argsort(generator.random_raw(count), kind="stable")
