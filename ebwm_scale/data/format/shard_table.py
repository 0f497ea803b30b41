"""The shards of a split: what the manifest says of each, as columns, a million of them in tens of
megabytes.

    manifest.json                   up to MAX_INLINE shards stand in the manifest itself ("shards")
    train-000000.shards.json, ...   above that, SHARDS_PER_PART of them in each of these files
                                    ("parts"), with its sha256

A table keeps the number of samples of every shard. The rest of what is said of a shard is kept by
parts: those that stand in the manifest for good, those of files as long as they are in use, since
they can be read again.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import read_small
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.strict_json import canonical_json, is_whole, parse

MAX_INLINE = 10_000
SHARDS_PER_PART = 1000
MAX_PART_BYTES = 64 * 2**20
PARTS_KEPT = 8
_PATHS = ("path", "index_path")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # a file name that needs no further look
_NUMBERS = ("num_samples", "num_targets", "size")
_REFUSED = "refused, a path must be relative and stay inside the dataset folder"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class ShardInfo:
    """One shard file and its index; paths are relative to the dataset folder, size in bytes, hashes
    sha256 in hex.
    """

    path: str
    num_samples: int
    num_targets: int  # tokens or frames to be predicted: block_length - 1 per sample
    size: int
    sha256: str
    index_path: str
    index_sha256: str


@dataclass(frozen=True)
class PartInfo:
    """A file with the entries of `num_shards` shards; the numbers are sums over them."""

    path: str
    sha256: str
    num_shards: int
    num_samples: int
    num_targets: int
    size: int


class Part:
    """The checked entries of some shards, as columns: about 120 bytes a shard."""

    def __init__(self, entries: Sequence[dict], first: int, where: str):
        """first: number of the first of them in its split. where: of the list, for messages.

        Raises ValueError for a wrong entry.
        """
        problem = _problem(entries)
        if problem is not None:
            row, key, expected = problem
            value = entries[row].get(key) if isinstance(entries[row], dict) else entries[row]
            raise ValueError(
                f"{where}[{first + row}]{key and '.' + key} is {shown(value)}: {expected}"
            )
        self.numbers = np.array([[e[key] for key in _NUMBERS] for e in entries], dtype=np.int64)
        hashes = "".join(e["sha256"] + e["index_sha256"] for e in entries)
        self.hashes = np.frombuffer(bytes.fromhex(hashes), np.uint8).reshape(-1, 2, 32)
        names = [name.encode() for e in entries for name in (e["path"], e["index_path"])]
        self.names, self.name_ends = b"".join(names), np.cumsum([len(name) for name in names])

    @property
    def num_samples(self) -> np.ndarray:
        return self.numbers[:, 0]

    def paths(self) -> list[str]:
        """Of the shards and their indexes, in turns."""
        ends = [0, *self.name_ends.tolist()]
        return [self.names[start:end].decode() for start, end in itertools.pairwise(ends)]

    def sums(self) -> list[int]:
        """Of samples, targets and bytes; in Python, whose numbers do not overflow."""
        return [sum(column) for column in self.numbers.T.tolist()]

    def __getitem__(self, row: int) -> ShardInfo:
        num_samples, num_targets, size = self.numbers[row].tolist()
        start = int(self.name_ends[2 * row - 1]) if row else 0
        middle, end = self.name_ends[2 * row : 2 * row + 2].tolist()
        sha256, index_sha256 = (value.tobytes().hex() for value in self.hashes[row])
        return ShardInfo(
            path=self.names[start:middle].decode(),
            num_samples=num_samples,
            num_targets=num_targets,
            size=size,
            sha256=sha256,
            index_path=self.names[middle:end].decode(),
            index_sha256=index_sha256,
        )


class ShardTable(Sequence[ShardInfo]):
    """The shards of a split in the manifest's order.

    Reading one can raise DataError: its part may be gone by then.

    num_samples: of each shard, int64 (shards,).  held: the parts that stand in the manifest.
    files: the parts that do not.
    """

    def __init__(
        self,
        manifest: Path,
        num_samples: Sequence[np.ndarray],
        *,
        held: Sequence[Part] = (),
        files: Sequence[PartInfo] = (),
    ):
        """num_samples: of the shards of each part, in their order."""
        self.manifest = manifest
        self.files = tuple(files)
        self._held = list(held)
        self._cached: OrderedDict[int, Part] = OrderedDict()
        self.num_samples = np.concatenate([np.empty(0, np.int64), *num_samples])
        self._starts = np.cumsum([0, *map(len, num_samples)], dtype=np.int64)

    @classmethod
    def of_manifest(
        cls, manifest: Path, entries: list, *, where: str, feed: Callable[[bytes], None]
    ) -> ShardTable:
        """Of entries that stand in the manifest.

        feed: is given their canonical JSON. ValueError for a wrong one.
        """
        held = []
        feed(b"[")
        for first in range(0, len(entries), SHARDS_PER_PART):
            piece = entries[first : first + SHARDS_PER_PART]
            held.append(Part(piece, first, where))
            feed(b"," * (first > 0) + canonical_json(piece)[1:-1])
        feed(b"]")
        return cls(manifest, [part.num_samples for part in held], held=held)

    @classmethod
    def of_files(
        cls, manifest: Path, files: Sequence[PartInfo], *, feed: Callable[[bytes], None]
    ) -> ShardTable:
        """Of entries in files beside the manifest, each of which is read and checked here.

        Raises DataError.
        """
        counts, first = [], 0
        feed(b"[")
        for info in files:
            part, content = read_part(manifest, info, first)
            feed(b"," * (first > 0) + content[1:-1])
            counts.append(part.num_samples)
            first += info.num_shards
        feed(b"]")
        return cls(manifest, counts, files=files)

    def __len__(self) -> int:
        return len(self.num_samples)

    def __getitem__(self, number: int) -> ShardInfo:
        if not -len(self) <= number < len(self):
            raise IndexError(f"shard {number} of {len(self)}")
        number %= len(self)
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._part(part)[number - int(self._starts[part])]

    def __iter__(self) -> Iterator[ShardInfo]:
        for number in range(len(self._starts) - 1):
            part = self._part(number)
            for row in range(len(part.numbers)):
                yield part[row]

    def listing(self) -> Iterator[tuple[int, list[str], list[int]]]:
        """(number of the first shard, paths of shards and indexes in turns, sizes of shards in
        bytes) of each part.
        """
        for number in range(len(self._starts) - 1):
            part = self._part(number)
            yield int(self._starts[number]), part.paths(), part.numbers[:, 2].tolist()

    @property
    def size(self) -> int:
        """Bytes of all shards together."""
        if self.files:
            return sum(info.size for info in self.files)
        return sum(part.sums()[2] for part in self._held)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": OrderedDict()}

    def _part(self, number: int) -> Part:
        if not self.files:
            return self._held[number]
        part = self._cached.get(number)
        if part is None:
            part, _ = read_part(self.manifest, self.files[number], int(self._starts[number]))
            self._cached[number] = part
            if len(self._cached) > PARTS_KEPT:
                self._cached.popitem(last=False)
        self._cached.move_to_end(number)
        return part


def read_part(manifest: Path, info: PartInfo, first: int) -> tuple[Part, bytes]:
    """(the checked entries, the file's bytes) of a part; DataError if it is not what the manifest
    says.
    """
    path = manifest.parent / info.path
    try:
        content = read_small(path, MAX_PART_BYTES)
        found = hashlib.sha256(content).hexdigest()
        if found != info.sha256:
            raise ValueError(f"its sha256 is {found[:12]}..., not {info.sha256[:12]}...: damaged")
        entries = parse(content)
        if not isinstance(entries, list) or len(entries) != info.num_shards or not entries:
            raise ValueError(f"it does not hold {info.num_shards} shards")
        if canonical_json(entries) != content:  # so that the fingerprint has one spelling
            raise ValueError("it is not in canonical JSON")
        part = Part(entries, first, "shards")
        sums = [info.num_samples, info.num_targets, info.size]
        if part.sums() != sums:
            raise ValueError(f"its shards do not add up to {sums} samples, targets and bytes")
    except OSError as error:
        raise DataError(
            f"{path}: cannot read this part of {manifest.name}: {error.strerror or error}; copy "
            "the dataset again"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{path}: not the part of {manifest.name} that it was: {error}; copy the dataset again"
        ) from None
    return part, content


def inside_folder(text: Any) -> bool:
    """Whether a value is a relative path of printable characters that stays inside its folder."""
    if not isinstance(text, str) or not text.isprintable() or "\\" in text:
        return False
    path = PurePosixPath(text)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _is_sound(entries: Sequence[dict]) -> bool:
    """Whether all entries are plainly as our writers make them; column by column, which is ten
    times faster than one by one.
    """
    try:
        for key in _NUMBERS:
            column = [entry[key] for entry in entries]
            if set(map(type, column)) != {int} or min(column) < 0 or max(column) >= 2**63:
                return False
        for pattern, keys in ((_SHA256, ("sha256", "index_sha256")), (_PLAIN, _PATHS)):
            for key in keys:
                if not all(map(pattern.fullmatch, [entry[key] for entry in entries])):
                    return False
    except (KeyError, TypeError):
        return False
    return True


def _problem(entries: Sequence[dict]) -> tuple[int, str, str] | None:
    """(row, key, what is expected) of the first wrong entry."""
    if _is_sound(entries):
        return None
    for row, entry in enumerate(entries):
        if type(entry) is not dict:
            return row, "", "expected an object"
        for key in _NUMBERS:
            value = entry.get(key)
            if not is_whole(value):
                return row, key, "expected a whole number"
            if value < 0:
                return row, key, "expected 0 or more"
        for key in ("sha256", "index_sha256"):
            value = entry.get(key)
            if type(value) is not str or not _SHA256.fullmatch(value):
                return row, key, "expected the 64 digits of a sha256"
        for key in _PATHS:
            value = entry.get(key)
            if not isinstance(value, str):
                return row, key, "expected text"
            if not inside_folder(value):
                return row, key, _REFUSED
    return None
