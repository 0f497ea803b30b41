"""The index of a shard: where each sample lies and its checksum, as arrays.

An index file is JSON: index_version, shard (the file's name), keys, num_targets, and per field the
offsets, sizes and crc32 of all samples. In memory a field of a sample takes 16 bytes and a key its
letters: 100,000 samples take 3.5 MiB.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import read_small
from ebwm_scale.core.plain_text import shown
from ebwm_scale.core.strict_json import other_version, parse
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.shard_table import ShardInfo
from ebwm_scale.data.format.tar import MAX_MEMBER_BYTES

INDEX_VERSION = 2
MAX_INDEX_BYTES = 256 * 2**20
_PLACE = np.dtype([("offset", "<i8"), ("size", "<u4"), ("crc32", "<u4")])
REMAKE = "copy the dataset again, or make it again with the tool that did (tools/make_*_shards.py)"


@dataclass(frozen=True)
class Field:
    """Where one field of every sample of a shard lies: offsets and sizes in bytes, checksums, each
    (samples,).
    """

    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray


class ShardIndex:
    """The checked content of an index.

    names: of the fields.  places: offset, size and crc32 of each field of each sample, structured
    (samples, fields); `places[row].tolist()` gives them as plain numbers.
    """

    def __init__(self, keys: list[str], names: tuple[str, ...], places: np.ndarray):
        self.names, self.places = names, places
        self._keys = "\n".join(keys).encode()

    def __len__(self) -> int:
        return len(self.places)

    @property
    def num_bytes(self) -> int:
        """What it takes in memory."""
        return self.places.nbytes + len(self._keys)

    @property
    def keys(self) -> list[str]:
        """Of all samples; made anew, since only messages and checks need them."""
        return self._keys.decode().split("\n")

    @property
    def fields(self) -> dict[str, Field]:
        return {
            name: Field(
                self.places["offset"][:, i], self.places["size"][:, i], self.places["crc32"][:, i]
            )
            for i, name in enumerate(self.names)
        }

    @property
    def spans(self) -> np.ndarray:
        """(first byte, end) of each sample, of all its fields together: int64 (samples, 2)."""
        ends = self.places["offset"] + self.places["size"]
        return np.stack([self.places["offset"].min(axis=1), ends.max(axis=1)], axis=1)


def load_index(manifest: Manifest, shard: ShardInfo) -> ShardIndex:
    """Read an index and check it against the manifest; DataError if it is missing, damaged or of
    another shard.
    """
    path = manifest.folder / shard.index_path
    try:
        content = read_small(path, MAX_INDEX_BYTES)
    except ValueError as error:
        raise DataError(f"{path}: not an index ({error}); {REMAKE}") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the index of shard {shard.path}: {error.strerror}; {REMAKE}"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != shard.index_sha256:
        raise DataError(
            f"{path}: sha256 of the index is {found[:12]}..., the manifest says "
            f"{shard.index_sha256[:12]}...: damaged or of another shard; {REMAKE}"
        )
    index = parse_index(content, str(path), Path(shard.path).name, size=shard.size)
    if len(index) != shard.num_samples:
        raise DataError(
            f"{path}: does not fit shard {shard.path}: it describes {len(index)} samples, the "
            f"manifest says {shard.num_samples}; {REMAKE}"
        )
    return index


def parse_index(content: bytes, where: str, shard: str, *, size: int) -> ShardIndex:
    """The index in a file's bytes.

    where: for messages. shard: the shard's file name. size: of the shard, in bytes. Raises
    DataError for what is no index, or not one of this shard.
    """
    try:
        values = parse(content)
    except ValueError as error:
        raise DataError(f"{where}: not an index ({error}); {REMAKE}") from None
    problem = other_version(values, "index_version", INDEX_VERSION)
    if problem is not None:
        raise DataError(f"{where}: {problem}; {REMAKE}")
    if values.get("shard") != shard:
        raise DataError(
            f"{where}: does not fit shard {shard}: it describes {shown(values.get('shard'))}; "
            f"{REMAKE}"
        )
    try:
        keys = _keys(values.get("keys"))
        _column(values.get("num_targets"), "num_targets", len(keys), highest=2**62)
        index = ShardIndex(keys, *_places(values.get("fields"), len(keys)))
        spans = index.spans
    except ValueError as error:
        raise DataError(f"{where}: not an index ({error}); {REMAKE}") from None
    longest = int((spans[:, 1] - spans[:, 0]).max())
    if int(spans[:, 1].max()) > size or longest > MAX_MEMBER_BYTES:
        raise DataError(
            f"{where}: does not fit shard {shard}: it points to byte {int(spans[:, 1].max())} of "
            f"{size}, its longest sample has {longest} bytes; {REMAKE}"
        )
    return index


def _keys(values: Any) -> list[str]:
    if not isinstance(values, list) or not values or set(map(type, values)) != {str}:
        raise ValueError(f"keys are {shown(values)}: expected texts")
    joined = "".join(values)
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in set(joined)):
        raise ValueError("keys hold control characters")
    return values


def _places(fields: Any, num_samples: int) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, places) of the fields; ValueError for what is not three lists of whole numbers in
    range for each.
    """
    if not isinstance(fields, dict) or not fields:
        raise ValueError(f"fields are {shown(fields)}: expected an object")
    places = np.empty((num_samples, len(fields)), _PLACE)
    for number, (name, columns) in enumerate(fields.items()):
        if not isinstance(columns, dict):
            raise ValueError(f"field {shown(name)} is {shown(columns)}: expected an object")
        for key, column, highest in (
            ("offset", "offsets", 2**62),  # so that offset + size cannot overflow
            ("size", "sizes", MAX_MEMBER_BYTES),
            ("crc32", "crc32", 2**32 - 1),
        ):
            where = f"{column} of field {shown(name)}"
            places[key][:, number] = _column(
                columns.get(column), where, num_samples, highest=highest
            )
    return tuple(fields), places


def _column(values: Any, what: str, length: int, *, highest: int) -> np.ndarray:
    """int64 (length,) of a list of whole numbers from 0 to highest."""
    if not isinstance(values, list) or len(values) != length or set(map(type, values)) != {int}:
        raise ValueError(f"{what} are {shown(values)}: expected {length} whole numbers")
    lowest, largest = min(values), max(values)
    if lowest < 0 or largest > highest:
        wrong = lowest if lowest < 0 else largest
        raise ValueError(f"{what} hold {shown(wrong)}: expected 0 to {highest}")
    return np.array(values, dtype=np.int64)
