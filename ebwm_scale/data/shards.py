"""Reading shards: a split as a list of samples, each read by its place in the file and checked against its checksum.

    split = open_split("data/corpus/manifest.json", "train", verify="hashes")
    split.read(17)          # text: uint16 (block_length,); video: embeddings or frames, see content.py

The index says where a sample lies, so no tar is streamed: reading the tar in order loses samples silently when a shard
is cut or a header is damaged, and can neither be resumed nor re-divided exactly. Every problem is a DataError of one
line with the shard, the sample's key and byte offset, what is wrong and what to do.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from .content import CLIP_FIELD
from .manifest import Manifest, ShardInfo, SplitInfo, file_hashes, load_manifest
from .order import SampleOrder
from .writer import INDEX_VERSION

HASH_LIMIT_BYTES = 4 * 2**30  # above this, verify="hashes" checks sizes only
_OPEN_SHARDS = 64  # file descriptors and indexes kept per process
_REMAKE = "copy the dataset again, or make it again with tools/make_text_shards.py or tools/make_video_shards.py"


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
            f"{path}: sample {key} ({field + ', ' if field else ''}offset {offset}, {size} bytes): {reason}; {_REMAKE}"
        )
        self.path, self.key, self.offset, self.reason, self.sample_id = (
            path,
            key,
            offset,
            reason,
            sample_id,
        )

    def __reduce__(self):
        return SampleError, (self.path, self.key, self.offset, self.reason, self.sample_id)


class ShardError(DataError):
    """A shard none of whose samples can be read."""

    def __init__(self, path: Path, reason: str):
        super().__init__(reason)
        self.path, self.reason = path, reason

    def __reduce__(self):
        return ShardError, (self.path, self.reason)


@dataclass(frozen=True)
class Field:
    """Where one field of every sample of a shard lies: int64 offsets and sizes in bytes, uint32 checksums, each (samples,)."""

    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray


@dataclass(frozen=True)
class ShardIndex:
    """The checked content of an index file."""

    keys: list[str]
    fields: dict[str, Field]
    num_targets: list[int]

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(first byte, end) of each sample: of all its fields together."""
        first = np.min([field.offsets for field in self.fields.values()], axis=0)
        end = np.max([field.offsets + field.sizes for field in self.fields.values()], axis=0)
        return list(zip(first.tolist(), end.tolist()))

    @functools.cached_property
    def places(self) -> list[tuple[tuple[str, int, int, int], ...]]:
        """((field, offset, size, crc32), ...) of each sample, as plain numbers: taking them out of arrays cost more than reading the file."""
        columns = [
            list(
                zip(
                    [name] * len(self.keys),
                    field.offsets.tolist(),
                    field.sizes.tolist(),
                    field.crc32.tolist(),
                )
            )
            for name, field in self.fields.items()
        ]
        return list(zip(*columns))


