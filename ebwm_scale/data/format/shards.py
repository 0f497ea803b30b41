"""Reading shards: a split as a list of samples, each read by its place in the file and checked
against its checksum.

    split = open_split("data/corpus/manifest.json", "train", verify="hashes")
    split.read(17)  # text: uint16 (block_length,); video: embeddings or frames, see content.py

The index says where a sample lies, so no tar is streamed: reading the tar in order loses samples
silently when a shard is cut or a header is damaged, and can neither be resumed nor re-divided
exactly. Every problem is a DataError of one line with the shard, the sample's key and byte offset,
what is wrong and what to do.
"""

from __future__ import annotations

import array
import bisect
import functools
import json
import os
import resource
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.content import (
    CLIP_FIELD,
    Sample,
    decode_conditions,
    decode_outcomes,
    decode_sample,
)
from ebwm_scale.data.format.index import REMAKE, ShardIndex, load_index
from ebwm_scale.data.format.manifest import Manifest, SplitInfo
from ebwm_scale.data.format.shard_checks import split_problems
from ebwm_scale.data.format.shard_table import ShardInfo
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.order import SampleOrder

Verify = Literal["sizes", "hashes"]
HASH_LIMIT_BYTES = 4 * 2**30  # above this, verify="hashes" checks sizes only
# of indexes kept by each process, for a dataset or a mixture; at least a window's
INDEX_BYTES = 64 * 2**20
# kept by each process; for a window of more shards as many, up to a quarter of the system's limit
OPEN_FILES = 64


class SampleError(DataError):
    """A sample that cannot be used, and where it lies."""

    def __init__(
        self,
        path: Path,
        key: str,
        offset: int,
        reason: str,
        sample_id: int,
        field: str = "",
        size: int = 0,
    ):
        super().__init__(
            f"{path}: sample {key} ({field + ', ' if field else ''}offset {offset}, {size} "
            f"bytes): {reason}; {REMAKE}"
        )
        self.path = path
        self.key = key
        self.offset = offset
        self.reason = reason
        self.sample_id = sample_id

    def __reduce__(self):
        return SampleError, (self.path, self.key, self.offset, self.reason, self.sample_id)


class ShardError(DataError):
    """A shard none of whose samples can be read."""

    def __init__(self, path: Path, reason: str):
        super().__init__(reason)
        self.path, self.reason = path, reason

    def __reduce__(self):
        return ShardError, (self.path, self.reason)


