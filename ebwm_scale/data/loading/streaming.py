"""Streaming shards that cannot be read at random: `pipe:` commands, and URLs through fsspec.

A weaker promise than the index gives.

What holds: within a pass over the list every shard is read once, by one rank, in an order permuted
per pass by the seed; damaged samples are never given out by half, and what is lost with a damaged
shard is written to quarantine.jsonl. A resumed run goes on with shards that nobody had begun.
Samples are held against the checksums of the shard's index, where there is one
(data/loading/stream_checks.py). What does not hold: the batches depend on the number of processes;
what was left of the shards in progress at a stop is skipped until the next pass; a damaged sample
has no fixed replacement.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from ebwm_scale.config.permissions import PIPE, refuse_pipes
from ebwm_scale.core.errors import ConfigError, DataError
from ebwm_scale.core.plain_text import shorten
from ebwm_scale.core.redaction import redacted, redacted_error
from ebwm_scale.data.format import tar
from ebwm_scale.data.format.content import Sample, decode_conditions, decode_sample
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.loading.batches import (
    Batch,
    check_context,
    stacked,
    to_tensor,
    to_tensors,
)
from ebwm_scale.data.loading.quarantine import BadSample
from ebwm_scale.data.loading.shard_cache import ShardCache
from ebwm_scale.data.loading.stream_checks import Checksums, StreamIndexes, no_report
from ebwm_scale.data.order import permutation

_KEY = 0x6562776D5F737472
_SHUFFLE = 1
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Closing a pipe before its end gives SIGPIPE: the archive's end mark had been read.
_FINE_CODES = (0, -13, 141)
MAX_EMPTY_SHARDS = 100  # shards in a row without a whole sample before giving up


class StreamLoader:
    """An endless iterator over this rank's micro batches, with BatchLoader's interface.

    shards: URLs, paths, and `pipe:COMMAND`, which a shell runs and which only allow_pipe lets
    through; {000..127} stands for a range.  manifest: what the samples are.  buffer: samples
    shuffled together. first_shard: where in the order of shards to start.  report: is told, once,
    of shards without checksums. cache_folder: where shards behind addresses are kept, up to
    cache_bytes (data/loading/shard_cache.py). Raises ConfigError for fewer shards than ranks and
    for commands without allow_pipe, DataError from next() when shard after shard is unreadable.
    """

    def __init__(
        self,
        shards: Sequence[str],
        manifest: Manifest,
        *,
        context_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        buffer: int,
        first_step: int = 0,
        first_shard: int = 0,
        report: Callable[[str], None] = no_report,
        allow_pipe: bool = False,
        cache_folder: str | None = None,
        cache_bytes: int = 0,
    ):
        self.shards = check_stream(shards, world_size)
        refuse_pipes(self.shards, allow_pipe=allow_pipe)
        check_context(manifest, context_length)
        self._indexes = StreamIndexes(self.shards, manifest, report)
        self._cache = None
        if cache_folder is not None:
            self._cache = ShardCache(cache_folder, cache_bytes, open_shard, report)
        self.manifest = manifest
        self.context_length = context_length
        self.buffer = buffer
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.first_shard = first_shard
        self.micro_batch_size = micro_batch_size
        self.micro_batches_per_step = global_batch_size // world_size // micro_batch_size
        self.global_batch_size = global_batch_size
        self.step = first_step
        self.micro = 0
        # no rank has begun this one, nor any after it, as far as this rank knows
        self.next_shard = first_shard
        self.found: list[BadSample] = []
        self._last_reason = "it holds none"
        self._samples = self._shuffled()

    def __iter__(self) -> StreamLoader:
        return self

    def __next__(self) -> Batch:
        taken = [next(self._samples) for _ in range(self.micro_batch_size)]
        first = (
            self.step * self.global_batch_size
            + self.rank * (self.global_batch_size // self.world_size)
            + self.micro * self.micro_batch_size
        )
        self.micro += 1
        if self.micro == self.micro_batches_per_step:
            self.step, self.micro = self.step + 1, 0
        sequences, conditions = stacked([sample for _, sample in taken])
        return Batch(
            sequences=to_tensor(sequences),
            sample_ids=torch.tensor([sample_id for sample_id, _ in taken]),
            positions=torch.arange(first, first + self.micro_batch_size),
            conditions=to_tensors(conditions),
        )

    def close(self) -> None:
        self._samples.close()

    def _shuffled(self) -> Generator[tuple[int, Sample], None, None]:
        """A buffer from which a random sample leaves when one enters; what leaves is decided by a
        counter, not by a generator's history.
        """
        buffer: list[tuple[int, Sample]] = []
        generator = np.random.Generator(
            np.random.Philox(
                key=np.array([self.seed, _KEY], dtype=np.uint64),
                counter=np.array([0, self.first_shard, self.rank, _SHUFFLE], dtype=np.uint64),
            )
        )
        for item in self._in_order():
            if len(buffer) < self.buffer:
                buffer.append(item)
                continue
            place = int(generator.integers(len(buffer)))
            buffer[place], leaving = item, buffer[place]
            yield leaving

    def _in_order(self) -> Iterator[tuple[int, Sample]]:
        position, empty = self.first_shard + self.rank, 0
        while True:
            self.next_shard = position - self.rank + self.world_size
            epoch, inside = divmod(position, len(self.shards))
            number = int(
                permutation(len(self.shards), self.seed, (0, 0, epoch, 0), key=_KEY)[inside]
            )
            count = 0
            for item in self._of_shard(number):
                count += 1
                yield item
            empty = 0 if count else empty + 1
            if empty == MAX_EMPTY_SHARDS:
                raise DataError(
                    f"{redacted(self.shards[number])}: the {empty}th shard in a row without a "
                    f"whole sample ({self._last_reason}); check the network and the shards"
                )
            position += self.world_size

    def _of_shard(self, number: int) -> Iterator[tuple[int, Sample]]:
        """(sample id, sample) of each whole sample; what is damaged goes on the list."""
        url = self.shards[number]
        row = 0
        content = self.manifest.content
        names = set(content.fields(self.manifest.block_length))
        length = self.context_length + content.group_size
        try:
            checksums = self._indexes.of(url)
            with self._opened(url) as stream:
                for key, fields in tar.samples(stream, redacted(url)):
                    sample_id = (number << 32) + row
                    row += 1
                    try:
                        sample = self._checked(key, fields, names, checksums)
                    except ValueError as error:
                        offset = min(member.offset for member in fields.values())
                        self._bad(url, sample_id, key, offset, str(error))
                        continue
                    yield sample_id, content.first(sample, length)
        except ImportError as error:  # the same for every shard
            raise DataError(f"{redacted(url)}: {_line(error, url)}; install it with pip") from None
        except Exception as error:  # noqa: BLE001 (a file system of fsspec raises what its client does)
            reason = str(error) if isinstance(error, DataError) else _line(error, url)
            self._bad(url, (number << 32) + row, None, None, reason)

    def _opened(self, url: str) -> contextlib.AbstractContextManager[BinaryIO]:
        if self._cache is None:
            return open_shard(url)
        return self._cache.open(url, self._indexes.named(url))

    def _checked(
        self,
        key: str,
        fields: dict[str, tar.Member],
        names: set[str],
        checksums: Checksums | None,
    ) -> Sample:
        """The sample of these fields; ValueError says what is wrong with it."""
        if missing := names - fields.keys():
            raise ValueError(f"has no {', '.join(sorted(missing))}")
        if checksums is not None:
            checksums.check(key, fields)
        contents = {name: fields[name].content for name in names}
        content = self.manifest.content
        sequence = decode_sample(content, contents, self.manifest.block_length)
        problem = content.problem(sequence)
        if problem is not None:
            raise ValueError(problem)
        conditions = decode_conditions(content, contents, self.manifest.block_length)
        return Sample(sequence, conditions)

    def _bad(
        self, url: str, sample_id: int, key: str | None, offset: int | None, reason: str
    ) -> None:
        self._last_reason = redacted_error(reason, url)
        self.found.append(
            BadSample(
                split="train",
                sample_id=sample_id,
                shard=redacted(url),
                key=key,
                offset=offset,
                reason=self._last_reason,
                replaced_by=-1,
            )
        )


def check_stream(shards: Sequence[str], world_size: int) -> list[str]:
    """All shards that the patterns of data.stream name; ConfigError if they are too few for the
    processes.
    """
    urls = [url for pattern in shards for url in expand(pattern)]
    if len(urls) < world_size:
        raise ConfigError(
            f"data.stream names {len(urls)} shards for {world_size} processes: "
            "each needs one of its own; make more shards, or use fewer processes"
        )
    return urls


def expand(pattern: str) -> list[str]:
    """a-{000..002}.tar -> a-000.tar, a-001.tar, a-002.tar."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    return [
        url
        for i in range(int(first), int(last) + 1)
        for url in expand(f"{pattern[: match.start()]}{i:0{len(first)}d}{pattern[match.end() :]}")
    ]


@contextlib.contextmanager
def open_shard(url: str) -> Iterator[BinaryIO]:
    """The bytes of a shard, to be read once; OSError if it cannot be opened, DataError if its
    command fails.
    """
    if url.startswith(PIPE):  # StreamLoader lets none through that the command line does not allow
        process = subprocess.Popen(url.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE)
        stdout = cast(BinaryIO, process.stdout)  # subprocess.PIPE makes it one
        problem: BaseException | None = None
        try:
            yield stdout
        except DataError as error:
            problem = error
        finally:
            stdout.close()
            try:
                code = process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait() if problem is None else 0
        if code not in _FINE_CODES:
            raise DataError(f"{redacted(url)}: the command ended with exit code {code}")
        if problem is not None:
            raise problem
        return
    import fsspec

    opened: Any = fsspec.open(url, "rb")
    with opened as stream:
        yield stream


def _line(error: Exception, url: str) -> str:
    """What a library says of its failure, on one line."""
    return shorten(f"{type(error).__name__}: {redacted_error(error, url)}")
