"""Writing shards: plain WebDataset tars with an index beside each, inside a folder that appears as
a whole or not at all.

The dataset is built in a sibling folder `.NAME.partial`, synced to disk, and renamed into place.
The lock on that folder lets one process build while others with the same output wait and then find
it there; what a killed process leaves is cleared by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.disk import sync
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.format import tar
from ebwm_scale.data.format.index import INDEX_VERSION
from ebwm_scale.data.format.manifest import MANIFEST_NAME
from ebwm_scale.data.format.shard_table import MAX_INLINE, SHARDS_PER_PART

DATASET_FILES = (  # of every dataset folder
    MANIFEST_NAME,
    "train-*.tar",
    "train-*.index.json",
    "train-*.shards.json",
    "validation-*.tar",
    "validation-*.index.json",
    "validation-*.shards.json",
)


class ShardWriter:
    """Writes the samples of one split into shards `PREFIX-000000.tar` of at most samples_per_shard
    samples.

    `add(fields, num_targets=)` takes one sample: {"tokens.npy": array, "clip.json": bytes}, and
    calls it by its number unless `key` names it.
    `close()` returns the manifest's list of shards. Each finished shard is indexed by reading it
    back, so the index describes what is on the disk. first_shard: the number of the first one,
    where several writers make the shards of one split.
    """

    def __init__(self, folder: Path, prefix: str, first_shard: int = 0, *, samples_per_shard: int):
        self.folder = folder
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self._first_shard = first_shard
        self._shards: list[dict[str, Any]] = []
        self._target_counts: list[int] = []
        self._open: _OpenShard | None = None

    def add(
        self,
        fields: Mapping[str, np.ndarray | bytes],
        *,
        num_targets: int,
        key: str | None = None,
    ) -> None:
        if self._open is None:
            shard = self._first_shard + len(self._shards)
            self._open = _OpenShard(self.folder / f"{self.prefix}-{shard:06d}.tar")
        number = self._first_shard * self.samples_per_shard + self.num_samples
        sample: dict[str, str | bytes] = {"__key__": key or f"{self.prefix}-{number:09d}"}
        for name, value in fields.items():
            sample[name] = value if isinstance(value, bytes) else _npy(value)
        self._open.tar.write(sample)
        self._target_counts.append(num_targets)
        self.num_samples += 1
        if len(self._target_counts) == self.samples_per_shard:
            self._finish_shard(self._open)

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; the manifest's entries of all shards."""
        if self._open is not None:
            self._finish_shard(self._open)
        return self._shards

    def abandon(self) -> None:
        """Close the open file of a shard that will never be finished."""
        if self._open is not None:
            with contextlib.suppress(OSError):  # a full disk may be why it is abandoned
                self._open.tar.close()
            self._open.file.close()

    def _finish_shard(self, shard: _OpenShard) -> None:
        shard.tar.close()
        shard.file.close()
        self._open = None
        path = shard.path
        index = {
            "index_version": INDEX_VERSION,
            "shard": path.name,
            "num_targets": self._target_counts,
            **read_tar_index(path),
        }
        index_path = path.with_suffix(".index.json")
        index_path.write_bytes(canonical_json(index))
        self._shards.append(
            {
                "path": path.name,
                "num_samples": len(index["keys"]),
                "num_targets": sum(self._target_counts),
                "size": path.stat().st_size,
                "sha256": file_sha256(path),
                "index_path": index_path.name,
                "index_sha256": file_sha256(index_path),
            }
        )
        self._target_counts = []


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, path: Path):
        self.path = path
        self.file = path.open("wb")
        # No clock: equal inputs give equal files.
        self.tar = load_webdataset().TarWriter(self.file, encoder=False, mtime=0)