class ShardedSplit:
    """The samples 0 ..

    len - 1 of one split, in the manifest's order. Safe to fork and to pickle: files open on first
    use.
    """

    def __init__(self, manifest: Manifest, split: str):
        self.manifest, self.split = manifest, split
        self.info: SplitInfo = manifest.splits[split]
        self.index_budget, self.window_shards = INDEX_BYTES, 1
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()  # least recently used first
        self._files: OrderedDict[int, int] = OrderedDict()  # descriptors, in the same way
        self._index_bytes = 0
        self._ends = _cumulative(self.samples_per_shard)

    @property
    def samples_per_shard(self) -> np.ndarray:
        """int64 (shards,), in the manifest's order."""
        return self.info.shards.num_samples

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def fingerprint(self) -> str:
        """sha256 of the manifest: two datasets with the same one hold the same bytes."""
        return self.manifest.fingerprint

    @property
    def num_targets(self) -> int:
        return self.info.num_targets

    def describe(self) -> str:
        return f"{len(self)} samples in {len(self.info.shards)} shards"

    def evaluated(self, max_samples: int) -> np.ndarray:
        """The sample ids that evaluation takes: the first ones of text, whose documents are
        shuffled; of clips, evenly spaced ones.
        """
        count = min(max_samples, len(self))
        ids = np.arange(count, dtype=np.int64)
        return ids if self.manifest.modality == "text" else ids * len(self) // count

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, number inside the shard); IndexError outside 0 .. len - 1."""
        if not 0 <= sample_id < self._ends[-1]:
            raise IndexError(f"sample {sample_id} of a split with {len(self)}")
        shard = bisect.bisect_right(self._ends, sample_id)
        return shard, sample_id - (self._ends[shard - 1] if shard else 0)

    def read(self, sample_id: int) -> np.ndarray:
        """The states of a sample (block_length, ...) as stored; SampleError if it is damaged,
        ShardError if its whole shard is out of reach.
        """
        return self.read_sample(sample_id).states

    def read_sample(self, sample_id: int) -> Sample:
        """A sample's states with its conditions, all checked. Raises like read."""
        fields = self.read_fields(sample_id)
        content, length = self.manifest.content, self.manifest.block_length
        try:
            return Sample(
                decode_sample(content, fields, length), decode_conditions(content, fields, length)
            )
        except ValueError as error:
            raise self._error(sample_id, str(error)) from None

    def outcomes(self, sample_id: int) -> dict[str, np.ndarray]:
        """What came of a clip's steps, by name (frames - 1,); none of text. Raises like read."""
        fields = self.read_fields(sample_id)
        try:
            return decode_outcomes(self.manifest.content, fields, self.manifest.block_length)
        except ValueError as error:
            raise self._error(sample_id, str(error)) from None

    def read_fields(self, sample_id: int) -> dict[str, bytes]:
        """The checked bytes of each field of a sample. Raises like read."""
        number, row = self.locate(sample_id)
        index, descriptor = self._index(number), self._file(number)
        places = index.places[row].tolist()
        first, end = _span(places)
        try:
            # the fields of a sample stand together
            content = os.pread(descriptor, end - first, first)
        except OSError as error:
            raise self._error(
                sample_id, f"cannot be read: {error.strerror}; check the disk"
            ) from None
        fields = {}
        for name, (offset, size, crc32) in zip(index.names, places):
            part = content
            if size != end - first:
                part = content[offset - first : offset - first + size]
            if len(part) != size:
                what = f"the shard ends after {len(part)} of them: truncated"
                raise self._error(sample_id, what, (name, offset, size))
            found = zlib.crc32(part)
            if found != crc32:
                what = f"checksum is {found:08x}, the index says {crc32:08x}: damaged"
                raise self._error(sample_id, what, (name, offset, size))
            fields[name] = part
        return fields

    def _error(
        self, sample_id: int, reason: str, place: tuple[str, int, int] | None = None
    ) -> SampleError:
        number, row = self.locate(sample_id)
        index = self._index(number)
        first, end = index.spans[row].tolist()
        name, offset, size = place or ("", first, end - first)
        return SampleError(
            self.manifest.folder / self.info.shards[number].path,
            index.keys[row],
            offset,
            reason,
            sample_id,
            name,
            size,
        )

    def about(self, sample_id: int) -> dict[str, Any]:
        """What a video sample says of itself: video, start_s, crop."""
        try:
            return json.loads(self.read_fields(sample_id)[CLIP_FIELD])
        except (KeyError, ValueError) as error:
            raise self._error(sample_id, f"no readable {CLIP_FIELD} ({error})") from None

    def keep(self, *, window_shards: int, index_budget: int | None = None) -> None:
        """How much stays open: the indexes of at least so many shards, and as many more as the
        budget in bytes holds.
        """
        self.window_shards = window_shards
        if index_budget is not None:
            self.index_budget = index_budget

    def order(self, *, seed: int, window_shards: int) -> SampleOrder:
        """The order in which training takes the samples."""
        return SampleOrder(self.samples_per_shard, seed=seed, window_shards=window_shards)

    def after(self, sample_id: int) -> int:
        """The sample after this one, counted around."""
        return (sample_id + 1) % len(self)

    def after_shard_of(self, sample_id: int) -> int:
        """The first sample of the shard after this one's, counted around."""
        return self._ends[self.locate(sample_id)[0]] % len(self)

    def close(self, *, close_file: Callable[[int], None] = os.close) -> None:
        """Close the files; they open again when needed.

        close_file is bound here because modules are empty when a split ends with the interpreter.
        """
        while self._files:
            close_file(self._files.popitem()[1])
        self._indexes.clear()
        self._index_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        nothing = {"_files": OrderedDict(), "_indexes": OrderedDict(), "_index_bytes": 0}
        return {**self.__dict__, **nothing, "_ends": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ends = _cumulative(self.samples_per_shard)

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _index(self, number: int) -> ShardIndex:
        """The index of a shard, read if it is not kept."""
        index = self._indexes.get(number)
        if index is not None:
            self._indexes.move_to_end(number)
            return index
        shard = self._shard(number)
        path = self.manifest.folder / shard.path
        try:
            index = load_index(self.manifest, shard)
        except DataError as error:
            raise ShardError(path, str(error)) from None
        expected = self.manifest.content.fields(self.manifest.block_length)
        missing = sorted(set(expected) - set(index.names))
        if missing:
            raise ShardError(path, f"{path}: its samples have no {', '.join(missing)}; {REMAKE}")
        self._indexes[number] = index
        self._index_bytes += index.num_bytes
        while self._index_bytes > self.index_budget and len(self._indexes) > self.window_shards:
            self._index_bytes -= self._indexes.popitem(last=False)[1].num_bytes
        return index

    def _file(self, number: int) -> int:
        """A descriptor of a shard, opened if it is not kept."""
        descriptor = self._files.get(number)
        if descriptor is not None:
            self._files.move_to_end(number)
            return descriptor
        path = self.manifest.folder / self._shard(number).path
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(
                path, f"{path}: cannot open the shard: {error.strerror}; {REMAKE}"
            ) from None
        self._files[number] = descriptor
        if len(self._files) > max(OPEN_FILES, min(self.window_shards, _file_limit() // 4)):
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _shard(self, number: int) -> ShardInfo:
        try:
            return self.info.shards[number]
        except DataError as error:  # a part of the manifest is gone
            raise ShardError(self.manifest.path, str(error)) from None


def _span(places: list[tuple[int, int, int]]) -> tuple[int, int]:
    """(first byte, end) of all fields of a sample; text has one."""
    if len(places) == 1:
        ((first, size, _),) = places
        return first, first + size
    ends = [offset + size for offset, size, _ in places]
    return min(places)[0], max(ends)


def _cumulative(counts: np.ndarray) -> array.array:
    """Sums of the counts so far, as 8 bytes each; bisect is twice as fast on this as numpy is on
    its own arrays.
    """
    return array.array("q", np.cumsum(counts, dtype=np.int64).tobytes())


@functools.cache
def _file_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def open_split(
    manifest: str | Path | Manifest,
    split: str,
    *,
    verify: Verify,
    report: Callable[[str], None] = print,
) -> ShardedSplit:
    """Open a split after checking its files: their sizes, or also their hashes (unless above 4 GiB;
    then says so).

    manifest: its path, or what load_manifest gave for it. Raises DataError for a manifest, an index
    or a shard that is missing, truncated, damaged or does not fit the others.
    """
    if not isinstance(manifest, Manifest):
        manifest = open_manifest(manifest)
    if split not in manifest.splits:
        raise DataError(
            f"{manifest.path}: has no split {split!r}; it has "
            f"{', '.join(sorted(manifest.splits)) or 'none'}"
        )
    total = manifest.splits[split].shards.size
    if verify == "hashes" and total > HASH_LIMIT_BYTES:
        report(
            f"{manifest.path}: {split}: {total / 2**30:.1f} GiB is above "
            f"{HASH_LIMIT_BYTES / 2**30:.0f} GiB: checking sizes only; "
            "tools/verify_shards.py checks everything"
        )
        verify = "sizes"
    problems = split_problems(manifest, split, hashes=verify == "hashes")
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    return ShardedSplit(manifest, split)