class ShardedSplit:
    """The samples 0 .. len - 1 of one split, in the manifest's order. Safe to fork and to pickle: files open on first use."""

    def __init__(self, manifest: Manifest, split: str):
        self.manifest, self.split = manifest, split
        self.info: SplitInfo = manifest.splits[split]
        self.samples_per_shard = [shard.num_samples for shard in self.info.shards]
        self._ends: list[int] = np.cumsum(self.samples_per_shard).tolist()
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = (
            OrderedDict()
        )  # the oldest is closed when there are too many

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
        """The sample ids that evaluation takes: the first ones of text, whose documents are shuffled; of clips, evenly spaced ones."""
        count = min(max_samples, len(self))
        return (
            np.arange(count, dtype=np.int64)
            if self.manifest.modality == "text"
            else np.arange(count, dtype=np.int64) * len(self) // count
        )

    def locate(self, sample_id: int) -> tuple[int, int]:
        """(shard number, number inside the shard); IndexError outside 0 .. len - 1."""
        if not 0 <= sample_id < self._ends[-1]:
            raise IndexError(f"sample {sample_id} of a split with {len(self)}")
        shard = bisect.bisect_right(self._ends, sample_id)
        return shard, sample_id - self._ends[shard] + self.samples_per_shard[shard]

    def read(self, sample_id: int) -> np.ndarray:
        """The states of a sample (block_length, ...) as stored; SampleError if it is damaged, ShardError if its whole shard is out of reach."""
        fields = self.read_fields(sample_id)
        try:
            return self.manifest.content.decode(fields, self.manifest.block_length)
        except ValueError as error:
            raise self._error(sample_id, str(error)) from None

    def read_fields(self, sample_id: int) -> dict[str, bytes]:
        """The checked bytes of each field of a sample. Raises like read."""
        number, row = self.locate(sample_id)
        descriptor, index = self._open.get(number) or self._shard(number)
        first, end = index.spans[row]
        try:
            content = os.pread(
                descriptor, end - first, first
            )  # the fields of a sample stand together
        except OSError as error:
            raise self._error(
                sample_id, f"cannot be read: {error.strerror}; check the disk"
            ) from None
        fields = {}
        for name, offset, size, crc32 in index.places[row]:
            part = (
                content if size == end - first else content[offset - first : offset - first + size]
            )
            if zlib.crc32(part) != crc32 or len(part) != size:
                what = (
                    f"the shard ends after {len(part)} of them: truncated"
                    if len(part) != size
                    else f"checksum is {zlib.crc32(part):08x}, the index says {crc32:08x}: damaged"
                )
                raise self._error(sample_id, what, (name, offset, size))
            fields[name] = part
        return fields

    def _error(
        self, sample_id: int, reason: str, place: tuple[str, int, int] | None = None
    ) -> SampleError:
        number, row = self.locate(sample_id)
        index = self._open[number][1]
        name, offset, size = place or (
            "",
            index.spans[row][0],
            index.spans[row][1] - index.spans[row][0],
        )
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

    def order(self, *, seed: int, window_shards: int) -> SampleOrder:
        """The order in which training takes the samples."""
        return SampleOrder(self.samples_per_shard, seed=seed, window_shards=window_shards)

    def after(self, sample_id: int) -> int:
        """The sample after this one, counted around."""
        return (sample_id + 1) % len(self)

    def after_shard_of(self, sample_id: int) -> int:
        """The first sample of the shard after this one's, counted around."""
        return self._ends[self.locate(sample_id)[0]] % len(self)

    def close(self) -> None:
        """Close the files; they open again when needed."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def _shard(self, number: int) -> tuple[int, ShardIndex]:
        shard = self.info.shards[number]
        path = self.manifest.folder / shard.path
        try:
            index = load_index(self.manifest, shard)
            missing = set(self.manifest.content.fields(self.manifest.block_length)) - set(
                index.fields
            )
            if missing:
                raise DataError(
                    f"{path}: its samples have no {', '.join(sorted(missing))}; {_REMAKE}"
                )
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except DataError as error:
            raise ShardError(path, str(error)) from None
        except OSError as error:
            raise ShardError(
                path, f"{path}: cannot open the shard: {error.strerror}; {_REMAKE}"
            ) from None
        self._open[number] = (descriptor, index)
        if len(self._open) > _OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return descriptor, index


def open_split(
    manifest_path: str | Path,
    split: str,
    *,
    verify: Literal["sizes", "hashes"],
    report: Callable[[str], None] = print,
) -> ShardedSplit:
    """Open a split after checking its files: their sizes, or also their hashes (unless above 4 GiB; then says so).

    Raises DataError for a manifest, an index or a shard that is missing, truncated, damaged or does not fit the others.
    """
    manifest = load_manifest(manifest_path)
    if split not in manifest.splits:
        raise DataError(
            f"{manifest.path}: has no split {split!r}; it has {', '.join(sorted(manifest.splits)) or 'none'}"
        )
    shards = manifest.splits[split].shards
    total = sum(shard.size for shard in shards)
    if verify == "hashes" and total > HASH_LIMIT_BYTES:
        report(
            f"{manifest.path}: {split}: {total / 2**30:.1f} GiB is above {HASH_LIMIT_BYTES / 2**30:.0f} GiB: checking sizes only; "
            "tools/verify_shards.py checks everything"
        )
        verify = "sizes"
    problems = split_problems(manifest, split, hashes=verify == "hashes")
    if problems:
        more = f" (and {len(problems) - 1} more files)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    return ShardedSplit(manifest, split)


def split_problems(manifest: Manifest, split: str, *, hashes: bool) -> list[str]:
    """One line for each file of a split that is missing, or has another size or (hashes=True) another hash than the manifest says."""
    problems, sound = [], []
    for shard in manifest.splits[split].shards:
        path = manifest.folder / shard.path
        if not path.is_file():
            problems.append(f"{path}: the shard is missing; {_REMAKE}")
        elif not (manifest.folder / shard.index_path).is_file():
            problems.append(
                f"{manifest.folder / shard.index_path}: the index of shard {shard.path} is missing; {_REMAKE}"
            )
        elif path.stat().st_size != shard.size:
            size = path.stat().st_size
            problems.append(
                f"{path}: the shard has {size} bytes, the manifest says {shard.size}: "
                f"{'truncated' if size < shard.size else 'too long'}{_first_damage(manifest, shard)}; {_REMAKE}"
            )
        else:
            sound.append(shard)
    if hashes:
        for shard, found in zip(
            sound, file_hashes([manifest.folder / shard.path for shard in sound])
        ):
            if found != shard.sha256:
                problems.append(
                    f"{manifest.folder / shard.path}: sha256 of the shard is {found[:12]}..., the manifest says "
                    f"{shard.sha256[:12]}...: damaged{_first_damage(manifest, shard)}; {_REMAKE}"
                )
        for shard in sound:
            try:
                load_index(manifest, shard)
            except DataError as error:
                problems.append(str(error))
    return problems


def sample_problems(manifest: Manifest, shard: ShardInfo) -> list[str]:
    """One line for each sample of a shard that is cut off or has another checksum than its index says; DataError for the index."""
    index, problems = load_index(manifest, shard), []
    with (manifest.folder / shard.path).open("rb") as file:
        for name, field in index.fields.items():
            for row, key in enumerate(index.keys):
                offset, size = int(field.offsets[row]), int(field.sizes[row])
                file.seek(offset)
                content = file.read(size)
                if len(content) != size or zlib.crc32(content) != int(field.crc32[row]):
                    what = "cut off" if len(content) != size else "another checksum"
                    problems.append(
                        f"{manifest.folder / shard.path}: sample {key} ({name}, offset {offset}, {size} bytes): {what}"
                    )
    return problems


def load_index(manifest: Manifest, shard: ShardInfo) -> ShardIndex:
    """Read an index and check it against the manifest; DataError if it is missing, damaged or of another shard."""
    path = manifest.folder / shard.index_path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the index of shard {shard.path}: {error.strerror}; {_REMAKE}"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != shard.index_sha256:
        raise DataError(
            f"{path}: sha256 of the index is {found[:12]}..., the manifest says {shard.index_sha256[:12]}...: damaged or of "
            f"another shard; {_REMAKE}"
        )
    try:
        values = json.loads(content)
        version, name = values["index_version"], values["shard"]
        index = ShardIndex(
            keys=[str(key) for key in values["keys"]],
            num_targets=values["num_targets"],
            fields={
                field: Field(
                    np.array(c["offsets"], dtype=np.int64),
                    np.array(c["sizes"], dtype=np.int64),
                    np.array(c["crc32"], dtype=np.uint32),
                )
                for field, c in values["fields"].items()
            },
        )
        lengths = {
            len(index.num_targets),
            *(
                len(column)
                for f in index.fields.values()
                for column in (f.offsets, f.sizes, f.crc32)
            ),
        }
        inside = all(
            (f.offsets >= 0).all()
            and (f.sizes >= 0).all()
            and (f.offsets + f.sizes <= shard.size).all()
            for f in index.fields.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DataError(
            f"{path}: not an index ({type(error).__name__}: {error}); {_REMAKE}"
        ) from None
    if version != INDEX_VERSION:
        raise DataError(
            f"{path}: index_version is {version!r}: this release reads {INDEX_VERSION}; {_REMAKE}"
        )
    if (
        name != Path(shard.path).name
        or lengths | {len(index.keys)} != {shard.num_samples}
        or not inside
        or not index.fields
    ):
        raise DataError(
            f"{path}: does not fit shard {shard.path}: it describes {name} with {len(index.keys)} samples, the manifest says "
            f"{shard.num_samples} samples in {shard.size} bytes; {_REMAKE}"
        )
    return index


def _first_damage(manifest: Manifest, shard: ShardInfo) -> str:
    """Names the first damaged sample of a shard that is known to be damaged."""
    try:
        problems = sample_problems(manifest, shard)
    except (DataError, OSError) as error:
        return f" (which samples cannot be said: {error})"
    if not problems:
        return ", outside of its samples"
    first = problems[0].split(": ", 1)[1]
    return f", {len(problems)} samples, the first is {first}"