def read_tar_index(path: Path) -> dict[str, Any]:
    """{"keys": [...], "fields": {field: {"offsets", "sizes", "crc32"}}} of a tar, found by walking
    it.

    Raises DataError for a tar that is not sound and for samples that do not all have the same
    fields.
    """
    keys: list[str] = []
    columns: dict[str, dict[str, list[int]]] = {}
    with path.open("rb") as file:
        for key, fields in tar.samples(file, str(path)):
            if keys and fields.keys() != columns.keys():
                raise DataError(
                    f"{path}: sample {key} has the fields {', '.join(fields)}, those before it "
                    f"{', '.join(columns)}"
                )
            keys.append(key)
            for name, member in fields.items():
                column = columns.setdefault(name, {"offsets": [], "sizes": [], "crc32": []})
                for part, value in zip(
                    column.values(),
                    (member.offset, len(member.content), zlib.crc32(member.content)),
                ):
                    part.append(value)
    return {"keys": keys, "fields": columns}


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A locked, empty sibling folder to build in; renamed to `output` at the end of the block,
    cleared if the block raises.

    An earlier `output` is replaced only by a finished one. A block that finds nothing to do can
    remove the folder. Raises DataError if `output` holds files that no dataset writer made.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.partial")
    previous = output.with_name(f".{output.name}.replaced")
    lock = lock_folder(staging)
    ours = True  # once renamed or removed, the name may be another process's folder
    try:
        for leftover in staging.iterdir():
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield staging
        ours = staging.exists()
        if ours:
            _sync_all(staging)
            if output.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.rename(output, previous)
            os.rename(staging, output)
            ours = False
            sync(output.parent)
            shutil.rmtree(previous, ignore_errors=True)
    finally:
        if ours:
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def refuse_foreign_files(output: Path, *, ours: tuple[str, ...]) -> None:
    """DataError if an existing output folder has entries that do not match the patterns `ours`:
    they would be deleted.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is a file; name a folder for the dataset")
    foreign = [
        entry.name
        for entry in sorted(output.glob("*"))
        if not any(entry.match(pattern) for pattern in ours)
    ]
    if foreign:
        raise DataError(
            f"{output}: already holds {foreign[0]} and {len(foreign) - 1} other files that are not "
            "part of a dataset; name a new or empty folder"
        )


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """The last file of a dataset folder; of a split with very many shards, their list goes into
    files beside it.

    The fingerprint is the same wherever the lists stand (data/format/shard_table.py).
    """
    splits = {}
    for name, split in values["splits"].items():
        splits[name] = split
        if len(split["shards"]) > MAX_INLINE:
            splits[name] = {key: value for key, value in split.items() if key != "shards"}
            splits[name]["parts"] = _write_parts(folder, name, split["shards"])
    text = json.dumps({**values, "splits": splits}, indent=1, sort_keys=True, allow_nan=False)
    with (folder / MANIFEST_NAME).open("wb") as file:
        file.write((text + "\n").encode("utf-8"))


def _write_parts(folder: Path, split: str, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The manifest's entries of the files that list these shards."""
    parts = []
    for number, first in enumerate(range(0, len(shards), SHARDS_PER_PART)):
        entries = shards[first : first + SHARDS_PER_PART]
        path, content = folder / f"{split}-{number:06d}.shards.json", canonical_json(entries)
        path.write_bytes(content)
        sums = {
            key: sum(entry[key] for entry in entries)
            for key in ("num_samples", "num_targets", "size")
        }
        parts.append(
            {
                "path": path.name,
                "sha256": hashlib.sha256(content).hexdigest(),
                "num_shards": len(entries),
                **sums,
            }
        )
    return parts


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def lock_folder(folder: Path) -> int:
    """An open, exclusively locked descriptor of the folder, made if need be; waits while another
    process builds in it.
    """
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if os.stat(folder).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except FileNotFoundError:
            pass  # the other process finished and renamed it while we waited
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def load_webdataset() -> Any:
    """The package; whoever forks processes that write imports it once, before."""
    try:
        import webdataset
    except ImportError:
        raise DataError(
            "writing shards needs the package webdataset; install it with: python -m pip install "
            "webdataset"
        ) from None
    return webdataset
